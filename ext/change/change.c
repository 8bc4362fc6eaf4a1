/* change.c - a change of protection, from the lock to the last acknowledgement.
 *
 * Lives here: the map (one byte a page), the record, and the state machine of
 * the caller.  The steps bear the labels of ARCHITECTURE.md:
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
 *   F2_keep, F3_freeze, F4_thaw: what is kept, and the changes that freeze and thaw (freeze.c)
 *
 * Invariants
 *  1. `old` in the range is frozen while the record is open, so C4 to C7 and
 *     U2 to U5 may be executed any number of times, by anybody.
 *  2. generation is attempt - 1, attempt, or (UNDO) attempt + 1 while open.
 *  3. Whoever gives up waiting closes the record first: nobody ever waits
 *     behind a silent participant twice.
 *  4. No call of mmap or mprotect here, and no trust: indices from the record
 *     and the ring are checked against the shape.
 * Runs in: caller.  ps_change_author and ps_protection also in the fault handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "participant.h"
#include "point.h"

#define GRACE (20 * PS_MS) /* how long a change goes on after a signal before it is closed for the handler */
#define US INT64_C(1000)
#define PIECE 1024u /* pages that are saved between two looks at the clock */
#define SPIN 500    /* looks at an acknowledgement before sleeping; some 10 µs */

/* -- The map -------------------------------------------------------------------------------------------------- */

#define PROT_MASK 7u
#define WORD 8u    /* pages in a 64-bit word of the map */
#define HOLE 4096u /* pages whose bytes share a page of the memfd */

static _Atomic uint8_t *map_of(const struct ps_region *region, enum ps_section_kind section) {
    return ps_section(region, section);
}

/* relaxed everywhere: the generation (or the lock) orders the map; a byte cannot tear, and a reader that
 * overtakes an open change sees what is going to be published. */
static uint8_t map_byte(const struct ps_region *region, uint64_t page) {
    return atomic_load_explicit(map_of(region, PS_SEC_CUR) + page, memory_order_relaxed);
}

static uint64_t map_word(const _Atomic uint8_t *byte) {
    return atomic_load_explicit((const _Atomic uint64_t *)(const void *)byte, memory_order_relaxed);
}

static void map_fill(struct ps_region *region, uint64_t first, uint64_t count, uint32_t prot) {
    _Atomic uint8_t *at = map_of(region, PS_SEC_CUR) + first, *end = at + count;
    uint8_t byte = (uint8_t)(prot ^ region->shape.initial);
    while (at < end)
        if ((uintptr_t)at % WORD == 0 && end - at >= (ptrdiff_t)WORD) {
            atomic_store_explicit((_Atomic uint64_t *)(void *)at, byte * UINT64_C(0x0101010101010101),
                                  memory_order_relaxed);
            at += WORD;
        } else {
            atomic_store_explicit(at++, byte, memory_order_relaxed);
        }
}

static void map_copy(struct ps_region *region, enum ps_section_kind to, enum ps_section_kind from, uint64_t first,
                     uint64_t count) {
    _Atomic uint8_t *target = map_of(region, to) + first, *source = map_of(region, from) + first;
    for (uint64_t i = 0; i < count;)
        if ((uintptr_t)(target + i) % WORD == 0 && count - i >= WORD) {
            atomic_store_explicit((_Atomic uint64_t *)(void *)(target + i), map_word(source + i), memory_order_relaxed);
            i += WORD;
        } else {
            atomic_store_explicit(target + i, atomic_load_explicit(source + i, memory_order_relaxed),
                                  memory_order_relaxed);
            i++;
        }
}

/* C4 of a change that is no undo. */
static void map_set(struct ps_region *region, enum ps_kind kind, uint64_t first, uint64_t count, uint32_t prot) {
    atomic_thread_fence(memory_order_release); /* pairs with fault.c: who sees the map of a change sees its C3 */
    if (kind == PS_THAW)
        map_copy(region, PS_SEC_CUR, PS_SEC_KEPT, first, count);
    else
        map_fill(region, first, count, prot);
}

