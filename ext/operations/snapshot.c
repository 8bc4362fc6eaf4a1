/* snapshot.c - copy-on-write images of the data: taking one, and saving pages before they are stored to.
 *
 * A snapshot has an area behind the data in the memfd, and a state per page.
 * While it is PREPARING page tables are protected, and a store marks its page
 * DIRTY and goes on; at its moment leases have ended, and dirty pages are
 * protected once more; while it is ACTIVE whoever stores saves the page first.
 * Invariants
 *  1. Page tables let a store for all pass only where every PREPARING snapshot
 *     has the page DIRTY (or SAVED) and every ACTIVE one SAVED (ps_snapshot_run).
 *  2. A page is DIRTY before its maker looks at the word; the word is ACTIVE
 *     before the snapshotter looks for dirty pages: one sees the other.
 *  3. Nobody saves for, and so nobody stores after, a moment that has not come
 *     for all: its generation is 0 till then.
 *  4. What a page is until it is SAVED does not change.  So whoever has copied it
 *     and then finds it unsaved has the right bytes, may write them to the area at
 *     any time, and needs no lock: a stopped process keeps no other from storing.
 *  5. An area is used again only when nobody holds the snapshot's byte, and nobody
 *     who found its former word is still saving, or making pages DIRTY.
 *  6. Bits of header.snapshots change under the writer lock; words that end a
 *     snapshot need no lock: a bit without a live word does no harm.
 *   S1_prepare  PREPARING; page tables are to be protected
 *   S2_protect  they are
 *   S3_drain    no lease is held, and none can be taken
 *   S4_active   ACTIVE; dirty pages are to be protected once more
 *   S5_open     its moment is told; leases may be taken
 *   S6_save     a page lies in the area, and is not SAVED yet
 *   S7_complete everything does
 * Runs in: caller, agent, signal handler.  No malloc, no stdio.
 * Not here: what a holder does with a snapshot (image.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>

#include "hold.h"
#include "image.h"
#include "point.h"

#define PATIENCE (1000 * PS_MS) /* for the page lock, in the handler */
#define MOMENT (500 * PS_MS)    /* one waits so long for a moment; less than PS_PATIENCE, with which calls begin anew */
#define LOOK (100 * PS_MS)      /* between two looks of this process at what the killed left */
#define GLANCE (20 * PS_MS)     /* a call waits so long for the lock that it then needs */
#define WORD 8u                 /* states in a 64-bit word */
#define HOLE 4096u              /* states in a page of the memfd */
#define FEW 16u                 /* pages that are closed in the pause rather than in a round before it */

static struct ps_shm_snapshot *shared_of(const struct ps_region *region, uint32_t index) {
    return &ps_header(region)->snapshot[index];
}

static uint64_t states_offset(const struct ps_region *region, uint32_t index) {
    return region->shape.offset[PS_SEC_STATE] + index * ps_state_stride(region->shape.pages);
}

static _Atomic uint8_t *states_of(const struct ps_region *region, uint32_t index) {
    return (_Atomic uint8_t *)ps_header(region) + states_offset(region, index);
}

static uint64_t area_offset(const struct ps_region *region, uint32_t index) {
    return region->shape.control_size + (1 + (uint64_t)index) * region->shape.pages * PS_PAGE;
}

static uint32_t word_of(const struct ps_region *region, uint32_t index) {
    return atomic_load_explicit(&shared_of(region, index)->word, memory_order_seq_cst);
}

static uint32_t state_of(uint32_t word) {
    return word & PS_SNAPSHOT_MASK;
}

static bool is_preparing(uint32_t word) {
    return state_of(word) == PS_SNAPSHOT_PREPARING || state_of(word) >= PS_SNAPSHOT_AGAIN;
}

static bool is_over(uint32_t word) {
    return !is_preparing(word) && state_of(word) != PS_SNAPSHOT_ACTIVE;
}

/* What a store makes of a page in this round of preparing. */
static uint8_t dirty_of(uint32_t word) {
    return state_of(word) == PS_SNAPSHOT_PREPARING ? PS_DIRTY
                                                   : (uint8_t)(PS_DIRTY_AGAIN + state_of(word) - PS_SNAPSHOT_AGAIN);
}

/* Bits of snapshots that there are areas for. */
static uint64_t live(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->snapshots, memory_order_seq_cst) &
           ((UINT64_C(1) << region->shape.areas) - 1);
}

