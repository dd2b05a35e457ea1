"""vLLM 0.5.4 on eight H100: overheads from four measured mean TPOTs, a check on the other fourteen.

    python -m benchmarks.fit_engine

Measurements: microsoft/apex_plus `vllm/results` (Llama-3.1-70B in bfloat16; plans TP8, two replicas of TP4,
four of TP2, requests dealt in turn; Poisson arrivals; custom all-reduce off). Facts only: sums of prompt and
of really generated tokens, mean TPOTs, as the result files state them, and the count of requests listed.
Card apex, test 1, names the four points that may be used for fitting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.fitting import Parameter, fit
from benchmarks.results import write_section
from penstock.twin.costs.hardware import EngineProfile, load_engine, load_hardware
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec, Parallel
from penstock.twin.costs.work import StepWork

DEVICES = 8
PLANS = (8, 4, 2)  # tensor-parallel width of a replica; DEVICES / width replicas
FITTED_PLANS = (8, 2)
CHUNK_TOKENS = 512  # vLLM 0.5.4 cuts prompts of long-context models so
ROUNDS = 60

LLAMA_3_70B = ModelSpec(
    layers=80,
    hidden=8192,
    heads=64,
    kv_heads=8,
    head_dim=128,
    ffn=28672,
    vocab=128256,
    windows=((None, 80),),
    tied_head=False,
)


@dataclass(frozen=True)
class Run:
    """One trace's totals and its mean TPOT under each plan, in the order of PLANS."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    rate_rps: float
    tpot_ms: tuple[float, float, float]
    is_fitted: bool = False


RUNS = (
    Run("lmsys_025", 1024, 76_061, 77_104, 0.25, (13.8, 20.1, 31.7), is_fitted=True),
    Run("lmsys_05", 1024, 76_061, 81_287, 0.5, (14.1, 19.9, 31.8)),
    Run("creation_025", 512, 157_563, 581_628, 0.25, (15.6, 20.8, 32.4)),
    Run("creation_05", 512, 157_563, 581_462, 0.5, (17.7, 21.5, 33.3), is_fitted=True),
    Run("summarization_025", 1280, 3_584_478, 170_148, 0.25, (14.8, 20.5, 32.2)),
    Run("summarization_05", 1280, 3_584_478, 171_757, 0.5, (15.9, 20.9, 32.8)),
)


def models(engine: EngineProfile) -> dict[int, CostModel]:
    hardware = load_hardware("h100-sxm")
    return {
        width: RooflineCostModel(LLAMA_3_70B, hardware, engine, Parallel(tensor=width)) for width in PLANS
    }


def mean_tpot_s(model: CostModel, run: Run, width: int) -> float:
    """Mean TPOT from the mean batch that the trace implies, without simulating it.

    A token sees itself and, by Little's law, rate · output · TPOT others; the prompts that arrive meanwhile
    delay it by their own time. A fixed point, because TPOT stands on both sides.
    """
    rate_rps = run.rate_rps * width / DEVICES
    prompt, output = run.prompt_tokens / run.requests, run.output_tokens / run.requests
    prefill_s = prompt_s(model, round(prompt))
    tpot_s = 0.02
    for _ in range(ROUNDS):
        batch = 1.0 + rate_rps * output * tpot_s
        step_s = _decode_s(model, batch, prompt + output / 2)
        tpot_s = step_s / (1.0 - rate_rps * prefill_s)
    return tpot_s


def prompt_s(model: CostModel, tokens: int) -> float:
    """Seconds of one prompt's chunks, alone."""
    total_s = 0.0
    for start in range(0, tokens, CHUNK_TOKENS):
        end = min(tokens, start + CHUNK_TOKENS)
        total_s += model.seconds(StepWork([(end - start, end)], 0, 0, int(end == tokens)))
    return total_s


def _decode_s(model: CostModel, batch: float, context: float) -> float:
    """Between the two whole batches beside `batch`."""
    low = int(batch)
    share = batch - low
    few, more = (
        model.seconds(StepWork((), count, round(count * context), count)) for count in (low, low + 1)
    )
    return few * (1.0 - share) + more * share


def fitted_engine(base: EngineProfile) -> EngineProfile:
    """`base` with the step's and the sequence's overhead fitted to the four named points."""
    fitted_runs = [run for run in RUNS if run.is_fitted]

    def predict(values: dict[str, float]) -> list[float]:
        built = models(replace(base, **values))
        return [mean_tpot_s(built[width], run, width) for run in fitted_runs for width in FITTED_PLANS]

    measured = [run.tpot_ms[PLANS.index(width)] / 1e3 for run in fitted_runs for width in FITTED_PLANS]
    parameters = [Parameter("step_s", 2e-3, 1e-5, 2e-2), Parameter("sequence_s", 3e-4, 1e-6, 5e-3)]
    values = fit(parameters, predict, measured)
    return replace(base, **{name: float(f"{value:.4g}") for name, value in values.items()})


def predictions(engine: EngineProfile) -> Iterator[tuple[Run, int, float, float]]:
    """(run, plan, predicted ms, measured ms) of all eighteen."""
    built = models(engine)
    for run in RUNS:
        for width, measured_ms in zip(PLANS, run.tpot_ms, strict=True):
            yield run, width, mean_tpot_s(built[width], run, width) * 1e3, measured_ms


def table(engine: EngineProfile) -> str:
    lines = [
        "`python -m benchmarks.fit_engine`",
        "",
        "Mean TPOT in ms of Llama-3.1-70B on 8 H100 under vLLM 0.5.4: predicted / measured (error), in",
        "closed form from each trace's mean lengths and rate. Starred: the points that were fitted.",
        "",
        "| trace | TP8 | 2 × TP4 | 4 × TP2 |",
        "| --- | ---: | ---: | ---: |",
    ]
    cells: dict[str, list[str]] = {}
    for run, width, predicted, measured in predictions(engine):
        star = "*" if run.is_fitted and width in FITTED_PLANS else ""
        text = f"{predicted:.1f} / {measured:.1f} ({predicted / measured - 1:+.1%}){star}"
        cells.setdefault(run.name, []).append(text)
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()])


def main() -> None:
    text = table(load_engine("vllm-2024"))
    write_section("twin-apex", text)
    print(text)


if __name__ == "__main__":
    main()
