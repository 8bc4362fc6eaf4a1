"""Measures how long a change of protection takes to reach everybody.

A contender is a way to get an mprotect into N other processes.  Every case
(how many participants, which pages, what they do meanwhile) starts a team of
processes for each contender, and times all of them in one loop, in an order
shuffled every round: whatever the machine does meanwhile, it does to all.

Lives here: the contenders, the cases, the statistics, the bounds and what is
printed.  Not here: the contenders that are C (ext/peers.c).
Invariants
 1. pyshare is reached by its public interface, and timed as a user pays it.
 2. The teams of the other contenders are asleep while one is timed.
 3. No process outlives the bench, however it ends: each is killed in a finally
    and, where there was no time for that, by the kernel (PR_SET_PDEATHSIG).
 4. No wait is unbounded: one alarm watches over all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import mmap
import multiprocessing
import os
import platform
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import pyshare
from pyshare import _peers

Buffer = mmap.mmap | pyshare.Region

NAME = "bench"
PAGE = mmap.PAGESIZE
MIB = 1 << 20
PARTICIPANTS = (1, 2, 4, 8, 16, 32, 64)
MOST = 256
CHANGES = {"revoke": int(pyshare.READ), "grant": int(pyshare.READ_WRITE)}
QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99, "max": 1.0}

WARM_UP = 3  # rounds that are not counted
LEAST = 10  # rounds that are, however long they take
PATIENCE = 30.0  # seconds that one change, or the start of one team, may take
QUIET = 200_000  # ns between two changes: the answers of the last one are over
UNDER_WAY = 0.002  # seconds for working threads to get on the CPUs


@dataclasses.dataclass(frozen=True)
class Limit:
    """A case ends after so many rounds or seconds, whichever comes first, but not before LEAST rounds."""

    rounds: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Case:
    """What is varied; participants are counted beside the caller, threads beside the listener."""

    participants: int = 8
    length: int = PAGE
    dirty: bool = True
    storing: bool = False
    threads: int = 1

    @property
    def size(self) -> int:
        """Of the memory: before and behind the range a page stays writable, as in a real buffer."""
        return PAGE + self.length + PAGE


# -- The contenders ------------------------------------------------------------------------------


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


class Contender:
    """A team of processes, and a way to change a protection in all of them."""

    name: ClassVar[str]
    listens: ClassVar[bool] = False  # the main thread of a participant waits for changes

    def __init__(self, case: Case) -> None:
        self.case = case
        self.participants = case.participants
        self.threads = case.threads
        self.storing = case.storing
        self.memory = self.map(case.size)
        self.board = _peers.Board(self.memory, PAGE, case.length, PAGE + case.length)
        self.pids: list[int] = []
        self.index = -1  # in a participant: which one

    def map(self, size: int) -> Buffer:
        """Memory that forked children share."""
        return mmap.mmap(-1, size)

    def start(self) -> None:
        """The team is there, and its pages are touched."""
        self.touch()
        told, tell = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # for ever in the children
        try:
            for index in range(self.participants):
                self.pids.append(fork(functools.partial(self.participate, index, tell)))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            for _ in self.pids:
                os.read(told, 1)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.close(told)
            os.close(tell)

    def close(self) -> None:
        """No process of the team is left."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        while self.pids:
            os.waitpid(self.pids[-1], 0)
            self.pids.pop()

    def touch(self) -> None:
        """Every page is in this process's page tables, dirty or clean; a change leaves it so."""
        with memoryview(self.memory) as view, view[::PAGE] as pages:
            if self.case.dirty:
                pages[:] = bytes(len(pages))
            else:
                bytes(pages)

    def participate(self, index: int, tell: int) -> None:
        """The life of a participant."""
        self.index = index
        self.touch()
        for thread in range(0 if self.listens else 1, self.threads):
            threading.Thread(target=self.work, args=[thread], daemon=True).start()
        os.write(tell, b".")
        self.listen()

    def work(self, thread: int) -> None:
        """The life of a working thread."""
        self.board.work(self.index * self.threads + thread)

    def listen(self) -> None:
        """The life of a participant's main thread."""
        self.work(0)

    def change(self, prot: int) -> int:
        """Everybody has the protection; returns how many ns that took."""
        raise NotImplementedError

    def timed_change(self, prot: int) -> int:
        """The same, from rest, or with the working threads at work."""
        if self.storing:
            self.board.set_storing(self.participants * self.threads)
            time.sleep(UNDER_WAY)
        end = time.perf_counter_ns() + QUIET
        while time.perf_counter_ns() < end:
            pass  # not asleep: the caller is to be as awake as a program at work
        elapsed = self.change(prot)
        self.board.set_storing(0)
        return elapsed


