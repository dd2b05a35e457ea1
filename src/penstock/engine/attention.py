"""Attention over pages, behind a seam: `plan` once a step, then one `attend` a layer.

Law of both back ends: a row's result depends on its own sequence only. Keys are walked in groups at fixed
absolute positions, so neither the batch nor the chunking of a prompt changes any rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.engine.kernels import AttendArgs, Kernels, load_kernels
from penstock.engine.kv_store import KVStore
from penstock.engine.model import LayerAttention
from penstock.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Rows [first_row, first_row + count) of a step are positions [first_pos, ...) of one sequence."""

    first_row: int
    count: int
    first_pos: int
    blocks: Sequence[int]


class AttentionBackend(Protocol):
    """Makes the `LayerAttention` of one step, on so many threads."""

    @property
    def name(self) -> str: ...

    def plan(self, items: Sequence[SequenceRows], threads: int) -> LayerAttention: ...


def make_attention(config: ModelConfig, store: KVStore) -> AttentionBackend:
    """The compiled kernels where they take this model, this page size and this device; torch otherwise."""
    kernels = load_kernels()
    fits = config.head_dim % 16 == 0 and config.head_dim <= 256 and store.block_tokens % 16 == 0
    on_cpu = store.k.device.type == "cpu" and store.k.dtype in (torch.bfloat16, torch.float32)
    if kernels is not None and fits and on_cpu and config.heads // config.kv_heads <= 48:
        return PagedCpuAttention(config, store, kernels)
    return TorchAttention(config, store)


def _slots(items: Sequence[SequenceRows], block_tokens: int) -> list[int]:
    """Where each row's K and V go: block * block_tokens + offset."""
    return [
        item.blocks[position // block_tokens] * block_tokens + position % block_tokens
        for item in items
        for position in range(item.first_pos, item.first_pos + item.count)
    ]


class PagedCpuAttention:
    """kernels.c: reads pages in place, every row in the same order of arithmetic."""

    name = "paged-cpu"

    def __init__(self, config: ModelConfig, store: KVStore, kernels: Kernels) -> None:
        self._config = config
        self._store = store
        self._kernels = kernels

    def plan(self, items: Sequence[SequenceRows], threads: int) -> LayerAttention:
        return _PagedStep(self._config, self._store, self._kernels, threads, items)


class _PagedStep:
    def __init__(
        self,
        config: ModelConfig,
        store: KVStore,
        kernels: Kernels,
        threads: int,
        items: Sequence[SequenceRows],
    ) -> None:
        self._config, self._store, self._kernels, self._threads = config, store, kernels, threads
        offsets: list[int] = []
        tables: list[int] = []
        for item in items:
            offsets.append(len(tables))
            tables += item.blocks
        # Kept as attributes: the kernels read them through bare pointers.
        self._items = torch.tensor([(i.first_row, i.count, i.first_pos) for i in items], dtype=torch.int32)
        self._tables = torch.tensor(tables, dtype=torch.int32)
        self._offsets = torch.tensor(offsets, dtype=torch.int64)
        self._slots = torch.tensor(_slots(items, store.block_tokens), dtype=torch.int64)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config, store = self._config, self._store
        k_pages, v_pages = store.k[layer], store.v[layer]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert q.dtype == k_pages.dtype and k.shape[0] == len(self._slots)
        self._kernels.store(
            (k.data_ptr(), v.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), self._slots.data_ptr()),
            (k.shape[0], config.kv_heads, config.head_dim, store.block_tokens),
            k.element_size(),
        )
        out = torch.empty_like(q)
        args = AttendArgs(
            q=q.data_ptr(),
            out=out.data_ptr(),
            k_pages=k_pages.data_ptr(),
            v_pages=v_pages.data_ptr(),
            items=self._items.data_ptr(),
            tables=self._tables.data_ptr(),
            table_offsets=self._offsets.data_ptr(),
            item_count=len(self._items),
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            block_tokens=store.block_tokens,
            window=config.sliding_window[layer] or 0,
            scale=config.attention_scale,
            softcap=config.attention_softcap or 0.0,
            is_bf16=int(q.dtype == torch.bfloat16),
        )
        taken = self._kernels.attend(args, self._threads)
        assert taken, "make_attention checked the shape"
        return out


