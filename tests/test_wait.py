"""The policy "wait": who may not access a page sleeps until it may, and then goes on as if nothing had happened."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Child, until
from kernel import is_asleep, until_waits

import pyshare
from pyshare import NONE, READ, READ_WRITE, ProtectionError, Region

PAGE = 4096
OLD = b"\x05"
libc = ctypes.CDLL(None, use_errno=True)

Crash = Callable[[Callable[[Child], object]], tuple[int, str]]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(size=16 * PAGE, engine=request.param, on_violation="wait") as region:
        region.write(0, OLD * region.size)
        region.mprotect(0, region.size, READ)
        yield region


# -- The thread sleeps, and goes on ------------------------------------------------------------------------------------


def store_item(region: Region) -> None:
    region.buf[0] = 1


def store_all(region: Region) -> None:
    np.frombuffer(region, dtype=np.uint8)[:] = 1


def add_without_the_interpreter(region: Region) -> None:
    array = np.frombuffer(region, dtype=np.uint8)
    np.subtract(array, 4, out=array)


def store_by_c(region: Region) -> None:
    ctypes.memset(region.address, 1, PAGE)


@pytest.mark.parametrize("by", ["here", "another"])
@pytest.mark.parametrize("store", [store_item, store_all, add_without_the_interpreter, store_by_c])
def test_worker_waits_and_others_run(
    region: Region, joined: Callable[..., Child], store: Callable[[Region], None], by: str
) -> None:
    def other(child: Child) -> None:
        child.say()
        child.hear()
        region.mprotect(0, region.size, READ_WRITE)
        child.say()
        child.hear()

    child, before = joined(other), region.generation
    thread = threading.Thread(target=store, args=(region,))
    thread.start()
    until(lambda: is_asleep(thread.native_id or 0))
    assert region.read(0, 1) == OLD
    assert thread.is_alive()
    if by == "here":
        region.mprotect(0, region.size, READ_WRITE)
    else:
        child.say()
        child.hear()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert region.read(0, 1) == b"\x01"
    assert region.generation == before + 1


def test_main_waits_and_others_run(region: Region) -> None:
    seen = []

    def open_it() -> None:
        until(lambda: is_asleep(os.getpid()))
        seen.append(region.read(0, 1))
        region.mprotect(0, PAGE, READ_WRITE)

    thread = threading.Thread(target=open_it)
    thread.start()
    region.buf[0] = 1
    thread.join()
    assert (seen, region.read(0, 1)) == ([OLD], b"\x01")


def test_load_waits(region: Region) -> None:
    region.mprotect(0, PAGE, NONE)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(region.buf[0]))
    thread.start()
    until(lambda: is_asleep(thread.native_id or 0))
    region.mprotect(0, PAGE, READ)
    thread.join(PATIENCE)
    assert seen == OLD[:1] or seen == [5]


def test_a_lease_of_this_process_lets_it_go_on(region: Region) -> None:
    thread = threading.Thread(target=store_item, args=(region,))
    thread.start()
    until(lambda: is_asleep(thread.native_id or 0))
    with region.lease(0, PAGE):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert region.read(0, 1) == b"\x01"


def test_many_wait_in_many_processes(region: Region, joined: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        child.say()
        threads = [threading.Thread(target=region.buf.__setitem__, args=(at, 1)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        region.buf[5] = 1

    children = [joined(body) for _ in range(3)]
    for _ in range(20):
        region.mprotect(PAGE, PAGE, READ_WRITE)
        region.mprotect(PAGE, PAGE, READ)
    region.mprotect(0, PAGE, READ_WRITE)
    assert [child.wait() for child in children] == [0, 0, 0]
    assert region.read(0, 6) == b"\x01" * 4 + OLD + b"\x01"


def test_thread_without_python_waits_too(region: Region) -> None:
    thread = ctypes.c_ulong()
    libc.pthread_create(
        ctypes.byref(thread), None, ctypes.cast(libc.time, ctypes.c_void_p), ctypes.c_void_p(region.address)
    )
    before = region.read(0, 8)
    region.mprotect(0, PAGE, READ_WRITE)
    libc.pthread_join(thread, None)
    assert before == OLD * 8
    assert region.read(0, 8) != before


def test_policy_changes_while_it_waits(region: Region) -> None:
    raised: list[BaseException] = []

    def body() -> None:
        try:
            store_item(region)
        except ProtectionError as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    until(lambda: is_asleep(thread.native_id or 0))
    region.on_violation("raise")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(raised) == 1
    assert region.read(0, 1) == OLD


# -- Freezes -----------------------------------------------------------------------------------------------------------


def test_a_freeze_is_waited_out(region: Region, joined: Callable[..., Child]) -> None:
    region.mprotect(0, region.size, READ_WRITE)

    def body(child: Child) -> None:
        child.say()
        child.hear()
        child.say()
        store_item(region)

    child = joined(body)
    with region.frozen():
        child.say()
        child.hear()
        until_waits(child)
        assert region.read(0, 1) == OLD
    assert child.wait() == 0
    assert region.read(0, 1) == b"\x01"


@pytest.mark.parametrize("store", [store_item, store_all, store_by_c])
def test_the_freezing_thread_raises_at_once(region: Region, store: Callable[[Region], None]) -> None:
    region.mprotect(0, region.size, READ_WRITE)
    with region.frozen():
        with pytest.raises(ProtectionError):
            store(region)
        assert region.read(0, region.size) == OLD * region.size
    store(region)


@pytest.mark.parametrize(("policy", "meanwhile"), [("die", False), ("raise", False), ("wait", False), ("wait", True)])
def test_a_dead_freezers_freeze_is_ended(
    region: Region, joined: Callable[..., Child], policy: str, meanwhile: bool
) -> None:
    region.mprotect(0, region.size, READ_WRITE)
    region.on_violation(policy)

    def freeze(child: Child) -> None:
        with region.frozen():
            child.say()
            child.hear()

    child = joined(freeze)
    thread = threading.Thread(target=store_item, args=(region,))
    if meanwhile:
        thread.start()
        until(lambda: is_asleep(thread.native_id or 0))
    child.kill()
    child.wait()
    if not meanwhile:
        thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert region.read(0, 1) == b"\x01"


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [store_item, store_all, add_without_the_interpreter, store_by_c])
def test_interrupt_of_the_main_thread(
    region: Region, joined: Callable[..., Child], store: Callable[[Region], None]
) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child.say()
        with pytest.raises(KeyboardInterrupt):
            store(region)
        assert region.buf[0] == OLD[0]
        child.say()
        child.hear()
        region.buf[0] = 9

    child = joined(body)
    until_waits(child)
    child.kill(signal.SIGINT)
    assert child.hear() == "ok"
    assert region.read(0, PAGE) == OLD * PAGE
    region.mprotect(0, PAGE, READ_WRITE)
    child.say()
    assert child.wait() == 0
    assert region.read(0, 1) == b"\x09"


def test_interrupt_with_a_handler_that_raises(region: Region, joined: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        called = []

        def handler(*_: object) -> None:
            called.append(1)
            raise LookupError

        signal.signal(signal.SIGINT, handler)
        child.say()
        with pytest.raises(LookupError):
            store_item(region)
        assert called == [1]
        assert region.buf[0] == OLD[0]

    child = joined(body)
    until_waits(child)
    child.kill(signal.SIGINT)
    assert child.wait() == 0
    assert region.read(0, 1) == OLD


def test_interrupt_while_a_worker_waits(region: Region, joined: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        done: list[None] = []
        thread = threading.Thread(target=lambda: done.append(store_item(region)))  # type: ignore[func-returns-value]
        thread.start()
        until(lambda: is_asleep(thread.native_id or 0))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            child.say()
            thread.join()
        child.say()
        until(lambda: done)  # Python 3.11 takes a thread whose join was interrupted for ended

    child = joined(body)
    child.kill(signal.SIGINT)
    assert child.hear() == "ok"
    region.mprotect(0, PAGE, READ_WRITE)
    assert child.wait() == 0
    assert region.read(0, 1) == b"\x01"


@pytest.mark.parametrize("store", [store_item, store_all, add_without_the_interpreter, store_by_c])
def test_handlers_run_during_the_wait(
    region: Region, joined: Callable[..., Child], store: Callable[[Region], None]
) -> None:
    """Where they return the wait goes on."""

    def body(child: Child) -> None:
        signal.signal(signal.SIGTERM, lambda *_: child.say("handled"))
        child.say()
        store(region)

    child = joined(body)
    until_waits(child)
    for _ in range(20):
        child.kill(signal.SIGTERM)
        assert child.hear() == "handled"
    assert region.read(0, 1) == OLD
    region.mprotect(0, region.size, READ_WRITE)
    assert child.wait() == 0
    assert region.read(0, 1) == b"\x01"


def test_a_storm_of_signals(region: Region, joined: Callable[..., Child]) -> None:
    """They come at every instruction of those that change stacks for a handler, too."""
    region.mprotect(0, PAGE, READ_WRITE)

    def body(child: Child) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        child.say()
        buf = region.buf
        while region.read(PAGE, 1) == OLD:
            buf[0] = 1

    child = joined(body)
    for turn in range(150):
        region.mprotect(0, PAGE, READ)
        for _ in range(1 + turn % 25):
            child.kill(signal.SIGUSR1)
        region.mprotect(0, PAGE, READ_WRITE)
    region.mprotect(0, region.size, READ_WRITE)
    region.write(PAGE, b"\x01")
    assert child.wait() == 0


def test_faulthandler_comes_later(region: Region, joined: Callable[..., Child]) -> None:
    """Nobody is woken for a change by the uffd engine who could see that our handler is the topmost no more."""

    def body(child: Child) -> None:
        faulthandler.disable()
        faulthandler.enable(file=2)
        child.say()
        region.buf[0] = 1

    child = joined(body)
    until_waits(child)
    region.mprotect(0, PAGE, READ_WRITE)
    assert child.wait() == 0
    assert region.read(0, 1) == b"\x01"


def test_a_handler_may_do_anything(region: Region, crash: Crash) -> None:
    """It has the thread's own stack, not the few pages of a handler of signals; it may open the page itself."""

    def body(_: Child) -> None:
        def deep(depth: int) -> int:
            return max(map(deep, (depth - 1,))) + 1 if depth else 0

        def handler(*_: object) -> None:
            assert deep(150) == 150
            with pytest.raises(ZeroDivisionError):
                _ = 1 // 0
            with pyshare.create(size=PAGE, prot=READ, on_violation="raise") as other, pytest.raises(ProtectionError):
                other.buf[0] = 1
            region.mprotect(0, PAGE, READ_WRITE)

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        region.buf[0] = 1
        assert region.read(0, 1) == b"\x01"

    assert crash(body) == (0, "")


