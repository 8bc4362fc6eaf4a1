"""A plan that still leads to the same finding, and is as short as tries can make it.

    python -m histories.shorten FILE [--seconds 300] [--tries 3]      of a saved history

Lives here: taking parts of a plan away (delta debugging), and playing what is left.  Not here: playing (soak.py).
A plan is no schedule: what is left out was not needed if the finding came again, and may have been if it did not.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Iterator

from histories import history as histories
from histories import oracle, soak
from histories.plan import Plan


def headline(finding: str) -> str:
    """What kind of finding it is: its first line without numbers."""
    return re.sub(r"0x[0-9a-f]+|\d+", "N", finding.split("\n")[0])


def _without(plan: Plan, change: Callable[[Plan], None]) -> Plan:
    shorter = copy.deepcopy(plan)
    change(shorter)
    return shorter


def _halves(count: int) -> Iterator[tuple[int, int]]:
    """Parts of a list to leave out, the large ones first."""
    size = count
    while size:
        yield from ((at, min(at + size, count)) for at in range(0, count, size))
        size //= 2


def _drop_actor(plan: Plan, at: int) -> None:
    """And the troubles that were for it."""
    plan["actors"].pop(at)
    plan["troubles"] = [trouble for trouble in plan["troubles"] if trouble["whom"] != at]
    for trouble in plan["troubles"]:
        trouble["whom"] -= trouble["whom"] > at


def _shorter(plan: Plan) -> Iterator[Plan]:
    """Plans with something less."""
    for at in range(len(plan["actors"]) if len(plan["actors"]) > 1 else 0):
        yield _without(plan, lambda p, at=at: _drop_actor(p, at))  # type: ignore[misc]
    for index, actor in enumerate(plan["actors"]):
        for at in range(len(actor["threads"]) if len(actor["threads"]) > 1 else 0):
            yield _without(plan, lambda p, i=index, at=at: p["actors"][i]["threads"].pop(at))  # type: ignore[misc]
        if actor["extras"]:
            yield _without(plan, lambda p, i=index: p["actors"][i].update(extras=[]))  # type: ignore[misc]
    for begin, end in _halves(len(plan["troubles"])):
        yield _without(plan, lambda p, b=begin, e=end: p["troubles"].__delitem__(slice(b, e)))  # type: ignore[misc]
    for index, actor in enumerate(plan["actors"]):
        for number, thread in enumerate(actor["threads"]):
            for steps in _lists(thread):
                for begin, end in _halves(len(steps(thread))):
                    yield _without(
                        plan,
                        lambda p, i=index, n=number, s=steps, b=begin, e=end: s(  # type: ignore[misc]
                            p["actors"][i]["threads"][n]
                        ).__delitem__(slice(b, e)),
                    )


def _lists(thread: Plan) -> list[Callable[[Plan], list[Plan]]]:
    if thread["kind"] == "plain":
        return [lambda t: t["steps"]]
    return [lambda t, n=n: t["tasks"][n] for n in range(len(thread["tasks"]))]  # type: ignore[misc]


def fits(plan: Plan) -> bool:
    """It can be played: each thread has something to do."""
    return all(each(thread) for actor in plan["actors"] for thread in actor["threads"] for each in _lists(thread))


def comes_again(plan: Plan, wanted: set[str], tries: int) -> bool:
    """One of the findings does, in so many tries."""
    for _ in range(tries):
        history = soak.play_aside(plan)
        if wanted & set(map(headline, oracle.judge(history))):
            return True
    return False


def shorten(plan: Plan, wanted: set[str], seconds: float, tries: int) -> Plan:
    """The shortest that was found in that time."""
    end = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < end:
        again = False
        for shorter in _shorter(plan):
            if time.monotonic() >= end:
                break
            if fits(shorter) and comes_again(shorter, wanted, tries):
                plan, again = shorter, True
                print(f"{len(json.dumps(plan))} bytes", flush=True)
                break
    return plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tries", type=int, default=3)
    arguments = parser.parse_args()
    history = histories.open_saved(arguments.file)
    wanted = set(map(headline, oracle.judge(history)))
    if not wanted:
        print("nothing is wrong with this history")
        return 1
    path = f"{arguments.file}.plan.json"
    with open(path, "w") as file:
        json.dump(shorten(history.plan, wanted, arguments.seconds, arguments.tries), file, indent=1)
    print(f"{path}: play it by make soak ARGS='--plan {path}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
