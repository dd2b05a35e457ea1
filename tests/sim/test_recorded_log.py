"""A recorded log in the twin: it finds of prompts and answers what the live server found."""

from __future__ import annotations

from pathlib import Path

from recorded import WAIT_S, ConstantCost, end

from penstock.core.metrics import RequestOutcome
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits
from penstock.twin.simulate import simulate
from penstock.workloads.recording import RequestLog
from penstock.workloads.source import open_trace

LIMITS = ReplicaLimits(
    kv_blocks=100, kv_block_tokens=4, running_max=4, step_tokens_max=64, context_len_max=400
)


def cached_tokens(path: Path) -> list[int]:
    outcomes: list[RequestOutcome] = []
    simulate(open_trace(path), Settings(), LIMITS, ConstantCost(), outcomes.append)
    return [o.cached_tokens for o in sorted(outcomes, key=lambda outcome: outcome.arrival_s)]


def test_the_next_turn_finds_the_answer(tmp_path: Path) -> None:
    prompt, answer, more = list(range(10)), list(range(50, 67)), [7, 8, 9]
    log = RequestLog(tmp_path / "log", 4)
    log.take(*end("a", 1.0, prompt, answer))
    log.take(*end("b", 60.0, prompt + answer + more, [1]))
    log.take(*end("c", 120.0, [99, *prompt[1:], *answer], [1]))
    log.close(WAIT_S)
    # 27 tokens of prompt and answer, the last without KV: 6 full blocks
    assert cached_tokens(tmp_path / "log") == [0, 24, 0]
