"""Fields of the OpenAI and vLLM APIs that this build cannot honour: refuse them, never pretend.

A field is refused only when its value asks for something; its neutral values pass. Fields nobody knows are
ignored and listed in the answer's `x-penstock-ignored` header, or refused in strict mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from penstock.core.errors import InvalidRequest, UnsupportedParameter

FIELDS_LISTED_MAX = 20
FIELD_CHARS_MAX = 64

# Accepted, and without effect on the output by OpenAI's own definition.
IDLE_FIELDS = frozenset(
    {"user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key"}
)


def _is_absent(value: Any) -> bool:
    return value is None or value is False or value == [] or value == {} or value == ""


def _is_text_format(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("type") == "text")


def _is_no_tool(value: Any) -> bool:
    return value in (None, "none", "auto")


def _is_true_or_absent(value: Any) -> bool:
    return value is None or value is True


def _is_at_most_one(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value <= 1)


def _is_text_only(value: Any) -> bool:
    return value in (None, ["text"])


# Field → whether a value of it asks for nothing.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "tools": _is_absent,
    "tool_choice": _is_no_tool,
    "functions": _is_absent,
    "function_call": _is_no_tool,
    "response_format": _is_text_format,
    "modalities": _is_text_only,
    "audio": _is_absent,
    "web_search_options": lambda value: value is None,
    "suffix": _is_absent,
    "best_of": _is_at_most_one,
    "use_beam_search": _is_absent,
    "guided_json": _is_absent,
    "guided_regex": _is_absent,
    "guided_choice": _is_absent,
    "guided_grammar": _is_absent,
    "structured_outputs": _is_absent,
    "prompt_embeds": _is_absent,
    "prompt_logprobs": lambda value: value is None,
    "truncate_prompt_tokens": lambda value: value is None,
    "add_generation_prompt": _is_true_or_absent,
    "continue_final_message": _is_absent,
    "chat_template": _is_absent,
    "chat_template_kwargs": _is_absent,
    "documents": _is_absent,
}
MESSAGE_NEUTRAL = ("tool_calls", "function_call", "audio")
MESSAGE_ROLES_UNSUPPORTED = ("tool", "function")
PARTS_UNSUPPORTED = ("image_url", "input_audio", "file", "refusal", "video_url", "audio_url")


def refuse_unsupported(payload: Mapping[str, Any]) -> None:
    """Raise UnsupportedParameter for the first field that asks for what this build does not do."""
    for name in payload:
        if name in NEUTRAL and not NEUTRAL[name](payload[name]):
            raise UnsupportedParameter(
                f"`{name}` is not supported by this server.", hint="Leave it out.", param=name
            )
    messages = payload.get("messages")
    if isinstance(messages, list):
        for index, message in enumerate(messages):
            if isinstance(message, Mapping):
                _refuse_in_message(message, f"messages[{index}]")


def _refuse_in_message(message: Mapping[str, Any], path: str) -> None:
    if message.get("role") in MESSAGE_ROLES_UNSUPPORTED:
        raise UnsupportedParameter(
            f"Messages of role `{message['role']}` are not supported by this server.",
            hint="Send system, developer, user and assistant messages.",
            param=f"{path}.role",
        )
    for name in MESSAGE_NEUTRAL:
        if not _is_absent(message.get(name)):
            raise UnsupportedParameter(
                f"`{name}` is not supported by this server.", hint="Leave it out.", param=f"{path}.{name}"
            )
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if isinstance(part, Mapping) and part.get("type") in PARTS_UNSUPPORTED:
                raise UnsupportedParameter(
                    f"Content parts of type `{part['type']}` are not supported by this server.",
                    hint="Send parts of type `text`.",
                    param=f"{path}.content[{index}].type",
                )


def unknown_fields(body: BaseModel) -> list[str]:
    """Paths of the fields nobody knows, cleaned for a header and a log; at most `FIELDS_LISTED_MAX`."""
    names: list[str] = []
    for name in _walk_unknown(body, ""):
        if len(names) == FIELDS_LISTED_MAX:
            break
        names.append(_clean(name))
    return names


def refuse_unknown(names: list[str]) -> None:
    """Strict mode: an unknown field is an error."""
    if names:
        raise InvalidRequest(
            f"Unknown field `{names[0]}`.",
            hint="Leave it out, or turn `gateway.strict_fields` off to have it ignored.",
            param=names[0],
        )


def _walk_unknown(body: BaseModel, prefix: str) -> Iterator[str]:
    for name in body.model_extra or ():
        if prefix or (name not in IDLE_FIELDS and name not in NEUTRAL):
            yield prefix + name
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, BaseModel):
            yield from _walk_unknown(value, f"{prefix}{name}.")


def _clean(name: str) -> str:
    """Only characters that cannot end a header line or forge a log line."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in name[:FIELD_CHARS_MAX])
