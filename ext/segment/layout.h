/* layout.h - the control segment: everything that participants share.
 *
 * Lives here: the structs that lie in the memfd before the data, their sizes,
 * and the contract of every field.  No functions.
 *
 * Invariants
 *  1. Fixed width, no pointers, no glibc objects: a peer that scribbles here
 *     can lie to us, it cannot aim a store of ours.
 *  2. Words that different parties write in a hurry lie on lines of their own.
 *  3. A section that no page has touched is a hole of the memfd: all zero
 *     means "as created", and costs nothing.
 *
 * How to read a contract
 *  W: who writes, under which lock, with which order.
 *  R: who reads, with which order, and the store it pairs with.
 *  Crash: what a reader may find after the writer was killed.
 * "Owner" is the participant that holds the OFD lock on its slot's byte.
 * "Caller" is the participant that holds the writer lock.  "Creator" writes
 * before the fd is known to anybody else, so without order.
 */
#ifndef PS_LAYOUT_H
#define PS_LAYOUT_H

#include <assert.h>
#include <stdint.h>

#define PS_MAGIC 0x0065726168737970u /* "pyshare\0", little endian */
#define PS_VERSION 5u

#define PS_NAME_MAX 200   /* characters of a region's name */
#define PS_SLOTS_MAX 2047 /* slot + 1 fits 11 bits of an owner word */
#define PS_RING 1024      /* latest changes; a power of two */
#define PS_SECTIONS 16
#define PS_LINE 64
#define PS_LOCKS 1024   /* user locks of a region */
#define PS_SNAPSHOTS 8u /* at the same time; fewer where so many areas do not fit into an address range */
#define PS_SNAPSHOT_BYTE                                                                                               \
    (UINT64_C(1) << 62)   /* of the memfd, behind all of it: + k is locked (OFD) by who has snapshot k */
#define PS_VIOLATIONS 16u /* the latest forbidden accesses that are kept */
#define PS_COMMAND 80     /* bytes of a process's command line, as they have it, with a NUL */
#define PS_CLOSERS 64u    /* changes that wait for leases at the same time; one bit each in a mask */
#define PS_TICKETS 32u    /* leases that gave way to changes, and go before the next ones; likewise */

/* An owner word names a participant for ever (until its slot's epoch wraps,
 * after 2^20 joins of one slot): WAITING | epoch | slot + 1.  0: nobody. */
#define PS_OWNER_WAITING 0x80000000u
#define PS_OWNER_SLOT_BITS 11
#define PS_OWNER_SLOT_MASK ((1u << PS_OWNER_SLOT_BITS) - 1)
#define PS_EPOCH_BITS 20
#define PS_EPOCH_MASK ((1u << PS_EPOCH_BITS) - 1)

/* A status word: epoch | BARE | state, so that one load tells all. */
enum ps_state {
    PS_FREE = 0,    /* nobody, or left */
    PS_JOINING = 1, /* claimed; has no access yet, nobody waits for it */
    PS_LIVE = 2,    /* a participant: every change waits for it */
    PS_DEAD = 3,    /* found dead by somebody; nobody waits for it any more */
};
#define PS_STATE_BITS 4
#define PS_STATE_MASK 7u
/* With JOINING and LIVE: the owner has not got its byte locked (slot.c), so that a free byte says nothing of it. */
#define PS_STATE_BARE 8u

/* An acknowledgement word: WAITING | the low 31 bits of a generation. */
#define PS_ACK_WAITING 0x80000000u
#define PS_ACK_MASK 0x7fffffffu

enum ps_kind {
    PS_SET = 0,    /* the map becomes `prot` in the range */
    PS_UNDO = 1,   /* it becomes what it was: somebody could not apply the change */
    PS_THAW = 2,   /* it becomes what it was before a freeze; never undone */
    PS_FOLLOW = 3, /* it stays: page tables follow it again in the range, because snapshots began or ended */
};

/* In the ring, beside the kind: what is written after that generation may have been written as before the change, by
 * who did not follow it yet. */
#define PS_EARLY 256u

