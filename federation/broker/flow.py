"""How many grants of a run are out at a time: as many as let it go on fastest.

Where models are quick, a frame costs more than the steps in it. With fewer grants out, those that
wait their turn gather steps meanwhile, and a frame carries more; with more, members work side by
side. Which is better depends on the couplings, the models and the machine, so it is tried: each
limit for some answers, then the fastest for a while. No result depends on it.
"""

from __future__ import annotations

from statistics import median

LIMITS = (None, 4, 2, 1)
"""What is tried, in this order; None is no limit."""

WINDOW = 48
"""Answers of a trial, after as many in which the run settles into it."""

QUICK_S = 0.001
"""Members whose typical step takes longer, the way to them included, are not made to wait."""

SLOW_S = 0.1
"""An answer that takes this long ends a limit at once."""

HOLD_S = 2.0
"""How long the fastest is kept before all are tried again; twice as long if it is so again."""

LONGEST_S = 60.0


class Flow:
    """Decides on the limit; `limit` is None for none."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self._rates: dict[int | None, float] = {}
        """Steps per second under the limits tried so far."""
        self._until_s = 0.0
        self._hold_s = HOLD_S
        self._best: int | None = None
        self._settles = True
        self._begin(0.0)

    def answered(self, steps: int, wall_s: float, now_s: float) -> None:
        """A grant of so many steps was answered, `wall_s` after it was given."""
        self._steps += steps
        self._walls_s.append(wall_s / steps)
        if len(self._walls_s) < WINDOW or now_s < self._until_s:
            if len(self._walls_s) >= WINDOW:
                self._begin(now_s)
            return
        if self._settles:
            self._settles = False
        elif self.limit is not None and median(self._walls_s) > QUICK_S:
            self._lift(now_s)
        else:
            self._rates[self.limit] = self._steps / max(now_s - self._since_s, 1e-9)
            self._next(now_s)
        self._begin(now_s)

    def owed(self, since_s: float, now_s: float) -> None:
        """A grant that was given at `since_s` is not answered yet."""
        if self.limit is not None and now_s > since_s + SLOW_S:
            self._lift(now_s)

    def _begin(self, now_s: float) -> None:
        self._steps, self._since_s = 0, now_s
        self._walls_s: list[float] = []

    def _next(self, now_s: float) -> None:
        """Try the next limit, or keep the fastest for a while."""
        self._settles = True
        if len(self._rates) < len(LIMITS):
            self.limit = LIMITS[len(self._rates)]
            return
        best = max(LIMITS, key=lambda limit: self._rates[limit])
        self._keep(best, now_s, min(2 * self._hold_s, LONGEST_S) if best == self._best else HOLD_S)

    def _lift(self, now_s: float) -> None:
        self._keep(None, now_s, min(2 * self._hold_s, LONGEST_S))

    def _keep(self, limit: int | None, now_s: float, hold_s: float) -> None:
        self.limit = self._best = limit
        self._hold_s = hold_s
        self._until_s = now_s + hold_s
        self._rates.clear()
        self._settles = True
