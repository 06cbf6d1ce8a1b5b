"""Says of a plan what a planner would ask next: what binds it, what a thing is worth, what else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from federation.errors import PlanError, Reason
from federation.plan.conflict import Conflict, Relaxation, conflict_of, relax_rows
from federation.plan.engine import UNIT_USD, cost_usd, engine_of, optimum_usd
from federation.plan.joining import Joined
from federation.plan.joint import JointModel, Posed, Schedule, called
from federation.plan.visits import Task, Visit
from federation.twin import Vector

TRIED = 8
"""How many actions are forbidden, one at a time, in search of the next best plans."""

STEP = 0.01
"""How far a limit is moved to see what that saves, as a share of its row's largest coefficient."""

LOOKED_AT = 5
"""Limits are looked at for bindings, per binding wanted."""

LEAST_USD = 1e-3
"""Prices below this, per unit, are the solver's tolerance."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A limit that the plan would pass if it could.

    `usd_per_unit` is what the region would save per unit that the limit gave way, in the unit of
    the row (or of the column, for the bound of one); see `Margins` for how small a change.
    """

    limit: str
    side: str
    at: float
    usd_per_unit: float


@dataclass(frozen=True, slots=True)
class Price:
    """What one unit more at a port would save the region, all through one period.

    For a need port: if that much were received from elsewhere. For a supply port: if the block
    delivered that much more. `usd_per_unit_h` is the same per hour of the period. A unit is that
    of the port; never below 0, since what is delivered need not be received.
    """

    member: str
    port: str
    entity: str
    unit: str
    period: int
    usd_per_unit: float
    usd_per_unit_h: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """The best plan found without one action of the plan, and what it does in its place.

    `more_usd` below 0 means that the search for the plan itself, which is limited, had missed it.
    """

    without: str
    cost_usd: float
    more_usd: float
    instead: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Extra:
    """Something that could be added to what the members have: the worth of which is asked.

    `amount` is added to both limits of these rows and to the upper bound of these columns, by
    their names in the joined problem. A generator of 2 MW at a node: its balance, -2. A bed at a
    hospital of 100: its balances of power and water, -0.01, which is what one bed weighs there.
    """

    name: str
    amount: float
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Worth:
    """What something more would save, in US dollars over the horizon; both by solving again.

    `plan_usd` compares two plans, each of which the solver ended within its gap, so that it may
    be off by that. `relaxed_usd` compares what no plan could go below: it lets crews do things in
    parts, and is exact.
    """

    of: str
    plan_usd: float
    relaxed_usd: float


