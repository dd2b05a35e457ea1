"""How the pages of the policies are written: rows stay, results on the engine outlast a run without it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from benchmarks.effects import pages
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.pages import (
    BEGIN,
    END,
    HEADER,
    Results,
    keep_live,
    live_of,
    page_of,
    row_of,
    with_rows,
)

from penstock.workloads.charts import Chart, Series

CHART = Chart("Waits", "seconds", [0, 1], [Series("ours", "s1", [1.0, 2.0])], str, str)


def wins() -> Measured:
    """A load of one | request."""
    return Measured("waits 3 → 1 s", (Claim("ratio", 3.0, low=2.0),), (CHART, CHART))


def live() -> Measured:
    """The same on the engine."""
    return Measured("waits 4 → 2 s", (Claim("ratio", 2.0, low=1.5),))


def one_of_two(policy: str) -> Measured:
    """For one of two policies."""
    return live()


EFFECT = Effect("rank", "fcfs", "nobody waits for ever (textbook)", wins, wins, live)


def results(effect: Effect = EFFECT) -> Results:
    return Results(effect, effect.wins(), effect.loses(), live_of(effect))


@pytest.fixture(autouse=True)
def _own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LIVE", tmp_path / "live.json")


def guide(*rows: str) -> str:
    return "\n".join(["before", BEGIN, "", *HEADER, *rows, "", END, "after"])


def test_a_row_is_put_in_its_place_and_others_stay() -> None:
    lru = "| retain [`lru`](policies/retain-lru.md) | old | old | old | old |"
    gone = "| rank [`no-such`](policies/rank-no-such.md) | a | b | c | d |"
    text = with_rows(guide(gone, lru, row_of(results()).replace("→", "old")), [results()])
    rows = [line for line in text.splitlines() if line.startswith("| r")]
    assert rows == [row_of(results()), lru]
    assert text.startswith("before\n") and text.endswith("\nafter")
    assert with_rows(text, [results()]) == text, "and again: nothing changes"


def test_a_guide_without_markers_is_refused() -> None:
    with pytest.raises(AssertionError, match="markers"):
        with_rows("no table", [results()])


def test_a_result_of_the_engine_outlasts_other_runs() -> None:
    assert "not run yet" in row_of(results())
    keep_live(EFFECT, live(), "a machine of 2 cores.")
    assert "waits 4 → 2 s" in row_of(results())
    page = page_of([results()])
    assert "**Waits 4 → 2 s.**" in page and "a machine of 2 cores." in page
    other = Effect("retain", "lru", "x", wins, wins, live)
    keep_live(other, live(), "m")
    assert live_of(EFFECT) is not None, "results of others stay"


def test_a_page_tells_what_was_done() -> None:
    page = page_of([results(), results()])
    assert page.startswith("# `fcfs`\n") and "A load of one | request." in page
    assert "| ratio | 3 | ≥ 2 |" in page
    pictures = [line for line in page.splitlines() if line.startswith("![")]
    names = ["rank-fcfs.svg", "rank-fcfs-1.svg", "rank-fcfs-2.svg", "rank-fcfs-3.svg"]
    assert [line.rpartition("(")[2].rstrip(")") for line in pictures] == names
    assert "python -m benchmarks.effects rank/fcfs --live" in page


def test_effects_that_share_a_function_are_told_in_its_words() -> None:
    shared = partial(one_of_two, "fcfs")
    effect = Effect("rank", "fcfs", "x", shared, wins, shared)
    keep_live(effect, live(), "m")
    page = page_of([results(effect)])
    assert page.count("For one of two policies.") == 2 and "partial" not in page


def test_what_cannot_be_shown_on_the_engine_says_why() -> None:
    effect = Effect("rank", "fcfs", "x", wins, wins, None, "it needs a second device")
    assert "it needs a second device" in row_of(results(effect))
    assert "Not shown: it needs a second device." in page_of([results(effect)])
