/* peers.h - measurement code only: what `pyshare bench` compares a region with.
 *
 * Lives here: the broadcasts and the floors whose every step is C, so that no
 * Python is counted against them.  pyshare itself uses none of it.
 * Results are nanoseconds, 0, or -errno.
 * Not here: the peers made of multiprocessing, who takes part, statistics (pyshare/bench.py).
 */
#ifndef PS_PEERS_H
#define PS_PEERS_H

#include <semaphore.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define PEERS_MAX 256

/* What the processes of one contender share; forked children have it, and the pages, at the same addresses. */
struct peers_board {
    /* The change.  Written by the caller before it calls anybody. */
    void *address;
    size_t length;
    volatile unsigned char *cells; /* a page to which working threads store */
    int32_t prot;
    int32_t pids[PEERS_MAX];
    uint32_t cpus; /* that these processes may use */
    /* The answers.  The last participant posts `done`. */
    _Alignas(64) _Atomic uint32_t missing;
    _Atomic int32_t error; /* errno of a participant that could not apply it */
    int64_t elapsed;       /* a floor's own answer */
    sem_t done;
    sem_t asked; /* posted to call the process of a floor */
    /* Working threads store while it is set; `work` holds one token for each of them. */
    _Alignas(64) _Atomic uint32_t storing;
    sem_t work;
};

struct peers_board *peers_board_create(void *address, size_t length, void *cells); /* NULL, and errno */
void peers_board_free(struct peers_board *board);                                  /* the pages stay the caller's */

/* This process is killed when the thread that forked it goes; -ESRCH if `parent` went before. */
int peers_die_with(int32_t parent);
int peers_protect(struct peers_board *board, int32_t prot);

/* A working thread: sleeps, or stores to a cell of its own while it is told to, until its process is killed. */
_Noreturn void peers_work(struct peers_board *board, uint32_t thread);
int peers_set_storing(struct peers_board *board, uint32_t threads); /* 0: stop */

/* The signal broadcast: SIGUSR1 to every pid; each handler calls mprotect and counts down. */
int peers_signal_listen(struct peers_board *board);
int64_t peers_signal_change(struct peers_board *board, uint32_t count, int32_t prot);

/* A floor: one process that calls mprotect when asked, on warm caches and while so many working threads of its own
 * run, and says how long the call took. */
_Noreturn void peers_floor_serve(struct peers_board *board, uint32_t threads);
int64_t peers_floor_change(struct peers_board *board, int32_t prot);

#endif
