"""`docs/api.md` names every field, error code, header and metric that the code has."""

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


def test_every_error_code_is_documented() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    wired = (errors.RequestError, errors.LimitError, errors.ServiceError)
    codes = {each.code for each in classes if issubclass(each, wired) and each.code is not None}
    assert codes - NAMED == set()


def test_every_metric_is_documented() -> None:
    source = (GATEWAY / "metrics.py").read_text()
    made = set(re.findall(r'(?:_counter|_reasons|_histogram|_gauge|_family)\(\s*"([a-z0-9_]+)"', source))
    made |= set(re.findall(r'OURS \+ "([a-z_]+)"', source)) | set(
        re.findall(r'\("([a-z_]+)", "[A-Z]', source)
    )
    assert len(made) > 30
    assert made - {name.partition("{")[0] for name in NAMED} == set()


def test_every_header_of_ours_is_documented() -> None:
    sources = "".join(path.read_text() for path in GATEWAY.glob("*.py"))
    headers = set(re.findall(r'"(x-(?:penstock|should|request)-[a-z-]+)"', sources))
    assert len(headers) >= 8
    assert {header.lower() for header in headers} - {name.lower() for name in NAMED} == set()
