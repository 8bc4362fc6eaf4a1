"""Leases: one process alone may write some pages, over whatever the region's protection gives to all.

What a process may do is asked of the kernel (/proc/PID/maps, /proc/PID/smaps) and of the accesses themselves.  Where a
test says that somebody waits, it has seen that in the control segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import (
    CLOSERS,
    LEASES,
    PAGE,
    Mappings,
    agreed,
    co_operative,
    elsewhere,
    held,
    in_background,
    libc,
    mapped,
    slot_is_taken,
    tell,
    word,
)

import pyshare
from pyshare import NONE, READ, READ_WRITE, WRITE, Lease, PropagationTimeout, ProtectionError, Region, ShareError

Fork = Callable[..., Child]
Joined = Callable[..., Child]
Crash = Callable[[Callable[[Child], object]], tuple[int, str]]
ENGINES = ["mprotect", "uffd"]
PAGES = 16
AT_ONCE = 0.05  # a timeout that is meant to run out
SOON = 0.5  # the same, where somebody may answer before it does


@pytest.fixture(params=ENGINES)
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    """READ for everybody; page p begins with p + 1."""
    with pyshare.create(size=PAGES * PAGE, prot=READ, max_participants=16, engine=request.param) as made:
        for page in range(PAGES):
            with made.lease(page * PAGE, PAGE) as lease:
                lease.view[0] = page + 1
        yield made


windows = pytest.mark.parametrize("window", [False, True], ids=["in place", "window"])


def take(region: Region, first: int, pages: int = 1, **options: Any) -> Lease:
    return region.lease(first * PAGE, pages * PAGE, **options)


def holder(region: Region, first: int, pages: int = 1, **options: Any) -> Callable[[Child], None]:
    """A body that takes the lease, and releases it when it is told."""

    def body(child: Child) -> None:
        with take(region, first, pages, **options):
            idle(child)
        idle(child)

    return body


def free(region: Region, first: int = 0, pages: int = PAGES) -> None:
    """Nobody holds them: they are to be had at once."""
    with take(region, first, pages, timeout=0):
        pass


def reserved(region: Region, page: int) -> None:
    until(lambda: held(region, LEASES, page)[1])


def closing(region: Region) -> None:
    """A change has said which pages it is after."""
    until(lambda: word(region, CLOSERS, "Q"))


def blocked(pids: list[int]) -> Any:
    """The call inside times out because of these."""
    return pytest.raises(PropagationTimeout, check=lambda error: error.pids == pids and error.generation is None)


# -- What a lease gives ------------------------------------------------------------------------------------------------


@windows
def test_the_pages_are_writable_here_alone_until_the_end(region: Region, joined: Joined, window: bool) -> None:
    other = joined()
    with take(region, 3, 2, window=window) as lease:
        assert isinstance(lease, Lease)
        assert lease.held
        assert not lease.abandoned
        assert repr(lease) == "<pyshare.Lease offset 12288, 8192 bytes, held>"
        lease.view[1:6] = b"first"
        lease.view[2 * PAGE - 4 :] = b"last"
        here = [(0, PAGES * PAGE, READ)]
        if not window:
            here = [(0, 3 * PAGE, READ), (3 * PAGE, 2 * PAGE, READ_WRITE), (5 * PAGE, 11 * PAGE, READ)]
        assert mapped(os.getpid(), region) == here
        assert mapped(other.pid, region) == [(0, PAGES * PAGE, READ)]
        assert region.generation == 0
    assert not lease.held
    assert repr(lease) == "<pyshare.Lease offset 12288, 8192 bytes, ended>"
    agreed(region, other.pid)
    assert region.read(3 * PAGE, 6) == b"\x04first"
    assert region.read(5 * PAGE - 4, 5) == b"last\x06"
    lease.release()
    free(region)


@windows
def test_the_view_ends_with_the_lease(region: Region, window: bool) -> None:
    lease = take(region, 2, window=window)
    view = lease.view
    assert view is lease.view
    assert (view.nbytes, view.readonly, view[0]) == (PAGE, False, 3)
    part = view[5:]
    lease.release()
    with pytest.raises(ValueError, match="released memoryview"):
        view[0]
    with pytest.raises(ValueError, match="the lease has ended"):
        lease.view  # noqa: B018
    with pytest.raises(ValueError, match="the lease has ended"):
        memoryview(lease)
    assert part[0] == 0, "what was made from it shows the page"


def test_a_range_may_end_at_the_size() -> None:
    with pyshare.create(size=2 * PAGE + 100, prot=READ) as region:
        with region.lease(PAGE, PAGE + 100) as lease:
            assert lease.view.nbytes == PAGE + 100
            lease.view[-1] = 7
        assert region.read(2 * PAGE + 99, 1) == b"\x07"


@pytest.mark.parametrize(
    ("offset", "length", "says"),
    [
        (1, PAGE, "offset must be a multiple"),
        (0, 0, "length must be more than 0"),
        (0, PAGE + 1, "ends at a multiple"),
        (0, (PAGES + 1) * PAGE, "ends behind"),
        (-PAGE, PAGE, "offset must be a multiple"),
        (1 << 80, PAGE, "ends behind"),
    ],
)
def test_ranges_are_those_of_mprotect(region: Region, offset: int, length: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        region.lease(offset, length)
    free(region)


def test_leases_are_made_by_their_region_only() -> None:
    with pytest.raises(TypeError, match=r"region\.lease"):
        Lease()


@windows
@pytest.mark.parametrize("offset", [0, 3 * PAGE - 4, 4 * PAGE - 4, 3 * PAGE], ids=["before", "into", "out of", "in"])
def test_write_goes_by_the_own_lease(region: Region, window: bool, offset: int) -> None:
    region.mprotect(4 * PAGE, PAGE, READ_WRITE)
    with take(region, 3, window=window):
        allowed = offset >= 3 * PAGE
        with contextlib.nullcontext() if allowed else pytest.raises(ProtectionError) as caught:
            region.write(offset, b"12345678")
        if not allowed:
            assert caught.value.offset == offset // PAGE * PAGE
        assert (region.read(offset, 8) == b"12345678") == allowed
        with pytest.raises(ProtectionError):
            region.write(3 * PAGE, bytes(3 * PAGE))
    with pytest.raises(ProtectionError):
        region.write(3 * PAGE, b"1")


@windows
def test_a_write_of_several_leases_and_other_pages(region: Region, window: bool) -> None:
    data = random.Random(1).randbytes(8 * PAGE)
    region.mprotect(0, 8 * PAGE, READ_WRITE)
    region.mprotect(2 * PAGE, 4 * PAGE, READ)
    with take(region, 2, 1, window=True), take(region, 3, 2, window=window), take(region, 5, 1, window=not window):
        region.write(0, data)
    assert region.read(0, 8 * PAGE) == data


@pytest.mark.parametrize("prot", [READ_WRITE, WRITE])
@windows
def test_over_writable_pages_it_keeps_leases_away_and_no_stores(
    region: Region, joined: Joined, prot: pyshare.Prot, window: bool
) -> None:
    region.mprotect(0, PAGE, prot)

    def store(child: Child) -> None:
        region.buf[9] = 9
        idle(child)

    with take(region, 0, window=window) as lease:
        child = joined(store)
        assert lease.view[9] == 9
        lease.view[10] = 10
        agreed(region, child.pid)
    assert region.read(9, 2) == b"\x09\x0a"
    agreed(region, child.pid)


@pytest.mark.parametrize("prot", [NONE, pyshare.EXEC, READ | pyshare.EXEC])
@windows
def test_over_pages_that_may_not_be_read_it_is_refused(region: Region, prot: int, window: bool) -> None:
    region.mprotect(5 * PAGE, PAGE, prot)
    with pytest.raises(ProtectionError, match=r"lease: page 5 .* since change 1 by pid .*; READ is needed") as caught:
        take(region, 3, 4, window=window)
    assert (caught.value.offset, caught.value.actual, caught.value.required) == (5 * PAGE, prot, READ)
    free(region, 0, 5)
    free(region, 6, 10)
    agreed(region)


def test_the_end_restores_the_map_of_that_moment(region: Region, joined: Joined) -> None:
    """Of pages that others changed beside it meanwhile, and of those that were writable already."""
    region.mprotect(2 * PAGE, PAGE, READ_WRITE)
    other = joined()
    with take(region, 1, 3) as lease:
        region.mprotect(4 * PAGE, 4 * PAGE, NONE)
        region.mprotect(0, PAGE, READ_WRITE)
        lease.view[0] = lease.view[PAGE] = lease.view[2 * PAGE] = 77
        assert mapped(os.getpid(), region)[:2] == [(0, 4 * PAGE, READ_WRITE), (4 * PAGE, 4 * PAGE, NONE)]
    assert agreed(region, other.pid)[:3] == [(0, PAGE, READ_WRITE), (PAGE, PAGE, READ), (2 * PAGE, PAGE, READ_WRITE)]


def test_it_outlasts_changes_of_everything_around_it(region: Region, joined: Joined) -> None:
    """The agent follows the whole map when it has fallen far behind, and leaves leased pages writable."""
    with take(region, 3) as lease:

        def change(child: Child) -> None:
            child.say()
            child.hear()
            for turn in range(1100):
                with contextlib.suppress(PropagationTimeout):
                    region.mprotect(8 * PAGE, PAGE, [READ, NONE][turn % 2], timeout=0.0)
            idle(child)

        child = joined(change)
        holding = joined(holder(region, 5))
        holding.stop()
        child.say()
        assert child.hear() == "ok"
        holding.resume()
        region.mprotect(0, PAGE, READ_WRITE)
        lease.view[3] = 3
        protection = {PAGE * 3: READ_WRITE, PAGE * 5: READ}
        assert {at: p for at, _, p in mapped(os.getpid(), region) if at in protection}[3 * PAGE] == READ_WRITE
        assert (5 * PAGE, PAGE, READ_WRITE) in mapped(holding.pid, region)


# -- One at a time -----------------------------------------------------------------------------------------------------


@windows
def test_a_timeout_names_all_holders(region: Region, joined: Joined, window: bool) -> None:
    children = [joined(holder(region, page, window=window)) for page in (3, 5)]
    pids = sorted(child.pid for child in children)
    for timeout in (0, AT_ONCE):
        with blocked(pids):
            take(region, 2, 4, timeout=timeout)
    free(region, 0, 3)
    free(region, 4, 1)
    for child in children:
        child.say()
        assert child.hear() == "ok"
    free(region)


@windows
def test_threads_exclude_each_other(region: Region, window: bool) -> None:
    inside = [0]

    def work() -> None:
        for _ in range(100):
            with take(region, 1, 2, timeout=PATIENCE, window=window) as lease:
                inside[0] += 1
                assert inside[0] == 1
                before = int.from_bytes(lease.view[8:16], "little")
                os.sched_yield()
                lease.view[8:16] = (before + 1).to_bytes(8, "little")
                inside[0] -= 1

    with in_background(*[work] * 4) as outcomes:
        pass
    assert outcomes == [None] * 4
    assert int.from_bytes(region.read(PAGE + 8, 8), "little") == 400


PAIR = struct.Struct("QQQ")  # who is inside; two counters that only a holder may find different


def fill(lease: Lease, pages: int) -> None:
    """Fails where somebody else is inside, alive; each page has a record of its own."""
    for page in range(pages):
        at = page * PAGE + 64
        inside, first, second = PAIR.unpack_from(lease.view, at)
        assert lease.abandoned or (inside == 0 and first == second)
        PAIR.pack_into(lease.view, at, os.getpid(), first + 1, first)
    for page in range(pages):
        at = page * PAGE + 64
        inside, first, _ = PAIR.unpack_from(lease.view, at)
        assert inside == os.getpid()
        PAIR.pack_into(lease.view, at, 0, first, first)


@windows
def test_processes_exclude_each_other_while_holders_are_killed(region: Region, joined: Joined, window: bool) -> None:
    """Ranges that overlap, in any order; each page is repaired by the next one who holds it."""

    def work(child: Child) -> None:
        rng = random.Random(os.getpid())
        child.say()
        while True:
            first, pages = rng.randrange(6), rng.randrange(1, 4)
            with take(region, first, pages, timeout=PATIENCE, window=window) as lease:
                fill(lease, pages)
                if lease.abandoned:
                    with take(region, 15, timeout=PATIENCE, window=window) as seen:
                        seen.view[100] = 1

    def inside(page: int) -> int:
        return int(PAIR.unpack_from(region.buf, page * PAGE + 64)[0])

    def turns() -> int:
        return sum(PAIR.unpack_from(region.buf, page * PAGE + 64)[1] for page in range(8))

    children = {child.pid: child for child in (joined(work) for _ in range(3))}
    for round_ in range(20):
        before = turns()
        until(lambda before=before: turns() > before + 20 and any(inside(page) in children for page in range(8)))
        holders = [pid for pid in map(inside, range(8)) if pid in children]
        victim = children.pop(next(iter([*holders, *children])))
        victim.kill()
        assert victim.wait() == -signal.SIGKILL, f"round {round_}"
        children.update({(new := joined(work)).pid: new})
    until(lambda: region.buf[15 * PAGE + 100])
    for child in children.values():
        child.kill()
        assert child.wait() == -signal.SIGKILL, "it found somebody inside"
    with take(region, 0, PAGES, timeout=PATIENCE) as lease:
        lease.view[0] = 1
    agreed(region)


def test_a_holder_in_another_pid_namespace(region: Region, fork: Fork) -> None:
    there, pid = elsewhere(fork, holder(region, 1))
    assert there.hear() == "ok"
    with pytest.raises(PropagationTimeout):
        take(region, 0, 2, timeout=AT_ONCE)
    with in_background(lambda: take(region, 0, 2, timeout=PATIENCE)) as outcomes:
        reserved(region, 1)
        os.kill(pid, signal.SIGKILL)
    with outcomes.pop() as lease:
        assert lease.abandoned


def test_ranges_in_opposite_order(region: Region, joined: Joined) -> None:
    def work(parts: list[tuple[int, int]]) -> Callable[[Child], None]:
        def body(child: Child) -> None:
            child.say()
            for turn in range(200):
                with take(region, *parts[turn % 2], timeout=PATIENCE):
                    pass
            child.say()

        return body

    children = [joined(work(parts)) for parts in ([(0, 4), (2, 4)], [(2, 4), (0, 4)], [(3, 1), (0, 6)])]
    for child in children:
        assert child.hear() == "ok"


@windows
def test_a_second_one_in_the_same_thread_is_an_error(region: Region, joined: Joined, window: bool) -> None:
    other = joined(holder(region, 2))
    with take(region, 3, 2, window=window):
        for first, pages in ((3, 1), (4, 3), (0, PAGES)):
            with pytest.raises(ShareError, match="this thread holds a lease on some of these pages") as caught:
                take(region, first, pages, timeout=None)  # also where somebody else holds an earlier page
            assert type(caught.value) is ShareError
        with take(region, 5, window=not window), take(region, 1):
            pass
    other.say()
    assert other.hear() == "ok"
    free(region)


def test_who_waits_comes_before_the_one_who_releases(region: Region) -> None:
    turns: list[int] = []

    def wait() -> None:
        with take(region, 4, timeout=PATIENCE):
            turns.append(1)

    for turn in range(1, 6):
        lease = take(region, 4)
        with in_background(wait) as outcomes:
            reserved(region, 4)
            lease.release()
            with take(region, 3, 2, timeout=PATIENCE):
                assert len(turns) == turn
        assert outcomes == [None]


def test_nobody_starves_beside_the_greedy(region: Region, joined: Joined) -> None:
    """Not a lease beside leases, nor a change beside leases, nor a lease beside changes."""

    def greedy(act: Callable[[], object]) -> Callable[[Child], None]:
        def body(child: Child) -> None:
            child.say()
            while not region.buf[PAGES * PAGE - 1]:
                act()

        return body

    def lease() -> None:
        with take(region, 0, 3, timeout=PATIENCE) as mine:
            mine.view[1] += 1 if mine.view[1] < 255 else -255

    children = [joined(greedy(act)) for act in (lease, lease, lambda: region.mprotect(2 * PAGE, PAGE, READ))]
    for _ in range(10):
        with take(region, 1, 2, timeout=PATIENCE):
            pass
        region.mprotect(0, PAGE, READ, timeout=PATIENCE)
    with take(region, PAGES - 1) as last:
        last.view[-1] = 1
    assert [child.wait() for child in children] == [0] * 3


@pytest.mark.parametrize("kind", ["lease", "change"])
def test_ctrl_c_ends_the_wait_and_nothing_is_held(region: Region, joined: Joined, kind: str) -> None:
    def wait(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child.say()
        with pytest.raises(KeyboardInterrupt):
            take(region, 0, 4, timeout=None) if kind == "lease" else region.mprotect(0, 4 * PAGE, NONE, timeout=None)
        idle(child)

    with take(region, 2):
        child = joined(wait)
        reserved(region, 2) if kind == "lease" else closing(region)
        child.kill(signal.SIGINT)
        assert child.hear() == "ok"
        free(region, 0, 2)
        region.mprotect(0, PAGE, READ)
    assert region.generation == 1
    free(region)


def test_a_handler_that_returns_does_not_end_the_wait(region: Region, joined: Joined) -> None:
    def wait(child: Child) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: child.say("handled"))
        child.say()
        with take(region, 0, 4, timeout=None):
            idle(child)

    with take(region, 2):
        child = joined(wait)
        for _ in range(10):
            reserved(region, 2)
            child.kill(signal.SIGUSR1)
            assert child.hear() == "handled"
    assert child.hear() == "ok"


# -- Leases and changes ------------------------------------------------------------------------------------------------


@windows
def test_a_change_waits_for_the_lease_and_holds_nobody_up(region: Region, joined: Joined, window: bool) -> None:
    holding = joined(holder(region, 3, window=window))
    with in_background(lambda: region.mprotect(2 * PAGE, 4 * PAGE, NONE, timeout=None)) as outcomes:
        closing(region)
        assert region.mprotect(8 * PAGE, PAGE, NONE, timeout=PATIENCE) == 1, "another change"
        with pyshare.attach(region.fileno()) as another:
            assert len(another.participants()) == 3, "a join"
        joined()  # a fork
        with take(region, 10, timeout=PATIENCE):
            pass  # another lease
        with blocked([os.getpid()]):
            take(region, 4, timeout=AT_ONCE)  # of its own pages: not any more
        assert outcomes == []
        assert region.protection(2 * PAGE) == READ
        holding.say()
        assert holding.hear() == "ok"
    assert outcomes == [2]
    assert region.protection(3 * PAGE) == NONE
    agreed(region, holding.pid)
    assert word(region, CLOSERS, "Q") == 0
    free(region, 10, 6)


def test_a_change_by_whom_a_lease_waits_for(region: Region, fork: Fork) -> None:
    """It holds page 1, and changes page 0, which is reserved for the other already."""

    def body(child: Child) -> None:
        with region.lease(0, 2 * PAGE, timeout=None):
            child.say()

    with take(region, 1):
        waiting = fork(body)
        reserved(region, 0)
        assert region.mprotect(0, PAGE, READ_WRITE, timeout=PATIENCE) == 1
    assert waiting.hear() == "ok"
    assert waiting.wait() == 0


def test_a_change_that_times_out_has_changed_nothing(region: Region, joined: Joined) -> None:
    children = [joined(holder(region, page)) for page in (1, 5)]
    for timeout in (0, AT_ONCE):
        with blocked(sorted(child.pid for child in children)):
            region.mprotect(0, PAGES * PAGE, NONE, timeout=timeout)
    assert region.generation == 0
    for child in children:
        child.say()
        assert child.hear() == "ok"
    free(region)
    agreed(region, *[child.pid for child in children])


@windows
def test_a_change_of_the_own_lease_is_an_error(region: Region, joined: Joined, window: bool) -> None:
    joined(holder(region, 2))
    with take(region, 3, window=window):
        with pytest.raises(ShareError, match="mprotect: this thread holds a lease on some of these pages"):
            region.mprotect(0, PAGES * PAGE, READ_WRITE, timeout=None)  # though somebody else holds an earlier page
        assert region.mprotect(4 * PAGE, PAGE, READ_WRITE) == 1


def test_a_change_waits_for_another_thread(region: Region) -> None:
    with in_background(lambda: take(region, 3)) as outcomes:
        pass
    lease = outcomes.pop()
    with blocked([os.getpid()]):
        region.mprotect(0, PAGES * PAGE, READ_WRITE, timeout=AT_ONCE)
    with in_background(lambda: region.mprotect(0, PAGES * PAGE, READ_WRITE, timeout=PATIENCE)) as outcomes:
        closing(region)
        lease.release()
    assert outcomes == [1]


@pytest.mark.parametrize("stops", [False, True], ids=["running", "stopped"])
def test_a_change_goes_on_when_the_holder_is_killed(region: Region, joined: Joined, stops: bool) -> None:
    holding = joined(holder(region, 3))
    if stops:
        holding.stop()
    with in_background(lambda: region.mprotect(0, PAGES * PAGE, READ_WRITE, timeout=PATIENCE)) as outcomes:
        closing(region)
        holding.kill()
    assert outcomes == [1]
    with take(region, 3) as lease:
        assert lease.abandoned, "the change was no repair"


def test_more_changes_than_closers_wait(region: Region) -> None:
    with in_background(lambda: take(region, 3)) as outcomes:
        pass
    lease = outcomes.pop()
    calls = [lambda: region.mprotect(2 * PAGE, 2 * PAGE, READ_WRITE, timeout=PATIENCE)] * 70
    with in_background(*calls) as outcomes:
        until(lambda: word(region, CLOSERS, "Q") == (1 << 64) - 1)
        with pytest.raises(PropagationTimeout):
            region.mprotect(8 * PAGE, PAGE, NONE, timeout=AT_ONCE)
        lease.release()
    assert sorted(outcomes, key=repr) == sorted(range(1, 71), key=repr)
    assert word(region, CLOSERS, "Q") == 0


@pytest.mark.parametrize("point", ["K1_close", "K2_wait", "K3_clear", "C2_save", "C3_attempt", "C4_map", "C7_complete"])
@pytest.mark.parametrize("then", ["lease", "change"])
def test_a_caller_that_dies_with_its_pages_closed(region: Region, joined: Joined, point: str, then: str) -> None:
    """Whoever is first to want the pages finds the change finished, or not begun."""
    holding = joined(holder(region, 3)) if point == "K2_wait" else None

    def change(child: Child) -> None:
        child.say()
        region.mprotect(2 * PAGE, 3 * PAGE, NONE)

    other = joined()
    victim = joined(change, point=f"{point}=kill")
    assert victim.wait() == -signal.SIGKILL
    if holding:
        holding.say()
        assert holding.hear() == "ok"
    if then == "change":
        region.mprotect(2 * PAGE, PAGE, READ)
        assert region.protection(2 * PAGE) == READ
    done = point in ("K3_clear", "C3_attempt", "C4_map", "C7_complete")
    with pytest.raises(ProtectionError) if done else contextlib.nullcontext():
        take(region, 1, 4, timeout=PATIENCE).release()
    assert region.protection(3 * PAGE) == (NONE if done else READ)
    free(region, 0, 2)
    agreed(region, other.pid)


def test_dead_closers_do_not_fill_the_table(region: Region, joined: Joined) -> None:
    def change(child: Child) -> None:
        child.say()
        region.mprotect(0, PAGE, NONE)

    for page in range(66):
        victim = joined(change, point="K1_close=kill")
        assert victim.wait() == -signal.SIGKILL, page
    assert region.mprotect(0, PAGE, READ_WRITE, timeout=PATIENCE) == 1
    free(region)


# -- Death -------------------------------------------------------------------------------------------------------------

# Where a holder of two pages stops: which of them it has then.
STEPS = {
    "H1_take": [True, False],
    "H1_take@2": [True, True],
    "H2_open": [True, True],
    "H3_close": [True, True],
    "H4_release": [False, True],
    "H4_release@2": [False, False],
}


@pytest.mark.parametrize("point", STEPS)
@pytest.mark.parametrize("waiting", [False, True], ids=["later", "waiting"])
def test_killed_at_a_step(region: Region, fork: Fork, joined: Joined, point: str, waiting: bool) -> None:
    def body(child: Child) -> None:
        child.hear()
        with take(region, 0, 2) as lease:
            lease.view[9] = 9

    def look(page: int) -> Callable[[], bool]:
        def call() -> bool:
            with take(region, page, timeout=PATIENCE) as lease:
                return lease.abandoned

        return call

    other = joined()
    label, _, turn = point.partition("@")
    victim = fork(body, point=f"{label}=stop@{turn or 1}")
    victim.say()
    victim.wait_stopped()
    with in_background(*[look(page) for page in range(2 * waiting)]) as outcomes:
        for page in range(2):
            if waiting and STEPS[point][page]:
                reserved(region, page)
        victim.kill()
    assert victim.wait() == -signal.SIGKILL
    found = outcomes if waiting else [look(page)() for page in range(2)]
    assert sorted(map(bool, found)) == sorted(STEPS[point]) if waiting else found == STEPS[point]
    agreed(region, other.pid)
    free(region)


def test_what_the_dead_left_is_told_to_whoever_gets_the_pages(region: Region, joined: Joined) -> None:
    """Not to one who had a part of them, and gave up."""
    victim, stays = joined(holder(region, 1)), joined(holder(region, 3))
    victim.kill()
    victim.wait()
    for _ in range(2):
        with blocked([stays.pid]):
            take(region, 0, 4, timeout=AT_ONCE)
    region.mprotect(2 * PAGE, PAGE, NONE)
    with pytest.raises(ProtectionError):
        take(region, 1, 2)
    with take(region, 0) as lease:
        assert not lease.abandoned
    with take(region, 0, 2) as lease:
        assert lease.abandoned
    with take(region, 1) as lease:
        assert not lease.abandoned, "it is told once"


def test_a_child_holds_nothing_of_its_parent(region: Region, joined: Joined, crash: Crash) -> None:
    lease = take(region, 3)
    view = lease.view

    def look(child: Child) -> None:
        assert not lease.held
        lease.release()
        with pytest.raises(ValueError, match="ended"):
            lease.view  # noqa: B018
        with blocked([os.getppid()]):
            take(region, 3, timeout=AT_ONCE)
        with take(region, 4):
            pass
        assert agreed(region) == [(0, PAGES * PAGE, READ)]
        idle(child)

    def store(_: Child) -> None:
        view[0] = 1

    joined(look)
    code, said = crash(store)
    assert code == -signal.SIGSEGV
    assert "forbidden store to an unnamed region at offset 12288: page 3 is READ" in said
    assert "lease" not in said.splitlines()[0]
    view[0] = 1
    lease.release()
    assert region.read(3 * PAGE, 1) == b"\x01"


@windows
def test_a_child_that_is_forked_by_another_thread_meanwhile(region: Region, joined: Joined, window: bool) -> None:
    stop = threading.Event()

    def work() -> int:
        turns = 0
        while not stop.is_set():
            with take(region, 3, 2, timeout=PATIENCE, window=window) as lease:
                lease.view[9] = turns % 256
                turns += 1
        return turns

    def body(child: Child) -> None:
        agreed(region)
        with take(region, 3, 2, timeout=PATIENCE, window=window) as lease:
            assert not lease.abandoned
        child.say()

    with in_background(work) as outcomes:
        for _ in range(10):
            joined(body).wait()
        stop.set()
    assert outcomes[0]


def test_a_dropped_one_is_released_with_a_warning(region: Region) -> None:
    for _ in range(20):  # objects are used again
        with pytest.warns(ResourceWarning, match="a lease of 8192 bytes at offset 12288 was dropped while held"):
            take(region, 3, 2)
        agreed(region)
        free(region, 3, 2)


@windows
def test_a_region_is_not_closed_while_one_is_held(region: Region, window: bool) -> None:
    with take(region, 3, window=window):
        with pytest.raises(BufferError, match="a lease or a lock is held"):
            region.close()
        assert not region.closed
    with take(region, 3, window=window) as lease:
        array = np.frombuffer(lease.view, np.uint8)
    with pytest.raises(BufferError):
        region.close()
    del array
    region.close()
    with pytest.raises(pyshare.RegionClosed):
        region.lease(0, PAGE)


# -- Where page tables cannot follow -----------------------------------------------------------------------------------


@co_operative
def test_at_the_limit_of_mappings_nothing_is_held(region: Region, joined: Joined) -> None:
    def body(child: Child) -> None:
        with take(region, 9, window=True):
            pass
        mappings = Mappings()
        mappings.fill()
        with pytest.raises(OSError, match="lease: Cannot allocate memory") as caught:
            take(region, 3)
        assert caught.value.errno == errno.ENOMEM
        with take(region, 3, window=True):
            pass  # it takes no mapping
        mappings.free(1)
        free(region, 0, 1)
        free(region)
        child.say()

    assert joined(body).wait() == 0


# -- A store after the end ---------------------------------------------------------------------------------------------

ENDED = r"page 3 is READ since it was created .*; this process's lease on the page ended \d+ (ms|s) ago$"


def by_slice(lease: Lease) -> Callable[[], object]:
    part = lease.view[5:9]
    return lambda: struct.pack_into("I", part, 0, 1)


def by_array(lease: Lease) -> Callable[[], object]:
    array = np.asarray(lease.view)
    return lambda: array.fill(1)


def by_ctypes(lease: Lease) -> Callable[[], object]:
    place = ctypes.c_char.from_buffer(lease.view)
    return lambda: setattr(place, "value", b"x")


def by_buffer(lease: Lease) -> Callable[[], object]:
    view = memoryview(lease)
    return lambda: view.__setitem__(0, 1)


@pytest.mark.parametrize("made", [by_slice, by_array, by_ctypes, by_buffer])
def test_what_is_left_over_is_caught_and_the_line_says_when_it_ended(
    region: Region, crash: Crash, made: Callable[[Lease], Callable[[], object]]
) -> None:
    def body(_: Child) -> None:
        with take(region, 3) as lease:
            store = made(lease)
            store()
        store()

    code, said = crash(body)
    assert code == -signal.SIGSEGV
    assert re.search(ENDED, said.splitlines()[0]), said


def test_the_line_of_a_page_that_was_never_leased_says_nothing(region: Region, crash: Crash) -> None:
    def body(_: Child) -> None:
        with take(region, 3):
            region.buf[4 * PAGE] = 1

    code, said = crash(body)
    assert code == -signal.SIGSEGV
    assert "lease" not in said.splitlines()[0]


# -- By window ---------------------------------------------------------------------------------------------------------


def test_by_window_a_stray_store_to_the_region_is_caught(region: Region, crash: Crash) -> None:
    def body(_: Child) -> None:
        with take(region, 3, window=True) as lease:
            lease.view[0] = 1
            region.buf[3 * PAGE] = 2

    code, said = crash(body)
    assert code == -signal.SIGSEGV
    assert "page 3 is READ" in said.splitlines()[0]
    assert said.splitlines()[0].endswith("; this process's lease on it is by window, at another address")
    assert region.read(3 * PAGE, 1) == b"\x01"


def test_by_window_an_overrun_and_what_is_left_over_are_not_caught(region: Region) -> None:
    """The price, which the docstring names."""
    with take(region, 3, window=True) as lease:
        array = np.frombuffer(lease.view, np.uint8)
        ctypes.memset(array.ctypes.data + PAGE, 99, 1)
    array[0] = 98
    assert region.read(3 * PAGE, 1) + region.read(4 * PAGE, 1) == b"bc"
    assert pyshare.Region.lease.__doc__
    for price in ("runs past the leased pages is not caught", "left over"):
        assert price in " ".join(pyshare.Region.lease.__doc__.split())


def window_of(region: Region) -> int:
    """The second mapping's address."""
    with take(region, 0, window=True) as lease:
        return int(np.frombuffer(lease.view, np.uint8).ctypes.data)


