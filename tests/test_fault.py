"""A forbidden access: one line, then the death it would have been; other people's faults as if pyshare were not there;
and read and write, which never crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Child, until
from kernel import co_operative, die_quietly, signals_until_end, stopped_before

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, Region

HERE = Path(__file__).parent
PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

Fork = Callable[..., Child]
Crash = Callable[[Callable[[Child], object]], tuple[int, str]]
Fate = tuple[int, str, str]
Stage = Callable[[tuple[str, ...], str], Fate]


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(size=16 * PAGE, engine=request.param) as region:
        yield region


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recover") / "recover.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", path, HERE / "recover.c"], check=True)
    return path


@contextlib.contextmanager
def stage(library: Path, how: str) -> Iterator[Stage]:
    """A process that has no faulthandler, no pytest and (how: "without") no pyshare, and runs cases in children.

    how: the engine of its regions, otherwise.
    """
    arguments = [sys.executable, "-W", "ignore", str(HERE / "faulty.py"), str(library), how]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(steps: tuple[str, ...], action: str) -> Fate:
            process.stdin.write(json.dumps([steps, action]) + "\n")
            process.stdin.flush()
            code, out, err = json.loads(process.stdout.readline())
            return code, out, err

        yield run
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


@pytest.fixture(scope="module", params=["mprotect", "uffd"])
def run_with(library: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    with stage(library, request.param) as run:
        yield run


@pytest.fixture(scope="module")
def run_without(library: Path) -> Iterator[Stage]:
    with stage(library, "without") as run:
        yield run


# -- Ours: one line, then the death --------------------------------------------------------------------------------

TOLD = re.compile(
    r"pyshare: forbidden (?:store to|load from) region 'faulty' at offset (\d+): "
    r"page (\d+) is (\w+) since change (\d+) by pid (\d+), \d+ ms ago\n"
)
TRACEBACK = "Fatal Python error: Segmentation fault"
HOW = ["view", "view-thread", "numpy", "memset", "load", "load-by-C"]
ORDERS = [  # of installation, and whether faulthandler is on at the end
    (("pyshare",), False),
    (("enable", "pyshare"), True),
    (("pyshare", "enable"), True),
    (("enable", "pyshare", "change"), True),
    (("pyshare", "enable", "change"), True),
    (("pyshare", "enable", "disable"), False),
    (("pyshare", "enable", "change", "disable"), False),
    (("enable", "pyshare", "disable", "change"), False),
    (("enable", "pyshare", "disable", "pyshare"), False),
    (("enable", "pyshare", "disable", "change", "enable"), True),
    (("enable", "pyshare", "disable", "change", "enable", "change"), True),
]


@pytest.mark.parametrize(("steps", "traced"), ORDERS, ids=lambda value: "-".join(value) if value is tuple else None)
@pytest.mark.parametrize("action", HOW)
def test_one_line_and_the_signal(run_with: Stage, steps: tuple[str, ...], traced: bool, action: str) -> None:
    code, _, err = run_with(steps, action)
    assert code == -signal.SIGSEGV
    assert err.count("pyshare:") == 1
    told = TOLD.search(err)
    assert told, err
    page, prot, generation = (2, "NONE", 2) if "load" in action else (1, "READ", 1)
    assert told.groups()[:4] == (str(page * PAGE + 5), str(page), prot, str(generation))
    assert ("load from" in told[0]) == ("load" in action)
    assert err.startswith(told[0]) or not err.startswith(TRACEBACK) or steps[-1] == "enable"
    assert err.count(TRACEBACK) == traced
    assert ("most recent call first" in err) == traced


@pytest.mark.parametrize("action", ["view", "view-thread"])
@pytest.mark.parametrize("steps", [("pyshare", "enable", "jump"), ("jump", "enable", "pyshare"), ("mend", "pyshare")])
def test_other_handlers_do_not_hide_the_line(run_with: Stage, steps: tuple[str, ...], action: str) -> None:
    code, _, err = run_with(steps, action)
    assert code == -signal.SIGSEGV
    assert err.count("pyshare:") == 1
    assert (TRACEBACK in err) == ("enable" in steps)


@pytest.mark.parametrize("steps", [("jump", "pyshare"), ("pyshare", "jump"), ("pyshare", "jump", "change")])
def test_a_handler_may_recover_from_ours(run_with: Stage, steps: tuple[str, ...]) -> None:
    """Whoever jumps out of every fault jumps out of ours too, each time."""
    code, out, _ = run_with(steps, "own-jumps")
    assert (code, out) == (0, "3000\n")


def test_the_author_is_named(region: Region, fork: Fork, crash: Crash) -> None:
    view = region.buf
    author = fork(lambda _child: region.mprotect(3 * PAGE, 2 * PAGE, READ))
    assert author.wait() == 0

    def body(_child: Child) -> None:
        view[4 * PAGE + 1] = 1

    code, told = crash(body)
    assert code == -signal.SIGSEGV
    assert f"an unnamed region at offset {4 * PAGE + 1}: page 4 is READ since change 1 by pid {author.pid}, " in told


@co_operative
def test_a_change_by_another_process_puts_the_handler_back(region: Region, fork: Fork, tmp_path: Path) -> None:
    view = region.buf

    def body(child: Child) -> None:
        with (tmp_path / "err").open("w") as file:
            os.dup2(file.fileno(), 2)
        faulthandler.disable()  # and what was installed above it is gone too
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        child.say()
        child.hear()
        view[0] = 1

    child = fork(body)
    child.hear()
    region.mprotect(0, PAGE, READ)
    child.say()
    assert child.wait() == -signal.SIGSEGV
    assert "page 0 is READ since change 1" in (tmp_path / "err").read_text()


def test_creation_is_named(crash: Crash) -> None:
    with pyshare.create(size=PAGE, prot=READ) as region:
        view = region.buf

        def body(_child: Child) -> None:
            view[0] = 1

        assert f"page 0 is READ since it was created (change 0) by pid {os.getpid()}, " in crash(body)[1]


def test_older_than_the_ring(region: Region, crash: Crash) -> None:
    view = region.buf
    region.mprotect(0, PAGE, READ)
    for _ in range(1024):
        region.mprotect(PAGE, PAGE, READ_WRITE)

    def body(_child: Child) -> None:
        view[0] = 1

    assert "page 0 is READ since a change older than the last 1024\n" in crash(body)[1]
    with pytest.raises(pyshare.ProtectionError, match=r"older than the latest 1,024") as caught:
        region.write(0, b"x")
    assert (caught.value.generation, caught.value.author) == (None, None)


def test_closed_region_says_so(crash: Crash) -> None:
    region = pyshare.create("faultclosed", size=PAGE)
    address = region.address
    region.close()

    def body(_child: Child) -> None:
        ctypes.memset(address, 1, 1)

    for _ in range(2):
        code, told = crash(body)
        assert code == -signal.SIGSEGV
        assert "forbidden store to region 'faultclosed' at offset 0: page 0: the region is closed in this proc" in told


@pytest.mark.parametrize("offset", [-1, 16 * PAGE])
def test_outside_the_data(region: Region, crash: Crash, offset: int) -> None:
    address = region.address
    code, told = crash(lambda _child: ctypes.memset(address + offset, 1, 1))
    assert code == -signal.SIGSEGV
    assert "pyshare: access outside the data of an unnamed region\n" in told


def fill_maps() -> None:
    """At the limit of mappings: from here on nothing can be split."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    reserve = libc.mmap(None, 2 * limit * PAGE, 0, 0x4022, -1, 0)  # PRIVATE | ANONYMOUS | NORESERVE
    for page in range(0, 2 * limit, 2):
        if libc.mprotect(reserve + page * PAGE, PAGE, 1):
            break
    while libc.mmap(None, PAGE, page % 2 + 1, 0x22, -1, 0) not in (None, ctypes.c_void_p(-1).value):
        page += 1


