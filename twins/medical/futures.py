"""Draws anew what nobody can know yet of people who are ill, so that a fork is a future.

Who has been hurt, who called, where each patient is and who has died is known. Not known are the
calls to come, when those still hidden will be found, until when care can save somebody, and who
dies whatever is done: these are drawn again from the laws that they were drawn from, on the
condition of what has been seen. A patient who lives after t minutes had a limit beyond t, or was
in care before it; so draws that contradict this are passed over.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from math import inf

import numpy as np
from numpy.typing import NDArray

from federation.twin import Vector
from twins.medical.calendar import Kind
from twins.medical.patients import (
    CRITICAL,
    DAY_MIN,
    Arrest,
    People,
    State,
    draw_calls,
    draw_casualties,
)
from twins.medical.records import Records
from twins.medical.sickness import draw_sick

POOL = 2048
"""Fates per severity from which those that fit a patient are taken."""

FATE_STREAM = 0x4D04

SICK = 10
"""Added to the severity of those whom an epidemic made ill, to name their fates."""

ALIVE = range(State.HIDDEN, State.IN_WARD + 1)


def diverge(records: Records, seed: int, parameters: Mapping[str, float]) -> None:
    """Let all that is not known from now on follow another seed and other parameters."""
    records.seed = seed
    records.attach(records.layout, parameters)
    draws = np.random.default_rng([seed, FATE_STREAM])
    fates = {severity: _pool(draws, severity, records) for severity in (2, CRITICAL)}
    if any(records.patients.sick):
        fates |= {severity + SICK: _sick(draws, severity, records) for severity in (2, CRITICAL)}
    limits = _limits(records, fates, draws)
    found = _found(records, fates, draws)
    _book(records, limits, found)
    _calls(records)


def _pool(draws: np.random.Generator, severity: int, records: Records) -> People:
    seed = int(draws.integers(1 << 62))
    return draw_casualties(seed, severity, [(0, POOL)], [0], records.p)


def _sick(draws: np.random.Generator, severity: int, records: Records) -> People:
    return draw_sick(int(draws.integers(1 << 62)), severity, [(0, POOL)], [0], records.p)


def _hurt_min(records: Records, patient: int) -> float:
    """When the clock of a patient began to run."""
    batch = records.patients.batch[patient]
    return records.batch_min[batch] if batch >= 0 else records.patients.called_min[patient]


def _pick(fits: NDArray[np.bool_], draws: np.random.Generator) -> int:
    """One of those that fit; -1 if none does."""
    places = np.flatnonzero(fits)
    return int(places[int(draws.integers(places.size))]) if places.size else -1


def _limits(
    records: Records, fates: Mapping[int, People], draws: np.random.Generator
) -> dict[int, float]:
    """By living patient the instant at which it dies unless saved; sets who can't be saved."""
    patients = records.patients
    limit = {s: np.array(people.limit_min) for s, people in fates.items()}
    hopeless = {s: np.array(people.hopeless) for s, people in fates.items()}
    found: dict[int, float] = {}
    for patient, state in enumerate(patients.state):
        severity = patients.severity[patient] + SICK * patients.sick[patient]
        is_ordinary = patients.batch[patient] < 0
        if (
            state not in ALIVE
            or patients.arrest[patient] != Arrest.NONE
            or patients.zone[patient] < 0
            or (is_ordinary and (severity < CRITICAL or patients.treated[patient]))
        ):
            continue
        began_min = _hurt_min(records, patient)
        lived_min = records.now - began_min
        open_min = min(records.now, patients.treated_min[patient]) - began_min
        fits = np.where(hopeless[severity], lived_min, open_min) < limit[severity]
        place = _pick(fits, draws)
        patients.hopeless[patient] = place >= 0 and bool(hopeless[severity][place])
        saved = patients.treated[patient] and not patients.hopeless[patient]
        found[patient] = inf if place < 0 or saved else began_min + float(limit[severity][place])
    return found


def _found(
    records: Records, fates: Mapping[int, People], draws: np.random.Generator
) -> dict[int, float]:
    """By hidden patient the instant at which it is found."""
    patients = records.patients
    delay: dict[int, Vector] = {s: np.array(people.found_min) for s, people in fates.items()}
    found: dict[int, float] = {}
    for patient, state in enumerate(patients.state):
        if state == State.HIDDEN and not patients.sick[patient]:
            severity = patients.severity[patient]
            began_min = _hurt_min(records, patient)
            place = _pick(delay[severity] > records.now - began_min, draws)
            if place >= 0:
                patients.private[patient] = fates[severity].private[place]
                found[patient] = began_min + float(delay[severity][place])
    return found


def _book(records: Records, limits: Mapping[int, float], found: Mapping[int, float]) -> None:
    """Put these instants in the place of those that were booked, and strike the calls to come."""
    heap = []
    for entry in records.calendar.heap:
        kind, patient = entry[2], entry[3]
        is_drawn_anew = (
            kind == Kind.CALL
            or (kind == Kind.LIMIT and patient in limits)
            or (kind == Kind.LIMIT and records.patients.state[patient] == State.FUTURE)
            or (kind == Kind.FOUND and patient in found)
        )
        if not is_drawn_anew:
            heap.append(entry)
    heapq.heapify(heap)
    records.calendar.heap[:] = heap
    for kind, instants in ((Kind.LIMIT, limits), (Kind.FOUND, found)):
        for patient, time_min in instants.items():
            records.calendar.at(time_min, kind, patient)


def _calls(records: Records) -> None:
    """The calls of the rest of the day: a Poisson stream, whatever came before."""
    day = int(records.now // DAY_MIN)
    times, people = draw_calls(records.seed, day, records.layout.zone_people, records.p)
    first = records.patients.add(people, [-1] * len(people))
    for patient, (time_min, limit_min) in enumerate(
        zip(times, people.limit_min, strict=True), start=first
    ):
        if time_min > records.now:
            records.calendar.at(time_min, Kind.CALL, patient)
            records.calendar.at(time_min + limit_min, Kind.LIMIT, patient)
