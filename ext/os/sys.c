/* sys.c - time, threads, futexes.
 *
 * Runs in: caller, agent, signal handler, forked child.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "os/os.h"
#include "types.h"

/* Newer than the headers of the oldest distributions that we build on. */
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#define WAITV_32 2 /* FUTEX2_SIZE_U32, not private */

struct waitv {
    uint64_t value, address;
    uint32_t flags, reserved;
};

static struct timespec timespec_of(int64_t ns) {
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int64_t ps_sys_now(void) {
    return (int64_t)clock_ns(CLOCK_MONOTONIC);
}

uint64_t ps_sys_boottime(void) {
    return clock_ns(CLOCK_BOOTTIME);
}

uint64_t ps_sys_realtime(void) {
    return clock_ns(CLOCK_REALTIME);
}

uint64_t ps_sys_coarse(void) {
    return clock_ns(CLOCK_MONOTONIC_COARSE);
}

void ps_sys_pause(void) {
    _Atomic uint32_t nobody_wakes = 0;
    ps_sys_wait((struct ps_watch){&nobody_wakes, 0}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS / 10);
}

void ps_sys_yield(void) {
    sched_yield();
}

int ps_sys_gettid(void) {
    return (int)syscall(SYS_gettid);
}

/* A thread that has ended and stays as a zombie (the first of a process whose others go on) can still be signalled; but
 * it has no robust list any more, which glibc gives to each, and the agent to itself. */
static bool has_robust_list(int tid) {
#ifdef __GLIBC__
    void *head;
    size_t length;
    return syscall(SYS_get_robust_list, tid, &head, &length) || head;
#else
    (void)tid;
    return true;
#endif
}

bool ps_sys_thread_is_there(int pid, int tid) {
    return ps_sys_result(syscall(SYS_tgkill, pid, tid, 0)) != -ESRCH;
}

bool ps_sys_thread_exists(int tid) {
    return ps_sys_thread_is_there(getpid(), tid) && has_robust_list(tid);
}

void ps_sys_exit_thread(void) {
    for (;;)
        syscall(SYS_exit, 0);
}

int ps_sys_cpus(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
}

int ps_sys_random(void *to, size_t length) {
    ssize_t got = getrandom(to, length, 0);
    return got == (ssize_t)length ? 0 : got < 0 ? -errno : -EIO;
}

int ps_sys_wait(struct ps_watch watch, uint32_t bitset, int64_t deadline) {
    struct timespec at = timespec_of(deadline);
    return ps_sys_result(syscall(SYS_futex, watch.word, FUTEX_WAIT_BITSET, watch.value,
                                 deadline == PS_NEVER ? NULL : &at, NULL, bitset));
}

static struct waitv waitv_of(struct ps_watch watch) {
    return (struct waitv){.value = watch.value, .address = (uintptr_t)watch.word, .flags = WAITV_32};
}

static int wait_vector(const struct waitv *words, uint32_t count, struct ps_watch first, int64_t deadline) {
    struct timespec at = timespec_of(deadline);
    int rc =
        ps_sys_result(syscall(SYS_futex_waitv, words, count, 0, deadline == PS_NEVER ? NULL : &at, CLOCK_MONOTONIC));
    if (rc >= 0 || rc == -EAGAIN || rc == -EINTR || rc == -ETIMEDOUT)
        return rc;
    int64_t slice = ps_sys_now() + PS_MS;
    return ps_sys_wait(first, FUTEX_BITSET_MATCH_ANY, slice < deadline ? slice : deadline);
}

int ps_sys_wait_two(struct ps_watch first, struct ps_watch second, int64_t deadline) {
    struct waitv both[2] = {waitv_of(first), waitv_of(second)};
    int rc = wait_vector(both, 2, first, deadline);
    return rc < 0 ? rc : 0;
}

int ps_sys_wait_many(const struct ps_watch *watch, uint32_t count, int64_t deadline) {
    struct waitv words[PS_WATCH_MAX];
    for (uint32_t i = 0; i < count; i++)
        words[i] = waitv_of(watch[i]);
    return wait_vector(words, count, watch[0], deadline);
}

void ps_sys_signal(int fd) {
    uint64_t one = 1;
    ssize_t written = write(fd, &one, sizeof one);
    (void)written; /* full: it is readable */
}

int ps_sys_wake(_Atomic uint32_t *word, int count, uint32_t bitset) {
    return ps_sys_result(syscall(SYS_futex, word, FUTEX_WAKE_BITSET, count, NULL, NULL, bitset));
}

void ps_sys_normal_priority(void) {
    struct sched_param none = {0};
    if (sched_getscheduler(0) == SCHED_IDLE || sched_getscheduler(0) == SCHED_BATCH)
        sched_setscheduler(0, SCHED_OTHER, &none);
    if (getpriority(PRIO_PROCESS, 0) > 0)
        setpriority(PRIO_PROCESS, 0, 0);
}

int ps_sys_mark_death(struct ps_robust *robust, _Atomic uint32_t *word) {
    struct robust_list_head *head = (struct robust_list_head *)robust->head;
    static_assert(sizeof robust->head == sizeof *head, "robust list head");
    robust->node = &head->list;
    head->list.next = (struct robust_list *)&robust->node;
    head->futex_offset = (long)((char *)word - (char *)&robust->node);
    head->list_op_pending = NULL;
    return ps_sys_result(syscall(SYS_set_robust_list, head, sizeof *head));
}

int ps_sys_mark_nothing(struct ps_robust *robust) {
    struct robust_list_head *head = (struct robust_list_head *)robust->head;
    head->list.next = &head->list;
    return ps_sys_result(syscall(SYS_set_robust_list, head, sizeof *head));
}

/* -- What `pyshare doctor` asks ---------------------------------------------------------------------------------- */

int ps_sys_probe_userfaultfd(int flags) {
    return ps_sys_result(syscall(SYS_userfaultfd, flags));
}

int ps_sys_probe_pidfd_open(int pid, unsigned flags) {
    return ps_sys_result(syscall(SYS_pidfd_open, pid, flags));
}

int ps_sys_probe_pidfd_getfd(int pidfd, int fd) {
    return ps_sys_result(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

int ps_sys_probe_waitv(_Atomic uint32_t *word, uint32_t value) {
    struct waitv one = {.value = value, .address = (uintptr_t)word, .flags = WAITV_32};
    return ps_sys_result(syscall(SYS_futex_waitv, &one, 1, 0, NULL, CLOCK_MONOTONIC));
}
