"""How participants come and go within a thread's life: forks, second handles, observers.

Lives here: those steps.  Not here: how an actor begins (actor.py).
Invariant: a forked child ends within its step, or with its parent; it writes to a log of its own.
"""

from __future__ import annotations

import os
import signal
import time

import pyshare
from histories import words
from histories.hands import FAILED, Ground
from histories.imaging import Imaging
from histories.log import Log
from histories.plan import Step
from histories.stage import RESERVED
from histories.words import PAGE

CHILD_SECONDS = 20.0  # after which a child hangs


class Births(Imaging):
    """Forks, second handles, observers."""

    forks = 0
    attached = 0

    def do_fork(self, step: Step) -> None:
        if self.actor.is_child:
            return
        self.forks += 1
        name = f"{self.actor.name}-{self.slot}.{self.forks}"
        number, pid, ended = self.do(words.FORK, (name,), os.fork, soft=False)  # in its hooks exceptions are lost
        if pid is FAILED:
            return
        if pid == 0:
            self.be_born(step)
        self.log.end(number, words.OK, pid, at=ended)
        self.bury(pid, step)

    def be_born(self, step: Step) -> None:
        """The child's whole life."""
        code = 1
        try:
            if step["end"] == "daemon":
                become_daemon()
            self.actor.become_child(f"{self.actor.name}-{self.slot}.{self.forks}")
            os.close(self.source)  # two descriptors that it needs for its log, should there be no others
            self.actor.own_ways[self.slot].close()
            try:
                self.log = Log(self.actor.log_path(self.slot))
            except BaseException:
                os._exit(code)  # with no log of its own: the other one is its parent's
            self.log.note("born", self.actor.name, os.getpid(), self.actor.policy)
            if step["end"] == "daemon":
                self.log.note("daemon", self.actor.name)
            self.cell = words.cell_of(self.slot, self.actor.stage.threads, True)
            self._value = words.first_value(self.cell, self.actor.life, self.forks)
            self.kept, self.files, self.is_main = [], [], False
            self.take_steps(step["steps"])
            if step["end"] == "exec":  # without close
                os.execv("/bin/sleep", ["sleep", "0.05"])
            code = 0
        except BaseException as error:
            self.log.stray(repr(error))
        finally:
            os._exit(code)

    def bury(self, pid: int, step: Step) -> None:
        """Returns when the child has ended, killed perhaps; a daemon is the conductor's to bury."""
        start = time.monotonic()
        if step["end"] == "kill":
            time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() - start > CHILD_SECONDS:
                self.log.note("hangs", pid)
                os.kill(pid, signal.SIGKILL)
                start = time.monotonic()
            time.sleep(0.001)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.log.note("died", pid, status)

    # -- A second handle of the same region ----------------------------------------------------------------------------

    def do_attach(self, step: Step) -> None:
        self.attached += 1
        region = self.on.region
        try:
            by = region.name if step["by"] == "name" and region.name else region.fileno()
        except (pyshare.ParticipantLimit, OSError):  # it has no part
            return
        engine = step["engine"] if self.actor.plan["has_uffd"] else "auto"
        participant = (self.slot + 1) * 10_000 + self.attached
        before = self.on
        arguments = (engine, step["by"], participant)
        number, second, ended = self.do(words.ATTACH, arguments, lambda: pyshare.attach(by, engine=engine))
        if second is FAILED:
            return
        self.log.end(number, words.OK, at=ended)
        try:
            second.on_violation(self.actor.policy)
            self.on = Ground(second, participant, self.scratch)
            self.take_steps(step["steps"])
        finally:
            on, self.on = self.on, before
            on.let_go()
            self.close(second, participant)

    def close(self, region: pyshare.Region, participant: int) -> None:
        while True:
            number, result, ended = self.do(words.CLOSE, (participant,), region.close)
            if result is not FAILED:
                self.log.end(number, words.OK, at=ended)
            if region.closed:
                return

    def do_observe(self, step: Step) -> None:
        """A look by who does not take part."""
        at, region = self.hot[step["at"]] * PAGE, self.on.region

        def observe() -> bytes:
            with pyshare.attach(region.fileno(), readonly=True) as observer:
                return observer.read(at, PAGE)

        number, result, ended = self.do(words.OBSERVE, (step["at"], 1, "observer", ""), observe)
        if result is not FAILED:
            self.log.end(number, words.OK, self.words_of(result), at=ended)


def become_daemon() -> None:
    """The parent's child ends at once; its own child goes on, in a session of its own, and closes what it has got."""
    middle = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.closerange(3, RESERVED)
    while os.getppid() == middle:
        time.sleep(0.001)
