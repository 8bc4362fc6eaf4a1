/* waiter.c - the one native thread in which the calls of event loops wait.
 *
 * A call that has to wait runs the very code that blocks any other thread, on a
 * stack of its own.  Where that code sleeps (ps_sleep), the thread leaves the
 * stack for another one, and comes back when a word that the call watches has
 * changed, or its deadline has come.  So there is one way to wait for anything,
 * and any number of calls wait in one thread.  What a call came to goes into
 * the mailbox of its loop, whose eventfd says so.
 *
 * Invariants
 *  1. From ps_call_begin on until it lies in its mailbox a call is the
 *     waiter's; its loop may only cancel it.
 *  2. Calls that want the same (lease or lock) begin one after the other, in
 *     the order in which they came, from whatever loop.  One whose time is up,
 *     or that is cancelled, does not wait for those before it.
 *  3. Cancelling is to a call what a signal is to a thread: its next sleep ends
 *     with -EINTR, once.  It holds nothing then; a change that is published is
 *     made.
 *  4. What a call has taken is its own while it waits for more (it is the
 *     holder in `here`, not the thread), and the loop's thread's in the end.
 *  5. A wake can be missed (more words than one sleep may watch): no call
 *     sleeps in ps_sleep without a backstop, but for those in its own process.
 * Runs in: the waiter; ps_call_*, ps_mailbox_*, ps_lease_try in a caller;
 * ps_sleep wherever the core sleeps, where it is a plain sleep but for here.
 * Not here: Python, and what a loop does with its mailbox (ext/binding/async.pxi).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "core.h"
#include "hold/hold.h"
#include "operations/operations.h"
#include "os/os.h"
#include "process/process.h"

#define STACK (128u * 1024u)
#define SPARES 8u           /* stacks that are kept for the next calls */
#define SLACK (PS_MS / 4)   /* backstops that come within it are one */
#define BUSY (1000 * PS_MS) /* a watch looks often for so long after a change, and then now and then: */
#define OFTEN PS_MS         /* who changes page tables from outside wakes nobody */
#define RARELY (20 * PS_MS)

static_assert(sizeof(struct ps_fiber) < PS_PAGE, "a fiber lies in the last page of its stack");

struct scheduler { /* the waiter thread's own */
    struct ps_waiter *waiter;
    struct ps_call *first, **end; /* all that it has, in the order in which they came */
    struct ps_fiber *spares;
    uint32_t spare, serial;
    struct ps_stack stack;
};

/* -- What a call does, on its own stack ------------------------------------------------------------------------ */

/* Until the change after `generation` is over, or lost from the ring. */
static int watch_generation(struct ps_call *call) {
    const struct ps_region *seen = call->region;
    int64_t begun = ps_sys_now();
    while (!ps_observe_over(seen, call->generation + 1)) {
        _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)&ps_header(seen)->generation;
        int64_t now = ps_sys_now(), slice = now - begun < BUSY ? OFTEN : RARELY;
        uint32_t generation = (uint32_t)ps_generation(seen);
        if (ps_sleep((struct ps_watch){low, generation}, now + slice) == -EINTR)
            return PS_ESIGNAL;
    }
    return 0;
}

static int attempt(struct ps_call *call) {
    struct ps_region *region = call->region;
    switch (call->kind) {
    case PS_CALL_LEASE:
        return ps_lease_take(region, &call->lease, call->deadline, &call->outcome, &call->refusal);
    case PS_CALL_LOCK:
        return ps_user_lock_take(region, (uint32_t)call->first, call->deadline, &call->abandoned, &call->outcome);
    case PS_CALL_CHANGE:
        if (call->outcome.generation) /* it is made, and somebody was silent for long */
            return ps_await(region, call->outcome.generation, call->deadline, &call->outcome);
        return ps_change(region, call->first, call->count, call->prot, call->deadline, &call->outcome);
    case PS_CALL_WATCH:
        return watch_generation(call);
    }
    return -EINVAL;
}

static int carry_out(struct ps_call *call) {
    struct ps_region *region = call->region;
    call->outcome.generation = call->outcome.silent = call->outcome.error = 0;
    int rc = call->kind == PS_CALL_WATCH ? 0 : PS_ESIGNAL;
    while (rc == PS_ESIGNAL && !ps_call_cancelled(call))
        rc = ps_ready(region, &call->outcome);
    if (rc)
        return rc;
    do
        rc = attempt(call);
    while (rc == PS_ESIGNAL && !ps_call_cancelled(call));
    if (!rc && call->kind == PS_CALL_LEASE)
        ps_lease_hand_over(region, &call->lease, call->tid);
    else if (!rc && call->kind == PS_CALL_LOCK)
        ps_user_lock_hand_over(region, (uint32_t)call->first, call->tid);
    return rc;
}

static void fiber_main(void) {
    struct ps_fiber *fiber = ps_fiber_current();
    fiber->call->rc = carry_out(fiber->call);
    fiber->over = true;
    ps_fiber_switch(&fiber->stack, fiber->back); /* for good */
}

/* -- Stacks ---------------------------------------------------------------------------------------------------- */

