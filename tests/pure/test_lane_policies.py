"""Shares of the device for two lanes: the algorithms, on hand-made batches and observations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.config import resolve
from penstock.core.errors import ConfigError
from penstock.core.metrics import Slo
from penstock.core.phase_profile import PhaseProfile
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.lanes import FLOOR, LANES, Batch, Lane, Shares
from penstock.policies.lanes.latency_fits import QueueFit, fit_queue, fit_speed, r_squared
from penstock.policies.lanes.nexus import ASSUMED, EVALUATIONS_MAX, Nexus
from penstock.policies.lanes.phase_model import PhaseModel
from penstock.policies.lanes.semi_pd import SemiPd, SemiPdOptions, adjusted
from penstock.policies.rank import RANK
from penstock.policies.stack import check_servable, load_preset, make_stack
from penstock.policies.view import ReplicaView, SequenceView, StepFacts

PROMPT = Batch(((1024, 3000),))
DECODES = Batch((), 32, 32 * 1500)


def view(used_frac: float = 0.0, waiting: tuple[SequenceView, ...] = ()) -> ReplicaView:
    blocks = 1000
    free = round(blocks * (1 - used_frac))
    return cast(ReplicaView, SimpleNamespace(blocks_available=free, block_count=blocks, waiting=waiting))


def sequence(index: int, arrival_s: float = 0.0, **fields: Any) -> SequenceView:
    request = Request(f"r{index}", 10, 100, arrival_s)
    known = {"request": request, "arrival_index": index, "first_token_s": None, "output_len": 0}
    return cast(SequenceView, SimpleNamespace(**{**known, **fields}))


# ---- which stacks there are -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replica.device", "cuda"),
        ("replica.host_kv_memory", "auto"),
        ("record.steps", "steps.jsonl"),
        ("twin.profile", "cpu.toml"),
    ],
)
def test_what_does_not_go_with_lanes_is_refused_before_a_model_is_loaded(name: str, value: str) -> None:
    def resolved(lanes: str) -> Settings:
        flags = {"policies.lanes": lanes, name: value}
        return resolve(file_text="", file_name="", environ={}, flags=flags, load_preset=load_preset).settings

    check_servable(resolved("none"))
    with pytest.raises(ConfigError, match="does not go with `lanes = nexus`") as caught:
        check_servable(resolved("nexus"))
    assert caught.value.param == name and name in str(caught.value.hint)


def test_a_typo_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="not a policy of slot `lanes`") as caught:
        make_stack(PolicySettings(lanes="semipd"))
    assert "semi-pd" in str(caught.value.hint)


def test_static_shares_have_bounds() -> None:
    made = LANES.make("static", options={"prefill_frac": 0.7, "decode_frac": 1.0})
    assert made.shares(Lane.PREFILL, PROMPT, None, view(), 0.0) == Shares(0.7, 1.0)
    with pytest.raises(ConfigError, match="prefill_frac"):
        LANES.make("static", options={"prefill_frac": 0.0})


# ---- semi-PD: the fits ------------------------------------------------------------------------------------


@given(st.floats(0.01, 2.0), st.floats(0.0, 0.5), st.integers(2, 40))
def test_the_queue_fit_finds_what_made_the_points(slope: float, base_s: float, needed_step: int) -> None:
    """The search runs over sixtieths of the smallest share; there it is exact."""
    shares = [0.6, 0.65, 0.7, 0.8, 0.95]
    needed = 0.6 * needed_step / 60
    made = QueueFit(slope, base_s, needed)
    points = [(share, made.seconds(share)) for share in shares]
    found = fit_queue(points, 0.0, 0.0)
    assert r_squared(points, found) > 0.999
    assert found.needed == pytest.approx(needed, abs=0.01)
    assert [found.seconds(share) for share in shares] == pytest.approx([s for _, s in points], rel=1e-3)


def test_a_share_below_the_load_never_catches_up() -> None:
    assert QueueFit(1.0, 0.0, 0.4).seconds(0.4) == float("inf")


def test_with_one_share_the_queue_is_theory() -> None:
    found = fit_queue([(0.5, 0.7)], needed=0.3, service_s=0.1)
    assert (found.slope, found.needed) == (0.1, 0.3)
    assert found.seconds(0.5) == pytest.approx(0.7)
    assert found.seconds(0.8) < 0.7


def test_the_speed_fit_is_the_line_through_two_points() -> None:
    found = fit_speed([(0.5, 0.03), (0.25, 0.05)])
    assert (found.slope, found.base_s) == (pytest.approx(0.01), pytest.approx(0.01))
    assert fit_speed([(0.5, 0.03)]).seconds(0.25) == pytest.approx(0.06)


# ---- semi-PD: Algorithm 1 ---------------------------------------------------------------------------------

OPTIONS = SemiPdOptions(step_frac=0.1, steps_max=3)


def move(x: float, y: float, ttft: bool, tpot: bool, holds_at: float = 9.0) -> Shares:
    return adjusted(Shares(x, y), ttft, tpot, lambda s: s >= holds_at, lambda s: s >= holds_at, OPTIONS)


@pytest.mark.parametrize("misses", [True, False])
def test_where_both_miss_or_both_hold_nothing_moves(misses: bool) -> None:
    assert move(0.5, 0.4, misses, misses) == Shares(0.5, 0.4)


def test_a_missed_ttft_raises_the_prefill_share_until_the_model_is_content() -> None:
    assert move(0.5, 0.5, True, False, holds_at=0.54) == Shares(0.6, 0.5)
    assert move(0.5, 0.5, True, False) == Shares(0.8, 0.5), "at most so many steps"


def test_at_the_whole_device_the_other_share_shrinks() -> None:
    assert move(0.9, 0.5, True, False) == Shares(1.0, 0.3)
    assert move(0.5, 1.0, False, True) == Shares(0.2, 1.0)


@given(st.floats(FLOOR, 1.0), st.floats(FLOOR, 1.0), st.booleans(), st.booleans(), st.floats(0.0, 2.0))
def test_shares_stay_in_bounds_and_move_by_steps(
    x: float, y: float, ttft: bool, tpot: bool, holds_at: float
) -> None:
    found = move(x, y, ttft, tpot, holds_at)
    assert FLOOR <= min(found.prefill, found.decode) and max(found.prefill, found.decode) <= 1.0
    most = OPTIONS.step_frac * OPTIONS.steps_max + 1e-5
    assert abs(found.prefill - x) + abs(found.decode - y) <= most


# ---- semi-PD: windows -------------------------------------------------------------------------------------


def semi_pd(**options: Any) -> SemiPd:
    chosen = {"window_steps": 10, "ttft_ms": 100.0, "tpot_ms": 20.0, "prefill_frac": 0.5, "decode_frac": 0.5}
    return cast(SemiPd, LANES.make("semi-pd", options=chosen | options))


def ask(policy: SemiPd, now_s: float, waiting: tuple[SequenceView, ...] = ()) -> Shares:
    return policy.shares(Lane.DECODE, None, DECODES, view(waiting=waiting), now_s)


def observe(policy: SemiPd, at_s: float, ttft_s: float, steps: int = 10) -> None:
    """One prompt took this long, and a window's steps went by."""
    one = sequence(0, at_s - ttft_s, first_token_s=at_s)
    policy.submitted(one, at_s - ttft_s)
    policy.decoding(one, at_s)
    policy.stepped(StepFacts(((10, 10),), 0, 0, 1, 0.02), at_s)
    policy.stepped(StepFacts((), 4, 100, steps - 1, 0.1), at_s)


