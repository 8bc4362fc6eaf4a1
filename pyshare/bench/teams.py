"""The contenders of section `change`: ways to get an mprotect into N other processes.

Every case starts a team of processes for each contender.
Lives here: the teams.  Not here: the contenders that are C (ext/bench/peers.c), the
cases, the rounds.
Invariants
 1. pyshare is reached by its public interface, and timed as a user pays it.
 2. The teams of the other contenders are asleep while one is timed.
 3. No process is a participant of another team's region: the caller is none of
    its own region while other teams start.
"""

from __future__ import annotations

import functools
import mmap
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pyshare
from pyshare import _peers
from pyshare.bench.measure import PAGE, Case, Crew

Buffer = mmap.mmap | pyshare.Region

CHANGES = {"revoke": int(pyshare.READ), "grant": int(pyshare.READ_WRITE)}
PROMPT = 20_000  # ns: if a working thread answers so soon, it is running, and so is this process
QUIET = 200_000  # ns between two changes: the answers of the last one are over


class Contender:
    """A team of processes, and a way to change a protection in all of them."""

    name: ClassVar[str]
    listens: ClassVar[bool] = False  # the main thread of a participant waits for changes
    attempts: ClassVar[int] = 1  # to have a working thread on another CPU at the time of a change

    def __init__(self, case: Case) -> None:
        self.case = case
        self.participants = case.participants
        self.threads = case.threads
        self.storing = case.storing
        self.stores_into_page = case.storing == 1
        # Before and behind the range a page stays writable, as in a real buffer.
        self.memory = self.map(PAGE + case.length + PAGE)
        self.board = _peers.Board(self.memory, PAGE, case.length, PAGE + case.length)
        self.crew = Crew()
        self.index = -1  # in a participant: which one

    @classmethod
    def missing(cls) -> str:
        """Why this machine does not have it; empty where it does."""
        return ""

    @classmethod
    def fits(cls, case: Case) -> bool:
        """Does it make sense in this case?"""
        return not case.stopped

    def map(self, size: int) -> Buffer:
        """Memory that forked children share."""
        return mmap.mmap(-1, size)

    def start(self) -> None:
        """The team is there, and its pages are touched."""
        self.touch()
        self.crew.start(self.participants, self.participate)

    def ready(self) -> None:
        """All teams have started: this one takes up its work."""
        if self.case.stopped:
            for prot in CHANGES.values():
                self.change(prot)  # nothing is for the first time any more
            os.kill(self.crew.pids[0], signal.SIGSTOP)
            os.waitpid(self.crew.pids[0], os.WUNTRACED)

    def close(self) -> None:
        """No process of the team is left."""
        self.crew.close()

    def touch(self) -> None:
        """Every page is in this process's page tables, dirty or clean; a change leaves it so."""
        with memoryview(self.memory) as view, view[::PAGE] as pages:
            if self.case.dirty:
                pages[:] = bytes(len(pages))
            else:
                bytes(pages)

    def participate(self, index: int, tell: Callable[[Any], None]) -> None:
        """The life of a participant."""
        self.index = index
        self.enter()
        self.touch()
        for thread in range(0 if self.listens else 1, self.threads):
            threading.Thread(target=self.work, args=[thread], daemon=True).start()
        tell(index)
        self.listen()

    def enter(self) -> None:
        """What a participant does first."""

    def work(self, thread: int) -> None:
        """The life of a working thread."""
        self.board.work(self.index * self.threads + thread)

    def listen(self) -> None:
        """The life of a participant's main thread."""
        self.work(0)

    def change(self, prot: int) -> int:
        """Everybody has the protection; returns how many ns that took."""
        raise NotImplementedError

    def timed_change(self, prot: int) -> int:
        """The same, from rest, or with the working threads at work."""
        if self.case.warm:
            self.to_and_fro(prot)
        if self.storing:
            self.put_to(_peers.LOOK, self.storing)
        end = time.perf_counter_ns() + QUIET
        while time.perf_counter_ns() < end:
            pass  # not asleep: the caller is to be as awake as a program at work
        for _ in range(self.attempts if self.stores_into_page else 0):
            if self.engage(prot):
                break
        elapsed = self.change(prot)
        if self.storing:
            self.put_to(_peers.REST)
        return elapsed

    def to_and_fro(self, prot: int) -> None:
        """Code, page tables and whatever belongs to the participants are in the caches."""
        for again in (prot, prot ^ pyshare.WRITE):
            self.change(again)

    def engage(self, prot: int) -> bool:
        """A working thread, on another CPU, stores to the very page until a revocation begins.

        As the floors do, this process changes to and fro before: after it had to give way, its caches are anybody's.
        False if it had to give way even so.
        """
        self.to_and_fro(prot)
        start = time.perf_counter_ns()
        if prot == CHANGES["revoke"]:
            self.put_to(_peers.STORE)
        self.put_to(_peers.LOOK)
        return time.perf_counter_ns() - start < PROMPT

    def put_to(self, work: int, called: int = 0) -> None:
        """A working thread is at that work, or all of them rest."""
        self.board.set_work(work, called)
        while not self.board.await_work(work):
            pass


