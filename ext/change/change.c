/* change.c - a change of protection, from the lock to the last acknowledgement.
 *
 * Lives here: the state machine of the caller, which writes the record, the map
 * and the ring (shared/) and waits for everybody.  The steps bear the labels of ARCHITECTURE.md:
 *
 *   C1_lock      take the writer lock; finish an open record first
 *   C2_save      old := cur in the range; arguments; kind := SET
 *   C3_attempt   attempt := generation + 1: the record is open
 *   C4_map       cur := protection in the range (a thaw: what was kept)
 *   C5_publish   ring entry; generation := attempt; wake
 *   C6_await     follow it here, and others from outside (remote.c); wait for every live slot
 *   C7_complete  complete := attempt: closed; unlock
 *   U1_kind      somebody cannot apply it: kind := UNDO; a thaw is never undone
 *   U2_map       cur := old in the range
 *   U3_publish   ring entry; generation := attempt + 1; wake
 *   U4_await     follow it here; wait for every live slot
 *   U5_complete  complete := attempt + 1: closed; unlock
 *   F2_keep, F3_freeze, F4_thaw: what is kept, and the changes that freeze and thaw (freezer.c)
 *
 * Invariants
 *  1. `old` in the range is frozen while the record is open, so C4 to C7 and
 *     U2 to U5 may be executed any number of times, by anybody.
 *  2. generation is attempt - 1, attempt, or (UNDO) attempt + 1 while open.
 *  3. Whoever gives up waiting closes the record first: nobody ever waits
 *     behind a silent participant twice.
 *  4. No call of mmap or mprotect here, and no trust: indices from the record
 *     and the ring are checked against the shape.
 * Not here: the verb (operations/protect.c), keeping leases away (hold/closer.c).
 * Runs in: caller.
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

#define GRACE (20 * PS_MS) /* how long a change goes on after a signal before it is closed for the handler */
#define US INT64_C(1000)
#define PIECE 1024u /* pages that are saved between two looks at the clock */
#define SPIN 500    /* looks at an acknowledgement before sleeping; some 10 µs */
#define PROT_MASK 7u

/* -- The ring ------------------------------------------------------------------------------------------------- */

/* Nothing is lost where the entry is another change's by then: who asks what was written since that hears of more. */
uint64_t ps_generation_told(struct ps_region *region) {
    uint64_t generation = ps_generation(region);
    if (atomic_load_explicit(&ps_header(region)->record.complete, memory_order_acquire) < generation)
        atomic_fetch_or_explicit(&ps_ring(region, generation)->kind, PS_EARLY, memory_order_relaxed);
    return generation;
}

bool ps_change_told_early(const struct ps_region *region, uint64_t generation) {
    return atomic_load_explicit(&ps_ring(region, generation)->kind, memory_order_relaxed) & PS_EARLY;
}

/* The change whose record is open, published or not; false: there is none, or it changes no map.  For who has looked at
 * the map: whatever part of a change was seen there is of this one, or of one that is published. */
bool ps_change_under_way(const struct ps_region *region, uint64_t *generation, uint64_t *first, uint64_t *count) {
    struct ps_shm_record *record = &ps_header(region)->record;
    atomic_thread_fence(memory_order_acquire); /* pairs with C4: who saw the map of a change sees its attempt */
    *generation = atomic_load_explicit(&record->attempt, memory_order_acquire);
    *first = atomic_load_explicit(&record->first, memory_order_relaxed);
    *count = atomic_load_explicit(&record->count, memory_order_relaxed);
    uint32_t prot = atomic_load_explicit(&record->prot, memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire); /* the arguments before the look whether they are an open record's */
    return ps_change_open(region) && atomic_load_explicit(&record->attempt, memory_order_relaxed) == *generation &&
           !(prot & PS_FOLLOWS) && *first < region->shape.pages && *count <= region->shape.pages - *first;
}

/* -- Waiting for acknowledgements ------------------------------------------------------------------------------ */

