# cython: language_level=3, binding=True, embedsignature=True, embedsignature.format=python
# cython: auto_pickle=False, autotestdict=False
"""_core: the binding.

Lives here: the extern block, the handle class with its buffer protocol, what
makes numpy's arrays count as users of it and faulthandler leave our handlers in
place, and the one table from result codes to exceptions.  Not here: protocol (ext/*.c),
checks of arguments that need no C (pyshare/_region.py).
Invariants
 1. Nothing of Python is held while the core waits; what the core did is over,
    and its lock released, before the GIL is taken again.
 2. Whoever uses the memory has a reference to the handle's Memory, and nobody
    else has: their number says whether it may be closed.
"""

cimport cython

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.object cimport PyObject, PyTypeObject, newfunc
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno as libc_errno
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

import enum
import errno
import operator
import os
import resource
import signal
import sys
import warnings

import _pyshare_faulthandler
from pyshare import _errors

cdef extern from "stdbool.h":
    ctypedef unsigned char flag "bool"

cdef extern from "os/os.h" nogil:
    int64_t PS_NEVER
    int64_t ps_sys_now()
    void ps_sys_pause()
    int ps_sys_gettid()
    bint ps_sys_thread_exists(int tid)

cdef extern from "process/process.h":
    enum:
        PS_PAGE_SIZE "PS_PAGE"

