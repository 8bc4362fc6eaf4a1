"""A pool of worker processes that compute in one shared array, and one of them has a bug: it stores a row too far.

The array is READ for everybody; a worker leases the rows of its task, so that it alone may write them, and computes
there in place, with plain numpy. The careless one, in one task, goes a row beyond its rows, into a page that is the
next worker's. With a region of the policy "raise" that store is a ProtectionError, in the worker that did it, with the
line that did it; the row is untouched, the worker tells of it, does the task again as it should be, and goes on. At the
end all rows are compared with what a single process computes.

Run it: ``python examples/worker_pool.py --workers 4``; exit code 0 if the one bug was found and all results are right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console

import pyshare

Array = npt.NDArray[np.float64]

COLUMNS: Final = 512  # of float64: a row is a page
ROW: Final = COLUMNS * 8
ROWS_PER_TASK: Final = 64


@dataclasses.dataclass
class Task:
    number: int
    careless: bool = False  # with the bug

    @property
    def rows(self) -> slice:
        return slice(self.number * ROWS_PER_TASK, (self.number + 1) * ROWS_PER_TASK)


@dataclasses.dataclass
class News:
    """What a worker tells: that a task is done, or what went wrong in it."""

    pid: int
    task: int
    error: str | None = None
    file: str | None = None
    line: int | None = None
    row: int | None = None


# -- The computation: it knows nothing of processes --------------------------------------------------------------------


def measure(number: int) -> Array:
    """The input of a task: a noisy signal in each row."""
    random = np.random.default_rng(number)
    time = np.linspace(0, 20, COLUMNS)
    return np.sin(time * random.uniform(1, 5, (ROWS_PER_TASK, 1))) + random.normal(0, 0.3, (ROWS_PER_TASK, COLUMNS))


def clean(signal: Array, target: Array) -> None:
    """Without the high frequencies, in `target`."""
    spectrum = np.fft.rfft(signal, axis=1)
    spectrum[:, COLUMNS // 16 :] = 0
    np.copyto(target, np.fft.irfft(spectrum, COLUMNS, axis=1))


def normalise(target: Array) -> None:
    """Each row has mean 0 and deviation 1."""
    target -= target.mean(axis=1, keepdims=True)
    target /= target.std(axis=1, keepdims=True)


def expected(tasks: int) -> Array:
    result = np.empty((tasks * ROWS_PER_TASK, COLUMNS))
    for task in map(Task, range(tasks)):
        clean(measure(task.number), result[task.rows])
        normalise(result[task.rows])
    return result


# -- A worker ----------------------------------------------------------------------------------------------------------


def shared_rows(region: pyshare.Region) -> Array:
    return np.frombuffer(memoryview(region), dtype=np.float64).reshape(-1, COLUMNS)


def compute(region: pyshare.Region, task: Task) -> None:
    """The rows of the task are computed; they alone are writable meanwhile, and here alone."""
    rows, everything = task.rows, shared_rows(region)
    with region.lease(rows.start * ROW, ROWS_PER_TASK * ROW):
        clean(measure(task.number), everything[rows])
        if task.careless:
            everything[rows.start : rows.stop + 1] *= 1.0  # the bug: slices end before their end, not at it
        normalise(everything[rows])


def work(region: pyshare.Region, tasks: list[Task], news: Connection) -> None:
    with region, news:
        for task in tasks:
            try:
                compute(region, task)
            except pyshare.ProtectionError as error:
                row = error.offset // ROW
                news.send(News(os.getpid(), task.number, str(error), error.file, error.line, row))
                compute(region, dataclasses.replace(task, careless=False))
            news.send(News(os.getpid(), task.number))


# -- The pool ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    workers: dict[int, int]  # pid: exit code
    done: dict[int, int]  # task: pid
    strays: list[News]
    right: bool  # all rows are what they should be


def listen(pipes: list[Connection]) -> Iterator[News]:
    """All that workers say, until each has ended."""
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                yield pipe.recv()
            except EOFError:
                pipes.remove(pipe)
                pipe.close()


def run(workers: int, count: int, careless: int | None) -> Outcome:
    """So many tasks, dealt out to the workers in turn; task `careless` with the bug."""
    context = multiprocessing.get_context("spawn")
    tasks = [Task(number, careless=number == careless) for number in range(count)]
    crew, pipes = [], []
    with pyshare.create(size=count * ROWS_PER_TASK * ROW, prot=pyshare.READ, on_violation="raise") as region:
        for first in range(workers):
            receive, send = context.Pipe(duplex=False)
            crew.append(context.Process(target=work, args=(region, tasks[first::workers], send)))
            crew[-1].start()
            send.close()
            pipes.append(receive)
        news = list(listen(pipes))
        for worker in crew:
            worker.join()
        right = np.array_equal(shared_rows(region), expected(count))
    return Outcome(
        workers={worker.pid or 0: worker.exitcode or 0 for worker in crew},
        done={one.task: one.pid for one in news if one.error is None},
        strays=[one for one in news if one.error is not None],
        right=right,
    )


def report(console: Console, outcome: Outcome) -> None:
    for pid, code in outcome.workers.items():
        count = sum(done == pid for done in outcome.done.values())
        console.print(f"worker {pid}: {count} tasks, exit code {code}")
    for stray in outcome.strays:
        console.print(f"worker {stray.pid} in task {stray.task}, row {stray.row}: {stray.error}", soft_wrap=True)
    console.print("all results are right" if outcome.right else "[red]results are wrong")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--workers", type=int, default=4, help="processes")
    parser.add_argument("--tasks", type=int, default=48, help="of 64 rows each")
    parser.add_argument("--careless", type=int, default=7, help="the task with the bug; -1 for none, nor the last one")
    parser.add_argument("--json", metavar="FILE", help="where to write what happened, too")
    options = parser.parse_args()
    if options.workers < 1 or options.tasks < 1 or not -1 <= options.careless < options.tasks - 1:
        parser.error("at least one worker and one task, and the careless one has to have a task behind it")
    return options


def main() -> int:
    options = parse_options()
    outcome = run(options.workers, options.tasks, None if options.careless < 0 else options.careless)
    report(Console(), outcome)
    if options.json:
        figures: dict[str, Any] = dataclasses.asdict(outcome)
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    found = [stray.task for stray in outcome.strays] == ([] if options.careless < 0 else [options.careless])
    return 0 if outcome.right and found and not any(outcome.workers.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