/* relaxed: the acknowledgement, read before (acquire), orders it. */
static bool failed_at(struct ps_shm_slot *slot, uint64_t generation) {
    uint64_t error = atomic_load_explicit(&slot->error, memory_order_relaxed);
    return (uint32_t)error && error >> 32 == (generation & PS_ACK_MASK);
}

static struct ps_change_wait wait_until(struct ps_until until, struct ps_outcome *outcome) {
    return (struct ps_change_wait){.until = until, .socket = -1, .outcome = outcome};
}

static void tell(struct ps_change_wait *waiting, uint64_t generation, uint32_t failed_pid, int error) {
    struct ps_outcome *outcome = waiting->outcome;
    if (!outcome)
        return;
    outcome->generation = generation;
    outcome->failed_pid = failed_pid;
    outcome->error = (uint32_t)error;
}

/* One sleep on {acknowledgement, liveness}; both are looked at again afterwards. */
static void sleep_on(struct ps_region *region, uint32_t index, uint32_t ack, int64_t now,
                     struct ps_change_wait *waiting) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t live = atomic_load_explicit(&slot->live, memory_order_acquire);
    int64_t backstop = now + (live & FUTEX_OWNER_DIED ? PS_BACKSTOP / 8 : PS_BACKSTOP);
    if (!(ack & PS_ACK_WAITING)) {
        if (!atomic_compare_exchange_strong_explicit(&slot->ack, &ack, ack | PS_ACK_WAITING, memory_order_seq_cst,
                                                     memory_order_relaxed))
            return;
        ack |= PS_ACK_WAITING;
    }
    ps_waits_for(region, ps_owner_of(index, atomic_load_explicit(&slot->status, memory_order_relaxed)));
    if (ps_sleep_two((struct ps_watch){&slot->ack, ack}, (struct ps_watch){&slot->live, live},
                     backstop < waiting->until.at ? backstop : waiting->until.at) == -EINTR)
        ps_until_at_most(&waiting->until, ps_sys_now() + GRACE);
    ps_waits_no_more(region);
}

/* Its page tables follow the generation, or it has no rights at all. */
static bool follows(struct ps_shm_slot *slot, uint32_t ack, const struct ps_change_wait *waiting) {
    if (!ps_acknowledged(slot, ack, waiting->generation))
        return false;
    return !waiting->committed || !failed_at(slot, waiting->generation);
}

static bool spin_for(struct ps_shm_slot *slot, const struct ps_change_wait *waiting) {
    for (int i = 0; i < waiting->spins; i++) {
        if (follows(slot, atomic_load_explicit(&slot->ack, memory_order_acquire), waiting))
            return true;
        __builtin_ia32_pause();
    }
    return false;
}

/* true: acknowledged, or nobody is there to do it; false: silent past the deadline. */
static bool await_slot(struct ps_region *region, uint32_t index, struct ps_change_wait *waiting) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
    if (ps_state_of(status) != PS_LIVE ||
        follows(slot, atomic_load_explicit(&slot->ack, memory_order_acquire), waiting))
        return true;
    waiting->slowest = atomic_load_explicit(&slot->pid, memory_order_relaxed);
    if (spin_for(slot, waiting))
        return true;
    for (bool slept = false;; slept = true) {
        /* acquire: pairs with the agent's exchange: what it applied before is in force. */
        uint32_t ack = atomic_load_explicit(&slot->ack, memory_order_acquire);
        if (follows(slot, ack, waiting))
            return true;
        if (atomic_load_explicit(&slot->status, memory_order_acquire) != status)
            return true; /* left, died, or made room for one that joined under a later lock */
        int64_t now = ps_sys_now();
        if ((slept || now >= waiting->until.at) && ps_slot_dead(region, index, status))
            return true;
        if (now >= waiting->until.at)
            return false;
        sleep_on(region, index, ack, now, waiting);
    }
}

