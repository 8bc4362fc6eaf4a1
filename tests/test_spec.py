"""The model of the protocol: Spin finds no error in it, and finds out every rule that is taken away.

The long configurations are left to `make spec`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run", Path(__file__).parents[1] / "spec" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load()
pytestmark = pytest.mark.skipif(run.missing() is not None, reason=f"the model is not checked: {run.missing()}")


@pytest.mark.parametrize("name", [name for name, configuration in run.CONFIGURATIONS.items() if configuration.quick])
def test_free_of_errors(name: str) -> None:
    outcome = run.check(name)
    assert outcome.errors == 0, outcome.found
    assert outcome.complete, outcome.found


@pytest.mark.parametrize("name", run.BROKEN)
def test_broken_is_caught(name: str) -> None:
    outcome = run.check(name)
    assert outcome.errors > 0
    assert outcome.found in ("assertion violated", "invalid end state")


@pytest.mark.parametrize(
    ("limit", "value", "found"),
    [("DEPTH", 100, "max search depth too small"), ("MEGABYTES", 130, "reached -DMEMLIM bound")],
)
def test_incomplete_search_is_noticed(monkeypatch: pytest.MonkeyPatch, limit: str, value: int, found: str) -> None:
    monkeypatch.setattr(run, limit, value)
    outcome = run.check("join-fail")
    assert outcome.errors == 0
    assert not outcome.complete
    assert outcome.found == found
