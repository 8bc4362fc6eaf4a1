/* held.c - held words, one at a time: taking, waiting in line, giving; user locks; what this process's threads hold.
 *
 *   H1_take     a word is ours
 *   H4_release  a word is free; who sleeps on it is woken
 *   K2_wait     somebody who wants no word waits for a holder
 *
 * Invariants
 *  1. Whoever has slept and lost reserves the word: nobody, of its own process
 *     either, takes it before, unless it does not come while the word is free
 *     (PS_IN_LINE): then it may be stopped, and has lost its place.
 *  2. What a dead holder left is known until a lease or lock whose owner was told
 *     of it has ended: whoever gives up, or has the word without its owner's
 *     knowledge, puts the dead one's word back.
 *  3. `here` and the counts are of this process, and tell which of its threads
 *     has what.  A thread's count is raised when it has a lease, and lowered
 *     before the lease is uncounted in the slot (closer.c).
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "core.h"
#include "hold/hold.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define SPIN 200   /* looks before sleeping, at most: some 5 µs */
#define WORDS 512u /* held words in a page of the memfd */

static uint64_t load(const struct ps_region *region, uint64_t index) {
    return atomic_load_explicit(ps_held_word(region, index), memory_order_seq_cst);
}

/* -- A call that waits ------------------------------------------------------------------------------------------- */

struct ps_wait ps_wait_begin(struct ps_region *region, int64_t deadline) {
    return (struct ps_wait){.region = region, .until = ps_until(deadline), .mine = ps_owner_word(region)};
}

bool ps_wait_gone(const struct ps_wait *wait, uint32_t owner) {
    return owner && owner != wait->mine && ps_owner_gone(wait->region, owner);
}

/* One of those because of whom it was in vain. */
void ps_wait_blame(const struct ps_wait *wait, uint32_t owner, struct ps_outcome *outcome) {
    bool live = owner && ps_owner_known(wait->region, owner) && !ps_wait_gone(wait, owner);
    uint32_t pid = live ? ps_owner_pid(wait->region, owner) : 0;
    if (pid && outcome->silent < PS_SLOTS_MAX)
        outcome->pids[outcome->silent++] = pid;
}

/* The result of a wait that has ended, with the pids of all that hold one of the words. */
int ps_wait_end(const struct ps_wait *wait, int rc, uint64_t first, uint64_t count, struct ps_outcome *outcome) {
    outcome->generation = outcome->silent = 0;
    if (rc != -ETIMEDOUT)
        return rc;
    rc = ps_timed_out(wait->until);
    uint32_t last = wait->blocker;
    if (rc == PS_ETIMEOUT)
        ps_wait_blame(wait, last, outcome);
    for (uint64_t end = first + count, at = first; rc == PS_ETIMEOUT && at < end; at++) {
        at = ps_held_next(wait->region, at, end);
        uint32_t holder = at < end ? ps_holder_of(load(wait->region, at)) : 0;
        if (holder != last)
            ps_wait_blame(wait, last = holder, outcome);
    }
    return rc;
}

/* -- Taking ------------------------------------------------------------------------------------------------------ */

struct taking {
    struct ps_wait *wait;
    _Atomic uint64_t *word;
    uint64_t index, seen;
    bool slept;
    uint32_t before; /* who is to have it before us, since when it has been free; 0: nobody, or it is not free */
    int64_t since;
    uint32_t dead; /* the holder whose place we take */
};

/* `next` is ours, of this thread; or of another one of ours, which we overtake. */
static bool is_reserved(const struct taking *taking) {
    return ps_next_of(taking->seen) == taking->wait->mine && taking->index < taking->wait->line_end;
}

/* Nobody has it, and nobody but us is to have it next. */
static bool is_free(const struct taking *taking) {
    return !ps_holder_of(taking->seen) && (!ps_next_of(taking->seen) || is_reserved(taking));
}

