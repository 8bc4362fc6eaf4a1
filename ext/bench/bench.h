/* bench.h - the door of bench/: measurement code only, what `pyshare bench` measures a region by and compares it with.
 *
 * Lives here: broadcasts and floors whose every step is C, so that no Python is
 * counted against them (peers.c); processes that store at a steady pace, and two
 * ways to have their memory copied (pauses.c).  pyshare itself uses none of it.
 * Results are nanoseconds, 0, or -errno.
 * Not here: the peers made of multiprocessing, who takes part, statistics
 * (pyshare/bench/).
 */
#ifndef PS_BENCH_H
#define PS_BENCH_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "core.h"

/* -- Peers, floors, cycles (peers.c) ------------------------------------------------------------------------------- */

#define PEERS_MAX 256

/* What one process does over and over: the least that a lease, a lock or an attach could cost. */
enum peers_cycle {
    PEERS_MPROTECT,  /* mprotect, store, mprotect back */
    PEERS_UFFD,      /* the same by UFFDIO_WRITEPROTECT; the store is a minor fault */
    PEERS_FCNTL,     /* a lock of the page's bytes, store, unlock; the page stays writable */
    PEERS_MUTEX,     /* a robust process-shared pthread mutex, the same */
    PEERS_THREAD,    /* start a thread, and wait for its end: what an agent needs beside the mapping */
    PEERS_MAP,       /* mmap of the whole file */
    PEERS_MAP_UNMAP, /* ... and munmap */
    PEERS_CYCLES
};

/* PEERS_LOOK: stores to a cell of its own and looks at the pages, so that its CPU has the translation, which a change
 * must take from it.  PEERS_STORE: stores to the first of the pages, so that the entry is writable, too. */
enum peers_work { PEERS_REST, PEERS_LOOK, PEERS_STORE };

/* What the processes of one contender share; forked children have it, and the pages, at the same addresses. */
struct peers_board {
    /* The change.  Written by the caller before it calls anybody. */
    void *address;
    size_t length;
    volatile unsigned char *cells; /* a page to which working threads store */
    int32_t prot;
    int32_t pids[PEERS_MAX];
    int32_t fds[PEERS_MAX]; /* the participants' userfaultfds, as the caller borrowed them */
    int32_t cycle, times;   /* of a floor that goes in cycles */
    uint32_t cpus;          /* that these processes may use */
    /* The answers.  The last participant posts `done`. */
    _Alignas(64) _Atomic uint32_t missing;
    _Atomic int32_t error; /* errno of a participant that could not apply it */
    int64_t elapsed;       /* a floor's own answer */
    sem_t done;
    sem_t asked; /* posted to call the process of a floor */
    /* What working threads do (enum peers_work); `called` holds one token for each of them. */
    _Alignas(64) _Atomic uint32_t work;
    _Atomic uint32_t at_work;   /* what one of them has just done */
    _Atomic uint32_t called_up; /* how many have been called and do not rest yet */
    sem_t called;
    pthread_mutex_t mutex; /* of PEERS_MUTEX */
};

struct peers_board *peers_board_create(void *address, size_t length, void *cells); /* NULL, and errno */
void peers_board_free(struct peers_board *board);                                  /* the pages stay the caller's */

/* This process is killed when the thread that forked it goes; -ESRCH if `parent` went before. */
int peers_die_with(int32_t parent);
int peers_protect(struct peers_board *board, int32_t prot);

/* A working thread sleeps until it is called, and works while there is work; until its process is killed. */
_Noreturn void peers_work(struct peers_board *board, uint32_t thread);
int peers_set_work(struct peers_board *board, enum peers_work work, uint32_t called);
/* 1: a working thread has just done this, and, if only one was called, does nothing else any more; or, for PEERS_REST,
 * all do.  0: not yet, the machine is that busy. */
int peers_await_work(struct peers_board *board, enum peers_work work);

/* The signal broadcast: SIGUSR1 to every pid; each handler calls mprotect and counts down. */
int peers_signal_listen(struct peers_board *board);
int64_t peers_signal_change(struct peers_board *board, uint32_t count, int32_t prot);

