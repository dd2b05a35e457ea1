"""An engine that is killed leaves its recordings, up to its last second."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
from pathlib import Path
from typing import Any

from tiny_model import write_tiny_llama

from penstock.core.events import Finished
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import RecordSettings, ReplicaSettings, Settings
from penstock.engine.link import EngineLink
from penstock.engine.recording import FLUSH_S
from penstock.replica.messages import ReplicaDied, StepReport

WAIT_S = 60.0
BUSY_S = 1.5 * FLUSH_S  # how long the engine works before it is killed
STREAMS = 4


def long_request(number: int) -> Request:
    prompt = [3 + (number + index) % 100 for index in range(20)]
    greedy = SamplingParams(temperature=0.0)
    return Request(f"r{number}", len(prompt), 900, 0.0, prompt_tokens=prompt, sampling=greedy)


def rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n"), "whole lines only"
    return [json.loads(line) for line in text.splitlines()]


def test_at_most_a_second_of_lines_is_lost(tmp_path: Path) -> None:
    settings = Settings(
        replica=ReplicaSettings(
            device="cpu", dtype="float32", threads=1, kv_memory="4MiB", context_len=1000, running_max=STREAMS
        ),
        record=RecordSettings(journal=str(tmp_path / "journal.jsonl"), steps=str(tmp_path / "steps.jsonl")),
    )
    link = EngineLink(settings, write_tiny_llama(tmp_path / "tiny"), "tiny")  # type: ignore[arg-type]
    reports: queue.SimpleQueue[StepReport | ReplicaDied] = queue.SimpleQueue()
    told_s: list[float] = []  # instants that the engine has told of
    try:
        link.wait_ready()
        link.on_report(reports.put)
        numbers = itertools.count()
        for _ in range(STREAMS):
            link.submit(long_request(next(numbers)))
        while not told_s or told_s[-1] - told_s[0] < BUSY_S:
            report = reports.get(timeout=WAIT_S)
            assert isinstance(report, StepReport)
            told_s += [event.at_s for event in report.events]
            for event in report.events:
                if isinstance(event, Finished):
                    link.submit(long_request(next(numbers)))
        os.kill(link.pid, signal.SIGKILL)
        while isinstance(report := reports.get(timeout=WAIT_S), StepReport):
            told_s += [event.at_s for event in report.events]
    finally:
        link.close(timeout_s=WAIT_S)
    journal = [row["at_s"] for row in rows(tmp_path / "journal.jsonl") if "at_s" in row]
    steps = [row["ended_s"] for row in rows(tmp_path / "steps.jsonl") if "ended_s" in row]
    assert max(told_s) - journal[-1] <= FLUSH_S
    assert max(told_s) - steps[-1] <= FLUSH_S