cdef extern from "core.h" nogil:
    enum:
        PS_SLOTS_MAX
        PS_NAME_MAX
        PS_REGIONS_MAX
        PS_SLOT_FENCED
        PS_CAN_UFFD
        PS_ECORRUPT
        PS_EFULL
        PS_ECLOSED
        PS_EREFUSED
        PS_ETIMEOUT
        PS_ESIGNAL
        PS_EREGIONS
        PS_ENESTED
        PS_EFROZEN
        PS_LOCKS
    int64_t PS_TRY
    struct ps_region:
        pass
    struct ps_outcome:
        uint64_t generation
        uint32_t failed_pid
        uint32_t error
        uint32_t silent
        uint32_t *pids
    struct ps_patience:
        uint32_t owner
    ps_patience *ps_process_patience()
    struct ps_author:
        bint known
        uint64_t generation
        uint32_t pid
        uint64_t time
    struct ps_refusal:
        uint64_t page
        uint32_t actual
        uint32_t required
        ps_author author
    struct ps_participant:
        uint32_t pid
        uint32_t tid
        uint32_t capabilities
        uint32_t flags
        uint64_t applied
        bint alive
    struct ps_lease:
        uint64_t first
        uint64_t count
        bint window
        bint untold
        bint in_place
        bint abandoned
    ctypedef enum policy_t "enum ps_policy":
        pass
    enum:
        PS_DIE
        PS_RAISE
        PS_WAIT
    policy_t ps_policy_of "ps_policy"(const ps_region *region)
    void ps_set_policy(ps_region *region, policy_t policy)
    struct ps_violation_t "ps_violation":
        uint32_t count
        bint interrupted
        uint64_t offset
        uint64_t page_size
        uint32_t actual
        uint32_t required
        ps_author author
        char region[208]
    enum:
        PS_VIOLATIONS
    struct ps_shm_violation:
        uint64_t time
        uint64_t offset
        uint64_t generation
        uint32_t pid
        uint8_t prot
        uint8_t outcome
        uint8_t known
        char *command
    int ps_violations(ps_region *region, ps_shm_violation *kept)
    bint ps_quarantined(const ps_region *region)
    int ps_quarantine_leave(int64_t deadline)
    int ps_own_lease(const ps_region *region, uint64_t first, uint64_t count)
    int ps_await_writable(ps_region *region, uint64_t first, uint64_t count, int64_t deadline, ps_refusal *refusal)
    int ps_way_in(ps_region *region, uint64_t page, int64_t deadline, void **at, ps_outcome *outcome,
                  ps_refusal *refusal)
    enum:
        PS_REGION_THP
        PS_REGION_LOCK
        PS_REGION_RESERVED
        PS_NODES
        PS_EMEMLOCK
    struct ps_creation:
        uint64_t size
        uint32_t prot
        uint32_t slots
        uint32_t mode
        uint32_t page_size
        uint32_t flags
        policy_t policy
        const char *name
    struct ps_numa:
        int mode
        unsigned long *nodes
    int ps_create(const ps_creation *wanted, int *fd)
    int ps_prefer(int fd, const ps_numa *numa)
    int ps_allocate(int fd, const ps_numa *numa, uint64_t *at)
    uint64_t ps_footprint(const ps_creation *wanted)
    uint64_t ps_page_size(const ps_region *region)
    int ps_bring_in(ps_region *region, uint64_t *page)
    ctypedef enum engine_t "enum ps_engine":
        pass
    enum:
        PS_ENGINE_AUTO
        PS_ENGINE_MPROTECT
        PS_ENGINE_UFFD
    int ps_attach(int fd, int name_fd, engine_t engine, ps_region **region, const char **field)
    int ps_join(ps_region *region, int64_t deadline, ps_outcome *outcome, const char **field)
    void ps_join_abandon(ps_region *region)
    void ps_fault_tracer(bint enabled)
    void ps_tell_also(int fd)
    int ps_close_begin(ps_region *region)
    void ps_close(ps_region *region)
    void ps_release(ps_region *region)
    int ps_ready(ps_region *region, ps_outcome *outcome)
    int ps_ready_now(const ps_region *region)
    uint32_t ps_forks()
    const char *ps_corrupt_field(const ps_region *region)
    int ps_room(int fd, uint64_t *needed, uint64_t *most)
    void *ps_address(const ps_region *region)
    uint64_t ps_size(const ps_region *region)
    uint64_t ps_generation(const ps_region *region)
    uint64_t ps_generation_told(ps_region *region)
    const char *ps_name(const ps_region *region)
    int ps_fd(ps_region *region)
    int ps_change(ps_region *region, uint64_t offset, uint64_t length, uint32_t prot, int64_t deadline,
                  ps_outcome *outcome)
    int ps_await(ps_region *region, uint64_t generation, int64_t deadline, ps_outcome *outcome)
    uint32_t ps_protection(const ps_region *region, uint64_t page)
    uint64_t ps_run(ps_region *region, uint64_t page, uint64_t end, uint32_t *prot)
    int ps_read(ps_region *region, uint64_t offset, void *to, uint64_t length, ps_refusal *refusal)
    int ps_write(ps_region *region, uint64_t offset, const void *data, uint64_t length, ps_refusal *refusal)
    int ps_lease_take(ps_region *region, ps_lease *lease, int64_t deadline, ps_outcome *outcome, ps_refusal *refusal)
    int ps_lease_give(ps_region *region, const ps_lease *lease, int64_t deadline)
    void *ps_window(const ps_region *region)
    int ps_user_lock_take(ps_region *region, uint32_t index, int64_t deadline, flag *abandoned, ps_outcome *outcome)
    void ps_user_lock_give(ps_region *region, uint32_t index, bint untold)
    int ps_freeze(ps_region *region, int64_t deadline, ps_outcome *outcome)
    int ps_thaw(ps_region *region)
    int ps_data(ps_region *region, uint64_t *page, uint64_t *count)
    void ps_snapshot_sweep(ps_region *region)
    int ps_name_format(int name_fd, int region_fd)
    int ps_name_find(int name_fd, int *region_fd)
    int ps_name_leads_to(int name_fd, int region_fd)
    int ps_name_of(int region_fd, char *name, const char **field)
    void ps_name_let_go(ps_region *region)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
    int POLLIN
    int poll(pollfd *watched, unsigned long count, int milliseconds)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    Py_ssize_t recv(int fd, void *to, size_t length, int flags)

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t read(int fd, void *to, size_t length)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    int RWF_NOWAIT
    Py_ssize_t preadv2(int fd, const iovec *into, int count, long offset, int flags)

