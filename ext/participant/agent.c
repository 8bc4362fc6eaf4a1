/* agent.c - the native thread that follows the map for its process.
 *
 * Lives here: starting and stopping the agent, joining, and when it follows (how:
 * pages/follow.c):
 *
 *   J1_claim  a slot is ours (slot.c)         A1_wait   sleep on the generation
 *   J2_lock   writer lock taken               A2_apply  page tables follow the map
 *   J3_apply  page tables follow the map      A3_fail   they could not: error, or fence
 *   J4_live   status LIVE; unlock             A4_ack    acknowledge
 *   L1_unmap  the data is no-access           L2_leave  status FREE (slot.c)
 *
 * Invariants
 *  1. The agent never takes the GIL, a malloc or stdio lock; all signals are
 *     blocked in it.
 *  2. Its table of descriptors is private and holds the memfd, the name's
 *     entry, the userfaultfd and its socket only: nothing that the program closes
 *     can be lost with them, and no pipe of the program stays open in it.
 * Not here: what following keeps to (pages/follow.c).
 * Runs in: agent; starting and stopping it in a caller, or in a forked child.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/file.h>
#include <unistd.h>

#include "change/change.h"
#include "core.h"
#include "os/os.h"
#include "os/point.h"
#include "pages/pages.h"
#include "participant/participant.h"
#include "process/process.h"
#include "shared/shared.h"

#define LOOK_AGAIN (2 * PS_MS)  /* while failed: does anybody still undo for us? */
#define SLICE (20 * PS_MS)      /* of the agent's own waits: does anybody still want it? */
#define ENDED (50 * PS_MS)      /* until a starter looks whether the thread was ended: it is woken otherwise */
#define PATIENCE (1000 * PS_MS) /* a signal that came while we did not sleep is not seen here */
#define YIELDS 100              /* to an agent that ends */

/* -- Joining and leaving --------------------------------------------------------------------------------------- */

static int hold_entry(struct ps_region *region) {
    if (region->entry.fd < 0 || !ps_cached_leads(region->entry.fd, &region->entry))
        return 0;
    int entry = ps_sys_reopen(region->entry.fd);
    if (ps_sys_refused(entry)) { /* the program's is held by flock too */
        region->own_entry = region->entry.fd;
        return 0;
    }
    if (entry < 0)
        return entry;
    if (flock(entry, LOCK_SH | LOCK_NB)) { /* somebody clears it away as stale: it does not lead to us any more */
        close(entry);
        return 0;
    }
    region->own_entry = entry;
    return 0;
}

/* Its number, which the new thread has too, as long as it shares the program's table. */
static int copy_of(const struct ps_cached *cached) {
    int fd = atomic_load_explicit(&cached->fd, memory_order_relaxed);
    return ps_cached_leads(fd, cached) ? fd : -1;
}

static int own_descriptors(struct ps_region *region) {
    int entry = copy_of(&region->entry), memory = copy_of(&region->memory);
    region->tid = ps_sys_gettid();
    region->own_userfault = copy_of(&region->userfault); /* a predecessor's */
    region->own_entry = region->own_socket = -1;
    if (memory < 0)
        return -EBADF;
    int rc = ps_sys_private_table((int[]){memory, entry, region->own_userfault}, 3);
    if (rc)
        return rc;
    region->own = ps_sys_reopen(memory);
    region->shares = ps_sys_refused(region->own);
    if (region->shares)
        region->own = memory;
    rc = region->own < 0 ? region->own : hold_entry(region);
    /* The copies of the program's own numbers go; what we opened stays. */
    if (!rc)
        rc = ps_sys_private_table((int[]){region->own, region->own_entry, region->own_userfault}, 3);
    return rc;
}

