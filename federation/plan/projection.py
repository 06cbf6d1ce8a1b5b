r"""Makes of an owner's blocks one that shows nobody more than some ports: the owner's own model is
asked what it can do there and what that costs, and only the answers go out.

With X what the owner can do at cost c x, and y the quantities at the ports that may be seen, the
owner's cost of the boundary

.. math::
    V(y) = \min \{ c x : x \in X, \; B x = y \}

is convex. Every point (y_k, V(y_k)) that goes out was found by solving the owner's model, so with
shares \lambda_k \ge 0 that sum to 1 the mix \sum \lambda_k y_k can be done, for \sum \lambda_k
V(y_k) at the most (Dantzig and Wolfe, Operations Research 8, 1960; here the columns are made
beforehand, for prices that nobody has asked yet). Quantities that share no row within the owner
are mixed apart: of a model without stores or ramps each period is a curve of its own.

What is lost: whatever lies outside the mixes of the points that were found. Of one quantity that is
nothing but what a step or `TOLERANCE` hides. Of several that depend on each other, such as the
periods of a store, the points are those that the owner would choose at `PROBES` prices, and a plan
may be kept from what lies between them. Columns that must be whole are as in the plan that the
owner would make alone. What the owner spends when nothing crosses is not told: costs count from
there.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason, TwinError
from federation.plan.engine import UNIT_USD, engine_of, make_whole, optimum_usd
from federation.plan.joining import Indices, Joined, join
from federation.plan.owner import independent
from federation.twin import LinearBlock, Port, Vector

POINTS = 24
"""At most so many points tell of one quantity that depends on no other."""

PROBES = 192
"""At so many prices quantities are asked for that depend on each other."""

TOLERANCE = 1e-3
"""Where the curve between two points is below their chord by less than this share of all that it
rises, it is told as the chord."""

NODES = 200
"""In so many nodes whole numbers are looked for. What is found by then counts."""

SNAP = 1e-6
"""By what share of a step a quantity may miss a multiple of it: the last digits of a solver."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A port as it may be seen: under another name, some entities of it or sums of them.

    Entity i of those that are told stands for the sum over the rows `groups[i]` of the port.
    Quantities are told in multiples of `step`; within a window (`windows[p]` for period p) they do
    not change.
    """

    member: str
    port: str
    name: str
    kind: str
    entities: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    windows: tuple[int, ...]
    step: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """Quantities that the owner can have at the boundary together, and what that costs it."""

    quantity: Vector
    usd: float


def project(
    blocks: Mapping[str, LinearBlock],
    couplings: Sequence[Coupling],
    edges: Sequence[Edge],
    doc: str = "",
) -> LinearBlock | None:
    """What the owner of the blocks could do at these edges; None when that is nothing.

    The ports of the answer are supply and need ports with the names of the edges. Fails with
    PLAN_INFEASIBLE when the blocks contradict each other, with NO_PLAN when the solver has no
    answer, and with INVALID_BLOCK when a port that may be seen has no bounds.
    """
    if not edges:
        return None
    joined = join(blocks, couplings)
    ports = {edge: _port(blocks, edge) for edge in edges}
    problem, quantities = _with_boundary(_without_fixed(joined), ports)
    group = independent(problem)
    parts: list[tuple[Indices, list[Point]]] = []
    steps = np.array([np.nan if q.step is None else q.step for q in quantities])
    first = len(joined.low)
    of_part = group[first:]
    for number in np.unique(of_part):
        places = np.flatnonzero(of_part == number)
        part = _Part(_restricted(problem, group == number), places.size)
        points = _curve(part, steps[places][0]) if places.size == 1 else _mix(part, steps[places])
        if not points:
            return None
        parts.append((places, points))
    return _block(ports, quantities, parts, doc)


def _without_fixed(joined: Joined) -> Joined:
    """The problem with what can't move in the limits of its rows, so that it joins nothing."""
    entries = joined.low[joined.column_index] == joined.high[joined.column_index]
    shift = np.bincount(
        joined.row_index[entries],
        joined.coefficient[entries] * joined.low[joined.column_index[entries]],
        len(joined.row_low),
    )
    return replace(
        joined,
        row_low=joined.row_low - shift,
        row_high=joined.row_high - shift,
        row_index=joined.row_index[~entries],
        column_index=joined.column_index[~entries],
        coefficient=joined.coefficient[~entries],
    )


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One number at the boundary: an entity of an edge, throughout a window."""

    edge: Edge
    entity: int
    window: int
    step: float | None


def _port(blocks: Mapping[str, LinearBlock], edge: Edge) -> tuple[str, Port]:
    block = blocks[edge.member]
    port = next(p for p in block.ports if p.name == edge.port and p.role in ("supply", "need"))
    rows = sorted({row for group in edge.groups for row in group})
    columns = port.columns[rows]
    for column in columns.ravel():
        if not np.isfinite(block.high[column] - block.low[column]):
            raise TwinError(
                Reason.INVALID_BLOCK,
                f"the port {port.name} of {edge.member} has no bounds, and can't be offered",
                {"member": edge.member},
            )
    return edge.member, port


def _with_boundary(
    joined: Joined, ports: Mapping[Edge, tuple[str, Port]]
) -> tuple[Joined, list[_Quantity]]:
    """The problem with a column per quantity at the boundary, after all others."""
    quantities: list[_Quantity] = []
    low: list[float] = []
    high: list[float] = []
    terms: list[tuple[int, int, float]] = []
    width, height = len(joined.low), len(joined.row_low)
    rows = 0
    for edge, (member, port) in ports.items():
        at = port.columns + joined.owners[member][0].start
        for entity, group in enumerate(edge.groups):
            for window in dict.fromkeys(edge.windows):
                column = width + len(quantities)
                quantities.append(_Quantity(edge, entity, window, edge.step))
                periods = [p for p, w in enumerate(edge.windows) if w == window]
                low.append(max(float(joined.low[at[list(group), p]].sum()) for p in periods))
                high.append(min(float(joined.high[at[list(group), p]].sum()) for p in periods))
                for p in periods:
                    row = height + rows
                    rows += 1
                    terms.append((row, column, -1.0))
                    terms += [(row, int(at[e, p]), 1.0) for e in group]
    count = len(quantities)
    zero = np.zeros(rows)
    boundary = replace(
        joined,
        low=np.append(joined.low, low),
        high=np.append(joined.high, high),
        cost=np.append(joined.cost, np.zeros(count)),
        integer=np.append(joined.integer, np.zeros(count, np.bool_)),
        row_low=np.append(joined.row_low, zero),
        row_high=np.append(joined.row_high, zero),
        row_index=np.append(joined.row_index, [t[0] for t in terms]).astype(np.int64),
        column_index=np.append(joined.column_index, [t[1] for t in terms]).astype(np.int64),
        coefficient=np.append(joined.coefficient, [t[2] for t in terms]),
    )
    return boundary, quantities


def _restricted(problem: Joined, kept: NDArray[np.bool_]) -> Joined:
    """The part of a problem in these columns, which share no row with others."""
    entries = kept[problem.column_index]
    rows = np.unique(problem.row_index[entries])
    new_row = np.zeros(len(problem.row_low), np.int64)
    new_row[rows] = np.arange(rows.size)
    new_column = np.cumsum(kept) - 1
    return replace(
        problem,
        low=problem.low[kept],
        high=problem.high[kept],
        cost=problem.cost[kept],
        integer=problem.integer[kept],
        row_low=problem.row_low[rows],
        row_high=problem.row_high[rows],
        row_index=new_row[problem.row_index[entries]],
        column_index=new_column[problem.column_index[entries]],
        coefficient=problem.coefficient[entries],
        available={},
        columns=(),
        rows=(),
        crossings=(),
        owners={},
    )


class _Part:
    """One part of the owner's model, whose last columns are its quantities at the boundary."""

    def __init__(self, problem: Joined, count: int) -> None:
        width = len(problem.low)
        self.low, self.high = problem.low[-count:], problem.high[-count:]
        self._cost = problem.cost
        self._at = np.arange(width - count, width, dtype=np.int32)
        self._engine = engine_of(problem)
        self._settle_whole(problem)

    def _settle_whole(self, problem: Joined) -> None:
        """Give columns that must be whole the values of the plan that the owner would make."""
        whole = np.flatnonzero(problem.integer).astype(np.int32)
        if not whole.size:
            return
        engine = self._engine
        make_whole(engine, whole.astype(np.int64))
        engine.setOptionValue("mip_max_nodes", NODES)
        engine.run()
        status = engine.getInfo().primal_solution_status
        if status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise PlanError(Reason.NO_PLAN, "no plan in whole numbers was found for the offer")
        values = np.rint(np.array(engine.getSolution().col_value)[whole])
        make_whole(engine, whole.astype(np.int64), whole=False)
        engine.changeColsBounds(whole.size, whole, values, values)
        engine.clearSolver()

    def choice(self, usd: Vector, low: Vector | None = None, high: Vector | None = None) -> Vector:
        """What the owner would choose, within limits, if each unit of its quantities cost this."""
        self._limit(self.low if low is None else low, self.high if high is None else high)
        self._charge(usd)
        optimum_usd(self._engine)
        return self._told()

    def furthest(self, weight: Vector) -> Vector:
        """Quantities whose weighed sum is as small as can be, whatever that costs."""
        self._limit(self.low, self.high)
        every = np.arange(len(self._cost), dtype=np.int32)
        cost = np.zeros(len(self._cost))
        cost[self._at] = weight
        self._engine.changeColsCost(every.size, every, cost)
        try:
            optimum_usd(self._engine)
            return self._told()
        finally:
            self._engine.changeColsCost(every.size, every, self._cost / UNIT_USD)

    def point(self, quantity: Vector) -> tuple[Point, Vector] | None:
        """What just these quantities cost, and what one unit more of each would; None when they
        can't be had together."""
        self._limit(quantity, quantity)
        self._charge(np.zeros(quantity.size))
        try:
            usd = optimum_usd(self._engine)
        except PlanError as error:
            if error.reason is not Reason.PLAN_INFEASIBLE:
                raise
            self._engine.clearSolver()
            return None
        marginal = np.array(self._engine.getSolution().col_dual)[self._at] * UNIT_USD
        return Point(quantity, usd), marginal

    def _limit(self, low: Vector, high: Vector) -> None:
        self._engine.changeColsBounds(self._at.size, self._at, low, high)

    def _charge(self, usd: Vector) -> None:
        self._engine.changeColsCost(self._at.size, self._at, usd / UNIT_USD)

    def _told(self) -> Vector:
        return np.array(self._engine.getSolution().col_value)[self._at]


