/* peers.c - measurement code only: the peers and floors of `pyshare bench` that are C.
 *
 * Lives here: a signal broadcast with acknowledgement, changes through borrowed userfaultfds, a process that times its
 * own mprotect or goes through cycles, and working threads that store on demand.
 * Invariants
 *  1. A participant answers after its mprotect has returned, and exactly once a change.
 *  2. A caller's wait ends with -EINTR at a signal, so an alarm bounds it; a participant waits until it is killed.
 *  3. Waits are POSIX semaphores: sem_post may be called in a signal handler.
 * Not here: the core; of it only the wrappers of os/ are here, and what a capsule brings.  Nothing of the core uses
 * this file.
 */
#define _GNU_SOURCE
#include "bench/bench.h"

#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096u
#define LINE 64u     /* of the cache: a cell each */
#define SPIN 2000    /* looks at the answers before sleeping, where every participant has a CPU; as the core does */
#define LOOKS 500000 /* at a working thread's cell: some ms */

static struct peers_board *heard; /* the board of this process's signal handler */

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
    sem_init(&board->called, 1, 0);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&board->mutex, &attributes);
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
    volatile unsigned char *cell = cell_of(board, thread), *page = board->address;
    for (;;) {
        sleep_until_posted(&board->called);
        uint32_t work;
        while ((work = atomic_load_explicit(&board->work, memory_order_relaxed))) {
            if (work == PEERS_STORE) {
                ++*page;
            } else {
                ++*cell;
                (void)*page;
            }
            if (atomic_load_explicit(&board->at_work, memory_order_relaxed) != work)
                atomic_store_explicit(&board->at_work, work, memory_order_release); /* after the store to the page */
        }
        atomic_fetch_sub(&board->called_up, 1);
    }
}

int peers_set_work(struct peers_board *board, enum peers_work work, uint32_t called) {
    atomic_fetch_add(&board->called_up, called);
    atomic_store(&board->work, work);
    while (called--)
        if (sem_post(&board->called))
            return -errno;
    return 0;
}

int peers_await_work(struct peers_board *board, enum peers_work work) {
    atomic_store_explicit(&board->at_work, PEERS_REST, memory_order_relaxed);
    for (int i = 0; i < LOOKS; i++) {
        if (work ? atomic_load_explicit(&board->at_work, memory_order_acquire) == work : !board->called_up)
            return 1;
        __builtin_ia32_pause();
    }
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
    int64_t start = ps_sys_now();
    announce(board, count, prot);
    for (uint32_t i = 0; i < count; i++)
        if (kill(board->pids[i], SIGUSR1))
            return -errno;
    int rc = peers_protect(board, prot);
    if (!rc)
        rc = await_answers(board, count < board->cpus ? SPIN : 0);
    return rc ? rc : ps_sys_now() - start;
}

/* -- The bare remote change ------------------------------------------------------------------------------------ */

int peers_remote_open(struct peers_board *board) {
    int fd = ps_sys_userfaultfd();
    if (fd < 0)
        return fd;
    int rc = ps_sys_uffd_register(fd, (uintptr_t)board->address, board->length);
    if (!rc)
        return fd;
    close(fd);
    return rc;
}

