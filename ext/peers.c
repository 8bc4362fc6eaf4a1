/* peers.c - measurement code only: the peers and floors of `pyshare bench` that are C.
 *
 * Lives here: a signal broadcast with acknowledgement, a process that times its own mprotect, and working
 * threads that store on demand.
 * Invariants
 *  1. A participant answers after its mprotect has returned, and exactly once a change.
 *  2. A caller's wait ends with -EINTR at a signal, so an alarm bounds it; a participant waits until it is killed.
 *  3. Waits are POSIX semaphores: sem_post may be called in a signal handler.
 * Not here: the core. Nothing of ext/ uses this file.
 */
#define _GNU_SOURCE
#include "peers.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define LINE 64u     /* of the cache: a cell each */
#define SPIN 2000    /* looks at the answers before sleeping, where every participant has a CPU; as the core does */
#define LOOKS 500000 /* at a working thread's cell: some ms */

static struct peers_board *heard; /* the board of this process's signal handler */

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

struct peers_board *peers_board_create(void *address, size_t length, void *cells) {
    cpu_set_t cpus;
    struct peers_board *board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED)
        return NULL;
    board->address = address;
    board->length = length;
    board->cells = cells;
    board->cpus = sched_getaffinity(0, sizeof cpus, &cpus) ? 1 : (uint32_t)CPU_COUNT(&cpus);
    sem_init(&board->done, 1, 0);
    sem_init(&board->asked, 1, 0);
    sem_init(&board->work, 1, 0);
    return board;
}

void peers_board_free(struct peers_board *board) {
    munmap(board, sizeof *board);
}

int peers_die_with(int32_t parent) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL))
        return -errno;
    return getppid() == parent ? 0 : -ESRCH;
}

int peers_protect(struct peers_board *board, int32_t prot) {
    return mprotect(board->address, board->length, prot) ? -errno : 0;
}

static void sleep_until_posted(sem_t *semaphore) {
    while (sem_wait(semaphore)) /* EINTR: our own handler ran */
        ;
}

static volatile unsigned char *cell_of(struct peers_board *board, uint32_t thread) {
    return board->cells + thread * LINE % PAGE;
}

void peers_work(struct peers_board *board, uint32_t thread) {
    volatile unsigned char *cell = cell_of(board, thread);
    for (;;) {
        sleep_until_posted(&board->work);
        while (atomic_load_explicit(&board->storing, memory_order_relaxed))
            ++*cell;
    }
}

int peers_set_storing(struct peers_board *board, uint32_t threads) {
    atomic_store(&board->storing, threads != 0);
    while (threads--)
        if (sem_post(&board->work))
            return -errno;
    return 0;
}

/* -- Question and answer --------------------------------------------------------------------------------------- */

static void announce(struct peers_board *board, uint32_t participants, int32_t prot) {
    board->prot = prot;
    atomic_store(&board->error, 0);
    atomic_store(&board->missing, participants); /* seq_cst, as all here: orders prot before the call */
}

static void answer(struct peers_board *board, int rc) {
    if (rc)
        atomic_store(&board->error, -rc);
    if (atomic_fetch_sub(&board->missing, 1) == 1)
        sem_post(&board->done);
}

/* One post ends it, by the last participant: cheaper than a wait for each. */
static int await_answers(struct peers_board *board, int spin) {
    while (spin-- && atomic_load(&board->missing))
        __builtin_ia32_pause();
    return sem_wait(&board->done) ? -errno : -atomic_load(&board->error);
}

/* -- The signal broadcast -------------------------------------------------------------------------------------- */

static void on_signal(int number) {
    int before = errno;
    (void)number;
    answer(heard, peers_protect(heard, heard->prot));
    errno = before;
}

int peers_signal_listen(struct peers_board *board) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    heard = board;
    return sigaction(SIGUSR1, &action, NULL) ? -errno : 0;
}

int64_t peers_signal_change(struct peers_board *board, uint32_t count, int32_t prot) {
    int64_t start = now();
    announce(board, count, prot);
    for (uint32_t i = 0; i < count; i++)
        if (kill(board->pids[i], SIGUSR1))
            return -errno;
    int rc = peers_protect(board, prot);
    if (!rc)
        rc = await_answers(board, count < board->cpus ? SPIN : 0);
    return rc ? rc : now() - start;
}

/* -- The floors ------------------------------------------------------------------------------------------------ */

/* Until every working thread has stored once more; or not, where the machine is that busy. */
static void await_work(struct peers_board *board, uint32_t threads) {
    for (uint32_t thread = 0; thread < threads; thread++) {
        volatile unsigned char *cell = cell_of(board, thread), before = *cell;
        for (int i = 0; i < LOOKS && *cell == before; i++)
            __builtin_ia32_pause();
    }
}

void peers_floor_serve(struct peers_board *board, uint32_t threads) {
    for (;;) {
        sleep_until_posted(&board->asked);
        /* To and fro first, so that code and page tables are in the caches: this is to be a floor. */
        peers_protect(board, board->prot);
        peers_protect(board, board->prot ^ PROT_WRITE);
        await_work(board, threads);
        int64_t start = now();
        int rc = peers_protect(board, board->prot);
        board->elapsed = now() - start;
        answer(board, rc);
    }
}

int64_t peers_floor_change(struct peers_board *board, int32_t prot) {
    announce(board, 1, prot);
    if (sem_post(&board->asked))
        return -errno;
    int rc = await_answers(board, 0); /* no spin: this CPU is for the working thread */
    return rc ? rc : board->elapsed;
}
