/* protocol.pml - how a change of protection reaches everybody, whoever fails or dies on the way.
 *
 * Lives here: the change of ext/change/change.c, with a caller that changes the page tables
 * of others where it can, the agent of ext/participant/agent.c, joining and leaving, and a fate
 * that kills.  The labels of steps are those of ARCHITECTURE.md.
 * Assertions name the promise that they check; an invalid end state, which Spin
 * finds by itself (somebody waits for ever), breaks promise 5.
 *
 * Reading it
 *  - A statement is one load or store of C, or one change of page tables.  Where more
 *    is one step, only one part of it is shared, or a comment says why.
 *  - `{ ... } unless { !alive }`: anybody may die between any two steps.
 *  - A caller has no mapping and an agent makes no calls.  In C they are one
 *    participant; here its death is two deaths, in any order.
 *  - What stands under "Ghosts" exists for the assertions only.
 * Configuration, by -D (run.py has the table)
 *    CALLERS 2 or 3; SECOND, FROM: what the second asks for, from which page on
 *    SLOTS for agents; FOUNDERS of them are live from the start
 *    REMOTE: whose page tables a caller can change itself, one bit a slot
 *    JOINS, LEAVES, CRASHES, TIMEOUTS, FAILURES (of an agent to apply), MISSES (of a
 *    caller, at a page of another), MENDS (of a page, by another thread): at most so many
 * Broken on purpose: one #ifdef each, explained in run.py.
 */

#define PAGES 2
#define IDS (SLOTS + CALLERS) /* agents first, then callers */
#define GENERATIONS 7         /* a caller makes two at most, its change and the undo; and 0 */

#define NONE 0
#define READ 1
#define READ_WRITE 3

#define FREE 0
#define JOINING 1
#define LIVE 2

#define SET 0
#define UNDO 1

/* -- The control segment ------------------------------------------------------------------------------------- */

byte cur[PAGES] = READ_WRITE, old[PAGES];
byte generation, attempt, complete;
byte kind, prot, first, count;
byte ring[GENERATIONS]; /* RING_ENTRY; 0: not written yet, or being written */
byte lock;              /* OWNER of the holder; 0: nobody */
byte status[SLOTS], ack[SLOTS], error[SLOTS]; /* error: of which generation; 0: none */
byte claim[SLOTS];      /* OWNER of who may make the page tables follow the map; 0: nobody */
byte applied[SLOTS];    /* acknowledged, in all bits: of no account here, because claimants believe `ack` */
byte epoch[IDS];

#define OPEN (complete < attempt)

#define ALL_PAGES 3 /* one bit a page */
#define RING_UNDO 4
#define RING_ENTRY(kind_) ((((1 << count) - 1) << first) | ((kind_) * RING_UNDO))

#ifdef NOEPOCH
#define OWNER(id) ((id) + 1)
#else
#define OWNER(id) (epoch[id] * IDS + (id) + 1)
#endif
#define OWNER_ID(word) (((word) - 1) % IDS)
#define OWNER_GONE(word) (!alive[OWNER_ID(word)] || OWNER(OWNER_ID(word)) != (word))
#define LOCK_FREE (lock == 0 || OWNER_GONE(lock))

/* -- What belongs to the processes --------------------------------------------------------------------------- */

bool alive[IDS];
byte rights[SLOTS * PAGES]; /* what the page tables allow */
byte fenced[SLOTS];         /* the whole mapping is no-access (FENCED), or gone (UNMAPPED) */
bool awake[SLOTS];          /* its agent will look at the generation again */

#define FENCED 1
#define UNMAPPED 2
#define CAPABLE(slot) ((REMOTE >> (slot) & 1) == 1)

#define RIGHTS(slot, page) rights[(slot) * PAGES + (page)]

/* -- What went wrong so far ---------------------------------------------------------------------------------- */

byte joins, leaves, crashes, timeouts, failures, misses, mends;

