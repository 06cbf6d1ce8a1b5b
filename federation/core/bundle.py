"""What is to take effect together at several members: setpoints, and the bundle that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any


class Priority(IntEnum):
    """Who asks for a setpoint; the lowest number that an actuator holds is in force.

    The three places of an actuator's priority array, after BACnet (ISO 16484-5, clause 19).
    """

    LIFE_SAFETY = 1
    OPERATOR = 2
    AUTONOMOUS = 3


@dataclass(frozen=True, slots=True)
class Setpoint:
    """A value for one actuator of one entity, in the actuator's unit.

    It ends `lease_ns` of the run after it took effect unless it is renewed; 0 stands for the
    lease that the actuator declares. What then counts is the next priority that holds a value,
    and the actuator's safe default when none does.
    """

    member: str
    actuator: str
    entity: str
    value: float
    lease_ns: int = 0


@dataclass(frozen=True, slots=True)
class Condition:
    """What must still be so when a bundle takes effect: an output of a member within limits."""

    member: str
    variable: str
    entity: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bundle:
    """Setpoints that take effect together or not at all.

    `cut_ns` is the instant of the cut that it was decided on, `expires_ns` that from which on it
    must not begin, both of the run. `basis` is the digest of the decision's record: snapshot,
    versions, seed. `author` is the identity that proposed it.
    """

    id: str
    run: str
    setpoints: tuple[Setpoint, ...]
    priority: Priority
    cut_ns: int
    expires_ns: int
    author: str
    basis: str = ""
    conditions: tuple[Condition, ...] = ()

    def members(self) -> tuple[str, ...]:
        """Whose actuators it sets, in the order of their names."""
        return tuple(sorted({s.member for s in self.setpoints}))

    def part_of(self, member: str) -> Bundle:
        """What a member is told that may not know of the others: its own part, as a bundle."""
        return replace(
            self,
            setpoints=tuple(s for s in self.setpoints if s.member == member),
            conditions=tuple(c for c in self.conditions if c.member == member),
        )

    def canonical(self) -> bytes:
        """The one form that is hashed and signed: numbers to the bit, keys in order."""
        plain = asdict(self, dict_factory=lambda pairs: {k: _exact(v) for k, v in pairs})
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


def plain_of(bundle: Bundle) -> dict[str, Any]:
    """Its fields as plain data, as JSON has them."""
    plain = asdict(bundle)
    for name in ("setpoints", "conditions"):
        plain[name] = list(plain[name])
    return plain | {"priority": int(bundle.priority)}


def bundle_of(plain: Mapping[str, Any]) -> Bundle:
    """The bundle whose plain data these are; numbers that JSON lacks may be words ("nan").

    Fails with KeyError, TypeError or ValueError.
    """
    setpoints = [Setpoint(**{**s, "value": float(s["value"])}) for s in plain["setpoints"]]
    conditions = [
        Condition(**{**c, "low": float(c["low"]), "high": float(c["high"])})
        for c in plain["conditions"]
    ]
    return Bundle(
        **{
            **plain,
            "setpoints": tuple(setpoints),
            "priority": Priority(plain["priority"]),
            "conditions": tuple(conditions),
        }
    )


def _exact(value: object) -> object:
    """A float as its bits in hexadecimal, which is the same everywhere; NaN and infinities too."""
    return value.hex() if isinstance(value, float) else value
