"""What the kernel says and does, for the tests: real protections, the limit of mappings, raw words of a region."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import itertools
import mmap
import os
import resource
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from conftest import PATIENCE, Child, idle, until

import pyshare
from pyshare import READ, Prot, Region, _core, _observer

PAGE = 4096
SECTIONS, LOCK, GENERATION = 288, 704, 768  # offsets in ext/segment/layout.h: in line 4, lines 11 and 12
ATTEMPT, COMPLETE, CLOSERS = 896, 904, 960  # lines 14 and 15
TICKETS = 984  # line 15: a bit for each lease that gave way
TICKET = 2816  # line 44: what they wait for, 24 bytes apart; the second word counts those of a place
SNAPSHOTS = 2624  # line 41: the words of all snapshots, 16 bytes apart
CUR, LEASES, LOCKS = 3, 5, 6  # kinds of sections
WAITING = 0x80000000  # in an owner word: somebody sleeps on it

Runs = list[tuple[int, int, Prot]]

# Tests of what happens in agents that are woken, stopped, or out of mappings; by uffd they need not run.
co_operative = pytest.mark.parametrize("region", ["mprotect"], indirect=True)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def die_quietly() -> None:
    """A fault that is meant leaves no traceback in the report and no core file."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def merged(runs: Iterable[tuple[int, int, Prot]]) -> Runs:
    found: Runs = []
    for prot, same in itertools.groupby(runs, key=lambda run: run[2]):
        part = list(same)
        found.append((part[0][0], sum(length for _, length, _ in part), prot))
    return found


def entries(pid: int, address: int, length: int) -> Runs:
    """A writable range, as its page-table entries have it: (address, length, READ where it is marked)."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        told = np.fromfile(pagemap, np.uint64, length // PAGE)
    marked = (told >> np.uint64(57)) & np.uint64(1)
    edges = [0, *(np.flatnonzero(np.diff(marked)) + 1).tolist(), len(marked)]
    return [
        (address + low * PAGE, (high - low) * PAGE, Prot.READ if marked[low] else Prot.READ_WRITE)
        for low, high in itertools.pairwise(edges)
    ]


def parts_of(pid: int, low: int, high: int, prot: Prot) -> Runs:
    """A mapping of a region's data, as its page-table entries have it: what is marked cannot be written."""
    if not prot & Prot.WRITE:
        return [(low, high - low, prot)]
    told = [(at, length, part & Prot.WRITE) for at, length, part in entries(pid, low, high - low)]
    return [(at, length, prot if writable else prot & ~Prot.WRITE) for at, length, writable in told]


