"""Holds what a session of the city carries along, and how a part of it speaks to the world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from federation.twin import HOUR_NS, Action, Step, Vector
from twins.city.layout import CityLayout
from twins.city.water import WaterState
from twins.repair import Repairs

Codes = NDArray[np.int64]

NEVER = -1


class RoadKey(NamedTuple):
    """What an equilibrium depends on."""

    period: int
    factor: float
    capacity_share: Vector
    signal_share: Vector
    wait_min: Vector


@dataclass
class State:
    """All that a session carries from step to step; written as a snapshot.

    Events are remembered by their place in `events`; code 0 is none. `..._event` is the
    outage that holds now, `..._note` what explains the present value: outage or repair.
    """

    parameters: dict[str, float]
    road_repairs: Repairs
    water_repairs: Repairs
    road_state: Codes
    water_state: Codes
    signal_lost_ns: Codes
    road_event: Codes
    water_event: Codes
    road_note: Codes
    water_note: Codes
    dark_event: Codes
    pump_event: Codes
    junction_event: Codes
    road_crew_event: Codes
    water_crew_event: Codes
    scene_event: Codes
    hospital_event: Codes
    crew_events: dict[str, Codes]
    dark: NDArray[np.bool_]
    pump_on: NDArray[np.bool_]
    dry: NDArray[np.bool_]
    short: NDArray[np.bool_]
    pump_wanted_mw: Vector
    water: WaterState
    shocked_ns: int = NEVER
    settled: RoadKey | None = None
    present: RoadKey | None = None
    rates: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    restored_road: int = 0
    restored_water: int = 0
    diverted: int = 0
    diverted_by: tuple[int, ...] = ()
    events: list[str] = field(default_factory=lambda: [""])
    shown: dict[str, Vector] = field(default_factory=dict)

    @staticmethod
    def fresh(layout: CityLayout, known: dict[str, float]) -> State:
        """Everything whole, at the start of a run; `known` are the parameters."""
        roads, components = len(layout.roads), len(layout.components)
        nodes, pumps, junctions = len(layout.nodes), len(layout.pumps), len(layout.junctions)

        def none(size: int) -> Codes:
            return np.zeros(size, np.int64)

        return State(
            parameters=known,
            road_repairs=Repairs(roads),
            water_repairs=Repairs(components),
            road_state=none(roads),
            water_state=none(components),
            signal_lost_ns=np.full(nodes, NEVER, np.int64),
            road_event=none(roads),
            water_event=none(components),
            road_note=none(roads),
            water_note=none(components),
            dark_event=none(nodes),
            pump_event=none(pumps),
            junction_event=none(junctions),
            road_crew_event=none(roads),
            water_crew_event=none(components),
            scene_event=none(layout.scene_from.size),
            hospital_event=none(layout.hospital_from.size),
            crew_events={
                "crew_travel_power": none(len(layout.crew_power.node)),
                "crew_travel_water": none(components),
                "crew_travel_road": none(roads),
            },
            dark=np.zeros(nodes, np.bool_),
            pump_on=np.ones(pumps, np.bool_),
            dry=np.zeros(junctions, np.bool_),
            short=np.zeros(junctions, np.bool_),
            pump_wanted_mw=layout.pump_rated_mw.copy(),
            water=WaterState(
                demand=layout.water.demand(known["start_hour"]) * known["water_demand_factor"],
                level=layout.water.tank_start.copy(),
                pump_open=np.ones(pumps, np.bool_),
                pipe_open=np.ones(len(layout.water.pipes), np.bool_),
                leak=np.zeros(junctions),
            ),
            totals=dict.fromkeys(
                (
                    "vehicles_demanded", "vehicles_assigned", "vehicles_stranded",
                    "vehicle_hours_delay", "unserved_water_m3", "water_pumped_m3",
                    "water_delivered_m3", "water_leaked_m3",
                ),
                0.0,
            ),
        )  # fmt: skip

    def remember(self, event: str) -> int:
        self.events.append(event)
        return len(self.events) - 1


class Desk:
    """One step of one part of the city: reads inputs, emits events, publishes outputs."""

    def __init__(self, layout: CityLayout, state: State, step: Step) -> None:
        self.layout = layout
        self.state = state
        self.step = step
        self.known = state.parameters
        self.hour = self.known["start_hour"] + step.time_ns / HOUR_NS

    def send_crews(
        self,
        actions: Iterable[Action],
        names: tuple[str, ...],
        repairs: Repairs,
        codes: Codes,
        note: Codes,
        travel_min: Vector,
    ) -> None:
        """Carry out orders; each is an event caused by the order and by the damage."""
        for action in actions:
            index = names.index(action.entity)
            minutes = float(travel_min[index])
            more = repairs.assign(index, round(action.value), self.step.time_ns, minutes / 60.0)
            if not more:
                continue
            if more > 0:
                kind = "crew_assigned"
                text = f"{more} crew(s) sent to {action.entity}, there in {minutes:.0f} min"
            else:
                kind, text = "crew_recalled", f"{-more} crew(s) recalled from {action.entity}"
            causes = [action.cause, self.state.events[note[index]]]
            codes[index] = self.emit(kind, action.entity, text, causes)

    def publish_repairs(self, kind: str, repairs: Repairs, crew: Codes, note: Codes) -> None:
        noted = self.noted(note)
        self.publish(f"{kind}_intact", repairs.intact, noted)
        self.publish(f"{kind}_remaining_work", repairs.remaining_h, noted)
        busy = self.noted(np.where(crew > 0, crew, note))
        self.publish(f"{kind}_crew_busy", repairs.crews.astype(np.float64), busy)

    def noted(self, codes: Codes) -> dict[int, str]:
        return {int(i): self.state.events[codes[i]] for i in np.flatnonzero(codes)}

    def publish(
        self, name: str, values: Vector | list[float], causes: Mapping[int, str] | None = None
    ) -> None:
        """Publish what differs from what was last shown, and the causes of what differs."""
        new = np.array(values, dtype=np.float64)
        old = self.state.shown.get(name)
        if old is not None:
            if np.array_equal(old, new):
                return
            causes = {i: cause for i, cause in (causes or {}).items() if old[i] != new[i]}
        self.state.shown[name] = new
        self.step.publish(name, new, causes)

    def explain(self, name: str, values: Vector, codes: Codes, new: Codes, restored: int) -> None:
        """Publish with a cause for each entry whose explanation is another than before."""
        causes = {}
        for index in np.flatnonzero(new != codes):
            code = int(new[index]) or restored
            if code:
                causes[int(index)] = self.state.events[code]
        codes[:] = new
        shown = self.state.shown.get(name)
        if causes or shown is None or not np.array_equal(shown, values):
            self.state.shown[name] = values
            self.step.publish(name, values, causes)

    def emit(
        self, kind: str, entity: str, text: str, causes: Iterable[int | str | np.int64]
    ) -> int:
        """Emit with causes given as ids or as codes of remembered events; its own code."""
        named = [c if isinstance(c, str) else self.state.events[int(c)] for c in causes]
        return self.state.remember(self.step.emit(kind, entity, text, named))


def hours_text(time_ns: int) -> str:
    return f"{time_ns / HOUR_NS:.2f} h"
