"""Moves every patient from injury or call to discharge or death, event by event.

The flow of one patient: hidden (not yet found, or trapped), calling (or driven by others),
aboard an ambulance, queued at a hospital, in intensive care or on a ward, discharged or dead.
Definitive care begins with the bed. All state is plain data, so it pickles exactly.

The engine runs in plain Python: per patient it books some eight events at two microseconds
each, so 5,000 casualties take less time than numba needs to load its cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from math import inf
from typing import Any, Protocol

import numpy as np

from federation.twin import Vector
from twins.medical.beds import BedPool
from twins.medical.calendar import Calendar
from twins.medical.hospitals import Hospital, expected_by_ambulance
from twins.medical.layout import Layout
from twins.medical.patients import (
    CRITICAL,
    DAY_MIN,
    HOSPITALS_STREAM,
    Arrest,
    Patients,
    State,
    draw_calls,
    draw_casualties,
    draw_walk_ins,
    inpatient,
)
from twins.medical.survival import arrest_chance

HIDDEN, CALLING, ABOARD, DRIVEN = State.HIDDEN, State.CALLING, State.ABOARD, State.DRIVEN
QUEUED, IN_ICU, IN_WARD = State.QUEUED, State.IN_ICU, State.IN_WARD
DISCHARGED, DEAD = State.DISCHARGED, State.DEAD

NO_WAY_MIN = 600.0
"""A route this long or longer counts as closed."""
SLOW = 1.5
"""A route is slow, and its cause a cause of delay, above this multiple of its usual time."""
SLOW_MIN = 3.0
TICK_MIN = 15.0
WALK_IN_MIN = (30.0, 90.0, 180.0, 360.0)
"""When the walk-ins of a shock come, a quarter each (assumption)."""
SIX_HOURS_MIN = 360.0
STEP_DOWN_RETRY_MIN = 60.0
FEW_CALLS = 5
"""Calls that must wait before the fleet counts as exhausted; fewer is an ordinary peak."""
RESERVE_SHARE = 0.1
"""Share of the fleet kept for calls while transfers wait; also ends the state exhausted."""
LEAST_QUEUE = 5
"""Shortest queue that makes a hospital divert."""
TRANSFERS_PER_TICK = 2


class Kind(IntEnum):
    """What can be due, with the meaning of the two numbers that go with it."""

    DAY = 0
    """a: day. Draws the calls of that day."""
    CALL = 1
    """a: patient"""
    FOUND = 2
    """a: patient"""
    AT_SCENE = 3
    """a: patient, b: ambulance"""
    DEPART = 4
    """a: patient, b: ambulance"""
    ARRIVE = 5
    """a: patient, b: ambulance or -1 for a private car"""
    HANDED_OVER = 6
    """a: ambulance, b: hospital"""
    HOME = 7
    """a: ambulance, b: its stamp"""
    LIMIT = 8
    """a: patient: care comes too late from now on"""
    INTERRUPTED = 9
    """a: patient, b: visit: turned out of intensive care for too long"""
    LEAVE_ICU = 10
    """a: patient, b: visit"""
    LEAVE_WARD = 11
    """a: patient, b: visit"""
    SIX_HOURS = 12
    """a, b: first patient and the one after the last of a batch"""
    TICK = 13
    """a: running number"""
    FUEL_OUT = 14
    """a: hospital, b: outage"""
    REFUEL = 15
    """a: hospital, b: outage"""
    DRY = 16
    """a: hospital, b: drought"""
    WALK_INS = 17
    """a: hospital, b: how many"""
    SURGE = 18
    GIVE_UP = 19
    """a: patient: waits no longer for an ambulance if there is another way"""


class Journal(Protocol):
    """Where events are recorded and causes looked up; a `Step` is one."""

    def emit(self, kind: str, entity: str, text: str, causes: Iterable[str] = ()) -> str: ...

    def cause(self, variable: str, index: int) -> tuple[str, ...]: ...


class Care:
    """The whole system of calls, ambulances and hospitals, advanced in continuous minutes."""

    _FIXED = frozenset({"layout", "p", "handlers", "journal"})

    def __init__(self, layout: Layout, parameters: Mapping[str, float], seed: int) -> None:
        self.layout = layout
        self.p = dict(parameters)
        self.handlers = self._handlers()
        self.journal: Journal | None = None
        p = self.p
        self.seed = seed
        self.now = 0.0
        self.calendar = Calendar()
        self.patients = Patients()
        self.counts = [0] * len(State)
        sites = layout.hospitals
        luck = np.random.default_rng([seed, HOSPITALS_STREAM]).random((len(sites), 2))
        self.hospitals = [
            Hospital(
                site,
                fuel_h=p["fuel_h"] * (1.0 + p["fuel_spread"] * (2.0 * float(spread) - 1.0)),
                starts=bool(start >= p["generator_failure"]),
                by_ambulance=expected,
                p=p,
            )
            for site, (start, spread), expected in zip(
                sites, luck, expected_by_ambulance(layout, p), strict=True
            )
        ]
        # what stands for the waiting minutes behind one patient too many, by unit
        self.turnover_min = (p["critical_stay_h"] * 60.0, 24.0 * 60.0)
        self.arisen = sum(h.inpatients for h in self.hospitals)
        self.discharged_uncounted = 0
        self.dead_at_once = 0
        self.untreated_after_6h = 0
        self.treated = 0
        self.walk_ins_coming = 0
        self.responses = 0
        self.response_sum_min = 0.0
        self.waiting = np.zeros(len(layout.zones))
        self.ordinals = {severity: [0] * len(layout.zones) for severity in (1, 2, 3, 4)}
        self.batch_causes: list[tuple[str, ...]] = []
        self.blame: dict[int, tuple[str, ...]] = {}
        self.last_casualties: tuple[str, ...] = ()
        self.exhausted_event = ""
        self.plan_event = ""
        self.plan = False
        fleet = len(layout.post_base)
        self.amb_base = list(layout.post_base)
        self.amb_idle = [True] * fleet
        self.amb_stamp = [0] * fleet
        self.idle = fleet
        self.reserve = int(RESERVE_SHARE * fleet)
        self.calls: list[tuple[int, float, int]] = []
        self.open_calls = 0
        self.out_of_reach: list[tuple[int, float, int]] = []
        speed = p["access_speed_kmh"] / 60.0
        detour = p["access_detour"]
        self.zone_access_min = [km * detour / speed for km in layout.zone_access_km]
        self.hospital_access_min = [site.access_km * detour / speed for site in sites]
        self.scene_min: list[list[float]] = []
        self.usual_scene_min: list[list[float]] = []
        self.hospital_min: list[list[float]] = []
        self.usual_hospital_min: list[list[float]] = []
        self.nearest_base: dict[int, int] = {}
        self.set_scene_times(np.full(layout.bases * layout.scenes, 8.0))
        self.set_hospital_times(np.full(layout.origins * layout.columns, 10.0))
        self.calendar.at(0.0, Kind.DAY, 0)
        self.calendar.at(0.0, Kind.TICK, 0)

    def _handlers(self) -> tuple[Callable[[int, int], None], ...]:
        by_kind: dict[Kind, Callable[[int, int], None]] = {
            Kind.DAY: self._day,
            Kind.CALL: self._call,
            Kind.FOUND: self._found,
            Kind.AT_SCENE: self._at_scene,
            Kind.DEPART: self._depart,
            Kind.ARRIVE: self._arrive,
            Kind.HANDED_OVER: self._handed_over,
            Kind.HOME: self._home,
            Kind.LIMIT: self._limit,
            Kind.INTERRUPTED: self._interrupted,
            Kind.LEAVE_ICU: self._leave_icu,
            Kind.LEAVE_WARD: self._leave_ward,
            Kind.SIX_HOURS: self._six_hours,
            Kind.TICK: self._tick,
            Kind.FUEL_OUT: self._fuel_out,
            Kind.REFUEL: self._refuel,
            Kind.DRY: self._dry,
            Kind.WALK_INS: self._walk_ins,
            Kind.SURGE: self._surge,
            Kind.GIVE_UP: self._give_up,
        }
        return tuple(by_kind[kind] for kind in Kind)

    def state(self) -> dict[str, Any]:
        """Everything that changes; with the layout and the parameters it is the whole."""
        return {name: value for name, value in vars(self).items() if name not in self._FIXED}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        vars(self).update(state)

    # -- time --------------------------------------------------------------------------

    def advance(self, now_min: float, journal: Journal) -> bool:
        """Do all that is due until now; whether there was anything."""
        heap = self.calendar.heap
        self.journal = journal
        if not heap or heap[0][0] > now_min:
            self.now = now_min
            return False
        handlers = self.handlers
        while heap and heap[0][0] <= now_min:
            self.now, _, kind, a, b = heapq.heappop(heap)
            handlers[kind](a, b)
        self.now = now_min
        return True

    def _emit(self, kind: str, entity: str, text: str, causes: Iterable[str] = ()) -> str:
        return self.journal.emit(kind, entity, text, causes) if self.journal else ""

    def _causes(self, variable: str, index: int) -> tuple[str, ...]:
        return self.journal.cause(variable, index) if self.journal else ()

    # -- balance -----------------------------------------------------------------------

    @property
    def in_system(self) -> int:
        """Patients counted where they are: on the scene, under way, queued or in a bed."""
        present = sum(self.counts[HIDDEN : IN_WARD + 1])
        inpatients = sum(h.inpatients + h.walk_ins for h in self.hospitals)
        return present + inpatients + self.walk_ins_coming

    @property
    def discharged(self) -> int:
        return self.counts[DISCHARGED] + self.discharged_uncounted

    @property
    def dead(self) -> int:
        return self.counts[DEAD] + self.dead_at_once

    def _move(self, patient: int, state: State) -> None:
        states = self.patients.state
        self.counts[states[patient]] -= 1
        self.counts[state] += 1
        states[patient] = state

    # -- roads -------------------------------------------------------------------------

    def set_scene_times(self, minutes: Vector, usual: bool = False) -> None:
        """Times from bases to scenes; `usual` ones become the measure of what is slow."""
        table = minutes.reshape(self.layout.bases, self.layout.scenes).T.tolist()
        self.scene_min = table
        self.nearest_base.clear()
        if usual or not self.usual_scene_min:
            self.usual_scene_min = table
        self._retry()

    def set_hospital_times(self, minutes: Vector, usual: bool = False) -> None:
        """Times from scenes and hospitals to hospital nodes, here with the last stretch."""
        columns = [site.column for site in self.layout.hospitals]
        table = minutes.reshape(self.layout.origins, self.layout.columns)[:, columns]
        rows = (table + np.array(self.hospital_access_min)).tolist()
        self.hospital_min = rows
        if usual or not self.usual_hospital_min:
            self.usual_hospital_min = rows
        self._retry()

    def _retry(self) -> None:
        """Give calls that no ambulance could reach another chance."""
        if self.out_of_reach:
            for call in self.out_of_reach:
                heapq.heappush(self.calls, call)
            self.out_of_reach.clear()
            self._dispatch()

    # -- patients arise ----------------------------------------------------------------

    def _day(self, day: int, _: int) -> None:
        times, people = draw_calls(self.seed, day, self.layout.zone_people, self.p)
        first = self.patients.add(people, [-1] * len(people))
        for patient, time_min in enumerate(times, start=first):
            self.calendar.at(time_min, Kind.CALL, patient)
        self._limits_of_calls(first, times, people.limit_min)
        self.calendar.at((day + 1) * DAY_MIN, Kind.DAY, day + 1)

    def _limits_of_calls(self, first: int, times: list[float], limits: list[float]) -> None:
        for patient, (time_min, limit_min) in enumerate(
            zip(times, limits, strict=True), start=first
        ):
            self.calendar.at(time_min + limit_min, Kind.LIMIT, patient)

    def _call(self, patient: int, _: int) -> None:
        patients = self.patients
        self.arisen += 1
        advised = patients.luck[patient] < self.p["advised_share"]
        if self.plan and advised and not patients.transported[patient]:
            self.counts[DISCHARGED] += 1
            patients.state[patient] = DISCHARGED
            return
        self.waiting[self.patients.zone[patient]] += 1
        self.counts[CALLING] += 1
        self.patients.state[patient] = CALLING
        self._ask_for_ambulance(patient)

    def injure(self, severity: int, counts: list[tuple[int, int]]) -> None:
        """Casualties of one instant as (zone, how many), with causes from the journal."""
        for zone, size in counts:
            self.arisen += size
            self.last_casualties = self._causes(f"injured_severity{severity}", zone)
        before = self.ordinals[severity]
        ordinals = [before[zone] for zone, _ in counts]
        for zone, size in counts:
            before[zone] += size
        if severity == 4:
            self._kill(counts)
        elif severity == 1:
            self._injure_slightly(counts, ordinals)
        else:
            self._injure(severity, counts, ordinals)

    def _kill(self, counts: list[tuple[int, int]]) -> None:
        for zone, size in counts:
            self.dead_at_once += size
            causes = self._causes("injured_severity4", zone)
            for _ in range(size):
                self._emit("patient_died", self.layout.zones[zone], "killed at once", causes)

    def _injure_slightly(self, counts: list[tuple[int, int]], ordinals: list[int]) -> None:
        for (zone, size), ordinal in zip(counts, ordinals, strict=True):
            walkers = draw_walk_ins(self.seed, zone, size, ordinal, self.p["walk_in_share"])
            hospital = self._nearest_hospital(self.layout.zone_scene[zone], child=False)
            if hospital < 0:
                walkers = 0
            self.discharged_uncounted += size - walkers
            self.walk_ins_coming += walkers
            for quarter, delay_min in enumerate(WALK_IN_MIN):
                share = (walkers * (quarter + 1)) // 4 - (walkers * quarter) // 4
                if share:
                    self.calendar.at(self.now + delay_min, Kind.WALK_INS, hospital, share)

    def _injure(self, severity: int, counts: list[tuple[int, int]], ordinals: list[int]) -> None:
        people = draw_casualties(self.seed, severity, counts, ordinals, self.p)
        batches: list[int] = []
        for zone, size in counts:
            batches.extend([len(self.batch_causes)] * size)
            self.batch_causes.append(self._causes(f"injured_severity{severity}", zone))
            self.waiting[zone] += size
        first = self.patients.add(people, batches)
        last = first + len(people)
        self.counts[HIDDEN] += len(people)
        self.patients.state[first:last] = [int(HIDDEN)] * len(people)
        at, now = self.calendar.at, self.now
        for patient, found, limit in zip(
            range(first, last), people.found_min, people.limit_min, strict=True
        ):
            at(now + found, Kind.FOUND, patient)
            if limit < inf:
                at(now + limit, Kind.LIMIT, patient)
        at(now + SIX_HOURS_MIN, Kind.SIX_HOURS, first, last)
        if not self.plan:
            self._start_plan()

    def _start_plan(self) -> None:
        """Put the disaster plan in force: reverse triage, surge beds, immediate off-load."""
        self.plan = True
        self.plan_event = self._emit(
            "disaster_plan",
            "system",
            "hospitals activate their disaster plans",
            self.last_casualties,
        )
        for hospital in self.hospitals:
            hospital.early_left = self.p["early_discharge_share"] * hospital.ward_inpatients
            hospital.early_per_h = hospital.early_left / self.p["early_discharge_h"]
        self.calendar.at(self.now + 60.0 * self.p["surge_open_h"], Kind.SURGE)

    def _surge(self, _: int, __: int) -> None:
        for index, hospital in enumerate(self.hospitals):
            hospital.surge_open = True
            hospital.latest_event = self.plan_event
            self._resize(index, (self.plan_event,))

    def _walk_ins(self, hospital: int, size: int) -> None:
        self.walk_ins_coming -= size
        self.hospitals[hospital].walk_ins += size

    def _found(self, patient: int, _: int) -> None:
        if self.patients.state[patient] != HIDDEN:
            return
        if self.patients.private[patient] and self._drive(patient):
            return
        self._move(patient, CALLING)
        self._ask_for_ambulance(patient)

    def _drive(self, patient: int) -> bool:
        """Let others drive a patient to the nearest hospital; whether there is a way."""
        zone = self.patients.zone[patient]
        origin = self.layout.zone_scene[zone]
        hospital = self._nearest_hospital(origin, self.patients.child[patient])
        if hospital < 0:
            return False
        self.waiting[zone] -= 1
        self._move(patient, DRIVEN)
        self._blame_road(patient, origin, hospital)
        self._head_for(patient, hospital)
        minutes = self.hospital_min[origin][hospital] + self.zone_access_min[zone]
        self.calendar.at(self.now + minutes, Kind.ARRIVE, patient, -1)
        return True

    def _ask_for_ambulance(self, patient: int) -> None:
        self.patients.called_min[patient] = self.now
        self.open_calls += 1
        heapq.heappush(self.calls, (-2 * self.patients.severity[patient], self.now, patient))
        self._dispatch()
        if self.patients.ambulance[patient] < 0 and self.patients.severity[patient] < CRITICAL:
            self.calendar.at(self.now + 60.0 * self.p["patience_h"], Kind.GIVE_UP, patient)

    def _give_up(self, patient: int, _: int) -> None:
        patients = self.patients
        if patients.state[patient] != CALLING or patients.ambulance[patient] >= 0:
            return
        self._note_response(patient)
        self._blame_absent_ambulance(patient)
        if self._drive(patient):
            self.open_calls -= 1
        else:
            self.calendar.at(self.now + 60.0, Kind.GIVE_UP, patient)

    def _note_response(self, patient: int) -> None:
        """Count the wait for an ambulance once, also of those who died or gave up waiting.

        Without those the mean would improve when the worst cases drop out.
        """
        if not self.patients.reached[patient]:
            self.patients.reached[patient] = True
            self.responses += 1
            self.response_sum_min += self.now - self.patients.called_min[patient]

    # -- ambulances --------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send the nearest ambulance to each call: the most severe first, then the oldest."""
        patients, calls = self.patients, self.calls
        while self.idle and calls:
            _, _, patient = calls[0]
            state = patients.state[patient]
            if state == CALLING and patients.ambulance[patient] < 0:
                zone = patients.zone[patient]
                scene, access = self.layout.zone_scene[zone], self.zone_access_min[zone]
            elif state == QUEUED and patients.transfer[patient]:
                if self.idle <= self.reserve:
                    break
                hospital = patients.hospital[patient]
                scene = self.layout.hospitals[hospital].scene
                access = self.hospital_access_min[hospital]
            else:
                heapq.heappop(calls)
                continue
            minutes = self.scene_min[scene]
            best, least = -1, NO_WAY_MIN
            for ambulance, idle in enumerate(self.amb_idle):
                if idle:
                    time = minutes[self.amb_base[ambulance]]
                    if time < least:
                        best, least = ambulance, time
            call = heapq.heappop(calls)
            if best < 0:
                self.out_of_reach.append(call)
                continue
            self._send(best, patient, scene, least + access, state == CALLING)
        if self.open_calls >= FEW_CALLS and not self.idle and not self.exhausted_event:
            self.exhausted_event = self._emit(
                "ambulances_exhausted",
                "system",
                f"all {len(self.amb_idle)} ambulances are busy and {self.open_calls} calls wait",
                self.last_casualties,
            )
        elif self.exhausted_event and self.idle > self.reserve and not self.open_calls:
            self.exhausted_event = ""

    def _send(
        self, ambulance: int, patient: int, scene: int, way_min: float, is_call: bool
    ) -> None:
        base = self.amb_base[ambulance]
        self.amb_idle[ambulance] = False
        self.amb_stamp[ambulance] += 1
        self.idle -= 1
        self.patients.ambulance[patient] = ambulance
        if is_call:
            self.open_calls -= 1
            if self.exhausted_event and self.now > self.patients.called_min[patient]:
                self._blame(patient, (self.exhausted_event,))
        else:
            self.patients.transfer[patient] = False
        usual = self.usual_scene_min[scene][base]
        if self.scene_min[scene][base] > SLOW * usual + SLOW_MIN:
            self._blame(patient, self._causes("scene_time", base * self.layout.scenes + scene))
        arrival = self.now + self.p["call_handling_min"] + way_min
        self.calendar.at(arrival, Kind.AT_SCENE, patient, ambulance)

    def _at_scene(self, patient: int, ambulance: int) -> None:
        patients = self.patients
        state = patients.state[patient]
        if state == QUEUED:
            self.calendar.at(self.now + self.p["scene_min"], Kind.DEPART, patient, ambulance)
            return
        if state != CALLING:
            self._free_at_scene(patient, ambulance)
            return
        self._note_response(patient)
        response = self.now - patients.called_min[patient]
        cv = self.p["scene_cv"]
        stay = self.p["scene_min"] * (1.0 - cv + cv * patients.scene_draw[patient])
        if patients.arrest[patient] and not self._revive(patient, response):
            self._die(patient, "of a cardiac arrest")
        self.calendar.at(self.now + stay, Kind.DEPART, patient, ambulance)

    def _revive(self, patient: int, response_min: float) -> bool:
        if self.patients.arrest[patient] == Arrest.OTHER:
            return False
        collapse = self.p["collapse_to_call_min"]
        first = collapse + min(response_min, self.p["first_responder_min"])
        return self.patients.luck[patient] < arrest_chance(first, first, collapse + response_min)

    def _depart(self, patient: int, ambulance: int) -> None:
        patients = self.patients
        state = patients.state[patient]
        if state == QUEUED and patients.ambulance[patient] == ambulance:
            self._depart_from_hospital(patient, ambulance)
            return
        if state != CALLING:
            self._free_at_scene(patient, ambulance)
            return
        zone = patients.zone[patient]
        if not patients.transported[patient]:
            self.waiting[zone] -= 1
            self._move(patient, DISCHARGED)
            self._free_at_scene(patient, ambulance)
            return
        origin = self.layout.zone_scene[zone]
        hospital = self._choose_hospital(patient, origin, leaving=-1)
        if hospital < 0:
            # no hospital can be reached: the patient stays, the call is tried again later
            patients.ambulance[patient] = -1
            self.open_calls += 1
            self.out_of_reach.append(
                (-2 * patients.severity[patient], patients.called_min[patient], patient)
            )
            self._free_at_scene(patient, ambulance)
            return
        self.waiting[zone] -= 1
        self._move(patient, ABOARD)
        self._blame_road(patient, origin, hospital)
        self._head_for(patient, hospital)
        minutes = self.hospital_min[origin][hospital] + self.zone_access_min[zone]
        self.calendar.at(self.now + minutes, Kind.ARRIVE, patient, ambulance)

    def _depart_from_hospital(self, patient: int, ambulance: int) -> None:
        patients = self.patients
        here = patients.hospital[patient]
        origin = self.layout.hospitals[here].origin
        there = self._choose_hospital(patient, origin, leaving=here)
        patients.ambulance[patient] = -1
        if there < 0:
            self._free_at_hospital(ambulance, here)
            return
        self.hospitals[here].queue -= 1
        self._move(patient, ABOARD)
        self._head_for(patient, there)
        minutes = self.hospital_min[origin][there] + self.hospital_access_min[here]
        self.calendar.at(self.now + minutes, Kind.ARRIVE, patient, ambulance)

    def _free_at_scene(self, patient: int, ambulance: int) -> None:
        """An ambulance without a patient waits at the base nearest to where it is."""
        hospital = self.patients.hospital[patient]
        if hospital >= 0:
            self._free_at_hospital(ambulance, hospital)
            return
        scene = self.layout.zone_scene[self.patients.zone[patient]]
        base = self.nearest_base.get(scene)
        if base is None:
            minutes = self.scene_min[scene]
            base = min(range(len(minutes)), key=minutes.__getitem__)
            self.nearest_base[scene] = base
        self._free(ambulance, base, scene)

    def _free_at_hospital(self, ambulance: int, hospital: int) -> None:
        site = self.layout.hospitals[hospital]
        self._free(ambulance, site.base, site.scene)

    def _free(self, ambulance: int, base: int, scene: int) -> None:
        home = self.layout.post_base[ambulance]
        self.amb_base[ambulance] = base
        self.amb_idle[ambulance] = True
        self.amb_stamp[ambulance] += 1
        self.idle += 1
        if base != home:
            # routes lead only from bases: the way back takes as long as the way out
            way = self.scene_min[scene][home]
            if way < NO_WAY_MIN:
                self.calendar.at(self.now + way, Kind.HOME, ambulance, self.amb_stamp[ambulance])
        self._dispatch()

    def _home(self, ambulance: int, stamp: int) -> None:
        if self.amb_stamp[ambulance] == stamp:
            self.amb_base[ambulance] = self.layout.post_base[ambulance]

    def _handed_over(self, ambulance: int, hospital: int) -> None:
        self._free_at_hospital(ambulance, hospital)

    # -- ways to hospital --------------------------------------------------------------

    def _nearest_hospital(self, origin: int, child: bool) -> int:
        """The nearest hospital that is not evacuated, as people who drive themselves choose."""
        best, least = -1, NO_WAY_MIN
        row = self.hospital_min[origin]
        for index, (site, hospital) in enumerate(
            zip(self.layout.hospitals, self.hospitals, strict=True)
        ):
            refused = hospital.evacuated or (site.for_children and not child)
            if row[index] < least and not refused:
                best, least = index, row[index]
        return best

    def _choose_hospital(self, patient: int, origin: int, leaving: int) -> int:
        """The hospital with the least way plus expected wait, or -1 if there is none.

        A place is expected after `turnover / capacity` minutes for each patient too many.
        Level I trauma centres are worth a detour for severity 3. A hospital that diverts is
        taken only if all do. One that `leaving` is not -1 leaves must offer a free bed.
        """
        patients = self.patients
        child = patients.child[patient]
        critical = patients.severity[patient] >= CRITICAL and not patients.stepped_down[patient]
        turnover = self.turnover_min[0 if critical else 1]
        row = self.hospital_min[origin]
        best, least, nearest, nearest_min, best_full = -1, inf, -1, inf, False
        for index, hospital in enumerate(self.hospitals):
            minutes = row[index]
            site = self.layout.hospitals[index]
            if minutes >= NO_WAY_MIN or index == leaving or (site.for_children and not child):
                continue
            if minutes < nearest_min:
                nearest, nearest_min = index, minutes
            pool = hospital.icu if critical else hospital.ward
            if pool.capacity <= 0:
                continue
            inbound = hospital.inbound_icu if critical else hospital.inbound_ward
            free = pool.capacity - pool.occupied - inbound
            full = free <= 0
            if full:
                if leaving >= 0:
                    continue
                minutes += (1 - free + hospital.queue) * turnover / pool.capacity
            if critical and site.trauma_level != 1:
                minutes += self.p["trauma_penalty_min"]
            if hospital.diverting:
                minutes += 1000.0
            if minutes < least:
                best, least, best_full = index, minutes, full
        if best < 0 and leaving < 0:
            best = self._nearest_hospital(origin, child)
        if nearest >= 0 and nearest != best:
            self._blame(patient, self.hospitals[nearest].trouble.values())
        if best_full:
            self._blame(patient, self.hospitals[best].trouble.values())
        return best

    def _head_for(self, patient: int, hospital: int) -> None:
        self.patients.hospital[patient] = hospital
        if self._needs_icu(patient):
            self.hospitals[hospital].inbound_icu += 1
        else:
            self.hospitals[hospital].inbound_ward += 1

    def _needs_icu(self, patient: int) -> bool:
        patients = self.patients
        return patients.severity[patient] >= CRITICAL and not patients.stepped_down[patient]

    def _blame(self, patient: int, events: Iterable[str]) -> None:
        """Remember what delays or refuses the care of a patient."""
        new = tuple(e for e in events if e)
        if new:
            self.blame[patient] = tuple(dict.fromkeys((*self.blame.get(patient, ()), *new)))

    def _blame_road(self, patient: int, origin: int, hospital: int) -> None:
        usual = self.usual_hospital_min[origin][hospital]
        if self.hospital_min[origin][hospital] > SLOW * usual + SLOW_MIN:
            column = self.layout.hospitals[hospital].column
            self._blame(
                patient, self._causes("hospital_time", origin * self.layout.columns + column)
            )

    # -- in hospital -------------------------------------------------------------------

    def _arrive(self, patient: int, ambulance: int) -> None:
        patients = self.patients
        index = patients.hospital[patient]
        hospital = self.hospitals[index]
        if self._needs_icu(patient):
            hospital.inbound_icu -= 1
        else:
            hospital.inbound_ward -= 1
        if patients.state[patient] == DEAD:
            if ambulance >= 0:
                self._free_at_hospital(ambulance, index)
            return
        patients.ambulance[patient] = -1
        if ambulance >= 0:
            p, crowding = self.p, hospital.crowding(self.p)
            usual = p["handover_disaster_min"] if self.plan else p["handover_min"]
            surge = p["handover_surge_min"] / p["handover_min"] - 1.0
            cv = p["handover_cv"]
            draw = 1.0 - cv + cv * patients.handover_draw[patient]
            held = usual * (1.0 + surge * crowding) * draw
            self.calendar.at(self.now + held, Kind.HANDED_OVER, ambulance, index)
        pool = hospital.icu if self._needs_icu(patient) else hospital.ward
        if pool.take():
            self._admit(patient)
        else:
            self._queue(patient, index)

    def _queue(self, patient: int, index: int) -> None:
        hospital = self.hospitals[index]
        self._move(patient, QUEUED)
        hospital.queue += 1
        needs_icu = self._needs_icu(patient)
        (hospital.icu if needs_icu else hospital.ward).wait(self.now, patient)
        if needs_icu and self.plan and "icu" not in hospital.trouble:
            site = self.layout.hospitals[index]
            hospital.trouble["icu"] = self._emit(
                "icu_full",
                site.id,
                f"{site.name} has no intensive-care place for a patient who needs one",
                (*hospital.trouble.values(), *self.last_casualties),
            )
        self._review_diversion(index)

    def _admit(self, patient: int) -> None:
        """Begin definitive care of a patient for whom a bed was just taken."""
        patients = self.patients
        patients.visit[patient] += 1
        visit = patients.visit[patient]
        if self._needs_icu(patient):
            self._move(patient, IN_ICU)
            leave, stay = Kind.LEAVE_ICU, patients.first_stay_min[patient]
        else:
            self._move(patient, IN_WARD)
            stepped = patients.stepped_down[patient]
            stay = (patients.ward_stay_min if stepped else patients.first_stay_min)[patient]
            leave = Kind.LEAVE_WARD
        patients.transfer[patient] = False
        patients.ambulance[patient] = -1
        if not patients.treated[patient]:
            patients.treated[patient] = True
            self.treated += 1
        self.calendar.at(self.now + stay, leave, patient, visit)

    def _serve(self, index: int) -> None:
        """Give free beds to those who wait."""
        hospital = self.hospitals[index]
        patients = self.patients

        def still_waits(patient: int) -> bool:
            return patients.state[patient] == QUEUED and patients.hospital[patient] == index

        for pool in (hospital.icu, hospital.ward):
            while (patient := pool.next_waiting(still_waits)) is not None:
                hospital.queue -= 1
                self._admit(patient)
        if hospital.icu.free > 0:
            hospital.trouble.pop("icu", None)
        if hospital.diverting:
            self._review_diversion(index)

    def _leave_icu(self, patient: int, visit: int) -> None:
        patients = self.patients
        if patients.visit[patient] != visit or patients.state[patient] != IN_ICU:
            return
        if patients.hopeless[patient]:
            return
        index = patients.hospital[patient]
        hospital = self.hospitals[index]
        if not hospital.ward.take():
            self.calendar.at(self.now + STEP_DOWN_RETRY_MIN, Kind.LEAVE_ICU, patient, visit)
            return
        hospital.icu.leave()
        patients.stepped_down[patient] = True
        self._admit(patient)
        self._serve(index)

    def _leave_ward(self, patient: int, visit: int) -> None:
        patients = self.patients
        if patients.visit[patient] != visit or patients.state[patient] != IN_WARD:
            return
        if patients.hopeless[patient]:
            return
        index = patients.hospital[patient]
        self.hospitals[index].ward.leave()
        self._move(patient, DISCHARGED)
        self._serve(index)

    # -- death -------------------------------------------------------------------------

    def _limit(self, patient: int, _: int) -> None:
        patients = self.patients
        state = patients.state[patient]
        if state in (DISCHARGED, DEAD) or (
            patients.treated[patient] and not patients.hopeless[patient]
        ):
            return
        if patients.treated[patient]:
            self._die(patient, "in hospital of injuries that could not be survived")
        elif patients.hopeless[patient]:
            self._die(patient, "of injuries that could not be survived")
        else:
            self._die(patient, "waiting for care")

    def _interrupted(self, patient: int, visit: int) -> None:
        patients = self.patients
        if patients.visit[patient] == visit and patients.state[patient] in (QUEUED, ABOARD):
            self._die(patient, "turned out of intensive care")

    def _die(self, patient: int, how: str) -> None:
        patients = self.patients
        state = patients.state[patient]
        index = patients.hospital[patient]
        ordinary = patients.batch[patient] < 0
        if state in (HIDDEN, CALLING):
            self.waiting[patients.zone[patient]] -= 1
            if state == CALLING and patients.ambulance[patient] < 0:
                self.open_calls -= 1
                self._note_response(patient)
                self._blame_absent_ambulance(patient)
        elif state == QUEUED:
            self.hospitals[index].queue -= 1
            self._blame(patient, self.hospitals[index].trouble.values())
        self._move(patient, DEAD)
        blame = self.blame.get(patient, ())
        if not ordinary:
            blame = (*blame, *self.batch_causes[patients.batch[patient]])
        if not ordinary or (blame and not patients.hopeless[patient]):
            zone = patients.zone[patient]
            entity = self.layout.zones[zone] if zone >= 0 else self.layout.hospitals[index].id
            self._emit(
                "patient_died", entity, f"severity {patients.severity[patient]}, {how}", blame
            )
        if state == IN_ICU:
            self.hospitals[index].icu.leave()
            self._serve(index)
        elif state == IN_WARD:
            self.hospitals[index].ward.leave()
            self._serve(index)
        elif state == QUEUED and self.hospitals[index].diverting:
            self._review_diversion(index)

    def _blame_absent_ambulance(self, patient: int) -> None:
        if self.exhausted_event:
            self._blame(patient, (self.exhausted_event,))
        scene = self.layout.zone_scene[self.patients.zone[patient]]
        minutes = self.scene_min[scene]
        base = min(range(len(minutes)), key=minutes.__getitem__)
        if minutes[base] > SLOW * self.usual_scene_min[scene][base] + SLOW_MIN:
            self._blame(patient, self._causes("scene_time", base * self.layout.scenes + scene))

    def _six_hours(self, first: int, last: int) -> None:
        self.untreated_after_6h += self.patients.treated[first:last].count(False)

    # -- hospitals' lifelines ----------------------------------------------------------

    def set_damage(self, index: int, state: float) -> None:
        """Take note of the Hazus damage state of a hospital."""
        hospital = self.hospitals[index]
        worse = state > hospital.damage_state
        hospital.damage_state = state
        causes = self._causes("hospital_damage_state", index)
        if worse and state >= 2.0:
            hospital.trouble["damage"] = causes[0] if causes else ""
        elif state < 2.0:
            hospital.trouble.pop("damage", None)
        self._resize(index, causes)

    def set_power(self, index: int, share: float) -> None:
        """Take note of the share of the wanted power that the grid gives a hospital."""
        hospital, site, p = self.hospitals[index], self.layout.hospitals[index], self.p
        hospital.grid_share = share
        if share < 0.95:
            hospital.saving = True
            hospital.short_since_min = inf
        elif hospital.saving and hospital.short_since_min == inf:
            hospital.short_since_min = self.now
        causes = self._causes("hospital_power", index)
        if hospital.on_grid and share < p["power_threshold"]:
            hospital.on_grid = False
            hospital.outage += 1
            if hospital.generator_starts and hospital.fuel_h > 0.0:
                self._start_generator(index, causes)
            else:
                hospital.latest_event = hospital.trouble["power"] = self._emit(
                    "generator_failed",
                    site.id,
                    f"{site.name} lost the grid and its generator did not start",
                    causes,
                )
            self._resize(index, (hospital.trouble["power"],))
        elif not hospital.on_grid and share >= min(1.0, p["power_threshold"] + 0.1):
            hospital.settle_fuel(self.now)
            hospital.on_grid = True
            hospital.generator_on = False
            hospital.outage += 1
            before = hospital.trouble.pop("power", "")
            hospital.latest_event = self._emit(
                "hospital_on_grid", site.id, f"{site.name} is back on the grid", (*causes, before)
            )
            self._resize(index, (hospital.latest_event,))

    def _start_generator(self, index: int, causes: Iterable[str]) -> None:
        hospital, site = self.hospitals[index], self.layout.hospitals[index]
        hospital.generator_on = True
        hospital.fuel_as_of_min = self.now
        hospital.latest_event = hospital.trouble["power"] = self._emit(
            "hospital_on_generator",
            site.id,
            f"{site.name} runs on its generator with fuel for {hospital.fuel_h:.0f} h",
            causes,
        )
        out = self.now + 60.0 * hospital.fuel_h
        half = max(self.now, out - 30.0 * hospital.tank_h)
        self.calendar.at(out, Kind.FUEL_OUT, index, hospital.outage)
        self.calendar.at(
            half + 60.0 * self.p["refuel_delay_h"], Kind.REFUEL, index, hospital.outage
        )

    def _fuel_out(self, index: int, outage: int) -> None:
        hospital, site = self.hospitals[index], self.layout.hospitals[index]
        if hospital.outage != outage or not hospital.generator_on:
            return
        hospital.settle_fuel(self.now)
        hospital.fuel_h = 0.0
        hospital.generator_on = False
        hospital.latest_event = hospital.trouble["power"] = self._emit(
            "generator_out_of_fuel",
            site.id,
            f"{site.name} has no fuel left and no power",
            (hospital.trouble.get("power", ""), *self._causes("hospital_power", index)),
        )
        self._resize(index, (hospital.latest_event,))

    def _refuel(self, index: int, outage: int) -> None:
        """Deliver fuel, or try again in an hour while most ways to the hospital are closed."""
        hospital = self.hospitals[index]
        if hospital.outage != outage or hospital.on_grid or self.p["refuel_h"] <= 0.0:
            return
        origins = range(self.layout.scenes)
        usable = sum(
            self.hospital_min[o][index] < 3.0 * self.usual_hospital_min[o][index] + SLOW_MIN
            for o in origins
        )
        if 2 * usable < self.layout.scenes:
            self.calendar.at(self.now + 60.0, Kind.REFUEL, index, outage)
            return
        hospital.settle_fuel(self.now)
        hospital.fuel_h = min(hospital.tank_h, hospital.fuel_h + self.p["refuel_h"])
        hospital.outage += 1
        before = hospital.trouble.get("power", "")
        delivered = self._emit(
            "fuel_delivered",
            self.layout.hospitals[index].id,
            f"fuel for {self.p['refuel_h']:.0f} h reaches {self.layout.hospitals[index].name}",
            (before,),
        )
        if hospital.generator_on:
            self.calendar.at(
                self.now + 60.0 * hospital.fuel_h, Kind.FUEL_OUT, index, hospital.outage
            )
            self.calendar.at(
                self.now + 60.0 * self.p["refuel_delay_h"], Kind.REFUEL, index, hospital.outage
            )
        else:
            self._start_generator(index, (delivered,))
            self._resize(index, (delivered,))

    def set_water(self, index: int, share: float) -> None:
        """Take note of the share of the needed water that a hospital gets."""
        hospital, site = self.hospitals[index], self.layout.hospitals[index]
        was_short = hospital.water_share < self.p["water_threshold"]
        hospital.settle_reserve(self.now, self.p)
        hospital.water_share = share
        short = share < self.p["water_threshold"]
        if short and not was_short:
            hospital.drought += 1
            self.calendar.at(
                self.now + 60.0 * hospital.reserve_h, Kind.DRY, index, hospital.drought
            )
        elif was_short and not short:
            hospital.drought += 1
            if hospital.dry:
                hospital.dry = False
                before = hospital.trouble.pop("water", "")
                hospital.latest_event = self._emit(
                    "hospital_water_back",
                    site.id,
                    f"{site.name} has water again",
                    (*self._causes("hospital_water", index), before),
                )
                self._resize(index, (hospital.latest_event,))

    def _dry(self, index: int, drought: int) -> None:
        hospital, site = self.hospitals[index], self.layout.hospitals[index]
        if hospital.drought != drought or hospital.dry:
            return
        hospital.settle_reserve(self.now, self.p)
        hospital.dry = True
        hospital.latest_event = hospital.trouble["water"] = self._emit(
            "hospital_without_water",
            site.id,
            f"{site.name} has used up its water reserve",
            self._causes("hospital_water", index),
        )
        self._resize(index, (hospital.latest_event,))

    def _resize(self, index: int, causes: tuple[str, ...]) -> None:
        """Set capacities anew; record what that costs or gives back, and move patients."""
        hospital, site = self.hospitals[index], self.layout.hospitals[index]
        before, lost = hospital.functional_beds, hospital.trouble.get("beds", "")
        hospital.resize(self.p)
        after = hospital.functional_beds
        if after < before:
            hospital.latest_event = hospital.trouble["beds"] = self._emit(
                "hospital_beds_lost",
                site.id,
                f"{site.name} can use {after} beds instead of {before}"
                + (" and is evacuated" if hospital.evacuated else ""),
                causes,
            )
        elif after > before and lost:
            hospital.latest_event = self._emit(
                "hospital_beds_back",
                site.id,
                f"{site.name} can use {after} beds instead of {before}",
                (*causes, lost),
            )
            if hospital.function(self.p) >= 1.0:
                hospital.trouble.pop("beds")
        for _ in range(-hospital.icu.free):
            self._turn_out(index)
        self._serve(index)
        self._review_diversion(index)

    def _turn_out(self, index: int) -> None:
        """Move one patient out of an intensive-care unit that lost the place."""
        hospital, patients = self.hospitals[index], self.patients
        if hospital.icu_inpatients:
            draw = np.random.default_rng(
                [self.seed, HOSPITALS_STREAM, index, hospital.icu_inpatients]
            ).standard_exponential()
            stay = self.p["icu_stay_h"] * 60.0
            hospital.icu_inpatients -= 1
            patient = patients.add(inpatient(CRITICAL, stay, float(draw)), [-1])
            patients.treated[patient] = True
            patients.hospital[patient] = index
            self.counts[QUEUED] += 1
            patients.state[patient] = QUEUED
        else:
            patient = next(
                (
                    i
                    for i in range(len(patients) - 1, -1, -1)
                    if patients.state[i] == IN_ICU and patients.hospital[i] == index
                ),
                -1,
            )
            if patient < 0:
                return
            self._move(patient, QUEUED)
        hospital.icu.leave()
        hospital.queue += 1
        hospital.icu.wait(self.now, patient)
        self._blame(patient, hospital.trouble.values())
        tolerance = self.p["interruption_tolerance_h"] * 60.0 * patients.tolerance_draw[patient]
        self.calendar.at(self.now + tolerance, Kind.INTERRUPTED, patient, patients.visit[patient])
        self._ask_for_transfer(patient)

    def _ask_for_transfer(self, patient: int) -> None:
        self.patients.transfer[patient] = True
        priority = -2 * self.patients.severity[patient] + 1
        heapq.heappush(self.calls, (priority, self.now, patient))
        self._dispatch()

    def _review_diversion(self, index: int) -> None:
        hospital, site = self.hospitals[index], self.layout.hospitals[index]
        limit = max(LEAST_QUEUE, self.p["diversion_queue_share"] * hospital.functional_beds)
        closed = hospital.functional_beds == 0
        if not hospital.diverting and (closed or hospital.queue > limit):
            hospital.diverting = True
            causes = (*hospital.trouble.values(), *self.last_casualties)
            hospital.latest_event = hospital.trouble["diverting"] = self._emit(
                "hospital_diverting",
                site.id,
                f"{site.name} turns ambulances away: {hospital.queue} patients wait "
                f"for {hospital.functional_beds} beds",
                causes,
            )
        elif hospital.diverting and not closed and hospital.queue <= limit / 2:
            hospital.diverting = False
            before = hospital.trouble.pop("diverting", "")
            hospital.latest_event = self._emit(
                "hospital_open", site.id, f"{site.name} takes ambulances again", (before,)
            )

    # -- every quarter of an hour ------------------------------------------------------

    def _tick(self, number: int, _: int) -> None:
        self.calendar.at((number + 1) * TICK_MIN, Kind.TICK, number + 1)
        for index, hospital in enumerate(self.hospitals):
            if number % 4 == 0 and number:
                hour = hospital.live_an_hour(self.plan, self.p)
                self.arisen += hour.admitted
                self.discharged_uncounted += hour.discharged
            if hospital.saving and self.now - hospital.short_since_min >= 60.0:
                hospital.saving = False
            if hospital.walk_ins:
                self._see_walk_ins(hospital)
            if hospital.ward.free < 0:
                self._send_by_bus(index)
            if hospital.queue:
                self._serve(index)
                self._ask_for_transfers(index)
        self._retry()
        if self.calls:
            self._dispatch()

    def _see_walk_ins(self, hospital: Hospital) -> None:
        beds = hospital.functional_beds
        hospital.walk_in_carry += self.p["minor_per_bed_h"] * beds * TICK_MIN / 60.0
        seen = min(hospital.walk_ins, int(hospital.walk_in_carry))
        hospital.walk_in_carry -= int(hospital.walk_in_carry)
        if hospital.evacuated:
            seen = hospital.walk_ins  # turned away to look after themselves
        hospital.walk_ins -= seen
        self.discharged_uncounted += seen

    def _send_by_bus(self, index: int) -> None:
        """Send ward patients beyond the beds to the hospital with most free ones.

        Their ride of less than one tick is not modelled.
        """
        source = self.hospitals[index]
        source.bus_carry += self.p["bus_patients_per_h"] * TICK_MIN / 60.0
        seats = int(source.bus_carry)
        source.bus_carry -= seats
        row = self.hospital_min[self.layout.hospitals[index].origin]
        for _ in range(min(seats, -source.ward.free)):
            open_ones = [
                (self._unclaimed(h), -i)
                for i, h in enumerate(self.hospitals)
                if i != index
                and row[i] < NO_WAY_MIN
                and not self.layout.hospitals[i].for_children
                and self._unclaimed(h) > 0
            ]
            if not open_ones:
                return
            target = -max(open_ones)[1]
            if source.ward_inpatients:
                source.ward_inpatients -= 1
                self.hospitals[target].ward_inpatients += 1
            else:
                patient = self._one_on_ward(index)
                if patient < 0:
                    return
                self.patients.hospital[patient] = target
            source.ward.leave()
            self.hospitals[target].ward.take()

    @staticmethod
    def _unclaimed(hospital: Hospital) -> int:
        return hospital.ward.free - hospital.inbound_ward

    def _one_on_ward(self, index: int) -> int:
        patients = self.patients
        for patient in range(len(patients)):
            if patients.state[patient] == IN_WARD and patients.hospital[patient] == index:
                return patient
        return -1

    def _forget_gone(self, index: int, pool: BedPool) -> None:
        """Strike out entries of patients who died or left while waiting."""
        patients = self.patients
        pool.waiting = [
            entry
            for entry in pool.waiting
            if patients.state[entry[1]] == QUEUED and patients.hospital[entry[1]] == index
        ]
        heapq.heapify(pool.waiting)

    def _ask_for_transfers(self, index: int) -> None:
        """Ask ambulances to take some of those who wait long to where a bed is free."""
        hospital = self.hospitals[index]
        patients = self.patients
        for critical, pool in ((True, hospital.icu), (False, hospital.ward)):
            places = sum(
                max(0, (h.icu.free - h.inbound_icu) if critical else self._unclaimed(h))
                for i, h in enumerate(self.hospitals)
                if i != index
            )
            if len(pool.waiting) > 2 * hospital.queue + 40:
                self._forget_gone(index, pool)
            asked = 0
            for _, patient in sorted(pool.waiting[:40]):
                if asked >= min(TRANSFERS_PER_TICK, places):
                    break
                if (
                    patients.state[patient] == QUEUED
                    and patients.hospital[patient] == index
                    and not patients.transfer[patient]
                    and patients.ambulance[patient] < 0
                ):
                    self._ask_for_transfer(patient)
                    asked += 1
