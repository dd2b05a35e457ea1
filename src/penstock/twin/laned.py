"""One replica of the twin whose prefill and decode run beside each other, on shares of the device."""

from __future__ import annotations

from dataclasses import replace

from penstock.core.errors import ConfigError
from penstock.core.events import Finished
from penstock.core.settings import Settings
from penstock.core.step import StepResult
from penstock.policies.lanes import Lane
from penstock.policies.stack import lanes_split, make_stack, terms_of
from penstock.replica.laned import LanedReplica
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.nano import overlapped
from penstock.twin.costs.phase_sweep import sweep
from penstock.twin.laned_executor import LanedExecutor
from penstock.twin.replica import OnOutcome, PathCosts, TwinReplica
from penstock.twin.sampling import POINTS_MAX

_NEVER = float("inf")


def make_twin(
    settings: Settings,
    limits: ReplicaLimits,
    cost: CostModel,
    path: PathCosts,
    on_outcome: OnOutcome,
    points_max: int = POINTS_MAX,
) -> TwinReplica:
    """The twin of a replica on these settings, with lanes where its stack has them. Raises ConfigError."""
    cost = overlapped(cost, settings.twin.overlap)
    if not lanes_split(settings.policies):
        return TwinReplica(settings, limits, cost, path, on_outcome, points_max)
    if limits.host_kv_blocks:
        raise ConfigError(
            f"`lanes = {settings.policies.lanes}` does not go with KV in host memory: no lane waits for it.",
            hint="Leave out `replica.host_kv_memory`, or choose `lanes = none`.",
            param="policies.lanes",
        )
    if settings.twin.overlap != "none":
        raise ConfigError(
            f"`twin.overlap = {settings.twin.overlap}` does not go with `lanes = {settings.policies.lanes}`: "
            "both share one device out.",
            hint="Leave one of them at `none`.",
            param="twin.overlap",
        )
    return LanedTwin(settings, limits, cost, path, on_outcome, points_max)


class LanedTwin(TwinReplica):
    """As `TwinReplica`; but steps of two lanes end one by one, and the clock stops between them.

    After each call every lane that could begin a step has begun it.
    """

    def __init__(
        self,
        settings: Settings,
        limits: ReplicaLimits,
        cost: CostModel,
        path: PathCosts,
        on_outcome: OnOutcome,
        points_max: int = POINTS_MAX,
    ) -> None:
        super().__init__(settings, limits, cost, path, on_outcome, points_max)
        terms = replace(terms_of(settings), phase_profile=sweep(cost))
        self.replica = self._laned = LanedReplica(limits, make_stack(settings.policies, terms))
        self.executor = self._device = LanedExecutor(cost, self.output_lens)

    @property
    def next_s(self) -> float:
        due_s = max(self.now_s, self._inbox[0][0]) if self._inbox else _NEVER
        return min(due_s, self._device.next_end_s)

    def proceed(self, until_s: float) -> None:
        """To the next end of a step, to what is on its way here, or to `until_s`: what comes first.

        Decode steps of a plan that stands are made in one leap, up to there.
        """
        device = self._device
        self._begin_steps()
        due_s = min(until_s, self._inbox[0][0]) if self._inbox else until_s
        if not self._leap(due_s):
            next_s = min(due_s, device.next_end_s)
            assert next_s < _NEVER, "somebody can always go on"
            if next_s > device.now_s and not self.replica.has_work:
                self._sample()  # else the last sample would show work for as long as it is idle
            device.move_to(next_s)
            for lane in Lane:
                if device.end_s(lane) <= next_s:
                    self._complete(lane, device.end(lane))
        self._begin_steps()
        if device.now_s >= self.sampler.due_s:
            self._sample()

    def _begin_steps(self) -> None:
        """Take in what has come, and let every idle lane begin what it can."""
        device, laned, inbox = self._device, self._laned, self._inbox
        while inbox and inbox[0][0] <= device.now_s:
            laned.submit(inbox.popleft()[1], device.now_s)
        for lane in laned.plan_order:
            if lane not in laned.in_progress:
                step = laned.plan_lane(lane, device.now_s)
                if step is not None:
                    device.begin(step)

    def _leap(self, due_s: float) -> bool:
        """Whether whole steps of a decode plan that stands fit before anything else happens."""
        device, laned = self._device, self._laned
        step = laned.in_progress.get(Lane.DECODE)
        if step is None or step.plan.repeat == 1 or not device.has_just_begun(Lane.DECODE):
            return False
        result = device.leap(min(due_s, laned.switch_due_s))
        if result is None:
            return False
        self._complete(Lane.DECODE, result)
        return True

    def _complete(self, lane: Lane, result: StepResult) -> None:
        step = self._laned.in_progress[lane]
        for event in self._laned.complete_lane(step, result, self._device.now_s):
            if type(event) is Finished:
                self._finished(event)
