"""Participants whose page tables others change (engine="uffd"): who is reached, who is not, and that every promise
holds all the same, whatever becomes of descriptors, of processes, and of what the kernel permits.

A participant that is stopped and follows was reached from outside; one that is named in a timeout was not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import Child, idle, until
from kernel import (
    PAGE,
    agreed,
    at_its_limit,
    in_background,
    libc,
    mapped,
    tell,
    word,
)
from members import (
    AT_ONCE,
    CHUNK,
    SOON,
    Fork,
    Joined,
    Member,
    change,
    engines,
    member,
    needs_thread_pidfd,
    obey,
    order,
    pages_of,
    silent,
)

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, WRITE, Prot, Region

libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    """Two whole chunks and a part of a third; of other sizes (bytes) by indirect parameters."""
    size = getattr(request, "param", (2 * CHUNK + 7) * PAGE - 100)
    with pyshare.create(size=size, max_participants=64, engine="uffd") as made:
        yield made


# -- Who is reached ----------------------------------------------------------------------------------------------------


def test_engines_are_told(region: Region, joined: Joined) -> None:
    one, other = joined(), Member(joined, region)
    assert region.engine == "uffd"
    assert engines(region) == {os.getpid(): "uffd", one.pid: "uffd", other.pid: "mprotect"}


@needs_thread_pidfd
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (5, 200), (CHUNK - 1, 2), (CHUNK, 1), (2 * CHUNK - 10, 17), (2 * CHUNK + 6, 1)],
    ids=["page", "run", "border", "chunk", "tail", "last"],
)
def test_the_stopped_are_reached(region: Region, joined: Joined, first: int, count: int) -> None:
    stopped = [joined() for _ in range(3)]
    for child in stopped:
        child.stop()
    for prot in (READ, WRITE, READ, READ_WRITE):
        generation = change(region, first, count, prot)
        runs = agreed(region, *[child.pid for child in stopped])
        assert (first * PAGE, count * PAGE, prot) in runs or prot & WRITE
        assert {one.applied for one in region.participants()} == {generation}


@needs_thread_pidfd
@pytest.mark.parametrize("count", [1, 257], ids=["page", "many"])
@pytest.mark.parametrize("prot", [NONE, READ | EXEC])
def test_the_stopped_follow_later_where_entries_do_not_say_it(
    region: Region, joined: Joined, prot: Prot, count: int
) -> None:
    """No access, or execution, is a matter of mappings: the one who is told and runs follows in the same change."""
    stopped, other = joined(), joined()
    stopped.stop()
    with silent(stopped):
        change(region, 3, count, prot, timeout=AT_ONCE)
    agreed(region, other.pid)
    with silent(stopped):  # from there nobody can tell what its page tables are
        change(region, 0, 1, READ, timeout=AT_ONCE)
    stopped.resume()
    change(region, 3, 1, READ)
    change(region, 4, 1, READ_WRITE)
    agreed(region, stopped.pid, other.pid)
    # ... and then it is within reach again.
    stopped.stop()
    change(region, 0, 2, READ)
    change(region, 1, 1, READ_WRITE)
    agreed(region, stopped.pid, other.pid)


def test_who_withdraws_once_a_change_is_planned_is_woken(region: Region, joined: Joined) -> None:
    """By a forbidden store, whose line has no room in a pipe, so that it lives on; its agent sleeps for a second.

    A busy machine may take as long, so one of some tries has to be sooner.
    """
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PAGE)
    os.write(writing, bytes(PAGE))

    def violate(child: Child) -> None:
        faulthandler.disable()
        os.dup2(writing, 2)
        child.say()
        child.hear()
        region.buf[0] = 1

    def call(child: Child) -> None:
        child.say()
        child.hear()
        change(region, 1, 1, READ)
        child.say()

    took = []
    while len(took) < 5 and min(took, default=SOON) >= SOON:
        other = joined(violate)
        change(region, 0, 2, READ_WRITE)
        change(region, 0, 1, READ)  # the other's page tables can be changed from outside
        caller = joined(call, point="A2_apply=stop")
        caller.say()
        caller.wait_stopped()
        other.say()
        until(lambda pid=other.pid: engines(region)[pid] == "mprotect")
        start = time.monotonic()
        caller.resume()
        assert caller.hear() == "ok"
        took.append(time.monotonic() - start)
        os.read(reading, PAGE)
        assert other.wait() == -signal.SIGSEGV
        os.write(writing, bytes(PAGE - len(os.read(reading, PAGE))))
    os.close(reading)
    os.close(writing)
    assert min(took) < SOON, "its agent was not woken"


def test_large_and_scattered_changes_are_everybodys_own(region: Region, joined: Joined) -> None:
    stopped = joined()
    change(region, 1, 255, READ)
    for page in range(256, 256 + 64, 2):
        change(region, page, 1, READ)
    stopped.stop()
    for first, count in ((0, 257), (256, 64)):
        with silent(stopped):
            change(region, first, count, READ_WRITE, timeout=AT_ONCE)
    stopped.resume()
    change(region, 0, 1, READ)
    agreed(region, stopped.pid)


@needs_thread_pidfd
def test_chunks_without_page_tables_are_armed_in_the_same_change(region: Region, joined: Joined) -> None:
    """The kernel says ENOENT where a chunk is not registered, after what lies before it was changed."""
    stopped, other = joined(), joined()
    change(region, CHUNK, CHUNK, READ)
    stopped.stop()
    change(region, CHUNK - 2, 2, READ)
    with silent(stopped):
        change(region, CHUNK - 1, 2, READ_WRITE, timeout=AT_ONCE)
    agreed(region, other.pid)
    assert mapped(stopped.pid, region) != mapped(other.pid, region)
    stopped.resume()
    change(region, CHUNK + 9, 1, READ_WRITE)
    agreed(region, stopped.pid, other.pid)
    stopped.stop()
    change(region, CHUNK, 2, READ)
    agreed(region, stopped.pid, other.pid)


def test_no_page_is_open_while_its_chunk_is_armed(region: Region, joined: Joined) -> None:
    """A chunk of READ has a mapping that is READ; it becomes writable, for one page, after all others are marked."""

    def body(child: Child) -> None:
        zero, stores, over = os.open("/dev/zero", os.O_RDONLY), 0, threading.Event()
        view = region.buf[CHUNK * PAGE : CHUNK * PAGE + 1]

        def hammer() -> None:
            nonlocal stores
            while not over.is_set():
                with contextlib.suppress(OSError):
                    stores += os.readv(zero, [view])

        with in_background(hammer):
            child.say()
            child.hear()
            over.set()
        child.say(str(stores))

    change(region, CHUNK, CHUNK, READ)
    child = joined(body)
    for _ in range(2000):
        change(region, 2 * CHUNK - 1, 1, READ_WRITE)
        change(region, CHUNK, CHUNK, READ)
    child.say()
    assert child.hear() == "0"
    agreed(region)


SIZES = [PAGE - 1, 511 * PAGE, CHUNK * PAGE, (CHUNK + 1) * PAGE, (3 * CHUNK + 7) * PAGE - 100]


@pytest.mark.parametrize("region", SIZES, indirect=True)
def test_any_change_in_any_size(region: Region, joined: Joined) -> None:
    """Whole regions, whole chunks, borders and tails, by all protections, from both sides; and a joiner after each."""
    dice, pages = random.Random(region.size), pages_of(region)
    child, co_operative = joined(obey(region)), joined()
    for turn in range(60):
        first = dice.choice([0, dice.randrange(pages), dice.randrange(pages) // CHUNK * CHUNK])
        count = min(dice.choice([1, 2, 300, CHUNK, pages]), pages - first)
        prot = dice.choice([READ, READ, READ, READ_WRITE, READ_WRITE, READ_WRITE, *map(Prot, range(8))])
        if turn % 2:
            change(region, first, count, prot)
        else:
            order(child, first, count, prot)
        agreed(region, child.pid, co_operative.pid)
        if turn % 20 == 19:
            agreed(region, joined().pid)


# -- What is marked stays marked ---------------------------------------------------------------------------------------


def dont_need(region: Region) -> None:
    assert libc.madvise(region.address, 4 * PAGE, mmap.MADV_DONTNEED) == 0


def page_out(region: Region) -> None:
    assert libc.madvise(region.address, 4 * PAGE, 21) == 0


def punch(region: Region) -> None:
    keep_size, punch_hole = 1, 2
    with open("/proc/self/maps") as maps:
        data = next(int(line.split()[2], 16) for line in maps if line.startswith(f"{region.address:x}-"))
    assert libc.fallocate(region.fileno(), keep_size | punch_hole, ctypes.c_long(data), ctypes.c_long(4 * PAGE)) == 0


def lock(region: Region) -> None:
    for call in (libc.mlock, libc.munlock):
        assert call(ctypes.c_void_p(region.address), ctypes.c_size_t(4 * PAGE)) == 0


@pytest.mark.parametrize("lose", [dont_need, page_out, punch, lock])
@pytest.mark.parametrize("touched", [False, True], ids=["unpopulated", "populated"])
def test_pages_that_come_and_go_keep_their_marks(
    region: Region, joined: Joined, lose: Callable[[Region], None], touched: bool
) -> None:
    def body(child: Child) -> None:
        if touched:
            region.write(0, bytes(8 * PAGE))
        idle(child)
        lose(region)
        with pytest.raises(OSError, match="Bad address"):
            os.readv(os.open("/dev/zero", os.O_RDONLY), [region.buf[:PAGE]])
        idle(child)

    child = joined(body)
    change(region, 0, 2, READ)
    child.say()
    assert child.hear() == "ok"
    runs = agreed(region, child.pid)
    assert runs[0] == (0, 2 * PAGE, READ)
    child.stop()
    change(region, 0, 2, READ_WRITE)
    change(region, 2, 2, READ)
    assert agreed(region, child.pid)[1] == (2 * PAGE, 2 * PAGE, READ)


@pytest.mark.parametrize("prot", [READ, READ_WRITE])
def test_page_tables_of_a_sparse_region_cost_nothing(run_python: Callable[..., object], prot: Prot) -> None:
    source = """
