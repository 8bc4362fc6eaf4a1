"""A small storage engine whose buffer pool is a pyshare region shared by many processes.

Lives here: latches, the log's shared end, the region, the pool of frames, transactions, checkpoints.
Not here: the files (database_files.py); processes, accidents and the terminal (database_buffer.py).

The region is control pages (READ_WRITE for everyone: latches, buffer table, words), then frames (READ for everyone).
Invariants
 1. A frame is open (READ_WRITE) only while its latch says CHANGING or LOADING.
 2. The log comes first: a change is in the log before it is in a frame, and synced before its page goes to the heap.
 3. Whoever dies, at any instruction, leaves latches that the kernel has released and whose words say how far it was;
    who takes such a frame next makes it good again from heap and log.
 4. Order of latches: load, frame, log, flush. A process has one frame at a time.
Undo is logical, by the opposite amount. Additions commute, so a frame is latched for one change only and not until the
commit; other transactions may have changed the row in between. The price: nobody may act on a balance that it reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from database_files import (
    ABORT,
    ADD,
    CHECKPOINT,
    COMMIT,
    HEADER,
    HISTORY_PER_PAGE,
    INSERT,
    PAGE,
    Change,
    DatabaseError,
    Heap,
    LogFile,
    Table,
    apply,
    lsn_of,
    redo,
    roll_forward,
)

import pyshare

PATIENCE: Final = 10.0  # seconds: nobody waits longer for a latch or a frame
HISTORY_ROOM: Final = 1 << 16  # pages by which the history may grow while a server runs

# -- Latches -------------------------------------------------------------------------------------------------------

HELD, CHANGING, LOADING = 1, 2, 3  # how far the holder is: frame as it was; its content changing; its page changing
LOG_LATCH, FLUSH_LATCH, GROW_LATCH, LOAD_LATCHES, FRAME_LATCHES = 0, 1, 2, 16, 80
SERVER_BYTE: Final = (1 << 40) - 1  # far behind the end of the heap file: a lock on this byte makes the one server,
LATCH_BYTES: Final = 1 << 40  # and from here on a byte for each latch


class LatchTimeout(DatabaseError):
    """A latch was held for longer than PATIENCE."""


class Left(NamedTuple):
    """What a dead holder left in a latch."""

    slot: int
    incarnation: int
    mode: int
    transaction: int


def _on_alarm(*_: object) -> None:
    raise LatchTimeout(f"a latch was not to be had within {PATIENCE:.0f} s")


class Latches:
    """Mutual exclusion that survives the death of its holder, in two halves.

    *Exclusion* is a POSIX record lock (fcntl) on one byte of the heap file. Python has no compare-and-swap on shared
    memory, and a word there would stay taken for ever; the kernel releases the locks of a dead process, after its last
    store, wakes who waits, and gives none to a forked child.
    *State* is two words in the region: the holder (slot and incarnation) with how far it is, and its transaction. The
    holder clears the first before it unlocks. So whoever gets the lock and finds a word there knows that the last
    holder died inside, who that was, and what it was doing; that stays until the repair is done, whoever else dies.
    """

    def __init__(self, fd: int, words: memoryview) -> None:
        self.fd, self.words = fd, words
        self.me = 0
        self.transaction = 0

    def become(self, slot: int, incarnation: int) -> None:
        self.me = incarnation << 16 | slot << 4
        signal.signal(signal.SIGALRM, _on_alarm)

    def acquire(self, latch: int, wait: bool = True) -> bool:
        """Ours. False: another has it, and we were not to wait."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LATCH_BYTES + latch)
        except BlockingIOError:
            if not wait:
                return False
            self._wait(latch)
        if not self.words[2 * latch]:
            self.enter(latch)
        return True

    def _wait(self, latch: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, LATCH_BYTES + latch)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def enter(self, latch: int) -> None:
        self.words[2 * latch + 1] = self.transaction
        self.words[2 * latch] = self.me | HELD

    def left(self, latch: int) -> Left | None:
        """What the last holder left, if it died inside. The word stays; `enter` makes the latch wholly ours."""
        word = self.words[2 * latch]
        if word & ~15 == self.me:
            return None
        return Left(word >> 4 & 0xFFF, word >> 16, word & 15, self.words[2 * latch + 1])

    def mark(self, latch: int, mode: int) -> None:
        self.words[2 * latch] = self.me | mode

    def release(self, latch: int) -> None:
        self.words[2 * latch] = 0
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, LATCH_BYTES + latch)

    @contextlib.contextmanager
    def held(self, latch: int) -> Iterator[None]:
        """For latches that guard words only: whatever the last holder was at, each word is whole."""
        self.acquire(latch)
        yield  # an exception in here ends the process, as a kill would
        self.release(latch)

    def left_by(self, incarnation: int) -> list[int]:
        return [at for at, word in enumerate(self.words[::2].tolist()) if word >> 16 == incarnation]


