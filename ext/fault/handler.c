/* handler.c - the handler of SIGSEGV and SIGBUS.
 *
 * Lives here: telling whose fault it is, and which way it goes.
 * Invariants
 *  1. The handler is async-signal-safe: no lock, no malloc, no stdio, errno
 *     preserved; what it reads of the table and of shared memory are atomics.
 *  2. Only faults in our own ranges are ours; every other one goes to the handler
 *     below as if we were not there.
 *  3. A fault is never swallowed: it is mended (the copy; a change that was in
 *     the way), told as an exception, waited out, or the process ends by the
 *     signal.
 * Not here: policies (policy.c), the line (message.c), the chain (process/signals.c).
 * Runs in: signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "change/change.h"
#include "core.h"
#include "fault/fault.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for a change, at one generation, or for an install */
#define REPEATS 64              /* a fault runs again at most so often where the map allows it */

/* -- Changes under way ----------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
    return ((a * UINT64_C(0x9e3779b97f4a7c15) ^ b) * UINT64_C(0x9e3779b97f4a7c15) ^ c) | 1;
}

/* What page tables are late for is a snapshot's beginning or end alone: the map stays what it is. */
static bool only_follows(struct ps_region *region) {
    uint64_t generation = ps_generation(region), applied = ps_applied(region);
    struct ps_shm_ring entry;
    /* acquire: as ps_change_open; an attempt that is not published yet may be of any kind */
    if (atomic_load_explicit(&ps_header(region)->record.attempt, memory_order_acquire) > generation)
        return false;
    do
        if (!ps_change_read(region, generation, &entry) || entry.kind != PS_FOLLOW)
            return false;
    while (--generation > applied);
    return true;
}

/* A sleep until our page tables follow another generation; a change may be over without that, so not a long one. */
static void nap(struct ps_region *region) {
    _Atomic uint32_t *ack = &ps_slot(region, region->slot)->ack;
    struct ps_watch watch = {ack, atomic_load_explicit(ack, memory_order_relaxed)};
    uint32_t owner = ps_lock_owner(region);
    if (owner && ps_owner_known(region, owner)) /* whose thread may have been ended alone */
        ps_owner_nap(region, watch, owner, ps_sys_now() + PS_MS);
    else
        ps_sys_wait(watch, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS);
}

/* Does the map forbid what each of these rights allows, and not just a change that may be undone?  A look at the page
 * counts where afterwards no change is undecided, and the generation is what it was before: whatever change the byte is
 * of has been published by then, and put back before that if it was undone.  Where the caller has died the look has to
 * do, since nobody may come to decide its change; but where that change is to be undone the access is allowed then, and
 * somebody may come in time.  Where changes follow one another PATIENCE begins anew, as it does at a new fault; at one
 * generation not for ever: the caller may be stopped. */
static bool forbids(struct ps_region *region, uint64_t page, uint32_t rights) {
    uint64_t generation = ps_generation(region);
    for (int64_t end = ps_sys_now() + PATIENCE;;) {
        uint32_t prot = ps_protection(region, page);
        atomic_thread_fence(memory_order_acquire); /* pairs with C4: who saw the map of a change sees its attempt */
        bool undecided = ps_change_undecided(region);
        uint64_t next = ps_generation(region);
        if (next != generation) {
            generation = next;
            end = ps_sys_now() + PATIENCE;
        } else if (!undecided || ps_sys_now() >= end || ps_change_deserted(region)) {
            return !(prot & rights);
        } else {
            nap(region);
        }
    }
}

enum verdict {
    AGAIN,     /* the access is allowed: the instruction may run again */
    FORBIDDEN, /* by the map */
    STUCK,     /* it is allowed, and cannot be made */
};

/* The fault met a change under way: wait for its outcome.  At one generation the instruction runs again not for ever,
 * should our page tables never follow the map. */
static enum verdict outlive_change(struct ps_region *region, uint64_t page, const greg_t *registers, uint64_t fault) {
    struct ps_faults *faults = ps_process_faults();
    bool store = ps_fault_stores(registers);
    bool copied = store && ps_rights_allow(ps_protection(region, page), true) && !region->fenced &&
                  (ps_snapshots(region) || only_follows(region)) && !ps_snapshot_open(region, page);
    if (!copied && forbids(region, page, ps_fault_executes(registers) ? PROT_EXEC : ps_rights_for(store)))
        return FORBIDDEN;
    for (int64_t end = ps_sys_now() + PATIENCE; !copied && ps_rights_late(region) && ps_sys_now() < end;)
        nap(region);
    if (region->fenced)
        return STUCK;
    /* A handler jumped out of an earlier violation here (ps_engine_refuse); a snapshot that is over left it closed; or
     * our agent has ended, and nobody else follows the map. */
    if (region->unsynced || ps_rights_late(region) || (store && !copied))
        ps_rights_mend(region, page);
    uint64_t retry = mix(fault, ps_generation(region), 0);
    if (retry != faults->retried)
        faults->retries = 0;
    faults->retried = retry;
    return faults->retries++ < REPEATS ? AGAIN : STUCK;
}

