"""`penstock batch`: a file of requests, planned as a whole and run at once."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.output import check_output, unwritable
from penstock.cli.settings import ConfigOption, read_settings
from penstock.core.errors import ConfigError, EnvironmentMissing, InvalidRequest

if TYPE_CHECKING:
    from penstock.core.settings import Settings
    from penstock.gateway.batches.lines import JobFile, LineResult
    from penstock.gateway.batches.summary import Summary

_HELP = """Run a file of requests, one JSON object a line as in OpenAI's Batch API, and write their answers.

Without `--url` it starts an engine for the job, plans which requests share a prefix, and runs them group by
group (preset `batchllm`). Answers are in the order of the file. Ctrl-C keeps what is done."""

_EPILOG = """Examples:

    penstock batch questions.jsonl --out answers.jsonl

    penstock batch questions.jsonl --model ./my-model --kv-memory 4GiB --json

    penstock batch questions.jsonl --url http://127.0.0.1:8000 --completion-window 2h
"""

_ENGINE, _SERVER, _OUTPUT = "Engine of its own", "Server", "Output"
PRESET = "batchllm"
PROBLEMS_SHOWN = 10
LINE_HINT = "Each line is an object with `custom_id`, `method`, `url` and `body`: docs/commands/batch.md."


def register(app: typer.Typer) -> None:
    app.command("batch", help=_HELP, epilog=_EPILOG)(batch)


def batch(
    file: Annotated[Path, typer.Argument(help="Requests, one JSON object a line.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where answers go; by default FILE.results.jsonl.", rich_help_panel=_OUTPUT),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Server whose batch API runs the file instead.", rich_help_panel=_SERVER),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="Bearer key.", show_envvar=True, rich_help_panel=_SERVER),
    ] = None,
    completion_window: Annotated[
        str, typer.Option(help="How long the server may take.", rich_help_panel=_SERVER)
    ] = "24h",
    config: ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Catalogue name, folder or file.", rich_help_panel=_ENGINE),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A named policy stack; `batchllm`.", rich_help_panel=_ENGINE)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="`auto`, `cpu` or `cuda`.", rich_help_panel=_ENGINE)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="`auto`, `bfloat16`, `float16` or `float32`.", rich_help_panel=_ENGINE),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; 0 takes every core.", rich_help_panel=_ENGINE)
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="KV pool size, for example `2GiB`.", rich_help_panel=_ENGINE)
    ] = None,
    running_max: Annotated[
        int | None, typer.Option(help="Sequences that may run at once.", rich_help_panel=_ENGINE)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    if not file.is_file():
        raise EnvironmentMissing(f"`{file}` is not a file.", hint="Check the path.")
    target = out or file.with_name(file.name.removesuffix(".jsonl") + ".results.jsonl")
    if target.resolve() == file.resolve():
        raise ConfigError("`--out` is the file of requests itself.", hint="Name another file.", param="out")
    check_output(target)
    if url is not None:
        from penstock.cli.batch_remote import run_remote

        summary = run_remote(file, target, url, api_key, completion_window, _tell)
    else:
        flags = {
            "model": model,
            "preset": preset,
            "replica.device": device,
            "replica.dtype": dtype,
            "replica.threads": threads,
            "replica.kv_memory": kv_memory,
            "replica.running_max": running_max,
        }
        summary = _run_here(file, target, _settings_of(config, flags))
    _show(summary, target, as_json)
    raise typer.Exit(0 if summary.failed == 0 else 1)


def _settings_of(config: Path | None, flags: dict[str, Any]) -> Settings:
    """Those of `serve`, on the preset for jobs where nobody names another."""
    resolved = read_settings(config, flags)
    if resolved.origins["preset"] == "default":
        resolved = read_settings(config, {**flags, "preset": PRESET})
    return resolved.settings


def _run_here(path: Path, target: Path, settings: Settings) -> Summary:
    """On an engine of its own. Raises InvalidRequest for a file that is none of requests."""
    _require_extras()
    from dataclasses import replace

    from penstock.gateway.batches.lines import read_job
    from penstock.gateway.batches.offline import offline_settings
    from penstock.gateway.batches.summary import summarised

    file = read_job(path, None, settings.batch.requests_max)
    _check_lines(path, file)
    asked = file.body(file.lines[0]).get("model")
    settings = offline_settings(settings)
    if isinstance(asked, str) and not settings.served_model_name:
        settings = replace(settings, served_model_name=asked)  # whatever the file calls it
    results: list[LineResult] = []
    try:
        plan, seconds = _serve(settings, file, results)
    except BaseException:
        if results:
            _write(target, file, results)
            tell_kept(len(results), target)
        raise
    return summarised(_write(target, file, results), plan, seconds)


def _serve(settings: Settings, file: JobFile, results: list[LineResult]) -> tuple[Any, float]:
    from penstock.cli.model import show_progress
    from penstock.engine.link import EngineLink
    from penstock.gateway.app import create_app
    from penstock.gateway.batches.offline import run_offline
    from penstock.models.catalogue import resolve
    from penstock.models.chat import ChatTemplate
    from penstock.models.tokenizer import Tokenizer
    from penstock.policies.stack import make_stack_of

    make_stack_of(settings)  # what can be wrong without a model is told before one is loaded
    with show_progress() as progress:
        source = resolve(settings.model, progress=progress)
    link = EngineLink(settings, source, source.name)
    try:
        tokenizer = Tokenizer.load(source)
        template = ChatTemplate.load(source, tokenizer)
        link.wait_ready()
        app = create_app(link, tokenizer, template, settings)
        total = len(file.lines)
        return asyncio.run(
            run_offline(app.state.gateway, file, results, lambda done: _tell(f"{done} of {total} requests"))
        )
    finally:
        link.close(timeout_s=5.0)


def _check_lines(path: Path, file: JobFile) -> None:
    """Raise InvalidRequest, naming the first lines that are wrong."""
    if not file.problems:
        return
    shown = [
        f"line {problem.line}: {problem.message}" if problem.line else problem.message
        for problem in file.problems[:PROBLEMS_SHOWN]
    ]
    raise InvalidRequest(
        f"`{path}` cannot be run:\n  " + "\n  ".join(shown),
        hint=LINE_HINT,
    )


def _write(target: Path, file: JobFile, results: list[LineResult]) -> list[dict[str, Any]]:
    from penstock.gateway.batches.offline import in_input_order

    rows = [result.json() for result in in_input_order(file.lines, results)]
    write_rows(target, rows)
    return rows


def write_rows(target: Path, rows: list[dict[str, Any]]) -> None:
    """The file appears whole or not at all."""
    from penstock.workloads.report_files import write_whole

    try:
        write_whole(target, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise unwritable(target, error) from error


def tell_kept(count: int, target: Path) -> None:
    """Of an interrupted run."""
    if sys.stderr.isatty():
        print(file=sys.stderr)  # the line of the progress stays
    print(f"{count} results are kept in {target}", file=sys.stderr)


def _require_extras() -> None:
    import importlib.util

    missing = [name for name in ("torch", "fastapi", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentMissing(
            f"`penstock batch` needs {', '.join(missing)}",
            hint="Install them with `pip install 'penstock[all]'`, or use a server with `--url`.",
        )


def _tell(text: str) -> None:
    """Progress, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def _show(summary: Summary, target: Path, as_json: bool) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    facts = {**summary.json, "results": str(target)}
    if as_json:
        print(json.dumps(facts, allow_nan=False))
        return
    planned = ""
    if summary.planned_saved_tokens is not None:
        planned = f" (planned {summary.planned_saved_tokens:,}, in {summary.groups} groups)"
    print(f"answered  {summary.answered} of {summary.requests} requests, {summary.failed} failed")
    if summary.first_failure is not None:
        print(f"          the first: {summary.first_failure}")
    print(
        f"prompts   {summary.prompt_tokens:,} tokens, of which {summary.saved_tokens:,} "
        f"({facts['saved_frac']:.1%}) were not computed again{planned}"
    )
    print(f"outputs   {summary.output_tokens:,} tokens")
    print(
        f"speed     {summary.seconds:.1f} s: {facts['tokens_per_s']:,.0f} tokens/s, "
        f"{facts['output_tokens_per_s']:,.0f} of output"
    )
    print(f"results   {target}")
