"""pyshare.testing: what the other tests rely on, and users may."""

from __future__ import annotations

import os
import signal

import pytest

import pyshare
from pyshare import testing
from pyshare.testing import Child, until


def test_example_of_a_killed_holder() -> None:
    with pyshare.create(size=4096) as region:

        def body(child: Child) -> None:
            with region.lock(0):
                child.say("locked")
                child.hear()

        with Child(body) as child:
            assert child.hear() == "locked"
            child.kill()
            assert child.wait() == -signal.SIGKILL
        with region.lock(0) as lock:
            assert lock.abandoned


def test_both_sides_hear_each_other() -> None:
    def body(child: Child) -> None:
        child.say(child.hear()[::-1])

    with Child(body) as child:
        child.say("word")
        assert child.hear() == "drow"
        assert child.wait() == 0
        with pytest.raises(AssertionError, match="the other side is gone, after b''"):
            child.hear()


def test_a_body_that_raises_ends_with_1(capfd: pytest.CaptureFixture[str]) -> None:
    def body(child: Child) -> None:
        raise KeyError(child.pid)

    with Child(body) as child:
        assert child.wait() == 1
    assert "KeyError: 0" in capfd.readouterr().err


def test_a_stopped_process_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(lambda child: child.say(child.hear())) as child:
        child.stop()
        child.say("still there")
        monkeypatch.setattr(testing, "PATIENCE", 0.01)
        with pytest.raises(AssertionError, match="has been silent"):
            child.hear()
        monkeypatch.undo()
        child.resume()
        assert child.hear() == "still there"


def test_who_has_ended_is_not_stopped() -> None:
    with Child(lambda child: None) as child, pytest.raises(AssertionError, match="has ended with 0"):  # noqa: ARG005
        child.wait_stopped()
    assert child.wait() == 0


def test_who_was_reaped_gets_no_signal() -> None:
    """Its pid may be another process's by then."""
    with Child(lambda child: None) as child:  # noqa: ARG005
        assert child.wait() == 0
        child.kill()
        child.resume()
        with pytest.raises(AssertionError, match="has ended with 0"):
            child.stop()
    child.kill()


def test_a_child_has_no_process_to_signal() -> None:
    """What it has is its parent's object, with a pid of 0: a signal to that would be one to all of them."""

    def body(child: Child) -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            child.kill(0)

    with Child(body) as child:
        assert child.wait() == 0


def test_who_does_not_stop_is_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(lambda child: child.hear()) as child:
        monkeypatch.setattr(testing, "PATIENCE", 0.01)
        with pytest.raises(AssertionError, match="did not come true"):
            child.wait_stopped()
        monkeypatch.undo()


def test_nothing_is_left_of_a_child() -> None:
    before = os.listdir("/proc/self/fd")
    with Child(lambda child: child.hear()) as child:
        child.stop()
    child.end()
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_until(monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(["", "", "yes"])
    until(lambda: next(words))
    monkeypatch.setattr(testing, "PATIENCE", 0.01)
    with pytest.raises(AssertionError, match=r"did not come true within 0.01 s"):
        until(lambda: False)
