"""Refuse at the door what can never run, and say which field to change. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import ContextLengthExceeded, RequestExceedsCapacity
from penstock.core.units import ceil_div


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine behind the desk can hold. Lengths in tokens."""

    context_len_max: int
    kv_block_tokens: int
    kv_blocks: int
    running_max: int
    takes_queue: bool = False  # it sorts the whole queue itself, and nobody waits at the desk

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.kv_block_tokens


def fit_output(
    prompt_len: int, asked_tokens: int | None, capacity: Capacity, *, prompt_param: str, output_param: str
) -> int:
    """Output tokens to allow: what was asked, or, when nothing was, all that context and KV pool can hold.

    The last sampled token is never fed back, so a request holds at most prompt + output - 1 tokens of KV.
    Raises ContextLengthExceeded or RequestExceedsCapacity naming the field that is too large.
    """
    if prompt_len >= capacity.context_len_max:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_len} tokens; the model's context holds {capacity.context_len_max}, "
            "output included.",
            hint="Shorten the prompt.",
            param=prompt_param,
        )
    if ceil_div(prompt_len, capacity.kv_block_tokens) > capacity.kv_blocks:
        raise RequestExceedsCapacity(
            f"The prompt has {prompt_len} tokens; this server's KV pool holds {capacity.kv_tokens}.",
            hint="Shorten the prompt, or start the server with a larger `kv_memory`.",
            param=prompt_param,
        )
    context_room = capacity.context_len_max - prompt_len
    kv_room = capacity.kv_tokens - prompt_len + 1
    if asked_tokens is None:
        return min(context_room, kv_room)
    if asked_tokens > context_room:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_len} tokens and `{output_param}` asks for {asked_tokens}; the model's "
            f"context holds {capacity.context_len_max} in all.",
            hint=f"Ask for at most {context_room}, or shorten the prompt.",
            param=output_param,
        )
    if asked_tokens > kv_room:
        raise RequestExceedsCapacity(
            f"The prompt has {prompt_len} tokens and `{output_param}` asks for {asked_tokens}; this server's "
            f"KV pool holds {capacity.kv_tokens} in all.",
            hint=f"Ask for at most {kv_room}, or start the server with a larger `kv_memory`.",
            param=output_param,
        )
    return asked_tokens
