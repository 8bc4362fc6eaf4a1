"""What each place of the memory may have held, and when.

Lives here: Registers: the windows of time in which a place may have had a value; the judgement of loads.  Not here:
which stores were allowed (rights.py), images of all places at one moment (images.py).
A store takes effect between its beginning and its end, and the value stays until a store that is certain, and began
after that end, has ended.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from histories import words
from histories.facts import Facts, finding
from histories.history import Op
from histories.rights import Rights

LONG_AGO = -1


class Write(NamedTuple):
    begin: int
    end: int
    value: int
    certain: bool
    op: Op | None
    passing: bool = False  # it is another value by the end of the operation


class Window(NamedTuple):
    """The place may have held the value from `begin` to `end`, by the write."""

    begin: int
    end: int
    write: Write


class Place:
    """One word of one page."""

    def __init__(self, writes: list[Write]) -> None:
        writes.sort(key=lambda write: write.begin)
        self.writes = writes
        self._certain = [write.begin for write in writes if write.certain]
        ends = [write.end for write in writes if write.certain]
        for at in range(len(ends) - 2, -1, -1):
            ends[at] = min(ends[at], ends[at + 1])
        self._over = ends  # when the first of the certain ones from here on has ended
        self._windows: dict[int, list[Window]] | None = None
        self._spans: dict[int, list[tuple[int, int]]] = {}

    def _gone(self, after: int) -> int:
        """When whatever was there at `after` has been stored over for certain."""
        at = bisect.bisect_right(self._certain, after)
        return self._over[at] if at < len(self._over) else 1 << 62

    def windows(self, value: int) -> list[Window]:
        """In which it may have held it, in order; none: nobody has ever stored it."""
        if self._windows is None:
            self._windows = defaultdict(list)
            first = Write(LONG_AGO, LONG_AGO, 0, True, None)
            for write in (first, *self.writes):
                end = write.end if write.passing else self._gone(write.end)
                self._windows[write.value].append(Window(write.begin, end, write))
        return self._windows.get(value, [])

    def spans(self, value: int) -> list[tuple[int, int]]:
        """The windows, those that touch as one."""
        if value not in self._spans:
            found: list[tuple[int, int]] = []
            for window in sorted(self.windows(value), key=lambda window: window.begin):
                if found and window.begin <= found[-1][1]:
                    found[-1] = found[-1][0], max(found[-1][1], window.end)
                else:
                    found.append((window.begin, window.end))
            self._spans[value] = found
        return self._spans[value]

    def may_hold(self, value: int, begin: int, end: int, without: Op | None = None) -> bool:
        """At some moment of that interval; not by the operation `without`."""
        return any(
            window.begin <= end and window.end >= begin and (without is None or window.write.op is not without)
            for window in self.windows(value)
        )


class Registers:
    """All places of all hot pages."""

    def __init__(self, facts: Facts, rights: Rights) -> None:
        self._facts, self._rights = facts, rights
        writes: dict[tuple[int, int], list[Write]] = defaultdict(list)
        for page, place, write in self._writes():
            writes[page, place].append(write)
        self._places = {
            (page, place): Place(writes[page, place]) for page in range(facts.hot) for place in facts.places
        }

    def at(self, page: int, place: int) -> Place:
        return self._places[page, place]

    # -- Who has written -----------------------------------------------------------------------------------------------

    def _writes(self) -> Iterator[tuple[int, int, Write]]:
        facts = self._facts
        for op in self._stores():
            taken_place = op.outcome in (words.OK, words.INTERRUPTED, None)
            if taken_place or (op.outcome == words.REFUSED and self._rights.may_be_granted(op)):
                certain = op.outcome == words.OK and not facts.is_private(op)
                yield op.args[0], op.args[3], Write(op.begin, op.end, op.args[2], certain, op)
                if op.args[1] == "pack":  # struct.pack_into makes it zero before; so it stays if the value may not come
                    yield op.args[0], op.args[3], Write(op.begin, op.end, 0, False, op, passing=certain)
        for op in facts.by_kind[words.TRANSACT]:
            _, first, count, place, value, _ = op.args
            for page in range(first, first + count):
                yield page, place, Write(op.begin, op.end, value, op.outcome == words.OK, op)
        for op in facts.by_kind[words.RESTORE]:
            if op.args[0] in facts.contents and op.outcome in (words.OK, words.INTERRUPTED, words.KERNEL, None):
                yield from self._restored(op, facts.contents[op.args[0]])

    def _stores(self) -> Iterator[Op]:
        for kind in (words.STORE, words.READINTO, words.RECEIVE):
            yield from self._facts.by_kind[kind]

    def _restored(self, op: Op, pages: list[list[int]]) -> Iterator[tuple[int, int, Write]]:
        for page, values in enumerate(pages):
            for place, value in zip(self._facts.places, values, strict=True):
                yield page, place, Write(op.begin, op.end, value, op.outcome == words.OK, op)

    # -- What was read -------------------------------------------------------------------------------------------------

    def judge(self) -> Iterator[str]:
        """Each load has found what may have been there."""
        facts = self._facts
        for op in (*facts.by_kind[words.LOAD], *facts.by_kind[words.OBSERVE]):
            if op.outcome != words.OK or facts.is_private(op):
                continue
            for index, values in enumerate(facts.pages_of(op.value)):
                page = op.args[0] + index
                for place, value in zip(facts.places, values, strict=True):
                    if not self.at(page, place).may_hold(value, op.begin, op.end):
                        yield self._cannot_be(op, page, place, value)

    def _cannot_be(self, op: Op, page: int, place: int, value: int) -> str:
        windows = self.at(page, place).windows(value)
        refused = [other for other in self._stores() if other.args[2] == value and other.outcome == words.REFUSED]
        if refused:
            return finding("a store that was refused has taken place", refused[0], op)
        if not windows:
            return finding(f"hot page {page}, place {place}: a load found {value:#x}, which nobody has stored", op)
        near = min(windows, key=lambda window: min(abs(window.begin - op.end), abs(op.begin - window.end)))
        times = f"it was there from {near.begin / 1e6:.3f} to {near.end / 1e6:.3f} ms at most"
        what = f"hot page {page}, place {place}: a load found {value:#x}, which was not there at that time"
        return finding(what, op, *([near.write.op] if near.write.op else []), times)
