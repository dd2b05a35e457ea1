"""From rows of a trace to requests of the twin: lengths, and keys of the content that a replay would send."""

from __future__ import annotations

from hashlib import blake2b

from penstock.core.request import Request
from penstock.workloads.prompts import SessionStreams
from penstock.workloads.trace import TraceRow


class RequestMaker:
    """Makes requests in the order they are sent; remembers which content each session has seen.

    A request asks for its recorded output, which then nobody needs to guess; or, as most clients do, for
    `asked_tokens` (more where more was recorded), and ends by itself where the recorded one did.
    """

    def __init__(self, block_tokens: int, asked_tokens: int | None = None) -> None:
        self._block_tokens = block_tokens
        self._asked_tokens = asked_tokens or 0
        self._streams = SessionStreams()

    def make(self, number: int, row: TraceRow, arrival_s: float) -> Request:
        """Call once a row; `number` counts the requests of the run."""
        return Request(
            id=request_id_of(number),
            prompt_len=row.prompt_tokens,
            max_output_tokens=max(row.output_tokens, self._asked_tokens),
            arrival_s=arrival_s,
            block_keys=self._block_keys(number, row),
            tenant=row.tenant,
            slo_class=row.slo_class,
            session_id=row.session_id,
            program_id=row.session_id,
            is_last_turn=row.is_last_turn,
            tool=row.tool,
        )

    def _block_keys(self, number: int, row: TraceRow) -> list[bytes] | None:
        """Keys of the prompt's full KV blocks, as `prompts.PromptMaker` would fill them; None: unique."""
        full_blocks = row.prompt_tokens // self._block_tokens
        if row.block_hashes is not None and row.block_tokens:
            return _keys_of_hashes(row, self._block_tokens, full_blocks)
        if row.session_id is None:
            return None
        stream = self._streams.number(row.session_id, number, row.prompt_tokens)
        root = blake2b(f"{stream} {row.session_id}".encode(), digest_size=12).digest()
        return [root + block.to_bytes(4, "big") for block in range(full_blocks)]


def request_id_of(number: int) -> str:
    return f"r{number}"


def number_of(request_id: str) -> int:
    """The inverse of `request_id_of`."""
    return int(request_id[1:])


def _keys_of_hashes(row: TraceRow, block_tokens: int, full_blocks: int) -> list[bytes] | None:
    """Out of the trace's larger (or equal) content blocks; None where KV blocks cut across them.

    The output's blocks follow where the trace tells them and counts in the same blocks, as the log of a
    server with this replica's settings does: the next turn then finds the answer as the live one did.
    """
    assert row.block_hashes is not None
    if row.block_tokens % block_tokens:
        return None
    per_hash = row.block_tokens // block_tokens
    keys = [
        content.to_bytes(8, "big") + part.to_bytes(4, "big")
        for content in row.block_hashes
        for part in range(per_hash)
    ]
    del keys[full_blocks:]
    if per_hash == 1:
        keys += [content.to_bytes(8, "big") + bytes(4) for content in row.output_block_hashes or ()]
    return keys
