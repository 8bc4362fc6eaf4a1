"""How callers come to change the page tables of others: descriptors, and what becomes of them; deaths; refusals.

A participant that is stopped and follows was reached from outside; one that is named in a timeout was not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Child, idle, until
from kernel import (
    GENERATION,
    PAGE,
    SECTIONS,
    agreed,
    libc,
    mapped,
    refuse,
    stopped_before,
    tell,
    wake,
    word,
)
from members import (
    AT_ONCE,
    CHUNK,
    Fork,
    Joined,
    Member,
    change,
    close_all,
    engines,
    heard,
    in_new_pids,
    member,
    needs_thread_pidfd,
    new_userfaultfd,
    obey,
    order,
    own_userfaultfds,
    pages_of,
    silent,
    successor_of,
)

import pyshare
from pyshare import EXEC, NONE, READ, READ_WRITE, PropagationTimeout, Prot, Region

SLOT_SIZE, TID = 256, 132  # in ext/segment/layout.h


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    """Two whole chunks and a part of a third; of other sizes (bytes) by indirect parameters."""
    size = getattr(request, "param", (2 * CHUNK + 7) * PAGE - 100)
    with pyshare.create(size=size, max_participants=64, engine="uffd") as made:
        yield made


# -- Descriptors -------------------------------------------------------------------------------------------------------


def other_files(like: list[int]) -> None:
    for _ in range(max(like) + 1):
        os.open("/dev/zero", os.O_RDWR)


def userfaultfds(like: list[int]) -> None:
    fd = new_userfaultfd()
    for number in like:
        if number != fd:
            os.dup2(fd, number)


def nothing(like: list[int]) -> None:
    """The numbers stay free."""


def regions(like: list[int]) -> None:
    """Regions come, which take numbers from the same places."""
    kept.extend(pyshare.create(size=PAGE, engine="uffd") for _ in like)
    for one in kept:
        one.mprotect(0, PAGE, READ)


kept: list[Region] = []


@needs_thread_pidfd
@pytest.mark.parametrize("reuse", [nothing, other_files, userfaultfds, regions])
@pytest.mark.parametrize("known", [False, True], ids=["before", "after"])
def test_closed_descriptors_are_noticed(
    region: Region, joined: Joined, reuse: Callable[[list[int]], None], known: bool
) -> None:
    """The marks stay, and whatever has the numbers now, own and borrowed, nothing is taken for what it was."""

    def body(child: Child) -> None:
        if known:  # else it has borrowed nothing so far
            change(region, 0, 1, READ)
        numbers = own_userfaultfds()
        close_all(child)
        reuse(numbers)
        with region.lease(0, PAGE) as lease:
            lease.view[0] = 1
        obey(region)(child)

    stopped = joined()
    change(region, 0, 1, READ)
    child = joined(body)
    pids = [child.pid, stopped.pid]
    assert agreed(region, *pids)[0] == (0, PAGE, READ)
    stopped.stop()
    for turn, (first, prot) in enumerate([(1, READ), (0, READ_WRITE), (2, READ), (1, READ_WRITE), (CHUNK, READ)]):
        if turn % 2:
            change(region, first, 1, prot)
        else:
            order(child, first, 1, prot)
        agreed(region, *pids)
    stopped.resume()
    callers: list[Callable[[Prot], int]] = [
        lambda prot: order(child, 3, 2, prot),
        lambda prot: change(region, 3, 2, prot),
    ]
    for who in callers:
        for prot in (NONE, READ, READ_WRITE):
            who(prot)
            agreed(region, *pids)
    assert region.buf[0] == 1


@needs_thread_pidfd
@pytest.mark.parametrize("which", range(3))
def test_one_number_becomes_another_userfaultfd(region: Region, joined: Joined, which: int) -> None:
    """Any one of those that were borrowed, while the others are what they were: it would change our own page tables."""

    def body(child: Child) -> None:
        change(region, 0, 1, READ)
        borrowed = sorted(own_userfaultfds())[1:]
        assert len(borrowed) == 3
        fd = new_userfaultfd()
        os.dup2(fd, borrowed[which])
        obey(region)(child)

    others = [joined() for _ in range(2)]
    child = joined(body)
    for other in others:
        other.stop()
    for first, prot in [(1, READ), (0, READ_WRITE), (1, READ_WRITE)]:
        order(child, first, 1, prot)
        agreed(region, child.pid, *[other.pid for other in others])
    for other in others:
        other.resume()


def test_a_number_of_ours_that_leads_to_another_process_is_forgotten(fork: Fork) -> None:
    """Where the limit is low, our own userfaultfds and those of others have numbers of the same range; after
    closerange, what is borrowed next for one region has the number that was another's own."""
    with contextlib.ExitStack() as stack:
        regions = [stack.enter_context(pyshare.create(size=4 * PAGE, engine="uffd")) for _ in range(4)]
        for one in regions:
            one.mprotect(0, 2 * PAGE, READ)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)

        def body(child: Child) -> None:
            close_all(child)
            for one in regions:
                one.mprotect(3 * PAGE, PAGE, READ)  # borrows the parent's
                for other in regions:
                    with other.lease(0, 2 * PAGE):
                        child.say()
                        child.hear()
            idle(child)

        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
        try:
            child = fork(body)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for _ in range(len(regions) ** 2):
            assert child.hear() == "ok"
            for one in regions:
                assert mapped(os.getpid(), one)[0] == (0, 2 * PAGE, READ)
            child.say()
        assert child.hear() == "ok"


