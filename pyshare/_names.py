"""Names: from a name to a descriptor of the region.

Lives here: the directory of entries, which are small POSIX shared memory
objects (shm_overview(7)), who may use them, and the removal of stale ones.
Not here: what is in an entry (ext/participant/names.c), the protocol.

Invariants:
 1. An entry is published complete (link), so a reader never finds half of one.
 2. Every holder keeps flock(LOCK_SH) on it (flock(2): until its agent's table
    goes), so an entry is stale exactly when LOCK_EX can be had.
 3. Who removes or moves an entry holds a lock on it while it does: no stale
    entry is taken for a live one that came under the same name meanwhile.
 4. An error has the kernel's own errno and the path.  "Exists" and "not found"
    are said only where the other call would not say its opposite: who opens
    or creates in a loop comes to an end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator

import posix_ipc  # type: ignore[import-not-found,unused-ignore]

from pyshare import _core
from pyshare._errors import RegionExists, RegionNotFound

DIRECTORY = "/dev/shm"
_PREFIX = "pyshare."
_NEW = "pyshare..new."  # no name begins with '.'
_SHORT = 0.001  # seconds until a name that is in somebody's hands is looked at again
_NEED = "a name needs one page there; a region without a name does not"
_LOOKS = 256  # entries of living holders that a sweep looks at
_REST = 20  # times as long as a sweep took there is no other in this process
_JOINING = 5_000_000_000  # nanoseconds that a forked child may take to join (PS_JOIN_TIMEOUT)
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)


def check(name: object) -> str:
    """The name itself, or ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"a name must be a str, not {name!r}")
    if not 1 <= len(name) <= _core.NAME_MAX or not _NAME.fullmatch(name):
        raise ValueError(
            f"a name is 1 to {_core.NAME_MAX} characters of letters, digits, '.', '_' and '-', "
            f"not beginning with '.'; got {name!r}"
        )
    return name


def _path(entry: str) -> str:
    return f"{DIRECTORY}/{entry}"


def _umask() -> int:
    with open("/proc/thread-self/status") as status:  # umask(2) can only be read by setting it
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def masked(mode: int) -> int:
    """What open(2) would make of a mode."""
    return mode & ~_umask()


def _open(entry: str, flags: int = 0) -> int:
    """A descriptor of an entry; OSError with the kernel's errno and the path."""
    try:
        return int(posix_ipc.SharedMemory(f"/{entry}", flags, mode=0o600).fd)
    except (posix_ipc.Error, OSError, ValueError):
        # Its errors have no errno, and call what cannot be made "not there": the same question to the kernel has one.
        return os.open(_path(entry), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)


def _refusal(error: OSError, name: str, what: str) -> OSError:
    """The kernel's, in words."""
    number = error.errno or 0
    need = "" if number in (errno.EMFILE, errno.ENFILE) else f"; {_NEED}"
    return OSError(number, f"the name {name!r} {what}: {os.strerror(number)}{need}", _path(_PREFIX + name))


@contextlib.contextmanager
def _making(name: str) -> Iterator[None]:
    """Nothing but questions to the kernel, whose refusals are told in words."""
    try:
        yield
    except OSError as error:
        raise _refusal(error, name, "cannot be made") from None


