/* mapping.c - a memfd that is a region, and the address range.
 *
 * Lives here: where in the memfd what lies, checking one that somebody hands
 * us, reserving and filling the address range.  The only place where foreign
 * bytes become trusted: after ps_region_validate nothing of the header's first
 * lines is read again.
 * Invariants
 *  1. The range is reserved, no-access, from ps_region_place to ps_release: no
 *     other mapping can ever slip under a pointer into the data.
 *  2. Shared memory is mapped through the agent's own description (`own`),
 *     which holds the OFD lock of the slot.  A mapping keeps its description
 *     alive, so that byte is free only when no thread can reach the memory any
 *     more, whatever became of descriptors.
 *  3. Every shared mapping is DONTFORK and DONTDUMP, and of that description; but
 *     of huge pages those that are added later are of the program's, which go with
 *     the control segment's at the same moment.
 *  4. Every mapping of the data is as the region's flags ask (PS_REGION_*).
 * Runs in: caller, agent, fork child, signal handler.
 * Not here: making one (create.c), who may use the pages (change.c, engine.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "participant.h"

/* Far from where the kernel looks for room (mmap_base, downwards) and from the heap: the range that a raw
 * child loses by DONTFORK is not handed out again there.  A build with a sanitizer moves it. */
#ifndef PS_FAR_BASE
#define PS_FAR_BASE 0x100000000000u
#define PS_FAR_SIZE 0x400000000000u
#endif
#define CHUNK (2u << 20)    /* data begins on a page-table boundary */
#define GLANCE (20 * PS_MS) /* a call waits so long for who thaws for a dead freezer */

static uint64_t whole_pages(uint64_t bytes) {
    return (bytes + PS_PAGE - 1) / PS_PAGE * PS_PAGE;
}

static uint64_t section_length(enum ps_section_kind kind, uint64_t pages, uint32_t slots, uint32_t areas) {
    switch (kind) {
    case PS_SEC_SLOTS:
        return slots * sizeof(struct ps_shm_slot);
    case PS_SEC_RING:
        return PS_RING * sizeof(struct ps_shm_ring);
    case PS_SEC_CUR:
    case PS_SEC_OLD:
        return pages;
    case PS_SEC_LEASE:
        return pages * sizeof(uint64_t);
    case PS_SEC_LOCK:
        return PS_LOCKS * sizeof(struct ps_shm_lock);
    case PS_SEC_KEPT:
        return pages;
    case PS_SEC_STATE:
        return areas * whole_pages(pages);
    case PS_SEC_STAMP:
        return pages * sizeof(uint64_t);
    case PS_SEC_VIOLATION:
        return PS_VIOLATIONS * sizeof(struct ps_shm_violation);
    default:
        return 0;
    }
}

uint64_t ps_region_file_length(const struct ps_shm_header *header) {
    return header->control_size + (1 + (uint64_t)header->areas) * header->pages * PS_PAGE;
}

/* As many as leave room for the data and its other mappings.  Huge pages can neither be holes nor be written to by
 * system calls, which saving needs. */
static uint32_t areas_for(uint64_t pages, uint32_t page_size) {
    uint64_t room = page_size > PS_PAGE ? 0 : PS_FAR_SIZE / 2 / (pages * PS_PAGE);
    return room < 5 ? 0 : room - 4 < PS_SNAPSHOTS ? (uint32_t)room - 4 : PS_SNAPSHOTS;
}

/* As many as the size takes, of whole units. */
static uint64_t data_pages(const struct ps_shm_header *header) {
    return (header->size + header->page_size - 1) / header->page_size * (header->page_size / PS_PAGE);
}

