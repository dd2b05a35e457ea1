"""Exactness: a live replica's journal, given to a fresh replica without tokens, must give the same plans.

    journal of `serve --journal` ─► the same calls ─► Replica ─► plans and ends, compared one by one

The replica that is driven here is the twin's: it knows lengths, content keys and who stopped by itself, and
the instants of the live run take the place of a cost model. What differs first is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from penstock.core.errors import RequestError
from penstock.core.events import Finished, ReplicaEvent
from penstock.core.metrics import Slo
from penstock.core.reasons import CancelReason
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import PolicySettings
from penstock.core.step import CopyDone, StepPlan, StepResult
from penstock.policies.context import ServiceTerms
from penstock.policies.lanes import Lane
from penstock.policies.stack import lanes_split, make_stack
from penstock.replica.journal import FORMAT, HINTS, VERSION, finished_facts, plan_facts
from penstock.replica.laned import LanedReplica
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ProgramLeft, ToolCalled
from penstock.replica.replica import Replica
from penstock.workloads.fields import object_of, required, shown, time_of
from penstock.workloads.lines import Lines

_NAMES: Final = ("program_id", "tool", "group_id")
TEXT_CHARS_MAX: Final = 4096
COUNT_MAX: Final = 1 << 24
BLOCK_TOKENS_MAX: Final = 1 << 16
_DAMAGED: Final = "the journal is damaged, or was not written by `penstock serve --journal`"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where live and twin part: the journal's line, what differs there, and both values."""

    line: int
    what: str
    live: str
    twin: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what} is {self.live} in the journal and {self.twin} in the twin"


@dataclass(frozen=True, slots=True)
class Replayed:
    """How far a replay came. Everything up to `difference` was equal; None: all of it was."""

    calls: int
    plans: int
    ends: int
    difference: Difference | None = None


def replay_journal(path: Path) -> Replayed:
    """Drive a fresh replica through a journal, up to the first difference.

    Reads the file once, line by line, and holds what is open in it. Raises TraceError for a file that is no
    journal, naming line and field, and ConfigError for policies that this build does not have.
    """
    lines = Lines(path, path.name)
    texts = iter(lines)
    twin = _Twin(lines, *_read_header(lines, next(texts, "")))
    calls = 0
    for text in texts:
        parted = twin.follow(object_of(lines, text))
        if parted is not None:
            return Replayed(calls, twin.plans, twin.ends, Difference(lines.number, *parted))
        calls += 1
    return Replayed(calls, twin.plans, twin.ends)


_Parted = tuple[str, str, str]  # what, live, twin


