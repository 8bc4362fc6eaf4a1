"""A thread is told of its violation whatever others do meanwhile: in its own statement, once, and nobody else is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import numpy as np
from conftest import Child

import pyshare
from pyshare import READ, ProtectionError, Region

PAGE = 4096


def goes_on() -> None:
    """Whatever is due comes here, at the latest."""
    for _ in range(300):
        pass


def test_each_of_two_threads_that_have_given_the_interpreter_up(fork: Callable[..., Child]) -> None:
    """The one asks to be told just before the other is, during which Python calls no pending call."""

    def violate(region: Region, late: list[int]) -> None:
        array = np.frombuffer(region, np.uint8)[: 4 * PAGE]
        for number in range(1500):
            try:
                np.add(array, 1, out=array)
                late.append(number)
                goes_on()
            except ProtectionError:
                pass

    def body(_: Child) -> None:
        late: list[int] = []
        sys.setswitchinterval(1e-5)
        regions = [pyshare.create(size=16 * PAGE, prot=READ, on_violation="raise") for _ in range(2)]
        threads = [threading.Thread(target=violate, args=[region, late]) for region in regions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert late == []

    assert fork(body).wait() == 0
