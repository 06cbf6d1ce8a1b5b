"""Small cities: a grid that feeds two hospitals and may be helped over a tie line from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from federation.twin import (
    MINUTE_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    Risk,
    Step,
    TimePolicy,
    Twin,
    Variable,
)

STATIONS = (
    Entity("N1", "station", "North", -90.0, 35.3),
    Entity("N2", "station", "North by the river", -90.1, 35.4),
    Entity("S1", "station", "South", -90.0, 35.0),
    Entity("S2", "station", "South by the airport", -89.9, 34.9),
)
HOSPITALS = (
    Entity("H1", "hospital", "St. Anne", -90.0, 35.31),
    Entity("H2", "hospital", "General", -90.0, 35.01),
)


class Grid(Twin):
    """Four stations and two hospitals on one supply; what is missing is not served.

    Its load grows by the minute. What comes over the tie line is given from outside.
    """

    supply_mw = 22.0

    def describe(self) -> Description:
        output, given = Causality.OUTPUT, Causality.INPUT
        return Description(
            model="grid",
            version="1",
            domain="energy",
            entities=(*STATIONS, *HOSPITALS),
            variables=(
                Variable("tie", SYSTEM, "MW", given, 0.0, doc="over the tie line"),
                Variable("load", "station", "MW", output, 0.0, 0.0, 20.0, "of all customers"),
                Variable("hospital_load", "hospital", "MW", output, 0.5),
                Variable("served", "hospital", "1", output, 1.0),
                Variable("unserved", SYSTEM, "MW", output, 0.0),
                Variable("secret", SYSTEM, "1", output, 42.0, doc="nobody's business"),
            ),
            time=TimePolicy(period_ns=MINUTE_NS),
            actuators=(
                Actuator("shed", "station", "MW", 0.0, 5.0, 0.0, Risk.MEDIUM),
                Actuator("open_breaker", "station", "1", 0.0, 1.0, 0.0, Risk.HIGH),
            ),
            kpis=("unserved",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.draw = np.random.default_rng(seed).uniform(3.0, 5.0, 4)
        self.shed = np.zeros(4)
        self.was_short = False

    def advance(self, step: Step) -> None:
        ids = [station.id for station in STATIONS]
        causes = []
        for action in step.actions:
            if action.actuator == "shed":
                self.shed[ids.index(action.entity)] = action.value
                causes.append(action.cause)
        minutes = step.time_ns / MINUTE_NS
        load = np.maximum(self.draw * (1.0 + 0.02 * minutes) - self.shed, 0.0)
        hospital = np.array([0.5, 0.75]) * (1.0 + 0.01 * minutes)
        short = max(float(load.sum() + hospital.sum()) - self.supply_mw - step["tie"][0], 0.0)
        event = ""
        if (short > 0.0) is not self.was_short:
            self.was_short = short > 0.0
            kind = "short_of_power" if self.was_short else "supplied_again"
            causes += step.cause("tie", 0)
            event = step.emit(kind, SYSTEM, f"{short:.2f} MW are missing", causes)
        served = 1.0 - min(short / 10.0, 1.0)
        explained = {0: event, 1: event} if event else {}
        step.publish("load", load)
        step.publish("hospital_load", hospital)
        step.publish("served", [served, served], explained)
        step.publish("unserved", short, {0: event} if event else None)
        step.publish("secret", 42.0 + minutes)

    def snapshot(self) -> bytes:
        return json.dumps([self.draw.tolist(), self.shed.tolist(), self.was_short]).encode()

    def restore(self, state: bytes) -> None:
        draw, shed, self.was_short = json.loads(state)
        self.draw, self.shed = np.array(draw), np.array(shed)


class Clinic(Twin):
    """Two hospitals that fill up, faster without power."""

    def describe(self) -> Description:
        return Description(
            model="clinic",
            version="1",
            domain="medical",
            entities=HOSPITALS,
            variables=(
                Variable("power", "hospital", "1", Causality.INPUT, 1.0),
                Variable("beds_free", "hospital", "1", Causality.OUTPUT, 100.0),
                Variable("diagnoses", "hospital", "1", Causality.OUTPUT, 0.0),
            ),
            time=TimePolicy(period_ns=5 * MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.free = np.array([120.0, 80.0])

    def advance(self, step: Step) -> None:
        if step.span_ns:
            self.free = np.maximum(self.free - 2.0 - 10.0 * (1.0 - step["power"]), 0.0)
        for index, hospital in enumerate(HOSPITALS):
            if self.free[index] == 0.0 and step.span_ns:
                step.emit("hospital_full", hospital.id, "no bed", step.cause("power", index))
        step.publish("beds_free", self.free)
        step.publish("diagnoses", 120.0 - self.free)


class Helper(Twin):
    """A neighbour that sends over the tie line what the other city lacks, up to a limit."""

    most_mw = 3.0

    def describe(self) -> Description:
        return Description(
            model="helper",
            version="1",
            domain="energy",
            entities=(),
            variables=(
                Variable("missing", SYSTEM, "MW", Causality.INPUT, 0.0),
                Variable("sent", SYSTEM, "MW", Causality.OUTPUT, 0.0),
                Variable("seen", SYSTEM, "MW", Causality.OUTPUT, 0.0),
            ),
            time=TimePolicy(period_ns=5 * MINUTE_NS),
            kpis=("sent",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.sent = 0.0

    def advance(self, step: Step) -> None:
        wanted = min(float(step["missing"][0]) + self.sent, self.most_mw)
        if wanted > self.sent:
            event = step.emit("help_sent", SYSTEM, "power is sent", step.cause("missing", 0))
            step.publish("sent", wanted, {0: event})
        self.sent = max(self.sent, wanted)
        step.publish("seen", step["missing"])

    def snapshot(self) -> bytes:
        return json.dumps(self.sent).encode()

    def restore(self, state: bytes) -> None:
        self.sent = json.loads(state)


class Gauge(Twin):
    """Says how many minutes it is, but for a while in which it knows nothing new."""

    def describe(self) -> Description:
        return Description(
            model="gauge",
            version="1",
            domain="test",
            entities=(),
            variables=(Variable("minute", SYSTEM, "min", Causality.OUTPUT, 0.0),),
            time=TimePolicy(period_ns=5 * MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        pass

    def advance(self, step: Step) -> None:
        minute = step.time_ns / MINUTE_NS
        if 10 <= minute < 25:
            step.hold("the line is down")
        else:
            step.publish("minute", minute)


ARRIVED: list[tuple[str, float]] = []
"""What has arrived at relays, and where."""


class Relay(Twin):
    """Says what it hears, and notes whatever comes that is new to it."""

    def __init__(self, city: str) -> None:
        self.city = city

    def describe(self) -> Description:
        return Description(
            model="relay",
            version="1",
            domain="talk",
            entities=(),
            variables=(
                Variable("heard", SYSTEM, "1", Causality.INPUT, 0.0),
                Variable("said", SYSTEM, "1", Causality.OUTPUT, 0.0),
            ),
            time=TimePolicy(period_ns=5 * MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.last = 0.0

    def advance(self, step: Step) -> None:
        heard = float(step["heard"][0])
        if heard != self.last:
            self.last = heard
            ARRIVED.append((self.city, heard))
            event = step.emit("arrived", SYSTEM, f"{heard:g}", step.cause("heard", 0))
            step.publish("said", heard, {0: event})


class Writer(Twin):
    """Writes a 7 after ten minutes."""

    def describe(self) -> Description:
        return Description(
            model="writer",
            version="1",
            domain="talk",
            entities=(),
            variables=(Variable("said", SYSTEM, "1", Causality.OUTPUT, 0.0),),
            time=TimePolicy(period_ns=5 * MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        pass

    def advance(self, step: Step) -> None:
        if step.time_ns == 10 * MINUTE_NS:
            event = step.emit("written", SYSTEM, "a 7")
            step.publish("said", 7.0, {0: event})


RELAY_POLICY = """
version: 1
rules:
  - name: all-of-it
    who: ['*']
    what:
      sessions: [what-if]
      variables: [relay.said]
      inputs: [relay.heard]
      events: [relay.*]
