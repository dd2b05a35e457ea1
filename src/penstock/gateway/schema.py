"""What a request may look like: names, types and bounds. Semantics follow in `convert.py`.

Types are strict (a number in quotes is an error), every field that OpenAI lets be null may be null, and
unknown fields are kept so that they can be reported. Lists fail at their first bad item: a million bad items
must not become a million error records.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.functional_validators import PlainValidator
from pydantic_core import PydanticCustomError

MESSAGES_MAX = 4096
PARTS_MAX = 1024
PROMPTS_MAX = 128
STOPS_MAX = 4
STOP_CHARS_MAX = 512
STOP_IDS_MAX = 128
LOGIT_BIAS_MAX = 300
TOP_LOGPROBS_MAX = 20
NAME_CHARS_MAX = 256
TOOL_CHARS_MAX = 128
PIN_S_MAX = 86_400
INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1

Prompt = str | list[int]


class Wire(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Wire):
    include_usage: bool | None = Field(None, description="Send one last chunk with the token counts.")


def _parse_stop(value: Any) -> list[str]:
    """One string or a short list of them, none empty."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops[: STOPS_MAX + 1]):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > STOPS_MAX:
        raise PydanticCustomError("stop", "at most {most} stop strings are allowed", {"most": STOPS_MAX})
    if not all(stops):
        raise PydanticCustomError("stop", "a stop string may not be empty")
    if any(len(stop) > STOP_CHARS_MAX for stop in stops):
        raise PydanticCustomError(
            "stop", "a stop string may have at most {most} characters", {"most": STOP_CHARS_MAX}
        )
    return stops


def _parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids as JSON keys, each with a bias in -100..100."""
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids and numbers")
    if len(value) > LOGIT_BIAS_MAX:
        raise PydanticCustomError(
            "logit_bias", "at most {most} entries are allowed", {"most": LOGIT_BIAS_MAX}
        )
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise PydanticCustomError("logit_bias", "each key must be a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", "each bias must be a number from -100 to 100")
    return tuple((int(key), float(bias)) for key, bias in value.items())


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_prompts(value: Any) -> list[Prompt]:
    """A text, a list of texts, a list of token ids, or a list of those: always as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids, or a list of those lists"
        )
    if type(value[0]) is int:
        if not _is_token_list(value):
            raise PydanticCustomError("prompt", "a list that begins with a token id may hold only token ids")
        return [value]
    if len(value) > PROMPTS_MAX:
        raise PydanticCustomError("prompt", "at most {most} prompts fit one request", {"most": PROMPTS_MAX})
    for prompt in value:
        if not isinstance(prompt, str) and not (prompt and _is_token_list(prompt)):
            raise PydanticCustomError(
                "prompt", "each prompt must be a string or a non-empty list of token ids"
            )
    return value


_TOKEN_LIST_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Stops = Annotated[
    list[str],
    PlainValidator(_parse_stop),
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string", "minLength": 1, "maxLength": STOP_CHARS_MAX},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": STOP_CHARS_MAX},
                    "maxItems": STOPS_MAX,
                },
            ]
        }
    ),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_parse_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": LOGIT_BIAS_MAX,
        }
    ),
]
Prompts = Annotated[
    list[Prompt],
    PlainValidator(_parse_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                    "maxItems": PROMPTS_MAX,
                },
                _TOKEN_LIST_SCHEMA,
                {"type": "array", "items": _TOKEN_LIST_SCHEMA, "minItems": 1, "maxItems": PROMPTS_MAX},
            ]
        }
    ),
]
ModelName = Annotated[
    str, Field(min_length=1, max_length=NAME_CHARS_MAX, description="A name of `/v1/models`.")
]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]


class Generation(Wire):
    """What chat and legacy completions share."""

    model: ModelName
    stream: bool | None = Field(None, description="Server-sent events instead of one JSON body.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Completions of each prompt.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy; default 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = Field(None, description="Token id → number added to its logit.")
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    stop: Stops | None = Field(None, description="Up to four strings that end the output; never returned.")

    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = Field(None, description="0 and -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=STOP_IDS_MAX, fail_fast=True)] | None = None
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] | None = Field(
        None, description="Lower first; only under a policy that ranks by priority."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)] | None = Field(
        None, description="Prefixes are shared only between requests of equal salt."
    )
    session_id: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)] | None = None
    program_id: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)] | None = Field(
        None, description="The agent's run that this call is a turn of; absent: its session, if any."
    )
    is_last_step: bool | None = Field(None, description="No turn of the program follows.")
    tool: Annotated[str, Field(min_length=1, max_length=TOOL_CHARS_MAX)] | None = Field(
        None, description="What the program calls after this answer; absent: read from the answer."
    )
    pin_s: Annotated[float, Field(ge=0, le=PIN_S_MAX)] | None = Field(
        None, description="Keep the KV of this turn so many seconds; only under a policy that pins."
    )


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=PARTS_MAX, fail_fast=True)]
    name: Annotated[str, Field(max_length=NAME_CHARS_MAX)] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]


class ChatRequest(Generation):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "messages": [{"role": "user", "content": "Name a river."}],
                    "max_completion_tokens": 16,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = Field(
        None, description="Preferred over `max_tokens`; absent: as many as the context holds."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = Field(
        None, description="Only with `logprobs`."
    )


class CompletionRequest(Generation):
    """Body of `POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m-instruct", "prompt": "Rivers flow", "max_tokens": 16}]
        }
    )

    prompt: Prompts
    echo: bool | None = Field(None, description="Return the prompt before the completion.")
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)] | None = Field(
        None, description="Alternatives to return for each token."
    )


class TokenizeRequest(Wire):
    """Body of `POST /tokenize`: a `prompt` or `messages`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Rivers flow"}]})

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default true for a `prompt`, false for `messages` (their template adds them)."
    )
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Wire):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [72, 105]}]})

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
