"""pyshare: shared memory whose protection changes in every process at once.

The public names; no code.  Regions are in _region.py, names in _names.py,
errors in _errors.py, everything that touches memory in _core (ext/).
"""

from pyshare._changes import Change
from pyshare._core import DEFAULT, Frozen, Lease, Lock, Snapshot, set_default_timeout
from pyshare._errors import (
    CorruptRegion,
    ParticipantLimit,
    PropagationTimeout,
    ProtectionError,
    RegionClosed,
    RegionExists,
    RegionNotFound,
    ShareError,
)
from pyshare._image import Image
from pyshare._mapped import Participant, Prot, Violation
from pyshare._names import names, unlink
from pyshare._readonly import Observer
from pyshare._region import Region, attach, create

NONE, READ, WRITE, READ_WRITE, EXEC = Prot.NONE, Prot.READ, Prot.WRITE, Prot.READ_WRITE, Prot.EXEC

__version__ = "0.1.0"

__all__ = [
    "DEFAULT",
    "EXEC",
    "NONE",
    "READ",
    "READ_WRITE",
    "WRITE",
    "Change",
    "CorruptRegion",
    "Frozen",
    "Image",
    "Lease",
    "Lock",
    "Observer",
    "Participant",
    "ParticipantLimit",
    "PropagationTimeout",
    "Prot",
    "ProtectionError",
    "Region",
    "RegionClosed",
    "RegionExists",
    "RegionNotFound",
    "ShareError",
    "Snapshot",
    "Violation",
    "attach",
    "create",
    "names",
    "set_default_timeout",
    "unlink",
]
