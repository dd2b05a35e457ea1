"""The roofline's arithmetic by hand, and the promise that a leap changes no result."""

from __future__ import annotations

import dataclasses

import pytest
from cost_models import (
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    NO_OVERHEAD,
    QWEN3_30B_A3B,
    ideal,
    model_on,
)

from penstock.core.errors import ConfigError
from penstock.models.architecture import ModelConfig, MoeConfig, RopeConfig
from penstock.twin.costs.hardware import load_engine, load_hardware
from penstock.twin.costs.operators import Device, causal_pairs
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec, Parallel, Precision, experts_touched
from penstock.twin.costs.work import StepWork

# bytes a second and dense FP16 flops of the card's table
CARD_DEVICES = {
    "V100": (900e9, 112e12),
    "A100-40G": (1555e9, 312e12),
    "A100-80G": (2039e9, 312e12),
    "A6000": (768e9, 154.8e12),
    "L40": (864e9, 181e12),
    "H100-PCIe": (2048e9, 756.5e12),
    "H100-SXM": (3350e9, 989.5e12),
}


def decode(batch: int, context_each: int) -> StepWork:
    return StepWork((), batch, batch * context_each, batch)


def test_golden_q_projection_of_llama_2_7b() -> None:
    """Card llm-roofline, test 1: 33 554 432 flops over 33.57 MB, memory-bound, 43.7 us on an A6000."""
    fit = ideal(1.0, 1.0).gemm["bfloat16"]
    assert 2 * 4096 * 4096 == 33_554_432
    assert 4096 * 4096 * 2 + 2 * 4096 * 2 == pytest.approx(33.57e6, rel=1e-3)
    for name, (bandwidth, flops) in CARD_DEVICES.items():
        compute_s, memory_s = fit.sides(Device(flops, bandwidth, 1), 1, 4096, 4096, 4096 * 4096 * 2, 2)
        assert memory_s > compute_s, name
    a6000 = Device(154.8e12, 768e9, 1)
    assert fit.seconds(a6000, 1, 4096, 4096, 2, 2) == pytest.approx(43.7e-6, rel=2e-3)


def test_golden_kv_bytes() -> None:
    assert LLAMA_2_7B.kv_bytes_per_token() == 524_288
    assert LLAMA_3_70B.kv_bytes_per_token() == 327_680


def test_decode_of_one_sequence_reads_weights_and_kv_once() -> None:
    """On the textbook device one token costs its bytes over the bandwidth."""
    bandwidth = 1e12
    model = model_on(ideal(1e18, bandwidth))
    embedding_bytes = LLAMA_3_8B.vocab * LLAMA_3_8B.hidden * 2
    weights_bytes = LLAMA_3_8B.weight_bytes() - embedding_bytes
    short, long = model.seconds(decode(1, 1)), model.seconds(decode(1, 10_001))
    assert short == pytest.approx(weights_bytes / bandwidth, rel=5e-3)
    assert long - short == pytest.approx(10_000 * LLAMA_3_8B.kv_bytes_per_token() / bandwidth, rel=1e-9)


def test_prefill_costs_two_flops_a_weight_and_half_the_square() -> None:
    """Whole tiles of rows: linears 2 · weights · rows, attention 4 · pairs · width; head on one row."""
    flops, rows = 1e12, 1024
    model = model_on(ideal(flops, 1e30))
    pairs = rows * (rows + 1) / 2
    expected = 2 * LLAMA_3_8B.linear_weights() * rows + 4 * pairs * LLAMA_3_8B.q_width * LLAMA_3_8B.layers
    whole = model.seconds(StepWork([(rows, rows)], 0, 0, 0))
    assert whole == pytest.approx(expected / flops, rel=1e-9)
    head = model.seconds(StepWork([(rows, rows)], 0, 0, 1)) - whole
    # One row fills an eighth of a tile; the flop count of the step is of the row alone.
    assert head == pytest.approx(2 * 16 * LLAMA_3_8B.vocab * LLAMA_3_8B.hidden / flops, rel=1e-6)
    cost = model.step(StepWork([(rows, rows)], 0, 0, 1))
    assert cost.flops == pytest.approx(expected + 2 * LLAMA_3_8B.vocab * LLAMA_3_8B.hidden)
    assert cost.bound == "compute"


