"""`pyshare map` draws what is: the map, everybody's real page tables, and every difference that is one.

Differences are made in earnest: a participant is stopped, or changes its own page tables behind pyshare's back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, PATIENCE, Child, idle
from kernel import PAGE, Runs, agreed, co_operative, libc, mapped, readable, word

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, PropagationTimeout, Prot, Region, _core
from pyshare import map as drawing
from pyshare.__main__ import main

Fork = Callable[..., Child]
Joined = Callable[..., Child]
NAME = f"mapped{os.getpid()}"
PAGES = 32
AT_ONCE = 0.05  # a timeout that is meant to run out

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(NAME, size=PAGES * PAGE - 100, max_participants=8, engine=request.param) as made:
        yield made


def seen(region: Region) -> dict[str, Any]:
    """As --json has it."""
    observer = _core.Observer(region.fileno())
    return drawing.plain(observer, drawing.look(observer))


def drawn(*arguments: str) -> list[str]:
    """Lines of text, 80 columns wide."""
    done = subprocess.run(
        [sys.executable, "-m", "pyshare", "map", NAME, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def participant(look: dict[str, Any], pid: int) -> dict[str, Any]:
    (found,) = (one for one in look["participants"] if one["pid"] == pid)
    return dict(found)


def as_runs(rows: list[dict[str, Any]]) -> Runs:
    """As kernel.py has them: whole pages."""
    return [(row["offset"], -(-row["length"] // PAGE) * PAGE, Prot(row["protection"])) for row in rows]


def spans(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """In pages."""
    return [(row["offset"] // PAGE, -(-row["length"] // PAGE)) for row in rows]


def differences(look: dict[str, Any]) -> dict[int, list[tuple[int, int]]]:
    """Of whom there are any, by pid."""
    return {one["pid"]: spans(one["differences"]) for one in look["participants"] if one["differences"]}


# -- What is -----------------------------------------------------------------------------------------------------------


def test_it_shows_the_map_and_the_page_tables_of_all(region: Region, joined: Joined) -> None:
    """After random changes, as the kernel tells it and as the region says."""
    children = [joined() for _ in range(2)]
    source = random.Random(7)
    for _ in range(20):
        first = source.randrange(PAGES)
        count = source.randint(1, PAGES - first)
        prot = source.choice([NONE, READ, READ_WRITE, READ | EXEC])
        region.mprotect(first * PAGE, min(count * PAGE, region.size - first * PAGE), prot)
    look = seen(region)
    assert as_runs(look["map"]) == agreed(region, *(child.pid for child in children))
    assert [one["pid"] for one in look["participants"]] == [os.getpid(), *(child.pid for child in children)]
    for one in look["participants"]:
        assert readable(as_runs(one["pages"])) == readable(mapped(one["pid"], region))
        assert (one["why"], one["differences"], one["applied"]) == (None, [], 20)
        assert one["command"] == COMMAND
    assert (look["generation"], look["leases"], look["snapshots"], look["freeze"]) == (20, [], [], None)
    assert all(f"``{field}``" in str(drawing.__doc__) for field in [*look, *look["participants"][0]])


def test_a_process_that_attached_twice_has_two_rows(region: Region) -> None:
    """At two addresses; each row is of its own."""
    with pyshare.attach(NAME, engine="mprotect") as twice:
        region.mprotect(PAGE, PAGE, READ)
        assert libc.mprotect(twice.address + 8 * PAGE, PAGE, NONE) == 0
        rows = seen(region)["participants"]
        assert [one["pid"] for one in rows] == [os.getpid()] * 2
        assert [spans(one["differences"]) for one in rows] == [[], [(8, 1)]]
        assert libc.mprotect(twice.address + 8 * PAGE, PAGE, READ_WRITE) == 0


def test_a_slot_says_nothing_of_who_had_it_before() -> None:
    """A participant by mprotect where one by uffd has been."""
    with pyshare.create(NAME, size=PAGES * PAGE, max_participants=2, engine="mprotect") as region:
        with contextlib.suppress(OSError), pyshare.attach(NAME, engine="uffd"):
            pass
        with pyshare.attach(NAME, engine="mprotect"):
            region.mprotect(0, PAGE, READ)
            assert [one["why"] for one in seen(region)["participants"]] == [None, None]


# -- Differences -------------------------------------------------------------------------------------------------------


@co_operative
def test_who_is_late_differs_until_it_follows(region: Region, joined: Joined) -> None:
    """Stopped before a change: its pages, no others, and nobody else's; its row says why."""
    other, late = joined(), joined()
    region.mprotect(0, 2 * PAGE, READ)
    late.stop()
    with pytest.raises(PropagationTimeout):
        region.mprotect(4 * PAGE, 3 * PAGE, NONE, timeout=AT_ONCE)
    look = seen(region)
    assert differences(look) == {late.pid: [(4, 3)]}
    assert participant(look, late.pid)["status"] == "stopped"
    (found,) = participant(look, late.pid)["differences"]
    assert (found["map"], found["real"], found["under_way"]) == (NONE, READ_WRITE, False)
    lines = drawn()
    rows = {line.split()[0]: number for number, line in enumerate(lines) if line}
    assert lines[rows["map"]].endswith("rrww...wwww" + 21 * "w")
    at = rows[str(late.pid)]
    assert lines[at].endswith("rrwwwwwwwww" + 21 * "w")
    assert lines[at + 1].index("^^^") == lines[rows["map"]].index("...")
    assert lines[at + 2].strip() == "3 pages otherwise than the map; late: it follows change 1 of 2; stopped"
    assert lines[rows[str(other.pid)]].endswith("rrww...wwww" + 21 * "w")
    assert "otherwise than the map" in lines[-1]
    late.resume()
    region.mprotect(0, PAGE, NONE)
    assert differences(seen(region)) == {}


