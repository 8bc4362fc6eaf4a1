"""Names: they lead to a region as long as somebody holds it, and to nobody else's.

Grouped by promise: a name leads to its region; it is gone with the last holder,
however that went; other users neither get in nor get in the way; a directory
that has no room, or is none, is told as it is; processes that do all of this at
once never see a half of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import Child, until

import pyshare
from pyshare import READ, Region, __main__

PAGE = 4096
NOBODY = 65534
Fork = Callable[..., Child]
RunPython = Callable[..., subprocess.CompletedProcess[str]]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


def entries() -> set[str]:
    """Everything of ours in the directory, also what has no name yet."""
    return {entry for entry in os.listdir("/dev/shm") if entry.startswith("pyshare.")}


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def hold(child: Child, name: str, **arguments: object) -> None:
    """In a child: a region with this name until the other side speaks."""
    region = pyshare.create(name, size=PAGE, **arguments)  # type: ignore[arg-type]
    region.write(0, b"held")
    child.say()
    child.hear()
    region.close()


def held(fork: Fork, name: str, **arguments: object) -> Child:
    child = fork(lambda child: hold(child, name, **arguments))
    child.hear()
    return child


def killed(fork: Fork, name: str) -> None:
    """Leaves a stale name behind."""
    child = held(fork, name)
    child.kill()
    child.wait()
    assert f"pyshare.{name}" in entries()


# -- A name leads to its region ----------------------------------------------------------------------------------------


def test_names_are_listed_in_order_while_somebody_holds_them() -> None:
    with pyshare.create("b", size=1), pyshare.create("a", size=1), pyshare.create(size=1):
        assert pyshare.names() == ["a", "b"]
        with pyshare.attach("b"):
            assert pyshare.names() == ["a", "b"]
    assert pyshare.names() == []
    assert entries() == set()


def test_a_name_leads_to_the_region_from_another_process(fork: Fork) -> None:
    child = held(fork, "other")
    with pyshare.attach("other") as region:
        assert (region.name, region.size, region.read(0, 4)) == ("other", PAGE, b"held")
        child.say()
        assert child.wait() == 0
        assert pyshare.names() == ["other"]  # we hold it now
        with pyshare.attach("other") as again:
            assert again.read(0, 4) == b"held"
    assert entries() == set()


def test_an_absent_name_is_not_found_at_once() -> None:
    with pytest.raises(pyshare.RegionNotFound, match="no region is called 'absent'"):
        pyshare.attach("absent", timeout=None)
    with pytest.raises(pyshare.RegionNotFound, match="no region is called 'absent'"):
        pyshare.unlink("absent")


def test_a_name_that_is_taken_stays_where_it_is() -> None:
    with pyshare.create("taken", size=1) as region:
        with pytest.raises(pyshare.RegionExists, match="'taken' leads to a live region"):
            pyshare.create("taken", size=2)
        assert entries() == {"pyshare.taken"}
        with pyshare.attach("taken") as other:
            assert other.size == region.size == 1


def test_unlink_removes_the_name_and_nothing_else() -> None:
    with pyshare.create("unlinked", size=1) as region:
        pyshare.unlink("unlinked")
        assert entries() == set()
        with pytest.raises(pyshare.RegionNotFound):
            pyshare.attach("unlinked")
        with pyshare.attach(region) as other, pyshare.create("unlinked", size=2) as new:
            assert (other.name, other.size, new.size) == ("unlinked", 1, 2)
            region.close()  # the name is somebody else's by now
            other.close()
            assert pyshare.names() == ["unlinked"]


def test_replace_moves_the_name_and_old_holders_keep_their_region(fork: Fork) -> None:
    child = held(fork, "moved")
    with pyshare.attach("moved") as old, pyshare.create("moved", size=2, replace=True) as new:
        assert entries() == {"pyshare.moved"}
        with pyshare.attach("moved") as found, pyshare.attach(old) as kept:
            assert (found.size, kept.read(0, 4)) == (2, b"held")
            kept.mprotect(0, PAGE, READ)
            assert (old.generation, new.generation) == (1, 0)
        old.close()
        child.say()
        assert child.wait() == 0
        assert pyshare.names() == ["moved"]
    assert entries() == set()


def test_replace_takes_an_absent_and_a_stale_name_too(fork: Fork) -> None:
    killed(fork, "stale")
    for name in ("absent", "stale"):
        with pyshare.create(name, size=1, replace=True):
            assert pyshare.names() == [name]


def with_name(name: str) -> list[Callable[[], object]]:
    return [lambda: pyshare.create(name, size=1), lambda: pyshare.attach(name), lambda: pyshare.unlink(name)]


@pytest.mark.parametrize("name", ["a", "-", "_x", "9.9", "a..b", "A-z_0.9", "n" * 200])
def test_good_names(name: str) -> None:
    with pyshare.create(name, size=1) as region, pyshare.attach(name):
        assert (region.name, pyshare.names()) == (name, [name])


@pytest.mark.parametrize(
    "name", ["", ".", ".a", "n" * 201, "a/b", "../a", "a b", "a\n", "a\0", "ä", "\u0661", "a\udc80"]
)
def test_bad_names(name: str) -> None:
    for call in with_name(name):
        with pytest.raises(ValueError, match=r"1 to 200 characters of letters.*got"):
            call()
    assert entries() == set()


# -- It is gone with the last holder -----------------------------------------------------------------------------------


def by_create() -> None:
    pyshare.create("stale", size=2).close()


def by_attach() -> None:
    with pytest.raises(pyshare.RegionNotFound, match="last holder is gone"):
        pyshare.attach("stale")


def by_unlink() -> None:
    with pytest.raises(pyshare.RegionNotFound, match="last holder is gone"):
        pyshare.unlink("stale")


def by_names() -> None:
    assert pyshare.names() == []


@pytest.mark.parametrize("clear", [by_create, by_attach, by_unlink, by_names])
def test_what_a_killed_holder_leaves_is_cleared_by_the_next(clear: Callable[[], None], fork: Fork) -> None:
    killed(fork, "stale")
    clear()
    assert entries() == set()


def test_create_takes_a_stale_name(fork: Fork) -> None:
    killed(fork, "stale")
    with pyshare.create("stale", size=2) as region, pyshare.attach("stale") as other:
        region.write(0, b"ab")
        assert other.read(0, 2) == b"ab"


def test_the_name_stays_while_one_of_many_is_left(fork: Fork) -> None:
    def join(child: Child) -> None:
        with pyshare.attach("many"):
            child.say()
            child.hear()

    first = held(fork, "many")
    others = [fork(join) for _ in range(4)]
    for child in others:
        child.hear()
    for child in (first, *others[:-1]):
        child.kill()
        child.wait()
        with pyshare.attach("many") as region:
            assert region.read(0, 4) == b"held"
    others[-1].kill()
    others[-1].wait()
    with pytest.raises(pyshare.RegionNotFound):
        pyshare.attach("many")


def test_a_forked_child_holds_the_name(fork: Fork) -> None:
    region = pyshare.create("forked", size=PAGE)
    child = fork(lambda child: (child.hear(), region.close()))
    region.close()
    with pyshare.attach("forked") as again:
        assert again.size == PAGE
        child.say()
        assert child.wait() == 0
        assert pyshare.names() == ["forked"]
    assert entries() == set()


def make_and_leave(child: Child) -> None:
    with pyshare.create("half", size=PAGE):
        child.say()


@pytest.mark.parametrize("label", ["J1_claim", "J2_lock", "J3_apply", "J4_live", "A1_wait", "L1_unmap", "L2_leave"])
def test_killing_a_creator_in_the_middle_leaves_only_what_the_next_clears(label: str, fork: Fork) -> None:
    with pyshare.create(size=1):  # from here on a forked child looks for its crash point
        assert fork(make_and_leave, point=f"{label}=kill").wait() == -9
        assert pyshare.names() == []
        assert entries() == set()
        with pyshare.create("half", size=PAGE):
            pass


def test_killing_a_creator_anywhere_leaves_only_what_the_next_clears(fork: Fork) -> None:
    def make_for_ever(child: Child) -> None:
        child.say()
        while True:
            pyshare.create("half", size=PAGE, replace=True).close()

    for _ in range(20):
        child = fork(make_for_ever)
        child.hear()
        for _ in range(random.randrange(200)):
            os.sched_yield()
        child.kill()
        child.wait()
        with pyshare.create("half", size=PAGE) as region:
            assert pyshare.names() == ["half"]
            assert region.read(0, 1) == b"\0"
        assert entries() == set()


@pytest.mark.parametrize("label", ["J1_claim", "J4_live", None])
def test_create_sweeps_what_the_killed_have_left(label: str | None, fork: Fork) -> None:
    with pyshare.create(size=1):
        if label is None:
            killed(fork, "killed")
        else:
            # Its first time is where the child joins the region above.
            assert fork(make_and_leave, point=f"{label}=kill@2").wait() == -9
        (left,) = entries()
        assert (left == "pyshare.killed") == (label is None)  # else an entry that has no name yet

        def is_swept() -> bool:  # not by each that comes within a moment of the one before
            pyshare.create("other", size=PAGE).close()
            return left not in entries()

        until(is_swept)


def test_a_sweep_looks_at_some_of_many_and_leaves_the_living(fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyshare._names._LOOKS", 2)
    monkeypatch.setattr("pyshare._names._REST", 0)
    with contextlib.ExitStack() as stack:
        for number in range(5):
            stack.enter_context(pyshare.create(f"alive{number}", size=1))
        killed(fork, "stale")

        def is_swept() -> bool:
            pyshare.create("other", size=PAGE).close()
            return "pyshare.stale" not in entries()

        until(is_swept)
        assert pyshare.names() == [f"alive{number}" for number in range(5)]


AT_END = """
import multiprocessing, os, select, sys, threading
import pyshare