class OneThread(Contender):
    """Floor: mprotect in one process of one thread."""

    name = "1 thread"
    listens = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.cpus = sorted(os.sched_getaffinity(0))
        self.participants, self.threads, self.storing = 1, 0, False

    def listen(self) -> None:
        os.sched_setaffinity(0, self.cpus[:1])
        self.board.floor_serve(self.threads)

    def change(self, prot: int) -> int:
        return self.board.floor_change(prot)


class EveryCpu(OneThread):
    """Floor: the same with a thread running on every other CPU: the cost of shared page tables."""

    name = "all CPUs"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.threads, self.storing = len(self.cpus) - 1, True

    def work(self, thread: int) -> None:
        os.sched_setaffinity(0, [self.cpus[1 + thread]])
        super().work(thread)


class Signal(Contender):
    """A signal to every process; its handler calls mprotect and counts down.  All of it is C."""

    name = "signal"

    def start(self) -> None:
        super().start()
        self.board.signal_members(self.pids)

    def participate(self, index: int, tell: int) -> None:
        self.board.signal_listen()
        super().participate(index, tell)

    def change(self, prot: int) -> int:
        return self.board.signal_change(prot)


class Pipe(Contender):
    """A multiprocessing.Pipe to every process: the change there, None back."""

    name = "pipe"
    listens = True

    def start(self) -> None:
        self.ends = [multiprocessing.Pipe() for _ in range(self.participants)]
        super().start()

    def listen(self) -> None:
        end = self.ends[self.index][1]
        while True:
            _offset, _length, prot = end.recv()
            self.board.protect(prot)
            end.send(None)

    def change(self, prot: int) -> int:
        start = time.perf_counter_ns()
        for end, _ in self.ends:
            end.send((PAGE, self.case.length, prot))
        self.board.protect(prot)
        for end, _ in self.ends:
            end.recv()
        return time.perf_counter_ns() - start


class Condition(Contender):
    """A multiprocessing.Condition where all wait, and one where the last wakes the caller."""

    name = "condition"
    listens = True

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        lock = context.Lock()
        self.changed, self.finished = context.Condition(lock), context.Condition(lock)
        self.state = memoryview(mmap.mmap(-1, PAGE)).cast("q")  # generation, protection, missing
        super().start()

    def listen(self) -> None:
        seen = 0
        with self.changed:
            while True:
                while self.state[0] == seen:
                    self.changed.wait()
                seen = self.state[0]
                self.board.protect(self.state[1])
                self.state[2] -= 1
                if not self.state[2]:
                    self.finished.notify()

    def change(self, prot: int) -> int:
        start = time.perf_counter_ns()
        with self.changed:
            self.state[0] += 1
            self.state[1], self.state[2] = prot, self.participants
            self.changed.notify_all()
            self.board.protect(prot)
            while self.state[2]:
                self.finished.wait()
        return time.perf_counter_ns() - start


class Region(Contender):
    """pyshare: a region, and its mprotect."""

    name = "pyshare"

    def map(self, size: int) -> Buffer:
        self.region = pyshare.create(size=size)
        return self.region

    def close(self) -> None:
        super().close()
        self.region.close()

    def change(self, prot: int) -> int:
        start = time.perf_counter_ns()
        self.region.mprotect(PAGE, self.case.length, prot)
        return time.perf_counter_ns() - start


# pyshare last: what is forked while a region is open becomes a participant of it.
CONTENDERS: tuple[type[Contender], ...] = (EveryCpu, OneThread, Condition, Pipe, Signal, Region)
SHOWN = tuple(kind.name for kind in reversed(CONTENDERS))


# -- Measuring -----------------------------------------------------------------------------------

Figures = dict[str, float]  # quantiles, in microseconds, and how many rounds they are of
Results = dict[tuple[Case, str, str], Figures]  # by case, contender, change


def figures(times: list[int]) -> Figures:
    """From nanoseconds; a quantile is the least of the times that this part of them does not exceed."""
    ranked = sorted(times)
    quantiles = {name: ranked[math.ceil(part * len(ranked)) - 1] / 1000 for name, part in QUANTILES.items()}
    return quantiles | {"rounds": len(ranked)}


