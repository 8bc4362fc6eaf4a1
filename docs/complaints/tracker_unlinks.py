"""A program that only attached unlinks the block when it ends (gh-82300)."""

import contextlib
import sys

from chosen import IN_CHILD, SharedMemory, run

if IN_CHILD:
    SharedMemory(sys.argv[3]).close()
    sys.exit()

block = SharedMemory(create=True, size=100)
run(block.name)
try:
    SharedMemory(block.name).close()
except FileNotFoundError:
    print("the block is gone")
else:
    print("the block is there")
block.close()
with contextlib.suppress(FileNotFoundError):
    block.unlink()