def test_nothing_is_decided_within_a_window() -> None:
    policy = semi_pd(switch_s=0.0)
    observe(policy, 1.0, 0.5, steps=9)
    assert ask(policy, 1.0) == Shares(0.5, 0.5)
    assert policy.steps_valid(view(), 1.0) == 1, "the next step ends the window"
    policy.stepped(StepFacts((), 4, 100, 1, 0.01), 1.1)
    assert ask(policy, 1.1).prefill > 0.5
    assert policy.steps_valid(view(), 1.1) == 10


def test_nothing_is_decided_while_a_switch_is_under_way() -> None:
    policy = semi_pd(switch_s=5.0, steps_max=1)
    observe(policy, 1.0, 0.5)
    first = ask(policy, 1.0)
    observe(policy, 2.0, 0.5)
    assert ask(policy, 2.0) == first, "these requests saw the old shares"
    observe(policy, 7.0, 0.5)
    assert ask(policy, 7.0) == first, "and this window both"
    observe(policy, 8.0, 0.5)
    assert ask(policy, 8.0).prefill > first.prefill


def test_who_has_waited_for_longer_than_the_target_counts() -> None:
    policy = semi_pd(switch_s=0.0)
    policy.stepped(StepFacts((), 4, 100, 10, 0.1), 1.0)
    assert ask(policy, 1.0, waiting=(sequence(1, 0.95),)) == Shares(0.5, 0.5)
    policy.stepped(StepFacts((), 4, 100, 10, 0.1), 2.0)
    assert ask(policy, 2.0, waiting=(sequence(1, 0.95),)).prefill > 0.5