# What Cython's own declarations hide from us.
cdef extern from *:
    """
    #include "binding/binding.h"
    /* A name that is a type and a function in C; Cython keeps one namespace. */
    static int look_at_slot(struct ps_region *region, uint32_t slot, struct ps_participant *out) {
        return ps_participant(region, slot, out);
    }
    /* Who uses a memoryview: exports of it, and all views that share its buffer; 0 once it is released. */
    static Py_ssize_t users_of_view(PyObject *view) {
        PyMemoryViewObject *self = (PyMemoryViewObject *)view;
        return self->flags & _Py_MEMORYVIEW_RELEASED ? 0 : self->exports + self->mbuf->exports;
    }
    static const struct ps_calls calls = {ps_address, ps_window, ps_lease_take, ps_lease_give,
                                          ps_user_lock_take, ps_user_lock_give};
    /* For ext/bench/_peers.pyx alone: the handle, and how to call the core with it. */
    static PyObject *capsule_of(struct ps_region *region) {
        PyObject *capsule = PyCapsule_New(region, "pyshare.region", NULL);
        if (capsule && PyCapsule_SetContext(capsule, (void *)&calls))
            Py_CLEAR(capsule);
        return capsule;
    }
    #include <sys/stat.h>
    static bool is_file(int fd) {
        struct stat file;
        return !fstat(fd, &file) && S_ISREG(file.st_mode);
    }
    static enum ps_engine engine_of(const struct ps_region *region) {
        return ps_engine(region);
    }
    """
    bint is_file(int fd) nogil
    engine_t engine_of(const ps_region *region) nogil
    int look_at_slot(ps_region *region, uint32_t slot, ps_participant *out) nogil
    Py_ssize_t users_of_view(object view)
    Py_ssize_t Py_REFCNT(PyObject *object)
    bint Py_IsFinalizing() nogil
    object capsule_of(ps_region *region)

include "_violation.pxi"
include "_dlpack.pxi"

PAGE_SIZE = 4096
POLICIES = {"die": PS_DIE, "raise": PS_RAISE, "wait": PS_WAIT}
OUTCOMES = {PS_DIE: "died", PS_RAISE: "raised", PS_WAIT: "waited"}
ENGINES = {"auto": PS_ENGINE_AUTO, "mprotect": PS_ENGINE_MPROTECT, "uffd": PS_ENGINE_UFFD}
THP, LOCK, RESERVED = PS_REGION_THP, PS_REGION_LOCK, PS_REGION_RESERVED
MAX_PARTICIPANTS = PS_SLOTS_MAX
NAME_MAX = PS_NAME_MAX
LARGE = 1 << 16  # bytes from which a copy lets other threads run

cdef enum:
    FEW = 16  # pages that are taken without letting other threads run, where nobody has them


class _Default(enum.Enum):
    DEFAULT = "DEFAULT"

    def __repr__(self):
        return "DEFAULT"


DEFAULT = _Default.DEFAULT
cdef object default_timeout = 5.0


def set_default_timeout(seconds):
    """What ``timeout=DEFAULT`` means from now on in this process: seconds, or None to wait for ever. 5.0 at first."""
    global default_timeout
    deadline_of(seconds)
    default_timeout = seconds


def deadline_of(timeout):
    """A timeout in seconds, None or DEFAULT, as an absolute deadline of the core."""
    if timeout is DEFAULT:
        timeout = default_timeout
    if timeout is None:
        return INT64_MAX
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be seconds or None, not {timeout!r}")
    if not timeout >= 0:  # nor NaN
        raise ValueError(f"timeout must be 0 or more seconds, or None to wait for ever, not {timeout!r}")
    if timeout > 1e9:
        return INT64_MAX
    return ps_sys_now() + int(timeout * 1_000_000_000)


# Arguments: a wrong one raises before anything is changed, with what was given and what was expected.