# -- The floors ----------------------------------------------------------------------------------


class OneThread(Contender):
    """Floor: mprotect in one process of one thread."""

    name = "1 thread"
    listens = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.cpus = sorted(os.sched_getaffinity(0))
        self.participants, self.threads, self.storing = 1, 0, 0
        self.stores_into_page = False  # it goes to and fro before it is timed

    def listen(self) -> None:
        os.sched_setaffinity(0, self.cpus[:1])
        self.board.floor_serve(self.threads)

    def change(self, prot: int) -> int:
        return self.board.floor_change(prot)


class EveryCpu(OneThread):
    """Floor: the same with a thread running on every other CPU: the cost of shared page tables."""

    name = "all CPUs"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.threads = self.storing = len(self.cpus) - 1

    def work(self, thread: int) -> None:
        os.sched_setaffinity(0, [self.cpus[1 + thread]])
        super().work(thread)


class Bare(Contender):
    """Floor: a bare UFFDIO_WRITEPROTECT on every participant in turn, and nothing else.  All of it is C."""

    name = "bare uffd"
    attempts = 5

    @classmethod
    @functools.cache
    def missing(cls) -> str:
        try:
            with mmap.mmap(-1, PAGE) as memory:
                os.close(_peers.Board(memory, 0, PAGE, 0).remote_open())
        except OSError as error:
            return f"userfaultfd: {error.strerror}"
        return ""

    @classmethod
    def fits(cls, _case: Case) -> bool:
        return True

    def start(self) -> None:
        borrower, self.lender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with borrower, self.lender:
            super().start()
            self.borrowed = [socket.recv_fds(borrower, 1, 1)[1][0] for _ in range(self.participants)]
        self.board.remote_members(self.borrowed)

    def close(self) -> None:
        super().close()
        for fd in getattr(self, "borrowed", ()):
            os.close(fd)

    def listen(self) -> None:
        own = self.board.remote_open()
        socket.send_fds(self.lender, [b"."], [own])
        super().listen()

    def change(self, prot: int) -> int:
        return self.board.remote_change(prot)


# -- The peers -----------------------------------------------------------------------------------


class Signal(Contender):
    """A signal to every process; its handler calls mprotect and counts down.  All of it is C."""

    name = "signal"

    def start(self) -> None:
        super().start()
        self.board.signal_members(self.crew.pids)

    def enter(self) -> None:
        self.board.signal_listen()

    def change(self, prot: int) -> int:
        return self.board.signal_change(prot)


