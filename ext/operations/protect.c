/* protect.c - mprotect, freeze, thaw: the verbs that change the map.
 *
 * A change keeps leases from its pages first (hold/closer.c), then goes through all
 * participants (change/change.c).
 *  F1_own     the freezer's word is ours; then the whole region is closed to leases
 *  F2_keep    kept := cur, with the writer lock (change.c)
 *  F3_freeze  `frozen` names the generation before; a change makes everything READ
 *  F4_thaw    a change makes everything what `kept` says; it is never undone
 *  F5_clear   the freezer's word goes; who sleeps on it is woken
 * Invariant: the closer of a freeze goes after its thaw, also that of a dead freezer:
 * no lease is ever over a page that is READ by a freeze alone.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "change/change.h"
#include "core.h"
#include "hold/hold.h"
#include "operations/operations.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

/* -- The steps ------------------------------------------------------------------------------------------------- */

static int change_map(struct ps_region *region, const struct ps_change_request *wanted,
                      struct ps_change_wait *waiting) {
    int rc = ps_change_grants(region, wanted) ? ps_snapshot_let(region, wanted->first, wanted->count) : 0;
    return rc ? rc : ps_change_carry_out(region, wanted, waiting);
}

/* No lease is held in the range, and none can be taken.  -EAGAIN: the region is frozen. */
static int closed_change(struct ps_region *region, const struct ps_change_request *wanted, int64_t deadline,
                         struct ps_outcome *outcome) {
    struct ps_change_wait waiting;
    int rc = ps_change_enter(region, deadline, &waiting, outcome);
    if (rc)
        return rc;
    if (!ps_frozen(region))
        rc = change_map(region, wanted, &waiting);
    else /* and somebody will thaw it: else nobody could ever change it again */
        rc = atomic_load_explicit(&ps_header(region)->freezer, memory_order_relaxed) ? -EAGAIN
                                                                                     : ps_corrupt(region, "frozen");
    ps_change_leave(region, &waiting);
    return rc;
}

int ps_change(struct ps_region *region, uint64_t offset, uint64_t length, uint32_t prot, int64_t deadline,
              struct ps_outcome *outcome) {
    uint64_t unit = region->shape.unit, pages = (length + unit * PS_PAGE - 1) / (unit * PS_PAGE) * unit;
    struct ps_change_request wanted = {PS_SET, prot, offset / PS_PAGE, pages, 0};
    struct ps_shm_closer *closer;
    outcome->generation = outcome->silent = outcome->failed_pid = outcome->error = 0;
    if (ps_freeze_own(region))
        return PS_EFROZEN;
    int rc = ps_lease_close(region, wanted.first, wanted.count, deadline, outcome, &closer);
    if (rc)
        return ps_waited(rc);
    rc = ps_change_save_ahead(region, &wanted, deadline, outcome);
    if (!rc)
        do
            rc = closed_change(region, &wanted, deadline, outcome);
        while (rc == -EAGAIN && !(rc = ps_freeze_wait(region, deadline, outcome)));
    ps_lease_open(region, closer);
    return ps_waited(rc);
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
    int rc = ps_freezer_take(region, deadline, outcome);
    if (rc)
        return ps_waited(rc);
    ps_freezer_thread(region, ps_process_tid());
    atomic_store_explicit(&region->frozen_by, ps_process_tid(), memory_order_relaxed);
    rc = freeze(region, deadline, outcome);
    if (rc && !(rc == PS_ESIGNAL && outcome->generation)) {
        atomic_store_explicit(&region->frozen_by, 0, memory_order_relaxed);
        ps_freezer_clear(region);
    } else { /* from here on it is no thread's, but whose that has the object */
        ps_freezer_thread(region, 0);
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
    ps_freezer_thread(region, ps_process_tid());
    ps_closer_thread(region, closer, ps_process_tid());
    int rc = ps_change_thaw(region, ps_sys_now() + PS_PATIENCE, &blocker);
    if (rc == -ETIMEDOUT || rc == PS_ESIGNAL) {
        ps_freezer_thread(region, 0);
        ps_closer_thread(region, closer, 0);
        return PS_ESIGNAL;
    }
    ps_waited(0);
    atomic_store_explicit(&region->frozen_by, 0, memory_order_relaxed); /* before the next thread of ours has it */
    ps_freezer_clear(region);
    ps_lease_open(region, closer);
    return rc;
}
