"""Moves every patient from injury or call to discharge or death, event by event.

The flow of one patient: hidden (not yet found, or trapped), calling (or driven by others),
aboard an ambulance, queued at a hospital, in intensive care or on a ward, discharged or dead.
Each module does a stretch of that way; this one hands out the events and counts the patients.

The engine runs in plain Python: per patient it books some eight events at two microseconds
each, so 5,000 casualties take less time than numba needs to load its cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any

from federation.twin import Vector
from twins.medical.arrivals import Arrivals
from twins.medical.beds import BedPool
from twins.medical.calendar import Calendar, Kind
from twins.medical.destinations import Destinations
from twins.medical.dispatch import Dispatch
from twins.medical.hospitals import Hospital, open_hospitals
from twins.medical.layout import Layout
from twins.medical.lifelines import Lifelines
from twins.medical.patients import Arrest, Patients, State
from twins.medical.records import Journal, Records
from twins.medical.relief import Relief
from twins.medical.sickness import Sickness
from twins.medical.wards import Wards
from twins.medical.ways import Ways

TICK_MIN = 15.0

PARTS = (
    Records,
    Calendar,
    Kind,
    Patients,
    State,
    Arrest,
    Hospital,
    BedPool,
    Ways,
    Destinations,
    Dispatch,
    Wards,
    Lifelines,
    Relief,
    Arrivals,
    Sickness,
)
"""The classes of all that is in a state of `Care`."""


class Care:
    """The whole system of calls, ambulances and hospitals, advanced in continuous minutes.

    The parts refer only to those made before them.
    """

    def __init__(self, layout: Layout, parameters: Mapping[str, float], seed: int) -> None:
        self.records = Records(layout, parameters, seed)
        self.hospitals = open_hospitals(layout, self.records.p, seed)
        self.ways = Ways(self.records)
        self.destinations = Destinations(self.records, self.ways, self.hospitals)
        self.dispatch = Dispatch(self.records, self.ways, self.destinations, self.hospitals)
        self.wards = Wards(self.records, self.dispatch, self.hospitals)
        self.lifelines = Lifelines(self.records, self.ways, self.wards, self.hospitals)
        self.relief = Relief(self.records, self.ways, self.dispatch, self.hospitals)
        self.arrivals = Arrivals(
            self.records, self.destinations, self.dispatch, self.wards, self.hospitals
        )
        self.sickness = Sickness(self.records, self.wards, self.hospitals)
        self.records.arisen = sum(h.inpatients for h in self.hospitals)
        self.records.calendar.at(0.0, Kind.DAY, 0)
        self.records.calendar.at(0.0, Kind.TICK, 0)
        self._handlers = self._by_kind()

    def _by_kind(self) -> tuple[Callable[[int, int], None], ...]:
        dispatch, wards, lifelines = self.dispatch, self.wards, self.lifelines
        handlers: dict[Kind, Callable[[int, int], None]] = {
            Kind.DAY: self.arrivals.day,
            Kind.CALL: self.arrivals.call,
            Kind.FOUND: dispatch.found,
            Kind.AT_SCENE: dispatch.at_scene,
            Kind.DEPART: dispatch.depart,
            Kind.ARRIVE: wards.arrive,
            Kind.HANDED_OVER: dispatch.free_at_hospital,
            Kind.HOME: dispatch.home,
            Kind.LIMIT: self._limit,
            Kind.INTERRUPTED: self._interrupted,
            Kind.LEAVE_ICU: wards.leave_icu,
            Kind.LEAVE_WARD: wards.leave_ward,
            Kind.SIX_HOURS: self.arrivals.six_hours,
            Kind.TICK: self._tick,
            Kind.FUEL_OUT: lifelines.fuel_out,
            Kind.REFUEL: lifelines.refuel,
            Kind.DRY: lifelines.dry,
            Kind.WALK_INS: self.arrivals.walk_ins,
            Kind.SURGE: wards.surge,
            Kind.GIVE_UP: dispatch.give_up,
        }
        return tuple(handlers[kind] for kind in Kind)

    def state(self) -> dict[str, Any]:
        """The parts, to be kept together; with layout and parameters they are the whole."""
        return {name: part for name, part in vars(self).items() if name != "_handlers"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from such a `state`, with the region and parameters of this engine."""
        layout, parameters = self.records.layout, self.records.p
        vars(self).update(state)
        self.records.attach(layout, parameters)
        self._handlers = self._by_kind()

    # -- what comes from outside -------------------------------------------------------

    def advance(self, now_min: float, journal: Journal) -> bool:
        """Do all that is due until now; whether there was anything."""
        records = self.records
        heap = records.calendar.heap
        records.journal = journal
        if not heap or heap[0][0] > now_min:
            records.now = now_min
            return False
        handlers = self._handlers
        while heap and heap[0][0] <= now_min:
            records.now, _, kind, a, b = heapq.heappop(heap)
            handlers[kind](a, b)
        records.now = now_min
        return True

    def set_scene_times(self, minutes: Vector, usual: bool = False) -> None:
        """Times from bases to scenes; `usual` ones become the measure of what is slow."""
        self.ways.set_scene_times(minutes, usual)
        self.dispatch.retry()

    def set_hospital_times(self, minutes: Vector, usual: bool = False) -> None:
        """Times from scenes and hospitals to hospital nodes."""
        self.ways.set_hospital_times(minutes, usual)
        self.dispatch.retry()

    # -- balance -----------------------------------------------------------------------

    @property
    def in_system(self) -> int:
        """Patients counted where they are: on the scene, under way, queued or in a bed."""
        present = sum(self.records.counts[State.HIDDEN : State.IN_WARD + 1])
        inpatients = sum(h.inpatients + h.walk_ins for h in self.hospitals)
        return present + inpatients + self.arrivals.walk_ins_coming

    @property
    def discharged(self) -> int:
        return self.records.counts[State.DISCHARGED] + self.records.discharged_uncounted

    @property
    def dead(self) -> int:
        return self.records.counts[State.DEAD] + self.records.dead_at_once

    # -- death -------------------------------------------------------------------------

    def _limit(self, patient: int, _: int) -> None:
        """Care comes too late from now on."""
        patients = self.records.patients
        gone = patients.state[patient] in (State.DISCHARGED, State.DEAD)
        saved = patients.treated[patient] and not patients.hopeless[patient]
        if not gone and not saved:
            self._die(patient)

    def _interrupted(self, patient: int, visit: int) -> None:
        """A patient was out of intensive care for too long."""
        patients = self.records.patients
        outside = patients.state[patient] in (State.QUEUED, State.ABOARD)
        if patients.visit[patient] == visit and outside:
            self._die(patient, "turned out of intensive care")

    def _die(self, patient: int, why: str = "") -> None:
        patients = self.records.patients
        state = patients.state[patient]
        if state in (State.QUEUED, State.IN_ICU, State.IN_WARD):
            self.wards.enter_death(patient, why)
            return
        if state == State.CALLING and patients.ambulance[patient] < 0:
            self.dispatch.withdraw(patient)
        self.records.enter_death(patient, why)

    # -- every quarter of an hour ------------------------------------------------------

    def _tick(self, number: int, _: int) -> None:
        records = self.records
        records.calendar.at((number + 1) * TICK_MIN, Kind.TICK, number + 1)
        for index, hospital in enumerate(self.hospitals):
            if number % 4 == 0 and number:
                hour = hospital.live_an_hour(records.plan, records.p)
                records.arisen += hour.admitted
                records.discharged_uncounted += hour.discharged
            if hospital.saving and records.now - hospital.short_since_min >= 60.0:
                hospital.saving = False
            if hospital.walk_ins:
                records.discharged_uncounted += hospital.see_walk_ins(TICK_MIN, records.p)
            if hospital.ward.free < 0:
                self.relief.send_by_bus(index, TICK_MIN)
            if hospital.queue:
                self.wards.serve(index)
                self.relief.ask_for_transfers(index)
        self.dispatch.retry()
        if self.dispatch.calls:
            self.dispatch.send_idle()