def _in_hands(name: str) -> OSError:
    return OSError(
        errno.EBUSY,
        f"the name {name!r} is in the hands of others, who make or remove it, all the time; is one of them stopped?",
        _path(_PREFIX + name),
    )


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_here(fd: int, entry: str) -> bool:
    """Is this open file still the one that the path means?"""
    try:
        there = os.stat(_path(entry), follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _remove(fd: int, entry: str) -> None:
    """With a lock on fd held; OSError."""
    if _leads_here(fd, entry):
        with contextlib.suppress(FileNotFoundError):
            try:
                posix_ipc.unlink_shared_memory(f"/{entry}")
            except (posix_ipc.Error, OSError, ValueError):
                os.unlink(_path(entry))  # as in _open


def _is_ours(fd: int) -> bool:
    return os.fstat(fd).st_uid in (0, os.geteuid())


def _clear_stale(fd: int, entry: str) -> bool:
    """Remove an entry that no living process holds; False if one does. OSError where it cannot be removed."""
    if not _lock(fd, fcntl.LOCK_EX):
        return False
    _remove(fd, entry)
    return True


@contextlib.contextmanager
def _opened(entry: str) -> Iterator[int]:
    fd = _open(entry)
    try:
        yield fd
    finally:
        os.close(fd)


class Stale(RegionNotFound):
    """The name is there, and nobody holds it."""


def _missing(name: str) -> RegionNotFound:
    return RegionNotFound(f"no region is called {name!r}: never made, unlinked, or its last holder is gone")


def _open_existing(name: str) -> int:
    try:
        return _open(_PREFIX + name)
    except FileNotFoundError:
        if os.path.isdir(DIRECTORY):
            raise _missing(name) from None
        raise  # nobody will ever find or make it: not what a loop should wait for
    except PermissionError:
        if not os.access(DIRECTORY, os.X_OK):
            raise
        raise PermissionError(
            errno.EACCES, f"the region {name!r} belongs to somebody else, whose mode keeps you out; ask for its "
            "descriptor to be passed over a Unix socket"
        ) from None  # fmt: skip


@contextlib.contextmanager
def live(name: str, *, keep: bool = False) -> Iterator[int]:
    """An entry that somebody holds, pinned against removal; RegionNotFound, PermissionError, OSError.

    A stale one is removed; with `keep` it stays where it is, and the error is Stale.
    """
    entry, fd = _PREFIX + name, _open_existing(name)
    try:
        if not _is_ours(fd):
            raise PermissionError(
                errno.EACCES,
                f"the name {name!r} was made by user {os.fstat(fd).st_uid}, not by you or root; if that is meant, ask "
                "for its descriptor to be passed over a Unix socket",
            )
        if keep and _lock(fd, fcntl.LOCK_EX):
            raise Stale(f"the name {name!r} is stale: its last holder is gone; unlink removes it")
        if not keep and _lock(fd, fcntl.LOCK_EX):
            with contextlib.suppress(OSError):  # root's, or on a file system that is read-only
                _remove(fd, entry)
            raise _missing(name)
        if not _lock(fd, fcntl.LOCK_SH):  # somebody else just clears it away
            raise _missing(name)
        yield fd
    finally:
        os.close(fd)


def _taken(name: str) -> RegionExists:
    return RegionExists(
        f"the name {name!r} leads to a live region; attach it, choose another name, or say replace=True"
    )


def check_free(name: str) -> None:
    """RegionExists or PermissionError where the name is taken, before memory is; the rest is told when it is made."""
    try:
        with live(name):
            raise _taken(name)
    except RegionNotFound:
        pass
    except OSError as error:
        if error.filename is None:  # our own: the kernel's refusals have the path
            raise


@contextlib.contextmanager
def found(name: str, deadline: int, *, keep: bool = False) -> Iterator[tuple[int, int]]:
    """(descriptor of the region, from any of its holders; the live entry); RegionNotFound, PermissionError.

    A forked child that has not joined yet, and a holder that is just leaving, have the entry without a row in it: it
    is looked at again, until the deadline at most.
    """
    deadline = min(deadline, time.monotonic_ns() + _JOINING)
    while True:
        with live(name, keep=keep) as entry:
            fd = _core.name_find(entry)
            if fd >= 0:
                try:
                    yield fd, entry
                finally:
                    os.close(fd)
                return
            if fd == -errno.EACCES or time.monotonic_ns() >= deadline:
                raise PermissionError(
                    errno.EACCES,
                    f"the region {name!r} is alive, but none of its holders can be reached from here (another user or "
                    "pid namespace, not dumpable, or forked while /dev/shm was full); ask for its descriptor to be "
                    "passed over a Unix socket",
                )
        time.sleep(_SHORT)


def _listed() -> list[str]:
    """All of ours in the directory, also what has no name yet."""
    with contextlib.suppress(FileNotFoundError):  # no directory, no names
        return [entry for entry in os.listdir(DIRECTORY) if entry.startswith(_PREFIX)]
    return []


def entries() -> list[str]:
    """Every name that there is, sorted: live or stale, and whoever made it. Nothing is removed."""
    found = [entry.removeprefix(_PREFIX) for entry in _listed()]
    return sorted(name for name in found if len(name) <= _core.NAME_MAX and _NAME.fullmatch(name))


def owner(name: str) -> int | None:
    """The user whose name it is; None: there is no such name."""
    try:
        return os.stat(_path(_PREFIX + name), follow_symlinks=False).st_uid
    except FileNotFoundError:
        return None


class NewEntry:
    """An entry in the making: private until `publish`; `discard` removes what is left of it."""

    def __init__(self, name: str, region_fd: int) -> None:
        sweep()
        self._name, self._entry, self.fd = name, "", -1
        try:
            with _making(name):
                while not self._make():
                    pass
                _core.name_format(self.fd, region_fd)
        except BaseException:
            self.discard()
            raise

    def _make(self) -> bool:
        """False if somebody took it for a stale one, before it was locked."""
        self._entry = f"{_NEW}{os.getpid()}.{secrets.token_hex(8)}"
        self.fd = _open(self._entry, posix_ipc.O_CREX)
        if _lock(self.fd, fcntl.LOCK_SH) and _leads_here(self.fd, self._entry):
            return True
        self.discard()
        return False

    def publish(self, mode: int, replace: bool) -> None:
        """The name leads to the region when this returns; RegionExists, PermissionError, OSError."""
        os.fchmod(self.fd, mode)
        for _ in range(100):  # each round, somebody else made or cleared the name meanwhile
            if self._try_publish(replace):
                return
            time.sleep(_SHORT)
        raise _in_hands(self._name)

    def _try_publish(self, replace: bool) -> bool:
        return self._link() or self._take_over(replace)

    def _link(self) -> bool:
        with _making(self._name), contextlib.suppress(FileExistsError):
            os.link(_path(self._entry), _path(_PREFIX + self._name))
            return True
        return False

    def _take_over(self, replace: bool) -> bool:
        """The name, from whoever has it; False: there may be nobody any more."""
        name, entry = self._name, _PREFIX + self._name
        try:
            with _opened(entry) as fd:
                if _clear_stale(fd, entry):
                    return False
                if not _lock(fd, fcntl.LOCK_SH) or not _leads_here(fd, entry):
                    return False
                if not replace:
                    raise _taken(name)
                if os.fstat(fd).st_uid != os.geteuid():
                    raise PermissionError(errno.EACCES, f"only its owner may replace the name {name!r}")
                os.rename(_path(self._entry), _path(entry))
                return True
        except FileNotFoundError:
            return False
        except PermissionError as error:
            if error.filename is None:
                raise
            raise PermissionError(errno.EACCES, f"the name {name!r} belongs to another user") from None

    def discard(self) -> None:
        """Remove the private entry, if it still is there, and close."""
        with contextlib.suppress(posix_ipc.Error, OSError):
            posix_ipc.unlink_shared_memory(f"/{self._entry}")
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def no_row(name: str) -> OSError:
    """There is no memory for one more holder of the name."""
    return _refusal(OSError(errno.ENOSPC, ""), name, "has no room for one more holder")


@contextlib.contextmanager
def of_region(name: str | None, handle_fd: int, *, keep: bool = False) -> Iterator[int]:
    """The live entry that leads to this very region, to become a holder of it; -1 where there is none."""
    if name is None:
        yield -1
        return
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(live(name, keep=keep))
            same = _core.name_leads_to(fd, handle_fd)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # which say nothing of where it leads
                raise
            same, fd = False, -1
        yield fd if same else -1


def clear(name: str) -> None:
    """Remove the name if nobody holds it any more."""
    with contextlib.suppress(OSError), _opened(_PREFIX + name) as fd:
        _clear_stale(fd, _PREFIX + name)


_next_sweep = 0  # CLOCK_MONOTONIC, nanoseconds


def sweep() -> None:
    """What the killed have left is gone, as far as it is yours or root's to remove: names, and entries in the making.

    Costs what it removes, and a twentieth of the time at most for what it finds alive.
    """
    global _next_sweep
    begin = time.monotonic_ns()
    if begin < _next_sweep:
        return
    with contextlib.suppress(OSError):  # a directory that cannot be read: whoever makes a name there is told
        _sweep(_listed())
    end = time.monotonic_ns()
    _next_sweep = end + _REST * (end - begin)


def _sweep(found: list[str]) -> None:
    looks = 0
    first = secrets.randbelow(len(found) + 1)  # of more than can be looked at, others each time
    for entry in found[first:] + found[:first]:
        with contextlib.suppress(OSError), _opened(entry) as fd:  # gone meanwhile, or another user's
            if _is_ours(fd) and _clear_stale(fd, entry):
                continue
        looks += 1
        if looks == _LOOKS:
            return


def unlink(name: str) -> None:
    """Remove the name; whoever has the region keeps it.

    Raises:
        RegionNotFound: there is no such name, or its last holder is gone (it is removed then).
        PermissionError: it belongs to another user.
        ValueError: it is no name.
        OSError: what the kernel refuses, with its errno and the path.
    """
    with live(check(name)) as fd:
        remove(fd, name)


def remove(fd: int, name: str) -> None:
    """The name, if it means this live entry; PermissionError."""
    try:
        _remove(fd, _PREFIX + name)
    except PermissionError:
        if os.fstat(fd).st_uid == os.geteuid():  # it is the directory that is not
            raise
        raise PermissionError(errno.EACCES, f"only its owner may unlink the name {name!r}") from None


def names() -> list[str]:
    """The names of live regions that you or root made, sorted. Stale ones are removed."""
    found = []
    for entry in _listed():
        with contextlib.suppress(OSError), _opened(entry) as fd:  # gone meanwhile, or another user's
            if _is_ours(fd) and not _clear_stale(fd, entry) and not entry.startswith(_NEW):
                found.append(entry.removeprefix(_PREFIX))
    return sorted(found)
