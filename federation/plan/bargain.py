r"""Finds the joint optimum of several owners from prices and boundary quantities alone.

With x_o what owner o does within its own block X_o, at cost c_o, and B_o its part in the rows
of the boundary, the joint problem is

.. math::
    \min \sum_o c_o x_o \quad x_o \in X_o \quad \sum_o B_o x_o \le b

For prices \lambda \ge 0 on those rows every owner answers for itself, and the sum

.. math::
    L(\lambda) = \sum_o \min_{x \in X_o} (c_o + B_o^T \lambda) x - \lambda b

is a bound that no joint plan can go below (Lagrange). Each answer is also a cut: it says what
that owner would cost at most at any other prices. The cuts of every independent part of every
owner make the model whose best prices are asked next, near the best so far (a bundle method
with a box for a trust region: Marsten, Hogan and Blankenship, Operations Research 23, 1975).
The model's own multipliers weigh the answers into quantities that fit together (Dantzig and
Wolfe); owners that keep to these as quotas cost what a real plan costs.

This module decides and does nothing: answers come in, questions go out, whoever carries them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np
from numpy.typing import NDArray

from federation.errors import PlanError, Reason, TwinError
from federation.plan.engine import UNIT_USD
from federation.plan.joining import Indices
from federation.twin import Vector

TOLERANCE = 1e-3
"""Done when the plan costs at most this share more than the bound."""

ROUNDS = 60
"""Questions to everybody before the best plan so far is taken."""

ACCEPT = 0.1
"""Prices become the middle of the box when they bring this share of what the model promised."""

WIDEN = 0.5
"""From this share on, the box doubles."""

SPENT = 3e-5
"""The model has nothing more to say when it promises less than this share of the bound."""

QUOTA_EVERY = 4
"""After so many rounds of prices there is one of quotas, and whenever the model is spent."""


@dataclass(frozen=True)
class Stake:
    """What an owner has at the boundary: its quantities, and how they count in which rows.

    Term i says that quantity `quantity[i]` counts `weight[i]` in row `row[i]`: above 0 for what
    is received, below for what is delivered. `part[k]` tells which quantities depend on each
    other within the owner; nothing else of a block is told.
    """

    owner: str
    row: Indices
    quantity: Indices
    weight: Vector
    part: Indices
    low: Vector
    high: Vector

    @property
    def delivers(self) -> NDArray[np.bool_]:
        """Per quantity whether the owner delivers it."""
        found = np.zeros(self.part.size, dtype=np.bool_)
        found[self.quantity[self.weight < 0]] = True
        return found


@dataclass(frozen=True)
class Prices:
    """Asks every owner what it would do if a unit in each row cost this, in US dollars."""

    round: int
    usd: Vector


@dataclass(frozen=True)
class Quotas:
    """Asks every owner what it costs to deliver at least, and receive at most, this much.

    `quantity[owner]` in the order of its stake.
    """

    round: int
    quantity: dict[str, Vector]


@dataclass(frozen=True)
class Offer:
    """What an owner would do: per part its own cost without prices, and its quantities.

    `cost_usd` has one entry more than there are parts, for all that never meets the boundary.
    Answers `Prices`.
    """

    round: int
    owner: str
    cost_usd: Vector
    quantity: Vector


@dataclass(frozen=True)
class Consent:
    """What an owner would do within its quotas, as in an offer; None when it can't keep to them.

    `worth_usd` is what one unit of each quota more, of what it receives, would save it. Answers
    `Quotas`.
    """

    round: int
    owner: str
    cost_usd: Vector | None
    quantity: Vector
    worth_usd: Vector


@dataclass(frozen=True)
class Agreed:
    """The end: quotas that all can keep to, what they cost, and a bound; in US dollars.

    `is_close` when the cost is within the tolerance of the bound.
    """

    rounds: int
    quantity: dict[str, Vector]
    prices_usd: Vector
    cost_usd: float
    bound_usd: float
    is_close: bool

    @property
    def gap(self) -> float:
        return (self.cost_usd - self.bound_usd) / max(abs(self.cost_usd), 1e-9)


Question = Prices | Quotas | Agreed


@dataclass
class Bargain:
    """Asks in rounds until plan and bound meet: `start`, then `handle` with every answer.

    The first round is of quotas of nothing: what owners would give for the first unit says how
    high prices may go. A round ends when every owner has answered; an answer of another round
    is one that came late and is passed over. Raises NOT_FINITE or WRONG_SHAPE for an answer that
    can't be read, which then counts for nothing, and NO_PLAN when no quotas were ever agreed to.
    """

    stakes: tuple[Stake, ...]
    limit: Vector
    tolerance: float = TOLERANCE
    rounds: int = ROUNDS
    bound_usd: float = field(default=-np.inf, init=False)
    cost_usd: float = field(default=np.inf, init=False)
    round: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._stake = {stake.owner: stake for stake in self.stakes}
        self._asked: Prices | Quotas | None = None
        self._answers: dict[str, Offer | Consent] = {}
        self._agreed: dict[str, Vector] = {}
        self._master = _Master(self.stakes, self.limit)
        self._best = np.zeros(self.limit.size)
        self._radius = 1.0
        self._promised = np.inf
        self._since_quotas = 0

    def start(self) -> tuple[Question, ...]:
        nothing = {
            s.owner: np.where(s.delivers, s.low, np.clip(0.0, s.low, s.high)) for s in self.stakes
        }
        return self._ask(Quotas(1, nothing))

    def handle(self, answer: Offer | Consent) -> tuple[Question, ...]:
        """Take one owner's answer; asks on when it was the last of its round."""
        if self._asked is None or answer.round != self._asked.round:
            return ()
        if isinstance(answer, Offer) != isinstance(self._asked, Prices):
            return ()
        _check(answer, self._stake)
        self._answers.setdefault(answer.owner, answer)
        if len(self._answers) < len(self.stakes):
            return ()
        answers = [self._answers[stake.owner] for stake in self.stakes]
        self._answers = {}
        if isinstance(self._asked, Prices):
            self._weigh(self._asked, [a for a in answers if isinstance(a, Offer)])
        else:
            self._sign(self._asked, [a for a in answers if isinstance(a, Consent)])
        return self._next()

    def _ask(self, question: Prices | Quotas) -> tuple[Question, ...]:
        self._asked, self.round = question, question.round
        return (question,)

    def _weigh(self, asked: Prices, offers: list[Offer]) -> None:
        """A bound from the offers, cuts from each, and whether these prices are better."""
        usd = -float(asked.usd @ self.limit)
        for stake, offer in zip(self.stakes, offers, strict=True):
            paid = stake.weight * asked.usd[stake.row] * offer.quantity[stake.quantity]
            usd += float(offer.cost_usd.sum() + paid.sum())
            self._master.cut(stake, offer.cost_usd, offer.quantity)
        gained, promised = usd - self.bound_usd, self._promised - self.bound_usd
        if not np.isfinite(self.bound_usd) or gained >= ACCEPT * promised > 0.0:
            self._best = asked.usd
            if gained >= WIDEN * promised:
                self._radius = min(2.0 * self._radius, 1.0)
        else:
            self._radius *= 0.5
        self.bound_usd = max(self.bound_usd, usd)
        self._since_quotas += 1

    def _sign(self, asked: Quotas, consents: list[Consent]) -> None:
        """A real plan, if everybody can; the first time also how high prices may go."""
        self._since_quotas = 0
        costs = [float(c.cost_usd.sum()) for c in consents if c.cost_usd is not None]
        agreed = len(costs) == len(consents) and self._fits(asked.quantity)
        if agreed and sum(costs) < self.cost_usd:
            self.cost_usd, self._agreed = sum(costs), asked.quantity
        top = np.zeros(self.limit.size)
        for stake, consent in zip(self.stakes, consents, strict=True):
            takes = stake.weight > 0
            worth = consent.worth_usd[stake.quantity[takes]] / stake.weight[takes]
            np.maximum.at(top, stake.row[takes], worth)
            # what an owner can do is a cut, whatever it was asked
            if consent.cost_usd is not None:
                self._master.cut(stake, consent.cost_usd, consent.quantity)
        self._master.raise_prices(top)

    def _fits(self, quantity: dict[str, Vector]) -> bool:
        """Whether nothing is received that nobody delivers; the first quotas may not fit."""
        used = np.zeros(self.limit.size)
        for stake in self.stakes:
            np.add.at(used, stake.row, stake.weight * quantity[stake.owner][stake.quantity])
        return bool((used <= self.limit + 1e-7 * np.maximum(np.abs(self.limit), 1.0)).all())

    def _next(self) -> tuple[Question, ...]:
        if self.cost_usd - self.bound_usd <= self.tolerance * max(abs(self.cost_usd), 1e-9):
            return self._end(True)
        if self.round >= self.rounds:
            return self._end(False)
        if not np.isfinite(self.bound_usd):
            return self._ask(Prices(self.round + 1, self._master.highest / 2.0))
        prices, promised = self._master.best_near(self._best, self._radius)
        spent = promised - self.bound_usd <= SPENT * max(abs(self.bound_usd), 1e-9)
        if self._since_quotas >= QUOTA_EVERY or (spent and self._since_quotas):
            self._master.best_near(self._best, 1.0)
            return self._ask(Quotas(self.round + 1, self._master.blend()))
        if spent:
            # the box has nothing more to give: look farther, and higher
            self._radius = min(8.0 * self._radius, 1.0)
            high = self._master.highest
            self._master.raise_prices(np.where(self._best >= 0.99 * high, 2.0 * high, 0.0))
            prices, promised = self._master.best_near(self._best, self._radius)
        self._promised = promised
        return self._ask(Prices(self.round + 1, prices))

    def _end(self, is_close: bool) -> tuple[Question, ...]:
        self._asked = None
        if not self._agreed:
            raise PlanError(
                Reason.NO_PLAN, f"in {self.round} rounds the owners agreed to no quotas"
            )
        return (
            Agreed(self.round, self._agreed, self._best, self.cost_usd, self.bound_usd, is_close),
        )