def index_of(value):
    """The integer; None if it is none, or a bool, which is a mistake wherever a number is expected."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(value, str what):
    number = index_of(value)
    if number is None:
        raise TypeError(f"{what} must be an integer, not {value!r}")
    return number


def protection_bits(prot):
    bits = index_of(prot)
    if bits is None:
        raise TypeError(f"prot must be a Prot or an int of mmap.PROT_* bits, not {prot!r}")
    if bits < 0 or bits > 7:
        raise ValueError(f"prot {prot!r} has unknown bits; expected a combination of READ, WRITE and EXEC, or NONE")
    return bits


cdef check_pages(offset, length, size, uint64_t page):
    """A range of whole pages, or up to the region's end."""
    if offset < 0 or offset % page:
        raise ValueError(f"offset must be a multiple of the page size {page}, not {offset}")
    if length <= 0:
        raise ValueError(f"length must be more than 0 bytes, not {length}")
    end = offset + length
    if end > size and end > (size + page - 1) // page * page:
        raise ValueError(f"the range {offset} to {end} ends behind the region's {size} bytes")
    if end % page and end != size:
        raise ValueError(
            f"a range ends at a multiple of the page size {page} or at the region's size {size}; "
            f"{offset} + {length} = {end} is neither")


cdef raise_code(int code, str doing, str field=None):
    """The one table from results of the core to exceptions."""
    if code == PS_ECLOSED:
        raise _errors.RegionClosed(
            f"{doing}: the region is closed in this process; attach it again by its name or a descriptor")
    if code == PS_ECORRUPT:
        raise _errors.CorruptRegion(
            f"{doing}: not a pyshare region, or a damaged one: its {field} cannot be right", field=field)
    if code == PS_EFULL:
        raise _errors.ParticipantLimit(
            f"{doing}: every slot of the region is taken; create it with a larger max_participants")
    if code == PS_ENESTED:
        raise _errors.ShareError(
            f"{doing}: this thread holds a lease on some of these pages, and would wait for itself; release it first")
    if code == PS_EFROZEN:
        raise _errors.ShareError(
            f"{doing}: this thread has frozen the region itself, and would wait for itself; thaw it first")
    if code == PS_EMEMLOCK:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        raise OSError(errno.ENOMEM if limit else errno.EPERM,
            f"{doing}: the region's memory is to be locked, and this process may lock {limit} bytes in all "
            "(RLIMIT_MEMLOCK; ulimit -l); that has to be more than its data and control segment, and than twice its "
            "data for leases by window, readinto and recv_into")
    if code == -errno.EOWNERDEAD:
        raise OSError(errno.EOWNERDEAD,
            f"{doing}: the native thread that follows changes was ended as it began; a seccomp filter that ends threads "
            "does that, and this one has to let it pass")
    if code == PS_EREGIONS:
        raise OSError(errno.EMFILE, f"{doing}: this process has {PS_REGIONS_MAX} regions open, which is the limit")
    raise OSError(-code, f"{doing}: {os.strerror(-code)}")


cdef raise_opening(int code, str doing, int fd, const char *field):
    """The same, of a region that could not be mapped: there may be too little address space."""
    cdef uint64_t needed = 0, most = 0
    if code == -errno.ENOMEM and not ps_room(fd, &needed, &most):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        takes = f"{doing}: {os.strerror(errno.ENOMEM)}: the region takes {needed} bytes of address space"
        if needed > most:
            raise OSError(errno.ENOMEM, f"{takes}, and one can have {most}: make it smaller, or several of it")
        if limit != resource.RLIM_INFINITY:
            raise OSError(errno.ENOMEM, f"{takes}, up to 11 times its size, and this process may have {limit} in all "
                          "(RLIMIT_AS; ulimit -v): raise the limit, or make the region smaller")
    raise_code(code, doing, None if field is NULL else field.decode())


cdef list pids_of(ps_outcome *outcome):
    cdef uint32_t i
    return sorted({outcome.pids[i] for i in range(outcome.silent)})


cdef raise_undone(ps_outcome *outcome, str doing):
    late = ", ".join(map(str, pids_of(outcome)))
    error = OSError(outcome.error, f"{doing}: pid {outcome.failed_pid} could not apply the change, so it was undone "
                    f"everywhere: {os.strerror(outcome.error)}"
                    + (f"; pid {late} has not acknowledged that in time" if late else ""))
    error.pid = outcome.failed_pid
    raise error


