"""The bench measures everybody, says so in three forms, and leaves nothing behind however it ends.

No figure is tested: a time is this machine's.  A pipe that the bench hands to
all its processes shows when the last of them is gone: its reader sees the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import mmap
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import pyshare
from pyshare import _peers, bench
from pyshare.bench import bounds, costs, cycles, measure, sections, snapshots, teams
from pyshare.bench.measure import Case, Crew, Figures, Limit
from pyshare.bench.teams import CHANGES, CONTENDERS, Bare, Contender, Mixed, Mprotect, Region, Signal, Uffd

PATIENCE = 300.0

Row = dict[str, Any]


def pyshare_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A finished run; its output is complete, so all of its processes are gone."""
    return subprocess.run(
        [sys.executable, "-m", "pyshare", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The output and the JSON of one run of everything."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    done = pyshare_command("bench", "--quick", "--participants", "1,8,32", "--rounds", "3", "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, json.loads(path.read_text())


def case_of(row: Row) -> Case:
    return Case(**{field: row[field] for field in Case.__dataclass_fields__})


def test_every_contender_is_measured_in_every_case(run: tuple[str, dict[str, Any]]) -> None:
    found = {(case_of(row), row["contender"], row["measure"]) for row in run[1]["results"]}
    assert len(found) == len(run[1]["results"])
    for case in {case for case, _, _ in found if case.section == "change"}:
        here = {(name, change) for one, name, change in found if one == case}
        fit = {kind.name for kind in CONTENDERS if kind.fits(case) and not kind.missing()}
        assert here == {(name, change) for name in fit for change in CHANGES}
    assert {case.section for case, _, _ in found} == set(bench.SECTIONS)


def test_every_figure_is_finite_and_in_order(run: tuple[str, dict[str, Any]]) -> None:
    for row in run[1]["results"]:
        values = [row[name] for name in ("p50", "p90", "p99", "max")]
        assert values == sorted(values)
        assert all(math.isfinite(value) and value >= 0 for value in values)
        assert row["rounds"] == 3 or row["section"] in ("sparse", "memory", "demo")
        assert row["p50"] > 0 or row["unit"] == "KiB"


def test_the_machine_is_described(run: tuple[str, dict[str, Any]]) -> None:
    about = run[1]["machine"]
    assert about["pyshare"] == pyshare.__version__
    assert about["cpus"] == len(os.sched_getaffinity(0))
    assert all(about[field] for field in ("cpu", "kernel", "python", "date"))


def test_the_tables_are_printed(run: tuple[str, dict[str, Any]]) -> None:
    output = run[0]
    assert all(row["contender"] in output for row in run[1]["results"])
    words = (
        "N = 1",
        "N = 8",
        "1 MiB",
        "1/8 stores",
        "1/8 stopped",
        "READ_WRITE",
        "revoke",
        "grant",
        "p99",
        "Python",
        "KiB",
        "first store",
        "saved",
    )
    assert all(word in output for word in words)
    assert max(len(line.rstrip()) for line in output.splitlines()[:-1]) <= 80


def test_every_bound_is_a_row(run: tuple[str, dict[str, Any]]) -> None:
    """Those that speak of the remote engine, too, where there is one."""
    found = Counter((row["section"], row["bound"].split(":")[0], row["peer"]) for row in run[1]["bounds"])
    expected = {("change", f"mprotect N={n}", peer) for n in (8, 32) for peer in ("signal", "pipe", "condition")}
    expected |= {("change", "mprotect N=1", "signal"), ("lock", "lock, Python", "mp.Lock")}
    expected |= {("demo", "demo --protect lease", "none")}
    if not Uffd.missing():
        for cold in ("", ", cold"):
            expected |= {("change", f"uffd N={n}{cold}", peer) for n in (8, 32) for peer in ("signal", "pipe")}
            expected |= {("change", f"uffd N=8{cold}", "all CPUs"), ("change", f"uffd N=32 each{cold}", "bare uffd")}
        expected |= {("change", f"uffd N={n}, 1 stores", "all CPUs") for n in (1, 8)}
        expected |= {("lease", f"lease by window, {one}", most) for one, most in (("Python", "1 µs"), ("C", "0.15 µs"))}
        expected |= {("lease", "lease, Python", "2 mprotect"), ("lease", "lease, C", "2 bare uffd")}
        expected |= {("lease", "lease N=32, Python", "N=1")}
        for prot in ("READ", "READ_WRITE"):
            expected |= {("sparse", f"{how} 64 GiB {prot}", "mmap") for how in ("create", "attach")}
            expected |= {("sparse", f"page tables, {prot}", "1 MiB")}
    assert found == Counter(expected)


def test_a_bound_is_a_ratio_of_medians(run: tuple[str, dict[str, Any]]) -> None:
    medians = {row["p50"] for row in run[1]["results"]}
    for bound in run[1]["bounds"]:
        if "each" not in bound["bound"]:
            assert bound["ours"] in medians
            assert bound["theirs"] in medians or " " in bound["peer"]
        assert bound["ratio"] == pytest.approx(
            (bound["ours"] / bound["theirs"]) ** (-1 if bound["at_least"] and bound["section"] != "demo" else 1)
        )
        assert bound["met"] == (
            (bound["ratio"] >= bound["limit"]) if bound["at_least"] else bound["ratio"] <= bound["limit"]
        )


def test_a_quantile_is_a_value_that_was_measured() -> None:
    assert measure.figures(range(100, 0, -1)) == Figures(p50=50, p90=90, p99=99, max=100, rounds=100, unit="µs")
    assert measure.figures([3, 1, 2]) == Figures(p50=2, p90=3, p99=3, max=3, rounds=3, unit="µs")
    assert measure.figures([7], "KiB") == Figures(p50=7, p90=7, p99=7, max=7, rounds=1, unit="KiB")


def test_a_missed_bound_is_called_missed() -> None:
    results = {
        (Case("change", count), name, change): measure.figures([20.0 if name == "mprotect" else 10.0 * count])
        for count in (1, 8)
        for name in teams.SHOWN
        if name not in ("uffd", "bare uffd")
        for change in CHANGES
    }
    assert [(one.bound.split(":")[0], one.peer, one.met) for one in bounds.verdicts(results)] == [
        ("mprotect N=1", "signal", False),
        ("mprotect N=8", "signal", True),
        ("mprotect N=8", "pipe", True),
        ("mprotect N=8", "condition", True),
    ]


def test_a_section_can_be_chosen() -> None:
    done = pyshare_command("bench", "lock", "--quick", "--participants", "1", "--rounds", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mp.Lock" in done.stdout
    assert "revoke" not in done.stdout
    assert "2 mprotect" not in done.stdout


# -- What is measured is what is said --------------------------------------------------------------------------------


@contextlib.contextmanager
def started(kind: type[Contender], case: Case) -> Iterator[Any]:
    """A team at its work."""
    if kind.missing():
        pytest.skip(kind.missing())
    with sections.assembled([kind], case) as (team,), measure.alarm():
        yield team


def write_protected(pid: int, address: int) -> bool:
    """Bit 57 of pagemap."""
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        return bool(int.from_bytes(file.read(8), "little") >> 57 & 1)


@pytest.mark.parametrize("change", CHANGES)
def test_the_bare_change_reaches_every_participant(change: str) -> None:
    with started(Bare, Case("change", 3)) as team:
        before = [prot for prot in CHANGES.values() if prot != CHANGES[change]]
        for prot in (*before, CHANGES[change]):
            assert team.change(prot) > 0
        pages = [team.board.address + offset for offset in (-mmap.PAGESIZE, 0, mmap.PAGESIZE)]
        for pid in team.crew.pids:
            assert [write_protected(pid, page) for page in pages] == [False, change == "revoke", False]


@pytest.mark.parametrize("kind", [Bare, Signal])
def test_one_that_stores_does_so_until_it_may_not(kind: type[Contender]) -> None:
    with started(kind, Case("change", 2, storing=1)) as team:
        seen = []
        for change in ("grant", "revoke", "grant", "revoke"):
            assert team.timed_change(CHANGES[change]) > 0
            seen.append(bytes(team.memory[mmap.PAGESIZE : mmap.PAGESIZE + 1]))
        assert len(set(seen)) > 1
        assert seen[1] == seen[2]
        assert all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in team.crew.pids)


def engines(region: pyshare.Region) -> Counter[str]:
    return Counter(one.engine for one in region.participants() if one.alive and one.pid != os.getpid())


def test_mixed_is_half_and_half() -> None:
    with started(Mixed, Case("change", 6)) as team:
        assert engines(team.region) == {"uffd": 3, "mprotect": 3}
        for prot in CHANGES.values():
            assert team.change(prot) > 0


def test_teams_do_not_take_part_in_one_another() -> None:
    kinds = [kind for kind in (Mixed, Uffd, Mprotect) if not kind.missing()]
    with sections.assembled([*kinds, Mprotect], Case("change", 2)) as started_teams:
        assert [engines(team.region).total() for team in started_teams if isinstance(team, Region)] == [2] * (
            len(kinds) + 1
        )


@pytest.mark.parametrize("kind", [Bare, Uffd])
def test_the_stopped_one_is_stopped(kind: type[Contender]) -> None:
    with started(kind, Case("change", 2, stopped=True)) as team:
        stopped, other = (psutil.Process(pid).status() for pid in team.crew.pids)
        assert stopped == psutil.STATUS_STOPPED != other
        for prot in CHANGES.values():
            assert team.change(prot) > 0


def test_each_region_has_as_many_participants_as_it_says() -> None:
    kinds = [kind for kind in (Uffd, Mprotect) if not kind.missing()]
    with cycles.regions(kinds, [1, 2, 5]) as opened:
        assert len(opened) == 3 * len(kinds)
        for (engine, count), region in opened.items():
            assert engines(region) == {engine: count}


def test_as_many_slots_are_taken_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SLOTS", 100)
    with Crew() as crew:
        fd = costs.crowded(Case("sparse", 100, 1 << 30), crew)
        with pyshare.attach(fd) as region:
            assert engines(region).total() == 100
        os.close(fd)


@pytest.mark.parametrize("cycle", ["MPROTECT", "UFFD", "FCNTL", "MUTEX", "THREAD", "MAP", "MAP_UNMAP"])
def test_a_floor_goes_in_cycles(cycle: str) -> None:
    if cycle == "UFFD" and Bare.missing():
        pytest.skip(Bare.missing())
    with Crew() as crew, measure.alarm():
        floors = cycles.Floors(crew)
        assert floors.turn(getattr(_peers, cycle))() > 0
        with pytest.raises(OSError, match="Invalid argument"):
            floors.turn(-1)()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("section", "begun"),
    [
        ("change", b"1 participants"),
        ("lease", b"leases"),
        ("snapshot", b"1 writers"),
        ("sparse", b"a sparse region"),
    ],
)
def test_nothing_is_left_when_it_is_interrupted(section: str, begun: bytes, number: signal.Signals) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1"}  # the progress bar shows when it measures
    command = [sys.executable, "-m", "pyshare", "bench", section, "--quick", "--participants", "1,4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            seen = b""
            while begun not in seen:
                seen += os.read(process.stdout.fileno(), 1 << 16)
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)  # to the end of the pipe: they are gone
        finally:
            process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert errors == b""


SIZE = 64 * mmap.PAGESIZE


@contextlib.contextmanager
def writing(kind: type[snapshots.Team]) -> Iterator[Any]:
    """A team whose two writers write."""
    with snapshots.assembled([(kind, Case("snapshot", 2, SIZE))]) as (team,), measure.alarm():
        team.pauses.begin()
        yield team
        team.pauses.end()


@pytest.mark.parametrize("kind", snapshots.TEAMS)
def test_a_turn_measures_everything(kind: type[snapshots.Team]) -> None:
    with snapshots.assembled([(kind, Case("snapshot", 2, SIZE))]) as (team,), measure.alarm():
        for _ in range(3):
            turn = team.turn()
            assert tuple(turn) == snapshots.MEASURES
            assert all(elapsed > 0 for elapsed in turn.values())
            assert turn["saved"] >= turn["taken"]


def test_writers_wait_while_their_memory_is_copied() -> None:
    with writing(snapshots.Stop) as team:
        copies = []
        for _ in range(5):
            team.pauses.probe()
            team.pauses.forget()
            elapsed = team.pauses.stop_and_copy(team.memory, team.copy)
            team.pauses.probe()  # and so a writer has gone on
            assert team.pauses.worst() > 0
            assert elapsed > 0
            copies.append(team.copy[:])
        assert len({*copies, team.memory[:]}) == 6


@pytest.mark.parametrize("kind", [snapshots.ReadWrite, snapshots.Leases])
def test_the_image_of_a_region_is_its_snapshot(kind: type[snapshots.Region]) -> None:
    with writing(kind) as team:
        team.image()
        image = team.snapshot.read(0, SIZE)
        team.pauses.probe()
        assert team.snapshot.read(0, SIZE) == image != team.region.read(0, SIZE)
        assert team.snapshot.complete == (kind is snapshots.ReadWrite)
        team.let_go()


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def section(available: int) -> sections.Section:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: argparse.Namespace(available=available))
        return snapshots.snapshot((1, 4), False, Limit(1, 1.0))

    largest = [
        max(case.length for sweep in one.sweeps for case in sweep.cases)
        for one in (section(64 << 30), section(4 << 30))
    ]
    assert largest == [4 << 30, 64 << 20]


