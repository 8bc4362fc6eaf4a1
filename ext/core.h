/* core.h - the one interface that the binding uses.
 *
 * Lives here: what can be done with a region, by its opaque handle; each function is
 * defined on the floor that its section says, most of them in operations/.
 * Results are 0 or more, -errno, or one of PS_E*.  Deadlines are absolute
 * CLOCK_MONOTONIC nanoseconds, PS_NEVER for none.  Offsets and lengths are
 * bytes; whoever calls has checked them against ps_size.
 * Not here: struct ps_region (process/process.h), the structs that are handed over
 * (types.h), what lies in shared memory (segment/layout.h).
 */
#ifndef PS_CORE_H
#define PS_CORE_H

#include "segment/segment.h"
#include "types.h"

/* -- Making a region, joining and leaving it
 * --------------------------------------------------------------------------- */

/* `fd` stays the caller's; `name_fd` is the entry of _names.py or -1.
 * ps_create: nothing is allocated, nobody participates; of huge pages all are promised, or -ENOMEM.
 * ps_prefer: of what is allocated in the data from now on, by whomever; of huge pages ps_allocate's alone.
 * ps_allocate: so that nobody ever lacks the memory; a small piece from *at on, which is moved on.  1: there is more;
 * 0: that was all; -EINTR: a signal came, and the piece may be asked for again.
 * ps_attach: *region is ready to join, and has no access yet.
 * ps_join: it is a participant; PS_ESIGNAL: not yet, and the caller may go on with ps_join, or give up; after any other
 * error the handle is void.  ps_join_abandon: nothing is left of it, no slot, no thread, no mapping. */
int ps_create(const struct ps_creation *wanted, int *fd);
int ps_prefer(int fd, const struct ps_numa *numa);
int ps_allocate(int fd, const struct ps_numa *numa, uint64_t *at);
uint64_t ps_footprint(const struct ps_creation *wanted); /* bytes that ps_allocate allocates of it */
int ps_attach(int fd, int name_fd, enum ps_engine engine, struct ps_region **region, const char **field);
int ps_join(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome, const char **field);
void ps_join_abandon(struct ps_region *region);
int ps_close_begin(struct ps_region *region); /* 0: it is ours to close, or PS_ECLOSED */
void ps_close(struct ps_region *region);      /* ... access ends; the address range stays reserved */
void ps_release(struct ps_region *region);    /* ... until here; the handle is void */
/* Joins if this process lost its place (fork with a full table, lost agent); 0 when it is a participant; PS_ESIGNAL:
 * not yet, and the caller may go on with ps_ready. */
int ps_ready(struct ps_region *region, struct ps_outcome *outcome);
int ps_ready_now(const struct ps_region *region); /* 1; 0: it takes the former; PS_ECLOSED */
uint32_t ps_forks(void); /* how many forks lie between the first region's process and this one */
/* Of memory that is to be locked: some pages from *page on, which is moved on, are.  1: there is more; 0; -errno. */
int ps_bring_in(struct ps_region *region, uint64_t *page);

/* -- What it is
 * -------------------------------------------------------------------------------------------------------- */

void *ps_address(const struct ps_region *region);
uint64_t ps_size(const struct ps_region *region);
uint32_t ps_areas(const struct ps_region *region);     /* how many snapshots may be alive */
uint64_t ps_page_size(const struct ps_region *region); /* of which ranges are whole multiples */
uint64_t ps_generation(const struct ps_region *region);
uint64_t ps_generation_told(struct ps_region *region); /* ... to who may ask what was written since; ps_dirty */
const char *ps_name(const struct ps_region *region);
enum ps_engine ps_engine(const struct ps_region *region); /* in use: PS_ENGINE_MPROTECT or PS_ENGINE_UFFD */
int ps_fd(struct ps_region *region); /* a descriptor in the program's table, fetched again if it was lost */
const char *ps_corrupt_field(const struct ps_region *region);
/* Bytes of address space that each participant takes for the region, and the most that one may have. */
int ps_room(int fd, uint64_t *needed, uint64_t *most);

/* -- Protection
 * -------------------------------------------------------------------------------------------------------- */

