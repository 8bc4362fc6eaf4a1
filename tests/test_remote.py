"""Participants whose page tables others change (engine="uffd"): who is reached, who is not, and that every promise
holds all the same, whatever becomes of descriptors, of processes, and of what the kernel permits.

A participant that is stopped and follows was reached from outside; one that is named in a timeout was not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Child, idle, until
from kernel import (
    GENERATION,
    PAGE,
    SECTIONS,
    SYSTEM_CALLS,
    agreed,
    at_its_limit,
    in_background,
    libc,
    mapped,
    readable,
    refuse,
    tell,
    word,
)

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, WRITE, PropagationTimeout, Prot, Region

Fork = Callable[..., Child]
Joined = Callable[..., Child]

HERE = Path(__file__).parent
CHUNK = 512  # pages of one page table, which are armed together
AT_ONCE = 0.05  # a timeout that is meant to run out
SOON = 0.5  # the same, where somebody is meant to come to so-and-so before it does
SLOT_SIZE, TID = 256, 132  # in ext/layout.h

libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    """Two whole chunks and a part of a third; of other sizes (bytes) by indirect parameters."""
    size = getattr(request, "param", (2 * CHUNK + 7) * PAGE - 100)
    with pyshare.create(size=size, max_participants=64, engine="uffd") as made:
        yield made


def change(region: Region, first: int, count: int, prot: int, **options: float) -> int:
    """In pages; the last one may end with the region."""
    return region.mprotect(first * PAGE, min(count * PAGE, region.size - first * PAGE), prot, **options)


def pages_of(region: Region) -> int:
    return -(-region.size // PAGE)


def engines(region: Region) -> dict[int, str]:
    return {one.pid: one.engine for one in region.participants()}


@contextlib.contextmanager
def silent(*children: Child) -> Iterator[None]:
    """The change inside is made, and these do not follow it yet."""
    with pytest.raises(PropagationTimeout) as caught:
        yield
    assert caught.value.generation is not None
    assert caught.value.pids == sorted(child.pid for child in children)


def member(
    region: Region, engine: str, then: Callable[[Region], Callable[[Child], None]] | None = None
) -> Callable[[Child], None]:
    """A body that takes part by this engine, says at which address, and changes what it is told."""

    def body(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        own = pyshare.attach(fd, engine=engine)
        child.say()
        child.say(str(own.address))
        (then or obey)(own)(child)

    return body


class Member:
    """A participant that is not forked from one of the region, and so has an engine and an address of its own."""

    def __init__(self, start: Fork, region: Region, body: Callable[[Child], None] | None = None) -> None:
        self.child = start(body or member(region, "mprotect"))
        self.pid, self.size, self.address = self.child.pid, region.size, int(self.child.hear())
        assert self.child.hear() == "ok"

    def follows(self, region: Region) -> bool:
        return readable(mapped(self.pid, self)) == readable(agreed(region))


def obey(region: Region) -> Callable[[Child], None]:
    """A body that makes changes (first page, pages, protection), and says each generation."""

    def body(child: Child) -> None:
        child.say()
        while order := child.hear():
            child.say(str(change(region, *map(int, order.split()))))

    return body


def order(child: Child, first: int, count: int, prot: int) -> int:
    child.say(f"{first} {count} {int(prot)}")
    return int(child.hear())


# -- Who is reached ----------------------------------------------------------------------------------------------------


def test_engines_are_told(region: Region, joined: Joined) -> None:
    one, other = joined(), Member(joined, region)
    assert region.engine == "uffd"
    assert engines(region) == {os.getpid(): "uffd", one.pid: "uffd", other.pid: "mprotect"}


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
        prot = dice.choice([READ, READ, READ, READ_WRITE, READ_WRITE, READ_WRITE, NONE, READ | EXEC])
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


# -- Descriptors -------------------------------------------------------------------------------------------------------


def close_all(child: Child) -> None:
    """As a program that becomes a daemon does; but for the pipes by which we speak."""
    low = min(child._receive, child._send)
    high = max(child._receive, child._send)
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 1 << 16)


def other_files(like: list[int]) -> None:
    for _ in range(max(like) + 1):
        os.open("/dev/zero", os.O_RDWR)


def new_userfaultfd() -> int:
    """As another library may have one; its ranges are registered by nobody."""
    fd = int(libc.syscall(SYSTEM_CALLS["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK | 1))
    assert fd >= 0
    api = struct.pack("QQQ", 0xAA, 1, 0)  # UFFD_FEATURE_PAGEFAULT_FLAG_WP
    fcntl.ioctl(fd, 0xC018AA3F, api)
    return fd


def userfaultfds(like: list[int]) -> None:
    fd = new_userfaultfd()
    for number in like:
        if number != fd:
            os.dup2(fd, number)


def nothing(like: list[int]) -> None:
    """The numbers stay free."""


def regions(like: list[int]) -> None:
    """Regions come, which take numbers from the same places."""
    kept.extend(pyshare.create(size=PAGE, engine="uffd") for _ in like)
    for one in kept:
        one.mprotect(0, PAGE, READ)


kept: list[Region] = []


def own_userfaultfds() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which they are listed
            if "userfaultfd" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
    return found


@pytest.mark.parametrize("reuse", [nothing, other_files, userfaultfds, regions])
@pytest.mark.parametrize("known", [False, True], ids=["before", "after"])
def test_closed_descriptors_are_noticed(
    region: Region, joined: Joined, reuse: Callable[[list[int]], None], known: bool
) -> None:
    """The marks stay, and whatever has the numbers now, own and borrowed, nothing is taken for what it was."""

    def body(child: Child) -> None:
        if known:  # else it has borrowed nothing so far
            change(region, 0, 1, READ)
        numbers = own_userfaultfds()
        close_all(child)
        reuse(numbers)
        with region.lease(0, PAGE) as lease:
            lease.view[0] = 1
        obey(region)(child)

    stopped = joined()
    change(region, 0, 1, READ)
    child = joined(body)
    pids = [child.pid, stopped.pid]
    assert agreed(region, *pids)[0] == (0, PAGE, READ)
    stopped.stop()
    for turn, (first, prot) in enumerate([(1, READ), (0, READ_WRITE), (2, READ), (1, READ_WRITE), (CHUNK, READ)]):
        if turn % 2:
            change(region, first, 1, prot)
        else:
            order(child, first, 1, prot)
        agreed(region, *pids)
    stopped.resume()
    for who in (lambda prot: order(child, 3, 2, prot), lambda prot: change(region, 3, 2, prot)):
        for prot in (NONE, READ, READ_WRITE):
            who(prot)
            agreed(region, *pids)
    assert region.buf[0] == 1


@pytest.mark.parametrize("which", range(3))
def test_one_number_becomes_another_userfaultfd(region: Region, joined: Joined, which: int) -> None:
    """Any one of those that were borrowed, while the others are what they were: it would change our own page tables."""

    def body(child: Child) -> None:
        change(region, 0, 1, READ)
        borrowed = sorted(own_userfaultfds())[1:]
        assert len(borrowed) == 3
        fd = new_userfaultfd()
        os.dup2(fd, borrowed[which])
        obey(region)(child)

    others = [joined() for _ in range(2)]
    child = joined(body)
    for other in others:
        other.stop()
    for first, prot in [(1, READ), (0, READ_WRITE), (1, READ_WRITE)]:
        order(child, first, 1, prot)
        agreed(region, child.pid, *[other.pid for other in others])
    for other in others:
        other.resume()


def test_a_number_of_ours_that_leads_to_another_process_is_forgotten(fork: Fork) -> None:
    """Where the limit is low, our own userfaultfds and those of others have numbers of the same range; after
    closerange, what is borrowed next for one region has the number that was another's own."""
    with contextlib.ExitStack() as stack:
        regions = [stack.enter_context(pyshare.create(size=4 * PAGE, engine="uffd")) for _ in range(4)]
        for one in regions:
            one.mprotect(0, 2 * PAGE, READ)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)

        def body(child: Child) -> None:
            close_all(child)
            for one in regions:
                one.mprotect(3 * PAGE, PAGE, READ)  # borrows the parent's
                for other in regions:
                    with other.lease(0, 2 * PAGE):
                        child.say()
                        child.hear()
            idle(child)

        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
        try:
            child = fork(body)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for _ in range(len(regions) ** 2):
            assert child.hear() == "ok"
            for one in regions:
                assert mapped(os.getpid(), one)[0] == (0, 2 * PAGE, READ)
            child.say()
        assert child.hear() == "ok"


