"""Memory is left in /dev/shm after kill -9: of a whole process group, as when a container or a service is stopped."""

import os
import signal
import subprocess

from chosen import IN_CHILD, SharedMemory, command

if IN_CHILD:
    block = SharedMemory(create=True, size=1 << 20)
    block.buf[:] = bytes(block.size)
    print(block.name, flush=True)
    signal.pause()

child = subprocess.Popen(command(), stdout=subprocess.PIPE, text=True, start_new_session=True)
assert child.stdout
name = child.stdout.readline().strip()
os.killpg(child.pid, signal.SIGKILL)
child.communicate()
try:
    block = SharedMemory(name)
except FileNotFoundError:
    print("nothing is left")
else:
    print(f"{block.size} bytes are left")
    block.close()
    block.unlink()
