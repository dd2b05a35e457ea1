"""The engine in a thread of the gateway, or in a process of its own: what does each cost?

    python -m benchmarks.process [--rounds 2] [--write]

The same engine on the same model, behind the same gateway, under the same load from a client process; rounds
alternate. Measured: output tokens/s over the whole run, the median step, and how late the gateway's event
loop wakes up (a task that sleeps for a few milliseconds, as every stream's task waits to be run). The thread
exists only here; it is spared the pipe and the pickling that the process pays for. Few streams make short
steps, of which more is Python; many make long ones inside torch, which lets go of the interpreter lock.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastapi import FastAPI

from benchmarks.results import describe_machine, write_section
from penstock.core.events import ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.core.settings import GatewaySettings, ReplicaSettings, Settings
from penstock.engine.link import EngineLink
from penstock.engine.threads import wait_briefly
from penstock.gateway.app import create_app
from penstock.gateway.server import GatewayServer, bind, url_of
from penstock.models.catalogue import resolve
from penstock.models.chat import ChatTemplate
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer
from penstock.policies.stack import make_stack_of
from penstock.replica.messages import Advice, ReplicaDied, ReplicaInfo, ReplicaLink, StepReport
from penstock.replica.replica import Replica

MODEL = "smollm2-135m-instruct"
KV_MEMORY = "512MiB"
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128
STREAMS = (4, 32)
FIRST_PROMPT_ID = 1000
PROBE_S = 0.005
IDLE_S = 0.25

Report = Callable[[StepReport | ReplicaDied], None]


class ThreadLink:
    """A `ReplicaLink` to an engine in a thread: no pipe and no pickling, but one interpreter lock."""

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        # Not before `wait_briefly`, which has to come before torch.
        from penstock.engine.build import Stages, build_engine

        self._engine = build_engine(settings, source, source.name, Stages())
        self._replica = Replica(self._engine.limits, make_stack_of(settings))
        self._commands: deque[Request | tuple[str, CancelReason]] = deque()
        self._wake = threading.Event()
        self._callback: Report | None = None
        self._turns = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> ReplicaInfo:
        return self._engine.info

    def on_report(self, callback: Report) -> None:
        self._callback = callback
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._commands.append(request)
        self._wake.set()

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        self._commands.append((request_id, reason))
        self._wake.set()

    def advise(self, advice: Advice) -> None:
        raise NotImplementedError("nothing here pins KV")

    def heartbeat(self) -> int:
        return self._turns

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, timeout_s: float) -> None:
        self._is_closed = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        assert self._callback is not None
        while not self._is_closed:
            self._turns += 1
            if not self._replica.has_work:
                self._wake.wait(IDLE_S)
            self._wake.clear()
            events = self._obey()
            plan = self._replica.plan(time.monotonic())
            if plan is not None:
                result = self._engine.executor.execute(plan)
                events += self._replica.complete(plan, result, time.monotonic())
            if events:
                self._callback(StepReport(events, replace(self._replica.stats())))

    def _obey(self) -> list[ReplicaEvent]:
        events: list[ReplicaEvent] = []
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                self._replica.submit(command, time.monotonic())
            else:
                finished = self._replica.cancel(*command, time.monotonic())
                events += [finished] if finished is not None else []
        return events


class Tap:
    """Passes everything on to a link and back, and notes the steps that go by."""

    def __init__(self, link: ReplicaLink) -> None:
        self._link = link
        self.info = link.info
        self.submit, self.cancel = link.submit, link.cancel
        self.heartbeat, self.is_alive, self.close = link.heartbeat, link.is_alive, link.close
        self.tokens = 0
        self.steps_s: list[float] = []
        self.reports_s: list[float] = []

    def on_report(self, callback: Report) -> None:
        def note(report: StepReport | ReplicaDied) -> None:
            if isinstance(report, StepReport):
                self.tokens += sum(isinstance(event, TokenOut) for event in report.events)
                self.steps_s.append(report.stats.step_s)
                self.reports_s.append(time.monotonic())
            callback(report)

        self._link.on_report(note)


@dataclass(frozen=True)
class Measured:
    tokens_per_s: float
    step_ms: float
    loop_late_p50_ms: float
    loop_late_p99_ms: float
    loop_late_most_ms: float


class ProbedServer(GatewayServer):
    """The gateway's server, with a task on its loop that notes how late it wakes up."""

    def __init__(self, app: FastAPI, settings: GatewaySettings) -> None:
        super().__init__(app, settings)
        self.late_s: list[float] = []
        self._probe: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._probe = asyncio.get_running_loop().create_task(self._measure_lateness())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert self._probe is not None
        self._probe.cancel()
        await super().shutdown(sockets)

    async def _measure_lateness(self) -> None:
        while True:
            due_s = time.monotonic() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self.late_s.append(time.monotonic() - due_s)


