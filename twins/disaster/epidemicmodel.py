"""Runs an epidemic through a mixed population, by the equations that everything else rests on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from federation.twin import Vector

STEP_D = 0.05
"""A step of the fourth-order Runge-Kutta method: halving it moves the peak by under 1e-6."""
SPENT = 1e-7
"""Share infected (and exposed) at which an epidemic is over."""
LONGEST_D = 1500.0


@dataclass(frozen=True, slots=True)
class Course:
    """Shares of the population over the days since the first were infectious."""

    day: Vector
    susceptible: Vector
    exposed: Vector
    infectious: Vector
    onset_per_day: Vector
    """Share of the population that becomes infectious per day."""

    @property
    def peak_day(self) -> float:
        """When most become infectious."""
        return float(self.day[int(self.onset_per_day.argmax())])

    @property
    def final_share(self) -> float:
        """Who has been infected in the end."""
        return float(1.0 - self.susceptible[-1])


@lru_cache(maxsize=64)
def course(r0: float, latent_d: float, infectious_d: float, seeds: float) -> Course:
    r"""An epidemic from a share `seeds` who are infectious on day 0.

    Kermack and McKendrick's equations, with those infected but not yet infectious (SEIR):

    .. math::
        \dot S = -\beta S I \quad \dot E = \beta S I - E / \tau_E \quad
        \dot I = E / \tau_E - I / \tau_I \qquad \beta = R_0 / \tau_I

    With `latent_d` 0 those infected are infectious at once (SIR).
    """
    beta, recovery = r0 / infectious_d, 1.0 / infectious_d
    ripening = 1.0 / latent_d if latent_d > 0.0 else 0.0

    def slope(s: float, e: float, i: float) -> tuple[float, float, float, float]:
        infected = beta * s * i
        onset = ripening * e if ripening else infected
        return -infected, (infected - onset if ripening else 0.0), onset - recovery * i, onset

    s, e, i, day = 1.0 - seeds, 0.0, seeds, 0.0
    rows = []
    while True:
        k1 = slope(s, e, i)
        rows.append((day, s, e, i, k1[3]))
        if (e + i < SPENT and k1[2] < 0.0) or day >= LONGEST_D:
            break
        h = STEP_D / 2.0
        k2 = slope(s + h * k1[0], e + h * k1[1], i + h * k1[2])
        k3 = slope(s + h * k2[0], e + h * k2[1], i + h * k2[2])
        h = STEP_D
        k4 = slope(s + h * k3[0], e + h * k3[1], i + h * k3[2])
        h = STEP_D / 6.0
        s += h * (k1[0] + 2.0 * (k2[0] + k3[0]) + k4[0])
        e += h * (k1[1] + 2.0 * (k2[1] + k3[1]) + k4[1])
        i += h * (k1[2] + 2.0 * (k2[2] + k3[2]) + k4[2])
        day += STEP_D
    return Course(*np.array(rows).T)


@dataclass(frozen=True, slots=True)
class Need:
    """What an epidemic asks of hospitals, per person, over the hours of a run."""

    hour: Vector
    admissions: Vector
    """Persons that have come to need a bed since the start of the run; falls never, may be < 0
    before it."""
    present_ward: float
    """Persons on wards when the run begins."""
    present_icu: float

    def admitted(self, hour: float) -> float:
        """Persons that have come to need a bed since the start, between two hours on a line."""
        return float(np.interp(hour, self.hour, self.admissions))


@lru_cache(maxsize=64)
def need(
    epidemic: tuple[float, float, float, float],
    days_to_peak: float,
    admitted_share: float,
    icu_share: float,
    delay_d: float,
    ward_stay_d: float,
    icu_stay_d: float,
) -> Need:
    r"""The need when a run begins so many days before the peak of `course(*epidemic)`.

    A share `admitted_share` of those infected needs a bed `delay_d` after they become infectious,
    and of these `icu_share` one in intensive care. With a(t) who come per day and exponential
    stays of mean L, those there when the run begins are

    .. math:: \int_0^\infty a(-u) \, e^{-u / L} \, du
    """
    whole = course(*epidemic)
    day = whole.day - whole.peak_day + days_to_peak + delay_d
    per_day = admitted_share * whole.onset_per_day
    so_far = np.concatenate([[0.0], np.cumsum((per_day[1:] + per_day[:-1]) / 2.0) * STEP_D])
    so_far -= np.interp(0.0, day, so_far)
    past = day <= 0.0
    ward, icu = (
        float((per_day * np.exp(np.minimum(day, 0.0) / stay_d))[past].sum()) * STEP_D
        for stay_d in (ward_stay_d, icu_stay_d)
    )
    return Need(day * 24.0, so_far, (1.0 - icu_share) * ward, icu_share * icu)
