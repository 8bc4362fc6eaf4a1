"""The checker of histories: its oracle finds what it is for and nothing else, its parts keep what they say.

Histories here are written by hand, a line an operation.  The soak itself is `make soak`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Child, until
from histories import coverage, oracle, plan, shorten, soak, words
from histories import history as histories
from histories.facts import Facts
from histories.history import History, Life, Op
from histories.log import Log, read

MS = 1_000_000


class Told:
    """A history that is told: processes a0.1 and a1.1 with one thread each, two hot pages, READ at first."""

    def __init__(self, prot: int = words.READ_WRITE, policy: str = "raise") -> None:
        actor = {"threads": [{"kind": "plain", "steps": []}], "extras": [], "policy": policy}
        self.history = History(
            {"seed": 0, "hot": [0, 1], "prot": prot, "actors": [actor, actor], "stripes": False, "points": False},
            [],
            {name: Life(name, pid, policy, None, 0, 100_000 * MS, status=0) for name, pid in self.PIDS.items()},
            [],
            [(0, "end", [])],
            [],
        )

    PIDS = {"a0.1": 100, "a1.1": 101}  # noqa: RUF012

    def op(
        self, who: int, kind: str, *args: Any, at: tuple[float, float], out: str | None = words.OK, value: Any = None
    ) -> str:
        """One operation of an actor; its times are milliseconds."""
        process = f"a{who}.1"
        name = f"{process}={who}:{len(self.history.ops)}"
        begin, end = (round(each * MS) for each in at)
        self.history.ops.append(
            Op(name, process, f"{process}/0", f"{process}={who}", kind, list(args), begin, end, out, value)
        )
        return name

    def dies(self, who: int, at: float, status: int = -9) -> None:
        """Killed by the conductor."""
        life = self.history.lives[f"a{who}.1"]
        life.last, life.died, life.status = round(at * MS), round((at + 1) * MS), status
        self.history.notes.append((round(at * MS), "kill", [life.pid]))
        for op in self.history.ops:
            if op.process == life.name and op.outcome is None:
                op.end = life.died

    def findings(self) -> list[str]:
        self.history.ops.sort(key=lambda op: op.begin)
        return oracle.judge(self.history)


def page(cells: dict[int, int] | None = None, leased: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    """What is kept of a page, of two threads: two cells, two of children, three leased places."""
    values = [(cells or {}).get(at, 0) for at in range(4)] + list(leased)
    return b"".join(value.to_bytes(8, "little") for value in values)


def only(findings: list[str], what: str) -> None:
    """All of them are of that kind, and there is one."""
    assert findings
    assert all(what in finding for finding in findings), findings


# -- What memory held --------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_what_is_right() -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 2))
    told.op(1, words.LOAD, 0, 1, "read", "", at=(3, 4), value=page({0: 7}).hex())
    told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(5, 6), value=1)
    told.op(0, words.STORE, 0, "view", 8, 0, at=(7, 8), out=words.REFUSED)
    assert told.findings() == []


def test_a_load_finds_what_was_stored_over() -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 2))
    told.op(0, words.STORE, 0, "view", 8, 0, at=(3, 4))
    told.op(1, words.LOAD, 0, 1, "read", "", at=(5, 6), value=page({0: 7}).hex())
    only(told.findings(), "which was not there at that time")


@pytest.mark.parametrize(("outcome", "wrong"), [(words.OK, True), (words.REFUSED, False), (None, False)])
def test_the_zero_before_a_packed_value_stays_where_the_value_is_refused(outcome: str | None, wrong: bool) -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 2))
    told.op(1, words.CHANGE, 0, 1, words.READ, 3.0, at=(3, 5), value=1)
    told.op(0, words.STORE, 0, "pack", 8, 0, at=(4, 6), out=outcome)
    told.op(1, words.LOAD, 0, 1, "read", "", at=(7, 8), value=page().hex())
    assert ["which was not there" in finding for finding in told.findings()] == [True] * wrong


@pytest.mark.parametrize(("outcome", "what"), [(None, "nobody has stored"), (words.REFUSED, "has taken place")])
def test_a_load_finds_what_nobody_has_stored(outcome: str | None, what: str) -> None:
    told = Told()
    if outcome:
        told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(1, 2), value=1)
        told.op(0, words.STORE, 0, "view", 7, 0, at=(3, 4), out=outcome)
    told.op(1, words.LOAD, 0, 1, "read", "", at=(5, 6), value=page({0: 7}).hex())
    only(told.findings(), what)


def test_what_a_dead_process_was_storing_may_be_there_or_not() -> None:
    for cell in (7, 0):
        told = Told()
        told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 2), out=None)
        told.dies(0, 10)
        told.op(1, words.LOAD, 0, 1, "read", "", at=(12, 13), value=page({0: cell}).hex())
        assert told.findings() == []


# -- Rights ------------------------------------------------------------------------------------------------------------


def test_a_store_after_a_revocation() -> None:
    told = Told()
    told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(1, 2), value=1)
    told.op(0, words.STORE, 0, "view", 7, 0, at=(3, 4))
    only(told.findings(), "a store has succeeded that the map forbids")


def test_a_store_during_a_revocation_may_succeed_or_not() -> None:
    for outcome in (words.OK, words.REFUSED):
        told = Told()
        told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(1, 3), value=1)
        told.op(0, words.STORE, 0, "view", 7, 0, at=(2, 4), out=outcome)
        assert told.findings() == []


def test_a_grant_that_is_not_in_force() -> None:
    told = Told(words.READ)
    told.op(1, words.CHANGE, 0, 2, words.READ_WRITE, 3.0, at=(1, 2), value=1)
    told.op(0, words.STORE, 0, "view", 7, 0, at=(3, 4), out=words.REFUSED)
    only(told.findings(), "an access was refused that the map allows")


def test_the_later_generation_counts_whoever_returned_last() -> None:
    told = Told()
    told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(1, 5), value=1)
    told.op(0, words.CHANGE, 0, 2, words.READ_WRITE, 3.0, at=(2, 4), value=2)
    told.op(0, words.STORE, 0, "view", 7, 0, at=(6, 7))
    assert told.findings() == []
    told.op(0, words.STORE, 0, "view", 8, 0, at=(8, 9), out=words.REFUSED)
    only(told.findings(), "an access was refused that the map allows")


def test_a_revocation_that_timed_out_is_in_force_once_a_later_change_is() -> None:
    told = Told()
    told.op(1, words.CHANGE, 0, 1, words.READ, 0.001, at=(1, 3), out=words.TIMEOUT, value=[1, [100]])
    told.op(0, words.STORE, 0, "view", 7, 0, at=(4, 5))
    assert told.findings() == []
    told.op(1, words.CHANGE, 1, 1, words.READ, 3.0, at=(6, 7), value=2)
    told.op(0, words.STORE, 0, "view", 8, 0, at=(8, 9))
    only(told.findings(), "a store has succeeded that the map forbids")


def test_what_a_dead_process_changed_may_be_so_or_not() -> None:
    for outcome in (words.OK, words.REFUSED):
        told = Told()
        told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(1, 2), out=None)
        told.dies(1, 3)
        told.op(0, words.STORE, 0, "view", 7, 0, at=(10, 11), out=outcome)
        assert told.findings() == []


def test_a_page_changes_while_nobody_can_store() -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 8), out=None)
    told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(2, 3), value=1)
    told.op(1, words.LOAD, 0, 1, "read", "", at=(4, 5), value=page().hex())
    told.op(1, words.LOAD, 0, 1, "read", "", at=(6, 7), value=page({0: 7}).hex())
    told.dies(0, 8)
    only(told.findings(), "has changed while nobody could store")


def test_a_process_dies_without_a_forbidden_access() -> None:
    told = Told(policy="die")
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 8), out=None)
    told.dies(0, 8, status=-11)
    only(told.findings(), "died by SIGSEGV without a forbidden access")
    told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(2, 3), value=1)
    assert told.findings() == []


# -- Held things -------------------------------------------------------------------------------------------------------


def lease(
    told: Told, who: int, at: tuple[float, float, float, float], first: int = 0, count: int = 1, abandoned: bool = False
) -> str:
    """Taken between the first two times, released between the others."""
    name = told.op(who, words.LEASE, first, count, False, 3.0, at=at[:2], value=[abandoned])
    told.op(who, words.RELEASE, name, "release", at=at[2:])
    return name


def test_two_leases_of_a_page() -> None:
    told = Told(words.READ)
    lease(told, 0, (1, 2, 5, 6))
    lease(told, 1, (3, 4, 7, 8))
    only(told.findings(), "two were held at once")


def test_leases_one_after_the_other() -> None:
    told = Told(words.READ)
    lease(told, 0, (1, 2, 5, 6))
    lease(told, 1, (3, 5.5, 7, 8))
    lease(told, 1, (1, 2, 3, 4), first=1)
    assert told.findings() == []


def test_two_holders_of_a_lock() -> None:
    told = Told()
    for who, times in ((0, (1, 2, 5, 6)), (1, (3, 4, 7, 8))):
        name = told.op(who, words.LOCK, 0, 3.0, at=times[:2], value=[False])
        told.op(who, words.UNLOCK, name, "release", at=times[2:])
    only(told.findings(), "lock 0: two were held at once")


def test_a_change_of_pages_that_are_leased() -> None:
    told = Told(words.READ)
    lease(told, 0, (1, 2, 7, 8))
    told.op(1, words.CHANGE, 0, 2, words.READ_WRITE, 3.0, at=(3, 4), value=1)
    only(told.findings(), "was changed while it was leased")


@pytest.mark.parametrize("told_of", [True, False])
def test_the_next_holder_after_one_that_died(told_of: bool) -> None:
    told = Told(words.READ)
    told.op(0, words.LEASE, 0, 2, False, 3.0, at=(1, 2), value=[False])
    told.dies(0, 5)
    lease(told, 1, (10, 11, 12, 13), first=1, abandoned=told_of)
    findings = told.findings()
    assert findings == [] if told_of else all("the next one was not told" in each for each in findings) and findings


def test_nobody_died() -> None:
    told = Told(words.READ)
    lease(told, 0, (1, 2, 3, 4))
    lease(told, 1, (5, 6, 7, 8), abandoned=True)
    only(told.findings(), "was told of somebody who died, and nobody did since")


def test_a_death_is_told_of_once() -> None:
    told = Told(words.READ)
    told.op(0, words.LEASE, 0, 1, False, 3.0, at=(1, 2), value=[False])
    told.dies(0, 5)
    lease(told, 1, (10, 11, 12, 13), abandoned=True)
    assert told.findings() == []
    lease(told, 1, (14, 15, 16, 17), abandoned=True)
    only(told.findings(), "was told of somebody who died, and nobody did since")


def test_a_death_in_pages_between_hot_ones() -> None:
    """Only who leases those too is told."""
    told = Told(words.READ)
    told.history.plan["hot"] = [0, 9]
    told.op(0, words.LEASE, 0, 2, False, 3.0, at=(1, 2), value=[False])
    told.dies(0, 5)
    lease(told, 1, (10, 11, 12, 13), first=0, abandoned=True)
    lease(told, 1, (14, 15, 16, 17), first=1, abandoned=True)
    lease(told, 1, (18, 19, 20, 21), count=2, abandoned=True)
    assert told.findings() == []
    lease(told, 1, (22, 23, 24, 25), count=2, abandoned=True)
    only(told.findings(), "was told of somebody who died, and nobody did since")


def test_half_of_a_transaction() -> None:
    told = Told(words.READ)
    first = lease(told, 0, (1, 2, 7, 8))
    told.op(0, words.TRANSACT, first, 0, 1, 64, 7, "view", at=(3, 4))
    told.op(0, words.TRANSACT, first, 0, 1, 65, 7, "view", at=(4, 5))
    second = lease(told, 1, (9, 10, 13, 14))
    told.op(1, words.LOAD, 0, 1, "lease", second, at=(11, 12), value=page(leased=(7, 7, 0)).hex())
    only(told.findings(), "a lease found half of a transaction")


def test_half_of_a_transaction_that_was_interrupted_in_its_midst() -> None:
    """What it stored after that does not make it whole; the next one does."""
    told = Told(words.READ)
    first = lease(told, 0, (1, 2, 7, 8))
    for place, outcome in ((64, words.OK), (65, words.INTERRUPTED), (66, words.OK)):
        told.op(0, words.TRANSACT, first, 0, 1, place, 7, "view", at=(place - 61, place - 60), out=outcome)
    second = lease(told, 1, (9, 10, 20, 21))
    told.op(1, words.LOAD, 0, 1, "lease", second, at=(11, 12), value=page(leased=(7, 0, 7)).hex())
    assert told.findings() == []
    for place in (64, 65, 66):
        told.op(1, words.TRANSACT, second, 0, 1, place, 8, "view", at=(place - 51, place - 50))
    third = lease(told, 0, (22, 23, 26, 27))
    told.op(0, words.LOAD, 0, 1, "lease", third, at=(24, 25), value=page(leased=(8, 0, 8)).hex())
    assert any("a lease found half of a transaction" in finding for finding in told.findings())


def freeze(told: Told, who: int, at: tuple[float, float, float, float]) -> None:
    name = told.op(who, words.FREEZE, 3.0, at=at[:2], value=1)
    told.op(who, words.THAW, name, "release", at=at[2:])


def test_a_store_while_all_is_frozen() -> None:
    told = Told()
    freeze(told, 0, (1, 2, 7, 8))
    told.op(1, words.STORE, 0, "view", 7, 1, at=(3, 4))
    only(told.findings(), "a store has succeeded while all was frozen")


def test_a_store_around_a_freeze() -> None:
    told = Told()
    freeze(told, 0, (2, 3, 7, 8))
    told.op(1, words.STORE, 0, "view", 7, 1, at=(1, 4))
    told.op(1, words.STORE, 0, "view", 8, 1, at=(5, 6), out=words.REFUSED)
    assert told.findings() == []


def test_a_freeze_that_ran_out_of_time_was_there_until_it_was_undone() -> None:
    told = Told()
    told.op(0, words.FREEZE, 0.0, at=(2, 5), out=words.TIMEOUT, value=[None, [101]])
    told.op(1, words.STORE, 0, "view", 7, 1, at=(3, 4), out=words.REFUSED)
    assert told.findings() == []
    told.op(1, words.STORE, 0, "view", 8, 1, at=(8, 9), out=words.REFUSED)
    only(told.findings(), "an access was refused that the map allows")


# -- Images ------------------------------------------------------------------------------------------------------------


def snapshot(told: Told, who: int, at: tuple[float, float], *pages: bytes, crc: int = 1) -> str:
    """Taken then, and looked at ever after."""
    name = told.op(who, words.SNAPSHOT, 3.0, at=at, value=1)
    told.op(who, words.LOOK, name, "read", at=(90, 91), value=[b"".join(pages).hex(), crc])
    return name


def test_a_snapshot_of_no_moment() -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(2, 3))
    told.op(0, words.STORE, 1, "view", 8, 0, at=(4, 5))
    snapshot(told, 1, (1, 6), page(), page({0: 8}))
    only(told.findings(), "a snapshot is of no moment")


def test_a_snapshot_of_a_moment_in_between() -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(2, 3))
    told.op(0, words.STORE, 1, "view", 8, 0, at=(4, 5))
    snapshot(told, 1, (1, 6), page({0: 7}), page())
    assert told.findings() == []


def test_a_snapshot_in_the_middle_of_a_transaction() -> None:
    told = Told(words.READ)
    name = lease(told, 0, (1, 2, 7, 8))
    told.op(0, words.TRANSACT, name, 0, 1, 64, 7, "view", at=(3, 4))
    told.op(0, words.TRANSACT, name, 0, 1, 65, 7, "view", at=(5, 6))
    told.op(0, words.TRANSACT, name, 0, 1, 66, 7, "view", at=(6, 7))
    snapshot(told, 1, (0, 9), page(leased=(7, 0, 0)), page())
    only(told.findings(), "a snapshot is of no moment")


def test_a_snapshot_changes() -> None:
    told = Told()
    name = snapshot(told, 1, (1, 2), page(), page())
    told.op(0, words.STORE, 0, "view", 7, 0, at=(3, 4))
    told.op(0, words.LOOK, name, "read", at=(92, 93), value=[(page({0: 7}) + page()).hex(), 2])
    only(told.findings(), "a snapshot has changed")


def test_a_restored_region_is_the_image() -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 2))
    name = snapshot(told, 1, (3, 4), page({0: 7}), page())
    told.op(0, words.STORE, 0, "view", 8, 0, at=(5, 6))
    told.op(1, words.RESTORE, name, False, 3.0, at=(92, 93))
    told.op(1, words.LOAD, 0, 1, "read", "", at=(94, 95), value=page({0: 7}).hex())
    assert told.findings() == []
    told.op(1, words.LOAD, 0, 1, "read", "", at=(96, 97), value=page({0: 8}).hex())
    assert told.findings()


@pytest.mark.parametrize(("pages", "wrong"), [([0], False), ([], True)])
def test_dirty_since_a_generation(pages: list[int], wrong: bool) -> None:
    told = Told()
    told.op(1, words.CHANGE, 1, 1, words.READ, 3.0, at=(1, 2), value=1)
    told.op(0, words.STORE, 0, "view", 7, 0, at=(3, 4))
    told.op(1, words.DIRTY, "generation", 1, at=(5, 6), value=[pages, 0])
    assert [finding.split(":")[0].split("\n")[0] for finding in told.findings()] == (
        ["dirty(since generation 1) misses hot page 0"] if wrong else []
    )


def test_dirty_since_a_snapshot() -> None:
    told = Told()
    name = snapshot(told, 1, (1, 2), page(), page())
    told.op(0, words.STORE, 1, "view", 7, 0, at=(3, 4))
    told.op(1, words.DIRTY, "snapshot", name, at=(92, 93), value=[[1], 0])
    assert told.findings() == []
    told.op(1, words.DIRTY, "snapshot", name, at=(94, 95), value=[[0], 0])
    only(told.findings(), "dirty(since a snapshot) misses hot page 1")


# -- Time, outcomes, signals -------------------------------------------------------------------------------------------


def test_a_wait_in_vain() -> None:
    told = Told()
    told.op(0, words.SNAPSHOT, 3.0, at=(1, 3001), out=words.TIMEOUT, value=[None, [101]])
    only(told.findings(), "it waited in vain")
    told.history.stops.append((101, 500 * MS, 2900 * MS))
    assert told.findings() == []


@pytest.mark.parametrize(("stopped", "wrong"), [((50, 500), False), ((5, 500), True)])
def test_a_lock_that_who_waits_keeps_from_others(stopped: tuple[int, int], wrong: bool) -> None:
    """One that was stopped after it may have had it keeps it rightly; one that cannot have had it does not."""
    told = Told()
    name = told.op(1, words.LOCK, 0, 3.0, at=(1, 2), value=[False])
    told.op(1, words.UNLOCK, name, "release", at=(19, 20))
    name = told.op(0, words.LOCK, 0, 3.0, at=(3, 805), value=[False])
    told.op(0, words.UNLOCK, name, "release", at=(806, 807))
    told.op(1, words.LOCK, 0, 3.0, at=(100, 808), value=[False])
    told.history.stops.append((100, stopped[0] * MS, 800 * MS))
    assert ["was free for" in finding for finding in told.findings()] == [True] * wrong


@pytest.mark.parametrize(("stopped", "wrong"), [((50, 700), False), ((5, 700), True)])
def test_a_lock_that_who_waits_keeps_from_others_until_a_timeout(stopped: tuple[int, int], wrong: bool) -> None:
    told = Told()
    name = told.op(1, words.LOCK, 0, 3.0, at=(1, 2), value=[False])
    told.op(1, words.UNLOCK, name, "release", at=(19, 20))
    told.op(0, words.LOCK, 0, 3.0, at=(3, 705), value=[False])
    told.op(1, words.LOCK, 0, 0.5, at=(100, 601), out=words.TIMEOUT, value=[None, [100]])
    told.history.stops.append((100, stopped[0] * MS, stopped[1] * MS))
    assert ["was free for" in finding for finding in told.findings()] == [True] * wrong


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_lease_that_changes_overtake(overtaken: bool) -> None:
    """Those of the first 100 ms may come first, and those of other pages."""
    told = Told(words.READ)
    for turn in range(150):
        told.op(1, words.CHANGE, 0, 1, words.READ, 3.0, at=(10 + turn / 4, 10.2 + turn / 4), value=turn + 1)
        told.op(1, words.CHANGE, not overtaken, 1, words.READ, 3.0, at=(110 + turn, 110.5 + turn), value=turn + 200)
    name = told.op(0, words.LEASE, 0, 1, False, 3.0, at=(1, 400), value=[False])
    told.op(0, words.RELEASE, name, "release", at=(401, 402))
    assert ["changes of its pages came and went" in finding for finding in told.findings()] == [True] * overtaken


@pytest.mark.parametrize("nested", [False, True])
def test_a_lease_inside_a_lease_that_waits(nested: bool) -> None:
    """For another holder it may; where nobody has its pages it passes who waits for the first one."""
    for other, wrong in ((False, nested), (True, False)):
        told = Told(words.READ)
        if nested:
            lease(told, 0, (1, 2, 1500, 1501))
        if other:
            lease(told, 1, (1, 2, 900, 901), first=1)
        lease(told, 0, (10, 1000, 1100, 1101), first=1)
        told.op(1, words.FREEZE, 3.0, at=(5, 1600), value=1)
        assert ["a lease inside a lease" in finding for finding in told.findings()] == [True] * wrong


@pytest.mark.parametrize("wrong", [False, True])
def test_a_lease_inside_a_lease_beside_one_that_nobody_was_told_of(wrong: bool) -> None:
    """The waiter of a process may have one while another thread keeps the interpreter, as an access that waits does."""
    told = Told(words.READ, policy="wait")
    told.history.lives["a1.1"].policy = "wait"
    lease(told, 0, (1, 2, 1500, 1501))
    lease(told, 1, (3, 1000, 1001, 1002), first=1)
    if not wrong:
        told.op(1, words.LOAD, 0, 1, "view", "", at=(4, 999), out=words.REFUSED)
        told.history.ops[-1].thread = "a1.1=5"
    lease(told, 0, (10, 1005, 1100, 1101), first=1)
    assert any("a lease inside a lease" in finding for finding in told.findings()) == wrong


def ended(told: Told, who: int, at: float) -> None:
    """A thread alone; its process stays, and kills itself in the end."""
    told.history.notes.append((round(at * MS), "ended", [f"a{who}.1={who}"]))
    told.dies(who, 9000)


@pytest.mark.parametrize("kind", [words.LEASE, words.CHANGE])
def test_what_an_ended_thread_had_is_waited_for_where_that_is_a_lease(kind: str) -> None:
    told = Told(words.READ)
    if kind == words.LEASE:
        told.op(0, words.LEASE, 1, 1, False, 3.0, at=(1, 2), value=[False])
    told.op(0, words.CHANGE, 0, 1, words.READ, 3.0, at=(3, 4), out=None)
    told.op(1, words.CHANGE, 0, 2, words.READ, 3.0, at=(1000, 4001), out=words.TIMEOUT, value=[None, [100]])
    ended(told, 0, 5)
    assert ["it waited in vain" in finding for finding in told.findings()] == [True] * (kind == words.CHANGE)


@pytest.mark.parametrize("calls", [False, True])
def test_an_ended_agent_is_missed_by_the_next_call(calls: bool) -> None:
    told = Told(words.READ)
    told.history.plan["ends"] = True
    actors = told.history.plan["actors"]
    told.history.plan["actors"] = [
        {**actor, "ended": f"{step}=exit@1"} for actor, step in zip(actors, ["A1_wait", "C1_lock"], strict=True)
    ]
    told.op(0, words.CHANGE, 0, 1, words.READ, 3.0, at=(1, 2), value=1)
    for at in (1100, 2200, 3300) if calls else (1100,):  # after which it may have ended as well
        told.op(0, words.GENERATION, at=(at, at + 1), value=1)
    told.op(1, words.CHANGE, 1, 1, words.READ, 3.0, at=(1000, 4001), out=words.TIMEOUT, value=[2, [100]])
    told.op(1, words.GENERATION, at=(4002, 4003), value=2)
    assert ["it waited in vain" in finding for finding in told.findings()] == [True] * calls


def test_a_call_that_takes_too_long() -> None:
    told = Told()
    told.op(0, words.LEASE, 0, 1, False, 0.0, at=(1, 800), value=[False])
    told.op(0, words.GENERATION, at=(900, 901), value=0)
    only(told.findings(), "it took 0.80 s")
    told.history.notes.append((400 * MS, "late", [0.3]))
    assert told.findings() == []


def test_a_thread_beside_one_that_waits_with_the_interpreter() -> None:
    for thread in ("a0.1=5", "a1.1=1"):
        told = Told(policy="wait")
        told.history.lives["a0.1"].policy = "wait"
        told.op(0, words.LEASE, 1, 1, False, 0.0, at=(1, 800), value=[False])
        told.op(1, words.STORE, 0, "pack", 7, 0, at=(1, 800))
        told.history.ops[-1].process, told.history.ops[-1].thread = thread.split("=")[0], thread
        told.op(0, words.GENERATION, at=(900, 901), value=0)
        findings = told.findings()
        assert [finding.split("\n")[0] for finding in findings if "lease" in finding] == (
            [] if thread.startswith("a0") else ["it took 0.80 s"]
        )


def test_an_exception_that_belongs_nowhere() -> None:
    told = Told()
    told.op(0, words.LOAD, 0, 1, "read", "", at=(1, 2), out=words.WRONG, value=["AssertionError"])
    only(told.findings(), "an exception that does not belong there")


def test_a_signal_that_is_lost() -> None:
    told = Told()
    told.op(0, words.LOAD, 0, 1, "read", "", at=(1, 5000), value=page().hex())
    told.history.notes += [(10 * MS, "signal", [1, 100, 15]), (4000 * MS, "over", [])]
    assert any("handled never" in finding for finding in told.findings())


def test_datagrams_arrive_once() -> None:
    told = Told()
    for value in (5, 6, 7):
        told.op(0, words.SEND, 1, value, at=(value, value + 0.5))
    told.op(1, words.RECEIVE, 0, "recv_into", 5, 1, 3.0, at=(10, 11), value=8)
    told.op(1, words.RECEIVE, 0, "recv_into", 7, 1, 3.0, at=(12, 13), out=words.REFUSED)
    told.history.notes.append((20 * MS, "unread", [1, 7]))
    findings = [finding for finding in told.findings() if "datagram" in finding]
    assert len(findings) == 1
    assert "arrived 0 times" in findings[0]
    assert " 6)" in findings[0]


def test_a_value_arrives_as_a_whole() -> None:
    told = Told()
    told.op(1, words.RECEIVE, 0, "tls", 5, 1, 3.0, at=(10, 11), value=8)
    assert told.findings() == []
    told.op(1, words.RECEIVE, 0, "tls", 6, 1, 3.0, at=(12, 13), value=5)
    only(told.findings(), "it received 5 bytes of 8")


def test_something_is_left() -> None:
    told = Told()
    told.history.notes += [
        (1, "participants", [[4711]]),
        (1, "name", [True]),
        (1, "blocks", [0]),
        (2, "blocks", [1 << 22]),
    ]
    told.history.notes.append((3, "own", [{"fd": 3}, {"fd": 4}]))
    assert len(told.findings()) == 4


# -- The parts ---------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_its_plan() -> None:
    plans = [json.dumps(plan.devise(seed, 1.0)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_every_kind_of_step_is_devised_and_can_be_done() -> None:
    from histories.steps import Worker

    steps = [
        step["do"]
        for seed in range(40)
        for actor in plan.devise(seed, 1.0)["actors"]
        for thread in actor["threads"]
        for step in thread.get("steps", [])
    ]
    assert set(steps) == set(plan.ALL)
    assert all(hasattr(Worker, f"do_{name}") for name in plan.ALL)


def test_a_log_survives_its_writer(fork: Callable[..., Child], tmp_path: Path) -> None:
    path = str(tmp_path / "log")

    def body(child: Child) -> None:
        log = Log(path)
        log.end(log.begin("kind", 0, 1, b"two"), "ok", (3,))
        log.begin("kind", 0)
        child.say()
        child.hear()

    child = fork(body)
    assert child.hear() == "ok"
    child.kill()
    child.wait()
    assert [record[:2] for record in read(path)] == [(0, 1), (1, 1), (0, 2)]


def test_a_history_is_kept(tmp_path: Path) -> None:
    told = Told()
    told.op(0, words.STORE, 0, "view", 7, 0, at=(1, 2), out=None)
    path = str(tmp_path / "history.json.gz")
    histories.save(told.history, path)
    assert histories.open_saved(path) == told.history


def test_pairs_that_met() -> None:
    told = Told(words.READ)
    lease(told, 0, (1, 2, 5, 6))
    told.op(1, words.LOAD, 0, 1, "read", "", at=(3, 4), value=page().hex())
    told.op(1, words.LOAD, 1, 1, "read", "", at=(4, 5), value=page().hex())
    met = coverage.count(Facts(told.history))
    assert met[words.LOAD, words.LEASE] == 1
    assert "lease" in coverage.table(met)
    assert (words.LOAD, words.LEASE) not in coverage.missing(met)


def test_a_plan_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the one step that is to blame; which, a stand-in for the region says here."""
    long = plan.devise(3, 1.0)
    blamed = long["actors"][-1]["threads"][0]["steps"][5]

    def comes_again(shorter: plan.Plan, _wanted: set[str], _tries: int) -> bool:
        return any(blamed in thread.get("steps", []) for actor in shorter["actors"] for thread in actor["threads"])

    monkeypatch.setattr(shorten, "comes_again", comes_again)
    short = shorten.shorten(long, set(), 20.0, 1)
    assert [thread["steps"] for actor in short["actors"] for thread in actor["threads"]] == [[blamed]]
    assert short["troubles"] == []


