"""Each change of a region's protection, as it happens: what, who, how long, and who was slowest.

Lives here: following the ring of changes without taking part in the region,
and its two forms, lines for people and JSON lines for programs.
Not here: how a change is made (ext/change/change.c), what an observer reads (ext/operations/observe.c).

A change is told when it is over: everybody has it, or the caller has given up on who is silent.  "slowest" is the
participant that the caller waited for last; "-" if it had to wait for nobody.  A region keeps its latest 1,024 changes;
who changes faster than they can be told overtakes the trace, which then says how many it missed.

``--json`` prints one object a line, by ``event``:

- "change": ``generation``, ``kind`` ("set"; "refused": a participant could not apply it, and "undone" comes next;
  "thawed": a freeze ended; "follow": page tables alone, for a snapshot), ``offset``, ``length`` (bytes), ``protection``
  (bits), ``pid`` and ``command`` of who made it, ``time`` (seconds since 1970) at which it began, ``seconds`` that it
  took (null: unknown), ``slowest`` (pid or null) and ``slowest_command``, ``over`` (false: the trace ended before it).
- "missed": ``changes``, how many.
- "ended": ``why``: "count", "timeout" or "region" (its last participant is gone).

The exit status is 0 for what was asked: ``--count`` changes, or, without it, all until the time was up or the region
ended; 1 where there is no such region, or fewer changes than ``--count``; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator

from rich.text import Text

from pyshare import _core, _observer
from pyshare._observer import positive

NAME = "trace"

BUSY, IDLE = 1_000_000, 20_000_000  # ns between looks, in the second after a change and later
TICK = 100_000_000  # ns after which it is looked who is there
SECOND = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Change:
    """One, as the ring has it."""

    generation: int
    kind: str
    offset: int
    length: int
    protection: int
    pid: int
    command: str
    time: float
    seconds: float | None
    slowest: int | None
    slowest_command: str | None
    over: bool


class Directory:
    """The command lines of who takes part, also of who did a moment ago."""

    def __init__(self, observer: _core.Observer) -> None:
        self._observer = observer
        self._commands: dict[int, tuple[int, str]] = {}  # by pid: which participant, and its command line

    def look(self) -> None:
        """Who is new?"""
        for slot in _observer.slots(self._observer):
            known = self._commands.get(slot.pid)
            if slot.alive and (known is None or known[0] != slot.owner):
                self._commands[slot.pid] = (slot.owner, slot.command())

    def command(self, pid: int) -> str:
        """Its command line, or why there is none."""
        if pid not in self._commands:
            self.look()
        return self._commands.get(pid, (0, "(gone)"))[1]


class Trace:
    """Follows the changes from one generation on."""

    def __init__(self, observer: _core.Observer, since: int) -> None:
        self._observer = observer
        self._next = since + 1
        self.directory = Directory(observer)
        self.directory.look()

    def new(self) -> Iterator[Change | int]:
        """Changes that are over by now; a number: so many were missed."""
        missed, latest = 0, self._observer.generation()
        if latest - self._next >= _core.RING:
            missed, self._next = latest - _core.RING + 1 - self._next, latest - _core.RING + 1
        while self._next <= latest:
            change = self._look(self._next, latest)
            if change is not None and not change.over:
                break
            self._next += 1
            if change is None:
                missed += 1
                continue
            if missed:
                yield missed
                missed = 0
            yield change
        if missed:
            yield missed

    def unfinished(self) -> Change | None:
        """The one that is not over."""
        latest = self._observer.generation()
        return self._look(self._next, latest) if self._next == latest else None

    def _look(self, generation: int, latest: int) -> Change | None:
        open_ = self._observer.under_way() is not None  # before the entry, whose end is written before this one's
        entry = self._observer.change(generation)
        if entry is None:
            return None
        kind, first, count, prot, author, begun, done, slowest = entry
        told = _core.KINDS.get(kind, f"kind {kind}")
        following = self._observer.change(generation + 1) if not done and generation < latest else None
        if told == "set" and following and _core.KINDS.get(following[0]) == "undone":
            told = "refused"
        offset, length = _observer.in_bytes(self._observer, first, count)
        return Change(
            generation=generation,
            kind=told,
            offset=offset,
            length=length,
            protection=prot,
            pid=author,
            command=self.directory.command(author),
            time=time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - begun) / SECOND,
            seconds=(done - begun) / SECOND if done >= begun else None,
            slowest=slowest or None,
            slowest_command=self.directory.command(slowest) if slowest else None,
            over=bool(done) or generation < latest or not open_,
        )


def follow(name: str, observer: _core.Observer, fd: int, trace: Trace, deadline: int) -> Iterator[Change | int | str]:
    """What is new, for ever; at last "timeout" or "region"."""
    told = ticked = time.monotonic_ns()
    while True:
        over = time.monotonic_ns() >= deadline
        latest = observer.generation()
        for one in trace.new():
            told = time.monotonic_ns()
            yield one
        now = time.monotonic_ns()
        if over:
            yield "timeout"
        if now >= ticked + TICK:
            ticked = now
            trace.directory.look()
            if _observer.ended(observer, name, fd):
                yield from trace.new()
                yield "region"
        observer.wait(latest, min(now + (BUSY if now < told + SECOND else IDLE), deadline))


# -- Told ------------------------------------------------------------------------------------------


WHAT = {"undone": "undone", "thawed": "thawed", "follow": "(snapshot)"}
HEAD = "change  began            offset    length  protection     took  by      slowest"


def line(change: Change) -> Text:
    """For people, 80 columns and who did it."""
    when = time.strftime("%H:%M:%S", time.localtime(change.time)) + f".{int(change.time % 1 * 1000):03d}"
    what = WHAT.get(change.kind) or _observer.protection(change.protection)
    style = _observer.colour(change.protection)[0] if change.kind in ("set", "refused") else "cyan"
    text = Text(f"{change.generation:>6}  {when} {change.offset:>10} {change.length:>9}  ")
    text.append(what, style="bold red" if change.kind == "undone" else style)
    text.append(" refused", style="bold red") if change.kind == "refused" else text.append(" " * (11 - len(what)))
    text.append(
        f" {_observer.duration(change.seconds):>7}" if change.over else f" {'open':>7}",
        style="" if change.over else "yellow",
    )
    return text.append(f"  {change.pid:<7} {change.slowest or '-':<7} {change.command}")


ENDS = {
    "count": "",
    "timeout": "the time is up",
    "region": "the region has ended: its last participant is gone",
}


class Lines:
    """Says it to people."""

    def __init__(self) -> None:
        self._console = _observer.Listened(highlight=False)

    def _print(self, text: Text) -> None:
        terminal = self._console.is_terminal
        self._console.print(text, no_wrap=True, overflow="ellipsis" if terminal else "ignore", crop=terminal)

    def begin(self, observer: _core.Observer) -> None:
        """What is traced."""
        there = _observer.taking_part(_observer.slots(observer))
        self._print(Text(_observer.title(observer, there, observer.generation()), "bold"))
        self._print(Text(HEAD, "dim"))

    def change(self, change: Change) -> None:
        """It was made."""
        self._print(line(change))

    def missed(self, number: int) -> None:
        """So many were made, too fast."""
        changes = f"{number:,} change{'s' * (number != 1)} missed"
        self._print(Text(f"          {changes}: the region keeps its latest {_core.RING:,}", "yellow"))

    def end(self, why: str) -> None:
        """That was it."""
        if ENDS[why]:
            self._print(Text(ENDS[why], "bold"))


class Objects:
    """Says it to programs."""

    def _print(self, event: str, **values: object) -> None:
        print(json.dumps({"event": event, **values}), flush=True)

    def begin(self, observer: _core.Observer) -> None:
        """Nothing that the events do not say."""

    def change(self, change: Change) -> None:
        """It was made."""
        self._print("change", **dataclasses.asdict(change))

    def missed(self, number: int) -> None:
        """So many were made, too fast."""
        self._print("missed", changes=number)

    def end(self, why: str) -> None:
        """That was it."""
        self._print("ended", why=why)


# -- The command -----------------------------------------------------------------------------------


def generation(text: str) -> int:
    """The number of a change, 0 for the creation."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def seconds(text: str) -> float:
    """A time."""
    number = float(text)
    if not 0 <= number <= 1e9:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``trace``."""
    parser.add_argument("name", metavar="NAME", help="of the region")
    parser.add_argument("--json", action="store_true", help="print one object a line, for a program to read")
    parser.add_argument("--count", type=positive, metavar="N", help="end after N changes")
    parser.add_argument("--since", type=generation, metavar="G", help="begin with the change after change G")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="end after S seconds")


def tell(arguments: argparse.Namespace, observer: _core.Observer, fd: int) -> int:
    """Until it ends; the exit status."""
    output = Objects() if arguments.json else Lines()
    limit = None if arguments.timeout is None else int(arguments.timeout * SECOND)
    deadline = (1 << 63) - 1 if limit is None else time.monotonic_ns() + limit
    trace = Trace(observer, observer.generation() if arguments.since is None else arguments.since)
    output.begin(observer)
    told = 0
    for one in follow(arguments.name, observer, fd, trace, deadline):
        if isinstance(one, str):
            last = trace.unfinished()
            if last is not None:
                output.change(last)
            output.end(one)
            break
        if isinstance(one, int):
            output.missed(one)
            continue
        output.change(one)
        told += 1
        if told == arguments.count:
            output.end("count")
            break
    return 0 if arguments.count is None or told == arguments.count else 1


def run(arguments: argparse.Namespace) -> int:
    """Traces until the count, the time, the region's end, or Ctrl-C."""
    with _observer.observed(arguments.name, NAME) as (observer, fd), _observer.to_who_listens():
        return tell(arguments, observer, fd)
    return 0