class Pipe(Contender):
    """A multiprocessing.Pipe to every process: the change there, None back."""

    name = "pipe"
    listens = True

    @classmethod
    def fits(cls, case: Case) -> bool:
        return super().fits(case) and case.storing != 1

    def start(self) -> None:
        self.ends = [multiprocessing.Pipe() for _ in range(self.participants)]
        super().start()

    def listen(self) -> None:
        end = self.ends[self.index][1]
        while True:
            _offset, _length, prot = end.recv()
            self.board.protect(prot)
            end.send(None)

    def change(self, prot: int) -> int:
        start = time.perf_counter_ns()
        for end, _ in self.ends:
            end.send((PAGE, self.case.length, prot))
        self.board.protect(prot)
        for end, _ in self.ends:
            end.recv()
        return time.perf_counter_ns() - start


class Condition(Contender):
    """A multiprocessing.Condition where all wait, and one where the last wakes the caller."""

    name = "condition"
    listens = True

    @classmethod
    def fits(cls, case: Case) -> bool:
        return super().fits(case) and case.storing != 1

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        lock = context.Lock()
        self.changed, self.finished = context.Condition(lock), context.Condition(lock)
        self.state = memoryview(mmap.mmap(-1, PAGE)).cast("q")  # generation, protection, missing
        super().start()

    def listen(self) -> None:
        seen = 0
        with self.changed:
            while True:
                while self.state[0] == seen:
                    self.changed.wait()
                seen = self.state[0]
                self.board.protect(self.state[1])
                self.state[2] -= 1
                if not self.state[2]:
                    self.finished.notify()

    def change(self, prot: int) -> int:
        start = time.perf_counter_ns()
        with self.changed:
            self.state[0] += 1
            self.state[1], self.state[2] = prot, self.participants
            self.changed.notify_all()
            self.board.protect(prot)
            while self.state[2]:
                self.finished.wait()
        return time.perf_counter_ns() - start


# -- pyshare -------------------------------------------------------------------------------------


def reopened(fd: int) -> int:
    """A descriptor of the same file with a description of its own: nobody's lock is on it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class Region(Contender):
    """A region, and its mprotect."""

    engine: ClassVar[str]

    @classmethod
    @functools.cache
    def missing(cls) -> str:
        try:
            pyshare.create(size=PAGE, engine=cls.engine).close()
        except OSError as error:
            return f"engine {cls.engine!r}: {error.strerror}"
        return ""

    def map(self, size: int) -> Buffer:
        self.region = pyshare.create(size=size, engine=self.engine)
        self.fd = reopened(self.region.fileno())
        return self.region

    def start(self) -> None:
        super().start()
        self.region.close()

    def ready(self) -> None:
        self.join(self.engine)
        self.touch()
        super().ready()

    def join(self, engine: str) -> None:
        """This process is a participant by that engine."""
        self.region = self.memory = pyshare.attach(self.fd, engine=engine)

    def close(self) -> None:
        super().close()
        self.region.close()
        os.close(self.fd)

    def change(self, prot: int) -> int:
        start = time.perf_counter_ns()
        self.region.mprotect(PAGE, self.case.length, prot)
        return time.perf_counter_ns() - start


class Mprotect(Region):
    """Every participant's agent is woken, and calls mprotect."""

    name = "mprotect"
    engine = "mprotect"


class Uffd(Region):
    """The caller changes every participant's page tables."""

    name = "uffd"
    engine = "uffd"
    attempts = 5

    @classmethod
    def fits(cls, _case: Case) -> bool:
        return True


class Mixed(Region):
    """Every other participant has the other engine."""

    name = "mixed"
    engine = "uffd"

    @classmethod
    def fits(cls, case: Case) -> bool:
        return case.participants > 1 and case == Case(case.section, case.participants, warm=case.warm)

    def enter(self) -> None:
        if self.index % 2:
            self.region.close()
            self.join("mprotect")


# Regions last: what is forked while one is open becomes a participant of it.
CONTENDERS: tuple[type[Contender], ...] = (EveryCpu, OneThread, Bare, Condition, Pipe, Signal, Mixed, Mprotect, Uffd)
SHOWN = tuple(kind.name for kind in reversed(CONTENDERS))
