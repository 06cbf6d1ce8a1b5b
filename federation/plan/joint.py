r"""Chooses the visits of repair crews that cost the region least, as one exact model.

The blocks of the members are joined (see `Joined`). Over the visits v that are possible,
with y = 1 when it is chosen, sigma[v, p] the share of period p that is left when its work is
done, and w[v, q] the crews that it engages on the mean of slot q, for every component c with
work left, period p and slot q:

    a[c, p] <= sum over v of c of sigma[v, p] y[v]      sum over v of c of y[v] <= 1
    sum over v of w[v, q] y[v] <= crews                 y whole

A component is thus available for exactly the part of a period that follows its repair,
however long the periods. Crews that are at a component stay: one of its visits is chosen, the
one that lets them go on alone or one where others join them. Only the most promising repairs
(see `relax`) are given to the solver; the bound holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyomo.environ as pyo
from pyomo.contrib.solver.common.results import Results, SolutionStatus, TerminationCondition
from pyomo.contrib.solver.solvers.highs import Highs
from pyomo.core.expr.numeric_expr import LinearExpression

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason
from federation.plan.joining import Joined, join
from federation.plan.relaxation import UNIT_USD, relax
from federation.plan.visits import Task, Visit, crews_engaged, possible_visits, share_available
from federation.twin import HOUR_NS, LinearBlock, Vector

MOST_REPAIRS = 48
"""Repairs that the solver chooses from, besides those under way. With 60 it took a fifth more
time, and what was lost in six coupled runs fell by less than a hundredth."""

GAP = 0.05
"""The solver stops when no plan with the repairs that it was given can save more than this share
of what could be saved at all. `Schedule.gap` is wider: its bound allows for all repairs, and for
repairs in parts; 3 to 50 % in the earthquake of Shelby County."""

LEAST_PROMISE = 1e-4


@dataclass(frozen=True)
class Schedule:
    """The answer: why the solver stopped (`termination`), and what it found (`status`).

    Costs are in US dollars over the horizon: of no crew setting out, of the plan, and a
    bound that no plan can go below. `visits` are those chosen, by start, end and task.
    """

    termination: str
    status: str
    idle_cost_usd: float
    cost_usd: float
    bound_usd: float
    visits: tuple[Visit, ...]

    @property
    def saving_usd(self) -> float:
        return self.idle_cost_usd - self.cost_usd

    @property
    def gap(self) -> float:
        """What a better plan could save in addition, as a share of what could be saved."""
        possible = max(self.idle_cost_usd - self.bound_usd, 1e-9)
        return max(self.cost_usd - self.bound_usd, 0.0) / possible


class JointModel:
    """The joint model of a run: the members' rows stay, the visits come and go.

    The bounds and costs of the members' blocks are data of a run, so that one model serves
    many runs (`load`). Every solve starts from nothing but its own data.
    """

    def __init__(
        self, joined: Joined, periods_ns: Sequence[int], starts_ns: Sequence[int], crews: float
    ) -> None:
        self.crews = crews
        self.lengths_h = np.array(periods_ns, dtype=float) / HOUR_NS
        self.starts_h = [start / HOUR_NS for start in starts_ns]
        self._joined = joined
        self.model = model = pyo.ConcreteModel()
        count = len(joined.low)
        model.x = pyo.Var(range(count))
        self._columns = [model.x[i] for i in range(count)]
        for index in np.flatnonzero(joined.integer).tolist():
            self._columns[index].domain = pyo.Integers
        model.row_low = pyo.Param(_finite(joined.row_low), mutable=True, initialize=0.0)
        model.row_high = pyo.Param(_finite(joined.row_high), mutable=True, initialize=0.0)
        model.price = pyo.Param(range(count), mutable=True, initialize=0.0)
        model.rows = pyo.ConstraintList()
        self._add_rows()
        prices = [model.price[i] for i in range(count)]
        model.cost = pyo.Objective(expr=_sum(prices, self._columns))
        self._solver = Highs()
        config = self._solver.config
        config.load_solutions = False
        config.raise_exception_on_nonoptimal_result = False
        config.rel_gap = 0.0
        config.threads = 1
        config.solver_options.update(
            mip_max_nodes=1,
            random_seed=0,
            mip_allow_restart=False,
            mip_heuristic_run_rens=False,
            mip_heuristic_run_rins=False,
        )
        for name in config.auto_updates:
            config.auto_updates[name] = False
        self._load(joined)
        self._solver.set_instance(model)

    def load(self, joined: Joined) -> None:
        """Take the bounds and costs of another run, of blocks that are alike."""
        self._load(joined)
        self._solver.update_parameters()
        self._solver.update_variables(self._columns)

    def _load(self, joined: Joined) -> None:
        self._joined, model = joined, self.model
        for column, low, high in zip(
            self._columns, joined.low.tolist(), joined.high.tolist(), strict=True
        ):
            column.setlb(low if np.isfinite(low) else None)
            column.setub(high if np.isfinite(high) else None)
        for param, values in (
            (model.row_low, joined.row_low),
            (model.row_high, joined.row_high),
            (model.price, joined.cost / UNIT_USD),
        ):
            for index in _finite(values):
                param[index].set_value(float(values[index]))

    def _add_rows(self) -> None:
        joined, model = self._joined, self.model
        order = np.argsort(joined.row_index, kind="stable")
        columns = joined.column_index[order].tolist()
        coefficients = joined.coefficient[order].tolist()
        count = len(joined.row_low)
        low, high = dict(model.row_low.items()), dict(model.row_high.items())
        starts = np.searchsorted(joined.row_index[order], np.arange(count + 1)).tolist()
        for row in range(count):
            part = slice(starts[row], starts[row + 1])
            if columns[part]:
                body = _sum(coefficients[part], [self._columns[j] for j in columns[part]])
                model.rows.add((low.get(row), body, high.get(row)))

    def solve(self, tasks: Sequence[Task]) -> Schedule:
        """Plan for these tasks from now on; raises NO_PLAN or PLAN_INFEASIBLE."""
        for task in tasks:
            if (task.member, task.component) not in self._joined.available:
                raise PlanError(
                    Reason.NO_PLAN,
                    f"no block of {task.member} knows the component {task.component!r}",
                    {"member": task.member, "component": task.component},
                )
        horizon_h = float(self.lengths_h.sum())
        visits = possible_visits(tasks, self.crews, self.starts_h, horizon_h)
        share = share_available(visits, self.lengths_h)
        engaged = crews_engaged(visits, tasks, self.starts_h, horizon_h)
        relaxed = relax(self._joined, tasks, visits, share, engaged, self.crews)
        ranked = np.argsort(-relaxed.promise, kind="stable")[:MOST_REPAIRS]
        promising = relaxed.promise > LEAST_PROMISE
        promising[np.setdiff1d(np.arange(len(tasks)), ranked)] = False
        under_way = np.array([task.crews > 0 for task in tasks], dtype=bool)
        kept = [
            k for k, visit in enumerate(visits) if promising[visit.task] or under_way[visit.task]
        ]
        self._solver.config.abs_gap = GAP * (relaxed.idle_cost_usd - relaxed.bound_usd) / UNIT_USD
        results, chosen = self._choose(tasks, [visits[k] for k in kept], share[kept], engaged[kept])
        cost_usd = float(results.incumbent_objective) * UNIT_USD
        bound_usd = relaxed.bound_usd
        if len(kept) == len(visits):
            bound_usd = max(bound_usd, float(results.objective_bound) * UNIT_USD)
        return Schedule(
            results.termination_condition.name,
            results.solution_status.name,
            relaxed.idle_cost_usd,
            cost_usd,
            min(bound_usd, cost_usd),
            tuple(sorted(chosen, key=lambda v: (v.start_h, v.end_h, v.task))),
        )

    def _choose(
        self, tasks: Sequence[Task], visits: Sequence[Visit], share: Vector, engaged: Vector
    ) -> tuple[Results, list[Visit]]:
        """Solve with these visits, whose columns and rows are then taken away again."""
        model, solver = self.model, self._solver
        model.chosen = pyo.Var(range(len(visits)), domain=pyo.Binary)
        model.crew_rows = pyo.ConstraintList()
        chosen = [model.chosen[k] for k in range(len(visits))]
        of_task: dict[int, list[int]] = {}
        for k, visit in enumerate(visits):
            of_task.setdefault(visit.task, []).append(k)
        closed = []
        for index, task in enumerate(tasks):
            own = of_task.get(index, [])
            for p, column in enumerate(self._joined.available[task.member, task.component]):
                available = self._columns[column]
                leaving = [k for k in own if share[k, p] > 0.0]
                if leaving:
                    parts = [1.0, *(-share[leaving, p]).tolist()]
                    body = _sum(parts, [available, *(chosen[k] for k in leaving)])
                    model.crew_rows.add((None, body, 0.0))
                else:
                    closed.append(available)
            if own:
                body = _sum([1.0] * len(own), [chosen[k] for k in own])
                model.crew_rows.add((1.0 if task.crews else None, body, 1.0))
        for crews in engaged.T:
            busy = np.flatnonzero(crews).tolist()
            if busy:
                body = _sum(crews[busy].tolist(), [chosen[k] for k in busy])
                model.crew_rows.add((None, body, self.crews))
        usual = [column.ub for column in closed]
        for column in closed:
            column.setub(0.0)
        rows = list(model.crew_rows.values())
        solver.update_variables(closed)
        solver.add_constraints(rows)
        solver._solver_model.clearSolver()
        results = solver.solve(model)
        try:
            termination = results.termination_condition
            if results.solution_status not in (SolutionStatus.optimal, SolutionStatus.feasible):
                reason = Reason.NO_PLAN
                if termination is TerminationCondition.provenInfeasible:
                    reason = Reason.PLAN_INFEASIBLE
                raise PlanError(reason, f"the solver stopped with {termination.name} and no plan")
            value = results.solution_loader.get_vars(chosen) if chosen else {}
            return results, [v for v, y in zip(visits, chosen, strict=True) if value[y] > 0.5]
        finally:
            for column, high in zip(closed, usual, strict=True):
                column.setub(high)
            solver.update_variables(closed)
            solver.remove_constraints(rows)
            model.del_component(model.chosen)
            model.del_component(model.crew_rows)


def _finite(values: Vector) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.isfinite(values))]


def _sum(coefficients: Sequence[float], columns: Sequence[pyo.Var]) -> LinearExpression:
    return LinearExpression(constant=0.0, linear_coefs=coefficients, linear_vars=columns)


@lru_cache(maxsize=1)
def _models() -> dict[tuple[object, ...], JointModel]:
    """The model that was built last in this process, if any."""
    return {}


def joint_model(
    blocks: Mapping[str, LinearBlock],
    couplings: Sequence[Coupling],
    periods_ns: Sequence[int],
    starts_ns: Sequence[int],
    crews: float,
) -> JointModel:
    """A model of these blocks; the last one of this process when only its data differ."""
    joined = join(blocks, couplings)
    key = (tuple(periods_ns), tuple(starts_ns))
    model = _models().get(key)
    if model is not None and model._joined.like(joined):
        model.crews = crews
        model.load(joined)
        return model
    _models().clear()
    _models()[key] = JointModel(joined, periods_ns, starts_ns, crews)
    return _models()[key]
