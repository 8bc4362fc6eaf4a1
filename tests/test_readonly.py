"""Observers: a region mapped read-only by who takes no part in it.

Grouped by promise: an observer sees what there is; the kernel keeps it from
writing, whoever asks; nobody waits for it, and nothing changes by it; its
memory is not pulled away under arrays; what it may not do it says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import pickle
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Child, idle
from kernel import die_quietly

import pyshare
from pyshare import NONE, READ, READ_WRITE, Observer, Region

PAGE = 4096
SIZE = 3 * PAGE + 100
NAME = "observed"
Fork = Callable[..., Child]
libc = ctypes.CDLL(None, use_errno=True)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(NAME, size=SIZE, engine=request.param) as made:
        yield made


@pytest.fixture
def observer(region: Region) -> Iterator[Observer]:
    with pyshare.attach(region.fileno(), readonly=True) as made:
        yield made


def mappings(inode: int) -> list[tuple[int, int, str]]:
    """(address, length, permissions) of what is mapped of a file here."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, permissions, _, _, number, *_ = line.split()
            if int(number) == inode:
                first, end = (int(part, 16) for part in addresses.split("-"))
                found.append((first, end - first, permissions))
    return found


# -- It sees what there is ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lead(way: str, region: Region) -> Iterator[Any]:
    """What attach takes."""
    with contextlib.ExitStack() as stack:
        if way == "observer":
            yield stack.enter_context(pyshare.attach(NAME, readonly=True))
        elif way == "readonly_fd":
            fd = region.readonly_fd()
            stack.callback(os.close, fd)
            yield fd
        else:
            yield {"name": NAME, "fd": region.fileno(), "region": region}[way]


@pytest.mark.parametrize("way", ["name", "fd", "region", "observer", "readonly_fd"])
def test_an_observer_is_what_the_region_is(region: Region, way: str) -> None:
    region.write(PAGE - 1, b"ab")
    region.mprotect(PAGE, PAGE, READ)
    with lead(way, region) as led, pyshare.attach(led, readonly=True) as observer:
        assert type(observer) is Observer
        assert not isinstance(observer, Region)
        for name in ("name", "size", "page_size", "generation", "closed"):
            assert getattr(observer, name) == getattr(region, name)
        assert (len(observer), observer.readonly, region.readonly) == (SIZE, True, False)
        assert observer.read(PAGE - 1, 2) == b"ab"
        assert observer.protections() == region.protections()
        assert [observer.protection(page * PAGE + 1) for page in range(4)] == [READ_WRITE, READ, READ_WRITE, READ_WRITE]
        assert observer.participants() == region.participants()
        assert os.fstat(observer.fileno()).st_ino == os.fstat(region.fileno()).st_ino
        assert repr(observer) == f"<pyshare.Observer 'observed', {SIZE} bytes, generation 1>"
    assert observer.closed
    assert repr(observer) == f"<pyshare.Observer 'observed', {SIZE} bytes, closed>"


def test_a_region_without_a_name_is_observed() -> None:
    with pyshare.create(size=5) as region, pyshare.attach(region.fileno(), readonly=True) as observer:
        assert (observer.name, repr(observer)) == (None, "<pyshare.Observer 5 bytes, generation 0>")


def test_its_buffer_is_read_only_and_exact(observer: Observer) -> None:
    for view in (observer.buf, memoryview(observer)):
        assert (view.readonly, view.format, view.itemsize, view.shape) == (True, "B", 1, (SIZE,))
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
    assert observer.buf is observer.buf
    with pytest.raises(TypeError, match="not writable"):
        (ctypes.c_char * 5).from_buffer(observer)


def test_it_sees_every_byte_at_once(region: Region, observer: Observer, fork: Fork) -> None:
    def store(child: Child) -> None:
        for value in b"abc":
            child.hear()
            region.buf[SIZE - 1] = value
            child.say(chr(value))

    child = fork(store)
    for _ in range(3):
        child.say("go")
        value = ord(child.hear())
        assert observer.buf[SIZE - 1] == value
        assert observer.read(SIZE - 1, 1) == bytes([value])


