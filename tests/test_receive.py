"""readinto and recv_into: system calls into a region, which lose nothing when its protection changes meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import ssl
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Child, until
from kernel import Mappings, in_background, libc, stopped_before

import pyshare
from pyshare import NONE, READ, READ_WRITE, PropagationTimeout, ProtectionError, Region, ShareError

PAGE = 4096
ROUNDS = 300


@pytest.fixture(params=["mprotect", "uffd"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def region(engine: str) -> Iterator[Region]:
    with pyshare.create(size=8 * PAGE + 10, engine=engine) as region:
        yield region


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    receive, send = os.pipe()
    yield receive, send
    os.close(receive)
    os.close(send)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        yield one, other


class Decoding(socket.socket):
    """What it receives is not what comes over its descriptor."""

    meanwhile: Callable[[], object] | None = None

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        got = super().recv_into(buffer, nbytes, flags)
        buffer[:got] = bytes(buffer[:got]).swapcase()
        if self.meanwhile:
            self.meanwhile()
        return got


@pytest.fixture
def decoding() -> Iterator[tuple[socket.socket, Decoding]]:
    one, other = socket.socketpair()
    with one, Decoding(fileno=other.detach()) as decoded:
        yield one, decoded


# -- What arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 5, PAGE - 2, 8 * PAGE + 6])
def test_bytes_of_a_descriptor(region: Region, pipe: tuple[int, int], offset: int) -> None:
    os.write(pipe[1], b"1234")
    assert region.readinto(pipe[0], offset, region.size - offset) == 4
    assert region.read(offset, 4) == b"1234"


def test_file_and_its_end(region: Region, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 100)
    with path.open("rb") as file:
        assert region.readinto(file, 3, 20_000) == 20_000
        assert region.readinto(file, 3, 20_000) == 5_000
        assert region.readinto(file, 0, 1) == 0
    assert region.read(3, 5_000) == (bytes(range(250)) * 100)[20_000:]


def test_messages(region: Region, pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].send(b"first")
    pair[0].send(b"second")
    assert region.recv_into(pair[1], PAGE, 100, flags=socket.MSG_PEEK) == 5
    assert region.recv_into(pair[1], PAGE, 100) == 5
    assert region.recv_into(pair[1], PAGE, 3) == 3
    assert region.read(PAGE, 5) == b"secst"


def test_waits_for_something_to_come(region: Region, pair: tuple[socket.socket, socket.socket]) -> None:
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(region.recv_into(pair[1], 0, 10)))
    thread.start()
    assert region.mprotect(0, PAGE, READ_WRITE)  # nothing is held while nothing has come
    pair[0].send(b"1234")
    thread.join(PATIENCE)
    assert got == [4]


def test_end_of_a_stream(region: Region) -> None:
    one, other = socket.socketpair()
    with other:
        one.close()
        assert region.recv_into(other, 0, 10) == 0


def test_nothing_comes(region: Region, pair: tuple[socket.socket, socket.socket], pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        region.readinto(pipe[0], 0, 10)
    pair[1].settimeout(0.01)
    with pytest.raises(TimeoutError):
        region.recv_into(pair[1], 0, 10)
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        region.recv_into(pair[1], 0, 10)


@pytest.mark.parametrize("engine", ["mprotect"], indirect=True)
def test_pages_that_cannot_be_had_in_time(region: Region, joined: Callable[..., Child], pipe: tuple[int, int]) -> None:
    """Somebody has them; or the receiver's own agent is at work on its page tables."""

    def body(child: Child) -> None:
        child.say()
        while pid := int(child.hear()):
            with pytest.raises(PropagationTimeout, match=f"readinto: pid {pid} held") as caught:
                region.readinto(pipe[0], PAGE, 10, timeout=0)
            child.say(str(caught.value.pids))

    def change() -> None:
        with pytest.raises(PropagationTimeout):
            region.mprotect(5 * PAGE, PAGE, READ, timeout=0)

    os.write(pipe[1], b"1234")
    child = joined(body)
    [agent] = [one.tid for one in region.participants() if one.pid == child.pid]
    with stopped_before(agent, "mprotect", change):
        child.say(str(child.pid))
        assert child.hear() == f"[{child.pid}]"
    with region.lease(PAGE, PAGE):
        child.say(str(os.getpid()))
        assert child.hear() == f"[{os.getpid()}]"
    child.say("0")
    assert child.wait() == 0
    assert region.readinto(pipe[0], PAGE, 10) == 4, "nothing was lost"


