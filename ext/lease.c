/* lease.c - held words: leases over pages, user locks, and the changes that wait for leases.
 *
 *   H1_take     a word is ours; of pages all of them, then a look at the closers
 *   H2_open     page tables of a lease in place are open
 *   H3_close    they are closed again, the words still ours
 *   H4_release  a word is free; who sleeps on it is woken
 *   K1_close    a change has published its range as a closer, and looks at the words
 *   K2_wait     it waits for a holder
 *   K3_clear    its entry goes
 *
 * Invariants
 *  1. A taker stores its words and then looks at the closers; a change stores its closer and then looks at the words:
 *     one of them sees the other.  The taker gives way, so a lease and a change of the same pages exclude each other.
 *  2. Pages are taken in ascending order, and given back all of them where one cannot be had.
 *  3. What a dead holder left is known until a lease that was told of it has ended: whoever gives up puts the dead
 *     one's word back.
 *  4. A closer of a dead owner goes only when its change has been finished: nobody has a lease while others do that.
 *  5. Page tables are open only while the words are ours: opened after the look, closed before the release.
 *  6. Who waits for a page gives those before it back when a change wants them: it may be made by whom we wait for.
 *  7. Whoever has slept and lost reserves the word: nobody, of its own process either, takes it before.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/mman.h>

#include "participant.h"
#include "point.h"

#define SPIN 200   /* looks before sleeping, at most: some 5 µs */
#define WORDS 512u /* held words in a page of the memfd */

/* One call that takes words, or waits until others have given them back. */
struct wait {
    struct ps_region *region;
    struct ps_until until;
    uint32_t mine;         /* owner word */
    uint64_t first, count; /* pages of the same lease that we have already, while we wait for the next one */
    uint32_t blocker;      /* owner word of whom we waited for in vain */
};

/* Does the calling thread have a lease?  One that it is about to take is none: its words are ours before it is known
 * whether it can be had, so the words do not tell. */
static bool thread_holds(const struct ps_region *region) {
    const struct ps_proxy *proxy = ps_process_proxy();
    if (proxy)
        return proxy->passes;
    _Atomic uint32_t *counts = atomic_load_explicit(&region->counts, memory_order_acquire);
    /* seq_cst: after count_lease.  As long as we find a lease here, whoever gives it back has not uncounted it in the
     * slot, and we have counted there already: so a snapshot never finds 0 in between. */
    return counts && atomic_load_explicit(&counts[ps_process_tid()], memory_order_seq_cst);
}

/* A thread has a lease more, or (-1) less.  Of what a call has, the task knows (proxy.passes). */
static void count_for(struct ps_region *region, int holder, int32_t change) {
    _Atomic uint32_t *counts = atomic_load_explicit(&region->counts, memory_order_acquire);
    if ((uint32_t)holder < PS_TIDS)
        atomic_fetch_add_explicit(&counts[holder], (uint32_t)change, memory_order_seq_cst);
}

static struct wait begin_wait(struct ps_region *region, int64_t deadline) {
    return (struct wait){.region = region, .until = ps_until(deadline), .mine = ps_owner_word(region)};
}

static uint32_t holder_of(uint64_t held) {
    return (uint32_t)held & ~PS_OWNER_WAITING;
}

static uint32_t next_of(uint64_t held) {
    return (uint32_t)(held >> PS_HELD_NEXT_SHIFT) & ~PS_OWNER_WAITING;
}

static _Atomic uint64_t *lease_word(const struct ps_region *region, uint64_t page) {
    return (_Atomic uint64_t *)ps_section(region, PS_SEC_LEASE) + page;
}

static struct ps_shm_lock *user_lock(const struct ps_region *region, uint32_t index) {
    return (struct ps_shm_lock *)ps_section(region, PS_SEC_LOCK) + index;
}

static _Atomic uint32_t *low_half(_Atomic uint64_t *word) {
    return (_Atomic uint32_t *)(void *)word;
}

static _Atomic uint32_t *high_half(_Atomic uint64_t *word) {
    return low_half(word) + 1;
}

static bool gone(const struct wait *wait, uint32_t owner) {
    return owner && owner != wait->mine && ps_owner_gone(wait->region, owner);
}

/* -- One word -------------------------------------------------------------------------------------------------- */

