/* rights.c - whether an access is allowed, and page tables that do not allow what the map does.
 *
 * Runs in: caller (safe accessors), signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "core.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "shared/shared.h"

#define PATIENCE (1000 * PS_MS) /* a fault waits at most so long for a change, at one generation, or for an install */

static bool in_place(const struct ps_region *region, uint64_t page) {
    uint32_t held = PS_HERE_HELD | PS_HERE_IN_PLACE;
    return (ps_here(region, page) & held) == held;
}

/* A store that the map forbids all, and a lease allows us: by window to its thread alone. */
bool ps_rights_leased(const struct ps_region *region, uint64_t page, uint32_t prot, bool store) {
    return store && prot == PROT_READ && (in_place(region, page) || ps_here_own(region, page));
}

/* At the public address. */
bool ps_rights_permit(const struct ps_region *region, uint64_t page, bool store) {
    uint32_t prot = ps_protection(region, page);
    return ps_rights_allow(prot, store) || (store && prot == PROT_READ && in_place(region, page));
}

/* 0 where the page allows it by now. */
int ps_rights_refuse(struct ps_region *region, uint64_t page, bool store, struct ps_refusal *refusal) {
    refusal->page = page;
    refusal->required = store ? PROT_WRITE : PROT_READ;
    refusal->author = ps_change_look(region, page, &refusal->actual);
    return ps_rights_allow(refusal->actual, store) || ps_rights_leased(region, page, refusal->actual, store)
               ? 0
               : PS_EREFUSED;
}

/* The map allows an access that our page tables refused: they are late, or we are fenced. */
int ps_rights_mend(struct ps_region *region, uint64_t page) {
    int rc = ps_snapshots(region) ? ps_snapshot_let(region, page, 1) : 0;
    if (!rc)
        rc = ps_pages_take(region, ps_sys_now() + PATIENCE);
    if (rc)
        return rc;
    rc = region->fenced ? -EACCES : ps_engine_mend(region, page);
    ps_pages_give(region);
    return ps_agent_help(region, rc, ps_sys_now() + PATIENCE);
}

/* Page tables refuse what the map has just allowed while they are late, or cannot follow. */
bool ps_rights_lag(const struct ps_region *region) {
    atomic_thread_fence(memory_order_acquire); /* pairs with C4: who saw the map of a change sees it open */
    return ps_change_open(region) || ps_rights_late(region) || region->failed || region->fenced;
}