def test_a_forked_child_has_no_way_to_its_parents_page_tables(region: Region, joined: Joined) -> None:
    """A userfaultfd addresses the process that made it, whoever has the descriptor."""
    change(region, 0, 2, READ)
    before = {os.fstat(fd).st_ino for fd in own_userfaultfds()}
    assert before

    def body(child: Child) -> None:
        assert not before & {os.fstat(fd).st_ino for fd in own_userfaultfds()}
        with region.lease(0, 2 * PAGE) as lease:
            idle(child)
            lease.view[0] = 1

    child = joined(body)
    assert mapped(os.getpid(), region)[0] == (0, 2 * PAGE, READ)
    assert mapped(child.pid, region)[0] == (0, region.size + 100, READ_WRITE)
    child.say()
    assert child.wait() == 0
    agreed(region)


def test_exec_takes_a_participant_away(region: Region, joined: Joined) -> None:
    def body(child: Child) -> None:
        idle(child)
        os.execv(sys.executable, [sys.executable, "-c", "import signal; signal.pause()"])

    child = joined(body)
    change(region, 0, 1, READ)
    child.say()
    with pytest.raises(AssertionError, match="is gone"):
        child.hear()
    change(region, 0, 1, READ_WRITE)
    assert list(engines(region)) == [os.getpid()]


