"""The decision journal: every call of one replica as data, without text or tokens. `docs/formats.md`.

A fresh replica that is given the same calls must make the same plans; `penstock.twin.exact` checks that on
the journal of a live run. What a plan depends on beyond its arguments is in the journal too: content keys of
full blocks, hashed once more with a salt of the journal's own, and who stopped by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from penstock.core.events import Finished, ReplicaEvent
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import Copy, StepPlan, StepResult
from penstock.policies.context import ServiceTerms
from penstock.policies.lanes import Lane
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import Advice, ProgramLeft
from penstock.replica.sequence import Sequence as Content

FORMAT: Final = "penstock-journal"
VERSION: Final = 2
HINTS: Final = ("program_id", "is_last_turn", "tool", "pin_s", "group_id", "shared_len")
_NO_HINTS: Final = {item.name: item.default for item in fields(Request) if item.name in HINTS}
KEY_BYTES: Final = 8
NEVER_STARTED: Final = -1

Line = dict[str, Any]


class Journal:
    """Hands a line for each call of a replica to `write`, in order. Remembers open requests.

    `salt` is random bytes of the caller's: without them a hashed key cannot be compared with a guess.
    """

    def __init__(self, block_tokens: int, salt: bytes, write: Callable[[Line], object]) -> None:
        self._block_tokens = block_tokens
        self._salt = salt
        self._write = write
        self._open: dict[str, Content] = {}  # by request id; a shadow that only collects tokens and keys
        self._by_seq: dict[int, Content] = {}

    def submitted(self, request: Request, now_s: float) -> None:
        """Call after the replica took the request."""
        shadow = Content(NEVER_STARTED, request, now_s)
        self._open[request.id] = shadow
        self._write(
            {
                "call": "submit",
                "at_s": now_s,
                "id": request.id,
                "prompt_len": request.prompt_len,
                "max_output_tokens": request.max_output_tokens,
                "arrival_s": request.arrival_s,
                "tenant": request.tenant,
                "slo_class": request.slo_class,
                "priority": request.priority,
                "session_id": request.session_id,
                "leader_id": request.leader_id,
                "scores_prompt": request.sampling.prompt_logprobs,
                "hints": hints_of(request),
                "keys": self._keys(shadow, 0, request.prompt_len) if shadow.is_keyed else None,
            }
        )

    def cancelled(self, request_id: str, reason: str, now_s: float) -> None:
        self._forget(request_id)
        self._write({"call": "cancel", "at_s": now_s, "id": request_id, "reason": reason})

    def advised(self, advice: Advice, now_s: float) -> None:
        """A tool's name and a program's are kept as they are, like those that requests carry."""
        if isinstance(advice, ProgramLeft):
            tenant, name = advice.program
            self._write({"call": "unpin", "at_s": now_s, "tenant": tenant, "program": name})
        else:
            self._write({"call": "tool", "at_s": now_s, "id": advice.request_id, "tool": advice.tool})

    def planned(self, plan: StepPlan | None, now_s: float, lane: Lane | None = None) -> None:
        for start in plan.starts if plan is not None else ():
            shadow = self._by_seq[start.seq_id] = self._open[start.request_id]
            shadow.seq_id = start.seq_id
        facts = None if plan is None else plan_facts(plan)
        self._write({"call": "plan", **_of_lane(lane), "at_s": now_s, "plan": facts})

    def completed(
        self, result: StepResult, events: Iterable[ReplicaEvent], now_s: float, lane: Lane | None = None
    ) -> None:
        """Call after the replica's `complete`."""
        assert result.tokens is not None, "a live executor draws tokens"
        stopped: list[int] = []
        keys: dict[str, list[str]] = {}
        for seq_id, token_id in result.tokens.items():
            shadow = self._by_seq.get(seq_id)
            if shadow is None:
                continue  # it was cancelled while a lane computed it
            if token_id in shadow.request.stop_token_ids:
                stopped.append(seq_id)
            known_len = shadow.request.prompt_len + len(shadow.output)
            shadow.output.append(token_id)
            if shadow.is_keyed and (fresh := self._keys(shadow, known_len, known_len + 1)):
                keys[shadow.request.id] = fresh
        finished = finished_facts(events)
        for request_id, *_ in finished:
            self._forget(request_id)
        self._write(
            {
                "call": "complete",
                **_of_lane(lane),
                "at_s": now_s,
                "duration_s": result.duration_s,
                "stopped": stopped,
                "keys": keys,
                "finished": finished,
                **(
                    {"copied": [[done.copy_id, done.seconds, done.ok] for done in result.copied]}
                    if result.copied
                    else {}
                ),
            }
        )

    def failed(self, now_s: float) -> None:
        """The executor broke; what follows is a new replica's."""
        self._open.clear()
        self._by_seq.clear()
        self._write({"call": "fail", "at_s": now_s})

    def _keys(self, shadow: Content, known_before: int, known_len: int) -> list[str]:
        """Keys of the blocks that became full as the known tokens grew from `known_before`."""
        first, stop = known_before // self._block_tokens, known_len // self._block_tokens
        if first == stop:
            return []
        keys = shadow.key_blocks(stop, self._block_tokens)[first:]
        return [hashlib.blake2b(key, digest_size=KEY_BYTES, key=self._salt).hexdigest() for key in keys]

    def _forget(self, request_id: str) -> None:
        shadow = self._open.pop(request_id, None)
        if shadow is not None:
            self._by_seq.pop(shadow.seq_id, None)


