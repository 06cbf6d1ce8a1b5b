"""Stories about the medical twin: queues, lifelines of hospitals, survival and what causes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from federation.errors import Reason, ScenarioError
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    Event,
    Session,
    StepInput,
    StepResult,
    Vector,
)
from twins.medical.beds import BedPool
from twins.medical.calendar import Calendar, Kind
from twins.medical.care import Care
from twins.medical.layout import HospitalSite, Layout, region_layout
from twins.medical.notices import death_notice
from twins.medical.patients import Patients, State
from twins.medical.survival import CHANCE, arrest_chance, chance, rescue_limit_min
from twins.medical.twin import MedicalTwin
from twins.regions import hospital_routes, region_rows, scene_routes

LAYOUT = region_layout("shelby")
ZONES, HOSPITALS = len(LAYOUT.zones), len(LAYOUT.hospitals)
LE_BONHEUR = next(i for i, h in enumerate(LAYOUT.hospitals) if h.for_children)
REGIONAL_ONE = next(
    i for i, h in enumerate(LAYOUT.hospitals) if h.trauma_level == 1 and not h.for_children
)
UNIVERSITY = next(i for i, h in enumerate(LAYOUT.hospitals) if "University" in h.name)
NO_FAILED_START = {"generator_failure": 0.0, "fuel_spread": 0.0}
QUIET = {"calls_per_day": 1e-6}


@lru_cache(maxsize=1)
def free_flow() -> tuple[Vector, Vector]:
    """Minutes on the empty road network, to scenes and to hospitals."""
    index = {row["node"]: i for i, row in enumerate(region_rows("shelby", "road_nodes.csv"))}
    best: dict[tuple[int, int], float] = {}
    for row in region_rows("shelby", "road_links.csv"):
        pair = index[row["from_node"]], index[row["to_node"]]
        best[pair] = min(best.get(pair, np.inf), float(row["free_flow_min"]))
    tails, heads = np.array(list(best)).T
    graph = coo_matrix((np.array(list(best.values())), (tails, heads)), (len(index),) * 2)
    minutes = dijkstra(graph.tocsr())

    def along(routes: Iterable[tuple[str, str]]) -> Vector:
        times = np.array([minutes[index[a], index[b]] for a, b in routes])
        assert np.isfinite(times).all()
        return times

    return along(scene_routes("shelby")), along(hospital_routes("shelby"))


@dataclass
class Change:
    """New inputs and, by variable, the one event that explains all their entries."""

    inputs: dict[str, Vector]
    because: dict[str, str] = field(default_factory=dict)

    def causes(self) -> dict[str, dict[int, tuple[str, ...]]]:
        return {
            name: dict.fromkeys(range(self.inputs[name].size), (event,))
            for name, event in self.because.items()
        }


@dataclass
class Story:
    """What a session told so far."""

    session: Session
    minute: int = -1
    now: dict[str, Vector] = field(default_factory=dict)
    causes: dict[str, dict[int, str]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)

    @property
    def twin(self) -> MedicalTwin:
        assert isinstance(self.session.twin, MedicalTwin)
        return self.session.twin

    @property
    def care(self) -> Care:
        assert self.twin.care is not None
        return self.twin.care

    def value(self, name: str, index: int = 0) -> float:
        return float(self.now[name][index])

    def of(self, kind: str, entity: str | None = None) -> list[Event]:
        return [e for e in self.events if e.kind == kind and entity in (None, e.entity)]

    def origins(self, event: Event) -> set[str]:
        """All events behind one, through this twin's own events."""
        known = {e.id: e for e in self.events}
        found: set[str] = set()
        todo = list(event.causes)
        while todo:
            cause = todo.pop()
            if cause not in found:
                found.add(cause)
                todo.extend(known[cause].causes if cause in known else ())
        return found

    def go(
        self,
        until_min: int,
        changes: Mapping[int, Change] | None = None,
        each: Callable[[Story], None] | None = None,
    ) -> Story:
        scene, hospital = free_flow()
        for minute in range(self.minute + 1, until_min + 1):
            inputs: dict[str, Vector] = {}
            causes: dict[str, dict[int, tuple[str, ...]]] = {}
            if minute == 1:
                inputs = {"scene_time": scene, "hospital_time": hospital}
            if changes and minute in changes:
                inputs = {**inputs, **changes[minute].inputs}
                causes = changes[minute].causes()
            result = self.session.advance(StepInput(minute * MINUTE_NS, 0, inputs, causes))
            self.minute = minute
            self.now.update(result.outputs)
            for name, why in result.causes.items():
                self.causes.setdefault(name, {}).update(why)
            self.events.extend(result.events)
            self.results.append(result)
            if each:
                each(self)
        return self


