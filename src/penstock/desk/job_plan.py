"""The plan of an offline job: which prompts share a prefix, and in which order the groups run.

    prompts ─► prefix tree ─► one level of sharing (greedy lift) ─► groups, decode-heavy first ─► order

Everything is known in advance, so a prefix is computed once, its requests run right behind it, and its KV is
needed for exactly as long as its group lives. Source: BatchLLM (arXiv 2412.03594); published as
`vllm/inputs/prefix_clustering.py` of microsoft/MixLLM, which scans children linearly where this hashes the
first token. Pure; O(total tokens) time and memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

_TOKEN_BYTES: Final = array("I").itemsize
_CHUNK_TOKENS: Final = 256  # compared at once


@dataclass(frozen=True, slots=True)
class JobGroup:
    """Prompts that begin with the same `shared_len` tokens; `members` are their places in the input."""

    shared_len: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Groups in the order in which they should run. Each prompt is in exactly one.

    Tokens are counted as a replica with blocks of `block_tokens` computes them: only full blocks are shared,
    and at least the last token of every prompt is computed.
    """

    groups: tuple[JobGroup, ...]
    prompt_lens: tuple[int, ...]
    block_tokens: int

    @property
    def order(self) -> Iterator[tuple[int, JobGroup]]:
        """Places in the input, each with its group, as they should be submitted."""
        return ((member, group) for group in self.groups for member in group.members)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that the plan finds instead of computing them."""
        return sum(self._saved(group) for group in self.groups)

    def prefill_tokens(self, group: JobGroup) -> int:
        """What the group computes of its prompts, its prefix once."""
        return sum(self.prompt_lens[member] for member in group.members) - self._saved(group)

    def _saved(self, group: JobGroup) -> int:
        block = self.block_tokens
        return sum(
            min(group.shared_len, (self.prompt_lens[member] - 1) // block * block)
            for member in group.members[1:]
        )


class JobPlanner:
    """Plans jobs for replicas whose KV blocks hold `block_tokens` tokens."""

    def __init__(self, block_tokens: int = 1) -> None:
        assert block_tokens >= 1
        self._block_tokens = block_tokens

    def prepare(self, prompts: Sequence[Sequence[int]], output_tokens: Sequence[float]) -> JobPlan:
        """Cluster `prompts` and order the groups by R = expected output tokens / prefill tokens, falling.

        `output_tokens`: what each prompt is expected to generate (its maximum, where nothing better is
        known). Decode-heavy groups start early, so that their decodes later share steps with the prefills
        of prompt-heavy ones. Equal groups keep the order of the input.
        """
        assert len(prompts) == len(output_tokens)
        lens = tuple(len(prompt) for prompt in prompts)
        found = JobPlan(tuple(self._groups(prompts)), lens, self._block_tokens)

        def urgency(group: JobGroup) -> tuple[float, int]:
            output = sum(output_tokens[member] for member in group.members)
            return (-output / max(1, found.prefill_tokens(group)), min(group.members))

        return JobPlan(tuple(sorted(found.groups, key=urgency)), lens, self._block_tokens)

    def _groups(self, prompts: Sequence[Sequence[int]]) -> Iterator[JobGroup]:
        for candidate in _collapsed(_tree_of(prompts)):
            shared_len = candidate.run // self._block_tokens * self._block_tokens
            if len(candidate.members) == 1 or not shared_len:
                yield from (JobGroup(0, (member,)) for member in candidate.members)
            else:
                yield JobGroup(shared_len, tuple(candidate.members))


@dataclass(slots=True)
class _Node:
    """A run of tokens, as the stretch `start:stop` of one prompt's text. `ends`: prompts that end with it."""

    text: bytes
    start: int
    stop: int
    children: dict[bytes, _Node] = field(default_factory=dict)  # by first token
    ends: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Candidate:
    """A possible group: `run` tokens beyond the node above it are common to all `members`."""

    run: int
    members: list[int]


def _tree_of(prompts: Sequence[Sequence[int]]) -> _Node:
    root = _Node(b"", 0, 0)
    for index, prompt in enumerate(prompts):
        _insert(root, index, array("I", prompt).tobytes(), len(prompt))
    return root


def _insert(root: _Node, index: int, text: bytes, length: int) -> None:
    node, position = root, 0
    while position < length:
        first = text[position * _TOKEN_BYTES : (position + 1) * _TOKEN_BYTES]
        child = node.children.get(first)
        if child is None:
            node.children[first] = _Node(text, position, length, ends=[index])
            return
        run = child.stop - child.start
        common = _common_len(child.text, child.start, text, position, min(run, length - position))
        if common < run:
            child = _split(node, first, child, common)
        position += common
        node = child
    node.ends.append(index)


def _split(parent: _Node, first: bytes, child: _Node, common: int) -> _Node:
    """Cut `child` after `common` tokens; returns the upper part."""
    cut = child.start + common
    upper = _Node(child.text, child.start, cut)
    upper.children[child.text[cut * _TOKEN_BYTES : (cut + 1) * _TOKEN_BYTES]] = child
    child.start = cut
    parent.children[first] = upper
    return upper


def _common_len(one: bytes, one_start: int, other: bytes, other_start: int, limit: int) -> int:
    """How many tokens agree, at most `limit`. Whole chunks are compared at the speed of memory."""
    done, size = 0, _CHUNK_TOKENS
    while done < limit and size:
        size = min(size, limit - done)
        a, b = (one_start + done) * _TOKEN_BYTES, (other_start + done) * _TOKEN_BYTES
        if one[a : a + size * _TOKEN_BYTES] == other[b : b + size * _TOKEN_BYTES]:
            done += size
        else:
            limit = done + size - 1  # somewhere in this chunk they differ
            size = max(1, size // 2)
    return done


def _collapsed(root: _Node) -> list[_Candidate]:
    """One level of sharing: bottom-up, each inner group stays in its parent's or becomes one of its own.

    A group of n members that has `run` tokens of its own below a node c is lifted beside c when sharing
    them saves more than computing c once more costs: (n - 1) · run > |c|.
    """
    order = _preorder(root)
    levels: dict[int, list[_Candidate]] = {}  # id of a node → its candidates, seen from the node above
    place: dict[int, int] = {}  # prompt → its place in the tree, so that neighbours stay neighbours
    for node in order:
        for end in node.ends:
            place[end] = len(place)
    for node in reversed(order):
        below = [_Candidate(0, [end]) for end in node.ends]
        for child in node.children.values():
            below += levels.pop(id(child))
        levels[id(node)] = _lift(below, node.stop - node.start)
    groups = levels[id(root)]
    for group in groups:
        group.members.sort(key=place.__getitem__)
    return groups


def _lift(below: list[_Candidate], run: int) -> list[_Candidate]:
    """What a node of `run` tokens makes of the candidates below it: those lifted, and its own group."""
    if run == 0:
        return below  # the root: nothing is common to all
    lifted: list[_Candidate] = []
    kept: list[_Candidate] = []
    for candidate in below:
        pays = (len(candidate.members) - 1) * candidate.run > run
        (lifted if pays else kept).append(candidate)
    for candidate in lifted:
        candidate.run += run
    if len(kept) == 1:
        kept[0].run += run
        return [*lifted, kept[0]]
    if kept:
        largest = max(kept, key=lambda candidate: len(candidate.members))
        for candidate in kept:
            if candidate is not largest:
                largest.members += candidate.members
        largest.run = run
        lifted.append(largest)
    return lifted


def _preorder(root: _Node) -> list[_Node]:
    """Without recursion: prompts that extend each other make deep trees."""
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(node.children.values())
    return order