import os, re, sys, pyshare
def tables():
    return int(re.search(r"VmPTE:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before = tables()
region = pyshare.create(size=64 << 30, prot=int(sys.argv[1]), engine="uffd")
created = tables()
with pyshare.attach(region.fileno()) as other:
    attached = tables()
    region.mprotect(0, 4096, 3)
    region.mprotect(32 << 30, 4096, 1)
    changed = tables()
print(created - before, attached - created, changed - attached)
"""
    ran = run_python(source, str(int(prot)))
    assert ran.stderr == ""  # type: ignore[attr-defined]
    costs = [int(cost) for cost in ran.stdout.split()]  # type: ignore[attr-defined]
    assert len(costs) == 3
    assert all(cost < 1 << 20 for cost in costs), costs


SCATTERED = 100_000


@pytest.mark.parametrize("region", [2 * SCATTERED * PAGE], indirect=True)
def test_scattered_pages_split_no_mapping(region: Region, joined: Joined) -> None:
    child = joined()
    for page in range(0, 2 * SCATTERED, 2):
        region.mprotect(page * PAGE, PAGE, READ)
    assert region.generation == SCATTERED
    assert len(agreed(region, child.pid)) == 2 * SCATTERED
    for pid in (os.getpid(), child.pid):
        assert mappings(pid, region) < 5


def mappings(pid: int, region: Region) -> int:
    """How many mappings the kernel has of the region's data there."""
    with open(f"/proc/{pid}/maps") as maps:
        starts = [int(line.split("-", 1)[0], 16) for line in maps]
    return sum(region.address <= start < region.address + region.size for start in starts)


@needs_thread_pidfd
@pytest.mark.parametrize("region", [2 * SCATTERED * PAGE], indirect=True)
def test_scattered_pages_are_refused_where_they_split_mappings(region: Region, joined: Joined) -> None:
    """One participant by mprotect comes to its limit of mappings: refused for all, and nobody is in doubt."""
    other, stopped = Member(joined, region), joined()
    stopped.stop()
    with pytest.raises(OSError, match=f"pid {other.pid} could not apply") as caught:  # noqa: PT012
        for page in range(0, 2 * SCATTERED, 2):
            change(region, page, 1, READ)
    assert caught.value.errno == errno.ENOMEM
    assert 1000 < len(agreed(region, stopped.pid)) < 2 * SCATTERED
    assert other.follows(region)
    assert not any(one.fenced for one in region.participants())
    stopped.resume()
    change(region, 0, 2 * SCATTERED, READ)
    assert agreed(region, stopped.pid) == [(0, region.size, READ)]
    assert other.follows(region)


# -- Both kinds in one region ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(3), ids=["uffd calls", "forked calls", "mprotect calls"])
def test_every_protection_in_turn(region: Region, joined: Joined, turn: int) -> None:
    other, child, idler = Member(joined, region), joined(obey(region)), joined()
    call: Callable[[int, int, int], int] = [
        lambda *what: change(region, *what),
        lambda *what: order(child, *what),
        lambda *what: order(other.child, *what),
    ][turn]
    for prot in (READ, NONE, READ, READ_WRITE, NONE, READ_WRITE, READ | EXEC, READ):
        for first, count in ((0, 1), (CHUNK - 1, 2), (2 * CHUNK, 7)):
            call(first, count, prot)
            agreed(region, child.pid, idler.pid)
            assert other.follows(region)


@needs_thread_pidfd
def test_only_the_other_kind_is_late(region: Region, joined: Joined) -> None:
    other, stopped = Member(joined, region), joined()
    other.child.stop()
    stopped.stop()
    for prot in (READ, READ_WRITE, READ):
        with silent(other.child):
            change(region, 0, 2, prot, timeout=AT_ONCE)
        agreed(region, stopped.pid)
    other.child.resume()
    change(region, 1, 1, READ_WRITE)
    agreed(region, stopped.pid)
    assert other.follows(region)


def test_a_change_that_the_other_kind_cannot_apply_is_undone_with_those_who_sleep(
    region: Region, joined: Joined
) -> None:
    """They had it, and never ran."""
    full = Member(joined, region, member(region, "mprotect", at_its_limit))
    stopped = [joined() for _ in range(3)]
    change(region, 5, 1, READ)
    pids = [child.pid for child in stopped]
    before = agreed(region, *pids)
    for child in stopped:
        child.stop()
    tell(full.child, "fill")
    for _ in range(2):
        with pytest.raises(OSError, match=f"pid {full.pid} could not apply") as caught:
            change(region, 9, 1, READ)
        assert caught.value.errno == errno.ENOMEM
        assert agreed(region, *pids) == before
    assert full.follows(region)
    assert not any(one.fenced for one in region.participants())
    tell(full.child, "free 4")
    change(region, 9, 1, READ)
    agreed(region, *pids)
    assert full.follows(region)


def test_agents_that_wake_late_take_nothing_back(joined: Joined) -> None:
    """A change wakes those who share a bit with one that must act; they come when others have acted for them, and the
    page may have been granted since (without the claim, they protected it again)."""
    with pyshare.create(size=2 * CHUNK * PAGE, max_participants=64, engine="uffd") as region:

        def store(child: Child) -> None:
            child.say()
            zero = os.open("/dev/zero", os.O_RDONLY)
            while child.hear() == "store":
                os.readv(zero, [region.buf[:PAGE]])
                child.say()

        first = Member(joined, region)  # in slot 1: with 33 it shares a bit
        children = [joined(store) for _ in range(36)]
        assert first.child
        for _ in range(100):
            change(region, 0, 1, READ)
            change(region, 0, 1, READ_WRITE)
            for child in children[28:]:
                child.say("store")
            for child in children[28:]:
                assert child.hear() == "ok"
        agreed(region, *[child.pid for child in children])
        assert first.follows(region)


def test_an_agent_that_is_at_work_itself_is_not_helped(region: Region, joined: Joined) -> None:
    """It shares a bit with one that must act, woke before the caller came to it, and was stopped while it had the
    claim.  What it does when it goes on must not undo what was done for it meanwhile."""

    def crowd(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        kept = [pyshare.attach(fd) for _ in range(31)]
        idle(child)
        del kept

    def call(child: Child) -> None:
        idle(child)
        with silent(target):
            change(region, 0, 1, READ, timeout=SOON)
        idle(child)

    other = Member(joined, region)
    joined(crowd)
    target = joined(point="A2_apply=stop")
    assert [one.pid for one in region.participants()].index(target.pid) == 33
    caller = joined(call, point="A2_apply=stop")
    caller.say()
    caller.wait_stopped()  # it has told those who must act, and has changed nobody yet
    target.wait_stopped()
    caller.resume()
    assert caller.hear() == "ok"
    assert mapped(target.pid, region) == [(0, pages_of(region) * PAGE, READ_WRITE)]
    target.resume()
    change(region, 1, 1, READ)
    agreed(region, target.pid)
    assert other.follows(region)


@needs_thread_pidfd
def test_a_claim_that_is_stopped_holds_up_no_lease(region: Region, fork: Fork) -> None:
    """The agent here waits for it, once it has been told of the change; who leases another page does not."""
    change(region, 4, 1, READ)
    caller = fork(lambda _: change(region, 0, 1, READ), point="R1_claim=stop")
    caller.wait_stopped()
    futex, wake, guard, generation = 202, 1, 64 << 10, 768
    low = ctypes.c_void_p(region.address - guard - word(region, 16, "Q") + generation)
    assert libc.syscall(futex, low, wake, 1 << 30, None, None, 0) >= 0
    for _ in range(1000):
        with region.lease(4 * PAGE, PAGE, timeout=SOON):
            region.buf[4 * PAGE] = 1
    caller.resume()
    assert caller.wait() == 0
