/* change.h - the door of change/: one change of protection through all participants.
 *
 * Lives here: the caller's state machine, following in the place of others, the
 * borrowed userfaultfds, the freezer's word.
 * Not here: who holds leases (hold/), the verbs (operations/protect.c).
 */
#ifndef PS_CHANGE_H
#define PS_CHANGE_H

#include <stdbool.h>
#include <stdint.h>

#include "process/process.h"
#include "segment/layout.h"
#include "shared/shared.h"
#include "types.h"

/* remote.c: following in the place of others */
#define PS_OUTSIDE_RUNS 16u /* system calls a participant; a change with more of them goes the other way */
struct ps_outside {         /* what a change does to page-table entries */
    uint32_t count;
    struct {
        uint64_t first, count;
        bool protect;
    } run[PS_OUTSIDE_RUNS];
};

struct ps_change_wait {
    uint64_t generation;
    struct ps_until until;
    bool committed;   /* nobody undoes it: who failed is waited for until it has fenced itself */
    uint32_t slowest; /* pid of the last one that had not acknowledged when it was first looked at; 0: none */
    int spins;  /* looks before sleeping: where every agent has a CPU of its own it answers sooner than we sleep */
    int socket; /* of ours, for answers from agents that were asked for their userfaultfd; -1: none was */
    struct ps_outcome *outcome; /* NULL: nobody wants to know; it is large, and there is little room in the handler */
};

struct ps_change_request {
    enum ps_kind kind; /* any but PS_UNDO */
    uint32_t prot;     /* or enum ps_follow */
    uint64_t first, count;
    uint64_t back; /* of a thaw the generation before the freeze */
};

/* borrow.c */
int ps_borrow(struct ps_region *region, uint32_t slot, uint32_t status, int *socket);
uintptr_t ps_borrow_data(const struct ps_region *region, uint32_t slot);
void ps_borrow_lost(struct ps_region *region, uint32_t slot);
void ps_borrow_collect(struct ps_region *region, int socket);
int ps_borrow_offer(struct ps_region *region, uint32_t *name);
void ps_borrow_answer(struct ps_region *region);
void ps_borrow_give_back(struct ps_region *region);

/* change.c */
bool ps_change_told_early(const struct ps_region *region, uint64_t generation); /* as long as the ring has it */
bool ps_change_deserted(struct ps_region *region);
bool ps_change_under_way(const struct ps_region *region, uint64_t *generation, uint64_t *first, uint64_t *count);
int ps_change_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker);
bool ps_frozen(const struct ps_region *region);
int ps_change_freeze(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
int ps_change_thaw(struct ps_region *region, int64_t deadline, uint32_t *blocker);
/* With the writer lock, and no record open: a generation at which page tables follow the map again as `how` says. */
int ps_change_follow(struct ps_region *region, uint32_t how, int64_t deadline, struct ps_outcome *outcome);
/* With the writer lock: finishes the record of a dead caller. */
int ps_change_settle(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
int ps_change_carry_out(struct ps_region *region, const struct ps_change_request *change,
                        struct ps_change_wait *waiting);
void ps_change_leave(struct ps_region *region, struct ps_change_wait *waiting);
int ps_change_enter(struct ps_region *region, int64_t deadline, struct ps_change_wait *waiting,
                    struct ps_outcome *outcome);
bool ps_change_grants(const struct ps_region *region, const struct ps_change_request *wanted);
int ps_change_save_ahead(struct ps_region *region, const struct ps_change_request *wanted, int64_t deadline,
                         struct ps_outcome *outcome);

/* freezer.c */
bool ps_freeze_own(const struct ps_region *region); /* the calling thread */
int ps_freeze_wait(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);
int ps_freeze_finish(struct ps_region *region, int64_t deadline, uint32_t *blocker);
/* Ends the freeze of a dead freezer, if there is one, or waits for who does; true: look again.  Of a participant;
 * async-signal-safe. */
bool ps_freeze_notice(struct ps_region *region, int64_t patience);
void ps_freezer_thread(struct ps_region *region, int tid);
void ps_freezer_clear(struct ps_region *region);
int ps_freezer_take(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome);

/* remote.c */
bool ps_remote_plan(const struct ps_region *region, enum ps_kind kind, struct ps_outside *outside);
/* Bits (ps_slot_bit) of the participants that must follow by themselves: certainly; after those who could be reached
 * were. */
uint32_t ps_remote_out_of_reach(struct ps_region *region, bool any);
uint32_t ps_remote_change(struct ps_region *region, uint64_t generation, const struct ps_outside *outside, int *socket);

#endif
