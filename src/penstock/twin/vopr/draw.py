"""From one number to a script: a system, a load and a mix of faults, all drawn at random.

Swarm testing: which features and faults a run has at all is drawn first, so that rare combinations are not
drowned in runs that have a little of everything. Each part draws from a stream of its own, named after it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from penstock.core.reasons import CancelReason
from penstock.policies.stack import REGISTRIES, conflict_in
from penstock.twin.vopr.script import Call, Fault, FaultKind, Script, System

CALLS_MAX = 40
FAULTS_OF_A_KIND_MAX = 6
LANES_FRAC = 0.2  # of the systems have two lanes, perhaps
_BLOCK_TOKENS = (1, 2, 3, 4, 4, 8, 16)


def stream(seed: int, name: str) -> random.Random:
    """The named stream of a seed: independent of all others, and of the process."""
    return random.Random(f"{seed}/{name}")


def draw_script(seed: int) -> Script:
    """Pure: the same number gives the same script, in any process."""
    system = _draw_system(stream(seed, "system"))
    calls = _with_hints(stream(seed, "hints"), _draw_calls(stream(seed, "load"), system))
    faults = _draw_faults(stream(seed, "faults"), system, calls)
    return Script(seed, system, calls, faults)


# ---- the system -------------------------------------------------------------------------------------------


def _draw_system(draw: random.Random) -> System:
    kv_blocks = draw.choice((draw.randint(2, 40), draw.randint(8, 20)))
    block_tokens = draw.choice(_BLOCK_TOKENS)
    context_len = draw.randint(4, max(5, min(160, 2 * kv_blocks * block_tokens)))
    slots = _draw_policies(draw)
    system = System(
        exact=draw.random() < 0.7 or slots["lanes"] != "none",
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        running_max=draw.randint(1, 8),
        step_tokens=draw.choice((1, 2, 5, 16, 64, draw.randint(1, 64))),
        context_len=context_len,
        prefix_cache=draw.random() < 0.75,
        repeat=draw.random() < 0.75,
        mid_step=draw.random() < 0.4,
        engine_ahead=draw.randint(0, 6),
        step_base_s=draw.choice((0.001, 0.01, 0.05)),
        step_token_s=draw.choice((0.0, 0.0001, 0.002)),
        link_s=draw.choice((0.0, 0.001, 0.02)),
        rank=slots["rank"],
        admit=slots["admit"],
        compose=slots["compose"],
        preempt=slots["preempt"],
        retain=slots["retain"],
        lanes=slots["lanes"],
    )
    return _with_bounds(draw, system)


def _draw_policies(draw: random.Random) -> dict[str, str]:
    """One policy a slot; drawn again as long as two of them conflict."""
    while True:
        slots = {slot: draw.choice(registry.names()) for slot, registry in REGISTRIES.items()}
        if draw.random() >= LANES_FRAC:
            slots["lanes"] = "none"
        if not conflict_in(slots):
            return slots


def _with_bounds(draw: random.Random, system: System) -> System:
    """Bounds of the desk and faults of the machine, each only in some runs."""
    if draw.random() < 0.3:
        system = replace(system, queue_requests_max=draw.randint(0, 12))
    if draw.random() < 0.2:
        system = replace(system, queue_tokens_max=draw.randint(1, 8 * system.context_len))
    if draw.random() < 0.25:
        system = replace(system, queue_wait_s_max=draw.choice((0.1, 1.0, 5.0)))
    if draw.random() < 0.25:
        system = replace(system, tenant_requests_max=draw.randint(1, 6))
    if draw.random() < 0.3:
        system = replace(system, link_jitter_s=draw.choice((0.002, 0.05, 0.5)))
    if draw.random() < 0.15:
        system = replace(system, kv_lost_blocks=draw.randint(1, max(1, system.kv_blocks // 2)))
    if draw.random() < 0.3:
        system = replace(system, stall_s=draw.choice((0.1, 0.5)))
    swaps = REGISTRIES["preempt"].entry(system.preempt).make.swaps and system.lanes == "none"
    return _with_host(draw, system) if swaps else system


def _with_host(draw: random.Random, system: System) -> System:
    """Host memory of a policy that swaps: mostly some, seldom enough."""
    return replace(
        system,
        host_kv_blocks=draw.choice((0, 1, 4, system.kv_blocks, 4 * system.kv_blocks)),
        kv_group_tokens=draw.choice((0, 1, 3, 4)) * system.block_tokens,
        copy_block_s=draw.choice((0.0, 0.1, 1.0)) * system.step_base_s,
    )


# ---- the load ---------------------------------------------------------------------------------------------


def _draw_calls(draw: random.Random, system: System) -> tuple[Call, ...]:
    count = draw.choice((2, 6, 15, CALLS_MAX))
    features = {name for name in _FEATURES if draw.random() < 0.5}
    calm_gap_s = draw.choice((0.0, 0.2, 1.0, 4.0)) * system.step_base_s * 4
    at_s, calls = 0.0, []
    for index in range(draw.randint(1, count)):
        if draw.random() < 0.5:  # else it comes with the one before: a burst
            at_s += draw.expovariate(1.0) * calm_gap_s
        calls.append(_draw_call(draw, system, features, index, at_s))
    return tuple(calls)


_FEATURES = (
    "stems",
    "siblings",
    "salts",
    "stops",
    "tenants",
    "priorities",
    "deadlines",
    "extremes",
    "unkeyed",
    "sessions",
)


def _draw_call(draw: random.Random, system: System, features: set[str], index: int, at_s: float) -> Call:
    prompt_tokens, output_tokens = _draw_lengths(draw, system, "extremes" in features)
    call = Call(f"c{index}", at_s, 1, prompt_tokens, output_tokens, content=index)
    if "stems" in features and draw.random() < 0.8:
        stem_tokens = draw.choice((prompt_tokens, draw.randint(0, prompt_tokens)))
        call = replace(call, stem=draw.randint(0, 2), stem_tokens=stem_tokens)
    if "siblings" in features and draw.random() < 0.4:
        call = replace(call, choices=draw.randint(2, 4))
    if "salts" in features:
        call = replace(call, salt=draw.choice(("", "a", "b")))
    if "stops" in features and draw.random() < 0.7:
        call = replace(call, stops_after_tokens=draw.randint(1, max(1, min(64, 2 * output_tokens))))
    if "tenants" in features:
        call = replace(call, tenant=draw.choice(("default", "acme", "zeta")))
    if "priorities" in features:
        call = replace(call, priority=draw.randint(-1, 1))
    if "deadlines" in features and draw.random() < 0.4:
        call = replace(call, deadline_s=draw.expovariate(1.0) * 30 * system.step_base_s + 1e-3)
    if "unkeyed" in features:
        call = replace(call, keyed=draw.random() < 0.5)
    if "sessions" in features:
        call = replace(call, session=draw.choice(("", f"s{call.stem}", f"s{call.stem}")))
    return call


def _draw_lengths(draw: random.Random, system: System, extremes: bool) -> tuple[int, int]:
    """Mostly what fits; at the extremes what just fits, just does not, or says nothing."""
    room = min(system.context_len, system.engine_blocks * system.block_tokens + 1)
    if extremes and draw.random() < 0.3:
        prompt_tokens = max(1, room + draw.randint(-3, 1))
        return prompt_tokens, draw.choice((0, 1, 2, max(1, room - prompt_tokens)))
    longest = draw.choice((2, 8, 24, room))
    prompt_tokens = draw.randint(1, max(1, min(longest, room - 1)))
    if draw.random() < 0.3:  # at the edge of a block, or one beside it
        whole = -(-prompt_tokens // system.block_tokens) * system.block_tokens
        prompt_tokens = max(1, min(whole + draw.randint(-1, 1), room - 1))
    return prompt_tokens, draw.randint(1, max(1, min(draw.choice((1, 6, 30, room)), room - prompt_tokens)))


def _with_hints(draw: random.Random, calls: Sequence[Call]) -> tuple[Call, ...]:
    """What calls say of themselves that changes no output; of groups not always the truth."""
    features = {name for name in ("groups", "turns", "classes") if draw.random() < 0.5}
    hinted = []
    for call in calls:
        if "groups" in features and call.stem_tokens and draw.random() < 0.8:
            call = replace(call, group_tokens=max(0, call.stem_tokens + draw.choice((0, 0, 0, -2, 3))))
        if "turns" in features and call.session:
            call = replace(
                call,
                last_turn=draw.random() < 0.2,
                tool=draw.choice(("", "ls", "cc")),
                pin_s=draw.choice((0.0, 0.0, 0.05, 1.0, 50.0)),
            )
        if "classes" in features:
            call = replace(call, slo_class=draw.choice(("default", "chat", "batch")))
        hinted.append(call)
    return tuple(hinted)


# ---- the faults -------------------------------------------------------------------------------------------


def _draw_faults(draw: random.Random, system: System, calls: Sequence[Call]) -> tuple[Fault, ...]:
    """First which kinds there are at all, then how many of each."""
    span_s = max(call.at_s for call in calls) + 40 * system.step_base_s
    share = draw.choice((0.0, 0.2, 0.4))
    faults: list[Fault] = []
    for kind in FaultKind:
        likely = share / 4 if kind in (FaultKind.KILL, FaultKind.DRAIN) else share
        if draw.random() >= likely:
            continue
        once = kind in (FaultKind.KILL, FaultKind.DRAIN)
        for _ in range(1 if once else draw.randint(1, FAULTS_OF_A_KIND_MAX)):
            faults += _draw_fault(draw, system, kind, calls, draw.random() * span_s)
    return tuple(faults)


def _draw_fault(
    draw: random.Random, system: System, kind: FaultKind, calls: Sequence[Call], at_s: float
) -> list[Fault]:
    step_s = system.step_base_s
    if kind in (FaultKind.STALL, FaultKind.JUMP, FaultKind.DRAIN):
        return [Fault(kind, at_s, seconds=draw.choice((1.0, 10.0, 100.0)) * step_s)]
    if kind is FaultKind.SLOW:
        factor = draw.choice((0.0, 0.1, 5.0, 50.0))
        return [Fault(kind, at_s, seconds=draw.uniform(1, 30) * step_s, factor=factor)]
    if kind is FaultKind.STRAY_CANCEL:
        target = draw.choice(calls)
        name = f"{target.name}.{draw.randrange(target.choices)}"
        return [Fault(kind, at_s, target=name, reason=draw.choice(list(CancelReason)))]
    if kind is FaultKind.CANCEL:
        return _draw_cancels(draw, calls, at_s)
    if kind is FaultKind.CRASH and draw.random() < 0.3:  # perhaps often enough to give the engine up
        return [Fault(kind, at_s + index * 1.5 * step_s) for index in range(3)]
    return [Fault(kind, at_s)]


def _draw_cancels(draw: random.Random, calls: Sequence[Call], at_s: float) -> list[Fault]:
    """One client leaves, perhaps twice; or many at once."""
    if draw.random() < 0.3:
        share = draw.random()
        gone = [call for call in calls if draw.random() < share]
        return [Fault(FaultKind.CANCEL, at_s, target=call.name) for call in gone]
    cancel = Fault(
        FaultKind.CANCEL, at_s, target=draw.choice(calls).name, reason=draw.choice(list(CancelReason))
    )
    return [cancel, cancel] if draw.random() < 0.3 else [cancel]
