"""Lower priority value first."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        self.of_class()

    def of_class(self) -> dict[str, int]:
        """Class → priority. Raises ConfigError naming the entry."""
        found: dict[str, int] = {}
        for entry in self.classes:
            name, _, number = (part.strip() for part in entry.rpartition("="))
            try:
                priority = int(number)
            except ValueError:
                name = ""
            if not name or name in found:
                wrong = "names a class twice" if name else "is not `NAME=NUMBER`"
                raise ConfigError(
                    f"`policies.options.priority.classes` has `{entry}`, which {wrong}.",
                    hint='Write, for example, classes = ["interactive=-1", "batch=10"]; lower goes first.',
                    param="policies.options.priority.classes",
                )
            found[name] = priority
        return found


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
        self._of_class = options.of_class()

    @classmethod
    def classes(cls, options: PriorityOptions) -> frozenset[str]:
        return frozenset(options.of_class())

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        request = sequence.request
        return (request.priority + self._of_class.get(request.slo_class, 0),)
