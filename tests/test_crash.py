"""Promise 5: whoever is killed, wherever it is killed, blocks nobody, leaves nothing half done, and leaks nothing.

The points at which processes kill themselves bear the labels of the protocol (change/change.c and
participant/agent.c in ext).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import resource
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import (
    LOCK,
    PAGE,
    WAITING,
    agreed,
    at_its_limit,
    co_operative,
    elsewhere,
    in_background,
    mapped,
    tell,
    until_waits,
    word,
)
from members import AT_ONCE, SOON, heard

import pyshare
from pyshare import NONE, READ, READ_WRITE, PropagationTimeout, Region

Fork = Callable[..., Child]
Joined = Callable[..., Child]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    """Its slots are taken by this process, a bystander and a victim (at most), so a dead one's must be used again."""
    with pyshare.create(size=16 * PAGE, max_participants=3, engine=request.param) as made:
        yield made


@pytest.fixture
def bystander(region: Region, joined: Joined) -> Child:  # noqa: ARG001
    return joined()


def killed(child: Child) -> bool:
    return child.wait() == -signal.SIGKILL


def changer(region: Region) -> Callable[[Child], None]:
    """A body that makes the first half READ."""

    def body(child: Child) -> None:
        region.mprotect(0, 8 * PAGE, READ)
        idle(child)

    return body


def goes_on(region: Region, joined: Joined, *others: Child) -> None:
    """Those who are left make changes, somebody can join in place of the dead, and everybody agrees."""
    generation = region.mprotect(8 * PAGE, 8 * PAGE, NONE)
    assert generation == region.generation
    assert region.protection(8 * PAGE) == NONE
    agreed(region, *[child.pid for child in others])
    assert len(region.participants()) == 1 + len(others)

    def change(child: Child) -> None:
        child.say()
        child.say(str(region.mprotect(8 * PAGE, PAGE, READ)))
        child.hear()

    successor = joined(change)
    assert int(successor.hear()) == generation + 1
    assert agreed(region, successor.pid, *[child.pid for child in others])[-1] == (9 * PAGE, 7 * PAGE, NONE)
    assert region.protection(8 * PAGE) == READ
    successor.kill()
    assert killed(successor)


# -- At every step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "made"),
    [
        ("C1_lock", False),
        ("C2_save", False),
        ("C3_attempt", True),
        ("C4_map", True),
        ("C5_publish", True),
        ("C6_await", True),
        ("C7_complete", True),
    ],
)
def test_a_killed_caller(region: Region, bystander: Child, fork: Fork, joined: Joined, point: str, made: bool) -> None:
    assert killed(fork(changer(region), point=f"{point}=kill"))
    assert region.mprotect(15 * PAGE, PAGE, NONE) == region.generation == 1 + made
    assert region.protection(0) == region.protection(7 * PAGE) == (READ if made else READ_WRITE)
    goes_on(region, joined, bystander)


@co_operative
@pytest.mark.parametrize("point", ["U1_kind", "U2_map", "U3_publish", "U4_await", "U5_complete"])
def test_a_caller_killed_while_it_undoes(region: Region, fork: Fork, joined: Joined, point: str) -> None:
    region.mprotect(8 * PAGE, 8 * PAGE, READ)
    before = region.protections()
    full = joined(at_its_limit(region))
    tell(full, "fill")
    assert killed(fork(lambda _: region.mprotect(2 * PAGE, 2 * PAGE, READ), point=f"{point}=kill"))
    region.mprotect(8 * PAGE, 8 * PAGE, READ)  # needs no mapping that `full` has not
    assert region.protections() == before
    agreed(region, full.pid)
    assert not any(one.fenced for one in region.participants())
    tell(full, "free 10")
    goes_on(region, joined, full)


