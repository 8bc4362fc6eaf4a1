/* image.h - what a snapshot's two sides know of each other: those who save for it (snapshot.c), who holds it (image.c).
 */
#ifndef PS_IMAGE_H
#define PS_IMAGE_H

#include <string.h>

#include "participant.h"

/* Bytes between the states of two areas. */
static inline uint64_t ps_state_stride(uint64_t pages) {
    return (pages + PS_PAGE - 1) / PS_PAGE * PS_PAGE;
}

/* A page of zeros is a hole of the area. */
static inline bool ps_all_zero(const char *bytes, size_t length) {
    return !bytes[0] && !memcmp(bytes, bytes + 1, length - 1);
}

/* Is this page of the data other than the snapshot's?  What is found counts only where it is alive afterwards. */
int ps_snapshot_differs(const struct ps_snapshot *snapshot, uint64_t page, bool *differs);
int ps_snapshot_alive(const struct ps_snapshot *snapshot); /* 0; PS_ECORRUPT: it was given up */
int ps_snapshot_map(struct ps_snapshot *snapshot, const struct ps_shape *shape);

#endif
