/* slot.c - who takes part, who is alive.
 *
 * Lives here: claiming, opening and leaving a slot; the signs of death.
 * Invariants
 *  1. A slot belongs to whoever holds the OFD lock on byte `slot` of the memfd
 *     through the description that its mapping uses, and has set its status.  So
 *     a free byte proves that no thread of its owner can reach the memory.  Only
 *     locks to write count: who may only read can take the others.
 *     Who cannot lock it (no description of its own may be opened, or somebody
 *     has a lock to read on it) owns its slot BARE: by its status alone, until
 *     its process is known to be gone.
 *  2. OWNER_DIED in the liveness word wakes, it does not prove death: other
 *     threads of the process may still store inside system calls.
 *  3. (slot, epoch) is never reused within 2^20 joins of a slot.
 * Runs in: caller, agent, fork child.
 * Not here: page protection.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "os/point.h"
#include "process/process.h"
#include "shared/shared.h"

static void publish_use(struct ps_region *region, uint32_t used) {
    _Atomic uint32_t *mark = &ps_header(region)->slots_used;
    uint32_t seen = atomic_load_explicit(mark, memory_order_relaxed);
    /* release: whoever reads the mark (acquire) scans a slot whose words are set. */
    while (seen < used &&
           !atomic_compare_exchange_weak_explicit(mark, &seen, used, memory_order_release, memory_order_relaxed))
        ;
}

uint32_t ps_slots_used(const struct ps_region *region) {
    uint32_t used = atomic_load_explicit(&ps_header(region)->slots_used, memory_order_acquire);
    return used < region->shape.slots ? used : region->shape.slots;
}

/* false: somebody else was quicker. */
static bool take(struct ps_region *region, uint32_t index, uint32_t status, uint32_t bare) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t epoch = ((status >> PS_STATE_BITS) + 1) & PS_EPOCH_MASK;
    if (!epoch) /* 0 is private: no slot */
        epoch = 1;
    /* release: whoever sees JOINING of the new epoch no longer trusts anything it read under the old one. */
    if (!atomic_compare_exchange_strong_explicit(&slot->status, &status, ps_status(epoch, PS_JOINING) | bare,
                                                 memory_order_acq_rel, memory_order_relaxed))
        return false;
    atomic_store_explicit(&slot->live, 0, memory_order_release); /* an earlier owner's mark is no mark of ours */
    region->slot = index;
    region->epoch = epoch;
    atomic_store_explicit(&slot->error, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->asked, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->leases, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->saving, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->waits_for, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->ends, atomic_load_explicit(&slot->takes, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&slot->flags, 0, memory_order_relaxed);
    atomic_store_explicit(&slot->capabilities, 0, memory_order_relaxed);
    region->pid = (uint32_t)getpid();
    region->cpus = (uint32_t)ps_sys_cpus();
    atomic_store_explicit(&slot->pid, region->pid, memory_order_relaxed);
    atomic_store_explicit(&slot->tid, (uint32_t)region->tid, memory_order_relaxed);
    atomic_store_explicit(&slot->start, ps_sys_start_time(getpid()), memory_order_relaxed);
    atomic_store_explicit(&slot->pidns, ps_process_pidns(), memory_order_relaxed);
    publish_use(region, index + 1);
    return true;
}

/* Its owner is on the way out, and the kernel has not let go of its memory, and so of its byte, yet. */
static bool leaving(struct ps_region *region, uint32_t index) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    enum ps_state state = ps_state_of(atomic_load_explicit(&slot->status, memory_order_acquire));
    return state == PS_FREE || state == PS_DEAD ||
           atomic_load_explicit(&slot->live, memory_order_acquire) & FUTEX_OWNER_DIED;
}

/* There is memory for it; else -errno. */
static int clear_row(const struct ps_region *region, uint32_t slot) {
    int entry = atomic_load_explicit(&region->own_entry, memory_order_relaxed);
    struct ps_entry_row row = {0};
    return entry < 0 ? 0 : ps_sys_write_at(entry, &row, sizeof row, (uint64_t)ps_row_offset(slot));
}

/* Who attaches fails where there is no memory for its row: nobody could reach it by the name that it would keep.  A
 * forked child goes on without: it has the memory already. */
static int make_row(const struct ps_region *region, uint32_t index) {
    int rc = clear_row(region, index);
    return atomic_load_explicit(&region->use, memory_order_relaxed) == PS_OPENING ? rc : 0;
}

