/* lock.c - words owned by (slot, epoch).
 *
 * Lives here: the writer lock and its take-over from the dead; until when a call
 * waits, and what is told of that.
 * Not here: claims and the page lock (pages/claim.c), locks of one process
 * (process/sleep.c).
 *
 * The writer lock word (see PS_OWNER_*) and its transitions:
 *   0              -> me               CAS, acquire; with WAITING if we have slept: others may sleep still
 *   owner          -> owner | WAITING  CAS, before sleeping
 *   dead owner     -> me | WAITING     CAS, acquire; only one of several who saw the death wins
 *   me [| WAITING] -> 0                exchange, release; wakes one if WAITING was set
 * Invariants
 *  1. A holder is known by (slot, epoch), which no namespace can confuse.
 *  2. No wait without a backstop: a wake-up can die with the process it woke.
 *  3. Every wait ends at a deadline, or with the holder: also where that is one
 *     thread of a process that goes on.
 * Runs in: caller, agent, fork child's agent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"
#include "shared/shared.h"

#define DOUBT (64 * PS_MS) /* of a wait, after each of which one asks whether it was a thread alone that ended */

uint32_t ps_owner_word(const struct ps_region *region) {
    return region->epoch << PS_OWNER_SLOT_BITS | (region->slot + 1);
}

static uint32_t owner_slot(uint32_t owner) {
    return (owner & PS_OWNER_SLOT_MASK) - 1;
}

static uint32_t owner_epoch(uint32_t owner) {
    return owner >> PS_OWNER_SLOT_BITS & PS_EPOCH_MASK;
}

/* It names a slot that there is. */
bool ps_owner_known(const struct ps_region *region, uint32_t owner) {
    return owner_slot(owner) < region->shape.slots;
}

uint32_t ps_owner_pid(const struct ps_region *region, uint32_t owner) {
    uint32_t slot = owner_slot(owner);
    return slot < region->shape.slots ? atomic_load_explicit(&ps_slot(region, slot)->pid, memory_order_relaxed) : 0;
}

/* The holder's (slot, epoch) has left, died, or made room for another. */
bool ps_owner_gone(struct ps_region *region, uint32_t owner) {
    uint32_t slot = owner_slot(owner);
    uint32_t status = atomic_load_explicit(&ps_slot(region, slot)->status, memory_order_acquire);
    if (status >> PS_STATE_BITS != owner_epoch(owner))
        return true;
    enum ps_state state = ps_state_of(status);
    return state == PS_FREE || state == PS_DEAD || ps_slot_dead(region, slot, status);
}

uint32_t ps_lock_owner(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->lock, memory_order_acquire) & ~PS_OWNER_WAITING;
}

/* Its owner is the calling thread. */
bool ps_lock_ours(const struct ps_region *region, uint32_t owner) {
    return owner == ps_owner_word(region) &&
           atomic_load_explicit(&region->writer, memory_order_relaxed) == ps_process_tid();
}

/* Nobody has the writer lock, or somebody who is gone. */
bool ps_lock_deserted(struct ps_region *region) {
    uint32_t owner = ps_lock_owner(region);
    return !owner || (ps_owner_known(region, owner) && ps_owner_gone(region, owner));
}

/* -- Until when ------------------------------------------------------------------------------------------------ */

void ps_until_at_most(struct ps_until *until, int64_t at) {
    if (at < until->at)
        *until = (struct ps_until){at, true};
}

struct ps_until ps_until(int64_t deadline) {
    struct ps_until until = {deadline, false};
    if (deadline != PS_TRY)
        ps_until_at_most(&until, ps_sys_now() + PS_PATIENCE);
    return until;
}

/* -- Who waits for whom: told to those who look (observe.c) ---------------------------------------------------- */

/* Around each sleep.  `since` is that of the first of them: one wait has many, and takes more than one call where
 * signals are served in between. */
void ps_waits_for(struct ps_region *region, uint32_t owner) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    struct ps_patience *mine = ps_process_patience();
    owner &= ~PS_OWNER_WAITING;
    if (mine->owner != owner)
        *mine = (struct ps_patience){owner, ps_sys_coarse()};
    atomic_store_explicit(&slot->waits_since, mine->since, memory_order_relaxed);
    atomic_store_explicit(&slot->waits_for, owner, memory_order_relaxed);
}

/* Another thread of ours may have come to sleep meanwhile: what it told stays. */
void ps_waits_no_more(struct ps_region *region) {
    _Atomic uint32_t *told = &ps_slot(region, region->slot)->waits_for;
    if (atomic_load_explicit(told, memory_order_relaxed) == ps_process_patience()->owner)
        atomic_store_explicit(told, 0, memory_order_relaxed);
}

/* The result of a call that may have waited. PS_ESIGNAL: another call goes on with it. */
int ps_waited(int rc) {
    if (rc != PS_ESIGNAL)
        ps_process_patience()->owner = 0;
    return rc;
}

/* -- Threads that were ended alone ------------------------------------------------------------------------------
 *
 * A word names a participant, which may live on when the thread that had the word was ended (a seccomp filter does
 * that, in a system call).  Each process knows the thread, and passes the word on to the slot's last owner, who is
 * gone: from there it is taken over as any dead one's is.  Who waits for long asks for that. */

static uint32_t last_owner(const struct ps_region *region) {
    return ((region->epoch - 1) & PS_EPOCH_MASK) << PS_OWNER_SLOT_BITS | (region->slot + 1);
}

static void pass_on(const struct ps_region *region, _Atomic uint32_t *word) {
    uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
    while ((seen & ~PS_OWNER_WAITING) == ps_owner_word(region) &&
           !atomic_compare_exchange_weak_explicit(word, &seen, last_owner(region) | (seen & PS_OWNER_WAITING),
                                                  memory_order_acq_rel, memory_order_relaxed))
        ;
}

