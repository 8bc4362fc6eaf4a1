/* probe.c - diagnosis only: see probe.h.  Runs in: caller, and threads of its own.
 *
 * Invariants
 *  1. Nothing of the process is changed: what cannot be undone happens to a thread that is about to end.
 *  2. The core's own wrapper is what is tried, wherever it says how the call went.
 * Not here: the core. Nothing of it uses this file.
 */
#define _GNU_SOURCE
#include "probe/probe.h"
#include "os/os.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

/* Newer than the headers of the oldest distributions that we build on. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static int result(int returned) {
    return returned < 0 ? -errno : returned;
}

/* -- What a thread does to itself -------------------------------------------------------------------------------- */

struct trial {
    int fd, other; /* one to be kept, and one that is not */
    int rc;
    _Atomic uint32_t word;
    struct ps_robust robust;
};

static int in_a_thread(void *(*body)(void *), struct trial *trial) {
    pthread_t thread;
    trial->rc = -ECANCELED; /* what it stays where a filter ends the thread */
    int rc = -pthread_create(&thread, NULL, body, trial);
    return rc ? rc : -pthread_join(thread, NULL);
}

static void *take_private_table(void *argument) {
    struct trial *trial = argument;
    trial->rc = ps_sys_private_table(&trial->fd, 1);
    if (!trial->rc && (fcntl(trial->fd, F_GETFD) < 0 || fcntl(trial->other, F_GETFD) >= 0))
        trial->rc = -ENOSYS; /* accepted and forgotten, as emulations do */
    return NULL;
}

int probe_private_table(int fd) {
    struct trial trial = {.fd = fd, .other = result(fcntl(fd, F_DUPFD_CLOEXEC, 0))};
    if (trial.other < 0)
        return trial.other;
    int rc = in_a_thread(take_private_table, &trial);
    int kept = result(close(trial.other)); /* EBADF: it was our table that lost it */
    return rc ? rc : trial.rc ? trial.rc : kept;
}

static void *end_marked(void *argument) {
    struct trial *trial = argument;
    trial->word = (uint32_t)ps_sys_gettid();
    trial->rc = ps_sys_mark_death(&trial->robust, &trial->word);
    return NULL;
}

int probe_death_mark(void) {
    struct trial trial = {0};
    int rc = in_a_thread(end_marked, &trial);
    if (rc || trial.rc)
        return rc ? rc : trial.rc;
    return trial.word & FUTEX_OWNER_DIED ? 0 : -ENOSYS; /* as above */
}

/* -- Calls ------------------------------------------------------------------------------------------------------- */

int probe_waitv(void) {
    _Atomic uint32_t word = 0;
    int rc = ps_sys_probe_waitv(&word, 1); /* it differs, so nobody sleeps */
    return rc == -EAGAIN ? 0 : rc < 0 ? rc : -ENOSYS;
}

int probe_keep_open(void) {
    int ends[2];
    void *mapping;
    if (pipe(ends))
        return -errno;
    int rc = ps_sys_keep_open(ends[1], &mapping);
    close(ends[1]);
    struct pollfd poller = {.fd = ends[0], .events = POLLIN};
    bool ended = poll(&poller, 1, 0); /* POLLHUP: nobody can write to it any more */
    close(ends[0]);
    if (!rc)
        ps_sys_let_go(mapping);
    return rc ? rc : ended ? -ENOSYS : 0; /* as above */
}

int probe_dumpable(void) {
    return result(prctl(PR_GET_DUMPABLE));
}

int probe_userfaultfd(int flags) {
    return ps_sys_probe_userfaultfd(flags | UFFD_USER_MODE_ONLY);
}

int probe_uffd_features(int uffd, uint64_t wanted, uint64_t *offered) {
    struct uffdio_api api = {.api = UFFD_API, .features = wanted};
    int rc = result(ioctl(uffd, UFFDIO_API, &api));
    *offered = api.features;
    return rc;
}
