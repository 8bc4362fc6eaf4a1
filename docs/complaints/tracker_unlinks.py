"""A program that only attached unlinks the block when it ends (gh-82300)."""

import sys

from chosen import IN_CHILD, SharedMemory, run, tell_whether_there

if IN_CHILD:
    SharedMemory(sys.argv[3]).close()
    sys.exit()

block = SharedMemory(create=True, size=100)
run(block.name)
tell_whether_there(block)
