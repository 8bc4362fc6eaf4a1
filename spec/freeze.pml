/* freeze.pml - who has everything READ, who puts it back, and who waits for that.
 *
 * Lives here: the freezer's word, `frozen` and the kept map of ext/change/freezer.c and ext/segment/layout.h;
 * freezers, changes and takers of leases that come across them, and a fate that kills.
 * What a change does to page tables is in protocol.pml; how a taker and a closer see each
 * other, and who sleeps until when, in lease.pml: here waiting is a guard, taking one step.
 * Assertions name what they check; who waits for ever is an invalid end state.
 *
 * Reading it
 *  - A statement is one load, store or atomic operation of C. The labels are those of the
 *    crash points in C.
 *  - An entry of the closers belongs to one actor here; a word is an actor's id + 1.
 *  - What stands under "Ghosts" exists for the assertions only.
 * Configuration, by -D (run.py has the table)
 *    FREEZERS, 1 or 2; CHANGES of one page, TAKERS of a lease on one page, 0 or 1 each
 *    CRASHES, TIMEOUTS, FAILURES: at most so many
 * Broken on purpose: one #ifdef each, explained in run.py.
 */

#define PAGES 2
#define ACTORS (FREEZERS + CHANGES + TAKERS) /* in this order, at most 4; and one that looks at the end */
#define WORD(id) ((id) + 1)
#define GONE(word) ((word) != 0 && !alive[(word) - 1])

#define NONE 0
#define READ 1
#define READ_WRITE 3

/* -- The control segment ------------------------------------------------------------------------------------- */

byte lock;
byte freezer;
bool frozen;
byte map[PAGES], kept[PAGES], old[PAGES];

mtype = { CHANGE, FREEZE, UNDO, THAW }
bool opened; /* the record */
mtype kind;
byte changed, becomes; /* of a CHANGE */

byte closer[4]; /* by actor: of a freezer over both pages, of a change over its own */
byte holder[PAGES];      /* of a lease */

#define LOCK_FREE (lock == 0 || GONE(lock))
#define VACANT(page) (holder[page] == 0 || GONE(holder[page]))
#define CHANGED 1        /* the page that changes and leases are after: every entry is over it */

/* -- What went wrong so far ---------------------------------------------------------------------------------- */

bool alive[5];
byte crashes, timeouts, failures;

/* -- Ghosts -------------------------------------------------------------------------------------------------- */

byte wanted[PAGES]; /* the map, were nothing frozen */
bool through[4];

/* -- The record ---------------------------------------------------------------------------------------------- */

/* To its end, whoever began it. */
inline settle()
{
    if
    :: kind == CHANGE -> map[changed] = becomes
    :: kind == FREEZE ->
        map[0] = READ;
        map[1] = READ;
        if
        :: atomic { failures < FAILURES -> failures++; kind = UNDO }
        :: true
        fi
    :: kind == THAW ->
        map[0] = kept[0];
        map[1] = kept[1]
    :: kind == UNDO
    fi;
    if
    :: kind == UNDO ->
        map[0] = old[0];
        map[1] = old[1]
    :: else
    fi;
    opened = false
}

inline finish()
{
    if
    :: opened -> settle()
    :: else
    fi
}

inline take_lock()
{
    atomic { LOCK_FREE -> lock = WORD(id) };
    finish()
}

/* -- The freeze ---------------------------------------------------------------------------------------------- */

/* With the lock. */
inline thaw()
{
    d_step { old[0] = map[0]; old[1] = map[1]; kind = THAW; opened = true };
    settle();
    frozen = false
}

/* With the freezer's word, wherever its owner, or a dead one, came to. */
inline end_freeze()
{
#ifdef WORD_FIRST
    freezer = 0;
#endif
    take_lock();
    if
    :: frozen -> thaw()
    :: else
    fi;
    lock = 0
}

/* One of those who find it dead takes the word over; the others wait for that one. */
inline bury_freezer()
{
    if
#ifdef THAW_TWICE
    :: GONE(freezer) -> end_freeze(); freezer = 0
#else
    :: atomic { GONE(freezer) -> freezer = WORD(id) }; end_freeze(); freezer = 0
#endif
    :: atomic { !GONE(freezer) -> skip }
    fi
}

/* What every call begins with; nobody need notice. */
inline ready()
{
    if
    :: GONE(freezer) -> bury_freezer()
    :: true
    fi
}

/* The entry of a dead one: its freeze and its record come first. */
inline bury_closer(entry)
{
    if
    :: atomic { GONE(closer[entry]) -> closer[entry] = WORD(id) };
#ifndef CLOSER_FIRST
       do
       :: frozen && GONE(freezer) -> bury_freezer()
       :: !frozen -> break
       od;
#endif
       if
       :: opened -> take_lock(); lock = 0
       :: else
       fi;
       closer[entry] = 0
    :: atomic { !GONE(closer[entry]) -> skip }
    fi
}

#define READ_ONLY (map[0] == READ && map[1] == READ)

