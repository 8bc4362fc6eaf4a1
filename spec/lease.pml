/* lease.pml - who holds a lease, who changes its pages, and who sleeps until when.
 *
 * Lives here: the held words and the closers of ext/lease.c and ext/layout.h: takers of
 * leases, changes that wait for them, and a fate that kills.  What a change does to page
 * tables is in protocol.pml; here it is one step, and the record that a death leaves open.
 * Assertions name what they check; who waits for ever is an invalid end state.
 *
 * Reading it
 *  - A statement is one load, store or atomic operation of C, or one system call.  A CAS
 *    that fails is tried again, so a loop of them is one step, from what it finds.  The
 *    labels are those of the crash points in C.
 *  - A futex: who sleeps is in `bed`, and goes on when it is woken.  FUTEX_WAIT looks at
 *    the word and lies down in one step; the kernel wakes one of those who watch a death.
 *  - BACKSTOP: who sleeps also gets up when it would find things changed.
 *  - What stands under "Ghosts" exists for the assertions only.
 * Configuration, by -D (run.py has the table)
 *    TAKERS of leases, 1 to 3, the first one of both pages; THREADS 1: it and the second are
 *    threads of one process
 *    CHANGES, 0 to 2, the first one of both pages
 *    CRASHES, TIMEOUTS: at most so many
 *    BACKSTOP 0 or 1
 * Broken on purpose: one #ifdef each, explained in run.py.
 */

#define PAGES 2
#define ACTORS (TAKERS + CHANGES) /* takers first */
#define ENTRIES 2                 /* of the closers' table */

#if THREADS
#define PROCESS(id) ((id) == 1 -> 0 : (id))
#else
#define PROCESS(id) (id)
#endif
#define WORD(id) (PROCESS(id) + 1) /* nobody joins, so without an epoch */
#define GONE(word) ((word) != 0 && !alive[(word) - 1])

/* -- The control segment ------------------------------------------------------------------------------------- */

byte holder[PAGES], next[PAGES]; /* the halves of a held word */
bool sleepers[PAGES];            /* WAITING of the low half */
bool reserver[PAGES];            /* WAITING of the high half */

bool mask[ENTRIES]; /* `closers`, which is loaded at once */
byte closer[ENTRIES], first[ENTRIES], count[ENTRIES];
bool wanted[ENTRIES]; /* WAITING of the entry's owner word */

byte lock;
bool opened; /* the record */
byte opened_first, opened_count;

#define LOCK_FREE (lock == 0 || GONE(lock))
#define ANY_CLOSER (mask[0] || mask[1])
#define IN(page, first_, count_) ((page) >= (first_) && (page) < (first_) + (count_))
#define OVERLAP(a, an, b, bn) ((a) < (b) + (bn) && (b) < (a) + (an))

/* -- What belongs to the processes, and to the kernel -------------------------------------------------------- */

bool alive[ACTORS];
byte bed[ACTORS];   /* the word on which it sleeps; 0: awake */
byte watch[ACTORS]; /* ... and the WORD of whose death would wake it too */

#define LOW(page) (1 + (page))
#define HIGH(page) (1 + PAGES + (page))
#define ENTRY(entry) (1 + 2 * PAGES + (entry))

/* -- What went wrong so far ---------------------------------------------------------------------------------- */

byte crashes, timeouts;

/* -- Ghosts -------------------------------------------------------------------------------------------------- */

byte inside[PAGES]; /* id + 1 of who has the lease, and its page tables */
bool dirty[PAGES];  /* one died inside, and nobody was told yet */
hidden byte each;   /* scratch of a single step */

/* -- Sleeping ------------------------------------------------------------------------------------------------ */

/* One of them: which one, is the kernel's affair. */
inline wake_one(word)
{
    atomic {
        if
        :: bed[0] == word -> bed[0] = 0; watch[0] = 0
        :: bed[1] == word -> bed[1] = 0; watch[1] = 0
#if ACTORS > 2
        :: bed[2] == word -> bed[2] = 0; watch[2] = 0
#endif
#if ACTORS > 3
        :: bed[3] == word -> bed[3] = 0; watch[3] = 0
#endif
#if ACTORS > 4
        :: bed[4] == word -> bed[4] = 0; watch[4] = 0
#endif
        :: else
        fi
    }
}

