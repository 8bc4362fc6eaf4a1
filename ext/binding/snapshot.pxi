"""snapshot.pxi: part of _core.pyx: snapshots, as Python has them.

Lives here: what is held of a snapshot in this process, its buffer protocol, and
saving it in the background.  Not here: protocol (ext/operations/), files
(pyshare/_image.py).
Invariants
 1. Whoever is inside a call has the Holding, so close() takes nothing away from
    under it; a buffer has the mapping, so it outlives both.
 2. What is the last to go, of Holding and mapping, gives the memory back.
"""

import _thread
import weakref
from multiprocessing import reduction

from pyshare import _image

cdef enum:
    SOME = 512  # pages that are saved between two looks at signals, or at whether somebody still wants it


cdef sweep(region):
    """Of a weak reference to the Handle: what nobody holds any more goes; what is complete is in no store's way."""
    handle = None if region is None else region()
    if handle is not None:
        (<Handle>handle).sweep()


@cython.final
@cython.no_gc_clear  # __dealloc__ needs the region
cdef class Holding:
    """A snapshot's descriptor and mapping, as long as anybody uses them."""

    cdef ps_snapshot at
    cdef object region  # weak, or None
    cdef bint unwanted        # its Snapshot is gone or closed: who saves it in the background stops
    cdef bint busy            # a thread does, and has a reference, in the process of so many forks
    cdef uint32_t forks
    cdef int saver            # its native id; 0: it has not begun

    def __cinit__(self):
        self.at.fd = -1

    def __dealloc__(self):
        if self.at.fd >= 0 and not Py_IsFinalizing():
            ps_snapshot_close(&self.at)
            sweep(self.region)

    cdef bint is_busy(self) noexcept:
        # A thread that did not come along in a fork, or was ended alone, has left its reference.
        if self.busy and (self.forks != ps_forks() or not ps_sys_thread_exists(self.saver)):
            self.busy = False
            Py_DECREF(self)
        return self.busy

    cdef void end(self) noexcept:
        """Nobody will ask for it any more; who saves it has stopped when this returns."""
        self.unwanted = True
        while self.is_busy() and self.saver != ps_sys_gettid():  # which may be collecting garbage
            with nogil:
                ps_sys_pause()

    cdef bint save(self, uint64_t *page) except -1:
        """Some more pages; False: it is complete."""
        cdef int rc
        with nogil:
            rc = ps_snapshot_save(&self.at, page, SOME)
        if rc < 0:
            raise_lost(rc, "snapshot")
        return rc


@cython.final
@cython.no_gc_clear
cdef class Image:
    """What buffers of a Snapshot name as their object: the mapped image, which lives as long as it."""

    cdef void *address
    cdef uint64_t pages
    cdef uint64_t size
    cdef object region  # as the Holding's

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.address, <Py_ssize_t>self.size, 1, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        """As in Handle."""

    def __dealloc__(self):
        if self.address is not NULL and not Py_IsFinalizing():
            ps_snapshot_unview(self.address, self.pages)
            sweep(self.region)


cdef raise_lost(int rc, str doing):
    if rc == PS_ECORRUPT:
        raise _errors.CorruptRegion(
            f"{doing}: the snapshot was given up: there was no memory to save a page", field="snapshot")
    raise_code(rc, doing)


def _save_all(list only):
    """In the background, so that stores cost nothing again; until its Snapshot is gone or closed."""
    cdef uint64_t page = 0
    cdef Holding holding = only.pop()  # the thread's arguments keep no other
    holding.saver = ps_sys_gettid()
    try:
        while not holding.unwanted and holding.save(&page):
            pass
    except (OSError, _errors.CorruptRegion):
        pass  # whoever reads it is told
    region = None if holding.unwanted else holding.region
    holding.busy = False
    holding = None  # before any other thread runs: who finds it idle finds our reference gone
    sweep(region)


