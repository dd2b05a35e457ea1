"""What answers look like, for the OpenAPI document; a test holds real answers against these models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length"]


class Out(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Out):
    """Every error, of every endpoint."""

    error: ErrorDetail


class PromptTokensDetails(Out):
    cached_tokens: int


class CompletionTokensDetails(Out):
    reasoning_tokens: int


class UsageBody(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Out):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Out):
    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Out):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Out):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: str | int | None


class ChatCompletion(Out):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody


class ChatDelta(Out):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Out):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Out):
    """One event of a stream. `usage` is there, null but in the last, only with `include_usage`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None


class CompletionLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Out):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    stop_reason: str | int | None


class CompletionChunkChoice(CompletionChoice):
    finish_reason: Finish | None  # type: ignore[assignment]


class Completion(Out):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody


class CompletionChunk(Out):
    """One event of a stream, shaped like the whole answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: UsageBody | None = None


class ModelCard(Out):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Out):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Out):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Out):
    prompt: str


class Health(Out):
    status: Literal["ok"]


class Readiness(Out):
    status: Literal["ready"]


class VersionBody(Out):
    version: str


class Load(Out):
    """`server_load` is vLLM's: HTTP calls in flight."""

    server_load: int
    requests_running: int
    requests_waiting: int
    kv_usage_frac: float


class PinReleased(Out):
    """The engine has been told; there may have been no pin."""

    id: str
    object: Literal["pin"]
    released: bool


class FileObject(Out):
    """A file; `bytes` of content, instants as Unix time."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: str | None


class FileList(Out):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Out):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchProblem(Out):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchProblems(Out):
    object: Literal["list"]
    data: list[BatchProblem]


class BatchCounts(Out):
    total: int
    completed: int
    failed: int


class BatchObject(Out):
    """A batch; instants as Unix time."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "cancelling",
        "completed",
        "failed",
        "expired",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    cancelling_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchList(Out):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
