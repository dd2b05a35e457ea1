"""The belief about output lengths: exact against the written formula, and conditional on what is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from penstock.core.metrics import Slo
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.estimate.lengths import GROUPS_MAX, OWN_FROM, POOLED, WINDOW, LengthBelief
from penstock.policies.estimate.slo_book import Promise, SloBook, promise_of


@dataclass
class Seq:
    """As much of a sequence as estimators read."""

    request: Request
    output_len: int = 0
    first_token_s: float | None = None


def seq(
    produced: int = 0,
    maximum: int = 1000,
    tenant: str = "default",
    slo_class: str = "default",
    **hints: object,
) -> Seq:
    request = Request("r", 10, maximum, 0.0, tenant=tenant, slo_class=slo_class, **hints)  # type: ignore[arg-type]
    return Seq(request, produced)


def taught(values: list[int], **hints: str) -> LengthBelief:
    belief = LengthBelief(Context())
    for value in values:
        belief.finished(seq(value, **hints), FinishReason.STOP, 0.0)  # type: ignore[arg-type]
    return belief


def support(values: list[int], produced: int, maximum: int) -> list[int]:
    """The card's: [g] + sorted(values > g) + [m if it is larger]."""
    points = [produced, *sorted(min(value, maximum) for value in values if value > produced)]
    return points if points[-1] >= maximum else [*points, maximum]


LENGTHS = [int(value) for value in np.random.default_rng(1).integers(1, 900, WINDOW)]


def test_a_cold_belief_expects_the_maximum() -> None:
    belief = LengthBelief(Context())
    assert belief.mean(seq(maximum=700)) == 700  # type: ignore[arg-type]
    assert set(belief.at(seq(maximum=700), [0.0, 0.3, 0.5, 0.999])) == {700}  # type: ignore[arg-type]


def test_half_of_a_cold_start_is_forgotten_last() -> None:
    belief = taught([10] * (WINDOW // 2))
    assert belief.mean(seq(maximum=1000)) == pytest.approx(505)  # type: ignore[arg-type]
    belief = taught([10] * WINDOW)
    assert belief.mean(seq(maximum=1000)) == 10  # type: ignore[arg-type]


@pytest.mark.parametrize("produced", [0, 1, 37, 450, 898, 950])
@pytest.mark.parametrize("maximum", [951, 1000, 5000])
def test_a_query_is_the_interpolated_inverse(produced: int, maximum: int) -> None:
    belief, sequence = taught(LENGTHS), seq(produced, maximum)
    points = support(LENGTHS, produced, maximum)
    for q in (0.0, 0.3, 0.5, 0.95, 0.999):
        if produced:
            place = q * (len(points) - 1)
            exact = np.interp(place, range(len(points)), points)
            expected = min(max(int(np.ceil(exact - 1e-9)), produced + 1), maximum)
        else:
            expected = sorted(LENGTHS)[min(int(q * WINDOW), WINDOW - 1)]
        assert belief.at(sequence, [q]) == [expected]  # type: ignore[arg-type]
        uniform = np.full((2, 3), q)
        totals = belief.totals(np.full(3, POOLED), np.full(3, produced), np.full(3, maximum), uniform)
        assert totals.tolist() == [[expected] * 3] * 2


@pytest.mark.parametrize("produced", [0, 5, 300, 899])
@pytest.mark.parametrize("maximum", [300, 900, 2000])
def test_the_mean_is_that_of_the_draws(produced: int, maximum: int) -> None:
    produced = min(produced, maximum - 1)
    belief, sequence = taught(LENGTHS), seq(produced, maximum)
    places = (np.arange(20_000) + 0.5) / 20_000
    count = len(places)
    totals = belief.totals(
        np.full(count, POOLED), np.full(count, produced), np.full(count, maximum), places[None, :]
    )
    assert totals.min() > produced and totals.max() <= maximum
    assert belief.mean(sequence) == pytest.approx(totals.mean(), abs=1.0)  # type: ignore[arg-type]


def test_the_more_it_has_produced_the_longer_it_gets() -> None:
    belief = taught(LENGTHS)
    means = [belief.mean(seq(produced)) for produced in (1, 100, 400, 800, 950)]  # type: ignore[arg-type]
    assert means == sorted(means) and means[-1] > 950


def test_a_group_is_believed_once_it_is_large_enough() -> None:
    belief = taught([500] * WINDOW)
    mine = seq(tenant="mine")
    before = belief.grouping
    for _ in range(OWN_FROM - 1):
        belief.learn(mine.request, 20)
    assert belief.group_of(mine.request) == POOLED and belief.grouping == before
    belief.learn(mine.request, 20)
    assert belief.group_of(mine.request) != POOLED and belief.grouping == before + 1
    assert belief.mean(mine) == 20  # type: ignore[arg-type]
    assert belief.mean(seq(tenant="another")) == pytest.approx(500 - 480 * OWN_FROM / WINDOW)  # type: ignore[arg-type]
    groups = np.array([belief.group_of(mine.request), POOLED])
    totals = belief.totals(groups, np.zeros(2, int), np.full(2, 1000), np.full((1, 2), 0.9))
    assert totals.tolist() == [[20, 500]]


def test_groups_are_bounded_and_the_least_fed_goes_back_to_the_pool() -> None:
    belief = taught([500] * WINDOW)
    for tenant in range(GROUPS_MAX + 1):
        for _ in range(OWN_FROM):
            belief.learn(seq(tenant=f"t{tenant}").request, 20)
    assert (
        belief.group_of(seq(tenant="t0").request) == belief.group_of(seq(tenant="default").request) == POOLED
    )
    assert belief.group_of(seq(tenant=f"t{GROUPS_MAX}").request) != POOLED


def test_cut_outputs_teach_nothing() -> None:
    belief = LengthBelief(Context())
    belief.finished(seq(5), FinishReason.CANCELLED, 0.0)  # type: ignore[arg-type]
    assert belief.version == 0


# ---- the book of promises -----------------------------------------------------------------------------


def book() -> SloBook:
    slos = {"chat": Slo(ttft_ms=1000, tpot_ms=100), "batch": Slo(e2e_ms=20_000)}
    return SloBook(Context(ServiceTerms(slos)))


def test_a_promise_follows_from_the_targets() -> None:
    def of(**hints: Any) -> Promise:
        request = seq(**hints).request
        return promise_of(book().of(request), request)

    assert of(slo_class="chat") is Promise.LATENCY
    assert of(slo_class="batch") is Promise.THROUGHPUT
    assert of(slo_class="batch", program_id="p") is Promise.COLLECTIVE
    assert of(slo_class="chat", program_id="p") is Promise.LATENCY
    assert of() is Promise.NONE
    assert of(slo_class="chat", slo=Slo(e2e_ms=5)) is Promise.THROUGHPUT, "its own goes first"


def test_first_the_first_token_is_due_and_then_the_end() -> None:
    chat, batch, nothing = seq(slo_class="chat", maximum=11), seq(slo_class="batch"), seq()
    assert [book().due_s(each) for each in (chat, batch, nothing)] == [1.0, 20.0, None]  # type: ignore[arg-type]
    for each in (chat, batch, nothing):
        each.first_token_s = 0.5
    assert book().due_s(chat) == pytest.approx(1.5), "ten gaps of 100 ms"  # type: ignore[arg-type]
    assert [book().due_s(each) for each in (batch, nothing)] == [20.0, None]  # type: ignore[arg-type]
