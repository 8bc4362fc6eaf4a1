/* os.h - the door of os/: the kernel, without policy.
 *
 * Lives here: thin wrappers of system calls, which return a result or -errno;
 * what is read of /proc; the copy that can be continued where it faults.  Only
 * this folder calls syscall().
 * Not here: what any of it is used for.
 * Invariants
 *  1. No malloc, no stdio, no lock: everything here may be called in an agent, in
 *     a signal handler, and between fork and join.
 *  2. Nothing is repeated on EINTR: whoever waits decides what a signal means.
 */
#ifndef PS_OS_H
#define PS_OS_H

#include <errno.h>
#include <sys/syscall.h>
#include <time.h>

#include "types.h"

/* Newer than the headers of the oldest distributions that we build on. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_userfaultfd
#define SYS_userfaultfd 323
#endif

#define PS_NEVER INT64_MAX /* a deadline that does not come */
#define PS_MS INT64_C(1000000)
#define PS_BACKSTOP (2 * PS_MS) /* a wake can die with its receiver: look again */
#define PS_TIDS (1u << 22)      /* no thread has such an id, or a greater one (PID_MAX_LIMIT, linux/threads.h) */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

int64_t ps_sys_now(void);       /* CLOCK_MONOTONIC, ns */
uint64_t ps_sys_boottime(void); /* CLOCK_BOOTTIME, ns */
uint64_t ps_sys_realtime(void); /* CLOCK_REALTIME, ns */
uint64_t ps_sys_coarse(void);   /* CLOCK_MONOTONIC_COARSE, ns: some milliseconds late, and a third of the price */
void ps_sys_pause(void);
void ps_sys_yield(void); /* a tenth of a millisecond, for whoever waits for what nobody wakes for */
int ps_sys_gettid(void);
bool ps_sys_thread_exists(int tid);      /* in this process */
_Noreturn void ps_sys_exit_thread(void); /* this thread alone, at once */
int ps_sys_cpus(void);                   /* on which the calling thread may run */
int ps_sys_random(void *to, size_t length);

/* Sleep until woken, until the word differs (-EAGAIN), a signal (-EINTR) or the deadline (-ETIMEDOUT). */
int ps_sys_wait(struct ps_watch watch, uint32_t bitset, int64_t deadline);
/* The same on two words.  Where FUTEX_WAITV is missing (before Linux 5.16, or refused by seccomp) it sleeps on
 * the first word alone, at most 1 ms: the caller looks at the second again. */
int ps_sys_wait_two(struct ps_watch first, struct ps_watch second, int64_t deadline);
/* The same on up to PS_WATCH_MAX; the index of one that was woken.  Without FUTEX_WAITV as above. */
#define PS_WATCH_MAX 128u
int ps_sys_wait_many(const struct ps_watch *watch, uint32_t count, int64_t deadline);
int ps_sys_wake(_Atomic uint32_t *word, int count, uint32_t bitset);
void ps_sys_signal(int fd); /* an eventfd: + 1 */

int ps_sys_memfd(const char *name, uint64_t page_size); /* 4096, or that of huge pages */
/* Opens what `fd` of the calling thread's table refers to anew: a description of our own. */
int ps_sys_reopen(int fd);
/* ... could not be: this user may not open it, or there is no /proc.  The descriptor itself is as good as ever. */
bool ps_sys_refused(int error);
/* The same through another thread of this process, which may have a table of its own. */
int ps_sys_reopen_of(int pid, int tid, int fd);
/* A private table for the calling thread that holds the `count` descriptors of `keep` only (-1: none). */
int ps_sys_private_table(const int *keep, int count);

/* Away from nice and SCHED_IDLE, which the starter may have, where that is permitted. */
void ps_sys_normal_priority(void);

/* The kernel marks *word when this thread ends (set_robust_list); `node` is private memory that outlives it. */
struct ps_robust {
    void *head[3]; /* struct robust_list_head */
    void *node;    /* struct robust_list */
};
int ps_sys_mark_death(struct ps_robust *robust, _Atomic uint32_t *word);
int ps_sys_mark_nothing(struct ps_robust *robust);

/* Byte `byte` of an open file description: taken for it (-EAGAIN if another description has a lock on it); free?  Locks
 * to read, which who has a read-only descriptor can take too, keep it from being taken, and do not count as anybody's.
 */
int ps_sys_ofd_take(int fd, uint64_t byte);
void ps_sys_ofd_drop(int fd, uint64_t byte);
int ps_sys_ofd_free(int fd, uint64_t byte); /* 1, 0 or -errno */

int ps_sys_write_at(int fd, const void *from, uint64_t length, uint64_t at); /* all of it, or an error */
/* Gives the memory of a part of a file back: it reads as zero. */
int ps_sys_punch(int fd, uint64_t at, uint64_t length);
int ps_sys_allocate(int fd, uint64_t at, uint64_t length); /* after a signal -EINTR, and nothing, or less, is done */
/* Pages stay in memory from when they are mapped on. */
int ps_sys_lock(void *at, uint64_t length);

