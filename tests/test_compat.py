"""pyshare.compat: a program of multiprocessing.shared_memory with another import, and where it is better off.

CPython's own tests of the three classes are test_stdlib.py's.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import PATIENCE, Child, until
from hypothesis import given, settings
from hypothesis import strategies as st

import pyshare
from pyshare import _holder
from pyshare.__main__ import main
from pyshare.compat import ShareableList, SharedMemory, SharedMemoryManager, _region_name

# -- As there --------------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_python_3_13() -> None:
    said = {name: (p.kind, p.default) for name, p in inspect.signature(SharedMemory).parameters.items()}
    word, after = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    assert said.pop("persist") == (after, False)  # ours
    assert said == {"name": (word, None), "create": (word, False), "size": (word, 0), "track": (after, True)}
    assert list(inspect.signature(ShareableList).parameters) == ["sequence", "name"]
    for method in ("SharedMemory", "ShareableList"):
        there = inspect.signature(getattr(SharedMemoryManager.__mro__[1], method))
        assert list(inspect.signature(getattr(SharedMemoryManager, method)).parameters) == list(there.parameters)


def test_objects_are_those_of_the_standard_library() -> None:
    items = ShareableList([1])
    assert isinstance(items, shared_memory.ShareableList)
    assert isinstance(items.shm, shared_memory.SharedMemory)
    items.shm.close()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"create": True},
        {"create": True, "size": -1},
        {"create": True, "size": "1"},
        {"size": -1},
        {"name": "test_compat_nobody"},
        {"name": "test/compat"},
        {"name": ""},
        {"name": 5},
        {"name": b"test"},
        {"name": "x" * 256},
    ],
    ids=str,
)
def test_errors_are_of_the_same_class(arguments: Any) -> None:
    with pytest.raises(Exception) as there:  # noqa: PT011
        shared_memory.SharedMemory(**arguments)
    with pytest.raises(Exception) as here:  # noqa: PT011
        SharedMemory(**arguments)
    assert issubclass(here.type, there.type)
    assert getattr(here.value, "errno", None) == getattr(there.value, "errno", None)


def test_what_older_pythons_let_pass() -> None:
    with pytest.raises(ValueError, match="embedded null"):
        SharedMemory("test_compat\0nobody")
    with pytest.raises(TypeError):
        SharedMemory(create=True, size=1.5)  # type: ignore[arg-type,unused-ignore]


def test_a_name_is_taken_once() -> None:
    block = SharedMemory("test_compat", create=True, size=10)
    with pytest.raises(FileExistsError):
        SharedMemory("/test_compat", create=True, size=10)
    block.close()
    SharedMemory("test_compat", create=True, size=10).close()


@pytest.mark.parametrize("name", ["plain", "/slashed", "a b", "--begins so", ".hidden", "é", "x:y,z", "-", "x" * 200])
def test_any_name_of_a_block_will_do(name: str) -> None:
    block = SharedMemory(name, create=True, size=10)
    other = SharedMemory(name.lstrip("/"))
    other.buf[3] = 7
    assert (block.name, block.buf[3]) == (name, 7)
    assert repr(block) == f"SharedMemory({name!r}, size=10)"
    other.close()
    block.close()


@settings(database=None)
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=16))
def test_different_blocks_are_different_regions(name: str) -> None:
    """What was written for a byte can be read back, so that no two names become one."""
    found = _region_name(name)
    if found.startswith("--"):
        written = found[2:].split("-")
        assert (
            written[0].encode() + b"".join(bytes.fromhex(w[:2]) + w[2:].encode() for w in written[1:]) == name.encode()
        )
    else:
        assert found == name


def test_made_up_names_look_the_same() -> None:
    block = SharedMemory(create=True, size=1)
    assert block.name.startswith("psm_")
    block.close()


def test_the_usual_end_is_quiet_and_another_is_not() -> None:
    block = SharedMemory(create=True, size=1)
    block.close()
    assert (block.buf, block.region) == (None, None)
    block.close()
    block.unlink()  # it went with the last holder
    with pytest.raises(FileNotFoundError):
        block.unlink()


def test_unlink_leaves_it_to_who_has_it() -> None:
    block = SharedMemory(create=True, size=1)
    other = SharedMemory(block.name)
    block.unlink()
    other.buf[0] = 9
    assert block.buf[0] == 9
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)
    other.close()
    block.close()
    with pytest.raises(FileNotFoundError):  # not its close, but somebody's unlink removed the name
        other.unlink()


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
def test_another_block_of_the_name_stays(closed: bool) -> None:
    block = SharedMemory("test_compat", create=True, size=1)
    if closed:
        block.close()
    else:
        block.unlink()
    other = SharedMemory("test_compat", create=True, size=1)
    with contextlib.nullcontext() if closed else pytest.raises(FileNotFoundError):
        block.unlink()
    SharedMemory("test_compat").close()
    other.close()
    block.close()


def test_a_dropped_object_is_quiet() -> None:
    SharedMemory("test_compat", create=True, size=1)  # warnings are errors here
    with pytest.raises(FileNotFoundError):
        SharedMemory("test_compat")


# -- Better ----------------------------------------------------------------------------------------------------------


def test_size_is_exact_and_pickles_attach() -> None:
    block = SharedMemory(create=True, size=5001)
    other = pickle.loads(pickle.dumps(block))
    assert (other.size, len(other.buf)) == (5001, 5001)
    other.close()
    block.close()


def test_the_region_is_there() -> None:
    block = SharedMemory(create=True, size=8192)
    assert block.region is not None
    with block.region.lock(0), block.region.lease(0, 4096):
        block.buf[0] = 1
    with pyshare.attach(block.name) as region:
        region.mprotect(0, 4096, pyshare.READ)
        assert block.region.protection(0) == pyshare.READ
    block.close()


USERS: dict[str, Callable[[Any], Any]] = {
    "ndarray": lambda buf: np.ndarray((4,), "u1", buf),
    "frombuffer": lambda buf: np.frombuffer(buf, "u1"),
    "slice": lambda buf: buf[2:6],
    "slice of a slice": lambda buf: buf[2:6][1:],
}


@pytest.mark.parametrize("user", USERS)
def test_arrays_keep_the_memory(user: str) -> None:
    gc.disable()  # it goes at once, by reference counts
    try:
        block = SharedMemory("test_compat", create=True, size=100)
        array = USERS[user](block.buf)
        block.close()
        array[0] = 7
        assert array[0] == 7
        assert "test_compat" in pyshare.names()
        del array
        assert "test_compat" not in pyshare.names()
    finally:
        gc.enable()


def test_nothing_is_left_of_a_killed_holder(fork: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        block = SharedMemory("test_compat", create=True, size=100)
        child.say(block.name)
        child.hear()

    child = fork(body)
    child.hear()
    block = SharedMemory("test_compat")
    child.kill()
    child.wait()
    assert SharedMemory("test_compat").size == 100  # we have it
    block.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory("test_compat")
    assert not os.path.exists("/dev/shm/pyshare.test_compat")


def test_a_child_has_it_from_the_fork_on(fork: Callable[..., Child]) -> None:
    block = SharedMemory(create=True, size=100)

    def body(child: Child) -> None:
        block.buf[0] = 3
        block.close()
        child.say()

    assert fork(body).hear() == "ok"
    assert block.buf[0] == 3
    block.close()


def test_no_tracker_is_started(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python("""
from multiprocessing import resource_tracker
from pyshare.compat import ShareableList, SharedMemory, SharedMemoryManager
with SharedMemoryManager() as manager:
    SharedMemory(create=True, size=1).close()
    manager.ShareableList([1]).shm.close()