struct taking {
    struct wait *wait;
    _Atomic uint64_t *word;
    uint64_t seen;
    bool slept, reserved; /* reserved: `next` is ours, of this thread */
    uint32_t dead;        /* the holder whose place we take */
};

/* Nobody has it, and nobody but us is to have it next. */
static bool is_free(const struct taking *taking) {
    uint32_t next = next_of(taking->seen);
    return !holder_of(taking->seen) && (!next || (taking->reserved && next == taking->wait->mine));
}

/* seq_cst, a full barrier: a lease-taker looks at the closers after it.  Acquire: pairs with the release in give, so
 * the last holder's stores are visible.  Whoever slept cannot know who else sleeps. */
static bool take_seen(struct taking *taking) {
    uint64_t sleepers = taking->slept ? PS_HELD_WAITING : taking->seen & PS_HELD_WAITING;
    return atomic_compare_exchange_weak_explicit(taking->word, &taking->seen, taking->wait->mine | sleepers,
                                                 memory_order_seq_cst, memory_order_relaxed);
}

/* Where the holder runs on another CPU it may be done sooner than we sleep.  As long as it has been worth it of late.
 */
static bool spin(struct taking *taking) {
    struct ps_region *region = taking->wait->region;
    uint32_t usual = atomic_load_explicit(&region->spins, memory_order_relaxed), limit = 2 * usual + 16, looks = 0;
    limit = region->cpus < 2 ? 0 : limit < SPIN ? limit : SPIN;
    while (looks < limit && !is_free(taking)) {
        __builtin_ia32_pause();
        taking->seen = atomic_load_explicit(taking->word, memory_order_relaxed);
        looks++;
    }
    bool found = looks < limit;
    atomic_store_explicit(&region->spins, found ? usual - usual / 8 + looks / 8 : usual - usual / 8,
                          memory_order_relaxed);
    return found;
}

/* One sleep, on the half that says what we wait for; after one in vain the word is reserved first. */
static int sleep_on(struct taking *taking, uint32_t owner, bool next_gone) {
    uint64_t seen = taking->seen, flagged = seen | (taking->reserved ? PS_HELD_NEXT_WAITING : PS_HELD_WAITING);
    bool reserves = taking->slept && !taking->reserved && (!next_of(seen) || next_gone);
    if (reserves)
        flagged = (seen & PS_HELD_HOLDER) | (uint64_t)(taking->wait->mine | PS_OWNER_WAITING) << PS_HELD_NEXT_SHIFT;
    if (flagged != seen && !atomic_compare_exchange_strong_explicit(taking->word, &seen, flagged, memory_order_relaxed,
                                                                    memory_order_relaxed))
        return 0;
    taking->reserved |= reserves;
    struct ps_watch low = {low_half(taking->word), (uint32_t)flagged},
                    high = {high_half(taking->word), (uint32_t)(flagged >> PS_HELD_NEXT_SHIFT)};
    int rc = ps_owner_wait(taking->wait->region, taking->reserved ? high : low, owner, taking->wait->until.at);
    taking->slept = true;
    return rc;
}

/* Gives the reservation back; who sleeps on the low half may find the word free. */
static int give_up(struct taking *taking, uint32_t owner, int rc) {
    taking->wait->blocker = owner;
    if (!taking->reserved)
        return rc;
    uint64_t seen = atomic_load_explicit(taking->word, memory_order_relaxed);
    while (next_of(seen) == taking->wait->mine &&
           !atomic_compare_exchange_weak_explicit(taking->word, &seen, seen & PS_HELD_HOLDER, memory_order_relaxed,
                                                  memory_order_relaxed))
        ;
    ps_sys_wake(low_half(taking->word), 1, FUTEX_BITSET_MATCH_ANY);
    return rc;
}

/* The way of whoever has to wait. 1: taken; 0: look again. */
static int contend(struct taking *taking) {
    struct wait *wait = taking->wait;
    uint32_t holder = holder_of(taking->seen), next = next_of(taking->seen);
    if (!ps_owner_known(wait->region, holder) && holder)
        return ps_corrupt(wait->region, "held word");
    if (!ps_owner_known(wait->region, next) && next)
        return ps_corrupt(wait->region, "held word");
    bool holder_gone = gone(wait, holder), next_gone = gone(wait, next);
    bool ours = !next || next_gone || (taking->reserved && next == wait->mine);
    if ((!holder || holder_gone) && ours) {
        if (!take_seen(taking))
            return 0;
        taking->dead = holder;
        return 1;
    }
    uint32_t owner = holder && !holder_gone ? holder : next;
    int rc = sleep_on(taking, owner, next_gone);
    return rc ? give_up(taking, owner, rc) : 0;
}

