"""Measures, now and then, how far the clocks of a run's members are off from the broker's."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from federation import telemetry
from federation.errors import FederationError
from federation.wire.link import Clock, Link

EVERY_S = 10.0
"""How often each process is asked for its clock."""

REMEMBERED = 8
"""Of how many readings the one with the shortest round trip counts."""

MOST_DRIFT = 5e-4
"""How much faster or slower an honest clock goes: 43 s in a day."""

GRAIN_S = 1e-3
"""By how much two readings may differ for no reason."""


@dataclass(slots=True)
class _Watched:
    """What is known of one clock."""

    readings: deque[tuple[float, Clock]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """When each was taken, on the monotonic clock, and what it was."""
    jump_s: float = 0.0
    """By how much it has jumped last."""
    steady: int = REMEMBERED
    """How many readings since then have agreed."""

    def take(self, now_s: float, reading: Clock) -> None:
        """Take in a reading. Each says where the clock is, within half its round trip; if two
        can't both be true, the clock has been set, and what was known of it is void."""
        for then_s, before in self.readings:
            leeway_s = (reading.round_trip_s + before.round_trip_s) / 2
            leeway_s += GRAIN_S + MOST_DRIFT * (now_s - then_s)
            moved_s = reading.offset_s - before.offset_s
            if abs(moved_s) > leeway_s:
                self.readings.clear()
                self.jump_s, self.steady = moved_s, 0
                break
        self.readings.append((now_s, reading))
        self.steady += 1

    @property
    def best(self) -> Clock | None:
        """The reading that says most."""
        found = (reading for _, reading in self.readings)
        return min(found, key=lambda reading: reading.round_trip_s, default=None)

    def fault(self, bound_s: float) -> str:
        """What is wrong with it for sure, when it may be off by `bound_s`; empty for nothing."""
        best = self.best
        if best is not None and abs(best.offset_s) - best.round_trip_s / 2 > bound_s:
            return f"its clock is {best.offset_s:+.3g} s off; it may be {bound_s:g} s off"
        if self.steady < REMEMBERED and abs(self.jump_s) > bound_s:
            return f"its clock has jumped by {self.jump_s:+.3g} s"
        return ""


class Clocks:
    """The clocks of the members at the other ends of the links that there are at the time."""

    def __init__(
        self,
        links: Callable[[], Mapping[str, Link]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links, self._clock = links, clock
        self._watched: dict[str, _Watched] = {}

    def of(self, member: str) -> Clock | None:
        """A member's clock; None while it is unknown, and for a twin that does not tell."""
        watched = self._watched.get(member)
        return None if watched is None else watched.best

    def fault(self, member: str, bound_s: float) -> str:
        """Why a member's clock can't be trusted to `bound_s`; empty while nothing is known of it.

        A clock is off when it is so whatever the line's delays; one that has jumped by more is
        trusted again after as many readings as are remembered.
        """
        watched = self._watched.get(member)
        return "" if watched is None else watched.fault(bound_s)

    def take(self, member: str, reading: Clock) -> None:
        """Take in a reading of a member's clock."""
        self._watched.setdefault(member, _Watched()).take(self._clock(), reading)
        telemetry.clock_offset.set(reading.offset_s, {"member": member})
        telemetry.round_trip.set(reading.round_trip_s, {"member": member})

    async def measure(self) -> None:
        """Ask every member's process again and again, until cancelled."""
        while True:
            asking = [self._ask(member, link) for member, link in self._links().items()]
            await asyncio.gather(asyncio.sleep(EVERY_S), *asking)

    async def _ask(self, member: str, link: Link) -> None:
        try:
            reading = await link.clock()
        except FederationError:
            return  # who is lost is told elsewhere
        if reading is not None:
            self.take(member, reading)
