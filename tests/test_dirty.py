"""What was written since: every page whose trace is there when the question is put, wherever it goes meanwhile."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Child
from kernel import LEASES, PAGE, SNAPSHOTS, WAITING, in_background, section_of, sleeping, word

import pyshare
from pyshare import READ, READ_WRITE, PropagationTimeout, Region, _core

Joined = Callable[..., Child]
PAGES = 16
X = 5  # the page that is written
AT_ONCE = 0.05  # a timeout that is meant to run out
LOOKS = range(1, 5)  # at kinds of words, between which somebody writes


def pages(runs: list[tuple[int, int]]) -> set[int]:
    return {page for offset, length in runs for page in range(offset // PAGE, (offset + length) // PAGE)}


def write(region: Region, page: int, data: bytes = b"data") -> None:
    with region.lease(page * PAGE, PAGE) as lease:
        lease.view[: len(data)] = data


@contextlib.contextmanager
def asked(region: Region, since: int, look: int, joined: Joined) -> Iterator[list[set[int]]]:
    """Another process asks what is dirty, and is stopped between two looks in here; in the end what it has found."""

    def body(child: Child) -> None:
        child.say()
        child.hear()
        child.say(",".join(map(str, pages(region.dirty(since)))))

    child = joined(body, point=f"D1_look=stop@{look}")
    child.say()
    child.wait_stopped()
    found: list[set[int]] = []
    yield found
    child.resume()
    found.append({int(page) for page in child.hear().split(",") if page})


# -- Traces that move --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", LOOKS)
def test_a_lease_ends_meanwhile(joined: Joined, look: int) -> None:
    """From the held word to the stamp."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        since = region.mprotect(0, PAGE, READ)
        lease = region.lease(X * PAGE, PAGE)
        lease.view[0] = 1
        with asked(region, since, look, joined) as found:
            lease.release()
        assert found == [{X}]


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_becomes_read_meanwhile(joined: Joined, look: int) -> None:
    """From the map to the ring."""
    with pyshare.create(size=PAGES * PAGE, engine="uffd") as region:  # the stopped one need not follow by itself
        since = region.mprotect((X + 1) * PAGE, (PAGES - X - 1) * PAGE, READ)
        region.write(X * PAGE, b"data")
        with asked(region, since, look, joined) as found:
            region.mprotect(0, (X + 1) * PAGE, READ)
        assert found == [{X}]


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_becomes_zero_meanwhile(joined: Joined, look: int) -> None:
    """From the data to the stamp, of a page that is a hole then."""
    with pyshare.create(size=PAGES * PAGE, engine="uffd") as region, region.snapshot() as empty:
        empty.finish()
        since = region.mprotect((X + 1) * PAGE, (PAGES - X - 1) * PAGE, READ)
        region.write(X * PAGE, b"data")
        with asked(region, since, look, joined) as found:
            region.restore(empty)
        assert X in found[0]


@pytest.mark.parametrize("point", ["C4_map", "C5_publish", "C6_await"])
def test_a_change_to_read_is_under_way(joined: Joined, point: str) -> None:
    """In the map it is READ already; whether the ring has it yet or not."""
    with pyshare.create(size=PAGES * PAGE) as region:

        def body(child: Child) -> None:
            child.say()
            child.hear()
            region.mprotect(X * PAGE, 2 * PAGE, READ)
            child.say("made")

        changer = joined(body, point=f"{point}=stop")
        since = region.mprotect(0, PAGE, READ_WRITE)
        region.write(X * PAGE, b"data")
        changer.say()
        changer.wait_stopped()
        assert region.protection(X * PAGE) == READ
        assert pages(region.dirty(since)) == {X}
        changer.resume()
        assert changer.hear() == "made"
        assert pages(region.dirty(since)) == {X}


# -- Restored pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", [READ, READ_WRITE])
@pytest.mark.parametrize("to", ["zero", "data"])
def test_a_restored_page_was_written(prot: pyshare.Prot, to: str) -> None:
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        if to == "data":
            write(region, X, b"old")
        with region.snapshot() as old:
            write(region, X, b"new")
            region.mprotect(0, region.size, prot)
            with region.snapshot() as new:
                region.restore(old)
                assert new.read(X * PAGE, 3) == b"new"
                assert pages(region.dirty(new)) == {X}
                assert X in pages(region.dirty(new.generation))
                assert X in pages(region.dirty(0))


def test_a_hole_that_nobody_wrote_is_not_dirty() -> None:
    with pyshare.create(size=PAGES * PAGE) as region:
        since = region.mprotect(0, PAGE, READ)
        region.write(X * PAGE, b"data")
        assert pages(region.dirty(since)) == {X}
        with region.snapshot() as snap:
            assert region.dirty(snap) == []


def test_a_generation_that_was_told_before_the_change_was_over(joined: Joined) -> None:
    """Until then whoever does not follow it stores."""
    with pyshare.create(size=PAGES * PAGE) as region:

        def revoke(child: Child) -> None:
            child.say()
            child.hear()
            region.mprotect(X * PAGE, PAGE, READ, timeout=None)

        region.write(X * PAGE, b"data")
        before, caller = region.generation, joined(revoke, point="C6_await=stop")
        caller.say()
        caller.wait_stopped()
        since = region.generation
        assert since == before + 1
        with pyshare.attach(region.fileno(), readonly=True) as observer:
            assert observer.generation == since
        caller.resume()
        assert caller.wait() == 0
        assert pages(region.dirty(since)) == {X}
        assert region.dirty(region.mprotect(0, PAGE, READ)) == []


