r"""Finds what no plan can beat and which visits deserve a place in the exact model.

Without whole numbers the model is solved in milliseconds, but it cheats: a hundredth of a
main carries all that the houses behind it need. What it gains by that is taken away step by
step (dynamic slope scaling: Kim and Pardalos, Operations Research Letters 24, 1999): with
pi the worth of a crew in each slot of time, w the crews of a visit and y how much of the task
was done, the visit is charged

    pi w (1/y - 1)

in addition, so that the part that was done costs as much as the whole would. The visits that
any of these solutions used, in whole or in part, are those that a good plan is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from federation.plan.engine import make_whole, optimum_usd
from federation.plan.joining import Joined
from federation.plan.visits import Visit
from federation.twin import Vector

ROUNDS = 6
"""Solutions that visits are taken from. On 41 plans of twelve runs, of seeds that no result
is quoted from, eight saved a hundredth more and took a tenth more time; four a hundredth less."""

LEAST_PART = 1e-3
"""Parts below this are charged as if they were this, for the sake of the numbers."""

USED = 1e-6
"""A part from which on a visit counts as used; less is the solver's tolerance."""


@dataclass(frozen=True)
class Relaxed:
    """Costs in US dollars: of doing nothing more, and what no plan can go below.

    `used[visit]` tells which visits a round used.
    """

    idle_cost_usd: float
    bound_usd: float
    used: NDArray[np.bool_]
    basis: highspy.HighsBasis | None = None


def relax(
    engine: highspy.Highs,
    joined: Joined,
    visits: Sequence[Visit],
    engaged: Vector,
    idle_usd: float | None = None,
    start: highspy.HighsBasis | None = None,
) -> Relaxed:
    """Solve without whole visits; the engine is left with the charges of the last round.

    Its first columns are those of `joined`, the others the visits; its last rows the slots. Who
    knows already what it costs to do nothing more says so, and who knows where the first
    solution may be is told where it was.
    """
    size, count, slots = len(joined.low), len(visits), engaged.shape[1]
    of_task = np.array([v.task for v in visits], dtype=np.int64)
    sent = np.array([v.sent for v in visits], dtype=bool)
    places = np.arange(size, size + count, dtype=np.int32)
    nothing = np.zeros(count)
    if idle_usd is None:
        engine.changeColsBounds(count, places, nothing, np.where(sent, 0.0, 1.0))
        idle_usd = _idle(engine, joined)
    engine.changeColsBounds(count, places, nothing, np.ones(count))
    if start is not None and start.valid:
        engine.setBasis(start)
    bound_usd = optimum_usd(engine)
    basis = engine.getBasis() if start is not None else None
    used, charge = np.zeros(count, dtype=bool), nothing
    for left in reversed(range(ROUNDS)):
        solution = engine.getSolution()
        chosen = np.maximum(np.array(solution.col_value)[size:], 0.0)
        used |= chosen > USED
        if not left:
            break
        worth = np.maximum(-np.array(solution.row_dual)[-slots:], 0.0)
        part = np.bincount(of_task, np.where(sent, chosen, 0.0))[of_task]
        scale = 1.0 / np.maximum(part, LEAST_PART) - 1.0
        before = charge
        charge = np.where(sent & (part > USED), engaged @ worth * np.maximum(scale, 0.0), charge)
        if np.allclose(charge, before, rtol=1e-9, atol=0.0):
            break  # the same again would be found
        engine.changeColsCost(count, places, charge)
        if start is not None:
            # in a large model a start with other charges is worse than none: it forgoes presolve
            engine.clearSolver()
        optimum_usd(engine)
    return Relaxed(idle_usd, bound_usd, used, basis)


def _idle(engine: highspy.Highs, joined: Joined) -> float:
    """The cost when no crew sets out, with whole numbers where a block asks for them."""
    whole = np.flatnonzero(joined.integer)
    make_whole(engine, whole)
    cost_usd = optimum_usd(engine)
    make_whole(engine, whole, False)
    return cost_usd
