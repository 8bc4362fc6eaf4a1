/* engine.c - how page tables change: by VMA, or by entry.
 *
 * Lives here: making our own page tables follow the map, by mprotect or by
 * userfaultfd; and the fence.  Which pages are private for a while is
 * quarantine.c's: where the map is followed, that ends.
 *
 * The uffd engine cares for chunks of PS_CHUNK pages, those of one page table.
 * A chunk follows the map by entries, or it is not registered with our
 * userfaultfd, and follows by the protections of its VMAs:
 *   by entries  pages that may only be read, or read and written, have a VMA that
 *               is read-write; all others have one of their own.  Whatever must
 *               not be written is marked, whatever may be written is not.
 *   by VMAs     no page bears a mark, so no page table is needed
 * READ <-> READ_WRITE by entries splits no VMA, and anybody who has our
 * userfaultfd can make it.  A chunk is armed (register, mark, then mprotect) when
 * a page of it is to be written, and disarmed (mprotect, then unregister) when it
 * is closed as a whole.
 * Invariants
 *  1. No waiting but for our own locks, and no writes to shared state but for the
 *     own capabilities: what did not succeed is nobody else's to change.
 *  2. Called under the page lock; to arm or disarm, with the claim (claim.c):
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

#include "core.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

#define BLOCK 256u /* chunks that are compared at once */

static_assert(PROT_READ == 1 && PROT_WRITE == 2 && PROT_EXEC == 4, "map bytes are PROT_* of x86-64 Linux");

/* A chunk follows by VMAs (PLAIN), or by entries: all of them (ARMED), or but for pages that have VMAs of their own
 * (SPLIT).  Of one in DOUBT it is known only that it may be registered, in part: it is to be settled. */
enum { PLAIN = 0, ARMED = 1, SPLIT = 2, DOUBT = 3 };

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

/* By entries, where its chunk is armed. */
static bool by_entry(uint32_t prot) {
    return prot & (PROT_READ | PROT_WRITE) && !(prot & PROT_EXEC);
}

static bool opens(uint32_t prot) {
    return by_entry(prot) && prot & PROT_WRITE;
}

static uint32_t vma_of(uint32_t prot) {
    return by_entry(prot) ? PROT_READ | PROT_WRITE : prot;
}

static bool is_armed(uint8_t state) {
    return state == ARMED || state == SPLIT;
}

static int enlist(struct ps_region *region, uint64_t page, uint64_t count) {
    int fd = checked_fd(region);
    if (fd < 0)
        return fd;
    set_chunks(region, page, count, DOUBT); /* the kernel registers VMA after VMA, and may fail after some of them */
    return ps_sys_uffd_register(fd, address(region, page), count * PS_PAGE);
}

/* The kernel takes the marks away too. */
static int delist(struct ps_region *region, uint64_t page, uint64_t count) {
    if (chunk_state(region, page / PS_CHUNK) == PLAIN)
        return 0;
    int fd = checked_fd(region);
    int rc = fd < 0 ? fd : ps_sys_uffd_unregister(fd, address(region, page), count * PS_PAGE);
    if (!rc)
        set_chunks(region, page, count, PLAIN);
    return rc;
}

/* Whole chunks of one state, all of whose pages are to be `prot`, by their VMAs. */
static int disarm(struct ps_region *region, uint64_t page, uint64_t count, uint32_t prot) {
    if (chunk_state(region, page / PS_CHUNK) != PLAIN)
        set_chunks(region, page, count, DOUBT);
    int rc = set_vma(region, page, count, prot);
    return rc ? rc : delist(region, page, count);
}

/* Whole chunks, all of whose pages are to be written: nothing to mark, so no page table is made. */
static int arm_open(struct ps_region *region, uint64_t page, uint64_t count, uint8_t before) {
    int rc = enlist(region, page, count);
    if (!rc && before == DOUBT)
        rc = mark(region, page, count, false);
    if (!rc)
        rc = set_vma(region, page, count, PROT_READ | PROT_WRITE);
    if (!rc)
        set_chunks(region, page, count, ARMED);
    return rc ? disarm(region, page, count, PROT_READ | PROT_WRITE) : 0;
}

