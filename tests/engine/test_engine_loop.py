"""When a step fails or hangs: everybody is answered, the engine begins anew, and the heartbeat tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from engine_thread import TINY_REPLICA, WAIT_S, EngineThread
from tiny_model import Source, write_tiny_llama

from penstock.core.config import resolve
from penstock.core.events import Finished, TokenOut
from penstock.core.reasons import FinishReason
from penstock.core.request import Request, SamplingParams
from penstock.core.step import StepResult
from penstock.engine.commands import Submit
from penstock.engine.executor import StepWork
from penstock.engine.loop import FAILURES_MAX
from penstock.policies.stack import load_preset

SETTINGS = f"{TINY_REPLICA}[policies.options.static]\ndecode_frac = 1.0\n"
REQUEST = Request(
    "a", 30, 200, 0.0, prompt_tokens=list(range(3, 33)), sampling=SamplingParams(temperature=0.0)
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=["none", "static"])
def engine(request: pytest.FixtureRequest, tiny: Source) -> Iterator[EngineThread]:
    flags = {"policies.lanes": request.param}
    settings = resolve(
        file_text=SETTINGS, file_name="test", environ={}, flags=flags, load_preset=load_preset
    ).settings
    with closing(EngineThread(settings, tiny)) as engine:
        yield engine


def ends_of(engine: EngineThread, wanted: set[str]) -> dict[str, Finished]:
    ends: dict[str, Finished] = {}
    while set(ends) != wanted:
        assert engine.connection.poll(WAIT_S), "the engine is silent"
        events = engine.connection.recv().events
        ends |= {event.request_id: event for event in events if isinstance(event, Finished)}
    return ends


def wait_for_tokens(engine: EngineThread, request_id: str) -> None:
    while True:
        assert engine.connection.poll(WAIT_S), "the engine is silent"
        events = engine.connection.recv().events
        if any(isinstance(event, TokenOut) and event.request_id == request_id for event in events):
            return


Compute = Callable[[StepWork], StepResult]


def intercept(engine: EngineThread, before: Callable[[StepWork], None]) -> Compute:
    """`before` runs ahead of every step's computing."""
    executor = engine.loop._engine.executor
    compute: Compute = executor.compute

    def intercepted(work: StepWork) -> StepResult:
        before(work)
        return compute(work)

    executor.compute = intercepted  # type: ignore[method-assign]
    return compute


def test_a_step_that_fails_ends_what_runs_and_the_next_request_is_served(engine: EngineThread) -> None:
    engine.connection.send(Submit(REQUEST))
    wait_for_tokens(engine, "a")
    fails = [True]

    def fail_once(work: StepWork) -> None:
        if fails and len(work.token_ids) > 1:
            fails.clear()
            raise RuntimeError("out of memory")

    intercept(engine, fail_once)
    engine.connection.send(Submit(replace(REQUEST, id="b")))
    ends = ends_of(engine, {"a", "b"})
    assert {end.reason for end in ends.values()} == {FinishReason.FAILED}
    assert "RuntimeError" in ends["b"].detail
    engine.connection.send(Submit(replace(REQUEST, id="c")))
    assert ends_of(engine, {"c"})["c"].output_tokens == REQUEST.max_output_tokens


def test_an_engine_whose_steps_fail_again_and_again_gives_itself_up(engine: EngineThread) -> None:
    def fail(work: StepWork) -> None:
        raise RuntimeError("out of memory")

    intercept(engine, fail)
    for number in range(FAILURES_MAX):
        engine.connection.send(Submit(replace(REQUEST, id=f"r{number}")))
        assert ends_of(engine, {f"r{number}"})
    engine._thread.join(WAIT_S)
    assert [str(error) for error in engine.failed] == ["out of memory"]


def test_the_heart_stands_still_while_a_step_hangs_also_beside_a_lane_that_goes_on(
    engine: EngineThread,
) -> None:
    engine.connection.send(Submit(REQUEST))
    wait_for_tokens(engine, "a")
    hangs, goes_on = threading.Event(), threading.Event()

    def hang_on_prompts(work: StepWork) -> None:
        if len(work.token_ids) > 1:
            hangs.set()
            assert goes_on.wait(WAIT_S)

    intercept(engine, hang_on_prompts)
    engine.connection.send(Submit(replace(REQUEST, id="b")))
    assert hangs.wait(WAIT_S)
    if engine.loop._settings.policies.lanes != "none":
        assert ends_of(engine, {"a"})["a"].reason is FinishReason.LENGTH
    beats = engine.heartbeat.value
    time.sleep(0.6)  # an idle loop turns twice in that time
    assert engine.heartbeat.value <= beats + 1
    goes_on.set()
    assert ends_of(engine, {"b"} if engine.loop._settings.policies.lanes != "none" else {"a", "b"})