def _curve(part: _Part, step: float) -> list[Point]:
    """The points of one quantity: its ends, where nothing crosses, and where the curve bends."""
    low = float(part.furthest(np.ones(1))[0])
    high = float(part.furthest(-np.ones(1))[0])
    if not np.isnan(step):
        low, high = np.ceil(low / step - SNAP) * step, np.floor(high / step + SNAP) * step
        if low > high:
            return []
    found: dict[float, Point] = {}

    def look(at: float) -> list[Point]:
        """Have the points at a quantity, or at the steps on both sides of it."""
        sides = {at} if np.isnan(step) else {np.floor(at / step) * step, np.ceil(at / step) * step}
        told = []
        for side in sorted(float(min(max(side, low), high)) + 0.0 for side in sides):
            if side not in found:
                if (known := part.point(np.array([side]))) is None:
                    continue
                found[side] = known[0]
            told.append(found[side])
        return told

    for at in (low, high, *([0.0] if low <= 0.0 <= high else ())):
        look(at)
    look(float(part.choice(np.zeros(1))[0]))
    known = sorted(found)
    spans = [(-np.inf, a, b) for a, b in pairwise(known)]
    while spans and len(found) < POINTS:
        _, a, b = heapq.heappop(spans)
        slope = (found[b].usd - found[a].usd) / (b - a)
        bend = float(part.choice(np.array([-slope]), np.array([a]), np.array([b]))[0])
        inner = [p for p in look(bend) if a < p.quantity[0] < b]
        below = [found[a].usd + slope * (float(p.quantity[0]) - a) - p.usd for p in inner]
        if not below or max(below) <= TOLERANCE * _rise(found):
            continue
        for c, d in pairwise([a, *(float(p.quantity[0]) for p in inner), b]):
            heapq.heappush(spans, (-max(below), c, d))
    return _counted([found[at] for at in sorted(found)])


