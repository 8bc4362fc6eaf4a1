"""Snapshots: one moment of all processes, unchanged for ever, whole or an error; and the region is never hurt."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import Child, idle, until
from kernel import Mappings

import pyshare
from pyshare import READ, READ_WRITE, Region, Snapshot

PAGE = 4096
PAGES = 64
ENGINES = ("mprotect", "uffd")
MIXES = [("mprotect", "mprotect"), ("uffd", "uffd"), ("mprotect", "uffd"), ("uffd", "mprotect")]
WORD = struct.Struct("Q")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[READ, READ_WRITE], ids=["leases", "shared"])
def region(request: pytest.FixtureRequest, engine: str) -> Iterator[Region]:
    with pyshare.create(size=PAGES * PAGE, prot=request.param, engine=engine) as made:
        yield made


def store(region: Region, page: int, data: bytes) -> None:
    """By a lease; where all may write also by the safe accessor and by the address, in turn."""
    if page % 3 == 0 or region.protection(page * PAGE) == READ:
        with region.lease(page * PAGE, PAGE, window=page % 2 == 0) as lease:
            lease.view[: len(data)] = data
    elif page % 3 == 1:
        region.write(page * PAGE, data)
    else:
        region.buf[page * PAGE : page * PAGE + len(data)] = data


def fill(region: Region, text: bytes) -> None:
    for page in range(0, PAGES, 2):
        store(region, page, text + b" %d" % page)


def image(text: bytes) -> bytes:
    return b"".join(
        (text + b" %d" % page).ljust(PAGE, b"\0") if page % 2 == 0 else bytes(PAGE) for page in range(PAGES)
    )


# -- What it is --------------------------------------------------------------------------------------------------------


def test_keeps_what_was_there(region: Region) -> None:
    fill(region, b"first")
    with region.snapshot() as snap:
        fill(region, b"second")
        assert snap.read(0, snap.size) == image(b"first")
        assert region.read(0, region.size) == image(b"second")


def test_reads_any_range(region: Region) -> None:
    fill(region, b"text")
    whole = image(b"text")
    with region.snapshot() as snap:
        store(region, 2, b"new")
        for offset, length in [
            (0, 0),
            (1, 5),
            (PAGE - 1, 2),
            (PAGE * 2, PAGE),
            (3 * PAGE - 7, 5 * PAGE),
            (PAGE * 63, PAGE),
        ]:
            assert snap.read(offset, length) == whole[offset : offset + length]
        for offset, length in [(-1, 1), (0, -1), (region.size, 1)]:
            with pytest.raises(ValueError, match="not inside"):
                snap.read(offset, length)


def test_view_is_read_only_and_outlives_all(region: Region) -> None:
    fill(region, b"text")
    snap = region.snapshot()
    fill(region, b"more")
    view, array = memoryview(snap), np.frombuffer(snap, dtype=np.uint8)
    assert view.readonly
    assert not array.flags.writeable
    assert snap.complete
    snap.close()
    fill(region, b"last")
    assert bytes(view) == array.tobytes() == image(b"text")


def test_needs_no_region(engine: str) -> None:
    region = pyshare.create(size=PAGES * PAGE, prot=READ_WRITE, engine=engine)
    fill(region, b"text")
    snap = region.snapshot()
    region.close()
    assert snap.read(0, snap.size) == image(b"text")
    assert bytes(snap) == image(b"text")
    snap.close()


def test_attributes(engine: str) -> None:
    with pyshare.create(size=3 * PAGE + 5, prot=READ, engine=engine) as region:
        region.mprotect(0, PAGE, READ_WRITE)
        snap = region.snapshot()
        assert (snap.name, snap.size, len(snap), snap.closed) == (None, region.size, region.size, False)
        assert snap.generation == region.generation or snap.complete
        assert len(bytes(snap)) == region.size
        snap.close()
        snap.close()
        assert snap.closed
        assert "closed" in repr(snap)
        for use in (lambda: snap.read(0, 1), lambda: snap.saved, lambda: memoryview(snap), snap.__enter__, snap.finish):
            with pytest.raises(pyshare.RegionClosed, match="snapshot is closed"):
                use()


def test_copies_only_what_is_written(engine: str) -> None:
    with pyshare.create(size=PAGES * PAGE, prot=READ, engine=engine) as region:
        fill(region, b"text")
        with region.snapshot() as snap:
            assert (snap.saved, snap.complete) == (0, False)
            store(region, 4, b"a")
            store(region, 4, b"b")
            store(region, 7, b"c")
            assert (snap.saved, snap.complete) == (2, False)
            snap.finish()
            assert snap.complete
            assert snap.read(0, snap.size) == image(b"text")


def test_several_at_once(region: Region) -> None:
    snaps = []
    for number in range(8):
        fill(region, b"%d" % number)
        snaps.append(region.snapshot())
    with pytest.raises(pyshare.ShareError, match="at most 8"):
        region.snapshot()
    fill(region, b"last")
    for number in [3, 0, 7, 1, 2, 6, 5, 4]:
        assert snaps[number].read(0, region.size) == image(b"%d" % number)
        snaps[number].close()
    assert region.read(0, region.size) == image(b"last")
    region.snapshot().close()


def test_memory_goes_with_it(region: Region) -> None:
    fill(region, b"text")
    region.snapshot().close()

    def blocks() -> int:
        return os.fstat(region.fileno()).st_blocks

    before = blocks()
    for _ in range(3):
        snap = region.snapshot()
        fill(region, b"more")
        snap.finish()
        assert blocks() >= before + PAGES // 2 * 8
        snap.close()
        until(lambda: blocks() <= before + 16)  # whoever saves it in the background may still look at it


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, snap: Snapshot) -> None:
        self.snap, self.this = snap, self


def finished(region: Region) -> Snapshot:
    snap = region.snapshot()
    snap.finish()
    return snap


def drop(region: Region) -> None:
    finished(region)


def drop_a_view(region: Region) -> None:
    snap = finished(region)
    view = memoryview(snap)
    snap.close()
    assert bytes(view) == image(b"text")


def drop_in_a_cycle(region: Region) -> None:
    Cycle(finished(region))
    gc.collect()


def close_in_another_thread(region: Region) -> None:
    snap = finished(region)
    thread = threading.Thread(target=snap.close)
    thread.start()
    thread.join()


def is_kept(region: Region) -> bool:
    """It has its own half of the pages and some of the control segment: is there a snapshot with another half?"""
    return os.fstat(region.fileno()).st_blocks * 512 > PAGES * PAGE


@pytest.mark.parametrize("end", [drop, drop_a_view, drop_in_a_cycle, close_in_another_thread])
def test_memory_goes_at_once_with_the_last_reference(region: Region, end: Callable[[Region], None]) -> None:
    fill(region, b"text")
    assert not is_kept(region)
    for _ in range(2):
        end(region)
        assert not is_kept(region)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_without_close() -> None:
    os._exit(0)


@pytest.mark.parametrize(
    ("ending", "call"),
    [
        (kill, lambda region: region.protections()),
        (end_without_close, lambda region: region.mprotect(0, PAGE, READ)),
        (kill, lambda region: region.frozen().release()),
        (Region.close, lambda region: region.read(0, 1)),
    ],
    ids=["killed, look", "ended, change", "killed, freeze", "no participant any more, read"],
)
def test_whom_nobody_saw_end_leaves_its_memory_to_the_next_call(
    region: Region, ending: Callable[..., object], call: Callable[[Region], object], fork: Callable[..., Child]
) -> None:
    fill(region, b"text")

    def body(child: Child) -> None:
        snap = finished(region)
        child.say()
        child.hear()
        ending(*[region] * (ending is Region.close))
        snap.close()

    child = fork(body)
    child.hear()
    assert is_kept(region)
    child.say()
    child.wait()
    until(lambda: (call(region), not is_kept(region))[1])


def test_what_is_dropped_is_saved_for_nobody_and_counts_no_more() -> None:
    with pyshare.create(size=32 << 20) as region:
        region.buf[:] = bytes([1]) * region.size
        for _ in range(12):  # more than there can be
            region.snapshot()
        assert os.fstat(region.fileno()).st_blocks * 512 < region.size + (1 << 20)


def descriptors() -> int:
    """Of this process that lead to a region's memory."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found += os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:pyshare")
    return found


