"""Names: from a name to a descriptor of the region.

Lives here: the directory of entries, which are small POSIX shared memory
objects (shm_overview(7)), who may use them, and the removal of stale ones.
Not here: what is in an entry (ext/names.c), the protocol.

Invariants:
 1. An entry is published complete (link), so a reader never finds half of one.
 2. Every holder keeps flock(LOCK_SH) on it (flock(2): until its agent's table
    goes), so an entry is stale exactly when LOCK_EX can be had.
 3. Who removes or moves an entry holds a lock on it while it does: no stale
    entry is taken for a live one that came under the same name meanwhile.
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

_DIRECTORY = "/dev/shm"
_PREFIX = "pyshare."
_NEW = "pyshare..new."  # no name begins with '.'
_SHORT = 0.001  # seconds until a name that is in somebody's hands is looked at again
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
    return f"{_DIRECTORY}/{entry}"


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
    """A descriptor of an entry; FileNotFoundError, FileExistsError, PermissionError, OSError (EMFILE)."""
    try:
        return int(posix_ipc.SharedMemory(f"/{entry}", flags, mode=0o600).fd)
    except posix_ipc.ExistentialError as error:
        found = flags & posix_ipc.O_CREX
        raise (FileExistsError if found else FileNotFoundError)(str(error)) from None
    except (posix_ipc.Error, OSError):
        # posix_ipc gives no errno at the descriptor limit; the same question to the kernel does.
        return os.open(_path(entry), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


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
    """With a lock on fd held; PermissionError."""
    if _leads_here(fd, entry):
        with contextlib.suppress(FileNotFoundError):
            try:
                posix_ipc.unlink_shared_memory(f"/{entry}")
            except (posix_ipc.Error, OSError):
                os.unlink(_path(entry))  # the same question, for an answer with an errno


def _is_ours(fd: int) -> bool:
    return os.fstat(fd).st_uid in (0, os.geteuid())


def _clear_stale(fd: int, entry: str) -> bool:
    """Remove an entry that no living process holds; False if one does. PermissionError if it is stale, but not ours."""
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


@contextlib.contextmanager
def live(name: str, *, keep: bool = False) -> Iterator[int]:
    """An entry that somebody holds, pinned against removal; RegionNotFound, PermissionError.

    A stale one is removed; with `keep` it stays where it is, and the error is Stale.
    """
    entry = _PREFIX + name
    missing = f"no region is called {name!r}: never made, unlinked, or its last holder is gone"
    try:
        fd = _open(entry)
    except FileNotFoundError:
        raise RegionNotFound(missing) from None
    except PermissionError:
        raise PermissionError(
            errno.EACCES, f"the region {name!r} belongs to somebody else, whose mode keeps you out; ask for its "
            "descriptor to be passed over a Unix socket"
        ) from None  # fmt: skip
    try:
        if not _is_ours(fd):
            raise PermissionError(
                errno.EACCES,
                f"the name {name!r} was made by user {os.fstat(fd).st_uid}, not by you or root; if that is meant, ask "
                "for its descriptor to be passed over a Unix socket",
            )
        if keep and _lock(fd, fcntl.LOCK_EX):
            raise Stale(f"the name {name!r} is stale: its last holder is gone; unlink removes it")
        try:
            # Stale, or just being cleared away by somebody who holds LOCK_EX.
            gone = (not keep and _clear_stale(fd, entry)) or not _lock(fd, fcntl.LOCK_SH)
        except PermissionError:  # stale, but root's
            gone = True
        if gone:
            raise RegionNotFound(missing)
        yield fd
    finally:
        os.close(fd)


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
                    "pid namespace, or not dumpable); ask for its descriptor to be passed over a Unix socket",
                )
        time.sleep(_SHORT)


def entries() -> list[str]:
    """Every name that there is, sorted: live or stale, and whoever made it. Nothing is removed."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # no directory, no names
        found = [entry.removeprefix(_PREFIX) for entry in os.listdir(_DIRECTORY) if entry.startswith(_PREFIX)]
    return sorted(name for name in found if len(name) <= _core.NAME_MAX and _NAME.fullmatch(name))


def owner(name: str) -> int | None:
    """The user whose name it is; None: there is no such name."""
    try:
        return os.stat(_path(_PREFIX + name), follow_symlinks=False).st_uid
    except FileNotFoundError:
        return None


class NewEntry:
    """An entry in the making: private until `publish`; `discard` removes what is left of it."""

    def __init__(self, region_fd: int) -> None:
        while not self._make():
            pass
        try:
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

    def publish(self, name: str, mode: int, replace: bool) -> None:
        """The name leads to the region when this returns; RegionExists, PermissionError."""
        os.fchmod(self.fd, mode)
        for _ in range(100):  # each round, somebody else made or cleared the name meanwhile
            if self._try_publish(_PREFIX + name, name, replace):
                return
            time.sleep(_SHORT)
        raise RegionExists(f"the name {name!r} is made and removed by others all the time")

    def _try_publish(self, entry: str, name: str, replace: bool) -> bool:
        try:
            os.link(_path(self._entry), _path(entry))
        except FileExistsError:
            pass
        else:
            return True
        try:
            with _opened(entry) as fd:
                if _clear_stale(fd, entry):
                    return False
                if not _lock(fd, fcntl.LOCK_SH) or not _leads_here(fd, entry):
                    return False
                if not replace:
                    raise RegionExists(
                        f"the name {name!r} leads to a live region; attach it, choose another name, or say replace=True"
                    )
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
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(f"/{self._entry}")
        os.close(self.fd)


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
        except (RegionNotFound, PermissionError):
            same, fd = False, -1
        yield fd if same else -1


def clear(name: str) -> None:
    """Remove the name if nobody holds it any more."""
    with contextlib.suppress(OSError), _opened(_PREFIX + name) as fd:
        _clear_stale(fd, _PREFIX + name)


def unlink(name: str) -> None:
    """Remove the name; whoever has the region keeps it.

    Raises:
        RegionNotFound: there is no such name, or its last holder is gone (it is removed then).
        PermissionError: it belongs to another user.
        ValueError: it is no name.
    """
    with live(check(name)) as fd:
        remove(fd, name)


def remove(fd: int, name: str) -> None:
    """The name, if it means this live entry; PermissionError."""
    try:
        _remove(fd, _PREFIX + name)
    except PermissionError:
        raise PermissionError(errno.EACCES, f"only its owner may unlink the name {name!r}") from None


def names() -> list[str]:
    """The names of live regions that you or root made, sorted. Stale ones are removed."""
    found = []
    for entry in os.listdir(_DIRECTORY):
        if not entry.startswith(_PREFIX):
            continue
        try:
            with _opened(entry) as fd:
                if _is_ours(fd) and not _clear_stale(fd, entry) and not entry.startswith(_NEW):
                    found.append(entry.removeprefix(_PREFIX))
        except OSError:
            continue  # gone meanwhile, or another user's
    return sorted(found)
