"""A city's scenario as a run that somebody outside lets go on, step by step.

Two members stand for the outside: at each of their steps one says what the reader has set, and
the other sees what may be told. So the coordinator settles who may step when, as in any run, and
what comes out is a function of the seed and of what was set; where the members run, and in which
order they answer, does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from federation.core.coordinator import Coordinator
from federation.core.coupling import Actuation, Coupling, Wiring, wire
from federation.core.ledger import EventRecord
from federation.core.messages import Aborted, Commit, Effect, Failed, Finished, Grant, Stepped
from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.export import Export, View
from federation.scenario.run import Experiment
from federation.twin import (
    SYSTEM,
    Action,
    Causality,
    Description,
    Entity,
    Event,
    StepInput,
    StepResult,
    TimePolicy,
    Variable,
    Vector,
)

SAYS = "outside-says"
"""The member that says what the reader has set. No document can name it."""

SEES = "outside-sees"
"""The member that sees what may be told."""

ACT_DELAY_NS = 1
"""What the reader sets of actuators takes effect at the member's next step."""


class Stand(Protocol):
    """Where the steps of one member of an inner run are done."""

    def begin(self, steps: Sequence[StepInput]) -> Future[Sequence[StepResult]]:
        """Have these steps done; the future has what came of them, or a `FederationError`."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to tell at an instant: values by member and variable, the events behind their
    entries, and what has happened since the instant before, with who told of it."""

    values: Mapping[tuple[str, str], Vector]
    causes: Mapping[tuple[str, str], Mapping[int, tuple[str, ...]]]
    events: tuple[tuple[str, Event], ...]


class InnerRun:
    """A run of a city's scenario for one session, from 0 up to and including `horizon_ns`."""

    def __init__(
        self,
        experiment: Experiment,
        export: Export,
        stands: Mapping[str, Stand],
        horizon_ns: int,
    ) -> None:
        self.stands = stands
        self.couplings = experiment.wiring.couplings
        """Those among the members."""
        self._export = export
        self._horizon_ns = horizon_ns
        self._period_ns = export.description.time.period_ns
        self._coordinator = Coordinator(
            _with_outside(experiment.wiring, export), horizon_ns, pools=experiment.pools
        )
        self._effects: deque[Effect] = deque()
        self._now_ns = -1
        """The instant up to which the reader lets the run go on."""
        self._waiting: list[Grant] = []
        """Grants that begin after it."""
        self._working: dict[Future[Sequence[StepResult]], str] = {}
        self._says: Grant | None = None
        self._sees: Grant | None = None
        self._values: dict[tuple[str, str], Vector] = {}
        self._causes: dict[tuple[str, str], dict[int, tuple[str, ...]]] = {}
        self._events: list[tuple[str, Event]] = []
        self._serial = 0
        descriptions = experiment.wiring.descriptions
        for view in export.views:
            variable = _output(descriptions, view)
            size = len(descriptions[view.member].ids(variable.kind))
            self._values[view.member, view.variable] = np.full(size, variable.initial)
        self._effects.extend(self._coordinator.start())

    def advance(self, given: StepInput) -> Seen:
        """Go on up to and including `given.time_ns`, at which the outside says what is given.

        Names of inputs and actuators, and the indices of entries, are those of the export. An
        event of the outside that is given as a cause stands behind what follows from it under its
        own name. Fails as a member does, and with INVALID_FRAME at an instant at which the city
        makes no step.
        """
        self._now_ns = given.time_ns
        self._go_on(until_says=True)
        says, self._says = self._says, None
        if says is None or says.steps[0].time_ns != given.time_ns:
            self._says = says
            raise _out_of_step(given.time_ns, says, self._horizon_ns)
        self._effects.extend(self._coordinator.handle(Stepped(SAYS, (self._word(given),))))
        self._go_on(until_says=False)
        self._take(self._coordinator.settle())
        ready = tuple(told for told in self._events if told[1].time_ns <= given.time_ns)
        self._events = [told for told in self._events if told[1].time_ns > given.time_ns]
        return Seen(self._values, self._causes, ready)

    def close(self) -> None:
        for working in self._working:
            working.cancel()
        for stand in self.stands.values():
            stand.close()

    def _word(self, given: StepInput) -> StepResult:
        """What the outside says, with an event of its own for each that it names as a cause."""
        told: dict[tuple[str, ...], Event] = {}

        def event_for(behind: tuple[str, ...]) -> str:
            if behind not in told:
                self._serial += 1
                id_, text = f"{SAYS}/{self._serial}", "\n".join(behind)
                told[behind] = Event(id_, given.time_ns, TOLD, SYSTEM, text)
            return told[behind].id

        causes = {
            variable: {index: event_for(behind) for index, behind in entries.items() if behind}
            for variable, entries in given.causes.items()
        }
        entries = {entry.name: entry for entry in self._export.actuators}
        actions = []
        for action in given.actions:
            entry = entries[action.actuator]
            cause = event_for((action.cause,)) if action.cause else ""
            to = (entry.member, entry.variable, action.entity)
            actions.append(Action(*to, action.value, cause))
        next_ns = given.time_ns + self._period_ns
        said = (given.inputs, causes, tuple(told.values()), tuple(actions))
        return StepResult(given.time_ns, 0, *said, next_ns=next_ns)

    def _go_on(self, *, until_says: bool) -> None:
        """Carry out what the coordinator asks for: until the outside has to say something, or
        until everything up to now is settled."""
        grants, self._waiting = self._waiting, []
        self._effects.extendleft(reversed(grants))
        coordinator = self._coordinator
        while True:
            if until_says and self._says is not None:
                return
            if self._effects:
                self._carry_out(self._effects.popleft())
            elif not until_says and coordinator.now_ns > self._now_ns:
                return  # with nothing settled that was not taken in
            elif self._working:
                done, _ = wait(self._working, return_when=FIRST_COMPLETED)
                for future in done:
                    self._hear(self._working.pop(future), future)
            else:
                return

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Grant(member) if member == SAYS:
                self._says = effect
            case Grant() if effect.steps[0].time_ns > self._now_ns:
                self._waiting.append(effect)
            case Grant(member) if member == SEES:
                self._see(effect.steps[0])
            case Grant(member):
                working = self.stands[member].begin(effect.steps)
                if working.done():
                    self._hear(member, working)
                else:
                    self._working[working] = member
            case Commit():
                self._take(effect.entries)
            case Aborted():
                raise effect.error
            case Finished():
                return

    def _hear(self, member: str, done: Future[Sequence[StepResult]]) -> None:
        error = done.exception()
        if error is None:
            answer: Stepped | Failed = Stepped(member, tuple(done.result()))
        elif isinstance(error, FederationError):
            answer = Failed(member, error)
        else:
            raise error
        self._effects.extend(self._coordinator.handle(answer))

    def _see(self, step: StepInput) -> None:
        """Note what may be told now."""
        for name, value in step.inputs.items():
            member, _, variable = name.partition(".")
            self._values[member, variable] = value
        for name, causes in step.causes.items():
            member, _, variable = name.partition(".")
            self._causes.setdefault((member, variable), {}).update(causes)
        result = StepResult(step.time_ns, next_ns=step.time_ns + self._period_ns)
        self._effects.extend(self._coordinator.handle(Stepped(SEES, (result,))))

    def _take(self, entries: Iterable[object]) -> None:
        for entry in entries:
            if isinstance(entry, EventRecord):
                self._events.append((entry.owner, entry.event))


