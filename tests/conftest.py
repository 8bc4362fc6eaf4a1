"""What every test shares: processes that are ended, and proof that nothing is left behind.

Synchronisation is by pipes and signals' own waits, never by sleeping.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

import pyshare

PATIENCE = 60.0  # seconds after which a test gives up on something that should have happened long ago


def pytest_configure() -> None:
    """A /dev/shm of our own, where that is permitted: names of other programs, or of another run, do not disturb.

    And Ctrl-C interrupts, whoever started us.
    """
    libc = ctypes.CDLL(None)
    new_mounts, private = 0x20000, 0x44000  # CLONE_NEWNS; MS_PRIVATE | MS_REC
    if os.geteuid() == 0 and libc.unshare(new_mounts) == 0:
        libc.mount(b"none", b"/", None, private, None)
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run tests/test_sanitize.py for minutes, not seconds")


@pytest.fixture
def stress(request: pytest.FixtureRequest) -> bool:
    """Is there time for a long run?"""
    return bool(request.config.getoption("--stress"))


def until(condition: Callable[[], object]) -> None:
    """Yields the processor until it is true; fails when that never comes."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never comes true"
        os.sched_yield()


class Child:
    """A forked process that runs a function; ended and reaped with the test."""

    def __init__(self, body: Callable[[Child], object], *, point: str | None = None) -> None:
        to_child, self._send = os.pipe()
        self._receive, to_parent = os.pipe()
        if point is not None:
            os.environ["PYSHARE_POINT"] = point
        try:
            self.pid = os.fork()
        finally:
            os.environ.pop("PYSHARE_POINT", None)
        if self.pid == 0:
            self._become(body, to_child, to_parent)
        os.close(to_child)
        os.close(to_parent)
        self.status: int | None = None

    def _become(self, body: Callable[[Child], object], to_child: int, to_parent: int) -> None:
        code = 1
        try:
            os.close(self._send)
            os.close(self._receive)
            self._send, self._receive = to_parent, to_child
            body(self)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    # Both sides speak bytes; each message is one line.

    def say(self, word: str = "ok") -> None:
        os.write(self._send, word.encode() + b"\n")

    def hear(self) -> str:
        """The next line from the other side; fails when that side is gone."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._receive], [], [], PATIENCE)[0], "the other side is silent"
            byte = os.read(self._receive, 1)
            assert byte, f"the other side is gone, after {line!r}"
            line += byte
        return line[:-1].decode()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        self.kill(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"not stopped but ended: {status}"

    def resume(self) -> None:
        self.kill(signal.SIGCONT)

    def wait(self) -> int:
        """The exit code; negative: the signal that ended it."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            ended = select.select([pidfd], [], [], PATIENCE)[0]
            os.close(pidfd)
            assert ended, f"process {self.pid} does not end"
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def end(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                self.kill(signal.SIGCONT)
                self.kill()
            self.wait()
        os.close(self._send)
        os.close(self._receive)


@pytest.fixture
def fork() -> Iterator[Callable[..., Child]]:
    """fork(body, point=None): a Child that runs body(child)."""
    children: list[Child] = []

    def start(body: Callable[[Child], object], *, point: str | None = None) -> Child:
        children.append(Child(body, point=point))
        return children[-1]

    yield start
    for child in children:
        child.end()


@pytest.fixture
def crash(fork: Callable[..., Child], tmp_path: Path) -> Callable[[Callable[[Child], object]], tuple[int, str]]:
    """crash(body): the exit code of a child that ran body(child), and what it and faulthandler wrote on stderr."""

    def run(body: Callable[[Child], object]) -> tuple[int, str]:
        path = tmp_path / "stderr"

        def aside(child: Child) -> None:
            with path.open("w") as file:
                os.dup2(file.fileno(), 2)
            faulthandler.enable(file=2)  # pytest has enabled it: this only moves its output
            body(child)

        return fork(aside).wait(), path.read_text()

    return run


def idle(child: Child) -> None:
    child.say()
    child.hear()


@pytest.fixture
def joined(fork: Callable[..., Child]) -> Callable[..., Child]:
    """joined(body=idle, point=None): a child that has become a participant; its body begins with child.say()."""

    def start(body: Callable[[Child], object] = idle, point: str | None = None) -> Child:
        child = fork(body, point=point)
        assert child.hear() == "ok"
        return child

    return start


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(source, *arguments, pass_fds=(), **environment): a fresh interpreter that ran it, with its output."""

    def run(
        source: str, *arguments: str, pass_fds: Sequence[int] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(source)
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            pass_fds=pass_fds,
        )

    return run


def _held_by(ours: set[int], entry: Path) -> bool:
    """Other names are those of other people's processes on this machine, or stale."""
    with contextlib.suppress(FileNotFoundError):
        inode = entry.stat().st_ino
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return any(lock[1] == "FLOCK" and lock[5].endswith(f":{inode}") and int(lock[4]) in ours for lock in locks)
    return False


def _left() -> tuple[set[int], set[str]]:
    children = {p.pid for p in psutil.Process().children(recursive=True) if "resource_tracker" not in str(p.cmdline())}
    ours = children | {os.getpid()}
    return children, {p.name for p in Path("/dev/shm").glob("pyshare*") if _held_by(ours, p)}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    children, entries = _left()
    yield
    pyshare.names()  # what a killed holder left is cleared away by the next who looks
    children_now, entries_now = _left()
    assert entries_now <= entries, "names left behind"
    assert children_now <= children, "processes left behind"