/* -- Ghosts -------------------------------------------------------------------------------------------------- */

byte map[PAGES] = READ_WRITE; /* what the closed changes make of the map */
byte goal[PAGES];             /* what the open change makes of it, unless it is undone */
bool settled = true;          /* no change is open, and somebody waited for everybody */
hidden byte each;             /* scratch of a single step */

#define MAP_KEPT (cur[0] == map[0] && cur[1] == map[1])
#define HARMLESS(slot, page) ((RIGHTS(slot, page) & ~cur[page]) == 0)
#define FOLLOWS(slot) (RIGHTS(slot, 0) == cur[0] && RIGHTS(slot, 1) == cur[1])
#define NOTHING(slot) (RIGHTS(slot, 0) == NONE && RIGHTS(slot, 1) == NONE)
/* What a change that returned owes for one slot: nothing that is forbidden (1), and all that is allowed (2)
 * or, in a fenced participant, nothing at all (4). */
#define EXACT(slot)                                                                                                \
    (HARMLESS(slot, 0) && HARMLESS(slot, 1) &&                                                                     \
     (status[slot] != LIVE || !alive[slot] || (fenced[slot] -> NOTHING(slot) : FOLLOWS(slot))))
/* 7: whom a change that timed out does not bind yet: it has not acknowledged, or is about to fence itself. */
#define LATE(slot) (ack[slot] != generation || error[slot] == generation)

#define CHECK_SLOTS(condition)                                                                                     \
    d_step {                                                                                                       \
        each = 0;                                                                                                  \
        do                                                                                                         \
        :: each < SLOTS -> assert(condition); each++                                                               \
        :: else -> break                                                                                           \
        od;                                                                                                        \
        each = 0 }

/* For C7 and U5: one step with what must be true then, before the next change begins. */
inline close(generation_)
{
    atomic {
        if
        :: generation_ == attempt -> map[0] = goal[0]; map[1] = goal[1]
        :: else
        fi;
        complete = generation_;
        settled = !silent;
        assert(MAP_KEPT); /* 4: undone whole; 5, 7: done whole */
        CHECK_SLOTS(EXACT(each) || (silent && LATE(each)))
    }
}

/* -- The claim ----------------------------------------------------------------------------------------------- */

/* Who is not capable has one actor at a time, under its page lock, and needs no claim. */
#ifdef NOTAKEOVER
#define CLAIM_FREE(slot) (claim[slot] == 0)
#else
#define CLAIM_FREE(slot) (claim[slot] == 0 || OWNER_GONE(claim[slot]))
#endif

#if defined(NOCLAIM)
#define MAY_FOLLOW(slot) true
#define CLAIMED(slot, owner) true
#define TAKE_CLAIM(slot) skip
#define GIVE_CLAIM(slot) skip
#else
#define MAY_FOLLOW(slot) (!CAPABLE(slot) || CLAIM_FREE(slot))
#define CLAIMED(slot, owner) (!CAPABLE(slot) || claim[slot] == (owner))
#define TAKE_CLAIM(slot) claim[slot] = (CAPABLE(slot) -> OWNER(slot) : 0)
#define GIVE_CLAIM(slot) claim[slot] = 0
#endif

#if defined(APPLIED_FIRST) || defined(APPLIED_LAST)
#define FOLLOWED(slot) applied[slot]
#define SAY_APPLIED(slot, generation_) applied[slot] = generation_
#else
#define FOLLOWED(slot) ack[slot]
#define SAY_APPLIED(slot, generation_) skip
#endif

/* -- Callers ------------------------------------------------------------------------------------------------- */

#define ACKNOWLEDGED(slot, generation_) (status[slot] != LIVE || !alive[slot] || ack[slot] >= generation_)
#define FAILED(slot, generation_) (status[slot] == LIVE && error[slot] == generation_)

