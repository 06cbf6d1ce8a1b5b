"""A valley of three small twins, as services or in process: rain, dams above, a town below.

`python -m tests.valley serve Dams dams --broker ADDRESS` serves one of them, and
`python -m tests.valley broker --store FILE` is a broker that can plan the town's repairs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from federation import telemetry
from federation.broker.server import BrokerOptions, serve_broker
from federation.scenario.spec import Policy, Scenario
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    Fidelity,
    LinearBlock,
    Parameter,
    Planner,
    Port,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from federation.wire.serve import ServeOptions, serve

SCENARIO = """
name: Wet valley
region: nowhere
seed: 5
horizon_h: 24
members:
  weather: {class: "tests.valley:Weather"}
  dams: {class: "tests.valley:Dams"}
  town: {class: "tests.valley:Town"}
couplings:
  - {from: weather.rain, to: dams.rain}
  - {from: dams.release, to: town.river}
  - {from: town.demand, to: dams.demand, delay_min: 30}
repairs:
  crews: 2
  decide_every_min: 60
  horizon_h: 24
  work:
    - actuator: town.assign_crew
      remaining: town.remaining_work
      busy: town.crew_busy
      travel: town.crew_travel
uncertainty:
  weather.wetness: {uniform: [1.0, 3.0]}
measures:
  plan: {crews: plan}
  nearest: {crews: nearest}
  none: {}
