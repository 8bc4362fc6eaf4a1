"""`pyshare doctor` tells the truth: what works here, what does not, and why, whoever it is that refuses it.

Refusals are real: seccomp filters, limits, sysctls, missing mounts, another user; each in a process of its own.
Yama alone may be absent from a machine; its words are tested without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import PATIENCE, Child
from kernel import libc, refuse

import pyshare
from pyshare import doctor
from pyshare.__main__ import main
from pyshare.doctor import ENGINE, EVERYTHING, FILTERED, QUESTIONS, Machine

Report = dict[str, Any]
NEW_MOUNTS, NEW_PIDS, PRIVATE = 0x20000, 0x20000000, 0x44000  # CLONE_NEWNS, CLONE_NEWPID; MS_PRIVATE | MS_REC
NOBODY = 65534
ALL = {question.name for question in QUESTIONS}
WAYS = {"pidfd_open", "pidfd_thread", "pidfd_getfd"}
EVERY_WAY = ["thread pidfd", "socket"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user, its mounts or a sysctl")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyshare", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")},
    )


def examine(child: Child) -> None:
    """Says the exit status, and the report."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main(["doctor", "--json"])
    child.say(json.dumps([status, json.loads(output.getvalue())]))


@pytest.fixture
def examined(fork: Callable[..., Child]) -> Callable[..., Report]:
    """examined(first): the report of a process that did this first; it agrees with itself and its exit status."""

    def run(first: Callable[[], object] = lambda: None, *, new_pids: bool = False) -> Report:
        def body(child: Child) -> None:
            first()
            examine(child)

        def outside(child: Child) -> None:
            assert libc.unshare(NEW_PIDS) == 0
            inside = Child(body)
            child.say(inside.hear())
            inside.end()

        status, report = json.loads(fork(outside if new_pids else body).hear())
        assert status == (0 if report["works"] else 1)
        assert {check["name"] for check in report["checks"]} == ALL
        assert report["works"] == (not failed(report) & named(EVERYTHING))
        return dict(report)

    return run


def named(needed_for: str) -> set[str]:
    return {question.name for question in QUESTIONS if question.needed_for == needed_for}


def failed(report: Report) -> set[str]:
    return {check["name"] for check in report["checks"] if not check["ok"]}


def check_of(report: Report, name: str) -> dict[str, Any]:
    (found,) = (check for check in report["checks"] if check["name"] == name)
    return dict(found)


def usual(examined: Callable[..., Report]) -> set[str]:
    """What this machine lacks anyway."""
    return failed(examined())


# -- The command -------------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_what_is_documented() -> None:
    done = command("--json")
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["works"] else 1)
    assert list(report) == ["pyshare", "kernel", "works", "engine", "why", "borrowing", "environment", "checks"]
    assert (report["pyshare"], report["kernel"]) == (pyshare.__version__, os.uname().release)
    assert set(report["environment"]) == {field.name for field in dataclasses.fields(Machine)} - {"kernel"}
    assert all(f"``{word}``" in str(doctor.__doc__) for word in [*report, *report["environment"], *report["checks"][0]])
    for check in report["checks"]:
        assert list(check) == ["name", "ok", "needed_for", "found", "why", "how"]
        assert all(check[field] for field in ("name", "needed_for", "found"))
        assert bool(check["why"]) == bool(check["how"]) == (not check["ok"])


def test_a_machine_that_runs_these_tests_works() -> None:
    assert command("--json").returncode == 0


def test_the_table_is_plain_and_aligned_where_nobody_looks() -> None:
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert max(map(len, lines)) <= 80
    top, checks = lines[: lines.index("")], [line for line in lines[lines.index("") + 1 :] if line[:2] in ("ok", "no")]
    assert [line.split()[0] for line in top[1:4]] == ["verdict", "engine", "borrowing"]
    assert {line.split()[1] for line in checks} == ALL
    assert len({line.index(line.split(maxsplit=2)[2]) for line in checks}) == 1


