/* borrow.c - reaching another participant's page tables: its userfaultfd.
 *
 * Lives here: getting it (by a pidfd of its agent's thread, or from its agent's
 * socket), proving it, keeping it; answering others; and getting our own again,
 * when the program has closed its copy.
 * Invariants
 *  1. A borrowed descriptor is used only if it was proved to change the page
 *     tables of the process that owns the slot in that epoch: a page marked
 *     through it shows as marked in that process's pagemap, or (where we may not
 *     look at that) the kernel named that process as the sender; and the slot's
 *     owner was alive afterwards, so its pid had not gone to another.
 *  2. Places are looked at, filled and used under the process's borrow lock; a
 *     number that the kernel gave us is no other place's any more
 *     (ps_process_took), whatever the program has closed.  A userfaultfd of the
 *     program's own under it would succeed, on our page tables, which lie where
 *     the other's do: before each use ours are told from others by a flag, which
 *     is half as dear as fstat.
 *  3. A userfaultfd is a power over a process: it is given to the same user only.
 * Runs in: caller (with the writer lock, but for our own); ps_borrow_answer in
 * the agent.
 * Not here: what is done with it (engine.c, change.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "change/change.h"
#include "os/os.h"
#include "process/process.h"
#include "shared/shared.h"

#define HIGH 1024          /* out of the way of programs that expect small numbers */
#define REST (100 * PS_MS) /* after an attempt that failed */

static struct ps_borrowed *places_of(const struct ps_region *region) {
    return atomic_load_explicit(&region->borrowed, memory_order_acquire);
}

static struct ps_borrowed *place_of(const struct ps_region *region, uint32_t index) {
    return &places_of(region)[index];
}

static int map_places(struct ps_region *region) {
    if (places_of(region))
        return 0;
    void *got = mmap(NULL, PS_SLOTS_MAX * sizeof(struct ps_borrowed), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED)
        return -errno;
    atomic_store_explicit(&region->borrowed, got, memory_order_release);
    return 0;
}

static bool leads(const struct ps_borrowed *place) {
    struct stat file;
    int fd = atomic_load_explicit(&place->fd, memory_order_relaxed);
    return fd >= 0 && !fstat(fd, &file) && file.st_ino == place->inode;
}

/* What was known of an earlier owner of the slot. */
static void empty(struct ps_borrowed *place) {
    if (place->epoch && leads(place))
        close(place->fd);
    place->epoch = 0;
    place->fd = -1;
}

/* Through its thread's pidfd nobody needs to run there. */
static int by_thread(const struct ps_shm_slot *slot) {
    return ps_sys_fd_of_thread((int)atomic_load_explicit(&slot->tid, memory_order_relaxed),
                               (int)atomic_load_explicit(&slot->uffd, memory_order_relaxed));
}

/* 1: a mark made through fd is one in that process; 0: it is not; -errno: we may not look. */
static int canary_sings(const struct ps_shm_slot *slot, int fd) {
    uintptr_t canary = atomic_load_explicit(&slot->canary, memory_order_relaxed);
    int pid = (int)atomic_load_explicit(&slot->pid, memory_order_relaxed);
    if (ps_sys_uffd_protect(fd, canary, PS_PAGE, true))
        return 0;
    int marked = ps_sys_uffd_protected(pid, canary);
    if (ps_sys_uffd_protect(fd, canary, PS_PAGE, false) || marked < 0)
        return marked < 0 ? marked : 0;
    return marked && ps_sys_uffd_protected(pid, canary) == 0;
}

/* Takes fd over if it is what it should be; `known` says that the kernel named its sender. */
static int keep(struct ps_region *region, uint32_t index, uint32_t status, int fd, bool known) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    struct ps_borrowed *place = place_of(region, index);
    struct stat file;
    int sings = canary_sings(slot, fd);
    bool proved = (sings == 1 || (sings < 0 && known)) && !ps_slot_dead(region, index, status);
    int high = proved ? ps_sys_fd_high(fd, HIGH) : -EXDEV;
    close(fd);
    if (high < 0)
        return high;
    ps_process_took(high);
    place->inode = fstat(high, &file) ? 0 : file.st_ino;
    place->data = atomic_load_explicit(&slot->canary, memory_order_relaxed) + PS_GUARD;
    place->next_look = 0; /* should the number go to another (ps_process_took), it is fetched again at once */
    atomic_store_explicit(&place->fd, high, memory_order_relaxed);
    return high;
}

