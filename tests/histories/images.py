"""Images of the whole region: a snapshot is of one moment, and stays; dirty() has all that was written.

Lives here: those judgements.  Not here: single loads (registers.py).
A moment of a snapshot is in its call; it is not while somebody holds a lease; and at it each place may have held what
the snapshot says it held.
"""

from __future__ import annotations

from collections.abc import Iterator

from histories import words
from histories.facts import Facts, Intervals, Span, finding, pages_of, without
from histories.history import FOREVER, Op
from histories.registers import Registers
from histories.rights import Rights
from histories.words import WRITE

REMEMBERED = 700  # changes of which everything is known, some of which no history knows


class Images:
    """Of one history."""

    def __init__(self, facts: Facts, rights: Rights, registers: Registers) -> None:
        self._facts, self._rights, self._registers = facts, rights, registers
        kinds = {words.CHANGE: True, words.FREEZE: True, words.SNAPSHOT: False, words.GENERATION: False}  # it made it
        self._known = [
            (op.value, op.begin, made)
            for kind, made in kinds.items()
            for op in facts.by_kind[kind]
            if op.outcome == words.OK
        ]
        self._touched = [Intervals(self._touches(page)) for page in range(facts.hot)]
        self._everything = Intervals(self._of_everything())

    def judge(self) -> Iterator[str]:
        yield from self._the_same()
        for op in self._facts.by_kind[words.SNAPSHOT]:
            if op.outcome == words.OK and op.id in self._facts.contents:
                yield from self._of_one_moment(op, self._facts.contents[op.id])
        for op in self._facts.by_kind[words.DIRTY]:
            if op.outcome == words.OK:
                yield from self._dirty(op)

    # -- Snapshots -----------------------------------------------------------------------------------------------------

    def _the_same(self) -> Iterator[str]:
        """Whenever it is read, by whomever."""
        first: dict[str, Op] = {}
        for op in sorted(self._facts.by_kind[words.LOOK], key=lambda op: op.end):
            if op.outcome != words.OK:
                continue
            before = first.setdefault(op.args[0], op)
            if before.value != op.value:
                yield finding("a snapshot has changed", before, op, self._difference(before, op))

    def _difference(self, before: Op, after: Op) -> str:
        one, other = (self._facts.pages_of(op.value[0]) for op in (before, after))
        found = [
            f"hot page {page}, place {place}: {was:#x}, then {now:#x}"
            for page, (a, b) in enumerate(zip(one, other, strict=True))
            for place, was, now in zip(self._facts.places, a, b, strict=True)
            if was != now
        ]
        return "; ".join(found[:4]) or "at none of the places"

    def _of_one_moment(self, op: Op, pages: list[list[int]]) -> Iterator[str]:
        spans: list[Span] = without([(op.begin, op.end)], self._leased(op))
        if not spans:
            yield finding("a snapshot came while leases were held all the time", op)
            return
        limits: dict[str, tuple[int, Op | None, str]] = {}
        for page, values in enumerate(pages):
            for place, value in zip(self._facts.places, values, strict=True):
                left = meet(spans, self._registers.at(page, place).spans(value))
                if not left:
                    yield self._no_moment(op, page, place, value, spans, limits)
                    return
                self._note_limits(limits, page, place, value, spans, left)
                spans = left

    def _leased(self, op: Op) -> list[Span]:
        """When leases were certainly held during the call."""
        holds = self._facts.certain_leases.meeting(op.begin, op.end)
        return sorted((hold.certain[0] + 1, hold.certain[1] - 1) for hold in holds)

    def _note_limits(
        self,
        limits: dict[str, tuple[int, Op | None, str]],
        page: int,
        place: int,
        value: int,
        before: list[Span],
        left: list[Span],
    ) -> None:
        """Which place has made the spans what they are, for whoever reads the finding."""
        windows = self._registers.at(page, place).windows(value)
        if left[0][0] > before[0][0] and (found := [w for w in windows if w.begin == left[0][0]]):
            limits["not before"] = left[0][0], found[0].write.op, f"hot page {page}, place {place}: {value:#x}"
        if left[-1][1] < before[-1][1]:
            limits["not after"] = left[-1][1], None, f"hot page {page}, place {place}: {value:#x} was stored over"

    def _no_moment(
        self,
        op: Op,
        page: int,
        place: int,
        value: int,
        spans: list[Span],
        limits: dict[str, tuple[int, Op | None, str]],
    ) -> str:
        windows = self._registers.at(page, place).windows(value)
        told = [f"{what} {at / 1e6:.3f} ms by {why}" for what, (at, _, why) in limits.items()]
        told.append("moments left: " + "; ".join(f"{a / 1e6:.3f} to {b / 1e6:.3f}" for a, b in spans))
        told.append(
            f"hot page {page}, place {place}: {value:#x} was there "
            + ("; ".join(f"{w.begin / 1e6:.3f} to {w.end / 1e6:.3f}" for w in windows[:4]) or "never")
        )
        ops = [who for _, who, _ in limits.values() if who] + [w.write.op for w in windows[:2] if w.write.op]
        return finding("a snapshot is of no moment", op, *ops, *told)

    # -- What is dirty -------------------------------------------------------------------------------------------------

    def _dirty(self, op: Op) -> Iterator[str]:
        kind = op.args[0]
        found, _ = op.value
        yield from self._untouched(op, found)
        missing = [page for page in range(self._facts.hot) if page not in found]
        if kind == "snapshot":
            yield from self._differs(op, missing)
        else:
            yield from self._written_since(op, missing)

    def _untouched(self, op: Op, found: list[int]) -> Iterator[str]:
        """It names no page that nobody had leased, restored or changed since, and that nobody might write."""
        since = op.args[1] if op.args[0] == "generation" else self._facts.by_id[op.args[1]].value
        if not since or self._latest(op.end) - since > REMEMBERED:
            return  # of such a time all that there ever was counts
        begin = self._generation_began(since)
        if self._everything.any_meeting(begin, op.end):
            return
        for page in found:
            if self._touched[page].any_meeting(begin, op.end):
                continue
            if not any(prot & WRITE for prot in self._rights.pages[page].protections(begin, op.end)):
                yield finding(f"dirty(since {op.args[1]}) names hot page {page}, which nobody has touched", op)

    def _touches(self, page: int) -> Iterator[tuple[int, int, Op]]:
        """Leases, of the dead for ever, and those that came to nothing: one that looks for all of its pages has some
        for a moment.  Calls that lease; changes, whatever of.
        """
        for hold in self._facts.leases_on[page].meeting(-1, FOREVER):
            yield hold.possible[0], FOREVER if hold.died else hold.possible[1], hold.op
        for kind in (words.LEASE, words.READINTO, words.RECEIVE, words.CHANGE):
            for op in self._facts.by_kind[kind]:
                if page in pages_of(op):
                    yield op.begin, op.end if op.outcome in (words.OK, words.REFUSED) else FOREVER, op

    def _of_everything(self) -> Iterator[tuple[int, int, Op]]:
        """Freezes are changes of all pages; so are restores."""
        for kind in (words.FREEZE, words.THAW, words.RESTORE):
            for op in self._facts.by_kind[kind]:
                yield op.begin, op.end if op.outcome == words.OK else FOREVER, op

    def _latest(self, at: int) -> int:
        """The latest generation that there may have been then, of those that are known."""
        return max((generation for generation, begin, _ in self._known if begin <= at), default=0)

    def _generation_began(self, generation: int) -> int:
        """Not before this."""
        return max((begin for known, begin, made in self._known if made and known <= generation), default=-1)

    def _differs(self, op: Op, missing: list[int]) -> Iterator[str]:
        """At each moment of the call the page was not what the snapshot holds: then it is dirty."""
        pages = self._facts.contents.get(op.args[1])
        if pages is None:
            return
        for page in missing:
            for place, value in zip(self._facts.places, pages[page], strict=True):
                if not self._registers.at(page, place).may_hold(value, op.begin, op.end):
                    windows = self._registers.at(page, place).windows(value)
                    last = max((w for w in windows if w.end < op.begin), key=lambda w: w.end, default=None)
                    after = [w.op for w in self._registers.at(page, place).writes if last and w.end == last.end][:1]
                    what = f"dirty(since a snapshot) misses hot page {page}: place {place} was {value:#x}"
                    yield finding(what, op, self._facts.by_id[op.args[1]], *after)
                    break

    def _written_since(self, op: Op, missing: list[int]) -> Iterator[str]:
        """Somebody has stored there after the generation had come, and before the call."""
        since = self._generation_came(op.args[1])
        for page in missing:
            for place in self._facts.places:
                for write in self._registers.at(page, place).writes:
                    if not (write.certain and write.begin > since and write.end < op.begin and write.op):
                        continue
                    if write.op.kind == words.RESTORE and self._registers.at(page, place).may_hold(
                        write.value, write.begin, write.end, without=write.op
                    ):
                        continue  # it may have been that already
                    yield finding(f"dirty(since generation {op.args[1]}) misses hot page {page}", op, write.op)
                    break
                else:
                    continue
                break

    def _generation_came(self, generation: int) -> int:
        """It had, by then."""
        if not hasattr(self, "_came"):
            known: dict[int, int] = {0: 0}
            for kind in (words.CHANGE, words.GENERATION, words.FREEZE):
                for op in self._facts.by_kind[kind]:
                    if op.outcome == words.OK:
                        known[op.value] = min(op.end, known.get(op.value, op.end))
            self._came = known
        return self._came[generation]


def meet(some: list[Span], others: list[Span]) -> list[Span]:
    """What both have in common; the others are apart."""
    found = []
    for begin, end in some:
        for other_begin, other_end in others:
            if other_begin <= end and other_end >= begin:
                found.append((max(begin, other_begin), min(end, other_end)))
    return sorted(found)
