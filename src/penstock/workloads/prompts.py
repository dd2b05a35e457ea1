"""Prompts of the exact length that a trace row asks for, with the prefixes shared that the trace shares.

Contents are streams of pseudo-random numbers: token i of stream K is a pure function of (K, i), so a prefix
of a stream is the same whatever is taken after it, and two replays with one seed send identical requests.

    row with block hashes    block h is the stream ("block", h), the last block cut: equal ids, equal tokens
    row with a session       the stream of its session, so that a longer turn extends the one before; a turn
                             that is not longer than the last one begins a new stream (new content)
    any other row            a stream of its own

Text prompts are the same streams drawn from a list of words that are one token each in most vocabularies;
`TextFit` says how many words make how many tokens on this server.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from penstock.core.errors import ConfigError
from penstock.workloads.trace import SESSIONS_TRACKED_MAX, TraceRow

Words = npt.NDArray[np.uint64]

# Most vocabularies keep special and byte tokens below 1,000 and have at least 32,000 entries.
TOKEN_ID_LOW = 1000
TOKEN_ID_HIGH = 31_000


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Half-open interval of token ids that prompts are made of."""

    low: int = TOKEN_ID_LOW
    high: int = TOKEN_ID_HIGH

    @classmethod
    def of_vocabulary(cls, vocab_size: int | None) -> TokenRange:
        """The usual range, narrowed to a small vocabulary. Raises ConfigError below 16 entries."""
        if vocab_size is None or vocab_size >= TOKEN_ID_HIGH:
            return cls()
        if vocab_size < 16:
            raise ConfigError(f"a vocabulary of {vocab_size} is too small.", hint="check `--vocab-size`")
        return cls(min(TOKEN_ID_LOW, vocab_size // 4), vocab_size)


class PromptMaker:
    """Makes the content of prompts, in trace order. Keeps state per session, for the last million of them."""

    def __init__(self, seed: int, token_range: TokenRange | None = None) -> None:
        self._seed = seed
        self._range = token_range or TokenRange()
        self._sessions = SessionStreams()

    def token_ids(self, index: int, row: TraceRow) -> list[int]:
        """Exactly `row.prompt_tokens` ids; `index` is the row's number in the replay. Changes state."""
        span = np.uint64(self._range.high - self._range.low)
        ids = self._draws(index, row, row.prompt_tokens) % span + np.uint64(self._range.low)
        found: list[int] = ids.tolist()
        return found

    def text(self, index: int, row: TraceRow, fit: TextFit) -> str:
        """Text of `row.prompt_tokens` tokens by `fit`, at least one word. Changes session state."""
        count = max(1, row.prompt_tokens - fit.overhead_tokens)
        picks = self._draws(index, row, count - 1) % np.uint64(len(fit.words))
        return " ".join([LEADING_WORD, *(fit.words[pick] for pick in picks.tolist())])

    def _draws(self, index: int, row: TraceRow, count: int) -> Words:
        if row.block_hashes and row.block_tokens:
            return self._draws_of_blocks(row.block_hashes, row.block_tokens, count)
        if row.session_id is not None:
            stream = self._sessions.number(row.session_id, index, count)
            return _draw(self._key("session", row.session_id, stream), count)
        return _draw(self._key("row", index), count)

    def _draws_of_blocks(self, hashes: tuple[int, ...], block_tokens: int, count: int) -> Words:
        parts = [_draw(self._key("block", block), block_tokens) for block in hashes]
        missing = count - block_tokens * len(hashes)
        assert missing <= 0, "readers and shapes keep ceil(prompt / block) block ids"
        return np.concatenate(parts)[:count]

    def _key(self, *parts: str | int) -> int:
        text = repr((self._seed, *parts)).encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class SessionStreams:
    """Which stream of its session a turn reads, for the last million of sessions; the twin asks too."""

    def __init__(self) -> None:
        self._sessions: dict[str, _SessionStream] = {}

    def number(self, session_id: str, index: int, count: int) -> int:
        """The stream's number for the turn `index` of `count` tokens; a new one when it does not grow.

        Changes state; asking again for the same turn gives the same answer.
        """
        last = self._sessions.pop(session_id, None)
        if last is not None and last.index == index:
            self._sessions[session_id] = last
            return last.number
        number = 0 if last is None else last.number + (count <= last.length)
        self._sessions[session_id] = _SessionStream(index, number, count)
        if len(self._sessions) > SESSIONS_TRACKED_MAX:
            del self._sessions[next(iter(self._sessions))]
        return number


@dataclass(slots=True)
class _SessionStream:
    index: int  # of the row that was asked for last
    number: int
    length: int


def _draw(key: int, count: int) -> Words:
    """64-bit draws 0 … count-1 of one stream: SplitMix64 (Steele et al., OOPSLA 2014) as a counter hash."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


# Every text begins with it: a word without a space before it may be another token, and this one is probed.
LEADING_WORD = "the"


@dataclass(frozen=True, slots=True)
class TextFit:
    """How text turns into tokens here: n words make n + `overhead_tokens` (template, begin-of-text).

    `is_exact` says that the server's own tokenizer confirmed it; otherwise lengths are approximate.
    """

    words: tuple[str, ...]
    overhead_tokens: int
    is_exact: bool


# Short, common, lower-case: one token each (with the space before them) in every BPE vocabulary we know.
COMMON_WORDS = tuple(
    """
    the and that have for not with you this but his from they say her she will one all would there their
    what out about who get which when make can like time just him know take people into year your good
    some could them see other than then now look only come its over think also back after use two how
    our work first well way even new want because any these give day most water long little very great
    where through much before line right too mean old same tell boy follow came show around form three
    small set put end does another large must big such turn here why ask men read need land different
    home move try kind hand picture again change off play air away animal house point page letter mother
    answer found study still learn should world high every near add food between own below country plant
    last school father keep tree never start city earth eye light thought head under story saw left few
    while along might close something seem next hard open example begin life always those both paper
    together got group often run important until children side feet car night walk white sea began grow
    took river four carry state once book hear stop without second later miss idea enough eat face watch
    far really almost let above girl sometimes mountain cut young talk soon list song being leave family
    body music color stand sun question fish area mark dog horse birds problem complete room knew since
    ever piece told usually friends easy heard order red door sure become top ship across today during
    short better best however low hours black products happened whole measure remember early waves
    reached listen wind rock space covered fast several hold himself toward five step morning
    """.split()
)
