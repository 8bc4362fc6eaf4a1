"""Memory as create() was asked for it: there from the beginning, of huge pages, from a node, locked; or an OSError.

What a mapping is, is asked of the kernel (/proc/PID/smaps, numa_maps).  What needs a privilege, a pool of huge pages or
a cgroup makes it, puts it back, and is skipped where that is not permitted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import select
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Child, idle, until
from kernel import SECTIONS, die_quietly, libc, mapped

import pyshare
from pyshare import (
    NONE,
    READ,
    READ_WRITE,
    CorruptRegion,
    ProtectionError,
    Region,
    ShareError,
    _creation,
)

PAGE, HUGE, GIB = 4096, 2 << 20, 1 << 30
THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
Fork = Callable[..., Child]
Joined = Callable[..., Child]


def smaps(address: int, length: int, pid: int | str = "self") -> list[dict[str, str]]:
    """What the kernel says of each mapping in the range."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M)[1:]
    found = []
    for part in parts:
        low, high = (int(bound, 16) for bound in part.split(" ", 1)[0].split("-"))
        if low < address + length and address < high:
            found.append({key: value.strip() for key, value in (line.split(":", 1) for line in part.splitlines()[1:])})
    return found


def flags(region: Region, pid: int | str = "self", *, at: int = 0) -> set[str]:
    """Those (VmFlags) that all mappings of the data have."""
    return set.intersection(*(set(each["VmFlags"].split()) for each in smaps(region.address + at, region.size, pid)))


def kib(region: Region, field: str) -> int:
    return sum(int(each[field].split()[0]) for each in smaps(region.address, region.size))


def allocated(region: Region) -> int:
    return os.fstat(region.fileno()).st_blocks * 512


@contextlib.contextmanager
def setting(path: Path, value: str) -> Iterator[str]:
    """A setting of the machine, put back at the end; what it came to be."""
    try:
        before = re.sub(r".*\[(\w+)\].*", r"\1", path.read_text().strip())
        path.write_text(value)
    except OSError as error:
        pytest.skip(f"{path}: {error.strerror}")
    try:
        yield path.read_text().strip()
    finally:
        path.write_text(before)


@contextlib.contextmanager
def pool(kib: int, pages: int) -> Iterator[Path]:
    """So many more huge pages that are free; where their number can be read."""
    path = Path(f"/sys/kernel/mm/hugepages/hugepages-{kib}kB")
    if not path.is_dir():
        pytest.skip(f"no huge pages of {kib} KiB")
    there = int((path / "nr_hugepages").read_text())
    with setting(path / "nr_hugepages", str(there + pages)) as got:
        if int(got) < there + pages:
            pytest.skip(f"no memory for {pages} huge pages of {kib} KiB")
        yield path


def free(path: Path) -> int:
    return int((path / "free_hugepages").read_text()) - int((path / "resv_hugepages").read_text())


