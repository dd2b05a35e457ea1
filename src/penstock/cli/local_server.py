"""A `penstock serve` of one's own, for commands that need a server and were given no URL."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import EnvironmentMissing

if TYPE_CHECKING:
    from penstock.replica.limits import ReplicaLimits

START_TIMEOUT_S = 300.0  # the model may have to be fetched first
STOP_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_CHARS_SHOWN = 2000
PROGRAM = (sys.executable, "-m", "penstock.cli.main")


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A server that takes requests. `info` is what it printed of itself: sizes, device, policies."""

    url: str
    info: dict[str, Any]

    def limits(self, prefix_cache: bool) -> ReplicaLimits:
        """The sizes that its replica really has; it does not tell whether it has a prefix cache."""
        from penstock.replica.limits import ReplicaLimits

        info = self.info
        return ReplicaLimits(
            kv_blocks=info["kv_blocks"],
            kv_block_tokens=info["kv_block_tokens"],
            running_max=info["running_max"],
            step_tokens_max=info["step_tokens_max"],
            context_len_max=info["context_len_max"],
            prefix_cache=prefix_cache,
        )


@contextlib.contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[LocalServer]:
    """`penstock serve` with these flags, on a free port of the loopback interface, ended when the block ends.

    It has a session of its own, so that a Ctrl-C reaches only this process. Raises EnvironmentMissing with
    the server's own words when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-") as name:
        folder = Path(name)
        ready, log = folder / "url", folder / "log"
        command = [*PROGRAM, "serve", *arguments, "--host", "127.0.0.1", "--port", "0", "--json"]
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [*command, "--ready-file", str(ready)],
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        try:
            _wait_ready(process, ready, log)
            assert process.stdout is not None
            yield LocalServer(ready.read_text().strip(), dict(json.loads(process.stdout.readline())))
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not (ready.exists() and ready.read_text().strip()):
        if process.poll() is not None or time.monotonic() > deadline_s:
            said = log.read_text(errors="replace")[-LOG_CHARS_SHOWN:].strip()
            raise EnvironmentMissing(
                f"the server did not start:\n{said}", hint="start one yourself, and give its `--url`"
            )
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """In order where it can be, by force where it cannot."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
