"""The compiled CPU kernels (`kernels.c`), or their absence.

They are built by the install. Where that failed, or the machine is no Linux CPU, `load_kernels` answers
None and attention runs in torch: the same results to rounding, slower.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path


class AttendArgs(ctypes.Structure):
    """Mirrors `attend_args` in kernels.c."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("k_pages", ctypes.c_void_p),
        ("v_pages", ctypes.c_void_p),
        ("items", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_offsets", ctypes.c_void_p),
        ("item_count", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_tokens", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    ]


class Kernels:
    """Typed entries of the library. Calls release the GIL."""

    def __init__(self, library: ctypes.CDLL, parallel: ctypes.c_void_p | None) -> None:
        self._attend = library.penstock_attend
        self._attend.argtypes = [ctypes.POINTER(AttendArgs), ctypes.c_void_p, ctypes.c_int]
        self._store = library.penstock_store
        self._store.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4 + [ctypes.c_int32]
        self._store.restype = None
        self._parallel = parallel

    def attend(self, args: AttendArgs, threads: int) -> bool:
        """False where the shape is not supported: head_dim and block_tokens must be multiples of 16."""
        return bool(self._attend(ctypes.byref(args), self._parallel, threads) == 0)

    def store(
        self, pointers: tuple[int, int, int, int, int], sizes: tuple[int, int, int, int], element_bytes: int
    ) -> None:
        """`pointers`: k, v, k_pages, v_pages, slots; `sizes`: rows, kv_heads, head_dim, block_tokens."""
        self._store(*pointers, *sizes, element_bytes)


@functools.cache
def load_kernels() -> Kernels | None:
    """The library beside this file, bound to torch's own thread pool; None where it was not built."""
    folder = Path(__file__).parent
    candidates = (folder / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return None
    try:
        return Kernels(ctypes.CDLL(str(path)), _torch_parallel())
    except OSError:
        return None


def _torch_parallel() -> ctypes.c_void_p | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded, so that there is one pool of threads."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    loaded = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    for path in sorted(loaded, key=lambda name: "torch" not in name):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
