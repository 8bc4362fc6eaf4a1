"""What the bench prints and writes.

Lives here: tables, JSON, the plot.  Not here: anything that is measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import pyshare
from pyshare.bench.bounds import Verdict
from pyshare.bench.measure import Case, Results
from pyshare.bench.sections import Sweep
from pyshare.bench.teams import CHANGES


def short(value: float) -> str:
    """At most six characters."""
    if value < 10:
        return f"{value:.2f}"
    if value < 100:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 99_999.5 else f"{value / 1000:,.0f}k"


def sweep_table(sweep: Sweep, results: Results) -> Table:
    """The figures of one sweep; what was not measured is left out."""

    def measured(case: Case) -> list[str]:
        return [name for name in sweep.contenders if any((case, name, one) in results for one in sweep.measures)]

    shown = [(case, measured(case)) for case in sweep.cases]
    units = {
        results[key].unit
        for case, names in shown
        for name in names
        for measure in sweep.measures
        if (key := (case, name, measure)) in results
    }
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    table.add_column("\n" + ", ".join(sorted(units)), no_wrap=True)
    for measure in sweep.measures:
        for quantile in sweep.quantiles:
            heading = measure if quantile == sweep.quantiles[0] else ""
            table.add_column(f"{heading}\n{quantile}", justify="right", min_width=6, no_wrap=True)
    for case, names in shown:
        for name in names:
            found = [results.get((case, name, measure)) for measure in sweep.measures]
            table.add_row(
                sweep.label(case) if name == names[0] else "",
                name,
                *(short(getattr(one, quantile)) if one else "" for one in found for quantile in sweep.quantiles),
                style="bold" if name == sweep.contenders[0] else "",
                end_section=name == names[-1],
            )
    return table


def bounds_table(found: Sequence[Verdict]) -> Table:
    """The bounds, beside what they are measured against, and whether they were met."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("bound", no_wrap=True)
    table.add_column("pyshare", justify="right")
    table.add_column("beside", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("ratio", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("")
    for one in found:
        table.add_row(
            one.bound,
            short(one.ours),
            short(one.theirs),
            " " + one.peer,
            short(one.ratio),
            f"{'≥' if one.at_least else '≤'} {one.limit:g}",
            " [green]met[/]" if one.met else " [red]missed[/]",
        )
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


def report(about: dict[str, str | int], results: Results, found: Sequence[Verdict]) -> dict[str, Any]:
    """Everything, for a program to read."""
    return {
        "machine": about,
        "results": [
            dataclasses.asdict(case) | {"contender": contender, "measure": measure} | dataclasses.asdict(one)
            for (case, contender, measure), one in results.items()
        ],
        "bounds": [dataclasses.asdict(one) | {"met": one.met} for one in found],
    }


def plot(path: str, title: str, sweeps: Sequence[Sweep], results: Results) -> None:
    """Medians of the changes, over the participants and over the length of the range, are drawn in a file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(18, 5), sharey=True, layout="constrained")
    values: tuple[Callable[[Case], float], ...] = (
        lambda c: c.participants,
        lambda c: c.participants,
        lambda c: c.length,
    )
    for panel, sweep, value in zip(panels, sweeps, values, strict=False):
        for number, contender in enumerate(sweep.contenders):
            for change, line in zip(CHANGES, ("-", "--"), strict=True):
                cases = [case for case in sweep.cases if (case, contender, change) in results]
                panel.loglog(
                    [value(case) for case in cases],
                    [results[case, contender, change].p50 for case in cases],
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
