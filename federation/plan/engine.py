"""Hands a joined problem to HiGHS, as arrays."""

from __future__ import annotations

import highspy
import numpy as np

from federation.errors import PlanError, Reason
from federation.plan.joining import Indices, Joined
from federation.twin import Vector

UNIT_USD = 1e6
"""The solver counts in millions of dollars; its tolerances are made for such numbers."""


def stated(problem: Joined) -> highspy.HighsLp:
    """The problem as HiGHS takes it, column by column, without whole numbers yet."""
    rows, width = len(problem.row_low), len(problem.low)
    given = highspy.HighsLp()
    given.num_col_, given.num_row_ = width, rows
    given.col_lower_, given.col_upper_ = problem.low, problem.high
    given.col_cost_ = problem.cost / UNIT_USD
    given.row_lower_, given.row_upper_ = problem.row_low, problem.row_high
    start, index, value = by_column(problem)
    given.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    given.a_matrix_.start_ = start
    given.a_matrix_.index_ = index
    given.a_matrix_.value_ = value
    return given


def by_column(problem: Joined) -> tuple[Indices, Indices, Vector]:
    """Where each column starts, the rows and the coefficients, those of one place added up."""
    rows, width = len(problem.row_low), len(problem.low)
    place, entry = np.unique(problem.column_index * rows + problem.row_index, return_inverse=True)
    return (
        np.searchsorted(place, np.arange(width + 1) * rows),
        place % max(rows, 1),
        np.asarray(np.bincount(entry, problem.coefficient, len(place)), np.float64),
    )


def engine_of(problem: Joined) -> highspy.Highs:
    """A new engine with the problem, on one thread and without whole numbers yet.

    A new one for each plan: what an engine remembers chooses among equal plans.
    """
    engine = highspy.Highs()  # type: ignore[no-untyped-call]
    engine.setOptionValue("output_flag", False)
    engine.setOptionValue("threads", 1)
    engine.setOptionValue("random_seed", 0)
    engine.passModel(stated(problem))
    return engine


def make_whole(engine: highspy.Highs, columns: Indices, whole: bool = True) -> None:
    """Ask for whole numbers in these columns, or no longer."""
    kinds = highspy.HighsVarType
    kind = kinds.kInteger if whole else kinds.kContinuous
    if columns.size:
        places = columns.astype(np.int32)
        engine.changeColsIntegrality(places.size, places, np.full(places.size, kind))


def optimum_usd(engine: highspy.Highs) -> float:
    """Solve to the end; raises NO_PLAN or PLAN_INFEASIBLE."""
    engine.run()
    done = (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit)
    if engine.getModelStatus() not in done:
        # the last solution may have been a bad start
        engine.clearSolver()
        engine.run()
    if engine.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise no_plan(engine)
    return cost_usd(engine)


def cost_usd(engine: highspy.Highs) -> float:
    return float(engine.getInfo().objective_function_value) * UNIT_USD


def no_plan(engine: highspy.Highs) -> PlanError:
    """What to raise when the engine stopped with nothing."""
    status = engine.getModelStatus()
    stuck = (
        highspy.HighsModelStatus.kInfeasible,
        highspy.HighsModelStatus.kUnboundedOrInfeasible,
    )
    reason = Reason.PLAN_INFEASIBLE if status in stuck else Reason.NO_PLAN
    return PlanError(reason, f"the solver stopped with {status.name} and no plan")
