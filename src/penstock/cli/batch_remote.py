"""The same file through a server's batch API: upload, wait, fetch, put into order."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cli.batch import LINE_HINT, tell_kept, write_rows
from penstock.core.errors import ConfigError, EnvironmentMissing, InvalidRequest, PenstockError

if TYPE_CHECKING:
    import httpx

    from penstock.gateway.batches.summary import Summary

POLL_S = 0.5
TIMEOUT_S = 600.0
ENDS = ("completed", "failed", "expired", "cancelled")

JSON = dict[str, Any]


class BatchEnded(PenstockError):
    """The server ended the batch without running it."""


def run_remote(
    path: Path, target: Path, url: str, api_key: str | None, window: str, tell: Callable[[str], None]
) -> Summary:
    """Run the file there and write its answers here, in the order of the file.

    Interrupted, it cancels the batch and writes what was done. Raises EnvironmentMissing where the server
    cannot be reached or runs no batches, and InvalidRequest for what it refuses.
    """
    import httpx

    from penstock.gateway.batches.summary import summarised

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"`{url}` is not a URL.", hint="For example http://127.0.0.1:8000.", param="url")
    custom_ids, endpoint = _look(path)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S) as client:
            began_s = time.perf_counter()
            made = _start(client, path, endpoint, window)
            try:
                ended, is_interrupted = _wait(client, made["id"], tell), False
            except KeyboardInterrupt:
                ended, is_interrupted = _cancelled(client, made["id"], tell), True
            seconds = time.perf_counter() - began_s
            rows = [row for kind in ("output", "error") for row in _fetch(client, ended[f"{kind}_file_id"])]
    except httpx.HTTPError as error:
        raise EnvironmentMissing(f"`{url}` cannot be reached: {error}", hint="Is the server up?") from error
    if ended["status"] == "failed":
        raise BatchEnded(_failure(path, ended), hint="Mend the file, and run it again.")
    by_id = {row["custom_id"]: row for row in rows}
    ordered = [by_id[custom_id] for custom_id in custom_ids if custom_id in by_id]
    if is_interrupted:
        done = [row for row in ordered if row["response"] is not None]  # the others were never run
        if done:
            write_rows(target, done)
            tell_kept(len(done), target)
        raise KeyboardInterrupt
    write_rows(target, ordered)
    return summarised(ordered, None, seconds)


def _look(path: Path) -> tuple[list[str], str]:
    """The ids in order, and the endpoint of the first line; the server checks the rest."""
    custom_ids, endpoint, number = [], "", 0
    try:
        with path.open("rb") as file:
            for raw in file:
                number += 1
                if raw.strip():
                    row = json.loads(raw)
                    custom_ids.append(row["custom_id"])
                    endpoint = endpoint or row["url"]
    except OSError as error:
        raise EnvironmentMissing(f"`{path}` cannot be read: {error}", hint="Check the path.") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidRequest(f"Line {number} of `{path}` is no request.", hint=LINE_HINT) from None
    if not custom_ids:
        raise InvalidRequest(f"`{path}` has no requests.", hint=LINE_HINT)
    return custom_ids, endpoint


def _start(client: httpx.Client, path: Path, endpoint: str, window: str) -> JSON:
    with path.open("rb") as file:
        uploaded = _asked(
            client, "POST", "/v1/files", files={"file": (path.name, file)}, data={"purpose": "batch"}
        )
    body = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window}
    return _asked(client, "POST", "/v1/batches", json=body)


def _wait(client: httpx.Client, batch_id: str, tell: Callable[[str], None]) -> JSON:
    while True:
        batch = _asked(client, "GET", f"/v1/batches/{batch_id}")
        counts = batch["request_counts"] or {}
        done = counts.get("completed", 0) + counts.get("failed", 0)
        tell(f"{batch['status']}: {done} of {counts.get('total', 0)} requests")
        if batch["status"] in ENDS:
            return batch
        time.sleep(POLL_S)


def _cancelled(client: httpx.Client, batch_id: str, tell: Callable[[str], None]) -> JSON:
    with contextlib.suppress(InvalidRequest):  # it has just ended
        _asked(client, "POST", f"/v1/batches/{batch_id}/cancel")
    return _wait(client, batch_id, tell)


def _fetch(client: httpx.Client, file_id: str | None) -> list[JSON]:
    if file_id is None:
        return []
    answer = client.get(f"/v1/files/{file_id}/content")
    answer.raise_for_status()
    return [json.loads(line) for line in answer.text.split("\n") if line.strip()]


def _asked(client: httpx.Client, method: str, path: str, **content: Any) -> JSON:
    answer = client.request(method, path, **content)
    if answer.is_success:
        return dict(answer.json())
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    if answer.status_code == 404 and path == "/v1/files":
        raise EnvironmentMissing(
            f"The server runs no batches: {message}",
            hint="Start it with `batch.folder` set, or leave `--url` out to run the file here.",
        )
    raise InvalidRequest(f"The server refused: {message} (status {answer.status_code})")


def _failure(path: Path, batch: JSON) -> str:
    problems = (batch.get("errors") or {}).get("data") or []
    shown = [f"line {each.get('line')}: {each.get('message')}" for each in problems[:10]]
    return f"The server cannot run `{path}`:\n  " + "\n  ".join(shown)
