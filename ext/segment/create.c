/* create.c - making the memory of a region.
 *
 * Lives here: the memfd with its header and its seals; what is decided of its
 * pages before anybody has them: which size they have, from which NUMA nodes
 * they come, and whether they are there from the beginning.
 * Invariants
 *  1. Nobody but the caller has the descriptor yet, so nothing is shared, and
 *     whatever fails ends with it.
 *  2. A page that cannot be had is an error here, if it was asked for here, and
 *     no SIGBUS later: huge pages always are.
 * Runs in: caller.
 * Not here: what a header means (format.c), how much may be asked for
 * (pyshare/_creation.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "segment/segment.h"

/* Bytes, a transparent huge page at least.  Some kernels look at no signal in an allocation, others give back all of it
 * after one: so signals are served soon, and may come every millisecond. */
#define PIECE (UINT64_C(2) << 20)

/* No system call writes to huge pages.  The mapping, of all of them, promises them to the file, or fails. */
static int write_huge(int fd, const struct ps_shm_header *header) {
    uint64_t length = ps_region_file_length(header);
    void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return -errno;
    int rc = ps_sys_allocate(fd, 0, header->page_size); /* where the promise is not kept, no store finds out */
    if (!rc)
        memcpy(at, header, sizeof *header);
    munmap(at, length);
    return rc;
}

static int fill(int fd, const struct ps_shm_header *header, uint32_t mode) {
    if (ftruncate(fd, (off_t)ps_region_file_length(header)) || fchmod(fd, mode))
        return -errno;
    int rc = header->page_size > PS_PAGE ? write_huge(fd, header) : ps_sys_write_at(fd, header, sizeof *header, 0);
    if (rc)
        return rc;
    return fcntl(fd, F_ADD_SEALS, PS_SEALS) ? -errno : 0;
}

static struct ps_shm_header header_of(const struct ps_creation *wanted) {
    struct ps_shm_header header = {
        .magic = PS_MAGIC,
        .version = PS_VERSION,
        .page_size = wanted->page_size,
        .size = wanted->size,
        .slots = wanted->slots,
        .initial = wanted->prot,
        .created = ps_sys_boottime(),
        .creator = (uint32_t)getpid(),
        .policy = wanted->policy,
        .flags = wanted->flags,
    };
    strncpy(header.name, wanted->name, PS_NAME_MAX);
    ps_region_lay_out(&header);
    return header;
}

int ps_create(const struct ps_creation *wanted, int *fd) {
    struct ps_shm_header header = header_of(wanted);
    int rc = ps_sys_random(header.nonce, sizeof header.nonce);
    if (rc)
        return rc;
    *fd = ps_sys_memfd("pyshare", wanted->page_size);
    if (*fd < 0)
        return *fd;
    rc = fill(*fd, &header, wanted->mode);
    if (rc)
        close(*fd);
    return rc;
}

static int shape_of(int fd, struct ps_shape *shape) {
    const char *field;
    return ps_region_validate(fd, shape, &field);
}

uint64_t ps_footprint(const struct ps_creation *wanted) {
    struct ps_shm_header header = header_of(wanted);
    return header.control_size + header.pages * PS_PAGE;
}

/* The policy belongs to the file, and stays when the mapping goes (Documentation/admin-guide/mm/numa_memory_policy.rst,
 * "Shared Policy"); huge pages have none. */
int ps_prefer(int fd, const struct ps_numa *numa) {
    struct ps_shape shape;
    int rc = shape_of(fd, &shape);
    if (rc || shape.unit > 1)
        return rc;
    uint64_t length = shape.pages * PS_PAGE;
    void *at = mmap(NULL, length, PROT_NONE, MAP_SHARED, fd, (off_t)shape.control_size);
    if (at == MAP_FAILED)
        return -errno;
    rc = ps_sys_bind(at, length, numa->mode, numa->nodes, PS_NODES);
    munmap(at, length);
    return rc;
}

/* By the calling thread's policy, which is put back. */
static int allocate_by(const struct ps_numa *numa, int fd, uint64_t at, uint64_t length) {
    struct ps_numa before;
    int rc = ps_sys_policy(&before.mode, before.nodes, PS_NODES);
    if (!rc)
        rc = ps_sys_set_policy(numa->mode, numa->nodes, PS_NODES);
    if (rc)
        return rc;
    rc = ps_sys_allocate(fd, at, length);
    ps_sys_set_policy(before.mode, before.nodes, PS_NODES);
    return rc;
}

/* Transparent huge pages are given to mappings that ask for them; what cannot be had so is allocated page by page. */
static int allocate_thp(int fd, uint64_t at, uint64_t length) {
    void *mapped = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)at);
    if (mapped == MAP_FAILED)
        return -errno;
    if (!madvise(mapped, length, MADV_HUGEPAGE))
        madvise(mapped, length, MADV_POPULATE_WRITE);
    munmap(mapped, length);
    return ps_sys_allocate(fd, at, length);
}

int ps_allocate(int fd, const struct ps_numa *numa, uint64_t *at) {
    struct ps_shape shape;
    int rc = shape_of(fd, &shape);
    if (rc)
        return rc;
    uint64_t unit = (uint64_t)shape.unit * PS_PAGE, piece = unit > PIECE ? unit : PIECE;
    uint64_t data = shape.control_size, end = data + shape.pages * PS_PAGE;
    uint64_t left = (*at < data ? data : end) - *at, length = left < piece ? left : piece;
    if (numa && shape.unit > 1)
        rc = allocate_by(numa, fd, *at, length);
    else if (shape.flags & PS_REGION_THP && *at >= data)
        rc = allocate_thp(fd, *at, length);
    else
        rc = ps_sys_allocate(fd, *at, length);
    if (rc)
        return rc;
    *at += length;
    return *at < end;
}
