"""A session that looks at the run of a city that goes on: its values as they were just before the
reader's instants, and the last that are known, marked as held, where the city's run is not there
yet.

Before, and not at: a city's record is complete up to an instant when all its members have come to
it, among them those by which it looks at others. Of cities that look at each other, each would wait
at every instant for the other's word on it.

What it answers follows from the city's record and from how far that went when it looked. It says
how far with every answer, so that over a line that breaks any step can be done again in another
session, by another life of the city's broker, with the same answer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from federation.core.ledger import Entry, EventRecord, Quality, Record
from federation.errors import Reason, ScenarioError
from federation.peer.city import Rights, Teller
from federation.peer.export import Lens
from federation.snapshot import Snapshots
from federation.twin import SECOND_NS, Description, Event, Step, Twin, Vector

LOOK_S = 0.02
"""How often the record is looked at by a session that waits for it."""

KNOWN_EVENTS = 4_096
"""How many events of the city may still be named as causes, the newest; the memory of a session
must not grow with the run."""

_STATES = Snapshots(Event)


@dataclass(frozen=True, slots=True)
class Page:
    """Entries of a run's record, in its order, and where to go on."""

    entries: Sequence[Entry]
    after: int
    is_last: bool
    settled_ns: int
    """Up to here the record is complete with this page, if it is the last."""
    is_over: bool


@dataclass(frozen=True, slots=True)
class Absence:
    """A span in which a reader went on without the city, as it said when it was back.

    `heard_unix_ns` is when it was last answered before, by the clock of this process; None when a
    session before this one had done so.
    """

    reader: str
    start_ns: int
    end_ns: int
    heard_unix_ns: int | None
    back_unix_ns: int
    variables: tuple[str, ...]


class LiveRecord(Protocol):
    """The run of a city that goes on. Its methods may be called from any thread."""

    def run(self) -> str:
        """Its name; fails with NOT_LIVE when there is none."""

    def describe(self, run: str) -> Mapping[str, Description]:
        """The members of a run that goes on."""

    def cities(self, run: str) -> Mapping[str, str]:
        """The members of a run that are other cities, and which: those that are there, or ever
        were, whenever it is looked at."""

    def read(self, run: str, after: int) -> Page: ...

    def note(self, run: str, absence: Absence) -> None:
        """Put on record that a reader was away; a run that is over takes no more."""