/* Whose page tables follow at a PS_FOLLOW; in the place of its protection. */
enum ps_follow {
    PS_FOLLOW_NOTHING = 8, /* the generation alone is wanted; nobody is waited for */
    PS_FOLLOW_ALL = 9,     /* every page: a snapshot begins */
    PS_FOLLOW_DIRTY = 10,  /* pages that have the state `how >> PS_FOLLOW_SHIFT` in a snapshot that begins */
    PS_FOLLOW_OPEN = 11,   /* every page, where it can be done, sooner or later: snapshots ended */
};
#define PS_FOLLOW_SHIFT 8
#define PS_FOLLOWS 8u /* none of the bits of a protection: tells also what an UNDO is of */

/* What happens at a forbidden access. */
enum ps_policy { PS_DIE = 0, PS_RAISE = 1, PS_WAIT = 2 };

/* What a participant can do; tells callers which way a change may go. */
#define PS_CAN_UFFD 0x1u /* its mapping follows by userfaultfd; it can be changed from outside */
#define PS_CAN_RWP 0x2u  /* ... including no-access (Linux 7.2) */

#define PS_SLOT_FENCED 0x1u /* its whole mapping is no-access until it re-syncs */

/* What each participant does with its mappings of the data. */
#define PS_REGION_THP 0x1u  /* asks for transparent huge pages */
#define PS_REGION_LOCK 0x2u /* locks them into memory */
/* ... and of the memfd: */
#define PS_REGION_RESERVED 0x4u /* control segment and data were allocated at creation; nobody gives a page back */

enum ps_section_kind {
    PS_SEC_END = 0,
    PS_SEC_SLOTS = 1,      /* ps_shm_slot[slots] */
    PS_SEC_RING = 2,       /* ps_shm_ring[PS_RING] */
    PS_SEC_CUR = 3,        /* one byte a page: protection ^ initial protection */
    PS_SEC_OLD = 4,        /* the same, frozen while the record is open */
    PS_SEC_LEASE = 5,      /* one held word (below) a page */
    PS_SEC_LOCK = 6,       /* struct ps_shm_lock[PS_LOCKS] */
    PS_SEC_KEPT = 7,       /* one byte a page: as CUR, what it was before the freeze that is in force */
    PS_SEC_STATE = 8,      /* per snapshot area one byte a page (enum ps_saved), each area's from a page boundary on */
    PS_SEC_STAMP = 9,      /* one word a page: the generation at which it was last known to be written */
    PS_SEC_VIOLATION = 10, /* struct ps_shm_violation[PS_VIOLATIONS] */
    PS_SEC_LAST = PS_SEC_VIOLATION,
};

/* A snapshot's word: serial << PS_SNAPSHOT_BITS | one of these. */
enum ps_snapshot_state {
    PS_SNAPSHOT_FREE = 0,
    PS_SNAPSHOT_PREPARING = 1, /* pages are being protected; stores make them PS_DIRTY */
    PS_SNAPSHOT_ACTIVE = 2,    /* its moment has come: who stores saves first */
    PS_SNAPSHOT_COMPLETE = 3,  /* it needs nothing of the region's data any more */
    PS_SNAPSHOT_EMPTY = 4,     /* nobody has it, and its area and its states are holes */
    PS_SNAPSHOT_AGAIN = 5,     /* PREPARING once more, what became dirty meanwhile; + 1 for each further round */
};
#define PS_SNAPSHOT_ROUNDS 4u   /* of them */
#define PS_NO_MOMENT UINT64_MAX /* a snapshot's generation: it was given up before its moment */
#define PS_SNAPSHOT_BITS 4
#define PS_SNAPSHOT_MASK ((1u << PS_SNAPSHOT_BITS) - 1)

/* A byte of PS_SEC_STATE.
 * W: whoever stores, by CAS to the DIRTY of the round, seq_cst, while PREPARING; whoever saves, to SAVED, release,
 * after the copy; never back, until the area is used again.  R: anybody, acquire: pairs with SAVED: the area has the
 * page. Crash: not SAVED: the page in the region is still the snapshot's. */
