/* handler.c - what happens at a forbidden access.
 *
 * Lives here: the copy that survives faults, and on it the safe accessors; the
 * handler of SIGSEGV and SIGBUS, the policies (die, raise, wait), the line on
 * stderr, and our place in the chain of handlers.
 * Invariants
 *  1. The handler is async-signal-safe: no lock, no malloc, no stdio, errno
 *     preserved; what it reads of the table and of shared memory are atomics.
 *  2. Only faults in our own ranges are ours; every other one goes to the
 *     handler below as if we were not there.
 *  3. A fault is never swallowed: it is mended (the copy; a change that was in
 *     the way), told as an exception, waited out, or the process ends by the
 *     signal.
 *  4. The binding is asked (ps_hooks) while nothing of ours is held.
 * The chain: handlers found below ours form a stack.  A fault starts at its
 * top.  Where that handler raises it again (faulthandler does, with raise()) or
 * calls us back, the next one below gets it, at last the default action.  A
 * handler may also jump out or mend and return, any number of times.
 * Runs in: signal handler; ps_read, ps_write and ps_fault_install in a caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include "participant.h"

#define ALTERNATE_STACK (64u * 1024u)
#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for a change, at one generation, or for an install */
#define FAULTS 100000           /* of one copy: a page whose protection changes all the time is refused at last */
#define MARKS 100               /* ... of them SIGBUS, whose other meaning is that no memory is left */
#define REPEATS 64              /* a fault runs again at most so often where the map allows it */
#define LOOKS 100               /* at a page while changes go on, before what was found last has to do */
/* How long a wait by policy sleeps before it looks at leases and for signals; at a freeze, whose end may have to be
 * ours, PS_BACKSTOP. */
#define SLICE (20 * PS_MS)
#define RED_ZONE                                                                                                       \
    128u                /* below the stack pointer, and in use (System V ABI, AMD64 Architecture Processor Supplement) \
                         */
#define NEAR (1u << 20) /* how far from its caller's frame a handler is still inside of it */

/* -- The copy -------------------------------------------------------------------------------------------------- */

/* struct ps_copied ps_copy_bytes(void *to, const void *from, size_t length): one instruction, restartable,
 * whose counter says how far it came.  The handler continues behind it with the address in rdx. */
__asm__(".text\n"
        ".p2align 4\n"
        ".globl ps_copy_bytes\n.hidden ps_copy_bytes\n.type ps_copy_bytes, @function\n"
        "ps_copy_bytes:\n"
        "\tmovq %rdx, %rcx\n"
        "\txorl %edx, %edx\n"
        "ps_copy_instruction:\n"
        "\trep movsb\n"
        "ps_copy_end:\n"
        "\tmovq %rcx, %rax\n"
        "\tret\n"
        ".size ps_copy_bytes, .-ps_copy_bytes\n");
extern const char ps_copy_instruction[] __attribute__((visibility("hidden")));
extern const char ps_copy_end[] __attribute__((visibility("hidden")));

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

/* Each of these rights allows it. */
static uint32_t rights_for(bool store) {
    return store ? PROT_WRITE : PROT_READ | PROT_WRITE; /* on x86-64 a writable page can be read */
}

static bool allows(uint32_t prot, bool store) {
    return prot & rights_for(store);
}

/* Page-fault error code (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3, 4.7). */
static bool stores(const greg_t *registers) {
    return registers[REG_ERR] & (1 << 1);
}

static bool executes(const greg_t *registers) {
    return registers[REG_ERR] & (1 << 4);
}

static bool in_place(const struct ps_region *region, uint64_t page) {
    uint32_t held = PS_HERE_HELD | PS_HERE_IN_PLACE;
    return (ps_here(region, page) & held) == held;
}

/* A store that the map forbids all, and a lease allows us: by window to its thread alone. */
static bool leased_for(const struct ps_region *region, uint64_t page, uint32_t prot, bool store) {
    return store && prot == PROT_READ && (in_place(region, page) || ps_here_own(region, page));
}

/* At the public address. */
static bool permits(const struct ps_region *region, uint64_t page, bool store) {
    uint32_t prot = ps_protection(region, page);
    return allows(prot, store) || (store && prot == PROT_READ && in_place(region, page));
}

