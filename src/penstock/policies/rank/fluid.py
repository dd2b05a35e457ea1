"""The ideal that `uwfq` follows: capacity shared by tenants, a tenant's share by its jobs, all at once.

Virtual time V is the work that a tenant of weight 1 has been served while it was active. Each job gets two
virtual instants. Its *own* finish is when it would end if the tenant's active jobs shared the tenant's
service equally, on the tenant's own clock. Its *finish* is when it would end, in V, if they ran one after
another in the order of those; that is what real work is ordered by.

Source: UWFQ (arXiv 2510.15485), UserClusterFairScheduler.java; weights, clocks by work served, and the
correction of estimates are ours.
"""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

IDLE_TENANTS_MAX: Final = 4096
_BY_OWN_FINISH: Final = attrgetter("own_finish", "number")


@dataclass(slots=True, eq=False)
class Job:
    """What is ordered. `size` is work; it flows until it has been served that much in the fluid, and is open
    until it has ended in reality."""

    tenant: str
    number: int
    size: float
    own_finish: float = 0.0
    finish: float = 0.0
    is_flowing: bool = True
    is_open: bool = True


@dataclass(slots=True, eq=False)
class _Tenant:
    """`start`: V at which its earliest flowing job begins; `end`: V at which its last one ends."""

    name: str
    weight: float
    start: float
    end: float
    served_to: float  # the V up to which its jobs were told of its service
    clock: float = 0.0  # work that each of its jobs would have been served
    jobs: list[Job] = field(default_factory=list)  # flowing, by own finish
    late: dict[int, Job] = field(default_factory=dict)  # open, and no longer flowing; by number
    is_active: bool = False


