"""Runs CPython's own tests of shared memory against pyshare.compat: ``python stdlib_cases.py fork|spawn|forkserver``.

Prints a JSON object: the name of each test, and null where it passed, else the last line of what went wrong.  What a
user changes is changed: the import, also in the programs that the tests start.  spawn and forkserver load this file
again in every child, which is how the change gets there.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.managers
import subprocess
import sys
import unittest
from typing import Any

from test import _test_multiprocessing as cases

from pyshare import compat

IMPORTS = {
    "from multiprocessing import shared_memory": "from pyshare import compat as shared_memory",
    "from multiprocessing.shared_memory import": "from pyshare.compat import",
    "from multiprocessing.managers import SharedMemoryManager": "from pyshare.compat import SharedMemoryManager",
}


def changed(program: str) -> str:
    for before, after in IMPORTS.items():
        program = program.replace(before, after)
    return program


class Popen(subprocess.Popen[Any]):
    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        super().__init__([changed(each) if isinstance(each, str) else each for each in args], *rest, **options)


cases.shared_memory = compat
multiprocessing.managers.SharedMemoryManager = compat.SharedMemoryManager  # type: ignore[misc]
subprocess.Popen = Popen  # type: ignore[misc]


class Named(unittest.TestResult):
    """Remembers every test, and not only how many."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, str | None] = {}

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().startTest(test)
        self.seen.setdefault(test.id().rpartition(".")[2])

    def said(self) -> dict[str, str | None]:
        for test, text in [*self.failures, *self.errors, *self.skipped]:
            self.seen[test.id().rpartition(".")[2]] = text.strip().rpartition("\n")[2]
        return self.seen


def main(method: str) -> None:
    room: dict[str, Any] = {"__name__": __name__}
    cases.install_tests_in_module_dict(room, method, only_type="processes")
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(room["WithProcessesTestSharedMemory"])
    result = Named()
    room["setUpModule"]()
    suite.run(result)
    room["tearDownModule"]()
    print(json.dumps(result.said()))


if __name__ == "__main__":
    main(sys.argv[1])
