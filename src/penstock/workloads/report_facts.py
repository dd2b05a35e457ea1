"""What a run was, in words: the same list on the terminal and in the HTML report."""

from __future__ import annotations

from penstock.workloads import wording
from penstock.workloads.report import ClientFacts, Energy, Report


def facts(report: Report) -> list[tuple[str, str]]:
    """Name and value, in the order they are shown. Nothing is escaped here."""
    counts, tokens = report.requests, report.tokens
    found = [
        ("measured span", wording.seconds(round(report.span_s, 1))),
        ("requests", f"{counts.total} sent, {counts.warmup} warm-up, {counts.interrupted} interrupted"),
        ("tokens", f"{tokens.prompt} prompt ({tokens.cached} from cache), {tokens.output} output"),
    ]
    if report.client is not None:
        found += _client_facts(report.client)
    if report.server is not None:
        counters = report.server.counters.items()
        found += [(f"server {key.replace('_', ' ')}", wording.number(value)) for key, value in counters]
    if report.energy is not None:
        found.append(("energy while computing", _energy(report.energy)))
    configuration = report.configuration.items()
    return found + [(key.replace("_", " "), str(value)) for key, value in configuration if value is not None]


def _client_facts(client: ClientFacts) -> list[tuple[str, str]]:
    prompts, outputs = client.prompt_length_mismatches, client.output_length_mismatches
    found = [
        ("prompts", client.prompts),
        ("in flight", f"at most {client.in_flight_max}; {client.cap_waits} sends waited for the cap"),
        ("length mismatches", f"{prompts} prompts, {outputs} outputs"),
    ]
    if client.lag_ms is not None:
        p50, p99, most = (
            wording.milliseconds(value) for value in (client.lag_ms.p50, client.lag_ms.p99, client.lag_ms.max)
        )
        found.append(("client lag", f"p50 {p50}, p99 {p99}, max {most} (inside TTFT)"))
    if client.tokens_per_chunk is not None:
        found.append(("tokens per piece", f"{client.tokens_per_chunk:.3g}"))
    return found


def _energy(energy: Energy) -> str:
    per_token, per_request = energy.joules_per_output_token, energy.joules_per_request
    said = f"{energy.busy_joules / 1e3:.1f} kJ"
    if per_token is not None and per_request is not None:
        said += f", {per_token:.3g} J an output token, {per_request:.3g} J a request"
    return f"{said} (power figures: {energy.power_status})"
