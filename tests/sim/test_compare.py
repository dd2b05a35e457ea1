"""Stacks side by side: the sweep to saturation, pairs, fairness, what is infeasible, and the page."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cost_models import PlainCost
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_twin import LIMITS
from typer.testing import CliRunner

from penstock.cli.compare import parse_rates
from penstock.cli.main import app
from penstock.core.errors import ConfigError, RequestError, SloInfeasible, TraceError
from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings
from penstock.models.catalogue import resolve_config
from penstock.replica.limits import check_feasible
from penstock.twin.build import Machine, machine_of
from penstock.twin.compare import run as sweeping
from penstock.twin.compare.document import Comparison, notes_of
from penstock.twin.compare.fairness import (
    TenantService,
    delivered_tokens,
    dues_tokens,
    fairness,
    jain,
)
from penstock.twin.compare.page import render
from penstock.twin.compare.pairs import groups_of, length_label
from penstock.twin.compare.run import Bench, Contender, focus_rate, run_once, sweep
from penstock.twin.compare.stacks import STACKS_MAX, parse_stacks
from penstock.twin.compare.table import print_comparison
from penstock.twin.costs.hardware import load_engine
from penstock.twin.costs.spec import Parallel
from penstock.twin.feasible import infeasible_targets, look_at, refuse_where_hopeless
from penstock.workloads.trace import TraceRow

MACHINE = Machine(PlainCost(), "plain", None)
HOSTILE = '</script><img src=x onerror=alert(1)>[bold]&"'
SLOS = {"default": Slo(ttft_ms=200, tpot_ms=50), HOSTILE: Slo(ttft_ms=200, tpot_ms=50)}


def rows_at(rate: float) -> list[TraceRow]:
    """Sixty requests of two tenants, two a second at rate 1."""
    return [
        TraceRow(
            0.5 * index / rate,
            10 + index % 50,
            5 + index % 30,
            tenant="big" if index % 4 else "small",
            slo_class="default" if index % 3 else HOSTILE,
        )
        for index in range(60)
    ]


def contender(name: str, **policies: str) -> Contender:
    return Contender(name, Settings(policies=PolicySettings(**policies)), LIMITS, MACHINE)


BENCH = Bench(rows=rows_at, slos=SLOS)
STACKS = [contender("first"), contender(HOSTILE, compose="prefill-first")]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    runs = sweep(BENCH, STACKS, None)
    return Comparison(HOSTILE, STACKS, runs, SLOS, {"machine": HOSTILE}, [HOSTILE, *notes_of(STACKS, runs)])


# ---- the sweep --------------------------------------------------------------------------------------------


def test_the_search_finds_saturation(comparison: Comparison) -> None:
    rates = comparison.rates
    assert 1.0 in rates and len(rates) <= sweeping.RATES_MAX
    for name in comparison.compared:
        attained = [run.goodput.attained_frac for run in comparison.of_stack(name)]
        assert attained[0] > 0.9 and attained[-1] < sweeping.COLLAPSED_FRAC
        assert len(attained) == len(rates)
    low, high = comparison.of_stack("first")[0], comparison.of_stack("first")[-1]
    assert low.latency_ms["ttft"] is not None and high.latency_ms["ttft"] is not None
    assert high.latency_ms["ttft"].p99 > 10 * low.latency_ms["ttft"].p99
    assert comparison.focus in rates and focus_rate(comparison.runs) < rates[-1]


def test_a_trace_that_is_too_fast_is_slowed_down() -> None:
    runs = sweep(replace(BENCH, rows=lambda rate: rows_at(64 * rate)), STACKS[:1], None)
    assert min(run.rate for run in runs) < 1 and runs[0].goodput.attained_frac > sweeping.COLLAPSED_FRAC


def test_a_search_without_end_is_bounded() -> None:
    """No SLO, and nothing is ever lost: nothing collapses."""
    runs = sweep(replace(BENCH, slos={}), STACKS[:1], None)
    assert len(runs) <= sweeping.RATES_MAX and max(run.rate for run in runs) <= sweeping.RATE_HIGH


def test_given_rates_are_run_and_the_sweep_repeats() -> None:
    again = [sweep(BENCH, STACKS, [0.5, 4.0]) for _ in range(2)]
    assert [(run.rate, run.stack) for run in again[0]] == [
        (0.5, "first"), (0.5, HOSTILE), (4.0, "first"), (4.0, HOSTILE),
    ]  # fmt: skip
    assert again[0] == again[1]


def test_warm_up_is_left_out() -> None:
    run, outcomes = run_once(replace(BENCH, warmup_s=10.0), STACKS[0], 1.0)
    assert run.requests == len(outcomes) == sum(row.arrival_s >= 10.0 for row in rows_at(1.0))
    assert all(outcome.arrival_s >= 10.0 for outcome in outcomes.values())


# ---- pairs and fairness -----------------------------------------------------------------------------------


def outcome(number: int, e2e_s: float, tenant: str = "a", is_answered: bool = True) -> RequestOutcome:
    return RequestOutcome(
        f"r{number}", 0.0, FinishReason.LENGTH if is_answered else FinishReason.REFUSED, e2e_s, 100, 11,
        first_token_s=e2e_s / 2 if is_answered else None, last_token_s=e2e_s if is_answered else None,
        tenant=tenant,
    )  # fmt: skip


def test_who_gained_and_who_lost() -> None:
    before = {f"r{i}": outcome(i, 1.0, "ab"[i % 2], is_answered=i != 4) for i in range(6)}
    times = (0.5, 2.0, 1.01, 1.0, 1.0, 1.0)
    after = {f"r{i}": outcome(i, times[i], "ab"[i % 2], is_answered=i != 5) for i in range(6)}
    groups = {group.name: group for group in groups_of(before, after, {"default": Slo(e2e_ms=1500)})}
    everybody = groups["all requests"]
    assert (everybody.requests, everybody.gained, everybody.lost) == (6, 2, 2)
    assert (everybody.slo_gained, everybody.slo_lost) == (1, 2)
    assert (groups["a"].gained, groups["a"].lost) == (2, 0)
    assert (groups["b"].gained, groups["b"].lost) == (0, 2)
    assert everybody.e2e_ratio_p50 == pytest.approx(1.005)


def test_length_labels_cover_every_length() -> None:
    assert [length_label(n) for n in (0, 256, 257, 16384, 16385)] == [
        "≤ 256", "≤ 256", "257 to 1024", "4097 to 16384", "> 16384",
    ]  # fmt: skip


@given(st.lists(st.floats(0.0, 1e9), min_size=1, max_size=20))
def test_jain_lies_between_one_nth_and_one(values: list[float]) -> None:
    index = jain(values)
    if index is None:
        assert not any(value * value for value in values)
    else:
        assert 1 / len(values) - 1e-9 <= index <= 1 + 1e-9


def test_service_counts_until_the_last_arrival() -> None:
    late = replace(outcome(0, 2.0), tenant="late")
    assert delivered_tokens(late, 3.0) == 111
    assert delivered_tokens(late, 1.5) == 100 + 1 + 5
    assert delivered_tokens(late, 0.5) == 0
    done = replace(outcome(1, 0.2), arrival_s=1.5, first_token_s=1.5, last_token_s=1.5)
    found = fairness([late, done], [11, 11])
    assert found.tenants == 2 and found.tokens_jain == pytest.approx(
        (106 + 111) ** 2 / (2 * (106**2 + 111**2))
    )
    assert found.tokens_max_over_min == pytest.approx(111 / 106)
    assert fairness([done], [11]).tokens_jain is None
    weights = {done.tenant: 3.0}
    by_weight = fairness([late, done], [11, 11], lambda tenant: weights.get(tenant, 1.0))
    tokens = {service.tenant: service.service_tokens for service in by_weight.largest}
    assert by_weight.tokens_jain == jain([tokens[done.tenant] / 3.0, tokens[late.tenant]])
    assert found.due_frac_min == pytest.approx(106 / (217 / 2))
    assert by_weight.due_frac_min == 1.0, "one has all it asked for, and the other the rest"


def test_what_is_due_is_a_max_min_share_by_weight() -> None:
    services = [
        TenantService("small", asked_tokens=10, service_tokens=5.0),
        TenantService("large", asked_tokens=500, service_tokens=145.0),
        TenantService("gold", asked_tokens=500, service_tokens=60.0, weight=2.0),
    ]
    assert dues_tokens(services) == [10.0, pytest.approx(200 / 3), pytest.approx(400 / 3)]


# ---- stacks and rates as they are written -----------------------------------------------------------------


def test_stacks_are_presets_and_slots() -> None:
    first, second, third = parse_stacks("sarathi, vllm-v0+compose=sarathi+retain=lru ,rank=fcfs")
    assert (first.preset, first.policies) == ("sarathi", {})
    assert (second.preset, second.policies) == ("vllm-v0", {"compose": "sarathi", "retain": "lru"})
    assert (third.preset, third.flags()["policies.rank"]) == (None, "fcfs")


@pytest.mark.parametrize(
    "text", ["", "a,a", "sarathi+", "sarathi+rank", "+rank=fcfs", "rnk=fcfs", "rank=a+rank=b", "rank="]
)
def test_bad_stacks(text: str) -> None:
    with pytest.raises(ConfigError, match="--stacks"):
        parse_stacks(text)


def test_too_many_stacks() -> None:
    with pytest.raises(ConfigError, match="7 stacks"):
        parse_stacks(",".join(f"s{i}" for i in range(STACKS_MAX + 1)))


def test_rates_as_written() -> None:
    assert parse_rates("2, 0.5,2") == [0.5, 2.0] and parse_rates(None) is None
    for text in ("", "x", "0", "-1", "nan", "inf", ",".join(map(str, range(1, 40)))):
        with pytest.raises(ConfigError, match="--rates"):
            parse_rates(text)


# ---- what no waiting can mend -----------------------------------------------------------------------------


def test_an_slo_that_one_request_alone_misses() -> None:
    _, easiest = look_at(rows_at(1.0), LIMITS)
    tight = dict.fromkeys(easiest, Slo(ttft_ms=1.0, tpot_ms=50))
    found = infeasible_targets(easiest, tight, Settings(), LIMITS, MACHINE)
    assert {each.target for each in found} == {"ttft"} and all(each.best_ms > 1.0 for each in found)
    with pytest.raises(SloInfeasible, match="alone on the machine"):
        refuse_where_hopeless(found, easiest)
    refuse_where_hopeless(found[:1], easiest)  # another class still has a chance
    assert not infeasible_targets(easiest, SLOS, Settings(), LIMITS, MACHINE)


def test_an_engines_own_overhead_is_part_of_every_first_token() -> None:
    """`request_s` of its profile, as `machine_of` reads it; a profile of this machine has our own path."""
    config = resolve_config("smollm2-135m-instruct")
    found = {}
    for engine in ("vllm-2025", "vllm-2024"):
        machine = machine_of("h100-sxm", engine, config, Parallel())
        slow = replace(MACHINE, path=machine.path)
        _, outcomes = run_once(Bench(rows=rows_at, slos=SLOS), replace(contender("a"), machine=slow), 0.01)
        found[engine] = min(outcome.ttft_s or 9.9 for outcome in outcomes.values())
    difference_s = load_engine("vllm-2024").request_s - load_engine("vllm-2025").request_s
    assert difference_s > 0.005
    assert found["vllm-2024"] - found["vllm-2025"] == pytest.approx(difference_s)


def test_requests_that_never_fit_are_counted() -> None:
    facts, easiest = look_at([TraceRow(0.0, 200, 5), TraceRow(1.0, 20, 5)], LIMITS)
    assert (facts.rows, facts.never_fit) == (2, 1) and "context" in facts.never_fit_reason
    assert easiest["default"].shortest_prompt.prompt_tokens == 20
    with pytest.raises(TraceError, match="none of the trace's 1 requests"):
        look_at([TraceRow(0.0, 200, 5)], LIMITS)
    with pytest.raises(TraceError, match="nothing to send"):
        look_at([TraceRow(0.0, 0, 0, failed=True)], LIMITS)


# ---- what comes out ---------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 60), st.integers(1, 16))
def test_the_quick_look_agrees_with_the_door(
    prompt: int, output: int, blocks: int, block_tokens: int
) -> None:
    limits = replace(LIMITS, kv_blocks=blocks, kv_block_tokens=block_tokens)
    anchor = TraceRow(0.0, 1, 1)
    facts, _ = look_at([anchor, TraceRow(1.0, prompt, output)], limits)
    try:
        check_feasible(Request("r", prompt, output, 0.0), limits)
    except RequestError as error:
        assert facts.never_fit == 1 and facts.never_fit_reason == error.message
    else:
        assert facts.never_fit == 0


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.found.append(tag)


def test_the_page_holds_every_picture_and_no_foreign_markup(comparison: Comparison) -> None:
    page = render(comparison)
    tags = Tags()
    tags.feed(page)
    assert "img" not in tags.found and tags.found.count("svg") == 16
    assert 'class="none"' not in page, "every picture has data"
    assert "Who gains, who loses" in page


def test_the_json_is_plain_and_complete(comparison: Comparison) -> None:
    found = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert (found["schema"], found["version"]) == ("penstock-compare", 1)
    assert len(found["runs"]) == len(comparison.rates) * 2
    last = found["runs"][-1]
    assert last["against_first"][0]["requests"] == 60 and not found["runs"][0]["against_first"]
    assert last["fairness"]["tenants"] == 2 and len(last["server"]["t_s"]) == len(last["server"]["running"])


def test_the_table_prints_foreign_names_as_they_are(comparison: Comparison) -> None:
    written = io.StringIO()
    print_comparison(comparison, Console(file=written, width=300))
    assert HOSTILE in written.getvalue()


# ---- the commands -----------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    from tiny_model import write_tiny_llama

    write_tiny_llama(tmp_path / "tiny", vocab_size=256, max_position_embeddings=4096)
    return tmp_path / "tiny"


def test_compare_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    load = ("sample:burstgpt1", "--limit", "40", "--time-scale", "500")
    done = CliRunner().invoke(
        app,
        ["compare", *load, "--model", str(model_folder), "--stacks", "sarathi,vllm-v0", "--rates", "1,8",
         "--length-divisor", "8", "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["rate"] for run in stored["runs"]] == [1.0, 1.0, 8.0, 8.0]
    assert (tmp_path / "out" / "compare.html").read_text().startswith("<!DOCTYPE html>")


def test_errors_of_the_command_line(model_folder: Path) -> None:
    load = ["compare", "sample:burstgpt1", "--limit", "20", "--model", str(model_folder)]
    for extra, kind in (
        (["--stacks", "sarati"], ConfigError),
        (["--stacks", "sarathi+rank=fcf"], ConfigError),
        (["--stacks", "sarathi", "--slo-ttft-ms", "0.001"], SloInfeasible),
        (["--stacks", "sarathi", "--window", "900d:"], TraceError),
    ):
        done = CliRunner().invoke(app, [*load, *extra])
        assert isinstance(done.exception, kind), (extra, done.output, done.exception)


def test_simulate_says_what_is_infeasible_first(model_folder: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["simulate", "sample:burstgpt1", "--limit", "20", "--model", str(model_folder),
         "--slo-ttft-ms", "0.001", "--closed-loop", "--concurrency-max", "2", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert "alone on the machine" in report["notes"][0] and report["goodput"]["attained"] == 0
    assert report["configuration"]["loop"] == "closed" and len(report["server"]["t_s"]) > 2