/* Slot by slot: nobody becomes LIVE meanwhile, that takes the lock.  The error is stored before the
 * acknowledgement, so both may be read in one step.  One that reported and then died counts as failed or as
 * gone: that depends on who has marked it dead by then. */
inline await()
{
    slot = 0;
    do
    :: atomic { slot < SLOTS && ACKNOWLEDGED(slot, generation) ->
           if
           :: FAILED(slot, generation) -> refused = true
           :: !FAILED(slot, generation) || !alive[slot]
           fi;
           slot++ }
    :: atomic { slot < SLOTS && !ACKNOWLEDGED(slot, generation) && timeouts < TIMEOUTS ->
           timeouts++; silent = true; break }
    :: atomic { slot == SLOTS -> break }
    od;
    slot = 0
}

#ifdef AWAIT_ACK
#define CAUGHT_UP(slot, generation_) ACKNOWLEDGED(slot, generation_)
#else
#define CAUGHT_UP(slot, generation_)                                                                               \
    (ACKNOWLEDGED(slot, generation_) && (!FAILED(slot, generation_) || !alive[slot]))
#endif

/* After a timeout the change is committed, and its caller may wait on, without the lock.  Whoever failed and
 * acknowledged that is not done: it keeps what it had until it fences itself or follows a later change. */
inline await_committed(generation_)
{
    slot = 0;
    do
    :: atomic { slot < SLOTS && CAUGHT_UP(slot, generation_) -> slot++ }
    :: atomic { slot == SLOTS -> break }
    od;
    atomic {
        slot = 0;
        if
        :: complete == generation_ && !OPEN -> /* no later change has begun: 1 */
            settled = true;
            CHECK_SLOTS(EXACT(each))
        :: else
        fi
    }
}

#ifdef REWRITE_RING
#define PUBLISHED(generation_) false
#else
#define PUBLISHED(generation_) (generation >= generation_)
#endif

/* A finisher does not write an entry again that agents may be reading: it must not vanish for a moment. */
inline publish(generation_, kind_)
{
    if
    :: !PUBLISHED(generation_) ->
        ring[generation_] = 0;
        ring[generation_] = RING_ENTRY(kind_);
        generation = generation_
    :: else
    fi
}

/* Can this change be made in the page tables of others? From and to no-access it cannot. */
#define REMOTE_KIND ((prot & old[first] & old[first + count - 1] & READ) != 0)
#define CHANGED (kind == SET -> attempt : attempt + 1)

/* A borrowed descriptor leads to the memory of its process, never to a new owner of the slot, who joins under the
 * lock. */
#define HERE(slot) (alive[slot] && status[slot] == LIVE)

/* Worth a claim; the second line is what makes it legal, and known under the claim only. */
#define TO_REACH(slot)                                                                                             \
    (CAPABLE(slot) && REMOTE_KIND && status[slot] == LIVE && ack[slot] < CHANGED)
#ifdef REMOTE_ANY
#define LEGAL(slot) (status[slot] == LIVE && error[slot] == 0 && fenced[slot] != FENCED)
#else
#define LEGAL(slot)                                                                                                \
    (status[slot] == LIVE && ack[slot] == CHANGED - 1 && error[slot] == 0 && fenced[slot] != FENCED)
#endif
#ifdef REMOTE_STALE
#define LEGAL_BEFORE(slot) LEGAL(slot)
#define LEGAL_UNDER(slot) true
#else
#define LEGAL_BEFORE(slot) true
#define LEGAL_UNDER(slot) LEGAL(slot)
#endif
/* A claim of its own: it is at work itself. Of a third: a caller's that died, because we hold the lock. */
#ifdef NOTAKEOVER
#define CLAIM_BUSY(slot) (claim[slot] != 0)
#else
#define CLAIM_BUSY(slot) (claim[slot] == OWNER(slot))
#endif

