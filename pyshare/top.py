"""Regions, or the participants of one, as they live: changes and leases a second, and who is slowest to acknowledge.

Lives here: rates, from two looks, and the screen.
Not here: a look (_status.py); each single change (trace.py).

Without a name there is a row for each region, with one a row for each of its participants.  "q" or Ctrl-C ends it.
Where the output is no terminal, or with ``--json``, the table is printed once an interval, the first one after the
first; ``--count`` ends it after so many.

"Slowest" is who was waited for last in the longest of the changes of the interval, and how long that one took; of a
participant, how often it was the one, and the longest.

``--json`` prints one object a line: ``time`` (seconds since 1970), ``seconds`` (since the look before), and
``regions``, a list as that of ``ls --json``, each with ``changes_per_second``, ``leases_per_second`` (null: it is new,
or not to be seen), ``waiting`` (how many participants are) and ``slowest`` ({pid, seconds} or null); with a name
``name`` and ``participants``, a list as that of ``show --json``, each with ``leases_per_second`` and ``slowest``
({times, seconds} or null).

The exit status is 0; 1 where there is no such region, or it has ended before ``--count``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from pyshare import _core, _observer, _status, show
from pyshare._observer import duration, positive

NAME = "top"

REGIONS = (
    "NAME", ">SIZE", ">USED", ">PARTICIPANTS", "ENGINE", ">GENERATION", ">CHANGES/S", ">LEASES/S", ">LEASES",
    ">WAITING", "SLOWEST",
)  # fmt: skip
PARTICIPANTS = (
    "PID", "STATUS", "ENGINE", ">APPLIED", ">LEASES/S", ">LEASES", ">LOCKS", "WAITS FOR", "SLOWEST", "COMMAND",
)  # fmt: skip
WRAP = 1 << 32  # how many leases are counted


# -- Rates -----------------------------------------------------------------------------------------


class Rates:
    """Of counters that only grow, by whose they are."""

    def __init__(self) -> None:
        self._before: dict[Any, tuple[int, ...]] = {}
        self._looked = 0.0
        self.seconds: float | None = None  # between the latest two looks

    def look(self, now: dict[Any, tuple[int, ...]]) -> dict[Any, list[float]]:
        """A second, of those that were there at the look before, too."""
        looked = time.monotonic()
        self.seconds = looked - self._looked if self._looked else None
        found = {
            key: [(value - old) % WRAP / (self.seconds or 1) for value, old in zip(values, before, strict=True)]
            for key, values in now.items()
            if (before := self._before.get(key))
        }
        self._before, self._looked = now, looked
        return found


def rate(number: float | None) -> str:
    """For people."""
    return "-" if number is None else f"{number:,.0f}" if number >= 10 or not number else f"{number:.1f}"


class Regions:
    """A row for each region."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._since: dict[tuple[int, int], int] = {}

    def look(self) -> dict[str, Any]:
        """As --json has it."""
        found, _ = _status.regions(self._since)
        looks = [one.look for one in found if one.look]
        rates = self._rates.look({seen.file: (seen.generation, seen.leases_taken) for seen in looks})
        self._since = {seen.file: seen.generation for seen in looks}
        rows = [self._plain(one, rates) for one in found]
        return {"time": time.time(), "seconds": self._rates.seconds, "regions": rows}

    def _plain(self, one: _status.Found, rates: dict[Any, list[float]]) -> dict[str, Any]:
        seen = one.look
        changes, leases = rates.get(seen.file, [None, None]) if seen else (None, None)
        slowest = seen.slowest if seen else None
        return {
            **one.plain(),
            "changes_per_second": changes,
            "leases_per_second": leases,
            "waiting": seen and seen.waiting,
            "slowest": slowest and {"pid": slowest[0], "seconds": slowest[1]},
        }

    def table(self, look: dict[str, Any]) -> Table:
        """For people."""
        return _observer.table(REGIONS, map(self._row, look["regions"]))

    def _row(self, one: dict[str, Any]) -> list[str | Text]:
        if one["size"] is None:
            return [Text(one["label"], "dim"), *["-"] * (len(REGIONS) - 2), one["state"]]
        slowest = one["slowest"]
        return [
            Text(one["label"], "bold"),
            _observer.size(one["size"]),
            _observer.size(one["used"]),
            str(one["participants"]),
            one["engine"],
            str(one["generation"]),
            rate(one["changes_per_second"]),
            rate(one["leases_per_second"]),
            str(one["leases"]),
            str(one["waiting"]),
            f"{slowest['pid']} ({duration(slowest['seconds'])})" if slowest else "-",
        ]


