/* states.c - words and page states of snapshots.
 *
 * Lives here: a word per area (whose snapshot, in which state), a byte per page
 * and area; what a word says; the end of one.
 * Not here: saving pages (pages/save.c), taking one (operations/snapshot.c).
 * Runs in: caller, agent, signal handler.
 */
#define _GNU_SOURCE

#include "os/os.h"
#include "process/process.h"
#include "shared/shared.h"
#include "types.h"

#define WORD 8u    /* states in a 64-bit word */
#define HOLE 4096u /* states in a page of the memfd */

/* It is over, for want of a holder or of memory: whoever reads it finds out by the word. */
void ps_snapshot_end(struct ps_region *region, uint32_t index, uint32_t word) {
    atomic_compare_exchange_strong_explicit(&ps_snapshot_shared(region, index)->word, &word,
                                            (word & ~PS_SNAPSHOT_MASK) | PS_SNAPSHOT_FREE, memory_order_seq_cst,
                                            memory_order_relaxed);
}

/* Nobody holds it: 1; 0 also where that cannot be asked. */
bool ps_snapshot_has_no_holder(struct ps_region *region, uint32_t index) {
    int fd = ps_query_fd(region);
    return fd >= 0 && ps_sys_ofd_free(fd, PS_SNAPSHOT_BYTE + index) == 1 && ps_cached_leads(fd, &region->memory);
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
    for (uint64_t mask = ps_snapshots_live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = ps_snapshot_word(region, index);
        if (ps_snapshot_is_over(word))
            continue;
        cared->at[cared->count].index = index;
        cared->at[cared->count].open = ps_snapshot_is_preparing(word) ? ps_snapshot_dirty_state(word) : PS_SAVED;
        cared->at[cared->count++].states = ps_snapshot_states(region, index);
    }
}

static bool is_open(const struct cared *cared, uint64_t page) {
    for (uint32_t i = 0; i < cared->count; i++) {
        uint8_t state = ps_state_at(cared->at[i].states, page);
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
uint64_t ps_snapshot_next_touched(struct ps_region *region, uint32_t index, uint64_t page, uint64_t pages) {
    const _Atomic uint8_t *states = ps_snapshot_states(region, index);
    uint64_t offset = ps_snapshot_states_offset(region, index);
    while (page < pages) {
        if (page % HOLE == 0 && pages - page > HOLE)
            page = ps_region_skip_hole(region, offset + page, offset + pages) - offset;
        if (page % WORD == 0 && pages - page >= WORD && page < pages &&
            !atomic_load_explicit((const _Atomic uint64_t *)(const void *)(states + page), memory_order_acquire))
            page += WORD;
        else if (page < pages && ps_state_at(states, page))
            return page;
        else
            page++;
    }
    return pages;
}

/* -- Taking one ------------------------------------------------------------------------------------------------ */

/* All that have not had their moment, whose page tables some participant could not protect.  With the writer lock. */
void ps_snapshot_forsake(struct ps_region *region) {
    for (uint64_t mask = ps_snapshots_live(region); mask; mask &= mask - 1) {
        uint32_t index = (uint32_t)__builtin_ctzll(mask), word = ps_snapshot_word(region, index);
        if (ps_snapshot_is_preparing(word) ||
            !atomic_load_explicit(&ps_snapshot_shared(region, index)->generation, memory_order_relaxed))
            ps_snapshot_end(region, index, word);
    }
}
