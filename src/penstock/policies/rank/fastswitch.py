"""Priorities that change every so many steps: the load under which switching must be cheap."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from penstock.core.reasons import FinishReason
from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import ReplicaView, SequenceView, StepFacts

MODES: Final = ("least-served", "random", "markov")
LEVELS: Final = 8  # of the chain
CHAINS_MAX: Final = 1 << 16
TENANTS_MAX: Final = 4096  # whose tokens are remembered over an update: who was served most
_DRAWS: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class FastSwitchRankOptions:
    mode: str = setting("least-served", f"where priorities come from: {', '.join(MODES)}", choices=MODES)
    interval_steps: int = setting(25, "steps between updates", low=1, high=1 << 20)
    stay: float = setting(0.8, "of `markov`: probability of keeping the level", low=0.0, high=1.0)
    memory: float = setting(
        0.9, "of `least-served`: what is left of the tokens served, at each update", low=0.0, high=1.0
    )


@RANK.register("fastswitch", source="FastSwitch (arXiv 2411.18424), priority-update frequency")
class FastSwitchRank(Rank):
    """Priorities of conversations, renewed every `interval_steps` steps; between updates nothing moves.

    `least-served`: the tenant with the fewest tokens lately, by its weight, goes first. `random` and `markov`
    are the paper's synthetic traces: each conversation draws a new priority, or moves up or down among eight
    levels, as a function of the seed, the conversation and the number of the update. Running work is
    displaced where the `preempt` policy does that. O(1) a key; O(sequences) an update.
    """

    Options = FastSwitchRankOptions

    def __init__(self, context: Context, options: FastSwitchRankOptions) -> None:
        self._options = options
        self._terms = context.terms
        self._steps = 0
        self._update = 0
        self._drawn: dict[str, int] = {}  # of this update
        self._chains: OrderedDict[str, tuple[int, int]] = OrderedDict()  # conversation → (update, level)
        self._served: dict[str, float] = {}  # by tenant, since the last update and what is left of before
        self._shares: dict[str, float] = {}  # the same over the weight, as of the last update
        self._counted: dict[int, tuple[SequenceView, int]] = {}  # arrival index → tokens counted so far

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        if self._options.mode == "least-served":
            return (self._shares.get(sequence.request.tenant, 0.0),)
        conversation = _conversation(sequence)
        level = self._drawn.get(conversation)
        if level is None:
            draw = self._draw if self._options.mode == "random" else self._move
            level = self._drawn[conversation] = draw(conversation)
        return (level,)

    def version(self, now_s: float) -> int:
        return self._update

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        """Until the next update, which nobody notices where nobody waits and KV lasts."""
        return self._options.interval_steps - self._steps % self._options.interval_steps

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        self._counted[sequence.arrival_index] = (sequence, 0)

    def stepped(self, step: StepFacts, now_s: float) -> None:
        self._steps += step.steps
        update = self._steps // self._options.interval_steps
        while self._update < update:
            self._renew()

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        self._count(sequence, self._counted.pop(sequence.arrival_index)[1])

    def _renew(self) -> None:
        self._update += 1
        self._drawn.clear()
        if self._options.mode != "least-served":
            return
        for index, (sequence, counted) in self._counted.items():
            self._counted[index] = (sequence, self._count(sequence, counted))
        self._shares = {
            tenant: tokens / self._terms.weight(tenant) for tenant, tokens in self._served.items()
        }
        faded = ((tenant, tokens * self._options.memory) for tenant, tokens in self._served.items())
        kept = [(tenant, tokens) for tenant, tokens in faded if tokens >= 1.0]
        if len(kept) > TENANTS_MAX:
            kept = sorted(kept, key=lambda each: -each[1])[:TENANTS_MAX]
        self._served = dict(kept)

    def _count(self, sequence: SequenceView, counted: int) -> int:
        """Charge the tenant for what is new: prompt tokens with the first output, and every output."""
        served = sequence.total_len if sequence.output_len else 0
        if served != counted:
            tenant = sequence.request.tenant
            self._served[tenant] = self._served.get(tenant, 0.0) + served - counted
        return served

    def _draw(self, conversation: str) -> int:
        return self._random(f"{conversation}/{self._update}")

    def _move(self, conversation: str) -> int:
        """One move of the chain an update; a conversation that is seen for the first time draws its level."""
        update, level = self._chains.get(conversation, (self._update, -1))
        if level < 0:
            level = self._random(conversation) * LEVELS // _DRAWS
        for number in range(max(update, self._update - LEVELS * LEVELS) + 1, self._update + 1):
            draw = self._random(f"{conversation}/{number}") / _DRAWS
            if draw >= self._options.stay:
                is_up = draw >= (1.0 + self._options.stay) / 2
                level = min(LEVELS - 1, max(0, level + (1 if is_up else -1)))
        self._chains[conversation] = (self._update, level)
        if len(self._chains) > CHAINS_MAX:
            self._chains.popitem(last=False)
        return level

    def _random(self, name: str) -> int:
        """Uniform below 2^64."""
        digest = hashlib.blake2b(f"{self._terms.seed}/fastswitch/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def _conversation(sequence: SequenceView) -> str:
    request = sequence.request
    return request.id if request.session_id is None else f"{request.tenant}/{request.session_id}"
