"""A small storage engine whose buffer pool is a pyshare region shared by many processes.

Lives here: latches, the log's shared end, the region, the pool of frames, transactions, checkpoints.
Not here: the files (database_files.py); processes, accidents and the terminal (database_buffer.py).

The region is control pages (READ_WRITE for everyone: buffer table, notes, words), then frames (READ for everyone).
A latch is one of the region's locks. Who changes a page holds its frame's latch, and leases the frame for the store.
Invariants
 1. A frame is stored to only through `Pool.opened`, while its latch is ours and the latch's note says what is done.
 2. The log comes first: a change is in the log before it is in a frame, and synced before its page goes to the heap.
 3. Whoever dies, at any instruction, leaves a latch that is abandoned, its note beside it, and a lease that is
    abandoned if it was in the middle of a store; who has the latch next makes the frame good again.
 4. Latches are taken in the order of their numbers: load, frame, log, flush. A process has one frame at a time.
Undo is logical, by the opposite amount. Additions commute, so a frame is latched for one change only and not until the
commit; other transactions may have changed the row in between. The price: nobody may act on a balance that it reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from database_files import (
    ABORT,
    ADD,
    CHECKPOINT,
    COMMIT,
    EPOCH,
    FRAMES_AT,
    HEADER,
    HISTORY_PER_PAGE,
    IMAGE,
    INSERT,
    NOTE_WORDS,
    NOTES,
    NOTES_AT,
    PAGE,
    PAGE_OF_AT,
    TAIL,
    WORDS,
    Change,
    Checkpoint,
    DatabaseError,
    Heap,
    LogFile,
    Table,
    apply,
    lsn_of,
    noted_frames,
    redo,
    roll_forward,
)

import pyshare

PATIENCE: Final = 10.0  # seconds: nobody waits longer for a latch, a lease or a frame
HISTORY_ROOM: Final = 1 << 16  # pages by which the history may grow while a server runs
SERVER_BYTE: Final = (1 << 40) - 1  # far behind the end of the heap file: a lock on this byte makes the one server

# -- Latches -------------------------------------------------------------------------------------------------------

GROW_LATCH, LOAD_LATCHES, FRAME_LATCHES, LOG_LATCH, FLUSH_LATCH = 0, 1, 64, 1022, 1023  # from this number on
CHANGING, LOADING = 1, 2  # what a note says: the frame's content changes; the frame gets another page


class Left(NamedTuple):
    """What a dead holder has left in its latch's note."""

    mode: int
    slot: int
    incarnation: int
    frame: int
    transaction: int


class Latches:
    """Mutual exclusion that survives the death of its holder: the region's locks, each with a note.

    The lock excludes, and says to its next holder if the last one died inside (`abandoned`). The note says what that
    one was doing: it is written before, and cleared after. It stays until the repair is done, whoever dies in that.
    Frames share latches, where there are more of them; that costs waits, and is no danger, as nobody has two frames.
    """

    def __init__(self, region: pyshare.Region, notes: memoryview) -> None:
        self.region, self.notes = region, notes
        self.me = 0
        self.transaction = 0
        self.waits: list[int] = []  # ns that each latch took

    def become(self, slot: int, incarnation: int) -> None:
        self.me = incarnation << 16 | slot << 4
        self.waits = []

    def held(self, latch: int) -> pyshare.Lock:
        """The latch is ours, until the lock is released. For a latch that guards words only it does not matter that
        the last holder may have died inside: each word is whole."""
        begin = time.perf_counter_ns()
        lock = self.region.lock(latch)
        self.waits.append(time.perf_counter_ns() - begin)
        return lock

    def note(self, latch: int, mode: int, frame: int) -> None:
        at = latch * NOTE_WORDS
        self.notes[at + 1] = frame
        self.notes[at + 2] = self.transaction
        self.notes[at] = self.me | mode  # the last one: the note is valid

    def clear(self, latch: int) -> None:
        self.notes[latch * NOTE_WORDS] = 0

    def left(self, latch: int) -> Left | None:
        """What the last holder was doing when it died; None if nothing came of that."""
        word, frame, transaction, _ = self.notes[latch * NOTE_WORDS : (latch + 1) * NOTE_WORDS]
        return Left(word & 15, word >> 4 & 0xFFF, word >> 16, frame, transaction) if word else None

    def left_by(self, incarnation: int) -> list[Left]:
        latches = [at for at, word in enumerate(self.notes[::NOTE_WORDS].tolist()) if word >> 16 == incarnation]
        return [left for latch in latches if (left := self.left(latch))]


