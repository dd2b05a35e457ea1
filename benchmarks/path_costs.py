"""What a request costs outside its engine steps: medians for the twin's `PathCosts`, and for docs/twin.md.

    python -m benchmarks.path_costs [--requests 20] [--write]

A real server writes its journal and step trace while one client after the other streams from it. Client,
gateway and engine read one monotonic clock, so each leg of a request is the difference of two instants:

    client sends ─► gateway has it (arrival) ─► engine's inbox │ step ends ─► client has its token

Prompts are of several lengths, once as text and once as token ids: the slope over the length, of text less of
ids, is what tokenising costs. The parts that can be timed alone are timed alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results import describe_machine, write_section
from benchmarks.server_process import ServerProcess, start_server
from penstock.core.request import SamplingParams
from penstock.engine.sampling import SamplingRow, sample
from penstock.models.catalogue import resolve
from penstock.models.detokenize import IncrementalDetokenizer
from penstock.models.tokenizer import Tokenizer
from penstock.twin.costs.recorded import read_steps

MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS = (32, 160, 448)  # each fits into one step, so that every token is one step
OUTPUT_TOKENS = 8
ROUNDS = 15
SEED = 11


@dataclass(frozen=True)
class Legs:
    """One request's seconds on the way, and the length of its prompt."""

    is_text: bool
    prompt_tokens: int
    to_gateway_s: float
    to_engine_s: float
    to_client_s: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20, help="of each length and kind")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(resolve(MODEL))
    rows = [*live_rows(tokenizer, arguments.requests), *text_rows(tokenizer), *sampling_rows(tokenizer)]
    text = table(rows)
    print(text)
    if arguments.write:
        command = f"python -m benchmarks.path_costs --requests {arguments.requests}"
        write_section("path-costs", f"{describe_machine()}\n\n`{command} --write`\n\n{text}")
    return 0


# ---- the legs of live requests ----------------------------------------------------------------------------


def live_rows(tokenizer: Tokenizer, requests: int) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal, steps = folder / "journal", folder / "steps"
        with start_server(MODEL, folder, "--journal", str(journal), "--step-trace", str(steps)) as server:
            startup_s: dict[str, float] = server.info["startup_s"]
            sent = send_all(server, tokenizer, requests)
            assert server.stop() == 0, server.log
        found = legs_of(journal, sent)
        records = list(read_steps(steps))
    yield "client → gateway (arrival)", ms(median(each.to_gateway_s for each in found))
    for prompt_tokens in PROMPT_TOKENS:
        by_kind = [at_length(found, prompt_tokens, is_text) for is_text in (False, True)]
        yield f"gateway → engine's inbox, {prompt_tokens} tokens: ids, text", " / ".join(map(ms, by_kind))
    yield "tokenising on that way, a token", us(tokenise_s_per_token(found))
    yield "step end → client has the token", ms(median(s for each in found for s in each.to_client_s))
    yield "deciding, a step of one decode", us(median(each.schedule_s for each in records))
    between_s = [each.between_s for each in records if each.between_s]
    yield "between two steps: reporting, inbox", us(median(between_s))
    yield "start-up: " + ", ".join(startup_s), " / ".join(f"{s:.2f} s" for s in startup_s.values())


def at_length(found: Sequence[Legs], prompt_tokens: int, is_text: bool) -> float:
    """Seconds from arrival to inbox; the length is the asked one, which text meets about."""
    return median(
        each.to_engine_s
        for each in found
        if each.is_text is is_text and abs(each.prompt_tokens - prompt_tokens) <= prompt_tokens // 4
    )


def tokenise_s_per_token(found: Sequence[Legs]) -> float:
    """Text's slope over the length less that of ids, between the shortest and the longest prompt."""
    short, long = PROMPT_TOKENS[0], PROMPT_TOKENS[-1]
    grown = [at_length(found, long, is_text) - at_length(found, short, is_text) for is_text in (True, False)]
    return (grown[0] - grown[1]) / (long - short)


@dataclass(frozen=True)
class Sent:
    """What the client noted: instants of sending and of each token's arrival."""

    is_text: bool
    sent_s: float
    tokens_s: list[float]