static int await_all(struct ps_region *region, struct ps_change_wait *waiting) {
    struct ps_outcome *outcome = waiting->outcome;
    uint32_t used = ps_slots_used(region), silent = 0;
    waiting->slowest = 0;
    waiting->spins = used <= region->cpus ? SPIN : 0;
    for (uint32_t index = 0; index < used; index++)
        if (!await_slot(region, index, waiting)) {
            if (outcome)
                outcome->pids[silent] = atomic_load_explicit(&ps_slot(region, index)->pid, memory_order_relaxed);
            silent++;
        }
    if (outcome)
        outcome->silent = silent;
    return silent ? ps_timed_out(waiting->until) : 0;
}

int ps_await(struct ps_region *region, uint64_t generation, int64_t deadline, struct ps_outcome *outcome) {
    struct ps_change_wait waiting = wait_until(ps_until(deadline), outcome);
    waiting.generation = outcome->generation = generation;
    waiting.committed = true;
    return ps_waited(await_all(region, &waiting));
}

/* After every acknowledgement: 0, or the errno of one that could not apply this generation. */
static int find_error(struct ps_region *region, uint64_t generation, uint32_t *pid) {
    for (uint32_t index = 0, used = ps_slots_used(region); index < used; index++) {
        struct ps_shm_slot *slot = ps_slot(region, index);
        uint32_t error = (uint32_t)atomic_load_explicit(&slot->error, memory_order_relaxed);
        uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
        if (ps_state_of(status) == PS_LIVE && failed_at(slot, generation)) {
            *pid = atomic_load_explicit(&slot->pid, memory_order_relaxed);
            return error && error < 4096 ? (int)error : EIO;
        }
    }
    return 0;
}

/* Undecided, its caller has died, and nothing says that it is going to be undone: so whoever takes the writer lock
 * next, if anybody does, will most likely make it as a whole.  The attempt is the same on both sides of the look at the
 * lock, so that what a living caller closes or begins meanwhile is not taken for it. */
bool ps_change_deserted(struct ps_region *region) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    uint32_t pid;
    return ps_change_undecided(region) && ps_lock_deserted(region) &&
           atomic_load_explicit(&record->kind, memory_order_acquire) != PS_UNDO && !find_error(region, attempt, &pid) &&
           ps_change_undecided(region) && atomic_load_explicit(&record->attempt, memory_order_relaxed) == attempt;
}

/* -- The steps ------------------------------------------------------------------------------------------------- */

/* Agents whose slots have these bits. */
static void wake(struct ps_region *region, uint32_t bits) {
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&ps_header(region)->generation;
    if (bits)
        ps_sys_wake(low, INT32_MAX, bits);
}

/* Publishes `generation` unless a dead caller did, and follows it here and wherever we can.  A ring entry is written
 * before its generation is published and never again: an agent that fails must find out at any time whether this is
 * an UNDO. */
static void publish(struct ps_region *region, uint64_t generation, enum ps_kind kind, int *socket) {
    struct ps_shm_header *header = ps_header(region);
    struct ps_outside outside;
    if (atomic_load_explicit(&header->generation, memory_order_relaxed) < generation) {
        ps_ring_write(region, generation, kind);
        /* seq_cst: agents that read it (acquire) see the map and the ring entry; and FUTEX_WAIT cannot miss it. */
        atomic_store_explicit(&header->generation, generation, memory_order_seq_cst);
    }
    if (kind == PS_UNDO)
        PS_POINT(U3_publish);
    else
        PS_POINT(C5_publish);
    bool any = ps_remote_plan(region, kind, &outside);
    uint32_t woken = ps_remote_out_of_reach(region, any);
    wake(region, woken);
    ps_fault_install(); /* while the others are at it */
    ps_claim_void(region);
    ps_agent_follow(region, generation, PS_NEVER);
    if (any)
        wake(region, ps_remote_change(region, generation, &outside, socket) & ~woken);
}