enum ps_saved { PS_UNSAVED = 0, PS_DIRTY = 1, PS_SAVED = 2, PS_DIRTY_AGAIN = 3 /* + 1 for each further round */ };

/* A copy-on-write image of the data at one moment.  Page p of area k, behind the data in the memfd, is its page p where
 * the state says so; else the data's is. */
struct ps_shm_snapshot {
    /* W: snapshotter at S1, S2 and S4, under the writer lock; who has all of it saved, by CAS ACTIVE -> COMPLETE; who
     * finds that nobody holds its lock byte, or no memory to save a page, by CAS to FREE; all seq_cst.  R: anybody,
     * acquire; who has made a page DIRTY, seq_cst after that.  Crash: PREPARING or ACTIVE without a holder of its byte:
     * freed by the next. */
    _Atomic uint32_t word;
    /* W: whoever makes a page DIRTY, + 1, seq_cst, before the state; 0 before each round.  R: snapshotter, seq_cst
     * after the word that ends the round: 0: no page tables were opened in it.  Crash: too high: some follow for
     * nothing. */
    _Atomic uint32_t dirty;
    /* W: snapshotter: 0 at S1; at S4, when all page tables follow, that of its moment, by CAS from 0, release; who
     * gives it up, since it waits to store and that moment does not come, by CAS from 0 to PS_NO_MOMENT: so one word
     * says which it was.  R: anybody, acquire: 0: the moment has not come, nobody stores yet.  Crash: as the word. */
    _Atomic uint64_t generation;
};

/* What keeps leases from its pages, and whom it lets pass (closer.c). */
enum ps_closer_kind {
    PS_CLOSER_SHUT = 0, /* a change of pages that nobody has leased: nobody */
    PS_CLOSER_WAITS =
        1, /* a change that waits for leases in its range: whoever has one there, at last whoever has any */
    PS_CLOSER_FREEZE = 2,   /* a freeze, of all pages, by counts: whoever has a lease, so nobody once it is frozen */
    PS_CLOSER_SNAPSHOT = 3, /* a snapshot: likewise */
};

/* A held word says who has a page leased, or a lock: two owner words.
 * Low half: the holder, 0 for nobody; its WAITING: somebody sleeps on that half.
 * High half: next, a waiter that slept and lost, or had the word already and waits for another page of its lease:
 * nobody else takes the word before it does, unless it does not come; its WAITING: it sleeps on that half. W: taker by
 * CAS from a free word, a dead holder's, one reserved for it, or one that was reserved and free for so long that it
 * gives up on whoever is `next`; seq_cst (a lease-taker then looks at the closers); waiters set WAITING and `next` by
 * CAS; the holder clears its half at the end, seq_cst, or puts the dead holder's back, where nobody was told of what it
 * had taken over; then it may set `next`, if there is none. R: anybody, acquire.  Crash: names a dead owner: taken
 * over, and the next holder is told. */
#define PS_HELD_HOLDER UINT64_C(0xffffffff)
#define PS_HELD_WAITING UINT64_C(0x80000000)
#define PS_HELD_NEXT_SHIFT 32
#define PS_HELD_NEXT_WAITING (PS_HELD_WAITING << PS_HELD_NEXT_SHIFT)

struct ps_shm_lock {
    _Atomic uint64_t held; /* W: as a held word.  R: as a held word */
    /* W: the holder, relaxed, when it has taken the word; CLOCK_MONOTONIC_COARSE ns.  R: for information, with `held`
     * the same before and after.  Crash: an earlier holder's. */
    _Atomic uint64_t since;
    uint64_t pad[6]; /* W: nobody.  R: nobody */
};

/* One of the latest forbidden accesses; number n lies at n % PS_VIOLATIONS.  Whoever made it writes all of the entry,
 * in a signal handler and in no order, and may be killed, stopped, or overtaken by the one that comes PS_VIOLATIONS
 * later: so whatever a reader finds is an entry only where `check` is what follows from the rest. */
