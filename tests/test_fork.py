"""Promise 6 and 10: a forked child has no access until it is a participant, and is one before fork() returns; and
whatever a program does to its descriptors, its agent or itself opens nothing and hangs nobody."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import PATIENCE, Child

import pyshare
from pyshare import NONE, READ, READ_WRITE, Region

PAGE = 4096
SYS_CLONE = 56
libc = ctypes.CDLL(None, use_errno=True)

Fork = Callable[..., Child]
Crash = Callable[[Callable[[Child], object]], tuple[int, str]]


@pytest.fixture
def region() -> Iterator[Region]:
    with pyshare.create(size=16 * PAGE) as region:
        yield region


def until(condition: Callable[[], object]) -> None:
    """Returns when it holds; for what has no event of its own."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        os.sched_yield()


def pids(region: Region) -> list[int]:
    return sorted(one.pid for one in region.participants() if one.alive)


def mappings(pid: int, address: int) -> list[str]:
    """The bits (rwxp or rwxs) of all that the process has mapped in the region's range."""
    found = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            span, bits = line.split(" ", 2)[:2]
            low, high = (int(part, 16) for part in span.split("-"))
            if low < address + 16 * PAGE and high > address:
                found.append(bits)
    return found


def store(view: memoryview, offset: int = 0) -> Callable[[Child], None]:
    def body(_child: Child) -> None:
        view[offset] = 1

    return body


def answer(child: Child) -> None:
    """Says so, and lives until it is told to end."""
    child.say()
    child.hear()


# -- A child is a participant --------------------------------------------------------------------------------------


def test_child_is_a_participant_before_fork_returns(region: Region, fork: Fork) -> None:
    view, array = region.buf, np.ndarray(4 * PAGE, np.uint32, buffer=region)
    seen: list[int] = []
    watching = True
    # The first Python code that runs in a child: it uses the memory, and asks the region nothing.
    os.register_at_fork(after_in_child=lambda: seen.append(view[0]) if watching else None)
    view[0], array[1] = 7, 1234567
    address = region.address

    def body(child: Child) -> None:
        assert seen == [7]
        child.say()  # without having called the region
        child.hear()
        assert (view[0], array[1]) == (7, 1234567)
        view[1], array[2] = 8, 89
        assert region.address == address
        assert os.getpid() in pids(region)

    child = fork(body)
    watching = False
    child.hear()
    assert pids(region) == sorted([os.getpid(), child.pid])
    child.say()
    assert child.wait() == 0
    assert (view[1], array[2]) == (8, 89)
    assert pids(region) == [os.getpid()]


def test_child_has_the_protections(region: Region, crash: Crash) -> None:
    view = region.buf
    region.mprotect(PAGE, PAGE, READ)
    code, told = crash(store(view, PAGE))
    assert code == -signal.SIGSEGV
    assert f"forbidden store to an unnamed region at offset 4096: page 1 is READ since change 1 by pid {os.getpid()}, "
    assert told.count("pyshare:") == 1
    assert view[PAGE] == 0


def test_child_follows_changes(region: Region, fork: Fork) -> None:
    view = region.buf

    def body(child: Child) -> None:
        child.say()
        child.hear()
        view[0] = 1
        with pytest.raises(pyshare.ProtectionError):
            region.write(PAGE, b"x")
        region.mprotect(PAGE, PAGE, READ_WRITE)

    region.mprotect(0, PAGE, NONE)
    child = fork(body)
    child.hear()
    region.mprotect(0, PAGE, READ_WRITE)
    region.mprotect(PAGE, PAGE, READ)
    child.say()
    assert child.wait() == 0
    assert (view[0], region.protection(PAGE)) == (1, READ_WRITE)


@pytest.mark.parametrize("step", ["J1_claim", "J2_lock"])
def test_no_access_before_the_join(region: Region, fork: Fork, step: str) -> None:
    """The child is stopped while it joins: nothing in the range can be accessed."""
    child = fork(answer, point=f"{step}=stop")
    child.wait_stopped()
    assert {bits[:3] for bits in mappings(child.pid, region.address)} == {"---"}
    assert child.pid not in pids(region)
    child.resume()
    child.hear()
    assert child.pid in pids(region)


