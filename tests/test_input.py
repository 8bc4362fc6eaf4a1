"""Wrong arguments and exhausted descriptors: the right error, in a sentence, and nothing changed.

Grouped by promise: every public call refuses what it cannot use, with the value
that it was given and what it expected; a call that runs out of descriptors says
EMFILE and leaves nothing behind.
"""

from __future__ import annotations

import errno
import math
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Child

import pyshare
from pyshare import READ, READ_WRITE, Region

PAGE = 4096
SIZE = 2 * PAGE + 100
Fork = Callable[..., Child]
Call = Callable[[Region], object]


@pytest.fixture
def region() -> Iterator[Region]:
    with pyshare.create("input", size=SIZE) as made:
        yield made


def open_descriptors() -> dict[int, str]:
    """All of this process's, but the one that looks."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
    return found


def everything(region: Region) -> tuple[object, ...]:
    """What a call that was refused may not have changed."""
    return (
        region.generation,
        region.protections(),
        region.participants(),
        region.read(0, SIZE),
        open_descriptors(),
        sorted(entry for entry in os.listdir("/dev/shm") if entry.startswith("pyshare")),
    )


def refuses(region: Region, call: Call, error: type[Exception], *words: str) -> None:
    before = everything(region)
    with pytest.raises(error) as caught:
        call(region)
    assert everything(region) == before
    assert not isinstance(caught.value, pyshare.ShareError)
    for word in words:
        assert word in str(caught.value)


NOT_INTEGERS = [None, 1.0, "1", b"1", [], object()]
OUTSIDE = [-1, -PAGE, SIZE, 1 << 64, -(1 << 64)]

# -- create, attach, unlink --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, (1 << 45) + 1, 1 << 64])
def test_create_refuses_a_size(region: Region, size: int) -> None:
    refuses(region, lambda _: pyshare.create(size=size), ValueError, "size", "1 to 2**45", str(size))


@pytest.mark.parametrize("value", [*NOT_INTEGERS, True])
@pytest.mark.parametrize("what", ["size", "max_participants"])
def test_create_refuses_what_is_no_number(region: Region, what: str, value: Any) -> None:
    arguments = {"size": 1, what: value}
    refuses(region, lambda _: pyshare.create(**arguments), TypeError, what, repr(value))


def test_create_wants_a_size(region: Region) -> None:
    refuses(region, lambda _: pyshare.create("x"), TypeError, "size")  # type: ignore[call-arg]


@pytest.mark.parametrize("slots", [0, -1, 2048, 1 << 64])
def test_create_refuses_a_number_of_participants(region: Region, slots: int) -> None:
    refuses(
        region,
        lambda _: pyshare.create(size=1, max_participants=slots),
        ValueError,
        "max_participants",
        "2047",
        str(slots),
    )


@pytest.mark.parametrize("mode", [0, 0o400, 0o200, 0o066, 0o1600, -1, 1 << 64])
def test_create_refuses_a_mode(region: Region, mode: int) -> None:
    refuses(region, lambda _: pyshare.create(size=1, mode=mode), ValueError, "mode", "0o600", oct(mode))


@pytest.mark.parametrize("mode", [None, 384.0, "0o600", True])
def test_create_refuses_a_mode_that_is_no_number(region: Region, mode: Any) -> None:
    refuses(region, lambda _: pyshare.create(size=1, mode=mode), TypeError, "mode", repr(mode))


@pytest.mark.parametrize("name", [1, 1.5, True, [], object()])
@pytest.mark.parametrize("call", [lambda name: pyshare.create(name, size=1), pyshare.unlink], ids=["create", "unlink"])
def test_a_name_is_a_str(region: Region, call: Callable[[Any], object], name: Any) -> None:
    refuses(region, lambda _: call(name), TypeError, "name", "str", repr(name))


def test_unlink_wants_a_name(region: Region) -> None:
    refuses(region, lambda _: pyshare.unlink(None), TypeError, "name", "None")  # type: ignore[arg-type]


@pytest.mark.parametrize("what", [None, 1.0, b"input", [], object(), True])
def test_attach_refuses_what_is_neither_name_nor_descriptor(region: Region, what: Any) -> None:
    refuses(region, lambda _: pyshare.attach(what), TypeError, "descriptor", repr(what))


@pytest.mark.parametrize("fd", [-1, -100])
def test_attach_refuses_a_negative_descriptor(region: Region, fd: int) -> None:
    refuses(region, lambda _: pyshare.attach(fd), ValueError, "descriptor", str(fd))


@pytest.mark.parametrize("fd", [1 << 31, 1 << 64])
def test_attach_refuses_a_descriptor_beyond_any(region: Region, fd: int) -> None:
    refuses(region, lambda _: pyshare.attach(fd), ValueError, "descriptor", str(fd))


def test_attach_of_a_closed_descriptor_is_ebadf(region: Region) -> None:
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(OSError, match="attach") as caught:
        pyshare.attach(fd)
    assert caught.value.errno == errno.EBADF
    assert len(region.participants()) == 1


@pytest.mark.parametrize("path", ["/dev/null", "/dev/shm", __file__])
def test_attach_of_another_file_is_corrupt(region: Region, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    before = everything(region)
    with pytest.raises(pyshare.CorruptRegion, match="not a pyshare region"):
        pyshare.attach(fd)
    assert everything(region) == before
    os.close(fd)


@pytest.mark.parametrize(
    "call",
    [lambda engine: pyshare.create(size=1, engine=engine), lambda engine: pyshare.attach("input", engine=engine)],
    ids=["create", "attach"],
)
def test_engines(region: Region, call: Callable[[Any], object]) -> None:
    for engine in ("", "AUTO", "futex", None, 3):
        refuses(region, lambda _, engine=engine: call(engine), ValueError, "engine", "'auto'", repr(engine))  # type: ignore[misc]


# -- Protections -------------------------------------------------------------------------------------------------------

PROTECTED: dict[str, Callable[[Region, Any], object]] = {
    "create": lambda _, prot: pyshare.create(size=1, prot=prot),
    "mprotect": lambda region, prot: region.mprotect(0, PAGE, prot),
}
protected = pytest.mark.parametrize("call", PROTECTED.values(), ids=PROTECTED.keys())


@protected
@pytest.mark.parametrize("prot", [8, -1, 0x01000000, 1 << 64])
def test_unknown_bits(region: Region, call: Callable[[Region, Any], object], prot: int) -> None:
    refuses(region, lambda region: call(region, prot), ValueError, "prot", str(prot), "READ, WRITE and EXEC")


@protected
@pytest.mark.parametrize("prot", [*NOT_INTEGERS, True])
def test_a_protection_is_a_number(region: Region, call: Callable[[Region, Any], object], prot: Any) -> None:
    refuses(region, lambda region: call(region, prot), TypeError, "prot", repr(prot))


# -- Ranges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "words"),
    [
        (1, PAGE, ["offset", "multiple of the page size 4096", "not 1"]),
        (-PAGE, PAGE, ["offset", "-4096"]),
        (0, 0, ["length", "more than 0", "not 0"]),
        (0, -PAGE, ["length", "-4096"]),
        (0, 1, ["page size 4096", "size 8292", "0 + 1 = 1"]),
        (0, PAGE + 1, ["page size 4096", "4097"]),
        (PAGE, PAGE + 99, ["8291"]),
        (0, 4 * PAGE, ["8292 bytes", "16384"]),
        (4 * PAGE, PAGE, ["8292 bytes", "16384"]),
        (3 * PAGE, PAGE, ["8292 bytes", "12288"]),
        (1 << 63, PAGE, ["8292 bytes"]),
        ((1 << 64) - PAGE, 2 * PAGE, ["8292 bytes"]),
        (0, 1 << 64, ["8292 bytes"]),
    ],
)
def test_mprotect_refuses_a_range(region: Region, offset: int, length: int, words: list[str]) -> None:
    refuses(region, lambda region: region.mprotect(offset, length, READ), ValueError, *words)


@pytest.mark.parametrize(("offset", "length"), [(2 * PAGE, 100), (2 * PAGE, PAGE), (0, SIZE), (0, 3 * PAGE)])
def test_mprotect_takes_the_last_page_by_either_end(region: Region, offset: int, length: int) -> None:
    assert region.mprotect(offset, length, READ) == 1
    assert region.protections()[-1][0] + region.protections()[-1][1] == SIZE
    assert region.protection(SIZE - 1) == READ


OFFSETS: dict[str, Callable[[Region, Any], object]] = {
    "mprotect": lambda region, value: region.mprotect(value, PAGE, READ),
    "protection": lambda region, value: region.protection(value),
    "read": lambda region, value: region.read(value, 1),
    "write": lambda region, value: region.write(value, b"x"),
}
LENGTHS: dict[str, Callable[[Region, Any], object]] = {
    "mprotect, length": lambda region, value: region.mprotect(0, value, READ),
    "read, length": lambda region, value: region.read(0, value),
}


@pytest.mark.parametrize("value", [*NOT_INTEGERS, True])
@pytest.mark.parametrize("call", [*OFFSETS.values(), *LENGTHS.values()], ids=[*OFFSETS, *LENGTHS])
def test_offsets_and_lengths_are_numbers(region: Region, call: Callable[[Region, Any], object], value: Any) -> None:
    refuses(region, lambda region: call(region, value), TypeError, "must be an integer", repr(value))


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("call", OFFSETS.values(), ids=OFFSETS.keys())
def test_offsets_are_inside(region: Region, call: Callable[[Region, Any], object], value: int) -> None:
    refuses(region, lambda region: call(region, value), ValueError, str(value))


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2), (0, -1), (5, 1 << 64)])
def test_read_stays_inside(region: Region, offset: int, length: int) -> None:
    refuses(region, lambda region: region.read(offset, length), ValueError, str(offset), str(length), f"{SIZE} bytes")


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2)])
def test_write_stays_inside(region: Region, offset: int, length: int) -> None:
    refuses(
        region,
        lambda region: region.write(offset, b"x" * length),
        ValueError,
        str(offset),
        str(length),
        f"{SIZE} bytes",
    )


@pytest.mark.parametrize("data", ["text", None, 5, 1.5, [1], memoryview(b"abcdef")[::2]])
def test_write_takes_bytes_only(region: Region, data: Any) -> None:
    refuses(region, lambda region: region.write(0, data), (TypeError, BufferError))  # type: ignore[arg-type]


def test_nothing_at_all_may_be_read_and_written_anywhere(region: Region) -> None:
    for offset in (0, 1, SIZE):
        assert region.read(offset, 0) == b""
        region.write(offset, b"")


# -- Timeouts ----------------------------------------------------------------------------------------------------------

TIMED: dict[str, Callable[[Region, Any], object]] = {
    "mprotect": lambda region, timeout: region.mprotect(0, PAGE, READ_WRITE, timeout=timeout),
    "lease": lambda region, timeout: region.lease(0, PAGE, timeout=timeout).release(),
    "lock": lambda region, timeout: region.lock(0, timeout=timeout).release(),
    "attach": lambda region, timeout: pyshare.attach(region.fileno(), timeout=timeout).close(),
    "attach, name": lambda _, timeout: pyshare.attach("input", timeout=timeout).close(),
    "set_default_timeout": lambda _, timeout: pyshare.set_default_timeout(timeout),
}
timed = pytest.mark.parametrize("call", TIMED.values(), ids=TIMED.keys())


@pytest.fixture
def _default_timeout() -> Iterator[None]:
    yield
    pyshare.set_default_timeout(5.0)


@timed
@pytest.mark.parametrize("timeout", [math.nan, -1, -0.001, -math.inf, pytest.param(-(10**400), id="-10**400")])
def test_timeouts_are_not_negative(region: Region, call: Callable[[Region, Any], object], timeout: float) -> None:
    refuses(region, lambda region: call(region, timeout), ValueError, "timeout", "0 or more seconds", repr(timeout))


@timed
@pytest.mark.parametrize("timeout", ["1", b"", [], True, False, 1j, object()])
def test_timeouts_are_seconds(region: Region, call: Callable[[Region, Any], object], timeout: Any) -> None:
    refuses(region, lambda region: call(region, timeout), TypeError, "timeout", "seconds or None", repr(timeout))


@timed
@pytest.mark.usefixtures("_default_timeout")
@pytest.mark.parametrize("timeout", [None, math.inf, 1e300, pytest.param(10**400, id="10**400"), 60, 60.5])
def test_timeouts_may_be_long(region: Region, call: Callable[[Region, Any], object], timeout: Any) -> None:
    call(region, timeout)
    assert region.mprotect(0, PAGE, READ_WRITE) > 0


@pytest.mark.usefixtures("_default_timeout")
def test_a_refused_default_stays_what_it_was(region: Region, fork: Fork) -> None:
    child = fork(lambda child: (child.say(), child.hear()))
    child.hear()
    child.stop()
    pyshare.set_default_timeout(0)
    with pytest.raises(ValueError, match="timeout"):
        pyshare.set_default_timeout(-1)
    with pytest.raises(pyshare.PropagationTimeout) as caught:
        region.mprotect(0, PAGE, pyshare.NONE)
    assert (caught.value.pids, caught.value.generation) == ([child.pid], 1)
    child.resume()


# -- Out of descriptors ------------------------------------------------------------------------------------------------

OPENING: dict[str, Callable[[int], Region]] = {
    "create": lambda _: pyshare.create(size=1),
    "create, name": lambda _: pyshare.create("new", size=1),
    "create, replace": lambda _: pyshare.create("there", size=1, replace=True),
    "attach, descriptor": lambda fd: pyshare.attach(fd),
    "attach, name": lambda _: pyshare.attach("there"),
}


def try_with_few(opens: Callable[[int], Region], fd: int) -> int:
    """Calls it with 0, 1, 2 ... free descriptors until it succeeds; how often it did not."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    names = sorted(os.listdir("/dev/shm"))
    for free in range(40):
        filled = [os.dup(0)]
        limit = filled[0] + 1
        while (used := max(open_descriptors())) >= limit:
            limit = used + 1
        while filled[-1] < limit - 1:
            filled.append(os.dup(0))
        before = open_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit + free, hard))
        try:
            opened = opens(fd)
            opened.mprotect(0, opened.size, READ)  # what has been opened can be used
            opened.frozen().release()
            result: Region | OSError = opened
        except OSError as error:
            result = error
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if isinstance(result, OSError):
            assert result.errno == errno.EMFILE, repr(result)
            assert os.strerror(errno.EMFILE) in str(result)
            assert sorted(os.listdir("/dev/shm")) == names
        else:
            result.close()
        assert open_descriptors() == before
        for one in filled:
            os.close(one)
        if isinstance(result, Region):
            return free
    raise AssertionError("40 descriptors are not enough")


@pytest.mark.parametrize("opens", OPENING.values(), ids=OPENING.keys())
def test_out_of_descriptors(opens: Callable[[int], Region], fork: Fork) -> None:
    with pyshare.create("there", size=1) as there:
        fd = os.dup(there.fileno())

        def body(child: Child) -> None:
            there.close()
            child.say(str(try_with_few(opens, fd)))

        child = fork(body)
        assert int(child.hear()) > 0
        assert child.wait() == 0
        os.close(fd)
        assert [p.pid for p in there.participants() if p.alive] == [os.getpid()]
