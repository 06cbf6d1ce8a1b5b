"""Draws who falls ill or is hurt, such that no measure changes the fate dealt to anyone.

Everything random about a patient is dealt when the patient arises, from a generator keyed by
the seed and by what the patient is: the day for ordinary calls; zone, severity and running
number of the first of the batch for casualties. Two runs with one seed and different
measures meet the same people with the same luck, so their difference is the measure's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from math import inf

import numpy as np
from numpy.typing import NDArray

from federation.twin import Vector
from twins.medical.survival import rescue_limit_min

CALLS_STREAM = 0x4D01
CASUALTIES_STREAM = 0x4D02
HOSPITALS_STREAM = 0x4D03
DAY_MIN = 1440.0
CRITICAL = 3
"""Severity from which a patient needs an intensive-care or theatre place first."""


class State(IntEnum):
    """Where a patient is; `FUTURE` ones have not arisen yet."""

    FUTURE = 0
    HIDDEN = 1
    CALLING = 2
    ABOARD = 3
    DRIVEN = 4
    QUEUED = 5
    IN_ICU = 6
    IN_WARD = 7
    DISCHARGED = 8
    DEAD = 9


class Arrest(IntEnum):
    """Whether a call is a cardiac arrest and of which kind."""

    NONE = 0
    SHOCKABLE = 1
    OTHER = 2


@dataclass(frozen=True, slots=True)
class People:
    """What was dealt to patients of one draw, one entry each.

    `limit_min` counts from injury or call; `hopeless` ones die then whatever is done. The
    `_draw` fields are exponential with mean 1, to be scaled by the means of the moment.
    """

    zone: list[int]
    severity: list[int]
    found_min: list[float]
    limit_min: list[float]
    hopeless: list[bool]
    arrest: list[int]
    luck: list[float]
    private: list[bool]
    transported: list[bool]
    child: list[bool]
    first_stay_min: list[float]
    ward_stay_min: list[float]
    scene_draw: list[float]
    handover_draw: list[float]
    tolerance_draw: list[float]

    def __len__(self) -> int:
        return len(self.zone)


class Patients:
    """A table of all patients; each column is a plain list, indexed by patient."""

    def __init__(self) -> None:
        self.zone: list[int] = []
        self.severity: list[int] = []
        self.arrest: list[int] = []
        self.luck: list[float] = []
        self.hopeless: list[bool] = []
        self.private: list[bool] = []
        self.transported: list[bool] = []
        self.child: list[bool] = []
        self.first_stay_min: list[float] = []
        self.ward_stay_min: list[float] = []
        self.scene_draw: list[float] = []
        self.handover_draw: list[float] = []
        self.tolerance_draw: list[float] = []
        self.state: list[int] = []
        self.batch: list[int] = []
        """Which batch of casualties or sick a patient belongs to; -1 for ordinary patients."""
        self.sick: list[bool] = []
        """Whether an epidemic made the patient ill."""
        self.called_min: list[float] = []
        self.hospital: list[int] = []
        self.ambulance: list[int] = []
        self.reached: list[bool] = []
        self.treated: list[bool] = []
        self.treated_min: list[float] = []
        """When definitive care began; infinity before."""
        self.stepped_down: list[bool] = []
        self.transfer: list[bool] = []
        self.visit: list[int] = []

    def __len__(self) -> int:
        return len(self.state)

    def needs_icu(self, patient: int) -> bool:
        """Whether the bed that a patient needs now is one in intensive care."""
        return self.severity[patient] >= CRITICAL and not self.stepped_down[patient]

    def first_in(self, state: State, hospital: int) -> int:
        """The first entry with a patient in a state at a hospital, -1 if there is none."""
        return next(self._in(state, hospital, range(len(self))), -1)

    def last_in(self, state: State, hospital: int) -> int:
        """The last entry with a patient in a state at a hospital, -1 if there is none."""
        return next(self._in(state, hospital, reversed(range(len(self)))), -1)

    def _in(self, state: State, hospital: int, patients: Iterable[int]) -> Iterator[int]:
        return (i for i in patients if self.state[i] == state and self.hospital[i] == hospital)

    def add(self, people: People, batch: Sequence[int]) -> int:
        """Append those of a draw in state `FUTURE`; the index of the first."""
        first, size = len(self), len(people)
        for column in fields(people):
            if hasattr(self, column.name):
                getattr(self, column.name).extend(getattr(people, column.name))
        self.state.extend([State.FUTURE] * size)
        self.batch.extend(batch)
        self.called_min.extend([inf] * size)
        self.treated_min.extend([inf] * size)
        for missing in (self.hospital, self.ambulance):
            missing.extend([-1] * size)
        for no in (self.sick, self.reached, self.treated, self.stepped_down, self.transfer):
            no.extend([False] * size)
        self.visit.extend([0] * size)
        return first


def _stays(
    severity: NDArray[np.int64], admitted: NDArray[np.bool_], draws: Vector, p: Mapping[str, float]
) -> tuple[Vector, Vector]:
    """Minutes in the first bed and, after intensive care, on the ward."""
    critical = severity >= CRITICAL
    ward_h = np.where(admitted, p["ward_stay_h"], p["released_stay_h"])
    first_h = np.where(critical, p["critical_stay_h"], ward_h)
    return first_h * 60.0 * draws[:, 0], p["severity3_stay_h"] * 60.0 * draws[:, 1]


def _limits(
    scores: NDArray[np.int64], luck: Vector, fatal_draw: Vector, p: Mapping[str, float]
) -> tuple[Vector, NDArray[np.bool_]]:
    """Minutes until care comes too late, and who dies whatever is done."""
    limit = rescue_limit_min(scores, luck, p["deterioration_interval_min"])
    hopeless = limit <= 0.0
    return np.where(hopeless, p["fatal_mean_h"] * 60.0 * fatal_draw, limit), hopeless


def _severity3_scores(share: Vector, p: Mapping[str, float]) -> NDArray[np.int64]:
    low, high = round(p["start_score_severity3_low"]), round(p["start_score_severity3_high"])
    return np.minimum(low + (share * (high - low + 1)).astype(np.int64), high)


def draw_calls(
    seed: int, day: int, zone_people: Sequence[float], p: Mapping[str, float]
) -> tuple[list[float], People]:
    """The ordinary calls of one day: times in minutes from the start of the run, and callers.

    A Poisson stream over zones in proportion to their people, even over the day. Severity
    is 3 for critical calls and arrests, else 2; ordinary ones of severity 2 have no limit.
    """
    rng = np.random.default_rng([seed, CALLS_STREAM, day])
    size = int(rng.poisson(p["calls_per_day"]))
    times = np.sort(rng.random(size)) * DAY_MIN + day * DAY_MIN
    u = rng.random((size, 8))
    e = rng.standard_exponential((size, 6))
    cumulative = np.cumsum(np.asarray(zone_people))
    zone = np.searchsorted(cumulative, u[:, 0] * cumulative[-1], side="right")
    arrest = np.where(
        u[:, 1] >= p["arrest_share"],
        Arrest.NONE,
        np.where(u[:, 2] < p["shockable_share"], Arrest.SHOCKABLE, Arrest.OTHER),
    )
    critical = (arrest == Arrest.NONE) & (u[:, 1] >= 1.0 - p["critical_share"])
    severity = np.where(critical | (arrest != Arrest.NONE), CRITICAL, 2)
    limit, hopeless = _limits(_severity3_scores(u[:, 3], p), u[:, 4], e[:, 0], p)
    first, ward = _stays(severity, u[:, 5] < p["admitted_share"], e[:, 1:3], p)
    # critical patients and revived arrests always go to a hospital: the other calls make up for it
    sick = float(p["arrest_share"] + p["critical_share"])
    others = max(0.0, (p["transported_share"] - sick) / (1.0 - sick)) if sick < 1.0 else 1.0
    people = People(
        zone=zone.tolist(),
        severity=severity.tolist(),
        found_min=[0.0] * size,
        limit_min=np.where(critical, limit, np.inf).tolist(),
        hopeless=(critical & hopeless).tolist(),
        arrest=arrest.tolist(),
        luck=u[:, 4].tolist(),
        private=[False] * size,
        transported=((severity >= CRITICAL) | (u[:, 6] < others)).tolist(),
        child=(u[:, 7] < p["child_share"]).tolist(),
        first_stay_min=first.tolist(),
        ward_stay_min=ward.tolist(),
        scene_draw=e[:, 3].tolist(),
        handover_draw=e[:, 4].tolist(),
        tolerance_draw=e[:, 5].tolist(),
    )
    return times.tolist(), people


def draw_casualties(
    seed: int,
    severity: int,
    counts: Sequence[tuple[int, int]],
    ordinals: Sequence[int],
    p: Mapping[str, float],
) -> People:
    """Casualties of severity 2 or 3: `counts` are (zone, how many) of one instant.

    `ordinals` says how many of this severity each of these zones had before.
    """
    uniform, exponential = [], []
    for (zone, size), ordinal in zip(counts, ordinals, strict=True):
        rng = np.random.default_rng([seed, CASUALTIES_STREAM, zone, severity, ordinal])
        uniform.append(rng.random((size, 6)))
        exponential.append(rng.standard_exponential((size, 7)))
    u, e = np.concatenate(uniform), np.concatenate(exponential)
    size = len(u)
    severities = np.full(size, severity)
    trapped = u[:, 0] < p[f"trapped_share_severity{severity}"]
    found = np.where(trapped, p["extrication_mean_h"] * 60.0, p["found_delay_min"]) * e[:, 0]
    if severity >= CRITICAL:
        scores = _severity3_scores(u[:, 1], p)
    else:
        scores = np.where(u[:, 1] < p["start_score_12_severity2"], 12, 11)
    limit, hopeless = _limits(scores, u[:, 2], e[:, 1], p)
    admitted = u[:, 3] < p["severity2_admitted_share"]
    stay, ward = _stays(severities, np.zeros(size, dtype=np.bool_), e[:, 2:4], p)
    if severity < CRITICAL:
        stay = np.where(admitted, stay * p["severity2_stay_h"] / p["released_stay_h"], stay)
    return People(
        zone=[zone for zone, size in counts for _ in range(size)],
        severity=severities.tolist(),
        found_min=found.tolist(),
        limit_min=limit.tolist(),
        hopeless=hopeless.tolist(),
        arrest=[int(Arrest.NONE)] * size,
        luck=u[:, 2].tolist(),
        private=(~trapped & (u[:, 4] < p[f"private_share_severity{severity}"])).tolist(),
        transported=[True] * size,
        child=(u[:, 5] < p["child_share"]).tolist(),
        first_stay_min=stay.tolist(),
        ward_stay_min=ward.tolist(),
        scene_draw=e[:, 4].tolist(),
        handover_draw=e[:, 5].tolist(),
        tolerance_draw=e[:, 6].tolist(),
    )


def draw_walk_ins(seed: int, zone: int, size: int, ordinal: int, share: float) -> int:
    """How many of `size` people with severity 1 go to an emergency department."""
    rng = np.random.default_rng([seed, CASUALTIES_STREAM, zone, 1, ordinal])
    return int(np.count_nonzero(rng.random(size) < share))


def inpatient(severity: int, stay_min: float, tolerance_draw: float) -> People:
    """One inpatient of before the disaster, already treated, who now needs another bed."""
    return People(
        zone=[-1],
        severity=[severity],
        found_min=[0.0],
        limit_min=[inf],
        hopeless=[False],
        arrest=[int(Arrest.NONE)],
        luck=[0.0],
        private=[False],
        transported=[True],
        child=[False],
        first_stay_min=[stay_min],
        ward_stay_min=[stay_min],
        scene_draw=[1.0],
        handover_draw=[1.0],
        tolerance_draw=[tolerance_draw],
    )
