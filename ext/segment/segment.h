/* segment.h - the door of segment/: the memfd and its format.
 *
 * Lives here: sizes, what the header of a region is checked to say (struct
 * ps_shape), where things lie from there.  The format itself is layout.h's.
 * Not here: mappings (process/).
 */
#ifndef PS_SEGMENT_H
#define PS_SEGMENT_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#define PS_PAGE 4096u
#define PS_GUARD (64u * 1024u)  /* before the data, no-access: it begins with the canary */
#define PS_BOUNDARY (2u << 20)  /* of page tables: there data begins */
#define PS_CANARY (2 * PS_PAGE) /* in the place of data: marked, to see who marks what */
#define PS_CHUNK 512u           /* pages that the uffd engine arms together: those of one page table */

/* Far from where the kernel looks for room (mmap_base, downwards) and from the heap: the range that a raw
 * child loses by DONTFORK is not handed out again there.  A build with a sanitizer moves it. */
#ifndef PS_FAR_BASE
#define PS_FAR_BASE 0x100000000000u
#define PS_FAR_SIZE 0x400000000000u
#endif

/* What is to be made. */
struct ps_creation {
    uint64_t size;
    uint32_t prot, slots, mode;
    uint32_t page_size; /* PS_PAGE, or that of huge pages */
    uint32_t flags;     /* PS_REGION_* */
    enum ps_policy policy;
    const char *name;
};

/* From which NUMA nodes memory comes: a mode of set_mempolicy(2), and a bit a node. */
#define PS_NODES 1024u
struct ps_numa {
    int mode;
    unsigned long nodes[PS_NODES / (8 * sizeof(unsigned long))];
};

/* What the header said at attach. */
struct ps_shape {
    uint64_t control_size, size, pages;
    uint32_t unit; /* pages (PS_PAGE) of a page of the memfd: 1, or of a huge one */
    uint32_t slots, initial, policy, areas, flags;
    uint64_t nonce[2], created;
    uint32_t creator;
    char name[PS_NAME_MAX + 8];
    uint64_t offset[PS_SECTIONS]; /* by enum ps_section_kind */
};

#define PS_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)

/* format.c */
void ps_region_lay_out(struct ps_shm_header *header);
uint64_t ps_region_file_length(const struct ps_shm_header *header);
int ps_region_validate(int fd, struct ps_shape *shape, const char **field);
int ps_region_data(int fd, uint64_t begin, uint64_t pages, uint64_t *page, uint64_t *count);

/* No-access, on both sides of each mapping of the data; whole units, so that those lie where huge pages may. */
static inline uint64_t ps_guard(const struct ps_shape *shape) {
    return shape->unit > PS_GUARD / PS_PAGE ? (uint64_t)shape->unit * PS_PAGE : PS_GUARD;
}

static inline uint64_t ps_data_offset(const struct ps_shape *shape) {
    return shape->control_size + ps_guard(shape);
}

static inline uint64_t ps_chunks(const struct ps_shape *shape) {
    return (shape->pages + PS_CHUNK - 1) / PS_CHUNK;
}

/* Of the second mapping of the data, from the first. */
static inline uint64_t ps_window_offset(const struct ps_shape *shape) {
    return shape->pages * PS_PAGE + ps_guard(shape);
}

/* Bytes between the states of two areas. */
static inline uint64_t ps_state_stride(uint64_t pages) {
    return (pages + PS_PAGE - 1) / PS_PAGE * PS_PAGE;
}

/* A page of zeros is a hole of the area. */
static inline bool ps_all_zero(const char *bytes, size_t length) {
    return !bytes[0] && !memcmp(bytes, bytes + 1, length - 1);
}

#endif
