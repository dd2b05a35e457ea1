"""What `penstock model info` says about a model. Reads headers only, no weights, and needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.core.errors import ModelFileDamaged
from penstock.models.catalogue import CATALOGUE
from penstock.models.config import ModelConfig, load_config
from penstock.models.gguf import GgufFile
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer

_SAFETENSORS_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_KV_BYTES_PER_NUMBER: Final = 2
"""Keys and values are counted in bfloat16, the engine's usual type for them."""


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """Facts about one model, ready for JSON. Counts unless the name carries a unit."""

    name: str
    path: str
    origin: str
    licence: str
    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    context_tokens: int
    vocabulary: int
    parameters: int
    weights_bytes: int
    weights_bytes_by_type: dict[str, int]
    kv_bytes_per_token: int
    tokenizer: str
    has_chat_template: bool


def summarise(source: ModelSource) -> ModelSummary:
    """Raises `ModelFileDamaged`, `ModelNotAvailable` or `ModelUnsupported`, as loading the model would."""
    from penstock.models.chat import template_text

    config = load_config(source)
    by_type = weights_bytes_by_type(source)
    return ModelSummary(
        name=source.name,
        path=str(source.path),
        origin=source.origin,
        licence=_licence(source),
        architecture=config.architecture,
        layers=config.layers,
        hidden=config.hidden,
        ffn=config.ffn,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        experts=_experts(config),
        context_tokens=config.context_len,
        vocabulary=config.vocab,
        parameters=config.parameter_count(),
        weights_bytes=sum(by_type.values()),
        weights_bytes_by_type=by_type,
        kv_bytes_per_token=config.kv_bytes_per_token(_KV_BYTES_PER_NUMBER),
        tokenizer=str(Tokenizer.load(source).scheme),
        has_chat_template=template_text(source) is not None,
    )


def weights_bytes_by_type(source: ModelSource) -> dict[str, int]:
    """Bytes of all tensors, by the type they are stored in, largest first."""
    sizes: Counter[str] = Counter()
    if source.kind == "gguf":
        for tensor in GgufFile(source.path).tensors.values():
            sizes[tensor.ggml_type.name] += tensor.byte_count
    else:
        for path in sorted(source.path.glob("*.safetensors")):
            sizes.update(_safetensors_bytes(path))
    return dict(sizes.most_common())


def _safetensors_bytes(path: Path) -> Counter[str]:
    from safetensors import SafetensorError, safe_open

    sizes: Counter[str] = Counter()
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping and cannot be iterated
                entry = file.get_slice(name)
                kind = str(entry.get_dtype())
                sizes[kind] += math.prod(entry.get_shape()) * _SAFETENSORS_BYTES.get(kind, 0)
    except (SafetensorError, OSError) as error:
        raise ModelFileDamaged(
            f"`{path}` is not a valid safetensors file: {error}.", hint="Fetch the file again."
        ) from error
    return sizes


def _experts(config: ModelConfig) -> int:
    return config.moe.experts if config.moe is not None else 0


def _licence(source: ModelSource) -> str:
    if source.name in CATALOGUE:
        return CATALOGUE[source.name].licence
    if source.kind == "gguf":
        named = GgufFile(source.path).metadata.get("general.license")
        return named if isinstance(named, str) else "not stated"
    return "not stated"
