"""Making, joining, handing on and leaving a region, and who may still use its memory.

Grouped by promise: the region is exactly what was asked for; whoever gets its
descriptor or its pickle takes part; its memory is a writable buffer that
close() does not pull away; the end of a process is a clean one.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Child, until

import pyshare
from pyshare import NONE, READ, READ_WRITE, Region

PAGE = 4096
Fork = Callable[..., Child]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def region() -> Iterator[Region]:
    with pyshare.create(size=4 * PAGE) as made:
        yield made


# -- Exactly what was asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 10_000])
def test_the_size_is_exact(size: int) -> None:
    with pyshare.create(size=size) as region:
        assert len(region) == region.size == region.buf.nbytes == size
        region.buf[size - 1] = 7
        assert region.read(size - 1, 1) == b"\x07"
        with pytest.raises(IndexError):
            region.buf[size]
        with pytest.raises(ValueError, match=f"{size} bytes"):
            region.read(size, 1)
        assert region.mprotect(0, size, READ) == 1
        assert region.protections() == [(0, size, READ)]
    assert region.closed


def test_a_new_region_is_zero_and_has_the_protection_asked_for() -> None:
    with pyshare.create(size=3 * PAGE, prot=READ) as region:
        assert region.read(0, 3 * PAGE) == bytes(3 * PAGE)
        assert region.protections() == [(0, 3 * PAGE, READ)]
        assert region.generation == 0
        with pytest.raises(pyshare.ProtectionError):
            region.write(0, b"x")


def test_protections_are_runs_of_pages(region: Region) -> None:
    region.mprotect(PAGE, PAGE, READ)
    region.mprotect(3 * PAGE, PAGE, NONE)
    assert region.protections() == [
        (0, PAGE, READ_WRITE),
        (PAGE, PAGE, READ),
        (2 * PAGE, PAGE, READ_WRITE),
        (3 * PAGE, PAGE, NONE),
    ]
    assert [region.protection(page * PAGE + 5) for page in range(4)] == [READ_WRITE, READ, READ_WRITE, NONE]


def test_a_region_is_made_by_create_and_attach_only() -> None:
    with pytest.raises(TypeError, match=r"pyshare\.create"):
        Region()


def test_repr_tells_the_state() -> None:
    with pyshare.create("repr", size=10_000) as region:
        region.mprotect(0, PAGE, READ)
        assert repr(region) == "<pyshare.Region 'repr', 10000 bytes, generation 1, 1 participants>"
    assert repr(region) == "<pyshare.Region 'repr', 10000 bytes, closed>"
    with pyshare.create(size=5) as region:
        assert repr(region) == "<pyshare.Region 5 bytes, generation 0, 1 participants>"


def test_repr_tells_of_a_child_without_a_slot(fork: Fork) -> None:
    with pyshare.create(size=PAGE, max_participants=1) as region:
        child = fork(lambda child: child.say(repr(region)))
        assert re.fullmatch(r"<pyshare\.Region 4096 bytes, detached: .*max_participants>", child.hear())


def drop(held: list[Any]) -> None:
    held.clear()
    gc.collect()


@pytest.mark.parametrize("use", [repr, lambda region: region.buf, lambda region: region.buf.release()])
def test_an_unclosed_region_warns_and_is_closed(use: Callable[[Region], object]) -> None:
    held = [pyshare.create("unclosed", size=PAGE)]
    use(held[0])
    with pytest.warns(ResourceWarning, match="unclosed region <pyshare.Region 'unclosed'"):
        drop(held)
    assert "unclosed" not in pyshare.names()


@pytest.mark.parametrize("take", [None, "lease", "lock", "frozen"])
def test_where_warnings_are_errors_what_is_dropped_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, take: str | None
) -> None:
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: told.append(str(about.exc_value)))
    region = pyshare.create("dropped", size=PAGE)
    held = [region if take is None else getattr(region, take)(*{"lease": (0, PAGE), "lock": (0,)}.get(take, ()))]
    if take is None:
        del region
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop(held)
    assert len(told) == 1
    assert told[0].startswith("unclosed region <pyshare.Region 'dropped', 4096 bytes, gen") == (take is None)
    if take is not None:
        region.close()
    assert "pyshare.dropped" not in os.listdir("/dev/shm")


def test_closing_again_does_nothing_and_warns_of_nothing() -> None:
    held = [pyshare.create(size=PAGE)]
    held[0].close()
    held[0].close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop(held)


@pytest.mark.parametrize(
    "call",
    [
        lambda region: region.buf,
        lambda region: memoryview(region),
        lambda region: region.fileno(),
        lambda region: region.address,
        lambda region: region.generation,
        lambda region: region.mprotect(0, PAGE, READ),
        lambda region: region.protection(0),
        lambda region: region.protections(),
        lambda region: region.participants(),
        lambda region: region.read(0, 1),
        lambda region: region.write(0, b"x"),
        lambda region: region.__enter__(),
        lambda region: pickle.dumps(region),
    ],
)
def test_a_closed_region_says_so(call: Callable[[Region], object]) -> None:
    region = pyshare.create(size=PAGE)
    region.close()
    with pytest.raises(pyshare.RegionClosed, match="attach it again"):
        call(region)
    assert (region.closed, region.size, region.name) == (True, PAGE, None)


# -- Whoever gets the descriptor takes part ----------------------------------------------------------------------------


def attach_by_name(region: Region) -> Region:
    assert region.name is not None
    return pyshare.attach(region.name)


def attach_by_descriptor(region: Region) -> Region:
    return pyshare.attach(region.fileno())


def attach_by_object(region: Region) -> Region:
    return pyshare.attach(region)


attaching = pytest.mark.parametrize("attach", [attach_by_name, attach_by_descriptor, attach_by_object])


@attaching
def test_two_participants_in_one_process_work_side_by_side(attach: Callable[[Region], Region]) -> None:
    with pyshare.create("twice", size=2 * PAGE) as first:
        with attach(first) as second:
            assert (second.name, second.size) == ("twice", 2 * PAGE)
            assert first.address != second.address
            assert [p.pid for p in second.participants()] == [os.getpid()] * 2
            first.buf[0] = 5
            assert second.buf[0] == 5
            assert second.mprotect(0, PAGE, READ) == first.generation == 1
            for each in (first, second):
                with pytest.raises(pyshare.ProtectionError, match=f"change 1 by pid {os.getpid()}"):
                    each.write(0, b"x")
            assert first.mprotect(0, PAGE, READ_WRITE) == second.generation == 2
            second.buf[0] = 6
            assert {p.applied for p in first.participants()} == {2}
        assert len(first.participants()) == 1
        assert first.mprotect(PAGE, PAGE, NONE) == 3
        assert first.buf[0] == 6


def test_a_participants_process_is_known_while_it_lives(fork: Callable[..., Child]) -> None:
    with pyshare.create(size=PAGE) as region:

        def body(child: Child) -> None:
            child.say()
            child.hear()

        child = fork(body)
        child.hear()
        me, other = sorted(region.participants(), key=lambda one: one.pid == child.pid)
        assert [one.process().pid for one in (me, other)] == [os.getpid(), child.pid]
        child.say()
        child.wait()
        assert other.process() is None
        assert dataclasses.replace(me, tid=child.pid).process() is None, "the number means somebody else"


def test_two_participants_in_one_process_change_at_once() -> None:
    """Each thread's page is what that thread made it, in both mappings, whenever its call returns."""
    rounds = 100
    with pyshare.create(size=2 * PAGE) as first, pyshare.attach(first) as second:
        wrong: list[object] = []

        def change(mine: Region, other: Region, page: int) -> None:
            for _ in range(rounds):
                mine.mprotect(page * PAGE, PAGE, READ)
                for each in (mine, other):
                    try:
                        each.write(page * PAGE, b"x")
                        wrong.append("a store into a READ page")
                    except pyshare.ProtectionError:
                        pass
                mine.mprotect(page * PAGE, PAGE, READ_WRITE)
                other.write(page * PAGE, b"y")

        threads = [threading.Thread(target=change, args=a) for a in ((first, second, 0), (second, first, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not wrong
        assert first.generation == 4 * rounds
        assert first.protections() == second.protections() == [(0, 2 * PAGE, READ_WRITE)]


def test_attach_leaves_the_callers_descriptor_alone(region: Region) -> None:
    mine = os.dup(region.fileno())
    with pyshare.attach(mine) as other:
        assert other.fileno() != mine
        assert other.name is None
    os.fstat(mine)
    region.close()
    with pyshare.attach(mine) as again:  # nobody else has it: the descriptor is the whole region
        assert [p.pid for p in again.participants()] == [os.getpid()]
    os.close(mine)


def test_fileno_comes_back_when_the_program_closes_it(region: Region) -> None:
    inode = os.fstat(region.fileno()).st_ino
    os.close(region.fileno())
    assert os.fstat(region.fileno()).st_ino == inode
    other = os.open("/dev/null", os.O_RDONLY)
    os.dup2(other, region.fileno())  # and when its number means another file
    os.close(other)
    assert os.fstat(region.fileno()).st_ino == inode


STRANGER = """
import socket, sys, pyshare
with socket.socket(socket.AF_UNIX) as link:
    link.connect(sys.argv[1])
    _, (fd,), _, _ = socket.recv_fds(link, 1, 1)
    with pyshare.attach(fd) as region:
        assert region.read(0, 5) == b"hello"
        region.write(4096, b"world")
        region.mprotect(0, 4096, pyshare.READ)
        link.send(b"x")
        link.recv(1)
"""


def test_a_stranger_attaches_by_a_descriptor_from_a_socket(region: Region, tmp_path: Path) -> None:
    region.write(0, b"hello")
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(PATIENCE)
        server.bind(str(tmp_path / "socket"))
        server.listen()
        stranger = subprocess.Popen([sys.executable, "-c", STRANGER, str(tmp_path / "socket")])
        with stranger, contextlib.ExitStack() as stack:
            stack.callback(stranger.kill)
            link = stack.enter_context(server.accept()[0])
            link.settimeout(PATIENCE)
            socket.send_fds(link, [b"x"], [region.fileno()])
            assert link.recv(1) == b"x"
            assert {p.pid for p in region.participants()} == {os.getpid(), stranger.pid}
            assert region.read(PAGE, 5) == b"world"
            with pytest.raises(pyshare.ProtectionError, match=f"by pid {stranger.pid}"):
                region.write(0, b"x")
            link.send(b"x")
            assert stranger.wait(PATIENCE) == 0
    assert [p.pid for p in region.participants()] == [os.getpid()]


def test_participants_are_the_living(region: Region, fork: Fork) -> None:
    children = [fork(lambda child: (child.say(), child.hear())) for _ in range(3)]
    for child in children:
        child.hear()
    region.mprotect(0, PAGE, READ)
    found = {p.pid: p for p in region.participants()}
    assert set(found) == {os.getpid(), *(child.pid for child in children)}
    for pid, one in found.items():
        assert (one.applied, one.alive, one.fenced, one.engine) == (1, True, False, region.engine)
        assert os.path.exists(f"/proc/{pid}/task/{one.tid}")
    children[0].kill()
    children[1].say()
    assert (children[0].wait(), children[1].wait()) == (-9, 0)
    assert {p.pid for p in region.participants() if p.alive} == {os.getpid(), children[2].pid}


# -- Whoever gets the pickle takes part --------------------------------------------------------------------------------

ROUTES = """
import concurrent.futures, multiprocessing, os, pickle, sys
import pyshare

PAGE = 4096
held = None

def hold(region):
    global held
    held = region

def work(region, page, queue=None):
    region = region or (queue.get(timeout=60) if queue else held)
    assert os.getpid() in [p.pid for p in region.participants()]
    region.write(page * PAGE, b"here")
    region.mprotect(page * PAGE, PAGE, pyshare.READ)
    return os.getpid()

def by_process(context, region, page):
    process = context.Process(target=work, args=(region, page))
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode

def by_pool_initargs(context, region, page):
    with context.Pool(1, hold, (region,)) as pool:
        pool.apply_async(work, (None, page)).get(60)

def by_pool_argument(context, region, page):
    with context.Pool(1) as pool:
        pool.apply_async(work, (region, page)).get(60)

def by_executor_initargs(context, region, page):
    with concurrent.futures.ProcessPoolExecutor(1, context, hold, (region,)) as pool:
        pool.submit(work, None, page).result(60)

def by_executor_submit(context, region, page):
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        pool.submit(work, region, page).result(60)

def by_queue(context, region, page):
    queue = context.Queue()
    process = context.Process(target=work, args=(None, page, queue))
    process.start()
    queue.put(region)
    process.join(60)
    assert process.exitcode == 0, process.exitcode

def by_pickle_alone(context, region, page):
    with pickle.loads(pickle.dumps(region)) as copy:
        work(copy, page)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    routes = [function for name, function in list(globals().items()) if name.startswith("by_")]
    with pyshare.create("routes", size=len(routes) * PAGE) as region:
        for page, route in enumerate(routes):
            route(context, region, page)
            assert region.read(page * PAGE, 4) == b"here"
            assert region.protection(page * PAGE) == pyshare.READ
            assert region.generation == page + 1
            print(route.__name__)
"""
ROUTE_NAMES = re.findall(r"def (by_\w+)", ROUTES)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_region_goes_along_every_route_of_multiprocessing(method: str, run_python: RunPython) -> None:
    ran = run_python(ROUTES, method, PYTHONWARNINGS="ignore::DeprecationWarning")
    assert (ran.stdout.split(), ran.stderr, ran.returncode) == (ROUTE_NAMES, "", 0)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (
            pyshare.ProtectionError("no", offset=4096, required=2, actual=1, generation=7, author=42),
            PermissionError,
        ),
        (pyshare.PropagationTimeout("late", pids=[1, 2], generation=3), TimeoutError),
        (pyshare.PropagationTimeout("early"), TimeoutError),
        (pyshare.RegionExists("there"), FileExistsError),
        (pyshare.RegionNotFound("gone"), FileNotFoundError),
        (pyshare.RegionClosed("closed"), ValueError),
        (pyshare.ParticipantLimit("full"), pyshare.ShareError),
        (pyshare.CorruptRegion("odd", field="magic"), pyshare.ShareError),
    ],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_pickle(error: pyshare.ShareError, builtin: type[Exception], protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert isinstance(copy, (builtin, pyshare.ShareError))
    assert (copy.args, copy.__dict__, str(copy)) == (error.args, error.__dict__, str(error))
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)


# -- A writable buffer that close() does not pull away -----------------------------------------------------------------


def test_the_buffer_is_writable_whatever_the_protection() -> None:
    with pyshare.create(size=10_000, prot=NONE) as region:
        for view in (region.buf, memoryview(region)):
            assert (view.readonly, view.format, view.itemsize, view.shape) == (False, "B", 1, (10_000,))
            view.release()


def test_buf_is_one_view_that_close_releases(region: Region) -> None:
    view = region.buf
    assert region.buf is view
    region.close()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_buf_released_by_the_program_is_made_again(region: Region) -> None:
    region.buf.release()
    region.buf[0] = 1
    assert region.read(0, 1) == b"\x01"


class Viewed(np.ndarray[Any, Any]):
    """A subclass without a constructor of its own."""


EXPORTS: dict[str, Callable[[Region], object]] = {
    "memoryview": memoryview,
    "slice of a memoryview": lambda region: memoryview(region)[1:5],
    "memoryview of buf": lambda region: memoryview(region.buf),
    "slice of buf": lambda region: region.buf[1:5],
    "cast of buf": lambda region: region.buf.cast("I"),
    "frombuffer": lambda region: np.frombuffer(region, dtype="u1"),
    "frombuffer of buf": lambda region: np.frombuffer(region.buf, dtype="u1"),
    "frombuffer of a slice": lambda region: np.frombuffer(region.buf[8:16], dtype="u8"),
    "asarray": lambda region: np.asarray(region),
    "view of an array": lambda region: np.frombuffer(region, dtype="u1")[3:],
    "ctypes": lambda region: (ctypes.c_char * 5).from_buffer(region),
    "ndarray": lambda region: np.ndarray((4,), "u1", buffer=region),
    "ndarray, by position": lambda region: np.ndarray((4,), "u1", region, 2),
    "ndarray of buf": lambda region: np.ndarray((4,), "u1", buffer=region.buf),
    "ndarray of a memoryview": lambda region: np.ndarray((4,), "u1", buffer=memoryview(region)),
    "view of an ndarray": lambda region: np.ndarray((5,), "u1", buffer=region)[1:],
    "ndarray of a subclass": lambda region: Viewed((4,), "u1", buffer=region),
    "ndarray.__new__": lambda region: np.ndarray.__new__(Viewed, (4,), "u1", buffer=region),
}
exports = pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())


@exports
def test_close_refuses_while_the_memory_is_used(region: Region, export: Callable[[Region], object]) -> None:
    region.mprotect(PAGE, PAGE, READ)
    before = (region.fileno(), region.address, region.generation, region.participants(), region.protections())
    buf = region.buf
    used = export(region)
    for _ in range(2):
        with pytest.raises(BufferError, match="release them first"):
            region.close()
    after = (region.fileno(), region.address, region.generation, region.participants(), region.protections())
    assert (region.closed, after, region.buf) == (False, before, buf)
    buf[0] = 9
    assert region.mprotect(0, PAGE, READ) == 2
    assert region.read(0, 1) == b"\x09"
    del used
    region.close()
    assert region.closed


@exports
def test_a_dropped_region_lives_as_long_as_its_memory_is_used(export: Callable[[Region], object]) -> None:
    held = [pyshare.create("dropped", size=PAGE)]
    held[0].write(0, b"\x07" * 16)
    used = [export(held[0])]
    drop(held)
    assert "dropped" in pyshare.names()
    assert bytes(used[0])[:4] == b"\x07" * 4  # type: ignore[call-overload]
    with pytest.warns(ResourceWarning, match="unclosed"):
        drop(used)
    assert "dropped" not in pyshare.names()


def test_an_exception_is_not_masked_by_views_that_it_keeps_alive() -> None:
    region = pyshare.create(size=PAGE)
    view = memoryview(region)
    with pytest.raises(KeyError), region:
        raise KeyError
    assert not region.closed
    with pytest.raises(BufferError), region:
        pass
    view.release()
    region.close()


def test_a_view_counts_when_buf_has_been_released(region: Region) -> None:
    region.buf.release()
    view = memoryview(region)
    with pytest.raises(BufferError):
        region.close()
    view[0] = 1
    view.release()


def test_an_array_that_cannot_be_made_holds_nothing(region: Region) -> None:
    with pytest.raises(TypeError, match="buffer is too small"):
        np.ndarray((PAGE,), "u8", buffer=region)
    with pytest.raises(TypeError, match="buffer is too small"):
        np.ndarray((PAGE,), "u8", region, 2)
    region.close()


@pytest.mark.usefixtures("region")
def test_arrays_of_other_memory_are_made_as_ever() -> None:
    other = bytearray(b"abcd")
    assert np.ndarray((4,), "u1", buffer=other).base is other
    assert np.ndarray((2,), "u1", other, 1, (2,)).tobytes() == b"bd"
    assert np.ndarray((2, 3)).shape == (2, 3)
    assert Viewed((2,), "u1").shape == (2,)


def mappings(address: int) -> list[str]:
    """The permissions of what is mapped at an address."""
    with open("/proc/self/maps") as maps:
        ranges = [line.replace("-", " ", 1).split()[:3] for line in maps]
    return [kind for first, end, kind in ranges if int(first, 16) <= address < int(end, 16)]


def test_the_range_of_a_closed_region_stays_reserved_until_the_object_goes() -> None:
    """So no pointer that was kept against the rules can ever reach somebody else's memory."""
    held = [pyshare.create(size=PAGE)]
    address = held[0].address
    assert mappings(address) == ["rw-s"]
    held[0].close()
    assert mappings(address) == ["---p"]
    drop(held)
    assert mappings(address) == []


LATE = """
import pyshare
region = pyshare.create("late", size=4096)
import numpy
unknown, held = (numpy.ndarray((4,), "u1", region) for _ in range(2))
try:
    region.close()
except BufferError:
    del held
region.close()
print("closed", flush=True)
unknown[0] = 1
"""


def test_an_array_made_before_numpy_was_known_finds_no_foreign_memory(run_python: RunPython) -> None:
    """Of the first one, where numpy is imported after the region was made, close() cannot know."""
    ran = run_python(LATE)
    assert (ran.returncode, ran.stdout) == (-signal.SIGSEGV, "closed\n")
    assert "the region is closed in this process" in ran.stderr


def test_close_refuses_while_another_thread_is_in_mprotect(region: Region, fork: Fork) -> None:
    child = fork(lambda child: (child.say(), child.hear()))
    child.hear()
    child.stop()
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(region.mprotect(0, PAGE, NONE, timeout=PATIENCE)))
    thread.start()
    until(lambda: region.generation == 1)
    with pytest.raises(BufferError, match="another thread"):
        region.close()
    assert not region.closed
    child.resume()
    thread.join(PATIENCE)
    assert result == [1]
    region.close()


