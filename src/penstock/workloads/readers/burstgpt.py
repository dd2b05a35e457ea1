"""BurstGPT (HPMLL/BurstGPT, CC-BY-4.0), both schemas.

    Timestamp, [Session ID, Elapsed time,] Model, Request tokens, Response tokens, Total tokens, Log Type

`Timestamp` is seconds since 00:00 of the first day, whole in releases 1 and 2. A row whose response has 0
tokens is a failed request. API rows have no session. `Elapsed time` is the whole response time, not TTFT.
"""

from __future__ import annotations

from collections.abc import Iterator

from penstock.workloads.fields import answered_or_error, label_of, time_of_text, tokens_of_text
from penstock.workloads.lines import Lines
from penstock.workloads.readers.tables import Table, header_of
from penstock.workloads.trace import SessionTurns, TraceRow

NAME = "burstgpt"
_REQUIRED = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")
_CLASSES = {"Conversation log": "chat", "API log": "api"}


def claims(first_line: str) -> bool:
    return header_of(first_line) >= {"Timestamp", "Request tokens", "Response tokens"}


def rows(lines: Lines) -> Iterator[TraceRow]:
    """Rows in file order. The class is `chat` or `api`, by log type."""
    table = Table(lines, _REQUIRED)
    time_at, model_at, prompt_at, output_at, log_at = (table.header.index(name) for name in _REQUIRED)
    session_at, elapsed_at = table.position("Session ID"), table.position("Elapsed time")
    turns = SessionTurns()
    for row in table:
        log_type = row[log_at]
        slo_class = _CLASSES.get(log_type)
        if slo_class is None:
            hint = "it is `Conversation log` or `API log`"
            raise lines.error("Log Type", f"`{label_of(lines, 'Log Type', log_type)}` is unknown", hint)
        prompt_tokens = tokens_of_text(lines, "Request tokens", row[prompt_at])
        output_tokens = tokens_of_text(lines, "Response tokens", row[output_at])
        if output_tokens:
            answered_or_error(lines, "Request tokens", prompt_tokens)
        session = row[session_at] if session_at is not None else ""
        elapsed = row[elapsed_at] if elapsed_at is not None else ""
        session_id = label_of(lines, "Session ID", session) if session else None
        yield TraceRow(
            arrival_s=time_of_text(lines, "Timestamp", row[time_at]),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            slo_class=slo_class,
            model=label_of(lines, "Model", row[model_at]),
            session_id=session_id,
            turn=turns.next(session_id),
            elapsed_s=time_of_text(lines, "Elapsed time", elapsed) if elapsed else None,
            failed=output_tokens == 0,
        )
