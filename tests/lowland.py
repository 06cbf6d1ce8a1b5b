"""A lowland of three quick twins that can be acted on: storms, a reservoir above, a polder below.

What comes of the weather and how much the reservoir leaks is not known beforehand. Somebody may
open the reservoir's gate and run the polder's pumps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from federation.scenario.spec import Policy, Scenario
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    Parameter,
    Planner,
    Risk,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)

SCENARIO = """
name: Lowland
region: nowhere
seed: 11
horizon_h: 24
members:
  sky: {class: "tests.lowland:Sky"}
  reservoir: {class: "tests.lowland:Reservoir"}
  polder: {class: "tests.lowland:Polder"}
couplings:
  - {from: sky.rain, to: reservoir.rain}
  - {from: reservoir.release, to: polder.river}
repairs:
  crews: 100
  decide_every_min: 60
  horizon_h: 24
  work:
    - actuator: reservoir.gate
      remaining: reservoir.level
      busy: reservoir.opening
      travel: reservoir.way
    - actuator: polder.pump
      remaining: polder.water
      busy: polder.pumping
      travel: polder.way
uncertainty:
  sky.wetness: {uniform: [0.5, 3.0]}
measures:
  none: {}
  plan: {crews: plan}
  nearest: {crews: nearest}
kpis: [reservoir.spilled, polder.damage]
weighted: {reservoir.spilled: 10, polder.damage: 1}
"""


class Sky(Twin):
    """Showers that come at random; each says when it ends, and the next begins later."""

    def describe(self) -> Description:
        return Description(
            model="sky",
            version="1",
            domain="weather",
            entities=(),
            variables=(Variable("rain", SYSTEM, "mm/h", Causality.OUTPUT),),
            time=TimePolicy(),
            parameters=(Parameter("wetness", "1", 1.0, 0.0, 5.0),),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.seed, self.wetness = seed, parameters["wetness"]
        self.count, self.next_ns = 0, 0

    def advance(self, step: Step) -> None:
        self.count += 1
        draws = np.random.default_rng([self.seed, self.count])
        step.publish("rain", self.wetness * draws.exponential(4.0))
        self.next_ns = step.time_ns + int(draws.integers(5, 180)) * MINUTE_NS
        step.wake_at(self.next_ns)

    def snapshot(self) -> bytes:
        return json.dumps([self.seed, self.wetness, self.count, self.next_ns]).encode()

    def restore(self, state: bytes) -> None:
        self.seed, self.wetness, self.count, self.next_ns = json.loads(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        """When the shower will end is not known yet."""
        if (seed, parameters["wetness"]) != (self.seed, self.wetness):
            self.seed, self.wetness = seed, parameters["wetness"]
            ends_min = int(np.random.default_rng([seed, 0]).integers(0, 180))
            self.next_ns = time_ns + ends_min * MINUTE_NS
        return self.next_ns


class Keeps(Twin):
    """A twin whose whole state is its attributes."""

    def snapshot(self) -> bytes:
        return json.dumps(self.__dict__).encode()

    def restore(self, state: bytes) -> None:
        self.__dict__.update(json.loads(state))


class Reservoir(Keeps):
    """Rain fills it; a gate and a leak empty it; what it can't hold goes over the dam."""

    def describe(self) -> Description:
        return Description(
            model="reservoir",
            version="1",
            domain="water",
            entities=(Entity("main", "gate"),),
            variables=(
                Variable("rain", SYSTEM, "mm/h", Causality.INPUT),
                Variable("level", "gate", "m", Causality.OUTPUT),
                Variable("opening", "gate", "1", Causality.OUTPUT),
                Variable("way", "gate", "min", Causality.OUTPUT),
                Variable("leak", SYSTEM, "m/h", Causality.OUTPUT),
                Variable("release", SYSTEM, "m^3/h", Causality.OUTPUT),
                Variable("spilled", SYSTEM, "m^3", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=10 * MINUTE_NS),
            actuators=(
                Actuator(
                    "gate",
                    "gate",
                    "1",
                    0.0,
                    1.0,
                    0.2,
                    Risk.MEDIUM,
                    lease_ns=3 * HOUR_NS,
                    compensation="the gate is closed again",
                ),
            ),
            kpis=("spilled",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.leak_m = float(np.random.default_rng([seed, 3]).uniform(0.0, 0.2))
        self.level_m, self.gate, self.spilled_m3 = 5.0, 0.2, 0.0

    def advance(self, step: Step) -> None:
        for action in step.actions:
            self.gate = action.value
        rain = float(step["rain"][0])
        self.level_m += (0.25 * rain - 3.0 * self.gate - self.leak_m) * step.span_h
        over = max(self.level_m - 10.0, 0.0)
        self.level_m = min(max(self.level_m, 0.0), 10.0)
        self.spilled_m3 += over
        step.publish("level", self.level_m)
        step.publish("opening", self.gate)
        step.publish("way", 5.0)
        step.publish("leak", self.leak_m)
        step.publish("release", 3.0 * self.gate + self.leak_m + 20.0 * over)
        step.publish("spilled", self.spilled_m3)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        self.leak_m = float(believed.get("leak", np.array([self.leak_m]))[0])
        return None


class Polder(Keeps):
    """Water that comes in stands there and does damage, unless it is pumped, which costs too."""

    def describe(self) -> Description:
        return Description(
            model="polder",
            version="1",
            domain="civil",
            entities=(Entity("north", "pump"), Entity("south", "pump")),
            variables=(
                Variable("river", SYSTEM, "m^3/h", Causality.INPUT),
                Variable("water", "pump", "m", Causality.OUTPUT),
                Variable("pumping", "pump", "1", Causality.OUTPUT),
                Variable("way", "pump", "min", Causality.OUTPUT),
                Variable("damage", SYSTEM, "USD", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=15 * MINUTE_NS),
            actuators=(
                Actuator("pump", "pump", "1", 0.0, 1.0, 0.0, Risk.LOW, lease_ns=3 * HOUR_NS),
            ),
            kpis=("damage",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.water_m, self.pumps, self.damage_usd = [0.5, 0.5], [0.0, 0.0], 0.0

    def advance(self, step: Step) -> None:
        for action in step.actions:
            self.pumps[("north", "south").index(action.entity)] = action.value
        for i in range(2):
            flow = 0.3 * float(step["river"][0]) - 1.5 * self.pumps[i] - 0.1
            self.water_m[i] = max(self.water_m[i] + flow * step.span_h, 0.0)
            self.damage_usd += 100.0 * max(self.water_m[i] - 1.0, 0.0) * step.span_h
            self.damage_usd += (2.0 * self.pumps[i] + self.water_m[i]) * step.span_h
        step.publish("water", self.water_m)
        step.publish("pumping", self.pumps)
        step.publish("way", [5.0, 10.0])
        step.publish("damage", self.damage_usd)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        return None


class Warden(Planner):
    """Opens the gate and runs the pumps (`plan`), or the pumps only (`nearest`); or waits."""

    def __init__(self, policy: str = "none") -> None:
        self.policy = policy

    def describe(self) -> Description:
        families = (("gate", ("main",), "m"), ("pump", ("north", "south"), "m"))
        return Description(
            model="warden",
            version="1",
            domain="planner",
            entities=tuple(Entity(id, kind) for kind, ids, _ in families for id in ids),
            variables=tuple(
                Variable(f"{role}_{i}", kind, unit, Causality.INPUT)
                for i, (kind, _, length) in enumerate(families)
                for role, unit in (("remaining", length), ("busy", "1"), ("travel", "min"))
            ),
            time=TimePolicy(period_ns=HOUR_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        return None

    def advance(self, step: Step) -> None:
        if self.policy == "none":
            return
        if self.policy == "plan":
            gate = 0.6 if step["remaining_0"][0] > 4.0 else 0.3
            if gate != step["busy_0"][0]:
                event = step.emit("gate_set", "main", f"the gate is set to {gate}")
                step.act("reservoir", "gate", "main", gate, event)
        for i, pump in enumerate(("north", "south")):
            wanted = 1.0 if step["remaining_1"][i] > 0.4 else 0.0
            if wanted != step["busy_1"][i]:
                event = step.emit("pump_set", pump, f"the pump is set to {wanted}")
                step.act("polder", "pump", pump, wanted, event)


def warden(scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy) -> Planner:
    return Warden(policy)
