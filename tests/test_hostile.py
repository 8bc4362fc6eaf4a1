"""Promise 9: nothing read from a control segment is trusted with memory safety.

Whatever a descriptor leads to, and whatever a peer writes over the control segment, before or while we work: an
error of pyshare, an OSError, or success; never a crash, never a hang.  The fuzz prints its seed with a failure.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Child

import pyshare
from pyshare import _core
from pyshare._region import Region

PAGE = mmap.PAGESIZE
PAGES, SLOTS = 40, 4
SHORT = 0.03  # seconds: how long a fuzzed call may wait for those whom the mutation invented
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

# ext/segment/layout.h: where things are (test_offsets holds them to the truth).
SECTIONS, LOCK, GENERATION, SLOTS_USED = 288, 704, 768, 832
ATTEMPT, COMPLETE, KIND, FIRST, COUNT = (896 + field for field in (0, 8, 16, 24, 32))
CLOSERS, CLOSER = 960, 1024
SNAPSHOTS, FREEZER, THAWING, FROZEN, SNAPSHOT = 976, 2560, 2564, 2568, 2624  # a snapshot: word, dirty, generation
VIOLATIONS = 2752  # how many there have been
TICKET = 2816
LEASE_COUNT, SAVING = 192, 196  # in a slot
ACK, ERROR, LIVE, STATUS, PID = 0, 16, 64, 68, 128  # in a slot
SLOT_SIZE, RING_ENTRY, RING = 256, 64, 1024
SLOTS_AT = PAGE  # the first section
RING_AT = 2 * PAGE
CUR_AT = RING_AT + RING * RING_ENTRY
OLD_AT, LEASES_AT, LOCKS_AT = (CUR_AT + i * PAGE for i in (1, 2, 3))
KEPT_AT = LOCKS_AT + 16 * PAGE
STATE_AT, STAMP_AT, VIOLATION_AT = (KEPT_AT + i * PAGE for i in (1, 9, 10))
AREAS = 8


def new_region(pages: int = PAGES, slots: int = SLOTS) -> int:
    return _core.create(pages * PAGE, pyshare.READ_WRITE, slots, 0o600, _core.POLICIES["die"], "")


@pytest.fixture
def fd() -> Iterator[int]:
    """The descriptor of a region in which nobody participates."""
    made = new_region()
    yield made
    os.close(made)


def peek(fd: int, offset: int, size: int = 8) -> int:
    return int.from_bytes(os.pread(fd, size, offset), "little")


def poke(fd: int, offset: int, value: int, size: int = 8) -> None:
    os.pwrite(fd, (value % (1 << 8 * size)).to_bytes(size, "little"), offset)


# -- Foreign descriptors ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memfd(content: bytes, *, sealed: bool = True) -> Iterator[int]:
    fd = os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        yield fd
    finally:
        os.close(fd)


def content_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@contextlib.contextmanager
def foreign(kind: str, fd: int, directory: Path) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        if kind == "file":
            path = directory / "file"
            path.write_bytes(content_of(fd))
            yield stack.enter_context(path.open("r+b")).fileno()
        elif kind == "pipe":
            ends = os.pipe()
            for end in ends:
                stack.callback(os.close, end)
            yield ends[0]
        elif kind == "socket":
            yield stack.enter_context(socket.socket()).fileno()
        elif kind == "null":
            yield stack.enter_context(open("/dev/null", "r+b")).fileno()
        elif kind == "directory":
            opened = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, opened)
            yield opened
        elif kind == "unsealed":
            yield stack.enter_context(memfd(content_of(fd), sealed=False))
        elif kind == "truncated":
            yield stack.enter_context(memfd(content_of(fd)[:-PAGE]))
        elif kind == "header only":
            yield stack.enter_context(memfd(content_of(fd)[:PAGE]))
        elif kind == "longer":
            yield stack.enter_context(memfd(content_of(fd) + bytes(PAGE)))
        elif kind == "empty":
            yield stack.enter_context(memfd(b""))
        elif kind == "zeros":
            yield stack.enter_context(memfd(bytes(100 * PAGE)))
        else:
            assert kind == "text"
            yield stack.enter_context(memfd(b"not a region " * 1000))


KINDS = ["file", "pipe", "socket", "null", "directory", "unsealed", "truncated", "empty", "zeros", "text", "longer"]


@pytest.mark.parametrize("kind", [*KINDS, "header only"])
def test_foreign_descriptor(kind: str, fd: int, tmp_path: Path) -> None:
    with foreign(kind, fd, tmp_path) as other:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(pyshare.CorruptRegion) as caught:
            pyshare.attach(other)
        assert caught.value.field
        assert len(os.listdir("/proc/self/fd")) == before
        os.fstat(other)  # the caller's own, and still open


def test_descriptor_that_is_not_open() -> None:
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    with pytest.raises(OSError, match="Bad file descriptor"):
        pyshare.attach(free)


def test_peer_cannot_resize() -> None:
    with pyshare.create(size=PAGES * PAGE) as region:
        size = os.fstat(region.fileno()).st_size
        assert fcntl.fcntl(region.fileno(), fcntl.F_GET_SEALS) == SEALS
        for length in (0, size - PAGE, size + PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fileno(), length)
        with pytest.raises(PermissionError):
            fcntl.fcntl(region.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(region.fileno()).st_size == size
        region.write(0, b"still here")


# -- Aimed blows -----------------------------------------------------------------------------------------------------


def test_offsets(fd: int) -> None:
    """What the tests below aim at is there."""
    with pyshare.attach(fd) as region:
        for page in range(3):
            region.mprotect(page * PAGE, PAGE, pyshare.READ)
        assert [peek(fd, at) for at in (GENERATION, ATTEMPT, COMPLETE, FIRST, COUNT)] == [3, 3, 3, 2, 1]
        assert peek(fd, SLOTS_AT + ACK, 4) == 3
        assert peek(fd, SLOTS_AT + PID, 4) == os.getpid()
        assert peek(fd, SLOTS_AT + STATUS, 4) == 1 << 4 | 2
        assert peek(fd, SLOTS_AT + LIVE, 4) & 0x3FFFFFFF == region.participants()[0].tid
        assert peek(fd, RING_AT + 3 * RING_ENTRY) == 3
        assert os.pread(fd, 4, CUR_AT) == bytes([pyshare.READ ^ pyshare.READ_WRITE] * 3 + [0])
        assert os.pread(fd, 3, OLD_AT) == bytes(3)
        kinds = [struct.unpack_from("<IIQQ", os.pread(fd, 24 * 11, SECTIONS), 24 * i) for i in range(11)]
        assert [(kind, at) for kind, _, at, _ in kinds] == [
            (1, SLOTS_AT), (2, RING_AT), (3, CUR_AT), (4, OLD_AT), (5, LEASES_AT), (6, LOCKS_AT), (7, KEPT_AT),
            (8, STATE_AT), (9, STAMP_AT), (10, VIOLATION_AT), (0, 0),
        ]  # fmt: skip
        assert os.fstat(fd).st_size == VIOLATION_AT + PAGE + (1 + AREAS) * PAGES * PAGE
        assert peek(fd, VIOLATIONS) == 0


def look_at(snapshot: pyshare.Snapshot) -> None:
    with snapshot:
        snapshot.read(0, 2 * PAGE)
        bytes(memoryview(snapshot)[:PAGE])


def use(region: Region, timeout: float = SHORT) -> list[BaseException]:
    """Everything that the public interface does with a region; the errors."""
    errors: list[BaseException] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except (pyshare.ShareError, OSError) as error:
            str(error)
            errors.append(error)

    attempt(lambda: region.mprotect(PAGE, 7 * PAGE, pyshare.READ, timeout=timeout))
    attempt(lambda: region.write(0, b"data" * 100))
    attempt(lambda: region.mprotect(0, PAGES * PAGE, pyshare.READ_WRITE, timeout=timeout))
    attempt(lambda: region.read(0, region.size))
    attempt(lambda: region.lease(0, 2 * PAGE, timeout=timeout).release())
    attempt(lambda: region.lease(PAGE, PAGE, timeout=timeout, window=True).release())
    attempt(lambda: region.lock(3, timeout=timeout).release())
    attempt(lambda: region.frozen(timeout=timeout).release())
    attempt(lambda: look_at(region.snapshot(timeout=timeout)))
    attempt(lambda: region.dirty(0))
    attempt(region.participants)
    attempt(region.violations)
    attempt(region.protections)
    attempt(lambda: region.protection(3 * PAGE))
    attempt(lambda: region.generation)
    attempt(lambda: repr(region))
    return errors


def survives(fork: Callable[..., Child], body: Callable[[], object]) -> None:
    """In a child, so that a crash is seen as one and a hang ends."""
    child = fork(lambda _: body())
    assert child.wait() == 0


LAST = (1 << 64) - 1
OWNER_DIED, WAITING = 0x40000000, 0x80000000
OWNERS = [1 << 11 | 1, 1 << 11 | 2, 9 << 11 | 1, SLOTS + 1, 2047, WAITING, WAITING | 1 << 11 | 2, 0xFFFFFFFF]
HELD = [*OWNERS, *(owner << 32 for owner in OWNERS), *(owner << 32 | 9 << 11 | 1 for owner in OWNERS), LAST]
BLOWS = {
    "generation back": (GENERATION, [0, 1, 2]),
    "generation on": (GENERATION, [4, 5, 6 + RING, 1 << 31, (1 << 31) + 3, 1 << 32, 1 << 63, LAST - 1, LAST]),
    "attempt": (ATTEMPT, [0, 1, 4, 1 << 31, 1 << 63, LAST]),
    "complete": (COMPLETE, [0, 1, 4, 1 << 31, 1 << 63, LAST]),
    "kind": (KIND, [1, 2, 3, 0xFF, LAST]),
    "slots used": (SLOTS_USED, [0, SLOTS + 1, LAST]),
    "lock": (LOCK, [1, 2, WAITING, WAITING | 1 | 1 << 11, SLOTS + 1, 2047, 2046, 0xFFFFFFFF, 7 << 11 | 3]),
    "ack": (SLOTS_AT + ACK, [0, 1, WAITING, WAITING - 1, 0x40000003, 0xFFFFFFFF]),
    "other ack": (SLOTS_AT + SLOT_SIZE + ACK, [0, 1, WAITING, WAITING - 1, 0x40000003, 0xFFFFFFFF]),
    "error": (SLOTS_AT + ERROR, [4 << 32 | 12, 4 << 32 | 0xFFFFFFFF, 5 << 32 | 1, LAST]),
    "live": (SLOTS_AT + LIVE, [0, 1, OWNER_DIED, OWNER_DIED | 1, 0xFFFFFFFF]),
    "other live": (SLOTS_AT + SLOT_SIZE + LIVE, [0, 1, OWNER_DIED, OWNER_DIED | 1, 0xFFFFFFFF]),
    "status": (SLOTS_AT + STATUS, [0, 1, 2, 3, 1 << 4, 1 << 4 | 9, 2 << 4 | 2, 0xFFFFFFF2, 0xFFFFFFFF]),
    "free slot's status": (SLOTS_AT + 2 * SLOT_SIZE + STATUS, [1, 2, 3, 9, 1 << 4 | 2, 0xFFFFFFF2, 0xFFFFFFFF]),
    "pid": (SLOTS_AT + PID, [0, 1, 0x7FFFFFFF, 0xFFFFFFFF]),
    "lease": (LEASES_AT + 8, HELD),
    "user lock": (LOCKS_AT + 3 * 64, HELD),
    "freezer": (FREEZER, OWNERS),
    "thawing": (THAWING, OWNERS),
    "frozen": (FROZEN, [1, 4, 1 << 31, LAST]),
    "violations": (VIOLATIONS, [1, 17, 1 << 63, LAST]),
    "snapshots": (SNAPSHOTS, [1, 0xFF, 1 << 8, LAST]),
    "snapshot": (SNAPSHOT, [*range(16), *(1 << 4 | state for state in range(16)), 0xFFFFFFF1, 0xFFFFFFF2]),
    "dirty pages": (SNAPSHOT + 4, [1, 0xFFFFFFFF]),
    "leases held": (SLOTS_AT + LEASE_COUNT, [1, 0xFFFFFFFF]),
    "leases held by another": (SLOTS_AT + SLOT_SIZE + LEASE_COUNT, [1, 0xFFFFFFFF]),
    "pages being saved": (SLOTS_AT + SLOT_SIZE + SAVING, [1, 0xFFFFFFFF]),
    "states": (STATE_AT, [1, 2, 0x0302010004050607, LAST]),
    "stamps": (STAMP_AT, [1, 1 << 63, LAST]),
    "kept": (KEPT_AT, [7, LAST]),
    "closers": (CLOSERS, [1, 1 << 63, LAST]),
    "closer": (CLOSER, [1 << 11 | 1, 1 << 11 | 2, WAITING, WAITING | 2047, SLOTS + 1, 9 << 11 | 1, 0xFFFFFFFF]),
}
SMALL = {LOCK, SLOTS_USED, KIND, CLOSER, FREEZER, THAWING, SNAPSHOT, SNAPSHOT + 4} | {
    SLOTS_AT + i * SLOT_SIZE + at for i in range(3) for at in (ACK, LIVE, STATUS, PID, LEASE_COUNT, SAVING)
}


@pytest.mark.parametrize("blow", BLOWS)
def test_aimed_blow(blow: str, fork: Callable[..., Child]) -> None:
    """Each on a region with two participants; afterwards a third one joins, and all leave."""
    offset, values = BLOWS[blow]

    def body() -> None:
        for value in values:
            fd = new_region()
            first, second = pyshare.attach(fd), pyshare.attach(fd)
            for page in range(3):
                first.mprotect(page * PAGE, PAGE, pyshare.READ)
            poke(fd, offset, value, 4 if offset in SMALL else 8)
            use(first)
            use(second)
            with contextlib.suppress(pyshare.ShareError):
                use(third := pyshare.attach(fd, timeout=SHORT))
                third.close()
            for region in (first, second):
                region.close()
            os.close(fd)

    survives(fork, body)


def open_record(fd: int, first: int, count: int) -> None:
    poke(fd, FIRST, first)
    poke(fd, COUNT, count)
    poke(fd, ATTEMPT, peek(fd, GENERATION) + 1)


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 0), (0, PAGES + 1), (PAGES, 1), (PAGES - 1, 2), (LAST, 2), (1, LAST), (1 << 63, 1 << 63), (LAST, LAST)],
)
def test_record_outside_the_region(fd: int, first: int, count: int) -> None:
    with pyshare.attach(fd) as region:
        open_record(fd, first, count)
        with pytest.raises(pyshare.CorruptRegion) as caught:
            region.mprotect(0, PAGE, pyshare.READ)
        assert caught.value.field == "record"
        assert region.read(0, 4) == bytes(4)


def test_record_of_a_caller_that_never_was(fd: int) -> None:
    """An open record that is whole is finished, whoever wrote it."""
    with pyshare.attach(fd) as region:
        poke(fd, KIND + 4, pyshare.NONE, 4)
        open_record(fd, 3, 2)
        region.mprotect(0, PAGE, pyshare.READ)
        page = [region.protection(i * PAGE) for i in range(6)]
        assert page == [pyshare.READ, pyshare.READ_WRITE, pyshare.READ_WRITE, pyshare.NONE, pyshare.NONE, 3]
        with pytest.raises(pyshare.ProtectionError):
            region.read(3 * PAGE, 1)


@pytest.mark.parametrize("slot", [0, SLOTS, 2046])
def test_lock_held_by_no_slot(fd: int, slot: int) -> None:
    with pyshare.attach(fd) as region:
        poke(fd, LOCK, 1 << 11 | slot + 1 if slot else 1 << 11, 4)  # slot + 1 = 0 names nobody
        with pytest.raises(pyshare.CorruptRegion) as caught:
            region.mprotect(0, PAGE, pyshare.READ)
        assert caught.value.field == "lock"


@pytest.mark.parametrize("owner", [9 << 11 | 1, 1 << 11 | 2, WAITING | 5 << 11 | SLOTS])
def test_lock_held_by_the_dead(fd: int, owner: int) -> None:
    """By an epoch that is over, or a slot that nobody has: taken over."""
    with pyshare.attach(fd) as region:
        poke(fd, LOCK, owner, 4)
        assert region.mprotect(0, PAGE, pyshare.READ) == 1


def test_freeze_without_a_freezer(fd: int, fork: Callable[..., Child]) -> None:
    """Of which the closer is left: whoever wants a lease waits for its end as long as it says, and no longer."""

    def body(_: Child) -> None:
        with pyshare.attach(fd) as region:
            dead, freeze = 5 << 11 | 2, 2
            os.pwrite(fd, struct.pack("IIQQ", dead, freeze, 0, PAGES), CLOSER)
            os.pwrite(fd, struct.pack("Q", 1), CLOSERS)
            os.pwrite(fd, struct.pack("Q", 1), FROZEN)
            with pytest.raises(pyshare.PropagationTimeout):
                region.lease(0, PAGE, timeout=SHORT)
            os._exit(0)  # nobody will thaw it

    assert fork(body).wait() == 0


def test_ring_that_lies(fd: int) -> None:
    """An agent believes no range of the ring, and takes the whole map instead."""
    with pyshare.attach(fd) as region:
        for generation in (1, 2):
            region.mprotect(0, PAGE, pyshare.READ)
            os.pwrite(fd, struct.pack("<QQQ", generation, LAST - 1, 1 << 62), RING_AT + generation * RING_ENTRY)
        with pytest.raises(pyshare.ProtectionError) as caught:
            region.write(0, b"x")
        assert caught.value.generation is None  # its author cannot be told


def test_map_that_lies(fd: int) -> None:
    """Bits beyond a protection's are ignored."""
    os.pwrite(fd, b"\xf8" * PAGES, CUR_AT)
    with pyshare.attach(fd) as region:
        assert region.protections() == [(0, PAGES * PAGE, pyshare.READ_WRITE)]
        assert use(region) == []


