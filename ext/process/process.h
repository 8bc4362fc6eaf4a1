/* process.h - the door of process/: what this process has of each region.
 *
 * Lives here: struct ps_region, the handle, which is private memory of this
 * process; what is found in shared memory through it is untrusted, what is in it
 * has been checked.
 * Invariants
 *  1. Handles lie in the static table of process.c and are never freed: a signal
 *     handler may look at one at any time.
 *  2. `page_lock` is held over changes of our own page tables only.
 *     `descriptor_lock` is held while the cached descriptors are looked at,
 *     fetched or forgotten: fork looks at them from any thread.
 *  3. Callers use shared memory only while `agent` is RUNNING.  Without a slot
 *     (`epoch` 0) nothing of it is mapped: the range is reserved, no-access.
 */
#ifndef PS_PROCESS_H
#define PS_PROCESS_H

#include <sys/mman.h>

#include "core.h"
#include "os/os.h"

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

enum ps_use {
    PS_UNUSED = 0,  /* a free place in the table */
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

/* How many leases a thread has: own - others, modulo 2^32. */
struct ps_count {
    _Atomic uint32_t own;    /* W: the thread alone, seq_cst or release: those it has taken, less those it gave back */
    _Atomic uint32_t others; /* W: others, seq_cst: those of its that they gave back, less those handed over to it */
};

/* A region as this process has it. */
struct ps_region {
    /* process/: its place in the table, the address range, descriptors. */
    _Atomic uint32_t use;   /* enum ps_use */
    _Atomic uintptr_t base; /* of the reservation: control, guard, data, guard, window, guard, shadow; 0: none */
    uint64_t span;          /* its bytes */
    struct ps_shape shape;
    _Atomic uint32_t descriptor_lock;          /* sleep.c */
    struct ps_cached memory, entry, userfault; /* under descriptor_lock */
    _Atomic(const char *) corrupt;             /* the field that made PS_ECORRUPT */

    /* participant/: the agent and its join. */
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
    uint32_t slot, epoch;  /* epoch 0: no slot */
    uint32_t pid, cpus;    /* as of the join: this process, and how many CPUs it may use */

    /* shared/: threads of ours that have a word, which names the participant only, and are inside a call; 0: none.
     * W: who gets the word, release, with no system call in between; 0 before it gives it up.  R: ps_owner_pass_on,
     * acquire. */
    _Atomic int writer;              /* the writer lock */
    _Atomic int closing[PS_CLOSERS]; /* a closer */
    _Atomic int freezing;            /* the freezer's word */

    /* pages/: under page_lock, where nothing else is said. */
    _Atomic uint32_t page_lock;  /* claim.c */
    _Atomic bool failed, fenced; /* read without it as hints */
    _Atomic bool unsynced;       /* follow the whole map, whatever `applied` says; also from the signal handler */
    uint64_t ahead;              /* what this generation asks of our page tables is done */
    bool uffd;                   /* our page tables follow by userfaultfd where chunks are armed: since the join */
    void *keeper;   /* a mapping that keeps our userfaultfd open, whatever becomes of descriptors; NULL: none */
    uint8_t *chunk; /* behind `here`, a byte per chunk: engine.c's; 0 at first */
    _Atomic uint32_t quarantines; /* how many there are of them, the oldest first */
    struct ps_quarantine quarantine[PS_QUARANTINES];
    uintptr_t source;    /* of a no-access mapping of the data, from which its pages come back; 0: none */
    _Atomic bool window; /* the data is mapped a second time, for leases by window */
    _Atomic bool shadow; /* it is mapped once more, with the snapshots' areas, for saving pages */

    /* hold/: private memory. */
    _Atomic uint64_t *here; /* a word per page, then one per user lock: who of us holds it (PS_HERE_*).  W: whoever owns
                             * the shared word, release.  R: anybody, acquire. */
    _Atomic(struct ps_count *) counts; /* by thread id, made by the first lease; NULL: none was ever taken */
    _Atomic uint64_t leased;           /* in-place leased pages; 0: the words of pages need not be looked at */
    _Atomic uint32_t spins; /* how many looks a wait that did not sleep has taken of late; relaxed, a guess */

    /* change/: our freeze, and others' userfaultfds. */
    _Atomic int frozen_by;                  /* the thread of ours that has the region frozen; 0: none */
    struct ps_shm_closer *freeze_closer;    /* of that freeze */
    _Atomic(struct ps_borrowed *) borrowed; /* a place per slot, under the process's borrow lock, never given back, kept
                                             * by a forked child; NULL: none was ever wanted */

