/* lock.c - words owned by (slot, epoch), and two that are private.
 *
 * Lives here: the writer lock and its take-over from the dead; the
 * locks of one process.
 *
 * The writer lock word (see PS_OWNER_*) and its transitions:
 *   0              -> me               CAS, acquire; with WAITING if we have slept: others may sleep still
 *   owner          -> owner | WAITING  CAS, before sleeping
 *   dead owner     -> me | WAITING     CAS, acquire; only one of several who saw the death wins
 *   me [| WAITING] -> 0                exchange, release; wakes one if WAITING was set
 * Invariants
 *  1. A holder is known by (slot, epoch), which no namespace can confuse.
 *  2. No wait without a backstop: a wake-up can die with the process it woke.
 *  3. The page lock is only held over changes of our own page tables.
 * Runs in: caller, agent (joining), fork child's agent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "participant.h"

static uint32_t own_word(const struct ps_region *region) {
    return region->epoch << PS_OWNER_SLOT_BITS | (region->slot + 1);
}

static uint32_t owner_slot(uint32_t owner) {
    return (owner & PS_OWNER_SLOT_MASK) - 1;
}

static uint32_t owner_epoch(uint32_t owner) {
    return owner >> PS_OWNER_SLOT_BITS & PS_EPOCH_MASK;
}

uint32_t ps_owner_pid(const struct ps_region *region, uint32_t owner) {
    uint32_t slot = owner_slot(owner);
    return slot < region->shape.slots ? atomic_load_explicit(&ps_slot(region, slot)->pid, memory_order_relaxed) : 0;
}

/* The holder's (slot, epoch) has left, died, or made room for another. */
static bool owner_gone(struct ps_region *region, uint32_t owner) {
    uint32_t slot = owner_slot(owner);
    uint32_t status = atomic_load_explicit(&ps_slot(region, slot)->status, memory_order_acquire);
    if (status >> PS_STATE_BITS != owner_epoch(owner))
        return true;
    enum ps_state state = ps_state_of(status);
    return state == PS_FREE || state == PS_DEAD || ps_slot_dead(region, slot, status);
}

/* Sleeps until the word changes or its owner's agent dies. */
static int wait_for_owner(struct ps_region *region, _Atomic uint32_t *word, uint32_t owner, int64_t deadline) {
    struct ps_shm_slot *slot = ps_slot(region, owner_slot(owner));
    struct ps_watch lock = {word, owner};
    struct ps_watch live = {&slot->live, atomic_load_explicit(&slot->live, memory_order_acquire)};
    int64_t now = ps_sys_now();
    if (now >= deadline)
        return -ETIMEDOUT;
    bool marked = live.value & FUTEX_OWNER_DIED; /* nobody will wake us again: death comes any moment */
    int64_t backstop = now + (marked ? PS_BACKSTOP / 8 : PS_BACKSTOP);
    int rc = ps_sys_wait_two(lock, live, backstop < deadline ? backstop : deadline);
    return rc == -EINTR ? PS_ESIGNAL : 0;
}

int ps_lock(struct ps_region *region, int64_t deadline, uint32_t *blocker) {
    _Atomic uint32_t *word = &ps_header(region)->lock;
    uint32_t mine = own_word(region), slept = 0;
    for (;;) {
        uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);
        if (!seen) { /* acquire: pairs with the release in ps_unlock: the last holder's record is whole */
            if (atomic_compare_exchange_weak_explicit(word, &seen, mine | slept, memory_order_acquire,
                                                      memory_order_relaxed))
                return 0;
            continue;
        }
        if (owner_slot(seen) >= region->shape.slots)
            return ps_corrupt(region, "lock");
        if (owner_gone(region, seen)) { /* acquire: what the dead one stored before it died */
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
        int rc = wait_for_owner(region, word, seen, deadline);
        if (rc) {
            *blocker = seen;
            return rc;
        }
    }
}

void ps_unlock(struct ps_region *region) {
    _Atomic uint32_t *word = &ps_header(region)->lock;
    /* release: pairs with the acquire in ps_lock. */
    uint32_t seen = atomic_exchange_explicit(word, 0, memory_order_release);
    if (seen & PS_OWNER_WAITING)
        ps_sys_wake(word, 1, FUTEX_BITSET_MATCH_ANY);
}

/* -- Locks private to the process, reset in a forked child ---------------------------------------------------- */

void ps_private_lock(_Atomic uint32_t *word) {
    uint32_t seen = 0;
    if (atomic_compare_exchange_strong_explicit(word, &seen, 1, memory_order_acquire, memory_order_relaxed))
        return;
    while (atomic_exchange_explicit(word, 2, memory_order_acquire))
        ps_sys_wait((struct ps_watch){word, 2}, FUTEX_BITSET_MATCH_ANY, PS_NEVER);
}

void ps_private_unlock(_Atomic uint32_t *word) {
    if (atomic_exchange_explicit(word, 0, memory_order_release) == 2)
        ps_sys_wake(word, 1, FUTEX_BITSET_MATCH_ANY);
}

void ps_page_lock(struct ps_region *region) {
    ps_private_lock(&region->page_lock);
}

void ps_page_unlock(struct ps_region *region) {
    ps_private_unlock(&region->page_lock);
}