/* The bare remote change: each participant opens a userfaultfd on the pages and lends it (any way it likes); the caller
 * goes from one to the next.  Nobody else runs, and the caller's own pages stay as they are. */
int peers_remote_open(struct peers_board *board); /* the descriptor */
int64_t peers_remote_change(struct peers_board *board, uint32_t count, int32_t prot);

/* A floor: one process that calls mprotect when asked, on warm caches and while so many working threads of its own
 * run, and says how long the call took. */
_Noreturn void peers_floor_serve(struct peers_board *board, uint32_t threads);
int64_t peers_floor_change(struct peers_board *board, int32_t prot);

/* A process of one thread that goes through a cycle so often, after one that is not counted, and says how long that
 * took.  `fd` is a memfd of `length` bytes. */
_Noreturn void peers_cycle_serve(struct peers_board *board, int32_t fd, size_t length);
int64_t peers_cycle(struct peers_board *board, enum peers_cycle cycle, int32_t times);

/* Leases of one page and locks of a region, as C would take them; as the cycles above. */
int64_t peers_core_lease(const struct ps_calls *calls, struct ps_region *region, uint64_t page, bool window,
                         int32_t times);
int64_t peers_core_lock(const struct ps_calls *calls, struct ps_region *region, uint32_t index, int32_t times);

/* -- Writers and pauses (pauses.c) ------------------------------------------------------------------------------------
 */

#define PAUSES_WRITERS 256

/* What the processes of one contender share; forked children have it at the same address. */
struct pauses_board {
    size_t length; /* bytes of the memory that is written */
    uint32_t writers;
    int64_t every; /* ns that a writer rests after each store */
    /* Stop and copy: a writer that is asked to halt writes a byte to one pipe and reads one from the other. */
    int halted[2], go[2];
    sem_t called;          /* a token for each writer that is to begin */
    sem_t begun;           /* ... posted when it has */
    sem_t rested;          /* ... and when it has ended */
    sem_t asked;           /* of the process that forks */
    sem_t answered;        /* ... twice: it has forked, the child has ended */
    sem_t probed;          /* by a writer */
    int64_t forked, ended; /* the process's answers */
    int64_t first, again;  /* the probe's */
    _Atomic int32_t error; /* errno of whoever could not go on */
    _Alignas(64) _Atomic uint32_t work;
    _Atomic uint32_t halt;
    _Atomic uint32_t probe;
    /* By writer: the longest that it had to wait for one store, since pauses_forget. */
    struct {
        _Alignas(64) _Atomic int64_t worst;
    } writer[PAUSES_WRITERS];
};

struct pauses_board *pauses_create(size_t length, uint32_t writers, int64_t every); /* NULL, and errno */
void pauses_free(struct pauses_board *board);

/* The memory is in this process's page tables, to be written or only read; and every page of it is filled. */
int pauses_populate(void *data, size_t length, int write);
void pauses_fill(void *data, size_t length);

/* The life of a writer: stores to pages at random, at its pace, while there is work.  With `calls` each page is leased
 * for its store.  Ends with the process. */
_Noreturn void pauses_write(struct pauses_board *board, uint32_t index, void *data, const struct ps_calls *calls,
                            struct ps_region *region);

int pauses_begin(struct pauses_board *board); /* every writer is at work */
int pauses_end(struct pauses_board *board);   /* none is */
void pauses_forget(struct pauses_board *board);
int64_t pauses_worst(const struct pauses_board *board);
/* What stores to pages cost a writer now, and to the same ones right afterwards: medians. */
int64_t pauses_probe(struct pauses_board *board, int64_t *again);

/* Every writer has stopped, the memory was copied, and they may go on. */
int64_t pauses_stop_and_copy(struct pauses_board *board, const void *from, void *to);

/* The life of a process that has the memory to itself, and writers as threads; it forks when asked, and the child reads
 * all of it.  Then the caller: how long fork() took; and, when the child has ended, how long it took altogether. */
_Noreturn void pauses_serve_forks(struct pauses_board *board);
int64_t pauses_fork(struct pauses_board *board);
int64_t pauses_await_child(struct pauses_board *board);

#endif
