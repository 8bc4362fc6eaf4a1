"""Promises 1 and 2 for each protection that follows each other one, on both engines, whatever else is under way.

What may be done is tried: by system calls, by instructions, and by `read` and `write`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Child
from kernel import PAGE, Mappings, agreed, in_background
from members import CHUNK, Joined, change, pages_of

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, WRITE, Prot, ProtectionError, Region

HERE = Path(__file__).parent
EVERY = [(Prot(before), Prot(after)) for before in range(8) for after in range(8)]
RETURN = b"\xc3"  # a function that does nothing
LOAD, STORE, EXECUTE = range(3)  # as recover.c has them


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recover") / "recover.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", path, HERE / "recover.c"], check=True)
    return path


class Prober:
    """What this process can do with a page."""

    def __init__(self, region: Region, library: Path) -> None:
        self.region = region
        self.could = ctypes.CDLL(str(library)).could
        self.could.argtypes = [ctypes.c_void_p, ctypes.c_long]
        self.could.restype = ctypes.c_long
        self.source = os.memfd_create("source")
        self.sink = os.memfd_create("sink")
        os.write(self.source, RETURN)

    def call(self, call: Callable[..., int], fd: int, page: int) -> bool:
        with contextlib.suppress(OSError):
            return call(fd, [self.region.buf[page * PAGE : page * PAGE + 1]], 0) == 1
        return False

    def method(self, call: Callable[..., object], page: int, argument: object) -> bool:
        with contextlib.suppress(ProtectionError):
            call(page * PAGE, argument)
            return True
        return False

    def instruction(self, page: int, how: int) -> bool:
        return bool(self.could(self.region.address + page * PAGE, how))

    def calls(self, page: int) -> tuple[bool, bool]:
        """(load, store)"""
        return self.call(os.pwritev, self.sink, page), self.call(os.preadv, self.source, page)

    def methods(self, page: int) -> tuple[bool, bool]:
        """(load, store)"""
        return self.method(self.region.read, page, 1), self.method(self.region.write, page, RETURN)

    def instructions(self, page: int) -> tuple[bool, bool]:
        """(load, store)"""
        return self.instruction(page, LOAD), self.instruction(page, STORE)

    def agrees(self, page: int, prot: Prot, ways: list[str]) -> None:
        """Every way is as the protection says; where only execution is allowed, a load may be, too."""
        wanted = bool(prot & (READ | WRITE)), bool(prot & WRITE)
        for way in ways:
            told = getattr(self, way)(page)
            assert told == wanted or (prot == EXEC and told == (True, False)), (page, prot, way)
        if "instructions" in ways and (prot & EXEC or page % CHUNK < 8):  # a refusal takes its time
            assert self.instruction(page, EXECUTE) == bool(prot & EXEC), (page, prot)


@contextlib.contextmanager
def nothing(_region: Region, _page: int) -> Iterator[None]:
    yield


@contextlib.contextmanager
def lease(region: Region, page: int) -> Iterator[None]:
    with region.lease(page * PAGE, PAGE) as held:
        yield
        held.view[0] = 1


@contextlib.contextmanager
def window(region: Region, page: int) -> Iterator[None]:
    with region.lease(page * PAGE, PAGE, window=True) as held:
        yield
        held.view[0] = 1


@contextlib.contextmanager
def snapshot(region: Region, page: int) -> Iterator[None]:
    region.mprotect(page * PAGE, PAGE, READ_WRITE)
    region.write(page * PAGE, b"then")
    with region.snapshot() as taken:
        region.write(page * PAGE, b"now!")
        yield
        assert taken.read(page * PAGE, 4) == b"then"


@contextlib.contextmanager
def quarantine(region: Region, page: int) -> Iterator[None]:
    """A page is private to the process until somebody makes page tables follow the map."""
    region.on_violation("raise")
    with pytest.raises(ProtectionError), region.guard():
        ctypes.memset(region.address + page * PAGE, 1, 1)
    region.on_violation("die")
    yield


Situation = Callable[[Region, int], contextlib.AbstractContextManager[None]]
SITUATIONS: list[Situation] = [nothing, lease, window, snapshot, quarantine]


def try_all(child: Child, region: Region, library: Path, situation: Situation) -> None:
    """A body that makes its half of the changes, and looks at all pages after each round of them."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the lines of the accesses that are refused
    faulthandler.disable()
    ctypes.CDLL(str(library)).install_jump(0x08000000)
    prober = Prober(region, library)
    region.mprotect((CHUNK - 1) * PAGE, PAGE, READ)  # now our handler is on top
    unsaved = situation is snapshot  # system calls do not save what they store to
    with situation(region, CHUNK - 1):
        for turn in range(2):
            child.say()
            assert child.hear() == "go"
            for page, (before, after) in pages(region, mine=True):
                region.mprotect(page * PAGE, PAGE, (before, after)[turn])
            child.say()
            assert child.hear() == "go"
            for ways in [["methods"]] if unsaved else [["calls"], ["methods"], ["instructions"]]:
                for page, both in pages(region):
                    prober.agrees(page, both[turn], ways)
    child.say()


