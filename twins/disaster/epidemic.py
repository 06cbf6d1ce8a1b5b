"""Lets an epidemic take its course in a region: publishes who comes to need a hospital bed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from federation.errors import Reason, TwinError
from federation.snapshot import Snapshots
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Causality,
    Description,
    Entity,
    Fidelity,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.disaster.cases import Cases
from twins.disaster.epidemicmodel import Need, course, need
from twins.disaster.epidemicparameters import EPIDEMIC_PARAMETERS
from twins.regions import data_hash, region_rows

PERIOD_NS = 15 * MINUTE_NS
WARD, ICU = 0, 1
BEDS = ("ward", "icu")
ILLNESS_STREAM = (51, 52)


@dataclass(slots=True)
class Outbreak:
    """All that changes in a run; plain data, so that a snapshot is all of it."""

    seed: int
    parameters: dict[str, float]
    people: Vector
    expected: list[Vector]
    """Persons of each zone who are expected to have come to need a bed; wards, intensive care."""
    cases: list[Cases]
    told: list[Vector]
    hour: float = 0.0
    began: str = ""


STATES = Snapshots(Outbreak, Cases)


class Epidemic(Twin):
    """A pandemic influenza in a mixed population, and the beds that it asks for.

    Its course is deterministic; who needs a bed when is drawn, in proportion to the people of
    each zone. Those who were in hospital before the run begins are told as two numbers. It does
    not know of power: an outage of days comes to hospitals sooner than to contacts.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.outbreak: Outbreak | None = None

    def describe(self) -> Description:
        return _describe(self.region)

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        rows = region_rows(self.region, "zones.csv")
        people = np.array([float(row["population"]) for row in rows])
        self.outbreak = Outbreak(
            seed,
            dict(parameters),
            people,
            [np.zeros(people.size) for _ in BEDS],
            [Cases.none(seed, stream, people.size) for stream in ILLNESS_STREAM],
            [np.zeros(people.size) for _ in BEDS],
        )

    def advance(self, step: Step) -> None:
        outbreak = self._opened()
        hour = step.time_ns / HOUR_NS
        asked = _need(outbreak.parameters)
        if step.time_ns == 0:
            self._begin(step, outbreak, asked)
        new = max(asked.admitted(hour) - asked.admitted(outbreak.hour), 0.0)
        outbreak.hour = hour
        icu_share = outbreak.parameters["icu_share"]
        for bed, share in ((WARD, 1.0 - icu_share), (ICU, icu_share)):
            outbreak.expected[bed] = outbreak.expected[bed] + new * share * outbreak.people
            count = outbreak.cases[bed].count(outbreak.expected[bed])
            more = np.flatnonzero(count != outbreak.told[bed]).tolist()
            if more:
                outbreak.told[bed] = count
                step.publish(f"sick_{BEDS[bed]}", count, dict.fromkeys(more, outbreak.began))
        if step.time_ns % HOUR_NS == 0:
            self._tell_course(step, outbreak, hour)

    def _begin(self, step: Step, outbreak: Outbreak, asked: Need) -> None:
        people = float(outbreak.people.sum())
        present = np.rint(np.array([asked.present_ward, asked.present_icu]) * people)
        outbreak.began = step.emit(
            "epidemic",
            SYSTEM,
            f"an epidemic has filled {present[WARD]:.0f} beds on wards and asks for "
            f"{present[ICU]:.0f} in intensive care",
        )
        for bed, name in enumerate(BEDS):
            step.publish(f"present_{name}", present[bed], {0: outbreak.began})

    def _tell_course(self, step: Step, outbreak: Outbreak, hour: float) -> None:
        whole = course(*_epidemic(outbreak.parameters))
        day = whole.peak_day - outbreak.parameters["days_to_peak"] + hour / 24.0
        people = float(outbreak.people.sum())
        step.publish("infectious", np.interp(day, whole.day, whole.infectious) * people)
        step.publish("onset_per_day", np.interp(day, whole.day, whole.onset_per_day) * people)

    def snapshot(self) -> bytes:
        return STATES.pack(self._opened())

    def restore(self, state: bytes) -> None:
        self.outbreak = STATES.unpack(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> None:
        """Who has come stays; who comes from now on follows other parameters and another draw."""
        if believed:
            raise TwinError(Reason.UNKNOWN_VARIABLE, "an epidemic is no matter of belief")
        outbreak = self._opened()
        if (outbreak.seed, outbreak.parameters) == (seed, dict(parameters)):
            return
        outbreak.seed, outbreak.parameters = seed, dict(parameters)
        for cases, expected in zip(outbreak.cases, outbreak.expected, strict=True):
            cases.diverge(seed, expected)

    def _opened(self) -> Outbreak:
        if self.outbreak is None:
            raise RuntimeError("the twin has not been opened")
        return self.outbreak


def _epidemic(p: Mapping[str, float]) -> tuple[float, float, float, float]:
    return p["r0"], p["latent_d"], p["infectious_d"], p["seed_share"]


def _need(p: Mapping[str, float]) -> Need:
    return need(
        _epidemic(p),
        p["days_to_peak"],
        p["ill_share"] * p["hospital_share"],
        p["icu_share"],
        p["admission_delay_d"],
        p["ward_stay_d"],
        p["icu_stay_d"],
    )


@lru_cache(maxsize=4)
def _describe(region: str) -> Description:
    def told(name: str, kind: str, unit: str, doc: str) -> Variable:
        return Variable(name, kind, unit, Causality.OUTPUT, 0.0, 0.0, doc=doc)

    return Description(
        model="epidemic",
        version="1.0",
        domain="disaster",
        entities=(
            *(
                Entity(
                    row["zone"], "zone", row["zone"], float(row["lon_deg"]), float(row["lat_deg"])
                )
                for row in region_rows(region, "zones.csv")
            ),
            Entity(SYSTEM, SYSTEM),
        ),
        variables=(
            told("sick_ward", "zone", "persons", "who came to need a ward bed, since the start"),
            told("sick_icu", "zone", "persons", "the same of intensive care"),
            told("present_ward", SYSTEM, "persons", "sick on wards when the run begins"),
            told("present_icu", SYSTEM, "persons", "sick in need of intensive care then"),
            told("infectious", SYSTEM, "persons", "infectious now, as reported every hour"),
            told("onset_per_day", SYSTEM, "persons/day", "who become infectious now"),
        ),
        time=TimePolicy(period_ns=PERIOD_NS),
        fidelity=Fidelity.REDUCED,
        parameters=EPIDEMIC_PARAMETERS,
        doc=Epidemic.__doc__ or "",
        data_hash=data_hash(region),
    )