# -- Arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "error", "says"),
    [
        ("huge", "4M", ValueError, "'4M'"),
        ("huge", 2, ValueError, "not 2"),
        ("huge", "THP", ValueError, "'thp', '2M' or '1G'"),
        ("numa", 4711, ValueError, "4711"),
        ("numa", -1, ValueError, "-1"),
        ("numa", "local", ValueError, "'interleave' or a node"),
        ("numa", 0.5, TypeError, "0.5"),
        ("numa", True, TypeError, "True"),
        ("reserve", "yes", TypeError, "reserve must be True or False, not 'yes'"),
        ("lock_memory", None, TypeError, "lock_memory must be True or False, not None"),
    ],
)
def test_a_wrong_argument_is_told(argument: str, value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        pyshare.create("wrong", size=PAGE, **{argument: value})
    assert "wrong" not in pyshare.names()


# -- Reserved ----------------------------------------------------------------------------------------------------------


def test_reserved_memory_is_there() -> None:
    size = 8 * HUGE + 5
    with pyshare.create(size=size) as usual, pyshare.create(size=size, reserve=True) as region:
        assert allocated(usual) < size < allocated(region)
        assert len(region) == size
        assert region.dirty(0) == []  # and nobody has touched it
        with region.snapshot():
            region.buf[:] = b"\1" * size


def test_what_is_restored_stays_reserved() -> None:
    with pyshare.create(size=16 * PAGE, reserve=True) as region, region.snapshot() as empty:
        region.buf[:] = b"\1" * region.size
        before = allocated(region)
        region.restore(empty)
        assert allocated(region) >= before  # a look at a hole would fill it
        assert region.read(0, region.size) == bytes(region.size)


def test_more_than_the_machine_has_is_an_error() -> None:
    before = os.listdir("/proc/self/fd")
    for lock_memory in (False, True):
        with pytest.raises(OSError, match=r"reserved: \d+ are needed .* this machine .* leaves \d+$") as caught:
            pyshare.create("much", size=1 << 45, reserve=True, lock_memory=lock_memory)
        assert caught.value.errno == errno.ENOMEM
    assert os.listdir("/proc/self/fd") == before
    assert pyshare.names() == []


def test_the_size_of_dev_shm_does_not_matter(fork: Fork) -> None:
    new_mounts, private = 0x20000, 0x44000

    def body(child: Child) -> None:
        if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
            child.say("not permitted")
            return
        assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m") == 0
        with pyshare.create("large", size=8 * HUGE, reserve=True) as region, pyshare.attach("large") as other:
            other.buf[:] = b"\1" * region.size
            assert os.statvfs("/dev/shm").f_bfree * PAGE > HUGE // 4
        child.say("done")

    said = fork(body).hear()
    if said != "done":
        pytest.skip("a mount namespace of its own is not permitted here")


class Interrupted(Exception):
    pass


def _interrupt(*_: object) -> None:
    raise Interrupted


def test_a_signal_interrupts_it_and_nothing_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    previous = signal.signal(signal.SIGALRM, _interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Interrupted):
            pyshare.create(size=GIB, reserve=True)  # takes some 0.3 s
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert os.listdir("/proc/self/fd") == before


def test_signals_that_keep_coming_do_not_keep_it_from_its_end() -> None:
    came = []
    previous = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        with pyshare.create(size=128 << 20, reserve=True) as region:
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert allocated(region) > region.size
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert came


# -- ... and limits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup below this process's own, of either version, limited to 64 MiB."""
    own = next((group for group in _creation._groups()), None)
    if own is None:
        pytest.skip("no memory cgroup can be seen")
    group = own / f"pyshare-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        limit = next(
            (group / name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists()), None
        )
        if limit is None:
            pytest.skip("cgroups below this one have no limit of memory")
        limit.write_text(str(64 << 20))
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_the_limit_of_a_cgroup_is_an_error_and_kills_nobody(cgroup: Path, fork: Fork) -> None:
    """Where page cache fills it, that makes room."""

    def body(child: Child) -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        with pytest.raises(OSError, match=re.escape(f"limit of memory cgroup {cgroup} leaves")) as caught:
            pyshare.create(size=80 << 20, reserve=True)
        assert caught.value.errno == errno.ENOMEM
        with tempfile.TemporaryFile(dir="/var/tmp") as file:
            for _ in range(40):
                file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
            with pyshare.create(size=40 << 20, reserve=True) as region:
                for at in range(0, region.size, PAGE):
                    region.buf[at] = 1
                with pytest.raises(OSError, match="leaves"):
                    pyshare.create(size=30 << 20, reserve=True)
        child.say()

    child = fork(body)
    assert child.hear() == "ok"
    assert child.wait() == 0


VERSION_2 = {"inactive_file": 20, "active_file": 30, "file_dirty": 4, "file_writeback": 1}
VERSION_1 = {"total_cache": 50} | {f"total_{name.removeprefix('file_')}": value for name, value in VERSION_2.items()}


