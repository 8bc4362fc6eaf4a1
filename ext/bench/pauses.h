/* pauses.h - measurement code only: processes that store at a steady pace, and two ways to have their memory copied.
 *
 * Lives here: what `pyshare bench snapshot` measures a snapshot's pause with, and compares it with.  pyshare itself
 * uses none of it.  Results are nanoseconds, 0, or -errno.
 * Not here: what is measured, statistics (pyshare/bench/snapshots.py).
 */
#ifndef PS_PAUSES_H
#define PS_PAUSES_H

#include <semaphore.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "core.h"

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
