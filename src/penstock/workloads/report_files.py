"""The files of a report: report.json, report.html and requests.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path

from penstock.core.errors import EnvironmentMissing
from penstock.core.metrics import RequestOutcome
from penstock.workloads import report_html
from penstock.workloads.report import Report, outcome_row


def write_files(
    report: Report, outcomes: Iterable[RequestOutcome], sent_s: Sequence[float] | None, out: Path
) -> None:
    """Into the folder `out`, each file whole or not at all. `sent_s` is parallel to `outcomes`.

    Raises EnvironmentMissing.
    """
    sent = repeat(None) if sent_s is None else sent_s
    rows = (outcome_row(outcome, at_s) for outcome, at_s in zip(outcomes, sent, strict=False))
    write_texts(
        out,
        {
            "report.json": [json.dumps(report.to_json(), indent=1, allow_nan=False), "\n"],
            "report.html": [report_html.render(report)],
            "requests.jsonl": (json.dumps(row) + "\n" for row in rows),
        },
    )


def write_texts(out: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Name → pieces of text, each file whole or not at all. Raises EnvironmentMissing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, parts in files.items():
            write_whole(out / name, parts)
    except OSError as problem:
        raise EnvironmentMissing(
            f"the report cannot be written to `{out}`: {problem.strerror or problem}.",
            hint="name a writable folder with `--out`",
        ) from None


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """The file appears whole or not at all. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
