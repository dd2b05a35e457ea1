"""Write docs/reference from the code: commands, settings, metrics, policies, the OpenAPI document.

    python scripts/reference.py

`make docs` runs it. tests/pure/test_docs.py makes the same pages in memory and fails where a checked-in one
differs, so a page can be neither edited by hand nor forgotten. The pages depend on the code alone: no clock,
no machine, no environment.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from typer.models import ArgumentInfo, OptionInfo

from penstock.cli.main import app as program
from penstock.core import errors
from penstock.core.config import DEFAULT_PRESET, default_of, environment_name, setting_bounds, setting_help
from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.reasons import (
    CancelReason,
    FinishReason,
    MissReason,
    PinEvent,
    PreemptReason,
    ShedReason,
    WaitReason,
)
from penstock.core.request import Request
from penstock.core.settings import Settings, TenantSettings
from penstock.core.step_trace import StepRecord
from penstock.gateway.app import create_app
from penstock.gateway.metrics import ALIAS, OURS, GatewayMetrics, PhaseSpans
from penstock.policies.registry import Entry
from penstock.policies.stack import REGISTRIES, load_preset, preset_names
from penstock.replica.messages import ReplicaInfo, ReplicaLink, ReplicaStats

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Made from the code by `make docs`; do not edit. -->"
TYPE_NAMES = {str: "text", int: "integer", float: "number", Path: "path", bool: "flag"}
COMMON_LABELS = ("model_name", "engine")
# Labels whose values are not ours to list.
OPEN_LABELS = frozenset({"tenant", "class", "block_size", "num_gpu_blocks", "cache_dtype"})
MADE_WITH = "x-made-with"


def pages() -> dict[str, str]:
    """File name → content of every page."""
    return {
        "cli.md": cli_page(),
        "config.md": config_page(),
        "metrics.md": metrics_page(),
        "policies.md": policies_page(),
        "openapi.json": json.dumps(openapi_document(), indent=2, ensure_ascii=False) + "\n",
    }


# ---- commands ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One option or argument as the program takes it."""

    names: tuple[str, ...]
    is_argument: bool
    kind: type
    is_required: bool
    default: Any
    help: str
    environment: str | None
    least: float | None
    greatest: float | None


@dataclass(frozen=True)
class CommandPage:
    """One command: `words` is what follows `penstock`."""

    words: tuple[str, ...]
    help: str
    examples: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def name(self) -> str:
        return " ".join(("penstock", *self.words))


def commands() -> list[CommandPage]:
    """Every command that can be run, groups left out."""
    return list(_walk(typer.main.get_command(program), (), ()))


def _walk(command: Any, words: tuple[str, ...], inherited: tuple[str, ...]) -> Iterator[CommandPage]:
    """A group's examples count for the command that each of them runs."""
    text = "\n".join((command.help or "", command.epilog or ""))
    examples = (*inherited, *(match.strip("`") for match in re.findall(r"`?penstock [^\n]+", text)))
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from _walk(inner, (*words, name), examples)
        return
    prefix = " ".join(("penstock", *words))
    own = tuple(dict.fromkeys(each for each in examples if f"{each} ".startswith(prefix + " ")))
    help_text = re.split(r"\n*Examples?:", command.help or "")[0].strip()
    yield CommandPage(words, help_text, own, tuple(_parameters(command)))


def _parameters(command: Any) -> Iterator[Parameter]:
    """Names and defaults are the built command's; types and bounds come from the function's annotations."""
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    for made in command.params:
        base, info = _annotation(hints[made.name])
        is_argument = isinstance(info, ArgumentInfo)
        yield Parameter(
            names=(made.metavar or made.name.upper(),) if is_argument else tuple(made.opts),
            is_argument=is_argument,
            kind=base,
            is_required=bool(made.required),
            default=made.default,
            help=info.help or str(info.rich_help_panel or ""),
            environment=str(info.envvar) if info.envvar else None,
            least=info.min,
            greatest=info.max,
        )


def _annotation(hint: Any) -> tuple[type, OptionInfo | ArgumentInfo]:
    """`Annotated[int | None, Option(...)]` → int, and the option."""
    inner, info = typing.get_args(hint)[:2]
    kinds = [each for each in typing.get_args(inner) or (inner,) if each is not types.NoneType]
    return kinds[0], info


def cli_page() -> str:
    parts = [
        "# Command line",
        NOTE,
        "Exit codes of every command: 0 ok, 1 failed, 2 usage (a flag, the config), 3 environment (a "
        "package, device, address or server is missing), 130 interrupted, where its page says nothing else. "
        "Data goes to stdout; progress, logs and errors to stderr.",
        "`penstock --version` prints the version. Every command has `--help`.",
    ]
    for page in commands():
        parts += [f"## `{page.name}`", page.help, _usage(page)]
        if any(each.is_argument for each in page.parameters):
            rows = [(f"`{p.names[0]}`", _type(p), p.help) for p in page.parameters if p.is_argument]
            parts.append(_table(("Argument", "Value", "Meaning"), rows))
        rows4 = [
            (", ".join(f"`{name}`" for name in p.names), _type(p), _cli_default(p), p.help)
            for p in page.parameters
            if not p.is_argument
        ]
        parts.append(_table(("Option", "Value", "Default", "Meaning"), rows4))
        parts.append("```sh\n" + "\n".join(page.examples) + "\n```")
    return "\n\n".join(parts) + "\n"