# -- Code that relies on the interpreter -------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["mprotect"], indirect=True)
@pytest.mark.parametrize("how", ["+=", "extend"])
def test_a_bytearray_that_grows_is_let_alone(region: Region, fork: Callable[..., Child], how: str) -> None:
    """Another thread, for which the memory would be freed, waits for the interpreter; so who waits has to give up."""

    def body(_: Child) -> None:
        region.mprotect(region.size // 2, region.size // 2, NONE)
        shared, view, raised = bytearray(1 << 20), region.buf, []

        def grow() -> None:
            nonlocal shared
            try:
                if how == "+=":
                    shared += view
                else:
                    shared.extend(view)
            except ProtectionError as error:
                raised.append(error)

        thread = threading.Thread(target=grow)
        thread.start()
        until(lambda: not thread.is_alive() or is_asleep(thread.native_id or 0))
        shared.clear()
        kept = [bytes(1 << 20) for _ in range(4)]
        region.mprotect(0, region.size, READ)
        thread.join()
        assert len(raised) == 1
        assert not any(map(any, kept))

    assert fork(body).wait() == 0


def settle() -> None:
    """Whatever is due comes here, at the latest."""


def load_bytes(region: Region) -> bytes:
    return bytes(region.buf[:4])


@pytest.mark.parametrize("region", ["mprotect"], indirect=True)
def test_waits_for_long_where_nobody_wants_the_interpreter(region: Region, joined: Callable[..., Child]) -> None:
    region.mprotect(0, PAGE, NONE)

    def body(child: Child) -> None:
        child.say()
        assert load_bytes(region) == OLD * 4

    child = joined(body)
    until_waits(child)
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 1.5)  # longer than it would wait otherwise
    region.mprotect(0, PAGE, READ)
    assert child.wait() == 0