static int undo(struct ps_region *region, uint64_t attempt, uint64_t first, uint64_t count,
                struct ps_change_wait *waiting) {
    struct ps_shm_record *record = &ps_header(region)->record;
    if (atomic_load_explicit(&record->prot, memory_order_relaxed) & PS_FOLLOWS) {
        ps_snapshot_forsake(region);
    } else {
        ps_map_copy(region, PS_SEC_CUR, PS_SEC_OLD, first, count / 2);
        PS_POINT(U2_map);
        ps_map_copy(region, PS_SEC_CUR, PS_SEC_OLD, first + count / 2, count - count / 2);
    }
    publish(region, attempt + 1, PS_UNDO, &waiting->socket);
    PS_POINT(U4_await);
    waiting->generation = attempt + 1;
    int rc = await_all(region, waiting);
    PS_POINT(U5_complete);
    ps_ring_close(region, attempt + 1, waiting->slowest);
    return rc;
}

/* From C4 (SET, THAW) or U2 (UNDO) of the open record to its end.  0; PS_ETIMEOUT or PS_ESIGNAL: closed, somebody is
 * silent; -errno: undone, because of outcome->failed_pid (PS_ESIGNAL with outcome->error: so too). */
static int settle(struct ps_region *region, struct ps_change_wait *waiting) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_relaxed);
    uint64_t first = atomic_load_explicit(&record->first, memory_order_relaxed);
    uint64_t count = atomic_load_explicit(&record->count, memory_order_relaxed);
    uint32_t prot = atomic_load_explicit(&record->prot, memory_order_relaxed);
    enum ps_kind kind = (enum ps_kind)atomic_load_explicit(&record->kind, memory_order_relaxed);
    uint32_t failed_pid = 0;
    int error = 0, rc;
    tell(waiting, 0, 0, 0);
    if (!count || first >= region->shape.pages || count > region->shape.pages - first)
        return ps_corrupt(region, "record");
    if (kind != PS_UNDO) {
        if (kind != PS_FOLLOW) {
            ps_map_set(region, kind, first, count / 2, prot & PROT_MASK);
            PS_POINT(C4_map);
            ps_map_set(region, kind, first + count / 2, count - count / 2, prot & PROT_MASK);
        }
        publish(region, attempt, kind, &waiting->socket);
        PS_POINT(C6_await);
        waiting->generation = attempt;
        bool late = prot == PS_FOLLOW_NOTHING || prot == PS_FOLLOW_OPEN; /* nobody has to be in time */
        rc = late ? 0 : await_all(region, waiting);
        if (!rc && !late && kind != PS_THAW)
            error = find_error(region, attempt, &failed_pid);
        if (!error) {
            PS_POINT(C7_complete);
            ps_ring_close(region, attempt, waiting->slowest);
            tell(waiting, attempt, 0, 0);
            return rc;
        }
        PS_POINT(U1_kind);
        atomic_store_explicit(&record->kind, PS_UNDO, memory_order_release);
    }
    rc = undo(region, attempt, first, count, waiting);
    tell(waiting, attempt + 1, failed_pid, error);
    return rc == PS_ESIGNAL || !error ? rc : -error; /* undone, whoever is late for that */
}

static void begin(struct ps_region *region, const struct ps_change_request *change) {
    struct ps_shm_header *header = ps_header(region);
    struct ps_shm_record *record = &header->record;
    if (change->kind != PS_FOLLOW)
        ps_map_copy(region, PS_SEC_OLD, PS_SEC_CUR, change->first, change->count);
    PS_POINT(C2_save);
    atomic_store_explicit(&record->kind, change->kind, memory_order_relaxed);
    atomic_store_explicit(&record->prot, change->prot, memory_order_relaxed);
    atomic_store_explicit(&record->first, change->first, memory_order_relaxed);
    atomic_store_explicit(&record->count, change->count, memory_order_relaxed);
    atomic_store_explicit(&record->back, change->back, memory_order_relaxed);
    atomic_store_explicit(&record->author, region->pid, memory_order_relaxed);
    atomic_store_explicit(&record->time, ps_sys_boottime(), memory_order_relaxed);
    /* release: whoever finds the record open finds these arguments and a frozen `old`. */
    atomic_store_explicit(&record->attempt, atomic_load_explicit(&header->generation, memory_order_relaxed) + 1,
                          memory_order_release);
    PS_POINT(C3_attempt);
}

