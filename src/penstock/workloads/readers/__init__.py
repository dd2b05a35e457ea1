"""One file per trace format. To add one: a module with NAME, `claims` and `rows`, and a line below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from penstock.workloads.lines import Lines
from penstock.workloads.readers import azure, burstgpt, mooncake, request_log
from penstock.workloads.trace import TraceRow


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """How to recognise a format by its first line, and how to read it."""

    name: str
    claims: Callable[[str], bool]
    rows: Callable[[Lines], Iterator[TraceRow]]  # arrival_s on the file's own clock, in file order


def _registry(*formats: TraceFormat) -> Mapping[str, TraceFormat]:
    by_name = {entry.name: entry for entry in formats}
    assert len(by_name) == len(formats), "two trace formats share a name"
    return MappingProxyType(by_name)


FORMATS = _registry(
    TraceFormat(burstgpt.NAME, burstgpt.claims, burstgpt.rows),
    TraceFormat(azure.NAME, azure.claims, azure.rows),
    TraceFormat(request_log.NAME, request_log.claims, request_log.rows),
    TraceFormat(mooncake.NAME, mooncake.claims, mooncake.rows),
)