/* What callers outside need to change our page tables. */
static int offer(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    uintptr_t canary = (uintptr_t)ps_address(region) - PS_GUARD;
    uint32_t name = 0;
    atomic_store_explicit(&slot->canary, canary, memory_order_relaxed); /* says where the data are, by uffd or not */
    int rc = region->uffd ? ps_engine_try(region) : 0;
    if (!rc && region->uffd)
        rc = ps_borrow_offer(region, &name);
    if (rc && region->engine == PS_ENGINE_AUTO) { /* a filter that lets part of it pass, or an emulation */
        close(region->own_userfault);
        region->own_userfault = -1;
        region->uffd = false;
        rc = 0;
    }
    if (rc || !region->uffd)
        return rc;
    atomic_store_explicit(&slot->uffd, (uint32_t)region->own_userfault, memory_order_relaxed);
    atomic_store_explicit(&slot->socket, name, memory_order_relaxed);
    /* release: whoever finds it (acquire) finds the others.  Of a successor, once it follows the whole map. */
    if (!region->unsynced)
        atomic_store_explicit(&slot->capabilities, PS_CAN_UFFD, memory_order_release);
    return 0;
}

static int mark_death(struct ps_region *region) {
    struct ps_shm_slot *slot = ps_slot(region, region->slot);
    atomic_store_explicit(&slot->tid, (uint32_t)region->tid, memory_order_relaxed);
    /* release: from here on we may hold locks, and whoever finds us holding one finds a word that the kernel marks. */
    atomic_store_explicit(&slot->live, (uint32_t)region->tid | FUTEX_WAITERS, memory_order_release);
    return ps_sys_mark_death(&region->robust, &slot->live);
}

static int join_locked(struct ps_region *region) {
    PS_POINT(J2_lock);
    int rc = ps_follow_all(region);
    if (!rc && !ps_slot_live(region))
        rc = -EAGAIN;
    if (!rc) {
        PS_POINT(J4_live);
    } else {
        ps_engine_fence(region); /* before the lock goes: nobody waits for us, so we must not keep what we have */
    }
    ps_unlock(region);
    return rc;
}

static bool is_wanted(const struct ps_region *region) {
    return atomic_load_explicit(&region->agent, memory_order_relaxed) == PS_AGENT_STARTING;
}

/* In slices: whoever called for us may have been interrupted. */
static int lock(struct ps_region *region) {
    for (;;) {
        int64_t slice = ps_sys_now() + SLICE, end = region->join_deadline;
        uint32_t owner;
        int rc = ps_lock(region, slice < end ? slice : end, &owner);
        if (rc != -ETIMEDOUT)
            return rc;
        if (slice >= end || !is_wanted(region)) {
            region->blocker = ps_owner_pid(region, owner);
            return rc;
        }
    }
}

static int join_slot(struct ps_region *region) {
    int rc = mark_death(region);
    if (!rc)
        rc = ps_region_map_data(region, region->own);
    if (!rc)
        rc = ps_engine_open(region);
    if (!rc && region->uffd)
        rc = ps_region_map_canary(region, region->own);
    if (!rc)
        rc = offer(region);
    if (!rc)
        rc = lock(region);
    return rc ? rc : join_locked(region);
}

/* Access ends, then the slot.  The mapping of the control segment still keeps the slot's byte: ps_region_reserve takes
 * that away.  Under the page lock: a thread may end a quarantine just now. */
static void end_access(struct ps_region *region) {
    ps_region_unmap_data(region);
    ps_quarantine_forget(region);
    PS_POINT(L1_unmap);
    ps_slot_leave(region);
}

/* As before the join.  Under the page lock. */
static void undo_join(struct ps_region *region) {
    if (region->epoch)
        end_access(region);
    ps_engine_close(region);
    ps_region_reserve(region);
}

static void leave(struct ps_region *region) {
    if (region->epoch) {
        ps_name_write_row(region, false);
        ps_page_lock(region, PS_NEVER);
        end_access(region);
        ps_page_unlock(region);
        ps_sys_mark_nothing(&region->robust);
    }
    ps_engine_close(region);
    close(region->own);
    if (region->own_entry >= 0)
        close(region->own_entry);
    if (region->own_userfault >= 0)
        close(region->own_userfault);
    if (region->own_socket >= 0)
        close(region->own_socket);
}

/* Our predecessor was lost; its slot, the OFD lock (by the mapping) and the mapping itself are still ours. */
static int succeed(struct ps_region *region) {
    int rc = ps_page_lock(region, region->join_deadline);
    if (rc)
        return rc;
    bool before = region->uffd;
    region->unsynced = true;
    if (before && region->own_userfault < 0) { /* and its userfaultfd with it */
        atomic_store_explicit(&ps_slot(region, region->slot)->capabilities, 0, memory_order_release);
        rc = ps_engine_forget(region);
        if (!rc)
            rc = ps_engine_open(region);
    }
    if (!rc)
        rc = offer(region);
    if (!rc && before && !region->uffd) /* by mprotect from now on: nothing may stay marked */
        rc = ps_engine_forget(region);
    ps_page_unlock(region);
    return rc ? rc : mark_death(region);
}

