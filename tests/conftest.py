"""What every test shares: processes that are ended, and proof that nothing is left behind.

Synchronisation is by pipes and signals' own waits, never by sleeping.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

import pyshare
from pyshare import testing
from pyshare.testing import PATIENCE, until

__all__ = ["COMMAND", "PATIENCE", "Child", "idle", "run_in_thread", "until"]  # for the tests

COMMAND = " ".join(psutil.Process().cmdline())  # ours, and of those who are forked


LONG = (
    "test_histories.py",
    "test_bench.py",
    "test_spec.py",
    "test_examples.py",
)  # at first: no worker is left alone with one in the end


@functools.cache
def has_own_names() -> bool:
    """A /dev/shm of our own, where that is permitted: names of other programs, or of another run, do not disturb."""
    libc = ctypes.CDLL(None)
    new_mounts, private = 0x20000, 0x44000  # CLONE_NEWNS; MS_PRIVATE | MS_REC
    if os.geteuid() != 0 or libc.unshare(new_mounts) != 0:
        return False
    libc.mount(b"none", b"/", None, private, None)
    return bool(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777") == 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half of the time somebody is waited for, so two; where names of one disturb the other, none but pytest itself."""
    return 2 if has_own_names() else 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Names and temporary folders of our own, whatever else runs here, and Ctrl-C interrupts, whoever started us."""
    has_own_names()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("COLUMNS", None)  # readline, which pytest loads, tells workers of a terminal that is not theirs
    if config.option.basetemp is None:  # folders that pytest numbers go when any other run of pytest ends
        config.option.basetemp = tempfile.mkdtemp(prefix="pyshare-tests-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """What there is now stays: the garbage that tests collect is looked for among what they have made."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run tests/test_sanitize.py for minutes, not seconds")


@pytest.fixture
def stress(request: pytest.FixtureRequest) -> bool:
    """Is there time for a long run?"""
    return bool(request.config.getoption("--stress"))


class Child(testing.Child):
    """One that may be told to do something at a point of the core (ext/os/point.h)."""

    def __init__(self, body: Callable[[Child], object], *, point: str | None = None) -> None:
        if point is not None:
            os.environ["PYSHARE_POINT"] = point
        try:
            super().__init__(body)  # type: ignore[arg-type]
        finally:
            os.environ.pop("PYSHARE_POINT", None)


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


def run_in_thread(body: Callable[[], object]) -> None:
    """Runs it in another thread; what it raises is raised here."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    for error in raised:
        raise error


def late_in_two_threads(violate: Callable[[pyshare.Region, list[int]], object]) -> list[int]:
    """What two threads note as late that violate side by side, each in a region of its own."""
    late: list[int] = []
    sys.setswitchinterval(1e-5)
    regions = [pyshare.create(size=16 * 4096, prot=pyshare.READ, on_violation="raise") for _ in range(2)]
    threads = [threading.Thread(target=violate, args=[region, late]) for region in regions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return late


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
            env={**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning", **environment},  # 3.12: fork and threads
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


def _children() -> set[int]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none, so there are none of theirs; else all processes have to be looked at
        return set()
    return {p.pid for p in psutil.Process().children(recursive=True) if "resource_tracker" not in str(p.cmdline())}


def _left() -> tuple[set[int], set[str]]:
    children = _children()
    ours = children | {os.getpid()}
    return children, {p.name for p in Path("/dev/shm").glob("pyshare*") if _held_by(ours, p)}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    children, entries = _left()
    yield
    gc.collect()  # or what a test has left to the collector goes in the middle of another one
    pyshare.names()  # what a killed holder left is cleared away by the next who looks
    children_now, entries_now = _left()
    assert entries_now <= entries, "names left behind"
    assert children_now <= children, "processes left behind"
