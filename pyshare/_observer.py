"""A region as somebody sees it who does not take part in it: what the commands that look have in common.

Lives here: the way from a name to an observer, who its participants are, and
the words, colours and tables in which these commands speak.
Not here: what is in a control segment (ext/operations/observe.c), page tables (map.py), how everybody is (_status.py).
Invariant: a look changes nothing, and nobody waits for who looks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyshare import _core, _names
from pyshare._errors import ShareError
from pyshare._mapped import Prot

PAGE = _core.PAGE_SIZE
COLOURS = {  # of a protection: for text, and for a picture
    "NONE": ("white on grey35", "#9aa0a6"),
    "READ": ("black on sky_blue1", "#9ecae9"),
    "READ_WRITE": ("black on dark_sea_green3", "#7cc48f"),
    "EXEC": ("black on plum2", "#d7b5e8"),
}


class Slot(NamedTuple):
    """A participant, as its slot says."""

    owner: int  # its name in lease words and the freeze
    pid: int  # as it sees itself
    start: int  # of the process, in clock ticks of the machine, give or take one; 0: unknown
    applied: int  # the change that its page tables follow
    data: int  # where it says to have the data
    live: bool  # it has joined
    alive: bool  # its memory is still there
    here: bool  # its pid is one of our pid namespace
    uffd: bool
    fenced: bool
    leases: int  # that it has
    leased_since: int  # ... some of them, without a break: CLOCK_MONOTONIC ns
    waits_for: int  # whom one of its threads sleeps for, as `owner`; 0: nobody
    waits_since: int  # CLOCK_MONOTONIC ns
    takes: int  # leases taken, by whoever had this slot

    def process(self) -> psutil.Process | None:
        """Its process; None where that is gone, or cannot be seen from here."""
        with contextlib.suppress(psutil.Error):
            if self.here and self.start and abs(_core.start_time(self.pid) - self.start) <= 1:
                return psutil.Process(self.pid)
        return None

    def command(self) -> str:
        """Its command line, or why there is none."""
        if not self.here:
            return "(in another pid namespace)"
        process = self.process()
        with contextlib.suppress(psutil.Error):
            if process is not None:
                return printable(" ".join(process.cmdline()) or f"[{process.name()}]")
        return "(not in /proc)" if self.alive else "(gone)"


def slots(observer: _core.Observer) -> list[Slot]:
    """Everybody who takes part, or is about to."""
    return [Slot(*one) for one in observer.slots()]


def taking_part(found: Iterable[Slot]) -> int:
    """How many do."""
    return sum(slot.live and slot.alive for slot in found)


def printable(text: str) -> str:
    """Nothing that a terminal takes for an order."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def short(command: str) -> str:
    """The name of what runs, for a narrow column."""
    words = command.split(" ")
    program = os.path.basename(words[0])
    script = next((word for word in words[1:] if not word.startswith("-")), "") if program.startswith("python") else ""
    return os.path.basename(script) or program if not command.startswith("(") else command


def protection(bits: int) -> str:
    """In words."""
    rest = Prot.READ_WRITE if bits & 3 == 3 else Prot(bits & 3)
    return "|".join(str(part.name) for part in (rest, Prot(bits & 4)) if part) or "NONE"


def colour(bits: int) -> tuple[str, str]:
    """Of a protection: for text, and for a picture."""
    return COLOURS["EXEC" if bits & 4 else "READ_WRITE" if bits & 2 else "READ" if bits & 1 else "NONE"]


def positive(text: str) -> int:
    """A number of things, of a command line."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def in_bytes(observer: _core.Observer, first: int, count: int) -> tuple[int, int]:
    """(offset, length), the last page as far as it goes."""
    return first * PAGE, min(count * PAGE, observer.size() - first * PAGE)


def size(number: int) -> str:
    """Bytes, for people."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << shift:
            return f"{number / (1 << shift):.4g} {unit}"
    return f"{number} bytes"


def duration(seconds: float | None) -> str:
    """In three digits and a unit, for people."""
    if seconds is None:
        return "?"
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def counted(number: int, one: str, many: str | None = None) -> str:
    """So many of them."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def title(observer: _core.Observer, taking_part: int, generation: int) -> str:
    """What is looked at, in a line."""
    return (
        f"region {observer.name()!r}: {counted(observer.pages(), 'page')}, {size(observer.size())}; "
        f"{counted(taking_part, 'participant')}; change {generation}"
    )


def observe(name: str, patience: float = 1.0) -> tuple[_core.Observer, int]:
    """An observer, and a descriptor of the same memory, read-only; ShareError, OSError, ValueError as ``attach``.

    A stale name stays where it is.
    """
    deadline = time.monotonic_ns() + int(patience * 1e9)
    with _names.found(_names.check(name), deadline, keep=True) as (fd, _):
        return _core.Observer(fd), os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def observed(name: str, command: str) -> Iterator[tuple[_core.Observer, int]]:
    """The same for a command: where there is nothing to see it says why and exits with 1."""
    try:
        observer, fd = observe(name)
    except (ShareError, OSError, ValueError) as error:
        print(f"pyshare {command}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        sys.exit(1)
    try:
        yield observer, fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def to_who_listens() -> Iterator[None]:
    """What is written goes nowhere from the moment on at which its reader has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Listened(Console):
    """A console that leaves a reader who has gone to who uses it; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Raises what it came from."""
        raise


def console() -> Listened:
    """For tables: where it is no terminal, nothing is cut off."""
    listened = Listened(highlight=False)
    if not listened.is_terminal and "COLUMNS" not in os.environ:
        listened.width = 1000
    return listened


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Columns whose heading begins with '>' are of numbers."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in columns:
        grid.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left")
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def ended(observer: _core.Observer, name: str, fd: int) -> bool:
    """Nobody takes part any more, nor is a forked child about to."""
    if any(slot.alive for slot in slots(observer)):
        return False
    with _names.of_region(name, fd, keep=True) as entry:
        return entry < 0
