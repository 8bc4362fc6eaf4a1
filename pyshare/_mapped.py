"""A region as this process has it mapped, whether it takes part or only looks.

Lives here: Prot, Participant, and Mapped, which Region (_region.py) and Observer
(_readonly.py) have in common: what can be asked and read.  Not here: what
changes anything.
Invariant: a wrong argument raises before anything is looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import math
import mmap
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import psutil

from pyshare import _core
from pyshare._errors import RegionClosed

if TYPE_CHECKING:
    import numpy.typing as npt

    from pyshare._async import Changes


class Prot(enum.IntFlag):
    """Protections, equal to ``mmap.PROT_*``; plain ints are taken wherever one is expected.

    On x86-64 a page that is WRITE alone can be read as well (mprotect(2)).
    """

    NONE = 0
    READ = mmap.PROT_READ
    WRITE = mmap.PROT_WRITE
    READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
    EXEC = mmap.PROT_EXEC


@dataclasses.dataclass(frozen=True, slots=True)
class Participant:
    """A process that has a region mapped, as of the moment it was looked at.

    Attributes:
        pid: its process, as that process sees itself (in its own pid namespace).
        applied: the last generation that its page tables follow.
        alive: False once it is known to be gone; its slot is free for the next one.
        engine: "uffd" where other participants change its page tables from outside (userfaultfd(2)), "mprotect" where
            it changes them itself when it is woken.
        fenced: True while its whole mapping is no-access, because it could not apply a change.
        tid: the thread id of its agent.
    """

    pid: int
    applied: int
    alive: bool
    engine: str
    fenced: bool
    tid: int

    def process(self) -> psutil.Process | None:
        """Its process, for its command line, status, memory; None where it cannot be seen from here.

        That is when it is gone, or in another pid namespace, where its numbers mean somebody else.
        """
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if any(thread.id == self.tid for thread in process.threads()):
                return process
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """A forbidden access that some participant made, of the latest 16 that the region remembers.

    Attributes:
        time: when, seconds since 1970 by that machine's clock, as ``time.time()`` has it.
        pid: of the process that made it, as that process sees itself; it may be gone.
        command: its command line, of when it had its first region: each word without the folders before it, the first
            79 bytes; "" where it could not be read.
        offset: the byte, from the start of the region.
        protection: of its page at that moment; NONE where the process was fenced.
        generation: the change that set it; 0 is the creation; None if that is older than the latest 1,024 changes.
        outcome: "died": the process was about to end by the signal; "raised": the thread was told by a
            ProtectionError; "waited": the thread began to wait at ``time`` until the access is allowed, or it is
            interrupted.
    """

    time: float
    pid: int
    command: str
    offset: int
    protection: Prot
    generation: int | None
    outcome: str


def violations(mapped: _core.Mapped) -> list[Violation]:
    """Those that the region remembers, the newest last."""
    return [
        Violation(time / 1e9, pid, command, offset, Prot(prot), generation, outcome)
        for time, pid, command, offset, prot, generation, outcome in mapped._violations()
    ]


class Mapped(_core.Mapped):
    """What a participant and an observer have in common."""

    _name: str | None = None
    _size: int = 0
    _streams: weakref.WeakSet[Changes] | None = None
    _page: int = 0

    # -- What it is ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The name it was created with, or None. It stays when the name is unlinked or moved."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes, exactly as asked for."""
        return self._size

    def __len__(self) -> int:
        return self._size

    @property
    def page_size(self) -> int:
        """Bytes of a page, the unit of protection and of leases: 4,096, or that of its huge pages."""
        return self._page

    @property
    def address(self) -> int:
        """Where the data begins in this process; the same in a forked child."""
        return self._facts()[2]

    @property
    def generation(self) -> int:
        """The latest change of protection: 0 after creation."""
        return self._facts()[3]

    @property
    def closed(self) -> bool:
        """True once ``close`` has succeeded in this process."""
        return not self._is_open()

    @property
    def buf(self) -> memoryview:
        """One memoryview of the data, the same at each look; ``close`` releases it."""
        return self._view()

    def readonly_fd(self) -> int:
        """A new descriptor that is read-only for good: pass it on, and whoever gets it can observe the region.

        It is the caller's, to be closed, and closed by exec unless it is passed on (``pass_fds``, SCM_RIGHTS). What is
        mapped through it can never be made writable (mmap(2)); :func:`pyshare.attach` with ``readonly=True`` takes it.
        A process whose user may write to the memory (``mode`` of ``create``; its owner may) can open it anew, for
        writing, through /proc: against the same user it is a protection from mistakes, not from malice. Another user's
        cannot change a byte. It can take locks to read (fcntl(2)), and by those keep snapshots from being taken, and
        make the deaths of who joins meanwhile visible in their own pid namespace alone.

        Raises:
            RegionClosed.
            OSError: what the kernel refuses: EMFILE.
        """
        return _core.read_only(self._fileno())

    def protection(self, offset: int) -> Prot:
        """The protection of the page that holds this byte, as it was asked for."""
        offset = _core.integer(offset, "offset")
        if not 0 <= offset < self._size:
            raise ValueError(f"offset must be in 0 to {self._size - 1}, not {offset}")
        return Prot(self._protection(offset // _core.PAGE_SIZE))

    def protections(self) -> list[tuple[int, int, Prot]]:
        """Runs of (offset, length, protection), ascending, that cover the region; bytes."""
        page, pages = _core.PAGE_SIZE, -(-self._size // _core.PAGE_SIZE)
        return [
            (first * page, min(count * page, self._size - first * page), Prot(prot))
            for first, count, prot in self._runs(pages)
        ]

    def participants(self) -> list[Participant]:
        """Who has the region mapped now; dead ones that nobody has noticed yet have ``alive`` False.

        Observers are in no list, since the kernel keeps none of who has a file mapped read-only.
        """
        return [
            Participant(pid=pid, applied=applied, alive=alive, engine=engine, fenced=fenced, tid=tid)
            for pid, tid, applied, alive, engine, fenced in self._participants()
        ]

    def violations(self) -> list[Violation]:
        """The latest 16 forbidden accesses of all participants, the newest last, whatever became of those.

        So who takes part, or observes, can tell of what a process died that is gone. Of the accesses that a thread
        makes until it is told by an exception, the first is kept. What ``read`` and ``write`` refuse is no violation,
        nor is an access that a change forbids which is undone. Where a process is killed in the middle of keeping one,
        that one is missing.

        Raises:
            RegionClosed.
            OSError: EBADF: the program has closed the observer's descriptor.
        """
        return violations(self)

    # -- Life ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The memory is not mapped in this process any more."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self.closed:
            raise RegionClosed("the region is closed in this process; attach it again by its name or a descriptor")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BufferError:
            if error is None:
                raise

    # -- Data ------------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``offset`` on, which need not be aligned. Never crashes.

        Raises:
            ProtectionError: a page of the range may not be read by participants; an observer reads each.
            ValueError: a range outside the region.
            RegionClosed.
        """
        offset, length = _core.integer(offset, "offset"), _core.integer(length, "length")
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(
                f"the range of {length} bytes at offset {offset} is not inside the region's {self._size} bytes"
            )
        return self._read(offset, length)

    def numpy(
        self, dtype: npt.DTypeLike, shape: SupportsIndex | Sequence[SupportsIndex] | None = None, offset: int = 0
    ) -> npt.NDArray[Any]:
        """An array over the memory from ``offset`` on, in bytes, which need not be aligned; nothing is copied.

        Writable, whatever the protection of the pages: an access that it forbids is a violation. An observer's is
        read-only for good. The memory stays as long as the array, or a view of it: ``close`` raises BufferError then.

        Args:
            shape: None for as many items, in one dimension, as there is room for.

        Raises:
            ValueError: the array is not inside the region; a dtype of Python objects, or without a size.
            TypeError: what numpy takes for no dtype.
            ImportError: numpy is not installed.
            RegionClosed.
        """
        np = _numpy()
        kind, offset = np.dtype(dtype), _core.integer(offset, "offset")
        if kind.hasobject or not kind.itemsize:
            raise ValueError(
                f"dtype must have a size, and no Python objects in it, which other processes have not: {kind}"
            )
        if not 0 <= offset <= self._size:
            raise ValueError(f"offset must be in 0 to {self._size}, not {offset}")
        lengths = _lengths(shape, (self._size - offset) // kind.itemsize)
        if (needed := math.prod(lengths) * kind.itemsize) > self._size - offset:
            raise ValueError(
                f"an array of {kind} and shape {lengths} has {needed} bytes; from offset {offset} on the region has "
                f"{self._size - offset}"
            )
        array: npt.NDArray[Any] = np.ndarray(lengths, kind, memoryview(self), offset)
        return array

    # -- What changes ----------------------------------------------------------------------------------------------

    def changes(self, *, since: int | None = None) -> Changes:
        """Each change of protection that is over (:class:`Change`), in order, until the region is closed here.

        For ``async for``. Begins with the change after the call, or after generation ``since``. What is changed by
        other processes without waking anybody is seen within a millisecond while changes come, and within 20 later.

        Raises:
            ShareError: more than 1,024 changes came since the last that was read, so that some are missed. The next
                step goes on with the oldest that is left.
            ValueError: a generation that has not come yet.
            RegionClosed.
        """
        from pyshare import _async

        latest = self.generation
        since = latest if since is None else _core.integer(since, "since")
        if not 0 <= since <= latest:
            raise ValueError(f"since must be a generation, 0 to {latest}, not {since}")
        stream = _async.Changes(self._fileno(), since)
        self._streams = self._streams or weakref.WeakSet()
        self._streams.add(stream)
        return stream

    def _end_streams(self) -> None:
        for stream in self._streams or ():
            stream.end()


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise ImportError("arrays need numpy, which is not installed: pip install numpy", name="numpy") from error


def _lengths(shape: SupportsIndex | Sequence[SupportsIndex] | None, room: int) -> tuple[int, ...]:
    """Of an array's dimensions."""
    if shape is None:
        return (room,)
    given = shape if isinstance(shape, Sequence) else (shape,)
    lengths = tuple(_core.integer(length, "shape") for length in given)
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape must be numbers that are 0 or more, not {shape!r}")
    return lengths
