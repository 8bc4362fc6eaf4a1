/* history.c - the ring of the latest changes, and the record of the one that is open.
 *
 * Invariant: an entry of the ring is read by its generation before and after: it
 * is whole where both are the one that was wanted.
 * Runs in: caller, agent, signal handler (reading).
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"
#include "shared/shared.h"

#define LOOKS 100 /* at a page while changes go on, before what was found last has to do */

/* -- The ring ------------------------------------------------------------------------------------------------- */

bool ps_change_read(const struct ps_region *region, uint64_t generation, struct ps_shm_ring *entry) {
    struct ps_shm_ring *at = ps_ring(region, generation);
    if (atomic_load_explicit(&at->generation, memory_order_acquire) != generation)
        return false;
    uint64_t first = atomic_load_explicit(&at->first, memory_order_relaxed);
    uint64_t count = atomic_load_explicit(&at->count, memory_order_relaxed);
    atomic_store_explicit(&entry->first, first, memory_order_relaxed);
    atomic_store_explicit(&entry->count, count, memory_order_relaxed);
    atomic_store_explicit(&entry->time, atomic_load_explicit(&at->time, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&entry->author, atomic_load_explicit(&at->author, memory_order_relaxed),
                          memory_order_relaxed);
    atomic_store_explicit(&entry->kind, atomic_load_explicit(&at->kind, memory_order_relaxed) & ~PS_EARLY,
                          memory_order_relaxed);
    atomic_store_explicit(&entry->back, atomic_load_explicit(&at->back, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&entry->prot, atomic_load_explicit(&at->prot, memory_order_relaxed), memory_order_relaxed);
    /* acquire fence: pairs with the fence in ring_write; the second look comes after the copy. */
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&at->generation, memory_order_relaxed) == generation && first < region->shape.pages &&
           count <= region->shape.pages - first;
}

void ps_ring_write(struct ps_region *region, uint64_t generation, enum ps_kind kind) {
    struct ps_shm_ring *at = ps_ring(region, generation);
    struct ps_shm_record *record = &ps_header(region)->record;
    atomic_store_explicit(&at->generation, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_release); /* a reader of what follows sees the 0 */
    atomic_store_explicit(&at->first, atomic_load_explicit(&record->first, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->count, atomic_load_explicit(&record->count, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->time, atomic_load_explicit(&record->time, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->author, atomic_load_explicit(&record->author, memory_order_relaxed),
                          memory_order_relaxed);
    atomic_store_explicit(&at->prot, atomic_load_explicit(&record->prot, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->kind, kind, memory_order_relaxed);
    atomic_store_explicit(&at->slowest, 0, memory_order_relaxed);
    atomic_store_explicit(&at->done, 0, memory_order_relaxed);
    atomic_store_explicit(&at->back, atomic_load_explicit(&record->back, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&at->generation, generation, memory_order_release);
}

/* The record of `generation` closes. */
void ps_ring_close(struct ps_region *region, uint64_t generation, uint32_t slowest) {
    struct ps_shm_ring *at = ps_ring(region, generation);
    atomic_store_explicit(&at->slowest, slowest, memory_order_relaxed);
    atomic_store_explicit(&at->done, ps_sys_boottime(), memory_order_release); /* who sees it sees the slowest */
    /* seq_cst: pairs with an agent that failed, which looks at `complete` after its acknowledgement. */
    atomic_store_explicit(&ps_header(region)->record.complete, generation, memory_order_seq_cst);
}

bool ps_change_open(const struct ps_region *region) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    return atomic_load_explicit(&record->complete, memory_order_acquire) < attempt;
}

/* Open, and the map may still be put back: at U3 it has been. */
bool ps_change_undecided(const struct ps_region *region) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    return ps_generation(region) <= attempt && atomic_load_explicit(&record->complete, memory_order_acquire) < attempt;
}

/* Has the open change of the record, if there is one, set this page already? */
static bool set_by_record(const struct ps_region *region, uint64_t page, struct ps_author *author) {
    struct ps_shm_record *record = &ps_header(region)->record;
    uint64_t attempt = atomic_load_explicit(&record->attempt, memory_order_acquire);
    uint64_t first = atomic_load_explicit(&record->first, memory_order_relaxed);
    uint32_t prot = atomic_load_explicit(&record->prot, memory_order_relaxed);
    if (atomic_load_explicit(&record->kind, memory_order_relaxed) == PS_THAW)
        return false;
    *author = (struct ps_author){true, attempt, atomic_load_explicit(&record->author, memory_order_relaxed),
                                 atomic_load_explicit(&record->time, memory_order_relaxed)};
    return ps_change_open(region) && attempt > ps_generation(region) && page >= first &&
           page - first < atomic_load_explicit(&record->count, memory_order_relaxed) &&
           prot == ps_protection(region, page);
}

/* Is the change `generation`, published already, being undone? */
static bool in_undo(const struct ps_region *region, uint64_t generation) {
    struct ps_shm_record *record = &ps_header(region)->record;
    return ps_change_open(region) && atomic_load_explicit(&record->attempt, memory_order_relaxed) == generation &&
           atomic_load_explicit(&record->kind, memory_order_acquire) == PS_UNDO;
}

/* `last`; or, where an open thaw has the page put back already, the generation before the freeze. */
static uint64_t before_thaw(const struct ps_region *region, uint64_t page, uint64_t last) {
    struct ps_shm_record *record = &ps_header(region)->record;
    if (!ps_change_open(region) || atomic_load_explicit(&record->kind, memory_order_relaxed) != PS_THAW ||
        atomic_load_explicit(&record->attempt, memory_order_relaxed) == last ||
        ps_protection(region, page) == PROT_READ)
        return last;
    uint64_t back = atomic_load_explicit(&record->back, memory_order_relaxed);
    return back < last ? back : last;
}

/* Searches back from the open record through the ring; a change that was undone, or a thaw, set nothing. */
struct ps_author ps_change_author(const struct ps_region *region, uint64_t page) {
    struct ps_author author;
    if (set_by_record(region, page, &author))
        return author;
    uint64_t last = ps_generation(region), oldest = last > PS_RING ? last - PS_RING : 0;
    if (in_undo(region, last))
        last--;
    last = before_thaw(region, page, last);
    for (uint64_t generation = last; generation > oldest; generation--) {
        struct ps_shm_ring entry;
        if (!ps_change_read(region, generation, &entry))
            return (struct ps_author){.known = false};
        if (entry.kind == PS_UNDO)
            generation--;
        else if (entry.kind == PS_THAW)
            generation = entry.back < generation ? entry.back + 1 : generation;
        else if (entry.kind != PS_FOLLOW && page >= entry.first && page - entry.first < entry.count)
            return (struct ps_author){true, generation, entry.author, entry.time};
    }
    if (oldest)
        return (struct ps_author){.known = false};
    return (struct ps_author){true, 0, region->shape.creator, region->shape.created};
}

/* -- The copy -------------------------------------------------------------------------------------------------- */

/* A page's protection and the change that set it, of one moment. */
struct ps_author ps_change_look(struct ps_region *region, uint64_t page, uint32_t *prot) {
    for (int tries = 0;; tries++) {
        uint64_t generation = ps_generation(region);
        *prot = ps_protection(region, page);
        struct ps_author author = ps_change_author(region, page);
        if ((generation == ps_generation(region) && *prot == ps_protection(region, page)) || tries == LOOKS)
            return author;
    }
}