def test_tpot_is_a_requests_own_mean_within_the_window() -> None:
    policy = semi_pd(switch_s=0.0)
    fields = {"output_len": 1, "first_token_s": 0.0}
    slow = cast(Any, sequence(2, 0.0, **fields))
    policy.decoding(slow, 0.0)
    slow.output_len = 21
    policy.stepped(StepFacts((), 1, 100, 10, 1.0), 1.0)
    assert ask(policy, 1.0).decode > 0.5, "20 tokens in a second, and 20 ms were the target"


@pytest.mark.parametrize("origin_s", [1e3, 1e5])
def test_an_engines_clock_may_begin_anywhere(origin_s: float) -> None:
    """The first window counts its rate from the first request, not from instant 0."""
    found = []
    for zero_s in (0.0, origin_s):
        policy = semi_pd(switch_s=0.0, ttft_ms=90.0, steps_max=20, window_steps=80)
        for index in range(40):
            observe(policy, zero_s + 0.2 + 0.025 * index, 0.11, steps=2)
        found.append([ask(policy, zero_s + 1.2)])
    for ours, shifted in zip(*found, strict=True):
        assert (ours.prefill, ours.decode) == pytest.approx((shifted.prefill, shifted.decode))
    assert found[0][0] != Shares(0.5, 0.5), "something was decided"


def test_targets_come_from_the_tightest_slo() -> None:
    slos = {"chat": Slo(ttft_ms=300.0), "batch": Slo(ttft_ms=5000.0, tpot_ms=250.0)}
    policy = cast(Any, LANES.make("semi-pd", Context(ServiceTerms(slos=slos))))
    assert (policy._ttft_s, policy._tpot_s) == (0.3, 0.25)
    assert cast(Any, LANES.make("semi-pd"))._ttft_s == 1.0


# ---- nexus ------------------------------------------------------------------------------------------------


def nexus(profile: PhaseProfile | None = None, **options: Any) -> Nexus:
    context = Context(ServiceTerms(phase_profile=profile))
    return cast(Nexus, LANES.make("nexus", context, options))


def split(policy: Nexus, prompt: Batch = PROMPT, decodes: Batch = DECODES, used_frac: float = 0.0) -> Shares:
    return policy.shares(Lane.PREFILL, prompt, decodes, view(used_frac), 0.0)


def test_the_phase_model_by_hand() -> None:
    flat = replace(
        ASSUMED, step_s=0.001, sequence_s=0.0, row_s=1e-5, weights_s=0.005, pair_s=0.0, context_s=1e-7,
        compute_knee=1.0, memory_knee=0.5, memory_slope=0.0,
    )  # fmt: skip
    model = PhaseModel(flat)
    assert model.seconds(Batch(((1000, 1000),)), 1.0) == pytest.approx(0.001 + 0.01)
    assert model.seconds(Batch(((1000, 1000),)), 0.5) == pytest.approx(0.001 + 0.02)
    decode = Batch((), 10, 20_000)
    assert model.seconds(decode, 1.0) == pytest.approx(0.001 + 0.005 + 0.002)
    assert model.seconds(decode, 0.5) == model.seconds(decode, 1.0), "half of the units draw all bandwidth"
    # The prompt on the other half takes 21 ms and draws bandwidth for 5 of them.
    stretched = 0.001 + 0.007 * (1 + 5 / 21)
    assert model.seconds(decode, 0.5, Batch(((1000, 1000),))) == pytest.approx(stretched)


def test_a_decode_step_does_not_halve_when_its_share_doubles() -> None:
    """The tell of a linear model."""
    model = PhaseModel(ASSUMED)
    assert model.seconds(DECODES, 0.4) / model.seconds(DECODES, 0.8) < 1.3
    assert model.seconds(PROMPT, 0.4) / model.seconds(PROMPT, 0.8) > 1.6


