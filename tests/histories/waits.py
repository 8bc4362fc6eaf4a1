"""Everything comes to its end, in time, in the way it should: waits, exceptions, signals, deaths, datagrams, leftovers.

Lives here: those judgements.  Not here: what the memory held, and who might what.
A machine may be busy: how late the conductor was is taken off, twice; whoever overlaps with a stopped process may wait.
"""

from __future__ import annotations

import bisect
import errno
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from histories import words
from histories.facts import ACCESSES, Facts, Hold, Intervals, finding, pages_of, without
from histories.history import FOREVER, Life, Op
from histories.plan import PATIENT
from histories.rights import Rights

SECOND = 1_000_000_000
GRACE = SECOND // 2  # beyond its timeout
GETTING_IN_LINE = 100_000_000  # from the beginning of a call; it may have to wait for the interpreter first
TAKING = 10_000_000  # from when something is had to when that is written down
OVERTAKEN = 100  # changes, which are thousands where nobody is let go first, and otherwise those under way
FREE = (
    400_000_000  # of a lock that is waited for: who is to have it next, and does not come, is overtaken in half of that
)
STOPPING = 2_000_000  # from the signal that stops to the last instruction
MORE_MEMORY = 1 << 20  # bytes: what the control segment, and pages that were touched first, may have grown by
TIMEOUT_AT = {  # which argument is the timeout
    words.CHANGE: 3, words.LEASE: 3, words.LOCK: 1, words.FREEZE: 0, words.SNAPSHOT: 0, words.RESTORE: 2,
    words.READINTO: 4, words.RECEIVE: 4,
}  # fmt: skip


