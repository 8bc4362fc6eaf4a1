/* dirty.pml - which pages may have been written since a moment, asked while their traces move.
 *
 * Lives here: the look of ext/operations/dirty.c at one page, and who writes that page meanwhile: the holder
 * of a lease, everybody until a change makes it READ, or one who restores it to zero.  Changes as
 * such are in protocol.pml, leases in lease.pml.
 * Assertion: what was written before the look began is found.
 *
 * Reading it
 *  - A statement is one load, store or atomic operation of C, or one system call.  The labels
 *    are those of the crash points in C.
 *  - What stands under "Ghosts" exists for the assertion only.
 * Configuration, by -D (run.py has the table)
 *    LEASES of the page, one after the other; CHANGES 1: it was READ_WRITE, and becomes READ;
 *    RESTORES to zero
 * Broken on purpose: one #ifdef each, explained in run.py.
 */

#define SINCE 1 /* the generation of the moment */

/* -- The control segment, and the memfd ------------------------------------------------------------------------- */

byte generation = SINCE, attempt = SINCE, complete = SINCE;
bool ring;     /* the entry of the next generation */
bool writable; /* the page, by the map */
bool word;     /* somebody has it leased */
byte stamp;
bool hole;

/* -- Ghosts ------------------------------------------------------------------------------------------------------ */

bool written; /* since the moment */

/* -- Who writes -------------------------------------------------------------------------------------------------- */

proctype holder() {
    byte left = LEASES;
    do
    :: left > 0 ->
        left--;
        atomic { !word -> word = true };
        atomic { written = true; hole = false };
        stamp = generation;
        word = false
    :: else -> break
    od
}

/* Somebody stores until the change has reached its page tables. */
proctype sharer() {
    if
    :: atomic { complete == SINCE -> written = true; hole = false }
    :: skip
    fi
}

proctype change() {
    attempt = SINCE + 1;
    writable = false;
    ring = true;
    generation = SINCE + 1;
    complete = SINCE + 1
}

proctype restorer() {
    byte left = RESTORES;
    do
    :: left > 0 ->
        left--;
P1_put: stamp = generation;
        atomic { written = true; hole = true }
    :: else -> break
    od
}

/* -- Who asks ---------------------------------------------------------------------------------------------------- */

#define LOOK_HOLE unwritten = hole
#define LOOK_WORD leased = leased || word
#define LOOK_STAMP leased = leased || stamp >= SINCE
#define LOOK_MAP shared = shared || writable
#define LOOK_RECORD shared = shared || (attempt > SINCE && complete < attempt)
#define LOOK_RING if :: generation > SINCE -> shared = shared || ring :: else fi

proctype asker() {
    bool before, unwritten, leased, shared;
    before = written;
#ifdef HOLE_LAST
    skip;
#else
    LOOK_HOLE;
#endif
D1_look:
#ifdef STAMP_FIRST
    LOOK_STAMP;
    LOOK_WORD;
#else
    LOOK_WORD;
    LOOK_STAMP;
#endif
#if defined(RING_FIRST)
    LOOK_RECORD;
    LOOK_RING;
    LOOK_MAP;
#elif defined(RECORD_LAST)
    LOOK_MAP;
    LOOK_RING;
    LOOK_RECORD;
#else
    LOOK_MAP;
    LOOK_RECORD;
    LOOK_RING;
#endif
#ifdef HOLE_LAST
    LOOK_HOLE;
#endif
#ifdef HOLE_UNWRITTEN
    assert(!before || ((leased || shared) && !unwritten))
#else
    assert(!before || leased || (shared && !unwritten))
#endif
}

init {
    atomic {
        writable = CHANGES;
        hole = !CHANGES;
#if LEASES
        run holder();
#endif
#if CHANGES
        run sharer();
        run change();
#endif
#if RESTORES
        run restorer();
#endif
        run asker()
    }
}
