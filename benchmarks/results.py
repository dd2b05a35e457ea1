"""benchmarks/RESULTS.md: one section a benchmark, each renewed by its own command."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = "# Results\n\nEvery number here was printed by the command above it. Ratios matter, not absolutes.\n"


def write_section(name: str, body: str) -> None:
    """Replace the section `name`, or add it at the end."""
    text = RESULTS.read_text() if RESULTS.exists() else HEADER
    section = f"\n## {name}\n\n{body.strip()}\n"
    pattern = re.compile(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else text.rstrip() + "\n" + section
    RESULTS.write_text(text)


def describe_machine() -> str:
    """Date, processor, cores, versions: the line that a number needs."""
    import torch

    import penstock

    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown CPU"
    )
    cores = len(os.sched_getaffinity(0))
    today = datetime.date.today().isoformat()
    return f"{today}, {model}, {cores} cores, torch {torch.__version__}, penstock {penstock.__version__}."


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
