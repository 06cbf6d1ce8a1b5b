"""A town of two small twins: a power plant that fails and a water tower that runs dry."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from federation.errors import PlanError, Reason
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    SYSTEM,
    Causality,
    Description,
    Parameter,
    Step,
    TimePolicy,
    Twin,
    Variable,
)


class Plant(Twin):
    """Gives 30 kW until an outage that begins an hour after the start."""

    def describe(self) -> Description:
        return Description(
            model="plant",
            version="1.0",
            domain="power",
            entities=(),
            variables=(Variable("power", SYSTEM, "MW", Causality.OUTPUT),),
            time=TimePolicy(),
            parameters=(Parameter("outage_h", "h", 2.0, 0.0, 48.0, "length of the outage"),),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        noise = np.random.default_rng([seed, 1]).uniform(-0.1, 0.1)
        self.start_ns = HOUR_NS
        self.end_ns = self.start_ns + round((parameters["outage_h"] + noise) * HOUR_NS)

    def advance(self, step: Step) -> None:
        if step.time_ns == self.start_ns:
            event = step.emit("outage", SYSTEM, "the plant trips")
            step.publish("power", 0.0, {0: event})
            step.wake_at(self.end_ns)
        else:
            step.publish("power", 0.03)
            if step.time_ns < self.start_ns:
                step.wake_at(self.start_ns)


class BrokenPlant(Plant):
    """Answers NaN after its first step."""

    def advance(self, step: Step) -> None:
        super().advance(step)
        if step.time_ns > 0:
            step.publish("power", float("nan"))


class InfinitePlant(Plant):
    """Answers infinity after its first step."""

    def advance(self, step: Step) -> None:
        super().advance(step)
        if step.time_ns > 0:
            step.publish("power", float("inf"))


class TwofoldPlant(Plant):
    """Publishes two values where there is one entity."""

    def advance(self, step: Step) -> None:
        step.publish("power", [0.01, 0.02])


class HopelessPlant(Plant):
    """Stands for a member whose plan can't be met."""

    def advance(self, step: Step) -> None:
        raise PlanError(Reason.PLAN_INFEASIBLE, "30 kW can't be had from nothing")


class FailingPlant(Plant):
    """Raises an error of its own."""

    def advance(self, step: Step) -> None:
        raise ZeroDivisionError("the turbine")


class Tower(Twin):
    """A water tower that a pump fills and a district empties."""

    def describe(self) -> Description:
        return Description(
            model="tower",
            version="1.0",
            domain="water",
            entities=(),
            variables=(
                Variable("pump_power", SYSTEM, "kW", Causality.INPUT, 30.0),
                Variable("level", SYSTEM, "m", Causality.OUTPUT),
                Variable("dry_hours", SYSTEM, "h", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=5 * MINUTE_NS),
            parameters=(Parameter("start_m", "m", 1.0, 0.0, 12.0, "level at the start"),),
            kpis=("dry_hours",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.level_m = parameters["start_m"]
        self.dry_h = 0.0

    def advance(self, step: Step) -> None:
        change_m_per_h = 1.0 if step["pump_power"][0] > 15.0 else -1.5
        was_m, self.level_m = self.level_m, self.level_m + change_m_per_h * step.span_h
        self.level_m = min(12.0, max(0.0, self.level_m))
        if self.level_m == 0.0:
            self.dry_h += step.span_h
            if was_m > 0.0:
                cause = step.cause("pump_power", 0)
                step.emit("tower_empty", SYSTEM, "the tower is empty", cause)
        step.publish("level", self.level_m)
        step.publish("dry_hours", self.dry_h)