int ps_change_carry_out(struct ps_region *region, const struct ps_change_request *change,
                        struct ps_change_wait *waiting) {
    begin(region, change);
    int rc = settle(region, waiting);
    ps_agent_settle(region, PS_NEVER);
    return rc;
}

void ps_change_leave(struct ps_region *region, struct ps_change_wait *waiting) {
    ps_borrow_collect(region, waiting->socket); /* whoever was asked has answered before it acknowledged */
    ps_unlock(region);
}

/* Of a caller that died in it, with all that it had changed; whoever is silent then follows late. */
int ps_change_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    int rc = ps_lock(region, deadline, blocker);
    if (rc)
        return rc;
    struct ps_change_wait waiting = wait_until(ps_until(deadline), NULL);
    if (ps_change_open(region))
        rc = settle(region, &waiting);
    ps_agent_settle(region, PS_NEVER);
    ps_change_leave(region, &waiting);
    return rc == PS_ECORRUPT ? rc : 0;
}

/* The record of a dead caller, with the writer lock: what became of it is nothing of ours, nor who was late for it; but
 * who is silent still is told where we come no further. */
static int settle_another(struct ps_region *region, struct ps_change_wait *waiting) {
    int rc = ps_change_open(region) ? settle(region, waiting) : 0;
    tell(waiting, 0, 0, 0);
    if (rc == PS_ETIMEOUT || rc == PS_ESIGNAL || rc == PS_ECORRUPT)
        return rc;
    if (waiting->outcome)
        waiting->outcome->silent = 0;
    return 0;
}

int ps_change_settle(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    struct ps_change_wait waiting = wait_until(ps_until(deadline), outcome);
    int rc = settle_another(region, &waiting);
    ps_borrow_collect(region, waiting.socket);
    return rc;
}

/* Page tables of a large region take their time. */
int ps_change_follow(struct ps_region *region, uint32_t how, int64_t deadline, struct ps_outcome *outcome) {
    struct ps_change_wait waiting = wait_until((struct ps_until){deadline, false}, outcome);
    ps_until_at_most(&waiting.until, ps_sys_now() + PS_PATIENCE + (int64_t)region->shape.pages * US);
    int rc =
        ps_change_carry_out(region, &(struct ps_change_request){PS_FOLLOW, how, 0, region->shape.pages, 0}, &waiting);
    ps_borrow_collect(region, waiting.socket);
    return rc;
}

/* The writer lock is ours, and no record is open. */
int ps_change_enter(struct ps_region *region, int64_t deadline, struct ps_change_wait *waiting,
                    struct ps_outcome *outcome) {
    uint32_t blocker;
    struct ps_until until = ps_until(deadline);
    int rc = ps_lock(region, until.at, &blocker);
    if (rc == -ETIMEDOUT || rc == PS_ESIGNAL) {
        outcome->pids[outcome->silent++] = ps_owner_pid(region, blocker);
        return rc == PS_ESIGNAL ? rc : ps_timed_out(until);
    }
    if (rc)
        return rc;
    *waiting = wait_until(ps_until(deadline), outcome);
    PS_POINT(C1_lock);
    rc = settle_another(region, waiting);
    if (rc)
        ps_change_leave(region, waiting);
    return rc;
}

bool ps_change_grants(const struct ps_region *region, const struct ps_change_request *wanted) {
    return wanted->prot & PROT_WRITE && ps_snapshots(region);
}

