"""`pyshare trace` tells each change once, as it was, and takes no part in the region that it looks at.

The traces are processes of their own; what they say is compared with what the callers of mprotect know.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import COMMAND, PATIENCE, Child, idle
from kernel import ATTEMPT, GENERATION, LOCK, PAGE, SECTIONS, at_its_limit, co_operative, libc, tell, word

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, PropagationTimeout, Region, _core, trace
from pyshare.__main__ import main

Joined = Callable[..., Child]
Event = dict[str, Any]
NAME = f"traced{os.getpid()}"
SIZE = 31 * PAGE + 100
RING = 2  # a kind of section
AT_ONCE, SOON = 0.05, 0.5  # timeouts that are meant to run out

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(NAME, size=SIZE, max_participants=8, engine=request.param) as made:
        yield made


class Trace:
    """A running one."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pyshare", "trace", NAME, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)

    def line(self) -> str:
        """The next one; "" at the end."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "the trace is silent"
        return self.process.stdout.readline().decode()

    def events(self) -> list[Event]:
        """All, to the end."""
        return [json.loads(line) for line in iter(self.line, "")]

    def status(self) -> int:
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def follow() -> Iterator[Callable[..., Trace]]:
    """follow(*arguments): a Trace, ended with the test."""
    traces: list[Trace] = []

    def start(*arguments: str) -> Trace:
        traces.append(Trace(*arguments))
        return traces[-1]

    yield start
    for one in traces:
        one.end()


def told(*arguments: str) -> tuple[int, list[Event]]:
    """The exit status, and the events, of a trace that ends by itself."""
    command = [sys.executable, "-m", "pyshare", "trace", NAME, "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


# -- What is told ------------------------------------------------------------------------------------------------------


def test_each_change_is_told_as_it_was(region: Region, joined: Joined) -> None:
    """Ranges, protections, who made it: of this process and of another one."""

    def change(child: Child) -> None:
        region.mprotect(4 * PAGE, 8 * PAGE, NONE)
        idle(child)

    began = time.time()
    other = joined(change)
    region.mprotect(30 * PAGE, SIZE - 30 * PAGE, READ)
    region.mprotect(0, SIZE, READ | EXEC)
    status, events = told("--since", "0", "--count", "3")
    assert status == 0
    assert events[3] == {"event": "ended", "why": "count"}
    assert [(one["generation"], one["offset"], one["length"], one["protection"]) for one in events[:3]] == [
        (1, 4 * PAGE, 8 * PAGE, NONE),
        (2, 30 * PAGE, PAGE + 100, READ),
        (3, 0, SIZE, READ | EXEC),
    ]
    assert [one["pid"] for one in events[:3]] == [other.pid, os.getpid(), os.getpid()]
    for one in events[:3]:
        assert (one["event"], one["kind"], one["over"]) == ("change", "set", True)
        assert one["command"] == COMMAND
        assert 0 < one["seconds"] < PATIENCE
        assert began - 1 < one["time"] < time.time() + 1
        assert all(f"``{field}``" in str(trace.__doc__) for field in one)


def test_changes_are_told_as_they_happen(region: Region, follow: Callable[..., Trace]) -> None:
    """Those after the beginning, without a flag; each before the next is made."""
    region.mprotect(0, PAGE, READ)
    lines = follow()
    assert lines.line().startswith(f"region {NAME!r}: 32 pages, 124.1 KiB; 1 participant; change 1")
    assert lines.line().split()[0] == "change"
    for number, (prot, shown) in enumerate([(NONE, "NONE"), (READ_WRITE, "READ_WRITE"), (EXEC, "EXEC")], 2):
        region.mprotect(number * PAGE, 2 * PAGE, prot)
        text = lines.line()
        assert text.split()[0] == str(number)
        assert text.split()[2:5] == [str(number * PAGE), str(2 * PAGE), shown]
        assert f"{os.getpid()} " in text
        assert "\x1b" not in text


@co_operative
def test_the_slowest_is_named(region: Region, joined: Joined) -> None:
    """The one of two that is stopped; the change is told when the caller has given up, with the time that took."""
    _, stopped = joined(), joined()
    stopped.stop()
    before = time.monotonic()
    with pytest.raises(PropagationTimeout):
        region.mprotect(0, PAGE, READ, timeout=AT_ONCE)
    took = time.monotonic() - before
    stopped.resume()
    region.mprotect(0, PAGE, NONE)
    _, events = told("--since", "0", "--count", "2")
    assert events[0]["slowest"] == stopped.pid
    assert events[0]["slowest_command"] == COMMAND
    assert 0 < events[0]["seconds"] <= took
    assert events[1]["slowest"] != os.getpid()


def test_nobody_is_slow_where_nobody_is_waited_for(joined: Joined) -> None:
    with pyshare.create(NAME, size=SIZE) as region:
        if region.engine != "uffd":
            pytest.skip("no userfaultfd here")
        stopped = joined()
        region.mprotect(0, PAGE, READ)  # its userfaultfd is fetched
        stopped.stop()
        region.mprotect(PAGE, PAGE, READ)
        _, events = told("--since", "1", "--count", "1")
        assert (events[0]["slowest"], events[0]["slowest_command"]) == (None, None)


@co_operative
def test_what_one_cannot_apply_is_told_as_refused_and_undone(region: Region, joined: Joined) -> None:
    full = joined(at_its_limit(region))
    tell(full, "fill")
    with pytest.raises(OSError, match="could not apply"):
        region.mprotect(5 * PAGE, PAGE, READ)
    status, events = told("--since", "0", "--count", "2")
    assert status == 0
    assert [(one["generation"], one["kind"], one["protection"]) for one in events[:2]] == [
        (1, "refused", READ),
        (2, "undone", READ),
    ]
    assert events[1]["seconds"] > 0


def test_a_freeze_and_its_thaw_are_told(region: Region) -> None:
    """A change of everything to READ, and one back."""
    with region.frozen():
        pass
    status, events = told("--since", "0", "--count", "2")
    assert status == 0
    assert [(one["kind"], one["protection"], one["offset"], one["length"]) for one in events[:2]] == [
        ("set", READ, 0, SIZE),
        ("thawed", READ, 0, SIZE),
    ]
    assert all(one["over"] and one["seconds"] > 0 for one in events[:2])


def test_a_snapshot_is_told_where_page_tables_follow_it(region: Region, joined: Joined) -> None:
    """Everybody may write, so everybody's page tables are protected; the map stays."""
    joined()
    with region.snapshot() as snapshot:
        _, events = told("--since", "0", "--count", "1")
        assert (events[0]["kind"], events[0]["generation"]) == ("follow", 1)
        assert snapshot.generation >= 1
        assert (events[0]["over"], events[0]["pid"]) == (True, os.getpid())


