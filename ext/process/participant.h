/* participant.h - the participant handle, and what the rooms of the core offer each other.
 *
 * Lives here: struct ps_region, which is private memory of this process, and
 * the prototypes that cross files.  What is read from shared memory through
 * it is untrusted; what is in it has been checked.
 * Invariants
 *  1. Handles lie in the static table of process.c and are never freed: a
 *     signal handler may look at one at any time.
 *  2. `page_lock` is held over changes of our own page tables only.
 *     `descriptor_lock` is held while the cached descriptors are looked at,
 *     fetched or forgotten: fork looks at them from any thread.  Lock order:
 *     the shared writer lock, page_lock, the own claim, descriptor_lock.
 *  3. Callers use shared memory only while `agent` is RUNNING.  Without a slot
 *     (`epoch` 0) nothing of it is mapped: the range is reserved, no-access.
 */
#ifndef PS_PARTICIPANT_H
#define PS_PARTICIPANT_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "core.h"
#include "sys.h"

#define PS_PAGE 4096u
#define PS_GUARD (64u * 1024u)  /* before the data, no-access: it begins with the canary */
#define PS_CANARY (2 * PS_PAGE) /* marked in the place of data, to see who marks what (borrow.c, engine.c) */
#define PS_CHUNK 512u           /* pages that the uffd engine arms together: those of one page table */
#define PS_BACKSTOP (2 * PS_MS) /* a wake can die with its receiver: look again */
#define PS_TIDS (1u << 22)      /* no thread has such an id, or a greater one (PID_MAX_LIMIT, linux/threads.h) */

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

/* A word of `here`: while it is held the thread's id (or a call's, waiter.c) << 2 | PS_HERE_IN_PLACE | PS_HERE_HELD,
 * and in the high half the dead owner's word that ours took the place of, or 0; after that the time of the end,
 * CLOCK_MONOTONIC_COARSE ms << 1; 0: unknown.
 */
#define PS_HERE_HELD 1u
#define PS_HERE_IN_PLACE 2u /* so that the page is writable at its public address */
#define PS_HERE_DEAD_SHIFT 32

/* What the header said at attach. */
struct ps_shape {
    uint64_t control_size, size, pages;
    uint32_t unit; /* pages (PS_PAGE) of a page of the memfd: 1, or of a huge one */
    uint32_t slots, initial, policy, areas, flags;
    uint64_t nonce[2], created;
    uint32_t creator;
    char name[PS_NAME_MAX + 8];
    uint64_t offset[PS_SECTIONS]; /* by enum ps_section_kind */
};

/* A descriptor in the program's table that leads to an inode: a cache, checked before each use, and fetched again
 * from the agent's table. */
struct ps_cached {
    enum ps_cached_kind {
        PS_MEMORY,    /* the memfd */
        PS_ENTRY,     /* the name's entry, which is held by flock(LOCK_SH) */
        PS_USERFAULT, /* our userfaultfd; used without a check where another file's could do no harm */
    } kind;
    _Atomic int fd; /* -1: none */
    uint64_t device, inode;
};

/* Another participant's userfaultfd, or what is known of it. */
struct ps_borrowed {
    uint32_t epoch;    /* of the slot that it belongs to; 0: nothing is known */
    _Atomic int fd;    /* -1: none; else in the program's table */
    uint64_t inode;    /* of fd */
    uintptr_t data;    /* where that process has the data */
    int64_t next_look; /* without one: not asked again before then */
};

enum ps_use { /* of a place in the table */
              PS_UNUSED = 0,
              PS_OPENING = 1, /* a thread is filling it */
              PS_OPEN = 2,
              PS_SHUT = 3,    /* closed; the address range stays reserved until ps_release */
              PS_CLOSING = 4, /* a thread is closing it */
};

enum ps_agent_state {
    PS_AGENT_NONE = 0, /* detached: no slot, no access; or a successor could not begin */
    PS_AGENT_STARTING = 1,
    PS_AGENT_RUNNING = 2,
    PS_AGENT_STOPPING = 3, /* asked to leave, or to give up joining */
};

#define PS_QUARANTINES 64u
struct ps_quarantine { /* pages that were replaced by private ones, after a forbidden access */
    uint64_t first, count;
    int tid; /* of the thread that did it */
};

/* How many leases a thread has: the difference, modulo 2^32. */
struct ps_count {
    _Atomic uint32_t
        own; /* W: the thread alone, seq_cst or release.  Those that it has taken, less those it gave back */
    _Atomic uint32_t
        others; /* W: the others, seq_cst.  Those of its leases that they gave back, less those handed over */
};

