"""Reading a model's configuration from its files: the public face of the modules beside this one.

architecture.py   ModelConfig, and the names and shapes of its weights
config_hf.py      from config.json
config_gguf.py    from GGUF metadata
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from penstock.core.errors import ModelFileDamaged, ModelNotAvailable
from penstock.models.architecture import (
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RopeScaling,
    weight_shapes,
)
from penstock.models.config_gguf import from_gguf
from penstock.models.config_hf import eos_token_ids, from_hf
from penstock.models.fields import Fields
from penstock.models.gguf import GgufFile

__all__ = [
    "ModelConfig",
    "ModelFiles",
    "MoeConfig",
    "RopeConfig",
    "RopeScaling",
    "from_gguf",
    "from_hf",
    "load_config",
    "read_json_object",
    "weight_shapes",
]

CONFIG_BYTES_MAX: Final = 4 << 20


class ModelFiles(Protocol):
    """Where a model's files are: `kind` is "gguf" (path is a file) or "folder" (config.json inside)."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> Path: ...


def load_config(source: ModelFiles) -> ModelConfig:
    """Reads only headers. Raises `ModelNotAvailable`, `ModelFileDamaged` or `ModelUnsupported`."""
    if source.kind == "gguf":
        return gguf_config(GgufFile(source.path))
    return folder_config(source.path)


def gguf_config(file: GgufFile) -> ModelConfig:
    return from_gguf(file.metadata, file.tensors.keys(), file.path.name)


def folder_config(folder: Path) -> ModelConfig:
    """config.json, and the end-of-sequence tokens that generation_config.json adds where there is one.

    Chat models list further stop tokens only there (Llama 3 Instruct's `<|eot_id|>`, for example).
    """
    config = from_hf(read_json_object(folder / "config.json", CONFIG_BYTES_MAX))
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    extra = eos_token_ids(Fields(read_json_object(generation, CONFIG_BYTES_MAX), generation.name))
    return replace(config, eos_token_ids=config.eos_token_ids | extra)


def read_json_object(path: Path, bytes_max: int) -> dict[str, object]:
    """A JSON object of at most `bytes_max`. Raises `ModelNotAvailable` or `ModelFileDamaged`, naming it."""
    hint = "Fetch the model again, complete."
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelNotAvailable(
            f"`{path.name}` cannot be read in `{path.parent}`: {reason}.", hint=hint
        ) from error
    if len(content) > bytes_max:
        raise ModelFileDamaged(f"`{path.name}` is larger than {bytes_max} bytes.", hint=hint)
    try:
        value = json.loads(content)
    # Besides malformed JSON: bytes that are no UTF-8, numbers of too many digits, nesting too deep.
    except (ValueError, RecursionError) as error:
        raise ModelFileDamaged(f"`{path.name}` is not valid JSON: {error}.", hint=hint) from error
    if not isinstance(value, dict):
        raise ModelFileDamaged(f"`{path.name}` is not a JSON object.", hint=hint)
    return value
