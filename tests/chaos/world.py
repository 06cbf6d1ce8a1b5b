"""Four small twins around a windmill, which ask before every step what happens to them.

Where no one prompts (`PROMPTER` is not set) they are ordinary twins, and so is the reference run.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from federation.core.ledger import Entry
from federation.core.messages import Aborted, Commit, Finished, Grant, Ordered, Stepped
from federation.scenario.run import Case, Outcome, bind, local_sessions, run_local
from federation.scenario.spec import Scenario, parse
from federation.scenario.study import cases
from federation.twin import (
    MINUTE_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    Parameter,
    Step,
    TimePolicy,
    Twin,
    Variable,
)

PROMPTER = "CHAOS_PROMPTER"
"""The environment variable with the path of the prompter's socket."""

MEMBERS = ("wind", "mill", "tower", "town")
HORIZON_H = 5.0
NEVER_NS = 1 << 62

PATIENCE_S = 120.0
"""How long a twin waits for its cue; longer than every run is given."""


class _Line:
    """The one connection of this process to the prompter."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._socket: socket.socket | None = None

    def ask(self, question: Mapping[str, object]) -> str:
        path = os.environ.get(PROMPTER)
        if not path:
            return ""
        with self._turn:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(PATIENCE_S)
                self._socket.connect(path)
            self._socket.sendall(json.dumps(question).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                piece = self._socket.recv(64)
                if not piece:
                    raise RuntimeError("the prompter has gone")
                answer += piece
        return answer.decode().strip()


_line = _Line()


class Player(Twin):
    """A twin that asks for its cue at the begin and at the end of every step.

    The constructor's `mute_from_ns` and `spare_from_ns` are for reference runs: from its step at
    that instant on the twin publishes nothing, or its spare plays in its place.
    """

    member = ""
    prompted_as = ""
    """By which name the prompter knows it, if not by its member's."""

    def __init__(self, mute_from_ns: int = NEVER_NS, spare_from_ns: int = NEVER_NS) -> None:
        self.mute_from_ns = mute_from_ns
        self.spare_from_ns = spare_from_ns
        self.spare: Twin | None = None

    def describe(self) -> Description:
        return Description(
            model=self.member,
            version="1",
            domain=self.member,
            entities=tuple(Entity(f"S{i}", "sail") for i in range(3)),
            variables=self.variables(),
            time=self.time_policy(),
            parameters=(Parameter("take", "1", 0.0, 0.0, 1e9, "which run the prompter means"),),
            actuators=self.actuators(),
        )

    def variables(self) -> tuple[Variable, ...]:
        raise NotImplementedError

    def time_policy(self) -> TimePolicy:
        raise NotImplementedError

    def actuators(self) -> tuple[Actuator, ...]:
        return ()

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.seed, self.parameters = seed, dict(parameters)
        self.take = round(parameters["take"])
        self.number = 0
        self.begin(seed)

    def begin(self, seed: int) -> None:
        raise NotImplementedError

    def play(self, step: Step) -> None:
        raise NotImplementedError

    def advance(self, step: Step) -> None:
        self.number += 1
        self.cue(step, "begin")
        if step.time_ns >= self.spare_from_ns:
            if self.spare is None:
                self.spare = SPARES[self.member]()
                self.spare.open(self.seed, self.parameters)
            self.spare.advance(step)
        elif step.time_ns < self.mute_from_ns:
            self.play(step)
        self.cue(step, "end")

    def cue(self, step: Step, at: str) -> None:
        answer = _line.ask(
            {
                "member": self.prompted_as or self.member,
                "take": self.take,
                "step": self.number,
                "at": at,
                "pid": os.getpid(),
                "time": time.time(),
            }
        )
        if answer == "raise":
            raise RuntimeError(f"told to fail in step {self.number}")
        if answer == "nan":
            output = next(v for v in self.variables() if v.causality is Causality.OUTPUT)
            step.publish(output.name, [float("nan")] * (3 if output.kind == "sail" else 1))


class Saved(Player):
    """A player whose state can be saved."""

    def snapshot(self) -> bytes:
        return pickle.dumps(self.__dict__)

    def restore(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))


