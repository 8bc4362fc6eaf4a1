"""Regions in an event loop: nothing blocks it, nobody is skipped, and whoever is cancelled leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from conftest import PATIENCE, Child, until

import pyshare
from pyshare import NONE, READ, READ_WRITE, _core, _observer

PAGE = 4096
SIZE = 16 * PAGE
SOON = 60.0  # seconds: for what comes when somebody lets go

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def _uvloop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return importlib.import_module("uvloop").run(coroutine)


_NO_UVLOOP = pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")


@pytest.fixture(params=[pytest.param(asyncio.run, id="asyncio"), pytest.param(_uvloop, id="uvloop", marks=_NO_UVLOOP)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end in a loop of its own."""
    function: Run = request.param
    return function


@pytest.fixture(params=["uffd", "mprotect"])
def region(request: pytest.FixtureRequest) -> Iterator[pyshare.Region]:
    """READ at first."""
    try:
        made = pyshare.create(size=SIZE, prot=READ, engine=request.param)
    except OSError as error:
        pytest.skip(f"no {request.param} here: {error}")
    with made:
        yield made


@pytest.fixture
def one() -> Iterator[pyshare.Region]:
    """READ at first, for what is not a matter of the engine."""
    with pyshare.create(size=SIZE, prot=READ) as made:
        yield made


def elsewhere(*takes: Callable[[], Any]) -> Callable[[Child], None]:
    """The body of a process that takes things, says so, and releases them when it is told to."""

    def body(child: Child) -> None:
        holds = [take() for take in takes]
        child.say()
        child.hear()
        for held in holds:
            held.release()
        child.say("released")
        child.hear()

    return body


def free_for_all(region: pyshare.Region, locks: range = range(4)) -> None:
    """Nobody holds anything, nor wishes to: everything can be had at once."""
    for index in locks:
        region.lock(index, timeout=0).release()
    region.lease(0, SIZE, timeout=0).release()
    region.frozen(timeout=1).release()


