/* access.c - read and write that never crash; where a system call may store.
 *
 * Runs in: caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "change/change.h"
#include "core.h"
#include "fault/fault.h"
#include "hold/hold.h"
#include "operations/operations.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define PIECE 8192u             /* pages that are brought in at once */
#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for a change, at one generation, or for an install */
#define FAULTS 100000           /* of one copy: a page whose protection changes all the time is refused at last */
#define MARKS 100               /* ... of them SIGBUS, whose other meaning is that no memory is left */

/* -- The address range --------------------------------------------------------------------------------------- */

/* A page is locked as soon as it is mapped in a locked mapping (mlock2(2), MLOCK_ONFAULT): those that the memfd has,
 * where they may be read.  What cannot be had now is locked when it is touched. */
int ps_bring_in(struct ps_region *region, uint64_t *page) {
    uint64_t end = region->shape.pages, count = end - *page;
    uint32_t prot;
    if (!(region->shape.flags & PS_REGION_LOCK) || ps_has_huge_pages(region) || *page >= end)
        return 0;
    int rc = region->shape.flags & PS_REGION_RESERVED ? 0 : ps_data(region, page, &count); /* what there is: all */
    if (rc || !count)
        return rc;
    uint64_t run = ps_run(region, *page, *page + (count < PIECE ? count : PIECE), &prot);
    if (prot & (PROT_READ | PROT_WRITE))
        madvise((char *)ps_address(region) + *page * PS_PAGE, run * PS_PAGE, MADV_POPULATE_READ);
    *page += run;
    return 1;
}

/* -- The copy -------------------------------------------------------------------------------------------------- */

/* The first page of a range where neither the map nor a lease allows the access, or the page past it. */
static uint64_t allowed_up_to(struct ps_region *region, uint64_t page, uint64_t end, bool store, uint32_t *prot) {
    while (page < end) {
        uint64_t run = ps_run(region, page, end, prot);
        if (ps_rights_allow(*prot, store))
            page += run;
        else if (ps_rights_leased(region, page, *prot, store))
            page++;
        else
            return page;
    }
    return end;
}

/* The map allows it, but this process could not follow the map there. */
static int unreachable(struct ps_region *region, uint64_t page, bool store, struct ps_refusal *refusal) {
    ps_rights_refuse(region, page, store, refusal);
    refusal->actual = PROT_NONE;
    return PS_EREFUSED;
}

/* SIGBUS: no memory for the page; or, at a store by the uffd engine, a mark, which is late or just made. */
static bool may_be_mark(const struct ps_region *region, bool store, uint32_t *marks) {
    return store && region->uffd && (*marks)++ < MARKS;
}

static bool by_window(const struct ps_region *region, uint64_t page) {
    return ps_here_own(region, page) && !(ps_here(region, page) & PS_HERE_IN_PLACE) &&
           !ps_rights_allow(ps_protection(region, page), true);
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
            if (ps_rights_refuse(region, page, store, refusal) && !ps_freeze_notice(region, PATIENCE))
                return PS_EREFUSED;
            continue;
        }
        /* A copy that faults must fault into our handler, not into a faulthandler that was enabled on top of it;
         * whoever takes rights away from now on installs ours first. */
        if (ps_rights_lag(region))
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
        if (faults == FAULTS || ps_rights_mend(region, at / PS_PAGE))
            return unreachable(region, at / PS_PAGE, store, refusal);
    }
    return 0;
}

static int copy(struct ps_region *region, uint64_t offset, char *other, uint64_t length, bool store,
                struct ps_refusal *refusal) {
    sigset_t blocked;
    struct ps_patience before = *ps_process_patience(); /* of a call whose wait a signal's handler has interrupted */
    ps_fault_unblock(ps_rights_lag(region) || ps_snapshots(region), &blocked);
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
        refusal->author = ps_change_look(region, page, &refusal->actual);
        if (ps_policy(region) != PS_WAIT || ps_freeze_own(region) || ps_sys_now() >= deadline)
            return ps_waited(PS_EREFUSED);
        if (ps_sys_now() >= until.at || ps_fault_sleep_on_map(region) == -EINTR)
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