struct ps_region {
    _Atomic uint32_t use;   /* enum ps_use */
    _Atomic uintptr_t base; /* of the reservation: control, guard, data, guard, window, guard, shadow; 0: none */
    uint64_t span;          /* its bytes */
    struct ps_shape shape;
    _Atomic uint32_t descriptor_lock;          /* lock.c */
    struct ps_cached memory, entry, userfault; /* under descriptor_lock */

    _Atomic uint32_t agent;             /* enum ps_agent_state, and the futex on which its starter waits */
    bool threaded;                      /* under page_lock: `thread` has not been found ended */
    pthread_t thread;                   /* the agent's; under page_lock */
    int join_result;                    /* agent's, before it leaves STARTING */
    int64_t join_deadline;              /* starter's, before STARTING */
    bool succeeds;                      /* likewise: slot and mappings are an earlier agent's */
    uint32_t blocker;                   /* pid that a join waited for in vain */
    int tid;                            /* the agent's thread */
    int own, own_userfault, own_socket; /* numbers in its table; -1: none */
    _Atomic int own_entry;              /* the same; who wants it let go sleeps on it */
    _Atomic bool nameless;              /* the agent is to let go of the name's entry */
    bool shares; /* agent's: `own` is of the program's description, since none of our own could be had */
    struct ps_robust robust;

    enum ps_engine engine; /* as asked for */
    bool uffd;             /* our page tables follow by userfaultfd where chunks are armed: since the join */
    void *keeper;          /* a mapping that keeps our userfaultfd open, whatever becomes of descriptors; NULL: none */
    uint32_t slot, epoch;  /* epoch 0: no slot */
    uint32_t pid, cpus;    /* as of the join: this process, and how many CPUs it may use */

    _Atomic uint32_t page_lock;  /* lock.c */
    _Atomic bool failed, fenced; /* under page_lock; read without it as hints */
    _Atomic bool unsynced;       /* follow the whole map, whatever `applied` says; also from the signal handler */
    uint64_t ahead;              /* under page_lock: what this generation asks of our page tables is done */

    /* Private memory, a word per page and then one per user lock: who of us holds it (PS_HERE_*).  W: whoever owns
     * the shared word, release.  R: anybody, acquire. */
    _Atomic uint64_t *here;
    /* Private memory, made by the first lease: how many leases each thread of ours has, by its id (held.c).  NULL:
     * none was ever taken. */
    _Atomic(struct ps_count *) counts;
    uint8_t *chunk;          /* behind it, a byte per chunk: engine.c's, under page_lock; 0 at first */
    _Atomic uint64_t leased; /* in-place leased pages; 0: the words of pages need not be looked at */
    _Atomic uint32_t spins;  /* how many looks a wait that did not sleep has taken of late; relaxed, a guess */
    _Atomic uint32_t policy; /* enum ps_policy, relaxed: of this process; a forked child's too */

    _Atomic uint32_t quarantines; /* how many there are of them, the oldest first; both under page_lock */
    struct ps_quarantine quarantine[PS_QUARANTINES];
    uintptr_t source; /* under page_lock: of a no-access mapping of the data, from which its pages come back; 0: none */

    _Atomic bool window; /* under page_lock: the data is mapped a second time, for leases by window */
    _Atomic bool shadow; /* under page_lock: it is mapped once more, with the snapshots' areas, for saving pages */
    _Atomic uint64_t next_look; /* relaxed, a guess: when a call looks again for snapshots that nobody holds */

    /* Threads of ours that have a word, which names the participant only, and are inside a call; 0: none (lock.c).  W:
     * who gets the word, release, with no system call in between; 0 before it gives it up.  R: ps_owner_pass_on,
     * acquire. */
    _Atomic int writer;              /* the writer lock */
    _Atomic int closing[PS_CLOSERS]; /* a closer */
    _Atomic int freezing;            /* the freezer's word */

    _Atomic int frozen_by;               /* the thread of ours that has the region frozen; 0: none */
    struct ps_shm_closer *freeze_closer; /* of that freeze */

    /* A place per slot, written under the process's borrow lock, and never given back; NULL: none was ever wanted.  A
     * forked child keeps them: they lead to the same participants. */
    _Atomic(struct ps_borrowed *) borrowed;

    _Atomic(const char *) corrupt; /* the field that made PS_ECORRUPT */
};