def test_a_forked_child_closes_what_is_being_saved(fork: Callable[..., Child]) -> None:
    with pyshare.create(size=32 << 20) as region:
        region.buf[:] = bytes([1]) * region.size

        def body(_: Child) -> None:
            before = descriptors()
            snap.close()
            assert descriptors() == before - 1

        snap = region.snapshot()
        child = fork(body)
        assert child.wait() == 0
        snap.close()


def test_grants_everything_back(region: Region) -> None:
    """Stores by system calls, which no handler helps, pass again: page tables are open."""
    before = region.protections()
    fill(region, b"text")
    snap = region.snapshot()
    if before[0][2] == READ:
        region.mprotect(0, region.size, READ_WRITE)  # promise 2: all of it can be written when this returns
    else:
        snap.finish()
        until(lambda: all(one.applied == region.generation for one in region.participants()))
    zero = os.open("/dev/zero", os.O_RDONLY)
    for page in range(PAGES):
        assert os.readv(zero, [region.buf[page * PAGE : (page + 1) * PAGE]]) == PAGE
    os.close(zero)
    assert snap.read(0, snap.size) == image(b"text")
    snap.close()
    if before[0][2] == READ:
        region.mprotect(0, region.size, READ)
    assert region.protections() == before


def test_taken_in_a_freeze(engine: str) -> None:
    """Pages that become writable again at the thaw are saved by themselves, so that system calls can store to them."""
    with pyshare.create(size=PAGES * PAGE, engine=engine) as region, open("/dev/zero", "rb", buffering=0) as zero:
        fill(region, b"text")
        with region.frozen():
            snap = region.snapshot()
        until(lambda: snap.complete)
        page = memoryview(region)[4 * PAGE : 5 * PAGE]
        until(lambda: passes(lambda: zero.readinto(page)))
        assert snap.read(0, snap.size) == image(b"text")
        page.release()
        snap.close()


