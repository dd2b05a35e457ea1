"""`describe` and shaping: the numbers published with the data, and streaming in chunks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from workload_data import shared_file

from penstock.core.errors import ConfigError, TraceError
from penstock.workloads import describe as describe_module
from penstock.workloads.describe import describe
from penstock.workloads.shape import Shape, ShapeCounts, Window, parse_window, shaped
from penstock.workloads.sketch import LengthCounts, Moments, QuantileSketch
from penstock.workloads.source import open_trace
from penstock.workloads.trace import TraceRow


def test_bundled_burstgpt_one() -> None:
    found = describe(open_trace("sample:burstgpt1"))
    assert (found.rows, found.failed) == (400, 17)
    assert found.prompt and found.output
    assert (found.prompt.p50, round(found.prompt.p95), round(found.prompt.mean)) == (353, 1639, 544)
    assert (found.output.p50, round(found.output.mean)) == (238, 289)
    assert found.interarrival_mean_s == pytest.approx(93.4, abs=0.1)
    assert found.interarrival_cv == pytest.approx(4.56, abs=0.01)
    assert found.sessions is None and found.prefix is None
    assert [group.name for group in found.models] == ["ChatGPT", "GPT-4"]


def test_bundled_burstgpt_three_sessions() -> None:
    found = describe(open_trace("sample:burstgpt3")).sessions
    assert found and (found.sessions, found.think_gaps, found.overlaps) == (135, 259, 0)
    assert found.turns_mean == pytest.approx(2.92, abs=0.01)
    assert found.think_s_p50 == pytest.approx(116, rel=0.01)
    assert found.think_s_p95 == pytest.approx(2761, rel=0.01)
    assert not found.think_is_gap


@pytest.mark.shared_data
def test_azure_2023() -> None:
    conv = describe(open_trace(shared_file("azure_llm/AzureLLMInferenceTrace_conv_2023.csv.gz")))
    code = describe(open_trace(shared_file("azure_llm/AzureLLMInferenceTrace_code_2023.csv.gz")))
    assert (conv.rows, code.rows) == (19_366, 8_819)
    assert conv.prompt and conv.output and code.prompt and code.output
    assert (round(conv.prompt.mean), round(conv.output.mean)) == (1155, 211)
    assert (conv.prompt.p50, conv.output.p50, code.prompt.p50, code.output.p50) == (1020, 129, 1469, 13)
    assert conv.interarrival_cv == pytest.approx(1.09, abs=0.01)
    assert code.interarrival_cv == pytest.approx(13.2, abs=0.1)
    assert conv.rate_rps == pytest.approx(5.53, abs=0.01)


@pytest.mark.shared_data
@pytest.mark.parametrize(("service", "days"), [("code", 7), ("conv", 7)])
def test_azure_2024_published_rows(tmp_path: Path, service: str, days: int) -> None:
    """First and last rows of each service; one file for both goes back in time, and is refused."""
    whole = shared_file("azure_llm/azure_2024_published_rows.csv")
    with pytest.raises(TraceError, match="the time goes back"):
        describe(open_trace(whole))
    header, *lines = whole.read_text().splitlines()
    part = tmp_path / "part.csv"
    part.write_text("\n".join([header, *(line for line in lines if line.startswith(service))]))
    found = describe(open_trace(part))
    assert (found.rows, found.failed) == (10, 0)
    assert found.span_s == pytest.approx(days * 86_400, abs=1)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "blocks", "distinct", "hit"),
    [("conversation_trace", 288_500, 182_790, 0.366), ("arxiv_trace_first1000", 19_686, 12_207, 0.380)],
)
def test_mooncake_prefix_reuse(name: str, blocks: int, distinct: int, hit: float) -> None:
    found = describe(open_trace(shared_file(f"mooncake/{name}.jsonl.gz"))).prefix
    assert found and (found.blocks, found.blocks_distinct) == (blocks, distinct)
    assert found.hit_blocks_frac == pytest.approx(hit, abs=0.0005)
    assert not found.is_lower_bound


def test_chunking_does_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe(open_trace("sample:burstgpt3")).to_json()
    monkeypatch.setattr(describe_module, "CHUNK_ROWS", 7)
    parts = describe(open_trace("sample:burstgpt3")).to_json()
    assert parts.pop("length_correlation") == pytest.approx(whole.pop("length_correlation"))
    assert parts.pop("interarrival_cv") == pytest.approx(whole.pop("interarrival_cv"))
    assert parts.pop("interarrival_mean_s") == pytest.approx(whole.pop("interarrival_mean_s"))
    assert parts == whole


def test_fano_counts_empty_windows_and_leaves_the_partial_one_out() -> None:
    rows = [TraceRow(at, 1, 1) for at in (0.0, 0.1, 0.2, 3.5, 4.9)]  # counts 3, 0, 0, 1, (1)
    fano = describe(rows).fano
    assert fano["1"] == pytest.approx(np.var([3, 0, 0, 1]) / np.mean([3, 0, 0, 1]))
    assert fano["10"] is None


def test_a_single_row_has_no_rates() -> None:
    found = describe([TraceRow(0.0, 5, 6)])
    assert (found.rate_rps, found.interarrival_cv, found.length_correlation) == (None, None, None)
    assert found.prompt and found.prompt.p99 == 5


def test_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe_module, "GROUPS_MAX", 3)
    found = describe(TraceRow(0.0, 1, 1, tenant=f"t{i}") for i in range(10)).tenants
    assert [(group.name, group.requests) for group in found] == [
        ("(other)", 7),
        ("t0", 1),
        ("t1", 1),
        ("t2", 1),
    ]


def test_prefix_reuse_counts_leading_blocks_only() -> None:
    prompts = [(6, (1, 2, 3)), (5, (1, 2, 4)), (3, (1, 5)), (5, (9, 2, 3)), (6, (1, 2, 3))]
    rows = [TraceRow(0.0, length, 1, block_hashes=ids, block_tokens=2) for length, ids in prompts]
    found = describe(rows).prefix
    assert found and (found.blocks, found.blocks_distinct) == (14, 6)
    assert found.hit_blocks_frac == pytest.approx((0 + 2 + 1 + 0 + 3) / 14)
    assert found.hit_tokens_frac == pytest.approx((0 + 4 + 2 + 0 + 6) / 25)


def test_prefix_memory_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe_module, "BLOCKS_TRACKED_MAX", 2)
    rows = [TraceRow(0.0, 2, 1, block_hashes=(i, i + 1), block_tokens=1) for i in range(0, 8, 2)]
    found = describe(rows).prefix
    assert found and found.is_lower_bound and found.blocks_distinct == 2


def test_sketches_agree_with_numpy() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 9000, 5000)
    counts, moments, sketch = LengthCounts(), Moments(), QuantileSketch()
    values = rng.lognormal(3, 2, 5000)
    for part in range(0, 5000, 999):
        counts.add(lengths[part : part + 999])
        moments.add(values[part : part + 999])
        sketch.add(values[part : part + 999])
    percents = (0, 5, 50, 90, 99, 100)
    assert counts.percentiles(percents) == pytest.approx(list(np.percentile(lengths, percents)))
    assert moments.cv == pytest.approx(values.std() / values.mean())
    for fraction in (0.01, 0.5, 0.95, 0.999):
        exact = float(np.quantile(values, fraction, method="lower"))
        assert sketch.quantile(fraction) == pytest.approx(exact, rel=0.006)


def test_window_and_limit_cut_before_scaling() -> None:
    rows = [TraceRow(float(at), 10, 10, elapsed_s=4.0) for at in range(0, 100, 10)]
    counts = ShapeCounts()
    shape = Shape(Window(20, 70), limit=3, rate_scale=2, time_scale=5)
    found = list(shaped(rows, shape, counts))
    assert [row.arrival_s for row in found] == [0, 1, 2]
    assert [row.elapsed_s for row in found] == [0.8, 0.8, 0.8], "think times follow the time scale only"
    assert counts.rows == 3


def test_scaling_leaves_burstiness_and_lengths_alone() -> None:
    source = list(open_trace("sample:burstgpt1"))
    before, after = describe(source), describe(shaped(source, Shape(rate_scale=10), ShapeCounts()))
    assert after.rate_rps == pytest.approx(10 * (before.rate_rps or math.nan))
    assert after.interarrival_cv == pytest.approx(before.interarrival_cv)
    assert after.prompt == before.prompt


def test_divisor_keeps_blocks_and_never_reaches_zero() -> None:
    row = TraceRow(0.0, 1025, 3, block_hashes=(1, 2, 3), block_tokens=512)
    (found,) = shaped([row], Shape(length_divisor=16), ShapeCounts())
    assert (found.prompt_tokens, found.output_tokens, found.block_tokens) == (65, 1, 32)
    assert found.block_hashes == (1, 2, 3)
    (odd,) = shaped([row], Shape(length_divisor=700), ShapeCounts())
    assert (odd.prompt_tokens, odd.block_tokens) == (3, 1)


def test_clamps_are_counted_and_cut_the_blocks() -> None:
    row = TraceRow(0.0, 40, 50, block_hashes=(1, 2, 3), block_tokens=16)
    counts = ShapeCounts()
    (found,) = shaped([row], Shape(prompt_tokens_max=17, output_tokens_max=5), counts)
    assert (found.prompt_tokens, found.output_tokens, found.block_hashes) == (17, 5, (1, 2))
    assert (counts.prompts_clamped, counts.outputs_clamped) == (1, 1)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        (":", Window()),
        ("600:1200", Window(600, 1200)),
        ("1h:90m", Window(3600, 5400)),
        ("2d:", Window(172_800)),
    ],
)
def test_windows(text: str, window: Window) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize("text", ["", "5", "a:b", "9:3", "-1:4", "nan:1", "1:1", "1h30m:"])
def test_bad_windows(text: str) -> None:
    with pytest.raises(ConfigError, match="START:END"):
        parse_window(text)


def test_bad_shapes_and_empty_windows() -> None:
    for wrong in ({"rate_scale": 0.0}, {"time_scale": math.nan}, {"length_divisor": 0.5}, {"limit": 0}):
        with pytest.raises(ConfigError):
            Shape(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="no rows from 99 s"):
        list(shaped([TraceRow(0.0, 1, 1)], Shape(Window(99)), ShapeCounts()))