/* What follows from size, page size, slots and flags. */
void ps_region_lay_out(struct ps_shm_header *header) {
    /* A transparent huge page begins on its own boundary in the memfd too. */
    uint64_t at = PS_PAGE, unit = header->flags & PS_REGION_THP ? CHUNK : header->page_size;
    header->pages = data_pages(header);
    header->areas = areas_for(header->pages, header->page_size);
    for (uint32_t kind = PS_SEC_SLOTS; kind <= PS_SEC_LAST; kind++) {
        uint64_t length = section_length((enum ps_section_kind)kind, header->pages, header->slots, header->areas);
        header->section[kind - 1] = (struct ps_shm_section){.kind = kind, .offset = at, .length = length};
        at = whole_pages(at + length);
    }
    header->control_size = (at + unit - 1) / unit * unit;
}

static const char *check_sections(const struct ps_shm_header *header, struct ps_shape *shape) {
    for (uint32_t i = 0; i < PS_SECTIONS && header->section[i].kind != PS_SEC_END; i++) {
        const struct ps_shm_section *section = &header->section[i];
        if (section->kind >= PS_SECTIONS)
            continue; /* of a later version that says we may ignore it */
        uint64_t end = header->control_size;
        if (section->offset % PS_PAGE || section->offset < PS_PAGE || section->offset > end ||
            section->length > end - section->offset)
            return "section";
        if (section->length <
            section_length((enum ps_section_kind)section->kind, header->pages, header->slots, header->areas))
            return "section length";
        shape->offset[section->kind] = section->offset;
    }
    for (uint32_t kind = PS_SEC_SLOTS; kind <= PS_SEC_LAST; kind++)
        if (!shape->offset[kind])
            return "section table";
    return NULL;
}

/* As _names.py has it, or "". */
static bool is_name(const char *name, size_t size) {
    size_t length = strnlen(name, size);
    return length <= PS_NAME_MAX && name[0] != '.' &&
           strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") >= length;
}

static const char *check_header(const struct ps_shm_header *header, uint64_t file_size, uint64_t file_page) {
    if (header->magic != PS_MAGIC)
        return "magic";
    if (header->version != PS_VERSION)
        return "version";
    if (header->page_size != file_page)
        return "page_size";
    if (!header->slots || header->slots > PS_SLOTS_MAX)
        return "slots";
    if (header->initial > 7)
        return "initial";
    if (header->policy > PS_WAIT)
        return "policy";
    if (header->areas > (header->page_size > PS_PAGE ? 0 : PS_SNAPSHOTS))
        return "areas";
    if (header->flags > (PS_REGION_THP | PS_REGION_LOCK | PS_REGION_RESERVED))
        return "flags";
    if (!header->size || header->size > file_size || header->pages != data_pages(header))
        return "size";
    if (header->control_size % header->page_size || header->control_size > file_size ||
        file_size != ps_region_file_length(header))
        return "control_size";
    return is_name(header->name, sizeof header->name) ? NULL : "name";
}

/* Bytes of the pages of which the file is made, as the kernel has it. */
static int64_t page_of_file(int fd) {
    struct statfs kind;
    return fstatfs(fd, &kind) ? -errno : kind.f_type == HUGETLBFS_MAGIC ? (int64_t)kind.f_bsize : (int64_t)PS_PAGE;
}

int ps_region_validate(int fd, struct ps_shape *shape, const char **field) {
    struct ps_shm_header header;
    struct stat file;
    if (fstat(fd, &file))
        return -errno;
    *field = "seals";
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & PS_SEALS) != PS_SEALS)
        return PS_ECORRUPT;
    *field = "length";
    if (pread(fd, &header, sizeof header, 0) != (ssize_t)sizeof header)
        return PS_ECORRUPT;
    int64_t page = page_of_file(fd);
    if (page < 0)
        return (int)page;
    memset(shape, 0, sizeof *shape);
    *field = check_header(&header, (uint64_t)file.st_size, (uint64_t)page);
    if (!*field)
        *field = check_sections(&header, shape);
    if (*field)
        return PS_ECORRUPT;
    shape->control_size = header.control_size;
    shape->size = header.size;
    shape->pages = header.pages;
    shape->unit = header.page_size / PS_PAGE;
    shape->flags = header.flags;
    shape->slots = header.slots;
    shape->initial = header.initial;
    shape->policy = header.policy;
    shape->areas = header.areas;
    shape->created = header.created;
    shape->creator = header.creator;
    memcpy(shape->nonce, header.nonce, sizeof shape->nonce);
    memcpy(shape->name, header.name, sizeof shape->name);
    return 0;
}

