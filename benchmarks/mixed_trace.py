"""The mixture on which stacks are compared: agents, chats and reports on one replica, out of real traces.

    python -m benchmarks.mixed_trace mixed.jsonl [--sessions 150] [--seed 1]
    penstock compare mixed.jsonl --closed-loop --asked-tokens 1024 --config benchmarks/mixed.toml ...

- agents: sessions of an agentic trace (LMCache, MIT; ../shared/data/agent_traces): recorded outputs and the
  recorded gaps between turns, in which tools run. That trace has no prompt lengths: a first prompt of 2,000
  to 4,000 tokens, and 50 to 400 tokens of results a turn, are drawn.
- chats: prompt and output lengths of Azure's conversation trace of 2023, single turns, 40 tenants of Zipf's
  sizes.
- reports: lengths of Azure's code trace of 2023, with a deadline on the last token.

A request log in the format of `serve --record`; the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.effects.serving import AZURE, DATA
from penstock.workloads.readers.request_log import header_line, row_line
from penstock.workloads.trace import TraceRow

GAPS = DATA / "agent_traces" / "lmcache_agentic_gaps.csv.gz"
CHATS = AZURE
REPORTS = DATA / "azure_llm" / "AzureLLMInferenceTrace_code_2023.csv.gz"
TURNS_MAX = 30
CONTEXT_MAX = 14_000
TENANTS = 40
SESSION_EVERY_S = 2.0
CHAT_EVERY_S = 0.25
REPORT_EVERY_S = 1.0


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def agents(sessions: int, draw: random.Random) -> Iterator[TraceRow]:
    turns: dict[str, list[tuple[int, float]]] = {}
    for row in read(GAPS):
        recorded = (int(row["output_tokens"]), float(row["pre_gap_s"]))
        turns.setdefault(row["session_id"], []).append(recorded)
    start_s = 0.0
    for index, name in enumerate(list(turns)[:sessions]):
        start_s += draw.expovariate(1 / SESSION_EVERY_S)
        at_s, prompt = start_s, draw.randint(2000, 4000)
        last = min(len(turns[name]), TURNS_MAX) - 1
        for turn, (output, gap_s) in enumerate(turns[name][: last + 1]):
            output = max(1, output)
            at_s += gap_s if turn else 0.0
            is_last = turn == last or prompt + output + 400 > CONTEXT_MAX
            yield TraceRow(
                at_s, prompt, output, f"agents-{index % 4}", "agent",
                session_id=f"s{index}", turn=turn, tool="tool", is_last_turn=is_last,
            )  # fmt: skip
            if is_last:
                break
            prompt += output + draw.randint(50, 400)


def singles(
    path: Path, every_s: float, until_s: float, slo_class: str, draw: random.Random
) -> Iterator[TraceRow]:
    weights = [1 / (rank + 1) for rank in range(TENANTS)]
    at_s = 0.0
    for row in read(path):
        at_s += draw.expovariate(1 / every_s)
        if at_s > until_s:
            return
        tenant = draw.choices(range(TENANTS), weights)[0]
        prompt, output = int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))
        yield TraceRow(at_s, prompt, output, f"{slo_class}-{tenant}", slo_class)


def mixture(sessions: int, seed: int) -> list[TraceRow]:
    rows = list(agents(sessions, random.Random(f"agents/{seed}")))
    until_s = sessions * SESSION_EVERY_S
    rows += singles(CHATS, CHAT_EVERY_S, until_s, "chat", random.Random(f"chats/{seed}"))
    rows += singles(REPORTS, REPORT_EVERY_S, until_s, "report", random.Random(f"reports/{seed}"))
    return sorted(rows, key=lambda row: row.arrival_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--sessions", type=int, default=150, help="of agents; the rest follows in proportion")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    missing = [path.name for path in (GAPS, CHATS, REPORTS) if not path.exists()]
    if missing:
        sys.exit(f"skipped: {', '.join(missing)} of ../shared/data is not on this machine")
    rows = mixture(arguments.sessions, arguments.seed)
    lines = [header_line(0), *map(row_line, rows)]
    arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{len(rows)} requests of {arguments.sessions} sessions, chats and reports")


if __name__ == "__main__":
    main()
