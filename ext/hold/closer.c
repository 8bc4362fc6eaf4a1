/* closer.c - what keeps leases from pages: changes, freezes and snapshots, which wait for those that are held.
 *
 *   K1_close    a range is published as closed, and words, or counts, are looked at
 *   K2_wait     a holder is waited for (held.c, drain_slot)
 *   K3_clear    the entry goes
 *
 * Invariants
 *  1. A taker stores its words, counts, and then looks at the closers.  A change stores PS_CLOSER_SHUT and then looks
 *     at the words in its range; a freeze or a snapshot stores its closer and then looks at the counts of all slots.
 *     One of them sees the other; the taker gives way.
 *  2. While a change waits for holders its closer says PS_CLOSER_WAITS: a thread that has a lease of its pages passes,
 *     and one that has another after a while (PS_IN_LINE), since the holders may wait for that thread.  Then it says
 *     PS_CLOSER_SHUT again and looks at all words again: it goes on only where it finds none.  Nobody passes
 *     PS_CLOSER_SHUT, so what a change goes on with is kept from leases until its closer goes.
 *  3. A thread that has a lease passes freezes and snapshots: the slot counts that lease as long as it has it, and
 *     counts the new one before it decides, so there is no moment at which the slot has none.
 *  4. Who gave way has a ticket.  Whoever is about to publish a closer lets those go first who have one already, and
 *     waits for them with nothing published, for PS_IN_LINE in all: so a taker gives way to a finite number of closers.
 *  5. A closer of a dead owner goes only when its change has been finished, or its freeze has: nobody has a lease while
 *     others do that.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "change/change.h"
#include "hold/hold.h"
#include "os/os.h"
#include "os/point.h"
#include "process/process.h"
#include "shared/shared.h"
#include "types.h"

static struct ps_shm_closer *closer_at(const struct ps_region *region, int bit) {
    return &ps_header(region)->closer[bit];
}

/* seq_cst: after the words or the count of a taker, or after PS_CLOSER_SHUT of the one whose entry it is. */
static uint64_t closers(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->closers, memory_order_seq_cst);
}

static uint32_t kind_of(const struct ps_shm_closer *closer) {
    return atomic_load_explicit(&closer->kind, memory_order_seq_cst);
}

struct pages {
    uint64_t first, end;
};

/* Of an entry or a ticket: relaxed, since both are stored before the bit; and clipped. */
static struct pages range_of(const struct ps_region *region, const _Atomic uint64_t *first,
                             const _Atomic uint64_t *count) {
    uint64_t all = region->shape.pages, from = atomic_load_explicit(first, memory_order_relaxed);
    uint64_t pages = atomic_load_explicit(count, memory_order_relaxed);
    from = from < all ? from : all;
    return (struct pages){from, from + (pages < all - from ? pages : all - from)};
}

/* -- Counts: what freezes and snapshots look at ------------------------------------------------------------------ */

static _Atomic uint32_t *own_leases(const struct ps_region *region) {
    return &ps_slot(region, region->slot)->leases;
}

/* One that counts is kept from leases by counts; at least so much. */
static struct ps_shm_closer *find_drain(struct ps_region *region, uint32_t least) {
    for (uint64_t mask = closers(region); mask; mask &= mask - 1) {
        struct ps_shm_closer *closer = closer_at(region, __builtin_ctzll(mask));
        if (kind_of(closer) >= least)
            return closer;
    }
    return NULL;
}

void ps_slot_counts(struct ps_region *region) {
    atomic_fetch_add_explicit(own_leases(region), 1, memory_order_seq_cst);
}

