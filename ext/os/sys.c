/* sys.c - see sys.h.  Runs in: caller, agent, signal handler, fork child. */
#define _GNU_SOURCE
#include "sys.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Newer than the headers of the oldest distributions that we build on. */
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL /* Linux 6.9 */
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12) /* Linux 5.19 */
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
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_register 427
#endif
#define REGISTER_FILES 2  /* IORING_REGISTER_FILES */
#define WAITV_32 2        /* FUTEX2_SIZE_U32, not private */
#define COMMAND_LINE 1024 /* bytes of it that are read */
#define PAGE 4096u
#define INITIAL_TIME 0xEFFFFFFAu /* inode of the first time namespace (PROC_TIME_INIT_INO, linux/proc_ns.h) */
#define TICKS 100u               /* a second, where x86-64 tells clock ticks (USER_HZ) */

struct waitv {
    uint64_t value, address;
    uint32_t flags, reserved;
};

struct dirent64 {
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

static int result(long returned) {
    return returned < 0 ? -errno : (int)returned;
}

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

static bool thread_exists(int pid, int tid) {
    return result(syscall(SYS_tgkill, pid, tid, 0)) != -ESRCH;
}

bool ps_sys_thread_exists(int tid) {
    return thread_exists(getpid(), tid) && has_robust_list(tid);
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
    return result(syscall(SYS_futex, watch.word, FUTEX_WAIT_BITSET, watch.value, deadline == PS_NEVER ? NULL : &at,
                          NULL, bitset));
}

static struct waitv waitv_of(struct ps_watch watch) {
    return (struct waitv){.value = watch.value, .address = (uintptr_t)watch.word, .flags = WAITV_32};
}

static int wait_vector(const struct waitv *words, uint32_t count, struct ps_watch first, int64_t deadline) {
    struct timespec at = timespec_of(deadline);
    int rc = result(syscall(SYS_futex_waitv, words, count, 0, deadline == PS_NEVER ? NULL : &at, CLOCK_MONOTONIC));
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
    return result(syscall(SYS_futex, word, FUTEX_WAKE_BITSET, count, NULL, NULL, bitset));
}

int ps_sys_memfd(const char *name, uint64_t page_size) {
    unsigned size = (unsigned)__builtin_ctzll(page_size);
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (size == 12 ? 0 : MFD_HUGETLB | size << MFD_HUGE_SHIFT);
    int fd = result(syscall(SYS_memfd_create, name, flags | MFD_EXEC));
    return fd == -EINVAL ? result(syscall(SYS_memfd_create, name, flags)) : fd; /* MFD_EXEC is Linux 6.3 */
}

/* Appends text or a decimal number at *end and keeps it terminated; paths here are short. */
static void put_text(char **end, const char *text) {
    while (*text)
        *(*end)++ = *text++;
    **end = 0;
}

static void put_number(char **end, unsigned long number) {
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
    put_text(&end, "/proc/thread-self/fd/");
    put_number(&end, (unsigned long)fd);
    return result(open(path, O_RDWR | O_CLOEXEC));
}

bool ps_sys_refused(int error) {
    return error == -EACCES || error == -EPERM || error == -ENOENT;
}

int ps_sys_reopen_of(int pid, int tid, int fd) {
    char path[96], *end = path;
    put_text(&end, "/proc/");
    put_number(&end, (unsigned long)pid);
    put_text(&end, "/task/");
    put_number(&end, (unsigned long)tid);
    put_text(&end, "/fd/");
    put_number(&end, (unsigned long)fd);
    return result(open(path, O_RDWR | O_CLOEXEC));
}

static int close_from_to(unsigned first, unsigned last, unsigned flags) {
    return first > last ? 0 : result(syscall(SYS_close_range, first, last, flags));
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
    return result(syscall(SYS_set_robust_list, head, sizeof *head));
}

int ps_sys_mark_nothing(struct ps_robust *robust) {
    struct robust_list_head *head = (struct robust_list_head *)robust->head;
    head->list.next = &head->list;
    return result(syscall(SYS_set_robust_list, head, sizeof *head));
}

/* -- userfaultfd ------------------------------------------------------------------------------------------------ */

int ps_sys_userfaultfd(void) {
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_SIGBUS,
    };
    int fd = result(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY));
    int rc = fd < 0 ? fd : result(ioctl(fd, UFFDIO_API, &api));
    if (!rc)
        rc = result(fcntl(fd, F_SETFL, O_NONBLOCK | O_APPEND)); /* means nothing here, so nobody else asks for it */
    if (rc < 0 && fd >= 0)
        close(fd);
    return rc < 0 ? rc : fd;
}