@pytest.mark.parametrize(
    "new, context, window", [(5, 5, None), (4, 20, None), (7, 9, 4), (3, 9, 4), (6, 30, 8)]
)
def test_causal_pairs_by_counting(new: int, context: int, window: int | None) -> None:
    expected = sum(min(position, window or position) for position in range(context - new + 1, context + 1))
    assert causal_pairs(new, context, window) == expected


def test_mixed_batch_reads_the_weights_once() -> None:
    model = model_on(ideal(1e18, 1e12))
    chunk, batch = StepWork([(64, 64)], 0, 0, 0), decode(8, 100)
    both = StepWork([(64, 64)], 8, 800, 8)
    layers_s = LLAMA_3_8B.linear_weights() * 2 / 1e12
    apart = model.seconds(chunk) + model.seconds(batch)
    assert model.seconds(both) == pytest.approx(apart - layers_s, rel=1e-3)


def test_ridge_batch_of_h100_is_near_300() -> None:
    """Card: decode linears turn compute-bound at (flops · w) / (2 · bandwidth) rows, H100 bf16 about 300."""
    model = model_on(ideal(989.5e12, 3.35e12))
    assert model.step(StepWork([(128, 128)], 0, 0, 0)).bound == "memory"
    assert model.step(StepWork([(384, 384)], 0, 0, 0)).bound == "compute"


def test_grouped_kv_is_cheaper_than_full_heads() -> None:
    full = dataclasses.replace(LLAMA_3_8B, kv_heads=32)
    device = ideal(1e18, 1e12)
    slope = [
        model_on(device, spec).seconds(decode(1, 1001)) - model_on(device, spec).seconds(decode(1, 1))
        for spec in (LLAMA_3_8B, full)
    ]
    assert slope[1] == pytest.approx(4 * slope[0], rel=1e-9)


def test_window_bounds_the_cost_of_context() -> None:
    spec = dataclasses.replace(LLAMA_3_8B, windows=((None, 16), (1024, 16)))
    full, half = model_on(ideal(1e18, 1e12)), model_on(ideal(1e18, 1e12), spec)
    assert half.seconds(decode(4, 1024)) == full.seconds(decode(4, 1024))
    grown = half.seconds(decode(4, 9024)) - half.seconds(decode(4, 1024))
    assert grown == pytest.approx((full.seconds(decode(4, 9024)) - full.seconds(decode(4, 1024))) / 2)
    chunk = StepWork([(512, 8192)], 0, 0, 0)
    assert half.seconds(chunk) < full.seconds(chunk)


def test_quantised_weights_speed_decode_and_not_prefill() -> None:
    device = ideal(989.5e12, 3.35e12)
    plain = model_on(device)
    packed = model_on(device, precision=Precision(weight_bits=4.5, head_bits=16))
    assert packed.seconds(decode(1, 100)) < 0.45 * plain.seconds(decode(1, 100))
    prefill = StepWork([(4096, 4096)], 0, 0, 1)
    assert packed.seconds(prefill) == pytest.approx(plain.seconds(prefill), rel=0.03)


def test_experts_touched() -> None:
    assert experts_touched(128, 8, 1) == pytest.approx(8.0)
    assert experts_touched(8, 2, 0) == 0.0
    assert 127.9 < experts_touched(128, 8, 4096) <= 128.0


def test_mixture_reads_only_what_it_touches() -> None:
    model = model_on(ideal(1e18, 1e12), QWEN3_30B_A3B)
    one, many = model.step(decode(1, 10)), model.step(decode(512, 10))
    active = 3.3e9 * 2
    assert one.bytes == pytest.approx(active, rel=0.15)
    assert many.bytes > 0.9 * QWEN3_30B_A3B.weight_bytes()


