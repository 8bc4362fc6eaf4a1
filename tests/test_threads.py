"""The native threads of a process: what they need, and what one that is ended alone leaves behind."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import PAGE, end_thread_at, slot_is_taken, tell

import pyshare
from pyshare import NONE, READ, READ_WRITE, PropagationTimeout, ProtectionError, Region, Snapshot

Fork = Callable[..., Child]
Joined = Callable[..., Child]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def test_libraries_may_have_many_thread_local_variables(run_python: RunPython, tmp_path: Path) -> None:
    """They lie on each thread's stack (glibc), which has to have room for them."""
    source, library = tmp_path / "large.c", tmp_path / "large.so"
    source.write_text("__thread char large[300000] = {1}; char *where(void) { return large; }")
    command = [os.environ.get("CC") or "cc", "-shared", "-fPIC", "-ftls-model=initial-exec", "-o", library, source]
    subprocess.run(command, check=True)
    ran = run_python(
        """
import asyncio, os, pyshare
async def wait(region):
    async with region.lock_async(0):
        pass
with pyshare.create(size=1 << 20) as region:
    lock = region.lock(0)
    region.mprotect(0, 4096, pyshare.READ)
    pid = os.fork()
    if pid == 0:
        region.mprotect(4096, 4096, pyshare.READ)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    lock.release()
    asyncio.run(wait(region))
""",
        LD_PRELOAD=str(library),
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_two_threads_finish_snapshots_of_a_region_amid_the_garbage_collector(fork: Fork) -> None:
    """Which lets other threads run wherever something is made; that was where a thread noted that it clears away."""
    failed: list[BaseException] = []

    def finish(region: Region, together: threading.Barrier) -> None:
        try:
            snapshot = region.snapshot()
            together.wait()
            lists: list[list[int]] = [[] for _ in range(100)]  # more than Python keeps for those who make some
            snapshot.finish()
            snapshot.close()
            lists.clear()
        except BaseException as error:
            failed.append(error)

    def body(_: Child) -> None:
        gc.callbacks.append(lambda *_: time.sleep(0))
        gc.set_threshold(1)
        for _turn in range(200):
            with pyshare.create(size=PAGE) as region:
                together = threading.Barrier(2)
                threads = [threading.Thread(target=finish, args=[region, together]) for _ in range(2)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        gc.set_threshold(700)
        assert failed == []

    assert fork(body).wait() == 0


# -- Ended alone, as a seccomp filter does it --------------------------------------------------------------------------

JOINING = ["J1_claim", "J2_lock", "J3_apply", "J4_live"]


@pytest.mark.parametrize("step", JOINING)
def test_attach_tells_of_a_thread_that_is_ended_as_it_begins(fork: Fork, step: str) -> None:
    name = f"threads-{os.getpid()}"

    def body(child: Child) -> None:
        idle(child)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match=r"attach: the native thread .* was ended as it began") as caught:
            pyshare.attach(name, timeout=None)
        assert caught.value.errno == errno.EOWNERDEAD
        assert len(os.listdir("/proc/self/task")) == 1
        assert os.listdir("/proc/self/fd") == before
        idle(child)
        with pyshare.attach(name) as region:
            region.mprotect(0, PAGE, READ)

    child = fork(body, point=f"{step}=exit")
    assert child.hear() == "ok"
    with pyshare.create(name, size=16 * PAGE, max_participants=2) as region:
        tell(child, "attach")
        assert not slot_is_taken(region, 1)
        assert region.mprotect(PAGE, PAGE, READ) == 1
        child.say()
        assert child.wait() == 0
        assert region.generation == 2


@pytest.mark.parametrize("step", JOINING)
def test_a_fork_ends_where_the_childs_thread_does(fork: Fork, step: str) -> None:
    with pyshare.create(size=16 * PAGE, max_participants=2) as region:
        child = fork(lambda _: region.mprotect(0, PAGE, READ), point=f"{step}=exit")
        assert child.wait() == 0  # its first call has joined again
        assert region.mprotect(PAGE, PAGE, READ) == 2


@pytest.mark.parametrize("step", ["A1_wait", "L1_unmap", "L2_leave"])
def test_close_ends_where_its_thread_does(joined: Joined, step: str) -> None:
    with pyshare.create(size=16 * PAGE, max_participants=2) as region:
        child = joined(lambda child: (idle(child), region.close(), idle(child)), point=f"{step}=exit")
        tell(child, "close")
        assert not slot_is_taken(region, 1)
        assert region.mprotect(PAGE, PAGE, READ) == 1
        assert [one.pid for one in region.participants()] == [os.getpid()]


def until_it_is_ended(thread: threading.Thread) -> None:
    """It runs until its point; it is a daemon, since its Python frames stay."""
    thread.start()
    until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())


