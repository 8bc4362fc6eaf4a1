/* lease.c - leases: pages that one process alone may write.
 *
 *   H1_take     the words of the pages are taken (held.c); then a look at the closers (closer.c)
 *   H2_open     page tables of a lease in place are open
 *   H3_close    they are closed again, the words still ours
 *   H4_release  the words are given back (held.c)
 *
 * Invariants
 *  1. A taker stores its words, counts the lease in its slot, and then looks at the closers; where one does not let it
 *     pass it gives all back and waits with a ticket (closer.c).  So it counts only what it has.
 *  2. Who waits for a page has none: those that it had already are reserved for it, and of them only those before the
 *     page that it waits for.  So a taker that is stopped keeps no page from others for longer than PS_IN_LINE, and
 *     takers do not wait for each other in a circle.
 *  3. Page tables are open only while the words are ours: opened after the look, closed before the release.
 *  4. A page is stamped before its word is free (dirty.c).
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "change/change.h"
#include "core.h"
#include "hold/hold.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

/* For who looks (observe.c): it has one more, or one less. */
static void tell_taken(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    uint32_t before = atomic_fetch_add_explicit(&slot->takes, 1, memory_order_relaxed);
    if (before == atomic_load_explicit(&slot->ends, memory_order_relaxed))
        atomic_store_explicit(&slot->leased_since, ps_sys_coarse(), memory_order_relaxed);
}

static void tell_ended(struct ps_region *region) {
    atomic_fetch_add_explicit(&ps_slot(region, region->slot)->ends, 1, memory_order_relaxed);
}

/* -- Words ------------------------------------------------------------------------------------------------------- */

/* `next`, where not 0, is to have them next. */
static void give_pages(struct ps_region *region, uint64_t first, uint64_t end, uint32_t next) {
    for (uint64_t page = first; page < end; page++) {
        uint32_t dead = ps_here_dead(region, page);
        atomic_store_explicit(&region->here[page], 0, memory_order_release);
        ps_held_give(region, page, dead, next);
    }
}

static int take_page(struct ps_wait *wait, struct ps_lease *lease, uint64_t page, bool waits) {
    uint64_t held = (uint64_t)ps_process_holder() << 2 | PS_HERE_HELD;
    uint32_t dead;
    int rc = ps_held_take(wait, page, waits, &dead);
    if (rc)
        return rc;
    /* release: whoever finds the word ours, in another thread of ours, may look here. */
    atomic_store_explicit(&wait->region->here[page], held | (uint64_t)dead << PS_HERE_DEAD_SHIFT, memory_order_release);
    lease->abandoned |= dead != 0;
    PS_POINT(H1_take);
    return 0;
}

/* The page *at is waited for, the others are taken where they are to be had at once.  Where one is not, all are given
 * back, those before it reserved, and *at is that one. */
static int take_around(struct ps_wait *wait, struct ps_lease *lease, uint64_t *at) {
    uint64_t first = lease->first, end = first + lease->count, page = first;
    lease->abandoned = false;
    int rc = take_page(wait, lease, *at, true);
    if (rc)
        return rc;
    while (page < end && (page == *at || !(rc = take_page(wait, lease, page, false))))
        page++;
    if (page == end)
        return 0;
    give_pages(wait->region, first, page, wait->until.at == PS_TRY ? 0 : wait->mine);
    if (*at > page)
        give_pages(wait->region, *at, *at + 1, 0);
    wait->line_end = wait->line_end > page ? wait->line_end : page;
    ps_held_leave_line(wait, page + 1);
    *at = page;
    return rc;
}

/* All of them, or none. */
static int take_pages(struct ps_wait *wait, struct ps_lease *lease) {
    uint64_t at = lease->first;
    int rc;
    do
        rc = take_around(wait, lease, &at);
    while (rc == -EAGAIN && ps_sys_now() < wait->until.at);
    if (!rc) {
        wait->line_end = 0; /* else we would sleep on the reservation of another thread of ours, who wakes alone */
        return 0;
    }
    ps_held_leave_line(wait, lease->first);
    return rc == -EAGAIN && wait->until.at != PS_TRY ? -ETIMEDOUT : rc;
}

