"""The words of a history: places in a page, values, kinds of operations and how they came out.

Lives here: what the actors and the oracle have to agree on, and nothing else.
Not here: pyshare, which the oracle must not know.
Invariant: each value is stored once, by one operation, but for what a restore brings back.
"""

from __future__ import annotations

PAGE = 4096
WORD = 8
READ, WRITE, READ_WRITE = 1, 2, 3  # bits of protections

# Each thread has a word of its own in each page that all may write, its cell; so has the child that it forks.  Who has
# leased a page writes the same value at three places: whoever finds them different has seen half of a transaction.
CELLS = 64  # at most; the numbers of the other places come after them
LEASED_AT = (1024, 2048, 4088)
PLACES = CELLS + len(LEASED_AT)

SEQUENCE_BITS = 36


def first_value(slot: int, life: int, fork: int) -> int:
    """Of a thread of a process of that life; each thread counts up from there."""
    return (slot << 22 | (life & 1023) << 12 | (fork & 4095)) << SEQUENCE_BITS


def offset_of(place: int) -> int:
    """In its page."""
    return WORD * place if place < CELLS else LEASED_AT[place - CELLS]


def cell_of(slot: int, threads: int, is_child: bool) -> int:
    """Of a thread, or of what it has forked."""
    return slot + (threads if is_child else 0)


def kept_places(threads: int) -> list[int]:
    """What a history keeps of a page, in this order: the cells that there are, and the leased places."""
    return [*range(2 * threads), *range(CELLS, PLACES)]


def words_of(page: bytes | memoryview, threads: int) -> bytes:
    """Those places."""
    parts = [page[: 2 * threads * WORD], *(page[at : at + WORD] for at in LEASED_AT)]
    return b"".join(bytes(part) for part in parts)


# -- Outcomes ----------------------------------------------------------------------------------------------------------

OK = "ok"
REFUSED = "refused"  # ProtectionError, or EFAULT of a system call
TIMEOUT = "timeout"  # PropagationTimeout: (generation or None, pids)
INTERRUPTED = "interrupted"  # KeyboardInterrupt
CANCELLED = "cancelled"  # a coroutine
NESTED = "share"  # ShareError itself: (its text,)
FULL = "full"  # ParticipantLimit
CLOSED = "closed"  # RegionClosed
KERNEL = "os"  # OSError: (errno, its text)
GONE = "gone"  # whoever was to hand it over is dead
WRONG = "wrong"  # any other exception: (its traceback,)
CUT = None  # no end was written: the process died in it, or is in it still

# -- Kinds of operations -----------------------------------------------------------------------------------------------

STORE = "store"  # (page, means, value, place)
RECEIVE = "recv_into"  # (page, means, value, place, timeout) -> bytes; means: "recv_into", or "tls"
READINTO = "readinto"  # likewise
LOAD = "load"  # (pages, means) -> words
CHANGE = "mprotect"  # (page, count, prot, timeout) -> generation
LEASE = "lease"  # (page, count, window, timeout) -> (abandoned,)
TRANSACT = "transact"  # (lease, pages, place, value, means)
RELEASE = "release"  # (lease, how)
LOCK = "lock"  # (index, timeout) -> (abandoned,)
UNLOCK = "unlock"  # (lock, how)
FREEZE = "frozen"  # (timeout,) -> generation
THAW = "thaw"  # (freeze, how)
SNAPSHOT = "snapshot"  # (timeout,) -> generation
LOOK = "look"  # (snapshot, means) -> (words of all hot pages, CRC-32 of all of them)
SAVE = "save"  # (snapshot, file, the file that it builds on or None)
PASS = "pass"  # (snapshot, to whom)
ADOPT = "adopt"  # () -> (snapshot,)
DROP = "drop"  # (snapshot, how)
RESTORE = "restore"  # (snapshot, from file or not, timeout)
DIRTY = "dirty"  # ("generation" or "snapshot", which) -> (hot pages, cold pages)
GENERATION = "generation"  # () -> generation
FORK = "fork"  # () -> (pid,)
ATTACH = "attach"  # (engine, how) -> ()
CLOSE = "close"  # ()
OBSERVE = "observe"  # ()
SEND = "send"  # (to, value)
POUR = "pour"  # () -> bytes
STEM = "stem"  # () -> (generation, what was there, what was there later)