# -- A clean end -------------------------------------------------------------------------------------------------------

STORING = """
import sys, threading, numpy, pyshare
region = pyshare.create("storing", size=1 << 20)
ready = threading.Barrier(5)
def store(view):
    ready.wait()
    while True:
        view[7] = view[6] = 1
def change():
    ready.wait()
    while True:
        region.mprotect(1 << 19, 4096, pyshare.READ)
        region.mprotect(1 << 19, 4096, pyshare.READ_WRITE)
def write():
    ready.wait()
    while True:
        region.write(4096, bytes(1 << 17))
targets = [lambda: store(region.buf), lambda: store(numpy.frombuffer(region, "u1")), change, write]
for target in targets:
    threading.Thread(target=target, daemon=True).start()
ready.wait()
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_the_interpreter_ends_while_daemon_threads_store(code: int, run_python: RunPython) -> None:
    for _ in range(3):
        ran = run_python(STORING, str(code))
        assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", "")


FILLING = """
import ctypes, threading, pyshare
size = 1 << 27
region = pyshare.create(size=size)
# Without the GIL, and without a reference to the region or to this module.
threading.Thread(target=ctypes.memset, args=(region.address, 1, size), daemon=True).start()
while region.read(size >> 6, 1) != b"\\x01":
    pass
