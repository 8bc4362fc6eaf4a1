"""memory.pxi: part of _core.pyx: what participants and observers have in common: the buffers of a mapped region.

Lives here: Memory, whose references tell who uses a region's memory, and Mapped, the base of Participant and Observed.
Invariant: whoever uses the memory has a reference to the Memory, and nobody else has.
"""


@cython.final
@cython.no_gc_clear  # __dealloc__ needs the handle; the cycle with .buf is broken at the handle's end
cdef class Memory:
    """What buffers of a Mapped name as their object: as long as it lives, somebody uses the memory.

    A buffer has a reference to it, and so has an array that numpy makes over a memoryview: it lets go of the buffer
    and keeps the buffer's object (PyArray_BufferConverter).
    """

    cdef Mapped handle

    def __cinit__(self, Mapped handle not None):
        self.handle = handle

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.handle.fill(buffer, flags)

    def __dealloc__(self):
        if self.handle is not None and self.handle.memory is <PyObject *>self:
            self.handle.memory = NULL


cdef class Mapped:
    """A region that this process has mapped; what a participant and an observer have in common: its buffers."""

    cdef ps_region *region   # NULL: closed
    cdef PyObject *memory    # the Memory, borrowed, while there is one
    cdef Py_ssize_t calls    # threads inside the core
    cdef uint32_t forks      # ps_forks() when they were counted: a child has none of its parent's
    cdef bint readonly
    cdef object view         # the cached memoryview of .buf
    cdef object __weakref__

    cdef enter(self, str doing):
        """Before the core is called: not closed under our feet."""
        if self.region is NULL:
            raise_code(PS_ECLOSED, doing)
        self.count()
        self.calls += 1

    cdef uint64_t unit(self) noexcept:
        return PS_PAGE_SIZE if self.region is NULL else ps_page_size(self.region)

    cdef leave(self):
        self.count()
        self.calls = max(0, self.calls - 1)  # 0: forked meanwhile, by a signal handler

    cdef void count(self) noexcept:
        if self.forks != ps_forks():
            self.calls = 0
            self.forks = ps_forks()

    # -- Buffer protocol --

    cdef fill(self, Py_buffer *buffer, int flags):
        self.enter("buffer")
        try:
            self.fill_with(buffer, flags, ps_address(self.region), ps_size(self.region))
        finally:
            self.leave()

    cdef fill_with(self, Py_buffer *buffer, int flags, void *at, uint64_t length):
        if self.memory is NULL:
            made = Memory.__new__(Memory, self)
            if self.memory is NULL:  # still: a finaliser may have run
                self.memory = <PyObject *>made
        PyBuffer_FillInfo(buffer, <object>self.memory, at, <Py_ssize_t>length, self.readonly, flags)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        hold_arrays()
        self.fill(buffer, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        """Never called, since buffers are the Memory's; but without it numpy.frombuffer would keep us and no buffer."""

    def _view(self):
        if self.view is None or not users_of_view(self.view):  # released by the program
            self.view = memoryview(self)
        return self.view

    def __dlpack_device__(self):
        """(1, 0): the memory of the CPU."""
        return ON_CPU, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """The bytes as a DLPack capsule: a tensor of uint8 without a copy, for ``from_dlpack`` of numpy, torch and others.

        The memory of a region is writable for whoever takes it, as its buffers are; an observer's is marked read-only.
        It counts as a use of the memory (:meth:`close`) until the tensor goes.

        Args:
            stream: None; this memory has none.
            max_version: what the taker understands; from (1, 0) on a tensor can say that it is read-only.
            dl_device: None or (1, 0).
            copy: True for one, which is the taker's own.

        Raises:
            BufferError: another device; or the memory is read-only, and the taker could not know.
            ProtectionError: of a copy: a page may not be read.
            ValueError: a stream.
            RegionClosed.
        """
        if stream is not None:
            raise ValueError(f"__dlpack__: stream must be None, not {stream!r}: this memory is the CPU's")
        if dl_device is not None and tuple(dl_device) != (ON_CPU, 0):
            raise BufferError(f"__dlpack__: the memory is on device {(ON_CPU, 0)}, and cannot be had on {dl_device!r}")
        versioned = max_version is not None and max_version[0] >= 1
        if copy:
            return tensor_of(bytearray(self._read(0, self._facts()[1])), versioned, IS_COPIED)
        return tensor_of(self, versioned, 0)

    # -- Life --

    cdef bint is_used(self):
        """Is anybody but the cached view using the memory, or a thread inside a call?"""
        self.count()
        cdef Py_ssize_t cached = 0 if self.view is None else users_of_view(self.view)
        cdef Py_ssize_t users = 0 if self.memory is NULL else Py_REFCNT(self.memory)
        return self.calls > 0 or cached > 1 or users > (cached > 0)

    cdef let_go(self):
        """Of the cached view, before the memory goes."""
        if self.view is not None:
            self.view.release()
            self.view = None

    # -- What it is --

    def _is_open(self):
        return self.region is not NULL

    def _page_size(self):
        return self.unit()

    def _facts(self):
        """(name, size, address, generation), of an open region."""
        self.enter("region")
        try:
            return (ps_name(self.region).decode() or None, ps_size(self.region), <size_t>ps_address(self.region),
                    ps_generation(self.region) if self.readonly else ps_generation_told(self.region))
        finally:
            self.leave()

    def _fileno(self):
        cdef int fd
        self.enter("fileno")
        fd = ps_fd(self.region)
        self.leave()
        if fd < 0:
            raise_code(fd, "fileno")
        return fd

    def _violations(self):
        """[(time in ns, pid, command, offset, protection, generation, outcome)]; None: longer ago than is known."""
        cdef ps_shm_violation kept[PS_VIOLATIONS]
        cdef int i, count
        self.enter("violations")
        try:
            count = ps_violations(self.region, kept)
        finally:
            self.leave()
        if count == -errno.EBADF and self.readonly:
            raise_blind("violations")
        if count < 0:
            raise_code(count, "violations")
        return [(kept[i].time, kept[i].pid, (<bytes>kept[i].command).decode(errors="replace"), kept[i].offset,
                 kept[i].prot, kept[i].generation if kept[i].known else None, OUTCOMES[kept[i].outcome])
                for i in range(count)]

    # Each in its own way:

    def _participants(self):
        """[(pid, tid, applied, alive, engine, fenced)] of the live slots."""
        raise NotImplementedError

    def _protection(self, uint64_t page):
        raise NotImplementedError

    def _runs(self, uint64_t pages):
        """[(first page, pages, protection)]"""
        raise NotImplementedError

    def _read(self, uint64_t offset, uint64_t length):
        raise NotImplementedError
