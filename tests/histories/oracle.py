"""All judgements of a history. It knows the promises and nothing of the code.

    python -m histories.oracle FILE...        judges histories that were saved; exit status 1: something was found

Lives here: which judgements there are.  Not here: each of them.
"""

from __future__ import annotations

import sys

from histories import history as histories
from histories.facts import Facts
from histories.history import History
from histories.holds import Holds
from histories.images import Images
from histories.registers import Registers
from histories.rights import Rights
from histories.waits import Waits


def judge(history: History) -> list[str]:
    """What cannot be explained; empty: all of it can."""
    facts = Facts(history)
    rights = Rights(facts)
    registers = Registers(facts, rights)
    found = [f"stray exception in {thread}: {text}" for thread, _, text in history.strays]
    for judgement in (registers, rights, Images(facts, rights, registers), Holds(facts, rights), Waits(facts, rights)):
        found += judgement.judge()
    return found


def main(paths: list[str]) -> int:
    bad = False
    for path in paths:
        for finding in judge(histories.open_saved(path)):
            print(f"{path}: {finding}")
            bad = True
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
