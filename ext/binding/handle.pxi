"""handle.pxi: part of _core.pyx: what a participant holds, for how long, and system calls that store under a lease.

Lives here: taking leases, locks and the freeze, waiting for them, and readinto and recv_into.
Not here: the objects that are held (held.pxi).
"""


cdef class Handle(Participant):
    """A participant, and all that it can hold: what Region derives from."""

    # -- Leases and locks --

    def lease(self, offset, length, *, timeout=DEFAULT, window=False):
        """This process alone may write whole pages, given by offset and length in bytes, until the lease is released.

        Over pages that are READ for everybody; they stay so for all others. ``with region.lease(...) as lease:`` writes
        through ``lease.view`` and releases at the end. Over pages that are READ_WRITE a lease keeps other leases and
        changes of their protection away, and no stores. Whoever else wants one of the pages, in whatever process or
        thread, waits for its end; so does ``mprotect`` of them. Costs the same however many processes participate.

        Args:
            window: the view is of a second mapping of the region in this process, which is always writable, so a lease
                costs no change of page tables, and a hundredth of the time. The price: a store through the view that
                runs past the leased pages is not caught, nor is one through an array or a slice that is left over when
                the lease has ended. A stray store to the pages at the region's own address still is.

        Raises:
            ProtectionError: a page is neither READ nor writable. Nothing is held.
            PropagationTimeout: somebody (``pids``) held a page, or was changing it, for ``timeout`` seconds.
            ShareError: this thread holds a lease on one of the pages already.
            ValueError: a range that is not page aligned or not inside.
            OSError: the page tables cannot be changed (ENOMEM: the limit of mappings, vm.max_map_count).
            KeyboardInterrupt: after Ctrl-C; nothing is held.
            RegionClosed, CorruptRegion.

        A holder that dies leaves the pages to the next one, whose lease is ``abandoned``. A forked child holds nothing
        of what its parent does. Who waits holds nothing, so two ranges cannot block each other for ever, and who is
        stopped while it waits is overtaken after 0.2 s. A lease that has given way to a change, a freeze or a snapshot
        comes before those that are asked for after that. A thread that has one gets others while these wait for its end.
        """
        cdef Lease lease = self.wanted_lease(offset, length, timeout, window)
        self.take_lease(lease, timeout, "lease")
        lease.begin(self)
        return lease

    cdef Lease wanted_lease(self, offset, length, timeout, bint window):
        """Not taken yet; a wrong argument raises."""
        cdef Lease lease = Lease.__new__(Lease)
        if self.region is NULL:
            raise_code(PS_ECLOSED, "lease")
        if type(offset) is not int or type(length) is not int:
            offset, length = integer(offset, "offset"), integer(length, "length")
        cdef uint64_t page = ps_page_size(self.region)
        check_pages(offset, length, ps_size(self.region), page)
        if timeout is not DEFAULT:
            deadline_of(timeout)
        lease.pages.first = <uint64_t>offset // PS_PAGE_SIZE
        lease.pages.count = ((<uint64_t>length + page - 1) & ~(page - 1)) // PS_PAGE_SIZE
        lease.pages.window = window
        lease.length = length
        return lease

    cdef take_lease(self, Lease lease, timeout, str doing):
        cdef ps_outcome outcome
        cdef ps_refusal refusal
        cdef int rc = -1
        cdef int64_t deadline
        if lease.pages.count <= FEW and self.is_ready():
            self.count()
            rc = ps_lease_take(self.region, &lease.pages, PS_TRY, &outcome, &refusal)
            if not rc:
                return
        deadline = deadline_of(timeout)
        self.enter(doing)
        try:
            while True:
                with nogil:
                    rc = ps_lease_take(self.region, &lease.pages, deadline, &outcome, &refusal)
                if rc != PS_ESIGNAL:
                    break
                self.serve_signals(doing)  # nothing is held
            if rc == PS_ETIMEOUT:
                raise_held(&outcome, doing)
            if rc == PS_EREFUSED:
                self.refused(rc, &refusal, doing)
            if rc:
                raise_code(rc, doing, self.corrupt_field())
        finally:
            self.leave()

    def lock(self, index, *, timeout=DEFAULT):
        """This thread alone holds lock ``index``, of the region's 1,024, until it is released.

        Mutual exclusion between processes, their threads, and pid namespaces, which no death can block:
        ``with region.lock(3) as lock:``. What it protects is up to the program. Not recursive.

        Raises:
            PropagationTimeout: somebody (``pids``) held it for ``timeout`` seconds.
            ShareError: this thread holds it already.
            ValueError: index is not 0 to 1,023.
            KeyboardInterrupt: after Ctrl-C; it is not held.
            RegionClosed, CorruptRegion.

        A holder that dies leaves it to the next one, whose lock is ``abandoned``: what it protects may be half done. A
        forked child does not hold what its parent holds. Who waits first is first; who is stopped while it waits is
        overtaken after 0.2 s.
        """
        cdef Lock lock = self.wanted_lock(index, timeout)
        self.take_lock(lock, timeout)
        lock.begin(self)
        return lock

    cdef Lock wanted_lock(self, index, timeout):
        """As wanted_lease."""
        cdef Lock lock = Lock.__new__(Lock)
        number = index if type(index) is int else integer(index, "index")
        if not 0 <= number < PS_LOCKS:
            raise ValueError(f"index must be 0 to {PS_LOCKS - 1}, not {number}")
        if timeout is not DEFAULT:
            deadline_of(timeout)
        lock.index = number
        return lock

    cdef take_lock(self, Lock lock, timeout):
        cdef ps_outcome outcome
        cdef int rc
        cdef int64_t deadline
        if self.is_ready():
            self.count()
            rc = ps_user_lock_take(self.region, lock.index, PS_TRY, &lock.left, &outcome)
            if not rc:
                return
        deadline = deadline_of(timeout)
        self.enter("lock")
        try:
            while True:
                with nogil:
                    rc = ps_user_lock_take(self.region, lock.index, deadline, &lock.left, &outcome)
                if rc != PS_ESIGNAL:
                    break
                self.serve_signals("lock")  # it is not held
            if rc == PS_ETIMEOUT:
                raise_held(&outcome, "lock")
            if rc == PS_ENESTED:
                raise _errors.ShareError(f"lock: this thread holds lock {lock.index} already; locks are not recursive")
            if rc:
                raise_code(rc, "lock", self.corrupt_field())
        finally:
            self.leave()

    # -- Freezing --

    def frozen(self, *, timeout=DEFAULT):
        """Everything is READ for everybody, until it is released; then it is again exactly what it was.

        A consistent point in time of the memory of all processes: ``with region.frozen():`` what is read belongs
        together. Pages that are NONE can be read too, those that are EXEC cannot be executed; ``protections()`` says
        READ. Leases end first, and none begins, but for who has one already; whoever wants one, or calls ``mprotect``,
        or freezes too, in whatever process or thread, waits for the end. A store is a violation, by each participant's
        policy.

        Raises:
            PropagationTimeout: somebody (``pids``) held a lease or the region's lock, had it frozen, or was silent for
                ``timeout`` seconds. Nothing is frozen.
            ShareError: this thread holds a lease, or has frozen the region already. Nothing is frozen.
            OSError: a participant could not apply it; it was undone everywhere.
            KeyboardInterrupt: after Ctrl-C; nothing is frozen.
            RegionClosed, CorruptRegion.

        If the freezer dies, whoever notices first thaws: a caller, a waiter, or the thread whose store is refused. A
        forked child has not frozen what its parent has.
        """
        cdef Frozen frozen = Frozen.__new__(Frozen)
        cdef int64_t deadline = deadline_of(timeout)
        self.enter("frozen")
        try:
            self.freeze(frozen, deadline)
        finally:
            self.leave()
        return frozen

    cdef freeze(self, Frozen frozen, int64_t deadline):
        cdef ps_outcome outcome
        cdef int rc
        while True:
            with nogil:
                rc = ps_freeze(self.region, deadline, &outcome)
            if rc != PS_ESIGNAL or outcome.generation:
                break
            self.serve_signals("frozen")  # nothing is frozen
        if not rc or rc == PS_ESIGNAL:
            self.count()
            frozen.begin(self)
            frozen.at = outcome.generation
            if rc:
                rc = self.await_freeze(frozen, deadline, &outcome)
        if rc == PS_ETIMEOUT:
            raise_held(&outcome, "frozen")
        if outcome.error:
            raise_undone(&outcome, "frozen")
        if rc:
            raise_code(rc, "frozen", self.corrupt_field())

    cdef int await_freeze(self, Frozen frozen, int64_t deadline, ps_outcome *outcome) except? -1:
        """It is held, and somebody has not acknowledged it yet; not held after anything but 0."""
        cdef int rc = PS_ESIGNAL
        try:
            while rc == PS_ESIGNAL:
                self.serve_signals("frozen")
                with nogil:
                    rc = ps_await(self.region, frozen.at, deadline, outcome)
        except BaseException:
            frozen.release()
            raise
        if rc:
            frozen.release()
        return rc

    # -- Data, by system calls that store --

    def _receive(self, int fd, offset, length, int flags, wait, timeout):
        """As readinto and recv_into say. flags: recv's, or -1 to read; wait: seconds for data to come, or None."""
        cdef uint64_t first = offset // PS_PAGE_SIZE, count = (offset + length - 1) // PS_PAGE_SIZE + 1 - first
        cdef Py_ssize_t got
        cdef char *to
        doing = "readinto" if flags < 0 else "recv_into"
        until = deadline_of(wait)
        while True:
            if not await_readable(fd, until):
                raise (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) if wait == 0
                       else TimeoutError(f"{doing}: nothing came in {wait} s"))
            deadline = deadline_of(timeout)
            self.enter(doing)
            try:
                lease = self.hold(first, count, deadline, doing)
                try:
                    to = self.way_in(first, deadline, doing) + <uint64_t>offset % PS_PAGE_SIZE
                    got = receive(fd, to, length, flags)
                finally:
                    if lease is not None:
                        lease.release()
            finally:
                self.leave()
            if got >= 0:
                return got
            if got != -errno.EAGAIN and got != -errno.EINTR:  # that is: somebody else was quicker; a signal came
                raise OSError(-got, os.strerror(-got))
            PyErr_CheckSignals()

    def _await_writable(self, offset, length, timeout):
        """The pages are WRITE, at a look; ProtectionError."""
        cdef uint64_t first = offset // PS_PAGE_SIZE, count = (offset + length - 1) // PS_PAGE_SIZE + 1 - first
        self.enter("recv_into")
        try:
            if not ps_own_lease(self.region, first, count):
                self.await_writable(first, count, deadline_of(timeout), "recv_into")
        finally:
            self.leave()

    def _store(self, offset, bytearray data, length, timeout):
        """At most so many bytes of what was received are stored, and taken from it; how many."""
        cdef uint64_t bytes = min(len(data), length), first = offset // PS_PAGE_SIZE
        cdef uint64_t count = (offset + bytes + PS_PAGE_SIZE - 1) // PS_PAGE_SIZE - first
        cdef ps_refusal refusal
        cdef int rc
        if not bytes:
            return 0
        self.enter("recv_into")
        try:
            lease = self.hold(first, count, deadline_of(timeout), "recv_into")
            try:
                rc = ps_write(self.region, offset, PyByteArray_AS_STRING(data), bytes, &refusal)
                if rc:
                    self.refused(rc, &refusal, "recv_into")
                del data[:bytes]
                return bytes
            finally:
                if lease is not None:
                    lease.release()
        finally:
            self.leave()

    cdef hold(self, uint64_t first, uint64_t count, int64_t deadline, str doing):
        """Until the lease that this returns is released nobody changes the pages, which are WRITE; None: we have one."""
        cdef int own = ps_own_lease(self.region, first, count)
        if own == PS_ENESTED:
            raise _errors.ShareError(
                f"{doing}: this thread holds leases on some of these pages, not on all; give it those apart")
        return None if own else self.lease_writable(first, count, deadline, doing)

    cdef char *way_in(self, uint64_t page, int64_t deadline, str doing) except NULL:
        cdef ps_outcome outcome
        cdef ps_refusal refusal
        cdef void *at
        cdef int rc
        with nogil:
            rc = ps_way_in(self.region, page, deadline, &at, &outcome, &refusal)
        if rc == PS_ETIMEOUT:
            raise_held(&outcome, doing)
        if rc:
            self.refused(rc, &refusal, doing)
        return <char *>at

    cdef await_writable(self, uint64_t first, uint64_t count, int64_t deadline, str doing):
        cdef ps_refusal refusal
        cdef int rc = PS_ESIGNAL
        while rc == PS_ESIGNAL:
            with nogil:
                rc = ps_await_writable(self.region, first, count, deadline, &refusal)
            if rc == PS_ESIGNAL:
                self.serve_signals(doing)
        if rc:
            self.refused(rc, &refusal, doing)

    cdef lease_writable(self, uint64_t first, uint64_t count, int64_t deadline, str doing):
        """A lease that keeps pages writable for all; ProtectionError, PropagationTimeout."""
        cdef Lease lease
        cdef ps_refusal refusal
        cdef uint64_t unit = self.unit() // PS_PAGE_SIZE, begin = first // unit * unit  # of leases
        cdef uint64_t end = (first + count + unit - 1) // unit * unit
        while True:
            self.await_writable(first, count, deadline, doing)
            left = None if deadline == INT64_MAX else max(0, deadline - ps_sys_now()) / 1e9
            lease = self.wanted_lease(begin * PAGE_SIZE, (end - begin) * PAGE_SIZE, left, False)
            lease.untold = True
            self.take_lease(lease, left, doing)
            lease.begin(self)
            if not ps_await_writable(self.region, first, count, 0, &refusal):
                return lease
            lease.release()
