"""How large a region can be: what it takes of a process's address space, told where there is too little of it."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Child

import pyshare
from pyshare import READ

TIB = 1 << 40
LARGEST = int(10.6 * TIB)  # docs/promises.md
Fork = Callable[..., Child]


def test_the_largest_is_as_large_as_is_said() -> None:
    with pyshare.create(size=LARGEST, prot=READ) as region:
        with region.lease(LARGEST // 4096 * 4096 - 4096, 4096) as lease:
            lease.view[:4] = b"last"
        assert region.read(LARGEST // 4096 * 4096 - 4096, 4) == b"last"
        with pytest.raises(pyshare.ShareError, match="no room for one in a process's address space"):
            region.snapshot()


def test_one_that_is_larger_is_refused_by_what_it_takes() -> None:
    with pytest.raises(OSError, match=r"takes \d{14} bytes of address space, and one can have 35184372088832") as told:
        pyshare.create("large", size=LARGEST + TIB // 10, prot=READ)
    assert told.value.errno == errno.ENOMEM
    assert pyshare.names() == []


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


@pytest.mark.parametrize(("size", "times"), [(1 << 30, 11), (1 << 40, 11), (3 << 40, 9)])
def test_a_region_takes_as_much_address_space_as_is_said(size: int, times: int) -> None:
    before = address_space()
    with pyshare.create(size=size, prot=READ):
        assert times <= (address_space() - before) / size < times + 0.1


def test_a_limit_of_address_space_is_told(fork: Fork) -> None:
    with pyshare.create("limited", size=1 << 30) as region:

        def body(_: Child) -> None:
            limit = address_space() + (2 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for doing, call in (
                ("create", lambda: pyshare.create(size=1 << 30)),
                ("attach", lambda: pyshare.attach("limited")),
                ("attach", lambda: pyshare.attach(region.fileno())),
                ("observe", lambda: pyshare.attach("limited", readonly=True)),
            ):
                with pytest.raises(
                    OSError, match=rf"\] {doing}: .*takes 11\d{{9}} bytes.*may have {limit} in all .*ulimit -v"
                ) as told:
                    call()
                assert told.value.errno == errno.ENOMEM
            with pyshare.create(size=1 << 20) as small:
                small.write(0, b"x")

        assert fork(body).wait() == 0