def test_grand_children(region: Region, fork: Fork) -> None:
    view = region.buf

    def descend(depth: int) -> None:
        view[depth] = depth
        assert os.getpid() in pids(region)
        if depth == 5:
            return
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                descend(depth + 1)
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert pids(region).count(os.getpid()) == 1

    assert fork(lambda _child: descend(1)).wait() == 0
    assert bytes(view[:6]) == bytes(range(6))
    assert pids(region) == [os.getpid()]


def test_several_regions(fork: Fork) -> None:
    with contextlib.ExitStack() as stack:
        regions = [stack.enter_context(pyshare.create(size=16 * PAGE)) for _ in range(8)]
        for page, region in enumerate(regions):
            region.mprotect(page * PAGE, PAGE, READ)

        def body(child: Child) -> None:
            child.say()
            child.hear()
            for page, region in enumerate(regions):
                region.write((page + 1) * PAGE, b"x")
                with pytest.raises(pyshare.ProtectionError):
                    region.write(page * PAGE, b"x")

        child = fork(body)
        child.hear()
        assert all(child.pid in pids(region) for region in regions)
        child.say()
        assert child.wait() == 0


# -- Fork in all circumstances -------------------------------------------------------------------------------------


def test_fork_from_another_thread(region: Region, fork: Fork) -> None:
    view, children = region.buf, []

    def body(child: Child) -> None:
        view[0] = 1
        child.say()
        child.hear()
        with pytest.raises(pyshare.ProtectionError):
            region.write(0, b"x")

    thread = threading.Thread(target=lambda: children.append(fork(body)))
    thread.start()
    thread.join()
    children[0].hear()
    region.mprotect(0, PAGE, READ)
    children[0].say()
    assert children[0].wait() == 0


def test_fork_while_another_thread_changes(region: Region, fork: Fork) -> None:
    """The child is forked in the middle of a change of its parent, owns no part of it, and can close its region."""
    silent = fork(answer)
    silent.hear()
    silent.stop()
    changer = threading.Thread(target=region.mprotect, args=(0, PAGE, READ), kwargs={"timeout": None})
    changer.start()
    until(lambda: region.generation == 1)  # made, and waiting for the stopped one's acknowledgement

    def body(child: Child) -> None:
        with pytest.raises(pyshare.ProtectionError):
            region.write(0, b"x")
        assert region.mprotect(0, PAGE, READ_WRITE) == 2
        region.close()
        answer(child)

    child = fork(body)
    silent.resume()  # the child joins when the change is over
    child.hear()
    changer.join()
    assert region.protection(0) == READ_WRITE
    assert pids(region) == sorted([os.getpid(), silent.pid])


def test_fork_amid_a_storm_of_changes(region: Region, fork: Fork) -> None:
    done = threading.Event()

    def storm() -> None:
        while not done.is_set():
            region.mprotect(0, PAGE, READ)
            region.mprotect(0, PAGE, READ_WRITE)

    def body(_child: Child) -> None:
        region.write(PAGE, b"x")
        region.mprotect(PAGE, PAGE, READ_WRITE)
        region.close()

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for _ in range(30):
            assert fork(body).wait() == 0
    finally:
        done.set()
        thread.join()
    assert pids(region) == [os.getpid()]