@pytest.mark.parametrize("point", ["C5_publish", "C6_await", "C7_complete"])
def test_a_change_whose_author_died_is_told_when_somebody_has_finished_it(
    region: Region, fork: Callable[..., Child], point: str
) -> None:
    """Also where the ring had another change in its place."""

    def change(_child: Child) -> None:
        region.mprotect(8 * PAGE, 2 * PAGE, READ)

    for number in range(_core.RING):
        region.mprotect(0, PAGE, READ if number % 2 else NONE)
    since, first = ("--since", str(_core.RING)), _core.RING + 1
    dead = fork(change, point=f"{point}=kill")
    assert dead.wait() == -signal.SIGKILL
    status, events = told(*since, "--timeout", "0.1")
    assert (status, events[-1]) == (0, {"event": "ended", "why": "timeout"})
    assert [(one["generation"], one["over"], one["seconds"]) for one in events[:-1]] == [(first, False, None)]
    region.mprotect(0, PAGE, NONE)
    _, events = told(*since, "--count", "2")
    assert [(one["generation"], one["over"], one["pid"]) for one in events[:2]] == [
        (first, True, dead.pid),
        (first + 1, True, os.getpid()),
    ]
    assert events[0]["command"] == "(gone)"


# -- Too fast ----------------------------------------------------------------------------------------------------------


def test_what_the_ring_has_lost_is_counted(region: Region) -> None:
    for number in range(1500):
        region.mprotect(0, PAGE, READ if number % 2 else NONE)
    status, events = told("--since", "0", "--count", "1024")
    assert status == 0
    assert events[0] == {"event": "missed", "changes": 1500 - 1024}
    assert [one["generation"] for one in events[1:-1]] == list(range(1500 - 1023, 1501))


def test_an_overtaken_trace_says_so_and_goes_on(region: Region, follow: Callable[..., Trace]) -> None:
    """Told and missed are all that were made, in order, however often it is stopped."""
    running = follow("--json", "--since", "0")
    expected, lost = 0, 0
    for _ in range(3):
        running.process.send_signal(signal.SIGSTOP)
        os.waitpid(running.process.pid, os.WUNTRACED)
        for number in range(1100):
            region.mprotect(0, PAGE, READ if number % 2 else NONE)
        running.process.send_signal(signal.SIGCONT)
        last = region.generation
        while expected < last:
            event = json.loads(running.line())
            expected += event["changes"] if event["event"] == "missed" else 1
            lost += event["changes"] if event["event"] == "missed" else 0
            assert event["event"] == "missed" or event["generation"] == expected
    assert expected == 3300
    assert lost >= 3 * (1100 - 1024)


