"""The decoder: token ids to hidden states to logits, for rows of many sequences at once.

The model knows nothing of sequences: a row is a token with a position, and `LayerAttention` joins it to its
past. Layers run in any range, so early exit, pipeline stages and layer-wise offload are callers of `run`.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.assemble import Assembler
from penstock.engine.checkpoint import Checkpoint
from penstock.engine.layers import DecoderLayer, LayerAttention, RmsNorm
from penstock.engine.linear import LinearBackend, PackedLinear, PlainLinear
from penstock.engine.rope import RopeTable
from penstock.models.config import ModelConfig

__all__ = ["DecoderModel", "LayerAttention"]


class DecoderModel:
    """Weights and arithmetic of one model. One caller at a time; it keeps no state but its rotary tables."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[DecoderLayer],
        ropes: list[RopeTable],
        rope_of_layer: list[int],
        final_norm: RmsNorm,
        head: PackedLinear,
    ) -> None:
        self.config = config
        self._embedding = embedding
        # As transformers: the scale is rounded to the model's dtype before it multiplies.
        self._embedding_scale = torch.tensor(config.embedding_scale).to(embedding)
        self._layers = layers
        self._ropes = ropes
        self._rope_of_layer = rope_of_layer
        self._final_norm = final_norm
        self._head = head
        self._is_reserved = False

    @classmethod
    @torch.inference_mode()
    def load(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, linear: LinearBackend
    ) -> Self:
        """Read, cast and pack every weight. Memory beyond the packed form: one fused matrix at a time."""
        parts = Assembler(checkpoint, dtype, device, linear)
        config = checkpoint.config
        embedding = parts.embedding()
        distinct = list(dict.fromkeys(config.layer_rope))
        return cls(
            config=config,
            embedding=embedding,
            layers=[parts.layer(layer) for layer in range(config.layers)],
            ropes=[parts.rope_table(rope) for rope in distinct],
            rope_of_layer=[distinct.index(rope) for rope in config.layer_rope],
            final_norm=parts.final_norm(),
            head=parts.head(embedding),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights as packed; a head that is the embedding matrix itself counts once."""
        layers = sum(layer.weight_bytes for layer in self._layers)
        total = self._embedding.nbytes + layers + self._final_norm.weight_bytes
        if isinstance(self._head, PlainLinear) and self._head.holds(self._embedding):
            return total
        return total + self._head.weight_bytes

    @torch.inference_mode()
    def reserve_positions(self, count: int) -> None:
        """Compute the rotary tables for positions below `count` now; the caller promises to stay below.

        Without it they grow as positions come, for which `run` must look at the largest one: on a GPU that
        waits for the device, so the executor calls this with the context length it serves.
        """
        self._grow_ropes(count)
        self._is_reserved = True

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """int64[rows] → [rows, hidden]. Every id is below the vocabulary's size."""
        hidden = F.embedding(token_ids, self._embedding)
        return hidden if self.config.embedding_scale == 1.0 else hidden.mul_(self._embedding_scale)

    @torch.inference_mode()
    def run(self, layers: range, hidden: Tensor, positions: Tensor, attention: LayerAttention) -> Tensor:
        """[rows, hidden] through the layers, in order. positions: int64[rows], below the context length.

        Returns a new tensor; `hidden` is left alone. At least one row.
        """
        if not self._is_reserved:
            self._grow_ropes(int(positions.max()) + 1)
        cos_sins = [rope.at(positions) for rope in self._ropes]
        for layer in layers:
            hidden = self._layers[layer](hidden, cos_sins[self._rope_of_layer[layer]], attention)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] behind the last layer → float32[rows, vocab]."""
        logits = self._head(self._final_norm(hidden)).float()
        cap = self.config.final_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _grow_ropes(self, positions: int) -> None:
        for rope in self._ropes:
            rope.reserve(positions)
