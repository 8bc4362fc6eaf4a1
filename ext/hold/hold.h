/* hold.h - the door of hold/: who holds what.
 *
 * Lives here: lock words, one at a time (held.c); what keeps leases from pages
 * (closer.c); leases (lease.c); areas of snapshots that nobody holds any more
 * (reclaim.c).
 * Not here: what changes while nobody holds a page (change/, operations/).
 */
#ifndef PS_HOLD_H
#define PS_HOLD_H

#include <stdatomic.h>

#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/layout.h"
#include "shared/shared.h"
#include "types.h"

/* How long somebody who is before us in line is waited for, by our clock, when nothing but that is in our way: it may
 * be stopped.  Short beside the least timeout of a program, long beside the time until somebody who is woken runs. */
#define PS_IN_LINE (200 * PS_MS)
/* One call that takes words, or waits until others have given them back. */
struct ps_wait {
    struct ps_region *region;
    struct ps_until until;
    uint32_t mine;     /* owner word */
    uint32_t blocker;  /* owner word of who has what we waited for in vain; 0: nobody has it */
    uint32_t absent;   /* owner word of who was before us in line, and did not come */
    uint64_t line_end; /* the words that it wants, before this one, may be reserved for this thread */
    /* Of a lease that had to give way to a closer: */
    int64_t turned_away;          /* when that happened first; 0: never */
    struct ps_shm_ticket *ticket; /* its place in line, or NULL; */
    uint32_t serial;              /* ... which is another's where it has another number */
};

/* closer.c */
int ps_lease_drain(struct ps_region *region, enum ps_closer_kind kind, int64_t deadline, struct ps_outcome *outcome,
                   struct ps_shm_closer **closer);
int ps_lease_close(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline,
                   struct ps_outcome *outcome, struct ps_shm_closer **closer);
void ps_lease_open(struct ps_region *region, struct ps_shm_closer *closer);
void ps_closer_thread(struct ps_region *region, const struct ps_shm_closer *closer, int tid);
/* While a thread stores to pages as a lease does, but has none.  0; PS_ESIGNAL: again. */
int ps_lease_enter(struct ps_region *region);
void ps_lease_leave(struct ps_region *region);
void ps_slot_counts(struct ps_region *region);
void ps_slot_uncounts(struct ps_region *region);
struct ps_shm_closer *ps_closer_over(const struct ps_wait *wait, uint64_t first, uint64_t count);
int ps_closer_await(struct ps_wait *wait, struct ps_shm_closer *closer, uint64_t first, uint64_t count);
void ps_ticket_give(struct ps_wait *wait);

/* held.c */
struct ps_wait ps_wait_begin(struct ps_region *region, int64_t deadline);
bool ps_wait_gone(const struct ps_wait *wait, uint32_t owner);
void ps_wait_blame(const struct ps_wait *wait, uint32_t owner, struct ps_outcome *outcome);
int ps_wait_end(const struct ps_wait *wait, int rc, uint64_t first, uint64_t count, struct ps_outcome *outcome);
int ps_held_take(struct ps_wait *wait, uint64_t index, bool waits, uint32_t *dead);
void ps_held_give(struct ps_region *region, uint64_t index, uint32_t dead, uint32_t next);
void ps_held_leave_line(struct ps_wait *wait, uint64_t first);
uint64_t ps_held_next(struct ps_region *region, uint64_t index, uint64_t end);
int ps_held_await(struct ps_wait *wait, uint64_t index);
void ps_thread_counts(struct ps_region *region, int holder, int32_t change);
bool ps_thread_holds(const struct ps_region *region);
bool ps_thread_holds_in(const struct ps_region *region, uint64_t first, uint64_t count);

/* lease.c */
/* What a proxy has taken is from now on the thread's for which it did. */
void ps_lease_hand_over(struct ps_region *region, struct ps_lease *lease, int tid);
void ps_user_lock_hand_over(struct ps_region *region, uint32_t index, int tid);
int ps_lease_window(struct ps_region *region, int64_t deadline); /* there is one */

/* reclaim.c */
void ps_snapshot_notice(struct ps_region *region); /* of a participant, without any lock */
int ps_snapshot_empty_area(const struct ps_region *region, int fd, uint32_t index);
uint32_t ps_snapshot_find_saver(struct ps_region *region);
bool ps_any_writable(struct ps_region *region);
void ps_snapshot_sweep_locked(struct ps_region *region, int64_t deadline);

static inline struct ps_shm_lock *ps_user_lock(const struct ps_region *region, uint64_t index) {
    return (struct ps_shm_lock *)ps_section(region, PS_SEC_LOCK) + index;
}

static inline _Atomic uint64_t *ps_held_word(const struct ps_region *region, uint64_t index) {
    uint64_t pages = region->shape.pages;
    return index < pages ? (_Atomic uint64_t *)ps_section(region, PS_SEC_LEASE) + index
                         : &ps_user_lock(region, index - pages)->held;
}

static inline uint32_t ps_holder_of(uint64_t held) {
    return (uint32_t)held & ~PS_OWNER_WAITING;
}

static inline uint32_t ps_next_of(uint64_t held) {
    return (uint32_t)(held >> PS_HELD_NEXT_SHIFT) & ~PS_OWNER_WAITING;
}

/* The dead holder whose place we took, by a word of `here` that is ours. */
static inline uint32_t ps_here_dead(const struct ps_region *region, uint64_t index) {
    return (uint32_t)(ps_here(region, index) >> PS_HERE_DEAD_SHIFT);
}

static inline _Atomic uint32_t *ps_low_half(_Atomic uint64_t *word) {
    return (_Atomic uint32_t *)(void *)word;
}

#endif
