"""Says of a problem that has no solution what contradicts what, and what would have to give way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import highspy
import numpy as np

from federation.errors import PlanError, Reason
from federation.plan.engine import UNIT_USD, engine_of, make_whole, optimum_usd
from federation.plan.joining import Indices, Joined
from federation.twin import Vector

NODES = 1000
"""How far the solver looks into whole numbers before it leaves a limit in a conflict unproven."""

SLACK = 1e-6
"""Below this a row has not given way, in its own unit; it is the solver's tolerance."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Limits that can't hold together, in the words of those who stated them.

    When `is_minimal`, all others can hold as soon as any one of them gives way.
    """

    limits: tuple[str, ...]
    is_minimal: bool


@dataclass(frozen=True, slots=True)
class Slack:
    """A row that gives way by `amount`, in its own unit: below 0 its lower side, else its upper."""

    row: str
    amount: float
    penalty_usd: float


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The cheapest set of rows to give way, and what a plan costs when they do."""

    slacks: tuple[Slack, ...]
    penalty_usd: float
    cost_usd: float


def conflict_of(problem: Joined) -> Conflict:
    """A minimal conflicting set of an infeasible problem (deletion filter: Chinneck and Dravnieks,
    ORSA Journal on Computing 3, 1991).

    Rows and columns (for their bounds) may be in it. HiGHS is asked for a first set, which may
    be too large. If only whole numbers make the problem infeasible, bounds are taken as given
    and the set is of rows. Raises NO_PLAN when the problem is feasible.
    """
    filter_ = _Filter(problem)
    everything = np.arange(filter_.size)
    if filter_.is_infeasible():
        kept = filter_.first_guess()
        filter_.hold(np.setdiff1d(everything, kept), False)
        if not filter_.is_infeasible():
            filter_.hold(everything, True)
            kept = everything
    else:
        filter_.want_whole_numbers()
        if not filter_.is_infeasible():
            raise PlanError(Reason.NO_PLAN, "the problem has a solution, so nothing conflicts")
        kept = everything[: len(problem.rows)]
    needed, is_minimal = filter_.needed_of(kept)
    return Conflict(tuple(filter_.worded(k) for k in needed), is_minimal)