def begin(seed: int = 1, parameters: Mapping[str, float] | None = None) -> Story:
    session = Session(MedicalTwin(), "medical")
    session.open(seed, parameters or {})
    return Story(session)


def casualties(seed: int = 0, **by_severity: int) -> Change:
    """Casualties spread over the zones like the people, all because of `disaster/1`."""
    people = np.array(LAYOUT.zone_people)
    rng = np.random.default_rng(seed)
    inputs = {
        f"injured_{name}": rng.multinomial(size, people / people.sum()).astype(np.float64)
        for name, size in by_severity.items()
    }
    return Change(inputs, dict.fromkeys(inputs, "disaster/1"))


def hospitals(value: float, *changed: int, usual: float = 1.0) -> Vector:
    values = np.full(HOSPITALS, usual)
    values[list(changed)] = value
    return values


def all_at_once(*changes: Change) -> Change:
    merged = Change({})
    for change in changes:
        merged.inputs.update(change.inputs)
        merged.because.update(change.because)
    return merged


# -- queues against Erlang ------------------------------------------------------------


def erlang_b(servers: int, offered: float) -> float:
    blocking = 1.0
    for n in range(1, servers + 1):
        blocking = offered * blocking / (n + offered * blocking)
    return blocking


def erlang_c(servers: int, offered: float) -> float:
    blocking = erlang_b(servers, offered)
    return blocking / (1.0 - offered / servers * (1.0 - blocking))