int ps_change(struct ps_region *region, uint64_t offset, uint64_t length, uint32_t prot, int64_t deadline,
              struct ps_outcome *outcome);
int ps_await(struct ps_region *region, uint64_t generation, int64_t deadline, struct ps_outcome *outcome);
uint32_t ps_protection(const struct ps_region *region, uint64_t page);
/* How many pages from `page` on, before `end`, have the protection that it has. */
uint64_t ps_run(struct ps_region *region, uint64_t page, uint64_t end, uint32_t *prot);
int ps_participant(struct ps_region *region, uint32_t slot, struct ps_participant *participant); /* 0: none there */
/* Everything is READ for everybody; PS_ESIGNAL with a generation: so too, the freeze is held, and ps_await goes on. */
int ps_freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
int ps_thaw(struct ps_region *region); /* PS_ESIGNAL: not yet, it is held still */

/* -- Data, by accessors that cannot crash
 * ------------------------------------------------------------------------------ */

int ps_read(struct ps_region *region, uint64_t offset, void *to, uint64_t length, struct ps_refusal *refusal);
int ps_data(struct ps_region *region, uint64_t *page, uint64_t *count); /* the next run of pages that are no holes */
int ps_write(struct ps_region *region, uint64_t offset, const void *from, uint64_t length, struct ps_refusal *refusal);
/* For a system call that is to store into pages, which are the calling thread's by a lease meanwhile.
 * ps_own_lease: it has one over all of them: 1; over none: 0; PS_ENESTED.
 * ps_await_writable: until the map allows it, where the policy is to wait; else, or after the deadline, PS_EREFUSED.
 * ps_way_in: *at is where they can be stored to from `page` on, whatever page tables they have at the public address,
 * which a snapshot that begins may close at any time.  PS_EREFUSED: this process is fenced; PS_ETIMEOUT: it is changing
 * page tables. */
int ps_own_lease(const struct ps_region *region, uint64_t first, uint64_t count);
int ps_await_writable(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline,
                      struct ps_refusal *refusal);
int ps_way_in(struct ps_region *region, uint64_t page, int64_t deadline, void **at, struct ps_outcome *outcome,
              struct ps_refusal *refusal);

/* -- Violations
 * -------------------------------------------------------------------------------------------------------- */

enum ps_policy ps_policy(const struct ps_region *region); /* this process's own */
void ps_set_policy(struct ps_region *region, enum ps_policy policy);
void ps_set_hooks(const struct ps_hooks *hooks);     /* for good; without any, a policy other than PS_DIE is PS_DIE */
bool ps_quarantined(const struct ps_region *region); /* some pages are private */
struct ps_violation *ps_violation(void);             /* of the calling thread */
/* What the calling thread stored where it may not is gone; it sees shared data again.  -errno: not by the deadline. */
int ps_quarantine_leave(int64_t deadline);
/* The latest forbidden accesses of all participants, the oldest first: how many.  Of an observer's handle too. */
int ps_violations(struct ps_region *region, struct ps_shm_violation kept[PS_VIOLATIONS]);
void ps_fault_install(void);        /* our handlers of SIGSEGV and SIGBUS are on top again */
void ps_fault_tracer(bool enabled); /* the handler on top is faulthandler's, just enabled; or that one is no more */
void ps_tell_also(int fd); /* the line that explains a death goes there too, where that is not stderr's file; -1: no */

/* -- Leases, locks, calls that wait for event loops
 * -------------------------------------------------------------------- */

int ps_lease_take(struct ps_region *region, struct ps_lease *lease, int64_t deadline, struct ps_outcome *outcome,
                  struct ps_refusal *refusal);
int ps_lease_give(struct ps_region *region, const struct ps_lease *lease, int64_t deadline); /* 0, or PS_TRY's */
void *ps_window(const struct ps_region *region); /* of the data's second mapping; there while a lease by it is */
int ps_user_lock_take(struct ps_region *region, uint32_t index, int64_t deadline, bool *abandoned,
                      struct ps_outcome *outcome);
