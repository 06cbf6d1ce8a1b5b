"""Keeps a live run to the wall clock, and says how late it is.

The coordinator knows no clock: it grants what may be done, and the shell lets a grant wait for
its instant. The values that a run gives do not depend on this, but under `degrade`, where a
member that is late is answered for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from math import exp, log

from federation.core.ledger import Quality
from federation.errors import FederationError
from federation.scenario.spec import Pace
from federation.twin import Action, DeskStep, Event, StepInput, StepResult, Vector

CATCH_UP_STEPS = 64
"""How many missed steps a late member is given at a time."""

_FINEST_S = 1e-6
_FINENESS = 0.1
"""Lags are counted by orders of this much, so that a quantile is at most a tenth too high."""

Done = Callable[[Sequence[StepResult] | FederationError], None]


class Pacer:
    """When, on a clock of seconds that the caller reads, each instant of a run is due.

    The clock starts at the first call of `due_s`. What is late stays late under `wait` and
    `degrade`; under `skip` a step that is given more than `late_after_s` late is due by then, and
    all that follow are due later by as much.
    """

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.lag_s = self.max_lag_s = self.skipped_s = 0.0
        self._origin_s: float | None = None
        self._counts: dict[int, int] = {}
        self._given = 0

    def due_s(self, time_ns: int, now_s: float, began_ns: int = 0) -> float:
        """When a step at `time_ns` is due; the run went on from `began_ns` at the first call."""
        if self._origin_s is None:
            self._origin_s = now_s - began_ns / 1e9 / self.pace.factor
        return self._origin_s + time_ns / 1e9 / self.pace.factor

    def gave(self, time_ns: int, now_s: float) -> None:
        """Note that a step at `time_ns` has been given."""
        assert self._origin_s is not None
        lag_s = max(now_s - self.due_s(time_ns, now_s), 0.0)
        self.lag_s = lag_s
        self.max_lag_s = max(self.max_lag_s, lag_s)
        order = 0 if lag_s <= _FINEST_S else 1 + int(log(lag_s / _FINEST_S) / _FINENESS)
        self._counts[order] = self._counts.get(order, 0) + 1
        self._given += 1
        if self.pace.when_late == "skip" and lag_s > self.pace.late_after_s:
            self._origin_s += lag_s
            self.skipped_s += lag_s

    def now_ns(self, now_s: float) -> int:
        """The instant of the run that the wall clock stands at; 0 before the first step."""
        if self._origin_s is None:
            return 0
        return round((now_s - self._origin_s) * self.pace.factor * 1e9)

    @property
    def p99_lag_s(self) -> float:
        """What 99 of 100 steps were late by at most, up to a tenth too high."""
        beyond = self._given // 100
        for order in sorted(self._counts, reverse=True):
            beyond -= self._counts[order]
            if beyond < 0:
                return min(_FINEST_S * exp(order * _FINENESS), self.max_lag_s) if order else 0.0
        return 0.0

    def report(self) -> dict[str, float | str]:
        return {
            "factor": self.pace.factor,
            "when_late": self.pace.when_late,
            "lag_s": self.lag_s,
            "max_lag_s": self.max_lag_s,
            "p99_lag_s": self.p99_lag_s,
            "skipped_s": self.skipped_s,
        }


class LateSeat:
    """Answers for a member with a period while it is late, and lets it catch up.

    A step that the member takes too long for is answered without news, as are those that come
    meanwhile; `changed` hears first that its values are stale. Nothing is kept from the member:
    it is given all the steps that it missed, in order, with the instant since which it has been
    missed, and what it then has to say is said with the first step that follows; `told` hears what
    belongs to the instants before. It is in time again when it has answered the step at hand, and
    with that all that it ever published is published anew.
    """

    def __init__(
        self,
        begin: Callable[[Sequence[StepInput], Done], None],
        late_after_s: float,
        changed: Callable[[int, Quality], None],
        failed: Callable[[FederationError], None],
        told: Callable[[Sequence[StepResult]], None] = lambda results: None,
    ) -> None:
        self.is_late = False
        self._since_ns = 0
        """Since when, while it is late."""
        self._told = told
        self._begin = begin
        self._late_after_s = late_after_s
        self._changed = changed
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._working = 0
        """How many steps the member owes an answer to."""
        self._missed: list[StepInput] = []
        """Steps that were answered for the member and not given to it yet."""
        self._late: list[StepResult] = []
        """What it said to steps that were answered for it, and nobody has heard yet."""
        self._published: dict[str, Vector] = {}
        self._owed: StepInput | None = None
        """The step at hand, whose answer is waited for."""
        self._done: Done | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, steps: Sequence[StepInput], done: Done) -> None:
        """Do one step, as `Seat.begin`."""
        (step,) = steps
        self._missed.append(step)
        self._owed, self._done = step, done
        if not self._working:
            self._give()
        if self._working and not self._missed:
            self._timer = self._loop.call_later(self._late_after_s, self._answer_for)
        else:
            self._timer = self._loop.call_later(0.0, self._answer_for)

    def close(self) -> None:
        """Nobody waits for an answer any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._done = None

    def _give(self) -> None:
        frame, self._missed = self._missed[:CATCH_UP_STEPS], self._missed[CATCH_UP_STEPS:]
        self._working = len(frame)
        if self.is_late:
            frame = [step._replace(missed_since_ns=self._since_ns) for step in frame]
        self._begin(frame, self._heard)

    def _heard(self, results: Sequence[StepResult] | FederationError) -> None:
        self._working = 0
        if isinstance(results, FederationError):
            self.close()
            self._failed(results)
            return
        for result in results:
            self._published.update(result.outputs)
        self._late.extend(results)
        owed = self._owed
        if self._done is None or owed is None or results[-1].time_ns != owed.time_ns:
            if self._missed:
                self._give()
            return
        if self.is_late:
            self.is_late = False
            self._changed(owed.time_ns, Quality.GOOD)
            self._answer(owed, self._published)
        elif len(self._late) == 1:
            self._late = []
            self._say(results[0])
        else:
            self._answer(owed)

    def _answer_for(self) -> None:
        """Answer the step at hand with what there is."""
        assert self._owed is not None
        if not self.is_late:
            self.is_late, self._since_ns = True, self._owed.time_ns
            self._changed(self._owed.time_ns, Quality.STALE)
        self._answer(self._owed)

    def _answer(self, step: StepInput, outputs: dict[str, Vector] | None = None) -> None:
        late, self._late = self._late, []
        if passed := [result for result in late if result.time_ns < step.time_ns]:
            self._told(passed)
        news: dict[str, Vector] = {}
        causes: dict[str, dict[int, str]] = {}
        events: list[Event] = []
        actions: list[Action] = []
        desk: DeskStep | None = None
        for result in late:
            if result.desk is not None:
                before = () if desk is None else desk.operated
                desk = DeskStep((*before, *result.desk.operated), result.desk.state)
            news.update(result.outputs)
            for name, entries in result.causes.items():
                causes.setdefault(name, {}).update(entries)
            events.extend(result.events)
            actions.extend(result.actions)
        self._say(
            StepResult(
                step.time_ns,
                0,
                dict(news if outputs is None else outputs),
                causes,
                tuple(events),
                tuple(actions),
                desk=desk,
                held=late[-1].held if late else "",
            )
        )

    def _say(self, result: StepResult) -> None:
        done = self._done
        self.close()
        if done is not None:
            done((result,))
