/* file.c - descriptors and files: reopening, private tables, record locks, holes, where memory comes from.
 *
 * Runs in: caller, agent, forked child.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "os/os.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL /* Linux 6.9 */
#endif
#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif
#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE (1U << 1)
#endif

int ps_sys_memfd(const char *name, uint64_t page_size) {
    unsigned size = (unsigned)__builtin_ctzll(page_size);
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (size == 12 ? 0 : MFD_HUGETLB | size << MFD_HUGE_SHIFT);
    int fd = ps_sys_result(syscall(SYS_memfd_create, name, flags | MFD_EXEC));
    return fd == -EINVAL ? ps_sys_result(syscall(SYS_memfd_create, name, flags)) : fd; /* MFD_EXEC is Linux 6.3 */
}

/* Appends text or a decimal number at *end and keeps it terminated; paths here are short. */
void ps_sys_put_text(char **end, const char *text) {
    while (*text)
        *(*end)++ = *text++;
    **end = 0;
}

void ps_sys_put_number(char **end, unsigned long number) {
    char digits[20];
    int count = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while (number /= 10);
    while (count)
        *(*end)++ = digits[--count];
    **end = 0;
}

int ps_sys_reopen(int fd) {
    char path[64], *end = path;
    ps_sys_put_text(&end, "/proc/thread-self/fd/");
    ps_sys_put_number(&end, (unsigned long)fd);
    return ps_sys_result(open(path, O_RDWR | O_CLOEXEC));
}

bool ps_sys_refused(int error) {
    return error == -EACCES || error == -EPERM || error == -ENOENT;
}

int ps_sys_reopen_of(int pid, int tid, int fd) {
    char path[96], *end = path;
    ps_sys_put_text(&end, "/proc/");
    ps_sys_put_number(&end, (unsigned long)pid);
    ps_sys_put_text(&end, "/task/");
    ps_sys_put_number(&end, (unsigned long)tid);
    ps_sys_put_text(&end, "/fd/");
    ps_sys_put_number(&end, (unsigned long)fd);
    return ps_sys_result(open(path, O_RDWR | O_CLOEXEC));
}

static int close_from_to(unsigned first, unsigned last, unsigned flags) {
    return first > last ? 0 : ps_sys_result(syscall(SYS_close_range, first, last, flags));
}

/* Descriptors from `from` on, up to the least that is kept; returns that one + 1, or 0 when none is left. */
static unsigned close_to_next(const int *keep, int count, unsigned from, int *rc) {
    unsigned next = UINT_MAX;
    for (int i = 0; i < count; i++)
        if (keep[i] >= (int)from && (unsigned)keep[i] < next)
            next = (unsigned)keep[i];
    *rc = next == UINT_MAX ? close_from_to(from, UINT_MAX, 0) : next ? close_from_to(from, next - 1, 0) : 0;
    return next == UINT_MAX ? 0 : next + 1;
}

int ps_sys_private_table(const int *keep, int count) {
    unsigned from = 0;
    for (int i = 0; i < count; i++)
        if (keep[i] >= (int)from)
            from = (unsigned)keep[i] + 1;
    /* The first call unshares by copying all that it does not close; start with the largest part. */
    int rc = close_from_to(from, UINT_MAX, CLOSE_RANGE_UNSHARE);
    for (from = 0; !rc && (from = close_to_next(keep, count, from, &rc));)
        ;
    return rc;
}

/* -- Descriptors of others --------------------------------------------------------------------------------------- */

int ps_sys_fd_of_thread(int tid, int fd) {
    int process = ps_sys_result(syscall(SYS_pidfd_open, tid, PIDFD_THREAD)); /* -EINVAL before Linux 6.9 */
    if (process < 0)
        return process;
    int got = ps_sys_result(syscall(SYS_pidfd_getfd, process, fd, 0));
    close(process);
    return got;
}

int ps_sys_fd_high(int fd, int least) {
    struct rlimit limit;
    int high = ps_sys_result(fcntl(fd, F_DUPFD_CLOEXEC, least));
    if (high != -EINVAL || getrlimit(RLIMIT_NOFILE, &limit))
        return high;
    return ps_sys_result(fcntl(fd, F_DUPFD_CLOEXEC, (int)(limit.rlim_cur / 2))); /* the limit lies below */
}

/* -- Sockets ------------------------------------------------------------------------------------------------------ */

static struct flock ofd_byte(short type, uint64_t byte) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
}

int ps_sys_ofd_take(int fd, uint64_t byte) {
    struct flock lock = ofd_byte(F_WRLCK, byte);
    int rc = ps_sys_result(fcntl(fd, F_OFD_SETLK, &lock));
    return rc == -EACCES ? -EAGAIN : rc;
}

void ps_sys_ofd_drop(int fd, uint64_t byte) {
    struct flock lock = ofd_byte(F_UNLCK, byte);
    fcntl(fd, F_OFD_SETLK, &lock);
}

int ps_sys_ofd_free(int fd, uint64_t byte) {
    struct flock lock = ofd_byte(F_WRLCK, byte);
    int rc = ps_sys_result(fcntl(fd, F_OFD_GETLK, &lock));
    return rc < 0 ? rc : lock.l_type != F_WRLCK;
}

int ps_sys_write_at(int fd, const void *from, uint64_t length, uint64_t at) {
    ssize_t wrote = pwrite(fd, from, length, (off_t)at);
    return wrote < 0 ? -errno : (uint64_t)wrote == length ? 0 : -ENOSPC;
}

int ps_sys_punch(int fd, uint64_t at, uint64_t length) {
    return ps_sys_result(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length));
}

int ps_sys_allocate(int fd, uint64_t at, uint64_t length) {
    return ps_sys_result(fallocate(fd, 0, (off_t)at, (off_t)length));
}

int ps_sys_lock(void *at, uint64_t length) {
    return ps_sys_result(syscall(SYS_mlock2, at, length, MLOCK_ONFAULT));
}

/* The kernel takes one off the number of nodes, and libnuma adds it. */
int ps_sys_bind(void *at, uint64_t length, int mode, const unsigned long *nodes, uint64_t count) {
    return ps_sys_result(syscall(SYS_mbind, at, length, mode, nodes, count + 1, 0));
}

int ps_sys_policy(int *mode, unsigned long *nodes, uint64_t count) {
    return ps_sys_result(syscall(SYS_get_mempolicy, mode, nodes, count, NULL, 0));
}

int ps_sys_set_policy(int mode, const unsigned long *nodes, uint64_t count) {
    return ps_sys_result(syscall(SYS_set_mempolicy, mode, nodes, count + 1));
}
