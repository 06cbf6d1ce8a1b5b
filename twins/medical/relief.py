"""Relieves hospitals that have more patients than beds by sending some elsewhere."""

from __future__ import annotations

import heapq

from twins.medical.beds import BedPool
from twins.medical.dispatch import Dispatch
from twins.medical.hospitals import Hospital
from twins.medical.patients import State
from twins.medical.records import Records
from twins.medical.ways import NO_WAY_MIN, Ways

TRANSFERS_PER_TICK = 2
TRANSFERS_LOOK_AT = 40
"""How many entries of a queue are looked at for transfers in one tick."""


class Relief:
    """Buses for ward patients, and ambulances for those who wait where no bed is free."""

    def __init__(
        self, records: Records, ways: Ways, dispatch: Dispatch, hospitals: list[Hospital]
    ) -> None:
        self.records = records
        self.ways = ways
        self.dispatch = dispatch
        self.hospitals = hospitals

    def send_by_bus(self, index: int, span_min: float) -> None:
        """Send ward patients beyond the beds to the hospital with most free ones.

        `span_min` is the time since buses last left. Their ride of less than one tick is not
        modelled.
        """
        source, records = self.hospitals[index], self.records
        sites = records.layout.hospitals
        source.bus_carry += records.p["bus_patients_per_h"] * span_min / 60.0
        seats = int(source.bus_carry)
        source.bus_carry -= seats
        row = self.ways.hospital_min[sites[index].origin]
        for _ in range(min(seats, -source.ward.free)):
            open_ones = [
                (h.unclaimed_ward_beds, -i)
                for i, h in enumerate(self.hospitals)
                if i != index
                and row[i] < NO_WAY_MIN
                and not sites[i].for_children
                and h.unclaimed_ward_beds > 0
            ]
            if not open_ones:
                return
            target = -max(open_ones)[1]
            if source.ward_inpatients:
                source.ward_inpatients -= 1
                self.hospitals[target].ward_inpatients += 1
            else:
                patient = records.patients.first_in(State.IN_WARD, index)
                if patient < 0:
                    return
                records.patients.hospital[patient] = target
            source.ward.leave()
            self.hospitals[target].ward.take()

    def ask_for_transfers(self, index: int) -> None:
        """Ask ambulances to take some of those who wait long to where a bed is free."""
        hospital = self.hospitals[index]
        patients = self.records.patients
        for critical, pool in ((True, hospital.icu), (False, hospital.ward)):
            places = sum(
                max(0, h.unclaimed_icu_beds if critical else h.unclaimed_ward_beds)
                for i, h in enumerate(self.hospitals)
                if i != index
            )
            if len(pool.waiting) > 2 * hospital.queue + TRANSFERS_LOOK_AT:
                self._forget_gone(index, pool)
            asked = 0
            for _, patient in sorted(pool.waiting[:TRANSFERS_LOOK_AT]):
                if asked >= min(TRANSFERS_PER_TICK, places):
                    break
                if (
                    patients.state[patient] == State.QUEUED
                    and patients.hospital[patient] == index
                    and not patients.transfer[patient]
                    and patients.ambulance[patient] < 0
                ):
                    self.dispatch.call_for_transfer(patient)
                    asked += 1

    def _forget_gone(self, index: int, pool: BedPool) -> None:
        """Strike out entries of patients who died or left while waiting."""
        patients = self.records.patients
        pool.waiting = [
            entry
            for entry in pool.waiting
            if patients.state[entry[1]] == State.QUEUED and patients.hospital[entry[1]] == index
        ]
        heapq.heapify(pool.waiting)