def change(region: Region) -> None:
    region.mprotect(0, PAGE, READ)


def freeze(region: Region) -> None:
    region.frozen().release()


def snapshot(region: Region) -> None:
    region.snapshot().close()


WORDS = [(f"C{step}", change) for step in ("1_lock", "2_save", "3_attempt", "4_map", "5_publish", "6_await")]
WORDS += [(step, change) for step in ("C7_complete", "K1_close", "R1_claim", "R2_remote", "R3_ack")]
WORDS += [(step, freeze) for step in ("F1_own", "F2_keep", "F3_freeze", "F4_thaw", "F5_clear")]
WORDS += [(step, snapshot) for step in ("S1_prepare", "S2_protect", "S3_drain", "S4_active", "S5_open")]


@pytest.mark.parametrize(("step", "call"), WORDS, ids=[step for step, _ in WORDS])
def test_what_an_ended_thread_had_is_taken_over_though_its_process_lives(
    fork: Fork, joined: Joined, step: str, call: Callable[[Region], None]
) -> None:
    """The writer lock, claims, a closer, the freezer's word: they name the process alone."""

    def body(child: Child) -> None:
        until_it_is_ended(threading.Thread(target=call, args=[region], daemon=True))
        idle(child)
        region.mprotect(PAGE, PAGE, READ, timeout=PATIENCE)
        idle(child)
        os._exit(0)  # the thread's Python frames are there still

    engine = "uffd" if step[0] == "R" else "mprotect"
    with pyshare.create(size=16 * PAGE, engine=engine) as region:
        other = joined()
        victim = fork(body, point=f"{step}=exit")
        assert victim.hear() == "ok"
        region.mprotect(0, region.size, READ_WRITE, timeout=PATIENCE)
        with region.lease(0, PAGE, timeout=PATIENCE) as lease:
            lease.view[0] = 1
        with region.frozen(timeout=PATIENCE):
            pass
        tell(victim, "change")
        assert region.protection(PAGE) == READ
        assert fork(lambda _: change(region)).wait() == 0
        alive = sorted(one.pid for one in region.participants() if one.alive)
        assert alive == sorted([os.getpid(), other.pid, victim.pid])


def test_a_load_comes_to_its_end_in_a_process_without_agent_beside_many_changes(joined: Joined) -> None:
    with pyshare.create(size=16 * PAGE, engine="mprotect") as region:

        def load(child: Child) -> None:
            view = region.buf
            idle(child)
            assert view[0] == 0
            idle(child)
            os._exit(0)

        def change(page: int, prot: pyshare.Prot) -> None:
            with pytest.raises(PropagationTimeout):
                region.mprotect(page * PAGE, PAGE, prot, timeout=0)

        victim = joined(load, point="A4_ack=exit")
        with pytest.raises(PropagationTimeout):
            region.mprotect(0, PAGE, NONE, timeout=0.1)  # page tables follow, and the agent ends
        change(0, READ)
        teller = threading.Thread(target=tell, args=[victim, "load"])
        teller.start()
        for prot in itertools.cycle([READ, READ_WRITE]):
            teller.join(timeout=0.3)
            if not teller.is_alive():
                break
            change(1, prot)
        victim.say("end")


def end_thread(child: Child, call: Callable[[], object]) -> None:
    """A thread of its own is ended in the midst of this call."""
    idle(child)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())
    idle(child)
    os._exit(0)  # the thread's Python frames are there still


@pytest.mark.parametrize("step", ["R1_claim", "R2_remote"])
def test_an_ended_thread_keeps_nobody_from_its_own_page_tables(joined: Joined, step: str) -> None:
    """It had the claim on those of a process that just stores, in the midst of a change that allows that."""
    with pyshare.create(size=16 * PAGE, engine="uffd") as region:

        def change_pages(child: Child) -> None:
            idle(child)
            until_it_is_ended(threading.Thread(target=region.mprotect, args=[0, PAGE, READ_WRITE], daemon=True))
            idle(child)
            os._exit(0)

        def store(child: Child) -> None:
            idle(child)
            region.write(0, b"x")
            region.buf[1] = ord("y")
            idle(child)

        region.mprotect(0, region.size, READ)
        writer, victim = joined(store), joined(change_pages, point=f"{step}=exit@2")
        tell(victim, "end")
        tell(writer, "store")
        assert region.read(0, 2) == b"xy"


