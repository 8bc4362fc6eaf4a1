/* snapshot.pml - one moment of all participants: who protects, who saves, who stores, and who dies.
 *
 * Lives here: a snapshot of ext/snapshot.c, from its preparation to its end: a snapshotter, two
 * participants that store, each with its agent, and one who reads the image.  Page 0 may be
 * written by all; page 1 is READ, and written by a lease.
 * Not here: who restores pages (P1_put), and who asks what is dirty (D1_look).
 * Assertion: what is read of the image is what the data was when the snapshot's moment was told;
 * who waits for ever, or may not store any more, is an invalid end state.
 *
 * Reading it
 *  - A statement is one load, store or atomic operation of C, or one system call.  The labels
 *    are those of the crash points in C.
 *  - Who waits for a condition finds out that it holds: the futexes are left out.
 *  - `tables[p]` is the page lock of a participant: its own page tables change under it only.
 *  - A page's content is a number that no other store has.
 *  - What stands under "Ghosts" exists for the assertions only.
 * Configuration, by -D (run.py has the table)
 *    ROUNDS: so many snapshots one after the other, in the same area
 *    STORES of each participant to page 0; LEASES 1: the second one leases page 1 instead
 *    CRASHES: the snapshotter dies anywhere, or participant 0
 * Broken on purpose: one #ifdef each, explained in run.py.
 */

#define FREE 0
#define PREPARING 1
#define ACTIVE 2
#define COMPLETE 3
#define UNSAVED 0
#define DIRTY 1
#define SAVED 2

/* -- The control segment, the data and the area ---------------------------------------------------------------- */

byte word, serial; /* two halves of one word, always loaded and stored together */
bool told;         /* its generation is not 0 */
byte dirty;
byte state[2], data[2], area[2];
byte generation, acknowledged[2];
bool closer;
byte leases, saving; /* of participant 1, who alone leases; of both, added up */
bool lock;

/* -- What belongs to the processes ------------------------------------------------------------------------------ */

bool alive[2], snapshotter;
bool tables[2]; /* page locks */
bool open[2];   /* page 0 may be written, by the page tables of each */

/* -- Ghosts ----------------------------------------------------------------------------------------------------- */

byte stores, crashes, moment[2];
byte counted[2]; /* what each has of `saving`, which does not count of the dead */

#define LOST (!snapshotter) /* its byte is free */
#define ALLOWED (word == FREE || word == COMPLETE || state[0] == SAVED || (word == PREPARING && state[0] == DIRTY))
#define ARRIVED(p) (!alive[p] || acknowledged[p] == generation)
#define IMAGE_LIVES (snapshotter && (word == ACTIVE || word == COMPLETE) && told)

/* -- Saving ----------------------------------------------------------------------------------------------------- */

inline save(p, page) {
    atomic { found = word; mine = serial };
    if
    :: found != ACTIVE || state[page] == SAVED
    :: else ->
#ifndef MOMENT_NOWAIT
        if
        :: told || word != found || serial != mine
        :: atomic { LOST && word == found && serial == mine && !told -> word = FREE } /* nobody waits for the dead */
        fi;
#endif
        atomic { saving++; counted[p]++ };
        if
        :: atomic { word == ACTIVE && serial == mine ->
skip };
            copied = data[page];
            if
            :: state[page] == SAVED
            :: else ->
                area[page] = copied;
S6_save:        state[page] = SAVED
            fi
        :: atomic { else -> skip }
        fi;
        atomic { saving--; counted[p]-- }
    fi;
    d_step { found = 0; mine = 0; copied = 0 }
}

/* -- A participant ---------------------------------------------------------------------------------------------- */

/* The handler, and what the instruction finds when it runs again. */
inline store_shared(p) {
    do
    :: atomic { open[p] -> stores++; data[0] = stores; break }
    :: !open[p] ->
        if
        :: word == PREPARING && state[0] == UNSAVED ->
            dirty++;
            d_step { if :: state[0] == UNSAVED -> state[0] = DIRTY :: else fi } /* CAS */
        :: else
        fi;
        save(p, 0);
        atomic { !tables[p] -> tables[p] = true };
        right = ALLOWED;
        d_step { open[p] = right; right = false };
        tables[p] = false
    od
}