cdef raise_timeout(ps_outcome *outcome, str doing):
    pids = pids_of(outcome)
    who = ", ".join(map(str, pids))
    if outcome.generation:
        message = (f"{doing}: change {outcome.generation} is made, but pid {who} has not acknowledged it in time; "
                   "it applies the change before anything else it acknowledges")
    elif pids:
        message = (f"{doing}: nothing was changed: pid {who} held a lease on these pages or the region's lock, had it "
                   "frozen, or was silent, until the timeout")
    elif doing == "snapshot":
        message = (f"{doing}: it was given up, since a participant could not follow or others waited to store, and begun "
                   "anew, until the timeout")
    else:
        message = (f"{doing}: nothing was changed: pages that a snapshot needs were being saved until the timeout; "
                   "call finish() of the snapshot first")
    raise _errors.PropagationTimeout(message, pids=pids, generation=outcome.generation or None)


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


cdef class Handle(Mapped):
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

    # -- Leases and locks --

    cdef bint is_ready(self) except -1:
        """A participant, at a look; if not, `enter` tries to make it one, or says why it cannot be."""
        return self.region is not NULL and ps_ready_now(self.region) == 1

    cdef serve_signals(self, str doing):
        serve_amid_wait(self, doing)

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


cdef serve_amid_wait(Handle again, str doing):
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


cdef bint await_readable(int fd, int64_t deadline) except -1:
    """Or closed at the other end; False after the deadline.  A signal just before poll() is served within a second."""
    cdef pollfd watched
    cdef int rc, error
    cdef int64_t left
    while True:
        left = max(0, deadline - ps_sys_now()) // 1_000_000
        watched.fd, watched.events = fd, POLLIN
        with nogil:
            rc = poll(&watched, 1, <int>min(left, 1000))
            error = libc_errno
        if rc > 0 or (rc == 0 and not left):
            return rc
        if rc < 0 and error != errno.EINTR:
            raise OSError(error, os.strerror(error))
        PyErr_CheckSignals()


cdef Py_ssize_t receive(int fd, char *to, size_t length, int flags) except? -1:
    """Bytes, or -errno: -EAGAIN where nothing is there any more, without a wait; of a file that cannot say so with one."""
    cdef Py_ssize_t got
    cdef iovec into
    into.iov_base, into.iov_len = to, length
    with nogil:
        if flags >= 0:
            got = recv(fd, to, length, flags | MSG_DONTWAIT)
        else:
            got = preadv2(fd, &into, 1, -1, RWF_NOWAIT)
            if got < 0 and (libc_errno == EOPNOTSUPP or (libc_errno == EAGAIN and is_file(fd))):
                got = read(fd, to, length)
        if got < 0:
            got = -libc_errno
    return got


_LEASED = "held a lease on some of these pages, or kept leases from them"
_IN_THE_WAY = {  # what those did whom a timeout names
    "lease": _LEASED,
    "readinto": _LEASED,
    "recv_into": _LEASED,
    "lock": "held it",
    "frozen": "held a lease or the region's lock, had it frozen, or was silent",
}


cdef raise_held(ps_outcome *outcome, str doing):
    pids = pids_of(outcome)
    who = "nobody held it, but others were before us"
    if pids:
        who = f"pid {', '.join(map(str, pids))} {_IN_THE_WAY[doing]}"
    raise _errors.PropagationTimeout(f"{doing}: {who}, until the timeout; nothing is held", pids=pids)


cdef warn_dropped(str what):
    warnings.warn(f"{what} was dropped while held; release it, or use it in a with statement", ResourceWarning)


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


# numpy.ndarray(buffer=region) would keep the region itself and no buffer, so that close() could not know of the array.
# Whoever asks ndarray for memory of ours gets the same by a memoryview.

cdef newfunc ndarray_new = NULL


cdef bint keeps_itself(thing):
    return isinstance(thing, (Mapped, Lease, Snapshot))