def pages(region: Region, mine: bool | None = None) -> Iterator[tuple[int, tuple[Prot, Prot]]]:
    """A page for each transition in each chunk, of which every other one is the child's to change."""
    for chunk in range(region.size // PAGE // CHUNK):
        if mine is None or mine == bool(chunk % 2):
            for index, both in enumerate(EVERY):
                yield chunk * CHUNK + 3 * index, both


@pytest.mark.parametrize("situation", SITUATIONS, ids=[one.__name__ for one in SITUATIONS])
@pytest.mark.parametrize("engine", ["mprotect", "uffd"])
def test_every_protection_after_every_other(joined: Joined, library: Path, engine: str, situation: Situation) -> None:
    """In chunks that were written to, and in others; by the process that tries, and from outside."""
    with pyshare.create(size=4 * CHUNK * PAGE, engine=engine) as region:
        for page, _ in pages(region):
            region.write(page * PAGE, RETURN)
        region.mprotect(2 * CHUNK * PAGE, 2 * CHUNK * PAGE, READ)
        child = joined(lambda child: try_all(child, region, library, situation))
        for turn in range(2):
            for page, both in pages(region, mine=False):
                region.mprotect(page * PAGE, PAGE, both[turn])
            child.say("go")
            assert child.hear() == "ok"
            if situation is nothing:
                agreed(region, child.pid)
            child.say("go")
            assert child.hear() == "ok"
        assert child.wait() == 0


# -- A violation that somebody survives -------------------------------------------------------------------------------


@pytest.fixture
def region() -> Iterator[Region]:
    """Two whole chunks and a part of a third."""
    with pyshare.create(size=(2 * CHUNK + 7) * PAGE - 100, engine="uffd") as made:
        yield made


@pytest.mark.parametrize("armed", [True, False])
def test_a_grant_after_a_violation_that_a_handler_jumped_out_of(
    region: Region, joined: Joined, library: Path, armed: bool
) -> None:
    """The page was taken out of the reach of others, so that it ended as SIGSEGV; a grant sees to that."""

    def body(child: Child) -> None:
        recover = ctypes.CDLL(str(library))
        recover.jumps.argtypes = [ctypes.c_void_p, ctypes.c_long]
        recover.jumps.restype = ctypes.c_long
        recover.install_jump(0x08000000)
        zero = os.open("/dev/zero", os.O_RDONLY)
        child.say()
        while child.hear() == "go":
            child.say(str(recover.jumps(region.address + PAGE, 50)))
            child.hear()
            assert os.readv(zero, [region.buf[PAGE : 2 * PAGE]]) == PAGE
            region.buf[PAGE] = 1
            child.say()

    change(region, 0, 2 if armed else pages_of(region), READ)
    child = joined(body)
    for turn in range(3):
        child.say("go")
        assert child.hear() == "50"
        change(region, 1, 1, READ_WRITE)
        child.say()
        assert child.hear() == "ok", turn
        agreed(region, child.pid)
        change(region, 1, 1, READ)
        agreed(region, child.pid)


# -- Participants that have no mapping left ----------------------------------------------------------------------------


@pytest.mark.parametrize("leases", [False, True], ids=["", "after a lease"])
def test_what_could_not_be_armed_is_nobody_elses_to_change(joined: Joined, leases: bool) -> None:
    """A chunk of three mappings: the kernel registers one after the other, and fails where the last is to be split.
    From then on a grant that returns is in force, and one that does not has changed nothing."""
    page = CHUNK + 88  # in the second chunk, whose last mapping goes on in the third

    def body(child: Child) -> None:
        extra = [mmap.mmap(-1, PAGE) for _ in range(8)]
        mappings = Mappings()
        mappings.fill()
        zero = os.open("/dev/zero", os.O_RDONLY)
        while extra:
            if leases:
                with contextlib.suppress(OSError), region.lease(page * PAGE, PAGE):
                    pass
            child.say()
            granted = child.hear() == "granted"
            with pytest.raises(OSError, match="Bad address") if not granted else contextlib.nullcontext():
                os.readv(zero, [region.buf[page * PAGE : page * PAGE + 1]])
            child.say()
            child.hear()
            extra.pop().close()  # room for one mapping more
        mappings.free(8)
        child.say("room")
        child.hear()

    def grant() -> bool:
        with contextlib.suppress(OSError):
            return bool(change(region, page, 1, READ_WRITE))
        return False

    with pyshare.create(size=3 * CHUNK * PAGE, prot=READ, engine="uffd") as region:
        change(region, CHUNK - 1, 1, NONE)
        change(region, CHUNK + 188, 1, NONE)
        full = joined(body)
        outcomes = set()
        while True:
            granted = [grant(), grant()][1]
            outcomes.add(granted)
            agreed(region, full.pid)
            full.say("granted" if granted else "refused")
            assert full.hear() == "ok"
            if granted:
                change(region, page, 1, READ)
            full.say()
            if full.hear() == "room":
                break
        assert outcomes == {True, False}
        assert not any(one.fenced for one in region.participants())
        assert grant()
        full.stop()
        change(region, page, 1, READ)  # it is within reach again
        change(region, page, 1, READ_WRITE)
        agreed(region, full.pid)


def test_a_system_call_is_not_refused_while_others_in_its_chunk_are_settled(region: Region, joined: Joined) -> None:
    """Each end of a quarantine registers and marks a chunk anew; what may be written there is open all the time."""

    def body(child: Child) -> None:
        zero, refused, over = os.open("/dev/zero", os.O_RDONLY), 0, threading.Event()

        def hammer() -> None:
            nonlocal refused
            while not over.is_set():
                try:
                    os.readv(zero, [view])
                except OSError:
                    refused += 1

        view = region.buf[PAGE : PAGE + 1]
        region.on_violation("raise")
        with in_background(hammer):
            for _ in range(300):
                with pytest.raises(ProtectionError), region.guard():
                    ctypes.memset(region.address, 1, 1)
                change(region, 2, 1, READ)
                change(region, 2, 1, READ_WRITE | EXEC)
            over.set()
        child.say(str(refused))

    change(region, 0, 1, READ)
    child = joined(lambda child: (child.say(), body(child)))
    for _ in range(100):
        change(region, 4, 1, NONE)
        change(region, 4, 1, READ_WRITE)
    assert child.hear() == "0"
    agreed(region)
