"""The async forms: an event loop in a thread, with several tasks that take leases and locks, and change.

Lives here: Loop, whose steps are those of other threads where nothing is waited for.  Not here: the waiting ones
(hands.py, holding.py).
Invariant: a task that is cancelled holds nothing, and its operation has come to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from histories import words
from histories.hands import FAILED, describe
from histories.holding import Holding
from histories.log import LogFull
from histories.plan import Step


class Loop(Holding):
    """A thread that is an event loop."""

    def live(self, tasks: list[list[Step]]) -> None:
        try:
            asyncio.run(self._all(tasks))
            self.on.let_go()
        except LogFull:
            self.actor.is_full = True
        except BaseException as error:
            self.log.stray(repr(describe(error)))

    async def _all(self, tasks: list[list[Step]]) -> None:
        await asyncio.gather(*(self._task(steps) for steps in tasks))

    async def _task(self, steps: list[Step]) -> None:
        at = 0
        while not self.actor.is_over():
            step = steps[at % len(steps)]
            at += 1
            self.actor.is_full |= self.log.is_long
            await getattr(self, f"_{step['do']}")(step)
            await asyncio.sleep(0)

    async def _do(
        self, step: Step, kind: str, arguments: tuple[Any, ...], call: Callable[[], Awaitable[Any]]
    ) -> tuple[int, Any]:
        """As Hand.do; cancelled after a while, if the step says so and it is not over."""
        task = asyncio.current_task()
        assert task is not None
        number, result = self.log.begin(kind, self.on.participant, *arguments), None
        timer = asyncio.get_running_loop().call_later(step["cancel"] or 60.0, task.cancel)
        try:
            result = await call()
        except asyncio.CancelledError:
            task.uncancel()
            self.log.end(number, words.CANCELLED)
            return number, FAILED
        except Exception as error:
            self.log.end(number, *describe(error))
            return number, FAILED
        finally:
            timer.cancel()
        return number, result

    async def _change(self, step: Step) -> None:
        (offset, length), prot, timeout = self.pages_of(step), step["prot"], step["timeout"]
        arguments, region = (step["at"], step["count"], prot, timeout), self.on.region
        number, result = await self._do(
            step, words.CHANGE, arguments, lambda: region.mprotect_async(offset, length, prot, timeout=timeout)
        )
        if result is not FAILED:
            self.log.end(number, words.OK, result)

    async def _transact(self, step: Step) -> None:
        (offset, length), window, timeout = self.pages_of(step), step["window"], step["timeout"]
        arguments, region = (step["at"], step["count"], window, timeout), self.on.region
        number, lease = await self._do(
            step, words.LEASE, arguments, lambda: region.lease_async(offset, length, window=window, timeout=timeout)
        )
        if lease is FAILED:
            return
        self.log.end(number, words.OK, (lease.abandoned,))
        name, held = self.name_of(number), [lease]
        del lease
        try:
            await self._transact_in(step, name, held[0].view)
        finally:
            self.let_go(words.RELEASE, name, held, step["end"])

    async def _transact_in(self, step: Step, name: str, view: memoryview) -> None:
        pages = self.hot[step["at"] : step["at"] + step["count"]]
        starts = [(page - pages[0]) * words.PAGE for page in pages]
        self.load_leased(step, name, view, starts)
        value = self.next_value()
        for place in range(words.CELLS, words.PLACES):
            self.put(step, name, view, starts, place, value)
            await asyncio.sleep(0)

    async def _lock(self, step: Step) -> None:
        index, timeout, region = step["index"], step["timeout"], self.on.region
        number, lock = await self._do(
            step, words.LOCK, (index, timeout), lambda: region.lock_async(index, timeout=timeout)
        )
        if lock is FAILED:
            return
        self.log.end(number, words.OK, (lock.abandoned,))
        held = [lock]
        del lock
        try:
            self.spin(step["pause"])
            await asyncio.sleep(0)
        finally:
            self.let_go(words.UNLOCK, self.name_of(number), held, step["end"])
