"""The embedded model, served as a stranger would: its texts, its cache, its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import psutil
import pytest
from benchmarks.in_process import InProcess
from benchmarks.server_process import ServerProcess, start_server

from penstock.core.units import MIB, parse_bytes

MODEL = "smollm2-135m-instruct"
KV_MEMORY = "64MiB"
QUESTIONS = (
    "Name three rivers of Europe.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def embedded(smollm2: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("embedded")
    with start_server(MODEL, folder, "--threads", "1", "--kv-memory", KV_MEMORY) as server:
        yield server
        assert server.stop() == 0


def test_no_second_copy_of_the_weights(embedded: ServerProcess, shared_server: ServerProcess) -> None:
    """Private memory of this engine beyond that of one with next to no weights; before it computes much."""
    assert embedded.info["weights_bytes"] > 200 * MIB, "in the dtype it computes with"
    grown = private_bytes(embedded.engine) - private_bytes(shared_server.engine)
    assert grown < 1.3 * embedded.info["weights_bytes"] + 64 * MIB


def private_bytes(process: psutil.Process) -> int:
    return int(process.memory_full_info().uss)


def test_the_kv_pool_is_what_was_configured(embedded: ServerProcess) -> None:
    configured = parse_bytes(KV_MEMORY)
    assert 0.98 * configured <= embedded.info["kv_bytes"] <= configured


def test_it_answers_as_the_engine_does(embedded: ServerProcess) -> None:
    """Four questions at once over HTTP; each text is what the engine gives it alone, whatever the batch."""
    alone = InProcess(MODEL, threads=1, kv_memory=KV_MEMORY)
    expected = [alone.text(alone.chat_prompt(question), 24) for question in QUESTIONS]
    assert "Paris" in expected[1]

    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=embedded.url, timeout=300.0, trust_env=False) as client:
            bodies = [
                {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": 24,
                    "temperature": 0,
                }
                for question in QUESTIONS
            ]
            answers = [client.post("/v1/chat/completions", json=body) for body in bodies]
            return [
                answer.json()["choices"][0]["message"]["content"] for answer in await asyncio.gather(*answers)
            ]

    assert asyncio.run(ask()) == expected
    assert asyncio.run(ask()) == expected, "and from the prefix cache"
