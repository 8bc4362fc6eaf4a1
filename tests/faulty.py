"""Runs each (steps, action) that it is given in a process of its own, for test_fault.py.

python faulty.py LIBRARY mprotect|uffd|without, then one JSON list a line on stdin; answers with one JSON list a line:
how the process ended, what it wrote on stdout, and on stderr.  Without pyshare its own steps do nothing: what happens
then is what must happen with it.
"""

import ctypes
import faulthandler
import json
import mmap
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

SA_NODEFER, SA_ONSTACK = 0x40000000, 0x08000000
PAGE = 4096

library = ctypes.CDLL(sys.argv[1])
for function in (library.jumps, library.mends, library.overflow):
    function.restype = ctypes.c_long
library.jumps.argtypes = [ctypes.c_void_p, ctypes.c_long]
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
region: Any = None
engine = sys.argv[2]
if engine != "without":
    import pyshare


def create() -> None:
    global region
    region = pyshare.create("faulty", size=4 * PAGE, replace=True, engine=engine)
    region.mprotect(PAGE, PAGE, pyshare.READ)
    region.mprotect(2 * PAGE, PAGE, pyshare.NONE)
    libc.mprotect(region.address, PAGE, 0)
    region.read(0, 1)  # faults, and is mended: the thread's registers remember it


STEPS: dict[str, Callable[[], object]] = {
    "enable": lambda: faulthandler.enable(file=2),
    "disable": faulthandler.disable,
    "jump": lambda: library.install_jump(SA_ONSTACK),
    "jump-nodefer": lambda: library.install_jump(SA_ONSTACK | SA_NODEFER),
    "mend": lambda: library.install_mend(SA_ONSTACK),
}
PYSHARE_STEPS: dict[str, Callable[[], object]] = {
    "pyshare": create,
    "change": lambda: region.mprotect(3 * PAGE, PAGE, pyshare.READ),
}


def in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def past_the_end() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        view = mmap.mmap(file.fileno(), PAGE)
        file.truncate(0)
        view[0] = 1


def store_by_numpy() -> None:
    np.frombuffer(region, np.uint8)[PAGE + 5 : PAGE + 9].fill(1)


def store_by_view() -> None:
    region.buf[PAGE + 5] = 1


ACTIONS: dict[str, Callable[[], object]] = {
    # Faults that are not pyshare's.
    "null": lambda: ctypes.memset(0, 1, 1),
    "null-thread": lambda: in_thread(lambda: ctypes.memset(0, 1, 1)),
    "kill": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kill-bus": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "raise": lambda: signal.raise_signal(signal.SIGSEGV),
    "overflow": lambda: library.overflow(0),
    "bus": past_the_end,
    "jumps": lambda: print(library.jumps(16, 3000)),
    "jumps-thread": lambda: in_thread(lambda: print(library.jumps(16, 3000))),
    "mends": lambda: print(library.mends(3000)),
    "mends-thread": lambda: in_thread(lambda: print(library.mends(3000))),
    # Faults in the region: a store to page 1, which is READ, or a load from page 2, which is NONE.
    "view": store_by_view,
    "view-thread": lambda: in_thread(store_by_view),
    "numpy": store_by_numpy,
    "memset": lambda: ctypes.memset(region.address + PAGE + 5, 1, 4),
    "load": lambda: region.buf[2 * PAGE + 5],
    "load-by-C": lambda: ctypes.string_at(region.address + 2 * PAGE + 5, 1),
    "own-jumps": lambda: print(library.jumps(region.address + PAGE + 5, 3000)),
}


def become(steps: list[str], action: str, out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    for step in steps:
        if step in STEPS:
            STEPS[step]()
        elif engine != "without":
            PYSHARE_STEPS[step]()
    ACTIONS[action]()
    sys.stdout.flush()
    os._exit(0)


def run(steps: list[str], action: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            become(steps, action, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return code, texts[0], texts[1]


for line in sys.stdin:
    print(json.dumps(run(*json.loads(line))), flush=True)
