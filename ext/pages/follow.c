/* follow.c - applying generations to our own page tables, and acknowledging them.
 *
 * Runs in: agent; caller, for itself; ps_agent_follow also after a fork.
 * Invariants
 *  1. An acknowledgement follows the page tables: whoever applies holds the page
 *     lock and the claim from the first change of them to the exchange.
 *  2. Never more rights than the map gives once `applied` says so: on failure we
 *     report, and are undone, or fence ourselves.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/mman.h>

#include "core.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

#define PIECE (4u * PS_CHUNK) /* pages */
#define SLICE (20 * PS_MS)    /* of the agent's own waits: does anybody still want it? */

/* -- What a snapshot asks -------------------------------------------------------------------------------------- */

/* Pages that were opened in one round of preparing. */
static int follow_dirty(struct ps_region *region, uint32_t index, uint8_t state, uint64_t first, uint64_t end) {
    const _Atomic uint8_t *states = ps_snapshot_states(region, index);
    int rc = 0;
    for (uint64_t page = first; !rc && (page = ps_snapshot_next_touched(region, index, page, end)) < end;) {
        uint64_t run = 0;
        while (page + run < end && ps_state_at(states, page + run) == state)
            run++;
        if (run)
            rc = ps_engine_apply(region, page, run);
        page += run ? run : 1;
    }
    return rc;
}

/* Pages that not all may write are as closed as before; following them too would take their marks, which leases need.
 */
static int follow_writable(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = 0;
    for (uint64_t page = first, end = first + count, run; page < end && !rc; page += run) {
        uint32_t prot;
        run = ps_run(region, page, end, &prot);
        if (prot & PROT_WRITE)
            rc = ps_engine_apply(region, page, run);
    }
    return rc;
}

/* In the place of the map's: what a PS_FOLLOW asks of its own page tables. */
static int follow_snapshot(struct ps_region *region, uint32_t how, uint64_t first, uint64_t count) {
    if (how == PS_FOLLOW_NOTHING)
        return 0;
    if (how == PS_FOLLOW_OPEN) { /* less than all is no fault: who stores there mends it */
        follow_writable(region, first, count);
        return 0;
    }
    if (how == PS_FOLLOW_ALL) { /* who cannot have the mapping says so now: a store could only die of it later */
        int rc = ps_snapshot_map_shadow(region);
        return rc ? rc : follow_writable(region, first, count);
    }
    int rc = 0;
    for (uint64_t mask = ps_snapshots_live(region); mask && !rc; mask &= mask - 1)
        rc = follow_dirty(region, (uint32_t)__builtin_ctzll(mask), (uint8_t)(how >> PS_FOLLOW_SHIFT), first,
                          first + count);
    return rc;
}

/* -- Following ------------------------------------------------------------------------------------------------- */

/* What a snapshot asks of all pages is done in pieces before we follow: a thread of ours that stores meanwhile waits
 * for one of them.  Whatever comes in between goes by the same map and the same states. */
static void go_ahead(struct ps_region *region, uint64_t generation, int64_t deadline) {
    struct ps_shm_ring entry;
    if (ps_applied(region) + 1 != generation || !ps_change_read(region, generation, &entry) ||
        entry.kind != PS_FOLLOW || entry.prot == PS_FOLLOW_NOTHING)
        return;
    for (uint64_t first = 0, pages = region->shape.pages; first < pages; first += PIECE) {
        if (ps_pages_take(region, deadline))
            return;
        bool last = pages - first <= PIECE;
        bool usual = ps_applied(region) + 1 == generation && !region->failed && !region->fenced && !region->unsynced;
        int rc = usual ? follow_snapshot(region, entry.prot, first, last ? pages - first : PIECE) : -EAGAIN;
        if (last && !rc)
            region->ahead = generation;
        ps_pages_pass(region);
        if (rc)
            return;
    }
}

static int catch_up(struct ps_region *region, uint64_t from, uint64_t to) {
    if (region->unsynced)
        return ps_engine_sync(region);
    if (region->failed || region->fenced || to - from > PS_RING)
        return ps_engine_apply(region, 0, region->shape.pages);
    for (uint64_t generation = from + 1; generation <= to; generation++) {
        struct ps_shm_ring entry;
        if (!ps_change_read(region, generation, &entry)) /* overwritten meanwhile */
            return ps_engine_apply(region, 0, region->shape.pages);
        int rc = entry.kind != PS_FOLLOW       ? ps_engine_apply(region, entry.first, entry.count)
                 : region->ahead != generation ? follow_snapshot(region, entry.prot, 0, region->shape.pages)
                                               : 0;
        if (rc)
            return rc;
    }
    return 0;
}

static void fence(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    ps_engine_fence(region);
    region->failed = false;
    region->fenced = true;
    atomic_store_explicit(&slot->error, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->flags, PS_SLOT_FENCED, memory_order_release);
}

static bool nobody_undoes(const struct ps_region *region, uint64_t generation) {
    /* seq_cst: after our acknowledgement, against the caller's store before it stops looking at errors. */
    return atomic_load_explicit(&ps_header(region)->record.complete, memory_order_seq_cst) >= generation;
}

static void report(struct ps_region *region, uint64_t generation, int rc) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    struct ps_shm_ring entry;
    /* Nobody undoes an UNDO or a THAW; an entry that cannot be read may be one. */
    bool final = rc && (!ps_change_read(region, generation, &entry) || entry.kind == PS_UNDO || entry.kind == PS_THAW);
    if (rc && (final || region->fenced || nobody_undoes(region, generation))) {
        fence(region);
    } else if (rc) {
        region->failed = true;
        /* relaxed: the exchange of the acknowledgement publishes it. */
        atomic_store_explicit(&slot->error, (generation & PS_ACK_MASK) << 32 | (uint32_t)-rc, memory_order_relaxed);
        PS_POINT(A3_fail);
    } else if (region->failed || region->fenced) {
        region->failed = region->fenced = false;
        atomic_store_explicit(&slot->error, 0, memory_order_relaxed);
        atomic_store_explicit(&slot->flags, 0, memory_order_release);
    }
}