@pytest.mark.parametrize("limit", [1024, 4096])
def test_borrowed_descriptors_stay_out_of_the_way(region: Region, fork: Fork, joined: Joined, limit: int) -> None:
    """High numbers where the limit allows it."""
    children = [joined() for _ in range(20)]

    def body(child: Child) -> None:
        before = set(own_userfaultfds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        change(region, 0, 1, READ)
        borrowed = set(own_userfaultfds()) - before
        assert len(borrowed) == len(children) + 1
        assert min(borrowed) >= 1024 or limit == 1024
        idle(child)

    assert fork(body).hear() == "ok"


def test_who_has_no_room_for_a_descriptor_wakes_the_others(region: Region, fork: Fork, joined: Joined) -> None:
    children = [joined() for _ in range(20)]
    pids = [child.pid for child in children]

    def body(child: Child) -> None:
        before = set(own_userfaultfds())
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, files[1]))
        for prot in (READ, READ_WRITE, READ):
            change(region, 0, 1, prot)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        assert 0 < len(set(own_userfaultfds()) - before) < len(children)
        idle(child)

    assert fork(body).hear() == "ok"
    agreed(region, *pids)


def test_a_descriptor_of_somebody_else_is_not_believed(region: Region, joined: Joined) -> None:
    """The slot leads to another process's agent, as where a thread id is used again; the canary is not there."""
    target, other = joined(obey(region)), joined()

    def tid_at(slot: int) -> int:
        return word(region, SECTIONS + 8, "Q") + slot * SLOT_SIZE + TID

    assert [one.pid for one in region.participants()] == [os.getpid(), target.pid, other.pid]
    tids = [word(region, tid_at(slot)) for slot in range(3)]
    os.pwrite(region.fileno(), struct.pack("I", tids[2]), tid_at(1))
    for first, prot in ((0, READ), (0, READ_WRITE), (1, READ)):
        change(region, first, 1, prot)
        agreed(region, target.pid, other.pid)
    target.stop()  # and its own word for it, by its socket, is
    change(region, 0, 2, READ_WRITE)
    agreed(region, target.pid, other.pid)


# -- Deaths ------------------------------------------------------------------------------------------------------------


def ordered(region: Region, *changes: tuple[int, int, int]) -> Callable[[Child], None]:
    def body(child: Child) -> None:
        for first, count, prot in changes:
            change(region, first, count, prot)
        idle(child)

    return body


@pytest.mark.parametrize("prot", [READ, READ_WRITE])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("point", ["R1_claim", "R2_remote", "R3_ack"])
@pytest.mark.parametrize("asleep", [False, True], ids=["", "stopped"])
def test_a_caller_killed_while_it_changes_others(
    region: Region, fork: Fork, joined: Joined, point: str, times: int, prot: Prot, asleep: bool
) -> None:
    """The next caller finishes what it left, also with those who are stopped."""
    children = [joined() for _ in range(4)]
    pids = [child.pid for child in children]
    change(region, 0, 2, READ ^ READ_WRITE ^ prot)
    for child in children if asleep else []:
        child.stop()
    caller = fork(ordered(region, (0, 2, prot)), point=f"{point}=kill@{times}")
    assert caller.wait() == -signal.SIGKILL
    assert change(region, 4, 1, READ) == 3
    assert agreed(region, *pids)[0] == (0, 2 * PAGE, prot) or prot == READ_WRITE
    for child in children if asleep else []:
        child.resume()
    change(region, 5, 1, NONE)
    change(region, 0, 2, READ_WRITE)
    agreed(region, *pids)