proctype freezes(byte id)
{
    {
        do
        :: atomic { freezer == 0 -> freezer = WORD(id) }; break
        :: GONE(freezer) -> bury_freezer()
        :: atomic { timeouts < TIMEOUTS -> timeouts++; goto returned }
        od;
F1_own:
        closer[id] = WORD(id);
        if
        :: VACANT(0) && VACANT(1)
        :: atomic { timeouts < TIMEOUTS -> timeouts++; goto gave_up }
        fi;
        take_lock();
#ifdef KEEP_LATE
        d_step { old[0] = map[0]; old[1] = map[1]; kind = FREEZE; opened = true };
#endif
F2_keep:
        kept[0] = map[0];
        kept[1] = map[1];
F3_freeze:
#ifdef FROZEN_LATE
        d_step { old[0] = map[0]; old[1] = map[1]; kind = FREEZE; opened = true };
        settle();
        frozen = true;
#else
        frozen = true;
#ifndef KEEP_LATE
        d_step { old[0] = map[0]; old[1] = map[1]; kind = FREEZE; opened = true };
#endif
        settle();
#endif
        if
        :: kind == UNDO -> frozen = false; lock = 0; goto gave_up
        :: atomic { kind == FREEZE && timeouts < TIMEOUTS -> timeouts++ }; thaw(); lock = 0; goto gave_up
        :: kind == FREEZE -> lock = 0
        fi;
        assert(READ_ONLY && frozen && freezer == WORD(id)); /* all that time */
        assert(READ_ONLY && frozen && freezer == WORD(id));
F4_thaw:
        end_freeze();
gave_up:
F5_clear:
        freezer = 0;
        closer[id] = 0;
returned:
        through[id] = true
    } unless { !alive[id] }
}

/* -- Who comes across it ------------------------------------------------------------------------------------- */

proctype changes(byte id)
{
    {
        ready();
        closer[id] = WORD(id);
        VACANT(CHANGED);
again:
        take_lock();
#ifndef CHANGE_BLIND
        if
        :: frozen ->
            assert(freezer != 0);
            lock = 0;
            if
            :: freezer == 0
            :: GONE(freezer) -> bury_freezer()
            :: atomic { timeouts < TIMEOUTS -> timeouts++; goto gave_up }
            fi;
            goto again
        :: else
        fi;
#endif
        d_step {
            old[0] = map[0]; old[1] = map[1];
            kind = CHANGE; changed = CHANGED; becomes = READ_WRITE; opened = true;
            wanted[CHANGED] = READ_WRITE };
        settle();
        lock = 0;
gave_up:
        closer[id] = 0;
        through[id] = true
    } unless { !alive[id] }
}

#define CLOSED (closer[0] != 0 || closer[1] != 0 || closer[2] != 0 || closer[3] != 0)

proctype takes(byte id)
{
    {
        ready();
        do
        :: atomic { VACANT(CHANGED) && !CLOSED -> holder[CHANGED] = WORD(id); break }
        :: GONE(closer[0]) -> bury_closer(0)
        :: GONE(closer[1]) -> bury_closer(1)
        :: GONE(closer[2]) -> bury_closer(2)
        :: atomic { timeouts < TIMEOUTS -> timeouts++; goto gave_up }
        od;
        assert(!frozen && map[CHANGED] == wanted[CHANGED]); /* a lease is over what the page is, not over a freeze */
        assert(!frozen && map[CHANGED] == wanted[CHANGED]);
        holder[CHANGED] = 0;
gave_up:
        through[id] = true
    } unless { !alive[id] }
}

/* -- Fate ---------------------------------------------------------------------------------------------------- */

#define QUIET(id) ((id) >= ACTORS || through[id] || !alive[id])

#define DIES(process)                                                                                              \
    atomic { crashes < CRASHES && alive[process] -> crashes++; alive[process] = false }

/* Whoever calls at last finds exactly what was. */
proctype looks(byte id)
{
    QUIET(0) && QUIET(1) && QUIET(2) && QUIET(3);
    if
    :: GONE(freezer) -> bury_freezer()
    :: else
    fi;
    take_lock();
    assert(!frozen && map[0] == wanted[0] && map[1] == wanted[1]);
    assert(freezer == 0)
}

init
{
    atomic {
        byte each;
        for (each : 0 .. ACTORS) { alive[each] = true }
        map[0] = NONE; wanted[0] = NONE;
        map[1] = READ; wanted[1] = READ;
        run looks(ACTORS);
        run freezes(0);
#if FREEZERS > 1
        run freezes(1);
#endif
#if CHANGES > 0
        run changes(FREEZERS);
#endif
#if TAKERS > 0
        run takes(FREEZERS + CHANGES)
#endif
    };
    do
    :: DIES(0)
#if ACTORS > 1
    :: DIES(1)
#endif
#if ACTORS > 2
    :: DIES(2)
#endif
#if ACTORS > 3
    :: DIES(3)
#endif
    :: break
    od
}