def store_for_ever(region):
    while True:
        region.buf[0] = 1

def outlive(parent):
    select.select([parent], [], [])  # no thread of it is left
    print(pyshare.names(), flush=True)

def look():
    with pyshare.attach("ended") as region:
        print(region.name, flush=True)

if __name__ == "__main__":
    how = sys.argv[1]
    region = pyshare.create("ended", size=4096)
    me = os.pidfd_open(os.getpid())
    if how == "daemon thread":
        threading.Thread(target=store_for_ever, args=[region], daemon=True).start()
    elif how == "error":
        raise SystemExit(1)
    elif how == "fork" and os.fork() == 0:
        outlive(me)
    elif how == "multiprocessing":
        multiprocessing.get_context("fork").Process(target=outlive, args=[me]).start()
        os._exit(0)
    elif how == "spawn":
        multiprocessing.get_context("spawn").Process(target=look).start()
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nothing", ""),
        ("daemon thread", ""),
        ("error", ""),
        ("fork", "['ended']\n"),
        ("multiprocessing", "['ended']\n"),
        ("spawn", "ended\n"),  # a child that the end waits for finds it
    ],
)
def test_a_normal_end_of_the_last_holder_leaves_no_file(how: str, says: str, run_python: RunPython) -> None:
    done = run_python(AT_END, how)
    assert (done.stdout, done.stderr) == (says, "")
    until(lambda: not entries())  # the last one may end after the one that we have started


