"""From a finished replay to its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from penstock.core.metrics import RequestOutcome, Slo
from penstock.workloads.exchange import Exchange
from penstock.workloads.replay import ReplayRun
from penstock.workloads.report import ClientFacts, Report, ReportInput, Summary
from penstock.workloads.shape import ShapeCounts

LAG_NOTE_MS = 100.0


def report_of_run(
    run: ReplayRun,
    *,
    title: str,
    slo: Slo,
    warmup_s: float,
    shaping: ShapeCounts,
    configuration: Mapping[str, Any],
) -> Report:
    """Pure. Every class that was replayed is held against the one SLO of the command line."""
    exchanges = run.exchanges
    outcomes = [exchange.outcome for exchange in exchanges]
    client = _client_facts(run)
    return Report.build(
        ReportInput(
            kind="replay",
            title=title,
            outcomes=outcomes,
            slos={outcome.slo_class: slo for outcome in outcomes},
            warmup_s=warmup_s,
            sent_s=[exchange.sent_s for exchange in exchanges],
            client=client,
            server=run.server,
            configuration=configuration,
            notes=_notes(run, client, shaping),
            interrupted=run.interrupted,
        )
    )


def _client_facts(run: ReplayRun) -> ClientFacts:
    answered = [exchange for exchange in run.exchanges if exchange.outcome.is_answered]
    counted = [exchange for exchange in answered if exchange.usage]
    chunks = sum(exchange.chunks for exchange in counted)
    return ClientFacts(
        lag_ms=lag_ms(run),
        in_flight_max=run.in_flight_max,
        cap_waits=run.cap_waits,
        prompts=_prompts_in_words(run),
        prompt_length_mismatches=sum(_prompt_differs(exchange) for exchange in counted),
        output_length_mismatches=sum(
            exchange.outcome.output_tokens != exchange.asked.output_tokens for exchange in answered
        ),
        tokens_per_chunk=_sum_outputs(exchange.outcome for exchange in counted) / chunks if chunks else None,
    )


def lag_ms(run: ReplayRun) -> Summary | None:
    """How late the client itself sent: sent − due."""
    lags_ms = [max(0.0, exchange.sent_s - exchange.outcome.arrival_s) * 1e3 for exchange in run.exchanges]
    return Summary.of(np.array(lags_ms))


def _prompt_differs(exchange: Exchange) -> bool:
    return exchange.outcome.prompt_tokens != exchange.asked.prompt_tokens


def _sum_outputs(outcomes: Iterable[RequestOutcome]) -> int:
    return sum(outcome.output_tokens for outcome in outcomes)


def _prompts_in_words(run: ReplayRun) -> str:
    if run.text_fit is None:
        return "token ids of the exact length"
    if run.text_fit.is_exact:
        return "text, fitted to the server's own tokenizer"
    return "text of APPROXIMATE length: the server has no usable /tokenize"


def _shorter_than_template(run: ReplayRun) -> int:
    """Text prompts that had no room for a single word."""
    overhead = 0 if run.text_fit is None else run.text_fit.overhead_tokens
    return sum(exchange.asked.prompt_tokens <= overhead for exchange in run.exchanges)


def _notes(run: ReplayRun, client: ClientFacts, shaping: ShapeCounts) -> list[str]:
    """What somebody must know before believing the numbers."""
    notes = []
    if run.stopped_early:
        notes.append(f"the trace was not sent to its end: {run.stopped_early}")
    if shaping.failed:
        notes.append(f"{shaping.failed} requests that failed in the trace were not replayed")
    if shaping.prompts_clamped or shaping.outputs_clamped:
        prompts, outputs = shaping.prompts_clamped, shaping.outputs_clamped
        notes.append(f"lengths were clamped: {prompts} prompts and {outputs} outputs")
    if run.over_context:
        notes.append(
            f"{run.over_context} requests asked for more than the server's context; "
            "`--length-divisor` or `--max-prompt-tokens` makes them fit"
        )
    if too_short := _shorter_than_template(run):
        notes.append(f"{too_short} prompts are shorter than the chat template allows, and were sent longer")
    if run.text_fit is not None and not run.text_fit.is_exact:
        notes.append("prompt lengths are approximate: the server has no usable /tokenize")
    if run.cap_waits:
        notes.append(
            f"{run.cap_waits} sends waited for the in-flight cap, so arrivals were not open loop there"
        )
    if client.lag_ms is not None and client.lag_ms.p99 > LAG_NOTE_MS:
        notes.append(f"this client lagged: p99 {client.lag_ms.p99:.0f} ms late; TTFT includes it")
    if run.unsent:
        notes.append(f"{run.unsent} requests were due but not yet sent when the run was interrupted")
    return notes