int ps_corrupt(struct ps_region *region, const char *field) {
    atomic_store_explicit(&region->corrupt, field, memory_order_relaxed);
    return PS_ECORRUPT;
}

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

#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

#define SPAN_MAX (PS_FAR_SIZE / 2)

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
    uint64_t unit = (uint64_t)region->shape.unit * PS_PAGE, step = unit > CHUNK ? unit : CHUNK;
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

static bool has_huge_pages(const struct ps_region *region) {
    return region->shape.unit > 1;
}

/* Huge pages are never swapped, and would count against the limit all the same. */
static int lock_memory(struct ps_region *region, uintptr_t at, uint64_t length) {
    bool wanted = region->shape.flags & PS_REGION_LOCK && !has_huge_pages(region);
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
    if (has_huge_pages(region))
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
    if (has_huge_pages(region))
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
    if (has_huge_pages(region))
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

#define PIECE 8192u /* pages that are brought in at once */

/* A page is locked as soon as it is mapped in a locked mapping (mlock2(2), MLOCK_ONFAULT): those that the memfd has,
 * where they may be read.  What cannot be had now is locked when it is touched. */
int ps_bring_in(struct ps_region *region, uint64_t *page) {
    uint64_t end = region->shape.pages, count = end - *page;
    uint32_t prot;
    if (!(region->shape.flags & PS_REGION_LOCK) || has_huge_pages(region) || *page >= end)
        return 0;
    int rc = region->shape.flags & PS_REGION_RESERVED ? 0 : ps_data(region, page, &count); /* what there is: all */
    if (rc || !count)
        return rc;
    uint64_t run = ps_run(region, *page, *page + (count < PIECE ? count : PIECE), &prot);
    if (prot & (PROT_READ | PROT_WRITE))
        madvise((char *)ps_address(region) + *page * PS_PAGE, run * PS_PAGE, MADV_POPULATE_READ);
    *page += run;
    return 1;
}

/* -- Descriptors --------------------------------------------------------------------------------------------- */

bool ps_cached_leads(int fd, const struct ps_cached *cached) {
    struct stat file;
    return fd >= 0 && !fstat(fd, &file) && file.st_ino == cached->inode && file.st_dev == cached->device;
}

/* flock(LOCK_SH) on a name's entry in the program's table too: a child that has been forked and has not joined yet
 * inherits it, so the name does not look stale if the parent ends in between. */
static int take_hold(struct ps_cached *cached, int fd) {
    if (fd >= 0 && (!ps_cached_leads(fd, cached) || (cached->kind == PS_ENTRY && flock(fd, LOCK_SH | LOCK_NB)))) {
        close(fd);
        fd = -EBADF;
    }
    cached->fd = fd < 0 ? -1 : fd;
    return fd;
}

/* The program may close anything, and its numbers come back as other files: check, and fetch again from the
 * agent's table. */
static int fetch(struct ps_region *region, struct ps_cached *cached) {
    int agents = cached->kind == PS_MEMORY  ? region->own
                 : cached->kind == PS_ENTRY ? region->own_entry
                                            : region->own_userfault;
    uint32_t use = atomic_load_explicit(&region->use, memory_order_acquire);
    if (agents < 0 || !ps_running(region) || (use != PS_OPEN && use != PS_OPENING))
        return -EBADF;
    return take_hold(cached, cached->kind == PS_USERFAULT ? ps_borrow_own(region)
                                                          : ps_sys_reopen_of(getpid(), region->tid, agents));
}

int ps_cached_get(struct ps_region *region, struct ps_cached *cached) {
    ps_private_lock(&region->descriptor_lock, PS_NEVER);
    int fd = ps_cached_leads(cached->fd, cached) ? cached->fd : fetch(region, cached);
    ps_private_unlock(&region->descriptor_lock);
    return fd;
}

int ps_fd(struct ps_region *region) {
    return ps_cached_get(region, &region->memory);
}

int ps_query_fd(struct ps_region *region) {
    return ps_process_is_agent(region) ? region->own : ps_fd(region);
}

/* The first byte of the memfd from `at` on, before `end`, that it really holds: nobody need read a hole. */
uint64_t ps_region_skip_hole(struct ps_region *region, uint64_t at, uint64_t end) {
    int fd = ps_query_fd(region);
    off_t found = fd < 0 ? -1 : lseek(fd, (off_t)at, SEEK_DATA);
    if (found < 0)
        return fd >= 0 && errno == ENXIO ? end : at; /* no data from here to the end of the file */
    return (uint64_t)found < end ? (uint64_t)found : end;
}

/* The next run of pages from *page on that the memfd really holds, of so many that begin at `begin`; a count of 0:
 * there is none. */
int ps_region_data(int fd, uint64_t begin, uint64_t pages, uint64_t *page, uint64_t *count) {
    *count = 0;
    off_t end = (off_t)(begin + pages * PS_PAGE), data = lseek(fd, (off_t)(begin + *page * PS_PAGE), SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? 0 : -errno;
    off_t hole = data < end ? lseek(fd, data, SEEK_HOLE) : end;
    if (hole < 0)
        return -errno;
    if (data < end) {
        *page = ((uint64_t)data - begin) / PS_PAGE;
        *count = ((uint64_t)(hole < end ? hole : end) - begin) / PS_PAGE - *page;
    }
    return 0;
}

/* ... that it does not hold. */
uint64_t ps_region_skip_data(struct ps_region *region, uint64_t at, uint64_t end) {
    int fd = ps_query_fd(region);
    off_t found = fd < 0 || at >= end ? -1 : lseek(fd, (off_t)at, SEEK_HOLE);
    return found >= 0 && (uint64_t)found < end ? (uint64_t)found : end;
}

int ps_data(struct ps_region *region, uint64_t *page, uint64_t *count) {
    int fd = ps_query_fd(region);
    return fd < 0 ? fd : ps_region_data(fd, region->shape.control_size, region->shape.pages, page, count);
}

/* -- What it is ---------------------------------------------------------------------------------------------- */

static uint64_t here_length(const struct ps_region *region) {
    return (region->shape.pages + PS_LOCKS) * sizeof *region->here + ps_chunks(&region->shape);
}

void *ps_address(const struct ps_region *region) {
    return (char *)ps_header(region) + ps_data_offset(&region->shape);
}

uint64_t ps_size(const struct ps_region *region) {
    return region->shape.size;
}

uint32_t ps_areas(const struct ps_region *region) {
    return region->shape.areas;
}

uint64_t ps_page_size(const struct ps_region *region) {
    return (uint64_t)region->shape.unit * PS_PAGE;
}

uint64_t ps_generation(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->generation, memory_order_acquire);
}

const char *ps_name(const struct ps_region *region) {
    return region->shape.name;
}

enum ps_engine ps_engine(const struct ps_region *region) {
    return region->uffd ? PS_ENGINE_UFFD : PS_ENGINE_MPROTECT;
}

const char *ps_corrupt_field(const struct ps_region *region) {
    return atomic_load_explicit(&region->corrupt, memory_order_relaxed);
}

/* A forked child finds it zero: it holds nothing of what its parent holds, and nothing is mapped. */
static int map_here(struct ps_region *region) {
    uint64_t length = here_length(region);
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

int ps_cached_identify(struct ps_cached *cached, enum ps_cached_kind kind, int fd) {
    struct stat file;
    cached->kind = kind;
    atomic_store_explicit(&cached->fd, -1, memory_order_relaxed);
    if (fd < 0)
        return 0;
    if (fstat(fd, &file))
        return -errno;
    cached->device = file.st_dev;
    cached->inode = file.st_ino;
    return 0;
}

static int cache(struct ps_cached *cached, enum ps_cached_kind kind, int fd) {
    int rc = ps_cached_identify(cached, kind, fd);
    if (rc || fd < 0)
        return rc;
    int own = ps_sys_reopen(fd);
    int got = take_hold(cached, ps_sys_refused(own) ? ps_sys_fd_high(fd, 0) : own);
    return got < 0 ? got : 0;
}

void ps_cached_forget(struct ps_region *region, struct ps_cached *cached) {
    ps_private_lock(&region->descriptor_lock, PS_NEVER);
    if (ps_cached_leads(cached->fd, cached))
        close(cached->fd);
    cached->fd = -1;
    ps_private_unlock(&region->descriptor_lock);
}

static void forget_all(struct ps_region *region) {
    ps_cached_forget(region, &region->memory);
    ps_cached_forget(region, &region->entry);
    ps_cached_forget(region, &region->userfault);
    ps_borrow_give_back(region);
}

/* Nothing is left of it but the reservation. */
void ps_region_shut(struct ps_region *region) {
    forget_all(region);
    atomic_store_explicit(&region->use, PS_SHUT, memory_order_release);
}

/* Of a region that did not open, or whose opening thread did not come along in a fork. */
void ps_region_discard(struct ps_region *region) {
    ps_region_shut(region);
    ps_release(region);
}

/* The child inherits the program's table, so what the program lost is fetched while the agent still has it. */
static void before_fork(void) {
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region))
        if (ps_use_of(region) == PS_OPEN && ps_process_known()) {
            ps_cached_get(region, &region->memory);
            ps_cached_get(region, &region->entry);
        }
}

