"""BatchLLM: an offline job planned as a whole, run group by group, steps filled by memory (card batchllm)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import LiveServed, same_outputs, serve_live
from benchmarks.effects.serving import Load, Served, azure_lengths, limits, poisson, serve, settings_of
from penstock.core.request import Request
from penstock.desk.job_plan import JobPlan, JobPlanner
from penstock.twin.replica import TwinReplica
from penstock.workloads.charts import Chart, Series

BLOCK = 16
# A job arrives at once, and waits for as long as it takes.
PATIENT = "[desk]\nqueue_requests_max = 100000\nqueue_tokens_max = 1000000000\nqueue_wait_s_max = 1e9\n"
VOCAB = 50_000
Prompts = Sequence[Sequence[int]]

DOCUMENTS, QUESTIONS = 100, 20
PREFIX_TOKENS, SUFFIX_TOKENS, OUTPUT_TOKENS = 2000, 200, 10
KV_TOKENS = 60_000


def _tokens(draw: random.Random, count: int) -> list[int]:
    return draw.choices(range(VOCAB), k=count)


@cache
def documents_job() -> Prompts:
    """Twenty questions about each of a hundred documents, shuffled."""
    draw = random.Random("batchllm/documents")
    documents = [_tokens(draw, PREFIX_TOKENS) for _ in range(DOCUMENTS)]
    prompts = [document + _tokens(draw, SUFFIX_TOKENS) for document in documents for _ in range(QUESTIONS)]
    draw.shuffle(prompts)
    return prompts


def as_given(prompts: Prompts, outputs: Sequence[int]) -> Load:
    """The job in the order of its file, to a server that does not plan."""
    return Load(
        [
            Request(f"r{index}", len(prompt), output, 0.0, prompt_tokens=prompt, slo_class="batch")
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
    )


def as_planned(prompts: Prompts, outputs: Sequence[int]) -> tuple[Load, JobPlan]:
    """The same requests in the plan's order, with its groups."""
    plan = JobPlanner(BLOCK).prepare(prompts, outputs)
    requests = as_given(prompts, outputs).requests
    names = {group: f"g{index}" for index, group in enumerate(plan.groups)}
    return Load(
        [
            replace(requests[place], group_id=names[group], shared_len=group.shared_len)
            for place, group in plan.order
        ]
    ), plan


# ---- rank/prefix-group: the whole job ---------------------------------------------------------------------


def group_wins() -> Measured:
    """Card tests 1 and 2: Llama-3-8B on an H100, 100 documents × 20 questions, short answers."""
    prompts, outputs = documents_job(), [OUTPUT_TOKENS] * (DOCUMENTS * QUESTIONS)
    planned, plan = as_planned(prompts, outputs)
    alive_most = 0

    def count_alive(twin: TwinReplica) -> None:
        nonlocal alive_most
        alive = {sequence.request.group_id for sequence in twin.replica.running}
        alive_most = max(alive_most, len(alive))

    before = serve(as_given(prompts, outputs), settings_of(file=PATIENT), limits(KV_TOKENS))
    after = serve(planned, settings_of("batchllm", PATIENT), limits(KV_TOKENS), each_step=count_alive)
    bound = plan.saved_tokens / plan.prompt_tokens
    ratio = after.makespan_s / before.makespan_s
    return Measured(
        f"prompt tokens saved {before.hit_frac:.0%} → {after.hit_frac:.1%}; "
        f"makespan {before.makespan_s:.0f} → {after.makespan_s:.0f} s ({ratio:.2f}×)",
        (
            Claim("planned saving, share of the prompt tokens", bound, low=0.99 * 38_000 / 44_000),
            Claim("measured saving / planned", after.hit_frac / bound, low=0.99),
            Claim("saving over LRU, share of the prompt tokens", after.hit_frac - before.hit_frac, low=0.3),
            Claim("makespan, after / before", ratio, high=0.6),
            Claim("prefixes alive at once", alive_most, high=3.0),
            Claim("P99 TTFT of online requests beside such a job, s", _online_p99_s(), high=0.5),
        ),
        charts=(
            _progress_chart(
                "Requests finished",
                f"{DOCUMENTS} documents × {QUESTIONS} questions in one batch, KV for {KV_TOKENS:,} tokens",
                {"sarathi, in the order given": before, "batchllm, planned": after},
            ),
        ),
    )


