"""What this machine offers to pyshare, and for what it lacks, why and how to get it.

Lives here: one question for everything that a region rests on, each put to
the kernel by trying the thing; what a refusal means; the two forms of the answer.
Not here: the calls that Python lacks (ext/probe/probe.c), what a region does with it all.

The exit status is 0 where pyshare works, be it with the co-operative engine alone, and 1 where it cannot.
``--json`` prints one object:

- ``pyshare``, ``kernel``: the versions.
- ``works``: what the exit status says.
- ``engine``: what ``engine="auto"`` gives, "uffd" or "mprotect"; null where it gives none.  ``why``: the reason.
- ``borrowing``: the ways in which a caller can come to change the pages of another participant by itself, of
  "thread pidfd" (nobody wakes) and "socket" (it answers once).  Without any, participants do it when they are woken.
- ``environment``: ``seccomp`` (0: no filter, 2: a filter), ``no_new_privs``, ``dumpable``, ``ptrace_capability``,
  ``ptrace_scope`` (Yama), ``memfd_noexec``, ``unprivileged_userfaultfd`` (not needed: user-mode faults are enough),
  ``io_uring_disabled`` (1: for all but a group, 2: for all),
  ``container``, ``security_modules``; null where there is no such thing, or /proc does not tell.
- ``checks``: a list of ``name``, ``ok``, ``needed_for``, ``found``, and, where not ok, ``why`` and ``how`` to get it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import json
import mmap
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import pyshare
from pyshare import _probe

NAME = "doctor"

PAGE = mmap.PAGESIZE
PIDFD_THREAD = os.O_EXCL
MADV_WIPEONFORK = 18
BORROWED = range(1024, 2048)  # where borrowed descriptors are kept, and how many
MAPPINGS = 65530  # the kernel's own default of vm.max_map_count
FEATURES = {"PAGEFAULT_FLAG_WP": 1 << 0, "SIGBUS": 1 << 7, "WP_HUGETLBFS_SHMEM": 1 << 12}
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
CAP_SYS_PTRACE = 1 << 19
FILTERED = 2  # Seccomp: in /proc/self/status
REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EAFNOSUPPORT)

EVERYTHING = "everything"
AUTO = 'engine="auto"'
ENGINE = 'engine "uffd"'
FAILSAFE = "pages that stay protected where all descriptors were closed, and then the agent was ended"
BORROWING = "changing a participant's pages without waking it"


# -- The machine ---------------------------------------------------------------------------------


def read(path: str) -> str | None:
    """What a file says; None where it cannot be read."""
    try:
        with open(path) as file:
            return file.read().replace("\0", "").strip()
    except OSError:
        return None


def number(path: str) -> int | None:
    """What a sysctl says; None where there is none."""
    text = read(path)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def container() -> str | None:
    """What betrays a container; None if nothing does."""
    for path in ("/.dockerenv", "/run/.containerenv"):
        if os.path.exists(path):
            return path
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        if os.environ.get(name):
            return f"${name}={os.environ[name]}"
    with contextlib.suppress(OSError):
        if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
            return "a pid namespace of its own"
    return None


@dataclasses.dataclass(frozen=True)
class Machine:
    """What refusals are explained by."""

    kernel: str
    seccomp: int | None = None
    no_new_privs: bool | None = None
    dumpable: bool = True
    ptrace_capability: bool | None = None
    ptrace_scope: int | None = None
    memfd_noexec: int | None = None
    unprivileged_userfaultfd: int | None = None
    io_uring_disabled: int | None = None
    container: str | None = None
    security_modules: str | None = None

    @classmethod
    def here(cls) -> Machine:
        """This one, as this process sees it."""
        status = dict(re.findall(r"^(\w+):\s*(\w+)", read("/proc/thread-self/status") or "", re.M))
        label = read("/proc/thread-self/attr/current")
        modules = [text for text in (read("/sys/kernel/security/lsm"), label and f"label {label}") if text]
        return cls(
            kernel=os.uname().release,
            seccomp=int(status["Seccomp"]) if "Seccomp" in status else None,
            no_new_privs=status["NoNewPrivs"] == "1" if "NoNewPrivs" in status else None,
            dumpable=_probe.dumpable(),
            ptrace_capability=bool(int(status["CapEff"], 16) & CAP_SYS_PTRACE) if "CapEff" in status else None,
            ptrace_scope=number("/proc/sys/kernel/yama/ptrace_scope"),
            memfd_noexec=number("/proc/sys/vm/memfd_noexec"),
            unprivileged_userfaultfd=number("/proc/sys/vm/unprivileged_userfaultfd"),
            io_uring_disabled=number("/proc/sys/kernel/io_uring_disabled"),
            container=container(),
            security_modules="; ".join(modules) or None,
        )

    def older_than(self, version: tuple[int, int]) -> bool:
        """By its own number; distributors may have brought things to older kernels."""
        found = re.match(r"(\d+)\.(\d+)", self.kernel)
        return found is not None and (int(found[1]), int(found[2])) < version


# -- What is tried -------------------------------------------------------------------------------


class NotTried(Exception):
    """Something else, which must work first, does not."""


class Killed(Exception):
    """Whoever tries it is killed by this signal."""


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends, closed afterwards."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def without_effect(what: str) -> OSError:
    """The kernel said yes and did nothing, as emulations of Linux do."""
    return OSError(errno.ENOSYS, f"{what}, without effect")


class Subject:
    """Two pages of shared memory of this process, its userfaultfd, and another process that is to reach them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.works: set[str] = set()  # names of the checks that were ok
        self.memfd = self.uffd = -1
        self.memory: mmap.mmap
        self.neighbour = 0  # the process that tried something last

    def own(self, fd: int) -> int:
        """The descriptor is closed at the end."""
        self.stack.callback(os.close, fd)
        return fd

    def inode(self, fd: int | None = None) -> int:
        """Of the memfd, or of another descriptor that should be it."""
        return os.fstat(self.memfd if fd is None else fd).st_ino

    def need(self, *names: str) -> None:
        """NotTried, if one of these checks failed."""
        for name in names:
            if name not in self.works:
                raise NotTried(name)


