"""From validated bodies to core requests."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.desk import Capacity
from penstock.gateway.convert import (
    Caller,
    CallPlan,
    Served,
    chat_messages,
    check_generation,
    derive_seed,
    plan_chat,
    plan_completion,
)
from penstock.gateway.schema import ChatRequest, CompletionRequest

CAPACITY = Capacity(context_len_max=100, kv_block_tokens=10, kv_blocks=10, running_max=4)
SERVED = Served("m", CAPACITY, 300, frozenset({257}), 16, is_priority_ranked=False)
CALLER = Caller(arrival_s=5.0, slo_class="chat")


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    )


def plan(prompt_len: int = 10, **fields: Any) -> CallPlan:
    return plan_chat(chat(**fields), list(range(prompt_len)), SERVED, CALLER, "chatcmpl-1", seed=42)


def test_defaults_are_openais() -> None:
    (request,) = plan().requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.logprobs) == (1.0, 1.0, 0, None)
    assert request.max_output_tokens == 90, "absent: what the context holds"
    assert request.stop_token_ids == {257} and request.leader_id is None
    assert (request.arrival_s, request.slo_class) == (5.0, "chat")


def test_max_completion_tokens_is_preferred() -> None:
    assert plan(max_tokens=50, max_completion_tokens=7).requests[0].max_output_tokens == 7
    assert plan(max_tokens=50).requests[0].max_output_tokens == 50


def test_legacy_completions_default_to_sixteen_tokens() -> None:
    body = CompletionRequest.model_validate({"model": "m", "prompt": "x"})
    made = plan_completion(body, [[1, 2]], [], SERVED, CALLER, "cmpl-1", seed=0)
    assert made.requests[0].max_output_tokens == 16 and made.continues_prompt


def test_choices_have_a_leader_and_seeds_of_their_own() -> None:
    first, second, third = plan(n=3, seed=7).requests
    assert first.leader_id is None and second.leader_id == third.leader_id == first.id
    seeds = [request.sampling.seed for request in (first, second, third)]
    assert seeds == [derive_seed(7, index) for index in range(3)] and len(set(seeds)) == 3
    assert [request.sampling.seed for request in plan(n=3, seed=7).requests] == seeds
    assert plan(n=1).requests[0].sampling.seed == derive_seed(42, 0), "no seed given: the one handed in"


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_seed_of_the_api_derives(seed: int) -> None:
    assert 0 <= derive_seed(seed, 0) < 2**63
    assert derive_seed(seed, 0) != derive_seed(seed, 1)


def test_eos_may_be_ignored_and_stops_added() -> None:
    assert plan(ignore_eos=True, stop_token_ids=[5]).requests[0].stop_token_ids == {5}
    assert plan(stop_token_ids=[5]).requests[0].stop_token_ids == {5, 257}


def test_priority_is_refused_unless_the_policy_reads_it() -> None:
    with pytest.raises(UnsupportedParameter):
        check_generation(chat(priority=-1), SERVED)
    check_generation(chat(priority=0), SERVED)
    ranked = Served("m", CAPACITY, 300, frozenset(), 16, is_priority_ranked=True)
    check_generation(chat(priority=-1), ranked)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        plan(prompt_len=0)


def test_prompts_of_a_batch_count_once_each() -> None:
    body = CompletionRequest.model_validate({"model": "m", "prompt": ["a", "b"], "n": 2})
    made = plan_completion(body, [[1, 2], [3]], [], SERVED, CALLER, "cmpl-1", seed=0)
    assert made.prompt_token_count == 3 and len(made.requests) == 4
    assert [request.leader_id for request in made.requests] == [None, "cmpl-1-0", None, "cmpl-1-2"]


def test_messages_for_the_template() -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": part} for part in "ab"]},
        ]
    )
    assert chat_messages(body.messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb", "name": "ann"},
    ]