def eventfds() -> list[str]:
    """Descriptors of this process; uvloop has one of its own, asyncio none."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]":
                found.append(fd)
    return found


async def ticks(during: asyncio.Task[Any]) -> int:
    """How often the loop came round until the task was done."""
    count = 0
    while not during.done():
        count += 1
        await asyncio.sleep(0.001)
    return count


def waits(region: pyshare.Region) -> bool:
    """A call of this process does, for somebody to give something up."""
    observer = _core.Observer(region.fileno())
    return any(slot.pid == os.getpid() and slot.waits_for for slot in _observer.slots(observer))


async def queued(region: pyshare.Region, *tasks: asyncio.Task[Any]) -> None:
    """The first of them is asleep in the waiter."""
    deadline = time.monotonic() + PATIENCE
    while not waits(region):
        assert time.monotonic() < deadline, "nobody waits"
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


# -- What is awaited ---------------------------------------------------------------------------------------------------


def test_a_change_is_everybodys_when_it_has_been_awaited(
    region: pyshare.Region, run: Run, joined: Callable[..., Child]
) -> None:
    def body(child: Child) -> None:
        child.say()
        while child.hear() == "store":
            try:
                region.write(0, b"x")
                child.say("stored")
            except pyshare.ProtectionError as error:
                child.say(f"refused by {error.generation}")

    other = joined(body)

    def store() -> str:
        other.say("store")
        return other.hear()

    async def main() -> None:
        for turn in range(10):
            assert await region.mprotect_async(0, PAGE, READ_WRITE) == 2 * turn + 1
            assert store() == "stored"
            assert await region.mprotect_async(0, PAGE, NONE) == 2 * turn + 2
            assert store() == f"refused by {2 * turn + 2}"

    run(main())
    other.say("end")
    assert other.wait() == 0


def test_a_lease_is_entered_or_awaited(region: pyshare.Region, run: Run) -> None:
    async def main() -> None:
        async with region.lease_async(0, 2 * PAGE) as lease:
            lease.view[:3] = b"abc"
            assert lease.held
            assert not lease.abandoned
        assert not lease.held
        lease = await region.lease_async(PAGE, PAGE, window=True)
        with lease:
            lease.view[0] = 1
        with await region.lock_async(7) as lock:
            assert lock.held
        again = region.lock_async(7)  # nothing happens before it is awaited
        async with again, region.lock_async(8):
            pass
        async with again:
            pass

    run(main())
    assert region.read(0, 3) == b"abc"
    free_for_all(region)


def test_tasks_of_a_loop_exclude_each_other_in_the_order_in_which_they_asked(one: pyshare.Region, run: Run) -> None:
    served: list[int] = []
    inside = 0

    async def use(what: Any, number: int) -> None:
        nonlocal inside
        async with what:
            inside += 1
            assert inside == 1
            served.append(number)
            await asyncio.sleep(0)
            inside -= 1

    async def main() -> None:
        await asyncio.gather(*(use(one.lock_async(3), number) for number in range(50)))
        await asyncio.gather(*(use(one.lease_async(0, 2 * PAGE), number) for number in range(50, 100)))

    run(main())
    assert served == list(range(100))


@pytest.mark.parametrize("what", ["lock", "lease"])
def test_whoever_waits_comes_before_whoever_comes_later(what: str, one: pyshare.Region) -> None:
    served: list[str] = []

    async def use(name: str) -> None:
        async with one.lock_async(0) if what == "lock" else one.lease_async(0, PAGE):
            served.append(name)

    async def main() -> None:
        for _ in range(20):
            held = one.lock(0) if what == "lock" else one.lease(0, PAGE)
            waiting = asyncio.create_task(use("waiting"))
            await asyncio.sleep(0)  # it has asked, and has not waited long enough to be known elsewhere
            held.release()
            await use("later")
            await waiting

    asyncio.run(main())
    assert served == ["waiting", "later"] * 20


def test_what_a_task_has_waited_for_is_its_threads(one: pyshare.Region) -> None:
    async def main() -> None:
        locks = one.lock(0), one.lease(0, PAGE)
        tasks = [asyncio.create_task(keep(one.lock_async(0))), asyncio.create_task(keep(one.lease_async(0, PAGE)))]
        await queued(one, *tasks)
        for lock in locks:
            lock.release()
        held = [await task for task in tasks]
        with pytest.raises(pyshare.ShareError, match="this thread"):
            one.lock(0)
        with pytest.raises(pyshare.ShareError, match="this thread"):
            one.lease(0, PAGE)
        with pytest.raises(pyshare.ShareError, match="this thread"):
            one.mprotect(0, PAGE, READ)
        for each in held:
            each.release()

    async def keep(taking: Any) -> Any:
        return await taking

    asyncio.run(main())


def test_a_large_lease_is_not_starved_by_small_ones(one: pyshare.Region) -> None:
    async def small(page: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            async with one.lease_async(page * PAGE, PAGE):
                await asyncio.sleep(0)

    async def main() -> None:
        stop = asyncio.Event()
        tasks = [asyncio.create_task(small(page, stop)) for page in range(16) for _ in range(2)]
        await asyncio.sleep(0.01)
        for _ in range(20):
            async with one.lease_async(0, SIZE, timeout=SOON):
                pass
            await one.mprotect_async(0, SIZE, READ, timeout=SOON)
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    free_for_all(one)


@pytest.mark.parametrize("what", ["lock", "lease", "window", "change"])
def test_the_loop_runs_on_while_another_process_holds_it(
    what: str, region: pyshare.Region, run: Run, joined: Callable[..., Child]
) -> None:
    other = joined(elsewhere(lambda: region.lock(0) if what == "lock" else region.lease(PAGE, PAGE)))

    async def wanted() -> None:
        if what == "lock":
            await take(region.lock_async(0))
        elif what == "change":
            await region.mprotect_async(0, SIZE, READ_WRITE)
        else:
            await take(region.lease_async(0, 4 * PAGE, window=what == "window"))

    async def take(taking: Any) -> None:
        async with taking:
            pass

    async def main() -> None:
        task = asyncio.create_task(wanted())
        await queued(region, task)
        other.say()
        assert other.hear() == "released"
        await ticks(task)
        await task

    run(main())
    free_for_all(region)


def test_a_dead_holder_leaves_it_abandoned(one: pyshare.Region, joined: Callable[..., Child]) -> None:
    other = joined(elsewhere(lambda: one.lock(0), lambda: one.lease(0, PAGE)))

    async def main() -> None:
        lock = asyncio.create_task(taken(one.lock_async(0)))
        lease = asyncio.create_task(taken(one.lease_async(0, PAGE)))
        await queued(one, lock, lease)
        other.kill()
        assert await lock
        assert await lease

    async def taken(taking: Any) -> bool:
        async with taking as held:
            return bool(held.abandoned)

    asyncio.run(main())


@pytest.mark.parametrize("what", ["lock", "lease"])
def test_what_the_dead_left_is_not_told_to_who_is_cancelled(
    one: pyshare.Region, joined: Callable[..., Child], what: str
) -> None:
    """It has been got already, when the loop comes to it."""
    other = joined(elsewhere(lambda: one.lock(0) if what == "lock" else one.lease(0, 2 * PAGE)))

    async def main() -> None:
        task = asyncio.ensure_future(one.lock_async(0) if what == "lock" else one.lease_async(0, 2 * PAGE))
        await queued(one, task)
        other.kill()
        until(lambda: not waits(one))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    for told in (True, False):
        with one.lock(0) if what == "lock" else one.lease(0, 2 * PAGE) as held:
            assert held.abandoned is told


def test_no_thread_each(one: pyshare.Region) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    async def take(index: int) -> None:
        async with one.lock_async(index, timeout=SOON):
            pass

    async def main() -> None:
        """More words than one sleep of the kernel's can watch."""
        locks = [one.lock(index) for index in range(300)]
        tasks = [asyncio.create_task(take(index)) for index in range(300)]
        await queued(one, *tasks)
        assert threads() <= before + 1
        for lock in locks:
            lock.release()
        await asyncio.gather(*tasks)

    before = threads()
    asyncio.run(main())
    free_for_all(one, range(300))


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_wrong_arguments_change_nothing(one: pyshare.Region) -> None:
    async def main() -> None:
        wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
            (ValueError, lambda: one.mprotect_async(1, PAGE, READ)),
            (ValueError, lambda: one.mprotect_async(0, PAGE, 8)),
            (ValueError, lambda: one.mprotect_async(0, 2 * SIZE, READ)),
            (ValueError, lambda: one.mprotect_async(0, PAGE, READ, timeout=-1)),
            (TypeError, lambda: one.mprotect_async("0", PAGE, READ)),  # type: ignore[arg-type]
            (ValueError, lambda: one.lease_async(1, PAGE)),
            (ValueError, lambda: one.lease_async(0, 0)),
            (TypeError, lambda: one.lease_async(0, PAGE, timeout="1")),  # type: ignore[arg-type]
            (ValueError, lambda: one.lock_async(1024)),
            (TypeError, lambda: one.lock_async(None)),  # type: ignore[arg-type]
        ]
        for error, call in wrong:
            with pytest.raises(error):
                await call()
        with pytest.raises(ValueError, match="must be a generation"):
            one.changes(since=1)
        await one.mprotect_async(0, PAGE, NONE)
        with pytest.raises(pyshare.ProtectionError):
            await one.lease_async(0, PAGE)

    asyncio.run(main())
    assert one.generation == 1
    one.close()

    async def closed() -> None:
        for call in (one.mprotect_async(0, PAGE, READ), one.lease_async(0, PAGE), one.lock_async(0)):
            with pytest.raises(pyshare.RegionClosed):
                await call

    asyncio.run(closed())


