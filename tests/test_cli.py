"""The commands that look: ls, show, top, metrics, and the one that removes, unlink; each on a region with a crowd.

In the crowd are one who holds, one who waits, one who was killed with a lease and a lock and whom nobody has noticed,
one who is stopped, and one of another pid namespace.  Whatever is asked of it, the crowd stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, PATIENCE, Child, idle, until
from kernel import LOCKS, PAGE, SECTIONS, elsewhere, libc, word

import pyshare
from pyshare import (
    READ,
    READ_WRITE,
    PropagationTimeout,
    Region,
    _core,
    _holder,
    _observer,
    _status,
    _unlink,
    metrics,
    show,
    top,
)
from pyshare import ls as listing
from pyshare.__main__ import COMMANDS, main

Fork = Callable[..., Child]
Joined = Callable[..., Child]
NAME = f"cli{os.getpid()}"
PAGES = 16
NOBODY = 65534
BINARY = [sys.executable, "-m", "pyshare"]
AT_ONCE = 0.05  # a timeout that is meant to run out

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")


@dataclasses.dataclass
class Crowd:
    """A region and who takes part in it."""

    region: Region
    waiter: Child
    killed: Child
    stopped: Child
    foreign: int | None  # its pid here; None: not permitted on this machine


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(NAME, size=PAGES * PAGE, max_participants=32, engine=request.param) as made:
        made.mprotect(0, made.size, READ)
        yield made
    with contextlib.suppress(pyshare.RegionNotFound):  # or who keeps it would be left
        pyshare.unlink(NAME)


def wait_for_lock(region: Region) -> Callable[[Child], None]:
    """A body: says when it begins to wait, and ends when it has had the lock."""

    def body(child: Child) -> None:
        child.say()
        region.lock(5, timeout=None).release()

    return body


@pytest.fixture
def crowd(region: Region, fork: Fork, joined: Joined) -> Iterator[Crowd]:
    def hold(child: Child) -> None:
        with region.lock(9), region.lease(2 * PAGE, 2 * PAGE):
            idle(child)

    stopped = joined()
    stopped.stop()
    inner: tuple[Child, int] | None = None
    with contextlib.suppress(pytest.skip.Exception):
        inner = elsewhere(fork, idle)
        assert inner[0].hear() == "ok"
    killed = joined(hold)
    with region.lock(5), region.lease(0, PAGE):
        waiter = joined(wait_for_lock(region))
        killed.kill()
        killed.wait()
        until(lambda: row_of(seen(), waiter.pid)["waits_for"])
        yield Crowd(region, waiter, killed, stopped, inner[1] if inner else None)
    stopped.resume()
    if inner:
        inner[0].say()
        assert inner[0].wait() == 0


def run(*arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command, run by this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(str(end.code))
    return status, output.getvalue(), errors.getvalue()


def apart(*arguments: str) -> tuple[int, str]:
    """(exit status, stdout) of a command that forks."""
    done = subprocess.run([*BINARY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PATIENCE)
    return done.returncode, done.stdout.decode()


def asked(*arguments: str) -> Any:
    """What --json gives, of a command that succeeds."""
    status, output, errors = run(*arguments, "--json")
    assert (status, errors) == (0, "")
    return json.loads(output)


def seen() -> dict[str, Any]:
    return dict(asked("show", NAME))


def row_of(look: dict[str, Any], pid: int) -> dict[str, Any]:
    (found,) = (one for one in look["participants"] if one["pid"] == pid)
    return dict(found)


def listed(name: str) -> dict[str, Any]:
    (found,) = (one for one in asked("ls")["regions"] if one["name"] == name)
    return dict(found)


def entry(name: str) -> Path:
    return Path(f"/dev/shm/pyshare.{name}")


def make_stale(fork: Fork, name: str) -> None:
    """A name whose holder was killed."""
    holder = fork(lambda child: (pyshare.create(name, size=PAGE), idle(child)))
    assert holder.hear() == "ok"
    holder.kill()
    holder.wait()
    assert entry(name).exists()


def as_nobody(body: Callable[[Child], object]) -> Callable[[Child], None]:
    """Without any privilege, and as debuggable as a process is that has been so from the start."""

    def become(child: Child) -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
        body(child)

    return become


# -- Every command, and the crowd --------------------------------------------------------------------------------------

EVERY = [
    ["ls"],
    ["ls", "--json"],
    ["show", NAME],
    ["show", NAME, "--json"],
    ["top", "--count", "1", "--interval", "0.01"],
    ["top", NAME, "--count", "1", "--interval", "0.01"],
    ["top", NAME, "--count", "2", "--interval", "0.01", "--json"],
    ["metrics"],
    ["metrics", "--json"],
    ["map", NAME],
    ["map", NAME, "--json"],
    ["trace", NAME, "--since", "0", "--count", "1"],
    ["trace", NAME, "--since", "0", "--count", "1", "--json"],
    ["doctor"],
    ["doctor", "--json"],
    ["bench", "--quick", "--rounds", "1", "--participants", "1", "lock"],
    ["bench", "--quick", "--rounds", "1", "--participants", "1", "--json", "lock"],
]


def test_each_command_leaves_the_crowd_as_it_is(crowd: Crowd) -> None:
    """Nobody is noticed, woken, waited for or removed by who looks; what --json prints can be read."""
    before = [(one["pid"], one["status"]) for one in seen()["participants"]]
    for arguments in EVERY:
        status, output = apart(*arguments) if arguments[0] in ("doctor", "bench") else run(*arguments)[:2]
        assert status == 0, arguments
        if "--json" in arguments:
            documents = output.splitlines() if arguments[0] in ("top", "trace") else [output]
            assert all(json.loads(document) for document in documents)
        assert [(one["pid"], one["status"]) for one in seen()["participants"]] == before, arguments
    assert crowd.region.generation == 1
    assert {command.NAME for command in COMMANDS} - {"unlink"} == {arguments[0] for arguments in EVERY}


def test_the_crowd_is_shown(crowd: Crowd) -> None:
    """Who they are, how they are, and what they hold."""
    look = seen()
    expected = {os.getpid(): "running", crowd.waiter.pid: "running", crowd.killed.pid: "dead"}
    expected[crowd.stopped.pid] = "stopped"
    assert {pid: row_of(look, pid)["status"] for pid in expected} == expected
    foreign = [one for one in look["participants"] if one["status"] == "foreign"]
    assert bool(foreign) == bool(crowd.foreign)
    for one in foreign:
        assert (one["user"], one["page_tables"], one["command"]) == (None, None, "(in another pid namespace)")
    own = row_of(look, os.getpid())
    assert own["command"] == COMMAND
    assert own["page_tables"] > 0
    assert own["engine"] == crowd.region.engine == look["engine"]
    assert (own["leases"], [lock["index"] for lock in own["locks"]]) == (1, [5])
    assert 0 <= own["locks"][0]["seconds"] < PATIENCE
    assert 0 <= own["leased_seconds"] < PATIENCE
    killed = row_of(look, crowd.killed.pid)
    assert (killed["leases"], [lock["index"] for lock in killed["locks"]]) == (1, [9])
    assert killed["waits_for"] is None
    assert [(one["offset"], one["length"], one["pid"], one["dead"]) for one in look["leased"]] == [
        (0, PAGE, os.getpid(), False),
        (2 * PAGE, 2 * PAGE, crowd.killed.pid, True),
    ]
    assert look["leases"] == 1, "what the dead hold is over"
    until(lambda: row_of(seen(), crowd.waiter.pid)["waits_for"] == os.getpid())


def test_the_crowd_is_listed(crowd: Crowd) -> None:
    """A row for people, and one for programs."""
    row = listed(NAME)
    foreign = 2 if crowd.foreign else 0  # with the first of its namespace
    assert (row["state"], row["stale"], row["why"]) == ("live", False, None)
    assert (row["size"], row["generation"], row["leases"]) == (PAGES * PAGE, 1, 1)
    assert row["used"] == os.fstat(crowd.region.fileno()).st_blocks * 512
    assert (row["dead"], row["stopped"], row["foreign"]) == (1, 1, foreign)
    assert row["participants"] == len(row["pids"]) == sum(row[status] for status in _status.STATUSES)
    lines = run("ls")[1].splitlines()
    (line,) = (line for line in lines if line.split()[0] == NAME)
    assert "1 stopped; 1 dead" in line
    assert ("foreign" in line) == bool(foreign)
    assert lines[0].split()[:7] == ["NAME", "SIZE", "USED", "PARTICIPANTS", "ENGINE", "GENERATION", "LEASES"]


def test_show_says_what_it_cannot_know(crowd: Crowd) -> None:
    """In words, beneath the table."""
    lines = run("show", NAME)[1].splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert re.search(r"stopped .* \?", rows[str(crowd.stopped.pid)]) is None, "its page tables are known"
    assert "dead" in rows[str(crowd.killed.pid)]
    assert "(gone)" in rows[str(crowd.killed.pid)]
    assert any(line.startswith("dead: killed") for line in lines)
    assert any(line.startswith("foreign: in another pid namespace") for line in lines) == bool(crowd.foreign)
    assert any("who is dead: the next one is told" in line for line in lines)
    assert f"{os.getpid()} (" in rows[str(crowd.waiter.pid)]


# -- Who holds, and who waits ------------------------------------------------------------------------------------------


def test_leases_are_counted(region: Region, joined: Joined) -> None:
    """All that were ever taken, by whatever thread and process, also of those who have left; held ones exactly."""

    def take(child: Child) -> None:
        child.say()
        threads = [threading.Thread(target=take_many, args=[first]) for first in (4, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def take_many(first: int) -> None:
        for turn in range(500):
            region.lease((first + turn % 4) * PAGE, PAGE, window=turn % 2 == 0).release()

    assert joined(take).wait() == 0
    assert seen()["leases_taken"] == 1000
    with region.lease(0, PAGE), region.lease(PAGE, PAGE, window=True):
        look = seen()
        assert (look["leases_taken"], look["leases"]) == (1002, 2)
        assert row_of(look, os.getpid())["leases"] == 2
    look = seen()
    assert (look["leases"], row_of(look, os.getpid())["leased_seconds"]) == (0, None)
    with region.lease(0, PAGE), pytest.raises(pyshare.ShareError):
        region.lease(0, PAGE)
    assert seen()["leases_taken"] == 1003, "who got none does not count"


def test_who_waits_for_a_lease_has_none(region: Region, fork: Fork) -> None:
    """And has it since it got it, not since it came; whoever had its place before died with one."""

    def wait(child: Child) -> None:
        child.say()
        with region.lease(0, 2 * PAGE, timeout=None):
            idle(child)

    died = fork(lambda child: (region.lease(4 * PAGE, PAGE), child.say(), child.hear()))
    assert died.hear() == "ok"
    died.kill()
    died.wait()
    region.lease(4 * PAGE, PAGE).release()  # which notices it
    with region.lease(PAGE, PAGE):
        waiter = fork(wait)
        assert waiter.hear() == "ok"
        until(lambda: row_of(seen(), waiter.pid)["waits_for"] == os.getpid())
        row = row_of(seen(), waiter.pid)
        assert (row["leases"], row["leased_seconds"]) == (0, None)
        assert listed(NAME)["leases"] == 1
        before = time.monotonic()
    assert waiter.hear() == "ok"
    row = row_of(seen(), waiter.pid)
    assert row["leases"] == 1
    assert row["leased_seconds"] <= time.monotonic() - before + 0.02, "the clock is coarse"
    waiter.say()
    assert waiter.wait() == 0


def test_a_wait_is_one_through_all_its_calls(region: Region, fork: Fork) -> None:
    """A signal ends the sleep, its handler runs, and the wait goes on: since its beginning."""

    def wait(child: Child) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: child.say("signal"))
        child.say()
        region.lock(5, timeout=None).release()
        child.say("had it")
        child.hear()

    def waits() -> tuple[int, int]:
        return next((one.waits_for, one.waits_since) for one in _observer.slots(observer) if one.pid == waiter.pid)

    observer = _core.Observer(region.fileno())
    (mine,) = (one.owner for one in _observer.slots(observer))
    with region.lock(5):
        waiter = fork(wait)
        assert waiter.hear() == "ok"
        until(lambda: waits()[0] == mine)
        since = waits()[1]
        for _ in range(3):
            waiter.kill(signal.SIGUSR1)
            assert waiter.hear() == "signal"
        until(lambda: waits()[0] == mine)
        assert waits()[1] == since
    assert waiter.hear() == "had it"
    assert waits()[0] == 0
    waiter.say()
    assert waiter.wait() == 0


@pytest.mark.parametrize("region", ["mprotect"], indirect=True)
def test_who_is_waited_for_by_a_change(region: Region, joined: Joined, fork: Fork) -> None:
    """Somebody silent, for whose acknowledgement it waits; then the holder of a lease."""
    silent = joined()

    def change(child: Child) -> None:
        child.say()
        with contextlib.suppress(PropagationTimeout):
            region.mprotect(4 * PAGE, PAGE, READ_WRITE, timeout=None)

    silent.stop()
    changer = fork(change)
    assert changer.hear() == "ok"
    until(lambda: row_of(seen(), changer.pid)["waits_for"] == silent.pid)
    look = seen()
    assert (look["under_way"]["offset"], look["under_way"]["length"]) == (4 * PAGE, PAGE)
    assert row_of(look, silent.pid)["late"] == 1
    assert [(one["pid"], one["kind"], one["offset"]) for one in look["closers"]] == [(changer.pid, "change", 4 * PAGE)]
    until(lambda: seen()["writer"] == changer.pid)  # it lets go once a second, and takes it again
    silent.resume()
    assert changer.wait() == 0
    with region.lease(4 * PAGE, PAGE):
        changer = fork(change)
        assert changer.hear() == "ok"
        until(lambda: row_of(seen(), changer.pid)["waits_for"] == os.getpid())
        assert "keeps leases away from 4 KiB at 0x4000" in run("show", NAME)[1]
    assert changer.wait() == 0
    assert seen()["closers"] == []


def test_freezes_and_snapshots_are_shown(region: Region) -> None:
    region.mprotect(0, PAGE, READ_WRITE)
    with region.snapshot() as snapshot:
        assert [(one["area"], one["generation"]) for one in seen()["snapshots"]] == [(0, snapshot.generation)]
    with region.frozen():
        look = seen()
        assert look["freeze"]["pid"] == os.getpid()
        assert [one["kind"] for one in look["closers"]] == ["freeze"]
        assert f"frozen by pid {os.getpid()}" in run("show", NAME)[1]
    assert seen()["freeze"] is None


def test_garbage_is_no_harm(region: Region) -> None:
    """A control segment is written by others: whatever stands there, the commands tell of it and end well."""
    source = random.Random(3)
    locks, slots = (word(region, SECTIONS + 24 * (kind - 1) + 8, "Q") for kind in (LOCKS, 1))
    kept = os.pread(region.fileno(), 64, slots + 3 * 64)
    for _ in range(20):
        os.pwrite(region.fileno(), source.randbytes(64 * 64), locks)
        os.pwrite(region.fileno(), source.randbytes(64), slots + 3 * 64)
        for arguments in (["show", NAME], ["ls"], ["metrics"], ["top", NAME, "--count", "1", "--interval", "0.01"]):
            assert run(*arguments)[0] == 0
    os.pwrite(region.fileno(), bytes(64 * 64), locks)
    os.pwrite(region.fileno(), kept, slots + 3 * 64)


# -- ls ----------------------------------------------------------------------------------------------------------------


def test_a_stale_name_is_marked_and_stays(fork: Fork) -> None:
    """Whichever command looks; unlink removes it, and says that it was one."""
    make_stale(fork, NAME)
    row = listed(NAME)
    assert (row["state"], row["stale"], row["size"], row["participants"]) == ("stale", True, None, None)
    assert f"{NAME} " in run("ls")[1]
    for command in ("show", "map", "trace", "top"):
        status, output, errors = run(command, NAME)
        assert (status, output) == (1, "")
        assert errors == f"pyshare {command}: the name '{NAME}' is stale: its last holder is gone; unlink removes it\n"
    assert run("metrics")[0] == 0
    assert entry(NAME).exists()
    assert run("unlink", NAME) == (0, f"{NAME}: removed; it was stale\n", "")
    assert not entry(NAME).exists()


def test_a_region_without_a_name_is_found(region: Region) -> None:
    """One that never had one, and one whose name was removed."""
    inode = os.fstat(region.fileno()).st_ino
    pyshare.unlink(NAME)
    with pyshare.create(size=3 * PAGE) as nameless:
        found = {tuple(one["pids"]): one for one in asked("ls")["regions"] if one["size"] == 3 * PAGE}
        assert found[(os.getpid(),)]["state"] == "unnamed"
        assert found[(os.getpid(),)]["why"] == f"pid {os.getpid()} has it"
        assert nameless.generation == 0
    (line,) = (line for line in run("ls")[1].splitlines() if line.startswith(f"(inode {inode})"))
    assert f"unnamed; pid {os.getpid()} has it; it was created as '{NAME}'" in line


@needs_root
def test_what_may_not_be_seen_is_said(fork: Fork) -> None:
    """To another user: whose it is, and why there is no more; and that there may be regions without names."""

    def look(child: Child) -> None:
        child.say(json.dumps([listed(NAME), run("ls"), run("show", NAME), asked("metrics"), asked("ls")["unsearched"]]))

    with pyshare.create(NAME, size=PAGE, mode=0o600):
        child = fork(as_nobody(look))
        row, plain, shown, numbers, unsearched = json.loads(child.hear())
        assert child.wait() == 0
    assert (row["state"], row["user"], row["size"]) == ("hidden", "root", None)
    assert "belongs to somebody else, whose mode keeps you out" in row["why"]
    assert "hidden" in plain[1]
    assert unsearched > 0
    assert re.search(r"\d+ process(es)? may not be looked into by you", plain[1])
    assert shown[0] == 1
    assert "mode keeps you out" in shown[2]
    samples = {one["labels"]["state"]: one["value"] for one in numbers["metrics"][0]["samples"]}
    assert samples["hidden"] >= 1


@needs_root
def test_an_unprivileged_process_of_the_same_user_sees_all(fork: Fork) -> None:
    """Each command; page tables, command lines and waits too."""

    def look(child: Child) -> None:
        with pyshare.create(NAME, size=PAGES * PAGE) as region:
            region.mprotect(0, PAGE, READ)
            other = Child(idle)
            assert other.hear() == "ok"
            nameless = pyshare.create(size=PAGE)
            outcomes = [run(*arguments)[0] for arguments in EVERY if arguments[0] not in ("bench", "doctor")]
            found = [one["state"] for one in asked("ls")["regions"] if one["pids"] and os.getpid() in one["pids"]]
            child.say(json.dumps([outcomes, seen(), found, other.pid]))
            nameless.close()
            other.end()
            child.say(json.dumps(run("unlink", NAME)))

    child = fork(as_nobody(look))
    outcomes, look_, found, other = json.loads(child.hear())
    assert set(outcomes) == {0}
    assert sorted(found) == ["live", "unnamed"]
    for pid in (child.pid, other):
        row = row_of(look_, pid)
        assert (row["user"], row["status"]) == ("nobody", "running")
        assert row["page_tables"] > 0
        assert row["command"] == COMMAND
    assert json.loads(child.hear())[0] == 0
    assert child.wait() == 0


# -- unlink ------------------------------------------------------------------------------------------------------------


def test_unlink_takes_names_away_and_leaves_the_crowd(crowd: Crowd) -> None:
    """Whoever has the region keeps it; the exit status says that one of the names could not be removed."""
    alive = sum(one["status"] != "dead" for one in seen()["participants"])
    status, output, errors = run("unlink", "nobodys", NAME, ".bad")
    assert status == 1
    assert output == f"{NAME}: removed; {alive} participants keep the region\n"
    assert "no region is called 'nobodys'" in errors
    assert "a name is 1 to 200 characters" in errors
    assert not entry(NAME).exists()
    assert crowd.region.read(0, 1) == b"\0"


def test_unlink_tells_programs(region: Region, fork: Fork) -> None:
    make_stale(fork, f"{NAME}.stale")
    status, output, errors = run("unlink", "--json", NAME, f"{NAME}.stale", "nobodys")
    assert (status, errors) == (1, "")
    live, stale, missing = json.loads(output)["names"]
    assert (live["was"], live["removed"], live["kept"], live["ended"], live["error"]) == ("live", True, 1, [], None)
    assert (stale["was"], stale["removed"], stale["kept"]) == ("stale", True, None)
    assert (missing["was"], missing["removed"]) == (None, False)
    assert "no region is called" in missing["error"]
    assert region.generation == 1


def test_unlink_ends_who_keeps_a_region(region: Region, joined: Joined) -> None:
    """It alone; ls says beforehand that it is kept, and by whom."""
    other = joined()
    _holder.keep(region)
    (pid,) = _holder.holders(region)
    assert listed(NAME)["kept_by"] == [pid]
    assert f"kept by pid {pid}" in run("ls")[1]
    assert row_of(seen(), pid)["keeper"]
    assert "keeps the region" in run("show", NAME)[1]
    said = f"{NAME}: removed; pid {pid}, which kept it, has ended; 2 participants keep the region\n"
    assert run("unlink", NAME) == (0, said, "")
    there = _status.look(_core.Observer(region.fileno()), region.fileno()).participants
    assert [(one.pid, one.status) for one in there] == [(os.getpid(), "running"), (other.pid, "running")]


def test_a_stopped_keeper_is_not_waited_for_for_ever(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when it is continued; who has its pid by then is left alone."""
    monkeypatch.setattr(_unlink, "PATIENCE_MS", 50)
    _holder.keep(region)
    (pid,) = _holder.holders(region)
    os.kill(pid, signal.SIGSTOP)
    assert json.loads(run("unlink", NAME, "--json")[1])["names"][0] == {
        "name": NAME, "removed": True, "was": "live", "ended": [], "kept": 2, "error": None,
    }  # fmt: skip
    os.kill(pid, signal.SIGCONT)
    until(lambda: _holder.holders(region) == [])
    assert _unlink.end(os.getpid()), "we are no keeper, and go on"


