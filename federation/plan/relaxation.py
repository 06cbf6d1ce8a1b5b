r"""Finds what no plan can beat and which repairs deserve a place in the exact model.

Without whole numbers the model is solved in milliseconds, but it cheats: a hundredth of a
main carries all that the houses behind it need. What it gains by that is taken away step by
step (dynamic slope scaling: Kim and Pardalos, Operations Research Letters 24, 1999): with
pi the worth of a crew in each slot of time, w the crews of a visit and y how much of the task
was done, the visit is charged

    pi w (1/y - 1)

in addition, so that the part that was done costs as much as the whole would. Repairs that
are still begun after that are promising; the square root gives persistence its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from federation.errors import PlanError, Reason
from federation.plan.joining import Indices, Joined
from federation.plan.visits import Task, Visit
from federation.twin import Vector

ROUNDS = 4
"""Solutions that the promise of a repair is the mean of; eight found no better plans."""

UNIT_USD = 1e6
"""The solver counts in millions of dollars; its tolerances are made for such numbers."""

LEAST_PART = 1e-3
"""Parts below this are charged as if they were this, for the sake of the numbers."""


@dataclass(frozen=True)
class Relaxed:
    """Costs in US dollars: of doing nothing more, and what no plan can go below.

    `promise[task]` is between 0 (nothing) and 1 (always done as a whole).
    """

    idle_cost_usd: float
    bound_usd: float
    promise: Vector


def relax(
    joined: Joined,
    tasks: Sequence[Task],
    visits: Sequence[Visit],
    share: Vector,
    engaged: Vector,
    crews: float,
) -> Relaxed:
    """Solve without whole visits, on a new engine: the answer depends on nothing else."""
    size, count, periods = len(joined.low), len(visits), share.shape[1]
    of_task = np.array([v.task for v in visits], dtype=np.int64)
    sent = np.array([v.sent for v in visits], dtype=bool)
    available = np.array([joined.available[t.member, t.component] for t in tasks], dtype=np.int64)
    available = available.reshape(len(tasks), periods)
    column = np.arange(size, size + count, dtype=np.int64)
    rows: list[Indices] = [joined.row_index]
    columns: list[Indices] = [joined.column_index]
    values: list[Vector] = [joined.coefficient]
    first = len(joined.row_low)

    def add(row: Indices, which: Indices, value: Vector) -> None:
        kept = np.flatnonzero(value)
        rows.append(row.ravel()[kept])
        columns.append(which.ravel()[kept])
        values.append(value.ravel()[kept])

    # available as long as a visit leaves it; one visit at most; no more crews than there are
    cells = np.arange(len(tasks) * periods, dtype=np.int64).reshape(len(tasks), periods)
    add(first + cells, available, np.ones(cells.size))
    add(first + cells[of_task], np.repeat(column, periods), -share.ravel())
    first += cells.size
    add(first + of_task, column, np.ones(count))
    first += len(tasks)
    slots = np.arange(engaged.shape[1], dtype=np.int64)
    where = np.broadcast_to(first + slots, engaged.shape)
    add(where, np.repeat(column, slots.size), engaged.ravel())
    under_way = np.array([1.0 if t.crews else -np.inf for t in tasks])
    limit = np.concatenate([np.zeros(cells.size), np.ones(len(tasks)), np.full(slots.size, crews)])
    floor = np.full(limit.size, -np.inf)
    floor[cells.size : cells.size + len(tasks)] = under_way

    engine = _engine(
        np.concatenate([joined.low, np.zeros(count)]),
        np.concatenate([joined.high, np.ones(count)]),
        np.concatenate([joined.cost / UNIT_USD, np.zeros(count)]),
        np.concatenate([joined.row_low, floor]),
        np.concatenate([joined.row_high, limit]),
        np.concatenate(rows),
        np.concatenate(columns),
        np.concatenate(values),
    )
    places = column.astype(np.int32)
    engine.changeColsBounds(count, places, np.zeros(count), np.where(sent, 0.0, 1.0))
    idle_usd = _idle(engine, joined)
    engine.changeColsBounds(count, places, np.zeros(count), np.ones(count))
    bound_usd = _solve(engine)
    promise, charge = np.zeros(len(tasks)), np.zeros(count)
    for left in reversed(range(ROUNDS)):
        solution = engine.getSolution()
        chosen = np.maximum(np.array(solution.col_value)[size:], 0.0)
        worth = np.maximum(-np.array(solution.row_dual)[-slots.size :], 0.0)
        part = np.bincount(of_task, np.where(sent, chosen, 0.0), len(tasks))
        promise += np.sqrt(np.minimum(part, 1.0)) / ROUNDS
        if not left:
            break
        begun = sent & (part[of_task] > 1e-6)
        scale = 1.0 / np.maximum(part[of_task], LEAST_PART) - 1.0
        charge = np.where(begun, engaged @ worth * np.maximum(scale, 0.0), charge)
        engine.changeColsCost(count, places, charge)
        _solve(engine)
    return Relaxed(idle_usd, bound_usd, promise)


def _engine(
    low: Vector,
    high: Vector,
    cost: Vector,
    row_low: Vector,
    row_high: Vector,
    row: Indices,
    column: Indices,
    value: Vector,
) -> highspy.Highs:
    problem = highspy.HighsLp()
    problem.num_col_, problem.num_row_ = len(low), len(row_low)
    problem.col_lower_, problem.col_upper_, problem.col_cost_ = low, high, cost
    problem.row_lower_, problem.row_upper_ = row_low, row_high
    # column by column, with what stands twice in one place added up
    place, entry = np.unique(column * len(row_low) + row, return_inverse=True)
    start = np.searchsorted(place, np.arange(len(low) + 1) * len(row_low))
    problem.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    problem.a_matrix_.start_ = start
    problem.a_matrix_.index_ = place % max(len(row_low), 1)
    problem.a_matrix_.value_ = np.asarray(np.bincount(entry, value, len(place)), np.float64)
    engine = highspy.Highs()  # type: ignore[no-untyped-call]
    engine.setOptionValue("output_flag", False)
    engine.setOptionValue("threads", 1)
    engine.passModel(problem)
    return engine


def _idle(engine: highspy.Highs, joined: Joined) -> float:
    """The cost when no crew sets out, with whole numbers where a block asks for them."""
    whole = np.flatnonzero(joined.integer).astype(np.int32)
    if not whole.size:
        return _solve(engine)
    kinds = highspy.HighsVarType
    engine.changeColsIntegrality(whole.size, whole, np.full(whole.size, kinds.kInteger))
    cost_usd = _solve(engine)
    engine.changeColsIntegrality(whole.size, whole, np.full(whole.size, kinds.kContinuous))
    return cost_usd


def _solve(engine: highspy.Highs) -> float:
    engine.run()
    status = engine.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        # the last solution may have been a bad start
        engine.clearSolver()
        engine.run()
        status = engine.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        stuck = (
            highspy.HighsModelStatus.kInfeasible,
            highspy.HighsModelStatus.kUnboundedOrInfeasible,
        )
        reason = Reason.PLAN_INFEASIBLE if status in stuck else Reason.NO_PLAN
        raise PlanError(reason, f"the relaxed plan stopped with {status.name} and no plan")
    return float(engine.getInfo().objective_function_value) * UNIT_USD
