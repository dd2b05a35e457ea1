"""Random requests with everything that a policy may read, and a stop, a cancel or a next turn for some.

Outputs are pure functions of the prompts (`penstock.twin.vopr.content`), so that what each request must say
is known beforehand. One seed, one load.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from penstock.core.metrics import Slo
from penstock.core.request import Request, SamplingParams
from penstock.policies.context import ServiceTerms
from penstock.replica.limits import ReplicaLimits
from penstock.twin.vopr.content import fold, folds, next_token

BLOCK_TOKENS: Final = 4
CONTEXT_LEN_MAX: Final = 120
TENANTS: Final = ("acme", "zeta", "default")
TERMS: Final = ServiceTerms(
    {"chat": Slo(ttft_ms=200.0, tpot_ms=30.0), "batch": Slo(e2e_ms=20_000.0)}, {"acme": 2.0, "zeta": 0.5}, 7
)
SYSTEM_PROMPTS: Final = 4
OWN_TOKENS_MAX: Final = 28
OUTPUT_TOKENS_MAX: Final = 40
TURNS_MAX: Final = 4
FLOOD: Final = 400
UNLOVED: Final = "unloved"
_GREEDY: Final = SamplingParams(temperature=0.0)
BURST_GAP_S: Final = 0.012
CALM_GAP_S: Final = 0.1


@dataclass(frozen=True)
class Turn:
    """A request that arrives `gap_s` after the end of its program's last one; the first, at `gap_s`."""

    request: Request
    gap_s: float
    cancel_after_s: float | None = None


@dataclass(frozen=True)
class PairLoad:
    """Programs of one or more turns. `count` requests in all."""

    programs: Sequence[Sequence[Turn]]

    @property
    def count(self) -> int:
        return sum(map(len, self.programs))


def sizes(kv_blocks: int = 44, *, repeat: bool = True) -> ReplicaLimits:
    """Small enough that KV runs out now and then: a longest request takes 30 of the blocks."""
    return ReplicaLimits(
        kv_blocks=kv_blocks,
        kv_block_tokens=BLOCK_TOKENS,
        running_max=12,
        step_tokens_max=32,
        context_len_max=CONTEXT_LEN_MAX,
        prefix_cache=True,
        repeat=repeat,
    )


def draw_load(count: int, seed: int) -> PairLoad:
    """About as many arrivals as the replica can serve, in bursts and pauses."""
    draw = random.Random(f"pairs/{seed}")
    programs: list[list[Turn]] = []
    made, now_s, gap_s = 0, 0.0, BURST_GAP_S
    while made < count:
        if draw.random() < 0.05:
            gap_s = draw.choice((BURST_GAP_S, CALM_GAP_S))
        now_s += draw.expovariate(1.0) * gap_s
        kind = draw.random()
        if kind < 0.15:
            made_now = _program(draw, len(programs), now_s)
        elif kind < 0.25:
            made_now = _siblings(draw, len(programs), now_s)
        else:
            made_now = [[_single(draw, len(programs), now_s)]]
        programs += made_now
        made += sum(map(len, made_now))
    return PairLoad(programs)


def draw_flood() -> PairLoad:
    """Far more short prompts of one tenant than can be served, and early among them one long of another."""
    draw, turns = random.Random("flood"), []
    for index in range(FLOOD):
        prompt = _own_tokens(draw, 8)
        request = Request(
            f"s{index}", len(prompt), 4, 0.0, prompt_tokens=prompt, sampling=_GREEDY, tenant="acme"
        )
        turns.append([Turn(request, 0.002 * index)])
    prompt = _own_tokens(draw, 80)
    request = Request(UNLOVED, len(prompt), 4, 0.0, prompt_tokens=prompt, sampling=_GREEDY, tenant="zeta")
    return PairLoad([*turns, [Turn(request, 0.1)]])


