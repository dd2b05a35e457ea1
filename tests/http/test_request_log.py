"""The gateway tells its recorder of every end, once, with all tokens that were drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fake_link import FakeLink, make_info
from fakes import EOS
from served import WAIT_S, Running, make_settings
from test_metrics import scrape

from penstock.core.reasons import FinishReason
from penstock.workloads.recording import RequestLog
from penstock.workloads.source import open_trace

CHAT = "/v1/chat/completions"


def body(text: str, **fields: object) -> dict[str, object]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 9, **fields}


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_every_end_is_a_row(serve: Callable[..., Running], tmp_path: Path) -> None:
    link = FakeLink(
        step_s=0.01,
        info=make_info(running_max=2),
        scripts={b"stop early": [97, 98, EOS, 99]},
        fail_on=b"break",
    )
    log = RequestLog(tmp_path / "log", 16)
    settings = make_settings(desk={"queue_requests_max": 0, "engine_ahead": 0})
    running = serve(settings, link, recorder=log)
    http = running.http()
    assert http.post(CHAT, json=body("plain", n=2)).status_code == 200
    running.wait_idle()
    assert http.post(CHAT, json=body("stop early", session_id="s")).status_code == 200
    assert http.post(CHAT, json=body("break")).status_code == 500
    running.wait_idle()
    stream = running.openai().chat.completions.create(**body("leave", max_tokens=2000), n=2, stream=True)  # type: ignore[call-overload]
    next(iter(stream))
    assert http.post(CHAT, json=body("no room")).status_code == 503
    stream.close()
    running.wait_idle()
    log.close(WAIT_S)  # the call that found no room was refused untokenised: it has no length, and no row
    rows = rows_of(tmp_path / "log")
    outcomes = [row["outcome"] for row in rows]
    assert sorted(map(str, outcomes)) == sorted(
        ["length", "length", "stop", "failed", "cancelled", "cancelled"]
    )
    (stopped,) = (row for row in rows if row["outcome"] == FinishReason.STOP)
    assert stopped["output_tokens"] == 3, "the stop token was drawn as well"
    values = scrape(running)
    assert values["penstock:request_log_rows_total written"] == len(running.outcomes) == 6
    assert values["penstock:request_log_rows_total dropped"] == 0
    assert sum(not row.failed for row in open_trace(tmp_path / "log")) == 3