/* Whoever the status names is gone, where the byte is free. */
static bool is_left(struct ps_region *region, uint32_t index, uint32_t status) {
    enum ps_state state = ps_state_of(status);
    return state == PS_FREE || state == PS_DEAD || !(status & PS_STATE_BARE) || ps_slot_dead(region, index, status);
}

/* 1: it is ours; 0: it has an owner; or an error, of this slot. */
static int claim_one(struct ps_region *region, int own, uint32_t index) {
    uint32_t status = atomic_load_explicit(&ps_slot(region, index)->status, memory_order_acquire);
    int rc = ps_sys_ofd_take(own, index);
    if (rc)
        return rc == -EAGAIN ? 0 : rc;
    bool ours = is_left(region, index, status) && !(rc = make_row(region, index)) && take(region, index, status, 0);
    if (!ours)
        ps_sys_ofd_drop(own, index);
    return rc ? rc : ours;
}

/* The same, without the byte. */
static int claim_bare(struct ps_region *region, int own, uint32_t index) {
    uint32_t status = atomic_load_explicit(&ps_slot(region, index)->status, memory_order_acquire);
    if (ps_sys_ofd_free(own, index) != 1 || !is_left(region, index, status))
        return 0;
    int rc = make_row(region, index);
    return rc ? rc : take(region, index, status, PS_STATE_BARE);
}

/* A hint: the kernel looks through all bytes that are taken, each time we ask for one. */
static bool looks_free(struct ps_region *region, uint32_t index) {
    enum ps_state state = ps_state_of(atomic_load_explicit(&ps_slot(region, index)->status, memory_order_relaxed));
    return state == PS_FREE || state == PS_DEAD;
}

/* In the order in which they are tried. */
enum way { FREE, ANY, BARE };

static int claim_by(struct ps_region *region, int own, uint32_t index, enum way way) {
    if (way == BARE)
        return claim_bare(region, own, index);
    return way == ANY || looks_free(region, index) ? claim_one(region, own, index) : 0;
}

/* 1: a slot is ours; 0: none is free, but one is going to be; or an error: of the last one that could not be had.  The
 * row of one may have no room where another, of a dead owner, has its row. */
static int claim_any(struct ps_region *region, int own) {
    int error = PS_EFULL;
    bool soon = false;
    for (enum way way = region->shares ? BARE : FREE; way <= BARE; way++)
        for (uint32_t index = 0; index < region->shape.slots; index++) {
            int rc = claim_by(region, own, index, way);
            if (rc > 0)
                return rc;
            if (rc < 0)
                error = rc;
            else if (way != FREE && leaving(region, index))
                soon = true;
        }
    return soon ? 0 : error;
}

int ps_slot_claim(struct ps_region *region, int own) {
    _Atomic uint32_t nobody_wakes = 0;
    int rc;
    while (!(rc = claim_any(region, own))) {
        if (ps_sys_now() >= region->join_deadline ||
            atomic_load_explicit(&region->agent, memory_order_relaxed) != PS_AGENT_STARTING) /* nobody wants it */
            return PS_EFULL;
        ps_sys_wait((struct ps_watch){&nobody_wakes, 0}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS);
    }
    if (rc < 0)
        return rc;
    PS_POINT(J1_claim);
    return 0;
}

/* false: we were stopped for so long in the middle of a claim that somebody took it for a dead one's. */
bool ps_slot_live(struct ps_region *region) {
    _Atomic uint32_t *word = &ps_slot(region, region->slot)->status;
    uint32_t bare = atomic_load_explicit(word, memory_order_relaxed) & PS_STATE_BARE;
    uint32_t joining = ps_status(region->epoch, PS_JOINING) | bare;
    /* release: a caller that sees LIVE (acquire) sees the acknowledgement that goes with it. */
    return atomic_compare_exchange_strong_explicit(word, &joining, ps_status(region->epoch, PS_LIVE) | bare,
                                                   memory_order_release, memory_order_relaxed);
}

/* The mapping of the data is gone when this is called: nobody need wait for us any more. */
void ps_slot_leave(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_relaxed);
    /* From here on the slot may be another's: nothing of it is written any more.  By CAS, since we may come again. */
    if (status >> PS_STATE_BITS == region->epoch)
        atomic_compare_exchange_strong_explicit(&slot->status, &status, ps_status(region->epoch, PS_FREE),
                                                memory_order_release, memory_order_relaxed);
    PS_POINT(L2_leave);
    /* A caller may sleep on it; one that is about to finds out by its backstop. */
    ps_sys_wake(&slot->ack, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
    region->epoch = 0;
}