def passes(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    return True


def test_own_lease_is_in_the_way(region: Region) -> None:
    with region.lease(0, PAGE), pytest.raises(pyshare.ShareError, match="lease"):
        region.snapshot()
    region.snapshot().close()


def _read_and_answer(snap: Snapshot, answer: Any) -> None:
    answer.send_bytes(snap.read(0, snap.size))
    answer.send_bytes(memoryview(snap))
    answer.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pickles(region: Region, method: str) -> None:
    fill(region, b"text")
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    snap = region.snapshot()
    process: Any = context.Process(target=_read_and_answer, args=(snap, send))  # type: ignore[attr-defined]
    process.start()
    fill(region, b"more")
    snap.close()  # the other one is a holder by itself
    assert receive.recv_bytes() == receive.recv_bytes() == image(b"text")
    process.join()
    send.close()
    receive.close()


def test_forked_child_has_it(region: Region, fork: Callable[..., Child]) -> None:
    fill(region, b"text")
    snap = region.snapshot()

    def body(child: Child) -> None:
        child.hear()
        assert snap.read(0, snap.size) == image(b"text")
        fill(region, b"child")
        assert bytes(snap) == image(b"text")

    child = fork(body)
    fill(region, b"more")
    snap.close()
    child.say()
    assert child.wait() == 0
    assert region.read(0, region.size) == image(b"child")


# -- What was written since --------------------------------------------------------------------------------------------


def pages(runs: list[tuple[int, int]]) -> set[int]:
    assert runs == sorted(runs)
    return {page for offset, length in runs for page in range(offset // PAGE, -(-(offset + length) // PAGE))}


def test_dirty_since_a_snapshot(region: Region) -> None:
    fill(region, b"text")
    with region.snapshot() as snap:
        assert region.dirty(snap) == []
        store(region, 4, b"a")
        store(region, 5, b"b")
        store(region, 9, b"c")
        assert pages(region.dirty(snap)) == {4, 5, 9}
        snap.finish()
        assert pages(region.dirty(snap)) == {4, 5, 9}
        with region.lease(20 * PAGE, PAGE):
            assert pages(region.dirty(snap)) == {4, 5, 9, 20}
        with region.snapshot() as second:
            assert region.dirty(second) == []
            store(region, 10, b"d")
            assert pages(region.dirty(second)) == {10}
            assert pages(region.dirty(snap)) == {4, 5, 9, 10, 20}


def test_dirty_since_a_generation(engine: str) -> None:
    with pyshare.create(size=PAGES * PAGE + 3, prot=READ, engine=engine) as region:
        fill(region, b"text")
        assert pages(region.dirty(0)) == set(range(0, PAGES, 2))
        since = region.mprotect(0, PAGE, READ)
        assert region.dirty(since) == []
        store(region, 6, b"a")
        assert pages(region.dirty(since)) == {6}
        region.mprotect(8 * PAGE, 4 * PAGE, READ_WRITE)  # the holes of it are no news
        region.mprotect(8 * PAGE, 4 * PAGE, READ)
        assert pages(region.dirty(since)) == {6, 8, 10}
        assert region.dirty(region.generation) == []
        for _ in range(1100):  # more than the ring remembers
            region.mprotect(0, PAGE, READ)
        assert pages(region.dirty(since)) == set(range(0, PAGES, 2))
        for wrong in (-1, region.generation + 1):
            with pytest.raises(ValueError, match="since must be"):
                region.dirty(wrong)


def test_dirty_of_another_region(region: Region) -> None:
    with (
        pyshare.create(size=region.size) as other,
        other.snapshot() as snap,
        pytest.raises(ValueError, match="another"),
    ):
        region.dirty(snap)


def test_a_dead_holder_left_its_pages_dirty(engine: str, fork: Callable[..., Child]) -> None:
    with pyshare.create(size=PAGES * PAGE, prot=READ, engine=engine) as region:

        def body(child: Child) -> None:
            child.hear()
            with region.lease(3 * PAGE, PAGE) as lease:
                lease.view[0] = 1
                child.say()
                child.hear()

        child = fork(body)
        region.mprotect(0, PAGE, READ)
        snap = region.snapshot()
        child.say()
        child.hear()
        child.kill()
        child.wait()
        assert pages(region.dirty(snap)) == {3}
        with region.snapshot() as later:  # nobody waits for the dead
            assert later.read(3 * PAGE, 1) == b"\1"
        snap.close()


# -- One moment --------------------------------------------------------------------------------------------------------

WRITERS = 3
COUNTERS = 4  # pages of each: a, then b; a neighbour's b, then the same once more


def put(region: Region, page: int, number: int, way: str) -> None:
    if way == "lease" or (way == "mixed" and page % 3 == 0):
        with region.lease(page * PAGE, PAGE, window=page % 2 == 0) as lease:
            lease.view.cast("Q")[0] = number
    elif way == "mixed" and page % 3 == 1:
        region.write(page * PAGE, WORD.pack(number))
    else:
        region.buf.cast("Q")[page * PAGE // 8] = number


def count_for_ever(region: Region, me: int, way: str) -> None:
    mine, others = COUNTERS * me, COUNTERS * ((me - 1) % WRITERS)
    for number in itertools.count(1):
        put(region, mine, number, way)
        put(region, mine + 1, number, way)
        seen = WORD.unpack(region.read((others + 1) * PAGE, 8))[0]
        put(region, mine + 2, seen, way)
        put(region, mine + 3, seen, way)


def look_at_moment(snap: Snapshot) -> list[int]:
    """The counters of an image, which must have been there at the same time."""
    numbers = [WORD.unpack(snap.read(page * PAGE, 8))[0] for page in range(COUNTERS * WRITERS)]
    for me in range(WRITERS):
        a, b, seen, again = numbers[COUNTERS * me : COUNTERS * (me + 1)]
        assert a - b in (0, 1), numbers
        assert again <= seen <= numbers[COUNTERS * ((me - 1) % WRITERS) + 1], numbers
    return numbers


@pytest.fixture
def writers(joined: Callable[..., Child]) -> Callable[..., list[Child]]:
    def start(region: Region, engines: tuple[str, str], way: str) -> list[Child]:
        def body(me: int) -> Callable[[Child], None]:
            def run(child: Child) -> None:
                mine = pyshare.attach(region, engine=engines[me % 2])  # beside the one that the fork made
                child.say()
                count_for_ever(mine, me, way)

            return run

        return [joined(body(me)) for me in range(WRITERS)]

    return start


@pytest.mark.parametrize("way", ["lease", "shared", "mixed"])
@pytest.mark.parametrize("engines", MIXES, ids="-".join)
def test_one_moment(engines: tuple[str, str], way: str, writers: Callable[..., list[Child]]) -> None:
    prot = READ if way == "lease" else READ_WRITE
    with pyshare.create(size=PAGES * PAGE, prot=prot, engine=engines[0]) as region:
        children = writers(region, engines, way)
        before = [0] * COUNTERS * WRITERS
        for turn in range(25):
            until(lambda: WORD.unpack(region.read(0, 8))[0] > before[0])  # noqa: B023
            with region.snapshot(timeout=30) as snap:
                numbers = look_at_moment(snap)
                if turn % 3 == 0:
                    snap.finish()
                assert look_at_moment(snap) == numbers
            assert all(old <= new for old, new in zip(before, numbers, strict=True))
            before = numbers
        for child in children:
            child.kill()
            child.wait()
        with region.snapshot() as snap:
            look_at_moment(snap)


# -- Deaths ------------------------------------------------------------------------------------------------------------


def unhurt(region: Region, before: Any) -> None:
    """All can be written as ever, and there is room for snapshots."""
    assert region.protections() == before
    fill(region, b"after")
    for page in range(PAGES):
        store(region, page, b"x")
    with region.snapshot() as snap:
        fill(region, b"later")
        assert snap.read(0, 1) == b"x"


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(
    "label", ["S1_prepare", "S2_protect", "S3_drain", "S4_active", "S5_open", "S6_save", "S7_complete"]
)
def test_snapshotter_dies(
    region: Region, label: str, nth: int, fork: Callable[..., Child], joined: Callable[..., Child]
) -> None:
    before = region.protections()
    fill(region, b"text")
    bystander = joined(
        lambda child: (child.say(), child.hear(), fill(region, b"other"), child.say("done"), child.hear())
    )

    def body(_: Child) -> None:
        for _ in range(2):
            snap = region.snapshot()
            fill(region, b"more")
            snap.finish()

    dead = fork(body, point=f"{label}=kill@{nth}")
    assert dead.wait() == -signal.SIGKILL
    bystander.say()
    assert bystander.hear() == "done"
    unhurt(region, before)
    assert region.read(0, 1) == b"l"


def test_saver_dies(region: Region, joined: Callable[..., Child]) -> None:
    fill(region, b"text")

    def body(child: Child) -> None:
        child.say()
        child.hear()
        for page in range(PAGES):
            store(region, page, b"y")

    saver = joined(body, point="S6_save=kill@5")
    with region.snapshot() as snap:
        saver.say()
        assert saver.wait() in (-signal.SIGKILL, 0)  # 0: they were saved in the background before it came
        assert snap.read(0, snap.size) == image(b"text")
        fill(region, b"more")
        assert snap.read(0, snap.size) == image(b"text")
    unhurt(region, region.protections())


def test_who_may_have_no_more_mappings_stores_all_the_same(
    fork: Callable[..., Child], joined: Callable[..., Child]
) -> None:
    """A page that cannot be opened alone is opened with those around it, which are saved as well."""
    with pyshare.create(size=PAGES * PAGE, engine="mprotect") as region:
        fill(region, b"text")

        def take(_: Child) -> None:
            with region.snapshot() as snap:  # its saver stops this process
                snap.finish()
                assert snap.read(0, snap.size) == image(b"text")

        def write(child: Child) -> None:
            mappings = Mappings()
            child.say()
            child.hear()
            mappings.fill()
            for page in (5, 20, 40):
                region.buf[page * PAGE] = 1
            child.say("stored")
            child.hear()

        writer, taker = joined(write), fork(take, point="S6_save=stop")
        assert os.WIFSTOPPED(os.waitpid(taker.pid, os.WUNTRACED)[1])
        writer.say()
        assert writer.hear() == "stored"
        taker.resume()
        assert taker.wait() == 0
        assert [region.read(page * PAGE, 1) for page in (5, 20, 40)] == [b"\1"] * 3


def test_silent_participant(region: Region, joined: Callable[..., Child]) -> None:
    """Who is stopped with a lease, or cannot protect its page tables, is named; and nothing is left of it."""
    before = region.protections()

    def body(child: Child) -> None:
        with region.lease(0, PAGE):
            child.say()
            child.hear()
        idle(child)

    silent = joined(body)
    silent.stop()
    with pytest.raises(pyshare.PropagationTimeout) as caught:
        region.snapshot(timeout=0.2)
    assert caught.value.pids == [silent.pid]
    assert caught.value.generation is None
    silent.resume()
    silent.say()
    assert silent.hear() == "ok"
    unhurt(region, before)
    silent.say()


def test_who_has_a_lease_may_take_more(region: Region) -> None:
    """A snapshot waits for a lease whose thread takes another one, which must not wait for the snapshot."""
    done = threading.Event()
    snaps: list[Snapshot] = []

    def snapshot() -> None:
        snaps.append(region.snapshot())
        done.set()

    with region.lease(0, PAGE):
        thread = threading.Thread(target=snapshot)
        thread.start()
        while not region.generation:  # it has begun
            os.sched_yield()
        for _ in range(100):
            with region.lease(PAGE, PAGE, timeout=10) as lease:
                lease.view[0] = 1
        assert not done.is_set()
    thread.join()
    assert snaps[0].read(PAGE, 1) == b"\1"
    snaps[0].close()


def test_a_stopped_saver_is_named_where_no_area_is_left(engine: str, joined: Callable[..., Child]) -> None:
    """It may write to an area that it found in use: the areas that were empty then are used; then it is waited for."""
    with pyshare.create(size=4096 * PAGE, prot=READ_WRITE, engine=engine) as region:
        last = region.size - PAGE

        def body(child: Child) -> None:
            child.say()
            with contextlib.suppress(pyshare.ProtectionError):
                while True:
                    region.write(last, b"\1")
            idle(child)

        def is_stopped() -> bool:
            return psutil.Process(saver.pid).status() == psutil.STATUS_STOPPED

        saver = joined(body, point="S6_save=stop")
        while not is_stopped():  # or the page was saved before that, in the background
            with region.snapshot() as snap:
                until(lambda snap=snap: is_stopped() or snap.complete)
        with pytest.raises(pyshare.PropagationTimeout):
            region.mprotect(0, region.size, READ, timeout=0.1)
        with contextlib.suppress(pyshare.PropagationTimeout):
            for _ in range(9):
                region.snapshot(timeout=0.1).close()
        with pytest.raises(pyshare.PropagationTimeout) as caught:
            region.snapshot(timeout=0.1)
        assert caught.value.pids == [saver.pid]
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                region.snapshot(timeout=None)
        finally:
            signal.signal(signal.SIGALRM, before)
        saver.resume()
        assert saver.hear() == "ok"
        region.snapshot().close()
        saver.say()


def test_a_grant_saves_before_others_have_to_wait_for_it(engine: str, joined: Callable[..., Child]) -> None:
    """Not with the region's lock, whose holder nobody can overtake."""
    with pyshare.create(size=PAGES * PAGE, prot=READ, engine=engine) as region:
        fill(region, b"a")
        with region.snapshot() as snap:
            changer = joined(
                lambda child: (idle(child), region.mprotect(0, 4 * PAGE, READ_WRITE)), point="S6_save=stop"
            )
            changer.say()
            changer.wait_stopped()
            with pytest.raises(pyshare.PropagationTimeout) as caught:
                region.mprotect(8 * PAGE, PAGE, READ, timeout=0.1)
            assert caught.value.generation
            changer.resume()
            assert changer.wait() == 0
            store(region, 0, b"b")
            assert snap.read(0, 1) == b"a"


def test_a_grant_whose_time_runs_out_while_it_saves(engine: str) -> None:
    pages = 4096
    with pyshare.create(size=pages * PAGE, prot=READ, engine=engine) as region:
        with region.lease(0, region.size) as lease:
            lease.view[:] = b"a" * region.size
        with region.snapshot() as snap:
            with pytest.raises(
                pyshare.PropagationTimeout, match="pages that a snapshot needs were being saved"
            ) as caught:
                region.mprotect(0, region.size, READ_WRITE, timeout=0)
            assert (caught.value.generation, caught.value.pids) == (None, [])
            assert 0 < snap.saved < pages
            region.mprotect(0, region.size, READ_WRITE)
            region.buf[:] = b"b" * region.size
            assert snap.read(0, region.size) == b"a" * region.size
