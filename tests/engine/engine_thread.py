"""An engine's own loop, in a thread of the test's process, on a tiny model."""

from __future__ import annotations

import multiprocessing
import threading

from tiny_model import Source

from penstock.core.settings import Settings
from penstock.engine import worker
from penstock.engine.commands import Close
from penstock.replica.messages import ReplicaInfo

WAIT_S = 60.0
TINY_REPLICA = """
[replica]
device = "cpu"
dtype = "float32"
threads = 1
kv_memory = "450KiB"
kv_block_tokens = 8
context_len = 320
check_invariants_steps = 1
"""


class EngineThread:
    """`connection` is the gateway's end of the pipe. `failed` holds what ended the loop, if anything did."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.heartbeat = multiprocessing.Value("q", 0, lock=False)
        self.failed: list[BaseException] = []
        self.started = threading.Event()

        def run() -> None:
            try:
                self.loop = worker._start(theirs, self.heartbeat, settings, source, "tiny")  # type: ignore[arg-type]
                self.started.set()
                self.loop.run()
            except BaseException as error:
                self.failed.append(error)
                theirs.close()

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()
        while not isinstance(self.connection.recv(), ReplicaInfo):
            pass  # stages of starting
        assert self.started.wait(WAIT_S)

    def close(self) -> None:
        if self._thread.is_alive():
            self.connection.send(Close())
        self._thread.join(WAIT_S)
