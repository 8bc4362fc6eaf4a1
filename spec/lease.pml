/* lease.pml - who holds a lease, what keeps leases from pages, who goes first, and who sleeps until when.
 *
 * Lives here: the held words, closers, counts and tickets of ext/hold/held.c, closer.c, lease.c and layout.h: takers of
 * leases, also within a lease; changes, and drains (a freeze or a snapshot), that wait for them; a fate that kills and
 * stops.  What a change does to page tables is in protocol.pml; here it is one step, and the record that a death leaves
 * open.  Assertions name what they check; who waits for ever is an invalid end state.
 *
 * Reading it
 *  - A statement is one load, store or atomic operation of C, or one system call; an entry of a table is looked at in
 *    one.  A CAS that fails is tried again, so a loop of them is one step, from what it finds.  The labels are those of
 *    the crash points in C.
 *  - A futex: who sleeps is in `bed`, and goes on when it is woken.  FUTEX_WAIT looks at the word and lies down in one
 *    step; the kernel wakes one of those who watch a death.
 *  - BACKSTOP: who sleeps also gets up when it would find things changed.  PATIENCE: PS_IN_LINE may be over any time.
 *  - What stands under "Ghosts" exists for the assertions only.
 * Configuration, by -D (run.py has the table)
 *    TAKERS of leases, 1 to 3, the first WIDE of them of both pages, others of page 1; where two are wide the third one
 *    takes page 0, and page 1 afterwards.  THREADS 1: the first two are threads of one process
 *    INNER, what the first one does within its lease.  LEASE: it has page 1, takes page 0, and gives either back first.
 *    CHANGE: it has page 0, and changes page 1.  CIRCLE: it has page 0 and takes page 2; the second one has page 1 and
 *    takes page 0; changes are of pages 1 and 2.
 *    CHANGES, 0 to 2, the first one of both pages (WIDE 0: of page 1), the second of page 1; DRAINS, 0 or 1
 *    TICKETS, 0 or 1 place for them: who gets none takes its chance
 *    CRASHES, TIMEOUTS: at most so many; STOPS: so many takers stop for ever where they sleep without a lease
 * Broken on purpose: one #ifdef each, explained in run.py.
 */

#define NOTHING 0
#define LEASE 1
#define CHANGE 2
#define CIRCLE 3
#define AGAIN 4

#if INNER == CIRCLE
#define PAGES 3
#else
#define PAGES 2
#endif
#define ACTORS (TAKERS + CHANGES + DRAINS) /* in this order */
#if CHANGES + DRAINS > 1 || INNER == CHANGE
#define ENTRIES 2 /* of the closers' table, which is not full */
#else
#define ENTRIES 1
#endif

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
byte closer[ENTRIES], first[ENTRIES], count[ENTRIES], kind[ENTRIES];
bool wanted[ENTRIES]; /* WAITING of the entry's owner word */

#define SHUT 0
#define WAITS 1
#define DRAIN 2

byte leases[ACTORS]; /* by slot */

byte ticket, ticket_first, ticket_count;
bit ticket_serial;
bool ticket_bit;    /* of `tickets` */
bool ticket_wanted; /* WAITING of its owner word */

byte lock;
bool opened; /* the record */
byte opened_first, opened_count;

#define LOCK_FREE (lock == 0 || GONE(lock))
#define LAST (ENTRIES - 1)
#define ANY_CLOSER (mask[0] || mask[LAST])
#define ANY_DRAIN ((mask[0] && kind[0] == DRAIN) || (mask[LAST] && kind[LAST] == DRAIN))
#define UNHELD(page) (holder[page] == 0 || GONE(holder[page]))
#define IN(page, first_, count_) ((page) >= (first_) && (page) < (first_) + (count_))
#define OVERLAP(a, an, b, bn) ((a) < (b) + (bn) && (b) < (a) + (an))

/* -- What belongs to the processes, and to the kernel -------------------------------------------------------- */

bool alive[ACTORS], stopped[ACTORS];
byte bed[ACTORS];   /* the word on which it sleeps; 0: awake */
byte watch[ACTORS]; /* ... and the WORD of whose death would wake it too */

#define LOW(page) (1 + (page))
#define HIGH(page) (1 + PAGES + (page))
#define ENTRY(entry) (1 + 2 * PAGES + (entry))
#define SLOT(process) (1 + 2 * PAGES + ENTRIES + (process))
#define TICKET (1 + 2 * PAGES + ENTRIES + ACTORS)

