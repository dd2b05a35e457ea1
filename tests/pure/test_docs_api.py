"""`docs/api.md` names every field, error and header that the code has. Metrics: tests/pure/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.core import errors
from penstock.gateway.compat import IDLE_FIELDS, NEUTRAL
from penstock.gateway.schema import ChatRequest, CompletionRequest

DOC = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
NAMED = set(re.findall(r"`([^`]+)`", DOC))
GATEWAY = Path(__file__).resolve().parents[2] / "src" / "penstock" / "gateway"


def test_every_request_field_is_documented() -> None:
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *IDLE_FIELDS}
    assert fields - NAMED == set()


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_every_refused_field_is_documented(field: str) -> None:
    described = {name.partition(":")[0] for name in NAMED}
    assert field in described or (field.startswith("guided_") and "guided_*" in NAMED)


def test_every_error_is_documented() -> None:
    """Status, type, code and whether to try again."""
    roots = (errors.RequestError, errors.LimitError, errors.ServiceError)
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, roots)]
    made = {
        (str(each.status), each.type, each.code or "null", "yes" if each.retryable else "no")
        for each in classes
        if each not in (errors.LimitError, errors.ServiceError)
    }
    table = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+?) \| .* \| (yes|no) \|", DOC, re.MULTILINE)
    told = {
        (status, kind, code, retry)
        for status, kind, codes, retry in table
        for code in re.findall(r"\w+", codes)
    }
    assert told == made


def test_every_header_of_ours_is_documented() -> None:
    sources = "".join(path.read_text() for path in GATEWAY.glob("*.py"))
    headers = set(re.findall(r'"(x-(?:penstock|should|request)-[a-z-]+)"', sources))
    assert len(headers) >= 8
    assert {header.lower() for header in headers} - {name.lower() for name in NAMED} == set()
