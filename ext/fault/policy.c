/* policy.c - what becomes of who makes a forbidden access: die, raise, wait.
 *
 * Runs in: signal handler; ps_policy and ps_set_policy in a caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

#include "change/change.h"
#include "core.h"
#include "fault/fault.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for a change, at one generation, or for an install */
#define REPEATS 64              /* a fault runs again at most so often where the map allows it */
/* How long a wait by policy sleeps before it looks at leases and for signals; at a freeze, whose end may have to be
 * ours, PS_BACKSTOP. */
#define SLICE (20 * PS_MS)
#define RED_ZONE                                                                                                       \
    128u /* below the stack pointer, and in use (System V ABI, AMD64 Architecture Processor Supplement)                \
          */

enum ps_policy ps_policy(const struct ps_region *region) {
    return (enum ps_policy)atomic_load_explicit(&region->policy, memory_order_relaxed);
}

void ps_set_policy(struct ps_region *region, enum ps_policy policy) {
    atomic_store_explicit(&region->policy, policy, memory_order_relaxed);
}

static bool in_order(const struct ps_region *region) {
    return ps_running(region) && !region->fenced && atomic_load_explicit(&region->use, memory_order_acquire) == PS_OPEN;
}

/* How many pages from `page` on, before `end`, are as forbidden as it is; all of its unit. */
static uint64_t forbidden_run(struct ps_region *region, uint64_t page, uint64_t end, bool store) {
    uint32_t prot = ps_protection(region, page), unit = region->shape.unit;
    uint64_t next = page + unit;
    while (next < end && ps_protection(region, next) == prot && !ps_rights_permit(region, next, store))
        next += unit;
    return next - page;
}

/* The page becomes private, and probably some behind it; unless it is allowed by now. 1: it was forbidden. */
static int quarantine(struct ps_region *region, uint64_t page, bool store) {
    int rc = ps_pages_take(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    if (!in_order(region)) {
        rc = -EACCES;
    } else if (ps_rights_permit(region, page, store)) {
        rc = ps_engine_mend(region, page);
    } else {
        uint64_t first = ps_unit_of(region, page), end = page + ps_quarantine_wish(region, page);
        end = end < region->shape.pages ? end : region->shape.pages;
        rc = ps_quarantine_begin(region, first, forbidden_run(region, first, end, store));
        rc = rc ? rc : 1;
    }
    ps_pages_give(region);
    return rc;
}

static void describe(struct ps_region *region, uint64_t offset, bool store, struct ps_violation *violation) {
    struct ps_refusal refusal;
    ps_rights_refuse(region, offset / PS_PAGE, store, &refusal);
    violation->offset = offset;
    violation->page_size = ps_page_size(region);
    violation->actual = refusal.actual;
    violation->required = refusal.required;
    violation->author = refusal.author;
    memcpy(violation->region, region->shape.name, sizeof violation->region);
}

/* What the thread is to be told of, so that nothing else is told before. */
static bool is_due(const struct ps_hooks *hooks) {
    return ps_violation()->count && hooks->is_due();
}

enum cause {
    FORBIDS,     /* the policy */
    OVERDUE,     /* a wait has taken too long */
    INTERRUPTED, /* a wait has ended, for a signal's handler that is due */
    RAISED,      /* ... for an exception of one, which comes even if the access is allowed by now */
};

/* The access goes to a private page, and the thread is told of it. */
static enum ps_fate raise_it(const struct ps_hooks *hooks, struct ps_region *region, uint64_t offset, bool store,
                             enum cause cause) {
    struct ps_violation *violation = ps_violation();
    if (!hooks->can_raise())
        return DIE;
    int rc = quarantine(region, offset / PS_PAGE, store);
    if (rc < 0 || (!rc && cause != RAISED))
        return rc ? DIE : GO;
    if (is_due(hooks)) {
        violation->count++;
        return GO;
    }
    violation->count = 1;
    violation->interrupted = cause == INTERRUPTED;
    describe(region, offset, store, violation);
    if (cause == FORBIDS) /* else it is kept as what waited */
        ps_fault_record(region, offset, store, PS_RAISE);
    hooks->tell();
    return GO;
}

/* One sleep, until our page tables follow another generation, or a while has passed: then leases may have changed, or
 * a freezer may have died. */
int ps_fault_sleep_on_map(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    uint32_t seen = atomic_load_explicit(&slot->ack, memory_order_relaxed), flagged = seen | PS_ACK_WAITING;
    if (seen != flagged && !atomic_compare_exchange_strong_explicit(&slot->ack, &seen, flagged, memory_order_relaxed,
                                                                    memory_order_relaxed))
        return 0;
    struct ps_watch watch = {&slot->ack, flagged};
    uint32_t freezer = atomic_load_explicit(&ps_header(region)->freezer, memory_order_relaxed);
    if (freezer && ps_freeze_notice(region, PATIENCE))
        return 0;
    int64_t end = ps_sys_now() + (freezer ? PS_BACKSTOP : SLICE);
    return freezer && ps_owner_known(region, freezer) ? ps_owner_nap(region, watch, freezer, end)
                                                      : ps_sys_wait(watch, FUTEX_BITSET_MATCH_ANY, end);
}

/* void ps_call_on(uintptr_t stack, void (*function)(void *), void *argument) */
__asm__(".text\n"
        ".p2align 4\n"
        ".globl ps_call_on\n.hidden ps_call_on\n.type ps_call_on, @function\n"
        "ps_call_on:\n"
        "\tpushq %rbx\n"
        "\tmovq %rsp, %rbx\n"
        "\tmovq %rdi, %rsp\n"
        "\tmovq %rdx, %rdi\n"
        "\tcall *%rsi\n"
        "\tmovq %rbx, %rsp\n"
        "\tpopq %rbx\n"
        "\tret\n"
        ".size ps_call_on, .-ps_call_on\n");

void ps_call_on(uintptr_t stack, void (*function)(void *), void *argument);

struct service {
    const struct ps_hooks *hooks;
    sigset_t mask; /* the thread's */
    bool done;
};

/* On the thread's own stack.  A fault meanwhile must not have the alternate one from its beginning, where we are. */
static void serve_there(void *argument) {
    struct service *service = argument;
    sigset_t all;
    stack_t alternate;
    sigaltstack(&(stack_t){.ss_flags = SS_DISABLE}, &alternate);
    pthread_sigmask(SIG_SETMASK, &service->mask, &all);
    service->done = service->hooks->serve();
    pthread_sigmask(SIG_SETMASK, &all, &service->mask);
    sigaltstack(&alternate, NULL);
}

/* A handler of Python's needs more stack than a handler of signals may have got.  No signal comes between a change of
 * stacks and the kernel's being told of it: its handler would have the alternate one from its beginning, too. */
static bool serve(const struct ps_hooks *hooks, const ucontext_t *context) {
    uintptr_t here = (uintptr_t)__builtin_frame_address(0), own = (uintptr_t)context->uc_mcontext.gregs[REG_RSP];
    const stack_t *alternate = &context->uc_stack;
    if (alternate->ss_flags & SS_DISABLE || here - (uintptr_t)alternate->ss_sp >= alternate->ss_size)
        return hooks->serve();
    struct service service = {.hooks = hooks};
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &service.mask);
    ps_call_on((own - RED_ZONE) & ~(uintptr_t)15, serve_there, &service);
    pthread_sigmask(SIG_SETMASK, &service.mask, NULL);
    return service.done;
}

