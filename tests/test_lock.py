"""Locks of a region: one holder at a time, whoever is killed, in whatever process, thread or pid namespace.

Where a test says that somebody waits, it has seen that in the lock's word.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator

import posix_ipc
import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import LOCKS, PAGE, elsewhere, forbid_waitv, held, in_background

import pyshare
from pyshare import Lock, PropagationTimeout, Region, ShareError

Fork = Callable[..., Child]
Joined = Callable[..., Child]
AT_ONCE = 0.05  # a timeout that is meant to run out
COUNTED = struct.Struct("QQQ")  # who is inside; two counters that only somebody inside may find different


@pytest.fixture
def region() -> Iterator[Region]:
    with pyshare.create(size=4 * PAGE, max_participants=32) as made:
        yield made


def holder(region: Region, index: int = 0) -> Callable[[Child], None]:
    """A body that takes the lock, and releases it when it is told."""

    def body(child: Child) -> None:
        with region.lock(index):
            idle(child)
        idle(child)

    return body


def waiter(region: Region, index: int = 0) -> Callable[[Child], None]:
    """A body that says so before it takes the lock, and when it has it; the latter in shared memory too."""

    def body(child: Child) -> None:
        child.say()
        with region.lock(index, timeout=None):
            region.buf[0] += 1
            idle(child)

    return body


def reserved(region: Region, index: int = 0) -> None:
    until(lambda: held(region, LOCKS, index)[1])


# -- What a lock is ---------------------------------------------------------------------------------------------------


def test_a_lock_is_held_until_it_is_released(region: Region) -> None:
    with region.lock(7) as lock:
        assert isinstance(lock, Lock)
        assert lock.held
        assert not lock.abandoned
        assert repr(lock) == "<pyshare.Lock 7, held>"
    assert not lock.held
    assert repr(lock) == "<pyshare.Lock 7, released>"
    lock.release()
    with region.lock(7), region.lock(0), region.lock(1023):
        pass


@pytest.mark.parametrize("index", [-1, 1024, 1 << 70])
def test_indices_are_those_of_a_lock(region: Region, index: int) -> None:
    with pytest.raises(ValueError, match="0 to 1023"):
        region.lock(index)


@pytest.mark.parametrize("index", ["1", 1.0, None, True])
def test_indices_are_integers(region: Region, index: object) -> None:
    with pytest.raises(TypeError, match="index must be an integer"):
        region.lock(index)  # type: ignore[arg-type]


def test_locks_are_made_by_their_region_only() -> None:
    with pytest.raises(TypeError, match=r"region\.lock"):
        Lock()


def test_a_second_one_in_the_same_thread_is_an_error(region: Region) -> None:
    with region.lock(3), region.lock(4):
        for timeout in (None, 0):
            with pytest.raises(ShareError, match="this thread holds lock 3 already; locks are not recursive"):
                region.lock(3, timeout=timeout)
    with region.lock(3):
        pass


def test_another_thread_may_release_it(region: Region) -> None:
    lock = region.lock(3)
    with in_background(lock.release):
        pass
    assert not lock.held
    with region.lock(3, timeout=0):
        pass


def test_a_dropped_one_is_released_with_a_warning(region: Region) -> None:
    for _ in range(20):  # objects are used again
        with pytest.warns(ResourceWarning, match="lock 3 was dropped while held"):
            region.lock(3)
        with region.lock(3, timeout=0):
            pass


def test_a_region_is_not_closed_while_one_is_held(region: Region) -> None:
    with region.lock(3):
        with pytest.raises(BufferError, match="a lock is held"):
            region.close()
        assert not region.closed
    region.close()
    with pytest.raises(pyshare.RegionClosed):
        region.lock(3)


# -- One at a time ----------------------------------------------------------------------------------------------------


def count(region: Region, lock: Lock) -> None:
    """Fails where somebody else is inside, alive."""
    inside, first, second = COUNTED.unpack_from(region.buf, 64)
    assert lock.abandoned or (inside == 0 and first == second)
    me = threading.get_native_id()
    COUNTED.pack_into(region.buf, 64, me, first + 1, first)
    for _ in range(20):
        assert COUNTED.unpack_from(region.buf, 64) == (me, first + 1, first)
    COUNTED.pack_into(region.buf, 64, 0, first + 1, first + 1)


def test_threads_exclude_each_other(region: Region) -> None:
    def work() -> None:
        for _ in range(300):
            with region.lock(1, timeout=PATIENCE) as lock:
                count(region, lock)

    with in_background(*[work] * 4) as outcomes:
        pass
    assert outcomes == [None] * 4
    assert COUNTED.unpack_from(region.buf, 64) == (0, 1200, 1200)


def test_processes_exclude_each_other_while_holders_are_killed(region: Region, joined: Joined) -> None:
    def work(child: Child) -> None:
        child.say()
        while True:
            with region.lock(1, timeout=PATIENCE) as lock:
                region.buf[32] |= lock.abandoned
                count(region, lock)

    def inside() -> int:
        return int(COUNTED.unpack_from(region.buf, 64)[0])

    children = {child.pid: child for child in (joined(work) for _ in range(3))}
    for _ in range(20):
        before = COUNTED.unpack_from(region.buf, 64)[1]
        until(lambda before=before: COUNTED.unpack_from(region.buf, 64)[1] > before + 10 and inside() in children)
        victim = children.pop(inside() or next(iter(children)), None) or children.popitem()[1]
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        children.update({(new := joined(work)).pid: new})
    until(lambda: region.buf[32])
    for child in children.values():
        child.kill()
        assert child.wait() == -signal.SIGKILL, "it found somebody inside"
    with region.lock(1) as lock:
        count(region, lock)


def test_processes_and_threads_of_another_pid_namespace(region: Region, fork: Fork, joined: Joined) -> None:
    def work(child: Child) -> None:
        child.say()
        for _ in range(300):
            with region.lock(1, timeout=PATIENCE) as lock:
                count(region, lock)
        idle(child)

    there, pid = elsewhere(fork, work)
    here = joined(work)
    for child in (there, here):
        assert child.hear() == "ok"
    assert there.hear() == "ok"
    with region.lock(1) as lock:
        assert COUNTED.unpack_from(region.buf, 64) == (0, 600, 600)
        assert not lock.abandoned
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("waiting", [False, True], ids=["later", "waiting"])
def test_a_holder_that_is_killed_in_another_pid_namespace(
    region: Region, fork: Fork, joined: Joined, waiting: bool
) -> None:
    there, pid = elsewhere(fork, holder(region))
    assert there.hear() == "ok"
    others = [joined(waiter(region))] if waiting else []
    if waiting:
        reserved(region)
    os.kill(pid, signal.SIGKILL)
    for other in others:
        assert other.hear() == "ok"
        other.say()
    with region.lock(0) as lock:
        assert lock.abandoned == (not waiting)


# -- Waiting ----------------------------------------------------------------------------------------------------------


def test_a_timeout_names_the_holder(region: Region, joined: Joined) -> None:
    child = joined(holder(region))
    for timeout in (0, AT_ONCE):
        with pytest.raises(PropagationTimeout, match=f"pid {child.pid} held it") as caught:
            region.lock(0, timeout=timeout)
        assert caught.value.pids == [child.pid]
        assert caught.value.generation is None
    assert held(region, LOCKS, 0)[1] == 0, "who gives up has no claim on it"
    child.say()
    assert child.hear() == "ok"
    with region.lock(0, timeout=0):
        pass


def test_a_timeout_names_this_process_for_its_other_thread(region: Region) -> None:
    def fails() -> list[int]:
        with pytest.raises(PropagationTimeout) as caught:
            region.lock(0, timeout=AT_ONCE)
        return caught.value.pids

    with region.lock(0), in_background(fails) as outcomes:
        pass
    assert outcomes == [[os.getpid()]]


def test_the_default_timeout_is_that_of_the_process(region: Region, joined: Joined) -> None:
    joined(holder(region))
    pyshare.set_default_timeout(AT_ONCE)
    try:
        with pytest.raises(PropagationTimeout):
            region.lock(0)
    finally:
        pyshare.set_default_timeout(5.0)


def test_who_waits_comes_before_the_one_who_releases(region: Region, joined: Joined) -> None:
    for turn in range(1, 6):
        lock = region.lock(0)
        child = joined(waiter(region))
        reserved(region)
        lock.release()
        with pytest.raises(PropagationTimeout) as caught:
            region.lock(0, timeout=AT_ONCE)
        assert caught.value.pids == [child.pid]
        assert child.hear() == "ok"
        child.say()
        assert region.buf[0] == turn


def test_a_waiting_thread_comes_before_the_one_who_releases(region: Region) -> None:
    def wait() -> None:
        with region.lock(0, timeout=PATIENCE):
            region.buf[0] += 1

    for turn in range(1, 6):
        lock = region.lock(0)
        with in_background(wait) as outcomes:
            reserved(region)
            lock.release()
            with region.lock(0, timeout=PATIENCE):
                assert region.buf[0] == turn
        assert outcomes == [None]


def test_nobody_starves_beside_the_greedy(region: Region, joined: Joined) -> None:
    def greedy(child: Child) -> None:
        child.say()
        while not region.buf[9]:
            with region.lock(0, timeout=PATIENCE):
                region.buf[1] = region.buf[1]

    def modest(child: Child) -> None:
        child.say()
        for _ in range(20):
            with region.lock(0, timeout=PATIENCE):
                pass
        child.say("done")
        child.hear()

    children = [joined(greedy) for _ in range(2)]
    for child in [joined(modest) for _ in range(3)]:
        assert child.hear() == "done"
    region.buf[9] = 1
    assert [child.wait() for child in children] == [0, 0]


@pytest.mark.parametrize("stops", [False, True], ids=["running", "stopped"])
def test_who_is_to_be_next_may_die(region: Region, joined: Joined, stops: bool) -> None:
    lock = region.lock(0)
    first = joined(waiter(region))
    reserved(region)
    if stops:
        first.stop()
    second = joined(waiter(region))
    first.kill()
    lock.release()
    assert second.hear() == "ok"
    second.say()
    with region.lock(0) as lock:
        assert not lock.abandoned, "it never held it"


def test_other_threads_run_meanwhile(region: Region, joined: Joined) -> None:
    child = joined(holder(region))
    with in_background(lambda: region.lock(0, timeout=None).release()) as outcomes:
        reserved(region)  # by Python code
        assert outcomes == []
        child.say()
    assert outcomes == [None]


class HandlerError(Exception):
    """Raised by a signal handler."""


@pytest.mark.parametrize(
    ("number", "caught"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR2, HandlerError)], ids=["Ctrl-C", "raise"]
)
def test_a_handler_that_raises_ends_the_wait(
    region: Region, joined: Joined, number: signal.Signals, caught: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise HandlerError

    def wait(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR2, fail)
        child.say()
        with pytest.raises(caught):
            region.lock(0, timeout=None)
        idle(child)
        with region.lock(0, timeout=PATIENCE):
            idle(child)

    with region.lock(0):
        child = joined(wait)
        reserved(region)
        child.kill(number)
        assert child.hear() == "ok"
        assert held(region, LOCKS, 0)[1] == 0
    with region.lock(0, timeout=0):
        pass
    child.say()
    assert child.hear() == "ok"


def test_a_handler_that_returns_does_not_end_the_wait(region: Region, joined: Joined) -> None:
    def wait(child: Child) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: child.say("handled"))
        waiter(region)(child)

    with region.lock(0):
        child = joined(wait)
        for _ in range(10):
            reserved(region)
            child.kill(signal.SIGUSR1)
            assert child.hear() == "handled"
        reserved(region)
    assert child.hear() == "ok"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_where_the_kernel_refuses_to_wait_for_two(region: Region, joined: Joined, error: int) -> None:
    def body(child: Child) -> None:
        forbid_waitv(error)
        for _ in range(2):
            child.say()
            with region.lock(0, timeout=PATIENCE) as lock:
                child.say(str(lock.abandoned))

    first = joined(holder(region))
    child = joined(body)
    reserved(region)
    first.kill()
    assert child.hear() == "True"
    assert child.hear() == "ok"
    assert child.hear() == "False"


# -- Death ------------------------------------------------------------------------------------------------------------


def test_a_holder_that_is_killed_blocks_nobody_and_peers_do(region: Region, joined: Joined) -> None:
    """The same death under multiprocessing.Lock, under a POSIX semaphore, and under a lock of a region."""
    fork = multiprocessing.get_context("fork")
    plain, named = fork.Lock(), posix_ipc.Semaphore(None, posix_ipc.O_CREX, initial_value=1)

    def die_inside(child: Child) -> None:
        with plain, named, region.lock(0):
            idle(child)

    try:
        victim = joined(die_inside)
        victim.kill()
        victim.wait()
        assert not plain.acquire(timeout=AT_ONCE), "for ever"
        with pytest.raises(posix_ipc.BusyError):
            named.acquire(AT_ONCE)
        with region.lock(0) as lock:
            assert lock.abandoned
        with region.lock(0) as lock:
            assert not lock.abandoned, "it is told once"
    finally:
        named.unlink()
        named.close()


def test_a_stopped_holder_keeps_it_until_it_is_killed(region: Region, joined: Joined) -> None:
    child = joined(holder(region))
    child.stop()
    with pytest.raises(PropagationTimeout):
        region.lock(0, timeout=AT_ONCE)
    with in_background(lambda: region.lock(0, timeout=PATIENCE)) as outcomes:
        reserved(region)
        child.kill()
    with outcomes.pop() as lock:
        assert lock.abandoned


@pytest.mark.parametrize(("point", "abandoned"), [("H1_take", True), ("H4_release", False)])
def test_killed_at_a_step(region: Region, fork: Fork, point: str, abandoned: bool) -> None:
    def body(_: Child) -> None:
        with region.lock(0):
            pass

    with region.lock(1):
        child = fork(body, point=f"{point}=kill")
        assert child.wait() == -signal.SIGKILL
    with region.lock(0) as lock:
        assert lock.abandoned == abandoned


def test_a_child_does_not_hold_what_its_parent_holds(region: Region, joined: Joined) -> None:
    def body(child: Child) -> None:
        assert not lock.held
        lock.release()
        lock.__exit__(None, None, None)
        with pytest.raises(PropagationTimeout) as caught:
            region.lock(0, timeout=AT_ONCE)
        assert caught.value.pids == [os.getppid()]
        with region.lock(1), pytest.raises(BufferError):
            region.close()
        region.close()
        idle(child)

    with region.lock(0) as lock:
        child = joined(body)
        assert lock.held
        child.say()
        assert child.wait() == 0
        with pytest.raises(ShareError):
            region.lock(0)


def test_exec_ends_what_is_held(region: Region, joined: Joined) -> None:
    def body(child: Child) -> None:
        lock = region.lock(0)
        child.say()
        child.hear()
        assert lock.held
        os.execv("/bin/sleep", ["sleep", str(PATIENCE)])

    child = joined(body)
    child.say()
    with region.lock(0, timeout=PATIENCE) as lock:
        assert lock.abandoned


@pytest.mark.parametrize("where", ["main", "daemon"])
def test_an_interpreter_that_exits_with_one_held(
    region: Region, run_python: Callable[..., subprocess.CompletedProcess[str]], where: str
) -> None:
    source = """
import sys, threading, pyshare
region = pyshare.attach(int(sys.argv[1]))
inside = threading.Event()
def hold():
    global lock
    lock = region.lock(0)
    inside.set()
    if threading.current_thread() is not threading.main_thread():
        region.lock(1)
with (region.lock(1) if sys.argv[2] == "daemon" else region.lock(2)):
    if sys.argv[2] == "daemon":
        threading.Thread(target=hold, daemon=True).start()
    else:
        hold()
    inside.wait()
    sys.exit(3)
"""
    done = run_python(source, str(region.fileno()), where, pass_fds=[region.fileno()])
    assert (done.returncode, done.stderr) == (3, "")
    with region.lock(0) as lock:
        assert lock.abandoned
    with region.lock(2) as lock:
        assert not lock.abandoned


def test_locks_of_different_indices_are_different(region: Region, joined: Joined) -> None:
    with contextlib.ExitStack() as stack:
        for index in range(0, 1024, 2):
            stack.enter_context(region.lock(index))

        def others(child: Child) -> None:
            for index in range(1, 1024, 2):
                with region.lock(index, timeout=0):
                    pass
            child.say()

        joined(others)
