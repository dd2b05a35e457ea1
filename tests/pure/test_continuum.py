"""Continuum: what is learned of gaps, how long a pin should last, and what pins promise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_executor import FakeExecutor, expected_output

from penstock.core.errors import ConfigError
from penstock.core.events import Finished, TokenOut
from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.estimate import programs
from penstock.policies.estimate.gaps import SAMPLES_MIN, GapBelief, GapSamples
from penstock.policies.estimate.programs import Programs
from penstock.policies.estimate.turn_costs import TurnCosts
from penstock.policies.retain import RETAIN
from penstock.policies.retain.continuum import COLD_PIN_S, best_pin_s
from penstock.policies.stack import make_stack
from penstock.policies.view import StepFacts
from penstock.replica.journal import Journal, header
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ProgramLeft, ToolCalled
from penstock.replica.replica import Replica
from penstock.replica.sequence import Sequence
from penstock.twin.exact import replay_journal

BLOCK = 4


def samples(gaps: list[float], size: int = 512) -> GapSamples:
    found = GapSamples(size)
    for gap in gaps:
        found.add(gap)
    return found


def gain_s(gaps: list[float], pin_s: float, saved_s: float, cost_rate: float) -> float:
    """The card's formula, straight from the samples."""
    within = sum(gap <= pin_s for gap in gaps) / len(gaps)
    return within * saved_s - cost_rate * sum(min(gap, pin_s) for gap in gaps) / len(gaps)


def test_the_best_pin_is_that_of_brute_force() -> None:
    draw = random.Random(1)
    for _ in range(300):
        gaps = [round(draw.expovariate(1.0), 2) for _ in range(draw.randint(1, 30))]
        terms = draw.uniform(0, 5), draw.uniform(0, 3)
        best = max(gain_s(gaps, pin_s, *terms) for pin_s in [0.0, *gaps])
        found_s = best_pin_s(samples(gaps), *terms)
        assert found_s in {0.0, *gaps}
        assert gain_s(gaps, found_s, *terms) == pytest.approx(best)


def test_a_slow_call_in_ten_does_not_stop_the_pins_of_the_fast_ones() -> None:
    gaps = samples([0.5] * 90 + [30.0] * 10)
    assert gaps.mean_s > COLD_PIN_S  # where the mean rule gives up
    assert best_pin_s(gaps, saved_s=1.0, cost_rate=0.1) == 0.5


def retain_with(rule: str, gaps: list[float]) -> Any:
    """Under these gaps of the tool, a hit saves 0.2 + 0.5 s for itself and 0.1 s for each that waits."""
    retain = RETAIN.make("continuum", Context(), {"rule": rule, "slack_frac": 0.1})
    found = samples(gaps)
    retain._gaps = SimpleNamespace(of=lambda tool: found, own=lambda tool: found)  # type: ignore[attr-defined]
    retain._costs = SimpleNamespace(  # type: ignore[attr-defined]
        reload_s=lambda tokens: 0.002 * tokens,
        reload_device_s=lambda tokens: 0.001 * tokens,
        queue_delay_s=0.5,
    )
    return retain


def test_the_cdf_rule_weighs_what_a_hit_saves_against_what_holding_costs() -> None:
    """Four wait and a quarter of the memory is held: 1.1 s to win, one second a second to lose."""
    gaps = [0.2] * 6 + [0.9] * 3 + [5.0]
    ended = SimpleNamespace(request=turn(0, "p").request, computed_len=100, block_count=10)
    view = SimpleNamespace(waiting_count=4, block_count=40)
    best = max([0.0, *gaps], key=lambda pin_s: gain_s(gaps, pin_s, 1.1, 1.0))
    assert best == 0.9
    until_s = retain_with("cdf", gaps).turn_ended(ended, view, 10.0)
    assert until_s == pytest.approx(10.0 + 0.9 * 1.1), "a tenth longer than the gap that pays best"


def test_the_mean_rule_gives_up_where_the_mean_is_long() -> None:
    ended = SimpleNamespace(request=turn(0, "p").request)
    assert retain_with("mean", [0.5] * 10).turn_ended(ended, None, 10.0) == 10.0 + COLD_PIN_S
    assert retain_with("mean", [0.5] * 9 + [30.0]).turn_ended(ended, None, 10.0) is None


def test_gap_samples_keep_the_newest() -> None:
    found = samples([9.0, 1.0, 2.0, 3.0], size=3)
    assert (len(found), found.mean_s) == (3, 2.0)
    assert [(gap_s, within) for gap_s, within, _ in found.outcomes()] == [
        (1.0, 1 / 3),
        (2.0, 2 / 3),
        (3.0, 1.0),
    ]
    assert [gap for gap, _, _ in samples([1.0, 1.0, 2.0]).outcomes()] == [1.0, 2.0]


