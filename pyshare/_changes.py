"""What changed in a region, as its ring of changes has it.

Lives here: Change, and reading the ring in order without missing one unnoticed.
Not here: waiting for the next one (_async.py), what an observer reads (ext/operations/observe.c).
"""

from __future__ import annotations

import dataclasses
import time

from pyshare import _core
from pyshare._errors import ShareError
from pyshare._mapped import Prot


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A change of protection that is over: everybody has it, or its caller has given up on who is silent.

    Attributes:
        generation: its number; they follow each other without a gap.
        offset, length: its pages, in bytes.
        prot: what they are from it on; None where that is not one protection: see ``kind``.
        kind: "set"; "refused": a participant could not apply it, and "undone" comes next: the pages are what they were;
            "thawed": a freeze ended, and they are what they were before it; "follow": they stay what they are, a
            snapshot began or ended.
        pid: who made it, as that process sees itself.
        time: when it began, seconds since 1970.
        seconds: how long it took until everybody had it; None where somebody was silent, or it was refused.
        slowest: the pid that its caller waited for last; None if it waited for nobody.
    """

    generation: int
    offset: int
    length: int
    prot: Prot | None
    kind: str
    pid: int
    time: float
    seconds: float | None
    slowest: int | None


class Reader:
    """Goes through the ring from one generation on."""

    def __init__(self, observer: _core.Observer, since: int) -> None:
        self.observer = observer
        self.generation = since  # of the last that was read

    def next(self) -> Change | None:
        """The next one that is over; None: not yet. ShareError: the ring has it no more; then it goes on behind."""
        wanted = self.generation + 1
        if not self.observer.over(wanted):
            return None
        entry = self.observer.change(wanted)
        if entry is None:
            self.generation = max(wanted, self.observer.generation() - _core.RING)
            missed = self.generation - wanted + 1
            raise ShareError(
                f"changes: {missed} change{'s' * (missed != 1)}, from {wanted} on, came faster than they were read: "
                f"the region keeps its latest {_core.RING}; look at protections() and go on"
            )
        self.generation = wanted
        return self._told(wanted, entry)

    def _told(self, generation: int, entry: tuple[int, int, int, int, int, int, int, int]) -> Change:
        number, first, count, prot, author, begun, done, slowest = entry
        kind = _core.KINDS.get(number, f"kind {number}")
        following = self.observer.change(generation + 1) if not done and kind == "set" else None
        if following and _core.KINDS.get(following[0]) == "undone":
            kind = "refused"
        offset = first * _core.PAGE_SIZE
        return Change(
            generation=generation,
            offset=offset,
            length=min(count * _core.PAGE_SIZE, self.observer.size() - offset),
            prot=Prot(prot) if kind in ("set", "refused") else None,
            kind=kind,
            pid=author,
            time=time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - begun) / 1e9,
            seconds=(done - begun) / 1e9 if done >= begun else None,
            slowest=slowest or None,
        )
