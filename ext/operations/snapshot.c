/* snapshot.c - taking a snapshot: a copy-on-write image of the whole data at one moment.
 *
 * A snapshot has an area behind the data in the memfd, and a state per page.
 * While it is PREPARING page tables are protected, and a store marks its page
 * DIRTY and goes on; at its moment leases have ended, and dirty pages are
 * protected once more; while it is ACTIVE whoever stores saves the page first
 * (pages/save.c).
 *  S1_prepare  PREPARING; page tables are to be protected
 *  S2_protect  they are
 *  S3_drain    no lease is held, and none can be taken
 *  S4_active   ACTIVE; dirty pages are to be protected once more
 *  S5_open     its moment is told; leases may be taken
 *  S7_complete every page is saved (image.c)
 * Invariants
 *  1. Page tables let a store for all pass only where every PREPARING snapshot has
 *     the page DIRTY (or SAVED) and every ACTIVE one SAVED.
 *  2. A page is DIRTY before its maker looks at the word; the word is ACTIVE
 *     before the snapshotter looks for dirty pages: one sees the other.
 *  3. Bits of header.snapshots change under the writer lock; words that end a
 *     snapshot need no lock: a bit without a live word does no harm.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "change/change.h"
#include "core.h"
#include "hold/hold.h"
#include "operations/operations.h"
#include "os/os.h"
#include "os/point.h"
#include "process/process.h"
#include "shared/shared.h"

#define PATIENCE (1000 * PS_MS) /* for the page lock, in the handler */
#define FEW 16u                 /* pages that are closed in the pause rather than in a round before it */

/* An area that nobody has, its byte taken through a description of our own; those that were never used first.  -EAGAIN:
 * to those that nobody has a saver, whom the outcome names, may write still. */
static int find_area(struct ps_region *region, struct ps_snapshot *snapshot, struct ps_outcome *outcome) {
    int fd = ps_query_fd(region);
    uint32_t saver = 0;
    snapshot->fd = fd < 0 ? fd : ps_sys_reopen(fd);
    if (snapshot->fd < 0)
        return snapshot->fd;
    for (int used = 0; used < 2; used++)
        for (uint32_t index = 0; index < region->shape.areas; index++) {
            bool unused = !(ps_snapshot_word(region, index) & ~PS_SNAPSHOT_MASK);
            if (unused == used || !ps_snapshot_has_no_holder(region, index))
                continue;
            if (!ps_snapshot_is_empty(ps_snapshot_word(region, index))) {
                ps_snapshot_end(region, index, ps_snapshot_word(region, index));
                uint32_t found = ps_snapshot_find_saver(region);
                saver = found ? found : saver;
                if (found) /* a stopped one keeps no area from us that was empty when it began */
                    continue;
            }
            snapshot->index = index;
            int rc = ps_sys_ofd_take(snapshot->fd, PS_SNAPSHOT_BYTE + index);
            if (rc != -EAGAIN) /* or an observer keeps it from us: perhaps not the next one */
                return rc;
        }
    if (!saver)
        return PS_EAREAS;
    outcome->silent = 1;
    outcome->pids[0] = ps_owner_pid(region, saver);
    return -EAGAIN;
}

struct taking {
    struct ps_region *region;
    struct ps_snapshot *snapshot;
    struct ps_outcome *outcome;
    int64_t deadline;
    struct ps_shm_closer *closer;
};

static int lock(struct taking *taking) {
    struct ps_outcome *outcome = taking->outcome;
    struct ps_until until = ps_until(taking->deadline);
    uint32_t blocker;
    int rc = ps_lock(taking->region, until.at, &blocker);
    if (rc != -ETIMEDOUT)
        return rc;
    outcome->silent = 0;
    outcome->pids[outcome->silent++] = ps_owner_pid(taking->region, blocker);
    return ps_timed_out(until);
}

/* It begins a new round: page tables that were opened since the last one are closed again.  -EAGAIN: all beginnings
 * were given up. */
static int next_round(struct taking *taking, uint32_t state) {
    struct ps_shm_snapshot *at = ps_snapshot_shared(taking->region, taking->snapshot->index);
    uint32_t word = atomic_load_explicit(&at->word, memory_order_relaxed);
    if ((word & ~PS_SNAPSHOT_MASK) != taking->snapshot->word || !ps_snapshot_is_preparing(word) ||
        !atomic_compare_exchange_strong_explicit(&at->word, &word, taking->snapshot->word | state, memory_order_seq_cst,
                                                 memory_order_relaxed))
        return -EAGAIN;
    if (state == PS_SNAPSHOT_ACTIVE)
        PS_POINT(S4_active);
    /* seq_cst, both: who opens a page in the former round counts before it looks at the word. */
    if (!atomic_exchange_explicit(&at->dirty, 0, memory_order_seq_cst))
        return 0;
    int rc =
        ps_change_follow(taking->region, PS_FOLLOW_DIRTY | (uint32_t)ps_snapshot_dirty_state(word) << PS_FOLLOW_SHIFT,
                         taking->deadline, taking->outcome);
    if (!rc)
        taking->snapshot->generation = taking->outcome->generation;
    return rc;
}