class _Master:
    """The model of what the owners would answer: prices first, then a value per part."""

    def __init__(self, stakes: tuple[Stake, ...], limit: Vector) -> None:
        self._stakes = stakes
        self._limit = limit
        self.highest = np.zeros(limit.size)
        self._part: dict[str, int] = {}
        """Per owner the column of its first part; its last one is what has no boundary."""
        width = limit.size
        for stake in stakes:
            self._part[stake.owner] = width
            width += int(stake.part.max(initial=-1)) + 2
        self._width = width
        self._rows: list[tuple[str, int, Vector]] = []
        """Per cut the owner, the part, and the owner's quantities."""
        engine = highspy.Highs()  # type: ignore[no-untyped-call]
        for name, value in (("output_flag", False), ("threads", 1), ("random_seed", 0)):
            engine.setOptionValue(name, value)
        engine.changeObjectiveSense(highspy.ObjSense.kMaximize)
        engine.addVars(width, np.full(width, -np.inf), np.full(width, np.inf))
        cost = np.append(-limit, np.ones(width - limit.size))
        engine.changeColsCost(width, np.arange(width, dtype=np.int32), cost)
        self._engine = engine

    def raise_prices(self, top_usd: Vector) -> None:
        """Look for prices up to what anybody would give for a unit, with room for error."""
        if not self.highest.any():
            self.highest = np.where(top_usd > 0.0, top_usd, max(float(top_usd.max()), 1.0))
        self.highest = np.maximum(self.highest, 1.5 * top_usd)

    def cut(self, stake: Stake, cost_usd: Vector, quantity: Vector) -> None:
        """theta_part - sum of weight x quantity x price <= cost, for each part of an owner."""
        first = self._part[stake.owner]
        slope = stake.weight * quantity[stake.quantity]
        for part, usd in enumerate(cost_usd.tolist()):
            terms = np.flatnonzero((stake.part[stake.quantity] == part) & (slope != 0.0))
            rows, place = np.unique(stake.row[terms], return_inverse=True)
            value = np.bincount(place, -slope[terms], rows.size)
            index = np.append(rows, first + part).astype(np.int32)
            self._engine.addRow(-np.inf, usd / UNIT_USD, index.size, index, np.append(value, 1.0))
            self._rows.append((stake.owner, part, quantity))

    def best_near(self, middle_usd: Vector, radius: float) -> tuple[Vector, float]:
        """The best prices of the model within the box, and what it promises there, USD."""
        reach = radius * self.highest
        low = np.maximum(middle_usd - reach, 0.0) / UNIT_USD
        high = np.minimum(middle_usd + reach, self.highest) / UNIT_USD
        count = low.size
        self._engine.changeColsBounds(count, np.arange(count, dtype=np.int32), low, high)
        self._engine.run()
        if self._engine.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            self._engine.clearSolver()
            self._engine.run()
        promised = float(self._engine.getInfo().objective_function_value) * UNIT_USD
        x = np.array(self._engine.getSolution().col_value)
        return np.clip(x[:count], low, high) * UNIT_USD, promised

    def blend(self) -> dict[str, Vector]:
        """Quotas: the offers weighed as the model weighs them, and made to fit the rows.

        A block that could do each of two things could do any part of both. What is received
        is cut to what is delivered, where the weights do not meet to the last digit.
        """
        weight = np.maximum(np.array(self._engine.getSolution().row_dual), 0.0)
        total: dict[tuple[str, int], float] = {}
        blend = {s.owner: np.zeros(s.part.size) for s in self._stakes}
        of = {s.owner: s for s in self._stakes}
        for (owner, part, quantity), w in zip(self._rows, weight.tolist(), strict=True):
            if w > 0.0:
                total[owner, part] = total.get((owner, part), 0.0) + w
                blend[owner] += w * np.where(of[owner].part == part, quantity, 0.0)
        for stake in self._stakes:
            share = np.array([total.get((stake.owner, int(p)), 1.0) for p in stake.part])
            blend[stake.owner] = np.clip(blend[stake.owner] / share, stake.low, stake.high)
        room = self._limit.copy()
        for stake in self._stakes:
            gives = stake.weight < 0
            given = stake.weight[gives] * blend[stake.owner][stake.quantity[gives]]
            np.add.at(room, stake.row[gives], -given)
        for stake in self._stakes:
            takes = stake.weight > 0
            most = room[stake.row[takes]] / stake.weight[takes]
            np.minimum.at(blend[stake.owner], stake.quantity[takes], np.maximum(most, 0.0))
        return blend


def _check(answer: Offer | Consent, stakes: dict[str, Stake]) -> None:
    if answer.owner not in stakes:
        raise TwinError(Reason.WRONG_SHAPE, f"{answer.owner!r} has no stake in this bargain")
    stake = stakes[answer.owner]
    size, parts = stake.part.size, int(stake.part.max(initial=-1)) + 2
    vectors = [(answer.quantity, size)]
    if answer.cost_usd is not None:
        vectors.append((answer.cost_usd, parts))
    if isinstance(answer, Consent):
        vectors.append((answer.worth_usd, size))
    for vector, wanted in vectors:
        if vector.shape != (wanted,):
            raise TwinError(
                Reason.WRONG_SHAPE,
                f"{answer.owner} answers with {vector.shape} numbers where {wanted} are due",
            )
        if not np.isfinite(vector).all():
            raise TwinError(Reason.NOT_FINITE, f"{answer.owner} answers with NaN or infinity")
