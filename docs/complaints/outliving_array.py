"""An array that outlives its SharedMemory is over nothing, or keeps it from being closed."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from chosen import IN_CHILD, SharedMemory, run

WAYS: dict[str, Callable[[Any], Any]] = {
    "ndarray": lambda buf: np.ndarray((100,), np.uint8, buf),
    "frombuffer": lambda buf: np.frombuffer(buf, np.uint8),
}


def array_of_a_block(way: str) -> Any:
    """As programs have it: the block is this function's own affair."""
    block = SharedMemory(create=True, size=100)
    block.unlink()
    array = WAYS[way](block.buf)
    array[0] = 42
    block.close()
    return array


if IN_CHILD:
    try:
        sys.exit(int(array_of_a_block(sys.argv[3])[0]))
    except BufferError:
        sys.exit(1)

MEANS = {42: "its 42 is there", 1: "BufferError", -signal.SIGSEGV: "killed by SIGSEGV"}
print("; ".join(f"{way}: {MEANS.get(run(way))}" for way in WAYS))