/* Below it a page that nobody may touch.  A forked child has neither the thread nor its stacks. */
static struct ps_fiber *new_stack(void) {
    char *at =
        mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (at == MAP_FAILED)
        return NULL;
    if (madvise(at, STACK, MADV_DONTFORK) || mprotect(at, PS_PAGE, PROT_NONE)) {
        munmap(at, STACK);
        return NULL;
    }
    return (struct ps_fiber *)(void *)(at + STACK - (sizeof(struct ps_fiber) + 63) / 64 * 64);
}

static struct ps_fiber *take_stack(struct scheduler *scheduler) {
    struct ps_fiber *fiber = scheduler->spares;
    if (!fiber)
        return new_stack();
    scheduler->spares = fiber->next;
    scheduler->spare--;
    return fiber;
}

static char *bottom_of(struct ps_fiber *fiber) {
    return (char *)(((uintptr_t)fiber + PS_PAGE) / PS_PAGE * PS_PAGE - STACK);
}

static void give_stack(struct scheduler *scheduler, struct ps_fiber *fiber) {
    __tsan_destroy_fiber(fiber->stack.known);
    if (scheduler->spare == SPARES) {
        munmap(bottom_of(fiber), STACK);
        return;
    }
    fiber->next = scheduler->spares;
    scheduler->spares = fiber;
    scheduler->spare++;
}

static void prepare(struct ps_fiber *fiber) {
    ucontext_t *context = &fiber->stack.context;
    getcontext(context);
    context->uc_stack.ss_sp = bottom_of(fiber) + PS_PAGE;
    context->uc_stack.ss_size = (size_t)((char *)fiber - bottom_of(fiber)) - PS_PAGE;
    makecontext(context, fiber_main, 0);
    fiber->stack.known = __tsan_create_fiber(0);
}

static int begin(struct scheduler *scheduler, struct ps_call *call) {
    struct ps_fiber *fiber = take_stack(scheduler);
    if (!fiber)
        return -ENOMEM;
    uint32_t holder = PS_TIDS + scheduler->serial++ % PS_TIDS;
    *fiber = (struct ps_fiber){.proxy = {.holder = (int)holder, .tid = call->tid, .passes = call->passes},
                               .back = &scheduler->stack,
                               .call = call};
    prepare(fiber);
    call->fiber = fiber;
    return 0;
}

static void run(struct scheduler *scheduler, struct ps_fiber *fiber) {
    ps_process_set_proxy(&fiber->proxy);
    ps_fiber_switch(&scheduler->stack, &fiber->stack);
    ps_process_set_proxy(NULL);
}

/* -- The thread ------------------------------------------------------------------------------------------------ */

/* Both want the same, and only one of them can have it. */
bool ps_call_conflict(const struct ps_call *one, const struct ps_call *other) {
    bool held = one->kind == PS_CALL_LEASE || one->kind == PS_CALL_LOCK;
    return held && one->kind == other->kind && one->region == other->region &&
           one->first < other->first + other->count && other->first < one->first + one->count;
}

static bool may_begin(const struct scheduler *scheduler, const struct ps_call *call, int64_t now) {
    if (call->deadline <= now)
        return true;
    for (const struct ps_call *before = scheduler->first; before != call; before = before->next)
        if (ps_call_conflict(before, call))
            return false;
    return true;
}

/* What came since the last look, at the end. */
static void accept(struct scheduler *scheduler) {
    /* acquire: pairs with the release in ps_call_begin. */
    struct ps_call *last = atomic_exchange_explicit(&scheduler->waiter->inbox, NULL, memory_order_acquire),
                   *list = NULL;
    while (last) { /* the latest is the first */
        struct ps_call *before = last->next;
        last->next = list;
        list = last;
        last = before;
    }
    *scheduler->end = list;
    while (*scheduler->end)
        scheduler->end = &(*scheduler->end)->next;
}

/* It is its loop's again.  The mailbox stays until nobody delivers: its descriptor may be another file's after that. */
static void deliver(struct ps_call *call) {
    struct ps_mailbox *box = call->box;
    struct ps_call *seen = atomic_load_explicit(&box->finished, memory_order_relaxed);
    do
        call->next = seen;
    while (!atomic_compare_exchange_weak_explicit(&box->finished, &seen, call, memory_order_release,
                                                  memory_order_relaxed)); /* release: pairs with ps_mailbox_take */
    ps_sys_signal(box->fd);
    atomic_fetch_sub_explicit(&box->calls, 1, memory_order_release);
}

/* One step of it; true: it is over. */
static bool step(struct scheduler *scheduler, struct ps_call *call, int64_t now) {
    struct ps_fiber *fiber = call->fiber;
    if (!fiber) {
        if (!ps_call_cancelled(call) && !may_begin(scheduler, call, now))
            return false;
        call->rc = ps_call_cancelled(call) ? PS_ESIGNAL : begin(scheduler, call);
        if (call->rc)
            return true;
        fiber = call->fiber;
    } else if (!fiber->woken && !ps_fiber_changed(fiber) && fiber->deadline > now + SLACK &&
               (fiber->told || !ps_call_cancelled(call))) {
        return false;
    }
    run(scheduler, fiber);
    if (!fiber->over)
        return false;
    give_stack(scheduler, fiber);
    return true;
}