cdef object held_ndarray_new(type cls, PyObject *arguments, PyObject *keywords):
    """ndarray.__new__(cls, shape, dtype, buffer, ...)"""
    held = <tuple>arguments
    if len(held) > 2 and keeps_itself(held[2]):
        held = (*held[:2], memoryview(held[2]), *held[3:])
    if keywords is NULL or not keeps_itself((<dict>keywords).get("buffer")):
        return ndarray_new(cls, <PyObject *>held, keywords)
    named = {**<dict>keywords, "buffer": memoryview((<dict>keywords)["buffer"])}
    return ndarray_new(cls, <PyObject *>held, <PyObject *>named)


cdef hold_arrays():
    """Where numpy is loaded: take the place of ndarray's constructor, also in the types that have inherited it."""
    global ndarray_new
    wrap_numpy()
    if ndarray_new is not NULL:
        return
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    if not isinstance(ndarray, type):
        return
    ndarray_new = (<PyTypeObject *>ndarray).tp_new
    types = [ndarray]
    for cls in types:
        if (<PyTypeObject *>cls).tp_new is ndarray_new:
            (<PyTypeObject *>cls).tp_new = <newfunc>held_ndarray_new
        types.extend(type.__subclasses__(cls))


# A thread that blocks SIGSEGV or SIGBUS dies at its first fault, also at one that is mended, as of a page that a snapshot
# has to have first.  Programs block all that they can for the sake of sigwait(2), which is never for these two.

FAULTS = frozenset((signal.SIGSEGV, signal.SIGBUS))
cdef object pthread_sigmask = None


def _pthread_sigmask(how, mask):
    """pthread_sigmask(how, mask): as signal's, which it replaces; SIGSEGV and SIGBUS are never blocked."""
    return pthread_sigmask(how, mask if how == signal.SIG_UNBLOCK else set(mask) - FAULTS)


cdef hold_signals():
    global pthread_sigmask
    if pthread_sigmask is None:
        pthread_sigmask = signal.pthread_sigmask
        signal.pthread_sigmask = _pthread_sigmask


# faulthandler.enable() puts its handlers above ours, and disable() puts back those that it found: ours are gone with its
# own, if we came later.  Participants that are woken for a change notice; those that are changed from outside would not.

def _faulthandler_changed(int descriptor, bint handlers):
    ps_tell_also(descriptor)
    if handlers:
        ps_fault_tracer(descriptor >= 0)


cdef hold_handlers():
    """Be told when faulthandler is enabled or disabled."""
    if _pyshare_faulthandler.listener is None:
        _pyshare_faulthandler.listener = _faulthandler_changed
        ps_tell_also(_pyshare_faulthandler.descriptor)


include "_snapshot.pxi"


def create(uint64_t size, uint32_t prot, uint32_t slots, uint32_t mode, int policy, str name,
           uint32_t page_size=PS_PAGE_SIZE, uint32_t flags=0):
    """A new region's descriptor; nobody participates yet."""
    cdef bytes text = name.encode()
    cdef ps_creation wanted
    cdef int fd = -1, rc
    wanted.size, wanted.prot, wanted.slots, wanted.mode = size, prot, slots, mode
    wanted.page_size, wanted.flags, wanted.policy, wanted.name = page_size, flags, <policy_t>policy, text
    rc = ps_create(&wanted, &fd)
    if rc:
        raise_code(rc, "create")
    return fd


def footprint(uint64_t size, uint32_t slots, uint32_t page_size, uint32_t flags):
    """Bytes of the control segment and the data of such a region."""
    cdef ps_creation wanted
    wanted.size, wanted.prot, wanted.slots, wanted.mode = size, 0, slots, 0
    wanted.page_size, wanted.flags, wanted.policy, wanted.name = page_size, flags, <policy_t>PS_DIE, b""
    return ps_footprint(&wanted)


