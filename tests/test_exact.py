"""Where the ProtectionError comes: in the very statement, for each form of one that loads or stores."""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import operator
import os
import struct
import sys
import threading
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Child, late_in_two_threads, run_in_thread

import pyshare
from pyshare import NONE, READ, READ_WRITE, ProtectionError, Region

PAGE = 4096
PROMISES = (Path(__file__).parent.parent / "docs" / "promises.md").read_text()
STORES = """
v[0] = 1
v[0:4] = b"1234"
v.cast("Q")[1] = 1
a[0] = 1
a[:] = 1
a[a == a] = 1
a[[1, 2]] = 1
a[...] += 1
a += 1
a -= 1
a *= 2
a //= 2
a %= 2
a **= 2
a <<= 1
a >>= 1
a &= 1
a |= 8
a ^= 1
f /= 2
sub[0] = 1
sub += 1
over[0] = 1
masked[0] = 1
a.flat[0] = 1
a.flat[:4] = 1
a.flat = 1
c.real = 1
c.imag = 1
sub.flat = 1
it[0] = 1
for x in buffered: x[...] = 1
record["x"] = 1
record[0] = 1
for a[0] in (1,): pass
a.fill(1)
a.sort()
a.put([0], [1], mode="clip")
np.add(a, 1, a)
np.add(a, 1, out=a)
np.add(*t)
np.add(a, 1, **k)
np.copyto(a, 1)
np.copyto(dst=a, src=1)
partial()
struct.pack_into("Q", v, 8, 1)
ctypes.memset(address, 1, 10)
operator.setitem(a, 0, 1)
operator.iadd(a, 1)
setattr(c, "real", 1)
a.__setitem__(0, 1)
v.__setitem__(0, 1)
[np.negative(x, out=x) for x in (a,)]
sum(np.negative(x, out=x)[0] for x in (a,))
"""
LOADS = """
x = v[0]
x = v[:8] == b"12345678"
x = b"12345678" == v[:8]
x = v[:8] == memoryview(b"12345678")
x = bytearray(b"12345678") == v[:8]
x = v.cast("Q")[1]
x = 7 in v[:8]
x = v[:2] in b"abc"
x = v[:2] in bytearray(b"abc")
x = [*v[:8]]
x, y = v[:2]
for x in v[:8]: pass
x = {v.toreadonly()}
x = {v.toreadonly(): 1}
x = b"head" + v[:8]
x = bytearray(b"head") + v[:8]
x = b"%b" % v[:8]
x = bytearray(b"%b") % v[:8]
other[0:8] = v[:8]
other += v[:8]
x = a[0]
x = a[[1, 2]]
x = a[a == 7]
x = 7 in a
x = [*a]
x, y = a[:2]
for x in a: pass
x = a + 1
x = 1 + a
x = 2.0 ** a
x = [1] * a[:1]
x = np.float64(2) * a
x = np.int8(2) - a
x = np.uint8(2) + a
x = np.bool_(1) | a
x = np.float32(2) / f
x = np.int64(2) // a
x = np.int64(2) % a
x = np.int64(2) ** a
x = np.int64(2) << a
x = np.int64(2) & a
x = np.complex128(2) * f
x = np.timedelta64(2, "s") * a
x = np.float64(2) < a
x = a @ a
x = np.float64(1) == a
x = -a
x = +a
x = ~a
x = a < 9
x = 9 < a
x = a == a
x = a != 1
x = a.flat[0]
x = a.flat[:4]
x = a.flat == 1
x = 7 in a.flat
x = [*a.flat]
for x in a.flat: pass
for x, y in np.broadcast(a, a): pass
for x in buffered: pass
x = it[0] + 1
x = record["x"]
x = record[0]
x = {readonly}
x = 1 if zero else 2
x = [1, 2][zero]
x = "%d" % zero
x = f"{zero}"
x = not zero
x = int(zero)
x = float(zero)
x = a.sum()
x = np.sum(a)
x = np.sum(a, axis=0)
x = a.tolist()
x = v.tolist()
x = bytes(v)
x = bytearray(v)
x = b"".join([b"head", v])
x = struct.unpack_from("Q", v)
x = zlib.crc32(v)
x = int.from_bytes(v, "little")
x = list(map(abs, v))
x = sum(v)
"""
FORMS = [(READ, form) for form in STORES.strip().splitlines()] + [(NONE, form) for form in LOADS.strip().splitlines()]
# What promises.md says of the forms that cannot be exact, and their targets.
INEXACT = {
    "items[0] = 1": (READ, "ctypes"),
    "items[0:4] = b'1234'": (READ, "ctypes"),
    "structure.number = 1": (READ, "ctypes"),
    "x = items[0]": (NONE, "ctypes"),
    "x = structure.number": (NONE, "ctypes"),
    "mapping[0:8] = v[:8]": (NONE, "mmap"),
}


