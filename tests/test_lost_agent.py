"""Promise 10 where an agent is lost: a thread alone can be ended, by a seccomp filter; here by a point of the core."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Child, until
from kernel import (
    GENERATION,
    PAGE,
    SYSTEM_CALLS,
    agreed,
    libc,
    mapped,
    refuse,
    until_agents_wait,
    wake,
)
from members import AT_ONCE, CHUNK, Fork, change, close_all, needs_thread_pidfd, obey, order, own_userfaultfds, silent

import pyshare
from pyshare import NONE, READ, READ_WRITE, Region

needs_keeper = pytest.mark.skipif(
    libc.syscall(SYSTEM_CALLS["io_uring_setup"], 0, None) == -1 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM),
    reason="io_uring is not permitted here",
)


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    """Two whole chunks and a part of a third; of other sizes (bytes) by indirect parameters."""
    size = getattr(request, "param", (2 * CHUNK + 7) * PAGE - 100)
    with pyshare.create(size=size, max_participants=64, engine="uffd") as made:
        yield made


@pytest.mark.parametrize("closes", [False, True], ids=["", "closerange"])
def test_a_lost_agent_opens_nothing(region: Region, fork: Fork, closes: bool) -> None:
    """Promise 10: its userfaultfd goes with it, but not the marks: the program has a copy, or whoever borrowed it."""

    def body(child: Child) -> None:
        until_agents_wait()
        if closes:
            close_all(child)
        obey(region)(child)

    child = fork(body, point="A1_wait=exit@2")
    assert child.hear() == "ok"
    change(region, 0, 2, READ)
    assert mapped(child.pid, region)[0] == (0, 2 * PAGE, READ)
    with silent(child):
        for prot in (NONE, READ) * 2:  # it goes after the first or second that it follows
            change(region, 5, 1, prot, timeout=AT_ONCE)
    until(lambda: len(os.listdir(f"/proc/{child.pid}/task")) == 1)
    assert mapped(child.pid, region)[0] == (0, 2 * PAGE, READ)
    for prot in (READ, READ_WRITE, NONE, READ) if not closes else ():  # else nothing leads to the memory any more
        order(child, 7, 1, prot)
        agreed(region, child.pid)
        change(region, 5, 1, prot)
        agreed(region, child.pid)


def alone() -> None:
    """The agent has ended."""
    until(lambda: len(os.listdir("/proc/self/task")) == 1)


def refuses_stores(view: memoryview, *pages: int) -> None:
    zero = os.open("/dev/zero", os.O_RDONLY)
    for page in pages:
        with pytest.raises(OSError, match="Bad address"):
            os.readv(zero, [view[page * PAGE : (page + 1) * PAGE]])


def held() -> int:
    """Userfaultfds that a mapping of this process keeps open."""
    return Path("/proc/self/maps").read_text().count("[io_uring]")


@needs_keeper
def test_a_lost_agent_that_nothing_can_replace_opens_nothing(region: Region, fork: Fork) -> None:
    """All descriptors were closed and nobody had borrowed: a mapping keeps the marks, and the next call closes all."""
    change(region, 0, 1, READ)
    view = region.buf

    def body(child: Child) -> None:
        until_agents_wait()
        close_all(child)
        child.say()
        child.hear()
        alone()
        view[PAGE] = 1
        refuses_stores(view, 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            region.generation  # noqa: B018
        refuses_stores(view, 0, 1)

    child = fork(body, point="A1_wait=exit@2")
    assert child.hear() == "ok"
    wake(region, GENERATION)
    child.say()
    assert child.wait() == 0
    change(region, 0, 1, READ_WRITE)
    agreed(region)


@pytest.mark.parametrize("borrowed", [False, pytest.param(True, marks=needs_thread_pidfd)], ids=["", "borrowed"])
def test_who_has_lost_its_userfaultfd_gets_another(region: Region, fork: Fork, borrowed: bool) -> None:
    """It is open still, by the mapping or by who has borrowed it, so what it is registered for is mapped anew."""

    def body(child: Child) -> None:
        until_agents_wait()
        for fd in own_userfaultfds():
            os.close(fd)
        child.say()
        child.hear()
        alone()
        refuses_stores(region.buf, 0)
        change(region, 1, 1, READ)
        refuses_stores(region.buf, 0, 1)
        region.buf[2 * PAGE] = 1
        child.say()
        obey(region)(child)

    change(region, 0, 1, READ)
    child = fork(body, point="A1_wait=exit@2")
    assert child.hear() == "ok"
    if borrowed:
        change(region, 3, 1, READ)
    wake(region, GENERATION)
    child.say()
    assert child.hear() == child.hear() == "ok"
    for prot in (READ_WRITE, READ, NONE, READ_WRITE):
        change(region, 0, 1, prot)
        agreed(region, child.pid)
        order(child, 4, 1, prot)
        agreed(region, child.pid)
    child.stop()
    change(region, 0, 1, READ)
    agreed(region, child.pid)


@needs_keeper
def test_what_keeps_the_marks_goes_with_the_region(fork: Fork) -> None:
    """And a forked child has none of its parent's."""

    def body(_: Child) -> None:
        before = held()
        with pyshare.create(size=PAGE, engine="uffd") as one, pyshare.create(size=PAGE, engine="mprotect"):
            assert held() == before + 1
            with pyshare.attach(one.fileno()):
                assert held() == before + 2
            assert held() == before + 1
            child = Child(lambda _: sys.exit(held()))
            assert child.wait() == 1
        assert held() == before

    assert fork(body).wait() == 0


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_where_nothing_may_keep_the_marks_all_else_works(fork: Fork, error: int) -> None:
    def body(_: Child) -> None:
        refuse("io_uring_setup", error)
        with pyshare.create(size=2 * PAGE, engine="uffd") as region:
            assert held() == 0
            change(region, 0, 1, READ)
            with region.lease(0, PAGE) as lease:
                lease.view[0] = 1
            refuses_stores(region.buf, 0)
            other = Child(obey(region))
            assert other.hear() == "ok"
            order(other, 1, 1, READ)
            agreed(region, other.pid)
            other.end()

    assert fork(body).wait() == 0