static struct ps_shm_closer *closer_over(struct ps_region *region, uint64_t first, uint64_t count);

/* A change waits for pages that we hold while we wait for others, whose holder may be the one who makes it. */
static bool in_the_way(const struct taking *taking) {
    const struct wait *wait = taking->wait;
    return taking->slept && wait->count && closer_over(wait->region, wait->first, wait->count);
}

/* `index` is that of the word in `here`. *dead: the holder that died with it, or 0. */
static int take_word(struct wait *wait, _Atomic uint64_t *word, uint64_t index, uint32_t *dead) {
    struct taking taking = {.wait = wait, .word = word, .seen = atomic_load_explicit(word, memory_order_relaxed)};
    int rc = 0;
    while (!rc) {
        if (is_free(&taking)) {
            rc = take_seen(&taking);
        } else if (holder_of(taking.seen) == wait->mine && ps_here_own(wait->region, index)) {
            rc = give_up(&taking, wait->mine, PS_ENESTED);
        } else if (wait->until.at == PS_TRY) {
            rc = -EAGAIN;
        } else if (in_the_way(&taking)) {
            rc = give_up(&taking, wait->mine, -EBUSY);
        } else if (taking.slept || !spin(&taking)) {
            rc = contend(&taking);
            taking.seen = atomic_load_explicit(word, memory_order_relaxed);
        }
    }
    *dead = taking.dead;
    return rc < 0 ? rc : 0;
}

/* seq_cst: what was stored under the word is visible to the next holder; and the look at the closers comes after it:
 * a change that sleeps on the word has published its closer before it set WAITING.  `dead`, where not 0, is the holder
 * whose place we took: its word comes back. */