bool ps_sys_uffd_ours(int fd) {
    long flags = syscall(SYS_fcntl, fd, F_GETFL); /* libc's has more to look at first */
    return flags >= 0 && flags & O_APPEND;
}

int ps_sys_uffd_register(int fd, uintptr_t at, uint64_t length) {
    struct uffdio_register range = {.range = {at, length}, .mode = UFFDIO_REGISTER_MODE_WP};
    return result(ioctl(fd, UFFDIO_REGISTER, &range));
}

int ps_sys_uffd_unregister(int fd, uintptr_t at, uint64_t length) {
    struct uffdio_range range = {at, length};
    return result(ioctl(fd, UFFDIO_UNREGISTER, &range));
}

/* Before Linux 6.3 or so a range is of one VMA, and any other one is ENOENT, as where nothing is registered: so smaller
 * parts are tried, down to a page, which tells the two apart. */
int ps_sys_uffd_protect(int fd, uintptr_t at, uint64_t length, bool on) {
    struct uffdio_writeprotect part = {.range = {at, length}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    for (uint64_t left = length; left;) {
        int rc = result(syscall(SYS_ioctl, fd, UFFDIO_WRITEPROTECT, &part)); /* a step shorter than libc's */
        if (rc == -ENOENT && part.range.len > PAGE) {
            part.range.len = part.range.len / PAGE / 2 * PAGE;
        } else if (rc) {
            return rc;
        } else {
            left -= part.range.len;
            part.range.start += part.range.len;
            part.range.len = left;
        }
    }
    return 0;
}

/* A ring of io_uring has a table of files of its own, and lives as long as a mapping of it does.  By bare calls: of
 * what libc has not opened ThreadSanitizer does not know that the number is new, in the table of this thread alone. */
int ps_sys_keep_open(int fd, void **mapping) {
    uint32_t parameters[30] = {0}; /* struct io_uring_params: nothing is asked for, and nobody uses the ring */
    int ring = result(syscall(SYS_io_uring_setup, 1, parameters));
    if (ring < 0)
        return ring;
    int rc = result(syscall(SYS_io_uring_register, ring, REGISTER_FILES, &fd, 1));
    void *at = rc ? MAP_FAILED : (void *)syscall(SYS_mmap, NULL, PAGE, PROT_NONE, MAP_SHARED, ring, 0);
    if (!rc && at == MAP_FAILED)
        rc = -errno;
    if (!rc && madvise(at, PAGE, MADV_DONTFORK)) {
        rc = -errno;
        munmap(at, PAGE);
    }
    if (!rc)
        *mapping = at;
    syscall(SYS_close, ring);
    return rc;
}

void ps_sys_let_go(void *mapping) {
    munmap(mapping, PAGE);
}

int ps_sys_uffd_protected(int pid, uintptr_t at) {
    char path[48], *end = path;
    uint64_t entry;
    put_text(&end, "/proc/");
    put_number(&end, (unsigned long)pid);
    put_text(&end, "/pagemap");
    int fd = result(open(path, O_RDONLY | O_CLOEXEC));
    if (fd < 0)
        return fd;
    ssize_t got = pread(fd, &entry, sizeof entry, (off_t)(at / PAGE * sizeof entry));
    int rc = got < 0 ? -errno : got == sizeof entry ? (int)(entry >> 57 & 1) : -EIO;
    close(fd);
    return rc;
}

/* -- Descriptors of others --------------------------------------------------------------------------------------- */

int ps_sys_fd_of_thread(int tid, int fd) {
    int process = result(syscall(SYS_pidfd_open, tid, PIDFD_THREAD)); /* -EINVAL before Linux 6.9 */
    if (process < 0)
        return process;
    int got = result(syscall(SYS_pidfd_getfd, process, fd, 0));
    close(process);
    return got;
}

int ps_sys_fd_high(int fd, int least) {
    struct rlimit limit;
    int high = result(fcntl(fd, F_DUPFD_CLOEXEC, least));
    if (high != -EINVAL || getrlimit(RLIMIT_NOFILE, &limit))
        return high;
    return result(fcntl(fd, F_DUPFD_CLOEXEC, (int)(limit.rlim_cur / 2))); /* the limit lies below */
}

/* -- Sockets ------------------------------------------------------------------------------------------------------ */

/* An abstract address: a zero byte and what follows it, here five hexadecimal digits (unix(7), "Autobind feature"). */
#define DIGITS 5
#define ADDRESS_LENGTH (offsetof(struct sockaddr_un, sun_path) + 1 + DIGITS)

union control {
    struct cmsghdr header; /* for its alignment */
    char space[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof(int))];
};