def test_writers_need_their_memory() -> None:
    with pytest.raises(ValueError, match="257 writers; from 1 to 256"):
        _peers.Pauses(SIZE, 257, 1)
    with pytest.raises(ValueError, match="are needed"):
        _peers.Pauses(SIZE, 1, 1).fill(bytearray(1))


@pytest.mark.parametrize("kind", [kind for kind in CONTENDERS if not issubclass(kind, (Region, Bare))])
def test_no_wait_is_unbounded(kind: type[Contender], monkeypatch: pytest.MonkeyPatch) -> None:
    with started(kind, Case("change", 2)) as team:
        assert team.change(CHANGES["revoke"]) > 0
        os.kill(team.crew.pids[0], signal.SIGKILL)
        monkeypatch.setattr(measure, "PATIENCE", 0.2)
        with pytest.raises(TimeoutError, match="has not answered"), measure.alarm():
            team.change(CHANGES["grant"])


def test_what_a_participant_cannot_do_is_an_error() -> None:
    with started(Signal, Case("change", 1)) as team, pytest.raises(OSError, match="Invalid argument"):
        team.change(-1)
    with pytest.raises(ValueError, match="257 processes; at most 256"):
        _peers.Board(bytearray(mmap.PAGESIZE), 0, mmap.PAGESIZE, 0).signal_members(range(257))


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures.png"
    done = pyshare_command("bench", "change", "--quick", "--participants", "1", "--rounds", "1", "--plot", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "figures.png"
    done = pyshare_command("bench", "lock", "--plot", str(path))
    assert done.returncode == 1
    assert "'change'" in done.stderr
    assert not path.exists()


def test_without_matplotlib_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert bench.run(argparse.Namespace(plot="figures.png", sections=[])) == 1
    assert "pip install 'pyshare[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bench", "--fast"],
        ["bench", "leases"],
        ["bench", "--rounds", "0"],
        ["bench", "--participants", "1,x"],
        ["mark"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(arguments: list[str]) -> None:
    done = pyshare_command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pyshare")


def test_the_version() -> None:
    assert pyshare_command("--version").stdout == f"pyshare {pyshare.__version__}\n"