@pytest.mark.parametrize(
    ("stat", "files", "swap", "rooms"),
    [
        (VERSION_2, {"memory.max": "1000", "memory.current": "700"}, 0, [345]),
        (VERSION_2, {"memory.max": "max", "memory.current": "700"}, 0, []),
        (VERSION_2, {"memory.max": "1000", "memory.current": "700"}, 100, [445]),
        (
            VERSION_2,
            {"memory.max": "1000", "memory.current": "700", "memory.swap.max": "70", "memory.swap.current": "10"},
            100,
            [405],
        ),
        (VERSION_2, {"memory.max": "1000", "memory.current": "700", "memory.swap.max": "max"}, 100, [445]),
        (VERSION_1, {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "700"}, 100, [445]),
        (
            VERSION_1,
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "700",
                "memory.memsw.limit_in_bytes": "1050",
                "memory.memsw.usage_in_bytes": "750",
            },
            100,
            [445, 345],
        ),
    ],
)  # fmt: skip
def test_limits_as_the_kernel_writes_them(
    tmp_path: Path, stat: dict[str, int], files: dict[str, str], swap: int, rooms: list[int]
) -> None:
    (tmp_path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    version = _creation._version_1 if stat is VERSION_1 else _creation._version_2
    assert list(version(tmp_path, stat, swap)) == rooms


@pytest.mark.parametrize(
    ("cgroup", "mount", "found"),
    [
        ("0::/a/b", "30 24 0:26 / /cg rw - cgroup2 cgroup2 rw", ["/cg/a/b", "/cg/a", "/cg"]),
        ("0::/", "30 24 0:26 / /cg rw - cgroup2 cgroup2 rw", ["/cg"]),
        ("0::/outside", "30 24 0:26 /own /cg rw - cgroup2 cgroup2 rw", ["/cg"]),
        ("4:memory:/own/a", "30 24 0:26 /own /cg rw shared:9 - cgroup cgroup rw,memory", ["/cg/a", "/cg"]),
        ("4:cpu:/a\n0::/b", "30 24 0:26 / /cg rw - cgroup cgroup rw,memory", []),
    ],
)
def test_cgroups_as_the_kernel_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, mount: str, found: list[str]
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(cgroup + "\n")
    (tmp_path / "self/mountinfo").write_text(f"29 1 8:1 / / rw - ext4 /dev/root rw\n{mount}\n")
    monkeypatch.setattr(_creation, "PROC", tmp_path)
    assert list(_creation._groups()) == [Path(path) for path in found]


# -- Huge pages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def region() -> Iterator[Region]:
    """Three and a half huge pages of data."""
    with pool(2048, 16), pyshare.create(size=7 * HUGE // 2, huge="2M") as made:
        yield made


def test_pages_are_huge_and_the_size_is_exact(region: Region) -> None:
    assert (region.page_size, region.size, region.engine) == (HUGE, 7 * HUGE // 2, "mprotect")
    assert {each["KernelPageSize"] for each in smaps(region.address, region.size)} == {"2048 kB"}
    region.buf[region.size - 1] = 7
    with pytest.raises(IndexError):
        region.buf[region.size]
    assert region.protections() == [(0, region.size, READ_WRITE)]
    assert region.dirty(0) == [(0, region.size)]
    with pyshare.attach(region.fileno()) as other:
        assert (other.page_size, other.read(region.size - 2, 2)) == (HUGE, b"\0\7")


def test_one_gibibyte_pages() -> None:
    with pool(1 << 20, 2), pyshare.create(size=PAGE, huge="1G", prot=READ) as region:
        assert region.page_size == GIB
        with region.lease(0, PAGE) as lease:
            lease.view[5] = 7
        assert region.mprotect(0, PAGE, NONE) == 1
        assert region.mprotect(0, PAGE, READ) == 2
        assert region.read(5, 1) == b"\7"


@pytest.mark.parametrize(("offset", "length"), [(PAGE, HUGE), (0, PAGE), (HUGE, HUGE + PAGE), (3 * HUGE, 2 * HUGE)])
def test_ranges_are_whole_huge_pages(region: Region, offset: int, length: int) -> None:
    for call in (lambda: region.mprotect(offset, length, READ), lambda: region.lease(offset, length)):
        with pytest.raises(ValueError, match=rf"page size {HUGE}|ends behind"):
            call()
    assert region.generation == 0


def test_changes_reach_everybody(region: Region, joined: Joined) -> None:
    def change(child: Child) -> None:
        child.say()
        child.hear()
        region.mprotect(HUGE, HUGE, NONE)
        region.mprotect(3 * HUGE, region.size - 3 * HUGE, READ)
        idle(child)

    one, two = joined(), joined(change)
    two.say()
    assert two.hear() == "ok"
    wanted = [(0, HUGE, READ_WRITE), (HUGE, HUGE, NONE), (2 * HUGE, HUGE, READ_WRITE), (3 * HUGE, HUGE, READ)]
    for pid in (os.getpid(), one.pid, two.pid):
        assert mapped(pid, region) == wanted
    region.mprotect(0, region.size, READ_WRITE)
    assert mapped(two.pid, region) == [(0, 4 * HUGE, READ_WRITE)]


def test_a_stray_store_dies(region: Region, crash: Callable[[Callable[[Child], object]], tuple[int, str]]) -> None:
    region.mprotect(HUGE, HUGE, READ)

    def stray(_: Child) -> None:
        die_quietly()
        region.buf[HUGE + 5 * PAGE] = 1

    code, said = crash(stray)
    assert code == -signal.SIGSEGV
    assert f"offset {HUGE + 5 * PAGE}: page 1 is READ since change 1" in said


def test_a_stray_store_raises_and_changes_nothing(region: Region) -> None:
    """Twice, since what was private is shared again after the first; and what was mapped stays so."""
    region.write(HUGE, b"text")
    region.mprotect(0, region.size, READ)
    region.on_violation("raise")
    for offset in (HUGE + 1, 2 * HUGE - 1, 3 * HUGE + 5, HUGE + 1):
        with pytest.raises(ProtectionError) as caught:
            region.buf[offset] = 1
        assert caught.value.offset == offset // HUGE * HUGE
        assert f"page {offset // HUGE} (offset {offset})" in str(caught.value)
        assert region.read(HUGE, 5) == b"text\0"
    with region.guard(), contextlib.suppress(ProtectionError):
        region.buf[HUGE + 1] = 1
    region.mprotect(0, region.size, READ_WRITE)
    region.buf[HUGE + 1] = 0x45
    with pyshare.attach(region.fileno()) as other:
        assert other.read(HUGE, 4) == b"tExt"
    assert flags(region) >= {"dc", "dd"}


def test_what_was_closed_behind_our_back_is_opened_again(region: Region) -> None:
    region.write(HUGE, b"text")
    assert libc.mprotect(region.address + HUGE, HUGE, 0) == 0
    assert region.read(HUGE, 4) == b"text"
    assert mapped(os.getpid(), region) == [(0, 4 * HUGE, READ_WRITE)]


def test_a_forbidden_load_reads_zeros_and_raises(region: Region) -> None:
    region.buf[5] = 7
    region.mprotect(0, HUGE, NONE)
    region.on_violation("raise")
    with pytest.raises(ProtectionError), region.guard():
        assert region.buf[5] == 0
    region.mprotect(0, HUGE, READ)
    assert region.buf[5] == 7


def test_a_stray_store_waits(region: Region, joined: Joined) -> None:
    def store(child: Child) -> None:
        region.on_violation("wait")
        child.say()
        region.buf[HUGE + 9] = 7
        child.say()

    region.mprotect(HUGE, HUGE, READ)
    child = joined(store)
    assert not select.select([child._receive], [], [], 0.1)[0]
    region.mprotect(HUGE, HUGE, READ_WRITE)
    assert child.hear() == "ok"
    assert region.read(HUGE + 9, 1) == b"\7"


@pytest.mark.parametrize("window", [False, True], ids=["in place", "window"])
def test_leases_and_who_dies_with_one(region: Region, joined: Joined, window: bool) -> None:
    def hold(child: Child) -> None:
        with region.lease(HUGE, 2 * HUGE, window=window) as lease:
            lease.view[3] = 7
            child.say()
            child.hear()

    region.mprotect(0, region.size, READ)
    child = joined(hold)
    with pytest.raises(pyshare.PropagationTimeout) as caught:
        region.lease(0, 2 * HUGE, timeout=0)
    assert caught.value.pids == [child.pid]
    child.kill()
    with region.lease(0, region.size, window=window) as lease:
        assert lease.abandoned
        assert lease.view[HUGE + 3] == 7
        lease.view[region.size - 1] = 9
    with region.lease(0, HUGE, window=window) as lease:
        assert not lease.abandoned
    assert region.read(region.size - 1, 1) == b"\t"
    assert mapped(os.getpid(), region) == [(0, 4 * HUGE, READ)]


def test_locks_and_freezes(region: Region, joined: Joined) -> None:
    def count(child: Child) -> None:
        child.say()
        for _ in range(300):
            with region.lock(5):
                region.buf[PAGE : PAGE + 8] = struct.pack("Q", struct.unpack("Q", region.buf[PAGE : PAGE + 8])[0] + 1)
        child.say()

    children = [joined(count) for _ in range(3)]
    for child in children:
        assert child.hear() == "ok"
    assert struct.unpack("Q", region.read(PAGE, 8)) == (900,)
    region.mprotect(0, HUGE, NONE)
    before = region.protections()
    with region.frozen():
        assert region.protections() == [(0, region.size, READ)]
    assert region.protections() == before


def test_a_child_that_is_killed_in_a_change_leaves_none_half_done(region: Region, fork: Fork) -> None:
    for point in ("C4_map", "C5_publish", "A2_apply", "H1_take"):
        fork(lambda _: (region.lease(0, HUGE), region.mprotect(HUGE, 2 * HUGE, READ)), point=f"{point}=kill").wait()
        region.mprotect(0, region.size, READ_WRITE)
        assert mapped(os.getpid(), region) == [(0, 4 * HUGE, READ_WRITE)]


def test_system_calls_store_by_way_of_the_region(region: Region) -> None:
    receiving, sending = os.pipe()
    os.write(sending, b"hello")
    assert region.readinto(receiving, region.size - 5, 5) == 5
    assert region.read(region.size - 5, 5) == b"hello"
    os.close(receiving)
    os.close(sending)


def test_no_snapshots_but_what_was_saved_elsewhere(region: Region, tmp_path: Path) -> None:
    with pytest.raises(ShareError, match=f"pages have {HUGE} bytes"):
        region.snapshot()
    with pyshare.create(size=region.size) as usual:
        usual.write(HUGE - 1, b"text")
        with usual.snapshot() as snap:
            snap.save(tmp_path / "image")
    region.buf[:] = b"\1" * region.size
    region.mprotect(0, region.size, READ)
    region.restore(tmp_path / "image")
    assert region.read(0, region.size) == bytes(HUGE - 1) + b"text" + bytes(region.size - HUGE - 3)
    with pyshare.create(size=PAGE) as usual, pytest.raises(ValueError, match="bytes"):
        region.restore(usual.snapshot())


def test_an_exhausted_pool_is_an_error() -> None:
    before = os.listdir("/proc/self/fd")
    with pool(2048, 8) as path:
        there = free(path)
        with pyshare.create(size=5 * HUGE, huge="2M") as region:
            left = free(path)
            assert left <= there - 6
            with pytest.raises(
                OSError, match=rf"\d+ huge pages of 2048 KiB are needed.* and {left} are free"
            ) as caught:
                pyshare.create("huge", size=(left + 1) * HUGE, huge="2M")
            assert caught.value.errno == errno.ENOMEM
            assert free(path) == left
            region.buf[:] = b"\1" * region.size
        assert free(path) == there
    assert os.listdir("/proc/self/fd") == before
    assert pyshare.names() == []


def test_the_pool_has_its_pages_back_when_the_last_holder_is_killed(fork: Fork) -> None:
    def body(child: Child) -> None:
        held = pyshare.create(size=HUGE, huge="2M")
        held.buf[0] = 1
        child.say()
        child.hear()

    with pool(2048, 8) as path:
        there = free(path)
        child = fork(body)
        child.hear()
        assert free(path) < there
        child.kill()
        child.wait()
        until(lambda: free(path) == there)


def test_huge_pages_cannot_be_changed_entry_by_entry(region: Region) -> None:
    for call in (
        lambda: pyshare.create(size=HUGE, huge="2M", engine="uffd"),
        lambda: pyshare.attach(region.fileno(), engine="uffd"),
    ):
        with pytest.raises(OSError, match="engine 'uffd' cannot change") as caught:
            call()
        assert caught.value.errno == errno.EOPNOTSUPP


PAGE_SIZE, FLAGS = 12, SECTIONS + 16 * 24 + 4  # in ext/segment/layout.h


@pytest.mark.parametrize(
    ("offset", "value", "field"), [(PAGE_SIZE, HUGE, "page_size"), (PAGE_SIZE, 1, "page_size"), (FLAGS, 64, "flags")]
)
def test_a_header_that_lies_is_refused(offset: int, value: int, field: str) -> None:
    with pyshare.create(size=HUGE) as region:
        os.pwrite(region.fileno(), struct.pack("I", value), offset)
        with pytest.raises(CorruptRegion) as caught:
            pyshare.attach(region.fileno())
        assert caught.value.field == field


# -- Transparent huge pages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["mprotect", "uffd"])
def test_every_mapping_asks_for_transparent_huge_pages(engine: str, joined: Joined) -> None:
    with pyshare.create(size=2 * HUGE, huge="thp", engine=engine, on_violation="raise") as region:
        assert region.page_size == PAGE
        region.mprotect(0, PAGE, READ)
        with pytest.raises(ProtectionError):
            region.buf[5] = 1
        region.mprotect(0, PAGE, READ_WRITE)
        child = joined()
        assert "hg" in flags(region) & flags(region, child.pid)
        assert len(smaps(region.address, region.size)) == 1
        with region.lease(0, PAGE, window=True) as lease:
            lease.view[0] = 1
            assert "hg" in flags(region, at=region.size + (64 << 10))
        with pyshare.attach(region.fileno(), engine=engine) as other:
            assert "hg" in flags(other)


def test_the_kernel_gives_them_where_it_may() -> None:
    with setting(THP, "advise"):
        for reserve in (False, True):
            with pyshare.create(size=8 * HUGE, huge="thp", reserve=reserve) as region:
                region.buf[:] = b"\1" * region.size
                if not reserve and not kib(region, "ShmemPmdMapped"):
                    pytest.skip("the kernel has no huge pages just now")
                assert kib(region, "ShmemPmdMapped") == region.size >> 10
                region.mprotect(PAGE, PAGE, READ)
                assert mapped(os.getpid(), region)[1] == (PAGE, PAGE, READ)
                assert kib(region, "ShmemPmdMapped") == (region.size - HUGE) >> 10


# -- NUMA --------------------------------------------------------------------------------------------------------------


def test_one_node_leaves_no_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_creation, "NODES", tmp_path)
    (tmp_path / "has_memory").write_text("0\n")
    for numa in (0, "interleave"):
        with pytest.warns(UserWarning, match=f"numa={numa!r} is ignored") as caught:
            pyshare.create(size=PAGE, numa=numa).close()
        assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"of \[0\], not 1"):
        pyshare.create(size=PAGE, numa=1)
    monkeypatch.setattr(_creation, "NODES", tmp_path / "no")
    with pytest.warns(UserWarning, match="ignored"):
        pyshare.create(size=PAGE, numa=0).close()


def policy_at(region: Region, pid: int | str = "self") -> str:
    lines = Path(f"/proc/{pid}/numa_maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if int(line.split()[0], 16) == region.address)


@pytest.mark.parametrize("reserve", [False, True], ids=["as touched", "reserved"])
@pytest.mark.parametrize(("numa", "found"), [(0, "prefer:0"), ("interleave", "interleave:0")])
def test_nodes_are_those_of_the_memory_whoever_maps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, joined: Joined, numa: int | str, found: str, reserve: bool
) -> None:
    """As on a machine of two nodes, of which this process may use one."""
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("a kernel without NUMA")
    monkeypatch.setattr(_creation, "NODES", tmp_path)
    (tmp_path / "has_memory").write_text("0-1\n")
    with pyshare.create(size=HUGE, numa=numa, reserve=reserve) as region:
        region.buf[:] = b"\1" * region.size
        child = joined()
        assert policy_at(region).startswith(found)
        assert policy_at(region, child.pid) == policy_at(region)
        with pyshare.attach(region.fileno()) as other:
            other.buf[5] = 1
            assert policy_at(other) == policy_at(region)


def test_nodes_of_huge_pages_are_chosen_once_and_the_threads_policy_comes_back() -> None:
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("a kernel without NUMA")

    def own_policy() -> int:
        mode = ctypes.c_int(-1)
        assert libc.syscall(239, ctypes.byref(mode), None, 0, None, 0) == 0  # get_mempolicy
        return mode.value

    before = own_policy()
    memory = _creation.Memory(HUGE, 0, False, (_creation.INTERLEAVE, [0]))
    with pool(2048, 8):
        fd = _creation.create(HUGE, READ_WRITE, 8, 0o600, 0, "", memory)
        with pyshare.attach(fd) as region:
            region.buf[0] = 1
        os.close(fd)
    assert own_policy() == before


# -- Locked ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["mprotect", "uffd"])
def test_every_mapping_is_locked(engine: str, joined: Joined) -> None:
    """Also where it was private for a while, and where leases write."""
    with pyshare.create(size=2 * HUGE, lock_memory=True, engine=engine, on_violation="raise") as region:
        assert kib(region, "Rss") == 0
        region.buf[:HUGE] = b"\1" * HUGE
        assert kib(region, "Locked") == HUGE >> 10
        region.mprotect(0, PAGE, NONE)
        with pytest.raises(ProtectionError), region.guard():
            region.buf[5] = 1
        region.mprotect(0, PAGE, READ_WRITE)
        assert {"lo", "lf"} <= flags(region)
        child = joined()
        assert {"lo", "lf"} <= flags(region, child.pid)
        with region.lease(0, PAGE, window=True) as lease:
            lease.view[0] = 1
            assert "lo" in flags(region, at=region.size + (64 << 10))
        with pyshare.attach(region.fileno(), engine=engine) as other:
            assert kib(other, "Rss") == HUGE >> 10  # what is there is brought in


def test_reserved_and_locked_is_all_there() -> None:
    with pyshare.create(size=4 * HUGE, lock_memory=True, reserve=True) as region:
        assert kib(region, "Locked") == region.size >> 10
        with pyshare.attach(region.fileno()) as other:
            assert kib(other, "Rss") == region.size >> 10
    with pyshare.create(size=HUGE, lock_memory=True, reserve=True, prot=NONE) as region:
        assert kib(region, "Rss") == 0
        region.mprotect(0, region.size, READ_WRITE)
        assert allocated(region) > region.size


def without_privilege(limit: int) -> None:
    """This process may lock so many bytes."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.syscall(125, header, data) == 0  # capget
    words = list(struct.unpack("6I", data.raw))
    words[0] &= ~(1 << 14)  # CAP_IPC_LOCK
    assert libc.syscall(126, header, struct.pack("6I", *words)) == 0  # capset


@pytest.mark.parametrize(("limit", "error"), [(HUGE, errno.ENOMEM), (0, errno.EPERM)])
def test_a_limit_is_told_and_nothing_is_left(limit: int, error: int, fork: Fork) -> None:
    with pyshare.create(size=2 * HUGE, lock_memory=True) as region:

        def body(child: Child) -> None:
            fd = os.dup(region.fileno())
            region.close()
            without_privilege(limit)
            before = os.listdir("/proc/self/fd")
            for call in (
                lambda: pyshare.create("locked", size=2 * HUGE, lock_memory=True),
                lambda: pyshare.attach(fd),
            ):
                with pytest.raises(OSError, match=f"may lock {limit} bytes in all") as caught:
                    call()
                assert caught.value.errno == error
            assert os.listdir("/proc/self/fd") == before
            assert pyshare.names() == []
            if limit:
                pyshare.create(size=PAGE, lock_memory=True).close()
            child.say()

        child = fork(body)
        assert child.hear() == "ok"
        assert child.wait() == 0
        assert len(region.participants()) == 1


def test_a_child_that_may_not_lock_takes_part_without(fork: Fork) -> None:
    def parent(child: Child) -> None:
        with pyshare.create(size=2 * HUGE, lock_memory=True) as region:
            without_privilege(PAGE)

            def body(inner: Child) -> None:
                region.buf[5] = 7
                assert "lo" not in flags(region)
                assert region.mprotect(0, PAGE, READ) == 1
                with pytest.raises(OSError, match="may lock") as caught:
                    region.lease(0, PAGE, window=True)
                assert caught.value.errno == errno.ENOMEM
                with open("/dev/zero", "rb") as zeros, pytest.raises(OSError, match="twice its data"):
                    region.readinto(zeros, 2 * PAGE, 1)
                with region.lease(0, PAGE) as lease:
                    lease.view[6] = 8
                inner.say()

            inner = Child(body)
            assert inner.hear() == "ok"
            assert inner.wait() == 0
            inner.end()
            assert region.read(5, 2) == b"\7\10"
            assert "lo" in flags(region)
        child.say()

    child = fork(parent)
    assert child.hear() == "ok"
    assert child.wait() == 0


def test_huge_pages_need_no_lock(fork: Fork) -> None:
    def body(child: Child) -> None:
        without_privilege(0)
        with pyshare.create(size=HUGE, huge="2M", lock_memory=True) as region:
            region.buf[0] = 1
        child.say()

    with pool(2048, 8):
        assert fork(body).hear() == "ok"


# -- Seen from outside -------------------------------------------------------------------------------------------------


def test_observers_and_commands_know_of_huge_pages(run_python: Callable[..., Any]) -> None:
    with pool(2048, 8), pyshare.create("huge", size=HUGE + 5, huge="2M") as region:
        region.write(HUGE, b"text")
        region.mprotect(HUGE, 5, READ)
        with pyshare.attach("huge", readonly=True) as seen:
            assert (seen.page_size, seen.size, seen.read(HUGE, 5)) == (HUGE, HUGE + 5, b"text\0")
            assert bytes(seen.buf[HUGE:]) == b"text\0"
            assert seen.protections() == region.protections() == [(0, HUGE, READ_WRITE), (HUGE, 5, READ)]
        for command in ("show", "map"):
            told = run_python("import sys, pyshare.__main__ as m; sys.exit(m.main())", command, "huge", "--json")
            assert json.loads(told.stdout)["page_size"] == HUGE, told.stderr
        assert "huge" in pyshare.names()
