"""held.pxi: part of _core.pyx: what is held: leases, locks, freezes.

Each is released once, by whoever comes first: its owner, the end of its with statement, or the garbage collector, which
warns.
"""


@cython.freelist(16)
@cython.no_gc_clear  # __dealloc__ needs the handle
cdef class Held:
    """What this process has of a region until it is released: a lease, a lock, a freeze; a context manager."""

    cdef object __weakref__
    # All fields of all of them: only objects of one size share the free list.
    cdef Handle handle  # NULL: never taken
    cdef uint32_t forks
    cdef bint over
    cdef bint untold       # nobody has been told of a holder that died: the next is
    cdef flag left         # Lock: by a holder that died
    cdef uint32_t index    # Lock
    cdef uint64_t at       # Frozen: the generation
    cdef ps_lease pages    # Lease
    cdef uint64_t length   # Lease: bytes
    cdef object seen       # Lease: the memoryview of .view, once somebody has asked

    @cython.final
    cdef void begin(self, Handle handle) noexcept:
        self.handle = handle
        self.forks = handle.forks
        handle.holds += 1

    @cython.final
    cdef bint is_held(self) noexcept:
        return self.handle is not None and not self.over and self.forks == ps_forks()

    cdef int end(self) except -1:
        """Gives it back, and sets `over`."""
        raise NotImplementedError

    cdef drop(self):
        """The same, as nobody can be told of an exception; returns what it was."""
        raise NotImplementedError

    @property
    def held(self):
        """True until it is released."""
        return self.is_held()

    def release(self):
        """Others may have it now. Nothing happens where it has been released already."""
        if self.is_held():
            self.end()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.is_held():
            self.end()

    # A __del__ would run once for all objects of a place in the free list.
    def __dealloc__(self):
        if self.is_held() and not Py_IsFinalizing():
            warn_dropped(self.drop())


@cython.final
@cython.no_gc_clear
cdef class Lease(Held):
    """Pages that this process alone may write; made by :meth:`Region.lease`, a context manager.

    It belongs to the thread that took it, and may be released by any. Dropped while held, it is released with a
    ResourceWarning. In a forked child it is not held.

    Arrays and slices made from ``view`` that are left over when it has ended show the pages as the region's protection
    has them: a store through one is a violation, whose line on stderr says when the lease ended.
    """

    def __init__(self):
        raise TypeError("take a lease with region.lease()")

    @property
    def abandoned(self):
        """True if somebody died while holding one of the pages, which may be half written."""
        return bool(self.pages.abandoned)

    @property
    def view(self):
        """A writable memoryview of exactly these pages; ValueError once the lease has ended, also for who kept it."""
        if self.seen is None or not self.is_held():
            self.seen = memoryview(self)
        return self.seen

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if not self.is_held():
            raise ValueError("the lease has ended")
        self.handle.fill_lease(buffer, flags, self)

    def __releasebuffer__(self, Py_buffer *buffer):
        """As in Handle."""

    cdef int end(self) except -1:
        cdef Handle handle = self.handle
        self.over = True
        self.pages.untold = self.untold
        if self.seen is not None:
            try:
                self.seen.release()
            except BufferError:  # somebody has a buffer of it; the pages are closed all the same
                pass
            self.seen = None
        if self.pages.count > FEW or ps_lease_give(handle.region, &self.pages, PS_TRY):
            with nogil:
                ps_lease_give(handle.region, &self.pages, PS_NEVER)
        handle.holds -= 1

    cdef drop(self):
        self.end()
        return f"a lease of {self.length} bytes at offset {self.pages.first * PS_PAGE_SIZE}"

    def __repr__(self):
        cdef uint64_t offset = self.pages.first * PS_PAGE_SIZE
        state = "held" if self.is_held() else "ended"
        return f"<pyshare.Lease offset {offset}, {self.length} bytes, {state}>"


@cython.final
@cython.no_gc_clear
cdef class Lock(Held):
    """One of a region's locks, held; made by :meth:`Region.lock`, a context manager.

    It belongs to the thread that took it, and may be released by any. Dropped while held, it is released with a
    ResourceWarning. In a forked child it is not held.
    """

    def __init__(self):
        raise TypeError("take a lock with region.lock()")

    @property
    def abandoned(self):
        """True if the last holder died while holding it: what it protects may be half done."""
        return bool(self.left)

    cdef int end(self) except -1:
        self.over = True
        ps_user_lock_give(self.handle.region, self.index, self.untold)
        self.handle.holds -= 1

    cdef drop(self):
        self.end()
        return f"lock {self.index}"

    def __repr__(self):
        return f"<pyshare.Lock {self.index}, {'held' if self.is_held() else 'released'}>"


@cython.final
@cython.no_gc_clear
cdef class Frozen(Held):
    """A region that is READ for everybody; made by :meth:`Region.frozen`, a context manager.

    It belongs to the thread that froze, and may be released by any. Dropped while held, it is released with a
    ResourceWarning. In a forked child it is not held.

    The end does not wait for a participant that is silent for a second: it follows before it acknowledges anything
    else. It waits for the region's lock without a limit; Ctrl-C ends that wait, and then it is held still.
    """

    def __init__(self):
        raise TypeError("freeze a region with region.frozen()")

    @property
    def generation(self):
        """Of the change that froze it."""
        return self.at

    cdef int end(self) except -1:
        cdef int rc = PS_ESIGNAL
        while rc == PS_ESIGNAL and self.is_held():  # another process keeps the region's lock
            rc = self.thaw()
            serve_amid_wait(None, "release")  # if a handler raises then, it is held still
        if rc and rc != PS_ESIGNAL:
            raise_code(rc, "release", self.handle.corrupt_field())

    cdef int thaw(self) noexcept:
        cdef int rc
        cdef Handle handle = self.handle
        self.over = True
        with nogil:
            rc = ps_thaw(handle.region)
        if rc == PS_ESIGNAL:
            self.over = False
        else:
            handle.holds -= 1
        return rc

    cdef drop(self):
        while self.thaw() == PS_ESIGNAL:
            pass
        return "a freeze"

    def __repr__(self):
        return f"<pyshare.Frozen at generation {self.at}, {'held' if self.is_held() else 'released'}>"
