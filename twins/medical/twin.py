"""Shows the flow of patients to the federation as the medical twin."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

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
    LinearBlock,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.medical.care import PARTS, TICK_MIN, Care
from twins.medical.flexibility import hospital_block
from twins.medical.futures import diverge
from twins.medical.layout import region_layout, region_parameters
from twins.regions import data_hash, hospital_routes, scene_routes

SEVERITIES = (1, 2, 3, 4)
SICK = {"sick_ward": 2, "sick_icu": 3}
"""The inputs that tell of an epidemic's patients, and how severely ill these are."""
LOAD_STEP = 0.01
"""Relative change from which a hospital tells its new load and water need."""


def _input(name: str, kind: str, unit: str, initial: float, high: float, doc: str) -> Variable:
    return Variable(name, kind, unit, Causality.INPUT, initial, 0.0, high, doc)


def _output(
    name: str, kind: str, unit: str, doc: str, initial: float = 0.0, high: float = float("inf")
) -> Variable:
    return Variable(name, kind, unit, Causality.OUTPUT, initial, 0.0, high, doc)


@lru_cache(maxsize=8)
def _description(region: str) -> Description:
    layout = region_layout(region)
    entities = [
        *(Entity(h.id, "hospital", h.name, h.lon_deg, h.lat_deg) for h in layout.hospitals),
        *(
            Entity(zone, "zone", zone, lon, lat)
            for zone, lon, lat in zip(
                layout.zones, layout.zone_lon_deg, layout.zone_lat_deg, strict=True
            )
        ),
        *(Entity(f"{a}>{b}", "scene_route") for a, b in scene_routes(region)),
        *(Entity(f"{a}>{b}", "hospital_route") for a, b in hospital_routes(region)),
        Entity(SYSTEM, SYSTEM),
    ]
    severity_docs = ("first aid", "hospital care", "life-threatening", "dead at once")
    variables = [
        *(
            _input(
                f"injured_severity{s}", "zone", "persons", 0.0, 1e6, f"cumulative, Hazus {s}: {doc}"
            )
            for s, doc in zip(SEVERITIES, severity_docs, strict=True)
        ),
        _input("sick_ward", "zone", "persons", 0.0, 1e6, "cumulative: ill, need a ward bed"),
        _input("sick_icu", "zone", "persons", 0.0, 1e6, "cumulative: ill, need intensive care"),
        _input("present_ward", SYSTEM, "persons", 0.0, 1e6, "sick on wards when the run begins"),
        _input("present_icu", SYSTEM, "persons", 0.0, 1e6, "sick in intensive care then"),
        _input("hospital_damage_state", "hospital", "1", 0.0, 4.0, "Hazus damage state"),
        _input("hospital_power", "hospital", "1", 1.0, 1.0, "share of the wanted grid power"),
        _input("hospital_water", "hospital", "1", 1.0, 1.0, "share of the needed water"),
        _input("scene_time", "scene_route", "min", 8.0, 1440.0, "600 or more: no way"),
        _input("hospital_time", "hospital_route", "min", 10.0, 1440.0, "600 or more: no way"),
        _output("hospital_load", "hospital", "MW", "wanted of the grid"),
        _output("hospital_water_need", "hospital", "m^3/h", "wanted of the water network"),
        _output("beds_occupied", "hospital", "1", "patients on wards"),
        _output("icu_occupied", "hospital", "1", "patients in intensive care and theatre"),
        _output("generator_on", "hospital", "1", "1: runs on its generator", high=1.0),
        _output("fuel_left", "hospital", "h", "at essential load; every quarter of an hour"),
        _output("functional_beds", "hospital", "1", "ward and intensive-care beds in use"),
        _output("queue", "hospital", "1", "patients waiting for a bed"),
        _output("patients_waiting", "zone", "1", "found or not, not yet picked up"),
        _output("ambulances_busy", SYSTEM, "1", "ambulances on a call"),
        _output("ambulance_response_min", SYSTEM, "min", "mean so far, call to arrival at scene"),
        _output("deaths", SYSTEM, "persons", "at once, waiting, in care, and ordinary patients"),
        _output(
            "untreated_after_6h",
            SYSTEM,
            "persons",
            "casualties of severity 2 and 3, and an epidemic's patients, without definitive care "
            "6 h after injury or onset",
        ),
        _output("treated", SYSTEM, "persons", "patients whose definitive care has begun"),
        _output(
            "patients_arisen", SYSTEM, "persons", "ordinary, hurt, and inpatients at the start"
        ),
        _output("patients_in_system", SYSTEM, "persons", "on the scene, under way or in hospital"),
        _output("patients_discharged", SYSTEM, "persons", "sent home or cared for by themselves"),
        _output("patients_dead", SYSTEM, "persons", "all who died"),
    ]
    return Description(
        model="ambulances-and-hospitals",
        version="1.0",
        domain="medical",
        entities=tuple(entities),
        variables=tuple(variables),
        time=TimePolicy(period_ns=MINUTE_NS),
        fidelity=Fidelity.DETAILED,
        parameters=region_parameters(region),
        kpis=("ambulance_response_min", "deaths", "untreated_after_6h"),
        doc=(
            "Discrete-event flow of ordinary emergency patients and casualties through "
            "ambulances and hospitals that may lack power, water or a sound building."
        ),
        data_hash=data_hash(region),
    )


