"""Keeps the states that members had at the cuts of runs, so that not every fork redoes the past."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from federation.broker.seats import Saved

MOST = 64
"""How many members of runs are remembered, those that were asked for last."""

EACH = 2
"""How many states of one member: forks of a decision have one cut, the next decision another."""


class Cuts:
    """States of members after so many steps, by the run that took them.

    They are exact: whoever has one got it from a session that did these steps again and answered
    as before.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], dict[int, Saved]] = OrderedDict()
        self._making: dict[tuple[str, str, int], asyncio.Future[Saved]] = {}

    async def at(
        self, run: str, member: str, steps: int, make: Callable[[], Awaitable[Saved]]
    ) -> Saved:
        """The state of a member after so many steps; of several who ask, one makes it.

        Fails as `make` does, and then lets the next one try.
        """
        while True:
            kept = self._kept.get((run, member), {}).get(steps)
            if kept is not None:
                return kept
            making = self._making.get((run, member, steps))
            if making is None:
                break
            await asyncio.wait([making])
        mine = asyncio.get_running_loop().create_future()
        self._making[run, member, steps] = mine
        try:
            saved = await make()
            self._keep(run, member, saved)
            return saved
        finally:
            del self._making[run, member, steps]
            mine.cancel()

    def before(self, run: str, member: str, steps: int) -> Saved | None:
        """The last state that is kept of a member after at most so many steps."""
        kept = self._kept.get((run, member), {})
        return max(
            (saved for saved in kept.values() if saved.steps <= steps),
            key=lambda saved: saved.steps,
            default=None,
        )

    def _keep(self, run: str, member: str, saved: Saved) -> None:
        kept = self._kept.setdefault((run, member), {})
        self._kept.move_to_end((run, member))
        kept[saved.steps] = saved
        for steps in sorted(kept)[:-EACH]:
            del kept[steps]
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
