"""Every promise at once: real processes, driven at random by hypothesis, against a plain model.

An actor is a process that does what it is told over a socket.  The model is a list of pages, each with its
protection, the change that set it and its author, and a byte of data; and who participates, by which engine, and who
is stopped.  After every step each participant must have, in its /proc/PID/smaps and pagemap, exactly the protections of
the model; a stopped one too, unless the last change says that it is late.

The steps are the same at each run; --stress looks for others, and for longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from conftest import PATIENCE
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import pyshare
from pyshare import NONE, READ, READ_WRITE, WRITE

PAGE, PAGES, ACTORS = 4096, 9, 4
SIZE = PAGES * PAGE - 100
SILENCE = 0.2  # seconds that a change gives to those whom we have stopped


# -- Actors ------------------------------------------------------------------------------------------------------------


class Actor:
    """A process that calls pyshare for us."""

    def __init__(self, pid: int, link: socket.socket, *, child: bool) -> None:
        self.pid, self.link, self.child = pid, link, child
        self.pidfd = os.pidfd_open(pid)
        self.attached = self.stopped = self.late = False
        self.engine = ""
        self.address = 0
        self.looked_at = -1
        link.settimeout(PATIENCE)

    @classmethod
    def start(cls) -> Actor:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those whom it forks are not for us to reap
                serve(theirs)
            finally:
                os._exit(1)
        theirs.close()
        return cls(pid, ours, child=True)

    def tell(self, *order: object) -> None:
        self.link.send(pickle.dumps(order))

    def hear(self) -> Any:
        """The result; what the call raised is raised here."""
        message, descriptors, _, _ = socket.recv_fds(self.link, 1 << 16, 1)
        assert message, f"actor {self.pid} is gone"
        result = pickle.loads(message)
        if isinstance(result, BaseException):
            raise result
        return Actor(result, socket.socket(fileno=descriptors[0]), child=False) if descriptors else result

    def ask(self, *order: object) -> Any:
        self.tell(*order)
        return self.hear()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Until it has ended by itself, or by what it did."""
        assert select.select([self.pidfd], [], [], PATIENCE)[0], f"actor {self.pid} does not die"
        if self.child:
            os.waitpid(self.pid, 0)
        self.link.close()
        os.close(self.pidfd)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: all(state == "T" for state in self._states()))
        self.stopped = True

    def _states(self) -> list[str]:
        return [path.read_text().rsplit(")", 1)[1].split()[0] for path in Path(f"/proc/{self.pid}/task").glob("*/stat")]

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self.stopped = False

    def protections(self, file: str = "smaps") -> list[int]:
        """What the kernel says of each page; -1 where it is not shared memory."""
        found: dict[int, int] = {}
        text = Path(f"/proc/{self.pid}/{file}").read_text()
        for begin, end, flags in re.findall(r"^(\w+)-(\w+) ([r-][w-][x-])s ", text, re.M):
            bits = sum(bit for bit, flag in zip((1, 2, 4), flags, strict=True) if flag != "-")
            found |= dict.fromkeys(range(int(begin, 16), int(end, 16), PAGE), bits)
        told = [found.get(self.address + page * PAGE, -1) for page in range(PAGES)]
        return [READ if prot == READ_WRITE and mark else prot for prot, mark in zip(told, self._marks(), strict=True)]

    def _marks(self) -> list[bool]:
        with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), PAGES * 8, self.address // PAGE * 8)
        return [bool(entry >> 57 & 1) for entry in struct.unpack(f"{PAGES}Q", entries)]

    def follows(self, pages: list[PageModel], file: str = "maps") -> bool:
        """On x86-64 what may be written may be read; not every engine says so."""
        return [prot | READ if prot > 0 and prot & WRITE else prot for prot in self.protections(file)] == [
            page.prot | READ if page.prot & WRITE else page.prot for page in pages
        ]


