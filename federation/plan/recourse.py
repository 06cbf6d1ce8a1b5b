r"""Decides now what must hold in several futures, each of which may go on as it likes.

With p_k the probability of future k, x_k its columns and F those that are decided now, the
first stage,

.. math::
    \min \sum_k p_k c_k x_k \quad x_k \in X_k \quad x_{kj} = x_{0j} \; (j \in F)

As one problem (`extensive`) it is solved exactly. Progressive hedging (Rockafellar and Wets,
Mathematics of Operations Research 16, 1991) solves each future for itself, on as many machines
as there are, with a price w_k on what it wants to be different and a charge for being so:

.. math::
    \min c_k x_k + w_k x_{kF} + \rho / 2 \, |x_{kF} - \bar x|^2 \qquad
    w_k \leftarrow w_k + \rho (x_{kF} - \bar x)

For a column that is 0 or 1 the charge is linear. Without the charge, the mean of the optima is
a bound for all plans (Gade et al., Mathematical Programming 157, 2016), because the mean of w
is 0; with whole numbers the bound need not be met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import highspy
import numpy as np
from numpy.typing import NDArray

from federation.errors import PlanError, Reason
from federation.plan.engine import (
    UNIT_USD,
    cost_usd,
    engine_of,
    make_whole,
    no_plan,
    optimum_usd,
)
from federation.plan.joining import Indices, Joined
from federation.twin import Vector

TOLERANCE = 1e-3
"""Hedging is done when its plan costs at most this share more than its bound."""

ROUNDS = 100

TANGENTS = 20
"""Times that a future is solved again to come nearer to the square of its charge."""

MISSED = 1e-5
"""The share of its cost by which a future may miss the square."""

Search = Mapping[str, float | bool]
"""How HiGHS looks for whole numbers, by the names of its options."""

EXACT: Search = {"mip_rel_gap": 0.0}


@dataclass(frozen=True)
class Future:
    """One way that things may go: its problem, whose columns of the first stage all have."""

    name: str
    probability: float
    problem: Joined


@dataclass(frozen=True)
class Recourse:
    """What to decide now, what it costs on the mean over the futures, and in each.

    `foresight_usd` is what it would cost on the mean to know beforehand which future comes:
    what `cost_usd` exceeds it by is the most that a forecast is worth. `bound_usd` is what no
    first stage can go below. US dollars.
    """

    first: Mapping[str, float]
    cost_usd: float
    bound_usd: float
    costs_usd: Mapping[str, float]
    foresight_usd: float
    rounds: int

    @property
    def gap(self) -> float:
        return (self.cost_usd - self.bound_usd) / max(abs(self.cost_usd), 1e-9)


@dataclass(frozen=True)
class Job:
    """For one future: prices on its first stage, a charge towards a mean, or values to keep to."""

    prices: Vector
    rho: float = 0.0
    mean: Vector | None = None
    fixed: Vector | None = None


@dataclass(frozen=True)
class Reply:
    """The first stage that was found; `own_usd` is the future's own cost, None if it can't.

    `bound_usd` is the optimum with the prices of the job, or what is proven of it.
    """

    first: Vector
    own_usd: float | None
    bound_usd: float


class Pool(Protocol):
    """Solves a job for each future, in their order."""

    def solve(self, jobs: Sequence[Job]) -> list[Reply]: ...


def extensive(futures: Sequence[Future], first: Sequence[str]) -> Joined:
    """All futures as one problem; a row for each column of the first stage says it is alike."""
    places = _places(futures, first)
    wide = np.cumsum([0] + [len(f.problem.columns) for f in futures])
    tall = np.cumsum([0] + [len(f.problem.rows) for f in futures])
    alike = tall[-1] + np.arange((len(futures) - 1) * len(first)).reshape(-1, len(first))
    lead = np.broadcast_to(places[0] + wide[0], alike.shape)
    same = np.array([places[k] + wide[k] for k in range(len(futures))], dtype=np.int64)[1:]
    problems = [f.problem for f in futures]
    return Joined(
        low=np.concatenate([p.low for p in problems]),
        high=np.concatenate([p.high for p in problems]),
        cost=np.concatenate([f.probability * f.problem.cost for f in futures]),
        integer=np.concatenate([p.integer for p in problems]),
        row_low=np.append(np.concatenate([p.row_low for p in problems]), np.zeros(alike.size)),
        row_high=np.append(np.concatenate([p.row_high for p in problems]), np.zeros(alike.size)),
        row_index=np.concatenate(
            [*(p.row_index + tall[k] for k, p in enumerate(problems)), alike.ravel(), alike.ravel()]
        ),
        column_index=np.concatenate(
            [
                *(p.column_index + wide[k] for k, p in enumerate(problems)),
                same.ravel(),
                lead.ravel(),
            ]
        ),
        coefficient=np.concatenate(
            [*(p.coefficient for p in problems), np.ones(alike.size), -np.ones(alike.size)]
        ),
        available={},
        columns=tuple(f"{f.name}: {c}" for f in futures for c in f.problem.columns),
        rows=tuple(f"{f.name}: {r}" for f in futures for r in f.problem.rows)
        + tuple(f"{f.name}: {c} as in {futures[0].name}" for f in futures[1:] for c in first),
    )


def with_recourse(
    futures: Sequence[Future],
    first: Sequence[str],
    search: Search = EXACT,
    start: Vector | None = None,
) -> Recourse:
    """The best first stage, from one problem; raises NO_PLAN or PLAN_INFEASIBLE.

    Where the `search` is limited, the bound says what may be left, and what is found is no worse
    than a `start`, a first stage that it begins with.
    """
    places = _places(futures, first)
    problem = extensive(futures, first)
    engine = engine_of(problem)
    make_whole(engine, np.flatnonzero(problem.integer))
    _limit(engine, search)
    wide = np.cumsum([0] + [len(f.problem.columns) for f in futures])
    if start is not None:
        at = np.concatenate([wide[k] + place for k, place in enumerate(places)])
        engine.setSolution(at.size, at.astype(np.int32), np.tile(start, len(futures)))
    engine.run()
    info = engine.getInfo()
    if not _has_plan(engine):
        raise no_plan(engine)
    x = np.array(engine.getSolution().col_value)
    usd, chosen = cost_usd(engine), x[places[0]]
    bound_usd = float(info.mip_dual_bound) * UNIT_USD if problem.integer.any() else usd
    costs = [float(f.problem.cost @ x[wide[k] : wide[k + 1]]) for k, f in enumerate(futures)]
    pool = LocalPool(futures, first, search)
    kept = None if start is None else costs_of(pool, futures, start)
    if start is not None and kept is not None and _mean(futures, kept) < usd:
        usd, chosen, costs = _mean(futures, kept), start, kept
    alone = pool.solve([Job(np.zeros(len(first)))] * len(futures))
    return Recourse(
        dict(zip(first, chosen.tolist(), strict=True)),
        usd,
        min(bound_usd, usd),
        {f.name: own for f, own in zip(futures, costs, strict=True)},
        _mean(futures, [reply.bound_usd for reply in alone]),
        1,
    )


def costs_of(pool: Pool, futures: Sequence[Future], first: Vector) -> list[float] | None:
    """What a first stage costs in each future; None when some future has no plan after it."""
    replies = pool.solve([Job(np.zeros(first.size), fixed=first)] * len(futures))
    costs = [reply.own_usd for reply in replies if reply.own_usd is not None]
    return costs if len(costs) == len(futures) else None


def hedge(
    futures: Sequence[Future],
    first: Sequence[str],
    pool: Pool | None = None,
    rho_usd: float | None = None,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    start: Vector | None = None,
) -> Recourse:
    """The same by progressive hedging; `pool` solves the futures, by default one by one here.

    `rho_usd` is the charge per unit that a future differs by; by default what it costs to agree on
    the first mean, per square of the differences. What is found is no worse than a `start`. Raises
    NO_PLAN when no mean was possible in every future within the rounds.
    """
    places = _places(futures, first)
    probability = np.array([f.probability for f in futures])
    whole = futures[0].problem.integer[places[0]]
    pool = LocalPool(futures, first) if pool is None else pool
    prices = np.zeros((len(futures), len(first)))
    replies = pool.solve([Job(w) for w in prices])
    foresight_usd = bound_usd = _mean(futures, [reply.bound_usd for reply in replies])
    best: tuple[float, Vector, list[float]] | None = None
    if start is not None and (costs := costs_of(pool, futures, start)) is not None:
        best = _mean(futures, costs), start, costs
    rho = rho_usd
    done = 0
    while done < rounds:
        done += 1
        wanted = np.array([reply.first for reply in replies])
        mean = probability @ wanted
        tried = np.where(whole, np.round(mean), mean)
        if best is None or not np.array_equal(tried, best[1]):
            costs = costs_of(pool, futures, tried)
            if costs is not None and (best is None or _mean(futures, costs) < best[0]):
                best = _mean(futures, costs), tried, costs
        apart = probability @ ((wanted - mean) ** 2).sum(axis=1)
        if best is not None and best[0] - bound_usd <= tolerance * max(abs(best[0]), 1e-9):
            break
        if rho is None:
            lost = (best[0] - bound_usd) if best is not None else 0.01 * abs(bound_usd)
            rho = max(lost, 1e-6) / max(apart, 1e-9)
        prices = prices + rho * (wanted - mean)
        bounds = pool.solve([Job(w) for w in prices])
        bound_usd = max(bound_usd, _mean(futures, [reply.bound_usd for reply in bounds]))
        replies = pool.solve([Job(w, rho, mean) for w in prices])
    if best is None:
        raise PlanError(Reason.NO_PLAN, f"in {rounds} rounds no decision suited every future")
    return Recourse(
        dict(zip(first, best[1].tolist(), strict=True)),
        best[0],
        min(bound_usd, best[0]),
        {f.name: usd for f, usd in zip(futures, best[2], strict=True)},
        foresight_usd,
        done,
    )


class Subproblem:
    """One future in an engine of its own.

    The square of the charge is the upper hull of its tangents, which are added where they are
    missed and hold whatever the mean: HiGHS' method for quadratic costs did not come to an end
    on a newsvendor, and knows no whole numbers.
    """

    def __init__(self, future: Future, place: Indices, search: Search = EXACT) -> None:
        self._problem = future.problem
        self._place = place.astype(np.int32)
        self._whole = np.flatnonzero(future.problem.integer)
        self._binary = (
            future.problem.integer[place]
            & (future.problem.low[place] >= 0)
            & (future.problem.high[place] <= 1)
        )
        self._engine = engine_of(self._problem)
        self._is_limited = search != EXACT
        _limit(self._engine, search)
        make_whole(self._engine, self._whole)
        # for each column x of the first stage one for x^2 / 2, from below
        width, count = len(self._problem.low), place.size
        self._square = np.arange(width, width + count, dtype=np.int32)
        self._engine.addVars(count, np.zeros(count), np.full(count, np.inf))

    def solve(self, job: Job) -> Reply:
        problem, place, engine = self._problem, self._place, self._engine
        charge = job.prices.copy()
        squared = ~self._binary if job.mean is not None else np.zeros(place.size, dtype=np.bool_)
        if job.mean is not None:
            # (y - m)^2 = y - 2 m y + m^2 where y is 0 or 1
            charge += job.rho * np.where(self._binary, 0.5 - job.mean, -job.mean)
        kept = job.fixed
        low, high = (problem.low[place], problem.high[place]) if kept is None else (kept, kept)
        engine.changeColsBounds(place.size, place, low, high)
        engine.changeColsCost(place.size, place, (problem.cost[place] + charge) / UNIT_USD)
        cost = np.where(squared, job.rho, 0.0) / UNIT_USD
        engine.changeColsCost(place.size, self._square, cost)
        engine.clearSolver()
        try:
            usd = self._least_usd(squared, job.rho)
        except PlanError as error:
            if kept is None or error.reason is not Reason.PLAN_INFEASIBLE:
                raise
            return Reply(kept, None, np.inf)
        if self._whole.size:
            usd = min(usd, float(engine.getInfo().mip_dual_bound) * UNIT_USD)
        x = np.array(engine.getSolution().col_value)[: len(problem.low)]
        return Reply(x[place], float(problem.cost @ x), usd)

    def _least_usd(self, squared: NDArray[np.bool_], rho_usd: float) -> float:
        usd = self._found_usd()
        for _ in range(TANGENTS):
            found = np.array(self._engine.getSolution().col_value)
            x, below = found[self._place], found[self._square]
            missed = squared & (rho_usd * (x**2 / 2 - below) > MISSED * max(abs(usd), 1.0))
            if not missed.any():
                break
            for k in np.flatnonzero(missed).tolist():
                at = float(x[k])
                ends = np.array([self._square[k], self._place[k]], dtype=np.int32)
                self._engine.addRow(-(at**2) / 2, np.inf, 2, ends, np.array([1.0, -at]))
            usd = self._found_usd()
        return usd

    def _found_usd(self) -> float:
        """Of the optimum or, when the search may end before it, of the best that it found."""
        if not self._is_limited:
            return optimum_usd(self._engine)
        self._engine.run()  # once: a search that has met its limit is not begun anew
        if not _has_plan(self._engine):
            raise no_plan(self._engine)
        return cost_usd(self._engine)


class LocalPool:
    """Solves the futures one after the other, here."""

    def __init__(
        self, futures: Sequence[Future], first: Sequence[str], search: Search = EXACT
    ) -> None:
        places = _places(futures, first)
        self._members = [Subproblem(f, p, search) for f, p in zip(futures, places, strict=True)]

    def solve(self, jobs: Sequence[Job]) -> list[Reply]:
        return [m.solve(job) for m, job in zip(self._members, jobs, strict=True)]


class RayPool:
    """Solves the futures side by side, one actor each, on a Ray that the caller has started."""

    def __init__(
        self, futures: Sequence[Future], first: Sequence[str], search: Search = EXACT
    ) -> None:
        import ray

        actor = ray.remote(Subproblem).options(num_cpus=0.01)
        places = _places(futures, first)
        self._members: list[Any] = [
            actor.remote(f, p, search) for f, p in zip(futures, places, strict=True)
        ]

    def solve(self, jobs: Sequence[Job]) -> list[Reply]:
        import ray

        asked = [m.solve.remote(job) for m, job in zip(self._members, jobs, strict=True)]
        found: list[Reply] = ray.get(asked)
        return found


def _places(futures: Sequence[Future], first: Sequence[str]) -> list[Indices]:
    """Per future where its columns of the first stage are."""
    total = sum(f.probability for f in futures)
    if not futures or abs(total - 1.0) > 1e-9 or any(f.probability < 0 for f in futures):
        raise PlanError(Reason.NO_PLAN, f"the probabilities of the futures add up to {total:g}")
    places = []
    for future in futures:
        at = {name: j for j, name in enumerate(future.problem.columns)}
        missing = [name for name in first if name not in at]
        if missing:
            raise PlanError(
                Reason.NO_PLAN, f"{future.name} knows nothing of {missing[0]!r}, decided before it"
            )
        places.append(np.array([at[name] for name in first], dtype=np.int64))
    return places


def _limit(engine: highspy.Highs, search: Search) -> None:
    for name, value in search.items():
        engine.setOptionValue(name, value)


def _has_plan(engine: highspy.Highs) -> bool:
    status = engine.getInfo().primal_solution_status
    return bool(status == highspy.SolutionStatus.kSolutionStatusFeasible)


def _mean(futures: Sequence[Future], usd: Sequence[float]) -> float:
    return float(sum(f.probability * cost for f, cost in zip(futures, usd, strict=True)))
