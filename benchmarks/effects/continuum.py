"""Continuum: agents keep their KV while their tools run, for a computed time to live (card continuum)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.effects._agents import AgentsServed, serve_agents
from benchmarks.effects._live_agents import Agent, AgentsRun, RealTime, make_agents, run_agents
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import BLOCK_TOKENS, TOKEN_IDS, live_engine
from benchmarks.effects.serving import azure_lengths, limits, poisson, serve, settings_of
from penstock.core.settings import Settings
from penstock.policies.stack import make_stack_of
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica
from penstock.workloads.charts import Chart, Series
from penstock.workloads.programs import TOOLS, ProgramShape, program_rows
from penstock.workloads.trace import TraceRow

# The card's tests have a pool of 60k tokens on a slower model of the GPU: its prompts take about 1.6 times
# ours to compute again. A larger pool makes memory cheaper by as much as computing is.
KV_TOKENS = 72_000
PROGRAMS = 250
RATE_PER_S = 10.0
RESULT_TOKENS = (200, 900)  # so that as many tokens are computed again under LRU as in the card's run
SLOW_FRAC = 0.1
CHAT_RPS = 8.0
CHAT_KV_TOKENS = 50_000


def programs(count: int, slow_frac: float = 0.0, **shape: object) -> list[TraceRow]:
    """About ten turns each, prompts from 2.5k to 4.5k tokens, all arriving within half a minute."""
    tools = [replace(tool, slow_frac=slow_frac) for tool in TOOLS]
    drawn = ProgramShape(count, RATE_PER_S, tools, result_tokens=RESULT_TOKENS)
    return list(program_rows(replace(drawn, **shape)))  # type: ignore[arg-type]


def with_rule(rule: str, **policies: str) -> Settings:
    return settings_of("continuum", f'[policies.options.continuum]\nrule = "{rule}"\n', **policies)


def run(rows: Sequence[TraceRow], settings: Settings) -> AgentsServed:
    return serve_agents(rows, settings, limits(KV_TOKENS))


def job_chart(title: str, subtitle: str, runs: dict[str, tuple[str, AgentsServed]]) -> Chart:
    """Quantiles of job times; `runs`: name → tone and result."""
    fractions = [i / 20 for i in range(1, 20)]
    series = [
        Series(name, tone, [float(np.quantile(list(served.job_s.values()), at)) for at in fractions])
        for name, (tone, served) in runs.items()
    ]
    return Chart(title, subtitle, fractions, series, lambda x: f"{x:.0%}", lambda y: f"{y:.0f} s")


def slow_tools() -> Measured:
    """The card's test 2: one tool call in ten takes 10 to 60 s.

    Its comparison of the rules is made at full size, that of pins without end with LRU on 60 programs.
    """
    rows = programs(PROGRAMS, SLOW_FRAC)
    mean, cdf = run(rows, with_rule("mean")), run(rows, with_rule("cdf"))
    few = programs(60, SLOW_FRAC)
    lru, forever = run(few, settings_of("sarathi")), run(few, with_rule("forever"))
    return Measured(
        f"mean job {mean.mean_job_s:.0f} s with the mean rule → {cdf.mean_job_s:.0f} s with the CDF rule; "
        f"computed again {mean.recomputed_tokens / 1e6:.1f} → {cdf.recomputed_tokens / 1e6:.1f} M tokens",
        (
            Claim("mean job time, CDF rule / mean rule", cdf.mean_job_s / mean.mean_job_s, high=0.95),
            Claim(
                "tokens computed again, CDF rule / mean rule",
                cdf.recomputed_tokens / mean.recomputed_tokens,
                high=0.65,
            ),
            Claim("mean job time, pinned for ever / LRU", forever.mean_job_s / lru.mean_job_s, low=1.0),
        ),
        (
            job_chart(
                "Job time",
                "quantiles over 250 programs, one tool call in ten slow",
                {"mean rule": ("s1", mean), "CDF rule": ("s2", cdf)},
            ),
        ),
    )


def no_returns() -> Measured:
    """Chat of one turn a session: nobody comes back, and what is pinned is only in the way."""
    load = poisson(azure_lengths()[:1200], CHAT_RPS)
    chats = [
        replace(
            request,
            session_id=request.id,
            block_keys=[f"{request.id}/{block}".encode() for block in range(request.total_len_max // 16)],
        )
        for request in load.requests
    ]
    ttft_s = []
    for retain in ("lru", "continuum"):
        served = serve(
            replace(load, requests=chats), settings_of("continuum", retain=retain), limits(CHAT_KV_TOKENS)
        )
        ttft_s.append(float(np.mean(served.values("ttft_s"))))
    lru_s, pinned_s = ttft_s
    return Measured(
        f"mean TTFT of single turns {lru_s:.2f} → {pinned_s:.2f} s",
        (Claim("mean TTFT, continuum / LRU", pinned_s / lru_s, low=1.05),),
    )


def overload() -> Measured:
    """The card's test 1: 250 programs at once. LRU and FCFS by turn against the whole preset.

    KV for 72,000 tokens instead of 60,000: computing a prompt again is cheaper here than on the card's GPU.
    """
    rows = programs(PROGRAMS)
    lru, preset = run(rows, settings_of("sarathi")), run(rows, with_rule("cdf"))
    few = programs(24)
    by_turn, by_program = run(few, with_rule("cdf", rank="fcfs")), run(few, with_rule("cdf"))
    return Measured(
        f"mean job {lru.mean_job_s:.0f} → {preset.mean_job_s:.0f} s; "
        f"computed again {lru.recomputed_tokens / 1e6:.1f} → {preset.recomputed_tokens / 1e6:.1f} M tokens",
        (
            Claim(
                "mean job time, preset / FCFS by turn + LRU", preset.mean_job_s / lru.mean_job_s, high=0.75
            ),
            Claim(
                "tokens computed again, preset / LRU",
                preset.recomputed_tokens / lru.recomputed_tokens,
                high=0.3,
            ),
            Claim(
                "mean job time, pins with FCFS by program / with FCFS by turn (24 programs)",
                by_program.mean_job_s / by_turn.mean_job_s,
                high=0.75,
            ),
        ),
        (
            job_chart(
                "Job time",
                "quantiles over 250 programs",
                {"FCFS by turn, LRU": ("s1", lru), "preset continuum": ("s2", preset)},
            ),
        ),
    )


def uneven_programs() -> Measured:
    """Geometric numbers of turns: by turn the many short programs pass the few long ones, by program not."""
    rows = programs(120, turns_mean=10.0)
    by_turn = run(rows, settings_of("continuum", rank="fcfs", retain="lru"))
    by_program = run(rows, settings_of("continuum", retain="lru"))
    return Measured(
        f"mean job {by_turn.mean_job_s:.0f} → {by_program.mean_job_s:.0f} s",
        (Claim("mean job time, by program / by turn", by_program.mean_job_s / by_turn.mean_job_s, low=1.05),),
    )


def last_turns() -> tuple[AgentsServed, AgentsServed]:
    """Six programs of six turns beside sixty of one long answer, under both policies of `preempt`."""
    shape: dict[str, object] = {"prompt_tokens": (100, 200), "result_tokens": (50, 200)}
    rows = programs(6, turns=(6, 6), output_tokens=(300, 600), **shape)
    rows += [apart(row) for row in programs(60, turns=(1, 1), output_tokens=(500, 1500), **shape)]
    rows.sort(key=lambda row: row.arrival_s)
    sizes = limits(12_000)
    youngest = serve_agents(rows, settings_of("continuum", preempt="youngest-recompute"), sizes)
    return youngest, serve_agents(rows, settings_of("continuum"), sizes)


def apart(row: TraceRow) -> TraceRow:
    """The same turn of another program: a name and content of its own."""
    hashes, output_hashes = row.block_hashes or (), row.output_block_hashes or ()
    return replace(
        row,
        session_id=f"single-{row.session_id}",
        block_hashes=tuple(each + (1 << 60) for each in hashes),
        output_block_hashes=tuple(each + (1 << 60) for each in output_hashes),
    )


def last_turns_spared() -> Measured:
    """Decodes outgrow the pool: who is on the last turn leaves for good, and is let finish."""
    youngest, program = last_turns()
    return Measured(
        f"mean job {youngest.mean_job_s:.1f} → {program.mean_job_s:.1f} s; "
        f"preemptions {youngest.stats.preemptions_total} → {program.stats.preemptions_total}",
        (
            Claim("mean job time, program / youngest", program.mean_job_s / youngest.mean_job_s, high=0.9),
            Claim(
                "preemptions, program / youngest",
                program.stats.preemptions_total / youngest.stats.preemptions_total,
                high=0.8,
            ),
        ),
        (
            job_chart(
                "Job time",
                "quantiles over 66 programs",
                {"youngest-recompute": ("s1", youngest), "program": ("s2", program)},
            ),
        ),
    )


def long_programs_pay() -> Measured:
    """In the same load the programs of many turns wait for last turns of programs that came later."""
    jobs_s = [
        float(np.mean([s for name, s in served.job_s.items() if name.startswith("program-")]))
        for served in last_turns()
    ]
    return Measured(
        f"mean job of the programs of six turns {jobs_s[0]:.1f} → {jobs_s[1]:.1f} s",
        (Claim("mean job of six turns, program / youngest", jobs_s[1] / jobs_s[0], low=1.05),),
    )


def sleeping_tools() -> Measured:
    """The card's test 3: 12 programs of 6 turns, tools that sleep 0.2 s, a pool for 6 contexts."""
    turns, prompt, result, output = 6, 256, 32, 16
    context = prompt + (turns - 1) * (result + output) + output
    sizes = limits(6 * context, kv_block_tokens=BLOCK_TOKENS, running_max=12, context_len_max=1024)
    runs = []
    for preset in ("sarathi", "continuum"):
        agents = make_agents(12, turns, prompt, result, output, tool_s=0.2, ids=TOKEN_IDS)
        runs.append(_live(agents, sizes, settings_of(preset)))
    lru, pinned = runs
    return Measured(
        f"returning turns that find all their KV {lru.hit_frac:.0%} → {pinned.hit_frac:.0%}; "
        f"mean job {lru.mean_job_s:.1f} → {pinned.mean_job_s:.1f} s; outputs equal",
        (
            Claim("turns that find their KV under LRU", lru.hit_frac, high=0.4),
            Claim("turns that find their KV with pins", pinned.hit_frac, low=0.8),
            _differing(lru, pinned),
        ),
    )


