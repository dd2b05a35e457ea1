"""The analytic cost model: operators of a model, on a hardware profile, under an engine's overheads.

Card llm-roofline (Yuan et al. 2024, arXiv 2402.16363) with what its released tool leaves out: causal
halving, grouped KV, the head on sampled rows only, mixed batches, collectives, overheads. A step is

    layers(rows) + head(samples) + step_s + sequence_s · sequences          by rows and samples: memoised
    + launch + sequences · per_sequence + Σ contexts · per_token(sequences)  decode attention: linear
    + Σ chunks (pairs · pair_s + new · row_s + before · context_s + chunk_s) prefill attention: linear

so a step costs two look-ups and a few multiplications a chunk. With pipeline stages, `seconds` is the way of
one batch through all of them; `interval_s` is when the next batch may follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from penstock.twin.costs.hardware import EngineProfile, HardwareProfile
from penstock.twin.costs.layers import RowCosts, Share
from penstock.twin.costs.model import VECTOR_STEPS_MIN, Seconds
from penstock.twin.costs.operators import causal_pairs
from penstock.twin.costs.shares import CPU, FEW_UNITS, GPU, ShareCurves, Sides
from penstock.twin.costs.spec import ModelSpec, Parallel
from penstock.twin.costs.work import Bound, StepCost, StepWork

MEMO_ROWS_MAX: Final = 1 << 17
"""Larger batches are computed afresh each time; the memo stays below some tens of megabytes."""


@dataclass(frozen=True, slots=True)
class DecodeTerms:
    """Decode attention of all layers: fixed + Σ slope · min(Σ contexts, limit) over kinds of layers."""

    fixed_s: float
    kinds: tuple[tuple[float, float], ...]


class RooflineCostModel:
    """A `CostModel` from first principles. Deterministic; its memo only saves time."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: HardwareProfile,
        engine: EngineProfile,
        parallel: Parallel | None = None,
    ) -> None:
        """Raises ConfigError where the hardware lacks an operator, or the model cannot be cut so."""
        self._spec = spec
        self._hardware = hardware
        self._engine = engine
        self._parallel = parallel or Parallel()
        self._rows = RowCosts(spec, hardware, engine, self._parallel)
        self._row_memo: dict[int, float] = {}
        self._head_memo: dict[int, float] = {0: 0.0}
        self._decode_memo: dict[int, DecodeTerms] = {}
        self._sides_memo: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._windowed = any(window is not None for window, _ in spec.windows)
        self._set_attention_terms()

    @property
    def made_of(self) -> tuple[ModelSpec, HardwareProfile, EngineProfile, Parallel]:
        """What it was made of."""
        return self._spec, self._hardware, self._engine, self._parallel

    @property
    def relative_error(self) -> float:
        """Medians of the worst operator and of the engine's overheads, as independent errors."""
        hardware = self._hardware
        fits = (self._gemm_fit, hardware.decode_attention, hardware.prefill_attention)
        return math.hypot(max(fit.error.median for fit in fits), self._engine.error_frac)

    def seconds(self, work: StepWork) -> float:
        decodes, prefills = work.decodes, work.prefills
        if not prefills:
            return self._decode_step_s(decodes, work.decode_context, work.samples)
        rows = decodes
        total = self._launch_mixed_s if decodes else self._launch_prefill_s
        for new, context in prefills:
            rows += new
            if self._windowed:
                total += self._windowed_pairs(new, context) * self._pair_s
            else:
                total += (new * context - 0.5 * new * (new - 1)) * self._pair_s
            total += new * self._row_s + (context - new) * self._context_s + self._chunk_s
        if decodes:
            total += self._decode_work_s(decodes, work.decode_context)
        return total + self._fixed_s(rows, work.samples, decodes + len(prefills))

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        assert steps >= 0
        if steps < VECTOR_STEPS_MIN or not decodes:
            contexts = (decode_context + index * decodes for index in range(steps))
            return [self._decode_step_s(decodes, context, decodes) for context in contexts]
        context = np.arange(steps, dtype=np.float64) * decodes + decode_context
        terms = self._decode_terms(decodes)
        # The order of additions is that of `_decode_work_s`, so that every bit agrees.
        total = np.full(steps, terms.fixed_s)
        for slope_s, limit in terms.kinds:
            total += slope_s * np.minimum(context, limit)
        total += self._launch_decode_s + self._fixed_s(decodes, decodes, decodes)
        return total

    def step(self, work: StepWork) -> StepCost:
        seconds = self.seconds(work)
        share = self._share(work)
        peak, bandwidth = self._hardware.flops(self._spec.precision.compute), self._hardware.bandwidth
        # Stages of a pipeline take turns: on average a device is busy for its stage's share only.
        capacity = seconds * self._parallel.pipeline
        watts = self._hardware.power.watts(
            share.flops / (capacity * peak), share.bytes / (capacity * bandwidth)
        )
        return StepCost(
            seconds=seconds,
            bound=_largest(share),
            joules=watts * seconds * self._parallel.devices,
            flops=share.flops * self._parallel.tensor,
            bytes=share.bytes * self._parallel.tensor,
            in_range=self._in_range(work),
        )

    @property
    def share_curves(self) -> ShareCurves:
        return CPU if self._hardware.units < FEW_UNITS else GPU

    def sides(self, work: StepWork) -> Sides:
        """Layers, head, and both kinds of attention; exact as far as a layer's products are alike."""
        engine, decodes = self._engine, work.decodes
        layers, head = self._row_sides(work.rows, 0), self._row_sides(0, work.samples)
        pairs_s = traffic_s = launch_s = 0.0
        for new, context in work.prefills:
            pairs_s += self._windowed_pairs(new, context) * self._pair_s
            traffic_s += new * self._row_s + (context - new) * self._context_s + self._chunk_s
            launch_s = self._launch_prefill_s
        if decodes:
            traffic_s += self._decode_work_s(decodes, work.decode_context)
            launch_s = max(launch_s, self._launch_decode_s)
        host_s = engine.step_s + engine.sequence_s * (decodes + len(work.prefills))
        classes = (layers[:2], head[:2], (pairs_s, 0.0), (0.0, traffic_s))
        return Sides(classes, layers[2] + head[2] + launch_s + host_s)

    def _row_sides(self, rows: int, samples: int) -> tuple[float, float, float]:
        """Arithmetic, traffic and the rest of the layers on `rows`, and of the head on `samples`."""
        found = self._sides_memo.get((rows, samples))
        if found is None:
            total = self._rows.layers(rows) if rows else Share()
            if samples:
                total.add(self._rows.head(samples))
            found = (total.arithmetic_s, total.traffic_s, total.overhead_s + total.link_s)
            if max(rows, samples) <= MEMO_ROWS_MAX:
                self._sides_memo[rows, samples] = found
        return found

    def interval_s(self, work: StepWork) -> float:
        """Seconds until the next batch may enter the first stage: the pipeline's stages are even."""
        host_s = self._engine.step_s + self._engine.sequence_s * (work.decodes + len(work.prefills))
        return (self.seconds(work) - host_s) / self._parallel.pipeline + host_s

    def kv_tokens_max(self, memory_frac: float = 0.9, workspace_bytes: float = float(1 << 30)) -> int:
        """Tokens of KV that fit beside the weights, over all devices of the replica; 0 where none do."""
        spec, parallel = self._spec, self._parallel
        free = self._hardware.memory_bytes * memory_frac - workspace_bytes
        free -= spec.weight_bytes() / parallel.devices
        kv_heads = parallel.kv_heads(spec)
        token_bytes = spec.kv_bytes_per_token() * kv_heads / spec.kv_heads / parallel.pipeline
        return max(0, int(free / token_bytes))

    def _set_attention_terms(self) -> None:
        spec, prefill = self._spec, self._hardware.prefill_attention
        decode, kernel_s = self._hardware.decode_attention, self._engine.kernel_s
        self._gemm_fit = self._hardware.gemm_of(spec.precision.compute)
        self._heads = spec.heads // self._parallel.tensor
        self._kv_heads = self._parallel.kv_heads(spec)
        flops = self._hardware.flops(prefill.dtype)
        # Of one layer, kept for windows; then of all.
        self._layer_pair_s = prefill.pair_s(flops, self._heads, spec.head_dim)
        self._pair_s = self._layer_pair_s * spec.layers
        self._row_s = prefill.row_s(self._heads, self._kv_heads) * spec.layers
        self._chunk_s = prefill.kv_head_s * self._kv_heads * spec.layers
        self._token_bytes = 2 * self._kv_heads * spec.head_dim * spec.precision.kv_bits / 8
        self._context_s = self._token_bytes * spec.layers / (decode.memory_eff * self._hardware.bandwidth)
        self._launch_prefill_s = spec.layers * (prefill.launch_s + kernel_s)
        self._launch_decode_s = spec.layers * (decode.launch_s + kernel_s)
        self._launch_mixed_s = max(self._launch_prefill_s, self._launch_decode_s)

    def _decode_step_s(self, decodes: int, context: int, samples: int) -> float:
        if not decodes:
            return self._fixed_s(0, samples, 0)
        attention_s = self._decode_work_s(decodes, context)
        return attention_s + (self._launch_decode_s + self._fixed_s(decodes, samples, decodes))

    def _decode_work_s(self, decodes: int, context: int) -> float:
        terms = self._decode_terms(decodes)
        total = terms.fixed_s
        for slope_s, limit in terms.kinds:
            total += slope_s * (context if context < limit else limit)
        return total

    def _decode_terms(self, decodes: int) -> DecodeTerms:
        terms = self._decode_memo.get(decodes)
        if terms is None:
            terms = self._new_decode_terms(decodes)
            if decodes <= MEMO_ROWS_MAX:
                self._decode_memo[decodes] = terms
        return terms

    def _new_decode_terms(self, decodes: int) -> DecodeTerms:
        """A window is applied to the mean context: only the sum is known, and batches are mostly even."""
        fit = self._hardware.decode_attention
        token_s = self._token_bytes * fit.byte_s(self._hardware.bandwidth, decodes, self._kv_heads)
        kinds = tuple(
            (token_s * layers, math.inf if window is None else float(decodes * window))
            for window, layers in self._spec.windows
        )
        fixed_s = decodes * fit.sequence_s(self._heads, self._kv_heads) * self._spec.layers
        return DecodeTerms(fixed_s, kinds)

    def _fixed_s(self, rows: int, samples: int, sequences: int) -> float:
        """Everything that does not depend on contexts: layers, head and host."""
        memo = self._row_memo
        layers_s = memo.get(rows)
        if layers_s is None:
            layers_s = self._rows.layers(rows).seconds if rows else 0.0
            if rows <= MEMO_ROWS_MAX:
                memo[rows] = layers_s
        heads = self._head_memo
        head_s = heads.get(samples)
        if head_s is None:
            head_s = self._rows.head(samples).seconds
            if samples <= MEMO_ROWS_MAX:
                heads[samples] = head_s
        engine = self._engine
        return layers_s + head_s + engine.step_s + engine.sequence_s * sequences

    def _windowed_pairs(self, new: int, context: int) -> float:
        """Pairs of a chunk, averaged over the layers' windows."""
        kinds = self._spec.windows
        pairs = sum(causal_pairs(new, context, window) * layers for window, layers in kinds)
        return pairs / self._spec.layers

    def _share(self, work: StepWork) -> Share:
        """The step's seconds by what they are spent on, and its work, on one device of each stage."""
        spec, rows = self._spec, work.rows
        total = self._rows.layers(rows) if rows else Share()
        if work.samples:
            total.add(self._rows.head(work.samples))
        total.overhead_s += self._engine.step_s
        total.overhead_s += self._engine.sequence_s * (work.decodes + len(work.prefills))
        for new, context in work.prefills:
            pairs = self._windowed_pairs(new, context)
            total.compute_s += pairs * self._pair_s
            total.memory_s += new * self._row_s + (context - new) * self._context_s + self._chunk_s
            total.flops += 4.0 * pairs * self._heads * spec.head_dim * spec.layers
            total.bytes += self._token_bytes * context * spec.layers
        if work.decodes:
            self._add_decodes(total, work)
        launch_s = self._launch_prefill_s if work.prefills else 0.0
        total.overhead_s += max(launch_s, self._launch_decode_s if work.decodes else 0.0)
        return total

    def _add_decodes(self, total: Share, work: StepWork) -> None:
        seen = sum(
            layers
            * (work.decode_context if window is None else min(work.decode_context, work.decodes * window))
            for window, layers in self._spec.windows
        )
        total.memory_s += self._decode_work_s(work.decodes, work.decode_context)
        total.flops += 4.0 * seen * self._heads * self._spec.head_dim
        total.bytes += self._token_bytes * seen

    def _in_range(self, work: StepWork) -> bool:
        decode, prefill = self._hardware.decode_attention, self._hardware.prefill_attention
        return (
            work.rows <= self._gemm_fit.rows_max
            and work.samples <= self._gemm_fit.rows_max
            and work.decodes <= decode.sequences_max
            and work.decode_context <= decode.context_max * max(1, work.decodes)
            and all(context <= prefill.chunk_max for _, context in work.prefills)
        )


def _largest(share: Share) -> Bound:
    parts: tuple[tuple[float, Bound], ...] = (
        (share.compute_s, "compute"),
        (share.memory_s, "memory"),
        (share.overhead_s, "overhead"),
        (share.link_s, "link"),
    )
    return max(parts, key=lambda part: part[0])[1]
