"""Who is taken for dead: none that can still store, whatever keeps the caller from looking.

The participant here has lost its agent, which the kernel marks, and lives: who asks further must find that out.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Child, idle, until
from kernel import PAGE, end_thread_at, libc, until_agents_wait
from members import AT_ONCE, Fork, silent

import pyshare
from pyshare import READ

NEW_MOUNTS, NEW_TIME, PRIVATE = 0x20000, 0x80, 0x44000  # CLONE_NEWNS, CLONE_NEWTIME; MS_PRIVATE | MS_REC
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user, its mounts or its time")


def descriptors(left: int) -> Callable[[], None]:
    """So many can still be opened."""

    def use_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        opened = []
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        for fd in opened[:left]:
            os.close(fd)

    return use_up


def another_time() -> None:
    """The child is in a time namespace in which processes have begun at other times."""
    if libc.unshare(NEW_TIME):
        pytest.skip("a new time namespace is not permitted here")
    Path("/proc/self/timens_offsets").write_text("boottime 1000 0\n")


def mounts(*mount: bytes | None) -> Callable[[], None]:
    def change() -> None:
        assert libc.unshare(NEW_MOUNTS) == 0
        assert libc.mount(b"none", b"/", None, PRIVATE, None) == 0
        assert libc.mount(b"none", *mount[:2], 0, *mount[2:]) == 0

    return change


def hidden() -> None:
    """/proc shows the processes of others to nobody."""
    mounts(b"/proc", b"proc", b"hidepid=2")()
    os.setresuid(NOBODY, NOBODY, NOBODY)


CONDITIONS: dict[str, Callable[[], None]] = {
    "no descriptor left": descriptors(0),
    "one descriptor left": descriptors(1),
    "two descriptors left": descriptors(2),
}
WITH_ROOT: dict[str, Callable[[], None]] = {
    "another time namespace": another_time,
    "hidden processes": hidden,
    "no /proc": mounts(b"/proc", b"tmpfs", None),
}


def lives_without_an_agent(child: Child) -> None:
    until_agents_wait()
    child.say()
    until(lambda: len(os.listdir("/proc/self/task")) == 1)
    idle(child)


@pytest.mark.parametrize("condition", [*CONDITIONS, *[pytest.param(name, marks=needs_root) for name in WITH_ROOT]])
def test_who_lives_is_waited_for(fork: Fork, condition: str) -> None:
    def look(child: Child) -> None:
        (CONDITIONS | WITH_ROOT)[condition]()
        caller = Child(call) if condition == "another time namespace" else None
        if caller:  # who unshares it stays in the old one
            assert caller.wait() == 0
        else:
            call(child)

    def call(_: Child) -> None:
        with silent(alone):
            region.mprotect(0, PAGE, READ, timeout=AT_ONCE)

    with pyshare.create(size=2 * PAGE, engine="mprotect", mode=0o666) as region:
        alone = fork(lives_without_an_agent, point="A1_wait=exit@2")
        assert alone.hear() == "ok"
        region.mprotect(PAGE, PAGE, READ)
        assert alone.hear() == "ok"
        assert fork(look).wait() == 0
        alone.say()


def test_a_thread_that_was_ended_while_it_swept_keeps_no_close_waiting(fork: Fork) -> None:
    """It gives back a snapshot's memory, and its thread has no such right."""

    def snapshot() -> None:
        taken = region.snapshot()
        region.write(0, b"x")
        end_thread_at("fallocate")
        taken.close()

    def body(child: Child) -> None:
        sweeper = threading.Thread(target=snapshot, daemon=True)
        sweeper.start()
        until(lambda: not os.path.exists(f"/proc/self/task/{sweeper.native_id}"))
        region.close()
        child.say()
        os._exit(0)

    with pyshare.create(size=2 * PAGE) as region:
        region.write(0, b"a")
        child = fork(body)
        assert child.hear() == "ok"
        assert child.wait() == 0