/* The VMAs of a chunk that follows by entries, or does not. */
static int set_vmas(struct ps_region *region, uint64_t page, uint64_t end, bool entries) {
    int rc = 0;
    for (uint64_t run, next; page < end && !rc; page += run) {
        uint32_t prot, other;
        run = wanted_run(region, page, end, &prot);
        while (entries && page + run < end &&
               (next = wanted_run(region, page + run, end, &other), vma_of(other) == vma_of(prot)))
            run += next;
        rc = set_vma(region, page, run, entries ? vma_of(prot) : prot);
    }
    return rc;
}

/* A page that may be written is not marked for a moment either: it would refuse the system calls of other threads. */
static int arm(struct ps_region *region, uint64_t first, uint64_t end) {
    uint8_t before = chunk_state(region, first / PS_CHUNK), state = ARMED;
    int rc = enlist(region, first, end - first);
    for (uint64_t page = first, run; page < end && !rc; page += run) {
        uint32_t prot;
        run = wanted_run(region, page, end, &prot);
        if (!by_entry(prot))
            state = SPLIT;
        if (before == DOUBT || !(prot & PROT_WRITE))
            rc = mark(region, page, run, !(prot & PROT_WRITE));
    }
    if (!rc)
        rc = set_vmas(region, first, end, true);
    if (!rc)
        set_chunks(region, first, end - first, state);
    return rc;
}

/* One chunk, whatever became of it: it follows the map by entries, or where that cannot be had it is not registered. */
static int settle(struct ps_region *region, uint64_t chunk) {
    uint64_t first = chunk * PS_CHUNK, end = first + PS_CHUNK;
    if (end > region->shape.pages)
        end = region->shape.pages;
    if (!arm(region, first, end))
        return 0;
    int rc = set_vmas(region, first, end, false);
    return rc ? rc : delist(region, first, end - first);
}

/* Pages of armed chunks of one state. */
static int set_armed(struct ps_region *region, uint64_t page, uint64_t count, uint8_t state, uint32_t prot) {
    int rc = mark(region, page, count, !(prot & PROT_WRITE));
    if (rc || (state == ARMED && by_entry(prot)))
        return rc;
    rc = set_vma(region, page, count, vma_of(prot));
    uint64_t skip = (PS_CHUNK - page % PS_CHUNK) % PS_CHUNK;
    if (!rc && !by_entry(prot))
        set_chunks(region, page, count, SPLIT);
    else if (!rc && count >= skip + PS_CHUNK)
        set_chunks(region, page + skip, (count - skip) / PS_CHUNK * PS_CHUNK, ARMED);
    return rc;
}

/* How many of the `count` pages from `page` on make whole chunks, from `page` on.  To be opened, the region's last one
 * may be smaller; closed, it stays armed, so that a small region is within reach of others. */
static uint64_t whole_chunks(const struct ps_region *region, uint64_t page, uint64_t count, bool open) {
    bool all = open && page + count == region->shape.pages;
    return page % PS_CHUNK ? 0 : all ? count : count / PS_CHUNK * PS_CHUNK;
}

/* From `page` on pages of chunks of one state, which are to be `prot`.  To *count pages, which may be less or, to the
 * end of a chunk, more, the map is followed then. */
static int set_some(struct ps_region *region, uint64_t page, uint64_t *count, uint8_t state, uint32_t prot) {
    uint64_t whole = whole_chunks(region, page, *count, opens(prot)), edge = PS_CHUNK - page % PS_CHUNK;
    if (state == PLAIN && !opens(prot))
        return set_vma(region, page, *count, prot);
    if (whole) {
        *count = whole;
        if (!opens(prot) && !disarm(region, page, whole, prot))
            return 0;
        if (opens(prot) && !is_armed(state))
            return arm_open(region, page, whole, state);
    }
    if (is_armed(chunk_state(region, page / PS_CHUNK))) {
        *count = whole ? whole : *count < edge ? *count : edge; /* whole ones may follow it */
        return set_armed(region, page, *count, state, prot);
    }
    *count = edge;
    return settle(region, page / PS_CHUNK);
}

/* -- Following -------------------------------------------------------------------------------------------------- */