# -- Fuzz ------------------------------------------------------------------------------------------------------------

SEED, CASES, BATCH = 20_240_607, 4_000, 500


def somewhere(rng: random.Random) -> int:
    """An offset in the control segment, where it hurts."""
    slot = SLOTS_AT + rng.randrange(3) * SLOT_SIZE
    return rng.choice(
        [
            rng.randrange(0, 288, 4),
            rng.randrange(SECTIONS, SECTIONS + 6 * 24, 4),
            LOCK,
            GENERATION,
            SLOTS_USED,
            rng.randrange(ATTEMPT, ATTEMPT + 64, 4),
            slot + rng.randrange(0, SLOT_SIZE, 4),
            slot + rng.choice([ACK, ERROR, ERROR + 4, LIVE, STATUS, PID]),
            RING_AT + rng.randrange(8) * RING_ENTRY + rng.randrange(0, RING_ENTRY, 4),
            CUR_AT + rng.randrange(0, PAGES, 4),
            OLD_AT + rng.randrange(0, PAGES, 4),
            LEASES_AT + rng.randrange(0, 8 * PAGES, 4),
            LEASES_AT + rng.randrange(0, 8 * 2, 4),
            LOCKS_AT + 3 * 64 + rng.randrange(0, 8, 4),
            rng.randrange(CLOSERS, CLOSER + 3 * 24, 4),
            rng.randrange(FREEZER, FROZEN + 8, 4),
            rng.randrange(SNAPSHOT, SNAPSHOT + 2 * 16, 4),
            rng.randrange(TICKET, TICKET + 3 * 24, 4),
            rng.choice([KEPT_AT, STATE_AT]) + rng.randrange(0, PAGES, 4),
            STAMP_AT + rng.randrange(0, 8 * PAGES, 4),
            VIOLATIONS,
            VIOLATION_AT + rng.randrange(0, 128, 4),
        ]
    )


