"""Fixtures that several rooms share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from penstock import compiled
from penstock.models.catalogue import resolve
from penstock.models.source import ModelSource
from penstock.policies.estimate.lengths import LengthBelief


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The embedded model's file; fetched on first use. Tests that take it carry the marker `model`."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture
def known_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle for policies: every output is as long as its maximum, and the belief knows it."""

    def totals(self: LengthBelief, groups: Any, produced: Any, maxima: Any, uniform: Any) -> Any:
        return np.broadcast_to(maxima, uniform.shape)

    def at(self: LengthBelief, sequence: Any, places: Sequence[float]) -> list[int]:
        return [sequence.request.max_output_tokens] * len(places)

    monkeypatch.setattr(LengthBelief, "totals", totals)
    monkeypatch.setattr(LengthBelief, "at", at)


def pytest_report_header() -> str:
    return f"decisions: {'compiled' if compiled.is_used() else 'Python'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What patches decision code cannot run on its compiled form."""
    if compiled.is_used():
        skip = pytest.mark.skip(
            reason="patches decision code: runs with PENSTOCK_PURE=1, as `make test` does"
        )
        for item in items:
            if item.get_closest_marker("pure") is not None:
                item.add_marker(skip)