def test_a_task_does_not_wait_for_itself(one: pyshare.Region) -> None:
    async def main() -> None:
        async with one.lock_async(1), one.lease_async(PAGE, 2 * PAGE):
            with pytest.raises(pyshare.ShareError, match="this task"):
                await one.lock_async(1)
            with pytest.raises(pyshare.ShareError, match="this task"):
                await one.lease_async(0, 2 * PAGE)
            with pytest.raises(pyshare.ShareError, match="this task"):
                await one.mprotect_async(2 * PAGE, PAGE, READ_WRITE)
            async with one.lease_async(0, PAGE), one.lock_async(2):
                pass
        await one.mprotect_async(0, SIZE, READ_WRITE)

    asyncio.run(main())


def test_a_timeout_names_the_holder(region: pyshare.Region, joined: Callable[..., Child]) -> None:
    other = joined(elsewhere(lambda: region.lock(0), lambda: region.lease(0, PAGE)))

    async def main() -> None:
        for timeout in (0, 0.02):
            for call in (
                region.lock_async(0, timeout=timeout),
                region.lease_async(0, PAGE, timeout=timeout),
                region.mprotect_async(0, PAGE, READ_WRITE, timeout=timeout),
            ):
                with pytest.raises(pyshare.PropagationTimeout) as caught:
                    await call
                assert caught.value.pids == [other.pid]
                assert caught.value.generation is None
        # Whoever stands behind somebody in the queue has a time of its own.
        first = asyncio.create_task(taken(region, SOON))
        await queued(region, first)
        with pytest.raises(pyshare.PropagationTimeout):
            await taken(region, 0.02)
        other.say()
        await first

    async def taken(region: pyshare.Region, timeout: float) -> None:
        async with region.lock_async(0, timeout=timeout):
            pass

    asyncio.run(main())


