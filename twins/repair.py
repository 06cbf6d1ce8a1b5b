"""Counts the work that repair crews still have before them, the same in every domain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from federation.errors import Reason, TwinError
from federation.twin import HOUR_NS, Vector

NEVER_NS = np.iinfo(np.int64).max
MOST_CREWS = 3
"""Crews that can work at one component at once: the range of `assign_crew`."""


def not_believed(member: str, name: str) -> TwinError:
    """The error of a belief about an output that can't be had by belief."""
    return TwinError(
        Reason.UNKNOWN_VARIABLE,
        f"{member} takes no belief about {name!r}; it has only beliefs about work that remains",
        {"member": member, "variable": name},
    )


class Repairs:
    """The repair work at the components of one kind, and the crews sent to them.

    Work is counted in crew-hours. A crew is under way until its arrival, then takes one
    crew-hour off its component per hour; n crews take n. When nothing remains the
    component is whole again and its crews are free. Instants are nanoseconds from the
    start of the run and exact within a step. Plain data: it copies.

    A twin calls, in this order in each step: `progress` over the span, `damage` with the
    cumulative work that it is told, `assign` for each action.
    """

    def __init__(self, size: int) -> None:
        self.caused_h: Vector = np.zeros(size)
        self.remaining_h: Vector = np.zeros(size)
        self.arrival_ns: NDArray[np.int64] = np.full((size, MOST_CREWS), NEVER_NS, np.int64)

    @property
    def crews(self) -> NDArray[np.int64]:
        """Crews on the way to or at work on each component."""
        crews: NDArray[np.int64] = (self.arrival_ns != NEVER_NS).sum(axis=1)
        return crews

    @property
    def intact(self) -> Vector:
        """1 where no work remains, else 0."""
        return np.asarray(self.remaining_h <= 0.0, dtype=np.float64)

    def damage(self, work_h: Vector) -> NDArray[np.int64]:
        """Take note of the work caused since the run began; the components newly hit.

        `work_h` is cumulative: what exceeds the last call is added to what remains.
        """
        hit = np.flatnonzero(work_h > self.caused_h)
        if hit.size:
            self.remaining_h[hit] += work_h[hit] - self.caused_h[hit]
            self.caused_h[hit] = work_h[hit]
        return hit

    def believe(self, work_h: Vector) -> None:
        """Take another figure for the work that remains where some remains."""
        left = (self.remaining_h > 0.0) & (work_h > 0.0)
        self.remaining_h = np.where(left, work_h, self.remaining_h)

    def assign(self, index: int, crews: int, now_ns: int, travel_h: float) -> int:
        """Have `crews` at a component from now on; how many more (or fewer) that is.

        New crews arrive `travel_h` from now; those that arrived last are recalled first.
        A component without work takes no crew.
        """
        arrivals = self.arrival_ns[index]
        before = int(np.count_nonzero(arrivals != NEVER_NS))
        wanted = min(max(crews, 0), MOST_CREWS) if self.remaining_h[index] > 0.0 else 0
        if wanted > before:
            arrivals[before:wanted] = now_ns + round(travel_h * HOUR_NS)
        else:
            arrivals[wanted:] = NEVER_NS
        arrivals.sort()
        return wanted - before

    def progress(self, from_ns: int, to_ns: int) -> list[tuple[int, int]]:
        """Let the crews work from one instant to another.

        Returns (component, instant of completion) in the order of completion, then of
        the components.
        """
        completed: list[tuple[int, int]] = []
        for index in np.flatnonzero(self.arrival_ns[:, 0] < to_ns):
            work_h = float(self.remaining_h[index])
            arrivals = [max(int(a), from_ns) for a in self.arrival_ns[index] if a < to_ns]
            for crews, start_ns in enumerate(arrivals, start=1):
                end_ns = arrivals[crews] if crews < len(arrivals) else to_ns
                finish_ns = start_ns + int(np.ceil(work_h * HOUR_NS / crews))
                if finish_ns <= end_ns:
                    completed.append((int(index), finish_ns))
                    work_h = 0.0
                    self.arrival_ns[index] = NEVER_NS
                    break
                work_h -= crews * (end_ns - start_ns) / HOUR_NS
            self.remaining_h[index] = max(work_h, 0.0)
        completed.sort(key=lambda done: (done[1], done[0]))
        return completed
