"""A load through one replica of the twin, for scenarios: the whole path, the desk included."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.config import resolve
from penstock.core.metrics import RequestOutcome
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.models.catalogue import resolve_config
from penstock.policies.stack import load_preset
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.twin.costs.hardware import load_engine, load_hardware
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec
from penstock.twin.laned import make_twin
from penstock.twin.replica import PathCosts, TwinReplica

DATA = Path(__file__).parents[3] / "shared" / "data"
AZURE = DATA / "azure_llm" / "AzureLLMInferenceTrace_conv_2023.csv.gz"
LLAMA_3_8B = resolve_config(str(Path(__file__).parents[1] / "models" / "llama-3-8b"))
NO_PATH = PathCosts(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival, and after how many tokens each output ends by itself.

    A request that is not in `output_lens` runs to its `max_output_tokens`, which policies may read; true
    lengths they may not.
    """

    requests: Sequence[Request]
    output_lens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """Outcomes by request id, in the twin or live, and the replica's counters at the end."""

    outcomes: dict[str, RequestOutcome]
    stats: ReplicaStats

    @property
    def makespan_s(self) -> float:
        return max(outcome.finish_s for outcome in self.outcomes.values())

    @property
    def preemptions(self) -> int:
        return self.stats.preemptions_total

    @property
    def lost_tokens(self) -> int:
        """Computed again."""
        return sum(self.stats.preempted_tokens_total.values())

    @property
    def hit_frac(self) -> float:
        """Share of the prompt tokens that were found in the prefix index."""
        return self.stats.prefix_hit_tokens_total / max(1, self.stats.prefix_query_tokens_total)

    def values(self, field_name: str, ids: Sequence[str] | None = None) -> np.ndarray:
        """`ttft_s`, `tpot_s` or `e2e_s` of the requests (all of them by default) that have one."""
        chosen = self.outcomes.values() if ids is None else (self.outcomes[each] for each in ids)
        found = [getattr(outcome, field_name) for outcome in chosen]
        return np.array([value for value in found if value is not None])

    def gaps_s(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """Every gap between consecutive tokens."""
        chosen = self.outcomes.values() if ids is None else (self.outcomes[each] for each in ids)
        return np.concatenate([np.fromiter(outcome.itl_s, float) for outcome in chosen])


@dataclass(frozen=True)
class Served(Ended):
    """And the replica as it stands at the end."""

    twin: TwinReplica


def limits(kv_tokens: int, **changes: Any) -> ReplicaLimits:
    """A replica of 16-token blocks, 256 slots and a budget of 512 tokens, unless changed."""
    sizes: dict[str, Any] = {
        "kv_blocks": kv_tokens // 16,
        "kv_block_tokens": 16,
        "running_max": 256,
        "step_tokens_max": 512,
        "context_len_max": 131_072,
    }
    return ReplicaLimits(**(sizes | changes))


@cache
def llama_8b(hardware: str = "h100-sxm", engine: str = "vllm-2025") -> CostModel:
    """Llama-3-8B's shape on one GPU, by the roofline."""
    return RooflineCostModel(ModelSpec.of(LLAMA_3_8B), load_hardware(hardware), load_engine(engine))


def settings_of(preset: str = "sarathi", file: str = "", **policies: str) -> Settings:
    """A preset, single policies over it, and perhaps the text of a settings file (options, SLOs, tenants)."""
    flags = {"preset": preset, **{f"policies.{slot}": name for slot, name in policies.items()}}
    found = resolve(file_text=file, file_name="scenario", environ={}, flags=flags, load_preset=load_preset)
    return found.settings


def serve(
    load: Load,
    settings: Settings,
    sizes: ReplicaLimits,
    cost: CostModel | None = None,
    *,
    each_step: Callable[[TwinReplica], None] | None = None,
    path: PathCosts = NO_PATH,
) -> Served:
    """Every request to its end, in virtual time. `each_step` may look at the replica after every plan."""
    outcomes: dict[str, RequestOutcome] = {}

    def ended(outcome: RequestOutcome) -> None:
        outcomes[outcome.request_id] = outcome

    twin = make_twin(settings, sizes, cost or llama_8b(), path, ended)
    twin.output_lens.update(load.output_lens)
    for request in load.requests:
        if each_step is not None:
            _advance(twin, request.arrival_s, each_step)
        twin.arrive(request)
    while each_step is not None and len(outcomes) < len(load.requests):
        twin.proceed(float("inf"))
        each_step(twin)
    twin.finish()
    twin.replica.check_invariants()
    assert len(outcomes) == len(load.requests), "every request ends once"
    return Served(outcomes, twin.replica.stats(), twin)


def _advance(twin: TwinReplica, until_s: float, each_step: Callable[[TwinReplica], None]) -> None:
    while twin.now_s < until_s:
        twin.proceed(until_s)
        each_step(twin)


@cache
def azure_lengths() -> tuple[tuple[int, int], ...]:
    """(prompt, output) tokens of the public Azure conversation trace of 2023, in order."""
    with gzip.open(AZURE, "rt") as file:
        return tuple(
            (int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))) for row in csv.DictReader(file)
        )


def poisson(lengths: Sequence[tuple[int, int]], rate_rps: float, seed: int = 1, **hints: Any) -> Load:
    """Requests of these lengths with independent arrivals; outputs run to their maximum."""
    draw, now_s, requests = random.Random(f"arrivals/{seed}"), 0.0, []
    for index, (prompt, output) in enumerate(lengths):
        now_s += draw.expovariate(rate_rps)
        requests.append(Request(f"r{index}", prompt, output, now_s, **hints))
    return Load(requests)
