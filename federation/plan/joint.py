r"""Linear blocks of several members, and the couplings between their ports, as one model.

Each block m contributes its own min c_m'x_m with its rows and bounds. A coupling from a supply
port s of one block to a need port n of another adds, for every entity h and period p,

    n[h, p] <= sum over links (e -> h) of weight * s[e, p]

so that nothing is received that is not delivered. Repair crews join the blocks' `available`
ports: for every component c with work W_c left, crew-hours w and availability z,

    W_c z[c, p] <= sum_{q < p} w[c, q] + w[c, p] / 2
    sum_c w[c, p] <= crews * length_p            0 <= w[c, p] <= K_c length_p

A component is thus available in a period when its work is done by the middle of it; at most
K_c crews work on it at a time. The gap at which the solver may stop is a share of what crews
can save, not of the whole cost, most of which no crew can change: the cost of doing nothing is
found first and taken off the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyomo.environ as pyo
from numpy.typing import NDArray
from pyomo.contrib.solver.common.results import Results, SolutionStatus, TerminationCondition
from pyomo.contrib.solver.solvers.highs import Highs
from pyomo.core.expr.numeric_expr import LinearExpression

from federation.core.coupling import Coupling, conversion
from federation.errors import PlanError, Reason
from federation.twin import HOUR_NS, LinearBlock, Port, Vector


@dataclass(frozen=True, slots=True)
class Task:
    """One component to repair: crew-hours left, and how it stands at the decision.

    `crews` > 0 when crews are already at it or on their way, and stay until it is done; more
    may join them, up to `most_crews`.
    """

    member: str
    component: str
    work_h: float
    travel_h: float
    crews: float = 0.0
    most_crews: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """The answer: why the solver stopped (`termination`), and what it found.

    Costs are in US dollars over the horizon: of doing nothing, of the plan, and a bound that
    no plan can go below. `crew_hours[task, period]` is the work planned.
    """

    termination: str
    status: str
    idle_cost_usd: float
    cost_usd: float
    bound_usd: float
    crew_hours: Vector

    @property
    def saving_usd(self) -> float:
        return self.idle_cost_usd - self.cost_usd

    @property
    def gap(self) -> float:
        """What a better plan could save in addition, as a share of what could be saved."""
        possible = max(self.idle_cost_usd - self.bound_usd, 1e-9)
        return max(self.cost_usd - self.bound_usd, 0.0) / possible


class JointModel:
    """The joint model of a run, re-solved as tasks come and go.

    Its rows stay as they are. Data of a solve are the work per component, the bounds of
    availability and crew-hours, and which availabilities must be whole; data of a run are
    also all bounds and costs of the blocks, so that one model serves many runs (`load`).
    """

    def __init__(
        self,
        blocks: Mapping[str, LinearBlock],
        couplings: Sequence[Coupling],
        periods_ns: Sequence[int],
        crews: float,
        *,
        gap: float = 0.05,
        nodes: int = 1,
    ) -> None:
        self.key = (tuple(couplings), tuple(periods_ns), crews)
        self.lengths_h = np.array(periods_ns, dtype=float) / HOUR_NS
        self._blocks = dict(sorted(blocks.items()))
        self.model = pyo.ConcreteModel()
        self._columns: dict[str, list[pyo.Var]] = {}
        self.model.rows = pyo.ConstraintList()
        paid: list[pyo.Var] = []
        for member, block in self._blocks.items():
            self._add_block(member, block)
            paid.extend(self._columns[member])
        for coupling in couplings:
            self._join(coupling)
        self._components = self._repairable()
        self._add_crews(crews)
        model = self.model
        model.price = pyo.Param(range(len(paid)), mutable=True, initialize=0.0)
        model.idle_cost = pyo.Param(mutable=True, initialize=0.0)
        model.cost = pyo.Objective(
            expr=LinearExpression(
                constant=-model.idle_cost,
                linear_coefs=[model.price[i] for i in range(len(paid))],
                linear_vars=paid,
            )
        )
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
        updates.check_for_new_or_removed_params = False
        updates.check_for_new_objective = False
        updates.update_constraints = False
        updates.update_named_expressions = False
        updates.update_objective = False
        self.load(blocks)

    def fits(self, blocks: Mapping[str, LinearBlock]) -> bool:
        """Whether these blocks differ from the model's own in bounds and costs only."""
        if list(self._blocks) != sorted(blocks):
            return False
        return all(
            np.array_equal(mine.row_index, blocks[name].row_index)
            and np.array_equal(mine.column_index, blocks[name].column_index)
            and np.array_equal(mine.coefficient, blocks[name].coefficient)
            and np.array_equal(mine.integer, blocks[name].integer)
            and np.array_equal(np.isfinite(mine.row_low), np.isfinite(blocks[name].row_low))
            and np.array_equal(np.isfinite(mine.row_high), np.isfinite(blocks[name].row_high))
            for name, mine in self._blocks.items()
        )

    def load(self, blocks: Mapping[str, LinearBlock]) -> None:
        """Take the bounds and costs of another run's blocks, and forget what was solved.

        A solver that remembers its last solution may choose another of equal plans, so a
        run starts without any memory: its plans depend on nothing that was done before.
        """
        self._blocks = dict(sorted(blocks.items()))
        price = 0
        for member, block in self._blocks.items():
            for column, low, high in zip(
                self._columns[member], block.low.tolist(), block.high.tolist(), strict=True
            ):
                _bound(column, low, high)
            low_of = getattr(self.model, f"row_low_{member}")
            high_of = getattr(self.model, f"row_high_{member}")
            for row, low in enumerate(block.row_low.tolist()):
                if np.isfinite(low):
                    low_of[row].set_value(low)
            for row, high in enumerate(block.row_high.tolist()):
                if np.isfinite(high):
                    high_of[row].set_value(high)
            for cost in block.cost.tolist():
                self.model.price[price].set_value(cost)
                price += 1
        engine = self._solver._solver_model
        if engine is not None:
            engine.clearSolver()

    # -- building ----------------------------------------------------------------------

    def _add_block(self, member: str, block: LinearBlock) -> None:
        model, count = self.model, len(block.columns)
        variable = pyo.Var(range(count))
        setattr(model, f"x_{member}", variable)
        columns = [variable[i] for i in range(count)]
        for column, whole in zip(columns, block.integer.tolist(), strict=True):
            if whole:
                column.domain = pyo.Integers
        self._columns[member] = columns
        low: list[pyo.Param | None] = [None] * len(block.rows)
        high: list[pyo.Param | None] = [None] * len(block.rows)
        for side, kept, values in (("low", low, block.row_low), ("high", high, block.row_high)):
            finite = np.flatnonzero(np.isfinite(values)).tolist()
            param = pyo.Param(finite, mutable=True, initialize=0.0)
            setattr(model, f"row_{side}_{member}", param)
            for row in finite:
                kept[row] = param[row]
        order = np.argsort(block.row_index, kind="stable")
        index, column_index = block.row_index[order], block.column_index[order].tolist()
        coefficient = block.coefficient[order].tolist()
        starts = np.searchsorted(index, np.arange(len(block.rows) + 1)).tolist()
        for row in range(len(block.rows)):
            part = slice(starts[row], starts[row + 1])
            if not column_index[part]:
                continue
            body = _sum(coefficient[part], [columns[j] for j in column_index[part]])
            model.rows.add((low[row], body, high[row]))

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
                body = _sum([1.0, *(-w for _, w in feeding)], [received, *delivered])
                self.model.rows.add((None, body, offset))

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
                coefficients = [model.work[c], *([-1.0] * p), -0.5]
                columns = [available[p], *self._hours[c][:p], self._hours[c][p]]
                model.rows.add((None, _sum(coefficients, columns), 0.0))
        for p, length_h in enumerate(self.lengths_h.tolist()):
            shared = [self._hours[c][p] for c in range(count)]
            model.rows.add((None, _sum([1.0] * count, shared), crews * length_h))

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
        idle = self._solve(wanted, act=False)
        self.model.idle_cost.set_value(idle.incumbent_objective)
        results = self._solve(wanted, act=True)
        self.model.idle_cost.set_value(0.0)
        row_of = {key: c for c, key in enumerate(self._components)}
        asked = [h for t in tasks for h in self._hours[row_of[t.member, t.component]]]
        found = results.solution_loader.get_vars(asked) if asked else {}
        crew_hours: NDArray[np.float64] = np.array([found[hours] for hours in asked])
        return Schedule(
            results.termination_condition.name,
            results.solution_status.name,
            float(idle.incumbent_objective),
            float(idle.incumbent_objective + results.incumbent_objective),
            float(idle.incumbent_objective + results.objective_bound),
            crew_hours.reshape(len(tasks), self.lengths_h.size),
        )

    def _solve(self, wanted: Mapping[tuple[str, str], Task], *, act: bool) -> Results:
        """Solve with crews that act, or that do nothing but end what they are at."""
        for c, (key, available) in enumerate(self._components.items()):
            task = wanted.get(key)
            self.model.work[c].set_value(0.0 if task is None else task.work_h + task.travel_h)
            domain = pyo.Reals if task is None else pyo.Binary
            for p, length_h in enumerate(self.lengths_h.tolist()):
                if available[p].domain is not domain:
                    available[p].domain = domain
                hours, most_h, least_h = self._hours[c][p], 0.0, 0.0
                if task is not None and task.crews:
                    begun_h = float(self.lengths_h[:p].sum())
                    left_h = max(task.work_h - task.crews * begun_h, 0.0)
                    least_h = most_h = min(task.crews * length_h, left_h)
                if task is not None and act:
                    most_h = length_h * task.most_crews
                _bound(hours, least_h, most_h)
        results = self._solver.solve(self.model)
        termination = results.termination_condition
        if results.solution_status not in (SolutionStatus.optimal, SolutionStatus.feasible):
            reason = Reason.NO_PLAN
            if termination is TerminationCondition.provenInfeasible:
                reason = Reason.PLAN_INFEASIBLE
            raise PlanError(reason, f"the solver stopped with {termination.name} and no plan")
        return results


def _sum(coefficients: list[float], columns: list[pyo.Var]) -> LinearExpression:
    return LinearExpression(constant=0.0, linear_coefs=coefficients, linear_vars=columns)


def _bound(column: pyo.Var, low: float, high: float) -> None:
    """Set bounds that differ; the solver's interface takes every set as a change."""
    floor = low if np.isfinite(low) else None
    ceiling = high if np.isfinite(high) else None
    if column.lb != floor:
        column.setlb(floor)
    if column.ub != ceiling:
        column.setub(ceiling)


@lru_cache(maxsize=1)
def _models() -> list[JointModel]:
    """The model that was built last in this process, if any."""
    return []


def joint_model(
    blocks: Mapping[str, LinearBlock],
    couplings: Sequence[Coupling],
    periods_ns: Sequence[int],
    crews: float,
) -> JointModel:
    """A model of these blocks; the last one of this process when only its data differ."""
    key = (tuple(couplings), tuple(periods_ns), crews)
    for model in _models():
        if model.key == key and model.fits(blocks):
            model.load(blocks)
            return model
    model = JointModel(blocks, couplings, periods_ns, crews)
    _models()[:] = [model]
    return model
