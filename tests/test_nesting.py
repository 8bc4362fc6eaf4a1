"""Leases inside leases: who has one takes more while somebody waits for its end; who has none gives way."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from conftest import Child
from kernel import PAGE, in_background, sleeping

import pyshare
from pyshare import READ, PropagationTimeout, Region

Joined = Callable[..., Child]
PAGES = 16
X = 5  # a page
AT_ONCE = 0.05  # a timeout that is meant to run out


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
        with in_background(lambda: [lease.release() for lease in leases]):
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


def test_who_only_waits_holds_up_no_snapshot(joined: Joined) -> None:
    """Though it is stopped."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:

        def body(child: Child) -> None:
            child.say()
            with region.lease(X * PAGE, PAGE, timeout=None):
                child.say("got it")
                child.hear()

        with region.lease(X * PAGE, PAGE):
            waiter = joined(body)
            sleeping(region, waiter.pid)
            waiter.stop()
        region.snapshot(timeout=1).close()
        waiter.resume()
        assert waiter.hear() == "got it"
