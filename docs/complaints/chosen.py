"""What a complaint is shown with, as its command line says: ``peer``, the standard library, or ``pyshare``.

Lives here: what all of them have in common.  What each shows is its own.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

if len(sys.argv) < 2 or sys.argv[1] not in ("peer", "pyshare"):
    sys.exit(f"usage: python {sys.argv[0]} peer|pyshare")
PEER = sys.argv[1] == "peer"
IN_CHILD = sys.argv[2:3] == ["child"]

if PEER:
    from multiprocessing.shared_memory import ShareableList, SharedMemory
else:
    from pyshare.compat import ShareableList, SharedMemory

__all__ = ["IN_CHILD", "PEER", "ShareableList", "SharedMemory", "command", "run", "tell_whether_there"]


def command(*words: str) -> list[str]:
    """Of another process that runs the same program, and has IN_CHILD."""
    return [sys.executable, *sys.argv[:2], "child", *words]


def run(*words: str) -> int:
    """Its exit status, when it and whatever it has started are gone; what it says on stderr is not shown."""
    return subprocess.run(command(*words), stderr=subprocess.PIPE, check=False).returncode


def tell_whether_there(block: SharedMemory) -> None:
    """Says whether its name still leads to it, and ends it."""
    try:
        SharedMemory(block.name).close()
    except FileNotFoundError:
        print("the block is gone")
    else:
        print("the block is there")
    block.close()
    with contextlib.suppress(FileNotFoundError):
        block.unlink()