def test_tensor_parallel_divides_the_work_and_adds_collectives() -> None:
    hardware = load_hardware("h100-sxm")
    engine = load_engine("vllm-2025")
    one = model_on(hardware, LLAMA_3_70B, Parallel(), engine)
    eight = model_on(hardware, LLAMA_3_70B, Parallel(tensor=8), engine)
    work = decode(16, 1000)
    assert one.seconds(work) / 8 < eight.seconds(work) < one.seconds(work) / 2
    assert eight.step(work).flops == pytest.approx(one.step(work).flops, rel=1e-2)
    long = StepWork([(8192, 8192)], 0, 0, 1)
    links = eight._share(long).link_s  # two all-reduces of 8192 x 8192 values a layer
    each = hardware.all_reduce("engine", 8).seconds(8192 * 8192 * 2)
    assert links == pytest.approx(2 * 80 * each, rel=1e-3)


def test_pipeline_keeps_the_way_and_shortens_the_interval() -> None:
    hardware = load_hardware("h100-sxm")
    one = model_on(hardware, LLAMA_3_70B)
    four = model_on(hardware, LLAMA_3_70B, Parallel(pipeline=4))
    work = decode(8, 1000)
    assert one.seconds(work) < four.seconds(work) < 1.02 * one.seconds(work)
    assert four.interval_s(work) == pytest.approx(four.seconds(work) / 4)
    assert four.step(work).joules > one.step(work).joules


def test_expert_parallel_reads_fewer_whole_experts() -> None:
    hardware = load_hardware("h100-sxm")
    cut = model_on(hardware, QWEN3_30B_A3B, Parallel(tensor=4))
    spread = model_on(hardware, QWEN3_30B_A3B, Parallel(tensor=4, expert=4))
    work = decode(32, 100)
    assert spread.seconds(work) == pytest.approx(cut.seconds(work), rel=0.25)


