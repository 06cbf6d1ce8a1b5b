"""Lets people fall ill one by one when so many are expected to, the same people in every run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from federation.twin import Vector

AT_ONCE = 32
"""How many thresholds are drawn at a time for each place."""


@dataclass(slots=True)
class Cases:
    """Counts of an inhomogeneous Poisson process at each of some places; plain data.

    A case comes whenever the expected number so far passes a threshold. Thresholds have
    exponential gaps and depend on the seed only, so that two runs with one seed differ only in
    the cases that their difference of expectation brings.
    """

    seed: int
    stream: int
    before: Vector
    """Cases of before `since`."""
    since: Vector
    """The expectation from which thresholds are drawn."""
    thresholds: Vector
    """Expectations at which the next cases come; places x so many."""
    drawn: int = 0

    @classmethod
    def none(cls, seed: int, stream: int, places: int) -> Cases:
        return cls(seed, stream, np.zeros(places), np.zeros(places), np.zeros((places, 0)))

    def count(self, expected: Vector) -> Vector:
        """Cases so far when so many were expected so far; `expected` never falls."""
        while self.thresholds.shape[1] == 0 or (self.thresholds[:, -1] <= expected).any():
            draws = np.random.default_rng([self.seed, self.stream, self.drawn])
            gaps = draws.standard_exponential((len(expected), AT_ONCE))
            last = self.thresholds[:, -1] if self.drawn else self.since
            more = last[:, None] + np.cumsum(gaps, axis=1)
            self.thresholds = np.concatenate([self.thresholds, more], axis=1)
            self.drawn += 1
        new = (self.thresholds <= expected[:, None]).sum(axis=1)
        return np.asarray(self.before + new, dtype=np.float64)

    def diverge(self, seed: int, expected: Vector) -> None:
        """Draw the cases to come anew, from what has been expected so far on."""
        self.before = self.count(expected)
        self.since = expected.copy()
        self.thresholds = np.zeros((len(expected), 0))
        self.seed, self.drawn = seed, 0
