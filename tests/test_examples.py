"""The examples: the database buffer runs as `make demo` runs it, and its engine survives a death at every line.

A test here that fails says that the example is wrong, or that the region is: the engine depends on promises 1 to 6.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, Child, until

import pyshare

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = EXAMPLES / "database_buffer.py"
sys.path.insert(0, str(EXAMPLES))
files = importlib.import_module("database_files")
engine_of = importlib.import_module("database_engine").Engine
engine_module = importlib.import_module("database_engine")

Fork = Callable[..., Child]
Demo = Callable[..., "subprocess.Popen[str]"]


# -- The demonstration as a whole ----------------------------------------------------------------------------------


def crew(temporary: Path) -> list[psutil.Process]:
    """All processes of a demonstration that run: those that have its temporary folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("TMPDIR") == str(temporary) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def nothing_runs(temporary: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while crew(temporary):
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True


def nothing_is_named(pid: int) -> bool:
    """Whoever looks clears away what the killed have left, once the kernel has taken their descriptors from them."""
    pyshare.names()
    return not [name for name in os.listdir("/dev/shm") if "database-buffer" in name and name.endswith(f"-{pid}")]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """demo(*options): the program, started, its temporary files in a folder of ours."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(*options: object) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, str(DEMO), *map(str, options)],
                env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "200"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    assert nothing_runs(temporary), "processes left behind"
    for process in started:
        until(functools.partial(nothing_is_named, process.pid))


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, stdout, stderr


CAUGHT = {"lease": 3, "window": 2, "mprotect": 2, "none": 0}  # of the three kinds of stray stores


def check_show(found: dict[str, Any], protect: str) -> None:
    """What the demonstration says of one kind of protection is what that can hold."""
    assert [check["check"] for check in found["checks"] if not check["ok"]] == []
    assert found["transactions"] > 0
    for took in (found["store_ns"], found["latch_ns"]):
        assert 0 < took["p50"] <= took["p99"] <= took["max"]
    assert len(found["strays"]) == 6
    for stray in found["strays"]:
        assert stray["unhurt"] == stray["caught"]
        assert stray["caught"] == ("forbidden store to region 'database-buffer-" in stray["line"])
        if protect == "lease" and stray["kind"] == "late":
            assert "this process's lease on the page ended" in stray["line"]
    assert sum(stray["caught"] for stray in found["strays"]) == 2 * CAUGHT[protect]
    assert found["victim"]["undone"] == 3
    assert found["recoveries"][-1]["losers"] > 0
    assert found["recoveries"][-1]["torn"] > 0
    assert found["recoveries"][-1]["image"] > 0
    assert [news["code"] for news in found["unsaved"]] == [-signal.SIGKILL]
    assert len(found["checkpoints"]) >= 2  # one after that, one before everybody is killed
    for books in found["checkpoints"]:
        assert books["branches"] == books["tellers"] == books["accounts"] == books["history"]
        assert (
            books["image"] > books["astray"] == books["wrong_rows"] == books["damaged_pages"] == books["doubles"] == 0
        )
    for books in found["audits"]:
        assert books["branches"] == books["tellers"] == books["accounts"] == books["history"]
        assert books["missing"] == books["wrong_rows"] == books["damaged_pages"] == books["doubles"] == 0
    assert found["audits"][-1]["acknowledged"] == found["transactions"]


def test_demo(demo: Demo, tmp_path: Path) -> None:
    """Rogues caught, a half transaction undone, everybody killed, the books balanced; and nothing is left."""
    figures = tmp_path / "figures"
    code, stdout, stderr = finish(
        demo("--seconds", 3, "--size", 1, "--workers", 3, "--kills", 6, "--seed", 1, "--json", figures)
    )
    assert (code, stderr) == (0, ""), stdout + stderr
    assert "All is well" in stdout
    found: dict[str, Any] = json.loads(figures.read_text())
    assert found["protect"] == "lease"
    check_show(found, "lease")
    assert 1 <= found["killed"] <= 8  # a kill finds nobody while all the dead are being replaced
    assert sum(run["evictions"] for run in found["stopped"]) > 0
    assert os.listdir(tmp_path / "temporary") == []


def test_demo_compares(demo: Demo, tmp_path: Path) -> None:
    """Each kind of protection in one run; what window, mprotect and none cannot catch, they do not."""
    figures = tmp_path / "figures"
    code, stdout, stderr = finish(
        demo("--protect", "all", "--seconds", 1, "--size", 0.5, "--workers", 2, "--json", figures)
    )
    assert (code, stderr) == (0, ""), stdout + stderr
    kinds: dict[str, Any] = json.loads(figures.read_text())["kinds"]
    assert list(kinds) == list(CAUGHT)
    for protect, found in kinds.items():
        check_show(found, protect)
        assert found["relative"] == found["speed"] / kinds["none"]["speed"] > 0
    assert os.listdir(tmp_path / "temporary") == []


def test_demo_says_what_is_not_caught(demo: Demo, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    options = ("--seconds", 1, "--size", 0.5, "--workers", 2, "--kills", 2, "--json", figures)
    code, stdout, stderr = finish(demo("--protect", "window", *options))
    assert (code, stderr) == (0, ""), stdout + stderr
    assert "4 of 6 caught; window cannot catch one into a page through a view kept" in stdout
    check_show(json.loads(figures.read_text()), "window")


def test_demo_goes_on_with_a_file(demo: Demo, tmp_path: Path) -> None:
    heap, figures = tmp_path / "heap", tmp_path / "figures"
    common = ("--seconds", 1, "--size", 0.5, "--workers", 2, "--file", heap, "--json", figures)
    made = 0
    for options in (("--accounts", 500), ()):
        code, stdout, stderr = finish(demo(*common, *options))
        assert (code, stderr) == (0, ""), stdout + stderr
        found = json.loads(figures.read_text())
        made += found["transactions"]
        assert found["audits"][-1]["transactions"] >= made
    assert {*os.listdir(tmp_path)} - {"heap.image"} == {"figures", "heap", "heap.log", "temporary"}
    code, stdout, _ = finish(demo(*common, "--accounts", 500))
    assert code == 1
    assert "--accounts is for a new file" in stdout


def test_demo_interrupted(demo: Demo, tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130)):
        process = demo("--seconds", 60, "--size", 0.5, "--workers", 2)
        assert process.stdout is not None
        while "the database is open" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        assert finish(process)[0] == code
        assert nothing_runs(tmp_path / "temporary")
        assert os.listdir(tmp_path / "temporary") == []


def test_demo_director_killed(demo: Demo, tmp_path: Path) -> None:
    """Nobody outlives him."""
    process = demo("--seconds", 60, "--size", 0.5, "--workers", 2)
    assert process.stdout is not None
    while "the database is open" not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert nothing_runs(tmp_path / "temporary")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--workers", 1), "1 is not from 2 to 200"),
        (("--size", 0.25, "--workers", 9), "too small for 9 workers"),
        (("--seconds", "soon"), "invalid float value: 'soon'"),
    ],
)
def test_demo_refuses(demo: Demo, options: tuple[object, ...], word: str) -> None:
    code, stdout, stderr = finish(demo(*options))
    assert code == 2
    assert word in stderr
    assert stdout == ""


def test_demo_keeps_off_other_files(demo: Demo, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"something else" * 1000)
    code, stdout, _ = finish(demo("--file", foreign))
    assert code == 1
    assert "is no heap of this program" in stdout
    assert foreign.read_bytes() == b"something else" * 1000


# -- The engine, line by line --------------------------------------------------------------------------------------

SOURCES = {files.__file__, engine_module.__file__}
FRAMES = 3  # fewer than a transaction has pages: each of its changes evicts something


def die_at(line: int) -> None:
    """This process ends by SIGKILL when it comes to so-and-so-manieth line of the engine from here."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal line
        if frame.f_code.co_filename not in SOURCES:
            return None
        if event == "line":
            line -= 1
            if line == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def transfer(engine: Any, number: int, commit: bool = True) -> None:
    account, teller, amount = number % 100, number % 10, 7 * number + 1
    transaction = engine.begin()
    engine.add(transaction, engine.layout.accounts, account, amount)
    engine.add(transaction, engine.layout.tellers, teller, amount)
    engine.add(transaction, engine.layout.branches, 0, amount)
    engine.insert(transaction, files.HISTORY.pack(transaction, account, teller, 0, amount, 0.0))
    if commit:
        engine.commit(transaction)


def check_pool(engine: Any, since: int) -> int:
    """Nothing is open, nothing noted, the buffer table is right, no transaction logged since then is half done; and
    the books balance, as the pool has them. How many transactions there are."""
    control, log = engine.control, engine.log.file
    assert not any(control.notes[:: engine_module.NOTE_WORDS].tolist())
    frames = pyshare.READ_WRITE if engine.pool.protect == "none" else pyshare.READ
    assert {control.region.protection(control.length + frame * files.PAGE) for frame in range(FRAMES)} == {frames}
    in_frames = {page - 1: frame + 1 for frame, page in enumerate(control.page_of) if page}
    assert in_frames == {page: place for page, place in enumerate(control.table[:100]) if place}
    assert not files.analyse(log, log.scan(since, engine.words[engine_module.TAIL])).losers

    def pages(first: int, end: int) -> Iterator[bytes]:
        for page in range(first, end):
            with engine.pool.fixed(page) as frame, engine.pool.view(frame) as view:
                yield bytes(view)

    sums = []
    for table in engine.layout.tables.values():
        found = [
            files.BALANCE.unpack_from(image, files.BODY + row * files.BALANCE_ROW)[0]
            for image in pages(table.first, table.end)
            for row in range(table.per_page)
        ]
        sums.append(sum(found))
    rows = [
        files.HISTORY.unpack_from(image, files.BODY + row * files.HISTORY.size)
        for image in pages(engine.layout.history, engine.words[engine_module.NEXT_PAGE])
        for row in range(files.HEADER.unpack_from(image)[3])
    ]
    committed = [row for row in rows if row[0]]
    assert sums == [sum(row[4] for row in committed)] * 3
    return len(committed)


@pytest.fixture
def heap(tmp_path: Path) -> str:
    path = str(tmp_path / "heap")
    files.create_database(path, 100)
    return path


def name() -> str:
    return f"test-engine-{os.getpid()}"


def ended(child: Child) -> bool:
    """True if it came to its end, False if it was killed on its way."""
    code = child.wait()
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.mark.parametrize(("protect", "step"), [("lease", 5), ("mprotect", 11)])
def test_worker_dies_at_any_line(heap: str, fork: Fork, protect: str, step: int) -> None:
    """Wherever a worker dies in a transaction with evictions in it: what it left is put right, by the next one."""
    engine = engine_of(heap, name(), FRAMES, protect)
    line, finished = 1, False
    while not finished:
        since = engine.words[engine_module.TAIL]

        def work(_: Child, line: int = line) -> None:
            engine.become(1, line + 1)
            die_at(line)
            transfer(engine, line)
            sys.settrace(None)

        transfer(engine, 1000 + line)  # so that some of the pages that it evicts have somebody else's changes
        finished = ended(fork(work))
        if not finished:
            engine.bury(1, line + 1)
        count = check_pool(engine, since)
        line += step
    assert line > 200
    assert count > line // step
    engine.close()
    books = files.audit(heap, [])
    assert books["transactions"] == count
    assert books["wrong_rows"] == books["damaged_pages"] == books["doubles"] == 0


@pytest.mark.parametrize("protect", ["lease", "window", "mprotect", "none"])
@pytest.mark.parametrize("stored", [True, False])
def test_abandoned(heap: str, fork: Fork, protect: str, stored: bool) -> None:
    """The next one at a page that a dead worker was changing is told so by the latch; and by the lease, if it died in
    the middle of the store. It makes the page good before it does anything else with it."""
    engine = engine_of(heap, name(), FRAMES, protect)
    branch = engine.layout.branches.first
    told: list[tuple[int, int, bool]] = []
    engine.pool.on_repair = lambda page, left, torn: told.append((page, left.slot, torn))

    def work(_: Child) -> None:
        engine.become(1, 2)
        frame = engine.pool.fix(branch)
        engine.pool.log_change(frame, files.Change(files.ADD, engine.begin(), branch, 0, 5))
        if stored:
            with engine.pool.opened(frame) as page:
                page.view[files.BODY : files.BODY + 100] = b"x" * 100
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    transfer(engine, 1)
    assert not ended(fork(work))
    with engine.pool.fixed(branch) as frame, engine.pool.view(frame) as view:
        assert files.BALANCE.unpack_from(view, files.BODY)[0] == 8 + 5
    torn = stored or protect in ("mprotect", "none")  # without leases nobody can tell, and the worst is assumed
    assert told == [(branch, 1, torn)]
    assert engine.bury(1, 2) == 1
    assert check_pool(engine, engine.log.file.base) == 1
    assert len(told) == 1
    engine.close()
    assert files.audit(heap, [])["wrong_rows"] == 0


def test_repairer_dies_at_any_line(heap: str, fork: Fork) -> None:
    """A second death, of who was putting right what the first one left."""
    engine = engine_of(heap, name(), FRAMES)
    branch = engine.layout.branches
    line, finished, incarnation = 1, False, 1
    while not finished:
        incarnation += 2

        def first(_: Child, incarnation: int = incarnation) -> None:
            engine.become(1, incarnation)
            frame = engine.pool.fix(branch.first)
            engine.pool.log_change(frame, files.Change(files.ADD, engine.begin(), branch.first, 0, 5))
            with engine.pool.opened(frame) as page:
                page.view[100:200] = b"x" * 100
                os.kill(os.getpid(), signal.SIGKILL)

        def second(_: Child, incarnation: int = incarnation + 1, line: int = line) -> None:
            engine.become(2, incarnation)
            die_at(line)
            transfer(engine, line)
            sys.settrace(None)

        assert not ended(fork(first))
        finished = ended(fork(second))
        engine.bury(1, incarnation)
        if not finished:
            engine.bury(2, incarnation + 1)
        check_pool(engine, engine.log.file.base)
        engine.checkpoint()  # else each repair would have a longer log to read, and more lines
        line += 11  # the lines of a transaction without repairs have their own test
    engine.close()
    assert files.audit(heap, [])["wrong_rows"] == 0


def test_server_dies_at_any_line(heap: str, fork: Fork, tmp_path: Path) -> None:
    """Wherever a server dies while it recovers, checkpoints and closes: the next one recovers."""

    def crash(_: Child) -> None:
        engine = engine_of(heap, name(), FRAMES)
        for number in range(3):
            transfer(engine, number)
        engine.checkpoint()
        for number in range(3, 6):
            transfer(engine, number)
        transfer(engine, 6, commit=False)
        engine.log.flush(engine.words[engine_module.TAIL])
        os.kill(os.getpid(), signal.SIGKILL)

    assert not ended(fork(crash))
    copy = str(tmp_path / "copy")
    line, finished = 1, False
    while not finished:
        for end in ("", ".log", files.IMAGE):
            shutil.copyfile(heap + end, copy + end)

        def recover(_: Child, line: int = line) -> None:
            die_at(line)
            engine_of(copy, name(), FRAMES).close()
            sys.settrace(None)

        finished = ended(fork(recover))
        engine_of(copy, name(), FRAMES).close()
        books = files.audit(copy, [])
        assert books["transactions"] == 6, line
        assert books["wrong_rows"] == books["damaged_pages"] == books["doubles"] == 0, line
        line += 19
    assert line > 200


@pytest.mark.parametrize(("protect", "step"), [("lease", 19), ("none", 31)])
def test_saver_dies_at_any_line(heap: str, fork: Fork, tmp_path: Path, protect: str, step: int) -> None:
    """Wherever one dies that takes a checkpoint: the others go on, the next one takes one, and from the files as they
    are then a server recovers."""
    engine = engine_of(heap, name(), FRAMES, protect)
    copy, line, finished, count = str(tmp_path / "copy"), 1, False, 0
    while not finished:
        since = engine.words[engine_module.TAIL]

        def save(_: Child, line: int = line) -> None:
            engine.become(255, line + 1)
            die_at(line)
            engine.checkpoint()
            sys.settrace(None)

        finished = ended(fork(save))
        transfer(engine, count)
        count += 1
        for path in Path(heap).parent.glob("heap*"):
            shutil.copyfile(path, copy + path.name.removeprefix("heap"))
        engine_of(copy, name() + "-copy", FRAMES, protect).close()
        books = files.audit(copy, [])
        assert books["transactions"] == count, line
        assert books["wrong_rows"] == books["damaged_pages"] == books["doubles"] == 0, line
        if line % 3 == 0:
            assert check_pool(engine, since) == count
        line += step
    assert line > 200
    engine.checkpoint()
    books = files.audit_checkpoint(heap)
    assert books["image"] > books["astray"] == books["wrong_rows"] == 0
    assert books["transactions"] == count
    engine.close()


def test_a_checkpoint_is_of_its_moment(heap: str, tmp_path: Path) -> None:
    """A transaction that is under way then is not in its books, nor is what comes later; and a server that starts with
    the heap as it was before everything, the image and the log has all that was committed."""
    shutil.copyfile(heap, tmp_path / "old")
    engine = engine_of(heap, name(), 50)  # nothing is evicted
    transfer(engine, 1)
    transaction = engine.begin()
    engine.add(transaction, engine.layout.accounts, 3, 100)
    engine.checkpoint()
    engine.add(transaction, engine.layout.tellers, 3, 100)
    transfer(engine, 2)
    books = files.audit_checkpoint(heap)
    assert (books["transactions"], books["branches"], books["wrong_rows"]) == (1, 8, 0)
    for end in (".log", files.IMAGE):
        shutil.copyfile(heap + end, f"{tmp_path / 'old'}{end}")
    os.rename(f"{tmp_path / 'old'}{files.IMAGE}", tmp_path / "image")
    with pytest.raises(files.DatabaseError, match="is not the image"):
        engine_of(str(tmp_path / "old"), name() + "-old", 50)
    os.rename(tmp_path / "image", f"{tmp_path / 'old'}{files.IMAGE}")
    engine_of(str(tmp_path / "old"), name() + "-old", 50).close()
    books = files.audit(str(tmp_path / "old"), [])
    assert (books["transactions"], books["branches"], books["wrong_rows"]) == (2, 8 + 15, 0)
    engine.undo(transaction, [])
    engine.slot[engine_module.TRANSACTION] = 0
    engine.close()


def test_log_comes_first(heap: str) -> None:
    """A page goes to the heap only after the log that tells of its changes is on disk."""
    engine = engine_of(heap, name(), FRAMES)
    transaction = engine.begin()
    engine.add(transaction, engine.layout.branches, 0, 5)
    page = engine.layout.branches.first
    with engine.pool.fixed(page) as frame:
        assert engine.words[engine_module.FLUSHED] < engine.words[engine_module.TAIL]
        engine.pool.write_back(frame)
        assert files.lsn_of(engine.heap.read(page)) == engine.words[engine_module.FLUSHED]
    engine.undo(transaction, [files.Change(files.ADD, transaction, page, 0, 5)])
    engine.slot[engine_module.TRANSACTION] = 0
    assert check_pool(engine, engine.log.file.base) == 0
    engine.close()


def test_torn_tail(heap: str) -> None:
    """Of a log that ends anywhere inside a record, all before that record counts, and nothing of it."""
    log = files.LogFile(heap + ".log")
    ends = [log.base]
    for number in range(3):
        ends.append(log.write(ends[-1], files.Change(files.ADD, 1, 1, 0, number), b"image"))
    whole = os.pread(log.fd, log.size, 0)
    for size in range(log.place(ends[0]), len(whole) + 1):
        os.ftruncate(log.fd, size)
        assert [logged.lsn for logged in log.scan(log.base)] == [end for end in ends[1:] if log.place(end) <= size]
        os.pwrite(log.fd, whole, 0)
    for at in range(log.place(ends[1]), log.place(ends[2])):
        os.pwrite(log.fd, bytes([whole[at] ^ 0x10]), at)
        assert [logged.lsn for logged in log.scan(log.base)] == ends[1:2], at
        os.pwrite(log.fd, whole, 0)
    log.close()