/* Pages that are all to be `prot`; to *end, or to the end of a chunk that is settled behind it. */
static int set(struct ps_region *region, uint64_t page, uint64_t *end, uint32_t prot) {
    int rc = 0;
    if (!region->uffd)
        return set_vma(region, page, *end - page, prot);
    for (uint64_t run; page < *end && !rc; page += run) {
        uint8_t state;
        run = same_chunks(region, page, *end, &state);
        rc = set_some(region, page, &run, state, prot);
    }
    *end = page;
    return rc;
}

static int follow(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = 0;
    for (uint64_t page = first, end = first + count, next; page < end && !rc; page = next) {
        uint32_t prot;
        next = page + wanted_run(region, page, end, &prot);
        rc = set(region, page, &next, prot);
    }
    return rc;
}

/* Page tables may not be what the states of the chunks say. */
static void doubt(struct ps_region *region) {
    for (uint64_t chunk = 0; region->uffd && chunk < ps_chunks(&region->shape); chunk++)
        if (chunk_state(region, chunk) != PLAIN)
            set_chunks(region, chunk * PS_CHUNK, 1, DOUBT);
}

/* Pages that were in quarantine are shared, no-access, and not registered, until their chunks are settled. */
static int restore(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = ps_region_map_again(region, first, count);
    for (uint64_t page = first, end = first + count, run; region->uffd && page < end && !rc; page += run) {
        uint8_t state;
        run = same_chunks(region, page, end, &state);
        if (state != PLAIN)
            set_chunks(region, page, run, DOUBT);
    }
    return rc;
}

static void drop(struct ps_region *region, uint32_t index) {
    uint32_t left = region->quarantines - 1 - index;
    memmove(&region->quarantine[index], &region->quarantine[index + 1], left * sizeof *region->quarantine);
    atomic_store_explicit(&region->quarantines, region->quarantines - 1, memory_order_relaxed);
}

/* All runs that have to do with the range, which becomes the one that is to follow the map then. */
static int end_quarantine(struct ps_region *region, uint64_t *first, uint64_t *count) {
    uint64_t near = region->uffd ? PS_CHUNK : 1, from = *first, end = *first + *count;
    for (uint32_t i = 0; i < region->quarantines;) {
        const struct ps_quarantine run = region->quarantine[i];
        if (!ps_quarantine_overlaps(&run, from / near * near, (end + near - 1) / near * near)) {
            i++;
            continue;
        }
        int rc = restore(region, run.first, run.count);
        if (rc)
            return rc;
        drop(region, i);
        from = run.first < from ? run.first : from;
        end = run.first + run.count > end ? run.first + run.count : end;
        i = 0; /* it may have come near to others */
    }
    *first = from;
    *count = end - from;
    return 0;
}

static _Atomic uint32_t *capabilities(const struct ps_region *region) {
    return &ps_slot(region, region->slot)->capabilities;
}

/* No caller outside may change our page tables from now on, until they have followed the whole map.  In this order,
 * against ps_engine_sync in another thread. */
static void out_of_reach(struct ps_region *region) {
    atomic_store_explicit(&region->unsynced, true, memory_order_seq_cst);
    atomic_fetch_and_explicit(capabilities(region), ~PS_CAN_UFFD, memory_order_seq_cst);
}

int ps_engine_apply(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = region->quarantines ? end_quarantine(region, &first, &count) : 0;
    if (!rc)
        rc = follow(region, first, count);
    if (rc && region->uffd) {
        out_of_reach(region);
        doubt(region);
    }
    return rc;
}

/* The whole map, whatever the states of the chunks say.  A handler may take a page out of it again meanwhile
 * (ps_engine_refuse): then once more. */
int ps_engine_sync(struct ps_region *region) {
    atomic_store_explicit(&region->unsynced, false, memory_order_seq_cst);
    doubt(region);
    int rc = ps_engine_apply(region, 0, region->shape.pages);
    if (rc || !region->uffd)
        return rc;
    atomic_fetch_or_explicit(capabilities(region), PS_CAN_UFFD, memory_order_seq_cst);
    if (atomic_load_explicit(&region->unsynced, memory_order_seq_cst))
        atomic_fetch_and_explicit(capabilities(region), ~PS_CAN_UFFD, memory_order_seq_cst);
    return 0;
}

/* Taking all rights from the whole mapping merges its VMAs, so it succeeds where nothing else does.  Should it
 * fail all the same, no participant is better than one with rights that it must not have. */