int64_t peers_remote_change(struct peers_board *board, uint32_t count, int32_t prot) {
    bool on = !(prot & PROT_WRITE);
    int64_t start = ps_sys_now();
    for (uint32_t i = 0; i < count; i++) {
        int rc = ps_sys_uffd_protect(board->fds[i], (uintptr_t)board->address, board->length, on);
        if (rc)
            return rc;
    }
    return ps_sys_now() - start;
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
        int64_t start = ps_sys_now();
        int rc = peers_protect(board, board->prot);
        board->elapsed = ps_sys_now() - start;
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

/* -- The cycles ------------------------------------------------------------------------------------------------ */

struct cycles {
    int32_t fd, marks; /* a memfd, and a userfaultfd on `marked` */
    size_t length;     /* of the file */
    /* The first pages of the file: READ, and write-protected. */
    volatile unsigned char *plain, *marked;
};

#define CYCLED (16 * PAGE)  /* bytes of each mapping */
#define WITHIN (CYCLED / 2) /* the page in it */

static int lock_range(int fd, short kind) {
    struct flock range = {.l_type = kind, .l_whence = SEEK_SET, .l_start = WITHIN, .l_len = PAGE};
    return fcntl(fd, F_SETLKW, &range) ? -errno : 0;
}

static int prepare(struct cycles *all) {
    void *plain = mmap(NULL, CYCLED, PROT_READ, MAP_SHARED, all->fd, 0);
    void *marked = mmap(NULL, CYCLED, PROT_READ | PROT_WRITE, MAP_SHARED, all->fd, 0);
    if (plain == MAP_FAILED || marked == MAP_FAILED)
        return -errno;
    all->plain = plain;
    all->marked = marked;
    for (size_t at = 0; at < CYCLED; at += PAGE) {
        all->marked[at] = 0;
        (void)all->plain[at];
    }
    all->marks = ps_sys_userfaultfd();
    if (all->marks < 0)
        return 0; /* the cycle that needs it says so */
    int rc = ps_sys_uffd_register(all->marks, (uintptr_t)marked, CYCLED);
    return rc ? rc : ps_sys_uffd_protect(all->marks, (uintptr_t)marked, CYCLED, true);
}

static int by_mprotect(struct cycles *all) {
    void *page = (void *)(all->plain + WITHIN);
    if (mprotect(page, PAGE, PROT_READ | PROT_WRITE))
        return -errno;
    ++all->plain[WITHIN];
    return mprotect(page, PAGE, PROT_READ) ? -errno : 0;
}

static int by_uffd(struct cycles *all) {
    uintptr_t page = (uintptr_t)(all->marked + WITHIN);
    int rc = all->marks < 0 ? all->marks : ps_sys_uffd_protect(all->marks, page, PAGE, false);
    if (rc)
        return rc;
    ++all->marked[WITHIN];
    return ps_sys_uffd_protect(all->marks, page, PAGE, true);
}

static int by_fcntl(struct cycles *all, volatile unsigned char *cell) {
    int rc = lock_range(all->fd, F_WRLCK);
    if (rc)
        return rc;
    ++*cell;
    return lock_range(all->fd, F_UNLCK);
}

static int by_mutex(pthread_mutex_t *mutex, volatile unsigned char *cell) {
    int rc = pthread_mutex_lock(mutex);
    if (rc)
        return -rc;
    ++*cell;
    return -pthread_mutex_unlock(mutex);
}

static void *do_nothing(void *unused) {
    return unused;
}

static int by_thread(void) {
    pthread_t thread;
    int rc = pthread_create(&thread, NULL, do_nothing, NULL);
    return rc ? -rc : -pthread_join(thread, NULL);
}

static int cycle_once(struct peers_board *board, struct cycles *all) {
    switch (board->cycle) {
    case PEERS_MPROTECT:
        return by_mprotect(all);
    case PEERS_UFFD:
        return by_uffd(all);
    case PEERS_FCNTL:
        return by_fcntl(all, board->cells);
    case PEERS_MUTEX:
        return by_mutex(&board->mutex, board->cells);
    case PEERS_THREAD:
        return by_thread();
    default:
        return -EINVAL;
    }
}

/* One goes unmeasured first: whoever used the caches before, code and data are in them again. */
static int64_t go_through(struct peers_board *board, struct cycles *all) {
    int rc = cycle_once(board, all);
    int64_t start = ps_sys_now();
    for (int32_t i = 0; i < board->times && !rc; i++)
        rc = cycle_once(board, all);
    return rc ? rc : ps_sys_now() - start;
}

static int64_t map_once(struct cycles *all, bool and_unmap) {
    int64_t start = ps_sys_now();
    void *mapped = mmap(NULL, all->length, PROT_READ | PROT_WRITE, MAP_SHARED, all->fd, 0);
    int64_t between = ps_sys_now();
    if (mapped == MAP_FAILED || munmap(mapped, all->length))
        return -errno;
    return (and_unmap ? ps_sys_now() : between) - start;
}

static int64_t map_often(struct peers_board *board, struct cycles *all) {
    int64_t elapsed = 0, rc = map_once(all, true);
    for (int32_t i = 0; i < board->times && rc >= 0; i++) {
        rc = map_once(all, board->cycle == PEERS_MAP_UNMAP);
        elapsed += rc;
    }
    return rc < 0 ? rc : elapsed;
}

void peers_cycle_serve(struct peers_board *board, int32_t fd, size_t length) {
    struct cycles all = {.fd = fd, .length = length};
    int rc = prepare(&all);
    for (;;) {
        sleep_until_posted(&board->asked);
        int64_t elapsed = rc ? rc : board->cycle < PEERS_MAP ? go_through(board, &all) : map_often(board, &all);
        board->elapsed = elapsed;
        answer(board, elapsed < 0 ? (int)elapsed : 0);
    }
}

int64_t peers_cycle(struct peers_board *board, enum peers_cycle cycle, int32_t times) {
    board->cycle = (int32_t)cycle;
    board->times = times;
    return peers_floor_change(board, PROT_NONE);
}

/* -- The core's own cycles --------------------------------------------------------------------------------------- */

static int lease_once(const struct ps_calls *calls, struct ps_region *region, struct ps_lease *lease) {
    struct ps_outcome outcome;
    struct ps_refusal refusal;
    int rc = calls->lease_take(region, lease, PS_NEVER, &outcome, &refusal);
    if (rc)
        return rc;
    volatile unsigned char *data = lease->window ? calls->window(region) : calls->address(region);
    ++data[lease->first * PAGE];
    return calls->lease_give(region, lease, PS_NEVER);
}

int64_t peers_core_lease(const struct ps_calls *calls, struct ps_region *region, uint64_t page, bool window,
                         int32_t times) {
    struct ps_lease lease = {.first = page, .count = 1, .window = window};
    int rc = lease_once(calls, region, &lease);
    int64_t start = ps_sys_now();
    for (int32_t i = 0; i < times && !rc; i++)
        rc = lease_once(calls, region, &lease);
    return rc ? rc : ps_sys_now() - start;
}

static int lock_once(const struct ps_calls *calls, struct ps_region *region, uint32_t index, volatile int *cell) {
    struct ps_outcome outcome;
    bool abandoned;
    int rc = calls->lock_take(region, index, PS_NEVER, &abandoned, &outcome);
    if (rc)
        return rc;
    ++*cell;
    calls->lock_give(region, index, false);
    return 0;
}

int64_t peers_core_lock(const struct ps_calls *calls, struct ps_region *region, uint32_t index, int32_t times) {
    volatile int cell = 0;
    int rc = lock_once(calls, region, index, &cell);
    int64_t start = ps_sys_now();
    for (int32_t i = 0; i < times && !rc; i++)
        rc = lock_once(calls, region, index, &cell);
    return rc ? rc : ps_sys_now() - start;
}