static void reserve_all(void) {
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region)) {
        if (ps_use_of(region) == PS_UNUSED || !region->base)
            continue;
        if (ps_region_reserve(region)) /* then nothing is mapped there, and it must not become a participant */
            atomic_store_explicit(&region->use, PS_SHUT, memory_order_release);
    }
}

/* In a forked child: it takes part where its parent did. */
static void join_again(struct ps_region *region, int64_t deadline) {
    struct ps_outcome outcome;
    uint32_t use = ps_use_of(region);
    if (use != PS_UNUSED) {
        ps_process_forget(region);
        ps_cached_forget(region, &region->userfault); /* it changes our parent's page tables */
    }
    int rc = use == PS_OPEN ? PS_ESIGNAL : PS_ECLOSED;
    while (rc == PS_ESIGNAL) /* handlers run when fork is over: until then nobody may use the memory */
        rc = ps_agent_start(region, deadline, &outcome);
    if (!rc) /* or detached: ps_ready tries again */
        ps_cached_get(region, &region->userfault);
    if (use == PS_OPENING) /* by a thread that is not here */
        ps_region_discard(region);
    else if (use == PS_CLOSING) /* likewise; its owner gives the reservation back */
        ps_region_shut(region);
}

static void in_child(void) {
    reserve_all();
    if (!ps_process_known())
        return;
    int64_t deadline = ps_sys_now() + PS_JOIN_TIMEOUT;
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region))
        join_again(region, deadline);
}