def test_a_forked_child_has_no_way_to_its_parents_page_tables(region: Region, joined: Joined) -> None:
    """A userfaultfd addresses the process that made it, whoever has the descriptor."""
    change(region, 0, 2, READ)
    before = {os.fstat(fd).st_ino for fd in own_userfaultfds()}
    assert before

    def body(child: Child) -> None:
        assert not before & {os.fstat(fd).st_ino for fd in own_userfaultfds()}
        with region.lease(0, 2 * PAGE) as lease:
            idle(child)
            lease.view[0] = 1

    child = joined(body)
    assert mapped(os.getpid(), region)[0] == (0, 2 * PAGE, READ)
    assert mapped(child.pid, region)[0] == (0, region.size + 100, READ_WRITE)
    child.say()
    assert child.wait() == 0
    agreed(region)


def test_exec_takes_a_participant_away(region: Region, joined: Joined) -> None:
    def body(child: Child) -> None:
        idle(child)
        os.execv(sys.executable, [sys.executable, "-c", "import signal; signal.pause()"])

    child = joined(body)
    change(region, 0, 1, READ)
    child.say()
    with pytest.raises(AssertionError, match="is gone"):
        child.hear()
    change(region, 0, 1, READ_WRITE)
    assert list(engines(region)) == [os.getpid()]


@needs_thread_pidfd
@pytest.mark.parametrize("limit", [1024, 4096])
def test_borrowed_descriptors_stay_out_of_the_way(region: Region, fork: Fork, joined: Joined, limit: int) -> None:
    """High numbers where the limit allows it."""
    children = [joined() for _ in range(20)]

    def body(child: Child) -> None:
        before = set(own_userfaultfds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        change(region, 0, 1, READ)
        borrowed = set(own_userfaultfds()) - before
        assert len(borrowed) == len(children) + 1
        assert min(borrowed) >= 1024 or limit == 1024
        idle(child)

    assert fork(body).hear() == "ok"


def test_who_has_no_room_for_a_descriptor_wakes_the_others(region: Region, fork: Fork, joined: Joined) -> None:
    children = [joined() for _ in range(20)]
    pids = [child.pid for child in children]

    def body(child: Child) -> None:
        before = set(own_userfaultfds())
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, files[1]))
        for prot in (READ, READ_WRITE, READ):
            change(region, 0, 1, prot)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        assert 0 < len(set(own_userfaultfds()) - before) < len(children)
        idle(child)

    assert fork(body).hear() == "ok"
    agreed(region, *pids)


