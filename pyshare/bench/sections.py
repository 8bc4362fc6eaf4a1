"""Section `change`, and what a section is.

Lives here: the tables that are shown, and the cases of `change`.  Not here:
its contenders (teams.py), the other sections (cycles.py, costs.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from pyshare.bench.measure import MIB, PAGE, QUANTILES, Case, Limit, Results, Tick, alarm, interleave
from pyshare.bench.teams import CHANGES, CONTENDERS, SHOWN, Contender

PARTICIPANTS = (1, 8, 32, 64)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One table: cases that differ in what `label` says."""

    title: str
    label: Callable[[Case], str]
    cases: Sequence[Case]
    contenders: Sequence[str]
    measures: Sequence[str]
    quantiles: Sequence[str] = tuple(QUANTILES)


@dataclasses.dataclass(frozen=True)
class Section:
    """Something that is measured by itself; each step is one set of processes."""

    name: str
    sweeps: Sequence[Sweep]
    steps: Sequence[tuple[str, Callable[[Tick], Results]]]
    note: str = ""


def count_label(case: Case) -> str:
    """The number of participants."""
    return f"N = {case.participants}"


def size_label(case: Case) -> str:
    """The length of the range, as people say it."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if case.length > PAGE and case.length % unit == 0:
            return f"{case.length // unit} {name}"
    return "1 page"


def at_work_label(case: Case) -> str:
    """What the participants do meanwhile."""
    if case.stopped:
        return f"1/{case.participants} stopped"
    if case.storing == 1:
        return f"1/{case.participants} stores"
    return f"{'store' if case.storing else 'idle'} x{case.threads}"


@contextlib.contextmanager
def assembled(kinds: Sequence[type[Contender]], case: Case) -> Iterator[list[Contender]]:
    """The teams are at their work; at the end none of their processes is left."""
    with contextlib.ExitStack() as stack:
        teams: list[Contender] = []
        with alarm() as wind:
            for kind in kinds:
                wind()
                team = kind(case)
                stack.callback(team.close)
                team.start()
                teams.append(team)
            for team in teams:
                wind()
                team.ready()
        yield teams


def measure_change(case: Case, limit: Limit, tick: Tick) -> Results:
    """Every contender's times in one case."""
    with assembled([kind for kind in CONTENDERS if kind.fits(case) and not kind.missing()], case) as teams:
        # Revocations and grants alike come right after another contender's: on cold caches.
        groups = [
            {(case, team.name, change): functools.partial(team.timed_change, prot) for team in teams}
            for change, prot in CHANGES.items()
        ]
        return interleave(groups, limit, tick)


def change(participants: Sequence[int], quick: bool, limit: Limit) -> Section:
    """A sweep over the participants, and from one point of it one along each other axis."""
    base = 8 if 8 in participants else max(participants)
    point = functools.partial(Case, "change", participants=base)
    lengths = [PAGE, MIB] if quick else [PAGE, 16 * PAGE, MIB, 16 * MIB, 64 * MIB]
    threads = [1] if quick else [1, 4]
    idle = [point(threads=count) for count in threads]
    storing = [point(threads=count, storing=count * base) for count in threads]
    work = [*idle, point(participants=1, storing=1), point(storing=1), *storing, point(stopped=True)]
    table = functools.partial(Sweep, contenders=SHOWN, measures=tuple(CHANGES))
    sweeps = [
        table(
            "N participants beside the caller, idle; 1 dirty page; cold",
            count_label,
            [Case("change", participants=count) for count in participants],
        ),
        table(
            "The same, warm: after a change to and fro",
            count_label,
            [Case("change", participants=count, warm=True) for count in participants],
        ),
        table(
            f"Length of the range, dirty pages; N = {base}, idle",
            size_label,
            [point(length=length) for length in lengths],
        ),
        table(
            f"Length of the range, clean pages; N = {base}, idle",
            size_label,
            [point(length=length, dirty=False) for length in lengths],
        ),
        table(f"What the participants do meanwhile, and their threads; N = {base}, 1 dirty page", at_work_label, work),
    ]
    cases = dict.fromkeys(case for sweep in sweeps for case in sweep.cases)
    steps = [
        (f"{case.participants} participants, {size_label(case)}", functools.partial(measure_change, case, limit))
        for case in cases
    ]
    note = (
        "Everybody runs where the scheduler puts him, but the floors: 1 thread is on the first CPU, all CPUs is a "
        "process with a storing thread on each of the others. The caller is one participant more; it comes from "
        "200 µs of work. Cold: after another contender's turn; the floors are always warm. Bare uffd has no such "
        "participant as the caller. Where one stores, it does so to the very page until a revocation begins, and all "
        "are warm."
    )
    return Section("change", sweeps, steps, note)


def missing() -> Iterator[str]:
    """What this machine does not have."""
    yield from dict.fromkeys(reason for kind in CONTENDERS if (reason := kind.missing()))