def send_all(server: ServerProcess, tokenizer: Tokenizer, requests: int) -> list[Sent]:
    """One request at a time, kinds and lengths in turn; no prompt begins like another."""
    draw = random.Random(SEED)
    (letter,) = tokenizer.encode("a", add_special=False)
    sent = []
    with server.client() as client:
        for _ in range(requests):
            for prompt_tokens in PROMPT_TOKENS:
                for is_text in (False, True):
                    ids = [draw.randrange(1000, 40_000) for _ in range(prompt_tokens)]
                    words = [f"{draw.randrange(10, 99)} word" for _ in range(prompt_tokens // 4)]
                    body = {
                        "model": MODEL,
                        "prompt": " ".join(words) if is_text else ids,
                        "max_tokens": OUTPUT_TOKENS,
                        "temperature": 0,
                        "ignore_eos": True,
                        "stream": True,
                        "logit_bias": {str(letter): 100},  # every token is text, so every token is an event
                    }
                    sent.append(send(client, body, is_text))
    return sent


def send(client: Any, body: dict[str, Any], is_text: bool) -> Sent:
    tokens_s = []
    sent_s = time.monotonic()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            now_s = time.monotonic()
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                tokens_s.append(now_s)
    assert len(tokens_s) == OUTPUT_TOKENS
    return Sent(is_text, sent_s, tokens_s)


def legs_of(journal: Path, sent: Sequence[Sent]) -> list[Legs]:
    """Join what the client noted with what the engine wrote: one request after the other, in both."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    submits = [line for line in lines if line["call"] == "submit"]
    ends_s = [line["at_s"] for line in lines if line["call"] == "complete"]
    assert len(submits) == len(sent) and len(ends_s) == len(sent) * OUTPUT_TOKENS
    found = []
    for index, (each, submit) in enumerate(zip(sent, submits, strict=True)):
        own_s = ends_s[index * OUTPUT_TOKENS : (index + 1) * OUTPUT_TOKENS]
        found.append(
            Legs(
                each.is_text,
                submit["prompt_len"],
                submit["arrival_s"] - each.sent_s,
                submit["at_s"] - submit["arrival_s"],
                [got_s - end_s for got_s, end_s in zip(each.tokens_s, own_s, strict=True)],
            )
        )
    return found


# ---- parts by themselves ----------------------------------------------------------------------------------


def text_rows(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    words = ("The river flows past the old mill, and the miller counts his sacks of flour. " * 700).strip()
    for length in (128, 1024, 8192):
        text = tokenizer.decode(tokenizer.encode(words)[:length])
        count = len(tokenizer.encode(text))
        yield (
            f"tokenising alone, a token of {count}",
            us(timed_s(lambda text=text: tokenizer.encode(text)) / count),
        )
    ids = tokenizer.encode(words)[:1024]

    def detokenise() -> None:
        detokenizer = IncrementalDetokenizer(tokenizer, stop=(), continues_text=False)
        for token_id in ids:
            detokenizer.push(token_id)

    yield "detokenising, a token", us(timed_s(detokenise) / len(ids))


def sampling_rows(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    generator = torch.Generator().manual_seed(SEED)
    history = list(range(500))
    for name, params in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("temperature 1", SamplingParams()),
        ("top_p 0.9", SamplingParams(top_p=0.9)),
    ):
        found = []
        for count in (1, 16, 64):
            logits = 5 * torch.randn(count, tokenizer.vocab_size, generator=generator)  # peaked, as a model's
            rows = [SamplingRow(params, history, len(history), frozenset()) for _ in range(count)]
            found.append(us(timed_s(lambda logits=logits, rows=rows: sample(logits, rows)) / count))
        yield f"sampling, {name}, a row of 1 / 16 / 64", " / ".join(found)


def timed_s(call: Callable[[], object]) -> float:
    """Median seconds of one call, after a first that is not counted."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began_s)
    return median(seconds)


def table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| leg or part | median |", "| --- | ---: |", *(f"| {a} | {b} |" for a, b in rows)])


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


if __name__ == "__main__":
    sys.exit(main())
