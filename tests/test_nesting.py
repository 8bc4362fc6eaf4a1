"""Leases inside leases: who has one takes more while somebody waits for its end; who has none gives way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest
from conftest import PATIENCE, Child, until
from kernel import PAGE, TICKET, TICKETS, in_background, sleeping, word

import pyshare
from pyshare import NONE, READ, PropagationTimeout, Region

Joined = Callable[..., Child]
PAGES = 16
X = 5  # a page
AT_ONCE = 0.05  # a timeout that is meant to run out
SOON = 0.5  # the same, where somebody may answer before it does


def write(region: Region, page: int) -> None:
    with region.lease(page * PAGE, PAGE) as lease:
        lease.view[0] = 1


# -- Who has a lease passes, and who has none does not -----------------------------------------------------------------


def test_who_leases_a_page_again_waits_for_a_snapshot(joined: Joined) -> None:
    """The words of the lease that is being taken are no lease yet."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:

        def body(child: Child) -> None:
            child.say()
            child.hear()
            region.snapshot().close()
            child.say("taken")

        snapshotter = joined(body, point="S3_drain=stop")
        write(region, X)
        snapshotter.say()
        snapshotter.wait_stopped()
        for first in (X, X - 1):
            with pytest.raises(PropagationTimeout):
                region.lease(first * PAGE, 2 * PAGE, timeout=AT_ONCE)
        snapshotter.resume()
        assert snapshotter.hear() == "taken"
        write(region, X)


def test_any_number_of_leases_is_known() -> None:
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        leases = [region.lease(page * PAGE, PAGE) for page in range(1, PAGES)]
        while len(leases) > 1:
            leases.pop(0).release()
            with pytest.raises(pyshare.ShareError, match="this thread holds a lease") as caught:
                region.snapshot()
            assert type(caught.value) is pyshare.ShareError
        with in_background(lambda: region.snapshot().close()):
            sleeping(region)
            region.lease(0, PAGE, timeout=AT_ONCE).release()
            leases.pop().release()
        region.snapshot().close()


def test_a_lease_is_its_takers_whoever_releases_it() -> None:
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        leases = [region.lease(page * PAGE, PAGE) for page in range(3)]
        with in_background(*[lease.release for lease in leases]):
            pass
        region.snapshot().close()
        with in_background(lambda: region.lease(0, PAGE)) as others:
            pass
        with pytest.raises(PropagationTimeout) as caught:  # another thread has it
            region.snapshot(timeout=AT_ONCE)
        assert caught.value.pids == [os.getpid()]
        lease = others[0]
        assert isinstance(lease, pyshare.Lease)
        lease.release()
        region.snapshot().close()


def test_a_child_has_none_of_its_parents_leases(joined: Joined) -> None:
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region, region.lease(0, PAGE):

        def body(child: Child) -> None:
            child.say()
            with pytest.raises(PropagationTimeout):  # rather than: this thread holds a lease
                region.snapshot(timeout=AT_ONCE)
            child.say("none")

        assert joined(body).hear() == "none"


# -- While something else waits for the end of a lease -----------------------------------------------------------------

WAITERS: dict[str, Callable[[Region], object]] = {
    "a snapshot": lambda region: region.snapshot(timeout=PATIENCE).close(),
    "a freeze": lambda region: region.frozen(timeout=PATIENCE).release(),
    "a change of all": lambda region: region.mprotect(0, region.size, READ, timeout=PATIENCE),
    "a change of some": lambda region: region.mprotect(X * PAGE, 3 * PAGE, READ, timeout=PATIENCE),
}


@pytest.mark.parametrize("engine", ["mprotect", "uffd"])
@pytest.mark.parametrize("waits", WAITERS)
def test_a_lease_inside_a_lease_is_had_at_once(waits: str, engine: str) -> None:
    """It is a part of what the other one waits for; nobody else gets one."""
    with pyshare.create(size=PAGES * PAGE, prot=READ, engine=engine) as region:
        outer = region.lease((X + 1) * PAGE, PAGE)
        with in_background(lambda: WAITERS[waits](region)) as outcomes:
            sleeping(region)
            for _ in range(20):
                with region.lease(X * PAGE, PAGE, timeout=AT_ONCE), region.lease((X + 2) * PAGE, PAGE, timeout=AT_ONCE):
                    assert outcomes == []
            with in_background(lambda: region.lease(X * PAGE, PAGE, timeout=AT_ONCE)) as others:
                pass
            assert isinstance(others[0], PropagationTimeout)
            assert outcomes == []
            outer.release()
        assert outcomes in ([None], [1])
        write(region, X)