struct ps_shm_violation {
    uint64_t check;      /* W: whoever made the access, at once with the rest.  R: anybody; compared.  Crash: wrong */
    uint64_t number;     /* W: as check; from the header's `violations`.  R: anybody; compared */
    uint64_t time;       /* W: as check; CLOCK_REALTIME ns.  R: anybody */
    uint64_t offset;     /* W: as check; byte of the data.  R: anybody; checked */
    uint64_t generation; /* W: as check; the change that forbids it, where that is known.  R: anybody */
    uint32_t pid;        /* W: as check; in its own pid namespace.  R: anybody */
    uint8_t prot;        /* W: as check; of the page.  R: anybody; masked */
    uint8_t outcome;     /* W: as check; enum ps_policy: the process was about to die, the thread was to be told, or
                            began to wait.  R: anybody; checked */
    uint8_t known;       /* W: as check; 0: `generation` means nothing, the change is too long ago.  R: anybody */
    uint8_t pad;         /* W: nobody.  R: nobody */
    char command[PS_COMMAND]; /* W: as check; NUL terminated.  R: anybody; cut */
};

/* A change that is going to take place, or does: nobody takes a lease on its pages. */
struct ps_shm_closer {
    /* W: caller of a change by CAS 0 -> its owner word, before it looks at lease words; 0 at its end, release,
     * and wakes who sleeps on it (WAITING).  Anybody who finds the owner gone makes the entry its own by CAS, finishes
     * the change, and clears it.
     * R: lease-takers, acquire.  Crash: names a dead owner. */
    _Atomic uint32_t owner;
    /* enum ps_closer_kind. W: as first; then, of a change, owner, PS_CLOSER_WAITS before it waits for a holder, and
     * PS_CLOSER_SHUT before it looks at all words again; seq_cst.  R: lease-takers, seq_cst after their words and their
     * count.  Crash: as it was. */
    _Atomic uint32_t kind;
    _Atomic uint64_t first; /* W: owner, before its bit in `closers`.  R: lease-takers, relaxed; clipped */
    _Atomic uint64_t count; /* W: as first.  R: as first */
};

/* A lease that had to give way to a closer: those that come later let it go first. */
struct ps_shm_ticket {
    /* W: lease-taker by CAS 0, or a dead owner's word, -> its owner word; 0 when it has its words, or gives up, by CAS,
     * and wakes who sleeps on it (WAITING); 0 by CAS too by whoever has waited for it in vain.  R: whoever is about to
     * publish a closer, acquire.  Crash: names a dead owner. */
    _Atomic uint32_t owner;
    _Atomic uint32_t serial; /* W: lease-taker, relaxed, + 1 for each ticket in this place.  R: as owner; compared */
    _Atomic uint64_t first;  /* W: lease-taker, before its bit in `tickets`.  R: as owner, relaxed; clipped */
    _Atomic uint64_t count;  /* W: as first.  R: as first */
};

struct ps_shm_section {
    uint32_t kind;   /* W: creator.  R: once, at attach.  enum ps_section_kind */
    uint32_t pad;    /* W: nobody.  R: nobody */
    uint64_t offset; /* W: creator.  R: once, at attach; checked against the control segment */
    uint64_t length; /* W: creator.  R: once, at attach; checked against pages and slots */
};

/* The record: the one open change, written so that anybody can finish it.
 * Open means complete < attempt.  `attempt` is stored last when a change
 * begins, so whoever sees it open (acquire) sees its arguments (release). */
