"""What a run did, as a digest that two runs of one script must share, and as the last lines for a reader."""

from __future__ import annotations

import hashlib
from collections import deque

from penstock.core.events import ReplicaEvent
from penstock.core.step import StepPlan

LAST_LINES = 30
LINE_LEN_MAX = 300


class Journal:
    """Deterministic: nothing of the process or the wall clock goes in."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=12)
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.now_s = 0.0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def last_lines(self) -> list[str]:
        return list(self._last)

    def note(self, line: str) -> None:
        stamped = f"{self.now_s!r} {line}"
        self._hash.update(stamped.encode())
        self._last.append(stamped[:LINE_LEN_MAX])

    def event(self, event: ReplicaEvent) -> None:
        self.note(repr(event))

    def plan(self, plan: StepPlan) -> None:
        chunks = [(chunk.seq_id, chunk.start, chunk.count) for chunk in plan.chunks]
        starts = [(start.request_id, start.seq_id, start.cached_len, start.blocks) for start in plan.starts]
        copies = f" copies {list(plan.copies)} waits {list(plan.waits)}" if plan.copies or plan.waits else ""
        self.note(
            f"step {plan.index}: chunks {chunks} decodes {plan.decode_count}x{plan.repeat} starts {starts} "
            f"ends {plan.ends} paused {sorted(plan.paused)} blocks {plan.new_blocks}{copies}"
        )
