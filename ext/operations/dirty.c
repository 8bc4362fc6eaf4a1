/* dirty.c - which pages may have been written since a moment, and writing pages whatever their protection.
 *
 * Whoever writes a page leaves a trace of that in some word of the control
 * segment, and may move it to another word while ps_dirty looks:
 *   a lease ends       the page's stamp, then its held word: free
 *   a page turns READ  the record: open, then the map, then the ring and the generation, then the record: closed
 *   a page is zero     restored: its stamp, then the hole
 *   D1_look    between the looks at two kinds of words
 *   P1_put     a restored page: what snapshots need of it is saved, and it is not stored to yet
 * Invariants
 *  1. Words are looked at against the order in which they are written: held
 *     words before stamps; the map before the record, and that before the
 *     generation and the ring; holes before stamps.  So a trace that is there
 *     when ps_dirty begins is found in one place or in the other.
 *  2. A hole was never written only where it has no stamp, and no holder.
 *  3. Whoever stores here is counted as the holder of a lease is: a snapshot's
 *     moment comes before what it saves for ACTIVE ones, or after its stores.
 * Runs in: caller.
 * Not here: the stamps of leases (hold/lease.c), saving pages (pages/save.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "change/change.h"
#include "core.h"
#include "hold/hold.h"
#include "operations/operations.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

/* What is known of a page. */
enum {
    SHARED = 1, /* it may have been writable for all */
    LEASED = 2, /* a lease was held over it, or it was restored */
    HOLE = 4,   /* it was a hole of the memfd when the look began */
};

/* The control segments of two regions tell them apart. */
bool ps_snapshot_of(const struct ps_region *region, const struct ps_snapshot *snapshot) {
    return snapshot->pages == region->shape.pages &&
           !memcmp(snapshot->control->nonce, region->shape.nonce, sizeof region->shape.nonce);
}

static void mark(uint8_t *map, uint64_t first, uint64_t count, uint8_t bit) {
    for (uint64_t page = first; page < first + count; page++)
        map[page] |= bit;
}

static void mark_holes(struct ps_region *region, uint8_t *map) {
    uint64_t data = region->shape.control_size, end = data + region->shape.pages * PS_PAGE;
    for (uint64_t at = data, found; at < end; at = ps_region_skip_data(region, found, end)) {
        found = ps_region_skip_hole(region, at, end);
        mark(map, (at - data) / PS_PAGE, (found - at) / PS_PAGE, HOLE);
    }
}

/* Pages whose word in the section is at least `least`.  acquire: who finds a held word free finds the stamp. */
static void mark_leased(struct ps_region *region, enum ps_section_kind kind, uint64_t least, uint64_t bits,
                        uint8_t *map) {
    const _Atomic uint64_t *words = ps_section(region, kind);
    uint64_t pages = region->shape.pages, offset = region->shape.offset[kind], per_page = PS_PAGE / sizeof *words;
    for (uint64_t page = 0; page < pages; page++) {
        if (page % per_page == 0)
            page =
                (ps_region_skip_hole(region, offset + page * sizeof *words, offset + pages * sizeof *words) - offset) /
                sizeof *words;
        if (page < pages && (atomic_load_explicit(words + page, memory_order_acquire) & bits) >= least)
            map[page] |= LEASED;
    }
}

/* Pages that all may write now. */
static void mark_writable(struct ps_region *region, uint8_t *map) {
    uint64_t pages = region->shape.pages;
    for (uint64_t page = 0, run; page < pages; page += run) {
        uint32_t prot;
        run = ps_run(region, page, pages, &prot);
        if (prot & PROT_WRITE)
            mark(map, page, run, SHARED);
    }
}

/* Pages whose protection changed since, whatever it was; and by a change that was not over when it was given out as
 * since when: until it is, whoever does not follow it stores. */
