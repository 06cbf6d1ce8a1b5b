"""Lets lines of storms pass over a region: publishes what the wind breaks, and the work of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federation.errors import Reason, TwinError
from federation.snapshot import Snapshots
from federation.twin import (
    HOUR_NS,
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
from twins.disaster.damage import Damage, narrowed
from twins.disaster.stormparameters import STORM_PARAMETERS
from twins.disaster.stormwind import Havoc, gusts, overhead
from twins.regions import assumptions, data_hash

LOOKAHEAD_H = 336.0
"""How long after the first storm others are drawn: they come on the same one to two weeks."""
LATER_STREAM, GUST_STREAM = 41, 42


@dataclass(slots=True)
class Passage:
    """All that changes in a run; plain data, so that a snapshot is all of it."""

    seed: int
    parameters: dict[str, float]
    storms_ns: list[int]
    """When the storms come."""
    power: Damage
    peak_m_s: Vector
    """The highest gust at each component so far."""
    passed: int = 0
    storm_ids: list[str] = field(default_factory=list)


STATES = Snapshots(Passage, Damage)


class Windstorm(Twin):
    """A derecho over a region, and the weaker lines of storms that may follow it.

    Each has its own field of gusts, correlated in space. Poles fall and stations are damaged by
    fragility curves; a component keeps its strength from storm to storm until it is repaired.
    Streets, water works and hospitals stay whole.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.passage: Passage | None = None

    def describe(self) -> Description:
        given = assumptions(self.region)
        kind = "power_component"
        return Description(
            model="windstorm",
            version="1.0",
            domain="disaster",
            entities=(
                Entity(SYSTEM, SYSTEM),
                *(
                    Entity(
                        row["component_id"],
                        kind,
                        "",
                        float(row["lon_deg"]),
                        float(row["lat_deg"]),
                    )
                    for row in overhead(self.region).rows
                ),
            ),
            variables=(
                Variable(
                    "power_intact",
                    kind,
                    "1",
                    Causality.INPUT,
                    1.0,
                    0.0,
                    1.0,
                    "1 when no damage is left: what a later storm hits",
                ),
                _output("power_damage_state", kind, "1", "0 none to 4 complete"),
                _output("power_repair_work", kind, "h", "gang-hours caused so far, never falling"),
                _output("gust", kind, "m/s", "highest gust so far"),
                _output("storms", SYSTEM, "1", "lines of storms that have passed"),
            ),
            time=TimePolicy(),
            fidelity=Fidelity.REDUCED,
            parameters=tuple(given.get(p.name, p) for p in STORM_PARAMETERS),
            doc=self.__doc__ or "",
            data_hash=data_hash(self.region),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        size = len(overhead(self.region).rows)
        first_ns = round(parameters["storm_h"] * HOUR_NS)
        self.passage = Passage(
            seed,
            dict(parameters),
            [first_ns, *_later(seed, parameters, first_ns)],
            Damage.none(seed, "power", size),
            np.zeros(size),
        )

    def advance(self, step: Step) -> None:
        passage = self._opened()
        while passage.passed < len(passage.storms_ns):
            at_ns = passage.storms_ns[passage.passed]
            if at_ns > step.time_ns:
                step.wake_at(at_ns)
                return
            self._pass_over(step, passage)
            passage.passed += 1

    def snapshot(self) -> bytes:
        return STATES.pack(self._opened())

    def restore(self, state: bytes) -> None:
        self.passage = STATES.unpack(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        """Storms that have passed stay, with what they broke; those to come are a Poisson process.

        A strength is drawn anew between the bounds that what stood and what fell put to it.
        """
        if believed:
            raise TwinError(Reason.UNKNOWN_VARIABLE, "what a storm has done is no matter of belief")
        passage = self._opened()
        if (passage.seed, passage.parameters) != (seed, dict(parameters)):
            if passage.passed == 0:
                self.open(seed, parameters)
                passage = self._opened()
                passage.storms_ns = [max(at_ns, time_ns) for at_ns in passage.storms_ns]
            else:
                ahead = _later(seed, parameters, time_ns)
                passage.storms_ns = passage.storms_ns[: passage.passed] + ahead
                passage.seed, passage.parameters = seed, dict(parameters)
                passage.power.diverge(seed)
        ahead = passage.storms_ns[passage.passed :]
        return ahead[0] if ahead else None

    def _opened(self) -> Passage:
        if self.passage is None:
            raise RuntimeError("the twin has not been opened")
        return self.passage

    def _pass_over(self, step: Step, passage: Passage) -> None:
        """One line of storms: draw, blow, break; publish what changed."""
        grid, p, damage = overhead(self.region), passage.parameters, passage.power
        draws = np.random.default_rng([passage.seed, GUST_STREAM, passage.passed])
        is_first = passage.passed == 0
        gust = gusts(
            self.region,
            draws.standard_normal(len(grid.places)),
            p["gust_median_m_s" if is_first else "next_gust_median_m_s"],
            p["gust_sigma"],
            p["gust_range_km"],
        )
        storm = step.emit(
            "derecho" if is_first else "storm",
            SYSTEM,
            f"a line of storms passes with gusts of {gust.min():.0f} to {gust.max():.0f} m/s",
            passage.storm_ids[:1],
        )
        passage.storm_ids.append(storm)
        step.publish("storms", passage.passed + 1, {0: storm})
        stronger = np.flatnonzero(gust > passage.peak_m_s)
        passage.peak_m_s = np.maximum(gust, passage.peak_m_s)
        step.publish("gust", passage.peak_m_s, {int(i): storm for i in stronger})

        repaired = damage.repaired(step["power_intact"], step.time_ns)
        explained = {
            i: next(iter(step.cause("power_intact", i)), storm)
            for i in np.flatnonzero(repaired).tolist()
        }
        if repaired.any():
            damage.rebuild(repaired)
        havoc = Havoc.of(p)
        state, work_h = havoc.damage(grid, gust, damage.strength, damage.patience)
        self._narrow(damage, havoc.reached(grid, gust), state)
        worse, more = damage.strike(state, work_h, step.time_ns)
        for i in worse.tolist():
            row = grid.rows[i]
            explained[i] = step.emit(
                "component_damaged",
                row["component_id"],
                f"{row['component_class']} {row['component_id']} is out after {gust[i]:.0f} m/s: "
                f"{damage.present_h[i]:.0f} gang-hours to repair",
                (storm,),
            )
        if explained:
            step.publish("power_damage_state", damage.state, explained)
        if more.size:
            causes = {i: explained[i] for i in more.tolist()}
            step.publish("power_repair_work", damage.caused_h, causes)

    @staticmethod
    def _narrow(damage: Damage, chance: Vector, state: NDArray[np.int64]) -> None:
        """Take note of who held and who did not: how much broke says nothing more here."""
        out = np.where(state > 0, 4, 0)
        damage.bounds = narrowed(damage.bounds, np.repeat(chance[:, None], 4, axis=1), out)


def _later(seed: int, parameters: Mapping[str, float], from_ns: int) -> list[int]:
    """When storms after the first come, from an instant on: a Poisson process, whenever begun."""
    draws = np.random.default_rng([seed, LATER_STREAM])
    found: list[int] = []
    at_h = 0.0
    while (at_h := at_h + parameters["next_storm_mean_h"] * draws.standard_exponential()) < (
        LOOKAHEAD_H
    ):
        found.append(from_ns + max(1, round(at_h * HOUR_NS)))
    return found


def _output(name: str, kind: str, unit: str, doc: str) -> Variable:
    return Variable(name, kind, unit, Causality.OUTPUT, 0.0, 0.0, doc=doc)