def turn(number: int, program: str, **hints: object) -> Sequence:
    return Sequence(number, Request(f"r{number}", 4, 4, 0.0, program_id=program, **hints), 0.0)  # type: ignore[arg-type]


def test_gaps_are_filed_under_the_tool_that_was_called() -> None:
    context = Context()
    belief, table = context.shared(GapBelief), context.shared(Programs)
    assert context.estimators[0] is table, "the table hears of a turn before those who ask it"
    now_s, number = 0.0, 0
    for _ in range(SAMPLES_MIN):
        for tool, gap_s in (("fast", 0.25), ("slow", 8.0)):
            sequence = turn(number, tool, tool=tool)
            for observer in (table, belief):
                observer.submitted(sequence, now_s)
            table.started(sequence, now_s)
            table.left(sequence, now_s + 1)
            table.finished(sequence, programs.FinishReason.STOP, now_s + 1)
            again = turn(number + 1, tool, tool=tool)
            for observer in (table, belief):
                observer.submitted(again, now_s + 1 + gap_s)
            table.finished(again, programs.FinishReason.CANCELLED, now_s + 1 + gap_s)
            now_s, number = now_s + 20, number + 2
    fast, unknown = belief.of("fast"), belief.of("never called")
    assert fast is not None and fast.mean_s == 0.25 and len(fast) == SAMPLES_MIN
    assert unknown is not None and len(unknown) == 2 * SAMPLES_MIN, "all tools together"


def test_the_table_of_programs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PROGRAMS_MAX", 3)
    table = Programs(Context())
    stays = turn(0, "stays")
    table.submitted(stays, 0.0)
    for number in range(1, 10):
        passing = turn(number, f"p{number}")
        table.submitted(passing, 0.0)
        table.finished(passing, programs.FinishReason.STOP, 0.0)
    assert len(table) <= 4
    assert table.order(stays) == 0, "who is here is not forgotten"


def test_what_a_reload_costs_beside_the_decodes() -> None:
    costs = TurnCosts(Context())
    costs.stepped(StepFacts(((100, 100),), 4, 400, 1, 0.030), 1.0)
    costs.stepped(StepFacts((), 4, 404, 1, 0.010), 1.010)
    costs.stepped(StepFacts((), 4, 416, 3, 0.030), 1.040)
    costs.stepped(StepFacts(((100, 100),), 4, 400, 1, 0.030), 1.070)
    assert costs.reload_s(1000) == pytest.approx(0.3)
    assert costs.reload_device_s(1000) == pytest.approx(0.2)


def test_leaps_and_single_steps_teach_the_same() -> None:
    leap, single = TurnCosts(Context()), TurnCosts(Context())
    for costs, parts in ((leap, [3]), (single, [1, 1, 1])):
        costs.stepped(StepFacts(((8, 8),), 0, 0, 1, 0.03), 1.0)
        now_s = 1.0
        for steps in parts:
            now_s += 0.1 * steps
            costs.stepped(StepFacts((), 1, 9, steps, 0.1 * steps), 1.0 + round(now_s - 1.0, 1))
        costs.stepped(StepFacts(((8, 8),), 0, 0, 1, 0.03), 2.0)
    assert leap.reload_device_s(100) == single.reload_device_s(100)


# ---- in a replica -------------------------------------------------------------------------------------


class Host:
    """A replica under Continuum with a clock of its own: a step takes a second."""

    def __init__(self, kv_blocks: int = 16, running_max: int = 4, **options: object) -> None:
        policies = PolicySettings(
            rank="program-fcfs", preempt="program", retain="continuum", options={"continuum": options}
        )
        self.replica = Replica(ReplicaLimits(kv_blocks, BLOCK, running_max, 64, 512), make_stack(policies))
        self.executor = FakeExecutor(BLOCK)
        self.now_s = 0.0
        self.outputs: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}

    def submit(self, request: Request) -> Request:
        self.replica.submit(request, self.now_s)
        return request

    def step(self, seconds: float = 1.0) -> None:
        plan = self.replica.plan(self.now_s)
        self.now_s += seconds
        if plan is not None:
            for event in self.replica.complete(plan, self.executor.execute(plan), self.now_s):
                if isinstance(event, TokenOut):
                    self.outputs.setdefault(event.request_id, []).append(event.token_id)
                elif isinstance(event, Finished):
                    self.cached[event.request_id] = event.cached_tokens
        self.replica.check_invariants()

    def run(self, request: Request, steps_max: int = 200) -> None:
        """To its end."""
        self.submit(request)
        for _ in range(steps_max):
            self.step()
            if request.id in self.cached:
                assert self.outputs[request.id] == expected_output(request)
                return
        raise AssertionError(f"{request.id} never ended")

    @property
    def pins(self) -> dict[str, int]:
        return self.replica.stats().pins_total


