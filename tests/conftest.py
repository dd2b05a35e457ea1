"""Fixtures that several rooms share."""

from __future__ import annotations

import pytest

from penstock import compiled
from penstock.models.catalogue import resolve
from penstock.models.source import ModelSource


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The embedded model's file; fetched on first use. Tests that take it carry the marker `model`."""
    return resolve("smollm2-135m-instruct")


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
