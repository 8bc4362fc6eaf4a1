"""CPython's own tests of shared memory, run against pyshare.compat: what fails is what docs/compat.md says, and why."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

TESTS = Path(__file__).parent
DOCUMENTED = set(re.findall(r"^\| `(test_\w+)`", (TESTS.parent / "docs" / "compat.md").read_text(), re.M))


@pytest.mark.skipif(
    not importlib.util.find_spec("test._test_multiprocessing"), reason="this Python has no test package"
)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_cases_of_cpython(method: str, tmp_path: Path) -> None:
    command = [sys.executable, TESTS / "stdlib_cases.py", method]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, str | None] = json.loads(done.stdout)
    failed = {name: why for name, why in results.items() if why is not None}
    assert len(results) >= 13  # of Python 3.11
    assert set(failed) == DOCUMENTED & set(results), failed
    assert all("resource_tracker: There appear to be 1 leaked" in str(why) for why in failed.values()), failed
