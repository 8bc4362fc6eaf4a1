"""Participants for the tests: they take part by one engine or the other, and change what they are told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Child, idle
from kernel import (
    PAGE,
    SYSTEM_CALLS,
    agreed,
    libc,
    mapped,
    readable,
)

import pyshare
from pyshare import PropagationTimeout, Region

Fork = Callable[..., Child]
Joined = Callable[..., Child]

CHUNK = 512  # pages of one page table, which are armed together
AT_ONCE = 0.05  # a timeout that is meant to run out
SOON = 0.5  # the same, where somebody is meant to come to so-and-so before it does


def has_thread_pidfd() -> bool:
    """A descriptor of a thread's own table can be taken from outside."""
    with contextlib.suppress(OSError):
        os.close(os.pidfd_open(os.getpid(), os.O_EXCL))  # PIDFD_THREAD
        return True
    return False


needs_thread_pidfd = pytest.mark.skipif(
    not has_thread_pidfd(), reason="before Linux 6.9 a participant is reached once its agent has answered on its socket"
)


def change(region: Region, first: int, count: int, prot: int, **options: float) -> int:
    """In pages; the last one may end with the region."""
    return region.mprotect(first * PAGE, min(count * PAGE, region.size - first * PAGE), prot, **options)


def pages_of(region: Region) -> int:
    return -(-region.size // PAGE)


def engines(region: Region) -> dict[int, str]:
    return {one.pid: one.engine for one in region.participants()}


def heard(child: Child, seconds: float) -> bool:
    """It says something, or ends, within this time."""
    return bool(select.select([child._receive], [], [], seconds)[0])


@contextlib.contextmanager
def silent(*children: Child) -> Iterator[None]:
    """The change inside is made, and these do not follow it yet."""
    with pytest.raises(PropagationTimeout) as caught:
        yield
    assert caught.value.generation is not None
    assert caught.value.pids == sorted(child.pid for child in children)


def member(
    region: Region, engine: str, then: Callable[[Region], Callable[[Child], None]] | None = None
) -> Callable[[Child], None]:
    """A body that takes part by this engine, says at which address, and changes what it is told."""

    def body(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        own = pyshare.attach(fd, engine=engine)
        child.say()
        child.say(str(own.address))
        (then or obey)(own)(child)

    return body


class Member:
    """A participant that is not forked from one of the region, and so has an engine and an address of its own."""

    def __init__(self, start: Fork, region: Region, body: Callable[[Child], None] | None = None) -> None:
        self.child = start(body or member(region, "mprotect"))
        self.pid, self.size, self.address = self.child.pid, region.size, int(self.child.hear())
        assert self.child.hear() == "ok"

    def follows(self, region: Region) -> bool:
        return readable(mapped(self.pid, self)) == readable(agreed(region))


def obey(region: Region) -> Callable[[Child], None]:
    """A body that makes changes (first page, pages, protection), and says each generation."""

    def body(child: Child) -> None:
        child.say()
        while order := child.hear():
            child.say(str(change(region, *map(int, order.split()))))

    return body


def order(child: Child, first: int, count: int, prot: int) -> int:
    child.say(f"{first} {count} {int(prot)}")
    return int(child.hear())


def close_all(child: Child) -> None:
    """As a program that becomes a daemon does; but for the pipes by which we speak."""
    low = min(child._receive, child._send)
    high = max(child._receive, child._send)
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 1 << 16)


def new_userfaultfd() -> int:
    """As another library may have one; its ranges are registered by nobody."""
    fd = int(libc.syscall(SYSTEM_CALLS["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK | 1))
    assert fd >= 0
    api = struct.pack("QQQ", 0xAA, 1, 0)  # UFFD_FEATURE_PAGEFAULT_FLAG_WP
    fcntl.ioctl(fd, 0xC018AA3F, api)
    return fd


def own_userfaultfds() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which they are listed
            if "userfaultfd" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
    return found


def in_new_pids(fork: Fork, body: Callable[[], object]) -> None:
    """In a process that is number 1, with a /proc of its own, where nobody else takes pids."""
    new_mounts_and_pids, private = 0x20000 | 0x20000000, 0x44000  # CLONE_NEWNS | CLONE_NEWPID; MS_PRIVATE | MS_REC

    def first(_: Child) -> None:
        assert libc.mount(b"none", b"/", None, private, None) == 0
        assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
        body()

    def outside(child: Child) -> None:
        permitted = libc.unshare(new_mounts_and_pids) == 0
        child.say(str(permitted))
        assert not permitted or Child(first).wait() == 0

    child = fork(outside)
    if child.hear() == "False":
        pytest.skip("a new pid namespace is not permitted here")
    assert child.wait() == 0


def successor_of(dead: Child) -> Child:
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(dead.pid - 1))
    child = Child(idle)
    assert child.pid == dead.pid
    return child