/* -- What went wrong so far ---------------------------------------------------------------------------------- */

byte crashes, timeouts, stops;

/* -- Ghosts -------------------------------------------------------------------------------------------------- */

byte inside[PAGES]; /* id + 1 of who has the lease, and its page tables */
bool dirty[PAGES];  /* one died inside, and nobody was told yet */
bool drained;       /* a freeze, or the moment of a snapshot */
byte ticketed;      /* id + 1 of whose ticket it is */
byte let[ACTORS];   /* ... by closer: of whom it has found there, and lets go first */
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

/* The end of a lease, or of an attempt: then a dead holder comes back, who was taken over; and `line` is to have it
 * next, unless somebody is already. */
inline give(page, to, line)
{
#ifdef MASK_FIRST
    any = ANY_CLOSER;
#endif
    atomic {
        low = sleepers[page];
        high = reserver[page];
        holder[page] = to;
        next[page] = (next[page] == 0 -> line : next[page]);
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

inline give_pages(a, b, line)
{
    i = a;
    do
    :: i < b -> give(i, BACK(i), line); atomic { was[i] = 0; i++ }
    :: else -> break
    od;
    i = 0
}

/* Who sleeps on the low half may find the word free. */
inline leave_line(a)
{
    i = a;
    do
    :: i < line_end ->
        if
        :: atomic { next[i] == WORD(id) -> next[i] = 0; reserver[i] = false }; wake_one(LOW(i))
        :: else
        fi;
        i++
    :: else -> break
    od;
    atomic { line_end = (line_end < a -> line_end : a); i = 0 }
}

/* Drains alone look at the counts. */
inline uncounts()
{
    leases[PROCESS(id)]--;
    if
    :: atomic { ANY_DRAIN -> wake_all(SLOT(PROCESS(id))) }
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
           assert(!IN(1, opened_first, opened_count) || inside[1] == 0);
           assert(!IN(PAGES - 1, opened_first, opened_count) || inside[PAGES - 1] == 0) };
       opened = false
    :: else
    fi
}

/* Of a dead change, by one of those who found it; the entry is that one's meanwhile.  Its record first: nobody may
 * take its pages before somebody has finished that. */
inline bury(entry)
{
#ifdef CLEAR_BIT_FIRST
    mask[entry] = false;
#endif
    if
    :: atomic { GONE(closer[entry]) -> closer[entry] = WORD(id) };
#ifndef CLEAR_OPEN
       if
       :: opened ->
           atomic { LOCK_FREE -> lock = WORD(id) };
           finish();
           lock = 0
       :: else
       fi;
#endif
       clear(entry)
    :: else
    fi
}

/* -- Tickets ------------------------------------------------------------------------------------------------- */

#define THAT_TICKET (ticket == saw && ticket_serial == serial)
#define MY_TICKET (has_ticket && ticket == WORD(id) && ticket_serial == serial)

/* It has given way; where too many have, it takes its chance. */
inline take_ticket()
{
#if TICKETS
    if
    :: atomic { !MY_TICKET && (ticket == 0 || GONE(ticket)) ->
           ticket = WORD(id);
           ticket_wanted = false;
           ticket_serial = !ticket_serial;
           serial = ticket_serial;
           has_ticket = true };
       atomic { ticket_first = from; ticket_count = pages };
       atomic { ticket_bit = true; ticketed = id + 1 }
    :: else
    fi
#else
    skip
#endif
}

inline void_ticket(owner)
{
    ticket_bit = false;
    if
    :: atomic { ticket == owner -> ticket = 0; low = ticket_wanted; ticket_wanted = false };
       if
       :: atomic { low -> low = false; wake_all(TICKET) }
       :: else
       fi
    :: else
    fi
}

inline give_ticket()
{
#if TICKETS
    if
    :: atomic { MY_TICKET ->
           each = 0;
           do
           :: each < ACTORS -> let[each] = (let[each] == id + 1 -> 0 : let[each]); each++
           :: else -> break
           od;
           each = 0;
           ticketed = 0 };
       void_ticket(WORD(id))
    :: else
    fi;
    atomic { has_ticket = false; serial = 0 }
#else
    skip
#endif
}

#ifdef LINE_NOWAIT
#define LETS false
#else
#define LETS true
#endif

#ifdef HOLDER_LETS
#define MAY_LET true
#else
#define MAY_LET !holds /* it may be what the other one waits for */
#endif

/* Who has given way before comes first. */
inline let_go_first(a, b, holds)
{
#if TICKETS
    if
    :: atomic { ticket_bit && MAY_LET && ticket != 0 && OVERLAP(ticket_first, ticket_count, a, b) ->
           let[id] = ticketed;
           saw = ticket;
           serial = ticket_serial };
       do
       :: atomic { !LETS || !THAT_TICKET -> break }
       :: atomic { LETS && THAT_TICKET && GONE(saw) }; void_ticket(saw)
       :: atomic { LETS && THAT_TICKET && !GONE(saw) -> ticket_wanted = true };
          LIE_DOWN(TICKET, ticket == saw && ticket_wanted, saw);
          if
          :: bed[id] == 0
          :: atomic { BACKED && bed[id] != 0 && (!THAT_TICKET || GONE(saw)) -> GET_UP }
          :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; serial = 0; goto unmade }
#ifndef TICKET_FOREVER
          :: atomic { PATIENCE && bed[id] != 0 -> GET_UP }; void_ticket(ticket); break
#endif
          fi
       od;
       atomic { saw = 0; serial = 0 }
    :: else
    fi
#else
    skip
#endif
}