@pytest.mark.parametrize("point", ["R1_claim", "R2_remote", "R3_ack"])
def test_an_agent_takes_the_claim_of_a_dead_caller_over(region: Region, fork: Fork, joined: Joined, point: str) -> None:
    """In the process of the claimed participant, whose own threads wait for it."""
    child, target = joined(obey(region)), joined(obey(region))
    caller = fork(ordered(region, (0, 1, READ)), point=f"{point}=kill@2")
    assert caller.wait() == -signal.SIGKILL
    assert order(target, 1, 1, NONE) == 2
    assert agreed(region, child.pid, target.pid)[:2] == [(0, PAGE, READ), (PAGE, PAGE, NONE)]


@pytest.mark.parametrize("point", ["R1_claim", "R2_remote", "R3_ack"])
def test_a_participant_dies_while_it_is_changed(region: Region, fork: Fork, joined: Joined, point: str) -> None:
    """Between the look at its descriptor and the change; its slot is free for the next."""
    target, other = joined(), joined()
    target.stop()
    caller = fork(ordered(region, (0, 1, READ), (1, 1, READ)), point=f"{point}=stop@2")
    caller.wait_stopped()
    target.kill()
    assert target.wait() == -signal.SIGKILL
    caller.resume()
    assert caller.hear() == "ok"
    assert sorted(engines(region)) == sorted([os.getpid(), other.pid, caller.pid])
    successor = joined()
    successor.stop()
    change(region, 0, 1, READ_WRITE)
    assert agreed(region, other.pid, caller.pid, successor.pid)[1] == (PAGE, PAGE, READ)


def with_pid(pid: int, joined: Joined) -> Child:
    """A participant that the kernel gives the pid of one that is dead; skips where nobody may ask it for that."""
    for _ in range(200):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError as error:
            pytest.skip(f"pids cannot be chosen here: {error}")
        child = joined()
        if child.pid == pid:
            return child
        child.kill()
        child.wait()
    pytest.skip("others were always quicker")


def test_a_pid_that_is_used_again(region: Region, joined: Joined) -> None:
    """What was borrowed of the first is of no use for the second, in the same slot or another."""
    for _ in range(3):
        first = joined()
        change(region, 0, 1, READ)
        first.kill()
        first.wait()
        second = with_pid(first.pid, joined)
        second.stop()
        change(region, 0, 1, READ_WRITE)
        change(region, 1, 1, READ)
        agreed(region, second.pid)
        second.kill()
        second.wait()


def in_new_pids(fork: Fork, body: Callable[[], object]) -> None:
    """In a process that is number 1, with a /proc of its own, where nobody else takes pids."""
    new_mounts_and_pids, private = 0x20000 | 0x20000000, 0x44000  # CLONE_NEWNS | CLONE_NEWPID; MS_PRIVATE | MS_REC

    def first(_: Child) -> None:
        assert libc.mount(b"none", b"/", None, private, None) == 0
        assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
        body()

    def outside(child: Child) -> None:
        permitted = libc.unshare(new_mounts_and_pids) == 0
        child.say(str(permitted))
        assert not permitted or Child(first).wait() == 0

    child = fork(outside)
    if child.hear() == "False":
        pytest.skip("a new pid namespace is not permitted here")
    assert child.wait() == 0


def successor_of(dead: Child) -> Child:
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(dead.pid - 1))
    child = Child(idle)
    assert child.pid == dead.pid
    return child


def test_a_pid_that_is_used_again_before_anything_was_borrowed(fork: Fork) -> None:
    """A slot of the dead leads to a living one's userfaultfd, which marks pages of that pid: not kept for both."""

    def body() -> None:
        with pyshare.create(size=2 * CHUNK * PAGE, engine="uffd") as region:
            dead, bystander = Child(idle), Child(idle)
            assert dead.hear() == bystander.hear() == "ok"
            dead.kill()
            dead.wait()
            second = successor_of(dead)
            assert second.hear() == "ok"
            second.stop()
            change(region, 0, 1, READ)
            agreed(region, second.pid, bystander.pid)
            assert len(own_userfaultfds()) == 3, "our own, and of each that lives"
            change(region, 0, 2, READ_WRITE)
            agreed(region, second.pid, bystander.pid)
            for child in (second, bystander):
                child.end()

    in_new_pids(fork, body)


