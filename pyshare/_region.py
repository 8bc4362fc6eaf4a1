"""Regions: what a program does with them.

Lives here: Region, create, attach, and the checks of arguments.  Not here: what
an observer has in common with a Region (_mapped.py), observers (_readonly.py),
names (_names.py), errors (_errors.py), the protocol and the memory (_core,
which is ext/).
Invariant: a wrong argument raises before anything is changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing import reduction, util
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from pyshare import _core, _creation, _image, _names
from pyshare._core import DEFAULT, Lease, Lock, Snapshot
from pyshare._errors import RegionClosed, ShareError
from pyshare._image import Image
from pyshare._mapped import Mapped, Prot
from pyshare._readonly import Observer, observe

if TYPE_CHECKING:
    from pyshare._async import Taking

Timeout = float | _core._Default | None


def _check_engine(engine: str) -> int:
    number = _core.ENGINES.get(engine) if isinstance(engine, str) else None
    if number is None:
        raise ValueError(f"engine must be 'auto', 'mprotect' or 'uffd', not {engine!r}")
    return number


def _check_policy(policy: str) -> int:
    number = _core.POLICIES.get(policy) if isinstance(policy, str) else None
    if number is None:
        raise ValueError(f"on_violation must be 'die', 'raise' or 'wait', not {policy!r}")
    return number


# Of sockets with a recv_into of their own: what was received, and is to be stored by the next call for that socket.
_unstored: weakref.WeakKeyDictionary[socket.socket, bytearray] = weakref.WeakKeyDictionary()


def _receives_itself(source: object) -> bool:
    """What a recv_into of its own gives (ssl.SSLSocket's the plain text) is not what comes over its descriptor."""
    own = getattr(type(source), "recv_into", None)
    return own is not None and own is not socket.socket.recv_into


def _received(sock: socket.socket, length: int, flags: int) -> bytearray:
    data = bytearray(length)
    del data[sock.recv_into(data, length, flags) :]
    return data


class Region(Mapped, _core.Handle):
    """Memory that this process shares with others, whose protection changes in all of them at once.

    Made by :func:`pyshare.create` and :func:`pyshare.attach` only.  A context manager; exports a writable buffer of
    exactly ``size`` bytes (a store to a page that is READ is a violation, not a TypeError); pickles to other processes
    of :mod:`multiprocessing`, where it attaches (each pickle can be loaded once).

    After ``os.fork()`` the child is a participant of its own, at the same address, before any of its Python code runs;
    where it cannot be (every slot taken, or 5 s passed) it has no access, and every call tries again.  A participant
    that is killed leaves nothing behind that others wait for.
    """

    _is_let_go = False

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise TypeError("make a region with pyshare.create(), or join one with pyshare.attach()")

    # -- What it is ------------------------------------------------------------------------------------------------

    @property
    def readonly(self) -> bool:
        """False: this process takes part. An :class:`Observer` says True."""
        return False

    @property
    def engine(self) -> str:
        """How this process's mapping is changed: "uffd" (page-table entries, from outside too) or "mprotect" (VMAs)."""
        return str(self._engine())

    def fileno(self) -> int:
        """A descriptor that is the whole region: pass it on, and whoever gets it can attach.

        It belongs to the region and goes with ``close``; if the program closes it, the next call gives another.
        """
        return self._fileno()

    def __repr__(self) -> str:
        what = f"{self._name!r}, {self._size} bytes" if self._name else f"{self._size} bytes"
        if self.closed:
            return f"<pyshare.Region {what}, closed>"
        try:
            return f"<pyshare.Region {what}, generation {self.generation}, {len(self.participants())} participants>"
        except Exception as error:
            return f"<pyshare.Region {what}, detached: {error}>"

    # -- Life ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """This process no longer participates; the memory goes with its last holder, and the name too.

        Raises:
            BufferError: memoryviews or arrays of it still exist, or another thread is inside a call of it. Nothing
                has changed then.
        """
        if self.closed:
            return
        self._close()
        self._end_streams()
        if self._name is not None:
            _names.clear(self._name)

    def _let_go(self) -> None:
        """It is closed when this returns or, where arrays and views use the memory, with the last of them."""
        try:
            self.close()
        except BufferError:
            self._is_let_go = True

    def _forsake(self) -> None:
        """It was dropped while it was open."""
        try:
            what = repr(self)
        finally:
            with contextlib.suppress(BufferError):
                self.close()
        if not self._is_let_go:  # last: where warnings are errors, nothing after it is done
            warnings.warn(f"unclosed region {what}", ResourceWarning, source=self, stacklevel=2)

    def __reduce__(self) -> Any:
        return _rebuild, (reduction.DupFd(self.fileno()),)

    # -- Protection ------------------------------------------------------------------------------------------------

    def mprotect(self, offset: int, length: int, prot: int, *, timeout: Timeout = DEFAULT) -> int:
        """Every participant has the new protection of these pages when this returns; the change's generation.

        offset and length are bytes, page aligned; a range may end at ``size``.  Blocks, with other Python threads
        running, until leases on these pages have ended and every participant has acknowledged.

        Raises:
            ValueError: a range that is not page aligned or not inside; length 0; unknown bits in prot.
            PropagationTimeout: somebody was silent for ``timeout`` seconds. With a ``generation`` the change is made,
                and who was silent applies it before it acknowledges anything else; without, nothing was changed: so
                too where it took that long to save what a snapshot needs of pages that all may write from now on.
            ShareError: this thread holds a lease on some of the pages, and would wait for itself. Nothing was changed.
            OSError: a participant could not apply it (ENOMEM: its limit of mappings, vm.max_map_count); it was undone
                everywhere.
            KeyboardInterrupt: after Ctrl-C; if the change was published it is made, as after a timeout.
            RegionClosed, CorruptRegion, ParticipantLimit.
        """
        return self._change(offset, length, prot, timeout, self._size)

    def on_violation(self, policy: str | None = None) -> str:
        """What happens in this process at a forbidden access, from now on where a policy is given.

        "die": one line on stderr that says why, then SIGSEGV, as by mprotect(2).
        "raise": the access does not take place (but one that a change comes to allow just then may have), and
        the Python thread that tried gets a ProtectionError with the line of the program. In that statement where the
        code of memoryview or numpy did it, or a call, or in :meth:`guard`; else (in C code that is not called, but
        assigned to, say) where Python next looks. Until then other threads of this process see there what it stored. An
        exception that is under way, as KeyboardInterrupt, stays, with it as its context.
        "wait": the thread sleeps until the protection, or a lease of this process, allows the access. Other threads run
        meanwhile, and in the main thread handlers of signals; if one raises (Ctrl-C) the access does not take place.
        But in C code that has the interpreter and relies on it, as ``shared += view`` of a bytearray that another
        thread could clear meanwhile, or ``bytes(view)``, it keeps the interpreter: then a ProtectionError ends the wait
        when a signal comes whose handler returns, or another thread has wanted to run for a second. Not so in the slots
        of memoryview and numpy, in calls that let others run, and in :meth:`guard`.

        A thread without a Python state (a library's own) dies where it should raise. Accesses outside the region's
        data, execution, and those of a process that is fenced or detached are fatal under each policy.  ``read`` and
        ``write`` raise at once under each; a system call gets EFAULT under each: see ``readinto`` and ``recv_into``.

        A forked child begins with its parent's policy, whoever attaches with the region's (``create``).
        """
        number = -1 if policy is None else _check_policy(policy)
        in_force = self._policy(number)
        return next(word for word, value in _core.POLICIES.items() if value == in_force)

    # -- In an event loop ------------------------------------------------------------------------------------------

    async def mprotect_async(self, offset: int, length: int, prot: int, *, timeout: Timeout = DEFAULT) -> int:
        """As :meth:`mprotect`, for a coroutine: the event loop runs on while it waits.

        Of two changes over the same pages the one that was asked for first is not always made first: await one before
        the other where that matters.

        Raises:
            asyncio.CancelledError: when cancelled. If the change was published it is made, as after a timeout (a
                participant that is late and then cannot apply it has no access until it can); else nothing was changed.
                Comes some 20 ms later where somebody is silent.
            ShareError: this task holds a lease on some of the pages. Those of other tasks are waited for.
            ...: as mprotect.
        """
        from pyshare import _async

        return await _async.mprotect(self, offset, length, prot, timeout)

    def lease_async(
        self, offset: int, length: int, *, timeout: Timeout = DEFAULT, window: bool = False
    ) -> Taking[Lease]:
        """As :meth:`lease`, for a coroutine: ``async with region.lease_async(...) as lease:``, or ``await`` it.

        The event loop runs on while it waits; tasks that want the same pages get them in the order in which they asked,
        those of this process one after the other. The lease belongs to the loop's thread, and may be released by any.

        Raises:
            asyncio.CancelledError: when cancelled; nothing is held.
            ShareError: this task holds one of the pages already. Other tasks are waited for.
            ...: as lease.
        """
        from pyshare import _async

        return _async.lease(self, offset, length, timeout, window)

    def lock_async(self, index: int, *, timeout: Timeout = DEFAULT) -> Taking[Lock]:
        """As :meth:`lock`, for a coroutine: ``async with region.lock_async(3) as lock:``, or ``await`` it.

        As :meth:`lease_async` in all else: mutual exclusion between the tasks of a loop too.
        """
        from pyshare import _async

        return _async.lock(self, index, timeout)

    # -- Snapshots -------------------------------------------------------------------------------------------------

    def snapshot(self, *, timeout: Timeout = DEFAULT) -> Snapshot:
        """Everything that was stored before one moment of this call, by anybody, and nothing stored after it.

        Nothing is copied now: whoever writes a page later saves it first. Blocks, with other Python threads running,
        until leases have ended; nobody gets a new one meanwhile, but for who has one already. Where pages are
        writable for all, every participant has to acknowledge, stores to them fault once until the page is saved
        (system calls that store into them may get EFAULT), and a thread of this process saves them all in the
        background.

        Raises:
            ShareError: the region has huge pages, of which there are no snapshots.
            PropagationTimeout: somebody (``pids``) held a lease, or was silent, for ``timeout`` seconds. There is no
                snapshot then, and everything is as before.
            ShareError: this thread holds a lease, and would wait for itself; or eight snapshots are alive.
            OSError: a participant could not follow (ENOMEM: the limit of mappings, vm.max_map_count).
            KeyboardInterrupt: after Ctrl-C; there is no snapshot.
            RegionClosed, CorruptRegion.
        """
        if self.page_size > _core.PAGE_SIZE:
            raise ShareError(
                f"snapshot: not of a region whose pages have {self.page_size} bytes; create it without huge="
            )
        return _core.take_snapshot(self, timeout)

    def dirty(self, since: int | Snapshot) -> list[tuple[int, int]]:
        """Runs of (offset, length), ascending, of the pages that may have been written since; bytes.

        Never less than what was written before the call, pages that were restored included; never a page that nobody
        has touched; who touches a huge page touches all of it. Since a snapshot of this region it is exactly what
        differs where pages are writable for all, and what was leased elsewhere; since a generation, also all that may
        have been writable for all meanwhile.

        Raises:
            ValueError: a generation that has not come yet, or a snapshot of another region.
            CorruptRegion: the snapshot was given up, because there was no memory to save a page.
            RegionClosed: the region or the snapshot is closed.
        """
        if not isinstance(since, Snapshot):
            since = _core.integer(since, "since")
            if not 0 <= since <= self.generation:
                raise ValueError(f"since must be a generation, 0 to {self.generation}, or a snapshot, not {since}")
        page = _core.PAGE_SIZE
        return [
            (first * page, min(count * page, self._size - first * page))
            for first, count in _core.dirty_pages(self, since)
        ]

    def restore(self, source: Snapshot | Image | str | os.PathLike[str], *, timeout: Timeout = DEFAULT) -> None:
        """The memory is what it was when ``source`` was taken: a Snapshot, or (a path leads to) an image of one.

        An image is checked whole, with those that it builds on, before anything is changed. Protections stay as they
        are. Meanwhile the region is frozen (see :meth:`frozen`), and snapshots that are alive keep what they have. A
        process that is killed in here leaves some pages old, and some new.

        Raises:
            CorruptRegion: a file is no whole image, or not the one that another was saved on.
            ValueError: the source has another size.
            PropagationTimeout: the region could not be frozen in time. Nothing was changed.
            ShareError: this thread holds a lease, and would wait for itself.
            FileNotFoundError, OSError: of the file, or no memory for the pages; those before it are restored then.
            RegionClosed.
        """
        with contextlib.ExitStack() as stack:
            if not isinstance(source, (Snapshot, Image)):
                source = stack.enter_context(Image(source))
            if source.size != self._size:
                raise ValueError(f"the source has {source.size} bytes, the region {self._size}: they must be the same")
            if isinstance(source, Image):
                source.check()
            with self.frozen(timeout=timeout):  # in the stack it would outlive a Ctrl-C at its end, in the traceback
                for offset, length in _image.chunks(_image.merged([*source.runs(), *self._data()])):
                    self._restore_pages(source, offset, length)

    def _restore_pages(self, source: Snapshot | Image, offset: int, length: int) -> None:
        """Those that are different; pages of zeros become holes."""
        wanted, found = (_image.read_pages(each, offset, length) for each in (source, self))
        for at, size in _image.differing(wanted, found, _core.PAGE_SIZE):
            _core.put_pages(self, offset + at, memoryview(wanted)[at : at + size])

    # -- Data ------------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: Any) -> None:
        """The bytes of ``data`` (any C-contiguous buffer) are at ``offset``, which need not be aligned. Never crashes.

        Raises:
            ProtectionError: a page of the range may not be written. Nothing was written, unless a change of protection
                came between: then the pages before the one that the error names are.
            ValueError: a range outside the region.
        """
        offset = _core.integer(offset, "offset")
        if not 0 <= offset <= self._size:
            raise ValueError(f"offset must be in 0 to {self._size}, not {offset}")
        self._write(offset, data, self._size)

    def readinto(self, fd: SupportsIndex, offset: int, length: int, *, timeout: Timeout = DEFAULT) -> int:
        """At most ``length`` bytes that were read from a descriptor are at ``offset``; how many, 0 at its end.

        As readv(2) into the region, which would fail with EFAULT where a page is not writable, or not for a moment.
        Waits until there is something to read; then, where the policy is "wait", until the pages are WRITE; then for
        leases on them; and holds the pages, so that no change and no snapshot comes between. Into pages that this
        thread has leased it reads at once. What a file object has read ahead, or decodes, is passed by.

        Raises:
            ProtectionError: a page is not WRITE; where the policy is "wait", after ``timeout`` seconds. Nothing was
                read.
            PropagationTimeout: somebody held a page, or was changing it, for so long. Nothing was read.
            BlockingIOError: there is nothing to read, and the descriptor is not blocking.
            ValueError: a range that is empty, or not inside.
            ShareError: this thread holds leases on some of the pages only.
            TypeError: a socket that has a ``recv_into`` of its own: see :meth:`recv_into`.
            OSError: what the kernel refuses. ENOMEM where memory is to be locked (``create``), and the limit is below
                twice the size.
        """
        offset, length = self._check_target(offset, length)
        if _receives_itself(fd):
            raise TypeError(
                f"readinto: a {type(fd).__name__} receives what does not come over its descriptor; recv_into takes it"
            )
        number = _core.integer(fd.fileno() if hasattr(fd, "fileno") else fd, "fd")
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:  # it would never become readable
            raise OSError(errno.EBADF, f"readinto: descriptor {number} is not open for reading")
        return int(self._receive(number, offset, length, -1, None if os.get_blocking(number) else 0, timeout))

    def recv_into(
        self, sock: socket.socket, offset: int, length: int, *, flags: int = 0, timeout: Timeout = DEFAULT
    ) -> int:
        """A message, or at most ``length`` bytes of a stream, is at ``offset``; how many bytes, 0 at its end.

        As :meth:`readinto`, with ``flags`` of recv(2). How long to wait for something to come is the socket's own
        timeout. A message that is longer than ``length`` is cut off; otherwise none is lost, whatever is raised.

        A socket with a ``recv_into`` of its own, as ssl.SSLSocket, receives by that, into memory apart: when the pages
        are WRITE, and before they are held, so that nobody waits for the network. What they do not take after all is
        kept, and comes first in the next call for that socket.

        Raises:
            TimeoutError: the socket's timeout.
            ...: as readinto, and what the socket's own method raises (ssl.SSLWantReadError where it does not block).
        """
        offset, length = self._check_target(offset, length)
        flags = _core.integer(flags, "flags")
        if _receives_itself(sock):
            return self._receive_apart(sock, offset, length, flags, timeout)
        return int(self._receive(sock.fileno(), offset, length, flags, sock.gettimeout(), timeout))

    def _receive_apart(self, sock: socket.socket, offset: int, length: int, flags: int, timeout: Timeout) -> int:
        """By the socket's own method, into memory apart: nothing is held while that waits for the network."""
        self._await_writable(offset, length, timeout)
        data = _unstored.pop(sock, None) or _received(sock, length, flags)
        try:
            return int(self._store(offset, data, length, timeout))
        finally:
            if data:  # what the pages did not take after all, or there was no room for
                _unstored[sock] = data + _unstored.pop(sock, b"")

    def _check_target(self, offset: int, length: int) -> tuple[int, int]:
        offset, length = _core.integer(offset, "offset"), _core.integer(length, "length")
        if offset < 0 or length <= 0 or offset + length > self._size:
            raise ValueError(
                f"the range of {length} bytes at offset {offset} is empty, or not inside the {self._size} bytes"
            )
        return offset, length


def _join(fd: int, entry: int, engine: int, deadline: int, doing: str) -> Region:
    try:
        region: Region = _core.attach(Region, fd, entry, engine, deadline, doing)
    except OSError as error:
        if error.errno == errno.ENOSPC and entry >= 0:
            raise _names.no_row(str(_core.name_of(fd))) from None
        raise
    region._name, region._size, _, _ = region._facts()
    if entry >= 0:
        _holders.add(region)
    region._page = region._page_size()
    try:
        region._bring_in(doing)
    except BaseException:
        region._close()
        raise
    return region


_holders: weakref.WeakSet[Region] = weakref.WeakSet()  # of names


def _leave_names() -> None:
    """At a normal end of this process: the names that nobody else holds are gone.

    Their regions stay as they are until the kernel ends them: other threads may still use the memory.
    """
    names = set()
    for region in list(_holders):
        with contextlib.suppress(RegionClosed):
            region._let_go_of_name()
            names.add(str(region._name))
    for name in names:
        _names.clear(name)


def _leave_names_later(*_: object) -> None:
    """At the end of this process, when the processes that multiprocessing started in it, which may come to attach by a
    name, have ended: its own exit function joins them, then calls this. It does so in its processes too, where nothing
    of atexit is called.
    """
    util.Finalize(None, _leave_names, exitpriority=-1000)


_leave_names_later()
os.register_at_fork(after_in_child=_leave_names_later)
util.register_after_fork(_leave_names, _leave_names_later)  # multiprocessing forgets what was registered before


def _rebuild(dup: Any) -> Region:
    fd = dup.detach()
    try:
        return attach(fd)
    finally:
        os.close(fd)


def create(
    name: str | None = None,
    *,
    size: int,
    mode: int = 0o600,
    prot: int = Prot.READ_WRITE,
    max_participants: int = 1024,
    engine: str = "auto",
    replace: bool = False,
    on_violation: str = "die",
    reserve: bool = False,
    huge: str | None = None,
    numa: int | str | None = None,
    lock_memory: bool = False,
) -> Region:
    """A new region, all zero, in which this process participates; its memory is taken when it is first touched.

    Args:
        name: 1 to 200 characters of letters, digits, '.', '_' and '-', not beginning with '.'; None for no name.
        size: bytes; need not be whole pages. At most some 10.6 TiB: a region takes 11 times its size (large ones less,
            with room for fewer snapshots) of each participant's address space, which ``ulimit -v`` counts.
        mode: permission bits of the memory and the name, less the umask; its owner's are needed to attach.
        prot: the protection of every page at first.
        max_participants: 1 to 2,047.
        engine: "uffd", "mprotect", or "auto": "uffd" where the kernel allows it, else "mprotect".
        replace: let the name move here from a live region of the same owner; whoever has that one keeps it.
        on_violation: what happens in each participant at a forbidden access, until it decides otherwise for itself
            (:meth:`Region.on_violation`): "die", "raise" or "wait".
        reserve: take all memory of the data, and of what the region needs beside it, now (fallocate(2)): no access
            fails for want of memory later (SIGBUS). What snapshots need is not reserved: one that finds no memory is
            given up, and stores go on. The size of /dev/shm does not matter. Of cgroups and of the machine (see
            Raises) the limits are looked at before each 64 MiB, with clean page cache and free swap counted as free:
            the kernel has no way of asking for memory that would not, at a limit, kill a process of the cgroup
            instead of failing. What others take between that look and the taking can still bring that about; so can
            a limit that is lowered later, or swapping in.
        huge: "thp" asks for transparent huge pages in every participant: a wish, which the kernel grants where
            ``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` is "advise" (or "always", "within_size");
            ``page_size`` stays 4,096, and pages that have a protection or a lease apart from their neighbours are
            small. "2M" and "1G" are pages of the machine's pools (hugetlb; ``nr_hugepages``): ``page_size`` is
            theirs, in which protections and leases are given; all are taken now, with at least one for what the
            region needs beside its data; they are never swapped. Such a region has no snapshots, and its engine is
            "mprotect". A violation under "raise" copies the whole page.
        numa: "interleave" over all nodes, or the number of one: memory comes from there as long as it has some, then
            from others, whoever touches it first. Ignored with a UserWarning on a machine of one node.
        lock_memory: what a participant touches is not swapped out (mlock2(2)) as long as it participates; what is
            there when it attaches is brought in where its protection lets it be read, so with ``reserve`` all of it.
            Each participant needs a limit (RLIMIT_MEMLOCK; ``ulimit -l``) above the size, twice the size for leases
            by window, ``readinto`` and ``recv_into``. A forked child whose limit is too small takes part without;
            private copies of a page after a violation, and what snapshots saved, may be swapped. Huge pages never are,
            whatever this says.

    Raises:
        RegionExists: the name leads to a live region (a stale one is replaced).
        PermissionError: with ``replace``, the name is not yours.
        ValueError, TypeError: a wrong argument.
        OSError: what the kernel refuses, with its errno: EMFILE, ENOMEM. Of a name, which needs a page in /dev/shm
            (a region without a name needs none), with the path too: ENOSPC, EROFS, EACCES, ENOENT; EBUSY where
            somebody was stopped while it removed the name. ENOMEM also where ``reserve`` wants more than a memory
            cgroup of this process (version 1 or 2, as far as it can be seen) or the machine has left, where too few
            huge pages are free, and where memory is to be locked above the limit (EPERM where that is 0); ENODEV where
            there are no huge pages of that size; EOPNOTSUPP for them with engine "uffd".
        KeyboardInterrupt: after Ctrl-C while memory is taken. There is no region then.
    """
    size, bits = _core.integer(size, "size"), _core.protection_bits(prot)
    if name is not None:
        _names.check(name)
    if not 0 < size <= 1 << 45:
        raise ValueError(f"size must be 1 to 2**45 bytes, not {size}")
    mode = _core.integer(mode, "mode")
    if mode & ~0o777 or mode & 0o600 != 0o600:
        raise ValueError(f"mode must be permission bits that include 0o600, which participants need, not {mode:#o}")
    max_participants = _core.integer(max_participants, "max_participants")
    if not 1 <= max_participants <= _core.MAX_PARTICIPANTS:
        raise ValueError(f"max_participants must be 1 to {_core.MAX_PARTICIPANTS}, not {max_participants}")
    wanted, policy = _check_engine(engine), _check_policy(on_violation)
    memory = _creation.check(reserve, huge, numa, lock_memory)
    if memory.huge and engine == "uffd":
        raise OSError(errno.EOPNOTSUPP, f"create: engine 'uffd' cannot change huge pages ({huge}) entry by entry")
    if name is not None and not replace:
        _names.check_free(name)
    mode = _names.masked(mode)
    fd = _creation.create(size, bits, max_participants, mode, policy, name or "", memory)
    try:
        deadline = _core.deadline_of(DEFAULT)
        if name is None:
            return _join(fd, -1, wanted, deadline, "create")
        return _create_named(fd, name, mode, replace, wanted, deadline)
    finally:
        os.close(fd)


def _create_named(fd: int, name: str, mode: int, replace: bool, engine: int, deadline: int) -> Region:
    entry = _names.NewEntry(name, fd)
    try:
        region = _join(fd, entry.fd, engine, deadline, "create")
        try:
            entry.publish(mode, replace)
        except BaseException:
            region._close()
            raise
        return region
    finally:
        entry.discard()


@contextlib.contextmanager
def _lead(name_or_fd: str | SupportsIndex, deadline: int) -> Iterator[tuple[int, int]]:
    """(descriptor of the region, descriptor of its entry or -1), for the time of joining."""
    if isinstance(name_or_fd, str):
        with _names.found(_names.check(name_or_fd), deadline) as lead:
            yield lead
        return
    fd = _core.index_of(name_or_fd.fileno() if hasattr(name_or_fd, "fileno") else name_or_fd)
    if fd is None:
        raise TypeError(f"expected a region's name (str), or a descriptor (int), not {name_or_fd!r}")
    if not 0 <= fd < 1 << 31:
        raise ValueError(f"a descriptor is 0 or more, and below 2**31, not {fd}")
    with _names.of_region(_core.name_of(fd), fd) as entry:
        yield fd, entry


def _check_writable(fd: int) -> None:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise PermissionError(
            errno.EACCES,
            f"descriptor {fd} is read-only, which is enough to observe the region (readonly=True), not to take part; "
            "ask for its fileno()",
        )


@overload
def attach(
    name_or_fd: str | SupportsIndex,
    *,
    engine: str = "auto",
    timeout: Timeout = DEFAULT,
    readonly: Literal[False] = False,
) -> Region: ...
@overload
def attach(
    name_or_fd: str | SupportsIndex, *, engine: str = "auto", timeout: Timeout = DEFAULT, readonly: Literal[True]
) -> Observer: ...
@overload
def attach(
    name_or_fd: str | SupportsIndex, *, engine: str = "auto", timeout: Timeout = DEFAULT, readonly: bool
) -> Region | Observer: ...
def attach(
    name_or_fd: str | SupportsIndex, *, engine: str = "auto", timeout: Timeout = DEFAULT, readonly: bool = False
) -> Region | Observer:
    """A region that exists, in which this process participates now; or, read-only, an :class:`Observer` of it.

    Args:
        name_or_fd: a name, or a descriptor, which is duplicated: the caller's own stays open and stays the caller's.
        engine: "uffd", "mprotect", or "auto": "uffd" where the kernel allows it, else "mprotect". An observer has none.
        timeout: seconds to wait for a change that is under way; None for ever. An observer waits for none.
        readonly: only look: by a mapping that the kernel never lets become writable. Any descriptor of the region will
            do, :meth:`Region.readonly_fd` too.

    Raises:
        RegionNotFound: nothing has this name (at once).
        PermissionError: it belongs to another user, or nobody who holds it can be reached; pass the descriptor. Or the
            descriptor is read-only, and ``readonly`` was not said.
        CorruptRegion: the descriptor is no region, or a damaged one.
        ParticipantLimit: every slot is taken.
        PropagationTimeout: the lock was held for the whole timeout.
        OSError: what the kernel refuses: EBADF, EMFILE, ENOMEM; ENOSPC where the name has no room for one more holder
            (each 64 need a page in /dev/shm); FileNotFoundError with the path where there is no /dev/shm. EOWNERDEAD:
            the thread that follows changes was ended as it began (by a seccomp filter).
        KeyboardInterrupt: after Ctrl-C; this process has no part in the region then.
    """
    wanted = _check_engine(engine)
    deadline = _core.deadline_of(timeout)
    with _lead(name_or_fd, deadline) as (fd, entry):
        if readonly:
            return observe(fd)
        _check_writable(fd)
        return _join(fd, entry, wanted, deadline, "attach")