void ps_slot_uncounts(struct ps_region *region) {
    atomic_fetch_sub_explicit(own_leases(region), 1, memory_order_seq_cst);
    if (find_drain(region, PS_CLOSER_FREEZE))
        ps_sys_wake(own_leases(region), INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

/* -- Who passes -------------------------------------------------------------------------------------------------- */

/* A lease of these pages, other than the one that is being taken, whose words are the thread's by now. */
static bool holds_beside(const struct ps_region *region, struct pages in, struct pages taken) {
    return (in.first < taken.first && ps_thread_holds_in(region, in.first, taken.first - in.first)) ||
           (taken.end < in.end && ps_thread_holds_in(region, taken.end, in.end - taken.end));
}

static bool passes(const struct ps_wait *wait, const struct ps_shm_closer *closer, struct pages in,
                   struct pages taken) {
    struct ps_region *region = wait->region;
    uint32_t kind = kind_of(closer);
    if (kind == PS_CLOSER_SHUT || !ps_thread_holds(region))
        return false;
    return kind != PS_CLOSER_WAITS || in.end - in.first == region->shape.pages || holds_beside(region, in, taken) ||
           (wait->turned_away && ps_sys_now() - wait->turned_away >= PS_IN_LINE);
}

/* One that the call must give way to, or NULL. */
struct ps_shm_closer *ps_closer_over(const struct ps_wait *wait, uint64_t first, uint64_t count) {
    for (uint64_t mask = closers(wait->region); mask; mask &= mask - 1) {
        struct ps_shm_closer *closer = closer_at(wait->region, __builtin_ctzll(mask));
        /* Of an entry that changes hands now the owner comes after us, and sees us. */
        struct pages taken = {first, first + count}, in = range_of(wait->region, &closer->first, &closer->count);
        if (in.first < taken.end && taken.first < in.end && !passes(wait, closer, in, taken))
            return closer;
    }
    return NULL;
}

/* -- An entry ---------------------------------------------------------------------------------------------------- */

/* Which thread of ours has the entry: should it be ended, another passes it on (lock.c).  0: whoever comes to clear it.
 */
void ps_closer_thread(struct ps_region *region, const struct ps_shm_closer *closer, int tid) {
    atomic_store_explicit(&region->closing[closer - ps_header(region)->closer], tid, memory_order_release);
}

/* The bit first: without it nobody looks at the entry, and only its owner sets it. */
static void clear(struct ps_region *region, struct ps_shm_closer *closer) {
    struct ps_shm_header *header = ps_header(region);
    uint64_t bit = UINT64_C(1) << (closer - header->closer);
    /* seq_cst: who finds no bit finds the map of the change that is over. */
    atomic_fetch_and_explicit(&header->closers, ~bit, memory_order_seq_cst);
    PS_POINT(K3_clear);
    ps_closer_thread(region, closer, 0);
    if (atomic_exchange_explicit(&closer->owner, 0, memory_order_release) & PS_OWNER_WAITING)
        ps_sys_wake(&closer->owner, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

/* A dead owner's: its change may be half done, or it has the region frozen, and we are the first to come after it.  The
 * entry is ours meanwhile. */
static int bury(struct ps_wait *wait, struct ps_shm_closer *closer, uint32_t dead) {
    if (!atomic_compare_exchange_strong_explicit(&closer->owner, &dead, wait->mine, memory_order_acquire,
                                                 memory_order_relaxed))
        return 0;
    ps_closer_thread(wait->region, closer, ps_process_tid());
    /* Whoever has the region frozen itself meets the closers of snapshots only. */
    int rc = kind_of(closer) == PS_CLOSER_FREEZE ? ps_freeze_finish(wait->region, wait->until.at, &wait->blocker) : 0;
    if (!rc && ps_change_open(wait->region))
        rc = ps_change_finish(wait->region, wait->until.at, &wait->blocker);
    if (!rc) {
        clear(wait->region, closer);
    } else { /* for the next one to bury */
        ps_closer_thread(wait->region, closer, 0);
        atomic_store_explicit(&closer->owner, dead, memory_order_release);
    }
    return rc;
}

/* Until the entry goes or lets more pass, or the deadline comes; 0: look again. */
static int wait_for_entry(struct ps_wait *wait, struct ps_shm_closer *closer) {
    uint32_t seen = atomic_load_explicit(&closer->owner, memory_order_acquire), owner = seen & ~PS_OWNER_WAITING;
    wait->blocker = owner;
    if (!owner) { /* through; a bit without an owner is damage: look again, but not for ever */
        struct ps_watch nobody = {&closer->owner, 0};
        bool bit = closers(wait->region) >> (closer - closer_at(wait->region, 0)) & 1;
        return bit ? ps_owner_wait(wait->region, nobody, wait->mine, wait->until.at) : 0;
    }
    if (!ps_owner_known(wait->region, owner))
        return ps_corrupt(wait->region, "closer");
    if (ps_wait_gone(wait, owner))
        return bury(wait, closer, seen);
    uint32_t flagged = seen | PS_OWNER_WAITING;
    if (seen != flagged && !atomic_compare_exchange_strong_explicit(&closer->owner, &seen, flagged,
                                                                    memory_order_relaxed, memory_order_relaxed))
        return 0;
    return ps_owner_wait(wait->region, (struct ps_watch){&closer->owner, flagged}, owner, wait->until.at);
}

static bool claim(struct ps_wait *wait, struct ps_shm_closer *closer) {
    uint32_t nobody = 0;
    if (!atomic_compare_exchange_strong_explicit(&closer->owner, &nobody, wait->mine, memory_order_acquire,
                                                 memory_order_relaxed))
        return false;
    ps_closer_thread(wait->region, closer, ps_process_tid());
    return true;
}

/* An entry of our own; where all are in use, one whose owner is through, or dead. */
static int find_entry(struct ps_wait *wait, struct ps_shm_closer **closer) {
    for (uint32_t at = wait->region->slot;; at++) {
        for (uint32_t i = 0; i < PS_CLOSERS; i++)
            if (claim(wait, *closer = closer_at(wait->region, (int)((at + i) % PS_CLOSERS))))
                return 0;
        int rc = wait_for_entry(wait, closer_at(wait->region, (int)(at % PS_CLOSERS)));
        if (rc)
            return rc;
    }
}

/* -- Who goes first ---------------------------------------------------------------------------------------------- */

/* Nobody waits to be let go by this one. */
static bool is_void(const struct ps_wait *wait, uint32_t seen) {
    uint32_t owner = seen & ~PS_OWNER_WAITING;
    return !owner || !ps_owner_known(wait->region, owner) || ps_wait_gone(wait, owner);
}

/* It has given way, and goes before whoever comes later; or, where too many have, takes its chance. */
static void take_ticket(struct ps_wait *wait, uint64_t first, uint64_t count) {
    struct ps_shm_header *header = ps_header(wait->region);
    for (uint32_t i = 0; i < PS_TICKETS; i++) {
        uint32_t at = (wait->region->slot + i) % PS_TICKETS, seen;
        struct ps_shm_ticket *ticket = &header->ticket[at];
        seen = atomic_load_explicit(&ticket->owner, memory_order_relaxed);
        if (!is_void(wait, seen) || !atomic_compare_exchange_strong_explicit(
                                        &ticket->owner, &seen, wait->mine, memory_order_acquire, memory_order_relaxed))
            continue;
        wait->serial = atomic_fetch_add_explicit(&ticket->serial, 1, memory_order_relaxed) + 1;
        atomic_store_explicit(&ticket->first, first, memory_order_relaxed);
        atomic_store_explicit(&ticket->count, count, memory_order_relaxed);
        /* release: who finds the bit finds the range. */
        atomic_fetch_or_explicit(&header->tickets, UINT64_C(1) << at, memory_order_release);
        wait->ticket = ticket;
        return;
    }
}

/* This ticket, as it was seen, goes; who waits for that looks again. */
static void void_ticket(struct ps_region *region, struct ps_shm_ticket *ticket, uint32_t seen) {
    struct ps_shm_header *header = ps_header(region);
    /* The bit first: of the next one to use the entry it may be missing, and that one takes its chance. */
    atomic_fetch_and_explicit(&header->tickets, ~(UINT64_C(1) << (ticket - header->ticket)), memory_order_relaxed);
    if (atomic_compare_exchange_strong_explicit(&ticket->owner, &seen, 0, memory_order_release, memory_order_relaxed) &&
        seen & PS_OWNER_WAITING)
        ps_sys_wake(&ticket->owner, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

static bool is_ticket(const struct ps_shm_ticket *ticket, uint32_t owner, uint32_t serial) {
    return (atomic_load_explicit(&ticket->owner, memory_order_acquire) & ~PS_OWNER_WAITING) == owner &&
           atomic_load_explicit(&ticket->serial, memory_order_relaxed) == serial;
}

void ps_ticket_give(struct ps_wait *wait) {
    struct ps_shm_ticket *ticket = wait->ticket;
    uint32_t seen = atomic_load_explicit(&ticket->owner, memory_order_relaxed);
    while (is_ticket(ticket, wait->mine, wait->serial)) {
        void_ticket(wait->region, ticket, seen);
        seen = atomic_load_explicit(&ticket->owner, memory_order_relaxed);
    }
}

/* Gives way: until the entry goes or lets more pass. */
int ps_closer_await(struct ps_wait *wait, struct ps_shm_closer *closer, uint64_t first, uint64_t count) {
    if (!wait->turned_away)
        wait->turned_away = ps_sys_now();
    if (!wait->ticket || !is_ticket(wait->ticket, wait->mine, wait->serial))
        take_ticket(wait, first, count);
    return wait_for_entry(wait, closer);
}

/* Until whoever has this ticket has its lease, or gives up. */
static int await_ticket(struct ps_wait *wait, struct ps_shm_ticket *ticket, int64_t end) {
    uint32_t seen = atomic_load_explicit(&ticket->owner, memory_order_acquire), owner = seen & ~PS_OWNER_WAITING;
    uint32_t serial = atomic_load_explicit(&ticket->serial, memory_order_relaxed);
    int rc = 0;
    while (!rc && owner && is_ticket(ticket, owner, serial)) {
        seen = atomic_load_explicit(&ticket->owner, memory_order_acquire);
        uint32_t flagged = seen | PS_OWNER_WAITING;
        if (is_void(wait, seen))
            void_ticket(wait->region, ticket, seen);
        else if (seen == flagged || atomic_compare_exchange_strong_explicit(&ticket->owner, &seen, flagged,
                                                                            memory_order_relaxed, memory_order_relaxed))
            rc = ps_owner_wait(wait->region, (struct ps_watch){&ticket->owner, flagged}, owner, end);
    }
    return rc;
}

/* Who gave way before comes first: else changes that follow one another would keep it waiting for ever.  Not where we
 * have a lease, which may be what it waits for; and not in a freeze, before whose end nobody gets one.  A ticket that
 * comes now is not waited for. */
static int let_go_first(struct ps_wait *wait, uint64_t first, uint64_t count) {
    struct ps_shm_header *header = ps_header(wait->region);
    uint64_t mask = atomic_load_explicit(&header->tickets, memory_order_acquire) & ((UINT64_C(1) << PS_TICKETS) - 1);
    if (!mask || ps_thread_holds(wait->region) || ps_frozen(wait->region))
        return 0;
    struct ps_until until = wait->until;
    ps_until_at_most(&until, ps_sys_now() + PS_IN_LINE);
    for (int rc; mask; mask &= mask - 1) {
        struct ps_shm_ticket *ticket = &header->ticket[__builtin_ctzll(mask)];
        struct pages wanted = range_of(wait->region, &ticket->first, &ticket->count);
        if (wanted.first >= first + count || first >= wanted.end || !(rc = await_ticket(wait, ticket, until.at)))
            continue;
        if (rc != -ETIMEDOUT)
            return rc;
        if (until.at < wait->until.at) /* it has not come, in all that time: it may be stopped */
            void_ticket(wait->region, ticket, atomic_load_explicit(&ticket->owner, memory_order_relaxed));
    }
    return 0;
}

static int publish(struct ps_wait *wait, enum ps_closer_kind kind, uint64_t first, uint64_t count,
                   struct ps_shm_closer **closer) {
    int rc = let_go_first(wait, first, count);
    if (!rc)
        rc = find_entry(wait, closer);
    if (rc)
        return rc;
    atomic_store_explicit(&(*closer)->first, first, memory_order_relaxed);
    atomic_store_explicit(&(*closer)->count, count, memory_order_relaxed);
    atomic_store_explicit(&(*closer)->kind, kind, memory_order_relaxed);
    /* seq_cst: before the look at the words or the counts (invariant 1), after the range. */
    atomic_fetch_or_explicit(&ps_header(wait->region)->closers, UINT64_C(1) << (*closer - closer_at(wait->region, 0)),
                             memory_order_seq_cst);
    PS_POINT(K1_close);
    return 0;
}

/* -- A change and the leases in its range ------------------------------------------------------------------------ */

/* The first page from `page` on that somebody holds who is alive. */
static uint64_t next_holder(struct ps_wait *wait, uint64_t page, uint64_t end) {
    while ((page = ps_held_next(wait->region, page, end)) < end) {
        uint64_t held = atomic_load_explicit(ps_held_word(wait->region, page), memory_order_relaxed);
        uint32_t holder = ps_holder_of(held);
        if (!ps_owner_known(wait->region, holder) || !ps_wait_gone(wait, holder))
            break;
        page++;
    }
    return page;
}

/* Until nobody has a lease in the range, and nobody can take one (invariant 2). */
static int await_holders(struct ps_wait *wait, struct ps_shm_closer *closer, uint64_t first, uint64_t end) {
    uint64_t page;
    int rc = 0;
    while (!rc && (page = next_holder(wait, first, end)) < end) {
        /* Who has given way to PS_CLOSER_SHUT, and passes now, sleeps on the owner's word. */
        atomic_store_explicit(&closer->kind, PS_CLOSER_WAITS, memory_order_seq_cst);
        if (atomic_load_explicit(&closer->owner, memory_order_seq_cst) & PS_OWNER_WAITING)
            ps_sys_wake(&closer->owner, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
        for (; !rc && page < end; page = next_holder(wait, page + 1, end))
            rc = ps_held_await(wait, page);
        /* seq_cst: before the look at all words. */
        atomic_store_explicit(&closer->kind, PS_CLOSER_SHUT, memory_order_seq_cst);
    }
    return rc;
}

int ps_lease_close(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline,
                   struct ps_outcome *outcome, struct ps_shm_closer **closer) {
    struct ps_wait wait = ps_wait_begin(region, deadline);
    if (ps_thread_holds_in(region, first, count)) /* before anybody is waited for */
        return PS_ENESTED;
    int rc = publish(&wait, PS_CLOSER_SHUT, first, count, closer);
    if (rc)
        return ps_wait_end(&wait, rc, 0, 0, outcome);
    if (atomic_load_explicit(&ps_header(region)->leases, memory_order_seq_cst))
        rc = await_holders(&wait, *closer, first, first + count);
    if (!rc)
        return 0;
    clear(region, *closer);
    return ps_wait_end(&wait, rc, first, count, outcome);
}

void ps_lease_open(struct ps_region *region, struct ps_shm_closer *closer) {
    clear(region, closer);
}

/* -- A freeze or a snapshot and all leases -------------------------------------------------------------------------
 *
 * They do not look at words, which are as many as pages, but at what each participant counts. */

/* Until the participant has none, or is gone. */
static int drain_slot(struct ps_wait *wait, uint32_t index) {
    struct ps_shm_slot *slot = ps_slot(wait->region, index);
    /* seq_cst, both: after the closer.  Who joins later counts later, and sees it. */
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_seq_cst), leases;
    uint32_t owner = ps_owner_of(index, status);
    while (ps_state_of(status) == PS_LIVE && (leases = atomic_load_explicit(&slot->leases, memory_order_seq_cst))) {
        if (ps_wait_gone(wait, owner))
            return 0;
        wait->blocker = owner;
        PS_POINT(K2_wait);
        int rc = ps_owner_wait(wait->region, (struct ps_watch){&slot->leases, leases}, owner, wait->until.at);
        if (rc)
            return rc;
    }
    return 0;
}

/* Those that have leases, beside the one that was waited for. */
static void blame_holders(const struct ps_wait *wait, struct ps_outcome *outcome) {
    for (uint32_t index = 0, used = ps_slots_used(wait->region); index < used; index++) {
        const struct ps_shm_slot *slot = ps_slot(wait->region, index);
        uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
        uint32_t owner = ps_owner_of(index, status);
        bool holds = atomic_load_explicit(&slot->takes, memory_order_relaxed) !=
                     atomic_load_explicit(&slot->ends, memory_order_relaxed);
        if (ps_state_of(status) == PS_LIVE && holds && owner != wait->blocker)
            ps_wait_blame(wait, owner, outcome);
    }
}

/* The calling thread has none. */
int ps_lease_drain(struct ps_region *region, enum ps_closer_kind kind, int64_t deadline, struct ps_outcome *outcome,
                   struct ps_shm_closer **closer) {
    struct ps_wait wait = ps_wait_begin(region, deadline);
    int rc = publish(&wait, kind, 0, region->shape.pages, closer);
    if (rc)
        return ps_wait_end(&wait, rc, 0, 0, outcome);
    for (uint32_t index = 0, used = ps_slots_used(region); index < used && !rc; index++)
        rc = drain_slot(&wait, index);
    if (!rc)
        return 0;
    clear(region, *closer);
    rc = ps_wait_end(&wait, rc, 0, 0, outcome);
    if (rc == PS_ETIMEOUT)
        blame_holders(&wait, outcome);
    return rc;
}

/* Whoever has the region frozen stores without a lease: its stores come before a snapshot's moment, or after it. */
int ps_lease_enter(struct ps_region *region) {
    struct ps_wait wait = ps_wait_begin(region, PS_NEVER);
    for (;;) {
        ps_slot_counts(region);
        struct ps_shm_closer *closer = find_drain(region, PS_CLOSER_SNAPSHOT);
        if (!closer)
            return ps_waited(0);
        ps_slot_uncounts(region);
        int rc = wait_for_entry(&wait, closer);
        if (rc)
            return ps_waited(rc == -ETIMEDOUT ? PS_ESIGNAL : rc);
    }
}

void ps_lease_leave(struct ps_region *region) {
    ps_slot_uncounts(region);
}
