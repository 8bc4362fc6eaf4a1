"""A small /dev/shm, as containers have it, is full: SIGBUS in the middle of a store."""

import os
import shlex
import signal
import subprocess

from chosen import IN_CHILD, SharedMemory, command

if IN_CHILD:
    block = SharedMemory(create=True, size=8 << 20)
    block.buf[:] = bytes(block.size)
    print(f"{block.size} bytes are stored", flush=True)
    block.close()
    block.unlink()
    raise SystemExit

# As root, or in a user namespace where that is allowed, with a /dev/shm of 1 MiB.
program = f"mount -t tmpfs -o size=1M none /dev/shm && exec {shlex.join(command())}"
alone = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "sh", "-c", program]
done = subprocess.run(alone, stderr=subprocess.PIPE, text=True, check=False)
if done.returncode == -signal.SIGBUS:
    print("killed by SIGBUS while it stores 8388608 bytes")
elif done.returncode:
    print(f"skipped: no /dev/shm of our own can be had here: {done.stderr.strip()}")