def test_a_descriptor_of_somebody_else_is_not_believed(region: Region, joined: Joined) -> None:
    """The slot leads to another process's agent, as where a thread id is used again; the canary is not there."""
    target, other = joined(obey(region)), joined()

    def tid_at(slot: int) -> int:
        return word(region, SECTIONS + 8, "Q") + slot * SLOT_SIZE + TID

    assert [one.pid for one in region.participants()] == [os.getpid(), target.pid, other.pid]
    tids = [word(region, tid_at(slot)) for slot in range(3)]
    os.pwrite(region.fileno(), struct.pack("I", tids[2]), tid_at(1))
    for first, prot in ((0, READ), (0, READ_WRITE), (1, READ)):
        change(region, first, 1, prot)
        agreed(region, target.pid, other.pid)
    target.stop()  # and its own word for it, by its socket, is
    change(region, 0, 2, READ_WRITE)
    agreed(region, target.pid, other.pid)


# -- Deaths ------------------------------------------------------------------------------------------------------------


def ordered(region: Region, *changes: tuple[int, int, int]) -> Callable[[Child], None]:
    def body(child: Child) -> None:
        for first, count, prot in changes:
            change(region, first, count, prot)
        idle(child)

    return body


@pytest.mark.parametrize("prot", [READ, READ_WRITE])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("point", ["R1_claim", "R2_remote", "R3_ack"])
@pytest.mark.parametrize("asleep", [False, True], ids=["", "stopped"])
def test_a_caller_killed_while_it_changes_others(
    region: Region, fork: Fork, joined: Joined, point: str, times: int, prot: Prot, asleep: bool
) -> None:
    """The next caller finishes what it left, also with those who are stopped."""
    children = [joined() for _ in range(4)]
    pids = [child.pid for child in children]
    change(region, 0, 2, READ ^ READ_WRITE ^ prot)
    for child in children if asleep else []:
        child.stop()
    caller = fork(ordered(region, (0, 2, prot)), point=f"{point}=kill@{times}")
    assert caller.wait() == -signal.SIGKILL
    assert change(region, 4, 1, READ) == 3
    assert agreed(region, *pids)[0] == (0, 2 * PAGE, prot) or prot == READ_WRITE
    for child in children if asleep else []:
        child.resume()
    change(region, 5, 1, NONE)
    change(region, 0, 2, READ_WRITE)
    agreed(region, *pids)


@needs_thread_pidfd
@pytest.mark.parametrize("point", ["R1_claim", "R2_remote", "R3_ack"])
def test_an_agent_takes_the_claim_of_a_dead_caller_over(region: Region, fork: Fork, joined: Joined, point: str) -> None:
    """In the process of the claimed participant, whose own threads wait for it."""
    child, target = joined(obey(region)), joined(obey(region))
    caller = fork(ordered(region, (0, 1, READ)), point=f"{point}=kill@2")
    assert caller.wait() == -signal.SIGKILL
    assert order(target, 1, 1, NONE) == 2
    assert agreed(region, child.pid, target.pid)[:2] == [(0, PAGE, READ), (PAGE, PAGE, NONE)]


@needs_thread_pidfd
@pytest.mark.parametrize("point", ["R1_claim", "R2_remote", "R3_ack"])
def test_a_participant_dies_while_it_is_changed(region: Region, fork: Fork, joined: Joined, point: str) -> None:
    """Between the look at its descriptor and the change; its slot is free for the next."""
    target, other = joined(), joined()
    target.stop()
    caller = fork(ordered(region, (0, 1, READ), (1, 1, READ)), point=f"{point}=stop@2")
    caller.wait_stopped()
    target.kill()
    assert target.wait() == -signal.SIGKILL
    caller.resume()
    assert caller.hear() == "ok"
    assert sorted(engines(region)) == sorted([os.getpid(), other.pid, caller.pid])
    successor = joined()
    successor.stop()
    change(region, 0, 1, READ_WRITE)
    assert agreed(region, other.pid, caller.pid, successor.pid)[1] == (PAGE, PAGE, READ)


def with_pid(pid: int, joined: Joined) -> Child:
    """A participant that the kernel gives the pid of one that is dead; skips where nobody may ask it for that."""
    for _ in range(200):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError as error:
            pytest.skip(f"pids cannot be chosen here: {error}")
        child = joined()
        if child.pid == pid:
            return child
        child.kill()
        child.wait()
    pytest.skip("others were always quicker")