/* -- The handler ----------------------------------------------------------------------------------------------- */

/* The kernel's word; or, raised again by a handler above us (raise() gives no address), what the registers still
 * hold of it.  They hold it long: what the kernel has told us before is old news. */
static uintptr_t address_of(const siginfo_t *info, const greg_t *registers) {
    struct ps_faults *faults = ps_process_faults();
    if (info->si_code > 0)
        return faults->seen = (uintptr_t)info->si_addr;
    if (info->si_code != SI_TKILL || info->si_pid != getpid() || registers[REG_TRAPNO] != 14)
        return 0;
    uintptr_t address = (uintptr_t)registers[REG_CR2];
    return address != faults->seen ? address : 0;
}

static void on_fault(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    bool by_kernel = info->si_code > 0;
    int saved = errno;
    uintptr_t address = address_of(info, registers), frame = (uintptr_t)__builtin_frame_address(0);
    if (by_kernel && registers[REG_RIP] == (greg_t)(uintptr_t)ps_copy_instruction) {
        registers[REG_RDX] = (greg_t)(address | (signal == SIGBUS ? PS_COPY_NO_PAGE : 0));
        registers[REG_RIP] = (greg_t)(uintptr_t)ps_copy_end;
        return;
    }
    struct ps_region *region = address && ps_process_known() ? ps_process_find(address) : NULL;
    uint64_t fault = mix((uint64_t)registers[REG_RIP], address, (uint64_t)registers[REG_RSP]);
    uint64_t at = region ? address - (uintptr_t)ps_address(region) : 0;
    bool store = ps_fault_stores(registers);
    bool data = region && ps_running(region) && at < region->shape.pages * PS_PAGE;
    bool mark = data && signal == SIGBUS && region->uffd && store;
    enum verdict verdict = mark && !ps_rights_allow(ps_protection(region, at / PS_PAGE), store) ? FORBIDDEN : STUCK;
    struct ps_patience before = *ps_process_patience(); /* of a call that we may be in the midst of */
    if (data && by_kernel && (mark || signal == SIGSEGV)) {
        verdict = outlive_change(region, at / PS_PAGE, registers, fault);
        bool again = verdict == AGAIN || ps_freeze_notice(region, PATIENCE);
        *ps_process_patience() = before;
        if (again) {
            errno = saved;
            return;
        }
    }
    bool forbidden = signal == SIGSEGV || verdict == FORBIDDEN;
    bool goes_on = data && by_kernel && forbidden && !ps_fault_executes(registers) &&
                   ps_fault_by_policy(region, at, store, context) == GO;
    *ps_process_patience() = before;
    if (goes_on) {
        errno = saved;
        return;
    }
    if (mark && forbidden) {                    /* else there is no memory for the page */
        ps_engine_refuse(region, at / PS_PAGE); /* it comes again, as SIGSEGV */
        errno = saved;
        return;
    }
    struct ps_offer *offer = &ps_process_faults()->offer[signal == SIGBUS];
    if (!ps_chain_on_its_way(offer, fault, by_kernel, region != NULL, frame)) {
        offer->level = UINT32_MAX;
        if (region)
            ps_fault_print(region, address, signal, registers);
    }
    uintptr_t outer = offer->frame;
    offer->fault = fault;
    offer->frame = frame;
    offer->returned = false;
    errno = saved;
    ps_chain_pass_on(signal, info, context, by_kernel, offer);
    offer->frame = outer;
    offer->returned = true;
}

/* When the library is loaded, so before any region: what puts our handler on top lies below it, and does not know it.
 */
__attribute__((constructor)) static void start(void) {
    ps_process_set_handler(on_fault);
}

/* faulthandler's, if it came above ours: once disabled it returns at once, wherever it is called from, and a fault that
 * it is given would come for ever. */
static void follow_tracer(int signal, bool enabled) {
    struct ps_chain *chain = ps_process_chain(signal);
    struct sigaction top;
    sigaction(signal, NULL, &top);
    while (atomic_exchange_explicit(&chain->busy, 1, memory_order_acquire))
        ps_chain_await_install(chain);
    if (!enabled && chain->tracer.sa_handler)
        ps_chain_rewrite(chain, &chain->tracer, false);
    chain->tracer = enabled ? top : (struct sigaction){.sa_handler = NULL};
    atomic_store_explicit(&chain->busy, 0, memory_order_release);
}

void ps_fault_tracer(bool enabled) {
    follow_tracer(SIGSEGV, enabled);
    follow_tracer(SIGBUS, enabled);
    ps_fault_install();
}
