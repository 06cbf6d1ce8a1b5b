r"""Linear blocks of several members, and the couplings between their ports, as one model.

Each block m contributes its own min c_m'x_m with its rows and bounds. A coupling from a supply
port s of one block to a need port n of another adds, for every entity h and period p,

    n[h, p] <= sum over links (e -> h) of weight * s[e, p]

so that nothing is received that is not delivered. Repair crews join the blocks' `available`
ports: for every component c with work W_c left, crew-hours w and availability z,

    W_c z[c, p] <= sum_{q < p} w[c, q] + w[c, p] / 2
    sum_c w[c, p] <= crews * length_p            0 <= w[c, p] <= length_p

A component is thus available in a period when its work is done by the middle of it, and one
crew at a time works on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyomo.environ as pyo
from numpy.typing import NDArray
from pyomo.contrib.solver.common.results import SolutionStatus, TerminationCondition
from pyomo.contrib.solver.solvers.highs import Highs
from pyomo.core.expr.numeric_expr import LinearExpression

from federation.core.coupling import Coupling, conversion
from federation.errors import PlanError, Reason
from federation.twin import HOUR_NS, LinearBlock, Port, Vector


@dataclass(frozen=True, slots=True)
class Task:
    """One component to repair: crew-hours left, and how it stands at the decision.

    `crews` > 0 when a crew is already at it or on its way.
    """

    member: str
    component: str
    work_h: float
    travel_h: float
    crews: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The answer: why the solver stopped (`termination`), and what it found.

    `crew_hours[task, period]` is the work planned; costs are in US dollars over the horizon.
    """

    termination: str
    status: str
    objective_usd: float
    bound_usd: float
    crew_hours: Vector

    @property
    def gap(self) -> float:
        """How far the plan may be from the best one, as a share of its cost."""
        scale = max(abs(self.objective_usd), 1e-9)
        return abs(self.objective_usd - self.bound_usd) / scale