def test_a_pid_that_is_used_again_between_borrowing_and_changing(fork: Fork) -> None:
    """The change does nothing to its successor, which joins with the map that is made."""

    def body() -> None:
        with pyshare.create(size=2 * CHUNK * PAGE, engine="uffd") as region:
            dead = Child(idle)
            assert dead.hear() == "ok"
            caller = Child(ordered(region, (0, 1, READ)), point="R1_claim=stop@2")
            caller.wait_stopped()
            dead.kill()
            dead.wait()
            second = successor_of(dead)
            caller.resume()
            assert caller.hear() == second.hear() == "ok"
            caller.end()
            assert agreed(region, second.pid)[0] == (0, PAGE, READ)
            assert sorted(one.pid for one in region.participants() if one.alive) == [1, second.pid]
            second.end()

    in_new_pids(fork, body)


# -- What may be refused -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unprivileged(fork: Fork, dumpable: bool, caller: Callable[[Child, Region, list[Child]], object]) -> Iterator[None]:
    """caller(child, region, others) in a process of nobody, like those others; root may look anyway."""
    set_dumpable, nobody = 4, 65534

    def body(child: Child) -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
        assert libc.prctl(set_dumpable, int(dumpable), 0, 0, 0) == 0
        region = pyshare.create(size=2 * CHUNK * PAGE, engine="uffd")
        others = [Child(member(region, "uffd") if number else obey(region)) for number in range(2)]
        assert [other.hear() for other in others] == ["ok"] * 2
        try:
            caller(child, region, others)
        finally:
            for other in others:
                other.end()

    child = fork(body)
    yield
    assert child.wait() == 0


def reaches_after_one_change(_: Child, region: Region, others: list[Child]) -> None:
    """Their agents answer when they run for the first change; from then on nobody needs to."""
    change(region, 0, 1, READ)
    for other in others:
        other.stop()
    for prot in (READ_WRITE, READ, READ_WRITE):
        change(region, 0, 1, prot)
    change(region, 1, 1, READ)
    for other in others:
        other.resume()
    # By what they can do: page 0 may be written, page 1 may not.
    assert order(others[0], 2, 1, READ) == region.generation


@pytest.mark.parametrize("dumpable", [True, False], ids=["dumpable", "not dumpable"])
def test_a_process_that_nobody_may_look_into_gives_its_descriptor_by_its_socket(fork: Fork, dumpable: bool) -> None:
    with unprivileged(fork, dumpable, reaches_after_one_change):
        pass


@pytest.mark.parametrize("call", ["pidfd_getfd", "pidfd_open"])
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_caller_that_may_not_take_a_descriptor_asks_for_it(
    region: Region, fork: Fork, joined: Joined, call: str, error: int
) -> None:
    def body(child: Child) -> None:
        refuse(call, error)
        obey(region)(child)

    others = [joined() for _ in range(3)]
    pids = [child.pid for child in others]
    caller = fork(body)
    assert caller.hear() == "ok"
    order(caller, 0, 1, READ)
    agreed(region, caller.pid, *pids)
    for child in others:
        child.stop()
    for first, prot in ((1, READ), (0, READ_WRITE), (1, READ_WRITE), (2, READ)):
        order(caller, first, 1, prot)
        agreed(region, caller.pid, *pids)


def test_who_is_asked_and_does_not_answer_is_late(region: Region, fork: Fork, joined: Joined) -> None:
    def body(child: Child) -> None:
        refuse("pidfd_getfd", errno.EPERM)
        with silent(late):
            change(region, 0, 1, READ, timeout=AT_ONCE)
        obey(region)(child)

    late = joined()
    late.stop()
    caller = fork(body)
    assert caller.hear() == "ok"
    assert mapped(late.pid, region) == [(0, pages_of(region) * PAGE, READ_WRITE)]
    late.resume()
    order(caller, 1, 1, READ)
    order(caller, 2, 1, READ)
    agreed(region, caller.pid, late.pid)


