"""Models on the Hugging Face Hub: `hf:owner/name[@revision]`, or `hf:owner/name[@revision]/file.gguf`.

Files land in the Hub's own cache, shared with other tools on the machine. Only what we read is asked for:
configuration, tokenizer, chat template, safetensors, GGUF; never a pickle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from penstock.core.errors import EnvironmentMissing, ModelNotAvailable
from penstock.models.source import ModelSource, local_source

HUB_PREFIX: Final = "hf:"
FOLDER_PATTERNS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
SKIPPED_PATTERNS: Final = ("*/*", "consolidated*.safetensors")
"""Copies of the same weights in another layout: subfolders, and Mistral's own naming."""

_NAME = re.compile(
    r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*?))?(?:/(?P<file>[\w][\w.-]*\.gguf))?",
    re.ASCII,
)
MAX_NAME_CHARACTERS: Final = 300


class HubName(NamedTuple):
    """The parts of an `hf:` name; `file` is a single GGUF file, or None for the whole folder."""

    repository: str
    revision: str | None
    file: str | None


def parse_hub_name(name: str) -> HubName:
    """Splits `hf:owner/name[@revision][/file.gguf]`. Raises `ModelNotAvailable` if it is not of that form."""
    match = _NAME.fullmatch(name.removeprefix(HUB_PREFIX)) if len(name) <= MAX_NAME_CHARACTERS else None
    if match is None:
        raise ModelNotAvailable(
            f"`{name[:MAX_NAME_CHARACTERS]}` is not a Hub model name.",
            hint="Write `hf:owner/name`, `hf:owner/name@revision` or `hf:owner/name/file.gguf`.",
        )
    return HubName(match["repository"], match["revision"], match["file"])


def hub_source(name: str, *, offline: bool) -> ModelSource:
    """Fetches (or, `offline`, only looks up) the model's files.

    Raises `ModelNotAvailable` if they cannot be had and `EnvironmentMissing` without `huggingface_hub`.
    """
    hub_name = parse_hub_name(name)
    patterns = [hub_name.file] if hub_name.file else list(FOLDER_PATTERNS)
    folder = _snapshot(hub_name, patterns, offline=offline)
    if hub_name.file:
        return _file_source(hub_name, folder / hub_name.file)
    if not list(folder.glob("*.safetensors")):
        raise _no_safetensors(hub_name, offline=offline)
    source = local_source(folder)
    return ModelSource(hub_name.repository, source.kind, source.path, f"Hugging Face Hub, {name}")


def _file_source(hub_name: HubName, path: Path) -> ModelSource:
    if not path.is_file():
        raise ModelNotAvailable(
            f"`{hub_name.repository}` has no file `{path.name}`, or it is not in the cache.",
            hint=f"See the files of https://huggingface.co/{hub_name.repository}.",
        )
    return ModelSource(path.stem, "gguf", path, f"Hugging Face Hub, {hub_name.repository}")


def _snapshot(hub_name: HubName, patterns: list[str], *, offline: bool) -> Path:
    try:
        import httpx
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise EnvironmentMissing(
            "Models of the Hugging Face Hub need the package `huggingface_hub`.",
            hint="Run `pip install 'penstock[engine]'`.",
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_name.repository,
                revision=hub_name.revision,
                allow_patterns=patterns,
                ignore_patterns=list(SKIPPED_PATTERNS),
                local_files_only=offline,
            )
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise _not_available(hub_name, error, offline=offline) from error


def _not_available(hub_name: HubName, error: Exception, *, offline: bool) -> ModelNotAvailable:
    if offline:
        return ModelNotAvailable(
            f"`{hub_name.repository}` is not in the Hub's cache, and fetching is switched off.",
            hint=f"Run `penstock model pull {HUB_PREFIX}{hub_name.repository}` once with a network.",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelNotAvailable(
        f"`{hub_name.repository}` could not be fetched from the Hugging Face Hub: {reason}",
        hint="Check the name and the network; a gated model needs `HF_TOKEN`. A local folder works offline.",
    )


def _no_safetensors(hub_name: HubName, *, offline: bool) -> ModelNotAvailable:
    ggufs = [] if offline else _gguf_names(hub_name)
    if ggufs:
        listed = ", ".join(f"`{HUB_PREFIX}{hub_name.repository}/{file}`" for file in ggufs[:6])
        return ModelNotAvailable(
            f"`{hub_name.repository}` holds GGUF files; name one of them.", hint=f"For example {listed}."
        )
    return ModelNotAvailable(
        f"`{hub_name.repository}` has no safetensors weights.",
        hint="Pickled weights are never loaded; look for a safetensors or GGUF release of the model.",
    )


def _gguf_names(hub_name: HubName) -> list[str]:
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = huggingface_hub.list_repo_files(hub_name.repository, revision=hub_name.revision)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError):
        return []  # Only the hint is poorer for it.
    return sorted(file for file in files if file.endswith(".gguf") and "/" not in file)
