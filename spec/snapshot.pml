/* snapshot.pml - one moment of all participants: who protects, who saves, who stores, and who dies.
 *
 * Lives here: a snapshot of ext/operations/snapshot.c, from its preparation to its end, and who keeps off its
 * moment (ext/hold/lease.c, ext/operations/dirty.c): a snapshotter, two participants that store, each with its
 * agent, and one who reads the image.  Pages that all may write are stored to through page tables;
 * others by leases of a thread of participant 1, or by participant 0, which has the region frozen
 * and restores them.
 * Assertions: what is read of the image is what the data was when the snapshot's moment was told;
 * nobody was in the middle of a lease, or of restoring, then.  Who waits for ever, or may not store
 * any more, is an invalid end state.
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
 *    STORES of each participant to page 0, which all may write; with LEASES of participant 0 alone
 *    LEASES of page 1, one after the other, by one thread of participant 1; NESTED 1: when it has
 *    the first it takes page 0 as well, and another thread gives back the first
 *    RESTORES of both pages at once
 *    READER 1: somebody reads the image as C does; 0: it is looked at whenever something is stored
 *    PATIENCE 0: who waits for a moment waits for ever; 1: it gives the snapshot up, at any time
 *    CRASHES: so many die, anywhere, of the snapshotter and the participants
 * Broken on purpose: one #ifdef each, explained in run.py.
 * Not here: who asks what is dirty (dirty.pml).
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
byte told;         /* its generation: */
#define NOT_YET 0
#define COME 1
#define NEVER 2 /* PS_NO_MOMENT */
byte dirty;
byte state[2], data[2], area[2];
byte generation, acknowledged[2];
bool closer;
byte leases[2], saving; /* of each participant; of both, added up */
bool lock;

/* -- What belongs to the processes ------------------------------------------------------------------------------ */

bool alive[2], snapshotter;
bool tables[2]; /* page locks */
bool open[2];   /* page 0 may be written, by the page tables of each */
byte held;      /* leases of participant 1's one thread that takes any */
bool handed;    /* the first one is another thread's to give back */

/* -- Ghosts ----------------------------------------------------------------------------------------------------- */

byte stores, crashes, moment[2];
byte counted[2]; /* what each has of `saving`, which does not count of the dead */
byte inside[2];  /* leases, or restoring, from the first store on to the last */

#define LOST (!snapshotter) /* its byte is free */
#define ALLOWED (word == FREE || word == COMPLETE || state[0] == SAVED || (word == PREPARING && state[0] == DIRTY))
#define QUIET(p) (leases[p] == 0 || !alive[p])
#define IMAGE_LIVES (snapshotter && (word == ACTIVE || word == COMPLETE) && told == COME)
#define IMAGE(page) (word == COMPLETE || state[page] == SAVED -> area[page] : data[page])
#define TRUE(page) (!IMAGE_LIVES || IMAGE(page) == moment[page])

#if STORES
#define ARRIVED (acknowledged[0] == generation || !alive[0]) && (acknowledged[1] == generation || !alive[1])
#else
#define ARRIVED true /* nobody has page tables that are to be changed */
#endif

/* -- Saving ----------------------------------------------------------------------------------------------------- */

inline keep(page) {
    copied = data[page];
    if
    :: state[page] == SAVED
    :: else ->
        atomic { area[page] = copied; assert(TRUE(page)) };
S6_save:
        atomic { state[page] = SAVED; assert(TRUE(page)) }
    fi;
    copied = 0
}

/* One word says whether the moment came; it may be that of another snapshot by now, which is taken again then. */
inline give_up() {
#ifdef MOMENT_BY_LOOK
    right = true;
#else
    d_step {
        right = told != COME;
        if :: told == NOT_YET -> told = NEVER :: else fi
    };
#endif
    d_step {
        if
        :: right && word == found && serial == mine -> assert(told != COME); word = FREE
        :: else
        fi;
        right = false
    }
}

inline save(p, page) {
    atomic { found = word; mine = serial };
    if
    :: found != ACTIVE || state[page] == SAVED
    :: else ->
#ifndef MOMENT_NOWAIT
        if
        :: told == COME || word != found || serial != mine
        :: (PATIENCE || LOST) && word == found && serial == mine && told != COME -> give_up()
        fi;
#endif
        atomic { saving++; counted[p]++ };
        if
        :: word == ACTIVE && serial == mine -> keep(page)
        :: else
        fi;
        atomic { saving--; counted[p]-- }
    fi;
    d_step { found = 0; mine = 0 }
}

inline store(page) {
    atomic { stores++; data[page] = stores; assert(TRUE(page)) }
}

/* -- Pages that all may write ----------------------------------------------------------------------------------- */

/* CAS; it counts before, so that nobody opens a page that is DIRTY and not counted yet. */
inline make_dirty() {
    dirty++;
    d_step { if :: state[0] == UNSAVED -> state[0] = DIRTY :: else fi }
}

inline tell_dirty(p) {
    atomic { found = word; mine = serial };
    if
    :: found != PREPARING || state[0] != UNSAVED
    :: else ->
#ifdef DIRTY_UNCOUNTED
        make_dirty()
#else
        atomic { saving++; counted[p]++ };
        if
        :: word == PREPARING && serial == mine -> make_dirty()
        :: else
        fi;
        atomic { saving--; counted[p]-- }
#endif
    fi;
    d_step { found = 0; mine = 0 }
}