def test_interrupt(region: Region, joined: Callable[..., Child], pipe: tuple[int, int]) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child.say()
        with pytest.raises(KeyboardInterrupt):
            region.readinto(pipe[0], 0, 10)

    child = joined(body)
    until(lambda: Path(f"/proc/{child.pid}/syscall").read_text().split()[0] in {"7", "271"})  # poll, ppoll
    child.kill(signal.SIGINT)
    assert child.wait() == 0


def test_a_signal_during_the_call_is_served(region: Region, joined: Callable[..., Child]) -> None:
    """Somebody else was quicker, and the call sleeps in the kernel: of a terminal it cannot be made without a wait."""
    master, slave = os.openpty()
    tty.setraw(slave)

    def body(child: Child) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: child.say("signal"))
        child.say()
        assert region.readinto(slave, 0, 10) == 4

    child = joined(body)
    with stopped_before(child.pid, "read", lambda: os.write(master, b"x")):
        os.read(slave, 10)
    until(lambda: Path(f"/proc/{child.pid}/syscall").read_text().split()[0] == "0")
    child.kill(signal.SIGUSR1)
    assert child.hear() == "signal"
    os.write(master, b"1234")
    assert child.wait() == 0
    for end in (master, slave):
        os.close(end)


@pytest.mark.parametrize("wanted", ["data", "page"])
def test_a_signal_that_another_thread_gets_is_served(
    region: Region, joined: Callable[..., Child], pipe: tuple[int, int], wanted: str
) -> None:
    """The kernel wakes that thread, and not the main one, which has to look by itself."""
    forever, end = os.pipe()

    def body(child: Child) -> None:
        region.on_violation("wait")
        signal.signal(signal.SIGUSR1, lambda *_: child.say("signal"))
        other = threading.Thread(target=os.read, args=(forever, 1))
        other.start()
        child.say()
        child.say(str(other.native_id))
        assert region.readinto(pipe[0], 0, 10, timeout=None) == 4
        os.write(end, b"x")
        other.join()

    if wanted == "page":
        region.mprotect(0, PAGE, READ)
        os.write(pipe[1], b"1234")
    child = joined(body)
    other = int(child.hear())
    calls = {"7", "271"} if wanted == "data" else {"202", "449", "455"}  # poll; futex
    until(lambda: Path(f"/proc/{child.pid}/syscall").read_text().split()[0] in calls)
    assert libc.syscall(234, child.pid, other, signal.SIGUSR1) == 0  # tgkill
    assert child.hear() == "signal"
    region.mprotect(0, PAGE, READ_WRITE)
    os.write(pipe[1], b"1234"[: 4 if wanted == "data" else 0])
    assert child.wait() == 0
    for each in (forever, end):
        os.close(each)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, 1 << 20), (8 * PAGE + 10, 1)])
def test_wrong_range(region: Region, pipe: tuple[int, int], offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="range"):
        region.readinto(pipe[0], offset, length)


def test_wrong_descriptor(region: Region) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        region.readinto(1 << 20, 0, 1)


def test_descriptor_that_cannot_be_read(region: Region, pipe: tuple[int, int]) -> None:
    with pytest.raises(OSError, match="not open for reading") as caught:
        region.readinto(pipe[1], 0, 1)
    assert caught.value.errno == errno.EBADF


