r"""States what a city has at its border with others: one quantity per good, direction and period.

For a good that goes out, with s what the ports of the city's blocks deliver, r what is kept for
others already, and q what is bargained over; for one that comes in, with n what is received and
c what comes already:

.. math::
    q_p \le \sum_e s_{ep} - r_p \qquad\qquad \sum_e n_{ep} \le q_p + c_p

So what was promised before is kept whatever is agreed on, and however many entities a port has,
nobody outside sees more than q and what it costs beyond exchanging nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from federation.core.coupling import Coupling, conversion
from federation.errors import PlanError, Reason, ScenarioError
from federation.plan.bargain import Consent, Offer, Prices, Quotas, Stake
from federation.plan.joining import Joined, join
from federation.plan.owner import Owner, independent
from federation.twin import LinearBlock, Port, Vector

DUST = 1e-6
"""Less than this of anything is nothing: the last digits of a solver."""

USD_DIGITS, DIGITS = 4, 9
"""Digits behind the point of what costs and quantities are told in."""


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where a good leaves a city's blocks, or enters them: a port of role supply or need; all of
    its entities when none is named."""

    member: str
    port: str
    entity: str = ""


@dataclass(frozen=True)
class Line:
    """A good in one direction, as one of its ends has it, in the unit of the border.

    `held[p]` is what is kept for others in period p, or comes from others, already.
    """

    good: str
    unit: str
    gives: bool
    outlet: Outlet
    held: Vector


@dataclass(frozen=True)
class Holding:
    """What a city bargains from: the blocks of its members and what joins them."""

    blocks: Mapping[str, LinearBlock]
    couplings: Sequence[Coupling]


@dataclass(frozen=True)
class Ends:
    """The end of the border that one city has: its owner, and by line what it is made of.

    `most[line, period]` is all that could go over it, with what is held already; `whole[line]`
    says whether it is of whole things.
    """

    owner: Owner
    most: Vector
    whole: NDArray[np.bool_]

    @property
    def stake(self) -> Stake:
        return self.owner.stake


def ends_of(name: str, holding: Holding, lines: Sequence[Line], rows: Sequence[int]) -> Ends:
    """The end of a city at lines whose first periods are these rows of the border.

    Fails with UNKNOWN_VARIABLE when a block lacks a port, INCOMPATIBLE_UNITS, SCENARIO_INVALID for
    a port that members of the city are fed from, and PLAN_INFEASIBLE when the city can't keep to
    what is held.
    """
    joined = join(holding.blocks, holding.couplings)
    periods = lines[0].held.size if lines else 0
    width, height, count = len(joined.low), len(joined.row_low), len(lines) * periods
    row_index, column_index, coefficient = [], [], []
    most, whole = np.zeros((len(lines), periods)), np.zeros(len(lines), dtype=np.bool_)
    bounds: list[Vector] = []
    sharing: dict[tuple[Outlet, bool], int] = {}
    """Lines to several cities may go by one outlet, whose rows they share."""
    for number, line in enumerate(lines):
        port, factor = _port(holding, line)
        columns = _columns(joined, line.outlet, port)
        if columns.shape[1] != periods:
            raise _bad(line, f"has {columns.shape[1]} periods where {periods} are due")
        sign = -1.0 if line.gives else 1.0
        key = (line.outlet, line.gives)
        row = height + sharing.setdefault(key, len(bounds)) * periods + np.arange(periods)
        row_index.append(row)
        column_index.append(width + number * periods + np.arange(periods))
        coefficient.append(np.full(periods, -sign))
        if sharing[key] == len(bounds):
            row_index.append(np.tile(row, columns.shape[0]))
            column_index.append(columns.ravel())
            coefficient.append(np.full(columns.size, sign * factor))
            bounds.append(sign * line.held)
        most[number] = factor * joined.high[columns].sum(axis=0)
        whole[number] = bool(joined.integer[columns].all())
    room = np.array([m - line.held * line.gives for m, line in zip(most, lines, strict=True)])
    high = np.maximum(room, 0.0).ravel()
    problem = replace(
        joined,
        low=np.append(joined.low, np.zeros(count)),
        high=np.append(joined.high, high),
        cost=np.append(joined.cost, np.zeros(count)),
        integer=np.append(joined.integer, np.zeros(count, dtype=bool)),
        row_low=np.append(joined.row_low, np.full(len(bounds) * periods, -np.inf)),
        row_high=np.concatenate([joined.row_high, *bounds]),
        row_index=np.concatenate([joined.row_index, *row_index]),
        column_index=np.concatenate([joined.column_index, *column_index]),
        coefficient=np.concatenate([joined.coefficient, *coefficient]),
        columns=(*joined.columns, *_names(lines, periods)),
        rows=(*joined.rows, *_names([lines[n] for n in _firsts(lines)], periods)),
    )
    columns = width + np.arange(count)
    _, part = np.unique(independent(problem)[columns], return_inverse=True)
    stake = Stake(
        name,
        np.concatenate([np.arange(r, r + periods) for r in rows]).astype(np.int64),
        np.arange(count),
        np.repeat([-1.0 if line.gives else 1.0 for line in lines], periods),
        np.asarray(part, dtype=np.int64),
        np.zeros(count),
        high,
    )
    return Ends(Owner(name, problem, columns, stake), most, whole)


