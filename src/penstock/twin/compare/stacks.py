"""What `--stacks` names: presets, single policies, or presets with policies changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.core.errors import ConfigError
from penstock.core.settings import PolicySettings
from penstock.policies.registry import nearest

STACKS_MAX = 6  # as many colours as a picture can tell apart
_SLOTS = list(PolicySettings().names())


@dataclass(frozen=True, slots=True)
class StackSpec:
    """One stack as it was written: a preset perhaps, and slots that override it."""

    name: str
    preset: str | None
    policies: dict[str, str]

    def flags(self) -> dict[str, Any]:
        """The settings it stands for, as dotted keys."""
        return {"preset": self.preset, **{f"policies.{slot}": name for slot, name in self.policies.items()}}


def parse_stacks(text: str) -> list[StackSpec]:
    """`sarathi,vllm-v0+rank=fcfs,compose=sarathi`. Raises ConfigError naming the part that is wrong."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ConfigError("`--stacks` is empty.", hint="name presets, for example `sarathi,vllm-v0`")
    if len(names) > STACKS_MAX:
        raise ConfigError(f"`--stacks` names {len(names)} stacks.", hint=f"compare at most {STACKS_MAX}")
    if len(set(names)) < len(names):
        raise ConfigError("`--stacks` names one stack twice.", hint="name each stack once")
    return [_parse_stack(name) for name in names]


def _parse_stack(text: str) -> StackSpec:
    preset: str | None = None
    policies: dict[str, str] = {}
    for index, part in enumerate(text.split("+")):
        slot, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals and index == 0 and slot:
            preset = slot
        elif not equals or not name:
            raise ConfigError(
                f"`{part[:60]}` in `--stacks` is not SLOT=POLICY.", hint="write `preset+slot=policy`"
            )
        elif slot not in _SLOTS:
            raise ConfigError(f"`{slot[:60]}` in `--stacks` is not a slot.", hint=nearest(slot, _SLOTS))
        elif slot in policies:
            raise ConfigError(f"`{text[:60]}` in `--stacks` fills `{slot}` twice.", hint="fill it once")
        else:
            policies[slot] = name
    return StackSpec(text, preset, policies)