@cython.final
@cython.no_gc_clear  # __dealloc__ needs the Holding
cdef class Snapshot:
    """Everything that a region held at one moment, unchanged for ever; made by :meth:`Region.snapshot`.

    Costs memory only for pages that are written later. ``memoryview(snapshot)`` and numpy arrays over it are read-only
    and stay valid when it is closed; making the first saves what is not saved yet. A context manager; pickles to other
    processes of :mod:`multiprocessing`. A forked child has it too. It does not need the Region that it was made of, and
    outlives the participant that made it.
    """

    cdef Holding holding  # None: closed
    cdef Image image
    cdef readonly object name
    cdef readonly uint64_t generation
    cdef readonly uint64_t size
    cdef readonly object saved_as  # the path of its image, or None
    cdef object __weakref__

    def __init__(self):
        raise TypeError("take a snapshot with region.snapshot()")

    cdef Holding held(self, str doing):
        if self.holding is None:
            raise _errors.RegionClosed(f"{doing}: the snapshot is closed in this process")
        return self.holding

    @property
    def closed(self):
        """True once ``close`` was called in this process."""
        return self.holding is None

    @property
    def complete(self):
        """True once all of it is saved: it needs nothing of the region any more, and stores cost nothing again."""
        return bool(ps_snapshot_complete(&self.held("snapshot").at))

    @property
    def saved(self):
        """How many pages were saved, because they were written, or for :meth:`finish`."""
        cdef Holding holding = self.held("snapshot")
        cdef uint64_t pages
        with nogil:
            pages = ps_snapshot_saved(&holding.at)
        return pages

    @property
    def page_size(self):
        """Bytes of a page: what is saved at once."""
        return PAGE_SIZE

    def __len__(self):
        return self.size

    def runs(self):
        """Ascending runs (offset, length) of whole pages, in bytes; every other page is zero."""
        cdef Holding holding = self.held("runs")
        cdef uint64_t page, count = 0
        cdef int rc
        found = []
        for area in (False, True):  # in this order: a page that leaves the data has been saved before
            page = 0
            while True:
                rc = ps_snapshot_data(&holding.at, area, &page, &count)
                if rc:
                    raise_code(rc, "runs")
                if not count:
                    break
                found.append((page * PAGE_SIZE, count * PAGE_SIZE))
                page += count
        return _image.merged(found)

    def save(self, path, *, since=None, progress=False):
        """The path leads to an image of the snapshot, whole and on disk; until then to what it led to before.

        The file has the memory at its own offsets, so ``numpy.memmap`` of it works, and pages of zeros are holes; its
        owner alone may read it.  :class:`Image` reads it, and :meth:`Region.restore` puts it back.

        Args:
            since: the path of an image, or a Snapshot that this process has saved: the new image has only the pages
                that differ from it, and needs that file, in the same directory, and those that it builds on.
            progress: True for a bar on stderr, or a function that is told how many bytes are done, of how many.

        Raises:
            ValueError: an image that cannot be built on: another size or directory, or one that would be replaced.
            CorruptRegion: ``since`` is no whole image; or the snapshot was given up.
            OSError: of the file system. Nothing is left then.
            RegionClosed: the snapshot is closed.
        """
        self.saved_as = _image.save(self, path, since, progress)

    def read(self, offset, length):
        """A copy of ``length`` bytes from ``offset`` on, which need not be aligned.

        Raises:
            ValueError: a range outside the snapshot.
            RegionClosed: the snapshot is closed.
            CorruptRegion: it was given up, because there was no memory to save a page.
        """
        offset, length = integer(offset, "offset"), integer(length, "length")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(
                f"the range of {length} bytes at offset {offset} is not inside the snapshot's {self.size} bytes")
        cdef Holding holding = self.held("read")
        cdef uint64_t first = offset, count = length
        cdef int rc
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>count)
        cdef char *to = PyBytes_AS_STRING(data)
        with nogil:
            rc = ps_snapshot_read(&holding.at, first, to, count)
        if rc:
            raise_lost(rc, "read")
        return data

    def finish(self):
        """All of it is saved when this returns; others save the pages that they write meanwhile.

        Raises:
            RegionClosed, CorruptRegion: as :meth:`read`.
            OSError: no memory for the copy (ENOSPC, ENOMEM).
            KeyboardInterrupt: after Ctrl-C; the rest can be saved later.
        """
        cdef Holding holding = self.held("finish")
        cdef uint64_t page = 0
        while holding.is_busy():  # two would only be in each other's way
            PyErr_CheckSignals()
            with nogil:
                ps_sys_pause()
        while holding.save(&page):
            PyErr_CheckSignals()
        sweep(holding.region)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        cdef Image image
        cdef int rc
        if self.image is None:
            self.finish()
            image = Image.__new__(Image)
            rc = ps_snapshot_view(&self.held("buffer").at, &image.address)
            if rc:
                raise_code(rc, "buffer")
            image.pages, image.size, image.region = self.holding.at.pages, self.size, self.holding.region
            self.image = image
        self.held("buffer")
        PyObject_GetBuffer(self.image, buffer, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        """As in Handle."""

    def close(self):
        """This process does not hold it any more; its memory goes with its last holder and the last buffer of it.

        Dropping the object does the same. Where the last holder was killed, ended without this, or is no participant any
        more, the next call of a participant gives the memory back: any but those for leases and locks that are free, and
        one look in 0.1 s.
        """
        cdef Holding holding = self.holding
        self.holding = self.image = None
        if holding is not None:
            holding.end()

    def __dealloc__(self):
        if self.holding is not None and not Py_IsFinalizing():  # as in Handle
            self.holding.end()

    def __enter__(self):
        self.held("snapshot")
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def __reduce__(self):
        cdef Holding holding = self.held("pickle")
        return _rebuild_snapshot, (reduction.DupFd(holding.at.fd), holding.at.index, holding.at.word, self.generation,
                                   self.name)

    def __repr__(self):
        what = f"{self.name!r}, {self.size} bytes" if self.name else f"{self.size} bytes"
        return f"<pyshare.Snapshot of {what} at generation {self.generation}{', closed' if self.closed else ''}>"


def _rebuild_snapshot(dup, uint32_t index, uint32_t word, uint64_t generation, name):
    cdef Holding holding = Holding.__new__(Holding)
    cdef const char *field = NULL
    cdef int rc = ps_snapshot_adopt(dup.detach(), index, word, generation, &holding.at, &field)
    if rc:
        raise_code(rc, "snapshot", None if field is NULL else field.decode())
    return snapshot_of(holding, name)


cdef Snapshot snapshot_of(Holding holding, name):
    cdef Snapshot snapshot = Snapshot.__new__(Snapshot)
    snapshot.holding = holding
    snapshot.name, snapshot.generation, snapshot.size = name, holding.at.generation, holding.at.size
    return snapshot


cdef raise_full(uint32_t areas):
    if not areas:
        raise _errors.ShareError("snapshot: above 6.4 TiB a region has no room for one in a process's address space")
    raise _errors.ShareError(f"snapshot: as many are alive as the region has room for (at most {areas}); close one")


def take_snapshot(Handle handle not None, timeout):
    """Handle.snapshot; see Region.snapshot."""
    cdef ps_outcome outcome
    cdef Holding holding = Holding.__new__(Holding)
    cdef flag shared = False
    cdef int rc
    cdef int64_t deadline = deadline_of(timeout)
    handle.enter("snapshot")
    try:
        while True:
            with nogil:
                rc = ps_snapshot_take(handle.region, deadline, &outcome, &holding.at, &shared)
            if rc != PS_ESIGNAL:
                break
            handle.serve_signals("snapshot")  # there is none
        if rc == PS_ETIMEOUT:
            raise_timeout(&outcome, "snapshot")
        if rc == PS_EAREAS:
            raise_full(ps_areas(handle.region))
        if rc:
            raise_code(rc, "snapshot", handle.corrupt_field())
        name = ps_name(handle.region).decode() or None
    finally:
        handle.leave()
    if handle.itself is None:
        handle.itself = weakref.ref(handle)
    holding.region = handle.itself
    if shared:
        holding.busy, holding.forks = True, ps_forks()
        try:
            _thread.start_new_thread(_save_all, ([holding],))
        except RuntimeError:  # no more threads: who stores saves, and finish()
            holding.busy = False
    return snapshot_of(holding, name)
