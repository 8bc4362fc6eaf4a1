"""Drafts: files that get their name when their last byte is on disk.

Lives here: writing one, and the removal of those that the killed have left.
Not here: what is written (_image.py).
Invariants
 1. A path leads to the whole file, or to what it led to before.
 2. A draft has no name or, where a file system cannot have such files and for
    the moment of publishing, one that begins with _NEW; and a lock that dies
    with who writes it: whoever can have that lock may remove the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets

_NEW = ".pyshare.new."


def _spare_name() -> str:
    """As long whatever the file's own name is, which may be as long as names can be."""
    return f"{_NEW}{secrets.token_hex(8)}"


def _lock(fd: int) -> bool:
    """False: somebody else has it; on a file system without locks nobody ever does."""
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class Draft:
    """A file in a directory that has no name yet, or one that goes with it."""

    def __init__(self, path: str) -> None:
        self._name = os.path.basename(path)
        self._spare = ""  # its name, if it has one
        self._folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._sweep()
            self._fd = self._create(os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(self._folder)
            raise

    def _create(self, flags: int) -> int:
        try:
            fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._folder)
        except OSError as error:  # of file systems that have no such files
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
        else:
            _lock(fd)
            return fd
        while True:
            spare = _spare_name()
            fd = os.open(spare, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._folder)
            if _lock(fd) and os.fstat(fd).st_nlink:
                self._spare = spare
                return fd
            os.close(fd)  # somebody took it for one of the killed, before it was locked

    def _sweep(self) -> None:
        """What the killed left here is gone, as far as one may."""
        for name in os.listdir(self._folder):
            if name.startswith(_NEW):
                with contextlib.suppress(OSError):
                    self._remove_stale(name)

    def _remove_stale(self, name: str) -> None:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where it is alive, or there are no locks
            os.unlink(name, dir_fd=self._folder)
        finally:
            os.close(fd)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._spare:  # as long as we have its lock: then nobody else removes it
                with contextlib.suppress(FileNotFoundError):  # an exception came before it had it, or had its own name
                    os.unlink(self._spare, dir_fd=self._folder)
        finally:
            os.close(self._fd)
            os.close(self._folder)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def publish(self) -> None:
        """The path leads to it, also after a power cut."""
        os.fsync(self._fd)
        if not self._spare:
            self._spare = _spare_name()
            # A directory's descriptor makes it linkat(2), which follows /proc's link to the file.
            os.link(f"/proc/self/fd/{self._fd}", self._spare, dst_dir_fd=self._folder, follow_symlinks=True)
        os.rename(self._spare, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._spare = ""
        os.fsync(self._folder)
