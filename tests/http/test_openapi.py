"""The OpenAPI document: true, complete, and fuzzed against the server it describes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from fake_link import FakeLink, make_info
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import Running, make_settings, start

from penstock.core.settings import BatchSettings
from penstock.gateway.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = make_settings(batch=BatchSettings(folder=str(tmp_path_factory.mktemp("batches"))))
    running = start(settings, FakeLink(step_s=0.0, info=make_info(context_len_max=256)))
    yield running
    running.wait_idle()
    assert running.http().get("/health").status_code == 200
    running.stop()


GETS = (
    "/v1/models",
    "/v1/models/{model}",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/load",
    "/v1/files",
    "/v1/files/{file_id}",
    "/v1/files/{file_id}/content",
    "/v1/batches",
    "/v1/batches/{batch_id}",
)
# Bodies that name something which must exist first; tests/http/test_batches.py sends valid ones.
DEPENDENT = ("/v1/batches", "/v1/files", "/v1/batches/{batch_id}/cancel")
PINS = "/v1/pins/{program_id}"
VALID, BROKEN = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [
    *(("POST", path, mode) for path in BODIES for mode in (VALID, BROKEN)),
    *(("POST", path, mode) for path in DEPENDENT[:2] for mode in (VALID, BROKEN)),
    ("POST", DEPENDENT[2], VALID),
    ("DELETE", "/v1/files/{file_id}", VALID),
    ("DELETE", PINS, VALID),
    *(("GET", path, VALID) for path in GETS),
]
# What holds for every answer. That a valid body is accepted does not: fields depend on each other.
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS, ids=str)
def test_no_request_makes_the_server_fail(
    fuzzed: Running, method: str, path: str, mode: GenerationMode
) -> None:
    """Requests drawn from the document, and ones that break it: always an answer it describes."""
    document = schemathesis.openapi.from_url(fuzzed.url + "/openapi.json")
    operation = document[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis_settings(
        max_examples=60 if method == "POST" else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case: Case) -> None:
        case.call_and_validate(base_url=fuzzed.url, checks=CHECKS)

    fuzz()


def test_every_example_is_a_valid_request(gateway: Running) -> None:
    document = gateway.http().get("/openapi.json").json()
    for path, model in BODIES.items():
        examples = document["components"]["schemas"][model.__name__]["examples"]
        for example in examples:
            answer = gateway.http().post(path, json=example)
            assert answer.status_code == 200, (path, answer.text)


def test_the_document_lists_every_endpoint_and_error(gateway: Running) -> None:
    paths = gateway.http().get("/openapi.json").json()["paths"]
    assert set(paths) == {
        *BODIES,
        *GETS,
        *DEPENDENT,
        PINS,
    }
    chat = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "422" not in {
        status for path in paths.values() for op in path.values() for status in op["responses"]
    }
