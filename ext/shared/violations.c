/* violations.c - the region's latest forbidden accesses, kept for whoever asks afterwards.
 *
 * Lives here: writing an entry in a signal handler, and telling which entries
 * are whole.
 * Invariants
 *  1. An entry counts only where its `check` follows from all its other bytes:
 *     its writer may have been killed in the middle, or have slept there while
 *     others came round and wrote over half of it.
 *  2. Writing cannot fault: there may be no memory for the page of the entries.
 *  3. Entries are read by a system call, by participants and observers alike:
 *     where there was no violation there is a hole, which stays one.
 * Runs in: signal handler (ps_violation_keep), caller (ps_violations).
 * Not here: what is forbidden, and what becomes of who tries (fault/).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"
#include "shared/shared.h"

#define SEED UINT64_C(0x243f6a8885a308d3) /* so that a hole is no entry */
#define ODD UINT64_C(0x9e3779b97f4a7c15)

static uint64_t check_of(const struct ps_shm_violation *entry) {
    uint64_t words[sizeof *entry / sizeof(uint64_t)], check = SEED;
    memcpy(words, entry, sizeof words);
    for (size_t i = 1; i < sizeof words / sizeof *words; i++) { /* the first is the check itself */
        check = (check ^ words[i]) * ODD;
        check ^= check >> 32;
    }
    return check;
}

void ps_violation_keep(struct ps_region *region, uint64_t offset, const struct ps_refusal *refusal,
                       enum ps_policy outcome) {
    struct ps_shm_violation *entries = ps_section(region, PS_SEC_VIOLATION);
    struct ps_shm_violation entry = {
        .number = atomic_fetch_add_explicit(&ps_header(region)->violations, 1, memory_order_relaxed),
        .time = ps_sys_realtime(),
        .offset = offset,
        .generation = refusal->author.generation,
        .pid = region->pid,
        .prot = (uint8_t)refusal->actual,
        .outcome = (uint8_t)outcome,
        .known = refusal->author.known,
    };
    memcpy(entry.command, ps_process_command(), PS_COMMAND);
    entry.check = check_of(&entry);
    ps_copy_bytes(&entries[entry.number % PS_VIOLATIONS], &entry, sizeof entry);
}

static bool is_whole(const struct ps_region *region, const struct ps_shm_violation *entry, uint64_t number) {
    return entry->check == check_of(entry) && entry->number == number && entry->offset < region->shape.size &&
           entry->outcome <= PS_WAIT;
}

int ps_violations(struct ps_region *region, struct ps_shm_violation kept[PS_VIOLATIONS]) {
    struct ps_shm_violation found[PS_VIOLATIONS];
    int fd = ps_query_fd(region), count = 0;
    if (fd < 0)
        return fd;
    ssize_t got = pread(fd, found, sizeof found, (off_t)region->shape.offset[PS_SEC_VIOLATION]);
    if (got < 0)
        return -errno;
    if (got != sizeof found || !ps_cached_leads(fd, &region->memory)) /* the program has closed it meanwhile */
        return -EBADF;
    uint64_t end = atomic_load_explicit(&ps_header(region)->violations, memory_order_relaxed);
    for (uint64_t number = end > PS_VIOLATIONS ? end - PS_VIOLATIONS : 0; number < end; number++) {
        struct ps_shm_violation *entry = &found[number % PS_VIOLATIONS];
        if (!is_whole(region, entry, number))
            continue;
        entry->prot &= 7;
        entry->command[PS_COMMAND - 1] = 0;
        kept[count++] = *entry;
    }
    return count;
}
