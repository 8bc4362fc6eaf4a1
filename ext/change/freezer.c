/* freezer.c - everything is READ for everybody, until it is again what it was.
 *
 *   F1_own     the freezer's word is ours; then the whole region is closed to leases (closer.c)
 *   F2_keep    kept := cur, with the writer lock (change.c)
 *   F3_freeze  `frozen` names the generation before; a change makes everything READ (change.c)
 *   F4_thaw    a change makes everything what `kept` says; it is never undone (change.c)
 *   F5_clear   the freezer's word goes; who sleeps on it is woken, leases are to be had
 *
 * Invariants
 *  1. While `frozen` is not 0 nobody but the owner of the freezer's word changes the map, and `kept` stays as it is: so
 *     a thaw may be executed any number of times.
 *  2. `frozen` becomes 0 when a thaw is complete, and the word goes after it: whoever finds `frozen` with the writer
 *     lock finds an owner of the word to wait for, or to come after.
 *  3. A dead freezer's word is taken over, not cleared: of those who find it dead one thaws, and the others wait for
 *     the end of that.
 *  4. The closer of a freeze goes after its thaw, also that of a dead freezer: no lease is ever over a page that is
 *     READ by a freeze alone.
 * Runs in: caller; ps_freeze_notice also in the fault handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "hold.h"
#include "point.h"

static _Atomic uint32_t *freezer(const struct ps_region *region) {
    return &ps_header(region)->freezer;
}

bool ps_freeze_own(const struct ps_region *region) {
    return atomic_load_explicit(&region->frozen_by, memory_order_relaxed) == ps_process_tid();
}

/* The thread of ours that is at work with the word: should it be ended, another passes it on (lock.c). */
static void tell_thread(struct ps_region *region, int tid) {
    atomic_store_explicit(&region->freezing, tid, memory_order_release);
}

/* release: whoever finds no freezer finds the map as it was. */
static void clear(struct ps_region *region) {
    PS_POINT(F5_clear);
    tell_thread(region, 0);
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
    tell_thread(region, ps_process_tid());
    atomic_store_explicit(&ps_header(region)->thawing, 1, memory_order_release);
    int rc = ps_change_thaw(region, deadline, blocker);
    if (!rc) {
        clear(region);
        return 0;
    }
    tell_thread(region, 0); /* for the next one to bury */
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

static int take_word(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
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

/* Leases have ended, and none begins; then the change. */
static int freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    PS_POINT(F1_own);
    int rc = ps_lease_drain(region, PS_CLOSER_FREEZE, deadline, outcome, &region->freeze_closer);
    if (rc)
        return rc;
    rc = ps_change_freeze(region, deadline, outcome);
    if (rc && !(rc == PS_ESIGNAL && outcome->generation))
        ps_lease_open(region, region->freeze_closer);
    return rc;
}

int ps_freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    outcome->generation = outcome->silent = outcome->failed_pid = outcome->error = 0;
    if (ps_freeze_own(region))
        return PS_EFROZEN;
    if (ps_thread_holds(region)) /* before another freezer is waited for, who may wait for that lease */
        return PS_ENESTED;
    int rc = take_word(region, deadline, outcome);
    if (rc)
        return ps_waited(rc);
    tell_thread(region, ps_process_tid());
    atomic_store_explicit(&region->frozen_by, ps_process_tid(), memory_order_relaxed);
    rc = freeze(region, deadline, outcome);
    if (rc && !(rc == PS_ESIGNAL && outcome->generation)) {
        atomic_store_explicit(&region->frozen_by, 0, memory_order_relaxed);
        clear(region);
    } else { /* from here on it is no thread's, but whose that has the object */
        tell_thread(region, 0);
        ps_closer_thread(region, region->freeze_closer, 0);
    }
    return ps_waited(rc);
}

/* PS_ESIGNAL: the writer lock could not be had yet, and the freeze goes on. */
int ps_thaw(struct ps_region *region) {
    uint32_t blocker;
    if (!ps_process_known())
        return 0; /* a child by a raw clone() has frozen nothing */
    struct ps_shm_closer *closer = region->freeze_closer;
    tell_thread(region, ps_process_tid());
    ps_closer_thread(region, closer, ps_process_tid());
    int rc = ps_change_thaw(region, ps_sys_now() + PS_PATIENCE, &blocker);
    if (rc == -ETIMEDOUT || rc == PS_ESIGNAL) {
        tell_thread(region, 0);
        ps_closer_thread(region, closer, 0);
        return PS_ESIGNAL;
    }
    ps_waited(0);
    atomic_store_explicit(&region->frozen_by, 0, memory_order_relaxed); /* before the next thread of ours has it */
    clear(region);
    ps_lease_open(region, closer);
    return rc;
}