print(resource_tracker._resource_tracker._fd)
""")
    assert (done.stdout, done.stderr) == ("None\n", "")


# -- ShareableList ---------------------------------------------------------------------------------------------------

ITEMS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(), st.binary()
)


@settings(max_examples=50, deadline=None, database=None)
@given(st.lists(ITEMS, max_size=8))
def test_items_come_back_as_they_were_stored(items: list[Any]) -> None:
    stored: Any = ShareableList(items)
    other: Any = ShareableList(name=stored.shm.name)
    assert list(other) == items
    assert [type(item) for item in other] == [type(item) for item in items]
    for index, item in enumerate(items):
        other[index] = None
        assert stored[index] is None
        stored[index - len(items)] = item
    assert list(other) == items
    other.shm.close()
    stored.shm.close()


def test_items_stay_in_their_room() -> None:
    items: Any = ShareableList(["x" * 8, 1])
    items[0] = "é\0" + "y" * 13  # the standard library's room: the next multiple of 8, and more
    with pytest.raises(ValueError, match="exceeds available storage"):
        items[0] = "z" * 17
    with pytest.raises(ValueError, match="exceeds available storage"):
        items[1] = b"z" * 9
    assert list(items) == ["é\0" + "y" * 13, 1]
    items.shm.close()


def test_what_is_no_item() -> None:
    with pytest.raises(KeyError):
        ShareableList([[]])  # type: ignore[type-var,unused-ignore]
    items: Any = ShareableList([1, 2])
    for index in (2, -3):
        with pytest.raises(IndexError):
            items[index]
        with pytest.raises(IndexError):
            items[index] = 1
    with pytest.raises(TypeError):
        items[0:1]
    with pytest.raises(KeyError):
        items[0] = []
    items.shm.close()


# -- SharedMemoryManager ---------------------------------------------------------------------------------------------


def test_a_managers_server_holds_its_blocks() -> None:
    with SharedMemoryManager() as manager:
        name = manager.SharedMemory(size=100).name  # ours is dropped at once
        block = SharedMemory(name)
        gone = manager.ShareableList(["x"])
        gone.shm.unlink()  # which the shutdown takes well
        gone.shm.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)
    block.buf[0] = 1
    block.close()


def test_blocks_of_a_killed_manager_are_gone() -> None:
    manager = SharedMemoryManager()
    manager.start()
    name = manager.SharedMemory(size=100).name
    server = manager._process  # type: ignore[attr-defined]
    server.kill()
    server.join()
    shutil.rmtree(os.path.dirname(manager.address))  # of its socket, which nobody else removes
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)


# -- persist ---------------------------------------------------------------------------------------------------------


class Kept:
    """A block with a process that keeps it, made by a process that is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        block = SharedMemory(name)
        assert block.region is not None
        [self.pid] = _holder.holders(block.region)
        block.close()
        self.pidfd = os.pidfd_open(self.pid)

    def has_ended(self) -> bool:
        return bool(select.select([self.pidfd], [], [], PATIENCE)[0])