def test_lines_say_how_many_were_missed(region: Region, follow: Callable[..., Trace]) -> None:
    for number in range(1025):
        region.mprotect(0, PAGE, READ if number % 2 else NONE)
    lines = follow("--since", "0", "--count", "1")
    assert "1 change missed" in [lines.line() for _ in range(3)][-1]


# -- How it ends -------------------------------------------------------------------------------------------------------


def test_it_ends_with_the_region(fork: Callable[..., Child], follow: Callable[..., Trace]) -> None:
    """The last holder is killed, while the name is still there."""

    def hold(child: Child) -> None:
        with pyshare.create(NAME, size=SIZE) as region:
            region.mprotect(0, PAGE, READ)
            idle(child)

    holder = fork(hold)
    assert holder.hear() == "ok"
    lines = follow("--since", "0")
    assert [lines.line().split()[0] for _ in range(3)] == ["region", "change", "1"]
    holder.kill()
    assert lines.line() == "the region has ended: its last participant is gone\n"
    assert (lines.line(), lines.status()) == ("", 0)


def test_it_does_not_end_with_the_name_or_the_creator(fork: Callable[..., Child], follow: Callable[..., Trace]) -> None:
    """As long as somebody takes part, a forked child say."""

    def create(child: Child) -> None:
        region = pyshare.create(NAME, size=SIZE)
        heir = Child(lambda _: (child.hear(), region.mprotect(0, PAGE, READ), child.hear()))
        child.say(str(heir.pid))
        os._exit(0)

    creator = fork(create)
    heir = int(creator.hear())
    creator.wait()
    lines = follow()
    assert [lines.line().split()[0] for _ in range(2)] == ["region", "change"]  # it has found it
    pyshare.unlink(NAME)
    with pytest.raises(subprocess.TimeoutExpired):
        lines.process.wait(3 * trace.TICK / 1e9)
    creator.say("change")
    assert lines.line().split()[0] == "1"
    os.kill(heir, signal.SIGKILL)
    assert lines.line() == "the region has ended: its last participant is gone\n"
    assert lines.status() == 0


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--timeout", "0"], 0, "timeout"),
        (["--timeout", "0", "--count", "1"], 1, "timeout"),
        (["--timeout", "0", "--since", "0", "--count", "1"], 0, "count"),
        (["--timeout", "0.01", "--since", "0", "--count", "2"], 1, "timeout"),
    ],
)
def test_exit_status_says_whether_it_was_what_was_asked_for(
    region: Region, arguments: list[str], status: int, why: str
) -> None:
    region.mprotect(0, PAGE, READ)
    code, events = told(*arguments)
    assert (code, events[-1]) == (status, {"event": "ended", "why": why})


def test_control_c_ends_it(region: Region, follow: Callable[..., Trace]) -> None:
    lines = follow()
    assert lines.line().startswith(f"region {region.name!r}")
    lines.process.send_signal(signal.SIGINT)
    assert lines.status() == 130


def test_a_reader_that_has_seen_enough_ends_it(region: Region, follow: Callable[..., Trace]) -> None:
    running = follow("--json", "--since", "0")
    region.mprotect(0, PAGE, READ)
    assert json.loads(running.line())["generation"] == 1
    assert running.process.stdout is not None
    running.process.stdout.close()
    region.mprotect(0, PAGE, NONE)
    assert running.status() == 0
    assert running.process.stderr is not None
    assert running.process.stderr.read() == b""


@pytest.mark.parametrize("command", ["trace", "map"])
def test_what_cannot_be_looked_at_is_said(
    command: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = "import sys; from pyshare.__main__ import main; sys.exit(main())"
    for name, said in (("nobody", "no region is called 'nobody'"), (".x", "a name is 1 to 200 characters")):
        done = run_python(script, command, name)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"pyshare {command}: {said}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", ["--count=0", "--since=-1", "--timeout=nan", "--timeout=-1", "--count=x"])
