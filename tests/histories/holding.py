"""What a thread holds for a while: leases and what is done under them, locks, freezes.

Lives here: taking, using, and the ways of letting go.  Not here: the same in an event loop (loops.py).
Invariant: whatever was taken has an operation that lets it go, or its holder dies.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from typing import Any

import numpy as np

from histories import words
from histories.hands import FAILED, Hand, describe
from histories.log import Log
from histories.plan import PATIENT, Step
from histories.words import PAGE, WORD


class Releaser(threading.Thread):
    """A thread that lets go of what others have taken, and does nothing else: so nobody waits for it in vain."""

    def __init__(self, log: Log) -> None:
        super().__init__(daemon=True)
        self._log = log
        self.queue: queue.SimpleQueue[tuple[str, str, int, list[Any]] | None] = queue.SimpleQueue()

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            kind, what, participant, held = item
            number = self._log.begin(kind, participant, what, "handed")
            try:
                held[0].release()
                self._log.end(number, words.OK)
            except BaseException as error:
                self._log.end(number, *describe(error))
            held.clear()


class Holding(Hand):
    """Leases, locks, freezes."""

    def name_of(self, number: int) -> str:
        """Of an operation of this thread, for others' arguments."""
        return f"{self.actor.name}={self.slot}:{number}"

    def let_go(self, kind: str, what: str, held: list[Any], how: str) -> None:
        """`held` has the one reference to it."""
        if how == "handed" and self.actor.releaser is not None:
            self.actor.releaser.queue.put((kind, what, self.on.participant, held))
            while held:  # until then it is this thread's, which would wait for itself
                time.sleep(0)
            return

        def end() -> None:
            if how == "dropped":
                held.clear()
            elif how == "with":
                with held.pop():
                    pass
            else:
                held.pop().release()

        number, result, ended = self.do(kind, (what, how), end)
        if result is not FAILED:
            self.log.end(number, words.OK, at=ended)
        elif held:  # Ctrl-C came first
            number = self.log.begin(kind, self.on.participant, what, how)
            held.pop().release()
            self.log.end(number, words.OK)

    # -- Leases --------------------------------------------------------------------------------------------------------

    def take_lease(self, step: Step) -> tuple[str, Any]:
        """(its name, the lease or FAILED)"""
        offset, length = self.pages_of(step)
        window, timeout = step["window"] and not self.is_blocked, step["timeout"]
        region = self.on.region
        number, lease, ended = self.do(
            words.LEASE,
            (step["at"], step["count"], window, timeout),
            lambda: region.lease(offset, length, window=window, timeout=timeout),
        )
        if lease is not FAILED:
            self.log.end(number, words.OK, (lease.abandoned,), at=ended)
        return self.name_of(number), lease

    def do_transact(self, step: Step) -> None:
        name, lease = self.take_lease(step)
        if lease is FAILED:
            return
        held = [lease]
        del lease
        try:
            self.transact(step, name, held[0].view)
        finally:
            self.let_go(words.RELEASE, name, held, step["end"])

    def transact(self, step: Step, name: str, view: memoryview) -> None:
        """The same value at all places of all pages; before it a look at what the last holder left."""
        if self.is_blocked:
            step = {**step, "means": "write"}
        pages = self.hot[step["at"] : step["at"] + step["count"]]
        starts = [(page - pages[0]) * PAGE for page in pages]
        self.load_leased(step, name, view, starts)
        value = self.next_value()
        for place in range(words.CELLS, words.PLACES):
            self.put(step, name, view, starts, place, value)
            if place == words.CELLS:
                self.spin(step["pause"])
                self.take_steps(step["inner"])

    def load_leased(self, step: Step, name: str, view: memoryview, starts: list[int]) -> None:
        pages = self.hot[step["at"] : step["at"] + step["count"]]

        def load() -> list[bytes | memoryview]:
            if self.is_blocked:  # a fault could not be told to it
                return [self.on.region.read(page * PAGE, PAGE) for page in pages]
            return [view[at : at + PAGE] for at in starts]

        number, result, ended = self.do(
            words.LOAD,
            (step["at"], step["count"], "lease", name),
            lambda: b"".join(map(self.words_of, load())),
        )
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)

    def put(self, step: Step, name: str, view: memoryview, starts: list[int], place: int, value: int) -> None:
        """One place of all pages of a lease."""
        within, data = words.offset_of(place), struct.pack("@Q", value)

        def by_view() -> None:
            for at in starts:
                view[at + within : at + within + WORD] = data

        def by_numpy() -> None:
            array = np.frombuffer(view, np.uint64)
            for at in starts:
                array[(at + within) // WORD] = value

        def by_write() -> None:
            for page in self.hot[step["at"] : step["at"] + step["count"]]:
                self.on.region.write(page * PAGE + within, data)

        store = {"numpy": by_numpy, "view": by_view, "write": by_write}[step["means"]]
        arguments = (name, step["at"], step["count"], place, value, step["means"])
        number, result, ended = self.do(words.TRANSACT, arguments, store)
        if result is not FAILED:
            self.log.end(number, words.OK, at=ended)

    def take_steps(self, steps: list[Step]) -> None:
        """Of another step, in the middle of it."""
        for step in steps:
            getattr(self, f"do_{step['do']}")(step)

    def do_nine(self, step: Step) -> None:
        """Nine leases at once, given back in another order; a snapshot in the middle is refused."""
        held: dict[int, tuple[str, list[Any]]] = {}
        count = min(9, len(self.hot))
        try:
            for index in range(count):
                one = {"at": index, "count": 1, "window": step["window"], "timeout": step["timeout"]}
                name, lease = self.take_lease(one)
                if lease is FAILED:
                    break
                held[index] = name, [lease]
                del lease
            for index in step["order"]:
                if len(held) == 1:
                    self.try_snapshot()
                if index in held:
                    name, one_held = held.pop(index)
                    self.let_go(words.RELEASE, name, one_held, "release")
        finally:
            for name, one_held in held.values():
                self.let_go(words.RELEASE, name, one_held, "release")

    def try_snapshot(self) -> None:
        """By who has a lease."""
        number, result, ended = self.do(words.SNAPSHOT, (PATIENT,), lambda: self.on.region.snapshot(timeout=PATIENT))
        if result is not FAILED:
            self.log.end(number, words.OK, result.generation, at=ended)
            result.close()

    # -- Locks ---------------------------------------------------------------------------------------------------------

    def do_lock(self, step: Step) -> None:
        index, timeout, region = step["index"], step["timeout"], self.on.region
        number, lock, ended = self.do(words.LOCK, (index, timeout), lambda: region.lock(index, timeout=timeout))
        if lock is FAILED:
            return
        self.log.end(number, words.OK, (lock.abandoned,), at=ended)
        held = [lock]
        del lock
        try:
            self.spin(step["pause"])
            time.sleep(step.get("keep", 0))
            self.take_steps(step["inner"])
        finally:
            self.let_go(words.UNLOCK, self.name_of(number), held, step["end"])

    # -- Freezes -------------------------------------------------------------------------------------------------------

    def do_freeze(self, step: Step) -> None:
        timeout, region = step["timeout"], self.on.region
        number, frozen, ended = self.do(words.FREEZE, (timeout,), lambda: region.frozen(timeout=timeout))
        if frozen is FAILED:
            return
        self.log.end(number, words.OK, frozen.generation, at=ended)
        held = [frozen]
        del frozen
        try:
            for _ in range(step["looks"]):
                for index in range(len(self.hot)):
                    self.load(index, "read")
                self.spin(step["pause"])
        finally:
            self.let_go(words.THAW, self.name_of(number), held, step["end"])
