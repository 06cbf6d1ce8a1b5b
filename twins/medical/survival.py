r"""Says until when care can still save a casualty, from the survival table of Sacco et al. (2005).

Sacco's table rather than the logistic curves of Mills, Argon and Ziya (2013): its survival
probabilities rest on 76,459 patients, its figures could be checked in two independent
transcriptions, and it knows start scores, so one model serves both severities. The figures
at hand for the other curves are from memory only.

A patient has an RPM score (0 to 12). It falls while care is awaited; `DETERIORATION[s][k]` is
the score after k intervals without care, `SURVIVAL[r]` the chance to survive if care begins at
score r. With p(t) the chance interpolated linearly between intervals, a patient with luck
u, uniform on (0, 1), is saved by care that begins before

.. math:: \tau = \inf\{t : p(t) \le u\}

and by none later. So P(saved | care at t) = p(t), and earlier care never loses a life that
later care would have saved: measures can be compared patient by patient. After the last
interval of the table (6 h) the score stays: the table is silent there.

Severity 3 begins uniformly between scores 5 and 9: with prompt care 28 per cent of them die,
between the 26 per cent of patients in shock (Newgard et al. 2015) and the 33 per cent of
unstable trauma patients (Okada et al. 2020). Severity 2 is "not life-threatening" in Hazus: score
12, the best that the table knows; even so one in seven has lost it after six hours, so the
deaths among severity 2 are the least certain figure of this model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from federation.twin import Vector

SURVIVAL: Vector = np.array(
    [0.052, 0.089, 0.15, 0.23, 0.35, 0.49, 0.63, 0.75, 0.84, 0.90, 0.94, 0.97, 0.98]
)
"""Chance of survival by RPM score at the beginning of care (Sacco et al. 2005)."""

DETERIORATION: NDArray[np.int64] = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [5, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [6, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0],
        [8, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0],
        [9, 9, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0],
        [10, 10, 9, 9, 8, 8, 7, 6, 6, 5, 5, 4, 4],
        [11, 11, 11, 10, 10, 9, 8, 8, 7, 7, 6, 6, 5],
        [12, 12, 12, 11, 11, 10, 10, 10, 10, 9, 9, 8, 8],
    ]
)
"""RPM score by start score (row) after 0 to 12 intervals without care (Sacco et al. 2005)."""

CHANCE: Vector = SURVIVAL[DETERIORATION]


def chance(score: int, waited_min: float, interval_min: float) -> float:
    """The chance to survive if care begins after a wait, by the score at injury."""
    intervals = np.arange(CHANCE.shape[1]) * interval_min
    return float(np.interp(waited_min, intervals, CHANCE[score]))


def rescue_limit_min(scores: NDArray[np.int64], luck: Vector, interval_min: float) -> Vector:
    """Minutes from injury after which care comes too late; 0 if none helps, inf if any does."""
    curves = CHANCE[scores]
    lost = curves <= luck[:, None]
    first = lost.argmax(axis=1)
    rows = np.arange(scores.size)
    before = curves[rows, np.maximum(first - 1, 0)]
    fall = np.maximum(before - curves[rows, first], 1e-12)
    limit = np.where(first > 0, (first - 1 + (before - luck) / fall) * interval_min, 0.0)
    return np.where(lost.any(axis=1), limit, np.inf)


def arrest_chance(cpr_min: float, shock_min: float, advanced_min: float) -> float:
    """The chance to survive a witnessed arrest in ventricular fibrillation.

    Times from the collapse to resuscitation, first shock and advanced care; Larsen,
    Eisenberg, Cummins, Hallstrom, Annals of Emergency Medicine 1993.
    """
    return max(0.0, 0.67 - 0.023 * cpr_min - 0.011 * shock_min - 0.021 * advanced_min)