def _single(draw: random.Random, index: int, now_s: float) -> Turn:
    request = _request(draw, f"r{index}", _prompt(draw, index), now_s)
    if draw.random() < 0.2:
        group = draw.randrange(3)
        shared = min(request.prompt_len, len(_system_prompt(group)))
        prompt = [*_system_prompt(group)[:shared], *(request.prompt_tokens or ())[shared:]]
        request = replace(request, prompt_tokens=prompt, group_id=f"g{group}", shared_len=shared)
    cancel_after_s = draw.expovariate(2.0) if draw.random() < 0.06 else None
    return Turn(_with_stop(draw, request), now_s, cancel_after_s)


def _siblings(draw: random.Random, index: int, now_s: float) -> list[list[Turn]]:
    """Several answers to one prompt; the first computes it for all."""
    first = _request(draw, f"r{index}-0", _prompt(draw, index), now_s)
    siblings = [first]
    for number in range(1, draw.randint(2, 4)):
        sampling = replace(first.sampling, seed=number)
        siblings.append(replace(first, id=f"r{index}-{number}", leader_id=first.id, sampling=sampling))
    return [[Turn(_with_stop(draw, each), now_s)] for each in siblings]


def _program(draw: random.Random, index: int, now_s: float) -> list[list[Turn]]:
    """An agent's calls: each prompt is the last one, its answer, and what a tool said."""
    turns: list[Turn] = []
    prompt, gap_s = _prompt(draw, index), now_s
    count = draw.randint(2, TURNS_MAX)
    for number in range(count):
        request = replace(
            _request(draw, f"r{index}-t{number}", prompt, now_s),
            program_id=f"p{index}",
            session_id=f"p{index}",
            tool=draw.choice(("search", "python", None)),
            is_last_turn=number == count - 1 and draw.random() < 0.8,
        )
        turns.append(Turn(request, gap_s))
        prompt = [*prompt, *outputs_of(request), *_own_tokens(draw, draw.randint(1, 12))]
        gap_s = draw.expovariate(2.0)
        if len(prompt) >= CONTEXT_LEN_MAX - OUTPUT_TOKENS_MAX:
            break
    return [turns]


def _request(draw: random.Random, name: str, prompt: list[int], now_s: float) -> Request:
    slo_class = draw.choice(("chat", "batch", "default"))
    own_slo = Slo(ttft_ms=draw.choice((50.0, 500.0))) if draw.random() < 0.1 else None
    return Request(
        id=name,
        prompt_len=len(prompt),
        max_output_tokens=draw.choice((1, draw.randint(1, 8), draw.randint(1, OUTPUT_TOKENS_MAX))),
        arrival_s=now_s,
        prompt_tokens=prompt,
        sampling=_GREEDY,
        tenant=draw.choice(TENANTS),
        slo_class=slo_class,
        priority=draw.choice((0, 0, 0, -1, 1)),
        cache_salt=draw.choice(("", "", "", "s")),
        slo=own_slo,
    )


def _with_stop(draw: random.Random, request: Request) -> Request:
    """Perhaps a token that ends the output before its maximum."""
    output = outputs_of(request)
    if draw.random() < 0.5 or len(output) < 2:
        return request
    return replace(request, stop_token_ids=frozenset({output[draw.randrange(1, len(output))]}))


def _prompt(draw: random.Random, index: int) -> list[int]:
    stem = _system_prompt(draw.randrange(SYSTEM_PROMPTS)) if draw.random() < 0.5 else []
    return [*stem, *_own_tokens(draw, draw.randint(1, OWN_TOKENS_MAX))]


def _system_prompt(number: int) -> list[int]:
    return [next_token(fold(number + 1, place), 0) for place in range(8 + 6 * number)]


def _own_tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(count)]


def outputs_of(request: Request) -> list[int]:
    """What it must say, a stop token left out: it depends on nothing but prompt and seed."""
    assert request.prompt_tokens is not None
    value, output = folds(request.prompt_tokens)[-1], list[int]()
    while len(output) < request.max_output_tokens:
        token = next_token(value, request.sampling.seed)
        if token in request.stop_token_ids:
            break
        output.append(token)
        value = fold(value, token)
    return output
