"""Hands out the beds of one unit, first come first served."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class BedPool:
    """The beds of one unit of one hospital and those who wait for one.

    `occupied` may exceed `capacity` after a loss of beds; nobody is admitted until it is
    below again. A patient who waits may die or leave without notice: `next_waiting` skips
    whoever no longer waits, so an entry is removed only when its turn comes.
    """

    __slots__ = ("capacity", "occupied", "waiting")

    def __init__(self, capacity: int, occupied: int = 0) -> None:
        self.capacity = capacity
        self.occupied = occupied
        self.waiting: list[tuple[float, int]] = []

    @property
    def free(self) -> int:
        """Beds that can be taken; negative if there are more patients than beds."""
        return self.capacity - self.occupied

    def take(self) -> bool:
        """Occupy a bed if one is free."""
        if self.occupied >= self.capacity:
            return False
        self.occupied += 1
        return True

    def wait(self, since_min: float, patient: int) -> None:
        heapq.heappush(self.waiting, (since_min, patient))

    def leave(self) -> None:
        self.occupied -= 1

    def next_waiting(self, still_waits: Callable[[int], bool]) -> int | None:
        """Give a free bed to the patient who has waited longest; None if no bed or no one."""
        while self.waiting and self.occupied < self.capacity:
            _, patient = heapq.heappop(self.waiting)
            if still_waits(patient):
                self.occupied += 1
                return patient
        return None
