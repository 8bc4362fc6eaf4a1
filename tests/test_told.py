"""A thread is told of its violation whatever others do meanwhile: in its own statement, once, and nobody else is."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Child, late_in_two_threads

import pyshare
from pyshare import READ, ProtectionError, Region

PAGE = 4096
NEW = sys.version_info >= (3, 12)  # before, only the main thread has pending calls


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
        assert late_in_two_threads(violate) == []

    assert fork(body).wait() == 0


class Cancelled(BaseException):
    pass


@pytest.mark.skipif(not NEW, reason="promises.md says so of Python 3.11")
def test_somebody_elses_asynchronous_exception_takes_nothing_away(fork: Callable[..., Child]) -> None:
    """It may come in the place of the one that tells, in a thread that has given the interpreter up."""
    turns, late, state = iter(range(1000)), [], {"adds": False, "over": False, "stopped": False}

    def add_often(array: Any) -> None:
        for turn in turns:
            try:
                state["adds"] = True
                np.add(array, 1, out=array)
                late.append(turn)
            except ProtectionError:
                goes_on()
        state["over"] = True
        while not state["stopped"]:
            pass

    def until_stopped(array: Any) -> None:
        while True:
            with contextlib.suppress(Cancelled):
                add_often(array)
                return

    def body(_: Child) -> None:
        sys.setswitchinterval(1e-5)
        region = pyshare.create(size=16 * PAGE, prot=READ, on_violation="raise")
        thread = threading.Thread(target=until_stopped, args=[np.frombuffer(region, np.uint8)])
        thread.start()
        number, cancelled = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Cancelled)
        while not state["over"]:
            if state["adds"]:
                state["adds"] = False
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, cancelled)
        state["stopped"] = True
        thread.join()
        assert late == []

    assert fork(body).wait() == 0


@pytest.mark.skipif(not NEW, reason="promises.md says so of Python 3.11")
@pytest.mark.parametrize("beside", ["which runs", "which is told"])
@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_callback_beside_another_thread(fork: Callable[..., Child], beside: str, where: str) -> None:
    """What the call runs after its forbidden access is left alone, whoever has the interpreter meanwhile."""

    class Number:
        begun = ended = 0

        def __index__(self) -> int:
            Number.begun += 1
            for _ in range(50):
                pass
            Number.ended += 1
            return 5

    def other(over: threading.Event) -> None:
        with pyshare.create(size=16 * PAGE, prot=READ, on_violation="raise") as region:
            while not over.is_set():
                if beside == "which is told":
                    with pytest.raises(ProtectionError):  # noqa: PT012
                        struct.pack_into("<Q", region.buf, PAGE, 7)
                        goes_on()

    def store_often(over: threading.Event) -> None:
        with pyshare.create(size=16 * PAGE, prot=READ, on_violation="raise") as region:
            number = Number()
            for _ in range(300):
                with pytest.raises(ProtectionError) as caught:
                    struct.pack_into("<QQ", region.buf, PAGE, 7, number)
                assert caught.traceback[-1].name == "store_often"
        assert (Number.begun, Number.ended) == (300, 300)
        over.set()

    def body(_: Child) -> None:
        sys.setswitchinterval(1e-5)
        over, wrong = threading.Event(), []

        def guarded(function: Callable[[threading.Event], None]) -> None:
            try:
                function(over)
            except BaseException as error:
                wrong.append(error)
                over.set()

        here, there = (store_often, other) if where == "main" else (other, store_often)
        thread = threading.Thread(target=guarded, args=[there])
        thread.start()
        guarded(here)
        thread.join()
        assert wrong == []

    assert fork(body).wait() == 0