TOLD = "told-by-outside"
"""The kind of an event that stands inside for events outside, whose ids its text has in lines."""


def _with_outside(wiring: Wiring, export: Export) -> Wiring:
    """The wiring of a city with the two members that stand for the outside."""
    described = export.description
    couplings = list(wiring.couplings)
    said: dict[str, Variable] = {}
    inputs = {variable.name: variable for variable in described.inputs()}
    for entry in export.inputs:
        variable = inputs[entry.name]
        said[entry.name] = replace(variable, causality=Causality.OUTPUT)
        links = tuple((id_, id_, 1.0) for id_ in described.ids(variable.kind))
        slots = wiring.slots[entry.member]
        combine = next(slot.combine for slot in slots if slot.variable.name == entry.variable)
        way = (SAYS, entry.name, entry.member, entry.variable, 0, links, combine)
        couplings.append(Coupling(*way))
    kinds = {variable.kind for variable in said.values()} - {SYSTEM}
    entities = tuple(entity for entity in described.entities if entity.kind in kinds)
    seen: dict[str, Variable] = {}
    inside: dict[str, tuple[Entity, ...]] = {}
    for view in export.views:
        full = f"{view.member}.{view.variable}"
        if full in seen:
            continue
        variable = _output(wiring.descriptions, view)
        kind = f"{view.member}.{variable.kind}"
        ids = wiring.descriptions[view.member].ids(variable.kind)
        inside[kind] = tuple(Entity(id_, kind) for id_ in ids)
        seen[full] = replace(variable, name=full, kind=kind, causality=Causality.INPUT)
        links = tuple((id_, id_, 1.0) for id_ in ids)
        couplings.append(Coupling(view.member, view.variable, SEES, full, 0, links))
    everything = tuple(entity for ids in inside.values() for entity in ids)
    # each asks for its next step, so that it is given one at a time
    outside = {
        SAYS: Description(SAYS, "1", "outside", entities, tuple(said.values()), TimePolicy()),
        SEES: Description(SEES, "1", "outside", everything, tuple(seen.values()), TimePolicy()),
    }
    members = dict.fromkeys(entry.member for entry in export.actuators)
    actuations = [Actuation(SAYS, member, ACT_DELAY_NS) for member in members]
    return wire({**wiring.descriptions, **outside}, couplings, (*wiring.actuations, *actuations))


def _output(descriptions: Mapping[str, Description], view: View) -> Variable:
    return next(v for v in descriptions[view.member].outputs() if v.name == view.variable)


def _out_of_step(time_ns: int, says: Grant | None, horizon_ns: int) -> ScenarioError:
    if says is None or time_ns > horizon_ns:
        return ScenarioError(
            Reason.PEER_LIMIT,
            f"the city's session ends at {horizon_ns} ns; it has no step at {time_ns} ns",
            {"limit": "horizon_h"},
        )
    return ScenarioError(
        Reason.INVALID_FRAME,
        f"the city's next step is at {says.steps[0].time_ns} ns, not at {time_ns} ns",
        {"next_ns": str(says.steps[0].time_ns)},
    )


def unfed(wiring: Wiring) -> dict[tuple[str, str], tuple[int, ...]]:
    """Per input the entries that nothing in the city feeds."""
    found = {}
    for member, slots in wiring.slots.items():
        for slot in slots:
            free = tuple(row for row in range(slot.size) if not slot.sources_of.get(row))
            found[member, slot.variable.name] = free
    return found