@contextlib.contextmanager
def alarm() -> Iterator[Callable[[], None]]:
    """TimeoutError in the main thread, when what this yields is not called for PATIENCE seconds."""

    def ring(_number: int, _frame: object) -> NoReturn:
        raise TimeoutError(f"a participant has not answered for {PATIENCE:.0f} s")

    def wind() -> None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield wind
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(case: Case, limit: Limit, tick: Callable[[float], None]) -> Results:
    """Every contender's times in one case, interleaved; tick is told how much of it is done."""
    times: dict[tuple[Case, str, str], list[int]] = {}
    order = random.Random(0)
    with contextlib.ExitStack() as stack:
        wind = stack.enter_context(alarm())
        teams = []
        for kind in CONTENDERS:
            wind()
            team = kind(case)
            stack.callback(team.close)
            team.start()
            teams.append(team)
        started = time.monotonic()
        for number in range(-WARM_UP, limit.rounds):
            # Revocations and grants alike come right after another contender's: on cold caches.
            for change, prot in CHANGES.items():
                for team in order.sample(teams, len(teams)):
                    wind()
                    elapsed = team.timed_change(prot)
                    if number >= 0:
                        times.setdefault((case, team.name, change), []).append(elapsed)
            spent = (time.monotonic() - started) / limit.seconds
            tick(min(1, max(spent, number / limit.rounds)))
            if spent > 1 and number + 1 >= LEAST:
                break
    return {key: figures(found) for key, found in times.items()}


# -- The cases -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One table: cases that differ in what `label` says."""

    title: str
    label: Callable[[Case], str]
    cases: list[Case]


def size_label(case: Case) -> str:
    """The length of the range, as people say it."""
    for unit, name in ((MIB, "MiB"), (1 << 10, "KiB")):
        if case.length > PAGE and case.length % unit == 0:
            return f"{case.length // unit} {name}"
    return "1 page"


def sweeps(participants: Sequence[int], quick: bool) -> list[Sweep]:
    """One over the participants, and from one point of it one along each other axis."""
    base = 8 if 8 in participants else max(participants)
    point = functools.partial(Case, participants=base)
    lengths = [PAGE, MIB] if quick else [PAGE, 16 * PAGE, MIB, 16 * MIB, 64 * MIB]
    threads = [1] if quick else [1, 4]
    return [
        Sweep(
            "N participants beside the caller, idle; 1 dirty page",
            lambda case: f"N = {case.participants}",
            [point(participants=count) for count in participants],
        ),
        Sweep(
            f"Length of the range, dirty pages; N = {base}, idle",
            size_label,
            [point(length=length) for length in lengths],
        ),
        Sweep(
            f"Length of the range, clean pages; N = {base}, idle",
            size_label,
            [point(length=length, dirty=False) for length in lengths],
        ),
        Sweep(
            f"Threads of each participant, idle or storing; N = {base}, 1 dirty page",
            lambda case: f"{'store' if case.storing else 'idle'} x{case.threads}",
            [point(storing=storing, threads=n) for storing in (False, True) for n in threads],
        ),
    ]


# -- The bounds ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bound:
    """pyshare's median is at most `limit` times the peer's, with so many participants, one page."""

    peer: str
    least: int
    most: float
    limit: float


