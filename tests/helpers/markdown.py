"""What the tests of the documents need to read in Markdown: fences, inline code, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_INDENTED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
# A shell line is cut where the command ends: a comment, a pipe, a redirection, the next command.
_AFTER_COMMAND = frozenset({"|", "&&", ";", ">", "&"})


@dataclass(frozen=True)
class Fence:
    """One fenced block; its body without the fence's own indentation."""

    language: str
    body: str


def fences(text: str) -> Iterator[Fence]:
    for match in _FENCE.finditer(text):
        indent = match["indent"]
        lines = (line.removeprefix(indent) for line in match["body"].split("\n"))
        yield Fence(match["language"], "\n".join(lines))


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of links, as they are written."""
    return _LINK.findall(_INLINE.sub("", without_fences(text)))


def inline_code(text: str) -> list[str]:
    return _INLINE.findall(without_fences(text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = _HEADING.findall(without_fences(text))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def shell_lines(text: str) -> Iterator[str]:
    """Lines of shell in a document: of `sh` fences, after the prompt in `console` fences, indented ones."""
    for fence in fences(text):
        if fence.language == "sh":
            yield from fence.body.splitlines()
        elif fence.language == "console":
            yield from (line[2:] for line in fence.body.splitlines() if line.startswith("$ "))
    yield from _INDENTED.findall(without_fences(text))


def penstock_words(line: str) -> list[str] | None:
    """The words after `penstock` in a line of shell that runs it; None for any other line."""
    if "penstock" not in line:
        return None
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # prose with an apostrophe
        return None
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if not words or words[0] != "penstock":
        return None
    end = next((place for place, word in enumerate(words) if word in _AFTER_COMMAND), len(words))
    return words[1:end]


def documents(root: Path) -> list[Path]:
    """Every Markdown file of ours."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]
