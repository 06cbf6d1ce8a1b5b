"""Plans again and again in one engine, for a loop with a deadline and no time for a bad plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import highspy
import numpy as np

from federation.errors import PlanError, Reason
from federation.plan.engine import (
    UNIT_USD,
    by_column,
    engine_of,
    make_whole,
    optimum_usd,
    stated,
)
from federation.plan.joining import Indices, Joined
from federation.plan.joint import OPTIONS, JointModel, Posed, Schedule
from federation.plan.relaxation import relax
from federation.plan.visits import Task, Visit
from federation.twin import Vector

TOLERANCE = 1e-6
"""How far a row may be passed, as a share of the largest number that stands in it."""

RESERVE = 0.1
"""The share of a deadline that is kept for looking at what the solver found."""

_OPTIONS = (*OPTIONS, "mip_abs_gap")

Source = Literal["solved", "kept", "recovery"]


@dataclass(frozen=True)
class Rolled:
    """What to do until the next plan, where it came from and why.

    `solved` is a plan of the solver, `kept` the one before, on the new data; both were checked
    row by row against the model (see `breaches`), and `schedule` says what they cost. `recovery`
    is what was declared for when there is neither: those at work go on and nobody is sent, which
    has no schedule when not even that could be checked in time. Seconds are by the clock given.
    """

    source: Source
    why: str
    schedule: Schedule | None
    visits: tuple[Visit, ...]
    update_s: float
    solve_s: float
    changed: int
    """Numbers that the model took in place; all of them when it had to be made anew."""


class Rolling:
    """Keeps one HiGHS model; each plan changes its data and starts where the last one ended.

    Guaranteed: what is given out as a plan satisfies the model to the tolerance, and comes within
    the deadline as far as the solver heeds it, or is the declared recovery. Not guaranteed:
    that the same question gets the same plan. What the engine remembers chooses among equal
    plans, and a deadline among unequal ones; runs that must repeat use `JointModel.solve`,
    or this with limits of nodes and no deadline, from a fresh object, in the same order.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._problem: Joined | None = None
        self._matrix: tuple[Indices, Indices, Vector] | None = None
        self.engine: highspy.Highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self._usual = {name: self.engine.getOptionValue(name)[1] for name in _OPTIONS}
        self._start = highspy.HighsBasis()
        self._last: tuple[float, dict[tuple[str, str], Visit]] = 0.0, {}

    def plan(
        self,
        model: JointModel,
        tasks: Sequence[Task],
        now_h: float = 0.0,
        deadline_s: float | None = None,
    ) -> Rolled:
        """Plan from `now_h` on, an hour on the time line that the plan before counts on, too.

        Raises NO_PLAN for a component that no block knows; everything else ends in a plan.
        """
        began_s = self._clock()
        until_s = np.inf if deadline_s is None else began_s + (1.0 - RESERVE) * deadline_s
        model.check(tasks)
        problem, visits, engaged = model.stated(tasks)
        changed = self.update(problem)
        updated_s = self._clock()
        best, source, why = self._fallback(problem, tasks, visits, now_h, until_s)
        try:
            self._allow(until_s)
            idle_usd = None if best is None else best.idle_cost_usd
            relaxed = relax(self.engine, model.joined, visits, engaged, idle_usd, self._start)
            assert relaxed.basis is not None
            self._start = relaxed.basis
            if best is not None:
                best = replace(best, bound_usd=min(relaxed.bound_usd, best.cost_usd))
            kept = relaxed.used | np.array([not v.sent for v in visits], dtype=bool)
            self._allow(until_s)
            found, x = model.settle(Posed(problem, tuple(visits), self.engine, relaxed, kept))
            broken = breaches(problem, x)
            if broken:
                why = f"the solver's plan breaks {len(broken)} limits, first {broken[0]}"
            elif best is None or found.cost_usd <= best.cost_usd:
                best, source, why = found, "solved", found.termination
            else:
                why = "the solver found nothing better"
        except PlanError as error:
            why = str(error)
        finally:
            self._tidy(len(problem.low) - len(visits), len(visits))
        rest = tuple(v for v in visits if not v.sent)
        done = rest if best is None else best.visits
        self._last = now_h, {_task(tasks[v.task]): v for v in done if v.sent}
        spent_s = self._clock() - updated_s
        return Rolled(source, why, best, done, updated_s - began_s, spent_s, changed)

    def update(self, problem: Joined) -> int:
        """Give the engine the data of a problem; how many numbers that changed.

        Only what differs is changed, as long as rows, columns and the places of coefficients are
        the same. Else the model goes over whole, and what is called as before keeps its place in
        the basis that the solver starts from.
        """
        matrix = by_column(problem)
        before, self._problem, self._matrix, had = self._problem, problem, matrix, self._matrix
        if (
            before is None
            or had is None
            or before.columns != problem.columns
            or before.rows != problem.rows
            or not np.array_equal(had[0], matrix[0])
            or not np.array_equal(had[1], matrix[1])
        ):
            self._make_anew(before, problem)
            return problem.low.size * 3 + problem.row_low.size * 2 + matrix[2].size
        engine = self.engine
        columns = np.flatnonzero((before.low != problem.low) | (before.high != problem.high))
        engine.changeColsBounds(
            columns.size, columns.astype(np.int32), problem.low[columns], problem.high[columns]
        )
        costs = np.flatnonzero(before.cost != problem.cost)
        engine.changeColsCost(costs.size, costs.astype(np.int32), problem.cost[costs] / UNIT_USD)
        rows = np.flatnonzero(
            (before.row_low != problem.row_low) | (before.row_high != problem.row_high)
        )
        for row in rows.tolist():
            engine.changeRowBounds(row, problem.row_low[row], problem.row_high[row])
        entries = np.flatnonzero(had[2] != matrix[2])
        of_column = np.searchsorted(matrix[0], entries, side="right") - 1
        for entry, column in zip(entries.tolist(), of_column.tolist(), strict=True):
            engine.changeCoeff(int(matrix[1][entry]), column, matrix[2][entry])
        return 2 * columns.size + costs.size + 2 * rows.size + entries.size

    def _make_anew(self, before: Joined | None, problem: Joined) -> None:
        """Another model; what is called as before keeps its place where the solver starts from."""
        if before is None:
            self.engine = engine_of(problem)
            return
        self.engine.passModel(stated(problem))
        status = highspy.HighsBasisStatus
        columns, rows = _common(before.columns, problem.columns), _common(before.rows, problem.rows)
        if self._start.valid:
            self._start.col_status = _carried(
                before.columns, self._start.col_status, problem.columns, columns, status.kLower
            )
            self._start.row_status = _carried(
                before.rows, self._start.row_status, problem.rows, rows, status.kBasic
            )
            self._start.alien = True  # there may be too many in it, or too few

    def _fallback(
        self,
        problem: Joined,
        tasks: Sequence[Task],
        visits: Sequence[Visit],
        now_h: float,
        until_s: float,
    ) -> tuple[Schedule | None, Source, str]:
        """The plan before if it still holds, else that nobody is sent, else nothing."""
        why = "no plan could be checked in time"
        last_h, last = self._last
        wanted = [
            k
            for k, v in enumerate(visits)
            if v.sent
            and (was := last.get(_task(tasks[v.task]))) is not None
            and v.start_h == _again(was, visits, v.task, now_h - last_h)
        ]
        anew = {visits[k].task for k in wanted}
        resting = [k for k, v in enumerate(visits) if not v.sent]
        going_on = [k for k in resting if visits[k].task not in anew]
        try:
            self._allow(until_s)
            idle_usd = self._cost_of(problem, len(visits), resting)
            if idle_usd is None:
                return None, "recovery", "to send nobody breaks a limit of the model"
            idle = tuple(visits[k] for k in resting)
            nobody = Schedule("recovery", "feasible", idle_usd, idle_usd, -np.inf, idle)
            if not wanted:
                return nobody, "recovery", "there was no plan before"
            why = "the plan before does not hold any more"
            self._allow(until_s)
            kept_usd = self._cost_of(problem, len(visits), wanted + going_on)
            if kept_usd is None or kept_usd > idle_usd:
                return nobody, "recovery", why
            chosen = sorted(
                (visits[k] for k in wanted + going_on),
                key=lambda v: (v.start_h, v.end_h, v.task),
            )
            schedule = Schedule("kept", "feasible", idle_usd, kept_usd, -np.inf, tuple(chosen))
            return schedule, "kept", "the plan before holds"
        except PlanError as error:
            return None, "recovery", str(error)

    def _cost_of(self, problem: Joined, count: int, chosen: Sequence[int]) -> float | None:
        """What it costs to do exactly these visits, None when that breaks a limit."""
        part = np.zeros(count)
        part[list(chosen)] = 1.0
        places = np.arange(len(problem.low) - count, len(problem.low), dtype=np.int32)
        self.engine.changeColsBounds(count, places, part, part)
        whole = np.flatnonzero(problem.integer[: len(problem.low) - count])
        make_whole(self.engine, whole)
        try:
            usd = optimum_usd(self.engine)
        except PlanError as error:
            if error.reason is not Reason.PLAN_INFEASIBLE:
                raise
            return None
        finally:
            make_whole(self.engine, whole, False)
        x = np.array(self.engine.getSolution().col_value)
        return None if breaches(problem, x) else usd

    def _allow(self, until_s: float) -> None:
        """Let the engine run until then; its own clock counts all its runs."""
        left_s = max(until_s - self._clock(), 0.0)
        if left_s == 0.0:
            raise PlanError(Reason.NO_PLAN, "the deadline has passed")
        limit_s = self.engine.getRunTime() + left_s if np.isfinite(left_s) else np.inf
        self.engine.setOptionValue("time_limit", limit_s)

    def _tidy(self, first: int, count: int) -> None:
        """Take back what planning changed, so that the engine holds the problem again."""
        places = np.arange(first, first + count, dtype=np.int32)
        self.engine.changeColsCost(count, places, np.zeros(count))
        self.engine.changeColsBounds(count, places, np.zeros(count), np.ones(count))
        make_whole(self.engine, np.arange(first + count), False)
        for name, value in self._usual.items():
            self.engine.setOptionValue(name, value)