def test_pages_that_are_none_for_all_are_read_by_an_observer(region: Region, observer: Observer) -> None:
    """Promise 1 is not for it: documented, and so tested."""
    region.write(PAGE, b"secret")
    region.mprotect(0, SIZE, NONE)
    assert observer.protection(PAGE) == NONE
    assert bytes(observer.buf[PAGE : PAGE + 6]) == observer.read(PAGE, 6) == b"secret"
    with pytest.raises(pyshare.ProtectionError):
        region.read(PAGE, 6)


def test_participants_that_were_killed_are_not_alive(region: Region, observer: Observer, joined: Fork) -> None:
    child = joined()
    assert {(one.pid, one.alive) for one in observer.participants()} == {(os.getpid(), True), (child.pid, True)}
    child.kill()
    child.wait()
    assert {(one.pid, one.alive) for one in observer.participants()} == {(os.getpid(), True), (child.pid, False)}
    region.participants()  # finds it dead, and says so
    assert [one.pid for one in observer.participants()] == [os.getpid()]


def test_a_forked_child_observes_as_its_parent_does(region: Region, observer: Observer, fork: Fork) -> None:
    array = observer.numpy("u1")

    def look(child: Child) -> None:
        before = [one.pid for one in observer.participants()]
        child.hear()
        child.say(f"{array[7]} {observer.read(7, 1)[0]} {observer.buf[7]} {os.getpid() in before}")
        observer.buf.release()

    child = fork(look)
    region.buf[7] = 42
    child.say("look")
    # The child takes part as well, since it has inherited the region too.
    assert child.hear() == "42 42 42 True"
    assert child.wait() == 0


def test_a_child_of_an_observer_alone_takes_no_part(region: Region, fork: Fork) -> None:
    def observe(child: Child) -> None:
        with pyshare.attach(NAME, readonly=True) as observer:
            region.close()

            def look(grandchild: Child) -> None:
                grandchild.say(f"{observer.address} {observer.read(0, 1)[0]} {len(observer.participants())}")
                observer.close()

            grandchild = Child(look)
            child.say(f"{observer.address} {grandchild.hear()}")
            assert grandchild.wait() == 0
            child.say(repr(observer.read(0, 1)))
            grandchild.end()

    region.write(0, b"\x05")
    child = fork(observe)
    mine, *its = child.hear().split()
    assert its == [mine, "5", "1"]
    assert child.hear() == repr(b"\x05"), "though its child has closed its own"


# -- The kernel keeps it from writing ----------------------------------------------------------------------------------


def test_no_mprotect_makes_it_writable(region: Region) -> None:
    inode = os.fstat(region.fileno()).st_ino
    before = mappings(inode)
    observer = pyshare.attach(region, readonly=True)
    own = sorted(set(mappings(inode)) - set(before))
    assert [kind for _, _, kind in own] == ["r--s", "r--s"], "the control segment and the data"
    assert own[1][:2] == (observer.address, 4 * PAGE)
    for address, length, _ in own:
        for prot in (mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE, 7):
            ctypes.set_errno(0)
            assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), prot) == -1
            assert ctypes.get_errno() == errno.EACCES
    with open("/proc/self/mem", "r+b", buffering=0) as memory, pytest.raises(OSError, match=r"Errno (5|14)"):
        os.pwrite(memory.fileno(), b"x", observer.address)
    assert observer.read(0, 1) == b"\0"
    observer.close()