/* The first page of a range where neither the map nor a lease allows the access, or the page past it. */
static uint64_t allowed_up_to(struct ps_region *region, uint64_t page, uint64_t end, bool store, uint32_t *prot) {
    while (page < end) {
        uint64_t run = ps_run(region, page, end, prot);
        if (allows(*prot, store))
            page += run;
        else if (leased_for(region, page, *prot, store))
            page++;
        else
            return page;
    }
    return end;
}

/* A page's protection and the change that set it, of one moment. */
static struct ps_author look(struct ps_region *region, uint64_t page, uint32_t *prot) {
    for (int tries = 0;; tries++) {
        uint64_t generation = ps_generation(region);
        *prot = ps_protection(region, page);
        struct ps_author author = ps_change_author(region, page);
        if ((generation == ps_generation(region) && *prot == ps_protection(region, page)) || tries == LOOKS)
            return author;
    }
}

/* 0 where the page allows it by now. */
static int refuse(struct ps_region *region, uint64_t page, bool store, struct ps_refusal *refusal) {
    refusal->page = page;
    refusal->required = store ? PROT_WRITE : PROT_READ;
    refusal->author = look(region, page, &refusal->actual);
    return allows(refusal->actual, store) || leased_for(region, page, refusal->actual, store) ? 0 : PS_EREFUSED;
}

/* For whoever looks at the region later. */
static void keep(struct ps_region *region, uint64_t offset, bool store, enum ps_policy outcome) {
    struct ps_refusal refusal;
    if (!ps_running(region) || atomic_load_explicit(&region->use, memory_order_acquire) != PS_OPEN)
        return; /* it is not mapped, or will not be in a moment */
    refuse(region, offset / PS_PAGE, store, &refusal);
    if (region->fenced)
        refusal.actual = PROT_NONE;
    ps_violation_keep(region, offset, &refusal, outcome);
}

/* The map allows it, but this process could not follow the map there. */
static int unreachable(struct ps_region *region, uint64_t page, bool store, struct ps_refusal *refusal) {
    refuse(region, page, store, refusal);
    refusal->actual = PROT_NONE;
    return PS_EREFUSED;
}

