"""Which operations met: ran at the same time, in different threads, on pages that both have.

Lives here: counting the pairs of a history, and the table.  Not here: what is right.
What is held counts from the call that takes it to the end of the one that lets it go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from histories import words
from histories.facts import Facts, pages_of
from histories.history import Op

WINDOW = "window"
NAMES = {
    words.CHANGE: "mprotect",
    words.STORE: "store",
    words.LOAD: "load",
    words.LEASE: "lease",
    WINDOW: "lease by window",
    words.LOCK: "lock",
    words.FREEZE: "frozen",
    words.SNAPSHOT: "snapshot",
    words.LOOK: "look at a snapshot",
    words.SAVE: "save",
    words.PASS: "pass on",
    words.ADOPT: "adopt",
    words.DROP: "drop",
    words.RESTORE: "restore",
    words.DIRTY: "dirty",
    words.READINTO: "readinto",
    words.RECEIVE: "recv_into",
    words.FORK: "fork",
    words.ATTACH: "attach",
    words.CLOSE: "close",
    words.OBSERVE: "observe",
    "loop": "async forms",
}
KINDS = list(NAMES)
Pair = tuple[str, str]


class Act(NamedTuple):
    begin: int
    end: int
    kind: str
    thread: str
    pages: range


def _acts(facts: Facts) -> Iterator[Act]:
    everything = range(facts.hot)
    loops = _loops(facts)
    for op in facts.history.ops:
        kind = WINDOW if op.kind == words.LEASE and op.args[2] else op.kind
        if kind not in NAMES:
            continue
        over = facts.end_of.get(op.id)
        end = over.end if over and op.kind in (words.LEASE, words.LOCK, words.FREEZE) else op.end
        pages = pages_of(op) or everything
        yield Act(op.begin, end, kind, op.thread, pages)
        if op.thread in loops:
            yield Act(op.begin, end, "loop", op.thread, pages)


def _loops(facts: Facts) -> set[str]:
    """Threads that are event loops."""
    slots, found = 0, set()
    for index, actor in enumerate(facts.plan["actors"]):
        for thread in actor["threads"]:
            if thread["kind"] == "loop":
                found |= {op.thread for op in _of(facts, index, slots)}
            slots += 1
    return found


def _of(facts: Facts, actor: int, slot: int) -> Iterator[Op]:
    return (op for op in facts.history.ops if op.process.startswith(f"a{actor}.") and op.thread.endswith(f"={slot}"))


def count(facts: Facts) -> Counter[Pair]:
    """How often each pair met."""
    met: Counter[Pair] = Counter()
    under_way: list[Act] = []
    for act in sorted(_acts(facts), key=lambda act: act.begin):
        under_way = [other for other in under_way if other.end >= act.begin]
        for other in under_way:
            if other.thread != act.thread and _share(other.pages, act.pages):
                met[_pair(other.kind, act.kind)] += 1
        under_way.append(act)
    return met


def _share(some: range, others: range) -> bool:
    return some.start < others.stop and others.start < some.stop


def _pair(one: str, other: str) -> Pair:
    return (one, other) if KINDS.index(one) <= KINDS.index(other) else (other, one)


def missing(met: Counter[Pair]) -> list[Pair]:
    """Pairs that never met."""
    return [(a, b) for at, a in enumerate(KINDS) for b in KINDS[at:] if not met[a, b]]


def table(met: Counter[Pair]) -> str:
    """For people: a row for each kind, and how often it met those before it."""
    width = max(map(len, NAMES.values()))
    lines = [" " * (width + 4) + "".join(f"{at + 1:>6}" for at in range(len(KINDS)))]
    for at, kind in enumerate(KINDS):
        cells = "".join(f"{_short(met[_pair(kind, other)]):>6}" for other in KINDS[: at + 1])
        lines.append(f"{at + 1:>3} {NAMES[kind]:<{width}}{cells}")
    return "\n".join(lines)


def _short(number: int) -> str:
    if number < 10_000:
        return str(number) if number else "-"
    return f"{number // 1000}k" if number < 1_000_000 else f"{number // 1_000_000}M"
