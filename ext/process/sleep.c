/* sleep.c - sleeping on words, and the locks of one process.
 *
 * Wherever the core waits it sleeps here.  In the waiter (operations/waiter.c) a
 * call that sleeps leaves its stack to another one, and comes back.
 * Invariant: no sleep on a shared word without a backstop: a wake-up can die with
 * the process that it woke.
 * Runs in: caller, agent, waiter; private locks also in the signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>

#include "os/os.h"
#include "process/process.h"
#include "types.h"

#define PRIVATE_WAITING 0x80000000u

/* -- Locks private to the process, reset in a forked child ------------------------------------------------------
 *
 * A word is 0 or the thread id of its holder, with PRIVATE_WAITING if somebody sleeps.  A thread alone can be ended
 * by a seccomp filter: then whoever waits takes over. */

int ps_private_lock(_Atomic uint32_t *word, int64_t deadline) {
    uint32_t mine = (uint32_t)ps_process_tid(), seen = 0, slept = 0;
    while (
        !atomic_compare_exchange_weak_explicit(word, &seen, mine | slept, memory_order_acquire, memory_order_relaxed)) {
        if (!seen)
            continue;
        uint32_t waited = seen | PRIVATE_WAITING;
        if (seen != waited &&
            !atomic_compare_exchange_strong_explicit(word, &seen, waited, memory_order_relaxed, memory_order_relaxed)) {
            seen = 0;
            continue;
        }
        int64_t now = ps_sys_now(), backstop = now + PS_BACKSTOP;
        if (now >= deadline)
            return -ETIMEDOUT;
        slept = PRIVATE_WAITING;
        int rc = ps_sleep((struct ps_watch){word, waited}, backstop < deadline ? backstop : deadline);
        bool gone = rc == -ETIMEDOUT && !ps_sys_thread_exists((int)(waited & ~PRIVATE_WAITING));
        seen = gone ? waited : 0; /* gone: take it from there */
    }
    return 0;
}

void ps_private_unlock(_Atomic uint32_t *word) {
    if (atomic_exchange_explicit(word, 0, memory_order_release) & PRIVATE_WAITING)
        ps_sys_wake(word, 1, FUTEX_BITSET_MATCH_ANY);
}

void ps_fiber_switch(struct ps_stack *from, struct ps_stack *to) {
    __tsan_switch_to_fiber(to->known, 0);
    swapcontext(&from->context, &to->context);
}

/* -- Sleeping -------------------------------------------------------------------------------------------------- */

bool ps_fiber_changed(const struct ps_fiber *fiber) {
    for (uint32_t i = 0; i < fiber->watches; i++)
        if (atomic_load_explicit(fiber->watch[i].word, memory_order_acquire) != fiber->watch[i].value)
            return true;
    return false;
}

/* Once. */
static bool interrupts(struct ps_fiber *fiber) {
    bool interrupts = !fiber->told && ps_call_cancelled(fiber->call);
    fiber->told |= interrupts;
    return interrupts;
}

/* As ps_sys_wait: 0: look again. */
static int leave_stack(struct ps_fiber *fiber, int64_t deadline) {
    fiber->deadline = deadline;
    fiber->woken = false;
    if (interrupts(fiber))
        return -EINTR;
    if (!ps_fiber_changed(fiber))
        ps_fiber_switch(&fiber->stack, fiber->back);
    return interrupts(fiber) ? -EINTR : ps_sys_now() < deadline ? 0 : -ETIMEDOUT;
}

struct ps_fiber *ps_fiber_current(void) {
    struct ps_proxy *proxy = ps_process_proxy();
    return proxy && proxy->holder ? (struct ps_fiber *)(void *)proxy : NULL;
}

int ps_sleep(struct ps_watch watch, int64_t deadline) {
    struct ps_fiber *fiber = ps_fiber_current();
    if (!fiber)
        return ps_sys_wait(watch, FUTEX_BITSET_MATCH_ANY, deadline);
    fiber->watch[0] = watch;
    fiber->watches = 1;
    return leave_stack(fiber, deadline);
}

int ps_sleep_two(struct ps_watch first, struct ps_watch second, int64_t deadline) {
    struct ps_fiber *fiber = ps_fiber_current();
    if (!fiber)
        return ps_sys_wait_two(first, second, deadline);
    fiber->watch[0] = first;
    fiber->watch[1] = second;
    fiber->watches = 2;
    return leave_stack(fiber, deadline);
}
