"""Classes and tenants through HTTP on a real engine: a slot changes hands, and no text changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.server_process import ServerProcess, wait_until
from live import BODY, COMPLETIONS, StartServer, is_idle

from penstock.twin.exact import replay_journal

LOW, HIGH = {"x-gateway-inference-objective": "batch"}, {"x-gateway-inference-objective": "interactive"}
SLOTS = 1
STRICT = {
    "policies.rank": "priority",
    "policies.preempt": "priority",
    "policies.options": json.dumps({"priority": {"classes": ["interactive=-1", "batch=1"]}}),
    "replica.check_invariants_steps": 1,
}


def stream(
    server: ServerProcess, stack: ExitStack, headers: dict[str, str], max_tokens: int
) -> Iterator[str]:
    """Texts of a stream, one a chunk, as they come. Open from the call on."""
    client = stack.enter_context(server.client())
    body = {**BODY, "prompt": "Once", "max_tokens": max_tokens, "stream": True}
    answer = stack.enter_context(client.stream("POST", COMPLETIONS, json=body, headers=headers))
    assert answer.status_code == 200
    events = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {"))
    return (json.loads(event)["choices"][0]["text"] for event in events)


def whole(server: ServerProcess, headers: dict[str, str], max_tokens: int, **body: object) -> str:
    with server.client() as client:
        asked = {**BODY, "prompt": "Once", "max_tokens": max_tokens, **body}
        answer = client.post(COMPLETIONS, json=asked, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


def test_a_high_class_overtakes_at_the_slot_cap(serve: StartServer, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    settings = {**STRICT, "record.journal": str(journal)}
    server = serve("--running-max", str(SLOTS), settings=settings)
    alone = whole(server, LOW, 600)
    with ExitStack() as stack:
        texts = stream(server, stack, LOW, 600)
        begun = next(texts)
        wait_until(lambda: server.load()["requests_running"] == SLOTS, "the low class has every slot")
        whole(server, HIGH, 4)
        samples = server.metrics()
        lost = {name: value for name, value in samples.items() if "preempted_tokens_lost_total" in name}
        outranked = next(value for name, value in lost.items() if 'cause="outranked"' in name)
        assert outranked > 0, "it took the slot"
        assert begun + "".join(texts) == alone, "who yields gets the same text"
    wait_until(lambda: is_idle(server), "all have ended")
    assert server.stop() == 0, server.log
    replayed = replay_journal(journal)
    assert replayed.difference is None and replayed.ends == 3


def test_priorities_and_classes_that_nobody_reads_are_refused(serve: StartServer) -> None:
    server = serve(settings={"policies.rank": "priority", "policies.options": STRICT["policies.options"]})
    with server.client() as client:
        refused = client.post(COMPLETIONS, json=BODY, headers={"x-gateway-inference-objective": "gold"})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == "x-gateway-inference-objective" and "`batch`" in error["message"]
    assert whole(server, {}, 2, priority=-5)


def test_tenants_are_counted_under_fair_ranks(serve: StartServer, tmp_path: Path) -> None:
    for rank in ("vtc", "uwfq"):
        journal = tmp_path / f"{rank}.jsonl"
        settings = {"policies.rank": rank, "record.journal": str(journal)}
        server = serve("--running-max", "2", settings=settings)
        with ExitStack() as stack:
            tenants = [{"x-gateway-inference-fairness-id": name} for name in ("a", "b", "a", "b", "c")]
            streams = [stream(server, stack, headers, 40) for headers in tenants[:2]]
            texts = {"".join(texts) for texts in streams}
            texts |= {whole(server, headers, 40) for headers in tenants[2:]}
            assert len(texts) == 1, "the same for everybody"
        wait_until(lambda server=server: is_idle(server), "all have ended")
        samples = server.metrics()
        served = {name: value for name, value in samples.items() if "tenant_service_tokens_total" in name}
        assert sum(value for name, value in served.items() if 'kind="output"' in name) == 5 * 40
        assert server.stop() == 0, server.log
        assert replay_journal(journal).difference is None
