/* stress.c - the core without Python, driven from many sides at once, for the sanitizers.
 *
 *   stress SECONDS SEED
 *
 * Participants of one region:
 *   - the crowd: HOLDERS participants in one process, of both engines, each with two callers, two takers of leases
 *     and locks, an event loop with several calls under way in the one waiter, of which it cancels some, an accessor
 *     and its agent; joiners, which attach, work and leave again and again; and forks of it
 *     all, which rejoin in the child handler, work, and are killed; the callers and takers get signals meanwhile;
 *   - strays: processes that attach, change at random, freeze, and are killed in the middle of it.
 * A caller has pages that nobody else changes: there it looks, after each change, at what every holder can really
 * do (promises 1 and 2), by the copy that survives faults.  The shared pages everybody changes; at the end, when
 * all is quiet, every holder's page tables must be those of the map.
 *
 * ThreadSanitizer knows memory by address, and each participant has a mapping of its own: it sees the order
 * between the threads of one participant.  Words that participants share are atomic; the notes below are plain on
 * purpose: a release or acquire that is missing between one caller and the next is a data race on them.
 * What fails ends the program with a line on stderr and a status that is not 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "operations/operations.h"
#include "participant/participant.h"
#include "shared/shared.h"

/* Options of the sanitizers, which look for these functions: every finding ends the program.  Descriptors have
 * numbers of their own in each agent's table, which ThreadSanitizer takes for one: open() and close() race with
 * nothing. */
const char *__tsan_default_options(void);
const char *__tsan_default_suppressions(void);
const char *__asan_default_options(void);

const char *__tsan_default_options(void) {
    return "halt_on_error=1:die_after_fork=0:io_sync=0";
}
const char *__tsan_default_suppressions(void) {
    return "race:^open$\nrace:^__interceptor_open$\nrace:^close$\nrace:^__interceptor_close$\n";
}
const char *__asan_default_options(void) {
    return "detect_leaks=0:detect_stack_use_after_return=1"; /* the core allocates nothing */
}

enum { HOLDERS = 3, CALLERS = 2 * HOLDERS, JOINERS = 2, OWN = 8, SHARED = 200, NOTES = 1 << 16 };
enum { LOOPS = HOLDERS, CALLS = 6, SELDOM = 200 };     /* calls of a loop; one look of so many cancels one */
enum { TAKERS = 2 * HOLDERS, LEASED = 5, LOCKED = 3 }; /* the first of the shared pages; locks */
enum { RARELY = 8 };                                   /* one turn of so many has a freeze */
#define OTHERS_FIRST ((uint64_t)CALLERS * OWN)
#define PAGES (OTHERS_FIRST + SHARED)
#define TIMEOUT (60000 * PS_MS) /* nobody here is stopped, so nothing may ever take so long */

#define CHECK(condition, ...)                                                                                          \
    do                                                                                                                 \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "stress.c:%d: not %s: ", __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            _exit(2);                                                                                                  \
        }                                                                                                              \
    while (0)

struct caller {
    uint32_t note[NOTES];   /* plain: each written once, before a change */
    _Atomic uint64_t done;  /* relaxed: notes written << 40 | generation of the change after the last */
    _Atomic uint64_t turns; /* for the summary */
};

static int memory; /* the region's descriptor */
static int64_t end;
static struct ps_region *holder[HOLDERS];
static struct caller caller[CALLERS];
static pthread_t thread[CALLERS + TAKERS + LOOPS + HOLDERS + JOINERS + 1]; /* the callers and takers first */
static _Atomic uint64_t joins, accesses, forks, taken, freezes, calls, cancelled;
/* Who of the crowd holds a page, or a lock; relaxed: held words order it, which the plain counts are to prove. */
static _Atomic uint32_t inside[LEASED + LOCKED];
static uint64_t taken_by[HOLDERS][LEASED + LOCKED];
static uint64_t below(uint64_t *state, uint64_t limit) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state % limit;
}

/* A sanitizer's own allocator stays locked in a child that was forked while another thread was in it. The core
 * allocates nothing, but threads that begin or end do: there, a fork waits until none of the joiners' does. */
#ifndef __has_feature
#define __has_feature(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer) || defined(__SANITIZE_THREAD__) ||               \
    __has_feature(thread_sanitizer)
static pthread_rwlock_t threads = PTHREAD_RWLOCK_INITIALIZER;

