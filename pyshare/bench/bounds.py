"""The bounds: what pyshare is held to, as ratios of medians of one run.

Lives here: each bound, beside what it is measured against.  Not here: how
anything is measured or shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from pyshare.bench.costs import SLOTS
from pyshare.bench.cycles import SPARSE
from pyshare.bench.measure import Case, Key, Results
from pyshare.bench.snapshots import LARGE, LARGEST, SMALL
from pyshare.bench.teams import CHANGES


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one bound.

    `ratio` is ours over theirs, and at most the limit; or, with `at_least`, so
    many times faster we are, at least the limit.
    """

    section: str
    bound: str
    ours: float
    peer: str
    theirs: float
    unit: str
    ratio: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Does the bound hold?"""
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


def verdict(
    bound: str, results: Results, ours: Key, peer: str, theirs: Key | float, limit: float, at_least: bool = False
) -> Iterator[Verdict]:
    """One, of medians; none where something was not measured."""
    if ours not in results or (isinstance(theirs, tuple) and theirs not in results):
        return
    mine = results[ours]
    other = results[theirs].p50 if isinstance(theirs, tuple) else theirs
    rate = mine.unit == "1/s"
    ratio = other / mine.p50 if at_least and not rate else mine.p50 / other
    yield Verdict(ours[0].section, bound, mine.p50, peer, other, mine.unit, ratio, limit, at_least)


def worst(found: list[Verdict]) -> Iterator[Verdict]:
    """The one that is farthest from its limit, on the wrong side."""
    if found:
        yield max(found, key=lambda one: one.limit / one.ratio if one.at_least else one.ratio / one.limit)


def compared(
    bound: str, results: Results, case: Case, ours: str, theirs: str, limit: float, at_least: bool = False
) -> Iterator[Verdict]:
    """The worse one of revocations and grants."""
    yield from worst(
        [
            one
            for change in CHANGES
            for one in verdict(
                f"{bound}: {change}",
                results,
                (case, ours, change),
                theirs,
                (case, theirs, change),
                limit,
                at_least,
            )
        ]
    )


def changes(results: Results) -> Iterator[Verdict]:
    """Of both engines."""
    counts = sorted({case.participants for case, _, _ in results if case == Case("change", case.participants)})
    for warm in (True, False):
        yield from remote_changes(results, [count for count in counts if count >= 8], warm)
    for count in (1, 8):
        case = Case("change", count, storing=1)
        yield from compared(f"uffd N={count}, 1 stores", results, case, "uffd", "all CPUs", 1.5)
    for peer, least, most, limit in (
        ("signal", 1, 1, 1.3),
        ("signal", 8, 8, 1.0),
        ("signal", 32, 256, 1.1),
        ("pipe", 8, 256, 0.25),
        ("condition", 8, 256, 0.25),
    ):
        for count in counts:
            if least <= count <= most:
                yield from compared(f"mprotect N={count}", results, Case("change", count), "mprotect", peer, limit)


def remote_changes(results: Results, counts: Sequence[int], warm: bool) -> Iterator[Verdict]:
    """From outside, with idle participants; the floor of all CPUs is a warm one in either case."""
    cold = "" if warm else ", cold"
    for peer, limit in (("signal", 6.0), ("pipe", 25.0)):
        for count in counts:
            case = Case("change", count, warm=warm)
            yield from compared(f"uffd N={count}{cold}", results, case, "uffd", peer, limit, True)
    yield from compared(f"uffd N=8{cold}", results, Case("change", 8, warm=warm), "uffd", "all CPUs", 1.0)
    if len(counts) > 1:
        few, many = (Case("change", count, warm=warm) for count in (counts[0], counts[-1]))
        yield from worst([one for change in CHANGES for one in added(cold, results, few, many, change)])


def added(cold: str, results: Results, few: Case, many: Case, change: str) -> Iterator[Verdict]:
    """What each participant more costs, beside one of those that a bare ioctl reaches in turn."""
    if all((case, name, change) in results for case in (few, many) for name in ("uffd", "bare uffd")):
        more = many.participants - few.participants
        ours = (results[many, "uffd", change].p50 - results[few, "uffd", change].p50) / more
        bare = results[many, "bare uffd", change].p50 / many.participants
        bound = f"uffd N={many.participants} each{cold}: {change}"
        yield Verdict("change", bound, ours, "bare uffd", bare, "µs", ours / bare, 1.3, False)


def leases(results: Results) -> Iterator[Verdict]:
    """In place and by window, from Python and from C."""
    peers = Case("lease")
    counts = sorted({case.participants for case, _, _ in results if case.section == "lease" and case.participants})
    if not counts:
        return
    few, many = Case("lease", counts[0]), Case("lease", counts[-1])
    yield from verdict("lease, Python", results, (few, "uffd", "Python"), "2 mprotect", (peers, "2 mprotect", "C"), 1.3)
    yield from verdict(
        f"lease N={many.participants}, Python",
        results,
        (many, "uffd", "Python"),
        f"N={few.participants}",
        (few, "uffd", "Python"),
        1.2,
    )
    yield from verdict("lease, C", results, (few, "uffd", "C"), "2 bare uffd", (peers, "2 bare uffd", "C"), 1.2)
    for language, most in (("Python", 1.0), ("C", 0.15)):
        yield from verdict(
            f"lease by window, {language}", results, (few, "uffd window", language), f"{most:g} µs", most, 1.0
        )


def locks(results: Results) -> Iterator[Verdict]:
    """Uncontended."""
    counts = sorted({case.participants for case, _, _ in results if case.section == "lock" and case.participants})
    for count in counts[:1]:
        yield from verdict(
            "lock, Python",
            results,
            (Case("lock", count), "lock", "Python"),
            "mp.Lock",
            (Case("lock"), "mp.Lock", "Python"),
            1.0,
        )


def snapshots(results: Results) -> Iterator[Verdict]:
    """The pauses that they make."""
    small, large, largest = (Case("snapshot", 4, length) for length in (SMALL, LARGE, LARGEST))
    yield from verdict(
        "snapshot 4 GiB, leases: pause", results, (largest, "leases", "pause"), "4 MiB", (small, "leases", "pause"), 1.5
    )
    yield from verdict(
        "snapshot 1 GiB, READ_WRITE: pause",
        results,
        (large, "READ_WRITE", "pause"),
        "stop and copy",
        (large, "stop and copy", "pause"),
        10.0,
        True,
    )


def sparse(results: Results) -> Iterator[Verdict]:
    """Of both ways to begin, with either protection."""
    for writable in (False, True):
        case = Case("sparse", SLOTS, SPARSE, writable=writable)
        what = "READ_WRITE" if writable else "READ"
        for measure in ("create", "attach"):
            yield from verdict(
                f"{measure} 64 GiB {what}", results, (case, "uffd", measure), "mmap", (case, "mmap", "attach"), 20.0
            )
        yield from verdict(f"page tables, {what}", results, (case, "uffd", "page tables"), "1 MiB", 1024.0, 1.0)


def demo(results: Results) -> Iterator[Verdict]:
    """The whole program."""
    ours, theirs = ((Case("demo"), way, "transactions") for way in ("lease", "none"))
    yield from verdict("demo --protect lease", results, ours, "none", theirs, 0.85, True)


def verdicts(results: Results) -> list[Verdict]:
    """Every bound that what was measured allows to judge."""
    return [one for part in (changes, leases, locks, snapshots, sparse, demo) for one in part(results)]
