/* mapping.c - the address range of a region: reserved, filled, given back.
 *
 * Invariants
 *  1. The range is reserved, no-access, from ps_region_place to ps_release: no
 *     other mapping can ever slip under a pointer into the data.
 *  2. Shared memory is mapped through the agent's own description (`own`), which
 *     holds the OFD lock of the slot.  A mapping keeps its description alive, so
 *     that byte is free only when no thread can reach the memory any more,
 *     whatever became of descriptors.
 *  3. Every shared mapping is DONTFORK and DONTDUMP, and of that description; but
 *     of huge pages those that are added later are of the program's, which go
 *     with the control segment's at the same moment.
 *  4. Every mapping of the data is as the region's flags ask (PS_REGION_*).
 * Not here: which pages may be used (pages/).
 * Runs in: caller, agent, forked child, signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"
#include "segment/segment.h"

#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
#define SPAN_MAX (PS_FAR_SIZE / 2)

/* -- The address range --------------------------------------------------------------------------------------- */

static int map_at(uintptr_t address, uint64_t length, int prot, int flags, int fd, off_t offset) {
    void *got = mmap((void *)address, length, prot, flags, fd, offset);
    if (got == MAP_FAILED)
        return -errno;
    if (got == (void *)address)
        return 0;
    munmap(got, length); /* a kernel before 4.17 takes FIXED_NOREPLACE for a hint */
    return -EEXIST;
}

static uint64_t span_of(const struct ps_shape *shape) {
    return ps_data_offset(shape) + 3 * ps_window_offset(shape) + shape->areas * shape->pages * PS_PAGE;
}

int ps_room(int fd, uint64_t *needed, uint64_t *most) {
    struct ps_shape shape;
    const char *field;
    int rc = ps_region_validate(fd, &shape, &field);
    *needed = rc ? 0 : span_of(&shape);
    *most = SPAN_MAX;
    return rc;
}

int ps_region_place(struct ps_region *region) {
    uint64_t data = ps_data_offset(&region->shape);
    region->span = span_of(&region->shape);
    if (region->span > SPAN_MAX)
        return -ENOMEM;
    uint64_t unit = (uint64_t)region->shape.unit * PS_PAGE, step = unit > PS_BOUNDARY ? unit : PS_BOUNDARY;
    uint64_t room = (PS_FAR_SIZE - region->span) / step - data / step - 1;
    uint64_t at = region->shape.nonce[0];
    for (int tries = 0; tries < 4096; tries++) {
        /* Anywhere else each time: a small region steps over a large one's range only by leaps. */
        at = at * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        uintptr_t base = PS_FAR_BASE + (data / step + 1 + (at >> 16) % room) * step - data;
        int rc = map_at(base, region->span, PROT_NONE, RESERVED | MAP_FIXED_NOREPLACE, -1, 0);
        if (!rc)
            atomic_store_explicit(&region->base, base, memory_order_release); /* pairs with the fault handler */
        if (rc != -EEXIST)
            return rc;
    }
    return -ENOMEM;
}

/* MAP_FIXED: what lies there is our reservation, our own mapping, the hole that DONTFORK left of it in a
 * child, or (forked between mmap and madvise) a copy of it. */
