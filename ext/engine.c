/* engine.c - how page tables change: by VMA, or by entry.
 *
 * Lives here: making our own page tables follow the map, by mprotect or by
 * userfaultfd; and the fence.  Which pages are private for a while is
 * quarantine.c's: where the map is followed, that ends.
 *
 * The uffd engine cares for chunks of PS_CHUNK pages, those of one page table.
 * A chunk is plain, its protection that of its VMAs, until the first page of it
 * is to be written; then it is armed: registered with our userfaultfd, VMA
 * read-write, and every page that may only be read marked in its entry.  From
 * then on READ <-> READ_WRITE is a change of entries, which anybody who has our
 * userfaultfd can make, and splits no VMA.  Pages with other protections lie in
 * VMAs of their own: the chunk is split.
 *   plain -> armed   register, mark, then mprotect; all of it with the claim
 *   armed -> plain   mprotect to READ, then unregister: a whole chunk of READ
 *                    needs no page table
 * Invariants
 *  1. No waiting but for our own locks, and no writes to shared state.
 *  2. Called under the page lock; to arm or disarm, with the claim (lock.c):
 *     a caller outside takes "registered" for "marks are all there is to it".
 *  3. Rights come from the map and from our own leases alone; what the map says
 *     is masked, never trusted.
 *  4. A page is marked before its VMA becomes writable.
 * Runs in: caller, agent; ps_engine_refuse in the signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "participant.h"

#define BLOCK 256u /* chunks that are compared at once */

static_assert(PROT_READ == 1 && PROT_WRITE == 2 && PROT_EXEC == 4, "map bytes are PROT_* of x86-64 Linux");

enum {
    ARMED = 1, /* registered */
    SPLIT = 2, /* ... and its VMAs may differ from read-write */
};

static bool leased_here(const struct ps_region *region, uint64_t page) {
    uint32_t held = PS_HERE_HELD | PS_HERE_IN_PLACE;
    return (ps_here(region, page) & held) == held;
}

/* As ps_run, of what the map says, but not writable where a snapshot has not got the page yet. */
static uint64_t shared_run(struct ps_region *region, uint64_t page, uint64_t end, uint32_t *prot) {
    uint64_t run = ps_run(region, page, end, prot);
    bool open;
    if (!(*prot & PROT_WRITE) || !ps_snapshots(region))
        return run;
    run = ps_snapshot_run(region, page, page + run, &open);
    if (!open)
        *prot = (*prot & ~(uint32_t)PROT_WRITE) | PROT_READ;
    return run;
}

/* As ps_run, of what our page tables should be: what all have, and read-write where we hold a lease (whose taker has
 * saved the pages). */
static uint64_t wanted_run(struct ps_region *region, uint64_t page, uint64_t end, uint32_t *prot) {
    uint64_t run = shared_run(region, page, end, prot), same = 1;
    if (!atomic_load_explicit(&region->leased, memory_order_acquire))
        return run;
    bool leased = leased_here(region, page);
    while (same < run && leased_here(region, page + same) == leased)
        same++;
    if (leased && *prot == PROT_READ)
        *prot = PROT_READ | PROT_WRITE;
    return same;
}

static uintptr_t address(const struct ps_region *region, uint64_t page) {
    return (uintptr_t)ps_address(region) + page * PS_PAGE;
}

static int set_vma(struct ps_region *region, uint64_t page, uint64_t count, uint32_t prot) {
    return mprotect((void *)address(region, page), count * PS_PAGE, (int)prot) ? -errno : 0;
}

/* -- Entries --------------------------------------------------------------------------------------------------- */

/* Marks pages against stores, or takes the marks away.  The program may have closed its copy of the userfaultfd: then
 * its number gives an error, or is of another file, which gives one too (ps_process_took sees to our own files). */
static int mark(struct ps_region *region, uint64_t page, uint64_t count, bool on) {
    bool agent = ps_process_is_agent(region);
    int fd = agent ? region->own_userfault : atomic_load_explicit(&region->userfault.fd, memory_order_relaxed);
    int rc = ps_sys_uffd_protect(fd, address(region, page), count * PS_PAGE, on);
    if (!rc || agent)
        return rc;
    fd = ps_cached_get(region, &region->userfault);
    return fd < 0 ? fd : ps_sys_uffd_protect(fd, address(region, page), count * PS_PAGE, on);
}