def flags_at(address: int) -> tuple[str, list[str]]:
    """Protection, and the kernel's flags, of the mapping at an address."""
    smaps = Path("/proc/self/smaps").read_text()
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        low, high, bits = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", part).groups()  # type: ignore[union-attr]
        if int(low, 16) <= address < int(high, 16):
            return bits, re.search(r"VmFlags: (.*)", part)[1].split()  # type: ignore[index]
    return "", []


def test_the_window_is_made_once_and_goes_with_the_region(region: Region) -> None:
    plain = flags_at(region.address + (PAGES + 16) * PAGE)
    assert plain[0] == "---p", "reserved, until somebody asks"
    window = window_of(region)
    assert window == window_of(region)
    for page in (0, PAGES - 1):
        bits, flags = flags_at(window + page * PAGE)
        assert bits == "rw-s"
        assert {"dc", "dd"} <= set(flags), "not for children, nor for core files"
    for beside in (window - 1, window + PAGES * PAGE):
        assert flags_at(beside)[0] == "---p"
    region.close()
    assert flags_at(window)[0] == "---p", "reserved until the object goes"


def test_a_child_has_no_window_and_nothing_else_comes_there(region: Region, crash: Crash) -> None:
    window = window_of(region)

    def body(_: Child) -> None:
        assert flags_at(window)[0] == "---p"
        ctypes.memset(window + 5, 1, 1)

    code, said = crash(body)
    assert code == -signal.SIGSEGV
    assert said.startswith(
        "pyshare: access by a lease's window, which this process has not open, to an unnamed region at offset 5"
    )
    with take(region, 3, window=True) as lease:
        lease.view[0] = 5
    assert window_of(region) == window


