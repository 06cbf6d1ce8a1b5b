"""Measures, now and then, how far the clocks of a run's members are off from the broker's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from federation import telemetry
from federation.errors import FederationError
from federation.wire.link import Clock, Link

EVERY_S = 10.0
"""How often each process is asked for its clock."""

REMEMBERED = 8
"""Of how many readings the one with the shortest round trip counts."""


class Clocks:
    """The clocks of the members at the other ends of the links that there are at the time."""

    def __init__(self, links: Callable[[], Mapping[str, Link]]) -> None:
        self._links = links
        self._readings: dict[str, deque[Clock]] = {}

    def of(self, member: str) -> Clock | None:
        """A member's clock; None while it is unknown, and for a twin that does not tell."""
        readings = self._readings.get(member)
        return min(readings, key=lambda reading: reading.round_trip_s) if readings else None

    async def measure(self) -> None:
        """Ask every member's process again and again, until cancelled."""
        while True:
            for member, link in tuple(self._links().items()):
                try:
                    reading = await link.clock()
                except FederationError:
                    continue  # who is lost is told elsewhere
                if reading is not None:
                    known = self._readings.setdefault(member, deque(maxlen=REMEMBERED))
                    known.append(reading)
                    telemetry.clock_offset.set(reading.offset_s, {"member": member})
                    telemetry.round_trip.set(reading.round_trip_s, {"member": member})
            await asyncio.sleep(EVERY_S)
