/* image.c - a snapshot as one of its holders has it: read, saved, viewed, passed on.
 *
 * Independent of the region's handle, and so of being a participant: the
 * descriptor is of a description of its own, whose read lock on the snapshot's
 * byte keeps its area; the control segment is mapped through it.
 * Invariants
 *  1. A page is read from its area where it is SAVED or the snapshot COMPLETE;
 *     else from the data, and then both are looked at again: what a page is until
 *     then does not change.
 *  2. While we hold the byte the area is ours; should the word be another all
 *     the same, the snapshot was given up, and that is an error, not an image.
 *  3. COMPLETE says that every page that the data had at the moment is SAVED; what
 *     was a hole then is one of the area.
 * Runs in: caller; any number of threads may read.
 * Not here: taking one (snapshot.c), saving on the way of a store (pages/save.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "operations/operations.h"
#include "os/os.h"
#include "os/point.h"
#include "process/process.h"
#include "segment/segment.h"

#define BLOCK 16u /* pages that are copied at once */

static struct ps_shm_snapshot *shared_of(const struct ps_snapshot *snapshot) {
    return &snapshot->control->snapshot[snapshot->index];
}

static _Atomic uint8_t *states_of(const struct ps_snapshot *snapshot) {
    return (_Atomic uint8_t *)snapshot->control + snapshot->states;
}

static uint64_t area_offset(const struct ps_snapshot *snapshot) {
    return snapshot->control_size + (1 + (uint64_t)snapshot->index) * snapshot->pages * PS_PAGE;
}

/* PS_SNAPSHOT_ACTIVE or PS_SNAPSHOT_COMPLETE; or an error. */
static int state_of(const struct ps_snapshot *snapshot) {
    uint32_t word = atomic_load_explicit(&shared_of(snapshot)->word, memory_order_seq_cst);
    uint32_t state = word & PS_SNAPSHOT_MASK;
    if ((word & ~PS_SNAPSHOT_MASK) != snapshot->word || (state != PS_SNAPSHOT_ACTIVE && state != PS_SNAPSHOT_COMPLETE))
        return PS_ECORRUPT;
    return (int)state;
}

int ps_snapshot_alive(const struct ps_snapshot *snapshot) {
    int rc = state_of(snapshot);
    return rc < 0 ? rc : 0;
}

bool ps_snapshot_complete(const struct ps_snapshot *snapshot) {
    return state_of(snapshot) == PS_SNAPSHOT_COMPLETE;
}

int ps_snapshot_map(struct ps_snapshot *snapshot, const struct ps_shape *shape) {
    snapshot->control_size = shape->control_size;
    snapshot->size = shape->size;
    snapshot->pages = shape->pages;
    snapshot->states = shape->offset[PS_SEC_STATE] + snapshot->index * ps_state_stride(shape->pages);
    void *got = mmap(NULL, shape->control_size, PROT_READ | PROT_WRITE, MAP_SHARED, snapshot->fd, 0);
    if (got == MAP_FAILED)
        return -errno;
    snapshot->control = got;
    return madvise(got, shape->control_size, MADV_DONTDUMP) ? -errno : 0;
}

int ps_snapshot_adopt(int fd, uint32_t index, uint32_t word, uint64_t generation, struct ps_snapshot *snapshot,
                      const char **field) {
    struct ps_shape shape;
    *snapshot = (struct ps_snapshot){.fd = fd, .index = index, .word = word, .generation = generation};
    int rc = ps_region_validate(fd, &shape, field);
    if (!rc && index >= shape.areas) {
        *field = "snapshot";
        rc = PS_ECORRUPT;
    }
    if (!rc)
        rc = ps_snapshot_map(snapshot, &shape);
    if (!rc && (rc = state_of(snapshot)) > 0)
        rc = 0;
    if (rc == PS_ECORRUPT && !*field)
        *field = "snapshot";
    if (rc)
        ps_snapshot_close(snapshot);
    return rc;
}