/* The thread of ours has ended; of those who find that one is told so. */
static bool has_ended(_Atomic int *thread) {
    int tid = atomic_load_explicit(thread, memory_order_acquire);
    return tid && !ps_sys_thread_exists(tid) &&
           atomic_compare_exchange_strong_explicit(thread, &tid, 0, memory_order_acq_rel, memory_order_relaxed);
}

void ps_owner_pass_on(struct ps_region *region) {
    struct ps_shm_header *header = ps_header(region);
    if (has_ended(&region->writer)) {
        for (uint32_t index = 0, used = ps_slots_used(region); index < used; index++)
            if (index != region->slot)
                pass_on(region, &ps_slot(region, index)->claim);
        pass_on(region, &header->lock);
    }
    for (uint32_t i = 0; i < PS_CLOSERS; i++)
        if (has_ended(&region->closing[i]))
            pass_on(region, &header->closer[i].owner);
    if (has_ended(&region->freezing)) {
        atomic_store_explicit(&region->frozen_by, 0, memory_order_relaxed);
        pass_on(region, &header->freezer);
    }
}

/* Ours: at once; another's: its agent does it, if it lives. */
static void doubt(struct ps_region *region, uint32_t owner) {
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&ps_header(region)->generation;
    uint32_t index = owner_slot(owner);
    if (index == region->slot) {
        ps_owner_pass_on(region);
        return;
    }
    atomic_store_explicit(&ps_slot(region, index)->asked, 1, memory_order_release); /* pairs with ps_borrow_answer */
    ps_sys_wake(low, INT32_MAX, ps_slot_bit(index));
}

/* How often `DOUBT` has passed since the calling thread began to wait for whom it waits for. */
static uint64_t doubts(void) {
    return (ps_sys_coarse() - ps_process_patience()->since) / DOUBT;
}

/* Sleeps until the watched word changes or the owner's agent dies; 0: look again. */
int ps_owner_wait(struct ps_region *region, struct ps_watch watch, uint32_t owner, int64_t deadline) {
    struct ps_shm_slot *slot = ps_slot(region, owner_slot(owner));
    struct ps_watch live = {&slot->live, atomic_load_explicit(&slot->live, memory_order_acquire)};
    int64_t now = ps_sys_now();
    if (now >= deadline)
        return -ETIMEDOUT;
    bool marked = live.value & FUTEX_OWNER_DIED; /* nobody will wake us again: death comes any moment */
    int64_t backstop = now + (marked ? PS_BACKSTOP / 8 : PS_BACKSTOP);
    ps_waits_for(region, owner);
    uint64_t before = doubts();
    int rc = ps_sleep_two(watch, live, backstop < deadline ? backstop : deadline);
    ps_waits_no_more(region);
    if (doubts() != before)
        doubt(region, owner);
    return rc == -EINTR ? PS_ESIGNAL : 0;
}

/* As ps_owner_wait, but short, and no other call of the waiter (waiter.c) comes in between: with the page lock, or in
 * the handler.  Of ps_sys_wait. */
int ps_owner_nap(struct ps_region *region, struct ps_watch watch, uint32_t owner, int64_t deadline) {
    ps_waits_for(region, owner);
    uint64_t before = doubts();
    int rc = ps_sys_wait(watch, FUTEX_BITSET_MATCH_ANY, deadline);
    ps_waits_no_more(region);
    if (doubts() != before)
        doubt(region, owner);
    return rc;
}

static int take_lock(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    _Atomic uint32_t *word = &ps_header(region)->lock;
    uint32_t mine = ps_owner_word(region), slept = 0;
    for (;;) {
        uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
        if (!seen) { /* acquire: pairs with the release in ps_unlock: the last holder's record is whole */
            if (atomic_compare_exchange_weak_explicit(word, &seen, mine | slept, memory_order_acquire,
                                                      memory_order_relaxed))
                return 0;
            continue;
        }
        if (!ps_owner_known(region, seen))
            return ps_corrupt(region, "lock");
        if (ps_owner_gone(region, seen)) { /* acquire: what the dead one stored before it died */
            if (atomic_compare_exchange_strong_explicit(word, &seen, mine | PS_OWNER_WAITING, memory_order_acquire,
                                                        memory_order_relaxed))
                return 0;
            continue;
        }
        if (!(seen & PS_OWNER_WAITING)) {
            if (!atomic_compare_exchange_weak_explicit(word, &seen, seen | PS_OWNER_WAITING, memory_order_relaxed,
                                                       memory_order_relaxed))
                continue;
            seen |= PS_OWNER_WAITING;
        }
        slept = PS_OWNER_WAITING;
        int rc = ps_owner_wait(region, (struct ps_watch){word, seen}, seen, deadline);
        if (rc) {
            *blocker = seen;
            return rc;
        }
    }
}

int ps_lock(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    int rc = take_lock(region, deadline, blocker);
    if (!rc)
        atomic_store_explicit(&region->writer, ps_process_tid(), memory_order_release);
    return rc;
}

void ps_unlock(struct ps_region *region) {
    _Atomic uint32_t *word = &ps_header(region)->lock;
    atomic_store_explicit(&region->writer, 0, memory_order_relaxed);
    /* release: pairs with the acquire in ps_lock. */
    uint32_t seen = atomic_exchange_explicit(word, 0, memory_order_release);
    if (seen & PS_OWNER_WAITING)
        ps_sys_wake(word, 1, FUTEX_BITSET_MATCH_ANY);
}