def test_what_fails_is_shown_with_its_cure(fork: Callable[..., Child], capfd: pytest.CaptureFixture[str]) -> None:
    def body(_child: Child) -> None:
        refuse("userfaultfd", errno.EPERM)
        with contextlib.redirect_stdout(open(1, "w", closefd=False)):
            assert main(["doctor"]) == 0

    assert fork(body).wait() == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert '"auto" gives mprotect: userfaultfd: a seccomp filter' in shown
    assert f"no userfaultfd EPERM: Operation not permitted needed for {ENGINE} why a seccomp filter" in shown
    assert "how let the filter pass userfaultfd" in shown


# -- A seccomp filter --------------------------------------------------------------------------------------------------

AFTER_MEMFD = {"memfd", "ofd_locks", "fork_advice", "region", "auto", "write_protect"}
AFTER_MEMFD |= {"pidfd_getfd", "socket", "pagemap", "remote"}
REFUSED = {  # what cannot be had then, and what needs it
    "userfaultfd": {"userfaultfd", "uffd_features", "write_protect", "remote"},
    "pidfd_getfd": {"pidfd_getfd"},
    "pidfd_open": WAYS,
    "futex_waitv": {"futex_waitv"},
    "io_uring_setup": {"io_uring"},
    "socket": {"socket"},
    "memfd_create": AFTER_MEMFD,
    "close_range": {"private_table", "region", "auto"},
    "set_robust_list": {"robust_list", "region", "auto"},
    "madvise": {"fork_advice", "region", "auto", "write_protect", "remote", "io_uring"},
}
TRIED = {  # by which check it is first missed
    "memfd_create": "memfd",
    "close_range": "private_table",
    "set_robust_list": "robust_list",
    "madvise": "fork_advice",
    "io_uring_setup": "io_uring",
}


LIBC_CALLS = ("madvise", "set_robust_list")  # in every thread or process: a filter that kills leaves no doctor


@pytest.mark.parametrize(
    ("call", "error"),
    [
        pytest.param(call, error, id=f"{call}-{errno.errorcode[error] if error else 'killed'}")
        for call in REFUSED
        for error in (errno.EPERM, errno.ENOSYS, None)
        if error or call not in LIBC_CALLS
    ],
)
def test_a_filter_is_found_out(call: str, error: int | None, examined: Callable[..., Report]) -> None:
    before = usual(examined)
    report = examined(lambda: refuse(call, error))
    assert failed(report) - {"auto"} == (before | REFUSED[call]) - {"auto"}
    assert report["works"] == (not REFUSED[call] & named(EVERYTHING))
    if error:
        assert ("auto" in failed(report)) == (not report["works"])  # it falls back, unless it is killed
    check = check_of(report, TRIED.get(call, call))
    assert check["found"].startswith("SIGSYS" if error is None else errno.errorcode[error])
    assert "a seccomp filter" in check["why"]
    assert call in check["why"]
    assert f"let the filter pass {call}" in check["how"]
    assert report["environment"]["seccomp"] == FILTERED
    assert report["environment"]["no_new_privs"] is True


@pytest.mark.parametrize(
    ("call", "name"),
    [("close_range", "private_table"), ("set_robust_list", "robust_list"), ("futex_waitv", "futex_waitv"),
     ("ioctl", "write_protect"), ("pidfd_getfd", "pidfd_getfd")],
)  # fmt: skip
def test_a_yes_without_effect_is_not_believed(call: str, name: str, examined: Callable[..., Report]) -> None:
    assert not check_of(examined(lambda: refuse(call, 0)), name)["ok"]


@pytest.mark.parametrize(
    ("call", "engine", "ways"),
    [
        ("userfaultfd", "mprotect", []),
        ("pidfd_getfd", "uffd", ["socket"]),
        ("pidfd_open", "uffd", ["socket"]),
        ("socket", "uffd", ["thread pidfd"]),
        ("futex_waitv", "uffd", EVERY_WAY),
        ("io_uring_setup", "uffd", EVERY_WAY),
        ("close_range", None, []),
    ],
)
def test_a_filter_leaves_what_it_leaves(
    call: str, engine: str | None, ways: list[str], examined: Callable[..., Report]
) -> None:
    if examined()["borrowing"] != EVERY_WAY:
        pytest.skip("this machine has not got it all")
    report = examined(lambda: refuse(call, errno.EPERM))
    assert (report["engine"], report["borrowing"]) == (engine, ways)


