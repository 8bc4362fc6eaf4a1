"""Regions in an event loop: whatever waits does so in one native thread, and no loop is blocked.

Lives here: what the ``_async`` methods of Region do, and the stream of changes.
Not here: the waiting (ext/operations/waiter.c), the calls that are waited for (ext/binding/async.pxi).
Imported by the first of these methods: asyncio is large.
Invariants
 1. When a coroutine of this module has ended, however it did, nothing of it is under way: no lease, no lock, no wish
    for one, no half change.
 2. A loop has a descriptor of ours, and a reader on it, only while a call of it is under way.
"""

from __future__ import annotations

import asyncio
import os
import select
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from pyshare import _core
from pyshare._changes import Change, Reader
from pyshare._core import Lease, Lock
from pyshare._errors import ShareError
from pyshare._region import Region, Timeout

H = TypeVar("H", bound=Lease | Lock)

# -- A loop and its calls ----------------------------------------------------------------------------------------------


class _Hub:
    """What a loop has under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._box = _core.Mailbox()
        self._calls: dict[_core.Call, asyncio.Future[None] | None] = {}
        loop.add_reader(self._box.fileno(), self._collect)

    def begin(self, call: _core.Call) -> None:
        """It is under way."""
        try:
            call.begin(self._box)
            self._calls[call] = None
        finally:
            self._leave_if_idle()

    def over(self, call: _core.Call) -> asyncio.Future[None]:
        """Done when it is."""
        future = self._calls[call] = self._loop.create_future()
        return future

    def end(self, call: _core.Call) -> None:
        """Blocks until it is over, milliseconds: for when nobody runs the loop any more."""
        told = select.poll()
        told.register(self._box.fileno(), select.POLLIN)
        call.cancel()
        while not call.done:
            told.poll()
            self._collect()

    def _collect(self) -> None:
        for call in self._box.take():
            future = self._calls.pop(call)
            if future is not None and not future.done() and not self._loop.is_closed():
                future.set_result(None)
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self._calls:
            return
        _hubs.pop(self._loop, None)
        if not self._loop.is_closed():
            self._loop.remove_reader(self._box.fileno())
        self._box.close()

    def forget(self) -> None:
        """In a forked child: the loop is its parent's, and so is whatever the loop's selector has."""
        self._box.close()


# Of loops with something under way.  Weak: the loop's reader keeps a hub, and each coroutine that waits; when a loop
# was closed in the middle, its coroutines can go, which ends their calls.
_hubs: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, _Hub] = weakref.WeakValueDictionary()


def _forget_hubs() -> None:
    for hub in list(_hubs.values()):
        hub.forget()
    _hubs.clear()


os.register_at_fork(after_in_child=_forget_hubs)


async def _finish(call: _core.Call) -> None:
    """Returns when it is over. Cancelled, it ends the call first, and gives back what that has got."""
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hub = _hubs[loop] = _Hub(loop)
    hub.begin(call)
    interruption: asyncio.CancelledError | None = None
    try:
        while not call.done:
            try:
                await hub.over(call)
            except asyncio.CancelledError as error:
                interruption = interruption or error
                call.cancel()
        if interruption:
            raise interruption
    except BaseException:
        if not call.done:
            hub.end(call)
        call.drop()
        raise
    finally:
        interruption = None  # it has this frame in its traceback


# -- What a task has ---------------------------------------------------------------------------------------------------


class _Holding(NamedTuple):
    """A lease or a lock that a task has taken; bytes, or the index."""

    held: weakref.ref[Lease | Lock]
    region: int
    kind: type
    first: int
    end: int


_holdings: weakref.WeakKeyDictionary[asyncio.Task[Any], list[_Holding]] = weakref.WeakKeyDictionary()


def _held(region: Region, kind: type) -> Iterator[_Holding]:
    """By the calling task, still."""
    task = asyncio.current_task()
    for holding in _holdings.get(task, ()) if task is not None else ():
        held = holding.held()
        if held is not None and held.held and holding.region == id(region) and holding.kind is kind:
            yield holding


def _check_not_own(region: Region, kind: type, first: int, count: int, doing: str) -> None:
    for holding in _held(region, kind):
        if holding.first < first + count and first < holding.end:
            raise ShareError(
                f"{doing}: this task holds {'the lock' if kind is Lock else 'a lease on some of these pages'} already, "
                "and would wait for itself; release it first"
            )


def _note(region: Region, held: Lease | Lock, first: int, count: int) -> None:
    task = asyncio.current_task()
    if task is None:
        return
    before = [one for one in _holdings.get(task, ()) if (other := one.held()) is not None and other.held]
    _holdings[task] = [*before, _Holding(weakref.ref(held), id(region), type(held), first, first + count)]


# -- The methods -------------------------------------------------------------------------------------------------------


async def mprotect(region: Region, offset: int, length: int, prot: int, timeout: Timeout) -> int:
    """As Region.mprotect_async."""
    call = _core.call_change(region, offset, length, prot, timeout)
    _check_not_own(region, Lease, offset, length, "mprotect")
    await _finish(call)
    generation = call.result()
    assert isinstance(generation, int)
    return generation


async def _take(call: _core.Call, region: Region, kind: type[H], first: int, count: int, doing: str) -> H:
    if not call.done:
        _check_not_own(region, kind, first, count, doing)
        await _finish(call)
    held = call.result()
    assert isinstance(held, kind)
    _note(region, held, first, count)
    return held


async def _lease(region: Region, offset: int, length: int, timeout: Timeout, window: bool) -> Lease:
    passes = any(True for _ in _held(region, Lease))
    call = _core.call_lease(region, offset, length, timeout, window, passes)
    return await _take(call, region, Lease, offset, length, "lease")


async def _lock(region: Region, index: int, timeout: Timeout) -> Lock:
    call = _core.call_lock(region, index, timeout)
    return await _take(call, region, Lock, index, 1, "lock")


class Taking(Generic[H]):
    """A lease or a lock that is to be taken: ``async with`` takes and releases it; ``await`` takes it.

    Each time anew. Nothing happens before.
    """

    __slots__ = ("_held", "_take")

    def __init__(self, take: Callable[[], Coroutine[Any, Any, H]]) -> None:
        self._take = take
        self._held: list[H] = []  # the latest last

    def __await__(self) -> Generator[Any, Any, H]:
        return self._take().__await__()

    async def __aenter__(self) -> H:
        held = await self._take()
        self._held.append(held)
        return held

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.pop().release()


def lease(region: Region, offset: int, length: int, timeout: Timeout, window: bool) -> Taking[Lease]:
    """As Region.lease_async."""
    return Taking(lambda: _lease(region, offset, length, timeout, window))


def lock(region: Region, index: int, timeout: Timeout) -> Taking[Lock]:
    """As Region.lock_async."""
    return Taking(lambda: _lock(region, index, timeout))


class Changes:
    """The changes of a region, in order, from one generation on; an asynchronous iterator.

    Of whatever leads to the memory (``fd``): it looks without taking part.
    """

    def __init__(self, fd: int, since: int) -> None:
        self._reader: Reader | None = Reader(_core.Observer(fd), since)  # None: it has ended
        self._call: _core.Call | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        if self._call is not None and not self._call.done:
            raise RuntimeError("changes: another task is waiting for the next one")
        while self._reader is not None:
            ended = self._ended  # before the look: what is over when it ends is read
            change = self._reader.next()
            if change is not None:
                return change
            if ended:
                self._reader = None  # it keeps the memory
                break
            await self._wait(_core.call_watch(self._reader.observer, self._reader.generation))
        raise StopAsyncIteration

    async def _wait(self, call: _core.Call) -> None:
        self._call = call
        try:
            if not self._ended:  # looked at when the call is there for `end`, which may come from another thread
                await _finish(call)
        finally:
            self._call = None

    def end(self) -> None:
        """What is over by now may still be read; then it ends."""
        self._ended = True
        call = self._call
        if call is not None:
            call.cancel()

    async def aclose(self) -> None:
        """It ends."""
        self.end()