@needs_thread_pidfd
def test_a_pid_that_is_used_again(region: Region, joined: Joined) -> None:
    """What was borrowed of the first is of no use for the second, in the same slot or another."""
    for _ in range(3):
        first = joined()
        change(region, 0, 1, READ)
        first.kill()
        first.wait()
        second = with_pid(first.pid, joined)
        second.stop()
        change(region, 0, 1, READ_WRITE)
        change(region, 1, 1, READ)
        agreed(region, second.pid)
        second.kill()
        second.wait()


@needs_thread_pidfd
def test_a_pid_that_is_used_again_before_anything_was_borrowed(fork: Fork) -> None:
    """A slot of the dead leads to a living one's userfaultfd, which marks pages of that pid: not kept for both."""

    def body() -> None:
        with pyshare.create(size=2 * CHUNK * PAGE, engine="uffd") as region:
            dead, bystander = Child(idle), Child(idle)
            assert dead.hear() == bystander.hear() == "ok"
            dead.kill()
            dead.wait()
            second = successor_of(dead)
            assert second.hear() == "ok"
            second.stop()
            change(region, 0, 1, READ)
            agreed(region, second.pid, bystander.pid)
            assert len(own_userfaultfds()) == 3, "our own, and of each that lives"
            change(region, 0, 2, READ_WRITE)
            agreed(region, second.pid, bystander.pid)
            for child in (second, bystander):
                child.end()

    in_new_pids(fork, body)


@needs_thread_pidfd
def test_a_pid_that_is_used_again_between_borrowing_and_changing(fork: Fork) -> None:
    """The change does nothing to its successor, which joins with the map that is made."""

    def body() -> None:
        with pyshare.create(size=2 * CHUNK * PAGE, engine="uffd") as region:
            dead = Child(idle)
            assert dead.hear() == "ok"
            caller = Child(ordered(region, (0, 1, READ)), point="R1_claim=stop@2")
            caller.wait_stopped()
            dead.kill()
            dead.wait()
            second = successor_of(dead)
            caller.resume()
            assert caller.hear() == second.hear() == "ok"
            caller.end()
            assert agreed(region, second.pid)[0] == (0, PAGE, READ)
            assert sorted(one.pid for one in region.participants() if one.alive) == [1, second.pid]
            second.end()

    in_new_pids(fork, body)


# -- What may be refused -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unprivileged(fork: Fork, dumpable: bool, caller: Callable[[Child, Region, list[Child]], object]) -> Iterator[None]:
    """caller(child, region, others) in a process of nobody, like those others; root may look anyway."""
    set_dumpable, nobody = 4, 65534

    def body(child: Child) -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(nobody, nobody, nobody)
            os.setresuid(nobody, nobody, nobody)
        assert libc.prctl(set_dumpable, int(dumpable), 0, 0, 0) == 0
        region = pyshare.create(size=2 * CHUNK * PAGE, engine="uffd")
        others = [Child(member(region, "uffd") if number else obey(region)) for number in range(2)]
        assert [other.hear() for other in others] == ["ok"] * 2
        try:
            caller(child, region, others)
        finally:
            for other in others:
                other.end()

    child = fork(body)
    yield
    assert child.wait() == 0


def reaches_after_one_change(_: Child, region: Region, others: list[Child]) -> None:
    """Their agents answer when they run for the first change; from then on nobody needs to."""
    change(region, 0, 1, READ)
    for other in others:
        other.stop()
    for prot in (READ_WRITE, READ, READ_WRITE):
        change(region, 0, 1, prot)
    change(region, 1, 1, READ)
    for other in others:
        other.resume()
    # By what they can do: page 0 may be written, page 1 may not.
    assert order(others[0], 2, 1, READ) == region.generation


@pytest.mark.parametrize("dumpable", [True, False], ids=["dumpable", "not dumpable"])
def test_a_process_that_nobody_may_look_into_gives_its_descriptor_by_its_socket(fork: Fork, dumpable: bool) -> None:
    with unprivileged(fork, dumpable, reaches_after_one_change):
        pass


@pytest.mark.parametrize("call", ["pidfd_getfd", "pidfd_open"])
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_caller_that_may_not_take_a_descriptor_asks_for_it(
    region: Region, fork: Fork, joined: Joined, call: str, error: int
) -> None:
    def body(child: Child) -> None:
        refuse(call, error)
        obey(region)(child)

    others = [joined() for _ in range(3)]
    pids = [child.pid for child in others]
    caller = fork(body)
    assert caller.hear() == "ok"
    order(caller, 0, 1, READ)
    agreed(region, caller.pid, *pids)
    for child in others:
        child.stop()
    for first, prot in ((1, READ), (0, READ_WRITE), (1, READ_WRITE), (2, READ)):
        order(caller, first, 1, prot)
        agreed(region, caller.pid, *pids)