def at_the_limit(child: Child) -> None:
    fill_maps()
    child.say()
    child.hear()


@co_operative
def test_fenced_process_says_so(region: Region, fork: Fork, tmp_path: Path) -> None:
    """It was stopped, the change was made without it, and then it could not follow."""
    view = region.buf

    def body(child: Child) -> None:
        with (tmp_path / "err").open("w") as file:
            os.dup2(file.fileno(), 2)
        faulthandler.enable(file=2)
        region.lease(0, PAGE).release()  # the first one takes a mapping
        fill_maps()
        child.say()
        child.hear()
        with region.lease(5 * PAGE, PAGE):
            ctypes.memset(region.address + 5 * PAGE, 1, 1)

    child = fork(body, point="A2_apply=stop")
    child.hear()
    with pytest.raises(pyshare.PropagationTimeout):
        region.mprotect(PAGE, PAGE, READ, timeout=0)
    child.wait_stopped()
    child.resume()
    until(lambda: any(one.fenced for one in region.participants()))
    child.say()
    assert child.wait() == -signal.SIGSEGV
    told = (tmp_path / "err").read_text()
    assert "page 5: this process is fenced (it could not apply a change); the page is READ_WRITE since" in told
    assert "'s lease" not in told  # which is over writable pages, and not in the way
    assert view[5 * PAGE] == 0