def test_a_change_waits_for_what_was_taken_behind_its_back() -> None:
    """For a page that it has found free, and whose lease it let pass while it waited for another page."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        outer = region.lease(3 * PAGE, PAGE)
        with in_background(lambda: region.mprotect(0, 4 * PAGE, NONE, timeout=AT_ONCE * 10)) as outcomes:
            sleeping(region)
            inner = region.lease(0, PAGE, timeout=AT_ONCE)
            outer.release()
        error = outcomes[0]
        assert isinstance(error, PropagationTimeout)
        assert error.pids == [os.getpid()]
        inner.view[0] = 1
        inner.release()
        assert region.mprotect(0, 4 * PAGE, NONE) == 1


def test_who_has_another_lease_passes_a_change_after_a_while(joined: Joined) -> None:
    """The holders that the change waits for may wait for that one."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:

        def body(child: Child) -> None:
            with region.lease(X * PAGE, PAGE):
                child.say()
                child.hear()
                with region.lease(0, PAGE, timeout=PATIENCE):
                    child.say("got it")

        mine = region.lease(0, PAGE)
        holder = joined(body)
        with in_background(lambda: region.mprotect(X * PAGE, 2 * PAGE, READ, timeout=PATIENCE)) as outcomes:
            sleeping(region)
            holder.say()
            with pytest.raises(PropagationTimeout):
                region.lease((X + 1) * PAGE, PAGE, timeout=0)
            # Before the change would make way for a signal that it has not seen.
            with region.lease((X + 1) * PAGE, PAGE, timeout=0.7):
                assert outcomes == []
            mine.release()
        assert outcomes == [1]
        assert holder.hear() == "got it"


def test_a_freeze_is_an_error_before_another_freezer_is_waited_for(joined: Joined) -> None:
    """Which waits for that very lease."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:

        def body(child: Child) -> None:
            child.say()
            child.hear()
            region.frozen(timeout=PATIENCE).release()
            child.say("frozen")

        freezer = joined(body)
        with region.lease(X * PAGE, PAGE):
            freezer.say()
            sleeping(region, freezer.pid)
            with pytest.raises(pyshare.ShareError, match="this thread holds a lease") as caught:
                region.frozen(timeout=2)
            assert type(caught.value) is pyshare.ShareError
        assert freezer.hear() == "frozen"


def test_a_task_that_has_no_lease_any_more_does_not_pass(joined: Joined) -> None:
    """It had one when it asked for another, and waits for a change; meanwhile a snapshot has begun."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:

        def change(child: Child) -> None:
            child.say()
            region.mprotect(X * PAGE, PAGE, READ)

        def snapshot(child: Child) -> None:
            child.say()
            child.hear()
            region.snapshot().close()
            child.say("taken")

        async def meanwhile(first: pyshare.Lease) -> None:
            sleeping(region)  # it has asked
            first.release()
            snapshotter.say()
            snapshotter.wait_stopped()
            changer.kill()

        async def main() -> None:
            first = await region.lease_async(0, PAGE)
            others = asyncio.create_task(meanwhile(first))
            with pytest.raises(PropagationTimeout):
                await region.lease_async(X * PAGE, PAGE, timeout=SOON)
            await others

        changer, snapshotter = joined(change, point="K1_close=stop"), joined(snapshot, point="S3_drain=stop")
        changer.wait_stopped()
        asyncio.run(main())
        snapshotter.resume()
        assert snapshotter.hear() == "taken"


def test_a_snapshot_in_a_freeze_does_not_wait_for_who_wants_a_lease(joined: Joined) -> None:
    """Nobody gets one before the thaw: a ticket that is waited for would be in vain, and void."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:

        def body(child: Child) -> None:
            child.say()
            with region.lease(0, PAGE, timeout=PATIENCE):
                child.say("got it")

        def tickets() -> list[int]:
            """Which there are, and how many there have been in each place."""
            return [word(region, TICKETS), *(word(region, TICKET + 24 * place + 4) for place in range(32))]

        with region.frozen():
            taker = joined(body)
            until(lambda: tickets()[0])
            before = tickets()
            region.snapshot(timeout=PATIENCE).close()
            assert tickets() == before  # else it was given up for stopped
        assert taker.hear() == "got it"
