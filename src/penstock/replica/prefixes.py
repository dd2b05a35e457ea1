"""A replica's use of the prefix index: what is found, what is offered, and what a miss was."""

from __future__ import annotations

from penstock.core.reasons import MissReason
from penstock.replica.kv_pool import KVPool
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.replica.sequence import Sequence


class Prefixes:
    """Between the sequences, whose content has keys, and the pool, which files blocks under keys."""

    def __init__(self, pool: KVPool, limits: ReplicaLimits, stats: ReplicaStats) -> None:
        self._pool = pool
        self._is_on = limits.prefix_cache
        self._block_tokens = limits.kv_block_tokens
        self._stats = stats

    def cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest known prefix. At least one token is left to compute, to sample from.

        None where every prompt position must be scored: cached positions yield no logits.
        """
        if not self._is_on or not sequence.is_keyed or sequence.request.sampling.prompt_logprobs:
            return []
        full_blocks = (sequence.total_len - 1) // self._block_tokens
        return self._pool.match(sequence.key_blocks(full_blocks, self._block_tokens))

    def publish(self, sequence: Sequence) -> None:
        """Offer the blocks that the last step filled."""
        if not self._is_on:
            return
        full_blocks = sequence.computed_len // self._block_tokens
        if full_blocks == sequence.published_blocks:
            return
        keys = sequence.key_blocks(full_blocks, self._block_tokens)
        for index in range(sequence.published_blocks, len(keys)):
            self._pool.publish(sequence.blocks[index], keys[index])
        sequence.published_blocks = len(keys)

    def published_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks under which others find what it has computed, its own or equal ones."""
        if not self._is_on or not sequence.is_keyed:
            return []
        return self._pool.match(sequence.key_blocks(sequence.published_blocks, self._block_tokens))

    def count(self, sequence: Sequence, cached_len: int) -> None:
        """Hits and misses of a sequence that starts for the first time."""
        stats = self._stats
        total_len = sequence.total_len
        stats.prefix_query_tokens_total += total_len
        stats.prefix_hit_tokens_total += cached_len
        reason = MissReason.NEW
        missed_block = cached_len // self._block_tokens
        if sequence.is_keyed and missed_block < (total_len - 1) // self._block_tokens:
            keys = sequence.key_blocks(missed_block + 1, self._block_tokens)
            if missed_block < len(keys) and self._pool.was_evicted(keys[missed_block]):
                reason = MissReason.EVICTED
        stats.prefix_miss_tokens_total[reason.value] += total_len - cached_len
