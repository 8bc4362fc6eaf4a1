/* quarantine.c - private pages in the place of shared ones, until a thread learns of its forbidden access.
 *
 * Lives here: each region's table of the pages that are private now, how much
 * that may be, and the return to shared memory.
 *
 * A thread that stores where it may not gets private pages there: the store
 * takes place in them, shared data is untouched, and the C code that did it
 * goes on to where an exception can be raised.  For a forbidden load they are
 * zero.  Other threads of the process see the private pages meanwhile.
 * Invariants
 *  1. Begun and ended under the page lock and with the claim: pages in
 *     quarantine are no longer registered with our userfaultfd, so a caller
 *     outside finds that we must follow by ourselves.
 *  2. Whatever makes page tables follow the map ends the quarantine there
 *     first (ps_engine_apply): rights are given to shared pages only.
 *  3. An entry goes when its pages are shared again, not before.
 *  4. Bounded: PS_QUARANTINES runs and MOST pages a region; the oldest make
 *     room, whosever they are: a thread that needs them yet faults again.
 * Runs in: caller, agent, signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "core.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define LONGEST 4096u /* pages of a run */
#define MOST (4 * LONGEST)
#define STRIDE 64u /* pages: accesses so far apart still count as one after the other */

/* How many pages from `page` on the thread is likely to want next: twice as many each time where it goes upwards. */
uint64_t ps_quarantine_wish(const struct ps_region *region, uint64_t page) {
    for (uint32_t i = region->quarantines; i--;) {
        const struct ps_quarantine *run = &region->quarantine[i];
        if (run->tid != ps_process_tid())
            continue;
        uint64_t end = run->first + run->count, gap = run->count > STRIDE ? run->count : STRIDE;
        if (page < end || page - end > gap)
            return 1;
        return 2 * run->count < LONGEST ? 2 * run->count : LONGEST;
    }
    return 1;
}

static uint64_t pages_in(const struct ps_region *region) {
    uint64_t pages = 0;
    for (uint32_t i = 0; i < region->quarantines; i++)
        pages += region->quarantine[i].count;
    return pages;
}

static int end_run(struct ps_region *region, uint32_t index) {
    return ps_engine_apply(region, region->quarantine[index].first, region->quarantine[index].count);
}

/* Pages that forbid the access, all with the first one's protection. */
int ps_quarantine_begin(struct ps_region *region, uint64_t first, uint64_t count) {
    for (uint32_t i = 0; i < region->quarantines;) {
        int rc = 0;
        if (ps_quarantine_overlaps(&region->quarantine[i], first, first + count) && !(rc = end_run(region, i)))
            i = 0; /* others may have gone with it */
        else
            i++;
        if (rc)
            return rc;
    }
    while (region->quarantines == PS_QUARANTINES || (region->quarantines && pages_in(region) + count > MOST)) {
        int rc = end_run(region, 0);
        if (rc)
            return rc;
    }
    /* Before the pages: should the mapping fail half way, they are to be put right. */
    region->quarantine[region->quarantines] = (struct ps_quarantine){first, count, ps_process_tid()};
    atomic_store_explicit(&region->quarantines, region->quarantines + 1, memory_order_relaxed);
    bool zero = !(ps_protection(region, first) & 3);
    int rc = ps_region_map_private(region, first, count, zero);
    if (rc)
        end_run(region, region->quarantines - 1);
    return rc;
}

/* Whoever has our claim, whose thread may have been ended, is waited for with the page lock: else it may be unmapped.
 */
static void await_claim(struct ps_region *region) {
    _Atomic uint32_t *word = &ps_slot(region, region->slot)->claim;
    uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
    if (seen && ps_owner_known(region, seen))
        ps_owner_nap(region, (struct ps_watch){word, seen}, seen, ps_sys_now() + PS_MS / 10);
}

/* As ps_pages_take; -ENOENT where the region is closed meanwhile, since nothing of it is in quarantine then. */
static int take(struct ps_region *region, int64_t deadline) {
    for (;;) {
        int rc = ps_page_lock(region, deadline);
        if (rc)
            return rc;
        uint32_t runs = region->quarantines;
        rc = runs ? ps_claim_own(region) : -ENOENT;
        if (!rc)
            return 0;
        if (rc == -ETIMEDOUT)
            await_claim(region);
        ps_page_unlock(region);
        if (rc != -ETIMEDOUT)
            return -ENOENT;
        if (ps_sys_now() >= deadline)
            return rc;
        ps_sys_wait((struct ps_watch){&region->quarantines, runs}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS / 10);
    }
}

static int leave(struct ps_region *region, int64_t deadline) {
    int rc = take(region, deadline);
    if (rc)
        return rc == -ENOENT ? 0 : rc;
    for (uint32_t i = 0; i < region->quarantines && !rc;)
        if (region->quarantine[i].tid != ps_process_tid() && ps_sys_thread_exists(region->quarantine[i].tid))
            i++;
        else if (!(rc = end_run(region, i)))
            i = 0;
    ps_pages_give(region);
    if (rc && deadline != PS_NEVER)
        return rc;
    if (ps_agent_help(region, rc, PS_NEVER)) /* rather no access than to what is not shared */
        ps_agent_fence(region);
    return 0;
}

/* The calling thread's runs, and those of threads that have ended without being told.  Before the deadline, or not all
 * of them: -errno.  Without one it does whatever it takes. */
int ps_quarantine_leave(int64_t deadline) {
    int rc = 0;
    for (struct ps_region *region = ps_process_next(NULL); region && !rc; region = ps_process_next(region))
        if (atomic_load_explicit(&region->quarantines, memory_order_relaxed))
            rc = leave(region, deadline);
    return rc;
}

bool ps_quarantined(const struct ps_region *region) {
    return atomic_load_explicit(&region->quarantines, memory_order_relaxed);
}

/* The data is mapped no more. Under the page lock. */
void ps_quarantine_forget(struct ps_region *region) {
    atomic_store_explicit(&region->quarantines, 0, memory_order_relaxed);
    ps_region_unmap_source(region);
}
