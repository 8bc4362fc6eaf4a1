"""Participants for the tests: they take part by one engine or the other, and change what they are told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from conftest import Child
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


def change(region: Region, first: int, count: int, prot: int, **options: float) -> int:
    """In pages; the last one may end with the region."""
    return region.mprotect(first * PAGE, min(count * PAGE, region.size - first * PAGE), prot, **options)


def pages_of(region: Region) -> int:
    return -(-region.size // PAGE)


def engines(region: Region) -> dict[int, str]:
    return {one.pid: one.engine for one in region.participants()}


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