static int bind_anywhere(int fd, uint32_t *name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t length = sizeof address;
    int rc = result(bind(fd, (struct sockaddr *)&address, sizeof address.sun_family));
    if (!rc)
        rc = result(getsockname(fd, (struct sockaddr *)&address, &length));
    if (!rc && length != ADDRESS_LENGTH)
        rc = -EINVAL;
    *name = 0;
    for (int i = 1; !rc && i <= DIGITS; i++) {
        char digit = address.sun_path[i];
        *name = *name << 4 | (uint32_t)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    return rc;
}

int ps_sys_socket(uint32_t *name) {
    int on = 1, fd = result(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    int rc = fd < 0 ? fd : result(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    if (!rc)
        rc = bind_anywhere(fd, name);
    if (rc < 0 && fd >= 0)
        close(fd);
    return rc < 0 ? rc : fd;
}

int ps_sys_socket_ask(int socket, uint32_t name) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    for (int i = 0; i < DIGITS; i++)
        address.sun_path[1 + i] = "0123456789abcdef"[name >> 4 * (DIGITS - 1 - i) & 15];
    return result(sendto(socket, "", 1, MSG_NOSIGNAL, (struct sockaddr *)&address, ADDRESS_LENGTH));
}

/* The padding of a control message for one descriptor has room for a second: it must not stay open. */
static int only_one(struct cmsghdr *rights) {
    int fds[2] = {-1, -1};
    size_t length = rights->cmsg_len - CMSG_LEN(0);
    memcpy(fds, CMSG_DATA(rights), length < sizeof fds ? length : sizeof fds);
    if (fds[1] >= 0)
        close(fds[1]);
    return fds[0];
}

struct message {
    struct sockaddr_un from;
    struct ucred who;
    int fd; /* -1: none came with it */
    uint32_t number;
};

static int receive(int socket, struct message *got) {
    union control control;
    struct iovec io = {&got->number, sizeof got->number};
    struct msghdr message = {.msg_name = &got->from,
                             .msg_namelen = sizeof got->from,
                             .msg_iov = &io,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = sizeof control.space};
    int rc = result(recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT));
    got->fd = -1;
    got->who = (struct ucred){.pid = 0, .uid = (uid_t)-1};
    if (rc < 0)
        return rc;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(&message); at; at = CMSG_NXTHDR(&message, at)) {
        if (at->cmsg_level == SOL_SOCKET && at->cmsg_type == SCM_CREDENTIALS)
            memcpy(&got->who, CMSG_DATA(at), sizeof got->who);
        if (at->cmsg_level == SOL_SOCKET && at->cmsg_type == SCM_RIGHTS)
            got->fd = only_one(at);
    }
    return 0;
}

int ps_sys_socket_answer(int socket, int fd, uint32_t number) {
    struct message asked;
    int rc = receive(socket, &asked);
    if (rc)
        return rc;
    if (asked.fd >= 0) /* nobody who asks sends one */
        close(asked.fd);
    if (asked.who.uid != geteuid())
        return -EPERM;
    union control control = {.space = {0}};
    struct iovec io = {&number, sizeof number};
    struct msghdr message = {.msg_name = &asked.from,
                             .msg_namelen = ADDRESS_LENGTH,
                             .msg_iov = &io,
                             .msg_iovlen = 1,
                             .msg_control = control.space,
                             .msg_controllen = CMSG_SPACE(sizeof fd)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    rc = result(sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT));
    return rc < 0 ? rc : 0;
}

int ps_sys_socket_take(int socket, int *pid, int *fd, uint32_t *number) {
    struct message answer;
    int rc = receive(socket, &answer);
    *pid = answer.who.uid == geteuid() ? answer.who.pid : 0;
    *fd = answer.fd;
    *number = answer.number;
    return rc;
}

int ps_sys_socket_wait(int socket, int64_t deadline) {
    int64_t left = deadline - ps_sys_now();
    struct pollfd poller = {.fd = socket, .events = POLLIN};
    int rc = result(poll(&poller, 1, left <= 0 ? 0 : (int)(left / PS_MS) + 1));
    return rc < 0 ? rc : rc ? 0 : -ETIMEDOUT;
}

