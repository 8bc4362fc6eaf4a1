"""participant.pxi: part of _core.pyx: this process as a participant: its life, protections, policies, and data by accessors that cannot crash.

Not here: what is held (handle.pxi), joining (creation.pxi).
Invariant: the handle is not given back while a thread is inside a call (`calls`), or something is held (`holds`).
"""


cdef class Participant(Mapped):
    """One participation of this process in one region; the base of Region."""

    cdef ps_region *left     # closed: the address range stays reserved until we die
    cdef Py_ssize_t holds    # leases and locks held
    cdef list sweepers       # threads that clear away after a snapshot; they last no second
    cdef set queue           # calls of event loops that wait (_async.pxi), or None
    cdef object itself       # a weak reference: its snapshots', which the garbage collector does not clear with them

    cdef enter(self, str doing):
        """A participant, too."""
        cdef ps_outcome outcome
        cdef int rc
        self.come(doing)
        rc = self.ready(&outcome)
        if rc:
            self.leave()
            if rc == PS_ETIMEOUT:
                raise_timeout(&outcome, f"{doing}: rejoining after fork")
            raise_code(rc, doing, self.corrupt_field())

    cdef int ready(self, ps_outcome *outcome) except? -1:
        """As ps_ready, serving signals; when a handler raises we have come in vain."""
        cdef int rc = PS_ESIGNAL
        try:
            while rc == PS_ESIGNAL:
                with nogil:
                    rc = ps_ready(self.region, outcome)
                if rc == PS_ESIGNAL:
                    PyErr_CheckSignals()
                    if self.region is NULL:  # a child that a handler forked may have closed it
                        return PS_ECLOSED
        except BaseException:
            self.leave()
            raise
        return rc

    cdef come(self, str doing):
        """As `enter`, without becoming a participant: does not wait."""
        Mapped.enter(self, doing)
        if violation_of_thread().count or ps_quarantined(self.region):
            with nogil:
                ps_quarantine_leave(PS_NEVER)

    cdef void count(self) noexcept:
        if self.forks != ps_forks():
            self.holds = 0
            self.queue = self.sweepers = None
            Mapped.count(self)

    cdef corrupt_field(self):
        cdef const char *field = NULL if self.region is NULL else ps_corrupt_field(self.region)
        return None if field is NULL else field.decode()

    cdef fill_lease(self, Py_buffer *buffer, int flags, Lease lease):
        cdef void *at = ps_window(self.region) if lease.pages.window else ps_address(self.region)
        self.fill_with(buffer, flags, <char *>at + lease.pages.first * PS_PAGE_SIZE, lease.length)

    # -- Life --

    cdef check_unused(self):
        if self.is_used() or self.holds > 0:
            raise BufferError(
                "cannot close: memoryviews or arrays of the region exist, a lease or a lock is held, it is frozen by us, "
                "or another thread or task is using it; release them first")

    cdef bint is_swept(self) except -1:
        """A thread that still runs clears away after a snapshot; one that was ended alone does not."""
        return self.sweepers is not None and any([ps_sys_thread_exists(tid) for tid in self.sweepers])

    def _close(self):
        self.check_unused()
        while self.is_swept():
            PyErr_CheckSignals()
            with nogil:
                ps_sys_pause()
            if self.region is NULL:  # another thread, or a handler, has closed it meanwhile
                return
            self.check_unused()  # or has begun to use it
        self.let_go()
        self.left, self.region = self.region, NULL
        if not ps_close_begin(self.left):
            with nogil:
                ps_close(self.left)

    def __dealloc__(self):
        # At interpreter exit daemon threads may still store: the kernel cleans up after all of them.  No global of
        # this module can be relied on by then.
        if Py_IsFinalizing():
            return
        if self.region is not NULL:
            self.left = self.region
            if not ps_close_begin(self.left):
                ps_close(self.left)
        if self.left is not NULL:
            ps_release(self.left)

    def _let_go_of_name(self):
        """At the end of the process: the name's entry is held by others, or by nobody."""
        Mapped.enter(self, "end")
        with nogil:
            ps_name_let_go(self.region)
        self.leave()

    # -- What it is --

    def _is_forsaken(self):
        """Open, though nobody can close it any more; asked when the object goes."""
        return self.region is not NULL and not Py_IsFinalizing()

    def __del__(self):
        # No code of Python runs where nothing was opened: it would handle the signals that are pending, and an exception
        # of theirs would be lost here.
        if self._is_forsaken():
            self._forsake()

    def _bring_in(self, str doing):
        """Memory that is to be locked is, as far as it is there."""
        cdef uint64_t page = 0
        cdef int rc = 1
        self.enter(doing)
        try:
            while rc > 0:
                PyErr_CheckSignals()
                with nogil:
                    rc = ps_bring_in(self.region, &page)
            if rc:
                raise_code(rc, doing)
        finally:
            self.leave()

    def _engine(self):
        self.enter("engine")
        try:
            return "uffd" if engine_of(self.region) == PS_ENGINE_UFFD else "mprotect"
        finally:
            self.leave()

    def _participants(self):
        """[(pid, tid, applied, alive, engine, fenced)] of the live slots."""
        cdef ps_participant one
        cdef uint32_t slot = 0
        cdef int rc
        found = []
        self.enter("participants")
        try:
            while True:
                with nogil:
                    rc = look_at_slot(self.region, slot, &one)
                if rc < 0:
                    return found
                if rc:
                    found.append((one.pid, one.tid, one.applied, bool(one.alive),
                                  "uffd" if one.capabilities & PS_CAN_UFFD else "mprotect",
                                  bool(one.flags & PS_SLOT_FENCED)))
                slot += 1
        finally:
            self.leave()

    # -- Protection --

    def _change(self, offset, length, prot, timeout, size):
        cdef ps_outcome outcome
        cdef int rc
        offset, length = integer(offset, "offset"), integer(length, "length")
        check_pages(offset, length, size, self.unit())
        cdef uint64_t first = offset, bytes = length
        cdef uint32_t bits = protection_bits(prot)
        cdef int64_t deadline = deadline_of(timeout)
        self.enter("mprotect")
        try:
            with nogil:
                rc = ps_change(self.region, first, bytes, bits, deadline, &outcome)
            while rc == PS_ESIGNAL:
                # Whatever was published is committed, and nothing is locked: the handler may do as it likes.
                self.serve_signals("mprotect")
                with nogil:
                    if outcome.generation:
                        rc = ps_await(self.region, outcome.generation, deadline, &outcome)
                    else:
                        rc = ps_change(self.region, first, bytes, bits, deadline, &outcome)
            if outcome.error:
                raise_undone(&outcome, "mprotect")
            if rc == PS_ETIMEOUT:
                raise_timeout(&outcome, "mprotect")
            if rc:
                raise_code(rc, "mprotect", self.corrupt_field())
            return outcome.generation
        finally:
            self.leave()

    def _protection(self, uint64_t page):
        self.enter("protection")
        try:
            return ps_protection(self.region, page)
        finally:
            self.leave()

    def _runs(self, uint64_t pages):
        """[(first page, pages, protection)]"""
        cdef uint64_t page = 0, run
        cdef uint32_t prot
        runs = []
        self.enter("protections")
        try:
            while page < pages:
                with nogil:
                    run = ps_run(self.region, page, pages, &prot)
                if runs and runs[-1][2] == prot:
                    runs[-1] = (runs[-1][0], runs[-1][1] + run, prot)
                else:
                    runs.append((page, run, prot))
                page += run
            return runs
        finally:
            self.leave()

    # -- Policies --

    def _policy(self, int policy):
        """The one in force in this process, after setting it where `policy` is one."""
        self.enter("on_violation")
        if policy >= 0:
            if policy != PS_DIE:
                expect_violations()
            ps_set_policy(self.region, <policy_t>policy)
        policy = ps_policy_of(self.region)
        self.leave()
        return policy

    def guard(self):
        """A context manager at whose end this thread is told, by a ProtectionError, of forbidden accesses in it.

        ``with region.guard():`` is exact for whatever loads or stores: ctypes, torch, any C code. Where the policy is
        "raise" an error comes without it too, but, except for memoryviews, arrays and calls, some instructions late.
        An exception that leaves the block stays, with the ProtectionError as its context.

        Where the policy is "wait" other threads run also while C code in the block waits that relies on having the
        interpreter: nothing in it may use an object that other threads change meanwhile, as a bytearray that grows.
        """
        return Guard.__new__(Guard)
    cdef sweep(self):
        """After a snapshot: nothing waits for it, and close() waits for us."""
        cdef int tid = ps_sys_gettid()
        cdef list sweepers = []  # made before the looks: in the garbage collector others run, who may close the region
        self.count()
        if not self.is_ready():
            return
        if self.sweepers is None:
            self.sweepers = sweepers
        sweepers = self.sweepers
        sweepers.append(tid)
        with nogil:
            ps_snapshot_sweep(self.region)
        sweepers.remove(tid)

    cdef bint is_ready(self) except -1:
        """A participant, at a look; if not, `enter` tries to make it one, or says why it cannot be."""
        return self.region is not NULL and ps_ready_now(self.region) == 1

    cdef serve_signals(self, str doing):
        serve_amid_wait(self, doing)

    # -- Data --

    cdef refused(self, int rc, ps_refusal *refusal, str doing):
        if rc != PS_EREFUSED:
            raise_code(rc, doing)
        error = _errors.ProtectionError.__new__(_errors.ProtectionError)
        explain(error, doing, ps_name(self.region), refusal.page * PAGE_SIZE, self.unit(), refusal.required,
                refusal.actual, refusal.author)
        raise error

    def _read(self, uint64_t offset, uint64_t length):
        cdef ps_refusal refusal
        cdef int rc
        cdef char *to
        self.enter("read")
        try:
            data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
            to = PyBytes_AS_STRING(data)
            if length < LARGE:
                rc = ps_read(self.region, offset, to, length, &refusal)
            else:
                with nogil:
                    rc = ps_read(self.region, offset, to, length, &refusal)
            if rc:
                self.refused(rc, &refusal, "read")
            return data
        finally:
            self.leave()

    def _data(self):
        """Ascending runs (offset, length) of whole pages that are no holes."""
        cdef uint64_t page = 0, count = 0
        cdef int rc
        found = []
        self.enter("read")
        try:
            while True:
                rc = ps_data(self.region, &page, &count)
                if rc:
                    raise_code(rc, "read")
                if not count:
                    return found
                found.append((page * PS_PAGE_SIZE, count * PS_PAGE_SIZE))
                page += count
        finally:
            self.leave()

    def _write(self, uint64_t offset, data, uint64_t size):
        cdef ps_refusal refusal
        cdef Py_buffer source
        cdef int rc
        PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
        try:
            if offset + <uint64_t>source.len > size:
                raise ValueError(f"write of {source.len} bytes at offset {offset} ends behind the region's {size} bytes")
            self.enter("write")
            try:
                if source.len < LARGE:
                    rc = ps_write(self.region, offset, source.buf, <uint64_t>source.len, &refusal)
                else:
                    with nogil:
                        rc = ps_write(self.region, offset, source.buf, <uint64_t>source.len, &refusal)
                if rc:
                    self.refused(rc, &refusal, "write")
            finally:
                self.leave()
        finally:
            PyBuffer_Release(&source)


cdef serve_amid_wait(Participant again, str doing):
    """Handlers of signals run, which may wait themselves; the wait that they interrupt goes on as having begun when it did.

    A handler may have forked: with the handle `again` a child becomes a participant once more.
    """
    cdef ps_patience before = ps_process_patience()[0]
    try:
        PyErr_CheckSignals()
        if again is not None:
            again.enter(doing)
            again.leave()
    except BaseException:
        ps_process_patience().owner = 0  # the wait is over
        raise
    ps_process_patience()[0] = before
