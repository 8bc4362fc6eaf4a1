/* descriptor.c - the descriptors of a region in the program's table, which the program may close at any time.
 *
 * Lives here: a cache of them, checked before each use and filled again from the
 * agent's table; holes of the memfd, which are found through one.
 * Invariant: a number counts only where fstat says that it leads to our inode.
 * Runs in: caller, agent, before a fork.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"
#include "segment/segment.h"

#define OWN_HIGH 512          /* our own below those of others */
#define OWN_WAIT (50 * PS_MS) /* for our own agent to answer */

/* -- Asking an agent, and our own for our userfaultfd ------------------------------------------------------------ */

bool ps_cached_leads(int fd, const struct ps_cached *cached) {
    struct stat file;
    return fd >= 0 && !fstat(fd, &file) && file.st_ino == cached->inode && file.st_dev == cached->device;
}

/* Its agent answers when it runs next; the caller wakes it, and collects. */
void ps_descriptor_ask(struct ps_region *region, uint32_t index, int *socket) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t name;
    if (*socket < 0)
        *socket = ps_sys_socket(&name);
    if (*socket >= 0 && ps_sys_socket_ask(*socket, atomic_load_explicit(&slot->socket, memory_order_relaxed)) >= 0)
        atomic_store_explicit(&slot->asked, 1, memory_order_release); /* pairs with ps_borrow_answer */
}

static int own_by_socket(struct ps_region *region) {
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&ps_header(region)->generation;
    int64_t end = ps_sys_now() + OWN_WAIT;
    int socket = -1, pid, fd = -1;
    bool answered = false;
    uint32_t index;
    ps_descriptor_ask(region, region->slot, &socket);
    if (socket < 0)
        return socket;
    while (fd < 0 && !answered && ps_sys_now() < end) {
        ps_sys_wake(low, INT32_MAX, ps_slot_bit(region->slot)); /* again: it may have been about to sleep */
        if (!ps_sys_socket_wait(socket, ps_sys_now() + PS_MS))
            answered |= !ps_sys_socket_take(socket, &pid, &fd, &index);
    }
    close(socket);
    return fd >= 0 ? fd : answered ? -EMFILE : -EBADF; /* the kernel drops a descriptor for which there is no number */
}

/* A copy for the program's table. */
static int own_userfault(struct ps_region *region) {
    int fd = ps_sys_fd_of_thread(region->tid, region->own_userfault);
    if (fd == -EMFILE || fd == -ENFILE) /* the socket would need as many numbers */
        return fd;
    if (fd < 0 || !ps_cached_leads(fd, &region->userfault)) {
        if (fd >= 0)
            close(fd);
        fd = own_by_socket(region);
    }
    if (fd < 0)
        return fd;
    int high = ps_sys_fd_high(fd, OWN_HIGH);
    if (high >= 0)
        close(fd);
    else /* no high number is free */
        high = fd;
    ps_process_took(high);
    return high;
}

/* -- The cache ----------------------------------------------------------------------------------------------- */

/* flock(LOCK_SH) on a name's entry in the program's table too: a child that has been forked and has not joined yet
 * inherits it, so the name does not look stale if the parent ends in between. */
static int take_hold(struct ps_cached *cached, int fd) {
    if (fd >= 0 && (!ps_cached_leads(fd, cached) || (cached->kind == PS_ENTRY && flock(fd, LOCK_SH | LOCK_NB)))) {
        close(fd);
        fd = -EBADF;
    }
    cached->fd = fd < 0 ? -1 : fd;
    return fd;
}

/* The program may close anything, and its numbers come back as other files: check, and fetch again from the
 * agent's table. */
static int fetch(struct ps_region *region, struct ps_cached *cached) {
    int agents = cached->kind == PS_MEMORY  ? region->own
                 : cached->kind == PS_ENTRY ? region->own_entry
                                            : region->own_userfault;
    uint32_t use = atomic_load_explicit(&region->use, memory_order_acquire);
    if (agents < 0 || !ps_running(region) || (use != PS_OPEN && use != PS_OPENING))
        return -EBADF;
    return take_hold(cached, cached->kind == PS_USERFAULT ? own_userfault(region)
                                                          : ps_sys_reopen_of(getpid(), region->tid, agents));
}

int ps_cached_get(struct ps_region *region, struct ps_cached *cached) {
    ps_private_lock(&region->descriptor_lock, PS_NEVER);
    int fd = ps_cached_leads(cached->fd, cached) ? cached->fd : fetch(region, cached);
    ps_private_unlock(&region->descriptor_lock);
    return fd;
}

int ps_fd(struct ps_region *region) {
    return ps_cached_get(region, &region->memory);
}

int ps_query_fd(struct ps_region *region) {
    return ps_process_is_agent(region) ? region->own : ps_fd(region);
}

/* The first byte of the memfd from `at` on, before `end`, that it really holds: nobody need read a hole. */
uint64_t ps_region_skip_hole(struct ps_region *region, uint64_t at, uint64_t end) {
    int fd = ps_query_fd(region);
    off_t found = fd < 0 ? -1 : lseek(fd, (off_t)at, SEEK_DATA);
    if (found < 0)
        return fd >= 0 && errno == ENXIO ? end : at; /* no data from here to the end of the file */
    return (uint64_t)found < end ? (uint64_t)found : end;
}

/* ... that it does not hold. */
uint64_t ps_region_skip_data(struct ps_region *region, uint64_t at, uint64_t end) {
    int fd = ps_query_fd(region);
    off_t found = fd < 0 || at >= end ? -1 : lseek(fd, (off_t)at, SEEK_HOLE);
    return found >= 0 && (uint64_t)found < end ? (uint64_t)found : end;
}

int ps_data(struct ps_region *region, uint64_t *page, uint64_t *count) {
    int fd = ps_query_fd(region);
    return fd < 0 ? fd : ps_region_data(fd, region->shape.control_size, region->shape.pages, page, count);
}

int ps_cached_identify(struct ps_cached *cached, enum ps_cached_kind kind, int fd) {
    struct stat file;
    cached->kind = kind;
    atomic_store_explicit(&cached->fd, -1, memory_order_relaxed);
    if (fd < 0)
        return 0;
    if (fstat(fd, &file))
        return -errno;
    cached->device = file.st_dev;
    cached->inode = file.st_ino;
    return 0;
}

int ps_cached_set(struct ps_cached *cached, enum ps_cached_kind kind, int fd) {
    int rc = ps_cached_identify(cached, kind, fd);
    if (rc || fd < 0)
        return rc;
    int own = ps_sys_reopen(fd);
    int got = take_hold(cached, ps_sys_refused(own) ? ps_sys_fd_high(fd, 0) : own);
    return got < 0 ? got : 0;
}

void ps_cached_forget(struct ps_region *region, struct ps_cached *cached) {
    ps_private_lock(&region->descriptor_lock, PS_NEVER);
    if (ps_cached_leads(cached->fd, cached))
        close(cached->fd);
    cached->fd = -1;
    ps_private_unlock(&region->descriptor_lock);
}
