"""What the documents show of quick commands is what these print: each is run, and compared line by line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown import documents, fences

ROOT = Path(__file__).resolve().parents[2]
# Beginnings of commands that need no model, no network and no more than a second.
QUICK = (
    "config show",
    "policies",
    "trace describe",
    "model info nope",
    "model info Qwen/",
    "serve --preset nope",
    "simulate sample:burstgpt1 --hardware h100sx",
)
FILES = {"bad.toml": "[desk]\nqueue_requets_max = 1\n"}


@dataclass(frozen=True)
class Example:
    """One command of a `console` fence, the lines shown below it, and the last `toml` fence before it."""

    document: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    shown: tuple[str, ...]
    config: str

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def examples() -> Iterator[Example]:
    for path in documents(ROOT):
        name, config = str(path.relative_to(ROOT)), ""
        for fence in fences(path.read_text(encoding="utf-8")):
            if fence.language == "toml":
                config = fence.body
            elif fence.language == "console":
                for part in re.split(r"^\$ ", fence.body, flags=re.MULTILINE)[1:]:
                    command, *shown = part.splitlines()
                    yield example_of(name, command, [line for line in shown if line.strip()], config)


def example_of(document: str, command: str, shown: list[str], config: str) -> Example:
    words = shlex.split(command)
    first = next((place for place, word in enumerate(words) if "=" not in word), len(words))
    environment = tuple((name, value) for name, _, value in (word.partition("=") for word in words[:first]))
    return Example(document, tuple(words[first:]), environment, tuple(shown), config)


def is_quick(example: Example) -> bool:
    return example.words[:1] == ("penstock",) and " ".join(example.words[1:]).startswith(QUICK)


FOUND = [example for example in examples() if is_quick(example)]


def test_each_quick_command_is_shown_somewhere() -> None:
    lines = [" ".join(example.words[1:]) for example in FOUND]
    assert [begin for begin in QUICK if not any(line.startswith(begin) for line in lines)] == []


@pytest.mark.parametrize("example", FOUND, ids=str)
def test_a_command_prints_what_is_shown(example: Example, tmp_path: Path) -> None:
    """All lines of an error; of other output those shown, in that order, since documents cut."""
    for name, text in {**FILES, "penstock.toml": example.config}.items():
        (tmp_path / name).write_text(text)
    printed = run(example.words[1:], dict(example.environment), tmp_path)
    if example.shown[0].startswith("error: "):
        assert printed == list(example.shown)
    left = iter(printed)
    missing = [line for line in example.shown if line not in left]
    assert not missing, f"`{example}` does not print this, or not there"


def run(words: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", *words],
        cwd=folder,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return [line for line in done.stdout.splitlines() if line.strip()]
