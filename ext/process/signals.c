/* signals.c - our place in the chains of handlers of SIGSEGV and SIGBUS.
 *
 * Handlers that were found below ours form a stack.  A fault starts at its top.
 * Where that handler raises it again (faulthandler does, by raise()) or calls us
 * back, the next one below gets it, at last the default action.  A handler may
 * also jump out, or mend and return, any number of times.
 * Not here: what is done at a fault (fault/handler.c registers itself).
 * Runs in: caller (ps_fault_install); signal handler (passing on).
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "process/process.h"

#define ALTERNATE_STACK (64u * 1024u)
#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for a change, at one generation, or for an install */
#define NEAR (1u << 20)         /* how far from its caller's frame a handler is still inside of it */

/* -- The copy -------------------------------------------------------------------------------------------------- */

/* A fault in a thread that blocks its signal ends the process, whatever handler there is, and threads of libraries
 * block all as a rule.  A thread that was seen to block neither is believed where no fault is expected: asking costs as
 * much as a small copy. */
void ps_fault_unblock(bool expected, sigset_t *blocked) {
    struct ps_faults *faults = ps_process_faults();
    sigset_t ours;
    sigemptyset(blocked);
    if (faults->unblocked && !expected)
        return;
    sigemptyset(&ours);
    sigaddset(&ours, SIGSEGV);
    sigaddset(&ours, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &ours, blocked);
    sigandset(blocked, blocked, &ours);
    faults->unblocked = sigisemptyset(blocked);
}

void ps_fault_block_again(const sigset_t *blocked) {
    if (sigisemptyset(blocked))
        return;
    pthread_sigmask(SIG_BLOCK, blocked, NULL);
    ps_process_faults()->unblocked = false; /* whatever was seen in between */
}

/* -- The chain ------------------------------------------------------------------------------------------------- */

static bool is_ours(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == ps_process_handler();
}

static void default_action(int signal, bool by_kernel) {
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(signal, &action, NULL);
    if (!by_kernel) /* else the instruction runs again, and the kernel ends us with the genuine fault */
        raise(signal);
}

/* As the kernel would: with its mask, and once only if it asked for that. */
static void call(const struct sigaction *handler, int signal, siginfo_t *info, void *context) {
    sigset_t mask = handler->sa_mask, before;
    if (!(handler->sa_flags & SA_NODEFER))
        sigaddset(&mask, signal);
    if (handler->sa_flags & (int)SA_RESETHAND)
        sigaction(signal, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
    pthread_sigmask(SIG_BLOCK, &mask, &before);
    if (handler->sa_flags & SA_SIGINFO)
        handler->sa_sigaction(signal, info, context);
    else
        handler->sa_handler(signal);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Another thread is putting ours on top, and what it found there may not be in the chain yet.  Not for ever: in the
 * handler we may have interrupted that thread. */
void ps_chain_await_install(struct ps_chain *chain) {
    int64_t end = ps_sys_now() + PATIENCE;
    while (atomic_load_explicit(&chain->busy, memory_order_acquire) && ps_sys_now() < end)
        ps_sys_wait((struct ps_watch){&chain->busy, 1}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS / 10);
}

void ps_chain_pass_on(int signal, siginfo_t *info, void *context, bool by_kernel, struct ps_offer *offer) {
    struct ps_chain *chain = ps_process_chain(signal);
    ps_chain_await_install(chain);
    uint32_t version = atomic_load_explicit(&chain->version, memory_order_acquire); /* pairs with rewrite */
    struct ps_handlers *below = &chain->copy[version % 2];
    uint32_t level = offer->version == version && offer->level < below->count ? offer->level : below->count;
    struct sigaction *next = level ? &below->handler[level - 1] : NULL;
    bool plain = next && !(next->sa_flags & SA_SIGINFO);
    offer->level = level ? level - 1 : 0;
    offer->version = version;
    if (plain && next->sa_handler == SIG_IGN && !by_kernel)
        return;
    if (!next || (plain && (next->sa_handler == SIG_DFL || next->sa_handler == SIG_IGN)))
        default_action(signal, by_kernel);
    else
        call(next, signal, info, context);
}

/* Is this fault on its way down already?  Then a handler that we called raised it again, or called us (we run on its
 * stack, above the frame that called it), or it returned from one of our own, and nothing has changed. */
bool ps_chain_on_its_way(const struct ps_offer *offer, uint64_t fault, bool by_kernel, bool ours, uintptr_t frame) {
    bool inside = frame < offer->frame && offer->frame - frame < NEAR;
    if (inside && (!by_kernel || fault == offer->fault))
        return true;
    return by_kernel && ours && offer->returned && fault == offer->fault;
}

/* -- The handler ----------------------------------------------------------------------------------------------- */

static bool same(const struct sigaction *a, const struct sigaction *b) {
    return (a->sa_flags & SA_SIGINFO) == (b->sa_flags & SA_SIGINFO) && a->sa_handler == b->sa_handler;
}

/* The other copy of the chain without this handler, or with it on top, wherever it was before. */
void ps_chain_rewrite(struct ps_chain *chain, const struct sigaction *handler, bool on_top) {
    uint32_t version = atomic_load_explicit(&chain->version, memory_order_relaxed);
    struct ps_handlers *from = &chain->copy[version % 2], *to = &chain->copy[(version + 1) % 2];
    uint32_t skip = on_top && from->count == PS_CHAIN; /* full: forget the oldest */
    to->count = 0;
    for (uint32_t i = skip; i < from->count; i++)
        if (!same(&from->handler[i], handler))
            to->handler[to->count++] = from->handler[i];
    if (on_top)
        to->handler[to->count++] = *handler;
    atomic_store_explicit(&chain->version, version + 1, memory_order_release); /* pairs with pass_on */
}

static void install(int signal) {
    struct ps_chain *chain = ps_process_chain(signal);
    struct sigaction found,
        ours = {.sa_sigaction = ps_process_handler(), .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(signal, NULL, &found);
    if (is_ours(&found))
        return;
    if (atomic_exchange_explicit(&chain->busy, 1, memory_order_acquire)) {
        ps_chain_await_install(chain);
        return;
    }
    sigaction(signal, NULL, &found);
    if (!is_ours(&found)) {
        struct sigaction replaced;
        ps_chain_rewrite(chain, &found, true);
        sigaction(signal, &ours, &replaced);
        if (!is_ours(&replaced) && !same(&replaced, &found)) /* by another thread, between the two calls */
            ps_chain_rewrite(chain, &replaced, true);
    }
    atomic_store_explicit(&chain->busy, 0, memory_order_release);
}

void ps_fault_install(void) {
    install(SIGSEGV);
    install(SIGBUS);
}

/* For a stack overflow in the main thread to be reported at all; other threads run the handler on their own. */
void ps_fault_stack(void) {
    stack_t stack;
    if (ps_sys_gettid() != getpid() || sigaltstack(NULL, &stack) || !(stack.ss_flags & SS_DISABLE))
        return;
    void *memory = mmap(NULL, ALTERNATE_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory != MAP_FAILED)
        sigaltstack(&(stack_t){.ss_sp = memory, .ss_size = ALTERNATE_STACK}, NULL);
}
