"""Observers: who has a region mapped read-only, and takes no part in it.

Lives here: Observer, and the one sentence with which it refuses everything that
changes something.  Not here: what it has in common with a Region (_mapped.py),
the mapping (ext/operations/observe.c).
Invariant: an observer changes nothing, and nobody waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, NoReturn

from pyshare import _core
from pyshare._errors import ProtectionError
from pyshare._mapped import Mapped, Prot


def _refused(method: str) -> Callable[..., NoReturn]:
    """A method of Region that is not for observers."""

    def refuse(self: Observer, *_args: object, **_kwargs: object) -> NoReturn:
        raise ProtectionError(
            f"{method}: this process only observes the region; attach without readonly=True",
            region=self.name,
            required=Prot.WRITE,
            actual=Prot.READ,
        )

    refuse.__name__ = method
    refuse.__doc__ = f"Raises ProtectionError: ``{method}`` is for who takes part (:meth:`Region.{method}`)."
    return refuse


class Observer(Mapped, _core.Observed):
    """A region's memory, read-only, enforced by the kernel; made by :func:`pyshare.attach` with ``readonly=True``.

    A context manager; exports a read-only buffer of exactly ``size`` bytes; pickles to other processes of
    :mod:`multiprocessing`, which observe too (each pickle can be loaded once). The mapping is of a description that was
    opened read-only, so that mprotect(2) of it fails with EACCES, whoever calls it: a store is a SIGSEGV.

    It sees every byte at once, for it maps the same pages. It owns no slot: nobody waits for it, no change needs it,
    and it is in no list; the kernel keeps none either, so there is no ``Region.observers``. The price: what
    ``mprotect`` promises is not for it. A page that is NONE for all participants can still be read here, and what is
    written under a lease may be seen half written. It keeps the memory, and not the name, which goes with the last
    participant.

    A forked child observes as its parent does, at the same address.

    A load from a page that nobody has ever touched gives it memory, as with mmap(2) (SIGBUS where there is none);
    ``read`` does not.
    """

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise TypeError("observe a region with pyshare.attach(..., readonly=True)")

    @property
    def readonly(self) -> bool:
        """True: this process only looks. A :class:`Region` says False."""
        return True

    def fileno(self) -> int:
        """A descriptor that is read-only for good: pass it on, and whoever gets it can observe the region.

        It belongs to the observer and goes with ``close``.

        Raises:
            RegionClosed.
            OSError: EBADF: the program has closed it.
        """
        return self._fileno()

    def close(self) -> None:
        """This process does not observe any more; the memory goes with its last holder.

        Raises:
            BufferError: memoryviews or arrays of it still exist, or another thread is inside a call of it. Nothing
                has changed then.
        """
        if not self.closed:
            self._close()
            self._end_streams()

    def __reduce__(self) -> Any:
        return _rebuild, (reduction.DupFd(self.fileno()),)

    def __repr__(self) -> str:
        what = f"{self._name!r}, {self._size} bytes" if self._name else f"{self._size} bytes"
        return f"<pyshare.Observer {what}, {'closed' if self.closed else f'generation {self.generation}'}>"

    dirty = _refused("dirty")
    frozen = _refused("frozen")
    guard = _refused("guard")
    lease = _refused("lease")
    lease_async = _refused("lease_async")
    lock = _refused("lock")
    lock_async = _refused("lock_async")
    mprotect = _refused("mprotect")
    mprotect_async = _refused("mprotect_async")
    on_violation = _refused("on_violation")
    readinto = _refused("readinto")
    recv_into = _refused("recv_into")
    restore = _refused("restore")
    snapshot = _refused("snapshot")
    write = _refused("write")


def observe(fd: int) -> Observer:
    """Of the region behind a descriptor, which stays the caller's; CorruptRegion, PermissionError, OSError."""
    observer = _core.observe(Observer, fd)
    observer._name, observer._size, _, _ = observer._facts()
    observer._page = observer._page_size()
    return observer


def _rebuild(dup: Any) -> Observer:
    fd = dup.detach()
    try:
        return observe(fd)
    finally:
        os.close(fd)
