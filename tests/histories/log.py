"""What a thread did and saw, written down so that it survives the thread's death at any instruction.

Lives here: the file of one thread, written and read.  Not here: what the records mean (history.py).
Invariants
 1. A file has one writer.  It is memory that is mapped and shared, so what was stored is in it, whoever dies.
 2. A record's length is stored after the record, in one word: a record is there as a whole, or not at all.
 3. The beginning of an operation is written before it is called, with a time from before; its end after, with a time
    from after: what was done was done in between.
"""

from __future__ import annotations

import marshal
import mmap
import os
import time
from typing import Any

BEGIN, END, STRAY, NOTE = 0, 1, 2, 3
SIZE = 1 << 24  # sparse: a file takes what was written
MOST = 20_000  # operations: of what is done again and again, more would say nothing new, and take long to judge


class LogFull(Exception):
    """The thread has to end: what it does further would not be known."""


_all: list[Log] = []  # for ever: a map that goes closes its descriptor, which may be another's after a closerange


class Log:
    """One thread's. Times are of CLOCK_MONOTONIC, which all processes of the machine have in common; nanoseconds."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, SIZE)
            self._map = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        self._lengths = memoryview(self._map).cast("I")
        self._at = 0
        self.number = 0
        self.under_way: dict[int, None] = {}
        _all.append(self)

    def begin(self, kind: str, participant: int, *arguments: Any) -> int:
        """The operation's number; it is called next."""
        now = time.monotonic_ns()
        self.number += 1
        self._put((BEGIN, self.number, kind, participant, now, arguments))
        self.under_way[self.number] = None
        return self.number

    def end(self, number: int, outcome: str, value: Any = None, *, at: int | None = None) -> None:
        """It is over; `at`: the time at which it was, where the value took longer."""
        now = at or time.monotonic_ns()
        self._put((END, number, now, outcome, value))
        self.under_way.pop(number, None)

    def stray(self, text: str) -> None:
        """An exception came where none belongs."""
        self._put((STRAY, time.monotonic_ns(), text))

    def note(self, what: str, *values: Any) -> None:
        """Something that is no operation."""
        self._put((NOTE, time.monotonic_ns(), what, values))

    @property
    def is_long(self) -> bool:
        """Whoever writes it has done enough."""
        return self.number > MOST or self._at > SIZE // 2

    def _put(self, record: tuple[Any, ...]) -> None:
        data = marshal.dumps(record)
        start, end = self._at + 4, self._at + 4 + len(data)
        if end + 8 > SIZE:
            raise LogFull
        self._map[start:end] = data
        self._lengths[self._at // 4] = len(data)
        self._at = (end + 3) & ~3


def read(path: str) -> list[tuple[Any, ...]]:
    """The records of a file, whoever wrote it and died."""
    with open(path, "rb") as file:
        data = file.read()
    records, at = [], 0
    while at + 4 <= len(data) and (length := int.from_bytes(data[at : at + 4], "little")):
        records.append(marshal.loads(data[at + 4 : at + 4 + length]))
        at = (at + 4 + length + 3) & ~3
    return records