class Place(Protocol):
    """Where data lie in a process: a region does, if that process has it at the same address."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...


def mapped(pid: int, region: Place) -> Runs:
    """The region's real protections in a process that has it there."""
    start, end = region.address, region.address + -(-region.size // PAGE) * PAGE
    runs: Runs = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            span, bits = line.split(" ", 2)[:2]
            low, high = (int(address, 16) for address in span.split("-"))
            if low >= end:
                break
            if low >= start:
                prot = sum(bit for bit, letter in zip(Prot, "rwx", strict=True) if letter in bits)
                runs.extend((at - start, length, part) for at, length, part in parts_of(pid, low, high, Prot(prot)))
    return merged(runs)


def agreed(region: Region, *pids: int) -> Runs:
    """Every one of these, and this process, has the protections that the map tells; returns them."""
    runs = [(offset, -(-length // PAGE) * PAGE, prot) for offset, length, prot in region.protections()]
    for pid in (os.getpid(), *pids):
        assert readable(mapped(pid, region)) == readable(runs), f"pid {pid}"
    return runs


def readable(runs: Runs) -> Runs:
    """On x86-64 what may be written may be read, and the engines differ in whether they say so."""
    return merged((at, length, prot | Prot.READ if prot & Prot.WRITE else prot) for at, length, prot in runs)


def word(region: Region, offset: int, kind: str = "I") -> int:
    """A word of the control segment."""
    return int(struct.unpack(kind, os.pread(region.fileno(), struct.calcsize(kind), offset))[0])


def wake(region: Region, offset: int) -> None:
    """Everybody who sleeps on a word of the control segment."""
    futex, wake = 202, 1
    with mmap.mmap(region.fileno(), PAGE) as header:
        at = ctypes.addressof(ctypes.c_char.from_buffer(header, offset))
        assert libc.syscall(futex, ctypes.c_void_p(at), wake, 2**31 - 1, 0, 0, 0) >= 0


def section_of(region: Region, kind: int) -> int:
    """Where it lies in the memfd."""
    return word(region, SECTIONS + 24 * (kind - 1) + 8, "Q")


def held(region: Region, kind: int, index: int) -> tuple[int, int]:
    """Who holds a page (LEASES) or a lock (LOCKS), and who is to have it next: owner words, 0 for nobody."""
    section = section_of(region, kind)
    value = word(region, section + index * (8 if kind == LEASES else 64), "Q")
    return value & ~WAITING & 0xFFFFFFFF, value >> 32 & ~WAITING


def sleeping(region: Region, pid: int | None = None) -> None:
    """A thread of this process (or of that one) sleeps until another participant gives something up."""
    observer, wanted = _core.Observer(region.fileno()), pid or os.getpid()
    until(lambda: any(slot.pid == wanted and slot.waits_for for slot in _observer.slots(observer)))


def slot_is_taken(region: Region, slot: int) -> bool:
    """By an open file description that has the slot's byte locked."""
    get, lock = 36, struct.Struct("hhqqi4x")  # F_OFD_GETLK, struct flock
    answer = fcntl.fcntl(region.fileno(), get, lock.pack(fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0))
    return bool(lock.unpack(answer)[0] != fcntl.F_UNLCK)


def is_asleep(native_id: int, pid: str | int = "self") -> bool:
    """That thread is in a futex call, which is where the core sleeps."""
    try:
        return Path(f"/proc/{pid}/task/{native_id}/syscall").read_text().split()[0] in {"202", "449", "455"}
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False


def until_agents_wait() -> None:
    """Every other thread of this process sleeps in the core: the point before an agent's first sleep is behind it."""
    own = threading.get_native_id()
    others = [int(task) for task in os.listdir("/proc/self/task") if int(task) != own]
    until(lambda: all(map(is_asleep, others)))


def until_waits(child: Child) -> None:
    """Its main thread sleeps in the core, having said that it is about to."""
    asleep = iter(lambda: is_asleep(child.pid, child.pid), None)
    until(lambda: all(next(asleep) for _ in range(50)))


def set_generation(fd: int, generation: int) -> None:
    """As if so many changes had been made, of which no participant has heard."""
    for offset in (GENERATION, ATTEMPT, COMPLETE):
        os.pwrite(fd, struct.pack("Q", generation), offset)


def region_at(generation: int, *, size: int, max_participants: int = 8) -> Region:
    """A new region whose last change was this one; nobody has seen another. Without the remote engine."""
    fd = _core.create(size, Prot.READ_WRITE, max_participants, 0o600, _core.POLICIES["die"], "")
    try:
        set_generation(fd, generation)
        return pyshare.attach(fd, engine="mprotect")
    finally:
        os.close(fd)


class Mappings:
    """Takes every mapping that this process may still have (vm.max_map_count), and gives some back."""

    def __init__(self) -> None:
        self._pages = int(Path("/proc/sys/vm/max_map_count").read_text()) + 16
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._base = libc.mmap(None, self._pages * PAGE, 0, flags, -1, 0)
        self._islands = 0

    def _protect(self, island: int, prot: int) -> bool:
        return bool(libc.mprotect(self._base + (2 * island + 1) * PAGE, PAGE, prot) == 0)

    def fill(self) -> None:
        """No mapping can be split any more."""
        while self._protect(self._islands, mmap.PROT_READ):
            self._islands += 1
        assert 2 * self._islands + 1 < self._pages

    def free(self, islands: int) -> None:
        """Room for two more mappings each."""
        for _ in range(islands):
            self._islands -= 1
            assert self._protect(self._islands, 0)


SYSTEM_CALLS = {
    "memfd_create": 319,
    "set_robust_list": 273,
    "close_range": 436,
    "fallocate": 285,
    "futex": 202,
    "futex_waitv": 449,
    "io_uring_setup": 425,
    "ioctl": 16,
    "lseek": 8,
    "madvise": 28,
    "mprotect": 10,
    "pidfd_getfd": 438,
    "pidfd_open": 434,
    "read": 0,
    "recvfrom": 45,
    "socket": 41,
    "userfaultfd": 323,
}


def refuse(call: str, error: int | None, second: int | None = None) -> None:
    """From now on a seccomp filter, in every thread, answers this call by an errno (0: a lie; None: a kill).

    Where a second argument is given, such calls alone.
    """
    _filter(call, second, 0x80000000 if error is None else 0x00050000 | error, all_threads=1)


def end_thread_at(call: str) -> None:
    """From now on this call ends the thread that makes it, and not its process: this one, and those that it starts."""
    _filter(call, None, 0, all_threads=0)


def _filter(call: str, second: int | None, action: int, all_threads: int) -> None:
    seccomp, set_filter, no_new_privileges = 317, 1, 38
    code = [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 1 if second is None else 3, SYSTEM_CALLS[call]),  # if it is not this one, let it pass
        *([] if second is None else [(0x20, 0, 0, 24), (0x15, 0, 1, second)]),  # likewise, for the second argument
        (0x06, 0, 0, action),
        (0x06, 0, 0, 0x7FFF0000),  # allow
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.syscall(seccomp, set_filter, all_threads, program) == 0


def forbid_waitv(error: int) -> None:
    """From now on futex_waitv fails with this errno in every thread of this process."""
    refuse("futex_waitv", error)
    assert libc.syscall(SYSTEM_CALLS["futex_waitv"], 0, 0, 0, 0, 0) == -1
    assert ctypes.get_errno() == error


SEIZE, INTERRUPT, GO_ON, GO_ON_TO_CALL, DETACH, LOOK = 0x4206, 0x4207, 7, 24, 17, 0x420E  # ptrace(2)
MARK_CALLS, STOP_AT_END, AT_END = 1, 0x40, 6
ANY_THREAD = 0x40000000  # __WALL, waitpid(2)


def trace(request: int, tid: int, address: int = 0, data: object = None) -> None:
    """ptrace(2)."""
    if libc.ptrace(request, tid, ctypes.c_void_p(address), data) < 0:
        error = ctypes.get_errno()
        if error in (errno.EPERM, errno.ENOSYS):
            pytest.skip("ptrace is not permitted here")
        raise OSError(error, os.strerror(error))


@contextlib.contextmanager
def stopped_before(tid: int, call: str, action: Callable[[], object]) -> Iterator[None]:
    """A thread (its native id), which `action` sets in motion, is stopped where it enters this call, until the end."""
    told = ctypes.create_string_buffer(88)

    def enters() -> bool:
        trace(LOOK, tid, len(told), told)
        return told.raw[0] == 1 and int.from_bytes(told.raw[24:32], "little") == SYSTEM_CALLS[call]

    trace(SEIZE, tid, 0, ctypes.c_void_p(MARK_CALLS))
    trace(INTERRUPT, tid)
    os.waitpid(tid, ANY_THREAD)
    action()
    while not enters():
        trace(GO_ON_TO_CALL, tid)
        os.waitpid(tid, ANY_THREAD)
    yield
    trace(DETACH, tid)


def signals_until_end(pid: int, action: Callable[[], object]) -> list[int]:
    """What a child's main thread gets, which `action` sets in motion; whoever waits for the child does so later."""
    got: list[int] = []
    trace(SEIZE, pid, 0, ctypes.c_void_p(STOP_AT_END))
    action()
    while (status := os.waitpid(pid, 0)[1]) >> 16 != AT_END:
        got.append(os.WSTOPSIG(status))
        trace(GO_ON, pid, 0, ctypes.c_void_p(got[-1]))
    trace(DETACH, pid)
    return got


def at_its_limit(region: Region) -> Callable[[Child], None]:
    """A body that obeys: fill, free N (mappings), change (of a page that no mapping borders on), end."""

    def body(child: Child) -> None:
        mappings = Mappings()
        child.say()
        while (order := child.hear().split())[0] != "end":
            if order[0] == "fill":
                mappings.fill()
            elif order[0] == "free":
                mappings.free(int(order[1]))
            else:
                with pytest.raises(OSError, match=f"pid {os.getpid()} could not apply") as caught:
                    region.mprotect(5 * PAGE, PAGE, READ)
                assert caught.value.errno == errno.ENOMEM
            child.say()

    return body


def tell(child: Child, order: str) -> None:
    child.say(order)
    assert child.hear() == "ok"


@contextlib.contextmanager
def in_background(*calls: Callable[[], object]) -> Iterator[list[object]]:
    """Threads in these calls, over at the end; a list of what they returned or raised."""
    outcomes: list[object] = []

    def run(call: Callable[[], object]) -> None:
        try:
            outcomes.append(call())
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    yield outcomes
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def elsewhere(
    fork: Callable[..., Child], body: Callable[[Child], object], point: str | None = None
) -> tuple[Child, int]:
    """A child in another pid namespace, spoken to through its parent, which ends as it does; and its pid here."""

    def outer(child: Child) -> None:
        if libc.unshare(0x20000000):  # CLONE_NEWPID: whoever is forked from now on lives in a new one
            child.say("0")
            return
        first = Child(idle)  # number 1, which no signal from within can end
        assert first.hear() == "ok"
        inner = Child(lambda self: (self.hear(), body(child)), point=point)
        child.say(str(inner.pid))
        inner.say("go")
        code = abs(inner.wait())
        first.end()
        os._exit(code)

    child = fork(outer)
    pid = int(child.hear())
    if not pid:
        pytest.skip("a new pid namespace is not permitted here")
    return child, pid
