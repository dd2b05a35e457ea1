"""The decode lane and pausing: a composer that leaves random decodes out must change no output."""

from __future__ import annotations

import random

from fake_executor import FakeExecutor, expected_output, make_replica, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, TokenOut
from penstock.core.request import Request
from penstock.policies.compose import Composition
from penstock.policies.compose.sarathi import Sarathi, SarathiOptions
from penstock.policies.context import Context
from penstock.policies.view import ReplicaView
from penstock.replica.lane import STALE_MAX


class PausingSarathi(Sarathi):
    """Leaves some decodes out, never all of them unless a prompt advances."""

    def __init__(self, seed: int) -> None:
        super().__init__(Context(), SarathiOptions())
        self._random = random.Random(seed)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        composition = super().compose(view, now_s)
        decoding = [sequence for sequence in view.running if sequence.is_decoding]
        self._random.shuffle(decoding)
        keep = 0 if composition.shares else 1
        composition.paused = decoding[: self._random.randint(0, max(0, len(decoding) - keep))]
        return composition


@given(seed=st.integers(0, 10_000), kv_blocks=st.integers(9, 30), running_max=st.integers(2, 6))
@settings(max_examples=150, deadline=None)
def test_pausing_changes_no_output(seed: int, kv_blocks: int, running_max: int) -> None:
    draw = random.Random(seed)
    replica = make_replica(kv_blocks=kv_blocks, running_max=running_max, step_tokens_max=12)
    object.__setattr__(replica._stack, "compose", PausingSarathi(seed))
    executor = FakeExecutor(4)
    requests = [
        Request(f"r{i}", n, draw.randint(1, 14), 0.0, prompt_tokens=[draw.randint(0, 3) for _ in range(n)])
        for i, n in enumerate(draw.choices(range(1, 20), k=8))
    ]
    outputs: dict[str, list[int]] = {request.id: [] for request in requests}
    ended = []
    for step in range(3_000):
        if step < len(requests):
            replica.submit(requests[step], float(step))
        plan = replica.plan(float(step))
        if plan is None:
            break
        for event in replica.complete(plan, executor.execute(plan), step + 0.5):
            if isinstance(event, TokenOut):
                outputs[event.request_id].append(event.token_id)
            elif isinstance(event, Finished):
                ended.append(event.request_id)
        replica.check_invariants()
    assert sorted(ended) == sorted(outputs)
    assert outputs == {request.id: expected_output(request) for request in requests}


def test_who_stops_early_is_forgotten_early() -> None:
    """Everybody asks for 400 tokens and stops after the first: no prompt stays in memory until clock 400."""
    replica, executor = make_replica(kv_blocks=256, running_max=2), FakeExecutor(4)
    for number in range(150):
        prompt = [number, 1, 2]
        stop = next_token(prompt)
        replica.submit(
            Request(f"r{number}", 3, 400, 0.0, prompt_tokens=prompt, stop_token_ids=frozenset({stop})), 0.0
        )
    while (plan := replica.plan(0.0)) is not None:
        replica.complete(plan, executor.execute(plan), 0.0)
        replica.check_invariants()
    assert len(replica._lane._finishes) <= STALE_MAX