def run_beds(servers: int, offered: float, patients: int, seed: int, queueing: bool) -> float:
    """Share of Poisson arrivals who find no bed free; service is exponential with mean 1."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.standard_exponential(patients)) / offered
    stays = rng.standard_exponential(patients)
    calendar, pool = Calendar(), BedPool(servers)
    arrive, leave = 0, 1
    for patient, time in enumerate(arrivals.tolist()):
        calendar.at(time, arrive, patient)
    refused = 0
    while calendar.heap:
        now, _, kind, patient, _ = calendar.pop()
        if kind == leave:
            pool.leave()
            served = pool.next_waiting(lambda _: True)
            if served is not None:
                calendar.at(now + stays[served], leave, served)
        elif pool.take():
            calendar.at(now + stays[patient], leave, patient)
        else:
            refused += 1
            if queueing:
                pool.wait(now, patient)
    return refused / patients


@pytest.mark.parametrize(
    ("servers", "offered", "published"),
    [(10, 8.0, 0.1216610643), (20, 15.0, 0.04559321559), (50, 45.0, 0.05410447216)],
)
def test_beds_without_a_queue_turn_away_what_erlang_says(
    servers: int, offered: float, published: float
) -> None:
    assert erlang_b(servers, offered) == pytest.approx(published, rel=1e-9)
    assert run_beds(servers, offered, 150_000, 7, queueing=False) == pytest.approx(
        published, rel=0.05
    )


@pytest.mark.parametrize(
    ("servers", "offered", "published"),
    [(5, 4.0, 0.5541125541), (10, 8.0, 0.4091801508), (20, 17.0, 0.3850562299)],
)
def test_beds_with_a_queue_let_wait_whom_erlang_says(
    servers: int, offered: float, published: float
) -> None:
    assert erlang_c(servers, offered) == pytest.approx(published, rel=1e-9)
    assert run_beds(servers, offered, 200_000, 11, queueing=True) == pytest.approx(
        published, rel=0.05
    )


class Silence:
    """A journal that nobody reads."""

    def emit(self, kind: str, entity: str, text: str, causes: Iterable[str] = ()) -> str:
        return ""

    def cause(self, variable: str, index: int) -> tuple[str, ...]:
        return ()


def test_a_fleet_at_the_scene_of_all_calls_is_an_m_m_c_queue() -> None:
    """Ten ambulances without ways to go, as servers: the mean wait of Erlang C."""
    site = HospitalSite(
        id="h", name="h", role="acute", lon_deg=0.0, lat_deg=0.0, staffed_beds=1, icu_beds=0,
        occupancy=0.0, icu_occupancy=0.0, trauma_level=0, load_mw=0.0, water_m3_per_h=0.0,
        base=0, origin=0, column=0, scene=0, access_km=0.0,
    )  # fmt: skip
    spot = Layout(
        hospitals=(site,), zones=("z",), zone_people=(1.0,), zone_scene=(0,),
        zone_access_km=(0.0,), zone_lon_deg=(0.0,), zone_lat_deg=(0.0,),
        bases=1, scenes=1, columns=1, post_base=(0,) * 10, post_scene=(0,) * 10,
    )  # fmt: skip
    defaults = {p.name: p.default for p in MedicalTwin().describe().parameters}
    per_min, service_min = 0.8, 10.0
    care = Care(
        spot,
        {
            **defaults,
            "calls_per_day": per_min * 1440.0,
            "transported_share": 0.0,
            "critical_share": 0.0,
            "arrest_share": 0.0,
            "call_handling_min": 0.0,
            "scene_min": service_min,
            "scene_cv": 1.0,
        },
        seed=3,
    )
    care.set_scene_times(np.zeros(1))
    care.advance(90 * 1440.0, Silence())
    wait_min = erlang_c(10, per_min * service_min) / (10 / service_min - per_min)
    assert care.dispatch.responses > 100_000
    assert care.dispatch.mean_response_min == pytest.approx(wait_min, rel=0.08)


# -- ordinary days ---------------------------------------------------------------------


def test_on_an_ordinary_day_ambulances_come_in_time_and_beds_stay_in_balance() -> None:
    """Memphis aims at 8 minutes on average (2015) and does not always meet it."""
    story = begin()
    story.go(0)
    before = story.now["beds_occupied"].sum() + story.now["icu_occupied"].sum()
    story.go(3 * 1440)
    after = story.now["beds_occupied"].sum() + story.now["icu_occupied"].sum()
    assert 5.25 < story.value("ambulance_response_min") < 9.0
    assert after == pytest.approx(before, rel=0.03)
    assert not story.events
    assert story.value("untreated_after_6h") == 0.0
    assert 410 * 3 * 0.55 < story.value("treated") < 410 * 3 * 0.7


def test_nothing_is_published_in_a_minute_without_events() -> None:
    story = begin(parameters=QUIET)
    story.go(60)
    silent = [r for r in story.results if r.time_ns // MINUTE_NS % 15 not in (0, 1)]
    assert silent
    assert not any(r.outputs or r.events for r in silent)


def test_slower_roads_make_ambulances_later() -> None:
    scene, hospital = free_flow()
    slow = {1: Change({"scene_time": 2.0 * scene, "hospital_time": 2.0 * hospital})}
    quick, late = begin().go(720), begin().go(720, slow)
    assert late.value("ambulance_response_min") > quick.value("ambulance_response_min") + 1.0


# -- casualties ------------------------------------------------------------------------


def test_each_severity_has_its_own_way_through_the_system() -> None:
    story = begin(parameters=QUIET)
    story.go(59)
    idle_beds = story.now["beds_occupied"].sum() + story.now["icu_occupied"].sum()
    story.go(60, {60: casualties(severity1=400, severity4=7)})
    assert story.value("deaths") == 7.0
    killed = story.of("patient_died")
    assert [e.causes for e in killed] == [("disaster/1",)] * 7
    assert all(e.text == f"a person was killed at once in zone {e.entity}" for e in killed)
    story.go(600)
    assert story.value("deaths") == 7.0
    assert story.value("treated") == 0.0
    assert story.value("ambulances_busy") == 0.0
    assert story.now["beds_occupied"].sum() + story.now["icu_occupied"].sum() <= idle_beds
    story.go(601, {601: casualties(severity2=50, severity3=20)})
    story.go(1400)
    assert story.value("treated") > 30.0
    assert story.of("disaster_plan")[0].causes == ("disaster/1",)


def test_casualties_beyond_the_fleet_wait_and_their_deaths_name_the_exhausted_fleet() -> None:
    story = begin().go(720, {60: casualties(severity2=1500, severity3=300)})
    exhausted = story.of("ambulances_exhausted")[0]
    assert "disaster/1" in exhausted.causes
    assert story.value("untreated_after_6h") > 100.0
    blamed = [e for e in story.of("patient_died") if exhausted.id in e.causes]
    assert blamed
    assert all("disaster/1" in story.origins(e) for e in story.of("patient_died"))


def test_who_cannot_be_reached_dies_of_the_closed_road() -> None:
    closed = Change(
        {
            "scene_time": np.full(free_flow()[0].size, 1e4),
            "hospital_time": np.full(free_flow()[1].size, 1e4),
        },
        {"scene_time": "city/9", "hospital_time": "city/9"},
    )
    story = begin(parameters=QUIET)
    story.go(600, {60: closed, 61: casualties(severity3=100)})
    assert story.value("treated") == 0.0
    assert story.value("untreated_after_6h") == 100.0
    found_before = [e for e in story.of("patient_died") if "city/9" in e.causes]
    assert len(found_before) > 20
    assert all(f"waiting for an ambulance in zone {e.entity}" in e.text for e in found_before)
    scene, hospital = free_flow()
    story.go(720, {601: Change({"scene_time": scene, "hospital_time": hospital})})
    assert story.value("treated") > 0.0


def test_a_faster_road_saves_lives_of_the_same_people() -> None:
    """Common random numbers: everyone has the same luck in both runs."""
    scene, hospital = free_flow()
    shock = casualties(severity2=800, severity3=150, severity4=20)
    slow = all_at_once(shock, Change({"scene_time": 4.0 * scene, "hospital_time": 4.0 * hospital}))
    quick, late = begin().go(720, {60: shock}), begin().go(720, {60: slow})
    mine, theirs = quick.care.records.patients, late.care.records.patients
    for column in ("zone", "severity", "luck", "child", "scene_draw", "first_stay_min"):
        assert getattr(mine, column) == getattr(theirs, column)
    assert quick.value("deaths") < late.value("deaths")
    assert quick.value("untreated_after_6h") < late.value("untreated_after_6h")


def test_more_casualties_in_one_zone_change_nobody_elses_luck() -> None:
    few = Change({"injured_severity3": np.zeros(ZONES)})
    few.inputs["injured_severity3"][[3, 40]] = (5.0, 6.0)
    many = Change({"injured_severity3": few.inputs["injured_severity3"].copy()})
    many.inputs["injured_severity3"][[3, 20]] = (50.0, 10.0)

    def luck_in_zone_40(change: Change) -> list[float]:
        patients = begin(parameters=QUIET).go(10, {5: change}).care.records.patients
        return [u for u, z in zip(patients.luck, patients.zone, strict=True) if z == 40]

    assert len(luck_in_zone_40(few)) == 6
    assert luck_in_zone_40(few) == luck_in_zone_40(many)


# -- survival --------------------------------------------------------------------------


def test_the_survival_table_is_that_of_sacco() -> None:
    assert chance(12, 0.0, 30.0) == 0.98
    assert chance(7, 60.0, 30.0) == 0.49  # 7 falls to 5 in two intervals
    assert chance(7, 75.0, 30.0) == pytest.approx((0.49 + 0.35) / 2)
    assert (np.diff(CHANCE, axis=1) <= 0.0).all()
    assert CHANCE[5:10, 0].mean() == pytest.approx(1 - 0.28, abs=0.005)


@given(st.integers(0, 12), st.floats(1.0, 360.0))
@settings(max_examples=30)
def test_the_share_saved_by_care_after_a_wait_is_the_chance_of_the_table(
    score: int, wait_min: float
) -> None:
    luck = (np.arange(4000) + 0.5) / 4000
    limit = rescue_limit_min(np.full(luck.size, score), luck, 30.0)
    assert (limit > wait_min).mean() == pytest.approx(chance(score, wait_min, 30.0), abs=1e-3)


def test_an_arrest_is_survived_less_with_each_minute() -> None:
    assert arrest_chance(0.0, 0.0, 0.0) == 0.67
    assert arrest_chance(1.0, 1.0, 1.0) == pytest.approx(0.67 - 0.055)
    assert arrest_chance(20.0, 20.0, 20.0) == 0.0


# -- hospitals' lifelines --------------------------------------------------------------


def test_a_hospital_without_grid_runs_on_its_generator_until_the_fuel_is_gone() -> None:
    entity = LAYOUT.hospitals[UNIVERSITY].id
    dark = Change({"hospital_power": hospitals(0.0, UNIVERSITY)}, {"hospital_power": "energy/4"})
    parameters = {**NO_FAILED_START, "fuel_h": 24.0, "refuel_h": 0.0}
    story = begin(parameters=parameters).go(100, {100: dark})
    (started,) = story.of("hospital_on_generator", entity)
    assert started.causes == ("energy/4",)
    assert story.value("generator_on", UNIVERSITY) == 1.0
    assert story.causes["generator_on"][UNIVERSITY] == started.id
    assert not story.of("hospital_beds_lost")

    story.go(100 + 60 * 12)
    assert story.value("fuel_left", UNIVERSITY) == pytest.approx(12.0, abs=0.3)
    story.go(100 + 60 * 24 + 1)
    (empty,) = story.of("generator_out_of_fuel", entity)
    assert story.value("fuel_left", UNIVERSITY) == 0.0
    assert started.id in empty.causes
    (lost,) = story.of("hospital_beds_lost", entity)
    assert lost.causes == (empty.id,)
    beds = story.value("functional_beds", UNIVERSITY)
    assert beds <= 0.1 * LAYOUT.hospitals[UNIVERSITY].staffed_beds
    assert story.of("hospital_diverting", entity)

    light = Change({"hospital_power": hospitals(1.0)}, {"hospital_power": "energy/9"})
    story.go(story.minute + 1, {story.minute + 1: light})
    (back,) = story.of("hospital_on_grid", entity)
    assert "energy/9" in back.causes
    assert story.value("functional_beds", UNIVERSITY) == LAYOUT.hospitals[UNIVERSITY].staffed_beds


def test_intensive_care_patients_of_a_dark_hospital_are_taken_elsewhere_or_die_of_it() -> None:
    dark = Change({"hospital_power": hospitals(0.0, UNIVERSITY)}, {"hospital_power": "energy/4"})
    story = begin(parameters={"generator_failure": 1.0, **QUIET})
    story.go(99)
    before = story.now["icu_occupied"].copy()
    story.go(100 + 60 * 20, {100: dark})
    assert story.value("icu_occupied", UNIVERSITY) < 0.2 * before[UNIVERSITY]
    others = np.delete(story.now["icu_occupied"] - before, UNIVERSITY)
    died = story.of("patient_died")
    assert others.sum() > 0.0
    assert others.sum() + len(died) >= 0.5 * before[UNIVERSITY]
    assert all("energy/4" in story.origins(e) for e in died)
    waited = f"waiting for a bed at {LAYOUT.hospitals[UNIVERSITY].name}"
    assert f"an inpatient died: turned out of intensive care, {waited}" in {e.text for e in died}


def test_the_notice_of_a_death_says_who_died_and_where() -> None:
    """Every place of a patient has its words, and none names a place of another."""
    rest = {"hopeless": False, "severity": 3, "zone": 5, "batch": 0, "hospital": -1}
    told = {
        (State.HIDDEN, -1): f"not found or freed in time in zone {LAYOUT.zones[5]}",
        (State.CALLING, -1): f"waiting for an ambulance in zone {LAYOUT.zones[5]}",
        (State.CALLING, 2): f"an ambulance had been sent to zone {LAYOUT.zones[5]}",
        (State.ABOARD, 2): "in the ambulance to",
        (State.DRIVEN, -1): "in a car to",
        (State.QUEUED, -1): "waiting for a bed at",
        (State.IN_ICU, -1): "in care at",
        (State.IN_WARD, -1): "in care at",
    }
    for (state, ambulance), place in told.items():
        in_zone = state in (State.HIDDEN, State.CALLING)
        patients = one_patient(
            **{**rest, "hospital": -1 if in_zone else UNIVERSITY}, state=state, ambulance=ambulance
        )
        end = place if in_zone else f"{place} {LAYOUT.hospitals[UNIVERSITY].name}"
        notice = death_notice(LAYOUT, patients, 0)
        assert notice == f"a patient with severity-3 injuries died: {end}"
    patients = one_patient(**rest, state=State.CALLING, ambulance=-1)
    patients.sick[0] = True
    assert death_notice(LAYOUT, patients, 0).startswith("a patient of the epidemic died")
    patients.sick[0] = False
    patients.hopeless[0] = True
    assert death_notice(LAYOUT, patients, 0).startswith("a patient with unsurvivable severity-3")
    patients.batch[0] = -1
    assert death_notice(LAYOUT, patients, 0, "cardiac arrest") == (
        f"an emergency patient died: cardiac arrest, {told[State.CALLING, -1]}"
    )


def one_patient(**values: int) -> Patients:
    patients = Patients()
    for name, value in {"sick": False, **values}.items():
        getattr(patients, name).append(value)
    return patients


def test_fuel_comes_only_while_roads_are_open() -> None:
    dark = Change({"hospital_power": hospitals(0.0, UNIVERSITY)})
    closed = Change(
        {"scene_time": 1e4 + 0 * free_flow()[0], "hospital_time": 1e4 + 0 * free_flow()[1]}
    )
    parameters = {
        **NO_FAILED_START, **QUIET, "fuel_h": 24.0, "refuel_delay_h": 6.0, "refuel_h": 12.0
    }  # fmt: skip
    served = begin(parameters=parameters).go(60 * 30, {10: dark})
    cut_off = begin(parameters=parameters).go(60 * 30, {10: dark, 11: closed})
    assert served.of("fuel_delivered")
    assert not served.of("generator_out_of_fuel")
    assert not cut_off.of("fuel_delivered")
    assert cut_off.of("generator_out_of_fuel")


def test_a_hospital_lives_on_its_water_reserve_and_then_loses_beds() -> None:
    site = LAYOUT.hospitals[REGIONAL_ONE]
    dry = Change({"hospital_water": hospitals(0.1, REGIONAL_ONE)}, {"hospital_water": "city/2"})
    story = begin(parameters={"water_reserve_h": 6.0}).go(60 + 359, {60: dry})
    assert not story.of("hospital_without_water")
    story.go(60 + 361)
    (without,) = story.of("hospital_without_water", site.id)
    assert without.causes == ("city/2",)
    assert story.value("functional_beds", REGIONAL_ONE) == pytest.approx(
        0.5 * site.staffed_beds, abs=2
    )
    wet = Change({"hospital_water": hospitals(1.0)}, {"hospital_water": "city/5"})
    story.go(story.minute + 1, {story.minute + 1: wet})
    assert "city/5" in story.of("hospital_water_back", site.id)[0].causes
    assert story.value("functional_beds", REGIONAL_ONE) == site.staffed_beds


def test_an_evacuated_hospital_takes_no_one_and_its_patients_leave() -> None:
    site = LAYOUT.hospitals[UNIVERSITY]
    broken = Change(
        {"hospital_damage_state": hospitals(3.0, UNIVERSITY, usual=0.0)},
        {"hospital_damage_state": "disaster/6"},
    )
    story = begin().go(60, {60: broken})
    (lost,) = story.of("hospital_beds_lost", site.id)
    assert lost.causes == ("disaster/6",)
    assert story.value("functional_beds", UNIVERSITY) == 0.0
    at_first = story.value("beds_occupied", UNIVERSITY)
    story.go(60 + 60 * 24)
    assert story.value("beds_occupied", UNIVERSITY) < 0.2 * at_first
    assert story.value("icu_occupied", UNIVERSITY) == 0.0
    (diverting,) = story.of("hospital_diverting", site.id)
    assert lost.id in diverting.causes
    assert story.value("hospital_load", UNIVERSITY) < 0.2 * site.load_mw


def test_moderate_damage_keeps_a_share_of_the_beds() -> None:
    broken = Change({"hospital_damage_state": hospitals(2.0, UNIVERSITY, usual=1.0)})
    story = begin().go(60, {60: broken})
    beds = np.array([h.staffed_beds for h in LAYOUT.hospitals], dtype=np.float64)
    beds[UNIVERSITY] *= 0.6
    assert np.abs(story.now["functional_beds"] - beds).max() <= 2.0


def test_a_hospital_asks_less_of_a_short_grid_and_more_when_it_fills() -> None:
    story = begin().go(60)
    usual = story.value("hospital_load", REGIONAL_ONE)
    assert usual == pytest.approx(LAYOUT.hospitals[REGIONAL_ONE].load_mw, rel=0.1)
    short = Change({"hospital_power": hospitals(0.7, REGIONAL_ONE)})
    story.go(61, {61: short})
    story.go(75)
    assert story.value("hospital_load", REGIONAL_ONE) == pytest.approx(0.4 * usual, rel=0.1)
    assert not story.of("hospital_on_generator")
    story.go(76, {76: Change({"hospital_power": hospitals(1.0)})}).go(150)
    assert story.value("hospital_load", REGIONAL_ONE) == pytest.approx(usual, rel=0.1)
    water = story.value("hospital_water_need", REGIONAL_ONE)
    story.go(400, {151: casualties(severity2=600, severity3=100)})
    assert story.value("hospital_load", REGIONAL_ONE) > usual
    assert story.value("hospital_water_need", REGIONAL_ONE) > water


def test_only_children_go_to_the_childrens_hospital() -> None:
    story = begin().go(720, {60: casualties(severity2=800, severity3=100)})
    patients = story.care.records.patients
    there = [
        child
        for child, hospital in zip(patients.child, patients.hospital, strict=True)
        if hospital == LE_BONHEUR
    ]
    assert there
    assert all(there)


# -- what must hold always -------------------------------------------------------------


def check_books(story: Story) -> None:
    """Patients are conserved, and every count agrees with the patients themselves."""
    care, patients = story.care, story.care.records.patients
    balance = {
        k: story.value(f"patients_{k}") for k in ("arisen", "in_system", "discharged", "dead")
    }
    assert balance["arisen"] == (balance["in_system"] + balance["discharged"] + balance["dead"]), (
        story.minute
    )
    assert story.value("deaths") == balance["dead"]
    if story.minute % 60:
        return
    states = Counter(patients.state)
    assert care.records.counts[1:] == [states[s] for s in State][1:]
    for index, hospital in enumerate(care.hospitals):
        here = Counter(
            s for s, h in zip(patients.state, patients.hospital, strict=True) if h == index
        )
        assert hospital.ward.occupied == hospital.ward_inpatients + here[State.IN_WARD]
        assert hospital.icu.occupied == hospital.icu_inpatients + here[State.IN_ICU]
        assert hospital.queue == here[State.QUEUED]
        coming = sum(
            kind == Kind.ARRIVE and patients.hospital[a] == index
            for _, _, kind, a, _ in care.records.calendar.heap
        )
        assert hospital.inbound_icu + hospital.inbound_ward == coming
        assert min(hospital.inbound_icu, hospital.inbound_ward) >= 0
        assert 0.0 <= hospital.fuel_at(care.records.now) <= hospital.tank_h
        if hospital.queue and not hospital.icu.free <= 0:
            waiting = [
                i
                for i, (s, h) in enumerate(zip(patients.state, patients.hospital, strict=True))
                if s == State.QUEUED and h == index
            ]
            assert not any(
                patients.severity[i] >= 3 and not patients.stepped_down[i] for i in waiting
            )
    at_zone = Counter(
        z
        for z, s in zip(patients.zone, patients.state, strict=True)
        if s in (State.HIDDEN, State.CALLING)
    )
    assert care.records.waiting.tolist() == [at_zone[z] for z in range(ZONES)]
    unassigned = sum(
        s == State.CALLING and a < 0
        for s, a in zip(patients.state, patients.ambulance, strict=True)
    )
    assert care.dispatch.open_calls == unassigned
    assert care.dispatch.idle == sum(care.dispatch.is_idle)


shares = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@st.composite
def upheavals(draw: st.DrawFn) -> Change:
    """A change of everything that the twin hears about."""
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    scene, hospital = free_flow()
    change = casualties(
        seed,
        severity1=draw(st.integers(0, 200)),
        severity2=draw(st.integers(0, 300)),
        severity3=draw(st.integers(0, 100)),
        severity4=draw(st.integers(0, 20)),
    )
    levels = np.array([draw(shares) for _ in range(3)])
    change.inputs["hospital_power"] = rng.choice(levels, HOSPITALS)
    change.inputs["hospital_water"] = rng.choice(levels, HOSPITALS)
    change.inputs["hospital_damage_state"] = rng.integers(0, 5, HOSPITALS).astype(np.float64)
    slow = draw(st.sampled_from([1.0, 2.0, 6.0]))
    cut = draw(st.sampled_from([0.0, 0.3, 1.0]))
    for name, minutes in (("scene_time", scene), ("hospital_time", hospital)):
        closed = rng.random(minutes.size) < cut
        change.inputs[name] = np.where(closed, 1e4, slow * minutes)
    return change


@given(
    st.dictionaries(st.integers(2, 600), upheavals(), min_size=1, max_size=4), st.integers(0, 99)
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
def test_no_patient_is_ever_lost_or_counted_twice(changes: dict[int, Change], seed: int) -> None:
    story = begin(seed, {"fuel_h": 3.0, "water_reserve_h": 1.0, "refuel_delay_h": 1.0})
    injured: dict[str, Vector] = {}
    for minute in sorted(changes):
        for name, values in changes[minute].inputs.items():
            if name.startswith("injured"):
                injured[name] = injured.get(name, np.zeros(ZONES)) + values
                changes[minute].inputs[name] = injured[name].copy()
    story.go(900, changes, each=check_books)
    ids = [e.id for e in story.events]
    assert len(set(ids)) == len(ids)
    own = {e.id: i for i, e in enumerate(story.events)}
    for i, event in enumerate(story.events):
        assert all(own.get(cause, -1) < i for cause in event.causes)


@pytest.mark.parametrize("saved_min", [0, 31, 47, 300])
def test_a_restored_session_continues_bit_for_bit(saved_min: int) -> None:
    shock = all_at_once(
        casualties(severity1=300, severity2=300, severity3=80, severity4=10),
        Change({"hospital_power": hospitals(0.0, UNIVERSITY, REGIONAL_ONE)}),
    )
    changes = {60: shock, 400: casualties(9, severity2=500, severity3=150)}
    story = begin(seed=5).go(saved_min, changes)
    saved = story.twin.snapshot()
    fresh = MedicalTwin()
    other = Session(fresh, "medical")
    other.open(5, {})
    other.serial, other.last_ns = story.session.serial, story.session.last_ns
    other.told_by = dict(story.session.told_by)
    other.values = dict(story.session.values)
    other.input_causes = {k: dict(v) for k, v in story.session.input_causes.items()}
    fresh.restore(saved)
    told = story.go(900, changes).results[saved_min + 1 :]
    retold = Story(other, minute=saved_min).go(900, changes).results
    assert len(told) == len(retold) == 900 - saved_min
    for one, two in zip(told, retold, strict=True):
        assert one.events == two.events
        assert one.causes == two.causes
        assert one.outputs.keys() == two.outputs.keys()
        for name, values in one.outputs.items():
            assert values.tobytes() == two.outputs[name].tobytes()


def test_one_seed_gives_one_run_and_another_seed_another() -> None:
    shock = {60: casualties(severity2=200, severity3=50)}

    def trace(seed: int) -> list[tuple[str, bytes]]:
        results = begin(seed).go(300, shock).results
        return [(name, v.tobytes()) for r in results for name, v in r.outputs.items()]

    assert trace(4) == trace(4)
    assert trace(4) != trace(5)


# -- what planners see -----------------------------------------------------------------


def solve(power: float, water: float, periods: int, parameters: Mapping[str, float]) -> float:
    """Least cost of the block when every hospital gets these shares in every period."""
    twin = MedicalTwin()
    twin.open(1, {p.name: p.default for p in twin.describe().parameters} | dict(parameters))
    block = twin.flexibility((HOUR_NS,) * periods)
    low, high = block.low.copy(), block.high.copy()
    for port, share in zip(block.ports, (power, water), strict=True):
        low[port.columns] = high[port.columns] = share
    size = len(block.rows), len(block.columns)
    a = coo_matrix((block.coefficient, (block.row_index, block.column_index)), size).toarray()
    at_least, at_most = np.isfinite(block.row_low), np.isfinite(block.row_high)
    result = linprog(
        block.cost,
        A_ub=np.concatenate([-a[at_least], a[at_most]]),
        b_ub=np.concatenate([-block.row_low[at_least], block.row_high[at_most]]),
        bounds=list(zip(low.tolist(), high.tolist(), strict=True)),
    )
    assert result.fun is not None, result.message
    return float(result.fun)


def test_the_plan_loses_the_bed_hours_beyond_fuel_and_reserve() -> None:
    beds = sum(h.staffed_beds for h in LAYOUT.hospitals)
    own = {"fuel_h": 4.0, "water_reserve_h": 2.0, "bed_hour_value_usd": 100.0}
    assert solve(1.0, 1.0, 10, own) == pytest.approx(0.0)
    assert solve(0.0, 1.0, 10, own) == pytest.approx(beds * 6.0 * 100.0 * 0.9)
    assert solve(0.5, 1.0, 10, own) == pytest.approx(beds * 1.0 * 100.0 * 0.9)
    assert solve(1.0, 0.0, 10, own) == pytest.approx(beds * 8.0 * 100.0 * 0.5)


def test_ports_join_what_energy_and_city_supply() -> None:
    block = MedicalTwin().flexibility((HOUR_NS, 2 * HOUR_NS))
    assert [(p.name, p.role, p.kind) for p in block.ports] == [
        ("hospital_power", "need", "hospital"),
        ("hospital_water", "need", "hospital"),
    ]
    assert block.ports[0].columns.shape == (HOSPITALS, 2)
    inputs = {v.name for v in MedicalTwin().describe().inputs()}
    assert {p.name for p in block.ports} <= inputs


def test_every_assumption_has_a_source_and_lies_in_its_range() -> None:
    parameters = MedicalTwin().describe().parameters
    assert len({p.name for p in parameters}) == len(parameters)
    for parameter in parameters:
        assert parameter.source, parameter.name
        assert parameter.low <= parameter.default <= parameter.high, parameter.name


def test_the_twin_describes_all_that_it_needs_and_tells() -> None:
    description = MedicalTwin().describe()
    assert set(description.kpis) <= {v.name for v in description.outputs()}
    kinds = Counter(e.kind for e in description.entities)
    assert kinds["hospital"] == HOSPITALS
    assert kinds["zone"] == ZONES
    assert kinds["scene_route"] == LAYOUT.bases * LAYOUT.scenes
    assert kinds["hospital_route"] == LAYOUT.origins * LAYOUT.columns
    assert MedicalTwin().describe() is description


def test_an_unknown_region_is_an_error_of_the_scenario() -> None:
    with pytest.raises(ScenarioError) as caught:
        MedicalTwin("atlantis")
    assert caught.value.reason is Reason.MISSING_FILE
