"""Checks the models with Spin: every configuration must be free of errors, every broken variant must be caught.

    python spec/run.py                  everything
    python spec/run.py --quick          the quick configurations and the broken variants
    python spec/run.py NAME ...         these configurations or variants
    python spec/run.py --trace NAME     ... and the steps that lead to the error, if there is one

Needs `spin` and a C compiler. Exit status 0: all as it must be.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
AT_ONCE = 2  # each search may take MEGABYTES
MEGABYTES = 6000
DEPTH = 1_000_000  # steps from the start; a search goes round about as far as it can


class Protocol(NamedTuple):
    """What protocol.pml is told by -D, in the words of its header."""

    why: str
    callers: int = 2
    second: str = "NONE"
    start: int = 1
    slots: int = 2
    founders: int = 2
    joins: int = 0
    leaves: int = 0
    crashes: int = 0
    timeouts: int = 0
    failures: int = 0
    remote: int = 0
    misses: int = 0
    mends: int = 0
    quick: bool = False
    ends: bool = False  # look for runs that never end instead of for assertions


class Lease(NamedTuple):
    """What lease.pml is told, likewise."""

    why: str
    takers: int = 2
    wide: int = 1
    threads: int = 0
    inner: str = "NOTHING"
    changes: int = 1
    drains: int = 0
    tickets: int = 0
    crashes: int = 0
    timeouts: int = 0
    stops: int = 0
    backstop: int = 1
    patience: int = 0
    quick: bool = False
    ends: bool = False


class Freeze(NamedTuple):
    """What freeze.pml is told, likewise."""

    why: str
    freezers: int = 1
    changes: int = 1
    takers: int = 1
    crashes: int = 1
    timeouts: int = 0
    failures: int = 0
    quick: bool = False
    ends: bool = False


class Snapshot(NamedTuple):
    """What snapshot.pml is told, likewise."""

    why: str
    rounds: int = 1
    stores: int = 0
    leases: int = 0
    nested: int = 0
    restores: int = 0
    reader: int = 0
    patience: int = 0
    crashes: int = 0
    quick: bool = False
    ends: bool = False


class Dirty(NamedTuple):
    """What dirty.pml is told, likewise."""

    why: str
    leases: int = 0
    changes: int = 0
    restores: int = 0
    quick: bool = False
    ends: bool = False


Configuration = Protocol | Lease | Freeze | Snapshot | Dirty


def model(configuration: Configuration) -> Path:
    return HERE / f"{type(configuration).__name__.lower()}.pml"


def defines(configuration: Configuration) -> list[str]:
    fields = configuration._asdict()
    for name in ("why", "quick", "ends"):
        del fields[name]
    if "start" in fields:
        fields["from"] = fields.pop("start")
    return [f"-D{name.upper()}={value}" for name, value in fields.items()]


CONFIGURATIONS: dict[str, Configuration] = {
    "crash": Protocol("one death anywhere, one failure", crashes=1, failures=1, quick=True),
    "undo": Protocol("a second failure, in the undo; a grant", second="READ_WRITE", crashes=1, failures=2),
    "timeout": Protocol("a caller gives up, agents fail late", timeouts=1, failures=2),
    "join": Protocol("one joins, one leaves, one dies; slots get new owners", founders=1, joins=2, leaves=1, crashes=1),
    "join-fail": Protocol("a joiner cannot apply the map", founders=1, joins=1, failures=1, quick=True),
    "mix": Protocol(
        "callers reach one of two; a death; a miss", second="READ_WRITE", crashes=1, remote=1, misses=1, quick=True
    ),
    "mix-undo": Protocol(
        "whom they reached is undone too", second="READ_WRITE", failures=2, remote=1, misses=1, quick=True
    ),
    "mix-late": Protocol("who is late is not reached", second="READ_WRITE", timeouts=1, remote=1, misses=1, quick=True),
    "mix-mend": Protocol(
        "another thread at the page tables", second="READ_WRITE", remote=1, misses=1, mends=1, quick=True
    ),
    "mix-twice": Protocol(
        "two callers die", second="READ_WRITE", slots=1, founders=1, crashes=2, remote=1, misses=1, quick=True
    ),
    "ends": Protocol("every run ends", founders=1, joins=1, crashes=1, timeouts=1, ends=True),
    "join-late": Protocol("joining, a death and a timeout", founders=1, joins=1, crashes=1, timeouts=1),
    "timeouts": Protocol("two callers give up", timeouts=2, failures=1),
    "all": Protocol("a death, a failure and a timeout", crashes=1, timeouts=1, failures=1),
    "agents": Protocol("three agents", second="READ_WRITE", slots=3, founders=3, crashes=1, failures=1),
    "callers": Protocol("three callers", callers=3, timeouts=1, failures=1),
    "again": Protocol("a death while recovering", callers=3, slots=1, founders=1, crashes=2, failures=1),
    "reach": Protocol("callers reach both", second="READ_WRITE", crashes=1, failures=1, remote=3),
    "mix-fail": Protocol("... a death and a failure", second="READ_WRITE", crashes=1, failures=1, remote=1, misses=1),
    "mix-none": Protocol("a change that reaches nobody", crashes=1, failures=1, remote=3, misses=1),
    "mix-join": Protocol("slots get new owners", founders=1, joins=2, leaves=1, crashes=1, remote=1),
    "mix-time": Protocol("a death and a timeout", second="READ_WRITE", crashes=1, timeouts=1, remote=1),
    "mix-dead": Protocol("a death while another thread mends", second="READ_WRITE", crashes=1, mends=1, remote=1),
    "mix-again": Protocol(
        "a death while recovering", second="READ_WRITE", callers=3, slots=1, founders=1, crashes=2, remote=1
    ),
    "mix-ends": Protocol("every run ends", founders=1, crashes=1, timeouts=1, remote=1, misses=1, ends=True),
    "wait": Lease("no wake-up relies on the backstop", backstop=0, quick=True),
    "wait-three": Lease("... of three takers", takers=3, wide=2, changes=0, backstop=0, quick=True),
    "wait-drain": Lease("... of a drain", changes=0, drains=1, backstop=0, quick=True),
    "wait-line": Lease("... where changes let go first", takers=1, changes=2, tickets=1, backstop=0, quick=True),
    "wait-holder": Lease("... who changes within a lease", wide=2, inner="CHANGE", tickets=1, backstop=0, quick=True),
    "lease": Lease("a death", wide=0, crashes=1, quick=True),
    "closers": Lease("a death among changes", takers=1, wide=0, changes=2, crashes=1),
    "threads": Lease(
        "... and a timeout, among threads of one process",
        takers=3,
        wide=0,
        threads=1,
        changes=0,
        crashes=1,
        timeouts=1,
        quick=True,
    ),
    "nested": Lease("a lease within a lease, and a change", takers=1, inner="LEASE", crashes=1, quick=True),
    "nested-two": Lease("... and another taker", inner="LEASE", quick=True),
    "nested-drain": Lease(
        "... and a drain", takers=1, inner="LEASE", changes=0, drains=1, crashes=1, timeouts=1, quick=True
    ),
    "nested-line": Lease("... behind who is in line for it", wide=2, inner="LEASE", changes=0, patience=1, quick=True),
    "circle": Lease("who waits for whom a change waits", inner="CIRCLE", patience=1, quick=True),
    "stop-line": Lease("one with a ticket stops", takers=1, changes=2, tickets=1, stops=1, patience=1, quick=True),
    "stop": Lease("one in line stops", takers=3, wide=2, changes=0, stops=1, patience=1),
    "wait-all": Lease("two takers, a change, a drain", wide=0, drains=1, backstop=0),
    "wait-four": Lease("three takers, a change", takers=3, wide=0, backstop=0),
    "wait-threads": Lease("... two of one process", takers=3, wide=0, threads=1, backstop=0),
    "lease-more": Lease("two deaths and a timeout", wide=0, crashes=2, timeouts=1),
    "lease-wide": Lease("a death, one of both pages", crashes=1),
    "lease-line": Lease("a death, and a ticket", wide=0, tickets=1, crashes=1),
    "lease-drain": Lease("a death, and a drain", changes=0, drains=1, crashes=1),
    "nested-all": Lease("a change, a drain, a death", takers=1, inner="LEASE", drains=1, crashes=1),
    "nested-more": Lease("a death among nested ones", inner="LEASE", crashes=1),
    "circle-dies": Lease("... and one dies", inner="CIRCLE", crashes=1, patience=1),
    "moment": Snapshot("one moment, whoever stores", stores=1, leases=1, quick=True),
    "moment-nested": Snapshot("a thread with a lease passes, and takes again", leases=2, nested=1, quick=True),
    "moment-restore": Snapshot("who restores", restores=2, quick=True),
    "moment-late": Snapshot("who waits for it gives it up", stores=1, leases=1, patience=1, quick=True),
    "moment-again": Snapshot("an area is used again", rounds=2, stores=1, leases=1, patience=1),
    "moment-read": Snapshot("who reads the image", stores=1, leases=1, reader=1),
    "moment-dies": Snapshot("a death among those who store", stores=1, leases=1, crashes=1),
    "moment-ends": Snapshot("... among leases, twice, and read", rounds=2, leases=2, nested=1, reader=1, crashes=1),
    "dirty-lease": Dirty("who asks while leases end", leases=2, quick=True),
    "dirty": Dirty("who asks while a lease, a change and a restore write", leases=1, changes=1, restores=1, quick=True),
    "lease-share": Lease("threads, a change, a death and a timeout", wide=0, threads=1, crashes=1, timeouts=1),
    "freeze": Freeze("a freezer, a change, a lease; a death, a failure", failures=1, quick=True),
    "freeze-two": Freeze("two freezers, a change; a death", freezers=2, takers=0, quick=True),
    "freeze-late": Freeze("a death and a timeout", timeouts=1, quick=True),
    "freeze-more": Freeze("two freezers, a change; three deaths", freezers=2, takers=0, crashes=3, timeouts=1),
    "freeze-all": Freeze("two freezers, a change, a lease; two deaths, a failure", freezers=2, crashes=2, failures=1),
}


class Broken(NamedTuple):
    """A rule of the protocol taken away, by -D, in a configuration that finds out."""

    configuration: str
    rule: str


BROKEN = {
    "ACKFIRST": Broken("crash", "an agent applies before it acknowledges"),
    "ATTEMPT_FIRST": Broken("crash", "old and arguments are stored before attempt"),
    "NOREDO": Broken("crash", "a finisher re-executes C4"),
    "RECOVER_NOWAIT": Broken("crash", "a finisher waits for the acknowledgements"),
    "NOOLD": Broken("crash", "old is saved"),
    "PUBLISH_FIRST": Broken("crash", "the map is written before the generation"),
    "UNDO_REPORT": Broken("undo", "an agent that cannot undo fences itself"),
    "REWRITE_RING": Broken("undo", "a finisher leaves a published ring entry alone"),
    "NOFENCE": Broken("timeout", "an agent that fails after the change was closed fences itself"),
    "NOSETTLE": Broken("timeout", "an agent that reported an error keeps looking at complete"),
    "RESYNC_RANGE": Broken("timeout", "after an error the whole map is followed, not a range"),
    "AWAIT_ACK": Broken("timeout", "waiting on after a timeout: an error is no acknowledgement"),
    "NOEPOCH": Broken("join", "the owner of a lock is known by slot and epoch"),
    "LEAVE_FIRST": Broken("join", "a leaver unmaps before its slot is free"),
    "NOCLAIM": Broken("mix", "who makes page tables follow the map holds the claim"),
    "CLAIM_NO_RECHECK": Broken("mix", "an agent looks again, under the claim, at what was reached"),
    "REMOTE_STALE": Broken("mix-undo", "a caller looks at acknowledgement, error and fence under the claim"),
    "REMOTE_ANY": Broken("mix-late", "only who stands at the generation before is reached"),
    "NOTAKEOVER": Broken("mix", "a claim is taken over from the dead"),
    "UNREACHED": Broken("mix-mend", "an agent that was not reached is woken"),
    "MEND_NOCLAIM": Broken("mix-mend", "other threads need the claim too"),
    "APPLIED_FIRST": Broken("mix", "claimants believe ack: a caller died before it stored that"),
    "APPLIED_LAST": Broken("mix-twice", "claimants believe ack: two callers died after they stored that"),
    "LEASE_LOOK_FIRST": Broken("wait", "a taker looks at the closers after its CAS"),
    "CLOSER_LOOK_FIRST": Broken("wait", "a change looks at the words after it has become a closer"),
    "WAKE_ONE": Broken("wait", "while there are closers, a release wakes everybody on the low half"),
    "MASK_FIRST": Broken("wait", "a release looks for closers after it has cleared the word"),
    "SLEPT_ALONE": Broken("wait-three", "who has slept takes the word with WAITING"),
    "DROP_ABANDONED": Broken("lease", "who gives back a dead holder's page puts the dead one back"),
    "CLEAR_OPEN": Broken("lease", "a dead closer's entry stays until its record is finished"),
    "CLEAR_BIT_FIRST": Broken("closers", "only one of those who find a closer dead clears its bit"),
    "CLEAR_OWNER_FIRST": Broken("closers", "a closer's bit goes before its entry is free"),
    "RESCAN_FIRST": Broken("circle", "a change lets nobody pass before it looks at all words again"),
    "PASS_SHUT": Broken("nested", "nobody passes a change that goes on"),
    "NEVER_LATE": Broken("circle", "who has a lease elsewhere passes a change that waits, in the end"),
    "COUNT_LAST": Broken("wait-drain", "a lease is counted before the look at the closers"),
    "LINE_NOWAIT": Broken("wait-line", "who gave way goes first"),
    "HOLDER_LETS": Broken("wait-holder", "... but not before who has a lease"),
    "TICKET_FOREVER": Broken("stop-line", "... nor when it does not come"),
    "KEEP_WORDS": Broken("stop", "who waits for a page has none"),
    "RESERVED_FOREVER": Broken("stop", "a reservation ends where its owner does not come"),
    "RESERVE_ALL": Broken("wait-three", "nothing is reserved behind the page that is waited for"),
    "LINE_KEPT": Broken("wait-threads", "who has its words is in no line any more"),
    "NOBACKSTOP": Broken("threads", "a wake-up may go with who dies or gives up"),
    "KEEP_LATE": Broken("freeze", "the map is kept before the record of the freeze begins"),
    "FROZEN_LATE": Broken("freeze", "`frozen` is set before the record of the freeze begins"),
    "WORD_FIRST": Broken("freeze-two", "the freezer's word goes after the thaw is complete"),
    "THAW_TWICE": Broken("freeze-two", "only one of those who find a freezer dead thaws"),
    "CHANGE_BLIND": Broken("freeze", "a change looks at `frozen` with the lock"),
    "CLOSER_FIRST": Broken("freeze", "a dead freezer's closer stays until somebody has thawed"),
    "MOMENT_NOWAIT": Broken("moment", "nobody saves for a moment that has not come for all"),
    "GIVEN_UP_UNSEEN": Broken("moment-late", "the snapshotter finds out that the snapshot was given up"),
    "MOMENT_BY_LOOK": Broken("moment-late", "one word says whether the moment came or the snapshot was given up"),
    "DIRTY_LOOK_FIRST": Broken("moment", "the word is ACTIVE before the snapshotter looks for dirty pages"),
    "HOLDS_TAKING": Broken("moment-nested", "a lease that is being taken is none that its thread holds"),
    "HOLDS_FIRST": Broken("moment-nested", "a taker counts in its slot before it looks whether its thread holds one"),
    "SLOT_FIRST": Broken("moment-nested", "a lease is uncounted for its thread before it is in the slot"),
    "RESTORE_UNCOUNTED": Broken("moment-restore", "who restores is counted as the holder of a lease"),
    "DIRTY_UNCOUNTED": Broken("moment-again", "nobody makes pages DIRTY for an area that is used again"),
    "STAMP_FIRST": Broken("dirty-lease", "who asks what is dirty looks at held words before stamps"),
    "RING_FIRST": Broken("dirty", "... at the map before the record and the ring"),
    "RECORD_LAST": Broken("dirty", "... at the record before the ring"),
    "HOLE_LAST": Broken("dirty", "... at holes before stamps"),
    "HOLE_UNWRITTEN": Broken("dirty", "a hole that has a stamp was written"),
    "JOIN_NOLOCK": Broken("join-fail", "a joiner copies the map under the lock"),
    "JOIN_UNLOCK_FIRST": Broken("join-fail", "a joiner that failed unmaps before it unlocks"),
}


class Outcome(NamedTuple):
    errors: int
    complete: bool  # every reachable state was looked at
    states: int
    seconds: float
    found: str  # Spin's word for the error, or why the search was not complete; "" if neither
    trace: str  # the steps to the error, if asked for


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def missing() -> str | None:
    """What has to be installed first, as a sentence; None if nothing."""
    if not shutil.which("spin"):
        return "the model checker `spin` is not installed (Debian and Ubuntu: apt install spin)"
    if not compiler():
        return "no C compiler, gcc or cc, is installed (Debian and Ubuntu: apt install gcc)"
    return None


def output(command: Sequence[str], directory: str) -> str:
    return subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def search(configuration: Configuration, told: Sequence[str], optimise: str, directory: str) -> str:
    """What pan says; its exit status says nothing, it is 0 after errors too."""
    translated = output(["spin", "-a", *told, str(model(configuration))], directory)
    kind = "-DNP" if configuration.ends else "-DSAFETY"
    # NOREDUCE: partial order reduction saves next to nothing here, so its conditions need not be argued.
    options = [optimise, "-w", kind, "-DNOREDUCE", f"-DMEMLIM={MEGABYTES}"]
    compiled = output([compiler() or "cc", *options, "-o", "pan", "pan.c"], directory)
    if not Path(directory, "pan").exists():
        raise RuntimeError(f"{model(configuration).name} does not become a program:\n{translated}{compiled}")
    return output(["./pan", f"-m{DEPTH}", "-n", *(["-l"] if configuration.ends else [])], directory)


def read(said: str) -> tuple[int, bool, int, str]:
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"([\d.e+]+) states, stored", said)
    if not errors or not states:
        raise RuntimeError(f"pan gave no result:\n{said}")
    trouble = re.search(
        r"(?<=pan:1: )(assertion violated|invalid end state|non-progress cycle)"
        r"|max search depth too small|reached -DMEMLIM bound|out of memory|Search not completed",
        said,
    )
    return int(errors[1]), not trouble, int(float(states[1])), trouble[0] if trouble else ""


def check(name: str, trace: bool = False) -> Outcome:
    """Searches one configuration, or one broken variant in its configuration."""
    broken = BROKEN.get(name)
    configuration = CONFIGURATIONS[broken.configuration if broken else name]
    path = model(configuration)
    told = defines(configuration) + ([f"-D{name}"] if broken else [])
    optimise = "-O0" if broken or configuration.quick else "-O1"  # or it would be the compiler that takes longest
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pyshare-spec-") as directory:
        errors, complete, states, found = read(search(configuration, told, optimise, directory))
        steps = ""
        if errors and trace:
            steps = output(["spin", "-t", "-p", "-g", "-k", f"{path.name}.trail", *told, str(path)], directory)
    return Outcome(errors, complete, states, time.monotonic() - start, found, steps)


def as_it_must_be(name: str, outcome: Outcome) -> bool:
    return outcome.errors > 0 if name in BROKEN else outcome.errors == 0 and outcome.complete


def line(name: str, outcome: Outcome) -> str:
    verdict = "ok" if as_it_must_be(name, outcome) else "WRONG"
    what = f"broken: {BROKEN[name].rule}" if name in BROKEN else CONFIGURATIONS[name].why
    return (
        f"{verdict:5} {name:17} errors: {outcome.errors} {outcome.states:>10,} states {outcome.seconds:5.1f} s  {what}"
        + (f"  [{outcome.found}]" if outcome.found else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the models of the protocol.")
    parser.add_argument("name", nargs="*", help=f"of {', '.join([*CONFIGURATIONS, *BROKEN])}")
    parser.add_argument("--quick", action="store_true", help="leave the long configurations out")
    parser.add_argument("--trace", action="store_true", help="show the steps that lead to an error")
    options = parser.parse_args()
    if unknown := set(options.name) - {*CONFIGURATIONS, *BROKEN}:
        parser.error(f"no configuration or broken variant {', '.join(unknown)}; see --help")
    if reason := missing():
        print(f"spec: {reason}", file=sys.stderr)
        return 2
    names = options.name or [
        name for name in (*CONFIGURATIONS, *BROKEN) if not options.quick or name in BROKEN or CONFIGURATIONS[name].quick
    ]
    good = True
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, outcome in zip(names, pool.map(lambda name: check(name, options.trace), names), strict=True):
            print(outcome.trace + line(name, outcome), flush=True)
            good &= as_it_must_be(name, outcome)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