def by_program_live() -> Measured:
    """SmolLM2-135M: 9 programs of 4 turns, tools that answer at once, a pool for 3 contexts and no pins."""
    turns, prompt, result, output = 4, 160, 16, 4
    context = prompt + (turns - 1) * (result + output) + output
    sizes = limits(3 * context + BLOCK_TOKENS, running_max=3, context_len_max=1024)
    runs = []
    for rank in ("fcfs", "program-fcfs"):
        agents = make_agents(9, turns, prompt, result, output, tool_s=0.0, ids=TOKEN_IDS)
        runs.append(_live(agents, sizes, settings_of("continuum", rank=rank, retain="lru")))
    by_turn, by_program = runs
    return Measured(
        f"returning turns that find all their KV {by_turn.hit_frac:.0%} → {by_program.hit_frac:.0%}; "
        f"mean job {by_turn.mean_job_s:.1f} → {by_program.mean_job_s:.1f} s; outputs equal",
        (
            Claim("turns that find their KV, by turn", by_turn.hit_frac, high=0.2),
            Claim("turns that find their KV, by program", by_program.hit_frac, low=0.8),
            Claim(
                "mean job time, by program / by turn", by_program.mean_job_s / by_turn.mean_job_s, high=0.75
            ),
            _differing(by_turn, by_program),
        ),
    )


