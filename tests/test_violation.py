"""The policy "raise": a forbidden access is a ProtectionError of the thread that made it; shared data is untouched."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import gc
import inspect
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Child, run_in_thread, until

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, ProtectionError, Region, RegionClosed

PAGE = 4096
OLD = b"\x05"  # each byte of the region
CLOSED, SECRET, OPEN = 2, 4, 8  # pages: the first of two that are READ, of two that are NONE, of those to be written
libc = ctypes.CDLL(None, use_errno=True)
libc.fdopen.restype = ctypes.c_void_p
libc.fread.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]

Crash = Callable[[Callable[[Child], object]], tuple[int, str]]


@pytest.fixture(params=["mprotect", "uffd"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def region(engine: str) -> Iterator[Region]:
    with pyshare.create(size=16 * PAGE, engine=engine, on_violation="raise") as region:
        region.write(0, OLD * region.size)
        region.mprotect(CLOSED * PAGE, 2 * PAGE, READ)
        region.mprotect(SECRET * PAGE, 2 * PAGE, NONE)
        yield region
        gc.collect()  # a traceback in a cycle may still have a view


@pytest.fixture(params=["main", "thread"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], object]], None]:
    """run(body): in the main thread, or in another one; what it raises is raised."""
    return run_in_thread if request.param == "thread" else lambda body: body() and None


def is_untouched(region: Region) -> bool:
    closed = region.read(CLOSED * PAGE, 2 * PAGE) == OLD * 2 * PAGE
    region.mprotect(SECRET * PAGE, 2 * PAGE, READ)
    return closed and region.read(SECRET * PAGE, 2 * PAGE) == OLD * 2 * PAGE


# -- Exact: the statement itself raises --------------------------------------------------------------------------------


def view_item(view: memoryview, _: Any) -> None:
    view[5] = 1


def view_slice(view: memoryview, _: Any) -> None:
    view[5:9] = b"1234"


def view_cast(view: memoryview, _: Any) -> None:
    numbers = view.cast("Q")
    numbers[1] = 1


def pack_into(view: memoryview, _: Any) -> None:
    struct.pack_into("Q", view, 8, 1)


def array_item(_: memoryview, array: Any) -> None:
    array[5] = 1


def array_all(_: memoryview, array: Any) -> None:
    array[:] = 1


def array_mask(_: memoryview, array: Any) -> None:
    array[array == 5] = 1


def array_add(_: memoryview, array: Any) -> None:
    array += 1


def array_power(_: memoryview, array: Any) -> None:
    array **= 2


def array_shift(_: memoryview, array: Any) -> None:
    array <<= 1


def array_fill(_: memoryview, array: Any) -> None:
    array.fill(1)


def array_sort(_: memoryview, array: Any) -> None:
    array.sort()


def add_out(_: memoryview, array: Any) -> None:
    np.add(array, 1, out=array)


def copyto(_: memoryview, array: Any) -> None:
    np.copyto(array, 1)


class Sub(np.ndarray[Any, Any]):
    """Made after the slots were wrapped, or before; both have to do."""


def subclass(_: memoryview, array: Any) -> None:
    late = type("Late", (np.ndarray,), {})
    seen = array.view(late)
    seen[5] = 1


def early_subclass(_: memoryview, array: Any) -> None:
    seen = array.view(Sub)
    seen += 1


def overriding_subclass(_: memoryview, array: Any) -> None:
    class Overriding(np.ndarray[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)

    seen = array.view(Overriding)
    seen[5] = 1


STORES = [view_item, view_slice, view_cast, pack_into, array_item, array_all, array_mask, array_add, array_power]
STORES += [array_shift, array_fill, array_sort, add_out, copyto, subclass, early_subclass, overriding_subclass]


@pytest.mark.parametrize("store", STORES, ids=lambda form: form.__name__)
def test_store_raises(region: Region, run: Callable[..., None], store: Callable[..., None]) -> None:
    with memoryview(region)[CLOSED * PAGE : (CLOSED + 2) * PAGE] as view:

        def body() -> None:
            with pytest.raises(ProtectionError) as caught:
                store(view, np.frombuffer(view, dtype=np.uint8))
            lines, first = inspect.getsourcelines(store)
            assert caught.value.file == __file__
            assert caught.value.line in range(first, first + len(lines))
            assert bytes(view) == OLD * 2 * PAGE  # in this process too

        run(body)
        gc.collect()
    assert is_untouched(region)


def load_item(view: memoryview, _: Any) -> object:
    return view[5]


def load_bytes(view: memoryview, _: Any) -> object:
    return bytes(view)


def load_compared(view: memoryview, _: Any) -> object:
    return view == b"\x05" * len(view)


def load_scalar(_: memoryview, array: Any) -> object:
    return array[5]


def load_sum(_: memoryview, array: Any) -> object:
    return array.sum()


def load_plus(_: memoryview, array: Any) -> object:
    return array + 1


def load_minus(_: memoryview, array: Any) -> object:
    return -array


def load_less(_: memoryview, array: Any) -> object:
    return array < 9


def load_contained(_: memoryview, array: Any) -> object:
    return 7 in array


LOADS = [load_item, load_bytes, load_compared, load_scalar, load_sum, load_plus, load_minus, load_less, load_contained]


@pytest.mark.parametrize("load", LOADS, ids=lambda form: form.__name__)
def test_load_raises_and_sees_nothing(region: Region, run: Callable[..., None], load: Callable[..., object]) -> None:
    with memoryview(region)[SECRET * PAGE : (SECRET + 2) * PAGE] as view:

        def body() -> None:
            with pytest.raises(ProtectionError) as caught:
                load(view, np.frombuffer(view, dtype=np.uint8))
            assert (caught.value.required, caught.value.actual) == (READ, NONE)

        run(body)
        gc.collect()


def test_what_is_loaded_is_zero(region: Region) -> None:
    seen = ctypes.create_string_buffer(b"\x01" * PAGE, PAGE)
    with pytest.raises(ProtectionError), region.guard():
        ctypes.memmove(seen, region.address + SECRET * PAGE, PAGE)
    assert seen.raw == bytes(PAGE)
    assert is_untouched(region)


def test_allowed_accesses_are_as_ever(region: Region) -> None:
    array = np.frombuffer(region, dtype=np.uint8)[OPEN * PAGE :]
    array += 1
    region.buf[OPEN * PAGE] = 9
    assert array.sum() == 6 * array.size + 3
    with pytest.raises(TypeError):
        region.buf["no"] = 1  # type: ignore[call-overload]
    with pytest.raises(ZeroDivisionError):
        divmod(region.buf[OPEN * PAGE], 0)
    del array


# -- What the error says -----------------------------------------------------------------------------------------------


def test_error_says_everything(engine: str) -> None:
    name = f"violation-{engine}-{os.getpid()}"
    with pyshare.create(name, size=4 * PAGE, engine=engine, on_violation="raise") as region:
        generation = region.mprotect(PAGE, PAGE, READ)
        with pytest.raises(ProtectionError) as caught:
            region.buf[PAGE + 7] = 1
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        error = caught.value
        assert type(error).__name__ == "ProtectionError"
        assert (error.region, error.offset, error.required, error.actual) == (name, PAGE, 2, READ)
        assert (error.generation, error.author) == (generation, os.getpid())
        assert (error.file, error.line) == (__file__, line)
        assert str(error) == (
            f"store: page 1 (offset {PAGE + 7}) of region {name!r} is READ since change {generation} "
            f"by pid {os.getpid()}; WRITE is needed, at {__file__}:{line}"
        )
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is ProtectionError
        assert (str(again), vars(again)) == (str(error), vars(error))


def test_safe_accessors_name_no_line(region: Region) -> None:
    with pytest.raises(ProtectionError) as caught:
        region.write(CLOSED * PAGE, b"1")
    assert (caught.value.file, caught.value.line) == (None, None)
    assert str(caught.value).endswith("; WRITE is needed")


# -- guard() ---------------------------------------------------------------------------------------------------------


class Record(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int)]


def test_guard_is_exact_for_anything(region: Region, run: Callable[..., None]) -> None:
    where = region.address + CLOSED * PAGE
    record, items = Record.from_address(where), (ctypes.c_ubyte * PAGE).from_address(where)

    def assign_attribute() -> None:
        record.number = 1

    def assign_item() -> None:
        items[3] = 1

    def call() -> None:
        ctypes.memset(where, 1, 2 * PAGE)

    def body() -> None:
        for store in (assign_attribute, assign_item, call):
            with pytest.raises(ProtectionError) as caught, region.guard():
                store()
            assert caught.value.file == __file__

    run(body)
    assert is_untouched(region)


def test_guard_passes_on_what_else_is_raised(region: Region) -> None:
    with pytest.raises(KeyError), region.guard():
        raise KeyError
    with region.guard() as guard, guard:
        region.buf[0] = 1


def test_thread_that_ends_before_it_is_told(region: Region) -> None:
    """It runs no Python code, so nobody can be told; the next call ends its quarantine."""
    address, before = region.address + CLOSED * PAGE, set(os.listdir("/proc/self/task"))
    _thread.start_new_thread(ctypes.CDLL(None).memset, (ctypes.c_void_p(address), 1, PAGE))
    until(lambda: ctypes.string_at(address, 1) == b"\x01")
    until(lambda: set(os.listdir("/proc/self/task")) <= before)
    assert region.protection(CLOSED * PAGE) == READ
    assert ctypes.string_at(address, PAGE) == OLD * PAGE


def test_second_violation_before_the_first_was_raised(region: Region) -> None:
    with pytest.raises(ProtectionError) as caught, region.guard():
        ctypes.memset(region.address + CLOSED * PAGE + 1, 1, 2 * PAGE - 1)
    assert f"(offset {CLOSED * PAGE + 1})" in str(caught.value)
    assert is_untouched(region)


def test_pages_of_several_regions(region: Region, engine: str) -> None:
    with pyshare.create(size=PAGE, prot=NONE, engine=engine, on_violation="raise") as other:
        with pytest.raises(ProtectionError) as caught, region.guard():
            ctypes.memmove(region.address + CLOSED * PAGE, other.address, PAGE)
        assert caught.value.required in (READ, 2)
        other.mprotect(0, PAGE, READ_WRITE)
        other.buf[0] = 7
        with other.guard():
            ctypes.memmove(region.address + OPEN * PAGE, other.address, 1)
        assert region.buf[OPEN * PAGE] == 7
    assert is_untouched(region)


# -- Many pages -------------------------------------------------------------------------------------------------------


def private_memory() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@contextlib.contextmanager
def peak_of_private_memory() -> Iterator[list[int]]:
    """A list whose sum is, at the end, by how much it grew at most."""
    over, peak, before = threading.Event(), [0], private_memory()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], private_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield peak
    over.set()
    thread.join()


@pytest.mark.parametrize("step", [1, 2], ids=["all", "every second"])
def test_200_000_pages_in_one_operation(engine: str, step: int) -> None:
    """The interpreter is not held meanwhile: `watch` runs."""
    pages = 200_000 * step
    with pyshare.create(size=pages * PAGE, engine=engine, on_violation="raise") as region:
        array = np.frombuffer(region, dtype=np.uint8).reshape(pages, PAGE)[::step, 8]
        region.mprotect(0, region.size, READ)
        region.mprotect(16 * PAGE, PAGE, READ_WRITE)  # so that, by the uffd engine, one chunk is armed
        region.mprotect(16 * PAGE, PAGE, READ)
        began = time.monotonic()
        with peak_of_private_memory() as peak, pytest.raises(ProtectionError):
            array += 1
        assert time.monotonic() - began < PATIENCE
        assert 0 < peak[0] < 128 << 20
        assert not any(region.read(page * PAGE + 8, 1)[0] for page in range(0, pages, 997))
        mappings = sum("memfd:pyshare" in line for line in Path("/proc/self/maps").read_text().splitlines())
        assert mappings < 100
        gc.collect()
        del array


def test_scattered_pages_leave_no_mapping(region: Region) -> None:
    def mappings() -> int:
        low, high = region.address, region.address + region.size
        lines = [line.split("-", 1) for line in Path("/proc/self/maps").read_text().splitlines()]
        return sum(low <= int(start, 16) < high for start, _ in lines)

    with pytest.raises(ProtectionError):
        region.buf[CLOSED * PAGE] = 1
    before = mappings()
    for page in (CLOSED + 1, CLOSED):
        with pytest.raises(ProtectionError):
            region.buf[page * PAGE] = 1
        assert mappings() <= before


# -- While a page is in quarantine ------------------------------------------------------------------------------------


class Stray:
    """A thread in the midst of one C call that has stored the first bytes of `page`, and is to store more."""

    FIRST = b"\x01" * 10
    MORE = b"\x02" * 10

    def __init__(self, region: Region, page: int = CLOSED) -> None:
        self.raised: list[BaseException] = []
        self.region, self.at = region, region.address + page * PAGE
        receive, self.send = os.pipe()
        self.file = libc.fdopen(receive, b"r")
        libc.setvbuf(ctypes.c_void_p(self.file), None, 0, 4 * PAGE)
        os.write(self.send, self.FIRST)
        self.thread = threading.Thread(target=self._store)
        self.thread.start()
        until(lambda: ctypes.string_at(self.at, 10) == self.FIRST)  # in this process everybody sees what it stored

    def _store(self) -> None:
        try:
            with self.region.guard():
                libc.fread(self.at, 1, 20, self.file)
        except BaseException as error:
            self.raised.append(error)

    def end(self, more: bytes = MORE) -> BaseException | None:
        """What was raised."""
        if more:
            os.write(self.send, more)
        os.close(self.send)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        libc.fclose(self.file)
        return self.raised[0] if self.raised else None


def test_nobody_else_sees_it(region: Region, joined: Callable[..., Child]) -> None:
    def other(child: Child) -> None:
        child.say()
        child.hear()
        child.say(region.read(CLOSED * PAGE, 20).hex())

    child = joined(other)
    stray = Stray(region)
    child.say()
    assert child.hear() == (OLD * 20).hex()
    assert isinstance(stray.end(), ProtectionError)
    assert is_untouched(region)


@pytest.mark.parametrize("by", ["here", "another"])
def test_change_meanwhile(region: Region, joined: Callable[..., Child], by: str) -> None:
    """What is stored from then on is allowed; what was not stays undone, and is raised."""

    def other(child: Child) -> None:
        child.say()
        child.hear()
        region.mprotect(CLOSED * PAGE, PAGE, READ_WRITE)
        child.say()

    child = joined(other)
    stray = Stray(region)
    if by == "here":
        region.mprotect(CLOSED * PAGE, PAGE, READ_WRITE)
    else:
        child.say()
        child.hear()
    assert isinstance(stray.end(), ProtectionError)
    assert region.read(CLOSED * PAGE, 20) == OLD * 10 + stray.MORE


def test_change_elsewhere_meanwhile(region: Region) -> None:
    stray = Stray(region)
    region.mprotect(OPEN * PAGE, PAGE, READ)
    region.mprotect(SECRET * PAGE, 2 * PAGE, READ_WRITE)
    assert isinstance(stray.end(), ProtectionError)
    assert is_untouched(region)


@pytest.mark.parametrize("window", [False, True], ids=["in place", "window"])
def test_lease_meanwhile(region: Region, window: bool) -> None:
    stray = Stray(region)
    with region.lease(CLOSED * PAGE, PAGE, window=window) as lease:
        lease.view[0] = 9
        assert isinstance(stray.end(b""), ProtectionError)
    assert region.read(CLOSED * PAGE, 20) == b"\x09" + OLD * 19


def test_fork_meanwhile(region: Region, fork: Callable[..., Child]) -> None:
    stray = Stray(region)

    def body(_: Child) -> None:
        assert region.read(CLOSED * PAGE, 20) == OLD * 20
        assert ctypes.string_at(stray.at, 20) == OLD * 20
        with pytest.raises(ProtectionError):
            region.buf[CLOSED * PAGE] = 1
        region.mprotect(CLOSED * PAGE, PAGE, READ_WRITE)
        region.buf[CLOSED * PAGE + 15] = 7

    assert fork(body).wait() == 0
    assert isinstance(stray.end(b""), ProtectionError)
    assert region.read(CLOSED * PAGE, 20) == OLD * 15 + b"\x07" + OLD * 4


def test_fork_by_the_thread_itself(region: Region, fork: Callable[..., Child]) -> None:
    """Both processes learn of it. (os.fork calls Python code before, which would be told instead of its caller.)"""
    receive, send = os.pipe()

    def body(_: Child) -> None:
        items = (ctypes.c_ubyte * PAGE).from_address(region.address + CLOSED * PAGE)
        fork_now = ctypes.PyDLL(None).fork
        parent = os.getpid()
        with pytest.raises(ProtectionError):  # noqa: PT012
            items[0] = 1
            fork_now()
        assert region.read(CLOSED * PAGE, 1) == OLD
        os.write(send, b"p" if os.getpid() == parent else b"c")
        if os.getpid() != parent:
            os._exit(0)

    assert fork(body).wait() == 0
    os.close(send)
    with os.fdopen(receive, "rb") as file:
        assert sorted(file.read()) == sorted(b"pc")


def test_close_meanwhile(engine: str) -> None:
    region = pyshare.create(size=4 * PAGE, prot=READ, engine=engine, on_violation="raise")
    address = region.address
    stray = Stray(region, 0)
    region.close()
    error = stray.end(b"")
    assert isinstance(error, ProtectionError)
    assert error.actual == READ
    with pytest.raises(RegionClosed):
        region.on_violation()
    assert not any(f"{address:x}-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_store_after_close_dies(engine: str, crash: Crash) -> None:
    region = pyshare.create(size=4 * PAGE, prot=READ, engine=engine, on_violation="raise")

    def body(_: Child) -> None:
        stray = Stray(region, 0)
        region.close()
        stray.end()

    code, err = crash(body)
    assert code == -signal.SIGSEGV
    assert "the region is closed in this process" in err
    region.close()


# -- Where it cannot be told ------------------------------------------------------------------------------------------


def test_thread_without_python_dies_with_its_line(region: Region, crash: Crash) -> None:
    def body(_: Child) -> None:
        thread, address = ctypes.c_ulong(), ctypes.c_void_p(region.address + CLOSED * PAGE)
        libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.time, ctypes.c_void_p), address)
        libc.pthread_join(thread, None)

    code, err = crash(body)
    assert code == -signal.SIGSEGV
    assert err.count("pyshare: forbidden store") == 1
    assert f"offset {CLOSED * PAGE}: page {CLOSED} is READ since change 1 by pid {os.getpid()}" in err


def test_execution_dies(region: Region, crash: Crash) -> None:
    code, err = crash(lambda _: ctypes.CFUNCTYPE(None)(region.address + CLOSED * PAGE)())
    assert code == -signal.SIGSEGV
    assert "pyshare: forbidden execution" in err


def test_outside_the_data_dies(region: Region, crash: Crash) -> None:
    code, err = crash(lambda _: ctypes.memset(region.address + region.size, 1, 1))
    assert code == -signal.SIGSEGV
    assert "access outside the data" in err


def test_system_calls_get_efault(region: Region) -> None:
    receive, send = os.pipe()
    os.write(send, b"1234")
    with pytest.raises(OSError, match="Bad address"):
        os.readv(receive, [region.buf[CLOSED * PAGE : CLOSED * PAGE + 4]])
    os.close(receive)
    os.close(send)
    assert is_untouched(region)


class Stop(Exception):
    """What another library may raise in a thread, by the means that we use."""


def test_another_asynchronous_exception_comes_after(region: Region) -> None:
    got: list[BaseException] = []
    receive, send = os.pipe()
    file = libc.fdopen(receive, b"r")

    def body() -> None:
        try:
            try:
                libc.fread(region.address + CLOSED * PAGE, 1, 5, file)
            except ProtectionError:
                for _ in range(100):
                    time.sleep(0)
        except Stop as error:
            got.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    until(lambda: Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith("0 "))  # read(2)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Stop))
    os.write(send, b"12345")
    thread.join(PATIENCE)
    os.close(send)
    libc.fclose(file)
    assert len(got) == 1
    assert isinstance(got[0].__context__, ProtectionError)
    assert is_untouched(region)


# -- Which policy ------------------------------------------------------------------------------------------------------


def test_policy_is_the_regions_then_ones_own(engine: str, fork: Callable[..., Child]) -> None:
    with pyshare.create(size=PAGE, prot=READ, engine=engine, on_violation="raise") as region:
        assert region.on_violation() == "raise"
        with pyshare.attach(region.fileno()) as other:
            assert region.on_violation("wait") == "wait"
            assert (other.on_violation(), other.on_violation("die"), other.on_violation()) == ("raise", "die", "die")
        with pyshare.attach(region.fileno()) as later:
            assert later.on_violation() == "raise"

        def body(_: Child) -> None:
            assert region.on_violation() == "wait"
            region.on_violation("raise")
            with pytest.raises(ProtectionError):
                region.buf[0] = 1

        assert fork(body).wait() == 0
        assert region.on_violation() == "wait"
    with pyshare.create(size=PAGE) as region:
        assert region.on_violation() == "die"


@pytest.mark.parametrize("wrong", ["", "Raise", 1, b"die"])
def test_wrong_policy(region: Region, wrong: Any) -> None:
    with pytest.raises(ValueError, match="'die', 'raise' or 'wait'"):
        region.on_violation(wrong)
    with pytest.raises(ValueError, match="'die', 'raise' or 'wait'"):
        pyshare.create(size=PAGE, on_violation=wrong)
    assert region.on_violation() == "raise"


def test_die_again(region: Region, crash: Crash) -> None:
    def body(_: Child) -> None:
        region.on_violation("die")
        with region.guard():
            region.buf[CLOSED * PAGE] = 1

    code, err = crash(body)
    assert code == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in err
    assert err.count("pyshare: forbidden store") == 1


def test_pages_that_are_executable(engine: str) -> None:
    with pyshare.create(size=2 * PAGE, prot=READ | EXEC, engine=engine, on_violation="raise") as region:
        with pytest.raises(ProtectionError):
            region.buf[0] = 1
        assert region.buf[0] == 0


# -- Races -------------------------------------------------------------------------------------------------------------


def test_strays_while_everything_changes(region: Region, joined: Callable[..., Child]) -> None:
    """Threads that store into READ pages, while others change, lease and write the pages around them."""
    over = threading.Event()
    counts = {"raised": 0, "missed": 0}

    def stray(page: int) -> None:
        items = (ctypes.c_ubyte * PAGE).from_address(region.address + page * PAGE)
        while not over.is_set():
            try:
                with region.guard():
                    items[3] = items[5] = 1
                counts["missed"] += 1
            except ProtectionError:
                counts["raised"] += 1

    def change(child: Child) -> None:
        child.say()
        for number in range(300):
            region.mprotect(OPEN * PAGE, 2 * PAGE, READ, timeout=None)
            with region.lease(OPEN * PAGE, PAGE, timeout=None) as lease:
                lease.view[:] = bytes([number % 256]) * PAGE
            region.mprotect(OPEN * PAGE, 2 * PAGE, READ_WRITE, timeout=None)
        assert region.read(CLOSED * PAGE, 2 * PAGE) == OLD * 2 * PAGE

    threads = [threading.Thread(target=stray, args=(page,)) for page in (CLOSED, CLOSED + 1)]
    for thread in threads:
        thread.start()
    children = [joined(change) for _ in range(2)]
    for _ in range(100):
        with region.lease(OPEN * PAGE, PAGE, timeout=None) as lease:
            lease.view[0] = 1
        region.mprotect(7 * PAGE, PAGE, READ, timeout=None)
        region.mprotect(7 * PAGE, PAGE, READ_WRITE, timeout=None)
    ends = [child.wait() for child in children]
    over.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert ends == [0, 0]
    assert counts["missed"] == 0
    assert counts["raised"] > 10
    assert is_untouched(region)


def test_a_program_that_is_traced_goes_on() -> None:
    """A violation that was raised leaves nothing behind for which the interpreter would look for ever."""
    program = """
        import sys, pyshare
        region = pyshare.create(size=1, prot=pyshare.READ, on_violation="raise")
        for _ in range(3):
            try:
                region.buf[0] = 1
            except pyshare.ProtectionError:
                pass
        lines = []
        def function():
            return 1
        sys.settrace(lambda frame, event, _: lines.append(event))
        function()
        sys.settrace(None)
        region.close()
        print(lines)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "['call']\n"


def test_a_violation_at_the_recursion_limit_ends() -> None:
    """Where not even the exception can be made, the RecursionError comes instead, and nothing waits for a call."""
    program = """
        import sys, pyshare
        region = pyshare.create(size=1, prot=pyshare.READ, on_violation="raise")
        view, reached, told = region.buf, 0, 0
        def deep(depth):
            global reached
            if depth:
                deep(depth - 1)
            else:
                reached += 1
                view[0] = 1
        for depth in range(sys.getrecursionlimit()):
            try:
                try:
                    deep(depth)
                except RecursionError:
                    (lambda: None)()  # what is due comes here
            except pyshare.ProtectionError:
                told += 1
        print(reached - told < 10, region.read(0, 1))
        region.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True b'\\x00'\n"
