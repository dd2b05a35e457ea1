"""KV pages in host memory, and the thread that copies pages between them and the device.

One thread makes the copies in the order in which they were planned, beside the steps. A run of blocks is one
strided copy of K and one of V, over all layers. On the CPU "device" and "host" are two tensors; with CUDA the
host's is pinned, and copies go over a stream of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.core.step import Copy, CopyDone, Direction, Extent
from penstock.engine.kv_store import KVStore

_BITS: Final[dict[int, type[np.unsignedinteger[Any]]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class HostKV:
    """The host's pages of one store. `bytes_per_s` slows copies down to that, for tests; None: full speed."""

    def __init__(self, store: KVStore, block_count: int, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._block_bytes = store.byte_count // store.block_count
        pinned = store.k.device.type == "cuda"
        pairs = []
        for pages in (store.k, store.v):
            shape = (pages.shape[0], block_count, *pages.shape[2:])
            pairs.append((pages, torch.empty(shape, dtype=pages.dtype, pin_memory=pinned)))
        self._copier = _CudaCopier(pairs) if pinned else _CpuCopier(pairs)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-copies")
        self._flying: deque[tuple[Copy, Future[float]]] = deque()

    def begin(self, copies: Sequence[Copy]) -> None:
        """Whatever was computed so far is what will be copied."""
        for copy in copies:
            mark = self._copier.mark()
            self._flying.append((copy, self._thread.submit(self._make, copy, mark)))

    def wait(self, copy_ids: Sequence[int]) -> None:
        """Until these are done. Raises what broke one that the step is to read."""
        for copy, future in list(self._flying):
            if copy.copy_id in copy_ids and (error := future.exception()) and copy.direction is Direction.IN:
                raise error

    def take(self) -> list[CopyDone]:
        """What is done by now, told once."""
        done = []
        while self._flying and self._flying[0][1].done():
            copy, future = self._flying.popleft()
            error = future.exception()
            done.append(CopyDone(copy.copy_id, 0.0 if error else future.result(), error is None))
        return done

    def drain(self) -> None:
        """Wait for everything, and forget it."""
        while self._flying:
            self._flying.popleft()[1].exception()

    def _make(self, copy: Copy, mark: object) -> float:
        began_s = time.perf_counter()
        self._copier.copy(copy.direction, copy.extents, mark)
        if self._bytes_per_s is not None:
            wanted_s = copy.block_count * self._block_bytes / self._bytes_per_s
            time.sleep(max(0.0, wanted_s - (time.perf_counter() - began_s)))
        return time.perf_counter() - began_s


class _CpuCopier:
    """NumPy's copies: on this thread alone, and without the interpreter lock, so that steps keep going."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        bits = _BITS[pairs[0][0].element_size()]
        self._pairs = [tuple(_array(pages, bits) for pages in pair) for pair in pairs]

    def mark(self) -> object:
        return None  # a step is over before the next plan is made

    def copy(self, direction: Direction, extents: Sequence[Extent], mark: object) -> None:
        for device, host in self._pairs:
            for first, first_host, count in extents:
                there = host[:, first_host : first_host + count]
                here = device[:, first : first + count]
                np.copyto(there, here) if direction is Direction.OUT else np.copyto(here, there)


def _array(pages: Tensor, bits: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """The tensor's own memory; NumPy has no bfloat16, and a copy needs none."""
    return pages.view(torch.uint8).numpy().view(bits)


class _CudaCopier:
    """Asynchronous copies on a stream that runs behind what the step's stream had computed."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs
        self._stream = torch.cuda.Stream(device=pairs[0][0].device)  # type: ignore[no-untyped-call]

    def mark(self) -> object:
        return torch.cuda.current_stream(self._stream.device).record_event()

    def copy(self, direction: Direction, extents: Sequence[Extent], mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            for device, host in self._pairs:
                for first, first_host, count in extents:
                    there = host[:, first_host : first_host + count]
                    here = device[:, first : first + count]
                    if direction is Direction.OUT:
                        there.copy_(here, non_blocking=True)
                    else:
                        here.copy_(there, non_blocking=True)
        self._stream.synchronize()
