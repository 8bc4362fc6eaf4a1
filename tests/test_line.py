"""Places in line: who waits for a lock or a lease comes before who comes later; who does not come, does not."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import CLOSERS, LEASES, LOCKS, PAGE, TICKETS, held, in_background, sleeping, word

import pyshare
from pyshare import READ_WRITE, Lease, Lock, PropagationTimeout, Region

Joined = Callable[..., Child]
PAGES = 16
X = 5  # a page, or a lock
AT_ONCE = 0.05  # a timeout that is meant to run out, below the time for which a place is kept


@pytest.fixture
def region() -> Iterator[Region]:
    """Changes of it reach who is stopped."""
    with pyshare.create(size=PAGES * PAGE, engine="uffd", max_participants=16) as made:
        yield made


def take(region: Region, kind: int, timeout: float | None) -> Lease | Lock:
    return region.lock(X, timeout=timeout) if kind == LOCKS else region.lease(X * PAGE, PAGE, timeout=timeout)


def changing(region: Region, *, pages: int = 1) -> Callable[[Child], None]:
    """A body that changes pages from X on when it is told."""

    def body(child: Child) -> None:
        child.say()
        child.hear()
        region.mprotect(X * PAGE, pages * PAGE, READ_WRITE)
        child.say("changed")

    return body


# -- Who does not come -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LOCKS, LEASES], ids=["lock", "lease"])
def test_a_stopped_waiter_loses_its_place(region: Region, joined: Joined, kind: int) -> None:
    """Nobody says of it that it held anything; and when it goes on it waits as any other."""

    def body(child: Child) -> None:
        child.say()
        with take(region, kind, None):
            idle(child)

    with take(region, kind, 0):
        waiter = joined(body)
        until(lambda: held(region, kind, X)[1])
        waiter.stop()
    for timeout in (0, AT_ONCE):
        with pytest.raises(PropagationTimeout, match="nobody held it, but others were before us") as caught:
            take(region, kind, timeout)
        assert caught.value.pids == []
    with take(region, kind, PATIENCE):
        waiter.resume()
        until(lambda: held(region, kind, X)[1])
    assert waiter.hear() == "ok"


def test_a_stopped_waiter_of_many_pages_is_in_nobodys_way(region: Region, joined: Joined) -> None:
    """Those before the page that it waits for are reserved for it, and lost together."""

    def body(child: Child) -> None:
        child.say()
        with region.lease(0, PAGES * PAGE, timeout=None):
            child.say("all")

    last = region.lease((PAGES - 1) * PAGE, PAGE)
    waiter = joined(body)
    until(lambda: held(region, LEASES, PAGES - 1)[1])
    assert not any(held(region, LEASES, page)[0] for page in range(PAGES - 1))
    waiter.stop()
    region.mprotect(0, PAGE, READ_WRITE, timeout=0)  # nobody has a lease of it
    with region.lease(0, (PAGES - 1) * PAGE, timeout=1):  # not so long for each of them
        waiter.resume()
    last.release()
    assert waiter.hear() == "all"


def test_two_dead_holders_are_taken_over_together(region: Region, joined: Joined) -> None:
    def body(page: int) -> Callable[[Child], None]:
        def hold(child: Child) -> None:
            with region.lease(page * PAGE, PAGE):
                idle(child)

        return hold

    for child in [joined(body(page)) for page in (1, 3, 5)]:
        child.kill()
        child.wait()
    with region.lease(0, 8 * PAGE, timeout=PATIENCE) as lease:
        assert lease.abandoned


def test_takers_of_many_pages_do_not_wait_in_a_circle(region: Region, joined: Joined) -> None:
    """One has a page and wants another, which the other one had on its way to the first."""

    def body(child: Child) -> None:
        child.say()
        with region.lease(0, 2 * PAGE, timeout=PATIENCE):
            child.say("both")

    with region.lease(PAGE, PAGE):
        other = joined(body)
        until(lambda: held(region, LEASES, 1)[1])
        region.lease(0, PAGE, timeout=PATIENCE).release()
    assert other.hear() == "both"


# -- Who gave way to a change ------------------------------------------------------------------------------------------


def had_after(region: Region, pages: int) -> int:
    """How many changes were made while somebody waited for a lease."""
    before = region.generation
    until(lambda: region.generation != before)  # they are under way
    before = region.generation
    with region.lease(X * PAGE, pages * PAGE, timeout=PATIENCE):
        return region.generation - before


ENDLESS: dict[str, Callable[[Region], object]] = {
    "changes": lambda region: region.mprotect(X * PAGE, PAGE, READ_WRITE, timeout=PATIENCE),
    "freezes": lambda region: region.frozen(timeout=PATIENCE).release(),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_lease_is_had_beside_those_that_follow_one_another(region: Region, joined: Joined, what: str) -> None:
    """It gives way to those that were there, and the next ones to it: to a handful."""

    def body(child: Child) -> None:
        child.say()
        while True:
            ENDLESS[what](region)

    others = [joined(body) for _ in range(4)]
    found: list[list[int]] = []
    while len(found) < 3 and not (found and found[-1][-10] <= 4 * len(others)):  # who gets no CPU loses its place
        found.append(sorted(had_after(region, 2) for _ in range(100)))
    for other in others:
        other.kill()
        other.wait()
    assert found[-1][-10] <= 4 * len(others), found


@contextlib.contextmanager
def gave_way(region: Region, joined: Joined) -> Iterator[tuple[Child, Child]]:
    """A change that is stopped with its pages closed, and a taker that waits for them with a ticket."""

    def body(child: Child) -> None:
        child.say()
        child.hear()
        with region.lease(X * PAGE, PAGE, timeout=None):
            idle(child)

    changer, taker = joined(changing(region), point="K1_close=stop"), joined(body)
    changer.say()
    changer.wait_stopped()
    taker.say()
    until(lambda: word(region, TICKETS, "Q"))
    yield changer, taker


def test_a_change_lets_go_first_who_gave_way_before(region: Region, joined: Joined) -> None:
    with gave_way(region, joined) as (changer, taker):
        with in_background(lambda: region.mprotect(X * PAGE, PAGE, READ_WRITE, timeout=PATIENCE)) as outcomes:
            sleeping(region)
            assert bin(word(region, CLOSERS, "Q")).count("1") == 1, "it waits with nothing closed"
            changer.kill()
            assert taker.hear() == "ok"
            assert outcomes == []
            assert word(region, TICKETS, "Q") == 0
            taker.say()
        assert outcomes == [1]


def test_one_who_does_not_come_is_waited_for_once(region: Region, joined: Joined) -> None:
    with gave_way(region, joined) as (changer, taker):
        taker.stop()
        changer.kill()
        changer.wait()
        region.mprotect(8 * PAGE, PAGE, READ_WRITE, timeout=0)  # another page: at once
        region.mprotect(X * PAGE, PAGE, READ_WRITE, timeout=0)  # who has no time does not wait, and leaves it its place
        assert word(region, TICKETS, "Q")
        region.mprotect(X * PAGE, PAGE, READ_WRITE, timeout=PATIENCE)
        assert word(region, TICKETS, "Q") == 0
        taker.resume()
        assert taker.hear() == "ok"
        taker.say()


def test_the_dead_are_not_waited_for(region: Region, joined: Joined) -> None:
    with gave_way(region, joined) as (changer, taker):
        for child in (taker, changer):
            child.kill()
            child.wait()
        region.frozen().release()
        assert word(region, TICKETS, "Q") == 0


@pytest.mark.parametrize("ends", ["by a timeout", "by Ctrl-C"])
def test_a_place_goes_with_the_wait(region: Region, joined: Joined, ends: str) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child.say()
        child.hear()
        with pytest.raises((PropagationTimeout, KeyboardInterrupt)):
            region.lease(X * PAGE, PAGE, timeout=AT_ONCE if ends == "by a timeout" else None)
        child.say("over")

    changer, taker = joined(changing(region), point="K1_close=stop"), joined(body)
    changer.say()
    changer.wait_stopped()
    taker.say()
    if ends == "by Ctrl-C":
        until(lambda: word(region, TICKETS, "Q"))
        taker.kill(signal.SIGINT)
    assert taker.hear() == "over"
    assert word(region, TICKETS, "Q") == 0
    changer.resume()
    assert changer.hear() == "changed"


def test_more_who_gave_way_than_there_are_tickets(region: Region, joined: Joined) -> None:
    changer = joined(changing(region), point="K1_close=stop")
    changer.say()
    changer.wait_stopped()
    takers = [lambda: region.lease(X * PAGE, PAGE, timeout=PATIENCE).release()] * 40
    with in_background(*takers) as outcomes:
        until(lambda: word(region, TICKETS, "Q") == (1 << 32) - 1)
        changer.resume()
        assert changer.hear() == "changed"
    assert outcomes == [None] * 40
    assert word(region, TICKETS, "Q") == 0


def test_a_change_inside_a_lease_waits_for_nobody_in_line(region: Region, joined: Joined) -> None:
    """That one may wait for the lease."""
    with gave_way(region, joined) as (changer, taker), region.lease(0, PAGE):
        taker.stop()
        changer.kill()
        assert region.mprotect(X * PAGE, PAGE, READ_WRITE, timeout=PATIENCE) == 1
        assert word(region, TICKETS, "Q"), "it was not given up on"
        taker.resume()
        taker.say()
        assert taker.hear() == "ok"