/* Our agent lives, as far as a look tells. */
bool ps_slot_marked(const struct ps_region *region) {
    return atomic_load_explicit(&ps_slot(region, region->slot)->live, memory_order_acquire) ==
           ((uint32_t)region->tid | FUTEX_WAITERS);
}

/* 1, 0, or 0 where it cannot be asked. Looks at the descriptor after the answer too: the program may have
 * given its number to another file in between. */
static bool byte_free(struct ps_region *region, uint32_t index) {
    int fd = ps_query_fd(region);
    return fd >= 0 && ps_sys_ofd_free(fd, index) == 1 && ps_cached_leads(fd, &region->memory);
}

static bool process_gone(const struct ps_shm_slot *slot) {
    int pid = (int)atomic_load_explicit(&slot->pid, memory_order_relaxed);
    uint64_t pidns = atomic_load_explicit(&slot->pidns, memory_order_relaxed);
    return pidns && pidns == ps_process_pidns() && pid != getpid() && ps_sys_process_gone(pid);
}

/* Its pid was given to another process.  Not asked of who has a byte, which tells more surely; a bare one has no other
 * sign then. */
static bool was_replaced(const struct ps_shm_slot *slot) {
    uint64_t start = atomic_load_explicit(&slot->start, memory_order_relaxed);
    uint64_t pidns = atomic_load_explicit(&slot->pidns, memory_order_relaxed);
    if (!start || !pidns || pidns != ps_process_pidns())
        return false;
    uint64_t now = ps_sys_start_time((int)atomic_load_explicit(&slot->pid, memory_order_relaxed));
    return now && now - start + 1 > 2;
}

/* The participant that had `status` is gone. */
void ps_slot_bury(struct ps_region *region, uint32_t index, uint32_t status) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    /* Fails if the slot has a new owner by now; the old one is dead all the same. */
    if (ps_state_of(status) == PS_LIVE)
        atomic_compare_exchange_strong_explicit(&slot->status, &status, ps_status(status >> PS_STATE_BITS, PS_DEAD),
                                                memory_order_acq_rel, memory_order_relaxed);
    /* The kernel woke one of those who sleep on this word; pass it on. */
    ps_sys_wake(&slot->live, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

static bool is_marked(const struct ps_shm_slot *slot) {
    return atomic_load_explicit(&slot->live, memory_order_acquire) & FUTEX_OWNER_DIED;
}

/* Is the participant that had `status` gone for good? True only if none of its threads can store any more:
 * its OFD byte is free (the mapping went with it), or the kernel says of its process that no thread has memory
 * left, which on a process with much memory comes sooner, and is all there is of who has no byte.  The second question
 * costs more, so it is asked once the kernel has marked the agent. */
bool ps_slot_dead(struct ps_region *region, uint32_t index, uint32_t status) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t now = atomic_load_explicit(&slot->status, memory_order_acquire);
    if (now != status) /* from JOINING to LIVE is no death */
        return now >> PS_STATE_BITS != status >> PS_STATE_BITS || ps_state_of(now) == PS_FREE ||
               ps_state_of(now) == PS_DEAD;
    bool bare = now & PS_STATE_BARE, byte = !bare && byte_free(region, index);
    if (!byte && !(is_marked(slot) && (process_gone(slot) || (bare && was_replaced(slot))) &&
                   is_marked(slot))) /* twice: `live` came with who it is */
        return false;
    ps_slot_bury(region, index, status);
    return true;
}

int ps_participant(struct ps_region *region, uint32_t index, struct ps_participant *out) {
    if (index >= ps_slots_used(region))
        return -ENOENT;
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
    if (ps_state_of(status) != PS_LIVE)
        return 0;
    out->pid = atomic_load_explicit(&slot->pid, memory_order_relaxed);
    out->tid = atomic_load_explicit(&slot->tid, memory_order_relaxed);
    out->capabilities = atomic_load_explicit(&slot->capabilities, memory_order_relaxed);
    out->flags = atomic_load_explicit(&slot->flags, memory_order_acquire);
    out->applied = atomic_load_explicit(&slot->applied, memory_order_relaxed);
    out->alive = index == region->slot || !ps_slot_dead(region, index, status);
    return 1;
}