def breaches(problem: Joined, x: Vector, tolerance: float = TOLERANCE) -> tuple[str, ...]:
    """The rows and columns that `x` does not keep to, by name: the solver is not asked.

    The tolerance is a share of the largest number of a row, at least one; NaN breaks whatever
    it stands in.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.shape != problem.low.shape:
        return (f"{x.size} numbers for {problem.low.size} columns",)
    rows = len(problem.row_low)
    terms = problem.coefficient * x[problem.column_index]
    activity = np.bincount(problem.row_index, terms, rows)
    scale = np.ones(rows)
    np.fmax.at(scale, problem.row_index, np.abs(terms))
    room = tolerance * scale
    kept = (activity >= problem.row_low - room) & (activity <= problem.row_high + room)
    size = tolerance * np.maximum(np.abs(x), 1.0)
    within = (x >= problem.low - size) & (x <= problem.high + size)
    within &= ~problem.integer | (np.abs(x - np.round(x)) <= size)
    return tuple(problem.rows[r] for r in np.flatnonzero(~kept)) + tuple(
        problem.columns[j] for j in np.flatnonzero(~within)
    )


def _task(task: Task) -> tuple[str, str]:
    return task.member, task.component


def _again(was: Visit, visits: Sequence[Visit], task: int, passed_h: float) -> float | None:
    """When a visit of the plan before would start now: the first chance that is not too soon."""
    return next(
        (
            v.start_h
            for v in visits
            if v.task == task and v.sent and v.start_h >= was.start_h - passed_h
        ),
        None,
    )


def _common(before: tuple[str, ...], after: tuple[str, ...]) -> int:
    """How many names at the beginning are the same: those of the members, as a rule."""
    short = min(len(before), len(after))
    return next((k for k in range(short) if before[k] != after[k]), short)


def _carried(
    before: tuple[str, ...], status: list[Any], after: tuple[str, ...], common: int, new: Any
) -> list[Any]:
    known = dict(zip(before[common:], status[common:], strict=True))
    return status[:common] + [known.get(name, new) for name in after[common:]]
