"""How the bench measures: cases, rounds, quantiles, and the watch over every wait.

Lives here: what all sections share.  Not here: what is measured.
Invariants
 1. Contenders take turns, in an order shuffled every round: whatever the
    machine does meanwhile, it does to all.
 2. No process outlives the bench, however it ends: each is killed in a finally
    and, where there was no time for that, by the kernel (PR_SET_PDEATHSIG).
 3. No wait is unbounded: one alarm watches over all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pyshare import _peers

PAGE = mmap.PAGESIZE
MIB = 1 << 20

WARM_UP = 3  # rounds that are not counted
LEAST = 10  # rounds that are, however long they take; unless a Limit says otherwise
MESSAGE = 256  # bytes that a process tells: one atomic write to a pipe
PATIENCE = 30.0  # seconds that one turn, or the start of one team, may take
QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99, "max": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is varied; participants are counted beside the caller, threads beside the listener."""

    section: str
    participants: int = 0
    length: int = PAGE
    dirty: bool = True
    storing: int = 0  # so many working threads
    threads: int = 1
    warm: bool = False  # it was changed to and fro just before
    stopped: bool = False  # the first participant, by SIGSTOP
    writable: bool = True  # what the region is created as


@dataclasses.dataclass(frozen=True)
class Figures:
    """Quantiles, and of how many rounds they are; a quantile is a value that was measured."""

    p50: float
    p90: float
    p99: float
    max: float
    rounds: int
    unit: str


Key = tuple[Case, str, str]  # case, contender, measure
Results = dict[Key, Figures]
Tick = Callable[[float], None]  # is told how much of a section is done


def figures(values: Sequence[float], unit: str = "µs") -> Figures:
    """A quantile is the least of the values that this part of them does not exceed."""
    ranked = sorted(values)
    quantiles = {name: ranked[math.ceil(part * len(ranked)) - 1] for name, part in QUANTILES.items()}
    return Figures(**quantiles, rounds=len(ranked), unit=unit)


@dataclasses.dataclass(frozen=True)
class Limit:
    """Measuring ends after so many rounds or seconds, whichever comes first, but not before the least."""

    rounds: int
    seconds: float
    least: int = LEAST
    warm_up: int = WARM_UP


def repeat(limit: Limit, tick: Tick, everybody: Callable[[bool, Callable[[], None]], object]) -> None:
    """Rounds of `everybody(does it count, wind)`, which calls `wind` before each turn (see alarm)."""
    started = time.monotonic()
    with alarm() as wind:
        for number in range(-limit.warm_up, limit.rounds):
            everybody(number >= 0, wind)
            spent = (time.monotonic() - started) / limit.seconds
            tick(min(1.0, max(spent, number / limit.rounds)))
            if spent > 1 and number + 1 >= limit.least:
                break


def interleave(groups: Sequence[Mapping[Key, Callable[[], float]]], limit: Limit, tick: Tick) -> Results:
    """Every contender's figures in µs, from ns; a round is a turn of everybody in each group, group after group."""
    values: dict[Key, list[float]] = {key: [] for group in groups for key in group}
    order = random.Random(0)

    def everybody(counts: bool, wind: Callable[[], None]) -> None:
        for group in groups:
            for key, turn in order.sample(list(group.items()), len(group)):
                wind()
                elapsed = turn()
                if counts:
                    values[key].append(elapsed / 1000)

    repeat(limit, tick, everybody)
    return {key: figures(found) for key, found in values.items()}


@contextlib.contextmanager
def alarm() -> Iterator[Callable[[], None]]:
    """TimeoutError in the main thread, when what this yields is not called for PATIENCE seconds."""

    def ring(_number: int, _frame: object) -> NoReturn:
        raise TimeoutError(f"a participant has not answered for {PATIENCE:.0f} s")

    def wind() -> None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        wind()
        yield wind
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- Processes -----------------------------------------------------------------------------------


def fork(serve: Callable[[], object]) -> int:
    """A child runs `serve`, and nothing else of this program; returns its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _peers.die_with(parent)
        serve()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class Crew:
    """Forked processes that are killed with it."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, count: int, serve: Callable[[int, Callable[[Any], None]], object]) -> list[Any]:
        """So many children run `serve(index, tell)`; returns what each told first, in the order of the telling."""
        told, telling = os.pipe()

        def tell(said: Any) -> None:
            os.write(telling, json.dumps(said).encode().ljust(MESSAGE))

        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # for ever in the children
        try:
            for index in range(count):
                self.pids.append(fork(functools.partial(serve, index, tell)))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.close(telling)
            telling = -1
            return [hear(told) for _ in range(count)]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.close(told)
            if telling >= 0:
                os.close(telling)

    def close(self) -> None:
        """No process of the crew is left."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        while self.pids:
            os.waitpid(self.pids[-1], 0)
            self.pids.pop()


def hear(pipe: int) -> Any:
    """The next message in the pipe."""
    message = os.read(pipe, MESSAGE)
    if not message:
        raise OSError("a process of the bench ended before it was asked to")
    return json.loads(message)
