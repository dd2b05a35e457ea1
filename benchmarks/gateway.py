"""What the gateway adds to a token: from the engine's report to the bytes at the client.

    python -m benchmarks.gateway [--streams 256] [--tokens 200] [--write]

The gateway runs here with all of its parts, in front of a replica that emits at a fixed pace and remembers
when; the clients are one other process, which notes when bytes arrive (both read the same monotonic clock).
Two paces of the same 256 streams at 20 tokens/s each:

- spread: tokens come evenly over time. What one token costs, and whether the gateway keeps up.
- lock-step: all streams advance in one step, as one engine's do. The last of 256 tokens waits for the other
  255 to be written, so this is a measure of throughput: half the step's writing time is the median.

Budget: 1 ms at p50 and 3 ms at p99, spread. The first tokens of each stream are left out as warm-up.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.paced_link import PacedLink
from benchmarks.results import describe_machine, write_section
from penstock.core.events import ReplicaEvent, TokenOut
from penstock.core.settings import GatewaySettings, Settings
from penstock.gateway.app import create_app
from penstock.gateway.server import GatewayServer, bind, url_of
from penstock.models.catalogue import resolve
from penstock.models.chat import ChatTemplate
from penstock.models.tokenizer import Tokenizer
from penstock.replica.messages import ReplicaInfo, ReplicaStats, StepReport

MODEL = "smollm2-135m-instruct"
PERIOD_S = 0.05
SPREAD_GROUPS = 50  # one every millisecond
WARM_UP_TOKENS = 10
BUDGET_P50_MS, BUDGET_P99_MS = 1.0, 3.0
MARK = "~"  # the one token that is emitted: nowhere else in a stream, so counting it counts tokens
FIRST_PROMPT_ID, PROMPT_TOKENS = 1000, 1  # stream i sends [FIRST_PROMPT_ID + i], which tells whose it is


@dataclass(frozen=True)
class Measured:
    """Milliseconds a token, report to client; and what the process used meanwhile."""

    p50_ms: float
    p99_ms: float
    most_ms: float
    enter_p50_ms: float  # from the client's sending of a request to the engine's having it
    tokens_per_s: float
    cpu_frac: float


def measure(streams: int, tokens: int, groups: int) -> Measured:
    source = resolve(MODEL)
    tokenizer = Tokenizer.load(source)
    (mark_id,) = tokenizer.encode(MARK, add_special=False, parse_special=False)
    link = PacedLink(replica_info(streams), mark_id, PERIOD_S, groups)
    settings = Settings(gateway=GatewaySettings(port=0))
    app = create_app(link, tokenizer, ChatTemplate.load(source, tokenizer), settings)
    sock = bind("127.0.0.1", 0)
    server = GatewayServer(app, settings.gateway)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        arrived = run_clients(url_of(sock), streams, tokens)
        cpu_frac = (time.process_time() - began_cpu_s) / (time.monotonic() - began_s)
    finally:
        server.should_exit = True
        thread.join()
        link.close(5.0)
        sock.close()
    return compare(link, arrived, tokens, cpu_frac)


def replica_info(streams: int) -> ReplicaInfo:
    return ReplicaInfo(
        engine="0",
        model=MODEL,
        context_len_max=8192,
        kv_block_tokens=16,
        kv_blocks=1 << 16,
        kv_bytes=1 << 30,
        weights_bytes=1 << 28,
        running_max=streams,
        step_tokens_max=512,
        device="cpu",
        dtype="bfloat16",
        policies={"rank": "fcfs"},
    )


def run_clients(url: str, streams: int, tokens: int) -> dict[int, dict[str, list[float]]]:
    """Stream number → {"sent": [when], "tokens": [when each arrived]}, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gateway_clients", url, MODEL, MARK]
    numbers = [str(number) for number in (FIRST_PROMPT_ID, streams, tokens, PROMPT_TOKENS)]
    done = subprocess.run([*command, *numbers], stdout=subprocess.PIPE, check=True)
    return {int(number): times for number, times in json.loads(done.stdout).items()}


def compare(
    link: PacedLink, arrived: dict[int, dict[str, list[float]]], tokens: int, cpu_frac: float
) -> Measured:
    added_ms: list[float] = []
    enter_ms: list[float] = []
    first_s, last_s = float("inf"), 0.0
    for emitted in link.emitted:
        (prompt_id,) = emitted.request.prompt_tokens or ()
        times = arrived[prompt_id - FIRST_PROMPT_ID]
        assert len(times["tokens"]) == len(emitted.tokens_s) == tokens, "every token arrived"
        pairs = zip(emitted.tokens_s, times["tokens"], strict=True)
        added_ms += [(got_s - sent_s) * 1e3 for sent_s, got_s in list(pairs)[WARM_UP_TOKENS:]]
        enter_ms.append((emitted.submitted_s - times["sent"][0]) * 1e3)
        first_s, last_s = min(first_s, emitted.tokens_s[0]), max(last_s, emitted.tokens_s[-1])
    added_ms.sort()
    return Measured(
        p50_ms=added_ms[len(added_ms) // 2],
        p99_ms=added_ms[int(0.99 * len(added_ms))],
        most_ms=added_ms[-1],
        enter_p50_ms=statistics.median(enter_ms),
        tokens_per_s=len(link.emitted) * tokens / (last_s - first_s),
        cpu_frac=cpu_frac,
    )


def unpickle_us(tokens: int) -> float:
    """What reading a report of so many tokens off an engine process's pipe costs, without the pipe."""
    events: list[ReplicaEvent] = [TokenOut(f"cmpl-{number:032x}-0", 1.0, number) for number in range(tokens)]
    data = pickle.dumps(StepReport(events, ReplicaStats()))
    rounds = 200
    began_s = time.perf_counter()
    for _ in range(rounds):
        pickle.loads(data)
    return (time.perf_counter() - began_s) / rounds * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    found = {
        name: measure(arguments.streams, arguments.tokens, groups)
        for name, groups in (("spread", SPREAD_GROUPS), ("lock-step", 1))
    }
    text = table(found, arguments.streams)
    print(text)
    if arguments.write:
        command = f"python -m benchmarks.gateway --streams {arguments.streams} --tokens {arguments.tokens}"
        write_section("gateway", f"{describe_machine()}\n\n`{command} --write`\n\n{text}")
    spread = found["spread"]
    return 0 if spread.p50_ms <= BUDGET_P50_MS and spread.p99_ms <= BUDGET_P99_MS else 1


def table(found: dict[str, Measured], streams: int) -> str:
    lines = [
        f"| {streams} streams | added p50, ms | p99, ms | most, ms | request in p50, ms | tok/s | CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, m in found.items():
        cells: Sequence[str] = (
            f"{m.p50_ms:.2f}",
            f"{m.p99_ms:.2f}",
            f"{m.most_ms:.1f}",
            f"{m.enter_p50_ms:.1f}",
            f"{m.tokens_per_s:.0f}",
            f"{m.cpu_frac:.0%}",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Budget, spread: {BUDGET_P50_MS:g} ms at p50, {BUDGET_P99_MS:g} ms at p99. All streams are opened",
        "at once, which is what `request in` shows. To unpickle an engine process's report of as many tokens",
        f"takes another {unpickle_us(streams):.0f} µs.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
