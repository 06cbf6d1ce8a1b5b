"""States a problem in Pyomo, for whoever wants to change a row or to ask another solver.

Plans do not pass through here: to make and to remove the objects of Pyomo took as long as a
third of the solver's time, for numbers that come as arrays and go to HiGHS as arrays. A test
holds the two statements to one answer.
"""

from __future__ import annotations

import numpy as np
import pyomo.environ as pyo
from pyomo.core.expr.numeric_expr import LinearExpression

from federation.plan.joining import Joined


def pyomo_model(problem: Joined) -> pyo.ConcreteModel:
    """min cost'x in US dollars subject to `rows`, with `x` as the columns of the problem."""
    model = pyo.ConcreteModel()
    model.x = pyo.Var(range(len(problem.low)))
    columns = list(model.x.values())
    for column, low, high, whole in zip(
        columns, problem.low.tolist(), problem.high.tolist(), problem.integer, strict=True
    ):
        column.setlb(low)
        column.setub(high)
        column.domain = pyo.Integers if whole else pyo.Reals
    order = np.argsort(problem.row_index, kind="stable")
    starts = np.searchsorted(problem.row_index[order], np.arange(1, len(problem.row_low)))
    model.rows = pyo.ConstraintList()
    for row, entries in enumerate(np.split(order, starts)):
        if entries.size:
            body = LinearExpression(
                linear_coefs=problem.coefficient[entries].tolist(),
                linear_vars=[columns[j] for j in problem.column_index[entries]],
            )
            model.rows.add((problem.row_low[row], body, problem.row_high[row]))
    model.cost = pyo.Objective(
        expr=LinearExpression(linear_coefs=problem.cost.tolist(), linear_vars=columns)
    )
    return model
