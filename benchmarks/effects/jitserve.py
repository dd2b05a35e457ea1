"""JITServe: service goodput of chats, jobs with deadlines, and programs, in overload (card jitserve)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import LiveServed, serve_live
from benchmarks.effects.serving import Ended, Load, Served, azure_lengths, limits, serve, settings_of
from penstock.core.request import Request
from penstock.policies.rank.jitserve import JitServe
from penstock.policies.view import SequenceView
from penstock.workloads.charts import Chart, Series

KV_TOKENS = 400_000
CAPACITY_RPS = 21.0  # beyond it the queue grows under any policy: 512 tokens a step
OVERLOAD, HALF = 1.3, 0.5
SPAN_S = 40.0  # of arrivals
NOISES = (0.3, 0.6, 1.0)  # sigma of a lognormal factor on every prediction
OUTPUT_MAX, JOB_FACTOR, CALLS = 1024, 3, 3
PROMISES = """
[desk]
queue_requests_max = 65536
queue_wait_s_max = 1e6
queue_tokens_max = 1000000000
[slo.chat]
ttft_p99_ms = 2000
tpot_p99_ms = 100
[slo.job]
e2e_p99_ms = 20000
[slo.program]
e2e_p99_ms = 20000
"""
STACKS = {
    "fcfs": {"rank": "fcfs"},
    "edf": {"rank": "edf", "preempt": "priority"},
    "jitserve": {"rank": "jitserve", "preempt": "priority"},
}


@cache
def mixed(rate_rps: float) -> Load:
    """Chats, jobs with answers three times as long, and programs of three calls at once, a third each.

    Lengths are drawn from the Azure conversation trace; 1024 tokens are asked for throughout.
    """
    draw, lengths, now_s = random.Random("jitserve"), azure_lengths(), 0.0
    requests: list[Request] = []
    outputs: dict[str, int] = {}
    while now_s < SPAN_S:
        kind = draw.choice(("chat", "job", "program"))
        calls = CALLS if kind == "program" else 1
        now_s += draw.expovariate(rate_rps) * calls
        program = f"p{len(requests)}" if kind == "program" else None
        for _ in range(calls):
            prompt, output = draw.choice(lengths)
            name = f"r{len(requests)}"
            requests.append(Request(name, prompt, OUTPUT_MAX, now_s, slo_class=kind, program_id=program))
            outputs[name] = min(OUTPUT_MAX, output * (JOB_FACTOR if kind == "job" else 1))
    return Load(requests, outputs)


def run(rate_rps: float, stack: str) -> Served:
    return serve(mixed(rate_rps), settings_of(file=PROMISES, **STACKS[stack]), limits(KV_TOKENS))


def goodput_frac(load: Load, served: Ended, file: str = PROMISES) -> float:
    """Weighted tokens that count, of all: a prompt's 1, an output's 8; of a program all or nothing."""
    slos = settings_of(file=file).slo
    met: dict[str, bool] = {}
    for each in load.requests:
        whole = each.program_id or each.id
        met[whole] = met.get(whole, True) and served.outcomes[each.id].meets(slos[each.slo_class])
    worths = {
        each.id: each.prompt_len + 8 * load.output_lens.get(each.id, each.max_output_tokens)
        for each in load.requests
    }
    counted = sum(worths[each.id] for each in load.requests if met[each.program_id or each.id])
    return counted / sum(worths.values())


@contextmanager
def noisy_beliefs(sigma: float) -> Iterator[None]:
    """Every prediction is off by a factor, the same for all predictions of one request."""
    exact = JitServe._totals

    def totals(self: JitServe, sequence: SequenceView, produced: int) -> list[int]:
        factor = float(np.exp(sigma * random.Random(sequence.request.id).gauss(0.0, 1.0)))
        low, high = produced + 1, sequence.request.max_output_tokens
        return [min(max(int(total * factor), low), high) for total in exact(self, sequence, produced)]

    JitServe._totals = totals  # type: ignore[method-assign]
    try:
        yield
    finally:
        JitServe._totals = exact  # type: ignore[method-assign]


def wins() -> Measured:
    """Card tests 1 and 2: Llama-3-8B on an H100; chats, jobs, programs at 1.3 times capacity and at half."""
    full, half = OVERLOAD * CAPACITY_RPS, HALF * CAPACITY_RPS
    at_full = {name: goodput_frac(mixed(full), run(full, name)) for name in STACKS}
    at_half = {name: goodput_frac(mixed(half), run(half, name)) for name in STACKS}
    noisy = []
    for sigma in NOISES:
        with noisy_beliefs(sigma):
            noisy.append(goodput_frac(mixed(full), run(full, "jitserve")))
    falls = [before - after for before, after in zip([at_full["jitserve"], *noisy], noisy, strict=False)]
    fcfs, edf, ours = at_full.values()
    return Measured(
        f"goodput {fcfs:.0%} (fcfs), {edf:.0%} (edf) → {ours:.0%} of the tokens at {OVERLOAD}× capacity; "
        f"{noisy[-1]:.0%} with predictions off by σ = {NOISES[-1]:g}",
        (
            Claim("goodput in overload, jitserve / fcfs", ours / fcfs, low=1.3),
            Claim("goodput in overload, jitserve / edf", ours / edf, low=1.15),
            Claim(
                "goodput at half load, worst / best", min(at_half.values()) / max(at_half.values()), low=0.97
            ),
            Claim("least fall of goodput from one noise to the next", min(falls), low=0.01),
            Claim("goodput with the most noise, jitserve / fcfs", noisy[-1] / fcfs, low=1.0),
        ),
        (_noise_chart(fcfs, edf, [ours, *noisy]),),
    )


def _noise_chart(fcfs: float, edf: float, ours: Sequence[float]) -> Chart:
    xs = [0.0, *NOISES]
    return Chart(
        "Goodput by error of the predicted lengths",
        f"% of the weighted tokens, at {OVERLOAD} times capacity; σ of a lognormal factor",
        xs,
        [
            Series("jitserve", "s1", [each * 100 for each in ours]),
            Series("edf", "s2", [edf * 100] * len(xs)),
            Series("fcfs", "s3", [fcfs * 100] * len(xs)),
        ],
        lambda x: f"{x:.1f}",
        lambda y: f"{y:.0f} %",
    )


def live() -> Measured:
    """SmolLM2-135M, 4 slots: 5 jobs and 5 programs of 3 calls at once, then 36 chats one after the other.

    In the time T that FCFS takes where all come at once, jobs and programs are due after 0.3 T; a chat comes
    every T / 50, and its first token is due after 0.15 T. Chats alone could all be in time.
    """
    sizes = limits(16_384, running_max=4)
    base = serve_live(_flood(0.0), settings_of(), sizes)
    file = _promises_of(base)
    load = _flood(base.makespan_s)
    goodput = {
        name: goodput_frac(load, serve_live(load, settings_of(file=file, **stack), sizes), file)
        for name, stack in STACKS.items()
    }
    fcfs, edf, ours = goodput.values()
    return Measured(
        f"goodput {fcfs:.0%} (fcfs), {edf:.0%} (edf) → {ours:.0%} of the weighted tokens",
        (
            Claim("goodput, jitserve less fcfs", ours - fcfs, low=0.1),
            Claim("goodput, jitserve less edf", ours - edf, low=0.1),
        ),
    )


def _flood(all_s: float) -> Load:
    requests = []
    for index in range(5):
        requests.append(Request(f"j{index}", 32, 36, 0.0, slo_class="job"))
        requests += [
            Request(f"p{index}-{call}", 32, 12, 0.0, slo_class="program", program_id=f"p{index}")
            for call in range(CALLS)
        ]
    for index in range(36):
        requests.append(Request(f"c{index}", 32, 12, all_s * (0.05 + index / 50), slo_class="chat"))
    return Load(requests)


def _promises_of(base: LiveServed) -> str:
    """Targets in shares of its time, and frames of ten steps: the whole load takes some 200."""
    all_ms = 1e3 * base.makespan_s
    return f"""
[slo.chat]
ttft_p99_ms = {0.15 * all_ms}
tpot_p99_ms = {4 * all_ms / base.steps}
[slo.job]
e2e_p99_ms = {0.3 * all_ms}
[slo.program]
e2e_p99_ms = {0.3 * all_ms}
[policies.options.jitserve]
schedule_steps = 10
schedule_ms = 60000
"""


def loses() -> Measured:
    """The same overload: what cannot be in time waits until there is room, however long that takes."""
    full = OVERLOAD * CAPACITY_RPS
    waits = [float(run(full, name).values("ttft_s").max()) for name in ("fcfs", "jitserve")]
    return Measured(
        f"longest wait for a first token {waits[0]:.0f} → {waits[1]:.0f} s",
        (Claim("longest wait, jitserve / fcfs", waits[1] / waits[0], low=1.5),),
    )


EFFECTS = (
    Effect(
        "rank",
        "jitserve",
        "≥ 1.3× the goodput of Sarathi with FCFS and ≥ 1.15× that of EDF at 1.3× capacity, no harm at half "
        "load, and less the worse lengths are predicted (card jitserve)",
        wins,
        loses,
        live,
        settings={"preempt": "priority"},
    ),
)