uint32_t ps_protection(const struct ps_region *region, uint64_t page) {
    return (map_byte(region, page) ^ region->shape.initial) & PROT_MASK;
}

/* The first page from `page` on whose byte the memfd really holds. */
static uint64_t skip_hole(struct ps_region *region, uint64_t page, uint64_t end) {
    uint64_t map = region->shape.offset[PS_SEC_CUR];
    return ps_region_skip_hole(region, map + page, map + end) - map;
}

uint64_t ps_run(struct ps_region *region, uint64_t page, uint64_t end, uint32_t *prot) {
    const _Atomic uint8_t *map = map_of(region, PS_SEC_CUR);
    uint64_t at = page;
    uint8_t byte = map_byte(region, page);
    *prot = (byte ^ region->shape.initial) & PROT_MASK;
    while (++at < end) {
        while (at % WORD == 0 && end - at >= WORD) {
            if (!byte && at % HOLE == 0 && end - at > HOLE)
                at = skip_hole(region, at, end);
            if (at >= end || map_word(map + at) != byte * UINT64_C(0x0101010101010101))
                break;
            at += WORD;
        }
        if (at >= end || map_byte(region, at) != byte)
            break;
    }
    return (at < end ? at : end) - page;
}

/* -- The ring ------------------------------------------------------------------------------------------------- */

