"""A load through the real CPU engine, in this process and in real time: the counterpart of `serving.serve`.

The embedded model's engine is built once a process. The loop is the engine process's without its pipe: the
desk hands over, the replica plans, torch computes. So live numbers hold no HTTP, and outputs are real tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.effects.effect import Claim
from benchmarks.effects.serving import Ended, Load
from penstock.core.events import Finished, ReplicaEvent, TokenOut
from penstock.core.line_file import LineFile
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import CancelReason
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import ReplicaSettings, Settings
from penstock.core.step import StepPlan, StepResult
from penstock.desk import Capacity, Desk
from penstock.engine.threads import Threads, wait_briefly
from penstock.models.catalogue import resolve
from penstock.policies.lanes import Lane
from penstock.policies.stack import lanes_split, make_stack_of, rank_class, terms_of
from penstock.replica.journal import Journal, header
from penstock.replica.laned import LanedReplica
from penstock.replica.limits import ReplicaLimits, check_feasible
from penstock.replica.replica import Replica

if TYPE_CHECKING:
    from penstock.engine.build import Engine

MODEL: Final = "smollm2-135m-instruct"
KV_MEMORY: Final = "1GiB"  # of the engine; a scenario uses as much of it as its limits say
CONTEXT_LEN_MAX: Final = 8192  # the model's
BLOCK_TOKENS: Final = 16
TOKEN_IDS: Final = (100, 40_000)  # random prompts are of ordinary tokens
GREEDY: Final = SamplingParams(temperature=0.0)
IDLE_S: Final = 0.001

EachStep = Callable[[Replica, StepPlan, StepResult, float], None]  # after each step; the last is its end


@dataclass(frozen=True)
class LiveServed(Ended):
    """What came of a load. Instants are seconds since the run began.

    `tokens` holds every output by request id; equal loads have equal outputs under any policies. `step_s` and
    `step_rows` have one entry a step.
    """

    tokens: dict[str, list[int]]
    step_s: Sequence[float]
    step_rows: Sequence[int]

    @property
    def steps(self) -> int:
        return len(self.step_s)

    def mean_place(self, ids: Sequence[str]) -> float:
        """Of these in the order of first tokens, from 1: the same on a slow machine as on a fast one."""
        order = sorted(self.outcomes, key=lambda name: self.outcomes[name].first_token_s or math.inf)
        return sum(order.index(name) + 1 for name in ids) / len(ids)


def same_outputs(*runs: LiveServed) -> Claim:
    """Of one load, however it was scheduled."""
    first = runs[0].tokens
    differing = sum(each.tokens[name] != first[name] for each in runs for name in first)
    return Claim("outputs that differ", differing, high=0)


def serve_live(
    load: Load,
    settings: Settings,
    sizes: ReplicaLimits,
    *,
    seed: int = 1,
    journal: Path | None = None,
    each_step: EachStep | None = None,
) -> LiveServed:
    """Every request to its end, at its own time of arrival; refused requests are a bug of the scenario.

    Greedy. Prompts that have lengths only become random tokens by `seed`, equal where `block_keys` are equal;
    an output ends after as many tokens as the load says. `journal` names a file to write, for
    `penstock.twin.exact.replay_journal`. Where the sizes have a host's KV, the engine has it for this run.
    """
    engine = live_engine(sizes.kv_block_tokens)
    most = min(CONTEXT_LEN_MAX, engine.limits.context_len_max)
    sizes = replace(sizes, context_len_max=min(sizes.context_len_max, most))
    assert sizes.kv_blocks <= engine.limits.kv_blocks, f"the engine has {engine.limits.kv_blocks} blocks"
    waiting = deque(spelt_out(request, seed, sizes.kv_block_tokens) for request in load.requests)
    kind = _LanedRun if lanes_split(settings.policies) else _Run
    told = None
    with ExitStack() as stack:
        stack.enter_context(host_kv(engine, sizes.host_kv_blocks))
        if journal is not None:
            head = header(sizes, settings.policies, terms_of(settings))
            file = stack.enter_context(closing(LineFile(journal, head)))
            told = Journal(sizes.kv_block_tokens, seed.to_bytes(8, "big"), file.write)
        return kind(engine, settings, sizes, load.output_lens, told, each_step).serve(waiting)


@cache
def live_engine(block_tokens: int = BLOCK_TOKENS) -> Engine:
    """The embedded model on every core. Loaded once, and warm."""
    wait_briefly()  # before torch is loaded
    from penstock.engine.build import Stages, build_engine, choose_threads
    from penstock.engine.worker import warm_up

    sizes = ReplicaSettings(device="cpu", kv_memory=KV_MEMORY, kv_block_tokens=block_tokens)
    settings = Settings(replica=sizes)
    source = resolve(MODEL)
    threads = Threads(choose_threads(0), are_shared=True)  # so that lanes may use it too
    engine = build_engine(settings, source, source.name, Stages(), threads)
    for _ in range(3):
        warm_up(engine, settings)
    return engine


@contextmanager
def host_kv(engine: Engine, blocks: int) -> Iterator[None]:
    """KV for so many blocks in host memory, until the context ends; none: as the engine was built."""
    if not blocks:
        yield
        return
    from penstock.engine.executor import TorchExecutor
    from penstock.engine.host_kv import HostKV

    executor = engine.executor
    assert isinstance(executor, TorchExecutor)
    executor.use_host(HostKV(executor.store, blocks))
    try:
        yield
    finally:
        executor.reset()
        executor.use_host(None)


def spelt_out(request: Request, seed: int, block_tokens: int) -> Request:
    """The request with prompt tokens, drawn where it has none; blocks of equal keys are of equal tokens."""
    if request.prompt_tokens is not None:
        return replace(request, sampling=GREEDY)
    tokens: list[int] = []
    for key in request.block_keys or ():
        tokens += _random_tokens(f"block/{key.hex()}", block_tokens)
    tokens = tokens[: request.prompt_len]
    tokens += _random_tokens(f"{seed}/{request.id}", request.prompt_len - len(tokens))
    return replace(request, prompt_tokens=tokens, block_keys=None, sampling=GREEDY)


def _random_tokens(name: str, count: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(*TOKEN_IDS) for _ in range(count)]


@dataclass
class _Life:
    """One request on its way; instants as the replica was told them."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def outcome(self, end: Finished) -> RequestOutcome:
        times_s = self.times_s
        return RequestOutcome(
            request_id=end.request_id,
            arrival_s=self.request.arrival_s,
            finish=end.reason,
            finish_s=end.at_s,
            prompt_tokens=end.prompt_tokens,
            output_tokens=end.output_tokens,
            cached_tokens=end.cached_tokens,
            first_token_s=times_s[0] if times_s else None,
            last_token_s=times_s[-1] if times_s else None,
            itl_s=[later - earlier for earlier, later in pairwise(times_s)],
            tenant=self.request.tenant,
            slo_class=self.request.slo_class,
        )