/* Why a wait ends before the access is allowed; FORBIDS: not yet.  Where the interpreter has to be kept others may wait
 * for it, even who is to open the page: not for ever. */
static enum cause ends_wait(const struct ps_hooks *hooks, const ucontext_t *context, bool keeps, int64_t *end) {
    if (hooks->is_signalled() && (keeps || !serve(hooks, context)))
        return keeps ? INTERRUPTED : RAISED;
    if (keeps && *end == PS_NEVER && hooks->is_wanted())
        *end = ps_sys_now() + PATIENCE;
    return ps_sys_now() < *end ? FORBIDS : OVERDUE;
}

static enum ps_fate wait_for_it(const struct ps_hooks *hooks, struct ps_region *region, uint64_t offset, bool store,
                                const ucontext_t *context) {
    ps_fault_record(region, offset, store, PS_WAIT);
    bool keeps = hooks->keeps();
    void *token = keeps ? NULL : hooks->release();
    enum cause cause = FORBIDS;
    int64_t end = PS_NEVER;
    while (cause == FORBIDS && in_order(region) && ps_policy(region) == PS_WAIT &&
           !ps_rights_permit(region, offset / PS_PAGE, store)) {
        ps_fault_sleep_on_map(region);
        cause = ends_wait(hooks, context, keeps, &end);
    }
    hooks->regain(token);
    if (cause != FORBIDS)
        return raise_it(hooks, region, offset, store, cause);
    return in_order(region) ? GO : DIE;
}

enum ps_fate ps_fault_by_policy(struct ps_region *region, uint64_t offset, bool store, const ucontext_t *context) {
    const struct ps_hooks *hooks = ps_process_hooks();
    enum ps_policy policy = hooks ? ps_policy(region) : PS_DIE;
    if (policy == PS_DIE || !in_order(region))
        return DIE;
    if (ps_rights_permit(region, offset / PS_PAGE, store)) /* our page tables should: not for ever */
        return ps_process_faults()->retries < 2 * REPEATS && !ps_rights_mend(region, offset / PS_PAGE) ? GO : DIE;
    /* A thread that is to raise does not wait on the way there, and nobody waits for himself. */
    if (policy == PS_WAIT && !is_due(hooks) && !ps_freeze_own(region))
        return wait_for_it(hooks, region, offset, store, context);
    return raise_it(hooks, region, offset, store, FORBIDS);
}