def _rise(found: Mapping[float, Point]) -> float:
    costs = [point.usd for point in found.values()]
    return max(costs) - min(costs)


def _mix(part: _Part, steps: Vector) -> list[Point]:
    """Points of quantities that depend on each other: what is the least and the most of each and
    of all, nothing at all, and what the owner would choose at prices between those at which it
    was seen to change its mind."""
    count = steps.size
    found: dict[tuple[float, ...], Point] = {}
    marginal: list[set[float]] = [{0.0} for _ in range(count)]

    def look(quantity: Vector) -> None:
        for way in (np.rint, np.floor, np.ceil):
            at = np.where(np.isnan(steps), quantity, way(quantity / steps) * steps) + 0.0
            key = tuple(np.round(at, 9).tolist())
            if key in found:
                return
            told = part.point(at)
            if told is not None:
                found[key] = told[0]
                for seen, usd in zip(marginal, told[1].tolist(), strict=True):
                    seen.add(float(np.round(usd, 6)))
                return

    look(np.zeros(count))
    look(part.choice(np.zeros(count)))
    for weight in (*np.eye(count), np.ones(count)):
        for sign in (1.0, -1.0):
            end = part.furthest(sign * weight)
            held = weight > 0.0
            # the rest as is best for the owner
            low = np.where(held, end, part.low)
            high = np.where(held, end, part.high)
            look(part.choice(np.zeros(count), low, high))
    spread = qmc.Halton(count, scramble=False)
    spread.fast_forward(1)
    for share in spread.random(PROBES):
        usd = [_between(sorted(seen), s) for seen, s in zip(marginal, share, strict=True)]
        look(part.choice(-np.array(usd)))
    return _counted(list(found.values()))


