"""Continuum on a real engine, in virtual time (card continuum, test 3): turns find their KV, answers stay."""

from __future__ import annotations

import pytest
import torch
from benchmarks.effects._live_agents import AgentsRun, VirtualTime, make_agents, run_agents
from tiny_model import TinyEngine, write_tiny_llama

from penstock.core.settings import PolicySettings
from penstock.policies.stack import load_preset, make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

AGENTS, TURNS, PROMPT, RESULT, OUTPUT = 12, 6, 40, 10, 6
CONTEXT = PROMPT + (TURNS - 1) * (RESULT + OUTPUT) + OUTPUT
BLOCK_TOKENS = 16
KV_BLOCKS = 6 * CONTEXT // BLOCK_TOKENS


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), sliding_window=None)
    return TinyEngine(folder, torch.float32, "torch")


def run(engine: TinyEngine, preset: str, kv_blocks: int = KV_BLOCKS) -> AgentsRun:
    policies = PolicySettings(**load_preset(preset)["policies"])
    replica = Replica(ReplicaLimits(kv_blocks, BLOCK_TOKENS, 12, 64, 512), make_stack(policies))
    agents = make_agents(AGENTS, TURNS, PROMPT, RESULT, OUTPUT, tool_s=0.2, ids=(3, 128))
    return run_agents(
        engine.executor(kv_blocks), replica, agents, VirtualTime(0.02), replica.check_invariants
    )


@pytest.fixture(scope="module")
def lru(engine: TinyEngine) -> AgentsRun:
    return run(engine, "sarathi")


def test_returning_turns_find_their_kv_and_the_answers_are_the_same(
    engine: TinyEngine, lru: AgentsRun
) -> None:
    pinned = run(engine, "continuum")
    assert len(pinned.outputs) == AGENTS * TURNS
    assert pinned.outputs == lru.outputs
    assert pinned.hit_frac >= 0.8
    assert lru.hit_frac <= 0.4
    assert pinned.stats.pins == 0, "the last turns leave nothing"


def test_many_pins_in_a_small_pool_never_stall(engine: TinyEngine, lru: AgentsRun) -> None:
    assert run(engine, "continuum", KV_BLOCKS // 3).outputs == lru.outputs
