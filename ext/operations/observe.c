/* observe.c - looking at a region without taking part in it.
 *
 * Lives here: mapping a region to read it, for those who attach read-only, and
 * what `pyshare trace` and `pyshare map` read of a control segment, and of
 * another process's page tables.
 * Invariants
 *  1. Everything is mapped read-only, through a description that was opened
 *     read-only, so the kernel refuses to make it writable (mmap(2): EACCES of
 *     MAP_SHARED): nothing here can change a region.  So there is no slot,
 *     no lock, no claim, and nobody waits for an observer; what it finds may be
 *     half of a change, and whoever asks looks again.
 *  2. A handle of an observer is no participant's: it is in no table, its
 *     address range holds the control segment and the data alone, no page of
 *     which follows the map, and of the core only what reads may be called with
 *     it.  A forked child has it as its parent does.
 *  3. What is read is checked as it is everywhere: the header by
 *     ps_region_validate, indices against the shape.
 *  4. Holes of the memfd are not read through a mapping: that would fill them.
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "operations/operations.h"
#include "os/os.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

#define BLOCK 512u                       /* entries of a pagemap that are read at once */
#define PAGEMAP_MARKED 57                /* bit of an entry: write-protected by userfaultfd */
#define PAGEMAP_ENTRY 8u                 /* bytes */
#define HOLDER_MASK UINT64_C(0x7fffffff) /* of a held word: its owner word, without WAITING */

