"""Decides which hospital a patient heads for."""

from __future__ import annotations

from math import inf

from twins.medical.hospitals import Hospital
from twins.medical.records import Records
from twins.medical.ways import NO_WAY_MIN, Ways


class Destinations:
    """The choice of a hospital by way and expected wait, and what refused a nearer one."""

    def __init__(self, records: Records, ways: Ways, hospitals: list[Hospital]) -> None:
        self.records = records
        self.ways = ways
        self.hospitals = hospitals
        # what stands for the waiting minutes behind one patient too many, by unit
        self.turnover_min = (records.p["critical_stay_h"] * 60.0, 24.0 * 60.0)

    def nearest(self, origin: int, child: bool) -> int:
        """The nearest hospital that is not evacuated, as people who drive themselves choose.

        -1 if none can be reached.
        """
        if self.ways.leads_nowhere[origin]:
            return -1
        best, least = -1, NO_WAY_MIN
        row = self.ways.hospital_min[origin]
        for index, (site, hospital) in enumerate(
            zip(self.records.layout.hospitals, self.hospitals, strict=True)
        ):
            refused = hospital.evacuated or (site.for_children and not child)
            if row[index] < least and not refused:
                best, least = index, row[index]
        return best

    def choose(self, patient: int, origin: int, leaving: int) -> int:
        """The hospital with the least way plus expected wait, or -1 if there is none.

        A place is expected after `turnover / capacity` minutes for each patient too many.
        Level I trauma centres are worth a detour for severity 3. A hospital that diverts is
        taken only if all do. One that `leaving` is not -1 leaves must offer a free bed.
        """
        records = self.records
        patients, sites = records.patients, records.layout.hospitals
        child = patients.child[patient]
        critical = patients.needs_icu(patient)
        turnover = self.turnover_min[0 if critical else 1]
        row = self.ways.hospital_min[origin]
        best, least, nearest, nearest_min, best_full = -1, inf, -1, inf, False
        for index, hospital in enumerate(self.hospitals):
            minutes = row[index]
            site = sites[index]
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
                minutes += records.p["trauma_penalty_min"]
            if hospital.diverting:
                minutes += 1000.0
            if minutes < least:
                best, least, best_full = index, minutes, full
        if best < 0 and leaving < 0:
            best = self.nearest(origin, child)
        if nearest >= 0 and nearest != best:
            records.note_delay(patient, self.hospitals[nearest].trouble.values())
        if best_full:
            records.note_delay(patient, self.hospitals[best].trouble.values())
        return best

    def head_for(self, patient: int, hospital: int) -> None:
        """Announce a patient to a hospital."""
        patients = self.records.patients
        patients.hospital[patient] = hospital
        if patients.needs_icu(patient):
            self.hospitals[hospital].inbound_icu += 1
        else:
            self.hospitals[hospital].inbound_ward += 1