void ps_user_lock_give(struct ps_region *region, uint32_t index, bool untold); /* as of a lease */
/* As ps_lease_take with PS_TRY, for a task among the others of its thread: whether it has a lease is for it to say. */
int ps_lease_try(struct ps_region *region, struct ps_lease *lease, bool passes, struct ps_outcome *outcome,
                 struct ps_refusal *refusal);
int ps_call_begin(struct ps_call *call); /* the lease or lock will be the calling thread's */
void ps_call_cancel(struct ps_call *call);
bool ps_call_conflict(const struct ps_call *one, const struct ps_call *other); /* only one can have what both want */
struct ps_call *ps_mailbox_take(struct ps_mailbox *box); /* what is finished, by `next`, the latest first */
void ps_mailbox_settle(struct ps_mailbox *box);          /* nobody uses it any more; all of it is finished */
struct ps_patience *ps_process_patience(void);

/* The same by pointers, for measurement code, which is another extension: it gets them with the handle in a capsule. */
struct ps_calls {
    void *(*address)(const struct ps_region *region);
    void *(*window)(const struct ps_region *region);
    int (*lease_take)(struct ps_region *region, struct ps_lease *lease, int64_t deadline, struct ps_outcome *outcome,
                      struct ps_refusal *refusal);
    int (*lease_give)(struct ps_region *region, const struct ps_lease *lease, int64_t deadline);
    int (*lock_take)(struct ps_region *region, uint32_t index, int64_t deadline, bool *abandoned,
                     struct ps_outcome *outcome);
    void (*lock_give)(struct ps_region *region, uint32_t index, bool untold);
};

/* -- Snapshots
 * --------------------------------------------------------------------------------------------------------- */

/* Everything stored by anybody before a moment during the call, and nothing after it.  PS_ETIMEOUT, PS_ESIGNAL: the
 * outcome names who holds a lease, or was silent; there is no snapshot, and the caller may try again.  *shared: pages
 * are writable for all, so the sooner it is saved the sooner stores cost nothing again. */
int ps_snapshot_take(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome,
                     struct ps_snapshot *snapshot, bool *shared);
/* Of a descriptor that was passed on, which is its own from now on. */
int ps_snapshot_adopt(int fd, uint32_t index, uint32_t word, uint64_t generation, struct ps_snapshot *snapshot,
                      const char **field);
int ps_snapshot_read(const struct ps_snapshot *snapshot, uint64_t offset, void *to, uint64_t length);
/* Looks at `count` pages from *page on, and saves them; 1: there are more, from *page on; 0: it is complete. */
int ps_snapshot_save(struct ps_snapshot *snapshot, uint64_t *page, uint64_t count);
/* The data of a complete one, to be read; in a forked child too.  The mapping keeps the area. */
int ps_snapshot_view(const struct ps_snapshot *snapshot, void **at);
void ps_snapshot_unview(void *at, uint64_t pages);
bool ps_snapshot_complete(const struct ps_snapshot *snapshot);
/* The next run of pages from *page on that the data, or the snapshot's own area, has (a page that neither has is zero);
 * a count of 0: there is none. */
int ps_snapshot_data(const struct ps_snapshot *snapshot, bool area, uint64_t *page, uint64_t *count);
uint64_t ps_snapshot_saved(const struct ps_snapshot *snapshot); /* pages that need not be saved any more */
void ps_snapshot_close(struct ps_snapshot *snapshot);
void ps_snapshot_sweep(struct ps_region *region); /* page tables open again where one is complete or given up */
bool ps_snapshot_of(const struct ps_region *region, const struct ps_snapshot *snapshot); /* the same region's? */
/* Of each page a byte: 1 where it may have been written since the generation and before the call: under a lease that
 * ended at it or later, or is held; by ps_put; or, where it may have been writable for all since, at all.  With a
 * snapshot, of that generation, the latter only where it differs.  PS_ECORRUPT: the snapshot was given up. */
int ps_dirty(struct ps_region *region, const struct ps_snapshot *since, uint64_t generation, uint8_t *map);
/* Pages are these bytes, whatever their protection: the caller has the region frozen.  PS_ESIGNAL: again. */
int ps_put(struct ps_region *region, uint64_t offset, const void *from, uint64_t length);