inline wake_all(word)
{
    d_step {
        each = 0;
        do
        :: each < ACTORS && bed[each] == word -> bed[each] = 0; watch[each] = 0; each++
        :: each < ACTORS && bed[each] != word -> each++
        :: else -> break
        od;
        each = 0
    }
}

/* FUTEX_WAITV on the word, unless it has changed, and on the death of the owner. */
#define LIE_DOWN(word, same, owner)                                                                                \
    atomic {                                                                                                       \
        if                                                                                                         \
        :: (same) && !GONE(owner) -> bed[id] = word; watch[id] = owner                                             \
        :: else                                                                                                    \
        fi }

#ifdef NOBACKSTOP
#define BACKED false
#else
#define BACKED BACKSTOP
#endif

#define GET_UP bed[id] = 0; watch[id] = 0

/* -- Giving back --------------------------------------------------------------------------------------------- */

#if defined(WAKE_ONE)
#define WAKE_ALL false
#elif defined(MASK_FIRST)
#define WAKE_ALL any
#else
#define WAKE_ALL ANY_CLOSER /* on one half may sleep changes, whom one waits for, and takers */
#endif

#ifdef DROP_ABANDONED
#define BACK(page) 0
#else
#define BACK(page) was[page]
#endif

/* The end of a lease, or of an attempt: then a dead holder comes back, who was taken over. */
inline give(page, to)
{
#ifdef MASK_FIRST
    any = ANY_CLOSER;
#endif
    atomic {
        low = sleepers[page];
        high = reserver[page];
        holder[page] = to;
        sleepers[page] = false;
        reserver[page] = false
    };
    if
    :: high -> wake_one(HIGH(page))
    :: else
    fi;
    if
    :: atomic { WAKE_ALL && low -> wake_all(LOW(page)) }
    :: atomic { !WAKE_ALL && low && !high -> wake_one(LOW(page)) }
    :: else
    fi;
    atomic { low = false; high = false }
}

inline give_all()
{
    do
    :: page > from -> page--; give(page, BACK(page)); was[page] = 0
    :: else -> break
    od
}

/* Who sleeps on the low half may find the word free. */
inline give_up(page)
{
    if
    :: atomic { reserved ->
           reserved = false;
           if
           :: next[page] == WORD(id) -> next[page] = 0; reserver[page] = false
           :: else
           fi };
       wake_one(LOW(page))
    :: else
    fi
}

/* -- The table of closers ------------------------------------------------------------------------------------ */

inline clear(entry)
{
#ifndef CLEAR_OWNER_FIRST
    mask[entry] = false;
#endif
    atomic { low = wanted[entry]; closer[entry] = 0; wanted[entry] = false };
#ifdef CLEAR_OWNER_FIRST
    mask[entry] = false;
#endif
    if
    :: atomic { low -> low = false; wake_all(ENTRY(entry)) }
    :: else
    fi
}

/* Under the lock: what a dead change left. */
inline finish()
{
    if
    :: atomic { opened ->
           assert(!IN(0, opened_first, opened_count) || inside[0] == 0);
           assert(!IN(1, opened_first, opened_count) || inside[1] == 0) };
       opened = false
    :: else
    fi
}

/* Of a dead change. Its record first: nobody may take its pages before somebody has finished that. */
inline clear_dead(entry)
{
#ifndef CLEAR_OPEN
    if
    :: opened ->
        atomic { LOCK_FREE -> lock = WORD(id) };
        finish();
        lock = 0
    :: else
    fi;
#endif
#ifdef CLEAR_BIT_FIRST
    mask[entry] = false;
#endif
    if /* one of those who found it */
    :: atomic { GONE(closer[entry]) -> closer[entry] = WORD(id) };
       clear(entry)
    :: else
    fi
}

/* -- Takers -------------------------------------------------------------------------------------------------- */

/* For another, if it be a thread of the same process. */
#define RESERVED(page) (next[page] != 0 && !(reserved && next[page] == WORD(id)) && !GONE(next[page]))
#define VACANT(page) (holder[page] == 0 || GONE(holder[page]))
#define FREE(page) (VACANT(page) && !RESERVED(page))
#define WHOM(page) (VACANT(page) -> next[page] : holder[page])

#ifdef SLEPT_ALONE
#define SLEPT false
#else
#define SLEPT slept
#endif

