"""Lower priority value first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import ConfigError
from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView


@dataclass(frozen=True, slots=True)
class PriorityOptions:
    classes: tuple[str, ...] = setting(
        tuple, "priority of whole classes, `NAME=NUMBER` each; the request's own is added to it"
    )


@RANK.register(
    "priority", source="vLLM v1 scheduler, policy `priority`; classes as llm-d's inference objectives"
)
class Priority(Rank):
    """Strict classes: lower `priority` first, arrival within a class; preempted work keeps its place.

    Reads `priority` and `slo_class`. Keys never change, O(1) a sequence. Only reorders the queue; beside
    `preempt = priority` a higher class also takes slots and KV from a lower one. A low class may starve.
    """

    Options = PriorityOptions
    reads_priority = True

    def __init__(self, context: Context, options: PriorityOptions) -> None:
        self._of_class = parse_classes(options.classes)

    @classmethod
    def classes(cls, options: Mapping[str, Any]) -> frozenset[str]:
        given = options.get("classes", ())
        return frozenset(parse_classes(given.split(",") if isinstance(given, str) else given))

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        request = sequence.request
        return (request.priority + self._of_class.get(request.slo_class, 0),)


def parse_classes(entries: Sequence[str]) -> dict[str, int]:
    """Class → priority. Raises ConfigError naming the entry."""
    found: dict[str, int] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            found[name.strip()] = int(number)
        except ValueError:
            name = ""
        if not name.strip():
            raise ConfigError(
                f"`policies.options.priority.classes` has `{entry}`, which is not `NAME=NUMBER`.",
                hint='Write, for example, classes = ["interactive=-1", "batch=10"]; lower goes first.',
                param="policies.options.priority.classes",
            )
    return found