/* Bits of the wake-up are shared, so it may reach agents that have nothing to do. */
inline wake()
{
    atomic {
        do
        :: slot < SLOTS && CAPABLE(slot) && REMOTE_KIND -> slot++
        :: slot < SLOTS && CAPABLE(slot) -> awake[slot] = true; slot++
        :: slot < SLOTS && !CAPABLE(slot) -> slot++
        :: else -> slot = 0; goto R1_claim
        od
    }
}

/* The store that opens the record; the ghosts learn what is asked for, whatever the record says. */
inline open()
{
    d_step {
        attempt = generation + 1;
        settled = false;
        goal[0] = (from == 0 -> wanted : map[0]);
        goal[1] = (from + pages == PAGES -> wanted : map[1])
    }
}

#ifdef NOREDO
#define SET_AGAIN C5_publish
#else
#define SET_AGAIN C4_map
#endif

proctype caller(byte id; byte wanted; byte from; byte pages)
{
    byte page, slot, mine;
    bool recovering, refused, silent;

C1_lock:
    {
        if
        :: atomic { LOCK_FREE -> lock = OWNER(id) }
        :: atomic { timeouts < TIMEOUTS -> timeouts++; goto returned } /* nothing has changed */
        fi;
next:
        if
        :: atomic { OPEN && kind == SET -> recovering = true; goto SET_AGAIN }
        :: atomic { OPEN && kind == UNDO -> recovering = true; goto U2_map }
        :: atomic { !OPEN -> recovering = false; assert(MAP_KEPT && complete == generation) } /* 5 */
        fi;
C2_save:
#ifdef ATTEMPT_FIRST
        open();
#endif
#ifndef NOOLD
        do
        :: atomic { page < pages -> old[from + page] = cur[from + page]; page++ }
        :: atomic { else -> page = 0; break }
        od;
#endif
        kind = SET;
        prot = wanted;
        first = from;
        count = pages;
C3_attempt:
#ifndef ATTEMPT_FIRST
        open();
#endif
#ifdef PUBLISH_FIRST
        publish(attempt, SET);
#endif
C4_map:
        do
        :: atomic { page < count -> cur[first + page] = prot; page++ }
        :: atomic { else -> page = 0; break }
        od;
C5_publish:
        publish(attempt, SET);
        wake();
C6_await:
#ifdef RECOVER_NOWAIT
        if
        :: recovering -> goto C7_complete
        :: else
        fi;
#endif
        await();
        if
        :: atomic { silent || !refused -> goto C7_complete }
        :: else
        fi;
U1_kind:
        kind = UNDO;
U2_map:
        do
        :: atomic { page < count -> cur[first + page] = old[first + page]; page++ }
        :: atomic { else -> page = 0; break }
        od;
U3_publish:
        publish(attempt + 1, UNDO);
        wake();
        atomic {
R1_claim: /* slot by slot; a skipped one stays what it is */
            do
            :: slot < SLOTS && !TO_REACH(slot) -> slot++
            :: else -> break
            od;
            if
            :: slot == SLOTS && kind == SET -> slot = 0; goto C6_await
            :: slot == SLOTS && kind == UNDO -> slot = 0; goto U4_await
            :: slot < SLOTS && (CLAIM_BUSY(slot) || !LEGAL_BEFORE(slot)) -> goto not_reached
            :: slot < SLOTS && !CLAIM_BUSY(slot) && LEGAL_BEFORE(slot)
            fi
        };
        atomic { /* CAS; again, if it fails */
            if
            :: CLAIM_BUSY(slot) -> goto not_reached
            :: else -> claim[slot] = OWNER(id)
            fi
        };
        if
        :: atomic { LEGAL_UNDER(slot) -> page = first }
        :: atomic { !LEGAL_UNDER(slot) -> claim[slot] = 0; goto not_reached }
        fi;
R2_remote: /* pessimistic: it would open a fenced mapping */
        do
        :: atomic { page < first + count && prot == old[page] -> page++ }
        :: atomic { page < first + count && prot != old[page] && HERE(slot) && fenced[slot] != UNMAPPED ->
               assert(claim[slot] == OWNER(id));
               RIGHTS(slot, page) = cur[page];
               page++ }
        :: atomic { page < first + count && misses < MISSES -> misses++; goto missed }
        :: atomic { page < first + count && HERE(slot) && fenced[slot] == UNMAPPED -> goto missed }
        :: atomic { !HERE(slot) -> page = 0; claim[slot] = 0; slot++; goto R1_claim }
        :: atomic { page == first + count && HERE(slot) -> page = 0; break }
        od;
#ifdef APPLIED_FIRST
        applied[slot] = CHANGED;
#endif
R3_ack:
        atomic {
            assert(CLAIMED(slot, OWNER(id)) && ack[slot] <= CHANGED); /* 3 */
            ack[slot] = CHANGED;
            assert(!HERE(slot) || fenced[slot] == UNMAPPED || FOLLOWS(slot)) /* 3 */
        };
#ifdef APPLIED_LAST
        applied[slot] = CHANGED;
#endif
        atomic { claim[slot] = 0; slot++; goto R1_claim };
missed: /* it may have been changed in part; its agent starts afresh */
        atomic { page = 0; claim[slot] = 0 };
not_reached:
#ifdef UNREACHED
        atomic { slot++; goto R1_claim };
#else
        atomic { awake[slot] = true; slot++; goto R1_claim };
#endif
U4_await:
        await();
U5_complete:
        close(attempt + 1);
        goto closed;
C7_complete:
        close(attempt);
closed:
        refused = false;
        if
        :: recovering && !silent -> goto next /* now its own change */
        :: else
        fi;
        atomic { mine = generation; lock = 0 };
        if
        :: silent && !recovering -> await_committed(mine)
        :: else
        fi;
returned:
        alive[id] = false
    } unless { !alive[id] }
}

