"""Cut and scale a trace: window, rate, time, lengths. Lengths and sessions are untouched by time scaling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from penstock.core.errors import ConfigError, TraceError
from penstock.core.units import ceil_div
from penstock.workloads.trace import TraceRow

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Window:
    """Half-open interval of trace time, in the trace's own seconds."""

    start_s: float = 0.0
    end_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Shape:
    """What to do to a trace, in this order: window, limit, lengths, then time.

    `rate_scale` 2 doubles the arrivals per second and leaves think times alone; `time_scale` 10 runs ten
    trace seconds in one, think times and recorded response times included. Neither changes burstiness.
    """

    window: Window = field(default_factory=Window)
    limit: int | None = None
    rate_scale: float = 1.0
    time_scale: float = 1.0
    length_divisor: float = 1.0
    prompt_tokens_max: int | None = None
    output_tokens_max: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for values that make no sense."""
        for name in ("rate_scale", "time_scale", "length_divisor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 1e-6 <= value <= 1e6):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"`{flag}` is {value:g}.", hint="write a number from 1e-6 to 1e6")
        if self.length_divisor < 1:
            raise ConfigError("`--length-divisor` is below 1.", hint="lengths can only be scaled down")
        for name in ("limit", "prompt_tokens_max", "output_tokens_max"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}.", hint="write a whole number from 1 up")


@dataclass(slots=True)
class ShapeCounts:
    """What shaping met; filled while the rows pass."""

    rows: int = 0  # inside the window
    failed: int = 0
    prompts_clamped: int = 0
    outputs_clamped: int = 0


def parse_window(text: str) -> Window:
    """`600:1200`, `1h:90m`, `:5m`, `2d:`. Raises ConfigError."""
    start, colon, end = text.partition(":")
    window = Window(_parse_duration_s(start, text, 0.0), _parse_duration_s(end, text, math.inf))
    if not colon or window.end_s <= window.start_s:
        raise _window_error(text)
    return window


def _parse_duration_s(text: str, whole: str, default_s: float) -> float:
    if not text:
        return default_s
    unit_s = _UNITS_S.get(text[-1])
    try:
        value_s = float(text if unit_s is None else text[:-1]) * (unit_s or 1.0)
    except ValueError:
        raise _window_error(whole) from None
    if not (math.isfinite(value_s) and value_s >= 0):
        raise _window_error(whole)
    return value_s


def _window_error(text: str) -> ConfigError:
    return ConfigError(
        f"`--window {text[:40]}` is not START:END.",
        hint="write trace seconds or a unit, for example `600:1200`, `1h:90m` or `2d:`",
    )


def shaped(rows: Iterable[TraceRow], shape: Shape, counts: ShapeCounts) -> Iterator[TraceRow]:
    """Rows of the window, the first instant of the window at 0 s. Failed rows pass, marked as such."""
    taken = 0
    arrival_divisor = shape.rate_scale * shape.time_scale
    for row in rows:
        if row.arrival_s < shape.window.start_s:
            continue
        if row.arrival_s >= shape.window.end_s or (shape.limit is not None and taken >= shape.limit):
            break
        taken += 1
        counts.rows += 1
        counts.failed += row.failed
        resized = _clamped(_divided(row, shape.length_divisor), shape, counts)
        yield replace(
            resized,
            arrival_s=(row.arrival_s - shape.window.start_s) / arrival_divisor,
            elapsed_s=None if row.elapsed_s is None else row.elapsed_s / shape.time_scale,
        )
    if not taken:
        end = "end" if math.isinf(shape.window.end_s) else f"{shape.window.end_s:g} s"
        raise TraceError(
            f"the trace has no rows from {shape.window.start_s:g} s to {end}.",
            hint="`penstock trace describe` shows the trace's span",
        )


def _divided(row: TraceRow, divisor: float) -> TraceRow:
    """Lengths over a constant factor, at least 1, whole blocks staying whole so that sharing survives."""
    if divisor == 1:
        return row
    output_tokens = _scaled(row.output_tokens, divisor)
    block_tokens = _scaled(row.block_tokens, divisor)
    if row.block_hashes:
        full_blocks = len(row.block_hashes) - 1
        last = min(block_tokens, _scaled(row.prompt_tokens - full_blocks * row.block_tokens, divisor))
        prompt_tokens = full_blocks * block_tokens + last
    else:
        prompt_tokens = _scaled(row.prompt_tokens, divisor)
    return replace(
        row,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        block_tokens=block_tokens,
        output_block_hashes=None,  # their places in the text are no longer known
    )


def _scaled(tokens: int, divisor: float) -> int:
    """Rounded half up, never below 1 unless it was 0."""
    return max(1, math.floor(tokens / divisor + 0.5)) if tokens else 0


def _clamped(row: TraceRow, shape: Shape, counts: ShapeCounts) -> TraceRow:
    prompt_tokens, output_tokens, blocks = row.prompt_tokens, row.output_tokens, row.block_hashes
    if shape.prompt_tokens_max is not None and prompt_tokens > shape.prompt_tokens_max:
        prompt_tokens = shape.prompt_tokens_max
        counts.prompts_clamped += 1
        blocks = None if blocks is None else blocks[: ceil_div(prompt_tokens, row.block_tokens)]
    if shape.output_tokens_max is not None and output_tokens > shape.output_tokens_max:
        output_tokens = shape.output_tokens_max
        counts.outputs_clamped += 1
    if (prompt_tokens, output_tokens) == (row.prompt_tokens, row.output_tokens):
        return row
    return replace(
        row,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        block_hashes=blocks,
        output_block_hashes=None,
    )
