/* pauses.c - measurement code only: processes that store at a steady pace, and two ways to have their memory copied.
 *
 * Lives here: the writers of `pyshare bench snapshot`, stop-and-copy by pipes, fork() of a process with private memory.
 * Invariants
 *  1. A writer's wait is counted from when it wanted to store until it had stored, whatever kept it: a barrier, a
 *     fault, a lease, the scheduler.  Between two stores it rests, so more writers than CPUs do not wait for each
 * other.
 *  2. A caller's wait ends with -EINTR at a signal, so an alarm bounds it; writers wait until they are killed.
 * Not here: snapshots; of the core only the wrappers of os/ are here, and what a capsule brings.
 */
#define _GNU_SOURCE
#include "bench/bench.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define PROBES 15 /* pages of one probe */
#define PIECE (1u << 20)

/* -- The board ------------------------------------------------------------------------------------------------------
 */

struct pauses_board *pauses_create(size_t length, uint32_t writers, int64_t every) {
    struct pauses_board *board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED)
        return NULL;
    if (pipe2(board->halted, O_CLOEXEC) || pipe2(board->go, O_CLOEXEC)) {
        munmap(board, sizeof *board);
        return NULL;
    }
    board->length = length;
    board->writers = writers;
    board->every = every;
    sem_t *all[] = {&board->called, &board->begun, &board->rested, &board->asked, &board->answered, &board->probed};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        sem_init(all[i], 1, 0);
    return board;
}

void pauses_free(struct pauses_board *board) {
    for (int end = 0; end < 2; end++) {
        close(board->halted[end]);
        close(board->go[end]);
    }
    munmap(board, sizeof *board);
}

int pauses_populate(void *data, size_t length, int write) {
    return madvise(data, length, write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) ? -errno : 0;
}

void pauses_fill(void *data, size_t length) {
    memset(data, 0x5a, length);
}

static int await(struct pauses_board *board, sem_t *semaphore, uint32_t times) {
    while (times--)
        if (sem_wait(semaphore))
            return -errno;
    return -atomic_load(&board->error);
}

static void sleep_until_posted(sem_t *semaphore) {
    while (sem_wait(semaphore)) /* EINTR */
        ;
}

/* -- A writer -------------------------------------------------------------------------------------------------------
 */

struct writer {
    struct pauses_board *board;
    uint32_t index;
    volatile unsigned char *data;
    const struct ps_calls *calls; /* NULL: the page is writable */
    struct ps_region *region;
    uint64_t random;
};

static uint64_t random_page(struct writer *w) { /* xorshift64 */
    w->random ^= w->random << 13;
    w->random ^= w->random >> 7;
    w->random ^= w->random << 17;
    return w->random % (w->board->length / PAGE);
}

static int store(struct writer *w, uint64_t page) {
    volatile unsigned char *byte = w->data + page * PAGE + w->index;
    if (!w->calls) {
        ++*byte;
        return 0;
    }
    struct ps_outcome outcome;
    struct ps_refusal refusal;
    struct ps_lease lease = {.first = page, .count = 1};
    int rc = w->calls->lease_take(w->region, &lease, PS_NEVER, &outcome, &refusal);
    if (rc)
        return rc;
    ++*byte;
    return w->calls->lease_give(w->region, &lease, PS_NEVER);
}

static void halt_if_asked(struct pauses_board *board) {
    char byte = 0;
    if (atomic_load_explicit(&board->halt, memory_order_relaxed) && write(board->halted[1], &byte, 1) == 1)
        while (read(board->go[0], &byte, 1) < 0)
            ;
}