/* -- Changes ------------------------------------------------------------------------------------------------- */

/* The words are looked at one by one. */
inline find_holder(page, a, b)
{
    do
    :: atomic { page < a + b && UNHELD(page) -> page++ }
    :: atomic { page == a + b || !UNHELD(page) -> break }
    od
}

/* Who has a lease passes meanwhile, and may take a page that has been looked at: so all are looked at again. */
inline wait_for_holders(a, b)
{
    page = a;
    find_holder(page, a, b);
    do
    :: atomic { page == a + b -> break }
    :: atomic { page < a + b -> kind[entry] = WAITS };
       if
       :: atomic { wanted[entry] -> wake_all(ENTRY(entry)) } /* who has given way, and passes now */
       :: else
       fi;
K2_wait:
       do
       :: atomic { page < a + b && UNHELD(page) -> page++ }
       :: atomic { page == a + b -> break }
       :: atomic { page < a + b && !UNHELD(page) ->
              sleepers[page] = true;
              saw = holder[page] };
          LIE_DOWN(LOW(page), holder[page] == saw && sleepers[page], saw);
          if
          :: atomic { bed[id] == 0 -> saw = 0 }
          :: atomic { BACKED && bed[id] != 0 && (holder[page] != saw || GONE(saw)) -> GET_UP; saw = 0 }
          :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; kind[entry] = SHUT; goto K3_clear }
          fi
       od;
#ifndef RESCAN_FIRST
       kind[entry] = SHUT;
#endif
       page = a;
       find_holder(page, a, b)
    od;
#ifdef RESCAN_FIRST
    kind[entry] = SHUT;
#endif
    page = 0
}

inline take_entry()
{
    do
    :: atomic { closer[entry] == 0 -> closer[entry] = WORD(id); break }
    :: GONE(closer[entry]) -> bury(entry)
    :: atomic { closer[entry] != 0 && !GONE(closer[entry]) -> entry = (entry + 1) % ENTRIES }
    od
}

inline make_change(a, b, holds)
{
#ifdef CLOSER_LOOK_FIRST
    page = a;
    do
    :: find_holder(page, a, b);
       if
       :: atomic { page == a + b -> break }
       :: else -> UNHELD(page)
       fi
    od;
#endif
    let_go_first(a, b, holds);
    take_entry();
    atomic { first[entry] = a; count[entry] = b; kind[entry] = SHUT };
K1_close:
    mask[entry] = true;
#ifndef CLOSER_LOOK_FIRST
    wait_for_holders(a, b);
#endif
    atomic { LOCK_FREE -> lock = WORD(id) };
    finish();
    d_step {
        assert(!IN(0, a, b) || inside[0] == 0); /* a change, and no holder */
        assert(!IN(1, a, b) || inside[1] == 0);
        assert(!IN(PAGES - 1, a, b) || inside[PAGES - 1] == 0);
        opened_first = a;
        opened_count = b;
        opened = true };
    opened = false;
    lock = 0;
K3_clear:
    clear(entry);
unmade:
    atomic { entry = 0; page = 0 }
}

proctype change(byte id; byte from; byte pages)
{
    byte page, saw, entry;
    bit serial;
    bool low;

    {
        make_change(from, pages, false)
    } unless { !alive[id] }
}

/* -- Drains -------------------------------------------------------------------------------------------------- */

