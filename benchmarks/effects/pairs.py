"""Every pair of policies of different slots through random load, with every check on.

    python -m benchmarks.effects.pairs [--requests 10000] [--jobs 2] [--only POLICY] [--write]

The other slots hold the defaults, or where these conflict the first policy that does not. After each step the
replica's books are checked; at the end, that every request ended once with exactly the tokens it had to have.
A sample of each pair's load also goes through the journal and back (plan for plan), and through the twin with
leaps and without (instant for instant). A pair that conflicts must be refused.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Final

from benchmarks.effects.pair_load import (
    BLOCK_TOKENS,
    TERMS,
    UNLOVED,
    PairLoad,
    Turn,
    draw_flood,
    draw_load,
    outputs_of,
    sizes,
)
from benchmarks.effects.serving import NO_PATH
from benchmarks.results import write_section
from penstock.core.errors import ConfigError
from penstock.core.events import Admitted, Finished, ReplicaEvent, TokenOut
from penstock.core.line_file import LineFile
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings, TenantSettings
from penstock.core.step import StepResult
from penstock.policies.lanes import Lane
from penstock.policies.stack import REGISTRIES, conflict_in, lanes_split, make_stack, rank_class
from penstock.replica.journal import Journal, header
from penstock.replica.laned import LanedReplica
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica
from penstock.replica.sequence import Sequence as Content
from penstock.twin.costs.model import Seconds, decode_ramp
from penstock.twin.costs.work import StepCost, StepWork
from penstock.twin.exact import replay_journal
from penstock.twin.laned import make_twin
from penstock.twin.vopr.laned_host import TwoPhaseExecutor
from penstock.twin.vopr.strict_executor import StrictExecutor

REQUESTS: Final = 10_000
NEVER: Final = float("inf")
STARVES_NOBODY: Final = ("fcfs", "vtc", "uwfq", "shortest-prompt-aged")  # ranks that say so
STARVED_FRAC: Final = 0.8  # who ends behind so many that came later has starved
COPY_STEPS_MAX: Final = 50  # steps until every copy has landed
SWAPS: Final = ("swap", "fastswitch")
SWAP_BLOCK_BYTES: Final = 4_000_000  # so that a copy takes about as long as a step
SAMPLE: Final = 400  # requests of the journal's and the leaps' runs
STEPS_PER_TOKEN: Final = 30  # more than this is a queue that stands still
STEP_S, ROW_S, CONTEXT_S = 0.004, 0.0002, 0.000002

Names = dict[str, str]


class PairFailed(AssertionError):
    """A pair broke a promise; the message says which."""


class SmallCost:
    """A step takes some milliseconds, linear in its rows and contexts."""

    relative_error = 0.0

    def seconds(self, work: StepWork) -> float:
        return STEP_S + ROW_S * work.rows + CONTEXT_S * work.decode_context

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        return decode_ramp(STEP_S + ROW_S * decodes, CONTEXT_S, decodes, decode_context, steps)

    def step(self, work: StepWork) -> StepCost:
        return StepCost(self.seconds(work), "compute", 0.0, 0.0, 0.0, True)


@dataclass(frozen=True)
class PairResult:
    """One pair's run."""

    names: Names
    requests: int
    steps: int
    preemptions: int
    hits: int  # prompt tokens that were found
    failure: str = ""


# ---- which pairs ------------------------------------------------------------------------------------------


def all_pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """((slot, policy), (slot, policy)) for every two policies of different slots."""
    slots = list(REGISTRIES)
    return [
        ((one, first), (other, second))
        for one, other in itertools.combinations(slots, 2)
        for first in REGISTRIES[one].names()
        for second in REGISTRIES[other].names()
    ]


def stack_with(pair: tuple[tuple[str, str], tuple[str, str]]) -> Names | None:
    """The pair in a stack of defaults; None where the two conflict."""
    chosen = dict(pair)
    if _conflict(chosen):
        return None
    free = [slot for slot in REGISTRIES if slot not in chosen]
    defaults = PolicySettings().names()
    offers = [
        [defaults[slot], *(name for name in REGISTRIES[slot].names() if name != defaults[slot])]
        for slot in free
    ]
    for filling in itertools.product(*offers):
        names = chosen | dict(zip(free, filling, strict=True))
        if not _conflict(names):
            return {slot: names[slot] for slot in REGISTRIES}
    raise PairFailed(f"{pair}: every stack around them conflicts")


