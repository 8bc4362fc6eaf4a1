"""The files of the database: a heap of pages, a log of changes, and how the one is mended from the other.

Lives here: all that holds without a region and without other processes: formats, recovery's redo, the audit.
Not here: the pool that processes share, and transactions (database_engine.py).

Invariants
 1. Every page carries its checksum, its number, and the LSN (position in the log) of the last change made to it.
 2. A log record carries its length, its own position and a checksum; the first that is not whole is the log's end.
 3. The first change of a page after a checkpoint is logged with the whole page, so a page torn on its way to disk is
    no loss.
 4. A page is in the heap, in the image of the latest checkpoint, or in both: the one with the later LSN counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import pyshare


class DatabaseError(Exception):
    """The files are not what they should be, or the engine cannot go on."""


# -- The heap: a file of pages -------------------------------------------------------------------------------------

MAGIC: Final = b"pyshare1"
PAGE: Final = 8192
BODY: Final = 32
HEADER: Final = struct.Struct("<IIQH")  # checksum of all that follows, page number, LSN, rows
META: Final = struct.Struct("<8sI")  # page 0: magic, accounts
BALANCE: Final = struct.Struct("<q")
BALANCE_ROW: Final = 100  # a balance and filler, as TPC-B has it
BALANCES_PER_PAGE: Final = (PAGE - BODY) // BALANCE_ROW
HISTORY: Final = struct.Struct("<QIIIqd")  # transaction (0: undone), account, teller, branch, amount, time
HISTORY_PER_PAGE: Final = (PAGE - BODY) // HISTORY.size
ACCOUNTS_PER_BRANCH: Final = 10_000
TELLERS_PER_BRANCH: Final = 10


class Table(NamedTuple):
    """Balances of one kind, in neighbouring pages."""

    first: int
    rows: int
    per_page: int

    @property
    def end(self) -> int:
        return self.first + -(-self.rows // self.per_page)

    def place(self, row: int) -> tuple[int, int]:
        """(page, slot)"""
        return self.first + row // self.per_page, row % self.per_page


class Layout:
    """Which page holds what: meta page, branches (a page each: they are hot), tellers, accounts, then the history."""

    def __init__(self, accounts: int) -> None:
        branches = max(1, accounts // ACCOUNTS_PER_BRANCH)
        self.branches = Table(1, branches, 1)
        self.tellers = Table(self.branches.end, branches * TELLERS_PER_BRANCH, TELLERS_PER_BRANCH)
        self.accounts = Table(self.tellers.end, accounts, BALANCES_PER_PAGE)
        self.history = self.accounts.end

    @property
    def tables(self) -> dict[str, Table]:
        return {"branches": self.branches, "tellers": self.tellers, "accounts": self.accounts}

    def describe(self, page: int) -> str:
        for name, table in self.tables.items():
            if table.first <= page < table.end:
                row = (page - table.first) * table.per_page
                last = min(row + table.per_page, table.rows) - 1
                return f"{name} {row} to {last}" if last > row else f"branch {row}"
        return f"history page {page}" if page else "the meta page"


def fresh_page(number: int) -> bytearray:
    image = bytearray(PAGE)
    HEADER.pack_into(image, 0, 0, number, 0, 0)
    return image


def seal(image: bytearray) -> bytearray:
    struct.pack_into("<I", image, 0, zlib.crc32(memoryview(image)[4:]))
    return image


def lsn_of(page: bytearray | memoryview) -> int:
    return int(HEADER.unpack_from(page)[2])


class Heap:
    """The heap file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        meta = self._sealed(0)
        magic, accounts = META.unpack_from(meta, BODY) if meta else (b"", 0)
        if magic != MAGIC:
            os.close(self.fd)
            raise DatabaseError(f"{path} is no heap of this program; name another file")
        self.layout = Layout(accounts)

    @property
    def pages(self) -> int:
        return -(-os.fstat(self.fd).st_size // PAGE)

    def _sealed(self, page: int) -> bytearray | None:
        image = bytearray(os.pread(self.fd, PAGE, page * PAGE))
        if len(image) < PAGE:
            return None
        checksum, number, _, _ = HEADER.unpack_from(image)
        return image if checksum == zlib.crc32(memoryview(image)[4:]) and number == page else None

    def read(self, page: int) -> bytearray | None:
        """The page as it is on disk; None if its checksum is wrong: it was torn on its way there, or damaged."""
        image = self._sealed(page)
        if image is None and page >= self.layout.history and not any(os.pread(self.fd, PAGE, page * PAGE)):
            return fresh_page(page)  # of the history, and nobody has written it yet
        return image

    def write(self, page: int, image: bytearray) -> None:
        if os.pwrite(self.fd, seal(image), page * PAGE) != PAGE:
            raise DatabaseError(f"page {page} could not be written whole: is the disk full?")

    def sync(self) -> None:
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def create_database(path: str, accounts: int) -> None:
    """A heap with all balances 0, and its log. The heap gets its name last: a half-made one is never found."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path + IMAGE)
    LogFile.renew(path + ".log", base=PAGE, epoch=0)
    with open(path + ".new", "wb") as file:
        for number in range(Layout(accounts).history):
            image = fresh_page(number)
            if number == 0:
                META.pack_into(image, BODY, MAGIC, accounts)
            file.write(seal(image))
    replace(path + ".new", path)


def replace(source: str, target: str) -> None:
    """The target is what the source was, also after a power cut."""
    _sync(source)
    os.rename(source, target)
    _sync(os.path.dirname(os.path.abspath(target)))


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- Checkpoints: images of the pool ---------------------------------------------------------------------------------

IMAGE: Final = ".image"  # the file's name is that of the heap with this at its end
# The first words of the pool's region, as far as an image is read without the engine: how far the log went, which log
# that was; where the notes of the latches begin, how many words they are; where the frames begin, and the words that
# say which page each has.
TAIL, EPOCH, NOTES_AT, NOTES, FRAMES_AT, PAGE_OF_AT = 0, 7, 8, 9, 10, 11
WORDS, NOTE_WORDS = 16, 4


class Checkpoint:
    """The pages that the pool had at one moment. A frame whose latch had a note was about to change: it does not count,
    and is in the heap. There may be no image, or one of an earlier log: then it has no pages."""

    def __init__(self, path: str, epoch: int) -> None:
        self.tail = 0  # of the log, at that moment
        self.frames: dict[int, bytes] = {}
        try:
            image = pyshare.Image(path + IMAGE)
        except FileNotFoundError:
            return
        with image:
            image.check()
            words = memoryview(image.read(0, WORDS * 8)).cast("Q")
            if words[EPOCH] == epoch:
                self.tail = words[TAIL]
                self._read_frames(image, words)

    def _read_frames(self, image: pyshare.Image, words: memoryview) -> None:
        noted = set(noted_frames(memoryview(image.read(words[NOTES_AT], words[NOTES] * 8)).cast("Q")))
        for frame, at in enumerate(range(words[FRAMES_AT], image.size, PAGE)):
            page = int.from_bytes(image.read(words[PAGE_OF_AT] + frame * 8, 8), "little") - 1
            if page >= 0 and frame not in noted:
                self.frames[page] = image.read(at, PAGE)

    def newer(self, page: int, on_disk: bytearray | None) -> bytearray | None:
        """The page as it is here, or as it is in the heap (None: torn); None if both have nothing."""
        here = self.frames.get(page)
        if here is None or (on_disk is not None and lsn_of(on_disk) >= lsn_of(here)):
            return on_disk
        return bytearray(here)


def noted_frames(notes: memoryview) -> list[int]:
    """Those that are about to change."""
    return [notes[at + 1] for at in range(0, len(notes), NOTE_WORDS) if notes[at]]


# -- Changes, and what they do to a page ---------------------------------------------------------------------------

ADD, INSERT, UNDO_ADD, UNDO_INSERT, COMMIT, ABORT, CHECKPOINT = range(1, 8)
UNDO_OF: Final = {ADD: UNDO_ADD, INSERT: UNDO_INSERT}


class Change(NamedTuple):
    """What a log record says. A checkpoint's amount is the LSN from which redo is needed; where it has an image, its
    transaction is how far the log went at the moment of that."""

    kind: int
    transaction: int = 0
    page: int = 0
    slot: int = 0
    amount: int = 0
    row: bytes = b""

    @property
    def inverse(self) -> Change:
        """Its undo: a change like any other, logged too, but never undone itself."""
        return self._replace(kind=UNDO_OF[self.kind], amount=-self.amount, row=b"")


def apply(page: bytearray | memoryview, change: Change, lsn: int) -> None:
    """The change made to a page, in a frame or in recovery; the page's LSN says so from then on."""
    _, number, _, rows = HEADER.unpack_from(page)
    if change.kind in (ADD, UNDO_ADD):
        at = BODY + change.slot * BALANCE_ROW
        BALANCE.pack_into(page, at, BALANCE.unpack_from(page, at)[0] + change.amount)
    elif change.kind == INSERT:
        at = BODY + change.slot * HISTORY.size
        page[at : at + HISTORY.size] = change.row
        rows = change.slot + 1
    elif change.kind == UNDO_INSERT:
        struct.pack_into("<Q", page, BODY + change.slot * HISTORY.size, 0)
    HEADER.pack_into(page, 0, 0, number, lsn, rows)


def unapply(page: bytearray, change: Change, lsn: int) -> None:
    """As if the change, the page's latest, had not been made."""
    if change.kind in (ADD, UNDO_ADD):
        apply(page, change._replace(amount=-change.amount), lsn)
    else:
        inserted = change.transaction if change.kind == UNDO_INSERT else 0
        struct.pack_into("<Q", page, BODY + change.slot * HISTORY.size, inserted)
        apply(page, Change(COMMIT), lsn)  # that changes nothing but the LSN


# -- The log -------------------------------------------------------------------------------------------------------


class Logged(NamedTuple):
    """A record that was read back. Its LSN is where it ends; `image`, if any, is the page before it, compressed."""

    start: int
    lsn: int
    change: Change
    image: bytes


class LogFile:
    """The log on disk: a header, then records. LSNs go on from log to log, so a stale record is never taken for one."""

    START: Final = struct.Struct("<8sQQI")  # magic, LSN where the first record starts, epoch (counts logs), checksum
    RECORD: Final = struct.Struct("<IIQQIHBxq")  # checksum, length, start, transaction, page, slot, kind, amount

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        start = os.pread(self.fd, self.START.size, 0)
        if len(start) < self.START.size or zlib.crc32(start[:-4]) != int.from_bytes(start[-4:], "little"):
            os.close(self.fd)
            raise DatabaseError(f"{path} is no log of this program")
        _, self.base, self.epoch, _ = self.START.unpack(start)

    @classmethod
    def renew(cls, path: str, base: int, epoch: int) -> None:
        """An empty log in place of the old one, which nobody needs any more: every page is on disk.
        (That is done at each start only; an engine for longer runs would recycle its log in segments.)"""
        start = cls.START.pack(MAGIC, base, epoch, 0)[:-4]
        with open(path + ".new", "wb") as file:
            file.write(start + zlib.crc32(start).to_bytes(4, "little"))
        replace(path + ".new", path)

    def place(self, lsn: int) -> int:
        return int(lsn - self.base) + self.START.size

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def write(self, start: int, change: Change, image: bytes) -> int:
        """The record is in the file from this position on; its LSN."""
        tail = change.row + image
        length = self.RECORD.size + len(tail)
        kind, transaction, page, slot, amount, _ = change
        body = self.RECORD.pack(0, length, start, transaction, page, slot, kind, amount)[4:] + tail
        if os.pwrite(self.fd, zlib.crc32(body).to_bytes(4, "little") + body, self.place(start)) != length:
            raise DatabaseError("the log could not be written: is the disk full?")
        return start + length

    def scan(self, start: int, end: int | None = None) -> Iterator[Logged]:
        """The records from one position up to another, or up to the first that is not whole."""
        at, size = self.place(start), self.size if end is None else self.place(end)
        data = memoryview(os.pread(self.fd, max(size - at, 0), at))
        at = 0
        while len(data) - at >= self.RECORD.size:
            checksum, length, said, transaction, page, slot, kind, amount = self.RECORD.unpack_from(data, at)
            record = data[at : at + length]
            whole = self.RECORD.size <= length == len(record) and said == start + at
            if not whole or zlib.crc32(record[4:]) != checksum:
                return
            at += length
            image = self.RECORD.size + (HISTORY.size if kind == INSERT else 0)
            change = Change(kind, transaction, page, slot, amount, bytes(record[self.RECORD.size : image]))
            yield Logged(said, start + at, change, bytes(record[image:]))

    def cut(self, lsn: int) -> int:
        """Nothing is behind this LSN any more; how many bytes there were."""
        torn = self.size - self.place(lsn)
        if torn:
            os.ftruncate(self.fd, self.place(lsn))
            os.fsync(self.fd)
        return torn

    def close(self) -> None:
        os.close(self.fd)


# -- Recovery ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Recovery:
    """What a start found in the log, and did."""

    records: int = 0  # in the log
    torn: int = 0  # bytes of the record that was not whole, and behind it
    redone: int = 0  # changes that the heap did not have
    pages: int = 0  # pages they were in
    mended: int = 0  # pages of the heap whose checksum was wrong
    image: int = 0  # pages in the image of the latest checkpoint
    losers: int = 0  # transactions begun and neither committed nor undone
    undone: int = 0  # changes of those
    seconds: float = 0.0


class Found(NamedTuple):
    """What the log says after a crash."""

    tail: int
    redo: int  # the latest checkpoint: older changes are in the heap, or in its image
    moment: int  # ... how far the log went at the moment of its image; 0: it has none
    checkpoint: int  # ... its own LSN
    losers: dict[int, list[Change]]  # by transaction: what is to be undone
    changes: dict[int, list[Logged]]  # by page: what is to be redone


def roll_forward(image: bytearray | None, records: Iterable[Logged]) -> tuple[bytearray, int]:
    """A page with all its logged changes, and how many of them it did not have: from what the heap has of it, which
    may be old, or torn (None)."""
    redone = 0
    for logged in records:
        if image is None and logged.image:
            image = bytearray(zlib.decompress(logged.image))
        if image is not None and lsn_of(image) < logged.lsn:
            apply(image, logged.change, logged.lsn)
            redone += 1
    if image is None:
        raise DatabaseError("a page of the heap is damaged, and the log has no copy of it")
    return image, redone


def analyse(file: LogFile, records: Iterable[Logged]) -> Found:
    tail, redo, moment, checkpoint = file.base, file.base, 0, file.base
    losers: dict[int, list[Change]] = {}
    changes: dict[int, list[Logged]] = {}
    for logged in records:
        kind, transaction = logged.change.kind, logged.change.transaction
        if kind in (ADD, INSERT):
            losers.setdefault(transaction, []).append(logged.change)
        elif kind in (UNDO_ADD, UNDO_INSERT):
            losers[transaction].pop()
        elif kind in (COMMIT, ABORT):
            losers.pop(transaction, None)
        elif kind == CHECKPOINT:
            redo, moment, checkpoint = logged.change.amount, transaction, logged.lsn
        if kind <= UNDO_INSERT:
            changes.setdefault(logged.change.page, []).append(logged)
        tail = logged.lsn
    for page, since in changes.items():
        changes[page] = [logged for logged in since if logged.start >= redo]
    return Found(tail, redo, moment, checkpoint, losers, changes)


def redo(path: str, heap: Heap, file: LogFile) -> tuple[Recovery, Found]:
    """The heap has every change that the log has, on disk. Dying in here is harmless: it can be done again."""
    records = list(file.scan(file.base))
    found, image = analyse(file, records), Checkpoint(path, file.epoch)
    if image.tail < found.moment:
        raise DatabaseError(f"{path}{IMAGE} is not the image that the latest checkpoint in the log speaks of")
    report = Recovery(records=len(records), torn=file.cut(found.tail), image=len(image.frames))
    for page in sorted({page for page, changes in found.changes.items() if changes} | image.frames.keys()):
        on_disk = heap.read(page)
        before = None if on_disk is None else lsn_of(on_disk)
        content, redone = roll_forward(image.newer(page, on_disk), found.changes.get(page, ()))
        if before is None or lsn_of(content) > before:
            heap.write(page, content)
            report.redone += redone
            report.pages += 1
            report.mended += on_disk is None
    heap.sync()
    return report, found


# -- The audit -----------------------------------------------------------------------------------------------------


def audit(path: str, acknowledged: Iterable[bytes]) -> dict[str, Any]:
    """The books, from the heap file alone. `acknowledged`: history rows that must be in it, exactly so."""
    heap = Heap(path)
    pages = [heap.read(page) for page in range(heap.pages)]
    heap.close()
    found, history = books(heap.layout, pages)
    wanted = {int.from_bytes(row[:8], "little"): row for row in acknowledged}
    since = min(wanted, default=0) >> 48  # the first epoch that acknowledgements tell of
    return {
        **found,
        "acknowledged": len(wanted),
        "missing": sum(history.get(transaction) != row for transaction, row in wanted.items()),
        "unacknowledged": sum(key >> 48 >= since and key not in wanted for key in history),
    }


def books(layout: Layout, pages: Sequence[bytearray | None]) -> tuple[dict[str, Any], dict[int, bytes]]:
    """What the pages (None: damaged) say of balances and of history; and the rows of this, by transaction."""
    doubles = 0
    balances: dict[str, list[int]] = {}
    for name, table in layout.tables.items():
        balances[name] = []
        for page in range(table.first, table.end):
            image = pages[page]
            rows = range(min(table.per_page, table.rows - len(balances[name])))
            places = (BODY + row * BALANCE_ROW for row in rows)
            balances[name] += [BALANCE.unpack_from(image or fresh_page(page), at)[0] for at in places]
    history: dict[int, bytes] = {}
    for image in pages[layout.history :]:
        rows = range(HEADER.unpack_from(image)[3] if image else 0)
        for row in (bytes(memoryview(image or b"")[BODY + at * HISTORY.size :][: HISTORY.size]) for at in rows):
            transaction = int.from_bytes(row[:8], "little")
            if transaction:
                doubles += transaction in history
                history[transaction] = row
    expected = {name: [0] * len(found) for name, found in balances.items()}
    for _, account, teller, branch, amount, _ in map(HISTORY.unpack, history.values()):
        for name, number in (("accounts", account), ("tellers", teller), ("branches", branch)):
            expected[name][number] += amount
    found = {
        **{name: sum(found) for name, found in balances.items()},
        "history": sum(HISTORY.unpack(row)[4] for row in history.values()),
        "pages": len(pages),
        "transactions": len(history),
        "wrong_rows": sum(a != b for name in balances for a, b in zip(balances[name], expected[name], strict=True)),
        "damaged_pages": sum(page is None for page in pages),
        "doubles": doubles,
    }
    return found, history


def audit_checkpoint(path: str) -> dict[str, Any]:
    """The books as they were at the moment of the latest checkpoint, while others may go on with the database.

    Its pages must be of that moment exactly, by their LSNs and the log. What was not in the pool then comes from the
    heap; that may be newer, and is taken back to the moment. So are transactions that were under way.
    """
    heap, file = Heap(path), LogFile(path + ".log")
    image = Checkpoint(path, file.epoch)
    end = max([heap.pages - 1, *image.frames]) + 1
    pages = [image.newer(page, None) or _settled(heap, page) for page in range(end)]
    records = list(file.scan(file.base))  # not before the heap was read: the log comes first
    before = [logged for logged in records if logged.lsn <= image.tail]
    latest = {logged.change.page: logged.lsn for logged in before if logged.change.kind <= UNDO_INSERT}
    astray = sum(
        lsn_of(content) > image.tail or lsn_of(content) < latest.get(page, 0) for page, content in image.frames.items()
    )
    for logged in reversed(records):
        at = logged.change.page
        if logged.change.kind <= UNDO_INSERT and at < end and image.tail < logged.lsn <= lsn_of(pages[at]):
            unapply(pages[at], logged.change, logged.start)
    for changes in analyse(file, before).losers.values():
        for change in reversed(changes):
            unapply(pages[change.page], change, lsn_of(pages[change.page]))
    heap.close()
    file.close()
    behind = sum(lsn_of(pages[page]) < lsn for page, lsn in latest.items())
    return {**books(heap.layout, pages)[0], "image": len(image.frames), "astray": astray + behind}


def _settled(heap: Heap, page: int) -> bytearray:
    """The page in the heap; while somebody is writing it there, its checksum may be wrong."""
    for _ in range(1000):
        content = heap.read(page)
        if content is not None:
            return content
    raise DatabaseError(f"page {page} of the heap is damaged")
