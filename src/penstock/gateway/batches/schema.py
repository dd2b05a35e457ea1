"""What a client sends to make a batch."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from penstock.gateway.schema import NAME_CHARS_MAX, Wire

METADATA_KEYS_MAX = 16
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class BatchRequest(Wire):
    """Body of `POST /v1/batches`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_file_id": "file-0123456789abcdef0123456789abcdef",
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                }
            ]
        }
    )

    input_file_id: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
    endpoint: Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)] = Field(
        description="`/v1/chat/completions` or `/v1/completions`; every line of the file is for it."
    )
    completion_window: Annotated[str, Field(min_length=1, max_length=16)] = Field(
        description="How long the batch may take, such as `24h`, `90m` or `7d`."
    )
    metadata: Annotated[dict[Key, Value], Field(max_length=METADATA_KEYS_MAX)] | None = None