def mutation(rng: random.Random, word: int) -> int:
    """Another value for a 32-bit word."""
    return rng.choice(
        [
            word ^ 1 << rng.randrange(32),
            rng.getrandbits(32),
            rng.randrange(16),
            word + rng.choice([-1, 1]),
            rng.choice([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, OWNER_DIED]),
        ]
    )


def mutate(rng: random.Random, fd: int, where: Callable[[random.Random], int] = somewhere) -> None:
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        offset = where(rng)
        poke(fd, offset, mutation(rng, peek(fd, offset, 4)), 4)


def behind_the_header(rng: random.Random) -> int:
    """The header is read once, at attach: what is mutated afterwards lies behind it."""
    while (offset := somewhere(rng)) < LOCK:
        pass
    return offset


def fuzz_case(rng: random.Random) -> None:
    """Mutate, attach, use; or attach, mutate, use; with one or two participants."""
    fd, regions = new_region(), []
    early = rng.random() < 0.5
    try:
        if early:
            mutate(rng, fd)
        for _ in range(rng.choice([1, 2])):
            regions.append(pyshare.attach(fd, timeout=SHORT))
        if not early:
            regions[0].mprotect(2 * PAGE, 3 * PAGE, pyshare.READ, timeout=SHORT)
            mutate(rng, fd, behind_the_header)
        for region in regions:
            use(region)
    except (pyshare.ShareError, OSError):
        pass
    finally:
        for region in regions:
            region.close()
        os.close(fd)


