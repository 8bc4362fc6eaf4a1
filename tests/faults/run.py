"""How long the soak takes to see each fault that was mended: the mending is taken out again, one fault at a time.

    make soak-faults                          all of them; the next steps are those of one
    python tests/faults/run.py snapshot_torn --seconds 600

NAME.patch here undoes the mending of a fault (patch -p1); its first line says what the fault is.  The sources are
copied, patched and built in a temporary directory, and the soak runs on that.  What it finds first is told: read
whether it is that fault.  Exit status 1: one was not found.
Lives here: copying, building, telling.  Not here: the soak (tests/histories).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COPIED = ["ext", "pyshare", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"]


def build(patch: Path, folder: Path) -> None:
    """The patched sources are built into folder/site."""
    copy = folder / "copy"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / name)
    with patch.open() as file:
        subprocess.run(["patch", "-p1", "--quiet", "--directory", copy], stdin=file, check=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", copy],
        env={**os.environ, "CFLAGS": "-O2 -g -DPS_POINTS"},
        check=True,
    )


def soak(folder: Path, arguments: list[str]) -> tuple[bool, str]:
    """(was something found, what was said)"""
    path = os.pathsep.join([str(folder / "site"), str(HERE.parent)])
    process = subprocess.run(
        [sys.executable, "-m", "histories.soak", "--keep", str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return process.returncode == 1, process.stdout + process.stderr


def try_one(patch: Path, seconds: float, arguments: list[str]) -> bool:
    """Builds, soaks, tells."""
    with patch.open() as file:
        title = file.readline().strip()
    folder = Path(tempfile.mkdtemp(prefix=f"{patch.stem}-"))
    try:
        build(patch, folder)
        start = time.monotonic()
        found, told = soak(folder, ["--seconds", str(seconds), *arguments])
        took = time.monotonic() - start
        print(f"{patch.stem}: {title}\n    {'found' if found else 'not found'} after {took:.0f} s")
        for line in told.splitlines()[1:12] if found else told.splitlines()[-1:]:
            print(f"    | {line[:200]}")
        sys.stdout.flush()
        return found
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="How long the soak takes to see faults that were mended.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(path.stem for path in sorted(HERE.glob('*.patch')))}")
    parser.add_argument("--seconds", type=float, default=600.0, help="to wait for each")
    arguments, others = parser.parse_known_args()
    patches = [HERE / f"{name}.patch" for name in arguments.names] or sorted(HERE.glob("*.patch"))
    found = [try_one(patch, arguments.seconds, others) for patch in patches]
    return int(not all(found))


if __name__ == "__main__":
    sys.exit(main())