class _Run:
    """One load through a fresh desk and a fresh replica."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        sizes: ReplicaLimits,
        output_lens: Mapping[str, int],
        journal: Journal | None,
        each_step: EachStep | None,
    ) -> None:
        capacity = Capacity(
            sizes.context_len_max,
            sizes.kv_block_tokens,
            sizes.kv_blocks,
            sizes.running_max,
            takes_queue=rank_class(settings.policies.rank).reorders,
        )
        self._executor = engine.executor
        self._replica = self._make_replica(sizes, settings)
        self._desk = Desk(settings.desk, capacity)
        self._output_lens = output_lens
        self._journal = journal
        self._each_step = each_step
        self._lives: dict[str, _Life] = {}
        self._outcomes: dict[str, RequestOutcome] = {}
        self._step_s: list[float] = []
        self._step_rows: list[int] = []
        self._began_s = 0.0
        self._is_idle = False

    def _make_replica(self, sizes: ReplicaLimits, settings: Settings) -> Replica:
        return Replica(sizes, make_stack_of(settings))

    def serve(self, coming: deque[Request]) -> LiveServed:
        count = len(coming)
        self._began_s = time.perf_counter()
        while len(self._outcomes) < count:
            self._arrive(coming)
            self._turn(coming[0].arrival_s - self._now_s() if coming else IDLE_S)
        self._executor.reset()
        self._replica.check_invariants()
        tokens = {request_id: life.tokens for request_id, life in self._lives.items()}
        return LiveServed(self._outcomes, self._replica.stats(), tokens, self._step_s, self._step_rows)

    def _turn(self, idle_s: float) -> None:
        """A step; or a short wait where there is none to make, for at most so long."""
        now_s = self._now_s()
        plan = self._replica.plan(now_s)
        if self._journal is not None and not (plan is None and self._is_idle):
            self._journal.planned(plan, now_s)
        self._is_idle = plan is None
        if plan is None:
            time.sleep(max(0.0, min(IDLE_S, idle_s)))
            return
        result = self._executor.execute(plan)
        now_s = self._now_s()
        self._account(plan, result, self._replica.complete(plan, result, now_s), now_s)

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def _arrive(self, coming: deque[Request]) -> None:
        now_s = self._now_s()
        while coming and coming[0].arrival_s <= now_s:
            request = coming.popleft()
            check_feasible(request, self._replica.limits)
            self._lives[request.id] = _Life(request)
            self._desk.enter([request])
        for request in self._desk.release():
            self._replica.submit(request, now_s)
            if self._journal is not None:
                self._journal.submitted(request, now_s)

    def _account(
        self,
        plan: StepPlan,
        result: StepResult,
        events: Sequence[ReplicaEvent],
        now_s: float,
        lane: Lane | None = None,
    ) -> None:
        if self._journal is not None:
            self._journal.completed(result, events, now_s, lane)
        self._step_s.append(result.duration_s)
        self._step_rows.append(plan.token_count)
        for event in events:
            self._take(event)
        if self._each_step is not None:
            self._each_step(self._replica, plan, result, now_s)

    def _take(self, event: ReplicaEvent) -> None:
        if isinstance(event, TokenOut):
            life = self._lives[event.request_id]
            life.tokens.append(event.token_id)
            life.times_s.append(event.at_s)
            if len(life.tokens) == self._output_lens.get(event.request_id):
                self._stop(event.request_id, event.at_s)
        elif isinstance(event, Finished):
            self._outcomes[event.request_id] = self._lives[event.request_id].outcome(event)
            self._desk.finish(event.request_id, event.at_s)

    def _stop(self, request_id: str, now_s: float) -> None:
        """Its text is complete, as where a stop string is found."""
        finished = self._replica.cancel(request_id, CancelReason.STOP_STRING, now_s)
        if finished is None:
            return  # that token was its last anyway; its end is among the events
        if self._journal is not None:
            self._journal.cancelled(request_id, CancelReason.STOP_STRING.value, now_s)
        self._take(finished)


class _LanedRun(_Run):
    """The same with two lanes: a turn accounts what has ended, and lets idle lanes begin."""

    def _make_replica(self, sizes: ReplicaLimits, settings: Settings) -> Replica:
        self._laned = LanedReplica(sizes, make_stack_of(settings))
        return self._laned

    def serve(self, coming: deque[Request]) -> LiveServed:
        from penstock.engine.lanes import EngineLanes

        self._lanes = EngineLanes(self._executor)
        try:
            return super().serve(coming)
        finally:
            self._lanes.close()

    def _turn(self, idle_s: float) -> None:
        laned = self._laned
        for lane in laned.plan_order:
            if lane not in laned.in_progress:
                now_s = self._now_s()
                step = laned.plan_lane(lane, now_s)
                if self._journal is not None:
                    self._journal.planned(None if step is None else step.plan, now_s, lane)
                if step is not None:
                    self._lanes.begin(step)
        self._lanes.wait(None, max(0.0, min(IDLE_S, idle_s)))
        for ended in self._lanes.take():
            if isinstance(ended.outcome, Exception):
                raise ended.outcome
            now_s, step = self._now_s(), ended.step
            events = laned.complete_lane(step, ended.outcome, now_s)
            self._account(step.plan, ended.outcome, events, now_s, step.lane)
