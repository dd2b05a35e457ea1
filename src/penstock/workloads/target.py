"""The server that a replay talks to: where it is, what it serves, and how its tokenizer counts.

Every answer is read up to a limit; a server that is not there is an EnvironmentMissing with a way out.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from penstock.core.errors import ConfigError, EnvironmentMissing
from penstock.core.units import MIB
from penstock.workloads.prompts import COMMON_WORDS, LEADING_WORD, TextFit

ANSWER_BYTES_MAX = 8 * MIB
PROBE_TIMEOUT_S = 30.0
TOKENIZE_CALLS_MAX = 400
WORDS_MIN = 32

# uvicorn and most peers close an idle connection after 5 s. Dropping ours earlier avoids sending a request
# into a connection that is just being closed, which would look like a lost request.
KEEPALIVE_S = 2.0

# httpcore looks at all connections once for every idle one, each time a request begins or ends: with hundreds
# of idle connections that takes longer than the request. A few are enough to spare most handshakes.
KEEPALIVE_CONNECTIONS_MAX = 8

Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Target:
    """One OpenAI-compatible server. `base_url` has no `/v1` and no slash at the end."""

    base_url: str
    model: str
    endpoint: Endpoint = "completions"
    context_len: int | None = None  # as the server states it
    vocab_size: int | None = None

    @property
    def url(self) -> str:
        path = "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"
        return self.base_url + path


def base_url_of(text: str) -> str:
    """Accepts the address with or without `/v1`. Raises ConfigError."""
    base = text.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(base)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ConfigError(
            f"`--url {text[:80]}` is not an HTTP address.", hint="write for example `http://127.0.0.1:8000`"
        )
    return base


def open_client(base_url: str, api_key: str | None, connections_max: int) -> httpx.AsyncClient:
    """An HTTP client without time limits of its own: the caller bounds each call. Close it after use."""
    headers = {"Accept-Encoding": "identity"}  # a compressed stream would arrive in lumps
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return httpx.AsyncClient(
        headers=headers,
        timeout=None,
        trust_env=not _is_loopback(base_url),  # a proxy cannot reach this machine's loopback
        limits=httpx.Limits(
            max_connections=connections_max,
            max_keepalive_connections=KEEPALIVE_CONNECTIONS_MAX,
            keepalive_expiry=KEEPALIVE_S,
        ),
    )


def _is_loopback(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def find_target(
    client: httpx.AsyncClient, base_url: str, model: str | None, endpoint: Endpoint
) -> Target:
    """Ask the server what it serves. Raises EnvironmentMissing (no server) or ConfigError (key, model)."""
    listing = await _fetch_models(client, base_url)
    by_id = {entry["id"]: entry for entry in listing if isinstance(entry.get("id"), str)}
    chosen = model or next(iter(by_id), None)
    if chosen is None:
        raise ConfigError("the server lists no models.", hint="name one with `--model`")
    entry = by_id.get(chosen, {})
    if by_id and not entry:
        names = ", ".join(f"`{ascii(name)[1:-1][:60]}`" for name in list(by_id)[:5])
        raise ConfigError(f"the server has no model `{chosen[:80]}`.", hint=f"it serves {names}")
    return Target(
        base_url, chosen, endpoint, _positive_int(entry, "max_model_len"), _positive_int(entry, "vocab_size")
    )


async def _fetch_models(client: httpx.AsyncClient, base_url: str) -> list[dict[str, Any]]:
    """The entries of `/v1/models`; empty when the server has no such endpoint."""
    try:
        status, body = await fetch(client, "GET", base_url + "/v1/models", timeout_s=PROBE_TIMEOUT_S)
    except (httpx.HTTPError, TimeoutError) as problem:
        raise EnvironmentMissing(
            f"no server answers at {base_url} ({type(problem).__name__}).",
            hint="start one with `penstock serve`, or check `--url`",
        ) from None
    if status in (401, 403):
        hint = "give `--api-key`, or set OPENAI_API_KEY"
        raise ConfigError("the server refuses the API key.", hint=hint)
    try:
        data = json.loads(body)["data"] if status == 200 else []
    except (ValueError, KeyError, TypeError, RecursionError):
        data = []
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def _positive_int(entry: dict[str, Any], key: str) -> int | None:
    value = entry.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


async def fetch(
    client: httpx.AsyncClient, method: str, url: str, *, body: Any = None, timeout_s: float
) -> tuple[int, bytes]:
    """(status, the first ANSWER_BYTES_MAX bytes). Raises httpx.HTTPError or ValueError on a larger answer."""
    request = client.build_request(method, url, json=body, timeout=timeout_s)
    response = await client.send(request, stream=True)
    try:
        received = bytearray()
        async for part in response.aiter_raw():
            received += part
            if len(received) > ANSWER_BYTES_MAX:
                raise httpx.DecodingError(f"the answer exceeds {ANSWER_BYTES_MAX} bytes", request=request)
        return response.status_code, bytes(received)
    finally:
        await response.aclose()


class Tokenizer:
    """The server's own `/tokenize`, with a bound on calls."""

    def __init__(self, client: httpx.AsyncClient, target: Target) -> None:
        self._client = client
        self._target = target
        self._calls = 0

    async def count(self, text: str) -> int | None:
        """Tokens of `text` as this endpoint will count them; None where the server cannot say."""
        if self._calls >= TOKENIZE_CALLS_MAX:
            return None
        self._calls += 1
        body: dict[str, Any] = {"model": self._target.model, "prompt": text}
        if self._target.endpoint == "chat":
            body = {"model": self._target.model, "messages": [{"role": "user", "content": text}]}
        try:
            url = self._target.base_url + "/tokenize"
            status, answer = await fetch(self._client, "POST", url, body=body, timeout_s=PROBE_TIMEOUT_S)
            return _positive_int(json.loads(answer), "count") if status == 200 else None
        except (httpx.HTTPError, ValueError, AttributeError, RecursionError):
            return None


async def fit_text(tokenizer: Tokenizer) -> TextFit:
    """Which words are one token each here, and what the template adds.

    Without `/tokenize`, or when too few words fit, one token a word is assumed and `is_exact` is False.
    """
    approximate = TextFit(COMMON_WORDS, overhead_tokens=0, is_exact=False)
    base = await tokenizer.count(" ".join([LEADING_WORD] * 8))
    twice = await tokenizer.count(" ".join([LEADING_WORD] * 16))
    if base is None or twice is None or twice - base != 8:
        return approximate
    overhead = base - 8
    words = await _single_token_words(tokenizer, COMMON_WORDS, overhead)
    if words is None or len(words) < WORDS_MIN:
        return approximate
    return TextFit(words, overhead, is_exact=True)


async def _single_token_words(
    tokenizer: Tokenizer, words: tuple[str, ...], overhead: int
) -> tuple[str, ...] | None:
    """Halve a group until its count is exact or one word is left, which is dropped."""
    count = await tokenizer.count(" ".join([LEADING_WORD, *words]))
    if count is None:
        return None
    if count - overhead - 1 == len(words):
        return words
    if len(words) == 1:
        return ()
    half = len(words) // 2
    left = await _single_token_words(tokenizer, words[:half], overhead)
    right = await _single_token_words(tokenizer, words[half:], overhead)
    return None if left is None or right is None else left + right