static void threads_may_change(void) {
    pthread_rwlock_rdlock(&threads);
}
static void threads_may_not_change(void) {
    pthread_rwlock_wrlock(&threads);
}
static void threads_changed(void) {
    pthread_rwlock_unlock(&threads);
}
/* In a forked child, before the core's own handler: ThreadSanitizer still counts the threads that the core has in its
 * parent, whose places in memory may be given to threads of the child's. */
static void forget_threads(void) {
    struct ps_waiter *waiter = ps_process_waiter();
    if (waiter->running)
        pthread_detach(waiter->thread);
    for (struct ps_region *region = ps_process_next(NULL); region; region = ps_process_next(region))
        if (region->threaded)
            pthread_detach(region->thread);
}
#else
static void threads_may_change(void) {
}
static void threads_may_not_change(void) {
}
static void threads_changed(void) {
}
static void forget_threads(void) {
}
#endif

static bool over(void) {
    return ps_sys_now() >= end;
}

/* The crowd has done all that it is there for, each at least once: where processors are scarce that can take longer. */
static bool has_done_all(void) {
    for (int i = 0; i < CALLERS; i++)
        if (!caller[i].turns)
            return false;
    return joins && accesses && forks && taken && freezes && calls && cancelled;
}

/* Likewise of the crowd's other threads: the one that forks begins after them, and ends before them. */
static _Atomic uint64_t begun;
static _Atomic bool forked;