/* seq_cst, a full barrier: a lease-taker looks at the closers after it.  Acquire: pairs with the release in
 * ps_held_give, so the last holder's stores are visible.  Whoever slept cannot know who else sleeps. */
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

/* Nobody has the word, and who is to have it next has not come for too long.  By our own looks: whatever it stored when
 * it got in line, it may have been stopped before or after that.  It is known for the rest of the call: it may be
 * before us at many pages. */
static bool does_not_come(struct taking *taking, bool vacant, uint32_t next) {
    struct ps_wait *wait = taking->wait;
    uint32_t before = taking->before;
    taking->before = vacant ? next : 0;
    if (!taking->before || next == wait->absent)
        return next && next == wait->absent;
    int64_t now = ps_sys_now();
    if (next != before)
        taking->since = now;
    else if (now - taking->since >= PS_IN_LINE)
        wait->absent = next;
    return next == wait->absent;
}

/* One sleep, on the half that says what we wait for; after one in vain the word is reserved first. */
static int sleep_on(struct taking *taking, uint32_t owner, bool next_gone) {
    struct ps_wait *wait = taking->wait;
    bool reserved = is_reserved(taking),
         reserves = taking->slept && !reserved && (!ps_next_of(taking->seen) || next_gone);
    uint64_t seen = taking->seen, flagged = seen | (reserved ? PS_HELD_NEXT_WAITING : PS_HELD_WAITING);
    if (reserves)
        flagged = (seen & PS_HELD_HOLDER) | (uint64_t)(wait->mine | PS_OWNER_WAITING) << PS_HELD_NEXT_SHIFT;
    if (flagged != seen && !atomic_compare_exchange_strong_explicit(taking->word, &seen, flagged, memory_order_relaxed,
                                                                    memory_order_relaxed))
        return 0;
    if (reserves && wait->line_end <= taking->index)
        wait->line_end = taking->index + 1;
    struct ps_watch low = {ps_low_half(taking->word), (uint32_t)flagged},
                    high = {ps_low_half(taking->word) + 1, (uint32_t)(flagged >> PS_HELD_NEXT_SHIFT)};
    int rc = ps_owner_wait(wait->region, reserved || reserves ? high : low, owner, wait->until.at);
    taking->slept = true;
    return rc;
}

/* The way of whoever cannot have it at once. 1: taken; 0: look again. */
static int contend(struct taking *taking, bool waits) {
    struct ps_wait *wait = taking->wait;
    uint32_t holder = ps_holder_of(taking->seen), next = ps_next_of(taking->seen);
    if ((holder && !ps_owner_known(wait->region, holder)) || (next && !ps_owner_known(wait->region, next)))
        return ps_corrupt(wait->region, "held word");
    bool vacant = !holder || ps_wait_gone(wait, holder), next_gone = ps_wait_gone(wait, next);
    bool absent = does_not_come(taking, vacant, next);
    if (vacant && (!next || next_gone || absent || is_reserved(taking))) {
        if (!take_seen(taking))
            return 0;
        taking->dead = holder;
        return 1;
    }
    if (!waits)
        return -EAGAIN;
    int rc = sleep_on(taking, vacant ? next : holder, next_gone);
    if (rc)
        wait->blocker = vacant ? 0 : holder;
    return rc;
}

/* *dead: the holder that died with it, or 0.  -EAGAIN: it cannot be had without a wait, and it is not to wait. */
int ps_held_take(struct ps_wait *wait, uint64_t index, bool waits, uint32_t *dead) {
    struct taking taking = {.wait = wait, .word = ps_held_word(wait->region, index), .index = index};
    taking.seen = atomic_load_explicit(taking.word, memory_order_relaxed);
    int rc = 0;
    while (!rc) {
        if (is_free(&taking)) {
            rc = take_seen(&taking);
        } else if (ps_holder_of(taking.seen) == wait->mine && ps_here_own(wait->region, index)) {
            rc = PS_ENESTED;
        } else if (wait->until.at == PS_TRY) {
            rc = -EAGAIN;
        } else if (!waits || taking.slept || !spin(&taking)) {
            rc = contend(&taking, waits);
            taking.seen = atomic_load_explicit(taking.word, memory_order_relaxed);
        }
    }
    *dead = taking.dead;
    return rc < 0 ? rc : 0;
}

