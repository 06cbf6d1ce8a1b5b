"""Words the notice of a death for readers: who died, of what, and where."""

from __future__ import annotations

from twins.medical.layout import Layout
from twins.medical.patients import Patients, State


def death_notice(layout: Layout, patients: Patients, patient: int, why: str = "") -> str:
    """The notice for a patient who is about to be entered as dead; `why` if not of waiting."""
    place = _place(layout, patients, patient)
    return f"{_person(patients, patient)} died: {f'{why}, ' if why else ''}{place}"


def _person(patients: Patients, patient: int) -> str:
    if patients.zone[patient] < 0:
        return "an inpatient"
    if patients.batch[patient] < 0:
        return "an emergency patient"
    if patients.sick[patient]:
        return "a patient of the epidemic"
    survivable = "unsurvivable " if patients.hopeless[patient] else ""
    return f"a patient with {survivable}severity-{patients.severity[patient]} injuries"


def _place(layout: Layout, patients: Patients, patient: int) -> str:
    state, index = patients.state[patient], patients.hospital[patient]
    if state in (State.HIDDEN, State.CALLING):
        zone = f"zone {layout.zones[patients.zone[patient]]}"
        if state == State.HIDDEN:
            return f"not found or freed in time in {zone}"
        if patients.ambulance[patient] < 0:
            return f"waiting for an ambulance in {zone}"
        return f"an ambulance had been sent to {zone}"
    hospital = layout.hospitals[index].name
    if state == State.ABOARD:
        return f"in the ambulance to {hospital}"
    if state == State.DRIVEN:
        return f"in a car to {hospital}"
    if state == State.QUEUED:
        return f"waiting for a bed at {hospital}"
    return f"in care at {hospital}"