def test_who_waits_for_a_page_has_not_touched_it() -> None:
    """It slept while somebody was before it, and gave up: nobody holds the word, which says still that it sleeps."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        os.pwrite(region.fileno(), struct.pack("Q", WAITING), section_of(region, LEASES) + X * 8)
        assert region.dirty(region.mprotect(0, PAGE, READ)) == []
        write(region, X)


def test_neighbours_are_one_run() -> None:
    """However each was written."""
    with pyshare.create(size=PAGES * PAGE) as region, region.snapshot() as snap:
        region.write(2 * PAGE, b"data")
        with region.lease(3 * PAGE, PAGE):
            pass
        region.write(4 * PAGE, b"data")
        assert region.dirty(snap) == [(2 * PAGE, 3 * PAGE)]


def test_a_snapshot_that_was_given_up_is_no_answer() -> None:
    """What it was not saved for may have been written since."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        write(region, X)
        with region.snapshot() as snap:
            region.mprotect(0, region.size, READ_WRITE)
            state = word(region, SNAPSHOTS) & 0xF
            assert state == 2, "ACTIVE"
            os.pwrite(region.fileno(), struct.pack("I", word(region, SNAPSHOTS) - state), SNAPSHOTS)
            region.write(X * PAGE, b"more")
            with pytest.raises(pyshare.CorruptRegion, match="dirty: the snapshot was given up"):
                region.dirty(snap)


# -- Restoring while others take snapshots -----------------------------------------------------------------------------


@pytest.fixture
def images() -> Iterator[tuple[Region, pyshare.Snapshot]]:
    """A region whose pages are all 2, and a snapshot of when they were all 1."""
    with pyshare.create(size=PAGES * PAGE, prot=READ) as region:
        with region.lease(0, region.size) as lease:
            lease.view[:] = b"\1" * region.size
        with region.snapshot() as ones:
            ones.finish()
            with region.lease(0, region.size) as lease:
                lease.view[:] = b"\2" * region.size
            yield region, ones


@pytest.mark.parametrize("page", [1, 9])
def test_a_snapshot_waits_for_a_restore(images: tuple[Region, pyshare.Snapshot], joined: Joined, page: int) -> None:
    """Which is stopped before it stores to a page."""
    region, ones = images

    def body(child: Child) -> None:
        child.say()
        child.hear()
        region.restore(ones)
        child.say("restored")

    restorer = joined(body, point=f"P1_put=stop@{page}")
    restorer.say()
    restorer.wait_stopped()
    with pytest.raises(PropagationTimeout) as caught:
        region.snapshot(timeout=AT_ONCE)
    assert caught.value.pids == [restorer.pid]
    with in_background(lambda: region.snapshot(timeout=None)) as taken:
        sleeping(region)
        restorer.resume()
        assert restorer.hear() == "restored"
    snap = taken[0]
    assert isinstance(snap, pyshare.Snapshot)
    with snap:
        write(region, 3)
        assert snap.read(0, region.size) == b"\1" * region.size


@pytest.mark.parametrize("end", ["goes on", "dies"])
def test_a_restore_waits_for_a_snapshot(images: tuple[Region, pyshare.Snapshot], joined: Joined, end: str) -> None:
    """For which no lease is held any more; what it finds then is what it keeps."""
    region, _ = images

    def body(child: Child) -> None:
        child.say()
        child.hear()
        with region.snapshot() as snap:
            for _ in range(2):
                child.say(f"{set(snap.read(0, region.size))}")
                child.hear()

    snapshotter = joined(body, point="S3_drain=stop")
    with region.frozen():
        snapshotter.say()
        snapshotter.wait_stopped()
        with in_background(lambda: _core.put_pages(region, 0, b"\1" * region.size)) as outcomes:
            sleeping(region)
            assert region.read(0, region.size) == b"\2" * region.size
            snapshotter.resume() if end == "goes on" else snapshotter.kill()
        assert outcomes == [None]
        assert region.read(0, region.size) == b"\1" * region.size
        for _ in range(2 * (end == "goes on")):
            assert snapshotter.hear() == "{2}"
            snapshotter.say()
    write(region, 3)


def test_a_restore_stores_into_no_file_that_has_got_its_number(
    images: tuple[Region, pyshare.Snapshot], joined: Joined, tmp_path: Path
) -> None:
    """While it waits for a snapshot the program closes whatever it finds, and opens a file of its own."""
    region, _ = images

    def body(child: Child) -> None:
        child.say()
        child.hear()
        region.snapshot().close()

    snapshotter = joined(body, point="S3_drain=stop")
    with region.frozen(), (tmp_path / "own").open("w+b", buffering=0) as own:
        snapshotter.say()
        snapshotter.wait_stopped()
        with in_background(lambda: _core.put_pages(region, 0, b"\1" * region.size)) as outcomes:
            sleeping(region)
            number = os.dup2(own.fileno(), region.fileno())
            snapshotter.resume()
        os.close(number)
        assert outcomes == [None]
        assert own.read() == b""
        assert region.read(0, region.size) == b"\1" * region.size


def test_a_restorer_dies(images: tuple[Region, pyshare.Snapshot], joined: Joined) -> None:
    """Counted as the holder of a lease, and with the region frozen."""
    region, ones = images

    def body(child: Child) -> None:
        child.say()
        region.restore(ones)

    restorer = joined(body, point="P1_put=kill@4")
    restorer.wait()
    with region.snapshot() as snap:
        before = snap.read(0, region.size)
        region.restore(ones)
        assert snap.read(0, region.size) == before
    assert region.read(0, region.size) == b"\1" * region.size
