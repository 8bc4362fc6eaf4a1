"""Signals while a process joins a region, or leaves it: Ctrl-C ends each wait, and close() has none for others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import GENERATION, PAGE, is_asleep, sleeping, slot_is_taken, tell, until_waits, wake

import pyshare
from pyshare import READ, READ_WRITE, Region, RegionClosed, _core, _observer

Fork = Callable[..., Child]
CLOCK_MONOTONIC_COARSE = 6  # as linux/time.h has it
NAME = f"interrupts-{os.getpid()}"
FAR = range(0x1000_0000_0000, 0x5000_0000_0000)  # where regions are mapped (ext/process/mapping.c)


def left() -> tuple[list[str], list[str], list[str]]:
    """Threads, descriptors and mappings of regions of this process."""
    starts = (int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines())
    far = [hex(start) for start in starts if start in FAR]
    return os.listdir("/proc/self/task"), os.listdir("/proc/self/fd"), far


def made(engine: str = "mprotect", max_participants: int = 3) -> Region:
    return pyshare.create(NAME, size=16 * PAGE, engine=engine, max_participants=max_participants)


def interrupted(child: Child, call: Callable[[], object]) -> None:
    """The call ends by a Ctrl-C, for which this asks just before it."""
    try:
        child.say()
        call()
    except KeyboardInterrupt:
        return
    raise AssertionError("it has not been interrupted")


def stopped_with_the_lock(region: Region, fork: Fork) -> Child:
    """A participant in the middle of a change."""
    holder = fork(lambda child: (region.mprotect(0, PAGE, READ), idle(child)), point="C6_await=stop")
    holder.wait_stopped()
    return holder


def test_ctrl_c_ends_attach_and_nothing_is_left(fork: Fork) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        idle(child)
        before = left()
        interrupted(child, lambda: pyshare.attach(NAME, timeout=None))
        assert left() == before
        idle(child)
        with pyshare.attach(NAME) as region:
            idle(child)
            region.mprotect(PAGE, PAGE, READ)
        del region
        assert left() == before
        idle(child)

    child = fork(body)
    assert child.hear() == "ok"
    with made() as region:
        holder = stopped_with_the_lock(region, fork)
        tell(child, "attach")
        until(lambda: slot_is_taken(region, 2))
        until_waits(child)
        child.kill(signal.SIGINT)
        assert child.hear() == "ok"
        assert not slot_is_taken(region, 2)
        holder.kill()
        tell(child, "attach again")
        assert slot_is_taken(region, 1) or slot_is_taken(region, 2)
        tell(child, "change, and close")
        assert region.protections() == [(0, 2 * PAGE, READ), (2 * PAGE, 14 * PAGE, READ_WRITE)]


def test_a_handler_that_returns_does_not_end_attach(fork: Fork) -> None:
    def body(child: Child) -> None:
        seen: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: (seen.append(number), child.say("handled")))
        idle(child)
        child.say()
        with pyshare.attach(NAME, timeout=None) as region:
            assert seen == [signal.SIGUSR1]
            region.mprotect(PAGE, PAGE, READ)

    child = fork(body)
    assert child.hear() == "ok"
    with made() as region:
        holder = stopped_with_the_lock(region, fork)
        tell(child, "attach")
        until_waits(child)
        child.kill(signal.SIGUSR1)
        assert child.hear() == "handled"
        holder.resume()
        assert child.wait() == 0
        assert region.generation == 2


def test_a_child_that_a_handler_forks_has_no_part_in_what_is_being_attached(fork: Fork) -> None:
    def body(child: Child) -> None:
        forked: list[int] = []

        def fork_here(*_: object) -> None:
            forked.append(os.fork())
            if forked[0]:
                child.say("forked")

        signal.signal(signal.SIGUSR1, fork_here)
        idle(child)
        child.say()
        try:
            with pyshare.attach(NAME, timeout=None) as region:
                region.mprotect(PAGE, PAGE, READ)
        except RegionClosed:
            os._exit(7 if forked == [0] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == 7

    child = fork(body)
    assert child.hear() == "ok"
    with made() as region:
        holder = stopped_with_the_lock(region, fork)
        tell(child, "attach")
        until_waits(child)
        child.kill(signal.SIGUSR1)
        assert child.hear() == "forked"
        holder.resume()
        assert child.wait() == 0


def test_ctrl_c_ends_a_call_that_joins_again(fork: Fork) -> None:
    """It has no access, since there was no slot for it; now there is one, and nobody lets it in."""

    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(pyshare.ParticipantLimit):
            region.read(0, 1)
        idle(child)
        for _ in range(2):
            interrupted(child, lambda: region.read(0, 1))
            assert len(os.listdir("/proc/self/task")) == 2  # it goes on joining meanwhile
        idle(child)
        assert region.read(0, 1) == b"\x01"
        region.close()
        with pytest.raises(RegionClosed):
            region.read(0, 1)

    with made() as region:
        region.write(0, b"\x01")
        first = fork(idle)
        assert first.hear() == "ok"
        second = fork(lambda child: (idle(child), region.mprotect(0, PAGE, READ)), point="C6_await=stop")
        assert second.hear() == "ok"
        child = fork(body)
        assert child.hear() == "ok"
        first.say()
        assert first.wait() == 0
        second.say()
        second.wait_stopped()
        child.say()
        for _ in range(2):
            assert child.hear() == "ok"
            until_waits(child)
            child.kill(signal.SIGINT)
        assert child.hear() == "ok"
        second.resume()
        assert second.wait() == 0
        child.say()
        assert child.wait() == 0


def test_close_waits_for_no_other_process(fork: Fork) -> None:
    """Its agent waits for its page tables, which a stopped caller has claimed."""

    def leave(child: Child) -> None:
        idle(child)
        region.close()
        idle(child)

    with made("uffd", max_participants=4) as region:
        # The first claim is of this process's page tables, the second of the leaver's.
        leaver = fork(leave)
        assert leaver.hear() == "ok"
        caller = fork(lambda child: (idle(child), region.mprotect(0, PAGE, READ)), point="R1_claim=stop@2")
        assert caller.hear() == "ok"
        caller.say()
        caller.wait_stopped()
        wake(region, GENERATION)
        tell(leaver, "close")
        assert not slot_is_taken(region, 1)
        caller.resume()
        assert caller.wait() == 0
        assert region.protection(0) == READ


@pytest.mark.parametrize("call", ["mprotect", "frozen", "await"])
def test_a_child_that_a_handler_forks_may_close_what_its_parent_waits_for(call: str, fork: Fork) -> None:
    """And the child comes back into that call."""

    def body(child: Child) -> None:
        forked: list[int] = []

        def fork_here(*_: object) -> None:
            forked.append(os.fork())
            if not forked[0]:
                region.close()
                return
            assert os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == 7
            child.say("closed")

        signal.signal(signal.SIGALRM, fork_here)
        child.say()
        child.hear()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            if call == "frozen":
                region.frozen(timeout=PATIENCE).release()
            else:
                region.mprotect(PAGE, PAGE, READ, timeout=PATIENCE)
        except RegionClosed:
            os._exit(7 if forked == [0] else 1)

    with made(max_participants=4) as region:
        child = fork(body)
        assert child.hear() == "ok"
        silent = fork(idle)
        assert silent.hear() == "ok"
        if call == "await":
            silent.stop()
            lease = region.lease(0, PAGE)
        else:
            lease = region.lease(PAGE, PAGE)
        child.say()
        assert child.hear() == "closed"
        lease.release()
        silent.resume()
        assert child.wait() == 0
        silent.say()


def test_a_wait_begins_anew_after_one_that_ctrl_c_ended(joined: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for _ in range(2):
            interrupted(child, lambda: region.mprotect(0, PAGE, READ, timeout=None))

    def wait_of(child: Child) -> int:
        """Since when it waits, by the coarse clock; 0: it does not."""
        slots = _observer.slots(observer)
        return next(one.waits_since if one.waits_for else 0 for one in slots if one.pid == child.pid)

    with made() as region, region.lease(0, PAGE):
        observer = _core.Observer(region.fileno())
        child = joined(body)
        until_waits(child)
        now = time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE)
        until(lambda: time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) > now)
        child.kill(signal.SIGINT)
        assert child.hear() == "ok"
        until_waits(child)
        until(lambda: wait_of(child) > now)
        child.kill(signal.SIGINT)
        assert child.wait() == 0


def begin_sweep(region: Region, fork: Fork) -> tuple[Child, threading.Thread]:
    """A thread that clears away after a snapshot, and waits for the region's lock, which a stopped process has."""
    snaps = [region.snapshot()]
    holder = fork(lambda child: (region.mprotect(0, PAGE, READ), idle(child)), point="C1_lock=stop")
    holder.wait_stopped()
    sweeper = threading.Thread(target=snaps.clear)
    sweeper.start()
    sleeping(region, os.getpid())
    return holder, sweeper