/* seq_cst: what was stored under the word is visible to the next holder; and the look at the closers comes after it:
 * a change that sleeps on the word has published its closer before it set WAITING.  `dead`, where not 0, is the holder
 * whose place we took: its word comes back.  `next`, where not 0, is to have it next, unless somebody is already. */
void ps_held_give(struct ps_region *region, uint64_t index, uint32_t dead, uint32_t next) {
    _Atomic uint64_t *word = ps_held_word(region, index);
    uint64_t seen = atomic_load_explicit(word, memory_order_relaxed), left;
    do {
        left = (seen & ~(PS_HELD_HOLDER | PS_HELD_NEXT_WAITING)) | dead;
        if (!ps_next_of(seen))
            left |= (uint64_t)next << PS_HELD_NEXT_SHIFT;
    } while (!atomic_compare_exchange_weak_explicit(word, &seen, left, memory_order_seq_cst, memory_order_relaxed));
    PS_POINT(H4_release);
    if (seen & PS_HELD_NEXT_WAITING)
        ps_sys_wake(ps_low_half(word) + 1, 1, FUTEX_BITSET_MATCH_ANY);
    else if (seen & PS_HELD_WAITING)
        ps_sys_wake(ps_low_half(word), 1, FUTEX_BITSET_MATCH_ANY);
    if (seen & PS_HELD_WAITING && atomic_load_explicit(&ps_header(region)->closers, memory_order_seq_cst))
        ps_sys_wake(ps_low_half(word), INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

/* Gives reservations back, from `first` on; who sleeps on the low half may find the word free. */
void ps_held_leave_line(struct ps_wait *wait, uint64_t first) {
    for (uint64_t index = first, end = wait->line_end; index < end; index++) {
        _Atomic uint64_t *word = ps_held_word(wait->region, index);
        uint64_t seen = atomic_load_explicit(word, memory_order_relaxed);
        while (ps_next_of(seen) == wait->mine &&
               !atomic_compare_exchange_weak_explicit(word, &seen, seen & PS_HELD_HOLDER, memory_order_relaxed,
                                                      memory_order_relaxed))
            ;
        if (ps_next_of(seen) == wait->mine)
            ps_sys_wake(ps_low_half(word), 1, FUTEX_BITSET_MATCH_ANY);
    }
    wait->line_end = wait->line_end < first ? wait->line_end : first;
}

/* -- Waiting for holders ----------------------------------------------------------------------------------------- */

/* The first word from `index` on, before `end`, that somebody holds.  seq_cst: after a closer that says PS_CLOSER_SHUT.
 */
uint64_t ps_held_next(struct ps_region *region, uint64_t index, uint64_t end) {
    uint64_t words = region->shape.offset[PS_SEC_LEASE];
    while (index < end && !ps_holder_of(load(region, index))) {
        index++;
        if (index % WORDS == 0 && index < end && end - index > WORDS)
            index = (ps_region_skip_hole(region, words + index * sizeof(uint64_t), words + end * sizeof(uint64_t)) -
                     words) /
                    sizeof(uint64_t);
    }
    return index;
}

/* Until whoever holds the word has given it back, or is gone. */
int ps_held_await(struct ps_wait *wait, uint64_t index) {
    _Atomic uint64_t *word = ps_held_word(wait->region, index);
    for (;;) {
        uint64_t seen = atomic_load_explicit(word, memory_order_seq_cst), flagged = seen | PS_HELD_WAITING;
        uint32_t holder = ps_holder_of(seen);
        if (holder && !ps_owner_known(wait->region, holder))
            return ps_corrupt(wait->region, "held word");
        if (!holder || ps_wait_gone(wait, holder))
            return 0;
        wait->blocker = holder;
        PS_POINT(K2_wait);
        if (seen != flagged &&
            !atomic_compare_exchange_strong_explicit(word, &seen, flagged, memory_order_seq_cst, memory_order_relaxed))
            continue;
        struct ps_watch low = {ps_low_half(word), (uint32_t)flagged};
        int rc = ps_owner_wait(wait->region, low, holder, wait->until.at);
        if (rc)
            return rc;
    }
}

/* -- What the threads of this process have ----------------------------------------------------------------------- */

/* A thread has a lease more, or (-1) less.  A call's are counted when they are its thread's. */
void ps_thread_counts(struct ps_region *region, int holder, int32_t change) {
    if ((uint32_t)holder >= PS_TIDS)
        return;
    struct ps_count *count = atomic_load_explicit(&region->counts, memory_order_acquire) + holder;
    if (holder != ps_process_tid())
        atomic_fetch_sub_explicit(&count->others, (uint32_t)change, memory_order_seq_cst);
    else /* release: before the slot's count is lowered; a plain store costs less than an exchange */
        atomic_store_explicit(&count->own, atomic_load_explicit(&count->own, memory_order_relaxed) + (uint32_t)change,
                              memory_order_release);
}

/* The calling thread has a lease; or the task for which a call is made, as it said when the call began, and the thread
 * of that task has still one.  One that is about to be taken is none: its words are ours before it is known whether it
 * can be had, so words do not tell. seq_cst: after ps_slot_counts.  As long as we find a lease here, whoever gives it
 * back has not uncounted it in the slot, and we have counted there already: so who waits for leases never finds 0 in
 * between. */
bool ps_thread_holds(const struct ps_region *region) {
    const struct ps_proxy *proxy = ps_process_proxy();
    struct ps_count *count = atomic_load_explicit(&region->counts, memory_order_acquire);
    if (!count || (proxy && !proxy->passes))
        return false;
    count += proxy ? proxy->tid : ps_process_tid();
    return atomic_load_explicit(&count->own, memory_order_seq_cst) !=
           atomic_load_explicit(&count->others, memory_order_seq_cst);
}

/* ... of these pages. */
bool ps_thread_holds_in(const struct ps_region *region, uint64_t first, uint64_t count) {
    if (!ps_thread_holds(region))
        return false;
    for (uint64_t page = first; page < first + count; page++)
        if (ps_here_own(region, page))
            return true;
    return false;
}

/* -- User locks -------------------------------------------------------------------------------------------------- */

int ps_user_lock_take(struct ps_region *region, uint32_t index, int64_t deadline, bool *abandoned,
                      struct ps_outcome *outcome) {
    struct ps_wait wait = ps_wait_begin(region, deadline);
    uint64_t here = region->shape.pages + index, held = (uint64_t)ps_process_holder() << 2 | PS_HERE_HELD;
    uint32_t dead;
    int rc = ps_held_take(&wait, here, true, &dead);
    if (rc) {
        ps_held_leave_line(&wait, here);
        return ps_waited(ps_wait_end(&wait, rc, here, 1, outcome));
    }
    atomic_store_explicit(&ps_user_lock(region, index)->since, ps_sys_coarse(), memory_order_relaxed);
    atomic_store_explicit(&region->here[here], held | (uint64_t)dead << PS_HERE_DEAD_SHIFT, memory_order_release);
    *abandoned = dead != 0;
    PS_POINT(H1_take);
    return ps_waited(0);
}

void ps_user_lock_give(struct ps_region *region, uint32_t index, bool untold) {
    if (!ps_process_known())
        return;
    uint64_t here = region->shape.pages + index;
    uint32_t dead = untold ? ps_here_dead(region, here) : 0;
    atomic_store_explicit(&region->here[here], 0, memory_order_release);
    ps_held_give(region, here, dead, 0);
}
