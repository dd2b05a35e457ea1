"""Tokens per second of our engine and of transformers: same weights, same machine, one interleaved run.

    python -m benchmarks.engine [--rounds 2] [--quick] [--write]

Both run in this process, on bfloat16 weights dequantised from the embedded model, greedy, with forced output
lengths. Ours is the replica and the torch executor without HTTP; transformers is `generate` on static batches
of the same size, its prompts all of one length, so that no padding is wasted. Rounds alternate A B A B; the
table shows medians. `--write` renews the engine section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.results import describe_machine, write_section
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import PolicySettings
from penstock.engine.attention import make_attention
from penstock.engine.checkpoint import Checkpoint, open_checkpoint
from penstock.engine.executor import TorchExecutor
from penstock.engine.kv_store import KVStore
from penstock.engine.linear_cpu import CpuLinearBackend
from penstock.engine.model import DecoderModel
from penstock.engine.threads import Threads
from penstock.models.catalogue import resolve
from penstock.models.config import weight_shapes
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

MODEL = "smollm2-135m-instruct"
DTYPE = torch.bfloat16
BLOCK_TOKENS = 16
THREADS = Threads(len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Case:
    name: str
    streams: int
    requests: int
    prompt_tokens: int
    output_tokens: int


CASES = (
    Case("1 stream", 1, 2, 128, 128),
    Case("16 streams", 16, 32, 256, 128),
    Case("64 streams", 64, 64, 512, 64),
)


@dataclass(frozen=True)
class Measured:
    output_tokens_per_s: float
    prefill_tokens_per_s: float | None = None


def prompts(case: Case) -> list[list[int]]:
    """Distinct random prompts: nothing for a prefix cache to find."""
    source = random.Random(case.streams)
    return [[source.randrange(100, 40_000) for _ in range(case.prompt_tokens)] for _ in range(case.requests)]


class Ours:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = DecoderModel.load(
            checkpoint, dtype=DTYPE, device=torch.device("cpu"), linear=CpuLinearBackend(THREADS)
        )
        blocks = (
            max(c.streams * (c.prompt_tokens + c.output_tokens + BLOCK_TOKENS) for c in CASES) // BLOCK_TOKENS
        )
        self._limits = ReplicaLimits(blocks + 64, BLOCK_TOKENS, 64, 512, 8192)
        store = KVStore(self._model.config, self._limits.kv_blocks, BLOCK_TOKENS, DTYPE, torch.device("cpu"))
        attention = make_attention(self._model.config, store)
        self._executor = TorchExecutor(self._model, store, attention, THREADS)

    def run(self, case: Case) -> Measured:
        limits = ReplicaLimits(self._limits.kv_blocks, BLOCK_TOKENS, case.streams, 512, 8192)
        replica = Replica(limits, make_stack(PolicySettings()))
        greedy = SamplingParams(temperature=0.0)
        for index, prompt in enumerate(prompts(case)):
            request = Request(
                f"r{index}", len(prompt), case.output_tokens, 0.0, prompt_tokens=prompt, sampling=greedy
            )
            replica.submit(request, 0.0)
        began_s = time.perf_counter()
        prefill_tokens, prefill_s = 0, 0.0
        while (plan := replica.plan(time.perf_counter() - began_s)) is not None:
            result = self._executor.execute(plan)
            if plan.chunks:
                prefill_tokens += plan.token_count
                prefill_s += result.duration_s
            replica.complete(plan, result, time.perf_counter() - began_s)
        elapsed_s = time.perf_counter() - began_s
        self._executor.reset()
        return Measured(case.requests * case.output_tokens / elapsed_s, prefill_tokens / prefill_s)


class Transformers:
    """`LlamaForCausalLM.generate`, one static batch after the other."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = checkpoint.config
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab,
                hidden_size=config.hidden,
                intermediate_size=config.ffn,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.context_len,
                rms_norm_eps=config.norm_eps,
                rope_theta=config.layer_rope[0].theta,
                tie_word_embeddings=config.tied_embeddings,
            )
        )
        weights = {name: checkpoint.take(name, DTYPE) for name in weight_shapes(config)}
        model.to(DTYPE).load_state_dict(weights, strict=False)
        self._model = model.eval()

    @torch.inference_mode()
    def run(self, case: Case) -> Measured:
        waiting = prompts(case)
        began_s = time.perf_counter()
        while waiting:
            batch, waiting = torch.tensor(waiting[: case.streams]), waiting[case.streams :]
            self._model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                min_new_tokens=case.output_tokens,
                max_new_tokens=case.output_tokens,
                pad_token_id=0,
            )
        return Measured(case.requests * case.output_tokens / (time.perf_counter() - began_s))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ours-only", action="store_true", help="skip transformers")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS.most)
    checkpoint = open_checkpoint(resolve(MODEL))
    engines: dict[str, Callable[[Case], Measured]] = {"penstock": Ours(checkpoint).run}
    if not arguments.ours_only:
        engines["transformers"] = Transformers(checkpoint).run
    found: dict[tuple[str, str], list[Measured]] = {}
    warm = Case("warm-up", 1, 1, 64, 4)
    for run in engines.values():
        run(warm)
    for round_index in range(arguments.rounds):
        for case in CASES:
            for name, run in engines.items():
                measured = run(case)
                found.setdefault((name, case.name), []).append(measured)
                print(f"round {round_index} {case.name:<11} {name:<13} {measured.output_tokens_per_s:7.1f}")
    table = _table(found, list(engines))
    print("\n" + table)
    if arguments.write:
        command = f"python -m benchmarks.engine --rounds {arguments.rounds} --write"
        write_section("engine", f"{describe_machine()}\n\n`{command}`\n\n{table}")


def _table(found: dict[tuple[str, str], list[Measured]], names: list[str]) -> str:
    lines = ["| case | " + " | ".join(f"{name}, out tok/s" for name in names) + " | ratio | prefill tok/s |"]
    lines.append("| --- | " + " | ".join("---:" for _ in names) + " | ---: | ---: |")
    for case in CASES:
        medians = [statistics.median(m.output_tokens_per_s for m in found[name, case.name]) for name in names]
        prefill = statistics.median(m.prefill_tokens_per_s or 0.0 for m in found["penstock", case.name])
        shape = f"{case.name}: {case.requests} × ({case.prompt_tokens} in, {case.output_tokens} out)"
        ratio = f"{medians[0] / medians[1]:.1f}" if len(medians) > 1 else "–"
        lines.append(
            f"| {shape} | " + " | ".join(f"{m:.0f}" for m in medians) + f" | {ratio} | {prefill:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
