"""A multi-process database buffer, with accidents: `make demo` runs it, about 15 s.

Forked workers move money (TPC-B: accounts, tellers, branches, history) through one pool of pages in a pyshare region.
Each page is READ for everyone; a worker that changes one leases it for the time of the store, and latches are the
region's locks. Checkpoints are snapshots of the region, saved while transactions run. Meanwhile a rogue process tries
stray stores, a worker is killed in the middle of a transaction, another one and who takes a checkpoint in the middle
of that, and then everybody is killed at once and the database restarted from its files. Whether the books balance is
asked of a fresh process that has nothing but the heap file and the list of what was acknowledged; and for each
checkpoint of one that has the files, while others go on.

`--protect` compares ways to protect the pages:

    lease     the default: a page is writable for who changes it, for nobody else, and only while it does
    window    the same lease, with the store made through a second mapping that is always writable
    mprotect  a page is opened for everybody with region.mprotect, and closed again
    none      every page is READ_WRITE for everybody, always
    all       each kind with a database of its own, by turns of a tenth of a second; prints a table

Lives here: the processes, the accidents, the terminal.
Not here: the storage engine (database_engine.py), its files (database_files.py).

    director   this process: gives orders, keeps the acknowledgements, shows and judges. It has no part in the region
    server     opens the database, makes the region, forks and replaces workers (slot 0)
    worker     makes transfers, one after the other (slots 1 to N)
    saver      forked by the server, takes one checkpoint (slot SAVER)
    rogue      forked by the server, one for each stray store
    auditor    a fresh interpreter that reads the files

They talk through pipes: orders, a byte each, from the director to the server; news, a line of JSON each, and
acknowledgements (see ACK) from everybody to the director. Whoever finds the other end of its pipe gone, ends.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import dataclasses
import json
import os
import random
import resource
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NoReturn

from database_engine import (
    EVICTIONS,
    FLUSHED,
    LOADS,
    ORDER,
    PATIENCE,
    PROTECTIONS,
    SEQUENCE,
    SLOT_WORDS,
    STOPPING,
    SYNCS,
    WRITES,
    Engine,
    Left,
)
from database_files import (
    ADD,
    BALANCES_PER_PAGE,
    BODY,
    HISTORY,
    PAGE,
    TELLERS_PER_BRANCH,
    Change,
    DatabaseError,
    Heap,
    LogFile,
    analyse,
    audit,
    audit_checkpoint,
    create_database,
    lsn_of,
)
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table as Grid

import pyshare

# The agent is a second thread, and since Python 3.12 os.fork() warns of that; pyshare is made for it.
warnings.filterwarnings("ignore", message=r".*use of fork\(\) may lead to deadlocks", category=DeprecationWarning)

ACK: Final = struct.Struct("<HHQ")  # how many stores, how many latches; the log is on disk up to; then a row, then ns
HALFWAY, ROGUE, STOP, SAVE, SAVE_HALF = b"h", b"r", b"s", b"c", b"d"  # orders
SAVER: Final = 255  # a slot that no worker has
CHECKPOINT_EVERY: Final = 2.0  # seconds
TICK: Final = 0.1  # seconds between two looks at the screen
TURN: Final = 0.1  # seconds of one kind of protection, where all are compared

# The stray stores that a rogue tries, and which of them each kind of protection catches.
STRAYS: Final = {
    "closed": "which nobody has open",
    "open": "while its owner changes it",
    "late": "through a view kept from an earlier change",
}
CATCHES: Final = {
    "lease": {"closed", "open", "late"},
    "window": {"closed", "open"},  # a view of the second mapping stays writable
    "mprotect": {"closed", "late"},  # open is open for everybody
    "none": set[str](),
}

News = dict[str, Any]


class DemoFailed(Exception):
    """Something that the demonstration needs did not happen in time."""


# -- Processes: worker, server, rogue ------------------------------------------------------------------------------


def fork(body: Callable[[], int]) -> int:
    """The pid of a child that runs body and ends with its result; nothing of the parent's is unwound in it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = body()
    except BrokenPipeError:
        code = 2  # the director is gone
    except (DemoFailed, DatabaseError, pyshare.ShareError) as error:
        os.write(2, f"database_buffer: {error}\n".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_ended(pidfd: int, what: str) -> None:
    if not select.select([pidfd], [], [], PATIENCE)[0]:
        raise DemoFailed(f"{what} did not end within {PATIENCE:.0f} s")


class Process:
    """One that has the engine, and tells the director what happens."""

    def __init__(self, engine: Engine, news: int) -> None:
        self.engine, self.news = engine, news
        engine.pool.on_repair = self.tell_repair

    def tell(self, **what: Any) -> None:
        os.write(self.news, json.dumps(what).encode() + b"\n")  # below PIPE_BUF: never mixed with another's

    def tell_repair(self, page: int, left: Left, torn: bool) -> None:
        where = self.engine.layout.describe(page)
        self.tell(news="repair", slot=self.engine.number, left=left.slot, page=where, torn=torn)


class Worker(Process):
    """Makes transfers until the server says stop; acknowledges each to the director, after its commit."""

    def __init__(self, engine: Engine, news: int, acks: int, seed: str) -> None:
        super().__init__(engine, news)
        self.acks, self.random = acks, random.Random(seed)

    def run(self) -> int:
        engine = self.engine
        while not engine.words[STOPPING]:
            stores, waits = engine.pool.stores, engine.latches.waits
            stores.clear()
            waits.clear()
            if engine.slot[ORDER]:
                self.halfway()
            row = self.transfer()
            took = array.array("Q", stores + waits).tobytes()
            os.write(self.acks, ACK.pack(len(stores), len(waits), engine.words[FLUSHED]) + row + took)
        return 0

    def pick(self) -> tuple[int, int, int, int]:
        """account, teller, branch, amount"""
        layout = self.engine.layout
        teller = self.random.randrange(layout.tellers.rows)
        account = self.random.randrange(layout.accounts.rows)
        return account, teller, teller // TELLERS_PER_BRANCH, self.random.randint(-999_999, 999_999)

    def transfer(self) -> bytes:
        engine, layout = self.engine, self.engine.layout
        account, teller, branch, amount = self.pick()
        transaction = engine.begin()
        engine.add(transaction, layout.accounts, account, amount)
        engine.add(transaction, layout.tellers, teller, amount)
        engine.add(transaction, layout.branches, branch, amount)
        row = HISTORY.pack(transaction, account, teller, branch, amount, time.time())
        engine.insert(transaction, row)
        engine.commit(transaction)
        return row

    def halfway(self) -> NoReturn:
        """Makes two changes and half of a third, reports, and waits to be killed: latch held, page leased."""
        engine, layout, pool = self.engine, self.engine.layout, self.engine.pool
        engine.slot[ORDER] = 0
        account, teller, branch, amount = self.pick()
        transaction = engine.begin()
        engine.add(transaction, layout.accounts, account, amount)
        engine.add(transaction, layout.tellers, teller, amount)
        page, slot = layout.branches.place(branch)
        frame = pool.fix(page)
        lsn = pool.log_change(frame, Change(ADD, transaction, page, slot, amount))
        engine.log.flush(lsn)  # as another worker's commit would
        with pool.opened(frame) as open_page:
            open_page.view[BODY : BODY + 4] = b"half"  # of the eight bytes of a balance
            self.tell(news="halfway", slot=engine.number, pid=os.getpid(), lsn=lsn, page=layout.describe(page))
            select.select([], [], [], PATIENCE)
        raise DemoFailed("nobody killed this worker")


class Saver(Process):
    """Takes a checkpoint; or half of one, and waits to be killed with the snapshot in its hands."""

    def run(self, half: bool) -> int:
        begin = time.perf_counter_ns()
        self.engine.checkpoint(self.wait_for_death if half else lambda _done, _total: None)
        self.tell(news="checkpoint", took=time.perf_counter_ns() - begin)
        return 0

    def wait_for_death(self, done: int, _total: int) -> None:
        if done:
            self.tell(news="saving", pid=os.getpid())
            select.select([], [], [], PATIENCE)
            raise DemoFailed("nobody killed this saver")


@dataclasses.dataclass
class Member:
    """A worker or a saver, as the server knows it."""

    slot: int
    incarnation: int
    pid: int
    pidfd: int


class Server(Process):
    """Owns the region and the workers. Ends when the director says so, or is gone."""

    def __init__(self, options: argparse.Namespace, protect: str, name: str, orders: int, news: int, acks: int) -> None:
        super().__init__(Engine(options.file, name, options.frames, protect), news)
        self.orders, self.acks = orders, acks
        self.seed = f"{options.seed} {self.engine.log.file.epoch}"
        self.random = random.Random(self.seed)
        self.members: dict[int, Member] = {}
        self.incarnation = self.engine.incarnation
        self.tell(news="ready", **dataclasses.asdict(self.engine.recovered))
        for slot in range(1, options.workers + 1):
            self.hire(slot)

    def hire(self, slot: int) -> None:
        def work(incarnation: int) -> int:
            return Worker(self.engine, self.news, self.acks, f"{self.seed} {incarnation}").run()

        self.tell(news="hired", slot=slot, pid=self.start(slot, work))

    def save(self, half: bool = False) -> None:
        """A checkpoint is begun, unless one is under way."""
        if SAVER not in self.members:
            self.start(SAVER, lambda _: Saver(self.engine, self.news).run(half))

    def start(self, slot: int, body: Callable[[int], int]) -> int:
        self.incarnation += 1
        incarnation = self.incarnation

        def live() -> int:
            os.close(self.orders)
            self.engine.become(slot, incarnation)
            return body(incarnation)

        pid = fork(live)
        self.members[slot] = Member(slot, incarnation, pid, os.pidfd_open(pid))
        return pid

    def run(self) -> int:
        next_checkpoint = time.monotonic() + CHECKPOINT_EVERY
        while True:
            pidfds = {member.pidfd: member for member in self.members.values()}
            wait = max(next_checkpoint - time.monotonic(), 0.0)
            ready = select.select([self.orders, *pidfds], [], [], wait)[0]
            for pidfd in pidfds.keys() & set(ready):
                self.dismiss(pidfds[pidfd])
                if pidfds[pidfd].slot != SAVER:
                    self.hire(pidfds[pidfd].slot)
            if self.orders in ready:
                order = os.read(self.orders, 1)
                if order == STOP:
                    return self.stop()
                self.obey(order)
            if time.monotonic() >= next_checkpoint:
                self.save()
                next_checkpoint = time.monotonic() + CHECKPOINT_EVERY

    def obey(self, order: bytes) -> None:
        if order == ROGUE:
            self.rogue()
        elif order == HALFWAY:
            slot = self.random.choice([slot for slot in self.members if slot != SAVER])
            self.engine.control.slot(slot)[ORDER] = 1
        elif order in (SAVE, SAVE_HALF):
            if SAVER in self.members:
                self.await_end(self.members[SAVER])
            self.save(half=order == SAVE_HALF)
        else:
            os.killpg(0, signal.SIGKILL)  # the director is gone: so are we

    def dismiss(self, member: Member) -> None:
        """A worker has ended. If it was not told to, what it left is put right."""
        os.close(member.pidfd)
        del self.members[member.slot]
        code = os.waitstatus_to_exitcode(os.waitpid(member.pid, 0)[1])
        if member.slot == SAVER:
            if code:
                self.tell(news="unsaved", pid=member.pid, code=code)
        elif code or not self.engine.words[STOPPING]:
            undone = self.engine.bury(member.slot, member.incarnation)
            self.tell(news="buried", slot=member.slot, pid=member.pid, code=code, undone=undone)

    def rogue(self) -> None:
        """Each of the STRAYS into a branch's page, while we hold its latch: nothing else could change it meanwhile."""
        pool, layout = self.engine.pool, self.engine.layout
        page, _ = layout.branches.place(self.random.randrange(layout.branches.rows))
        for kind in STRAYS:
            with pool.fixed(page) as frame, pool.view(frame) as view:
                before = bytes(view)
                code, line = self.stray(kind, frame, view)
                unhurt = bytes(view) == before
                if not unhurt:
                    with pool.opened(frame) as open_page:
                        open_page.view[:] = before
            caught = code == -signal.SIGSEGV and "forbidden store" in line
            self.tell(news="stray", kind=kind, caught=caught, unhurt=unhurt, line=line, page=layout.describe(page))
        self.tell(news="rogue")

    def stray(self, kind: str, frame: int, view: memoryview) -> tuple[int, str]:
        """How a child ends that stores into this frame, and what it says on stderr."""
        pool = self.engine.pool
        read, write = os.pipe()

        def store() -> int:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(write, 2)
            target = view
            if kind == "late":
                with pool.opened(frame) as open_page:
                    target = open_page.view[:]
            target[BODY] ^= 0xFF
            return 0

        with pool.opened(frame) if kind == "open" else contextlib.nullcontext():
            pid = fork(store)
            pidfd = os.pidfd_open(pid)
            wait_ended(pidfd, "the rogue")
        os.close(pidfd)
        os.close(write)
        with os.fdopen(read) as stderr:
            line = stderr.read().strip()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), line

    def await_end(self, member: Member) -> None:
        wait_ended(member.pidfd, "the saver" if member.slot == SAVER else f"worker {member.slot}")
        self.dismiss(member)

    def stop(self) -> int:
        self.engine.words[STOPPING] = 1
        for member in list(self.members.values()):
            self.await_end(member)
        slots = self.engine.control.slots.tolist()
        words = {"begun": SEQUENCE, "loads": LOADS, "evictions": EVICTIONS, "writes": WRITES, "syncs": SYNCS}
        counted = {name: sum(slots[word::SLOT_WORDS]) for name, word in words.items()}
        self.engine.close()
        self.tell(news="stopped", **counted)
        return 0