# -- Into pages that may not be written --------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", [READ, NONE])
@pytest.mark.parametrize("policy", ["die", "raise"])
def test_forbidden_raises_and_loses_nothing(
    region: Region, pair: tuple[socket.socket, socket.socket], policy: str, prot: int
) -> None:
    region.on_violation(policy)
    region.mprotect(PAGE, PAGE, prot)
    pair[0].send(b"1234")
    with pytest.raises(ProtectionError) as caught:
        region.recv_into(pair[1], PAGE - 2, 10)
    assert (caught.value.offset, caught.value.actual) == (PAGE, prot)
    region.mprotect(PAGE, PAGE, READ_WRITE)
    assert region.recv_into(pair[1], PAGE - 2, 10) == 4
    assert region.read(PAGE - 2, 4) == b"1234"


def test_forbidden_waits(region: Region, pair: tuple[socket.socket, socket.socket]) -> None:
    region.on_violation("wait")
    region.mprotect(PAGE, PAGE, READ)
    pair[0].send(b"1234")
    with pytest.raises(ProtectionError):
        region.recv_into(pair[1], PAGE, 10, timeout=0.01)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(region.recv_into(pair[1], PAGE, 10, timeout=None)))
    thread.start()
    assert region.read(PAGE, 4) == bytes(4)
    region.mprotect(PAGE, PAGE, READ_WRITE)
    thread.join(PATIENCE)
    assert got == [4]
    assert region.read(PAGE, 4) == b"1234"


@pytest.mark.parametrize("window", [False, True], ids=["in place", "window"])
@pytest.mark.parametrize("prot", [READ, READ_WRITE])
def test_into_a_lease_of_ones_own(region: Region, pipe: tuple[int, int], prot: int, window: bool) -> None:
    region.mprotect(0, 2 * PAGE, prot)
    os.write(pipe[1], b"1234")
    with region.lease(0, 2 * PAGE, window=window):
        assert region.readinto(pipe[0], PAGE - 2, 10) == 4
        os.write(pipe[1], b"1234")
        with pytest.raises(ShareError):
            region.readinto(pipe[0], 2 * PAGE - 2, 10)
    assert region.read(PAGE - 2, 4) == b"1234"


