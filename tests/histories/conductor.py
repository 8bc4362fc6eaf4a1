"""One episode: its processes begin, die and begin again; trouble comes as the plan has it; at the end nothing is left.

Lives here: Conductor.  Not here: what the processes do (actor.py), who judges (oracle.py), who plays it (soak.py).
Runs in: a process of its own, whose children all others are: it is the subreaper of their children.
Invariants
 1. Whatever it does to a process is noted before and after.
 2. It never waits for one process: it looks at all of them every few milliseconds, and notes how late it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pyshare
from histories import words
from histories.actor import Actor
from histories.hands import describe
from histories.log import Log
from histories.plan import Plan
from histories.stage import Stage

LIBC = ctypes.CDLL(None)
PR_SET_CHILD_SUBREAPER = 36
LOOK = 0.002  # seconds between two looks
LATE = 0.01
GLANCE = 0.12  # as seldom a participant looks for what is left of snapshots
OPEN_SECONDS = 0.2  # the conductor itself waits for nobody longer
LIVES = 40  # of all actors
END_SECONDS = 20.0  # after which a process that does not end hangs
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT}


class Conductor:
    """Of one plan, in a folder of its own."""

    def __init__(self, plan: Plan, folder: str) -> None:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.plan = plan
        self.log = Log(os.path.join(folder, "conductor.log"))
        self.before = self._own()
        self.stage = Stage(plan, folder)
        self.pids: dict[int, int] = {}  # of actors, by their index
        self.lives = [0] * len(plan["actors"])
        self.stopped: dict[int, float] = {}  # pid -> when it may go on
        self.awaited: dict[tuple[int, int], tuple[int, int, int]] = {}  # (actor, signal) -> (pid, count, number)
        self.signals = 0
        self.now = time.monotonic()

    def run(self) -> None:
        """All of it."""
        self.log.note("blocks", self._blocks())
        for index in range(len(self.lives)):
            self._spawn(index)
        start = time.monotonic()
        end = start + self.plan["seconds"]
        troubles = sorted(self.plan["troubles"], key=lambda trouble: trouble["at"])
        while (now := self._look()) < end:
            while troubles and start + troubles[0]["at"] <= now:
                self._trouble(troubles.pop(0))
            for index in range(len(self.lives)):
                if index not in self.pids and sum(self.lives) < LIVES and now < end - 0.2:
                    self._spawn(index)
        self._finish()

    # -- Processes -----------------------------------------------------------------------------------------------------

    def _spawn(self, index: int) -> None:
        self.lives[index] += 1
        life = self.lives[index]
        self.stage.reset(index)
        if self.plan["ends" if life % 2 else "points"]:
            os.environ["PYSHARE_POINT"] = self.plan["actors"][index]["ended" if life % 2 else "point"]
        self.log.note("spawn", index, life)
        pid = os.fork()
        if pid == 0:
            self._become(index, life)
        os.environ.pop("PYSHARE_POINT", None)
        self.pids[index] = pid
        self.log.note("spawned", index, life, pid)

    def _become(self, index: int, life: int) -> None:
        code = 1
        try:
            os.environ.pop("PYSHARE_POINT", None)
            Actor(self.stage, index, life).run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _look(self) -> float:
        """At all that has happened since the last look; the time."""
        time.sleep(LOOK)
        now = time.monotonic()
        if now - self.now > LATE:
            self.log.note("late", round(now - self.now, 4))
        before, self.now = self.now, now
        with contextlib.suppress(ChildProcessError):
            while (event := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
                pid, status = event
                if os.WIFSTOPPED(status):
                    self.log.note("stopped", pid, before)
                    self.stopped.setdefault(pid, now + 0.05)
                else:
                    self.log.note("died", pid, os.waitstatus_to_exitcode(status))
                    self.stopped.pop(pid, None)
                    for index, other in list(self.pids.items()):
                        if other == pid:
                            del self.pids[index]
        for pid in [pid for pid, until in self.stopped.items() if until <= now]:
            del self.stopped[pid]
            self.log.note("continue", pid)
            os.kill(pid, signal.SIGCONT)
        self._look_at_signals()
        return now

    def _look_at_signals(self) -> None:
        for (index, number), (pid, count, what) in list(self.awaited.items()):
            if self.stage.handled(index, number) >= count:
                self.log.note("handled", what)
            elif self.pids.get(index) == pid:
                continue
            del self.awaited[index, number]

    # -- Trouble -------------------------------------------------------------------------------------------------------

    def _trouble(self, trouble: dict[str, Any]) -> None:
        index = trouble["whom"]
        pid, what = self.pids.get(index), trouble["what"]
        if pid is None or not self.stage.is_ready(index):
            return
        if what == "kill":
            self.log.note("kill", pid)
            os.kill(pid, signal.SIGKILL)
        elif what == "stop" and pid not in self.stopped:
            self.log.note("stop", pid)
            os.kill(pid, signal.SIGSTOP)
            self.stopped[pid] = self.now + trouble["for"]
        elif what in SIGNALS and (index, SIGNALS[what]) not in self.awaited:
            number = SIGNALS[what]
            self.signals += 1
            self.awaited[index, number] = (pid, self.stage.handled(index, number) + 1, self.signals)
            self.log.note("signal", self.signals, pid, int(number))
            os.kill(pid, number)

    # -- The end -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """All come to their end: who waits for a page gets it; who does not come hangs."""
        self.stage.end()
        self.log.note("over")
        self.stopped = dict.fromkeys(self.stopped, 0.0)  # they go on at the next look
        self._look()
        for _ in self._open_while(lambda: bool(self.pids)):
            if all(map(self.stage.is_lost, self.pids)):
                self.stage.tell_through()
        for pid in self.pids.values():
            self.log.note("hangs", pid, _where(pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        if self.pids:
            time.sleep(0.3)
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        for _ in self._open_while(self._has_children):
            pass
        for pid in _children():  # that others have forked
            self.log.note("hangs", pid, _where(pid))
            os.kill(pid, signal.SIGKILL)
        self._look_at_what_is_left()

    def _open_while(self, others: Callable[[], bool]) -> Iterator[None]:
        """A look after the other, for some time, as long as there are others: who waits for a page gets it."""
        end, opened = self.now + END_SECONDS, 0.0
        while others() and self._look() < end:
            if self.now - opened > 0.5:
                self._open()
                opened = self.now
            yield

    def _has_children(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return True
        return False

    def _open(self) -> None:
        """Everything may be written by everybody, at last."""
        hot = self.plan["hot"]
        number = self.log.begin(words.CHANGE, 0, 0, len(hot), 3, OPEN_SECONDS)
        try:
            length = (hot[-1] + 1 - hot[0]) * words.PAGE
            self.log.end(
                number, words.OK, self.stage.region.mprotect(hot[0] * words.PAGE, length, 3, timeout=OPEN_SECONDS)
            )
        except Exception as error:
            self.log.end(number, *describe(error))

    def _look_at_what_is_left(self) -> None:
        region, name = self.stage.region, self.stage.region.name
        self._open()
        for index, page in enumerate(self.plan["hot"]):
            number = self.log.begin(words.LOAD, 0, index, 1, "read", "")
            self.log.end(
                number, words.OK, words.words_of(region.read(page * words.PAGE, words.PAGE), self.stage.threads)
            )
        for to, way in enumerate(self.stage.way_receivers):
            with contextlib.suppress(BlockingIOError):
                while data := way.recv(words.WORD, socket.MSG_DONTWAIT):
                    self.log.note("unread", to, struct.unpack("@Q", data)[0])
        self.log.note(
            "participants", [one.pid for one in region.participants() if one.alive and one.pid != os.getpid()]
        )
        time.sleep(GLANCE)
        region.generation  # noqa: B018  what the dead had of snapshots goes
        self.log.note("blocks", self._blocks())
        region.close()
        del region
        self.stage.region = None  # type: ignore[assignment]
        self.stage.close()
        if name is not None:
            self.log.note("name", name in pyshare.names())
        end = time.monotonic() + END_SECONDS
        while self._has_more() and time.monotonic() < end:  # the agent ends by itself
            time.sleep(LOOK)
        self.log.note("own", self.before, self._own())
        self.log.note("end")

    def _blocks(self) -> int:
        """Bytes of memory that the region takes."""
        return os.fstat(self.stage.region.fileno()).st_blocks * 512

    def _has_more(self) -> bool:
        return any(count > self.before[what] for what, count in self._own().items())

    def _own(self) -> dict[str, int]:
        """What this process has of what may be left behind."""
        with open("/proc/self/maps") as file:
            mapped = sum("memfd:" in line for line in file)
        return {"fd": len(os.listdir("/proc/self/fd")), "task": len(os.listdir("/proc/self/task")), "mapped": mapped}


def _children() -> list[int]:
    with open("/proc/thread-self/children") as file:
        return [int(pid) for pid in file.read().split()]


def _where(pid: int) -> list[str]:
    """What its threads wait for in the kernel."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/wchan") as wchan, open(f"/proc/{pid}/task/{task}/stat") as stat:
                found.append(f"{task}: {wchan.read()} {stat.read().split(')')[1][:3]}")
    return found
