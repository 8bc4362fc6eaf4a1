"""core.pxd: what the binding declares of C: the core's functions and structs, and a few calls of the system.

Lives here: declarations, and the C that Cython cannot say.  Not here: anything of Python's C API that Cython declares.
"""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "stdbool.h":
    ctypedef unsigned char flag "bool"

cdef extern from "os/os.h" nogil:
    int64_t PS_NEVER
    int64_t ps_sys_now()
    void ps_sys_pause()
    int ps_sys_gettid()
    bint ps_sys_thread_exists(int tid)

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

cdef extern from "binding/binding.h":
    struct due_t "ps_due":
        uint32_t guards
        int line
        PyObject *code
    due_t due_of_thread "ps_due"
    void ps_expect_violations(object violation_class, object python_function)
    object ps_told()
    PyObject *ps_take() except? NULL
    void ps_chain(object error, PyObject *context)
    void ps_forget()
    int ps_wrap_builtins() except -1
    int ps_wrap_numpy(object numpy) except -1
    ps_violation_t *violation_of_thread "ps_violation"() nogil

cdef extern from "core.h" nogil:
    enum:
        PS_EAREAS
    struct ps_snapshot:
        int fd
        uint32_t index
        uint32_t word
        uint64_t generation
        uint64_t size
        uint64_t pages
    uint32_t ps_areas(const ps_region *region)
    int ps_snapshot_take(ps_region *region, int64_t deadline, ps_outcome *outcome, ps_snapshot *snapshot, flag *shared)
    int ps_snapshot_adopt(int fd, uint32_t index, uint32_t word, uint64_t generation, ps_snapshot *snapshot,
                          const char **field)
    int ps_snapshot_read(const ps_snapshot *snapshot, uint64_t offset, void *to, uint64_t length)
    int ps_snapshot_save(ps_snapshot *snapshot, uint64_t *page, uint64_t count)
    int ps_snapshot_view(const ps_snapshot *snapshot, void **at)
    void ps_snapshot_unview(void *at, uint64_t pages)
    flag ps_snapshot_complete(const ps_snapshot *snapshot)
    uint64_t ps_snapshot_saved(const ps_snapshot *snapshot)
    int ps_snapshot_data(const ps_snapshot *snapshot, flag area, uint64_t *page, uint64_t *count)
    void ps_snapshot_close(ps_snapshot *snapshot)
    flag ps_snapshot_of(const ps_region *region, const ps_snapshot *snapshot)
    int ps_dirty(ps_region *region, const ps_snapshot *since, uint64_t generation, uint8_t *map)
    int ps_put(ps_region *region, uint64_t offset, const void *data, uint64_t length)

cdef extern from "process/process.h":
    enum:
        PS_PAGE_SIZE "PS_PAGE"
    struct ps_shape:
        uint64_t pages
        uint32_t unit
        uint32_t areas
        uint32_t creator
        uint64_t created
        uint64_t control_size
    struct ps_cached:
        uint64_t device
        uint64_t inode
    # All of it, so that it can lie in an object of ours: the size is C's.
    struct observer_t "ps_region":
        ps_shape shape
        ps_cached memory

cdef extern from "os/os.h":
    uint64_t ps_sys_start_time(int pid)

cdef extern from "core.h" nogil:
    enum:
        PS_SEC_CUR
        PS_SEC_LEASE
        PS_SEC_KEPT
        PS_SEC_STATE
        PS_SNAPSHOT_MASK
        PS_CLOSERS
        PS_RING
        PS_SET
        PS_UNDO
        PS_THAW
        PS_FOLLOW
    ctypedef enum layer_t "enum ps_section_kind":
        pass
    struct ps_seen_change:
        uint64_t first
        uint64_t count
        uint64_t time
        uint64_t done
        uint32_t kind
        uint32_t prot
        uint32_t author
        uint32_t slowest
    struct ps_seen_slot:
        uint32_t owner
        uint32_t pid
        uint32_t tid
        uint32_t capabilities
        uint32_t flags
        uint64_t start
        uint64_t applied
        uint64_t data
        bint live
        bint alive
        bint here
        uint32_t leases
        uint32_t waits_for
        uint64_t leased_since
        uint64_t waits_since
        uint32_t takes
    struct ps_seen_lock:
        uint32_t index
        uint32_t owner
        uint64_t since
    struct ps_seen_closer:
        uint32_t owner
        bint drain
        uint64_t first
        uint64_t count
    int ps_observe(ps_region *seen, int fd, const char **field)
    void ps_observe_shut(ps_region *seen)
    void ps_observe_end(ps_region *seen)
    int ps_observe_read(ps_region *seen, uint64_t offset, void *to, uint64_t length)
    int ps_observe_wait(const ps_region *seen, uint64_t generation, int64_t deadline)
    bint ps_observe_change(const ps_region *seen, uint64_t generation, ps_seen_change *out)
    bint ps_observe_open(const ps_region *seen, uint64_t *first, uint64_t *count)
    bint ps_observe_over(const ps_region *seen, uint64_t generation)
    int ps_observe_slot(ps_region *seen, uint32_t index, ps_seen_slot *out)
    uint64_t ps_observe_run(ps_region *seen, layer_t layer, uint32_t area, uint64_t first, uint64_t *value)
    uint32_t ps_observe_protection(ps_region *seen, uint64_t page)
    uint32_t ps_observe_freezer(const ps_region *seen, uint64_t *frozen)
    uint32_t ps_observe_snapshot(const ps_region *seen, uint32_t area, uint64_t *generation)
    bint ps_observe_protected(const ps_region *seen)
    uint64_t ps_observe_takes(const ps_region *seen)
    uint32_t ps_observe_writer(const ps_region *seen)
    bint ps_observe_lock(ps_region *seen, uint32_t start, ps_seen_lock *out)
    bint ps_observe_closer(const ps_region *seen, uint32_t index, ps_seen_closer *out)
    int64_t ps_observe_marks(int pagemap, uint64_t page, uint64_t end, flag *marked)

cdef extern from "core.h" nogil:
    ctypedef enum call_t "enum ps_call_kind":
        PS_CALL_LEASE
        PS_CALL_LOCK
        PS_CALL_CHANGE
        PS_CALL_WATCH
    struct ps_mailbox:
        int fd
    struct ps_call:
        call_t kind
        ps_region *region
        ps_mailbox *box
        uint64_t first
        uint64_t count
        int64_t deadline
        uint64_t generation
        uint32_t prot
        bint passes
        ps_lease lease
        void *owner
        int rc
        flag abandoned
        ps_outcome outcome
        ps_refusal refusal
        ps_call *next
    int ps_call_begin(ps_call *call)
    void ps_call_cancel(ps_call *call)
    bint ps_call_conflict(const ps_call *one, const ps_call *other)
    ps_call *ps_mailbox_take(ps_mailbox *box)
    void ps_mailbox_settle(ps_mailbox *box)
    int ps_lease_try(ps_region *region, ps_lease *lease, bint passes, ps_outcome *outcome, ps_refusal *refusal)