struct ps_shm_record {
    /* W: caller at C3, release, and a release fence before C4.  R: caller, acquire (pairs with C3 of a dead caller);
     * agents, acquire, as a hint; fault handlers, acquire, after an acquire fence behind a look at the map (pairs with
     * C4: whoever saw the map of a change sees its attempt).  Crash: names a change whose arguments are whole. */
    _Atomic uint64_t attempt;
    /* W: caller at C7 (:= attempt) or U5 (:= attempt + 1), seq_cst.  R: caller and fault handlers, acquire; an agent
     * that failed, seq_cst after its acknowledgement (pairs with C7 of a caller that gave up on it).
     * Crash: below attempt, so the next caller re-executes. */
    _Atomic uint64_t complete;
    /* W: caller at C2 (relaxed, published by C3) and U1 (release).  R: caller, acquire.
     * Crash: either kind is right: both re-executions are idempotent because `old` is frozen. */
    _Atomic uint32_t kind;
    _Atomic uint32_t
        prot; /* W: caller at C2, relaxed, published by C3; of FOLLOW enum ps_follow.  R: who finishes it */
    _Atomic uint64_t first;  /* W: as prot.  R: as prot; checked against pages */
    _Atomic uint64_t count;  /* W: as prot.  R: as prot; checked against pages */
    _Atomic uint32_t author; /* W: as prot; pid of the author, in its pid namespace.  R: as prot */
    uint32_t pad0;           /* W: nobody.  R: nobody */
    _Atomic uint64_t time;   /* W: as prot; CLOCK_BOOTTIME ns at which the author began.  R: as prot */
    _Atomic uint64_t back;   /* W: as prot; of a thaw the generation before the freeze.  R: as prot */
};

/* Which change set what, for agents that catch up and for error messages.
 * Entry g lies at g % PS_RING.  The writer zeroes `generation`, writes the
 * rest, stores `generation` (release): a reader that finds g before (acquire)
 * and after its copy has a whole entry, else it takes the whole map. */
struct ps_shm_ring {
    _Atomic uint64_t generation; /* W: caller at C5 / U3, release.  R: anybody, acquire, twice */
    _Atomic uint64_t first;      /* W: caller at C5 / U3, relaxed.  R: anybody; checked against pages */
    _Atomic uint64_t count;      /* W: as first.  R: as first */
    _Atomic uint64_t time;       /* W: as first; CLOCK_BOOTTIME ns.  R: anybody */
    _Atomic uint32_t prot;       /* W: as first; for UNDO the protection that was refused.  R: anybody */
    _Atomic uint32_t author;     /* W: as first; pid of the author.  R: anybody */
    /* enum ps_kind.  W: as first; who was told of the generation before the change was over adds PS_EARLY, relaxed.
     * R: anybody; an agent that fails at UNDO or THAW fences itself.  Crash: EARLY may be lost with who was told. */
    _Atomic uint32_t kind;
    _Atomic uint32_t
        slowest; /* W: caller, before `done`; pid of whom it waited for last, 0: nobody.  R: for information */
    _Atomic uint64_t done; /* W: caller at C7 / U5, release; CLOCK_BOOTTIME ns, 0 before.  R: for information */
    _Atomic uint64_t back; /* W: as first; of a THAW the generation before the freeze, else 0.  R: anybody; checked */
};

struct ps_shm_slot {
    /* Line 0: the acknowledgement, exchanged by the owner, watched by the caller. */
    /* W: owner, seq_cst exchange after its apply (clears WAITING); caller sets WAITING by CAS.
     * R: caller, acquire (pairs with the exchange: what was applied before it, is).
     * One word on purpose: with the flag in a second word wake-ups are lost without full fences.
     * Crash: stale; the caller finds the owner dead. */
    _Atomic uint32_t ack;
    /* Who may change this participant's page tables to follow the map: 0 or an owner word.
     * W: by CAS 0 -> its own word: the owner of the slot under its private page lock, or a remote caller; a remote
     * caller's word by another one (it holds the writer lock, so the former is dead), and by the owner of the slot once
     * the claimant is gone.  Released by a store of 0, release.  R: those, acquire: pairs with the release:
     * `applied` and the page tables are those that the last claimant left. Crash: of a remote caller: the participant
     * stands where `applied` says; following again is idempotent. */
    _Atomic uint32_t claim;
    uint32_t pad0[2]; /* W: nobody.  R: nobody */
    /* W: owner at A3, before its acknowledgement: low 31 bits of the generation << 32 | errno; 0 after a
     * success.  R: caller after the acknowledgement (acquire on ack orders it).  Crash: ignored. */
    _Atomic uint64_t error;
    /* W: under the claim, relaxed, before ack (a remote caller: after it).  R: under the claim; caller, relaxed, after
     * its acquire of ack, of which it has all bits; else for information.  Crash: of a remote caller: behind ack. */
    _Atomic uint64_t applied;
    uint64_t pad1[4]; /* W: nobody.  R: nobody */