static int join(struct ps_region *region) {
    int rc = own_descriptors(region);
    if (rc && region->epoch && region->uffd && region->own_userfault < 0)
        ps_engine_fence(region); /* the predecessor is gone, and nobody will follow any more */
    if (rc)
        return rc;
    if (region->epoch)
        return succeed(region);
    rc = ps_region_map_control(region, region->own);
    if (!rc)
        rc = ps_slot_claim(region, region->own);
    if (!rc)
        rc = join_slot(region);
    if (rc) {
        leave(region);
        ps_page_lock(region, PS_NEVER);
        undo_join(region);
        ps_page_unlock(region);
    }
    return rc;
}

/* -- The thread ------------------------------------------------------------------------------------------------ */

static void follow_for_ever(struct ps_region *region) {
    _Atomic uint64_t *word = &ps_header(region)->generation;
    _Atomic uint32_t *low = (_Atomic uint32_t *)(void *)word;
    uint32_t bit = ps_slot_bit(region->slot);
    while (ps_running(region)) {
        /* acquire: pairs with C5 and U3: the map and the ring entry are those of this generation, or newer. */
        uint64_t generation = atomic_load_explicit(word, memory_order_acquire);
        ps_borrow_answer(region);
        ps_name_answer(region);
        ps_fault_install(); /* before access ends: faulthandler may have come above us, or taken us away with itself */
        if (ps_agent_follow(region, generation, ps_sys_now() + SLICE))
            continue; /* another process is stopped with our claim: a stopper of ours does not wait for that */
        ps_agent_settle(region, ps_sys_now() + SLICE);
        ps_waited(0);
        PS_POINT(A1_wait);
        ps_sys_wait((struct ps_watch){low, (uint32_t)generation}, bit,
                    region->failed ? ps_sys_now() + LOOK_AGAIN : PS_NEVER);
    }
}

/* release: whoever finds the new state (acquire) finds join_result, and everything that was done before. */
static bool pass(struct ps_region *region, uint32_t from, enum ps_agent_state to) {
    bool passed =
        atomic_compare_exchange_strong_explicit(&region->agent, &from, to, memory_order_acq_rel, memory_order_relaxed);
    if (passed)
        ps_sys_wake(&region->agent, INT32_MAX, FUTEX_BITSET_MATCH_ANY);
    return passed;
}

static void *agent_main(void *argument) {
    struct ps_region *region = argument;
    ps_process_become_agent(region);
    ps_sys_normal_priority();
    region->join_result = join(region);
    if (!region->join_result) {
        ps_name_write_row(region, true);
        pass(region, PS_AGENT_STARTING, PS_AGENT_RUNNING); /* or it is STOPPING by now */
        follow_for_ever(region);
        leave(region);
    }
    if (!pass(region, PS_AGENT_STARTING, PS_AGENT_NONE))
        pass(region, PS_AGENT_STOPPING, PS_AGENT_NONE);
    return NULL; /* the private table closes with the thread: own, and with it the OFD lock */
}

/* There is no such thread any more, however it ended.  Under the page lock: it is asked once for each. */
static bool is_gone(struct ps_region *region) {
    if (region->threaded && ps_process_ended(region->thread))
        region->threaded = false;
    return !region->threaded;
}

/* One of the threads that find it missing, or lost, starts it.  Under the page lock, lest another one start its
 * successor too, and two follow one map. */
static int start_missing(struct ps_region *region, int64_t deadline) {
    int rc = ps_page_lock(region, deadline);
    if (rc)
        return rc;
    uint32_t seen = atomic_load_explicit(&region->agent, memory_order_acquire);
    while (seen == PS_AGENT_NONE && !is_gone(region)) /* it has nothing more to do than to end */
        ps_sys_pause();
    if (seen == PS_AGENT_NONE || (seen == PS_AGENT_RUNNING && is_gone(region))) {
        region->join_deadline = deadline;
        region->blocker = (uint32_t)getpid(); /* until it knows better */
        region->succeeds = region->epoch;
        atomic_store_explicit(&region->agent, PS_AGENT_STARTING, memory_order_relaxed);
        rc = ps_process_spawn(agent_main, region, &region->thread);
        region->threaded = !rc;
        if (rc)
            pass(region, PS_AGENT_STARTING, PS_AGENT_NONE);
    }
    ps_page_unlock(region);
    return rc;
}