def _online_p99_s() -> float:
    """Conversations of the Azure trace at 4 a second, while the same job, with 100 tokens an answer, runs."""
    planned, _ = as_planned(documents_job(), [100] * (DOCUMENTS * QUESTIONS))
    online = poisson(azure_lengths()[:200], 4.0).requests
    online = [replace(request, id=f"online-{request.id}") for request in online]
    load = Load(sorted([*planned.requests, *online], key=lambda request: request.arrival_s))
    served = serve(load, settings_of("batchllm", PATIENT), limits(200_000))
    return float(np.quantile(served.values("ttft_s", [request.id for request in online]), 0.99))


def _progress_chart(title: str, subtitle: str, runs: dict[str, Served]) -> Chart:
    """Requests finished by each instant."""
    end_s = max(served.makespan_s for served in runs.values())
    xs = [end_s * step / 60 for step in range(61)]
    series = []
    for tone, (name, served) in zip(("s2", "s1"), runs.items(), strict=True):
        ends_s = np.sort([outcome.finish_s for outcome in served.outcomes.values()])
        series.append(Series(name, tone, [float(np.searchsorted(ends_s, x, side="right")) for x in xs]))
    return Chart(title, subtitle, xs, series, lambda x: f"{x:.0f} s", lambda y: f"{y:.0f}")