/* -- Agents -------------------------------------------------------------------------------------------------- */

/* The whole mapping at once, which never fails. */
inline no_rights()
{
    RIGHTS(slot, 0) = NONE;
    RIGHTS(slot, 1) = NONE;
    fenced[slot] = FENCED
}

inline fence()
{
    d_step { no_rights(); error[slot] = 0 }
}

#ifdef RESYNC_RANGE
#define WHOLE_MAP false
#else
#define WHOLE_MAP (error[slot] != 0 || fenced[slot] != 0) /* what it has of earlier changes is uncertain */
#endif

/* What to read of the map: the pages of every change since the last one, or all.  One step, because entries of
 * generations that were published do not change. */
inline catch_up()
{
    d_step {
        todo = (WHOLE_MAP -> ALL_PAGES : 0);
        each = FOLLOWED(slot);
        do
        :: each < seen -> each++; todo = todo | (ring[each] == 0 -> ALL_PAGES : ring[each] & ALL_PAGES)
        :: else -> break
        od
    }
}

/* Page by page, and the map may change between the look at it and the change of the page table. */
inline apply()
{
    do
    :: atomic { page < PAGES && (todo >> page & 1) == 0 -> page++ }
    :: page < PAGES && (todo >> page & 1) == 1 ->
        right = cur[page];
        if
        :: d_step {
               RIGHTS(slot, page) = right;
               assert(!settled || right == cur[page]); /* 1, 2: until the next change */
               assert(status[slot] != LIVE || CLAIMED(slot, OWNER(slot)));
               page++ }
        :: atomic { failures < FAILURES -> failures++; failed = true; break }
        fi
    :: atomic { page == PAGES -> break }
    od;
    atomic { page = 0; todo = 0; right = 0 }
}

#ifdef UNDO_REPORT
#define UNDOES(generation_) false
#else
#define UNDOES(generation_) ((ring[generation_] & RING_UNDO) != 0)
#endif

