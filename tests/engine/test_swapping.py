"""KV through host memory on real tensors: what comes back is what left, whatever runs beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.effects._conversations import Conversation, Talked, Turn, talk
from tiny_model import Source, TinyEngine, write_tiny_llama

from penstock.core.events import ReplicaEvent
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import Copy, Direction, StepPlan, StepResult
from penstock.engine.host_kv import HostKV
from penstock.engine.kv_store import KVStore
from penstock.policies.context import ServiceTerms
from penstock.policies.stack import make_stack
from penstock.replica.journal import Journal, header
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica
from penstock.twin.exact import replay_journal

CONVERSATIONS = [Conversation(0.0, [Turn(280, 10), Turn(20, 10)]) for _ in range(8)]
POOL, HOST = 66, 240  # blocks: three conversations, and all of them
LIMITS = ReplicaLimits(POOL, 16, 12, 256, 512, prefix_cache=False, kv_block_bytes=1000)
EXTENTS = {"beside": False, "reuse": False}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return TinyEngine(write_tiny_llama(tmp_path_factory.mktemp("tiny")), torch.float32, "paged-cpu")


def run(engine: TinyEngine, preempt: str, options: dict[str, Any], **changes: Any) -> Talked:
    """Priorities are drawn again every 6 steps."""
    policies = PolicySettings(
        rank="fastswitch",
        preempt=preempt,
        options={"fastswitch": {"mode": "random", "interval_steps": 6, **options}},
    )
    bytes_per_s = changes.pop("bytes_per_s", None)
    limits = replace(LIMITS, **{"host_kv_blocks": HOST, **changes})
    executor = engine.executor(POOL, host_blocks=limits.host_kv_blocks, bytes_per_s=bytes_per_s)
    return talk(Replica(limits, make_stack(policies)), executor, CONVERSATIONS, vocab=128)


@pytest.fixture(scope="module")
def recomputed(engine: TinyEngine) -> Talked:
    return run(engine, "youngest-recompute", {}, host_kv_blocks=0)


def test_answers_do_not_depend_on_swaps(engine: TinyEngine, recomputed: Talked) -> None:
    """Blocks against runs: the same bytes in far fewer copies; kept copies: far fewer bytes."""
    blocks = run(engine, "swap", {})
    runs = run(engine, "fastswitch", EXTENTS, kv_group_tokens=960)
    kept = run(engine, "fastswitch", {"beside": False, "turns": False}, kv_group_tokens=960)
    for each in (blocks, runs, kept):
        assert each.answers == recomputed.answers
    assert blocks.stats.swaps_total == runs.stats.swaps_total and blocks.stats.swaps_total["out"] > 10
    assert blocks.stats.swap_bytes_total == runs.stats.swap_bytes_total
    assert blocks.stats.swap_copies_total == blocks.stats.swap_blocks_total
    for way in ("out", "in"):
        assert blocks.stats.swap_copies_total[way] >= 8 * runs.stats.swap_copies_total[way]
    assert kept.stats.swap_bytes_total["out"] <= 0.6 * runs.stats.swap_bytes_total["out"]


@pytest.mark.parametrize("bytes_per_s", [None, 3e6])
def test_copies_beside_steps(engine: TinyEngine, recomputed: Talked, bytes_per_s: float | None) -> None:
    """Also with a link so slow that copies take many steps."""
    beside = run(engine, "fastswitch", {"batch_min": 1}, kv_group_tokens=960, bytes_per_s=bytes_per_s)
    assert beside.answers == recomputed.answers
    assert min(beside.stats.swaps_total.values()) >= 5 and beside.stats.swap_copies_total["in"] > 0


def test_a_small_host_loses_ends_and_no_token(engine: TinyEngine, recomputed: Talked) -> None:
    """Card test 3: less host memory, less that need not be copied or computed again; answers stay."""
    reused = []
    for host in (HOST, 60, 20):
        talked = run(engine, "fastswitch", {"beside": False}, kv_group_tokens=960, host_kv_blocks=host)
        assert talked.answers == recomputed.answers
        reused.append(talked.stats.swap_bytes_total["in"])
    assert reused == sorted(reused, reverse=True) and reused[0] > reused[-1]


class Broken(HostKV):
    """Every other copy to the host fails."""

    def _make(self, copy: Copy, mark: object) -> float:
        if copy.direction is Direction.OUT and copy.copy_id % 2:
            raise OSError("the link is down")
        return super()._make(copy, mark)


def test_what_was_not_copied_is_computed_again(engine: TinyEngine, recomputed: Talked) -> None:
    executor = engine.executor(POOL)
    executor.use_host(Broken(executor.store, HOST))
    options = {"fastswitch": {"mode": "random", "interval_steps": 6, "batch_min": 1}}
    policies = PolicySettings(rank="fastswitch", preempt="fastswitch", options=options)
    limits = replace(LIMITS, host_kv_blocks=HOST, kv_group_tokens=960)
    talked = talk(Replica(limits, make_stack(policies)), executor, CONVERSATIONS, vocab=128)
    assert talked.answers == recomputed.answers and talked.stats.swap_failures_total > 2


class Told(Replica):
    """Writes every call into a journal, as the engine process does."""

    def record(self, policies: PolicySettings, path: Path) -> Told:
        self._lines = [header(self.limits, policies, ServiceTerms())]
        self._journal = Journal(self.block_tokens, b"salt", self._lines.append)
        self._path = path
        return self

    def submit(self, request: Request, now_s: float) -> None:
        super().submit(request, now_s)
        self._journal.submitted(request, now_s)

    def plan(self, now_s: float) -> StepPlan | None:
        plan = super().plan(now_s)
        self._journal.planned(plan, now_s)
        self._path.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        return plan

    def complete(self, plan: StepPlan, result: StepResult, now_s: float) -> list[ReplicaEvent]:
        events = super().complete(plan, result, now_s)
        self._journal.completed(result, events, now_s)
        return events


@pytest.mark.pure
def test_the_twin_follows_copies_that_took_their_time(engine: TinyEngine, tmp_path: Path) -> None:
    """When a copy is done is the machine's affair; the journal says it, and the plans are the same."""
    options = {"fastswitch": {"mode": "random", "interval_steps": 6, "batch_min": 1}}
    policies = PolicySettings(rank="fastswitch", preempt="fastswitch", options=options)
    limits = replace(LIMITS, host_kv_blocks=HOST, kv_group_tokens=960)
    executor = engine.executor(POOL, host_blocks=HOST, bytes_per_s=2e7)
    path = tmp_path / "journal.jsonl"
    replica = Told(limits, make_stack(policies)).record(policies, path)
    stats = talk(replica, executor, CONVERSATIONS[:6], vocab=128).stats
    replayed = replay_journal(path)
    assert replayed.difference is None, str(replayed.difference)
    assert replayed.plans > 20 and min(stats.swaps_total.values()) > 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    index = next(number for number, line in enumerate(lines) if line.get("copied"))
    lines[index]["copied"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay_journal(path).difference is not None, "a copy that is not told of changes the plans"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_of_pages_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    source: Source = write_tiny_llama(tmp_path / "tiny")
    engine = TinyEngine(source, torch.float32, "torch")
    store = KVStore(engine.model.config, 12, 16, dtype, torch.device("cpu"))
    store.k.normal_()
    store.v.normal_()
    wanted = [pages[:, 3:8].clone() for pages in (store.k, store.v)]
    host = HostKV(store, 9)
    host.begin([Copy(0, 0, Direction.OUT, ((3, 4, 5),))])
    host.wait([0])
    for pages in (store.k, store.v):
        pages.zero_()
    host.begin([Copy(1, 0, Direction.IN, ((0, 7, 2), (9, 4, 3)))])
    host.wait([1])
    for pages, before in zip((store.k, store.v), wanted, strict=True):
        assert torch.equal(pages[:, 9:12], before[:, :3]) and torch.equal(pages[:, 0:2], before[:, 3:])
        assert not pages[:, 2:9].any()
    assert [done.copy_id for done in host.take()] == [0, 1] and host.take() == []