@pytest.mark.parametrize("descriptor", ["fileno", "readonly_fd"])
def test_no_descriptor_of_it_writes(region: Region, observer: Observer, descriptor: str) -> None:
    fd = observer.fileno() if descriptor == "fileno" else region.readonly_fd()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        address = ctypes.c_void_p(np.frombuffer(mapped, dtype="u1").ctypes.data)
        assert libc.mprotect(address, ctypes.c_size_t(PAGE), mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
    for write in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
        with pytest.raises(OSError, match=r"Errno (9|22)"):
            write()
    assert not os.get_inheritable(fd)
    if descriptor == "readonly_fd":
        os.close(fd)


def test_a_store_is_a_segmentation_fault(observer: Observer, fork: Fork) -> None:
    address = observer.address

    def store(_: Child) -> None:
        die_quietly()
        ctypes.memset(address, 1, 1)

    assert fork(store).wait() == -signal.SIGSEGV
    assert observer.read(0, 1) == b"\0"


def test_a_read_only_descriptor_does_not_take_part(region: Region) -> None:
    fd = region.readonly_fd()
    with pytest.raises(PermissionError, match=f"descriptor {fd} is read-only.*readonly=True"):
        pyshare.attach(fd)
    assert len(region.participants()) == 1
    os.close(fd)


def test_a_read_only_descriptor_is_the_callers(region: Region) -> None:
    first, second = region.readonly_fd(), region.readonly_fd()
    assert len({first, second, region.fileno()}) == 3
    region.write(0, b"kept")
    region.close()
    os.close(first)
    with pyshare.attach(second, readonly=True) as observer:
        os.close(second)
        assert observer.read(0, 4) == b"kept"


OBSERVE = """
import array, os, socket, sys
import pyshare
if sys.argv[1] == "socket":
    _, (fd,), _, _ = socket.recv_fds(socket.socket(fileno=int(sys.argv[2])), 1, 1)
else:
    fd = int(sys.argv[2])
with pyshare.attach(fd, readonly=True) as observer:
    print(observer.read(0, 4), observer.readonly, [one.pid == os.getppid() for one in observer.participants()])
try:
    pyshare.attach(fd)
except PermissionError:
    print("refused")
"""


@pytest.mark.parametrize("way", ["pass_fds", "socket"])
def test_a_stranger_observes_by_a_descriptor(
    region: Region, way: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    region.write(0, b"seen")
    fd = region.readonly_fd()
    ours, its = socket.socketpair()
    with ours, its:
        socket.send_fds(ours, [b"x"], [fd])
        given = fd if way == "pass_fds" else its.fileno()
        ran = run_python(OBSERVE, way, str(given), pass_fds=[given])
    os.close(fd)
    assert (ran.stdout, ran.stderr) == ("b'seen' True [True]\nrefused\n", "")


def told(call: Callable[[], object]) -> str:
    try:
        return f"nothing: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@needs_root
def test_another_user_observes_by_a_read_only_descriptor_alone(region: Region, fork: Fork) -> None:
    """Which it cannot open anew, for writing; the mode of the memory is 0o600."""
    fd, whole = region.readonly_fd(), os.dup(region.fileno())
    region.write(0, b"seen")

    def look(child: Child) -> None:
        region.close()
        os.setgid(65534)
        os.setuid(65534)
        with pyshare.attach(fd, readonly=True) as observer:
            again = observer.fileno()
            child.say(repr(observer.read(0, 4)))
            child.say(told(lambda: os.open(f"/proc/self/fd/{again}", os.O_RDWR)))
        child.say(told(lambda: pyshare.attach(fd)))
        child.say(told(lambda: pyshare.attach(whole, readonly=True)))
        child.say(told(lambda: pyshare.attach(NAME, readonly=True)))

    child = fork(look)
    assert child.hear() == "b'seen'"
    assert child.hear().startswith("PermissionError")
    assert re.match("PermissionError.*readonly=True", child.hear())
    assert re.match("PermissionError.*readonly_fd", child.hear())
    assert re.match("PermissionError.*belongs to somebody else", child.hear())
    assert child.wait() == 0
    os.close(fd)
    os.close(whole)


# -- Nobody waits for it, and nothing changes by it --------------------------------------------------------------------


def test_nobody_waits_for_an_observer(region: Region, fork: Fork) -> None:
    def observe(child: Child) -> None:
        region.close()
        with pyshare.attach(NAME, readonly=True) as observer:
            observer.read(0, SIZE)
            idle(child)

    child = fork(observe)
    assert child.hear() == "ok"
    child.stop()
    assert region.mprotect(0, SIZE, READ, timeout=60) == 1
    with region.lease(0, PAGE, timeout=60), region.lock(3, timeout=60):
        pass
    with region.frozen(timeout=60), region.snapshot(timeout=60):
        pass
    assert [one.pid for one in region.participants()] == [os.getpid()]
    child.resume()


def test_an_observer_needs_no_slot() -> None:
    with pyshare.create(NAME, size=PAGE, max_participants=1) as region:
        with pytest.raises(pyshare.ParticipantLimit):
            pyshare.attach(NAME, timeout=0)
        observers = [pyshare.attach(NAME, readonly=True) for _ in range(50)]
        region.write(0, b"x")
        assert {observer.read(0, 1) for observer in observers} == {b"x"}
        for observer in observers:
            observer.close()


def test_an_observer_changes_nothing(region: Region) -> None:
    """Not a byte of the control segment, and not a page of memory is taken by reading what nobody has touched."""
    fd = region.fileno()
    control = os.fstat(fd).st_size

    def state() -> tuple[bytes, int]:
        return os.pread(fd, control, 0), os.fstat(fd).st_blocks

    before = state()
    with pyshare.attach(NAME, readonly=True) as observer:
        assert observer.read(0, SIZE) == bytes(SIZE)
        assert observer.protections() == [(0, SIZE, READ_WRITE)]
        assert observer.protection(PAGE) == READ_WRITE
        assert len(observer.participants()) == 1
        assert observer.generation == 0
    assert state() == before


def test_an_observer_keeps_the_memory_and_not_the_name(region: Region) -> None:
    region.write(0, b"last words")
    with pyshare.attach(NAME, readonly=True) as observer:
        region.close()
        assert NAME not in pyshare.names()
        with pytest.raises(pyshare.RegionNotFound):
            pyshare.attach(NAME, readonly=True)
        assert (observer.read(0, 10), observer.participants()) == (b"last words", [])
        with pyshare.attach(observer, readonly=True) as another:
            assert another.read(0, 10) == b"last words"


# -- Its memory is not pulled away -------------------------------------------------------------------------------------

EXPORTS: dict[str, Callable[[Observer], object]] = {
    "memoryview": memoryview,
    "slice of buf": lambda observer: observer.buf[1:5],
    "numpy": lambda observer: observer.numpy("u1"),
    "view of numpy": lambda observer: observer.numpy("u1")[3:],
    "frombuffer": lambda observer: np.frombuffer(observer, dtype="u1"),
    "asarray": lambda observer: np.asarray(observer),
    "ndarray": lambda observer: np.ndarray((4,), "u1", buffer=observer),
    "ndarray, by position": lambda observer: np.ndarray((4,), "u1", observer, 2),
    "DLPack": lambda observer: observer.__dlpack__(max_version=(1, 0)),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())
def test_close_refuses_while_the_memory_is_used(observer: Observer, export: Callable[[Observer], object]) -> None:
    used = export(observer)
    for _ in range(2):
        with pytest.raises(BufferError, match="release them first"):
            observer.close()
    assert not observer.closed
    assert observer.read(0, 4) == bytes(observer.buf[:4]) == bytes(4)
    del used
    observer.close()
    assert observer.closed


def test_close_takes_nothing_from_a_thread_that_reads(region: Region, observer: Observer) -> None:
    region.write(0, b"\x07" * SIZE)
    wrong: list[bytes] = []
    reading = threading.Event()

    def read() -> None:
        with contextlib.suppress(pyshare.RegionClosed):
            for _ in range(300):
                reading.set()
                wrong.extend({observer.read(0, SIZE)} - {b"\x07" * SIZE})

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(PATIENCE)
    while not observer.closed:
        with contextlib.suppress(BufferError):
            observer.close()
    thread.join(PATIENCE)
    assert (thread.is_alive(), wrong) == (False, [])


@pytest.mark.parametrize("export", [EXPORTS["numpy"], EXPORTS["frombuffer"], EXPORTS["ndarray"]])
def test_a_dropped_observer_lives_as_long_as_its_memory_is_used(
    region: Region, export: Callable[[Observer], Any]
) -> None:
    region.write(0, b"\x07" * 8)
    inode = os.fstat(region.fileno()).st_ino
    before = mappings(inode)
    array = export(pyshare.attach(NAME, readonly=True))
    gc.collect()
    assert array[3] == 7
    assert mappings(inode) != before
    del array
    gc.collect()
    assert mappings(inode) == before


def test_nothing_is_left_of_a_closed_one(region: Region) -> None:
    inode = os.fstat(region.fileno()).st_ino
    before = mappings(inode), len(os.listdir("/proc/self/fd"))
    observer = pyshare.attach(NAME, readonly=True)
    buf, address = observer.buf, observer.address
    observer.close()
    observer.close()
    assert (mappings(inode), len(os.listdir("/proc/self/fd"))) == before
    with pytest.raises(ValueError, match="released"):
        buf[0]
    with open("/proc/self/maps") as maps:
        reserved = [
            line for line in maps if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
        ]
    assert [line.split()[1] for line in reserved] == ["---p"]


@pytest.mark.parametrize(
    "call",
    [
        lambda observer: observer.buf,
        memoryview,
        lambda observer: observer.fileno(),
        lambda observer: observer.address,
        lambda observer: observer.generation,
        lambda observer: observer.protection(0),
        lambda observer: observer.protections(),
        lambda observer: observer.participants(),
        lambda observer: observer.read(0, 1),
        lambda observer: observer.numpy("u1"),
        lambda observer: observer.__dlpack__(),
        lambda observer: observer.__enter__(),
        pickle.dumps,
    ],
)
def test_a_closed_observer_says_so(call: Callable[[Observer], object]) -> None:
    with pyshare.create(size=PAGE) as region:
        observer = pyshare.attach(region, readonly=True)
    observer.close()
    with pytest.raises(pyshare.RegionClosed, match="attach it again"):
        call(observer)


def test_a_descriptor_that_the_program_took_away_is_missed(observer: Observer) -> None:
    """The mapping stays; another file under the number is neither read nor closed."""
    fd, buf = observer.fileno(), observer.buf
    null = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    calls: list[Callable[[], object]] = [lambda: observer.read(0, 1), observer.participants, observer.fileno]
    for other in (False, True):
        if other:
            os.dup2(null, fd)
        for call in calls:
            with pytest.raises(OSError, match="Errno 9"):
                call()
        assert buf[0] == 0
    observer.close()
    os.close(fd)
    os.close(null)


ROUTES = """
import multiprocessing, sys
import pyshare

def look(observer, queue):
    with observer:
        queue.put((observer.read(0, 4), observer.readonly, type(observer).__name__, len(observer.participants())))

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with pyshare.create(size=4096) as region, pyshare.attach(region.fileno(), readonly=True) as observer:
        region.write(0, b"sent")
        queue = context.Queue()
        process = context.Process(target=look, args=(observer, queue))
        process.start()
        print(queue.get(timeout=60))
        process.join(60)
        print(process.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_observer_is_sent_to_other_processes(
    method: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    ran = run_python(ROUTES, method)
    assert (ran.stdout, ran.stderr) == ("(b'sent', True, 'Observer', 1)\n0\n", "")


# -- What it may not do it says ----------------------------------------------------------------------------------------


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


REFUSED = sorted(public(Region) - public(pyshare._mapped.Mapped) - {"engine", "fileno", "readonly"})


@pytest.mark.parametrize("method", REFUSED)
def test_what_changes_something_is_refused(region: Region, observer: Observer, method: str) -> None:
    with pytest.raises(pyshare.ProtectionError, match=rf"{method}: .*attach without readonly=True") as told:
        getattr(observer, method)(0, PAGE, READ)
    assert (told.value.errno, told.value.region, told.value.offset) == (errno.EACCES, NAME, 0)
    assert (told.value.required, told.value.actual) == (pyshare.WRITE, READ)
    assert isinstance(told.value, PermissionError)
    assert region.generation == 0


def test_an_observer_is_made_by_attach_only() -> None:
    with pytest.raises(TypeError, match=r"pyshare\.attach"):
        Observer()


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 63, 1), (0, 1 << 64)]
)
def test_a_range_outside_is_no_range(observer: Observer, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes at offset {offset} .*{SIZE} bytes"):
        observer.read(offset, length)
    with pytest.raises(ValueError, match="offset must be in 0 to"):
        observer.protection(SIZE)


def test_what_is_no_region_is_not_observed() -> None:
    with pytest.raises(pyshare.RegionNotFound):
        pyshare.attach("nobody", readonly=True)
    with open(os.devnull) as null, pytest.raises(pyshare.CorruptRegion):
        pyshare.attach(null, readonly=True)
    with pytest.raises(OSError, match="Errno 9"):
        pyshare.attach(1 << 30, readonly=True)
    with pytest.raises(ValueError, match="engine must be"):
        pyshare.attach("nobody", readonly=True, engine="steam")


@pytest.mark.parametrize(
    "damage", [0, 8, 12, 16, 24, 32], ids=["magic", "version", "page_size", "control", "size", "pages"]
)
def test_a_damaged_region_is_not_observed(region: Region, damage: int) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    os.pwrite(region.fileno(), b"\xff\xff\xff\x7f", damage)
    with pytest.raises(pyshare.CorruptRegion):
        pyshare.attach(region, readonly=True)
    assert len(os.listdir("/proc/self/fd")) == fds