@pytest.fixture
def kept(fork: Callable[..., Child]) -> Iterator[Kept]:
    def body(child: Child) -> None:
        block = SharedMemory("test_compat", create=True, size=100, persist=True)
        block.buf[0] = 7
        child.say()
        child.hear()

    child = fork(body)
    assert child.hear() == "ok"
    kept = Kept("test_compat")
    child.kill()
    child.wait()
    yield kept
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(kept.pidfd, signal.SIGKILL)
    assert kept.has_ended()
    os.close(kept.pidfd)


def test_a_kept_block_outlives_its_holders(kept: Kept) -> None:
    block = SharedMemory("test_compat")
    assert (block.buf[0], block.size) == (7, 100)
    block.close()
    block.unlink()
    assert kept.has_ended()
    assert not os.path.exists("/dev/shm/pyshare.test_compat")


ENDS: dict[str, Callable[[Kept], object]] = {
    "pyshare.unlink": lambda kept: pyshare.unlink(kept.name),
    "rm": lambda _: os.unlink("/dev/shm/pyshare.test_compat"),
    "replace": lambda kept: pyshare.create(kept.name, size=1, replace=True).close(),
    "SIGTERM": lambda kept: signal.pidfd_send_signal(kept.pidfd, signal.SIGTERM),
}


@pytest.mark.parametrize("how", ENDS)
def test_its_keeper_ends(kept: Kept, how: str) -> None:
    ENDS[how](kept)
    assert kept.has_ended()
    assert not os.path.exists("/dev/shm/pyshare.test_compat")


def test_the_command_line_shows_it_and_ends_its_keeper(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert re.search(rf"^test_compat .* kept by pid {kept.pid}\b", capsys.readouterr().out, re.M)
    assert main(["unlink", "test_compat"]) == 0
    assert f"pid {kept.pid}, which kept it, has ended" in capsys.readouterr().out
    assert kept.has_ended()


def test_its_keeper_is_told_and_does_not_look(kept: Kept) -> None:
    """It sleeps, and wakes at every change of the names, which need not concern its own."""
    sigtimedwait = "128 "
    until(lambda: Path(f"/proc/{kept.pid}/syscall").read_text().startswith(sigtimedwait))
    before, start = psutil.Process(kept.pid).num_ctx_switches().voluntary, time.monotonic()
    pyshare.create("test_compat_other", size=1).close()
    until(lambda: psutil.Process(kept.pid).num_ctx_switches().voluntary > before)
    assert time.monotonic() - start < _holder._BACKSTOP / 2
    assert not select.select([kept.pidfd], [], [], 0)[0]


def test_its_keeper_has_nothing_of_who_started_it(kept: Kept) -> None:
    process = psutil.Process(kept.pid)
    assert process.cwd() == "/"
    assert os.getsid(kept.pid) != os.getsid(0)
    assert process.ppid() != os.getpid()
    assert process.cmdline()[-2:] == ["pyshare._holder", "test_compat"]
    assert [os.readlink(f"/proc/{kept.pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3


def test_who_persists_again_starts_no_other(kept: Kept) -> None:
    block = SharedMemory("test_compat", persist=True)
    assert block.region is not None
    assert _holder.holders(block.region) == [kept.pid]
    block.close()


def test_nothing_is_left_where_no_keeper_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_holder, "_MODULE", "pyshare._nobody")
    with pytest.raises(pyshare.ShareError, match=r"no process keeps region 'test_compat': .*No module named"):
        SharedMemory("test_compat", create=True, size=100, persist=True)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        SharedMemory("test_compat", create=True, size=100, persist=True)
    assert not os.path.exists("/dev/shm/pyshare.test_compat")