/* The map allows an access that our page tables refused: they are late, or we are fenced. */
static int mend(struct ps_region *region, uint64_t page) {
    int rc = ps_snapshots(region) ? ps_snapshot_let(region, page, 1) : 0;
    if (!rc)
        rc = ps_pages_take(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    rc = region->fenced ? -EACCES : ps_engine_mend(region, page);
    ps_pages_give(region);
    return ps_agent_help(region, rc, ps_sys_now() + PATIENCE);
}

/* Our page tables do not follow the map yet. */
static bool late(const struct ps_region *region) {
    return ps_applied(region) < ps_generation(region);
}

/* Page tables refuse what the map has just allowed while they are late, or cannot follow. */
static bool expects_fault(const struct ps_region *region) {
    atomic_thread_fence(memory_order_acquire); /* pairs with C4: who saw the map of a change sees it open */
    return ps_change_open(region) || late(region) || region->failed || region->fenced;
}

/* SIGBUS: no memory for the page; or, at a store by the uffd engine, a mark, which is late or just made. */
static bool may_be_mark(const struct ps_region *region, bool store, uint32_t *marks) {
    return store && region->uffd && (*marks)++ < MARKS;
}

static bool by_window(const struct ps_region *region, uint64_t page) {
    return ps_here_own(region, page) && !(ps_here(region, page) & PS_HERE_IN_PLACE) &&
           !allows(ps_protection(region, page), true);
}

/* Where a store at `offset` goes, and how much of it: to the window, as far as pages are ours by window only. */
static char *way(const struct ps_region *region, uint64_t offset, bool store, uint64_t *length) {
    char *data = ps_address(region);
    if (!store || !atomic_load_explicit(&region->window, memory_order_acquire))
        return data;
    uint64_t page = offset / PS_PAGE, end = (offset + *length + PS_PAGE - 1) / PS_PAGE;
    bool window = by_window(region, page);
    while (++page < end && by_window(region, page) == window)
        ;
    if (page < end)
        *length = page * PS_PAGE - offset;
    return window ? ps_window(region) : data;
}

static int copy_range(struct ps_region *region, uint64_t offset, char *other, uint64_t length, bool store,
                      struct ps_refusal *refusal) {
    uint64_t end = (offset + length + PS_PAGE - 1) / PS_PAGE;
    uint32_t marks = 0;
    for (uint32_t faults = 0; length; faults++) {
        uint32_t prot;
        uint64_t page = allowed_up_to(region, offset / PS_PAGE, end, store, &prot);
        if (page < end) {
            if (refuse(region, page, store, refusal) && !ps_freeze_notice(region, PATIENCE))
                return PS_EREFUSED;
            continue;
        }
        /* A copy that faults must fault into our handler, not into a faulthandler that was enabled on top of it;
         * whoever takes rights away from now on installs ours first. */
        if (expects_fault(region))
            ps_fault_install();
        uint64_t part = length;
        char *data = way(region, offset, store, &part);
        struct ps_copied copied =
            store ? ps_copy_bytes(data + offset, other, part) : ps_copy_bytes(other, data + offset, part);
        offset += part - copied.left;
        other += part - copied.left;
        length -= part - copied.left;
        if (!copied.left)
            continue;
        uint64_t at = (copied.where & ~PS_COPY_NO_PAGE) - (uintptr_t)data;
        if (at / PS_PAGE != offset / PS_PAGE)
            return -EFAULT; /* the caller's own buffer */
        if (copied.where & PS_COPY_NO_PAGE && !may_be_mark(region, store, &marks))
            return -ENOMEM;
        if (faults == FAULTS || mend(region, at / PS_PAGE))
            return unreachable(region, at / PS_PAGE, store, refusal);
    }
    return 0;
}

static int copy(struct ps_region *region, uint64_t offset, char *other, uint64_t length, bool store,
                struct ps_refusal *refusal) {
    sigset_t blocked;
    struct ps_patience before = *ps_process_patience(); /* of a call whose wait a signal's handler has interrupted */
    ps_fault_unblock(expects_fault(region) || ps_snapshots(region), &blocked);
    int rc = copy_range(region, offset, other, length, store, refusal);
    ps_fault_block_again(&blocked);
    *ps_process_patience() = before;
    return rc;
}

int ps_read(struct ps_region *region, uint64_t offset, void *to, uint64_t length, struct ps_refusal *refusal) {
    return copy(region, offset, to, length, false, refusal);
}

/* The whole range is looked at first: a write that is refused by the map has changed nothing. */
int ps_write(struct ps_region *region, uint64_t offset, const void *from, uint64_t length, struct ps_refusal *refusal) {
    return copy(region, offset, (char *)from, length, true, refusal);
}

/* -- The line -------------------------------------------------------------------------------------------------- */

struct text {
    char at[640];
    size_t length;
};

static void put(struct text *text, const char *from) {
    while (*from && text->length < sizeof text->at)
        text->at[text->length++] = *from++;
}

static void put_number(struct text *text, uint64_t number) {
    char digits[21], *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10);
    put(text, at);
}

static void put_age(struct text *text, uint64_t then, uint64_t now) {
    uint64_t ms = now > then ? (now - then) / PS_MS : 0;
    put_number(text, ms < 10000 ? ms : ms / 1000);
    put(text, ms < 10000 ? " ms ago" : " s ago");
}

static void put_protection(struct text *text, uint32_t prot) {
    static const char *const names[8] = {"NONE", "READ",      "WRITE",      "READ_WRITE",
                                         "EXEC", "READ|EXEC", "WRITE|EXEC", "READ_WRITE|EXEC"};
    put(text, names[prot & 7]);
}

static void put_region(struct text *text, const struct ps_region *region) {
    put(text, region->shape.name[0] ? "region '" : "an unnamed region");
    put(text, region->shape.name);
    put(text, region->shape.name[0] ? "'" : "");
}

static void put_since(struct text *text, struct ps_author author) {
    if (!author.known) {
        put(text, " since a change older than the last 1024");
        return;
    }
    put(text, author.generation ? " since change " : " since it was created (change ");
    put_number(text, author.generation);
    put(text, author.generation ? " by pid " : ") by pid ");
    put_number(text, author.pid);
    put(text, ", ");
    put_age(text, author.time, ps_sys_boottime());
}