inline store_leased() {
    do
    ::
        leases++;
        right = closer && !LOST; /* who finds a closer's owner gone clears it */
        if
        :: !right -> break
        :: else -> leases--; (!closer || LOST)
        fi
    od;
    save(1, 1);
    atomic { stores++; data[1] = stores };
    leases--
}

proctype participant(byte p) {
    byte found, mine, copied, left = STORES;
    bool right;
    {
        if
#if LEASES
        :: p == 1 -> store_leased()
#endif
        :: p < 2 - LEASES ->
            do
            :: left > 0 -> store_shared(p); left--
            :: else -> break
            od
        fi
    } unless { !alive[p] }
}

proctype agent(byte p) {
    byte seen;
    bool right;
end:
    do
    :: atomic { alive[p] && acknowledged[p] != generation && !tables[p] -> tables[p] = true; seen = generation };
        right = ALLOWED;
        d_step { open[p] = right; right = false };
        d_step { acknowledged[p] = seen; seen = 0; tables[p] = false }
    od unless { !alive[p] }
}

/* -- The snapshotter -------------------------------------------------------------------------------------------- */

inline eager(page) {
    copied = data[page];
    if
    :: state[page] == SAVED
    :: else -> area[page] = copied; state[page] = SAVED
    fi;
    copied = 0
}

proctype takes() {
    byte copied, left = ROUNDS;
    {
        do
        :: left > 0 ->
            left--;
            atomic { !lock -> lock = true };
            (saving == counted[0] * (1 - alive[0]) + counted[1] * (1 - alive[1])); /* of the dead does not count */
            d_step { state[0] = UNSAVED; state[1] = UNSAVED; area[0] = 0; area[1] = 0; told = false; dirty = 0 };
S1_prepare: atomic { word = PREPARING; serial++ };
            generation++;
S2_protect: (ARRIVED(0) && ARRIVED(1));
            lock = false;
            closer = true;
S3_drain:   (leases == 0 || !alive[1]);
            atomic { !lock -> lock = true };
#ifdef DIRTY_LOOK_FIRST
            copied = dirty;
            word = ACTIVE;
#else
            word = ACTIVE;
            copied = dirty;
#endif
S4_active:  if
            :: copied > 0 -> copied = 0; generation++; (ARRIVED(0) && ARRIVED(1))
            :: else
            fi;
            atomic { told = true; moment[0] = data[0]; moment[1] = data[1] };
S5_open:    closer = false;
            lock = false;
            if
            :: eager(0); eager(1);
S7_complete:    word = COMPLETE
            :: skip
            fi;
            atomic { word = FREE; told = false }; /* closed: its byte goes, and whoever looks frees the word */
            generation++ /* page tables follow, nobody waits */
        :: else -> break
        od
    } unless { !snapshotter }
}

proctype reader() {
    byte got, mine, page;
    if
    :: page = 0
    :: page = 1
    fi;
end:
    atomic { IMAGE_LIVES -> mine = serial };
    if
    :: word == COMPLETE || state[page] == SAVED -> got = area[page]
    :: else ->
        got = data[page];
        if
        :: word == COMPLETE || state[page] == SAVED -> got = area[page]
        :: else
        fi
    fi;
    assert(!IMAGE_LIVES || serial != mine || got == moment[page])
}

/* -- Fate ------------------------------------------------------------------------------------------------------- */

init {
    atomic {
        alive[0] = true; alive[1] = true; snapshotter = true;
        open[0] = true; open[1] = true;
        run participant(0); run participant(1);
        run agent(0); run agent(1);
        run takes();
        run reader()
    };
end:
    do
    :: atomic { crashes < CRASHES && snapshotter -> crashes++; snapshotter = false; lock = false }
    :: atomic { crashes < CRASHES && alive[0] -> crashes++; alive[0] = false; tables[0] = false }
    :: break
    od
}
