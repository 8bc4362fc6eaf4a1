/* attach.c - the life of a handle: attach, join, fork, close, release.
 *
 * Invariants
 *  1. In a forked child every range is reserved before anything else runs that
 *     may ask for memory; then each open region joins anew, with a deadline, and
 *     is detached (no access) where it cannot.
 *  2. A handle is closed once, by whoever gets it from OPEN to CLOSING.
 * Runs in: caller; before and after a fork, in the thread that forks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "change/change.h"
#include "core.h"
#include "hold/hold.h"
#include "os/os.h"
#include "participant/participant.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

#define GLANCE (20 * PS_MS) /* a call waits so long for who thaws for a dead freezer */

static void forget_all(struct ps_region *region) {
    ps_cached_forget(region, &region->memory);
    ps_cached_forget(region, &region->entry);
    ps_cached_forget(region, &region->userfault);
    ps_borrow_give_back(region);
}

/* Nothing is left of it but the reservation. */
static void shut(struct ps_region *region) {
    forget_all(region);
    atomic_store_explicit(&region->use, PS_SHUT, memory_order_release);
}

/* Of a region that did not open, or whose opening thread did not come along in a fork. */
static void discard(struct ps_region *region) {
    shut(region);
    ps_release(region);
}

/* The child inherits the program's table, so what the program lost is fetched while the agent still has it. */
static void before_fork(void) {
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region))
        if (ps_use_of(region) == PS_OPEN && ps_process_known()) {
            ps_cached_get(region, &region->memory);
            ps_cached_get(region, &region->entry);
        }
}

static void reserve_all(void) {
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region)) {
        if (ps_use_of(region) == PS_UNUSED || !region->base)
            continue;
        if (ps_region_reserve(region)) /* then nothing is mapped there, and it must not become a participant */
            atomic_store_explicit(&region->use, PS_SHUT, memory_order_release);
    }
}

/* In a forked child: it takes part where its parent did. */
static void join_again(struct ps_region *region, int64_t deadline) {
    struct ps_outcome outcome;
    uint32_t use = ps_use_of(region);
    if (use != PS_UNUSED) {
        ps_process_forget(region);
        ps_cached_forget(region, &region->userfault); /* it changes our parent's page tables */
    }
    int rc = use == PS_OPEN ? PS_ESIGNAL : PS_ECLOSED;
    while (rc == PS_ESIGNAL) /* handlers run when fork is over: until then nobody may use the memory */
        rc = ps_agent_start(region, deadline, &outcome);
    if (!rc) /* or detached: ps_ready tries again */
        ps_cached_get(region, &region->userfault);
    if (use == PS_OPENING) /* by a thread that is not here */
        discard(region);
    else if (use == PS_CLOSING) /* likewise; its owner gives the reservation back */
        shut(region);
}

static void in_child(void) {
    reserve_all();
    if (!ps_process_known())
        return;
    int64_t deadline = ps_sys_now() + PS_JOIN_TIMEOUT;
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region))
        join_again(region, deadline);
}

/* When the library is loaded, so before any fork that has to do with a region. */
__attribute__((constructor)) static void start(void) {
    ps_process_at_fork(before_fork, in_child);
}

int ps_attach(int fd, int name_fd, enum ps_engine engine, struct ps_region **out, const char **field) {
    struct ps_shape shape;
    int rc = ps_region_validate(fd, &shape, field);
    if (!rc)
        rc = ps_process_start();
    if (rc)
        return rc;
    struct ps_region *region = ps_process_claim();
    if (!region)
        return PS_EREGIONS;
    region->shape = shape;
    region->engine = engine;
    region->policy = shape.policy;
    rc = ps_region_fill(region, fd, name_fd);
    if (rc)
        discard(region);
    *out = region;
    return rc;
}

int ps_join(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome, const char **field) {
    int rc = ps_agent_start(region, deadline, outcome);
    if (rc == PS_ESIGNAL)
        return rc;
    /* So that the marks do not go with the agent, and that calls need not wait for it (ps_agent_help). */
    int fd = rc || !region->uffd ? 0 : ps_cached_get(region, &region->userfault);
    if (fd == -EMFILE || fd == -ENFILE) {
        ps_agent_stop(region);
        rc = fd;
    }
    if (rc) {
        *field = atomic_load_explicit(&region->corrupt, memory_order_relaxed);
        discard(region);
        return rc;
    }
    atomic_store_explicit(&region->use, PS_OPEN, memory_order_release);
    ps_fault_stack();
    ps_fault_install();
    sigset_t blocked;
    ps_fault_unblock(true, &blocked); /* for good, and for the threads that this one starts */
    return 0;
}

void ps_join_abandon(struct ps_region *region) {
    ps_agent_stop(region);
    discard(region);
}

/* At once, so that no fork comes in between: a child of a process that is closing it has no part in it. */
int ps_close_begin(struct ps_region *region) {
    uint32_t open = PS_OPEN;
    return ps_process_known() && atomic_compare_exchange_strong_explicit(&region->use, &open, PS_CLOSING,
                                                                         memory_order_acq_rel, memory_order_relaxed)
               ? 0
               : PS_ECLOSED;
}

void ps_close(struct ps_region *region) {
    ps_agent_stop(region);
    shut(region);
}

void ps_release(struct ps_region *region) {
    if (!ps_process_known())
        return;
    uintptr_t base = atomic_exchange_explicit(&region->base, 0, memory_order_acq_rel);
    if (base)
        munmap((void *)base, region->span);
    if (region->here)
        munmap((void *)region->here, ps_here_length(region));
    region->here = NULL;
    if (region->counts)
        munmap((void *)region->counts, PS_TIDS * sizeof *region->counts);
    region->counts = NULL;
    atomic_store_explicit(&region->use, PS_UNUSED, memory_order_release);
}

int ps_ready_now(const struct ps_region *region) {
    if (!ps_process_known() || atomic_load_explicit(&region->use, memory_order_acquire) != PS_OPEN)
        return PS_ECLOSED;
    return ps_running(region) && ps_slot_marked(region);
}

static int be_ready(struct ps_region *region, struct ps_outcome *outcome) {
    int rc = ps_ready_now(region);
    if (rc)
        return rc < 0 ? rc : 0;
    if (ps_running(region) && !ps_agent_lost(region))
        return 0;
    rc = ps_agent_start(region, ps_sys_now() + PS_JOIN_TIMEOUT, outcome);
    if (!rc)
        ps_cached_get(region, &region->userfault);
    return rc;
}

int ps_ready(struct ps_region *region, struct ps_outcome *outcome) {
    outcome->silent = 0;
    int rc = be_ready(region, outcome);
    if (rc)
        return rc;
    ps_freeze_notice(region, GLANCE);
    ps_snapshot_notice(region);
    return 0;
}
