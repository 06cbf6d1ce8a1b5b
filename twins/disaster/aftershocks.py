"""Samples the aftershocks that follow a mainshock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from federation.twin import Vector

LARGEST_BELOW_MAINSHOCK = 0.5
"""The greatest aftershock that is sampled, in magnitudes below the mainshock.

About what the strongest of the first day after the New Madrid mainshock of December 1811
had (from memory, unverified); a greater one would be another mainshock.
"""


@dataclass(frozen=True, slots=True)
class AftershockLaw:
    r"""The rate of aftershocks after Reasenberg and Jones (Science 243 (1989) 1173).

    Aftershocks of magnitude M or more per day, t days after a mainshock of magnitude M_m:

    .. math::
        \lambda(t, M) = 10^{a + b (M_m - M)} (t + c)^{-p}

    from `least` up to `LARGEST_BELOW_MAINSHOCK` under the mainshock.
    """

    a: float
    b: float
    c_days: float
    p: float
    least: float

    def decay(self, days: float) -> float:
        r"""The integral of :math:`(t + c)^{-p}` from 0 to `days`."""
        if self.p == 1.0:
            return float(np.log1p(days / self.c_days))
        q = 1.0 - self.p
        return float(((days + self.c_days) ** q - self.c_days**q) / q)

    def expected(self, mainshock: float, days: float) -> float:
        """The mean number of aftershocks."""
        most = mainshock - LARGEST_BELOW_MAINSHOCK
        if most <= self.least:
            return 0.0
        per_decay = 10 ** (self.b * (mainshock - self.least)) - 10 ** (self.b * (mainshock - most))
        return float(10**self.a * per_decay * self.decay(days))

    def sample(
        self, draws: np.random.Generator, mainshock: float, days: float
    ) -> tuple[Vector, Vector]:
        """Days after the mainshock, ascending, and magnitudes of one sequence.

        A Poisson number, each with a time by inversion of the decay and a magnitude by
        inversion of the exponential law between its bounds.
        """
        count = int(draws.poisson(self.expected(mainshock, days)))
        when, size = draws.random((2, count))
        if self.p == 1.0:
            times = self.c_days * np.expm1(when * np.log1p(days / self.c_days))
        else:
            q = 1.0 - self.p
            start = self.c_days**q
            times = (start + when * ((days + self.c_days) ** q - start)) ** (1 / q) - self.c_days
        rarest = 10 ** (-self.b * (mainshock - LARGEST_BELOW_MAINSHOCK - self.least))
        magnitudes = self.least - np.log10(1.0 - size * (1.0 - rarest)) / self.b
        order = np.argsort(times, kind="stable")
        return times[order], magnitudes[order]
