/* save.c - copying pages into the areas of snapshots before they are stored to.
 *
 * Invariants
 *  1. What a page is until it is SAVED does not change.  So whoever has copied it
 *     and then finds it unsaved has the right bytes, may write them to the area
 *     at any time, and needs no lock: a stopped process keeps no other from
 *     storing.
 *  2. Nobody saves for, and so nobody stores after, a moment that has not come
 *     for all: its generation is 0 till then.
 *  3. An area is used again only when nobody holds the snapshot's byte, and
 *     nobody who found its former word is counted as saving.
 *  S6_save  a page lies in the area, and is not SAVED yet
 * Runs in: caller, agent, signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"
#include "types.h"

#define PATIENCE (1000 * PS_MS) /* for the page lock, in the handler */
#define MOMENT (500 * PS_MS)    /* one waits so long for a moment; less than PS_PATIENCE, with which calls begin anew */

/* -- The mapping that pages are copied through -------------------------------------------------------------------- */

/* Under the page lock. */
int ps_snapshot_map_shadow(struct ps_region *region) {
    int rc = region->shadow ? 0 : ps_region_map_shadow(region);
    atomic_store_explicit(&region->shadow, !rc, memory_order_release);
    return rc;
}

/* Where a beginning has not made it: for leases it is made by the first that needs it. */
static int need_shadow(struct ps_region *region) {
    if (atomic_load_explicit(&region->shadow, memory_order_acquire))
        return 0;
    int rc = ps_page_lock(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    rc = ps_snapshot_map_shadow(region);
    ps_page_unlock(region);
    return rc;
}

/* -- Saving ---------------------------------------------------------------------------------------------------- */

/* -ENOMEM: there is no page for the copy. */
static int save_page(struct ps_region *region, uint32_t index, uint64_t page) {
    _Atomic uint8_t *state = ps_snapshot_states(region, index) + page;
    const char *data = ps_shadow(region) + page * PS_PAGE;
    char *area = ps_shadow(region) + (1 + (uint64_t)index) * region->shape.pages * PS_PAGE;
    char bytes[PS_PAGE];
    if (ps_copy_bytes(bytes, data, PS_PAGE).left)
        return -ENOMEM;
    atomic_thread_fence(memory_order_acquire); /* the copy before the look (invariant 4) */
    if (atomic_load_explicit(state, memory_order_acquire) == PS_SAVED)
        return 0;
    if (!ps_all_zero(bytes, PS_PAGE) && ps_copy_bytes(area + page * PS_PAGE, bytes, PS_PAGE).left)
        return -ENOMEM;
    PS_POINT(S6_save);
    /* release: who finds it SAVED finds the copy. */
    atomic_store_explicit(state, PS_SAVED, memory_order_release);
    return 0;
}

static bool all_saved(const struct ps_region *region, uint32_t index, uint64_t first, uint64_t count) {
    const _Atomic uint8_t *states = ps_snapshot_states(region, index);
    for (uint64_t page = first; page < first + count; page++)
        if (ps_state_at(states, page) != PS_SAVED)
            return false;
    return true;
}

/* The snapshotter has the writer lock from before the word is ACTIVE until its generation is told: where nobody has the
 * lock, we have it, or one who is gone, that will not happen any more. */
static bool brings_moment(struct ps_region *region, uint32_t owner) {
    return owner && !ps_lock_ours(region, owner) && !ps_owner_gone(region, owner);
}

/* Unless its moment has come meanwhile, it will not: the snapshotter finds that out by the same word.  Where the area
 * has become another snapshot's meanwhile that one is taken once more. */
static void give_up(struct ps_region *region, uint32_t index, uint32_t word) {
    uint64_t none = 0;
    if (atomic_compare_exchange_strong_explicit(&ps_snapshot_shared(region, index)->generation, &none, PS_NO_MOMENT,
                                                memory_order_seq_cst, memory_order_relaxed) ||
        none == PS_NO_MOMENT)
        ps_snapshot_end(region, index, word);
}

/* Until the snapshot's moment has come for all, or it is given up, as it is by those whom it keeps from storing for
 * long: its maker may be stopped.  -ETIMEDOUT, PS_ESIGNAL: the caller's deadline, a signal. */
static int await_moment(struct ps_region *region, uint32_t index, uint32_t word, int64_t deadline, uint32_t *blocker) {
    struct ps_shm_snapshot *shared = ps_snapshot_shared(region, index);
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&shared->generation;
    int64_t end = ps_sys_now() + MOMENT;
    while (ps_snapshot_word(region, index) == word) {
        uint32_t owner = ps_lock_owner(region);
        uint64_t generation = atomic_load_explicit(&shared->generation, memory_order_acquire);
        if (generation && generation != PS_NO_MOMENT)
            return 0;
        if (owner && !ps_owner_known(region, owner))
            return ps_corrupt(region, "lock");
        if (generation || !brings_moment(region, owner) || ps_snapshot_has_no_holder(region, index) ||
            ps_sys_now() >= end) {
            give_up(region, index, word);
            continue;
        }
        *blocker = owner;
        int rc = ps_owner_wait(region, (struct ps_watch){low, 0}, owner, deadline < end ? deadline : end);
        if (deadline != PS_NEVER && (rc == PS_ESIGNAL || (rc && ps_sys_now() >= deadline)))
            return rc;
    }
    return 0;
}

/* Holes from `hole` on, and the page behind them, before `end`.  Everything under `saving`: the area is this snapshot's
 * as long as that is counted (invariant 5).  No system call is made there: a thread may be ended alone in one, and
 * would be counted as long as its process lives. */
static int save_counted(struct ps_region *region, uint32_t index, uint32_t word, uint64_t hole, uint64_t page,
                        uint64_t end) {
    _Atomic uint32_t *saving = &ps_slot(region, region->slot)->saving;
    _Atomic uint8_t *states = ps_snapshot_states(region, index);
    int rc = 0;
    atomic_fetch_add_explicit(saving, 1, memory_order_seq_cst);
    if (ps_snapshot_word(region, index) == word) {
        for (; hole < page; hole++)
            atomic_store_explicit(states + hole, PS_SAVED, memory_order_release);
        if (page < end && ps_state_at(states, page) != PS_SAVED)
            rc = save_page(region, index, page);
    }
    atomic_fetch_sub_explicit(saving, 1, memory_order_release);
    return rc;
}

/* Holes of the memfd are holes of the image: after its moment, what is a hole and not SAVED was zero at that. */
static int save_pages(struct ps_region *region, uint32_t index, uint32_t word, uint64_t first, uint64_t count) {
    const _Atomic uint8_t *states = ps_snapshot_states(region, index);
    uint64_t data = region->shape.control_size, end = first + count;
    int rc = 0;
    for (uint64_t page = first; page < end && !rc && ps_snapshot_word(region, index) == word; page++) {
        uint64_t hole = page;
        if (ps_state_at(states, page) == PS_SAVED)
            continue;
        if (count > 1)
            page = (ps_region_skip_hole(region, data + page * PS_PAGE, data + end * PS_PAGE) - data) / PS_PAGE;
        rc = save_counted(region, index, word, hole, page, end);
    }
    return rc;
}

static int keep(struct ps_region *region, uint32_t index, uint32_t word, uint64_t first, uint64_t count) {
    sigset_t blocked;
    ps_fault_unblock(false, &blocked); /* there may be no memory for a page */
    int rc = save_pages(region, index, word, first, count);
    ps_fault_block_again(&blocked);
    if (rc == -ENOMEM) { /* rather the snapshot than the one who stores */
        ps_snapshot_end(region, index, word);
        rc = 0;
    }
    return rc;
}

/* Every ACTIVE snapshot has these pages, and whoever looks at them may store.  The deadline is that of the wait for
 * moments; PS_NEVER, as in the handler: it is not long, and no signal ends it.  After -ETIMEDOUT *blocker is who was
 * waited for. */
int ps_snapshot_keep(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline, uint32_t *blocker) {
    int rc = 0;
    *blocker = ps_owner_word(region);
    for (uint64_t mask = ps_snapshots_live(region); mask && !rc; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = ps_snapshot_word(region, index);
        if (ps_snapshot_state(word) != PS_SNAPSHOT_ACTIVE || all_saved(region, index, first, count))
            continue;
        rc = await_moment(region, index, word, deadline, blocker);
        if (ps_snapshot_has_no_holder(region, index))
            ps_snapshot_end(region, index, word);
        if (!rc)
            rc = need_shadow(region);
        if (!rc)
            rc = keep(region, index, word, first, count);
    }
    return rc;
}

/* ... and every PREPARING one knows.  Under `saving` too: a page that is made DIRTY for a former word would be open in
 * the snapshot that has the area now, which has not counted it. */
static void dirty(struct ps_region *region, uint32_t index, uint32_t word, uint64_t first, uint64_t count) {
    _Atomic uint32_t *saving = &ps_slot(region, region->slot)->saving;
    _Atomic uint8_t *states = ps_snapshot_states(region, index);
    uint8_t state = ps_snapshot_dirty_state(word);
    atomic_fetch_add_explicit(saving, 1, memory_order_seq_cst);
    for (uint64_t page = first; page < first + count && ps_snapshot_word(region, index) == word; page++) {
        uint8_t seen = atomic_load_explicit(states + page, memory_order_relaxed);
        if (seen == state || seen == PS_SAVED)
            continue;
        atomic_fetch_add_explicit(&ps_snapshot_shared(region, index)->dirty, 1, memory_order_seq_cst);
        atomic_compare_exchange_strong_explicit(states + page, &seen, state, memory_order_seq_cst,
                                                memory_order_relaxed);
    }
    atomic_fetch_sub_explicit(saving, 1, memory_order_release);
}

/* Stores to these pages may pass, as far as snapshots are concerned. */
int ps_snapshot_let(struct ps_region *region, uint64_t first, uint64_t count) {
    for (uint64_t mask = ps_snapshots_live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = ps_snapshot_word(region, index);
        if (ps_snapshot_is_preparing(word))
            dirty(region, index, word, first, count);
    }
    uint32_t nobody;
    return ps_snapshot_keep(region, first, count, PS_NEVER, &nobody);
}

static int open_pages(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = ps_snapshot_let(region, first, count);
    if (!rc)
        rc = ps_pages_take(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    rc = region->fenced ? -EACCES : ps_engine_apply(region, first, count);
    ps_pages_give(region);
    return rc;
}

/* A store by its own page tables, which the map allows.  Where there may be no more mappings, the pages around it are
 * opened with it: they end in fewer. */
int ps_snapshot_open(struct ps_region *region, uint64_t page) {
    int rc = -ENOMEM;
    for (uint64_t size = 1, first = page; rc == -ENOMEM && first + size <= 2 * region->shape.pages; size *= 2) {
        first = page / size * size;
        uint64_t rest = region->shape.pages - first;
        rc = open_pages(region, first, size < rest ? size : rest);
    }
    return rc;
}