class _Twin:
    """The replica under test, and what the journal has told of its requests."""

    def __init__(
        self, lines: Lines, limits: ReplicaLimits, policies: PolicySettings, terms: ServiceTerms
    ) -> None:
        self._lines = lines
        self._limits = limits
        self._policies = policies
        self._terms = terms
        self._has_lanes = lanes_split(policies)
        self._replica = self._make_replica()
        self._keys: dict[str, list[bytes]] = {}  # of open requests; the replica reads the same lists
        self._plans: dict[Lane | None, StepPlan] = {}  # in progress
        self.plans = 0
        self.ends = 0

    def _make_replica(self) -> Replica:
        stack = make_stack(self._policies, self._terms)
        return (LanedReplica if self._has_lanes else Replica)(self._limits, stack)

    def follow(self, row: Mapping[str, Any]) -> _Parted | None:
        """Make one call. What differs, or None."""
        call = required(self._lines, row, "call")
        at_s = time_of(self._lines, "at_s", required(self._lines, row, "at_s"))
        try:
            return self._make(call, row, at_s)
        except AssertionError as error:  # the replica's own checks: no live replica does what is told here
            return f"call `{call}`", "accepted", f"refused ({error})"

    def _make(self, call: object, row: Mapping[str, Any], at_s: float) -> _Parted | None:
        if call == "submit":
            return self._submit(row, at_s)
        if call == "cancel":
            self._cancel(row, at_s)
        elif call == "tool":
            self._replica.advise(ToolCalled(self._text(row, "id"), self._text(row, "tool")), at_s)
        elif call == "unpin":
            self._replica.advise(ProgramLeft((self._text(row, "tenant"), self._text(row, "program"))), at_s)
        elif call == "plan":
            return self._compare_plan(row, at_s)
        elif call == "complete":
            return self._complete(row, at_s)
        elif call == "fail":
            self._replica = self._make_replica()
            self._keys.clear()
            self._plans.clear()
        else:
            raise self._lines.error("call", f"{shown(call)} is unknown", _DAMAGED)
        return None

    def _submit(self, row: Mapping[str, Any], at_s: float) -> _Parted | None:
        request = self._request(row)
        try:
            self._replica.submit(request, at_s)
        except RequestError as error:
            return f"request `{request.id}`", "accepted", f"refused ({error.message})"
        if isinstance(request.block_keys, list):
            self._keys[request.id] = request.block_keys
        return None

    def _cancel(self, row: Mapping[str, Any], at_s: float) -> None:
        request_id, reason = self._text(row, "id"), self._text(row, "reason")
        if reason not in set(CancelReason):
            raise self._lines.error("reason", f"{shown(reason)} is unknown", _DAMAGED)
        self._replica.cancel(request_id, CancelReason(reason), at_s)
        self._keys.pop(request_id, None)

    def _compare_plan(self, row: Mapping[str, Any], at_s: float) -> _Parted | None:
        lane = self._lane(row)
        plan = self._make_plan(lane, at_s)
        if plan is not None:
            self._plans[lane] = plan
        live = required(self._lines, row, "plan")
        twin = None if plan is None else plan_facts(plan)
        if live == twin:
            self.plans += plan is not None
            return None
        if twin is None or not isinstance(live, Mapping):
            return "plan", shown(live), shown(twin)
        name = next(name for name in [*twin, *live] if live.get(name) != twin.get(name))
        return f"`{name}` of plan {twin['index']}", shown(live.get(name)), shown(twin.get(name))

    def _lane(self, row: Mapping[str, Any]) -> Lane | None:
        """Whose step it is; None where the stack has no lanes."""
        name = row.get("lane")
        if not self._has_lanes and name is None:
            return None
        known = [lane.value for lane in Lane] if self._has_lanes else []
        if name not in known:  # a list, since what a damaged file holds may not be hashable
            raise self._lines.error("lane", f"{shown(name)} is no lane of this stack", _DAMAGED)
        return Lane(name)

    def _make_plan(self, lane: Lane | None, at_s: float) -> StepPlan | None:
        if lane is None:
            return self._replica.plan(at_s)
        assert isinstance(self._replica, LanedReplica)
        step = self._replica.plan_lane(lane, at_s)
        return None if step is None else step.plan

    def _account(
        self, lane: Lane | None, plan: StepPlan, result: StepResult, at_s: float
    ) -> list[ReplicaEvent]:
        if lane is None:
            return self._replica.complete(plan, result, at_s)
        assert isinstance(self._replica, LanedReplica)
        return self._replica.complete_lane(self._replica.in_progress[lane], result, at_s)

    def _complete(self, row: Mapping[str, Any], at_s: float) -> _Parted | None:
        lane = self._lane(row)
        plan = self._plans.pop(lane, None)
        if plan is None:
            raise self._lines.error("call", "it completes a step, and none was planned", _DAMAGED)
        stopped = self._list(row, "stopped")
        duration_s = time_of(self._lines, "duration_s", required(self._lines, row, "duration_s"))
        result = StepResult(None, stopped, duration_s=duration_s, copied=self._copied(row))
        events = self._account(lane, plan, result, at_s)
        for request_id, keys in self._new_keys(row):
            self._keys[request_id] += keys
        live, twin = self._list(row, "finished"), finished_facts(events)
        for event in events:
            if isinstance(event, Finished):
                self._keys.pop(event.request_id, None)
                self.ends += 1
        return None if live == twin else (f"ends of plan {plan.index}", shown(live), shown(twin))

    def _copied(self, row: Mapping[str, Any]) -> list[CopyDone]:
        """Copies that were done by the end of the step."""
        found = []
        for entry in self._list(row, "copied") if "copied" in row else ():
            if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], int):
                raise self._lines.error("copied", f"{shown(entry)} is not a copy", _DAMAGED)
            found.append(CopyDone(entry[0], time_of(self._lines, "copied", entry[1]), entry[2] is True))
        return found

    def _new_keys(self, row: Mapping[str, Any]) -> Iterator[tuple[str, list[bytes]]]:
        keys = required(self._lines, row, "keys")
        if not isinstance(keys, Mapping) or not keys.keys() <= self._keys.keys():
            raise self._lines.error("keys", "they are not of open requests", _DAMAGED)
        for request_id in keys:
            yield request_id, self._encoded(keys, request_id)

    def _request(self, row: Mapping[str, Any]) -> Request:
        return Request(
            id=self._text(row, "id"),
            prompt_len=self._count(row, "prompt_len", 1),
            max_output_tokens=self._count(row, "max_output_tokens", 1),
            arrival_s=time_of(self._lines, "arrival_s", required(self._lines, row, "arrival_s")),
            block_keys=None if row.get("keys") is None else self._encoded(row, "keys"),
            sampling=SamplingParams(prompt_logprobs=required(self._lines, row, "scores_prompt") is True),
            tenant=self._text(row, "tenant"),
            slo_class=self._text(row, "slo_class"),
            priority=self._count(row, "priority", -COUNT_MAX),
            session_id=None if row.get("session_id") is None else self._text(row, "session_id"),
            leader_id=None if row.get("leader_id") is None else self._text(row, "leader_id"),
            **self._hints(row),
        )

    def _hints(self, row: Mapping[str, Any]) -> dict[str, Any]:
        given = required(self._lines, row, "hints")
        if not isinstance(given, Mapping) or not given.keys() <= {*HINTS, "slo"}:
            raise self._lines.error("hints", f"{shown(given)} are not hints", _DAMAGED)
        hints: dict[str, Any] = {name: self._text(given, name) for name in _NAMES if name in given}
        if "shared_len" in given:
            hints["shared_len"] = self._count(given, "shared_len")
        if "pin_s" in given:
            hints["pin_s"] = time_of(self._lines, "pin_s", given["pin_s"])
        if "is_last_turn" in given:
            hints["is_last_turn"] = given["is_last_turn"] is True
        if "slo" in given:
            hints["slo"] = _slo(self._lines, given["slo"])
        return hints

    # Fields

    def _text(self, row: Mapping[str, Any], field: str) -> str:
        value = required(self._lines, row, field)
        if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
            raise self._lines.error(field, f"{shown(value)} is not a name", _DAMAGED)
        return value

    def _count(self, row: Mapping[str, Any], field: str, low: int = 0) -> int:
        return _whole(self._lines, row, field, low, COUNT_MAX)

    def _list(self, row: Mapping[str, Any], field: str) -> list[Any]:
        value = required(self._lines, row, field)
        if not isinstance(value, list):
            raise self._lines.error(field, f"{shown(value)} is not a list", _DAMAGED)
        return value

    def _encoded(self, row: Mapping[str, Any], field: str) -> list[bytes]:
        keys = self._list(row, field)
        if not all(isinstance(key, str) for key in keys):
            raise self._lines.error(field, "a key is not text", _DAMAGED)
        return [key.encode() for key in keys]