@needs_root
def test_unlink_of_another_users_name_is_refused(fork: Fork) -> None:
    def remove(child: Child) -> None:
        child.say(json.dumps(run("unlink", NAME)))

    with pyshare.create(NAME, size=PAGE):
        child = fork(as_nobody(remove))
        status, output, errors = json.loads(child.hear())
        assert (status, output) == (1, "")
        assert "belongs to somebody else" in errors
        assert child.wait() == 0
        assert entry(NAME).exists()


# -- top ---------------------------------------------------------------------------------------------------------------


def test_top_tells_rates(region: Region, joined: Joined) -> None:
    """Of a region, and of each participant: what was done between two looks."""

    def work(child: Child) -> None:
        child.say()
        child.hear()
        for _ in range(10):
            region.mprotect(0, PAGE, READ_WRITE)
            region.lease(PAGE, PAGE).release()
            region.lease(PAGE, PAGE).release()
        idle(child)

    lazy, busy = joined(), joined(work)
    all_, one = top.Regions(), top.Participants(NAME, _core.Observer(region.fileno()), region.fileno())
    all_.look(), one.look()
    busy.say()
    assert busy.hear() == "ok"
    regions, people = all_.look(), one.look()
    (row,) = (row for row in regions["regions"] if row["name"] == NAME)
    assert round(row["changes_per_second"] * regions["seconds"]) == 10
    assert round(row["leases_per_second"] * regions["seconds"]) == 20
    assert people
    assert round(row_of(people, busy.pid)["leases_per_second"] * people["seconds"]) == 20
    assert row_of(people, lazy.pid)["leases_per_second"] == 0
    lines = run("top", NAME, "--json", "--count", "2", "--interval", "0.05")[1].splitlines()
    assert [json.loads(line)["seconds"] >= 0.05 for line in lines] == [True, True]


