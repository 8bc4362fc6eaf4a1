"""The errors of pyshare, and nothing else.

ShareError(Exception)
├ ProtectionError(PermissionError)    .region .offset .required .actual .generation .author .file .line
├ PropagationTimeout(TimeoutError)    .pids .generation
├ RegionExists(FileExistsError)
├ RegionNotFound(FileNotFoundError)
├ RegionClosed(ValueError)
├ ParticipantLimit
└ CorruptRegion                       .field

What the kernel refuses stays an OSError with its errno.  Every message says
what was given, what was expected, and what to do.  All of them pickle.
"""

from __future__ import annotations

import errno
from typing import Any


class ShareError(Exception):
    """The base of all errors that pyshare itself raises."""

    def __reduce__(self) -> Any:
        return _restore, (type(self), self.args, dict(self.__dict__))


def _restore(cls: type[ShareError], args: tuple[Any, ...], state: dict[str, Any]) -> ShareError:
    error = cls(*args)
    error.__dict__.update(state)
    return error


class ProtectionError(ShareError, PermissionError):
    """An access that the region's protection forbids.

    Raised by ``read`` and ``write``, and, where the policy is "raise", for any other access: then the error names the
    line of the program that made it.

    Attributes:
        region: the region's name, or None.
        offset: where the page begins, in bytes from the start of the region.
        required: the protection that the access needs.
        actual: the protection of the page.
        generation: the change that set it; 0 is the creation; None if it is older than the latest 1,024 changes.
        author: the pid that made this change, as that process sees it; None with ``generation``.
        file, line: where the program was at the access; None for ``read`` and ``write``, and where it cannot be known.
    """

    def __init__(
        self,
        message: str,
        *,
        region: str | None = None,
        offset: int = 0,
        required: int = 0,
        actual: int = 0,
        generation: int | None = None,
        author: int | None = None,
        file: str | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.errno = errno.EACCES
        self.region = region
        self.offset = offset
        self.required = required
        self.actual = actual
        self.generation = generation
        self.author = author
        self.file = file
        self.line = line


class PropagationTimeout(ShareError, TimeoutError):
    """Somebody was silent, or held a lock, for longer than the timeout.

    Attributes:
        pids: who, each once, as those processes see their own pids; nobody where the time went into saving pages.
        generation: the change that is made all the same, and that they apply before anything else they acknowledge;
            None if the time ran out before anything was changed.
    """

    def __init__(self, message: str, *, pids: list[int] | None = None, generation: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno.ETIMEDOUT
        self.pids = pids or []
        self.generation = generation


class RegionExists(ShareError, FileExistsError):
    """The name leads to a live region."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EEXIST


class RegionNotFound(ShareError, FileNotFoundError):
    """The name leads nowhere: never made, unlinked, or its last holder is gone."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOENT


class RegionClosed(ShareError, ValueError):
    """The region is closed in this process."""


class ParticipantLimit(ShareError):
    """Every slot of the region is taken (``max_participants`` of ``create``)."""


class CorruptRegion(ShareError):
    """The memory behind a descriptor or a name is no region, or a damaged one.

    Attributes:
        field: the part of the control segment that cannot be right.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