@co_operative
@pytest.mark.parametrize("point", ["A1_wait=kill", "A1_wait=kill@2", "A2_apply=kill", "A4_ack=kill"])
def test_a_killed_participant(region: Region, bystander: Child, fork: Fork, joined: Joined, point: str) -> None:
    victim = fork(Child.hear, point=point)
    if point != "A1_wait=kill":
        until(lambda: len(region.participants()) == 3)
    for generation in (1, 2):
        assert region.mprotect(0, 8 * PAGE, READ) == generation
    assert killed(victim)
    goes_on(region, joined, bystander)


@co_operative
def test_a_participant_killed_while_it_fails(region: Region, bystander: Child, joined: Joined) -> None:
    victim = joined(at_its_limit(region), point="A3_fail=kill")
    tell(victim, "fill")
    assert region.mprotect(5 * PAGE, PAGE, READ) == 1, "it is dead, so the change need not be undone"
    assert killed(victim)
    agreed(region, bystander.pid)
    region.mprotect(5 * PAGE, PAGE, READ_WRITE)
    goes_on(region, joined, bystander)


@pytest.mark.parametrize("point", ["J1_claim", "J2_lock", "J3_apply", "J4_live"])
@pytest.mark.parametrize("way", ["fork", "attach"])
def test_a_killed_joiner(region: Region, fork: Fork, joined: Joined, way: str, point: str) -> None:
    def attach(_: Child) -> None:
        region.close()
        pyshare.attach(fd)

    fd = os.dup(region.fileno())
    assert killed(fork(attach, point=f"{point}=kill" + ("@2" if way == "attach" else "")))
    goes_on(region, joined)
    os.close(fd)


@pytest.mark.parametrize("point", ["L1_unmap", "L2_leave"])
def test_a_killed_leaver(region: Region, bystander: Child, fork: Fork, joined: Joined, point: str) -> None:
    assert killed(fork(lambda _: region.close(), point=f"{point}=kill"))
    goes_on(region, joined, bystander)


# -- While somebody waits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["C2_save", "C4_map", "C6_await", "C7_complete"])
def test_a_caller_killed_while_others_wait_for_the_lock(region: Region, fork: Fork, point: str) -> None:
    holder = fork(changer(region), point=f"{point}=stop")
    holder.wait_stopped()
    calls = [lambda page=page: region.mprotect(page * PAGE, PAGE, NONE, timeout=None) for page in (12, 13, 14)]
    with in_background(*calls) as generations:
        until(lambda: word(region, LOCK) & WAITING)
        holder.kill()
    first = 1 if point == "C2_save" else 2
    assert sorted(generations) == [first, first + 1, first + 2]
    assert agreed(region)[-2:] == [(12 * PAGE, 3 * PAGE, NONE), (15 * PAGE, PAGE, READ_WRITE)]


@pytest.mark.parametrize("point", ["C4_map", "C5_publish", "C6_await"])
def test_a_store_beside_a_change_whose_caller_has_died(region: Region, joined: Joined, fork: Fork, point: str) -> None:
    """It is refused at once: nobody may come to finish the change.  A busy machine may be slow; so one of some is."""

    def body(child: Child) -> None:
        region.on_violation("raise")
        child.say()
        while child.hear() == "ok":
            start = time.monotonic()
            with pytest.raises(pyshare.ProtectionError):
                region.buf[0] = 1
            child.say(str(time.monotonic() - start))

    child, took = joined(body), []
    while len(took) < 5 and min(took, default=SOON) >= SOON:
        region.mprotect(0, 2 * PAGE, READ)
        author = fork(lambda _: region.mprotect(0, 2 * PAGE, NONE), point=f"{point}=kill")
        assert killed(author)
        child.say()
        took.append(float(child.hear()))
    child.say("enough")
    assert min(took) < SOON


