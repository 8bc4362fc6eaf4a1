"""Section `demo`: what protection costs a whole program, examples/database_buffer.py.

Lives here: running it, with and without.  Not here: the program.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyshare
from pyshare.bench.measure import Case, Results, Tick, figures
from pyshare.bench.sections import Section, Sweep

DEMO = Path(pyshare.__file__).parent.parent / "examples" / "database_buffer.py"


def demonstrate(protect: str, seconds: float) -> float:
    """Transactions a second."""
    with tempfile.TemporaryDirectory(prefix="pyshare-bench-") as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, DEMO, "--protect", protect, "--seconds", str(seconds), "--seed", "1", "--json", path]
        done = subprocess.run(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"the demonstration failed:\n{done.stdout}")
        found = json.loads(path.read_text())
    return float(found["transactions"] / found["seconds"])


def measure_demo(case: Case, ways: Sequence[str], rounds: int, seconds: float, tick: Tick) -> Results:
    """Every way to protect takes turns."""
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            speeds[way].append(demonstrate(way, seconds))
            tick((number + 0.5) / rounds)
    return {(case, way, "transactions"): figures(found, "1/s") for way, found in speeds.items()}


def demo(quick: bool) -> Section:
    """The example of the source tree, if this is one."""
    ways = ("lease", "none")
    case = Case("demo")
    if not DEMO.exists():
        return Section("demo", [], [], "No demonstration: it comes with the sources.")
    sweep = Sweep(
        "Transactions of the demonstration a second, by --protect", lambda _: "demo", [case], ways, ("transactions",)
    )
    step = functools.partial(measure_demo, case, ways, 1 if quick else 3, 2.0 if quick else 6.0)
    return Section("demo", [sweep], [("the demonstration", step)])