def _between(levels: Sequence[float], share: float) -> float:
    """A price between two that are next to each other, or beyond the last, by a number in 0..1."""
    ends = [2.0 * levels[0] - 1.0, *levels, 2.0 * levels[-1] + 1.0]
    cell = min(int(share * (len(ends) - 1)), len(ends) - 2)
    return 0.5 * (ends[cell] + ends[cell + 1])


def _counted(points: list[Point]) -> list[Point]:
    """The points with their costs counted from where nothing crosses; else from the cheapest."""
    if not points:
        return []
    still = [p.usd for p in points if not p.quantity.any()]
    base = still[0] if still else min(p.usd for p in points)
    return [Point(p.quantity, p.usd - base) for p in points]


def _block(
    ports: Mapping[Edge, tuple[str, Port]],
    quantities: Sequence[_Quantity],
    parts: Sequence[tuple[Indices, list[Point]]],
    doc: str,
) -> LinearBlock:
    """The block of the mixes."""
    names: list[str] = []
    low: list[float] = []
    high: list[float] = []
    cost: list[float] = []
    rows: list[str] = []
    bound: list[float] = []
    terms: list[tuple[int, int, float]] = []
    shares: dict[int, list[tuple[int, float]]] = {}
    """Per quantity the shares that make it, and how much of it each does."""
    for number, (places, points) in enumerate(parts):
        row = len(rows)
        rows.append(f"offer {number} is one mix of what can be had")
        bound.append(1.0)
        for k, point in enumerate(points):
            column = len(names)
            names.append(f"offer {number}, point {k}")
            low.append(0.0)
            high.append(1.0)
            cost.append(point.usd)
            terms.append((row, column, 1.0))
            for place, amount in zip(places.tolist(), point.quantity.tolist(), strict=True):
                shares.setdefault(place, []).append((column, amount))
    place_of = {(q.edge, q.entity, q.window): i for i, q in enumerate(quantities)}
    told: list[Port] = []
    for edge, (_, port) in ports.items():
        columns = np.zeros((len(edge.entities), len(edge.windows)), np.int64)
        for i, entity in enumerate(edge.entities):
            for period, window in enumerate(edge.windows):
                made_of = shares[place_of[edge, i, window]]
                columns[i, period] = len(names)
                row, called = len(rows), f"{edge.name}[{entity},{period}]"
                terms.append((row, len(names), 1.0))
                terms += [(row, column, -amount) for column, amount in made_of if amount]
                names.append(called)
                low.append(min(amount for _, amount in made_of))
                high.append(max(amount for _, amount in made_of))
                cost.append(0.0)
                rows.append(f"{called} is what the offers make it")
                bound.append(0.0)
        told.append(Port(edge.name, port.role, edge.kind, port.unit, edge.entities, columns))
    sides = np.array(bound)
    return LinearBlock(
        columns=tuple(names),
        low=np.array(low),
        high=np.array(high),
        cost=np.array(cost),
        integer=np.zeros(len(names), np.bool_),
        rows=tuple(rows),
        row_low=sides,
        row_high=sides.copy(),
        row_index=np.array([t[0] for t in terms], np.int64),
        column_index=np.array([t[1] for t in terms], np.int64),
        coefficient=np.array([t[2] for t in terms], np.float64),
        ports=tuple(told),
        doc=doc,
    )
