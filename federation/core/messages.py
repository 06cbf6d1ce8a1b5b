"""What goes into the coordinator and what comes out: the whole vocabulary of its two sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from federation.core.coupling import Actuation, Coupling
from federation.core.ledger import Entry, Quality
from federation.errors import FederationError, Reason
from federation.twin import Action, Description, StepInput, StepResult

# events in


class Stepped(NamedTuple):
    """A member has done every step of its last grant."""

    member: str
    results: tuple[StepResult, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A member can't do what it was granted."""

    member: str
    error: FederationError


@dataclass(frozen=True, slots=True)
class Degraded:
    """From its step at `time_ns` on, a member's values are of another quality.

    It comes before the answer to that step. A held member publishes nothing any more; one that
    is substituted is answered for by another model. The values of one that is late are stale,
    until they are good again, when it publishes all of them with its answer.
    """

    member: str
    time_ns: int
    quality: Quality
    error: FederationError


@dataclass(frozen=True, slots=True)
class Ordered:
    """An operator asks for a setpoint in a run that is going on.

    It takes effect at `time_ns`, when that is still ahead; at once when that is None. `serial`
    numbers it among the orders of the run where that is known; events name it by its number.
    """

    operator: str
    action: Action
    time_ns: int | None = None
    serial: int | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """Members join a run that is going on, with all that couples them to it.

    They join at `time_ns`, or as soon as they can when that is None. Every coupling has one of
    them at an end at least; they may act on others.
    """

    descriptions: Mapping[str, Description]
    couplings: tuple[Coupling, ...] = ()
    actuations: tuple[Actuation, ...] = ()
    time_ns: int | None = None
    operator: str = ""
    """Who asked for it, if anybody did."""


@dataclass(frozen=True, slots=True)
class Left:
    """A member makes no step at `time_ns` or later, or as soon as that can be when it is None.

    What it has published holds.
    """

    member: str
    time_ns: int | None = None
    operator: str = ""


@dataclass(frozen=True, slots=True)
class Replaced:
    """From its step at `time_ns` on, another service goes on under a member's name.

    It comes before the answer to that step. `text` says who took over from whom.
    """

    member: str
    time_ns: int
    text: str


Request = Ordered | Joined | Left
"""What people ask of a run that is going on; each gets a verdict."""

Input = Stepped | Failed | Degraded | Replaced | Request

# effects out


class Grant(NamedTuple):
    """Let a member do these steps, in this order; it answers once, for all of them."""

    member: str
    steps: tuple[StepInput, ...]


class Commit(NamedTuple):
    """These ledger entries are final and follow all that were committed before."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Every member has reached the horizon; `digest` is the hash over the whole ledger."""

    digest: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The run can't go on; nothing more will be granted."""

    error: FederationError


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request takes effect at `time_ns` and is recorded as `event`."""

    event: str
    time_ns: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A request was refused; nothing has changed."""

    refusal: str
    reason: Reason = Reason.OUTSIDE_ENVELOPE
    metadata: Mapping[str, str] = field(default_factory=dict)


Effect = Grant | Commit | Finished | Aborted | Accepted | Refused