# -- The region ----------------------------------------------------------------------------------------------------

# Words of the engine. TAIL, FLUSHED: how far the log goes, and how far it is on disk; HORIZON: the latest checkpoint
# begun, REDO: the latest one completed; HAND: of the clock; NEXT_PAGE: of the history. (Others: database_files.)
FLUSHED, HORIZON, REDO, HAND, NEXT_PAGE, STOPPING = range(TAIL + 1, TAIL + 7)
# Words of a process, by slot: its transaction, and where in the log to look for it; its history page; an order to it;
# what it has counted.
TRANSACTION, SINCE, SEQUENCE, HISTORY_PAGE, ORDER, LOADS, EVICTIONS, WRITES, SYNCS = range(9)
SLOTS, SLOT_WORDS = 256, 16


class Control:
    """The region and its control pages. Those stay READ_WRITE: a stray store into them is not caught. Their words are
    8 bytes, which a process reads or writes in one instruction: nobody sees half of one, nobody leaves half of one."""

    def __init__(self, name: str, frames: int, capacity: int, prot: pyshare.Prot) -> None:
        sizes = (WORDS, SLOTS * SLOT_WORDS, (FLUSH_LATCH + 1) * NOTE_WORDS, capacity, frames, frames, frames)
        self.length = -(-8 * sum(sizes) // PAGE) * PAGE
        self.frames = frames
        # replace: after a crash the last holder of the name may still be on its way out
        self.region = pyshare.create(name, size=self.length + frames * PAGE, prot=prot, replace=True)
        self.region.mprotect(0, self.length, pyshare.READ_WRITE)
        self.data = self.region.buf[self.length :]
        words = self.region.buf[: self.length].cast("Q")
        areas, at = [], 0
        for size in sizes:
            areas.append(words[at : at + size])
            at += size
        self._views = [self.data, words, *areas]
        # The buffer table (page -> frame + 1, or 0); by frame: its page + 1; since which LSN it is dirty; its use bit.
        self.words, self.slots, self.notes, self.table, self.page_of, self.dirty, self.used = areas
        self.words[NOTES_AT], self.words[NOTES], self.words[FRAMES_AT] = 8 * sum(sizes[:2]), sizes[2], self.length
        self.words[PAGE_OF_AT] = 8 * sum(sizes[:4])

    def slot(self, number: int) -> memoryview:
        return self.slots[number * SLOT_WORDS : (number + 1) * SLOT_WORDS]

    def close(self) -> None:
        for view in self._views:
            view.release()
        self.region.close()


class Log:
    """The log as all processes share it: a file, and in the region how far it goes."""

    def __init__(self, file: LogFile, words: memoryview, latches: Latches) -> None:
        self.file, self.words, self.latches = file, words, latches
        self.count = memoryview(bytearray(8 * SLOT_WORDS)).cast("Q")

    def append(self, change: Change, page: memoryview | None = None) -> int:
        """The change is in the log, not yet on disk; its LSN. The tail moves after the record is written: who dies in
        between has written nothing, as the next record goes to the same place. And since each call writes one record,
        what may be left of a longer dead one does not begin where a record could."""
        while True:
            horizon = self.words[HORIZON]
            image = zlib.compress(page, 1) if page and lsn_of(page) <= horizon else b""
            with self.latches.held(LOG_LATCH):
                if self.words[HORIZON] == horizon:  # else a checkpoint has begun: the whole page may be needed now
                    lsn = self.file.write(self.words[TAIL], change, image)
                    self.words[TAIL] = lsn
                    return lsn

    def flush(self, lsn: int) -> None:
        """The log is on disk up to this LSN. Group commit: who waited finds that the one before synced for both."""
        if self.words[FLUSHED] >= lsn:
            return
        with self.latches.held(FLUSH_LATCH):
            if self.words[FLUSHED] < lsn:
                tail = self.words[TAIL]
                os.fdatasync(self.file.fd)
                self.words[FLUSHED] = tail
                self.count[SYNCS] += 1


# -- The pool ------------------------------------------------------------------------------------------------------


class Page(Protocol):
    """A frame that may be stored to, until it is released. A pyshare.Lease is one."""

    @property
    def view(self) -> memoryview: ...

    @property
    def abandoned(self) -> bool: ...

    def release(self) -> None: ...


class OpenForAll:
    """The other way: everybody may store to the frame, by region.mprotect (`close`: until the release) or always."""

    abandoned = True  # nobody can tell if the last one died in the middle of a store, so expect the worst

    def __init__(self, region: pyshare.Region, offset: int, close: bool) -> None:
        self.region, self.offset, self.close = region, offset, close
        if close:
            region.mprotect(offset, PAGE, pyshare.READ_WRITE)
        self.view = region.buf[offset : offset + PAGE]

    def release(self) -> None:
        self.view.release()
        if self.close:
            self.region.mprotect(self.offset, PAGE, pyshare.READ)


PROTECTIONS: Final = ("lease", "window", "mprotect", "none")


class Pool:
    """The frames of the region, and the pages in them."""

    def __init__(self, control: Control, heap: Heap, log: Log, latches: Latches, protect: str) -> None:
        self.control, self.heap, self.log, self.latches = control, heap, log, latches
        self.protect = protect
        self.table, self.page_of, self.dirty, self.used = control.table, control.page_of, control.dirty, control.used
        self.count = log.count
        self.stripes = min(control.frames, LOG_LATCH - FRAME_LATCHES)
        self.lock: pyshare.Lock | None = None  # the latch of the frame that is ours
        self.page: Page | None = None  # that frame, while it may be stored to
        self.stores: list[int] = []  # ns that each page was open
        self.on_repair: Callable[[int, Left, bool], None] | None = None

    def become(self, count: memoryview) -> None:
        self.count, self.stores = count, []

    # A frame is two pages of memory.

    def view(self, frame: int) -> memoryview:
        return self.control.data[frame * PAGE : (frame + 1) * PAGE]

    def open(self, frame: int) -> Page:
        region, offset = self.control.region, self.control.length + frame * PAGE
        if self.protect == "lease":
            return region.lease(offset, PAGE)
        if self.protect == "window":
            return region.lease(offset, PAGE, window=True)
        return OpenForAll(region, offset, close=self.protect == "mprotect")

    @contextlib.contextmanager
    def opened(self, frame: int) -> Iterator[Page]:
        """The frame, for a store. An exception in here ends the process with the page open, as a kill would."""
        begin = time.perf_counter_ns()
        self.page = self.open(frame)
        yield self.page
        self.page.release()
        self.stores.append(time.perf_counter_ns() - begin)

    # Fixing: a page is in a frame, and the frame's latch is ours.

    def fix(self, page: int) -> int:
        while True:
            place = self.table[page]
            frame = self._find(page, place - 1) if place else self._load(page)
            if frame is not None:
                self.used[frame] = 1
                return frame

    def unfix(self) -> None:
        assert self.lock
        self.lock.release()

    @contextlib.contextmanager
    def fixed(self, page: int) -> Iterator[int]:
        """As `fix`. An exception in here ends the process with the latch held, as a kill would."""
        yield self.fix(page)
        self.unfix()

    def latch_of(self, frame: int) -> int:
        return FRAME_LATCHES + frame % self.stripes

    def latch(self, frame: int) -> None:
        """The frame is ours, and good, though the last holder of its latch may have died inside."""
        latch = self.latch_of(frame)
        self._latched(latch, self.latches.held(latch))

    def try_latch(self, frame: int) -> bool:
        latch = self.latch_of(frame)
        try:
            lock = self.control.region.lock(latch, timeout=0)
        except pyshare.PropagationTimeout:
            return False
        self._latched(latch, lock)
        return True

    def _latched(self, latch: int, lock: pyshare.Lock) -> None:
        self.lock = lock
        if lock.abandoned and (left := self.latches.left(latch)):
            self._repair(left)
            self.latches.clear(latch)

    def _find(self, page: int, frame: int) -> int | None:
        """The frame, latched, if it has the page; None if that was evicted while we waited."""
        self.latch(frame)
        if self.page_of[frame] == page + 1:
            return frame
        self.unfix()
        return None

    def _load(self, page: int) -> int | None:
        """A frame, latched, into which the page was read; None if somebody else did that meanwhile."""
        with self.latches.held(LOAD_LATCHES + page % (FRAME_LATCHES - LOAD_LATCHES)):
            if self.table[page]:
                return None
            frame = self._victim()
            self.latches.note(self.latch_of(frame), LOADING, frame)
            if self.page_of[frame]:
                self.table[self.page_of[frame] - 1] = 0
                self.count[EVICTIONS] += 1
            self.page_of[frame] = page + 1
            image = self.heap.read(page)
            if image is None:
                raise DatabaseError(f"page {page} of the heap has a wrong checksum")
            with self.opened(frame) as open_page:
                open_page.view[:] = image
            self.table[page] = frame + 1
            self.latches.clear(self.latch_of(frame))
            self.count[LOADS] += 1
        return frame

    def _victim(self) -> int:
        """A latched frame whose page, if any, is clean: the clock's hand spares those used since it last came by."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            frame = self.control.words[HAND] % self.control.frames
            self.control.words[HAND] = frame + 1  # two hands at once may skip a frame: it is only a hint
            if self.used[frame]:
                self.used[frame] = 0
            elif self.try_latch(frame):
                self.write_back(frame)
                return frame
        raise DatabaseError("no frame is free: the pool is too small for so many workers")

    def write_back(self, frame: int) -> None:
        """The heap file (not yet the disk) has the page as it is in this latched frame; the log has it on disk."""
        if self.dirty[frame]:
            image = bytearray(self.view(frame))
            self.log.flush(lsn_of(image))
            self.heap.write(self.page_of[frame] - 1, image)
            self.dirty[frame] = 0
            self.count[WRITES] += 1

    # Changing; in two halves, because an accident is staged between them.

    def change(self, frame: int, change: Change) -> None:
        lsn = self.log_change(frame, change)
        with self.opened(frame) as page:
            apply(page.view, change, lsn)
        self.latches.clear(self.latch_of(frame))

    def log_change(self, frame: int, change: Change) -> int:
        # Both before the record exists: who dies from here on leaves a frame that must be made again from the log,
        # and a checkpoint that begins from here on finds it dirty.
        self.latches.note(self.latch_of(frame), CHANGING, frame)
        if not self.dirty[frame]:
            self.dirty[frame] = self.control.words[TAIL]
        with self.view(frame) as page:
            return self.log.append(change, page)

    def _repair(self, left: Left) -> None:
        """The frame is what the heap and the log say. Dying in here is harmless: the next one does it."""
        frame, page = left.frame, self.page_of[left.frame] - 1
        with self.opened(frame) as open_page:
            torn = open_page.abandoned  # the last one died in the middle of a store
            if left.mode == LOADING:
                if page >= 0 and self.table[page] == frame + 1:
                    self.table[page] = 0
                self.page_of[frame] = 0
            else:
                words = self.control.words
                logged = self.log.file.scan(words[REDO], words[TAIL])
                image = self._latest(page) if torn else bytearray(open_page.view)
                image, _ = roll_forward(image, (each for each in logged if each.change.page == page))
                open_page.view[:] = image
        if self.on_repair:
            self.on_repair(page, left, torn)

    def _latest(self, page: int) -> bytearray | None:
        """The page as it is on disk: nothing behind REDO is missing."""
        return Checkpoint(self.heap.path, self.log.file.epoch).newer(page, self.heap.read(page))


# -- The engine ----------------------------------------------------------------------------------------------------


class Engine:
    """A database that is open. The server makes it; its forked workers go on with their copies of it."""

    def __init__(self, path: str, name: str, frames: int, protect: str = "lease") -> None:
        """Opens the database: what was committed is there, what was not is undone, and a new log begins."""
        begin = time.perf_counter()
        self.heap = Heap(path)
        self.layout = self.heap.layout
        try:
            fcntl.lockf(self.heap.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, SERVER_BYTE)
        except BlockingIOError:
            raise DatabaseError(f"{path} is in use by another server") from None
        file = LogFile(path + ".log")
        self.recovered, found = redo(path, self.heap, file)
        next_page = max(self.heap.pages, self.layout.history)
        prot = pyshare.READ_WRITE if protect == "none" else pyshare.READ
        self.control = Control(name, frames, next_page + HISTORY_ROOM, prot)
        self.words = self.control.words
        self.words[TAIL] = self.words[FLUSHED] = found.tail
        self.words[REDO] = self.words[HORIZON] = found.redo
        self.words[EPOCH] = file.epoch
        self.words[NEXT_PAGE] = next_page
        self.latches = Latches(self.control.region, self.control.notes)
        self.log = Log(file, self.words, self.latches)
        self.pool = Pool(self.control, self.heap, self.log, self.latches, protect)
        self.become(0, 1)
        for transaction, changes in found.losers.items():
            self.undo(transaction, changes)
            self.recovered.losers += 1
            self.recovered.undone += len(changes)
        self.write_all()
        self._renew_log()
        self.recovered.seconds = time.perf_counter() - begin

    def _renew_log(self) -> None:
        old, tail = self.log.file, self.words[TAIL]
        LogFile.renew(old.path, tail, old.epoch + 1)
        old.close()
        self.log.file = LogFile(old.path)
        self.words[FLUSHED] = self.words[REDO] = self.words[HORIZON] = tail
        self.words[EPOCH] = self.log.file.epoch
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.heap.path + IMAGE)

    def become(self, slot: int, incarnation: int) -> None:
        """This process is the one of this slot from now on. No incarnation comes twice while a server runs."""
        self.number, self.incarnation = slot, incarnation
        self.slot = self.log.count = self.control.slot(slot)
        self.pool.become(self.slot)
        self.latches.become(slot, incarnation)
        pyshare.set_default_timeout(PATIENCE)

    # Transactions

    def begin(self) -> int:
        self.slot[SINCE] = self.words[TAIL]
        self.slot[SEQUENCE] += 1
        transaction = self.log.file.epoch << 48 | self.incarnation << 32 | self.slot[SEQUENCE]
        self.slot[TRANSACTION] = self.latches.transaction = transaction
        return int(transaction)

    def add(self, transaction: int, table: Table, row: int, amount: int) -> None:
        page, slot = table.place(row)
        with self.pool.fixed(page) as frame:
            self.pool.change(frame, Change(ADD, transaction, page, slot, amount))

    def insert(self, transaction: int, row: bytes) -> None:
        """A row at the end of this slot's own page of the history."""
        while True:
            page = self.slot[HISTORY_PAGE] or self._new_page()
            with self.pool.fixed(page) as frame, self.pool.view(frame) as view:
                slot = HEADER.unpack_from(view)[3]
                if slot < HISTORY_PER_PAGE:
                    self.pool.change(frame, Change(INSERT, transaction, page, slot, 0, row))
                    return
            self.slot[HISTORY_PAGE] = 0

    def _new_page(self) -> int:
        with self.latches.held(GROW_LATCH):
            page = self.words[NEXT_PAGE]
            if page == len(self.control.table):
                raise DatabaseError("the history has no more room: restart the server")
            self.words[NEXT_PAGE] = page + 1
        self.slot[HISTORY_PAGE] = page
        return page

    def commit(self, transaction: int) -> None:
        """The transaction is durable."""
        self.log.flush(self.log.append(Change(COMMIT, transaction)))
        self.slot[TRANSACTION] = self.latches.transaction = 0

    def undo(self, transaction: int, changes: list[Change]) -> None:
        """Each change is undone by its inverse, the last one first; others' changes of the same rows stay."""
        for change in reversed(changes):
            with self.pool.fixed(change.page) as frame:
                self.pool.change(frame, change.inverse)
        self.log.flush(self.log.append(Change(ABORT, transaction)))

    def bury(self, slot: int, incarnation: int) -> int | None:
        """What a dead process left is right, and its transaction undone: so many changes; None if it was in none."""
        for left in self.latches.left_by(incarnation):
            self.pool.latch(left.frame)
            self.pool.unfix()
        words = self.control.slot(slot)
        transaction = words[TRANSACTION]
        if not transaction:
            return None
        logged = self.log.file.scan(words[SINCE], self.words[TAIL])
        changes = [each.change for each in logged if each.change.transaction == transaction]
        committed = any(change.kind == COMMIT for change in changes)
        if not committed:
            self.undo(transaction, changes)
        words[TRANSACTION] = 0
        return None if committed else len(changes)

    # Checkpoints: redo begins there from now on. Others go on meanwhile.

    def checkpoint(self, progress: Callable[[int, int], object] = lambda _done, _total: None) -> None:
        """All that was changed before is on disk: in an image of the pool, or in the heap. Nobody waited for that
        longer than the snapshot took, but for a frame that was about to change at its moment."""
        horizon = self._begin_checkpoint()
        with self.control.region.snapshot(timeout=PATIENCE) as snapshot:
            words = memoryview(snapshot.read(0, self.control.length)).cast("Q")
            snapshot.save(self.heap.path + IMAGE, progress=progress)
        tail, notes = words[TAIL], words[words[NOTES_AT] // 8 :][: words[NOTES]]
        self._end_checkpoint(noted_frames(notes), horizon, tail)

    def write_all(self) -> None:
        """All that was changed before is in the heap."""
        horizon = self._begin_checkpoint()
        dirty = [frame for frame, since in enumerate(self.control.dirty) if 0 < since < horizon]
        self._end_checkpoint(dirty, horizon)

    def _begin_checkpoint(self) -> int:
        with self.latches.held(LOG_LATCH):
            horizon: int = self.words[TAIL]
            self.words[HORIZON] = horizon
        return horizon

    def _end_checkpoint(self, frames: list[int], horizon: int, image: int = 0) -> None:
        """What these frames have goes to the heap, and it is in the log that redo begins at the horizon. Up to where
        the image has the log, if there is one."""
        for frame in frames:
            self.pool.latch(frame)
            self.pool.write_back(frame)
            self.pool.unfix()
        self.heap.sync()
        self.log.flush(self.log.append(Change(CHECKPOINT, image, amount=horizon)))
        self.words[REDO] = horizon

    def close(self) -> None:
        """The heap has everything, and the region is gone. (The last one out: the workers have ended.)"""
        self.write_all()
        self.slot = self.pool.count = self.log.count = memoryview(b"")
        self.control.close()
        self.log.file.close()
        self.heap.close()