# -- The director --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Findings:
    """What the director saw."""

    acks: list[bytes] = dataclasses.field(default_factory=list)  # history rows
    stores: array.array[int] = dataclasses.field(default_factory=lambda: array.array("Q"))  # ns that pages were open
    waits: array.array[int] = dataclasses.field(default_factory=lambda: array.array("Q"))  # ns that latches took
    synced: int = 0  # up to where in the log, at least
    seconds: float = 0.0  # under load
    recoveries: list[News] = dataclasses.field(default_factory=list)
    strays: list[News] = dataclasses.field(default_factory=list)
    victim: News = dataclasses.field(default_factory=dict)  # the worker killed in mid-transaction
    repairs: list[News] = dataclasses.field(default_factory=list)
    buried: list[News] = dataclasses.field(default_factory=list)
    stopped: list[News] = dataclasses.field(default_factory=list)
    audits: list[dict[str, int]] = dataclasses.field(default_factory=list)
    checkpoints: list[dict[str, int]] = dataclasses.field(default_factory=list)  # the books as each of them has them
    saves: list[int] = dataclasses.field(default_factory=list)  # ns that each of them took
    unsaved: list[News] = dataclasses.field(default_factory=list)  # savers that died
    killed: set[int] = dataclasses.field(default_factory=set)  # pids
    crashed: int = 0  # processes killed at once
    halves: int = 0  # pages of the heap that were torn then
    acks_at_kill: int = 0
    acks_at_stop: int = 0
    acks_at_crash: int = 0
    name_left: bool = False


