"""A region's protections, drawn: the map that all agree on, and each participant's real page tables.

Lives here: reading page tables of other processes, telling a difference from what only looks like one, and the three
forms of the answer.
Not here: what an observer reads of the control segment (ext/operations/observe.c).

The first row is the map.  Rows for leases, snapshots and a freeze follow, where there are any; then a row for each
participant: what its page tables really allow, from /proc/PID/maps and the marks of userfaultfd(2) in
/proc/PID/pagemap.  That needs the rights of a debugger: the same user, and a process that is dumpable; a row that
cannot be read says why.  A cell is one page, or, where the width does not suffice, a run of pages: "+" where they
differ among themselves.

What a participant has otherwise than the map is a difference, marked "^" below its row, unless there is a reason: pages
that it has leased are open to it alone (L), pages for a snapshot are READ until they are saved or stored to (s), the
page of a forbidden store is a private copy for a moment (q).  A change under way is waited for, half a second at most,
and what it has not reached by then is marked "~".  A difference is told only if six looks in a row find it: leases of a
microsecond come and go.  A participant that is late (stopped, say) shows one until it follows, and its row says so.

``--json`` prints one object: ``name``, ``size``, ``page_size``, ``generation``, ``under_way`` ({offset, length} or
null), ``map`` (a list of {offset, length, protection}), ``leases`` ({offset, length, pid}), ``snapshots``
({area, state, generation, saved: bytes}), ``freeze`` ({pid, generation, before: as map} or null), and
``participants``: ``pid``, ``command``, ``engine``, ``applied``, ``status``, ``fenced``, ``pages`` (as map, with
``private``: a copy of its own; null where ``why`` says why not), ``differences`` ({offset, length, map, real,
under_way}).  Protections are bits, offsets and lengths bytes.

The exit status is 0 where there is something to draw, whatever it shows, and 1 where there is not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil
from rich.console import Console
from rich.text import Text

from pyshare import _core, _observer
from pyshare._observer import PAGE, Slot

NAME = "map"

PRIVATE = 8  # beside protection bits: a copy of the process's own
SURE, PATIENT, PAUSE = 6, 25, 0.02  # looks at a difference, and at a change under way; seconds between them
COLUMNS, FEW = 1024, 256  # runs in a row of a picture that can be seen; pages that can be told apart

Runs = list[tuple[int, int, int]]  # (first page, pages, value), ascending


def overlaid(*layers: Runs) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Runs over which every layer stays the same; each layer covers the region."""
    places = [iter(layer) for layer in layers]
    heads = [next(place) for place in places]
    at = 0
    while True:
        end = min(first + count for first, count, _ in heads)
        yield at, end - at, tuple(value for _, _, value in heads)
        at = end
        for index, (first, count, _) in enumerate(heads):
            if first + count == end:
                following = next(places[index], None)
                if following is None:
                    return
                heads[index] = following


