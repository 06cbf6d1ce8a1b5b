"""Holds what all parts of the engine share: the patients, the clock, the causes of delay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from twins.medical.calendar import Calendar
from twins.medical.layout import Layout
from twins.medical.notices import death_notice
from twins.medical.patients import Patients, State


class Journal(Protocol):
    """Where events are recorded and causes looked up; a `Step` is one."""

    def emit(self, kind: str, entity: str, text: str, causes: Iterable[str] = ()) -> str: ...

    def cause(self, variable: str, index: int) -> tuple[str, ...]: ...


class Records:
    """The patients, what is booked for them, and the events that delayed or refused their care.

    Region, parameters and journal come from outside: a snapshot leaves them out, `attach` puts
    them back. All else is plain data.
    """

    _FROM_OUTSIDE = ("layout", "p", "journal")

    def __init__(self, layout: Layout, parameters: Mapping[str, float], seed: int) -> None:
        self.attach(layout, parameters)
        self.seed = seed
        self.now = 0.0
        self.calendar = Calendar()
        self.patients = Patients()
        self.counts = [0] * len(State)
        self.arisen = 0
        self.discharged_uncounted = 0
        """Discharged people who never were entries of the table of patients."""
        self.dead_at_once = 0
        self.waiting = np.zeros(len(layout.zones))
        self.plan = False
        """Whether the disaster plan is in force."""
        self.batch_min: list[float] = []
        """By batch of casualties, when they were hurt."""
        self.batch_causes: list[tuple[str, ...]] = []
        """By batch of casualties, the events that hurt them."""
        self.delays: dict[int, tuple[str, ...]] = {}
        """By patient, the events that delayed or refused care so far."""
        self.last_casualties: tuple[str, ...] = ()

    def attach(self, layout: Layout, parameters: Mapping[str, float]) -> None:
        """Name the region and the parameters; a journal comes with the next step."""
        self.layout = layout
        self.p = dict(parameters)
        self.journal: Journal | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in vars(self).items() if n not in self._FROM_OUTSIDE}

    def emit(self, kind: str, entity: str, text: str, causes: Iterable[str] = ()) -> str:
        return self.journal.emit(kind, entity, text, causes) if self.journal else ""

    def causes(self, variable: str, index: int) -> tuple[str, ...]:
        """The events of other twins that explain an input."""
        return self.journal.cause(variable, index) if self.journal else ()

    def arise(self, patient: int, state: State) -> None:
        """Let a patient of the table begin in a state."""
        self.counts[state] += 1
        self.patients.state[patient] = state

    def move(self, patient: int, state: State) -> None:
        states = self.patients.state
        self.counts[states[patient]] -= 1
        self.counts[state] += 1
        states[patient] = state

    def note_delay(self, patient: int, events: Iterable[str]) -> None:
        """Remember what delays or refuses the care of a patient."""
        new = tuple(e for e in events if e)
        if new:
            self.delays[patient] = tuple(dict.fromkeys((*self.delays.get(patient, ()), *new)))

    def enter_death(self, patient: int, why: str = "") -> None:
        """Enter a death, and tell of it if a disaster or something to blame is behind it."""
        patients = self.patients
        zone = patients.zone[patient]
        if patients.state[patient] in (State.HIDDEN, State.CALLING):
            self.waiting[zone] -= 1
        blame = self.delays.get(patient, ())
        ordinary = patients.batch[patient] < 0
        if not ordinary:
            blame = (*blame, *self.batch_causes[patients.batch[patient]])
        if not ordinary or (blame and not patients.hopeless[patient]):
            hospital = patients.hospital[patient]
            entity = self.layout.zones[zone] if zone >= 0 else self.layout.hospitals[hospital].id
            notice = death_notice(self.layout, patients, patient, why)
            self.emit("patient_died", entity, notice, blame)
        self.move(patient, State.DEAD)
