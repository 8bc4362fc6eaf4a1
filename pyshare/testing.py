"""For tests of programs that share memory: processes that wait for each other, and are stopped or killed at a place.

    with Child(body) as child:          # body(child) runs in a forked process
        assert child.hear() == "locked"  # a barrier: it has said so, and waits in child.hear()
        child.kill()
        child.wait()

Lives here: Child and until, which pyshare's own tests are written with.  Knows
nothing of regions, and needs no test runner.
Invariant: no wait is for longer than PATIENCE, and none sleeps for a guess.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from types import TracebackType

__all__ = ["PATIENCE", "Child", "until"]

PATIENCE = 60.0  # seconds after which a test gives up on something that should have happened long ago


def until(condition: Callable[[], object]) -> None:
    """It is true when this returns; yields the processor meanwhile. AssertionError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(f"it did not come true within {PATIENCE} s: {condition!r}")
        os.sched_yield()


def _readable(fd: int) -> bool:
    """It can be read within PATIENCE seconds; whatever its number is, where select() takes none from 1,024 on."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))


class Child:
    """A forked process that runs ``body(child)``; at the end of its ``with`` block it is killed and reaped.

    Parent and child have the same object, and what one says the other hears, line by line. The process ends with exit
    code 0 when body returns, with 1 and a traceback on stderr when it raises; no code of the caller runs in it, no
    handler of atexit and no finalizer.

    Attributes:
        pid: the process's.
    """

    def __init__(self, body: Callable[[Child], object]) -> None:
        to_child, self._send = os.pipe()
        self._receive, to_parent = os.pipe()
        self._status: int | None = None
        self._pidfd = -1
        self.pid = os.fork()
        if self.pid == 0:
            self._become(body, to_child, to_parent)
        os.close(to_child)
        os.close(to_parent)
        self._pidfd = os.pidfd_open(self.pid)  # the pid may be another process's as soon as it is reaped

    def _become(self, body: Callable[[Child], object], to_child: int, to_parent: int) -> None:
        code = 1
        try:
            os.close(self._send)
            os.close(self._receive)
            self._send, self._receive = to_parent, to_child
            body(self)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def say(self, word: str = "ok") -> None:
        """The other side can hear this line; BrokenPipeError where it is gone."""
        os.write(self._send, word.encode() + b"\n")

    def hear(self) -> str:
        """The next line from the other side. AssertionError: it is gone, or silent for PATIENCE seconds."""
        line = b""
        while not line.endswith(b"\n"):
            if not _readable(self._receive):
                raise AssertionError(f"the other side has been silent for {PATIENCE} s, after {line!r}")
            byte = os.read(self._receive, 1)
            if not byte:
                raise AssertionError(f"the other side is gone, after {line!r}")
            line += byte
        return line[:-1].decode()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """It has been sent this signal; nothing happens where it has ended."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):  # reaped by somebody else
                signal.pidfd_send_signal(self._pidfd, number)

    def stop(self) -> None:
        """None of its threads runs when this returns, until ``resume``; AssertionError where it has ended."""
        self.kill(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """It is stopped, by whomever, when this returns; AssertionError where it has ended, or after PATIENCE s."""
        until(lambda: self._status is not None or self._changed())
        if self._status is not None:
            raise AssertionError(f"process {self.pid} is not stopped, but has ended with {self._status}")

    def _changed(self) -> bool:
        """It has been stopped, or has ended, since the last look."""
        pid, status = os.waitpid(self.pid, os.WUNTRACED | os.WNOHANG)
        if pid and not os.WIFSTOPPED(status):
            self._reaped(status)
        return pid != 0

    def resume(self) -> None:
        """It runs again after ``stop``."""
        self.kill(signal.SIGCONT)

    def wait(self) -> int:
        """Its exit code, or the signal that ended it, negative, once it has ended; AssertionError after PATIENCE s."""
        if self._status is None:
            if not _readable(self._pidfd):
                raise AssertionError(f"process {self.pid} did not end within {PATIENCE} s")
            self._reaped(os.waitpid(self.pid, 0)[1])
        assert self._status is not None
        return self._status

    def _reaped(self, status: int) -> None:
        """Its number may be another's from now on; a test of many children has no descriptors to spare."""
        self._status = os.waitstatus_to_exitcode(status)
        os.close(self._pidfd)
        self._pidfd = -1

    def end(self) -> None:
        """It is gone, killed if need be, and so is all that this object had of it."""
        if self._status is None:
            self.kill()
            self.wait()
        if self._send >= 0:
            os.close(self._send)
            os.close(self._receive)
            self._send = self._receive = -1