"""


def relay(city: str, to: str, on_loop: str) -> str:
    """A city whose relay speaks to that of another, at an address."""
    return f"""
name: {city}-talk
region: {city}
horizon_h: 1
members:
  relay: {{class: "tests.cities:Relay", config: {{city: {city}}}}}
  beyond: {{address: "{to}", peer: {{on_loop: {on_loop}}}}}
couplings:
  - {{from: relay.said, to: beyond.relay_heard}}
"""


BIRCH = """
name: birch-day
region: birch
horizon_h: 2
members:
  grid: {class: "tests.cities:Grid"}
  clinic: {class: "tests.cities:Clinic"}
couplings:
  - {from: grid.served, to: clinic.power}
"""

BIRCH_POLICY = """
version: 1
step_min: 5
rules:
  - name: what-ifs
    who: [ash]
    what: {sessions: [what-if]}
  - name: lack-of-power
    who: [ash]
    what: {variables: [grid.unserved], events: [grid.*]}
  - name: load-in-total
    who: [ash]
    what: {variables: [grid.load]}
    resolution: {space: sum, window_min: 10, round_to: 0.5}
  - name: beds
    who: [ash]
    what: {variables: [clinic.beds_free]}
  - name: tie-line
    who: [ash]
    what: {inputs: [grid.tie]}
"""


def ash(birch: str, measure: str = "none", more: str = "") -> str:
    """A scenario of ash with birch as a member; `birch` says what the member is."""
    return f"""
name: ash-helps
region: ash
horizon_h: 2
members:
  helper: {{class: "tests.cities:Helper"}}
  birch: {birch}
couplings:
  - {{from: birch.grid_unserved, to: helper.missing, delay_min: 5}}
  - {{from: helper.sent, to: birch.grid_tie}}
kpis: [helper.sent, birch.grid_unserved]
{more}
"""


def write_birch(folder: Path, policy: str = BIRCH_POLICY) -> tuple[Path, Path]:
    """The files of birch: its scenario and its export policy."""
    scenario, rules = folder / "birch.yaml", folder / "policy.yaml"
    scenario.write_text(BIRCH, encoding="utf-8")
    rules.write_text(policy, encoding="utf-8")
    return scenario, rules
