"""Leaping over decode steps changes nothing where KV is copied beside them (card fastswitch, in the twin)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from benchmarks.effects._conversations import chats, serve_chats
from benchmarks.effects.serving import Served, limits, llama_8b, settings_of

from penstock.twin.vopr import Call, Script, System, run_checked

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


def test_who_is_copied_in_leaves_the_steps_room_to_others() -> None:
    """Four siblings, a room of one token beside two decodes, and one sequence on its way back: vopr 58130.

    The next in line starts with the very step, and not with the one after, where a leap would pass it by.
    """
    system = System(
        kv_blocks=17, block_tokens=4, running_max=4, step_tokens=3, context_len=108, prefix_cache=False,
        repeat=True, admit="aggressive", preempt="fastswitch", host_kv_blocks=1, copy_block_s=0.001,
        step_base_s=0.01, step_token_s=0.0005, link_s=0.001,
    )  # fmt: skip
    call = Call("c", 4.87, choices=4, prompt_tokens=10, output_tokens=22, content=11)
    result = run_checked(Script(0, system, (call,), ()), thoroughly=True)
    assert result.is_ok, result.failure
    assert result.preemptions == 1
