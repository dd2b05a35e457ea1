"""Notices preemption storms: when much of the work is work done before. Pure."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

from penstock.core.events import Preempted

WINDOW_S: Final = 10.0
PREEMPTIONS_MIN: Final = 10  # in a window; fewer are no storm
BEGINS_FRAC: Final = 0.2  # of the tokens computed in a window, lost ones
ENDS_FRAC: Final = 0.1
REMEMBERED_MAX: Final = 4096  # preemptions


@dataclass(frozen=True, slots=True)
class Storm:
    """What a window held when the storm began. Ids are those of requests; `for_whom` yielded to most."""

    preemptions: int
    tokens_lost: int
    lost_frac: float
    cause: str
    victim: str
    victim_times: int
    for_whom: str

    def __str__(self) -> str:
        return (
            f"preemption storm: {self.preemptions} in {WINDOW_S:g} s, {self.tokens_lost} tokens lost "
            f"({self.lost_frac:.0%} of those computed); most often {self.victim} "
            f"({self.victim_times} times); main cause {self.cause}, mostly for {self.for_whom}"
        )


class StormWatch:
    """Sums over the last `WINDOW_S` seconds; O(1) amortised an event."""

    def __init__(self) -> None:
        self._preempted: deque[tuple[float, Preempted]] = deque(maxlen=REMEMBERED_MAX)
        self._computed: deque[tuple[float, int]] = deque()
        self._lost_tokens = 0
        self._computed_tokens = 0
        self._is_on = False
        self._step_index = -1

    def preempted(self, event: Preempted, now_s: float) -> None:
        if len(self._preempted) == REMEMBERED_MAX:
            self._lost_tokens -= self._preempted[0][1].tokens_lost
        self._preempted.append((now_s, event))
        self._lost_tokens += event.tokens_lost

    def reported(self, step_index: int, tokens: int, now_s: float) -> Storm | None:
        """The last step computed so many tokens; a report may be of no new step. The storm, if one begins."""
        if step_index == self._step_index:
            return None
        self._step_index = step_index
        if not self._preempted:  # the common case costs nothing
            self._computed.clear()
            self._computed_tokens = 0
            self._is_on = False
            return None
        self._computed.append((now_s, tokens))
        self._computed_tokens += tokens
        self._forget(now_s - WINDOW_S)
        frac = self._lost_tokens / max(1, self._computed_tokens)
        if self._is_on:
            self._is_on = frac >= ENDS_FRAC
            return None
        if len(self._preempted) < PREEMPTIONS_MIN or frac < BEGINS_FRAC:
            return None
        self._is_on = True
        return self._describe(frac)

    def _forget(self, before_s: float) -> None:
        while self._preempted and self._preempted[0][0] < before_s:
            self._lost_tokens -= self._preempted.popleft()[1].tokens_lost
        while self._computed and self._computed[0][0] < before_s:
            self._computed_tokens -= self._computed.popleft()[1]

    def _describe(self, frac: float) -> Storm:
        events = [event for _, event in self._preempted]
        victims = Counter(event.request_id for event in events)
        causes = Counter(event.reason.value for event in events)
        winners = Counter(event.for_request_id or "itself" for event in events)
        (victim, times), (cause, _), (winner, _) = (
            count.most_common(1)[0] for count in (victims, causes, winners)
        )
        return Storm(len(events), self._lost_tokens, frac, cause, victim, times, winner)