def test_who_is_asked_and_does_not_answer_is_late(region: Region, fork: Fork, joined: Joined) -> None:
    def body(child: Child) -> None:
        refuse("pidfd_getfd", errno.EPERM)
        with silent(late):
            change(region, 0, 1, READ, timeout=AT_ONCE)
        obey(region)(child)

    late = joined()
    late.stop()
    caller = fork(body)
    assert caller.hear() == "ok"
    assert mapped(late.pid, region) == [(0, pages_of(region) * PAGE, READ_WRITE)]
    late.resume()
    order(caller, 1, 1, READ)
    order(caller, 2, 1, READ)
    agreed(region, caller.pid, late.pid)


def belongings() -> tuple[int, int, int, int]:
    """Descriptors, threads, mappings of regions, names."""
    with open("/proc/self/maps") as maps:
        mine = sum("pyshare" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mine, len(pyshare.names())


def test_where_nothing_leads_to_ones_own_userfaultfd(fork: Fork) -> None:
    """The agent has it, and cannot give the program a copy: then its own changes could not be made."""

    def body(_: Child) -> None:
        refuse("socket", errno.EPERM)
        refuse("pidfd_open", errno.ENOSYS)
        with pytest.raises(PermissionError):
            pyshare.create(size=PAGE, engine="uffd")
        with pyshare.create(size=2 * PAGE) as region:
            assert region.engine == "mprotect"
            change(region, 0, 1, READ)
            change(region, 0, 1, READ_WRITE)

    assert fork(body).wait() == 0


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("call", "request_"), [("userfaultfd", None), ("ioctl", None), ("ioctl", 0xC018AA06)], ids=["", "all", "marks"]
)
def test_where_userfaultfd_is_refused(
    region: Region, joined: Joined, call: str, request_: int | None, error: int
) -> None:
    """An explicit engine is refused by the kernel's own errno, and leaves nothing behind; "auto" takes the other."""
    name = f"refused-{os.getpid()}"

    def body(child: Child) -> None:
        fd = os.dup(region.fileno())
        region.close()
        refuse(call, error, request_)
        until(lambda: belongings()[1] == 1)  # the closed region's may still be ending, too
        before = belongings()
        attempts: list[Callable[[], object]] = [
            lambda: pyshare.create(name, size=PAGE, engine="uffd"),
            lambda: pyshare.attach(fd, engine="uffd"),
        ]
        for attempt in attempts:
            with pytest.raises(OSError, match=os.strerror(error)) as caught:
                attempt()
            assert caught.value.errno == error
            until(lambda: belongings() == before)  # its thread, which has failed, may still be ending
        own = pyshare.attach(fd)
        assert own.engine == "mprotect"
        child.say()
        child.say(str(own.address))
        obey(own)(child)

    other = Member(joined, region, body)
    assert engines(region) == {os.getpid(): "uffd", other.pid: "mprotect"}
    for prot in (READ, NONE, READ_WRITE, READ | EXEC, READ):
        order(other.child, 0, 2, prot)
        assert other.follows(region)
        change(region, 1, 2, prot)
        assert other.follows(region)


def test_a_child_that_has_no_userfaultfd_takes_part_all_the_same_or_is_detached(fork: Fork) -> None:
    """What fork() joins by is the engine that was asked for."""

    def body(child: Child) -> None:
        with pyshare.create(size=PAGE) as auto, pyshare.create(size=PAGE, engine="uffd") as explicit:
            refuse("userfaultfd", errno.EPERM)

            def forked(grandchild: Child) -> None:
                assert auto.engine == "mprotect"
                auto.mprotect(0, PAGE, READ)
                with pytest.raises(PermissionError):
                    explicit.read(0, 1)
                idle(grandchild)

            grandchild = Child(forked)
            assert grandchild.hear() == "ok"
            assert auto.protection(0) == READ
            assert [one.pid for one in explicit.participants()] == [os.getpid()]
            grandchild.end()
        child.say()

    assert fork(body).hear() == "ok"