static int start(struct taking *taking, bool *shared) {
    struct ps_region *region = taking->region;
    struct ps_snapshot *snapshot = taking->snapshot;
    int rc = ps_change_settle(region, taking->deadline, taking->outcome);
    if (rc)
        return rc;
    ps_snapshot_sweep_locked(region, ps_sys_now() + PATIENCE);
    rc = find_area(region, snapshot, taking->outcome);
    if (!rc && !ps_snapshot_is_empty(ps_snapshot_word(region, snapshot->index)))
        rc = ps_snapshot_empty_area(region, snapshot->fd, snapshot->index);
    if (rc)
        return rc;
    struct ps_shm_snapshot *at = ps_snapshot_shared(region, snapshot->index);
    snapshot->word = (ps_snapshot_word(region, snapshot->index) & ~PS_SNAPSHOT_MASK) + (1u << PS_SNAPSHOT_BITS);
    if (!snapshot->word) /* 0 says: never used */
        snapshot->word = 1u << PS_SNAPSHOT_BITS;
    atomic_store_explicit(&at->generation, 0, memory_order_relaxed);
    atomic_store_explicit(&at->dirty, 0, memory_order_relaxed);
    atomic_store_explicit(&at->word, snapshot->word | PS_SNAPSHOT_PREPARING, memory_order_seq_cst);
    atomic_fetch_or_explicit(&ps_header(region)->snapshots, UINT64_C(1) << snapshot->index, memory_order_seq_cst);
    PS_POINT(S1_prepare);
    bool writable = ps_any_writable(region);
    *shared = writable || ps_frozen(region); /* they may be again, at the thaw */
    rc = ps_change_follow(region, writable ? PS_FOLLOW_ALL : PS_FOLLOW_NOTHING, taking->deadline, taking->outcome);
    snapshot->generation = taking->outcome->generation;
    PS_POINT(S2_protect);
    for (uint32_t round = 0; !rc && round < PS_SNAPSHOT_ROUNDS; round++) {
        if (atomic_load_explicit(&at->dirty, memory_order_relaxed) <= FEW) /* a guess, of how long the pause would be */
            break;
        rc = next_round(taking, PS_SNAPSHOT_AGAIN + round);
    }
    return rc;
}

/* The moment.  No lease is held, and nobody takes one.  -EAGAIN: the snapshot was given up by those who waited. */
static int activate(struct taking *taking) {
    struct ps_region *region = taking->region;
    struct ps_snapshot *snapshot = taking->snapshot;
    struct ps_shm_snapshot *at = ps_snapshot_shared(region, snapshot->index);
    int rc = ps_change_settle(region, taking->deadline, taking->outcome);
    if (rc)
        return rc;
    rc = next_round(taking, PS_SNAPSHOT_ACTIVE);
    if (rc)
        return rc;
    uint64_t none = 0;
    bool told = atomic_compare_exchange_strong_explicit(&at->generation, &none, snapshot->generation,
                                                        memory_order_seq_cst, memory_order_relaxed);
    ps_sys_wake((_Atomic uint32_t *)(void *)&at->generation, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
    PS_POINT(S5_open);
    return told ? 0 : -EAGAIN;
}

static int take_once(struct taking *taking, bool *shared) {
    struct ps_region *region = taking->region;
    int rc = lock(taking);
    if (rc)
        return rc;
    rc = start(taking, shared);
    ps_unlock(region);
    if (!rc)
        rc = ps_lease_drain(region, PS_CLOSER_SNAPSHOT, taking->deadline, taking->outcome, &taking->closer);
    if (rc)
        return rc;
    PS_POINT(S3_drain);
    rc = lock(taking);
    if (!rc) {
        rc = activate(taking);
        ps_unlock(region);
    }
    ps_lease_open(region, taking->closer);
    return rc;
}

int ps_snapshot_take(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome,
                     struct ps_snapshot *snapshot, bool *shared) {
    struct taking taking = {.region = region, .snapshot = snapshot, .outcome = outcome, .deadline = deadline};
    struct ps_until until = ps_until(deadline);
    int rc;
    if (ps_thread_holds(region)) /* before page tables are protected for nothing */
        return PS_ENESTED;
    do {
        *snapshot = (struct ps_snapshot){.fd = -1};
        outcome->generation = outcome->silent = outcome->failed_pid = outcome->error = 0;
        rc = take_once(&taking, shared);
        if (!rc)
            rc = ps_snapshot_map(snapshot, &region->shape);
        if (rc) { /* as when we die: its byte goes, and the next one to look clears it away */
            if (snapshot->word)
                ps_snapshot_end(region, snapshot->index, ps_snapshot_word(region, snapshot->index));
            ps_snapshot_close(snapshot);
            if (snapshot->word)
                ps_snapshot_sweep(region);
            outcome->generation = 0;
        }
        if (rc == -EAGAIN)
            ps_sys_pause();
    } while (rc == -EAGAIN && ps_sys_now() < until.at);
    return ps_waited(rc == -EAGAIN ? ps_timed_out(until) : rc);
}
