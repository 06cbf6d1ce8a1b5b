"""Lets patients arise: those of ordinary days, and the casualties of a disaster."""

from __future__ import annotations

from math import inf

from twins.medical.calendar import Kind
from twins.medical.destinations import Destinations
from twins.medical.dispatch import Dispatch
from twins.medical.hospitals import Hospital
from twins.medical.patients import (
    DAY_MIN,
    State,
    draw_calls,
    draw_casualties,
    draw_walk_ins,
)
from twins.medical.records import Records
from twins.medical.wards import Wards

WALK_IN_MIN = (30.0, 90.0, 180.0, 360.0)
"""When the walk-ins of a shock come, a quarter each (assumption)."""
SIX_HOURS_MIN = 360.0


class Arrivals:
    """Ordinary calls day by day, and casualties whenever a shock tells of them."""

    def __init__(
        self,
        records: Records,
        destinations: Destinations,
        dispatch: Dispatch,
        wards: Wards,
        hospitals: list[Hospital],
    ) -> None:
        self.records = records
        self.destinations = destinations
        self.dispatch = dispatch
        self.wards = wards
        self.hospitals = hospitals
        self.walk_ins_coming = 0
        self.untreated_after_6h = 0
        zones = len(records.layout.zones)
        self.ordinals = {severity: [0] * zones for severity in (1, 2, 3, 4)}
        """Casualties so far, by severity and zone."""

    # -- ordinary days -----------------------------------------------------------------

    def day(self, day: int, _: int) -> None:
        """Draw the calls of a day."""
        records = self.records
        times, people = draw_calls(records.seed, day, records.layout.zone_people, records.p)
        first = records.patients.add(people, [-1] * len(people))
        at = records.calendar.at
        for patient, time_min in enumerate(times, start=first):
            at(time_min, Kind.CALL, patient)
        for patient, (time_min, limit_min) in enumerate(
            zip(times, people.limit_min, strict=True), start=first
        ):
            at(time_min + limit_min, Kind.LIMIT, patient)
        at((day + 1) * DAY_MIN, Kind.DAY, day + 1)

    def call(self, patient: int, _: int) -> None:
        """Someone calls; while the disaster plan is on, some are helped by advice alone."""
        records = self.records
        patients = records.patients
        records.arisen += 1
        advised = patients.luck[patient] < records.p["advised_share"]
        if records.plan and advised and not patients.transported[patient]:
            records.arise(patient, State.DISCHARGED)
            return
        records.waiting[patients.zone[patient]] += 1
        records.arise(patient, State.CALLING)
        self.dispatch.call(patient)

    # -- casualties --------------------------------------------------------------------

    def injure(self, severity: int, counts: list[tuple[int, int]]) -> None:
        """Casualties of one instant as (zone, how many), with causes from the journal."""
        records = self.records
        for zone, size in counts:
            records.arisen += size
            records.last_casualties = records.causes(f"injured_severity{severity}", zone)
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
        records = self.records
        for zone, size in counts:
            records.dead_at_once += size
            causes, name = records.causes("injured_severity4", zone), records.layout.zones[zone]
            for _ in range(size):
                text = f"a person was killed at once in zone {name}"
                records.emit("patient_died", name, text, causes)

    def _injure_slightly(self, counts: list[tuple[int, int]], ordinals: list[int]) -> None:
        records = self.records
        for (zone, size), ordinal in zip(counts, ordinals, strict=True):
            walkers = draw_walk_ins(records.seed, zone, size, ordinal, records.p["walk_in_share"])
            hospital = self.destinations.nearest(records.layout.zone_scene[zone], child=False)
            if hospital < 0:
                walkers = 0
            records.discharged_uncounted += size - walkers
            self.walk_ins_coming += walkers
            for quarter, delay_min in enumerate(WALK_IN_MIN):
                share = (walkers * (quarter + 1)) // 4 - (walkers * quarter) // 4
                if share:
                    records.calendar.at(records.now + delay_min, Kind.WALK_INS, hospital, share)

    def walk_ins(self, hospital: int, size: int) -> None:
        """Some of the slightly injured reach an emergency department."""
        self.walk_ins_coming -= size
        self.hospitals[hospital].walk_ins += size

    def _injure(self, severity: int, counts: list[tuple[int, int]], ordinals: list[int]) -> None:
        records = self.records
        people = draw_casualties(records.seed, severity, counts, ordinals, records.p)
        batches: list[int] = []
        for zone, size in counts:
            batches.extend([len(records.batch_causes)] * size)
            records.batch_min.append(records.now)
            records.batch_causes.append(records.causes(f"injured_severity{severity}", zone))
            records.waiting[zone] += size
        first = records.patients.add(people, batches)
        last = first + len(people)
        at, now = records.calendar.at, records.now
        for patient, found, limit in zip(
            range(first, last), people.found_min, people.limit_min, strict=True
        ):
            records.arise(patient, State.HIDDEN)
            at(now + found, Kind.FOUND, patient)
            if limit < inf:
                at(now + limit, Kind.LIMIT, patient)
        at(now + SIX_HOURS_MIN, Kind.SIX_HOURS, first, last)
        if not records.plan:
            self.wards.activate_plan()

    def six_hours(self, first: int, last: int) -> None:
        """Count who of a batch of casualties still has no definitive care."""
        self.untreated_after_6h += self.records.patients.treated[first:last].count(False)