def _conflict(names: Names) -> bool:
    return conflict_in(names) is not None


def sizes_for(names: Names, *, repeat: bool = True) -> ReplicaLimits:
    """With room in host memory where the stack swaps: for half of the pool, which runs out as well."""
    limits = sizes(repeat=repeat)
    if names["preempt"] not in SWAPS:
        return limits
    group_tokens = 2 * BLOCK_TOKENS if names["preempt"] == "fastswitch" else 0
    return replace(
        limits,
        host_kv_blocks=limits.kv_blocks // 2,
        kv_group_tokens=group_tokens,
        kv_block_bytes=SWAP_BLOCK_BYTES,
    )


def settings_for(names: Names) -> Settings:
    """Of the twin, on the same terms."""
    tenants = {name: TenantSettings(weight) for name, weight in TERMS.tenant_weights.items()}
    return Settings(policies=PolicySettings(**names), slo=dict(TERMS.slos), tenants=tenants, seed=TERMS.seed)


# ---- one pair ---------------------------------------------------------------------------------------------


def run_pair(names: Names, requests: int = REQUESTS, sample: int = SAMPLE, seed: int = 1) -> PairResult:
    """Every promise about this stack. Raises PairFailed, or whatever the product raises."""
    found = run_of(names, draw_load(requests, seed)).run()
    few = draw_load(min(sample, requests), seed + 1)
    check_journal(names, few)
    check_leaps(names, few)
    if names["rank"] in STARVES_NOBODY:
        place = place_of_unloved(names)
        require(
            place < STARVED_FRAC, f"somebody starves: it ends behind {place:.0%} of a flood that came later"
        )
    return found


def run_one(work: tuple[Names, int]) -> PairResult:
    """As `run_pair`, for a pool: a failure is a result."""
    names, requests = work
    try:
        return run_pair(names, requests)
    except Exception as error:  # whatever breaks is what we look for
        return PairResult(names, requests, 0, 0, 0, f"{type(error).__name__}: {error}")


