"""Section `snapshot`: what a consistent image of memory costs those who write to it, and whoever takes it.

A team is N processes (of the contender fork: threads of one process) that store to pages at random, each a little
after its last store, and one who takes an image of all of it while they do so. A turn is one image.
Lives here: the teams, their cases.  Not here: the writers, and the ways to copy that are C (ext/bench/pauses.c).
Invariants
 1. A writer's pause is from when it wants to store until it has stored, whatever keeps it; a turn's is the longest of
    any writer's. That of `nothing` is the machine's own.
 2. What is written is there before: every page has data, in the writers' page tables too.
 3. There is never more in memory than NEEDS says; sizes for which this machine has not enough are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import psutil

import pyshare
from pyshare import _peers
from pyshare.bench.measure import MIB, PAGE, PATIENCE, Case, Crew, Key, Limit, Results, Tick, alarm, figures, repeat
from pyshare.bench.sections import Section, Sweep, count_label, size_label
from pyshare.bench.teams import reopened

GIB = 1 << 30
MOST = 256  # writers
PARTICIPANTS = (1, 4, 8)
SMALL, LARGE, LARGEST = 4 * MIB, GIB, 4 * GIB
REST = 200_000  # ns between two stores of a writer
CHUNK = 512  # pages: the first lease in so many costs more than others
SETTLE = 0.005  # seconds that writers write before and after an image, and while nothing happens
MEASURES = ("pause", "first store", "next store", "taken", "saved")


class Team:
    """Writers, and how an image of their memory is taken."""

    name: ClassVar[str]
    needs: ClassVar[int]  # times its size it has in memory

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pauses = _peers.Pauses(case.length, case.participants, REST)
        self.held = contextlib.ExitStack()
        self.crew = self.held.enter_context(Crew())

    def start(self) -> None:
        """The writers are there; this process is a participant of nothing."""
        raise NotImplementedError

    def ready(self) -> None:
        """All teams have started."""

    def image(self) -> tuple[int, int, int, int]:
        """ns: of a first store to a page after the image's moment, of the next one to it, until the program that takes
        the image could go on, until it has all of it."""
        raise NotImplementedError

    def let_go(self) -> None:
        """The image is not needed any more."""

    def turn(self) -> dict[str, int]:
        """One image, by measure."""
        self.pauses.begin()
        time.sleep(SETTLE)
        self.pauses.forget()
        first, again, taken, saved = self.image()
        time.sleep(SETTLE)
        worst = self.pauses.worst()
        self.pauses.end()
        self.let_go()
        return dict(zip(MEASURES, (worst, first, again, taken, saved), strict=True))


class Shared(Team):
    """The memory is a mapping that the writers share."""

    needs = 1

    def start(self) -> None:
        self.memory = self.held.enter_context(mmap.mmap(-1, self.case.length))
        self.pauses.fill(self.memory)

        def live(index: int, tell: Callable[[Any], None]) -> None:
            self.pauses.populate(self.memory, True)
            tell(index)
            self.pauses.write(index, self.memory)

        self.crew.start(self.case.participants, live)


class Nothing(Shared):
    """No image."""

    name = "nothing"

    def image(self) -> tuple[int, int, int, int]:
        start = time.perf_counter_ns()
        first, again = self.pauses.probe()
        time.sleep(SETTLE)
        elapsed = time.perf_counter_ns() - start
        return first, again, elapsed, elapsed


class Stop(Shared):
    """Everybody waits at a barrier of pipes while one copies; where it copies to has been touched before."""

    name = "stop and copy"
    needs = 2

    def ready(self) -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.copy = self.held.enter_context(mmap.mmap(-1, self.case.length, private))
        self.pauses.populate(self.copy, True)
        self.pauses.populate(self.memory, False)

    def image(self) -> tuple[int, int, int, int]:
        taken = self.pauses.stop_and_copy(self.memory, self.copy)
        return (*self.pauses.probe(), taken, taken)


class Fork(Team):
    """One process has the memory to itself, and forks; the child reads all of it, as BGSAVE of Redis writes it."""

    name = "fork"
    needs = 2

    def start(self) -> None:
        def live(_index: int, tell: Callable[[Any], None]) -> None:
            tell(None)
            self.pauses.serve_forks()

        self.crew.start(1, live)
        self.pauses.await_child()  # none yet: the memory is filled

    def image(self) -> tuple[int, int, int, int]:
        taken = self.pauses.fork()
        first, again = self.pauses.probe()
        return first, again, taken, self.pauses.await_child()


class Region(Team):
    """The memory is a region's, and the image its snapshot."""

    prot: ClassVar[pyshare.Prot]

    def start(self) -> None:
        with pyshare.create(size=self.case.length) as region:
            self.pauses.fill(region.buf)
            if self.prot != pyshare.READ_WRITE:
                region.mprotect(0, region.size, self.prot)
            self.fd = reopened(region.fileno())
            self.held.callback(os.close, self.fd)
        self.crew.start(self.case.participants, self.live)

    def live(self, index: int, tell: Callable[[Any], None]) -> None:
        """A writer's life."""
        region = pyshare.attach(self.fd)
        self.populate(region)
        tell(index)
        self.write(index, region)

    def populate(self, region: pyshare.Region) -> None:
        """Nothing is for the first time any more but what the image makes so."""
        self.pauses.populate(region.buf, self.prot == pyshare.READ_WRITE)

    def write(self, index: int, region: pyshare.Region) -> None:
        """Its work."""
        self.pauses.write(index, region.buf)

    def ready(self) -> None:
        self.region = self.held.enter_context(pyshare.attach(self.fd))

    def image(self) -> tuple[int, int, int, int]:
        start = time.perf_counter_ns()
        self.snapshot = self.region.snapshot(timeout=PATIENCE)
        taken = time.perf_counter_ns() - start
        first, again = self.pauses.probe()
        return first, again, taken, self.save(start, taken)

    def save(self, start: int, _taken: int) -> int:
        """All of it is in the snapshot, or it need not be."""
        self.snapshot.finish()
        return time.perf_counter_ns() - start

    def let_go(self) -> None:
        self.snapshot.close()


