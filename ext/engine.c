/* engine.c - how page tables change: by mprotect.
 *
 * Lives here: making our own mapping follow the map, and the fence.
 * Invariants
 *  1. No waiting and no writes to shared state.
 *  2. Called under the page lock.
 *  3. Rights come from the map alone; what it says is masked, never trusted.
 * Runs in: caller, agent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "participant.h"

static_assert(PROT_READ == 1 && PROT_WRITE == 2 && PROT_EXEC == 4, "map bytes are PROT_* of x86-64 Linux");

static bool leased_here(const struct ps_region *region, uint64_t page) {
    uint32_t held = PS_HERE_HELD | PS_HERE_IN_PLACE;
    return (atomic_load_explicit(&region->here[page], memory_order_acquire) & held) == held;
}

/* As ps_run, of what our page tables should be: what the map says, and read-write where we hold a lease. */
static uint64_t wanted_run(struct ps_region *region, uint64_t page, uint64_t end, uint32_t *prot) {
    uint64_t run = ps_run(region, page, end, prot), same = 1;
    if (!atomic_load_explicit(&region->leased, memory_order_acquire))
        return run;
    bool leased = leased_here(region, page);
    while (same < run && leased_here(region, page + same) == leased)
        same++;
    if (leased && *prot == PROT_READ)
        *prot = PROT_READ | PROT_WRITE;
    return same;
}

int ps_engine_apply(struct ps_region *region, uint64_t first, uint64_t count) {
    char *data = ps_address(region);
    for (uint64_t page = first, end = first + count, run; page < end; page += run) {
        uint32_t prot;
        run = wanted_run(region, page, end, &prot);
        if (mprotect(data + page * PS_PAGE, run * PS_PAGE, (int)prot))
            return -errno;
    }
    return 0;
}

/* Taking all rights from the whole mapping merges its VMAs, so it succeeds where nothing else does.  Should it
 * fail all the same, no participant is better than one with rights that it must not have. */
void ps_engine_fence(struct ps_region *region) {
    if (mprotect(ps_address(region), region->shape.pages * PS_PAGE, PROT_NONE) && ps_region_unmap_data(region))
        __builtin_trap();
}