static void put_lease(struct text *text, const struct ps_region *region, uint64_t page) {
    uint64_t here = ps_here(region, page);
    if (here & PS_HERE_HELD) {
        put(text, "; this process's lease on it is by window, at another address");
    } else if (here) {
        put(text, "; this process's lease on the page ended ");
        put_age(text, (here >> 1) * PS_MS, ps_sys_coarse());
    }
}

/* Why the page cannot be accessed that way. */
static void put_reason(struct text *text, struct ps_region *region, uint64_t page) {
    uint32_t use = atomic_load_explicit(&region->use, memory_order_acquire);
    if (use == PS_SHUT || use == PS_CLOSING) {
        put(text, ": the region is closed in this process");
        return;
    }
    if (!ps_running(region)) {
        put(text, ": this process is detached, it could not join after fork (");
        put(text, region->join_result == PS_EFULL     ? "every slot is taken)"
                  : region->join_result == -ETIMEDOUT ? "the region's lock was held)"
                                                      : "a system call failed)");
        return;
    }
    if (region->fenced)
        put(text, ": this process is fenced (it could not apply a change); the page");
    uint32_t prot;
    struct ps_author author = look(region, page, &prot);
    put(text, " is ");
    put_protection(text, prot);
    put_since(text, author);
    if (!region->fenced) /* else a lease that is held is not in the way of the access */
        put_lease(text, region, page);
}

