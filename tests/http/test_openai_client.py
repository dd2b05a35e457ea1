"""The official client against the gateway: sync, async, streams, cancels, error classes and retries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import openai
import pytest
from fake_link import FakeLink, make_info
from served import Running, make_settings, wait_until

from penstock.core.reasons import CancelReason

MESSAGES = [{"role": "user", "content": "Name a river."}]


def test_a_whole_answer(gateway: Running) -> None:
    answer = gateway.openai().chat.completions.create(
        model="fake", messages=MESSAGES, max_completion_tokens=5, temperature=0
    )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint == "penstock-fake"
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and len(choice.message.content or "") == 5
    assert answer.usage is not None and answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 2
    gateway.wait_idle()


def test_a_stream_with_usage(gateway: Running) -> None:
    stream = gateway.openai().chat.completions.create(
        model="fake",
        messages=MESSAGES,
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1 and len({chunk.created for chunk in chunks}) == 1


def test_legacy_completions_with_echo_and_logprobs(gateway: Running) -> None:
    answer = gateway.openai().completions.create(
        model="fake", prompt=["ab", "cde"], n=2, echo=True, logprobs=2, max_tokens=3, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:-3] for choice in answer.choices] == ["ab", "ab", "cde", "cde"]
    scored = answer.choices[2].logprobs
    assert scored is not None and scored.tokens is not None
    assert "".join(scored.tokens) == answer.choices[2].text
    assert scored.token_logprobs is not None and scored.token_logprobs[0] is None
    assert scored.text_offset == list(range(6))
    assert answer.usage is not None and answer.usage.prompt_tokens == 5  # each prompt once
    assert answer.usage.completion_tokens == 12


def test_choices_share_a_prompt_and_differ_by_seed(gateway: Running) -> None:
    def ask(seed: int) -> list[str]:
        answer = gateway.openai().chat.completions.create(
            model="fake", messages=MESSAGES, n=3, seed=seed, max_tokens=8
        )
        return [choice.message.content or "" for choice in answer.choices]

    assert ask(1) == ask(1)
    assert len(set(ask(1))) > 1, "each choice draws from a stream of its own"
    leaders = [request.leader_id for request in gateway.link.submitted[-3:]]
    assert leaders[0] is None and leaders[1] == leaders[2] == gateway.link.submitted[-3].id


def test_chat_logprobs(gateway: Running) -> None:
    answer = gateway.openai().chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.content is not None
    assert "".join(entry.token for entry in scores.content) == answer.choices[0].message.content
    assert [len(entry.top_logprobs) for entry in scores.content] == [2, 2, 2]
    assert scores.content[0].bytes == list(scores.content[0].token.encode())


async def many_async(gateway: Running) -> list[str]:
    client = openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", http_client=httpx.AsyncClient(trust_env=False)
    )

    async def one(number: int) -> str:
        stream = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": str(number)}],
            max_tokens=20,
            stream=True,
            temperature=0,
        )
        pieces = [
            chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices[0].delta.content
        ]
        return "".join(pieces)

    async with client:
        return list(await asyncio.gather(*(one(number) for number in range(64))))


def test_many_async_streams_each_get_their_own_text(gateway: Running) -> None:
    texts = asyncio.run(many_async(gateway))
    client = gateway.openai()
    for number in (0, 31, 63):
        alone = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": str(number)}], max_tokens=20, temperature=0
        )
        assert texts[number] == alone.choices[0].message.content
    gateway.wait_idle()


def test_closing_a_stream_cancels_the_work(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(step_s=0.01))
    stream = running.openai().chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=2000, stream=True
    )
    next(iter(stream))
    stream.close()
    running.wait_idle()
    assert running.link.cancels[0][1] is CancelReason.CLIENT_DISCONNECT
    assert running.link.submitted[0].max_output_tokens == 2000


def test_an_async_call_that_is_cancelled_frees_its_slot(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(step_s=0.01))

    async def cancel_in_flight() -> None:
        client = openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="none", http_client=httpx.AsyncClient(trust_env=False)
        )
        async with client:
            task = asyncio.create_task(
                client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=2000)
            )
            await asyncio.to_thread(wait_until, lambda: running.link.running_count == 1, "it runs")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel_in_flight())
    running.wait_idle()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
    ],
)
def test_errors_map_to_the_clients_classes(
    gateway: Running, change: dict[str, object], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as raised:
        gateway.openai().chat.completions.create(**{"model": "fake", "messages": MESSAGES, **change})  # type: ignore[call-overload]
    assert raised.value.param == next(iter(change))
    assert raised.value.request_id is not None


def test_a_missing_key_is_an_authentication_error(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"api_keys": ("sesame", "öffne")}))
    with pytest.raises(openai.AuthenticationError) as raised:
        running.openai().chat.completions.create(model="fake", messages=MESSAGES)
    assert raised.value.code == "invalid_api_key"
    client = running.openai(api_key="sesame")
    assert client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1).choices
    assert running.http().get("/health").status_code == 200, "probes need no key"
    assert running.http().get("/v1/models").status_code == 401


def test_a_retrying_client_gets_through_a_full_server(serve: Callable[..., Running]) -> None:
    """503 with Retry-After: the client waits as told and is served."""
    link = FakeLink(step_s=0.01, info=make_info(running_max=1))
    running = serve(make_settings(desk={"queue_requests_max": 0, "engine_ahead": 0}), link)
    occupant = running.openai().chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=40, stream=True
    )
    next(iter(occupant))
    with pytest.raises(openai.InternalServerError) as raised:
        running.openai().chat.completions.create(model="fake", messages=MESSAGES)
    assert raised.value.status_code == 503 and raised.value.code == "overloaded"
    assert float(raised.value.response.headers["retry-after"]) >= 1
    began_s = time.monotonic()
    patient = running.openai(max_retries=5)
    answer = patient.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert time.monotonic() - began_s >= 1.0, "it waited as told"
    for _ in occupant:
        pass
    running.wait_idle()


def test_an_error_after_the_first_byte_is_raised_by_the_client(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(step_s=0.01))
    stream = iter(
        running.openai().chat.completions.create(
            model="fake", messages=MESSAGES, max_tokens=2000, stream=True
        )
    )
    next(stream)
    running.link.die()
    with pytest.raises(openai.APIError, match="engine died"):
        for _ in stream:
            pass


def test_models_list_through_the_client(gateway: Running) -> None:
    assert [model.id for model in gateway.openai().models.list()] == ["fake"]
    assert gateway.openai().models.retrieve("fake").object == "model"