def prompt(name: str, length: int, **hints: object) -> Request:
    """Content that only this program has."""
    base = sum(map(ord, name.split("/")[0]))
    tokens = [base % 7 + (position % 5) + base for position in range(length)]
    return Request(name, length, 5, 0.0, prompt_tokens=tokens, **hints)  # type: ignore[arg-type]


def follow(host: Host, first: Request, name: str, **hints: object) -> Request:
    """The program's next turn: everything so far, and some more."""
    tokens = [*(first.prompt_tokens or ()), *host.outputs[first.id], 3, 3]
    return Request(name, len(tokens), 5, 0.0, prompt_tokens=tokens, program_id=first.program_id, **hints)  # type: ignore[arg-type]


def test_a_pinned_turn_keeps_its_blocks_from_everybody() -> None:
    host = Host(kv_blocks=12)
    first = prompt("a", 20, program_id="a", pin_s=1000.0)
    host.run(first)
    assert host.replica.blocks_pinned == 6  # 24 of 25 tokens have KV, all in full blocks
    assert host.replica.blocks_available == 6
    for number in range(4):  # others come and go, more than the pool could hold beside
        host.run(prompt(f"other{number}", 15))
    again = follow(host, first, "a2", is_last_turn=True)
    host.run(again)
    assert host.cached["a2"] == 24
    assert host.replica.blocks_pinned == 0, "a last turn leaves nothing"
    assert (host.pins["made"], host.pins["hit"], host.pins["replaced"]) == (1, 1, 1)


def test_a_pin_ends_with_its_time() -> None:
    host = Host(kv_blocks=12)
    host.run(prompt("a", 20, program_id="a", pin_s=3.0))
    host.step(2.0)
    assert host.replica.blocks_pinned == 6
    host.step(2.0)
    host.step()
    assert host.replica.blocks_pinned == 0 and host.pins["expired"] == 1
    assert host.replica.blocks_available == 12


def test_who_returns_at_the_last_instant_is_in_time() -> None:
    host = Host(kv_blocks=12)
    host.run(prompt("a", 20, program_id="a", pin_s=3.0))
    host.step(3.0)
    host.step()  # plans when the time is up
    assert host.replica.blocks_pinned == 6
    host.step()
    assert host.replica.blocks_pinned == 0


def test_a_program_that_waits_never_loses_its_kv_to_the_clock() -> None:
    host = Host(kv_blocks=12, running_max=1)
    first = prompt("a", 20, program_id="a", pin_s=4.0)
    host.run(first)
    long = prompt("long", 8)
    host.submit(Request("long", 8, 12, 0.0, prompt_tokens=long.prompt_tokens))
    host.step()
    again = host.submit(follow(host, first, "a2"))
    for _ in range(8):
        host.step()
    assert host.replica.blocks_pinned == 6, "its time is up, and it waits for the only slot"
    while again.id not in host.cached:
        host.step()
    assert host.cached["a2"] == 24


def test_nothing_deadlocks_with_all_memory_pinned() -> None:
    host = Host(kv_blocks=12)
    host.run(prompt("a", 20, program_id="a", pin_s=300.0))
    host.run(prompt("b", 19, program_id="b", pin_s=200.0))
    assert host.replica.blocks_available <= 1
    host.run(prompt("c", 40))
    assert host.pins["sacrificed"] == 2


def test_the_pin_with_the_latest_expiry_is_sacrificed_first() -> None:
    host = Host(kv_blocks=12)
    host.run(prompt("a", 16, program_id="a", pin_s=200.0))
    host.run(prompt("b", 16, program_id="b", pin_s=250.0))
    host.run(prompt("c", 16))
    assert host.pins["sacrificed"] == 1
    host.replica.check_invariants()
    host.run(follow(host, prompt("a", 16, program_id="a"), "a2"))
    assert host.cached["a2"] == 20


def test_running_turns_yield_before_pins_do() -> None:
    host = Host(kv_blocks=14)
    host.run(prompt("a", 16, program_id="a", pin_s=280.0))  # five blocks
    older = host.submit(Request("o", 4, 24, 0.0, prompt_tokens=[1, 2, 3, 4], program_id="o", pin_s=0.0))
    younger = host.submit(Request("y", 4, 24, 0.0, prompt_tokens=[5, 6, 7, 8], program_id="y", pin_s=0.0))
    while older.id not in host.cached or younger.id not in host.cached:
        host.step()
    assert host.replica.stats().preemptions_total >= 1
    assert host.pins["sacrificed"] == 0
    assert host.outputs["y"] == expected_output(younger)


