"""A mixture of experts: a router sends each row to a few of many feed-forward networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.layers import FeedForward
from penstock.engine.linear import PackedLinear
from penstock.models.config import MoeConfig


class MixtureOfExperts:
    """Softmax over all experts in float32, the best k, and their outputs weighted by their probability.

    A row's k results are added in the order of its own ranking, best first, so that the sum does not depend
    on which experts other rows chose.
    """

    def __init__(self, router: PackedLinear, experts: Sequence[FeedForward], config: MoeConfig) -> None:
        assert len(experts) == config.experts
        self._router = router
        self._experts = experts
        self._experts_per_token = config.experts_per_token
        self._norm_topk_prob = config.norm_topk_prob

    @property
    def weight_bytes(self) -> int:
        return self._router.weight_bytes + sum(expert.weight_bytes for expert in self._experts)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] → [rows, hidden], a new tensor."""
        shares, chosen = self._route(x)
        slots = self._run_experts(x, chosen.flatten())
        slots = slots.view(*chosen.shape, x.shape[1]).mul_(shares.unsqueeze(2))
        total = slots[:, 0]
        for slot in range(1, self._experts_per_token):
            total = total + slots[:, slot]
        return total.to(x.dtype)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares, float32[rows, k], and experts, int64[rows, k], best first."""
        probabilities = torch.softmax(self._router(x).float(), dim=-1)
        shares, chosen = torch.topk(probabilities, self._experts_per_token, dim=-1)
        if self._norm_topk_prob:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return shares, chosen

    def _run_experts(self, x: Tensor, chosen: Tensor) -> Tensor:
        """float32[rows · k, hidden]: slot i holds expert `chosen[i]` on row i // k, not yet weighted."""
        by_expert = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=len(self._experts)).tolist()
        slots = torch.empty((chosen.shape[0], x.shape[1]), dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count == 0:
                continue
            mine = by_expert[start : start + count]
            slots[mine] = expert(x[mine // self._experts_per_token]).float()
            start += count
        return slots