/* By CAS; a reservation of its own, or of the dead, goes with it. */
inline get(page)
{
    if
    :: GONE(holder[page]) -> was[page] = holder[page]; sleepers[page] = true; abandoned[page] = true
    :: else -> sleepers[page] = (sleepers[page] || SLEPT)
    fi;
    holder[page] = WORD(id);
    next[page] = 0;
    reserver[page] = false;
    reserved = false;
    slept = false;
    saw = 0
}

proctype taker(byte id; byte from; byte pages)
{
    byte page, saw, was[PAGES], entry;
    bool abandoned[PAGES], slept, reserved, low, high, looked[ENTRIES];
#ifdef MASK_FIRST
    bool any;
#endif

again:
    {
        page = from;
#ifdef LEASE_LOOK_FIRST
        atomic { looked[0] = mask[0]; looked[1] = mask[1] };
#endif
H1_take:
        do
        :: atomic { page < from + pages && FREE(page) -> get(page); page++ }
        :: atomic { page == from + pages -> break }
        :: atomic { page < from + pages && !FREE(page) && slept && !reserved && !RESERVED(page) -> /* lost */
               next[page] = WORD(id);
               reserver[page] = true;
               reserved = true;
               saw = holder[page] };
           LIE_DOWN(HIGH(page), next[page] == WORD(id) && reserver[page], holder[page]);
           goto asleep
        :: atomic { page < from + pages && !FREE(page) && reserved && next[page] == WORD(id) -> /* overtaken */
               reserver[page] = true;
               saw = holder[page] };
           LIE_DOWN(HIGH(page), next[page] == WORD(id) && reserver[page], holder[page]);
           goto asleep
        :: atomic { page < from + pages && !FREE(page) && (!slept || RESERVED(page)) ->
               reserved = false;
               sleepers[page] = true;
               saw = holder[page] };
           LIE_DOWN(LOW(page), holder[page] == saw && sleepers[page], WHOM(page));
asleep:
           if
           :: atomic { bed[id] == 0 -> slept = true; saw = 0 }
           :: atomic { BACKED && bed[id] != 0 && (FREE(page) || holder[page] != saw || !RESERVED(page)) ->
                  GET_UP; slept = true; saw = 0 }
           :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; goto gave_up }
           fi
        od;
#ifndef LEASE_LOOK_FIRST
        atomic { looked[0] = mask[0]; looked[1] = mask[1] };
#endif
        do
        :: atomic { entry < ENTRIES && looked[entry] && closer[entry] != 0 &&
               OVERLAP(first[entry], count[entry], from, pages) -> break }
        :: atomic { entry < ENTRIES && !(looked[entry] && closer[entry] != 0 &&
               OVERLAP(first[entry], count[entry], from, pages)) -> looked[entry] = false; entry++ }
        :: atomic { entry == ENTRIES -> entry = 0; goto H2_open }
        od;
        atomic { looked[0] = false; looked[1] = false };
        give_all();
        atomic { abandoned[0] = false; abandoned[1] = false };
        if
        :: GONE(closer[entry]) -> clear_dead(entry)
        :: atomic { closer[entry] != 0 && !GONE(closer[entry]) -> wanted[entry] = true; saw = closer[entry] };
           LIE_DOWN(ENTRY(entry), closer[entry] == saw && wanted[entry], saw);
           if
           :: atomic { bed[id] == 0 -> saw = 0 }
           :: atomic { BACKED && bed[id] != 0 && (closer[entry] != saw || GONE(saw)) -> GET_UP; saw = 0 }
           :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; goto returned }
           fi
        :: closer[entry] == 0
        fi;
        entry = 0;
        goto again;
H2_open:
        atomic {
            page = from;
            do
            :: page < from + pages ->
                assert(inside[page] == 0);                                     /* one holder */
                assert(!opened || !IN(page, opened_first, opened_count)); /* and no change */
                assert(!dirty[page] || abandoned[page]);                       /* who died here is not forgotten */
                dirty[page] = false;
                inside[page] = id + 1;
                was[page] = 0;
                page++
            :: else -> break
            od };
H3_close:
        do
        :: atomic { page > from -> page--; inside[page] = 0 };
H4_release:
           give(page, 0)
        :: atomic { page == from -> goto returned }
        od;
gave_up:
        give_up(page);
        give_all();