class _Filter:
    """A problem whose limits can be lifted and held again: first its rows, then its columns."""

    def __init__(self, problem: Joined) -> None:
        self.problem = problem
        self.size = len(problem.rows) + len(problem.columns)
        self._low = np.append(problem.row_low, problem.low)
        self._high = np.append(problem.row_high, problem.high)
        self._engine = engine_of(replace(problem, cost=np.zeros(len(problem.columns))))
        self._engine.setOptionValue("mip_max_nodes", NODES)

    def want_whole_numbers(self) -> None:
        make_whole(self._engine, np.flatnonzero(self.problem.integer))

    def is_infeasible(self) -> bool:
        """Whether that is proven; a solver that stopped before says no."""
        self._engine.run()
        status = self._engine.getModelStatus()
        if status == highspy.HighsModelStatus.kUnknown:
            self._engine.clearSolver()
            self._engine.run()
            status = self._engine.getModelStatus()
        # without costs nothing is unbounded
        return status in (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        )

    def hold(self, members: Iterable[int], held: bool) -> None:
        """Put limits in force, or lift them."""
        rows = len(self.problem.rows)
        for k in members:
            low, high = (self._low[k], self._high[k]) if held else (-np.inf, np.inf)
            if k < rows:
                self._engine.changeRowBounds(int(k), low, high)
            else:
                self._engine.changeColBounds(int(k) - rows, low, high)

    def first_guess(self) -> Indices:
        """What HiGHS holds for a conflict; here it was sound, but larger than need be."""
        strategy = highspy.IisStrategy
        wanted = int(strategy.kIisStrategyFromLp) | int(strategy.kIisStrategyIrreducible)
        self._engine.setOptionValue("iis_strategy", wanted)
        _, found = self._engine.getIis()
        columns = np.array(found.col_index_, dtype=np.int64) + len(self.problem.rows)
        return np.sort(np.append(np.array(found.row_index_, dtype=np.int64), columns))

    def needed_of(self, members: Indices) -> tuple[list[int], bool]:
        """Which of the limits in force are needed for the conflict, and whether that is proven.

        Runs of limits are lifted together: as long as the conflict stays, twice as many the
        next time, and half as many when it went away.
        """
        needed: list[int] = []
        left, chunk, sure = members.tolist(), max(len(members) // 8, 1), True
        while left:
            tried, left = left[:chunk], left[chunk:]
            self.hold(tried, False)
            if self.is_infeasible():
                chunk *= 2
                continue
            is_feasible = self._engine.getModelStatus() == highspy.HighsModelStatus.kOptimal
            self.hold(tried, True)
            if len(tried) == 1:
                needed += tried
                sure = sure and is_feasible
                continue
            left = tried + left
            chunk = len(tried) // 2
        return needed, sure

    def worded(self, member: int) -> str:
        """A limit as a person would say it."""
        rows = len(self.problem.rows)
        name = self.problem.rows[member] if member < rows else self.problem.columns[member - rows]
        low, high = self._low[member], self._high[member]
        if low == high:
            return f"{name} is {low:g}"
        if not np.isfinite(low):
            return f"{name} is at most {high:g}"
        if not np.isfinite(high):
            return f"{name} is at least {low:g}"
        return f"{name} is between {low:g} and {high:g}"


def relax_rows(problem: Joined, usd_per_unit: Vector | None = None) -> Relaxation:
    """The rows that give way at the least penalty so that the rest can hold (elastic filter).

    `usd_per_unit` is the penalty per unit of each row, infinite where a row is hard; without it
    one dollar for every row. Bounds of columns stay, and whole numbers stay whole. Raises
    PLAN_INFEASIBLE when that is not enough.
    """
    rows, width = len(problem.rows), len(problem.columns)
    penalty = np.ones(rows) if usd_per_unit is None else usd_per_unit
    soft = np.flatnonzero(np.isfinite(penalty))
    up = soft[np.isfinite(problem.row_low[soft])]
    down = soft[np.isfinite(problem.row_high[soft])]
    give = np.append(up, down)
    columns = width + np.arange(give.size)
    elastic = replace(
        problem,
        low=np.append(problem.low, np.zeros(give.size)),
        high=np.append(problem.high, np.full(give.size, np.inf)),
        # counted as the engine counts, so that a penalty of a dollar weighs one
        cost=np.append(np.zeros(width), penalty[give]) * UNIT_USD,
        integer=np.append(problem.integer, np.zeros(give.size, dtype=np.bool_)),
        row_index=np.append(problem.row_index, give),
        column_index=np.append(problem.column_index, columns),
        coefficient=np.append(
            problem.coefficient, np.append(np.ones(up.size), -np.ones(down.size))
        ),
        columns=problem.columns + tuple(f"slack of {problem.rows[r]}" for r in give),
    )
    engine = engine_of(elastic)
    make_whole(engine, np.flatnonzero(problem.integer))
    optimum_usd(engine)
    given = np.array(engine.getSolution().col_value)[width:]
    low, high = problem.row_low.copy(), problem.row_high.copy()
    # a hair more than was found, so that the tolerance of the solver does not undo it
    low[up] -= np.where(given[: up.size] > SLACK, given[: up.size] + SLACK, 0.0)
    high[down] += np.where(given[up.size :] > SLACK, given[up.size :] + SLACK, 0.0)
    engine = engine_of(replace(problem, row_low=low, row_high=high))
    make_whole(engine, np.flatnonzero(problem.integer))
    cost_usd = optimum_usd(engine)
    signs = np.append(-np.ones(up.size), np.ones(down.size))
    used = np.flatnonzero(given > SLACK)
    slacks = tuple(
        Slack(problem.rows[give[k]], float(signs[k] * given[k]), float(penalty[give[k]] * given[k]))
        for k in used[np.argsort(-penalty[give[used]] * given[used], kind="stable")]
    )
    return Relaxation(slacks, sum(s.penalty_usd for s in slacks), cost_usd)
