/* shared.h - the door of shared/: reading and writing what all participants share.
 *
 * Lives here: the map, the ring of changes, states of snapshots, slots, the
 * writer lock, kept violations.  Whoever reads one of these words finds here what
 * it may find, and with which memory order.
 * Not here: what is decided by them (change/, hold/, operations/).
 */
#ifndef PS_SHARED_H
#define PS_SHARED_H

#include <stdatomic.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"
#include "segment/layout.h"
#include "segment/segment.h"
#include "types.h"

/* Until when a call waits.  A signal that comes while its thread does not sleep is not seen in the core, so no call
 * waits for longer than PS_PATIENCE: then it returns PS_ESIGNAL, signals are served, and it is made again. */
#define PS_PATIENCE (1000 * PS_MS)
struct ps_until {
    int64_t at; /* CLOCK_MONOTONIC, ns; PS_TRY: no wait */
    bool early; /* it is not the caller's deadline: */
};

struct ps_entry_header {
    uint64_t magic, device, inode, nonce[2];
    uint32_t slots, pad[5];
};

struct ps_entry_row {
    uint32_t pid, tid, fd, epoch; /* fd: a number in the table of thread tid */
    uint64_t start, pidns;
    uint64_t pad[4];
};

static_assert(sizeof(struct ps_entry_header) == 64 && sizeof(struct ps_entry_row) == 64, "one line each");

/* history.c */
bool ps_change_read(const struct ps_region *region, uint64_t generation, struct ps_shm_ring *entry);
struct ps_author ps_change_author(const struct ps_region *region, uint64_t page);
bool ps_change_open(const struct ps_region *region);
bool ps_change_undecided(const struct ps_region *region);
void ps_ring_write(struct ps_region *region, uint64_t generation, enum ps_kind kind);
void ps_ring_close(struct ps_region *region, uint64_t generation, uint32_t slowest);
struct ps_author ps_change_look(struct ps_region *region, uint64_t page, uint32_t *prot);

/* lock.c */
struct ps_until ps_until(int64_t deadline);
void ps_until_at_most(struct ps_until *until, int64_t at);
int ps_lock(struct ps_region *region, int64_t deadline, uint32_t *blocker);
void ps_unlock(struct ps_region *region);
uint32_t ps_lock_owner(const struct ps_region *region); /* 0: nobody; acquire */
bool ps_lock_ours(const struct ps_region *region, uint32_t owner);
bool ps_lock_deserted(struct ps_region *region);
uint32_t ps_owner_word(const struct ps_region *region); /* ours */
uint32_t ps_owner_pid(const struct ps_region *region, uint32_t owner);
bool ps_owner_known(const struct ps_region *region, uint32_t owner);
bool ps_owner_gone(struct ps_region *region, uint32_t owner);
void ps_owner_pass_on(struct ps_region *region); /* what threads of ours had that were ended alone */
int ps_owner_wait(struct ps_region *region, struct ps_watch watch, uint32_t owner, int64_t deadline);
int ps_owner_nap(struct ps_region *region, struct ps_watch watch, uint32_t owner, int64_t deadline);
void ps_waits_for(struct ps_region *region, uint32_t owner);
void ps_waits_no_more(struct ps_region *region);
int ps_waited(int rc);

/* map.c */
void ps_map_copy(struct ps_region *region, enum ps_section_kind to, enum ps_section_kind from, uint64_t first,
                 uint64_t count);
void ps_map_set(struct ps_region *region, enum ps_kind kind, uint64_t first, uint64_t count, uint32_t prot);

/* slot.c */
int ps_slot_claim(struct ps_region *region, int own);
bool ps_slot_live(struct ps_region *region);
void ps_slot_leave(struct ps_region *region);
bool ps_slot_marked(const struct ps_region *region);
bool ps_slot_dead(struct ps_region *region, uint32_t slot, uint32_t status);
void ps_slot_bury(struct ps_region *region, uint32_t slot, uint32_t status);
uint32_t ps_slots_used(const struct ps_region *region);

/* states.c */
void ps_snapshot_forsake(struct ps_region *region);
uint64_t ps_snapshot_run(const struct ps_region *region, uint64_t page, uint64_t end, bool *open);
void ps_snapshot_end(struct ps_region *region, uint32_t index, uint32_t word);
bool ps_snapshot_has_no_holder(struct ps_region *region, uint32_t index);
uint64_t ps_snapshot_next_touched(struct ps_region *region, uint32_t index, uint64_t page, uint64_t pages);

/* violations.c */
void ps_violation_keep(struct ps_region *region, uint64_t offset, const struct ps_refusal *refusal,
                       enum ps_policy outcome);

static inline struct ps_shm_ring *ps_ring(const struct ps_region *region, uint64_t generation) {
    return (struct ps_shm_ring *)ps_section(region, PS_SEC_RING) + generation % PS_RING;
}

/* What a participant's page tables follow: what is acknowledged, in all bits.  `applied` may be behind: a caller that
 * changed them from outside may have died before it stored that, and its successor too.  relaxed: the claim orders
 * both, or the acquire of ps_acknowledged. */