BOUNDS = (
    Bound("signal", 1, 1, 1.3),
    Bound("signal", 8, 8, 1.0),
    Bound("signal", 32, math.inf, 1.1),
    Bound("pipe", 8, math.inf, 0.25),
    Bound("condition", 8, math.inf, 0.25),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a bound in one case."""

    peer: str
    participants: int
    limit: float
    ratios: dict[str, float]  # by change

    @property
    def met(self) -> bool:
        """The bound holds for both changes."""
        return max(self.ratios.values()) <= self.limit


def verdicts(results: Results) -> list[Verdict]:
    """Every bound in every case that it speaks of."""
    found = []
    for bound in BOUNDS:
        for case in dict.fromkeys(case for case, _, _ in results):
            if case == Case(case.participants) and bound.least <= case.participants <= bound.most:
                ratios = {
                    change: results[case, "pyshare", change]["p50"] / results[case, bound.peer, change]["p50"]
                    for change in CHANGES
                }
                found.append(Verdict(bound.peer, case.participants, bound.limit, ratios))
    return found


# -- What is printed and written -----------------------------------------------------------------


def microseconds(value: float) -> str:
    """At most six characters."""
    if value < 100:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 99_999.5 else f"{value / 1000:,.0f}k"


def sweep_table(sweep: Sweep, results: Results) -> Table:
    """The times of one sweep."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("")
    table.add_column("\nµs")
    for change in CHANGES:
        for quantile in QUANTILES:
            table.add_column(f"{change if quantile == 'p50' else ''}\n{quantile}", justify="right", min_width=6)
    for case in sweep.cases:
        for contender in SHOWN:
            first, last = contender == SHOWN[0], contender == SHOWN[-1]
            table.add_row(
                sweep.label(case) if first else "",
                contender,
                *(microseconds(results[case, contender, change][name]) for change in CHANGES for name in QUANTILES),
                style="bold" if first else "",
                end_section=last,
            )
    return table


def bounds_table(found: Sequence[Verdict]) -> Table:
    """The bounds, and whether they were met."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("peer")
    for heading in ("N", "at most", *CHANGES):
        table.add_column(heading, justify="right", min_width=12 if heading in CHANGES else 4)
    for one in found:
        words = (
            f"{ratio:.2f} {'[green]ok[/]' if ratio <= one.limit else '[red]missed[/]'}" for ratio in one.ratios.values()
        )
        table.add_row(one.peer, str(one.participants), f"{one.limit:.2f}", *words)
    return table


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pyshare": pyshare.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def report(about: dict[str, str | int], results: Results) -> dict[str, Any]:
    """Everything, for a program to read."""
    return {
        "machine": about,
        "unit": "microseconds",
        "results": [
            dataclasses.asdict(case) | {"contender": contender, "change": change} | found
            for (case, contender, change), found in results.items()
        ],
        "bounds": [dataclasses.asdict(one) | {"met": one.met} for one in verdicts(results)],
    }


def plot(path: str, title: str, shown: Sequence[Sweep], results: Results) -> None:
    """Medians over the participants and over the length of the range are drawn in a file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    values: tuple[Callable[[Case], float], ...] = (lambda c: c.participants, lambda c: c.length)
    for panel, sweep, value in zip(panels, shown, values, strict=False):
        for number, contender in enumerate(SHOWN):
            for change, line in zip(CHANGES, ("-", "--"), strict=True):
                panel.loglog(
                    [value(case) for case in sweep.cases],
                    [results[case, contender, change]["p50"] for case in sweep.cases],
                    line,
                    marker="o",
                    color=f"C{number}",
                    label=contender if line == "-" else None,
                )
        panel.set(xlabel=sweep.title, xticks=[value(case) for case in sweep.cases])
        panel.set_xticklabels([sweep.label(case) for case in sweep.cases], minor=False)
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("median, µs (solid: revoke, dashed: grant)")
    panels[0].legend()
    figure.suptitle(title)
    figure.savefig(path)


# -- The command ---------------------------------------------------------------------------------


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    option = parser.add_argument
    option("--quick", action="store_true", help="fewer cases and rounds: seconds, not minutes")
    option("--participants", metavar="N,...", type=counts, help="how many, beside the caller")
    option("--rounds", metavar="N", type=positive, help="how often every change is measured")
    option("--json", metavar="FILE", help="write every figure, and the machine, to FILE")
    option("--plot", metavar="FILE.png", help="draw the medians (needs matplotlib)")


def measure_all(cases: Sequence[Case], limit: Limit, console: Console) -> Results:
    """All cases, under a progress bar that is drawn between rounds: it needs no thread."""
    results: Results = {}
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
        task = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases):
            about = f"{case.participants} participants, {size_label(case)}"

            def tick(part: float, done: int = number, about: str = about) -> None:
                progress.update(task, completed=done + part, description=about, refresh=True)

            results |= measure(case, limit, tick)
    return results


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes; returns the exit status."""
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        print(
            "pyshare bench: --plot needs matplotlib: say pip install 'pyshare[plot]'",
            file=sys.stderr,
        )
        return 1
    # We fork while the agent runs, on purpose; the children touch nothing that it may hold.
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
    limit = Limit(40, 1.5) if arguments.quick else Limit(300, 8)
    if arguments.rounds:
        limit = dataclasses.replace(limit, rounds=arguments.rounds)
    shown = sweeps(arguments.participants or PARTICIPANTS, arguments.quick)
    cases = list(dict.fromkeys(case for sweep in shown for case in sweep.cases))
    console = Console(highlight=False)
    about = machine()
    title = "pyshare {pyshare} on {cpu}, {cpus} CPUs, Linux {kernel}, Python {python}".format_map(about)
    try:
        results = measure_all(cases, limit, console)
        for sweep in shown:
            console.print(f"[bold]{sweep.title}[/]", sweep_table(sweep, results), sep="\n")
        console.print("[bold]Median of pyshare over median of the peer, 1 page[/]")
        console.print(bounds_table(verdicts(results)), title, sep="\n")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(report(about, results), indent=1) + "\n")
        if arguments.plot:
            plot(arguments.plot, title, shown, results)
    except (OSError, pyshare.ShareError) as error:
        print(f"pyshare bench: {error}", file=sys.stderr)
        return 1
    return 0
