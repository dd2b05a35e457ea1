"""What several of the end-to-end tests do to a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
from benchmarks.server_process import ServerProcess

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "prompt": "Hello", "temperature": 0, "ignore_eos": True}

StartServer = Callable[..., ServerProcess]


def is_idle(server: ServerProcess) -> bool:
    """Nothing open, running or waiting, and no KV held."""
    return not any(server.load().values())


def open_stream(server: ServerProcess, stack: ExitStack, max_tokens: int, seed: int = 0) -> Iterator[str]:
    """Lines of a stream that has begun."""
    client = stack.enter_context(server.client())
    body = {**BODY, "max_tokens": max_tokens, "seed": seed, "stream": True}
    answer = stack.enter_context(client.stream("POST", COMPLETIONS, json=body))
    assert answer.status_code == 200
    lines = (line for line in answer.iter_lines() if line)
    next(lines)
    return lines


def error_code(line: str) -> str:
    return str(json.loads(line.removeprefix("data: "))["error"]["code"])


def assert_engine_gone(server: ServerProcess) -> None:
    gone, alive = psutil.wait_procs([server.engine], timeout=30.0)
    assert gone and not alive, "the engine process ends with its gateway"