/* For register and unregister, which another region's userfaultfd would take for its own. */
static int checked_fd(struct ps_region *region) {
    return ps_process_is_agent(region) ? region->own_userfault : ps_cached_get(region, &region->userfault);
}

static uint8_t chunk_state(const struct ps_region *region, uint64_t chunk) {
    return region->chunk[chunk];
}

static void set_chunks(struct ps_region *region, uint64_t page, uint64_t count, uint8_t state) {
    uint64_t first = page / PS_CHUNK, end = (page + count + PS_CHUNK - 1) / PS_CHUNK;
    memset(region->chunk + first, state, end - first);
}

/* From `page` on: how many pages of the range lie in chunks of the same state. */
static uint64_t same_chunks(const struct ps_region *region, uint64_t page, uint64_t end, uint8_t *state) {
    const uint8_t *first = region->chunk + page / PS_CHUNK;
    uint64_t chunks = (end + PS_CHUNK - 1) / PS_CHUNK - page / PS_CHUNK, same = 1;
    *state = *first;
    while (same < chunks && first[same] == *state) {
        uint64_t block = chunks - same < BLOCK ? 1 : BLOCK;
        if (memcmp(first + same - 1, first + same, block)) /* each equals the one before it */
            block = 1;
        same += block;
    }
    uint64_t edge = (page / PS_CHUNK + same) * PS_CHUNK;
    return (edge < end ? edge : end) - page;
}

/* How many of the `count` pages from `page` on make whole chunks, from `page` on. */
static uint64_t whole_chunks(uint64_t page, uint64_t count) {
    return page % PS_CHUNK ? 0 : count / PS_CHUNK * PS_CHUNK;
}

static int enlist(struct ps_region *region, uint64_t page, uint64_t count) {
    int fd = checked_fd(region);
    int rc = fd < 0 ? fd : ps_sys_uffd_register(fd, address(region, page), count * PS_PAGE);
    if (!rc)
        set_chunks(region, page, count, ARMED | SPLIT);
    return rc;
}

static bool by_entry(uint32_t prot) {
    return prot & (PROT_READ | PROT_WRITE) && !(prot & PROT_EXEC);
}

/* The VMAs of a chunk whose pages are marked as they should be; those by entry are read-write all together. */
static int settle_vmas(struct ps_region *region, uint64_t first, uint64_t end) {
    bool split = false;
    int rc = 0;
    for (uint64_t page = first, run, next; page < end && !rc; page += run) {
        uint32_t prot, other;
        run = wanted_run(region, page, end, &prot);
        while (by_entry(prot) && page + run < end &&
               (next = wanted_run(region, page + run, end, &other), by_entry(other)))
            run += next;
        split |= !by_entry(prot);
        rc = set_vma(region, page, run, by_entry(prot) ? PROT_READ | PROT_WRITE : prot);
    }
    if (!rc && !split)
        set_chunks(region, first, end - first, ARMED);
    return rc;
}

/* One chunk, some pages of which are to be written. */
static int arm(struct ps_region *region, uint64_t chunk) {
    uint64_t first = chunk * PS_CHUNK, end = first + PS_CHUNK;
    if (end > region->shape.pages)
        end = region->shape.pages;
    int rc = enlist(region, first, end - first);
    if (!rc)
        rc = mark(region, first, end - first, true);
    for (uint64_t page = first, run; page < end && !rc; page += run) {
        uint32_t prot;
        run = wanted_run(region, page, end, &prot);
        if (by_entry(prot) && prot & PROT_WRITE)
            rc = mark(region, page, run, false);
    }
    return rc ? rc : settle_vmas(region, first, end);
}

/* Whole chunks, all of whose pages are to be written: nothing to mark, so no page table is made. */
static int arm_open(struct ps_region *region, uint64_t page, uint64_t count) {
    int rc = enlist(region, page, count);
    if (!rc)
        rc = set_vma(region, page, count, PROT_READ | PROT_WRITE);
    if (!rc)
        set_chunks(region, page, count, ARMED);
    return rc;
}

