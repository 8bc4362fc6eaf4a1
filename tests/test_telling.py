"""What runs in the midst of a violation is left alone, and loses nothing: signals' handlers, finalisers, tracers."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import gc
import operator
import os
import profile
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Child, run_in_thread, until

import pyshare
from pyshare import NONE, READ, READ_WRITE, ProtectionError, Region

PAGE = 4096
SIZE = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.fdopen.restype = ctypes.c_void_p
libc.fread.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
OLD = sys.version_info < (3, 12)


@pytest.fixture
def region() -> Iterator[Region]:
    with pyshare.create(size=SIZE, prot=READ, on_violation="raise") as region:
        yield region
        gc.collect()


def by_slot(array: Any) -> None:
    array[:] = 1


def by_method(array: Any) -> None:
    array.fill(1)


def by_function(array: Any) -> None:
    np.add(array, 1, out=array)


def by_ctypes(array: Any) -> None:
    ctypes.memset(array.ctypes.data, 1, array.nbytes)


def settle() -> None:
    """Whatever is due comes here, at the latest."""


STORES = [by_slot, by_method, by_function, by_ctypes]
each_store = pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)


def tell(store: Callable[[Any], None], array: Any) -> None:
    reached, file = False, None
    try:
        store(array)
        reached = True
    except ProtectionError as error:
        file = error.file
    assert (reached, file) == (False, __file__)


def set_trace(function: Callable[..., Any] | None) -> None:
    sys.settrace(function)


def set_profile(function: Callable[..., Any] | None) -> None:
    sys.setprofile(function)


each_tracer = pytest.mark.parametrize(
    ("begin", "running"),
    [(None, None), (set_trace, sys.gettrace), (set_profile, sys.getprofile)],
    ids=["untraced", "traced", "profiled"],
)


def tracer(*_: Any) -> Any:
    return tracer


# -- Signals -----------------------------------------------------------------------------------------------------------


@each_tracer
@each_store
def test_no_signal_is_lost(
    region: Region,
    fork: Callable[..., Child],
    store: Callable[[Any], None],
    begin: Callable[..., None] | None,
    running: Callable[[], object] | None,
) -> None:
    """Each handler runs to its end, and each violation is told of in its own statement."""

    def body(_: Child) -> None:
        array, handled = np.frombuffer(region, np.uint8), 0

        def handler(*_: object) -> None:
            nonlocal handled
            len(str(handled))
            handled += 1

        signal.signal(signal.SIGALRM, handler)
        if begin:
            begin(tracer)
        for number in range(10):
            signal.setitimer(signal.ITIMER_REAL, 0.0005)  # it comes in the midst of one of the stores
            while handled == number:
                tell(store, array)
        if running:
            assert running() is tracer
            begin(None)  # type: ignore[misc]

    assert fork(body).wait() == 0


class Late(Exception):
    pass


def blocked_store(region: Region) -> None:
    """A C call that has stored, and goes on until a signal comes."""
    receive, send = os.pipe()
    os.write(send, b"12345")
    file = libc.fdopen(receive, b"r")
    libc.fread(region.address, 1, 10, file)
    os.close(send)


def is_reading(child: Child) -> bool:
    words = Path(f"/proc/{child.pid}/syscall").read_text().split()
    return words[0] == "0" and words[1] != hex(child._receive)  # read(2), and not of what we have to say


def test_a_handlers_exception_is_not_hidden(region: Region, fork: Callable[..., Child]) -> None:
    """It comes from the statement, has the violation as its context, and nothing comes afterwards."""

    def body(child: Child) -> None:
        def handler(*_: object) -> None:
            raise Late

        signal.signal(signal.SIGTERM, handler)
        child.say()
        try:
            blocked_store(region)
        except Late as error:
            settle()
            context = error.__context__
        assert isinstance(context, ProtectionError)
        assert context.file == __file__
        settle()

    child = fork(body)
    child.hear()
    until(lambda: is_reading(child))
    child.kill(signal.SIGTERM)
    assert child.wait() == 0


def test_a_handler_runs_before_the_statement_raises(region: Region, fork: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        order: list[object] = []
        signal.signal(signal.SIGTERM, lambda *_: order.append("handled"))
        child.say()
        try:
            blocked_store(region)
        except ProtectionError as error:
            order.append(error.file)
        assert order == ["handled", __file__]

    child = fork(body)
    child.hear()
    until(lambda: is_reading(child))
    child.kill(signal.SIGTERM)
    assert child.wait() == 0


# -- Finalisers --------------------------------------------------------------------------------------------------------


class Node:
    """Garbage for the collector, whose finaliser is Python code that uses arrays."""

    finished = 0

    def __init__(self, number: Any) -> None:
        self.me, self.number = self, number

    def __del__(self) -> None:
        self.number[0] = 1
        Node.finished += 1


@pytest.fixture
def hasty_collector() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(3)
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("where", ["main", "thread"])
@each_store
@pytest.mark.usefixtures("hasty_collector")
def test_finalisers_are_left_alone(
    region: Region, monkeypatch: pytest.MonkeyPatch, store: Callable[[Any], None], where: str
) -> None:
    array, plain = np.frombuffer(region, np.uint8)[:100], np.zeros(1)
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: ignored.append(about.exc_value))

    def body() -> None:
        Node.finished = 0
        for _ in range(500):
            Node(plain)
            tell(store, array)
        gc.collect()
        assert (Node.finished, ignored) == (500, [])

    run_in_thread(body) if where == "thread" else body()


# -- Python code that C code calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["main"] if OLD else ["main", "thread"])
def test_callbacks_of_the_same_call_are_left_alone(region: Region, where: str) -> None:
    """The call is told of, when it returns; in other threads of Python 3.11 its callback is."""
    region.mprotect(0, PAGE, NONE)
    found: list[int] = []

    def body() -> None:
        view = region.buf[:4]
        with pytest.raises(ProtectionError):
            re.sub(rb"\0", lambda match: found.append(match.start()) or b"", view)
        assert found == [0, 1, 2, 3]

    run_in_thread(body) if where == "thread" else body()


def test_a_callback_that_does_not_end_is_told(region: Region) -> None:
    """After a second: the call may be one that never returns, as that of an event loop in C."""
    region.mprotect(0, PAGE, NONE)
    raised: list[float] = []

    def spin(until: float) -> None:
        while time.monotonic() < until:
            pass

    def for_long(_: object) -> bytes:
        began = time.monotonic()
        try:
            spin(began + PATIENCE)
        except ProtectionError:
            raised.append(time.monotonic() - began)
        return b""

    re.sub(rb"\0", for_long, region.buf[:1])
    assert len(raised) == 1


class Element:
    """What an array of objects adds: any Python code, in the midst of a slot of ndarray."""

    def __init__(self, body: Callable[[], object]) -> None:
        self.body = body

    def __add__(self, _: object) -> Any:
        self.body()
        return self

    __radd__ = __add__


def elements(body: Callable[[], object]) -> Any:
    array = np.empty(1, object)
    array[0] = Element(body)
    return array


def test_code_in_the_midst_of_a_slot_is_told_of_its_own(region: Region) -> None:
    array, told = np.frombuffer(region, np.uint8), []

    def body() -> None:
        for store in STORES:
            with pytest.raises(ProtectionError):
                store(array)
            told.append(store)

    _ = elements(body) + np.zeros(1)
    assert told == STORES


def test_code_in_the_midst_of_a_slot_is_not_told_of_anothers(region: Region) -> None:
    region.mprotect(0, PAGE, NONE)
    region.mprotect(PAGE, PAGE, READ_WRITE)
    array, done = np.frombuffer(region, np.float64), []

    def body() -> None:
        array[PAGE // 8] = 5
        array[PAGE // 8 : 2 * PAGE // 8].fill(6)
        done.append(array[PAGE // 8])

    with pytest.raises(ProtectionError):
        _ = elements(body) + array[:1]
    assert done == [6]


@pytest.mark.parametrize("own", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_the_slot_raises_itself(region: Region, own: type[BaseException]) -> None:
    """An error may come of what was loaded; who ends the program is not kept from it."""
    region.mprotect(0, PAGE, NONE)

    def body() -> None:
        raise own

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        _ = elements(body) + np.frombuffer(region, np.float64)[:1]
    both = [type(caught.value), type(caught.value.__context__)]
    assert both == [type(caught.value), own] if own is ValueError else both[0] is own
    assert isinstance(caught.value if own is ValueError else caught.value.__context__, ProtectionError)


# -- Tracers -----------------------------------------------------------------------------------------------------------


@each_store
def test_pure_profiler(region: Region, store: Callable[[Any], None]) -> None:
    array = np.frombuffer(region, np.uint8)

    def task() -> str:
        with contextlib.suppress(ProtectionError):
            store(array)
        try:
            with region.guard():
                ctypes.c_ubyte.from_address(region.address).value = 1
        except ProtectionError:
            return "told"
        return "not told"

    assert profile.Profile().runcall(task) == "told"


# -- guard() -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("other", [KeyboardInterrupt, SystemExit, KeyError])
def test_guard_replaces_no_exception(region: Region, other: type[BaseException], where: str) -> None:
    items = (ctypes.c_ubyte * PAGE).from_address(region.address)

    def body() -> None:
        before = ValueError()
        with pytest.raises(other) as caught, region.guard():  # noqa: PT012
            items[0] = 1
            raise other from before
        settle()
        error = caught.value
        assert error.__cause__ is before
        assert isinstance(error.__context__, ProtectionError)
        assert error.__context__.file == __file__
        assert region.buf[0] == 0

    run_in_thread(body) if where == "thread" else body()


@pytest.mark.parametrize("where", ["main", "thread"])
def test_guard_after_another_violation(region: Region, where: str) -> None:
    """What was due before the block comes at its end, and once."""
    items, array = (ctypes.c_ubyte * PAGE).from_address(region.address), np.frombuffer(region, np.uint8)

    def body() -> None:
        guard = region.guard()
        with pytest.raises(ProtectionError) as caught:  # noqa: PT012
            items[7] = 1
            array[8] = 1
            with guard:
                items[9] = 1
        assert "(offset 7)" in str(caught.value)
        with guard:
            pass
        settle()

    run_in_thread(body) if where == "thread" else body()


def test_a_signal_that_came_first_does_not_make_it_late(region: Region) -> None:
    """Its handler's exception would end the statement, and the violation would be told of anywhere later."""
    python, seen = ctypes.PyDLL(None), []  # whose functions are called with the interpreter held
    signal_itself = functools.partial(getattr(python, "raise"), signal.SIGINT)
    store = functools.partial(python.memset, ctypes.c_void_p(region.address), 1, 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            list(map(operator.call, [signal_itself, store]))
            seen.append("reached")
        except ProtectionError:
            settle()
    except KeyboardInterrupt:
        seen.append("interrupted")
    finally:
        signal.signal(signal.SIGINT, before)
    settle()
    assert seen == ["interrupted"]


@each_tracer
def test_a_tracer_is_not_told_in_place_of_who_stores(
    region: Region, begin: Callable[..., None] | None, running: Callable[[], object]
) -> None:
    """An exception of a tracer replaces the one that it is called for."""
    python = ctypes.PyDLL(None)
    store = functools.partial(python.memset, ctypes.c_void_p(region.address), 1, 1)
    raised: list[BaseException] = []

    def fail() -> None:
        list(map(operator.call, [store, lambda: 1 // 0]))

    def tracer(*_: object) -> object:
        settle()
        return tracer

    before = running() if running else None
    if begin:
        begin(tracer)
    try:
        fail()
    except BaseException as error:
        settle()
        raised.append(error)
    finally:
        if begin:
            begin(before)
    while raised[-1].__context__ is not None:
        raised.append(raised[-1].__context__)
    kinds = {type(error).__name__ for error in raised}
    assert "ZeroDivisionError" in kinds or kinds == {"ProtectionError"}


@each_store
def test_a_thread_that_creates_another_is_told_itself(region: Region, store: Callable[[Any], None]) -> None:
    """Python 3.11 gives a thread that is being created its creator's number; one that could not be keeps it."""
    array = region.numpy(np.uint8, PAGE)

    def body() -> None:
        before = threading.stack_size(1 << 45)
        try:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                _thread.start_new_thread(settle, ())
        finally:
            threading.stack_size(before)
        tell(store, array)

    run_in_thread(body)


def test_many_threads_are_told_each_its_own(region: Region) -> None:
    """Pending calls are any thread's; what one comes across that is another's is handed over."""
    over = threading.Event()
    wrong: list[object] = []

    def spin() -> None:
        while not over.is_set():
            settle()

    def store(page: int) -> None:
        items = (ctypes.c_ubyte * PAGE).from_address(region.address + page * PAGE)
        try:
            for number in range(300):
                try:
                    with region.guard():
                        items[number] = 1
                        if number % 2:
                            os.sched_yield()
                    wrong.append(number)
                except ProtectionError as error:
                    if f"(offset {page * PAGE + number})" not in str(error):
                        wrong.append(error)
        except BaseException as error:
            wrong.append(error)

    spinner = threading.Thread(target=spin)
    spinner.start()
    threads = [threading.Thread(target=store, args=(page,)) for page in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    over.set()
    spinner.join()
    assert wrong == []
