"""A `LayerAttention` that is obviously right: dense, one sequence, keys and values kept whole.

It shares no code with the engine's back ends, so that the model can be compared with transformers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.models.config import ModelConfig


class ReferenceAttention:
    """Keys and values of one sequence, appended as chunks come, in the order of its positions."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._keys: list[list[Tensor]] = [[] for _ in range(config.layers)]
        self._values: list[list[Tensor]] = [[] for _ in range(config.layers)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._keys[layer].append(k.clone())
        self._values[layer].append(v.clone())
        group = self._config.heads // self._config.kv_heads
        keys = torch.cat(self._keys[layer]).repeat_interleave(group, dim=1)
        values = torch.cat(self._values[layer]).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self._config.attention_scale
        if self._config.attention_softcap is not None:
            scores = self._config.attention_softcap * torch.tanh(scores / self._config.attention_softcap)
        scores = scores.masked_fill(~self._visible(layer, q.shape[0], keys.shape[0]), float("-inf"))
        shares = scores.float().softmax(dim=-1).to(q.dtype)
        return torch.einsum("hqk,khd->qhd", shares, values)

    def _visible(self, layer: int, rows: int, length: int) -> Tensor:
        """bool[rows, length]: the rows are the last positions of the sequence."""
        queries = torch.arange(length - rows, length)[:, None]
        keys = torch.arange(length)[None, :]
        window = self._config.sliding_window[layer]
        causal = keys <= queries
        return causal if window is None else causal & (keys > queries - window)