/* Whoever may store from now on may do it by system calls too: what snapshots need is saved first, and without the
 * writer lock, as long as that may take: others would wait for it.  With the lock there is little left. */
int ps_change_save_ahead(struct ps_region *region, const struct ps_change_request *wanted, int64_t deadline,
                         struct ps_outcome *outcome) {
    struct ps_until until = ps_until(deadline);
    uint32_t blocker;
    int rc = 0;
    for (uint64_t done = 0; !rc && done < wanted->count && ps_change_grants(region, wanted); done += PIECE) {
        uint64_t rest = wanted->count - done;
        if (done && ps_sys_now() >= until.at)
            return ps_timed_out(until);
        rc = ps_snapshot_keep(region, wanted->first + done, rest < PIECE ? rest : PIECE, until.at, &blocker);
    }
    if (rc == -ETIMEDOUT) {
        outcome->pids[outcome->silent++] = ps_owner_pid(region, blocker);
        rc = ps_timed_out(until);
    }
    return rc;
}

/* -- Freezing -------------------------------------------------------------------------------------------------- */

bool ps_frozen(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->frozen, memory_order_acquire);
}

/* With the writer lock.  Whoever is silent follows late, or fences itself. */
static void thaw(struct ps_region *region, struct ps_change_wait *waiting) {
    struct ps_shm_header *header = ps_header(region);
    uint64_t before = atomic_load_explicit(&header->frozen, memory_order_relaxed);
    PS_POINT(F4_thaw);
    ps_change_carry_out(region, &(struct ps_change_request){PS_THAW, PROT_READ, 0, region->shape.pages, before - 1},
                        waiting);
    /* release: after the end of the record; whoever finds 0 finds the map as it was. */
    atomic_store_explicit(&header->frozen, 0, memory_order_release);
}

static void keep(struct ps_region *region) {
    struct ps_shm_header *header = ps_header(region);
    uint64_t pages = region->shape.pages, half = pages / 2;
    ps_map_copy(region, PS_SEC_KEPT, PS_SEC_CUR, 0, half);
    PS_POINT(F2_keep);
    ps_map_copy(region, PS_SEC_KEPT, PS_SEC_CUR, half, pages - half);
    uint64_t before = atomic_load_explicit(&header->generation, memory_order_relaxed);
    /* release: whoever finds it finds what was kept. */
    atomic_store_explicit(&header->frozen, before + 1, memory_order_release);
    PS_POINT(F3_freeze);
}

/* Everything is READ; after a timeout, or where somebody cannot apply it, what it was.  PS_ESIGNAL with a generation:
 * it is frozen, and somebody has not acknowledged that yet. */
int ps_change_freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    struct ps_change_wait waiting;
    int rc = ps_change_enter(region, deadline, &waiting, outcome);
    if (rc)
        return rc;
    keep(region);
    rc = ps_change_carry_out(region, &(struct ps_change_request){PS_SET, PROT_READ, 0, region->shape.pages, 0},
                             &waiting);
    if (rc == PS_ETIMEOUT) {
        waiting.outcome = NULL;
        waiting.until = (struct ps_until){ps_sys_now() + GRACE, false};
        thaw(region, &waiting);
        outcome->generation = 0;
    } else if (outcome->error) {
        rc = -(int)outcome->error;
        atomic_store_explicit(&ps_header(region)->frozen, 0, memory_order_release);
    }
    ps_change_leave(region, &waiting);
    return rc;
}

/* Whoever froze it, and wherever that one came to.  Fails only where the writer lock could not be had. */
int ps_change_thaw(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    int rc = ps_lock(region, deadline, blocker);
    if (rc)
        return rc;
    struct ps_change_wait waiting = wait_until(ps_until(PS_NEVER), NULL);
    if (ps_change_open(region))
        settle(region, &waiting);
    waiting.until = ps_until(PS_NEVER);
    if (ps_frozen(region))
        thaw(region, &waiting);
    ps_change_leave(region, &waiting);
    return 0;
}