void ps_engine_fence(struct ps_region *region) {
    doubt(region);
    if (mprotect(ps_address(region), region->shape.pages * PS_PAGE, PROT_NONE) && ps_region_unmap_data(region))
        __builtin_trap();
}

static bool all_armed(const struct ps_region *region, uint64_t first, uint64_t count) {
    for (uint64_t chunk = first / PS_CHUNK; chunk * PS_CHUNK < first + count; chunk++)
        if (!is_armed(chunk_state(region, chunk)))
            return false;
    return true;
}

/* A lease in place begins or ends: its words in `here` have been written, the page tables follow them.  No change of
 * protection concerns these pages now; but arming their chunk concerns its other pages too. */
int ps_engine_lease(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline) {
    int rc = ps_page_lock(region, deadline);
    if (rc)
        return rc;
    bool arms = region->uffd && (!all_armed(region, first, count) || region->quarantines || region->unsynced);
    if (arms) {
        ps_page_unlock(region);
        rc = ps_pages_take(region, deadline);
        if (rc)
            return rc;
    }
    if (arms && region->unsynced && !region->fenced)
        ps_engine_sync(region); /* or else these pages alone */
    rc = region->fenced ? -EACCES : ps_engine_apply(region, first, count);
    if (arms)
        ps_claim_release(region, region->slot);
    ps_page_unlock(region);
    return rc;
}

/* -- Beginning, and violations ----------------------------------------------------------------------------------- */

/* In a new agent, whose table it stays in. */
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

/* As entries are changed later on: a range of two VMAs. */
static int try_marks(struct ps_region *region) {
    uintptr_t canary = (uintptr_t)ps_address(region) - PS_GUARD;
    int fd = region->own_userfault, rc = ps_sys_uffd_register(fd, canary, PS_CANARY);
    if (!rc && mprotect((void *)canary, PS_PAGE, PROT_READ))
        rc = -errno;
    if (!rc)
        rc = ps_sys_uffd_protect(fd, canary, PS_CANARY, true);
    if (!rc)
        rc = ps_sys_uffd_protect(fd, canary, PS_CANARY, false);
    return rc || !mprotect((void *)canary, PS_PAGE, PROT_NONE) ? rc : -errno;
}

/* In an agent that has a userfaultfd: does the kernel what is asked of one?  All marks go with the last reference to
 * it. The program may close its copy, and the agent may be ended alone: a mapping outlives both.  Where that cannot be
 * had, the two have to do. */
int ps_engine_try(struct ps_region *region) {
    int rc = try_marks(region);
    if (!rc && !region->keeper)
        ps_sys_keep_open(region->own_userfault, &region->keeper);
    return rc;
}

/* Nothing of what was registered is mapped any more. */
void ps_engine_close(struct ps_region *region) {
    set_chunks(region, 0, region->shape.pages, PLAIN);
    if (region->keeper)
        ps_sys_let_go(region->keeper);
    region->keeper = NULL;
}

/* In an agent whose predecessor was lost with our userfaultfd: somebody may keep that open, and nobody could change its
 * marks.  So the data is mapped anew, no-access. */
int ps_engine_forget(struct ps_region *region) {
    ps_engine_fence(region);
    int rc = ps_region_map_anew(region, region->own);
    if (!rc)
        ps_engine_close(region);
    return rc;
}

/* Our page tables refuse what they should allow: somebody changed them behind our back, or they are late. */
int ps_engine_mend(struct ps_region *region, uint64_t page) {
    if (!region->uffd)
        return ps_engine_apply(region, ps_unit_of(region, page), region->shape.unit);
    uint64_t first = page / PS_CHUNK * PS_CHUNK, rest = region->shape.pages - first;
    if (chunk_state(region, page / PS_CHUNK) != PLAIN)
        set_chunks(region, page, 1, DOUBT);
    return ps_engine_apply(region, first, rest < PS_CHUNK ? rest : PS_CHUNK);
}

/* A forbidden store to a marked page is a SIGBUS.  When the instruction runs again, it is the SIGSEGV that it is by
 * mprotect.  Nobody can open the page from outside then, until we have followed the whole map again. */
void ps_engine_refuse(struct ps_region *region, uint64_t page) {
    out_of_reach(region);
    set_vma(region, page, 1, PROT_READ);
}