Attempt = Callable[[Subject], str]  # returns what was found; OSError, NotTried


def by_neighbour(attempt: Attempt) -> Attempt:
    """The same, tried by a forked process, upon this one."""

    def ask(subject: Subject) -> str:
        reader, writer = os.pipe()
        subject.neighbour = os.fork()
        if subject.neighbour == 0:
            try:
                os.write(writer, json.dumps(outcome(attempt, subject)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            text = answer.read()
        _, status = os.waitpid(subject.neighbour, 0)
        if os.WIFSIGNALED(status):
            raise Killed(os.WTERMSIG(status))
        kind, *found = json.loads(text)
        if kind == "ok":
            return str(found[0])
        raise NotTried(*found) if kind == "not tried" else OSError(*found)

    return ask


def outcome(attempt: Attempt, subject: Subject) -> list[Any]:
    """What it returned or raised, to be sent."""
    try:
        return ["ok", attempt(subject)]
    except NotTried as unmet:
        return ["not tried", str(unmet)]
    except OSError as error:
        return ["error", error.errno or errno.EIO, error.strerror or str(error)]
    except pyshare.ShareError as error:
        return ["error", errno.EIO, str(error)]


def proc(_subject: Subject) -> str:
    """/proc is mounted, speaks of us by our own number, and opens descriptors anew."""
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError(errno.ESRCH, "/proc is that of another pid namespace")
    with pipe() as (reader, _):
        os.close(_probe.reopen(reader))
    return "of this pid namespace; descriptors can be opened anew"


def memfd(subject: Subject) -> str:
    """Memory that nobody can resize any more."""
    subject.memfd = subject.own(_probe.memfd())
    os.ftruncate(subject.memfd, 2 * PAGE)
    fcntl.fcntl(subject.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    for size in (0, 3 * PAGE):
        with contextlib.suppress(PermissionError):
            os.ftruncate(subject.memfd, size)
            raise without_effect("sealed")
    subject.memory = mmap.mmap(subject.memfd, 2 * PAGE)
    subject.memory[0] = subject.memory[PAGE] = 1
    return "made, and sealed against shrinking and growing"


def ofd_locks(subject: Subject) -> str:
    """A lock of an open file description keeps out another one of the same process."""
    subject.need("proc", "memfd")
    first, second = (subject.own(_probe.reopen(subject.memfd)) for _ in range(2))
    _probe.ofd_take(first)
    with contextlib.suppress(BlockingIOError):
        _probe.ofd_take(second)
        raise without_effect("locked")
    return "one description keeps out another"


def private_table(_subject: Subject) -> str:
    """A thread can have descriptors that nobody else closes."""
    with pipe() as (reader, _):
        _probe.private_table(reader)
    return "close_range(CLOSE_RANGE_UNSHARE) gives a thread descriptors of its own"


def death_mark(_subject: Subject) -> str:
    """The kernel says when a thread ends."""
    _probe.death_mark()
    return "the kernel marks a word when a thread ends"


def fork_advice(subject: Subject) -> str:
    """A mapping can be kept from a forked child, or be empty there."""
    subject.need("memfd")
    subject.memory.madvise(mmap.MADV_DONTFORK)
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        private.madvise(MADV_WIPEONFORK)
    return "MADV_DONTFORK, MADV_WIPEONFORK"


def region(engine: str) -> Attempt:
    """All of it together, by a neighbour: its agent must not stay with us, and a filter may kill it."""

    def attempt(subject: Subject) -> str:
        subject.need(*(one.name for one in QUESTIONS if one.needed_for == EVERYTHING and one.name != "region"))
        with pyshare.create(size=PAGE, engine=engine) as made:
            made.mprotect(0, PAGE, pyshare.READ)
            with contextlib.suppress(pyshare.ProtectionError):
                made.write(0, b"1")
                raise without_effect("protected")
            return f'created, protected, closed, with engine "{made.engine}"'

    return by_neighbour(attempt)


def userfaultfd(subject: Subject) -> str:
    """A userfaultfd, without a privilege."""
    subject.uffd = subject.own(_probe.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK))
    return "opened with UFFD_USER_MODE_ONLY"


def uffd_features(subject: Subject) -> str:
    """It can write-protect shared memory, and says SIGBUS."""
    subject.need("userfaultfd")
    try:
        _probe.uffd_features(subject.uffd, sum(FEATURES.values()))
    except OSError as error:
        offered = _probe.uffd_features(subject.own(_probe.userfaultfd(os.O_CLOEXEC)), 0)
        missing = [name for name, bit in FEATURES.items() if not offered & bit]
        if not missing:
            raise
        raise OSError(error.errno, f"lacks {', '.join(missing)}") from None
    return ", ".join(FEATURES)


def is_protected(subject: Subject) -> bool:
    """Does the kernel refuse to store into our last page?"""
    with pipe() as (reader, writer):
        os.write(writer, b"1")
        try:
            os.readv(reader, [memoryview(subject.memory)[PAGE:]])
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return True
    return False


def protecting(on: bool) -> Attempt:
    """The page tables of the process whose userfaultfd it is are changed."""

    def attempt(subject: Subject) -> str:
        _probe.uffd_protect(subject.uffd, _probe.address(subject.memory), 2 * PAGE, on)
        return "changed"

    return attempt


def write_protect(subject: Subject) -> str:
    """A store into a protected page fails, and later succeeds; the pages are two mappings for the kernel."""
    subject.need("memfd", "uffd_features")
    subject.memory.madvise(mmap.MADV_DONTDUMP, PAGE, PAGE)
    _probe.uffd_register(subject.uffd, _probe.address(subject.memory), 2 * PAGE)
    for on in (True, False):
        protecting(on)(subject)
        if is_protected(subject) != on:
            raise without_effect("write-protected")
    return "pages of a memfd were protected from a store, and opened again"


def descriptors(subject: Subject) -> str:
    """So many descriptors can be kept out of the program's way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        os.close(fcntl.fcntl(0 if subject.memfd < 0 else subject.memfd, fcntl.F_DUPFD_CLOEXEC, BORROWED[-1]))
    except OSError as error:
        raise OSError(error.errno, f"RLIMIT_NOFILE is {soft:,} (hard limit {hard:,})") from None
    return f"RLIMIT_NOFILE is {soft:,}"


def keeper(_subject: Subject) -> str:
    """A mapping keeps a userfaultfd open where no descriptor does."""
    _probe.keep_open()
    return "a mapping keeps a file open without a descriptor"


def waitv(_subject: Subject) -> str:
    """One sleep for an answer, or the death of who was to give it."""
    _probe.waitv()
    return "a sleep on two words"


def names(_subject: Subject) -> str:
    """A file of /dev/shm with a page in it; it has no name, so it cannot be left behind."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, PAGE)
        space = os.fstatvfs(fd)
    finally:
        os.close(fd)
    return f"{space.f_bavail * space.f_frsize >> 20:,} MiB free in /dev/shm"


def mappings(_subject: Subject) -> str:
    """A process can have so many."""
    with open("/proc/sys/vm/max_map_count") as file, open("/proc/self/maps") as maps:
        limit, used = int(file.read()), sum(1 for _ in maps)
    found = f"vm.max_map_count is {limit:,}; {used:,} in use"
    if limit < MAPPINGS:
        raise OSError(errno.ENOMEM, found)
    return found


# -- What a neighbour tries ----------------------------------------------------------------------


def open_pidfd(_subject: Subject) -> str:
    """A descriptor of a process."""
    os.close(_probe.pidfd_open(os.getppid(), 0))
    return "of another process"


def open_thread_pidfd(_subject: Subject) -> str:
    """A descriptor of a thread, which may have a table of its own."""
    os.close(_probe.pidfd_open(os.getppid(), PIDFD_THREAD))
    return "of a thread of another process"


def take_descriptor(subject: Subject) -> str:
    """From a process that is not our child: what is allowed to a parent (Yama) does not count."""
    subject.need("memfd", "pidfd_open")
    pidfd = _probe.pidfd_open(os.getppid(), PIDFD_THREAD if "pidfd_thread" in subject.works else 0)
    if subject.inode(_probe.pidfd_getfd(pidfd, subject.memfd)) != subject.inode():
        raise without_effect("taken")
    return "a descriptor was taken from another process"


def look_at_pagemap(subject: Subject) -> str:
    """Which pages another process has, and how."""
    subject.need("memfd")
    _probe.uffd_protected(os.getppid(), _probe.address(subject.memory))
    return "/proc/PID/pagemap of another process"


def protect_from_outside(subject: Subject) -> str:
    """As write_protect, through a descriptor in another process."""
    subject.need("write_protect")
    for on in (True, False):
        by_neighbour(protecting(on))(subject)
        if is_protected(subject) != on:
            raise without_effect("write-protected")
    return "another process protected pages of this one, and opened them again"


def pass_descriptor(subject: Subject) -> str:
    """A neighbour is asked for a descriptor by its abstract socket, and what comes says who sent it."""
    subject.need("memfd")
    asking, _ = _probe.abstract_socket()
    subject.own(asking)
    asked, name = _probe.abstract_socket()
    subject.own(asked)
    _probe.socket_ask(asking, name)

    def answer(subject: Subject) -> str:
        _probe.socket_answer(asked, subject.memfd)
        return "answered"

    by_neighbour(answer)(subject)
    sender, received = _probe.socket_take(asking)
    if sender != subject.neighbour or received < 0 or subject.inode(subject.own(received)) != subject.inode():
        raise without_effect("sent")
    return "SCM_RIGHTS and SCM_CREDENTIALS over an abstract socket"


# -- The questions -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing that a region rests on."""

    name: str
    needed_for: str
    since: tuple[int, int]  # the version of Linux that brought it
    ask: Attempt
    call: str = ""  # by which name a filter knows it
    config: str = ""  # the kernel's build option
    # The same call without consequences: it reaches the kernel, which refuses its arguments at most with another errno.
    harmless: Callable[[], object] | None = None


# fmt: off
QUESTIONS = (
    Question("proc", EVERYTHING, (2, 6), proc),
    Question("memfd", EVERYTHING, (3, 17), memfd, "memfd_create", "CONFIG_MEMFD_CREATE",
             lambda: os.memfd_create("", -1 & 0xFFFFFFFF)),
    Question("ofd_locks", EVERYTHING, (3, 15), ofd_locks, "fcntl", "CONFIG_FILE_LOCKING"),
    Question("private_table", EVERYTHING, (5, 9), private_table, "close_range", "", lambda: _probe.private_table(0)),
    Question("robust_list", EVERYTHING, (2, 6), death_mark, "set_robust_list", "CONFIG_FUTEX", _probe.death_mark),
    Question("fork_advice", EVERYTHING, (4, 14), fork_advice, "madvise", "CONFIG_ADVISE_SYSCALLS"),
    Question("region", EVERYTHING, (5, 9), region("mprotect"), "something that it needs"),
    Question("auto", AUTO, (5, 9), region("auto"), "something that it tries"),
    Question("userfaultfd", ENGINE, (5, 11), userfaultfd, "userfaultfd", "CONFIG_USERFAULTFD",
             lambda: _probe.userfaultfd(-1)),
    Question("uffd_features", ENGINE, (5, 19), uffd_features, "ioctl", "CONFIG_PTE_MARKER_UFFD_WP"),
    Question("write_protect", ENGINE, (5, 19), write_protect, "ioctl", "CONFIG_PTE_MARKER_UFFD_WP"),
    Question("io_uring", FAILSAFE, (5, 1), keeper, "io_uring_setup", "CONFIG_IO_URING", _probe.keep_open),
    Question("pidfd_open", "noticing a death at once where /proc does not tell", (5, 3), by_neighbour(open_pidfd),
             "pidfd_open", "", lambda: _probe.pidfd_open(-1, 0)),
    Question("pidfd_thread", BORROWING, (6, 9), by_neighbour(open_thread_pidfd), "pidfd_open", "",
             lambda: _probe.pidfd_open(-1, PIDFD_THREAD)),
    Question("pidfd_getfd", BORROWING, (5, 6), by_neighbour(take_descriptor), "pidfd_getfd", "",
             lambda: _probe.pidfd_getfd(-1, 0)),
    Question("socket", BORROWING, (2, 6), pass_descriptor, "socket", "CONFIG_UNIX",
             lambda: socket.socket(socket.AF_UNIX, -1)),
    Question("pagemap", BORROWING, (4, 2), by_neighbour(look_at_pagemap), "", "CONFIG_PROC_PAGE_MONITOR"),
    Question("remote", BORROWING, (5, 19), protect_from_outside, "ioctl"),
    Question("descriptors", "1,024 borrowed descriptors, out of the way", (2, 6), descriptors),
    Question("futex_waitv", "waits that do not look up every 1 ms", (5, 16), waitv, "futex_waitv", "CONFIG_FUTEX",
             _probe.waitv),
    Question("names", "regions that have a name", (3, 11), names),
    Question("mappings", "many boundaries between protections", (2, 6), mappings),
)
# fmt: on


def harmless(call: Callable[[], object]) -> Attempt:
    """An attempt that only a filter can spoil, by killing."""

    def ask(_subject: Subject) -> str:
        with contextlib.suppress(OSError):
            call()
        return ""

    return ask


# -- What a refusal means ------------------------------------------------------------------------

Reason = tuple[str, str]  # why, and how to get it


def is_filtered(machine: Machine, question: Question, error: OSError) -> bool | None:
    """Was it a seccomp filter?  None: there is nothing to tell it by."""
    if error.errno not in REFUSALS or not question.call or machine.seccomp == 0:
        return False
    if question.harmless:
        try:
            question.harmless()
            return False
        except OSError as other:
            if other.errno != error.errno:
                return False
    return True if machine.seccomp == FILTERED else None


def by_filter(machine: Machine, question: Question) -> Reason:
    """It may be there, but this process may not ask."""
    where = f"; this is a container ({machine.container})" if machine.container else ""
    return (
        f"a seccomp filter refuses {question.call}{where}",
        f"let the filter pass {question.call}: --security-opt seccomp=PROFILE (docker, podman), seccompProfile "
        "(Kubernetes), SystemCallFilter= (systemd)",
    )


def by_tracing(machine: Machine, question: Question) -> Reason:
    """The kernel lets a process into another one only if it might trace it; Yama has no say in mere looking."""
    scope = machine.ptrace_scope or 0
    if not machine.dumpable:
        return (
            "this process is not dumpable: it changed its user, its program may not be read, or it asked for that",
            "prctl(PR_SET_DUMPABLE, 1), or start the program as its user",
        )
    if question.name == "pagemap" or scope == 0 or (scope < 3 and machine.ptrace_capability):
        return by_module(machine)
    how = "sysctl -w kernel.yama.ptrace_scope=0, or CAP_SYS_PTRACE"
    if scope == 3:
        how = "kernel.yama.ptrace_scope=0 from the next boot on: a 3 stays until then"
    return f"Yama forbids it: kernel.yama.ptrace_scope is {scope}", how


def by_module(machine: Machine) -> Reason:
    """What is left when it is none of the others."""
    known = f" ({machine.security_modules})" if machine.security_modules else ""
    return f"a security module{known} refuses it", "ask for a rule that permits it"


def by_limit() -> Reason:
    """Too few descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 2 * BORROWED.stop
    how = f"ulimit -n {enough}"
    if hard < enough:
        how = f"a higher hard limit (limits.conf, LimitNOFILE= of systemd, --ulimit of docker), then {how}"
    return f"descriptors {BORROWED[0]:,} to {BORROWED[-1]:,} are beyond RLIMIT_NOFILE, {soft:,}", how


def by_death(machine: Machine, question: Question) -> Reason:
    """The filter does not refuse, it kills."""
    why, how = by_filter(machine, question)
    return why, f'engine="mprotect" instead; or {how}' if question.needed_for == AUTO else how


def special(machine: Machine, question: Question, error: OSError) -> Reason | None:
    """What only this question can be refused for."""
    name = question.name
    if name == "memfd" and error.errno == errno.EACCES and machine.memfd_noexec == 2:
        return "vm.memfd_noexec is 2: no memfd whose pages may be executed", "sysctl -w vm.memfd_noexec=1"
    if name == "io_uring" and error.errno == errno.EPERM and machine.io_uring_disabled:
        return f"kernel.io_uring_disabled is {machine.io_uring_disabled}", "sysctl -w kernel.io_uring_disabled=0"
    if name == "proc":
        return "/proc is missing, or another pid namespace's", "mount -t proc proc /proc, in this pid namespace"
    if name == "descriptors":
        return by_limit()
    if name == "mappings" and error.errno == errno.ENOMEM:
        return f"vm.max_map_count is below {MAPPINGS:,}", f"sysctl -w vm.max_map_count={MAPPINGS}"
    if name == "names":
        return (
            "/dev/shm is missing, full, or not writable",
            "mount -t tmpfs -o mode=1777 tmpfs /dev/shm; a larger --shm-size (docker); or pass descriptors, not names",
        )
    if name in ("pidfd_getfd", "pagemap") and error.errno in (errno.EPERM, errno.EACCES):
        return by_tracing(machine, question)
    return None


def reason(machine: Machine, question: Question, error: OSError) -> Reason:
    """Why it failed: the kernel is too old, a filter, a sysctl, Yama, a limit, a security module."""
    filtered = is_filtered(machine, question, error)
    if machine.older_than(question.since):
        version = ".".join(map(str, question.since))
        too = ", and a seccomp filter refuses it as well" if filtered and error.errno != errno.ENOSYS else ""
        return f"Linux {machine.kernel} is too old: it came with {version}{too}", f"Linux {version} or later"
    if filtered:
        return by_filter(machine, question)
    known = special(machine, question, error)
    if known:
        return known
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "no descriptor is left", "ulimit -n 4096, or end what has so many"
    if error.errno in (errno.EPERM, errno.EACCES):
        return by_module(machine)
    if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ENOENT, errno.EAFNOSUPPORT):
        option = f", {question.config}" if question.config else ""
        doubt = "; or a seccomp filter refuses it, /proc does not tell" if filtered is None else ""
        return f"this kernel was built without it{option}{doubt}", f"a kernel that has it{option}"
    return str(error.strerror), "no cure is known"


# -- The answer ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found about one question."""

    name: str
    ok: bool
    needed_for: str
    found: str
    why: str = ""
    how: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The answer as a whole."""

    machine: Machine
    checks: list[Check]

    def ok(self, *names: str) -> bool:
        """All of these were."""
        return all(check.ok for check in self.checks if check.name in names)

    def missing(self, needed_for: str) -> Check | None:
        """The first that was not."""
        return next((check for check in self.checks if check.needed_for == needed_for and not check.ok), None)

    @property
    def works(self) -> bool:
        """The co-operative engine does."""
        return self.missing(EVERYTHING) is None

    @property
    def engine(self) -> str | None:
        """What "auto" gave; None where it gives none."""
        if not self.works or self.missing(AUTO):
            return None
        return next(check.found for check in self.checks if check.name == "auto").split('"')[1]

    @property
    def why(self) -> str:
        """The reason of the engine."""
        lacking = self.missing(EVERYTHING) or self.missing(AUTO) or self.missing(ENGINE)
        if not lacking and self.engine == "mprotect":  # nothing leads from the program to what its agent has
            lacking = next(check for check in self.checks if check.name == "socket")
        return f"{lacking.name}: {lacking.why}" if lacking else "userfaultfd can write-protect shared memory here"

    @property
    def borrowing(self) -> list[str]:
        """The ways to another participant's pages."""
        if self.engine != "uffd" or not self.ok("remote"):
            return []
        ways = {"thread pidfd": ("pidfd_thread", "pidfd_getfd", "pagemap"), "socket": ("socket",)}
        return [way for way, needed in ways.items() if self.ok(*needed)]

    def plain(self) -> dict[str, Any]:
        """As --json has it."""
        environment = dataclasses.asdict(self.machine)
        return {
            "pyshare": pyshare.__version__,
            "kernel": environment.pop("kernel"),
            "works": self.works,
            "engine": self.engine,
            "why": self.why,
            "borrowing": self.borrowing,
            "environment": environment,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }


def examine(machine: Machine) -> Iterator[Check]:
    """Every question, put to the kernel in order."""
    with contextlib.ExitStack() as stack:
        subject = Subject(stack)
        for question in QUESTIONS:
            about = (question.name, False, question.needed_for)
            try:
                if machine.seccomp == FILTERED and question.harmless:
                    by_neighbour(harmless(question.harmless))(subject)  # some filters kill
                found = question.ask(subject)
            except NotTried as unmet:
                yield Check(*about, "not tried", f"it needs {unmet}", f"see {unmet}")
            except Killed as killed:
                yield Check(
                    *about,
                    f"{signal.Signals(killed.args[0]).name}: a process that tried it was killed",
                    *by_death(machine, question),
                )
            except OSError as error:
                code = errno.errorcode.get(error.errno or 0, error.errno)
                yield Check(*about, f"{code}: {error.strerror}", *reason(machine, question, error))
            else:
                subject.works.add(question.name)
                yield Check(question.name, True, question.needed_for, found)


def table(checks: list[Check]) -> Table:
    """The checks, with what to do beside those that failed."""
    shown = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    shown.add_column(no_wrap=True)
    shown.add_column(no_wrap=True)
    shown.add_column()
    for check in checks:
        shown.add_row(Text("ok", "green") if check.ok else Text("no", "red"), check.name, Text(check.found))
        if not check.ok:
            for label, text in (("needed for", check.needed_for), ("why", check.why), ("how", check.how)):
                if text:
                    shown.add_row("", Text(f"  {label}", "dim"), Text(text))
    return shown


def surroundings(machine: Machine) -> str:
    """What refusals usually come from, in a line."""
    filters = {None: "unknown", 0: "none", FILTERED: "a filter"}
    return "; ".join(
        [
            f"seccomp: {filters.get(machine.seccomp, 'strict')}",
            f"Yama: {'none' if machine.ptrace_scope is None else f'ptrace_scope {machine.ptrace_scope}'}",
            f"container: {machine.container or 'none seen'}",
            f"security modules: {machine.security_modules or 'none seen'}",
        ]
    )


def show(diagnosis: Diagnosis, console: Console) -> None:
    """For people: what it comes to, then everything."""
    machine = diagnosis.machine
    top = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    top.add_column(style="bold", no_wrap=True)
    top.add_column()
    verdict = "pyshare works here" if diagnosis.works else "pyshare cannot work here"
    top.add_row("verdict", Text(verdict, "green" if diagnosis.works else "red"))
    top.add_row("engine", Text(f'"auto" gives {diagnosis.engine or "none"}: {diagnosis.why}'))
    ways = ", ".join(diagnosis.borrowing) or "no way: participants are woken to do it themselves"
    top.add_row("borrowing", Text(ways))
    top.add_row("here", Text(surroundings(machine)))
    console.print(Text(f"pyshare {pyshare.__version__} on Linux {machine.kernel}", "bold"), top, "", sep="\n")
    console.print(table(diagnosis.checks))


# -- The command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print one object, for a program to read")


def run(arguments: argparse.Namespace) -> int:
    """Tries everything and prints it; 0 where pyshare works, 1 where it cannot."""
    machine = Machine.here()
    diagnosis = Diagnosis(machine, list(examine(machine)))
    if arguments.json:
        json.dump(diagnosis.plain(), sys.stdout, indent=1)
        print()
    else:
        show(diagnosis, Console(highlight=False))
    return 0 if diagnosis.works else 1
