"""Draws what docs/design.md shows, and writes its tables, from what ``pyshare bench --json FILE`` measured.

``python docs/figures.py FILE DIRECTORY``, which ``make figures`` does. Each picture is drawn twice, for readers in the
light and in the dark. Invariant: no figure is written here; all are the file's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

Row = dict[str, Any]

INK = {"light": "#303030", "dark": "#d0d0d8"}
COLOURS = {"light": ["#3949ab", "#00897b", "#e65100", "#8e24aa", "#c62828", "#9e9e9e", "#616161"]}
COLOURS["dark"] = ["#8c9eff", "#4db6ac", "#ffb74d", "#ce93d8", "#ef9a9a", "#757575", "#bdbdbd"]
IDLE = {"length": 4096, "dirty": True, "storing": 0, "threads": 1, "stopped": False, "writable": True}
CHANGE = {
    "uffd": "pyshare, uffd",
    "mprotect": "pyshare, mprotect",
    "signal": "signal broadcast",
    "condition": "multiprocessing.Condition",
    "pipe": "multiprocessing.Pipe",
    "bare uffd": "floor: bare uffd",
    "all CPUs": "floor: shared page tables",
}
IMAGE = {
    "leases": "snapshot, by leases",
    "READ_WRITE": "snapshot, READ_WRITE for all",
    "fork": "fork(), memory private",
    "stop and copy": "stop everything and copy",
    "nothing": "nothing: the machine's own",
}


def short(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def size(length: int) -> str:
    return f"{length >> 30} GiB" if length >> 30 else f"{length >> 20} MiB"


class Measured:
    """The results of one run of the bench."""

    def __init__(self, path: str) -> None:
        whole = json.loads(Path(path).read_text())
        self.machine: dict[str, Any] = whole["machine"]
        self._results: list[Row] = whole["results"]

    def find(self, **wanted: object) -> Iterator[Row]:
        """Those with these values."""
        return (row for row in self._results if wanted.items() <= row.items())

    def one(self, **wanted: object) -> Row | None:
        return next(self.find(**wanted), None)


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sweep(measured: Measured, names: dict[str, str], axis: str, **case: object) -> dict[str, list[Row]]:
    """For each contender its results, by what is varied."""
    found = {name: sorted(measured.find(contender=name, **case), key=lambda row: int(row[axis])) for name in names}
    return {name: rows for name, rows in found.items() if rows}


def sweep_table(
    found: dict[str, list[Row]], names: dict[str, str], axis: str, label: Callable[[int], str], worst: str
) -> str:
    """p50 and a worse quantile of each contender, a line for each value of the axis."""
    values = sorted({int(row[axis]) for rows in found.values() for row in rows})
    rows = []
    for value in values:
        cells = [next((row for row in found[name] if row[axis] == value), None) for name in found]
        rows.append([label(value), *(f"{short(c['p50'])} / {short(c[worst])}" if c else "" for c in cells)])
    return table([axis, *(names[name] for name in found)], rows)


def draw(
    path: Path, found: dict[str, list[Row]], names: dict[str, str], axis: str, label: Callable[[int], str]
) -> None:
    """Medians over what is varied, on logarithmic scales, in both schemes."""
    for scheme, ink in INK.items():
        colours = {
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
        }
        with mpl.rc_context({**colours, "font.size": 10, "svg.hashsalt": "pyshare", "svg.fonttype": "none"}):
            figure, axes = pyplot.subplots(figsize=(7.6, 4), layout="constrained")
            for (name, rows), colour in zip(found.items(), COLOURS[scheme], strict=False):
                floor = names[name].startswith(("floor", "nothing"))
                values, medians = [row[axis] for row in rows], [row["p50"] for row in rows]
                axes.loglog(values, medians, "--" if floor else "-", marker=".", color=colour)
            label_lines(axes, [names[name] for name in found])
            ticks = sorted({row[axis] for rows in found.values() for row in rows})
            axes.set_xticks(ticks, [label(value) for value in ticks])
            axes.minorticks_off()
            axes.set(xlabel=axis if axis == "participants" else "memory", ylabel="µs, median")
            axes.grid(visible=True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.02)
            figure.savefig(path.with_name(f"{path.name}-{scheme}.svg"), transparent=True, metadata={"Date": None})
            pyplot.close(figure)


def label_lines(axes: Any, labels: list[str]) -> None:
    """Each line has its label at its end, none over another."""
    ends = [line.get_xydata()[-1] for line in axes.lines]
    last = -1e9
    for end, line, label in sorted(zip(ends, axes.lines, labels, strict=True), key=lambda one: float(one[0][1])):
        height = float(axes.transData.transform(end)[1]) * 72 / axes.figure.dpi  # points
        last = max(height, last + 14)
        axes.annotate(
            label, end, (6, last - height), textcoords="offset points", va="center", color=line.get_color(), fontsize=9
        )


def held_table(measured: Measured) -> str:
    """A cycle of take, store, release, with one other participant."""
    cycles = {
        "lease in place": {"section": "lease", "contender": "uffd"},
        "lease by window": {"section": "lease", "contender": "uffd window"},
        "lock": {"section": "lock", "contender": "lock"},
        "beside: two bare mprotect calls": {"section": "lease", "contender": "2 mprotect"},
        "beside: two bare uffd calls": {"section": "lease", "contender": "2 bare uffd"},
        "beside: multiprocessing.Lock": {"section": "lock", "contender": "mp.Lock"},
        "beside: fcntl range lock": {"section": "lock", "contender": "fcntl"},
        "beside: robust mutex": {"section": "lock", "contender": "robust mutex"},
    }
    rows = []
    for said, case in cycles.items():
        cells = [measured.one(**case, measure=language) for language in ("Python", "C")]
        rows.append([said, *(short(cell["p50"]) if cell else "" for cell in cells)])
    return table(["µs, median", "from Python", "from C"], rows)


def main(path: str, directory: str) -> None:
    measured, into = Measured(path), Path(directory)
    change = sweep(measured, CHANGE, "participants", section="change", measure="revoke", warm=True, **IDLE)
    (into / "change.txt").write_text(sweep_table(change, CHANGE, "participants", str, "p99"))
    draw(into / "change", change, CHANGE, "participants", str)
    pause = sweep(measured, IMAGE, "length", section="snapshot", measure="pause", participants=4)
    (into / "pause.txt").write_text(
        sweep_table(pause, IMAGE, "length", size, "p90").replace("| length |", "| memory |", 1)
    )
    draw(into / "pause", pause, IMAGE, "length", size)
    (into / "held.txt").write_text(held_table(measured))
    about = "Measured on {cpus} virtual CPUs of an {cpu}, Linux {kernel}, Python {python}, {date:.10}.\n".format_map(
        measured.machine
    )
    (into / "machine.txt").write_text(about)


if __name__ == "__main__":
    main(*sys.argv[1:])