/* NUMA policies, as mbind(2) and set_mempolicy(2) have them: of a mapping, of the calling thread. */
int ps_sys_bind(void *at, uint64_t length, int mode, const unsigned long *nodes, uint64_t count);
int ps_sys_policy(int *mode, unsigned long *nodes, uint64_t count);
int ps_sys_set_policy(int mode, const unsigned long *nodes, uint64_t count);

/* userfaultfd(2), write protection only; what a store to a protected page gets is SIGBUS.
 * ENOENT: a part of the range is not registered (what lies before it is done).  ESRCH: that process has no memory left.
 * A descriptor that was closed meanwhile gives EBADF, another file's ENOTTY or EINVAL. */
int ps_sys_userfaultfd(void);
int ps_sys_uffd_register(int fd, uintptr_t at, uint64_t length);
int ps_sys_uffd_unregister(int fd, uintptr_t at, uint64_t length);
int ps_sys_uffd_protect(int fd, uintptr_t at, uint64_t length, bool on);
/* A mapping that keeps the file open as long as it stands (of a ring of io_uring, which may not be permitted); a forked
 * child does not have it. */
int ps_sys_keep_open(int fd, void **mapping);
void ps_sys_let_go(void *mapping);
bool ps_sys_uffd_ours(int fd); /* from ps_sys_userfaultfd, by pyshare in whatever process */
/* 1, 0 or -errno: is the page write-protected in that process (pagemap, Documentation/admin-guide/mm/pagemap.rst)? */
int ps_sys_uffd_protected(int pid, uintptr_t at);

/* A descriptor of another thread's table, which may be one of its own (Linux 6.9). */
int ps_sys_fd_of_thread(int tid, int fd);
/* The same descriptor under another number, closed by exec: at or above `least`, or, where the limit is below that, in
 * the upper half of what it allows: the lower half is for the program. */
int ps_sys_fd_high(int fd, int least);

/* Abstract datagram sockets with a name that the kernel chose: five hexadecimal digits.  One side asks, the other
 * answers by a descriptor and a number; -EAGAIN where no message is waiting. */
int ps_sys_socket(uint32_t *name);
int ps_sys_socket_ask(int socket, uint32_t name);
int ps_sys_socket_answer(int socket, int fd, uint32_t number); /* -EPERM: to another user, so not */
/* `pid` is the answering process as the kernel sees it, 0 if it is of another user. */
int ps_sys_socket_take(int socket, int *pid, int *fd, uint32_t *number);
int ps_sys_socket_wait(int socket, int64_t deadline);

/* Who a process is, beyond its pid. 0 where /proc does not say. */
uint64_t ps_sys_start_time(int pid); /* clock ticks of the machine, whatever the time namespace; one less or more */
uint64_t ps_sys_pid_namespace(void);
/* The words of this process's command line, each without the folders before it, as far as there is room; or "". */
void ps_sys_command(char *to, size_t size);
/* Can no thread of that process of our own pid namespace store any more?  Unknown counts as no; and so does a process
 * that was given its pid since, which has memory. */
bool ps_sys_process_gone(int pid);

/* -- What `pyshare doctor` asks: the bare calls, where the core's own wrapper has a way out (ext/probe.h). */

int ps_sys_probe_userfaultfd(int flags); /* a descriptor */
int ps_sys_probe_pidfd_open(int pid, unsigned flags);
int ps_sys_probe_pidfd_getfd(int pidfd, int fd);
int ps_sys_probe_waitv(_Atomic uint32_t *word, uint32_t value);

/* ThreadSanitizer has to be told of each change of stacks. */
#ifndef __has_feature
#define __has_feature(name) 0
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#include <sanitizer/tsan_interface.h>
#else
#define __tsan_get_current_fiber() NULL
#define __tsan_create_fiber(flags) NULL
#define __tsan_destroy_fiber(fiber) ((void)(fiber))
#define __tsan_switch_to_fiber(fiber, flags) ((void)(fiber))
#endif

/* copy.c: a copy that survives faults, since the signal handler knows it */
#define PS_COPY_NO_PAGE (UINT64_C(1) << 63) /* SIGBUS: allowed, but the kernel has no page for it */
struct ps_copied {
    size_t left;     /* bytes not copied */
    uintptr_t where; /* the address that could not be reached, with PS_COPY_NO_PAGE; 0 if all were copied */
};

extern const char ps_copy_instruction[] __attribute__((visibility("hidden")));
extern const char ps_copy_end[] __attribute__((visibility("hidden")));

/* copy.c */
struct ps_copied ps_copy_bytes(void *to, const void *from, size_t length); /* between the two below, or in a handler */

/* file.c */
void ps_sys_put_text(char **end, const char *text);
void ps_sys_put_number(char **end, unsigned long number);

/* sys.c */
bool ps_sys_thread_is_there(int pid, int tid);

static inline int ps_sys_result(long returned) {
    return returned < 0 ? -errno : (int)returned;
}

#endif