batches = st.builds(
    lambda new, before, count, context: (Batch(((new, new + before),)), Batch((), count, count * context)),
    st.integers(16, 4096), st.integers(0, 8000), st.integers(1, 200), st.integers(16, 8000),
)  # fmt: skip


@given(st.lists(batches, min_size=1, max_size=6), st.floats(0.0, 1.0), st.floats(0.05, 3.0))
def test_shares_sum_to_one_within_floors_by_few_questions(
    load: list[tuple[Batch, Batch]], used_frac: float, slack: float
) -> None:
    policy, again = (nexus(decode_slack_frac=slack, prefill_slack_frac=slack) for _ in range(2))
    for prompt, decodes in load:
        found = split(policy, prompt, decodes, used_frac)
        assert found == split(again, prompt, decodes, used_frac), "the same questions, the same answer"
        assert found.prefill + found.decode == pytest.approx(1.0)
        assert FLOOR - 1e-9 <= found.prefill <= 1.0 - FLOOR + 1e-9
        assert policy.evaluations <= EVALUATIONS_MAX


@given(batches, st.floats(0.1, 3.0))
def test_asked_again_and_again_it_ends_where_brute_force_does(
    pair: tuple[Batch, Batch], slack: float
) -> None:
    """The largest prefill share, by tenths, that leaves decode within its slack; else the smallest."""
    prompt, decodes = pair
    policy, model = nexus(decode_slack_frac=slack, dead_band_frac=0.0), PhaseModel(ASSUMED)
    for _ in range(4):
        found = split(policy, prompt, decodes).prefill
    limit_s = (1 + slack) * model.seconds(decodes, 1.0)
    tenths = [round(FLOOR + 0.1 * i, 6) for i in range(9)]
    fits = [s for s in tenths if model.seconds(decodes, 1.0 - s, prompt) <= limit_s]
    # Contention may make small shares worse than larger ones: the search stops at the first edge it meets.
    if fits == tenths[: len(fits)]:
        assert found == pytest.approx(fits[-1] if fits else FLOOR)


def test_a_change_within_the_dead_band_is_not_made() -> None:
    wanted = split(nexus(dead_band_frac=0.0)).prefill
    assert wanted != 0.5
    assert split(nexus(dead_band_frac=abs(wanted - 0.5) - 0.01)).prefill == wanted
    assert split(nexus(dead_band_frac=abs(wanted - 0.5) + 0.01)).prefill == 0.5


def test_full_memory_turns_the_objective_round() -> None:
    roomy, full = split(nexus(), used_frac=0.2), split(nexus(), used_frac=0.9)
    assert roomy.prefill > full.prefill


def test_a_lane_alone_gets_everything() -> None:
    policy = nexus()
    assert policy.shares(Lane.PREFILL, PROMPT, None, view(), 0.0).prefill == 1.0
    assert policy.shares(Lane.DECODE, None, DECODES, view(), 0.0).decode == 1.0


def test_between_prefill_steps_the_split_stands() -> None:
    policy = nexus()
    found = split(policy)
    heavier = Batch((), 200, 200 * 8000)
    assert policy.shares(Lane.DECODE, PROMPT, heavier, view(0.95), 1.0) == found


def test_without_saturation_it_believes_decode_to_be_hurt_more() -> None:
    assert split(nexus(saturation=False)).prefill < split(nexus()).prefill


# ---- its queue --------------------------------------------------------------------------------------------


@given(st.integers(1, 9000), st.integers(1, 9000), st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_ageing_is_the_order_of_the_paper_at_any_time(a: int, b: int, a_s: float, b_s: float) -> None:
    rank = RANK.make("shortest-prompt-aged", options={"ageing_tokens_per_s": 15.0})
    first, second = (
        cast(SequenceView, SimpleNamespace(request=Request("r", length, 1, 0.0), submitted_s=at_s))
        for length, at_s in ((a, a_s), (b, b_s))
    )
    now_s = 200.0
    published = (a - 15.0 * (now_s - a_s)) - (b - 15.0 * (now_s - b_s))
    if abs(published) > 1e-6:
        assert (rank.key(first, now_s) < rank.key(second, now_s)) == (published < 0)
    if a_s == b_s and a < b:
        assert rank.key(first, now_s) < rank.key(second, now_s), "of equal age, the shorter"
