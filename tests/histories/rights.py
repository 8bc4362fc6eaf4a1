"""Promises 1 and 2: what the map forbids does not happen, what it allows does.

Lives here: Rights: which protections a page may have had during an access; the judgement of accesses; times in which
nobody could store.  Not here: leases as such (holds.py).
The map of an access is that of the latest change that was in force everywhere before it, or of any that was under way.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator

from histories import words
from histories.facts import ACCESSES, Change, Facts, Hold, Intervals, Span, finding, pages_of, without
from histories.history import FOREVER, Life, Op
from histories.words import READ, WRITE


class Page:
    """The changes of one hot page."""

    def __init__(self, prot: int, changes: list[Change]) -> None:
        self._first = prot
        self.done = sorted((c for c in changes if is_done(c)), key=lambda c: c.end)
        self._ends = [c.end for c in self.done]
        self._latest: list[Change] = []
        for change in self.done:
            before = self._latest[-1] if self._latest else change
            self._latest.append(max(before, change, key=lambda c: c.generation or 0))
        self._under_way = Intervals((c.begin, c.end, c) for c in changes if is_done(c) or c.undone)
        self._unsure = [c for c in changes if not is_done(c) and not c.undone]

    def settled(self, at: int) -> Change | None:
        """The latest that was in force everywhere."""
        index = bisect.bisect_left(self._ends, at) - 1
        return self._latest[index] if index >= 0 else None

    def protections(self, begin: int, end: int) -> set[int]:
        """Those that it may have had."""
        settled = self.settled(begin)
        generation = settled.generation or 0 if settled else 0
        found = {settled.prot if settled else self._first}
        for change in self._under_way.meeting(begin, end):
            if change.undone or (change.generation or 0) > generation:
                found.add(change.prot)
        for change in self._unsure:
            if change.begin <= end and self._is_possible(change, settled):
                found.add(change.prot)
        return found

    def _is_possible(self, change: Change, settled: Change | None) -> bool:
        """Nothing later is in force yet."""
        if settled is None:
            return True
        if change.generation is not None:
            return change.generation > (settled.generation or 0)
        return settled.begin <= change.op.end  # who died in it may have left it to the next to finish

    def spans(self, allows: int) -> list[Span]:
        """When it may have had a protection with that bit; in no order."""
        found = []
        by_generation = sorted(self.done, key=lambda c: c.generation or 0)
        over = FOREVER
        ends: dict[int, int] = {}
        for change in reversed(by_generation):
            ends[id(change)] = over
            over = min(over, change.end)
        if self._first & allows:
            found.append((-1, over))
        found += [(c.begin, ends[id(c)]) for c in by_generation if c.prot & allows]
        for change in self._unsure:
            if change.prot & allows:
                later = [c.end for c in self.done if self._supersedes(c, change)]
                found.append((change.begin, min(later, default=FOREVER)))
        return found + [(c.begin, c.end) for c in self._under_way.meeting(-1, FOREVER) if c.undone and c.prot & allows]

    def _supersedes(self, later: Change, change: Change) -> bool:
        if change.generation is not None:
            return (later.generation or 0) > change.generation
        return later.begin > change.op.end


def is_done(change: Change) -> bool:
    """All have it at its end."""
    return change.generation is not None and change.end < FOREVER


class Rights:
    """Of one history."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        changes: dict[int, list[Change]] = defaultdict(list)
        for change in facts.changes:
            for page in range(change.first, change.last + 1):
                changes[page].append(change)
        self.pages = [Page(facts.plan["prot"], changes[page]) for page in range(facts.hot)]
        self._settle_late(changes)
        self.frozen = Intervals((*self._thawed(hold), hold) for hold in facts.freezes)
        self._restores = Intervals(
            (op.begin, op.end, op)
            for op in facts.by_kind[words.RESTORE]
            if op.outcome not in (words.NESTED, words.CLOSED)
        )
        self._images = Intervals(self._snapshots())

    def _settle_late(self, changes: dict[int, list[Change]]) -> None:
        """A change that somebody was late with is in force once a later one of the region is."""
        done = sorted((c for c in self._facts.changes if is_done(c)), key=lambda c: c.generation or 0)
        for change in self._facts.changes:
            if change.generation is not None and change.end == FOREVER:
                change.end = min((c.end for c in done if (c.generation or 0) > change.generation), default=FOREVER)
        self.pages = [Page(self._facts.plan["prot"], changes[page]) for page in range(self._facts.hot)]

    def _thawed(self, hold: Hold) -> Span:
        """While all may have been READ: of a freezer that died until somebody has noticed."""
        begin, end = hold.possible
        if hold.died or (hold.over is not None and hold.over.end - hold.over.begin > 900_000_000):
            end = self._facts.settled_after(end)
        return begin, end

    def _snapshots(self) -> Iterator[tuple[int, int, Op]]:
        """While their pages may be saved."""
        for op in self._facts.by_kind[words.SNAPSHOT]:
            yield op.begin, FOREVER if op.outcome in (words.OK, None) else op.end, op

    # -- Accesses ------------------------------------------------------------------------------------------------------

    def judge(self) -> Iterator[str]:
        for kind in ACCESSES:
            for op in self._facts.by_kind[kind]:
                if op.kind == words.LOAD and op.args[2] == "lease":
                    continue
                if op.outcome == words.OK:
                    yield from self._was_allowed(op)
                elif op.outcome == words.REFUSED and not self.may_be_refused(op):
                    yield self._tell("an access was refused that the map allows", op)
        for hold in self._facts.leases:
            yield from self._lease_refused(hold.op)
        yield from (text for op in self._facts.by_kind[words.LEASE] for text in self._lease_refused(op))

    def _bit(self, op: Op) -> int:
        return READ | WRITE if op.kind == words.LOAD else WRITE

    def _was_allowed(self, op: Op) -> Iterator[str]:
        """It has succeeded."""
        if self._facts.is_private(op):
            return
        page = pages_of(op)[0]
        if op.kind == words.LOAD:
            may = self.pages[page].protections(op.begin, op.end)
            if (
                may == {0}
                and not self.frozen.any_meeting(op.begin, op.end)
                and not self._restores.any_meeting(op.begin, op.end)
            ):
                yield self._tell("a load has succeeded that the map forbids", op)
            return
        if self.is_leased(op, page):
            return
        if self._is_frozen(op):
            yield self._tell("a store has succeeded while all was frozen", op)
        elif not any(prot & WRITE for prot in self.pages[page].protections(op.begin, op.end)):
            yield self._tell("a store has succeeded that the map forbids", op)

    def _is_frozen(self, op: Op) -> bool:
        """From its beginning to its end, for certain."""
        return any(
            hold.certain[0] < op.begin and op.end < hold.certain[1] for hold in self.frozen.meeting(op.begin, op.end)
        )

    def may_be_granted(self, op: Op) -> bool:
        """What is left to store of it when it was refused may have been allowed meanwhile."""
        page = pages_of(op)[0]
        if self.is_leased(op, page) or self._restores.any_meeting(op.begin, op.end):
            return True
        may = self.pages[page].protections(op.begin, op.end)
        return not self._is_frozen(op) and any(prot & WRITE for prot in may)

    def is_leased(self, op: Op, page: int) -> bool:
        """Its own participant may have had a lease on the page."""
        return any(
            hold.op.participant == op.participant for hold in self._facts.leases_on[page].meeting(op.begin, op.end)
        )

    def may_be_refused(self, op: Op) -> bool:
        """Something may have forbidden it."""
        life = self._facts.history.lives.get(op.process)
        if life is not None and self.is_cut_off(life, op):
            return True
        bit = self._bit(op)
        if bit == WRITE and (self.frozen.any_meeting(op.begin, op.end) or self._restores.any_meeting(op.begin, op.end)):
            return True
        if len(op.args) > 1 and op.args[1] == "syscall" and self._images.any_meeting(op.begin, op.end):
            return True
        return any(not prot & bit for page in pages_of(op) for prot in self.pages[page].protections(op.begin, op.end))

    def _has_few_mappings(self, process: str) -> bool:
        """So a change that it could neither apply nor undo may have fenced it."""
        if not process.startswith("a"):
            return False
        index = int(process[1:].split(".")[0])
        return "mappings" in self._facts.plan["actors"][index]["extras"]

    def is_cut_off(self, life: Life, op: Op | None = None) -> bool:
        """Fenced perhaps; or a forked child that could not join, for want of room or since somebody was stopped."""
        if self._has_few_mappings(life.name):
            return True
        if "-" not in life.name:
            return False
        stops, last = self._facts.history.stops, op.end if op else FOREVER
        return bool(self._facts.plan.get("room")) or any(
            begin < last and end > life.born - 6_000_000_000 for _, begin, end in stops
        )

    def _lease_refused(self, op: Op) -> Iterator[str]:
        """A lease is over pages that are READ, or may be written."""
        if op.outcome != words.REFUSED or self._has_few_mappings(op.process):
            return
        for page in pages_of(op):
            may = self.pages[page].protections(op.begin, op.end)
            if any(prot != READ and not prot & WRITE for prot in may):
                return
        hot = self._facts.plan["hot"]
        first, last = hot[op.args[0]], hot[op.args[0] + op.args[1] - 1]
        if last - first >= op.args[1]:
            return  # over other pages too, which may be NONE
        yield self._tell("a lease was refused over pages that it may be over", op)

    def _tell(self, what: str, op: Op) -> str:
        about: list[Op | str] = []
        for page in pages_of(op):
            settled = self.pages[page].settled(op.begin)
            may = sorted(self.pages[page].protections(op.begin, op.end))
            about += [f"hot page {page} may have been {may}; the latest change in force before:"]
            about += [settled.op] if settled else ["that of its creation"]
        return finding(what, op, *about)

    # -- When nobody can store -----------------------------------------------------------------------------------------

    def quiet(self, page: int) -> list[Span]:
        """Times in which no store to the page is possible, in order."""
        open_at = self.pages[page].spans(WRITE)
        open_at += [hold.possible for hold in self._facts.leases_on[page].meeting(-1, FOREVER)]
        open_at += [(op.begin, op.end) for op in self._restores.meeting(-1, FOREVER)]
        return without([(0, FOREVER)], sorted(open_at))

    def frozen_spans(self) -> list[Span]:
        """Times in which everything was certainly frozen."""
        return sorted(hold.certain for hold in self._facts.freezes if hold.certain[0] < hold.certain[1])
