"""Runs the beds of every hospital: who gets one, who waits, who has to leave."""

from __future__ import annotations

import numpy as np

from twins.medical.calendar import Kind
from twins.medical.dispatch import Dispatch
from twins.medical.hospitals import Hospital
from twins.medical.patients import CRITICAL, HOSPITALS_STREAM, State, inpatient
from twins.medical.records import Records

STEP_DOWN_RETRY_MIN = 60.0
LEAST_QUEUE = 5
"""Shortest queue that makes a hospital divert."""


class Wards:
    """Patients in hospital: queued, in intensive care, on a ward, discharged.

    Definitive care begins with the bed. A patient in intensive care steps down to a ward.
    """

    def __init__(self, records: Records, dispatch: Dispatch, hospitals: list[Hospital]) -> None:
        self.records = records
        self.dispatch = dispatch
        self.hospitals = hospitals
        self.treated = 0
        self.plan_event = ""

    # -- patients come and go ----------------------------------------------------------

    def arrive(self, patient: int, ambulance: int) -> None:
        """A patient reaches a hospital, alive or dead; `ambulance` -1: in a private car."""
        patients = self.records.patients
        index = patients.hospital[patient]
        hospital = self.hospitals[index]
        needs_icu = patients.needs_icu(patient)
        if needs_icu:
            hospital.inbound_icu -= 1
        else:
            hospital.inbound_ward -= 1
        if patients.state[patient] == State.DEAD:
            if ambulance >= 0:
                self.dispatch.free_at_hospital(ambulance, index)
            return
        patients.ambulance[patient] = -1
        if ambulance >= 0:
            self.dispatch.hand_over(patient, ambulance, index)
        if (hospital.icu if needs_icu else hospital.ward).take():
            self._admit(patient)
        else:
            self._queue(patient, index)

    def _queue(self, patient: int, index: int) -> None:
        records, hospital = self.records, self.hospitals[index]
        records.move(patient, State.QUEUED)
        hospital.queue += 1
        needs_icu = records.patients.needs_icu(patient)
        (hospital.icu if needs_icu else hospital.ward).wait(records.now, patient)
        if needs_icu and records.plan and "icu" not in hospital.trouble:
            site = records.layout.hospitals[index]
            hospital.trouble["icu"] = records.emit(
                "icu_full",
                site.id,
                f"{site.name} has no intensive-care bed for a patient who needs one",
                (*hospital.trouble.values(), *records.last_casualties),
            )
        self._review_diversion(index)

    def _admit(self, patient: int) -> None:
        """Begin definitive care of a patient for whom a bed was just taken."""
        records = self.records
        patients = records.patients
        patients.visit[patient] += 1
        if patients.needs_icu(patient):
            records.move(patient, State.IN_ICU)
            leave, stay = Kind.LEAVE_ICU, patients.first_stay_min[patient]
        else:
            records.move(patient, State.IN_WARD)
            stepped = patients.stepped_down[patient]
            stay = (patients.ward_stay_min if stepped else patients.first_stay_min)[patient]
            leave = Kind.LEAVE_WARD
        patients.transfer[patient] = False
        patients.ambulance[patient] = -1
        if not patients.treated[patient]:
            patients.treated[patient] = True
            patients.treated_min[patient] = records.now
            self.treated += 1
        records.calendar.at(records.now + stay, leave, patient, patients.visit[patient])

    def serve(self, index: int) -> None:
        """Give free beds to those who wait."""
        hospital = self.hospitals[index]
        patients = self.records.patients

        def still_waits(patient: int) -> bool:
            return patients.state[patient] == State.QUEUED and patients.hospital[patient] == index

        for pool in (hospital.icu, hospital.ward):
            while (patient := pool.next_waiting(still_waits)) is not None:
                hospital.queue -= 1
                self._admit(patient)
        if hospital.icu.free > 0:
            hospital.trouble.pop("icu", None)
        if hospital.diverting:
            self._review_diversion(index)

    def leave_icu(self, patient: int, visit: int) -> None:
        """A patient steps down to the ward as soon as it has a bed."""
        records = self.records
        patients = records.patients
        if patients.visit[patient] != visit or patients.state[patient] != State.IN_ICU:
            return
        if patients.hopeless[patient]:
            return
        index = patients.hospital[patient]
        hospital = self.hospitals[index]
        if not hospital.ward.take():
            later = records.now + STEP_DOWN_RETRY_MIN
            records.calendar.at(later, Kind.LEAVE_ICU, patient, visit)
            return
        hospital.icu.leave()
        patients.stepped_down[patient] = True
        self._admit(patient)
        self.serve(index)

    def leave_ward(self, patient: int, visit: int) -> None:
        """A patient goes home."""
        patients = self.records.patients
        if patients.visit[patient] != visit or patients.state[patient] != State.IN_WARD:
            return
        if patients.hopeless[patient]:
            return
        index = patients.hospital[patient]
        self.hospitals[index].ward.leave()
        self.records.move(patient, State.DISCHARGED)
        self.serve(index)

    def enter_death(self, patient: int, why: str = "") -> None:
        """Enter the death of a patient in hospital and use the place that it leaves."""
        records = self.records
        state, index = records.patients.state[patient], records.patients.hospital[patient]
        hospital = self.hospitals[index]
        if state == State.QUEUED:
            hospital.queue -= 1
            records.note_delay(patient, hospital.trouble.values())
        records.enter_death(patient, why)
        if state == State.QUEUED:
            if hospital.diverting:
                self._review_diversion(index)
        else:
            (hospital.icu if state == State.IN_ICU else hospital.ward).leave()
            self.serve(index)

    # -- beds come and go --------------------------------------------------------------

    def activate_plan(self) -> None:
        """Put the disaster plan in force: reverse triage, surge beds, immediate off-load."""
        records = self.records
        p = records.p
        records.plan = True
        self.plan_event = records.emit(
            "disaster_plan",
            "system",
            "all hospitals put their disaster plans in force",
            records.last_casualties,
        )
        for hospital in self.hospitals:
            hospital.early_left = p["early_discharge_share"] * hospital.ward_inpatients
            hospital.early_per_h = hospital.early_left / p["early_discharge_h"]
        records.calendar.at(records.now + 60.0 * p["surge_open_h"], Kind.SURGE)

    def prepare(self, causes: tuple[str, ...]) -> None:
        """Let the disaster plan have been in force for long: surge beds are open, who could be
        sent home early has gone."""
        records = self.records
        records.plan = True
        records.last_casualties = causes
        self.plan_event = records.emit(
            "disaster_plan", "system", "all hospitals have their disaster plans in force", causes
        )
        self.surge(0, 0)

    def surge(self, _: int, __: int) -> None:
        """Open the surge beds of the disaster plan."""
        for index, hospital in enumerate(self.hospitals):
            hospital.surge_open = True
            hospital.latest_event = self.plan_event
            self.resize(index, (self.plan_event,))

    def resize(self, index: int, causes: tuple[str, ...]) -> None:
        """Set capacities anew; record what that costs or gives back, and move patients."""
        records, hospital = self.records, self.hospitals[index]
        site = records.layout.hospitals[index]
        before, lost = hospital.functional_beds, hospital.trouble.get("beds", "")
        hospital.resize(records.p)
        after = hospital.functional_beds
        if after < before:
            hospital.latest_event = hospital.trouble["beds"] = records.emit(
                "hospital_beds_lost",
                site.id,
                f"{site.name} is evacuated: none of its {before} beds can be used"
                if hospital.evacuated
                else f"{site.name} can use only {after} of {before} beds",
                causes,
            )
        elif after > before and lost:
            hospital.latest_event = records.emit(
                "hospital_beds_back",
                site.id,
                f"{site.name} can use {after} beds, up from {before}",
                (*causes, lost),
            )
            if hospital.function(records.p) >= 1.0:
                hospital.trouble.pop("beds")
        for _ in range(-hospital.icu.free):
            self._turn_out(index)
        self.serve(index)
        self._review_diversion(index)

    def _turn_out(self, index: int) -> None:
        """Move one patient out of an intensive-care unit that lost the place."""
        records, hospital = self.records, self.hospitals[index]
        patients = records.patients
        if hospital.icu_inpatients:
            patient = self._enter_inpatient(index)
        else:
            patient = patients.last_in(State.IN_ICU, index)
            if patient < 0:
                return
            records.move(patient, State.QUEUED)
        hospital.icu.leave()
        hospital.queue += 1
        hospital.icu.wait(records.now, patient)
        records.note_delay(patient, hospital.trouble.values())
        mean_min = records.p["interruption_tolerance_h"] * 60.0
        until = records.now + mean_min * patients.tolerance_draw[patient]
        records.calendar.at(until, Kind.INTERRUPTED, patient, patients.visit[patient])
        self.dispatch.call_for_transfer(patient)

    def _enter_inpatient(self, index: int) -> int:
        """Make an inpatient of before the disaster, until now only counted, one who waits."""
        records, hospital = self.records, self.hospitals[index]
        patients = records.patients
        draw = np.random.default_rng(
            [records.seed, HOSPITALS_STREAM, index, hospital.icu_inpatients]
        ).standard_exponential()
        stay = records.p["icu_stay_h"] * 60.0
        hospital.icu_inpatients -= 1
        patient = patients.add(inpatient(CRITICAL, stay, float(draw)), [-1])
        patients.treated[patient] = True
        patients.hospital[patient] = index
        records.arise(patient, State.QUEUED)
        return patient

    def _review_diversion(self, index: int) -> None:
        records, hospital = self.records, self.hospitals[index]
        site = records.layout.hospitals[index]
        limit = max(LEAST_QUEUE, records.p["diversion_queue_share"] * hospital.functional_beds)
        closed = hospital.functional_beds == 0
        if not hospital.diverting and (closed or hospital.queue > limit):
            hospital.diverting = True
            causes = (*hospital.trouble.values(), *records.last_casualties)
            hospital.latest_event = hospital.trouble["diverting"] = records.emit(
                "hospital_diverting",
                site.id,
                f"{site.name} turns ambulances away: "
                + ("no bed can be used" if closed else f"{hospital.queue} patients wait for a bed"),
                causes,
            )
        elif hospital.diverting and not closed and hospital.queue <= limit / 2:
            hospital.diverting = False
            before = hospital.trouble.pop("diverting", "")
            hospital.latest_event = records.emit(
                "hospital_open", site.id, f"{site.name} takes ambulances again", (before,)
            )
