"""Tells who comes to hospital because equipment at home has no power."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import exp

import numpy as np
from numpy.typing import NDArray

from federation.errors import Reason, TwinError
from federation.snapshot import Snapshots
from federation.twin import (
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Causality,
    Description,
    Entity,
    Fidelity,
    Parameter,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.disaster.cases import Cases
from twins.regions import data_hash, region_rows

PERIOD_NS = 15 * MINUTE_NS
SEVERE, CRITICAL = 0, 1
SEVERITIES = (2, 3)
EQUIPMENT_STREAM = (61, 62)

HOME_PARAMETERS = (
    Parameter(
        "dependent_share",
        "1",
        0.00218,
        0.001,
        0.01,
        "of the people who live at home with equipment that keeps them alive and needs power",
        "Molinari et al., J Public Health Manag Pract 23 (2017) 152: 218.2 per 100 000 in the US "
        "(Shelby's own count in HHS emPOWER was not to be had)",
    ),
    Parameter(
        "backup_mean_h",
        "h",
        12.0,
        2.0,
        48.0,
        "mean of the exponential time that batteries and oxygen bottles last",
        "assumption",
    ),
    Parameter(
        "seek_share",
        "1",
        0.15,
        0.05,
        0.6,
        "of these who come to a hospital when it is over; the others find power or care elsewhere",
        "derived: 65 came to one hospital (Prezant et al., Crit Care Med 33 (2005) S96) that sees "
        "some 2.7 % of New York's emergency patients (from memory), in the 29 h of August 2003: "
        "2 400 of 17 400 dependent",
    ),
    Parameter(
        "critical_share",
        "1",
        0.05,
        0.01,
        0.2,
        "of those who come whose life is at risk at once",
        "assumption: users of ventilators",
    ),
)


@dataclass(frozen=True, slots=True)
class Dependents:
    """The zones of a region, with their people and the load point that each hangs on."""

    rows: tuple[dict[str, str], ...]
    people: Vector
    load_point: NDArray[np.int64]


@lru_cache(maxsize=4)
def dependents(region: str) -> Dependents:
    rows = region_rows(region, "zones.csv")
    points = [row["load_point"] for row in region_rows(region, "load_points.csv")]
    return Dependents(
        rows,
        np.array([float(row["population"]) for row in rows]),
        np.array([points.index(row["load_point"]) for row in rows], dtype=np.int64),
    )


@dataclass(slots=True)
class Household:
    """All that changes in a run; plain data, so that a snapshot is all of it."""

    seed: int
    parameters: dict[str, float]
    spent: Vector
    """Share of the dependents of each load point whose batteries have run down."""
    expected: list[Vector]
    """Persons of each zone who are expected to have come, by severity."""
    cases: list[Cases]
    told: list[Vector]


STATES = Snapshots(Household, Cases)


class Homes(Twin):
    r"""People at home whose equipment needs power, zone by zone.

    While a share u of a load point is without power, of those whose equipment still runs

    .. math:: 1 - e^{-u \, \Delta t / \tau}

    run out in a span; of these `seek_share` come to a hospital. Nobody comes twice.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.household: Household | None = None

    def describe(self) -> Description:
        return _describe(self.region)

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        where = dependents(self.region)
        zones = where.people.size
        self.household = Household(
            seed,
            dict(parameters),
            np.zeros(int(where.load_point.max()) + 1),
            [np.zeros(zones) for _ in SEVERITIES],
            [Cases.none(seed, stream, zones) for stream in EQUIPMENT_STREAM],
            [np.zeros(zones) for _ in SEVERITIES],
        )

    def advance(self, step: Step) -> None:
        household, where = self._opened(), dependents(self.region)
        dark = np.clip(1.0 - step["powered"][: household.spent.size], 0.0, 1.0)
        if step.span_ns == 0 or not dark.any():
            return
        p = household.parameters
        runs_out = -np.expm1(-dark * step.span_h / p["backup_mean_h"])
        new = (1.0 - household.spent) * runs_out
        household.spent = household.spent + new
        come = new[where.load_point] * where.people * p["dependent_share"] * p["seek_share"]
        critical = p["critical_share"]
        for kind, share in ((SEVERE, 1.0 - critical), (CRITICAL, critical)):
            household.expected[kind] = household.expected[kind] + come * share
            count = household.cases[kind].count(household.expected[kind])
            more = np.flatnonzero(count != household.told[kind]).tolist()
            if more:
                household.told[kind] = count
                causes = {zone: self._tell(step, zone, where) for zone in more}
                step.publish(f"injured_severity{SEVERITIES[kind]}", count, causes)

    def _tell(self, step: Step, zone: int, where: Dependents) -> str:
        name = where.rows[zone]["zone"]
        return step.emit(
            "equipment_failed",
            name,
            f"someone in zone {name} comes to hospital: equipment at home is without power",
            step.cause("powered", int(where.load_point[zone])),
        )

    def snapshot(self) -> bytes:
        return STATES.pack(self._opened())

    def restore(self, state: bytes) -> None:
        self.household = STATES.unpack(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> None:
        """Whose equipment has run down stays; who comes from now on is drawn anew."""
        if believed:
            raise TwinError(Reason.UNKNOWN_VARIABLE, "who depends on power is no matter of belief")
        household = self._opened()
        if (household.seed, household.parameters) == (seed, dict(parameters)):
            return
        household.seed, household.parameters = seed, dict(parameters)
        for cases, expected in zip(household.cases, household.expected, strict=True):
            cases.diverge(seed, expected)

    def _opened(self) -> Household:
        if self.household is None:
            raise RuntimeError("the twin has not been opened")
        return self.household


def expected_visits(people: float, hours: float, p: Mapping[str, float]) -> float:
    """Who has come after so many hours in which all of so many people had no power."""
    gone = 1.0 - exp(-hours / p["backup_mean_h"])
    return people * p["dependent_share"] * p["seek_share"] * gone


@lru_cache(maxsize=4)
def _describe(region: str) -> Description:
    points = region_rows(region, "load_points.csv")
    kinds = (("zone", "zone", dependents(region).rows), ("load_point", "load_point", points))
    return Description(
        model="equipment-at-home",
        version="1.0",
        domain="disaster",
        entities=(
            *(
                Entity(row[key], kind, row[key], float(row["lon_deg"]), float(row["lat_deg"]))
                for kind, key, rows in kinds
                for row in rows
            ),
            Entity(SYSTEM, SYSTEM),
        ),
        variables=(
            Variable(
                "powered",
                "load_point",
                "1",
                Causality.INPUT,
                1.0,
                0.0,
                1.0,
                "share of the homes that have power",
            ),
            *(
                Variable(
                    f"injured_severity{severity}",
                    "zone",
                    "persons",
                    Causality.OUTPUT,
                    0.0,
                    0.0,
                    doc=f"who came to need {need}, since the start",
                )
                for severity, need in zip(SEVERITIES, ("a hospital", "it at once"), strict=True)
            ),
        ),
        time=TimePolicy(period_ns=PERIOD_NS),
        fidelity=Fidelity.SURROGATE,
        parameters=HOME_PARAMETERS,
        doc=Homes.__doc__ or "",
        data_hash=data_hash(region),
    )