def _read_header(lines: Lines, text: str) -> tuple[ReplicaLimits, PolicySettings, ServiceTerms]:
    header = object_of(lines, text)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise lines.error("format", f"it is not `{FORMAT}` version {VERSION}", _DAMAGED)
    limits, policies = required(lines, header, "limits"), required(lines, header, "policies")
    if not isinstance(limits, Mapping) or not isinstance(policies, Mapping):
        raise lines.error("limits", "limits and policies are not objects", _DAMAGED)

    def size(name: str, high: int = COUNT_MAX) -> int:
        return _whole(lines, limits, name, 1, high)

    def size_or_none(name: str) -> int:
        return _whole(lines, limits, name, 0, COUNT_MAX)

    slots = {slot: required(lines, policies, slot) for slot in PolicySettings().names()}
    if not all(isinstance(name, str) for name in slots.values()):
        raise lines.error("policies", "a policy is not a name", _DAMAGED)
    options = required(lines, header, "options")
    if not isinstance(options, dict) or not all(isinstance(table, dict) for table in options.values()):
        raise lines.error("options", "they are not tables", _DAMAGED)
    sizes = ReplicaLimits(
        kv_blocks=size("kv_blocks"),
        kv_block_tokens=size("kv_block_tokens", BLOCK_TOKENS_MAX),
        running_max=size("running_max"),
        step_tokens_max=size("step_tokens_max"),
        context_len_max=size("context_len_max"),
        prefix_cache=required(lines, limits, "prefix_cache") is True,
        repeat=required(lines, limits, "repeat") is True,
        host_kv_blocks=size_or_none("host_kv_blocks"),
        kv_group_tokens=size_or_none("kv_group_tokens"),
    )
    return sizes, PolicySettings(**slots, options=options), _read_terms(lines, header)


def _read_terms(lines: Lines, header: Mapping[str, Any]) -> ServiceTerms:
    slos, weights = required(lines, header, "slos"), required(lines, header, "tenant_weights")
    if not isinstance(slos, Mapping) or not isinstance(weights, Mapping):
        raise lines.error("slos", "targets and weights are not objects", _DAMAGED)
    if not all(_is_positive(weight) for weight in weights.values()):
        raise lines.error("tenant_weights", "a weight is not a positive number", _DAMAGED)
    seed = _whole(lines, header, "seed", 0, 1 << 62)
    return ServiceTerms({name: _slo(lines, slo) for name, slo in slos.items()}, weights, seed)


def _slo(lines: Lines, given: object) -> Slo:
    known = {item.name for item in fields(Slo)}
    if not isinstance(given, Mapping) or not given.keys() <= known:
        raise lines.error("slo", f"{shown(given)} is not a table of targets", _DAMAGED)
    if not all(target is None or _is_positive(target) for target in given.values()):
        raise lines.error("slo", f"{shown(given)} has a target that is no positive number", _DAMAGED)
    return Slo(**given)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _whole(lines: Lines, row: Mapping[str, Any], field: str, low: int, high: int) -> int:
    value = required(lines, row, field)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise lines.error(field, f"{shown(value)} is not a whole number from {low} to {high}", _DAMAGED)
    return value
