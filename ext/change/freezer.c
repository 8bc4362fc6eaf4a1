/* freezer.c - the freezer's word: who has the region frozen.
 *
 * Invariants
 *  1. While `frozen` is not 0 nobody but the owner of the word changes the map,
 *     and `kept` stays as it is: so a thaw may be executed any number of times.
 *  2. `frozen` becomes 0 when a thaw is complete, and the word goes after it:
 *     whoever finds `frozen` with the writer lock finds an owner of the word to
 *     wait for, or to come after.
 *  3. A dead freezer's word is taken over, not cleared: of those who find it dead
 *     one thaws, and the others wait for the end of that.
 * Not here: the verbs freeze and thaw (operations/protect.c).
 * Runs in: caller; ps_freeze_notice also in the signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "change/change.h"
#include "os/os.h"
#include "os/point.h"
#include "process/process.h"
#include "shared/shared.h"
#include "types.h"

static _Atomic uint32_t *freezer(const struct ps_region *region) {
    return &ps_header(region)->freezer;
}

bool ps_freeze_own(const struct ps_region *region) {
    return atomic_load_explicit(&region->frozen_by, memory_order_relaxed) == ps_process_tid();
}

/* The thread of ours that is at work with the word: should it be ended, another passes it on (lock.c). */
void ps_freezer_thread(struct ps_region *region, int tid) {
    atomic_store_explicit(&region->freezing, tid, memory_order_release);
}

/* release: whoever finds no freezer finds the map as it was. */
void ps_freezer_clear(struct ps_region *region) {
    PS_POINT(F5_clear);
    ps_freezer_thread(region, 0);
    atomic_store_explicit(&ps_header(region)->thawing, 0, memory_order_relaxed);
    if (atomic_exchange_explicit(freezer(region), 0, memory_order_release) & PS_OWNER_WAITING)
        ps_sys_wake(freezer(region), INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

/* What the dead owner of the word froze; the word is ours meanwhile. */
static int bury(struct ps_region *region, uint32_t dead, int64_t deadline, uint32_t *blocker) {
    uint32_t mine = ps_owner_word(region) | PS_OWNER_WAITING;
    if (!atomic_compare_exchange_strong_explicit(freezer(region), &dead, mine, memory_order_acquire,
                                                 memory_order_relaxed))
        return 0;
    ps_freezer_thread(region, ps_process_tid());
    atomic_store_explicit(&ps_header(region)->thawing, 1, memory_order_release);
    int rc = ps_change_thaw(region, deadline, blocker);
    if (!rc) {
        ps_freezer_clear(region);
        return 0;
    }
    ps_freezer_thread(region, 0); /* for the next one to bury */
    atomic_store_explicit(freezer(region), dead | PS_OWNER_WAITING, memory_order_release);
    ps_sys_wake(freezer(region), INT32_MAX, FUTEX_BITSET_MATCH_ANY);
    return rc;
}

static bool is_dead(struct ps_region *region, uint32_t owner) {
    return owner != ps_owner_word(region) && ps_owner_gone(region, owner);
}

/* Until this freezer is through, or the deadline comes; 0: look again. */
static int wait_for(struct ps_region *region, uint32_t seen, int64_t deadline, uint32_t *blocker) {
    uint32_t owner = seen & ~PS_OWNER_WAITING, flagged = seen | PS_OWNER_WAITING;
    if (!ps_owner_known(region, owner))
        return ps_corrupt(region, "freezer");
    *blocker = owner;
    if (is_dead(region, owner))
        return bury(region, seen, deadline, blocker);
    if (seen != flagged && !atomic_compare_exchange_strong_explicit(freezer(region), &seen, flagged,
                                                                    memory_order_relaxed, memory_order_relaxed))
        return 0;
    return ps_owner_wait(region, (struct ps_watch){freezer(region), flagged}, owner, deadline);
}

/* The end of a wait. */
static int tell(struct ps_region *region, int rc, struct ps_until until, uint32_t blocker, struct ps_outcome *outcome) {
    if (rc != -ETIMEDOUT)
        return rc;
    rc = ps_timed_out(until);
    if (rc == PS_ETIMEOUT)
        outcome->pids[outcome->silent++] = ps_owner_pid(region, blocker);
    return rc;
}

/* For a change that found the region frozen: 0: look again. */
int ps_freeze_wait(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    uint32_t seen = atomic_load_explicit(freezer(region), memory_order_acquire), blocker = 0;
    struct ps_until until = ps_until(deadline);
    int rc = seen ? wait_for(region, seen, until.at, &blocker) : 0;
    return tell(region, rc, until, blocker, outcome);
}

/* Nothing is frozen any more by anybody who is dead: before a dead owner's closer goes (invariant 4).  A freeze without
 * a freezer has just ended, or is damage: look again, but not for ever. */
int ps_freeze_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    int rc = 0;
    while (!rc && ps_frozen(region)) {
        uint32_t seen = atomic_load_explicit(freezer(region), memory_order_acquire);
        if (seen)
            rc = wait_for(region, seen, deadline, blocker);
        else if (ps_sys_now() >= deadline)
            rc = -ETIMEDOUT;
        else
            ps_sys_pause();
    }
    return rc;
}

/* This freezer is dead, or somebody thaws for one. */
static bool is_over(struct ps_region *region, uint32_t seen) {
    uint32_t owner = seen & ~PS_OWNER_WAITING;
    return ps_owner_known(region, owner) &&
           (is_dead(region, owner) || atomic_load_explicit(&ps_header(region)->thawing, memory_order_acquire));
}

/* true: a dead freezer's freeze has been ended, here or by somebody else. */
bool ps_freeze_notice(struct ps_region *region, int64_t patience) {
    uint32_t seen, blocker;
    int64_t end = 0;
    while ((seen = atomic_load_explicit(freezer(region), memory_order_acquire)) && is_over(region, seen)) {
        end = end ? end : ps_sys_now() + patience;
        int rc = wait_for(region, seen, end, &blocker);
        if (rc && rc != PS_ESIGNAL)
            return false;
    }
    return end;
}

int ps_freezer_take(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    uint32_t slept = 0, blocker = 0;
    struct ps_until until = ps_until(deadline);
    for (int rc = 0;;) {
        uint32_t seen = 0;
        /* acquire: pairs with the release in clear. */
        if (atomic_compare_exchange_strong_explicit(freezer(region), &seen, ps_owner_word(region) | slept,
                                                    memory_order_acquire, memory_order_relaxed))
            return 0;
        slept = PS_OWNER_WAITING; /* others may sleep still */
        if ((rc = wait_for(region, seen, until.at, &blocker)))
            return tell(region, rc, until, blocker, outcome);
    }
}