def header(limits: ReplicaLimits, policies: PolicySettings, terms: ServiceTerms) -> Line:
    """The first line: what the replica decides within, by which policies, and on which terms."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "limits": asdict(limits),
        "policies": policies.names(),
        "options": policies.options,
        "slos": {name: asdict(slo) for name, slo in terms.slos.items()},
        "tenant_weights": dict(terms.tenant_weights),
        "seed": terms.seed,
    }


def _of_lane(lane: Lane | None) -> Line:
    """Which lane's loop made the call, where there are lanes."""
    return {} if lane is None else {"lane": lane.value}


def hints_of(request: Request) -> Line:
    """The request's hints that differ from the defaults, as JSON would read them back."""
    found = {name: value for name in HINTS if (value := getattr(request, name)) != _NO_HINTS[name]}
    return found | ({} if request.slo is None else {"slo": asdict(request.slo)})


def plan_facts(plan: StepPlan) -> Line:
    """All that a plan says, tokens and sampling left out, as JSON would read it back."""
    copies = {} if not plan.copies else {"copies": [_copy_facts(copy) for copy in plan.copies]}
    waits = {} if not plan.waits else {"waits": list(plan.waits)}
    return {
        "index": plan.index,
        "chunks": [[chunk.seq_id, chunk.start, chunk.count, chunk.emits] for chunk in plan.chunks],
        "decode_count": plan.decode_count,
        "paused": sorted(plan.paused),
        "starts": [[s.seq_id, s.request_id, s.total_len, s.cached_len, list(s.blocks)] for s in plan.starts],
        "ends": list(plan.ends),
        "new_blocks": [[seq_id, list(blocks)] for seq_id, blocks in plan.new_blocks],
        "repeat": plan.repeat,
        **copies,
        **waits,
    }


def _copy_facts(copy: Copy) -> list[Any]:
    return [copy.copy_id, copy.seq_id, copy.direction.value, [list(extent) for extent in copy.extents]]


def finished_facts(events: Iterable[ReplicaEvent]) -> list[Sequence[Any]]:
    """Id, reason, output tokens (a stop token included) and cached tokens of every end, in order."""
    return [
        [event.request_id, event.reason.value, event.output_tokens, event.cached_tokens]
        for event in events
        if isinstance(event, Finished)
    ]
