"""examples/worker_pool.py: the stray store raises in its worker, at its line, and nobody else is hurt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE

POOL = Path(__file__).parent.parent / "examples" / "worker_pool.py"
BUG = next(number for number, line in enumerate(POOL.read_text().splitlines(), 1) if "# the bug" in line)
ROWS = 64


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(POOL), *arguments, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout + done.stderr, json.loads(figures.read_text())


@pytest.mark.parametrize("workers", [1, 3])
def test_stray_store(tmp_path: Path, workers: int) -> None:
    code, said, figures = run(tmp_path, "--workers", str(workers), "--tasks", "12", "--careless", "7")
    assert code == 0, said
    (stray,) = figures["strays"]
    assert (stray["task"], stray["row"]) == (7, 8 * ROWS)
    assert (stray["file"], stray["line"]) == (str(POOL), BUG)
    assert f"{POOL}:{BUG}" in stray["error"]
    assert f"row {8 * ROWS}: store: page {8 * ROWS}" in said
    assert figures["right"]
    assert list(figures["workers"].values()) == [0] * workers
    shares = {int(task): pid for task, pid in figures["done"].items()}
    assert shares[7] == stray["pid"]
    assert [shares[task] for task in range(12)] == list(map(int, figures["workers"])) * (12 // workers)


def test_without_the_bug(tmp_path: Path) -> None:
    code, said, figures = run(tmp_path, "--workers", "2", "--tasks", "4", "--careless", "-1")
    assert code == 0, said
    assert figures["strays"] == []
    assert figures["right"]


def test_wrong_arguments() -> None:
    command = [sys.executable, str(POOL), "--tasks", "8", "--careless", "7"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE).returncode == 2
