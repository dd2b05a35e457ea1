"""The sizes a replica decides within, and the requests that could never fit them."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.errors import ContextLengthExceeded, RequestExceedsCapacity
from penstock.core.request import Request
from penstock.core.units import ceil_div


@dataclass(frozen=True, slots=True)
class ReplicaLimits:
    """The sizes a replica decides within."""

    kv_blocks: int
    kv_block_tokens: int
    running_max: int
    step_tokens_max: int
    context_len_max: int
    prefix_cache: bool = True
    repeat: bool = True  # let a decode plan stand; results are the same without
    host_kv_blocks: int = 0  # room for copies in host memory
    kv_group_tokens: int = 0  # a sequence's blocks come in runs of so many tokens; 0: one by one
    kv_block_bytes: int = 0  # over all layers, K and V; 0: not known
    kv_layers: int = 1  # a copy is one transfer a layer

    @property
    def kv_group_blocks(self) -> int:
        """The blocks of a run; 1 where they come one by one."""
        return max(1, self.kv_group_tokens // self.kv_block_tokens)


def check_feasible(request: Request, limits: ReplicaLimits) -> None:
    """Refuse what could never run, however empty the replica. Raises a RequestError."""
    length = request.prompt_len + request.max_output_tokens
    if length > limits.context_len_max:
        raise ContextLengthExceeded(
            f"The request needs {length} tokens ({request.prompt_len} of prompt and "
            f"{request.max_output_tokens} of output); this model's context is {limits.context_len_max}.",
            hint="Shorten the prompt or lower `max_tokens`.",
        )
    blocks = ceil_div(request.total_len_max, limits.kv_block_tokens)
    if blocks > limits.kv_blocks:
        raise RequestExceedsCapacity(
            f"The request needs KV for {request.total_len_max} tokens; this replica holds "
            f"{limits.kv_blocks * limits.kv_block_tokens} in all.",
            hint="Shorten the prompt, lower `max_tokens`, or serve with a larger `replica.kv_memory`.",
        )