/* region.c: the memfd and the address range */
#define PS_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)
void ps_region_lay_out(struct ps_shm_header *header);
uint64_t ps_region_file_length(const struct ps_shm_header *header);
int ps_region_validate(int fd, struct ps_shape *shape, const char **field);
int ps_region_place(struct ps_region *region);
int ps_region_reserve(struct ps_region *region);
int ps_region_map_control(struct ps_region *region, int own);
int ps_region_map_data(struct ps_region *region, int own);
int ps_region_unmap_data(struct ps_region *region);
int ps_region_map_window(struct ps_region *region);
int ps_region_map_private(struct ps_region *region, uint64_t page, uint64_t count, bool zero);
int ps_region_map_again(struct ps_region *region, uint64_t page, uint64_t count);
int ps_region_map_anew(struct ps_region *region, int own);
void ps_region_unmap_source(struct ps_region *region);
int ps_region_map_shadow(struct ps_region *region);
int ps_region_data(int fd, uint64_t begin, uint64_t pages, uint64_t *page, uint64_t *count);
uint64_t ps_region_skip_hole(struct ps_region *region, uint64_t at, uint64_t end);
uint64_t ps_region_skip_data(struct ps_region *region, uint64_t at, uint64_t end);
int ps_participant_start(void); /* the first time: forks and faults are ours to see to */
int ps_region_map_counts(struct ps_region *region);
void ps_region_shut(struct ps_region *region);
void ps_region_discard(struct ps_region *region);
int ps_region_map_canary(struct ps_region *region, int own);
int ps_cached_get(struct ps_region *region, struct ps_cached *cached);
int ps_cached_identify(struct ps_cached *cached, enum ps_cached_kind kind, int fd);
void ps_cached_forget(struct ps_region *region, struct ps_cached *cached);
bool ps_cached_leads(int fd, const struct ps_cached *cached);
int ps_query_fd(struct ps_region *region);
int ps_corrupt(struct ps_region *region, const char *field);

/* No-access, on both sides of each mapping of the data; whole units, so that those lie where huge pages may. */
static inline uint64_t ps_guard(const struct ps_shape *shape) {
    return shape->unit > PS_GUARD / PS_PAGE ? (uint64_t)shape->unit * PS_PAGE : PS_GUARD;
}
static inline uint64_t ps_data_offset(const struct ps_shape *shape) {
    return shape->control_size + ps_guard(shape);
}
static inline uint64_t ps_chunks(const struct ps_shape *shape) {
    return (shape->pages + PS_CHUNK - 1) / PS_CHUNK;
}
/* Of the second mapping of the data, from the first. */
static inline uint64_t ps_window_offset(const struct ps_shape *shape) {
    return shape->pages * PS_PAGE + ps_guard(shape);
}
/* The first page of the unit that holds this one. */
static inline uint64_t ps_unit_of(const struct ps_region *region, uint64_t page) {
    return page - page % region->shape.unit;
}
static inline struct ps_shm_header *ps_header(const struct ps_region *region) {
    return (struct ps_shm_header *)atomic_load_explicit(&region->base, memory_order_relaxed);
}
static inline void *ps_section(const struct ps_region *region, enum ps_section_kind kind) {
    return (char *)ps_header(region) + region->shape.offset[kind];
}
/* The third mapping of the data, and behind it the snapshots' areas. */
static inline char *ps_shadow(const struct ps_region *region) {
    return (char *)ps_header(region) + ps_data_offset(&region->shape) + 2 * ps_window_offset(&region->shape);
}
static inline struct ps_shm_slot *ps_slot(const struct ps_region *region, uint32_t slot) {
    return (struct ps_shm_slot *)ps_section(region, PS_SEC_SLOTS) + slot;
}
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
static inline uint32_t ps_use_of(const struct ps_region *region) {
    return atomic_load_explicit(&region->use, memory_order_acquire);
}
static inline bool ps_running(const struct ps_region *region) {
    return atomic_load_explicit(&region->agent, memory_order_acquire) == PS_AGENT_RUNNING;
}

/* slot.c: claim, live, leave; who is dead */
int ps_slot_claim(struct ps_region *region, int own);
bool ps_slot_live(struct ps_region *region);
void ps_slot_leave(struct ps_region *region);
bool ps_slot_marked(const struct ps_region *region);
bool ps_slot_dead(struct ps_region *region, uint32_t slot, uint32_t status);
void ps_slot_bury(struct ps_region *region, uint32_t slot, uint32_t status);
uint32_t ps_slots_used(const struct ps_region *region);