static int map_at(void *at, uint64_t length, int fd, uint64_t offset) {
    return mmap(at, length, PROT_READ, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED ||
                   madvise(at, length, MADV_DONTDUMP)
               ? -errno
               : 0;
}

/* `fd` is read-only, and belongs to the observer from now on; not after an error. */
int ps_observe(struct ps_region *seen, int fd, const char **field) {
    int rc = ps_region_validate(fd, &seen->shape, field);
    if (!rc)
        rc = ps_cached_identify(&seen->memory, PS_MEMORY, fd);
    if (!rc)
        rc = ps_process_start(); /* forks are counted from now on */
    if (!rc)
        rc = ps_region_place(seen);
    if (rc)
        return rc;
    seen->own = seen->own_entry = seen->own_userfault = -1;
    rc = map_at(ps_header(seen), seen->shape.control_size, fd, 0);
    if (!rc)
        rc = map_at(ps_address(seen), seen->shape.pages * PS_PAGE, fd, seen->shape.control_size);
    if (rc)
        ps_observe_end(seen);
    else
        seen->memory.fd = fd;
    return rc;
}

/* Nothing can be read any more, and no other mapping comes where something could. */
void ps_observe_shut(struct ps_region *seen) {
    ps_region_reserve(seen);
    ps_cached_forget(seen, &seen->memory);
}

void ps_observe_end(struct ps_region *seen) {
    munmap(ps_header(seen), seen->span);
    ps_cached_forget(seen, &seen->memory);
}

/* By a system call, which fills no hole, and cannot fault.  -EBADF: the program has closed the descriptor, or another
 * file came under its number meanwhile. */
int ps_observe_read(struct ps_region *seen, uint64_t offset, void *to, uint64_t length) {
    int fd = ps_query_fd(seen);
    for (uint64_t done = 0; fd >= 0 && done < length;) {
        ssize_t got = pread(fd, (char *)to + done, length - done, (off_t)(seen->shape.control_size + offset + done));
        if (got <= 0) /* 0: not this file, which cannot shrink */
            return got < 0 ? -errno : -EBADF;
        done += (uint64_t)got;
    }
    return ps_cached_leads(fd, &seen->memory) ? 0 : -EBADF;
}

/* Until the generation is another one; callers that change page tables from outside wake nobody. */
int ps_observe_wait(const struct ps_region *seen, uint64_t generation, int64_t deadline) {
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&ps_header(seen)->generation;
    return ps_sys_wait((struct ps_watch){low, (uint32_t)generation}, FUTEX_BITSET_MATCH_ANY, deadline);
}

bool ps_observe_change(const struct ps_region *seen, uint64_t generation, struct ps_seen_change *out) {
    const struct ps_shm_ring *at = ps_ring(seen, generation);
    struct ps_shm_ring entry;
    if (!ps_change_read(seen, generation, &entry))
        return false;
    *out = (struct ps_seen_change){
        .first = entry.first,
        .count = entry.count,
        .time = entry.time,
        .kind = entry.kind,
        .author = entry.author,
        .prot = atomic_load_explicit(&at->prot, memory_order_relaxed) & 7,
        .done = atomic_load_explicit(&at->done, memory_order_acquire), /* pairs with close_record: the slowest too */
        .slowest = atomic_load_explicit(&at->slowest, memory_order_relaxed),
    };
    atomic_thread_fence(memory_order_acquire); /* as in ps_change_read */
    return atomic_load_explicit(&at->generation, memory_order_relaxed) == generation;
}

/* The open change, which may be one that is not published yet; false: there is none. */
bool ps_observe_open(const struct ps_region *seen, uint64_t *first, uint64_t *count) {
    const struct ps_shm_record *record = &ps_header(seen)->record;
    *first = atomic_load_explicit(&record->first, memory_order_relaxed);
    *count = atomic_load_explicit(&record->count, memory_order_relaxed);
    if (*first >= seen->shape.pages || *count > seen->shape.pages - *first)
        *first = *count = 0;
    return ps_change_open(seen);
}

/* Everybody has this change, or its caller has given up on who is silent; or the ring has it no more. */
bool ps_observe_over(const struct ps_region *seen, uint64_t generation) {
    struct ps_seen_change change;
    uint64_t latest =
        ps_generation(seen); /* first: the record that is closed after it is this one's, or a later one's */
    if (latest != generation)
        return latest > generation;
    return !ps_change_open(seen) || (ps_observe_change(seen, generation, &change) && change.done);
}

/* 1; 0: nobody has this slot; -ENOENT: there are no more. */
int ps_observe_slot(struct ps_region *seen, uint32_t index, struct ps_seen_slot *out) {
    if (index >= ps_slots_used(seen))
        return -ENOENT;
    const struct ps_shm_slot *slot = ps_slot(seen, index);
    uint32_t status = atomic_load_explicit(&slot->status, memory_order_acquire);
    enum ps_state state = ps_state_of(status);
    if (state != PS_LIVE && state != PS_JOINING)
        return 0;
    uint64_t pidns = atomic_load_explicit(&slot->pidns, memory_order_relaxed);
    uint32_t takes = atomic_load_explicit(&slot->takes, memory_order_relaxed);
    int32_t held = (int32_t)(takes - atomic_load_explicit(&slot->ends, memory_order_relaxed));
    *out = (struct ps_seen_slot){
        .owner = ps_owner_of(index, status),
        .pid = atomic_load_explicit(&slot->pid, memory_order_relaxed),
        .tid = atomic_load_explicit(&slot->tid, memory_order_relaxed),
        .start = atomic_load_explicit(&slot->start, memory_order_relaxed),
        .capabilities = atomic_load_explicit(&slot->capabilities, memory_order_relaxed),
        .flags = atomic_load_explicit(&slot->flags, memory_order_relaxed),
        .applied = atomic_load_explicit(&slot->applied, memory_order_relaxed),
        .data = atomic_load_explicit(&slot->canary, memory_order_relaxed) + PS_GUARD,
        .live = state == PS_LIVE,
        .alive = status & PS_STATE_BARE || ps_sys_ofd_free(ps_query_fd(seen), index) != 1, /* unknown counts as yes */
        .here = pidns && pidns == ps_sys_pid_namespace(),
        .leases = held > 0 ? (uint32_t)held : 0,
        .leased_since = atomic_load_explicit(&slot->leased_since, memory_order_relaxed),
        .waits_for = atomic_load_explicit(&slot->waits_for, memory_order_relaxed),
        .waits_since = atomic_load_explicit(&slot->waits_since, memory_order_relaxed),
        .takes = takes,
    };
    return 1;
}

/* -- Who holds what, and who waits ---------------------------------------------------------------------------- */

uint64_t ps_observe_takes(const struct ps_region *seen) {
    uint64_t takes = 0;
    for (uint32_t index = 0, used = ps_slots_used(seen); index < used; index++)
        takes += atomic_load_explicit(&ps_slot(seen, index)->takes, memory_order_relaxed);
    return takes;
}

uint32_t ps_observe_writer(const struct ps_region *seen) {
    return atomic_load_explicit(&ps_header(seen)->lock, memory_order_acquire) & ~PS_OWNER_WAITING;
}

bool ps_observe_lock(struct ps_region *seen, uint32_t from, struct ps_seen_lock *out) {
    uint64_t begin = seen->shape.offset[PS_SEC_LOCK], width = sizeof(struct ps_shm_lock);
    for (uint32_t index = from; index < PS_LOCKS; index++) {
        if (index == from || (begin + index * width) % PS_PAGE < width) {
            uint64_t data = ps_region_skip_hole(seen, begin + index * width, begin + PS_LOCKS * width);
            index = (uint32_t)((data - begin) / width);
            if (index >= PS_LOCKS)
                return false;
        }
        const struct ps_shm_lock *lock = (struct ps_shm_lock *)ps_section(seen, PS_SEC_LOCK) + index;
        uint64_t held = atomic_load_explicit(&lock->held, memory_order_acquire) & HOLDER_MASK;
        if (!held)
            continue;
        uint64_t since = atomic_load_explicit(&lock->since, memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire); /* the second look comes after it */
        bool same = (atomic_load_explicit(&lock->held, memory_order_relaxed) & HOLDER_MASK) == held;
        *out = (struct ps_seen_lock){index, (uint32_t)held, same ? since : 0};
        return true;
    }
    return false;
}

bool ps_observe_closer(const struct ps_region *seen, uint32_t index, struct ps_seen_closer *out) {
    const struct ps_shm_header *header = ps_header(seen);
    const struct ps_shm_closer *closer = &header->closer[index];
    *out = (struct ps_seen_closer){
        .owner = atomic_load_explicit(&closer->owner, memory_order_acquire) & ~PS_OWNER_WAITING,
        .drain = atomic_load_explicit(&closer->kind, memory_order_relaxed) == PS_CLOSER_SNAPSHOT,
        .first = atomic_load_explicit(&closer->first, memory_order_relaxed),
        .count = atomic_load_explicit(&closer->count, memory_order_relaxed),
    };
    if (out->first >= seen->shape.pages || out->count > seen->shape.pages - out->first)
        out->first = out->count = 0;
    return out->owner && atomic_load_explicit(&header->closers, memory_order_acquire) >> index & 1;
}

/* -- Layers of the map ---------------------------------------------------------------------------------------- */

/* How many elements from `first` on, before `end`, are the same in the bits of `mask`, and what they are. */
static uint64_t run_of(struct ps_region *seen, uint64_t offset, uint32_t width, uint64_t mask, uint64_t first,
                       uint64_t end, uint64_t *value) {
    for (uint64_t at = first; at < end;) {
        uint64_t byte = offset + at * width, data = ps_region_skip_hole(seen, byte, offset + end * width);
        if (data > byte) {
            if (at > first && *value)
                return at - first;
            *value = 0;
            at = (data - offset) / width;
            continue;
        }
        for (uint64_t stop = (byte / PS_PAGE + 1) * PS_PAGE; at < end && byte < stop; at++, byte += width) {
            const char *where = (const char *)ps_header(seen) + byte;
            uint64_t found =
                width == 1 ? atomic_load_explicit((const _Atomic uint8_t *)where, memory_order_relaxed)
                           : atomic_load_explicit((const _Atomic uint64_t *)(const void *)where, memory_order_relaxed);
            if (at == first)
                *value = found & mask;
            else if ((found & mask) != *value)
                return at - first;
        }
    }
    return end - first;
}

uint64_t ps_observe_run(struct ps_region *seen, enum ps_section_kind layer, uint32_t area, uint64_t first,
                        uint64_t *value) {
    uint64_t offset = seen->shape.offset[layer], end = seen->shape.pages, run;
    if (layer == PS_SEC_LEASE)
        return run_of(seen, offset, sizeof(uint64_t), HOLDER_MASK, first, end, value);
    if (layer == PS_SEC_STATE)
        offset += area * ((seen->shape.pages + PS_PAGE - 1) / PS_PAGE * PS_PAGE);
    run = run_of(seen, offset, 1, UINT8_MAX, first, end, value);
    if (layer != PS_SEC_STATE)
        *value = (*value ^ seen->shape.initial) & 7;
    return run;
}

uint32_t ps_observe_protection(struct ps_region *seen, uint64_t page) {
    uint64_t value;
    run_of(seen, seen->shape.offset[PS_SEC_CUR], 1, UINT8_MAX, page, page + 1, &value);
    return (uint32_t)(value ^ seen->shape.initial) & 7;
}

uint32_t ps_observe_freezer(const struct ps_region *seen, uint64_t *frozen) {
    const struct ps_shm_header *header = ps_header(seen);
    *frozen = atomic_load_explicit(&header->frozen, memory_order_relaxed);
    return atomic_load_explicit(&header->freezer, memory_order_acquire) & ~PS_OWNER_WAITING;
}

uint32_t ps_observe_snapshot(const struct ps_region *seen, uint32_t area, uint64_t *generation) {
    const struct ps_shm_snapshot *snapshot = &ps_header(seen)->snapshot[area];
    uint32_t word = atomic_load_explicit(&snapshot->word, memory_order_acquire);
    *generation = atomic_load_explicit(&snapshot->generation, memory_order_relaxed);
    if (*generation == PS_NO_MOMENT)
        *generation = 0;
    return word;
}

/* Some page tables may let no store pass, where the map does: until a snapshot has the page, or it is stored to. */
bool ps_observe_protected(const struct ps_region *seen) {
    return atomic_load_explicit(&ps_header(seen)->snapshots, memory_order_acquire);
}

/* -- Page tables ---------------------------------------------------------------------------------------------- */

/* Of a process whose pagemap this is: how many pages from `page` (of its address space) on, before `end`, are marked,
 * or not; -errno. */
int64_t ps_observe_marks(int pagemap, uint64_t page, uint64_t end, bool *marked) {
    uint64_t entry[BLOCK];
    for (uint64_t at = page; at < end;) {
        uint64_t wanted = end - at < BLOCK ? end - at : BLOCK;
        ssize_t got = pread(pagemap, entry, wanted * PAGEMAP_ENTRY, (off_t)(at * PAGEMAP_ENTRY));
        if (got < (ssize_t)PAGEMAP_ENTRY) /* 0: the process has no memory any more */
            return got < 0 ? -errno : -ESRCH;
        for (uint64_t i = 0; i < (uint64_t)got / PAGEMAP_ENTRY; i++, at++) {
            bool mark = entry[i] >> PAGEMAP_MARKED & 1;
            if (at == page)
                *marked = mark;
            else if (mark != *marked)
                return (int64_t)(at - page);
        }
    }
    return (int64_t)(end - page);
}
