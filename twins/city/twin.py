"""Runs the roads and the water of a city step by step, with their damage and their repair."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from federation.snapshot import Snapshots
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Fidelity,
    LinearBlock,
    Parameter,
    Risk,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.city.desk import RoadKey, State
from twins.city.flexibility import Prices, build_block
from twins.city.layout import CityLayout, read_layout
from twins.city.mains import Mains
from twins.city.roads import CUT_MIN, Equilibrium
from twins.city.streets import Streets
from twins.city.water import Hydraulics, WaterState
from twins.regions import assumptions, data_hash
from twins.repair import MOST_CREWS, Repairs, not_believed

PERIOD_NS = 15 * MINUTE_NS

ASSUMED = (
    "start_hour",
    "trips_scale",
    "traffic_after_shock",
    "traffic_recovery_h",
    "road_closed_from_state",
    "damaged_road_capacity",
    "signal_dark_capacity",
    "signal_backup_h",
    "emergency_speed_factor",
    "crew_mobilise_min",
    "access_speed_kmh",
    "access_detour",
    "water_demand_factor",
    "pressure_min_m",
    "pressure_required_m",
    "leak_area_share",
    "pump_efficiency",
    "value_unserved_water_m3",
    "value_vehicle_hour",
)

OWN = (
    Parameter(
        "signal_dark_wait_min",
        "min",
        0.25,
        0.0,
        2.0,
        "Extra wait at a junction whose signals are dark.",
        "assumption: the 15 s at which an all-way stop falls from level of service B to C "
        "(Highway Capacity Manual, from memory)",
    ),
    Parameter(
        "stranded_trip_delay_h",
        "h",
        2.0,
        0.0,
        24.0,
        "What a trip that no open road allows counts for in vehicle_hours_delay.",
        "assumption: as much as a trip that takes two hours longer",
    ),
    Parameter(
        "assignment_gap",
        "1",
        1e-3,
        1e-6,
        1e-2,
        "Relative gap to which traffic is brought into equilibrium.",
        "assumption: a thousandth, well below the error of the demand",
    ),
    Parameter(
        "pump_power_needed",
        "1",
        0.5,
        0.05,
        1.0,
        "Share of its power below which a pump stops.",
        "assumption: undervoltage protection trips a motor at about half its supply",
    ),
    Parameter(
        "main_speed_m_s",
        "m/s",
        2.0,
        0.5,
        4.0,
        "Flow speed that bounds a main in the linear block.",
        "assumption: usual upper end of design speeds of trunk mains",
    ),
)


def _inputs() -> tuple[Variable, ...]:
    def one(name: str, kind: str, unit: str, initial: float, high: float, doc: str) -> Variable:
        return Variable(name, kind, unit, Causality.INPUT, initial, min(initial, 0.0), high, doc)

    return (
        one("road_damage_state", "road", "1", 0, 4, "0 none to 4 complete, as last hit"),
        one("road_repair_work", "road", "h", 0, np.inf, "crew-hours caused since the start"),
        one("water_damage_state", "water_component", "1", 0, 4, "0 none to 4; mains: 1 leaks"),
        one("water_repair_work", "water_component", "h", 0, np.inf, "crew-hours caused so far"),
        one("signal_power", "road_node", "1", 1, 1, "supply of the signals at a node"),
        one("pump_power", "pump", "1", 1, 1, "supply of a pump's motor"),
        one(
            "hospital_water_need", "hospital", "m^3/h", -1, np.inf,
            "replaces the hospital's share of its junction's demand; negative: as usual",
        ),
    )  # fmt: skip


def _outputs() -> tuple[Variable, ...]:
    def one(
        name: str, kind: str, unit: str, initial: float, high: float = np.inf, doc: str = ""
    ) -> Variable:
        return Variable(name, kind, unit, Causality.OUTPUT, initial, 0.0, high, doc)

    crew = f"call-out, drive from the nearest depot, way on local streets; drive <= {CUT_MIN} min"
    cut = f"{CUT_MIN} min where no open road leads"
    return (
        one("scene_time", "scene_route", "min", 10, CUT_MIN, f"ambulance under lights; {cut}"),
        one("hospital_time", "hospital_route", "min", 10, CUT_MIN, f"as scene_time; {cut}"),
        one("crew_travel_power", "power_component", "min", 60, doc=crew),
        one("crew_travel_water", "water_component", "min", 60, doc=crew),
        one("crew_travel_road", "road", "min", 60, doc=crew),
        one("junction_service", "junction", "1", 1, 1, "water delivered over required"),
        one("hospital_water", "hospital", "1", 1, 1, "service of its junction; 1 outside"),
        one("pump_load", "pump", "MW", 0, doc="drawn, or wanted where power fails; 0 if broken"),
        one("road_intact", "road", "1", 1, 1, "1: no repair work left"),
        one("water_intact", "water_component", "1", 1, 1, "1: no repair work left"),
        one("road_remaining_work", "road", "h", 0, doc="crew-hours"),
        one("water_remaining_work", "water_component", "h", 0, doc="crew-hours"),
        one("road_crew_busy", "road", "1", 0, 3, "crews on the way or at work"),
        one("water_crew_busy", "water_component", "1", 0, 3, "crews on the way or at work"),
        one("link_flow", "road", "1/h", 0, doc="vehicles in both directions"),
        one("road_open", "road", "1", 1, 1, "0: closed to traffic"),
        one("unserved_water_m3", SYSTEM, "m^3", 0, doc="required less delivered, cumulative"),
        one(
            "vehicle_hours_delay", SYSTEM, "h", 0,
            doc="cumulative: time of all who travel less what the same trips take in the "
            "undamaged network at equilibrium, plus stranded_trip_delay_h per stranded trip",
        ),
        one("vehicles_demanded", SYSTEM, "1", 0, doc="cumulative = assigned + stranded"),
        one("vehicles_assigned", SYSTEM, "1", 0, doc="trips that an open road allows"),
        one("vehicles_stranded", SYSTEM, "1", 0, doc="trips that no open road allows"),
        one("people_without_water", SYSTEM, "1", 0, doc="people times (1 - service)"),
        one("water_pumped_m3", SYSTEM, "m^3", 0, doc="cumulative"),
        one("water_delivered_m3", SYSTEM, "m^3", 0, doc="cumulative"),
        one("water_leaked_m3", SYSTEM, "m^3", 0, doc="cumulative"),
        one("water_stored_m3", SYSTEM, "m^3", 0, doc="above the lowest level of the tanks"),
        one("traffic_gap", SYSTEM, "1", 0, 1, "relative gap of the present traffic flows"),
        one("signals_out", SYSTEM, "1", 0, doc="junctions whose signals are dark"),
    )  # fmt: skip


STATES = Snapshots(State, Repairs, RoadKey, WaterState)


class CityTwin(Twin):
    """Traffic at user equilibrium and a pressure-driven water network, every 15 minutes.

    A step first lets the time since the last one pass in the state that was then, then
    takes note of repairs, damage, power and orders, and publishes what holds from now.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.layout: CityLayout = read_layout(region)
        self._hydraulics: Hydraulics | None = None
        self._state: State | None = None
        self._traffic: Equilibrium | None = None

    def describe(self) -> Description:
        declared = assumptions(self.region)
        return Description(
            model="twins.city.twin:CityTwin",
            version="1",
            domain="city",
            entities=self.layout.entities,
            variables=_inputs() + _outputs(),
            time=TimePolicy(period_ns=PERIOD_NS),
            fidelity=Fidelity.REDUCED,
            parameters=tuple(declared[name] for name in ASSUMED) + OWN,
            actuators=tuple(
                Actuator(
                    f"assign_crew_{short}",
                    kind,
                    "1",
                    0,
                    MOST_CREWS,
                    0,
                    Risk.LOW,
                    0,
                    "0 recalls the crews; work already done stays done",
                    "Crews at a damaged component; they leave now and work until it is whole.",
                )
                for short, kind in (("road", "road"), ("water", "water_component"))
            ),
            kpis=("unserved_water_m3", "vehicle_hours_delay"),
            doc=__doc__ or "",
            data_hash=data_hash(self.region),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        """Nothing is drawn by lot: the seed has no effect."""
        known = dict(parameters)
        self._state = State.fresh(self.layout, known)
        self._traffic = None
        self._open_hydraulics(known)

    def _open_hydraulics(self, parameters: Mapping[str, float]) -> None:
        self.close()
        self._hydraulics = Hydraulics(
            self.layout.water, parameters["pressure_min_m"], parameters["pressure_required_m"]
        )

    def snapshot(self) -> bytes:
        return STATES.pack(self._state)

    def restore(self, state: bytes) -> None:
        """Traffic is found again from what it depends on, which gives the same bits."""
        self._state = STATES.unpack(state)
        assert self._state is not None
        self._traffic = None
        self._open_hydraulics(self._state.parameters)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> None:
        """The city draws no lots: only parameters and the believed work left count."""
        assert self._state is not None
        self._state.parameters = dict(parameters)
        self._open_hydraulics(self._state.parameters)
        repairs = {
            "road_remaining_work": self._state.road_repairs,
            "water_remaining_work": self._state.water_repairs,
        }
        for name, work_h in believed.items():
            if name not in repairs:
                raise not_believed("city", name)
            repairs[name].believe(work_h)

    def close(self) -> None:
        if self._hydraulics is not None:
            self._hydraulics.close()
            self._hydraulics = None

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        assert self._state is not None
        known = self._state.parameters
        prices = Prices(
            water_usd_per_m3=known["value_unserved_water_m3"],
            vehicle_usd_per_h=known["value_vehicle_hour"],
            stranded_h=known["stranded_trip_delay_h"],
        )
        return build_block(
            self.region,
            np.array(periods_ns) / HOUR_NS,
            prices,
            demand_factor=known["water_demand_factor"],
            trips_factor=known["trips_scale"],
            main_speed_m_s=known["main_speed_m_s"],
            level_m=self._state.water.level,
        )

    def advance(self, step: Step) -> None:
        assert self._state is not None
        assert self._hydraulics is not None
        streets = Streets(self.layout, self._state, step)
        mains = Mains(self.layout, self._state, step, self._hydraulics)
        for part in (streets, mains):
            part.pass_time()
            part.finish_repairs()
        for part in (streets, mains):
            part.note_damage()
        self._traffic = streets.drive(self._traffic)
        mains.flow()
        for name, total in self._state.totals.items():
            streets.publish(name, [total])