def test_many_forks_in_parallel(region: Region, fork: Fork) -> None:
    children: list[Child] = []

    def body(child: Child) -> None:
        child.say()
        child.hear()
        with pytest.raises(pyshare.ProtectionError):
            region.write(0, b"x")
        child.say()
        child.hear()

    def fork_some() -> None:
        for _ in range(6):
            children.append(fork(body))

    threads = [threading.Thread(target=fork_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child in children:
        child.hear()
    assert pids(region) == sorted([os.getpid(), *(child.pid for child in children)])
    region.mprotect(0, PAGE, READ, timeout=PATIENCE)
    for child in children:
        child.say()
    for child in children:
        child.hear()


def test_subprocess_with_preexec(region: Region) -> None:
    ran = subprocess.run([sys.executable, "-c", ""], preexec_fn=lambda: region.write(0, b"pre"), timeout=PATIENCE)
    assert ran.returncode == 0
    assert region.read(0, 3) == b"pre"
    region.mprotect(0, PAGE, READ)
    assert pids(region) == [os.getpid()]


def test_close_in_a_child_is_the_childs_alone(region: Region, fork: Fork) -> None:
    def body(child: Child) -> None:
        region.close()
        with pytest.raises(pyshare.RegionClosed):
            region.read(0, 1)
        answer(child)

    child = fork(body)
    child.hear()
    assert pids(region) == [os.getpid()]
    region.mprotect(0, PAGE, READ)
    assert region.read(0, 1) == b"\0"
    os.close(os.dup(region.fileno()))


# -- Where a child cannot join -------------------------------------------------------------------------------------


def test_full_table_detaches_the_child(fork: Fork, crash: Crash) -> None:
    with pyshare.create("forkfull", size=16 * PAGE, max_participants=2) as region:
        view = region.buf
        second = fork(answer)
        second.hear()
        code, told = crash(store(view))
        assert code == -signal.SIGSEGV
        assert "region 'forkfull' at offset 0: page 0: this process is detached" in told
        assert told.count("pyshare:") == 1

        def body(child: Child) -> None:
            for call in (lambda: region.read(0, 1), lambda: region.mprotect(0, PAGE, READ), lambda: region.address):
                with pytest.raises(pyshare.ParticipantLimit, match="max_participants"):
                    call()
            assert "detached" in repr(region)
            assert mappings(os.getpid(), address) == ["---p"]
            child.say()
            child.hear()
            assert region.address == address
            view[0] = 1

        address = region.address
        third = fork(body)
        third.hear()
        assert pids(region) == sorted([os.getpid(), second.pid])
        second.kill()
        second.wait()
        third.say()
        assert third.wait() == 0
        assert view[0] == 1


def test_stopped_holder_of_the_lock_detaches_the_child(region: Region, fork: Fork) -> None:
    """After the deadline of 5 s: fork() returns, without access; later the child joins by its next call."""
    view = region.buf
    holder = fork(lambda _child: region.mprotect(0, PAGE, READ, timeout=None), point="C1_lock=stop")
    holder.wait_stopped()
    address = region.address

    def body(child: Child) -> None:
        assert mappings(os.getpid(), address) == ["---p"]
        child.say()
        child.hear()
        assert region.generation == 1
        view[PAGE] = 1

    child = fork(body)
    child.hear()
    holder.resume()
    assert holder.wait() == 0
    child.say()
    assert child.wait() == 0
    assert view[PAGE] == 1


@pytest.mark.parametrize("full", [False, True], ids=["joined", "detached"])
def test_nothing_else_comes_into_the_range(fork: Fork, full: bool) -> None:
    """DONTFORK leaves a hole where the region was: it must not be there when a child maps something."""
    with pyshare.create(size=16 * PAGE, max_participants=1 if full else 2) as region:
        address = region.address

        def body(_child: Child) -> None:
            maps = [mmap.mmap(-1, pages * PAGE) for pages in (1, 2, 16, 64, 512) for _ in range(20)]
            starts = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in maps]
            assert not any(address <= start < address + region.size for start in starts)

        assert fork(body).wait() == 0


def test_raw_clone_is_told_that_it_is_no_participant(fork: Fork) -> None:
    """A child that no fork handler has seen: no access, RegionClosed, and its finalisers leave the parent alone."""
    region = pyshare.create("rawclone", size=16 * PAGE)
    address, view = region.address, region.buf
    peer = fork(answer)
    peer.hear()

    def in_clone() -> None:
        for call in (lambda: region.read(0, 1), lambda: region.mprotect(0, PAGE, READ), lambda: region.address):
            with pytest.raises(pyshare.RegionClosed):
                call()
        maps = [mmap.mmap(-1, pages * PAGE) for pages in (1, 16, 512)]
        starts = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in maps]
        assert not any(address <= start < address + 16 * PAGE for start in starts)
        view.release()
        gc.collect()
        region.close()

    pid = libc.syscall(SYS_CLONE, signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            in_clone()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pids(region) == sorted([os.getpid(), peer.pid])
    region.mprotect(0, PAGE, READ)
    assert view[0] == 0
    with pyshare.attach("rawclone") as again:
        assert again.protection(0) == READ
    region.close()


def test_store_in_a_raw_clone_dies(region: Region) -> None:
    view = region.buf
    pid = libc.syscall(SYS_CLONE, signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        faulthandler.enable(file=os.open("/dev/null", os.O_WRONLY))  # pytest has enabled it: this only moves its output
        view[0] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    assert view[0] == 0


# -- What a program may do to itself -------------------------------------------------------------------------------


def test_closerange_loses_nothing(fork: Fork) -> None:
    with pyshare.create("closerange", size=16 * PAGE) as region:
        view = region.buf
        region.mprotect(0, PAGE, READ)

        def body(child: Child) -> None:
            os.dup2(child._receive, 0)
            os.dup2(child._send, 1)
            child._receive, child._send = 0, 1
            os.closerange(3, 65536)
            answer(child)
            assert all(region.protection(page * PAGE) == READ for page in (0, 1))
            for page in (0, 1):
                with pytest.raises(pyshare.ProtectionError):
                    region.write(page * PAGE, b"x")
            first = os.open("/dev/null", os.O_RDONLY)  # takes a number that was the region's
            assert os.fstat(region.fileno()).st_size > region.size
            assert region.fileno() != first
            os.closerange(3, 65536)
            pid = os.fork()
            if pid == 0:
                view[2 * PAGE] = 1
                os._exit(0 if os.getpid() in pids(region) else 1)
            assert os.waitpid(pid, 0)[1] == 0
            child.say()
            child.hear()

        child = fork(body)
        child.hear()
        region.mprotect(PAGE, PAGE, READ)
        child.say()
        child.hear()
        assert view[2 * PAGE] == 1
        assert pids(region) == sorted([os.getpid(), child.pid])


def _pipe() -> tuple[int, int]:
    return os.pipe()


def _socket() -> tuple[int, int]:
    reader, writer = socket.socketpair()
    return reader.detach(), writer.detach()


@pytest.mark.parametrize("make", [_pipe, _socket])
@pytest.mark.parametrize("forked", [False, True], ids=["create", "fork"])
def test_agents_keep_nothing_open(fork: Fork, make: Callable[[], tuple[int, int]], forked: bool) -> None:
    """What the program closes is closed: no agent has a copy of it."""
    with contextlib.ExitStack() as stack:
        if forked:
            region = stack.enter_context(pyshare.create(size=PAGE))
        reader, writer = make()
        if forked:

            def body(child: Child) -> None:
                os.close(writer)
                answer(child)

            fork(body).hear()
            assert len(pids(region)) == 2
        else:
            stack.enter_context(pyshare.create(size=PAGE))
        os.close(writer)
        try:
            assert select.select([reader], [], [], PATIENCE)[0], "somebody holds the other end"
            assert os.read(reader, 1) == b""
        finally:
            os.close(reader)


def test_exec_ends_the_participation(region: Region, fork: Fork) -> None:
    def body(child: Child) -> None:
        child.say()
        child.hear()
        os.execv(sys.executable, [sys.executable, "-c", "import signal; signal.pause()"])

    child = fork(body)
    child.hear()
    child.say()
    with pytest.raises(AssertionError, match="is gone"):
        child.hear()  # its pipe is closed by exec
    region.mprotect(0, PAGE, READ)
    assert pids(region) == [os.getpid()]
    os.kill(child.pid, 0)


@pytest.mark.parametrize("threads", [1, 8])
def test_lost_agent_is_named_and_restarted(region: Region, fork: Fork, threads: int) -> None:
    view = region.buf

    def body(child: Child) -> None:
        until(lambda: len(os.listdir("/proc/self/task")) == 1)
        child.say()
        child.hear()
        together = threading.Barrier(threads)

        def call() -> None:
            together.wait()
            assert region.generation == 1
            assert region.protection(0) == READ

        calls = [threading.Thread(target=call) for _ in range(threads)]
        for thread in calls:
            thread.start()
        for thread in calls:
            thread.join()
        until(lambda: len(os.listdir("/proc/self/task")) == 2)
        child.say()
        child.hear()
        view[PAGE] = 1
        with pytest.raises(pyshare.ProtectionError):
            region.write(0, b"x")

    child = fork(body, point="A1_wait=exit")
    child.hear()
    with pytest.raises(pyshare.PropagationTimeout) as caught:
        region.mprotect(0, PAGE, READ, timeout=0.1)
    assert caught.value.pids == [child.pid]
    assert caught.value.generation == 1
    assert child.pid in pids(region)
    child.say()
    child.hear()
    region.mprotect(2 * PAGE, PAGE, READ, timeout=PATIENCE)
    assert pids(region) == sorted([os.getpid(), child.pid])
    child.say()
    assert child.wait() == 0
    assert view[PAGE] == 1
