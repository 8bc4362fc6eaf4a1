/* claim.c - the claim on a participant's page tables, and with it the page lock.
 *
 * A claim knows 0 -> me, dead owner -> me, me -> 0: it is held for microseconds.
 * Invariants
 *  1. The claim is not waited for with the page lock: another process may be
 *     stopped with it, and our leases need the page lock alone.
 *  2. Both are held over changes of page tables only.
 * Runs in: caller, agent, signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"
#include "types.h"

#define SPIN 200 /* looks at a claim before sleeping: as long as a change of a page takes */
#define PRIVATE_WAITING 0x80000000u

/* -- The claim on a participant's page tables ------------------------------------------------------------------ */

/* Ours; a remote caller has it for the time of an ioctl, or died with it.  -ETIMEDOUT: for longer. */
int ps_claim_own(struct ps_region *region) {
    _Atomic uint32_t *word = &ps_slot(region, region->slot)->claim;
    uint32_t mine = ps_owner_word(region), seen = 0;
    for (int looks = 0;; looks++) {
        /* acquire: pairs with the release in ps_claim_release: `applied` is what the last claimant left. */
        if (atomic_compare_exchange_weak_explicit(word, &seen, mine, memory_order_acquire, memory_order_relaxed))
            return 0;
        if (seen && looks >= SPIN) {
            if (!ps_owner_known(region, seen))
                return ps_corrupt(region, "claim");
            if (seen == mine || ps_owner_gone(region, seen))
                continue; /* with `seen`: take it over */
            return -ETIMEDOUT;
        }
        __builtin_ia32_pause();
        seen = 0;
    }
}

bool ps_claim_other(struct ps_region *region, uint32_t index, uint32_t epoch) {
    _Atomic uint32_t *word = &ps_slot(region, index)->claim;
    uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
    if (seen == (epoch << PS_OWNER_SLOT_BITS | (index + 1)))
        return false; /* it is at work itself */
    /* A third party's is of a caller that died with the writer lock, which we hold.  acquire: as in ps_claim_own. */
    return atomic_compare_exchange_strong_explicit(word, &seen, ps_owner_word(region), memory_order_acquire,
                                                   memory_order_relaxed);
}

/* As in ps_claim_other, of our own: before we wait for it with the writer lock. */
void ps_claim_void(struct ps_region *region) {
    _Atomic uint32_t *word = &ps_slot(region, region->slot)->claim;
    uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
    if (seen && seen != ps_owner_word(region))
        atomic_compare_exchange_strong_explicit(word, &seen, 0, memory_order_acq_rel, memory_order_relaxed);
}

/* release: pairs with the acquire of the next claimant.  Nobody is woken: who waits looks every 0.1 ms.  A plain store:
 * while we live nobody takes our claim over. */
void ps_claim_release(struct ps_region *region, uint32_t index) {
    atomic_store_explicit(&ps_slot(region, index)->claim, 0, memory_order_release);
}

/* -- Locks private to the process, reset in a forked child ------------------------------------------------------
 *
 * A word is 0 or the thread id of its holder, with PRIVATE_WAITING if somebody sleeps.  A thread alone can be ended
 * by a seccomp filter: then whoever waits takes over. */

int ps_page_lock(struct ps_region *region, int64_t deadline) {
    return ps_private_lock(&region->page_lock, deadline);
}

void ps_page_unlock(struct ps_region *region) {
    ps_private_unlock(&region->page_lock);
}

/* The page lock and the claim: what whoever makes our page tables follow the map holds.  The claim is not waited for
 * with the page lock: another process may be stopped with it, and our leases need the page lock alone. */
int ps_pages_take(struct ps_region *region, int64_t deadline) {
    _Atomic uint32_t *word = &ps_slot(region, region->slot)->claim;
    for (;;) {
        int rc = ps_page_lock(region, deadline);
        if (rc || !(rc = ps_claim_own(region)))
            return rc;
        ps_page_unlock(region);
        int64_t now = ps_sys_now();
        if (rc != -ETIMEDOUT || now >= deadline)
            return rc;
        uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
        if (seen && ps_owner_known(region, seen))
            ps_owner_wait(region, (struct ps_watch){word, seen}, seen, now + PS_MS / 10);
    }
}

/* Between two pieces of a long change: whoever waits for them has them.  Woken alone, it would find them taken again
 * for as long as there are pieces. */
void ps_pages_pass(struct ps_region *region) {
    ps_claim_release(region, region->slot);
    if (atomic_exchange_explicit(&region->page_lock, 0, memory_order_release) & PRIVATE_WAITING) {
        ps_sys_wake(&region->page_lock, 1, FUTEX_BITSET_MATCH_ANY);
        ps_sys_pause();
    } else {
        ps_sys_yield(); /* rather here than with the lock, which a store may want meanwhile */
    }
}

void ps_pages_give(struct ps_region *region) {
    ps_claim_release(region, region->slot);
    ps_page_unlock(region);
}
