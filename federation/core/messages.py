"""What goes into the coordinator and what comes out: the whole vocabulary of its two sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from federation.core.ledger import Entry, Quality
from federation.errors import FederationError
from federation.twin import Action, StepInput, StepResult

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

    It takes effect at `time_ns`, when that is still ahead; at once when that is None.
    """

    operator: str
    action: Action
    time_ns: int | None = None


Input = Stepped | Failed | Degraded | Ordered

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
    """An operator's order takes effect at `time_ns` and is recorded as `event`."""

    event: str
    time_ns: int


@dataclass(frozen=True, slots=True)
class Refused:
    """An operator's order was refused; nothing has changed."""

    refusal: str


Effect = Grant | Commit | Finished | Aborted | Accepted | Refused