@pytest.mark.parametrize("capture", ["fd", "no"])
def test_under_pytest(tmp_path: Path, capture: str) -> None:
    """pytest enables faulthandler before us, on a copy of stderr, and takes stderr for itself."""
    test = tmp_path / "test_stray.py"
    test.write_text(
        "import pyshare\n"
        "def test_stray():\n"
        "    with pyshare.create(size=4096) as region:\n"
        "        region.mprotect(0, 4096, pyshare.READ)\n"
        "        region.buf[0] = 1\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--capture={capture}", test],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ran.returncode == -signal.SIGSEGV
    assert "in test_stray" in ran.stderr
    assert ran.stderr.count(TRACEBACK) == 1
    assert ran.stderr.count("pyshare: forbidden store") == 1


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (["enable(log)", "create()"], True),
        (["create()", "enable(log)"], True),
        (["enable()", "create()", "enable(log)"], True),
        (["create()", "enable(log)", "disable()"], False),
        (["enable(log)", "create()", "enable()"], False),
        (["enable(log)", "disable()", "create()"], False),
    ],
)
def test_the_line_goes_where_faulthandler_writes(
    run_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, steps: list[str], told: bool
) -> None:
    """And to stderr; once, where that is the same."""
    log = tmp_path / "log"
    ran = run_python(
        "import sys, pyshare\n"
        "from faulthandler import enable, disable\n"
        "def create():\n"
        "    global region\n"
        "    region = pyshare.create(size=4096, prot=pyshare.READ)\n"
        "log = open(sys.argv[1], 'w')\n" + "\n".join(steps) + "\nregion.buf[0] = 1\n",
        str(log),
    )
    assert ran.returncode == -signal.SIGSEGV
    assert ran.stderr.count("pyshare: forbidden store") == 1
    assert log.read_text().count("pyshare: forbidden store") == told
    assert log.read_text().count(TRACEBACK) == told