/* A freeze or a snapshot: by counts. */
proctype drain(byte id)
{
    byte process, saw, entry;
    bit serial;
    bool low;

    {
        let_go_first(0, PAGES, false);
        take_entry();
        atomic { first[entry] = 0; count[entry] = PAGES; kind[entry] = DRAIN };
        mask[entry] = true;
        do
        :: atomic { process < TAKERS && (leases[process] == 0 || !alive[process]) -> process++ }
        :: atomic { process == TAKERS -> break }
        :: atomic { process < TAKERS && leases[process] != 0 && alive[process] -> saw = leases[process] };
           LIE_DOWN(SLOT(process), leases[process] == saw, process + 1);
           if
           :: atomic { bed[id] == 0 -> saw = 0 }
           :: atomic { BACKED && bed[id] != 0 && (leases[process] != saw || !alive[process]) -> GET_UP; saw = 0 }
           :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; goto cleared }
           fi
        od;
        atomic {
            /* Nobody has a lease in a frozen region, nor at the moment of a snapshot. */
            assert(inside[0] == 0 && inside[1] == 0 && inside[PAGES - 1] == 0);
            drained = true };
        drained = false;
cleared:
        clear(entry);
unmade:
        skip
    } unless { !alive[id] }
}

/* -- Takers -------------------------------------------------------------------------------------------------- */

#ifdef RESERVED_FOREVER
#define ABSENT(page) false
#else
#define ABSENT(page) (absent != 0 && next[page] == absent)
#endif
/* For this thread; or for another of its process, which it overtakes. */
#define RESERVED(page) (next[page] == WORD(id) && (page) < line_end)
#define NO_LINE(page) (next[page] == 0 || GONE(next[page]))
#define FREE(page) (UNHELD(page) && (NO_LINE(page) || RESERVED(page) || ABSENT(page)))
#define WHOM(page) (UNHELD(page) -> next[page] : holder[page])

#ifdef SLEPT_ALONE
#define SLEPT false
#else
#define SLEPT slept
#endif

/* By CAS; a dead holder is remembered. */
inline get(page)
{
    if
    :: GONE(holder[page]) -> was[page] = holder[page]; sleepers[page] = true
    :: else -> sleepers[page] = (sleepers[page] || SLEPT)
    fi;
    holder[page] = WORD(id);
    next[page] = 0;
    reserver[page] = false;
    slept = false;
    saw = 0
}

#ifdef KEEP_WORDS
#define TAKEN(page) ((page) == at || holder[page] == WORD(id))
#else
#define TAKEN(page) ((page) == at)
#endif

#ifdef LINE_KEPT
#define LINE_THEN line_end
#else
#define LINE_THEN 0
#endif

#ifdef RESERVE_ALL
#define LINE_FROM(page) (from + pages)
#define LINE_LATER WORD(id)
#else
#define LINE_FROM(page) (page)
#define LINE_LATER 0
#endif

/* The page of its lease within a lease. */
#define INNER_OF(id) (INNER == CIRCLE && (id) == 0 -> 2 : 0)

/* Who has a lease, but not the one that it takes, passes what waits for that lease to end. */
#ifdef PASS_SHUT
#define CLOSED(entry) false
#else
#define CLOSED(entry) (kind[entry] == SHUT)
#endif
#ifdef NEVER_LATE
#define LATE false
#else
#define LATE late
#endif
#define BESIDE(entry) (outer_pages != 0 && OVERLAP(outer, outer_pages, first[entry], count[entry]))
#define PASSES(entry)                                                                                              \
    (!CLOSED(entry) && outer_pages != 0 &&                                                                         \
     (kind[entry] == DRAIN || count[entry] == PAGES || BESIDE(entry) || LATE))
#define IN_THE_WAY(entry)                                                                                          \
    (looked[entry] && OVERLAP(first[entry], count[entry], from, pages) && !PASSES(entry))