@contextlib.contextmanager
def shared_word() -> Iterator[memoryview]:
    """A number that a child leaves to us when it crashes."""
    with mmap.mmap(-1, 8) as memory, memoryview(memory) as plain, plain.cast("q") as word:
        yield word


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_fuzz(batch: int, fork: Callable[..., Child]) -> None:
    with shared_word() as word:

        def body(_: Child) -> None:
            for case in range(batch * BATCH, (batch + 1) * BATCH):
                word[0] = case
                fuzz_case(random.Random(SEED + case))

        status = fork(body).wait()
        assert status == 0, f"case {word[0]} of seed {SEED}: fuzz_case(random.Random({SEED + word[0]}))"


def test_scribbler(fork: Callable[..., Child]) -> None:
    """Another process scribbles over the control segment, as fast as it can, while two participants work."""
    fd, seconds = new_region(), 4.0

    def scribble(child: Child) -> None:
        rng, words = random.Random(SEED), mmap.mmap(fd, VIOLATION_AT + PAGE)
        child.say()
        while not select.select([child._receive], [], [], 0)[0]:
            for _ in range(100):
                offset = behind_the_header(rng)
                words[offset : offset + 4] = (mutation(rng, peek(fd, offset, 4)) % (1 << 32)).to_bytes(4, "little")

    def work(_: Child) -> None:
        end, errors = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            with contextlib.suppress(pyshare.ShareError, OSError), pyshare.attach(fd, timeout=SHORT) as region:
                for _round in range(20):
                    errors += len(use(region, 0.001))
        assert errors, "the scribbler never hit anything"

    scribbler = fork(scribble)
    scribbler.hear()
    workers = [fork(work), fork(work)]
    assert [worker.wait() for worker in workers] == [0, 0]
    scribbler.say()
    assert scribbler.wait() == 0
    os.close(fd)