class Fluid:
    """The fluid system of all tenants. An arrival costs O(jobs of the tenant + active tenants)."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self.virtual = 0.0  # V; never runs backwards
        self.version = 0  # moves when the finish of a known job has changed
        self._tenants: dict[str, _Tenant] = {}  # active: their end is ahead of V
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()  # longest idle first
        self._ends: list[tuple[float, int, _Tenant]] = []  # a heap; may hold old ends
        self._weights = 0.0  # of all active tenants
        self._entries = 0
        self._jobs = 0

    @property
    def active(self) -> list[str]:
        """Tenants that take a share now."""
        return list(self._tenants)

    def end_of(self, tenant: str) -> float:
        """V at which the tenant's work so far ends. 0 for a stranger."""
        found = self._tenants.get(tenant) or self._idle.get(tenant)
        return 0.0 if found is None else found.end

    def advance(self, work: float) -> None:
        """Serve `work`: each active tenant by its weight, until it has nothing left."""
        while work > 0.0 and (first := self._first_to_end()) is not None:
            needed = (first.end - self.virtual) * self._weights
            if needed > work:
                self.virtual += work / self._weights
                return
            work -= max(0.0, needed)
            self.virtual = max(self.virtual, first.end)
            self._retire(first)

    def drain(self) -> None:
        """The real system is empty, so the ideal one is as well."""
        while (first := self._first_to_end()) is not None:
            self.virtual = max(self.virtual, first.end)
            self._retire(first)

    def arrive(self, tenant: str, size: float, grace: float | None = None) -> Job:
        """A new job. With `grace` (in V) it continues an earlier one: a tenant that has not been idle for
        longer than that goes on where it stopped. Debts of earlier corrections stay."""
        owner = self._tenants.get(tenant) or self._wake(tenant, grace)
        self._progress(owner)
        job = Job(tenant, self._jobs, size, owner.clock + size)
        self._jobs += 1
        bisect.insort(owner.jobs, job, key=_BY_OWN_FINISH)
        self._chain(owner, job)
        return job

    def resize(self, job: Job, size: float) -> None:
        """The job turned out to be of another size. What flowed too much or too little is repaid by the
        tenant: by what comes after this job while it flows, else by all that the tenant has and will have."""
        owner = self._tenants.get(job.tenant) or self._idle.get(job.tenant)
        change, job.size = size - job.size, size
        if owner is None or change == 0.0:
            return
        if owner.is_active:
            self._progress(owner)
        if job.is_flowing:
            owner.jobs.remove(job)
            job.own_finish += change
            bisect.insort(owner.jobs, job, key=_BY_OWN_FINISH)
        else:
            owner.start += change / owner.weight
            owner.served_to += change / owner.weight
            for each in owner.late.values():
                if each is not job:
                    each.finish += change / owner.weight
            self.version += bool(owner.late)
        self._chain(owner)
        if not owner.is_active and owner.end > self.virtual:
            del self._idle[owner.name]
            self._activate(owner)

    def close(self, job: Job) -> None:
        """The job has ended in reality."""
        job.is_open = False
        owner = self._tenants.get(job.tenant) or self._idle.get(job.tenant)
        if owner is not None:
            owner.late.pop(job.number, None)

    def flows(self, job: Job) -> bool:
        """Whether the job is not done in the fluid."""
        owner = self._tenants.get(job.tenant)
        if owner is not None:
            self._progress(owner)
        return job.is_flowing

    # ---- one tenant -----------------------------------------------------------------------------------

    def _progress(self, tenant: _Tenant) -> None:
        """Share the tenant's service since the last look among its jobs; take out those that are done."""
        left = (self.virtual - tenant.served_to) * tenant.weight
        if left <= 0.0:
            return  # nothing new, or a debt that is still being repaid
        tenant.served_to = self.virtual
        jobs, done = tenant.jobs, 0
        while done < len(jobs):
            needed = (jobs[done].own_finish - tenant.clock) * (len(jobs) - done)
            if needed > left:
                tenant.clock += left / (len(jobs) - done)
                break
            left -= max(0.0, needed)
            tenant.clock = max(tenant.clock, jobs[done].own_finish)
            self._take_out(tenant, jobs[done])
            done += 1
        del jobs[:done]

    def _chain(self, tenant: _Tenant, fresh: Job | None = None) -> None:
        """Lay the tenant's jobs end to end from its start."""
        finish, has_moved = tenant.start, False
        for job in tenant.jobs:
            finish += job.size / tenant.weight
            if job.finish != finish:
                has_moved |= job is not fresh
                job.finish = finish
        self.version += has_moved
        tenant.end = finish
        if tenant.is_active:
            self._note_end(tenant)

    def _take_out(self, tenant: _Tenant, job: Job) -> None:
        tenant.start += job.size / tenant.weight
        self._stop_flowing(tenant, job)

    def _stop_flowing(self, tenant: _Tenant, job: Job) -> None:
        job.is_flowing = False
        if job.is_open:
            tenant.late[job.number] = job

    def _wake(self, name: str, grace: float | None) -> _Tenant:
        tenant = self._idle.pop(name, None)
        if tenant is None:
            now = self.virtual
            tenant = _Tenant(name, self._weight_of(name), now, now, now)
        goes_on = grace is not None and self.virtual - tenant.end <= grace
        if tenant.start < self.virtual and not goes_on:
            tenant.start = self.virtual
        tenant.served_to = tenant.start
        self._activate(tenant)
        return tenant

    # ---- who is active --------------------------------------------------------------------------------

    def _activate(self, tenant: _Tenant) -> None:
        tenant.is_active = True
        self._tenants[tenant.name] = tenant
        self._weights += tenant.weight
        self._note_end(tenant)

    def _retire(self, tenant: _Tenant) -> None:
        """V has reached its end: all its jobs are done."""
        for job in tenant.jobs:
            tenant.clock = max(tenant.clock, job.own_finish)
            self._stop_flowing(tenant, job)
        tenant.jobs.clear()
        tenant.start = tenant.served_to = tenant.end
        tenant.is_active = False
        del self._tenants[tenant.name]
        # Summed anew: subtracting would gather rounding errors
        self._weights = sum(each.weight for each in self._tenants.values())
        self._idle[tenant.name] = tenant
        while len(self._idle) > IDLE_TENANTS_MAX:
            self._idle.popitem(last=False)

    def _note_end(self, tenant: _Tenant) -> None:
        self._entries += 1
        heapq.heappush(self._ends, (tenant.end, self._entries, tenant))
        if len(self._ends) > 4 * len(self._tenants) + 64:  # old ends that lie far ahead
            self._ends = [(each.end, index, each) for index, each in enumerate(self._tenants.values())]
            heapq.heapify(self._ends)
            self._entries = len(self._ends)

    def _first_to_end(self) -> _Tenant | None:
        while self._ends:
            end, _, tenant = self._ends[0]
            if tenant.is_active and tenant.end == end:
                return tenant
            heapq.heappop(self._ends)
        return None