proctype taker(byte id; byte from; byte pages; byte inner)
{
    byte page, at, i, line_end, absent, saw, was[PAGES], entry, outer, outer_pages;
    bit serial;
    bool slept, low, high, looked[ENTRIES], late, has_ticket;
#ifdef MASK_FIRST
    bool any;
#endif

again:
    {
        at = from;
#ifdef LEASE_LOOK_FIRST
        atomic { looked[0] = mask[0]; looked[LAST] = mask[LAST] };
#endif
around: /* it waits for the page `at`, and takes the others where they are to be had */
H1_take:
        do
        :: atomic { FREE(at) -> get(at); break }
        :: atomic { !FREE(at) && slept && !RESERVED(at) && NO_LINE(at) -> /* lost */
               next[at] = WORD(id);
               reserver[at] = true;
               line_end = (line_end < at + 1 -> at + 1 : line_end);
               saw = holder[at] };
           LIE_DOWN(HIGH(at), next[at] == WORD(id) && reserver[at], holder[at]);
           goto asleep
        :: atomic { !FREE(at) && RESERVED(at) ->
               reserver[at] = true;
               saw = holder[at] };
           LIE_DOWN(HIGH(at), next[at] == WORD(id) && reserver[at], holder[at]);
           goto asleep
        :: atomic { !FREE(at) && !RESERVED(at) && (!slept || !NO_LINE(at)) ->
               sleepers[at] = true;
               saw = holder[at] };
           LIE_DOWN(LOW(at), holder[at] == saw && sleepers[at], WHOM(at));
asleep:
           if
           :: atomic { bed[id] == 0 -> slept = true; saw = 0 }
           :: atomic { BACKED && bed[id] != 0 && (FREE(at) ||
                  (bed[id] == HIGH(at) -> next[at] != WORD(id) : holder[at] != saw || NO_LINE(at))) ->
                  GET_UP; slept = true; saw = 0 }
           :: atomic { PATIENCE && bed[id] == LOW(at) && UNHELD(at) && !NO_LINE(at) && next[at] != absent ->
                  GET_UP; slept = true; saw = 0; absent = next[at] }
           :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; slept = false; saw = 0; goto gave_up }
           fi
        od;
        page = from;
        do
        :: atomic { page < from + pages && TAKEN(page) -> page++ }
        :: atomic { page < from + pages && !TAKEN(page) && FREE(page) -> get(page); page++ }
        :: atomic { page < from + pages && !TAKEN(page) && !FREE(page) -> break }
        :: atomic { page == from + pages -> page = 0; line_end = LINE_THEN; goto taken }
        od;
#ifndef KEEP_WORDS
        give_pages(from, page, WORD(id));
        if
        :: at > page -> give_pages(at, at + 1, LINE_LATER)
        :: else
        fi;
        line_end = (line_end < LINE_FROM(page) -> LINE_FROM(page) : line_end);
#ifndef RESERVE_ALL
        leave_line(page + 1);
#endif
#endif
        atomic { at = page; page = 0 }; /* those before it are reserved */
        goto around;
taken:
#if DRAINS && !defined(COUNT_LAST)
        leases[PROCESS(id)]++;
#endif
#ifndef LEASE_LOOK_FIRST
        atomic { looked[0] = mask[0]; looked[LAST] = mask[LAST] };
#endif
        do
        :: atomic { entry < ENTRIES && IN_THE_WAY(entry) -> break }
        :: atomic { entry < ENTRIES && !IN_THE_WAY(entry) -> looked[entry] = false; entry++ }
        :: atomic { entry == ENTRIES -> entry = 0; goto H2_open }
        od;
        atomic {
#if !PATIENCE && !CRASHES
            assert(closer[entry] == 0 || let[closer[entry] - 1] != id + 1); /* who has a ticket goes first */
#endif
            looked[0] = false; looked[LAST] = false };
        give_pages(from, from + pages, 0);
#if DRAINS && !defined(COUNT_LAST)
        uncounts();
#endif
        take_ticket();
        if
        :: GONE(closer[entry]) -> bury(entry)
        :: atomic { closer[entry] != 0 && !GONE(closer[entry]) -> wanted[entry] = true; saw = closer[entry] };
           LIE_DOWN(ENTRY(entry), closer[entry] == saw && wanted[entry], saw);
           if
           :: atomic { bed[id] == 0 -> saw = 0 }
           :: atomic { BACKED && bed[id] != 0 && (closer[entry] != saw || GONE(saw) || PASSES(entry)) ->
                  GET_UP; saw = 0 }
           :: atomic { PATIENCE && bed[id] != 0 && outer_pages != 0 && !late -> GET_UP; saw = 0; late = true }
           :: atomic { timeouts < TIMEOUTS -> timeouts++; GET_UP; saw = 0; entry = 0; goto gave_up }
           fi
        :: closer[entry] == 0
        fi;
        entry = 0;
        goto again;
H2_open:
#if DRAINS && defined(COUNT_LAST)
        leases[PROCESS(id)]++;
#endif
        give_ticket();
        atomic {
            page = from;
            do
            :: page < from + pages ->
                assert(inside[page] == 0);                                /* one holder */
                assert(!opened || !IN(page, opened_first, opened_count)); /* and no change */
                assert(!drained);
                assert(!dirty[page] || was[page] != 0); /* who died here is not forgotten */
                dirty[page] = false;
                inside[page] = id + 1;
                was[page] = 0;
                page++
            :: else -> break
            od;
            page = 0; line_end = 0; absent = 0; late = false; at = 0 };
#if INNER
        if
        :: atomic { inner != NOTHING && outer_pages == 0 && INNER != CHANGE ->
               outer = from; outer_pages = pages; from = INNER_OF(id); pages = 1; goto again }
        :: atomic { INNER == CHANGE && inner != NOTHING };
#if INNER == CHANGE
            make_change(1, 1, true);
#endif
            skip
        :: atomic { outer_pages != 0 || inner == NOTHING } /* of two it gives either back first */
        :: atomic { outer_pages != 0 -> i = outer; outer = from; from = i; i = 0 }
        fi;
#endif
H3_close:
        atomic {
            page = from;
            do
            :: page < from + pages -> inside[page] = 0; page++
            :: else -> break
            od;
            page = 0 };
H4_release:
        give_pages(from, from + pages, 0);
#if DRAINS
        uncounts();
#endif
        if
        :: atomic { outer_pages != 0 -> from = outer; pages = outer_pages; outer = 0; outer_pages = 0; goto H3_close }
#if WIDE > 1
        :: atomic { outer_pages == 0 && inner == AGAIN -> inner = NOTHING; from = 1; goto again }
#endif
        :: atomic { outer_pages == 0 && inner != AGAIN -> goto returned }
        fi;
gave_up:
        leave_line(from);
        give_ticket();
        if
        :: atomic { outer_pages != 0 -> from = outer; pages = outer_pages; outer = 0; outer_pages = 0; goto H3_close }
        :: atomic { outer_pages == 0 }
        fi;
returned:
        skip
    } unless { !alive[PROCESS(id)] || stopped[id] }
}

