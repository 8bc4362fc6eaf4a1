/* process.c - the state of this process, and what happens to it at fork().
 *
 * Lives here: all mutable state at file scope - the table of handles, the chains
 * of signal handlers, what became of each thread's latest fault, its violation,
 * the waiter, the flag that tells a known process from a raw child - and how
 * threads of ours begin.
 * Not here: what a fork means to a region (participant/attach.c registers it).
 * Invariants
 *  1. A handle is found by whoever looks, without a lock: `use` and `base` are
 *     atomic, and its memory is never given back.
 *  2. Nothing is held across fork(): private locks are reset in the child, where
 *     only the forking thread is left and the mapping that they guard is gone
 *     (DONTFORK).
 * Runs in: caller, agent, forked child; the look-ups also in the signal handler.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core.h"
#include "os/os.h"
#include "os/point.h"
#include "process/process.h"
#include "segment/segment.h"

#define STACK (256u * 1024u) /* what a thread of ours has for itself */

static struct ps_region regions[PS_REGIONS_MAX];

static _Atomic uint32_t regions_used; /* places ever used; scans end there */

static struct ps_chain chains[2]; /* SIGSEGV, SIGBUS */

static _Thread_local struct ps_faults faults;

static _Thread_local struct ps_violation violation;

static void (*handler)(int, siginfo_t *, void *); /* of both, ours */

static _Atomic(const struct ps_hooks *) hooks;

static _Thread_local int thread_id; /* 0: not asked yet */

static _Thread_local struct ps_patience patience;

static _Thread_local struct ps_proxy *proxy;

static struct ps_waiter waiter;

static _Thread_local const struct ps_region *agent_of;

static _Atomic uint32_t borrow_lock; /* lock.c */

static _Atomic(_Atomic uint32_t *) known; /* a page that fork wipes; 1 in a process that the handlers know */

static pthread_once_t once = PTHREAD_ONCE_INIT;

static size_t (*least_stack)(const pthread_attr_t *); /* NULL: libc has no such function */

static int start_result;

static void (*before_forks)(void), (*after_forks)(void);

static uint32_t forks;

static int forker; /* our parent, as it forked us; 0: we were not */

static uint64_t pidns; /* as /proc said once; 0: unknown */

static char command[PS_COMMAND];

static _Atomic int told_too = -1;

struct ps_chain *ps_process_chain(int signal) {
    return &chains[signal == SIGBUS];
}

void ps_process_set_handler(void (*given)(int, siginfo_t *, void *)) {
    handler = given;
}

void (*ps_process_handler(void))(int, siginfo_t *, void *) {
    return handler;
}

struct ps_faults *ps_process_faults(void) {
    return &faults;
}

struct ps_violation *ps_violation(void) {
    return &violation;
}

void ps_set_hooks(const struct ps_hooks *given) {
    atomic_store_explicit(&hooks, given, memory_order_release); /* pairs with the handler's look */
}

const struct ps_hooks *ps_process_hooks(void) {
    return atomic_load_explicit(&hooks, memory_order_acquire);
}

struct ps_patience *ps_process_patience(void) {
    return proxy && proxy->holder ? &proxy->patience : &patience;
}

struct ps_region *ps_process_next(struct ps_region *region) {
    struct ps_region *next = region ? region + 1 : regions;
    return next < regions + atomic_load_explicit(&regions_used, memory_order_acquire) ? next : NULL;
}

int ps_process_tid(void) {
    if (!thread_id)
        thread_id = ps_sys_gettid();
    return thread_id;
}

const char *ps_process_command(void) {
    return command;
}

void ps_tell_also(int fd) {
    atomic_store_explicit(&told_too, fd, memory_order_relaxed);
}

int ps_process_told_too(void) {
    return atomic_load_explicit(&told_too, memory_order_relaxed);
}

struct ps_proxy *ps_process_proxy(void) {
    return proxy;
}

void ps_process_set_proxy(struct ps_proxy *given) {
    proxy = given;
}

int ps_process_holder(void) {
    return proxy && proxy->holder ? proxy->holder : ps_process_tid();
}

struct ps_waiter *ps_process_waiter(void) {
    return &waiter;
}

/* glibc takes the thread-local variables of all libraries from a thread's stack, and refuses one that has no room for
 * them, or gives a thread what is left.  It says how much that is by a function that is not in its headers.  Other
 * libcs add it by themselves. */
static size_t stack_size(const pthread_attr_t *attributes) {
    return STACK + (least_stack ? least_stack(attributes) : 0);
}

int ps_process_spawn(void *(*body)(void *), void *argument, pthread_t *thread) {
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, stack_size(&attributes));
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(thread, &attributes, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return -rc;
}

/* The kernel clears a word of the thread's, whatever ends it, and that is what is looked at here. */
bool ps_process_ended(pthread_t thread) {
    return !pthread_tryjoin_np(thread, NULL);
}

void ps_process_become_agent(const struct ps_region *region) {
    agent_of = region;
}

bool ps_process_is_agent(const struct ps_region *region) {
    return agent_of == region;
}

_Atomic uint32_t *ps_process_borrow_lock(void) {
    return &borrow_lock;
}

struct ps_region *ps_process_find(uintptr_t address) {
    for (uint32_t i = 0, used = atomic_load_explicit(&regions_used, memory_order_acquire); i < used; i++) {
        uintptr_t base = atomic_load_explicit(&regions[i].base, memory_order_acquire);
        if (base && ps_use_of(&regions[i]) != PS_UNUSED && address - base < regions[i].span)
            return &regions[i];
    }
    return NULL;
}

static void lose(_Atomic int *number, int fd) {
    atomic_compare_exchange_strong_explicit(number, &fd, -1, memory_order_relaxed, memory_order_relaxed);
}

