"""What is handed on: the sdist has everything, builds from nothing, and what comes of it works in a clean environment.

Nothing is fetched here: the build runs without isolation, with the Cython and setuptools that this environment has, and
the clean environment finds the packages that pyshare needs, and they alone, where this one has them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import PATIENCE

pytest.importorskip("Cython")
pytest.importorskip("setuptools")

ROOT = Path(__file__).parent.parent
GENERATED = (".git", ".venv*", "build", "dist", "site", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis")
UNPACKED = {".ci/run", ".gitignore"}  # of the repository alone


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What it wrote; fails where it does."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, made from a copy of the sources that nothing was built in."""
    here = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, here / "sources", ignore=shutil.ignore_patterns(*GENERATED))
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    succeed(sys.executable, "-c", build, cwd=here / "sources")
    (archive,) = here.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the archive alone, without the crash points."""
    here = sdist.parent
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", here)
    succeed(*pip, "wheel", *options, sdist, cwd=here, CFLAGS="-O0")
    (archive,) = here.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def clean(wheel: Path) -> Path:
    """The bin directory of an environment that has the wheel, and what it says it depends on."""
    place = wheel.parent / "clean"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    succeed(*pip, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    (packages,) = place.glob("lib/python*/site-packages")
    for distribution in dependencies("pyshare"):
        for file in distribution.files or []:
            top = file.parts[0]
            target = packages / top
            if top not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(top))))
    return place / "bin"


def dependencies(name: str) -> list[importlib.metadata.Distribution]:
    """What it needs to be installed, without extras, and what those need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = [name]
    while left:
        for line in importlib.metadata.requires(left.pop()) or []:
            needed = re.match(r"[\w.-]+", line)
            if needed and ";" not in line and needed[0] not in found:
                found[needed[0]] = importlib.metadata.distribution(needed[0])
                left.append(needed[0])
    return list(found.values())


def test_sdist_has_every_file(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository to compare it with")
    listed = set(succeed("git", "ls-files", cwd=ROOT).splitlines())
    tracked = {path for path in listed if (ROOT / path).exists()} - UNPACKED
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert tracked <= packed, tracked - packed
    generated = {path for path in packed - tracked if not re.match(r"PKG-INFO|setup\.cfg|[^/]+\.egg-info/", path)}
    untracked = set(succeed("git", "ls-files", "--others", "--exclude-standard", cwd=ROOT).splitlines())
    assert generated <= untracked


def test_wheel_has_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "_pyshare_faulthandler.py" in archive.namelist()
        packed = {name for name in archive.namelist() if name.startswith("pyshare/")}
    kept = [path for path in (ROOT / "pyshare").rglob("*") if path.suffix in (".py", ".pyi", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in kept} <= packed
    extensions = {name.partition(".")[0] for name in packed if name.endswith(".so")}
    assert extensions == {"pyshare/_core", "pyshare/_peers", "pyshare/_probe"}
    assert not [name for name in packed if name.endswith((".c", ".h", ".pyx", ".pxi"))]


def test_readme_as_typed(clean: Path, tmp_path: Path) -> None:
    """Its first example, in a file, in an environment that has nothing else."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)[:1]
    (tmp_path / "example.py").write_text(example)
    # -u: at a terminal each line is out at once, also of the process that dies.
    said = succeed(clean / "python", "-u", "-W", "ignore::DeprecationWarning", "example.py", cwd=tmp_path)
    assert said.startswith("b'hello'\n"), said
    assert "is READ since change 1 by pid" in said
    assert "pyshare: forbidden store to region 'pool' at offset 0: page 0 is READ since change 1" in said


def test_command_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    assert succeed(clean / "pyshare", "--version", cwd=tmp_path).startswith("pyshare ")
    assert "engine" in succeed(clean / "pyshare", "doctor", cwd=tmp_path)


def test_every_module_can_be_imported(clean: Path, tmp_path: Path) -> None:
    """In an environment without extras: what needs one imports it when it is used."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "pyshare").rglob("*.py")
        if path.name != "__main__.py"
    ]
    names = sorted(name.removesuffix(".__init__") for name in modules)
    succeed(clean / "python", "-c", f"import {', '.join(names)}", cwd=tmp_path)