class Wind(Player):
    """Blows as it likes, stronger where people cook; can't be saved."""

    member = "wind"

    def variables(self) -> tuple[Variable, ...]:
        return (
            Variable("demand", SYSTEM, "kW", Causality.INPUT, 5.0),
            Variable("speed", "sail", "m/s", Causality.OUTPUT),
        )

    def time_policy(self) -> TimePolicy:
        return TimePolicy(period_ns=10 * MINUTE_NS)

    def begin(self, seed: int) -> None:
        self.random = np.random.default_rng([seed, 1])

    def play(self, step: Step) -> None:
        speed = self.random.weibull(2.0, 3) * (8.0 + 0.1 * step["demand"][0])
        gusts = {
            int(i): step.emit("gust", f"S{i}", f"a gust of {speed[i]:.1f} m/s", ())
            for i in np.flatnonzero(speed > 12.0)
        }
        step.publish("speed", speed, gusts)


class Mill(Saved):
    """Three sails that stop in a gust, and one brake that people may pull."""

    member = "mill"

    def variables(self) -> tuple[Variable, ...]:
        return (
            Variable("speed", "sail", "m/s", Causality.INPUT),
            Variable("demand", SYSTEM, "kW", Causality.INPUT, 5.0),
            Variable("power", SYSTEM, "kW", Causality.OUTPUT),
            Variable("turning", "sail", "1", Causality.OUTPUT),
        )

    def time_policy(self) -> TimePolicy:
        return TimePolicy(period_ns=20 * MINUTE_NS)

    def actuators(self) -> tuple[Actuator, ...]:
        return (Actuator("brake", "sail", "1", 0.0, 1.0, 0.0),)

    def begin(self, seed: int) -> None:
        self.random = np.random.default_rng([seed, 2])
        self.brakes = np.zeros(3)
        self.turns = np.ones(3)

    def play(self, step: Step) -> None:
        for action in step.actions:
            self.brakes[int(action.entity[1:])] = action.value
        wear = self.random.uniform(0.9, 1.0, 3)
        turns = np.where(step["speed"] > 12.0, 0.0, 1.0 - self.brakes)
        causes = {}
        for i in np.flatnonzero(turns != self.turns):
            why = (*step.cause("speed", int(i)), *step.cause("demand", 0))
            what = "turns" if turns[i] else "stands"
            causes[0] = step.emit(f"sail_{what}", f"S{i}", f"sail {i} {what}", why)
        self.turns = turns
        power = float((turns * wear * np.minimum(step["speed"], 12.0)).sum())
        step.publish("power", min(power, 1.5 * step["demand"][0]), causes)
        step.publish("turning", turns)


class Tower(Player):
    """A water tower that the mill fills; can't be saved."""

    member = "tower"

    def variables(self) -> tuple[Variable, ...]:
        return (
            Variable("power", SYSTEM, "kW", Causality.INPUT),
            Variable("level", SYSTEM, "m", Causality.OUTPUT),
        )

    def time_policy(self) -> TimePolicy:
        return TimePolicy(period_ns=30 * MINUTE_NS)

    def begin(self, seed: int) -> None:
        self.level_m = 4.0

    def play(self, step: Step) -> None:
        was_m = self.level_m
        self.level_m = min(8.0, max(0.0, was_m + (step["power"][0] - 12.0) * 0.35))
        causes = {}
        if (self.level_m < 4.0) != (was_m < 4.0):
            what = "low" if self.level_m < 4.0 else "full"
            causes[0] = step.emit(
                f"tower_{what}", SYSTEM, f"the tower is {what}", step.cause("power", 0)
            )
        step.publish("level", self.level_m, causes)