@pytest.mark.parametrize("point", ["U1_kind", "U2_map"])
def test_a_store_beside_a_change_that_is_to_be_undone(fork: Fork, point: str) -> None:
    """Its caller has died, the next one undoes it, and nobody was refused what no change forbade."""

    def store(child: Child) -> None:
        region.on_violation("raise")
        child.say()
        child.hear()
        region.buf[5 * PAGE] = 1
        child.say("stored")

    with pyshare.create(size=16 * PAGE, engine="mprotect", max_participants=4) as region:
        limit, child = fork(at_its_limit(region)), fork(store)
        assert limit.hear() == child.hear() == "ok"
        tell(limit, "fill")
        assert killed(fork(lambda _: region.mprotect(5 * PAGE, PAGE, READ), point=f"{point}=kill"))
        child.say()
        assert not heard(child, AT_ONCE)
        region.mprotect(0, PAGE, READ_WRITE)
        assert child.hear() == "stored"


@co_operative
def test_a_participant_killed_while_a_caller_waits_for_it(region: Region, bystander: Child, joined: Joined) -> None:
    for prot in (READ, NONE, READ_WRITE):
        victim = joined()
        victim.stop()
        with in_background(lambda prot=prot: region.mprotect(0, PAGE, prot, timeout=None)) as outcomes:
            until(lambda prot=prot: region.protection(0) == prot)
            assert outcomes == []
            victim.kill()
        assert outcomes == [region.generation]
        assert killed(victim)
    goes_on(region, joined, bystander)


# -- A killed process whose threads sit in system calls ---------------------------------------------------------------


def test_nothing_is_stored_by_the_dead(fork: Fork, tmp_path: Path) -> None:
    """The kernel goes on copying for a killed thread; a change returns only when that is over."""
    size = 32 << 20
    big = tmp_path / "big"
    big.write_bytes(b"\x55" * size)

    def reader(child: Child) -> None:
        file = os.open(big, os.O_RDONLY)

        def read() -> None:
            while True:
                os.preadv(file, [region.buf], 0)

        threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: region.buf[0] == region.buf[size - 1] == 0x55)
        child.say()
        threads[0].join()

    with pyshare.create(size=size, max_participants=4) as region:
        control = word(region, 16, "Q")  # its size: the data begin there, and can be written past any protection
        with mmap.mmap(region.fileno(), control + size) as memory:
            marks = np.frombuffer(memory, np.uint8, size, control)[::PAGE]
            for _ in range(25):
                region.mprotect(0, size, READ_WRITE)
                region.write(0, bytes(size))
                victim = fork(reader)
                assert victim.hear() == "ok"
                victim.kill()
                region.mprotect(0, size, READ)
                marks[:] = 0xAA
                assert killed(victim)
                assert (marks == 0xAA).all()
            del marks


# -- Pid namespaces ---------------------------------------------------------------------------------------------------


def test_participants_in_other_pid_namespaces(fork: Fork, joined: Joined) -> None:
    def obey(child: Child) -> None:
        assert os.getpid() < 10, "the first in a namespace of their own"
        child.say()
        while prot := child.hear():
            child.say(str(region.mprotect(0, 2 * PAGE, int(prot), timeout=None)))

    with pyshare.create(size=8 * PAGE, max_participants=8) as region:
        here = joined()
        other, pid = elsewhere(fork, obey)
        assert other.hear() == "ok"
        region.mprotect(4 * PAGE, PAGE, READ)
        agreed(region, here.pid, pid)
        other.say("1")
        assert other.hear() == "2"
        agreed(region, here.pid, pid)
        # Each finds the other side's death.
        here.stop()
        other.say("0")
        until(lambda: region.protection(0) == NONE)
        here.kill()
        assert other.hear() == "3"
        with in_background(lambda: os.kill(pid, signal.SIGKILL)):
            region.mprotect(4 * PAGE, PAGE, NONE, timeout=None)
        assert other.wait() == signal.SIGKILL
        region.mprotect(4 * PAGE, PAGE, READ)
        agreed(region)