/* It is over, for want of a holder or of memory: whoever reads it finds out by the word. */
static void drop(struct ps_region *region, uint32_t index, uint32_t word) {
    atomic_compare_exchange_strong_explicit(&shared_of(region, index)->word, &word,
                                            (word & ~PS_SNAPSHOT_MASK) | PS_SNAPSHOT_FREE, memory_order_seq_cst,
                                            memory_order_relaxed);
}

/* Nobody holds it: 1; 0 also where that cannot be asked. */
static bool unwanted(struct ps_region *region, uint32_t index) {
    int fd = ps_query_fd(region);
    return fd >= 0 && ps_sys_ofd_free(fd, PS_SNAPSHOT_BYTE + index) == 1 && ps_cached_leads(fd, &region->memory);
}

/* -- The mapping that pages are copied through -------------------------------------------------------------------- */

/* Under the page lock. */
static int map_shadow(struct ps_region *region) {
    int rc = region->shadow ? 0 : ps_region_map_shadow(region);
    atomic_store_explicit(&region->shadow, !rc, memory_order_release);
    return rc;
}

/* Where a beginning has not made it: for leases it is made by the first that needs it. */
static int need_shadow(struct ps_region *region) {
    if (atomic_load_explicit(&region->shadow, memory_order_acquire))
        return 0;
    int rc = ps_page_lock(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    rc = map_shadow(region);
    ps_page_unlock(region);
    return rc;
}

/* -- What page tables may be ----------------------------------------------------------------------------------- */

struct cared { /* snapshots that stores must care for, as one look found them */
    uint32_t count;
    struct {
        uint32_t index;
        uint8_t open; /* a page of this state, as one that is SAVED, may be stored to */
        const _Atomic uint8_t *states;
    } at[PS_SNAPSHOTS];
};

/* The words before the states (invariant 2). */
static void look(const struct ps_region *region, struct cared *cared) {
    cared->count = 0;
    for (uint64_t mask = live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = word_of(region, index);
        if (is_over(word))
            continue;
        cared->at[cared->count].index = index;
        cared->at[cared->count].open = is_preparing(word) ? dirty_of(word) : PS_SAVED;
        cared->at[cared->count++].states = states_of(region, index);
    }
}

static uint8_t state_at(const _Atomic uint8_t *states, uint64_t page) {
    return atomic_load_explicit(states + page, memory_order_acquire);
}

static bool is_open(const struct cared *cared, uint64_t page) {
    for (uint32_t i = 0; i < cared->count; i++) {
        uint8_t state = state_at(cared->at[i].states, page);
        if (state != PS_SAVED && state != cared->at[i].open)
            return false;
    }
    return true;
}

/* The same for all pages of the word that begins at `page`? */
static bool word_is_open(const struct cared *cared, uint64_t page, bool open) {
    for (uint64_t at = page; at < page + WORD; at++)
        if (is_open(cared, at) != open)
            return false;
    return true;
}

static bool word_is(const struct cared *cared, uint64_t page, uint64_t value) {
    for (uint32_t i = 0; i < cared->count; i++)
        if (atomic_load_explicit((const _Atomic uint64_t *)(const void *)(cared->at[i].states + page),
                                 memory_order_acquire) != value)
            return false;
    return true;
}

/* How many pages from `page` on, before `end`, may be written by all, or may not. */
uint64_t ps_snapshot_run(const struct ps_region *region, uint64_t page, uint64_t end, bool *open) {
    struct cared cared;
    look(region, &cared);
    *open = is_open(&cared, page);
    if (!cared.count)
        return end - page;
    uint64_t at = page + 1, same = *open ? PS_SAVED * UINT64_C(0x0101010101010101) : 0;
    while (at < end) {
        if (at % WORD == 0 && end - at >= WORD && (word_is(&cared, at, same) || word_is_open(&cared, at, *open)))
            at += WORD;
        else if (is_open(&cared, at) == *open)
            at++;
        else
            break;
    }
    return at - page;
}

/* The first page from `page` on that is not unsaved. */
static uint64_t next_touched(struct ps_region *region, uint32_t index, uint64_t page, uint64_t pages) {
    const _Atomic uint8_t *states = states_of(region, index);
    uint64_t offset = states_offset(region, index);
    while (page < pages) {
        if (page % HOLE == 0 && pages - page > HOLE)
            page = ps_region_skip_hole(region, offset + page, offset + pages) - offset;
        if (page % WORD == 0 && pages - page >= WORD && page < pages &&
            !atomic_load_explicit((const _Atomic uint64_t *)(const void *)(states + page), memory_order_acquire))
            page += WORD;
        else if (page < pages && state_at(states, page))
            return page;
        else
            page++;
    }
    return pages;
}

/* Pages that were opened in one round of preparing. */
static int follow_dirty(struct ps_region *region, uint32_t index, uint8_t state, uint64_t first, uint64_t end) {
    const _Atomic uint8_t *states = states_of(region, index);
    int rc = 0;
    for (uint64_t page = first; !rc && (page = next_touched(region, index, page, end)) < end;) {
        uint64_t run = 0;
        while (page + run < end && state_at(states, page + run) == state)
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
int ps_snapshot_follow(struct ps_region *region, uint32_t how, uint64_t first, uint64_t count) {
    if (how == PS_FOLLOW_NOTHING)
        return 0;
    if (how == PS_FOLLOW_OPEN) { /* less than all is no fault: who stores there mends it */
        follow_writable(region, first, count);
        return 0;
    }
    if (how == PS_FOLLOW_ALL) { /* who cannot have the mapping says so now: a store could only die of it later */
        int rc = map_shadow(region);
        return rc ? rc : follow_writable(region, first, count);
    }
    int rc = 0;
    for (uint64_t mask = live(region); mask && !rc; mask &= mask - 1)
        rc = follow_dirty(region, (uint32_t)__builtin_ctzll(mask), (uint8_t)(how >> PS_FOLLOW_SHIFT), first,
                          first + count);
    return rc;
}

/* -- Saving ---------------------------------------------------------------------------------------------------- */

/* -ENOMEM: there is no page for the copy. */
static int save_page(struct ps_region *region, uint32_t index, uint64_t page) {
    _Atomic uint8_t *state = states_of(region, index) + page;
    const char *data = ps_shadow(region) + page * PS_PAGE;
    char *area = ps_shadow(region) + (1 + (uint64_t)index) * region->shape.pages * PS_PAGE;
    char bytes[PS_PAGE];
    if (ps_copy_bytes(bytes, data, PS_PAGE).left)
        return -ENOMEM;
    atomic_thread_fence(memory_order_acquire); /* the copy before the look (invariant 4) */
    if (atomic_load_explicit(state, memory_order_acquire) == PS_SAVED)
        return 0;
    if (!ps_all_zero(bytes, PS_PAGE) && ps_copy_bytes(area + page * PS_PAGE, bytes, PS_PAGE).left)
        return -ENOMEM;
    PS_POINT(S6_save);
    /* release: who finds it SAVED finds the copy. */
    atomic_store_explicit(state, PS_SAVED, memory_order_release);
    return 0;
}

static bool all_saved(const struct ps_region *region, uint32_t index, uint64_t first, uint64_t count) {
    const _Atomic uint8_t *states = states_of(region, index);
    for (uint64_t page = first; page < first + count; page++)
        if (state_at(states, page) != PS_SAVED)
            return false;
    return true;
}

/* The snapshotter has the writer lock from before the word is ACTIVE until its generation is told: where nobody has the
 * lock, we have it, or one who is gone, that will not happen any more. */
static bool brings_moment(struct ps_region *region, uint32_t owner) {
    return owner && !ps_lock_ours(region, owner) && !ps_owner_gone(region, owner);
}

/* Unless its moment has come meanwhile, it will not: the snapshotter finds that out by the same word.  Where the area
 * has become another snapshot's meanwhile that one is taken once more. */
static void give_up(struct ps_region *region, uint32_t index, uint32_t word) {
    uint64_t none = 0;
    if (atomic_compare_exchange_strong_explicit(&shared_of(region, index)->generation, &none, PS_NO_MOMENT,
                                                memory_order_seq_cst, memory_order_relaxed) ||
        none == PS_NO_MOMENT)
        drop(region, index, word);
}

/* Until the snapshot's moment has come for all, or it is given up, as it is by those whom it keeps from storing for
 * long: its maker may be stopped.  -ETIMEDOUT, PS_ESIGNAL: the caller's deadline, a signal. */
static int await_moment(struct ps_region *region, uint32_t index, uint32_t word, int64_t deadline, uint32_t *blocker) {
    struct ps_shm_snapshot *shared = shared_of(region, index);
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&shared->generation;
    int64_t end = ps_sys_now() + MOMENT;
    while (word_of(region, index) == word) {
        uint32_t owner = ps_lock_owner(region);
        uint64_t generation = atomic_load_explicit(&shared->generation, memory_order_acquire);
        if (generation && generation != PS_NO_MOMENT)
            return 0;
        if (owner && !ps_owner_known(region, owner))
            return ps_corrupt(region, "lock");
        if (generation || !brings_moment(region, owner) || unwanted(region, index) || ps_sys_now() >= end) {
            give_up(region, index, word);
            continue;
        }
        *blocker = owner;
        int rc = ps_owner_wait(region, (struct ps_watch){low, 0}, owner, deadline < end ? deadline : end);
        if (deadline != PS_NEVER && (rc == PS_ESIGNAL || (rc && ps_sys_now() >= deadline)))
            return rc;
    }
    return 0;
}

/* Holes from `hole` on, and the page behind them, before `end`.  Everything under `saving`: the area is this snapshot's
 * as long as that is counted (invariant 5).  No system call is made there: a thread may be ended alone in one, and
 * would be counted as long as its process lives. */
static int save_counted(struct ps_region *region, uint32_t index, uint32_t word, uint64_t hole, uint64_t page,
                        uint64_t end) {
    _Atomic uint32_t *saving = &ps_slot(region, region->slot)->saving;
    _Atomic uint8_t *states = states_of(region, index);
    int rc = 0;
    atomic_fetch_add_explicit(saving, 1, memory_order_seq_cst);
    if (word_of(region, index) == word) {
        for (; hole < page; hole++)
            atomic_store_explicit(states + hole, PS_SAVED, memory_order_release);
        if (page < end && state_at(states, page) != PS_SAVED)
            rc = save_page(region, index, page);
    }
    atomic_fetch_sub_explicit(saving, 1, memory_order_release);
    return rc;
}

/* Holes of the memfd are holes of the image: after its moment, what is a hole and not SAVED was zero at that. */
static int save_pages(struct ps_region *region, uint32_t index, uint32_t word, uint64_t first, uint64_t count) {
    const _Atomic uint8_t *states = states_of(region, index);
    uint64_t data = region->shape.control_size, end = first + count;
    int rc = 0;
    for (uint64_t page = first; page < end && !rc && word_of(region, index) == word; page++) {
        uint64_t hole = page;
        if (state_at(states, page) == PS_SAVED)
            continue;
        if (count > 1)
            page = (ps_region_skip_hole(region, data + page * PS_PAGE, data + end * PS_PAGE) - data) / PS_PAGE;
        rc = save_counted(region, index, word, hole, page, end);
    }
    return rc;
}

static int keep(struct ps_region *region, uint32_t index, uint32_t word, uint64_t first, uint64_t count) {
    sigset_t blocked;
    ps_fault_unblock(false, &blocked); /* there may be no memory for a page */
    int rc = save_pages(region, index, word, first, count);
    ps_fault_block_again(&blocked);
    if (rc == -ENOMEM) { /* rather the snapshot than the one who stores */
        drop(region, index, word);
        rc = 0;
    }
    return rc;
}

/* Every ACTIVE snapshot has these pages, and whoever looks at them may store.  The deadline is that of the wait for
 * moments; PS_NEVER, as in the handler: it is not long, and no signal ends it.  After -ETIMEDOUT *blocker is who was
 * waited for. */
int ps_snapshot_keep(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline, uint32_t *blocker) {
    int rc = 0;
    *blocker = ps_owner_word(region);
    for (uint64_t mask = live(region); mask && !rc; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = word_of(region, index);
        if (state_of(word) != PS_SNAPSHOT_ACTIVE || all_saved(region, index, first, count))
            continue;
        rc = await_moment(region, index, word, deadline, blocker);
        if (unwanted(region, index))
            drop(region, index, word);
        if (!rc)
            rc = need_shadow(region);
        if (!rc)
            rc = keep(region, index, word, first, count);
    }
    return rc;
}

/* ... and every PREPARING one knows.  Under `saving` too: a page that is made DIRTY for a former word would be open in
 * the snapshot that has the area now, which has not counted it. */
static void dirty(struct ps_region *region, uint32_t index, uint32_t word, uint64_t first, uint64_t count) {
    _Atomic uint32_t *saving = &ps_slot(region, region->slot)->saving;
    _Atomic uint8_t *states = states_of(region, index);
    uint8_t state = dirty_of(word);
    atomic_fetch_add_explicit(saving, 1, memory_order_seq_cst);
    for (uint64_t page = first; page < first + count && word_of(region, index) == word; page++) {
        uint8_t seen = atomic_load_explicit(states + page, memory_order_relaxed);
        if (seen == state || seen == PS_SAVED)
            continue;
        atomic_fetch_add_explicit(&shared_of(region, index)->dirty, 1, memory_order_seq_cst);
        atomic_compare_exchange_strong_explicit(states + page, &seen, state, memory_order_seq_cst,
                                                memory_order_relaxed);
    }
    atomic_fetch_sub_explicit(saving, 1, memory_order_release);
}

/* Stores to these pages may pass, as far as snapshots are concerned. */
int ps_snapshot_let(struct ps_region *region, uint64_t first, uint64_t count) {
    for (uint64_t mask = live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = word_of(region, index);
        if (is_preparing(word))
            dirty(region, index, word, first, count);
    }
    uint32_t nobody;
    return ps_snapshot_keep(region, first, count, PS_NEVER, &nobody);
}

static int open_pages(struct ps_region *region, uint64_t first, uint64_t count) {
    int rc = ps_snapshot_let(region, first, count);
    if (!rc)
        rc = ps_pages_take(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    rc = region->fenced ? -EACCES : ps_engine_apply(region, first, count);
    ps_pages_give(region);
    return rc;
}

/* A store by its own page tables, which the map allows.  Where there may be no more mappings, the pages around it are
 * opened with it: they end in fewer. */
int ps_snapshot_open(struct ps_region *region, uint64_t page) {
    int rc = -ENOMEM;
    for (uint64_t size = 1, first = page; rc == -ENOMEM && first + size <= 2 * region->shape.pages; size *= 2) {
        first = page / size * size;
        uint64_t rest = region->shape.pages - first;
        rc = open_pages(region, first, size < rest ? size : rest);
    }
    return rc;
}

/* -- Taking one ------------------------------------------------------------------------------------------------ */

/* All that have not had their moment, whose page tables some participant could not protect.  With the writer lock. */
void ps_snapshot_forsake(struct ps_region *region) {
    for (uint64_t mask = live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = word_of(region, index);
        if (is_preparing(word) || !atomic_load_explicit(&shared_of(region, index)->generation, memory_order_relaxed))
            drop(region, index, word);
    }
}

/* With the writer lock: bits of those that are over go; true if there were any, and page tables may be opened. */
static bool sweep(struct ps_region *region) {
    uint64_t over = 0;
    for (uint64_t mask = live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = word_of(region, index);
        if (!is_over(word) && unwanted(region, index))
            drop(region, index, word);
        if (is_over(word_of(region, index)))
            over |= UINT64_C(1) << index;
    }
    atomic_fetch_and_explicit(&ps_header(region)->snapshots, ~over, memory_order_seq_cst);
    return over;
}

static int empty(const struct ps_region *region, int fd, uint32_t index) {
    int rc = ps_sys_punch(fd, area_offset(region, index), region->shape.pages * PS_PAGE);
    return rc ? rc : ps_sys_punch(fd, states_offset(region, index), ps_state_stride(region->shape.pages));
}

/* The owner word of somebody who may have found a former word of an area, and write to it still; 0: nobody. */
static uint32_t find_saver(struct ps_region *region) {
    for (uint32_t index = 0, used = ps_slots_used(region); index < used; index++) {
        struct ps_shm_slot *slot = ps_slot(region, index);
        uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
        if (ps_state_of(status) == PS_LIVE && atomic_load_explicit(&slot->saving, memory_order_seq_cst) &&
            !ps_slot_dead(region, index, status))
            return ps_owner_of(index, status);
    }
    return 0;
}

/* Holes, also where it was never used. */
static bool is_empty(uint32_t word) {
    return !word || state_of(word) == PS_SNAPSHOT_EMPTY;
}

/* Of those that nobody holds. */
static void give_memory_back(struct ps_region *region) {
    int fd = ps_query_fd(region);
    for (uint32_t index = 0; index < region->shape.areas && fd >= 0; index++) {
        uint32_t word = word_of(region, index), left = word & ~PS_SNAPSHOT_MASK; /* FREE */
        if (is_empty(word) || !unwanted(region, index))
            continue;
        drop(region, index, word);
        bool written = find_saver(region); /* before it is emptied: nobody begins to write any more */
        if (!empty(region, fd, index) && !written)
            atomic_compare_exchange_strong_explicit(&shared_of(region, index)->word, &left, left | PS_SNAPSHOT_EMPTY,
                                                    memory_order_seq_cst, memory_order_relaxed);
    }
}

static bool any_writable(struct ps_region *region) {
    for (uint64_t page = 0, run; page < region->shape.pages; page += run) {
        uint32_t prot;
        run = ps_run(region, page, region->shape.pages, &prot);
        if (prot & PROT_WRITE)
            return true;
    }
    return false;
}

static void sweep_locked(struct ps_region *region, int64_t deadline) {
    struct ps_outcome outcome;
    if (ps_change_settle(region, deadline, &outcome))
        return;
    if (sweep(region) && any_writable(region))
        ps_change_follow(region, PS_FOLLOW_OPEN, deadline, &outcome);
    give_memory_back(region);
}

static void sweep_until(struct ps_region *region, int64_t deadline) {
    uint32_t blocker;
    if (ps_lock(region, deadline, &blocker))
        return; /* the next one does it */
    sweep_locked(region, deadline);
    ps_unlock(region);
}

void ps_snapshot_sweep(struct ps_region *region) {
    sweep_until(region, ps_sys_now() + PATIENCE);
}

/* An area is in use, and nobody holds it: a hint, since nothing keeps it so. */
static bool is_left(struct ps_region *region) {
    for (uint32_t index = 0; index < region->shape.areas; index++)
        if (!is_empty(word_of(region, index)) && unwanted(region, index))
            return true;
    return false;
}

static bool any_in_use(const struct ps_region *region) {
    for (uint32_t index = 0; index < region->shape.areas; index++)
        if (!is_empty(atomic_load_explicit(&shared_of(region, index)->word, memory_order_relaxed))) /* another call's */
            return true;
    return false;
}

/* The last holder of a snapshot was killed, or ended, where nobody could give its memory back: one of our calls does,
 * soon. */
void ps_snapshot_notice(struct ps_region *region) {
    if (!any_in_use(region))
        return;
    uint64_t now = ps_sys_coarse();
    if (now < atomic_load_explicit(&region->next_look, memory_order_relaxed))
        return;
    atomic_store_explicit(&region->next_look, now + LOOK, memory_order_relaxed);
    if (is_left(region))
        sweep_until(region, ps_sys_now() + GLANCE);
}

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
            bool unused = !(word_of(region, index) & ~PS_SNAPSHOT_MASK);
            if (unused == used || !unwanted(region, index))
                continue;
            if (!is_empty(word_of(region, index))) {
                drop(region, index, word_of(region, index));
                uint32_t found = find_saver(region);
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
    struct ps_shm_snapshot *at = shared_of(taking->region, taking->snapshot->index);
    uint32_t word = atomic_load_explicit(&at->word, memory_order_relaxed);
    if ((word & ~PS_SNAPSHOT_MASK) != taking->snapshot->word || !is_preparing(word) ||
        !atomic_compare_exchange_strong_explicit(&at->word, &word, taking->snapshot->word | state, memory_order_seq_cst,
                                                 memory_order_relaxed))
        return -EAGAIN;
    if (state == PS_SNAPSHOT_ACTIVE)
        PS_POINT(S4_active);
    /* seq_cst, both: who opens a page in the former round counts before it looks at the word. */
    if (!atomic_exchange_explicit(&at->dirty, 0, memory_order_seq_cst))
        return 0;
    int rc = ps_change_follow(taking->region, PS_FOLLOW_DIRTY | (uint32_t)dirty_of(word) << PS_FOLLOW_SHIFT,
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
    sweep_locked(region, ps_sys_now() + PATIENCE);
    rc = find_area(region, snapshot, taking->outcome);
    if (!rc && !is_empty(word_of(region, snapshot->index)))
        rc = empty(region, snapshot->fd, snapshot->index);
    if (rc)
        return rc;
    struct ps_shm_snapshot *at = shared_of(region, snapshot->index);
    snapshot->word = (word_of(region, snapshot->index) & ~PS_SNAPSHOT_MASK) + (1u << PS_SNAPSHOT_BITS);
    if (!snapshot->word) /* 0 says: never used */
        snapshot->word = 1u << PS_SNAPSHOT_BITS;
    atomic_store_explicit(&at->generation, 0, memory_order_relaxed);
    atomic_store_explicit(&at->dirty, 0, memory_order_relaxed);
    atomic_store_explicit(&at->word, snapshot->word | PS_SNAPSHOT_PREPARING, memory_order_seq_cst);
    atomic_fetch_or_explicit(&ps_header(region)->snapshots, UINT64_C(1) << snapshot->index, memory_order_seq_cst);
    PS_POINT(S1_prepare);
    bool writable = any_writable(region);
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
    struct ps_shm_snapshot *at = shared_of(region, snapshot->index);
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
                drop(region, snapshot->index, word_of(region, snapshot->index));
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
