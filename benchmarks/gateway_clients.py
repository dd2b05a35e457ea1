"""The clients of `benchmarks.gateway`, in a process of their own: many streams, and when each token came.

    python -m benchmarks.gateway_clients URL MODEL MARK FIRST_PROMPT_ID STREAMS TOKENS PROMPT_TOKENS

Bytes are stamped as the event loop hands them over, and only counted, so that the client adds little itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from urllib.parse import urlsplit


class Stream(asyncio.Protocol):
    """Sends one request when connected; notes when each `mark` arrives."""

    def __init__(self, request: bytes, mark: bytes, done: asyncio.Future[None]) -> None:
        self.sent_s = 0.0
        self.tokens_s: list[float] = []
        self._request = request
        self._mark = mark
        self._done = done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.sent_s = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        self.tokens_s += [now_s] * data.count(self._mark)

    def connection_lost(self, error: Exception | None) -> None:
        self._done.set_result(None)


def request_bytes(model: str, prompt: list[int], tokens: int) -> bytes:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    payload = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


async def run(url: str, model: str, mark: str, first_id: int, streams: int, tokens: int, prompt: int) -> str:
    """Stream i sends a prompt of `prompt` times the token `first_id + i`."""
    loop = asyncio.get_running_loop()
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None
    ends = [loop.create_future() for _ in range(streams)]
    clients = []
    for number, end in enumerate(ends):
        request = request_bytes(model, [first_id + number] * prompt, tokens)
        make = partial(Stream, request, mark.encode(), end)
        _, client = await loop.create_connection(make, address.hostname, address.port)
        clients.append(client)
    await asyncio.gather(*ends)
    times = {
        number: {"sent": [client.sent_s], "tokens": client.tokens_s} for number, client in enumerate(clients)
    }
    return json.dumps(times)


if __name__ == "__main__":
    url, model, mark, *numbers = sys.argv[1:]
    first_id, streams, tokens, prompt = map(int, numbers)
    print(asyncio.run(run(url, model, mark, first_id, streams, tokens, prompt)))
