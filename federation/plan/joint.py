r"""Chooses the visits of repair crews that cost the region least, as one exact model.

The blocks of the members are joined (see `Joined`). Over the visits v that are possible,
with y = 1 when it is chosen, sigma[v, p] the share of period p that is left when its work is
done, and w[v, q] the crews that it engages on the mean of slot q, for every component c with
work left, period p and slot q:

    a[c, p] <= sum over v of c of sigma[v, p] y[v]      sum over v of c of y[v] <= 1
    sum over v of w[v, q] y[v] <= crews                 y whole

A component is thus available for exactly the part of a period that follows its repair,
however long the periods. Crews that are at a component stay: one of its visits is chosen, the
one that lets them go on alone or one where others join them. Only the visits that a
relaxation used (see `relax`) are given to the solver; the bound holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
from numpy.typing import NDArray

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason
from federation.plan.engine import UNIT_USD, cost_usd, engine_of, make_whole, no_plan, optimum_usd
from federation.plan.joining import Indices, Joined, join
from federation.plan.relaxation import Relaxed, relax
from federation.plan.visits import Task, Visit, crews_engaged, possible_visits, share_available
from federation.twin import HOUR_NS, LinearBlock, Vector

GAP = 0.05
"""The solver stops when no plan with the visits that it was given can save more than this share
of what could be saved at all. `Schedule.gap` is wider: its bound allows for all visits, and for
repairs in parts."""

OPTIONS = {
    "mip_rel_gap": 0.0,
    "mip_max_nodes": 1,
    "mip_allow_restart": False,
    "mip_allow_cut_separation_at_nodes": False,
    "mip_heuristic_run_feasibility_jump": False,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_rins": False,
}
"""One node, whose plan comes from the search near the relaxation by reduced costs. Without that
search a third less was saved; what is switched off took time and found nothing better."""


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


@dataclass(frozen=True)
class Posed:
    """A problem that an engine holds, and what its relaxation said of it.

    The last columns of the problem are the visits; `kept` are those that a plan may choose.
    """

    problem: Joined
    visits: tuple[Visit, ...]
    engine: highspy.Highs
    relaxed: Relaxed
    kept: NDArray[np.bool_]

    def choose(self, kept: NDArray[np.bool_]) -> Indices:
        """Solve with whole visits, of which only these are possible; which are chosen."""
        gap_usd = GAP * (self.relaxed.idle_cost_usd - self.relaxed.bound_usd)
        return _choose(self.engine, self.problem, kept, gap_usd)


@dataclass(frozen=True)
class JointModel:
    """The joint model of a run: the members' rows stay, the visits come and go."""

    joined: Joined
    lengths_h: Vector
    starts_h: tuple[float, ...]
    crews: float

    def solve(self, tasks: Sequence[Task]) -> Schedule:
        """Plan for these tasks from now on; raises NO_PLAN or PLAN_INFEASIBLE."""
        return self.settle(self.pose(tasks))[0]

    def settle(self, posed: Posed) -> tuple[Schedule, Vector]:
        """The plan of a posed problem, and the values of all its columns."""
        engine, relaxed = posed.engine, posed.relaxed
        chosen = posed.choose(posed.kept)
        plan_usd, bound_usd = cost_usd(engine), relaxed.bound_usd
        if posed.kept.all() and posed.problem.integer.any():
            bound_usd = max(bound_usd, float(engine.getInfo().mip_dual_bound) * UNIT_USD)
        optimal = engine.getModelStatus() == highspy.HighsModelStatus.kOptimal
        schedule = Schedule(
            "convergenceCriteriaSatisfied" if optimal else "iterationLimit",
            "optimal" if optimal else "feasible",
            relaxed.idle_cost_usd,
            plan_usd,
            min(bound_usd, plan_usd),
            tuple(
                sorted(
                    (posed.visits[k] for k in chosen.tolist()),
                    key=lambda v: (v.start_h, v.end_h, v.task),
                )
            ),
        )
        return schedule, np.array(engine.getSolution().col_value)

    def pose(self, tasks: Sequence[Task], even_late: bool = False) -> Posed:
        """The problem of these tasks with its relaxation solved; raises as `solve` does."""
        self.check(tasks)
        problem, visits, engaged = self.stated(tasks, even_late)
        engine = engine_of(problem)
        relaxed = relax(engine, self.joined, visits, engaged)
        kept = relaxed.used | np.array([not v.sent for v in visits], dtype=bool)
        return Posed(problem, tuple(visits), engine, relaxed, kept)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises NO_PLAN for a component that no block knows."""
        for task in tasks:
            if (task.member, task.component) not in self.joined.available:
                raise PlanError(
                    Reason.NO_PLAN,
                    f"no block of {task.member} knows the component {task.component!r}",
                    {"member": task.member, "component": task.component},
                )

    def stated(
        self, tasks: Sequence[Task], even_late: bool = False
    ) -> tuple[Joined, list[Visit], Vector]:
        """The whole problem, the visits that its last columns are, and whom they engage;
        `even_late` as in `possible_visits`."""
        horizon_h = float(self.lengths_h.sum())
        visits = possible_visits(tasks, self.crews, self.starts_h, horizon_h, even_late)
        share = share_available(visits, self.lengths_h)
        engaged = crews_engaged(visits, tasks, self.starts_h, horizon_h)
        return with_visits(self.joined, tasks, visits, share, engaged, self.crews), visits, engaged

    def idle_cost_usd(self, tasks: Sequence[Task]) -> float:
        """What it costs over the horizon when the crews at these tasks end them and rest."""
        high = self.joined.high.copy()
        close_h = np.cumsum(self.lengths_h)
        for task in tasks:
            end_h = task.work_h / task.crews if task.crews else np.inf
            share = np.clip((close_h - end_h) / self.lengths_h, 0.0, 1.0)
            columns = self.joined.available[task.member, task.component]
            high[columns] = np.minimum(high[columns], share)
        engine = engine_of(replace(self.joined, high=high))
        make_whole(engine, np.flatnonzero(self.joined.integer))
        return optimum_usd(engine)


def with_visits(
    joined: Joined,
    tasks: Sequence[Task],
    visits: Sequence[Visit],
    share: Vector,
    engaged: Vector,
    crews: float,
) -> Joined:
    """The problem with a column per visit and the rows that the visits are subject to.

    Rows follow those of `joined`: per task and period what is available, per task that one
    visit is enough, per slot that no more crews are engaged than there are.
    """
    count, periods, slots = len(visits), share.shape[1], engaged.shape[1]
    of_task = np.array([v.task for v in visits], dtype=np.int64)
    column = len(joined.low) + np.arange(count, dtype=np.int64)
    available = [joined.available[t.member, t.component] for t in tasks]
    cell = len(joined.row_low) + np.arange(len(tasks) * periods).reshape(-1, periods)
    once = len(joined.row_low) + cell.size + np.arange(len(tasks))
    slot = len(joined.row_low) + cell.size + once.size + np.arange(slots)
    terms: list[tuple[Indices, Indices, Vector]] = [
        (joined.row_index, joined.column_index, joined.coefficient),
        (cell.ravel(), np.array(available, dtype=np.int64).ravel(), np.ones(cell.size)),
        (cell[of_task].ravel(), np.repeat(column, periods), -share.ravel()),
        (once[of_task], column, np.ones(count)),
        (np.tile(slot, count), np.repeat(column, slots), engaged.ravel()),
    ]
    row, place, value = (np.concatenate(part) for part in zip(*terms, strict=True))
    under_way = np.array([task.crews > 0 for task in tasks], dtype=bool)
    return replace(
        joined,
        low=np.append(joined.low, np.zeros(count)),
        high=np.append(joined.high, np.ones(count)),
        cost=np.append(joined.cost, np.zeros(count)),
        integer=np.append(joined.integer, np.ones(count, dtype=bool)),
        row_low=np.concatenate(
            [
                joined.row_low,
                np.full(cell.size, -np.inf),
                np.where(under_way, 1.0, -np.inf),
                np.full(slots, -np.inf),
            ]
        ),
        row_high=np.concatenate(
            [joined.row_high, np.zeros(cell.size), np.ones(len(tasks)), np.full(slots, crews)]
        ),
        row_index=row[value != 0.0],
        column_index=place[value != 0.0],
        coefficient=value[value != 0.0],
        columns=joined.columns + tuple(called(tasks[v.task], v) for v in visits),
        rows=joined.rows
        + tuple(
            f"crews: {t.member} {t.component} works only once it is mended, period {p}"
            for t in tasks
            for p in range(periods)
        )
        + tuple(f"crews: {t.member} {t.component} is visited once" for t in tasks)
        + tuple(f"crews: as many as there are, slot {q}" for q in range(slots)),
    )


def called(task: Task, visit: Visit) -> str:
    """A visit in words, the name of its column; no two of one task are called alike."""
    if not visit.sent:
        return f"crews: those at {task.member} {task.component} go on"
    return f"crews: {visit.crews:g} to {task.member} {task.component} at hour {visit.start_h:g}"


def _choose(
    engine: highspy.Highs, problem: Joined, kept: NDArray[np.bool_], gap_usd: float
) -> Indices:
    """Solve with whole visits, of which only those kept are possible; which are chosen."""
    first, count = len(problem.low) - kept.size, kept.size
    places = np.arange(first, first + count, dtype=np.int32)
    engine.changeColsCost(count, places, np.zeros(count))
    engine.changeColsBounds(count, places, np.zeros(count), kept.astype(np.float64))
    make_whole(engine, np.flatnonzero(problem.integer))
    engine.setOptionValue("mip_abs_gap", gap_usd / UNIT_USD)
    for name, value in OPTIONS.items():
        engine.setOptionValue(name, value)
    engine.clearSolver()
    engine.run()
    info = engine.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise no_plan(engine)
    return np.flatnonzero(np.array(engine.getSolution().col_value)[first:] > 0.5)


def joint_model(
    blocks: Mapping[str, LinearBlock],
    couplings: Sequence[Coupling],
    periods_ns: Sequence[int],
    starts_ns: Sequence[int],
    crews: float,
) -> JointModel:
    """The model of these blocks, joined along these couplings."""
    return JointModel(
        join(blocks, couplings),
        np.array(periods_ns, dtype=np.float64) / HOUR_NS,
        tuple(start / HOUR_NS for start in starts_ns),
        crews,
    )