static void mark_changed(struct ps_region *region, uint64_t since, uint8_t *map) {
    uint64_t open, first, count, oldest = since && !ps_change_told_early(region, since) ? since + 1 : since;
    if (ps_change_under_way(region, &open, &first, &count) && open > since)
        mark(map, first, count, SHARED);
    for (uint64_t generation = ps_generation(region); generation && generation >= oldest; generation--) {
        struct ps_shm_ring entry;
        if (!ps_change_read(region, generation, &entry)) { /* longer ago than the ring remembers */
            mark(map, 0, region->shape.pages, SHARED);
            return;
        }
        if (!(entry.prot & PS_FOLLOWS))
            mark(map, entry.first, entry.count, SHARED);
    }
}

/* All that was there when we began, in the order of invariant 1. */
static void look(struct ps_region *region, uint64_t since, uint8_t *map) {
    mark_holes(region, map);
    PS_POINT(D1_look);
    mark_leased(region, PS_SEC_LEASE, 1, PS_HELD_HOLDER & ~PS_HELD_WAITING, map); /* who waits has none */
    PS_POINT(D1_look);
    mark_leased(region, PS_SEC_STAMP, since ? since : 1, UINT64_MAX, map); /* 0 also says: none */
    PS_POINT(D1_look);
    mark_writable(region, map);
    PS_POINT(D1_look);
    mark_changed(region, since, map);
    if (!since) /* all that there ever was, whoever wrote it */
        mark(map, 0, region->shape.pages, SHARED);
}

int ps_dirty(struct ps_region *region, const struct ps_snapshot *since, uint64_t generation, uint8_t *map) {
    uint64_t pages = region->shape.pages;
    memset(map, 0, pages);
    look(region, generation, map);
    for (uint64_t page = 0; page < pages; page++) {
        bool dirty = map[page] & LEASED || map[page] == SHARED;
        if (since && map[page] == SHARED) {
            int rc = ps_snapshot_differs(since, page, &dirty);
            if (rc)
                return rc;
        }
        map[page] = dirty;
    }
    return since ? ps_snapshot_alive(since) : 0;
}

/* -- Writing ----------------------------------------------------------------------------------------------------- */

static int put_page(struct ps_region *region, int fd, uint64_t page, const char *from, uint64_t length) {
    uint64_t at = region->shape.control_size + page * PS_PAGE;
    ps_stamp(region, page, ps_generation(region));
    if (region->shape.unit > 1) /* no system call writes to huge pages */
        return ps_copy_bytes((char *)ps_window(region) + page * PS_PAGE, from, length).left ? -EFAULT : 0;
    bool hole = length == PS_PAGE && !(region->shape.flags & PS_REGION_RESERVED) && ps_all_zero(from, PS_PAGE);
    return hole ? ps_sys_punch(fd, at, PS_PAGE) : ps_sys_write_at(fd, from, length, at);
}

static int put_pages(struct ps_region *region, int fd, uint64_t first, const char *from, uint64_t length) {
    uint64_t count = (length + PS_PAGE - 1) / PS_PAGE;
    uint32_t nobody;
    int rc = ps_snapshot_keep(region, first, count, PS_NEVER, &nobody);
    for (uint64_t i = 0; i < count && !rc; i++) {
        uint64_t rest = length - i * PS_PAGE;
        PS_POINT(P1_put);
        rc = put_page(region, fd, first + i, from + i * PS_PAGE, rest < PS_PAGE ? rest : PS_PAGE);
    }
    return rc;
}

int ps_put(struct ps_region *region, uint64_t offset, const void *from, uint64_t length) {
    int rc = region->shape.unit > 1 ? ps_lease_window(region, PS_NEVER) : 0;
    if (rc || (rc = ps_lease_enter(region)))
        return rc;
    int fd = ps_fd(region); /* after the wait, in which the program may have given its number to another file */
    sigset_t blocked;
    ps_fault_unblock(true, &blocked);
    rc = fd < 0 ? fd : put_pages(region, fd, offset / PS_PAGE, from, length);
    ps_fault_block_again(&blocked);
    ps_lease_leave(region);
    return ps_waited(rc);
}
