"""A planned job on the engine: exactly the planned prefill, the same outputs, in the order of the input."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from fake_executor import make_replica
from tiny_model import TinyEngine, write_tiny_llama

from penstock.core.events import TokenOut
from penstock.core.request import Request, SamplingParams
from penstock.desk.job_plan import JobPlanner
from penstock.policies.stack import load_preset

BLOCK, KV_BLOCKS = 16, 80
BATCHLLM = load_preset("batchllm")["policies"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), sliding_window=None)
    return TinyEngine(folder, torch.float32, "torch")


def job() -> list[list[int]]:
    draw = random.Random("engine job")
    documents = [[draw.randrange(3, 128) for _ in range(length)] for length in (64, 70, 33)]
    prompts = [
        document + [draw.randrange(3, 128) for _ in range(draw.randrange(0, 20))]
        for document in documents
        for _ in range(5)
    ]
    prompts += [prompts[0], [draw.randrange(3, 128) for _ in range(7)]]  # a duplicate, and one of its own
    draw.shuffle(prompts)
    return prompts


def run(engine: TinyEngine, requests: list[Request], **system: object) -> tuple[dict[str, list[int]], int]:
    """Outputs by request, and prompt tokens computed."""
    replica = make_replica(kv_block_tokens=BLOCK, kv_blocks=KV_BLOCKS, running_max=16, **system)  # type: ignore[arg-type]
    executor = engine.executor(KV_BLOCKS)
    outputs: dict[str, list[int]] = {request.id: [] for request in requests}
    computed = 0
    for request in requests:
        replica.submit(request, 0.0)
    now_s = 0.0
    while (plan := replica.plan(now_s)) is not None:
        computed += sum(chunk.count for chunk in plan.chunks)
        now_s += 1.0
        for event in replica.complete(plan, executor.execute(plan), now_s):
            if isinstance(event, TokenOut):
                outputs[event.request_id].append(event.token_id)
        replica.check_invariants()
    return outputs, computed


def requests_of(prompts: list[list[int]]) -> list[Request]:
    return [
        Request(
            str(place),
            len(prompt),
            6 + place % 5,
            0.0,
            prompt_tokens=prompt,
            sampling=SamplingParams(temperature=0.0),
            slo_class="batch",
        )
        for place, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("step_tokens_max", [24, 256])
def test_the_planned_prefill_and_not_a_token_more(engine: TinyEngine, step_tokens_max: int) -> None:
    prompts = job()
    requests = requests_of(prompts)
    plan = JobPlanner(BLOCK).prepare(prompts, [request.max_output_tokens for request in requests])
    names = {group: f"g{index}" for index, group in enumerate(plan.groups)}
    planned = [
        replace(requests[place], group_id=names[group], shared_len=group.shared_len)
        for place, group in plan.order
    ]
    alone, computed_alone = run(engine, requests, prefix_cache=False, step_tokens_max=256)
    shared, computed = run(engine, planned, step_tokens_max=step_tokens_max, **BATCHLLM)
    assert computed_alone == plan.prompt_tokens
    assert computed == sum(plan.prefill_tokens(group) for group in plan.groups) < computed_alone
    assert shared == alone
    assert [shared[str(place)] for place in range(len(prompts))] == list(alone.values())