class PairRun:
    """One stack under one load in virtual time, on an executor that checks all KV that it reads."""

    def __init__(self, names: Names, load: PairLoad, journal: Journal | None = None) -> None:
        self._names = names
        self._make_replica()
        self._was_idle = False
        self._load = load
        self._journal = journal
        self._next: dict[str, Turn] = {}  # by the id of the request before it
        for program in load.programs:
            for before, after in itertools.pairwise(program):
                self._next[before.request.id] = after
        self._coming = [(program[0].gap_s, index, program[0]) for index, program in enumerate(load.programs)]
        heapq.heapify(self._coming)
        self._scheduled = len(self._coming)
        self._cancels: list[tuple[float, str]] = []
        self._requests: dict[str, Request] = {}
        self._tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Finished] = {}
        self._order: list[str] = []  # of first admissions
        self._now_s = 0.0
        self._steps = 0

    def run(self) -> PairResult:
        tokens = sum(
            turn.request.prompt_len + turn.request.max_output_tokens
            for program in self._load.programs
            for turn in program
        )
        while len(self.ends) < self._load.count:
            self._arrive()
            self._turn()
            require(self._steps <= STEPS_PER_TOKEN * tokens, "somebody starves: far too many steps")
        self._check_end()
        stats = self._replica.stats()
        return PairResult(
            self._names,
            self._load.count,
            self._steps,
            stats.preemptions_total,
            stats.prefix_hit_tokens_total,
        )

    def _make_replica(self) -> None:
        self._replica = Replica(sizes_for(self._names), make_stack(PolicySettings(**self._names), TERMS))
        self._executor = StrictExecutor(BLOCK_TOKENS, SmallCost(), lambda request_id, value: None)

    def _turn(self) -> None:
        """One step, or on to the next arrival where there is none to make."""
        plan = self._replica.plan(self._now_s)
        if self._journal is not None and not (plan is None and self._was_idle):
            self._journal.planned(plan, self._now_s)
        self._was_idle = plan is None
        if plan is None:
            self._skip_to_arrival()
            return
        result = self._executor.execute(plan)
        self._now_s += result.duration_s
        self._account(result, self._replica.complete(plan, result, self._now_s))

    def _skip_to_arrival(self) -> None:
        is_over = len(self.ends) == self._load.count  # the last one was just cancelled
        require(bool(self._coming) or is_over, "a request is lost: nothing runs, and nothing comes")
        self._now_s = max(self._now_s, self._coming[0][0]) if self._coming else self._now_s

    def _account(self, result: StepResult, events: Sequence[ReplicaEvent], lane: Lane | None = None) -> None:
        if self._journal is not None:
            self._journal.completed(result, events, self._now_s, lane)
        for event in events:
            self._take(event)
        self._replica.check_invariants()
        self._steps += 1

    def _arrive(self) -> None:
        while self._coming and self._coming[0][0] <= self._now_s:
            at_s, _, turn = heapq.heappop(self._coming)
            request = replace(turn.request, arrival_s=at_s)
            self._requests[request.id] = request
            self._tokens[request.id] = []
            self._replica.submit(request, self._now_s)
            if self._journal is not None:
                self._journal.submitted(request, self._now_s)
            if turn.cancel_after_s is not None:
                heapq.heappush(self._cancels, (at_s + turn.cancel_after_s, request.id))
        while self._cancels and self._cancels[0][0] <= self._now_s:
            self._cancel(heapq.heappop(self._cancels)[1])

    def _cancel(self, request_id: str) -> None:
        finished = self._replica.cancel(request_id, CancelReason.CLIENT_DISCONNECT, self._now_s)
        if self._journal is not None:
            self._journal.cancelled(request_id, CancelReason.CLIENT_DISCONNECT.value, self._now_s)
        if finished is not None:
            self._take(finished)
        self._replica.check_invariants()

    def _take(self, event: ReplicaEvent) -> None:
        name = event.request_id
        require(name not in self.ends, f"{name} is told {event} after its end")
        if isinstance(event, TokenOut):
            self._tokens[name].append(event.token_id)
        elif isinstance(event, Admitted) and not event.resumed:
            self._order.append(name)
        elif isinstance(event, Finished):
            self.ends[name] = event
            self._check_output(event)
            if (turn := self._next.get(name)) is not None:
                self._scheduled += 1
                heapq.heappush(self._coming, (event.at_s + turn.gap_s, self._scheduled, turn))

    def _check_output(self, event: Finished) -> None:
        request, told = self._requests[event.request_id], self._tokens[event.request_id]
        wanted = outputs_of(request)
        if event.reason is FinishReason.CANCELLED:
            wanted = wanted[: len(told)]
        require(told == wanted, f"{event.request_id} said {told} and not {wanted}")
        is_stop = len(wanted) < request.max_output_tokens
        expected = FinishReason.STOP if is_stop else FinishReason.LENGTH
        require(event.reason in (expected, FinishReason.CANCELLED), f"{event} should be {expected}")

    def _let_copies_land(self) -> None:
        """Whoever has ended may have copies under way, which the replica waits for."""
        for _ in range(COPY_STEPS_MAX):
            plan = self._replica.plan(self._now_s)
            if plan is None:
                return
            require(not plan.token_count, "somebody who ended is computed")
            result = self._executor.execute(plan)
            require(not self._replica.complete(plan, result, self._now_s), "an event of nobody")
            self._replica.check_invariants()

    def _check_end(self) -> None:
        self._let_copies_land()
        require(not self._replica.has_work, "the replica holds somebody who ended")
        stats = self._replica.stats()
        held, pinned = stats.kv_blocks_used, stats.kv_blocks_pinned
        require(held == pinned, f"{held} blocks are held, {pinned} of them by pins, and nobody is here")
        if rank_class(self._names["rank"]).reorders:
            return
        leaders = {request.leader_id for request in self._requests.values()}
        plain = [  # siblings and members of a group wait for whoever computes what they share
            name
            for name in self._order
            if name not in leaders
            and self._requests[name].leader_id is None
            and self._requests[name].group_id is None
        ]
        arrivals = [self._requests[name].arrival_s for name in plain]
        require(arrivals == sorted(arrivals), "first come, first served, and somebody was overtaken")