cdef ps_numa policy_of(numa) except *:
    cdef ps_numa policy
    cdef int width = 8 * sizeof(unsigned long)
    memset(&policy, 0, sizeof(policy))
    policy.mode, nodes = numa
    for node in nodes:
        if not 0 <= node < PS_NODES:
            raise ValueError(f"a NUMA node is 0 to {PS_NODES - 1}, not {node}")
        policy.nodes[node // width] |= <unsigned long>1 << <int>(node % width)
    return policy


def prefer(int fd, numa):
    """From which NUMA nodes a region's data comes: (mode of mbind(2), nodes)."""
    cdef ps_numa policy = policy_of(numa)
    cdef int rc = ps_prefer(fd, &policy)
    if rc:
        raise_code(rc, "create")


def allocate(int fd, numa, uint64_t at):
    """Up to where a region's memory has been allocated, after some 64 MiB from `at` on; numa as of prefer, or None."""
    cdef ps_numa policy
    cdef const ps_numa *wanted = NULL
    cdef uint64_t end = at + (64 << 20)
    cdef int rc = 1
    if numa is not None:
        policy = policy_of(numa)
        wanted = &policy
    while at < end and (rc == 1 or rc == -EINTR):
        PyErr_CheckSignals()
        with nogil:
            rc = ps_allocate(fd, wanted, &at)
    if rc < 0:
        raise_code(rc, "create")
    return at


cdef int join(ps_region *region, int64_t deadline, ps_outcome *outcome, const char **field) except? -1:
    """As ps_join, serving signals: where a handler raises, nothing is left of the region."""
    cdef uint32_t forks = ps_forks()
    cdef int rc = PS_ESIGNAL
    while True:
        with nogil:
            rc = ps_join(region, deadline, outcome, field)
        if rc != PS_ESIGNAL:
            return rc
        try:
            PyErr_CheckSignals()
        except BaseException:
            if forks == ps_forks():
                with nogil:
                    ps_join_abandon(region)
            raise
        if forks != ps_forks():  # in a handler: a child has no part in what its parent was about to open
            return PS_ECLOSED


def attach(cls, int fd, int name_fd, int engine, int64_t deadline, str doing):
    """A participant: an instance of `cls`, which derives from Handle."""
    cdef ps_outcome outcome
    cdef const char *field = NULL
    cdef ps_region *region
    cdef int rc
    cdef Handle handle = cls.__new__(cls)
    hold_arrays()
    hold_handlers()
    hold_signals()
    with nogil:
        rc = ps_attach(fd, name_fd, <engine_t>engine, &region, &field)
    if not rc:
        rc = join(region, deadline, &outcome, &field)
    if rc == PS_ETIMEOUT:
        raise_timeout(&outcome, doing)
    if rc == -EOPNOTSUPP and engine == PS_ENGINE_UFFD:
        raise OSError(EOPNOTSUPP, f"{doing}: the region has huge pages, which engine 'uffd' cannot change entry by "
                                  "entry; use 'auto' or 'mprotect'")
    if rc:
        raise_opening(rc, doing, fd, field)
    handle.region = region
    if ps_policy_of(region) != PS_DIE:
        expect_violations()
    return handle


def name_format(int name_fd, int region_fd):
    cdef int rc = ps_name_format(name_fd, region_fd)
    if rc:
        raise_code(rc, "create")


def name_find(int name_fd):
    """A descriptor of the region that an entry leads to; -EACCES or -ENOENT if no holder can be reached, or none found."""
    cdef int fd = -1
    cdef int rc = ps_name_find(name_fd, &fd)
    if rc == -errno.EACCES or rc == -errno.ENOENT:
        return rc
    if rc:
        raise_code(rc, "attach", "name's entry")
    return fd


def name_leads_to(int name_fd, int region_fd):
    return ps_name_leads_to(name_fd, region_fd) == 1


def name_of(int region_fd):
    """The name a region was created with, or None; CorruptRegion, OSError."""
    cdef char name[PS_NAME_MAX + 8]
    cdef const char *field = NULL
    cdef int rc = ps_name_of(region_fd, name, &field)
    if rc:
        raise_code(rc, "attach", None if field is NULL else field.decode())
    return name.decode() or None


def _capsule(Handle handle not None):
    """The core's handle, for measurement code, which keeps this one alive; RegionClosed."""
    if handle.region is NULL:
        raise_code(PS_ECLOSED, "measure")
    return capsule_of(handle.region)


include "_observe.pxi"
include "_async.pxi"
