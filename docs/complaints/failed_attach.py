"""Attaching fails, for want of address space, and the block is unlinked for everybody (gh-153279)."""

import resource
import sys

from chosen import IN_CHILD, SharedMemory, run, tell_whether_there

if IN_CHILD:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    try:
        SharedMemory(sys.argv[3])
    except OSError as error:
        sys.exit(f"it failed: {error}")
    sys.exit(0)

block = SharedMemory(create=True, size=4 << 30)  # nothing of it is touched
assert run(block.name), "it did not fail"
tell_whether_there(block)