def test_a_program_keeps_its_place_and_a_pinned_one_goes_first() -> None:
    host = Host(kv_blocks=40, running_max=1)
    host.run(prompt("a", 8, program_id="a", pin_s=0.0))
    host.run(prompt("b", 8, program_id="b", pin_s=100.0))
    blocker = host.submit(prompt("x", 8))
    host.step()
    new = host.submit(prompt("new", 8, program_id="new"))
    host.submit(follow(host, prompt("a", 8, program_id="a"), "a2"))
    host.submit(follow(host, prompt("b", 8, program_id="b"), "b2"))
    assert [sequence.request.id for sequence in host.replica.waiting] == ["b2", "a2", new.id]
    assert blocker.id not in host.cached


def test_who_stands_alone_or_says_goodbye_pins_nothing() -> None:
    host = Host()
    host.run(prompt("alone", 12))
    host.run(prompt("last", 12, program_id="p", is_last_turn=True, pin_s=100.0))
    assert host.pins["made"] == 0


def test_a_session_is_a_program() -> None:
    host = Host()
    host.run(prompt("s", 12, session_id="s"))
    assert host.pins["made"] == 1, "nothing is known of its gaps: two seconds"
    assert host.replica._pins.due_s == host.now_s + COLD_PIN_S


def test_the_operator_bounds_what_a_client_may_ask() -> None:
    host = Host(pin_s_max=7.0)
    host.run(prompt("s", 12, session_id="s", pin_s=1e6))
    assert host.replica._pins.due_s == host.now_s + 7.0


def test_a_stop_string_ends_a_turn_well_and_a_cancelled_one_pins_nothing() -> None:
    for reason, made in ((CancelReason.STOP_STRING, 1), (CancelReason.CLIENT_DISCONNECT, 0)):
        host = Host()
        host.submit(prompt("s", 12, session_id="s"))
        host.step()
        host.step()
        host.replica.cancel("s", reason, host.now_s)
        host.step()
        assert host.pins["made"] == made


def test_a_rule_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"continuum\.rule"):
        Host(rule="always")


# ---- hints that come while a turn runs ----------------------------------------------------------------


def test_a_program_that_left_gives_its_pin_back() -> None:
    host = Host()
    host.run(prompt("s", 12, session_id="s", pin_s=100.0))
    host.replica.advise(ProgramLeft(("default", "nobody")), host.now_s)
    assert host.replica.blocks_pinned > 0
    host.replica.advise(ProgramLeft(("default", "s")), host.now_s)
    assert host.replica.blocks_pinned == 0 and host.pins["released"] == 1


def test_a_tool_that_the_answer_names_counts_for_its_gap() -> None:
    host = Host()
    host.submit(prompt("s", 12, session_id="s"))
    host.step()
    host.replica.advise(ToolCalled("s", "grep"), host.now_s)
    host.replica.advise(ToolCalled("gone", "grep"), host.now_s)
    while "s" not in host.cached:
        host.step()
    host.step()
    host.submit(prompt("s2", 12, session_id="s"))
    gaps = host.replica._stack.retain._gaps.own("grep")  # type: ignore[attr-defined]
    assert gaps is not None and gaps.mean_s == 1.0


def test_a_journal_keeps_the_hints(tmp_path: Path) -> None:
    policies = PolicySettings(rank="program-fcfs", preempt="program", retain="continuum")
    host, lines = Host(), []
    journal = Journal(BLOCK, b"salt", lines.append)
    request = prompt("s", 12, session_id="s", pin_s=30.0)
    host.submit(request)
    journal.submitted(request, host.now_s)
    while True:
        plan = host.replica.plan(host.now_s)
        journal.planned(plan, host.now_s)
        if plan is None:
            break
        journal.advised(ToolCalled("s", "grep"), host.now_s)
        host.replica.advise(ToolCalled("s", "grep"), host.now_s)
        result = host.executor.execute(plan)
        host.now_s += 1.0
        journal.completed(result, host.replica.complete(plan, result, host.now_s), host.now_s)
    journal.advised(ProgramLeft(("default", "s")), host.now_s)
    path = tmp_path / "journal.jsonl"
    rows = [header(host.replica.limits, policies, ServiceTerms()), *lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replayed = replay_journal(path)
    assert replayed.difference is None and replayed.ends == 1
    assert {row["call"] for row in lines} >= {"tool", "unpin"}