def last_turns_live() -> Measured:
    """SmolLM2-135M: 6 programs of 3 turns beside 16 of one long answer, in KV for nine of those."""
    runs = []
    for preempt in ("youngest-recompute", "program"):
        agents = make_agents(22, 3, 64, 24, 96, tool_s=0.0, ids=TOKEN_IDS)[:6]
        singles = make_agents(22, 1, 32, 0, 128, tool_s=0.0, ids=TOKEN_IDS)[6:]
        agents += [replace(single, name=f"single-{single.name}") for single in singles]  # behind the others
        sizes = limits(1_500, context_len_max=1024)
        runs.append(_live(agents, sizes, settings_of("continuum", preempt=preempt)))
    youngest, program = runs
    spared = [each.last_turns_preempted for each in runs]
    return Measured(
        f"mean job {youngest.mean_job_s:.1f} → {program.mean_job_s:.1f} s; last turns preempted {spared[0]} "
        f"→ {spared[1]} times; outputs equal",
        (
            Claim("mean job time, program / youngest", program.mean_job_s / youngest.mean_job_s, high=0.9),
            Claim("last turns preempted, youngest", spared[0], low=12),
            Claim("the same, program / youngest", spared[1] / spared[0], high=0.6),
            _differing(youngest, program),
        ),
    )


def _live(agents: Sequence[Agent], sizes: ReplicaLimits, settings: Settings) -> AgentsRun:
    """On the real CPU engine, and in real time."""
    executor = live_engine().executor
    try:
        return run_agents(executor, Replica(sizes, make_stack_of(settings)), agents, RealTime())
    finally:
        executor.reset()


def _differing(before: AgentsRun, after: AgentsRun) -> Claim:
    outputs = before.outputs
    return Claim("outputs that differ", sum(outputs[name] != after.outputs[name] for name in outputs), high=0)


EFFECTS = (
    Effect(
        "retain",
        "continuum",
        "with slow tool calls in between, job time ≤ 0.95× and ≤ 0.65× the tokens computed again of the mean "
        "rule; pins for ever are worse than LRU (card continuum, test 2)",
        slow_tools,
        no_returns,
        sleeping_tools,
        settings={"preset": "continuum"},
    ),
    Effect(
        "rank",
        "program-fcfs",
        "as the preset `continuum`: job time ≤ 0.75× and tokens computed again ≤ 0.3× of FCFS by turn with "
        "LRU (card continuum, test 1)",
        overload,
        uneven_programs,
        by_program_live,
        settings={"preset": "continuum"},
    ),
    Effect(
        "preempt",
        "program",
        "last turns are spared, and their memory comes back for good (public preview of Continuum; no number "
        "is published)",
        last_turns_spared,
        long_programs_pay,
        last_turns_live,
        settings={"preset": "continuum"},
    ),
)