static inline uint32_t ps_status(uint32_t epoch, enum ps_state state) {
    return epoch << PS_STATE_BITS | (uint32_t)state;
}
/* Of the bitset with which its agent sleeps on the generation. */
static inline uint32_t ps_slot_bit(uint32_t slot) {
    return 1u << slot % 32;
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

/* Until when a call waits.  A signal that comes while its thread does not sleep is not seen in the core, so no call
 * waits for longer than PS_PATIENCE: then it returns PS_ESIGNAL, signals are served, and it is made again. */
#define PS_PATIENCE (1000 * PS_MS)
struct ps_until {
    int64_t at; /* CLOCK_MONOTONIC, ns; PS_TRY: no wait */
    bool early; /* it is not the caller's deadline: */
};
static inline int ps_timed_out(struct ps_until until) {
    return until.early ? PS_ESIGNAL : PS_ETIMEOUT;
}

/* lock.c: the writer lock, claims, private locks */
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
int ps_claim_own(struct ps_region *region);
bool ps_claim_other(struct ps_region *region, uint32_t slot, uint32_t epoch);
void ps_claim_void(struct ps_region *region);
void ps_claim_release(struct ps_region *region, uint32_t slot);
int ps_private_lock(_Atomic uint32_t *word, int64_t deadline);
void ps_private_unlock(_Atomic uint32_t *word);
int ps_page_lock(struct ps_region *region, int64_t deadline);
void ps_page_unlock(struct ps_region *region);
int ps_pages_take(struct ps_region *region, int64_t deadline);
void ps_pages_give(struct ps_region *region);
void ps_pages_pass(struct ps_region *region);

/* change.c: the record and the map */
bool ps_change_read(const struct ps_region *region, uint64_t generation, struct ps_shm_ring *entry);
bool ps_change_told_early(const struct ps_region *region, uint64_t generation); /* as long as the ring has it */
struct ps_author ps_change_author(const struct ps_region *region, uint64_t page);
bool ps_change_open(const struct ps_region *region);
bool ps_change_undecided(const struct ps_region *region);
bool ps_change_deserted(struct ps_region *region);
bool ps_change_under_way(const struct ps_region *region, uint64_t *generation, uint64_t *first, uint64_t *count);

int ps_change_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker);
bool ps_frozen(const struct ps_region *region);
int ps_change_freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
int ps_change_thaw(struct ps_region *region, int64_t deadline, uint32_t *blocker);

/* freeze.c: who has the region frozen */
bool ps_freeze_own(const struct ps_region *region); /* the calling thread */
int ps_freeze_wait(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
int ps_freeze_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker);
/* Ends the freeze of a dead freezer, if there is one, or waits for who does; true: look again.  Of a participant;
 * async-signal-safe. */
bool ps_freeze_notice(struct ps_region *region, int64_t patience);

/* With the writer lock, and no record open: a generation at which page tables follow the map again as `how` says. */
int ps_change_follow(struct ps_region *region, uint32_t how, int64_t deadline, struct ps_outcome *outcome);
/* With the writer lock: finishes the record of a dead caller. */
int ps_change_settle(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);

/* closer.c: what keeps leases from pages */
int ps_lease_drain(struct ps_region *region, enum ps_closer_kind kind, int64_t deadline, struct ps_outcome *outcome,
                   struct ps_shm_closer **closer);
int ps_lease_close(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline,
                   struct ps_outcome *outcome, struct ps_shm_closer **closer);
void ps_lease_open(struct ps_region *region, struct ps_shm_closer *closer);
void ps_closer_thread(struct ps_region *region, const struct ps_shm_closer *closer, int tid);
/* While a thread stores to pages as a lease does, but has none.  0; PS_ESIGNAL: again. */
int ps_lease_enter(struct ps_region *region);
void ps_lease_leave(struct ps_region *region);

/* lease.c */
/* What a proxy has taken is from now on the thread's for which it did. */
void ps_lease_hand_over(struct ps_region *region, struct ps_lease *lease, int tid);
void ps_user_lock_hand_over(struct ps_region *region, uint32_t index, int tid);
int ps_lease_window(struct ps_region *region, int64_t deadline); /* there is one */

