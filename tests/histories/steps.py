"""The life of a thread: step after step of its plan, until the episode is over.

Lives here: Worker, which has all kinds of steps, and its loop.  Not here: a loop of coroutines (loops.py).
Invariant: an exception that leaves a step is a stray one, unless it is that of Ctrl-C.
"""

from __future__ import annotations

import traceback

from histories import words
from histories.log import LogFull
from histories.plan import Step
from histories.pouring import Pouring


class Worker(Pouring):
    """A thread that takes the steps of its plan, again and again."""

    def live(self, steps: list[Step]) -> None:
        """Until the episode is over. It begins elsewhere in each life, so that no step keeps it from the others."""
        at = 37 * (self.actor.life - 1)
        try:
            while not self.actor.is_over():
                self.step(steps[at % len(steps)])
                at += 1
                self.actor.is_full |= self.log.is_long
            self.rest()
        except LogFull:
            self.actor.is_full = True

    def step(self, step: Step) -> None:
        """One, whatever it raises."""
        try:
            getattr(self, f"do_{step['do']}")(step)
        except KeyboardInterrupt:
            self.actor.caught += 1
            self._close_operations()
        except LogFull:
            raise
        except BaseException:
            self.log.stray(traceback.format_exc())
            self._close_operations()
        if self.is_main and self.actor.caught != self.actor.raised:
            self.log.stray(f"{self.actor.raised} exceptions of Ctrl-C were raised, {self.actor.caught} arrived")
            self.actor.caught = self.actor.raised

    def _close_operations(self) -> None:
        for number in list(self.log.under_way):
            self.log.end(number, words.INTERRUPTED)

    def rest(self) -> None:
        """Nothing is held any more."""
        while self.kept:
            self.step({"do": "drop", "which": 0, "how": "close"})
        self.on.let_go()