@pytest.mark.parametrize("call", [None, "userfaultfd", "pidfd_getfd", "socket", "futex_waitv"])
def test_the_engine_is_what_a_region_gets(call: str | None, fork: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        if call:
            refuse(call, errno.EPERM)
        examine(child)
        with pyshare.create(size=doctor.PAGE) as region:
            child.say(region.engine)

    child = fork(body)
    report = json.loads(child.hear())[1]
    assert report["engine"] == child.hear()
    assert child.wait() == 0


def test_a_filter_that_kills_leaves_the_other_engine(fork: Callable[..., Child]) -> None:
    def body(child: Child) -> None:
        refuse("userfaultfd", None)
        examine(child)
        with pyshare.create(size=doctor.PAGE, engine="mprotect") as region:
            child.say(region.engine)
        pyshare.create(size=doctor.PAGE)

    child = fork(body)
    status, report = json.loads(child.hear())
    check = check_of(report, "auto")
    assert (status, report["works"], report["engine"]) == (0, True, None)
    assert check["found"].startswith("SIGSYS")
    assert check["how"].startswith('engine="mprotect" instead')
    assert child.hear() == "mprotect"
    assert child.wait() == -signal.SIGSYS


def test_what_a_missing_thing_prevents_is_not_tried(examined: Callable[..., Report]) -> None:
    report = examined(lambda: refuse("userfaultfd", errno.EPERM))
    check = check_of(report, "uffd_features")
    assert (check["found"], check["why"]) == ("not tried", "it needs userfaultfd")


# -- An old kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["userfaultfd", "pidfd_getfd", "futex_waitv"])
def test_an_old_kernel_is_told_from_a_filter(call: str, examined: Callable[..., Report]) -> None:
    def old() -> None:
        uname26 = 0x0020000
        assert libc.personality(uname26) != -1  # uname(2) says 2.6
        refuse(call, errno.ENOSYS)

    report = examined(old)
    check = check_of(report, call)
    assert report["kernel"].startswith("2.6.")
    assert f"Linux {report['kernel']} is too old: it came with 5." in check["why"]
    assert "seccomp" not in check["why"]
    assert check["how"].startswith("Linux 5.")
    assert check_of(report, "memfd")["ok"]  # what works is not called too new


# -- Sysctls, limits, mounts -------------------------------------------------------------------------------------------


def mount(kind: bytes, where: bytes, options: bytes | None = None) -> None:
    """In mounts of our own."""
    assert libc.unshare(NEW_MOUNTS) == 0
    assert libc.mount(b"none", b"/", None, PRIVATE, None) == 0
    assert libc.mount(kind, where, kind, 0, options) == 0


@needs_root
@pytest.mark.skipif(not os.path.exists("/proc/sys/vm/memfd_noexec"), reason="Linux before 6.3")
def test_a_sysctl_that_forbids_executable_memfds(examined: Callable[..., Report]) -> None:
    """A pid namespace has this one to itself."""

    def first() -> None:
        mount(b"proc", b"/proc")
        with open("/proc/sys/vm/memfd_noexec", "w") as file:
            file.write("2")

    report = examined(first, new_pids=True)
    check = check_of(report, "memfd")
    assert not report["works"]
    assert check["found"].startswith("EACCES")
    assert check["why"].startswith("vm.memfd_noexec is 2")
    assert check["how"] == "sysctl -w vm.memfd_noexec=1"
    assert report["environment"]["memfd_noexec"] == 2
    assert report["environment"]["container"]


@needs_root
def test_a_missing_proc(examined: Callable[..., Report]) -> None:
    report = examined(lambda: mount(b"tmpfs", b"/proc"))
    assert (report["works"], report["engine"]) == (False, None)
    assert check_of(report, "proc")["why"].startswith("/proc is missing")
    assert check_of(report, "proc")["how"].startswith("mount -t proc")
    assert report["environment"]["seccomp"] is None


@needs_root
def test_a_proc_of_another_pid_namespace(examined: Callable[..., Report]) -> None:
    report = examined(new_pids=True)
    assert check_of(report, "proc")["found"] == "ESRCH: /proc is that of another pid namespace"


@needs_root
@pytest.mark.parametrize("options", [b"ro", b"mode=755,size=4k,nr_inodes=1"], ids=["read-only", "full"])
def test_names_need_dev_shm_and_nothing_else_does(options: bytes, examined: Callable[..., Report]) -> None:
    before = usual(examined)
    flags = 1 if options == b"ro" else 0

    def first() -> None:
        mount(b"tmpfs", b"/dev/shm", None if flags else options)
        if flags:
            read_only_remount = 0x21
            assert libc.mount(b"tmpfs", b"/dev/shm", None, read_only_remount, None) == 0

    report = examined(first)
    assert failed(report) == before | {"names"}
    assert report["works"]
    assert "/dev/shm" in check_of(report, "names")["why"]


@pytest.mark.parametrize("hard", [1024, 8192])
def test_the_limit_of_descriptors(hard: int, examined: Callable[..., Report]) -> None:
    before = usual(examined)
    report = examined(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard)))
    assert failed(report) == before | {"descriptors"}
    check = check_of(report, "descriptors")
    assert check["found"] == f"EINVAL: RLIMIT_NOFILE is 1,024 (hard limit {hard:,})"
    assert "ulimit -n 4096" in check["how"]
    assert ("hard limit" in check["how"]) == (hard == 1024)