STATES = Snapshots(*PARTS)


class MedicalTwin(Twin):
    """Ambulances, hospitals and patients of a region, looked at every minute.

    Between two minutes events happen at their own times; what an input tells counts from
    the step that brings it. A minute in which nothing is due costs a few microseconds.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.layout = region_layout(region)
        self.care: Care | None = None
        self.parameters: dict[str, float] = {}
        self.published: dict[str, float] = {}
        self.shown: dict[str, list[float]] = {}
        self.told: dict[str, list[str]] = {}
        self.waiting_shown: Vector = np.zeros(0)
        self.known: dict[str, Vector] = {}
        self.usual_scene = False
        self.usual_hospital = False
        self.next_slow_min = 0.0

    def describe(self) -> Description:
        return _description(self.region)

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.parameters = dict(parameters)
        self.care = Care(self.layout, parameters, seed)
        self.published, self.shown, self.told = {}, {}, {}
        self.waiting_shown = np.full(len(self.layout.zones), -1.0)
        hospitals, zones = len(self.layout.hospitals), len(self.layout.zones)
        self.known = {f"injured_severity{s}": np.zeros(zones) for s in SEVERITIES}
        self.known |= {name: np.zeros(zones) for name in SICK}
        self.known["hospital_damage_state"] = np.zeros(hospitals)
        self.known["hospital_power"] = np.ones(hospitals)
        self.known["hospital_water"] = np.ones(hospitals)
        self.usual_scene = self.usual_hospital = False
        self.next_slow_min = 0.0

    def advance(self, step: Step) -> None:
        care = self._care
        now_min = step.time_ns / MINUTE_NS
        busy = care.advance(now_min, step)
        if step.changed:
            self._take_in(care, step)
            busy = True
        if not busy:
            return
        states_changed = self._publish_hospitals(care, step)
        self._publish_patients(care, step)
        if states_changed or now_min >= self.next_slow_min:
            self._publish_slow(care, step, states_changed)
            self.next_slow_min = (now_min // TICK_MIN + 1) * TICK_MIN

    @property
    def _care(self) -> Care:
        if self.care is None:
            raise RuntimeError("the medical twin was not opened")
        return self.care

    def _take_in(self, care: Care, step: Step) -> None:
        """Tell the engine what changed outside: roads first, then hospitals, then people."""
        changed = step.changed
        if "scene_time" in changed:
            care.set_scene_times(step["scene_time"], usual=not self.usual_scene)
            self.usual_scene = True
        if "hospital_time" in changed:
            care.set_hospital_times(step["hospital_time"], usual=not self.usual_hospital)
            self.usual_hospital = True
        for name, tell in (
            ("hospital_damage_state", care.lifelines.set_damage),
            ("hospital_power", care.lifelines.set_power),
            ("hospital_water", care.lifelines.set_water),
        ):
            if name in changed:
                values = step[name]
                for index in np.flatnonzero(values != self.known[name]).tolist():
                    tell(index, float(values[index]))
                self.known[name] = values
        if "present_ward" in changed or "present_icu" in changed:
            care.sickness.fill(float(step["present_ward"][0]), float(step["present_icu"][0]))
        for severity in SEVERITIES:
            if people := self._newly(step, f"injured_severity{severity}"):
                care.arrivals.injure(severity, people)
        for name, severity in SICK.items():
            if people := self._newly(step, name):
                care.sickness.come(severity, people)

    def _newly(self, step: Step, name: str) -> list[tuple[int, int]]:
        """By how much whole persons of a cumulative input have grown, as (zone, how many)."""
        if name not in step.changed:
            return []
        values = np.maximum(np.floor(step[name] + 0.5), self.known[name])
        new = values - self.known[name]
        self.known[name] = values
        return [(zone, int(new[zone])) for zone in np.flatnonzero(new).tolist()]

    def _publish_hospitals(self, care: Care, step: Step) -> bool:
        """Publish what changed at hospitals; whether their power or beds did."""
        hospitals = care.hospitals
        states_changed = self._show(
            step, "functional_beds", [float(h.functional_beds) for h in hospitals]
        )
        states_changed |= self._show(
            step, "generator_on", [float(h.generator_on) for h in hospitals]
        )
        self._show(step, "beds_occupied", [float(h.ward.occupied) for h in hospitals])
        self._show(step, "icu_occupied", [float(h.icu.occupied) for h in hospitals])
        self._show(step, "queue", [float(h.queue) for h in hospitals])
        return states_changed

    def _publish_slow(self, care: Care, step: Step, states_changed: bool) -> None:
        p = self.parameters
        sites, hospitals = self.layout.hospitals, care.hospitals
        pairs = list(zip(sites, hospitals, strict=True))
        least = 0.0 if states_changed else LOAD_STEP
        self._show(step, "fuel_left", [h.fuel_at(care.records.now) for h in hospitals])
        self._show(step, "hospital_load", [s.load_mw * h.load_factor(p) for s, h in pairs], least)
        self._show(
            step,
            "hospital_water_need",
            [s.water_m3_per_h * h.water_factor(p) for s, h in pairs],
            least,
        )

    def _show(self, step: Step, name: str, values: list[float], least: float = 0.0) -> bool:
        """Publish a vector over hospitals if an entry moved by more than a relative step."""
        before = self.shown.get(name)
        if before == values:
            return False
        if before is not None and least > 0.0:
            moves = (
                abs(new - old) > least * abs(old) for new, old in zip(values, before, strict=True)
            )
            if not any(moves):
                return False
        told = self.told.setdefault(name, [""] * len(values))
        causes = {}
        for index, hospital in enumerate(self._care.hospitals):
            event = hospital.latest_event
            if event != told[index] and (before is None or before[index] != values[index]):
                causes[index] = told[index] = event
        step.publish(name, values, causes)
        self.shown[name] = values
        return True

    def _publish_patients(self, care: Care, step: Step) -> None:
        for name, value in (
            ("ambulances_busy", care.dispatch.busy),
            ("ambulance_response_min", care.dispatch.mean_response_min),
            ("deaths", care.dead),
            ("untreated_after_6h", care.arrivals.untreated_after_6h),
            ("treated", care.wards.treated),
            ("patients_arisen", care.records.arisen),
            ("patients_in_system", care.in_system),
            ("patients_discharged", care.discharged),
            ("patients_dead", care.dead),
        ):
            if self.published.get(name) != value:
                self.published[name] = value
                step.publish(name, value)
        waiting = care.records.waiting
        if not np.array_equal(waiting, self.waiting_shown):
            self.waiting_shown = waiting.copy()
            step.publish("patients_waiting", waiting)

    def snapshot(self) -> bytes:
        own = (
            self.parameters,
            self._care.records.seed,
            self.published,
            self.shown,
            self.told,
            self.waiting_shown,
            self.known,
            self.usual_scene,
            self.usual_hospital,
            self.next_slow_min,
        )
        return STATES.pack((self._care.state(), own))

    def restore(self, state: bytes) -> None:
        changing, own = STATES.unpack(state)
        (
            self.parameters,
            seed,
            self.published,
            self.shown,
            self.told,
            self.waiting_shown,
            self.known,
            self.usual_scene,
            self.usual_hospital,
            self.next_slow_min,
        ) = own
        self.care = Care(self.layout, self.parameters, seed)
        self.care.load(changing)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> None:
        """Calls to come and the fates of those who are in care or wait for it are drawn anew.

        What is in the hospitals' tanks is published, and stays.
        """
        if believed:
            raise TwinError(Reason.UNKNOWN_VARIABLE, "patients are no matter of belief")
        if (seed, dict(parameters)) == (self._care.records.seed, self.parameters):
            return
        self.parameters = dict(parameters)
        diverge(self._care.records, seed, self.parameters)

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        """What hospitals have in tanks is believed before a run begins, and known in its course."""
        parameters = self.parameters or {p.name: p.default for p in self.describe().parameters}
        if self.care is None or self.care.records.now <= 0.0:
            return hospital_block(self.layout, parameters, periods_ns)
        now_min, hospitals = self.care.records.now, self.care.hospitals
        return hospital_block(
            self.layout,
            parameters,
            periods_ns,
            [h.power_left_at(now_min) for h in hospitals],
            [h.water_left_at(now_min, parameters) for h in hospitals],
        )
