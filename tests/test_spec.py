"""The models of the protocol and of leases: Spin finds no error, and finds out every rule that is taken away.

The long configurations are left to `make spec`.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """By name, of all that is to be tested; several searches at once, because most of them are short."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in here if "name" in item.callspec.params]
    with ThreadPoolExecutor(run.AT_ONCE) as pool:
        return dict(zip(names, pool.map(run.check, names), strict=True))


@pytest.mark.parametrize("name", [name for name, configuration in run.CONFIGURATIONS.items() if configuration.quick])
def test_free_of_errors(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[name]
    assert outcome.errors == 0, outcome.found
    assert outcome.complete, outcome.found


@pytest.mark.parametrize("name", run.BROKEN)
def test_broken_is_caught(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[name]
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