static bool same_file(int one, int other) {
    struct stat a, b;
    return !fstat(one, &a) && !fstat(other, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* On stderr, and where faulthandler writes: who captures the one leaves the other alone.  Where nobody listens the
 * process ends all the same. */
static void say(const struct text *text) {
    int also = ps_process_told_too();
    ssize_t ignored = write(STDERR_FILENO, text->at, text->length);
    if (also >= 0 && !same_file(also, STDERR_FILENO))
        ignored = write(also, text->at, text->length);
    (void)ignored;
}

static void tell(struct ps_region *region, uintptr_t address, int signal, const greg_t *registers) {
    uint64_t at = address - (uintptr_t)ps_address(region), data = region->shape.pages * PS_PAGE;
    struct text text = {.length = 0};
    put(&text, "pyshare: ");
    if (at - ps_window_offset(&region->shape) < data) { /* closed, or a child's, or no memory is left */
        put(&text, "access by a lease's window, which this process has not open, to ");
        put_region(&text, region);
        put(&text, " at offset ");
        put_number(&text, at - ps_window_offset(&region->shape));
    } else if (at >= data) {
        put(&text, "access outside the data of ");
        put_region(&text, region);
    } else {
        put(&text, signal == SIGBUS      ? "no memory for a page at an access to "
                   : stores(registers)   ? "forbidden store to "
                   : executes(registers) ? "forbidden execution in "
                                         : "forbidden load from ");
        put_region(&text, region);
        put(&text, " at offset ");
        put_number(&text, at);
        put(&text, ": page ");
        put_number(&text, at / PS_PAGE / region->shape.unit);
        put_reason(&text, region, at / PS_PAGE);
        if (signal != SIGBUS)
            keep(region, at, stores(registers), PS_DIE);
    }
    put(&text, "\n");
    say(&text);
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
static void await_install(struct ps_chain *chain) {
    int64_t end = ps_sys_now() + PATIENCE;
    while (atomic_load_explicit(&chain->busy, memory_order_acquire) && ps_sys_now() < end)
        ps_sys_wait((struct ps_watch){&chain->busy, 1}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS / 10);
}

static void pass_on(int signal, siginfo_t *info, void *context, bool by_kernel, struct ps_offer *offer) {
    struct ps_chain *chain = ps_process_chain(signal);
    await_install(chain);
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
static bool on_its_way(const struct ps_offer *offer, uint64_t fault, bool by_kernel, bool ours, uintptr_t frame) {
    bool inside = frame < offer->frame && offer->frame - frame < NEAR;
    if (inside && (!by_kernel || fault == offer->fault))
        return true;
    return by_kernel && ours && offer->returned && fault == offer->fault;
}

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
    bool store = stores(registers);
    bool copied = store && allows(ps_protection(region, page), true) && !region->fenced &&
                  (ps_snapshots(region) || only_follows(region)) && !ps_snapshot_open(region, page);
    if (!copied && forbids(region, page, executes(registers) ? PROT_EXEC : rights_for(store)))
        return FORBIDDEN;
    for (int64_t end = ps_sys_now() + PATIENCE; !copied && late(region) && ps_sys_now() < end;)
        nap(region);
    if (region->fenced)
        return STUCK;
    /* A handler jumped out of an earlier violation here (ps_engine_refuse); a snapshot that is over left it closed; or
     * our agent has ended, and nobody else follows the map. */
    if (region->unsynced || late(region) || (store && !copied))
        mend(region, page);
    uint64_t retry = mix(fault, ps_generation(region), 0);
    if (retry != faults->retried)
        faults->retries = 0;
    faults->retried = retry;
    return faults->retries++ < REPEATS ? AGAIN : STUCK;
}

/* -- Policies -------------------------------------------------------------------------------------------------- */

enum ps_policy ps_policy(const struct ps_region *region) {
    return (enum ps_policy)atomic_load_explicit(&region->policy, memory_order_relaxed);
}

void ps_set_policy(struct ps_region *region, enum ps_policy policy) {
    atomic_store_explicit(&region->policy, policy, memory_order_relaxed);
}

enum fate {
    DIE, /* as if there were no other policy */
    GO,  /* the instruction may run again */
};

static bool in_order(const struct ps_region *region) {
    return ps_running(region) && !region->fenced && atomic_load_explicit(&region->use, memory_order_acquire) == PS_OPEN;
}

/* How many pages from `page` on, before `end`, are as forbidden as it is; all of its unit. */
static uint64_t forbidden_run(struct ps_region *region, uint64_t page, uint64_t end, bool store) {
    uint32_t prot = ps_protection(region, page), unit = region->shape.unit;
    uint64_t next = page + unit;
    while (next < end && ps_protection(region, next) == prot && !permits(region, next, store))
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
    } else if (permits(region, page, store)) {
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
    refuse(region, offset / PS_PAGE, store, &refusal);
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
static enum fate raise_it(const struct ps_hooks *hooks, struct ps_region *region, uint64_t offset, bool store,
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
        keep(region, offset, store, PS_RAISE);
    hooks->tell();
    return GO;
}

/* One sleep, until our page tables follow another generation, or a while has passed: then leases may have changed, or
 * a freezer may have died. */
static int sleep_on_map(struct ps_region *region) {
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

static enum fate wait_for_it(const struct ps_hooks *hooks, struct ps_region *region, uint64_t offset, bool store,
                             const ucontext_t *context) {
    keep(region, offset, store, PS_WAIT);
    bool keeps = hooks->keeps();
    void *token = keeps ? NULL : hooks->release();
    enum cause cause = FORBIDS;
    int64_t end = PS_NEVER;
    while (cause == FORBIDS && in_order(region) && ps_policy(region) == PS_WAIT &&
           !permits(region, offset / PS_PAGE, store)) {
        sleep_on_map(region);
        cause = ends_wait(hooks, context, keeps, &end);
    }
    hooks->regain(token);
    if (cause != FORBIDS)
        return raise_it(hooks, region, offset, store, cause);
    return in_order(region) ? GO : DIE;
}

static enum fate by_policy(struct ps_region *region, uint64_t offset, bool store, const ucontext_t *context) {
    const struct ps_hooks *hooks = ps_process_hooks();
    enum ps_policy policy = hooks ? ps_policy(region) : PS_DIE;
    if (policy == PS_DIE || !in_order(region))
        return DIE;
    if (permits(region, offset / PS_PAGE, store)) /* our page tables should: not for ever */
        return ps_process_faults()->retries < 2 * REPEATS && !mend(region, offset / PS_PAGE) ? GO : DIE;
    /* A thread that is to raise does not wait on the way there, and nobody waits for himself. */
    if (policy == PS_WAIT && !is_due(hooks) && !ps_freeze_own(region))
        return wait_for_it(hooks, region, offset, store, context);
    return raise_it(hooks, region, offset, store, FORBIDS);
}

/* -- System calls that store ----------------------------------------------------------------------------------- */

int ps_own_lease(const struct ps_region *region, uint64_t first, uint64_t count) {
    uint64_t own = 0;
    for (uint64_t page = first; page < first + count; page++)
        own += ps_here_own(region, page);
    return !own ? 0 : own == count ? 1 : PS_ENESTED;
}

int ps_await_writable(struct ps_region *region, uint64_t first, uint64_t count, int64_t deadline,
                      struct ps_refusal *refusal) {
    struct ps_until until = ps_until(deadline);
    for (uint64_t page = first; page < first + count;) {
        if (ps_protection(region, page) & PROT_WRITE) {
            page++;
            continue;
        }
        *refusal = (struct ps_refusal){.page = page, .required = PROT_WRITE};
        refusal->author = look(region, page, &refusal->actual);
        if (ps_policy(region) != PS_WAIT || ps_freeze_own(region) || ps_sys_now() >= deadline)
            return ps_waited(PS_EREFUSED);
        if (ps_sys_now() >= until.at || sleep_on_map(region) == -EINTR)
            return PS_ESIGNAL;
        page = first;
    }
    return ps_waited(0);
}

/* The window: what is leased has been saved for snapshots, and they wait for leases before their moment. */
int ps_way_in(struct ps_region *region, uint64_t page, int64_t deadline, void **at, struct ps_outcome *outcome,
              struct ps_refusal *refusal) {
    if (region->fenced)
        return unreachable(region, page, true, refusal);
    *at = (char *)ps_window(region) + page * PS_PAGE;
    int rc = ps_lease_window(region, deadline);
    if (rc != -ETIMEDOUT)
        return rc;
    outcome->generation = outcome->silent = 0;
    outcome->pids[outcome->silent++] = (uint32_t)getpid();
    return PS_ETIMEOUT;
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
    bool store = stores(registers);
    bool data = region && ps_running(region) && at < region->shape.pages * PS_PAGE;
    bool mark = data && signal == SIGBUS && region->uffd && store;
    enum verdict verdict = mark && !allows(ps_protection(region, at / PS_PAGE), store) ? FORBIDDEN : STUCK;
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
    bool goes_on =
        data && by_kernel && forbidden && !executes(registers) && by_policy(region, at, store, context) == GO;
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
    if (!on_its_way(offer, fault, by_kernel, region != NULL, frame)) {
        offer->level = UINT32_MAX;
        if (region)
            tell(region, address, signal, registers);
    }
    uintptr_t outer = offer->frame;
    offer->fault = fault;
    offer->frame = frame;
    offer->returned = false;
    errno = saved;
    pass_on(signal, info, context, by_kernel, offer);
    offer->frame = outer;
    offer->returned = true;
}

static bool same(const struct sigaction *a, const struct sigaction *b) {
    return (a->sa_flags & SA_SIGINFO) == (b->sa_flags & SA_SIGINFO) && a->sa_handler == b->sa_handler;
}

/* When the library is loaded, so before any region: what puts our handler on top lies below it, and does not know it.
 */
__attribute__((constructor)) static void start(void) {
    ps_process_set_handler(on_fault);
}

/* The other copy of the chain without this handler, or with it on top, wherever it was before. */
static void rewrite(struct ps_chain *chain, const struct sigaction *handler, bool on_top) {
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
        await_install(chain);
        return;
    }
    sigaction(signal, NULL, &found);
    if (!is_ours(&found)) {
        struct sigaction replaced;
        rewrite(chain, &found, true);
        sigaction(signal, &ours, &replaced);
        if (!is_ours(&replaced) && !same(&replaced, &found)) /* by another thread, between the two calls */
            rewrite(chain, &replaced, true);
    }
    atomic_store_explicit(&chain->busy, 0, memory_order_release);
}

void ps_fault_install(void) {
    install(SIGSEGV);
    install(SIGBUS);
}

/* faulthandler's, if it came above ours: once disabled it returns at once, wherever it is called from, and a fault that
 * it is given would come for ever. */
static void follow_tracer(int signal, bool enabled) {
    struct ps_chain *chain = ps_process_chain(signal);
    struct sigaction top;
    sigaction(signal, NULL, &top);
    while (atomic_exchange_explicit(&chain->busy, 1, memory_order_acquire))
        await_install(chain);
    if (!enabled && chain->tracer.sa_handler)
        rewrite(chain, &chain->tracer, false);
    chain->tracer = enabled ? top : (struct sigaction){.sa_handler = NULL};
    atomic_store_explicit(&chain->busy, 0, memory_order_release);
}

void ps_fault_tracer(bool enabled) {
    follow_tracer(SIGSEGV, enabled);
    follow_tracer(SIGBUS, enabled);
    ps_fault_install();
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