/* Was the thread ended while it started?  A seccomp filter can do that.  What a joiner had so far goes; a successor had
 * it from its predecessor, and leaves it to the next. */
static void notice_end(struct ps_region *region) {
    if (ps_page_lock(region, ps_sys_now() + PS_BACKSTOP))
        return;
    if (is_wanted(region) && is_gone(region)) {
        region->join_result = -EOWNERDEAD;
        if (!region->succeeds)
            undo_join(region);
        pass(region, PS_AGENT_STARTING, PS_AGENT_NONE);
    }
    ps_page_unlock(region);
}

/* The agent bounds itself by join_deadline.  PS_ESIGNAL: it goes on, and whoever calls may come again. */
static int await_start(struct ps_region *region) {
    int64_t end = ps_sys_now() + PATIENCE;
    uint32_t seen;
    while ((seen = atomic_load_explicit(&region->agent, memory_order_acquire)) == PS_AGENT_STARTING) {
        int64_t now = ps_sys_now();
        int rc = ps_sleep((struct ps_watch){&region->agent, seen}, now + ENDED);
        if (rc == -EINTR || now >= end)
            return PS_ESIGNAL;
        if (rc == -ETIMEDOUT)
            notice_end(region);
    }
    return seen == PS_AGENT_RUNNING ? 0 : seen == PS_AGENT_NONE ? region->join_result : PS_ECLOSED;
}

int ps_agent_start(struct ps_region *region, int64_t deadline, struct ps_outcome *outcome) {
    int rc = start_missing(region, deadline);
    if (!rc)
        rc = await_start(region);
    outcome->generation = outcome->silent = 0;
    if (rc != -ETIMEDOUT)
        return rc;
    outcome->pids[outcome->silent++] = region->blocker;
    return PS_ETIMEOUT;
}

/* It ended, though nobody asked it to.  The word in the slot is a hint that anybody can write, but two agents at once
 * would pull the mapping from under each other.  The kernel marks it shortly before the thread is gone. */
bool ps_agent_lost(struct ps_region *region) {
    bool gone = false;
    for (int look = 0; !gone && !ps_slot_marked(region) && look < 10; look++) {
        if (look)
            ps_sys_pause();
        if (ps_page_lock(region, ps_sys_now() + PS_BACKSTOP))
            continue;
        gone = is_gone(region);
        ps_page_unlock(region);
    }
    return gone;
}

static void await_end(struct ps_region *region) {
    ps_page_lock(region, PS_NEVER);
    for (int yields = 0; !is_gone(region);) {
        uint32_t seen = atomic_load_explicit(&region->agent, memory_order_acquire);
        ps_page_unlock(region);
        if (seen != PS_AGENT_NONE) {
            ps_agent_wake(region);
            ps_sys_wait((struct ps_watch){&region->agent, seen}, FUTEX_BITSET_MATCH_ANY, ps_sys_now() + PS_MS);
        } else if (yields++ < YIELDS) {
            ps_sys_yield(); /* it has nothing more to do than to end, for which it may want our processor ... */
        } else {
            ps_sys_pause(); /* ... which a thread of real-time priority does not yield to it */
        }
        ps_page_lock(region, PS_NEVER);
    }
}

void ps_agent_stop(struct ps_region *region) {
    if (!pass(region, PS_AGENT_STARTING, PS_AGENT_STOPPING))
        pass(region, PS_AGENT_RUNNING, PS_AGENT_STOPPING);
    await_end(region);
    if (region->epoch) /* it was ended alone */
        end_access(region);
    ps_quarantine_forget(region);
    ps_engine_close(region);
    ps_region_reserve(region);
    atomic_store_explicit(&region->agent, PS_AGENT_NONE, memory_order_relaxed);
    ps_page_unlock(region);
}