/* Its number in this process; or -errno: not now.  `socket` is one of ours for answers, -1 at first. */
int ps_borrow(struct ps_region *region, uint32_t index, uint32_t status, int *socket) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t epoch = status >> PS_STATE_BITS;
    int rc = map_places(region);
    if (rc)
        return rc;
    struct ps_borrowed *place = place_of(region, index);
    int fd = atomic_load_explicit(&place->fd, memory_order_relaxed);
    if (place->epoch == epoch && fd >= 0 && ps_sys_uffd_ours(fd))
        return fd;
    if (place->epoch == epoch && fd >= 0)
        ps_borrow_lost(region, index);
    if (place->epoch == epoch && ps_sys_now() < place->next_look)
        return -EAGAIN;
    empty(place);
    place->epoch = epoch;
    place->next_look = ps_sys_now() + REST;
    if (atomic_load_explicit(&slot->pidns, memory_order_relaxed) != ps_sys_pid_namespace())
        return -EXDEV; /* its numbers mean nothing here */
    rc = by_thread(slot);
    if (rc >= 0)
        rc = keep(region, index, status, rc, false);
    if (rc < 0 && rc != -EMFILE && rc != -ENFILE)
        ps_descriptor_ask(region, index, socket);
    return rc;
}

uintptr_t ps_borrow_data(const struct ps_region *region, uint32_t index) {
    return place_of(region, index)->data;
}

/* The number turned out to lead somewhere else. */
void ps_borrow_lost(struct ps_region *region, uint32_t index) {
    place_of(region, index)->fd = -1;
    place_of(region, index)->next_look = 0;
}

static void take_answer(struct ps_region *region, uint32_t index, int pid, int fd) {
    struct ps_shm_slot *slot = ps_slot(region, index);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
    struct ps_borrowed *place = place_of(region, index);
    bool wanted = place->epoch == status >> PS_STATE_BITS && place->fd < 0 && ps_state_of(status) == PS_LIVE;
    if (wanted && pid && (uint32_t)pid == atomic_load_explicit(&slot->pid, memory_order_relaxed))
        keep(region, index, status, fd, true);
    else
        close(fd);
}

/* The answers that have come, once those who were asked have run. */
void ps_borrow_collect(struct ps_region *region, int socket) {
    int pid, fd;
    uint32_t index;
    if (socket < 0)
        return;
    ps_private_lock(ps_process_borrow_lock(), PS_NEVER);
    while (!ps_sys_socket_take(socket, &pid, &fd, &index))
        if (fd >= 0 && index < region->shape.slots)
            take_answer(region, index, pid, fd);
        else if (fd >= 0)
            close(fd);
    ps_private_unlock(ps_process_borrow_lock());
    close(socket);
}

/* -- Our own ------------------------------------------------------------------------------------------------------ */

/* In the agent: there is a way to its userfaultfd, which the program's threads need too: its socket, whose name this
 * is, or at least a pidfd of its thread. */
int ps_borrow_offer(struct ps_region *region, uint32_t *name) {
    region->own_socket = ps_sys_socket(name);
    if (region->own_socket >= 0)
        return 0;
    int fd = ps_sys_fd_of_thread(region->tid, region->own_userfault);
    if (fd >= 0)
        close(fd);
    return fd < 0 ? region->own_socket : 0;
}

/* In the agent: to whoever has asked on its socket, or waits for long for a word of ours. */
void ps_borrow_answer(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    /* acquire: pairs with ask: the message is there. */
    if (!atomic_load_explicit(&slot->asked, memory_order_relaxed) ||
        !atomic_exchange_explicit(&slot->asked, 0, memory_order_acquire))
        return;
    ps_owner_pass_on(region);
    while (region->own_socket >= 0 &&
           ps_sys_socket_answer(region->own_socket, region->own_userfault, region->slot) != -EAGAIN)
        ;
}

/* When the region is closed. */
void ps_borrow_give_back(struct ps_region *region) {
    if (!places_of(region))
        return;
    ps_private_lock(ps_process_borrow_lock(), PS_NEVER);
    for (uint32_t index = 0; index < region->shape.slots; index++)
        empty(place_of(region, index));
    ps_private_unlock(ps_process_borrow_lock());
}