class Waits:
    """Of one history."""

    def __init__(self, facts: Facts, rights: Rights) -> None:
        self._facts, self._rights, self._history = facts, rights, facts.history
        self._stops = Intervals((begin, end, pid) for pid, begin, end in self._history.stops)
        self._late = [(at, int(values[0] * SECOND)) for at, values in self._history.noted("late")]
        self._snapshots = sorted(
            op.begin
            for op in facts.by_kind[words.SNAPSHOT]
            if op.outcome in (words.OK, words.INTERRUPTED, None, words.NESTED)
        )
        self._late_at = [at for at, _ in self._late]
        accesses = [op for kind in ACCESSES for op in facts.by_kind[kind]]
        self._waiting = Intervals((op.begin, op.end, op) for op in accesses if op.end - op.begin > GRACE // 2)
        self._cut = Intervals(
            (op.begin, op.end + 2 * SECOND, op)
            for kind in (words.CHANGE, words.FREEZE, words.THAW, words.SNAPSHOT, words.RESTORE)
            for op in facts.by_kind[kind]
            if op.open and op.thread in facts.ended
        )
        self._daemons = {values[0] for _, values in self._history.noted("daemon")}
        self._changes = Intervals((c.op.begin, c.op.end, c) for c in facts.changes if c.op.outcome == words.OK)
        self._kept = Intervals(self._kept_by_the_ended())
        self._callers = Intervals(self._deaf())

    def _kept_by_the_ended(self) -> Iterator[tuple[int, int, Hold]]:
        """A thread that was ended alone had it: it is held until its process ends."""
        frozen = [hold for hold in self._facts.freezes if hold.op.outcome == words.OK]  # a part of one is undone
        for hold in (*self._facts.leases, *self._facts.locks, *frozen):
            if hold.op.thread in self._facts.ended and (hold.over is None or hold.over.open):
                yield *hold.possible, hold

    def _deaf(self) -> Iterator[tuple[int, int, Intervals[Op]]]:
        """The calls of each handle whose agent may have been ended alone: by them it is missed."""
        lives = [life for life in self._history.lives.values() if self._ending(life).startswith("A")]
        calls: dict[str, list[Op]] = {f"{life.name}/0": [] for life in lives}
        times = {f"{life.name}/0": (life.born, life.died) for life in lives}
        processes = {life.name for life in lives}
        for op in self._history.ops:
            if op.process not in processes:
                continue
            if op.kind == words.ATTACH and op.args[2]:
                times[f"{op.process}/{op.args[2]}"] = op.begin, FOREVER
            elif op.kind == words.CLOSE and op.args:
                name = f"{op.process}/{op.args[0]}"
                times[name] = times[name][0], op.end
            elif op.kind not in (words.STORE, words.LOAD, words.LOOK, words.SEND) and op.outcome != words.KERNEL:
                calls.setdefault(op.participant, []).append(op)
        for name, (begin, end) in times.items():
            yield begin, end, Intervals((op.begin, op.end, op) for op in calls.get(name, []))

    def _ending(self, life: Life) -> str:
        """Where one of its threads was to be ended."""
        index, _, number = life.name[1:].partition(".")
        if not self._facts.plan.get("ends") or not number.isdigit() or not int(number) % 2:
            return ""
        return str(self._facts.plan["actors"][int(index)]["ended"])

    def _is_deaf(self, op: Op) -> bool:
        """A handle's agent may have ended at any time, and nobody began a call by it for half of the operation's."""
        end = min(op.end, self._history.ops[-1].end)
        for calls in self._callers.meeting(op.begin, end):
            begins = sorted(call.begin for call in calls.meeting(op.begin, end) if op.begin < call.begin < end)
            gaps = itertools.pairwise([op.begin, *begins, end])
            if max(after - before for before, after in gaps) >= (end - op.begin) // 2:
                return True
        return False

    def _may_be_in_vain(self, op: Op) -> bool:
        """For somebody who is stopped, or for what one had who was ended alone."""
        return self._was_stopped(op) or self._kept.any_meeting(op.begin, op.end) or self._is_deaf(op)

    def judge(self) -> Iterator[str]:
        for op in self._history.ops:
            yield from self._came_out(op)
            yield from self._in_time(op)
        yield from self._signals()
        for life in self._history.lives.values():
            yield from self._death(life)
        yield from self._datagrams()
        yield from self._stemmed()
        yield from self._left()

    # -- Outcomes ------------------------------------------------------------------------------------------------------

    def _came_out(self, op: Op) -> Iterator[str]:
        match op.outcome:
            case words.WRONG:
                yield finding("an exception that does not belong there", op, op.value[0][-1500:])
            case words.FULL if self._facts.plan.get("room"):
                return
            case words.FULL | words.CLOSED:
                yield finding("an exception that does not belong there", op)
            case words.KERNEL if not self._may_fail(op):
                yield finding("the kernel refused, and there was no reason", op)
            case words.NESTED if not self._holds_something(op) and not self._is_full(op):
                yield finding("ShareError: the thread would not have waited for itself", op)
            case words.OK if op.kind in (words.READINTO, words.RECEIVE) and op.value != words.WORD:
                yield finding(f"it received {op.value} bytes of {words.WORD}", op)
            case words.REFUSED if op.value and op.kind in (words.READINTO, words.RECEIVE):
                yield finding("it failed with EFAULT, though it holds its pages", op)
            case words.OK | words.TIMEOUT if op.kind in (words.SNAPSHOT, words.FREEZE):
                if holds := self._certain_leases(op):
                    yield finding("it has a lease, and was not told that it would wait for itself", op, *holds)
        yield from self._in_vain(op)
        yield from self._in_line(op)
        patient = op.outcome == words.TIMEOUT and self._timeout(op) >= PATIENT
        if patient and not self._may_be_in_vain(op) and self._lateness(op.begin, op.end) < SECOND:
            yield finding("it waited in vain, and nobody was stopped", op)

    def _stemmed(self) -> Iterator[str]:
        """After a revocation nothing is stored, not even by a process that is dying, but by who restores an image."""
        restores = Intervals((op.begin, op.end, op) for op in self._facts.by_kind[words.RESTORE])
        for op in self._facts.by_kind[words.STEM]:
            restored = restores.any_meeting(op.begin, op.end + SECOND)  # it looks at the pages once more, later
            if op.outcome == words.OK and op.value[1] != op.value[2] and not restored:
                yield finding("what may only be read has changed after the change had returned", op)

    def _may_fail(self, op: Op) -> bool:
        extras = {extra for actor in self._facts.plan["actors"] for extra in actor["extras"]}
        number = op.value[0]
        if number == errno.EBADF:  # it closed its descriptors before it had a part, or lost the agent that had others
            return self._has_none(op.process) or (
                op.process in self._daemons and self._rights.is_cut_off(self._history.lives[op.process], op)
            )
        if number == errno.EOWNERDEAD:
            return bool(self._facts.plan.get("ends"))
        if number == errno.EMFILE:
            return "descriptors" in extras
        return number == errno.ENOMEM and "mappings" in extras

    def _has_none(self, process: str) -> bool:
        """It may have no descriptor that leads to the region, neither its own nor its agent's."""
        life = self._history.lives.get(process)
        if life is None or not self._ending(life).startswith("A"):
            return False
        index = int(life.name[1:].partition(".")[0])
        return "closerange" in self._facts.plan["actors"][index]["extras"]

    def _holds_something(self, op: Op) -> bool:
        return op.thread in self._facts.held_by and self._facts.held_by[op.thread].any_meeting(op.begin, op.end)

    def _is_full(self, op: Op) -> bool:
        """Eight snapshots may be alive."""
        return op.kind == words.SNAPSHOT and bisect.bisect_right(self._snapshots, op.end) > 8

    def _certain_leases(self, op: Op) -> list[Op]:
        return [
            hold.op
            for hold in self._facts.certain_leases.meeting(op.begin, op.end)
            if hold.op.thread == op.thread and hold.op.participant == op.participant
            if hold.certain[0] < op.begin and op.end < hold.certain[1]
        ]

    # -- Locks that nobody holds ---------------------------------------------------------------------------------------

    def _in_vain(self, op: Op) -> Iterator[str]:
        """A lock is waited for, though nobody has had it for 0.4 s; where it was in vain, for 0.2 s.

        For so long one that waits, too, and is stopped may keep it from others.
        """
        most = FREE if op.outcome == words.OK else FREE // 2
        tried = op.kind == words.LOCK and (op.outcome == words.OK or self._is_long_timeout(op))
        if not tried or op.end - op.begin < most or self._is_stopped(op) or any(self._keeps_interpreter(op)):
            return
        locks = [hold for hold in self._facts.locks if hold.op.args[0] == op.args[0] and hold.op is not op]
        spans = sorted((self._since(hold, locks), hold.possible[1]) for hold in locks)
        free = sum(end - begin for begin, end in without([(op.begin, op.end)], spans))
        if free > most + 2 * self._lateness(op.begin, op.end):
            yield finding(f"a lock was waited for, and was free for {free / 1e9:.2f} s meanwhile", op)

    def _is_long_timeout(self, op: Op) -> bool:
        return op.outcome == words.TIMEOUT and self._timeout(op) > FREE / 1e9

    def _is_stopped(self, op: Op) -> bool:
        """It was itself."""
        life = self._history.lives.get(op.process)
        return life is not None and life.pid in self._stops.meeting(op.begin, op.end)

    def _since(self, hold: Hold, locks: list[Hold]) -> int:
        """It was not held before that: others held it, and a taker that is stopped does not take."""
        before = [other.certain[1] for other in locks if other is not hold and other.certain[1] < hold.op.end]
        since = max([hold.op.begin, *before])
        life = self._history.lives.get(hold.op.process)
        for pid, begin, end in self._history.stops:
            if life is not None and pid == life.pid and begin + STOPPING < since < end:
                since = end
        return min(since, hold.op.end)

    # -- Leases that never come ----------------------------------------------------------------------------------------

    def _in_line(self, op: Op) -> Iterator[str]:
        """Changes let a lease go first that waits for its pages; who has a lease gets others before anybody else."""
        begin = op.begin + GETTING_IN_LINE + self._late_in(op.begin, op.end)
        if op.kind != words.LEASE or op.outcome is None or op.end < begin or self._may_be_in_vain(op):
            return
        if any(self._keeps_interpreter(op)):
            return
        free = self._free(op, begin)
        if len(before := self._overtakers(op, free)) > OVERTAKEN:
            yield finding(f"a lease was waited for, and {len(before)} changes of its pages came and went", op)
        time = sum(end - begin for begin, end in free)
        if time > GRACE and (holds := self._certain_leases(op)):
            yield finding(f"a lease inside a lease came after {time / SECOND:.2f} s in which nobody had it", op, *holds)

    def _free(self, op: Op, begin: int) -> list[tuple[int, int]]:
        """When nobody else had any of its pages."""
        pages = pages_of(op)
        holds = {hold.op.id: hold for page in pages for hold in self._facts.leases_on[page].meeting(begin, op.end)}
        return without([(begin, op.end)], sorted(self._around(hold) for hold in holds.values() if hold.op is not op))

    def _overtakers(self, op: Op, free: list[tuple[int, int]]) -> dict[str, Op]:
        """Changes of its pages, of other processes, that began and ended then."""
        found: dict[str, Op] = {}
        for since, until in free:
            for change in self._changes.meeting(since, until):
                overlap = change.first < op.args[0] + op.args[1] and op.args[0] <= change.last
                if overlap and since < change.op.begin and change.op.end < until and change.op.process != op.process:
                    found[change.op.id] = change.op
        return found

    def _around(self, hold: Hold) -> tuple[int, int]:
        """When it was held, or shortly before that; or from when it was asked for, where the process's waiter may have
        had it while another thread kept the interpreter, so that nobody was told.
        """
        kept = any(self._keeps_interpreter(hold.op))
        return hold.op.begin if kept else max(hold.op.begin, hold.op.end - TAKING), hold.possible[1]

    # -- Time ----------------------------------------------------------------------------------------------------------

    def _timeout(self, op: Op) -> float:
        at = TIMEOUT_AT.get(op.kind)
        return float(op.args[at]) if at is not None else 0.0

    def _was_stopped(self, op: Op) -> bool:
        return self._stops.any_meeting(op.begin, op.end)

    def _may_wait(self, op: Op) -> bool:
        """For a process that is stopped; but nobody's end is to wait for another."""
        life = self._history.lives.get(op.process)
        pids = set(self._stops.meeting(op.begin, op.end))
        return bool(pids) and (op.kind != words.CLOSE or (life is not None and life.pid in pids))

    def _lateness(self, begin: int, end: int) -> int:
        first = bisect.bisect_left(self._late_at, begin)
        last = bisect.bisect_right(self._late_at, end + SECOND)
        return sum(late for _, late in self._late[first:last])

    def _late_in(self, begin: int, end: int) -> int:
        """How long nothing of the conductor ran in that time: other processes may have waited for a processor too."""
        first = bisect.bisect_left(self._late_at, begin)
        return sum(late for at, late in self._late[first:] if at - late < end)

    def _in_time(self, op: Op) -> Iterator[str]:
        took = min(op.end, self._history.ops[-1].end) - op.begin
        if took < GRACE or op.outcome is None or self._may_wait(op):
            return
        life = self._history.lives.get(op.process)
        if op.kind == words.FORK or (op.kind in ACCESSES and life is not None and life.policy == "wait"):
            return
        allowed = self._timeout(op) * SECOND + GRACE + 2 * self._lateness(op.begin, op.end)
        if op.kind in (words.ATTACH, words.OBSERVE):
            allowed += PATIENT * SECOND
        if op.kind in (words.LOOK, words.SAVE) and self._facts.plan.get("bulk"):
            allowed += SECOND
        allowed += self._kept_by_others(op)
        if op.kind in ACCESSES and self._cut.any_meeting(op.begin, op.end):
            allowed += SECOND  # as long as an access waits for what becomes of a change that nobody finishes
        if took > allowed and not self._is_deaf(op):
            yield finding(f"it took {took / 1e9:.2f} s", op)

    def _kept_by_others(self, op: Op) -> float:
        """An access may wait with the interpreter, for a second; then no thread of its process runs, and who adopts
        asks another process.
        """
        accesses = (other for kind in ACCESSES for other in self._facts.by_kind[kind])
        waited = (
            min(op.end, other.end) - max(op.begin, other.begin)
            for other in accesses
            if (other.process == op.process and other.thread != op.thread) or op.kind == words.ADOPT
        )
        return sum(min(each, SECOND) for each in waited if each > 0)

    def _keeps_interpreter(self, op: Op) -> Iterator[bool]:
        """Of each access that waited long meanwhile: another thread of its process did."""
        for other in self._waiting.meeting(op.begin, op.end):
            yield other.process == op.process and other.thread != op.thread

    def _signals(self) -> Iterator[str]:
        handled = {values[0]: at for at, values in self._history.noted("handled")}
        over = [at for at, _ in self._history.noted("over")]
        deaths = {life.pid: life.last for life in self._history.lives.values()}
        names = {life.pid: life.name for life in self._history.lives.values()}
        for sent, (number, pid, signal) in self._history.noted("signal"):
            end = min(handled.get(number, FOREVER), over[0] if over else FOREVER, deaths.get(pid, FOREVER))
            own = pid in self._stops.meeting(sent, end)
            kept = any(op.process == names.get(pid) for op in self._waiting.meeting(sent, end))
            if end - sent > SECOND * (1 + kept) + GRACE + 2 * self._lateness(sent, end) and not own:
                came = f"after {(handled[number] - sent) / 1e9:.2f} s" if number in handled else "never"
                yield finding(f"signal {signal} to pid {pid} at {sent / 1e6:.3f} ms was handled {came}")

    def _lost_main(self, hangs: tuple[Any, ...]) -> bool:
        """The process's main thread was ended alone, as it attached: nobody is there who would end the process."""
        pid, where = hangs
        return bool(self._facts.plan.get("ends")) and any(
            thread.startswith(f"{pid}:") and thread.endswith(" Z ") for thread in where
        )

    # -- Deaths --------------------------------------------------------------------------------------------------------

    def _death(self, life: Life) -> Iterator[str]:
        killed = {values[0] for _, values in self._history.noted("kill")}  # by the conductor, or who stems
        for at, values in self._history.noted("hangs"):
            waits = any(thread.startswith(f"{life.name}=") for thread in self._facts.ended)  # until others are through
            if values[0] == life.pid and at > life.born and not waits and not self._lost_main(values):
                yield finding(f"process {life.name} hangs, in: {values[1:]}", *self._under_way(life))
        match life.status:
            case 0 | None:
                return
            case -9:
                if life.pid in killed or self._facts.plan["points"] or life.parent or self._hung(life):
                    return
                yield finding(f"process {life.name} was killed by nobody that is known", *self._under_way(life))
            case -11:
                accesses = [op for op in self._under_way(life) if op.kind in ACCESSES]
                if not any(self._rights.may_be_refused(op) for op in accesses):
                    yield finding(
                        f"process {life.name} died by SIGSEGV without a forbidden access", *self._under_way(life)
                    )
                elif life.policy != "die" and not self._rights.is_cut_off(life):
                    yield finding(f"process {life.name} died of an access, under {life.policy}", *self._under_way(life))
            case _:
                yield finding(f"process {life.name} ended with {life.status}", *self._under_way(life))

    def _hung(self, life: Life) -> bool:
        return any(values[0] == life.pid for _, values in self._history.noted("hangs"))

    def _under_way(self, life: Life) -> list[Op]:
        return [op for op in self._history.ops if op.process == life.name and op.outcome is None]

    # -- Datagrams -----------------------------------------------------------------------------------------------------

    def _datagrams(self) -> Iterator[str]:
        """Each that was sent has arrived once, or is there still."""
        received = self._facts.by_kind[words.RECEIVE]
        arrived = Counter(op.args[2] for op in received if op.outcome == words.OK)
        unsure = {op.args[2] for op in received if op.outcome in (words.INTERRUPTED, None)}
        unread = {values[1] for _, values in self._history.noted("unread")}
        for op in self._facts.by_kind[words.SEND]:
            value = op.args[1]
            if op.outcome == words.OK and value not in unsure:
                count = arrived[value] + (value in unread)
                if count != 1:
                    tries = [other for other in received if other.args[2] == value]
                    yield finding(f"a datagram has arrived {count} times", op, *tries)

    # -- What is left --------------------------------------------------------------------------------------------------

    def _left(self) -> Iterator[str]:
        born = {life.pid for life in self._history.lives.values()}
        for _, (pid, *where) in self._history.noted("hangs"):
            if pid not in born:
                yield finding(f"process {pid} hangs, and was not born yet, in: {where}")
        if not self._history.noted("end"):
            yield finding("the conductor has not come to its end")
        for _, (pids,) in self._history.noted("participants"):
            if pids:
                yield finding(f"participants that are gone are still there: {pids}")
        for _, (there,) in self._history.noted("name"):
            if there:
                yield finding("the region's name is left")
        for _, (before, after) in self._history.noted("own"):
            if any(after[what] > before[what] for what in before):
                yield finding(f"the conductor had {before} before, and {after} after it had closed the region")
        blocks = [values[0] for _, values in self._history.noted("blocks")]
        if len(blocks) == 2 and blocks[1] > blocks[0] + MORE_MEMORY + self._facts.plan.get("bulk", 0) * words.PAGE:
            yield finding(f"the region took {blocks[0]} bytes of memory, and in the end {blocks[1]}")