static struct flock ofd_byte(short type, uint64_t byte) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)byte, .l_len = 1};
}

int ps_sys_ofd_take(int fd, uint64_t byte) {
    struct flock lock = ofd_byte(F_WRLCK, byte);
    int rc = result(fcntl(fd, F_OFD_SETLK, &lock));
    return rc == -EACCES ? -EAGAIN : rc;
}

void ps_sys_ofd_drop(int fd, uint64_t byte) {
    struct flock lock = ofd_byte(F_UNLCK, byte);
    fcntl(fd, F_OFD_SETLK, &lock);
}

int ps_sys_ofd_free(int fd, uint64_t byte) {
    struct flock lock = ofd_byte(F_WRLCK, byte);
    int rc = result(fcntl(fd, F_OFD_GETLK, &lock));
    return rc < 0 ? rc : lock.l_type != F_WRLCK;
}

int ps_sys_write_at(int fd, const void *from, uint64_t length, uint64_t at) {
    ssize_t wrote = pwrite(fd, from, length, (off_t)at);
    return wrote < 0 ? -errno : (uint64_t)wrote == length ? 0 : -ENOSPC;
}

int ps_sys_punch(int fd, uint64_t at, uint64_t length) {
    return result(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)length));
}

int ps_sys_allocate(int fd, uint64_t at, uint64_t length) {
    return result(fallocate(fd, 0, (off_t)at, (off_t)length));
}

int ps_sys_lock(void *at, uint64_t length) {
    return result(syscall(SYS_mlock2, at, length, MLOCK_ONFAULT));
}

/* The kernel takes one off the number of nodes, and libnuma adds it. */
int ps_sys_bind(void *at, uint64_t length, int mode, const unsigned long *nodes, uint64_t count) {
    return result(syscall(SYS_mbind, at, length, mode, nodes, count + 1, 0));
}

int ps_sys_policy(int *mode, unsigned long *nodes, uint64_t count) {
    return result(syscall(SYS_get_mempolicy, mode, nodes, count, NULL, 0));
}

int ps_sys_set_policy(int mode, const unsigned long *nodes, uint64_t count) {
    return result(syscall(SYS_set_mempolicy, mode, nodes, count + 1));
}

/* Reads a small file of /proc; the length, or -errno. */
static int read_file(const char *path, char *to, size_t size) {
    int fd = result(open(path, O_RDONLY | O_CLOEXEC));
    if (fd < 0)
        return fd;
    int length = result(read(fd, to, size - 1));
    close(fd);
    to[length < 0 ? 0 : length] = 0;
    return length;
}

static uint64_t number_of(const char *digits) {
    uint64_t number = 0;
    while (*digits >= '0' && *digits <= '9')
        number = number * 10 + (uint64_t)(*digits++ - '0');
    return number;
}

static const char *next_word(const char *text) {
    while (*text && *text != ' ')
        text++;
    while (*text == ' ')
        text++;
    return text;
}

/* Clock ticks by which our time namespace shifts what is told in the machine's boot time.  Who has made one for its
 * children is told theirs, so it does not know its own. */
static bool boottime_shift(uint64_t *ticks) {
    struct stat own, children;
    char text[128];
    *ticks = 0;
    if (stat("/proc/self/ns/time", &own))
        return errno == ENOENT; /* of a kernel without them */
    if (own.st_ino == INITIAL_TIME)
        return true;
    if (stat("/proc/self/ns/time_for_children", &children) || children.st_ino != own.st_ino ||
        read_file("/proc/self/timens_offsets", text, sizeof text) <= 0)
        return false;
    const char *line = strchr(text, '\n'); /* the second is "boottime SECONDS NANOSECONDS" */
    const char *seconds = line ? next_word(line + 1) : text, *nanoseconds = next_word(seconds);
    uint64_t whole = number_of(*seconds == '-' ? seconds + 1 : seconds) * TICKS;
    *ticks = (*seconds == '-' ? -whole : whole) + number_of(nanoseconds) / (1000000000 / TICKS);
    return true;
}

uint64_t ps_sys_start_time(int pid) {
    char path[48], text[1024], *end = path;
    uint64_t shift;
    put_text(&end, "/proc/");
    put_number(&end, (unsigned long)pid);
    put_text(&end, "/stat");
    if (!boottime_shift(&shift) || read_file(path, text, sizeof text) <= 0)
        return 0;
    char *at = strrchr(text, ')'); /* the command may hold spaces and parentheses */
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? number_of(at + 1) - shift : 0;
}

