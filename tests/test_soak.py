"""Half a minute of the soak: random histories of processes, in which the oracle finds nothing.

`make soak` goes on for as long as one likes, with other seeds; tests/test_histories.py is about the checker itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 30
SEED = 1  # of plans, not of schedules: what is found can be searched for with the same plan


def test_half_a_minute_of_random_histories(tmp_path: Path) -> None:
    """A history with a finding stays in the test's folder, for `python -m histories.oracle`."""
    told = subprocess.run(
        [sys.executable, "-m", "histories.soak", "--seconds", str(SECONDS), "--seed", str(SEED), "--keep", tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