@pytest.mark.parametrize(
    "parallel, field",
    [
        (Parallel(tensor=3), "parallel.tensor"),
        (Parallel(pipeline=7), "parallel.pipeline"),
        (Parallel(expert=2), "parallel.expert"),
        (Parallel(tensor=0), "parallel.tensor"),
        (Parallel(pipeline=1 << 40), "parallel.pipeline"),
    ],
)
def test_impossible_cuts_are_named(parallel: Parallel, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_on(load_hardware("h100-sxm"), LLAMA_3_8B, parallel)
    assert caught.value.param == field and caught.value.hint


def test_absurd_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight_bits"):
        Precision(weight_bits=0.0)


@pytest.mark.parametrize("name", ["h100-sxm", "a100-80g", "cpu-2core"])
@pytest.mark.parametrize("windows", [((None, 32),), ((None, 8), (777, 24))])
def test_a_leap_is_bit_for_bit_the_single_steps(
    name: str, windows: tuple[tuple[int | None, int], ...]
) -> None:
    spec = dataclasses.replace(LLAMA_3_8B, windows=windows)
    model = model_on(load_hardware(name), spec, engine=load_engine("vllm-2025"))
    for decodes, context, steps in ((1, 1, 500), (7, 3001, 97), (64, 50_000, 23), (5, 20, 0), (33, 999, 24)):
        leap = model.decode_seconds(decodes, context, steps)
        single = [
            model.seconds(StepWork((), decodes, context + index * decodes, decodes)) for index in range(steps)
        ]
        assert [float(value) for value in leap] == single


def test_the_memo_changes_nothing() -> None:
    hardware, engine = load_hardware("h100-sxm"), load_engine("vllm-2025")
    works = [decode(8, 100), StepWork([(100, 300)], 3, 900, 4), decode(1, 7), StepWork([(17, 17)], 0, 0, 1)]
    used = RooflineCostModel(LLAMA_3_8B, hardware, engine)
    first = [used.seconds(work) for work in works]
    fresh = [RooflineCostModel(LLAMA_3_8B, hardware, engine).seconds(work) for work in reversed(works)]
    assert [used.seconds(work) for work in works] == first == fresh[::-1]


def test_step_agrees_with_seconds() -> None:
    """The breakdown adds up to the hot path's answer, for every kind of step."""
    spec = dataclasses.replace(LLAMA_3_8B, windows=((None, 8), (777, 24)))
    model = model_on(load_hardware("h100-sxm"), spec, engine=load_engine("vllm-2025"))
    for work in (
        decode(8, 100),
        decode(64, 4000),
        StepWork([(512, 512)], 0, 0, 1),
        StepWork([(512, 3000), (9, 9)], 17, 20_000, 18),
        StepWork((), 0, 0, 0),
    ):
        assert model._share(work).seconds == pytest.approx(model.seconds(work), rel=1e-12)
        assert model.step(work).seconds == model.seconds(work)


def test_energy_lies_between_idle_and_limit() -> None:
    hardware = load_hardware("h100-sxm")
    model = model_on(hardware, engine=load_engine("vllm-2025"))
    busy = model.step(StepWork([(8192, 8192)], 0, 0, 1))
    lazy = model.step(decode(1, 100))
    for cost in (busy, lazy):
        assert hardware.power.idle_w < cost.joules / cost.seconds <= hardware.power.max_w
    assert busy.joules / busy.seconds > lazy.joules / lazy.seconds


def test_beyond_the_calibrated_range_is_flagged() -> None:
    model = model_on(load_hardware("h100-sxm"))
    assert model.step(decode(64, 4000)).in_range
    assert not model.step(decode(4096, 100)).in_range
    assert not model.step(StepWork([(9000, 9000)], 0, 0, 1)).in_range
    assert not model.step(StepWork([(100, 200_000)], 0, 0, 1)).in_range


def test_kv_tokens_that_fit() -> None:
    hardware = load_hardware("h100-sxm")
    assert model_on(hardware, LLAMA_3_70B).kv_tokens_max() == 0
    tokens = model_on(hardware, LLAMA_3_70B, Parallel(tensor=8)).kv_tokens_max()
    free_bytes = 80e9 * 0.9 - (1 << 30) - LLAMA_3_70B.weight_bytes() / 8
    assert tokens == int(free_bytes / (327_680 / 8))


def test_spec_of_a_model_config() -> None:
    config = ModelConfig(
        architecture="qwen3_moe",
        vocab=1000,
        hidden=64,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=128,
        context_len=256,
        norm_eps=1e-6,
        layer_rope=(RopeConfig(1e4),) * 4,
        sliding_window=(None, 32, 32, None),
        attention_scale=0.25,
        tied_embeddings=True,
        moe=MoeConfig(8, 2, 32, True, frozenset({1, 2, 3})),
    )
    spec = ModelSpec.of(config)
    assert dict(spec.windows) == {None: 2, 32: 2}
    assert (spec.moe_layers, spec.experts, spec.experts_per_token, spec.expert_ffn) == (3, 8, 2, 32)
    assert spec.kv_bytes_per_token() == config.kv_bytes_per_token(2)
    norms = (2 * spec.layers + 1) * spec.hidden
    assert spec.weight_bytes() / 2 == config.parameter_count() - norms
    assert model_on(ideal(1e12, 1e12), spec).seconds(decode(3, 50)) > 0


def test_engine_overheads_add_to_the_step() -> None:
    engine = dataclasses.replace(NO_OVERHEAD, step_s=1e-3, sequence_s=1e-4)
    hardware = load_hardware("h100-sxm")
    gap = model_on(hardware, engine=engine).seconds(decode(8, 10)) - model_on(hardware).seconds(decode(8, 10))
    assert gap == pytest.approx(1.8e-3)
