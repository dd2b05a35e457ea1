"""When the engine's recordings reach the disk."""

from __future__ import annotations

from pathlib import Path

from fake_executor import FakeExecutor

from penstock.core.request import Request, SamplingParams
from penstock.core.settings import RecordSettings, Settings
from penstock.core.step_trace import StepTimes
from penstock.engine.recording import FLUSH_S, Recording
from penstock.policies.stack import make_stack_of
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

STEP_S = 0.125
BLOCK_TOKENS = 4


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_lines_wait_for_a_second_at_most(tmp_path: Path) -> None:
    """A request of 40 steps of an eighth of a second: far too few lines to fill a buffer."""
    paths = [tmp_path / "journal.jsonl", tmp_path / "steps.jsonl"]
    settings = Settings(record=RecordSettings(journal=str(paths[0]), steps=str(paths[1])))
    limits = ReplicaLimits(64, BLOCK_TOKENS, 4, 32, 200)
    recording, replica = Recording(settings, limits), Replica(limits, make_stack_of(settings))
    executor = FakeExecutor(BLOCK_TOKENS)
    now_s = 100.0
    written, written_s = [1, 1], [now_s, now_s]
    request = Request("r", 8, 40, 0.0, prompt_tokens=list(range(8)), sampling=SamplingParams(temperature=0.0))
    replica.submit(request, now_s)
    recording.submitted(request, now_s)
    while (plan := replica.plan(now_s)) is not None:
        recording.planned(plan, now_s)
        now_s += STEP_S
        result = executor.execute(plan)
        events = replica.complete(plan, result, now_s)
        recording.completed(plan, result, events, StepTimes(0.0, 0.0, now_s))
        for index, path in enumerate(paths):
            if lines(path) > written[index]:
                written[index], written_s[index] = lines(path), now_s
            assert now_s - written_s[index] < FLUSH_S, "lines wait too long"
    recording.planned(None, now_s)
    assert [lines(path) for path in paths] == [1 + 1 + 2 * 40 + 1, 1 + 40], "idle: all is written"
    recording.close()