def merged(runs: Iterable[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """Neighbours of the same value are one."""
    found: list[tuple[int, int, Any]] = []
    for first, count, value in runs:
        if found and found[-1][2] == value and found[-1][0] + found[-1][1] == first:
            found[-1] = (found[-1][0], found[-1][1] + count, value)
        else:
            found.append((first, count, value))
    return found


# -- Page tables -----------------------------------------------------------------------------------


class Unseen(Exception):
    """Somebody's page tables cannot be looked at; says why."""


VMA = re.compile(r"(\w+)-(\w+) (.)(.)(.)(.) (\w+) (\w+):(\w+) (\d+)")


def mappings(pid: int, start: int, end: int) -> Iterator[tuple[int, int, int, bool, int, tuple[int, int]]]:
    """(from, to, protection, shared, offset in the file, (device, inode)) of what a process has in a range."""
    with open(f"/proc/{pid}/maps") as maps:
        for text in maps:
            found = VMA.match(text)
            if not found:
                continue
            low, high, offset, major, minor = (int(found[index], 16) for index in (1, 2, 7, 8, 9))
            if low >= end:
                return
            if high > start:
                bits = (found[3] == "r") | (found[4] == "w") << 1 | (found[5] == "x") << 2
                file = (os.makedev(major, minor), int(found[10]))
                yield max(low, start), min(high, end), bits, found[6] == "s", offset + max(start - low, 0), file


def marked(pid: int, low: int, high: int, bits: int) -> Iterator[tuple[int, int]]:
    """(bytes, protection) of a writable range, as its page-table entries have it."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for pages, mark in _core.marks(fd, low // PAGE, (high - low) // PAGE):
            yield pages * PAGE, bits & ~2 if mark else bits
    finally:
        os.close(fd)


def page_tables(observer: _core.Observer, slot: Slot) -> Runs:
    """What a participant's page tables allow, by protection bits and PRIVATE; Unseen."""
    device, inode, begin = observer.file()
    start, end = slot.data, slot.data + observer.pages() * PAGE
    found: list[tuple[int, int, int]] = []
    at, ours = start, False
    try:
        for low, high, bits, shared, offset, file in mappings(slot.pid, start, end):
            if low < at:
                raise Unseen("its mappings change too fast")
            if low > at:
                found.append((at, low - at, 0))
            at = high
            if not shared:
                found.append((low, high - low, bits | PRIVATE if bits else 0))
            elif file == (device, inode) and offset == begin + low - start:
                ours = True
                for length, allowed in marked(slot.pid, low, high, bits) if bits & 2 else [(high - low, bits)]:
                    found.append((low, length, allowed))
                    low += length
            else:
                raise Unseen("it has something else where it says to have the data")
    except PermissionError:
        raise Unseen("its page tables may not be read by you") from None
    except (FileNotFoundError, ProcessLookupError):
        raise Unseen("gone, which nobody has noticed yet") from None
    if not ours:
        raise Unseen("it has no access: not a participant yet, or no longer")
    if at < end:
        found.append((at, end - at, 0))
    return merged(((low - start) // PAGE, length // PAGE, bits) for low, length, bits in found)


# -- A look ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """Pages that a participant has otherwise than the map says."""

    first: int
    count: int
    map: int
    real: int
    under_way: bool


@dataclasses.dataclass
class Seat:
    """A participant, and what its page tables allow."""

    slot: Slot
    command: str
    status: str
    pages: Runs | None
    why: str | None
    differences: list[Difference] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Look:
    """A region at a moment, or nearly."""

    generation: int
    under_way: tuple[int, int] | None
    map: Runs
    leases: Runs
    freeze: tuple[int, int] | None
    kept: Runs
    snapshots: list[tuple[int, str, int, Runs]]
    protected: bool  # pages may be READ for snapshots
    seats: list[Seat]

    def pid(self, owner: int) -> int | None:
        """Of the participant that an owner word names."""
        return next((seat.slot.pid for seat in self.seats if seat.slot.owner == owner), None)


def seat(observer: _core.Observer, slot: Slot) -> Seat:
    """One participant."""
    command, status, why = slot.command(), "", None
    pages: Runs | None = None
    try:
        if not slot.here:
            raise Unseen("in another pid namespace: its pid means nobody here")
        if not slot.alive:
            raise Unseen("gone, which nobody has noticed yet")
        process = slot.process()
        if process is None:
            raise Unseen("its process cannot be found in /proc")
        with contextlib.suppress(psutil.Error):
            status = process.status()
        pages = page_tables(observer, slot)
    except Unseen as unseen:
        why = str(unseen)
    return Seat(slot, command, status, pages, why)


def readable(bits: int) -> int:
    """On x86-64 what may be written may be read."""
    return bits | 1 if bits & 2 else bits


def accounted(slot: Slot, wanted: int, real: int, holder: int, protected: bool) -> str:
    """Why a participant has a page as it has it: "same", "private", "leased", "kept"; or "", a difference."""
    wanted, real = readable(wanted), readable(real)
    if real & PRIVATE:
        return "private"
    if real == wanted:
        return "leased" if holder == slot.owner and real & 2 else "same"
    if holder == slot.owner and real == wanted | 3:
        return "leased"
    return "kept" if protected and real == wanted & ~2 else ""


def differences(look: Look, one: Seat, moving: Sequence[tuple[int, int]]) -> list[Difference]:
    """Of a participant, in one look; `moving` are the pages that were changed meanwhile."""
    if one.pages is None:
        return []

    def those() -> Iterator[tuple[int, int, tuple[int, int, bool]]]:
        for first, count, (wanted, real, holder) in overlaid(look.map, one.pages or [], look.leases):
            if not accounted(one.slot, wanted, real, holder, look.protected):
                under_way = any(first < start + length and start < first + count for start, length in moving)
                yield first, count, (wanted, real, under_way)

    return [Difference(first, count, *value) for first, count, value in merged(those())]


def changed(observer: _core.Observer, since: int) -> list[tuple[int, int]]:
    """(first page, pages) of what has been changed since a generation, or is being changed; all, where that is lost."""
    under_way, latest = observer.under_way(), observer.generation()
    found = [under_way] if under_way else []
    for generation in range(since + 1, min(latest, since + _core.RING) + 1):
        change = observer.change(generation)
        if change is None:
            return [(0, observer.pages())]
        found.append(change[1:3])
    return found


def look_once(observer: _core.Observer) -> Look:
    """Everything, while others go on."""
    generation, under_way, freeze = observer.generation(), observer.under_way(), observer.freeze()
    look = Look(
        generation=generation,
        under_way=under_way,
        map=observer.protections(),
        leases=observer.leases(),
        freeze=freeze,
        kept=observer.kept() if freeze else [],
        snapshots=[(area, state, moment, observer.saved(area)) for area, state, moment in observer.snapshots()],
        protected=observer.protected(),
        seats=[seat(observer, slot) for slot in _observer.slots(observer)],
    )
    moving = changed(observer, generation) + ([under_way] if under_way else [])
    for one in look.seats:
        one.differences = differences(look, one, moving)
    return look


def persistent(old: Sequence[Difference], new: Sequence[Difference]) -> list[Difference]:
    """What both looks found, as the second has it; both ascending."""
    found, at = [], 0
    for one in new:
        while at < len(old) and old[at].first + old[at].count <= one.first:
            at += 1
        place = at
        while place < len(old) and old[place].first < one.first + one.count:
            other = old[place]
            first, end = max(one.first, other.first), min(one.first + one.count, other.first + other.count)
            found.append(dataclasses.replace(one, first=first, count=end - first))
            place += 1
    return found


def look(observer: _core.Observer) -> Look:
    """With the differences that were there each time; a change under way is waited for, a moment."""
    seen = look_once(observer)
    for looks in range(1, PATIENT):
        found = [difference for one in seen.seats for difference in one.differences]
        if not found or (looks >= SURE and not any(difference.under_way for difference in found)):
            break
        time.sleep(PAUSE)
        before = {one.slot.owner: one.differences for one in seen.seats}
        seen = look_once(observer)
        for one in seen.seats:
            one.differences = persistent(before.get(one.slot.owner, []), one.differences)
    return seen


# -- What is drawn ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Token:
    """What a page can look like."""

    letter: str
    style: str
    colour: str
    meaning: str


def of_protection(bits: int, letter: str, meaning: str) -> Token:
    """In the colours that all of pyshare has for it."""
    return Token(letter, *_observer.colour(bits), meaning)


NOTHING = Token(" ", "", "#ffffff", "")
NONE, READ, READ_WRITE, EXEC = (
    of_protection(bits, letter, meaning)
    for bits, letter, meaning in ((0, ".", "NONE"), (1, "r", "READ"), (3, "w", "READ_WRITE"), (4, "x", "executable"))
)
PARTLY = Token("/", "black on medium_purple1", "#a99ce6", "saved in part")
MIXED = Token("+", "black on khaki1", "#f3e08c", "several of these")
LEASED = Token("L", "black on orange1", "#f5a742", "leased: its holder may write")
KEPT = Token("s", "black on medium_purple1", "#a58be0", "READ until a snapshot has saved it, or a store comes")
SAVED = Token("S", "white on slate_blue3", "#6f5bd0", "saved by the snapshot")
UNSAVED = Token("-", "black on lavender", "#e3ddf8", "in the snapshot, not written since")
DIRTY = Token("d", "black on light_pink1", "#f0b7cf", "written while the snapshot was prepared")
QUARANTINED = Token("q", "white on deep_pink3", "#d84b8a", "a private copy, until a violation is raised")
TOKENS = (NONE, READ, READ_WRITE, EXEC, LEASED, UNSAVED, DIRTY, PARTLY, SAVED, KEPT, QUARANTINED, MIXED)
DIFFERS, UNDER_WAY = "^", "~"
RED, AMBER = "#d62728", "#e69f00"
MARKS = ((DIFFERS, "bold red", "otherwise than the map"), (UNDER_WAY, "yellow", "a change is under way"))


def protection_token(bits: int) -> Token:
    """Of the map, or of page tables."""
    return QUARANTINED if bits & PRIVATE else EXEC if bits & 4 else READ_WRITE if bits & 2 else READ if bits else NONE


@dataclasses.dataclass
class Strip:
    """A row."""

    label: str
    tokens: list[tuple[int, int, Token]] | None
    note: str = ""
    marks: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)


def pages_of(count: int) -> str:
    """So many."""
    return f"{count:,} page{'s' * (count != 1)}"


def held_strip(seen: Look) -> Strip:
    """The leases, with their holders."""
    holders = {owner: 0 for _, _, owner in seen.leases if owner}
    for _, count, owner in seen.leases:
        if owner:
            holders[owner] += count
    who = [f"{pages_of(count)} by {seen.pid(owner) or 'somebody who is gone'}" for owner, count in holders.items()]
    return Strip("leases", [(at, n, LEASED if owner else NOTHING) for at, n, owner in seen.leases], "; ".join(who))


def freeze_strip(seen: Look) -> Strip:
    """What a thaw will put back."""
    owner, before = seen.freeze or (0, 0)
    note = f"frozen by {seen.pid(owner) or 'somebody who is gone'} since change {before + 1}; this is what comes back"
    return Strip("before the freeze", [(at, n, protection_token(bits)) for at, n, bits in seen.kept], note)


def snapshot_strip(area: int, state: str, moment: int, saved: Runs) -> Strip:
    """What has been saved of it."""
    tokens = [(at, n, (UNSAVED, DIRTY, SAVED)[min(value, 2)]) for at, n, value in saved]
    done = sum(n for _, n, value in saved if value == 2)
    note = f"{state}, {pages_of(done)} saved" + (f"; of change {moment}" if state != "preparing" else "")
    return Strip(f"snapshot {area}", tokens, note)


def seat_note(seen: Look, one: Seat) -> str:
    """What is to be said of a participant beside its pages."""
    said = []
    for under_way, text in ((False, "otherwise than the map"), (True, "that a change under way has not reached")):
        count = sum(difference.count for difference in one.differences if difference.under_way == under_way)
        if count:
            said.append(f"{pages_of(count)} {text}")
    if one.slot.fenced:
        said.append("fenced: it could not apply a change, and has no access")
    if one.pages is not None and one.slot.applied < seen.generation:
        said.append(f"late: it follows change {one.slot.applied} of {seen.generation}")
    if one.status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        said.append("stopped")
    return "; ".join(said)


def seat_strip(seen: Look, one: Seat) -> Strip:
    """A participant's page tables."""
    label = f"{one.slot.pid} {_observer.short(one.command)}"
    if one.pages is None:
        return Strip(label, None, one.why or "")
    tokens = []
    for first, count, (wanted, real, holder) in overlaid(seen.map, one.pages, seen.leases):
        reason = accounted(one.slot, wanted, real, holder, seen.protected)
        special = {"leased": LEASED, "kept": KEPT, "private": QUARANTINED}.get(reason)
        tokens.append((first, count, special or protection_token(real)))
    marks = [(d.first, d.count, UNDER_WAY if d.under_way else DIFFERS) for d in one.differences]
    return Strip(label, tokens, seat_note(seen, one), marks)


def strips(seen: Look) -> list[Strip]:
    """All rows."""
    note = f"a change of {pages_of(seen.under_way[1])} is under way" if seen.under_way else ""
    rows = [Strip("map", [(at, n, protection_token(bits)) for at, n, bits in seen.map], note)]
    if seen.freeze:
        rows.append(freeze_strip(seen))
    if any(owner for _, _, owner in seen.leases):
        rows.append(held_strip(seen))
    rows.extend(snapshot_strip(*snapshot) for snapshot in seen.snapshots)
    return rows + [seat_strip(seen, one) for one in seen.seats]


def title(observer: _core.Observer, seen: Look) -> str:
    """What is drawn, in a line."""
    return _observer.title(observer, _observer.taking_part(one.slot for one in seen.seats), seen.generation)


class Grid:
    """Pages, divided into cells."""

    def __init__(self, pages: int, columns: int) -> None:
        self.pages = pages
        self.each = -(-pages // max(1, columns))  # pages of a cell
        self.cells = -(-pages // self.each)

    def tokens(self, runs: Iterable[tuple[int, int, Token]]) -> list[Token]:
        """One a cell."""
        found: list[Token | None] = [None] * self.cells
        for first, count, token in runs:
            for cell in range(first // self.each, (first + count - 1) // self.each + 1):
                found[cell] = token if found[cell] in (None, token) else self._mixed(found[cell], token)
        return [token or NOTHING for token in found]

    @staticmethod
    def _mixed(one: Token | None, other: Token) -> Token:
        if {one, other} == {LEASED, NOTHING}:
            return LEASED
        return PARTLY if {one, other} <= {UNSAVED, DIRTY, SAVED, PARTLY} else MIXED

    def marks(self, runs: Iterable[tuple[int, int, str]]) -> str:
        """One a cell, a difference before what is under way."""
        found = [" "] * self.cells
        for first, count, mark in runs:
            for cell in range(first // self.each, (first + count - 1) // self.each + 1):
                if found[cell] != DIFFERS:
                    found[cell] = mark
        return "".join(found)

    @property
    def scale(self) -> str:
        """What a cell is."""
        return f"a cell is {pages_of(self.each)} ({_observer.size(self.each * PAGE)})"


# -- As text ---------------------------------------------------------------------------------------

LABEL = 22  # columns


def ruler(grid: Grid) -> str:
    """Offsets above the cells."""
    text, step = "", 16
    for cell in range(0, grid.cells, step):
        offset = _observer.size(cell * grid.each * PAGE) if cell else "0"
        if len(text) <= cell and cell + len(offset) + 1 <= max(grid.cells, step):
            text = text.ljust(cell) + f"|{offset}"
    return text


def draw_strip(grid: Grid, strip: Strip) -> Iterator[Text]:
    """A row, and a line below it for marks and what is to be said."""
    label = Text(f"{strip.label[: LABEL - 2]:<{LABEL}}", "bold")
    if strip.tokens is None:
        yield Text.assemble(label, (strip.note, "italic yellow"))
        return
    marks = grid.marks(strip.marks)
    row = Text()
    for (token, mark), same in itertools.groupby(zip(grid.tokens(strip.tokens), marks, strict=True)):
        style = "bold white on red3" if mark == DIFFERS else token.style
        row.append(token.letter * len(list(same)), style)
    yield Text.assemble(label, row)
    if strip.marks:
        yield Text(" " * LABEL) + Text(marks.rstrip(), "bold red" if DIFFERS in marks else "yellow")
    if strip.note:
        yield Text(" " * LABEL) + Text(strip.note, "bold red" if DIFFERS in marks else "dim")


def legend(used: Iterable[Token], marks: set[str], width: int) -> Iterator[Text]:
    """What is in the rows; lines."""
    entries = [(token.letter, token.style, token.meaning) for token in used]
    entries += [(mark, style, meaning) for mark, style, meaning in MARKS if mark in marks]
    line = Text()
    for letter, style, meaning in entries:
        entry = Text.assemble((f" {letter} ", style), f" {meaning}")
        if line and len(line) + 3 + len(entry) > width:
            yield line
            line = Text()
        line = Text.assemble(line, "   " if line else "", entry)
    yield line


def used_in(rows: Sequence[list[Token]]) -> list[Token]:
    """In the order of the legend."""
    return [token for token in TOKENS if any(token in row for row in rows)]


def draw(observer: _core.Observer, seen: Look, console: Console, width: int | None) -> None:
    """For people."""
    grid = Grid(observer.pages(), min(width or max(8, console.width - LABEL), observer.pages()))
    rows = strips(seen)

    def say(text: Text) -> None:
        console.print(text, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)

    say(Text(f"{title(observer, seen)}; {grid.scale}", "bold"))
    say(Text(" " * LABEL + ruler(grid), "dim"))
    for row in rows:
        for text in draw_strip(grid, row):
            say(text)
    drawn = [grid.tokens(row.tokens) for row in rows if row.tokens is not None]
    say(Text())
    for text in legend(used_in(drawn), {mark for row in rows for _, _, mark in row.marks}, console.width):
        say(text)


# -- As a picture ----------------------------------------------------------------------------------


class Canvas:
    """Rows of a picture, in pages from the left."""

    HEIGHT = 0.68

    def __init__(self, axes: Any, grid: Grid) -> None:
        self._axes = axes
        self._grid = grid
        self.used: list[list[Token]] = []

    def _bar(self, place: int, first: int, count: int, **how: Any) -> None:
        self._axes.broken_barh([(first, count)], (place - self.HEIGHT / 2, self.HEIGHT), **how)

    def _pieces(self, strip: Strip) -> list[tuple[int, int, Token]]:
        """Its runs, or, where they are too many to be seen, its cells."""
        runs = merged(strip.tokens or [])
        if len(runs) <= COLUMNS:
            return runs
        each = self._grid.each
        return merged((cell * each, each, token) for cell, token in enumerate(self._grid.tokens(runs)))

    def strip(self, place: int, strip: Strip) -> None:
        """One row."""
        if strip.tokens is None:
            self._note(place, self._grid.pages / 2, strip.note, size=9, style="italic", ha="center", va="center")
            return
        pieces = self._pieces(strip)
        self.used.append([token for _, _, token in pieces])
        for first, count, token in pieces:
            if token is not NOTHING:
                self._bar(place, first, count, facecolor=token.colour, linewidth=0)
        if self._grid.pages <= FEW:
            low, high = place - self.HEIGHT / 2, place + self.HEIGHT / 2
            self._axes.vlines(range(1, self._grid.pages), low, high, color="white", linewidth=0.8)
        self._bar(place, 0, self._grid.pages, facecolor="none", edgecolor="#bdc1c6", linewidth=0.8, clip_on=False)
        for first, count, mark in strip.marks:
            self._bar(place, first, count, **marked_by(mark), zorder=3)
        colour = RED if any(mark == DIFFERS for _, _, mark in strip.marks) else "#5f6368"
        self._note(place + 0.43, 0, strip.note, size=8, color=colour, va="top")

    def _note(self, place: float, at: float, text: str, **how: Any) -> None:
        self._axes.text(at, place, text, **{"color": "#5f6368", **how})


def marked_by(mark: str) -> dict[str, Any]:
    """How a mark looks in a picture."""
    return {"facecolor": "none", "edgecolor": RED if mark == DIFFERS else AMBER, "linewidth": 2, "hatch": "////"}


def plot(path: str, observer: _core.Observer, seen: Look) -> None:
    """The same rows are drawn in a file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import patches, pyplot

    pages, rows = observer.pages(), strips(seen)
    figure, axes = pyplot.subplots(figsize=(14, 1.7 + 0.62 * len(rows)), layout="constrained")
    canvas = Canvas(axes, Grid(pages, COLUMNS))
    for place, row in enumerate(rows):
        canvas.strip(place, row)
    axes.set(xlim=(0, pages), ylim=(len(rows) - 0.25, -0.6))
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=10)
    offsets = range(0, pages, 1 << max(0, (pages - 1).bit_length() - 3))  # powers of two, at most eight
    axes.set_xticks(offsets, [_observer.size(page * PAGE) if page else "0" for page in offsets])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title(observer, seen), loc="left", fontsize=12, pad=24)
    handles = [
        patches.Patch(facecolor=token.colour, edgecolor="#80868b", linewidth=0.5, label=token.meaning)
        for token in used_in(canvas.used)
    ]
    marks = {mark for row in rows for _, _, mark in row.marks}
    handles += [patches.Patch(**marked_by(mark), label=meaning) for mark, _, meaning in MARKS if mark in marks]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


# -- As an object ----------------------------------------------------------------------------------


def plain(observer: _core.Observer, seen: Look) -> dict[str, Any]:
    """For programs, as --json has it."""

    def placed(first: int, count: int, **values: Any) -> dict[str, Any]:
        offset, length = _observer.in_bytes(observer, first, count)
        return {"offset": offset, "length": length, **values}

    def protections(runs: Runs) -> list[dict[str, Any]]:
        return [placed(first, count, protection=bits & 7) for first, count, bits in runs]

    return {
        "name": observer.name(),
        "size": observer.size(),
        "page_size": observer.page_size(),
        "generation": seen.generation,
        "under_way": placed(*seen.under_way) if seen.under_way else None,
        "map": protections(seen.map),
        "leases": [placed(first, n, pid=seen.pid(owner)) for first, n, owner in seen.leases if owner],
        "snapshots": [
            {"area": area, "state": state, "generation": moment, "saved": PAGE * sum(n for _, n, v in saved if v == 2)}
            for area, state, moment, saved in seen.snapshots
        ],
        "freeze": {
            "pid": seen.pid(seen.freeze[0]),
            "generation": seen.freeze[1] + 1,
            "before": protections(seen.kept),
        }
        if seen.freeze
        else None,
        "participants": [
            {
                "pid": one.slot.pid,
                "command": one.command,
                "engine": "uffd" if one.slot.uffd else "mprotect",
                "applied": one.slot.applied,
                "status": one.status,
                "fenced": one.slot.fenced,
                "pages": None
                if one.pages is None
                else [placed(at, n, protection=bits & 7, private=bits >= PRIVATE) for at, n, bits in one.pages],
                "why": one.why,
                "differences": [
                    placed(d.first, d.count, map=d.map, real=d.real & 7, under_way=d.under_way) for d in one.differences
                ],
            }
            for one in seen.seats
        ],
    }


# -- The command -----------------------------------------------------------------------------------


def columns(text: str) -> int:
    """A number of cells."""
    number = int(text)
    if not 1 <= number <= 10_000:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``map``."""
    parser.add_argument("name", metavar="NAME", help="of the region")
    parser.add_argument("--json", action="store_true", help="print one object, for a program to read")
    parser.add_argument(
        "--width", type=columns, metavar="N", help="so many cells at most; else as the terminal has room"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw it in a file as well (needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Draws the region once."""
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        print("pyshare map: --plot needs matplotlib: say pip install 'pyshare[plot]'", file=sys.stderr)
        return 1
    with _observer.observed(arguments.name, NAME) as (observer, _), _observer.to_who_listens():
        seen = look(observer)
        if arguments.plot:
            try:
                plot(arguments.plot, observer, seen)
            except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
                print(f"pyshare map: cannot draw {arguments.plot}: {error}", file=sys.stderr)
                return 1
        if arguments.json:
            json.dump(plain(observer, seen), sys.stdout, indent=1)
            print()
        else:
            draw(observer, seen, _observer.Listened(highlight=False), arguments.width)
    return 0
