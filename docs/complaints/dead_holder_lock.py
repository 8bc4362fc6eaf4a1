"""A process that is killed while it holds a lock keeps it for ever."""

import multiprocessing
import os
import signal
from collections.abc import Callable

from chosen import PEER

import pyshare


def die_with(acquire: Callable[[], object]) -> None:
    """In another process."""
    held = acquire()
    os.kill(os.getpid(), signal.SIGKILL)
    print(held)


def kill_holder(acquire: Callable[[], object]) -> None:
    """It is gone when this returns."""
    process = multiprocessing.get_context("fork").Process(target=die_with, args=(acquire,))
    process.start()
    process.join()


if PEER:
    lock = multiprocessing.Lock()
    kill_holder(lock.acquire)
    print("locked" if lock.acquire(timeout=1) else "still held by the dead after 1 s")
else:
    with pyshare.create(size=4096) as region:
        kill_holder(lambda: region.lock(0))
        with region.lock(0, timeout=1) as held:
            print(f"locked, abandoned: {held.abandoned}")
