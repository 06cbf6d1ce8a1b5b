"""What a decision is judged by: what is known at an instant, what is set, and who proposes what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from federation.core.bundle import Bundle, Priority, Setpoint
from federation.core.ledger import Quality
from federation.twin import Vector

NEVER = (1 << 63) - 1
"""Later than every instant of a run."""

STAYS = "recovery"
"""The rule by which a good decision does not end the recovery plan yet."""

Place = tuple[str, str, str]
"""A member, an actuator of it, and an entity."""


class Reading(NamedTuple):
    """The last value of an output, one number per entity, and how far it can be trusted.

    `time_ns` is when it was last told; `clock_error_s` bounds how far the clock of its source may
    be off, and is infinite while nobody knows.
    """

    values: Vector
    time_ns: int
    quality: Quality = Quality.GOOD
    clock_error_s: float = 0.0


class Standing(NamedTuple):
    """One value that an actuator's priority array holds, and when its lease ends."""

    value: float
    priority: Priority = Priority.AUTONOMOUS
    ends_ns: int = NEVER


@dataclass(frozen=True, slots=True)
class Situation:
    """What is so at one instant of a run, as those tell it who do not propose.

    `readings` are by member and output. `standing` is all that the priority array of a place
    holds; a place that is not there is at its safe default, unless its member is one of the
    `silent`, of whom nobody knows what they hold. `reserved` is what has been selected by others
    and may yet take effect.
    """

    run: str
    time_ns: int
    readings: Mapping[tuple[str, str], Reading] = field(default_factory=dict)
    standing: Mapping[Place, tuple[Standing, ...]] = field(default_factory=dict)
    reserved: tuple[Setpoint, ...] = ()
    silent: tuple[str, ...] = ()


class Series(NamedTuple):
    """What an output is expected to be: a row per instant, each holding until the next."""

    times_ns: tuple[int, ...]
    values: Vector


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the twins' own forked sessions expect of a bundle; no word of who proposes it."""

    bundle: str
    """The digest of the bundle that it is about."""
    series: Mapping[tuple[str, str], Series]


@dataclass(frozen=True, slots=True)
class Submission:
    """A bundle that somebody proposes, under which version of the rules, and their signature."""

    bundle: Bundle
    rules_version: int
    signature: bytes = b""

    def message(self) -> bytes:
        """What is signed."""
        plain = {"bundle": self.bundle.digest(), "rules_version": self.rules_version}
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        return hashlib.sha256(self.message()).hexdigest()


class Refusal(NamedTuple):
    """The rule that a bundle breaks, and how, in a sentence.

    `rule` is the class of the rule and, after a colon, its name: `sum:fuel`, `change:grid.feed`.
    """

    rule: str
    sentence: str


class Mode(StrEnum):
    """Who is in charge."""

    LOOP = "loop"
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a decision, or of its absence.

    A decision may be `good`, as it breaks no rule, and still not have `passed`: after a switch the
    recovery plan stays until enough good ones have come in a row. One that `is_overtaken` was
    good as things stood when it was made, and is not by now. `fallback` is the recovery plan, to be
    issued now; what is in `revoked` passed earlier and must not begin any more.
    """

    mode: Mode
    good: bool
    passed: bool
    refusals: tuple[Refusal, ...] = ()
    fallback: Bundle | None = None
    revoked: tuple[str, ...] = ()
    is_overtaken: bool = False

    @property
    def faults(self) -> tuple[Refusal, ...]:
        """What somebody has done wrong: nobody has when the world has overtaken a decision, or
        when the recovery plan stays for a while."""
        if self.is_overtaken:
            return ()
        return tuple(refusal for refusal in self.refusals if refusal.rule != STAYS)