/* -- Fate ---------------------------------------------------------------------------------------------------- */

/* What it held is left in the middle of a write. */
#define STRUCK(id, page)                                                                                           \
    dirty[page] = (dirty[page] || inside[page] == (id) + 1);                                                       \
    inside[page] = (inside[page] == (id) + 1 -> 0 : inside[page])
#define GONE_FROM(id)                                                                                              \
    bed[id] = 0; watch[id] = 0;                                                                                    \
    STRUCK(id, 0); STRUCK(id, 1); STRUCK(id, PAGES - 1)

inline dies(process)
{
    atomic { crashes < CRASHES && alive[process] ->
        crashes++;
        alive[process] = false;
        drained = (drained && process < ACTORS - DRAINS);
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

/* Where it sleeps: who wakes it then has woken nobody. */
inline stops_waiting(id)
{
    atomic { stops < STOPS && alive[id] && !stopped[id] && bed[id] != 0 &&
             inside[0] != (id) + 1 && inside[1] != (id) + 1 && inside[PAGES - 1] != (id) + 1 ->
        stops++;
        stopped[id] = true }
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
#if INNER == LEASE
        run taker(0, 1, 1, LEASE);
#elif INNER == CHANGE || INNER == CIRCLE
        run taker(0, 0, 1, INNER);
#else
        run taker(0, (WIDE > 0 -> 0 : 1), (WIDE > 0 -> 2 : 1), NOTHING);
#endif
#if TAKERS > 1
#if INNER == CIRCLE
        run taker(1, 1, 1, INNER);
#else
        run taker(1, (WIDE > 1 -> 0 : 1), (WIDE > 1 -> 2 : 1), NOTHING);
#endif
#endif
#if TAKERS > 2
        run taker(2, (WIDE > 1 -> 0 : 1), 1, (WIDE > 1 -> AGAIN : NOTHING));
#endif
#if CHANGES > 0
#if WIDE == 0
        run change(TAKERS, 1, 1);
#else
        run change(TAKERS, PAGES - 2, 2);
#endif
#endif
#if CHANGES > 1
        run change(TAKERS + 1, 1, 1);
#endif
#if DRAINS
        run drain(TAKERS + CHANGES)
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
    :: stops_waiting(0)
#if TAKERS > 1
    :: stops_waiting(1)
#endif
    :: break
    od
}