static void give(struct ps_region *region, _Atomic uint64_t *word, uint32_t dead) {
    uint64_t seen = atomic_load_explicit(word, memory_order_relaxed), left;
    do
        left = (seen & ~(PS_HELD_HOLDER | PS_HELD_NEXT_WAITING)) | dead;
    while (!atomic_compare_exchange_weak_explicit(word, &seen, left, memory_order_seq_cst, memory_order_relaxed));
    PS_POINT(H4_release);
    if (seen & PS_HELD_NEXT_WAITING)
        ps_sys_wake(high_half(word), 1, FUTEX_BITSET_MATCH_ANY);
    else if (seen & PS_HELD_WAITING)
        ps_sys_wake(low_half(word), 1, FUTEX_BITSET_MATCH_ANY);
    if (seen & PS_HELD_WAITING && atomic_load_explicit(&ps_header(region)->closers, memory_order_seq_cst))
        ps_sys_wake(low_half(word), INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

/* -- Closers --------------------------------------------------------------------------------------------------- */

static struct ps_shm_closer *closer_over(struct ps_region *region, uint64_t first, uint64_t count) {
    struct ps_shm_header *header = ps_header(region);
    /* seq_cst: after the CAS of our words (invariant 1). */
    for (uint64_t mask = atomic_load_explicit(&header->closers, memory_order_seq_cst); mask; mask &= mask - 1) {
        struct ps_shm_closer *closer = &header->closer[__builtin_ctzll(mask)];
        /* relaxed: stored before the bit.  Of an entry that changes hands now the owner comes after us, and sees us. */
        uint64_t from = atomic_load_explicit(&closer->first, memory_order_relaxed);
        uint64_t pages = atomic_load_explicit(&closer->count, memory_order_relaxed);
        /* It waits for the leases that this thread has, so it has not come to anything yet. */
        if (atomic_load_explicit(&closer->drain, memory_order_relaxed) && thread_holds(region))
            continue;
        if (from < first + count && first < from + pages)
            return closer;
    }
    return NULL;
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

/* A dead caller's: its change may be half done, or it may have the region frozen, and we are the first to come after
 * it.  The entry is ours meanwhile. */
static int bury(struct wait *wait, struct ps_shm_closer *closer, uint32_t dead) {
    if (!atomic_compare_exchange_strong_explicit(&closer->owner, &dead, wait->mine, memory_order_acquire,
                                                 memory_order_relaxed))
        return 0;
    ps_closer_thread(wait->region, closer, ps_process_tid());
    bool freezes = !atomic_load_explicit(&closer->drain, memory_order_relaxed); /* or may have: not a snapshot */
    int rc = freezes ? ps_freeze_finish(wait->region, wait->until.at, &wait->blocker) : 0;
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

/* Until the entry goes, or the deadline comes. */
static int wait_for_closer(struct wait *wait, struct ps_shm_closer *closer) {
    struct ps_shm_header *header = ps_header(wait->region);
    uint32_t seen = atomic_load_explicit(&closer->owner, memory_order_acquire), owner = seen & ~PS_OWNER_WAITING;
    wait->blocker = owner;
    if (!owner) { /* through; a bit without an owner is damage: look again, but not for ever */
        struct ps_watch nobody = {&closer->owner, 0};
        uint64_t bits = atomic_load_explicit(&header->closers, memory_order_seq_cst);
        return bits >> (closer - header->closer) & 1 ? ps_owner_wait(wait->region, nobody, wait->mine, wait->until.at)
                                                     : 0;
    }
    if (!ps_owner_known(wait->region, owner))
        return ps_corrupt(wait->region, "closer");
    if (gone(wait, owner))
        return bury(wait, closer, seen);
    uint32_t flagged = seen | PS_OWNER_WAITING;
    if (seen != flagged && !atomic_compare_exchange_strong_explicit(&closer->owner, &seen, flagged,
                                                                    memory_order_relaxed, memory_order_relaxed))
        return 0;
    return ps_owner_wait(wait->region, (struct ps_watch){&closer->owner, flagged}, owner, wait->until.at);
}

/* Which thread of ours has the entry: should it be ended, another passes it on (lock.c).  0: whoever comes to clear it.
 */
void ps_closer_thread(struct ps_region *region, const struct ps_shm_closer *closer, int tid) {
    atomic_store_explicit(&region->closing[closer - ps_header(region)->closer], tid, memory_order_release);
}

static bool claim_closer(struct wait *wait, struct ps_shm_closer *closer) {
    uint32_t nobody = 0;
    if (!atomic_compare_exchange_strong_explicit(&closer->owner, &nobody, wait->mine, memory_order_acquire,
                                                 memory_order_relaxed))
        return false;
    ps_closer_thread(wait->region, closer, ps_process_tid());
    return true;
}

/* An entry of our own; where all are in use, one whose owner is through, or dead. */
static int find_closer(struct wait *wait, struct ps_shm_closer **closer) {
    struct ps_shm_closer *table = ps_header(wait->region)->closer;
    for (uint32_t at = wait->region->slot;; at++) {
        for (uint32_t i = 0; i < PS_CLOSERS; i++)
            if (claim_closer(wait, *closer = &table[(at + i) % PS_CLOSERS]))
                return 0;
        int rc = wait_for_closer(wait, &table[at % PS_CLOSERS]);
        if (rc)
            return rc;
    }
}

/* -- A change and the leases in its range ---------------------------------------------------------------------- */

/* The first page from `page` on that somebody holds. */
static uint64_t next_held(struct ps_region *region, uint64_t page, uint64_t end) {
    uint64_t words = region->shape.offset[PS_SEC_LEASE];
    while (page < end && !holder_of(atomic_load_explicit(lease_word(region, page), memory_order_seq_cst))) {
        page++;
        if (page % WORDS == 0 && end - page > WORDS && page < end)
            page =
                (ps_region_skip_hole(region, words + page * sizeof(uint64_t), words + end * sizeof(uint64_t)) - words) /
                sizeof(uint64_t);
    }
    return page;
}

/* Until whoever holds the page has given it back, or is gone. */
static int await_holder(struct wait *wait, _Atomic uint64_t *word) {
    for (;;) {
        uint64_t seen = atomic_load_explicit(word, memory_order_seq_cst), flagged = seen | PS_HELD_WAITING;
        uint32_t holder = holder_of(seen);
        if (holder && !ps_owner_known(wait->region, holder))
            return ps_corrupt(wait->region, "held word");
        if (!holder || gone(wait, holder))
            return 0;
        wait->blocker = holder;
        PS_POINT(K2_wait);
        if (seen != flagged &&
            !atomic_compare_exchange_strong_explicit(word, &seen, flagged, memory_order_seq_cst, memory_order_relaxed))
            continue;
        struct ps_watch low = {low_half(word), (uint32_t)flagged};
        int rc = ps_owner_wait(wait->region, low, holder, wait->until.at);
        if (rc)
            return rc;
    }
}

/* The calling thread's own is found before anybody is waited for. */
static int await_holders(struct wait *wait, uint64_t first, uint64_t end) {
    struct ps_region *region = wait->region;
    for (uint64_t page = first; (page = next_held(region, page, end)) < end; page++)
        if (holder_of(atomic_load_explicit(lease_word(region, page), memory_order_relaxed)) == wait->mine &&
            ps_here_own(region, page))
            return PS_ENESTED;
    int rc = 0;
    for (uint64_t page = first; !rc && (page = next_held(region, page, end)) < end; page++)
        rc = await_holder(wait, lease_word(region, page));
    return rc;
}

static void add_pid(const struct wait *wait, uint32_t owner, struct ps_outcome *outcome) {
    bool live = owner && ps_owner_known(wait->region, owner) && !gone(wait, owner);
    uint32_t pid = live ? ps_owner_pid(wait->region, owner) : 0;
    if (pid && outcome->silent < PS_SLOTS_MAX)
        outcome->pids[outcome->silent++] = pid;
}

/* The result of a wait that has ended, with the pids of all that hold one of the words. */
static int tell(const struct wait *wait, int rc, _Atomic uint64_t *word, uint64_t count, struct ps_outcome *outcome) {
    outcome->generation = outcome->silent = 0;
    rc = rc == -ETIMEDOUT ? ps_timed_out(wait->until) : rc;
    if (rc != PS_ETIMEOUT)
        return rc;
    uint32_t last = wait->blocker;
    add_pid(wait, last, outcome);
    for (uint64_t i = 0; i < count; i++) {
        uint32_t holder = holder_of(atomic_load_explicit(word + i, memory_order_relaxed));
        if (holder != last)
            add_pid(wait, last = holder, outcome);
    }
    return PS_ETIMEOUT;
}

static int publish_closer(struct wait *wait, uint64_t first, uint64_t count, bool drain,
                          struct ps_shm_closer **closer) {
    struct ps_shm_header *header = ps_header(wait->region);
    int rc = find_closer(wait, closer);
    if (rc)
        return rc;
    atomic_store_explicit(&(*closer)->first, first, memory_order_relaxed);
    atomic_store_explicit(&(*closer)->count, count, memory_order_relaxed);
    atomic_store_explicit(&(*closer)->drain, drain, memory_order_relaxed);
    /* seq_cst: before the look at the words (invariant 1) or the counts, after the range. */
    atomic_fetch_or_explicit(&header->closers, UINT64_C(1) << (*closer - header->closer), memory_order_seq_cst);
    PS_POINT(K1_close);
    return 0;
}

int ps_lease_close(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline,
                   struct ps_outcome *outcome, struct ps_shm_closer **closer) {
    struct ps_shm_header *header = ps_header(region);
    struct wait wait = begin_wait(region, deadline);
    int rc = publish_closer(&wait, first, count, false, closer);
    if (rc)
        return tell(&wait, rc, NULL, 0, outcome);
    if (atomic_load_explicit(&header->leases, memory_order_seq_cst))
        rc = await_holders(&wait, first, first + count);
    if (!rc)
        return 0;
    clear(region, *closer);
    return tell(&wait, rc, lease_word(region, first), count, outcome);
}

void ps_lease_open(struct ps_region *region, struct ps_shm_closer *closer) {
    clear(region, closer);
}

/* -- A snapshot and all leases -----------------------------------------------------------------------------------
 *
 * It does not look at words, which are as many as pages: each participant counts the leases that it has or is about to
 * have.  A lease-taker counts before it looks at the closers, a snapshot publishes its closer before it looks at the
 * counts.  A thread that has a lease passes, so that it can come to its end: it counts that lease as long as it has it,
 * so the snapshot waits still.  Who waits for words counts nothing: it may be stopped, and holds up nobody. */

static _Atomic uint32_t *own_leases(const struct ps_region *region) {
    return &ps_slot(region, region->slot)->leases;
}

static void count_lease(struct ps_region *region) {
    atomic_fetch_add_explicit(own_leases(region), 1, memory_order_seq_cst);
}

/* Of a snapshot that waits for leases, or NULL. */
static struct ps_shm_closer *find_drain(struct ps_region *region) {
    struct ps_shm_header *header = ps_header(region);
    /* seq_cst: after the count. */
    for (uint64_t mask = atomic_load_explicit(&header->closers, memory_order_seq_cst); mask; mask &= mask - 1) {
        struct ps_shm_closer *closer = &header->closer[__builtin_ctzll(mask)];
        if (atomic_load_explicit(&closer->drain, memory_order_relaxed))
            return closer;
    }
    return NULL;
}

static void uncount_lease(struct ps_region *region) {
    atomic_fetch_sub_explicit(own_leases(region), 1, memory_order_seq_cst);
    if (find_drain(region))
        ps_sys_wake(own_leases(region), INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

/* Whoever has the region frozen stores without a lease: its stores come before a snapshot's moment, or after it. */
int ps_lease_enter(struct ps_region *region) {
    struct wait wait = begin_wait(region, PS_NEVER);
    for (;;) {
        count_lease(region);
        struct ps_shm_closer *closer = find_drain(region);
        if (!closer)
            return ps_waited(0);
        uncount_lease(region);
        int rc = wait_for_closer(&wait, closer);
        if (rc)
            return ps_waited(rc == -ETIMEDOUT ? PS_ESIGNAL : rc);
    }
}

void ps_lease_leave(struct ps_region *region) {
    uncount_lease(region);
}

/* Until the participant has none, or is gone. */
static int drain_slot(struct wait *wait, uint32_t index) {
    struct ps_shm_slot *slot = ps_slot(wait->region, index);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire), leases;
    uint32_t owner = ps_owner_of(index, status);
    while (ps_state_of(status) == PS_LIVE && (leases = atomic_load_explicit(&slot->leases, memory_order_seq_cst))) {
        if (gone(wait, owner))
            return 0;
        wait->blocker = owner;
        int rc = ps_owner_wait(wait->region, (struct ps_watch){&slot->leases, leases}, owner, wait->until.at);
        if (rc)
            return rc;
    }
    return 0;
}

int ps_lease_drain(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome,
                   struct ps_shm_closer **closer) {
    struct wait wait = begin_wait(region, deadline);
    if (thread_holds(region))
        return PS_ENESTED;
    int rc = publish_closer(&wait, 0, region->shape.pages, true, closer);
    if (rc)
        return tell(&wait, rc, NULL, 0, outcome);
    for (uint32_t index = 0, used = ps_slots_used(region); index < used && !rc; index++)
        rc = drain_slot(&wait, index);
    if (!rc)
        return 0;
    clear(region, *closer);
    return tell(&wait, rc, NULL, 0, outcome);
}

/* -- Leases ---------------------------------------------------------------------------------------------------- */

/* For who looks (observe.c): it has one more, or one less. */
static void tell_taken(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    uint32_t before = atomic_fetch_add_explicit(&slot->takes, 1, memory_order_relaxed);
    if (before == atomic_load_explicit(&slot->ends, memory_order_relaxed))
        atomic_store_explicit(&slot->leased_since, ps_sys_coarse(), memory_order_relaxed);
}

static void tell_ended(struct ps_region *region) {
    atomic_fetch_add_explicit(&ps_slot(region, region->slot)->ends, 1, memory_order_relaxed);
}

static void give_pages(struct ps_region *region, uint64_t first, uint64_t end) {
    for (uint64_t page = first; page < end; page++)
        give(region, lease_word(region, page),
             (uint32_t)(atomic_exchange_explicit(&region->here[page], 0, memory_order_release) >> PS_HERE_DEAD_SHIFT));
}

/* All of them, or none. */
static int take_pages(struct wait *wait, struct ps_lease *lease) {
    struct ps_region *region = wait->region;
    uint64_t held = (uint64_t)ps_process_holder() << 2 | PS_HERE_HELD, end = lease->first + lease->count;
    lease->abandoned = false;
    for (uint64_t page = lease->first; page < end; page++) {
        uint32_t dead;
        wait->first = lease->first;
        wait->count = page - lease->first;
        int rc = take_word(wait, lease_word(region, page), page, &dead);
        if (rc) {
            give_pages(region, lease->first, page);
            return rc;
        }
        /* release: whoever finds the word ours, in another thread of ours, may look here. */
        atomic_store_explicit(&region->here[page], held | (uint64_t)dead << PS_HERE_DEAD_SHIFT, memory_order_release);
        lease->abandoned |= dead != 0;
        PS_POINT(H1_take);
    }
    return 0;
}

static void hand_over(struct ps_region *region, uint64_t first, uint64_t count, int tid) {
    const uint64_t kept = ~(UINT64_C(0xffffffff) & ~(uint64_t)(PS_HERE_HELD | PS_HERE_IN_PLACE));
    for (uint64_t at = first; at < first + count; at++)
        atomic_store_explicit(&region->here[at], (ps_here(region, at) & kept) | (uint64_t)tid << 2,
                              memory_order_release);
}

void ps_lease_hand_over(struct ps_region *region, struct ps_lease *lease, int tid) {
    hand_over(region, lease->first, lease->count, tid);
    lease->taker = tid;
    count_for(region, tid, 1);
}

void ps_user_lock_hand_over(struct ps_region *region, uint32_t index, int tid) {
    hand_over(region, region->shape.pages + index, 1, tid);
}

static bool nested(const struct ps_region *region, const struct ps_lease *lease) {
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++)
        if (ps_here_own(region, page))
            return true;
    return false;
}

/* Words that no change is after; counted. */
static int take_open_pages(struct wait *wait, struct ps_lease *lease) {
    struct ps_region *region = wait->region;
    for (;;) {
        int rc = take_pages(wait, lease);
        if (rc && rc != -EBUSY)
            return rc;
        if (!rc)
            count_lease(region);
        struct ps_shm_closer *closer = closer_over(region, lease->first, lease->count);
        if (!closer && !rc)
            return 0;
        if (!rc) {
            give_pages(region, lease->first, lease->first + lease->count);
            uncount_lease(region);
        }
        if (!closer)
            continue; /* it went meanwhile */
        rc = wait->until.at == PS_TRY ? -EAGAIN : wait_for_closer(wait, closer);
        if (rc)
            return rc;
    }
}

/* Does one of the pages need its page tables changed?  Or is one of them nothing that a lease can be over? */
static int look_at_map(struct ps_region *region, struct ps_lease *lease, struct ps_refusal *refusal) {
    uint64_t end = lease->first + lease->count;
    lease->in_place = false;
    for (uint64_t page = lease->first, run; page < end; page += run) {
        uint32_t prot;
        run = ps_run(region, page, end, &prot);
        if (prot != PROT_READ && !(prot & PROT_WRITE)) {
            *refusal = (struct ps_refusal){page, prot, PROT_READ, ps_change_author(region, page)};
            return PS_EREFUSED;
        }
        lease->in_place |= prot == PROT_READ && !lease->window;
    }
    return 0;
}

static void mark_in_place(struct ps_region *region, const struct ps_lease *lease, bool on) {
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++) {
        uint64_t here = atomic_load_explicit(&region->here[page], memory_order_relaxed);
        here = on ? here | PS_HERE_IN_PLACE : here & ~(uint64_t)PS_HERE_IN_PLACE;
        atomic_store_explicit(&region->here[page], here, memory_order_release);
    }
    /* seq_cst not needed: who applies does so under the page lock, which comes after. */
    if (on)
        atomic_fetch_add_explicit(&region->leased, lease->count, memory_order_release);
    else
        atomic_fetch_sub_explicit(&region->leased, lease->count, memory_order_release);
}

/* Page tables without the lease.  A process that cannot take the rights back has none at all. */
static void close_pages(struct ps_region *region, const struct ps_lease *lease) {
    if (ps_engine_lease(region, lease->first, lease->count, PS_NEVER) && !region->fenced)
        ps_agent_fence(region);
}

static int open_pages(struct wait *wait, const struct ps_lease *lease, struct ps_refusal *refusal) {
    struct ps_region *region = wait->region;
    mark_in_place(region, lease, true);
    int rc = ps_engine_lease(region, lease->first, lease->count, wait->until.at);
    if (!rc) {
        PS_POINT(H2_open);
        return 0;
    }
    wait->blocker = wait->mine;
    mark_in_place(region, lease, false);
    if (rc != -ETIMEDOUT)
        close_pages(region, lease);
    if (rc == -EACCES) { /* fenced */
        *refusal = (struct ps_refusal){lease->first, PROT_NONE, PROT_READ, ps_change_author(region, lease->first)};
        return PS_EREFUSED;
    }
    return rc == -ETIMEDOUT && wait->until.at == PS_TRY ? -EAGAIN : rc;
}

/* The window is made by the first that needs it. */
int ps_lease_window(struct ps_region *region, int64_t deadline) {
    if (atomic_load_explicit(&region->window, memory_order_acquire))
        return 0;
    int rc = ps_page_lock(region, deadline);
    if (rc)
        return rc == -ETIMEDOUT && deadline == PS_TRY ? -EAGAIN : rc;
    if (!region->window)
        rc = ps_region_map_window(region);
    atomic_store_explicit(&region->window, !rc, memory_order_release);
    ps_page_unlock(region);
    return rc;
}

int ps_lease_take(struct ps_region *region, struct ps_lease *lease, int64_t deadline, struct ps_outcome *outcome,
                  struct ps_refusal *refusal) {
    struct ps_shm_header *header = ps_header(region);
    struct wait wait = begin_wait(region, deadline);
    if (!atomic_load_explicit(&header->leases, memory_order_relaxed)) /* seq_cst: before our words */
        atomic_store_explicit(&header->leases, 1, memory_order_seq_cst);
    int rc = region->counts ? 0 : ps_region_map_counts(region);
    if (!rc && deadline != PS_TRY) /* before anybody is waited for */
        rc = ps_freeze_own(region) ? PS_EFROZEN : nested(region, lease) ? PS_ENESTED : 0;
    if (!rc && lease->window)
        rc = ps_lease_window(region, wait.until.at);
    if (!rc && !(rc = take_open_pages(&wait, lease))) {
        rc = look_at_map(region, lease, refusal);
        if (!rc && ps_snapshots(region))
            rc = ps_snapshot_keep(region, lease->first, lease->count, false);
        if (!rc && lease->in_place)
            rc = open_pages(&wait, lease, refusal);
        if (rc) {
            give_pages(region, lease->first, lease->first + lease->count);
            uncount_lease(region);
        } else {
            tell_taken(region);
            lease->taker = ps_process_holder();
            count_for(region, lease->taker, 1);
        }
    }
    return ps_waited(rc ? tell(&wait, rc, lease_word(region, lease->first), lease->count, outcome) : 0);
}

int ps_lease_give(struct ps_region *region, const struct ps_lease *lease, int64_t deadline) {
    if (!ps_process_known())
        return 0; /* a child by a raw clone() holds nothing, and has no words */
    if (lease->in_place) {
        if (deadline == PS_TRY && atomic_load_explicit(&region->page_lock, memory_order_relaxed))
            return -EAGAIN;
        mark_in_place(region, lease, false);
        close_pages(region, lease);
        PS_POINT(H3_close);
    }
    uint64_t ended = ps_sys_coarse() / PS_MS << 1, generation = ps_generation(region);
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++) {
        ps_stamp(region, page, generation);
        atomic_store_explicit(&region->here[page], ended, memory_order_release);
        give(region, lease_word(region, page), 0);
    }
    tell_ended(region);
    count_for(region, lease->taker, -1); /* before the slot's count: thread_holds */
    uncount_lease(region);
    return 0;
}

void *ps_window(const struct ps_region *region) {
    return (char *)ps_address(region) + ps_window_offset(&region->shape);
}

/* -- User locks ------------------------------------------------------------------------------------------------ */

int ps_user_lock_take(struct ps_region *region, uint32_t index, int64_t deadline, bool *abandoned,
                      struct ps_outcome *outcome) {
    struct wait wait = begin_wait(region, deadline);
    uint64_t here = region->shape.pages + index;
    uint32_t dead;
    int rc = take_word(&wait, &user_lock(region, index)->held, here, &dead);
    if (rc)
        return ps_waited(tell(&wait, rc, &user_lock(region, index)->held, 1, outcome));
    atomic_store_explicit(&user_lock(region, index)->since, ps_sys_coarse(), memory_order_relaxed);
    atomic_store_explicit(&region->here[here], (uint64_t)ps_process_holder() << 2 | PS_HERE_HELD, memory_order_release);
    *abandoned = dead != 0;
    PS_POINT(H1_take);
    return ps_waited(0);
}

void ps_user_lock_give(struct ps_region *region, uint32_t index) {
    if (!ps_process_known())
        return;
    atomic_store_explicit(&region->here[region->shape.pages + index], 0, memory_order_release);
    give(region, &user_lock(region, index)->held, 0);
}