class Sub(np.ndarray[Any, Any]):
    """Has the slots by inheritance."""


class Over(np.ndarray[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)


class Structure(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int)]


@pytest.fixture(scope="module")
def region() -> Iterator[Region]:
    with pyshare.create(size=PAGE, on_violation="raise") as region:
        yield region
        gc.collect()


def scope(region: Region) -> dict[str, Any]:
    """What the forms are about: all of it in the region."""
    region.mprotect(0, PAGE, READ_WRITE)
    a, pairs = np.frombuffer(region, np.uint8)[:512], np.frombuffer(region, [("x", "u1"), ("y", "u1")])
    readwrite: Any = [["readwrite"]]
    buffered = np.nditer(a, ["buffered"], readwrite, ["f8"], casting="unsafe")
    return {
        "np": np,
        "struct": struct,
        "ctypes": ctypes,
        "operator": operator,
        "zlib": zlib,
        "a": a,
        "v": memoryview(region)[:512],
        "f": np.frombuffer(region, np.float64)[:8],
        "c": np.frombuffer(region, np.complex128)[:8],
        "sub": a.view(Sub),
        "over": a.view(Over),
        "masked": np.ma.array(a, copy=False),
        "it": np.nditer(a[:1], op_flags=readwrite),
        "buffered": buffered,
        "readonly": np.frombuffer(memoryview(region).toreadonly(), [("x", "u1")])[0],
        "record": pairs[0],
        "zero": np.frombuffer(region, np.uint8)[0:1].reshape(()),
        "t": (a, 1, a),
        "k": {"out": a},
        "partial": functools.partial(np.add, a, 1, a),
        "address": region.address,
        "other": bytearray(8),
        "items": (ctypes.c_ubyte * PAGE).from_address(region.address),
        "structure": Structure.from_address(region.address),
        "mapping": mmap.mmap(-1, PAGE),
        "reached": False,
    }


LINE = 3  # of the form


def settle() -> None:
    """Whatever is due comes here, at the latest."""


def function_of(form: str, names: dict[str, Any]) -> Callable[[], None]:
    """A function that has not run yet: the interpreter fits its code to what it meets."""
    assigned = ", ".join(name for name in ("a", "f", "sub", "other") if name in form)
    keep = f"global {assigned}, reached" if assigned else "global reached"
    exec(compile(f"def body():\n    {keep}\n    {form}\n    reached = True\n", "<form>", "exec"), names)
    function: types.FunctionType = names["body"]
    return function


def lines_of(error: BaseException) -> list[int]:
    trace, lines = error.__traceback__, []
    while trace:
        if trace.tb_frame.f_code.co_filename == "<form>" and trace.tb_frame.f_code.co_name == "body":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines


def run(region: Region, prot: int, form: str, times: int) -> None:
    """After so many times on open pages, the one on closed pages raises there, and nothing comes afterwards."""
    names = scope(region)
    body = function_of(form, names)
    for _ in range(times):
        if "buffered" in form:
            names["buffered"].reset()
        body()
    if "buffered" in form:
        names["buffered"] = scope(region)["buffered"] if times else names["buffered"]
    names["reached"] = False
    region.mprotect(0, PAGE, prot)
    try:
        with pytest.raises(ProtectionError) as caught:
            body()
        settle()
    finally:
        region.mprotect(0, PAGE, READ_WRITE)
    assert not names["reached"]
    assert lines_of(caught.value) == [LINE]
    if caught.value.file == "<form>":
        assert caught.value.line == LINE
    names.clear()


class Traced:
    """A trace or profile function of Python, or a tool of sys.monitoring, at work in the block's thread."""

    def __init__(self, how: str) -> None:
        self.how, self.events = how, 0

    def __enter__(self) -> None:
        if self.how == "settrace":
            self.before = sys.gettrace()
            sys.settrace(self.event)
        elif self.how == "setprofile":
            self.before = sys.getprofile()
            sys.setprofile(self.event)
        elif self.how == "monitoring":
            monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
            kinds = monitoring.events
            self.kinds = (kinds.CALL, kinds.C_RETURN, kinds.C_RAISE, kinds.PY_START, kinds.LINE)
            monitoring.use_tool_id(monitoring.PROFILER_ID, "test")
            for kind in self.kinds:
                monitoring.register_callback(monitoring.PROFILER_ID, kind, self.event)
            monitoring.set_events(monitoring.PROFILER_ID, kinds.CALL | kinds.PY_START | kinds.LINE)

    def event(self, *_: Any) -> Any:
        self.events += 1
        return self.event

    def __exit__(self, *_: object) -> None:
        if self.how == "settrace":
            still = sys.gettrace()
            sys.settrace(self.before)
        elif self.how == "setprofile":
            still = sys.getprofile()
            sys.setprofile(self.before)
        elif self.how == "monitoring":
            still = self.event
            monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
            monitoring.set_events(monitoring.PROFILER_ID, 0)  # before Python 3.14 they would stay
            for kind in self.kinds:
                monitoring.register_callback(monitoring.PROFILER_ID, kind, None)
            monitoring.free_tool_id(monitoring.PROFILER_ID)
        if self.how:
            assert self.events
            old = sys.version_info < (3, 12) and threading.current_thread() is not threading.main_thread()
            assert still == self.event or old  # an exception would have ended it, as promises.md says of Python 3.11


