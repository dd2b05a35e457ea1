"""The shipped profiles against the measurements they were fitted to: what a file states, it must do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from benchmarks import fit_profiles
from benchmarks.fit_profiles import Point
from benchmarks.fitting import Parameter, errors, fit
from benchmarks.gpu_facts import GPUS, Gpu
from workload_data import shared_file

from penstock.twin.costs.hardware import load_hardware

EACH_GPU = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)


def held_back(points: list[Point], cost: Callable[[Point], float]) -> tuple[float, float]:
    """Median and 90th percentile of the relative error on the half that was not fitted."""
    others = [point for point in points if not point.fitted]
    assert len(others) > 100
    found = errors([cost(point) for point in others], [point.seconds for point in others])
    return found.median, found.p90


@pytest.mark.shared_data
@EACH_GPU
def test_matrix_products_do_what_the_profile_states(gpu: Gpu) -> None:
    folder = shared_file("hardware")
    profile = load_hardware(gpu.name)
    points = fit_profiles.gemm_points(fit_profiles.rows_of(folder, "aic_gemm.csv"), gpu, "bfloat16")
    kernel, device = profile.gemm_of("bfloat16"), profile.device("bfloat16")

    def cost(point: Point) -> float:
        m, n, k = point.shape
        return kernel.seconds(device, m, n, k, 2, 2)

    stated = (kernel.error.median, kernel.error.p90)
    assert held_back(points, cost) == pytest.approx(stated, abs=1e-3)


@pytest.mark.shared_data
@EACH_GPU
def test_attention_does_what_the_profile_states(gpu: Gpu) -> None:
    folder = shared_file("hardware")
    profile = load_hardware(gpu.name)
    decode, prefill = profile.decode_attention, profile.prefill_attention

    def decode_cost(point: Point) -> float:
        heads, kv_heads, batch, context = point.shape
        kv_bytes = 4.0 * kv_heads * 128 * batch * context
        return decode.seconds(profile.bandwidth, heads, kv_heads, batch, kv_bytes)

    def prefill_cost(point: Point) -> float:
        heads, kv_heads, batch, length = point.shape
        return prefill.seconds(profile.flops("bfloat16"), heads, kv_heads, 128, batch, length)

    rows = fit_profiles.rows_of(folder, "aic_generation_attention.csv")
    stated = (decode.error.median, decode.error.p90)
    assert held_back(fit_profiles.decode_points(rows, gpu), decode_cost) == pytest.approx(stated, abs=1e-3)
    rows = fit_profiles.rows_of(folder, "aic_context_attention.csv")
    stated = (prefill.error.median, prefill.error.p90)
    assert held_back(fit_profiles.prefill_points(rows, gpu), prefill_cost) == pytest.approx(stated, abs=1e-3)


@pytest.mark.shared_data
@EACH_GPU
def test_matrix_products_are_unbiased_where_engines_spend_their_time(gpu: Gpu) -> None:
    """Signed: errors that all lean to one side would not cancel over a step's products."""
    profile = load_hardware(gpu.name)
    rows = fit_profiles.rows_of(shared_file("hardware"), "aic_gemm.csv")
    kernel, device = profile.gemm_of("bfloat16"), profile.device("bfloat16")
    for low, high in ((1, 64), (128, 512), (1024, 8192)):
        signed = [
            kernel.seconds(device, *point.shape, 2, 2) / point.seconds - 1
            for point in fit_profiles.gemm_points(rows, gpu, "bfloat16")
            if low <= point.shape[0] <= high and point.shape[1] * point.shape[2] >= 2e7
        ]
        assert abs(sorted(signed)[len(signed) // 2]) < 0.06, (low, high)


def test_the_fitter_finds_a_known_truth() -> None:
    sizes = [2.0**power for power in range(24)]
    measured = [3e-6 + size / 5e9 for size in sizes]
    measured[5] *= 3.0  # an outlier counts only linearly
    found = fit(
        [Parameter("launch_s", 1e-5, 1e-7, 1e-3), Parameter("rate", 1e9, 1e7, 1e12)],
        lambda values: [values["launch_s"] + size / values["rate"] for size in sizes],
        measured,
    )
    assert found["launch_s"] == pytest.approx(3e-6, rel=0.03)
    assert found["rate"] == pytest.approx(5e9, rel=0.03)
