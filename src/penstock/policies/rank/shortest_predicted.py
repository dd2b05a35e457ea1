"""Least predicted work first."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.reasons import FinishReason
from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.estimate.lengths import LengthBelief
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView


@dataclass(frozen=True, slots=True)
class ShortestOptions:
    input_weight: float = setting(1.0, "work of one prompt token", low=0.0, high=1e6)
    output_weight: float = setting(2.0, "work of one output token", low=0.0, high=1e6)
    ageing_tokens_per_s: float = setting(
        0.0,
        "work by which a request is preferred for each second it came earlier; 0: none",
        low=0.0,
        high=1e9,
    )
    swap_margin_frac: float = setting(
        0.5, "a waiting request displaces a running one only below this share of its remaining work",
        low=0.0, high=1.0,
    )  # fmt: skip


@RANK.register(
    "shortest-predicted", source="Schrage (1968), shortest remaining time first, on predicted lengths"
)
class ShortestPredicted(Rank):
    """Least predicted remaining work first: the best mean latency, and no bound for the long ones.

    Work = `input_weight` · prompt + `output_weight` · predicted output (mean of the shared length belief),
    judged when the request comes and again when it is preempted: what it must compute again and what it is
    still expected to produce. With ageing, each second of waiting is worth `ageing_tokens_per_s`; as
    everybody ages alike, later arrivals start with a handicap and no key changes. O(log window) a request.
    """

    Options = ShortestOptions

    def __init__(self, context: Context, options: ShortestOptions) -> None:
        self._belief = context.shared(LengthBelief)
        self._options = options
        self._predicted: dict[int, float] = {}  # output tokens in all, by arrival index
        self._keys: dict[int, float] = {}

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (self._keys[sequence.arrival_index],)

    def outranks(self, head: SequenceView, other: SequenceView, now_s: float) -> bool:
        """By work that is left now, ageing included, with a margin: what runs only gets shorter."""
        mine, theirs = self._keys[head.arrival_index], self._keys[other.arrival_index]
        aged = self._options.ageing_tokens_per_s * (head.submitted_s - other.submitted_s)
        return mine < theirs and self._left(head) + aged < self._options.swap_margin_frac * self._left(other)

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        self._judge(sequence)

    def left(self, sequence: SequenceView, now_s: float) -> None:
        self._judge(sequence)

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        del self._predicted[sequence.arrival_index], self._keys[sequence.arrival_index]

    def _judge(self, sequence: SequenceView) -> None:
        done = sequence.output_left == 0  # it leaves for good
        self._predicted[sequence.arrival_index] = sequence.output_len if done else self._belief.mean(sequence)
        ageing = self._options.ageing_tokens_per_s * sequence.submitted_s
        self._keys[sequence.arrival_index] = self._left(sequence) + ageing

    def _left(self, sequence: SequenceView) -> float:
        """Prompt (and lost output) to compute, and output expected; at least one token is."""
        options = self._options
        to_compute = 0 if sequence.is_decoding else sequence.total_len - sequence.computed_len
        expected = max(1.0, self._predicted[sequence.arrival_index] - sequence.output_len)
        return options.input_weight * to_compute + options.output_weight * expected