class LanedPairRun(PairRun):
    """The same with two lanes, whose steps overlap; arrivals and cancels come while they run."""

    def _make_replica(self) -> None:
        self._replica = self._laned = LanedReplica(
            sizes_for(self._names), make_stack(PolicySettings(**self._names), TERMS)
        )
        self._cost = SmallCost()
        self._two_phase = TwoPhaseExecutor(BLOCK_TOKENS, self._cost, lambda request_id, value: None)
        self._in_progress: dict[Lane, tuple[float, float]] = {}  # began and ends

    def _turn(self) -> None:
        for lane in self._laned.plan_order:
            if lane not in self._in_progress:
                self._begin(lane)
        self._laned.check_invariants()
        ends_s = min((end_s for _, end_s in self._in_progress.values()), default=NEVER)
        comes_s = self._coming[0][0] if self._coming else NEVER
        leaves_s = self._cancels[0][0] if self._cancels else NEVER
        if ends_s < min(comes_s, leaves_s):
            self._now_s = ends_s
            self._end_lanes()
        elif min(comes_s, leaves_s) < NEVER:
            self._now_s = max(self._now_s, min(comes_s, leaves_s))
        else:
            self._skip_to_arrival()

    def _begin(self, lane: Lane) -> None:
        step = self._laned.plan_lane(lane, self._now_s)
        if self._journal is not None:
            self._journal.planned(None if step is None else step.plan, self._now_s, lane)
        if step is not None:
            seconds = self._cost.seconds(self._two_phase.begin(step))
            self._in_progress[lane] = self._now_s, self._now_s + seconds

    def _end_lanes(self) -> None:
        """Of the steps that end now."""
        for lane in [each for each, (_, end_s) in self._in_progress.items() if end_s <= self._now_s]:
            began_s, end_s = self._in_progress.pop(lane)
            result = self._two_phase.end(lane)
            result.duration_s = end_s - began_s
            events = self._laned.complete_lane(self._laned.in_progress[lane], result, self._now_s)
            self._account(result, events, lane)

    def _let_copies_land(self) -> None:
        """There are none; but a step may go on of somebody who was cancelled."""
        while self._in_progress:
            self._now_s = min(end_s for _, end_s in self._in_progress.values())
            self._end_lanes()


def run_of(names: Names, load: PairLoad, journal: Journal | None = None) -> PairRun:
    """One stack under one load, ready to run."""
    kind = LanedPairRun if lanes_split(PolicySettings(**names)) else PairRun
    return kind(names, load, journal)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise PairFailed(what)


