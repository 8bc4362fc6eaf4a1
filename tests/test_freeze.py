"""Freezing: everything is READ for everybody, and afterwards exactly what it was, whoever died meanwhile.

What a process may do is asked of the kernel (/proc/PID/maps, /proc/PID/pagemap).  Where a test says that somebody
waits, it has seen that in the control segment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from conftest import Child
from kernel import PAGE, agreed, mapped, readable, word

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, Frozen, ProtectionError, Region, ShareError

Fork = Callable[..., Child]
Joined = Callable[..., Child]
PAGES = 16
FREEZER = 2560  # in ext/layout.h: line 40
MIXED = [(0, 4, READ_WRITE), (4, 2, NONE), (6, 3, READ), (9, 1, READ | EXEC), (10, 1, NONE), (11, 5, READ_WRITE)]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(size=PAGES * PAGE, max_participants=4, engine=request.param) as made:
        for first, count, prot in MIXED:
            made.mprotect(first * PAGE, count * PAGE, prot)
        yield made


ALL_READ = [(0, PAGES * PAGE, READ)]


def as_it_was(region: Region, *others: Child) -> None:
    assert region.protections() == [(first * PAGE, count * PAGE, prot) for first, count, prot in MIXED]
    agreed(region, *[child.pid for child in others])


class There(NamedTuple):
    """The region in a process that has attached it by itself."""

    address: int
    size: int


def attached(region: Region, fork: Fork, engine: str) -> tuple[Child, There]:
    """A process that has it by this engine; it ends when it is told."""

    def body(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        with pyshare.attach(fd, engine=engine) as same:
            child.say(str(same.address))
            child.hear()

    child = fork(body)
    return child, There(int(child.hear()), region.size)


@pytest.mark.parametrize("other", ["mprotect", "uffd"])
def test_everything_is_read_until_the_end(region: Region, fork: Fork, other: str) -> None:
    child, there = attached(region, fork, other)
    before = mapped(child.pid, there)
    with region.frozen() as frozen:
        assert isinstance(frozen, Frozen)
        assert frozen.held
        assert frozen.generation == region.generation == len(MIXED) + 1
        assert agreed(region) == mapped(child.pid, there) == region.protections() == ALL_READ
        assert region.read(4 * PAGE, 2) == bytes(2)
        with pytest.raises(ProtectionError):
            region.write(0, b"1")
    assert not frozen.held
    as_it_was(region)
    assert readable(mapped(child.pid, there)) == readable(before)
    region.write(0, b"1")
    frozen.release()
    assert region.generation == len(MIXED) + 2


def test_the_freezing_thread_does_not_wait_for_itself(region: Region) -> None:
    with region.frozen():
        calls = [lambda: region.mprotect(0, PAGE, READ), lambda: region.lease(0, PAGE), region.frozen]
        for call in calls:
            with pytest.raises(ShareError, match="this thread has frozen the region"):
                call()
        with pytest.raises(BufferError, match="frozen by us"):
            region.close()
        assert region.protections() == ALL_READ
    as_it_was(region)


@pytest.mark.parametrize("point", ["F1_own", "F2_keep", "F3_freeze", "C4_map", "C7_complete", "F4_thaw", "F5_clear"])
def test_a_killed_freezer(region: Region, joined: Joined, fork: Fork, point: str) -> None:
    bystander = joined()

    def freeze(_: Child) -> None:
        with region.frozen():
            pass

    assert fork(freeze, point=f"{point}=kill").wait() == -signal.SIGKILL
    as_it_was(region, bystander)
    assert not word(region, FREEZER)
    region.mprotect(0, PAGE, READ)
    agreed(region, bystander.pid)
