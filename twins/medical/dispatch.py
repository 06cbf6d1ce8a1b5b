"""Answers calls: which ambulance fetches whom, and who is driven by others instead."""

from __future__ import annotations

import heapq

from twins.medical.calendar import Kind
from twins.medical.destinations import Destinations
from twins.medical.hospitals import Hospital
from twins.medical.patients import CRITICAL, Arrest, State
from twins.medical.records import Records
from twins.medical.survival import arrest_chance
from twins.medical.ways import NO_WAY_MIN, Ways

FEW_CALLS = 5
"""Calls that must wait before the fleet counts as exhausted; fewer is an ordinary peak."""
RESERVE_SHARE = 0.1
"""Share of the fleet kept for calls while transfers wait; also ends the state exhausted."""


class Dispatch:
    """The calls and the fleet: each ambulance is idle at a base or with one patient.

    `calls` is a heap of `(priority, since_min, patient)`; entries whose patient no longer
    needs an ambulance are dropped when their turn comes.
    """

    def __init__(
        self, records: Records, ways: Ways, destinations: Destinations, hospitals: list[Hospital]
    ) -> None:
        self.records = records
        self.ways = ways
        self.destinations = destinations
        self.hospitals = hospitals
        posts = records.layout.post_base
        self.base = list(posts)
        self.is_idle = [True] * len(posts)
        self.stamp = [0] * len(posts)
        """Counts changes of what an ambulance does: a way home booked before one is void."""
        self.idle = len(posts)
        self.reserve = int(RESERVE_SHARE * len(posts))
        self.calls: list[tuple[int, float, int]] = []
        self.open_calls = 0
        self.out_of_reach: list[tuple[int, float, int]] = []
        self.exhausted_event = ""
        self.responses = 0
        self.response_sum_min = 0.0

    @property
    def busy(self) -> int:
        return len(self.is_idle) - self.idle

    @property
    def mean_response_min(self) -> float:
        """From call to arrival at the scene, or to the end of waiting in vain; the mean so far."""
        return self.response_sum_min / max(1, self.responses)

    # -- calls -------------------------------------------------------------------------

    def found(self, patient: int, _: int) -> None:
        """Someone finds a casualty: a car takes the patient, or a call is made."""
        patients = self.records.patients
        if patients.state[patient] != State.HIDDEN:
            return
        if patients.private[patient] and self._drive(patient):
            return
        self.records.move(patient, State.CALLING)
        self.call(patient)

    def call(self, patient: int) -> None:
        """Ask for an ambulance to the scene."""
        records = self.records
        patients = records.patients
        patients.called_min[patient] = records.now
        self.open_calls += 1
        heapq.heappush(self.calls, (-2 * patients.severity[patient], records.now, patient))
        self.send_idle()
        if patients.ambulance[patient] < 0 and patients.severity[patient] < CRITICAL:
            records.calendar.at(records.now + 60.0 * records.p["patience_h"], Kind.GIVE_UP, patient)

    def call_for_transfer(self, patient: int) -> None:
        """Ask for an ambulance from one hospital to another."""
        records = self.records
        records.patients.transfer[patient] = True
        priority = -2 * records.patients.severity[patient] + 1
        heapq.heappush(self.calls, (priority, records.now, patient))
        self.send_idle()

    def retry(self) -> None:
        """Give calls that no ambulance could reach another chance."""
        if self.out_of_reach:
            for call in self.out_of_reach:
                heapq.heappush(self.calls, call)
            self.out_of_reach.clear()
            self.send_idle()

    def give_up(self, patient: int, _: int) -> None:
        """A patient who has waited long enough goes by car if there is a way."""
        records = self.records
        patients = records.patients
        if patients.state[patient] != State.CALLING or patients.ambulance[patient] >= 0:
            return
        self._note_response(patient)
        self._note_absence(patient)
        if self._drive(patient):
            self.open_calls -= 1
        else:
            records.calendar.at(records.now + 60.0, Kind.GIVE_UP, patient)

    def withdraw(self, patient: int) -> None:
        """Take back the call of a patient who dies before an ambulance was sent."""
        self.open_calls -= 1
        self._note_response(patient)
        self._note_absence(patient)

    def _drive(self, patient: int) -> bool:
        """Let others drive a patient to the nearest hospital; whether there is a way."""
        patients = self.records.patients
        origin = self.records.layout.zone_scene[patients.zone[patient]]
        hospital = self.destinations.nearest(origin, patients.child[patient])
        if hospital < 0:
            return False
        self._leave_scene(patient, origin, hospital, State.DRIVEN, ambulance=-1)
        return True

    def _leave_scene(
        self, patient: int, origin: int, hospital: int, how: State, ambulance: int
    ) -> None:
        records = self.records
        zone = records.patients.zone[patient]
        records.waiting[zone] -= 1
        records.move(patient, how)
        self.ways.note_delay_to_hospital(patient, origin, hospital)
        self.destinations.head_for(patient, hospital)
        minutes = self.ways.hospital_min[origin][hospital] + self.ways.zone_access_min[zone]
        records.calendar.at(records.now + minutes, Kind.ARRIVE, patient, ambulance)

    def _note_response(self, patient: int) -> None:
        """Count the wait for an ambulance once, also of those who died or gave up waiting.

        Without those the mean would improve when the worst cases drop out.
        """
        patients = self.records.patients
        if not patients.reached[patient]:
            patients.reached[patient] = True
            self.responses += 1
            self.response_sum_min += self.records.now - patients.called_min[patient]

    def _note_absence(self, patient: int) -> None:
        """Blame what kept ambulances away: an exhausted fleet, a slow way of the nearest base."""
        if self.exhausted_event:
            self.records.note_delay(patient, (self.exhausted_event,))
        scene = self.records.layout.zone_scene[self.records.patients.zone[patient]]
        self.ways.note_delay_to_scene(patient, self.ways.nearest_base(scene), scene)

    # -- on the way to patients --------------------------------------------------------

    def send_idle(self) -> None:
        """Send the nearest ambulance to each call: the most severe first, then the oldest."""
        records, ways, calls = self.records, self.ways, self.calls
        patients, layout = records.patients, records.layout
        while self.idle and calls:
            _, _, patient = calls[0]
            state = patients.state[patient]
            if state == State.CALLING and patients.ambulance[patient] < 0:
                zone = patients.zone[patient]
                scene, access = layout.zone_scene[zone], ways.zone_access_min[zone]
            elif state == State.QUEUED and patients.transfer[patient]:
                if self.idle <= self.reserve:
                    break
                hospital = patients.hospital[patient]
                scene = layout.hospitals[hospital].scene
                access = ways.hospital_access_min[hospital]
            else:
                heapq.heappop(calls)
                continue
            minutes = ways.scene_min[scene]
            best, least = -1, NO_WAY_MIN
            if minutes[ways.nearest_base(scene)] < NO_WAY_MIN:
                for ambulance, idle in enumerate(self.is_idle):
                    if idle:
                        time = minutes[self.base[ambulance]]
                        if time < least:
                            best, least = ambulance, time
            call = heapq.heappop(calls)
            if best < 0:
                self.out_of_reach.append(call)
                continue
            self._send(best, patient, scene, least + access, state == State.CALLING)
        self._review_exhaustion()

    def _review_exhaustion(self) -> None:
        if self.open_calls >= FEW_CALLS and not self.idle and not self.exhausted_event:
            self.exhausted_event = self.records.emit(
                "ambulances_exhausted",
                "system",
                f"all {len(self.is_idle)} ambulances are busy and {self.open_calls} calls wait",
                self.records.last_casualties,
            )
        elif self.exhausted_event and self.idle > self.reserve and not self.open_calls:
            self.exhausted_event = ""

    def _send(
        self, ambulance: int, patient: int, scene: int, way_min: float, is_call: bool
    ) -> None:
        records = self.records
        patients = records.patients
        self.is_idle[ambulance] = False
        self.stamp[ambulance] += 1
        self.idle -= 1
        patients.ambulance[patient] = ambulance
        if is_call:
            self.open_calls -= 1
            if self.exhausted_event and records.now > patients.called_min[patient]:
                records.note_delay(patient, (self.exhausted_event,))
        else:
            patients.transfer[patient] = False
        self.ways.note_delay_to_scene(patient, self.base[ambulance], scene)
        arrival = records.now + records.p["call_handling_min"] + way_min
        records.calendar.at(arrival, Kind.AT_SCENE, patient, ambulance)

    def at_scene(self, patient: int, ambulance: int) -> None:
        """An ambulance reaches a patient, at the scene or in the hospital to be left."""
        records = self.records
        patients, p, calendar = records.patients, records.p, records.calendar
        state = patients.state[patient]
        if state == State.QUEUED:
            calendar.at(records.now + p["scene_min"], Kind.DEPART, patient, ambulance)
            return
        if state != State.CALLING:
            self._free_at_scene(patient, ambulance)
            return
        self._note_response(patient)
        response = records.now - patients.called_min[patient]
        cv = p["scene_cv"]
        stay = p["scene_min"] * (1.0 - cv + cv * patients.scene_draw[patient])
        if patients.arrest[patient] and not self._revive(patient, response):
            records.enter_death(patient, "cardiac arrest")
        calendar.at(records.now + stay, Kind.DEPART, patient, ambulance)

    def _revive(self, patient: int, response_min: float) -> bool:
        patients, p = self.records.patients, self.records.p
        if patients.arrest[patient] == Arrest.OTHER:
            return False
        collapse = p["collapse_to_call_min"]
        first = collapse + min(response_min, p["first_responder_min"])
        return patients.luck[patient] < arrest_chance(first, first, collapse + response_min)

    # -- on the way to hospitals -------------------------------------------------------

    def depart(self, patient: int, ambulance: int) -> None:
        """An ambulance leaves with its patient, or without one who needs it no more."""
        records = self.records
        patients = records.patients
        state = patients.state[patient]
        if state == State.QUEUED and patients.ambulance[patient] == ambulance:
            self._depart_from_hospital(patient, ambulance)
            return
        if state != State.CALLING:
            self._free_at_scene(patient, ambulance)
            return
        zone = patients.zone[patient]
        if not patients.transported[patient]:
            records.waiting[zone] -= 1
            records.move(patient, State.DISCHARGED)
            self._free_at_scene(patient, ambulance)
            return
        origin = records.layout.zone_scene[zone]
        hospital = self.destinations.choose(patient, origin, leaving=-1)
        if hospital < 0:
            # no hospital can be reached: the patient stays, the call is tried again later
            patients.ambulance[patient] = -1
            self.open_calls += 1
            self.out_of_reach.append(
                (-2 * patients.severity[patient], patients.called_min[patient], patient)
            )
            self._free_at_scene(patient, ambulance)
            return
        self._leave_scene(patient, origin, hospital, State.ABOARD, ambulance)

    def _depart_from_hospital(self, patient: int, ambulance: int) -> None:
        records = self.records
        patients = records.patients
        here = patients.hospital[patient]
        origin = records.layout.hospitals[here].origin
        there = self.destinations.choose(patient, origin, leaving=here)
        patients.ambulance[patient] = -1
        if there < 0:
            self.free_at_hospital(ambulance, here)
            return
        self.hospitals[here].queue -= 1
        records.move(patient, State.ABOARD)
        self.destinations.head_for(patient, there)
        minutes = self.ways.hospital_min[origin][there] + self.ways.hospital_access_min[here]
        records.calendar.at(records.now + minutes, Kind.ARRIVE, patient, ambulance)

    def hand_over(self, patient: int, ambulance: int, hospital: int) -> None:
        """Hold an ambulance at the hospital until the patient is taken over."""
        records = self.records
        p, crowding = records.p, self.hospitals[hospital].crowding(records.p)
        usual = p["handover_disaster_min"] if records.plan else p["handover_min"]
        surge = p["handover_surge_min"] / p["handover_min"] - 1.0
        cv = p["handover_cv"]
        draw = 1.0 - cv + cv * records.patients.handover_draw[patient]
        held = usual * (1.0 + surge * crowding) * draw
        records.calendar.at(records.now + held, Kind.HANDED_OVER, ambulance, hospital)

    # -- free again --------------------------------------------------------------------

    def _free_at_scene(self, patient: int, ambulance: int) -> None:
        """An ambulance without a patient waits at the base nearest to where it is."""
        patients = self.records.patients
        hospital = patients.hospital[patient]
        if hospital >= 0:
            self.free_at_hospital(ambulance, hospital)
            return
        scene = self.records.layout.zone_scene[patients.zone[patient]]
        self._free(ambulance, self.ways.nearest_base(scene), scene)

    def free_at_hospital(self, ambulance: int, hospital: int) -> None:
        site = self.records.layout.hospitals[hospital]
        self._free(ambulance, site.base, site.scene)

    def _free(self, ambulance: int, base: int, scene: int) -> None:
        records = self.records
        home = records.layout.post_base[ambulance]
        self.base[ambulance] = base
        self.is_idle[ambulance] = True
        self.stamp[ambulance] += 1
        self.idle += 1
        if base != home:
            # routes lead only from bases: the way back takes as long as the way out
            way = self.ways.scene_min[scene][home]
            if way < NO_WAY_MIN:
                stamp = self.stamp[ambulance]
                records.calendar.at(records.now + way, Kind.HOME, ambulance, stamp)
        self.send_idle()

    def home(self, ambulance: int, stamp: int) -> None:
        """An ambulance that stayed idle is back at its post."""
        if self.stamp[ambulance] == stamp:
            self.base[ambulance] = self.records.layout.post_base[ambulance]
