"""Turns the motion of the ground into states of damage, and those into work for crews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, pdtr

from federation.twin import Vector

Matrix = NDArray[np.float64]

STATES = 4
"""1 slight, 2 moderate, 3 extensive, 4 complete; 0 is none."""

OUT_OF_SERVICE = 2
"""The least state in which a component does not work until a crew has repaired it."""

LEAST_BETA = 0.2
"""Deviation of ln capacity among buildings of one type, at the least (assumption)."""

MOST_BREAKS = 60
"""Counts of leaks and of breaks of one main end here."""


@dataclass(frozen=True, slots=True)
class Fragility:
    r"""Lognormal fragility curves of things: things x states 1..4, infinite if never reached.

    .. math::
        P(state \ge k) = \Phi(\ln(intensity / median_k) / \beta_k)

    and, where curves of unlike slope cross, at least the chance of any worse state.
    """

    log_median: Matrix
    beta: Matrix

    def reached(self, intensity: Vector) -> Matrix:
        """The chances of at least state 1, 2, 3, 4; things x 4."""
        with np.errstate(divide="ignore"):
            normal = (np.log(intensity)[..., None] - self.log_median) / self.beta
        chances = ndtr(normal)
        return np.asarray(np.maximum.accumulate(chances[..., ::-1], axis=-1)[..., ::-1])

    def without(self, scatter: float) -> Fragility:
        """The curves for a known shaking, when theirs includes a scatter of shaking.

        So that curve and residuals together scatter as Hazus says. What is left is at
        least `LEAST_BETA`, because no two buildings are the same.
        """
        rest = np.sqrt(np.maximum(self.beta**2 - scatter**2, LEAST_BETA**2))
        return Fragility(self.log_median, rest)


def states(reached: Matrix, uniform: Vector) -> NDArray[np.int64]:
    """One state per thing: the worst whose chance exceeds the thing's uniform number."""
    return np.asarray((uniform[..., None] < reached).sum(axis=-1), dtype=np.int64)


def curves(rows: Sequence[Mapping[str, str]], classes: Sequence[str], level: str) -> Fragility:
    """The curves of things by their class, at one level of design."""
    shape = (len(classes), STATES)
    log_median = np.full(shape, np.inf)
    beta = np.ones(shape)
    for row in rows:
        if row["design_level"] == level:
            of = np.array([c == row["fragility_class"] for c in classes], dtype=bool)
            state = int(row["state"]) - 1
            log_median[of, state] = np.log(float(row["median"]))
            beta[of, state] = float(row["beta"])
    return Fragility(log_median, beta)


@dataclass(frozen=True, slots=True)
class RepairTimes:
    """Mean and deviation of the days that one gang needs; things x states 0..4."""

    mean_days: Matrix
    sd_days: Matrix

    def days(self, state: NDArray[np.int64], uniform: Vector) -> Vector:
        """A normal number cut off at 0, at the quantile `uniform`.

        0 for a component in service (state 0 or 1): it waits for no crew.
        """
        index = np.arange(len(state))
        mean, sd = self.mean_days[index, state], self.sd_days[index, state]
        fixed = sd <= 1e-6 * mean
        spread = np.where(fixed, 1.0, sd)
        below_zero = ndtr(-mean / spread)
        days = mean + spread * ndtri(below_zero + uniform * (1.0 - below_zero))
        days = np.where(fixed, mean, np.maximum(days, 0.0))
        return np.asarray(np.where(state >= OUT_OF_SERVICE, days, 0.0))


def repair_times(
    rows: Sequence[Mapping[str, str]], classes: Sequence[str], level: str
) -> RepairTimes:
    """Of things by class; a state that a class does not list takes as long as the one below."""
    mean = np.zeros((len(classes), STATES + 1))
    sd = np.zeros_like(mean)
    ordered = sorted(rows, key=lambda row: int(row["state"]))
    for row in ordered:
        if row["design_level"] == level:
            of = np.array([c == row["fragility_class"] for c in classes], dtype=bool)
            mean[of, int(row["state"]) :] = float(row["repair_days_mean"])
            sd[of, int(row["state"]) :] = float(row["repair_days_sd"])
    return RepairTimes(mean, sd)


@dataclass(frozen=True, slots=True)
class PipeLaw:
    r"""Repairs per km of main after Hazus.

    .. math::
        R_{shaking} = K r_v PGV^{e_v}, \qquad R_{spreading} = K r_d P_{liq} PGD^{e_d}

    with PGV in cm/s, PGD in inches and K 1 for brittle pipe. Of the first,
    `leak_share_pgv` are leaks, of the second `leak_share_pgd`; the rest are breaks.
    """

    brittleness: float
    rate_pgv: float
    exponent_pgv: float
    rate_pgd: float
    exponent_pgd: float
    leak_share_pgv: float
    leak_share_pgd: float

    def leaks_and_breaks_per_km(
        self, pgv_cm_s: Vector, pgd_in: Vector, liquefied: Vector
    ) -> tuple[Vector, Vector]:
        shaking = self.brittleness * self.rate_pgv * pgv_cm_s**self.exponent_pgv
        spreading = self.brittleness * self.rate_pgd * liquefied * pgd_in**self.exponent_pgd
        leaks = self.leak_share_pgv * shaking + self.leak_share_pgd * spreading
        return leaks, shaking + spreading - leaks


def poisson_counts(mean: Vector, uniform: Vector) -> NDArray[np.int64]:
    """Poisson numbers by inversion, up to `MOST_BREAKS`: the more uniform, the more."""
    distribution = pdtr(np.arange(MOST_BREAKS)[:, None], mean[None, :])
    return np.asarray((uniform[None, :] >= distribution).sum(axis=0), dtype=np.int64)


def main_states(leaks: NDArray[np.int64], breaks: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 leaks only (in service), 2 one break, 3 two, 4 three or more."""
    return np.where(breaks > 0, np.minimum(1 + breaks, STATES), np.minimum(leaks, 1))
