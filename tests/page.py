"""Runs the code of one page of the documentation, as a reader would who tries each block in turn.

``python page.py PAGE.md`` runs it in the current directory; exit status 1 and a diff where a block does something else
than the page says. What a fence's language means:

- ``python``: runs, with what the blocks before it have left; with ``title="FILE"`` it is that file, and does not run.
- ``console``: lines that begin with ``$ `` are commands; what follows each is what it prints (without any it is enough
  that the command succeeds).
- ``text`` with ``title="output"``: what the block before it printed.
- ``text``: a drawing. Every other language is an error.

In what is printed, ``...`` stands for anything, 47xx for any process, a time of day or a duration for any other.
Lives here: no test; test_docs.py starts this, one process a page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPTIONAL = {"pandas", "prometheus_client", "pyarrow", "torch"}  # blocks that import what is not installed are left out
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.S | re.M)
LOOSE = (
    (r"\.\.\.", r".*?"),
    (r"\b47\d\d\b", r"\\d+"),
    (r"\b\d\d:\d\d:\d\d(?:\.\d+)?", r"\\d\\d:\\d\\d:\\d\\d(?:\\.\\d+)?"),
    (r"\b[\d.,]+ (?:ns|µs|ms|s)\b", r"[\\d.,]+ (?:ns|µs|ms|s)"),
)


class Differs(Exception):
    """A block did not do what the page says."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line of code in the page."""

    language: str
    title: str
    body: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """All of a page, in order."""
    for fence in FENCE.finditer(text):
        language = fence["info"].split()[0] if fence["info"].split() else ""
        title = re.search(r'title="([^"]*)"', fence["info"])
        line = text.count("\n", 0, fence.start("body")) + 1
        yield Block(language, title[1] if title else "", textwrap.dedent(fence["body"]), line)


def pattern(expected: str) -> str:
    """A regular expression for what may be printed instead."""
    parts, at = [], 0
    for found in re.finditer("|".join(f"({loose})" for loose, _ in LOOSE), expected):
        parts += [re.escape(expected[at : found.start()]), re.sub(*LOOSE[(found.lastindex or 1) - 1], found[0])]
        at = found.end()
    return re.sub(r"(?:\\?\s)+", r"\\s+", "".join([*parts, re.escape(expected[at:])]))


def compare(expected: str, printed: str) -> None:
    """They are the same, but for what may be different."""
    if not re.fullmatch(pattern(expected.strip()), printed.strip(), re.S):
        raise Differs("\n".join(difflib.ndiff(expected.splitlines(), printed.splitlines())))


def printed_by(action: Callable[[], object]) -> str:
    """What it, and processes that it started, wrote to stdout and stderr meanwhile."""
    with tempfile.TemporaryFile("w+") as file:
        saved = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            action()
        finally:
            sys.stdout.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            said = file.read()
            print(said, end="", flush=True)
    return said


def commands(body: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a console block."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def console(body: str) -> None:
    for command, expected in commands(body):
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(done.stdout, end="", flush=True)
        if expected.strip():
            compare(expected, done.stdout)
        elif done.returncode:
            raise Differs(f"exit status {done.returncode}")


def python(path: str, block: Block, namespace: dict[str, Any]) -> str:
    code = compile("\n" * (block.line - 1) + block.body, path, "exec")
    return printed_by(lambda: exec(code, namespace))


def run(path: str) -> list[str]:
    """Runs the page; the packages for want of which blocks were left out."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, missing = "", []
    for block in blocks(Path(path).read_text()):
        try:
            match block.language, block.title:
                case "python", "":
                    try:
                        printed = python(path, block, namespace)
                    except ModuleNotFoundError as error:
                        if error.name not in OPTIONAL:
                            raise
                        missing.append(str(error.name))
                case "python", file:
                    Path(file).write_text(block.body)
                case "console", "":
                    console(block.body)
                case "text", "output":
                    compare(block.body, printed)
                case "text", "":
                    pass
                case _:
                    raise Differs(f"nothing says how to run {block.language!r} {block.title!r}")
        except Exception as error:
            error.add_note(f"in the block at {path}:{block.line}")
            raise
    return missing


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        for name in run(sys.argv[1]):
            print(f"left out, for want of a package: {name}")
