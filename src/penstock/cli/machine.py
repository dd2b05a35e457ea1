"""Options and notes that `replay` and the commands of the twin share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from penstock.twin.build import Machine
    from penstock.twin.feasible import TraceFacts

MACHINE, LOAD, SLO, OUTPUT = "Machine", "Load", "SLO (0 turns a target off)", "Output"

HardwareOption = Annotated[
    str,
    typer.Option("--hardware", help="A shipped profile, or a file by `calibrate`.", rich_help_panel=MACHINE),
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="Overheads of which engine.", rich_help_panel=MACHINE)
]
ParallelOption = Annotated[
    int,
    typer.Option("--tensor-parallel", min=1, help="Devices that share each layer.", rich_help_panel=MACHINE),
]
ReplicasOption = Annotated[
    int, typer.Option("--replicas", min=1, max=4096, help="Dealt to in turn.", rich_help_panel=MACHINE)
]
KvOption = Annotated[
    str | None,
    typer.Option("--kv-memory", help="KV pool size, for example `2GiB`.", rich_help_panel=MACHINE),
]
RunningOption = Annotated[
    int | None,
    typer.Option("--running-max", help="Sequences that may run at once.", rich_help_panel=MACHINE),
]
StepOption = Annotated[
    int | None, typer.Option("--step-tokens", help="Token budget of one step.", rich_help_panel=MACHINE)
]
ClosedLoopOption = Annotated[
    bool,
    typer.Option(
        "--closed-loop",
        help="A session's next turn waits for answer + think time.",
        rich_help_panel=LOAD,
    ),
]
CapOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency-max", min=1, max=65536, help="Most requests in flight.", rich_help_panel=LOAD
    ),
]
AskedOption = Annotated[
    int | None,
    typer.Option(
        "--asked-tokens",
        min=1,
        help="`max_tokens` of every request, which ends by itself after its recorded output; else policies "
        "know each output's length.",
        rich_help_panel=LOAD,
    ),
]
WarmupOption = Annotated[
    float,
    typer.Option(
        "--warmup-s", min=0, help="Leave the first seconds out of the report.", rich_help_panel=LOAD
    ),
]
PromptMaxOption = Annotated[
    int | None, typer.Option("--max-prompt-tokens", min=1, help="Cut longer prompts.", rich_help_panel=LOAD)
]
OutputMaxOption = Annotated[
    int | None, typer.Option("--max-output-tokens", min=1, help="Cut longer outputs.", rich_help_panel=LOAD)
]
TtftOption = Annotated[float, typer.Option("--slo-ttft-ms", min=0, rich_help_panel=SLO)]
TpotOption = Annotated[float, typer.Option("--slo-tpot-ms", min=0, rich_help_panel=SLO)]
E2eOption = Annotated[float, typer.Option("--slo-e2e-ms", min=0, rich_help_panel=SLO)]


def trace_notes(machine: Machine, facts: TraceFacts, steps_out_of_range: int = 0) -> list[str]:
    """What to know before believing the numbers."""
    notes = [f"modelled: each step's time has an error of about ±{machine.cost.relative_error:.0%}"]
    if steps_out_of_range:
        notes.append(
            f"{steps_out_of_range} times a step went beyond what the profile was calibrated on: "
            "less sure than stated"
        )
    if facts.never_fit:
        notes.append(
            f"{facts.never_fit} of {facts.rows} requests can never run here, and were refused. The first: "
            + facts.never_fit_reason
        )
    if facts.failed:
        notes.append(f"{facts.failed} requests that failed in the trace were left out")
    return notes
