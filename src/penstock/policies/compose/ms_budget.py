"""A budget in milliseconds: prompts take what the gap between tokens has room for, now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from penstock.core.settings import setting
from penstock.policies.compose import COMPOSE, Compose, Composition, Share
from penstock.policies.context import Context
from penstock.policies.estimate.slo_book import SloBook
from penstock.policies.estimate.step_time import StepTimes, chunk_pairs
from penstock.policies.view import ReplicaView, SequenceView

GROWTH: Final = 2  # a step has at most so many times the rows of any step seen before: no leap into the dark


@dataclass(frozen=True, slots=True)
class MsBudgetOptions:
    target_ms: float = setting(
        0.0,
        "longest gap between tokens; 0 takes the tightest TPOT target among those that decode",
        low=0.0,
        high=600_000.0,
    )
    default_ms: float = setting(
        100.0, "where neither `target_ms` nor anybody's SLO says", low=0.1, high=600_000.0
    )
    margin_frac: float = setting(0.05, "of the target, kept for errors of the prediction", low=0.0, high=0.9)
    prefill_tokens_min: int = setting(
        32, "prompt tokens of every step, target or not, so that prompts never starve", low=1, high=1 << 20
    )
    cold_tokens: int = setting(
        256, "budget of a step in tokens while too few steps were seen", low=1, high=1 << 20
    )


@COMPOSE.register(
    "ms-budget", source="Sarathi-Serve (OSDI 2024), the budget of its section 4.3, found online"
)
class MsBudget(Compose):
    """Hold the gap at a target at any load: the largest prompt share whose predicted step still fits.

    A budget in tokens is right for one number of decodes and one length of context; beside longer ones it
    misses the target, beside shorter ones it leaves time unused. Reads `prefilling`, `decoding_count` and
    `decode_context`, and predicts with `StepTimes`. O(prefilling + log tokens) a step. As long as nobody
    decodes there is no gap to hold, and the step is as large as `step_tokens_max`, which always bounds it.

    It is as good as its prediction: with a target below what the decodes take by themselves, prompts get
    `prefill_tokens_min` a step and throughput falls.
    """

    Options = MsBudgetOptions

    def __init__(self, context: Context, options: MsBudgetOptions) -> None:
        self._options = options
        self._times = context.shared(StepTimes)
        self._book = context.shared(SloBook)
        self._targets_ms: dict[int, float] = {}  # of those that decode and have one, by arrival index
        self._counts: Counter[float] = Counter()  # the same, by target

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        target_ms = self._book.of(sequence.request).tpot_ms
        if target_ms is not None:
            self._targets_ms[sequence.arrival_index] = target_ms
            self._counts[target_ms] += 1

    def left(self, sequence: SequenceView, now_s: float) -> None:
        target_ms = self._targets_ms.pop(sequence.arrival_index, None)
        if target_ms is None:
            return
        self._counts[target_ms] -= 1
        if not self._counts[target_ms]:
            del self._counts[target_ms]

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        step = _Step(self._times, view)
        shares = self._fill(step, view)
        if shares and shares[-1].count < _left_of(shares[-1].sequence) or len(shares) < len(view.prefilling):
            return 0
        return self._largest(step, self._room(step, view), 0)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        return Composition(self._fill(_Step(self._times, view), view))

    def target_s(self) -> float:
        """What a step may take now."""
        options = self._options
        target_ms = options.target_ms or min(self._counts, default=options.default_ms)
        return target_ms / 1e3 * (1.0 - options.margin_frac)

    def _fill(self, step: _Step, view: ReplicaView) -> list[Share]:
        """Shares in rank order, the last one perhaps cut; `step` holds them afterwards."""
        shares: list[Share] = []
        for sequence in view.prefilling:
            left = _left_of(sequence)
            count = self._largest(step, min(left, self._room(step, view)), sequence.computed_len)
            if count <= 0:
                break
            step.add(count, sequence.computed_len, count == left)
            shares.append(Share(sequence, count))
            if count < left:
                break
        return shares

    def _room(self, step: _Step, view: ReplicaView) -> int:
        """Prompt tokens that may be tried, whatever the time; at least the guaranteed share."""
        rows_max = view.step_tokens_max
        if view.decoding_count:
            times = self._times
            rows_max = GROWTH * times.rows_seen if times.is_ready else self._options.cold_tokens
        room = max(rows_max - step.rows, self._guaranteed(step))
        return min(room, view.step_tokens_max - step.rows)

    def _guaranteed(self, step: _Step) -> int:
        return max(0, self._options.prefill_tokens_min - step.prompt_tokens)

    def _largest(self, step: _Step, limit: int, computed_len: int) -> int:
        """The most tokens up to `limit` of a prompt, `computed_len` of it done, that fit the target."""
        if limit <= 0 or not step.decodes or not self._times.is_ready:
            return limit
        target_s = self.target_s()
        if step.seconds_with(limit, computed_len) <= target_s:
            return limit
        fits, fails = min(limit, self._guaranteed(step)), limit
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if step.seconds_with(middle, computed_len) <= target_s:
                fits = middle
            else:
                fails = middle
        return fits


class _Step:
    """The step in the making."""

    def __init__(self, times: StepTimes, view: ReplicaView) -> None:
        self._times = times
        self.decodes = view.decoding_count
        self.rows = self.decodes
        self.prompt_tokens = 0
        self._samples = self.decodes
        self._context = view.decode_context + self.decodes  # after the step
        self._pairs = 0.0

    def add(self, count: int, computed_len: int, is_last: bool) -> None:
        self.rows += count
        self.prompt_tokens += count
        self._samples += is_last
        self._pairs += chunk_pairs(count, computed_len + count)

    def seconds_with(self, count: int, computed_len: int) -> float:
        """Were `count` more tokens in it, and were they the last of their prompt."""
        pairs = self._pairs + chunk_pairs(count, computed_len + count)
        return self._times.seconds(self.rows + count, self._samples + 1, self._context, pairs)


def _left_of(sequence: SequenceView) -> int:
    return sequence.total_len - sequence.computed_len
