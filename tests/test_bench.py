"""The bench measures everybody, says so in three forms, and leaves nothing behind however it ends.

No figure is tested: a time is this machine's.  A pipe that the bench hands to
all its processes shows when the last of them is gone: its reader sees the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyshare
from pyshare import _peers, bench
from pyshare.bench import CHANGES, SHOWN, Case

PATIENCE = 120.0
BENCH = (sys.executable, "-m", "pyshare", "bench", "--quick", "--participants", "1,2")


def pyshare_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A finished run; its output is complete, so all of its processes are gone."""
    return subprocess.run(
        [sys.executable, "-m", "pyshare", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The output and the JSON of one small run."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    done = pyshare_command("bench", "--quick", "--participants", "1,2", "--rounds", "5", "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, json.loads(path.read_text())


def test_every_contender_is_measured_in_every_case(run: tuple[str, dict[str, Any]]) -> None:
    results = run[1]["results"]
    cases = {tuple(row[field] for field in Case.__dataclass_fields__) for row in results}
    assert {(1, bench.PAGE, True, False, 1), (2, bench.MIB, False, False, 1), (2, bench.PAGE, True, True, 1)} <= cases
    assert len(results) == len(cases) * len(SHOWN) * len(CHANGES)
    assert {row["contender"] for row in results} == set(SHOWN)


def test_every_statistic_is_in_order(run: tuple[str, dict[str, Any]]) -> None:
    for row in run[1]["results"]:
        assert 0 < row["p50"] <= row["p90"] <= row["p99"] <= row["max"]
        assert row["rounds"] == 5
    assert run[1]["unit"] == "microseconds"


def test_the_machine_is_described(run: tuple[str, dict[str, Any]]) -> None:
    about = run[1]["machine"]
    assert about["pyshare"] == pyshare.__version__
    assert about["cpus"] == len(os.sched_getaffinity(0))
    assert all(about[field] for field in ("cpu", "kernel", "python", "date"))


def test_the_table_is_printed(run: tuple[str, dict[str, Any]]) -> None:
    output = run[0]
    assert all(contender in output for contender in SHOWN)
    assert all(word in output for word in ("N = 1", "N = 2", "1 MiB", "store x1", "revoke", "grant", "p99"))
    assert max(len(line.rstrip()) for line in output.splitlines()[:-1]) <= 80


def test_the_bounds_are_ratios_of_medians(run: tuple[str, dict[str, Any]]) -> None:
    figures = {
        (row["contender"], row["change"]): row["p50"]
        for row in run[1]["results"]
        if row["participants"] == 1 and not row["storing"]
    }
    (bound,) = run[1]["bounds"]  # at N = 1, 2 one bound speaks: 1.3 times the signal broadcast
    assert (bound["peer"], bound["participants"], bound["limit"]) == ("signal", 1, 1.3)
    for change, ratio in bound["ratios"].items():
        assert ratio == pytest.approx(figures["pyshare", change] / figures["signal", change])
    assert bound["met"] == (max(bound["ratios"].values()) <= 1.3)


def test_a_quantile_is_a_time_that_was_measured() -> None:
    found = bench.figures([1000 * number for number in range(100, 0, -1)])
    assert found == {"p50": 50, "p90": 90, "p99": 99, "max": 100, "rounds": 100}
    assert bench.figures([7000]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7, "rounds": 1}


def test_a_missed_bound_is_called_missed() -> None:
    results = {
        (Case(count), contender, change): {"p50": 20.0 if contender == "pyshare" else 10.0 * count}
        for count in (1, 8)
        for contender in SHOWN
        for change in CHANGES
    }
    assert [(one.peer, one.participants, one.met) for one in bench.verdicts(results)] == [
        ("signal", 1, False),
        ("signal", 8, True),
        ("pipe", 8, True),
        ("condition", 8, True),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_interrupted(number: signal.Signals) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1"}  # the progress bar shows when it measures
    with subprocess.Popen(BENCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            seen = b""
            while b"1 participants" not in seen:
                seen += os.read(process.stdout.fileno(), 1 << 16)
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)  # to the end of the pipe: they are gone
        finally:
            process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert errors == b""


@pytest.mark.parametrize("kind", [kind for kind in bench.CONTENDERS if kind is not bench.Region])
def test_no_wait_is_unbounded(kind: type[bench.Contender], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 0.2)
    team = kind(Case(2))
    try:
        team.start()
        assert team.change(CHANGES["revoke"]) > 0
        os.kill(team.pids[0], signal.SIGKILL)
        with bench.alarm() as wind:
            wind()
            with pytest.raises(TimeoutError, match="has not answered"):
                team.change(CHANGES["grant"])
    finally:
        team.close()


def test_what_a_participant_cannot_do_is_an_error() -> None:
    team = bench.Signal(Case(1))
    try:
        team.start()
        with pytest.raises(OSError, match="Invalid argument"):
            team.change(-1)
    finally:
        team.close()
    with pytest.raises(ValueError, match="257 processes; at most 256"):
        _peers.Board(bytearray(bench.PAGE), 0, bench.PAGE, 0).signal_members(range(257))


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures.png"
    done = pyshare_command("bench", "--quick", "--participants", "1,2", "--rounds", "1", "--plot", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert bench.run(argparse.Namespace(plot="figures.png")) == 1
    assert "pip install 'pyshare[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["bench", "--fast"], ["bench", "--rounds", "0"], ["bench", "--participants", "1,x"], ["mark"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(arguments: list[str]) -> None:
    done = pyshare_command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pyshare")


def test_the_version() -> None:
    assert pyshare_command("--version").stdout == f"pyshare {pyshare.__version__}\n"