def test_the_end_of_one_holder_leaves_the_name_to_the_others(fork: Fork, run_python: RunPython) -> None:
    held(fork, "shared")
    assert run_python("import pyshare; region = pyshare.attach('shared')").returncode == 0
    with pyshare.attach("shared") as region:
        assert region.read(0, 4) == b"held"


def test_the_name_survives_the_descriptors_of_its_only_holder(fork: Fork) -> None:
    def close_all(child: Child) -> None:
        region = pyshare.create("closed", size=PAGE)
        os.dup2(child._receive, 0)
        os.dup2(child._send, 1)
        child._receive, child._send = 0, 1
        os.closerange(3, 65536)
        child.say()
        child.hear()
        assert region.read(0, 4) == b"here"
        region.close()

    child = fork(close_all)
    child.hear()
    assert pyshare.names() == ["closed"]
    with pyshare.attach("closed") as region:
        region.write(0, b"here")
    child.say()
    assert child.wait() == 0
    assert entries() == set()


IN_NAMESPACE = """
import sys, pyshare
with pyshare.create("inside", size=1):
    print("made", flush=True)
    sys.stdin.read()
"""


def test_a_name_in_another_pid_namespace_is_not_called_stale() -> None:
    enter = ["unshare", "--pid", "--fork", "--kill-child"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*enter, "true"], check=False, capture_output=True).returncode:
            pytest.skip("no new pid namespace permitted")
    inside = subprocess.Popen(
        [*enter, sys.executable, "-c", IN_NAMESPACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with inside:
        assert inside.stdout is not None
        assert inside.stdin is not None
        assert inside.stdout.readline() == "made\n"
        assert pyshare.names() == ["inside"]
        with pytest.raises(pyshare.RegionExists):
            pyshare.create("inside", size=1)
        with pytest.raises(PermissionError, match="descriptor to be passed over a Unix socket"):
            pyshare.attach("inside")
        assert entries() == {"pyshare.inside"}
        inside.stdin.close()
        assert inside.wait(60) == 0
    assert entries() == set()


# -- Other users -------------------------------------------------------------------------------------------------------


def as_nobody(body: Callable[[Child], object], *, dumpable: bool = True) -> Callable[[Child], None]:
    def run(child: Child) -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        pr_set_dumpable = 4
        assert ctypes.CDLL(None).prctl(pr_set_dumpable, int(dumpable)) == 0
        body(child)

    return run


def refusal(call: Callable[[], object]) -> str:
    """The words of a PermissionError; any other error goes on."""
    try:
        call()
    except PermissionError as error:
        return str(error)
    return "not refused"


@needs_root
@pytest.mark.parametrize(
    ("mode", "words"), [(0o600, "mode keeps you out"), (0o666, "none of its holders can be reached")]
)
def test_another_users_name_is_refused(mode: int, words: str, fork: Fork) -> None:
    held(fork, "theirs", mode=mode)
    child = fork(as_nobody(lambda child: child.say(refusal(lambda: pyshare.attach("theirs")))))
    answer = child.hear()
    assert words in answer
    assert "descriptor to be passed over a Unix socket" in answer
    assert child.wait() == 0
    with pyshare.attach("theirs") as region:
        assert region.read(0, 4) == b"held"


@needs_root
@pytest.mark.parametrize(("mode", "seen"), [(0o600, []), (0o666, ["theirs"])])
def test_another_users_name_can_be_neither_removed_nor_replaced(mode: int, seen: list[str], fork: Fork) -> None:
    def look(child: Child) -> None:
        child.say(refusal(lambda: pyshare.unlink("theirs")))
        child.say(refusal(lambda: pyshare.create("theirs", size=1, replace=True)))
        with pytest.raises((pyshare.RegionExists, PermissionError)):
            pyshare.create("theirs", size=1)
        child.say(str(pyshare.names()))

    with pyshare.create("theirs", size=PAGE, mode=mode):
        child = fork(as_nobody(look))
        assert "'theirs'" in child.hear()
        assert "'theirs'" in child.hear()
        assert child.hear() == str(seen)
        assert child.wait() == 0
        assert entries() == {"pyshare.theirs"}


@needs_root
def test_a_stale_name_of_another_user_is_not_found_but_stays(fork: Fork) -> None:
    holder = held(fork, "theirs", mode=0o666)
    holder.kill()
    holder.wait()

    def look(child: Child) -> None:
        for call in (pyshare.attach, pyshare.unlink):
            with pytest.raises(pyshare.RegionNotFound):
                call("theirs")
        assert pyshare.names() == []
        child.say(refusal(lambda: pyshare.create("theirs", size=1)))

    child = fork(as_nobody(look))
    assert "belongs to another user" in child.hear()
    assert child.wait() == 0
    assert entries() == {"pyshare.theirs"}


@needs_root
def test_a_name_that_another_user_planted_is_refused(fork: Fork) -> None:
    planter = fork(as_nobody(lambda child: hold(child, "planted", mode=0o666)))
    planter.hear()
    assert pyshare.names() == []
    for call in (pyshare.attach, pyshare.unlink, lambda name: pyshare.create(name, size=1)):
        assert f"was made by user {NOBODY}" in refusal(lambda call=call: call("planted"))  # type: ignore[misc]
    assert "only its owner" in refusal(lambda: pyshare.create("planted", size=1, replace=True))
    assert entries() == {"pyshare.planted"}
    planter.say()
    assert planter.wait() == 0


@needs_root
@pytest.mark.parametrize("dumpable", [True, False])
def test_a_holder_that_cannot_be_reached_says_to_pass_the_descriptor(dumpable: bool, fork: Fork) -> None:
    holder = fork(as_nobody(lambda child: hold(child, "quiet"), dumpable=dumpable))
    holder.hear()

    def look(child: Child) -> None:
        child.say(refusal(lambda: pyshare.attach("quiet").close()))
        child.say(str(pyshare.names()))

    other = fork(as_nobody(look))
    answer = other.hear()
    assert ("descriptor to be passed over a Unix socket" in answer) != dumpable, answer
    assert other.hear() == "['quiet']"
    holder.say()
    assert (holder.wait(), other.wait()) == (0, 0)


@pytest.mark.parametrize(("umask", "mode", "got"), [(0o077, 0o666, 0o600), (0o027, 0o664, 0o640), (0, 0o622, 0o622)])
def test_the_umask_applies_to_the_memory_and_the_name(umask: int, mode: int, got: int) -> None:
    os.umask(umask)
    with pyshare.create("masked", size=1, mode=mode) as region:
        for file in (region.fileno(), "/dev/shm/pyshare.masked"):
            assert os.stat(file).st_mode & 0o777 == got
    assert os.umask(umask) == umask


@needs_root
@pytest.mark.parametrize(("mode", "opens"), [(0o644, False), (0o666, True)])
def test_a_read_only_descriptor_gives_another_user_what_the_mode_says(mode: int, opens: bool, fork: Fork) -> None:
    region = pyshare.create(size=PAGE, mode=mode)
    read_only = os.open(f"/proc/self/fd/{region.fileno()}", os.O_RDONLY)

    def reopen(child: Child) -> None:
        region.close()
        child.say(refusal(lambda: os.open(f"/proc/self/fd/{read_only}", os.O_RDWR)))
        child.say(refusal(lambda: pyshare.attach(read_only).close()))

    child = fork(as_nobody(reopen))
    assert (child.hear() == "not refused") == opens
    assert "read-only" in child.hear()  # whatever the mode says
    assert child.wait() == 0
    os.close(read_only)
    region.close()


# -- A directory that has no room, or is none --------------------------------------------------------------------------


def mount(options: bytes, *, at: bytes = b"/dev/shm", flags: int = 0) -> None:
    """A file system that only this process sees."""
    libc = ctypes.CDLL(None)
    new_mounts, private = 0x20000, 0x44000
    assert libc.unshare(new_mounts) == 0
    assert libc.mount(b"none", b"/", None, private, None) == 0
    assert libc.mount(b"none", at, b"tmpfs", flags, options) == 0


def fill() -> None:
    """There is no page left in /dev/shm."""
    with contextlib.suppress(OSError), open("/dev/shm/full", "wb", buffering=0) as file:
        while file.write(bytes(PAGE)):
            pass


def is_full() -> None:
    mount(b"size=16k,mode=1777")
    fill()


def is_read_only() -> None:
    mount(b"mode=1777", flags=1)


def is_missing() -> None:
    mount(b"mode=755", at=b"/dev")


def is_anothers() -> None:
    mount(b"mode=755")
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def is_kept_from_us() -> None:
    mount(b"mode=700")
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def open_or_create(name: str) -> Region:
    """As programs do; an error that would come for ever is not one of the two."""
    for _ in range(100):
        with contextlib.suppress(FileExistsError):
            return pyshare.create(name, size=PAGE)
        with contextlib.suppress(pyshare.RegionNotFound):
            return pyshare.attach(name)
    raise AssertionError("it would go on for ever")


@needs_root
@pytest.mark.parametrize(
    ("how", "number"),
    [
        (is_full, errno.ENOSPC),
        (is_read_only, errno.EROFS),
        (is_missing, errno.ENOENT),
        (is_anothers, errno.EACCES),
        (is_kept_from_us, errno.EACCES),
    ],
    ids=lambda value: getattr(value, "__name__", errno.errorcode.get(value)),
)
def test_where_no_name_can_be_made_the_kernels_errno_is_told(how: Callable[[], None], number: int, fork: Fork) -> None:
    def body(_: Child) -> None:
        how()
        for make in (lambda: pyshare.create("x", size=PAGE), lambda: open_or_create("x")):
            with pytest.raises(OSError, match="a name needs one page there; a region without a name does not") as told:
                make()
            assert (told.value.errno, told.value.filename) == (number, "/dev/shm/pyshare.x")
            assert not isinstance(told.value, pyshare.ShareError)
        with pyshare.create(size=PAGE) as region:
            region.write(0, b"x")

    assert fork(body).wait() == 0


@needs_root
def test_without_a_directory_nothing_is_there_and_nothing_is_waited_for(fork: Fork) -> None:
    region = pyshare.create("elsewhere", size=PAGE)

    def body(_: Child) -> None:
        is_missing()
        for call in (pyshare.attach, pyshare.unlink):
            with pytest.raises(FileNotFoundError) as told:
                call("x")
            assert told.value.filename == "/dev/shm/pyshare.x"
            assert not isinstance(told.value, pyshare.RegionNotFound)
        assert pyshare.names() == []
        with pyshare.attach(region.fileno()) as again:  # its name cannot be seen from here
            assert again.name == "elsewhere"

    assert fork(body).wait() == 0
    region.close()


@needs_root
def test_a_directory_that_cannot_be_read_is_told(fork: Fork, capfd: pytest.CaptureFixture[str]) -> None:
    def body(_: Child) -> None:
        is_kept_from_us()
        assert [__main__.main(command) for command in (["ls"], ["top", "--count", "1"])] == [1, 1]

    assert fork(body).wait() == 0
    why = "/dev/shm cannot be read: Permission denied\n"
    assert capfd.readouterr().err == f"pyshare ls: {why}pyshare top: {why}"


def test_at_the_descriptor_limit_it_is_that(fork: Fork) -> None:
    def body(_: Child) -> None:
        with pyshare.create("there", size=PAGE):
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            for call in (lambda: pyshare.create("x", size=PAGE), lambda: pyshare.attach("there")):
                with pytest.raises(OSError, match="Too many open files") as told:
                    call()
                assert told.value.errno == errno.EMFILE
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    assert fork(body).wait() == 0


def test_who_is_stopped_while_it_removes_a_name_is_told_of(fork: Fork) -> None:
    killed(fork, "stopped")

    def remove(child: Child) -> None:
        fd = os.open("/dev/shm/pyshare.stopped", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        child.say()
        child.hear()

    child = fork(remove)
    child.hear()
    with pytest.raises(OSError, match="in the hands of others") as told:
        open_or_create("stopped")
    assert (told.value.errno, told.value.filename) == (errno.EBUSY, "/dev/shm/pyshare.stopped")
    child.say()
    assert child.wait() == 0
    pyshare.create("stopped", size=PAGE).close()
    assert entries() == set()


@needs_root
def test_a_holder_has_a_row_or_is_none_and_rows_of_the_gone_are_used_again(fork: Fork) -> None:
    def join(child: Child) -> None:
        regions = [pyshare.attach("pool") for _ in range(2)]
        child.say()
        child.hear()
        assert len(regions) == 2

    def body(child: Child) -> None:
        mount(b"size=16k,mode=1777")
        early = [pyshare.create("pool", size=PAGE)]
        fill()
        other = Child(join)  # has early[0] too, so three rows
        other.hear()
        early += [pyshare.attach("pool") for _ in range(59)]
        for whole in ("pool", early[0]):
            with pytest.raises(OSError, match=r"no room for one more holder.*a region without a name does not") as told:
                pyshare.attach(whole)
            assert (told.value.errno, told.value.filename) == (errno.ENOSPC, "/dev/shm/pyshare.pool")
        other.end()
        late = pyshare.attach("pool")
        for region in early:
            region.close()
        with pyshare.attach("pool") as found:
            assert found.name == late.name == "pool"
        child.say()

    child = fork(body)
    assert child.wait() == 0


@needs_root
def test_who_is_forked_without_room_for_a_row_takes_part(fork: Fork) -> None:
    def body(_: Child) -> None:
        mount(b"size=16k,mode=1777")
        regions = [pyshare.create("pool", size=PAGE)]
        fill()
        regions += [pyshare.attach("pool") for _ in range(32)]
        with Child(lambda _: [region.write(0, b"x") for region in regions]) as child:
            assert child.wait() == 0

    assert fork(body).wait() == 0


# -- All at once -------------------------------------------------------------------------------------------------------


def race_for(child: Child, name: str) -> None:
    """Each time the other side says so: tries to make it, tells whether it did, and closes it at the next word."""
    while child.hear() == "go":
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(pyshare.create(name, size=PAGE))
                child.say("made")
            except pyshare.RegionExists:
                child.say("exists")
            child.hear()


def test_one_of_many_gets_a_stale_name(fork: Fork) -> None:
    racers = [fork(lambda child: race_for(child, "stale")) for _ in range(4)]
    for _ in range(30):
        killed(fork, "stale")
        for racer in racers:
            racer.say("go")
        assert sorted(racer.hear() for racer in racers) == ["exists"] * 3 + ["made"]
        pyshare.attach("stale").close()
        for racer in racers:
            racer.say("close")
        until(lambda: not entries())
    for racer in racers:
        racer.say("end")
        assert racer.wait() == 0


def try_everything(child: Child, seed: int, rounds: int) -> None:
    """Only what a name may mean at that moment: there, or not there."""
    choose = random.Random(seed)
    child.hear()
    for _ in range(rounds):
        with contextlib.suppress(pyshare.RegionExists, pyshare.RegionNotFound):
            what = choose.randrange(5)
            if what == 0:
                pyshare.unlink("busy")
            elif what == 1:
                assert pyshare.names() in ([], ["busy"])
            else:
                use(pyshare.attach("busy") if what == 2 else pyshare.create("busy", size=PAGE, replace=what == 4))
    child.say()


def use(region: Region) -> None:
    with region:
        assert (region.name, region.size) == ("busy", PAGE)
        region.write(0, b"x")
        region.mprotect(0, PAGE, pyshare.READ_WRITE)


def test_many_processes_make_join_and_remove_one_name(fork: Fork) -> None:
    children = [fork(lambda child, seed=seed: try_everything(child, seed, 60)) for seed in range(6)]
    for child in children:
        child.say()
    for child in children:
        assert child.wait() == 0
    assert entries() == set()