bool ps_change_read(const struct ps_region *region, uint64_t generation, struct ps_shm_ring *entry) {
    struct ps_shm_ring *at = ps_ring(region, generation);
    if (atomic_load_explicit(&at->generation, memory_order_acquire) != generation)
        return false;
    uint64_t first = atomic_load_explicit(&at->first, memory_order_relaxed);
    uint64_t count = atomic_load_explicit(&at->count, memory_order_relaxed);
    atomic_store_explicit(&entry->first, first, memory_order_relaxed);
    atomic_store_explicit(&entry->count, count, memory_order_relaxed);
    atomic_store_explicit(&entry->time, atomic_load_explicit(&at->time, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&entry->author, atomic_load_explicit(&at->author, memory_order_relaxed),
                          memory_order_relaxed);
    atomic_store_explicit(&entry->kind, atomic_load_explicit(&at->kind, memory_order_relaxed) & ~PS_EARLY,
                          memory_order_relaxed);
    atomic_store_explicit(&entry->back, atomic_load_explicit(&at->back, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&entry->prot, atomic_load_explicit(&at->prot, memory_order_relaxed), memory_order_relaxed);
    /* acquire fence: pairs with the fence in ring_write; the second look comes after the copy. */
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&at->generation, memory_order_relaxed) == generation && first < region->shape.pages &&
           count <= region->shape.pages - first;
}

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

static void ring_write(struct ps_region *region, uint64_t generation, enum ps_kind kind) {
    struct ps_shm_ring *at = ps_ring(region, generation);
    struct ps_shm_record *record = &ps_header(region)->record;
    atomic_store_explicit(&at->generation, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_release); /* a reader of what follows sees the 0 */
    atomic_store_explicit(&at->first, atomic_load_explicit(&record->first, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->count, atomic_load_explicit(&record->count, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->time, atomic_load_explicit(&record->time, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->author, atomic_load_explicit(&record->author, memory_order_relaxed),
                          memory_order_relaxed);
    atomic_store_explicit(&at->prot, atomic_load_explicit(&record->prot, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->kind, kind, memory_order_relaxed);
    atomic_store_explicit(&at->slowest, 0, memory_order_relaxed);
    atomic_store_explicit(&at->done, 0, memory_order_relaxed);
    atomic_store_explicit(&at->back, atomic_load_explicit(&record->back, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->generation, generation, memory_order_release);
}

/* The record of `generation` closes. */
static void close_record(struct ps_region *region, uint64_t generation, uint32_t slowest) {
    struct ps_shm_ring *at = ps_ring(region, generation);
    atomic_store_explicit(&at->slowest, slowest, memory_order_relaxed);
    atomic_store_explicit(&at->done, ps_sys_boottime(), memory_order_release); /* who sees it sees the slowest */
    /* seq_cst: pairs with an agent that failed, which looks at `complete` after its acknowledgement. */
    atomic_store_explicit(&ps_header(region)->record.complete, generation, memory_order_seq_cst);
}

bool ps_change_open(const struct ps_region *region) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    return atomic_load_explicit(&record->complete, memory_order_acquire) < attempt;
}

/* Open, and the map may still be put back: at U3 it has been. */
bool ps_change_undecided(const struct ps_region *region) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    return ps_generation(region) <= attempt && atomic_load_explicit(&record->complete, memory_order_acquire) < attempt;
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

/* Has the open change of the record, if there is one, set this page already? */
static bool set_by_record(const struct ps_region *region, uint64_t page, struct ps_author *author) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    uint64_t first = atomic_load_explicit(&record->first, memory_order_relaxed);
    uint32_t prot = atomic_load_explicit(&record->prot, memory_order_relaxed);
    if (atomic_load_explicit(&record->kind, memory_order_relaxed) == PS_THAW)
        return false;
    *author = (struct ps_author){true, attempt, atomic_load_explicit(&record->author, memory_order_relaxed),
                                 atomic_load_explicit(&record->time, memory_order_relaxed)};
    return ps_change_open(region) && attempt > ps_generation(region) && page >= first &&
           page - first < atomic_load_explicit(&record->count, memory_order_relaxed) &&
           prot == ps_protection(region, page);
}

/* Is the change `generation`, published already, being undone? */
static bool in_undo(const struct ps_region *region, uint64_t generation) {
    struct ps_shm_record *record = &ps_header(region)->record;
    return ps_change_open(region) && atomic_load_explicit(&record->attempt, memory_order_relaxed) == generation &&
           atomic_load_explicit(&record->kind, memory_order_acquire) == PS_UNDO;
}

/* `last`; or, where an open thaw has the page put back already, the generation before the freeze. */
static uint64_t before_thaw(const struct ps_region *region, uint64_t page, uint64_t last) {
    struct ps_shm_record *record = &ps_header(region)->record;
    if (!ps_change_open(region) || atomic_load_explicit(&record->kind, memory_order_relaxed) != PS_THAW ||
        atomic_load_explicit(&record->attempt, memory_order_relaxed) == last ||
        ps_protection(region, page) == PROT_READ)
        return last;
    uint64_t back = atomic_load_explicit(&record->back, memory_order_relaxed);
    return back < last ? back : last;
}

/* Searches back from the open record through the ring; a change that was undone, or a thaw, set nothing. */
struct ps_author ps_change_author(const struct ps_region *region, uint64_t page) {
    struct ps_author author;
    if (set_by_record(region, page, &author))
        return author;
    uint64_t last = ps_generation(region), oldest = last > PS_RING ? last - PS_RING : 0;
    if (in_undo(region, last))
        last--;
    last = before_thaw(region, page, last);
    for (uint64_t generation = last; generation > oldest; generation--) {
        struct ps_shm_ring entry;
        if (!ps_change_read(region, generation, &entry))
            return (struct ps_author){.known = false};
        if (entry.kind == PS_UNDO)
            generation--;
        else if (entry.kind == PS_THAW)
            generation = entry.back < generation ? entry.back + 1 : generation;
        else if (entry.kind != PS_FOLLOW && page >= entry.first && page - entry.first < entry.count)
            return (struct ps_author){true, generation, entry.author, entry.time};
    }
    if (oldest)
        return (struct ps_author){.known = false};
    return (struct ps_author){true, 0, region->shape.creator, region->shape.created};
}

/* -- Waiting for acknowledgements ------------------------------------------------------------------------------ */

struct waiting {
    uint64_t generation;
    struct ps_until until;
    bool committed;   /* nobody undoes it: who failed is waited for until it has fenced itself */
    uint32_t slowest; /* pid of the last one that had not acknowledged when it was first looked at; 0: none */
    int spins;  /* looks before sleeping: where every agent has a CPU of its own it answers sooner than we sleep */
    int socket; /* of ours, for answers from agents that were asked for their userfaultfd; -1: none was */
    struct ps_outcome *outcome; /* NULL: nobody wants to know; it is large, and there is little room in the handler */
};

/* relaxed: the acknowledgement, read before (acquire), orders it. */
static bool failed_at(struct ps_shm_slot *slot, uint64_t generation) {
    uint64_t error = atomic_load_explicit(&slot->error, memory_order_relaxed);
    return (uint32_t)error && error >> 32 == (generation & PS_ACK_MASK);
}

static struct waiting wait_until(struct ps_until until, struct ps_outcome *outcome) {
    return (struct waiting){.until = until, .socket = -1, .outcome = outcome};
}

static void tell(struct waiting *waiting, uint64_t generation, uint32_t failed_pid, int error) {
    struct ps_outcome *outcome = waiting->outcome;
    if (!outcome)
        return;
    outcome->generation = generation;
    outcome->failed_pid = failed_pid;
    outcome->error = (uint32_t)error;
}

/* One sleep on {acknowledgement, liveness}; both are looked at again afterwards. */
static void sleep_on(struct ps_region *region, uint32_t index, uint32_t ack, int64_t now, struct waiting *waiting) {
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
static bool follows(struct ps_shm_slot *slot, uint32_t ack, const struct waiting *waiting) {
    if (!ps_acknowledged(slot, ack, waiting->generation))
        return false;
    return !waiting->committed || !failed_at(slot, waiting->generation);
}

static bool spin_for(struct ps_shm_slot *slot, const struct waiting *waiting) {
    for (int i = 0; i < waiting->spins; i++) {
        if (follows(slot, atomic_load_explicit(&slot->ack, memory_order_acquire), waiting))
            return true;
        __builtin_ia32_pause();
    }
    return false;
}

/* true: acknowledged, or nobody is there to do it; false: silent past the deadline. */
static bool await_slot(struct ps_region *region, uint32_t index, struct waiting *waiting) {
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

static int await_all(struct ps_region *region, struct waiting *waiting) {
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
    struct waiting waiting = wait_until(ps_until(deadline), outcome);
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
        ring_write(region, generation, kind);
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

static int undo(struct ps_region *region, uint64_t attempt, uint64_t first, uint64_t count, struct waiting *waiting) {
    struct ps_shm_record *record = &ps_header(region)->record;
    if (atomic_load_explicit(&record->prot, memory_order_relaxed) & PS_FOLLOWS) {
        ps_snapshot_forsake(region);
    } else {
        map_copy(region, PS_SEC_CUR, PS_SEC_OLD, first, count / 2);
        PS_POINT(U2_map);
        map_copy(region, PS_SEC_CUR, PS_SEC_OLD, first + count / 2, count - count / 2);
    }
    publish(region, attempt + 1, PS_UNDO, &waiting->socket);
    PS_POINT(U4_await);
    waiting->generation = attempt + 1;
    int rc = await_all(region, waiting);
    PS_POINT(U5_complete);
    close_record(region, attempt + 1, waiting->slowest);
    return rc;
}

/* From C4 (SET, THAW) or U2 (UNDO) of the open record to its end.  0; PS_ETIMEOUT or PS_ESIGNAL: closed, somebody is
 * silent; -errno: undone, because of outcome->failed_pid (PS_ESIGNAL with outcome->error: so too). */
static int settle(struct ps_region *region, struct waiting *waiting) {
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
            map_set(region, kind, first, count / 2, prot & PROT_MASK);
            PS_POINT(C4_map);
            map_set(region, kind, first + count / 2, count - count / 2, prot & PROT_MASK);
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
            close_record(region, attempt, waiting->slowest);
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

struct change {
    enum ps_kind kind; /* any but PS_UNDO */
    uint32_t prot;     /* or enum ps_follow */
    uint64_t first, count;
    uint64_t back; /* of a thaw the generation before the freeze */
};

static void begin(struct ps_region *region, const struct change *change) {
    struct ps_shm_header *header = ps_header(region);
    struct ps_shm_record *record = &header->record;
    if (change->kind != PS_FOLLOW)
        map_copy(region, PS_SEC_OLD, PS_SEC_CUR, change->first, change->count);
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

static int carry_out(struct ps_region *region, const struct change *change, struct waiting *waiting) {
    begin(region, change);
    int rc = settle(region, waiting);
    ps_agent_settle(region, PS_NEVER);
    return rc;
}

static void leave(struct ps_region *region, struct waiting *waiting) {
    ps_borrow_collect(region, waiting->socket); /* whoever was asked has answered before it acknowledged */
    ps_unlock(region);
}

/* Of a caller that died in it, with all that it had changed; whoever is silent then follows late. */
int ps_change_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    int rc = ps_lock(region, deadline, blocker);
    if (rc)
        return rc;
    struct waiting waiting = wait_until(ps_until(deadline), NULL);
    if (ps_change_open(region))
        rc = settle(region, &waiting);
    ps_agent_settle(region, PS_NEVER);
    leave(region, &waiting);
    return rc == PS_ECORRUPT ? rc : 0;
}

/* The record of a dead caller, with the writer lock: what became of it is nothing of ours, nor who was late for it; but
 * who is silent still is told where we come no further. */
static int settle_another(struct ps_region *region, struct waiting *waiting) {
    int rc = ps_change_open(region) ? settle(region, waiting) : 0;
    tell(waiting, 0, 0, 0);
    if (rc == PS_ETIMEOUT || rc == PS_ESIGNAL || rc == PS_ECORRUPT)
        return rc;
    if (waiting->outcome)
        waiting->outcome->silent = 0;
    return 0;
}

int ps_change_settle(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    struct waiting waiting = wait_until(ps_until(deadline), outcome);
    int rc = settle_another(region, &waiting);
    ps_borrow_collect(region, waiting.socket);
    return rc;
}

/* Page tables of a large region take their time. */
int ps_change_follow(struct ps_region *region, uint32_t how, int64_t deadline, struct ps_outcome *outcome) {
    struct waiting waiting = wait_until((struct ps_until){deadline, false}, outcome);
    ps_until_at_most(&waiting.until, ps_sys_now() + PS_PATIENCE + (int64_t)region->shape.pages * US);
    int rc = carry_out(region, &(struct change){PS_FOLLOW, how, 0, region->shape.pages, 0}, &waiting);
    ps_borrow_collect(region, waiting.socket);
    return rc;
}

/* The writer lock is ours, and no record is open. */
static int enter(struct ps_region *region, int64_t deadline, struct waiting *waiting, struct ps_outcome *outcome) {
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
        leave(region, waiting);
    return rc;
}

static bool grants(const struct ps_region *region, const struct change *wanted) {
    return wanted->prot & PROT_WRITE && ps_snapshots(region);
}

/* Whoever may store from now on may do it by system calls too: what snapshots need is saved first, and without the
 * writer lock, as long as that may take: others would wait for it.  With the lock there is little left. */
static int save_ahead(struct ps_region *region, const struct change *wanted, int64_t deadline,
                      struct ps_outcome *outcome) {
    struct ps_until until = ps_until(deadline);
    uint32_t blocker;
    int rc = 0;
    for (uint64_t done = 0; !rc && done < wanted->count && grants(region, wanted); done += PIECE) {
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

static int change_map(struct ps_region *region, const struct change *wanted, struct waiting *waiting) {
    int rc = grants(region, wanted) ? ps_snapshot_let(region, wanted->first, wanted->count) : 0;
    return rc ? rc : carry_out(region, wanted, waiting);
}

/* No lease is held in the range, and none can be taken.  -EAGAIN: the region is frozen. */
static int closed_change(struct ps_region *region, const struct change *wanted, int64_t deadline,
                         struct ps_outcome *outcome) {
    struct waiting waiting;
    int rc = enter(region, deadline, &waiting, outcome);
    if (rc)
        return rc;
    if (!ps_frozen(region))
        rc = change_map(region, wanted, &waiting);
    else /* and somebody will thaw it: else nobody could ever change it again */
        rc = atomic_load_explicit(&ps_header(region)->freezer, memory_order_relaxed) ? -EAGAIN
                                                                                     : ps_corrupt(region, "frozen");
    leave(region, &waiting);
    return rc;
}

int ps_change(struct ps_region *region, uint64_t offset, uint64_t length, uint32_t prot, int64_t deadline,
              struct ps_outcome *outcome) {
    uint64_t unit = region->shape.unit, pages = (length + unit * PS_PAGE - 1) / (unit * PS_PAGE) * unit;
    struct change wanted = {PS_SET, prot, offset / PS_PAGE, pages, 0};
    struct ps_shm_closer *closer;
    outcome->generation = outcome->silent = outcome->failed_pid = outcome->error = 0;
    if (ps_freeze_own(region))
        return PS_EFROZEN;
    int rc = ps_lease_close(region, wanted.first, wanted.count, deadline, outcome, &closer);
    if (rc)
        return ps_waited(rc);
    rc = save_ahead(region, &wanted, deadline, outcome);
    if (!rc)
        do
            rc = closed_change(region, &wanted, deadline, outcome);
        while (rc == -EAGAIN && !(rc = ps_freeze_wait(region, deadline, outcome)));
    ps_lease_open(region, closer);
    return ps_waited(rc);
}

/* -- Freezing -------------------------------------------------------------------------------------------------- */

bool ps_frozen(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->frozen, memory_order_acquire);
}

/* With the writer lock.  Whoever is silent follows late, or fences itself. */
static void thaw(struct ps_region *region, struct waiting *waiting) {
    struct ps_shm_header *header = ps_header(region);
    uint64_t before = atomic_load_explicit(&header->frozen, memory_order_relaxed);
    PS_POINT(F4_thaw);
    carry_out(region, &(struct change){PS_THAW, PROT_READ, 0, region->shape.pages, before - 1}, waiting);
    /* release: after the end of the record; whoever finds 0 finds the map as it was. */
    atomic_store_explicit(&header->frozen, 0, memory_order_release);
}

static void keep(struct ps_region *region) {
    struct ps_shm_header *header = ps_header(region);
    uint64_t pages = region->shape.pages, half = pages / 2;
    map_copy(region, PS_SEC_KEPT, PS_SEC_CUR, 0, half);
    PS_POINT(F2_keep);
    map_copy(region, PS_SEC_KEPT, PS_SEC_CUR, half, pages - half);
    uint64_t before = atomic_load_explicit(&header->generation, memory_order_relaxed);
    /* release: whoever finds it finds what was kept. */
    atomic_store_explicit(&header->frozen, before + 1, memory_order_release);
    PS_POINT(F3_freeze);
}

/* Everything is READ; after a timeout, or where somebody cannot apply it, what it was.  PS_ESIGNAL with a generation:
 * it is frozen, and somebody has not acknowledged that yet. */
int ps_change_freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    struct waiting waiting;
    int rc = enter(region, deadline, &waiting, outcome);
    if (rc)
        return rc;
    keep(region);
    rc = carry_out(region, &(struct change){PS_SET, PROT_READ, 0, region->shape.pages, 0}, &waiting);
    if (rc == PS_ETIMEOUT) {
        waiting.outcome = NULL;
        waiting.until = (struct ps_until){ps_sys_now() + GRACE, false};
        thaw(region, &waiting);
        outcome->generation = 0;
    } else if (outcome->error) {
        rc = -(int)outcome->error;
        atomic_store_explicit(&ps_header(region)->frozen, 0, memory_order_release);
    }
    leave(region, &waiting);
    return rc;
}

/* Whoever froze it, and wherever that one came to.  Fails only where the writer lock could not be had. */
int ps_change_thaw(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    int rc = ps_lock(region, deadline, blocker);
    if (rc)
        return rc;
    struct waiting waiting = wait_until(ps_until(PS_NEVER), NULL);
    if (ps_change_open(region))
        settle(region, &waiting);
    waiting.until = ps_until(PS_NEVER);
    if (ps_frozen(region))
        thaw(region, &waiting);
    leave(region, &waiting);
    return 0;
}
