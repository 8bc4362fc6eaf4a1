/* remote.c - following a change in the place of other participants, from outside.
 *
 * Lives here: what of a change can be done by page-table entries, and doing it
 * through the userfaultfds of the participants that have one (borrow.c).  Nobody
 * wakes there and nobody answers: a stopped process is reached.
 *
 *   R1_claim   claim its page tables; they must be those of the generation before
 *   R2_remote  change them
 *   R3_ack     acknowledge in its name; give the claim back
 *
 * Invariants
 *  1. Only between READ and READ_WRITE, in armed chunks (engine.c); the kernel
 *     says ENOENT where a chunk is not, and then its agent follows by itself, the
 *     whole range, whatever was done of it.
 *  2. Under the claim, and only from the generation before, without an error: its
 *     page tables are what `old` says, so what differs from it is all there is
 *     to do.  A stale agent finds the generation applied, and does nothing.
 *  3. Killed with a claim, we leave page tables between `old` and the map; whoever
 *     gets the claim next follows again.
 * An ioctl waits for the mmap_lock of its target, which a fork there may hold for
 * milliseconds; no timeout can cut that short.
 * Runs in: caller, with the writer lock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/mman.h>

#include "change/change.h"
#include "core.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define PAGES 256u /* of a change; beyond that all agents at the same time are faster than one caller (bench) */

static uint32_t old_protection(const struct ps_region *region, uint64_t page) {
    uint8_t byte = atomic_load_explicit((_Atomic uint8_t *)ps_section(region, PS_SEC_OLD) + page, memory_order_relaxed);
    return byte ^ region->shape.initial;
}

/* 1: may be read; 2: may be written too; 0: no matter of page-table entries. */
static uint32_t entry_of(uint32_t prot) {
    return prot & PROT_EXEC ? 0 : prot & PROT_WRITE ? 2 : prot & PROT_READ ? 1 : 0;
}

/* From `old` to the map; for an UNDO, from the record's protection back to it. */
bool ps_remote_plan(const struct ps_region *region, enum ps_kind kind, struct ps_outside *outside) {
    const struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t first = atomic_load_explicit(&record->first, memory_order_relaxed);
    uint64_t count = atomic_load_explicit(&record->count, memory_order_relaxed), end = 0;
    uint32_t prot = atomic_load_explicit(&record->prot, memory_order_relaxed);
    outside->count = 0;
    if (prot & PS_FOLLOWS || kind == PS_FOLLOW)
        return prot == PS_FOLLOW_NOTHING && kind == PS_FOLLOW;
    if (ps_snapshots(region)) /* a page that one has not got yet must stay closed; its agent knows */
        return false;
    if (count > PAGES || first >= region->shape.pages || count > region->shape.pages - first)
        return false;
    for (uint64_t page = first; page < first + count; page++) {
        uint32_t from = entry_of(kind == PS_UNDO ? prot : old_protection(region, page));
        uint32_t to = entry_of(ps_protection(region, page));
        if (!from || !to)
            return false;
        if (from == to)
            continue;
        uint32_t last = outside->count - 1;
        if (outside->count && end == page && outside->run[last].protect == (to == 1)) {
            outside->run[last].count++;
        } else {
            if (outside->count == PS_OUTSIDE_RUNS)
                return false;
            outside->run[outside->count].first = page;
            outside->run[outside->count].count = 1;
            outside->run[outside->count++].protect = to == 1;
        }
        end = page + 1;
    }
    return true;
}

static int change_outside(int fd, uintptr_t data, const struct ps_outside *outside) {
    int rc = 0;
    for (uint32_t i = 0; i < outside->count && !rc; i++)
        rc = ps_sys_uffd_protect(fd, data + outside->run[i].first * PS_PAGE, outside->run[i].count * PS_PAGE,
                                 outside->run[i].protect);
    return rc;
}

static bool can_be_reached(const struct ps_shm_slot *slot) {
    return atomic_load_explicit(&slot->capabilities, memory_order_acquire) & PS_CAN_UFFD;
}

/* Its page tables follow the generation now, or nobody is there to have any. */
static bool reach(struct ps_region *region, uint32_t index, uint64_t generation, const struct ps_outside *outside,
                  int *socket) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
    if (ps_state_of(status) != PS_LIVE ||
        ps_acknowledged(slot, atomic_load_explicit(&slot->ack, memory_order_acquire), generation))
        return true;
    int fd = ps_borrow(region, index, status, socket);
    if (fd < 0 || !ps_claim_other(region, index, status >> PS_STATE_BITS))
        return false;
    PS_POINT(R1_claim);
    uint32_t seen = 0;
    bool legal = ps_applied_by(slot) == generation - 1 && can_be_reached(slot) &&
                 !(uint32_t)atomic_load_explicit(&slot->error, memory_order_relaxed) &&
                 !atomic_load_explicit(&slot->flags, memory_order_acquire) &&
                 atomic_load_explicit(&slot->status, memory_order_acquire) == status;
    int rc = legal ? change_outside(fd, ps_borrow_data(region, index), outside) : -EBUSY;
    PS_POINT(R2_remote);
    if (!rc) {
        /* seq_cst exchange, as its agent does it: somebody may wait for an older generation.  Should we die before the
         * store of `applied`, the next claimant believes the acknowledgement (ps_applied). */
        seen = atomic_exchange_explicit(&slot->ack, (uint32_t)generation & PS_ACK_MASK, memory_order_seq_cst);
        PS_POINT(R3_ack);
        atomic_store_explicit(&slot->applied, generation, memory_order_relaxed);
    }
    ps_claim_release(region, index);
    if (seen & PS_ACK_WAITING)
        ps_sys_wake(&slot->ack, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
    if (rc == -ESRCH) /* proved to be its memory when it was borrowed, and that is gone */
        ps_slot_bury(region, index, status);
    else if (rc == -EBADF || rc == -ENOTTY || rc == -EINVAL)
        ps_borrow_lost(region, index);
    return !rc || rc == -ESRCH;
}

/* The bits of those who turn out to be out of reach, and must follow by themselves; also of who was within reach when
 * ps_remote_out_of_reach looked, and has withdrawn since: its agent sleeps. */
uint32_t ps_remote_change(struct ps_region *region, uint64_t generation, const struct ps_outside *outside,
                          int *socket) {
    uint32_t bits = 0;
    ps_private_lock(ps_process_borrow_lock(), PS_NEVER);
    for (uint32_t index = 0, used = ps_slots_used(region); index < used; index++)
        if (index != region->slot &&
            !(can_be_reached(ps_slot(region, index)) && reach(region, index, generation, outside, socket)))
            bits |= ps_slot_bit(index);
    ps_private_unlock(ps_process_borrow_lock());
    return bits;
}

/* The bits of those who certainly must follow by themselves. */
uint32_t ps_remote_out_of_reach(struct ps_region *region, bool any) {
    uint32_t bits = 0;
    for (uint32_t index = 0, used = ps_slots_used(region); index < used; index++)
        if (index != region->slot && !(any && can_be_reached(ps_slot(region, index))))
            bits |= ps_slot_bit(index);
    return bits;
}
