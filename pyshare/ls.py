"""The regions that there are, with and without names; stale names and those that may not be seen are marked.

Lives here: the list, for people and for programs.
Not here: how regions are found and looked at (_status.py).

A region is listed by its name, or, where it has none any more or never had one, by the descriptor of some process that
may be looked into.  Nothing is removed, stale names neither: ``pyshare unlink`` does that.

``--json`` prints one object: ``regions``, a list, and ``unsearched``, how many processes may not be looked into, so
that regions without a name may be missing.  Of a region: ``name`` (null: it has none), ``label`` (its name, or "(inode
N)"), ``state`` ("live"; "unnamed"; "stale": its last holder is gone; "hidden": it may not be looked at, and ``why``
says why), ``stale``, ``user``; then, null where that is not to be seen, ``size`` and ``used`` (bytes; used: of memory,
with the control segment and snapshots), ``participants`` (how many; of them ``running``, ``stopped``, ``dead``:
killed, which nobody has noticed yet, ``foreign``: in another pid namespace, ``joining``, ``unseen``: not in /proc),
``pids``, ``engine``, ``generation``, ``leases`` (held), ``kept_by`` (pids of processes that do nothing but keep it).

The exit status is 0, also where there is nothing to list.
"""

from __future__ import annotations

import argparse
import json
import sys

from rich.text import Text

from pyshare import _observer, _status
from pyshare._status import Found

NAME = "ls"

COLUMNS = ("NAME", ">SIZE", ">USED", ">PARTICIPANTS", "ENGINE", ">GENERATION", ">LEASES", "NOTE")
STYLES = {"live": "bold", "unnamed": "cyan", "stale": "yellow", "hidden": "dim"}


def note(one: Found) -> str:
    """What is to be said of it."""
    said = [] if one.state == "live" else [one.state]
    said += [one.why] if one.why else []
    if one.look:
        said += [f"{one.look.count(status)} {status}" for status in _status.STATUSES[1:] if one.look.count(status)]
        said += [f"kept by pid {pid}" for pid in one.look.kept_by]
    return "; ".join(said)


def row(one: Found) -> list[str | Text]:
    """Cells."""
    name = Text(one.label, STYLES[one.state])
    seen = one.look
    if seen is None:
        return [name, *["-"] * (len(COLUMNS) - 2), note(one)]
    return [
        name,
        _observer.size(seen.size),
        _observer.size(seen.used),
        str(len(seen.participants)),
        seen.engine or "-",
        str(seen.generation),
        str(seen.leases),
        note(one),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ls``."""
    parser.add_argument("--json", action="store_true", help="print one object, for a program to read")


def run(arguments: argparse.Namespace) -> int:
    """Lists them once."""
    found, unsearched = _status.regions()
    with _observer.to_who_listens():
        if arguments.json:
            json.dump({"regions": [one.plain() for one in found], "unsearched": unsearched}, sys.stdout, indent=1)
            print()
            return 0
        console = _observer.console()
        if found:
            console.print(_observer.table(COLUMNS, map(row, found)))
        else:
            console.print("There are no regions.")
        if unsearched:
            others = _observer.counted(unsearched, "process", "processes")
            console.print(f"{others} may not be looked into by you: what only they have, without a name, is not shown.")
    return 0