class Participants:
    """A row for each participant of one region."""

    def __init__(self, name: str, observer: _core.Observer, fd: int) -> None:
        self._name = name
        self._observer = observer
        self._fd = fd
        self._rates = Rates()
        self._since = observer.generation()

    def look(self) -> dict[str, Any] | None:
        """As --json has it; None: the region has ended."""
        if _observer.ended(self._observer, self._name, self._fd):
            return None
        seen = _status.look(self._observer, self._fd, self._since)
        self._since = seen.generation
        rates = self._rates.look({(one.pid, one.slot): (one.leases_taken,) for one in seen.participants})
        rows = []
        for one in seen.participants:
            (leases,) = rates.get((one.pid, one.slot), [None])
            waited = seen.waited_for.get(one.pid)
            slowest = waited and {"times": waited[0], "seconds": waited[1]}
            rows.append({**dataclasses.asdict(one), "leases_per_second": leases, "slowest": slowest})
        return {"time": time.time(), "seconds": self._rates.seconds, "name": self._name, "participants": rows}

    def table(self, look: dict[str, Any]) -> Table:
        """For people."""
        return _observer.table(PARTICIPANTS, map(self._row, look["participants"]))

    def _row(self, one: dict[str, Any]) -> list[str | Text]:
        slowest = one["slowest"]
        return [
            str(one["pid"]),
            Text(one["status"], show.STYLES[one["status"]]),
            one["engine"],
            str(one["applied"]) + f" ({one['late']} late)" * (one["late"] > 0),
            rate(one["leases_per_second"]),
            str(one["leases"]),
            str(len(one["locks"])),
            f"{one['waits_for']} ({duration(one['waits_seconds'])})" if one["waits_for"] else "-",
            f"{slowest['times']} times, {duration(slowest['seconds'])}" if slowest else "-",
            _observer.short(one["command"]),
        ]


# -- The screen ------------------------------------------------------------------------------------


@contextlib.contextmanager
def keyboard() -> Iterator[int | None]:
    """A descriptor from which single keys can be read; None: there is no keyboard."""
    if not sys.stdin or not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def told_to_end(keys: int | None, seconds: float) -> bool:
    """After so many seconds at most: was it "q"?"""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([keys] if keys is not None else [], [], [], left)[0] and keys is not None:
            typed = os.read(keys, 64)
            if not typed or b"q" in typed.lower():
                return True
    return False


def form(
    subject: Regions | Participants, as_json: bool, stack: contextlib.ExitStack
) -> tuple[Callable[[dict[str, Any]], None], bool, int | None]:
    """(how a look is told, is that a screen, the keyboard or None); the terminal is put back with the stack."""
    console = _observer.console()
    if as_json:
        return lambda look: print(json.dumps(look), flush=True), False, None
    if not console.is_terminal:
        return lambda look: console.print(time.strftime("%H:%M:%S"), subject.table(look), sep="\n"), False, None
    keys = stack.enter_context(keyboard())
    screen = stack.enter_context(Live(console=console, auto_refresh=False))
    return lambda look: screen.update(subject.table(look), refresh=True), True, keys


def watch(subject: Regions | Participants, arguments: argparse.Namespace) -> int:
    """Until it is told to end; the exit status."""
    with contextlib.ExitStack() as stack:
        tell, is_screen, keys = form(subject, arguments.json, stack)
        look = subject.look()
        if look and is_screen:  # else the first one has rates
            tell(look)
        for shown in itertools.count(1):
            if told_to_end(keys, arguments.interval):
                return 0
            look = subject.look()
            if look is None:
                break
            tell(look)
            if shown == arguments.count:
                return 0
    print("pyshare top: the region has ended: its last participant is gone", file=sys.stderr)
    return 0 if arguments.count is None else 1


# -- The command -----------------------------------------------------------------------------------


def interval(text: str) -> float:
    """Seconds between looks."""
    number = float(text)
    if not 0.01 <= number <= 1e6:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``top``."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="of a region: show its participants")
    parser.add_argument("--interval", type=interval, default=1.0, metavar="S", help="seconds between two looks (1)")
    parser.add_argument("--count", type=positive, metavar="N", help="end after N")
    parser.add_argument("--json", action="store_true", help="print one object a line, for a program to read")


def run(arguments: argparse.Namespace) -> int:
    """Shows what goes on until "q", Ctrl-C, the count, or the region's end."""
    with contextlib.suppress(KeyboardInterrupt), _observer.to_who_listens():
        if arguments.name is None:
            return watch(Regions(), arguments)
        with _observer.observed(arguments.name, NAME) as (observer, fd):
            return watch(Participants(arguments.name, observer, fd), arguments)
    return 0