void ps_process_took(int fd) {
    for (uint32_t i = 0, used = atomic_load_explicit(&regions_used, memory_order_acquire); i < used; i++) {
        struct ps_borrowed *places = atomic_load_explicit(&regions[i].borrowed, memory_order_acquire);
        lose(&regions[i].userfault.fd, fd);
        for (uint32_t slot = 0; places && slot < PS_SLOTS_MAX; slot++)
            lose(&places[slot].fd, fd);
    }
}

/* As in a process that has just been forked: no agent, no slot, no lock held. */
void ps_process_forget(struct ps_region *region) {
    region->agent = PS_AGENT_NONE;
    region->threaded = false;
    region->page_lock = region->descriptor_lock = 0;
    region->leased = 0;
    region->quarantines = 0;
    region->source = 0;
    region->frozen_by = region->writer = region->freezing = 0;
    for (uint32_t i = 0; i < PS_CLOSERS; i++)
        region->closing[i] = 0;
    region->window = region->shadow = false;
    region->ahead = 0;
    region->failed = region->fenced = region->unsynced = region->nameless = false;
    region->epoch = region->slot = 0;
    region->tid = 0;
    region->own = region->own_entry = region->own_userfault = region->own_socket = -1;
    region->uffd = false;
    region->keeper = NULL; /* our parent's, and not mapped here */
}

struct ps_region *ps_process_claim(void) {
    for (uint32_t i = 0; i < PS_REGIONS_MAX; i++) {
        uint32_t unused = PS_UNUSED, used = i;
        if (!atomic_compare_exchange_strong_explicit(&regions[i].use, &unused, PS_OPENING, memory_order_acq_rel,
                                                     memory_order_relaxed))
            continue;
        ps_process_forget(&regions[i]);
        regions[i].memory.fd = regions[i].entry.fd = regions[i].userfault.fd = -1;
        regions[i].corrupt = NULL;
        regions[i].here = NULL;
        regions[i].counts = NULL;
        /* Fails where another thread has raised it past i already. */
        while (used <= i && !atomic_compare_exchange_weak_explicit(&regions_used, &used, i + 1, memory_order_acq_rel,
                                                                   memory_order_acquire))
            ;
        return &regions[i];
    }
    return NULL;
}

/* -- Fork ------------------------------------------------------------------------------------------------------ */

bool ps_process_known(void) {
    _Atomic uint32_t *flag = atomic_load_explicit(&known, memory_order_acquire);
    return flag && atomic_load_explicit(flag, memory_order_relaxed);
}

uint64_t ps_process_pidns(void) {
    uint64_t now = ps_sys_pid_namespace();
    return now ? now : pidns;
}

uint32_t ps_forks(void) {
    return forks;
}

static void before_fork(void) {
    forker = getpid();
    before_forks();
}

static void in_child(void) {
    bool parent_known = atomic_load_explicit(&known, memory_order_acquire) != NULL;
    forks++;
    if (getppid() != forker) /* it is not of our pid namespace, or gone */
        pidns = 0;
    thread_id = 0;
    agent_of = NULL;
    proxy = NULL;
    borrow_lock = 0;
    chains[0].busy = chains[1].busy = 0; /* before our agents, which take them too, begin */
    waiter.running = false; /* the thread is not here, nor are its stacks; whose calls it had is another's loop */
    waiter.lock = 0;
    waiter.inbox = NULL;
    if (parent_known) {
        atomic_store_explicit(known, 1, memory_order_release);
        PS_POINT_RELOAD();
    }
    after_forks();
}

static void start(void) {
    void *page = mmap(NULL, PS_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED || madvise(page, PS_PAGE, MADV_WIPEONFORK)) {
        start_result = -errno;
        return;
    }
    start_result = -pthread_atfork(before_fork, NULL, in_child);
    ps_sys_command(command, sizeof command);
    *(void **)&least_stack = dlsym(RTLD_DEFAULT, "__pthread_get_minstack");
    pidns = ps_sys_pid_namespace();
    PS_POINT_RELOAD();
    atomic_store_explicit((_Atomic uint32_t *)page, 1, memory_order_relaxed);
    atomic_store_explicit(&known, page, memory_order_release);
}

void ps_process_at_fork(void (*before)(void), void (*after)(void)) {
    before_forks = before;
    after_forks = after;
}

int ps_process_start(void) {
    pthread_once(&once, start);
    return start_result ? start_result : ps_process_known() ? 0 : PS_ECLOSED;
}

int ps_corrupt(struct ps_region *region, const char *field) {
    atomic_store_explicit(&region->corrupt, field, memory_order_relaxed);
    return PS_ECORRUPT;
}

/* -- What it is ---------------------------------------------------------------------------------------------- */

void *ps_address(const struct ps_region *region) {
    return (char *)ps_header(region) + ps_data_offset(&region->shape);
}

uint64_t ps_size(const struct ps_region *region) {
    return region->shape.size;
}

uint64_t ps_page_size(const struct ps_region *region) {
    return (uint64_t)region->shape.unit * PS_PAGE;
}

uint64_t ps_generation(const struct ps_region *region) {
    return atomic_load_explicit(&ps_header(region)->generation, memory_order_acquire);
}

const char *ps_name(const struct ps_region *region) {
    return region->shape.name;
}

enum ps_engine ps_engine(const struct ps_region *region) {
    return region->uffd ? PS_ENGINE_UFFD : PS_ENGINE_MPROTECT;
}

const char *ps_corrupt_field(const struct ps_region *region) {
    return atomic_load_explicit(&region->corrupt, memory_order_relaxed);
}
