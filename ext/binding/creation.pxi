"""creation.pxi: part of _core.pyx: making a region and joining it.

Not here: what create() is asked (pyshare/_creation.py), names (names.pxi).
"""


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


def _capsule(Handle handle not None):
    """The core's handle, for measurement code, which keeps this one alive; RegionClosed."""
    if handle.region is NULL:
        raise_code(PS_ECLOSED, "measure")
    return capsule_of(handle.region)
