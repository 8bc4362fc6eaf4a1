/* message.c - the line on stderr that explains a death, and what is kept of a violation for later.
 *
 * Invariant: async-signal-safe; the line is one write.
 * Runs in: signal handler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include "core.h"
#include "fault/fault.h"
#include "os/os.h"
#include "pages/pages.h"
#include "process/process.h"
#include "segment/segment.h"
#include "shared/shared.h"

/* -- The copy -------------------------------------------------------------------------------------------------- */

/* For whoever looks at the region later. */
void ps_fault_record(struct ps_region *region, uint64_t offset, bool store, enum ps_policy outcome) {
    struct ps_refusal refusal;
    if (!ps_running(region) || atomic_load_explicit(&region->use, memory_order_acquire) != PS_OPEN)
        return; /* it is not mapped, or will not be in a moment */
    ps_rights_refuse(region, offset / PS_PAGE, store, &refusal);
    if (region->fenced)
        refusal.actual = PROT_NONE;
    ps_violation_keep(region, offset, &refusal, outcome);
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
    struct ps_author author = ps_change_look(region, page, &prot);
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

void ps_fault_print(struct ps_region *region, uintptr_t address, int signal, const greg_t *registers) {
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
        put(&text, signal == SIGBUS               ? "no memory for a page at an access to "
                   : ps_fault_stores(registers)   ? "forbidden store to "
                   : ps_fault_executes(registers) ? "forbidden execution in "
                                                  : "forbidden load from ");
        put_region(&text, region);
        put(&text, " at offset ");
        put_number(&text, at);
        put(&text, ": page ");
        put_number(&text, at / PS_PAGE / region->shape.unit);
        put_reason(&text, region, at / PS_PAGE);
        if (signal != SIGBUS)
            ps_fault_record(region, at, ps_fault_stores(registers), PS_DIE);
    }
    put(&text, "\n");
    say(&text);
}
