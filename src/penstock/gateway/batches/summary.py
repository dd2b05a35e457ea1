"""What a job came to, from the lines of its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from penstock.desk.job_plan import JobPlan

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job came to. Seconds are from the first request to the last answer, loading left out."""

    requests: int
    answered: int
    failed: int
    groups: int | None  # planned here; None where a server planned
    prompt_tokens: int
    saved_tokens: int  # of them, found instead of computed
    planned_saved_tokens: int | None
    output_tokens: int
    seconds: float
    first_failure: str | None  # its `custom_id` and the error's words

    @property
    def json(self) -> JSON:
        return {
            **asdict(self),
            "saved_frac": self.saved_tokens / max(1, self.prompt_tokens),
            "output_tokens_per_s": self.output_tokens / max(1e-9, self.seconds),
            "tokens_per_s": (self.prompt_tokens + self.output_tokens) / max(1e-9, self.seconds),
        }


def summarised(rows: Sequence[JSON], plan: JobPlan | None, seconds: float) -> Summary:
    """From the result lines; tokens are those of answered requests."""
    bodies = [row["response"]["body"] for row in rows if _is_answered(row)]
    usages = [body["usage"] for body in bodies]
    return Summary(
        requests=len(rows),
        answered=len(bodies),
        failed=len(rows) - len(bodies),
        groups=None if plan is None else len(plan.groups),
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        saved_tokens=sum(
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in usages
        ),
        planned_saved_tokens=None if plan is None else plan.saved_tokens,
        output_tokens=sum(usage["completion_tokens"] for usage in usages),
        seconds=seconds,
        first_failure=next((_failure(row) for row in rows if not _is_answered(row)), None),
    )


def _is_answered(row: JSON) -> bool:
    return bool(row["response"]) and row["response"]["status_code"] == 200


def _failure(row: JSON) -> str:
    error = row["error"] or (row["response"]["body"] or {}).get("error") or {}  # any server's, with `--url`
    return f"{row['custom_id']}: {error.get('message', 'no reason given')}"