/* -- Looking without taking part
 * --------------------------------------------------------------------------------------- */

/* Looking without taking part (observe.c).  The handle is the caller's memory, zero at first, and no participant's:
 * beside what follows only ps_generation, ps_size, ps_name, ps_address and ps_fd may be called with it. */
struct ps_seen_change {
    uint64_t first, count; /* pages */
    uint64_t time, done;   /* CLOCK_BOOTTIME ns; done 0: not over, or undone */
    uint32_t kind, prot, author, slowest;
};

struct ps_seen_slot {
    uint32_t owner; /* as held words and the freezer's have it */
    uint32_t pid, tid, capabilities, flags;
    uint64_t start; /* of the process: clock ticks, 0 unknown */
    uint64_t applied;
    uint64_t data;                      /* where it says to have the data: to be checked */
    bool live;                          /* it has joined */
    bool alive;                         /* its memory is still there */
    bool here;                          /* its pid is one of our pid namespace */
    uint32_t leases, waits_for;         /* how many it has; whom one of its threads waits for, 0: nobody */
    uint64_t leased_since, waits_since; /* CLOCK_MONOTONIC_COARSE ns, where the former are not 0 */
    uint32_t takes;                     /* leases taken, by whoever had the slot */
};

struct ps_seen_lock { /* a user lock that somebody has */
    uint32_t index, owner;
    uint64_t since; /* CLOCK_MONOTONIC_COARSE ns; 0 unknown */
};

struct ps_seen_closer { /* a change, a freeze or a snapshot that keeps leases from its pages */
    uint32_t owner;
    bool drain; /* of a snapshot */
    uint64_t first, count;
};

int ps_observe(struct ps_region *seen, int fd, const char **field);
void ps_observe_shut(struct ps_region *seen); /* the address range stays reserved ... */
void ps_observe_end(struct ps_region *seen);  /* ... until here */
int ps_observe_read(struct ps_region *seen, uint64_t offset, void *to, uint64_t length);
int ps_observe_wait(const struct ps_region *seen, uint64_t generation, int64_t deadline);
bool ps_observe_change(const struct ps_region *seen, uint64_t generation, struct ps_seen_change *out);
bool ps_observe_open(const struct ps_region *seen, uint64_t *first, uint64_t *count);
bool ps_observe_over(const struct ps_region *seen, uint64_t generation);
int ps_observe_slot(struct ps_region *seen, uint32_t index, struct ps_seen_slot *out);
uint64_t ps_observe_run(struct ps_region *seen, enum ps_section_kind layer, uint32_t area, uint64_t first,
                        uint64_t *value);
uint32_t ps_observe_protection(struct ps_region *seen, uint64_t page);
uint32_t ps_observe_freezer(const struct ps_region *seen, uint64_t *frozen);
uint32_t ps_observe_snapshot(const struct ps_region *seen, uint32_t area, uint64_t *generation);
bool ps_observe_protected(const struct ps_region *seen);
uint64_t ps_observe_takes(const struct ps_region *seen);  /* leases ever taken */
uint32_t ps_observe_writer(const struct ps_region *seen); /* owner word: who has the writer lock; 0: nobody */
bool ps_observe_lock(struct ps_region *seen, uint32_t from, struct ps_seen_lock *out); /* the next one; false: none */
bool ps_observe_closer(const struct ps_region *seen, uint32_t index, struct ps_seen_closer *out); /* of PS_CLOSERS */
int64_t ps_observe_marks(int pagemap, uint64_t page, uint64_t end, bool *marked);

/* -- Names
 * ------------------------------------------------------------------------------------------------------------- */

/* The entry's format is names.c's, the directory of entries _names.py's. */
int ps_name_format(int name_fd, int region_fd);
int ps_name_find(int name_fd, int *region_fd);
int ps_name_leads_to(int name_fd, int region_fd); /* 1, 0 or an error */
/* This process does not hold the region's name any more, and is a participant still: what it does at its end. */
void ps_name_let_go(struct ps_region *region);
int ps_name_of(int region_fd, char name[PS_NAME_MAX + 8], const char **field); /* "" for none */

#endif
