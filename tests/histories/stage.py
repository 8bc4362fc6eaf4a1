"""What all processes of an episode have from the beginning: the plan, the region, the ways to each other.

Lives here: Stage, made by the conductor and inherited by all that it forks.  Not here: what they do with it.
Invariant: the descriptors of the harness have numbers from RESERVED on, so that a program's closerange leaves them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket

import pyshare
from histories.plan import Plan

RESERVED = 600


class Stage:
    """Sockets and counters: those of thread N are the N-th; of actor N the N-th."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self.plan, self.folder = plan, folder
        self.threads = sum(len(actor["threads"]) for actor in plan["actors"])
        self._board = mmap.mmap(-1, mmap.PAGESIZE)
        self._counters = memoryview(self._board).cast("Q")
        pairs = [reserved_pair(socket.SOCK_DGRAM) for _ in range(self.threads)]
        self.way_senders, self.way_receivers = [a for a, _ in pairs], [b for _, b in pairs]
        pairs = [reserved_pair(socket.SOCK_DGRAM) for _ in range(self.threads)]
        self.box_senders, self.box_receivers = [a for a, _ in pairs], [b for _, b in pairs]
        self.errors = reserve(os.open(os.path.join(folder, "stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        self.region = self._create()

    def _create(self) -> pyshare.Region:
        plan = self.plan
        name = f"histories-{os.getpid()}-{plan['seed']}" if plan["named"] else None
        region = pyshare.create(
            name,
            size=(plan["pages"] + plan["bulk"]) * 4096 + plan["tail"],
            prot=plan["prot"],
            engine=plan["engine"],
            max_participants=plan["room"] or 64,
        )
        plan["has_uffd"] = region.engine == "uffd" or plan["engine"] == "mprotect"
        if plan["stripes"]:
            others = set(range(plan["pages"])) - set(plan["hot"])
            for page in range(0, plan["pages"], 2):
                if page in others:
                    region.mprotect(page * 4096, 4096, pyshare.NONE)
        if plan["bulk"]:
            region.mprotect(plan["pages"] * 4096, plan["bulk"] * 4096, pyshare.READ)
        return region

    # -- The board -----------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """All are to come to their end."""
        self._counters[0] = 1

    def is_over(self) -> bool:
        return bool(self._counters[0])

    def tell_ready(self, actor: int) -> None:
        self._counters[1 + actor] = 1

    def is_ready(self, actor: int) -> bool:
        return bool(self._counters[1 + actor])

    def reset(self, actor: int) -> None:
        """Before its next life."""
        self._counters[1 + actor] = self._counters[192 + actor] = 0

    def tell_handled(self, actor: int, number: int) -> None:
        self._counters[64 + 2 * actor + (number == signal.SIGINT)] += 1

    def handled(self, actor: int, number: int) -> int:
        """How many signals of that number a handler of the actor has been called for, in all of its lives."""
        return self._counters[64 + 2 * actor + (number == signal.SIGINT)]

    def tell_pouring(self, actor: int, pid: int) -> None:
        """The process is in a large store; 0: it is over."""
        self._counters[128 + actor] = pid

    def pouring(self, other_than: int) -> int:
        """One that is, or 0."""
        pids = (self._counters[128 + actor] for actor in range(len(self.plan["actors"])) if actor != other_than)
        return next((pid for pid in pids if pid), 0)

    def tell_lost(self, actor: int) -> None:
        """One of its threads was ended alone, and all others are through."""
        self._counters[192 + actor] = 1

    def is_lost(self, actor: int) -> bool:
        return bool(self._counters[192 + actor])

    def tell_through(self) -> None:
        """Nobody is left but who has lost a thread."""
        self._counters[63] = 1

    def is_through(self) -> bool:
        return bool(self._counters[63])

    def close(self) -> None:
        for one in (*self.way_senders, *self.way_receivers, *self.box_senders, *self.box_receivers):
            one.close()
        os.close(self.errors)


def reserve(fd: int) -> int:
    """The descriptor has a number of the harness's from now on."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, RESERVED)
    os.close(fd)
    return high


def reserved_pair(kind: int) -> tuple[socket.socket, socket.socket]:
    """Of connected sockets, whose numbers are the harness's."""
    pair = socket.socketpair(socket.AF_UNIX, kind)
    one, other = (socket.socket(each.family, each.type, fileno=reserve(each.detach())) for each in pair)
    return one, other