static int disarm(struct ps_region *region, uint64_t page, uint64_t count) {
    set_chunks(region, page, count, ARMED | SPLIT);
    int rc = set_vma(region, page, count, PROT_READ);
    int fd = rc ? -1 : checked_fd(region);
    if (!rc)
        rc = fd < 0 ? fd : ps_sys_uffd_unregister(fd, address(region, page), count * PS_PAGE);
    if (!rc)
        set_chunks(region, page, count, 0);
    return rc;
}

/* Pages of armed chunks of one state: marked or not, in a VMA that is read-write. */
static int set_entries(struct ps_region *region, uint64_t page, uint64_t count, uint8_t state, bool marked) {
    int rc = mark(region, page, count, marked);
    if (rc || !(state & SPLIT))
        return rc;
    rc = set_vma(region, page, count, PROT_READ | PROT_WRITE);
    uint64_t skip = (PS_CHUNK - page % PS_CHUNK) % PS_CHUNK;
    uint64_t whole = count > skip ? whole_chunks(page + skip, count - skip) : 0;
    if (!rc && whole)
        set_chunks(region, page + skip, whole, ARMED);
    return rc;
}

static int set_read(struct ps_region *region, uint64_t page, uint64_t end) {
    int rc = 0;
    for (uint64_t run; page < end && !rc; page += run) {
        uint8_t state;
        run = same_chunks(region, page, end, &state);
        uint64_t whole = whole_chunks(page, run);
        if (!(state & ARMED)) {
            rc = set_vma(region, page, run, PROT_READ);
        } else if (whole) {
            run = whole;
            rc = disarm(region, page, run);
        } else {
            uint64_t edge = (page / PS_CHUNK + 1) * PS_CHUNK - page; /* whole ones may follow it */
            run = run < edge ? run : edge;
            rc = set_entries(region, page, run, state, true);
        }
    }
    return rc;
}

static int set_writable(struct ps_region *region, uint64_t page, uint64_t end) {
    int rc = 0;
    for (uint64_t run; page < end && !rc; page += run) {
        uint8_t state;
        run = same_chunks(region, page, end, &state);
        uint64_t whole =
            end == region->shape.pages && page % PS_CHUNK == 0 && page + run == end ? run : whole_chunks(page, run);
        if (state & ARMED) {
            rc = set_entries(region, page, run, state, false);
        } else if (whole) {
            run = whole;
            rc = arm_open(region, page, run);
        } else {
            uint64_t edge = (page / PS_CHUNK + 1) * PS_CHUNK - page;
            run = run < edge ? run : edge;
            rc = arm(region, page / PS_CHUNK);
        }
    }
    return rc;
}

static int set_other(struct ps_region *region, uint64_t page, uint64_t end, uint32_t prot) {
    for (uint64_t chunk = page / PS_CHUNK; chunk * PS_CHUNK < end; chunk++)
        if (chunk_state(region, chunk) & ARMED)
            set_chunks(region, chunk * PS_CHUNK, 1, ARMED | SPLIT);
    return set_vma(region, page, end - page, prot);
}

/* -- Following -------------------------------------------------------------------------------------------------- */

static int set(struct ps_region *region, uint64_t page, uint64_t end, uint32_t prot) {
    if (!region->uffd)
        return set_vma(region, page, end - page, prot);
    if (!by_entry(prot))
        return set_other(region, page, end, prot);
    return prot & PROT_WRITE ? set_writable(region, page, end) : set_read(region, page, end);
}

static int follow(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = 0;
    for (uint64_t page = first, end = first + count, run; page < end && !rc; page += run) {
        uint32_t prot;
        run = wanted_run(region, page, end, &prot);
        rc = set(region, page, page + run, prot);
    }
    return rc;
}

int ps_engine_apply(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = region->quarantines ? ps_quarantine_end(region, &first, &count) : 0;
    return rc ? rc : follow(region, first, count);
}

/* Pages that were in quarantine are shared, and no-access until they follow the map.  In armed chunks registered again:
 * what comes next marks them, and then makes them writable (invariant 4). */
int ps_engine_restore(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = ps_region_map_again(region, first, count);
    for (uint64_t page = first, end = first + count, run; region->uffd && page < end && !rc; page += run) {
        uint8_t state;
        run = same_chunks(region, page, end, &state);
        if (state & ARMED)
            rc = enlist(region, page, run);
    }
    return rc;
}

/* Taking all rights from the whole mapping merges its VMAs, so it succeeds where nothing else does.  Should it
 * fail all the same, no participant is better than one with rights that it must not have. */
