"""Reading a tokenizer from a model folder: `tokenizer.json` and the small files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from penstock.core.errors import ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.models.config import read_json_object
from penstock.models.tokenizer_parts import MAX_VOCABULARY, Scheme, TokenizerParts

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES: Final = 64 << 20
MAX_CONFIG_BYTES: Final = 16 << 20

_SENTENCEPIECE_STEPS: Final = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


def parts_from_folder(folder: Path) -> TokenizerParts:
    """Reads `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `config.json`.

    Raises `ModelNotAvailable` without `tokenizer.json`, `ModelFileDamaged`, or `ModelUnsupported` for a
    decoder that is neither byte-level nor SentencePiece-like.
    """
    backend = _load_backend(folder / "tokenizer.json")
    scheme, drops_leading_space = _decoding(backend, folder)
    added = backend.get_added_tokens_decoder()
    config = _optional_json(folder / "tokenizer_config.json")
    return TokenizerParts(
        backend=backend,
        scheme=scheme,
        drops_leading_space=drops_leading_space,
        texts=_texts(backend, folder),
        added_ids=frozenset(added),
        special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        bos_id=_named_token(backend, config.get("bos_token")),
        eos_ids=_ends(backend, folder, config),
    )


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not path.is_file():
        raise ModelNotAvailable(
            f"`{path.parent}` has no `tokenizer.json`.",
            hint="Write one with transformers: `AutoTokenizer.from_pretrained(…).save_pretrained(folder)`.",
        )
    content = read_json_object(path, MAX_TOKENIZER_BYTES)
    _check_model(path, content)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # The library raises nothing narrower.
        raise ModelFileDamaged(
            f"`{path}` is not a valid tokenizer: {str(error)[:200]}.", hint="Fetch the file again."
        ) from error
    # Settings of somebody's training run; a server never cuts or pads a prompt silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_model(path: Path, content: dict[str, Any]) -> None:
    """Refuses what no model we run uses: other algorithms, random merges, and affixes.

    The library trusts affixes so far that a wrong one ends the whole process, not just the call.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise ModelFileDamaged(f"`{path}` describes no tokenizer model.", hint="Fetch the file again.")
    kind = model.get("type", "BPE")  # Files from before the field existed are all of this type.
    if kind != "BPE":
        raise ModelUnsupported(
            f"`{path}` has a tokenizer of the type {str(kind)[:40]!r}, which is not read.",
            hint="Tokenizers of the type `BPE` are.",
        )
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ModelUnsupported(
                f"`{path}` sets `{field}` to {str(model[field])[:40]!r}, which is not supported.",
                hint="Save the tokenizer without it.",
            )


def _decoding(backend: tokenizers.Tokenizer, folder: Path) -> tuple[Scheme, bool]:
    """How token texts become bytes, and whether a leading space is dropped, from the decoder's own words."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = list(_steps(state))
    kinds = {str(step.get("type")) for step in steps}
    if kinds == {"ByteLevel"}:
        return Scheme.BYTE_LEVEL, False
    if kinds and kinds <= _SENTENCEPIECE_STEPS and kinds & {"Replace", "Metaspace"}:
        return Scheme.SENTENCEPIECE, any(_drops_space(step) for step in steps)
    raise ModelUnsupported(
        f"`{folder}` has a tokenizer that decodes by {', '.join(sorted(kinds)) or 'nothing'}, unread here.",
        hint="Byte-level BPE and SentencePiece-like tokenizers are.",
    )


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if state.get("type") == "Sequence":
        for step in state["decoders"]:
            yield from _steps(step)
    elif state:
        yield state


def _drops_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme") != "never"
    return step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _texts(backend: tokenizers.Tokenizer, folder: Path) -> list[str | None]:
    ids_by_text = backend.get_vocab(with_added_tokens=True)
    highest = max(ids_by_text.values(), default=-1)
    if not 0 <= highest < MAX_VOCABULARY:
        raise ModelFileDamaged(
            f"The tokenizer of `{folder}` has ids up to {highest}; we accept 0 to {MAX_VOCABULARY - 1}.",
            hint="Fetch the file again.",
        )
    texts: list[str | None] = [None] * (highest + 1)
    for text, token_id in ids_by_text.items():
        texts[token_id] = text
    return texts


def _named_token(backend: tokenizers.Tokenizer, token: object) -> int | None:
    """`"<s>"`, or `{"content": "<s>", …}`, as `tokenizer_config.json` writes tokens."""
    text = token.get("content") if isinstance(token, dict) else token
    found = backend.token_to_id(text) if isinstance(text, str) else None
    return int(found) if found is not None else None


def _ends(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end an answer: what generation stops at, and the tokenizer's own end token."""
    generation = _ids(_optional_json(folder / "generation_config.json").get("eos_token_id"))
    if not generation:
        generation = _ids(_optional_json(folder / "config.json").get("eos_token_id"))
    return frozenset(generation) | frozenset(_ids(_named_token(backend, config.get("eos_token"))))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, MAX_CONFIG_BYTES) if path.is_file() else {}