/* snapshot.c: saving pages before they are stored to */
int ps_snapshot_keep(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline, uint32_t *blocker);
int ps_snapshot_let(struct ps_region *region, uint64_t first, uint64_t count);
void ps_snapshot_forsake(struct ps_region *region);
int ps_snapshot_open(struct ps_region *region, uint64_t page);
void ps_snapshot_notice(struct ps_region *region); /* of a participant, without any lock */
uint64_t ps_snapshot_run(const struct ps_region *region, uint64_t page, uint64_t end, bool *open);
int ps_snapshot_follow(struct ps_region *region, uint32_t how, uint64_t first, uint64_t count);

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

/* engine.c: page tables */
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

int ps_engine_restore(struct ps_region *region, uint64_t first, uint64_t count);

/* quarantine.c: private pages in the place of shared ones */
uint64_t ps_quarantine_wish(const struct ps_region *region, uint64_t page);
int ps_quarantine_begin(struct ps_region *region, uint64_t first, uint64_t count);
int ps_quarantine_end(struct ps_region *region, uint64_t *first, uint64_t *count);
void ps_quarantine_forget(struct ps_region *region);

/* borrow.c: the userfaultfds of other participants */
int ps_borrow(struct ps_region *region, uint32_t slot, uint32_t status, int *socket);
uintptr_t ps_borrow_data(const struct ps_region *region, uint32_t slot);
void ps_borrow_lost(struct ps_region *region, uint32_t slot);
void ps_borrow_collect(struct ps_region *region, int socket);
int ps_borrow_own(struct ps_region *region);
int ps_borrow_offer(struct ps_region *region, uint32_t *name);
void ps_borrow_answer(struct ps_region *region);
void ps_borrow_give_back(struct ps_region *region);

/* remote.c: following in the place of others */
#define PS_OUTSIDE_RUNS 16u /* system calls a participant; a change with more of them goes the other way */
struct ps_outside {         /* what a change does to page-table entries */
    uint32_t count;
    struct {
        uint64_t first, count;
        bool protect;
    } run[PS_OUTSIDE_RUNS];
};
bool ps_remote_plan(const struct ps_region *region, enum ps_kind kind, struct ps_outside *outside);
/* Bits (ps_slot_bit) of the participants that must follow by themselves: certainly; after those who could be reached
 * were. */
uint32_t ps_remote_out_of_reach(struct ps_region *region, bool any);
uint32_t ps_remote_change(struct ps_region *region, uint64_t generation, const struct ps_outside *outside, int *socket);