kpis: [dams.spilled, town.flooded]
"""

BRIDGES = ("B1", "B2", "B3")


class Weather(Twin):
    """Showers at random times, some of them storms."""

    def describe(self) -> Description:
        return Description(
            model="weather",
            version="1",
            domain="sky",
            entities=(Entity("upper", "basin"), Entity("lower", "basin")),
            variables=(Variable("rain", "basin", "mm/h", Causality.OUTPUT),),
            time=TimePolicy(),
            parameters=(Parameter("wetness", "1", 1.0, 0.0, 5.0),),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.random = np.random.default_rng([seed, 1])
        self.wetness = parameters["wetness"]

    def advance(self, step: Step) -> None:
        rain = self.wetness * self.random.exponential(4.0, 2)
        causes = {
            int(i): step.emit("storm", ("upper", "lower")[i], f"{rain[i]:.1f} mm/h of rain")
            for i in np.flatnonzero(rain > 6.0)
        }
        step.publish("rain", rain, causes)
        step.wake_at(step.time_ns + int(self.random.integers(5, 90)) * MINUTE_NS)


class Dams(Twin):
    """Two reservoirs that let water through their gates, and spill what they can't hold."""

    gate_to_pass: threading.Event | None = None
    """When set, each step waits for it."""

    def describe(self) -> Description:
        return Description(
            model="dams",
            version="1",
            domain="water",
            entities=(Entity("upper", "basin"), Entity("lower", "basin")),
            variables=(
                Variable("rain", "basin", "mm/h", Causality.INPUT),
                Variable("demand", SYSTEM, "m^3/h", Causality.INPUT, 1.0),
                Variable("level", "basin", "m", Causality.OUTPUT),
                Variable("release", SYSTEM, "m^3/h", Causality.OUTPUT),
                Variable("spilled", SYSTEM, "m^3", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=10 * MINUTE_NS),
            fidelity=Fidelity.REDUCED,
            actuators=(Actuator("gate", "basin", "1", 0.0, 1.0, 0.2),),
            kpis=("spilled",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.level_m = np.array([5.0, 4.0])
        self.gate = np.full(2, 0.2)
        self.spilled_m3 = 0.0
        self.full: dict[int, str] = {}

    def advance(self, step: Step) -> None:
        if self.gate_to_pass is not None and not self.gate_to_pass.wait(20):
            raise RuntimeError("nobody let the dams pass")
        for action in step.actions:
            index = ("upper", "lower").index(action.entity)
            self.gate[index] = action.value
            why = (action.cause,)
            step.emit("gate_moved", action.entity, f"gate at {action.value:g}", why)
        out = self.gate * self.level_m * np.sqrt(step["demand"][0])
        self.level_m = self.level_m + (0.2 * step["rain"] - 0.3 * out) * step.span_h
        over = np.maximum(self.level_m - 10.0, 0.0)
        self.level_m = np.maximum(self.level_m - over, 0.0)
        self.spilled_m3 += float(over.sum())
        for index in range(2):
            if over[index] > 0 and index not in self.full:
                basin = ("upper", "lower")[index]
                causes = step.cause("rain", index)
                self.full[index] = step.emit("dam_spills", basin, f"{basin} is full", causes)
            elif over[index] == 0:
                self.full.pop(index, None)
        step.publish("level", self.level_m)
        explained = {0: list(self.full.values())[-1]} if self.full else {}
        step.publish("release", out.sum() + 40.0 * over.sum(), explained)
        step.publish("spilled", self.spilled_m3)


class Town(Twin):
    """A town that floods; the river takes bridges, and crews build them up again."""

    def describe(self) -> Description:
        return Description(
            model="town",
            version="1",
            domain="town",
            entities=tuple(Entity(bridge, "bridge") for bridge in BRIDGES),
            variables=(
                Variable("river", SYSTEM, "m^3/h", Causality.INPUT),
                Variable("demand", SYSTEM, "m^3/h", Causality.OUTPUT),
                Variable("flooded", SYSTEM, "h", Causality.OUTPUT),
                Variable("remaining_work", "bridge", "h", Causality.OUTPUT),
                Variable("crew_busy", "bridge", "1", Causality.OUTPUT),
                Variable("crew_travel", "bridge", "min", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=15 * MINUTE_NS),
            actuators=(Actuator("assign_crew", "bridge", "1", 0.0, 1.0, 0.0),),
            kpis=("flooded",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.work_h = np.zeros(3)
        self.crew = np.zeros(3)
        self.flooded_h = 0.0
        self.why: dict[int, str] = {}

    def advance(self, step: Step) -> None:
        for action in step.actions:
            self.crew[BRIDGES.index(action.entity)] = action.value
        self.work_h = np.maximum(self.work_h - self.crew * step.span_h, 0.0)
        for index in np.flatnonzero((self.work_h == 0) & (self.crew > 0)):
            self.crew[index] = 0.0
            self.why[int(index)] = step.emit(
                "component_repaired", BRIDGES[index], "open again", (self.why[int(index)],)
            )
        river = step["river"][0]
        if river > 5.0:
            self.flooded_h += step.span_h
            for index in np.flatnonzero((self.work_h == 0) & (np.array([5, 7, 9]) < river)):
                self.work_h[index] = 3.0 + index
                self.why[int(index)] = step.emit(
                    "bridge_lost", BRIDGES[index], "the river took it", step.cause("river", 0)
                )
        step.publish("demand", 1.0 + 0.5 * np.sin(step.time_ns / HOUR_NS))
        step.publish("flooded", self.flooded_h)
        step.publish("remaining_work", self.work_h, self.why)
        step.publish("crew_busy", self.crew, self.why)
        step.publish("crew_travel", [10.0, 20.0, 30.0])

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        count = len(BRIDGES) * len(periods_ns)
        worth = np.outer([3.0, 2.0, 1.0], np.array(periods_ns) / HOUR_NS)
        columns = np.arange(count).reshape(len(BRIDGES), -1)
        none = np.zeros(0, dtype=np.int64)
        return LinearBlock(
            columns=tuple(f"open_{i}" for i in range(count)),
            low=np.zeros(count),
            high=np.ones(count),
            cost=-1000.0 * worth.ravel(),
            integer=np.zeros(count, dtype=np.bool_),
            rows=(),
            row_low=np.zeros(0),
            row_high=np.zeros(0),
            row_index=none,
            column_index=none,
            coefficient=np.zeros(0),
            ports=(Port("open", "available", "bridge", "1", BRIDGES, columns),),
        )

    def snapshot(self) -> bytes:
        return pickle.dumps(self.__dict__)

    def restore(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))


class NewTown(Town):
    """A later version of the town, in which other bridges go."""

    def describe(self) -> Description:
        return replace(super().describe(), version="2")

    def advance(self, step: Step) -> None:
        super().advance(step)
        step.publish("flooded", self.flooded_h + step.span_h)


class Gauge(Twin):
    """Measures a basin, tells of high water, and lets some of it seep away."""

    def describe(self) -> Description:
        return Description(
            model="gauge",
            version="1",
            domain="water",
            entities=(Entity("upper", "basin"), Entity("lower", "basin")),
            variables=(
                Variable("level", "basin", "m", Causality.INPUT),
                Variable("mean", SYSTEM, "m", Causality.OUTPUT),
                Variable("seep", SYSTEM, "m^3/h", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=20 * MINUTE_NS, offset_ns=5 * MINUTE_NS),
            parameters=(Parameter("share", "1", 0.1, 0.0, 1.0),),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.share = parameters["share"]
        self.mean_m = 0.0

    def advance(self, step: Step) -> None:
        weight = 1.0 - 0.5**step.span_h
        self.mean_m += weight * (float(step["level"].mean()) - self.mean_m)
        step.publish("mean", self.mean_m)
        step.publish("seep", self.share * self.mean_m)
        if step["level"].max() > 6.0:
            step.emit("high_water", SYSTEM, f"{step['level'].max():.2f} m", step.cause("level", 0))


class UnsteadyDams(Dams):
    """The same dams in a slow and uneven process."""

    def advance(self, step: Step) -> None:
        time.sleep(random.uniform(0.0, 0.003))
        super().advance(step)


class PoisonedDams(Dams):
    """Publishes a level that is no number after three hours."""

    def advance(self, step: Step) -> None:
        super().advance(step)
        if step.time_ns >= 3 * HOUR_NS:
            step.publish("level", [1.0, float("nan")])


class DyingDams(Dams):
    """Its process is killed after three hours of the run."""

    def advance(self, step: Step) -> None:
        if step.time_ns >= 3 * HOUR_NS:
            os._exit(9)
        super().advance(step)


class SteadyDams(Dams):
    """Takes a fiftieth of a second per step."""

    def advance(self, step: Step) -> None:
        time.sleep(0.02)
        super().advance(step)


class SlowDams(Dams):
    """Takes a tenth of a second per step."""

    def advance(self, step: Step) -> None:
        time.sleep(0.1)
        super().advance(step)


class Foreman(Planner):
    """Plans every three hours, and sends the one crew to the first bridge that is down."""

    def describe(self) -> Description:
        return Description(
            model="foreman",
            version="1",
            domain="planner",
            entities=tuple(Entity(bridge, "bridge") for bridge in BRIDGES),
            variables=(
                Variable("remaining_0", "bridge", "h", Causality.INPUT),
                Variable("busy_0", "bridge", "1", Causality.INPUT),
                Variable("travel_0", "bridge", "min", Causality.INPUT),
                Variable("worth", SYSTEM, "1", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=HOUR_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.worth = 0.0

    def periods_ns(self) -> tuple[int, ...]:
        return (HOUR_NS, 2 * HOUR_NS)

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        self.worth = float(sum(block.cost.sum() for block in blocks.values()))

    def advance(self, step: Step) -> None:
        step.publish("worth", self.worth)
        if step.time_ns % (3 * HOUR_NS) == 0:
            step.emit("plan_made", SYSTEM, "the usual (gap 1.0%, maxTimeLimit)")
        down = np.flatnonzero((step["remaining_0"] > 0) & (step["busy_0"] == 0))
        if down.size and step["busy_0"].sum() == 0:
            bridge = BRIDGES[int(down[0])]
            sent = step.emit("crew_sent", bridge, "go", step.cause("remaining_0", int(down[0])))
            step.act("town", "assign_crew", bridge, 1.0, sent)


def foreman(scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy) -> Planner:
    return Foreman()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    serving.add_argument("twin")
    serving.add_argument("name")
    serving.add_argument("--broker")
    broker = commands.add_parser("broker")
    broker.add_argument("--store", default=":memory:")
    broker.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    if options.command == "serve":
        telemetry.configure(options.name)
        found: type[Twin] = globals()[options.twin]
        asyncio.run(serve(found, options.name, ServeOptions(broker=options.broker)))
    else:
        from federation.planners import planner

        telemetry.configure("broker")
        folder = Path(__file__).parent
        asyncio.run(
            serve_broker(
                BrokerOptions(
                    port=options.port,
                    store=options.store,
                    scenario_folder=folder,
                    planner=planner,
                )
            )
        )
    telemetry.flush()


if __name__ == "__main__":
    main()