/* Of a joiner; who leaves holds no lock. */
inline unlock()
{
    if
    :: atomic { lock == OWNER(slot) -> lock = 0 }
    :: else
    fi
}

/* A capable one sleeps until a caller wakes it; one that reported an error looks again by itself. */
#define AWAKE(slot) (awake[slot] || error[slot] != 0)

#ifdef CLAIM_NO_RECHECK
#define REACHED(slot) false
#else
#define REACHED(slot) (FOLLOWED(slot) >= seen)
#endif

#ifdef MEND_NOCLAIM
#define MAY_MEND(slot) true
#define MEND_CLAIM(slot) skip
#define GIVE_MENDED(slot) skip
#else
#define MAY_MEND(slot) MAY_FOLLOW(slot)
#define MEND_CLAIM(slot) TAKE_CLAIM(slot)
#define GIVE_MENDED(slot) GIVE_CLAIM(slot)
#endif

#ifdef LEAVE_FIRST
#define LEAVING L2_leave
#else
#define LEAVING L1_unmap
#endif

proctype agent(byte slot)
{
    byte seen, todo, page, right;
    bool failed;

J1_claim: /* of a free slot, or of a dead participant's; one step because nobody looks at it before J4 */
    if
    :: atomic { alive[slot] } /* a founder */
    :: d_step { !alive[slot] && joins < JOINS ->
           joins++;
           alive[slot] = true;
           epoch[slot]++;
           status[slot] = JOINING;
           error[slot] = 0;
           fenced[slot] = 0;
           awake[slot] = true }
    :: atomic { !alive[slot] && joins == JOINS -> goto nobody }
    fi;
    {
        if
        :: atomic { status[slot] == LIVE -> goto A1_wait }
        :: else
        fi;
J2_lock:
#ifndef JOIN_NOLOCK
        if
        :: atomic { LOCK_FREE -> lock = OWNER(slot) }
        :: atomic { timeouts < TIMEOUTS -> timeouts++; goto L1_unmap }
        fi;
#endif
J3_apply: /* of a dead caller's open record it may see a part; the rest is not published yet, so it will follow */
        atomic { seen = generation; todo = ALL_PAGES };
        apply();
#ifdef JOIN_UNLOCK_FIRST
        if
        :: failed -> lock = 0
        :: else
        fi;
#endif
        if
        :: atomic { failed -> failed = false; goto L1_unmap }
        :: else
        fi;
        atomic { SAY_APPLIED(slot, seen); ack[slot] = seen; seen = 0 };
J4_live:
        status[slot] = LIVE;
        unlock();
A1_wait:
end_wait: /* for ever, if there is no further change */
        if
        :: atomic { !CAPABLE(slot) && generation != ack[slot] -> seen = generation; goto following }
        :: atomic { CAPABLE(slot) && AWAKE(slot) && generation != ack[slot] -> seen = generation }
        :: atomic { CAPABLE(slot) && awake[slot] && generation == ack[slot] && error[slot] == 0 ->
               awake[slot] = false;
               goto A1_wait }
#ifndef NOSETTLE
        :: atomic { error[slot] != 0 && complete >= ack[slot] && MAY_FOLLOW(slot) -> /* nobody undoes for it */
               fence();
               goto A1_wait }
#endif
        :: atomic { CAPABLE(slot) && fenced[slot] == 0 && mends < MENDS && MAY_MEND(slot) ->
               mends++;
               MEND_CLAIM(slot);
               if
               :: page = 0
               :: page = 1
               fi;
               goto mending }
        :: atomic { leaves < LEAVES -> leaves++; goto LEAVING }
        fi;
        atomic { MAY_FOLLOW(slot) ->
            TAKE_CLAIM(slot);
            if
            :: REACHED(slot) -> /* since the look at the generation */
                awake[slot] = (generation != seen);
                GIVE_CLAIM(slot);
                seen = 0;
                goto A1_wait
            :: else
            fi;
following:
            catch_up()
        };
A2_apply:
#ifdef ACKFIRST
        ack[slot] = seen;
#endif
        apply();
        if
        :: atomic { !failed -> error[slot] = 0; fenced[slot] = 0; goto A4_ack }
        :: else
        fi;
A3_fail: /* a caller may give up between the look at `complete` and the error: then A1 fences */
        if
        :: atomic { UNDOES(seen) || fenced[slot] != 0 -> fence() }
        :: else ->
            if
#ifdef NOFENCE
            :: complete >= seen
#else
            :: atomic { complete >= seen -> fence() }
#endif
            :: complete < seen -> error[slot] = seen
            fi
        fi;
A4_ack:
        atomic {
            assert(ack[slot] <= seen); /* 3 */
            SAY_APPLIED(slot, seen);
            ack[slot] = seen;
            assert(EXACT(slot) || OPEN || LATE(slot)); /* 3, 7 */
            seen = 0;
            failed = false;
            if
            :: CAPABLE(slot)
            :: else -> goto A1_wait
            fi
        };
        atomic { GIVE_CLAIM(slot); goto A1_wait };
mending: /* or arming a chunk, or restoring a page: the map's rights, and no acknowledgement */
        right = cur[page];
        d_step {
            RIGHTS(slot, page) = right;
            assert(!settled || right == cur[page]); /* 1, 2 */
            page = 0;
            right = 0 };
        atomic { GIVE_MENDED(slot); goto A1_wait };
L1_unmap: /* a joiner that failed: before it gives up the lock, because nobody waits for it */
        atomic { no_rights(); fenced[slot] = UNMAPPED };
        unlock();
L2_leave:
        status[slot] = FREE;
#ifdef LEAVE_FIRST
        d_step { no_rights() };
#endif
        alive[slot] = false
    } unless { atomic { !alive[slot] -> page = 0; todo = 0; right = 0; failed = false; seen = 0 } };
    goto J1_claim;
nobody:
    skip
}