def _usage(page: CommandPage) -> str:
    arguments = [each.names[0] for each in page.parameters if each.is_argument]
    return "    " + " ".join((page.name, *arguments, "[OPTIONS]"))


def _type(parameter: Parameter) -> str:
    name = TYPE_NAMES[parameter.kind]
    return f"{name} {_bounds(parameter.least, parameter.greatest)}".strip()


def _cli_default(parameter: Parameter) -> str:
    variable = f"`${parameter.environment}`" if parameter.environment else ""
    if parameter.kind is bool or parameter.default is None:
        return variable
    return f"`{parameter.default}`"


# ---- settings ---------------------------------------------------------------------------------------------


def config_page() -> str:
    bounds = setting_bounds()
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, help_text, default in setting_help():
        row = (
            f"`{key}`",
            f"`{environment_name(key)}`",
            f"`{_toml(default)}`",
            _bounds(*bounds[key]),
            help_text,
        )
        sections.setdefault(key.rpartition(".")[0], []).append(row)
    parts = [
        "# Settings",
        NOTE,
        "Flags override the environment, the environment overrides the file, the file overrides the preset, "
        "the preset overrides the defaults. `penstock config show` prints each value and where it came from. "
        "How to write the file: [config.md](../config.md).",
        f"Where no preset is named, `{DEFAULT_PRESET}` is: what it sets ([policies.md](policies.md#presets)) "
        "stands in the place of the defaults below.",
    ]
    for section, rows in sections.items():
        parts.append(f"## `[{section}]`" if section else "## Top level")
        parts.append(_table(("Key", "Environment", "Default", "Bounds", "Meaning"), rows))
    parts += [
        "## `[slo.NAME]`",
        "The latency targets of a class of requests, in milliseconds: `ttft_p99_ms`, `tpot_p99_ms`, "
        "`e2e_p99_ms`; each may be left out. In the file only.",
        "## `[tenants.NAME]`",
        "What one tenant is granted. In the file only.",
        _options_table(TenantSettings),
    ]
    return "\n\n".join(parts) + "\n"


def _options_table(options: Any) -> str:
    """The fields of a dataclass of settings."""
    rows = [
        (
            f"`{item.name}`",
            f"`{_toml(default_of(item))}`",
            _bounds(item.metadata["low"], item.metadata["high"]),
            item.metadata["help"],
        )
        for item in fields(options)
    ]
    return _table(("Key", "Default", "Bounds", "Meaning"), rows)


