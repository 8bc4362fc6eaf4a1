/* uffd.c - userfaultfd: marks in page tables that keep stores out.
 *
 * Lives here: opening one, registering ranges, protecting them, telling whose it
 * is, and keeping one open when the program closes descriptors (io_uring).
 * Runs in: caller, agent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "os/os.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12) /* Linux 5.19 */
#endif
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_register 427
#endif
#define REGISTER_FILES 2 /* IORING_REGISTER_FILES */
#define PAGE 4096u

int ps_sys_userfaultfd(void) {
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_SIGBUS,
    };
    int fd = ps_sys_result(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY));
    int rc = fd < 0 ? fd : ps_sys_result(ioctl(fd, UFFDIO_API, &api));
    if (!rc)
        rc = ps_sys_result(
            fcntl(fd, F_SETFL, O_NONBLOCK | O_APPEND)); /* means nothing here, so nobody else asks for it */
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
    return ps_sys_result(ioctl(fd, UFFDIO_REGISTER, &range));
}

int ps_sys_uffd_unregister(int fd, uintptr_t at, uint64_t length) {
    struct uffdio_range range = {at, length};
    return ps_sys_result(ioctl(fd, UFFDIO_UNREGISTER, &range));
}

/* Before Linux 6.3 or so a range is of one VMA, and any other one is ENOENT, as where nothing is registered: so smaller
 * parts are tried, down to a page, which tells the two apart. */
int ps_sys_uffd_protect(int fd, uintptr_t at, uint64_t length, bool on) {
    struct uffdio_writeprotect part = {.range = {at, length}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    for (uint64_t left = length; left;) {
        int rc = ps_sys_result(syscall(SYS_ioctl, fd, UFFDIO_WRITEPROTECT, &part)); /* a step shorter than libc's */
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
    int ring = ps_sys_result(syscall(SYS_io_uring_setup, 1, parameters));
    if (ring < 0)
        return ring;
    int rc = ps_sys_result(syscall(SYS_io_uring_register, ring, REGISTER_FILES, &fd, 1));
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
    ps_sys_put_text(&end, "/proc/");
    ps_sys_put_number(&end, (unsigned long)pid);
    ps_sys_put_text(&end, "/pagemap");
    int fd = ps_sys_result(open(path, O_RDONLY | O_CLOEXEC));
    if (fd < 0)
        return fd;
    ssize_t got = pread(fd, &entry, sizeof entry, (off_t)(at / PAGE * sizeof entry));
    int rc = got < 0 ? -errno : got == sizeof entry ? (int)(entry >> 57 & 1) : -EIO;
    close(fd);
    return rc;
}
