"""Episode after episode, each with the next seed, until the time is over or something was found.

    make soak SECONDS=3600 ARGS='--seed 1000'

Lives here: the process of each episode, what becomes of its history, what is printed.  Not here: what an episode is
(conductor.py), what is a finding (oracle.py).
Invariant: whatever an episode left behind (processes, files, names) is gone when the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from typing import NoReturn

from histories import coverage, oracle
from histories import history as histories
from histories import plan as plans
from histories.facts import Facts
from histories.history import History
from histories.plan import Plan

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
EPISODE_SECONDS = 120.0  # after which even a conductor hangs
TOLD = 8  # findings of one history
IN_MEMORY, ROOM = "/dev/shm", 1 << 30


def play(plan: Plan, folder: str) -> History:
    """An episode of this plan, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        _conduct(plan, folder)
    end = time.monotonic() + plan["seconds"] + EPISODE_SECONDS
    try:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    history = histories.load(plan, folder)
    if status:
        history.strays.append(("conductor", time.monotonic_ns(), f"it ended with {status}\n{_errors(folder)}"))
    return history


def _errors(folder: str) -> str:
    """The last that its processes have written."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "stderr"), errors="replace") as file:
        return file.read()[-4000:]
    return ""


def _quick_folder() -> str | None:
    """A file system in memory, where there is room: the fsync of a save takes seconds on a busy disk."""
    with contextlib.suppress(OSError):
        room = os.statvfs(IN_MEMORY)
        if "TMPDIR" not in os.environ and room.f_bavail * room.f_frsize >= ROOM:
            return IN_MEMORY
    return None


def play_aside(plan: Plan) -> History:
    """The same in a folder that is gone afterwards."""
    folder = tempfile.mkdtemp(prefix="histories-", dir=_quick_folder())
    try:
        return play(plan, folder)
    finally:
        shutil.rmtree(folder)


def _conduct(plan: Plan, folder: str) -> NoReturn:
    """The conductor's whole life."""
    code = 1
    try:
        os.setsid()
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        from histories.conductor import Conductor  # here: the oracle and its tools need no pyshare

        Conductor(plan, folder).run()
        code = 0
    except BaseException:
        with open(os.path.join(folder, "stderr"), "a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


class Soak:
    """What a run of many episodes has seen."""

    def __init__(self, keep: str, ignored: re.Pattern[str] | None) -> None:
        self.keep, self.ignored = keep, ignored
        self.episodes = self.bad = self.ops = 0
        self.met: Counter[coverage.Pair] = Counter()
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def episode(self, plan: Plan) -> list[str]:
        """Plays and judges one; a history with findings is kept in a file."""
        history = play_aside(plan)
        found = [each for each in oracle.judge(history) if not (self.ignored and self.ignored.search(each))]
        self.episodes += 1
        self.ops += len(history.ops)
        self.met += coverage.count(Facts(history))
        if found:
            self.bad += 1
            path = os.path.join(self.keep, f"history-{plan['seed']}.json.gz")
            print(f"seed {plan['seed']}, after {self.seconds():.1f} s: {len(found)} findings; the history is {path}")
            for finding in found[:TOLD]:
                print("   ", finding[:4000], flush=True)
            histories.save(history, path)
        return found

    def summary(self) -> str:
        """Throughput, and the table of pairs."""
        missing = coverage.missing(self.met)
        took = self.seconds()
        never = "; ".join(f"{coverage.NAMES[a]} and {coverage.NAMES[b]}" for a, b in missing)
        return (
            f"{coverage.table(self.met)}\n{len(missing)} pairs never met{': ' if never else ''}{never}\n"
            f"{self.episodes} episodes, {self.bad} with findings; {self.ops} operations, {self.ops / took:.0f} a second"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Random operations of several processes on one region, and an oracle that judges what they saw."
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long")
    parser.add_argument("--seed", type=int, help="the first one; without it any")
    parser.add_argument("--episode", type=float, default=1.5, help="seconds of one episode")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"kinds of steps: {','.join(plans.ALL)}")
    parser.add_argument("--calm", action="store_const", const=True, help="no trouble")
    parser.add_argument("--plan", help="play this plan (JSON), again and again")
    parser.add_argument("--go-on", action="store_true", help="also after a finding")
    parser.add_argument("--ignore", type=re.compile, help="findings in which this is found are none")
    parser.add_argument("--keep", default=".", help="the folder for histories with findings")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(4), "little")
    given = None
    if arguments.plan:
        with open(arguments.plan) as file:
            given = json.load(file)
    os.makedirs(arguments.keep, exist_ok=True)
    soak = Soak(arguments.keep, arguments.ignore)
    print(f"seed {seed}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while soak.seconds() < arguments.seconds:
            plan = given or plans.devise(seed, arguments.episode, arguments.only, arguments.calm)
            if soak.episode(plan) and not arguments.go_on:
                break
            seed += 1
    print(soak.summary())
    return int(soak.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
