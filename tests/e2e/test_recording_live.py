"""A server that records everything: its files are read by what is said to read them, and agree with it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from benchmarks.server_process import PENSTOCK, START_TIMEOUT_S, environment
from live import CHAT, COMPLETIONS, StartServer
from recorded import ConstantCost

from penstock.core.metrics import RequestOutcome
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits
from penstock.twin.exact import replay_journal
from penstock.twin.simulate import simulate
from penstock.workloads.source import open_trace

TALK = [{"role": "user", "content": "Tell me of the river and of the mill, and of the miller. " * 4}]
BODY = {"model": "tiny", "temperature": 0, "ignore_eos": True, "session_id": "alice"}


def test_what_is_recorded_is_read_and_simulated(serve: StartServer, tmp_path: Path) -> None:
    log, journal, steps = (tmp_path / name for name in ("log.jsonl", "journal.jsonl", "steps.jsonl"))
    server = serve("--record", str(log), "--journal", str(journal), "--step-trace", str(steps))
    cached = []
    with server.client() as client:
        prompt: list[int] = client.post("/tokenize", json={"model": "tiny", "messages": TALK}).json()[
            "tokens"
        ]
        for _ in range(3):  # each turn's prompt is the last one and a few words
            body = {**BODY, "prompt": prompt, "max_tokens": 40}
            answer = client.post(COMPLETIONS, json=body).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            text = client.post("/tokenize", json={"model": "tiny", "prompt": "and then?"}).json()["tokens"]
            prompt = [*prompt, *text]
        chat = {**BODY, "messages": TALK, "max_tokens": 8, "n": 2}
        assert client.post(CHAT, json=chat).status_code == 200
        stop_at_once = {
            **BODY,
            "prompt": "x",
            "max_tokens": 5,
            "stop_token_ids": [70],
            "logit_bias": {"70": 100},
        }
        assert client.post(COMPLETIONS, json=stop_at_once).status_code == 200
        too_long = client.post(COMPLETIONS, json={**BODY, "prompt": "x " * 20_000, "max_tokens": 1})
        assert too_long.status_code == 400
    metrics = server.metrics()
    assert server.stop() == 0, server.log
    rows = list(open_trace(log))
    assert len(rows) == 6 and not any(row.failed for row in rows)
    assert sum(value for name, value in metrics.items() if 'result="written"' in name) >= 4
    assert [row.turn for row in rows] == [0, 1, 2, 3, 4, 5] and len({row.session_id for row in rows}) == 1
    assert rows[-1].output_tokens == 1, "a stop token was drawn, though it is not told"
    text = log.read_text()
    assert "river" not in text and "alice" not in text and 'tokens": [' not in text

    replayed = replay_journal(journal)
    assert replayed.difference is None and replayed.ends == 6, str(replayed.difference)
    records = [json.loads(line) for line in steps.read_text().splitlines()[1:]]
    assert len(records) == replayed.plans

    outcomes: list[RequestOutcome] = []
    limits = ReplicaLimits(
        kv_blocks=server.info["kv_blocks"],
        kv_block_tokens=server.info["kv_block_tokens"],
        running_max=server.info["running_max"],
        step_tokens_max=server.info["step_tokens_max"],
        context_len_max=server.info["context_len_max"],
    )
    simulate(rows, Settings(), limits, ConstantCost(), outcomes.append)
    by_arrival = sorted(outcomes, key=lambda outcome: outcome.arrival_s)
    assert [outcome.cached_tokens for outcome in by_arrival[:3]] == cached, (
        "the twin finds what the server found"
    )


def test_a_server_measures_its_drift_from_a_profile_of_its_own_steps(
    serve: StartServer, tmp_path: Path
) -> None:
    steps, profile = tmp_path / "steps.jsonl", tmp_path / "profile.toml"
    body = {**BODY, "prompt": "one and two and three", "max_tokens": 60}
    server = serve("--step-trace", str(steps))
    with server.client() as client:
        assert client.post(COMPLETIONS, json=body).status_code == 200
    assert not any("twin_error_frac{" in name for name in server.metrics()), "there is no profile yet"
    assert server.stop() == 0
    command = [*PENSTOCK, "calibrate", "--from-steps", str(steps), "--out", str(profile)]
    subprocess.run(command, env=environment({}), check=True, timeout=START_TIMEOUT_S, capture_output=True)
    server = serve("--profile", str(profile))
    with server.client() as client:
        assert client.post(COMPLETIONS, json=body).status_code == 200
    errors = {name: value for name, value in server.metrics().items() if "twin_error_frac" in name}
    assert server.stop() == 0
    signed, absolute = (
        next(value for name, value in errors.items() if f'kind="{kind}"' in name)
        for kind in ("signed", "absolute")
    )
    assert -1 < signed <= absolute and absolute > 0


@pytest.mark.parametrize("flag", ["--record", "--journal"])
def test_a_file_that_cannot_be_written_is_told_before_serving(
    tiny_folder: Path, tmp_path: Path, flag: str
) -> None:
    command = [*PENSTOCK, "serve", "--model", str(tiny_folder), "--port", "0", "--kv-memory", "4MiB"]
    done = subprocess.run(
        [*command, flag, str(tmp_path / "missing" / "file")],
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode == 3 and "cannot be written" in done.stderr, done.stderr
