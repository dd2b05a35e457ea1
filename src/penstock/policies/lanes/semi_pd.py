"""Shares that follow what was observed, window by window."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.lanes import FLOOR, LANES, Batch, Lane, Lanes, Shares
from penstock.policies.lanes.latency_fits import QueueFit, SpeedFit, fit_queue, fit_speed
from penstock.policies.view import ReplicaView, SequenceView, StepFacts

TTFT_MS: Final = 1000.0  # where neither an option nor an SLO says more
TPOT_MS: Final = 100.0
_WINDOWS_MAX: Final = 8  # observations that a fit sees
_SAMPLES_MAX: Final = 4096
_WAITING_MAX: Final = 256  # of the queue's head, looked at once a window


@dataclass(frozen=True, slots=True)
class SemiPdOptions:
    ttft_ms: float = setting(0.0, "target; 0 takes the tightest of the SLOs", low=0.0, high=1e7)
    tpot_ms: float = setting(0.0, "target; 0 takes the tightest of the SLOs", low=0.0, high=1e7)
    percentile: float = setting(0.9, "of a window's requests that are to meet the targets", low=0.5, high=1.0)
    window_steps: int = setting(500, "steps of both lanes between two decisions", low=2, high=1 << 20)
    step_frac: float = setting(0.05, "change of a share, of the device", low=0.01, high=0.5)
    steps_max: int = setting(4, "changes in one window", low=1, high=100)
    prefill_frac: float = setting(1.0, "first share of the prefill lane", low=FLOOR, high=1.0)
    decode_frac: float = setting(1.0, "first share of the decode lane; both may be 1", low=FLOOR, high=1.0)
    switch_s: float = setting(
        2.0, "until workers with other shares are ready; the old ones serve meanwhile", low=0.0, high=600.0
    )


@LANES.register("semi-pd", source="semi-PD (arXiv 2504.19867), Algorithm 1 as its text has it")
class SemiPd(Lanes):
    """Shift the device towards the phase that misses its target, by a model refitted every window.

    Every `window_steps` steps the TTFT and TPOT of the window are compared with the targets. If only one
    misses, its share grows by steps (where it is at 100 % the other's shrinks) until the fitted model
    predicts that it will hold, at most `steps_max` of them. If both miss, or both hold, nothing changes;
    the paper's listing tests TTFT first, its text does not. TTFT counts from arrival, and who has waited for
    longer than the target counts as observed. TPOT is a request's own mean within the window. While a switch
    is under way nothing is decided. O(running) a window, O(1) a step.
    """

    Options = SemiPdOptions

    def __init__(self, context: Context, options: SemiPdOptions) -> None:
        slos = context.terms.slos.values()
        self._options = options
        self._ttft_s = _target_s(options.ttft_ms, [slo.ttft_ms for slo in slos], TTFT_MS)
        self._tpot_s = _target_s(options.tpot_ms, [slo.tpot_ms for slo in slos], TPOT_MS)
        self._shares = Shares(options.prefill_frac, options.decode_frac)
        self._ready_s = 0.0  # when the present shares were, or will be, in force
        self._window = _Window(None)
        self._decoding: dict[
            int, tuple[float, int, SequenceView]
        ] = {}  # since when, and with how much output
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=_WINDOWS_MAX)
        self._tpots: deque[tuple[float, float]] = deque(maxlen=_WINDOWS_MAX)

    @property
    def switch_s(self) -> float:
        return self._options.switch_s

    def shares(
        self, lane: Lane, prefill: Batch | None, decode: Batch | None, view: ReplicaView, now_s: float
    ) -> Shares:
        if self._window.steps >= self._options.window_steps:
            self._end_window(view, now_s)
        return self._shares

    # ---- what it observes -----------------------------------------------------------------------------

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        if self._window.began_s is None:
            self._window.began_s = now_s
        self._window.arrivals += 1

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        if sequence.first_token_s == now_s:
            self._window.first_token(now_s - sequence.request.arrival_s)
        self._decoding[sequence.arrival_index] = (now_s, sequence.output_len, sequence)

    def left(self, sequence: SequenceView, now_s: float) -> None:
        entry = self._decoding.pop(sequence.arrival_index, None)
        if entry is not None:
            self._window.tokens(now_s - entry[0], sequence.output_len - entry[1])

    def stepped(self, step: StepFacts, now_s: float) -> None:
        self._window.steps += step.steps
        if step.prefills:
            self._window.prefill_s += step.seconds

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        return max(1, self._options.window_steps - self._window.steps)

    # ---- what it decides ------------------------------------------------------------------------------

    def _end_window(self, view: ReplicaView, now_s: float) -> None:
        window, self._window = self._window, _Window(now_s)
        for index, (since_s, output_len, sequence) in self._decoding.items():
            window.tokens(now_s - since_s, sequence.output_len - output_len)
            self._decoding[index] = (now_s, sequence.output_len, sequence)
        for waiting in islice(view.waiting, _WAITING_MAX):
            if waiting.first_token_s is None and now_s - waiting.request.arrival_s > self._ttft_s:
                window.ttfts.append(now_s - waiting.request.arrival_s)
        if window.began_s is not None and window.began_s < self._ready_s:
            return  # it has seen two pairs of shares
        ttft_s, tpot_s = (_quantile(each, self._options.percentile) for each in (window.ttfts, window.tpots))
        total = self._shares.prefill + self._shares.decode
        service_s = window.service_s(self._shares.prefill / total)
        needed = window.rate_rps(now_s) * service_s
        if ttft_s is not None:
            self._ttfts.append((self._shares.prefill / total, ttft_s))
        if tpot_s is not None:
            self._tpots.append((self._shares.decode / total, tpot_s))
        found = adjusted(
            self._shares,
            (ttft_s or 0.0) > self._ttft_s,
            (tpot_s or 0.0) > self._tpot_s,
            lambda share: self._ttft_fit(needed, service_s).seconds(share) <= self._ttft_s,
            lambda share: self._tpot_fit().seconds(share) <= self._tpot_s,
            self._options,
        )
        if found != self._shares:
            self._shares, self._ready_s = found, now_s + self._options.switch_s

    def _ttft_fit(self, needed: float, service_s: float) -> QueueFit:
        return fit_queue(self._ttfts, needed, service_s)

    def _tpot_fit(self) -> SpeedFit:
        return fit_speed(self._tpots)


class _Window:
    """What was seen since `began_s`, the first since somebody came. Samples beyond the bound are left out."""

    def __init__(self, began_s: float | None) -> None:
        self.began_s = began_s
        self.steps = 0
        self.arrivals = 0
        self.prompts = 0
        self.prefill_s = 0.0
        self.ttfts: list[float] = []
        self.tpots: list[float] = []

    def first_token(self, ttft_s: float) -> None:
        self.prompts += 1
        if len(self.ttfts) < _SAMPLES_MAX:
            self.ttfts.append(ttft_s)

    def tokens(self, seconds: float, count: int) -> None:
        if count > 0 and len(self.tpots) < _SAMPLES_MAX:
            self.tpots.append(seconds / count)

    def rate_rps(self, now_s: float) -> float:
        if self.began_s is None or now_s <= self.began_s:
            return 0.0
        return self.arrivals / (now_s - self.began_s)

    def service_s(self, share: float) -> float:
        """Prefill seconds of a request on the whole device: its speed is taken to be its share."""
        return self.prefill_s * share / self.prompts if self.prompts else 0.0


def adjusted(
    shares: Shares,
    ttft_misses: bool,
    tpot_misses: bool,
    ttft_holds_at: Callable[[float], bool],
    tpot_holds_at: Callable[[float], bool],
    options: SemiPdOptions,
) -> Shares:
    """Algorithm 1. The predicates take the lane's part of what both ask for. Pure."""
    if ttft_misses == tpot_misses:
        return shares
    x, y = shares.prefill, shares.decode
    for _ in range(options.steps_max):
        if ttft_misses:
            x, y = _more(x, y, options.step_frac)
        else:
            y, x = _more(y, x, options.step_frac)
        if ttft_holds_at(x / (x + y)) if ttft_misses else tpot_holds_at(y / (x + y)):
            break
    return Shares(x, y)


def _more(share: float, other: float, step: float) -> tuple[float, float]:
    """`share` grows; where it would pass the whole device, `other` shrinks."""
    if share + step <= 1.0 + 1e-9:
        return min(1.0, round(share + step, 6)), other
    return share, max(FLOOR, round(other - step, 6))


def _target_s(option_ms: float, slos_ms: list[float | None], default_ms: float) -> float:
    known = [target for target in slos_ms if target is not None]
    return (option_ms or min(known, default=default_ms)) / 1e3


def _quantile(samples: list[float], frac: float) -> float | None:
    """The smallest sample that so much of them does not exceed; None without samples."""
    if not samples:
        return None
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(frac * len(ordered) - 1e-9) - 1)]