class Discreet:
    """Answers others for one owner; tells of its costs only what goes beyond exchanging nothing.

    Fails with PLAN_INFEASIBLE when the owner can't do without exchanging something.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        nothing = owner.answer(Quotas(0, {owner.name: np.zeros(owner.stake.part.size)}))
        if nothing.cost_usd is None:
            raise PlanError(
                Reason.PLAN_INFEASIBLE,
                f"{owner.name} can't keep to what it has promised, or has no plan by itself",
                {"city": owner.name},
            )
        self._alone = nothing.cost_usd

    @property
    def alone_usd(self) -> float:
        """What it costs the owner to exchange nothing."""
        return float(self._alone.sum())

    def answer(self, question: Prices | Quotas) -> Offer | Consent:
        answer = self.owner.answer(question)
        if answer.cost_usd is None:
            return answer
        # the last digits of a difference tell how large the two were
        cost_usd = np.round(answer.cost_usd - self._alone, USD_DIGITS) + 0.0
        quantity = np.round(answer.quantity, DIGITS) + 0.0
        if isinstance(answer, Offer):
            return replace(answer, cost_usd=cost_usd, quantity=quantity)
        worth_usd = np.round(answer.worth_usd, USD_DIGITS) + 0.0
        return replace(answer, cost_usd=cost_usd, quantity=quantity, worth_usd=worth_usd)


def wholes(quantity: Vector, is_whole: NDArray[np.bool_]) -> list[Vector]:
    """What to try for quantities of which some are to be whole: nearest, and not above."""
    clean = np.where(quantity < DUST, 0.0, quantity)
    if not is_whole.any():
        return [clean]
    nearest = np.where(is_whole, np.rint(clean), clean)
    below = np.where(is_whole, np.floor(clean + DUST), clean)
    return [nearest] if (nearest == below).all() else [nearest, below]


def _firsts(lines: Sequence[Line]) -> list[int]:
    """The first of the lines of each outlet."""
    found = {(line.outlet, line.gives): n for n, line in reversed(list(enumerate(lines)))}
    return sorted(found.values())


def _names(lines: Sequence[Line], periods: int) -> list[str]:
    return [
        f"border: {line.good} {'out' if line.gives else 'in'}[{p}]"
        for line in lines
        for p in range(periods)
    ]


def _port(holding: Holding, line: Line) -> tuple[Port, float]:
    """The port of a line, and how many units of the border one of its own is."""
    outlet, role = line.outlet, "supply" if line.gives else "need"
    block = holding.blocks.get(outlet.member)
    ports = () if block is None else block.ports
    port = next((p for p in ports if p.name == outlet.port and p.role == role), None)
    if port is None:
        raise ScenarioError(
            Reason.UNKNOWN_VARIABLE,
            f"{outlet.member} has no port {outlet.port!r} of role {role} for {line.good}",
            {"good": line.good},
        )
    inside = (
        (c.source, c.output) if line.gives else (c.target, c.input) for c in holding.couplings
    )
    if (outlet.member, outlet.port) in inside:
        raise _bad(
            line, "is coupled to a member of the city: what is in use can't cross the border"
        )
    factor, offset = conversion(port.unit, line.unit)
    if offset or factor <= 0.0:
        text = f"{port.unit} is no measure of {line.good} in {line.unit}"
        raise ScenarioError(Reason.INCOMPATIBLE_UNITS, text, {"good": line.good})
    if outlet.entity and outlet.entity not in port.entities:
        raise _bad(line, f"has no entity {outlet.entity!r}")
    return port, factor


def _columns(joined: Joined, outlet: Outlet, port: Port) -> NDArray[np.int64]:
    """The columns of the joined problem, by entity and period."""
    first = joined.owners[outlet.member][0].start
    rows = [i for i, entity in enumerate(port.entities) if outlet.entity in ("", entity)]
    return np.asarray(port.columns[rows] + first, dtype=np.int64)


def _bad(line: Line, text: str) -> ScenarioError:
    place = f"{line.outlet.member}.{line.outlet.port}"
    return ScenarioError(
        Reason.SCENARIO_INVALID, f"{place}, for {line.good}, {text}", {"good": line.good}
    )
