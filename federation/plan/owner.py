"""Answers for one owner in a bargain: from its own block, of which nothing else goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason
from federation.plan.bargain import Agreed, Bargain, Consent, Offer, Prices, Quotas, Stake
from federation.plan.engine import UNIT_USD, engine_of, optimum_usd
from federation.plan.joining import Indices, Joined, join
from federation.twin import LinearBlock, Vector

QUOTA_SLACK = 1e-9
"""By how much a quota may miss a bound of its column: the last digits of a weighed mean."""


class Owner:
    """One owner's block in an engine of its own; answers prices and quotas.

    Its columns must be bounded or cost what they give, so that every price has an answer, and
    whole numbers are taken in parts: a bargain is about the convex problem.
    """

    def __init__(self, name: str, problem: Joined, columns: Indices, stake: Stake) -> None:
        """`columns[k]` is the column of the problem that is the stake's quantity k."""
        self.name = name
        self.stake = stake
        self._columns = columns.astype(np.int32)
        self._cost = problem.cost
        self._engine = engine_of(problem)
        self._parts = int(stake.part.max(initial=-1)) + 2
        group = independent(problem)
        part_of = np.full(int(group.max(initial=-1)) + 1, self._parts - 1)
        part_of[group[columns]] = stake.part
        self._part = part_of[group]

    def answer(self, question: Prices | Quotas) -> Offer | Consent:
        if isinstance(question, Prices):
            return self._offer(question)
        return self._consent(question)

    def _offer(self, prices: Prices) -> Offer:
        stake = self.stake
        self._limit(stake.low, stake.high)
        charge = np.bincount(stake.quantity, stake.weight * prices.usd[stake.row], stake.part.size)
        self._charge(charge.astype(np.float64))
        optimum_usd(self._engine)
        return Offer(prices.round, self.name, *self._told())

    def _consent(self, quotas: Quotas) -> Consent:
        stake, quota = self.stake, quotas.quantity[self.name]
        gives = stake.delivers
        low = np.where(gives, quota, stake.low)
        high = np.where(gives, stake.high, quota)
        if (low > high + QUOTA_SLACK).any():
            return Consent(quotas.round, self.name, None, 0.0 * quota, 0.0 * quota)
        self._charge(np.zeros(quota.size))
        self._limit(np.minimum(low, high), high)
        try:
            optimum_usd(self._engine)
        except PlanError as error:
            if error.reason is not Reason.PLAN_INFEASIBLE:
                raise
            return Consent(quotas.round, self.name, None, 0.0 * quota, 0.0 * quota)
        reduced = np.array(self._engine.getSolution().col_dual)[self._columns] * UNIT_USD
        worth = np.where(gives, 0.0, np.maximum(-reduced, 0.0))
        return Consent(quotas.round, self.name, *self._told(), worth)

    def _told(self) -> tuple[Vector, Vector]:
        """Cost per part, without prices, and the quantities of what the engine found."""
        x = np.array(self._engine.getSolution().col_value)
        usd = np.bincount(self._part, self._cost * x, self._parts)
        return usd.astype(np.float64), x[self._columns]

    def _limit(self, low: Vector, high: Vector) -> None:
        self._engine.changeColsBounds(self._columns.size, self._columns, low, high)

    def _charge(self, usd: Vector) -> None:
        cost = (self._cost[self._columns] + usd) / UNIT_USD
        self._engine.changeColsCost(self._columns.size, self._columns, cost)


def independent(problem: Joined) -> Indices:
    """Per column the number of its group; columns of two groups share no row."""
    rows, width = len(problem.row_low), len(problem.low)
    ends = (problem.row_index, rows + problem.column_index)
    graph = coo_array((np.ones(problem.row_index.size), ends), (rows + width, rows + width))
    _, label = connected_components(graph, directed=False)
    _, group = np.unique(label[rows:], return_inverse=True)
    return np.asarray(group, dtype=np.int64)


def owners_of(
    blocks: Mapping[str, LinearBlock], couplings: Sequence[Coupling]
) -> tuple[list[Owner], Vector]:
    """An owner per block, and the limits of the rows of their boundary."""
    joined = join(blocks, couplings)
    cross = np.concatenate([c.rows for c in joined.crossings] or [np.zeros(0, np.int64)])
    place = np.full(len(joined.rows), -1, dtype=np.int64)
    place[cross] = np.arange(cross.size)
    owners = []
    for name, (span, _) in joined.owners.items():
        at = (
            (place[joined.row_index] >= 0)
            & (joined.column_index >= span.start)
            & (joined.column_index < span.stop)
        )
        columns, quantity = np.unique(joined.column_index[at] - span.start, return_inverse=True)
        alone = join({name: blocks[name]}, [])
        _, part = np.unique(independent(alone)[columns], return_inverse=True)
        stake = Stake(
            name,
            place[joined.row_index[at]],
            quantity.astype(np.int64),
            joined.coefficient[at],
            part.astype(np.int64),
            alone.low[columns],
            alone.high[columns],
        )
        owners.append(Owner(name, alone, columns, stake))
    return owners, joined.row_high[cross]


def agree(owners: Sequence[Owner], bargain: Bargain) -> Agreed:
    """Carry questions and answers in this process until the owners agree."""
    (question,) = bargain.start()
    while not isinstance(question, Agreed):
        for owner in owners:
            found = bargain.handle(owner.answer(question))
            if found:
                (following,) = found
        question = following
    return question
