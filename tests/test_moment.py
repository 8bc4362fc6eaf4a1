"""The moment of a snapshot: nobody stores before it has come for all, and nobody waits for it without end."""

from __future__ import annotations

import select
from collections.abc import Callable

import pytest
from conftest import Child, idle

import pyshare
from pyshare import READ_WRITE, Region

PAGE, PAGES = 4096, 64


@pytest.fixture(params=["mprotect", "uffd"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def look(region: Region) -> Callable[[Child], None]:
    """The body of a child that takes a snapshot when it is told to, and says what that has at page 5."""

    def body(child: Child) -> None:
        idle(child)
        with region.snapshot(timeout=60) as snap:
            child.say(str(snap.read(5 * PAGE, 1)[0]))
            child.hear()

    return body


def test_nobody_stores_before_the_moment_has_come(engine: str, joined: Callable[..., Child]) -> None:
    """Others may still store to pages that are not protected yet: what is stored now would come before that."""
    with pyshare.create(size=PAGES * PAGE, prot=READ_WRITE, engine=engine) as region:

        def write(child: Child) -> None:
            idle(child)
            region.buf[5 * PAGE] = 1
            child.say("stored")

        snapshotter, writer = joined(look(region), point="S4_active=stop"), joined(write)
        snapshotter.say()
        snapshotter.wait_stopped()
        writer.say()
        assert not select.select([writer._receive], [], [], 0.2)[0]
        snapshotter.resume()
        assert writer.hear() == "stored"
        assert snapshotter.hear() == "0"
        snapshotter.say()


def test_who_waits_for_a_moment_gives_the_snapshot_up(engine: str, joined: Callable[..., Child]) -> None:
    """Its maker is stopped in the microseconds in which nobody may store: it takes the snapshot again afterwards."""
    with pyshare.create(size=PAGES * PAGE, prot=READ_WRITE, engine=engine) as region:

        def write(child: Child) -> None:
            idle(child)
            with pytest.raises(pyshare.PropagationTimeout) as caught:
                region.mprotect(0, PAGE, READ_WRITE, timeout=0.05)
            assert caught.value.pids == [snapshotter.pid]
            region.buf[5 * PAGE] = 1
            child.say("stored")

        snapshotter = joined(look(region), point="S4_active=stop")
        writer = joined(write)
        snapshotter.say()
        snapshotter.wait_stopped()
        writer.say()
        assert writer.hear() == "stored"
        snapshotter.resume()
        assert snapshotter.hear() == "1"
        snapshotter.say()
