"""The documentation: every code block of every page runs, and the site is whole.

page.py says what a block means. Each page is a process of its own, in a directory of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import page
import pytest
from conftest import PATIENCE

import pyshare

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = list(page.blocks((ROOT / "README.md").read_text()))


def as_reader(directory: Path, *arguments: str | Path, status: int = 0) -> str:
    """What Python printed, as a reader runs it who has pyshare installed; fails where it ends otherwise."""
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *arguments],  # -u: as at a terminal, where each line is out at once
            cwd=directory,
            env={
                **os.environ,
                "PATH": os.pathsep.join(paths),
                "COLUMNS": "160",
                "PYTHONWARNINGS": "ignore::DeprecationWarning",  # of os.fork() beside another thread, since 3.12
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        pidfd = os.pidfd_open(process.pid)
        try:
            ended = select.select([pidfd], [], [], PATIENCE)[0]
        finally:
            os.close(pidfd)
            os.killpg(process.pid, signal.SIGKILL)  # whom it has left, too: the number is its own until we wait
            process.wait()
        file.seek(0)
        said = file.read()
    assert ended, f"it does not end\n{said}"
    assert process.returncode == status, f"{process.returncode}\n{said}"
    return said


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(DOCS)) for path in PAGES])
def test_page(path: Path, tmp_path: Path) -> None:
    for room in ("docs", "examples", "tests"):  # as in a clone
        (tmp_path / room).symlink_to(ROOT / room)
    (tmp_path / "session.py").symlink_to(page.__file__)  # as the commands that look will call it
    said = as_reader(tmp_path, "session.py", path)
    missing = re.findall(r"^left out, for want of a package: (\w+)$", said, re.M)
    if missing:
        pytest.skip(f"all but the blocks that need {', '.join(missing)} was run")


READY = """
import ctypes, os, zlib
import numpy as np
import pyshare

region = pyshare.create(size=1 << 20)
"""


@pytest.mark.parametrize(
    "block", [one for one in README if one.language == "python"], ids=lambda block: f"line {block.line}"
)
def test_readme(block: page.Block, tmp_path: Path) -> None:
    """Its blocks are short of imports, and each is about a region of its own; what ends in an error says "# raises"."""
    (tmp_path / "block.py").write_text(READY + block.body)
    raising = [at for at, line in enumerate((READY + block.body).splitlines(), 1) if "# raises" in line]
    said = as_reader(tmp_path, "block.py", status=1 if raising else 0)
    for line in raising:
        assert re.search(rf'block\.py", line {line}, in <module>', said), said


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("pid 4711 holds it", "pid 1204577 holds it", True),
        ("pid 4711 holds it", "pid x holds it", False),
        ("4000 of them", "4001 of them", False),
        ("2.5 ms ago", "870 µs ago", True),
        ("at 18:51:48.582 x", "at 00:00:00.001 x", True),
        ("a ... z\n", "a b\nc z", True),
        ("a\n...\n", "a", True),
        ("28 KiB by uffd", "1.5 MiB by mprotect", True),
        ("a  b", "a b", True),
        ("a", "ab", False),
    ],
)
def test_what_may_differ(expected: str, printed: str, same: bool) -> None:
    try:
        page.compare(expected, printed)
    except page.Differs:
        assert not same
    else:
        assert same


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```",
        '```python\nprint(1)\n```\n```text title="output"\n2\n```',
        "```console\n$ false\n```",
        "```console\n$ echo 1\n2\n```",
        "```rust\n```",
        "```python\nimport nowhere\n```",
    ],
)
def test_a_wrong_page_fails(text: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.md").write_text(text + "\n")
    with pytest.raises(AssertionError):
        as_reader(tmp_path, page.__file__, "wrong.md")


def test_reference_has_every_public_name() -> None:
    told = set(re.findall(r"^::: pyshare\.(\w+)$", "\n".join(path.read_text() for path in PAGES), re.M))
    things = {name for name in pyshare.__all__ if callable(getattr(pyshare, name))}
    assert things <= told, things - told


def test_site_builds(tmp_path: Path) -> None:
    """Without a warning, and nothing in it is fetched from elsewhere."""
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=PATIENCE)
    for path in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="?(https?:[^" >]*)', path.read_text())
        assert not fetched, path
