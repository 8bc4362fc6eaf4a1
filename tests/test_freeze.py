"""Freezing: everything is READ for everybody, and afterwards exactly what it was, whoever died meanwhile.

What a process may do is asked of the kernel (/proc/PID/maps, /proc/PID/pagemap).  Where a test says that somebody
waits, it has seen that in the control segment.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import (
    CLOSERS,
    LEASES,
    LOCK,
    PAGE,
    SECTIONS,
    WAITING,
    Mappings,
    agreed,
    co_operative,
    die_quietly,
    elsewhere,
    held,
    in_background,
    mapped,
    readable,
    refuse,
    sleeping,
    tell,
    word,
)

import pyshare
from pyshare import (
    EXEC,
    NONE,
    READ,
    READ_WRITE,
    CorruptRegion,
    Frozen,
    PropagationTimeout,
    ProtectionError,
    Region,
    ShareError,
)

Fork = Callable[..., Child]
Joined = Callable[..., Child]
PAGES = 16
FREEZER, FROZEN = 2560, 2568  # in ext/segment/layout.h: line 40
AT_ONCE = 0.05  # a timeout that is meant to run out
MIXED = [(0, 4, READ_WRITE), (4, 2, NONE), (6, 3, READ), (9, 1, READ | EXEC), (10, 1, NONE), (11, 5, READ_WRITE)]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(size=PAGES * PAGE, max_participants=6, engine=request.param) as made:
        begins(made)
        yield made


def begins(region: Region) -> None:
    for first, count, prot in MIXED:
        region.mprotect(first * PAGE, count * PAGE, prot)


ALL_READ = [(0, PAGES * PAGE, READ)]


def as_it_was(region: Region, *others: Child) -> None:
    assert region.protections() == [(first * PAGE, count * PAGE, prot) for first, count, prot in MIXED]
    agreed(region, *[child.pid for child in others])


def freezer(region: Region) -> Callable[[Child], None]:
    """A body that freezes, and thaws when it is told."""

    def body(child: Child) -> None:
        with region.frozen():
            child.say()
            child.hear()
        idle(child)

    return body


def nothing_is_frozen(region: Region, *others: Child) -> None:
    assert not word(region, FROZEN, "Q")
    assert not word(region, FREEZER)
    as_it_was(region)
    with region.frozen():  # and whoever was late follows
        agreed(region, *[child.pid for child in others])
    as_it_was(region, *others)


def blocked(*pids: int) -> Any:
    """The call inside times out because of these, and has changed nothing."""
    return pytest.raises(
        PropagationTimeout, check=lambda error: error.pids == sorted(pids) and error.generation is None
    )


# -- What a freeze is -------------------------------------------------------------------------------------------------


class There(NamedTuple):
    """The region in a process that has attached it by itself."""

    address: int
    size: int


def attached(region: Region, fork: Fork, engine: str) -> tuple[Child, There]:
    """A process that has it by this engine; it ends when it is told."""

    def body(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        with pyshare.attach(fd, engine=engine) as same:
            child.say(str(same.address))
            child.hear()

    child = fork(body)
    return child, There(int(child.hear()), region.size)


@pytest.mark.parametrize("other", ["mprotect", "uffd"])
def test_everything_is_read_until_the_end(region: Region, fork: Fork, other: str) -> None:
    child, there = attached(region, fork, other)
    before = mapped(child.pid, there)
    with region.frozen() as frozen:
        assert isinstance(frozen, Frozen)
        assert frozen.held
        assert frozen.generation == region.generation == len(MIXED) + 1
        assert agreed(region) == mapped(child.pid, there) == region.protections() == ALL_READ
        assert region.read(4 * PAGE, 2) == bytes(2)
        with pytest.raises(ProtectionError):
            region.write(0, b"1")
    assert not frozen.held
    as_it_was(region)
    assert readable(mapped(child.pid, there)) == readable(before)
    region.write(0, b"1")
    frozen.release()
    assert region.generation == len(MIXED) + 2


def test_the_freezing_thread_does_not_wait_for_itself(region: Region) -> None:
    with region.frozen():
        calls = [lambda: region.mprotect(0, PAGE, READ), lambda: region.lease(0, PAGE), region.frozen]
        for call in calls:
            with pytest.raises(ShareError, match="this thread has frozen the region"):
                call()
        with pytest.raises(BufferError, match="frozen by us"):
            region.close()
        assert region.protections() == ALL_READ
    as_it_was(region)


def test_a_freeze_ends_once(region: Region) -> None:
    frozen = region.frozen()
    assert repr(frozen) == f"<pyshare.Frozen at generation {len(MIXED) + 1}, held>"
    thread = threading.Thread(target=frozen.release)
    thread.start()
    thread.join()
    assert repr(frozen) == f"<pyshare.Frozen at generation {len(MIXED) + 1}, released>"
    frozen.release()
    assert region.generation == len(MIXED) + 2
    as_it_was(region)
    with pytest.raises(TypeError, match=r"region\.frozen"):
        Frozen()


def test_dropped_while_held(region: Region) -> None:
    with pytest.warns(ResourceWarning, match="a freeze was dropped"):
        region.frozen()
    nothing_is_frozen(region)


def test_what_raises_inside_leaves_nothing_frozen(region: Region) -> None:
    with pytest.raises(KeyboardInterrupt), region.frozen():
        signal.raise_signal(signal.SIGINT)
    nothing_is_frozen(region)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1"])
def test_a_wrong_timeout(region: Region, timeout: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="timeout must be"):
        region.frozen(timeout=timeout)
    nothing_is_frozen(region)


def test_a_size_that_is_no_whole_pages() -> None:
    with pyshare.create(size=2 * PAGE + 1) as region:
        with region.frozen():
            assert region.protections() == [(0, 2 * PAGE + 1, READ)]
        assert region.protections() == [(0, 2 * PAGE + 1, READ_WRITE)]


@pytest.mark.parametrize("changes", [0, 1021, 1022, 1023], ids=lambda changes: f"{changes} changes ago")
def test_a_page_keeps_its_author(changes: int) -> None:
    """Past a freeze and its thaw, as far as the ring goes back; during the freeze it is the freeze."""
    with pyshare.create(size=4 * PAGE, engine="mprotect") as region:
        region.mprotect(0, PAGE, READ)
        for _ in range(changes):
            region.mprotect(2 * PAGE, PAGE, READ)

        def author(page: int) -> tuple[int | None, int | None]:
            with pytest.raises(ProtectionError) as caught:
                region.write(page * PAGE, b"1")
            return caught.value.generation, caught.value.author

        us = os.getpid()
        with region.frozen() as frozen:
            assert author(0) == author(3) == (frozen.generation, us)
        assert author(0) == ((1, us) if changes < 1022 else (None, None))
        with region.frozen():
            region.read(0, 1)
        assert author(0) == ((1, us) if changes < 1020 else (None, None))


# -- Who waits for it -------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Region], object]] = {
    "mprotect": lambda region: region.mprotect(0, PAGE, READ_WRITE, timeout=PATIENCE),
    "lease": lambda region: region.lease(6 * PAGE, PAGE, timeout=PATIENCE).release(),
    "window": lambda region: region.lease(6 * PAGE, PAGE, timeout=PATIENCE, window=True).release(),
    "refused": lambda region: refused(lambda: region.lease(4 * PAGE, PAGE, timeout=PATIENCE)),  # NONE afterwards
    "frozen": lambda region: region.frozen(timeout=PATIENCE).release(),
}
calls = pytest.mark.parametrize("call", CALLS)


def waits(region: Region, call: str) -> bool:
    """Somebody sleeps until the freeze is over."""
    if call in ("lease", "window", "refused"):  # on the freezer's closer
        return any(word(region, CLOSERS + 64 + 24 * entry) & WAITING for entry in range(64))
    return bool(word(region, FREEZER) & WAITING)


@calls
@pytest.mark.parametrize("where", ["thread", "process"])
def test_others_wait_for_the_thaw(region: Region, fork: Fork, call: str, where: str) -> None:
    def body(child: Child) -> None:
        CALLS[call](region)
        child.say()

    if where == "process":
        with region.frozen() as frozen:
            other = fork(body)
            until(lambda: waits(region, call))
            assert region.generation == frozen.generation
            assert region.protections() == ALL_READ
        assert other.hear() == "ok"
        assert other.wait() == 0
    else:
        frozen = region.frozen()
        with in_background(lambda: CALLS[call](region)) as outcomes:
            until(lambda: waits(region, call))
            assert outcomes == []
            frozen.release()
        assert not isinstance(outcomes[0], Exception)
    nothing_is_frozen(region)


TRIES: list[Callable[[Region], object]] = [
    lambda region: region.mprotect(0, PAGE, READ, timeout=AT_ONCE),
    lambda region: region.lease(6 * PAGE, PAGE, timeout=AT_ONCE),
    lambda region: region.lease(6 * PAGE, PAGE, timeout=AT_ONCE, window=True),
    lambda region: region.frozen(timeout=AT_ONCE),
]


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_others_time_out(region: Region, joined: Joined, stopped: bool) -> None:
    """Nobody thaws for a freezer that is alive."""
    holder = joined(freezer(region))
    if stopped:
        holder.stop()
    for attempt in TRIES:
        with blocked(holder.pid):
            attempt(region)
    assert region.generation == len(MIXED) + 1
    assert region.protections() == ALL_READ
    assert region.read(0, 1) == b"\0"
    if stopped:
        holder.resume()
    tell(holder, "thaw")
    nothing_is_frozen(region, holder)


@calls
@pytest.mark.parametrize("early", [False, True], ids=["found dead", "dies meanwhile"])
def test_others_come_after_a_dead_freezer(region: Region, joined: Joined, call: str, early: bool) -> None:
    bystander, holder = joined(), joined(freezer(region))
    holder.stop()
    if early:
        with in_background(lambda: CALLS[call](region)) as outcomes:
            until(lambda: waits(region, call))
            holder.kill()
        assert not isinstance(outcomes[0], Exception)
    else:
        holder.kill()
        holder.wait()
        CALLS[call](region)
    nothing_is_frozen(region, bystander)


# -- Whom it waits for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [False, True], ids=["in place", "window"])
def test_leases_end_first(region: Region, joined: Joined, window: bool) -> None:
    def body(child: Child) -> None:
        with region.lease(6 * PAGE, PAGE, window=window) as lease:
            child.say()
            child.hear()
            lease.view[:4] = b"last"
        idle(child)

    holder = joined(body)
    with blocked(holder.pid):
        region.frozen(timeout=AT_ONCE)
    assert not word(region, FREEZER)
    assert not word(region, CLOSERS, "Q")
    assert region.generation == len(MIXED)

    def freeze() -> bytes:
        with region.frozen(timeout=PATIENCE):
            return region.read(6 * PAGE, 4)

    with in_background(freeze) as outcomes:
        until(lambda: word(region, CLOSERS, "Q"))
        assert region.protection(0) == READ_WRITE
        tell(holder, "write")
    assert outcomes == [b"last"]
    nothing_is_frozen(region, holder)


def test_changes_go_on_while_it_waits_for_leases(region: Region, joined: Joined) -> None:
    def body(child: Child) -> None:
        with region.lease(6 * PAGE, PAGE):
            child.say()
            child.hear()
            region.mprotect(0, PAGE, NONE)
        idle(child)

    holder = joined(body)
    with in_background(lambda: region.frozen(timeout=PATIENCE).release()) as outcomes:
        until(lambda: held(region, LEASES, 6)[0] and word(region, CLOSERS, "Q"))
        tell(holder, "change")
    assert outcomes == [None]
    assert region.protection(0) == NONE
    agreed(region, holder.pid)


def test_the_own_lease_is_in_the_way(region: Region) -> None:
    with region.lease(6 * PAGE, PAGE), pytest.raises(ShareError, match="would wait for itself"):
        region.frozen()
    nothing_is_frozen(region)


def test_the_lock_of_a_stopped_caller(region: Region, fork: Fork) -> None:
    caller = fork(lambda _: region.mprotect(0, PAGE, READ_WRITE), point="C4_map=stop")
    caller.wait_stopped()
    with blocked(caller.pid):
        region.frozen(timeout=AT_ONCE)
    assert not word(region, FREEZER)
    caller.resume()
    assert caller.wait() == 0
    nothing_is_frozen(region)


@co_operative
def test_a_silent_participant(region: Region, joined: Joined) -> None:
    """The freeze was made, and is taken back: nothing is frozen when the timeout is told."""
    silent, bystander = joined(), joined()
    silent.stop()
    with blocked(silent.pid):
        region.frozen(timeout=AT_ONCE)
    assert region.generation == len(MIXED) + 2
    as_it_was(region, bystander)
    silent.resume()
    nothing_is_frozen(region, silent, bystander)


@co_operative
def test_the_end_does_not_wait_for_the_silent_for_ever(region: Region, joined: Joined) -> None:
    silent, bystander = joined(), joined()
    with region.frozen():
        silent.stop()
    as_it_was(region, bystander)
    assert not word(region, FREEZER)
    silent.resume()
    nothing_is_frozen(region, silent, bystander)


@co_operative
def test_a_participant_that_cannot_follow(region: Region, joined: Joined) -> None:
    """It is undone, and nothing is frozen."""

    def body(child: Child) -> None:
        refuse("mprotect", errno.ENOMEM)
        idle(child)

    broken, bystander = joined(body), joined()
    with pytest.raises(OSError, match=f"frozen: pid {broken.pid} could not apply") as caught:
        region.frozen()
    assert caught.value.errno == errno.ENOMEM
    assert not word(region, FROZEN, "Q")
    assert not word(region, FREEZER)
    as_it_was(region, bystander)
    assert [one.fenced for one in region.participants() if one.pid == broken.pid] == [True]
    broken.kill()
    broken.wait()
    nothing_is_frozen(region, bystander)


@co_operative
def test_a_thaw_is_never_undone(region: Region, joined: Joined) -> None:
    """Who cannot follow it is fenced, and follows when it can."""

    def body(child: Child) -> None:
        child.say()
        child.hear()
        mappings = Mappings()
        mappings.fill()
        child.say()
        child.hear()
        mappings.free(20)
        idle(child)

    full, bystander = joined(body), joined()
    with region.frozen():
        tell(full, "fill")
    as_it_was(region, bystander)
    assert [one.pid for one in region.participants() if one.fenced] == [full.pid]
    assert mapped(full.pid, region) == [(0, PAGES * PAGE, NONE)]
    tell(full, "free")
    region.mprotect(0, PAGE, READ_WRITE)
    nothing_is_frozen(region, full, bystander)


# -- Signals ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_it_waits_for_a_lease(region: Region, fork: Fork) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            region.frozen(timeout=None)
        idle(child)

    with region.lease(6 * PAGE, PAGE):
        waiter = fork(body)
        until(lambda: word(region, CLOSERS, "Q"))
        sleeping(region, waiter.pid)
        waiter.kill(signal.SIGINT)
        assert waiter.hear() == "ok"
        assert not word(region, FREEZER)
    nothing_is_frozen(region, waiter)


@co_operative
@pytest.mark.parametrize("goes_on", [False, True], ids=["Ctrl-C", "another"])
def test_a_signal_while_it_waits_for_the_silent(region: Region, fork: Fork, joined: Joined, goes_on: bool) -> None:
    """The freeze is made by then. Ctrl-C takes it back; after another signal the wait goes on."""

    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, lambda *_: child.say("over"))
        if goes_on:
            with region.frozen(timeout=None):
                idle(child)
        else:
            with pytest.raises(KeyboardInterrupt):
                region.frozen(timeout=None)
        idle(child)

    silent = joined()
    silent.stop()
    waiter = fork(body)
    until(lambda: region.protections() == ALL_READ)
    waiter.kill(signal.SIGUSR1 if goes_on else signal.SIGINT)
    if goes_on:
        assert waiter.hear() == "over"
        assert region.protections() == ALL_READ
        silent.resume()
        assert waiter.hear() == "ok"
        agreed(region, silent.pid, waiter.pid)
        tell(waiter, "thaw")
    else:
        assert waiter.hear() == "ok"
        assert not word(region, FREEZER)
        silent.resume()
    nothing_is_frozen(region, silent, waiter)


def test_ctrl_c_at_the_end_behind_a_stopped_caller(region: Region, fork: Fork) -> None:
    """Where nobody can have the lock the freeze goes on, and can be ended later."""

    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        frozen = region.frozen()
        tell(child, "frozen")
        with pytest.raises(KeyboardInterrupt):
            frozen.release()
        assert frozen.held
        tell(child, "held")
        frozen.release()
        child.say("released")

    holder = fork(body)
    assert holder.hear() == "frozen"
    caller = fork(lambda _: region.mprotect(0, PAGE, READ_WRITE, timeout=PATIENCE), point="C1_lock=stop")
    caller.wait_stopped()
    holder.say()
    until(lambda: word(region, LOCK) & WAITING)
    holder.kill(signal.SIGINT)
    assert holder.hear() == "held"
    assert region.protections() == ALL_READ
    caller.resume()
    holder.say()
    assert holder.hear() == "released"
    assert caller.wait() == 0
    nothing_is_frozen(region)


# -- Death ------------------------------------------------------------------------------------------------------------


def freeze(region: Region) -> Callable[[Child], None]:
    def body(_: Child) -> None:
        with region.frozen():
            pass

    return body


STEPS = ["F1_own", "K1_close", "C1_lock", "F2_keep", "F3_freeze", "C2_save", "C3_attempt", "C4_map", "C5_publish"]
STEPS += ["C6_await", "C7_complete", "F4_thaw", "C2_save=kill@2", "C3_attempt=kill@2", "C4_map=kill@2"]
STEPS += ["C5_publish=kill@2", "C6_await=kill@2", "C7_complete=kill@2", "F5_clear", "K3_clear"]


def steps(label: str) -> str:
    return label if "=" in label else f"{label}=kill"


@pytest.mark.parametrize("step", STEPS)
def test_a_freezer_killed_at_a_step(region: Region, joined: Joined, fork: Fork, step: str) -> None:
    """The next call of anybody finds exactly what was, and what waits can be had."""
    bystander = joined()
    assert fork(freeze(region), point=steps(step)).wait() == -signal.SIGKILL
    as_it_was(region)
    region.lease(6 * PAGE, PAGE, timeout=PATIENCE).release()
    nothing_is_frozen(region, bystander)
    region.mprotect(4 * PAGE, PAGE, READ)
    agreed(region, bystander.pid)


@pytest.mark.parametrize("step", ["F4_thaw", "C2_save", "C4_map", "C5_publish", "C7_complete", "F5_clear"])
def test_whoever_thaws_for_the_dead_is_killed_too(region: Region, joined: Joined, fork: Fork, step: str) -> None:
    bystander, holder = joined(), joined(freezer(region))
    holder.kill()
    holder.wait()
    assert fork(lambda _: region.read(0, 1), point=f"{step}=kill").wait() == -signal.SIGKILL
    as_it_was(region)
    nothing_is_frozen(region, bystander)


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(ProtectionError) as caught:
        call()
    assert (caught.value.offset, caught.value.actual) == (4 * PAGE, NONE)


NOTICES: dict[str, Callable[[Region], object]] = {
    "write": lambda region: region.write(0, b"1"),
    "read": lambda region: refused(lambda: region.read(4 * PAGE, 1)),
    "lease": lambda region: refused(lambda: region.lease(4 * PAGE, PAGE)),
    "protections": lambda region: region.protections(),
    "participants": lambda region: region.participants(),
    "generation": lambda region: region.generation,
}


@pytest.mark.parametrize("call", NOTICES)
def test_any_call_notices(region: Region, joined: Joined, call: str) -> None:
    bystander, holder = joined(), joined(freezer(region))
    holder.kill()
    holder.wait()
    NOTICES[call](region)
    assert not word(region, FROZEN, "Q")
    assert not word(region, FREEZER)
    as_it_was(region, bystander)


# -- Stores -----------------------------------------------------------------------------------------------------------

POLICIES = ["die", "raise", "wait"]
policies = pytest.mark.parametrize("policy", POLICIES)


def storer(region: Region, policy: str) -> Callable[[Child], None]:
    """A body that stores to the first byte when it is told."""

    def body(child: Child) -> None:
        region.on_violation(policy)
        view = region.buf
        child.say()
        child.hear()
        view[0] = 77
        idle(child)

    return body


def stored(region: Region) -> bool:
    with pyshare.attach(region.fileno()) as other:
        return other.read(0, 1) == b"M"


@policies
def test_a_store_ends_the_freeze_of_the_dead(region: Region, joined: Joined, policy: str) -> None:
    other, holder = joined(storer(region, policy)), joined(freezer(region))
    holder.kill()
    holder.wait()
    tell(other, "store")
    assert not word(region, FREEZER)
    assert stored(region)
    nothing_is_frozen(region, other)


@policies
def test_a_store_waits_for_who_thaws_for_the_dead(region: Region, joined: Joined, fork: Fork, policy: str) -> None:
    fd = os.dup(region.fileno())
    other, holder = joined(storer(region, policy)), joined(freezer(region))
    holder.kill()
    holder.wait()
    finder = fork(lambda _: region.read(0, 1), point="F4_thaw=stop")
    finder.wait_stopped()
    # By no call of ours, which would wait itself.
    os.pwrite(fd, struct.pack("I", struct.unpack("I", os.pread(fd, 4, FREEZER))[0] & ~WAITING), FREEZER)
    other.say("store")
    until(lambda: struct.unpack("I", os.pread(fd, 4, FREEZER))[0] & WAITING)
    os.close(fd)
    finder.resume()
    assert finder.wait() == 0
    assert other.hear() == "ok"
    assert stored(region)
    nothing_is_frozen(region, other)


@pytest.mark.parametrize("dies", [False, True], ids=["thaws", "dies"])
def test_a_store_waits_by_policy(region: Region, joined: Joined, dies: bool) -> None:
    other, holder = joined(storer(region, "wait")), joined(freezer(region))
    other.say("store")
    acknowledged = word(region, SECTIONS + 8, "Q") + 256
    until(lambda: word(region, acknowledged) & WAITING)
    assert not stored(region)
    if dies:
        holder.kill()
    else:
        tell(holder, "thaw")
    assert other.hear() == "ok"
    assert stored(region)
    nothing_is_frozen(region, other)


@pytest.mark.parametrize("policy", ["raise", "wait"])
def test_the_freezer_does_not_wait_for_its_own_thaw(region: Region, policy: str) -> None:
    region.on_violation(policy)
    view = region.buf
    reader, writer = os.pipe()
    os.write(writer, b"1")
    with region.frozen():
        with pytest.raises(ProtectionError):
            view[0] = 77
        with pytest.raises(ProtectionError):
            region.readinto(reader, 0, 1)
    assert region.read(0, 1) == b"\0"
    view[0] = 77
    assert region.readinto(reader, 1, 1) == 1
    os.close(reader)
    os.close(writer)
    nothing_is_frozen(region)


def test_a_store_into_a_freeze_is_a_violation(region: Region, joined: Joined, crash: Any) -> None:
    holder = joined(freezer(region))

    def body(_: Child) -> None:
        die_quietly()
        region.buf[0] = 77

    status, said = crash(body)
    assert status == -signal.SIGSEGV
    assert f"is READ since change {len(MIXED) + 1} by pid {holder.pid}" in said
    tell(holder, "thaw")
    nothing_is_frozen(region, holder)


# -- And others -------------------------------------------------------------------------------------------------------


def test_death_in_another_pid_namespace(fork: Fork) -> None:
    with pyshare.create(size=PAGES * PAGE) as region:
        begins(region)
        holder, pid = elsewhere(fork, freezer(region))
        assert holder.hear() == "ok"
        assert region.protections() == ALL_READ
        os.kill(pid, signal.SIGKILL)
        assert holder.wait() == signal.SIGKILL
        nothing_is_frozen(region)


def test_a_forked_child_has_frozen_nothing(region: Region, fork: Fork, joined: Joined) -> None:
    def body(child: Child) -> None:
        frozen = region.frozen()

        def inner(self: Child) -> None:
            assert not frozen.held
            frozen.release()
            with pytest.raises(PropagationTimeout):
                region.mprotect(0, PAGE, READ, timeout=AT_ONCE)
            child.say(str(os.getpid()))
            self.hear()

        Child(inner)
        child.hear()

    parent = fork(body)
    pid = int(parent.hear())
    assert region.protections() == ALL_READ
    parent.kill()
    parent.wait()
    nothing_is_frozen(region, joined())
    assert pid not in [one.pid for one in region.participants()] or os.kill(pid, signal.SIGKILL) is None


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
def test_who_joins_meanwhile(region: Region, joined: Joined, dead: bool) -> None:
    holder = joined(freezer(region))
    if dead:
        holder.kill()
        holder.wait()
        with pyshare.attach(region.fileno()) as other:
            as_it_was(other)
    else:
        with pyshare.attach(region.fileno()) as other:
            assert agreed(other) == other.protections() == ALL_READ
            tell(holder, "thaw")
            as_it_was(other)
    nothing_is_frozen(region)


# -- Many -------------------------------------------------------------------------------------------------------------


def test_freezers_compete(region: Region, fork: Fork) -> None:
    """With each other, with changes and with leases: each sees everything READ, and nothing changes meanwhile."""

    def body(child: Child) -> None:
        for turn in range(40):
            if turn % 4 == 3:
                region.mprotect(0, PAGE, NONE if turn % 8 == 3 else READ_WRITE, timeout=PATIENCE)
            elif turn % 4 == 2:
                with region.lease(6 * PAGE, PAGE, timeout=PATIENCE) as lease:
                    lease.view[:2] = struct.pack("H", struct.unpack("H", lease.view[:2])[0] + 1)
            else:
                with region.frozen(timeout=PATIENCE) as frozen:
                    count = region.read(6 * PAGE, 2)
                    assert region.generation == frozen.generation
                    assert agreed(region) == ALL_READ
                    assert region.read(6 * PAGE, 2) == count
        child.say()

    children = [fork(body) for _ in range(3)]
    for child in children:
        assert child.hear() == "ok"
        assert child.wait() == 0
    assert region.read(6 * PAGE, 2) == struct.pack("H", 30)
    region.mprotect(0, PAGE, READ_WRITE)
    nothing_is_frozen(region)


# -- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "kind", "value", "field"),
    [(FREEZER, "I", 0x7FF, "freezer"), (FREEZER, "I", 0xFFFFFFFF, "freezer"), (FROZEN, "Q", 1 << 60, "frozen")],
)
def test_a_damaged_word(region: Region, offset: int, kind: str, value: int, field: str) -> None:
    os.pwrite(region.fileno(), struct.pack(kind, value), offset)
    with pytest.raises(CorruptRegion) as caught:
        region.mprotect(0, PAGE, READ) if field == "frozen" else region.frozen()
    assert caught.value.field == field


@pytest.mark.parametrize("back", [0, 1 << 60, (1 << 64) - 1])
def test_a_damaged_ring(region: Region, back: int) -> None:
    """A thaw that leads anywhere: the author is unknown, or another."""
    with region.frozen():
        pass
    ring = word(region, SECTIONS + 24 + 8, "Q") + region.generation % 1024 * 64
    os.pwrite(region.fileno(), struct.pack("Q", back), ring + 56)
    with pytest.raises(ProtectionError):
        region.write(6 * PAGE, b"1")