void ps_snapshot_close(struct ps_snapshot *snapshot) {
    if (snapshot->control)
        munmap(snapshot->control, snapshot->control_size);
    if (snapshot->fd >= 0)
        close(snapshot->fd);
    snapshot->control = NULL;
    snapshot->fd = -1;
}

/* -- Reading --------------------------------------------------------------------------------------------------- */

static int read_all(const struct ps_snapshot *snapshot, uint64_t from, char *to, uint64_t length) {
    while (length) {
        ssize_t got = pread(snapshot->fd, to, length, (off_t)from);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
        from += (uint64_t)got;
        to += got;
        length -= (uint64_t)got;
    }
    return 0;
}

static bool in_area(const struct ps_snapshot *snapshot, uint64_t page) {
    return atomic_load_explicit(states_of(snapshot) + page, memory_order_acquire) == PS_SAVED;
}

/* Bytes from `offset` on, at most `length`, whose pages lie in the same place, and in at most BLOCK of them. */
static uint64_t stretch(const struct ps_snapshot *snapshot, uint64_t offset, uint64_t length, bool area) {
    uint64_t page = offset / PS_PAGE, last = (offset + length - 1) / PS_PAGE, from = page;
    while (page < last && page - from < BLOCK - 1 && in_area(snapshot, page + 1) == area)
        page++;
    return page == last ? length : (page + 1) * PS_PAGE - offset;
}

/* How much of what was copied from the data was the snapshot's until the copy was made. */
static uint64_t unsaved_still(const struct ps_snapshot *snapshot, uint64_t offset, uint64_t length) {
    uint64_t page = offset / PS_PAGE, last = (offset + length - 1) / PS_PAGE;
    atomic_thread_fence(memory_order_seq_cst); /* the copy before the look */
    if (ps_snapshot_complete(snapshot))
        return 0;
    for (; page <= last; page++)
        if (in_area(snapshot, page))
            return page * PS_PAGE > offset ? page * PS_PAGE - offset : 0;
    return length;
}

int ps_snapshot_read(const struct ps_snapshot *snapshot, uint64_t offset, void *to, uint64_t length) {
    char *at = to;
    while (length) {
        int rc = state_of(snapshot);
        if (rc < 0)
            return rc;
        if (rc == PS_SNAPSHOT_COMPLETE) {
            rc = read_all(snapshot, area_offset(snapshot) + offset, at, length);
            return rc ? rc : ps_snapshot_alive(snapshot);
        }
        bool area = in_area(snapshot, offset / PS_PAGE);
        uint64_t part = stretch(snapshot, offset, length, area);
        rc = read_all(snapshot, (area ? area_offset(snapshot) : snapshot->control_size) + offset, at, part);
        if (rc)
            return rc;
        if (!area)
            part = unsaved_still(snapshot, offset, part);
        offset += part;
        at += part;
        length -= part;
    }
    return ps_snapshot_alive(snapshot);
}

/* Only a page that is SAVED, or any of a complete one, can have been written since. */
int ps_snapshot_differs(const struct ps_snapshot *snapshot, uint64_t page, bool *differs) {
    char then[PS_PAGE], now[PS_PAGE];
    *differs = false;
    if (!in_area(snapshot, page) && !ps_snapshot_complete(snapshot))
        return 0;
    int rc = read_all(snapshot, area_offset(snapshot) + page * PS_PAGE, then, PS_PAGE);
    if (!rc)
        rc = read_all(snapshot, snapshot->control_size + page * PS_PAGE, now, PS_PAGE);
    *differs = memcmp(then, now, PS_PAGE);
    return rc;
}

/* -- Saving ---------------------------------------------------------------------------------------------------- */

static int write_page(const struct ps_snapshot *snapshot, uint64_t page, const char *bytes) {
    _Atomic uint8_t *state = states_of(snapshot) + page;
    if (atomic_load_explicit(state, memory_order_acquire) == PS_SAVED)
        return 0;
    int rc = ps_all_zero(bytes, PS_PAGE)
                 ? 0
                 : ps_sys_write_at(snapshot->fd, bytes, PS_PAGE, area_offset(snapshot) + page * PS_PAGE);
    if (rc)
        return rc;
    PS_POINT(S6_save);
    /* release: who finds it SAVED finds the copy. */
    atomic_store_explicit(state, PS_SAVED, memory_order_release);
    return 0;
}