@co_operative
def test_a_slot_is_taken_as_long_as_a_window_is_mapped(region: Region, joined: Joined) -> None:
    """It is free only when no thread can reach the memory any more, whatever else is gone."""

    def unmap(window: int, *, itself: bool) -> None:
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(address, 16) for address in line.split()[0].split("-"))
            if "memfd:pyshare" in line and (low == window) == itself:
                libc.munmap(ctypes.c_void_p(low), ctypes.c_size_t(high - low))

    def body(child: Child) -> None:
        window = window_of(region)
        idle(child)  # meanwhile the agent ends, and its descriptors go
        for itself in (False, True):
            unmap(window, itself=itself)
            idle(child)
        os._exit(0)

    child = joined(body, point="A1_wait=exit@2")
    tid = next(one.tid for one in region.participants() if one.pid == child.pid)
    for prot in (NONE, READ):  # these it follows itself; the second, if it has not ended before
        with contextlib.suppress(PropagationTimeout):
            region.mprotect(0, PAGE, prot, timeout=SOON)
    until(lambda: not Path(f"/proc/{child.pid}/task/{tid}").exists())
    for taken in (True, False):
        assert slot_is_taken(region, 1)
        tell(child, "go on")
        assert slot_is_taken(region, 1) == taken
    child.say()
    assert child.wait() == 0
