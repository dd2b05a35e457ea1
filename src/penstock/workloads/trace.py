"""The noun `TraceRow`: one recorded request, lengths and times only."""

from __future__ import annotations

from dataclasses import dataclass

SESSIONS_TRACKED_MAX = 1_000_000


@dataclass(slots=True)
class TraceRow:
    """One request of a trace.

    `arrival_s` is relative to the trace's first row once it comes from `open_trace`. `block_hashes` name the
    prompt's blocks of `block_tokens` tokens, the last possibly partial: equal ids mean equal content after
    an equal prefix. `output_block_hashes` go on from there: ids of the full blocks that the output
    completed, beginning with the one that prompt and output share. `elapsed_s` is the recorded time until
    the last token. `tool` is what the session called after the answer, and `is_last_turn` says that no turn
    follows. A failed row may have lengths 0 and is never replayed; every other row has at least one prompt
    and one output token.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "default"
    slo_class: str = "default"
    model: str | None = None
    session_id: str | None = None
    turn: int = 0  # position in its session, from 0
    block_hashes: tuple[int, ...] | None = None
    block_tokens: int = 0
    elapsed_s: float | None = None
    failed: bool = False
    output_block_hashes: tuple[int, ...] | None = None
    tool: str | None = None
    is_last_turn: bool = False


class SessionTurns:
    """Numbers the turns of sessions as they pass by, remembering the most recent million of them."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def next(self, session_id: str | None) -> int:
        """The turn of this row, from 0. Changes state: call once a row."""
        if session_id is None:
            return 0
        turn = self._turns.pop(session_id, -1) + 1
        self._turns[session_id] = turn  # re-inserted, so that the first key is the longest silent
        if len(self._turns) > SESSIONS_TRACKED_MAX:
            del self._turns[next(iter(self._turns))]
        return turn
