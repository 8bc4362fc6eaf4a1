"""A process of an episode: how it begins, its threads and signals, and the troubles that it makes for itself.

Lives here: Actor, and what it does before and after its threads.  Not here: the steps (steps.py), troubles that come
from outside (conductor.py).
Invariants
 1. It dies with the conductor, and whatever it forks dies with it.
 2. The descriptors of the harness have high numbers, so that a program's closerange leaves them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import functools
import gc
import os
import profile
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pyshare
from histories import words
from histories.hands import describe
from histories.holding import Releaser
from histories.log import Log
from histories.loops import Loop
from histories.plan import Plan
from histories.stage import RESERVED, Stage
from histories.steps import Worker

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
M_MMAP_THRESHOLD = -3
BEFORE, AFTER = ("gc", "trace", "profile"), ("descriptors", "mappings", "closerange")  # the threads begin


class Actor:
    """What its threads share; lives in the forked process only."""

    def __init__(self, stage: Stage, index: int, life: int) -> None:
        self.stage, self.index, self.life = stage, index, life
        self.plan, self.own = stage.plan, stage.plan["actors"][index]
        self.folder = stage.folder
        self.name = f"a{index}.{life}"
        self.policy: str = self.own["policy"]
        self.extras: list[str] = self.own["extras"]
        self.boxes, self.own_boxes = stage.box_senders, stage.box_receivers
        self.ways, self.own_ways = stage.way_senders, stage.way_receivers
        self.soft = self.is_child = self.is_full = False
        self.raised = self.caught = 0  # exceptions of Ctrl-C
        self.begin = threading.Event()
        self.bag = bytearray()  # of all threads
        self.region = stage.region
        self.releaser: Releaser | None = None

    # -- Its life ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it; the threads have ended when this returns."""
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(self.stage.errors, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        faulthandler.register(signal.SIGUSR2, file=self.stage.errors, all_threads=True)  # where it hangs
        LIBC.mallopt(M_MMAP_THRESHOLD, 16 * words.PAGE)  # larger ones go back to the kernel at their end
        sys.setswitchinterval(self.own["switch"])
        main = Log(self.log_path("main"))
        main.note("born", None, os.getpid(), self.policy)
        self._join(main)
        self.releaser = None if self.plan["ends"] else Releaser(Log(self.log_path("releaser")))
        threads = [self._thread(plan, slot) for slot, plan in zip(self._slots(), self.own["threads"], strict=True)]
        self._trouble_itself(BEFORE)
        apart = [thread for thread, _ in threads[not self.plan["ends"] :]]
        for thread in [*filter(None, [self.releaser]), *apart]:
            thread.start()
        self._trouble_itself(AFTER)  # without room for a stack no thread begins
        self.stage.tell_ready(self.index)
        self.begin.set()
        if not self.plan["ends"]:
            threads[0][1]()
        self._await(main, apart)
        if self.releaser:
            self.releaser.queue.put(None)
            self.releaser.join()
        self._leave(main)

    def _await(self, log: Log, threads: list[threading.Thread]) -> None:
        """Until they have come to their end; one that was ended alone does not come."""
        lost = [thread for thread in threads if not has_come(thread)]
        for thread in lost:
            log.note("ended", thread.name)
        if lost:  # whatever others wait for because of it, they do so as long as they want
            self.stage.tell_lost(self.index)
            while not self.stage.is_through():
                time.sleep(0.01)
            log.note("kill", os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)

    def _slots(self) -> range:
        before = sum(len(actor["threads"]) for actor in self.plan["actors"][: self.index])
        return range(before, before + len(self.own["threads"]))

    def _thread(self, plan: Plan, slot: int) -> tuple[threading.Thread, Callable[[], None]]:
        log = Log(self.log_path(slot))
        value = words.first_value(slot, self.life, 0)
        if plan["kind"] == "loop":
            loop = Loop(self, slot, log, value, slot)
            body = functools.partial(loop.live, plan["tasks"])
        else:
            worker = Worker(self, slot, log, value, slot)
            worker.is_main = slot == self._slots()[0] and not self.plan["ends"]
            worker.is_blocked = "masked" in self.extras and not worker.is_main
            body = functools.partial(self._live, worker, plan)

        def begin() -> None:
            self.begin.wait()
            body()

        return threading.Thread(target=begin, name=f"{self.name}={slot}", daemon=True), body

    def _live(self, worker: Worker, plan: Plan) -> None:
        if "blocked" in self.extras and not worker.is_main:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if worker.is_blocked:  # behind Python's back, so SIGSEGV and SIGBUS too
            LIBC.pthread_sigmask(signal.SIG_BLOCK, b"\xff" * 128, None)
        if "profiler" in self.extras and worker.is_main:
            profile.Profile().runcall(worker.live, plan["steps"])
        else:
            worker.live(plan["steps"])

    def _join(self, log: Log) -> None:
        """It is a participant already, by the fork; or it leaves, and comes again by another way."""
        if self.own["how"] != "fork":
            inherited = self.stage.region
            by = inherited.name if self.own["how"] == "name" and inherited.name else os.dup(inherited.fileno())
            self.stage.region = self.region = None  # type: ignore[assignment]
            number = log.begin(words.CLOSE, 0)
            inherited.close()
            log.end(number, words.OK)
            engine = self.own["engine"] if self.plan["has_uffd"] else "auto"
            while self.region is None:
                self.region = self._attach(log, by, engine)
            if not isinstance(by, str):
                os.close(by)
        for _ in range(1000):
            with contextlib.suppress(pyshare.ParticipantLimit):
                self.region.on_violation(self.policy)
                return
            time.sleep(0.01)

    def _attach(self, log: Log, by: str | int, engine: str) -> pyshare.Region | None:
        """None: its native thread was ended as it began, at a point."""
        number = log.begin(words.ATTACH, 0, engine, self.own["how"], 0)
        try:
            region = pyshare.attach(by, engine=engine)
        except BaseException as error:
            ended = isinstance(error, OSError) and error.errno == errno.EOWNERDEAD
            log.end(number, *(describe(error) if ended else (words.WRONG, (repr(error),))))
            if ended:
                return None
            raise
        log.end(number, words.OK)
        return region

    def _leave(self, log: Log) -> None:
        """As at the end of a program that closes what it has used."""
        sys.settrace(None)
        sys.setprofile(None)
        gc.set_threshold(700)
        gc.collect()
        number = log.begin(words.CLOSE, 0)
        try:
            self.region.close()
            log.end(number, words.OK)
        except BufferError as error:
            log.end(number, words.WRONG, (repr(error),))

    def is_over(self) -> bool:
        return self.is_full or self.stage.is_over()

    def log_path(self, part: int | str) -> str:
        return os.path.join(self.folder, f"{self.name}={part}.log")

    def become_child(self, name: str) -> None:
        """In a forked child."""
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self.name, self.is_child, self.releaser, self.soft = name, True, None, False

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.is_child:
            return
        self.stage.tell_handled(self.index, number)
        if number == signal.SIGINT and self.soft:
            self.soft = False
            self.raised += 1
            raise KeyboardInterrupt

    # -- Its own troubles ----------------------------------------------------------------------------------------------

    def _trouble_itself(self, kinds: tuple[str, ...]) -> None:
        for extra in kinds:
            if extra in self.extras:
                getattr(self, f"_{extra}")()

    def _gc(self) -> None:
        gc.set_threshold(1)

    def _trace(self) -> None:
        def trace(_frame: object, _event: str, _argument: object) -> Any:
            return trace

        threading.settrace(trace)
        sys.settrace(trace)

    def _profile(self) -> None:
        def look(_frame: object, _event: str, _argument: object) -> None:
            return None

        threading.setprofile(look)
        sys.setprofile(look)

    def _descriptors(self) -> None:
        """All but a few are taken, or all but one."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = min(soft, 1024)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[-self.own["free"] :]:
            os.close(fd)

    def _mappings(self) -> None:
        """All but some hundred of those that vm.max_map_count allows."""
        with open("/proc/sys/vm/max_map_count") as file:
            limit = int(file.read())
        with open("/proc/self/maps") as file:
            free = limit - sum(1 for _ in file) - 150
        LIBC.mmap.restype = ctypes.c_void_p
        at = LIBC.mmap(None, ctypes.c_size_t(free * words.PAGE), 0, 0x4022, -1, ctypes.c_long(0))
        for page in range(1, free, 2):
            if LIBC.mprotect(ctypes.c_void_p(at + page * words.PAGE), ctypes.c_size_t(words.PAGE), 1):
                break

    def _closerange(self) -> None:
        """As daemons do; the harness's own descriptors are above."""
        os.closerange(3, RESERVED)


def has_come(thread: threading.Thread) -> bool:
    """Waits until it has come to its end; False: it was ended alone, and Python does not know."""
    while thread.is_alive():
        if not os.path.exists(f"/proc/self/task/{thread.native_id}") and thread.is_alive():
            return False
        thread.join(0.02)
    return True
