"""Files of a model that exist on this machine.

Only formats that cannot run code are accepted: safetensors and GGUF. Folders with nothing but pickled weights
are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from penstock.core.errors import ModelNotAvailable, ModelUnsupported

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
MAX_FOLDER_ENTRIES: Final = 10_000


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Files of a model that exist on this machine. `path` is a `.gguf` file or a folder, as `kind` says."""

    name: str
    kind: Literal["gguf", "folder"]
    path: Path
    origin: str
    """Where the files came from, in words for people."""


def local_source(path: Path) -> ModelSource:
    """A model in a local file or folder; checks what is there without reading any weights."""
    if path.is_dir():
        return _folder_source(path)
    if path.suffix.lower() == ".gguf":
        return ModelSource(path.stem, "gguf", path, "local file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle_only(path)
    raise ModelUnsupported(
        f"`{path}` is not a model file that Penstock reads.",
        hint="Give a `.gguf` file, or a folder with `config.json` and `*.safetensors`.",
    )


def _folder_source(path: Path) -> ModelSource:
    entries = _folder_entries(path)
    suffixes = {entry.suffix.lower() for entry in entries}
    ggufs = sorted(entry for entry in entries if entry.suffix.lower() == ".gguf")
    if ".safetensors" in suffixes:
        return _safetensors_source(path)
    if len(ggufs) == 1:
        return ModelSource(ggufs[0].stem, "gguf", ggufs[0], "local file")
    if ggufs:
        names = ", ".join(f"`{file.name}`" for file in ggufs[:8])
        raise ModelNotAvailable(f"`{path}` holds several models: {names}.", hint="Name one of the files.")
    if suffixes & PICKLE_SUFFIXES:
        raise _pickle_only(path)
    raise ModelNotAvailable(
        f"The folder `{path}` holds no weights.", hint="It needs `*.safetensors`, or one `.gguf` file."
    )


def _folder_entries(path: Path) -> list[Path]:
    try:
        entries = [entry for entry, _ in zip(path.iterdir(), range(MAX_FOLDER_ENTRIES + 1), strict=False)]
    except OSError as error:
        raise ModelNotAvailable(
            f"The folder `{path}` cannot be read: {error.strerror}.", hint="Check its permissions."
        ) from error
    if len(entries) > MAX_FOLDER_ENTRIES:
        raise ModelNotAvailable(
            f"`{path}` has more than {MAX_FOLDER_ENTRIES} entries; it is hardly one model's folder.",
            hint="Name the folder that holds `config.json`.",
        )
    return entries


def _safetensors_source(path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise ModelNotAvailable(
            f"The folder `{path}` has weights but no `config.json`.",
            hint="Copy `config.json` from where the model came from.",
        )
    return ModelSource(path.resolve().name, "folder", path, "local folder")


def _pickle_only(path: Path) -> ModelUnsupported:
    return ModelUnsupported(
        f"`{path}` holds only pickled weights. Loading those can run any code, so Penstock never does.",
        hint="Use a safetensors or GGUF release of the model, or convert it where you trust it, with "
        "`save_pretrained(…, safe_serialization=True)`.",
    )