@pytest.mark.parametrize("raises", [False, True])
def test_a_signal_ends_such_a_wait(region: Region, joined: Callable[..., Child], raises: bool) -> None:
    """The handler cannot run in the midst of it; where it returns the load has not taken place."""
    region.mprotect(0, PAGE, NONE)

    def body(child: Child) -> None:
        called = []

        def handler(*_: object) -> None:
            called.append(1)
            if raises:
                raise LookupError

        signal.signal(signal.SIGTERM, handler)
        child.say()
        try:
            load_bytes(region)
        except LookupError:
            assert raises
            settle()
        except ProtectionError:
            assert not raises
            settle()
        assert called == [1]
        settle()

    child = joined(body)
    until_waits(child)
    child.kill(signal.SIGTERM)
    assert child.wait() == 0


def test_others_run_during_a_wait_in_a_guard(region: Region) -> None:
    region.mprotect(0, PAGE, NONE)
    seen: list[bytes] = []

    def body() -> None:
        with region.guard():
            seen.append(load_bytes(region))

    thread = threading.Thread(target=body)
    thread.start()
    until(lambda: is_asleep(thread.native_id or 0))
    region.mprotect(0, PAGE, READ)
    thread.join(PATIENCE)
    assert seen == [OLD * 4]


# -- Ends --------------------------------------------------------------------------------------------------------------


