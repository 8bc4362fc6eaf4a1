"""Participants that cannot lock their slot's byte: an observer has a lock to read on it, or the memory cannot be opened
anew, by a server that has given up its privileges or shut itself up without /proc."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE, Child, idle, until
from members import in_new_pids, successor_of

import pyshare
from pyshare import READ, READ_WRITE, Region

PAGE = 4096
SNAPSHOTS = 1 << 62  # the first byte of them (ext/segment/layout.h)
Fork = Callable[..., Child]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(size=16 * PAGE, max_participants=4, engine=request.param) as made:
        yield made


def alive(region: Region) -> list[int]:
    return sorted(one.pid for one in region.participants() if one.alive)


@contextlib.contextmanager
def observed(region: Region, first: int, count: int) -> Iterator[None]:
    """By somebody who has locks to read on these bytes, as far as they are to be had; 0: to the end."""
    set_lock, lock = 37, struct.Struct("hhqqi4x")  # F_OFD_SETLK, struct flock
    fd = region.readonly_fd()
    try:
        for at in range(first, first + count) if count else [first]:
            with contextlib.suppress(BlockingIOError):
                fcntl.fcntl(fd, set_lock, lock.pack(fcntl.F_RDLCK, os.SEEK_SET, at, min(count, 1), 0))
        yield
    finally:
        os.close(fd)


def works(region: Region, fork: Fork) -> None:
    """A forked child takes part; when it is killed nobody waits for it, and its slot is used again."""

    def body(child: Child) -> None:
        region.write(0, b"child")
        idle(child)

    region.mprotect(0, region.size, READ_WRITE)
    for _ in range(8):  # more than there are slots
        child = fork(body)
        assert child.hear() == "ok"
        assert region.read(0, 5) == b"child"
        assert child.pid in alive(region)
        region.mprotect(0, region.size, READ)
        child.kill()
        region.mprotect(0, region.size, READ_WRITE, timeout=PATIENCE)
        assert child.wait() == -signal.SIGKILL
        assert child.pid not in alive(region)


def test_an_observer_keeps_nobody_away(region: Region, fork: Fork) -> None:
    with observed(region, 1, 0):
        works(region, fork)
        with pyshare.attach(region.fileno(), timeout=PATIENCE) as other:
            other.mprotect(0, PAGE, READ)
        assert alive(region) == [os.getpid()]
    works(region, fork)


def test_a_pid_that_is_used_again_is_not_who_had_it(fork: Fork) -> None:
    """There is no byte to tell by; whoever has the pid has begun at another time."""

    def body() -> None:
        with pyshare.create(size=PAGE, max_participants=4) as region, observed(region, 1, 0):
            begun, dead = time.monotonic(), Child(idle)
            assert dead.hear() == "ok"
            until(lambda: time.monotonic() > begun + 0.05)  # times are told in hundredths of a second
            dead.kill()
            dead.wait()
            second = successor_of(dead)
            assert second.hear() == "ok"
            region.mprotect(0, PAGE, READ)
            assert len(alive(region)) == 2
            second.end()

    in_new_pids(fork, body)


def test_an_observer_makes_nobody_look_alive(region: Region, fork: Fork) -> None:
    child = fork(idle)
    assert child.hear() == "ok"
    child.kill()
    assert child.wait() == -signal.SIGKILL
    with observed(region, 1, 1):
        assert alive(region) == [os.getpid()]
        assert region.mprotect(0, PAGE, READ, timeout=PATIENCE) == 1


def test_an_observer_keeps_one_snapshots_area_at_most(region: Region) -> None:
    with observed(region, SNAPSHOTS, 1), contextlib.ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(region.snapshot())
        with pytest.raises(pyshare.ShareError, match="as many are alive"):
            region.snapshot()
    with region.snapshot() as snapshot:
        assert snapshot.read(0, 1) == b"\0"


def leave_user(_: Path) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def leave_proc(path: Path) -> None:
    os.chroot(path)
    os.chdir("/")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give that up")
@pytest.mark.parametrize("leave", [leave_user, leave_proc])
def test_workers_of_a_server_that_gives_up_its_rights(
    region: Region, fork: Fork, tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    def body(child: Child) -> None:
        leave(tmp_path)
        workers: list[Child] = []

        def start(body: Callable[[Child], object]) -> Child:
            workers.append(Child(body))
            return workers[-1]

        try:
            works(region, start)
            with pyshare.attach(region.fileno()) as other:
                other.mprotect(0, PAGE, READ)
        finally:
            for worker in workers:
                worker.end()
        child.say()

    server = fork(body)
    assert server.hear() == "ok"
    assert server.wait() == 0
    assert region.protection(0) == READ
    assert alive(region) == [os.getpid()]