def test_close_closes_nothing_that_is_used_again_when_a_sweep_is_over(fork: Fork) -> None:
    outcomes: list[object] = []

    def close() -> None:
        try:
            outcomes.append(region.close())
        except BufferError as error:
            outcomes.append(error)

    with made() as region:
        holder, sweeper = begin_sweep(region, fork)
        closer = threading.Thread(target=close)
        closer.start()
        until(lambda: is_asleep(closer.native_id or 0))
        view = memoryview(region)
        closer.join()
        assert isinstance(outcomes[0], BufferError)
        assert view[0] == 0
        view.release()
        sweeper.join()
        holder.resume()
        holder.end()


@pytest.mark.parametrize("where", ["threads", "handler"])
def test_two_may_close_at_a_time(where: str, fork: Fork) -> None:
    def body(_: Child) -> None:
        holder, sweeper = begin_sweep(region, fork)
        if where == "handler":
            signal.signal(signal.SIGALRM, lambda *_: region.close())
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            region.close()
        else:
            closers = [threading.Thread(target=region.close) for _ in range(2)]
            for closer in closers:
                closer.start()
            for closer in closers:
                closer.join()
        assert region.closed
        sweeper.join()
        holder.end()

    with made(max_participants=4) as region:
        assert fork(body).wait() == 0


def test_no_ctrl_c_is_lost_in_an_attach_that_fails(fork: Fork) -> None:
    """What was not opened goes without a line of Python, in which an exception would be lost."""

    def body(child: Child) -> None:
        raised, caught, wanted = 0, 0, False

        def on_alarm(*_: object) -> None:
            nonlocal raised, wanted
            if wanted:
                wanted, raised = False, raised + 1
                raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.0013, 0.0017)
        while raised < 200:
            try:
                try:
                    wanted = True
                    pyshare.attach(fd)
                except pyshare.ParticipantLimit:
                    wanted = False
            except KeyboardInterrupt:
                caught += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert caught == raised
        child.say()

    with made(max_participants=1) as region:
        fd = os.dup(region.fileno())
        child = fork(body)
        assert child.hear() == "ok"
        assert child.wait() == 0
        os.close(fd)