class Run:
    """One server's life, from outside: its process group, its pipes, and what comes through them."""

    def __init__(
        self, options: argparse.Namespace, protect: str, name: str, hear: Callable[[News], None], found: Findings
    ) -> None:
        self.hear, self.found = hear, found
        self.heard: list[News] = []
        self.pidfds: dict[int, int] = {}  # of the workers
        self.line = self.ack = b""
        orders, self.orders = os.pipe()
        self.news, news = os.pipe()
        self.acks, acks = os.pipe()

        def serve() -> int:
            os.setpgid(0, 0)  # apart from us: everybody there can be killed at once, and Ctrl-C is ours alone
            for fd in (self.orders, self.news, self.acks):
                os.close(fd)
            return Server(options, protect, name, orders, news, acks).run()

        self.pid = fork(serve)
        self.pidfd = os.pidfd_open(self.pid)
        with contextlib.suppress(PermissionError):
            os.setpgid(self.pid, self.pid)  # whoever of the two comes first
        for fd in (orders, news, acks):
            os.close(fd)

    # Listening

    def pump(self, wait: float) -> bool:
        """Takes in what comes within this time, at most a chunk of each kind; False: nobody is left who could speak."""
        ready = select.select([self.news, self.acks], [], [], max(wait, 0.0))[0]
        acks = os.read(self.acks, 1 << 16) if self.acks in ready else None
        news = os.read(self.news, 1 << 16) if self.news in ready else None
        self.take_acks(acks or b"")
        *lines, self.line = (self.line + (news or b"")).split(b"\n")
        for line in lines:
            self.take_news(json.loads(line))
        return acks != b"" or news != b""

    def take_acks(self, data: bytes) -> None:
        data, at, found = self.ack + data, 0, self.found
        while len(data) - at >= ACK.size:
            stores, waits, synced = ACK.unpack_from(data, at)
            row = at + ACK.size
            took = row + HISTORY.size
            wait, end = took + 8 * stores, took + 8 * (stores + waits)
            if end > len(data):
                break
            found.acks.append(data[row:took])
            found.stores.frombytes(data[took:wait])
            found.waits.frombytes(data[wait:end])
            found.synced = max(found.synced, synced)
            at = end
        self.ack = data[at:]

    def take_news(self, news: News) -> None:
        if news["news"] == "hired":
            with contextlib.suppress(ProcessLookupError):  # dead and buried already
                self.pidfds[news["pid"]] = os.pidfd_open(news["pid"])
        elif news["news"] == "buried" and news["pid"] in self.pidfds:
            os.close(self.pidfds.pop(news["pid"]))
        self.heard.append(news)
        self.hear(news)

    def ask(self, order: bytes, kind: str) -> News:
        """The answer to an order."""
        known = len(self.heard)
        os.write(self.orders, order)
        return self.expect(kind, known)

    def expect(self, kind: str, since: int = 0, pid: int | None = None) -> News:
        """The first news of this kind (about this process) since so many had come."""
        deadline = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < deadline:
            for news in self.heard[since:]:
                if news["news"] == kind and pid in (None, news.get("pid")):
                    return news
            if not self.pump(TICK):
                break
        raise DemoFailed(f"the server did not say {kind!r}")

    # Ending

    @property
    def over(self) -> bool:
        """True once the server has ended, whatever its workers do."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def kill(self, pid: int) -> None:
        self.found.killed.add(pid)
        signal.pidfd_send_signal(self.pidfds[pid], signal.SIGKILL)

    def kill_everybody(self) -> int:
        """How many processes they were."""
        os.killpg(self.pid, signal.SIGKILL)
        self.end()
        return 1 + len(self.pidfds)

    def end(self) -> None:
        """All they said has been heard, and all of them have ended."""
        deadline = time.monotonic() + 2 * PATIENCE
        while self.pump(TICK):
            if time.monotonic() > deadline:
                raise DemoFailed("the server and its workers do not end")
        for pidfd in (self.pidfd, *self.pidfds.values()):
            wait_ended(pidfd, "a process")

    def close(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)  # they have ended, unless the demonstration has failed
        with contextlib.suppress(DemoFailed):
            self.end()
        os.waitpid(self.pid, 0)
        for fd in (self.orders, self.news, self.acks, self.pidfd, *self.pidfds.values()):
            os.close(fd)


class Director:
    """The course of events, and what is said meanwhile."""

    def __init__(self, options: argparse.Namespace, protect: str, console: Console) -> None:
        self.options, self.protect, self.console = options, protect, console
        self.name = f"database-buffer-{protect}-{os.getpid()}"
        self.random = random.Random(options.seed)
        self.found = Findings()
        self.auditors: list[subprocess.Popen[bytes]] | None = None  # of checkpoints; None: those are not audited
        self.begin = time.monotonic()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[line]}"),
            console=console,
            auto_refresh=False,  # that would be a thread, and this process forks
        )

    def direct(self, seconds: float) -> Findings:
        """The whole of it: so many seconds under load, in three runs."""
        found, share = self.found, seconds / 10
        self.auditors = []
        with self.progress:
            with self.run() as run:
                kills = [(self.random.uniform(0, 5 * share), self.kill_any) for _ in range(self.options.kills)]
                self.load(
                    run,
                    "run 1",
                    5 * share,
                    [
                        (1.5 * share, self.rogue),
                        (2.5 * share, self.kill_halfway),
                        (3.5 * share, self.kill_saver),
                        *kills,
                    ],
                )
                found.acks_at_stop = len(found.acks)
                self.stop(run)
            self.audit()
            with self.run() as run:
                self.load(run, "run 2", 3 * share, [(2 * share, self.save)])
                self.crash(run)
            self.cut_power()
            with self.run() as run:
                self.load(run, "run 3", 2 * share, [(share, self.rogue)])
                self.stop(run)
            self.audit()
        found.name_left = self.name in pyshare.names()
        return found

    def turn(self, run: Run, seconds: float) -> float:
        """Transactions per second of a run that was stopped and will be stopped again."""
        os.killpg(run.pid, signal.SIGCONT)
        begin, acks, elapsed = time.monotonic(), len(self.found.acks), 0.0
        while elapsed < seconds:
            if not run.pump(seconds - elapsed) or run.over:
                raise DemoFailed("the server has ended")
            elapsed = time.monotonic() - begin
        os.killpg(run.pid, signal.SIGSTOP)
        return (len(self.found.acks) - acks) / elapsed

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        run = Run(self.options, self.protect, self.name, self.hear, self.found)
        try:
            yield run
            self.audit_checkpoints()
        finally:
            run.close()
            for auditor in self.auditors or []:
                auditor.kill()
                auditor.communicate()

    def load(self, run: Run, title: str, seconds: float, plan: list[tuple[float, Callable[[Run], None]]]) -> None:
        """The workers work for so long; accidents happen at their times."""
        run.expect("ready")
        task = self.progress.add_task(title, total=1.0, line="")
        begin, acks = time.monotonic(), len(self.found.acks)
        plan, drawn = sorted(plan, key=lambda accident: accident[0]), -TICK
        while (elapsed := time.monotonic() - begin) < seconds or plan:
            if plan and elapsed >= plan[0][0]:
                plan.pop(0)[1](run)
            elif not run.pump(min(TICK, max(seconds - elapsed, 0.0))) or run.over:
                raise DemoFailed("the server has ended")
            if elapsed - drawn >= TICK:
                drawn = elapsed
                self.draw(task, elapsed / seconds, (len(self.found.acks) - acks) / max(elapsed, TICK))
        self.draw(task, 1.0, (len(self.found.acks) - acks) / elapsed)
        self.found.seconds += elapsed

    def draw(self, task: TaskID, done: float, speed: float) -> None:
        latest = self.found.stores[-1000:]
        line = f"{len(self.found.acks):,} transactions, {speed:,.0f}/s; page change {duration(percentile(latest, 50))}"
        self.progress.update(task, completed=done, line=line)
        self.progress.refresh()

    # Accidents

    def rogue(self, run: Run) -> None:
        run.ask(ROGUE, "rogue")

    def kill_halfway(self, run: Run) -> None:
        news = run.ask(HALFWAY, "halfway")
        self.say_halfway(news)
        known, self.found.acks_at_kill = len(run.heard), len(self.found.acks)
        run.kill(news["pid"])
        self.say("kill", "red", f"SIGKILL to worker {news['slot']}")
        self.found.victim = news | {"undone": run.expect("buried", known, news["pid"])["undone"]}

    def save(self, run: Run) -> None:
        run.ask(SAVE, "checkpoint")

    def kill_saver(self, run: Run) -> None:
        """While it has the snapshot and half of the file, and after a worker."""
        saver = run.ask(SAVE_HALF, "saving")["pid"]
        known = len(run.heard)
        self.say("save", "yellow", "a checkpoint is half written")
        victims = [pid for pid in run.pidfds if pid not in self.found.killed]
        if victims:
            run.kill(victims[0])
            self.say("kill", "red", "SIGKILL to a worker")
            run.expect("buried", known, victims[0])
        os.kill(saver, signal.SIGKILL)
        self.say("kill", "red", "SIGKILL to who takes the checkpoint")
        run.expect("unsaved", known, saver)
        run.ask(SAVE, "checkpoint")

    def kill_any(self, run: Run) -> None:
        pids = [pid for pid in run.pidfds if pid not in self.found.killed]
        if pids:
            run.kill(self.random.choice(pids))
            self.say("kill", "red", "SIGKILL to a worker, whatever it is doing")

    def crash(self, run: Run) -> None:
        """Everybody at once, one of them in mid-transaction, with its half in the log on disk."""
        news = run.ask(HALFWAY, "halfway")
        self.say_halfway(news)
        self.found.synced = max(self.found.synced, news["lsn"])
        self.found.crashed = run.kill_everybody()
        self.found.acks_at_crash = len(self.found.acks)
        self.say("kill", "red", f"SIGKILL to all {self.found.crashed} processes; the region is gone with them")

    def cut_power(self) -> None:
        """What a power cut does besides. Of the log's end, as far as no sync had promised it (synced was what an
        acknowledgement or a page in the heap needed), a part is lost, in the middle of a record; and of a page that was
        written since the latest checkpoint, only half got to the disk."""
        heap, log = Heap(self.options.file), LogFile(self.options.file + ".log")
        pages = {page: image for page in range(heap.pages) if (image := heap.read(page))}
        safe = max(self.found.synced, *map(lsn_of, pages.values()))
        loose = [logged for logged in log.scan(log.base) if logged.start >= safe]
        if loose:
            torn = self.random.choice(loose)
            os.ftruncate(log.fd, log.place(self.random.randrange(torn.start + 1, torn.lsn)))
        else:  # all of it was synced, and the next record had just begun
            os.pwrite(log.fd, bytes(range(1, 40)), log.size)
        synced = analyse(log, log.scan(log.base, safe)).checkpoint
        halves = [page for page, image in pages.items() if lsn_of(image) > synced]
        if halves:
            os.pwrite(heap.fd, os.urandom(PAGE // 2), self.random.choice(halves) * PAGE + PAGE // 2)
            self.found.halves = 1
        heap.close()
        log.close()
        lost = f"of the log's end, {len(loose)} records not yet synced, a part is lost"
        self.say(
            "power", "red", f"cut, as it were: {lost}" + ("; a page of the heap is half written" if halves else "")
        )

    # Endings

    def stop(self, run: Run) -> None:
        self.found.stopped.append(run.ask(STOP, "stopped"))
        run.end()

    def audit(self) -> None:
        self.found.audits.append(ask_auditor(self.options.file, self.found.acks))
        books = self.found.audits[-1]
        there = f"{books['acknowledged'] - books['missing']:,} of {books['acknowledged']:,} acknowledged transactions"
        sums = "the books balance" if balanced(books) else "THE BOOKS DO NOT BALANCE"
        good = balanced(books) and not books["missing"]
        self.say("audit", "green" if good else "red", f"a fresh process reads the file: {sums}, it has {there}")

    def audit_checkpoints(self) -> None:
        """All that were taken in a run, before its log goes."""
        while self.auditors:
            output, _ = self.auditors[0].communicate(timeout=300)
            if self.auditors.pop(0).returncode:
                raise DemoFailed("a checkpoint could not be audited")
            self.found.checkpoints.append(json.loads(output))

    # What is said

    def say(self, what: str, colour: str, text: str) -> None:
        line = Grid.grid(padding=(0, 1))
        line.add_column(width=6, justify="right", style="dim")
        line.add_column(width=6, style=f"bold {colour}")
        line.add_column(style="dim" if colour == "dim" else "")
        line.add_row(f"{time.monotonic() - self.begin:.1f} s" if what else "", what, escape(text))
        self.console.print(line)

    def say_halfway(self, news: News) -> None:
        self.say(
            "half",
            "yellow",
            f"worker {news['slot']} has made two of its transaction's changes and half of the third: "
            f"it holds the latch of {news['page']}, has the page open, and its balance is nonsense",
        )

    def say_stray(self, news: News) -> None:
        end = "dead by SIGSEGV" if news["caught"] else f"NOT CAUGHT with {self.protect}"
        page = "the page is unhurt" if news["unhurt"] else "the page was changed, and is put right from a copy"
        self.say("rogue", "yellow", f"stray store into {news['page']}, {STRAYS[news['kind']]}: {end}, {page}")
        if news["line"]:
            self.say("", "dim", news["line"])

    def hear(self, news: News) -> None:
        kind, found = news["news"], self.found
        if kind == "ready":
            found.recoveries.append(news)
            self.say("open", "green", opening(news))
        elif kind == "stray":
            found.strays.append(news)
            self.say_stray(news)
        elif kind == "repair":
            found.repairs.append(news)
            who = f"worker {news['slot']}" if news["slot"] else "the server"
            how = "makes it again from heap and log" if news["torn"] else "adds what only the log has"
            self.say("repair", "green", f"{who} is next at {news['page']}: the latch is abandoned, so it {how}")
        elif kind == "checkpoint":
            found.saves.append(news["took"])
            if self.auditors is not None:
                command = [sys.executable, __file__, "--audit-checkpoint", "--file", self.options.file]
                self.auditors.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        elif kind == "unsaved":
            found.unsaved.append(news)
        elif kind == "buried":
            found.buried.append(news)
            undone = news["undone"]
            what = "it left nothing to undo" if undone is None else f"its transaction is undone, {undone} changes"
            self.say("undo", "green", f"worker {news['slot']} is dead: {what}")


def ask_auditor(file: str, acks: list[bytes]) -> dict[str, int]:
    """The books, read by a fresh interpreter that has the file's name and the acknowledged rows."""
    auditor = subprocess.run(
        [sys.executable, __file__, "--audit", "--file", file],
        input=b"".join(acks),
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    books: dict[str, int] = json.loads(auditor.stdout)
    return books


# -- Words for figures ---------------------------------------------------------------------------------------------


def percentile(values: Sequence[int], percent: float) -> int:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0


def duration(ns: float) -> str:
    return f"{ns / 1e3:.1f} µs" if ns < 100e3 else f"{ns / 1e3:,.0f} µs" if ns < 10e6 else f"{ns / 1e6:,.0f} ms"


def balanced(books: dict[str, int]) -> bool:
    sums = {books[name] for name in ("branches", "tellers", "accounts", "history")}
    return len(sums) == 1 and not any(books[name] for name in ("wrong_rows", "damaged_pages", "doubles"))


def recovered(news: News) -> str:
    return (
        f"{news['records']:,} log records read, {news['torn']} torn bytes cut off, {news['redone']:,} changes redone "
        f"in {news['pages']:,} pages ({news['mended']} of them torn), {news['losers']} transactions undone "
        f"({news['undone']} changes); {news['image']:,} pages came from the latest checkpoint's image"
    )


def opening(news: News) -> str:
    if not any(news[what] for what in ("torn", "redone", "losers")):
        return "the database is open"
    return f"the database is open after {news['seconds']:.2f} s: {recovered(news)}"


# -- The report ----------------------------------------------------------------------------------------------------


def stray_checks(found: Findings, protect: str) -> list[tuple[str, bool]]:
    catchable = [stray for stray in found.strays if stray["kind"] in CATCHES[protect]]
    if not catchable:
        return []
    return [
        (f"each stray write that {protect} can catch was caught", all(stray["caught"] for stray in catchable)),
        ("each of those left its page unhurt", all(stray["unhurt"] for stray in catchable)),
    ]


def checks(found: Findings, protect: str) -> list[tuple[str, bool]]:
    """What this demonstration promises, and whether it was so."""
    victim, crash, (first, last) = found.victim, found.recoveries[-1], found.audits
    repaired = any(
        news["left"] == victim["slot"] and news["page"] == victim["page"] and news["torn"] for news in found.repairs
    )
    return [
        *stray_checks(found, protect),
        ("each checkpoint has its pages as of one moment", not any(books["astray"] for books in found.checkpoints)),
        ("and balances, for a fresh process, while others go on", all(map(balanced, found.checkpoints))),
        (
            "who was killed while it took one left the one before, and the next was whole",
            [news["code"] for news in found.unsaved] == [-signal.SIGKILL] and len(found.checkpoints) > 1,
        ),
        ("the worker killed in mid-transaction: its half-written page was made again", repaired),
        ("its half transaction was undone, all three changes", victim["undone"] == 3),
        ("the others went on", found.acks_at_stop > found.acks_at_kill),
        ("nobody died who was not killed", {news["pid"] for news in found.buried} <= found.killed),
        ("then the books balanced, for a fresh process", balanced(first)),
        ("and no acknowledged transaction was missing", not first["missing"]),
        ("everybody killed: the restart had the image of the latest checkpoint", crash["image"] > 0),
        ("the torn end of the log was recognised", crash["torn"] > 0),
        ("so was the torn page, by its checksum, and made again", crash["mended"] == found.halves),
        ("the half transactions were undone", crash["losers"] > 0 and crash["undone"] >= 3),
        ("then the books balanced, for a fresh process", balanced(last)),
        ("and no acknowledged transaction was missing", not last["missing"]),
        (
            "at most one commit per killed process was unknown",
            last["unacknowledged"] <= len(found.killed) + found.crashed,
        ),
        ("the region's name is gone", not found.name_left),
    ]


def spread(took: Sequence[int]) -> dict[str, int]:
    ordered = sorted(took)
    return {name: percentile(ordered, at) for name, at in (("p50", 50), ("p99", 99), ("max", 100))}


def figures(found: Findings, options: argparse.Namespace, protect: str) -> dict[str, Any]:
    """What --json writes."""
    return {
        "protect": protect,
        "seed": options.seed,
        "workers": options.workers,
        "transactions": len(found.acks),
        "seconds": found.seconds,
        "stores": len(found.stores),
        "store_ns": spread(found.stores),
        "latch_ns": spread(found.waits),
        "checkpoint_ns": spread(found.saves),
        "checks": [{"check": text, "ok": ok} for text, ok in checks(found, protect)],
        "killed": len(found.killed),
        "crashed": found.crashed,
        **{
            name: getattr(found, name)
            for name in (
                "strays",
                "victim",
                "repairs",
                "buried",
                "recoveries",
                "stopped",
                "audits",
                "checkpoints",
                "unsaved",
            )
        },
    }


def report(console: Console, found: Findings, options: argparse.Namespace, protect: str) -> None:
    grid = Grid(show_header=False, padding=(0, 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for title, text in story(found, options, protect):
        grid.add_row(title, escape(text))
    console.print(grid, highlight=True)
    books = Grid("sums, read by a fresh process", padding=(0, 1))
    for title in ("after the kill", "after the restart"):
        books.add_column(title, justify="right")
    for name in ("branches", "tellers", "accounts", "history"):
        books.add_row(name, *(f"{audit[name]:,}" for audit in found.audits), end_section=name == "history")
    for name in ("acknowledged", "missing"):
        books.add_row(f"{name} transactions", *(f"{audit[name]:,}" for audit in found.audits))
    console.print(books)
    for text, ok in checks(found, protect):
        console.print(f" [{'green]✓' if ok else 'bold red]✗ NOT SO:'}[/] {text}", highlight=False)


def strays_told(found: Findings, protect: str) -> str:
    caught = sum(stray["caught"] for stray in found.strays)
    missed = [text for kind, text in STRAYS.items() if kind not in CATCHES[protect]]
    beyond = f"; {protect} cannot catch one into a page {', or '.join(missed)}" if missed else ""
    return f"{caught} of {len(found.strays)} caught{beyond}"


def took_told(took: Sequence[int]) -> str:
    at = spread(took)
    return f"p50 {duration(at['p50'])}, p99 {duration(at['p99'])}, max {duration(at['max'])}, of {len(took):,}"


def story(found: Findings, options: argparse.Namespace, protect: str) -> list[tuple[str, str]]:
    victim = found.victim
    count = {name: sum(news[name] for news in found.stopped) for name in found.stopped[0] if name != "news"}
    more = f". {len(found.killed) - 1} more were killed at random moments" if len(found.killed) > 1 else ""
    return [
        (
            "Transactions",
            f"{len(found.acks):,} acknowledged, {len(found.acks) / found.seconds:,.0f} per second, "
            f"by {options.workers} workers; {count['begun'] / max(count['syncs'], 1):.1f} to a sync of the log",
        ),
        (
            "Page change",
            f"{took_told(found.stores)}: from opening a page to having closed it, the store between",
        ),
        ("Latch wait", took_told(found.waits)),
        (
            "Pool",
            f"{options.frames:,} frames for {found.audits[-1]['pages']:,} pages; in runs 1 and 3 "
            f"{count['loads']:,} loads, {count['evictions']:,} evictions, {count['writes']:,} write-backs",
        ),
        (
            "Checkpoints",
            f"{len(found.checkpoints)}, each a snapshot of the pool, saved while transactions ran: "
            f"{took_told(found.saves)}",
        ),
        ("Stray writes", strays_told(found, protect)),
        (
            "Killed in mid-transaction",
            f"worker {victim['slot']}, with {victim['page']} open and half written; the page was made again, "
            f"{victim['undone']} changes were undone; the others made "
            f"{found.acks_at_stop - found.acks_at_kill:,} transactions in the rest of the run{more}",
        ),
        (
            "Everybody killed",
            f"{found.crashed} processes, after {found.acks_at_crash:,} acknowledgements. Recovered in "
            f"{found.recoveries[-1]['seconds']:.2f} s: {recovered(found.recoveries[-1])}",
        ),
    ]


# -- The command ---------------------------------------------------------------------------------------------------


def within(kind: type, low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    add = parser.add_argument
    add("--protect", choices=(*PROTECTIONS, "all"), default="lease", help="how pages are protected (lease)")
    add("--size", type=within(float, 0.25, 65536), default=8.0, help="of the pool in MiB (8)")
    add("--workers", type=within(int, 2, 200), default=4, help="processes that move money (4)")
    add("--seconds", type=within(float, 1, 3600), default=12.0, help="under load, three runs together (12)")
    add("--file", help="the heap; its log is FILE.log; both stay, to be used again (default: temporary ones)")
    add("--accounts", type=within(int, 100, 10**8), help="in a new file (enough for 1.25 times the pool)")
    add("--kills", type=within(int, 0, 1000), default=0, help="more workers, killed at random moments (0)")
    add("--seed", type=int, default=random.SystemRandom().randrange(1 << 16), help="of all choices (random)")
    add("--json", metavar="FILE", help="where to write the figures, too")
    add("--audit", action="store_true", help=argparse.SUPPRESS)
    add("--audit-checkpoint", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.frames = int(options.size * (1 << 20)) // PAGE
    if options.frames < 4 * options.workers:
        parser.error(f"a pool of {options.frames} frames is too small for {options.workers} workers: they need 4 each")
    return options


def prepare(options: argparse.Namespace) -> None:
    """There is a database."""
    if not os.path.exists(options.file):
        accounts = options.accounts or max(1000, options.frames * 5 // 4 * BALANCES_PER_PAGE // 1000 * 1000)
        create_database(options.file, accounts)
        return
    if options.accounts:
        raise DatabaseError(f"{options.file} exists, and --accounts is for a new file")
    Heap(options.file).close()


INTRODUCTIONS: Final = {
    "lease": "Each page is READ for everyone; who changes it leases it, and can write it alone.",
    "window": "Each page is READ for everyone; who changes it leases it, and writes through a second mapping.",
    "mprotect": "Each page is READ for everyone; who changes it opens it with region.mprotect for all, and closes it.",
    "none": "Each page is READ_WRITE for everyone, always.",
    "all": "Four kinds of protection take turns.",
}


def demonstrate(options: argparse.Namespace, console: Console) -> int:
    begin = time.monotonic()
    try:
        console.print(
            f"[bold]A database buffer that processes share[/] (seed {options.seed})\n"
            f"{options.workers} workers move money through {options.frames:,} frames of 8 KiB.\n"
            f"{INTRODUCTIONS[options.protect]}\n",
            highlight=False,
        )
        kept, found = (compare if options.protect == "all" else show)(options, console)
    except (DemoFailed, DatabaseError, OSError, subprocess.SubprocessError) as error:
        console.print(f"[bold red]The demonstration failed:[/] {escape(str(error))}", highlight=False)
        return 1
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    words = "[bold green]All is well" if kept else "[bold red]NOT all is well"
    console.print(f"\n{words}[/] after {time.monotonic() - begin:.1f} s", highlight=False)
    return 0 if kept else 1


def show(options: argparse.Namespace, console: Console) -> tuple[bool, dict[str, Any]]:
    """One kind of protection. (Whether all was well, figures)"""
    protect = options.protect
    prepare(options)
    found = Director(options, protect, console).direct(options.seconds)
    console.print()
    report(console, found, options, protect)
    return all(ok for _, ok in checks(found, protect)), figures(found, options, protect)


def compare(options: argparse.Namespace, console: Console) -> tuple[bool, dict[str, Any]]:
    """All kinds in one run: first by turns, for their speed, then each as `show` does it, in short."""
    directors = {}
    for protect in PROTECTIONS:
        own = argparse.Namespace(**{**vars(options), "file": f"{options.file}.{protect}"})
        prepare(own)
        directors[protect] = Director(own, protect, Console(quiet=True))
    speeds = take_turns(directors, options.seconds)
    kinds = {}
    for protect, director in directors.items():
        console.print(f"{protect}: {statistics.median(speeds[protect]):,.0f} transactions/s; now its accidents")
        found = director.direct(min(options.seconds, 2.0))
        kinds[protect] = figures(found, options, protect) | {"speed": statistics.median(speeds[protect])}
    for kind in kinds.values():
        kind["relative"] = kind["speed"] / kinds["none"]["speed"]
    console.print(compared(kinds))
    failed = [(protect, check["check"]) for protect in kinds for check in kinds[protect]["checks"] if not check["ok"]]
    for protect, text in failed:
        console.print(f" [bold red]✗ NOT SO[/] with {protect}: {escape(text)}", highlight=False)
    return not failed, {"protect": "all", "kinds": kinds}


def take_turns(directors: dict[str, Director], seconds: float) -> dict[str, list[float]]:
    """Transactions per second of each kind, turn by turn. All servers are there, and all but one are stopped."""
    speeds: dict[str, list[float]] = {protect: [] for protect in directors}
    with contextlib.ExitStack() as stack:
        runs = {protect: stack.enter_context(director.run()) for protect, director in directors.items()}
        for protect, run in runs.items():
            run.expect("ready")
            directors[protect].turn(run, 5 * TURN)  # until the pool is full
        order = list(directors)
        for _ in range(max(3, round(seconds / TURN / len(order)))):
            random.shuffle(order)
            for protect in order:
                speeds[protect].append(directors[protect].turn(runs[protect], TURN))
        for protect, run in runs.items():
            os.killpg(run.pid, signal.SIGCONT)
            directors[protect].stop(run)
    return speeds


def compared(kinds: dict[str, Any]) -> Grid:
    grid = Grid("protect", padding=(0, 0), title="Kinds of protection: speed (median), times in µs, accidents")
    titles = ("per s", "of none", "change", "p99", "latch", "p99", "caught", "repairs", "restart")
    for title in titles:
        grid.add_column(title, justify="right", no_wrap=True)
    for protect, kind in kinds.items():
        grid.add_row(
            protect,
            f"{kind['speed']:,.0f}",
            f"{kind['relative']:.0%}",
            *(f"{kind[took][at] / 1e3:,.1f}" for took in ("store_ns", "latch_ns") for at in ("p50", "p99")),
            f"{sum(stray['caught'] for stray in kind['strays'])} of {len(kind['strays'])}",
            f"{len(kind['repairs'])}",
            f"{kind['recoveries'][-1]['seconds']:.2f} s",
        )
    return grid


def main() -> int:
    options = parse_options()
    if options.audit:
        rows = sys.stdin.buffer.read()
        print(
            json.dumps(audit(options.file, (rows[at : at + HISTORY.size] for at in range(0, len(rows), HISTORY.size))))
        )
        return 0
    if options.audit_checkpoint:
        print(json.dumps(audit_checkpoint(options.file)))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: nothing is left
    folder = None if options.file else tempfile.mkdtemp(prefix="pyshare-demo-")
    options.file = options.file or os.path.join(str(folder), "heap")
    try:
        return demonstrate(options, Console())
    except KeyboardInterrupt:
        return 130
    finally:
        if folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
