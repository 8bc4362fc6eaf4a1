"""What a region remembers of forbidden accesses: the latest 16, whole or not at all, for whoever asks afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from conftest import PATIENCE, Child, until
from kernel import SECTIONS, co_operative, die_quietly, word

import pyshare
from pyshare import NONE, READ, READ_WRITE, Prot, ProtectionError, Region, Violation
from pyshare.__main__ import main

PAGE = 4096
KEPT = 16
VIOLATION, ENTRY = 10, 128  # ext/segment/layout.h: the kind of the section, the size of an entry
COUNTER = 2752  # in the header, line 43
FORM = struct.Struct("<QQQQIBBBx80s")  # what follows the check

Fork = Callable[..., Child]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create("kept", size=KEPT * PAGE + 10, engine=request.param, replace=True) as region:
        region.mprotect(0, region.size, READ)
        yield region


def store(region: Region, offset: int) -> None:
    """By C code, and told of at once."""
    with pytest.raises(ProtectionError), region.guard():
        ctypes.memset(region.address + offset, 1, 1)


def dying(region: Region, offset: int) -> Callable[[Child], None]:
    def body(_child: Child) -> None:
        die_quietly()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ctypes.memset(region.address + offset, 1, 1)

    return body


# -- What is kept ------------------------------------------------------------------------------------------------------


def test_of_what_a_process_died(region: Region, fork: Fork) -> None:
    """All of it, for participants and observers, when nothing is left of the process."""
    before = time.time()
    child = fork(dying(region, 2 * PAGE + 7))
    assert child.wait() == -signal.SIGSEGV
    (kept,) = region.violations()
    assert before <= kept.time <= time.time()
    assert (kept.pid, kept.offset, kept.protection, kept.generation) == (child.pid, 2 * PAGE + 7, READ, 1)
    assert isinstance(kept.protection, Prot)
    assert kept.outcome == "died"
    assert kept.command.split()[0] == os.path.basename(psutil.Process().cmdline()[0])
    with pyshare.attach(region.fileno(), readonly=True) as observer:
        assert observer.violations() == [kept]


def test_load_of_a_page_that_was_never_allowed(fork: Fork) -> None:
    with pyshare.create(size=PAGE, prot=NONE) as region:

        def body(_child: Child) -> None:
            die_quietly()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            ctypes.string_at(region.address + 3, 1)

        fork(body).wait()
        (kept,) = region.violations()
        assert (kept.offset, kept.protection, kept.generation) == (3, NONE, 0)


def test_raised_is_kept_once_an_exception(region: Region) -> None:
    """Of the accesses until the thread is told, the first."""
    region.on_violation("raise")

    def store_thrice() -> None:
        with region.guard():
            for offset in (PAGE, 3 * PAGE, 5):
                ctypes.memset(region.address + offset, 1, 1)

    with pytest.raises(ProtectionError):
        store_thrice()
    assert [(kept.offset, kept.outcome, kept.pid) for kept in region.violations()] == [(PAGE, "raised", os.getpid())]


def test_waited_is_kept_when_the_wait_begins(region: Region) -> None:
    region.on_violation("wait")
    thread = threading.Thread(target=ctypes.memset, args=[region.address + PAGE, 1, 1])
    thread.start()
    until(region.violations)
    region.mprotect(PAGE, PAGE, READ_WRITE)
    thread.join(PATIENCE)
    assert [(kept.offset, kept.outcome) for kept in region.violations()] == [(PAGE, "waited")]


def test_a_wait_that_is_interrupted_is_kept_once(region: Region, joined: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        region.on_violation("wait")
        child.say()
        with pytest.raises(KeyboardInterrupt):
            region.buf[0] = 1

    child = joined(body)
    until(region.violations)
    child.kill(signal.SIGINT)
    assert child.wait() == 0
    assert [kept.outcome for kept in region.violations()] == ["waited"]


def test_the_latest_sixteen_and_the_newest_last(region: Region) -> None:
    region.on_violation("raise")
    for turn in range(KEPT + 5):
        assert len(region.violations()) == min(turn, KEPT)
        store(region, turn % KEPT * PAGE + turn)
    assert [kept.offset for kept in region.violations()] == [turn % KEPT * PAGE + turn for turn in range(5, KEPT + 5)]


def test_longer_ago_than_the_ring_remembers(region: Region) -> None:
    region.on_violation("raise")
    for _ in range(513):
        region.mprotect(PAGE, PAGE, READ_WRITE)
        region.mprotect(PAGE, PAGE, READ)
    store(region, 0)
    assert region.violations()[-1].generation is None


def test_the_command_is_told_without_folders(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """As much of it as there is room for; a folder's name takes none."""
    ran = run_python(
        "import os, pyshare\n"
        "with pyshare.create(size=4096, prot=pyshare.READ, on_violation='raise') as region:\n"
        "    try:\n"
        "        region.buf[0] = 1\n"
        "    except pyshare.ProtectionError:\n"
        "        print(region.violations()[0].command)\n",
        "a/b",
        "x" * 100 + "/short",
        "y" * 100,
    )
    name = os.path.basename(sys.executable)
    assert ran.stdout == f"{name} script.py b short ".ljust(79, "y") + "\n", ran.stderr


