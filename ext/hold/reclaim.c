/* reclaim.c - areas of snapshots that nobody holds any more.
 *
 * Lives here: finding them, giving their memory back, opening page tables again
 * where no snapshot needs them closed.
 * Invariant: an area is emptied under the writer lock, and only when nobody who
 * found its former word may still write to it.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "change/change.h"
#include "core.h"
#include "hold/hold.h"
#include "os/os.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

#define PATIENCE (1000 * PS_MS) /* for the page lock, in the handler */
#define LOOK (100 * PS_MS)      /* between two looks of this process at what the killed left */
#define GLANCE (20 * PS_MS)     /* a call waits so long for the lock that it then needs */

/* With the writer lock: bits of those that are over go; true if there were any, and page tables may be opened. */
static bool sweep(struct ps_region *region) {
    uint64_t over = 0;
    for (uint64_t mask = ps_snapshots_live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = ps_snapshot_word(region, index);
        if (!ps_snapshot_is_over(word) && ps_snapshot_has_no_holder(region, index))
            ps_snapshot_end(region, index, word);
        if (ps_snapshot_is_over(ps_snapshot_word(region, index)))
            over |= UINT64_C(1) << index;
    }
    atomic_fetch_and_explicit(&ps_header(region)->snapshots, ~over, memory_order_seq_cst);
    return over;
}

int ps_snapshot_empty_area(const struct ps_region *region, int fd, uint32_t index) {
    int rc = ps_sys_punch(fd, ps_snapshot_area_offset(region, index), region->shape.pages * PS_PAGE);
    return rc ? rc : ps_sys_punch(fd, ps_snapshot_states_offset(region, index), ps_state_stride(region->shape.pages));
}

/* The owner word of somebody who may have found a former word of an area, and write to it still; 0: nobody. */
uint32_t ps_snapshot_find_saver(struct ps_region *region) {
    for (uint32_t index = 0, used = ps_slots_used(region); index < used; index++) {
        struct ps_shm_slot *slot = ps_slot(region, index);
        uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
        if (ps_state_of(status) == PS_LIVE && atomic_load_explicit(&slot->saving, memory_order_seq_cst) &&
            !ps_slot_dead(region, index, status))
            return ps_owner_of(index, status);
    }
    return 0;
}

/* Of those that nobody holds. */
static void give_memory_back(struct ps_region *region) {
    int fd = ps_query_fd(region);
    for (uint32_t index = 0; index < region->shape.areas && fd >= 0; index++) {
        uint32_t word = ps_snapshot_word(region, index), left = word & ~PS_SNAPSHOT_MASK; /* FREE */
        if (ps_snapshot_is_empty(word) || !ps_snapshot_has_no_holder(region, index))
            continue;
        ps_snapshot_end(region, index, word);
        bool written = ps_snapshot_find_saver(region); /* before it is emptied: nobody begins to write any more */
        if (!ps_snapshot_empty_area(region, fd, index) && !written)
            atomic_compare_exchange_strong_explicit(&ps_snapshot_shared(region, index)->word, &left,
                                                    left | PS_SNAPSHOT_EMPTY, memory_order_seq_cst,
                                                    memory_order_relaxed);
    }
}

bool ps_any_writable(struct ps_region *region) {
    for (uint64_t page = 0, run; page < region->shape.pages; page += run) {
        uint32_t prot;
        run = ps_run(region, page, region->shape.pages, &prot);
        if (prot & PROT_WRITE)
            return true;
    }
    return false;
}

void ps_snapshot_sweep_locked(struct ps_region *region, int64_t deadline) {
    struct ps_outcome outcome;
    if (ps_change_settle(region, deadline, &outcome))
        return;
    if (sweep(region) && ps_any_writable(region))
        ps_change_follow(region, PS_FOLLOW_OPEN, deadline, &outcome);
    give_memory_back(region);
}

static void sweep_until(struct ps_region *region, int64_t deadline) {
    uint32_t blocker;
    if (ps_lock(region, deadline, &blocker))
        return; /* the next one does it */
    ps_snapshot_sweep_locked(region, deadline);
    ps_unlock(region);
}

void ps_snapshot_sweep(struct ps_region *region) {
    sweep_until(region, ps_sys_now() + PATIENCE);
}

/* An area is in use, and nobody holds it: a hint, since nothing keeps it so. */
static bool is_left(struct ps_region *region) {
    for (uint32_t index = 0; index < region->shape.areas; index++)
        if (!ps_snapshot_is_empty(ps_snapshot_word(region, index)) && ps_snapshot_has_no_holder(region, index))
            return true;
    return false;
}

static bool any_in_use(const struct ps_region *region) {
    for (uint32_t index = 0; index < region->shape.areas; index++)
        if (!ps_snapshot_is_empty(atomic_load_explicit(&ps_snapshot_shared(region, index)->word,
                                                       memory_order_relaxed))) /* another call's */
            return true;
    return false;
}

/* The last holder of a snapshot was killed, or ended, where nobody could give its memory back: one of our calls does,
 * soon. */
void ps_snapshot_notice(struct ps_region *region) {
    if (!any_in_use(region))
        return;
    uint64_t now = ps_sys_coarse();
    if (now < atomic_load_explicit(&region->next_look, memory_order_relaxed))
        return;
    atomic_store_explicit(&region->next_look, now + LOOK, memory_order_relaxed);
    if (is_left(region))
        sweep_until(region, ps_sys_now() + GLANCE);
}
