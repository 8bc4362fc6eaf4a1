/* fault.c - what happens at a forbidden access.
 *
 * Lives here: the copy that survives faults, and on it the safe accessors; the
 * handler of SIGSEGV and SIGBUS, its line on stderr, and its place in the
 * chain of handlers.
 * Invariants
 *  1. The handler is async-signal-safe: no lock, no malloc, no stdio, errno
 *     preserved; what it reads of the table and of shared memory are atomics.
 *  2. Only faults in our own ranges are ours; every other one goes to the
 *     handler below as if we were not there.
 *  3. A fault is never swallowed: it is mended (the copy; a change that was in
 *     the way), or the process ends by the signal.
 * The chain: handlers found below ours form a stack.  A fresh fault starts at
 * its top.  A handler that re-raises (faulthandler does, with raise()), or
 * returns though the instruction faults again, has had its turn: the next one
 * below gets it, at last the default action.
 * Runs in: signal handler; ps_read, ps_write and ps_fault_install in a caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "participant.h"

#define ALTERNATE_STACK (64u * 1024u)
#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for the end of an open change */
#define FAULTS 100000           /* of one copy: a page whose protection changes all the time is refused at last */
#define REPEATS 64              /* a handler that returns this often without mending has had its turn */

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

static bool allows(uint32_t prot, bool store) {
    return prot & (store ? PROT_WRITE : PROT_READ | PROT_WRITE); /* on x86-64 a writable page can be read */
}

/* The first page of a range whose protection forbids the access, or the page past it. */
static uint64_t allowed_up_to(struct ps_region *region, uint64_t page, uint64_t end, bool store, uint32_t *prot) {
    while (page < end) {
        uint64_t run = ps_run(region, page, end, prot);
        if (!allows(*prot, store))
            return page;
        page += run;
    }
    return end;
}

static int refuse(struct ps_region *region, uint64_t page, uint32_t actual, bool store, struct ps_refusal *refusal) {
    refusal->page = page;
    refusal->actual = actual;
    refusal->required = store ? PROT_WRITE : PROT_READ;
    refusal->author = ps_change_author(region, page);
    return PS_EREFUSED;
}

/* The map allows an access that our page tables refused: they are late, or we are fenced. */
static int mend(struct ps_region *region, uint64_t page) {
    ps_page_lock(region);
    int rc = region->fenced ? -EACCES : ps_engine_apply(region, page, 1);
    ps_page_unlock(region);
    return rc;
}

