"""User weighted fair queuing: an equal share for every tenant, the shortest job first within it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Final

from penstock.core.reasons import FinishReason
from penstock.core.request import ProgramKey
from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.estimate.lengths import LengthBelief
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.rank.fluid import Fluid, Job
from penstock.policies.view import SequenceView, StepFacts

PROGRAMS_MAX: Final = 4096  # programs whose last job is remembered


@dataclass(frozen=True, slots=True)
class UwfqOptions:
    input_weight: float = setting(1.0, "work of one prompt token", low=0.0, high=1e6)
    output_weight: float = setting(2.0, "work of one output token", low=0.0, high=1e6)
    grace_s: float = setting(
        3.0, "a program that goes on within this time keeps its tenant's place", low=0.0, high=3600.0
    )
    swap_margin_tokens: float = setting(
        4096.0, "a waiting job displaces running work only when it ends so much earlier", low=0.0, high=1e12
    )


@dataclass(slots=True)
class _Call:
    """One request: its job, what it was expected to cost, and what it has cost for certain."""

    job: Job
    expected: float
    prompt_tokens: int | None = None  # computed for it; None until it starts


@RANK.register("uwfq", source="UWFQ (arXiv 2510.15485), UserClusterFairScheduler; weights are ours")
class UserWeightedFair(Rank):
    """Every tenant gets its weighted share; within it, what ends first in the ideal fluid system goes first.

    Each job (a program's calls that are in flight together, or a single request) gets the virtual instant at
    which it would end if its tenant's jobs ran one after another on the tenant's share, in the order in which
    they end when they run at once (see `fluid.py`); work goes by earliest such instant. So a tenant's small
    job passes its big ones, and no other tenant pays for it. Work is weighted tokens: the prompt, and the
    mean of the shared length belief. When a request ends, its job is corrected to what it really cost (prompt
    tokens found in the cache are free), so that too low an estimate is repaid. The fluid is served the work
    that the replica really did, which is the card's R·t with R as measured. O(jobs of the tenant) an arrival.
    """

    Options = UwfqOptions

    def __init__(self, context: Context, options: UwfqOptions) -> None:
        self._belief = context.shared(LengthBelief)
        self._options = options
        self._fluid = Fluid(context.terms.weight)
        self._calls: dict[int, _Call] = {}  # by arrival index
        self._programs: OrderedDict[ProgramKey, Job] = OrderedDict()  # least recently used first
        self._open: Counter[int] = Counter()  # calls of each job that have not ended, by the job's number
        self._corrections: list[tuple[Job, float]] = []  # wait for the step's work to be told
        self._input_tokens = 0  # computed by the replica so far
        self._output_tokens = 0
        self._flowed = 0.0  # work that the fluid was served
        self._busy_s = 0.0  # while something was here, up to `_busy_from_s`
        self._busy_from_s = 0.0

    @property
    def fluid(self) -> Fluid:
        return self._fluid

    def expected_work(self, sequence: SequenceView) -> float:
        """Weighted tokens that a request that just came will cost."""
        options, request = self._options, sequence.request
        return options.input_weight * request.prompt_len + options.output_weight * self._belief.mean(sequence)

    # ---- the order ------------------------------------------------------------------------------------

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (self._calls[sequence.arrival_index].job.finish,)

    def outranks(self, head: SequenceView, other: SequenceView, now_s: float) -> bool:
        mine, theirs = self._calls[head.arrival_index].job, self._calls[other.arrival_index].job
        return mine.finish + self._options.swap_margin_tokens < theirs.finish

    def version(self, now_s: float) -> int:
        if self._corrections:
            self._catch_up()
        return self._fluid.version

    # ---- what happens ---------------------------------------------------------------------------------

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        self._catch_up()
        if not self._calls:
            self._fluid.drain()
            self._busy_from_s = now_s
        request, expected = sequence.request, self.expected_work(sequence)
        program = None if request.program_id is None else (request.tenant, request.program_id)
        self._calls[sequence.arrival_index] = _Call(
            self._job_of(request.tenant, program, expected, now_s), expected
        )

    def started(self, sequence: SequenceView, now_s: float) -> None:
        call = self._calls[sequence.arrival_index]
        if call.prompt_tokens is None:
            call.prompt_tokens = max(0, sequence.request.prompt_len - sequence.computed_len)

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        self._output_tokens += 1  # the last chunk of a prompt gives a token

    def stepped(self, step: StepFacts, now_s: float) -> None:
        self._input_tokens += sum(count for count, _ in step.prefills)
        self._output_tokens += step.decodes * step.steps
        if self._corrections:
            self._catch_up()

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        call, options = self._calls.pop(sequence.arrival_index), self._options
        cost = 0.0  # it never started
        if call.prompt_tokens is not None:
            cost = options.input_weight * call.prompt_tokens + options.output_weight * sequence.output_len
        self._corrections.append((call.job, cost - call.expected))
        if not self._calls:
            self._busy_s += now_s - self._busy_from_s

    # ---- the fluid ------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Serve the fluid what the replica has done since, then correct the jobs that have ended."""
        work = (
            self._options.input_weight * self._input_tokens
            + self._options.output_weight * self._output_tokens
        )
        if work > self._flowed:
            self._fluid.advance(work - self._flowed)
            self._flowed = work
        for job, change in self._corrections:
            self._fluid.resize(job, max(0.0, job.size + change))
            self._open[job.number] -= 1
            if not self._open[job.number]:
                del self._open[job.number]
                self._fluid.close(job)
        self._corrections.clear()

    def _job_of(self, tenant: str, program: ProgramKey | None, size: float, now_s: float) -> Job:
        earlier = None if program is None else self._programs.pop(program, None)
        if earlier is not None and self._fluid.flows(earlier):
            self._fluid.resize(earlier, earlier.size + size)
            job = earlier
        else:
            job = self._fluid.arrive(tenant, size, None if earlier is None else self._grace(now_s))
        job.is_open = True
        self._open[job.number] += 1
        if program is not None:
            self._programs[program] = job
            while len(self._programs) > PROGRAMS_MAX:
                self._programs.popitem(last=False)
        return job

    def _grace(self, now_s: float) -> float:
        """`grace_s` in virtual time: at half the measured rate, as the paper's code has it."""
        busy_s = self._busy_s + (now_s - self._busy_from_s if self._calls else 0.0)
        return self._options.grace_s * self._flowed / busy_s / 2 if busy_s > 0.0 else 0.0