class ReadWrite(Region):
    """Everybody may write everywhere; the pages are saved in the background."""

    name = "READ_WRITE"
    needs = 2
    prot = pyshare.READ_WRITE


class Leases(Region):
    """Every page is READ, and leased for each store; a page is saved by who leases it, and else not at all."""

    name = "leases"
    needs = 1
    prot = pyshare.READ

    def write(self, index: int, region: pyshare.Region) -> None:
        self.pauses.lease(index, region.buf, self.core)

    def populate(self, region: pyshare.Region) -> None:
        super().populate(region)
        self.core = _peers.Core(region)
        for page in range(0, self.case.length // PAGE, CHUNK):
            self.core.lease(page, False, 1)

    def save(self, _start: int, taken: int) -> int:
        return taken


# Regions last: what is forked while one is open becomes a participant of it.
TEAMS: tuple[type[Team], ...] = (Nothing, Stop, Fork, ReadWrite, Leases)
SHOWN = tuple(kind.name for kind in reversed(TEAMS))


# -- The section ---------------------------------------------------------------------------------

Member = tuple[type[Team], Case]


@contextlib.contextmanager
def assembled(members: Sequence[Member]) -> Iterator[list[Team]]:
    """The teams have their memory and their writers; at the end neither is left."""
    with contextlib.ExitStack() as stack:
        teams: list[Team] = []
        with alarm() as wind:
            for kind, case in members:
                team = kind(case)
                stack.callback(team.held.close)
                teams.append(team)
            for team in teams:
                wind()
                team.start()
            for team in teams:
                wind()
                team.ready()
        yield teams


def measure(members: Sequence[Member], limit: Limit, tick: Tick) -> Results:
    """Every member's figures; a round is a turn of each."""
    values: dict[Key, list[float]] = {}
    order = random.Random(0)
    with assembled(members) as teams:

        def everybody(counts: bool, wind: Callable[[], None]) -> None:
            for team in order.sample(teams, len(teams)):
                wind()
                for measure, elapsed in team.turn().items():
                    if counts:
                        values.setdefault((team.case, team.name, measure), []).append(elapsed / 1000)

        repeat(limit, tick, everybody)
    return {key: figures(found) for key, found in values.items()}


def needed(members: Sequence[Member]) -> int:
    """Bytes of memory at most."""
    return sum(kind.needs * case.length for kind, case in members)


def sets(sizes: Sequence[int], base: int, participants: Sequence[int]) -> Iterator[list[Member]]:
    """Who is measured at the same time: as many as this machine's memory holds.

    The two sizes between which leases are bounded are together.
    """
    point = functools.partial(Case, "snapshot", base)
    yield [
        *((kind, point(length=size)) for size in sizes if size < LARGE for kind in TEAMS),
        *((Leases, point(length=size)) for size in sizes if size == LARGEST),
    ]
    for size in sizes:
        if LARGE <= size < LARGEST:
            yield [(kind, point(length=size)) for kind in TEAMS]
    for size in sizes:
        if size == LARGEST:
            yield from ([(kind, point(length=size))] for kind in TEAMS if kind is not Leases)
    length = 16 * SMALL if LARGE in sizes else SMALL
    for count in participants:
        if count != base:
            yield [(kind, Case("snapshot", count, length=length)) for kind in TEAMS]


def about(members: Sequence[Member]) -> str:
    """For the progress bar."""
    sizes = dict.fromkeys(size_label(case) for _, case in members)
    return f"{members[0][1].participants} writers, {', '.join(sizes)}"


def snapshot(participants: Sequence[int], quick: bool, limit: Limit) -> Section:
    """A sweep over the sizes, and one over the writers."""
    counts = sorted({min(count, MOST) for count in participants})
    base = 4 if 4 in counts else counts[-1]
    sizes = [MIB, SMALL] if quick else [MIB, SMALL, 16 * SMALL, LARGE, LARGEST]
    room = psutil.virtual_memory().available * 3 // 4
    fit = [members for members in sets(sizes, base, counts) if needed(members) <= room]
    cases = sorted({case for members in fit for _, case in members}, key=lambda case: (case.length, case.participants))
    by_size = [case for case in cases if case.participants == base]
    length = 16 * SMALL if LARGE in sizes else SMALL
    by_count = [case for case in cases if case.length == length]
    steps = [(about(members), functools.partial(measure, members, rounds_of(members, limit))) for members in fit]
    table = functools.partial(Sweep, contenders=SHOWN)
    sweeps = [
        sweep
        for title, label, shown in (
            (f"of each size; {base} writers", size_label, by_size),
            (f"of {length // MIB} MiB; N writers", count_label, by_count),
        )
        for sweep in (
            table(f"The pause that an image makes, {title}", label, shown, measures=MEASURES[:1]),
            table(f"What else it costs, {title}", label, shown, measures=MEASURES[1:], quantiles=("p50",)),
        )
    ]
    return Section("snapshot", sweeps, steps, NOTE)


def rounds_of(members: Sequence[Member], limit: Limit) -> Limit:
    """Fewer of what takes long."""
    if max(kind.needs * case.length for kind, case in members) <= LARGEST:
        return limit
    return dataclasses.replace(limit, rounds=min(limit.rounds, 5), least=min(limit.least, 3), warm_up=1)


NOTE = (
    "A pause is the longest wait of any writer for one store, from when it was due, during one image; `nothing` is the "
    f"machine's own. Each writer rests {REST // 1000} µs after a store. Taken: when its taker goes on; saved: "
    "when all of it is in memory of its own (leases: it need not be). Stop and copy has touched its copy before; the "
    "child of fork only reads. At 4 GiB, contenders other than leases are measured one after the other."
)