void ps_engine_fence(struct ps_region *region) {
    ps_engine_doubt(region);
    if (mprotect(ps_address(region), region->shape.pages * PS_PAGE, PROT_NONE) && ps_region_unmap_data(region))
        __builtin_trap();
}

static bool all_armed(const struct ps_region *region, uint64_t first, uint64_t count) {
    for (uint64_t chunk = first / PS_CHUNK; chunk * PS_CHUNK < first + count; chunk++)
        if (!(chunk_state(region, chunk) & ARMED))
            return false;
    return true;
}

static int follow_lease(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline) {
    int rc = ps_page_lock(region, deadline);
    if (rc)
        return rc;
    bool arms = region->uffd && (!all_armed(region, first, count) || region->quarantines);
    if (arms) {
        ps_page_unlock(region);
        rc = ps_pages_take(region, deadline);
        if (rc)
            return rc;
    }
    if (region->unsynced)
        ps_engine_doubt(region);
    rc = region->fenced ? -EACCES : ps_engine_apply(region, first, count);
    if (arms)
        ps_claim_release(region, region->slot);
    ps_page_unlock(region);
    return rc;
}

/* A lease in place begins or ends: its words in `here` have been written, the page tables follow them.  No change of
 * protection concerns these pages now; but arming their chunk concerns its other pages too. */
int ps_engine_lease(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline) {
    int rc = follow_lease(region, first, count, deadline);
    /* Our agent may have to give us its userfaultfd by itself, and have waited for the page lock meanwhile. */
    if (rc == -EBADF && ps_cached_get(region, &region->userfault) >= 0)
        rc = follow_lease(region, first, count, deadline);
    return rc;
}

/* -- Beginning, and violations ----------------------------------------------------------------------------------- */

/* In a new agent, whose table it stays in.  The program gets a copy, lest the marks go with the agent. */
int ps_engine_open(struct ps_region *region) {
    region->uffd = false;
    region->own_userfault = -1;
    if (region->engine == PS_ENGINE_MPROTECT)
        return 0;
    if (region->shape.unit > 1) /* a mark is of a whole huge page, and chunks are of one page table of small ones */
        return region->engine == PS_ENGINE_AUTO ? 0 : -EOPNOTSUPP;
    int fd = ps_sys_userfaultfd();
    if (fd < 0)
        return region->engine == PS_ENGINE_AUTO ? 0 : fd;
    region->own_userfault = fd;
    region->uffd = true;
    return ps_cached_identify(&region->userfault, PS_USERFAULT, fd);
}

/* The kernel took every mark away with the last descriptor. */
void ps_engine_forget(struct ps_region *region) {
    ps_engine_fence(region);
    set_chunks(region, 0, region->shape.pages, 0);
}

/* VMAs may not be what the states of the chunks say. */
void ps_engine_doubt(struct ps_region *region) {
    for (uint64_t chunk = 0; region->uffd && chunk < ps_chunks(&region->shape); chunk++)
        if (chunk_state(region, chunk) & ARMED)
            set_chunks(region, chunk * PS_CHUNK, 1, ARMED | SPLIT);
}

/* Our page tables refuse what they should allow: somebody changed them behind our back, or they are late. */
int ps_engine_mend(struct ps_region *region, uint64_t page) {
    if (!region->uffd)
        return ps_engine_apply(region, ps_unit_of(region, page), region->shape.unit);
    uint64_t first = page / PS_CHUNK * PS_CHUNK, rest = region->shape.pages - first;
    if (chunk_state(region, page / PS_CHUNK) & ARMED)
        set_chunks(region, page, 1, ARMED | SPLIT);
    return ps_engine_apply(region, first, rest < PS_CHUNK ? rest : PS_CHUNK);
}

/* A forbidden store to a marked page is a SIGBUS.  When the instruction runs again, it is the SIGSEGV that it is by
 * mprotect.  Nobody can open the page from outside then, until we have followed the whole map again. */
void ps_engine_refuse(struct ps_region *region, uint64_t page) {
    atomic_fetch_and_explicit(&ps_slot(region, region->slot)->capabilities, ~PS_CAN_UFFD, memory_order_acq_rel);
    region->unsynced = true;
    set_vma(region, page, 1, PROT_READ);
}