# -- An episode --------------------------------------------------------------------------------------------------------


def test_an_episode_is_played_and_told() -> None:
    history = soak.play_aside(plan.devise(1, 0.3, only=["load", "generation"], calm=True))
    assert {op.kind for op in history.ops} >= {words.LOAD, words.GENERATION, words.CHANGE, words.CLOSE}
    assert history.strays == []
    assert [life.status for life in history.lives.values()] == [0] * len(history.lives)


def test_an_interrupted_soak_leaves_nothing(tmp_path: Path) -> None:
    """Neither a process nor a file; who is killed leaves its folder, and no process."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-m", "histories.soak", "--seed", "1", "--calm", "--only", "load,lock"],
            env=environment,
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        until(lambda process=process: len(psutil.Process(process.pid).children(recursive=True)) > 2)  # type: ignore[misc]
        theirs = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait()
        until(lambda theirs=theirs: not any(map(alive, theirs)))  # type: ignore[misc]
        assert number == signal.SIGKILL or list(tmp_path.iterdir()) == []


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


# -- Faults that were mended -------------------------------------------------------------------------------------------

FAULTS = sorted((Path(__file__).parent / "faults").glob("*.patch"))


@pytest.mark.parametrize("patch", FAULTS, ids=lambda patch: patch.stem)
def test_a_mended_fault_can_be_brought_back(patch: Path, tmp_path: Path) -> None:
    """The patches fit the sources (tests/faults/run.py says how long the soak takes to see each)."""
    root = Path(__file__).parent.parent
    for name in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.M):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    told = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "-d", tmp_path, "-i", patch], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout
