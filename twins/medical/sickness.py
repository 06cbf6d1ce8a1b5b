"""Lets those whom an epidemic makes seriously ill come to hospitals that it has filled before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from twins.medical.calendar import Kind
from twins.medical.hospitals import Hospital
from twins.medical.patients import CRITICAL, Arrest, People, State
from twins.medical.records import Records
from twins.medical.wards import Wards

SICKNESS_STREAM = 0x4D05
SIX_HOURS_MIN = 360.0


class Sickness:
    """The epidemic's patients: those who lie there when the run begins, and those who come."""

    def __init__(self, records: Records, wards: Wards, hospitals: list[Hospital]) -> None:
        self.records = records
        self.wards = wards
        self.hospitals = hospitals
        zones = len(records.layout.zones)
        self.ordinals = {severity: [0] * zones for severity in (2, CRITICAL)}
        """The sick so far, by severity and zone."""

    def fill(self, ward: float, icu: float) -> None:
        """Let so many patients lie in the region's hospitals, which have long prepared for it.

        Elective admissions have been put off for longer than a stay, surge beds are open, and who
        could go home early has gone. Every hospital, those of the neighbours too, has the same
        share of its free beds taken; who finds none is left out.
        """
        records, p = self.records, self.records.p
        causes = records.causes("present_ward", 0)
        self.wards.prepare(causes)
        inside = [site.role != "neighbour" for site in records.layout.hospitals]
        for hospital in self.hospitals:
            records.arisen -= hospital.put_off_electives(p)
        for persons, is_icu in ((ward, False), (icu, True)):
            pools = [h.icu if is_icu else h.ward for h in self.hospitals]
            free = [max(pool.free, 0) for pool in pools]
            room = sum(beds for beds, near in zip(free, inside, strict=True) if near)
            share = min(1.0, persons / max(room, 1))
            for hospital, beds in zip(self.hospitals, free, strict=True):
                taken = round(share * beds)
                hospital.lay(taken, is_icu)
                records.arisen += taken

    def come(self, severity: int, counts: list[tuple[int, int]]) -> None:
        """People of an instant who need a ward (severity 2) or intensive care (3), by zone."""
        records = self.records
        variable = "sick_icu" if severity >= CRITICAL else "sick_ward"
        before = self.ordinals[severity]
        people = draw_sick(
            records.seed, severity, counts, [before[zone] for zone, _ in counts], records.p
        )
        batches: list[int] = []
        for zone, size in counts:
            before[zone] += size
            records.arisen += size
            batches.extend([len(records.batch_causes)] * size)
            records.batch_min.append(records.now)
            records.batch_causes.append(records.causes(variable, zone))
            records.waiting[zone] += size
        first = records.patients.add(people, batches)
        last = first + len(people)
        for patient in range(first, last):
            records.patients.sick[patient] = True
            records.arise(patient, State.HIDDEN)
            records.calendar.at(records.now, Kind.FOUND, patient)
            records.calendar.at(
                records.now + people.limit_min[patient - first], Kind.LIMIT, patient
            )
        records.calendar.at(records.now + SIX_HOURS_MIN, Kind.SIX_HOURS, first, last)


def draw_sick(
    seed: int,
    severity: int,
    counts: Sequence[tuple[int, int]],
    ordinals: Sequence[int],
    p: Mapping[str, float],
) -> People:
    """The sick of one instant: `counts` are (zone, how many).

    Without intensive care who needs it dies after an exponential time; of those who need a ward
    a share does, later. A bed in time saves them: deaths in care, which no outage brings about,
    come days after a run has ended and are left out.
    """
    uniform, exponential = [], []
    for (zone, size), ordinal in zip(counts, ordinals, strict=True):
        rng = np.random.default_rng([seed, SICKNESS_STREAM, zone, severity, ordinal])
        uniform.append(rng.random((size, 4)))
        exponential.append(rng.standard_exponential((size, 6)))
    u, e = np.concatenate(uniform), np.concatenate(exponential)
    size = len(u)
    if severity >= CRITICAL:
        limit_h, stay_h = p["sick_icu_tolerance_h"] * e[:, 0], p["sick_icu_stay_h"]
    else:
        late_h = p["sick_ward_tolerance_h"] * e[:, 0]
        limit_h = np.where(u[:, 0] < p["sick_ward_fatal_share"], late_h, np.inf)
        stay_h = p["sick_ward_stay_h"]
    return People(
        zone=[zone for zone, size in counts for _ in range(size)],
        severity=[severity] * size,
        found_min=[0.0] * size,
        limit_min=(60.0 * limit_h).tolist(),
        hopeless=[False] * size,
        arrest=[int(Arrest.NONE)] * size,
        luck=u[:, 1].tolist(),
        private=(u[:, 2] < p["sick_private_share"]).tolist(),
        transported=[True] * size,
        child=(u[:, 3] < p["child_share"]).tolist(),
        first_stay_min=(60.0 * stay_h * e[:, 1]).tolist(),
        ward_stay_min=(60.0 * p["sick_ward_stay_h"] * e[:, 2]).tolist(),
        scene_draw=e[:, 3].tolist(),
        handover_draw=e[:, 4].tolist(),
        tolerance_draw=e[:, 5].tolist(),
    )
