"""`penstock serve`: one command from nothing to an OpenAI-compatible server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.settings import ConfigOption, read_settings
from penstock.core.errors import EnvironmentMissing

if TYPE_CHECKING:
    from penstock.core.settings import Settings
    from penstock.models.source import ModelSource
    from penstock.replica.messages import ReplicaInfo

EXAMPLES = """
Examples:

    penstock serve

    penstock serve --model ./my-model --port 9000 --kv-memory 2GiB

    penstock serve --config penstock.toml --preset vllm-v0
"""


def register(app: typer.Typer) -> None:
    app.command("serve", epilog=EXAMPLES)(serve)


def serve(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Catalogue name, folder, .gguf file, or hf:owner/name."),
    ] = None,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
    preset: Annotated[str | None, typer.Option(help="A named policy stack; see `penstock policies`.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    device: Annotated[str | None, typer.Option(help="`auto`, `cpu` or `cuda`.")] = None,
    dtype: Annotated[str | None, typer.Option(help="`auto`, `bfloat16`, `float16` or `float32`.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine; 0 takes every core.")
    ] = None,
    kv_memory: Annotated[str | None, typer.Option(help="KV pool size, for example `2GiB`.")] = None,
    context_len: Annotated[int | None, typer.Option(help="Longest prompt + output served, tokens.")] = None,
    running_max: Annotated[int | None, typer.Option(help="Sequences that may run at once.")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Token budget of one step.")] = None,
    drain_timeout_s: Annotated[float | None, typer.Option(help="Time streams get after SIGTERM.")] = None,
    record: Annotated[
        str | None, typer.Option(help="Request log to write; `simulate` and `replay` read it.")
    ] = None,
    step_trace: Annotated[
        str | None, typer.Option(help="Step trace to write; `calibrate --from-steps` reads it.")
    ] = None,
    journal: Annotated[str | None, typer.Option(help="Decision journal to write, for debugging.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile of `calibrate` to compare the engine's steps with.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write the URL to this file once requests are taken.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the start-up summary as JSON.")] = False,
) -> None:
    """Start the gateway and the engine, and print the URL. Ctrl-C drains and stops."""
    resolved = read_settings(
        config,
        {
            "model": model,
            "preset": preset,
            "served_model_name": served_model_name,
            "gateway.host": host,
            "gateway.port": port,
            "gateway.drain_timeout_s": drain_timeout_s,
            "replica.device": device,
            "replica.dtype": dtype,
            "replica.threads": threads,
            "replica.kv_memory": kv_memory,
            "replica.context_len": context_len,
            "replica.running_max": running_max,
            "replica.step_tokens": step_tokens,
            "record.requests": record,
            "record.steps": step_trace,
            "record.journal": journal,
            "twin.profile": profile,
        },
    )
    raise typer.Exit(run_server(resolved.settings, ready_file, as_json))


def run_server(settings: Settings, ready_file: Path | None, as_json: bool) -> int:
    """Resolve the model, start the engine, serve until told to stop. Returns the exit code."""
    _require_extras()
    from penstock.cli.model import show_progress
    from penstock.engine.link import EngineLink
    from penstock.gateway.app import create_app
    from penstock.gateway.server import bind, run_gateway
    from penstock.models.catalogue import resolve
    from penstock.models.chat import ChatTemplate
    from penstock.models.tokenizer import Tokenizer
    from penstock.policies.stack import check_servable, make_stack_of
    from penstock.twin.costs.recorded import predictor_of
    from penstock.workloads.recording import RequestLog

    # What can be wrong without a model is told before one is loaded: a policy's name, a taken port.
    make_stack_of(settings)
    check_servable(settings)
    sock = bind(settings.gateway.host, settings.gateway.port)
    with show_progress() as progress:
        source = resolve(settings.model, progress=progress)
    name = settings.served_model_name or source.name
    predict_step = predictor_of(Path(settings.twin.profile)) if settings.twin.profile else None
    recorder = None
    if settings.record.requests:
        recorder = RequestLog(Path(settings.record.requests), settings.replica.kv_block_tokens)
    link = EngineLink(settings, source, name)
    try:
        tokenizer = Tokenizer.load(source)
        template = ChatTemplate.load(source, tokenizer)
        info = link.wait_ready(_tell_stage)
        app = create_app(link, tokenizer, template, settings, recorder=recorder, predict_step=predict_step)

        def on_ready(url: str) -> None:
            print(_summary_json(url, info) if as_json else _summary(url, info, source), flush=True)
            if ready_file is not None:
                part = ready_file.with_name(f".{ready_file.name}.part")
                part.write_text(url + "\n")
                part.replace(ready_file)  # whoever waits for the file finds it whole

        return run_gateway(app, settings, sock=sock, on_ready=on_ready)
    finally:
        link.close(timeout_s=5.0)
        sock.close()
        if recorder is not None:
            recorder.close(timeout_s=30.0)


def _require_extras() -> None:
    import importlib.util

    missing = [name for name in ("torch", "fastapi", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentMissing(
            f"`penstock serve` needs {', '.join(missing)}",
            hint="Install them with `pip install 'penstock[all]'`.",
        )


def _tell_stage(stage: str, seconds: float) -> None:
    print(f"start-up: {stage} {seconds:.2f} s", file=sys.stderr)


def _summary(url: str, info: ReplicaInfo, source: ModelSource) -> str:
    from penstock.core.units import format_bytes

    kv_tokens = info.kv_blocks * info.kv_block_tokens
    stack = "  ".join(f"{slot}={policy}" for slot, policy in info.policies.items())
    return "\n".join(
        (
            f"penstock serves {info.model} at {url}",
            f"  model     {source.origin}; context {info.context_len_max} tokens",
            f"  memory    weights {format_bytes(info.weights_bytes)}, "
            f"KV {format_bytes(info.kv_bytes)} for {kv_tokens} tokens",
            f"  engine    {info.device}, {info.dtype}, up to {info.running_max} sequences, "
            f"{info.step_tokens_max} tokens a step",
            f"  policies  {stack}",
            f"  page      {url}/",
            f"  try       curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d "
            f"'{_example_body(info.model)}'",
        )
    )


def _example_body(model: str) -> str:
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Name three rivers."}]}
    return json.dumps(body)


def _summary_json(url: str, info: ReplicaInfo) -> str:
    from dataclasses import asdict

    return json.dumps({"url": url, **asdict(info)})
