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

/* How much of each of these pages of the data is other than the snapshot's; with a snapshot that is held. */
int ps_snapshot_differs(const struct ps_snapshot *snapshot, uint64_t page, bool *differs);
int ps_snapshot_map(struct ps_snapshot *snapshot, const struct ps_shape *shape);

#endif