/* agent.c: following the map */
int ps_agent_start(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
void ps_agent_stop(struct ps_region *region);
bool ps_agent_lost(struct ps_region *region);
int ps_agent_follow(struct ps_region *region, uint64_t generation, int64_t deadline);
void ps_agent_settle(struct ps_region *region, int64_t deadline);
int ps_agent_help(struct ps_region *region, int rc, int64_t deadline);
void ps_agent_fence(struct ps_region *region);
void ps_agent_wake(struct ps_region *region);

/* names.c */
int ps_name_clear_row(const struct ps_region *region, uint32_t slot); /* there is memory for it; else -errno */
void ps_name_write_row(struct ps_region *region, bool present);
void ps_name_answer(struct ps_region *region);

/* fault.c: a copy that survives faults; the signal handlers */
#define PS_COPY_NO_PAGE (UINT64_C(1) << 63) /* SIGBUS: allowed, but the kernel has no page for it */
struct ps_copied {
    size_t left;     /* bytes not copied */
    uintptr_t where; /* the address that could not be reached, with PS_COPY_NO_PAGE; 0 if all were copied */
};
struct ps_copied ps_copy_bytes(void *to, const void *from, size_t length); /* between the two below, or in a handler */
/* The calling thread survives faults of the copy, whatever signals it has blocked, until it blocks them again. */
void ps_fault_unblock(bool expected, sigset_t *blocked); /* those of ours that it had blocked */
void ps_fault_block_again(const sigset_t *blocked);
void ps_fault_stack(void);

/* violations.c: what is kept of them; of a participant, async-signal-safe */
void ps_violation_keep(struct ps_region *region, uint64_t offset, const struct ps_refusal *refusal,
                       enum ps_policy outcome);

/* waiter.c: sleeping, wherever the core does; in a call of the waiter another call runs meanwhile */
int ps_sleep(struct ps_watch watch, int64_t deadline);
int ps_sleep_two(struct ps_watch first, struct ps_watch second, int64_t deadline);

/* In whose place the calling thread takes words, where it is not in its own. */
struct ps_proxy {
    int holder;                  /* who has them in `here`; 0: the thread */
    int tid;                     /* the thread whose they will be */
    bool passes;                 /* of that thread's leases one is its own, while the thread has any */
    struct ps_patience patience; /* of `holder` */
};

struct ps_waiter {
    _Atomic uint32_t lock;           /* lock.c: while it is started */
    _Atomic bool running;            /* W: under the lock, release.  R: acquire */
    pthread_t thread;                /* under the lock */
    _Atomic uint32_t kicks;          /* W: who has something for it, + 1, release.  R: it sleeps on it, acquire */
    _Atomic(struct ps_call *) inbox; /* W: by CAS, release; it takes all.  The latest first, by `next` */
};

/* process.c: this process's table and its other mutable state */
#define PS_CHAIN 8 /* handlers below ours that are remembered, for one signal */

/* Handlers found when ours was installed, oldest first.  Copy version % 2 is read, the other written. */
struct ps_chain {
    _Atomic uint32_t busy, version;
    struct sigaction tracer; /* faulthandler's handler, if we were told; written under `busy` */
    struct ps_handlers {
        uint32_t count;
        struct sigaction handler[PS_CHAIN];
    } copy[2];
};

/* A thread's latest fault, as it goes down the chain. */
struct ps_offer {
    uint64_t fault;   /* which: instruction, address and stack pointer, mixed */
    uintptr_t frame;  /* of on_fault, while a handler that it called runs; left over where that one jumped out */
    uint32_t level;   /* handlers that have not had it, of the chain ... */
    uint32_t version; /* ... as it was then: one that came on top meanwhile has not */
    bool returned;    /* one had it, and returned */
};

struct ps_faults { /* of a thread; only its own signal handler touches it, but for `unblocked` */
    struct ps_offer offer[2];
    bool unblocked;   /* when it asked last, it blocked none of the two signals */
    uintptr_t seen;   /* the latest address that the kernel told us */
    uint64_t retried; /* a fault and a generation, mixed: let run again ... */
    uint32_t retries; /* ... so often */
};

/* What fork does to each region of the process: called in the thread that forks. */
struct ps_at_fork {
    void (*before)(void);
    void (*child)(void);
};
int ps_process_start(const struct ps_at_fork *callbacks);
void ps_process_forget(struct ps_region *region);
void ps_process_set_handler(void (*handler)(int, siginfo_t *, void *)); /* of SIGSEGV and SIGBUS, which goes on top */
void (*ps_process_handler(void))(int, siginfo_t *, void *);
const struct ps_hooks *ps_process_hooks(void); /* NULL: none */
struct ps_region *
ps_process_next(struct ps_region *region); /* of those that were ever open; NULL: the first, the end */
int ps_process_tid(void);                  /* of the calling thread */
const char *ps_process_command(void);      /* PS_COMMAND bytes: its command line, of when it had its first region */
int ps_process_holder(void);               /* as whom it takes words */
int ps_process_told_too(void);             /* ps_tell_also's */
struct ps_proxy *ps_process_proxy(void);   /* NULL: it is itself */
void ps_process_set_proxy(struct ps_proxy *proxy);
struct ps_waiter *ps_process_waiter(void);
int ps_process_spawn(void *(*body)(void *), void *argument, pthread_t *thread); /* with all signals blocked */
bool ps_process_ended(
    pthread_t thread);           /* also where a seccomp filter did it; true once: then it is no thread any more */
uint64_t ps_process_pidns(void); /* as ps_sys_pid_namespace; also without /proc, where an ancestor had it */
void ps_process_become_agent(const struct ps_region *region);
bool ps_process_is_agent(const struct ps_region *region); /* the calling thread, with the table that it has */
_Atomic uint32_t *ps_process_borrow_lock(void);
void ps_process_took(int fd); /* whatever we thought to have under this number is something else by now */
bool ps_process_known(void);  /* false in a child made by a raw clone() */
struct ps_region *ps_process_claim(void);
struct ps_region *ps_process_find(uintptr_t address);
struct ps_chain *ps_process_chain(int signal);
struct ps_faults *ps_process_faults(void);

/* A word of `here`, by page or pages + lock; does the calling thread, or who it is the proxy of, hold that? */
static inline uint64_t ps_here(const struct ps_region *region, uint64_t index) {
    return atomic_load_explicit(&region->here[index], memory_order_acquire);
}
static inline bool ps_here_own(const struct ps_region *region, uint64_t index) {
    uint32_t here = (uint32_t)ps_here(region, index);
    return here & PS_HERE_HELD && here >> 2 == (uint32_t)ps_process_holder();
}

#endif
