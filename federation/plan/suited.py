"""Plans for crews when work is only estimated: who sets out at once must suit every future.

A future is the same problem with work that may be the true one. Who sets out later is decided
when more is known, in each future as suits it (see `federation.plan.recourse`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from federation.plan.engine import UNIT_USD
from federation.plan.joining import Joined
from federation.plan.joint import GAP, OPTIONS, JointModel, Posed, called
from federation.plan.recourse import (
    Future,
    LocalPool,
    Pool,
    Search,
    costs_of,
    hedge,
    with_recourse,
)
from federation.plan.visits import Task, Visit

ROUNDS = 10
"""Rounds of hedging: with whole numbers and a limited search the bound is met in no number."""

Pools = Callable[[Sequence[Future], Sequence[str], Search], Pool]


@dataclass(frozen=True)
class Suited:
    """Who sets out at once, in words, and what it costs; US dollars over the horizon.

    `costs_usd` has the cost in each future and `cost_usd` their mean, which no plan brings below
    `bound_usd`; with the visits that were weighed, to know beforehand which future comes would save
    `forecast_usd` at most. `estimates_usd` is the mean cost if those set out at once whom a plan
    would send that takes the estimates for the truth; None when some future does not allow that.
    """

    at_once: tuple[str, ...]
    cost_usd: float
    bound_usd: float
    costs_usd: tuple[float, ...]
    forecast_usd: float
    estimates_usd: float | None


def suited(
    model: JointModel,
    estimated: Sequence[Task],
    futures: Sequence[Sequence[Task]],
    pools: Pools | None = None,
) -> Suited:
    """Whom to send at once, given what the work is estimated to be and what it may be.

    Futures are equally likely and have the tasks of the estimate, in its order. They are solved as
    one problem or, with `pools`, by hedging. Visits are those that the relaxation of some future
    used, and all to whom a plan for one of them, or for the estimates, sends at once. Raises
    NO_PLAN and PLAN_INFEASIBLE.
    """
    # what can't be done in time in some future engages who was sent nevertheless
    posed = [model.pose(tasks, even_late=True) for tasks in futures]
    plans = [model.solve(estimated).visits, *(model.settle(one)[0].visits for one in posed)]
    sent = [{v.task for v in visits if _is_now(v)} for visits in plans]
    places = [{v.task: k for k, v in enumerate(one.visits) if _is_now(v)} for one in posed]
    likely = set().union(*sent)
    wanted = likely.union(
        *({t for t, k in at.items() if p.kept[k]} for p, at in zip(posed, places, strict=True))
    )
    first = [t for t in sorted(wanted) if all(t in at for at in places)]
    names = [called(estimated[t], posed[0].visits[places[0][t]]) for t in first]
    made = [
        Future(f"future {k}", 1.0 / len(posed), _kept(p, at, first, likely))
        for k, (p, at) in enumerate(zip(posed, places, strict=True))
    ]
    possible_usd = np.mean([p.relaxed.idle_cost_usd - p.relaxed.bound_usd for p in posed])
    search = {**OPTIONS, "mip_abs_gap": GAP * float(possible_usd) / UNIT_USD}
    pool = (pools or LocalPool)(made, names, search)
    # the best of those plans is a good one to begin with
    starts = [np.array([float(t in tasks) for t in first]) for tasks in sent]
    costs = [costs_of(pool, made, start) for start in starts]
    means = [np.inf if each is None else float(np.mean(each)) for each in costs]
    start = starts[int(np.argmin(means))]
    found = (
        with_recourse(made, names, search, start)
        if pools is None
        else hedge(made, names, pool, rounds=ROUNDS, start=start)
    )
    bound_usd = float(np.mean([p.relaxed.bound_usd for p in posed]))
    return Suited(
        tuple(name for name, value in found.first.items() if value > 0.5),
        found.cost_usd,
        min(bound_usd, found.cost_usd),
        tuple(found.costs_usd.values()),
        max(found.cost_usd - found.foresight_usd, 0.0),
        means[0] if np.isfinite(means[0]) else None,
    )


def _is_now(visit: Visit) -> bool:
    return visit.sent and visit.start_h == 0.0


def _kept(posed: Posed, at: Mapping[int, int], first: Sequence[int], likely: set[int]) -> Joined:
    """The problem with those visits alone that deserve a place; `at` is where those are that set
    out now, by task."""
    possible = posed.kept | np.array([v.task in likely for v in posed.visits], dtype=bool)
    possible[list(at.values())] = False
    possible[[at[t] for t in first]] = True
    high = posed.problem.high.copy()
    high[high.size - possible.size :] = possible
    return replace(posed.problem, high=high)