@pytest.mark.parametrize("where", ["here", "in another namespace"])
def test_a_lost_agent_is_not_death(fork: Fork, where: str) -> None:
    """Only its thread is gone, and threads of its process may store; the next call there starts another."""

    def body(child: Child) -> None:
        child.say(str(os.getpid()))
        child.hear()
        assert region.generation == 1
        idle(child)

    with pyshare.create(size=8 * PAGE, max_participants=8) as region:
        if where == "here":
            child = fork(body, point="A1_wait=exit")
            pid = child.pid
        else:
            child, pid = elsewhere(fork, body, "A1_wait=exit")
        name = int(child.hear())
        until(lambda: len(os.listdir(f"/proc/{pid}/task")) == 1)
        with pytest.raises(PropagationTimeout) as caught:
            region.mprotect(0, PAGE, READ, timeout=0.5)
        assert caught.value.pids == [name]
        assert mapped(pid, region) == [(0, region.size, READ_WRITE)]
        tell(child, "call")
        region.mprotect(PAGE, PAGE, NONE)
        agreed(region, pid)


@pytest.mark.parametrize("point", ["C2_save", "C4_map", "C6_await", "C7_complete"])
def test_the_lock_is_taken_over_across_pid_namespaces(fork: Fork, point: str) -> None:
    with pyshare.create(size=16 * PAGE, max_participants=8) as region:
        # From a namespace to here.
        other, _ = elsewhere(fork, changer(region), f"{point}=kill")
        assert other.wait() == signal.SIGKILL
        region.mprotect(15 * PAGE, PAGE, NONE)
        assert region.protection(0) == (READ_WRITE if point == "C2_save" else READ)
        # From here into a namespace.
        assert killed(fork(changer(region), point=f"{point}=kill"))
        other, pid = elsewhere(fork, lambda child: child.say(str(region.mprotect(0, PAGE, NONE))) or child.hear())
        assert int(other.hear()) == region.generation
        agreed(region, pid)
        os.kill(pid, signal.SIGKILL)
        assert other.wait() == signal.SIGKILL


# -- Anybody, anywhere, at any time -----------------------------------------------------------------------------------


def test_random_kills(fork: Fork) -> None:
    """Processes change, attach, close and fork; one after the other is killed; the others always make progress."""
    processes, kills, pages = 4, 80, 64
    reader, writer = os.pipe()
    dice = random.Random(6)

    def live(child: Child) -> None:
        over: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: over.append(number))
        child.say()
        own = random.Random(os.getpid())
        while not over:
            first = own.randrange(pages)
            count = own.randrange(1, pages - first + 1)
            region.mprotect(first * PAGE, count * PAGE, own.choice([NONE, READ, READ_WRITE]), timeout=PATIENCE)
            if own.random() < 0.2:
                with pyshare.attach(region.fileno(), timeout=PATIENCE) as other:
                    other.mprotect(first * PAGE, PAGE, READ, timeout=PATIENCE)
            os.write(writer, b".")
        idle(child)

    def progress(count: int) -> None:
        for _ in range(count):
            assert select.select([reader], [], [], PATIENCE)[0], "nobody makes progress"
            os.read(reader, 1)

    with pyshare.create(size=pages * PAGE, max_participants=2 * processes + 4) as region:
        alive = [fork(live) for _ in range(processes)]
        for _ in range(kills):
            progress(dice.randrange(60))
            victim = alive.pop(dice.randrange(processes))
            victim.kill()
            alive.append(fork(live))
            assert killed(victim)
        progress(100)
        for child in alive:
            assert child.hear() == "ok"
            child.kill(signal.SIGUSR1)
            assert child.hear() == "ok"
        region.mprotect(0, PAGE, READ)
        pids = [child.pid for child in alive]
        agreed(region, *pids)
        assert sorted(one.pid for one in region.participants()) == sorted([os.getpid(), *pids])
    os.close(reader)
    os.close(writer)


# -- What is left -----------------------------------------------------------------------------------------------------


