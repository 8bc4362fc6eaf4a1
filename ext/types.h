/* types.h - result codes and plain structs.
 *
 * Lives here: what the binding and the floors of the core hand each other:
 * results, what a program asks for, what it is told, and what a thread is in the
 * midst of.  No functions, nothing that lies in shared memory (segment/layout.h).
 * Every floor may include it.
 */
#ifndef PS_TYPES_H
#define PS_TYPES_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

#include "segment/layout.h"

struct ps_region;

/* Results that are no errno. */
enum {
    PS_ECORRUPT =
        -5001, /* the control segment is not, or no longer, one of ours: ps_corrupt_field, or `field` of ps_attach */
    PS_EFULL = -5002,    /* every slot is taken */
    PS_ECLOSED = -5003,  /* closed, or a child made by a raw clone() */
    PS_EREFUSED = -5004, /* the protection forbids it: struct ps_refusal */
    PS_ETIMEOUT = -5005, /* struct ps_outcome tells who is silent */
    PS_ESIGNAL = -5006,  /* a signal came, or may have come unseen; as after a timeout, but the caller may go on
                            with ps_await, or (nothing published) with ps_change */
    PS_EREGIONS = -5007, /* this process has PS_REGIONS_MAX regions open */
    PS_ENESTED = -5008,  /* the calling thread holds it itself */
    PS_EFROZEN = -5009,  /* the calling thread has the region frozen itself */
    PS_EAREAS = -5010,   /* as many snapshots are alive as the region has areas for */
    PS_EMEMLOCK = -5011, /* memory that the region wants locked cannot be: RLIMIT_MEMLOCK */
};

#define PS_REGIONS_MAX 1024
#define PS_TRY INT64_MIN                          /* a deadline, of leases and locks: -EAGAIN instead of any wait */
#define PS_JOIN_TIMEOUT (INT64_C(5000) * 1000000) /* ns; of a forked child or a restarted agent */

/* -- What a program is told
 * -------------------------------------------------------------------------------------------- */

/* What became of a change. */
struct ps_outcome {
    uint64_t generation; /* 0: nothing was published */
    uint32_t failed_pid; /* the participant that could not apply it, so that it was undone; 0: none */
    uint32_t error;      /* its errno; with PS_ESIGNAL it is the undo that ps_await waits for */
    uint32_t silent;     /* how many of pids are set */
    uint32_t pids[PS_SLOTS_MAX + 1];
};

/* Which change made a page what it is. */
struct ps_author {
    bool known; /* false: older than the PS_RING latest changes */
    uint64_t generation;
    uint32_t pid;
    uint64_t time; /* CLOCK_BOOTTIME ns */
};

struct ps_refusal {
    uint64_t page;
    uint32_t actual, required; /* protections */
    struct ps_author author;
};

struct ps_participant {
    uint32_t pid, tid, capabilities, flags;
    uint64_t applied;
    bool alive;
};

/* A forbidden access that a thread has yet to learn of: a copy of everything, since the region may be closed by then.
 */
struct ps_violation {
    uint32_t count;   /* accesses, of which the first one is described; 0: none */
    bool interrupted; /* it waited, and a signal's handler is due: the access did not take place */
    uint64_t offset;  /* byte */
    uint64_t page_size;
    uint32_t actual, required;
    struct ps_author author;
    char region[PS_NAME_MAX + 8];
};

/* What the handler of violations asks of the binding.  Called in the faulting thread, without any lock of ours. */
struct ps_hooks {
    bool (*can_raise)(void);     /* the thread can be told of an exception */
    bool (*is_due)(void);        /* what it was to be told is still to come */
    void (*tell)(void);          /* it is told of its first violation, now or soon */
    void *(*release)(void);      /* other threads of the interpreter may run; NULL: it did not keep them from it */
    void (*regain)(void *token); /* the end of that; does not come back where the process is about to end */
    bool (*keeps)(void);         /* it has the interpreter, and may not release it: in code that relies on having it */
    bool (*is_wanted)(void);     /* ... which others wait for */
    bool (*is_signalled)(void);  /* a signal's handler is due in this thread */
    bool (*serve)(void); /* calls it, while the interpreter is released; false: it has raised an exception, which is
                            what the thread is told next */
};

/* -- What a program asks for
 * ------------------------------------------------------------------------------------------- */

enum ps_engine {
    PS_ENGINE_AUTO = 0,     /* uffd where the kernel allows it */
    PS_ENGINE_MPROTECT = 1, /* by VMA: each participant changes its own */
    PS_ENGINE_UFFD = 2,     /* by page-table entry: callers change those of others too */
};

/* Leases and locks.  Both know the thread: it may not wait for itself.  PS_ETIMEOUT: the outcome names the holders;
 * PS_ESIGNAL: as that, and the caller may try again; nothing is held after any result but 0. */