static const struct ps_at_fork at_fork = {.before = before_fork, .child = in_child};

int ps_participant_start(void) {
    return ps_process_start(&at_fork);
}

/* What a participant needs before its agent begins. */
static int fill(struct ps_region *region, int fd, int name_fd) {
    int rc = cache(&region->memory, PS_MEMORY, fd);
    if (!rc)
        rc = cache(&region->entry, PS_ENTRY, name_fd);
    if (!rc)
        rc = ps_region_place(region);
    return rc ? rc : map_here(region);
}

int ps_attach(int fd, int name_fd, enum ps_engine engine, struct ps_region **out, const char **field) {
    struct ps_shape shape;
    int rc = ps_region_validate(fd, &shape, field);
    if (!rc)
        rc = ps_participant_start();
    if (rc)
        return rc;
    struct ps_region *region = ps_process_claim();
    if (!region)
        return PS_EREGIONS;
    region->shape = shape;
    region->engine = engine;
    region->policy = shape.policy;
    rc = fill(region, fd, name_fd);
    if (rc)
        ps_region_discard(region);
    *out = region;
    return rc;
}

int ps_join(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome, const char **field) {
    int rc = ps_agent_start(region, deadline, outcome);
    if (rc == PS_ESIGNAL)
        return rc;
    /* So that the marks do not go with the agent, and that calls need not wait for it (ps_agent_help). */
    int fd = rc || !region->uffd ? 0 : ps_cached_get(region, &region->userfault);
    if (fd == -EMFILE || fd == -ENFILE) {
        ps_agent_stop(region);
        rc = fd;
    }
    if (rc) {
        *field = atomic_load_explicit(&region->corrupt, memory_order_relaxed);
        ps_region_discard(region);
        return rc;
    }
    atomic_store_explicit(&region->use, PS_OPEN, memory_order_release);
    ps_fault_stack();
    ps_fault_install();
    sigset_t blocked;
    ps_fault_unblock(true, &blocked); /* for good, and for the threads that this one starts */
    return 0;
}

