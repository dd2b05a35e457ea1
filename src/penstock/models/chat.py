"""Chat templates: from a list of messages to the text that the model was trained on.

A template is code that came with the model's files. It runs in `chat_sandbox`, which keeps it from the
rest of the program and bounds its time and memory. The helpers it may use are those of transformers'
`apply_chat_template` (`raise_exception`, `strftime_now`, `tojson`, loop controls, `generation`), so that
published templates render the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError

from penstock.core.errors import InvalidRequest, ModelFileDamaged
from penstock.models.chat_sandbox import BoundedEnvironment, RenderLimitExceeded, RenderLimits
from penstock.models.config import read_json_object
from penstock.models.gguf import GgufFile
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer

MAX_TEMPLATE_CHARACTERS: Final = 262_144
MAX_TEMPLATE_FILE_BYTES: Final = 4 << 20
MAX_STRFTIME_CHARACTERS: Final = 256

DEFAULT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, for models that bring no template. It is plain text to any model and control tokens to many."""


class ChatTemplate:
    """One model's template, compiled once. Immutable; safe to share between threads.

    `bos` and `eos` are the texts of the model's start and end tokens. Raises `ModelFileDamaged` if the
    template is not valid. `now` is the clock behind `strftime_now`.
    """

    def __init__(
        self,
        source_text: str,
        bos: str = "",
        eos: str = "",
        *,
        limits: RenderLimits | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source_text = source_text
        self._limits = limits or RenderLimits()
        self._now = now
        self._fixed = {"bos_token": bos, "eos_token": eos}
        self._environment = BoundedEnvironment()
        self._environment.add_filter("tojson", _tojson)
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = self._strftime_now
        self._template = _compile(self._environment, source_text)

    @classmethod
    def load(cls, source: ModelSource, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's own template, else ChatML. Raises `ModelFileDamaged` for one that is not valid."""
        return cls(
            template_text(source) or DEFAULT_TEMPLATE,
            bos=_control_text(tokenizer, tokenizer.bos_id),
            eos=_control_text(tokenizer, min(tokenizer.eos_ids, default=None)),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text. `kwargs` are further variables of the template, such as `enable_thinking`.

        A message whose content is a list of `{"type": "text"}` parts gets them joined by newlines, as
        vLLM does. Raises `InvalidRequest` naming `messages` for other parts, for whatever the template
        itself refuses, and when a limit is exceeded.
        """
        variables = {
            **kwargs,
            **self._fixed,
            "messages": [_with_text(message, index) for index, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        self._environment.start(self._limits)
        try:
            return str(self._template.render(variables))
        except RenderLimitExceeded as error:
            raise _refused(f"The chat template was stopped: {error}.", _LIMIT_HINT) from error
        except Exception as error:  # A template is code: anything Python raises may come out of it.
            raise _refused(
                f"The chat template refused the messages: {_reason(error)}.", _ORDER_HINT
            ) from error

    def _strftime_now(self, format: str) -> str:
        if len(format) > MAX_STRFTIME_CHARACTERS:
            raise RenderLimitExceeded("it asked for a date in an endless format")
        return self._now().strftime(format)


def template_text(source: ModelSource) -> str | None:
    """The template that the model's files bring, or None."""
    if source.kind == "gguf":
        found = GgufFile(source.path).metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None
    return _folder_template(source.path)


def _folder_template(folder: Path) -> str | None:
    """`chat_template.jinja`, else the field of that name in one of two JSON files; the newest form first."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return _read_text(plain)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            found = read_json_object(path, MAX_TEMPLATE_FILE_BYTES * 4).get("chat_template")
            if text := _default_of(found):
                return text
    return None


def _default_of(value: object) -> str | None:
    """A template, or the one named `default` of a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_TEMPLATE_FILE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileDamaged(
            f"`{path}` cannot be read as text: {error}.", hint="Fetch the file again."
        ) from error


def _control_text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id)


def _compile(environment: BoundedEnvironment, source_text: str) -> Any:
    if len(source_text) > MAX_TEMPLATE_CHARACTERS:
        raise _not_valid(f"it has {len(source_text)} characters; we accept {MAX_TEMPLATE_CHARACTERS}")
    try:
        return environment.from_string(source_text)
    except TemplateSyntaxError as error:
        raise _not_valid(f"line {error.lineno}: {_reason(error)}") from error
    # jinja2 writes Python, which has limits of its own: nesting, number of digits, memory of its parser.
    except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise _not_valid(_reason(error)) from error


def _not_valid(what: str) -> ModelFileDamaged:
    return ModelFileDamaged(
        f"The model's chat template is not valid: {what}.",
        hint="Fetch the model's files again, or put a correct `chat_template.jinja` into its folder.",
    )


_LIMIT_HINT: Final = "Send less text; if short messages fail as well, the model's template is at fault."
_ORDER_HINT: Final = (
    "Check the order and the roles of the messages; not every model takes `system` or `tool`."
)


def _refused(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, param="messages", hint=hint)


def _reason(error: BaseException) -> str:
    """One bounded line about an error of foreign code."""
    if isinstance(error, RecursionError):
        return "it recurses too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".")


def _with_text(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with list content joined to text; a copy, since templates get plain dicts."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [_part_text(part, index, position) for position, part in enumerate(content)]
    return {**message, "content": "\n".join(parts)}


def _part_text(part: Any, index: int, position: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise _refused(
        f"`messages[{index}].content[{position}]` is of type {str(kind)[:60]!r}; this model reads text only.",
        'Send parts of the form {"type": "text", "text": "…"}.',
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it into prompts: unlike jinja2's own, without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
