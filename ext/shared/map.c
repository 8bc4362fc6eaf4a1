/* map.c - the map: one byte a page, its protection for all.
 *
 * Invariants
 *  1. It is written by whoever makes or finishes the open record, under the
 *     writer lock, and any number of times with the same result.
 *  2. What is read is masked, never trusted.
 * Runs in: caller, agent, signal handler (reading).
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "core.h"
#include "process/process.h"
#include "shared/shared.h"

#define PROT_MASK 7u
#define WORD 8u    /* pages in a 64-bit word of the map */
#define HOLE 4096u /* pages whose bytes share a page of the memfd */

static _Atomic uint8_t *map_of(const struct ps_region *region, enum ps_section_kind section) {
    return ps_section(region, section);
}

/* relaxed everywhere: the generation (or the lock) orders the map; a byte cannot tear, and a reader that
 * overtakes an open change sees what is going to be published. */
static uint8_t map_byte(const struct ps_region *region, uint64_t page) {
    return atomic_load_explicit(map_of(region, PS_SEC_CUR) + page, memory_order_relaxed);
}

static uint64_t map_word(const _Atomic uint8_t *byte) {
    return atomic_load_explicit((const _Atomic uint64_t *)(const void *)byte, memory_order_relaxed);
}

static void map_fill(struct ps_region *region, uint64_t first, uint64_t count, uint32_t prot) {
    _Atomic uint8_t *at = map_of(region, PS_SEC_CUR) + first, *end = at + count;
    uint8_t byte = (uint8_t)(prot ^ region->shape.initial);
    while (at < end)
        if ((uintptr_t)at % WORD == 0 && end - at >= (ptrdiff_t)WORD) {
            atomic_store_explicit((_Atomic uint64_t *)(void *)at, byte * UINT64_C(0x0101010101010101),
                                  memory_order_relaxed);
            at += WORD;
        } else {
            atomic_store_explicit(at++, byte, memory_order_relaxed);
        }
}

void ps_map_copy(struct ps_region *region, enum ps_section_kind to, enum ps_section_kind from, uint64_t first,
                 uint64_t count) {
    _Atomic uint8_t *target = map_of(region, to) + first, *source = map_of(region, from) + first;
    for (uint64_t i = 0; i < count;)
        if ((uintptr_t)(target + i) % WORD == 0 && count - i >= WORD) {
            atomic_store_explicit((_Atomic uint64_t *)(void *)(target + i), map_word(source + i), memory_order_relaxed);
            i += WORD;
        } else {
            atomic_store_explicit(target + i, atomic_load_explicit(source + i, memory_order_relaxed),
                                  memory_order_relaxed);
            i++;
        }
}

/* C4 of a change that is no undo. */
void ps_map_set(struct ps_region *region, enum ps_kind kind, uint64_t first, uint64_t count, uint32_t prot) {
    atomic_thread_fence(memory_order_release); /* pairs with ps_change_look: who sees the map of a change sees its C3 */
    if (kind == PS_THAW)
        ps_map_copy(region, PS_SEC_CUR, PS_SEC_KEPT, first, count);
    else
        map_fill(region, first, count, prot);
}

uint32_t ps_protection(const struct ps_region *region, uint64_t page) {
    return (map_byte(region, page) ^ region->shape.initial) & PROT_MASK;
}

/* The first page from `page` on whose byte the memfd really holds. */
static uint64_t skip_hole(struct ps_region *region, uint64_t page, uint64_t end) {
    uint64_t map = region->shape.offset[PS_SEC_CUR];
    return ps_region_skip_hole(region, map + page, map + end) - map;
}

uint64_t ps_run(struct ps_region *region, uint64_t page, uint64_t end, uint32_t *prot) {
    const _Atomic uint8_t *map = map_of(region, PS_SEC_CUR);
    uint64_t at = page;
    uint8_t byte = map_byte(region, page);
    *prot = (byte ^ region->shape.initial) & PROT_MASK;
    while (++at < end) {
        while (at % WORD == 0 && end - at >= WORD) {
            if (!byte && at % HOLE == 0 && end - at > HOLE)
                at = skip_hole(region, at, end);
            if (at >= end || map_word(map + at) != byte * UINT64_C(0x0101010101010101))
                break;
            at += WORD;
        }
        if (at >= end || map_byte(region, at) != byte)
            break;
    }
    return (at < end ? at : end) - page;
}