void ps_join_abandon(struct ps_region *region) {
    ps_agent_stop(region);
    ps_region_discard(region);
}

/* At once, so that no fork comes in between: a child of a process that is closing it has no part in it. */
int ps_close_begin(struct ps_region *region) {
    uint32_t open = PS_OPEN;
    return ps_process_known() && atomic_compare_exchange_strong_explicit(&region->use, &open, PS_CLOSING,
                                                                         memory_order_acq_rel, memory_order_relaxed)
               ? 0
               : PS_ECLOSED;
}

void ps_close(struct ps_region *region) {
    ps_agent_stop(region);
    ps_region_shut(region);
}

void ps_release(struct ps_region *region) {
    if (!ps_process_known())
        return;
    uintptr_t base = atomic_exchange_explicit(&region->base, 0, memory_order_acq_rel);
    if (base)
        munmap((void *)base, region->span);
    if (region->here)
        munmap((void *)region->here, here_length(region));
    region->here = NULL;
    if (region->counts)
        munmap((void *)region->counts, PS_TIDS * sizeof *region->counts);
    region->counts = NULL;
    atomic_store_explicit(&region->use, PS_UNUSED, memory_order_release);
}

int ps_ready_now(const struct ps_region *region) {
    if (!ps_process_known() || atomic_load_explicit(&region->use, memory_order_acquire) != PS_OPEN)
        return PS_ECLOSED;
    return ps_running(region) && ps_slot_marked(region);
}

static int be_ready(struct ps_region *region, struct ps_outcome *outcome) {
    int rc = ps_ready_now(region);
    if (rc)
        return rc < 0 ? rc : 0;
    if (ps_running(region) && !ps_agent_lost(region))
        return 0;
    rc = ps_agent_start(region, ps_sys_now() + PS_JOIN_TIMEOUT, outcome);
    if (!rc)
        ps_cached_get(region, &region->userfault);
    return rc;
}

int ps_ready(struct ps_region *region, struct ps_outcome *outcome) {
    outcome->silent = 0;
    int rc = be_ready(region, outcome);
    if (rc)
        return rc;
    ps_freeze_notice(region, GLANCE);
    ps_snapshot_notice(region);
    return 0;
}
