"""What a history says at once, sorted: who held what, which changes there were, what a snapshot held.

Lives here: what several judgements need.  Not here: any judgement.
Invariants
 1. An interval that is *certain* is from the end of what began it to the beginning of what ended it; one that is
    *possible* from beginning to end.  Only what is certain is held against the code.
 2. Of a process that died, what it had is certain until its last record, and possible until it was reaped.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from histories import words
from histories.history import FOREVER, History, Op

ENDS = {words.RELEASE: words.LEASE, words.UNLOCK: words.LOCK, words.THAW: words.FREEZE, words.DROP: words.SNAPSHOT}
ACCESSES = (words.STORE, words.READINTO, words.RECEIVE, words.LOAD)


@dataclasses.dataclass(slots=True)
class Hold:
    """Of a lease, a lock or a freeze."""

    op: Op
    over: Op | None  # what ended it
    possible: tuple[int, int]
    certain: tuple[int, int]  # empty where the first is not before the second
    died: bool  # its holder did, holding it perhaps


@dataclasses.dataclass(slots=True)
class Change:
    """Of the protection of hot pages `first` to `last`."""

    op: Op
    first: int
    last: int
    prot: int
    begin: int
    end: int  # in force everywhere from here on; FOREVER where that is not known
    generation: int | None  # None: it may never have been
    silent: list[int]  # pids that are late
    undone: bool


T = TypeVar("T")
Span = tuple[int, int]


def without(some: list[Span], others: list[Span]) -> list[Span]:
    """What is left of them; the others in order."""
    found = []
    for begin, end in some:
        for other_begin, other_end in others:
            if other_begin > end:
                break
            if other_end < begin:
                continue
            if other_begin > begin:
                found.append((begin, other_begin - 1))
            begin = max(begin, other_end + 1)
        if begin <= end:
            found.append((begin, end))
    return found


class Intervals(Generic[T]):
    """Intervals of time, to be asked for those that meet another."""

    def __init__(self, items: Iterable[tuple[int, int, T]]) -> None:
        self._items = sorted(items, key=lambda item: item[0])
        self._begins = [item[0] for item in self._items]
        self._reach: list[int] = []  # the latest end of those up to here
        for _, end, _ in self._items:
            self._reach.append(max(end, self._reach[-1]) if self._reach else end)

    def meeting(self, begin: int, end: int) -> Iterator[T]:
        """Of those that have a moment in common with this one."""
        at = bisect.bisect_right(self._begins, end) - 1
        while at >= 0 and self._reach[at] >= begin:
            if self._items[at][1] >= begin:
                yield self._items[at][2]
            at -= 1

    def any_meeting(self, begin: int, end: int) -> bool:
        return next(self.meeting(begin, end), None) is not None


class Facts:
    """Of one history."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.plan = history.plan
        self.hot = len(self.plan["hot"])
        self.threads = sum(len(actor["threads"]) for actor in self.plan["actors"])
        self.places = words.kept_places(self.threads)
        self.by_kind: dict[str, list[Op]] = defaultdict(list)
        for op in history.ops:
            self.by_kind[op.kind].append(op)
        self.by_id = {op.id: op for op in history.ops}
        self.end_of = {op.args[0]: op for kind in ENDS for op in self.by_kind[kind]}
        self.leases, self.locks, self.freezes = (
            [self._hold(op) for op in self.by_kind[kind] if is_perhaps_held(op)]
            for kind in (words.LEASE, words.LOCK, words.FREEZE)
        )
        self.ended: set[str] = {values[0] for _, values in history.noted("ended")}  # threads, alone
        self.certain_leases = Intervals(certainly(self.leases))
        self.held_by = self._held_by()
        self.leases_on = [Intervals(self._leases_on(page)) for page in range(self.hot)]
        self.changes = [change for op in self.by_kind[words.CHANGE] if (change := self._change(op))]
        self.contents = self._contents()
        self.refused = self._refused()
        self._settled = sorted(change.end for change in self.changes if change.end < FOREVER)

    # -- Held things ---------------------------------------------------------------------------------------------------

    def _hold(self, op: Op) -> Hold:
        over, life = self.end_of.get(op.id), self.history.lives.get(op.process)
        died = life is not None and life.status != 0 and (over is None or over.open)
        sure_end = over.begin if over else (life.last if life else FOREVER)
        last = over.end if over else (life.died if life else FOREVER)
        if op.outcome != words.OK:
            return Hold(op, over, (op.begin, op.end + 1_000_000 if not died else last), (0, 0), died and op.open)
        return Hold(op, over, (op.begin, last), (op.end, sure_end), died)

    def _held_by(self) -> dict[str, Intervals[Hold]]:
        """thread -> what it held perhaps."""
        found: dict[str, list[tuple[int, int, Hold]]] = defaultdict(list)
        for hold in (*self.leases, *self.locks, *self.freezes):
            found[hold.op.thread].append((*hold.possible, hold))
        return {thread: Intervals(holds) for thread, holds in found.items()}

    def _leases_on(self, page: int) -> Iterator[tuple[int, int, Hold]]:
        for hold in self.leases:
            if hold.op.args[0] <= page < hold.op.args[0] + hold.op.args[1]:
                yield (*hold.possible, hold)

    # -- Changes -------------------------------------------------------------------------------------------------------

    def _change(self, op: Op) -> Change | None:
        at, count, prot = op.args[:3]
        change = Change(op, at, at + count - 1, prot, op.begin, op.end, None, [], False)
        match op.outcome:
            case words.OK:
                change.generation = op.value
            case words.TIMEOUT if op.value[0] is not None:
                change.generation, change.silent, change.end = op.value[0], op.value[1], FOREVER
            case words.KERNEL:
                change.undone = True
            case words.INTERRUPTED | words.CANCELLED | None:
                change.end = FOREVER
            case _:
                return None
        return change

    def settled_after(self, at: int) -> int:
        """When the next change, of anything, was in force everywhere that is over after `at`."""
        index = bisect.bisect_right(self._settled, at)
        return self._settled[index] if index < len(self._settled) else FOREVER

    # -- Snapshots -----------------------------------------------------------------------------------------------------

    def _contents(self) -> dict[str, list[list[int]]]:
        """name -> page -> word of each place, as it was first read."""
        found: dict[str, list[list[int]]] = {}
        for op in sorted(self.by_kind[words.LOOK], key=lambda op: op.end):
            if op.outcome == words.OK and op.args[0] not in found:
                found[op.args[0]] = self.pages_of(op.value[0])
        return found

    def pages_of(self, text: str) -> list[list[int]]:
        """What was kept of pages, as words."""
        data, size = memoryview(bytes.fromhex(text)).cast("Q").tolist(), len(self.places)
        return [data[at : at + size] for at in range(0, len(data), size)]

    # -- Private pages -------------------------------------------------------------------------------------------------

    def _refused(self) -> dict[str, Intervals[Op]]:
        """Of each participant, its accesses that were refused: meanwhile pages may have been private to it."""
        found: dict[str, list[tuple[int, int, Op]]] = defaultdict(list)
        for kind in ACCESSES:
            for op in self.by_kind[kind]:
                if op.outcome in (words.REFUSED, words.INTERRUPTED, None):
                    found[op.participant].append((op.begin, op.end, op))
        return {participant: Intervals(each) for participant, each in found.items()}

    def is_private(self, op: Op) -> bool:
        """Another thread of the participant had an access refused meanwhile."""
        refused = self.refused.get(op.participant)
        return refused is not None and any(other.thread != op.thread for other in refused.meeting(op.begin, op.end))


