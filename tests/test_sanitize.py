"""The core without Python, under ThreadSanitizer and under AddressSanitizer with UBSan: every finding is an error.

A few seconds each, and once at full speed without a sanitizer; `make sanitize` (--stress) gives each a minute.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILERS = ["gcc", "clang"]

# Where a sanitizer lets a program have memory: its own shadow lies where the core likes to be.
FLAGS = {
    "none": ["-O2"],
    "thread": ["-O1", "-fsanitize=thread", "-DPS_FAR_BASE=0x7e9000000000u", "-DPS_FAR_SIZE=0x4000000000u"],
    "address": [
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-DPS_FAR_BASE=0x110000000000u",
        "-DPS_FAR_SIZE=0x3f0000000000u",
    ],
}


def core_sources() -> list[Path]:
    """Without the binding's own C, which knows Python."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    sources = next(module["sources"] for module in modules if module["name"] == "pyshare._core")
    found = [ROOT / source for source in sources if source.endswith(".c")]
    return [source for source in found if '#include "binding/binding.h"' not in source.read_text()]


def compile_to(target: Path, compiler: str, sanitizer: str, sources: list[Path]) -> subprocess.CompletedProcess[str]:
    warnings = ["-Wall", "-Wextra", "-Werror", *(["-Wno-tsan"] if compiler == "gcc" else [])]
    command = [compiler, "-std=gnu11", "-g", "-pthread", f"-I{ROOT / 'ext'}", *warnings, *FLAGS[sanitizer]]
    return subprocess.run(
        [*command, *map(str, sources), "-o", str(target)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """build(compiler, sanitizer): the stress program; skips where that compiler or its runtime is missing."""
    directory = tmp_path_factory.mktemp("stress")

    def make(compiler: str, sanitizer: str) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"no {compiler} on this machine")
        probe, program = directory / "probe", directory / f"{compiler}-{sanitizer}"
        empty = directory / "empty.c"
        empty.write_text("int main(void) { return 0; }\n")
        if (
            compile_to(probe, compiler, sanitizer, [empty]).returncode
            or subprocess.run([probe], check=False).returncode
        ):
            pytest.skip(
                f"{compiler} has no runtime for -fsanitize={sanitizer} here (Debian: libtsan, libasan, libubsan)"
            )
        built = compile_to(program, compiler, sanitizer, [*core_sources(), ROOT / "tests" / "stress.c"])
        assert not built.returncode, built.stderr
        return program

    return make


def run(program: Path, seconds: float, seed: int) -> str:
    """Its output; fails with whatever it or a sanitizer had to say.

    Reports go to files: an agent has no standard error in its table of descriptors.
    """
    reports = program.with_suffix(".report")
    options = dict.fromkeys(("TSAN_OPTIONS", "ASAN_OPTIONS"), f"log_path={reports}")
    process = subprocess.Popen(
        [program, str(seconds), str(seed)],
        env={**os.environ, **options},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        output, errors = process.communicate(timeout=seconds + 120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what is left of it, should it have failed or hung
            os.killpg(process.pid, signal.SIGKILL)
    found = "\n".join(path.read_text() for path in sorted(reports.parent.glob(reports.name + "*")))
    found = re.sub(r"==\d+==WARNING: ASan doesn't fully support makecontext/swapcontext .*\n+", "", found)
    assert (process.returncode, found, errors) == (0, "", ""), f"seed {seed}\n{found}\n{output}\n{errors}"
    return output


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_stress(build: Callable[[str, str], Path], compiler: str, sanitizer: str, stress: bool) -> None:
    program = build(compiler, sanitizer)
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"{program} seed {seed}:", run(program, 60 if stress else 3, seed))
