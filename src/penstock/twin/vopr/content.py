"""Prompts and outputs as pure functions of small numbers, so that a checker can know them beforehand.

A history of tokens folds into one 64-bit number, token by token. KV of a position depends on everything
before it, as in a model; the next token depends on the fold of the whole history and on the request's seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from penstock.core.reasons import FinishReason
from penstock.core.request import Request, SamplingParams
from penstock.twin.vopr.script import Call, System

VOCAB = 1000
_MASK = (1 << 64) - 1
# Knuth's MMIX generator for the fold; odd constants near 2^64 times irrational numbers for the mix.
_FOLD, _FOLD_ADD, _MIX, _MIX_SEED = (
    6364136223846793005,
    1442695040888963407,
    0xD6E8FEB86659FD93,
    0x9E3779B97F4A7C15,
)


def fold(value: int, token: int) -> int:
    """The number of a history, one token longer."""
    return (value * _FOLD + token + _FOLD_ADD) & _MASK


def folds(tokens: Iterable[int], value: int = 0) -> list[int]:
    """The number of the history that ends with each of `tokens`."""
    return list(accumulate(tokens, fold, initial=value))[1:]


def next_token(value: int, seed: int) -> int:
    """What a model would say after the history `value`."""
    return ((((value ^ (seed * _MIX_SEED & _MASK)) * _MIX) & _MASK) >> 40) % VOCAB


def prompt_of(call: Call) -> list[int]:
    stem_tokens = min(call.stem_tokens, call.prompt_tokens)
    stem, own = fold(1, call.stem), fold(2, call.content)
    shared = [next_token(fold(stem, place), 0) for place in range(stem_tokens)]
    return shared + [next_token(fold(own, place), 0) for place in range(stem_tokens, call.prompt_tokens)]


def requests_of(call: Call, output_tokens: int, system: System) -> list[Request]:
    """The requests of one call, as the gateway makes them; the first computes the prompt for all."""
    prompt = prompt_of(call)
    values = folds(prompt)
    names = [f"{call.name}.{index}" for index in range(call.choices)]
    return [
        Request(
            id=name,
            prompt_len=len(prompt),
            max_output_tokens=output_tokens,
            arrival_s=call.at_s,
            prompt_tokens=prompt if system.exact else None,
            block_keys=_block_keys(values, call, system),
            stop_token_ids=_stop_token(values[-1], index, call) if system.exact else frozenset(),
            sampling=SamplingParams(temperature=0.0, seed=index),
            tenant=call.tenant,
            priority=call.priority,
            slo_class=call.slo_class,
            session_id=call.session or None,
            cache_salt=call.salt,
            leader_id=names[0] if index else None,
            is_last_turn=call.last_turn,
            tool=call.tool or None,
            pin_s=call.pin_s or None,
            group_id=f"g{call.stem}" if call.group_tokens else None,
            shared_len=call.group_tokens,
        )
        for index, name in enumerate(names)
    ]


def expected_output(request: Request) -> tuple[list[int], FinishReason]:
    """What any schedule must produce; a stop token is not part of it. The request has tokens."""
    assert request.prompt_tokens is not None
    value = folds(request.prompt_tokens)[-1]
    output: list[int] = []
    while len(output) < request.max_output_tokens:
        token = next_token(value, request.sampling.seed)
        if token in request.stop_token_ids:
            return output, FinishReason.STOP
        output.append(token)
        value = fold(value, token)
    return output, FinishReason.LENGTH


def _stop_token(value: int, seed: int, call: Call) -> frozenset[int]:
    """The token that the output has in its place `stops_after_tokens`; it may come earlier as well."""
    if not call.stops_after_tokens:
        return frozenset()
    for _ in range(call.stops_after_tokens - 1):
        value = fold(value, next_token(value, seed))
    return frozenset((next_token(value, seed),))


def _block_keys(values: Sequence[int], call: Call, system: System) -> list[bytes] | None:
    """Keys of the prompt's full blocks, where only lengths are known."""
    if system.exact or not call.keyed:
        return None
    ends = range(system.block_tokens - 1, len(values), system.block_tokens)
    return [call.salt.encode() + values[end].to_bytes(8, "big") for end in ends]
