"""Fitted cost of one kernel on one device: few physical parameters, so that it extrapolates.

Every class holds what `benchmarks/fit_profiles.py` fitted, and turns a shape into seconds. All are pure.
Their forms, and the data behind them, are explained in docs/twin-costs.md. m are rows, n outputs, k inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from penstock.core.units import ceil_div

TILE: Final = 128
"""Rows and columns that one compute unit works on at a time, in matrix products. Fits are made with it."""
TILE_PARTS: Final = 8
"""Few rows run on narrower tiles: rows are rounded up to an eighth of a tile, 16."""


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative error on points that were not used for fitting, as fractions. `points` may be 0: assumed."""

    median: float
    p90: float
    points: int


@dataclass(frozen=True, slots=True)
class Device:
    """The few peaks that operators need. Rates per second; `units` are streaming multiprocessors or cores."""

    flops: float
    bandwidth: float
    units: int


@dataclass(frozen=True, slots=True)
class GemmFit:
    """A matrix product: launch + smooth maximum of arithmetic and memory traffic.

    Arithmetic is counted in whole tiles; `wave_waste` is the share of an unfilled last wave of tiles that is
    lost. `sharpness` is the order p of (c^p + m^p)^(1/p). `input_passes` are further trips of the inputs
    through memory, as when activations are quantised before the product.
    """

    launch_s: float
    compute_eff: float
    memory_eff: float
    sharpness: float
    wave_waste: float
    input_passes: float
    rows_max: int
    error: FitError

    def seconds(
        self, device: Device, m: int, n: int, k: int, weight_bytes: float, value_bytes: float
    ) -> float:
        """`weight_bytes` of one weight and `value_bytes` of one input or output."""
        return self.launch_s + self.work_s(device, m, n, k, n * k * weight_bytes, value_bytes)

    def work_s(
        self, device: Device, m: int, n: int, k: int, weights_bytes: float, value_bytes: float
    ) -> float:
        """Seconds without the launch, with `weights_bytes` read in all."""
        compute, memory = self.sides(device, m, n, k, weights_bytes, value_bytes)
        p = self.sharpness
        larger, smaller = (compute, memory) if compute > memory else (memory, compute)
        # Factored so that the powers stay near one; (c^p + m^p) of microseconds would lose digits.
        smooth = larger * (1.0 + (smaller / larger) ** p) ** (1.0 / p)
        return float(smooth + self.input_passes * m * k * value_bytes / device.bandwidth)

    def sides(
        self, device: Device, m: int, n: int, k: int, weights_bytes: float, value_bytes: float
    ) -> tuple[float, float]:
        """Seconds that arithmetic alone, and memory traffic alone, would take."""
        parts = ceil_div(m * TILE_PARTS, TILE) * ceil_div(n, TILE)
        parts_per_wave = TILE_PARTS * device.units
        waves = parts / parts_per_wave
        waves += self.wave_waste * (ceil_div(parts, parts_per_wave) - waves)
        compute = waves * device.units * (2 * TILE * TILE) * k / (self.compute_eff * device.flops)
        traffic_bytes = weights_bytes + m * (n + k) * value_bytes
        return compute, traffic_bytes / (self.memory_eff * device.bandwidth)


