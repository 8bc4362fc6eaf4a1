/* fault.h - the door of fault/: what happens at a forbidden access.
 *
 * The binding is asked (ps_hooks) while nothing of ours is held.
 */
#ifndef PS_FAULT_H
#define PS_FAULT_H

#include <signal.h>
#include <ucontext.h>

#include "core.h"
#include "process/process.h"
#include "segment/layout.h"

enum ps_fate {
    DIE, /* as if there were no other policy */
    GO,  /* the instruction may run again */
};

/* message.c */
void ps_fault_record(struct ps_region *region, uint64_t offset, bool store, enum ps_policy outcome);
void ps_fault_print(struct ps_region *region, uintptr_t address, int signal, const greg_t *registers);

/* policy.c */
int ps_fault_sleep_on_map(struct ps_region *region);
enum ps_fate ps_fault_by_policy(struct ps_region *region, uint64_t offset, bool store, const ucontext_t *context);

/* Page-fault error code (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3, 4.7). */
static inline bool ps_fault_stores(const greg_t *registers) {
    return registers[REG_ERR] & (1 << 1);
}

static inline bool ps_fault_executes(const greg_t *registers) {
    return registers[REG_ERR] & (1 << 4);
}

#endif
