/* recover.c - another library that lives with faults, for test_fault.py: it jumps out of them, or mends them and
 * returns, and hands on what is not its own, as a debugger's probe or a garbage collector's write barrier does. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

static __thread sigjmp_buf back;
static __thread volatile int armed;
static char *page;
static volatile long mended;
static struct sigaction before[2];

static void hand_on(int number, siginfo_t *info, void *context) {
    struct sigaction *next = &before[number == SIGBUS];
    if (next->sa_flags & SA_SIGINFO)
        next->sa_sigaction(number, info, context);
    else if (next->sa_handler != SIG_DFL)
        next->sa_handler(number);
    else {
        signal(number, SIG_DFL);
        if (info->si_code <= 0)
            raise(number);
    }
}

static void jump(int number, siginfo_t *info, void *context) {
    if (armed)
        siglongjmp(back, 1);
    hand_on(number, info, context);
}

static void mend(int number, siginfo_t *info, void *context) {
    if (!page || info->si_code <= 0 || (char *)info->si_addr < page || (char *)info->si_addr >= page + 4096) {
        hand_on(number, info, context);
        return;
    }
    mended++;
    mprotect(page, 4096, PROT_READ | PROT_WRITE);
}

static void install(void (*handler)(int, siginfo_t *, void *), int flags) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
}

void install_jump(int flags) {
    install(jump, flags);
}

void install_mend(int flags) {
    page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    install(mend, flags);
}

/* How many of so many stores to the address faulted. */
long jumps(volatile char *at, long times) {
    volatile long caught = 0;
    for (volatile long i = 0; i < times; i++) {
        armed = 1;
        if (sigsetjmp(back, 1))
            caught++;
        else
            *at = 1;
        armed = 0;
    }
    return caught;
}

/* Does it succeed: 0 a load, 1 a store of what is there, 2 the execution of what is there, which returns? */
long could(volatile char *at, long how) {
    volatile long done = 0;
    armed = 1;
    if (!sigsetjmp(back, 1)) {
        if (how == 2)
            ((void (*)(void))at)();
        else if (how == 1)
            __atomic_or_fetch(at, 0, __ATOMIC_RELAXED);
        else
            (void)*at;
        done = 1;
    }
    armed = 0;
    return done;
}

long mends(long times) {
    mended = 0;
    for (long i = 0; i < times; i++) {
        mprotect(page, 4096, PROT_NONE);
        *(volatile char *)page = 1;
    }
    return mended;
}

long overflow(long depth) {
    volatile char room[4096];
    memset((char *)room, (int)depth, sizeof room);
    return overflow(depth + 1) + room[depth % 4096];
}