@pytest.mark.parametrize("region", ["mprotect"], indirect=True)
def test_top_tells_who_is_slow(region: Region, joined: Joined) -> None:
    """Somebody stopped, for the sake of whom a change has timed out."""
    other, slow = joined(), joined()
    slow.stop()
    observer = _core.Observer(region.fileno())
    subject = top.Participants(NAME, observer, region.fileno())
    before = time.monotonic()
    with pytest.raises(PropagationTimeout):
        region.mprotect(0, PAGE, READ_WRITE, timeout=AT_ONCE)
    took = time.monotonic() - before
    with region.lock(3):
        look = subject.look()
    assert look
    assert row_of(look, slow.pid)["slowest"]["times"] == 1
    assert 0 < row_of(look, slow.pid)["slowest"]["seconds"] <= took, "from the posting on, which is after the call"
    assert row_of(look, other.pid)["slowest"] is None
    again = subject.look()
    assert again
    assert row_of(again, slow.pid)["slowest"] is None, "it is of the interval"
    slow.resume()
    region.mprotect(0, PAGE, READ)


def test_top_ends_with_the_region(fork: Fork) -> None:
    """0, or 1 where it was to show more."""
    holder = fork(lambda child: (pyshare.create(NAME, size=PAGE), idle(child)))
    assert holder.hear() == "ok"
    watcher = subprocess.Popen(
        [*BINARY, "top", NAME, "--json", "--interval", "0.01", "--count", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watcher.stdout is not None
    json.loads(watcher.stdout.readline())
    holder.say()
    _, errors = watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 1
    assert errors == "pyshare top: the region has ended: its last participant is gone\n"


@pytest.mark.parametrize("ending", [b"q", b"\x03"])
def test_top_on_a_terminal(region: Region, ending: bytes) -> None:
    """It draws until a key ends it, and leaves the terminal as it was."""
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    watcher = subprocess.Popen(
        [*BINARY, "top", "--interval", "0.05"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        preexec_fn=lambda: libc.ioctl(0, 0x540E, 0),  # TIOCSCTTY: Ctrl-C is a signal to it
    )  # fmt: skip
    drawn = b""
    while drawn.count(NAME.encode()) < 3:
        assert select.select([controller], [], [], PATIENCE)[0]
        drawn += os.read(controller, 65536)
    assert b"CHANGES/S" in drawn
    os.write(controller, ending)
    assert watcher.wait(PATIENCE) == 0
    assert termios.tcgetattr(terminal) == before
    os.close(controller)
    os.close(terminal)
    assert region.generation == 1


def test_top_without_a_terminal_prints_lines(region: Region) -> None:
    output = run("top", "--count", "2", "--interval", "0.01")[1]
    assert output.count("CHANGES/S") == output.count(f"\n{NAME} ") == 2
    assert "\x1b" not in output
    assert region.generation == 1


# -- metrics -----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> dict[tuple[str, str], float]:
    """{(name, status or ""): value} of the samples of our region."""
    parser = pytest.importorskip("prometheus_client.parser")
    return {
        (one.name, one.labels.get("status", "")): one.value
        for family in parser.text_string_to_metric_families(text)
        for one in family.samples
        if one.labels.get("region") == NAME
    }


def test_metrics_of_the_crowd(crowd: Crowd) -> None:
    """In Prometheus' own words."""
    numbers = parsed(run("metrics")[1])
    assert numbers["pyshare_region_size_bytes", ""] == PAGES * PAGE
    assert numbers["pyshare_region_used_bytes", ""] == os.fstat(crowd.region.fileno()).st_blocks * 512
    assert numbers["pyshare_changes_total", ""] == 1
    assert numbers["pyshare_leases_taken_total", ""] == 2
    assert numbers["pyshare_leases", ""] == 1
    assert numbers["pyshare_locks", ""] == 2
    assert numbers["pyshare_participants", "dead"] == 1
    assert numbers["pyshare_participants", "stopped"] == 1
    until(lambda: parsed(run("metrics")[1])["pyshare_waiting_participants", ""] == 1)


def test_metrics_are_served(region: Region) -> None:
    """Anew at each request, to several at a time, until Ctrl-C."""
    pytest.importorskip("prometheus_client")
    command = [*BINARY, "metrics", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = server.stderr.readline()
        found = re.fullmatch(r"pyshare metrics: serving (http://127\.0\.0\.1:\d+/metrics)\n", told)
        assert found, told

        def ask() -> dict[tuple[str, str], float]:
            with urllib.request.urlopen(found[1], timeout=PATIENCE) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                return parsed(answer.read().decode())

        assert ask()["pyshare_changes_total", ""] == 1
        region.mprotect(0, PAGE, READ_WRITE)
        answers: list[float] = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask()["pyshare_changes_total", ""])) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert answers == [2.0] * 4
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 130


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:9184", ("127.0.0.1", 9184)),
        (":9184", ("", 9184)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert metrics.address(text) == parts


@pytest.mark.parametrize("text", ["9184", "::1:80", "host:", "host:99999", "host:x", "[::1]"])
def test_what_is_no_address_is_refused(text: str) -> None:
    status, _, errors = run("metrics", "--listen", text)
    assert status == 2
    assert f"{text!r}: expected HOST:PORT" in errors


def test_an_address_in_use(region: Region) -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, errors = run("metrics", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert status == 1
    assert "Address already in use" in errors
    assert region.generation == 1


def test_metrics_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = "pyshare metrics needs prometheus-client: say pip install 'pyshare[metrics]'\n"
    assert run("metrics") == (1, "", message)


# -- How it is told ----------------------------------------------------------------------------------------------------


def test_what_programs_read_is_documented(crowd: Crowd) -> None:
    """Each field stands in the docstring of its module."""
    look, row = seen(), listed(NAME)
    for field in [*look, *look["participants"][0]]:
        assert f"``{field}``" in str(show.__doc__), field
    for field in row:
        assert f"``{field}``" in str(listing.__doc__), field
    (line,) = run("top", "--json", "--count", "1", "--interval", "0.01")[1].splitlines()
    (row,) = (one for one in json.loads(line)["regions"] if one["name"] == NAME)
    for field in [*json.loads(line), *row]:
        assert f"``{field}``" in str(top.__doc__) + str(listing.__doc__), field
    assert crowd.region.generation == 1


@pytest.mark.parametrize("command", [["ls"], ["show", NAME], ["top", "--count", "1"], ["metrics"], ["unlink", NAME]])
def test_a_reader_that_has_gone_is_no_error(region: Region, command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*BINARY, *command], stdout=write, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert region.generation == 1


def test_nothing_to_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever regions other programs have."""
    monkeypatch.setattr(_status, "regions", lambda: ([], 0))
    assert run("ls")[1].startswith("There are no regions.")
