"""Section `demo`: what protection costs a whole program, examples/database_buffer.py.

Lives here: running it, with and without.  Not here: the program.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyshare
from pyshare.bench.measure import Case, Limit, Results, Tick, figures
from pyshare.bench.sections import Section, Sweep

DEMO = Path(pyshare.__file__).parent.parent / "examples" / "database_buffer.py"
WAYS = ("lease", "window", "mprotect", "none")  # to protect
TURN = 0.1  # seconds of one way, in the program
LEAST = 1.0  # seconds, for the program


def demonstrate(seconds: float) -> dict[str, float]:
    """Transactions a second by way to protect: medians of turns that all ways take in one run."""
    with tempfile.TemporaryDirectory(prefix="pyshare-bench-") as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, DEMO, "--protect", "all", "--seconds", str(seconds), "--seed", "1", "--json", path]
        done = subprocess.run(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"the demonstration failed:\n{done.stdout}")
        kinds = json.loads(path.read_text())["kinds"]
    return {way: float(found["speed"]) for way, found in kinds.items()}


def measure_demo(case: Case, seconds: float, tick: Tick) -> Results:
    speeds = demonstrate(seconds)
    tick(1.0)
    return {(case, way, "transactions"): figures([speeds[way]], "1/s") for way in WAYS}


def demo(limit: Limit) -> Section:
    """The example of the source tree, if this is one."""
    case = Case("demo")
    if not DEMO.exists():
        return Section("demo", [], [], "No demonstration: it comes with the sources.")
    sweep = Sweep(
        "Transactions of the demonstration a second, by --protect", lambda _: "demo", [case], WAYS, ("transactions",)
    )
    seconds = max(LEAST, min(limit.seconds, limit.rounds * len(WAYS) * TURN))
    step = functools.partial(measure_demo, case, seconds)
    return Section("demo", [sweep], [("the demonstration", step)])
