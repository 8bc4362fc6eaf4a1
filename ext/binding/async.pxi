"""async.pxi: part of _core.pyx: calls that wait in the place of an event loop (ext/operations/waiter.c).

Lives here: Call, which is a lease, a lock, a change, or the wait for somebody's change, and Mailbox, in which a loop
finds those that are over.  What a loop does with them is _async.py's.
Invariants
 1. From `begin` until its mailbox gives it out a call has a reference to itself, and to all that the waiter touches.
 2. Nothing here waits, but for Mailbox.settle.
 3. A forked child has none of its parent's calls: theirs are not begun, over, or cancelled there.
"""

@cython.final
cdef class Mailbox:
    """Where a loop finds its calls that are over; it becomes readable when there are any."""

    cdef ps_mailbox box
    cdef uint32_t forks

    def __cinit__(self):
        self.box.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.forks = ps_forks()

    def __dealloc__(self):
        if self.box.fd >= 0 and not Py_IsFinalizing():
            os.close(self.box.fd)

    def fileno(self):
        return self.box.fd

    def take(self):
        """Calls that are over, in the order in which they were."""
        cdef ps_call *found
        cdef Call call
        taken = []
        try:
            os.eventfd_read(self.box.fd)
        except BlockingIOError:  # looked at without having been told
            pass
        found = ps_mailbox_take(&self.box)
        while found is not NULL:
            call = <Call>found.owner
            found = found.next
            call.collect()
            taken.append(call)
        taken.reverse()
        return taken

    def settle(self):
        """Blocks until all that were begun are over: milliseconds, where they are cancelled."""
        with nogil:
            ps_mailbox_settle(&self.box)

    def close(self):
        """Its descriptor goes, when the waiter is done with it; nothing is under way any more."""
        if self.forks == ps_forks():
            self.settle()
        os.close(self.box.fd)
        self.box.fd = -1


@cython.final
cdef class Call:
    """A call of the core that does not wait; made by the functions below."""

    cdef ps_call call
    cdef Handle handle      # of a lease, a lock, a change
    cdef Held held          # what a lease or a lock gets
    cdef Observer observer  # of a watch
    cdef Mailbox box
    cdef str doing
    cdef uint32_t forks
    cdef bint over

    def __init__(self):
        raise TypeError("made by call_lease, call_lock, call_change and call_watch")

    @property
    def done(self):
        """It is over, or another process's."""
        return self.over or self.forks != ps_forks()

    cdef bint is_preceded(self) except -1:
        """Is somebody waiting for what it wants already?"""
        cdef Call other
        for other in self.handle.queue or ():
            if ps_call_conflict(&other.call, &self.call):
                return True
        return False

    def begin(self, Mailbox box not None):
        """Goes to the waiter. The lease or lock that it gets belongs to the calling thread."""
        cdef int rc
        cdef set queue = set()  # made before the look: the garbage collector may let another thread come in between
        if self.handle is not None:
            self.handle.come(self.doing)
            if self.handle.queue is None:
                self.handle.queue = queue
            self.handle.queue.add(self)
        self.box, self.call.box, self.call.owner = box, &box.box, <void *>self
        Py_INCREF(self)
        rc = ps_call_begin(&self.call)
        if rc:
            self.collect()
            raise_code(rc, self.doing)

    cdef collect(self):
        """The waiter has no more to do with it."""
        self.over = True
        if self.handle is not None:
            self.handle.leave()
            self.handle.queue.discard(self)
            if not self.call.rc and self.held is not None:
                self.got()
        Py_DECREF(self)

    cdef got(self):
        if self.call.kind == PS_CALL_LEASE:
            self.held.pages = self.call.lease
        self.held.left = self.call.abandoned
        self.held.untold = True  # whoever asked may be gone
        self.held.begin(self.handle)

    def cancel(self):
        """It is over soon, and has got nothing, or just all of it; a change that is published is made."""
        if not self.done:
            ps_call_cancel(&self.call)

    def drop(self):
        """Gives back what it has got."""
        if self.held is not None:
            self.held.release()

    def result(self):
        """What it came to: a Lease, a Lock, a generation, or the exception that is told as for the call that blocks."""
        cdef int rc = self.call.rc
        if self.call.kind == PS_CALL_CHANGE:
            if self.call.outcome.error:
                raise_undone(&self.call.outcome, self.doing)
            if rc == PS_ETIMEOUT:
                raise_timeout(&self.call.outcome, self.doing)
        if rc == PS_ETIMEOUT:
            raise_held(&self.call.outcome, self.doing)
        if rc and self.handle is not None and self.handle.region is NULL:  # since it was over
            rc = PS_ECLOSED
        if rc == PS_EREFUSED:
            self.handle.refused(rc, &self.call.refusal, self.doing)
        if rc:
            raise_code(rc, self.doing, self.handle.corrupt_field() if rc == PS_ECORRUPT else None)
        if self.held is None:
            return self.call.outcome.generation
        self.held.untold = False
        return self.held


cdef Call new_call(call_t kind, Handle handle, str doing, uint64_t first, uint64_t count, timeout):
    cdef Call call = Call.__new__(Call)
    if handle is not None:
        if handle.region is NULL:
            raise_code(PS_ECLOSED, doing)
        handle.count()
        call.call.region = handle.region
    call.handle, call.doing, call.forks = handle, doing, ps_forks()
    call.call.kind, call.call.first, call.call.count = kind, first, count
    call.call.deadline = deadline_of(timeout)
    return call


def call_lease(Handle handle not None, offset, length, timeout, bint window, bint passes):
    """A lease; `done` where it could be had at once. passes: whoever wants it has a lease already."""
    cdef ps_outcome outcome
    cdef ps_refusal refusal
    cdef Lease lease = handle.wanted_lease(offset, length, timeout, window)
    cdef Call call = new_call(PS_CALL_LEASE, handle, "lease", lease.pages.first, lease.pages.count, timeout)
    call.held, call.call.lease, call.call.passes = lease, lease.pages, passes
    if lease.pages.count <= FEW and handle.is_ready() and not call.is_preceded():
        if not ps_lease_try(handle.region, &call.call.lease, passes, &outcome, &refusal):
            call.got()
            call.over = True
    return call


def call_lock(Handle handle not None, index, timeout):
    """A lock; `done` where it could be had at once."""
    cdef ps_outcome outcome
    cdef Lock lock = handle.wanted_lock(index, timeout)
    cdef Call call = new_call(PS_CALL_LOCK, handle, "lock", lock.index, 1, timeout)
    call.held = lock
    if handle.is_ready() and not call.is_preceded():
        if not ps_user_lock_take(handle.region, lock.index, PS_TRY, &call.call.abandoned, &outcome):
            call.got()
            call.over = True
    return call


def call_change(Handle handle not None, offset, length, prot, timeout):
    """A change of protection."""
    cdef Call call
    if handle.region is NULL:
        raise_code(PS_ECLOSED, "mprotect")
    offset, length = integer(offset, "offset"), integer(length, "length")
    check_pages(offset, length, ps_size(handle.region), handle.unit())
    call = new_call(PS_CALL_CHANGE, handle, "mprotect", offset, length, timeout)
    call.call.prot = protection_bits(prot)
    return call


def call_watch(Observer observer not None, uint64_t generation):
    """The wait until the change after this one is over, or the ring has it no more."""
    cdef Call call = new_call(PS_CALL_WATCH, None, "changes", 0, 0, None)
    call.observer, call.call.region, call.call.generation = observer, observer.seen(), generation
    return call