@pytest.mark.parametrize("rights", [NONE, READ_WRITE])
def test_page_tables_changed_behind_our_back_differ(region: Region, joined: Joined, rights: Prot) -> None:
    """Too many rights, or too few."""

    def sneak(child: Child) -> None:
        assert libc.mprotect(region.address + 8 * PAGE, 2 * PAGE, rights) == 0
        idle(child)

    region.mprotect(0, region.size, READ)
    rogue = joined(sneak)
    look = seen(region)
    assert differences(look) == {rogue.pid: [(8, 2)]}
    assert [(one["map"], one["real"]) for one in participant(look, rogue.pid)["differences"]] == [(READ, rights)]


def test_marks_are_looked_at() -> None:
    """What the protections of the mapping do not show: a page that userfaultfd(2) protects, and one that it opens."""
    with pyshare.create(NAME, size=PAGES * PAGE, engine="auto") as region:
        if region.engine != "uffd":
            pytest.skip("no userfaultfd here")
        region.mprotect(0, 4 * PAGE, READ)
        with open("/proc/self/maps") as maps:
            start = f"{region.address:x}"
            (bits,) = (line.split()[1] for line in maps if line.startswith(start))
        assert bits == "rw-s"

        def rows() -> list[tuple[int, int, Prot]]:
            (row,) = seen(region)["participants"]
            assert row["differences"] == []
            return [(at // PAGE, n // PAGE, prot) for at, n, prot in as_runs(row["pages"])]

        assert rows() == [(0, 4, READ), (4, 28, READ_WRITE)]
        with region.lease(0, PAGE):
            assert rows() == [(0, 1, READ_WRITE), (1, 3, READ), (4, 28, READ_WRITE)]


def test_a_change_under_way_is_no_difference(region: Region, fork: Fork, joined: Joined) -> None:
    """Its caller has died in it, and nobody has called since: what it has not reached is marked as such."""
    other = joined()
    other.stop()
    dead = fork(lambda _: region.mprotect(8 * PAGE, 2 * PAGE, NONE), point="C6_await=kill")
    assert dead.wait() == -signal.SIGKILL
    look = seen(region)
    assert (look["under_way"]["offset"], look["under_way"]["length"]) == (8 * PAGE, 2 * PAGE)
    (found,) = participant(look, other.pid)["differences"]
    assert found["under_way"]
    lines = drawn()
    assert any(line.strip() == "~~" for line in lines)
    assert any(line.strip() == "a change of 2 pages is under way" for line in lines)
    other.resume()
    region.mprotect(0, PAGE, READ)
    assert differences(seen(region)) == {}


# -- No false alarms ---------------------------------------------------------------------------------------------------


def test_leases_are_no_differences(region: Region, joined: Joined) -> None:
    """In place and by window, the holder's and everybody else's; the leases are in a row of their own."""
    region.mprotect(0, region.size, READ)

    def hold(child: Child) -> None:
        with region.lease(4 * PAGE, 3 * PAGE), region.lease(10 * PAGE, PAGE, window=True):
            idle(child)

    holder = joined(hold)
    look = seen(region)
    assert differences(look) == {}
    assert [(*span, row["pid"]) for span, row in zip(spans(look["leases"]), look["leases"], strict=True)] == [
        (4, 3, holder.pid),
        (10, 1, holder.pid),
    ]
    rows = {line.split()[0]: line for line in drawn() if line}
    assert rows["leases"].rstrip() == "leases".ljust(drawing.LABEL) + "    LLL   L"
    assert rows[str(holder.pid)].endswith("rrrrLLL" + 25 * "r")
    assert rows[str(os.getpid())].endswith(32 * "r")


def test_a_killed_holder_and_its_lease(region: Region, joined: Joined) -> None:
    """Nobody has noticed its death yet; its row says that it is gone."""

    def hold(child: Child) -> None:
        with region.lease(4 * PAGE, 3 * PAGE):
            idle(child)

    region.mprotect(0, region.size, READ)
    holder = joined(hold)
    holder.kill()
    holder.wait()
    look = seen(region)
    one = participant(look, holder.pid)
    assert (one["pages"], one["differences"]) == (None, [])
    assert "gone" in one["why"]
    assert spans(look["leases"]) == [(4, 3)]


def test_a_private_copy_is_no_difference(region: Region, joined: Joined) -> None:
    """As a forbidden store leaves it in place until the exception is raised."""
    region.mprotect(0, 8 * PAGE, READ)

    def quarantine(child: Child) -> None:
        flags = mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
        control = word(region, 16, "Q")
        at = libc.mmap(region.address + 2 * PAGE, PAGE, READ_WRITE, flags, region.fileno(), control + 2 * PAGE)
        assert at == region.address + 2 * PAGE
        idle(child)

    child = joined(quarantine)
    look = seen(region)
    assert differences(look) == {}
    assert [row["private"] for row in participant(look, child.pid)["pages"]] == [False, True, False, False]
    assert any(line.startswith(str(child.pid)) and line.endswith("rrqrrrrr" + 24 * "w") for line in drawn())


def test_under_a_storm_nothing_differs(region: Region, joined: Joined) -> None:
    """Changes and leases of microseconds, all the time."""

    def change(child: Child) -> None:
        child.say()
        while True:
            region.mprotect(0, 4 * PAGE, NONE)
            region.mprotect(0, 4 * PAGE, READ_WRITE)

    def lease(child: Child) -> None:
        child.say()
        while True:
            with region.lease(8 * PAGE, PAGE):
                pass

    region.mprotect(8 * PAGE, 8 * PAGE, READ)
    joined(change), joined(lease), joined(lease)
    for _ in range(5):
        look = seen(region)
        found = [one for row in look["participants"] for one in row["differences"] if not one["under_way"]]
        assert found == []


# -- Who may be looked at ----------------------------------------------------------------------------------------------


@needs_root
def test_a_foreign_users_row_says_so(fork: Fork) -> None:
    """Root takes part, and may not be looked into by the user who looks; whose own row is drawn."""
    with pyshare.create(NAME, size=PAGES * PAGE, mode=0o666) as region:
        os.fchmod(region.fileno(), 0o666)
        os.chmod(f"/dev/shm/pyshare.{NAME}", 0o666)

        def other(child: Child) -> None:
            os.setgid(65534)
            os.setuid(65534)
            libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
            child.say(json.dumps(seen(region)))

        child = fork(other)
        look = json.loads(child.hear())
        assert participant(look, os.getpid())["why"] == "its page tables may not be read by you"
        assert participant(look, os.getpid())["pages"] is None
        assert participant(look, child.pid)["why"] is None


def test_who_lives_in_another_pid_namespace_is_not_mistaken(fork: Fork) -> None:
    """Its pid is somebody else's here."""
    from kernel import elsewhere

    with pyshare.create(NAME, size=PAGES * PAGE) as region:
        child, _ = elsewhere(fork, idle)
        assert child.hear() == "ok"
        rows = seen(region)["participants"]
        child.say()
        assert child.wait() == 0
        foreign = [one for one in rows if one["why"] and "namespace" in one["why"]]
        assert foreign
        assert all(one["command"] == "(in another pid namespace)" for one in foreign)


# -- How it is drawn ---------------------------------------------------------------------------------------------------


def test_cells_of_several_pages() -> None:
    """A cell whose pages differ is "+", and one of several leases is one where any is leased."""
    with pyshare.create(NAME, size=64 * PAGE, engine="mprotect") as region:
        region.mprotect(0, 6 * PAGE, READ)
        region.mprotect(8 * PAGE, 4 * PAGE, NONE)
        with region.lease(33 * PAGE, PAGE):
            lines = drawn("--width", "16")
        rows = {line.split()[0]: line for line in lines if line}
        assert lines[0].endswith("a cell is 4 pages (16 KiB)")
        assert rows["map"] == "map".ljust(drawing.LABEL) + "r+.wwwwwwwwwwwww"
        assert rows["leases"].rstrip() == "leases".ljust(drawing.LABEL) + 8 * " " + "L"
        assert " +  several of these" in lines[-1]


@pytest.mark.parametrize("pages", [1, 3, 57, 58, 59, 1000])
def test_rows_fit_into_the_width(pages: int) -> None:
    with pyshare.create(NAME, size=pages * PAGE, engine="mprotect"):
        lines = drawn()
        (row,) = (line for line in lines if line.startswith("map"))
        cells = len(row) - drawing.LABEL
        assert len(row) <= 80
        assert cells == -(-pages // -(-pages // 58))


def test_colours_are_for_terminals(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with pyshare.create(NAME, size=8 * PAGE):
        assert not any("\x1b" in line for line in drawn())
        script = "import sys; from pyshare.__main__ import main; sys.exit(main())"
        assert "\x1b[" in run_python(script, "map", NAME, FORCE_COLOR="1").stdout


def test_a_region_of_many_gigabytes_is_drawn(region: Region) -> None:
    """Sparse: what nobody touched costs nothing, and takes no memory."""
    with pyshare.create(f"{NAME}.large", size=1 << 35, engine=region.engine) as large:
        large.mprotect(1 << 34, 1 << 20, READ)
        before = os.fstat(large.fileno()).st_blocks
        look = seen(large)
        assert spans(look["map"])[1] == (1 << 22, 256)
        assert differences(look) == {}
        assert os.fstat(large.fileno()).st_blocks == before


# -- Freezes and snapshots -------------------------------------------------------------------------------------


def test_a_freeze_has_its_row(region: Region, fork: Fork) -> None:
    """Of what the thaw brings back; everybody's page tables agree with the map, which is READ."""

    def freeze(child: Child) -> None:
        with region.frozen():
            child.say(str(os.getpid()))
            child.hear()
            child.say()
        idle(child)

    region.mprotect(0, 4 * PAGE, READ)
    region.mprotect(8 * PAGE, 2 * PAGE, NONE)
    freezer = fork(freeze)
    assert freezer.hear() == str(freezer.pid)
    before = [(0, 4, READ), (4, 4, READ_WRITE), (8, 2, NONE), (10, 22, READ_WRITE)]
    look = seen(region)
    assert differences(look) == {}
    assert as_runs(look["map"]) == [(0, PAGES * PAGE, READ)]
    assert (look["freeze"]["pid"], look["freeze"]["generation"]) == (freezer.pid, 3)
    assert [(at // PAGE, n // PAGE, prot) for at, n, prot in as_runs(look["freeze"]["before"])] == before
    lines = drawn()
    (row,) = (line for line in lines if line.startswith("before the freeze"))
    assert row.endswith("rrrrwwww.." + 22 * "w")
    assert any(f"frozen by {freezer.pid} since change 3" in line for line in lines)
    freezer.say()
    assert [freezer.hear() for _ in range(2)] == ["ok", "ok"]
    look = seen(region)
    assert (look["freeze"], differences(look)) == (None, {})
    assert [(at // PAGE, n // PAGE, prot) for at, n, prot in as_runs(look["map"])] == before


def test_a_snapshot_has_its_row(region: Region, joined: Joined) -> None:
    """Of what has been saved: the pages that were written since, by somebody who leased them."""

    def write(child: Child) -> None:
        idle(child)
        with region.lease(PAGE, 2 * PAGE) as lease:
            lease.view[:] = bytes(2 * PAGE)
        idle(child)

    region.mprotect(0, region.size, READ)
    writer = joined(write)
    with region.snapshot() as snapshot:
        assert snapshot_row().strip() == PAGES * "-"
        writer.say()
        assert writer.hear() == "ok"
        assert snapshot_row() == "-SS" + 29 * "-"
        look = seen(region)
        assert look["snapshots"] == [
            {"area": 0, "state": "active", "generation": snapshot.generation, "saved": 2 * PAGE}
        ]
        assert f"active, 2 pages saved; of change {snapshot.generation}" in [line.strip() for line in drawn()]
    look = seen(region)
    assert (look["snapshots"], differences(look)) == ([], {})


def snapshot_row() -> str:
    (row,) = (line for line in drawn() if line.startswith("snapshot 0"))
    return row[drawing.LABEL :]


def test_what_waits_for_a_snapshot_is_no_difference(region: Region, joined: Joined) -> None:
    """Everybody may write, and snapshots come and go: pages are READ for a moment."""

    def snap(child: Child) -> None:
        child.say()
        while True:
            with contextlib.suppress(pyshare.ShareError):  # they are closed faster than they are saved
                region.snapshot().close()

    def store(child: Child) -> None:
        child.say()
        for page in itertools.cycle(range(PAGES - 1)):
            region.buf[page * PAGE] = 1

    joined(snap), joined(store)
    kept = 0
    for _ in range(20):
        look = seen(region)
        found = [one for row in look["participants"] for one in row["differences"] if not one["under_way"]]
        assert found == []
        kept += any(run["protection"] == READ for row in look["participants"] for run in row["pages"] or [])
    assert kept, "never seen a page that waits"


# -- As a picture ------------------------------------------------------------------------------------------------------


def test_a_plot_is_written(region: Region, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    region.mprotect(0, PAGE, READ)
    assert libc.mprotect(region.address + 8 * PAGE, PAGE, NONE) == 0
    with region.lease(16 * PAGE, PAGE):
        drawn("--plot", str(path))
    assert libc.mprotect(region.address + 8 * PAGE, PAGE, READ_WRITE) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", ["nowhere/map.png", "map.unknown"])
def test_a_plot_that_cannot_be_written_is_told(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with pyshare.create(NAME, size=PAGE):
        assert main(["map", NAME, "--plot", str(tmp_path / path)]) == 1
    assert capsys.readouterr().err.startswith("pyshare map: cannot draw ")


def test_without_matplotlib_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert main(["map", NAME, "--plot", "map.png"]) == 1
    assert "pip install 'pyshare[plot]'" in capsys.readouterr().err