# -- What is not -------------------------------------------------------------------------------------------------------


def test_refusals_by_calls_are_no_violations(region: Region) -> None:
    with pytest.raises(ProtectionError):
        region.write(0, b"x")
    receive, send = os.pipe()
    os.write(send, b"x")
    with pytest.raises(ProtectionError):
        region.readinto(receive, 0, 1)
    for end in (receive, send):
        os.close(end)
    assert region.violations() == []


def test_outside_the_data_and_after_closing(region: Region, fork: Fork) -> None:
    """Deaths, but not of a protection; and what would be written to is not mapped."""
    address = region.address

    def body(child: Child) -> None:
        region.close()
        dying_at = address + int(child.hear())
        die_quietly()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ctypes.memset(dying_at, 1, 1)

    closed, outside = fork(body), fork(dying(region, -1))
    closed.say("0")
    assert (closed.wait(), outside.wait()) == (-signal.SIGSEGV, -signal.SIGSEGV)
    assert region.violations() == []


def test_an_access_that_is_allowed_after_all(region: Region, fork: Fork) -> None:
    """It meets the grant half made: page tables are late, and nothing was forbidden."""

    def grant(_child: Child) -> None:
        region.mprotect(0, 2 * PAGE, READ_WRITE, timeout=None)

    def body(_child: Child) -> None:
        ctypes.memset(region.address, 1, 1)

    author = fork(grant, point="C4_map=stop")
    author.wait_stopped()
    storer = fork(body)
    author.resume()
    assert (author.wait(), storer.wait()) == (0, 0)
    assert region.violations() == []


def test_not_of_a_region_that_is_closed(region: Region) -> None:
    copy = pyshare.attach(region.fileno())
    copy.close()
    with pytest.raises(pyshare.RegionClosed):
        copy.violations()


# -- Whole or not at all -----------------------------------------------------------------------------------------------


def entry_at(region: Region, number: int) -> int:
    return word(region, SECTIONS + 24 * (VIOLATION - 1) + 8, "Q") + number % KEPT * ENTRY


def check_of(rest: bytes) -> int:
    """As ext/shared/violations.c has it."""
    check, mask = 0x243F6A8885A308D3, (1 << 64) - 1
    for (value,) in struct.iter_unpack("<Q", rest):
        check = (check ^ value) * 0x9E3779B97F4A7C15 & mask
        check ^= check >> 32
    return check


def forged(number: int, offset: int = 5, prot: int = 1, outcome: int = 1, command: bytes = b"forged") -> bytes:
    rest = FORM.pack(number, 10**18, offset, 3, 4711, prot, outcome, 1, command)
    return check_of(rest).to_bytes(8, "little") + rest


def test_no_byte_of_an_entry_may_be_another(region: Region) -> None:
    region.on_violation("raise")
    store(region, PAGE)
    at = entry_at(region, 0)
    for byte in range(ENTRY):
        (was,) = os.pread(region.fileno(), 1, at + byte)
        os.pwrite(region.fileno(), bytes([was ^ 1]), at + byte)
        assert region.violations() == [], byte
        os.pwrite(region.fileno(), bytes([was]), at + byte)
    assert len(region.violations()) == 1


