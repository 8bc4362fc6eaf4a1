"""Sections `lease` and `lock`: take, store, release, over and over, and what else does the like.

Lives here: the contenders and their cases.  A turn is BATCH cycles after one
that is not counted (so that nobody pays for the caches of who went before);
its time is that of one of them, on average.
Not here: the cycles that are C (ext/bench/peers.c).
Invariants
 1. All regions are open at once and take turns, each with as many participants
    as its case says, which sleep: N = 1 and N = 256 saw the same machine.
 2. The floors go in a process of one thread that has no region.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyshare
from pyshare import _peers
from pyshare.bench.measure import PAGE, Case, Crew, Key, Limit, Results, Tick, alarm, interleave
from pyshare.bench.sections import Section, Sweep
from pyshare.bench.teams import Bare, Mprotect, Region, Uffd

PARTICIPANTS = (1, 8, 64, 256)
BATCH = 20
SPARSE = 64 << 30  # bytes of the file that the floors map
REGION = 16 * PAGE
WITHIN = REGION // 2  # the page: neighbours on both sides

Turn = Callable[[], float]  # ns of a cycle


def timed(repeat: Callable[[range], None]) -> float:
    """ns of a cycle that is written in Python; `repeat` goes through as many as the range is long."""
    repeat(range(1))
    batch = range(BATCH)
    start = time.perf_counter_ns()
    repeat(batch)
    return (time.perf_counter_ns() - start) / BATCH


class Floors:
    """A process of one thread that goes through the cycles of ext/bench/peers.c."""

    def __init__(self, crew: Crew) -> None:
        self.memory = mmap.mmap(-1, 2 * PAGE)
        self.board = _peers.Board(self.memory, 0, PAGE, PAGE)
        file = os.memfd_create("bench")
        os.ftruncate(file, SPARSE)

        def serve(_index: int, tell: Callable[[Any], None]) -> None:
            tell(None)
            self.board.cycle_serve(file, SPARSE)

        crew.start(1, serve)
        os.close(file)

    def turn(self, cycle: int, times: int = BATCH) -> Turn:
        """One of them."""
        return lambda: self.board.cycle(cycle, times) / times


def sleep(_index: int, tell: Callable[[Any], None]) -> None:
    """The life of a participant that does nothing."""
    tell(None)
    while True:
        signal.pause()


@contextlib.contextmanager
def regions(kinds: Sequence[type[Region]], counts: Sequence[int]) -> Iterator[dict[tuple[str, int], pyshare.Region]]:
    """A region that is READ, of each kind with each number of participants beside this process.

    Those of the smallest are participants of all.
    """
    opened: dict[tuple[str, int], pyshare.Region] = {}
    with contextlib.ExitStack() as stack, alarm() as wind:
        crew = stack.enter_context(Crew())
        descending = sorted(counts, reverse=True)
        for count, fewer in zip(descending, [*descending[1:], 0], strict=True):
            for kind in kinds:
                region = pyshare.create(size=REGION, prot=pyshare.READ, engine=kind.engine)
                stack.callback(region.close)
                opened[kind.name, count] = region
            for _ in range(count - fewer):
                wind()
                crew.start(1, sleep)
        yield opened


# -- Leases --------------------------------------------------------------------------------------


def lease_turn(region: pyshare.Region, window: bool) -> Turn:
    """Of one page, from Python."""

    def repeat(batch: range) -> None:
        for _ in batch:
            with region.lease(WITHIN, PAGE, window=window) as lease:
                lease.view[0] = 1

    return lambda: timed(repeat)


def core_lease_turn(region: pyshare.Region, window: bool) -> Turn:
    """Of one page, from C."""
    core = _peers.Core(region)
    return lambda: core.lease(WITHIN // PAGE, window, BATCH) / BATCH


def lease_turns(floors: Floors, opened: dict[tuple[str, int], pyshare.Region]) -> dict[Key, Turn]:
    """Everybody's."""
    peers = Case("lease")
    turns: dict[Key, Turn] = {(peers, "2 mprotect", "C"): floors.turn(_peers.MPROTECT)}
    if not Bare.missing():
        turns[peers, "2 bare uffd", "C"] = floors.turn(_peers.UFFD)
    for (engine, count), region in opened.items():
        for window in (False, True):
            contender = f"{engine} window" if window else engine
            case = Case("lease", participants=count)
            turns[case, contender, "Python"] = lease_turn(region, window)
            turns[case, contender, "C"] = core_lease_turn(region, window)
    return turns


