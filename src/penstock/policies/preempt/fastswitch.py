"""Preemption that is cheap enough to be fair: runs of blocks, copied beside the steps, and kept."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass

from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.estimate.copy_times import CopyTimes
from penstock.policies.estimate.step_time import StepTimes, chunk_pairs
from penstock.policies.preempt import PREEMPT, CopySize, Manner
from penstock.policies.preempt.displace import NO_LANES, Displacing
from penstock.policies.view import ReplicaView, SequenceView


@dataclass(frozen=True, slots=True)
class FastSwitchOptions:
    batch_min: int = setting(
        2, "sequences that go on for a copy to be made beside them; fewer wait for it", low=1, high=4096
    )
    beside: bool = setting(True, "copy beside the steps where the rule says so; false: steps always wait")
    reuse: bool = setting(True, "keep what the host has, and copy only what is new")
    turns: bool = setting(True, "copy a session's KV when a turn ends, for its next turn; needs `reuse`")


@PREEMPT.register("fastswitch", source="FastSwitch (arXiv 2411.18424)")
class FastSwitch(Displacing):
    """The last of the running yields; what the host does not have of its KV is copied there in long runs.

    Beside the steps if at least `batch_min` sequences go on and they can make the steps that hide the copy;
    else the step waits, because a near-empty batch loses less by that. Out and in against computing again:
    the cheaper, as far as times are known. The head of the queue takes the place of whom it outranks. Long
    runs come from `replica.kv_group_tokens`. The rule of "beside" and its numbers are our reading: the paper
    has no public code. Reads `running`, `decoding_count`, `decode_context`. O(running) a swap.
    """

    Options = FastSwitchOptions
    conflicts = NO_LANES
    swaps = True

    def __init__(self, context: Context, options: FastSwitchOptions) -> None:
        super().__init__()
        self._options = options
        self.keeps_copies = options.reuse
        self.keeps_turns = options.reuse and options.turns
        self._copies = context.shared(CopyTimes)
        self._steps = context.shared(StepTimes)

    def swap_out(self, victim: SequenceView, size: CopySize, view: ReplicaView, now_s: float) -> Manner:
        if self._copies.is_ready and self._steps.is_ready:
            kept = size.kept_len
            there_and_back_s = self._copies.seconds(size.blocks + kept // view.block_tokens)
            if there_and_back_s > self._steps.seconds(kept, 1, 0, chunk_pairs(kept, kept)):
                return Manner.RECOMPUTE
        others = [each for each in view.running if each is not victim]
        return Manner.SWAP_BESIDE if self._hides(size, others, view) else Manner.SWAP

    def swap_in_waits(self, sequence: SequenceView, size: CopySize, view: ReplicaView, now_s: float) -> bool:
        return not self._hides(size, view.running, view)

    def _hides(
        self, size: CopySize, others: collections.abc.Sequence[SequenceView], view: ReplicaView
    ) -> bool:
        """Whether `others` go on long enough, and are enough, to make the copy beside them."""
        if not self._options.beside or len(others) < self._options.batch_min:
            return False
        if not (self._copies.is_ready and self._steps.is_ready):
            return True
        context = sum(each.total_len for each in others)
        step_s = self._steps.seconds(len(others), len(others), context, 0.0)
        steps = min(each.output_left for each in others)
        return self._copies.seconds(size.blocks) <= steps * step_s