    /* Line 1: is the owner alive? */
    /* W: owner's agent: TID | FUTEX_WAITERS, release, before it takes any lock; the kernel ORs OWNER_DIED in
     * when that thread ends, and wakes one waiter.  R: anybody, acquire.
     * OWNER_DIED only wakes: death is decided by ps_slot_dead. */
    _Atomic uint32_t live;
    /* W: owner at J1, J4 and L2, release; anybody who found the owner dead, by CAS to PS_DEAD (the epoch in
     * the word makes that safe against a new owner).  At J1 by CAS.  R: anybody, acquire.  epoch << 4 | BARE | state.
     * Crash: JOINING or LIVE with a free OFD byte: dead; with BARE if its process is gone. */
    _Atomic uint32_t status;
    /* W: whoever wants the agent's attention, on its socket or (lock.c) for threads of its process that were ended: 1;
     * its agent exchanges it with 0.  R: its agent, acquire.  Crash: 1: it looks once for nothing. */
    _Atomic uint32_t asked;
    uint32_t pad2[13]; /* W: nobody.  R: nobody */

    /* Line 2: who it is.  W: owner at J1 unless said otherwise, published by J4.  R: anybody, relaxed;
     * compared with what the kernel says before it means anything. */
    _Atomic uint32_t pid; /* W: owner, in its own pid namespace.  R: anybody */
    _Atomic uint32_t tid; /* W: owner's agent, same namespace.  R: anybody */
    /* W: owner: start time, clock ticks of the machine, 0 unknown.  R: anybody, to tell it from one that was given its
     * pid since, give or take one */
    _Atomic uint64_t start;
    _Atomic uint64_t pidns;        /* W: owner: inode of its pid namespace, 0 unknown.  R: anybody */
    _Atomic uint32_t capabilities; /* W: owner: PS_CAN_*.  R: anybody */
    _Atomic uint32_t flags;        /* W: owner's agent: PS_SLOT_*, release.  R: anybody */
    /* Where its userfaultfd is to be had; whoever gets one there proves it (borrow.c). */
    _Atomic uint32_t uffd;   /* W: owner: number in its agent's table.  R: anybody */
    _Atomic uint32_t socket; /* W: owner: the five hexadecimal digits of its agent's abstract socket.  R: anybody */
    _Atomic uint64_t canary; /* W: owner: address of its canary, PS_GUARD before its data.  R: anybody; checked */
    uint64_t pad3[2];        /* W: nobody.  R: nobody */

    /* Line 3: what it holds. */
    /* W: owner's threads: + 1, seq_cst, when a lease's words are taken, or before the pages of a frozen region are
     * stored to, and before the look at the closers; - 1, seq_cst, after the words are given back, and wakes who sleeps
     * on it where a freeze or a snapshot is.  R: freezer and snapshotter, seq_cst after their closer: 0: no lease is
     * held by it.  Crash: too high; ignored once the owner is dead. */
    _Atomic uint32_t leases;
    /* W: owner's threads: + 1, seq_cst, before they look at a snapshot's word; - 1, release, when what they save for it
     * lies in its area, or the pages that they are about to store to are DIRTY in its states.  R: snapshotter at S1,
     * seq_cst: not 0: somebody may still write to an area, or its states, that were in use.  Crash: too high; ignored
     * once the owner is dead. */
    _Atomic uint32_t saving;
    /* W: owner's threads, relaxed, on their way to sleep until `waits_for` (an owner word) has given something up or
     * acknowledged; 0 when they go on.  Of several threads the last.  R: for information.  Crash: as it was. */
    _Atomic uint32_t waits_for;
    /* W: owner's threads, relaxed: + 1 for each lease taken, whoever had this slot: modulo 2^32.  R: for information */
    _Atomic uint32_t takes;
    _Atomic uint64_t waits_since; /* W: before `waits_for`; CLOCK_MONOTONIC_COARSE ns.  R: for information */
    /* W: owner's thread that takes the first of its leases, relaxed; CLOCK_MONOTONIC_COARSE ns.  R: for information:
     * since when it has held some lease without a break. */
    _Atomic uint64_t leased_since;
    /* W: owner's threads, relaxed: + 1 for each lease that ends; owner at J1: `takes`.  R: for information: `takes`
     * less this are held; unlike `leases` without those that are waited for. */
    _Atomic uint32_t ends;
    uint32_t pad4[7]; /* W: nobody.  R: nobody */
};