class Town(Saved):
    """Wakes whenever the tower's level changes, and now and then by itself."""

    member = "town"

    def variables(self) -> tuple[Variable, ...]:
        return (
            Variable("level", SYSTEM, "m", Causality.INPUT, 4.0),
            Variable("demand", SYSTEM, "kW", Causality.OUTPUT, 5.0),
        )

    def time_policy(self) -> TimePolicy:
        return TimePolicy(wakes_on_input=True)

    def begin(self, seed: int) -> None:
        self.random = np.random.default_rng([seed, 3])
        self.wake_ns = 0

    def play(self, step: Step) -> None:
        thirst = self.random.uniform(0.0, 3.0)
        causes = {}
        if step["level"][0] < 3.0:
            causes[0] = step.emit("complaint", SYSTEM, "the taps drip", step.cause("level", 0))
        step.publish("demand", 16.0 - step["level"][0] + thirst, causes)
        if step.time_ns >= self.wake_ns:
            self.wake_ns = step.time_ns + int(self.random.integers(20, 50)) * MINUTE_NS
        step.wake_at(self.wake_ns)


class SpareMill(Mill):
    """Stands in for the mill: steady, and without a past."""

    prompted_as = "mill-substitute"

    def begin(self, seed: int) -> None:
        return None

    def play(self, step: Step) -> None:
        power = 2.0 + 0.25 * float(step["speed"].sum())
        causes = {}
        if power > 7.0:
            causes[0] = step.emit("spare_strains", "S0", "it strains", step.cause("speed", 0))
        step.publish("power", power, causes)


class SpareTown(Town):
    """Stands in for the town: asks for what the level suggests."""

    prompted_as = "town-substitute"

    def play(self, step: Step) -> None:
        step.publish("demand", 10.0 - step["level"][0])


SPARES: dict[str, type[Player]] = {"mill": SpareMill, "town": SpareTown}

CLASSES: dict[str, type[Player]] = {"wind": Wind, "mill": Mill, "tower": Tower, "town": Town}

COUPLINGS: tuple[dict[str, Any], ...] = (
    {"from": "wind.speed", "to": "mill.speed"},
    {"from": "mill.power", "to": "tower.power"},
    {"from": "tower.level", "to": "town.level"},
    {"from": "town.demand", "to": "mill.demand", "delay_min": 60},
    {"from": "town.demand", "to": "wind.demand", "delay_min": 120},
)


def document(
    members: Mapping[str, Mapping[str, Any]], take: int = 0, horizon_h: float = HORIZON_H
) -> str:
    """The scenario as YAML; `members` has what each says besides its class."""
    return yaml.safe_dump(
        {
            "name": "windmill",
            "region": "nowhere",
            "horizon_h": horizon_h,
            "members": {
                name: {"class": f"tests.chaos.world:{CLASSES[name].__name__}", **said}
                if "address" not in said
                else dict(said)
                for name, said in members.items()
            },
            "couplings": [dict(coupling) for coupling in COUPLINGS],
            "parameters": {f"{name}.take": take for name in members},
        },
        sort_keys=False,
    )


def reference(seed: int, config: Mapping[str, Mapping[str, int]] | None = None) -> Outcome:
    """The run in one process; `config` is what members are constructed with."""
    return run_local(_scenario(config or {}), case(seed), None, keep_ledger=True)


def reference_with_orders(seed: int, orders: Sequence[Ordered]) -> tuple[str, list[Entry]]:
    """The digest and the ledger of the run in one process, with orders at known instants."""
    scenario, its_case = _scenario({}), case(seed)
    sessions = local_sessions(scenario)
    experiment = bind(scenario, {n: s.description for n, s in sessions.items()}, None, its_case)
    for name, session in sessions.items():
        session.open(its_case.member_seed(name), {})
    coordinator = experiment.coordinator()
    entries: list[Entry] = []
    waiting = deque(coordinator.start(orders))
    while waiting:
        match waiting.popleft():
            case Grant(member, steps):
                results = tuple([sessions[member].advance(step) for step in steps])
                waiting.extend(coordinator.handle(Stepped(member, results)))
            case Commit(found):
                entries.extend(found)
            case Finished(digest):
                return digest, entries
            case Aborted(error):
                raise error
    raise AssertionError("the coordinator stopped without an end")


def _scenario(config: Mapping[str, Mapping[str, int]]) -> Scenario:
    return parse(document({name: {"config": dict(config.get(name, {}))} for name in MEMBERS}))


def case(seed: int) -> Case:
    (found,) = cases(_scenario({}), ["none"], 1, seed)
    return found