/* -- Fate ---------------------------------------------------------------------------------------------------- */

/* What a dead participant had mapped is gone; what it left in the control segment stays. */
#define DIES(id)                                                                                                   \
    d_step { crashes < CRASHES && alive[id] ->                                                                     \
        crashes++;                                                                                                 \
        alive[id] = false;                                                                                         \
        if                                                                                                         \
        :: id < SLOTS -> RIGHTS(id, 0) = NONE; RIGHTS(id, 1) = NONE                                                \
        :: else                                                                                                    \
        fi }

init
{
    atomic {
        each = 0;
        do
        :: each < FOUNDERS ->
            alive[each] = true;
            status[each] = LIVE;
            awake[each] = true;
            RIGHTS(each, 0) = READ_WRITE;
            RIGHTS(each, 1) = READ_WRITE;
            each++
        :: else -> break
        od;
        each = 0;
        do
        :: each < SLOTS -> run agent(each); each++
        :: else -> break
        od;
        alive[SLOTS] = true;
        run caller(SLOTS, READ, 0, PAGES);
        alive[SLOTS + 1] = true;
        run caller(SLOTS + 1, SECOND, FROM, PAGES - FROM);
#if CALLERS > 2
        alive[SLOTS + 2] = true;
        run caller(SLOTS + 2, NONE, 0, 1)
#endif
    };
    do
    :: DIES(0)
    :: DIES(1)
    :: DIES(2)
#if SLOTS + CALLERS > 3
    :: DIES(3)
#endif
#if SLOTS + CALLERS > 4
    :: DIES(4)
#endif
#if SLOTS + CALLERS > 5
    :: DIES(5)
#endif
    :: break /* all others are spared: otherwise a later death could hide that somebody waits for ever */
    od;
    /* Nothing moves any more: what is closed has reached everybody (3, 7). */
    timeout -> CHECK_SLOTS(OPEN || EXACT(each))
}
