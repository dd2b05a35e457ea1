"""The shape of a model as its cost sees it, and how it is cut over devices. Plain data, pure functions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import ConfigError
from penstock.models.architecture import ModelConfig

DEVICES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Precision:
    """What numbers are stored and computed in. Bits a number; block scales count, so Q4_1 is 5.0 bits.

    `compute` names the matrix products' type in the hardware profile: weights of fewer bits than it are
    unpacked on the way (weight-only quantisation) and only save traffic.
    """

    compute: str = "bfloat16"
    weight_bits: float = 16.0
    head_bits: float = 16.0
    kv_bits: float = 16.0
    activation_bits: float = 16.0

    def __post_init__(self) -> None:
        for name in ("weight_bits", "head_bits", "kv_bits", "activation_bits"):
            if not 1.0 <= getattr(self, name) <= 64.0:
                raise ConfigError(
                    f"`precision.{name}` is {getattr(self, name)}, but numbers take 1 to 64 bits.",
                    hint="Write for example 16 for bfloat16, 8 for float8, 4.5 for 4-bit blocks of 32.",
                    param=f"precision.{name}",
                )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Widths and counts of one model. `windows` pairs a sliding window (None: full) with its layers."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    windows: tuple[tuple[int | None, int], ...]
    tied_head: bool
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    precision: Precision = Precision()

    @classmethod
    def of(cls, config: ModelConfig, precision: Precision | None = None) -> ModelSpec:
        moe = config.moe
        windows = Counter(config.sliding_window)
        return cls(
            layers=config.layers,
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            ffn=config.ffn,
            vocab=config.vocab,
            windows=tuple(sorted(windows.items(), key=lambda item: item[0] or 0)),
            tied_head=config.tied_embeddings,
            moe_layers=len(moe.layers) if moe else 0,
            experts=moe.experts if moe else 0,
            experts_per_token=moe.experts_per_token if moe else 0,
            expert_ffn=moe.ffn if moe else 0,
            precision=precision or Precision(),
        )

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def linear_weights(self) -> int:
        """Weights of all layers' matrix products, every expert counted; norms are left out."""
        attention = self.hidden * (2 * self.q_width + 2 * self.kv_width)
        dense = 3 * self.hidden * self.ffn
        experts = self.hidden * self.experts * (3 * self.expert_ffn + 1)
        return self.layers * attention + (self.layers - self.moe_layers) * dense + self.moe_layers * experts

    def weight_bytes(self) -> float:
        """All weights in memory; an untied head is a second copy of the embedding's size."""
        ends = self.vocab * self.hidden * (1 if self.tied_head else 2)
        return (self.linear_weights() * self.precision.weight_bits + ends * self.precision.head_bits) / 8

    def kv_bytes_per_token(self) -> float:
        return 2 * self.layers * self.kv_width * self.precision.kv_bits / 8


@dataclass(frozen=True, slots=True)
class Parallel:
    """How one replica is cut: every layer over `tensor` devices, layers over `pipeline` stages.

    `expert` of the tensor devices hold whole experts, each its share; the remaining factor tensor / expert
    cuts every expert. Activations are replicated within the tensor group, so experts combine by the same
    all-reduce as a dense layer.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline

    def check(self, spec: ModelSpec) -> None:
        """Raises ConfigError where the model cannot be cut so."""
        for name in ("tensor", "pipeline", "expert"):
            if not 1 <= getattr(self, name) <= DEVICES_MAX:
                raise _bad_cut(name, f"is {getattr(self, name)}", f"Write 1 to {DEVICES_MAX}.")
        if spec.heads % self.tensor or (spec.kv_heads % self.tensor and self.tensor % spec.kv_heads):
            hint = f"Take a divisor of {spec.heads} heads that divides, or is a multiple of, the KV heads."
            raise _bad_cut("tensor", f"= {self.tensor} does not divide the {spec.heads} heads", hint)
        if spec.layers % self.pipeline:
            hint = f"Take a divisor of {spec.layers}."
            raise _bad_cut("pipeline", f"= {self.pipeline} does not divide the {spec.layers} layers", hint)
        if self.tensor % self.expert or (
            self.expert > 1 and (not spec.experts or spec.experts % self.expert)
        ):
            hint = f"Take a divisor of the tensor width {self.tensor} and of the {spec.experts} experts."
            raise _bad_cut("expert", f"= {self.expert} does not divide them", hint)

    def kv_heads(self, spec: ModelSpec) -> int:
        """KV heads on one device: replicated where devices outnumber them."""
        return max(1, spec.kv_heads // self.tensor)


def _bad_cut(field: str, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"`parallel.{field}` {problem}.", hint=hint, param=f"parallel.{field}")


def experts_touched(experts: int, experts_per_token: int, rows: int) -> float:
    """Expected distinct experts that `rows` tokens use, each choosing evenly: E · (1 − (1 − k/E)^rows)."""
    if experts <= 0 or rows <= 0:
        return 0.0
    return float(experts * (1.0 - (1.0 - experts_per_token / experts) ** rows))