static void count(_Atomic uint64_t *counter) {
    atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* By both engines in turn, so that callers of either change the others from outside or wake them. */
static struct ps_region *attach(uint64_t number) {
    struct ps_outcome outcome;
    struct ps_region *region = NULL;
    const char *field = "";
    int rc = ps_attach(memory, -1, number % 2 ? PS_ENGINE_MPROTECT : PS_ENGINE_AUTO, &region, &field);
    CHECK(!rc, "ps_attach: %d %s", rc, field);
    int64_t deadline = ps_sys_now() + TIMEOUT;
    while ((rc = ps_join(region, deadline, &outcome, &field)) == PS_ESIGNAL)
        ;
    CHECK(!rc, "ps_join: %d %s", rc, field);
    return region;
}

static void leave(struct ps_region *region) {
    int rc = ps_close_begin(region);
    CHECK(!rc, "ps_close_begin: %d", rc);
    ps_close(region);
    ps_release(region);
}

/* As the binding does: before each call a lost agent is started again; after a signal the call goes on. */
static void be_ready(struct ps_region *region) {
    struct ps_outcome outcome;
    int rc;
    while ((rc = ps_ready(region, &outcome)) == PS_ESIGNAL)
        ;
    CHECK(!rc, "ps_ready: %d", rc);
}

static uint64_t change(struct ps_region *region, uint64_t first, uint64_t pages, uint32_t prot) {
    struct ps_outcome outcome;
    int64_t deadline = ps_sys_now() + TIMEOUT;
    be_ready(region);
    int rc = ps_change(region, first * PS_PAGE, pages * PS_PAGE, prot, deadline, &outcome);
    while (rc == PS_ESIGNAL)
        rc = outcome.generation ? ps_await(region, outcome.generation, deadline, &outcome)
                                : ps_change(region, first * PS_PAGE, pages * PS_PAGE, prot, deadline, &outcome);
    CHECK(!rc, "ps_change: %d, change %lu, silent %u: pid %u", rc, outcome.generation, outcome.silent,
          outcome.silent ? outcome.pids[0] : 0);
    return outcome.generation;
}

static uint64_t change_others(struct ps_region *region, uint64_t *state) {
    uint64_t first = below(state, SHARED), pages = 1 + below(state, SHARED - first);
    return change(region, OTHERS_FIRST + first, pages, (uint32_t)below(state, 4));
}

static void use_data(struct ps_region *region, uint64_t *state) {
    char bytes[3 * PS_PAGE];
    struct ps_refusal refusal;
    uint64_t length = 1 + below(state, sizeof bytes), offset = below(state, PAGES * PS_PAGE - length);
    int rc = ps_read(region, offset, bytes, length, &refusal);
    CHECK(!rc || rc == PS_EREFUSED, "ps_read: %d", rc);
    if (!rc)
        rc = ps_write(region, offset, bytes, length, &refusal);
    CHECK(!rc || rc == PS_EREFUSED, "ps_write: %d", rc);
    CHECK(!rc || refusal.page < PAGES, "refused page %lu", refusal.page);
}

/* After that change somebody has frozen everything, or so many have come that nobody can tell. */
static bool frozen_since(struct ps_region *region, uint64_t generation) {
    struct ps_shm_ring entry;
    while (generation++ < ps_generation(region))
        if (!ps_change_read(region, generation, &entry) || entry.count == PAGES)
            return true;
    return false;
}

/* What the page tables of that participant really allow, if nobody has frozen it since that change. */
static void look(struct ps_region *region, uint64_t page, uint32_t prot, uint64_t generation) {
    char byte = 0, *at = (char *)ps_address(region) + page * PS_PAGE + 77;
    bool loads = !ps_copy_bytes(&byte, at, 1).left, stores = !ps_copy_bytes(at, &byte, 1).left;
    CHECK((loads == (prot != PROT_NONE) && stores == !!(prot & PROT_WRITE)) || frozen_since(region, generation),
          "page %lu is %u: loads %d, stores %d", page, prot, loads, stores);
}

/* -- Freezes ---------------------------------------------------------------------------------------------------- */

/* All of these participants may read any page, and store to none, until it is over. */
static void freeze(struct ps_region *region, uint64_t *state, int lookers) {
    struct ps_outcome outcome;
    int64_t deadline = ps_sys_now() + TIMEOUT;
    int rc = PS_ESIGNAL;
    be_ready(region);
    outcome.generation = 0;
    while (rc == PS_ESIGNAL && !outcome.generation)
        rc = ps_freeze(region, deadline, &outcome);
    uint64_t generation = outcome.generation;
    while (rc == PS_ESIGNAL)
        rc = ps_await(region, generation, deadline, &outcome);
    CHECK(!rc, "ps_freeze: %d, silent %u: pid %u", rc, outcome.silent, outcome.silent ? outcome.pids[0] : 0);
    for (int i = 0; i < lookers; i++) {
        look(holder[i], below(state, PAGES), PROT_READ, generation);
        CHECK(ps_protection(region, below(state, PAGES)) == PROT_READ, "frozen by change %lu", generation);
    }
    CHECK(!frozen_since(region, generation), "frozen by change %lu", generation);
    count(&freezes);
    while ((rc = ps_thaw(region)) == PS_ESIGNAL)
        ;
    CHECK(!rc, "ps_thaw: %d", rc);
}

/* -- Leases and locks ------------------------------------------------------------------------------------------- */

/* A lease over READ or writable pages: false where one is neither. */
static bool take_lease(struct ps_region *region, uint64_t *state, struct ps_lease *lease) {
    struct ps_outcome outcome;
    struct ps_refusal refusal;
    int64_t deadline = ps_sys_now() + TIMEOUT;
    int rc = -EAGAIN;
    uint64_t first = below(state, LEASED);
    *lease = (struct ps_lease){
        .first = OTHERS_FIRST + first, .count = 1 + below(state, LEASED - first), .window = below(state, 2)};
    be_ready(region);
    if (below(state, 2))
        rc = ps_lease_take(region, lease, PS_TRY, &outcome, &refusal);
    while (rc == PS_ESIGNAL || rc == -EAGAIN)
        rc = ps_lease_take(region, lease, deadline, &outcome, &refusal);
    CHECK(!rc || rc == PS_EREFUSED, "ps_lease_take: %d", rc);
    return !rc;
}

static void store(struct ps_region *region, const struct ps_lease *lease) {
    char byte = 1, *at = lease->window ? ps_window(region) : ps_address(region);
    for (uint64_t page = lease->first; page < lease->first + lease->count; page++)
        CHECK(!ps_copy_bytes(at + page * PS_PAGE + 99, &byte, 1).left, "page %lu, leased", page);
}

static void give_lease(struct ps_region *region, const struct ps_lease *lease) {
    if (ps_lease_give(region, lease, PS_TRY))
        ps_lease_give(region, lease, PS_NEVER);
}

static void take_lock(struct ps_region *region, uint32_t index) {
    struct ps_outcome outcome;
    bool abandoned;
    int64_t deadline = ps_sys_now() + TIMEOUT;
    int rc = PS_ESIGNAL;
    be_ready(region);
    while (rc == PS_ESIGNAL)
        rc = ps_user_lock_take(region, index, deadline, &abandoned, &outcome);
    CHECK(!rc, "ps_user_lock_take: %d", rc);
}

/* Of those that we hold: nobody else of the crowd has one of them. */
static void be_inside(uint32_t taker, uint64_t first, uint64_t count) {
    for (uint64_t i = first; i < first + count; i++) {
        uint32_t other = atomic_exchange_explicit(&inside[i], taker + 1, memory_order_relaxed);
        CHECK(!other, "takers %u and %u both hold %lu", taker, other - 1, i);
        taken_by[taker / 2][i]++;
    }
    sched_yield();
    for (uint64_t i = first; i < first + count; i++)
        atomic_store_explicit(&inside[i], 0, memory_order_relaxed);
}

static void *take(void *argument) {
    uint32_t index = (uint32_t)*(uint64_t *)argument;
    uint64_t state = 400 + index;
    struct ps_region *region = holder[index / 2];
    for (count(&begun); !forked; count(&taken)) {
        struct ps_lease lease;
        uint32_t lock = (uint32_t)below(&state, LOCKED);
        if (take_lease(region, &state, &lease)) {
            store(region, &lease);
            be_inside(index, lease.first - OTHERS_FIRST, lease.count);
            give_lease(region, &lease);
        }
        take_lock(region, lock);
        be_inside(index, LEASED + lock, 1);
        ps_user_lock_give(region, lock, false);
    }
    return NULL;
}

/* -- Event loops ------------------------------------------------------------------------------------------------ */

static void begin_call(struct ps_call *call, struct ps_region *region, struct ps_mailbox *box, uint64_t *state) {
    *call = (struct ps_call){.kind = (enum ps_call_kind)below(state, 3),
                             .region = region,
                             .box = box,
                             .deadline = ps_sys_now() + TIMEOUT,
                             .owner = call};
    if (call->kind == PS_CALL_LEASE) {
        call->first = OTHERS_FIRST + below(state, LEASED);
        call->count = 1 + below(state, OTHERS_FIRST + LEASED - call->first);
        call->lease = (struct ps_lease){.first = call->first, .count = call->count, .window = below(state, 2)};
    } else if (call->kind == PS_CALL_LOCK) {
        call->first = below(state, LOCKED);
        call->count = 1;
    } else {
        uint64_t first = below(state, SHARED);
        call->first = (OTHERS_FIRST + first) * PS_PAGE;
        call->count = (1 + below(state, SHARED - first)) * PS_PAGE;
        call->prot = (uint32_t)below(state, 4);
    }
    int rc = ps_call_begin(call);
    CHECK(!rc, "ps_call_begin: %d", rc);
}

/* Uses what it has got, and lets go of it. */
static void end_call(struct ps_call *call, uint32_t taker) {
    bool refused = call->kind == PS_CALL_LEASE && call->rc == PS_EREFUSED;
    bool given_up = call->rc == PS_ESIGNAL && atomic_load(&call->cancelled);
    CHECK(!call->rc || refused || given_up, "call of kind %u: %d", call->kind, call->rc);
    count(given_up ? &cancelled : &calls);
    if (call->rc)
        return;
    if (call->kind == PS_CALL_LEASE) {
        store(call->region, &call->lease);
        be_inside(taker, call->lease.first - OTHERS_FIRST, call->lease.count);
        give_lease(call->region, &call->lease);
    } else if (call->kind == PS_CALL_LOCK) {
        be_inside(taker, LEASED + call->first, 1);
        ps_user_lock_give(call->region, (uint32_t)call->first, false);
    }
}

static void *loop(void *argument) {
    uint64_t index = *(uint64_t *)argument, state = 500 + index;
    struct ps_region *region = holder[index];
    struct ps_mailbox box = {.fd = -1};
    struct ps_call call[CALLS];
    int under_way = 0;
    for (; under_way < CALLS; under_way++)
        begin_call(&call[under_way], region, &box, &state);
    for (count(&begun); under_way;) {
        if (!below(&state, SELDOM))
            ps_call_cancel(&call[below(&state, CALLS)]);
        for (struct ps_call *done = ps_mailbox_take(&box), *next; done; done = next) {
            next = done->next;
            end_call(done, (uint32_t)(2 * index));
            if (forked)
                under_way--;
            else
                begin_call(done, region, &box, &state);
        }
        sched_yield();
    }
    ps_mailbox_settle(&box);
    return NULL;
}

/* -- The crowd ------------------------------------------------------------------------------------------------- */

/* What came before a change that came before `generation`, on the same handle. */
static void read_note(const struct caller *other, uint64_t generation) {
    uint64_t done = atomic_load_explicit(&other->done, memory_order_relaxed), notes = done >> 40;
    if (notes && (done & ((UINT64_C(1) << 40) - 1)) < generation)
        CHECK(other->note[notes - 1] == notes, "note %lu is %u", notes, other->note[notes - 1]);
}

static void *call(void *argument) {
    struct caller *me = argument;
    uint64_t index = (uint64_t)(me - caller), state = index + 1;
    struct ps_region *region = holder[index / 2];
    count(&begun);
    for (uint32_t note = 0; !forked; count(&me->turns)) {
        uint64_t at = below(&state, OWN), pages = 1 + below(&state, OWN - at), first = index * OWN + at;
        uint32_t prot = (uint32_t)below(&state, 4);
        if (note < NOTES)
            me->note[note] = note + 1;
        uint64_t generation = change(region, first, pages, prot);
        if (note < NOTES)
            atomic_store_explicit(&me->done, (uint64_t)++note << 40 | generation, memory_order_relaxed);
        for (int i = 0; i < HOLDERS; i++)
            look(holder[i], first + below(&state, pages), prot, generation);
        if (!below(&state, RARELY))
            freeze(region, &state, HOLDERS);
        read_note(&caller[index ^ 1], change_others(region, &state));
    }
    return NULL;
}

static void *use(void *argument) {
    struct ps_region **mine = argument, *region = *mine;
    struct ps_participant participant;
    uint64_t index = (uint64_t)(mine - holder), state = 100 + index;
    for (count(&begun); !forked; count(&accesses)) {
        use_data(region, &state);
        uint64_t generation = ps_generation(region);
        read_note(&caller[2 * index], generation + 1);
        read_note(&caller[2 * index + 1], generation + 1);
        uint32_t prot;
        for (uint64_t page = 0; page < PAGES; page += ps_run(region, page, PAGES, &prot))
            ;
        for (uint32_t slot = 0; ps_participant(region, slot, &participant) >= 0; slot++)
            ;
    }
    return NULL;
}

static void *join_and_leave(void *argument) {
    uint64_t state = 200 + *(uint64_t *)argument;
    for (count(&begun); !forked; count(&joins)) {
        threads_may_change();
        struct ps_region *region = attach(below(&state, 2));
        threads_changed();
        for (uint64_t i = below(&state, 4); i; i--) {
            change_others(region, &state);
            use_data(region, &state);
        }
        threads_may_change();
        leave(region); /* and its agent has ended */
        threads_changed();
    }
    return NULL;
}

/* Changes until it is killed, and tells of each change by a byte. */
static _Noreturn void change_until_killed(struct ps_region *region, int tell[2], uint64_t seed) {
    close(tell[0]); /* so that we end by SIGPIPE, should the other side be gone */
    for (uint64_t state = seed;;) {
        struct ps_lease lease;
        change_others(region, &state);
        use_data(region, &state);
        if (take_lease(region, &state, &lease)) {
            store(region, &lease);
            give_lease(region, &lease);
        }
        take_lock(region, 0);
        ps_user_lock_give(region, 0, false);
        if (!below(&state, RARELY))
            freeze(region, &state, 0);
        if (write(tell[1], "", 1) != 1)
            _exit(0);
    }
}

/* Lets the process make a few changes, and kills it in the next one. */
static void kill_at_work(pid_t pid, int heard, uint64_t *state) {
    char byte;
    int status;
    bool told = true;
    for (uint64_t i = 1 + below(state, 8); told && i; i--)
        told = read(heard, &byte, 1) == 1;
    kill(pid, SIGKILL);
    close(heard);
    CHECK(waitpid(pid, &status, 0) == pid && told && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
          "a killed process ended by itself, with status %x", status);
}

static void on_signal(int signal) {
    (void)signal;
}

static void *fork_and_kill(void *argument) {
    uint64_t state = 300 + *(uint64_t *)argument;
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal}, NULL); /* no SA_RESTART: it ends a wait */
    while (begun < CALLERS + TAKERS + LOOPS + HOLDERS + JOINERS)
        sched_yield();
    for (; !over() || (!has_done_all() && ps_sys_now() < end + TIMEOUT); count(&forks)) {
        for (int i = 0; i < CALLERS + TAKERS; i++)
            pthread_kill(thread[i], SIGUSR1);
        int ends[2];
        CHECK(!pipe(ends), "%d", errno);
        threads_may_not_change();
        pid_t pid = fork();
        if (!pid)
            change_until_killed(holder[0], ends, state);
        threads_changed();
        CHECK(pid > 0, "%d", errno);
        close(ends[1]);
        kill_at_work(pid, ends[0], &state);
    }
    return NULL;
}