static inline uint64_t ps_applied_by(const struct ps_shm_slot *slot) {
    uint64_t applied = atomic_load_explicit(&slot->applied, memory_order_relaxed);
    uint32_t ahead = (atomic_load_explicit(&slot->ack, memory_order_relaxed) - (uint32_t)applied) & PS_ACK_MASK;
    return ahead < (PS_ACK_MASK + 1) / 2 ? applied + ahead : applied;
}

static inline uint64_t ps_applied(const struct ps_region *region) {
    return ps_applied_by(ps_slot(region, region->slot));
}

static inline uint32_t ps_status(uint32_t epoch, enum ps_state state) {
    return epoch << PS_STATE_BITS | (uint32_t)state;
}

/* `ack` was read from it, acquire.  Modulo 2^31: at or past, by less than half the circle; and in all bits too, since
 * who is silent for 2^30 changes comes round to there.  relaxed: who acknowledges by itself has stored `applied`
 * before. */
static inline bool ps_acknowledged(const struct ps_shm_slot *slot, uint32_t ack, uint64_t generation) {
    return ((ack - (uint32_t)generation) & PS_ACK_MASK) < (PS_ACK_MASK + 1) / 2 && ps_applied_by(slot) >= generation;
}

static inline uint32_t ps_owner_of(uint32_t slot, uint32_t status) {
    return (status >> PS_STATE_BITS & PS_EPOCH_MASK) << PS_OWNER_SLOT_BITS | (slot + 1);
}

static inline enum ps_state ps_state_of(uint32_t status) {
    return (enum ps_state)(status & PS_STATE_MASK);
}

static inline int ps_timed_out(struct ps_until until) {
    return until.early ? PS_ESIGNAL : PS_ETIMEOUT;
}

/* Written at `generation`, or before it.  relaxed: ordered by the held word, or the freeze. */
static inline void ps_stamp(const struct ps_region *region, uint64_t page, uint64_t generation) {
    _Atomic uint64_t *stamp = (_Atomic uint64_t *)ps_section(region, PS_SEC_STAMP) + page;
    if (atomic_load_explicit(stamp, memory_order_relaxed) != generation)
        atomic_store_explicit(stamp, generation, memory_order_relaxed);
}

/* Is there one that stores must care for?  seq_cst: after whatever the caller has stored. */
static inline bool ps_snapshots(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->snapshots, memory_order_seq_cst);
}

static inline off_t ps_row_offset(uint32_t slot) {
    return (off_t)(sizeof(struct ps_entry_header) + slot * sizeof(struct ps_entry_row));
}

static inline struct ps_shm_snapshot *ps_snapshot_shared(const struct ps_region *region, uint32_t index) {
    return &ps_header(region)->snapshot[index];
}

static inline uint64_t ps_snapshot_states_offset(const struct ps_region *region, uint32_t index) {
    return region->shape.offset[PS_SEC_STATE] + index * ps_state_stride(region->shape.pages);
}

static inline _Atomic uint8_t *ps_snapshot_states(const struct ps_region *region, uint32_t index) {
    return (_Atomic uint8_t *)ps_header(region) + ps_snapshot_states_offset(region, index);
}

static inline uint64_t ps_snapshot_area_offset(const struct ps_region *region, uint32_t index) {
    return region->shape.control_size + (1 + (uint64_t)index) * region->shape.pages * PS_PAGE;
}

static inline uint32_t ps_snapshot_word(const struct ps_region *region, uint32_t index) {
    return atomic_load_explicit(&ps_snapshot_shared(region, index)->word, memory_order_seq_cst);
}

static inline uint32_t ps_snapshot_state(uint32_t word) {
    return word & PS_SNAPSHOT_MASK;
}

static inline bool ps_snapshot_is_preparing(uint32_t word) {
    return ps_snapshot_state(word) == PS_SNAPSHOT_PREPARING || ps_snapshot_state(word) >= PS_SNAPSHOT_AGAIN;
}

static inline bool ps_snapshot_is_over(uint32_t word) {
    return !ps_snapshot_is_preparing(word) && ps_snapshot_state(word) != PS_SNAPSHOT_ACTIVE;
}

/* What a store makes of a page in this round of preparing. */
static inline uint8_t ps_snapshot_dirty_state(uint32_t word) {
    return ps_snapshot_state(word) == PS_SNAPSHOT_PREPARING
               ? PS_DIRTY
               : (uint8_t)(PS_DIRTY_AGAIN + ps_snapshot_state(word) - PS_SNAPSHOT_AGAIN);
}

/* Bits of snapshots that there are areas for. */
static inline uint64_t ps_snapshots_live(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->snapshots, memory_order_seq_cst) &
           ((UINT64_C(1) << region->shape.areas) - 1);
}

static inline uint8_t ps_state_at(const _Atomic uint8_t *states, uint64_t page) {
    return atomic_load_explicit(states + page, memory_order_acquire);
}

/* Holes, also where it was never used. */
static inline bool ps_snapshot_is_empty(uint32_t word) {
    return !word || ps_snapshot_state(word) == PS_SNAPSHOT_EMPTY;
}

#endif
