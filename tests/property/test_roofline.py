"""What must hold for any shape: the invariants of card llm-roofline, on shipped and on drawn hardware."""

from __future__ import annotations

import dataclasses

import pytest
from cost_models import LLAMA_3_8B, QWEN3_30B_A3B, model_on
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.twin.costs.hardware import load_engine, load_hardware
from penstock.twin.costs.operators import CollectiveFit, FitError
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec
from penstock.twin.costs.work import StepWork

NAMES = ["h100-sxm", "h200-sxm", "a100-80g", "l40s", "a10", "cpu-2core"]
TINY = dataclasses.replace(LLAMA_3_8B, layers=2, windows=((None, 2),))
SLACK = 1 + 1e-9

specs = st.sampled_from(
    [TINY, dataclasses.replace(QWEN3_30B_A3B, layers=2, moe_layers=2, windows=((None, 2),))]
)
names = st.sampled_from(NAMES)
tokens = st.integers(1, 4096)
batches = st.integers(1, 512)


def built(name: str, spec: ModelSpec) -> RooflineCostModel:
    return model_on(load_hardware(name), spec, engine=load_engine("vllm-2025"))


def decode(batch: int, context_each: int) -> StepWork:
    return StepWork((), batch, batch * context_each, batch)


@given(names, specs, batches, tokens, st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_time_grows_with_batch_and_context(
    name: str, spec: ModelSpec, batch: int, context: int, more: int
) -> None:
    model = built(name, spec)
    base = model.seconds(decode(batch, context))
    assert model.seconds(decode(batch + more, context)) * SLACK >= base
    assert model.seconds(decode(batch, context + more)) * SLACK >= base


@given(names, specs, tokens, st.integers(0, 8192), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_time_grows_with_chunk_and_prefix(
    name: str, spec: ModelSpec, new: int, before: int, more: int
) -> None:
    model = built(name, spec)
    base = model.seconds(StepWork([(new, before + new)], 0, 0, 1))
    assert model.seconds(StepWork([(new + more, before + new + more)], 0, 0, 1)) * SLACK >= base
    assert model.seconds(StepWork([(new, before + new + more)], 0, 0, 1)) * SLACK >= base
    assert model.seconds(StepWork([(new, before + new), (more, more)], 0, 0, 2)) * SLACK >= base
    assert model.seconds(StepWork([(new, before + new)], 1, more, 2)) * SLACK >= base


@given(names, specs, batches, tokens, tokens, st.floats(1.0, 8.0))
@settings(max_examples=60, deadline=None)
def test_faster_hardware_is_never_slower(
    name: str, spec: ModelSpec, batch: int, context: int, new: int, factor: float
) -> None:
    hardware = load_hardware(name)
    peaks = {dtype: flops * factor for dtype, flops in hardware.peak_flops.items()}
    more_flops = dataclasses.replace(hardware, peak_flops=peaks)
    more_bandwidth = dataclasses.replace(hardware, bandwidth=hardware.bandwidth * factor)
    work = StepWork([(new, new)], batch, batch * context, batch + 1)
    base = model_on(hardware, spec).seconds(work)
    for better in (more_flops, more_bandwidth):
        assert model_on(better, spec).seconds(work) <= base * SLACK


@given(
    names,
    specs,
    st.lists(st.tuples(tokens, st.integers(0, 4096)), min_size=1, max_size=6),
    st.integers(0, 64),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_costs_between_its_largest_member_and_their_sum(
    name: str, spec: ModelSpec, chunks: list[tuple[int, int]], decodes: int
) -> None:
    """Decodes are alike here: of a batch only the sum of contexts is known, not its longest member."""
    model = built(name, spec)
    prefills = [(new, before + new) for new, before in chunks]
    single = [model.seconds(StepWork([chunk], 0, 0, 0)) for chunk in prefills]
    single += [model.seconds(decode(1, 500))] * decodes
    batch = model.seconds(StepWork(prefills, decodes, decodes * 500, decodes))
    assert max(single) <= batch * SLACK
    assert batch <= sum(single) * SLACK


@given(names, specs, st.integers(2, 4096), st.data())
@settings(max_examples=80, deadline=None)
def test_cutting_a_prefill_never_saves_time(
    name: str, spec: ModelSpec, length: int, data: st.DataObject
) -> None:
    model = built(name, spec)
    cut = data.draw(st.integers(1, length - 1))
    whole = model.seconds(StepWork([(length, length)], 0, 0, 1))
    parts = model.seconds(StepWork([(cut, cut)], 0, 0, 0))
    parts += model.seconds(StepWork([(length - cut, length)], 0, 0, 1))
    assert whole <= parts * SLACK


@given(names, specs)
@settings(max_examples=12, deadline=None)
def test_linears_turn_compute_bound_once(name: str, spec: ModelSpec) -> None:
    """As the batch grows, every matrix product crosses its ridge once and never back."""
    hardware = load_hardware(name)
    fit, device = hardware.gemm_of("bfloat16"), hardware.device("bfloat16")
    above = []
    for batch in (2**power for power in range(14)):
        compute, memory = fit.sides(device, batch, spec.ffn, spec.hidden, spec.ffn * spec.hidden * 2, 2)
        above.append(compute > memory)
    assert above == sorted(above)


@given(names, specs, st.integers(1, 256), tokens, st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_a_leap_is_its_steps(name: str, spec: ModelSpec, decodes: int, context: int, steps: int) -> None:
    model = built(name, spec)
    leap = [float(value) for value in model.decode_seconds(decodes, decodes * context, steps)]
    assert len(leap) == steps
    for index in {0, steps // 2, steps - 1} & set(range(steps)):
        total = decodes * context + index * decodes
        assert leap[index] == model.seconds(StepWork((), decodes, total, decodes))


@given(
    names, specs, st.lists(st.tuples(tokens, st.integers(0, 4096)), max_size=4), st.integers(0, 300), tokens
)
@settings(max_examples=60, deadline=None)
def test_costs_are_consistent(
    name: str, spec: ModelSpec, chunks: list[tuple[int, int]], decodes: int, context: int
) -> None:
    model = built(name, spec)
    work = StepWork([(new, before + new) for new, before in chunks], decodes, decodes * context, decodes)
    cost = model.step(work)
    assert cost.seconds == model.seconds(work) > 0
    assert cost.flops >= 0 and cost.bytes >= 0 and cost.joules >= 0
    assert model._share(work).seconds == pytest.approx(cost.seconds, rel=1e-9)
    hardware = load_hardware(name)
    assert cost.seconds >= cost.flops / (1.5 * hardware.peak_flops["bfloat16"])


rates = st.floats(1e6, 1e12)
latencies = st.floats(1e-7, 1e-2)


@given(latencies, latencies, rates, rates, st.floats(1, 1e8), st.floats(0, 1e9), st.floats(0, 1e9))
def test_collectives_grow_and_pay_latency(
    first_s: float, second_s: float, slow: float, fast: float, switch: float, message: float, more: float
) -> None:
    link = CollectiveFit((0.0, switch), (first_s, second_s), (slow, fast), FitError(0, 0, 0))
    assert link.seconds(0.0) == 0.0
    assert link.seconds(message + more) >= link.seconds(message)
    if message:
        assert link.seconds(message) >= first_s
        assert link.seconds(message) >= message / max(slow, fast) / SLACK