TRACES = ["", "settrace", "setprofile"] + ["monitoring"] * (sys.version_info >= (3, 12))


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace or "untraced")
@pytest.mark.parametrize("times", [0, 200], ids=["cold", "warm"])
def test_every_form(region: Region, times: int, trace: str, where: str) -> None:
    wrong = []

    def body() -> None:
        for prot, form in FORMS:
            try:
                with Traced(trace):
                    run(region, prot, form, times)
            except BaseException as error:
                wrong.append((form, error))

    run_in_thread(body) if where == "thread" else body()
    assert wrong == []


@pytest.mark.parametrize("form", INEXACT)
def test_forms_that_are_not_exact(region: Region, form: str) -> None:
    """Told at the next call; at the end of a guard(); and written down."""
    prot, word = INEXACT[form]
    assert word in PROMISES
    names = scope(region)
    body = function_of(form, names)
    region.mprotect(0, PAGE, prot)
    try:
        with pytest.raises(ProtectionError) as caught:  # noqa: PT012
            body()
            settle()
        with pytest.raises(ProtectionError) as guarded, region.guard():
            body()
        settle()
    finally:
        region.mprotect(0, PAGE, READ_WRITE)
    for error in (caught.value, guarded.value):
        assert (error.file, error.line) == ("<form>", LINE)
    names["mapping"].close()


def test_what_newer_interpreters_cannot_do_is_written_down() -> None:
    assert "3.14" in PROMISES


# -- Several threads, and children of threads --------------------------------------------------------------------------


def test_each_of_two_threads_is_told_in_its_own_statement(fork: Callable[..., Child]) -> None:
    """Python calls one pending call at a time: none while the other thread is being told."""

    def violate(region: Region, late: list[int]) -> None:
        for _ in range(5000):
            turns = -1
            try:
                struct.pack_into("<Q", region.buf, PAGE, 7)
                for turns in range(100):  # noqa: B007
                    pass
                turns = 100
            except ProtectionError:
                pass
            if turns >= 0:
                late.append(turns)

    def body(_: Child) -> None:
        assert late_in_two_threads(violate) == []

    assert fork(body).wait() == 0


def test_threads_that_make_the_first_such_regions_at_once(run_python: Callable[..., Any]) -> None:
    """In a process where no region had that policy yet."""
    ran = run_python(
        """
import os, struct, sys, threading
import pyshare
def run():
    start.wait()
    region = pyshare.create(size=1 << 16, prot=pyshare.READ, on_violation="raise")
    for _ in range(20):
        try:
            struct.pack_into("<Q", region.buf, 4096, 7)
        except pyshare.ProtectionError:
            pass
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        sys.setswitchinterval(1e-6)
        start = threading.Barrier(4)
        threads = [threading.Thread(target=run) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def told_in_the_end(region: Region) -> bool:
    """A call and a loop after it."""
    try:
        struct.pack_into("<Q", region.buf, PAGE, 7)
        for _ in range(1000):
            pass
    except ProtectionError:
        return True
    return False


def fork_often(region: Region, times: int, codes: list[int]) -> None:
    for _ in range(times):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if told_in_the_end(region) and told_in_the_end(region) else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


@pytest.mark.parametrize("meanwhile", [False, True], ids=["", "while another is told"])
def test_in_the_child_of_a_thread(fork: Callable[..., Child], meanwhile: bool) -> None:
    """Python 3.13 goes on to tell its parent's main thread of what is pending there, which is no thread of its own; and
    a pending call that another thread was in is under way for ever: no Python calls any other."""

    def body(_: Child) -> None:
        codes: list[int] = []
        with pyshare.create(size=16 * PAGE, prot=READ, on_violation="raise") as region:
            sys.setswitchinterval(1e-5)
            thread = threading.Thread(target=fork_often, args=[region, 20, codes])
            thread.start()
            while meanwhile and thread.is_alive():
                told_in_the_end(region)
            thread.join()
            assert codes == [0] * 20
            assert region.read(PAGE, 8) == bytes(8)

    assert fork(body).wait() == 0