def until(condition: Callable[[], bool]) -> None:
    """Asks until it is so; what it asks takes its time, so nobody sleeps."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"


def serve(link: socket.socket) -> None:
    """An actor's life: orders are method names of this module's `Calls`."""
    os.closerange(3, link.fileno())
    os.closerange(link.fileno() + 1, 1 << 16)
    calls = Calls(link)
    while message := calls.link.recv(1 << 16):
        name, *arguments = pickle.loads(message)
        try:
            result = getattr(calls, name)(*arguments)
        except (pyshare.ShareError, OSError) as error:
            result = error
        if result is not calls:
            calls.link.send(pickle.dumps(result))
    os._exit(0)


class Calls:
    """What an actor can be told to do."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.region: Any = None
        self.view: Any = None
        self.frozen: Any = None

    def create(self, name: str, engine: str) -> int:
        self.region = pyshare.create(name, size=SIZE, max_participants=3 * ACTORS, engine=engine)
        return self._begin()

    def attach(self, name: str, engine: str) -> int:
        self.region = pyshare.attach(name, engine=engine)
        return self._begin()

    def _begin(self) -> int:
        self.view = self.region.buf
        return int(self.region.address)

    def close(self) -> None:
        self.view = None
        self.region.close()

    def mprotect(self, first: int, count: int, prot: int, timeout: float) -> int:
        length = min(count * PAGE, SIZE - first * PAGE)
        return int(self.region.mprotect(first * PAGE, length, prot, timeout=timeout))

    def read(self, page: int) -> int:
        return int(self.region.read(page * PAGE, 1)[0])

    def write(self, page: int, value: int) -> None:
        self.region.write(page * PAGE, bytes([value]))

    def store(self, page: int, value: int) -> None:
        self.view[page * PAGE] = value

    def lease(self, page: int, value: int, window: bool, timeout: float = PATIENCE) -> None:
        length = min(PAGE, SIZE - page * PAGE)
        with self.region.lease(page * PAGE, length, window=window, timeout=timeout) as lease:
            lease.view[0] = value

    def freeze(self) -> int:
        self.frozen = self.region.frozen(timeout=PATIENCE)
        return int(self.frozen.generation)

    def thaw(self) -> None:
        self.frozen.release()

    def facts(self) -> tuple[int, list[int], dict[int, int]]:
        """Generation; protections by page; participants that live, and what they have applied."""
        region = self.region
        pages = [int(region.protection(page * PAGE)) for page in range(PAGES)]
        return region.generation, pages, {one.pid: one.applied for one in region.participants() if one.alive}

    def lose_descriptors(self) -> None:
        os.closerange(3, self.link.fileno())
        os.closerange(self.link.fileno() + 1, 1 << 16)

    def fork(self, point: str = "") -> Calls:
        """The child serves too; `point` is where it dies (ext/os/point.h)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.environ["PYSHARE_POINT"] = point
        pid = os.fork()
        if pid == 0:
            ours.close()
            self.link.close()
            self.link = theirs
        else:
            socket.send_fds(self.link, [pickle.dumps(pid)], [ours.fileno()])
            ours.close()
            theirs.close()
        return self  # no reply but this one


# -- The model ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class PageModel:
    prot: int = READ_WRITE
    generation: int = 0
    author: int = 0
    value: int = 0


WHO = st.integers(0, ACTORS - 1)  # of those whom a step may take
LABELS = st.sampled_from(["C1_lock", "C2_save", "C3_attempt", "C4_map", "C5_publish", "C6_await", "C7_complete"])
FREEZE_LABELS = st.sampled_from(["F1_own", "F2_keep", "F3_freeze", "C4_map", "C6_await", "F4_thaw", "F5_clear"])
PAGE_OF, FEW, PROT, BYTE = st.integers(0, PAGES - 1), st.integers(1, PAGES), st.integers(0, 3), st.integers(1, 255)


def step(*, where: Callable[[Machine], object], **drawn: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """A rule of the machine that is possible where `where` is true."""
    return lambda function: precondition(where)(rule(**drawn)(function))


def one_of(actors: list[Actor], who: int) -> Actor:
    return actors[who % len(actors)]


class Machine(RuleBasedStateMachine):
    """The processes that there are, and what must be true of them."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"machine-{os.getpid()}"
        self.actors: list[Actor] = []
        self.generation = 0
        self.pages: list[PageModel] = []

    def teardown(self) -> None:
        for actor in self.actors:
            actor.kill()
        assert self.name not in pyshare.names()

    # Who there is

    def running(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.stopped]

    def stopped(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.stopped]

    def outside(self) -> list[Actor]:
        return [actor for actor in self.running() if not actor.attached]

    def attached(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.attached]

    def users(self) -> list[Actor]:
        return [actor for actor in self.running() if actor.attached]

    def silent(self) -> set[int]:
        return {actor.pid for actor in self.stopped() if actor.attached}

    # Coming and going

    @step(where=lambda self: len(self.actors) < ACTORS)
    def start(self) -> None:
        self.actors.append(Actor.start())

    @step(where=outside, who=WHO, engine=st.sampled_from(["auto", "mprotect"]))
    def join(self, who: int, engine: str) -> None:
        """Creates where there is nothing, attaches where there is; the other is refused."""
        actor = one_of(self.outside(), who)
        if self.attached():
            with pytest.raises(pyshare.RegionExists):
                actor.ask("create", self.name, engine)
            actor.address = actor.ask("attach", self.name, engine)
        else:
            with pytest.raises(pyshare.RegionNotFound):
                actor.ask("attach", self.name, engine)
            actor.address = actor.ask("create", self.name, engine)
            self.generation, self.pages = 0, [PageModel(author=actor.pid) for _ in range(PAGES)]
        actor.attached, actor.late, actor.engine = True, False, engine

    @step(where=lambda self: self.running() and len(self.actors) < ACTORS, who=WHO)
    def fork(self, who: int) -> None:
        """Promise 6: the child is a participant, at the same address."""
        actor = one_of(self.running(), who)
        child = actor.ask("fork")
        child.attached, child.address, child.engine = actor.attached, actor.address, actor.engine
        self.actors.append(child)
        if child.attached:
            assert child.pid in child.ask("facts")[2]

    @step(where=lambda self: len(self.attached()) > 1 and self.users(), who=WHO)
    def close(self, who: int) -> None:
        self.leave(one_of(self.users(), who))

    @step(where=lambda self: len(self.users()) == ACTORS)
    def close_all(self) -> None:
        for actor in self.users():
            self.leave(actor)

    def leave(self, actor: Actor) -> None:
        actor.ask("close")
        actor.attached = False
        assert actor.protections() == [-1] * PAGES

    @step(where=lambda self: len(self.actors) == ACTORS, who=WHO)
    def kill(self, who: int) -> None:
        self.bury(one_of(self.actors, who))

    def bury(self, actor: Actor) -> None:
        self.actors.remove(actor)
        actor.kill()

    @step(where=users, who=WHO)
    def lose_descriptors(self, who: int) -> None:
        """Promise 10."""
        one_of(self.users(), who).ask("lose_descriptors")

    @step(where=lambda self: len(self.running()) > 2, who=WHO)
    def stop(self, who: int) -> None:
        one_of(self.running(), who).stop()

    @step(where=stopped, who=WHO)
    def resume(self, who: int) -> None:
        actor = one_of(self.stopped(), who)
        actor.resume()
        if actor.attached:
            self.catch_up(actor)

    def catch_up(self, actor: Actor) -> None:
        until(lambda: actor.ask("facts")[2][actor.pid] == self.generation)
        actor.late = False

    # Changing

    def changed(self, author: Actor, first: int, count: int, prot: int) -> None:
        self.generation += 1
        for page in self.pages[first : first + count]:
            page.prot, page.generation, page.author = prot, self.generation, author.pid

    @step(where=users, who=WHO, number=PAGE_OF, prot=PROT)
    def mprotect_a_page(self, who: int, number: int, prot: int) -> None:
        self.change(who, number, 1, prot)

    @step(where=users, who=WHO, first=PAGE_OF, count=FEW, prot=PROT)
    def mprotect(self, who: int, first: int, count: int, prot: int) -> None:
        self.change(who, first, count, prot)

    def change(self, who: int, first: int, count: int, prot: int) -> None:
        """With everybody, or, where somebody who is stopped is out of reach, committed without him (promise 7)."""
        actor, count = one_of(self.users(), who), min(count, PAGES - first)
        out_of_reach = {other.pid for other in self.stopped() if other.attached and other.engine == "mprotect"}
        late: set[int] = set()
        try:
            generation = actor.ask("mprotect", first, count, prot, SILENCE if self.silent() else PATIENCE)
        except pyshare.PropagationTimeout as timeout:
            if not self.silent():
                raise
            generation, late = timeout.generation, set(timeout.pids)
        # On a busy machine somebody who runs may have been late too; that one must follow.
        assert out_of_reach <= late <= {other.pid for other in self.attached()}
        self.changed(actor, first, count, prot)
        assert generation == self.generation
        for other in self.attached():
            other.late = other.pid in late
        for other in self.users() if late else []:
            self.catch_up(other)

    @step(where=lambda self: self.users() and not self.silent(), who=WHO, first=PAGE_OF, prot=PROT, label=LABELS)
    def kill_a_caller(self, who: int, first: int, prot: int, label: str) -> None:
        """Promise 5: dead in the middle of a step, it leaves all of its change behind, or nothing."""
        survivor, count = one_of(self.users(), who), PAGES - first
        victim = survivor.ask("fork", f"{label}=kill")
        victim.address = survivor.address
        victim.tell("mprotect", first, count, prot, PATIENCE)
        victim.wait()
        if label not in ("C1_lock", "C2_save"):
            self.changed(victim, first, count, prot)
        self.change(who, PAGES - 1, 1, READ)

    # Freezing

    def freeze(self, actor: Actor) -> list[PageModel]:
        """Everything is READ; what it was."""
        generation = actor.ask("freeze")
        kept = [dataclasses.replace(page) for page in self.pages]
        self.changed(actor, 0, PAGES, READ)
        assert generation == self.generation
        return kept

    def thawed(self, kept: list[PageModel]) -> None:
        """Everything is what it was, with the change that made it so."""
        self.generation += 1
        self.pages = kept
        for other in self.attached():
            other.late = False

    @step(where=lambda self: self.users() and not self.silent(), who=WHO, looker=WHO)
    def freeze_and_thaw(self, who: int, looker: int) -> None:
        """Leases and changes of others have to wait."""
        actor = one_of(self.users(), who)
        kept = self.freeze(actor)
        self.page_tables_follow()
        self.participants_agree()
        other = one_of(self.users(), looker)
        for call in [("mprotect", 0, 1, READ, 0.01), ("lease", 0, 1, False, 0.01)] if other is not actor else []:
            with pytest.raises(pyshare.PropagationTimeout) as caught:
                other.ask(*call)
            assert caught.value.pids == [actor.pid]
        actor.ask("thaw")
        self.thawed(kept)

    @step(where=lambda self: len(self.users()) > 1 and not self.silent(), who=WHO)
    def kill_a_freezer(self, who: int) -> None:
        """Whoever calls next finds exactly what was."""
        actor = one_of(self.users(), who)
        kept = self.freeze(actor)
        self.bury(actor)
        one_of(self.users(), who).ask("facts")
        self.thawed(kept)

    @step(where=lambda self: self.users() and not self.silent(), who=WHO, label=FREEZE_LABELS)
    def kill_who_freezes(self, who: int, label: str) -> None:
        """Dead in the middle of a step, it leaves nothing frozen."""
        survivor = one_of(self.users(), who)
        victim = survivor.ask("fork", f"{label}=kill")
        victim.address = survivor.address
        victim.tell("freeze")
        if label in ("F4_thaw", "F5_clear"):
            victim.hear()
            victim.tell("thaw")
        victim.wait()
        self.generation = survivor.ask("facts")[0]

    # Using

    def refused(self, number: int, need: int, call: Callable[[], object]) -> None:
        page = self.pages[number]
        with pytest.raises(pyshare.ProtectionError) as caught:
            call()
        error = caught.value
        assert (error.offset, error.required, error.actual) == (number * PAGE, need, page.prot)
        assert (error.generation, error.author) == (page.generation, page.author)

    @step(where=users, who=WHO, number=PAGE_OF)
    def read(self, who: int, number: int) -> None:
        actor, page = one_of(self.users(), who), self.pages[number]
        if page.prot == NONE:
            self.refused(number, READ, lambda: actor.ask("read", number))
        else:  # on x86-64 what can be written can be read
            assert actor.ask("read", number) == page.value

    @step(where=users, who=WHO, number=PAGE_OF, value=BYTE)
    def write(self, who: int, number: int, value: int) -> None:
        actor, page = one_of(self.users(), who), self.pages[number]
        if page.prot & WRITE:
            actor.ask("write", number, value)
            page.value = value
        else:
            self.refused(number, WRITE, lambda: actor.ask("write", number, value))

    @step(where=users, who=WHO, number=PAGE_OF, value=BYTE, window=st.booleans())
    def lease(self, who: int, number: int, value: int, window: bool) -> None:
        """A page that all may read is written by whoever has it leased."""
        actor, page = one_of(self.users(), who), self.pages[number]
        if page.prot == NONE:
            with pytest.raises(pyshare.ProtectionError):
                actor.ask("lease", number, value, window)
        else:
            actor.ask("lease", number, value, window)
            page.value = value

    @step(where=users, who=WHO, number=PAGE_OF, value=BYTE)
    def store(self, who: int, number: int, value: int) -> None:
        """Through a memoryview made at the join: it goes through, or ends the process."""
        actor, page = one_of(self.users(), who), self.pages[number]
        if page.prot & WRITE:
            actor.ask("store", number, value)
            page.value = value
        else:
            actor.tell("store", number, value)
            self.actors.remove(actor)
            actor.wait()

    # Always

    @invariant()
    def page_tables_follow(self) -> None:
        """Promises 1 and 2."""
        for actor in self.attached():
            # smaps takes long, so it is read once a change; maps says the same of protections.
            file = "maps" if actor.looked_at == self.generation else "smaps"
            assert actor.late or actor.follows(self.pages, file)
            actor.looked_at = self.generation

    @invariant()
    def participants_agree(self) -> None:
        """Promise 3, and who takes part."""
        for actor in self.users():
            generation, pages, applied = actor.ask("facts")
            assert generation == self.generation
            assert pages == [page.prot for page in self.pages]
            assert set(applied) == {other.pid for other in self.attached()}
            assert all(applied[other.pid] == generation for other in self.users())

    @invariant()
    def name_leads_to_holders(self) -> None:
        """Promise 8."""
        assert (self.name in pyshare.names()) == bool(self.attached())


def test_promises_against_the_model(stress: bool) -> None:
    run_state_machine_as_test(
        Machine,
        settings=hypothesis.settings(
            max_examples=1000 if stress else 25,
            stateful_step_count=60 if stress else 40,
            deadline=None,
            derandomize=not stress,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],  # a failure names its steps; shrinking them takes long
        ),
    )