def _toml(value: Any) -> str:
    """A default as it stands in the file."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _bounds(least: float | None, greatest: float | None) -> str:
    if least is None:
        return "" if greatest is None else f"≤ {greatest:.10g}"
    return f"≥ {least:.10g}" if greatest is None else f"{least:.10g} … {greatest:.10g}"


# ---- metrics ----------------------------------------------------------------------------------------------


def metrics_page() -> str:
    families = metric_families()
    aliased = {each.name.removeprefix(ALIAS) for each in families if each.name.startswith(ALIAS)}
    rows = []
    for family in families:
        if family.name.startswith(ALIAS):
            continue
        short = family.name.removeprefix(OURS)
        name = f"`{family.name}{'_total' if family.type == 'counter' else ''}`"
        alias = "yes" if short in aliased else ""
        rows.append((name, family.type, alias, _labels(family), family.documentation + _edges(family)))
    parts = [
        "# Metrics",
        NOTE,
        "What `GET /metrics` exposes, as Prometheus text. Every metric has the labels `model_name` and "
        "`engine`, unless its row says otherwise. Where the third column says yes, the same samples appear "
        f"again under `{ALIAS}` in place of `{OURS}`.",
        "Definitions of the instants: [api.md](../api.md#metrics). What to alert on: "
        "[operations.md](../operations.md#what-to-alert-on).",
        _table(("Name", "Type", "vLLM", "Further labels", "Meaning"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def metric_families() -> list[Metric]:
    """What a gateway exposes after everything that is counted has happened once."""
    metrics = GatewayMetrics(_info(), {"chat": Slo(1.0, 1.0, 1.0)}, lambda record: record.total_s)
    metrics.compare(StepRecord((), 1, 1, 1, 1.0))
    metrics.step(
        ReplicaStats(
            step_index=1,
            step_tokens=1,
            waiting_by_reason=dict.fromkeys((reason.value for reason in WaitReason), 1),
            prefix_miss_tokens_total=dict.fromkeys((reason.value for reason in MissReason), 1),
            pins_total=dict.fromkeys((event.value for event in PinEvent), 1),
            preempted_tokens_total=dict.fromkeys((reason.value for reason in PreemptReason), 1),
        )
    )
    for shed in ShedReason:
        metrics.shed(shed)
    for cause in PreemptReason:
        metrics.storm(cause.value)
    for cancel in CancelReason:
        metrics.cancelled(cancel)
    for finish in FinishReason:
        outcome = RequestOutcome("r", 0.0, finish, 0.0, 1, 2, 0, 0.0, 0.0, slo_class="chat")
        metrics.finished(outcome, PhaseSpans())
    for error in _wire_errors():
        metrics.refused(error.status, error.code)
    metrics.tenants.entered([Request("r", 1, 1, 0.0)])
    return list(text_string_to_metric_families(metrics.render().decode()))


def _wire_errors() -> list[type[errors.PenstockError]]:
    kinds = (errors.RequestError, errors.LimitError, errors.ServiceError)
    found = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, kinds)]
    return [each for each in found if each not in (errors.LimitError, errors.ServiceError)]


def _labels(family: Metric) -> str:
    values: dict[str, set[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            values.setdefault(label, set()).add(value)
    told = [
        f"`{label}`" if label in OPEN_LABELS else f"`{label}`: {', '.join(sorted(found))}"
        for label, found in values.items()
        if label not in (*COMMON_LABELS, "le")
    ]
    without = "" if set(COMMON_LABELS) <= values.keys() else "; no `model_name`, no `engine`"
    return "; ".join(told) + without


def _edges(family: Metric) -> str:
    edges = [float(each.labels["le"]) for each in family.samples if "le" in each.labels]
    finite = sorted({edge for edge in edges if edge != float("inf")})
    return f" {len(finite)} buckets from {finite[0]:g} to {finite[-1]:g}." if finite else ""


# ---- policies ---------------------------------------------------------------------------------------------


def policies_page() -> str:
    parts = ["# Policies", NOTE, "How slots and reason codes work: [policies.md](../policies.md)."]
    for slot, registry in REGISTRIES.items():
        purpose = (import_module(f"penstock.policies.{slot}").__doc__ or "").partition(": ")[2].strip()
        parts += [f"## Slot `{slot}`", purpose[:1].upper() + purpose[1:]]
        parts += [_policy(entry) for entry in registry.entries()]
    parts += ["## Presets", _table(("Preset", "What it is", "Source", "Stack", "Settings"), _preset_rows())]
    return "\n\n".join(parts) + "\n"


def _policy(entry: Entry[Any]) -> str:
    """Its name, what its class says of itself, where it comes from."""
    text = inspect.getdoc(entry.make) or ""
    parts = [f"### `{entry.name}`", text, f"Source: {entry.source}."]
    if fields(entry.options):
        parts += [f"Options, in `[policies.options.{entry.name}]`:", _options_table(entry.options)]
    return "\n\n".join(parts)


def _preset_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in preset_names():
        preset = load_preset(name)
        slots = dict(preset["policies"])
        options = {f"policies.options.{policy}": table for policy, table in slots.pop("options", {}).items()}
        others = [
            f"`{section}.{key} = {_toml(value)}`"
            for section, table in (options | preset).items()
            if isinstance(table, dict) and section != "policies"
            for key, value in table.items()
        ]
        stack = ", ".join(f"{slot} = {policy}" for slot, policy in slots.items())
        rows.append((f"`{name}`", preset["summary"], preset["source"], stack, ", ".join(others)))
    return rows


# ---- the OpenAPI document ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DescribedLink:
    """A replica that is only described: enough to make an application that is never started."""

    info: ReplicaInfo


@dataclass(frozen=True)
class NoText:
    """Tokenizer and template of an application that is never asked anything."""

    vocab_size: int = 49152
    eos_ids: frozenset[int] = field(default_factory=frozenset)

    def render(self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True) -> str:
        return ""


def openapi_document() -> dict[str, Any]:
    """As `GET /openapi.json` gives it for the embedded model, with the versions that shaped it."""
    link = typing.cast(ReplicaLink, DescribedLink(_info()))
    text = typing.cast(Any, NoText())
    document: dict[str, Any] = create_app(link, text, text, Settings()).openapi()
    made_with = {name: ".".join(version(name).split(".")[:2]) for name in ("fastapi", "pydantic")}
    return {**document, "info": {**document["info"], MADE_WITH: made_with}}


def _info() -> ReplicaInfo:
    settings = Settings()
    return ReplicaInfo(
        engine="0",
        model=settings.model,
        context_len_max=8192,
        kv_block_tokens=settings.replica.kv_block_tokens,
        kv_blocks=1024,
        kv_bytes=1 << 30,
        weights_bytes=1 << 30,
        running_max=settings.replica.running_max,
        step_tokens_max=settings.replica.step_tokens,
        device="cpu",
        dtype="bfloat16",
        policies=settings.policies.names(),
        startup_s={"import": 1.0, "weights": 1.0, "kv_pool": 1.0, "warm_up": 1.0},
    )


# ---- text -------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        print(f"docs/reference/{name}")


if __name__ == "__main__":
    main()
