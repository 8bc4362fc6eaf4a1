"""Large stores by one system call, and a revocation that comes while the process that makes them is dying.

Lives here: the steps of who pours and of who stems.  Not here: single values (hands.py).
Invariant: who stems has the lock BULK_LOCK, so that nobody else gives rights to the large part of the region.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import zlib

import pyshare
from histories import words
from histories.births import Births
from histories.hands import FAILED
from histories.plan import PATIENT, Step
from histories.words import PAGE

BULK_LOCK = 7
SAMPLES = 512  # pages that are looked at
DYING = 0.03  # seconds after which a dying process would have stored more


class Pouring(Births):
    """Only where the plan has a large part (`bulk`), which lies behind all other pages."""

    def do_pour(self, _step: Step) -> None:
        """A store of all of it, of other bytes each time, by one system call."""
        size = self.actor.plan["bulk"] * PAGE
        if not os.fstat(self.source).st_size:
            for at in range(0, 2 * size, 1 << 20):
                os.pwrite(self.source, os.urandom(PAGE) * 256, at)
        begin = self.actor.plan["pages"] * PAGE
        view, source = self.on.view[begin : begin + size], self.source
        at = self.next_value() % 256 * PAGE
        self.actor.stage.tell_pouring(self.actor.index, os.getpid())
        number, result, ended = self.do(words.POUR, (), lambda: os.preadv(source, [view], at))
        self.actor.stage.tell_pouring(self.actor.index, 0)
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)

    def do_stem(self, step: Step) -> None:
        """It may be written, for a while; somebody who writes it is killed; from then on nothing changes."""
        region, begin, size = self.on.region, self.actor.plan["pages"] * PAGE, self.actor.plan["bulk"] * PAGE
        number = self.log.begin(words.LOCK, self.on.participant, BULK_LOCK, PATIENT)
        try:
            with region.lock(BULK_LOCK, timeout=PATIENT) as lock:
                self.log.end(number, words.OK, (lock.abandoned,))
                region.mprotect(begin, size, pyshare.READ_WRITE)
                self._kill_one(step["pause"] / 1e6)
                self._stem(region, begin, size)
                number = self.log.begin(words.UNLOCK, self.on.participant, self.name_of(number), "with")
            self.log.end(number, words.OK)
        except (pyshare.PropagationTimeout, OSError):
            for under_way in list(self.log.under_way):
                self.log.end(under_way, words.CANCELLED)

    def _kill_one(self, after: float) -> None:
        """Of those that pour, if any does."""
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            if pid := self.actor.stage.pouring(other_than=self.actor.index):
                time.sleep(after)
                self.log.note("kill", pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return

    def _stem(self, region: pyshare.Region, begin: int, size: int) -> None:
        number, generation, ended = self.do(
            words.STEM, (), lambda: region.mprotect(begin, size, pyshare.READ, timeout=PATIENT)
        )
        if generation is FAILED:
            return
        one = self._sample(begin, size)
        time.sleep(DYING)
        self.log.end(number, words.OK, (generation, one, self._sample(begin, size)), at=ended)

    def _sample(self, begin: int, size: int) -> int:
        step = max(PAGE, size // SAMPLES // PAGE * PAGE)
        crc = 0
        for at in range(begin, begin + size, step):
            crc = zlib.crc32(self.on.region.read(at, 8), crc)
        return crc
