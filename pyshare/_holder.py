"""A process that does nothing but hold a named region, until somebody unlinks it.

    python -m pyshare._holder NAME < descriptor of the region

Lives here: starting one (keep), telling one (holders), and what it does.  It
is a participant like any other, a daemon without terminal, output, or parent.
It ends when its name leads elsewhere or nowhere, however that came (fcntl(2),
F_NOTIFY: a signal at each change of the names' directory), or at SIGTERM.
Invariant: it never outlives the name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys

import psutil

from pyshare import _names
from pyshare._errors import ShareError
from pyshare._region import Region, attach

_MODULE = "pyshare._holder"
_READY = "holding\n"
_BACKSTOP = 10.0  # seconds until it looks after its name though nobody has told it to


def keep(region: Region) -> None:
    """A process that will hold this named region until it is unlinked does so when this returns.

    Blocks for as long as an interpreter takes to start; without effect where there is such a process already.

    Raises:
        OSError: none can be started.
        ShareError: it could not attach; the message says why.
    """
    if holders(region):
        return
    command = [sys.executable, "-P", "-m", _MODULE, str(region.name)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        command, stdin=region.fileno(), capture_output=True, text=True, cwd="/", env=environment, check=False
    )
    if done.stdout != _READY:
        reason = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise ShareError(f"no process keeps region {region.name!r}: {reason}")


def is_holder(process: psutil.Process) -> bool:
    """Is this participant one of ours?"""
    with contextlib.suppress(psutil.Error):
        return _MODULE in process.cmdline()
    return False


def holders(region: Region) -> list[int]:
    """The pids of those that keep it."""
    found = ((one.pid, one.process()) for one in region.participants())
    return [pid for pid, process in found if process is not None and is_holder(process)]


def _hold(name: str) -> None:
    """Until the name is gone, or SIGTERM comes."""
    signals = {signal.SIGTERM, signal.SIGIO}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # so that none is lost before the first wait
    directory = os.open(_names.DIRECTORY, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a kernel without it leaves us the backstop
        fcntl.fcntl(directory, fcntl.F_NOTIFY, fcntl.DN_DELETE | fcntl.DN_RENAME | fcntl.DN_MULTISHOT)
    with attach(0) as region, _names.of_region(name, region.fileno()) as entry:
        if entry < 0:
            sys.exit(f"the name {name!r} does not lead to it any more")
        _vanish()
        while os.fstat(entry).st_nlink:
            told = signal.sigtimedwait(signals, _BACKSTOP)
            if told is not None and told.si_signo == signal.SIGTERM:
                break


def _vanish() -> None:
    """Tell who started us, and let go of what is theirs."""
    null = os.open(os.devnull, os.O_RDWR)
    os.write(1, _READY.encode())
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)


def main() -> None:
    """In the new process; its child stays, so that nobody has to wait for it."""
    if os.fork():
        os._exit(0)
    os.setsid()
    _hold(sys.argv[1])


if __name__ == "__main__":
    main()