def belongings() -> tuple[int, int, int, int]:
    """Descriptors, threads, mappings of regions, names."""
    with open("/proc/self/maps") as maps:
        mine = sum("pyshare" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mine, len(pyshare.names())


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["userfaultfd", "ioctl"])
def test_where_userfaultfd_is_refused(region: Region, joined: Joined, call: str, error: int) -> None:
    """An explicit engine is refused by the kernel's own errno, and leaves nothing behind; "auto" takes the other."""
    name = f"refused-{os.getpid()}"

    def body(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        refuse(call, error)
        until(lambda: belongings()[1] == 1)  # the closed region's may still be ending, too
        before = belongings()
        attempts: list[Callable[[], object]] = [
            lambda: pyshare.create(name, size=PAGE, engine="uffd"),
            lambda: pyshare.attach(fd, engine="uffd"),
        ]
        for attempt in attempts:
            with pytest.raises(OSError, match=os.strerror(error)) as caught:
                attempt()
            assert caught.value.errno == error
            until(lambda: belongings() == before)  # its thread, which has failed, may still be ending
        own = pyshare.attach(fd)
        assert own.engine == "mprotect"
        child.say()
        child.say(str(own.address))
        obey(own)(child)

    other = Member(joined, region, body)
    assert engines(region) == {os.getpid(): "uffd", other.pid: "mprotect"}
    for prot in (READ, NONE, READ_WRITE, READ | EXEC, READ):
        order(other.child, 0, 2, prot)
        assert other.follows(region)
        change(region, 1, 2, prot)
        assert other.follows(region)


def test_a_child_that_has_no_userfaultfd_takes_part_all_the_same_or_is_detached(fork: Fork) -> None:
    """What fork() joins by is the engine that was asked for."""

    def body(child: Child) -> None:
        with pyshare.create(size=PAGE) as auto, pyshare.create(size=PAGE, engine="uffd") as explicit:
            refuse("userfaultfd", errno.EPERM)

            def forked(grandchild: Child) -> None:
                assert auto.engine == "mprotect"
                auto.mprotect(0, PAGE, READ)
                with pytest.raises(PermissionError):
                    explicit.read(0, 1)
                idle(grandchild)

            grandchild = Child(forked)
            assert grandchild.hear() == "ok"
            assert auto.protection(0) == READ
            assert [one.pid for one in explicit.participants()] == [os.getpid()]
            grandchild.end()
        child.say()

    assert fork(body).hear() == "ok"


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
        kept.extend(pyshare.attach(fd) for _ in range(31))
        idle(child)

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


# -- Agents that are lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closes", [False, True], ids=["", "closerange"])
def test_a_lost_agent_opens_nothing(region: Region, fork: Fork, closes: bool) -> None:
    """Promise 10: its userfaultfd goes with it, but not the marks: the program has a copy, or whoever borrowed it."""

    def body(child: Child) -> None:
        if closes:
            close_all(child)
        obey(region)(child)

    child = fork(body, point="A1_wait=exit@2")
    assert child.hear() == "ok"
    change(region, 0, 2, READ)
    assert mapped(child.pid, region)[0] == (0, 2 * PAGE, READ)
    with silent(child):
        for prot in (NONE, READ) * 2:  # it goes after the first or second that it follows
            change(region, 5, 1, prot, timeout=AT_ONCE)
    until(lambda: len(os.listdir(f"/proc/{child.pid}/task")) == 1)
    assert mapped(child.pid, region)[0] == (0, 2 * PAGE, READ)
    for prot in (READ, READ_WRITE, NONE, READ) if not closes else ():  # else nothing leads to the memory any more
        order(child, 7, 1, prot)
        agreed(region, child.pid)
        change(region, 5, 1, prot)
        agreed(region, child.pid)


def wake(region: Region) -> None:
    """Every agent looks at the generation."""
    futex, wake_all, guard = 202, 1, 64 << 10
    low = ctypes.c_void_p(region.address - guard - word(region, 16, "Q") + GENERATION)
    assert libc.syscall(futex, low, wake_all, 1 << 30, None, None, 0) >= 0


def test_a_lost_agent_that_nothing_can_replace_leaves_no_access(region: Region, fork: Fork) -> None:
    """All descriptors were closed and nobody had borrowed: the marks went too, and the next call closes all."""
    change(region, 0, 1, READ)
    view = region.buf

    def body(child: Child) -> None:
        close_all(child)
        child.say()
        child.hear()
        until(lambda: len(os.listdir("/proc/self/task")) == 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            region.generation  # noqa: B018
        zero = os.open("/dev/zero", os.O_RDONLY)
        for page in range(2):
            with pytest.raises(OSError, match="Bad address"):
                os.readv(zero, [view[page * PAGE : (page + 1) * PAGE]])

    child = fork(body, point="A1_wait=exit@2")
    assert child.hear() == "ok"
    wake(region)
    child.say()
    assert child.wait() == 0
    change(region, 0, 1, READ_WRITE)
    agreed(region)


# -- Violations that somebody survives ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recover") / "recover.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", path, HERE / "recover.c"], check=True)
    return path


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