/* What a call has taken is from now on the thread's for which it did. */
static void hand_over(struct ps_region *region, uint64_t first, uint64_t count, int tid) {
    const uint64_t kept = ~(UINT64_C(0xffffffff) & ~(uint64_t)(PS_HERE_HELD | PS_HERE_IN_PLACE));
    for (uint64_t at = first; at < first + count; at++)
        atomic_store_explicit(&region->here[at], (ps_here(region, at) & kept) | (uint64_t)tid << 2,
                              memory_order_release);
}

void ps_lease_hand_over(struct ps_region *region, struct ps_lease *lease, int tid) {
    hand_over(region, lease->first, lease->count, tid);
    lease->taker = tid;
    ps_thread_counts(region, tid, 1);
}

void ps_user_lock_hand_over(struct ps_region *region, uint32_t index, int tid) {
    hand_over(region, region->shape.pages + index, 1, tid);
}

static bool nested(const struct ps_region *region, const struct ps_lease *lease) {
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++)
        if (ps_here_own(region, page))
            return true;
    return false;
}

/* Words that nobody closes; counted. */
static int take_open_pages(struct ps_wait *wait, struct ps_lease *lease) {
    struct ps_region *region = wait->region;
    for (;;) {
        int rc = take_pages(wait, lease);
        if (rc)
            return rc;
        ps_slot_counts(region);
        struct ps_shm_closer *closer = ps_closer_over(wait, lease->first, lease->count);
        if (!closer)
            return 0;
        give_pages(region, lease->first, lease->first + lease->count, 0);
        ps_slot_uncounts(region);
        rc = wait->until.at == PS_TRY ? -EAGAIN : ps_closer_await(wait, closer, lease->first, lease->count);
        if (rc)
            return rc;
    }
}

/* -- Page tables ------------------------------------------------------------------------------------------------- */

/* Does one of the pages need its page tables changed?  Or is one of them nothing that a lease can be over? */
static int look_at_map(struct ps_region *region, struct ps_lease *lease, struct ps_refusal *refusal) {
    uint64_t end = lease->first + lease->count;
    lease->in_place = false;
    for (uint64_t page = lease->first, run; page < end; page += run) {
        uint32_t prot;
        run = ps_run(region, page, end, &prot);
        if (prot != PROT_READ && !(prot & PROT_WRITE)) {
            *refusal = (struct ps_refusal){page, prot, PROT_READ, ps_change_author(region, page)};
            return PS_EREFUSED;
        }
        lease->in_place |= prot == PROT_READ && !lease->window;
    }
    return 0;
}

static void mark_in_place(struct ps_region *region, const struct ps_lease *lease, bool on) {
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++) {
        uint64_t here = atomic_load_explicit(&region->here[page], memory_order_relaxed);
        here = on ? here | PS_HERE_IN_PLACE : here & ~(uint64_t)PS_HERE_IN_PLACE;
        atomic_store_explicit(&region->here[page], here, memory_order_release);
    }
    /* seq_cst not needed: who applies does so under the page lock, which comes after. */
    if (on)
        atomic_fetch_add_explicit(&region->leased, lease->count, memory_order_release);
    else
        atomic_fetch_sub_explicit(&region->leased, lease->count, memory_order_release);
}

/* A process that cannot take the rights back has none at all. */
static void close_pages(struct ps_region *region, const struct ps_lease *lease) {
    int rc = ps_engine_lease(region, lease->first, lease->count, PS_NEVER);
    if (ps_agent_help(region, rc, PS_NEVER) && !region->fenced)
        ps_agent_fence(region);
}

static int open_pages(struct ps_wait *wait, const struct ps_lease *lease, struct ps_refusal *refusal) {
    struct ps_region *region = wait->region;
    mark_in_place(region, lease, true);
    int rc = ps_engine_lease(region, lease->first, lease->count, wait->until.at);
    bool begun = rc != -ETIMEDOUT;
    rc = ps_agent_help(region, rc, wait->until.at);
    if (!rc) {
        PS_POINT(H2_open);
        return 0;
    }
    wait->blocker = wait->mine;
    mark_in_place(region, lease, false);
    if (begun)
        close_pages(region, lease);
    if (rc == -EACCES) { /* fenced */
        *refusal = (struct ps_refusal){lease->first, PROT_NONE, PROT_READ, ps_change_author(region, lease->first)};
        return PS_EREFUSED;
    }
    return rc == -ETIMEDOUT && wait->until.at == PS_TRY ? -EAGAIN : rc;
}