def test_leased_by_another(region: Region, pipe: tuple[int, int], joined: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        with region.lease(0, PAGE):
            child.say()
            child.hear()

    child = joined(body)
    os.write(pipe[1], b"1234")
    with pytest.raises(PropagationTimeout) as caught:
        region.readinto(pipe[0], 0, 10, timeout=0.01)
    assert caught.value.pids == [child.pid]
    child.say()
    assert region.readinto(pipe[0], 0, 10) == 4


@pytest.mark.parametrize("own", ["none", "in place", "window"])
def test_a_snapshot_that_begins_loses_nothing(
    region: Region, joined: Callable[..., Child], pair: tuple[socket.socket, socket.socket], own: str
) -> None:
    """It closes page tables of pages that all may write, when the call has them and is about to store."""

    def body(child: Child) -> None:
        with contextlib.ExitStack() as stack:
            if own != "none":
                stack.enter_context(region.lease(0, 4 * PAGE, window=own == "window"))
            child.say()
            assert region.recv_into(pair[1], 5, 3 * PAGE) == 2 * PAGE

    child = joined(body)
    with stopped_before(child.pid, "recvfrom", lambda: pair[0].send(b"x" * 2 * PAGE)):
        snapper = joined(lambda child: (child.say(), region.snapshot(timeout=None).close()), "S2_protect=stop")
        snapper.wait_stopped()
    assert child.wait() == 0
    snapper.resume()
    assert snapper.wait() == 0
    assert region.read(0, 3 * PAGE) == bytes(5) + b"x" * 2 * PAGE + bytes(PAGE - 5)


@pytest.mark.parametrize("engine", ["mprotect"], indirect=True)
def test_a_fenced_process_receives_nothing(
    region: Region, fork: Callable[..., Child], pair: tuple[socket.socket, socket.socket]
) -> None:
    def body(child: Child) -> None:
        Mappings().fill()
        child.say()
        child.hear()
        with pytest.raises(ProtectionError) as caught:
            region.recv_into(pair[1], 0, 10)
        assert caught.value.actual == NONE

    child = fork(body, point="A2_apply=stop")
    child.hear()
    with pytest.raises(PropagationTimeout):
        region.mprotect(PAGE, PAGE, READ, timeout=0)
    child.wait_stopped()
    child.resume()
    until(lambda: any(one.fenced for one in region.participants()))
    pair[0].send(b"1234")
    child.say()
    assert child.wait() == 0
    assert region.recv_into(pair[1], 0, 10) == 4


def dies_with(region: Region, joined: Callable[..., Child], first: int, pages: int) -> None:
    def body(child: Child) -> None:
        with region.lease(first * PAGE, pages * PAGE):
            child.say()
            child.hear()

    victim = joined(body)
    victim.kill()
    victim.wait()


def told(region: Region, page: int) -> bool:
    with region.lease(page * PAGE, PAGE) as lease:
        return lease.abandoned


@pytest.mark.parametrize("way", ["readinto", "recv_into", "decoding"])
def test_what_the_dead_left_is_told_to_who_asks(
    region: Region, joined: Callable[..., Child], decoding: tuple[socket.socket, Decoding], way: str
) -> None:
    """The call has the pages without its caller's knowledge."""
    dies_with(region, joined, 1, 2)
    one, decoded = decoding
    with socket.socket(fileno=os.dup(decoded.fileno())) as plain:
        for _ in range(2):
            one.send(b"text")
            if way == "readinto":
                assert region.readinto(plain.fileno(), 2 * PAGE - 2, 4) == 4
            else:
                assert region.recv_into(decoded if way == "decoding" else plain, 2 * PAGE - 2, 4) == 4
    assert [told(region, page) for page in range(4)] == [False, True, True, False]
    assert [told(region, page) for page in range(4)] == [False] * 4, "it is told once"


@pytest.mark.parametrize("point", ["H1_take", "H1_take@2", "H4_release", "H4_release@2"])
def test_killed_in_the_pages_of_the_dead(
    region: Region, fork: Callable[..., Child], joined: Callable[..., Child], pipe: tuple[int, int], point: str
) -> None:
    def body(child: Child) -> None:
        child.hear()
        region.readinto(pipe[0], 0, 2 * PAGE)

    dies_with(region, joined, 0, 2)
    label, _, turn = point.partition("@")
    victim = fork(body, point=f"{label}=kill@{turn or 1}")
    os.write(pipe[1], b"1234")
    victim.say()
    assert victim.wait() == -signal.SIGKILL
    assert [told(region, page) for page in range(2)] == [True, True]


def take_rights_and_give_them(region: Region) -> None:
    region.mprotect(PAGE, 4 * PAGE, READ, timeout=None)
    region.mprotect(PAGE, 4 * PAGE, READ_WRITE, timeout=None)


def take_a_snapshot(region: Region) -> None:
    region.snapshot(timeout=None).close()


@pytest.mark.parametrize("policy", ["raise", "wait"])
@pytest.mark.parametrize("trouble", [take_rights_and_give_them, take_a_snapshot], ids=["changes", "snapshots"])
def test_no_datagram_is_lost(
    region: Region,
    joined: Callable[..., Child],
    pair: tuple[socket.socket, socket.socket],
    policy: str,
    trouble: Callable[[Region], None],
) -> None:
    """Another participant troubles it as fast as it can; the messages reach over four of the pages."""
    region.on_violation(policy)

    def change(child: Child) -> None:
        child.say()
        while not region.buf[0]:
            trouble(region)

    def send(child: Child) -> None:
        child.say()
        for number in range(ROUNDS):
            pair[0].send(number.to_bytes(4, "little") * 2500)

    children = [joined(change), joined(send)]
    received: list[Any] = []
    while len(received) < ROUNDS:
        try:
            length = region.recv_into(pair[1], 2 * PAGE - 8, 10_000, timeout=None)
        except ProtectionError:
            continue
        data = region.read(2 * PAGE - 8, 10_000)
        received.append((length, int.from_bytes(data[:4], "little"), data == data[:4] * 2500))
    assert received == [(10_000, number, True) for number in range(ROUNDS)]
    region.buf[0] = 1
    assert [child.wait() for child in children] == [0, 0]


# -- Sockets with a way of their own to receive ------------------------------------------------------------------------


def test_by_its_own_method(region: Region, decoding: tuple[socket.socket, Decoding]) -> None:
    one, decoded = decoding
    one.send(b"Text")
    assert region.recv_into(decoded, PAGE - 2, 3) == 3
    assert region.recv_into(decoded, PAGE + 1, 3, flags=socket.MSG_PEEK) == 1
    assert region.read(PAGE - 2, 4) == b"tEXT"
    one.close()
    assert region.recv_into(decoded, 0, 3) == 1
    assert region.recv_into(decoded, 0, 3) == 0


def test_nothing_is_held_while_it_receives(region: Region, decoding: tuple[socket.socket, Decoding]) -> None:
    """Who waits for the network keeps nobody waiting: this thread too may change the pages."""
    one, decoded = decoding
    decoded.meanwhile = lambda: region.mprotect(0, region.size, READ_WRITE, timeout=0)
    one.send(b"text")
    assert region.recv_into(decoded, 0, 4) == 4
    assert region.generation == 1


@pytest.mark.parametrize("policy", ["die", "raise"])
def test_what_was_refused_after_all_comes_next(
    region: Region, decoding: tuple[socket.socket, Decoding], policy: str
) -> None:
    one, decoded = decoding
    region.on_violation(policy)
    region.mprotect(0, PAGE, READ)
    one.send(b"first")
    with pytest.raises(ProtectionError):  # before anything is received
        region.recv_into(decoded, 0, 10)
    region.mprotect(0, PAGE, READ_WRITE)
    decoded.meanwhile = lambda: region.mprotect(0, PAGE, READ)
    for _ in range(2):
        with pytest.raises(ProtectionError):
            region.recv_into(decoded, 0, 10)
    decoded.meanwhile = None
    one.send(b"second")
    assert region.recv_into(decoded, PAGE, 3) == 3
    assert region.recv_into(decoded, PAGE + 3, 10) == 2
    assert region.recv_into(decoded, PAGE + 5, 10) == 6
    assert region.read(PAGE, 11) == b"FIRSTSECOND"


def test_into_a_lease_by_its_own_method(region: Region, decoding: tuple[socket.socket, Decoding]) -> None:
    one, decoded = decoding
    one.send(b"text")
    region.mprotect(0, PAGE, READ)
    with region.lease(0, PAGE):
        assert region.recv_into(decoded, 0, 4) == 4
    assert region.read(0, 4) == b"TEXT"


def test_readinto_reads_descriptors(region: Region, decoding: tuple[socket.socket, Decoding]) -> None:
    with pytest.raises(TypeError, match="recv_into takes it"):
        region.readinto(decoding[1], 0, 1)


@pytest.fixture
def tls() -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """Without certificates, so that there are none in the tests."""
    one, other = socket.socketpair()
    here, there = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.check_hostname, here.verify_mode = False, ssl.CERT_NONE
    for context in (here, there):
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
        except ssl.SSLError:
            pytest.skip("this OpenSSL makes no connection without certificates")
    with in_background(lambda: there.wrap_socket(one, server_side=True)) as served:
        client = here.wrap_socket(other)
    assert isinstance(served[0], ssl.SSLSocket)
    with client, served[0]:
        yield served[0], client


def test_plain_text_of_a_tls_socket(region: Region, tls: tuple[ssl.SSLSocket, ssl.SSLSocket]) -> None:
    server, client = tls
    client.settimeout(0)
    with pytest.raises(ssl.SSLWantReadError):
        region.recv_into(client, 0, 10)
    client.settimeout(PATIENCE)
    server.send(b"hello, world")
    assert region.recv_into(client, 0, 5) == 5
    assert region.recv_into(client, 5, 100) == 7
    assert region.read(0, 12) == b"hello, world"
    client.send(b"still whole")
    assert server.recv(100) == b"still whole"
