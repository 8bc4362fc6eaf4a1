"""Leases, locks and freezes: they exclude, they keep changes away, and they tell of the dead exactly.

Lives here: those judgements, and that nothing is stored where nobody may.  Not here: how long a wait is (waits.py).
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator

from histories import words
from histories.facts import Facts, Hold, Intervals, Span, certainly, finding, pages_of
from histories.history import FOREVER, Op
from histories.rights import Rights, is_done


class Holds:
    """Of one history."""

    def __init__(self, facts: Facts, rights: Rights) -> None:
        self._facts, self._rights = facts, rights

    def judge(self) -> Iterator[str]:
        facts = self._facts
        for page in range(facts.hot):
            yield from self._excludes(leases_of(facts, page), f"leases of hot page {page}")
        for index in {hold.op.args[0] for hold in facts.locks}:
            yield from self._excludes([hold for hold in facts.locks if hold.op.args[0] == index], f"lock {index}")
        yield from self._excludes(facts.freezes, "freezes")
        yield from self._keeps_changes_away()
        yield from self._freeze_against_leases()
        yield from self._abandoned()
        yield from self._whole()
        yield from self._nothing_changes()

    # -- Exclusion -----------------------------------------------------------------------------------------------------

    def _excludes(self, holds: list[Hold], what: str) -> Iterator[str]:
        latest: Hold | None = None
        for hold in sorted(holds, key=lambda hold: hold.certain[0]):
            if hold.certain[0] >= hold.certain[1]:
                continue
            if latest is not None and hold.certain[0] < latest.certain[1]:
                yield finding(f"{what}: two were held at once", latest.op, *over(latest), hold.op, *over(hold))
            if latest is None or hold.certain[1] > latest.certain[1]:
                latest = hold

    def _keeps_changes_away(self) -> Iterator[str]:
        """No change is made of pages that are leased, nor any while all is frozen."""
        leases = [Intervals(certainly(leases_of(self._facts, page))) for page in range(self._facts.hot)]
        frozen = Intervals(certainly(self._facts.freezes))
        for change in self._facts.changes:
            if not is_done(change) or change.op.outcome != words.OK:
                continue
            op = change.op
            for page in range(change.first, change.last + 1):
                for hold in leases[page].meeting(op.begin, op.end):
                    if hold.certain[0] < op.begin and op.end < hold.certain[1]:
                        yield finding(f"hot page {page} was changed while it was leased", hold.op, *over(hold), op)
            for hold in frozen.meeting(op.begin, op.end):
                if hold.certain[0] < op.begin and op.end < hold.certain[1]:
                    yield finding("a change was made while all was frozen", hold.op, *over(hold), op)

    def _freeze_against_leases(self) -> Iterator[str]:
        frozen = Intervals((*hold.certain, hold) for hold in self._facts.freezes if hold.certain[0] < hold.certain[1])
        for hold in self._facts.leases:
            if hold.certain[0] < hold.certain[1]:
                for freeze in frozen.meeting(*hold.certain):
                    yield finding(
                        "a lease was held while all was frozen", freeze.op, *over(freeze), hold.op, *over(hold)
                    )

    # -- The dead ------------------------------------------------------------------------------------------------------

    def _abandoned(self) -> Iterator[str]:
        """Who takes what a dead holder had is told; who takes anything else is not."""
        facts = self._facts
        pages = {f"hot page {page}": leases_of(facts, page) for page in range(facts.hot)}
        locks = {
            f"lock {index}": [hold for hold in facts.locks if hold.op.args[0] == index]
            for index in {hold.op.args[0] for hold in facts.locks}
        }
        between = self._between()
        for what, on in (*pages.items(), *between.items(), *locks.items()):
            yield from self._must_be_told(on, what)
        calls = [*map(self._died_in_calls().__getitem__, range(facts.hot)), *([] for _ in between)]
        yield from self._must_not_be_told([*pages.values(), *between.values()], calls)
        yield from self._must_not_be_told(list(locks.values()), [[]] * len(locks))

    def _between(self) -> dict[str, list[Hold]]:
        """Leases of the pages between two hot ones, which are leased with both."""
        hot, found = self._facts.plan["hot"], {}
        for page, (one, other) in enumerate(itertools.pairwise(hot)):
            if other > one + 1:
                both = [hold for hold in leases_of(self._facts, page) if page + 1 in pages_of(hold.op)]
                found[f"pages behind hot page {page}"] = both
        return found

    def _died_in_calls(self) -> dict[int, list[Op]]:
        """Of each page, the calls that had it leased for themselves when their process died."""
        found: dict[int, list[Op]] = defaultdict(list)
        for kind in (words.READINTO, words.RECEIVE):
            for op in self._facts.by_kind[kind]:
                if op.outcome is None:
                    found[op.args[0]].append(op)
        return found

    def _must_be_told(self, on: list[Hold], what: str) -> Iterator[str]:
        """By the first one after a holder that certainly died with it, where nobody else can have come between."""
        on = sorted(on, key=lambda hold: hold.op.begin)
        begins = [hold.op.begin for hold in on]
        for hold in on:
            if not (hold.died and hold.over is None and hold.certain[0] and hold.op.outcome == words.OK):
                continue
            after = [h for h in on[bisect.bisect_right(begins, hold.certain[0]) :] if h is not hold]
            after += [h for h in on if h is not hold and h.op.begin <= hold.certain[0] < h.op.end]
            first = min((h for h in after if h.op.outcome == words.OK), key=lambda h: h.op.end, default=None)
            if first is None or first.op.value[0]:
                continue
            if any(h.op.begin < first.op.end and h is not first for h in after):
                continue  # somebody else may have been told
            yield finding(f"{what}: its holder died, and the next one was not told", hold.op, first.op)

    def _must_not_be_told(self, things: list[list[Hold]], calls: list[list[Op]]) -> Iterator[str]:
        """Of a death that nobody died, or of one that a holder was told of who has let go since."""
        told = {hold.op.id: hold for on in things for hold in on if hold.op.outcome == words.OK and hold.op.value[0]}
        rightly: set[str] = set()
        for on, died_in in zip(things, calls, strict=True):
            dead = [hold for hold in on if hold.died]
            whole = [hold for hold in on if hold.over is not None and hold.over.outcome == words.OK]
            rightly |= {
                name
                for name, hold in told.items()
                if hold in on
                and (
                    any(may_be_told_of(other, hold, whole) for other in dead)
                    or any(op.begin < hold.op.end for op in died_in)
                )
            }
        for name in told.keys() - rightly:
            yield finding("a holder was told of somebody who died, and nobody did since", told[name].op)

    # -- What is there -------------------------------------------------------------------------------------------------

    def _whole(self) -> Iterator[str]:
        """Under a lease the last transaction is there as a whole, unless one was told of the dead."""
        leased = slice(len(self._facts.places) - len(words.LEASED_AT), None)
        halves = [self._halves(page, leased) for page in range(self._facts.hot)]
        for op in self._facts.by_kind[words.LOAD]:
            if op.args[2] != "lease" or op.outcome != words.OK:
                continue
            taken = self._facts.by_id[op.args[3]]
            for index, values in enumerate(self._facts.pages_of(op.value)):
                page = op.args[0] + index
                if (
                    len(set(values[leased])) > 1
                    and not taken.value[0]
                    and not halves[page].any_meeting(op.begin, op.end)
                ):
                    found = [hex(value) for value in values[leased]]
                    yield finding(f"hot page {page}: a lease found half of a transaction: {found}", taken, op)

    def _halves(self, page: int, leased: slice) -> Intervals[Op]:
        """When half of a transaction may be there: one was cut off, or restored, and none was whole since."""
        facts = self._facts
        on = [op for op in facts.by_kind[words.TRANSACT] if op.args[1] <= page < op.args[1] + op.args[2]]
        done = Counter(op.args[4] for op in on if op.outcome == words.OK)
        whole = sorted(
            op.end for op in on if op.args[3] == words.PLACES - 1 and done[op.args[4]] == len(words.LEASED_AT)
        )
        cut = [(op.begin, op.end, op) for op in on if op.outcome != words.OK]
        cut += [
            (hold.op.begin, hold.possible[1], hold.op)
            for hold in facts.leases_on[page].meeting(-1, FOREVER)
            if hold.died
        ]
        for op in facts.by_kind[words.RESTORE]:
            pages = facts.contents.get(op.args[0])
            if op.outcome != words.OK or pages is None or len(set(pages[page][leased])) > 1:
                cut.append((op.begin, op.end, op))
        return Intervals((begin, _first_after(whole, end), op) for begin, end, op in cut)

    def _nothing_changes(self) -> Iterator[str]:
        """Where no store is possible all loads find the same."""
        frozen = self._rights.frozen_spans()
        for page in range(self._facts.hot):
            loads = [
                (op, self._facts.pages_of(op.value)[page - op.args[0]])
                for op in self._facts.by_kind[words.LOAD]
                if op.args[0] <= page < op.args[0] + op.args[1] and op.outcome == words.OK and op.value
                if not self._facts.is_private(op)
            ]
            loads.sort(key=lambda load: load[0].begin)
            begins = [op.begin for op, _ in loads]
            spans = [(span, "nobody could store") for span in self._rights.quiet(page)]
            spans += [(span, "all was frozen") for span in frozen]
            for span, why in spans:
                yield from self._same_in(span, why, page, loads, begins)

    def _same_in(
        self, span: Span, why: str, page: int, loads: list[tuple[Op, list[int]]], begins: list[int]
    ) -> Iterator[str]:
        first: tuple[Op, list[int]] | None = None
        for op, values in loads[bisect.bisect_right(begins, span[0]) :]:
            if op.begin > span[1]:
                return
            if op.end >= span[1]:
                continue
            if first is None:
                first = op, values
            elif values != first[1]:
                at = [place for place, a, b in zip(self._facts.places, first[1], values, strict=True) if a != b]
                told = f"between {span[0] / 1e6:.3f} and {span[1] / 1e6:.3f} ms"
                yield finding(f"hot page {page} has changed while {why}, at places {at}", first[0], op, told)
                return


def leases_of(facts: Facts, page: int) -> list[Hold]:
    """Those over that page."""
    return [hold for hold in facts.leases if page in pages_of(hold.op)]


def over(hold: Hold) -> list[Op]:
    """What ended it, if anything did."""
    return [hold.over] if hold.over else []


def may_be_told_of(dead: Hold, hold: Hold, whole: list[Hold]) -> bool:
    """Nobody has certainly had it, and let it go, in between."""
    return (
        dead is not hold
        and dead.op.begin < hold.op.end
        and not any(
            other.over is not None and other.op.begin > dead.possible[1] and other.over.end < hold.op.begin
            for other in whole
        )
    )


def _first_after(times: list[int], at: int) -> int:
    index = bisect.bisect_right(times, at)
    return times[index] if index < len(times) else FOREVER
