"""What is known of regions at one moment, by somebody who takes part in none: what ls, show, top and metrics tell.

Lives here: finding the regions that there are; reading one: who takes part and how they are, who holds what, who waits
for whom.
Not here: how it is told (those commands), what is in a control segment (ext/operations/observe.c).
Invariants:
 1. A look changes nothing: a stale name stays, and nobody waits for who looks.
 2. What cannot be known is None, and never a guess: a pid of another pid namespace is nobody's here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import psutil

from pyshare import _core, _holder, _names, _observer
from pyshare._errors import CorruptRegion, RegionNotFound, ShareError
from pyshare._observer import Slot

MEMORY = "/memfd:pyshare "  # how /proc calls a descriptor of a region
PATIENCE = 0.1  # seconds that a name in the making is waited for
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
STATUSES = ("running", "stopped", "dead", "foreign", "joining", "unseen")  # of participants
STATES = ("live", "unnamed", "stale", "hidden")  # of regions
CHANGES = _core.RING  # that a region remembers


# -- One region ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lock:
    """A user lock that somebody has."""

    index: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Participant:
    """Who takes part, or is about to."""

    pid: int  # as it sees itself
    slot: int  # its place in the table: tells apart those of a process that attached twice
    status: str  # of STATUSES; "dead": killed, and nobody has noticed yet; "unseen": /proc does not show it
    command: str
    user: str | None
    engine: str
    applied: int
    late: int  # changes that its page tables do not follow yet
    fenced: bool
    page_tables: int | None  # bytes, of the whole process
    leases: int
    leased_seconds: float | None  # that it has had some of them without a break
    leases_taken: int  # since the region began, by all that had its place in the table
    locks: list[Lock]
    waits_for: int | None  # pid
    waits_seconds: float | None
    keeper: bool  # it does nothing but keep the region


@dataclasses.dataclass(frozen=True)
class Look:
    """A region at a moment, or nearly."""

    file: tuple[int, int]  # device and inode of its memory
    size: int
    page_size: int
    used: int  # bytes of memory that it takes, with the control segment and snapshots
    generation: int
    leases_taken: int
    waited_for: dict[int, tuple[int, float]]  # see the function
    participants: list[Participant]

    def count(self, *statuses: str) -> int:
        """How many participants are so."""
        return sum(one.status in statuses for one in self.participants)

    @property
    def leases(self) -> int:
        """Held now; those of the dead are over."""
        return sum(one.leases for one in self.participants if one.status != "dead")

    @property
    def waiting(self) -> int:
        """How many wait for somebody."""
        return sum(one.waits_for is not None for one in self.participants)

    @property
    def engine(self) -> str:
        """Of its participants; both, where they differ."""
        return ", ".join(sorted({one.engine for one in self.participants}))

    @property
    def slowest(self) -> tuple[int, float] | None:
        """(pid, seconds): who was waited for last in the longest change in which anybody was."""
        found = [(pid, took) for pid, (_, took) in self.waited_for.items() if pid]
        return max(found, key=lambda one: one[1], default=None)

    @property
    def kept_by(self) -> list[int]:
        """Pids of who does nothing but keep it."""
        return [one.pid for one in self.participants if one.keeper]


def ago(since: int) -> float | None:
    """Seconds, of CLOCK_MONOTONIC; 0: unknown."""
    return max(0, time.monotonic_ns() - since) / 1e9 if since else None


def user_name(uid: int) -> str:
    """As people call it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def page_tables(pid: int) -> int | None:
    """Bytes of memory that a process's page tables take."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("VmPTE:"):
                return int(line.split()[1]) * 1024
    return None


def status_of(slot: Slot, process: psutil.Process | None) -> str:
    """Of STATUSES."""
    if not slot.alive:
        return "dead"
    if not slot.here:
        return "foreign"
    if not slot.live:
        return "joining"
    with contextlib.suppress(psutil.Error):
        if process is not None:
            return "stopped" if process.status() in STOPPED else "running"
    return "unseen"


class Table:
    """The participants of a region: owner words become pids."""

    def __init__(self, observer: _core.Observer) -> None:
        self.slots = _observer.slots(observer)
        self._by_owner = {slot.owner: slot for slot in self.slots}

    def pid(self, owner: int) -> int | None:
        """None: it is gone, and somebody has noticed."""
        slot = self._by_owner.get(owner)
        return slot.pid if slot else None

    def alive(self, owner: int) -> bool:
        """Nobody but the dead leaves what it holds."""
        slot = self._by_owner.get(owner)
        return slot is not None and slot.alive


def participant(slot: Slot, table: Table, generation: int, locks: list[Lock]) -> Participant:
    """One row of the table."""
    process = slot.process() if slot.alive else None
    uid = None
    with contextlib.suppress(psutil.Error):
        uid = process.uids().real if process else None
    waits = slot.alive and slot.waits_for and table.pid(slot.waits_for)
    return Participant(
        pid=slot.pid,
        slot=(slot.owner & _core.MAX_PARTICIPANTS) - 1,
        status=status_of(slot, process),
        command=slot.command(),
        user=None if uid is None else user_name(uid),
        engine="uffd" if slot.uffd else "mprotect",
        applied=slot.applied,
        late=max(0, generation - slot.applied) if slot.live else 0,
        fenced=slot.fenced,
        page_tables=page_tables(slot.pid) if process else None,
        leases=slot.leases,
        leased_seconds=ago(slot.leased_since) if slot.leases else None,
        leases_taken=slot.takes,
        locks=locks,
        waits_for=waits or None,
        waits_seconds=ago(slot.waits_since) if waits else None,
        keeper=process is not None and _holder.is_holder(process),
    )


def waited_for(observer: _core.Observer, since: int) -> dict[int, tuple[int, float]]:
    """By pid of whom callers waited for last: (of how many changes, the longest of them in seconds); 0: for nobody.

    Of the changes after generation `since` that the region remembers.
    """
    latest = observer.generation()
    found: dict[int, tuple[int, float]] = {}
    for generation in range(max(since, latest - CHANGES) + 1, latest + 1):
        change = observer.change(generation)
        if change is not None and change[6] >= change[5]:
            pid, took = change[7], (change[6] - change[5]) / 1e9
            times, longest = found.get(pid, (0, 0.0))
            found[pid] = (times + 1, max(longest, took))
    return found


def look(observer: _core.Observer, fd: int, since: int = 0) -> Look:
    """What there is to know without reading the map; who was waited for in changes after generation `since`."""
    memory, generation, table = os.fstat(fd), observer.generation(), Table(observer)
    locks: dict[int, list[Lock]] = {}
    for index, owner, taken in observer.locks():
        locks.setdefault(owner, []).append(Lock(index, ago(taken)))
    return Look(
        file=(memory.st_dev, memory.st_ino),
        size=observer.size(),
        page_size=observer.page_size(),
        used=memory.st_blocks * 512,
        generation=generation,
        leases_taken=observer.takes(),
        waited_for=waited_for(observer, since),
        participants=[participant(slot, table, generation, locks.get(slot.owner, [])) for slot in table.slots],
    )


# -- All regions -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """A region, or a name that leads to none, or to one that may not be seen."""

    name: str | None
    state: str  # of STATES
    why: str | None  # why there is not more to be seen
    user: str | None  # whose the name is, or the memory
    look: Look | None

    @property
    def label(self) -> str:
        """What to call it."""
        if self.name is not None or self.look is None:
            return str(self.name)
        return f"(inode {self.look.file[1]})"

    def plain(self) -> dict[str, Any]:
        """For programs: a row of ``ls --json``; numbers are null where they may not be known."""
        seen = self.look
        return {
            "name": self.name,
            "label": self.label,
            "state": self.state,
            "stale": self.state == "stale",
            "why": self.why,
            "user": self.user,
            "size": seen and seen.size,
            "used": seen and seen.used,
            "participants": seen and len(seen.participants),
            **{status: seen and seen.count(status) for status in STATUSES},
            "engine": seen and seen.engine,
            "generation": seen and seen.generation,
            "leases": seen and seen.leases,
            "kept_by": seen and seen.kept_by,
            "pids": seen and [one.pid for one in seen.participants],
        }


Since = Mapping[tuple[int, int], int]  # by Look.file: generations, as of look()


def named(name: str, since: Since) -> Found | None:
    """What a name leads to; None: it has gone meanwhile."""
    uid = _names.owner(name)
    if uid is None:
        return None
    try:
        observer, fd = _observer.observe(name, PATIENCE)
    except _names.Stale:
        return Found(name, "stale", "its last holder is gone; unlink removes it", user_name(uid), None)
    except RegionNotFound:
        return None
    except (ShareError, OSError) as error:
        return Found(name, "hidden", getattr(error, "strerror", None) or str(error), user_name(uid), None)
    try:
        return Found(name, "live", None, user_name(uid), look_since(observer, fd, since))
    finally:
        os.close(fd)


def look_since(observer: _core.Observer, fd: int, since: Since) -> Look:
    """With who was waited for since the generation that stands there."""
    memory = os.fstat(fd)
    return look(observer, fd, since.get((memory.st_dev, memory.st_ino), 0))


def descriptors() -> Iterator[tuple[int, str | None]]:
    """(pid, path in /proc of a descriptor of some region); None for the path: that process may not be looked into."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            links = os.listdir(f"/proc/{entry}/fd")
        except PermissionError:
            yield int(entry), None
            continue
        except OSError:
            continue  # gone meanwhile
        for link in links:
            with contextlib.suppress(OSError):
                path = f"/proc/{entry}/fd/{link}"
                if os.readlink(path).startswith(MEMORY):
                    yield int(entry), path


def unnamed(known: set[tuple[int, int]], since: Since) -> tuple[list[Found], int]:
    """Regions that no name leads to, but a descriptor of some process; and how many may not be looked into."""
    found, closed = [], 0
    for pid, path in descriptors():
        if path is None:
            closed += 1
            continue
        with contextlib.suppress(OSError, CorruptRegion), contextlib.ExitStack() as stack:
            memory = os.stat(path)
            if (memory.st_dev, memory.st_ino) in known:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            observer = _core.Observer(fd)
            known.add((memory.st_dev, memory.st_ino))
            was = observer.name()
            why = f"pid {pid} has it" + (f"; it was created as {was!r}" if was else "")
            user = user_name(memory.st_uid)
            found.append(Found(None, "unnamed", why, user, look_since(observer, fd, since)))
    return found, closed


def regions(since: Since = MappingProxyType({})) -> tuple[list[Found], int]:
    """All that can be found, those with names first; and how many processes may not be searched for others."""
    by_name = [one for name in _names.entries() if (one := named(name, since)) is not None]
    rest, closed = unnamed({one.look.file for one in by_name if one.look}, since)
    return by_name + rest, closed