/* The handler, and what the instruction finds when it runs again. */
inline store_shared(p) {
    do
    :: atomic { open[p] -> store(0); break }
    :: !open[p] ->
        tell_dirty(p);
        save(p, 0);
        atomic { !tables[p] -> tables[p] = true };
        right = ALLOWED;
        d_step { open[p] = right; right = false };
        tables[p] = false
    od
}

proctype sharer(byte p) {
    byte found, mine, copied, left = STORES;
    bool right;
    {
        do
        :: left > 0 -> store_shared(p); left--
        :: else -> break
        od
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

/* -- Leases ----------------------------------------------------------------------------------------------------- */

#if defined(HOLDS_TAKING)
#define HOLDS (held > 0 || left < LEASES - 1) /* the words of a page that it had before are its own again */
#else
#define HOLDS (held > 0)
#endif

/* Who finds a closer's owner gone clears it. */
inline take(page) {
    do
    ::
#ifdef HOLDS_FIRST
        passes = HOLDS;
        leases[1]++;
        right = closer && !LOST && !passes;
        passes = false;
#else
        leases[1]++;
        right = closer && !LOST;
        right = right && !HOLDS;
#endif
        if
        :: !right -> break
        :: else -> right = false; leases[1]--; (!closer || LOST)
        fi
    od;
    save(1, page);
    atomic { held++; inside[1]++ }
}

inline give() {
#ifdef SLOT_FIRST
    atomic { inside[1]--; leases[1]-- };
    held--
#else
    atomic { inside[1]--; held-- };
    leases[1]--
#endif
}

proctype taker() {
    byte found, mine, copied, left = LEASES;
    bool right;
#ifdef HOLDS_FIRST
    bool passes;
#endif
    {
        do
        :: left > 0 ->
            left--;
            take(1);
            store(1);
            if
            :: NESTED && left == LEASES - 1 -> handed = true; take(0); store(0)
            :: !(NESTED && left == LEASES - 1)
            fi;
            give()
        :: else -> break
        od
    } unless { !alive[1] }
}

/* Another thread of the same process. */
proctype giver() {
end:
    {
        handed;
        store(1);
        give()
    } unless { !alive[1] }
}

/* -- Restoring -------------------------------------------------------------------------------------------------- */

proctype restorer() {
    byte found, mine, copied, left = RESTORES;
    bool right;
    {
        do
        :: left > 0 ->
            left--;
#ifndef RESTORE_UNCOUNTED
            do
            :: leases[0]++;
                right = closer && !LOST;
                if
                :: !right -> break
                :: else -> right = false; leases[0]--; (!closer || LOST)
                fi
            od;
#endif
            save(0, 0);
            save(0, 1);
P1_put:     inside[0]++;
            store(0);
            store(1);
            inside[0]--;
#ifndef RESTORE_UNCOUNTED
            leases[0]--
#endif
        :: else -> break
        od
    } unless { !alive[0] }
}

/* -- The snapshotter -------------------------------------------------------------------------------------------- */

proctype takes() {
    byte copied, left = ROUNDS;
    {
        do
        :: left > 0 ->
            left--;
            atomic { !lock -> lock = true };
            (saving == counted[0] * (1 - alive[0]) + counted[1] * (1 - alive[1])); /* of the dead does not count */
            d_step { state[0] = UNSAVED; state[1] = UNSAVED; area[0] = 0; area[1] = 0; told = NOT_YET; dirty = 0 };
S1_prepare: atomic { word = PREPARING; serial++ };
            generation++;
S2_protect: (ARRIVED);
            lock = false;
            closer = true;
            QUIET(0);
            QUIET(1);
S3_drain:   atomic { !lock -> lock = true };
#ifdef DIRTY_LOOK_FIRST
            copied = dirty;
            word = ACTIVE;
#else
            word = ACTIVE;
            copied = dirty;
#endif
S4_active:  if
            :: copied > 0 -> copied = 0; generation++; (ARRIVED)
            :: else
            fi;
            atomic {
                if
#ifdef GIVEN_UP_UNSEEN
                :: true ->
#else
                :: told == NOT_YET ->
#endif
                    told = COME; moment[0] = data[0]; moment[1] = data[1];
                    assert((inside[0] == 0 || !alive[0]) && (inside[1] == 0 || !alive[1]))
                :: else /* it was given up */
                fi };
S5_open:    closer = false;
            lock = false;
            if
            :: told == COME -> keep(0); keep(1);
S7_complete:    atomic { word = COMPLETE; assert(TRUE(0) && TRUE(1)) }
            :: skip
            fi;
            atomic { word = FREE; told = NOT_YET }; /* closed: its byte goes, and whoever looks frees the word */
            generation++ /* page tables follow, nobody waits */
        :: else -> break
        od
    } unless { !snapshotter }
}

/* -- Who reads -------------------------------------------------------------------------------------------------- */

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
#if STORES
        run sharer(0); run agent(0); run agent(1);
#if !LEASES
        run sharer(1);
#endif
#endif
#if LEASES
        run taker();
#if NESTED
        run giver();
#endif
#endif
#if RESTORES
        run restorer();
#endif
#if READER
        run reader();
#endif
        run takes()
    };
#if CRASHES
end:
    do
    :: atomic { crashes < CRASHES && snapshotter -> crashes++; snapshotter = false; lock = false }
    :: atomic { crashes < CRASHES && alive[0] -> crashes++; alive[0] = false; tables[0] = false }
    :: atomic { crashes < CRASHES && alive[1] -> crashes++; alive[1] = false; tables[1] = false }
    :: break
    od
#endif
}
