"""Compiled forms of the modules that decide step by step, where the install could build them.

`setup.py` compiles the modules that it lists with mypyc into `penstock/_fast`. The Python files stay the
truth: the compiled forms are taken only when each of those files is byte for byte what was compiled, and all
of them or none. So an edit takes effect at once, as plain Python, until the next install.
`PENSTOCK_PURE=1` leaves them out. Decisions are the same; docs/twin.md says what it costs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent
FOLDER = PACKAGE / "_fast"
INDEX = FOLDER / "index.json"
PURE_VARIABLE = "PENSTOCK_PURE"
DIGEST_BYTES = 16


class _Finder:
    """Finds compiled modules before the usual finders find their Python files."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("penstock"):
            return None
        file = files().get(name)
        if file is None:
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, str(file)))


def install() -> None:
    """Let the compiled forms be found; nothing is read before the first of them is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_used() -> bool:
    """Whether this process runs the compiled forms."""
    return bool(files())


@cache
def files() -> dict[str, Path]:
    """Module name → compiled file; empty where they are switched off, absent, stale or another Python's."""
    if os.environ.get(PURE_VARIABLE, "") not in ("", "0") or not INDEX.exists():
        return {}
    try:
        index = json.loads(INDEX.read_text(encoding="utf-8"))
        is_ours = index["python"] == sys.implementation.cache_tag
        is_fresh = is_ours and all(digest(PACKAGE / s) == d for s, d in index["sources"].items())
        found = {name: FOLDER / file for name, file in index["modules"].items()}
        return found if is_fresh and all(file.exists() for file in found.values()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def digest(source: Path) -> str:
    """Of a file's content."""
    return hashlib.blake2b(source.read_bytes(), digest_size=DIGEST_BYTES).hexdigest()
