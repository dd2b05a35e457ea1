"""Which tool a model's text calls, as it is written: for policies that know how long tools take.

The name comes before the arguments in every syntax below, so it is mostly known before the answer ends.
Only a name is taken, and only as a hint: nothing of the answer changes.
"""

from __future__ import annotations

import re
from typing import Final

WINDOW_CHARS: Final = 512  # how far back a call may begin before its name
TOOL_CHARS_MAX: Final = 64  # as OpenAI bounds function names
_NAME: Final = rf"([A-Za-z0-9_.:-]{{1,{TOOL_CHARS_MAX}}})"
_CALLS: Final = re.compile(
    "|".join(
        (
            rf'<tool_call>\s*\{{\s*"name"\s*:\s*"{_NAME}"',  # Hermes, Qwen
            rf"<function={_NAME}>",  # Llama 3.1, Qwen coder
            rf'\[TOOL_CALLS\]\s*\[?\s*\{{\s*"name"\s*:\s*"{_NAME}"',  # Mistral
            rf'<\|python_tag\|>\s*\{{[^{{}}]*?"name"\s*:\s*"{_NAME}"',  # Llama 3.1, JSON
            r"```(?:bash|sh|shell)\s*\n\s*([A-Za-z0-9_.-]{1,64})\s",  # a command, as SWE agents write it
        )
    )
)
_WHOLE: Final = re.compile(rf'\s*\{{\s*"name"\s*:\s*"{_NAME}"\s*,\s*"(?:arguments|parameters)"')  # Llama 3


class ToolWatch:
    """Reads one completion's text as it grows. O(new text + window) a piece."""

    def __init__(self) -> None:
        self._tail = ""
        self._is_start = True  # the tail is all of the text so far
        self.tool: str | None = None  # of the last call in the text

    def feed(self, text: str) -> bool:
        """Whether the tool has changed with this piece."""
        window = self._tail + text
        found = _WHOLE.match(window) if self._is_start else None
        for match in _CALLS.finditer(window):
            found = match
        self._is_start = self._is_start and len(window) <= WINDOW_CHARS
        self._tail = window[-WINDOW_CHARS:]
        if found is None:
            return False
        tool = next(name for name in found.groups() if name)
        was, self.tool = self.tool, tool
        return tool != was
