"""Removes names: of regions, which whoever has them keeps; stale ones; and of those that a process was left to keep.

Lives here: the command, and the end of who does nothing but keep a region.
Not here: who may remove a name (_names.py).  (A module pyshare.unlink would take the place of the function.)

A region that is kept by a process of its own (``persist=True``) is gone with its name: that process is asked to end,
and waited for, five seconds at most.

``--json`` prints one object: ``names``, a list of ``name``, ``removed``, ``was`` ("live" or "stale"; null where it was
not removed), ``ended`` (pids of who kept it), ``kept`` (by how many participants, null where they cannot be seen), and
``error`` (why it was not removed, or null).

The exit status is 0 where every name was removed, and 1 where one was not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import select
import signal
import sys

import psutil

from pyshare import _holder, _names, _observer, _status
from pyshare._errors import RegionNotFound, ShareError

NAME = "unlink"

PATIENCE_MS = 5000  # for who is asked to end


@dataclasses.dataclass
class Outcome:
    """What became of one name."""

    name: str
    removed: bool = False
    was: str | None = None
    ended: list[int] = dataclasses.field(default_factory=list)
    kept: int | None = None
    error: str | None = None

    def told(self) -> str:
        """For people, of a name that was removed."""
        if self.was == "stale":
            return f"{self.name}: removed; it was stale"
        told = [f"{self.name}: removed", *(f"pid {pid}, which kept it, has ended" for pid in self.ended)]
        if self.kept:
            told.append(f"{_observer.counted(self.kept, 'participant keeps', 'participants keep')} the region")
        return "; ".join(told)


def end(pid: int) -> bool:
    """The keeper with this pid has ended when this returns True; who has its pid by now is left alone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if not _holder.is_holder(psutil.Process(pid)):
                return True
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(PATIENCE_MS))
    finally:
        os.close(pidfd)


def participants(name: str) -> list[_status.Participant] | None:
    """Of the region; None: they cannot be seen."""
    try:
        observer, fd = _observer.observe(name, _status.PATIENCE)
    except (ShareError, OSError):
        return None
    try:
        return _status.look(observer, fd).participants
    finally:
        os.close(fd)


def remove(name: str) -> Outcome:
    """One name, and who keeps it."""
    outcome = Outcome(name)
    try:
        _names.check(name)
        there, taking_part = _names.owner(name) is not None, participants(name)
        try:
            _names.unlink(name)
            outcome.was = "live"
        except RegionNotFound:
            if not there or _names.owner(name) is not None:
                raise
            outcome.was = "stale"
        outcome.removed = True
        if outcome.was == "live" and taking_part is not None:
            keepers = [one.pid for one in taking_part if one.keeper]
            outcome.ended = [pid for pid in keepers if end(pid)]
            alive = [one.pid for one in taking_part if one.status != "dead" and one.pid not in outcome.ended]
            outcome.kept = len(alive)
    except (ShareError, OSError, ValueError) as error:
        text, path = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
        outcome.error = f"{text}: {path}" if path else text
    return outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``unlink``."""
    parser.add_argument("names", metavar="NAME", nargs="+", help="of a region, or stale")
    parser.add_argument("--json", action="store_true", help="print one object, for a program to read")


def run(arguments: argparse.Namespace) -> int:
    """Removes them, one after the other."""
    outcomes = [remove(name) for name in arguments.names]
    with _observer.to_who_listens():
        if arguments.json:
            json.dump({"names": [dataclasses.asdict(one) for one in outcomes]}, sys.stdout, indent=1)
            print()
        else:
            for one in outcomes:
                if one.removed:
                    print(one.told())
                else:
                    print(f"pyshare unlink: {one.error}", file=sys.stderr)
    return 0 if all(one.removed for one in outcomes) else 1