def test_a_wrong_argument_is_told(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trace", NAME, wrong])
    assert caught.value.code == 2
    assert "invalid" in capsys.readouterr().err


# -- Without taking part -----------------------------------------------------------------------------------------------


def control(region: Region) -> tuple[bytes, int]:
    """The control segment, and how much memory the whole takes."""
    length = word(region, 16, "Q")
    return os.pread(region.fileno(), length, 0), os.fstat(region.fileno()).st_blocks


@pytest.mark.parametrize("command", ["trace", "map"])
def test_a_look_changes_nothing(region: Region, joined: Joined, command: str) -> None:
    """Not a byte of the control segment, not a page of memory, nobody's place; with leases and a killed participant."""

    def lease(child: Child) -> None:
        with region.lease(16 * PAGE, PAGE):
            idle(child)

    joined(lease)
    killed = joined()
    region.mprotect(0, 8 * PAGE, READ)
    killed.kill()
    killed.wait()
    before = control(region)
    arguments = ["--since", "0", "--timeout", "0.3"] if command == "trace" else ["--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pyshare", command, NAME, *arguments],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert control(region) == before
    assert region.generation == 1


@co_operative
def test_nobody_waits_for_a_trace(region: Region, follow: Callable[..., Trace]) -> None:
    """A stopped one holds up no change, and every slot is free for others."""
    lines = follow()
    lines.line()
    lines.process.send_signal(signal.SIGSTOP)
    os.waitpid(lines.process.pid, os.WUNTRACED)
    assert region.mprotect(0, PAGE, READ, timeout=PATIENCE) == 1
    assert [one.pid for one in region.participants()] == [os.getpid()]
    lines.process.send_signal(signal.SIGCONT)
    assert lines.line()
    assert lines.line().split()[0] == "1"


def leading_to(inode: int) -> set[int]:
    """Our descriptors of it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.fstat(int(name)).st_ino == inode:
                found.add(int(name))
    return found


def read_only_mappings(inode: int) -> set[str]:
    """Of the beginning of the file."""
    with open("/proc/self/maps") as maps:
        rows = [line.split() for line in maps if f" {inode} " in line]
    return {row[0] for row in rows if row[1] == "r--s" and row[2] == "00000000"}


def test_an_observer_cannot_write(region: Region) -> None:
    """Neither through its descriptor nor through its mapping; both go with it."""
    inode = os.fstat(region.fileno()).st_ino
    before = leading_to(inode), read_only_mappings(inode)
    observer = _core.Observer(region.fileno())
    (fd,) = leading_to(inode) - before[0]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"1", GENERATION)
    assert len(read_only_mappings(inode) - before[1]) == 1
    del observer
    assert (leading_to(inode), read_only_mappings(inode)) == before


def output_of(*arguments: str) -> tuple[int, str]:
    """Of a command, run by this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(str(end.code))
    return status, output.getvalue()


def as_nobody(child: Child) -> None:
    """Without any privilege, and as debuggable as a process is that has been so from the start."""
    os.setgid(65534)
    os.setuid(65534)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
    with pyshare.create(NAME, size=SIZE) as region:
        region.mprotect(0, PAGE, READ)
        other = Child(idle)
        assert other.hear() == "ok"
        child.say(json.dumps([output_of("trace", NAME, "--since", "0", "--count", "1"), output_of("map", NAME)]))
        other.end()


@needs_root
def test_an_unprivileged_process_of_the_same_user_may_look(fork: Callable[..., Child]) -> None:
    child = fork(as_nobody)
    traced, drawn = json.loads(child.hear())
    assert child.wait() == 0
    assert (traced[0], drawn[0]) == (0, 0), (traced, drawn)
    assert traced[1].splitlines()[-1].split()[2:5] == ["0", str(PAGE), "READ"]
    rows = [row.split()[-1] for row in drawn[1].splitlines() if row]
    assert rows.count("r" + 31 * "w") == 3, "the map, and two participants"


# -- Trust -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["trace", "map"])
@pytest.mark.parametrize("damage", ["ring", "record", "generation", "slots", "all"])
def test_whatever_is_in_the_control_segment_it_survives(fork: Callable[..., Child], command: str, damage: str) -> None:
    """It says what it can, or that it is no region; it ends when it should."""

    def hold(child: Child) -> None:
        with pyshare.create(NAME, size=SIZE, max_participants=8) as region:
            region.mprotect(0, PAGE, READ)
            ring = word(region, SECTIONS + 24 * (RING - 1) + 8, "Q")
            slots = word(region, SECTIONS + 8, "Q")
            where = {
                "ring": (ring, 64 * 1024),
                "record": (ATTEMPT, 64),
                "generation": (GENERATION, 8),
                "slots": (slots + 256, 7 * 256),  # not the one by which it is found
                "all": (LOCK, word(region, 16, "Q") - LOCK),
            }
            offset, length = where[damage]
            for seed in ("ff", "random", "small"):
                child.hear()
                content = {"ff": b"\xff" * length, "random": os.urandom(length), "small": b"\1\0\0\0" * (length // 4)}
                os.pwrite(region.fileno(), content[seed], offset)
                child.say()
            child.hear()
            os._exit(0)

    holder = fork(hold)
    arguments = ["--since", "0", "--timeout", "0.1"] if command == "trace" else []
    for _ in range(3):
        holder.say()
        assert holder.hear() == "ok"
        looker = fork(lambda child: child.say(str(output_of(command, NAME, "--json", *arguments)[0])))
        assert looker.hear() in ("0", "1")
        assert looker.wait() == 0
