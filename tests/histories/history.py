"""A history: the operations of an episode, the lives of its processes, and what was done to them.

Lives here: reading the logs of an episode into one, and the file in which it is kept.  Not here: what is right.
Invariants
 1. Nothing is guessed: an operation whose end nobody wrote has no outcome, and its end is the death of its process.
 2. A saved history is all that the oracle needs.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
from collections import defaultdict
from typing import Any

from histories import log as logs

FOREVER = 1 << 62


@dataclasses.dataclass(slots=True)
class Op:
    """One call: it began after `begin`, and was over before `end` (nanoseconds)."""

    id: str
    process: str
    participant: str  # a handle of the region, in a process
    thread: str
    kind: str
    args: list[Any]
    begin: int
    end: int
    outcome: str | None
    value: Any

    @property
    def open(self) -> bool:
        """Nobody knows how far it came."""
        return self.outcome is None


@dataclasses.dataclass(slots=True)
class Life:
    """Of a process."""

    name: str
    pid: int
    policy: str
    parent: str | None
    born: int
    last: int  # the time of the last record that any of its threads has written
    died: int = FOREVER  # whoever reaped it knew by then
    status: int | None = None


@dataclasses.dataclass(slots=True)
class History:
    """Times are nanoseconds of CLOCK_MONOTONIC."""

    plan: dict[str, Any]
    ops: list[Op]
    lives: dict[str, Life]
    stops: list[tuple[int, int, int]]  # (pid, from, to)
    notes: list[tuple[int, str, list[Any]]]  # of the conductor
    strays: list[tuple[str, int, str]]  # (thread, when, traceback)

    def noted(self, what: str) -> list[tuple[int, list[Any]]]:
        return [(at, values) for at, name, values in self.notes if name == what]


# -- From the logs -----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


class _Reader:
    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.lives: dict[str, Life] = {}
        self.notes: list[tuple[int, str, list[Any]]] = []
        self.strays: list[tuple[str, int, str]] = []
        self.deaths: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def read(self, path: str) -> None:
        thread = os.path.basename(path)[: -len(".log")]
        process = thread.split("=")[0]
        under_way: dict[int, Op] = {}
        last = 0
        for record in logs.read(path):
            match record:
                case (logs.BEGIN, number, kind, participant, at, arguments):
                    name = f"{thread}:{number}"
                    whose = f"{process}/{participant}"
                    op = Op(name, process, whose, thread, kind, _plain(arguments), at, FOREVER, None, None)
                    under_way[number] = op
                    self.ops.append(op)
                case (logs.END, number, at, outcome, value):
                    op = under_way.pop(number)
                    op.end, op.outcome, op.value = at, outcome, _plain(value)
                case (logs.STRAY, at, text):
                    self.strays.append((thread, at, text))
                case (logs.NOTE, at, what, values):
                    self._note(process, at, what, list(values))
            last = max(last, next((each for each in record if isinstance(each, int) and each > 1 << 32), 0))
        life = self.lives.get(process)
        if life:
            life.last = max(life.last, last)

    def _note(self, process: str, at: int, what: str, values: list[Any]) -> None:
        if what == "born":
            self.lives[process] = Life(process, values[1], values[2], values[0], at, at)
        elif what == "died":
            self.deaths[values[0]].append((at, values[1]))
        if what != "born":
            self.notes.append((at, what, _plain(values)))

    def settle(self) -> None:
        """Deaths are known."""
        for life in self.lives.values():
            for at, status in self.deaths[life.pid]:
                if at > life.born and at < life.died:
                    life.died, life.status = at, status
        for op in self.ops:
            if op.outcome is None and op.process in self.lives:
                op.end = self.lives[op.process].died
        self.ops.sort(key=lambda op: op.begin)
        self.notes.sort(key=lambda note: note[0])


def _stops(notes: list[tuple[int, str, list[Any]]]) -> list[tuple[int, int, int]]:
    """From before the signal that stopped a process to after the one by which it went on."""
    found, since = [], dict[int, int]()
    for at, what, values in notes:
        if what == "stop":
            since[values[0]] = at
        elif what == "stopped":
            since.setdefault(values[0], int(values[1] * 1e9))
        elif what in ("continue", "died", "hangs") and values[0] in since:
            found.append((values[0], since.pop(values[0]), at + 1_000_000))
    return found + [(pid, at, FOREVER) for pid, at in since.items()]


def load(plan: dict[str, Any], folder: str) -> History:
    """Of an episode that is over."""
    reader = _Reader()
    names = sorted(name for name in os.listdir(folder) if name.endswith(".log"))
    names.sort(key=lambda name: not re.search(r"=main\.log$|-", name))  # who is born is known before its threads
    for name in names:
        reader.read(os.path.join(folder, name))
    reader.settle()
    return History(plan, reader.ops, reader.lives, _stops(reader.notes), reader.notes, reader.strays)


# -- The file ----------------------------------------------------------------------------------------------------------


def save(history: History, path: str) -> None:
    """As JSON, compressed."""
    with gzip.open(path, "wt", compresslevel=3) as file:
        json.dump(dataclasses.asdict(history), file)


def open_saved(path: str) -> History:
    """What save has written."""
    with gzip.open(path, "rt") as file:
        data = json.load(file)
    ops = [Op(**each) for each in data["ops"]]
    lives = {name: Life(**each) for name, each in data["lives"].items()}
    notes = [(at, what, values) for at, what, values in data["notes"]]
    stops = [(pid, begin, end) for pid, begin, end in data["stops"]]
    strays = [(thread, at, text) for thread, at, text in data["strays"]]
    return History(data["plan"], ops, lives, stops, notes, strays)