class JointModel:
    """The joint model of a run; built once, re-solved as tasks come and go.

    Only the work per component, the bounds of availability and crew-hours, and which
    availabilities must be whole are data of a solve; the rows stay as they are.
    """

    def __init__(
        self,
        blocks: Mapping[str, LinearBlock],
        couplings: Sequence[Coupling],
        periods_ns: Sequence[int],
        crews: float,
        *,
        gap: float = 0.01,
        nodes: int = 200,
    ) -> None:
        self.lengths_h = np.array(periods_ns, dtype=float) / HOUR_NS
        self._blocks = dict(sorted(blocks.items()))
        self.model = pyo.ConcreteModel()
        self._columns: dict[str, list[pyo.Var]] = {}
        self.model.rows = pyo.ConstraintList()
        cost = []
        for member, block in self._blocks.items():
            cost.append(self._add_block(member, block))
        for coupling in couplings:
            self._join(coupling)
        self._components = self._repairable()
        self._add_crews(crews)
        self.model.cost = pyo.Objective(expr=sum(cost))
        self._solver = Highs()
        config = self._solver.config
        config.load_solutions = False
        config.raise_exception_on_nonoptimal_result = False
        config.rel_gap = gap
        config.threads = 1
        config.solver_options["mip_max_nodes"] = nodes
        config.solver_options["random_seed"] = 0
        updates = config.auto_updates
        updates.check_for_new_or_removed_constraints = False
        updates.check_for_new_objective = False
        updates.update_constraints = False
        updates.update_named_expressions = False

    # -- building ----------------------------------------------------------------------

    def _add_block(self, member: str, block: LinearBlock) -> LinearExpression:
        count = len(block.columns)
        variable = pyo.Var(range(count))
        setattr(self.model, f"x_{member}", variable)
        columns = [variable[i] for i in range(count)]
        for i, column in enumerate(columns):
            column.setlb(float(block.low[i]) if np.isfinite(block.low[i]) else None)
            column.setub(float(block.high[i]) if np.isfinite(block.high[i]) else None)
            if block.integer[i]:
                column.domain = pyo.Integers
        self._columns[member] = columns
        order = np.argsort(block.row_index, kind="stable")
        index, column_index = block.row_index[order], block.column_index[order]
        coefficient = block.coefficient[order]
        starts = np.searchsorted(index, np.arange(len(block.rows) + 1))
        for row in range(len(block.rows)):
            part = slice(int(starts[row]), int(starts[row + 1]))
            self._add_row(
                coefficient[part].tolist(),
                [columns[j] for j in column_index[part]],
                float(block.row_low[row]),
                float(block.row_high[row]),
            )
        paid = np.flatnonzero(block.cost)
        return LinearExpression(
            constant=0.0,
            linear_coefs=[float(block.cost[i]) for i in paid],
            linear_vars=[columns[i] for i in paid],
        )

    def _add_row(
        self, coefficients: list[float], columns: list[pyo.Var], low: float, high: float
    ) -> None:
        if not columns:
            return
        body = LinearExpression(constant=0.0, linear_coefs=coefficients, linear_vars=columns)
        bounds = (low if np.isfinite(low) else None, high if np.isfinite(high) else None)
        if bounds[0] is not None and bounds[0] == bounds[1]:
            self.model.rows.add(body == bounds[0])
        else:
            self.model.rows.add((bounds[0], body, bounds[1]))

    def _port(self, member: str, name: str, role: str) -> Port | None:
        block = self._blocks.get(member)
        if block is None:
            return None
        return next((p for p in block.ports if p.name == name and p.role == role), None)

    def _join(self, coupling: Coupling) -> None:
        supply = self._port(coupling.source, coupling.output, "supply")
        need = self._port(coupling.target, coupling.input, "need")
        if supply is None or need is None:
            return
        factor, offset = conversion(supply.unit, need.unit)
        links = coupling.links or tuple((e, e, 1.0) for e in need.entities)
        sources: dict[str, list[tuple[str, float]]] = {}
        for source, target, weight in links:
            sources.setdefault(target, []).append((source, weight * factor))
        row_of = {e: i for i, e in enumerate(supply.entities)}
        for h, entity in enumerate(need.entities):
            feeding = [(row_of[s], w) for s, w in sources.get(entity, ()) if s in row_of]
            if not feeding:
                continue
            for p in range(self.lengths_h.size):
                received = self._columns[coupling.target][need.columns[h, p]]
                delivered = [
                    self._columns[coupling.source][supply.columns[row, p]] for row, _ in feeding
                ]
                self._add_row(
                    [1.0, *(-w for _, w in feeding)],
                    [received, *delivered],
                    -np.inf,
                    offset,
                )

    def _repairable(self) -> dict[tuple[str, str], list[pyo.Var]]:
        found = {}
        for member, block in self._blocks.items():
            for port in block.ports:
                if port.role == "available":
                    for row, entity in enumerate(port.entities):
                        columns = [self._columns[member][j] for j in port.columns[row]]
                        found[member, entity] = columns
        return found

    def _add_crews(self, crews: float) -> None:
        count, periods = len(self._components), self.lengths_h.size
        model = self.model
        model.work = pyo.Param(range(count), mutable=True, initialize=0.0)
        model.hours = pyo.Var(range(count), range(periods), bounds=(0.0, 0.0))
        self._hours = [[model.hours[c, p] for p in range(periods)] for c in range(count)]
        for c, available in enumerate(self._components.values()):
            for p in range(periods):
                done = [*self._hours[c][:p], self._hours[c][p]]
                body = LinearExpression(
                    constant=0.0,
                    linear_coefs=[model.work[c], *([-1.0] * p), -0.5],
                    linear_vars=[available[p], *done],
                )
                model.rows.add((None, body, 0.0))
        for p, length_h in enumerate(self.lengths_h):
            shared = [self._hours[c][p] for c in range(count)]
            self._add_row([1.0] * count, shared, -np.inf, crews * float(length_h))

    # -- solving -----------------------------------------------------------------------

    def solve(self, tasks: Sequence[Task]) -> Schedule:
        """Plan for these tasks from now on; raises NO_PLAN or PLAN_INFEASIBLE."""
        wanted = {(task.member, task.component): task for task in tasks}
        missing = [key for key in wanted if key not in self._components]
        if missing:
            raise PlanError(
                Reason.NO_PLAN,
                f"no block of {missing[0][0]} knows the component {missing[0][1]!r}",
                {"member": missing[0][0], "component": missing[0][1]},
            )
        for c, (key, available) in enumerate(self._components.items()):
            task = wanted.get(key)
            self.model.work[c].set_value(0.0 if task is None else task.work_h + task.travel_h)
            for p, length_h in enumerate(self.lengths_h):
                hours = self._hours[c][p]
                if task is None:
                    available[p].domain = pyo.Reals
                    hours.setlb(0.0)
                    hours.setub(0.0)
                    continue
                available[p].domain = pyo.Binary
                begun_h = float(self.lengths_h[:p].sum())
                left_h = max(task.work_h - begun_h, 0.0)
                hours.setlb(min(float(length_h), left_h) if task.crews else 0.0)
                hours.setub(float(length_h) * max(task.crews, 1.0))
        results = self._solver.solve(self.model)
        termination = results.termination_condition
        if results.solution_status not in (SolutionStatus.optimal, SolutionStatus.feasible):
            reason = Reason.NO_PLAN
            if termination is TerminationCondition.provenInfeasible:
                reason = Reason.PLAN_INFEASIBLE
            raise PlanError(reason, f"the solver stopped with {termination.name} and no plan")
        results.solution_loader.load_vars(
            [self._hours[c][p] for c in range(len(self._hours)) for p in range(len(self.lengths_h))]
        )
        row_of = {key: c for c, key in enumerate(self._components)}
        crew_hours: NDArray[np.float64] = np.array(
            [
                [pyo.value(hours) for hours in self._hours[row_of[task.member, task.component]]]
                for task in tasks
            ],
            dtype=np.float64,
        ).reshape(len(tasks), self.lengths_h.size)
        return Schedule(
            termination.name,
            results.solution_status.name,
            float(results.incumbent_objective),
            float(results.objective_bound),
            crew_hours,
        )