/* When nobody else is left: a stray that is alive still would go on changing pages between two looks. */
static void settle_and_compare(int strays_end) {
    char byte;
    CHECK(!read(strays_end, &byte, 1), "%d", errno);
    for (int i = 0; i < HOLDERS; i++)
        change(holder[i], 0, 1, PROT_READ);
    for (int i = 0; i < HOLDERS; i++)
        for (uint64_t page = 0; page < PAGES; page++)
            look(holder[i], page, ps_protection(holder[0], page), ps_generation(holder[0]));
}

static void crowd(int strays_end) {
    uint64_t number[JOINERS + 1], taker[TAKERS], looper[LOOPS], turns = 0;
    int made = 0;
    for (int i = 0; i < HOLDERS; i++)
        holder[i] = attach((uint64_t)i);
    for (int i = 0; i < CALLERS; i++)
        pthread_create(&thread[made++], NULL, call, &caller[i]);
    for (int i = 0; i < TAKERS; i++) {
        taker[i] = (uint64_t)i;
        pthread_create(&thread[made++], NULL, take, &taker[i]);
    }
    for (int i = 0; i < LOOPS; i++) {
        looper[i] = (uint64_t)i;
        pthread_create(&thread[made++], NULL, loop, &looper[i]);
    }
    for (int i = 0; i < HOLDERS; i++)
        pthread_create(&thread[made++], NULL, use, &holder[i]);
    for (int i = 0; i <= JOINERS; i++) {
        number[i] = (uint64_t)i;
        pthread_create(&thread[made++], NULL, i < JOINERS ? join_and_leave : fork_and_kill, &number[i]);
    }
    pthread_join(thread[--made], NULL);
    forked = true;
    while (made)
        pthread_join(thread[--made], NULL);
    settle_and_compare(strays_end);
    for (int i = 0; i < CALLERS; i++) {
        CHECK(caller[i].turns, "caller %d never came to its turn", i);
        turns += caller[i].turns;
    }
    CHECK(has_done_all(), "joins %lu, accesses %lu, forks %lu, taken %lu, freezes %lu, calls %lu, cancelled %lu", joins,
          accesses, forks, taken, freezes, calls, cancelled);
    printf("generation %lu, turns %lu, accesses %lu, taken %lu, freezes %lu, calls %lu, cancelled %lu, joins %lu, "
           "forks killed %lu",
           ps_generation(holder[0]), turns, accesses, taken, freezes, calls, cancelled, joins, forks);
    for (int i = 0; i < HOLDERS; i++)
        leave(holder[i]);
}

