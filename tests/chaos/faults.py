"""What may happen to a federation, when, and how its run must end: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from federation.errors import Reason
from tests.chaos.meddler import Meddling
from tests.chaos.proxy import Blow
from tests.chaos.world import MEMBERS

BROKER = "broker"
WATCHER = "watcher"


@dataclass(frozen=True)
class Kill:
    """SIGKILL; the process is started again at once, unless it never `returns`."""

    whom: str
    returns: bool = True


@dataclass(frozen=True)
class Pause:
    """SIGSTOP, and SIGCONT after a while."""

    whom: str
    seconds: float


@dataclass(frozen=True)
class Misplay:
    """The twin raises an error, or answers NaN."""

    how: Literal["raise", "nan"]


@dataclass(frozen=True)
class Late:
    """The twin goes on only after a while; without `seconds`, never."""

    seconds: float | None = None


@dataclass(frozen=True)
class Cut:
    """All connections between the broker and this member are reset."""

    whom: str


@dataclass(frozen=True)
class Strike:
    """The next frame on its way from or to this member is ill-treated as bytes."""

    whom: str
    blow: Blow


@dataclass(frozen=True)
class Meddle:
    """The next frame or answer of this member is meddled with."""

    whom: str
    meddling: Meddling


@dataclass(frozen=True)
class FillDisk:
    """No file of the broker grows any more."""


@dataclass(frozen=True)
class TearLog:
    """The broker is killed, and the end of its write-ahead log is torn off before it returns."""


@dataclass(frozen=True)
class SpoilStore:
    """The broker is killed, its database spoilt, and it must refuse to start; then the database
    is as it was, and the broker returns."""


@dataclass(frozen=True)
class MoveClock:
    """The wall clock of a process jumps."""

    whom: str
    ahead_s: int


@dataclass(frozen=True)
class Order:
    """A person pulls a brake of the mill, and the broker is killed when it has said yes."""

    entity: str
    value: float


Fault = (
    Kill
    | Pause
    | Misplay
    | Late
    | Cut
    | Strike
    | Meddle
    | FillDisk
    | TearLog
    | SpoilStore
    | MoveClock
    | Order
)


Phase = Literal["begin", "end"]


@dataclass(frozen=True)
class Cue:
    """A fault happens when `member` is at this step, the first `times` times that it is.

    Of the watcher, steps are the messages that it has been told.
    """

    member: str
    step: int
    fault: Fault
    at: Phase = "begin"
    times: int = 1


ALWAYS = 1 << 30


@dataclass(frozen=True)
class Undisturbed:
    """The run ends with the ledger, entry for entry, that it has when nothing happens."""


@dataclass(frozen=True)
class Failed:
    """The run ends with one of these reasons, which blames this member; what is recorded is the
    begin of the undisturbed ledger."""

    reasons: tuple[Reason, ...]
    member: str = ""


@dataclass(frozen=True)
class Degraded:
    """The run ends well; from some instant on, this member's values are held, or its spare's."""

    member: str
    quality: Literal["held", "substituted"]


@dataclass(frozen=True)
class Obeyed:
    """The run ends with the ledger that it has when its orders are known beforehand, and every
    order that was accepted is among them."""


@dataclass(frozen=True)
class OutOfSpace:
    """The run ends with STORE_FAILED while the disk is full. When there is space again and the
    broker is started anew, everything that it had told is there, it finishes the run with the
    undisturbed ledger, and takes new ones."""


End = Undisturbed | Failed | Degraded | Obeyed | OutOfSpace

Route = Literal["name", "address", "meddler"]
"""How the broker finds a member: registered, behind a proxy; by the proxy's address; by the
address of the meddler, which is between the two."""

RECOVER: Mapping[str, Any] = {"do": "recover", "answer_within_s": 2.0, "back_within_s": 15.0}
SAVES = {"mill": 60.0, "town": 45.0}
"""How often the members that can be saved are, in minutes of the run."""


def recovering(member: str, **more: Any) -> dict[str, Any]:
    """The policy `recover`, with snapshots where the member has them."""
    saves = {"save_every_min": SAVES[member]} if member in SAVES else {}
    return {**RECOVER, **saves, **more}


@dataclass(frozen=True)
class Plan:
    """One run: its faults, the policies that its document declares, and the end that follows."""

    name: str
    cues: tuple[Cue, ...]
    end: End = Undisturbed()
    policies: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {name: recovering(name) for name in MEMBERS}
    )
    route: Route = "name"
    bound_s: float = 60.0