static int save_block(const struct ps_snapshot *snapshot, uint64_t page, uint64_t count) {
    char bytes[BLOCK * PS_PAGE];
    int rc = read_all(snapshot, snapshot->control_size + page * PS_PAGE, bytes, count * PS_PAGE);
    atomic_thread_fence(memory_order_seq_cst); /* the copy before the looks */
    for (uint64_t i = 0; i < count && !rc; i++)
        rc = write_page(snapshot, page + i, bytes + i * PS_PAGE);
    return rc;
}

/* The first page from `page` on that the data has; without an answer every one counts. */
static uint64_t next_page(const struct ps_snapshot *snapshot, uint64_t page) {
    off_t found = lseek(snapshot->fd, (off_t)(snapshot->control_size + page * PS_PAGE), SEEK_DATA);
    if (found < 0)
        return errno == ENXIO ? snapshot->pages : page;
    return ((uint64_t)found - snapshot->control_size) / PS_PAGE;
}

static int save_part(const struct ps_snapshot *snapshot, uint64_t first, uint64_t end) {
    while (first < end && in_area(snapshot, first))
        first++;
    while (first < end && in_area(snapshot, end - 1))
        end--;
    return first < end ? save_block(snapshot, first, end - first) : 0;
}

static void complete(const struct ps_snapshot *snapshot) {
    uint32_t active = snapshot->word | PS_SNAPSHOT_ACTIVE;
    PS_POINT(S7_complete);
    /* seq_cst: the copies before it.  It fails where another holder was first, or the snapshot is given up. */
    atomic_compare_exchange_strong_explicit(&shared_of(snapshot)->word, &active, snapshot->word | PS_SNAPSHOT_COMPLETE,
                                            memory_order_seq_cst, memory_order_relaxed);
}

int ps_snapshot_save(struct ps_snapshot *snapshot, uint64_t *page, uint64_t count) {
    uint64_t pages = snapshot->pages, from = *page;
    for (;;) {
        int rc = state_of(snapshot);
        if (rc != PS_SNAPSHOT_ACTIVE)
            return rc == PS_SNAPSHOT_COMPLETE ? 0 : rc;
        if (*page - from >= count)
            return 1;
        uint64_t first = *page < pages ? next_page(snapshot, *page) : pages;
        *page = first + BLOCK < pages ? first + BLOCK : pages;
        if (first >= pages)
            complete(snapshot);
        else if ((rc = save_part(snapshot, first, *page)))
            return rc;
        ps_sys_yield(); /* to whoever stores */
    }
}

int ps_snapshot_view(const struct ps_snapshot *snapshot, void **at) {
    void *got =
        mmap(NULL, snapshot->pages * PS_PAGE, PROT_READ, MAP_SHARED, snapshot->fd, (off_t)area_offset(snapshot));
    if (got == MAP_FAILED)
        return -errno;
    *at = got;
    return 0;
}

void ps_snapshot_unview(void *at, uint64_t pages) {
    munmap(at, pages * PS_PAGE);
}

uint64_t ps_snapshot_saved(const struct ps_snapshot *snapshot) {
    uint64_t saved = 0;
    for (uint64_t page = 0; page < snapshot->pages; page++)
        saved += in_area(snapshot, page);
    return saved;
}

int ps_snapshot_data(const struct ps_snapshot *snapshot, bool area, uint64_t *page, uint64_t *count) {
    *count = 0;
    if (!area && ps_snapshot_complete(snapshot))
        return 0; /* it has nothing in the data */
    uint64_t begin = area ? area_offset(snapshot) : snapshot->control_size;
    return ps_region_data(snapshot->fd, begin, snapshot->pages, page, count);
}