@dataclass(frozen=True)
class Answer:
    """Why the solver stopped (`termination`), what it found (`status`), and what follows from it.

    `schedule` is None when there is no plan; then `conflict` says why not and `relaxation` what
    would have to give way. Bindings stand by what they cost, alternatives by their costs.
    """

    termination: str
    status: str
    schedule: Schedule | None
    actions: tuple[str, ...] = ()
    bindings: tuple[Binding, ...] = ()
    prices: tuple[Price, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    worth: tuple[Worth, ...] = ()
    conflict: Conflict | None = None
    relaxation: Relaxation | None = None


def answer(
    model: JointModel,
    tasks: Sequence[Task],
    extras: Sequence[Extra] = (),
    alternatives: int = 3,
    bindings: int = 20,
) -> Answer:
    """Plan for these tasks and explain the plan; `extras` are weighed besides one more crew.

    An infeasible problem is an answer, too. Raises NO_PLAN for a component or a limit that no
    block knows, and when the solver found nothing within its limits.
    """
    for extra in extras:
        _check(model.joined, extra)
    try:
        posed = model.pose(tasks)
        schedule, chosen = model.settle(posed)
    except PlanError as error:
        if error.reason is not Reason.PLAN_INFEASIBLE:
            raise
        problem, _, _ = model.stated(tasks)
        return Answer(
            "infeasible",
            "none",
            None,
            conflict=conflict_of(problem),
            relaxation=_relaxed(problem),
        )
    bound, prices = _priced(model, posed, chosen, bindings)
    return Answer(
        schedule.termination,
        schedule.status,
        schedule,
        tuple(called(tasks[v.task], v) for v in schedule.visits),
        bound,
        prices,
        _without(posed, tasks, schedule, chosen, alternatives),
        _worth(model, posed, tasks, schedule, extras),
    )


def _priced(
    model: JointModel, posed: Posed, x: Vector, most: int
) -> tuple[tuple[Binding, ...], tuple[Price, ...]]:
    margins = Margins(posed.problem, x)
    return margins.bindings(most), _prices(model.joined, margins, model.lengths_h)


class Margins:
    """What it would save that a limit gave way a little, with the whole numbers fixed as in `x`.

    A dual of the solver is one of many where limits coincide, and then promises more than giving
    way would bring. So duals only say where to look: what is told is measured, by solving again
    with the limit moved by a hundredth of the row's largest coefficient (or the column's range).
    """

    def __init__(self, problem: Joined, x: Vector) -> None:
        self.problem = problem
        fixed = np.round(x)
        self._low = np.where(problem.integer, fixed, problem.low)
        self._high = np.where(problem.integer, fixed, problem.high)
        self._engine = engine_of(replace(problem, low=self._low, high=self._high))
        self.cost_usd = optimum_usd(self._engine)
        solution = self._engine.getSolution()
        self.dual = np.array(solution.row_dual) * UNIT_USD
        """By how much the cost rises when a row's side rises by one unit, USD; one of many."""
        self._reduced = np.array(solution.col_dual) * UNIT_USD
        self._x = np.array(solution.col_value)
        self._size = np.zeros(len(problem.rows))
        np.maximum.at(self._size, problem.row_index, np.abs(problem.coefficient))

    def row_usd(self, row: int) -> float:
        """What a unit of the side of a row that its dual is of would save, 0 or more."""
        low, high = self.problem.row_low[row], self.problem.row_high[row]
        step = STEP * max(self._size[row], 1e-6)
        # of an equality both sides move: it does not get looser, but another
        way = -step if self.dual[row] > 0 else step
        moved = (
            (low + way, high + way) if low == high else (low + min(way, 0.0), high + max(way, 0.0))
        )
        self._engine.changeRowBounds(row, *moved)
        usd = self._saved_usd()
        self._engine.changeRowBounds(row, low, high)
        return float(usd / step)

    def column_usd(self, column: int) -> float:
        """What a unit more room for a column at its bound would save, 0 or more."""
        low, high = self._low[column], self._high[column]
        step = STEP * (high - low if np.isfinite(high - low) and high > low else 1.0)
        is_low = self._reduced[column] > 0
        moved = (low - step, high) if is_low else (low, high + step)
        self._engine.changeColBounds(column, *moved)
        usd = self._saved_usd()
        self._engine.changeColBounds(column, low, high)
        return float(usd / step)

    def _saved_usd(self) -> float:
        try:
            return max(self.cost_usd - optimum_usd(self._engine), 0.0)
        except PlanError:
            return 0.0  # an equality can't be moved that way

    def bindings(self, most: int) -> tuple[Binding, ...]:
        """The limits at which most could be saved by a change of the size of their coefficients.

        Bounds that whole numbers are fixed to are choices and no limits; that something at 0
        would cost more if it were below 0 is no news.
        """
        rows = np.flatnonzero(np.abs(self.dual) > LEAST_USD)
        at_low, at_high = self._x <= self._low, self._x >= self._high
        bound = (np.abs(self._reduced) > LEAST_USD) & (at_low ^ at_high) & ~self.problem.integer
        bound &= ~(at_low & (self._low == 0.0))
        candidates = [(abs(self.dual[r]) * self._size[r], 0, int(r)) for r in rows]
        candidates += [(abs(self._reduced[j]), 1, int(j)) for j in np.flatnonzero(bound)]
        candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
        found: list[tuple[float, Binding]] = []
        # no limit saves more than its dual says: look until nobody can do better any more
        for promised, kind, k in candidates[: LOOKED_AT * most]:
            if len(found) >= most and promised <= sorted(f[0] for f in found)[-most]:
                break
            usd = self.column_usd(k) if kind else self.row_usd(k)
            if usd > LEAST_USD:
                binding = self._column(k, usd) if kind else self._row(k, usd)
                found.append((usd if kind else usd * float(self._size[k]), binding))
        found.sort(key=lambda pair: (-pair[0], pair[1].limit))
        return tuple(binding for _, binding in found[:most])

    def _row(self, row: int, usd: float) -> Binding:
        is_low = bool(self.dual[row] > 0)
        at = self.problem.row_low[row] if is_low else self.problem.row_high[row]
        return Binding(self.problem.rows[row], "low" if is_low else "high", float(at), usd)

    def _column(self, column: int, usd: float) -> Binding:
        side = "low" if self._reduced[column] > 0 else "high"
        return Binding(self.problem.columns[column], side, float(self._x[column]), usd)


def _prices(joined: Joined, margins: Margins, lengths_h: Vector) -> tuple[Price, ...]:
    """Per need port what receiving is worth; per supply port the sum over those it feeds."""
    worth: dict[tuple[str, str, str, str], Vector] = {}
    for crossing in joined.crossings:
        # a row n - w s <= offset: its dual is below 0 when another unit would save something
        saved = np.array(
            [
                margins.row_usd(int(row)) if margins.dual[row] < -LEAST_USD else 0.0
                for row in crossing.rows
            ]
        )
        key = (crossing.target, crossing.port, crossing.entity, crossing.unit)
        worth[key] = np.maximum(worth.get(key, np.zeros(saved.size)), saved)
        for source, weight in zip(crossing.sources, crossing.weights, strict=True):
            worth[source] = worth.get(source, np.zeros(saved.size)) + weight * saved
    return tuple(
        Price(*key, period, float(saved[period]), float(saved[period] / lengths_h[period]))
        for key, saved in worth.items()
        for period in range(saved.size)
    )


def _without(
    posed: Posed, tasks: Sequence[Task], schedule: Schedule, x: Vector, most: int
) -> tuple[Alternative, ...]:
    """The best plans that lack one action of the plan, of the actions that come first."""
    first = len(posed.problem.columns) - len(posed.visits)
    places = np.flatnonzero(x[first:] > 0.5)
    sent = [int(k) for k in places if posed.visits[k].sent]
    sent.sort(key=lambda k: _order(posed.visits[k]))
    chosen = {posed.visits[k] for k in places.tolist()}
    of_task = np.array([v.task for v in posed.visits], dtype=np.int64)
    found, seen = [], set()
    for k in sent[:TRIED] if most else ():
        # what the plan does may now be done at other times than the relaxation thought of
        possible = posed.kept | np.isin(of_task, of_task[places])
        possible[k] = False
        try:
            other = posed.choose(possible)
        except PlanError:
            continue
        if (plan := tuple(other.tolist())) in seen:
            continue
        seen.add(plan)
        usd = cost_usd(posed.engine)
        new = sorted((posed.visits[i] for i in other if posed.visits[i] not in chosen), key=_order)
        found.append(
            Alternative(
                called(tasks[of_task[k]], posed.visits[k]),
                usd,
                usd - schedule.cost_usd,
                tuple(called(tasks[v.task], v) for v in new),
            )
        )
    found.sort(key=lambda a: (a.cost_usd, a.without))
    return tuple(found[:most])


def _order(visit: Visit) -> tuple[float, float, int]:
    return visit.start_h, visit.end_h, visit.task


def _worth(
    model: JointModel,
    posed: Posed,
    tasks: Sequence[Task],
    schedule: Schedule,
    extras: Sequence[Extra],
) -> tuple[Worth, ...]:
    richer = [("one more crew", replace(model, crews=model.crews + 1.0))]
    richer += [(e.name, replace(model, joined=_enlarged(model.joined, e))) for e in extras]
    worth = []
    for name, other in richer:
        again = other.pose(tasks)
        better, _ = other.settle(again)
        worth.append(
            Worth(
                name,
                schedule.cost_usd - better.cost_usd,
                posed.relaxed.bound_usd - again.relaxed.bound_usd,
            )
        )
    return tuple(worth)


def _check(joined: Joined, extra: Extra) -> None:
    for name, known in (
        *((n, joined.rows) for n in extra.rows),
        *((n, joined.columns) for n in extra.columns),
    ):
        if name not in known:
            raise PlanError(Reason.NO_PLAN, f"no block has {name!r}, which {extra.name} changes")


def _enlarged(joined: Joined, extra: Extra) -> Joined:
    rows = [joined.rows.index(name) for name in extra.rows]
    columns = [joined.columns.index(name) for name in extra.columns]
    row_low, row_high, high = (a.copy() for a in (joined.row_low, joined.row_high, joined.high))
    row_low[rows] += extra.amount
    row_high[rows] += extra.amount
    high[columns] += extra.amount
    return replace(joined, row_low=row_low, row_high=row_high, high=high)


def _relaxed(problem: Joined) -> Relaxation | None:
    """The cheapest relaxation, or None where the bounds of columns alone contradict each other."""
    try:
        return relax_rows(problem)
    except PlanError:
        return None