def test_memory_and_name_go_with_the_last_holder_however_it_ends(fork: Fork) -> None:
    size, name = 512 << 20, f"crash-{os.getpid()}"

    def shared() -> int:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
        return int(line.split()[1]) << 10

    def create(child: Child) -> None:
        region = pyshare.create(name, size=size)
        ctypes.memset(region.address, 1, size)
        other = Child(lambda _: child.hear())
        region.mprotect(0, size, READ)
        child.say(str(other.pid))
        other.wait()

    parent = fork(create)
    child = int(parent.hear())
    assert name in pyshare.names()
    held = shared()
    assert held > size
    parent.kill()
    assert killed(parent)
    with pyshare.attach(name) as region:
        assert region.read(size - 1, 1) == b"\x01"
        os.kill(child, signal.SIGKILL)
        region.mprotect(0, PAGE, NONE)
    until(lambda: shared() < held - size // 2)  # others on this machine come and go with theirs
    assert name not in pyshare.names()
    with pyshare.create(name, size=PAGE) as region:
        assert region.generation == 0


def test_a_core_dump_is_detected_and_holds_no_data(fork: Fork, tmp_path: Path) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() not in ("core", "core.%p"):
        pytest.skip("core dumps do not go to the working directory here")

    def dump(child: Child) -> None:
        os.chdir(tmp_path)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's background job ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        private = bytearray(os.urandom(32))
        child.say(private.hex())
        child.hear()

    with pyshare.create(size=256 << 20) as region:
        victim = fork(dump)
        private = bytes.fromhex(victim.hear())
        secret = os.urandom(32)
        region.write(5 * PAGE, secret)
        victim.kill(signal.SIGQUIT)
        assert region.mprotect(0, region.size, READ) == 1
        assert victim.wait() == -signal.SIGQUIT
        (core,) = tmp_path.glob("core*")
        dumped = core.read_bytes()
        core.unlink()
        assert private in dumped
        assert secret not in dumped
        assert len(dumped) < region.size


def take_small_stack(room: int) -> None:
    """For handlers of signals: what the kernel wants of it, and so many bytes; below it is a page that kills."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = libc.getauxval(51) + room  # AT_MINSIGSTKSZ
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(PAGE + size), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    assert libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), 0) == 0
    stack = struct.pack("@PiP", at + PAGE, 0, size)
    assert libc.sigaltstack(stack, None) == 0


def test_the_handler_needs_little_stack(region: Region, joined: Joined) -> None:
    """faulthandler's has 16 KiB, from the heap, with nothing below it that would tell: here it thaws for a dead
    freezer, and saves for a snapshot."""

    def freeze(child: Child) -> None:
        idle(child)
        with region.frozen():
            os.kill(os.getpid(), signal.SIGKILL)

    def store(child: Child) -> None:
        idle(child)
        take_small_stack(8 * 1024)
        view = region.buf  # each look at it is a call, which would thaw
        child.say()
        child.hear()
        for value in (1, 2):
            view[0] = value
            idle(child)

    region.mprotect(0, region.size, READ_WRITE)
    victim, writer = joined(freeze), joined(store)
    tell(writer, "stack")
    victim.say()
    assert killed(victim)
    tell(writer, "store")
    with region.snapshot() as snap:
        tell(writer, "store once more")
        assert snap.read(0, 1) == b"\1"
    assert region.read(0, 1) == b"\2"


@pytest.mark.parametrize("engine", ["mprotect", "uffd"])
def test_a_change_that_another_left_is_nobodys_own(engine: str, fork: Fork, joined: Joined) -> None:
    """Who waits for the end of a freeze finishes the record of a dead snapshotter, and gives up: nothing is made."""

    def freeze(child: Child) -> None:
        idle(child)
        with region.frozen():
            idle(child)

    def change(child: Child) -> None:
        idle(child)
        with pytest.raises(PropagationTimeout, match="nothing was changed") as caught:
            region.mprotect(0, PAGE, READ_WRITE, timeout=1.5)
        assert caught.value.generation is None
        idle(child)

    with pyshare.create(size=16 * PAGE, prot=READ, engine=engine) as region:
        freezer, caller = joined(freeze), joined(change)
        tell(freezer, "freeze")
        caller.say()
        until_waits(caller)
        assert killed(fork(lambda _: region.snapshot(), point="C6_await=kill"))
        assert caller.hear() == "ok"
        assert region.protection(0) == READ