struct ps_lease {
    uint64_t first, count; /* pages */
    bool window;           /* asked for: stores go by ps_window, the page tables at the public address stay; */
    bool untold;           /* ... nobody learns of `abandoned`: at the end the next to have the pages does */
    bool in_place;         /* results: the page tables had to be opened; */
    bool abandoned;        /* somebody died with one of the pages; */
    int taker;             /* the thread that has it, whoever gives it back (or, until it is handed over, a call) */
};

/* Calls that wait in the process's one waiter thread, for event loops (waiter.c).  From ps_call_begin on, until it is
 * found in its mailbox, a call is the waiter's, who tells by the mailbox's eventfd. */
enum ps_call_kind {
    PS_CALL_LEASE,  /* ps_lease_take; of pages */
    PS_CALL_LOCK,   /* ps_user_lock_take; of one lock, by index */
    PS_CALL_CHANGE, /* ps_change; of bytes */
    PS_CALL_WATCH,  /* until the change after `generation` is over; `region` is an observer's */
};

struct ps_mailbox {
    int fd;                             /* an eventfd, or -1: nobody need be told */
    _Atomic uint32_t calls;             /* that are under way */
    _Atomic(struct ps_call *) finished; /* the latest first */
};

struct ps_call {
    enum ps_call_kind kind;
    struct ps_region *region;
    struct ps_mailbox *box;
    uint64_t first, count; /* what it wants, as its kind says */
    int64_t deadline;
    uint64_t generation; /* WATCH */
    uint32_t prot;       /* CHANGE */
    bool passes;         /* LEASE: for somebody who has one, so it passes a snapshot that waits for leases */
    struct ps_lease lease;
    void *owner; /* the binding's */
    int rc;      /* the results; PS_ESIGNAL: cancelled */
    bool abandoned;
    struct ps_outcome outcome;
    struct ps_refusal refusal;
    _Atomic bool cancelled; /* the rest is the waiter's; `next` the mailbox's, in the end */
    int tid;
    struct ps_fiber *fiber;
    struct ps_call *next;
};

/* Snapshots: a copy-on-write image of the whole data at one moment, as one of its holders has it.  Independent of the
 * region's handle: it reads through a description of its own, whose lock on the snapshot's byte says that somebody
 * wants it; descriptors of the same description, in whatever process, are holders too. */
struct ps_snapshot {
    int fd;
    uint32_t index, word; /* which area; its word without the state */
    uint64_t generation;
    struct ps_shm_header *control;              /* the control segment, mapped once more */
    uint64_t control_size, size, pages, states; /* as the header said; offset of its states */
};

/* -- What a thread is in the midst of
 * ---------------------------------------------------------------------------------- */

/* Whom the calling thread waits for, across the calls that this takes (lock.c): whoever lets code of others run between
 * them keeps this meanwhile, for that code may wait, too. */
struct ps_patience {
    uint32_t owner; /* 0: nobody */
    uint64_t since; /* CLOCK_MONOTONIC_COARSE, ns */
};

/* In whose place the calling thread takes words, where it is not in its own. */
struct ps_proxy {
    int holder;                  /* who has them in `here`; 0: the thread */
    int tid;                     /* the thread whose they will be */
    bool passes;                 /* of that thread's leases one is its own, while the thread has any */
    struct ps_patience patience; /* of `holder` */
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

struct ps_stack {
    ucontext_t context;
    void *known; /* as what ThreadSanitizer knows it */
};

/* A futex word, with the value it is expected to hold. */
struct ps_watch {
    _Atomic uint32_t *word;
    uint32_t value;
};

/* This lies at the upper end of its own stack. */
struct ps_fiber {
    struct ps_proxy proxy; /* first: the thread's proxy is the fiber that it runs */
    struct ps_stack stack;
    struct ps_stack *back; /* of the waiter */
    struct ps_call *call;
    struct ps_watch watch[2]; /* while it sleeps: until one of these changes, */
    uint32_t watches;
    int64_t deadline; /* or then, */
    bool woken;       /* or it is woken */
    bool told;        /* that it is cancelled */
    bool over;
    struct ps_fiber *next; /* of the spares */
};

struct ps_waiter {
    _Atomic uint32_t lock;           /* ps_private_lock's: while it is started */
    _Atomic bool running;            /* W: under the lock, release.  R: acquire */
    pthread_t thread;                /* under the lock */
    _Atomic uint32_t kicks;          /* W: who has something for it, + 1, release.  R: it sleeps on it, acquire */
    _Atomic(struct ps_call *) inbox; /* W: by CAS, release; it takes all.  The latest first, by `next` */
};

#endif