int ps_region_reserve(struct ps_region *region) {
    return map_at((uintptr_t)ps_header(region), region->span, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
}

static int keep_apart(void *at, uint64_t length) {
    return madvise(at, length, MADV_DONTFORK) || madvise(at, length, MADV_DONTDUMP) ? -errno : 0;
}

static int map_shared(uintptr_t at, uint64_t length, int prot, int own, uint64_t offset) {
    int rc = map_at(at, length, prot, MAP_SHARED | MAP_FIXED, own, (off_t)offset);
    return rc ? rc : keep_apart((void *)at, length);
}

/* Huge pages are never swapped, and would count against the limit all the same. */
static int lock_memory(struct ps_region *region, uintptr_t at, uint64_t length) {
    bool wanted = region->shape.flags & PS_REGION_LOCK && !ps_has_huge_pages(region);
    return wanted && ps_sys_lock((void *)at, length) ? PS_EMEMLOCK : 0;
}

/* Of a participant already, who goes on without a lock that it cannot have: a forked child, whose parent has one. */
static int forgive(const struct ps_region *region, int rc) {
    bool opening = atomic_load_explicit(&region->use, memory_order_relaxed) == PS_OPENING;
    return rc == PS_EMEMLOCK && !opening ? 0 : rc;
}

/* What a mapping of data is to be.  Transparent huge pages are a wish: -EINVAL where the kernel was built without. */
static int settle(struct ps_region *region, uintptr_t at, uint64_t length) {
    if (region->shape.flags & PS_REGION_THP && madvise((void *)at, length, MADV_HUGEPAGE) && errno != EINVAL)
        return -errno;
    return lock_memory(region, at, length);
}

/* Its last page is never locked: map_again takes its flags for those of other mappings, which would count twice. */
int ps_region_map_control(struct ps_region *region, int own) {
    uintptr_t at = (uintptr_t)ps_header(region);
    uint64_t length = region->shape.control_size;
    int rc = map_shared(at, length, PROT_READ | PROT_WRITE, own, 0);
    return rc ? rc : forgive(region, lock_memory(region, at, length - PS_PAGE));
}

int ps_region_map_data(struct ps_region *region, int own) {
    uintptr_t at = (uintptr_t)ps_address(region);
    uint64_t length = region->shape.pages * PS_PAGE;
    int rc = map_shared(at, length, PROT_NONE, own, region->shape.control_size);
    return rc ? rc : forgive(region, settle(region, at, length));
}

int ps_region_map_canary(struct ps_region *region, int own) {
    return map_shared((uintptr_t)ps_address(region) - PS_GUARD, PS_CANARY, PROT_NONE, own, 0);
}

/* The window and the shadow too. */
int ps_region_unmap_data(struct ps_region *region) {
    return map_at((uintptr_t)ps_address(region), region->span - ps_data_offset(&region->shape), PROT_NONE,
                  RESERVED | MAP_FIXED, -1, 0);
}

/* Huge pages of the data, by the program's description; it may have given its number to another file meanwhile. */
static int map_huge(struct ps_region *region, uintptr_t at, uint64_t page, uint64_t count, int prot) {
    int fd = ps_query_fd(region);
    uint64_t length = count * PS_PAGE, offset = region->shape.control_size + page * PS_PAGE;
    int rc = fd < 0 ? fd : map_shared(at, length, prot, fd, offset);
    if (rc || ps_cached_leads(fd, &region->memory))
        return rc;
    rc = map_at(at, length, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
    return rc ? rc : -EBADF;
}

/* Once more, writable, what lies in the memfd from the data on.  It must keep the slot's byte as the first mapping
 * does, and `own` is in a table that a caller cannot reach: mremap(2) with an old size of 0 maps more of what is mapped
 * already, by the same description and with the same flags.  The last page of the control segment, which is writable,
 * DONTFORK and DONTDUMP, lies before the data in the memfd as well; here it goes again.  Huge pages cannot be mapped
 * so (mremap(2): -EINVAL).  Their second mappings are undone with all others of the process at its end, and before the
 * kernel lets go of any description: no thread stores by one of them when the byte is free. */
static int map_again(struct ps_region *region, uintptr_t at, uint64_t length) {
    if (ps_has_huge_pages(region))
        return map_huge(region, at, 0, length / PS_PAGE, PROT_READ | PROT_WRITE);
    uintptr_t last = (uintptr_t)ps_header(region) + region->shape.control_size - PS_PAGE;
    at -= PS_PAGE;
    length += PS_PAGE;
    if (mremap((void *)last, 0, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)at) == MAP_FAILED)
        return -errno;
    return map_at(at, PS_PAGE, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
}

/* The data, always writable. */
int ps_region_map_window(struct ps_region *region) {
    uintptr_t at = (uintptr_t)ps_address(region) + ps_window_offset(&region->shape);
    uint64_t length = region->shape.pages * PS_PAGE;
    int rc = map_again(region, at, length);
    if (!rc)
        rc = settle(region, at, length);
    if (rc)
        map_at(at, length, PROT_NONE, RESERVED | MAP_FIXED, -1, 0);
    return rc;
}

/* The data, to be read whatever its protection, and behind it the snapshots' areas, writable. */
int ps_region_map_shadow(struct ps_region *region) {
    uint64_t data = region->shape.pages * PS_PAGE;
    uintptr_t at = (uintptr_t)ps_shadow(region);
    int rc = map_again(region, at, (1 + (uint64_t)region->shape.areas) * data);
    return rc ? rc : mprotect((void *)at, data, PROT_READ) ? -errno : 0;
}

/* As ps_region_map_window, anywhere, and nobody may access it. */
static int map_source(struct ps_region *region) {
    uintptr_t last = (uintptr_t)ps_header(region) + region->shape.control_size - PS_PAGE;
    uint64_t length = PS_PAGE + region->shape.pages * PS_PAGE;
    if (region->source)
        return 0;
    void *at = mremap((void *)last, 0, length, MREMAP_MAYMOVE);
    if (at == MAP_FAILED)
        return -errno;
    if (mprotect(at, length, PROT_NONE)) {
        int rc = -errno;
        munmap(at, length);
        return rc;
    }
    region->source = (uintptr_t)at + PS_PAGE;
    return 0;
}

static int read_data(struct ps_region *region, uint64_t page, char *to, uint64_t length) {
    uint64_t offset = region->shape.control_size + page * PS_PAGE;
    int fd = ps_query_fd(region);
    for (uint64_t done = 0; done < length;) {
        ssize_t got = fd < 0 ? fd : pread(fd, to + done, length - done, (off_t)(offset + done));
        if (got <= 0)
            return fd < 0 ? fd : got ? -errno : -EIO;
        done += (uint64_t)got;
    }
    return 0;
}

/* A private mapping of huge pages would take some from the pool, and die where there is none: small ones instead, and
 * copied at once. */
static int map_copy(struct ps_region *region, uint64_t page, uint64_t count, bool zero) {
    uint64_t length = count * PS_PAGE;
    void *copy = mmap(NULL, length, PROT_READ | PROT_WRITE, RESERVED, -1, 0);
    if (copy == MAP_FAILED)
        return -errno;
    int rc = zero ? 0 : read_data(region, page, copy, length);
    if (!rc)
        rc = keep_apart(copy, length);
    if (!rc && mremap(copy, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
                      (char *)ps_address(region) + page * PS_PAGE) == MAP_FAILED)
        rc = -errno;
    if (rc)
        munmap(copy, length);
    return rc;
}

/* Pages of our own in the place of shared ones: with their content, or zero. */
int ps_region_map_private(struct ps_region *region, uint64_t page, uint64_t count, bool zero) {
    if (ps_has_huge_pages(region))
        return map_copy(region, page, count, zero);
    uintptr_t at = (uintptr_t)ps_address(region) + page * PS_PAGE;
    uint64_t length = count * PS_PAGE, offset = region->shape.control_size + page * PS_PAGE;
    int fd = zero ? -1 : ps_query_fd(region), flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    if (fd < 0 && !zero)
        return fd;
    int rc = map_source(region);
    if (!rc)
        rc = map_at(at, length, PROT_READ | PROT_WRITE, flags | (zero ? MAP_ANONYMOUS : 0), fd,
                    zero ? 0 : (off_t)offset);
    return rc ? rc : keep_apart((void *)at, length);
}

/* ... and the shared ones again, no-access.  By the description that the others of the data have, else each would stay
 * a mapping apart for ever. */
int ps_region_map_again(struct ps_region *region, uint64_t page, uint64_t count) {
    void *from = (void *)(region->source + page * PS_PAGE);
    uintptr_t at = (uintptr_t)ps_address(region) + page * PS_PAGE;
    if (ps_has_huge_pages(region))
        return map_huge(region, at, page, count, PROT_NONE);
    if (mremap(from, 0, count * PS_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)at) == MAP_FAILED)
        return -errno;
    return forgive(region, settle(region, at, count * PS_PAGE));
}

/* All shared pages, and the canary. */
int ps_region_map_anew(struct ps_region *region, int own) {
    int rc = map_source(region);
    if (!rc)
        rc = ps_region_map_again(region, 0, region->shape.pages);
    return rc ? rc : ps_region_map_canary(region, own);
}

void ps_region_unmap_source(struct ps_region *region) {
    if (region->source)
        munmap((void *)(region->source - PS_PAGE), PS_PAGE + region->shape.pages * PS_PAGE);
    region->source = 0;
}

/* -- What it is ---------------------------------------------------------------------------------------------- */

uint32_t ps_areas(const struct ps_region *region) {
    return region->shape.areas;
}

/* A forked child finds it zero: it holds nothing of what its parent holds, and nothing is mapped. */
static int map_here(struct ps_region *region) {
    uint64_t length = ps_here_length(region);
    void *got = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return -errno;
    region->here = got;
    region->chunk = (uint8_t *)(region->here + region->shape.pages + PS_LOCKS);
    return madvise(got, length, MADV_WIPEONFORK) || madvise(got, length, MADV_DONTDUMP) ? -errno : 0;
}

/* A forked child finds it zero as well.  Where another thread of ours makes it too, the first is the one. */
int ps_region_map_counts(struct ps_region *region) {
    const uint64_t length = PS_TIDS * sizeof(struct ps_count);
    struct ps_count *none = NULL;
    void *got = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return -errno;
    int rc = madvise(got, length, MADV_WIPEONFORK) || madvise(got, length, MADV_DONTDUMP) ? -errno : 0;
    if (rc || !atomic_compare_exchange_strong_explicit(&region->counts, &none, got, memory_order_acq_rel,
                                                       memory_order_relaxed))
        munmap(got, length);
    return rc;
}

/* -- Attach, close ------------------------------------------------------------------------------------------- */

/* What a participant needs before its agent begins. */
int ps_region_fill(struct ps_region *region, int fd, int name_fd) {
    int rc = ps_cached_set(&region->memory, PS_MEMORY, fd);
    if (!rc)
        rc = ps_cached_set(&region->entry, PS_ENTRY, name_fd);
    if (!rc)
        rc = ps_region_place(region);
    return rc ? rc : map_here(region);
}