def measure(link: ReplicaLink, source: ModelSource, settings: Settings, streams: int) -> Measured:
    """Serve one load. Takes the link over: it is closed at the end."""
    tap = Tap(link)
    tokenizer = Tokenizer.load(source)
    app = create_app(tap, tokenizer, ChatTemplate.load(source, tokenizer), settings)
    sock = bind("127.0.0.1", 0)
    server = ProbedServer(app, settings.gateway)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    command = [sys.executable, "-m", "benchmarks.gateway_clients", url_of(sock), source.name, "data: "]
    numbers = [str(number) for number in (FIRST_PROMPT_ID, streams, OUTPUT_TOKENS, PROMPT_TOKENS)]
    try:
        subprocess.run([*command, *numbers], stdout=subprocess.DEVNULL, check=True)
    finally:
        server.should_exit = True
        thread.join()
        link.close(5.0)
        sock.close()
    assert tap.tokens == streams * OUTPUT_TOKENS, "every token was made"
    late_ms = sorted(seconds * 1e3 for seconds in server.late_s)
    return Measured(
        tokens_per_s=tap.tokens / (tap.reports_s[-1] - tap.reports_s[0]),
        step_ms=statistics.median(tap.steps_s) * 1e3,
        loop_late_p50_ms=late_ms[len(late_ms) // 2],
        loop_late_p99_ms=late_ms[int(0.99 * len(late_ms))],
        loop_late_most_ms=late_ms[-1],
    )


def in_thread(settings: Settings, source: ModelSource) -> ReplicaLink:
    return ThreadLink(settings, source)


def in_process(settings: Settings, source: ModelSource) -> ReplicaLink:
    link = EngineLink(settings, source, source.name)
    link.wait_ready()
    return link


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    source = resolve(MODEL)
    settings = Settings(replica=ReplicaSettings(kv_memory=KV_MEMORY), gateway=GatewaySettings(port=0))
    makers = {"thread": in_thread, "process": in_process}
    found: dict[tuple[int, str], list[Measured]] = {
        (streams, name): [] for streams in STREAMS for name in makers
    }
    for number in range(arguments.rounds):
        for (streams, name), rounds in found.items():
            rounds.append(measure(makers[name](settings, source), source, settings, streams))
            print(f"round {number} {streams} streams, {name}: {rounds[-1]}", flush=True)
    text = table(found)
    print("\n" + text)
    if arguments.write:
        command = f"python -m benchmarks.process --rounds {arguments.rounds} --write"
        write_section("process", f"{describe_machine()}\n\n`{command}`\n\n{text}")
    return 0


def table(found: dict[tuple[int, str], list[Measured]]) -> str:
    """Medians over the rounds; the latest wake-up of them all."""
    lines = [
        f"| streams of {PROMPT_TOKENS} in, {OUTPUT_TOKENS} out | engine in a | out tok/s | step p50, ms "
        "| loop late p50, ms | p99, ms | most, ms |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (streams, name), rounds in found.items():
        cells = (
            f"{statistics.median(m.tokens_per_s for m in rounds):.0f}",
            f"{statistics.median(m.step_ms for m in rounds):.1f}",
            f"{statistics.median(m.loop_late_p50_ms for m in rounds):.2f}",
            f"{statistics.median(m.loop_late_p99_ms for m in rounds):.1f}",
            f"{max(m.loop_late_most_ms for m in rounds):.1f}",
        )
        lines.append(f"| {streams} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    wait_briefly()  # as the engine process does; before torch is loaded
    sys.exit(main())