def check_journal(names: Names, load: PairLoad) -> None:
    """The run's journal leads a fresh replica, which knows no tokens, to the same plans."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        with closing(LineFile(path, header(sizes_for(names), PolicySettings(**names), TERMS))) as file:
            run_of(names, load, Journal(BLOCK_TOKENS, b"pairs", file.write)).run()
        replayed = replay_journal(path)
    require(replayed.difference is None, f"journal: {replayed.difference}")
    require(replayed.ends > 0, "journal: nothing ended")


def place_of_unloved(names: Names) -> float:
    """Where a long prompt of a small tenant ends in a flood of short ones of another: 0 first, 1 last."""
    load = draw_flood()
    run = run_of(names, load)
    run.run()
    return list(run.ends).index(UNLOVED) / (load.count - 1)


def check_leaps(names: Names, load: PairLoad) -> None:
    """The twin gives the same instants with leaps and without. Turns come at times of their own here."""
    requests = sorted((_lengths_only(r, at_s) for r, at_s in _open_loop(load)), key=lambda r: r.arrival_s)
    lens = {turn.request.id: _output_len(turn.request) for program in load.programs for turn in program}
    leaping, plain = (_twin_outcomes(names, requests, lens, repeat) for repeat in (True, False))
    require(leaping.keys() == plain.keys() == lens.keys(), "leaps: a request is lost")
    for name, facts in leaping.items():
        require(facts == plain[name], f"leaps: {name} is {facts}, and without leaps {plain[name]}")
        require(facts[3] == lens[name], f"twin: {name} ended after {facts[3]} of {lens[name]} tokens")


def _open_loop(load: PairLoad) -> list[tuple[Request, float]]:
    found = []
    for program in load.programs:
        at_s = 0.0
        for turn in program:
            at_s += turn.gap_s
            found.append((turn.request, at_s))
    return found


def _output_len(request: Request) -> int:
    output = len(outputs_of(request))
    return output + (output < request.max_output_tokens)  # a stop token counts


def _lengths_only(request: Request, arrival_s: float) -> Request:
    content = Content(0, request, 0.0)
    keys = [bytes(key) for key in content.key_blocks(request.prompt_len // BLOCK_TOKENS, BLOCK_TOKENS)]
    return replace(
        request, arrival_s=arrival_s, prompt_tokens=None, block_keys=keys, stop_token_ids=frozenset()
    )


def _twin_outcomes(
    names: Names, requests: Sequence[Request], lens: dict[str, int], repeat: bool
) -> dict[str, tuple[object, ...]]:
    outcomes: dict[str, tuple[object, ...]] = {}

    def ended(outcome: RequestOutcome) -> None:
        outcomes[outcome.request_id] = (
            outcome.finish,
            outcome.finish_s,
            outcome.first_token_s,
            outcome.output_tokens,
            outcome.cached_tokens,
            tuple(outcome.itl_s),
        )

    twin = make_twin(settings_for(names), sizes_for(names, repeat=repeat), SmallCost(), NO_PATH, ended)
    twin.output_lens.update(lens)
    for request in requests:
        twin.arrive(request)
    twin.finish()
    twin.replica.check_invariants()
    return outcomes


# ---- the command ------------------------------------------------------------------------------------------


def check_refused(pair: tuple[tuple[str, str], tuple[str, str]]) -> str:
    """A conflict is refused at start, with its reason. Returns the message."""
    names = PolicySettings().names() | dict(pair)
    try:
        make_stack(PolicySettings(**names), TERMS)
    except ConfigError as error:
        return error.message
    raise PairFailed(f"{pair} conflict, and a stack with both was made")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="pairs with this policy")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    pairs = [pair for pair in all_pairs() if not arguments.only or arguments.only in dict(pair).values()]
    stacks = [(pair, stack_with(pair)) for pair in pairs]
    refused = [check_refused(pair) for pair, names in stacks if names is None]
    work = [(names, arguments.requests) for _, names in stacks if names is not None]
    results = []
    with Pool(arguments.jobs) as pool:
        for result in pool.imap_unordered(run_one, work):
            results.append(result)
            said = result.failure or f"{result.steps} steps, {result.preemptions} preemptions"
            print(f"{len(results)}/{len(work)} {' '.join(result.names.values())}: {said}", flush=True)
    text = summary(results, refused, arguments.requests)
    print("\n" + text)
    if arguments.write:
        command = f"python -m benchmarks.effects.pairs --requests {arguments.requests} --write"
        write_section("pairs", f"`{command}`\n\n{text}")
    sys.exit(1 if any(result.failure for result in results) else 0)


def summary(results: Sequence[PairResult], refused: Sequence[str], requests: int) -> str:
    """How many pairs, and by policy what they went through."""
    failures = [f"- {' '.join(each.names.values())}: {each.failure}" for each in results if each.failure]
    head = (
        f"{len(results)} pairs of policies, {requests} requests of random load each: {len(failures)} failed. "
        f"{len(refused)} pairs conflict and were refused."
    )
    seen: dict[str, Counter[str]] = {}
    for result in results:
        for slot, name in result.names.items():
            counts = seen.setdefault(f"{slot} `{name}`", Counter())
            counts.update(runs=1, steps=result.steps, preemptions=result.preemptions, hits=result.hits)
    order = [f"{slot} `{name}`" for slot in REGISTRIES for name in REGISTRIES[slot].names()]
    rows = [
        f"| {name} | {seen[name]['runs']} | {seen[name]['steps']} | {seen[name]['preemptions']} "
        f"| {seen[name]['hits']} |"
        for name in order
        if name in seen
    ]
    table = ["| policy | stacks with it | steps | preemptions | prompt tokens found |",
             "| --- | ---: | ---: | ---: | ---: |", *rows]  # fmt: skip
    parts = [head, "\n".join(failures), "\n".join(table), "\n".join(f"- {said}" for said in refused)]
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    main()
