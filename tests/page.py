"""Runs the code of one page of the documentation, as a reader would who tries each block in turn.

``python page.py PAGE.md`` runs it in the current directory; exit status 1 and a diff where a block does something else
than the page says. What a fence's language means:

- ``python``: runs, with what the blocks before it have left; with ``title="FILE"`` it is that file, and does not run.
- ``console``: lines that begin with ``$ `` are commands; what follows each is what it prints (without any it is enough
  that the command succeeds).
- ``text`` with ``title="output"``: what the block before it printed.
- ``text``: a drawing. Every other language is an error.

In what is printed, ``...`` stands for anything, 47xx for any process, a time of day, a duration or a size in KiB and
more for any other, uffd for either engine, and white space for white space.
Lives here: no test; test_docs.py starts this, one process a page.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPTIONAL = {"pandas", "prometheus_client", "pyarrow", "torch"}  # blocks that import what is not installed are left out
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.S | re.M)
LOOSE = (
    (r"\s*\.\.\.\s*", r".*?"),
    (r"\b47\d\d\b", r"\\d+"),
    (r"\b\d\d:\d\d:\d\d(?:\.\d+)?", r"\\d\\d:\\d\\d:\\d\\d(?:\\.\\d+)?"),
    (r"\b[\d.,]+ (?:ns|µs|ms|s)\b", r"[\\d.,]+ (?:ns|µs|ms|s)"),
    (r"\b[\d.,]+ [KMG]iB\b", r"[\\d.,]+ [KMG]iB"),
    (r"\buffd\b", r"(?:uffd|mprotect)"),
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


class Paper:
    """What is printed from now on, by this process and those that it starts, whenever they do; a context manager."""

    def __enter__(self) -> Paper:
        self._file = tempfile.TemporaryFile("a+")
        self._saved = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(self._file.fileno(), number)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        for number, copy in zip((1, 2), self._saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        self._file.seek(0)
        print(self._file.read(), end="", flush=True)
        self._file.close()

    def since(self, action: Callable[[], object]) -> str:
        """What is printed while it runs."""
        start = os.fstat(self._file.fileno()).st_size
        action()
        sys.stdout.flush()
        self._file.seek(start)
        return self._file.read()


def commands(body: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a console block."""
    for part in re.split(r"^\$ ", body, flags=re.M)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def matches(expected: str, printed: str) -> bool:
    return bool(re.fullmatch(pattern(expected.strip()), printed.strip(), re.S))


def compare(expected: str, printed: str) -> None:
    """They are the same, but for what may be different."""
    if not matches(expected, printed):
        raise Differs("\n".join(difflib.ndiff(expected.splitlines(), printed.splitlines())))


def console(body: str) -> None:
    """Runs each command. One that the page ends by ^C is ended so when it has printed what it should."""
    for command, expected in commands(body):
        print(f"$ {command}", flush=True)
        expected, interrupted, _ = expected.partition("^C\n")
        with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            printed = b""
            while part := os.read(process.stdout.fileno(), 1 << 16):
                printed += part
                if interrupted and matches(expected, printed.decode()):
                    process.send_signal(signal.SIGINT)
                    break
        print(printed.decode(), end="", flush=True)
        if expected.strip():
            compare(expected, printed.decode())
        elif process.returncode:
            raise Differs(f"exit status {process.returncode}")


def run(path: str, paper: Paper) -> list[str]:
    """Runs the page; the packages for want of which blocks were left out."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, missing = "", []
    for block in blocks(Path(path).read_text()):
        try:
            match block.language, block.title:
                case "python", "":
                    code = compile("\n" * (block.line - 1) + block.body, path, "exec")
                    try:
                        printed = paper.since(functools.partial(exec, code, namespace))
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


def main() -> int:
    """The exit status."""
    with Paper() as paper:
        try:
            for name in run(sys.argv[1], paper):
                print(f"left out, for want of a package: {name}")
        except Exception:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
