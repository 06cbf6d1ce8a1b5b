"""Small random federations for property tests, and a shell that answers in any order."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from federation.core.coordinator import Coordinator
from federation.core.ledger import Entry
from federation.core.messages import (
    Aborted,
    Accepted,
    Commit,
    Failed,
    Finished,
    Grant,
    Refused,
    Request,
    Stepped,
)
from federation.errors import FederationError
from federation.twin import (
    NOTHING,
    Actuator,
    Causality,
    Description,
    Entity,
    Session,
    Step,
    TimePolicy,
    Twin,
    Variable,
)


@dataclass(frozen=True)
class Habit:
    """How a toy twin behaves: when it steps, what it reads, whether it rounds or acts."""

    policy: TimePolicy
    inputs: tuple[str, ...]
    size: int
    is_coarse: bool
    gain: float
    acts_on: tuple[str, ...] = ()
    jumps: tuple[int, ...] = (3, 1, 7)
    """Spans to the next step that an event-driven toy asks for, in turn; 0 asks for none."""
    event_every: int = 3
    """Of so many steps one tells of an event."""


class Toy(Twin):
    """A twin whose outputs depend on its inputs, its past and the number of its steps."""

    def __init__(self, habit: Habit) -> None:
        self.habit = habit
        self.count = 0
        self.memory = 0.0

    def describe(self) -> Description:
        habit = self.habit
        entities = tuple(Entity(f"e{i}", "cell") for i in range(habit.size))
        return Description(
            model="toy",
            version="1",
            domain="test",
            entities=entities,
            variables=(
                *(Variable(n, "cell", "m", Causality.INPUT, 0.5) for n in habit.inputs),
                Variable("x", "cell", "m", Causality.OUTPUT),
            ),
            time=habit.policy,
            actuators=(Actuator("kick", "cell", "m", -1.0, 1.0, 0.0),),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.memory = float(seed % 7)

    def advance(self, step: Step) -> None:
        self.count += 1
        habit = self.habit
        total = np.zeros(habit.size)
        reasons: list[str] = []
        for name in habit.inputs:
            total += step[name]
            for index in range(habit.size):
                reasons.extend(step.cause(name, index))
        if habit.inputs:
            total /= len(habit.inputs)
        for action in step.actions:
            self.memory += action.value
            reasons.append(action.cause)
        self.memory = 0.5 * self.memory + 0.1 * (self.count % 5) + 0.01 * (step.span_ns % 4)
        value = habit.gain * total + self.memory + np.arange(habit.size)
        if habit.is_coarse:
            value = np.floor(value)
        if self.count % habit.event_every == 0:
            event = step.emit("third", "e0", f"step {self.count}", reasons[:4])
            step.publish("x", value, {0: event})
            for target in habit.acts_on:
                step.act(target, "kick", "e0", float(self.count % 4) * 0.5, event)
        else:
            step.publish("x", value)
        jump = habit.jumps[self.count % len(habit.jumps)]
        if not habit.policy.period_ns and jump:
            step.wake_at(step.time_ns + jump)

    def snapshot(self) -> bytes:
        return json.dumps([self.count, self.memory]).encode()

    def restore(self, state: bytes) -> None:
        self.count, self.memory = json.loads(state)


def open_sessions(habits: Mapping[str, Habit]) -> dict[str, Session]:
    sessions = {name: Session(Toy(habit), name) for name, habit in habits.items()}
    for index, session in enumerate(sessions.values()):
        session.open(index, {})
    return sessions


def open_late(habits: Mapping[str, Habit], time_ns: int) -> dict[str, Session]:
    """Sessions of members that join at an instant."""
    sessions = {name: Session(Toy(habit), name) for name, habit in habits.items()}
    for name, session in sessions.items():
        session.open(len(name), {}, time_ns)
    return sessions


def drive(
    coordinator: Coordinator,
    sessions: Mapping[str, Session],
    choose: Callable[[int], int] | None = None,
    said: Mapping[int, Request] = NOTHING,
    heard: Callable[[Request, Accepted | Refused], None] = lambda request, verdict: None,
    known: Sequence[Request] = (),
) -> tuple[str, list[Entry]]:
    """Carry out effects, answering outstanding grants in the order that `choose` picks.

    After so many answers, what is `said` then is asked for, and the verdict `heard` before
    anything follows from it. What is `known` holds from the start. Returns the digest and all
    committed entries; raises what aborted the run.
    """
    pick = choose or (lambda n: 0)
    outstanding: list[Grant] = []
    entries: list[Entry] = []
    effects = list(coordinator.start(known))
    verdicts, effects = effects[: len(known)], effects[len(known) :]
    assert all(isinstance(verdict, Accepted) for verdict in verdicts), verdicts
    answers = 0
    request: Request | None = None
    while True:
        for effect in effects:
            match effect:
                case Grant():
                    outstanding.append(effect)
                case Accepted() | Refused():
                    assert request is not None
                    heard(request, effect)
                case Commit():
                    entries.extend(effect.entries)
                case Finished():
                    assert not outstanding, "the run ended while grants were outstanding"
                    return effect.digest, entries
                case Aborted():
                    raise effect.error
        assert outstanding, "nothing is outstanding and the run has not ended"
        answers += 1
        if answers in said:
            request = said[answers]
            effects = list(coordinator.handle(request))
            continue
        grant = outstanding.pop(pick(len(outstanding)))
        try:
            results = tuple(sessions[grant.member].advance(step) for step in grant.steps)
        except FederationError as error:
            effects = list(coordinator.handle(Failed(grant.member, error)))
        else:
            effects = list(coordinator.handle(Stepped(grant.member, results)))


def shuffled(seed: int) -> Callable[[int], int]:
    chance = random.Random(seed)
    return chance.randrange