# -- Other users -------------------------------------------------------------------------------------------------------


def become_nobody(*, dumpable: bool) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    pr_set_dumpable = 4
    assert libc.prctl(pr_set_dumpable, int(dumpable)) == 0


@needs_root
def test_nobody_needs_no_privilege(examined: Callable[..., Report]) -> None:
    before = usual(examined)
    report = examined(lambda: become_nobody(dumpable=True))
    environment = report["environment"]
    assert (environment["ptrace_capability"], environment["dumpable"]) == (False, True)
    if not environment["ptrace_scope"]:
        assert failed(report) == before  # whatever vm.unprivileged_userfaultfd says


@needs_root
def test_a_process_that_is_not_dumpable(examined: Callable[..., Report]) -> None:
    before = usual(examined)
    report = examined(lambda: become_nobody(dumpable=False))
    assert report["environment"]["dumpable"] is False
    assert failed(report) - before == {"pidfd_getfd", "pagemap"}
    assert report["borrowing"] == (["socket"] if report["engine"] == "uffd" else [])
    for name in ("pidfd_getfd", "pagemap"):
        assert "not dumpable" in check_of(report, name)["why"]


# -- Yama, and security modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        (Machine("6.1", seccomp=0, ptrace_scope=1), "pidfd_getfd", "kernel.yama.ptrace_scope is 1"),
        (Machine("6.1", seccomp=0, ptrace_scope=2, ptrace_capability=False), "pidfd_getfd", "ptrace_scope is 2"),
        (Machine("6.1", seccomp=0, ptrace_scope=3, ptrace_capability=True), "pidfd_getfd", "ptrace_scope is 3"),
        (Machine("6.1", seccomp=0, ptrace_scope=1, ptrace_capability=True), "pidfd_getfd", "a security module"),
        (Machine("6.1", seccomp=0, ptrace_scope=1), "pagemap", "a security module"),
        (Machine("6.1", seccomp=FILTERED, ptrace_scope=1), "pidfd_getfd", "Yama"),  # which the filter here lets pass
        (Machine("5.5", seccomp=0, ptrace_scope=1), "pidfd_getfd", "too old: it came with 5.6"),
        (Machine("6.1", seccomp=0, security_modules="selinux"), "userfaultfd", "a security module (selinux)"),
        (Machine("6.6", seccomp=0, io_uring_disabled=2), "io_uring", "kernel.io_uring_disabled is 2"),
    ],
)
def test_words_for_what_this_machine_may_not_have(machine: Machine, name: str, words: str) -> None:
    (question,) = (question for question in QUESTIONS if question.name == name)
    why, how = doctor.reason(machine, question, OSError(errno.EPERM, "Operation not permitted"))
    assert words in why
    assert how