/* The window is made by the first that needs it. */
int ps_lease_window(struct ps_region *region, int64_t deadline) {
    if (atomic_load_explicit(&region->window, memory_order_acquire))
        return 0;
    int rc = ps_page_lock(region, deadline);
    if (rc)
        return rc == -ETIMEDOUT && deadline == PS_TRY ? -EAGAIN : rc;
    if (!region->window)
        rc = ps_region_map_window(region);
    atomic_store_explicit(&region->window, !rc, memory_order_release);
    ps_page_unlock(region);
    return rc;
}

/* -- A lease ----------------------------------------------------------------------------------------------------- */

static int keep_for_snapshots(struct ps_wait *wait, const struct ps_lease *lease) {
    int rc = ps_snapshot_keep(wait->region, lease->first, lease->count, wait->until.at, &wait->blocker);
    return rc == -ETIMEDOUT && wait->until.at == PS_TRY ? -EAGAIN : rc;
}

/* What its words are not enough for; nothing is held after an error. */
static int open_lease(struct ps_wait *wait, struct ps_lease *lease, struct ps_refusal *refusal) {
    struct ps_region *region = wait->region;
    int rc = look_at_map(region, lease, refusal);
    if (!rc && ps_snapshots(region))
        rc = keep_for_snapshots(wait, lease);
    if (!rc && lease->in_place)
        rc = open_pages(wait, lease, refusal);
    if (!rc)
        return 0;
    give_pages(region, lease->first, lease->first + lease->count, 0);
    ps_slot_uncounts(region);
    return rc;
}

int ps_lease_take(struct ps_region *region, struct ps_lease *lease, int64_t deadline, struct ps_outcome *outcome,
                  struct ps_refusal *refusal) {
    struct ps_shm_header *header = ps_header(region);
    struct ps_wait wait = ps_wait_begin(region, deadline);
    if (!atomic_load_explicit(&header->leases, memory_order_relaxed)) /* seq_cst: before our words */
        atomic_store_explicit(&header->leases, 1, memory_order_seq_cst);
    int rc = region->counts ? 0 : ps_region_map_counts(region);
    if (!rc && deadline != PS_TRY) /* before anybody is waited for */
        rc = ps_freeze_own(region) ? PS_EFROZEN : nested(region, lease) ? PS_ENESTED : 0;
    if (!rc && lease->window)
        rc = ps_lease_window(region, wait.until.at);
    if (!rc)
        rc = take_open_pages(&wait, lease);
    if (wait.ticket)
        ps_ticket_give(&wait);
    if (!rc)
        rc = open_lease(&wait, lease, refusal);
    if (rc)
        return ps_waited(ps_wait_end(&wait, rc, lease->first, lease->count, outcome));
    tell_taken(region);
    lease->taker = ps_process_holder();
    ps_thread_counts(region, lease->taker, 1);
    return ps_waited(0);
}

int ps_lease_give(struct ps_region *region, const struct ps_lease *lease, int64_t deadline) {
    if (!ps_process_known())
        return 0; /* a child by a raw clone() holds nothing, and has no words */
    if (lease->in_place) {
        if (deadline == PS_TRY && atomic_load_explicit(&region->page_lock, memory_order_relaxed))
            return -EAGAIN;
        mark_in_place(region, lease, false);
        close_pages(region, lease);
        PS_POINT(H3_close);
    }
    uint64_t ended = ps_sys_coarse() / PS_MS << 1, generation = ps_generation(region);
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++) {
        uint32_t dead = lease->untold ? ps_here_dead(region, page) : 0;
        ps_stamp(region, page, generation);
        atomic_store_explicit(&region->here[page], ended, memory_order_release);
        ps_held_give(region, page, dead, 0);
    }
    tell_ended(region);
    ps_thread_counts(region, lease->taker, -1); /* before the slot's count: ps_thread_holds */
    ps_slot_uncounts(region);
    return 0;
}

void *ps_window(const struct ps_region *region) {
    return (char *)ps_address(region) + ps_window_offset(&region->shape);
}