@dataclass(frozen=True, slots=True)
class DecodeAttentionFit:
    """Attention of one new token a sequence; one launch covers the whole batch.

    launch + sequences · (kv_heads · `kv_head_s` + heads · `head_s`) + KV bytes · `byte_s(sequences)`.
    Besides the memory's bandwidth, a stream of one KV head is limited to `stream_bytes_per_s`; a kernel
    cuts few sequences into parts, `splits` streams in all, so that a small batch is not stuck with one.
    """

    launch_s: float
    kv_head_s: float
    head_s: float
    memory_eff: float
    stream_bytes_per_s: float
    splits: float
    sequences_max: int
    context_max: int
    error: FitError

    def byte_s(self, bandwidth: float, sequences: int, kv_heads: int) -> float:
        """Seconds a byte of keys and values, for a batch of `sequences`."""
        memory = 1.0 / (self.memory_eff * bandwidth)
        streams = 1.0 / (self.stream_bytes_per_s * kv_heads * max(float(sequences), self.splits))
        return float((memory * memory + streams * streams) ** 0.5)

    def sequence_s(self, heads: int, kv_heads: int) -> float:
        return self.kv_head_s * kv_heads + self.head_s * heads

    def seconds(self, bandwidth: float, heads: int, kv_heads: int, sequences: int, kv_bytes: float) -> float:
        fixed = self.launch_s + sequences * self.sequence_s(heads, kv_heads)
        return fixed + kv_bytes * self.byte_s(bandwidth, sequences, kv_heads)


@dataclass(frozen=True, slots=True)
class PrefillAttentionFit:
    """Causal attention over chunks: linear in what it computes, so that chunks add up.

    launch + Σ [ 4 · pairs · heads · head_dim / (compute_eff · peak) + new · (heads · `head_row_s` +
    kv_heads · `kv_row_s`) + kv_heads · `kv_head_s` ]; pairs are (query, key) pairs under the causal mask.
    `dtype` is the type whose peak `compute_eff` refers to: attention stays in it when products are quantised.
    """

    dtype: str
    launch_s: float
    compute_eff: float
    head_row_s: float
    kv_row_s: float
    kv_head_s: float
    chunk_max: int
    error: FitError

    def pair_s(self, flops: float, heads: int, head_dim: int) -> float:
        return 4.0 * heads * head_dim / (self.compute_eff * flops)

    def row_s(self, heads: int, kv_heads: int) -> float:
        return self.head_row_s * heads + self.kv_row_s * kv_heads

    def seconds(self, flops: float, heads: int, kv_heads: int, head_dim: int, chunks: int, new: int) -> float:
        """`chunks` whole prompts of `new` tokens each, in one launch."""
        each = causal_pairs(new, new) * self.pair_s(flops, heads, head_dim)
        each += new * self.row_s(heads, kv_heads) + kv_heads * self.kv_head_s
        return self.launch_s + chunks * each


@dataclass(frozen=True, slots=True)
class PointwiseFit:
    """Norms, rotary embedding, activations, residuals: a launch and traffic."""

    launch_s: float
    memory_eff: float
    error: FitError

    def seconds(self, bandwidth: float, traffic_bytes: float) -> float:
        return self.launch_s + traffic_bytes / (self.memory_eff * bandwidth)


@dataclass(frozen=True, slots=True)
class CollectiveFit:
    """One collective over a fixed number of devices: latency + message / rate, by algorithm.

    Libraries switch algorithms at certain message sizes; `starts_bytes[i]` is where the i-th takes over, and
    the first is 0. A longer message never costs less: at a switch downwards the time stands still.
    """

    starts_bytes: tuple[float, ...]
    latency_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]
    error: FitError

    def seconds(self, message_bytes: float) -> float:
        if message_bytes <= 0:
            return 0.0
        ends = (*self.starts_bytes[1:], math.inf)
        longest = 0.0
        regimes = zip(self.starts_bytes, ends, self.latency_s, self.bytes_per_s, strict=True)
        for start, end, latency_s, rate in regimes:
            if start <= message_bytes:
                longest = max(longest, latency_s + min(message_bytes, end) / rate)
        return longest


def causal_pairs(new: int, context: int, window: int | None = None) -> float:
    """(query, key) pairs of `new` tokens that end a context of `context`. Exact integers, halved once.

    Token at position p (from 1) sees min(p, window) keys: itself, and what is before it.
    """
    first = context - new  # tokens before the chunk
    if window is None or context <= window:
        return new * context - new * (new - 1) / 2
    if first >= window:
        return float(new * window)
    growing = window - first  # queries that still see everything
    return growing * window - growing * (growing - 1) / 2 + (new - growing) * window
