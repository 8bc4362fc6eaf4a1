"""Sections `sparse` and `memory`: joining a large region, and what is paid in bytes.

Lives here: how each is set up and measured.  Not here: the floors that are C
(ext/bench/peers.c).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyshare
from pyshare import _peers
from pyshare.bench.cycles import SPARSE, Floors, Turn, sleep
from pyshare.bench.measure import MIB, PAGE, Case, Crew, Limit, Results, Tick, alarm, figures, interleave
from pyshare.bench.sections import Section, Sweep, count_label, size_label
from pyshare.bench.teams import Mprotect, Region, Uffd, reopened

SLOTS = 1024  # that are taken
ROOM = 8  # slots for those who come and go
HOUSES = 32  # processes that share them out among themselves


def kinds() -> list[type[Region]]:
    """The engines that this machine has."""
    return [kind for kind in (Uffd, Mprotect) if not kind.missing()]


def page_tables(pid: int | str = "self") -> int:
    """KiB of a process."""
    found = re.search(r"^VmPTE:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) if found else 0


# -- Sparse --------------------------------------------------------------------------------------


def prot_label(case: Case) -> str:
    """The protection that the region was created with."""
    return "READ_WRITE" if case.writable else "READ"


def prot_of(case: Case) -> pyshare.Prot:
    """The same."""
    return pyshare.READ_WRITE if case.writable else pyshare.READ


def create(case: Case, engine: str) -> pyshare.Region:
    """A region of the case."""
    return pyshare.create(size=case.length, prot=prot_of(case), max_participants=SLOTS + ROOM, engine=engine)


def crowded(case: Case, crew: Crew) -> int:
    """A descriptor of a region of which SLOTS slots are taken, none by this process."""
    with create(case, "auto") as region:
        fd = reopened(region.fileno())

    def live(index: int, tell: Callable[[Any], None]) -> None:
        here = [pyshare.attach(fd, timeout=None) for _ in range(index * SLOTS // HOUSES, (index + 1) * SLOTS // HOUSES)]
        tell(len(here))
        sleep(index, lambda _: None)

    crew.start(HOUSES, live)
    return fd


def joined(join: Callable[[], pyshare.Region]) -> float:
    """ns that it takes; the region is closed again, which is not counted."""
    start = time.perf_counter_ns()
    region = join()
    elapsed = time.perf_counter_ns() - start
    region.close()
    return elapsed


def mapped(fd: int, size: int) -> float:
    """ns that Python's mmap takes."""
    start = time.perf_counter_ns()
    mapping = mmap.mmap(fd, size)
    elapsed = time.perf_counter_ns() - start
    mapping.close()
    return elapsed


def tables_of_an_attach(fd: int, engine: str) -> int:
    """KiB of page tables that it adds to a process that is new."""

    def attach(_index: int, tell: Callable[[Any], None]) -> None:
        before = page_tables()
        with pyshare.attach(fd, engine=engine):
            tell(page_tables() - before)
        sleep(0, lambda _: None)

    with Crew() as crew:
        return int(crew.start(1, attach)[0])


def measure_sparse(cases: Sequence[Case], limit: Limit, tick: Tick) -> Results:
    """Times of creating and attaching, and page tables."""
    results: Results = {}
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew())
        with alarm() as wind:
            floors = Floors(crew)
            crowds: dict[Case, int] = {}
            for case in cases:
                wind()
                crowds[case] = crowded(case, crew)
                stack.callback(os.close, crowds[case])
            for case, fd in crowds.items():
                for kind in kinds():
                    wind()
                    tables = tables_of_an_attach(fd, kind.engine)
                    results[case, kind.name, "page tables"] = figures([tables], "KiB")
        turns: dict[tuple[Case, str, str], Turn] = {}
        for case, fd in crowds.items():
            turns[case, "mmap", "attach"] = floors.turn(_peers.MAP, 1)
            turns[case, "a thread", "attach"] = floors.turn(_peers.THREAD, 1)
            turns[case, "mmap+munmap", "attach"] = floors.turn(_peers.MAP_UNMAP, 1)
            turns[case, "mmap.mmap", "attach"] = functools.partial(mapped, fd, case.length)
            for kind in kinds():
                attach = functools.partial(pyshare.attach, fd, engine=kind.engine)
                turns[case, kind.name, "attach"] = functools.partial(joined, attach)
                turns[case, kind.name, "create"] = functools.partial(
                    joined, functools.partial(create, case, kind.engine)
                )
        return results | interleave([turns], limit, tick)