# -- No descriptor is to be had for the own userfaultfd ----------------------------------------------------------------


def starve(free: int = 0) -> None:
    """The program's copy of the userfaultfd is gone, and so many numbers are left."""
    for fd in own_userfaultfds():
        os.close(fd)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 40, hard))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    for _ in range(free):
        os.close(taken.pop())


@pytest.mark.parametrize("forked", [False, True], ids=["closed", "forked"])
@pytest.mark.parametrize("free", [0, 1, 2])
def test_the_agent_does_what_a_call_has_no_descriptor_for(
    region: Region, joined: Joined, free: int, forked: bool
) -> None:
    """The program's copy of the userfaultfd is gone, or a child never had one, and no number is free for another."""
    change(region, 0, 2, READ)
    other = joined()

    def use() -> None:
        for _ in range(3):
            with region.lease(0, PAGE) as lease:
                lease.view[:1] = b"x"
            with pytest.raises(pyshare.ProtectionError):
                region.write(0, b"y")
            for prot in (READ_WRITE, READ):
                change(region, 3, 1, prot)
            change(region, 4, 1, NONE)
            change(region, 4, 1, READ_WRITE)
            region.write(4 * PAGE, b"z")
            assert region.read(0, 1) == b"x"

    def body(child: Child) -> None:
        starve(free)
        if forked:
            pid = os.fork()
            if pid == 0:
                use()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        else:
            use()
        child.say()
        idle(child)

    child = joined(body)
    assert child.hear() == "ok"
    agreed(region, child.pid, other.pid)


@pytest.mark.parametrize("region", [64 * CHUNK * PAGE], indirect=True)
def test_a_lease_that_runs_out_of_time_leaves_no_page_open(region: Region, joined: Joined) -> None:
    """Its agent takes its time for a map of many runs, and has opened the page by then."""

    def body(child: Child) -> None:
        starve()
        child.say()
        while child.hear() == "ok":
            with contextlib.suppress(PropagationTimeout), region.lease(0, PAGE, timeout=0):
                pass
            child.say()

    change(region, 0, pages_of(region), READ)
    for chunk in range(0, pages_of(region), CHUNK):
        for page in range(chunk + 1, chunk + 60, 2):
            change(region, page, 1, READ_WRITE)
    child = joined(body)
    for _ in range(20):
        tell(child, "ok")
        agreed(region, child.pid)


def test_an_agent_that_is_about_to_sleep_is_woken_for_a_lease(region: Region, joined: Joined) -> None:
    """It has looked whether it is wanted before it was."""

    def body(child: Child) -> None:
        child.say()
        child.say(next(task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()))
        child.hear()
        starve()
        child.say()
        with region.lease(0, PAGE) as lease:
            lease.view[:1] = b"x"
            child.say()
        assert not any(one.fenced for one in region.participants())

    change(region, 0, 1, READ)
    child = joined(body)
    agent = int(child.hear())
    with stopped_before(agent, "futex", lambda: wake(region, GENERATION)):
        child.say()
        assert child.hear() == "ok"
        assert not heard(child, AT_ONCE)
    assert child.hear() == "ok"
    assert child.wait() == 0


@pytest.mark.parametrize("places", [1, 70], ids=["one", "more than may be private"])
@pytest.mark.parametrize("region", [70 * 65 * PAGE], indirect=True)
def test_who_is_told_of_violations_goes_on(region: Region, joined: Joined, places: int) -> None:
    """Its private pages are given back by its agent."""

    def body(child: Child) -> None:
        region.on_violation("raise")
        data = np.frombuffer(region.buf, np.uint8)[: places * 65 * PAGE : 65 * PAGE]
        starve()
        for _ in range(3):
            with pytest.raises(pyshare.ProtectionError):
                data[:] = 1
            with pytest.raises(pyshare.ProtectionError):
                region.buf[65 * PAGE] = 1
            region.buf[PAGE] = 1
            assert not any(data.tolist())
        idle(child)

    change(region, 0, pages_of(region), READ)
    change(region, 1, 1, READ_WRITE)
    child = joined(body)
    agreed(region, child.pid)
    assert not any(one.fenced for one in region.participants())
