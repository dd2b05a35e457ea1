"""The demo: a real model, a real trace, one minute, a report.

Pulls the embedded model, starts a server on a free port, replays a window of real BurstGPT traffic against
it, prints the table, says where the report is, and stops the server. Exits non-zero if a request was lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_TIMEOUT_S = 600  # the first start downloads the model
STOP_TIMEOUT_S = 60
PENSTOCK = [sys.executable, "-m", "penstock.cli.main"]
REPLAY = [
    # 400 real rows span ten hours. This window, 200 times faster, is a minute of uneven arrivals.
    *("replay", "sample:burstgpt1", "--window", "0:12000", "--time-scale", "200"),
    *("--length-divisor", "4", "--slo-ttft-ms", "2000", "--slo-tpot-ms", "100", "--out", "reports/demo"),
    "--fail-on-loss",
]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "url"
        server = subprocess.Popen([*PENSTOCK, "serve", "--port", "0", "--ready-file", str(ready)])
        try:
            url = wait_for_url(server, ready)
            code = subprocess.run([*PENSTOCK, *REPLAY, "--url", url], check=False).returncode
        finally:
            stop(server)
    return code or server.returncode


def wait_for_url(server: subprocess.Popen[bytes], ready: Path) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SystemExit(f"the server ended while starting (exit code {server.returncode})")
        if ready.exists() and (url := ready.read_text().strip()):
            return url
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {START_TIMEOUT_S} s")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Drain, then insist."""
    if server.poll() is not None:
        return
    os.kill(server.pid, signal.SIGTERM)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
