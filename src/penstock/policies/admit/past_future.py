"""Admit a request only if the batch's future peak of KV fits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.core.reasons import WaitReason
from penstock.core.settings import setting
from penstock.policies.admit import ADMIT, Admission, Admit
from penstock.policies.base import FOREVER
from penstock.policies.context import Context
from penstock.policies.estimate.lengths import LengthBelief
from penstock.policies.estimate.peak import future_peak, shared_future_peak
from penstock.policies.view import Candidate, ReplicaView, SequenceView

Ints = NDArray[np.int64]
_COLUMNS: Final = {
    name: row for row, name in enumerate(("offset", "decodes", "prompt", "maximum", "group", "found"))
}
DRAWS_MAX: Final = 5
_DRAWS: Final = 200  # of all sequences together, about; both from LightLLM, req_queue.py


@dataclass(frozen=True, slots=True)
class PastFutureOptions:
    reserved_frac: float = setting(0.05, "share of the KV that no estimate may plan with", low=0.0, high=0.9)
    round_steps: int = setting(
        10, "decode steps between two drawings of the output lengths", low=1, high=10_000
    )


@ADMIT.register("past-future", source="Past-Future scheduler (ASPLOS 2025), LightLLM router/req_queue.py")
class PastFuture(Admit):
    """Admit while the peak of KV to come stays within the pool: few preemptions and little idle memory.

    Past: each running request's total output is drawn from the lengths of finished ones that exceed its
    output so far (`LengthBelief`), K = min(5, 200 // running + 1) times a round. Future: the exact peak of
    each of the K scenarios with the candidate added. It starts when

        max over k of peak_k < capacity (1 - reserved_frac) - KV that nobody here holds

    and its prompt fits now. Tokens are rounded up to blocks; prefix tokens that several hold count once. A
    prompt that takes d more steps lives d steps longer, so that its remaining output counts d more.

    Here a round lasts `round_steps` decode steps, and within it a sequence keeps its draws: steps that change
    nothing need no decision, and nobody draws until luck lets it in. LightLLM asks as rarely
    (`router_max_wait_tokens`).

    Reads `prefilling`, `decoding_count`, `decode_clock`, `decode_context` and the block counts; what runs it
    keeps in arrays of its own. O(K n log n) a decision after a change, O(1) otherwise.
    """

    Options = PastFutureOptions

    def __init__(self, context: Context, options: PastFutureOptions) -> None:
        self._context = context
        self._options = options
        self._belief = context.shared(LengthBelief)
        self._batch = _Batch()
        self._round = -1
        self._draws = 0  # a sequence in this round
        self._generator = context.random("past-future")
        self._events = 0  # whoever starts, begins to decode, or leaves may change an answer
        self._asked: int | None = None  # whose the last decision was
        self._drawn_for: int | None = None
        self._drawn: list[int] = []  # total outputs of the candidate that drew last in this round
        self._refused: tuple[int, int, int] | None = None  # the state in which the head was refused
        self.last_peak = 0  # tokens, of the last decision that needed one

    # ---- what happens ---------------------------------------------------------------------------------

    def started(self, sequence: SequenceView, now_s: float) -> None:
        self._events += 1
        if self._asked != sequence.arrival_index:  # started unasked, into an empty replica
            self._batch.stage(sequence, 0, self._belief.group_of(sequence.request), ())
            self._round = -1
        self._asked = None
        self._batch.add(sequence)

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        self._events += 1
        self._batch.begin_decode(sequence)

    def left(self, sequence: SequenceView, now_s: float) -> None:
        self._events += 1
        self._batch.remove(sequence)

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        """A refusal stands until the next round, an event, or for ever if it was somebody else's."""
        if self._refused is None or self._refused[:2] != self._state(view):
            return FOREVER
        return self._options.round_steps - view.decode_clock % self._options.round_steps

    def _state(self, view: ReplicaView) -> tuple[int, int]:
        return self._events, view.decode_clock // self._options.round_steps

    # ---- the decision ---------------------------------------------------------------------------------

    def decide(self, candidate: Candidate, view: ReplicaView, now_s: float) -> Admission:
        sequence = candidate.sequence
        if candidate.blocks_for(sequence.total_len, view.block_tokens) > view.blocks_available:
            return Admission(reason=WaitReason.KV_CAPACITY)
        if view.running_count == 0:
            self._asked = None
            return Admission(reserve_len=sequence.total_len)
        state = (*self._state(view), sequence.arrival_index)
        if state != self._refused and self._fits(candidate, view):
            return Admission(reserve_len=sequence.total_len)
        self._refused, self._asked = state, None
        return Admission(reason=WaitReason.KV_CAPACITY)

    def _fits(self, candidate: Candidate, view: ReplicaView) -> bool:
        batch, block_tokens = self._batch, view.block_tokens
        self._refresh(view)
        shared_blocks = candidate.blocks_cached - candidate.blocks_revived
        self._stage(candidate.sequence, shared_blocks * block_tokens)
        held = batch.held(view.decode_clock, 1)
        left = batch.left(held, self._draws)
        batch.slow_down(left, view, self._slower(candidate, view))
        # Blocks of the running, each its own, against blocks that are held: those missing are shared, those
        # too many belong to nobody here, and cannot be planned with.
        counted = int((-(-held[:-1] // block_tokens)).sum())
        surplus = counted - (view.block_count - view.blocks_available)
        foreign = max(0, -surplus) * block_tokens
        held += block_tokens - 1  # at most, of each one's last block
        if surplus > 0 or shared_blocks:
            in_common = (max(0, surplus) + shared_blocks) * block_tokens
            roots = np.append(batch.roots(block_tokens), root_of(candidate.sequence, block_tokens))
            peaks = shared_future_peak(held, left, batch.found(1), roots, in_common)
        else:
            peaks = future_peak(held, left)
        self.last_peak = int(peaks.max())
        capacity = view.block_count * block_tokens * (1.0 - self._options.reserved_frac)
        return self.last_peak < capacity - foreign

    def _refresh(self, view: ReplicaView) -> None:
        """A new round draws anew for all that run."""
        batch = self._batch
        batch.settle(view)
        number = view.decode_clock // self._options.round_steps
        if number == self._round:
            return
        self._round = number
        self._drawn_for = None
        self._generator = self._context.random("past-future", number)
        self._draws = min(DRAWS_MAX, _DRAWS // batch.count + 1)
        batch.draw(self._belief, view.decode_clock, self._generator.random((self._draws, batch.count)))

    def _stage(self, sequence: SequenceView, found: int) -> None:
        """The candidate as one more of the batch. It draws once a round."""
        self._asked = sequence.arrival_index
        if self._drawn_for != sequence.arrival_index:
            self._drawn_for = sequence.arrival_index
            self._drawn = self._belief.at(sequence, self._generator.random(self._draws).tolist())
        self._batch.stage(sequence, found, self._belief.group_of(sequence.request), self._drawn)

    def _slower(self, candidate: Candidate, view: ReplicaView) -> list[int]:
        """Steps that each prompt in progress, and the candidate last, needs beyond the next one."""
        room = max(1, view.step_tokens_max - view.running_count - 1)
        ahead, steps = 0, []
        for each in view.prefilling:
            ahead += each.total_len - each.computed_len
            steps.append((ahead - 1) // room)
        ahead += candidate.sequence.total_len - candidate.cached_len
        return [*steps, (ahead - 1) // room]


class _Batch:
    """The running sequences as arrays, changed by what starts, begins to decode, or leaves.

    All that decode advance together: total length = `offset` + decode clock. A prompt in progress has its
    known length for `offset`, and does not advance.
    """

    def __init__(self) -> None:
        self.count = 0
        self._places: dict[int, int] = {}  # arrival index → column
        self._sequences: list[SequenceView] = []
        self._joined: dict[
            int, SequenceView
        ] = {}  # began to decode; the clock is told with the next decision
        self._columns = np.zeros((len(_COLUMNS), 64), np.int64)
        self._totals = np.zeros((DRAWS_MAX, 64), np.int64)
        self._decode_offsets = 0  # the sum over those that decode
        self._decoding = 0
        self._grouping = -1

    def _column(self, name: str, staged: int = 0) -> Ints:
        return self._columns[_COLUMNS[name], : self.count + staged]

    def found(self, staged: int) -> Ints:
        """Tokens of each that others held already when it started."""
        return self._column("found", staged)

    def roots(self, block_tokens: int) -> Ints:
        """Which begin alike. O(running); asked only where prefixes are shared."""
        return np.array([root_of(each, block_tokens) for each in self._sequences], np.int64)

    def stage(self, sequence: SequenceView, found: int, group: int, drawn: SequenceOf[int]) -> None:
        """Write a column behind the last. `add` takes it in."""
        place = self.count
        if place == self._columns.shape[1]:
            self._columns = np.concatenate((self._columns, np.zeros_like(self._columns)), axis=1)
            self._totals = np.concatenate((self._totals, np.zeros_like(self._totals)), axis=1)
        request = sequence.request
        row = (sequence.total_len, 0, request.prompt_len, request.max_output_tokens, group, found)
        self._columns[:, place] = row  # in the order of _COLUMNS
        self._totals[: len(drawn), place] = drawn

    def add(self, sequence: SequenceView) -> None:
        """The staged column is one of the batch."""
        self._places[sequence.arrival_index] = self.count
        self._sequences.append(sequence)
        self.count += 1

    def begin_decode(self, sequence: SequenceView) -> None:
        self._joined[sequence.arrival_index] = sequence

    def remove(self, sequence: SequenceView) -> None:
        """The last column takes its place."""
        who = sequence.arrival_index
        self._joined.pop(who, None)
        place, last = self._places.pop(who), self.count - 1
        if self._columns[_COLUMNS["decodes"], place]:
            self._decoding -= 1
            self._decode_offsets -= int(self._columns[_COLUMNS["offset"], place])
        if place != last:
            self._columns[:, place] = self._columns[:, last]
            self._totals[:, place] = self._totals[:, last]
            moved = self._sequences[place] = self._sequences[last]
            self._places[moved.arrival_index] = place
        self._sequences.pop()
        self.count = last

    def settle(self, view: ReplicaView) -> None:
        """Take the clock for those that began to decode; look again at all where somebody was paused."""
        for who, sequence in self._joined.items():
            self._decode(self._places[who], sequence.total_len - view.decode_clock)
        self._joined.clear()
        if self._decode_offsets + self._decoding * (view.decode_clock - 1) == view.decode_context:
            return
        self._decode_offsets = self._decoding = 0
        for place, sequence in enumerate(self._sequences):
            if sequence.is_decoding:
                self._decode(place, sequence.total_len - view.decode_clock)

    def _decode(self, place: int, offset: int) -> None:
        self._columns[_COLUMNS["offset"], place] = offset
        self._columns[_COLUMNS["decodes"], place] = 1
        self._decode_offsets += offset
        self._decoding += 1

    def draw(self, belief: LengthBelief, clock: int, uniform: NDArray[np.float64]) -> None:
        """Total outputs at uniform places float64[draws, n]."""
        if self._grouping != belief.grouping:
            self._grouping = belief.grouping
            self._column("group")[:] = [belief.group_of(each.request) for each in self._sequences]
        produced = self.held(clock) - self._column("prompt")
        drawn = belief.totals(self._column("group"), produced, self._column("maximum"), uniform)
        self._totals[: len(drawn), : self.count] = drawn

    def held(self, clock: int, staged: int = 0) -> Ints:
        """Tokens of each after the next step: all that are known now."""
        held: Ints = self._column("offset", staged) + clock * self._column("decodes", staged)
        return held

    def left(self, held: Ints, draws: int) -> Ints:
        """int64[draws, n + 1]: tokens that each still produces after the next step, by its draws."""
        known = held - self._column("prompt", 1)
        left: Ints = np.maximum(self._totals[:draws, : self.count + 1] - known - 1, 0)
        return left

    def slow_down(self, left: Ints, view: ReplicaView, slower: SequenceOf[int]) -> None:
        """Add the steps that each prompt in progress, and the staged one last, takes longer."""
        for each, steps in zip(view.prefilling, slower, strict=False):
            left[:, self._places[each.arrival_index]] += steps
        left[:, -1] += slower[-1]


def root_of(sequence: SequenceView, block_tokens: int) -> int:
    """Equal for requests whose first blocks are equal; its own where the prompt is shorter or not known."""
    request = sequence.request
    if request.prompt_len < block_tokens:
        return sequence.arrival_index
    if request.prompt_tokens is not None:
        return hash((request.cache_salt, tuple(request.prompt_tokens[:block_tokens])))
    return hash(request.block_keys[0]) if request.block_keys else sequence.arrival_index
