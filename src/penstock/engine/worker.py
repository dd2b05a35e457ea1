"""The engine process: one replica and its executor in a loop, behind a pipe.

    gateway process                          engine process
    EngineLink ── submit, cancel, close ──►  inbox ─► Replica.plan ─► TorchExecutor ─► Replica.complete
               ◄── StepReport a step ──────  events and stats

A process, not a thread: an engine step makes thousands of short torch calls, each of which would compete
with the event loop for the interpreter lock (measured by benchmarks/process.py). The loop takes its inbox
between steps, so a cancel frees its slot within one step.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import TYPE_CHECKING

from penstock.core.errors import PenstockError
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.engine.commands import StageDone, StartFailed
from penstock.engine.recording import Recording
from penstock.engine.threads import wait_briefly
from penstock.models.source import ModelSource
from penstock.policies.stack import lanes_split, make_stack_of
from penstock.replica.replica import Replica

if TYPE_CHECKING:
    from penstock.engine.build import Engine
    from penstock.engine.loop import EngineLoop


def run_engine(
    connection: Connection,
    heartbeat: Synchronized[int],
    settings: Settings,
    source: ModelSource,
    model_name: str,
) -> None:
    """Entry point of the process."""
    # The gateway decides when to stop; a Ctrl-C on the terminal reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        loop = _start(connection, heartbeat, settings, source, model_name)
    except PenstockError as error:
        connection.send(StartFailed(error))
        return
    except Exception as error:  # the starting process must learn of any failure, whatever it is
        connection.send(StartFailed(RuntimeError(f"{type(error).__name__}: {error}")))
        raise
    try:
        loop.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the gateway is gone, and with it everybody who could read an answer


def _start(
    connection: Connection,
    heartbeat: Synchronized[int],
    settings: Settings,
    source: ModelSource,
    model_name: str,
) -> EngineLoop:
    wait_briefly()
    began_s = time.perf_counter()
    from penstock.engine.build import Stages, build_engine
    from penstock.engine.laned_loop import LanedLoop
    from penstock.engine.loop import EngineLoop

    stages = Stages({"import": time.perf_counter() - began_s})
    engine = build_engine(settings, source, model_name, stages)
    recording = Recording(settings, engine.limits)
    with stages.timed("warm_up"):
        warm_up(engine, settings)
    for name, seconds in stages.seconds.items():
        connection.send(StageDone(name, seconds))
    connection.send(replace(engine.info, startup_s=stages.seconds))
    kind = LanedLoop if lanes_split(settings.policies) else EngineLoop
    return kind(connection, heartbeat, engine, settings, recording)


def warm_up(engine: Engine, settings: Settings) -> None:
    """One short request through the real path, so that the first user does not pay for first calls."""
    replica = Replica(engine.limits, make_stack_of(settings))
    prompt = [0] * min(8, engine.limits.context_len_max - 2)
    replica.submit(Request("warm-up", len(prompt), 2, 0.0, prompt_tokens=prompt), 0.0)
    while (plan := replica.plan(0.0)) is not None:
        replica.complete(plan, engine.executor.execute(plan), 0.0)
    engine.executor.reset()
