"""Fixtures that several rooms share."""

from __future__ import annotations

import pytest

from penstock.models.catalogue import resolve
from penstock.models.source import ModelSource


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The embedded model's file; fetched on first use. Tests that take it carry the marker `model`."""
    return resolve("smollm2-135m-instruct")