/* -- The strays ------------------------------------------------------------------------------------------------ */

static uint64_t strays(uint64_t seed) {
    uint64_t killed = 0;
    for (uint64_t state = seed; !over(); killed++) {
        int ends[2];
        CHECK(!pipe(ends), "%d", errno);
        pid_t pid = fork();
        if (!pid)
            change_until_killed(attach(killed), ends, below(&state, UINT32_MAX) + 1);
        CHECK(pid > 0, "%d", errno);
        close(ends[1]);
        kill_at_work(pid, ends[0], &state);
    }
    return killed;
}

int main(int argc, char **argv) {
    int status, alive[2]; /* a pipe whose writing end goes with the last stray */
    CHECK(argc == 3, "usage: stress SECONDS SEED");
    end = ps_sys_now() + (int64_t)(atof(argv[1]) * 1000) * PS_MS;
    struct ps_creation wanted = {
        .size = PAGES * PS_PAGE,
        .prot = PROT_READ | PROT_WRITE,
        .slots = 64,
        .mode = 0600,
        .page_size = PS_PAGE,
        .name = "",
    };
    int rc = ps_create(&wanted, &memory);
    CHECK(!rc, "ps_create: %d", rc);
    CHECK(!pipe(alive), "%d", errno);
    CHECK(!pthread_atfork(NULL, NULL, forget_threads), "pthread_atfork");
    pid_t pid = fork();
    if (!pid) {
        close(alive[1]);
        crowd(alive[0]);
        return 0;
    }
    uint64_t killed = strays(strtoull(argv[2], NULL, 0) + 1);
    close(alive[1]);
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status), "the crowd ended with %x",
          status);
    printf(", strays killed %lu\n", killed);
    return 0;
}