"""


def test_the_interpreter_ends_while_a_native_thread_stores(run_python: RunPython) -> None:
    ran = run_python(FILLING)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_exec_is_clean(region: Region, run_python: RunPython) -> None:
    ran = run_python(
        """
import os, sys, pyshare
region, named = pyshare.attach(int(sys.argv[1])), pyshare.create("exec", size=10)
view = memoryview(region)
region.write(0, b"done")
look = "import os; print(*(os.readlink(p) for n in range(3, 99) if os.path.exists(p := f'/proc/self/fd/{n}')))"
os.execv(sys.executable, [sys.executable, "-c", look])
""",
        str(inherited := os.dup(region.fileno())),
        pass_fds=(inherited,),
    )
    os.close(inherited)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("pyshare") == 1  # the descriptor that the program itself let it inherit
    assert region.read(0, 4) == b"done"
    assert region.mprotect(0, PAGE, READ) == 1
    assert [p.pid for p in region.participants() if p.alive] == [os.getpid()]
    assert "exec" not in pyshare.names()


def daemonise(child: Child, region: Region) -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    until(lambda: os.getppid() != parent)
    for fd in range(3):
        os.close(fd)
    child.say(str(os.getpid()))
    while (word := child.hear()) != "end":
        region.write(PAGE, word.encode())
        child.say(str([p.pid for p in region.participants()]))
    os._exit(0)


def test_a_daemon_takes_part_when_all_its_ancestors_are_gone(fork: Fork) -> None:
    region = pyshare.create("daemon", size=2 * PAGE)
    child = fork(lambda child: daemonise(child, region))
    daemon = int(child.hear())
    assert child.wait() == 0
    region.mprotect(0, PAGE, READ)
    assert {p.pid for p in region.participants() if p.alive} == {os.getpid(), daemon}
    region.close()
    child.say("word")
    assert child.hear() == str([daemon])
    assert "daemon" in pyshare.names()
    with pyshare.attach("daemon") as again:
        assert again.read(PAGE, 4) == b"word"
        assert again.protection(0) == READ
    pidfd = os.pidfd_open(daemon)
    child.say("end")
    assert select.select([pidfd], [], [], PATIENCE)[0], "the daemon does not end"
    os.close(pidfd)
    assert "daemon" not in pyshare.names()
