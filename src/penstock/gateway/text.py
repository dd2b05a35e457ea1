"""What the gateway needs of tokenizer and chat template, and how it keeps them off the event loop.

Short texts are encoded in place: a thread hop costs more than the work. Long ones go to a small pool whose
waiting line is bounded, so that a few huge prompts delay only themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from penstock.core.errors import Overloaded, PenstockError

logger = logging.getLogger(__name__)

INLINE_BYTES_MAX = 4096
INLINE_RENDER_S_MAX = 0.05
MESSAGE_BYTES = 64  # what a message weighs beside its content
POOL_THREADS = 2
POOL_JOBS_MAX = 512

Result = TypeVar("Result")


class Tokenizer(Protocol):
    """`penstock.models.tokenizer.Tokenizer`, as far as the gateway uses it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Template(Protocol):
    """`penstock.models.chat.ChatTemplate`, as far as the gateway uses it."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True
    ) -> str: ...


class Detokenizer(Protocol):
    """`penstock.models.detokenize.IncrementalDetokenizer`: text as it becomes certain."""

    stopped_by: str | None

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


MakeDetokenizer = Callable[[tuple[str, ...], bool], Detokenizer]
"""(stop strings, whether the text continues its prompt) → a fresh detokenizer."""


def inline_bytes_of(template: Template) -> int:
    """How long a conversation may be to be rendered in place: none, if even the shortest takes its time.

    A template is code of the model's; one that loops until its limits stop it must not stop the event loop.
    """
    began_s = time.thread_time()
    try:
        template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except PenstockError as error:
        logger.warning("the chat template refuses a plain conversation: %s", error.message)
    return INLINE_BYTES_MAX if time.thread_time() - began_s < INLINE_RENDER_S_MAX else -1


class WorkPool:
    """Runs pure CPU work beside the event loop when it is big enough to matter."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="penstock-text")
        self._jobs = 0

    async def run(
        self, size_bytes: int, work: Callable[[], Result], inline_bytes_max: int = INLINE_BYTES_MAX
    ) -> Result:
        """`work()`, in place when `size_bytes` is small. Raises Overloaded when too much waits already."""
        if size_bytes <= inline_bytes_max:
            return work()
        if self._jobs >= POOL_JOBS_MAX:
            raise Overloaded(
                "The server is full: too many long prompts are being read.",
                hint="Retry after the time in `Retry-After`.",
                retry_after_s=1.0,
            )
        self._jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._jobs -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
