"""Text of a growing answer, one token at a time.

    token ids ─► bytes ─► whole characters ─► text that can no longer be part of a stop string
                 (tokenizer)  (UTF-8 decoder holds   (matcher holds the longest suffix
                               broken ends back)      that begins a stop string)

The pieces joined equal `Tokenizer.decode` of all ids, cut at the stop string. Work per token is
proportional to the token's own text: nothing that was decoded is looked at again.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import Final

from penstock.core.errors import InvalidRequest
from penstock.models.tokenizer import Tokenizer

MAX_STOP_CHARACTERS: Final = 32_768
"""Over all stop strings of a request; the matcher needs some 200 bytes for each."""


class IncrementalDetokenizer:
    """One sequence's detokenizer. Not shared between sequences.

    `stop`: the answer ends before the first of these to be completed (of two completed by the same
    character, the longer); `include_stop` leaves the stop string itself in the text. `skip_special` hides
    control tokens. `continues_text` keeps the space with which a SentencePiece text begins, for answers
    that are appended to a prompt. Raises `InvalidRequest` for an empty stop string or far too long ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special: bool = True,
        include_stop: bool = False,
        continues_text: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset[int]()
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.drops_leading_space and not continues_text
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._held = ""
        self._finished = False
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that has become certain, possibly none.

        After a stop string was found further tokens are accepted and have no text.
        """
        assert not self._finished, "push after finish"
        if self.stopped_by is not None or token_id in self._hidden:
            return ""
        return self._release(self._characters.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """Returns what was held back; a character that never became whole shows as U+FFFD."""
        assert not self._finished, "finish called twice"
        self._finished = True
        if self.stopped_by is not None:
            return ""
        text = self._release(self._characters.decode(b"", final=True))
        # A stop string may have been completed by the flush itself; then nothing is held any more.
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new_text: str) -> str:
        """`new_text` follows the held text; returns what is certain and keeps the rest."""
        if self._drops_space and new_text:
            new_text = new_text.removeprefix(" ")
            self._drops_space = False
        if self._matcher is None or not new_text:
            return new_text
        text, scanned = self._held + new_text, len(self._held)
        end = self._matcher.feed(new_text)
        if end is None:
            certain = len(text) - self._matcher.begun
            self._held = text[certain:]
            return text[:certain]
        self.stopped_by = self._matcher.matched
        assert self.stopped_by is not None
        self._held = ""
        stop_end = scanned + end
        return text[: stop_end if self._include_stop else stop_end - len(self.stopped_by)]


class StopMatcher:
    """Finds the first of several strings in a stream of characters (Aho and Corasick, 1975).

    State is a node of the trie of all stop strings: the longest suffix of the text so far that begins one
    of them. Building is linear in the strings' length, `feed` in the text's.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        _check(stop)
        self._children: dict[tuple[int, str], int] = {}
        self._depth = [0]
        self._longest: list[str | None] = [None]
        """Per node, the longest stop string that the text now ends with."""
        for text in stop:
            self._insert(text)
        self._fallback = [0] * len(self._depth)
        """Per node, the node of its longest proper suffix that is in the trie."""
        self._link()
        self._node = 0
        self.matched: str | None = None

    @property
    def begun(self) -> int:
        """Characters at the end of the text that may still become a stop string."""
        return self._depth[self._node]

    def feed(self, text: str) -> int | None:
        """Advances over `text`; if a stop string is completed, sets `matched` and returns the number of
        characters of `text` up to its end, leaving the rest unread."""
        assert self.matched is None, "the text has already stopped"
        for position, character in enumerate(text, start=1):
            self._node = self._step(self._node, character)
            if (found := self._longest[self._node]) is not None:
                self.matched = found
                return position
        return None

    def _step(self, node: int, character: str) -> int:
        while node and (node, character) not in self._children:
            node = self._fallback[node]
        return self._children.get((node, character), 0)

    def _insert(self, text: str) -> None:
        node = 0
        for character in text:
            child = self._children.get((node, character))
            if child is None:
                child = self._children[node, character] = len(self._depth)
                self._depth.append(self._depth[node] + 1)
                self._longest.append(None)
            node = child
        self._longest[node] = text

    def _link(self) -> None:
        """Sets fallbacks level by level, so that a node's are known before its children's."""
        edges: list[list[tuple[str, int]]] = [[] for _ in self._depth]
        for (parent, character), child in self._children.items():
            edges[parent].append((character, child))
        queue = deque(child for _, child in edges[0])
        while queue:
            node = queue.popleft()
            if self._longest[node] is None:
                self._longest[node] = self._longest[self._fallback[node]]
            for character, child in edges[node]:
                self._fallback[child] = self._step(self._fallback[node], character)
                queue.append(child)


def _check(stop: Sequence[str]) -> None:
    if not all(stop):
        raise InvalidRequest(
            "`stop` has an empty string, which would end every answer at once.",
            param="stop",
            hint="Leave it out.",
        )
    total = sum(len(text) for text in stop)
    if total > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"`stop` has {total} characters in all; we accept {MAX_STOP_CHARACTERS}.",
            param="stop",
            hint="Use shorter stop strings.",
        )
