"""The registry, and each first policy's decision on hand-made replicas."""

from __future__ import annotations

import pytest
from fake_executor import make_replica

from penstock.core.errors import ConfigError
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.policies.registry import Registry
from penstock.policies.retain import RETAIN
from penstock.policies.stack import REGISTRIES, make_stack


def test_a_name_is_registered_once() -> None:
    registry: Registry[object] = Registry("toy")

    @registry.register("a", source="here")
    class A:
        """One."""

    with pytest.raises(ValueError, match="already registered"):
        registry.register("a", source="here")(A)


def test_a_typo_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        make_stack(PolicySettings(compose="sarahti"))
    assert "slot `compose`" in str(caught.value) and "Did you mean `sarathi`" in str(caught.value)


def test_something_quite_different_gets_the_list() -> None:
    with pytest.raises(ConfigError, match="`prefill-first`, `sarathi`"):
        REGISTRIES["compose"].make("zzz")


def test_every_policy_says_what_it_does_and_where_it_comes_from() -> None:
    for registry in REGISTRIES.values():
        for entry in registry.entries():
            assert entry.summary.endswith(".") and entry.source


def test_stacks_share_no_state() -> None:
    one, other = make_stack(PolicySettings()), make_stack(PolicySettings())
    assert one.retain is not other.retain


def test_lru_drops_what_was_unused_longest() -> None:
    lru, request = RETAIN.make("lru"), Request("a", 1, 1, 0.0)
    for block in (1, 2, 3):
        lru.parked(block, request, 0.0)
    lru.revived(1)
    lru.parked(1, request, 1.0)
    assert [lru.victim(2.0) for _ in range(3)] == [2, 3, 1] and len(lru) == 0


def test_whole_prompt_keeps_a_watermark_only_while_others_run() -> None:
    replica = make_replica(kv_blocks=200)
    big = Request("big", 800, 1, 0.0, prompt_tokens=[1] * 800)  # all 200 blocks
    with pytest.raises(Exception, match="context"):
        replica.submit(big, 0.0)
    replica = make_replica(kv_blocks=200, context_len_max=1000)
    replica.submit(Request("big", 800, 1, 0.0, prompt_tokens=[1] * 800), 0.0)
    plan = replica.plan(0.0)
    assert plan is not None and plan.starts[0].total_len == 800