returned:
        skip
    } unless { !alive[PROCESS(id)] }
}

/* -- Changes ------------------------------------------------------------------------------------------------- */

inline wait_for_holders()
{
K2_wait:
    do
    :: atomic { page < from + pages && (holder[page] == 0 || GONE(holder[page])) -> page++ }
    :: atomic { page == from + pages -> break }
    :: atomic { page < from + pages && holder[page] != 0 && !GONE(holder[page]) ->
           sleepers[page] = true;
           saw = holder[page] };
       LIE_DOWN(LOW(page), holder[page] == saw && sleepers[page], saw);
       if
       :: atomic { bed[id] == 0 -> saw = 0 }
       :: atomic { BACKED && bed[id] != 0 && (holder[page] != saw || GONE(saw)) -> GET_UP; saw = 0 }
       :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; goto K3_clear }
       fi
    od
}

proctype change(byte id; byte from; byte pages)
{
    byte page = from, saw, entry;
    bool low;

    {
#ifdef CLOSER_LOOK_FIRST
        wait_for_holders();
#endif
        do /* an entry */
        :: atomic { closer[entry] == 0 -> closer[entry] = WORD(id); break }
        :: GONE(closer[entry]) -> clear_dead(entry)
        :: atomic { closer[entry] != 0 && !GONE(closer[entry]) -> entry = (entry + 1) % ENTRIES }
        od;
        first[entry] = from;
        count[entry] = pages;
K1_close:
        mask[entry] = true;
#ifndef CLOSER_LOOK_FIRST
        wait_for_holders();
#endif
        atomic { LOCK_FREE -> lock = WORD(id) };
        finish();
        d_step {
            assert(!IN(0, from, pages) || inside[0] == 0); /* a change, and no holder */
            assert(!IN(1, from, pages) || inside[1] == 0);
            opened_first = from;
            opened_count = pages;
            opened = true };
        opened = false;
        lock = 0;
K3_clear:
        clear(entry)
    } unless { !alive[PROCESS(id)] }
}

/* -- Fate ---------------------------------------------------------------------------------------------------- */

/* What it held is left in the middle of a write. */
#define GONE_FROM(id)                                                                                              \
    bed[id] = 0; watch[id] = 0;                                                                                    \
    dirty[0] = (dirty[0] || inside[0] == (id) + 1);                                                                \
    dirty[1] = (dirty[1] || inside[1] == (id) + 1);                                                                \
    inside[0] = (inside[0] == (id) + 1 -> 0 : inside[0]);                                                          \
    inside[1] = (inside[1] == (id) + 1 -> 0 : inside[1])

inline dies(process)
{
    atomic { crashes < CRASHES && alive[process] ->
        crashes++;
        alive[process] = false;
        each = 0;
        do
        :: each < ACTORS && PROCESS(each) == process -> GONE_FROM(each); each++
        :: each < ACTORS && PROCESS(each) != process -> each++
        :: else -> break
        od;
        each = 0;
        if
        :: watch[0] == process + 1 -> bed[0] = 0; watch[0] = 0
        :: watch[1] == process + 1 -> bed[1] = 0; watch[1] = 0
#if ACTORS > 2
        :: watch[2] == process + 1 -> bed[2] = 0; watch[2] = 0
#endif
#if ACTORS > 3
        :: watch[3] == process + 1 -> bed[3] = 0; watch[3] = 0
#endif
#if ACTORS > 4
        :: watch[4] == process + 1 -> bed[4] = 0; watch[4] = 0
#endif
        :: else
        fi }
}

init
{
    atomic {
        each = 0;
        do
        :: each < ACTORS -> alive[each] = true; each++
        :: else -> break
        od;
        each = 0;
        run taker(0, 0, 2);
#if TAKERS > 1
        run taker(1, 1, 1);
#endif
#if TAKERS > 2
        run taker(2, 1, 1);
#endif
#if CHANGES > 0
        run change(TAKERS, 0, 2);
#endif
#if CHANGES > 1
        run change(TAKERS + 1, 1, 1)
#endif
    };
    do
    :: dies(0)
    :: dies(1)
#if ACTORS > 2
    :: dies(2)
#endif
#if ACTORS > 3
    :: dies(3)
#endif
#if ACTORS > 4
    :: dies(4)
#endif
    :: break
    od
}
