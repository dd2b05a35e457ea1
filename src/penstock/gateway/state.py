"""What the handlers share: one object an app, made by `create_app`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.settings import Settings
from penstock.gateway.body import BodyBudget
from penstock.gateway.convert import Served
from penstock.gateway.metrics import GatewayMetrics
from penstock.gateway.switchboard import Switchboard
from penstock.gateway.text import MakeDetokenizer, Template, Tokenizer, WorkPool, inline_bytes_of
from penstock.replica.messages import ReplicaInfo

UNKNOWN_NAMES_REMEMBERED_MAX = 256


@dataclass(slots=True)
class Gateway:
    """Parts of a running gateway. `clock` is monotonic seconds, `started_s` is Unix time."""

    settings: Settings
    info: ReplicaInfo
    served: Served
    tokenizer: Tokenizer
    template: Template
    make_detokenizer: MakeDetokenizer
    switchboard: Switchboard
    metrics: GatewayMetrics
    clock: Callable[[], float]
    started_s: int
    pool: WorkPool = field(default_factory=WorkPool)
    budget: BodyBudget = field(init=False)
    chat_inline_bytes: int = field(init=False)  # conversations up to here are rendered on the event loop
    unknown_names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.budget = BodyBudget(self.settings.gateway.bodies_bytes_max)
        self.chat_inline_bytes = inline_bytes_of(self.template)

    def is_new_unknown(self, name: str) -> bool:
        """Whether to warn of this unknown field: once for each name, and for a bounded number of names."""
        if name in self.unknown_names or len(self.unknown_names) >= UNKNOWN_NAMES_REMEMBERED_MAX:
            return False
        self.unknown_names.add(name)
        return True
