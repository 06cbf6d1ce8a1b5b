"""The run of a city that goes on, as those see it who only look at it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from federation.broker.live import LiveRun
from federation.broker.memory import write_absence
from federation.broker.store import Store
from federation.peer.live import Absence, Page, no_run
from federation.scenario.spec import PLANNER
from federation.twin import Description, Vector


class RunRecord:
    """The newest run of a scenario that goes on and is neither a replay nor a what-if."""

    def __init__(
        self,
        city: str,
        scenario: str,
        store: Store,
        live: Mapping[str, LiveRun],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._city, self._scenario, self._store, self._live = city, scenario, store, live
        self._loop = loop

    def run(self) -> str:
        """Its name; fails with NOT_LIVE when there is none."""
        found = [
            live.name
            for live in tuple(self._live.values())
            if live.scenario.name == self._scenario and live.is_lived
        ]
        if not found:
            raise no_run(self._city)
        return found[-1]

    def describe(self, run: str) -> Mapping[str, Description]:
        """The members of a run that goes on; fails with NOT_LIVE when it does not."""
        live = self._live.get(run)
        if live is None:
            raise no_run(self._city)
        return {name: d for name, d in live.descriptions.items() if name != PLANNER}

    def present(self, member: str, variable: str) -> Vector | None:
        """The last value of an output in the run that goes on; fails with NOT_LIVE."""
        return self._store.value(self.run(), member, variable)

    def cities(self, run: str) -> Mapping[str, str]:
        """Its members that are, or were, other cities, and which; it grows as they join."""
        live = self._live.get(run)
        if live is None:
            raise no_run(self._city)
        return live.cities

    def read(self, run: str, after: int) -> Page:
        """The next part of its record; fails with RUN_NOT_FOUND."""
        found, end, known = self._store.entries(run, after)
        entries = [stored.entry for stored in found]
        is_last = end == known.entries
        return Page(entries, end, is_last, known.settled_ns, known.state.is_over)

    def note(self, run: str, absence: Absence) -> None:
        """Put on its record that a reader was away; a run that is over takes no more."""
        live = self._live.get(run)
        if live is not None:
            self._loop.call_soon_threadsafe(live.note, write_absence(absence))
