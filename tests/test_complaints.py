"""docs/complaints.md: every command of its table prints what the table says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(
    r"`python (docs/complaints/\w+\.py) (peer|pyshare)` \| `([^`]*)`", (ROOT / "docs" / "complaints.md").read_text()
)


@pytest.mark.parametrize(("program", "which", "printed"), COMMANDS, ids=lambda word: word.rpartition("/")[2])
def test_command_prints_what_is_said(program: str, which: str, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, program, which], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.removeprefix("skipped: "))
    assert (done.stdout, done.returncode) == (f"{printed}\n", 0), done.stderr


def test_table_has_each_program_both_ways() -> None:
    programs = {f"docs/complaints/{path.name}" for path in (ROOT / "docs" / "complaints").glob("*.py")}
    ways = {(program, which) for program, which, _ in COMMANDS}
    assert ways == {(p, which) for p in programs - {"docs/complaints/chosen.py"} for which in ("peer", "pyshare")}