def sparse(limit: Limit) -> Section:
    """A region of 64 GiB that nobody has touched."""
    cases = [Case("sparse", participants=SLOTS, length=SPARSE, writable=writable) for writable in (False, True)]
    names = ["uffd", "mprotect", "a thread", "mmap.mmap", "mmap+munmap", "mmap"]
    title = f"A sparse region of 64 GiB; {SLOTS:,} slots are taken, by {HOUSES} processes"
    sweeps = [
        Sweep(title, prot_label, cases, names, ("create", "attach")),
        Sweep("Page tables that it adds to a process", prot_label, cases, names[:2], ("page tables",), ("p50",)),
    ]
    return Section("sparse", sweeps, [("a sparse region", functools.partial(measure_sparse, cases, limit))])


# -- Memory --------------------------------------------------------------------------------------

CONTROL = ("by design", "as created", "all changed", "all leased")


def measure_control(case: Case, tick: Tick) -> Results:
    """Bytes of the control segment for each page of data."""
    found: list[float] = []
    with pyshare.create(size=case.length) as region:
        pages = case.length / PAGE

        def allocated() -> float:
            return os.fstat(region.fileno()).st_blocks * 512 / pages

        found.append((os.fstat(region.fileno()).st_size - case.length) / pages)
        found.append(allocated())
        region.mprotect(0, case.length, pyshare.READ)
        found.append(allocated())
        with region.lease(0, case.length):
            found.append(allocated())
    tick(1)
    return {
        (case, contender, "control segment"): figures([value], "B")
        for contender, value in zip(CONTROL, found, strict=True)
    }


def measure_tables(case: Case, tick: Tick) -> Results:
    """KiB of page tables of each participant: by attaching, by touching every page, by making every page READ."""
    results: Results = {}
    plain = os.memfd_create("bench")
    os.ftruncate(plain, case.length)

    def live(engine: str, fd: int, _index: int, tell: Callable[[Any], None]) -> None:
        before = page_tables()
        memory = pyshare.attach(fd, engine=engine) if engine else mmap.mmap(fd, case.length)
        attached = page_tables()
        with memoryview(memory) as view, view[::PAGE] as pages:
            pages[:] = bytes(len(pages))
        tell([attached - before, page_tables() - before, before, os.getpid()])
        signal.pause()

    for kind in (None, *kinds()):
        with Crew() as crew, alarm():
            if kind is None:
                fd = os.dup(plain)
            else:
                with pyshare.create(size=case.length, engine=kind.engine) as region:
                    fd = reopened(region.fileno())
            told = crew.start(case.participants, functools.partial(live, kind.engine if kind else "", fd))
            name = kind.name if kind else "mmap"
            for number, measure in enumerate(("attached", "touched")):
                results[case, name, measure] = figures([one[number] for one in told], "KiB")
            if kind is not None:
                with pyshare.attach(fd, engine=kind.engine) as region:
                    region.mprotect(0, case.length, pyshare.READ)
                    values = [page_tables(pid) - before for _, _, before, pid in told]
                results[case, name, "all READ"] = figures(values, "KiB")
            os.close(fd)
    os.close(plain)
    tick(1)
    return results


def memory() -> Section:
    """What is paid in bytes."""
    control = Case("memory", length=256 * MIB)
    tables = Case("memory", participants=8, length=64 * MIB)
    sweeps = [
        Sweep("Control segment, for each page of data", size_label, [control], CONTROL, ("control segment",), ("p50",)),
        Sweep(
            "Page tables of each of N participants; 64 MiB, by attaching, touched, made READ",
            count_label,
            [tables],
            ("uffd", "mprotect", "mmap"),
            ("attached", "touched", "all READ"),
            ("p50", "max"),
        ),
    ]
    steps = [
        ("the control segment", functools.partial(measure_control, control)),
        ("page tables", functools.partial(measure_tables, tables)),
    ]
    return Section("memory", sweeps, steps)
