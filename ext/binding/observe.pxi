"""observe.pxi: part of _core.pyx: a region, seen by somebody who does not take part in it (ext/operations/observe.c).

Lives here: Observed, the base of those who attach read-only; and Observer, which `pyshare trace` and `pyshare map`
stand on.  That gives what is in the control segment as plain tuples, at the moment of each look; what it means is theirs.
"""

import fcntl

RING = PS_RING
KINDS = {PS_SET: "set", PS_UNDO: "undone", PS_THAW: "thawed", PS_FOLLOW: "follow"}
SNAPSHOT_STATES = ("free", "preparing", "active", "complete")


def start_time(int pid) -> int:
    """When a process began, in clock ticks of the machine, give or take one; 0: unknown."""
    return ps_sys_start_time(pid)


def read_only(int fd):
    """A descriptor of the same file that is read-only for good, and closed by exec; PermissionError, OSError."""
    try:
        return os.open(f"/proc/thread-self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # another user's, or there is no /proc: what is read-only already will do
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        if error.errno != errno.EACCES:
            raise
        raise PermissionError(
            errno.EACCES, f"the mode of the region behind descriptor {fd} keeps you from opening it to read; ask for a "
            "descriptor made by its readonly_fd()") from None


cdef raise_blind(str doing):
    raise OSError(errno.EBADF, f"{doing}: the program has closed the observer's descriptor; attach again")


cdef class Observed(Mapped):
    """A region's memory, read-only: no slot, no lock, nobody waits for it.  A forked child has it as its parent does."""

    cdef observer_t observer

    cdef open(self, int fd):
        """Of a descriptor of the region; a read-only description of it is opened, and goes with the object."""
        cdef const char *field = NULL
        cdef int own = read_only(fd)
        cdef int rc = ps_observe(self.seen(), own, &field)
        if rc:
            os.close(own)
            raise_opening(rc, "observe", fd, field)
        self.region = self.seen()
        self.readonly = True
        hold_arrays()

    cdef ps_region *seen(self) noexcept nogil:
        return <ps_region *>&self.observer

    def _close(self):
        if self.is_used():
            raise BufferError(
                "cannot close: memoryviews or arrays of the region exist, or another thread is using it; release them "
                "first")
        self.let_go()
        self.region = NULL
        ps_observe_shut(self.seen())

    def __dealloc__(self):
        # As a Handle's; where `open` failed nothing is left.
        if self.readonly and not Py_IsFinalizing():
            ps_observe_end(self.seen())

    def _participants(self):
        cdef ps_seen_slot one
        cdef uint32_t index = 0
        cdef int rc
        found = []
        self.enter("participants")
        try:
            if ps_fd(self.region) < 0:  # nobody's death could be seen
                raise_blind("participants")
            while True:
                rc = ps_observe_slot(self.region, index, &one)
                if rc < 0:
                    return found
                if rc and one.live:
                    found.append((one.pid, one.tid, one.applied, bool(one.alive),
                                  "uffd" if one.capabilities & PS_CAN_UFFD else "mprotect",
                                  bool(one.flags & PS_SLOT_FENCED)))
                index += 1
        finally:
            self.leave()

    def _protection(self, uint64_t page):
        self.enter("protection")
        try:
            return ps_observe_protection(self.region, page)
        finally:
            self.leave()

    def _runs(self, uint64_t pages):
        self.enter("protections")
        try:
            return self.layer(PS_SEC_CUR, 0)
        finally:
            self.leave()

    def _read(self, uint64_t offset, uint64_t length):
        cdef int rc
        cdef char *to
        self.enter("read")
        try:
            data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
            to = PyBytes_AS_STRING(data)
            with nogil:
                rc = ps_observe_read(self.region, offset, to, length)
            if rc == -errno.EBADF:
                raise_blind("read")
            if rc:
                raise_code(rc, "read")
            return data
        finally:
            self.leave()

    cdef list layer(self, int kind, uint32_t area):
        """Runs (first page, pages, value), ascending, that cover the region."""
        cdef uint64_t page = 0, run, value
        found = []
        while page < self.observer.shape.pages:
            with nogil:
                run = ps_observe_run(self.seen(), <layer_t>kind, area, page, &value)
            if found and found[-1][2] == value:
                found[-1] = (found[-1][0], found[-1][1] + run, value)
            else:
                found.append((page, run, value))
            page += run
        return found


@cython.final
cdef class Observer(Observed):
    """The same, made from a descriptor, with what is in its control segment."""

    def __cinit__(self, int fd):
        self.open(fd)

    # -- What it is --

    def name(self):
        """As it was created, or None."""
        return ps_name(self.seen()).decode() or None

    def size(self):
        """Bytes."""
        return ps_size(self.seen())

    def pages(self):
        """Of the data, of 4 KiB each."""
        return self.observer.shape.pages

    def page_size(self):
        """Bytes of which ranges are whole multiples."""
        return self.unit()

    def file(self):
        """(device, inode, where the data begin) of the memory."""
        return self.observer.memory.device, self.observer.memory.inode, self.observer.shape.control_size

    # -- Changes --

    def generation(self):
        """The latest that is published."""
        return ps_generation(self.seen())

    def wait(self, uint64_t generation, int64_t deadline):
        """Sleeps until the generation is another one, at most until then; it may wake for nothing, or miss it."""
        with nogil:
            ps_observe_wait(self.seen(), generation, deadline)
        PyErr_CheckSignals()

    def change(self, uint64_t generation):
        """(kind, first page, pages, protection, author, begun, done, slowest); None where the ring has it no more."""
        cdef ps_seen_change one
        if not ps_observe_change(self.seen(), generation, &one):
            return None
        return one.kind, one.first, one.count, one.prot, one.author, one.time, one.done, one.slowest

    def over(self, uint64_t generation):
        """Everybody has this change, or its caller has given up on who is silent."""
        return bool(ps_observe_over(self.seen(), generation))

    def under_way(self):
        """(first page, pages) of the change that is not over, or None."""
        cdef uint64_t first, count
        return (first, count) if ps_observe_open(self.seen(), &first, &count) else None

    # -- Who takes part --

    def slots(self):
        """[(owner word, pid, start time, applied, address of the data, live, alive, here, by uffd, fenced,
        leases, since, waits for, since, takes)]; 0: nobody; since by CLOCK_MONOTONIC, ns"""
        cdef ps_seen_slot one
        cdef uint32_t index = 0
        cdef int rc = 0
        found = []
        while rc >= 0:
            rc = ps_observe_slot(self.seen(), index, &one)
            if rc > 0:
                found.append((one.owner, one.pid, one.start, one.applied, one.data, bool(one.live), bool(one.alive),
                              bool(one.here), bool(one.capabilities & PS_CAN_UFFD), bool(one.flags & PS_SLOT_FENCED),
                              one.leases, one.leased_since, one.waits_for, one.waits_since, one.takes))
            index += 1
        return found

    # -- Who holds what --

    def takes(self):
        """Leases ever taken."""
        return ps_observe_takes(self.seen())

    def writer(self):
        """Owner word of who has the writer lock; 0: nobody."""
        return ps_observe_writer(self.seen())

    def locks(self):
        """[(index, owner word, since)] of the user locks that are held; since by CLOCK_MONOTONIC, ns, 0: unknown."""
        cdef ps_seen_lock one
        cdef uint32_t index = 0
        found = []
        while ps_observe_lock(self.seen(), index, &one):
            found.append((one.index, one.owner, one.since))
            index = one.index + 1
        return found

    def closers(self):
        """[(owner word, first page, pages, of a snapshot)] of what waits for leases, or keeps them away."""
        cdef ps_seen_closer one
        cdef uint32_t index
        found = []
        for index in range(PS_CLOSERS):
            if ps_observe_closer(self.seen(), index, &one):
                found.append((one.owner, one.first, one.count, bool(one.drain)))
        return found

    # -- Pages: runs of (first page, pages, value), ascending, that cover the region --

    def protections(self):
        """Of the map."""
        return self.layer(PS_SEC_CUR, 0)

    def leases(self):
        """Owner words; 0: nobody's."""
        return self.layer(PS_SEC_LEASE, 0)

    def kept(self):
        """Protections from before the freeze that is in force."""
        return self.layer(PS_SEC_KEPT, 0)

    def saved(self, uint32_t area):
        """Of a snapshot: 0: not yet, 1: written while it was being prepared, 2: saved."""
        if area >= self.observer.shape.areas:
            raise IndexError(f"area {area}")
        return self.layer(PS_SEC_STATE, area)

    # -- The whole --

    def freeze(self):
        """(owner word of the freezer, the generation that everybody had before); None: there is none."""
        cdef uint64_t frozen
        cdef uint32_t owner = ps_observe_freezer(self.seen(), &frozen)
        return (owner, frozen - 1) if owner and frozen else None

    def snapshots(self):
        """[(area, state, generation)] of those that there are."""
        cdef uint32_t area, word
        cdef uint64_t generation
        found = []
        for area in range(self.observer.shape.areas):
            word = ps_observe_snapshot(self.seen(), area, &generation)
            if 0 < word & PS_SNAPSHOT_MASK < len(SNAPSHOT_STATES):
                found.append((area, SNAPSHOT_STATES[word & PS_SNAPSHOT_MASK], generation))
        return found

    def protected(self):
        """Page tables may be stricter than the map, for snapshots that are alive or were until a moment ago."""
        return bool(ps_observe_protected(self.seen()))


def observe(cls, int fd):
    """An observer: an instance of `cls`, which derives from Observed."""
    cdef Observed observer = cls.__new__(cls)
    observer.open(fd)
    return observer


def marks(int pagemap, uint64_t page, uint64_t pages):
    """[(pages, marked)] of a process's address space: what userfaultfd(2) protects there; OSError (ESRCH: it is gone)."""
    cdef uint64_t end = page + pages
    cdef int64_t run
    cdef flag marked = 0
    found = []
    while page < end:
        with nogil:
            run = ps_observe_marks(pagemap, page, end, &marked)
        if run < 0:
            raise OSError(-run, os.strerror(-run))
        found.append((run, bool(marked)))
        page += run
    return found