# -- The region ----------------------------------------------------------------------------------------------------

# Words of the engine. TAIL, FLUSHED: how far the log goes, and how far it is on disk; HORIZON: the latest checkpoint
# begun, REDO: the latest one completed; HAND: of the clock; NEXT_PAGE: of the history.
TAIL, FLUSHED, HORIZON, REDO, HAND, NEXT_PAGE, STOPPING = range(7)
# Words of a process, by slot: its transaction, and where in the log to look for it; its history page; an order to it;
# what it has counted.
TRANSACTION, SINCE, SEQUENCE, HISTORY_PAGE, ORDER, LOADS, EVICTIONS, WRITES, SYNCS = range(9)
SLOTS, SLOT_WORDS = 256, 16


class Control:
    """The region and its control pages. Those stay READ_WRITE: a stray store into them is not caught. Their words are
    8 bytes, which a process reads or writes in one instruction: nobody sees half of one, nobody leaves half of one."""

    def __init__(self, name: str, frames: int, capacity: int) -> None:
        sizes = (16, SLOTS * SLOT_WORDS, 2 * (FRAME_LATCHES + frames), capacity, frames, frames, frames)
        self.length = -(-8 * sum(sizes) // PAGE) * PAGE
        self.frames = frames
        # replace: after a crash the last holder of the name may still be on its way out
        self.region = pyshare.create(name, size=self.length + frames * PAGE, prot=pyshare.READ, replace=True)
        self.region.mprotect(0, self.length, pyshare.READ_WRITE)
        self.data = self.region.buf[self.length :]
        words = self.region.buf[: self.length].cast("Q")
        areas, at = [], 0
        for size in sizes:
            areas.append(words[at : at + size])
            at += size
        self._views = [self.data, words, *areas]
        # The buffer table (page -> frame + 1, or 0); by frame: its page + 1; since which LSN it is dirty; its use bit.
        self.words, self.slots, self.latches, self.table, self.page_of, self.dirty, self.used = areas

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


class Pool:
    """The frames of the region, and the pages in them."""

    def __init__(self, control: Control, heap: Heap, log: Log, latches: Latches) -> None:
        self.control, self.heap, self.log, self.latches = control, heap, log, latches
        self.table, self.page_of, self.dirty, self.used = control.table, control.page_of, control.dirty, control.used
        self.count = log.count
        self.took: list[int] = []  # ns that each change of protection took, until everybody had it
        self.on_repair: Callable[[int, Left], None] | None = None

    # A frame is two pages of memory.

    def protect(self, frame: int, prot: pyshare.Prot) -> None:
        begin = time.perf_counter_ns()
        self.control.region.mprotect(self.control.length + frame * PAGE, PAGE, prot)
        self.took.append(time.perf_counter_ns() - begin)

    def view(self, frame: int) -> memoryview:
        return self.control.data[frame * PAGE : (frame + 1) * PAGE]

    @contextlib.contextmanager
    def opened(self, frame: int) -> Iterator[memoryview]:
        """The page, for a store. It is open to everyone then, but who keeps to the latches leaves it to us."""
        self.protect(frame, pyshare.READ_WRITE)
        with self.view(frame) as page:
            yield page
        self.protect(frame, pyshare.READ)

    # Fixing: a page is in a frame, and the frame's latch is ours.

    def fix(self, page: int) -> int:
        while True:
            place = self.table[page]
            frame = self._find(page, place - 1) if place else self._load(page)
            if frame is not None:
                self.used[frame] = 1
                return frame

    def unfix(self, frame: int) -> None:
        self.latches.release(FRAME_LATCHES + frame)

    @contextlib.contextmanager
    def fixed(self, page: int) -> Iterator[int]:
        frame = self.fix(page)
        yield frame
        self.unfix(frame)

    def latch(self, frame: int, wait: bool = True) -> bool:
        """The frame is ours, and good, though its last holder may have died inside."""
        latch = FRAME_LATCHES + frame
        if not self.latches.acquire(latch, wait):
            return False
        left = self.latches.left(latch)
        if left:
            self._repair(frame, left)
            self.latches.enter(latch)
        return True

    def _find(self, page: int, frame: int) -> int | None:
        """The frame, latched, if it has the page; None if that was evicted while we waited."""
        self.latch(frame)
        if self.page_of[frame] == page + 1:
            return frame
        self.unfix(frame)
        return None

    def _load(self, page: int) -> int | None:
        """A frame, latched, into which the page was read; None if somebody else did that meanwhile."""
        with self.latches.held(LOAD_LATCHES + page % (FRAME_LATCHES - LOAD_LATCHES)):
            if self.table[page]:
                return None
            frame = self._victim()
            self.latches.mark(FRAME_LATCHES + frame, LOADING)
            if self.page_of[frame]:
                self.table[self.page_of[frame] - 1] = 0
                self.count[EVICTIONS] += 1
            self.page_of[frame] = page + 1
            image = self.heap.read(page)
            if image is None:
                raise DatabaseError(f"page {page} of the heap has a wrong checksum")
            with self.opened(frame) as view:
                view[:] = image
            self.table[page] = frame + 1
            self.latches.mark(FRAME_LATCHES + frame, HELD)
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
            elif self.latch(frame, wait=False):
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
            apply(page, change, lsn)
        self.latches.mark(FRAME_LATCHES + frame, HELD)

    def log_change(self, frame: int, change: Change) -> int:
        # Both before the record exists: who dies from here on leaves a frame that must be made again from the log,
        # and a checkpoint that begins from here on finds it dirty.
        self.latches.mark(FRAME_LATCHES + frame, CHANGING)
        if not self.dirty[frame]:
            self.dirty[frame] = self.control.words[TAIL]
        with self.view(frame) as page:
            return self.log.append(change, page)

    def _repair(self, frame: int, left: Left) -> None:
        """The frame is what the heap and the log say, and closed. Dying in here is harmless: the next one does it."""
        page = self.page_of[frame] - 1
        if left.mode == LOADING:
            if page >= 0 and self.table[page] == frame + 1:
                self.table[page] = 0
            self.page_of[frame] = 0
            self.protect(frame, pyshare.READ)
        elif left.mode == CHANGING:
            words = self.control.words
            logged = self.log.file.scan(words[REDO], words[TAIL])
            image, _ = roll_forward(self.heap.read(page), (each for each in logged if each.change.page == page))
            with self.opened(frame) as view:
                view[:] = image
        if left.mode != HELD and self.on_repair:
            self.on_repair(page, left)


# -- The engine ----------------------------------------------------------------------------------------------------


class Engine:
    """A database that is open. The server makes it; its forked workers go on with their copies of it."""

    def __init__(self, path: str, name: str, frames: int) -> None:
        """Opens the database: what was committed is there, what was not is undone, and a new log begins."""
        begin = time.perf_counter()
        self.heap = Heap(path)
        self.layout = self.heap.layout
        try:
            fcntl.lockf(self.heap.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, SERVER_BYTE)
        except BlockingIOError:
            raise DatabaseError(f"{path} is in use by another server") from None
        file = LogFile(path + ".log")
        self.recovered, found = redo(self.heap, file)
        next_page = max(self.heap.pages, self.layout.history)
        self.control = Control(name, frames, next_page + HISTORY_ROOM)
        self.words = self.control.words
        self.words[TAIL] = self.words[FLUSHED] = found.tail
        self.words[REDO] = self.words[HORIZON] = found.redo
        self.words[NEXT_PAGE] = next_page
        self.latches = Latches(self.heap.fd, self.control.latches)
        self.log = Log(file, self.words, self.latches)
        self.pool = Pool(self.control, self.heap, self.log, self.latches)
        self.become(0, 1)
        for transaction, changes in found.losers.items():
            self.undo(transaction, changes)
            self.recovered.losers += 1
            self.recovered.undone += len(changes)
        self.checkpoint()
        self._renew_log()
        self.recovered.seconds = time.perf_counter() - begin

    def _renew_log(self) -> None:
        old, tail = self.log.file, self.words[TAIL]
        LogFile.renew(old.path, tail, old.epoch + 1)
        old.close()
        self.log.file = LogFile(old.path)
        self.words[FLUSHED] = self.words[REDO] = self.words[HORIZON] = tail

    def become(self, slot: int, incarnation: int) -> None:
        """This process is the one of this slot from now on. No incarnation comes twice while a server runs."""
        self.number, self.incarnation = slot, incarnation
        self.slot = self.pool.count = self.log.count = self.control.slot(slot)
        self.pool.took = []
        self.latches.become(slot, incarnation)

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
        """A dead process holds nothing, and its transaction is undone: so many changes; None if it was in none."""
        for latch in self.latches.left_by(incarnation):
            if latch >= FRAME_LATCHES:
                self.pool.latch(latch - FRAME_LATCHES)
            else:
                self.latches.acquire(latch)
            self.latches.release(latch)
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

    # Checkpoints

    def checkpoint(self) -> None:
        """Redo begins here from now on: all that was changed before is in the heap, on disk. Others go on meanwhile."""
        with self.latches.held(LOG_LATCH):
            horizon = self.words[HORIZON] = self.words[TAIL]
        for frame, since in enumerate(self.control.dirty):
            if 0 < since < horizon:
                self.pool.latch(frame)
                self.pool.write_back(frame)
                self.pool.unfix(frame)
        self.heap.sync()
        self.log.flush(self.log.append(Change(CHECKPOINT, amount=horizon)))
        self.words[REDO] = horizon

    def close(self) -> None:
        """The heap has everything, and the region is gone. (The last one out: the workers have ended.)"""
        self.checkpoint()
        self.slot = self.pool.count = self.log.count = memoryview(b"")
        self.control.close()
        self.log.file.close()
        self.heap.close()