uint64_t ps_sys_pid_namespace(void) {
    struct stat ns;
    return stat("/proc/thread-self/ns/pid", &ns) ? 0 : (uint64_t)ns.st_ino;
}

void ps_sys_command(char *to, size_t size) {
    char line[COMMAND_LINE];
    int length = read_file("/proc/self/cmdline", line, sizeof line);
    size_t word = 0, end = 0;
    for (int i = 0; i < length; i++) {
        if (line[i] == '/')
            end = word;
        else if (end < size - 1)
            to[end++] = line[i] ? line[i] : ' ';
        if (!line[i])
            word = end;
    }
    to[end && to[end - 1] == ' ' ? end - 1 : end] = 0; /* each word ends with a NUL, the last one too */
}

/* A /proc of another pid namespace (a container's) speaks of other processes under our numbers. */
static bool proc_is_ours(void) {
    char text[24], mine[24], *end = mine;
    ssize_t length = readlink("/proc/self", text, sizeof text - 1);
    put_number(&end, (unsigned long)getpid());
    return length > 0 && (size_t)length == strlen(mine) && !memcmp(text, mine, (size_t)length);
}

/* Where its file cannot be read (no descriptor is left, /proc hides it), only of one that is no more. */
static bool thread_without_memory(const char *statm, int pid, int tid) {
    char text[64];
    return read_file(statm, text, sizeof text) > 0 ? !memcmp(text, "0 ", 2) : !thread_exists(pid, tid);
}

/* 1: every thread has given up its memory; 0: one has not; -errno: cannot tell. */
static int threads_without_memory(int pid) {
    char path[64], buffer[2048] __attribute__((aligned(8))), *tasks = path;
    put_text(&tasks, "/proc/");
    put_number(&tasks, (unsigned long)pid);
    put_text(&tasks, "/task");
    int dir = result(open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)), length, seen = 0, held = 0;
    if (dir < 0)
        return dir;
    while (!held && (length = result(syscall(SYS_getdents64, dir, buffer, sizeof buffer))) > 0)
        for (int at = 0; at < length && !held; at += ((struct dirent64 *)(buffer + at))->length) {
            const char *name = ((struct dirent64 *)(buffer + at))->name;
            char *end = tasks;
            if (name[0] == '.' || strlen(name) > 10)
                continue;
            seen++;
            put_text(&end, "/");
            put_text(&end, name);
            put_text(&end, "/statm");
            held = !thread_without_memory(path, pid, (int)number_of(name));
        }
    close(dir);
    return held ? 0 : length < 0 ? length : seen ? 1 : -ESRCH;
}

static bool pidfd_says_gone(int pid) {
    int fd = result(syscall(SYS_pidfd_open, pid, 0));
    if (fd < 0)
        return fd == -ESRCH;
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    bool gone = poll(&poller, 1, 0) == 1 && poller.revents & POLLIN;
    close(fd);
    return gone;
}

bool ps_sys_process_gone(int pid) {
    if (pid <= 0)
        return false;
    if (kill(pid, 0) && errno == ESRCH)
        return true;
    if (!proc_is_ours())
        return pidfd_says_gone(pid);
    /* Twice: a directory that is read while threads come and go may miss one. */
    if (threads_without_memory(pid) == 1 && threads_without_memory(pid) == 1)
        return true;
    return pidfd_says_gone(pid);
}

/* -- What `pyshare doctor` asks ---------------------------------------------------------------------------------- */

#ifndef SYS_userfaultfd
#define SYS_userfaultfd 323
#endif

int ps_sys_probe_userfaultfd(int flags) {
    return result(syscall(SYS_userfaultfd, flags));
}

int ps_sys_probe_pidfd_open(int pid, unsigned flags) {
    return result(syscall(SYS_pidfd_open, pid, flags));
}

int ps_sys_probe_pidfd_getfd(int pidfd, int fd) {
    return result(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

int ps_sys_probe_waitv(_Atomic uint32_t *word, uint32_t value) {
    struct waitv one = {.value = value, .address = (uintptr_t)word, .flags = WAITV_32};
    return result(syscall(SYS_futex_waitv, &one, 1, 0, NULL, CLOCK_MONOTONIC));
}
