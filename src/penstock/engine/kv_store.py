"""KV tensors, in pages. The replica's `KVPool` decides who holds which block; this holds the bytes.

One layer, with B = block_tokens:

    K  [blocks, kv_heads, head_dim, B]     keys as lanes, see kernels.c
    V  [blocks, kv_heads, B, head_dim]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.models.config import ModelConfig


class KVStore:
    """Block tables of the sequences the executor knows, and the pages they point to."""

    def __init__(
        self,
        config: ModelConfig,
        block_count: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_count = block_count
        self.block_tokens = block_tokens
        heads, dim = config.kv_heads, config.head_dim
        # Pages are written before they are read, so they start as whatever the memory holds; on the CPU the
        # system hands out each page when it is first written.
        self.k = torch.empty(config.layers, block_count, heads, dim, block_tokens, dtype=dtype, device=device)
        self.v = torch.empty(config.layers, block_count, heads, block_tokens, dim, dtype=dtype, device=device)
        self._tables: dict[int, list[int]] = {}

    @property
    def byte_count(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def start(self, seq_id: int, blocks: Sequence[int]) -> None:
        assert seq_id not in self._tables
        self._tables[seq_id] = list(blocks)

    def extend(self, seq_id: int, blocks: Sequence[int]) -> None:
        self._tables[seq_id] += blocks

    def release(self, seq_id: int) -> None:
        del self._tables[seq_id]

    def table(self, seq_id: int) -> list[int]:
        """Block ids in order of position."""
        return self._tables[seq_id]


def block_bytes(config: ModelConfig, block_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    return 2 * config.layers * config.kv_heads * config.head_dim * block_tokens * dtype.itemsize