def test_a_silent_participant_is_named_and_holds_up_nobody_else(
    region: pyshare.Region, joined: Callable[..., Child]
) -> None:
    other = joined()
    other.stop()

    async def main() -> None:
        with pyshare.create(size=SIZE) as elsewhere:
            late = asyncio.create_task(region.mprotect_async(0, PAGE, NONE, timeout=1.5))
            while not region.generation:
                await asyncio.sleep(0)
            for _ in range(50):
                await elsewhere.mprotect_async(0, PAGE, NONE)
            assert not late.done()
            with pytest.raises(pyshare.PropagationTimeout) as caught:
                await late
            assert caught.value.pids == [other.pid]
            assert caught.value.generation == region.generation == 1

    asyncio.run(main())
    other.resume()


def test_a_region_in_use_does_not_close(one: pyshare.Region) -> None:
    async def main() -> None:
        lock = one.lock(0)
        task = asyncio.create_task(wanted())
        await queued(one, task)
        lock.release()  # the task has not been told
        with pytest.raises(BufferError, match="task"):
            one.close()
        await task

    async def wanted() -> None:
        async with one.lock_async(0):
            pass

    asyncio.run(main())
    one.close()


# -- Cancelled ---------------------------------------------------------------------------------------------------------


WISHES: dict[str, Callable[[pyshare.Region], Any]] = {
    "lock": lambda region: region.lock_async(0, timeout=SOON),
    "lease": lambda region: region.lease_async(0, 4 * PAGE, timeout=SOON),
    "window": lambda region: region.lease_async(0, 4 * PAGE, timeout=SOON, window=True),
    "change": lambda region: region.mprotect_async(0, 4 * PAGE, READ, timeout=SOON),
}


async def wish(region: pyshare.Region, what: str) -> None:
    """Has it, and lets go of it at once."""
    got = await WISHES[what](region)
    if what != "change":
        got.release()


@pytest.mark.parametrize("what", WISHES)
def test_cancelled_while_it_waits(what: str, region: pyshare.Region, run: Run, joined: Callable[..., Child]) -> None:
    other = joined(elsewhere(lambda: region.lock(0) if what == "lock" else region.lease(2 * PAGE, PAGE)))

    async def main() -> None:
        for _ in range(20):
            task = asyncio.create_task(wish(region, what))
            await queued(region, task)
            task.cancel("enough")
            with pytest.raises(asyncio.CancelledError, match="enough"):
                await task
            # What it had already, or wished for, anybody can have.
            region.lease(0, PAGE, timeout=0).release()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await wish(region, what)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wish(region, what), 0.01)

    run(main())
    other.say()
    assert other.hear() == "released"
    assert region.generation == 0
    free_for_all(region)


