/* names.c - the content of a name's entry: which processes hold the region.
 *
 * Lives here: writing and reading the rows.  The directory of entries, its
 * permissions and the removal of stale ones are _names.py's.
 *
 * An entry is a header and one row per slot.  A row belongs to the owner of
 * that slot, who writes it when it joins and clears it when it leaves; a row
 * whose owner was killed stays, so a reader believes nothing: it opens what
 * the row points at and compares inode and nonce.
 * Invariants
 *  1. Whoever has a row holds flock(LOCK_SH) on the entry from its agent's
 *     table: the entry is stale exactly when LOCK_EX can be had.
 *  2. Rows are written by one pwrite, so a reader that finds half a row finds
 *     one that leads nowhere.
 *  3. An entry takes memory as its rows are needed: 63 slots share its first
 *     page.  Who attaches has a slot only where there is memory for its row.
 * Runs in: caller, agent, fork child's agent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "pages/pages.h"
#include "participant/participant.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

#define ENTRY_MAGIC 0x00656d616e737970u /* "pysname\0", little endian */
#define PATIENCE (1000 * PS_MS)         /* with an agent that does not answer, at the end of a process */

int ps_name_format(int name_fd, int region_fd) {
    struct ps_shape shape;
    struct stat file;
    const char *field;
    int rc = ps_region_validate(region_fd, &shape, &field);
    if (!rc && fstat(region_fd, &file))
        rc = -errno;
    if (rc)
        return rc;
    struct ps_entry_header header = {.magic = ENTRY_MAGIC,
                                     .device = file.st_dev,
                                     .inode = file.st_ino,
                                     .nonce = {shape.nonce[0], shape.nonce[1]},
                                     .slots = shape.slots};
    if (ftruncate(name_fd, ps_row_offset(shape.slots)))
        return -errno;
    return ps_sys_write_at(name_fd, &header, sizeof header, 0);
}

void ps_name_write_row(struct ps_region *region, bool present) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    struct ps_entry_row row = {0};
    if (region->own_entry < 0)
        return;
    if (present)
        row = (struct ps_entry_row){
            .pid = atomic_load_explicit(&slot->pid, memory_order_relaxed),
            .tid = (uint32_t)region->tid,
            .fd = (uint32_t)region->own,
            .epoch = region->epoch,
            .start = atomic_load_explicit(&slot->start, memory_order_relaxed),
            .pidns = atomic_load_explicit(&slot->pidns, memory_order_relaxed),
        };
    /* It fails only in a forked child that found no memory for its row when it claimed its slot: the child takes part,
     * keeps the name alive, and cannot be reached by it. */
    ps_sys_write_at(region->own_entry, &row, sizeof row, (uint64_t)ps_row_offset(region->slot));
}

/* The agent's part of ps_name_let_go. */
void ps_name_answer(struct ps_region *region) {
    int entry = region->own_entry;
    if (entry < 0 || !atomic_load_explicit(&region->nameless, memory_order_acquire))
        return;
    ps_name_write_row(region, false);
    close(entry);
    /* release: who finds -1 (acquire) finds the agent's lock on the entry gone. */
    atomic_store_explicit(&region->own_entry, -1, memory_order_release);
    ps_sys_wake((_Atomic uint32_t *)&region->own_entry, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
}

void ps_name_let_go(struct ps_region *region) {
    _Atomic uint32_t *word = (_Atomic uint32_t *)&region->own_entry;
    int64_t end = ps_sys_now() + PATIENCE;
    atomic_store_explicit(&region->nameless, true, memory_order_release); /* pairs with the agent's look */
    while (ps_process_known() && ps_running(region) && ps_sys_now() < end) {
        uint32_t seen = atomic_load_explicit(word, memory_order_acquire);
        if ((int)seen < 0)
            break;
        ps_agent_wake(region);
        ps_sys_wait((struct ps_watch){word, seen}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS);
    }
    ps_cached_forget(region, &region->entry); /* after the agent's, from which it would be fetched again */
}

static int read_header(int name_fd, struct ps_entry_header *header) {
    if (pread(name_fd, header, sizeof *header, 0) != (ssize_t)sizeof *header || header->magic != ENTRY_MAGIC ||
        header->slots > PS_SLOTS_MAX)
        return PS_ECORRUPT;
    return 0;
}

int ps_name_leads_to(int name_fd, int region_fd) {
    struct ps_entry_header header;
    struct ps_shape shape;
    const char *field;
    int rc = read_header(name_fd, &header);
    if (!rc)
        rc = ps_region_validate(region_fd, &shape, &field);
    return rc ? rc : !memcmp(header.nonce, shape.nonce, sizeof header.nonce);
}

int ps_name_of(int region_fd, char name[PS_NAME_MAX + 8], const char **field) {
    struct ps_shape shape;
    int rc = ps_region_validate(region_fd, &shape, field);
    if (!rc)
        memcpy(name, shape.name, sizeof shape.name);
    return rc;
}

/* What the row points at, if it is the region that the header means. */
static int follow_row(const struct ps_entry_header *header, const struct ps_entry_row *row) {
    struct ps_cached region = {.fd = -1, .device = header->device, .inode = header->inode};
    struct ps_shape shape;
    const char *field;
    if (!row->pid)
        return -ENOENT;
    if (row->pidns != ps_sys_pid_namespace())
        return -EACCES; /* its numbers mean nothing here */
    int fd = ps_sys_reopen_of((int)row->pid, (int)row->tid, (int)row->fd);
    if (fd < 0)
        return fd;
    if (ps_cached_leads(fd, &region) && !ps_region_validate(fd, &shape, &field) &&
        !memcmp(shape.nonce, header->nonce, sizeof shape.nonce))
        return fd;
    close(fd);
    return -ENOENT;
}

/* 0 and a descriptor; -EACCES: somebody holds it whom we may not reach; -ENOENT: no row leads to it. */
int ps_name_find(int name_fd, int *region_fd) {
    struct ps_entry_header header;
    struct ps_entry_row row;
    int rc = read_header(name_fd, &header), result = -ENOENT;
    if (rc)
        return rc;
    for (uint32_t slot = 0; slot < header.slots; slot++) {
        if (pread(name_fd, &row, sizeof row, ps_row_offset(slot)) != (ssize_t)sizeof row)
            break;
        int fd = follow_row(&header, &row);
        if (fd >= 0) {
            *region_fd = fd;
            return 0;
        }
        if (fd == -EMFILE || fd == -ENFILE)
            return fd;
        if (fd == -EACCES || fd == -EPERM)
            result = -EACCES;
    }
    return result;
}
