"""The official client against the real server, and the answers against the engine run by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from benchmarks.in_process import InProcess
from benchmarks.server_process import ServerProcess, metric_sum, wait_until
from tiny_chat_model import VOCAB

MODEL = "tiny"
PROMPTS = ["Hello there", "Grüße aus Köln", "x = [1, 2]", "The quick brown fox " * 40, "你好"]


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def chat(client: openai.OpenAI, content: str, max_tokens: int = 24, **options: Any) -> Any:
    options = {"temperature": 0, **options}
    return client.chat.completions.create(
        model=MODEL, messages=user(content), max_tokens=max_tokens, **options
    )


def streamed_text(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@contextmanager
def other_load(server: ServerProcess) -> Iterator[None]:
    """Three long sampled streams run beside whatever happens inside."""
    body = {"model": MODEL, "prompt": "noise", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with server.client() as client:
        streams = [client.stream("POST", "/v1/completions", json={**body, "seed": seed}) for seed in range(3)]
        answers = [stream.__enter__() for stream in streams]
        try:
            wait_until(lambda: server.load()["requests_running"] == 3, "the load runs")
            yield
            assert server.load()["requests_running"] >= 1, "it ran all the time"
        finally:
            for answer in answers:
                answer.close()


@pytest.mark.parametrize("content", PROMPTS)
def test_the_text_is_the_engines(client: openai.OpenAI, alone: InProcess, content: str) -> None:
    """Over HTTP, streamed or whole, batched with itself or alone, cached or not: one text."""
    expected = alone.text(alone.chat_prompt(content), 24)
    whole = chat(client, content)
    assert whole.choices[0].message.content == expected
    assert streamed_text(chat(client, content, stream=True)) == expected
    assert [choice.message.content for choice in chat(client, content, n=3).choices] == [expected] * 3
    legacy = client.completions.create(model=MODEL, prompt=content, max_tokens=24, temperature=0)
    assert legacy.choices[0].text == alone.text(alone.prompt(content), 24)


def test_many_at_once_get_what_each_would_alone(server: ServerProcess, alone: InProcess) -> None:
    """Sixteen on four slots: they queue, share steps and prefixes, and do not change each other."""
    contents = [PROMPTS[number % 5] + str(number) for number in range(16)]

    async def ask() -> list[str | None]:
        async with (
            httpx.AsyncClient(trust_env=False) as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client,
        ):
            answers = [
                client.chat.completions.create(
                    model=MODEL, messages=user(content), max_tokens=20, temperature=0
                )
                for content in contents
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    assert asyncio.run(ask()) == [alone.text(alone.chat_prompt(content), 20) for content in contents]


def test_an_async_stream(server: ServerProcess, alone: InProcess) -> None:
    async def ask() -> str:
        async with (
            httpx.AsyncClient(trust_env=False) as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client,
        ):
            stream = await client.chat.completions.create(
                model=MODEL, messages=user("Hello"), max_tokens=30, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == alone.text(alone.chat_prompt("Hello"), 30)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, server: ServerProcess) -> None:
    text = chat(client, "Hello", 200).choices[0].message.content
    stop = text[20:23]
    for stream in (False, True):
        answer = chat(client, "Hello", 4000, stop=["never in it", stop], stream=stream)
        if stream:
            chunks = list(answer)
            found, last = streamed_text(chunks), chunks[-1].choices[0]
        else:
            found, last = answer.choices[0].message.content, answer.choices[0]
        assert found == text[: text.index(stop)]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    wait_until(lambda: server.load()["requests_running"] == 0, "the engine stopped too")


def test_choices_are_drawn_apart_and_counted_together(client: openai.OpenAI) -> None:
    answer = chat(client, "Hello", n=4, temperature=1.0, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and len(set(texts)) == 4
    single = chat(client, "Hello", temperature=1.0, seed=5)
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens, "the prompt is counted once"
    assert single.choices[0].message.content == texts[0], "the first choice does not depend on n"


def test_a_seed_repeats_the_text_whatever_else_runs(client: openai.OpenAI, server: ServerProcess) -> None:
    def ask(seed: int) -> tuple[str, str]:
        answer = chat(client, "Tell me", 40, temperature=1.2, top_p=0.95, seed=seed)
        return answer.choices[0].message.content, answer.system_fingerprint

    quiet = ask(11)
    assert quiet == ask(11) and ask(12)[0] != quiet[0]
    with other_load(server):
        assert ask(11) == quiet


def test_the_second_time_the_prompt_is_cached(client: openai.OpenAI) -> None:
    content = "A prompt that no other test sends, long enough to fill some blocks of KV. " * 3
    first, second = (chat(client, content, 4) for _ in range(2))
    block_tokens = 16
    full_blocks = (first.usage.prompt_tokens - 1) // block_tokens
    assert first.usage.prompt_tokens_details.cached_tokens < block_tokens * 2, "at most the template's words"
    assert second.usage.prompt_tokens_details.cached_tokens == full_blocks * block_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def test_usage_of_a_stream(client: openai.OpenAI) -> None:
    chunks = list(chat(client, "Hello", 7, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1]) and chunks[-1].choices == []
    assert chunks[-1].usage == chat(client, "Hello", 7, stream=False).usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_logprobs_are_the_engines(client: openai.OpenAI, alone: InProcess) -> None:
    answer = chat(client, "Hello", 12, logprobs=True, top_logprobs=5)
    expected = alone.run(alone.chat_prompt("Hello"), 12, logprobs=5)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == [alone.tokenizer.token_text(t) for t in expected.tokens]
    for entry, score in zip(content, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(score.logprob, abs=1e-5)
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (logprob for _, logprob in score.top), reverse=True
        )
        assert entry.top_logprobs[0].logprob == entry.logprob, "greedy takes the likeliest"
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_echo_scores_the_prompt_as_its_own_continuation(client: openai.OpenAI, alone: InProcess) -> None:
    """The score of prompt token i is what the engine gives it after the first i tokens, run alone."""
    prompt = alone.prompt("The quick brown fox jumps over 12 dogs.")
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=0
    )
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.tokens is not None and scores.token_logprobs is not None
    assert answer.choices[0].text.startswith("The quick brown fox jumps over 12 dogs.")
    assert scores.token_logprobs[0] is None and len(scores.token_logprobs) == len(prompt) + 3
    for index in range(1, len(prompt)):
        everything = alone.run(prompt[:index], 1, logprobs=VOCAB).logprobs[0]
        assert math.fsum(math.exp(logprob) for _, logprob in everything.top) == pytest.approx(1.0, abs=1e-4)
        assert scores.token_logprobs[index] == pytest.approx(dict(everything.top)[prompt[index]], abs=1e-4)


def test_what_was_preempted_is_whole(client: openai.OpenAI, server: ServerProcess) -> None:
    """Two choices that do not fit the KV pool together: one yields and is computed again."""
    before = metric_sum(server.metrics(), "penstock:num_preemptions_total")
    options = {"seed": 1, "temperature": 1.0, "extra_body": {"ignore_eos": True}}
    both = chat(client, "Hello", 2800, n=2, **options)
    assert both.usage.completion_tokens == 5600
    assert metric_sum(server.metrics(), "penstock:num_preemptions_total") > before
    first = chat(client, "Hello", 2800, **options)
    assert first.choices[0].message.content == both.choices[0].message.content


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=user("hi"))
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, "hi", 100_000)
    assert long.value.code == "context_length_exceeded" and long.value.response.headers["x-request-id"]
    assert client.models.list().data[0].id == MODEL


def test_tokens_and_ids_go_round(server: ServerProcess, alone: InProcess) -> None:
    with server.client() as http:
        text = "Привет, мир 🎉"
        tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert tokens == alone.prompt(text)
        assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
        rendered = http.post("/tokenize", json={"messages": user("hi")}).json()["tokens"]
        assert rendered == alone.chat_prompt("hi")