def test_kill(region: Region, joined: Callable[..., Child]) -> None:
    child = joined(lambda child: (child.say(), store_item(region)))
    until_waits(child)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    region.mprotect(0, PAGE, READ_WRITE)
    assert region.read(0, 1) == OLD


EXIT = """
import sys, threading
from pathlib import Path
import numpy as np
import pyshare

region = pyshare.attach(int(sys.argv[1]))
array = np.frombuffer(region, dtype=np.uint8)
stores = {"view": lambda: region.buf.__setitem__(0, 1), "nogil": lambda: np.add(array, 1, out=array)}
thread = threading.Thread(target=stores[sys.argv[2]], daemon=True)
thread.start()
while Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0] not in {"202", "449", "455"}:
    pass
print("waits", flush=True)
"""


@pytest.mark.parametrize("store", ["view", "nogil"])
def test_interpreter_exit_with_a_waiter(
    region: Region, run_python: Callable[..., subprocess.CompletedProcess[str]], store: str
) -> None:
    done = run_python(EXIT, str(region.fileno()), store, pass_fds=[region.fileno()])
    assert (done.returncode, done.stdout, done.stderr) == (0, "waits\n", "")
    assert region.read(0, 1) == OLD


def test_close_under_a_waiter_dies(region: Region, crash: Crash) -> None:
    def body(_: Child) -> None:
        other = pyshare.attach(region.fileno())
        thread = threading.Thread(target=ctypes.memset, args=(other.address, 1, 1))
        thread.start()
        until(lambda: is_asleep(thread.native_id or 0))
        other.close()
        thread.join()

    code, err = crash(body)
    assert code == -signal.SIGSEGV
    assert "the region is closed in this process" in err


def test_safe_accessors_raise_at_once(region: Region) -> None:
    with pytest.raises(ProtectionError):
        region.write(0, b"1")
    region.mprotect(0, PAGE, NONE)
    with pytest.raises(ProtectionError):
        region.read(0, 1)


def test_a_handler_that_takes_more_than_a_second(fork: Callable[..., Child]) -> None:
    """It ends the wait of a call that keeps the interpreter, which raises when it has returned, if not before."""

    def body(_: Child) -> None:
        def handle(*_: object) -> None:
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                pass

        signal.signal(signal.SIGALRM, handle)
        with pyshare.create(size=16 * PAGE, prot=READ, on_violation="wait") as region:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(ProtectionError):  # noqa: PT012
                struct.pack_into("<Q", region.buf, PAGE, 7)
                for _ in range(1000):
                    pass

    assert fork(body).wait() == 0