def test_what_pytest_loads_is_light(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ran = run_python("import sys, _pyshare_faulthandler; print('pyshare' in sys.modules)")
    assert ran.stdout == "False\n"


# -- Others': as if we were not there ------------------------------------------------------------------------------

FATAL = ["null", "null-thread", "kill", "kill-bus", "raise", "overflow", "bus"]
FATAL_ORDERS = [steps for steps, _ in ORDERS] + [
    order
    for kind in ("jump", "mend")
    for order in [*itertools.permutations(("pyshare", "enable", kind)), ("pyshare", kind, "change")]
]
RECOVERING_ORDERS = [
    (*order, *more)
    for kind in ("jump", "jump-nodefer", "mend")
    for order in [*itertools.permutations(("pyshare", kind)), *itertools.permutations(("pyshare", "enable", kind))]
    for more in ((), ("change",))
]


def comparable(fate: Fate) -> Fate:
    """Without what differs from process to process: addresses, where the other threads are, and loaded modules.

    Each traceback once: a faulthandler that was enabled after us cannot take itself away from under us.  And without
    the beginning of one frame more: a thread's last frame may lead faulthandler to memory that is no frame any more.
    """
    code, out, err = fate
    other = r"\nThread 0x\w+ \(most recent call first\):\n(  File .*\n)*"
    err = re.sub(rf"{other}|0x[0-9a-f]+|\n?Extension modules:.*\n", "", err)
    tracebacks = (re.sub(r"  File \Z", "", part) for part in re.split("(?=Fatal Python error)", err))
    return code, out, "".join(dict.fromkeys(tracebacks))


@pytest.mark.parametrize("action", FATAL)
def test_other_faults_are_as_without_us(run_with: Stage, run_without: Stage, action: str) -> None:
    for steps in FATAL_ORDERS:
        fate = run_with(steps, action)
        assert comparable(fate) == comparable(run_without(steps, action)), steps
        assert not re.search(r"^pyshare: ", fate[2], re.M)


@pytest.mark.parametrize("thread", ["", "-thread"])
@pytest.mark.parametrize("steps", RECOVERING_ORDERS, ids="-".join)
def test_recovering_handlers_work(run_with: Stage, run_without: Stage, steps: tuple[str, ...], thread: str) -> None:
    """3,000 faults of another library's own, at one address by one instruction."""
    action = ("mends" if "mend" in steps else "jumps") + thread
    fate = run_with(steps, action)
    assert comparable(fate) == comparable(run_without(steps, action))
    if "enable" not in steps:
        assert fate == (0, "3000\n", "")


# -- read and write ------------------------------------------------------------------------------------------------


def test_refusal_says_everything(region: Region, fork: Fork) -> None:
    author = fork(lambda _child: (region.mprotect(PAGE, PAGE, READ), region.mprotect(2 * PAGE, PAGE, NONE)))
    assert author.wait() == 0
    cases: list[tuple[Callable[[], object], int, int, int, int]] = [
        (lambda: region.write(0, bytes(3 * PAGE)), PAGE, READ_WRITE & ~READ, READ, 1),
        (lambda: region.write(2 * PAGE + 7, b"x"), 2 * PAGE, READ_WRITE & ~READ, NONE, 2),
        (lambda: region.read(0, 16 * PAGE), 2 * PAGE, READ, NONE, 2),
    ]
    for call, offset, required, actual, generation in cases:
        with pytest.raises(pyshare.ProtectionError, match=f"since change {generation} by pid {author.pid}") as caught:
            call()
        error = caught.value
        assert isinstance(error, PermissionError)
        assert (error.errno, error.offset, error.required) == (errno.EACCES, offset, required)
        assert (error.actual, error.generation, error.author) == (actual, generation, author.pid)
    assert region.read(0, 2 * PAGE) == bytes(2 * PAGE), "a refused write has changed nothing"


def test_refusal_by_a_change_under_way(region: Region, fork: Fork) -> None:
    """Its caller is stopped with half the range set: the error names this change, not the one before."""
    author = fork(lambda _child: region.mprotect(0, 2 * PAGE, READ, timeout=None), point="C4_map=stop")
    author.wait_stopped()
    with pytest.raises(pyshare.ProtectionError) as caught:
        region.write(0, b"x")
    assert (caught.value.generation, caught.value.author, caught.value.actual) == (1, author.pid, READ)
    region.write(PAGE, b"x")


def test_refusal_while_a_change_is_undone(region: Region, fork: Fork) -> None:
    """Its caller is stopped with half the range restored: the error names the change that is valid again."""
    region.mprotect(0, region.size, NONE)
    fork(at_the_limit).hear()
    author = fork(lambda _child: region.mprotect(0, 2 * PAGE, READ, timeout=None), point="U2_map=stop")
    author.wait_stopped()
    with pytest.raises(pyshare.ProtectionError) as caught:
        region.read(0, 1)
    assert (caught.value.generation, caught.value.author, caught.value.actual) == (1, os.getpid(), NONE)


def test_creation_refuses() -> None:
    with pyshare.create(size=PAGE, prot=NONE) as region:
        with pytest.raises(pyshare.ProtectionError, match=r"change 0") as caught:
            region.read(0, 1)
        assert (caught.value.generation, caught.value.author) == (0, os.getpid())


@pytest.mark.parametrize("length", [1, 100, PAGE, 3 * PAGE + 1, 1 << 17])
def test_copies_are_whole_at_every_alignment(length: int) -> None:
    data = os.urandom(length)
    with pyshare.create(size=(1 << 17) + 64) as region:
        for offset in (0, 1, 7, 16, 63):
            region.write(offset, data)
            assert region.read(offset, length) == data
            assert bytes(region.buf[offset : offset + length]) == data


def toggle(region: Region, child: Child) -> None:
    child.say()
    while True:
        region.mprotect(PAGE, PAGE, NONE)
        region.mprotect(PAGE, PAGE, READ_WRITE)


def enable_on_top() -> None:
    """Without pyshare's being told, as other libraries put their handlers above ours."""
    faulthandler.disable()
    enable: Any = faulthandler.enable
    enable.__wrapped__(file=2)


@pytest.mark.parametrize("on_top", [False, True], ids=["", "faulthandler"])
def test_against_a_toggling_process(region: Region, fork: Fork, crash: Crash, on_top: bool) -> None:
    """10,000 reads and writes while another process takes and gives the rights as fast as it can."""
    toggler = fork(lambda child: toggle(region, child))
    toggler.hear()

    def body(_child: Child) -> None:
        refusals = set()
        for turn in range(5000):
            if on_top and turn % 10 == 0:  # each time it comes above our handler anew
                enable_on_top()
            data = bytes([turn % 255 + 1]) * (3 * PAGE)
            try:
                region.write(0, data)
                assert region.read(0, 3 * PAGE) == data
            except pyshare.ProtectionError as error:  # by the change that took the rights, not one that gave them
                refusals.add((error.offset, error.actual, error.author, (error.generation or 0) % 2))
        assert refusals == {(PAGE, NONE, toggler.pid, 1)}

    assert crash(body) == (0, "")


def test_faulthandler_on_top_of_a_copy_that_is_early(region: Region, fork: Fork) -> None:
    """The map grants already, the page tables not yet, and the fault must not end in a handler that came above us."""
    region.mprotect(0, 2 * PAGE, NONE)

    def body(child: Child) -> None:
        enable_on_top()
        child.say()
        child.hear()
        assert region.read(0, 9) == bytes(9)

    reader = fork(body)
    reader.hear()
    author = fork(lambda _child: region.mprotect(0, 2 * PAGE, READ, timeout=None), point="C4_map=stop")
    author.wait_stopped()
    reader.say()
    assert reader.wait() == 0


def errno_of_write(region: Region, data: memoryview) -> int | None:
    """Without a traceback, which would hold the data."""
    try:
        region.write(0, data)
    except OSError as error:
        return error.errno
    return None


def test_forbidden_source(region: Region) -> None:
    """Another region's page that cannot be read as the data to write: the kernel's own word for it, no crash."""
    with pyshare.create(size=16 * PAGE) as other:
        source = other.buf
        region.write(0, b"a" * 4 * PAGE)
        other.mprotect(PAGE, PAGE, NONE)
        assert errno_of_write(region, source[: 4 * PAGE]) == errno.EFAULT
        assert region.read(0, 4 * PAGE) == bytes(PAGE) + b"a" * 3 * PAGE
        own = region.buf
        region.mprotect(8 * PAGE, PAGE, NONE)
        assert errno_of_write(region, own[8 * PAGE : 9 * PAGE]) == errno.EFAULT
        for view in (source, own):
            view.release()


def test_rights_lost_behind_our_back_are_mended(region: Region) -> None:
    """The page tables, not the map, refuse: read and write see to it that they follow."""
    for prot in (NONE, READ):
        libc.mprotect(region.address, 16 * PAGE, prot)
        region.write(3 * PAGE + 9, b"whole" * PAGE)
        assert region.read(3 * PAGE + 9, 5 * PAGE) == b"whole" * PAGE


def test_large_copies_let_threads_run() -> None:
    """Another thread has many turns during a few copies; without that it has one or two before and after each."""
    size, turns, done = 64 << 20, [0], False

    def count() -> None:
        while not done:
            turns[0] += 1
            time.sleep(0)  # gives the GIL back

    interval = sys.getswitchinterval()
    with pyshare.create(size=size) as region:
        data = bytes(size)
        sys.setswitchinterval(1000)  # nobody takes it by force
        thread = threading.Thread(target=count)
        thread.start()
        try:
            for copy in (lambda: region.write(0, data), lambda: region.read(0, size)):
                before = turns[0]
                for _ in range(8):
                    copy()
                assert turns[0] - before > 100
        finally:
            done = True
            sys.setswitchinterval(interval)
            thread.join()


# -- Threads that block signals: the kernel ends a process whose thread blocks the signal of its own fault ---------

FAULTS = {signal.SIGSEGV, signal.SIGBUS}


def blocked() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def block_everything() -> set[int]:
    """As C libraries do in threads of theirs, past Python."""
    every = ctypes.c_uint64(((1 << 64) - 1) & ~(3 << 31))  # 32 and 33 are the C library's own
    assert libc.syscall(14, signal.SIG_BLOCK, ctypes.byref(every), None, 8) == 0  # rt_sigprocmask
    assert blocked() > FAULTS
    return blocked()


def in_thread(body: Callable[[], object]) -> None:
    """AssertionError where it raises."""
    done: list[bool] = []
    thread = threading.Thread(target=lambda: (body(), done.append(True)))
    thread.start()
    thread.join()
    assert done


def test_copies_of_a_thread_that_blocks_everything(region: Region, fork: Fork) -> None:
    """Its page tables refuse, the map does not; and its mask is what it was."""

    def copy() -> None:
        mask = block_everything()
        with region.snapshot():
            region.write(0, b"x")
            assert blocked() == mask
        region.write(3 * PAGE + 9, b"whole" * PAGE)
        libc.mprotect(region.address, 16 * PAGE, NONE)
        assert region.read(3 * PAGE + 9, 5 * PAGE) == b"whole" * PAGE
        assert blocked() == mask

    def body(_child: Child) -> None:
        libc.mprotect(region.address, 16 * PAGE, READ)
        in_thread(copy)

    assert fork(body).wait() == 0


def test_copies_of_a_thread_that_blocks_everything_later(region: Region, fork: Fork) -> None:
    """It was known to block nothing, and is asked again where a change is under way."""
    region.mprotect(0, 2 * PAGE, NONE)

    def copy(child: Child) -> None:
        region.write(2 * PAGE, b"x")
        mask = block_everything()
        child.say()
        child.hear()
        assert region.read(0, 9) == bytes(9)
        assert blocked() == mask

    reader = fork(lambda child: in_thread(lambda: copy(child)))
    reader.hear()
    author = fork(lambda _child: region.mprotect(0, 2 * PAGE, READ, timeout=None), point="C4_map=stop")
    author.wait_stopped()
    reader.say()
    assert reader.wait() == 0


def test_stores_of_a_python_thread_that_blocks_what_it_can(region: Region, fork: Fork) -> None:
    """While a snapshot is saved; the two signals cannot be blocked by Python any more."""

    def store() -> None:
        before = blocked()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()) == before
        assert signal.SIGTERM in blocked()
        assert not blocked() & FAULTS
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGSEGV, signal.SIGINT})
        assert blocked() == {signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        assert blocked() == set()
        signal.pthread_sigmask(signal.SIG_BLOCK, iter(signal.valid_signals()))
        for page in range(16):
            region.buf[page * PAGE] = 2

    def body(_child: Child) -> None:
        region.write(0, b"1" * region.size)
        with region.snapshot() as snapshot:
            in_thread(store)
            assert snapshot.read(0, region.size) == b"1" * region.size

    assert fork(body).wait() == 0


def test_who_attaches_blocks_neither(region: Region, fork: Fork) -> None:
    """Nor do the threads that it starts then."""

    def body(_child: Child) -> None:
        mask = block_everything()
        with pyshare.attach(region.fileno()):
            assert blocked() == mask - FAULTS
            in_thread(lambda: ctypes.memset(region.address, 1, 1))

    assert fork(body).wait() == 0


# -- A fault during a change ---------------------------------------------------------------------------------------


@co_operative
def test_store_outlives_changes_that_are_undone(region: Region, fork: Fork) -> None:
    """A participant at its limit of mappings makes every change fail; who stores meanwhile never notices."""
    view, address = region.buf, region.address + PAGE
    fork(at_the_limit).hear()

    def change(_child: Child) -> None:
        until(lambda: view[PAGE])
        for _ in range(1000):
            with pytest.raises(OSError, match="could not apply") as caught:
                region.mprotect(PAGE, PAGE, READ)
            assert caught.value.errno == errno.ENOMEM
        view[0] = 1

    def body(_child: Child) -> None:
        while not view[0]:
            ctypes.memset(address, 1, 1)

    storer, changer = fork(body), fork(change)
    assert (changer.wait(), storer.wait()) == (0, 0)
    assert region.protection(PAGE) == READ_WRITE
    assert view[PAGE] == 1


@co_operative
def test_store_waits_for_the_outcome(region: Region, fork: Fork) -> None:
    """The same, with the change held open while the store faults."""
    address = region.address + PAGE

    at_limit = fork(at_the_limit, point="A2_apply=stop")
    at_limit.hear()

    def body(child: Child) -> None:
        def change() -> None:
            with pytest.raises(OSError, match="could not apply"):
                region.mprotect(PAGE, PAGE, READ)

        changer = threading.Thread(target=change)
        changer.start()
        child.say()
        child.hear()
        child.say()
        ctypes.memset(address, 1, 1)
        changer.join()

    storer = fork(body)
    storer.hear()
    at_limit.wait_stopped()
    storer.say()
    storer.hear()
    until(lambda: Path(f"/proc/{storer.pid}/stat").read_text().rsplit(") ", 1)[1][0] != "R")  # it waits, or has died
    at_limit.resume()
    assert storer.wait() == 0
    assert region.protection(PAGE) == READ_WRITE


# -- Execution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", [READ, READ_WRITE])
def test_forbidden_execution_does_not_run_again(region: Region, fork: Fork, prot: int) -> None:
    """That the page can be read is no reason to; the second signal is the kernel's, when the first was passed on."""
    region.mprotect(0, PAGE, prot)

    def body(child: Child) -> None:
        die_quietly()
        child.say()
        child.hear()
        ctypes.CFUNCTYPE(None)(region.address)()

    child = fork(body)
    child.hear()
    assert signals_until_end(child.pid, child.say) == [signal.SIGSEGV] * 2
    assert child.wait() == -signal.SIGSEGV


@co_operative
def test_execution_waits_for_page_tables(region: Region, fork: Fork) -> None:
    """The map allows it, and they do not follow yet."""
    region.write(0, b"\xc3")  # ret

    def allow() -> None:
        with pytest.raises(pyshare.PropagationTimeout):
            region.mprotect(0, PAGE, READ | EXEC, timeout=0)

    def body(child: Child) -> None:
        child.say()
        child.hear()
        ctypes.CFUNCTYPE(None)(region.address)()

    child = fork(body)
    child.hear()
    [agent] = [one.tid for one in region.participants() if one.pid == child.pid]
    with stopped_before(agent, "mprotect", allow):
        child.say()
        until(lambda: Path(f"/proc/{child.pid}/syscall").read_text().split()[0] == "202")
    assert child.wait() == 0


# -- What the kernel knows of the mappings -------------------------------------------------------------------------


@co_operative
def test_neither_forked_nor_dumped(region: Region) -> None:
    flags, inside = [], False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            header = re.match(r"([0-9a-f]+)-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)", line)
            if header:
                near = region.address - (1 << 20) <= int(header[1], 16) < region.address + region.size
                inside = near and "memfd:pyshare" in header[2]
            elif inside and line.startswith("VmFlags:"):
                flags.append(line.split())
    assert len(flags) == 2, "control segment and data"
    for one in flags:
        assert {"sh", "dc", "dd"} <= set(one)
