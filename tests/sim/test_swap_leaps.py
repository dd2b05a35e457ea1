"""Leaping over decode steps changes nothing where KV is copied beside them (card fastswitch, in the twin)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from benchmarks.effects._conversations import chats, serve_chats
from benchmarks.effects.serving import Served, limits, llama_8b, settings_of

OPTIONS = '[policies.options.fastswitch]\nmode = "{mode}"\ninterval_steps = 25\n'


def served(mode: str, preempt: str, repeat: bool, link_gb_per_s: float) -> Served:
    file = OPTIONS.format(mode=mode) + f"[twin]\nhost_link_gb_per_s = {link_gb_per_s}\n"
    settings = settings_of("fastswitch", file, preempt=preempt)
    sizes = limits(
        12_000, running_max=24, prefix_cache=False, host_kv_blocks=2000, kv_group_tokens=960,
        kv_block_bytes=16 * 131_072, kv_layers=32,
    )  # fmt: skip
    return serve_chats(chats(40, 2.0), settings, replace(sizes, repeat=repeat), llama_8b("a10", "vllm-2024"))


def facts(run: Served) -> dict[str, Any]:
    return {
        name: (each.finish_s, each.first_token_s, each.output_tokens, list(each.itl_s))
        for name, each in run.outcomes.items()
    }


@pytest.mark.parametrize("preempt", ["swap", "fastswitch"])
@pytest.mark.parametrize("mode", ["random", "markov", "least-served"])
@pytest.mark.parametrize("link_gb_per_s", [32.0, 2.0])
def test_leaps_change_nothing(mode: str, preempt: str, link_gb_per_s: float) -> None:
    leaping, stepping = (served(mode, preempt, repeat, link_gb_per_s) for repeat in (True, False))
    assert facts(leaping) == facts(stepping)
    stats = leaping.twin.replica.stats()
    assert stats.swaps_total == stepping.twin.replica.stats().swaps_total
    assert mode == "least-served" or stats.preemptions_total > 20
    assert leaping.twin.executor.steps == stepping.twin.executor.steps


def test_copies_overlap_steps() -> None:
    """Beside the steps, most of the time on the link is nobody's wait."""
    stats = served("random", "fastswitch", True, 2.0).twin.replica.stats()
    seconds = stats.swap_bytes_total["out"] / 2e9 + stats.swap_bytes_total["in"] / 2e9
    assert seconds > 5.0 and stats.swap_stall_s_total < 0.5 * seconds
