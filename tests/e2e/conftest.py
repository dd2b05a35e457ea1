"""Real servers: one that the whole session shares, and one's own for tests that end it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from benchmarks.in_process import InProcess
from benchmarks.server_process import ServerProcess, start_server, wait_until
from live import StartServer, is_idle
from tiny_chat_model import write_tiny_chat_model

KV_MEMORY = "4MiB"  # fewer tokens than the model's context, so that a prompt can be too long for it
FILES_WANTED = 8192
# Arrival order, so that a test knows who runs and who waits; tests/engine/test_preset_journals.py runs all.
FLAGS = (
    *("--preset", "sarathi", "--threads", "1", "--dtype", "float32"),
    *("--kv-memory", KV_MEMORY, "--running-max", "4"),
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def shared_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Checks its own books after every step. Told to end when idle, it ends at once and in order."""
    _raise_file_limit()  # the server inherits it
    settings = {"replica.check_invariants_steps": 1}
    with start_server(tiny_folder, tmp_path_factory.mktemp("server"), *FLAGS, settings=settings) as server:
        yield server
        assert server.stop() == 0, server.log
        assert "Traceback" not in server.log and "failed" not in server.log


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server; whatever a test does, it leaves nothing behind."""
    yield shared_server
    wait_until(lambda: is_idle(shared_server), "the server is idle after the test")


@pytest.fixture
def serve(tiny_folder: Path, tmp_path: Path) -> Iterator[StartServer]:
    """A server of the test's own: `serve(*flags, settings={…})`."""
    started: list[ServerProcess] = []

    def start(*flags: str, settings: dict[str, object] | None = None) -> ServerProcess:
        started.append(start_server(tiny_folder, tmp_path, *FLAGS, *flags, settings=settings))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False) as http:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture(scope="session")
def alone(tiny_folder: Path) -> InProcess:
    return InProcess(str(tiny_folder), threads=1, dtype="float32", kv_memory=KV_MEMORY)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
