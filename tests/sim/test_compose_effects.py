"""Sarathi's headline effect and its price, in virtual time: a step costs a constant plus so much a token."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from fake_executor import FakeExecutor, expected_output, make_replica

from penstock.core.events import TokenOut
from penstock.core.request import Request

STEP_S, TOKEN_S = 0.005, 0.0005  # about this CPU's: decode a few ms, prefill 2,000 tokens/s


@dataclass
class Told:
    times_s: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def worst_gap_s(self, names: list[str]) -> float:
        return max(
            later - earlier
            for name in names
            for earlier, later in zip(self.times_s[name], self.times_s[name][1:], strict=False)
        )


def stalled_streams(compose: str, step_tokens: int) -> Told:
    """Eight streams decode; a prompt of 1,500 tokens arrives in their midst (card sarathi-serve, test 3)."""
    replica = make_replica(
        kv_blocks=1000, running_max=16, step_tokens_max=step_tokens, context_len_max=2000, compose=compose
    )
    executor, told, now_s = FakeExecutor(4), Told(), 0.0
    requests = [Request(f"s{i}", 8, 60, 0.0, prompt_tokens=[i] * 8) for i in range(8)]
    requests.append(Request("long", 1500, 5, 0.1, prompt_tokens=list(range(1500))))
    pending = list(requests)
    while pending or replica.has_work:
        while pending and pending[0].arrival_s <= now_s:
            replica.submit(pending.pop(0), now_s)
        plan = replica.plan(now_s)
        assert plan is not None
        result = executor.execute(plan)
        now_s += STEP_S + TOKEN_S * plan.token_count
        for event in replica.complete(plan, result, now_s):
            if isinstance(event, TokenOut):
                told.times_s.setdefault(event.request_id, []).append(now_s)
                told.tokens.setdefault(event.request_id, []).append(event.token_id)
    assert told.tokens == {request.id: expected_output(request) for request in requests}
    return told


STREAMS = [f"s{i}" for i in range(8)]


def test_sarathi_bounds_the_gap_that_a_long_prompt_tears() -> None:
    before, after = stalled_streams("prefill-first", 2048), stalled_streams("sarathi", 128)
    assert before.tokens == after.tokens
    assert after.worst_gap_s(STREAMS) * 4 <= before.worst_gap_s(STREAMS)
    assert after.worst_gap_s(STREAMS) <= STEP_S + 128 * TOKEN_S + 1e-9


def test_sarathi_pays_with_the_time_to_first_token_of_the_long_prompt() -> None:
    before, after = stalled_streams("prefill-first", 2048), stalled_streams("sarathi", 128)
    assert after.times_s["long"][0] > before.times_s["long"][0]


@pytest.mark.parametrize("step_tokens", [16, 128, 512])
def test_the_gap_is_a_matter_of_the_budget(step_tokens: int) -> None:
    told = stalled_streams("sarathi", step_tokens)
    assert told.worst_gap_s(STREAMS) <= STEP_S + max(step_tokens, 8) * TOKEN_S + 1e-9