class LiveCity(Twin):
    """One session that looks at a run. Instants of the reader are instants of the city's run; at
    each it tells what was so before it.

    It waits up to `patience_s` for the run to come so far.
    """

    def __init__(
        self,
        rights: Rights,
        record: LiveRecord,
        run: str,
        patience_s: float,
        reader: str = "",
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rights, self._record, self._run = rights, record, run
        self._patience_s, self._clock, self._pause = patience_s, clock, pause
        self._reader = reader

    def describe(self) -> Description:
        return self._rights.export.description

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        export = self._rights.export
        self._lens, self._teller = Lens(export.views), Teller(self._rights)
        self._values: dict[tuple[str, str], Vector] = {}
        self._wanted = frozenset((view.member, view.variable) for view in export.views)
        self._qualities: dict[tuple[str, str], Quality] = {}
        self._ahead: list[Entry] = []
        """What is on record and later than what has been told of."""
        self._after, self._settled_ns = 0, -1
        self._is_over = self._has_begun = False
        self._missed: tuple[int, int] | None = None
        """The span that the reader goes on alone in, as far as it has asked for it since."""
        self._asked: deque[tuple[int, int]] = deque(maxlen=2)
        """The reader's last instants, and when it asked for them."""
        self._turn_unix_ns: tuple[int | None, int] = (None, 0)
        """When it had last asked before it was away, and when it first did again."""

    def advance(self, step: Step) -> None:
        self._rights.check()
        if not self._has_begun and step.last_ns > 0:
            self._catch_up(step.last_ns)
        self._has_begun = True
        wanted_ns = step.time_ns - 1 if step.seen_ns is None else step.seen_ns
        self._wait_until(wanted_ns)
        seen_ns = min(self._settled_ns, wanted_ns)
        events = self._take(seen_ns)
        self._teller.tell(step.time_ns, events, step.emit)
        self._teller.forget(KNOWN_EVENTS)
        for name, value in self._lens.see(step.time_ns, self._values).items():
            step.publish(name, value)
        why = self._why_held(step.time_ns - 1, seen_ns)
        if why:
            step.hold(why)
        step.saw(seen_ns)
        self._note_absence(step)

    def snapshot(self) -> bytes:
        return _STATES.pack(
            {
                "run": self._run,
                "after": self._after - len(self._ahead),
                "has_begun": self._has_begun,
                "values": [[*what, value] for what, value in self._values.items()],
                "qualities": [[*what, int(quality)] for what, quality in self._qualities.items()],
                "lens": self._lens.state(),
                "teller": self._teller.state(),
                "missed": self._missed,
            }
        )

    def restore(self, state: bytes) -> None:
        told = _STATES.unpack(state)
        try:
            if told["run"] != self._run:
                raise ScenarioError(
                    Reason.REPLAY_DIFFERS,
                    f"the session looked at {told['run']}, and what goes on is {self._run}",
                    {"run": str(told["run"])},
                )
            self._after, self._ahead = int(told["after"]), []
            self._has_begun = bool(told["has_begun"])
            self._values = {(m, v): value for m, v, value in told["values"]}
            self._qualities = {(m, v): Quality(q) for m, v, q in told["qualities"]}
            self._lens.resume(told["lens"])
            self._teller.resume(told["teller"])
            self._missed = told["missed"]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ScenarioError(
                Reason.INVALID_FRAME, f"this is no state of a city: {error}"
            ) from None

    def _catch_up(self, time_ns: int) -> None:
        """Know what has been before an instant, and tell nothing of it: somebody has."""
        self._wait_until(time_ns - 1)
        events = self._take(min(time_ns - 1, self._settled_ns))
        self._teller.tell(time_ns, events, lambda *what: "")

    def _take(self, until_ns: int) -> list[tuple[str, Event]]:
        """Have the values of an instant of the record; what has happened since the last."""
        now, self._ahead = _split(self._ahead, until_ns)
        events: list[tuple[str, Event]] = []
        for entry in now:
            match entry:
                case Record() if (entry.owner, entry.variable) in self._wanted:
                    self._values[entry.owner, entry.variable] = entry.value
                    self._qualities[entry.owner, entry.variable] = entry.quality
                case EventRecord():
                    events.append((entry.owner, entry.event))
        return events

    def _why_held(self, time_ns: int, seen_ns: int) -> str:
        if seen_ns < time_ns:
            at_s = max(seen_ns, 0) / SECOND_NS
            return f"the city's run has not come further: it is at {at_s:.0f} s"
        poor = [what for what, quality in self._qualities.items() if quality is not Quality.GOOD]
        if poor:
            member, variable = poor[0]
            quality = self._qualities[poor[0]].name.lower()
            return f"in the city {member}.{variable} is {quality}"
        return ""

    def _note_absence(self, step: Step) -> None:
        """Follow whether the reader goes on alone. What is done again has been noted before."""
        now_unix_ns = time.time_ns()
        if step.missed_since_ns is not None:
            if self._missed is None:
                # the step that it missed first may have been on the way all the time
                before = [unix_ns for t, unix_ns in self._asked if t < step.missed_since_ns]
                self._turn_unix_ns = (before[-1] if before else None, now_unix_ns)
            self._missed = (step.missed_since_ns, step.time_ns)
        elif self._missed is not None:
            start_ns, end_ns = self._missed
            self._missed = None
            if step.seen_ns is None:
                variables = tuple(view.name for view in self._rights.export.views)
                span = (start_ns, end_ns, *self._turn_unix_ns)
                absence = Absence(self._reader, *span, variables)
                self._record.note(self._run, absence)
        self._asked.append((step.time_ns, now_unix_ns))

    def _wait_until(self, time_ns: int) -> None:
        """Read the record until it has all up to an instant, or it has been long enough."""
        until_s = self._clock() + self._patience_s
        while self._settled_ns < time_ns and not self._is_over:
            page = self._record.read(self._run, self._after)
            self._ahead.extend(page.entries)
            self._after = page.after
            if not page.is_last:
                continue
            self._settled_ns, self._is_over = page.settled_ns, page.is_over
            if self._settled_ns < time_ns and not self._is_over:
                if self._clock() >= until_s:
                    return
                self._pause(LOOK_S)


def _split(entries: Iterable[Entry], time_ns: int) -> tuple[list[Entry], list[Entry]]:
    """Those up to and including an instant, and those after it."""
    now: list[Entry] = []
    later: list[Entry] = []
    for entry in entries:
        (now if entry.time_ns <= time_ns else later).append(entry)
    return now, later


def no_run(city: str) -> ScenarioError:
    return ScenarioError(Reason.NOT_LIVE, f"{city} has no run that goes on", {"city": city})
