"""Keeps what a decision maker believes of the work that damage takes, apart from the truth.

Which components are damaged is reported; how many crew-hours each takes is estimated, until it is
inspected. The estimate is off by a factor that stays the same, whoever decides and however often
it is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.twin import HOUR_NS, Vector

BELIEF_STREAM, IMAGINED_STREAM = 21, 22
NEVER_NS = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Assessment:
    """How far off estimates are: ln of belief over truth is normal with deviation `sigma`.

    Damage is inspected a uniform time between `soonest_h` and `latest_h` after its report, or as
    soon as work there is seen to have begun.
    """

    sigma: float
    soonest_h: float
    latest_h: float


class Belief:
    """What is believed of the crew-hours left at the components of some families.

    What one component is believed to take depends on the seed, its place and how often it has
    been damaged, and on nothing else.
    """

    def __init__(self, assessment: Assessment | None, sizes: Sequence[int], seed: int) -> None:
        self.assessment = assessment
        self._seed = seed
        self._left: list[Vector] = [np.zeros(size) for size in sizes]
        self._damaged = [np.zeros(size, dtype=np.int64) for size in sizes]
        self._due_ns = [np.full(size, NEVER_NS, dtype=np.int64) for size in sizes]
        self._known = [np.ones(size, dtype=bool) for size in sizes]
        self._factor: list[Vector] = [np.ones(size) for size in sizes]
        self.hours: list[Vector] = [np.zeros(size) for size in sizes]
        self.corrected_h = 0.0
        """By how many crew-hours inspections have corrected estimates so far, up or down."""

    def look(self, time_ns: int, remaining: Sequence[Vector]) -> None:
        """Take note of reports at an instant, in which `remaining` is what is really left."""
        for family, left in enumerate(remaining):
            if self.assessment is not None:
                self._assess(time_ns, family, left, self.assessment)
            factor = np.where(self._known[family], 1.0, self._factor[family])
            self.hours[family] = left * factor
            self._left[family] = left

    def _assess(self, time_ns: int, family: int, left: Vector, given: Assessment) -> None:
        before = self._left[family]
        known, factor = self._known[family].copy(), self._factor[family].copy()
        known |= (left < before) | (time_ns >= self._due_ns[family])
        inspected = known & ~self._known[family]
        self.corrected_h += float(np.abs((factor - 1.0) * left)[inspected].sum())
        for i in np.flatnonzero(left > before).tolist():
            self._damaged[family][i] += 1
            draws = np.random.default_rng(
                [self._seed, BELIEF_STREAM, family, i, int(self._damaged[family][i])]
            )
            factor[i] = np.exp(given.sigma * draws.standard_normal())
            wait_h = given.soonest_h + (given.latest_h - given.soonest_h) * draws.random()
            self._due_ns[family][i] = time_ns + round(wait_h * HOUR_NS)
            known[i] = False
        self._known[family], self._factor[family] = known, factor

    def uncertain(self, family: int) -> NDArray[np.bool_]:
        """Where there is work of which only an estimate is known."""
        return np.asarray(~self._known[family] & (self._left[family] > 0.0))

    def imagined(self, seed: int) -> list[Vector]:
        """Hours that may be the true ones, given what is believed: one draw."""
        draws = np.random.default_rng([seed, IMAGINED_STREAM])
        sigma = self.assessment.sigma if self.assessment is not None else 0.0
        found = []
        for family, hours in enumerate(self.hours):
            error = np.exp(sigma * draws.standard_normal(len(hours)))
            found.append(np.where(self.uncertain(family), hours * error, hours))
        return found
