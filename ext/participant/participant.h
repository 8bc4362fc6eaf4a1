/* participant.h - the door of participant/: joining a region, following it as a thread, leaving it.
 *
 * Not here: what following means (pages/follow.c).
 */
#ifndef PS_PARTICIPANT_H
#define PS_PARTICIPANT_H

#include <stdbool.h>
#include <stdint.h>

#include "process/process.h"
#include "types.h"

/* agent.c */
int ps_agent_start(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
void ps_agent_stop(struct ps_region *region);
bool ps_agent_lost(struct ps_region *region);

/* attach.c */

/* names.c */
void ps_name_write_row(struct ps_region *region, bool present);
void ps_name_answer(struct ps_region *region);

#endif
