"""A thread that does one operation after the other: what it is, and its stores, loads and changes.

Lives here: Hand, which the other kinds of operations build on (holding.py, imaging.py, births.py), and how an operation
is done and written down.  Not here: which operation comes next (steps.py), the process (actor.py).
Invariants
 1. An operation is one statement between the two records; whatever exception comes anywhere else is a stray.
 2. An exception of Ctrl-C comes only while `soft` is set, so nothing of the harness is cut in two.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import operator
import os
import struct
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import pyshare
from histories import words
from histories.log import Log
from histories.plan import Step
from histories.stage import reserve
from histories.words import PAGE, WORD

if TYPE_CHECKING:
    from histories.actor import Actor

FAILED: Any = object()
BAG = 48  # pages that are gathered: more than what is malloc's for ever, so what is stored after its end faults


class Ground:
    """What a thread works on: one handle of the region, and what leads to its memory."""

    def __init__(self, region: pyshare.Region, participant: int, scratch: int) -> None:
        self.region, self.participant, self.scratch = region, participant, scratch
        self.view = region.buf
        self.words = region.numpy(np.uint64, region.size // WORD)
        self.address = region.address

    def let_go(self) -> None:
        """No view and no array of it is left here."""
        del self.view, self.words


def describe(error: BaseException) -> tuple[str, Any]:
    """How an operation came out that raised."""
    match error:
        case pyshare.ProtectionError():
            return words.REFUSED, None
        case pyshare.PropagationTimeout():
            return words.TIMEOUT, (error.generation, tuple(error.pids))
        case pyshare.RegionClosed():
            return words.CLOSED, None
        case pyshare.ParticipantLimit():
            return words.FULL, None
        case pyshare.CorruptRegion() | pyshare.RegionExists() | pyshare.RegionNotFound():
            return words.WRONG, (f"{type(error).__name__}: {error}",)
        case pyshare.ShareError():
            return words.NESTED, (str(error),)
        case KeyboardInterrupt():
            return words.INTERRUPTED, None
        case OSError(errno=errno.EFAULT):
            return words.REFUSED, ("EFAULT",)
        case OSError():
            return words.KERNEL, (error.errno, f"{type(error).__name__}: {error}")
    return words.WRONG, ("".join(traceback.format_exception(error)),)


# -- Stores and loads, by whatever stores and loads --------------------------------------------------------------------


def _store_by_view(on: Ground, at: int, value: int) -> None:
    on.view[at : at + WORD] = struct.pack("@Q", value)


def _store_by_numpy(on: Ground, at: int, value: int) -> None:
    on.words[at // WORD] = value


def _store_by_fill(on: Ground, at: int, value: int) -> None:
    on.words[at // WORD : at // WORD + 1].fill(value)


def _store_by_ctypes(on: Ground, at: int, value: int) -> None:
    with on.region.guard():
        ctypes.c_uint64.from_address(on.address + at).value = value


def _store_by_pack(on: Ground, at: int, value: int) -> None:
    struct.pack_into("@Q", on.view, at, value)


def _store_by_write(on: Ground, at: int, value: int) -> None:
    on.region.write(at, struct.pack("@Q", value))


def _store_by_syscall(on: Ground, at: int, value: int) -> None:
    os.pwrite(on.scratch, struct.pack("@Q", value), 0)
    os.preadv(on.scratch, [on.view[at : at + WORD]], 0)


def _store_by_flat(on: Ground, at: int, value: int) -> None:
    on.words.flat[at // WORD] = value


def _store_by_real(on: Ground, at: int, value: int) -> None:
    on.words[at // WORD : at // WORD + 1].real = value


def _store_by_nditer(on: Ground, at: int, value: int) -> None:
    with np.nditer(on.words[at // WORD : at // WORD + 1], op_flags=["writeonly"]) as items:
        for item in items:
            item[...] = value  # type: ignore[index]


def _store_by_copyto(on: Ground, at: int, value: int) -> None:
    np.copyto(on.words[at // WORD : at // WORD + 1], np.uint64(value))


def _store_by_out(on: Ground, at: int, value: int) -> None:
    np.add(np.uint64(value), np.uint64(0), out=on.words[at // WORD : at // WORD + 1])


STORES: dict[str, Callable[[Ground, int, int], None]] = {
    "view": _store_by_view,
    "numpy": _store_by_numpy,
    "fill": _store_by_fill,
    "ctypes": _store_by_ctypes,
    "pack": _store_by_pack,
    "write": _store_by_write,
    "syscall": _store_by_syscall,
    "flat": _store_by_flat,
    "real": _store_by_real,
    "nditer": _store_by_nditer,
    "copyto": _store_by_copyto,
    "out": _store_by_out,
}


def _load_by_ctypes(on: Ground, at: int) -> bytes:
    with on.region.guard():
        return ctypes.string_at(on.address + at, PAGE)


LOADS: dict[str, Callable[[Ground, int], bytes]] = {
    "read": lambda on, at: on.region.read(at, PAGE),
    "view": lambda on, at: bytes(on.view[at : at + PAGE]),
    "numpy": lambda on, at: on.words[at // WORD : (at + PAGE) // WORD].copy().tobytes(),
    "ctypes": _load_by_ctypes,
    "join": lambda on, at: b"".join([on.view[at : at + PAGE]]),
    "concat": lambda on, at: b"" + on.view[at : at + PAGE],
    "iterate": lambda on, at: array.array("Q", on.view[at : at + PAGE].cast("Q")).tobytes(),
}


def _insert(bag: bytearray, data: memoryview) -> None:
    bag[len(bag) // 2 : 0] = data


class Hand:
    """One thread of an actor; `slot` is its number among all threads of the plan."""

    def __init__(self, actor: Actor, slot: int, log: Log, value: int, cell: int) -> None:
        self.actor, self.slot, self.log = actor, slot, log
        self.scratch = reserve(os.memfd_create("scratch"))
        self.source = reserve(os.memfd_create("source"))
        self.pipe = [reserve(end) for end in os.pipe2(os.O_NONBLOCK)]
        self.on = Ground(actor.region, 0, self.scratch)
        self.hot: list[int] = actor.plan["hot"]
        self.cell = cell
        self.is_main = self.is_blocked = False
        self.generations: list[int] = [0]
        self._value = value

    def next_value(self) -> int:
        self._value += 1
        return self._value

    def do(
        self, kind: str, arguments: tuple[Any, ...], call: Callable[[], Any], *, soft: bool = True
    ) -> tuple[int, Any, int]:
        """(number, what it returned, when); FAILED where it raised, which is written down. Else the caller ends it."""
        log, actor, result = self.log, self.actor, None
        number = log.begin(kind, self.on.participant, *arguments)
        try:
            actor.soft = self.is_main and soft
            result = call()
            at = time.monotonic_ns()
            actor.soft = False
        except BaseException as error:
            at = time.monotonic_ns()
            actor.soft = False
            actor.caught += isinstance(error, KeyboardInterrupt)
            result = None  # a lease that was had at the last moment goes before the end is told
            log.end(number, *describe(error), at=at if not isinstance(error, KeyboardInterrupt) else None)
            return number, FAILED, at
        return number, result, at

    def words_of(self, page: bytes | memoryview) -> bytes:
        """What a history keeps of it."""
        return words.words_of(page, self.actor.stage.threads)

    def spin(self, turns: int) -> None:
        for _ in range(turns):
            pass

    def may(self, step: Step, bit: int) -> bool:
        """False: the access would end us, or make us wait, by all that is known; so only the bold try."""
        if self.actor.policy == "raise" or step["bold"] or self.is_blocked:
            return True
        with contextlib.suppress(pyshare.ParticipantLimit, OSError):  # it has no part
            return bool(self.on.region.protection(self.hot[step["at"]] * PAGE) & bit)
        return False

    # -- Steps ---------------------------------------------------------------------------------------------------------

    def do_store(self, step: Step) -> None:
        means = "write" if self.is_blocked else step["means"]
        if not self.may(step, pyshare.WRITE):
            return
        value, at = self.next_value(), self.hot[step["at"]] * PAGE + WORD * self.cell
        store = STORES[means]
        arguments = (step["at"], means, value, self.cell)
        number, result, ended = self.do(words.STORE, arguments, lambda: store(self.on, at, value))
        if result is not FAILED:
            self.log.end(number, words.OK, at=ended)

    def do_load(self, step: Step) -> None:
        means = "read" if self.is_blocked else step["means"]
        if not self.may(step, pyshare.READ | pyshare.WRITE):
            return
        if means == "bag":
            self.load_into_bag(step["at"])
        else:
            self.load(step["at"], means)

    def load_into_bag(self, index: int) -> None:
        """Into a bytearray that all threads of the process use: what it holds nobody knows, but that it lives on."""
        at, bag, view = self.hot[index] * PAGE, self.actor.bag, self.on.view
        put = (operator.iadd, bytearray.extend, _insert)[index % 3]

        def load() -> None:
            for _ in range(8):
                put(bag, view[at : at + PAGE])
                if len(bag) > BAG * PAGE:
                    bag.clear()

        number, result, ended = self.do(words.LOAD, (index, 1, "bag", ""), load)
        if result is not FAILED:
            self.log.end(number, words.OK, "", at=ended)

    def load(self, index: int, means: str) -> None:
        load, at = LOADS[means], self.hot[index] * PAGE
        number, result, ended = self.do(words.LOAD, (index, 1, means, ""), lambda: load(self.on, at))
        if result is not FAILED:
            self.log.end(number, words.OK, self.words_of(result), at=ended)

    def pages_of(self, step: Step) -> tuple[int, int]:
        """(offset, length) of a step's range, which may have other pages between the hot ones."""
        first, last = self.hot[step["at"]], self.hot[step["at"] + step["count"] - 1]
        return first * PAGE, (last + 1 - first) * PAGE

    def do_change(self, step: Step) -> None:
        offset, length = self.pages_of(step)
        prot, timeout = step["prot"], step["timeout"]
        arguments = (step["at"], step["count"], prot, timeout)
        region = self.on.region
        number, result, ended = self.do(
            words.CHANGE, arguments, lambda: region.mprotect(offset, length, prot, timeout=timeout)
        )
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)
            self.keep_generation(result)

    def do_churn(self, step: Step) -> None:
        """Changes of the same pages, one right after the other."""
        for turn in range(step["turns"]):
            if self.actor.is_over():
                return
            self.do_change({**step, "prot": step["prots"][turn % 2]})

    def keep_generation(self, generation: int) -> None:
        self.generations = [*self.generations[-7:], generation]

    def do_generation(self, _step: Step) -> None:
        number, result, ended = self.do(words.GENERATION, (), lambda: self.on.region.generation)
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)
            self.keep_generation(result)