@pytest.mark.parametrize("what", WISHES)
def test_cancelled_at_every_step(what: str, region: pyshare.Region) -> None:
    """The holder lets go, and the loop comes round a number of times, before or after it is cancelled."""

    async def main() -> None:
        for turn in range(120):
            held = region.lock(0) if what == "lock" else region.lease(2 * PAGE, PAGE)
            tasks = [asyncio.create_task(wish(region, what)) for _ in range(3)]
            victim = tasks[turn % 3]
            steps = turn // 3 % 10
            for _ in range(steps):
                await asyncio.sleep(0)
            if turn % 2:
                held.release()
                victim.cancel()
            else:
                victim.cancel()
                await asyncio.sleep(0)
                held.release()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result is None for task, result in zip(tasks, results, strict=True) if task is not victim)
            free_for_all(region)

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_at_any_moment(seed: int, region: pyshare.Region, fork: Callable[..., Child]) -> None:
    """While other processes want the same: whatever is left behind would stop one of them for good."""

    async def storm(dice: random.Random, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            tasks = [asyncio.create_task(wish(region, dice.choice([*WISHES]))) for _ in range(8)]
            for task in dice.sample(tasks, 6):
                for _ in range(dice.randrange(4)):
                    await asyncio.sleep(0)
                if dice.random() < 0.3:
                    await asyncio.sleep(dice.random() / 2000)
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result

    others = [
        fork(lambda _, number=number: asyncio.run(storm(random.Random(f"{seed} {number}"), 0.5))) for number in range(2)
    ]
    asyncio.run(storm(random.Random(seed), 0.5))
    assert [other.wait() for other in others] == [0, 0]
    free_for_all(region)


def test_a_change_that_is_published_is_made_when_it_is_cancelled(
    region: pyshare.Region, joined: Callable[..., Child]
) -> None:
    other = joined()
    other.stop()

    async def main() -> None:
        task = asyncio.create_task(region.mprotect_async(0, PAGE, NONE, timeout=SOON))
        while not region.generation:
            await asyncio.sleep(0.001)
        begun = time.monotonic()
        task.cancel()
        assert await ticks(task) > 1  # it goes on for 20 ms, and so does the loop
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - begun < SOON / 2
        region.lease(PAGE, PAGE, timeout=0).release()

    asyncio.run(main())
    assert region.protection(0) == NONE
    other.resume()
    assert region.mprotect(0, PAGE, READ) == 2


def test_a_coroutine_that_nobody_runs_any_more_leaves_nothing(one: pyshare.Region) -> None:
    held = one.lock(0), one.lease(2 * PAGE, PAGE)
    loop = asyncio.new_event_loop()

    async def main() -> None:
        tasks = [asyncio.ensure_future(wish(one, what)) for what in WISHES]
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        await queued(one, *tasks)

    loop.run_until_complete(main())
    loop.close()
    gc.collect()
    for each in held:
        each.release()
    free_for_all(one)
    assert not eventfds()


def test_a_loop_keeps_nothing_of_ours(one: pyshare.Region, run: Run) -> None:
    async def main() -> None:
        of_the_loop = eventfds()
        lock = one.lock(0)
        task = asyncio.create_task(wish(one, "lock"))
        await queued(one, task)
        assert len(eventfds()) == len(of_the_loop) + 1
        lock.release()
        await task
        await one.mprotect_async(0, PAGE, READ)
        assert eventfds() == of_the_loop
        await asyncio.gather(*(wish(one, what) for what in [*WISHES] * 10))
        one.lock(0)  # held while the loop ends
        asyncio.ensure_future(wish(one, "lock"))  # noqa: RUF006
        await asyncio.sleep(0)

    before = os.listdir("/proc/self/fd")
    with pytest.warns(ResourceWarning, match="dropped while held"):
        run(main())
    assert os.listdir("/proc/self/fd") == before


# -- Several loops, several processes ----------------------------------------------------------------------------------


def test_loops_of_several_threads_and_a_thread_without_one(one: pyshare.Region) -> None:
    inside: list[int] = []
    count = 0

    def enter(number: int) -> None:
        nonlocal count
        inside.append(number)
        assert inside == [number]
        count += 1

    async def turn(number: int) -> None:
        for _ in range(20):
            async with one.lock_async(0, timeout=SOON):
                enter(number)
                await asyncio.sleep(0)
                inside.remove(number)

    async def main(number: int) -> None:
        await asyncio.gather(*(turn(number + task) for task in range(3)))

    def blocking() -> None:
        for _ in range(20):
            with one.lock(0, timeout=SOON):
                enter(99)
                inside.remove(99)

    def checked(body: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                body()
            except BaseException as error:
                failures.append(error)

        return run

    failures: list[BaseException] = []
    bodies: list[Callable[[], None]] = [lambda number=number: asyncio.run(main(number)) for number in (0, 10, 20)]  # type: ignore[misc]
    threads = [threading.Thread(target=checked(body)) for body in [*bodies, blocking]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert count == 3 * 3 * 20 + 20


def test_processes_take_turns(one: pyshare.Region, fork: Callable[..., Child]) -> None:
    async def turn() -> None:
        for _ in range(20):
            async with one.lease_async(0, PAGE, timeout=SOON, window=True) as lease:
                count = int.from_bytes(lease.view[:8], "little")
                await asyncio.sleep(0)
                lease.view[:8] = (count + 1).to_bytes(8, "little")

    async def main() -> None:
        await asyncio.gather(*(turn() for _ in range(4)))

    others = [fork(lambda _: asyncio.run(main())) for _ in range(2)]
    asyncio.run(main())
    assert [other.wait() for other in others] == [0, 0]
    assert int.from_bytes(one.read(0, 8), "little") == 3 * 4 * 20


def test_a_forked_child_waits_for_itself_alone(region: pyshare.Region, fork: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        gc.collect()
        assert not eventfds()
        asyncio.run(in_child(child))

    async def in_child(child: Child) -> None:
        task = asyncio.create_task(wish(region, "lock"))
        await queued(region, task)
        child.say("waits")
        await task
        await region.mprotect_async(PAGE, PAGE, READ)

    async def main() -> None:
        lock = region.lock(0)
        tasks = [asyncio.create_task(wish(region, "lock")) for _ in range(3)]
        await queued(region, *tasks)
        assert eventfds()
        child = fork(body)
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, child.hear) == "waits"
        assert not any(task.done() for task in tasks)
        lock.release()
        await asyncio.gather(*tasks)
        assert await loop.run_in_executor(None, child.wait) == 0

    asyncio.run(main())
    free_for_all(region)


def test_a_snapshot_is_not_starved_by_tasks_that_hold_leases_by_turns(
    one: pyshare.Region, fork: Callable[..., Child]
) -> None:
    """A task that holds a lease passes, as a thread does; that others of its thread hold some is not a reason."""
    one.mprotect(0, SIZE, READ)

    async def turn(page: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            async with one.lease_async(page * PAGE, PAGE, timeout=SOON, window=True):
                await asyncio.sleep(0.001)
                async with one.lease_async((page + 8) * PAGE, PAGE, timeout=SOON, window=True):
                    await asyncio.sleep(0.001)

    def body(child: Child) -> None:
        for _ in range(5):
            child.hear()
            with one.snapshot(timeout=0.9):  # before it would make way for a signal that it has not seen
                child.say("taken")

    async def main() -> None:
        stop = asyncio.Event()
        tasks = [asyncio.create_task(turn(page, stop)) for page in range(4)]
        tasks += [asyncio.create_task(turn(page, stop)) for page in range(2)]
        child = fork(body)
        for _ in range(5):
            await asyncio.sleep(0.01)
            child.say()
            assert await asyncio.get_running_loop().run_in_executor(None, child.hear) == "taken"
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


# -- The stream of changes ---------------------------------------------------------------------------------------------


async def first(count: int, stream: AsyncIterator[pyshare.Change]) -> list[pyshare.Change]:
    """So many of it."""
    return [await anext(stream) for _ in range(count)]


def test_changes_come_in_order_and_whole(region: pyshare.Region, run: Run, fork: Callable[..., Child]) -> None:
    def body(_: Child) -> None:
        for turn in range(300):
            region.mprotect(turn % 16 * PAGE, PAGE, READ_WRITE if turn % 2 else READ)

    async def main() -> None:
        streams = [region.changes() for _ in range(3)]
        began = time.time()
        child = fork(body)
        for changes in await asyncio.gather(*(first(300, stream) for stream in streams)):
            assert [change.generation for change in changes] == list(range(1, 301))
            for turn, change in enumerate(changes):
                assert change.offset == turn % 16 * PAGE
                assert change.length == PAGE
                assert change.prot == (READ_WRITE if turn % 2 else READ)
                assert change.kind == "set"
                assert change.pid == child.pid
                assert began - 1 < change.time < time.time() + 1
                assert change.seconds is not None
        assert child.wait() == 0
        again = region.changes(since=290)
        assert [change.generation for change in await first(10, again)] == list(range(291, 301))
        # A change that has been awaited is there.
        assert await region.mprotect_async(0, SIZE, READ) == 301
        assert (await anext(again)).generation == 301

    run(main())


def test_changes_of_every_kind(region: pyshare.Region) -> None:
    async def main() -> None:
        stream = region.changes()
        region.frozen().release()
        region.snapshot().close()
        kinds = [change.kind for change in await first(2, stream)]
        assert kinds == ["set", "thawed"]
        assert (await anext(stream)).kind == "follow"

    asyncio.run(main())


def test_changes_end_with_the_region(one: pyshare.Region, run: Run) -> None:
    async def read() -> list[int]:
        return [change.generation async for change in one.changes()]

    async def main(close: Callable[[], Any]) -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0)  # it has begun to wait
        await one.mprotect_async(0, PAGE, READ)
        last = one.mprotect(0, PAGE, READ_WRITE)
        close()
        assert await task == [last - 1, last]

    run(main(one.close))
    with pytest.raises(pyshare.RegionClosed):
        one.changes()


def test_an_observer_sees_changes_too(region: pyshare.Region) -> None:
    async def main() -> None:
        with pyshare.attach(region.fileno(), readonly=True) as observer:
            stream = observer.changes()
            task = asyncio.ensure_future(first(2, stream))
            await asyncio.sleep(0)  # it has begun to wait
            await region.mprotect_async(0, PAGE, READ_WRITE)
            await region.mprotect_async(0, PAGE, READ)
            assert [change.prot for change in await task] == [READ_WRITE, READ]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_changes_end_when_another_thread_closes(one: pyshare.Region) -> None:
    async def main() -> None:
        stream = one.changes()
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # it has begun to wait
        thread = threading.Thread(target=one.close)
        thread.start()
        with pytest.raises(StopAsyncIteration):
            await task
        thread.join()

    asyncio.run(main())


def test_changes_can_be_given_up_and_taken_up_again(one: pyshare.Region) -> None:
    async def main() -> None:
        stream = one.changes()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # it has begun to wait
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        one.mprotect(0, PAGE, READ)
        assert (await waiting).generation == 1
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_changes_that_were_missed_are_an_error(one: pyshare.Region) -> None:
    async def main() -> None:
        stream = one.changes()
        for _ in range(1030):
            one.mprotect(0, PAGE, READ)
        with pytest.raises(pyshare.ShareError, match="6 changes, from 1 on"):
            await anext(stream)
        assert [change.generation for change in await first(1024, stream)] == list(range(7, 1031))

    asyncio.run(main())


def test_a_silent_participants_change_is_told_when_it_is_over(
    region: pyshare.Region, joined: Callable[..., Child]
) -> None:
    other = joined()
    other.stop()

    async def main() -> None:
        stream = region.changes()
        told = asyncio.ensure_future(anext(stream))
        task = asyncio.create_task(region.mprotect_async(0, PAGE, NONE, timeout=0.2))
        while not region.generation:
            await asyncio.sleep(0.001)
        assert not told.done()
        with pytest.raises(pyshare.PropagationTimeout):
            await task
        assert (await told).slowest == other.pid

    asyncio.run(main())
    other.resume()