@pytest.mark.parametrize("step", ["R1_claim", "R2_remote"])
def test_who_is_told_of_a_violation_does_not_wait_for_an_ended_thread(joined: Joined, step: str) -> None:
    """It had the claim on the page tables of a process that is to leave its private pages."""
    with pyshare.create(size=16 * PAGE, engine="uffd", on_violation="raise") as region:

        def violate(child: Child) -> None:
            class Late:
                def __index__(self) -> int:
                    idle(child)
                    return 1

            idle(child)
            with pytest.raises(ProtectionError):
                struct.pack_into("QQ", region.buf, 0, 1, Late())
            idle(child)

        region.mprotect(0, region.size, READ)
        violator = joined(violate)
        victim = joined(
            lambda child: end_thread(child, lambda: region.mprotect(PAGE, PAGE, READ_WRITE)), point=f"{step}=exit@2"
        )
        tell(violator, "violate")
        tell(victim, "end")
        tell(violator, "return")


@pytest.mark.parametrize("how", ["store", "readinto"])
def test_the_wait_for_the_end_of_a_freeze_does_not_wait_for_an_ended_thread(joined: Joined, how: str) -> None:
    with pyshare.create(size=16 * PAGE, engine="mprotect", on_violation="wait") as region:

        def store(child: Child) -> None:
            view = region.buf
            idle(child)
            if how == "store":
                view[0] = 1
            else:
                with open("/dev/zero", "rb", buffering=0) as source:
                    assert region.readinto(source, 0, 1) == 1
            idle(child)

        waiter = joined(store)
        victim = joined(lambda child: end_thread(child, lambda: freeze(region)), point="F4_thaw=exit")
        tell(victim, "end")
        tell(waiter, "store")


def test_a_thread_that_is_ended_while_it_saves_uses_up_no_snapshots(joined: Joined) -> None:
    with pyshare.create(size=16 * PAGE, prot=READ, engine="mprotect") as region:

        def grant() -> None:
            end_thread_at("lseek")
            region.mprotect(0, region.size, READ_WRITE)

        victim = joined(lambda child: end_thread(child, grant))
        with region.snapshot():
            tell(victim, "end")
        for _ in range(20):
            region.snapshot(timeout=PATIENCE).close()


@contextmanager
def served(region: Region, most: int = 400) -> Iterator[None]:
    """A signal each 5 ms, whose handler uses the region; after so many the call that they interrupt fails."""
    left = iter(range(most))

    def use(*_: object) -> None:
        next(left)
        region.lock(1).release()

    signal.signal(signal.SIGALRM, use)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("call", ["mprotect", "release"])
def test_an_ended_thread_is_found_out_also_by_a_waiter_whose_signals_are_served(joined: Joined, call: str) -> None:
    """However soon the next signal comes, the wait has lasted since it began."""

    def wait(child: Child) -> None:
        frozen = region.frozen() if call == "release" else None
        idle(child)
        with served(region):
            if frozen is None:
                region.mprotect(PAGE, PAGE, READ, timeout=None)
            else:
                frozen.release()

    def end(child: Child) -> None:
        child.say()
        until_it_is_ended(threading.Thread(target=region.mprotect, args=[0, PAGE, READ], daemon=True))
        idle(child)
        os._exit(0)

    with pyshare.create(size=16 * PAGE, engine="mprotect") as region:
        waiter = joined(wait)
        victim = joined(end, point="C1_lock=exit")
        assert victim.hear() == "ok"
        waiter.say()
        assert waiter.wait() == 0
        victim.say()
        assert victim.wait() == 0


def drop(_: Snapshot) -> None:
    """With its last reference."""


def finish(snap: Snapshot) -> None:
    snap.finish()
    assert snap.complete
    snap.close()


def view(snap: Snapshot) -> None:
    assert bytes(snap) == b"x" * snap.size
    snap.close()


@pytest.mark.parametrize("step", ["S6_save", "S7_complete"])
@pytest.mark.parametrize("end", [Snapshot.close, drop, finish, view])
def test_nobody_waits_for_an_ended_thread_to_save_a_snapshot(
    fork: Fork, step: str, end: Callable[[Snapshot], None]
) -> None:
    """Nor does it keep anything of the snapshot."""

    def body(_: Child) -> None:
        region.read(0, 1)  # a participant
        before = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
        snaps = [region.snapshot()]
        until(lambda: os.listdir("/proc/self/task") == before[0])
        assert not snaps[0].complete
        end(snaps.pop())
        assert os.listdir("/proc/self/fd") == before[1]
        region.snapshot().close()

    with pyshare.create(size=16 * PAGE, engine="mprotect") as region:
        region.write(0, b"x" * region.size)
        assert fork(body, point=f"{step}=exit").wait() == 0
