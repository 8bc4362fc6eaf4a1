"""One region: who takes part and how they are, who holds what and for how long, and who waits for whom.

Lives here: what is read of one region beyond its participants (_status.py), and the two forms of the answer.
Not here: page tables as they really are (map.py).

A participant is "running", "stopped" (by a signal, or a debugger), "dead" (killed; nobody has noticed yet, the next who
has to do with it will), "foreign" (in another pid namespace: its pid is nobody's here, so that its command line, user,
page tables, and whether it is stopped are not known), "joining", or "unseen" (not in /proc).  Page tables are those of
the whole process.  How long it has had leases is counted from the last moment at which it had none.  Of a process that
waits with several threads, one is told of.

``--json`` prints one object: ``name``, ``size``, ``used``, ``page_size`` (bytes), ``engine``, ``generation``,
``leases`` (held), ``leases_taken`` (ever), ``kept_by``; ``participants``, a list of ``pid``, ``slot`` (its place in
the table), ``status``, ``command``, ``user``, ``engine``, ``applied``, ``late`` (changes that it does not follow yet),
``fenced``, ``page_tables`` (bytes), ``leases``, ``leased_seconds``, ``leases_taken`` (with those of who had its place
before), ``locks`` (``index``, ``seconds``), ``waits_for`` (a pid), ``waits_seconds``, ``keeper`` (it does nothing but
keep the region); and of the whole ``writer`` (the pid that is changing something), ``under_way`` ({offset, length} of
a change that is not over), ``leased`` ({offset, length, pid, dead}), ``closers`` (changes, freezes and snapshots that
wait for leases or keep them away: {pid, kind, offset, length}), ``freeze`` ({pid, generation}), ``snapshots`` ({area,
state, generation}), ``violations`` (the latest 16 forbidden accesses, the newest last: {time in seconds since 1970,
pid, command, offset, protection, generation, outcome}; outcome is "died", "raised" or "waited", all as
``Region.violations`` has it).  Null: not known, or none.

The exit status is 0, or 1 where there is no such region to be seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from rich.text import Text

from pyshare import _core, _observer, _status
from pyshare._mapped import violations
from pyshare._observer import duration
from pyshare._status import Look, Participant

NAME = "show"

COLUMNS = ("PID", "STATUS", "ENGINE", ">APPLIED", ">PAGE TABLES", "LEASES", "LOCKS", "WAITS FOR", "USER", "COMMAND")
STYLES = {
    "running": "green",
    "stopped": "yellow",
    "dead": "bold red",
    "foreign": "cyan",
    "joining": "",
    "unseen": "dim",
}
VIOLATIONS = ("VIOLATION", ">PID", "OUTCOME", ">OFFSET", "PROTECTION", ">CHANGE", "COMMAND")
FEW = 6  # locks of one participant that are told


# -- What is read ----------------------------------------------------------------------------------


def whole(observer: _core.Observer) -> dict[str, Any]:
    """What is not of one participant."""
    table = _status.Table(observer)
    freeze, under_way = observer.freeze(), observer.under_way()

    def placed(first: int, count: int, **values: Any) -> dict[str, Any]:
        offset, length = _observer.in_bytes(observer, first, count)
        return {"offset": offset, "length": length, **values}

    def kind(owner: int, count: int, drain: bool) -> str:
        if drain:
            return "snapshot"
        return "freeze" if freeze and freeze[0] == owner and count == observer.pages() else "change"

    return {
        "writer": table.pid(observer.writer()),
        "under_way": placed(*under_way) if under_way else None,
        "leased": [
            placed(first, count, pid=table.pid(owner), dead=not table.alive(owner))
            for first, count, owner in observer.leases()
            if owner
        ],
        "closers": [
            placed(first, count, pid=table.pid(owner), kind=kind(owner, count, drain))
            for owner, first, count, drain in observer.closers()
        ],
        "freeze": {"pid": table.pid(freeze[0]), "generation": freeze[1] + 1} if freeze else None,
        "snapshots": [
            {"area": area, "state": state, "generation": moment} for area, state, moment in observer.snapshots()
        ],
        "violations": [
            {**dataclasses.asdict(one), "protection": _observer.protection(one.protection)}
            for one in violations(observer)
        ],
    }


def plain(name: str, seen: Look, rest: dict[str, Any]) -> dict[str, Any]:
    """For programs, as --json has it."""
    return {
        "name": name,
        "size": seen.size,
        "used": seen.used,
        "page_size": seen.page_size,
        "engine": seen.engine,
        "generation": seen.generation,
        "leases": seen.leases,
        "leases_taken": seen.leases_taken,
        "kept_by": seen.kept_by,
        "participants": [dataclasses.asdict(one) for one in seen.participants],
        **rest,
    }


# -- How it is told --------------------------------------------------------------------------------


def locks_of(one: Participant) -> str:
    """The latest that it took, and for how long."""
    told = [f"{lock.index} ({duration(lock.seconds)})" for lock in one.locks[:FEW]]
    return ", ".join(told + [f"{len(one.locks) - FEW} more"] * (len(one.locks) > FEW)) or "-"


def row(one: Participant) -> list[str | Text]:
    """Cells."""
    status = one.status + "; fenced" * one.fenced + "; keeps the region" * one.keeper
    return [
        str(one.pid),
        Text(status, STYLES[one.status]),
        one.engine,
        f"{one.applied}" + f" ({one.late} late)" * (one.late > 0),
        "?" if one.page_tables is None else _observer.size(one.page_tables),
        f"{one.leases} ({duration(one.leased_seconds)})" if one.leases else "-",
        locks_of(one),
        f"{one.waits_for} ({duration(one.waits_seconds)})" if one.waits_for else "-",
        one.user or "?",
        one.command,
    ]


def violation_row(one: dict[str, Any]) -> list[str]:
    """Cells."""
    return [
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["time"])),
        str(one["pid"]),
        one["outcome"],
        str(one["offset"]),
        one["protection"],
        "?" if one["generation"] is None else str(one["generation"]),
        _observer.printable(one["command"]) or "?",
    ]


def pages(place: dict[str, Any]) -> str:
    """Where it is."""
    return f"{_observer.size(place['length'])} at {place['offset']:#x}"


def who(pid: int | None) -> str:
    """By name."""
    return f"pid {pid}" if pid else "somebody who is gone"


def lines(rest: dict[str, Any]) -> list[str]:
    """What is held and what is going on."""
    told = []
    if rest["under_way"]:
        told.append(f"a change of {pages(rest['under_way'])} is under way, by {who(rest['writer'])}")
    for one in rest["closers"]:
        told.append(f"a {one['kind']} by {who(one['pid'])} keeps leases away from {pages(one)}")
    if rest["freeze"]:
        told.append(f"frozen by {who(rest['freeze']['pid'])} since change {rest['freeze']['generation']}")
    for one in rest["snapshots"]:
        moment = f", of change {one['generation']}" * (one["state"] != "preparing")
        told.append(f"snapshot {one['area']}: {one['state']}{moment}")
    for one in rest["leased"]:
        told.append(f"leased: {pages(one)}, by {who(one['pid'])}" + ", who is dead: the next one is told" * one["dead"])
    return told


MEANINGS = {
    "dead": "killed, which nobody has noticed yet; the next who has to do with it will",
    "foreign": "in another pid namespace: what its pid is here, and all that depends on it, is not known",
    "unseen": "not in this /proc",
}


def draw(observer: _core.Observer, seen: Look, rest: dict[str, Any]) -> None:
    """For people."""
    console = _observer.console()
    there = sum(one.status not in ("dead", "joining") for one in seen.participants)
    console.print(Text(_observer.title(observer, there, seen.generation), "bold"))
    console.print(
        f"{_observer.size(seen.used)} of memory used; {_observer.counted(seen.leases, 'lease')} held, "
        f"{seen.leases_taken:,} ever taken"
    )
    console.print(_observer.table(COLUMNS, map(row, seen.participants)))
    for line in lines(rest):
        console.print(Text(line))
    if rest["violations"]:
        console.print(_observer.table(VIOLATIONS, map(violation_row, rest["violations"])))
    for status, meaning in MEANINGS.items():
        if seen.count(status):
            console.print(Text(f"{status}: {meaning}", "dim"))


# -- The command -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``show``."""
    parser.add_argument("name", metavar="NAME", help="of the region")
    parser.add_argument("--json", action="store_true", help="print one object, for a program to read")


def run(arguments: argparse.Namespace) -> int:
    """Shows the region once."""
    with _observer.observed(arguments.name, NAME) as (observer, fd), _observer.to_who_listens():
        seen, rest = _status.look(observer, fd), whole(observer)
        if arguments.json:
            json.dump(plain(arguments.name, seen, rest), sys.stdout, indent=1)
            print()
        else:
            draw(observer, seen, rest)
    return 0
