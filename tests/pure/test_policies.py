"""The registry, and each first policy's decision on hand-made replicas."""

from __future__ import annotations

from dataclasses import Field, fields, replace
from typing import Any

import pytest
from fake_executor import make_replica

from penstock.core.config import default_of
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
    assert "slot `compose`" in str(caught.value)
    assert caught.value.hint == "Did you mean `sarathi`? Run `penstock policies` for the list."


def test_something_quite_different_gets_the_list() -> None:
    with pytest.raises(ConfigError, match=r"`prefill-first`, `sarathi`, .*`\. Run"):
        REGISTRIES["compose"].make("zzz")


def test_a_typo_in_an_option_gets_the_nearest_or_the_list() -> None:
    for key, hint in (
        ("knee_token", "Did you mean `knee_tokens`?"),
        ("x", "Known: `budget_rule`, `knee_tokens`."),
    ):
        with pytest.raises(ConfigError) as caught:
            make_stack(PolicySettings(options={"splitfuse": {key: 1}}))
        assert caught.value.hint == hint
    with pytest.raises(ConfigError, match="has no options"):
        make_stack(PolicySettings(options={"fcfs": {"key": 1}}))


NUMBERS = [
    (slot, entry.name, item)
    for slot, registry in REGISTRIES.items()
    for entry in registry.entries()
    for item in fields(entry.options)
    if isinstance(default_of(item), int | float) and not isinstance(default_of(item), bool)
]


@pytest.mark.parametrize(("slot", "name", "item"), NUMBERS, ids=lambda each: getattr(each, "name", each))
def test_a_number_out_of_bounds_is_refused_also_of_a_policy_that_the_stack_leaves_out(
    slot: str, name: str, item: Field[Any]
) -> None:
    low, high = item.metadata["low"], item.metadata["high"]
    assert low is not None and high is not None and low <= default_of(item) <= high
    beyond = [low - 1, low - 1e-9, high + 1, high * (1 + 1e-9), 365 * 86_400e9, -1, "-1e18"]
    for stack in (PolicySettings(), PolicySettings(**{slot: name})):
        for value in (*beyond, "nan", float("nan"), float("inf"), "-inf", True, None, [1], 10**400):
            with pytest.raises(ConfigError, match=rf"`policies\.options\.{name}\.{item.name}`"):
                make_stack(replace(stack, options={name: {item.name: value}}))
        for value in (low, high):
            make_stack(replace(stack, options={name: {item.name: value}}))


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("ms-budget", {"target_ms": "nan"}, "must be finite"),
        ("continuum", {"pin_s_max": 365 * 86_400.0}, "from 0 to 86400"),
        ("continuum", {"rule": "always"}, "cdf, mean, forever"),
        ("fastswitch", {"mode": "luck"}, "least-served, random, markov"),
        ("fastswitch", {"beside": "perhaps"}, "true or false"),
        ("priority", {"classes": ["batch"]}, "NAME=NUMBER"),
        ("priority", {"classes": 5}, "list of strings"),
        ("prefix-group", {"batch_class": 5}, "must be a string"),
        ("splitfuse", {"budget_rule": "knee"}, "knee_tokens"),
    ],
)
def test_options_of_a_policy_that_the_stack_leaves_out_must_be_right(
    name: str, table: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_stack(PolicySettings(options={name: table}))
    assert f"policies.options.{name}" in str(caught.value)


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