/* A step of each; those that are over leave the list first, and then go. */
static void step_all(struct scheduler *scheduler) {
    int64_t now = ps_sys_now();
    for (struct ps_call **at = &scheduler->first, *call; (call = *at);) {
        if (!step(scheduler, call, now)) {
            at = &call->next;
            continue;
        }
        *at = call->next;
        if (scheduler->end == &call->next)
            scheduler->end = at;
        deliver(call);
    }
}

/* What one sleep watches. */
struct sleep {
    struct ps_watch watch[PS_WATCH_MAX];
    struct ps_fiber *fiber[PS_WATCH_MAX];
    uint32_t count;
    int64_t deadline;
};

static void add(struct sleep *sleep, struct ps_fiber *fiber) {
    for (uint32_t i = 0; i < fiber->watches && sleep->count < PS_WATCH_MAX; i++) {
        sleep->watch[sleep->count] = fiber->watch[i];
        sleep->fiber[sleep->count++] = fiber;
    }
}

/* The kernel names one of those that were woken; the others have changed, but for who watches the same word. */
static void note_woken(const struct sleep *sleep, int index) {
    for (uint32_t i = 1; i < sleep->count; i++)
        if (sleep->watch[i].word == sleep->watch[index].word)
            sleep->fiber[i]->woken = true;
}

static void sleep_for_all(struct scheduler *scheduler, uint32_t kicks) {
    struct sleep sleep = {.watch[0] = {&scheduler->waiter->kicks, kicks}, .count = 1, .deadline = PS_NEVER};
    for (struct ps_call *call = scheduler->first; call; call = call->next) {
        int64_t end = call->fiber ? call->fiber->deadline : call->deadline;
        sleep.deadline = end < sleep.deadline ? end : sleep.deadline;
        if (call->fiber)
            add(&sleep, call->fiber);
    }
    int index = ps_sys_wait_many(sleep.watch, sleep.count, sleep.deadline);
    if (index > 0)
        note_woken(&sleep, index);
}

static void *waiter_main(void *argument) {
    struct scheduler scheduler = {
        .waiter = argument, .end = &scheduler.first, .stack.known = __tsan_get_current_fiber()};
    ps_sys_normal_priority();
    for (;;) {
        /* acquire, before the looks: who comes, or cancels, after them finds us awake, or wakes us. */
        uint32_t kicks = atomic_load_explicit(&scheduler.waiter->kicks, memory_order_acquire);
        accept(&scheduler);
        step_all(&scheduler);
        sleep_for_all(&scheduler, kicks);
    }
    return NULL;
}

static void kick(struct ps_waiter *waiter) {
    atomic_fetch_add_explicit(&waiter->kicks, 1, memory_order_release);
    ps_sys_wake(&waiter->kicks, 1, FUTEX_BITSET_MATCH_ANY);
}

static int start(struct ps_waiter *waiter) {
    if (atomic_load_explicit(&waiter->running, memory_order_acquire))
        return 0;
    int rc = ps_private_lock(&waiter->lock, PS_NEVER);
    if (!waiter->running && !rc) {
        rc = ps_process_spawn(waiter_main, waiter, &waiter->thread);
        atomic_store_explicit(&waiter->running, !rc, memory_order_release);
    }
    ps_private_unlock(&waiter->lock);
    return rc;
}

/* -- For loops ------------------------------------------------------------------------------------------------- */

int ps_lease_try(struct ps_region *region, struct ps_lease *lease, bool passes, struct ps_outcome *outcome,
                 struct ps_refusal *refusal) {
    struct ps_proxy proxy = {.tid = ps_process_tid(), .passes = passes};
    ps_process_set_proxy(&proxy);
    int rc = ps_lease_take(region, lease, PS_TRY, outcome, refusal);
    ps_process_set_proxy(NULL);
    return rc;
}

int ps_call_begin(struct ps_call *call) {
    struct ps_waiter *waiter = ps_process_waiter();
    int rc = start(waiter);
    if (rc)
        return rc;
    call->tid = ps_process_tid();
    call->fiber = NULL;
    atomic_fetch_add_explicit(&call->box->calls, 1, memory_order_relaxed);
    struct ps_call *seen = atomic_load_explicit(&waiter->inbox, memory_order_relaxed);
    do
        call->next = seen;
    while (!atomic_compare_exchange_weak_explicit(&waiter->inbox, &seen, call, memory_order_release,
                                                  memory_order_relaxed));
    kick(waiter);
    return 0;
}

void ps_call_cancel(struct ps_call *call) {
    atomic_store_explicit(&call->cancelled, true, memory_order_release);
    kick(ps_process_waiter());
}

struct ps_call *ps_mailbox_take(struct ps_mailbox *box) {
    return atomic_exchange_explicit(&box->finished, NULL, memory_order_acquire);
}

void ps_mailbox_settle(struct ps_mailbox *box) {
    while (atomic_load_explicit(&box->calls, memory_order_acquire))
        ps_sys_yield();
}
