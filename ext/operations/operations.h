/* operations.h - the door of operations/: what a program asks for, one file a verb.
 *
 * Most of it is declared in core.h, for the binding; here stands what the files of
 * this folder offer each other.
 */
#ifndef PS_OPERATIONS_H
#define PS_OPERATIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "segment/segment.h"
#include "types.h"

/* image.c */
/* Is this page of the data other than the snapshot's?  What is found counts only where it is alive afterwards. */
int ps_snapshot_differs(const struct ps_snapshot *snapshot, uint64_t page, bool *differs);
int ps_snapshot_alive(const struct ps_snapshot *snapshot); /* 0; PS_ECORRUPT: it was given up */
int ps_snapshot_map(struct ps_snapshot *snapshot, const struct ps_shape *shape);

#endif