def _keys(name: str, tokens: int) -> list[bytes]:
    return [f"{name}/{index}".encode() for index in range(tokens // BLOCK)]


def _of_group(group: str, index: int, prefix: int, own: int, output: int, at_s: float) -> Request:
    """A member known by its lengths and by the keys of its shared blocks."""
    return Request(
        f"{group}-{index}",
        prefix + own,
        output,
        at_s,
        block_keys=_keys(group, prefix),
        slo_class="batch",
        group_id=group,
        shared_len=prefix,
    )


def group_loses() -> Measured:
    """Chats in the batch class, beside groups that keep growing: the groups' later members overtake them."""
    draw = random.Random("batchllm/starved")
    requests, now_s = [], 0.0
    for index in range(900):
        now_s += draw.expovariate(26.0)
        if index % 6 == 0:
            requests.append(Request(f"chat{index}", 300, 60, now_s, slo_class="batch"))
        else:
            requests.append(_of_group(f"g{index % 5}", index, 2000, 1200, 40, now_s))
    chats = [request.id for request in requests if request.group_id is None]
    p99s = []
    for rank in ("fcfs", "prefix-group"):
        served = serve(Load(requests), settings_of(file=PATIENT, rank=rank), limits(100_000, running_max=64))
        p99s.append(float(np.quantile(served.values("ttft_s", chats), 0.99)))
    before_s, after_s = p99s
    return Measured(
        f"P99 TTFT of chats in the batch class {before_s:.2f} → {after_s:.2f} s",
        (Claim("P99 TTFT, after / before", after_s / before_s, low=1.5),),
    )


LIVE_DOCUMENTS, LIVE_QUESTIONS = 8, 12
LIVE_PREFIX, LIVE_SUFFIX, LIVE_OUTPUT = 320, 24, 12
LIVE_KV_TOKENS = 8_000


def group_live() -> Measured:
    """Card test 4: 8 documents × 12 questions on the embedded model, against the same job without sharing."""
    draw = random.Random("batchllm/live")
    documents = [_words(draw, LIVE_PREFIX) for _ in range(LIVE_DOCUMENTS)]
    prompts = [document + _words(draw, LIVE_SUFFIX) for document in documents for _ in range(LIVE_QUESTIONS)]
    draw.shuffle(prompts)
    outputs = [LIVE_OUTPUT] * len(prompts)
    planned, plan = as_planned(prompts, outputs)
    sizes = limits(LIVE_KV_TOKENS, running_max=64)
    given, settings = as_given(prompts, outputs), settings_of(file=PATIENT)
    alone: list[LiveServed] = []
    shared: list[LiveServed] = []
    for _ in range(2):  # in turn: what else runs on the machine meets both
        alone.append(serve_live(given, settings, replace(sizes, prefix_cache=False)))
        shared.append(serve_live(planned, settings_of("batchllm", PATIENT), sizes))
    ratio = min(each.makespan_s for each in shared) / min(each.makespan_s for each in alone)
    computed = [each.prompt_tokens - each.cached_tokens for each in shared[0].outcomes.values()]
    least = sum(plan.prefill_tokens(group) for group in plan.groups)
    return Measured(
        f"prompt tokens computed {plan.prompt_tokens} → {sum(computed)}, as planned; wall time {ratio:.2f}×",
        (
            Claim("prompt tokens computed, less the plan's", sum(computed) - least, low=0, high=0),
            Claim("wall time, shared / not shared", ratio, high=0.6),
            same_outputs(*alone, *shared),
        ),
    )


def _words(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(100, 40_000) for _ in range(count)]


# ---- retain/prefix-lifetime -------------------------------------------------------------------------------


def _interrupted_job() -> tuple[Load, list[str]]:
    """One long group in the background, and bursts of prompts that nobody will see again."""
    requests = [_of_group("job", index, 8000, 100, 40, 0.0) for index in range(300)]
    for burst in range(12):
        for index in range(24):
            at_s = 0.3 + 2.0 * burst + 0.01 * index
            keys = _keys(f"once{burst}-{index}", 2000)
            requests.append(Request(f"chat{burst}-{index}", 2000, 16, at_s, block_keys=keys))
    return Load(sorted(requests, key=lambda request: request.arrival_s)), [
        request.id for request in requests if request.group_id is not None
    ]


def lifetime_wins() -> Measured:
    """A group is interrupted by bursts of online traffic; its prefix is what it will ask for again."""
    load, members = _interrupted_job()
    computed, makespans_s, curves = [], [], []
    for retain in ("lru", "prefix-lifetime"):
        settings = settings_of("batchllm", PATIENT, retain=retain)
        served = serve(load, settings, limits(40_000, running_max=16))
        outcomes = [served.outcomes[member] for member in members]
        computed.append(sum(each.prompt_tokens - each.cached_tokens for each in outcomes))
        makespans_s.append(max(each.finish_s for each in outcomes))
        by_end = sorted(outcomes, key=lambda each: each.finish_s)
        curves.append(np.cumsum([each.prompt_tokens - each.cached_tokens for each in by_end]) / 1e3)
    before, after = computed
    least = 8000 + 300 * 100
    return Measured(
        f"prompt tokens the group computed, over the least: {before / least:.2f} → {after / least:.2f}×",
        (
            Claim("computed, after / least", after / least, high=1.001),
            Claim("computed, before / after", before / after, low=1.3),
            Claim("makespan of the group, after / before", makespans_s[1] / makespans_s[0], high=1.0),
        ),
        charts=(
            Chart(
                "Prompt tokens that the group computed",
                "by the number of its members that have ended; bursts of other traffic come in between",
                list(range(1, len(members) + 1)),
                [
                    Series(name, tone, [float(y) for y in curve])
                    for name, tone, curve in zip(
                        ("lru", "prefix-lifetime"), ("s2", "s1"), curves, strict=True
                    )
                ],
                lambda x: f"{x:.0f}",
                lambda y: f"{y:.0f}k",
            ),
        ),
    )


def lifetime_live() -> Measured:
    """SmolLM2-135M: a group of 16, and after every four of them ten prompts that nobody will see again.

    All wait from the start, and are served in that order, so that nothing hangs on the machine's speed.
    """
    requests: list[Request] = []
    for burst in range(4):
        names = [f"chat{burst}-{index}" for index in range(10)]
        requests += [_of_group("job", 4 * burst + index, 1280, 16, 8, 0.0) for index in range(4)]
        requests += [Request(name, 240, 2, 0.0, block_keys=_keys(name, 240)) for name in names]
    before, after = (
        serve_live(
            Load(requests),
            settings_of(file=PATIENT, rank="priority", retain=retain),
            limits(2_560, running_max=4),
        )
        for retain in ("lru", "prefix-lifetime")
    )
    members = [request.id for request in requests if request.group_id is not None]
    computed = [
        sum(each.outcomes[name].prompt_tokens - each.outcomes[name].cached_tokens for name in members)
        for each in (before, after)
    ]
    least = 1280 + 16 * len(members)
    return Measured(
        f"prompt tokens the group computed, over the least: {computed[0] / least:.2f} → "
        f"{computed[1] / least:.2f}×; outputs identical",
        (
            Claim("computed, after / least", computed[1] / least, high=1.001),
            Claim("computed, before / after", computed[0] / computed[1], low=1.5),
            same_outputs(before, after),
        ),
    )


def lifetime_loses() -> Measured:
    """Sessions that come back need the room that a large, slow group's prefix keeps."""
    requests = [_of_group("job", index, 16_000, 200, 8, 0.0) for index in range(60)]
    draw = random.Random("batchllm/sessions")
    sessions = [f"s{index}" for index in range(12)]
    for turn in range(240):
        name = draw.choice(sessions)
        requests.append(Request(f"{name}-{turn}", 1600, 30, 0.5 + 0.03 * turn, block_keys=_keys(name, 1600)))
    load = Load(sorted(requests, key=lambda request: request.arrival_s))
    turns = [request.id for request in requests if request.group_id is None]
    computed = []
    for retain in ("lru", "prefix-lifetime"):
        settings = settings_of("batchllm", PATIENT, retain=retain)
        served = serve(load, settings, limits(28_000, running_max=8))
        outcomes = [served.outcomes[turn] for turn in turns]
        computed.append(sum(each.prompt_tokens - each.cached_tokens for each in outcomes))
    before, after = computed
    return Measured(
        f"prompt tokens that sessions computed again {before} → {after}",
        (Claim("computed by sessions, after / before", after / before, low=1.1),),
    )


# ---- compose/memory-centric -------------------------------------------------------------------------------

STEP_TOKENS = 512


class _Fill:
    """How full steps were: tokens of each."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int]] = []  # (tokens in a step, how many such steps)
        self._steps = 0

    def __call__(self, twin: TwinReplica) -> None:
        steps = twin.executor.steps
        if steps > self._steps:
            self.tokens.append((twin.replica.stats().step_tokens, steps - self._steps))
            self._steps = steps

    @property
    def mean(self) -> float:
        return sum(tokens * count for tokens, count in self.tokens) / self._steps

    @property
    def sparse_frac(self) -> float:
        """Steps below a quarter of the budget."""
        return sum(count for tokens, count in self.tokens if tokens < STEP_TOKENS / 4) / self._steps


def memory_wins() -> Measured:
    """Card test 3, at 600 requests: half 4,000 in and 50 out, half 200 in and 800 out."""
    draw = random.Random("batchllm/mix")
    shapes = [(4000, 50), (200, 800)] * 300
    draw.shuffle(shapes)
    prompts = [_tokens(draw, length) for length, _ in shapes]
    outputs = [output for _, output in shapes]
    fills = _Fill(), _Fill()
    sizes = limits(400_000, running_max=64, step_tokens_max=STEP_TOKENS)
    before = serve(as_given(prompts, outputs), settings_of(file=PATIENT), sizes, each_step=fills[0])
    load, _ = as_planned(prompts, outputs)
    after = serve(
        load, settings_of("batchllm", PATIENT), replace(sizes, running_max=1024), each_step=fills[1]
    )
    ratio = after.makespan_s / before.makespan_s
    return Measured(
        f"{fills[0].mean:.0f} → {fills[1].mean:.0f} tokens a step; "
        f"makespan {before.makespan_s:.1f} → {after.makespan_s:.1f} s ({ratio:.2f}×)",
        (
            Claim("mean tokens a step, after / before", fills[1].mean / fills[0].mean, low=1.3),
            Claim(
                "share of steps below 25 % of the budget, before / after",
                fills[0].sparse_frac / max(1e-3, fills[1].sparse_frac),
                low=2.0,
            ),
            Claim("makespan, after / before", ratio, high=0.9),
            Claim("preemptions", after.preemptions, high=0),
        ),
        charts=(
            _progress_chart(
                "Requests finished",
                "half long prompts with short answers, half the other way round",
                {"random order, 64 places": before, "planned, by memory": after},
            ),
        ),
    )


def memory_loses() -> Measured:
    """Requests that allow 4,000 tokens and need 40: until it has seen that, it keeps their room free."""
    requests = [Request(f"r{index}", 500, 4000, 0.0) for index in range(200)]
    load = Load(requests, {request.id: 40 for request in requests})
    ttfts_s = []
    for compose in ("sarathi", "memory-centric"):
        served = serve(load, settings_of(file=PATIENT, compose=compose), limits(60_000))
        ttfts_s.append(float(np.mean(served.values("ttft_s"))))
    before_s, after_s = ttfts_s
    return Measured(
        f"mean TTFT {before_s:.2f} → {after_s:.2f} s",
        (Claim("mean TTFT, after / before", after_s / before_s, low=1.2),),
    )


def memory_live() -> Measured:
    """The same mix for two cores, which 64 tokens fill: eight places, and steps and KV to match.

    Half have 160 tokens in and 4 out, half 16 in and 96 out. As many places without a look at memory preempt.
    """
    draw = random.Random("batchllm/mix")
    shapes = [(160, 4), (16, 96)] * 20
    draw.shuffle(shapes)
    prompts, outputs = [_words(draw, length) for length, _ in shapes], [output for _, output in shapes]
    given, (planned, _) = as_given(prompts, outputs), as_planned(prompts, outputs)
    few = limits(1_400, running_max=8, step_tokens_max=64)
    many = replace(few, running_max=256)
    blind = serve_live(given, settings_of(file=PATIENT), many)
    before: list[LiveServed] = []
    after: list[LiveServed] = []
    for _ in range(2):  # in turn: what else runs on the machine meets both
        before.append(serve_live(given, settings_of(file=PATIENT), few))
        after.append(serve_live(planned, settings_of("batchllm", PATIENT), many))
    filled = [sum(each[0].step_rows) / each[0].steps for each in (before, after)]
    spans_s = [min(served.makespan_s for served in each) for each in (before, after)]
    preemptions = after[0].preemptions
    return Measured(
        f"{filled[0]:.0f} → {filled[1]:.0f} tokens a step; makespan {spans_s[0]:.1f} → {spans_s[1]:.1f} s "
        f"({spans_s[1] / spans_s[0]:.2f}×); preemptions by memory {preemptions}, without a look at it "
        f"{blind.preemptions}; outputs identical",
        (
            Claim("mean tokens a step, after / before", filled[1] / filled[0], low=1.3),
            Claim("makespan, after / before", spans_s[1] / spans_s[0], high=0.95),
            Claim("preemptions", preemptions, high=0),
            Claim("preemptions, as many places without a look at memory", blind.preemptions, low=3),
            same_outputs(before[0], blind, after[0]),
        ),
    )


EFFECTS = (
    Effect(
        "rank",
        "prefix-group",
        "≥ 99 % of the possible saving, makespan ≤ 0.6× of FCFS with LRU (card batchllm, our simulation)",
        group_wins,
        group_loses,
        live=group_live,
        settings={"preset": "batchllm"},
    ),
    Effect(
        "retain",
        "prefix-lifetime",
        "a prefix lives as long as its group (card batchllm; no number published)",
        lifetime_wins,
        lifetime_loses,
        live=lifetime_live,
        settings={"preset": "batchllm"},
    ),
    Effect(
        "compose",
        "memory-centric",
        "≥ 1.3× tokens a step, makespan −10 % against 64 places (card batchllm)",
        memory_wins,
        memory_loses,
        live=memory_live,
        settings={"preset": "batchllm"},
    ),
)
