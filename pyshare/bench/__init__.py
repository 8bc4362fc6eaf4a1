"""Measures what changes, leases and locks cost, beside what they would cost otherwise.

A contender is a way to get something done: pyshare's, a peer's, or a floor
that nobody can beat.  All contenders of a case are measured in one loop.

Lives here: the command.  measure.py says how it is measured, teams.py,
sections.py, cycles.py, snapshots.py, costs.py and demo.py what, bounds.py what
pyshare is held to, report.py how it is shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

import pyshare
from pyshare.bench import costs, cycles, demo, sections, snapshots
from pyshare.bench.bounds import verdicts
from pyshare.bench.measure import Limit, Results
from pyshare.bench.report import bounds_table, machine, plot, report, sweep_table
from pyshare.bench.sections import Section

NAME = "bench"
MOST = 256  # participants
STDOUT = "-"
SECTIONS = ("change", "lease", "lock", "snapshot", "sparse", "memory", "demo")


def counts(text: str) -> list[int]:
    """Numbers of participants, from the command line."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if not 1 <= found[0] <= found[-1] <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers from 1 to {MOST} with commas between, as 1,8,64")
    return found


def positive(text: str) -> int:
    """A number of rounds, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def section_name(text: str) -> str:
    """A section, from the command line."""
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(SECTIONS)}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    option = parser.add_argument
    option("sections", metavar="SECTION", nargs="*", type=section_name, help=f"{', '.join(SECTIONS)} (all)")
    option("--quick", action="store_true", help="fewer cases and rounds: seconds, not minutes")
    option("--participants", metavar="N,...", type=counts, help="how many, beside the caller")
    option("--rounds", metavar="N", type=positive, help="how often everything is measured")
    option(
        "--json",
        metavar="FILE",
        nargs="?",
        const=STDOUT,
        help="write every figure, and the machine, to FILE; without one print them, and the tables on stderr",
    )
    option("--plot", metavar="FILE.png", help="draw the medians of the changes (needs matplotlib)")


def chosen(arguments: argparse.Namespace) -> list[Section]:
    """The sections that were asked for, in order."""

    def limit(rounds: int, seconds: float) -> Limit:
        return Limit(arguments.rounds or rounds, seconds)

    quick, participants = arguments.quick, arguments.participants
    in_cycles = participants or cycles.PARTICIPANTS
    made: dict[str, Callable[[], Section]] = {
        "change": lambda: sections.change(
            participants or sections.PARTICIPANTS, quick, limit(40, 0.8) if quick else limit(300, 4)
        ),
        "lease": lambda: cycles.lease(in_cycles, limit(300, 3) if quick else limit(2000, 20)),
        "lock": lambda: cycles.lock(in_cycles, limit(300, 2) if quick else limit(2000, 12)),
        "snapshot": lambda: snapshots.snapshot(
            participants or snapshots.PARTICIPANTS, quick, limit(20, 0.8) if quick else limit(60, 8)
        ),
        "sparse": lambda: costs.sparse(limit(100, 3) if quick else limit(1000, 12)),
        "memory": costs.memory,
        "demo": lambda: demo.demo(limit(10, 4) if quick else limit(60, 24)),
    }
    return [made[name]() for name in SECTIONS if name in (arguments.sections or SECTIONS)]


def measure_all(asked: Sequence[Section], console: Console) -> Results:
    """All sections, under a progress bar that is drawn between rounds: it needs no thread."""
    results: Results = {}
    steps = [step for section in asked for step in section.steps]
    with Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(steps))
        for number, (about, step) in enumerate(steps):

            def tick(part: float, done: int = number, about: str = about) -> None:
                progress.update(task, completed=done + part, description=about, refresh=True)

            tick(0)
            results |= step(tick)
    return results


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes; returns the exit status."""
    if arguments.plot and "change" not in (arguments.sections or SECTIONS):
        print("pyshare bench: --plot draws section 'change': measure it, too", file=sys.stderr)
        return 1
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        print(
            "pyshare bench: --plot needs matplotlib: say pip install 'pyshare[plot]'",
            file=sys.stderr,
        )
        return 1
    if arguments.json in SECTIONS:  # a section that follows --json is one
        arguments.sections, arguments.json = [*arguments.sections, arguments.json], STDOUT
    # We fork while the agent runs, on purpose; the children touch nothing that it may hold.
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
    asked = chosen(arguments)
    console = Console(highlight=False, stderr=arguments.json == STDOUT)
    about = machine()
    title = "pyshare {pyshare} on {cpu}, {cpus} CPUs, Linux {kernel}, Python {python}".format_map(about)
    try:
        results = measure_all(asked, console)
        for section in asked:
            for sweep in section.sweeps:
                console.print(f"[bold]{sweep.title}[/]", sweep_table(sweep, results), sep="\n")
            if section.note:
                console.print(section.note + "\n")
        found = verdicts(results)
        if found:
            console.print("[bold]Bounds: medians of pyshare beside those of a peer or a floor[/]")
            console.print(bounds_table(found))
        for reason in sections.missing():
            console.print(f"Not measured, for want of it: {reason}")
        console.print(title)
        if arguments.json:
            text = json.dumps(report(about, results, found), indent=1) + "\n"
            sys.stdout.write(text) if arguments.json == STDOUT else Path(arguments.json).write_text(text)
        if arguments.plot:
            shown = [sweep for section in asked if section.name == "change" for sweep in section.sweeps]
            plot(arguments.plot, title, shown, results)
    except (OSError, pyshare.ShareError) as error:
        print(f"pyshare bench: {error}", file=sys.stderr)
        return 1
    return 0
