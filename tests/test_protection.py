"""Promises 1, 2, 3, 4 and 7: a change of protection reaches every participant, or says who it did not reach.

What participants may do is asked of the kernel (/proc/PID/maps) and of the accesses themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import PATIENCE, Child, idle, until
from kernel import (
    CUR,
    LOCK,
    PAGE,
    WAITING,
    agreed,
    at_its_limit,
    co_operative,
    die_quietly,
    forbid_waitv,
    in_background,
    mapped,
    region_at,
    section_of,
    set_generation,
    tell,
    word,
)

import pyshare
from pyshare import NONE, READ, READ_WRITE, WRITE, PropagationTimeout, Prot, ProtectionError, Region

Fork = Callable[..., Child]
AT_ONCE = 0.05  # a timeout that is meant to run out
SOON = 0.5  # the same, where somebody is meant to answer before it does


@pytest.fixture(params=["mprotect", "uffd"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with pyshare.create(size=32 * PAGE, max_participants=16, engine=request.param) as made:
        yield made


def participant(region: Region, child: Child) -> pyshare.Participant:
    return next(one for one in region.participants() if one.pid == child.pid)


@contextlib.contextmanager
def silent(generation: int | None, *children: Child) -> Iterator[None]:
    """The call inside times out because of these."""
    with pytest.raises(PropagationTimeout) as caught:
        yield
    assert caught.value.generation == generation
    assert caught.value.pids == sorted(child.pid for child in children)
    assert caught.value.errno == errno.ETIMEDOUT


@contextlib.contextmanager
def refused(child: Child) -> Iterator[None]:
    """The call inside is undone because this one is at its limit of mappings."""
    with pytest.raises(OSError, match=rf"pid {child.pid} could not apply") as caught:
        yield
    assert caught.value.errno == errno.ENOMEM


# -- Promise 1: revocation --------------------------------------------------------------------------------------------


def store_for_ever(region: Region) -> None:
    """In C, without the GIL, until the process dies of it."""
    for value in itertools.cycle(range(256)):
        ctypes.memset(region.address + region.size - PAGE, value, PAGE)


def write_for_ever(region: Region) -> None:
    with contextlib.suppress(ProtectionError):
        while True:
            region.write(region.size - PAGE, os.urandom(PAGE))


@pytest.mark.parametrize(("store", "end"), [(store_for_ever, -signal.SIGSEGV), (write_for_ever, 0)])
@pytest.mark.parametrize("revoked", [READ, NONE])
def test_no_thread_stores_after_a_revocation(
    joined: Callable[..., Child], store: Callable[[Region], None], end: int, revoked: Prot
) -> None:
    """Stores go to the last of many pages, which page tables reach last."""

    def hammer(child: Child) -> None:
        die_quietly()
        ctypes.memset(region.address, 1, region.size)
        other = threading.Thread(target=store, args=[region], daemon=True)
        other.start()
        child.say()
        store(region)
        other.join(PATIENCE)

    with pyshare.create(size=16 << 20, max_participants=4) as region:
        last = word(region, 16, "Q") + region.size - PAGE  # behind the control segment: read past any protection
        for _ in range(8):
            region.mprotect(0, region.size, READ_WRITE)
            children = [joined(hammer) for _ in range(2)]
            region.mprotect(0, region.size, revoked)
            first = os.pread(region.fileno(), PAGE, last)
            for child in children:
                assert child.wait() == end
            assert os.pread(region.fileno(), PAGE, last) == first


def test_a_refused_write_tells_which_change_forbids_it(region: Region, joined: Callable[..., Child]) -> None:
    def write(child: Child) -> None:
        idle(child)
        with pytest.raises(ProtectionError) as caught:
            region.write(PAGE - 1, b"12")
        error = caught.value
        assert (error.offset, error.required, error.actual) == (PAGE, WRITE, READ)
        assert (error.generation, error.author) == (2, os.getppid())

    child = joined(write)
    region.mprotect(0, PAGE, NONE)
    region.mprotect(0, 3 * PAGE, READ)
    region.mprotect(0, PAGE, READ_WRITE)
    child.say()
    assert child.wait() == 0
    assert region.read(PAGE - 1, 2) == b"\0\0"


# -- Promise 2: grant -------------------------------------------------------------------------------------------------


def load(region: Region) -> None:
    assert region.buf[0] == 0


def store(region: Region) -> None:
    region.buf[0] = 1


def load_by_system_call(region: Region) -> None:
    reader, writer = os.pipe()
    os.write(writer, region.buf[:PAGE])
    assert os.read(reader, PAGE) == bytes(PAGE)


def store_by_system_call(region: Region) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"1234")
    assert os.readv(reader, [region.buf[:2], region.buf[2:4]]) == 4


@pytest.mark.parametrize("prot", [NONE, READ, WRITE, READ_WRITE])
@pytest.mark.parametrize("access", [load, store, load_by_system_call, store_by_system_call])
@pytest.mark.parametrize("initial", [NONE, READ_WRITE])
def test_what_is_allowed_succeeds_and_what_is_not_does_not(
    joined: Callable[..., Child], access: Callable[[Region], None], prot: Prot, initial: Prot
) -> None:
    def body(child: Child) -> None:
        die_quietly()
        idle(child)
        access(region)

    with pyshare.create(size=2 * PAGE, prot=initial) as region:
        child = joined(body)
        region.mprotect(0, PAGE, prot)
        agreed(region, child.pid)
        child.say()
        needed = WRITE if "store" in access.__name__ else READ | WRITE
        refusal = 1 if "call" in access.__name__ else -signal.SIGSEGV
        assert child.wait() == (0 if prot & needed else refusal)


# -- Promise 3: order -------------------------------------------------------------------------------------------------


def test_concurrent_changes_are_totally_ordered(region: Region, joined: Callable[..., Child]) -> None:
    threads, changes, pages = 2, 60, region.size // PAGE

    def change(made: list[tuple[int, int, int, int]], dice: random.Random) -> None:
        for _ in range(changes):
            first = dice.randrange(pages)
            count, prot = dice.randrange(1, pages - first + 1), dice.choice([NONE, READ, READ_WRITE])
            made.append((region.mprotect(first * PAGE, count * PAGE, prot, timeout=None), first, count, prot))

    def caller(child: Child) -> None:
        made: list[tuple[int, int, int, int]] = []
        idle(child)
        with in_background(*[lambda: change(made, random.Random(os.urandom(8)))] * threads):
            pass
        child.say(json.dumps(made))
        child.hear()

    children = [joined(caller) for _ in range(3)]
    for child in children:
        child.say()
    made = sorted(one for child in children for one in json.loads(child.hear()))
    assert [one[0] for one in made] == list(range(1, len(children) * threads * changes + 1))
    expected = [READ_WRITE] * pages
    for _, first, count, prot in made:
        expected[first : first + count] = [Prot(prot)] * count
    assert [region.protection(page * PAGE) for page in range(pages)] == expected
    agreed(region, *[child.pid for child in children])


def test_two_participants_in_one_process_agree(region: Region, joined: Callable[..., Child]) -> None:
    with pyshare.attach(region.fileno()) as other:
        assert other.address != region.address
        child = joined()
        assert region.mprotect(0, PAGE, READ) == 1
        assert other.mprotect(PAGE, PAGE, NONE) == 2
        assert mapped(os.getpid(), other) == agreed(region, child.pid)


# -- Promise 4: all or nothing ----------------------------------------------------------------------------------------


@co_operative
@pytest.mark.parametrize("who", ["caller", "another"])
def test_a_change_that_one_cannot_apply_is_undone_everywhere(
    region: Region, joined: Callable[..., Child], who: str
) -> None:
    full, other = joined(at_its_limit(region)), joined()
    region.mprotect(16 * PAGE, 8 * PAGE, READ)
    before = agreed(region, full.pid, other.pid)
    tell(full, "fill")
    if who == "caller":
        tell(full, "change")
    else:
        with refused(full):
            region.mprotect(5 * PAGE, PAGE, READ)
    assert agreed(region, full.pid, other.pid) == before
    assert not any(one.fenced for one in region.participants())
    generation = region.generation
    assert generation > 2, "what was undone was published, so it has a generation"
    tell(full, "free 2")
    assert region.mprotect(5 * PAGE, PAGE, READ) == generation + 1
    agreed(region, full.pid, other.pid)


@co_operative
def test_who_cannot_go_back_is_fenced(region: Region, fork: Fork, joined: Callable[..., Child]) -> None:
    """`late` has a checkerboard, which the change merges; before it is undone, `late` uses the room for itself."""
    for page in range(9, 29, 2):
        region.mprotect(page * PAGE, PAGE, NONE)
    before = region.protections()
    full, late = joined(at_its_limit(region)), joined(at_its_limit(region))

    def call(child: Child) -> None:
        with refused(full):
            region.mprotect(4 * PAGE, 24 * PAGE, READ)
        idle(child)

    tell(full, "fill")
    tell(late, "fill")
    tell(late, "free 1")
    caller = fork(call, point="U1_kind=stop")
    caller.wait_stopped()
    assert mapped(late.pid, region)[0:2] == [(0, 4 * PAGE, READ_WRITE), (4 * PAGE, 24 * PAGE, READ)]
    tell(late, "fill")
    caller.resume()
    caller.hear()
    assert region.protections() == before
    agreed(region, full.pid, caller.pid)
    assert mapped(late.pid, region) == [(0, region.size, NONE)]
    assert [participant(region, child).fenced for child in (full, late, caller)] == [False, True, False]
    # A change that it cannot follow leaves it fenced, and is made; one that it can ends the fence.
    tell(full, "free 2")
    region.mprotect(0, PAGE, READ)
    assert mapped(late.pid, region) == [(0, region.size, NONE)]
    tell(late, "free 30")
    region.mprotect(31 * PAGE, PAGE, READ)
    agreed(region, full.pid, late.pid, caller.pid)
    assert not participant(region, late).fenced


# -- Promise 7: bounded waiting ---------------------------------------------------------------------------------------


@co_operative
def test_a_stopped_participant_is_named_and_follows_later(region: Region, joined: Callable[..., Child]) -> None:
    stopped, other = joined(), joined()
    stopped.stop()
    with silent(1, stopped):
        region.mprotect(0, PAGE, READ, timeout=SOON)
    agreed(region, other.pid)
    assert mapped(stopped.pid, region) == [(0, region.size, READ_WRITE)]
    # Nobody waits behind it: later calls publish, and time out in their turn.
    with silent(2, stopped):
        region.mprotect(2 * PAGE, PAGE, NONE, timeout=SOON)
    assert participant(region, stopped).applied == 0
    stopped.resume()
    assert region.mprotect(4 * PAGE, PAGE, READ) == 3
    assert len(agreed(region, stopped.pid, other.pid)) == 6


@co_operative
def test_a_late_participant_applies_before_it_acknowledges(region: Region, joined: Callable[..., Child]) -> None:
    late = joined()
    for generation in range(1, 20):
        late.stop()
        with silent(generation, late):
            region.mprotect(0, region.size, generation % 4, timeout=0)
        late.resume()
        until(lambda generation=generation: participant(region, late).applied == generation)
        agreed(region, late.pid)


@co_operative
def test_who_slept_through_more_than_the_ring_holds_takes_the_whole_map(
    region: Region, joined: Callable[..., Child]
) -> None:
    late = joined()
    late.stop()
    for change in range(1, 1101):
        with silent(change, late):
            page = change % 16 if change > 1 else 20  # only the first change tells of this one
            region.mprotect(page * PAGE, PAGE, READ if change < 1030 else NONE, timeout=0)
    late.resume()
    assert region.mprotect(31 * PAGE, PAGE, READ) == 1101
    agreed(region, late.pid)


@co_operative
@pytest.mark.parametrize("point", [None, "A3_fail=stop"], ids=["before it applied", "while it failed"])
def test_a_late_participant_that_cannot_apply_is_fenced(
    region: Region, joined: Callable[..., Child], point: str | None
) -> None:
    late = joined(at_its_limit(region), point=point)
    tell(late, "fill")
    if point is None:
        late.stop()
    with in_background(lambda: region.mprotect(5 * PAGE, PAGE, READ, timeout=1 if point else AT_ONCE)) as outcomes:
        if point is not None:
            late.wait_stopped()
    assert [type(outcome) for outcome in outcomes] == [PropagationTimeout]
    late.resume()
    until(lambda: participant(region, late).fenced)
    assert mapped(late.pid, region) == [(0, region.size, NONE)]
    assert region.protection(5 * PAGE) == READ
    tell(late, "free 2")
    region.mprotect(5 * PAGE, PAGE, NONE)
    agreed(region, late.pid)
    assert not participant(region, late).fenced


@co_operative
def test_an_undo_that_one_is_late_for_is_still_an_error(region: Region, joined: Callable[..., Child]) -> None:
    full, late = joined(at_its_limit(region)), joined(point="A2_apply=stop@2")
    tell(full, "fill")
    with refused(full):
        region.mprotect(5 * PAGE, PAGE, READ, timeout=1)
    late.wait_stopped()
    agreed(region, full.pid)
    assert mapped(late.pid, region) != mapped(full.pid, region)
    late.resume()
    region.mprotect(0, region.size, READ)
    agreed(region, full.pid, late.pid)


@pytest.mark.parametrize(
    "point", ["C1_lock", "C2_save", "C3_attempt", "C4_map", "C5_publish", "C6_await", "C7_complete"]
)
def test_a_stopped_caller_delays_others_and_they_change_nothing(region: Region, fork: Fork, point: str) -> None:
    def call(child: Child) -> None:
        region.mprotect(0, 8 * PAGE, READ)
        idle(child)

    holder = fork(call, point=f"{point}=stop")
    holder.wait_stopped()
    for timeout in (0, AT_ONCE):
        with silent(None, holder):
            region.mprotect(16 * PAGE, PAGE, NONE, timeout=timeout)
        with silent(None, holder):
            pyshare.attach(region.fileno(), timeout=timeout)
    assert region.protection(16 * PAGE) == READ_WRITE
    with in_background(lambda: region.mprotect(16 * PAGE, PAGE, NONE, timeout=None)) as outcomes:
        until(lambda: word(region, LOCK) & WAITING)
        holder.resume()
    assert outcomes == [2]
    assert holder.hear() == "ok"
    assert agreed(region, holder.pid)[0] == (0, 8 * PAGE, READ)


@co_operative
def test_the_default_timeout_can_be_set(region: Region, joined: Callable[..., Child]) -> None:
    stopped = joined()
    stopped.stop()
    pyshare.set_default_timeout(AT_ONCE)
    try:
        with silent(1, stopped):
            region.mprotect(0, PAGE, READ)
        pyshare.set_default_timeout(None)
        with in_background(lambda: region.mprotect(0, PAGE, NONE)) as outcomes:
            until(lambda: region.protection(0) == NONE)
            stopped.resume()
        assert outcomes == [2]
    finally:
        pyshare.set_default_timeout(5.0)


def test_no_time_at_all_is_enough_when_there_is_nobody_to_wait_for(region: Region) -> None:
    assert region.mprotect(0, PAGE, READ, timeout=0) == 1
    agreed(region)


@co_operative
def test_other_threads_run_meanwhile(region: Region, joined: Callable[..., Child]) -> None:
    stopped = joined()
    stopped.stop()
    with in_background(lambda: region.mprotect(0, PAGE, READ, timeout=None)) as outcomes:
        until(lambda: region.protection(0) == READ)  # by Python code, while the other thread waits
        assert outcomes == []
        stopped.resume()
    assert outcomes == [1]


# -- Promise 7: signals -----------------------------------------------------------------------------------------------


class HandlerError(Exception):
    """Raised by a signal handler."""


def waiting_caller(region: Region, caught: type[BaseException] | None) -> Callable[[Child], None]:
    """A body that waits without limit for a change, with handlers; it ends with this exception, or returns."""

    def fail(*_: object) -> None:
        raise HandlerError

    def body(child: Child) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, lambda *_: child.say("handled"))
        signal.signal(signal.SIGUSR2, fail)
        child.say()
        generation = region.generation
        with pytest.raises(caught) if caught else contextlib.nullcontext():
            region.mprotect(0, PAGE, (region.protection(0) + 1) % 4, timeout=None)
        assert region.generation == generation + 1, "it is made, however the wait ended"
        idle(child)

    return body


@pytest.mark.parametrize(
    ("number", "caught"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR2, HandlerError)], ids=["Ctrl-C", "raise"]
)
def test_a_handler_that_raises_ends_the_wait_and_the_change_is_made(
    region: Region, joined: Callable[..., Child], number: signal.Signals, caught: type[BaseException]
) -> None:
    stopped = joined()
    stopped.stop()
    for prot in (NONE, READ, WRITE):
        caller = joined(waiting_caller(region, caught))
        until(lambda prot=prot: region.protection(0) == prot)
        caller.kill(number)
        assert caller.hear() == "ok"
        caller.say()
        assert caller.wait() == 0
        assert word(region, LOCK) == 0
    stopped.resume()
    region.mprotect(PAGE, PAGE, READ)
    agreed(region, stopped.pid)


def test_a_handler_that_returns_does_not_end_the_wait(region: Region, joined: Callable[..., Child]) -> None:
    stopped = joined()
    stopped.stop()
    caller = joined(waiting_caller(region, None))
    until(lambda: region.protection(0) == NONE)
    for _ in range(20):
        caller.kill(signal.SIGUSR1)
        assert caller.hear() == "handled"
    stopped.resume()
    assert caller.hear() == "ok"
    agreed(region, stopped.pid, caller.pid)


# -- Generations near their wraps: 31 bits in an acknowledgement, 32 in the word that agents sleep on ------------------


@pytest.mark.parametrize("wrap", [2**31, 2**32, 2**33 + 2**31])
def test_changes_across_a_wrap(fork: Fork, wrap: int) -> None:
    with region_at(wrap - 4, size=8 * PAGE) as region:
        child, stopped = fork(idle), fork(idle)
        assert (child.hear(), stopped.hear()) == ("ok", "ok")
        for generation in range(wrap - 3, wrap + 4):
            if generation == wrap - 1:
                stopped.stop()
            late = wrap - 1 <= generation <= wrap
            with silent(generation, stopped) if late else contextlib.nullcontext():
                made = region.mprotect(generation % 8 * PAGE, PAGE, generation % 3, timeout=SOON if late else 5)
                assert made == generation
            if generation == wrap:
                stopped.resume()
            else:
                agreed(region, child.pid)
        agreed(region, child.pid, stopped.pid)
        assert region.generation == wrap + 3


@pytest.mark.parametrize("changes", [2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**33])
def test_who_is_silent_for_any_number_of_changes_has_not_acknowledged(
    region: Region, joined: Callable[..., Child], changes: int
) -> None:
    """So many have been made since, one of which closed a page; the next, of another page, is not made for it."""
    stopped, other = joined(), joined()
    stopped.stop()
    set_generation(region.fileno(), changes)
    os.pwrite(region.fileno(), bytes([READ ^ READ_WRITE]), section_of(region, CUR) + 1)
    for page in (0, 2):
        with silent(changes + 1 + page // 2, stopped):
            region.mprotect(page * PAGE, PAGE, READ, timeout=AT_ONCE)
        agreed(region, other.pid)
    stopped.resume()
    region.mprotect(4 * PAGE, PAGE, READ)
    assert len(agreed(region, stopped.pid, other.pid)) == 4


# -- Where the kernel, or a filter, has no futex_waitv -----------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM], ids=errno.errorcode.get)
def test_without_waitv_everything_still_works(
    region: Region, fork: Fork, joined: Callable[..., Child], error: int
) -> None:
    def filtered_body(child: Child) -> None:
        forbid_waitv(error)
        child.say()
        while prot := child.hear():
            child.say(str(region.mprotect(0, 4 * PAGE, int(prot), timeout=None)))

    def holder_body(child: Child) -> None:
        region.mprotect(0, PAGE, READ)
        idle(child)

    filtered, peer = joined(filtered_body), joined()
    filtered.say("1")
    assert filtered.hear() == "1"
    assert region.mprotect(PAGE, PAGE, READ) == 2
    agreed(region, filtered.pid, peer.pid)
    # A participant is late, and another dies, while it waits.
    peer.stop()
    filtered.say("2")
    until(lambda: region.protection(0) == WRITE)
    peer.resume()
    assert filtered.hear() == "3"
    peer.stop()
    filtered.say("3")
    until(lambda: region.protection(0) == READ_WRITE)
    peer.kill()
    assert filtered.hear() == "4"
    # A holder of the lock goes on, and another dies, while it waits.
    for end in (Child.resume, Child.kill):
        holder = fork(holder_body, point="C6_await=stop")
        holder.wait_stopped()
        filtered.say("0")
        until(lambda: word(region, LOCK) & WAITING)
        end(holder)
        generation = int(filtered.hear())
        assert generation == region.generation
        assert agreed(region, filtered.pid)[0] == (0, 4 * PAGE, NONE)


# -- A region far larger than memory -----------------------------------------------------------------------------------


def test_a_sparse_region_costs_nothing(fork: Fork) -> None:
    def touched() -> int:
        return os.stat(region.fileno()).st_blocks * 512

    size = 64 << 30
    with pyshare.create(size=size, max_participants=4) as region:
        child = fork(idle)
        assert child.hear() == "ok"
        assert region.protections() == [(0, size, READ_WRITE)]
        middle = size // 2 + 5 * PAGE
        region.mprotect(middle, PAGE, READ)
        expected = [(0, middle, READ_WRITE), (middle, PAGE, READ), (middle + PAGE, size - middle - PAGE, READ_WRITE)]
        assert region.protections() == agreed(region, child.pid) == expected
        assert touched() < 1 << 18
        # Joining and taking the whole map look at its holes no more than that.
        child.stop()
        for generation in range(2, 1100):
            with silent(generation, child):
                region.mprotect(middle, PAGE, NONE, timeout=0)
        child.resume()
        region.mprotect(0, PAGE, READ)
        agreed(region, child.pid)
        assert touched() < 1 << 18
