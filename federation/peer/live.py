"""A session that looks at the run of a city that goes on: its values as they are at the reader's
instants, and the last that are known, marked as held, where the city's run is not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from federation.core.ledger import Entry, EventRecord, Quality, Record
from federation.errors import Reason, ScenarioError
from federation.peer.city import Rights, Teller
from federation.peer.export import Lens
from federation.twin import SECOND_NS, Description, Event, Step, Twin, Vector

LOOK_S = 0.02
"""How often the record is looked at by a session that waits for it."""


@dataclass(frozen=True, slots=True)
class Page:
    """Entries of a run's record, in its order, and where to go on."""

    entries: Sequence[Entry]
    after: int
    is_last: bool
    settled_ns: int
    """Up to here the record is complete with this page, if it is the last."""
    is_over: bool


class LiveRecord(Protocol):
    """The run of a city that goes on. Its methods may be called from any thread."""

    def run(self) -> str:
        """Its name; fails with NOT_LIVE when there is none."""

    def describe(self, run: str) -> Mapping[str, Description]:
        """The members of a run that goes on."""

    def read(self, run: str, after: int) -> Page: ...


class LiveCity(Twin):
    """One session that looks at a run. Instants of the reader are instants of the city's run.

    It waits up to `patience_s` for the run to come to the reader's instant.
    """

    def __init__(
        self,
        rights: Rights,
        record: LiveRecord,
        run: str,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rights, self._record, self._run = rights, record, run
        self._patience_s, self._clock, self._pause = patience_s, clock, pause

    def describe(self) -> Description:
        return self._rights.export.description

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        export = self._rights.export
        self._lens, self._teller = Lens(export.views), Teller(self._rights)
        self._values: dict[tuple[str, str], Vector] = {}
        descriptions = self._record.describe(self._run)
        for view in export.views:
            description = descriptions[view.member]
            variable = next(v for v in description.outputs() if v.name == view.variable)
            size = len(description.ids(variable.kind))
            self._values[view.member, view.variable] = np.full(size, variable.initial)
        self._qualities: dict[tuple[str, str], Quality] = {}
        self._ahead: list[Entry] = []
        """What is on record and later than the reader's instant."""
        self._after, self._settled_ns = 0, -1
        self._is_over = False

    def advance(self, step: Step) -> None:
        self._rights.check()
        self._wait_until(step.time_ns)
        now, self._ahead = _split(self._ahead, step.time_ns)
        events: list[tuple[str, Event]] = []
        for entry in now:
            match entry:
                case Record() if (entry.owner, entry.variable) in self._values:
                    self._values[entry.owner, entry.variable] = entry.value
                    self._qualities[entry.owner, entry.variable] = entry.quality
                case EventRecord():
                    events.append((entry.owner, entry.event))
        self._teller.tell(step.time_ns, events, step.emit)
        for name, value in self._lens.see(step.time_ns, self._values).items():
            step.publish(name, value)
        why = self._why_held(step.time_ns)
        if why:
            step.hold(why)

    def _why_held(self, time_ns: int) -> str:
        if self._settled_ns < time_ns:
            how = "has ended" if self._is_over else "has not come further"
            at_s = max(self._settled_ns, 0) / SECOND_NS
            return f"the city's run {how}: it is at {at_s:g} s"
        poor = [what for what, quality in self._qualities.items() if quality is not Quality.GOOD]
        if poor:
            member, variable = poor[0]
            quality = self._qualities[poor[0]].name.lower()
            return f"in the city {member}.{variable} is {quality}"
        return ""

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