struct ps_shm_header {
    /* Lines 0 to 10: written by the creator, immutable afterwards.  Read once, at attach, into private
     * memory (struct ps_shape); a later change of them by anybody has no effect on who is attached. */
    uint64_t magic;        /* W: creator, last.  R: at attach: PS_MAGIC */
    uint32_t version;      /* W: creator.  R: at attach: PS_VERSION */
    uint32_t page_size;    /* W: creator.  R: at attach: bytes; the unit of protection, of leases, and of this file */
    uint64_t control_size; /* W: creator.  R: at attach; bytes before the data, whole pages */
    uint64_t size;         /* W: creator.  R: at attach; bytes asked for */
    uint64_t pages;        /* W: creator.  R: at attach; data pages of PS_PAGE bytes, of whole units */
    uint32_t slots;        /* W: creator.  R: at attach; 1 to PS_SLOTS_MAX */
    uint32_t initial;      /* W: creator.  R: at attach; the protection that a zero map byte means */
    uint64_t nonce[2];     /* W: creator.  R: at attach, and by name look-ups; random, tells regions apart */
    uint64_t created;      /* W: creator.  R: at attach; CLOCK_BOOTTIME ns, the time of generation 0 */
    uint32_t creator;      /* W: creator.  R: at attach; its pid, the author of generation 0 */
    uint32_t policy;       /* W: creator.  R: at attach; enum ps_policy, each participant's at first */
    char name[PS_NAME_MAX + 8];                 /* W: creator.  R: at attach; NUL terminated, may be "" */
    struct ps_shm_section section[PS_SECTIONS]; /* W: creator.  R: at attach; ends at PS_SEC_END */
    uint32_t areas; /* W: creator.  R: at attach; snapshot areas behind the data, at most PS_SNAPSHOTS */
    uint32_t flags; /* W: creator.  R: at attach; PS_REGION_* */

    /* Line 11: the writer lock. */
    /* W: by CAS 0 -> owner word, owner word -> owner word + WAITING, dead owner's word -> own word; released by
     * exchange with 0.  R: anybody, acquire.  Crash: names a dead owner; the next one takes over. */
    _Alignas(PS_LINE) _Atomic uint32_t lock;

    /* Line 12: the generation; its low half is the futex word on which agents sleep. */
    /* W: caller at C5 and U3, seq_cst.  R: agents and fault handlers, acquire (pairs with C5 and U3: the map and the
     * ring entry are visible).  Crash: at, or one below, attempt; of an UNDO one above it. */
    _Alignas(PS_LINE) _Atomic uint64_t generation;

    /* Line 13: how many slots were ever claimed; bounds every scan of the table. */
    /* W: joiner by CAS, only upwards.  R: anybody, acquire; clipped to `slots`.  Crash: too high is harmless */
    _Alignas(PS_LINE) _Atomic uint32_t slots_used;

    /* Line 14: the record. */
    /* W: caller, field by field as it says.  R: as its fields say */
    _Alignas(PS_LINE) struct ps_shm_record record;