static int by_value(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The median time of a store to each of these pages. */
static int64_t timed_stores(struct writer *w, const uint64_t pages[PROBES], int *rc) {
    int64_t took[PROBES];
    for (int i = 0; i < PROBES && !*rc; i++) {
        int64_t start = ps_sys_now();
        *rc = store(w, pages[i]);
        took[i] = ps_sys_now() - start;
    }
    if (*rc)
        return 0;
    qsort(took, PROBES, sizeof *took, by_value);
    return took[PROBES / 2];
}

static int probe_if_asked(struct writer *w) {
    struct pauses_board *board = w->board;
    if (w->index || !atomic_load_explicit(&board->probe, memory_order_relaxed))
        return 0;
    int rc = 0;
    uint64_t pages[PROBES];
    for (int i = 0; i < PROBES; i++)
        pages[i] = random_page(w);
    board->first = timed_stores(w, pages, &rc);
    board->again = timed_stores(w, pages, &rc);
    atomic_store(&board->probe, 0);
    sem_post(&board->probed);
    return rc;
}

static void rest(int64_t until) {
    struct timespec due = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
        ;
}

static int write_at_pace(struct writer *w) {
    struct pauses_board *board = w->board;
    _Atomic int64_t *worst = &board->writer[w->index].worst;
    int64_t now = ps_sys_now();
    while (atomic_load_explicit(&board->work, memory_order_relaxed)) {
        int64_t due = now + board->every;
        rest(due);
        halt_if_asked(board);
        int rc = store(w, random_page(w));
        if (rc)
            return rc;
        now = ps_sys_now();
        if (now - due > atomic_load_explicit(worst, memory_order_relaxed))
            atomic_store_explicit(worst, now - due, memory_order_relaxed);
        if ((rc = probe_if_asked(w)))
            return rc;
        now = ps_sys_now();
    }
    return 0;
}

static _Noreturn void live(struct writer *w) {
    struct pauses_board *board = w->board;
    w->random = UINT64_C(0x9e3779b97f4a7c15) * (w->index + 1);
    prctl(PR_SET_TIMERSLACK, 1); /* to be waked when it is due, and not 50 us later */
    for (;;) {
        sleep_until_posted(&board->called);
        sem_post(&board->begun);
        int rc = write_at_pace(w);
        if (rc)
            atomic_store(&board->error, rc < -4095 ? EPROTO : -rc); /* the core has codes of its own */
        sem_post(&board->rested);
    }
}

void pauses_write(struct pauses_board *board, uint32_t index, void *data, const struct ps_calls *calls,
                  struct ps_region *region) {
    live(&(struct writer){.board = board, .index = index, .data = data, .calls = calls, .region = region});
}

int pauses_begin(struct pauses_board *board) {
    atomic_store(&board->work, 1);
    for (uint32_t i = 0; i < board->writers; i++)
        sem_post(&board->called);
    return await(board, &board->begun, board->writers);
}

int pauses_end(struct pauses_board *board) {
    atomic_store(&board->work, 0);
    return await(board, &board->rested, board->writers);
}

void pauses_forget(struct pauses_board *board) {
    for (uint32_t i = 0; i < board->writers; i++)
        atomic_store(&board->writer[i].worst, 0);
}

int64_t pauses_worst(const struct pauses_board *board) {
    int64_t worst = 0;
    for (uint32_t i = 0; i < board->writers; i++) {
        int64_t one = atomic_load(&board->writer[i].worst);
        worst = one > worst ? one : worst;
    }
    return worst;
}

int64_t pauses_probe(struct pauses_board *board, int64_t *again) {
    atomic_store(&board->probe, 1);
    int rc = await(board, &board->probed, 1);
    *again = board->again;
    return rc ? rc : board->first;
}

/* -- Stop and copy --------------------------------------------------------------------------------------------------
 */

/* Through a pipe, a byte for each writer. */
static int each_byte(int fd, uint32_t writers, ssize_t (*move)(int fd, void *bytes, size_t count)) {
    char bytes[PAUSES_WRITERS] = {0};
    for (uint32_t done = 0; done < writers;) {
        ssize_t count = move(fd, bytes, writers - done);
        if (count <= 0)
            return count ? -errno : -EPIPE;
        done += (uint32_t)count;
    }
    return 0;
}

static ssize_t put(int fd, void *bytes, size_t count) {
    return write(fd, bytes, count);
}

int64_t pauses_stop_and_copy(struct pauses_board *board, const void *from, void *to) {
    int64_t start = ps_sys_now();
    atomic_store(&board->halt, 1);
    int rc = each_byte(board->halted[0], board->writers, read);
    if (rc)
        return rc;
    memcpy(to, from, board->length);
    atomic_store(&board->halt, 0);
    rc = each_byte(board->go[1], board->writers, put);
    return rc ? rc : ps_sys_now() - start;
}

/* -- fork() ---------------------------------------------------------------------------------------------------------
 */

static void *live_as_thread(void *writer) {
    live(writer);
}

static int start_threads(struct pauses_board *board, struct writer *writers, void *data) {
    for (uint32_t i = 0; i < board->writers; i++) {
        pthread_t thread;
        writers[i] = (struct writer){.board = board, .index = i, .data = data};
        int rc = pthread_create(&thread, NULL, live_as_thread, &writers[i]);
        if (rc)
            return -rc;
    }
    return 0;
}

/* A child reads all that it has, as one that writes it to a file would. */
static _Noreturn void read_all(const unsigned char *data, size_t length, pid_t parent) {
    static unsigned char piece[PIECE];
    if (peers_die_with(parent))
        _exit(1);
    for (size_t at = 0; at < length; at += PIECE) {
        memcpy(piece, data + at, length - at < PIECE ? length - at : PIECE);
        __asm__ volatile("" ::"r"(piece) : "memory"); /* somebody might look at it */
    }
    _exit(0);
}

static int serve_fork(struct pauses_board *board, const unsigned char *data) {
    int status;
    pid_t parent = getpid();
    int64_t start = ps_sys_now();
    pid_t child = fork();
    if (!child)
        read_all(data, board->length, parent);
    if (child < 0)
        return -errno;
    board->forked = ps_sys_now() - start;
    sem_post(&board->answered);
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    board->ended = ps_sys_now() - start;
    return status ? -ECHILD : 0;
}

void pauses_serve_forks(struct pauses_board *board) {
    static struct writer writers[PAUSES_WRITERS];
    unsigned char *data = mmap(NULL, board->length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int rc = data == MAP_FAILED ? -errno : 0;
    if (!rc) {
        madvise(data, board->length, MADV_NOHUGEPAGE); /* as Redis has it: else a store copies 2 MiB */
        pauses_fill(data, board->length);
        rc = start_threads(board, writers, data);
    }
    for (;;) {
        if (rc)
            atomic_store(&board->error, -rc);
        sem_post(&board->answered); /* ready; then: the child has ended */
        sleep_until_posted(&board->asked);
        rc = serve_fork(board, data);
    }
}

int64_t pauses_fork(struct pauses_board *board) {
    sem_post(&board->asked);
    int rc = await(board, &board->answered, 1);
    return rc ? rc : board->forked;
}

int64_t pauses_await_child(struct pauses_board *board) {
    int rc = await(board, &board->answered, 1);
    return rc ? rc : board->ended;
}