def certainly(holds: Iterable[Hold]) -> Iterator[tuple[int, int, Hold]]:
    """Of those that were certainly held at some time: when."""
    return ((*hold.certain, hold) for hold in holds if hold.certain[0] < hold.certain[1])


def is_perhaps_held(op: Op) -> bool:
    """It came to something, or nobody knows; a freeze whose time was over was there until it was undone."""
    if op.kind == words.FREEZE and op.outcome == words.TIMEOUT:
        return True
    return op.outcome in (words.OK, words.INTERRUPTED, words.CANCELLED, None)


def pages_of(op: Op) -> range:
    """The hot pages of an operation that has some."""
    match op.kind:
        case words.STORE | words.READINTO | words.RECEIVE:
            return range(op.args[0], op.args[0] + 1)
        case words.TRANSACT:
            return range(op.args[1], op.args[1] + op.args[2])
        case words.LOAD | words.OBSERVE | words.CHANGE | words.LEASE:
            return range(op.args[0], op.args[0] + op.args[1])
    return range(0)


def finding(what: str, *about: Any) -> str:
    """A sentence, and the operations that it is about."""
    return what + "".join(f"\n        {tell(each) if isinstance(each, Op) else each}" for each in about)


def tell(op: Op) -> str:
    value = str(op.value)
    return (
        f"{op.id} of {op.participant}: {op.kind}{tuple(op.args)} -> {op.outcome} "
        f"{value if len(value) < 200 else '...'} [{op.begin / 1e6:.3f}, {op.end / 1e6:.3f}] ms"
    )