    /* fault/ and operations/. */
    _Atomic uint32_t policy;    /* enum ps_policy, relaxed: of this process; a forked child's too */
    _Atomic uint64_t next_look; /* relaxed, a guess: when a call looks again for snapshots that nobody holds */
};

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
static inline uint32_t ps_use_of(const struct ps_region *region) {
    return atomic_load_explicit(&region->use, memory_order_acquire);
}
static inline bool ps_running(const struct ps_region *region) {
    return atomic_load_explicit(&region->agent, memory_order_acquire) == PS_AGENT_RUNNING;
}
/* Of the bitset with which its agent sleeps on the generation. */
static inline uint32_t ps_slot_bit(uint32_t slot) {
    return 1u << slot % 32;
}

/* descriptor.c */
uint64_t ps_region_skip_hole(struct ps_region *region, uint64_t at, uint64_t end);
uint64_t ps_region_skip_data(struct ps_region *region, uint64_t at, uint64_t end);
int ps_cached_get(struct ps_region *region, struct ps_cached *cached);
int ps_cached_identify(struct ps_cached *cached, enum ps_cached_kind kind, int fd);
void ps_cached_forget(struct ps_region *region, struct ps_cached *cached);
bool ps_cached_leads(int fd, const struct ps_cached *cached);
int ps_query_fd(struct ps_region *region);
int ps_cached_set(struct ps_cached *cached, enum ps_cached_kind kind, int fd);
void ps_descriptor_ask(struct ps_region *region, uint32_t index, int *socket);

/* mapping.c */
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
int ps_region_map_counts(struct ps_region *region);
int ps_region_map_canary(struct ps_region *region, int own);
int ps_region_fill(struct ps_region *region, int fd, int name_fd);

/* process.c */
int ps_corrupt(struct ps_region *region, const char *field);
int ps_process_start(void); /* the first time: forks and faults are ours to see to */
void ps_process_at_fork(void (*before)(void), void (*after)(void)); /* after: in the child */
void ps_process_forget(struct ps_region *region);
void (*ps_process_handler(void))(int, siginfo_t *, void *);
const struct ps_hooks *ps_process_hooks(void);               /* NULL: none */
struct ps_region *ps_process_next(struct ps_region *region); /* that was ever open; NULL: the first, the end */
int ps_process_tid(void);                                    /* of the calling thread */
const char *ps_process_command(void);    /* PS_COMMAND bytes: its command line, of when it had its first region */
int ps_process_holder(void);             /* as whom it takes words */
int ps_process_told_too(void);           /* ps_tell_also's */
struct ps_proxy *ps_process_proxy(void); /* NULL: it is itself */
void ps_process_set_proxy(struct ps_proxy *proxy);
struct ps_waiter *ps_process_waiter(void);
bool ps_process_ended(pthread_t thread); /* by a seccomp filter, too; true once: then it is no thread any more */
uint64_t ps_process_pidns(void);         /* as ps_sys_pid_namespace; also without /proc, where an ancestor had it */
void ps_process_become_agent(const struct ps_region *region);
bool ps_process_is_agent(const struct ps_region *region); /* the calling thread, with the table that it has */
_Atomic uint32_t *ps_process_borrow_lock(void);
void ps_process_took(int fd); /* whatever we thought to have under this number is something else by now */
bool ps_process_known(void);  /* false in a child made by a raw clone() */
struct ps_region *ps_process_claim(void);
struct ps_region *ps_process_find(uintptr_t address);
struct ps_chain *ps_process_chain(int signal);
struct ps_faults *ps_process_faults(void);
void ps_process_set_handler(void (*given)(int, siginfo_t *, void *)); /* of SIGSEGV and SIGBUS, which goes on top */
int ps_process_spawn(void *(*body)(void *), void *argument, pthread_t *thread); /* with all signals blocked */

/* signals.c */
/* The calling thread survives faults of the copy, whatever signals it has blocked, until it blocks them again. */
void ps_fault_unblock(bool expected, sigset_t *blocked); /* those of ours that it had blocked */
void ps_fault_block_again(const sigset_t *blocked);
void ps_fault_stack(void);
void ps_chain_await_install(struct ps_chain *chain);
void ps_chain_pass_on(int signal, siginfo_t *info, void *context, bool by_kernel, struct ps_offer *offer);
bool ps_chain_on_its_way(const struct ps_offer *offer, uint64_t fault, bool by_kernel, bool ours, uintptr_t frame);
void ps_chain_rewrite(struct ps_chain *chain, const struct sigaction *handler, bool on_top);

/* sleep.c */
int ps_private_lock(_Atomic uint32_t *word, int64_t deadline);
void ps_private_unlock(_Atomic uint32_t *word);
int ps_sleep(struct ps_watch watch, int64_t deadline);
int ps_sleep_two(struct ps_watch first, struct ps_watch second, int64_t deadline);
void ps_fiber_switch(struct ps_stack *from, struct ps_stack *to);
bool ps_fiber_changed(const struct ps_fiber *fiber);
struct ps_fiber *ps_fiber_current(void);

static inline bool ps_has_huge_pages(const struct ps_region *region) {
    return region->shape.unit > 1;
}
static inline uint64_t ps_here_length(const struct ps_region *region) {
    return (region->shape.pages + PS_LOCKS) * sizeof *region->here + ps_chunks(&region->shape);
}
static inline bool ps_call_cancelled(const struct ps_call *call) {
    return atomic_load_explicit(&call->cancelled, memory_order_acquire);
}

#endif