KEY_TILE = 256  # keys of one partial attention; fixed, so that partial results do not depend on the length
ROWS_MIN = 16  # BLAS rounds differently for a few rows than for many


class TorchAttention:
    """Plain torch, for any device and dtype: the reference, and the fallback without the kernels.

    Per sequence, partial attentions over fixed tiles of keys, merged by log-sum-exp (the split-KV merge of
    Flash-Decoding). Float32 inside.
    """

    name = "torch"

    def __init__(self, config: ModelConfig, store: KVStore) -> None:
        self._config = config
        self._store = store

    def plan(self, items: Sequence[SequenceRows], threads: int) -> LayerAttention:
        return _TorchStep(self._config, self._store, items)


class _TorchStep:
    def __init__(self, config: ModelConfig, store: KVStore, items: Sequence[SequenceRows]) -> None:
        self._config, self._store, self._items = config, store, items
        device = store.k.device
        slots = torch.tensor(_slots(items, store.block_tokens), device=device)
        self._slot_blocks, self._slot_offsets = slots // store.block_tokens, slots % store.block_tokens
        self._tables = [torch.tensor(item.blocks, device=device) for item in items]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store = self._store
        store.k[layer][self._slot_blocks, :, :, self._slot_offsets] = k
        store.v[layer][self._slot_blocks, :, self._slot_offsets] = v
        out = torch.empty_like(q)
        for item, table in zip(self._items, self._tables, strict=True):
            rows = slice(item.first_row, item.first_row + item.count)
            out[rows] = self._attend_one(layer, q[rows], item, table).to(q.dtype)
        return out

    def _attend_one(self, layer: int, q: Tensor, item: SequenceRows, table: Tensor) -> Tensor:
        """q: [count, heads, head_dim] → the same shape, float32."""
        config, store = self._config, self._store
        kv_heads, group, dim = config.kv_heads, config.heads // config.kv_heads, config.head_dim
        count, end = item.count, item.first_pos + item.count
        window = config.sliding_window[layer]
        first_key = max(0, item.first_pos - window + 1) if window else 0
        # [kv_heads, group * rows, dim]: the query heads that share K and V become rows of one product.
        rows = max(count, ROWS_MIN)
        folded = torch.zeros(kv_heads, group, rows, dim, device=q.device)
        folded[:, :, :count] = (
            (q.float() * config.attention_scale).view(count, kv_heads, group, dim).permute(1, 2, 0, 3)
        )
        folded = folded.reshape(kv_heads, group * rows, dim)
        positions = torch.full((rows,), end - 1, device=q.device)
        positions[:count] = torch.arange(item.first_pos, end, device=q.device)
        positions = positions.repeat(group)

        best = torch.full((kv_heads, group * rows, 1), -torch.inf, device=q.device)
        total = torch.zeros_like(best)
        acc = torch.zeros_like(folded)
        for tile in range(first_key // KEY_TILE * KEY_TILE, end, KEY_TILE):
            keys = torch.arange(tile, tile + KEY_TILE, device=q.device)
            blocks = table[(keys // store.block_tokens).clamp(max=len(table) - 1)]
            offsets = keys % store.block_tokens
            k_tile = store.k[layer][blocks, :, :, offsets].float().permute(1, 2, 0)
            v_tile = store.v[layer][blocks, :, offsets].float().permute(1, 0, 2)
            # Pages beyond the end hold anything, even NaN.
            v_tile = v_tile.masked_fill((keys >= end).view(1, -1, 1), 0.0)
            scores = folded @ k_tile
            if config.attention_softcap:
                scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
            hidden = keys > positions[:, None]
            if window:
                hidden |= keys <= positions[:, None] - window
            scores = scores.masked_fill(hidden, -torch.inf)
            highest = torch.maximum(best, scores.amax(-1, keepdim=True))
            safe = highest.masked_fill(highest == -torch.inf, 0.0)  # a row may see nothing of this tile
            weights = torch.exp(scores - safe)
            keep = torch.exp(best - safe)
            total = total * keep + weights.sum(-1, keepdim=True)
            acc = acc * keep + weights @ v_tile
            best = highest
        result = (acc / total).view(kv_heads, group, rows, dim)[:, :, :count]
        return result.permute(2, 0, 1, 3).reshape(count, kv_heads * group, dim)