/* seq_cst exchange, a full barrier: the waiter's flag is read by the very store that it waits for. */
static bool acknowledge(struct ps_region *region, uint64_t generation) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    atomic_store_explicit(&slot->applied, generation, memory_order_relaxed);
    uint32_t seen = atomic_exchange_explicit(&slot->ack, (uint32_t)generation & PS_ACK_MASK, memory_order_seq_cst);
    return seen & PS_ACK_WAITING;
}

static bool lacks_descriptor(const struct ps_region *region, int rc) {
    return (rc == -EMFILE || rc == -ENFILE || rc == -EBADF) && !ps_process_is_agent(region);
}

/* Fails only where the deadline passes while another process that holds the claim is stopped, or another thread of
 * ours waits for that.  The caller must then wait for our own slot too: it may be our agent that follows. */
int ps_agent_follow(struct ps_region *region, uint64_t generation, int64_t deadline) {
    bool waited_for = false;
    go_ahead(region, generation, deadline);
    int rc = ps_pages_take(region, deadline);
    if (rc)
        return rc;
    uint64_t applied = ps_applied(region);
    if (applied < generation || region->unsynced) {
        PS_POINT(A2_apply);
        rc = catch_up(region, applied, generation);
        if (lacks_descriptor(region, rc)) {
            atomic_store_explicit(&region->unsynced, true, memory_order_seq_cst); /* before others of us look */
            ps_pages_give(region);
            ps_agent_wake(region);
            return 0;
        }
        report(region, generation, rc);
        PS_POINT(A4_ack);
        waited_for = acknowledge(region, applied < generation ? generation : applied);
    }
    ps_pages_give(region);
    if (waited_for)
        ps_sys_wake(&ps_slot(region, region->slot)->ack, INT32_MAX, FUTEX_BITSET_MATCH_ANY); /* threads of ours, too */
    return 0;
}

/* A change that failed here is undone by a new generation; where the caller gave up instead, nobody undoes it,
 * and we must not keep rights that the map took away. */
void ps_agent_settle(struct ps_region *region, int64_t deadline) {
    if (!region->failed || ps_pages_take(region, deadline))
        return;
    if (region->failed && nobody_undoes(region, ps_applied(region)))
        fence(region);
    ps_pages_give(region);
}

/* A sleep until our agent has followed, or a little while has passed. */
static void await_agent(struct ps_region *region) {
    _Atomic uint32_t *ack = &ps_slot(region, region->slot)->ack;
    uint32_t seen = atomic_load_explicit(ack, memory_order_relaxed), flagged = seen | PS_ACK_WAITING;
    if (seen == flagged ||
        atomic_compare_exchange_strong_explicit(ack, &seen, flagged, memory_order_seq_cst, memory_order_relaxed))
        ps_sleep((struct ps_watch){ack, flagged}, ps_sys_now() + PS_MS);
}

/* A call has changed page tables of ours, with this result.  Where it had no descriptor for that our agent, which has
 * one, makes them follow the whole map, and the result is what came of it: 0, or an error.  After an error the agent
 * may still do it, or have done it: a caller who wants the page tables of before has to see to that.  Short deadlines
 * are SLICE. */
int ps_agent_help(struct ps_region *region, int rc, int64_t deadline) {
    if (!lacks_descriptor(region, rc))
        return rc;
    int64_t least = ps_sys_now() + SLICE, end = deadline > least ? deadline : least;
    atomic_store_explicit(&region->unsynced, true, memory_order_seq_cst);
    while (ps_running(region) && ps_slot_marked(region)) {
        ps_agent_wake(region);
        if (ps_page_lock(region, end)) /* the agent has it while it follows */
            return -ETIMEDOUT;
        bool fenced = region->fenced, failed = region->failed, done = !region->unsynced;
        ps_page_unlock(region);
        if (fenced || failed || done)
            return fenced ? -EACCES : failed ? rc : 0;
        if (ps_sys_now() >= end)
            return -ETIMEDOUT;
        await_agent(region);
    }
    return rc;
}

/* For a lease that ends, and whose pages cannot be closed otherwise.  Without the claim, which a stopped process may
 * have: marks are all that it can take away, and what is no-access has no use for them. */
void ps_agent_fence(struct ps_region *region) {
    ps_page_lock(region, PS_NEVER);
    fence(region);
    ps_page_unlock(region);
}

/* Everything, for a joiner, under the writer lock: so nobody but an earlier owner of the slot can have its claim. */
int ps_follow_all(struct ps_region *region) {
    ps_claim_void(region);
    int rc = ps_pages_take(region, PS_NEVER);
    if (rc)
        return rc;
    uint64_t generation = ps_generation(region);
    rc = ps_engine_apply(region, 0, region->shape.pages);
    PS_POINT(J3_apply);
    if (!rc) {
        region->failed = region->fenced = false;
        acknowledge(region, generation);
    }
    ps_pages_give(region);
    return rc;
}

/* -- The thread ------------------------------------------------------------------------------------------------ */

/* It may be about to sleep: whoever wants something of it wakes it again until it is done. */
void ps_agent_wake(struct ps_region *region) {
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&ps_header(region)->generation;
    ps_sys_wake(low, INT32_MAX, ps_slot_bit(region->slot));
}