# -- Locks ---------------------------------------------------------------------------------------


def lock_turn(region: pyshare.Region, memory: memoryview) -> Turn:
    """Of a lock of the region, from Python."""

    def repeat(batch: range) -> None:
        for _ in batch:
            with region.lock(0):
                memory[0] = 1

    return lambda: timed(repeat)


def multiprocessing_turn(memory: memoryview) -> Turn:
    """Of multiprocessing's lock, from Python."""
    lock = multiprocessing.get_context("fork").Lock()

    def repeat(batch: range) -> None:
        for _ in batch:
            with lock:
                memory[0] = 1

    return lambda: timed(repeat)


def core_lock_turn(region: pyshare.Region) -> Turn:
    """Of a lock of the region, from C."""
    core = _peers.Core(region)
    return lambda: core.lock(0, BATCH) / BATCH


def lock_turns(floors: Floors, opened: dict[tuple[str, int], pyshare.Region]) -> dict[Key, Turn]:
    """Everybody's; what they store to is not protected."""
    peers = Case("lock")
    memory = memoryview(mmap.mmap(-1, PAGE))
    turns: dict[Key, Turn] = {
        (peers, "mp.Lock", "Python"): multiprocessing_turn(memory),
        (peers, "fcntl", "C"): floors.turn(_peers.FCNTL),
        (peers, "robust mutex", "C"): floors.turn(_peers.MUTEX),
    }
    for (_, count), region in opened.items():
        case = Case("lock", participants=count)
        turns[case, "lock", "Python"] = lock_turn(region, memory)
        turns[case, "lock", "C"] = core_lock_turn(region)
    return turns


# -- The sections --------------------------------------------------------------------------------


def measure(
    kinds: Sequence[type[Region]],
    turns: Callable[[Floors, dict[tuple[str, int], pyshare.Region]], dict[Key, Turn]],
    participants: Sequence[int],
    limit: Limit,
    tick: Tick,
) -> Results:
    """Everybody's times of one section."""
    with Crew() as crew:
        floors = Floors(crew)
        with regions([kind for kind in kinds if not kind.missing()], participants) as opened:
            return interleave([turns(floors, opened)], limit, tick)


def count_label(case: Case) -> str:
    """The number of participants, or what has none."""
    return f"N = {case.participants}" if case.participants else "peers"


def section(
    name: str,
    title: str,
    kinds: Sequence[type[Region]],
    turns: Callable[[Floors, dict[tuple[str, int], pyshare.Region]], dict[Key, Turn]],
    contenders: Sequence[str],
    participants: Sequence[int],
    limit: Limit,
) -> Section:
    """One table, one step."""
    cases = [Case(name, participants=count) for count in (*participants, 0)]
    sweep = Sweep(title, count_label, cases, contenders, ("Python", "C"))
    step = functools.partial(measure, kinds, turns, participants, limit)
    return Section(name, [sweep], [(f"{max(participants)} participants, {name}s", step)])


def lease(participants: Sequence[int], limit: Limit) -> Section:
    """Leases of one page, and bare protection."""
    contenders = ["uffd", "uffd window", "mprotect", "mprotect window", "2 mprotect", "2 bare uffd"]
    title = f"A lease of one page: take, store, release; N idle participants; turns of {BATCH}"
    return section("lease", title, (Uffd, Mprotect), lease_turns, contenders, participants, limit)


def lock(participants: Sequence[int], limit: Limit) -> Section:
    """Locks, and other locks."""
    kinds = (Mprotect,) if Uffd.missing() else (Uffd,)
    title = f"A lock: take, store, release; N idle participants; turns of {BATCH}"
    contenders = ["lock", "mp.Lock", "fcntl", "robust mutex"]
    return section("lock", title, kinds, lock_turns, contenders, participants, limit)
