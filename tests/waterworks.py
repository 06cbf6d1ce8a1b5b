"""Twins to act on: a pump whose speed is an actuator, and what several of them are a bundle of."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from federation.control.actuation import Seat, Task
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.twin import (
    SECOND_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Step,
    StepInput,
    StepResult,
    TimePolicy,
    Twin,
    Variable,
)
from federation.v1 import twin_pb2
from federation.wire.credentials import Identity, Keyring, Role
from federation.wire.link import Link, LinkSession
from federation.wire.orders import Hand
from federation.wire.serve import ServeOptions, serving

RUN = "runs/waterworks-1"
SAFE = 1.0
EPOCH = 3
WINDOW_NS = 80 * SECOND_NS

GUARD = Identity.generate("guard-1")
KIM = Identity.generate("kim")
LEE = Identity.generate("lee")
OPTIMISER = Identity.generate("optimiser-1")
OBSERVER = Identity.generate("observer-1")
STRANGER = Identity.generate("guard-1")
"""Says that it is the guard, and has another key."""

KEYRING = Keyring.of(
    (GUARD, Role.GUARD, ["*"]),
    (KIM, Role.OPERATOR, ["water"]),
    (LEE, Role.OPERATOR, ["power"]),
    (OPTIMISER, Role.OPTIMISER, ["*"]),
    (OBSERVER, Role.OBSERVER, []),
)


class Pump(Twin):
    """Fills a tank at its speed, second by second."""

    gate: ClassVar[threading.Event | None] = None
    """Steps at `gate_ns` wait for this."""
    gate_ns: ClassVar[int] = -1
    at_gate: ClassVar[threading.Event] = threading.Event()
    amends: ClassVar[float | None] = None
    """What makes up for a speed that was taken back."""

    def describe(self) -> Description:
        return Description(
            model="pump",
            version="1",
            domain="water",
            entities=(),
            variables=(
                Variable("level", SYSTEM, "m", Causality.OUTPUT),
                Variable("speed_now", SYSTEM, "1", Causality.OUTPUT, SAFE),
            ),
            time=TimePolicy(period_ns=SECOND_NS),
            actuators=(
                Actuator(
                    "speed",
                    SYSTEM,
                    "1",
                    0.0,
                    10.0,
                    SAFE,
                    lease_ns=600 * SECOND_NS,
                    compensation="the speed before is set again",
                    amends=self.amends,
                ),
            ),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.level, self.speed = 0.0, SAFE
        self.cause = ""

    def advance(self, step: Step) -> None:
        if Pump.gate is not None and step.time_ns == Pump.gate_ns:
            Pump.at_gate.set()
            Pump.gate.wait(20.0)
        causes = {}
        for action in step.actions:
            self.speed = action.value
            reasons = [action.cause] if action.cause else []
            causes[0] = step.emit("speed_set", SYSTEM, f"the speed is {action.value:g}", reasons)
        self.level += 0.01 * self.speed
        step.publish("level", self.level)
        step.publish("speed_now", self.speed, causes)

    def snapshot(self) -> bytes:
        return json.dumps([self.level, self.speed]).encode()

    def restore(self, state: bytes) -> None:
        self.level, self.speed = json.loads(state)


@dataclass
class Site:
    """One pump as a service, with the session that a test drives."""

    name: str
    address: str
    link: Link
    session: LinkSession
    now_s: int = -1

    async def run(self, seconds: int = 1) -> list[StepResult]:
        """Do the next so many steps."""
        steps = [StepInput((self.now_s + 1 + i) * SECOND_NS) for i in range(seconds)]
        self.now_s += seconds
        return await self.session.advance(steps)

    async def speed(self) -> float:
        """What the pump runs at in its next step."""
        (result,) = await self.run()
        return float(result.outputs["speed_now"][0])


@asynccontextmanager
async def site(
    name: str = "north",
    *,
    keyring: Keyring = KEYRING,
    state_file: Path | None = None,
    linger_s: float = 600.0,
    pump: type[Pump] = Pump,
) -> AsyncIterator[Site]:
    """A pump that is served, with a session for the run."""
    options = ServeOptions(keyring=keyring, state_file=state_file, grace_s=0.1, linger_s=linger_s)
    async with (
        serving(pump, name, options) as (address, _),
        await Link.connect(address, name) as link,
    ):
        session = await link.session(name, 1, {}, EPOCH, run=RUN)
        here = Site(name, address, link, session)
        await here.run()
        yield here


@asynccontextmanager
async def sites(*names: str, pump: type[Pump] = Pump) -> AsyncIterator[dict[str, Site]]:
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(site(name, pump=pump)) for name in names}


def bundle(
    id: str = "b1",
    speeds: Mapping[str, float] | None = None,
    *,
    priority: Priority = Priority.AUTONOMOUS,
    author: str = "loop",
    lease_s: int = 0,
    expires_s: int = 3_600,
    conditions: Sequence[Condition] = (),
) -> Bundle:
    speeds = {"north": 7.0} if speeds is None else speeds
    setpoints = tuple(
        Setpoint(name, "speed", SYSTEM, value, lease_s * SECOND_NS)
        for name, value in speeds.items()
    )
    return Bundle(
        id,
        RUN,
        setpoints,
        priority,
        0,
        expires_s * SECOND_NS,
        author,
        conditions=tuple(conditions),
    )


def task(what: Bundle, at: Mapping[str, Site], window_ns: int = WINDOW_NS) -> Task:
    return Task(what, {name: Seat(one.address, EPOCH) for name, one in at.items()}, window_ns)


async def put(hand: Hand, what: Bundle, member: str = "north", epoch: int = EPOCH) -> None:
    """Select, operate and confirm a bundle of one member."""
    await hand.select(what, member, epoch, WINDOW_NS)
    await hand.operate(what, member, epoch)
    await hand.confirm(what, member, epoch)


def in_force(answer: twin_pb2.ReadDeskResponse) -> dict[str, tuple[float, str]]:
    """Per actuator that is held: the setpoint and its bundle."""
    return {
        f"{desk.member}.{each.actuator}": (each.value, each.bundle)
        for desk in answer.desks
        for each in desk.in_force
    }