static int copy(struct ps_region *region, uint64_t offset, char *other, uint64_t length, bool store,
                struct ps_refusal *refusal) {
    char *data = ps_address(region);
    uint64_t end = (offset + length + PS_PAGE - 1) / PS_PAGE;
    for (uint32_t faults = 0; length; faults++) {
        uint32_t prot;
        uint64_t page = allowed_up_to(region, offset / PS_PAGE, end, store, &prot);
        if (page < end)
            return refuse(region, page, prot, store, refusal);
        struct ps_copied copied =
            store ? ps_copy_bytes(data + offset, other, length) : ps_copy_bytes(other, data + offset, length);
        offset += length - copied.left;
        other += length - copied.left;
        length = copied.left;
        if (!length)
            return 0;
        uint64_t at = (copied.where & ~PS_COPY_NO_PAGE) - (uintptr_t)data;
        if (at / PS_PAGE != offset / PS_PAGE)
            return -EFAULT; /* the caller's own buffer */
        if (copied.where & PS_COPY_NO_PAGE)
            return -ENOMEM;
        if (faults == FAULTS || mend(region, at / PS_PAGE))
            return refuse(region, at / PS_PAGE, PROT_NONE, store, refusal);
    }
    return 0;
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

static void put_age(struct text *text, uint64_t then) {
    uint64_t now = ps_sys_boottime(), ms = now > then ? (now - then) / PS_MS : 0;
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

/* Why the page cannot be accessed that way. */
static void put_reason(struct text *text, struct ps_region *region, uint64_t page) {
    if (atomic_load_explicit(&region->use, memory_order_acquire) == PS_SHUT) {
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
    put(text, " is ");
    put_protection(text, ps_protection(region, page));
    struct ps_author author = ps_change_author(region, page);
    if (!author.known) {
        put(text, " since a change older than the last 1024");
        return;
    }
    put(text, author.generation ? " since change " : " since it was created (change ");
    put_number(text, author.generation);
    put(text, author.generation ? " by pid " : ") by pid ");
    put_number(text, author.pid);
    put(text, ", ");
    put_age(text, author.time);
}

static void tell(struct ps_region *region, uintptr_t address, int signal, const greg_t *registers) {
    uint64_t at = address - (uintptr_t)ps_address(region);
    struct text text = {.length = 0};
    put(&text, "pyshare: ");
    if (at >= region->shape.pages * PS_PAGE) {
        put(&text, "access outside the data of ");
        put_region(&text, region);
    } else {
        put(&text, signal == SIGBUS                ? "no memory for a page at an access to "
                   : registers[REG_ERR] & (1 << 1) ? "forbidden store to "
                   : registers[REG_ERR] & (1 << 4) ? "forbidden execution in "
                                                   : "forbidden load from ");
        put_region(&text, region);
        put(&text, " at offset ");
        put_number(&text, at);
        put(&text, ": page ");
        put_number(&text, at / PS_PAGE);
        put_reason(&text, region, at / PS_PAGE);
    }
    put(&text, "\n");
    if (write(STDERR_FILENO, text.at, text.length) < 0)
        return; /* nobody listens; the process ends all the same */
}

/* -- The chain ------------------------------------------------------------------------------------------------- */

static void on_fault(int signal, siginfo_t *info, void *context);

static bool is_ours(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_fault;
}

static void default_action(int signal, bool by_kernel) {
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(signal, &action, NULL);
    if (!by_kernel) /* else the instruction runs again, and the kernel ends us with the genuine fault */
        raise(signal);
}

/* How many handlers of the chain this fault has not been offered to yet. */
static uint32_t level_of(struct ps_chain *chain, uint32_t count, bool by_kernel, bool ours, uint64_t fault) {
    uint32_t level = atomic_load_explicit(&chain->level, memory_order_relaxed);
    if (!by_kernel) /* sent by kill(), or raised again by the handler that we called */
        return level < count ? level : count;
    if (atomic_exchange_explicit(&chain->last, fault, memory_order_relaxed) != fault) {
        atomic_store_explicit(&chain->repeats, 0, memory_order_relaxed);
        return count;
    }
    bool again = !ours && atomic_fetch_add_explicit(&chain->repeats, 1, memory_order_relaxed) < REPEATS;
    return again || level > count ? count : level;
}

static void pass_on(int signal, siginfo_t *info, void *context, bool by_kernel, bool ours, uint64_t fault) {
    struct ps_chain *chain = ps_process_chain(signal);
    struct ps_handlers *below = &chain->copy[atomic_load_explicit(&chain->active, memory_order_acquire)];
    uint32_t level = level_of(chain, below->count, by_kernel, ours, fault);
    struct sigaction *next = level ? &below->handler[level - 1] : NULL;
    atomic_store_explicit(&chain->level, level ? level - 1 : 0, memory_order_relaxed);
    bool plain = next && !(next->sa_flags & SA_SIGINFO);
    if (plain && next->sa_handler == SIG_IGN && !by_kernel)
        atomic_store_explicit(&chain->level, level, memory_order_relaxed);
    else if (!next || (plain && (next->sa_handler == SIG_DFL || next->sa_handler == SIG_IGN)))
        default_action(signal, by_kernel);
    else if (plain)
        next->sa_handler(signal);
    else
        next->sa_sigaction(signal, info, context);
}

/* -- The handler ----------------------------------------------------------------------------------------------- */

static bool pending(const struct ps_region *region) {
    return ps_change_open(region) ||
           atomic_load_explicit(&region->applied, memory_order_acquire) < ps_generation(region);
}

/* The fault met a change under way: wait for its outcome.  True if the access is allowed then, and the
 * instruction may run again. */
static bool outlive_change(struct ps_region *region, uint64_t page, bool store, uint64_t fault) {
    struct ps_told *told = ps_process_told();
    int64_t end = ps_sys_now() + PATIENCE;
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    while (pending(region) && ps_sys_now() < end)
        ps_sys_wait((struct ps_watch){&slot->ack, atomic_load_explicit(&slot->ack, memory_order_relaxed)},
                    FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS);
    if (!allows(ps_protection(region, page), store) || region->fenced)
        return false;
    if (atomic_exchange_explicit(&told->retried, fault, memory_order_relaxed) != fault)
        atomic_store_explicit(&told->retries, 0, memory_order_relaxed);
    return atomic_fetch_add_explicit(&told->retries, 1, memory_order_relaxed) < REPEATS;
}

static uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
    return ((a * UINT64_C(0x9e3779b97f4a7c15) ^ b) * UINT64_C(0x9e3779b97f4a7c15) ^ c) | 1;
}

static void on_fault(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    bool by_kernel = info->si_code > 0;
    int saved = errno;
    /* A handler below that raises again gives no address, but the registers still tell of a page fault. */
    uintptr_t address = by_kernel                     ? (uintptr_t)info->si_addr
                        : registers[REG_TRAPNO] == 14 ? (uintptr_t)registers[REG_CR2]
                                                      : 0;
    if (by_kernel && registers[REG_RIP] == (greg_t)(uintptr_t)ps_copy_instruction) {
        registers[REG_RDX] = (greg_t)(address | (signal == SIGBUS ? PS_COPY_NO_PAGE : 0));
        registers[REG_RIP] = (greg_t)(uintptr_t)ps_copy_end;
        return;
    }
    struct ps_region *region = address && ps_process_known() ? ps_process_find(address) : NULL;
    uint64_t fault = mix((uint64_t)ps_sys_gettid(), (uint64_t)registers[REG_RIP], address);
    uint64_t at = region ? address - (uintptr_t)ps_address(region) : 0;
    bool store = registers[REG_ERR] & (1 << 1);
    if (region && by_kernel && signal == SIGSEGV && ps_running(region) && at < region->shape.pages * PS_PAGE &&
        outlive_change(region, at / PS_PAGE, store, fault)) {
        errno = saved;
        return;
    }
    if (region && atomic_exchange_explicit(&ps_process_told()->line, fault, memory_order_relaxed) != fault)
        tell(region, address, signal, registers);
    errno = saved;
    pass_on(signal, info, context, by_kernel, region != NULL, fault);
}

static bool same(const struct sigaction *a, const struct sigaction *b) {
    return (a->sa_flags & SA_SIGINFO) == (b->sa_flags & SA_SIGINFO) && a->sa_handler == b->sa_handler;
}

/* The other copy of the chain, with what was found on top; a handler found before moves up. */
static void remember(struct ps_chain *chain, const struct sigaction *found) {
    uint32_t active = atomic_load_explicit(&chain->active, memory_order_relaxed);
    struct ps_handlers *from = &chain->copy[active], *to = &chain->copy[!active];
    uint32_t skip = from->count == PS_CHAIN; /* full: forget the oldest */
    to->count = 0;
    for (uint32_t i = skip; i < from->count; i++)
        if (!same(&from->handler[i], found))
            to->handler[to->count++] = from->handler[i];
    to->handler[to->count++] = *found;
    atomic_store_explicit(&chain->active, !active, memory_order_release); /* pairs with pass_on */
}

static void install(int signal) {
    struct ps_chain *chain = ps_process_chain(signal);
    struct sigaction found, ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(signal, NULL, &found);
    if (is_ours(&found) || atomic_exchange_explicit(&chain->busy, 1, memory_order_acquire))
        return; /* another thread is at it */
    sigaction(signal, NULL, &found);
    if (!is_ours(&found)) {
        remember(chain, &found);
        sigaction(signal, &ours, NULL);
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