def test_one_that_died_before_it_had_written(region: Region) -> None:
    """Its number is taken, and its place holds what was there before: nothing, or one that was overtaken."""
    os.pwrite(region.fileno(), (1).to_bytes(8, "little"), COUNTER)
    assert region.violations() == []
    region.on_violation("raise")
    for page in range(KEPT):
        store(region, page * PAGE)
    assert len(region.violations()) == KEPT
    os.pwrite(region.fileno(), (KEPT + 2).to_bytes(8, "little"), COUNTER)
    assert [kept.offset // PAGE for kept in region.violations()] == list(range(1, KEPT))


def test_one_that_slept_while_others_came_round(region: Region) -> None:
    """It writes its old entry, whole, over a newer one."""
    region.on_violation("raise")
    for page in range(KEPT + 1):
        store(region, page % KEPT * PAGE)
    os.pwrite(region.fileno(), forged(0), entry_at(region, KEPT))
    assert len(region.violations()) == KEPT - 1
    assert "forged" not in {kept.command for kept in region.violations()}


@pytest.mark.parametrize(
    "entry",
    [
        forged(0, offset=KEPT * PAGE + 10),
        forged(0, offset=(1 << 64) - 1),
        forged(0, outcome=3),
        forged(1),
        forged(KEPT),
    ],
)
def test_what_cannot_be_is_left_out(region: Region, entry: bytes) -> None:
    os.pwrite(region.fileno(), (1).to_bytes(8, "little"), COUNTER)
    os.pwrite(region.fileno(), forged(0, prot=0xFF, command=b"\xff\n" + b"x" * 78), entry_at(region, 0))
    (kept,) = region.violations()
    assert (kept.protection, kept.command) == (7, "\ufffd\n" + "x" * 77)
    os.pwrite(region.fileno(), entry, entry_at(region, 0))
    assert region.violations() == []
    os.pwrite(region.fileno(), b"\xff" * 8, COUNTER)
    assert region.violations() == []


def test_many_at_once(region: Region, joined: Callable[..., Child]) -> None:
    """What is read while processes write is always somebody's whole entry, and of the latest."""

    def body(page: int, child: Child) -> None:
        region.on_violation("raise")
        child.say()
        for turn in range(300):
            store(region, page * PAGE + turn)

    children = [joined(lambda child, page=page: body(page, child)) for page in range(3)]
    pages = {child.pid: page for page, child in enumerate(children)}
    while not all(map(is_over, children)):
        seen: dict[int, list[int]] = {pid: [] for pid in pages}
        for kept in region.violations():
            assert kept.offset // PAGE == pages[kept.pid]
            seen[kept.pid].append(kept.offset % PAGE)
        assert all(turns == sorted(set(turns)) for turns in seen.values())
    assert [child.wait() for child in children] == [0, 0, 0]
    assert word(region, COUNTER, "Q") == 900


def is_over(child: Child) -> bool:
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# -- How it is told ----------------------------------------------------------------------------------------------------


def show(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["show", "kept", *arguments]) == 0
    return output.getvalue()


def test_show_tells_them(region: Region, fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert json.loads(show("--json"))["violations"] == []
    assert "VIOLATION" not in show()
    child = fork(dying(region, PAGE + 9))
    child.wait()
    (kept,) = region.violations()
    (told,) = json.loads(show("--json"))["violations"]
    assert Violation(**{**told, "protection": Prot[told["protection"]]}) == kept
    line = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d +{child.pid} +died +{PAGE + 9} +READ +1 +{re.escape(kept.command)}"
    assert re.search(line, show())


@co_operative
def test_a_fenced_process(region: Region, fork: Fork) -> None:
    """It has no access to what the map allows to all."""
    from test_fault import fill_maps

    region.mprotect(0, region.size, READ_WRITE)

    def body(child: Child) -> None:
        die_quietly()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        fill_maps()
        child.say()
        child.hear()
        ctypes.memset(region.address + 5 * PAGE, 1, 1)

    child = fork(body, point="A2_apply=stop")
    child.hear()
    with pytest.raises(pyshare.PropagationTimeout):
        region.mprotect(PAGE, PAGE, READ, timeout=0)
    child.wait_stopped()
    child.resume()
    until(lambda: any(one.fenced for one in region.participants()))
    child.say()
    assert child.wait() == -signal.SIGSEGV
    assert [(kept.offset, kept.protection, kept.outcome) for kept in region.violations()] == [(5 * PAGE, NONE, "died")]