    /* Line 15: leases and changes.  A taker stores its word, then looks here; a change stores here, then looks at the
     * words: one of them sees the other. */
    /* W: caller of a change: its bit, seq_cst, after the entry; cleared with the entry, by anybody who finds its
     * owner gone too.  R: lease-takers, seq_cst after their CAS.  Crash: a bit whose entry names a dead owner. */
    _Alignas(PS_LINE) _Atomic uint64_t closers;
    /* W: the first lease-taker: 1, seq_cst, before its CAS; never back.  R: changes, seq_cst after their bit: 0: no
     * lease word need be looked at */
    _Atomic uint32_t leases;
    uint32_t pad1; /* W: nobody.  R: nobody */
    /* Bits of the snapshots that are PREPARING or ACTIVE. */
    /* W: under the writer lock, seq_cst, after the word when a bit comes; when it goes, some time after it.
     * R: lease-takers, seq_cst after their look at the closers; who follows the map, seq_cst.  Crash: as the words. */
    _Atomic uint64_t snapshots;
    /* W: lease-taker that gives way: its bit, release, after the entry; cleared before the entry is.  R: whoever is
     * about to publish a closer, acquire.  Crash: a bit whose entry names a dead owner, or nobody. */
    _Atomic uint64_t tickets;
    /* W: as its fields say.  R: as its fields say */
    _Alignas(PS_LINE) struct ps_shm_closer closer[PS_CLOSERS];

    /* Line 40: the freeze. */
    /* W: freezer at F1 by CAS 0 -> owner word; 0 at F5, release, and wakes who sleeps on it (WAITING).  Anybody who
     * finds the owner gone makes it its own by CAS, thaws, and clears it.  R: anybody, acquire.
     * Crash: names a dead owner. */
    _Alignas(PS_LINE) _Atomic uint32_t freezer;
    /* W: whoever takes the word of a dead freezer over: 1, release; 0 before F5.  R: anybody, acquire, after the word:
     * 1: its owner is no freezer, and what is refused now may soon be allowed.  Crash: as the word. */
    _Atomic uint32_t thawing;
    /* W: freezer at F2, when KEPT is whole, before its record is begun; 0 when the thaw is complete.
     * R: whoever thaws, under the writer lock: 0: nothing is to be put back.  The generation before the freeze, + 1. */
    _Atomic uint64_t frozen;

    /* Line 41: the snapshots. */
    /* W: as its fields say.  R: as its fields say */
    _Alignas(PS_LINE) struct ps_shm_snapshot snapshot[PS_SNAPSHOTS];

    /* Line 43: how many forbidden accesses there have been. */
    /* W: whoever made one, + 1, relaxed, before it writes the entry.  R: anybody, relaxed, after the entries: what is
     * not of the latest PS_VIOLATIONS was overtaken.  Crash: an entry that is none. */
    _Alignas(PS_LINE) _Atomic uint64_t violations;

    /* Line 44: leases that gave way. */
    /* W: as its fields say.  R: as its fields say */
    _Alignas(PS_LINE) struct ps_shm_ticket ticket[PS_TICKETS];
};

static_assert(sizeof(struct ps_shm_section) == 24, "section");
static_assert(sizeof(struct ps_shm_record) == 64, "record: one line");
static_assert(sizeof(struct ps_shm_ring) == 64, "ring entry: one line");
static_assert(sizeof(struct ps_shm_slot) == 4 * PS_LINE, "slot: four lines");
static_assert(sizeof(struct ps_shm_lock) == PS_LINE, "lock: one line");
static_assert(sizeof(struct ps_shm_closer) == 24, "closer");
static_assert(sizeof(struct ps_shm_ticket) == 24, "ticket");
static_assert(sizeof(struct ps_shm_snapshot) == 16, "snapshot");
static_assert(sizeof(struct ps_shm_violation) == 2 * PS_LINE, "violation: no byte is left between the fields");
static_assert(sizeof(struct ps_shm_header) <= 4096, "header: one page");
static_assert(sizeof(_Atomic uint64_t) == 8 && sizeof(_Atomic uint32_t) == 4, "atomics are plain words");
static_assert((PS_RING & (PS_RING - 1)) == 0, "ring: a power of two");
static_assert(1 + PS_EPOCH_BITS + PS_OWNER_SLOT_BITS == 32, "owner word");

#endif
