"""Models and hardware small enough to check a cost by hand, and a cost that is plain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from penstock.twin.costs.hardware import EngineProfile, HardwareProfile, load_hardware
from penstock.twin.costs.operators import (
    DecodeAttentionFit,
    FitError,
    GemmFit,
    PointwiseFit,
    PrefillAttentionFit,
)
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec, Parallel, Precision
from penstock.twin.costs.work import StepCost, StepWork

EXACT = FitError(0.0, 0.0, 0)


def llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ModelSpec:
    return ModelSpec(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocab,
        windows=((None, layers),),
        tied_head=False,
    )


LLAMA_2_7B = llama(32, 4096, 32, 32, 11008, 32000)
LLAMA_3_8B = llama(32, 4096, 32, 8, 14336, 128256)
LLAMA_3_70B = llama(80, 8192, 64, 8, 28672, 128256)
QWEN3_30B_A3B = ModelSpec(
    layers=48,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    ffn=6144,
    vocab=151936,
    windows=((None, 48),),
    tied_head=False,
    moe_layers=48,
    experts=128,
    experts_per_token=8,
    expert_ffn=768,
)

NO_OVERHEAD = EngineProfile("none", "no overheads", 0.0, 0.0, 0.0, 0.0, 0.0, "engine", 0.0, {})


def ideal(flops: float, bandwidth: float) -> HardwareProfile:
    """A textbook device: both roofs are reached, launches are free, nothing is fitted."""
    return dataclasses.replace(
        load_hardware("h100-sxm"),
        name="ideal",
        bandwidth=bandwidth,
        units=1,
        peak_flops={"bfloat16": flops},
        gemm={"bfloat16": GemmFit(0.0, 1.0, 1.0, 100.0, 0.0, 0.0, 1 << 20, EXACT)},
        decode_attention=DecodeAttentionFit(0.0, 0.0, 0.0, 1.0, 1e30, 1.0, 1 << 20, 1 << 20, EXACT),
        prefill_attention=PrefillAttentionFit("bfloat16", 0.0, 1.0, 0.0, 0.0, 0.0, 1 << 20, EXACT),
        pointwise=PointwiseFit(0.0, 1.0, EXACT),
    )


def model_on(
    hardware: HardwareProfile,
    spec: ModelSpec = LLAMA_3_8B,
    parallel: Parallel | None = None,
    engine: EngineProfile = NO_OVERHEAD,
    precision: Precision | None = None,
) -> RooflineCostModel:
    if precision is not None:
        spec = dataclasses.replace(spec, precision=precision)
    return RooflineCostModel(spec, hardware, engine, parallel)


class PlainCost:
    """A constant, and so much for every prompt token, decode, and token of context."""

    relative_error = 0.0

    def seconds(self, work: StepWork) -> float:
        fixed = 0.004 + 0.0001 * work.decodes
        return (
            fixed
            + 1e-6 * work.decode_context
            + sum(5e-5 * new + 1e-8 * new * end for new, end in work.prefills)
        )

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Sequence[float]:
        works = (StepWork((), decodes, decode_context + i * decodes, decodes) for i in range(steps))
        return [self.seconds(work) for work in works]

    def step(self, work: StepWork) -> StepCost:
        return StepCost(self.seconds(work), "overhead", 0.0, 0.0, 0.0, True)
