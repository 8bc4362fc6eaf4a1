/* pages.h - the door of pages/: the page tables of this process.
 *
 * Lives here: the claim on them, making them follow the map, saving pages for
 * snapshots before they are opened, private pages in the place of shared ones.
 * Not here: why the map changes (change/), who has leases (hold/).
 */
#ifndef PS_PAGES_H
#define PS_PAGES_H

#include <sys/mman.h>

#include "core.h"
#include "process/process.h"
#include "shared/shared.h"
#include "types.h"

/* A word of `here`: while it is held the thread's id (or a call's, waiter.c) << 2 | PS_HERE_IN_PLACE | PS_HERE_HELD,
 * and in the high half the dead owner's word that ours took the place of, or 0; after that the time of the end,
 * CLOCK_MONOTONIC_COARSE ms << 1; 0: unknown.
 */
#define PS_HERE_HELD 1u
#define PS_HERE_IN_PLACE 2u /* so that the page is writable at its public address */
#define PS_HERE_DEAD_SHIFT 32

/* claim.c */
int ps_claim_own(struct ps_region *region);
bool ps_claim_other(struct ps_region *region, uint32_t slot, uint32_t epoch);
void ps_claim_void(struct ps_region *region);
void ps_claim_release(struct ps_region *region, uint32_t slot);
int ps_page_lock(struct ps_region *region, int64_t deadline);
void ps_page_unlock(struct ps_region *region);
int ps_pages_take(struct ps_region *region, int64_t deadline);
void ps_pages_give(struct ps_region *region);
void ps_pages_pass(struct ps_region *region);

/* engine.c */
int ps_engine_apply(struct ps_region *region, uint64_t first, uint64_t count);
void ps_engine_fence(struct ps_region *region);
int ps_engine_lease(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline);
int ps_engine_open(struct ps_region *region);
int ps_engine_mend(struct ps_region *region, uint64_t page);
int ps_engine_try(struct ps_region *region);
void ps_engine_close(struct ps_region *region);
int ps_engine_forget(struct ps_region *region);
int ps_engine_sync(struct ps_region *region);
void ps_engine_refuse(struct ps_region *region, uint64_t page);

/* follow.c */
int ps_agent_follow(struct ps_region *region, uint64_t generation, int64_t deadline);
void ps_agent_settle(struct ps_region *region, int64_t deadline);
int ps_agent_help(struct ps_region *region, int rc, int64_t deadline);
void ps_agent_fence(struct ps_region *region);
void ps_agent_wake(struct ps_region *region);
int ps_follow_all(struct ps_region *region);

/* quarantine.c */
uint64_t ps_quarantine_wish(const struct ps_region *region, uint64_t page);
int ps_quarantine_begin(struct ps_region *region, uint64_t first, uint64_t count);
void ps_quarantine_forget(struct ps_region *region);

/* rights.c */
bool ps_rights_leased(const struct ps_region *region, uint64_t page, uint32_t prot, bool store);
bool ps_rights_permit(const struct ps_region *region, uint64_t page, bool store);
int ps_rights_refuse(struct ps_region *region, uint64_t page, bool store, struct ps_refusal *refusal);
int ps_rights_mend(struct ps_region *region, uint64_t page);
bool ps_rights_lag(const struct ps_region *region);

/* save.c */
int ps_snapshot_keep(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline, uint32_t *blocker);
int ps_snapshot_let(struct ps_region *region, uint64_t first, uint64_t count);
int ps_snapshot_open(struct ps_region *region, uint64_t page);
int ps_snapshot_map_shadow(struct ps_region *region);

/* A word of `here`, by page or pages + lock; does the calling thread, or who it is the proxy of, hold that? */
static inline uint64_t ps_here(const struct ps_region *region, uint64_t index) {
    return atomic_load_explicit(&region->here[index], memory_order_acquire);
}

static inline bool ps_here_own(const struct ps_region *region, uint64_t index) {
    uint32_t here = (uint32_t)ps_here(region, index);
    return here & PS_HERE_HELD && here >> 2 == (uint32_t)ps_process_holder();
}

/* The first page of the unit that holds this one. */
static inline uint64_t ps_unit_of(const struct ps_region *region, uint64_t page) {
    return page - page % region->shape.unit;
}

static inline bool ps_quarantine_overlaps(const struct ps_quarantine *run, uint64_t first, uint64_t end) {
    return run->first < end && first < run->first + run->count;
}

/* Each of these rights allows it. */
static inline uint32_t ps_rights_for(bool store) {
    return store ? PROT_WRITE : PROT_READ | PROT_WRITE; /* on x86-64 a writable page can be read */
}

static inline bool ps_rights_allow(uint32_t prot, bool store) {
    return prot & ps_rights_for(store);
}

/* Our page tables do not follow the map yet. */
static inline bool ps_rights_late(const struct ps_region *region) {
    return ps_applied(region) < ps_generation(region);
}

#endif
