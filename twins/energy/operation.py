"""Decides what a damaged grid can still serve, by the rules that a control room would follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import highspy
import numpy as np

from federation.twin import Vector
from twins.energy.network import Complex, Grid, Index
from twins.energy.powerflow import Island, Mask, Newton, live_parts

NOTHING, LOW_VOLTAGE, COLLAPSE, DARK, SCARCE = -1, -2, -3, -4, -5
"""Why a node is shed if it is not the branch of that number that was at its rating."""

TOLERATED_PU = 1e-6
"""A limit that is passed by less than this is kept."""
AIM = 0.002
"""Shedding aims at staying this part below a limit, so that the next power flow ends it."""
BLOCK = 0.1
"""The part of an island's load that goes at once when its power flow has no solution."""
BLOCKS, STEP = 4, 0.05
"""A load is shed in so many equal blocks; each counts that much more per megawatt than the one
before, so that loads that help equally well share the burden."""
WATCHED = 0.6
"""Branches above this part of their rating are looked at when shedding is planned."""
PATIENCE = 12
"""Rounds after which loads may only be cut further."""
LEAST = 1e-6
"""A smaller share of a load is none."""
HALVINGS = 8
"""How finely the export is found that an own load would not be shed for."""
UNLIMITED = float("inf")
CACHED_ANSWERS, CACHED_GRIDS = 3000, 256
"""A remembered answer takes about 2 kB, a remembered grid up to 150 kB."""


_threads = threading.local()


def _solver() -> highspy.Highs:
    """One per thread: making one costs as much as a small problem."""
    if not hasattr(_threads, "solver"):
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in (
            ("output_flag", False),
            ("presolve", "off"),
            ("solver", "simplex"),
            ("threads", 1),
        ):
            solver.setOptionValue(option, value)
        _threads.solver = solver
    known: highspy.Highs = _threads.solver
    return known


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator keeps: currents up to `emergency_rating` times the rating, and voltage."""

    emergency_rating: float = 1.0
    min_voltage_pu: float = 0.9


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is agreed with neighbours, per tie line: MW that come (positive) or go at a node.

    A converter ends each line, so the agreed power flows whatever the voltages are, and no
    reactive power does.
    """

    node: Index
    agreed_mw: Vector
    rating_mw: Vector


def _no_ties() -> Vector:
    return np.zeros(0)


@dataclass(frozen=True, slots=True)
class Operation:
    """How a grid is run: the served share of the demand at every node, and the power balance.

    `part` numbers the connected part that a node belongs to; `reason` is the branch at its
    rating that caused the shedding there, or one of the constants above. Supply, losses and
    served load are megawatts: supply = served + losses up to the solver's tolerance, and supply
    is what infeeds give and tie lines bring, less what these take away.

    Per tie line: what flows (`tie_mw`, negative: away), what its part of the grid would take of
    it (`tie_need_mw`), what it could give without an own load going short (`tie_spare_mw`).
    """

    share: Vector
    part: Index
    reason: Index
    supply_mw: float
    losses_mw: float
    served_mw: float
    power_flows: int
    tie_mw: Vector = field(default_factory=_no_ties)
    tie_need_mw: Vector = field(default_factory=_no_ties)
    tie_spare_mw: Vector = field(default_factory=_no_ties)

    @property
    def drawn_mw(self) -> float:
        """What the infeeds of the grid give."""
        return self.supply_mw - float(self.tie_mw.sum())


@dataclass(frozen=True, slots=True)
class _Supply:
    """The same for the nodes of one island (slack left out)."""

    share: Vector
    reason: Index
    supply_mw: float
    losses_mw: float
    served_mw: float
    power_flows: int


class ControlRoom:
    """Runs one grid. What it answers depends on its arguments only, so it remembers answers."""

    def __init__(self, grid: Grid, newton: Newton) -> None:
        self.grid = grid
        self.newton = newton
        self.infeed_mw = _infeed_ratings_mw(grid)
        self._islands: dict[bytes, Island] = {}
        self._parts: dict[bytes, tuple[Index, Sequence[tuple[bytes, Island]]]] = {}
        self._supplies: dict[tuple[bytes, bytes, Limits, bytes, float], _Supply] = {}

    def operate(
        self,
        branch_on: Mask,
        infeed_on: Mask,
        demand_mva: Complex,
        limits: Limits,
        exchange: Exchange | None = None,
    ) -> Operation:
        """Serve `demand_mva` (per node, constant power) as far as the limits allow.

        What is agreed to come over a tie line is given at its node, but no more than the part
        of the grid there wants; a part without an infeed lives on the tie line alone, as far as
        that goes. What is agreed to go is taken after all own loads, and leaves the largest
        infeed as a reserve.
        """
        part, islands = self._topology(branch_on, infeed_on)
        day = _Day(self.grid, part)
        ties = None if exchange is None else _Ties(self, exchange, part, infeed_on, limits)
        for key, island in islands:
            if ties is None:
                day.add(island, demand_mva, self._served(key, island, demand_mva, limits))
            else:
                ties.run(day, key, island, demand_mva)
        if ties is not None:
            ties.run_alone(day, branch_on, demand_mva)
            return ties.told(day, demand_mva)
        return day.operation()

    def _served(
        self,
        key: bytes,
        island: Island,
        demand_mva: Complex,
        limits: Limits,
        given_mw: Vector | None = None,
        most_mw: float = UNLIMITED,
    ) -> _Supply:
        """How an island is served; `given_mw` is per node of the grid."""
        demand = demand_mva[island.nodes]
        given = None if given_mw is None else given_mw[island.nodes]
        if given is not None and not given.any():
            given = None
        case = (key, demand.tobytes(), limits, b"" if given is None else given.tobytes(), most_mw)
        result = self._supplies.get(case)
        if result is None:
            if len(self._supplies) >= CACHED_ANSWERS:
                self._supplies.clear()
            result = _serve(island, demand, limits, self.newton, given, most_mw)
            self._supplies[case] = result
        return result

    def _topology(
        self, branch_on: Mask, infeed_on: Mask
    ) -> tuple[Index, Sequence[tuple[bytes, Island]]]:
        key = np.packbits(branch_on).tobytes() + np.packbits(infeed_on).tobytes()
        known = self._parts.get(key)
        if known is None:
            if len(self._parts) >= CACHED_GRIDS:
                self._parts.clear()
                self._islands.clear()
            part, fed = live_parts(self.grid, branch_on, infeed_on)
            islands = []
            for nodes, branches, infeed_nodes in fed:
                name = branches.tobytes() + b"|" + infeed_nodes.tobytes()
                islands.append((name, self._island(name, nodes, branches, infeed_nodes)))
            known = self._parts[key] = (part, islands)
        return known

    def _island(self, name: bytes, nodes: Index, branches: Index, infeed_nodes: Index) -> Island:
        if name not in self._islands:
            self._islands[name] = Island(self.grid, nodes, branches, infeed_nodes)
        return self._islands[name]


def _infeed_ratings_mw(grid: Grid) -> Vector:
    """Per infeed the rating of all branches at its node, as if all of it were active power."""
    at = [(grid.from_node == node) | (grid.to_node == node) for node in grid.infeed_node.tolist()]
    return np.array([float(grid.rating_pu[branches].sum()) * grid.base_mva for branches in at])


class _Day:
    """An operation in the making, island by island."""

    def __init__(self, grid: Grid, part: Index) -> None:
        self.part = part
        self.share = np.zeros(grid.nodes)
        self.reason = np.full(grid.nodes, DARK, dtype=np.int64)
        self.supply_mw = self.losses_mw = self.served_mw = 0.0
        self.power_flows = 0

    def add(self, island: Island, demand_mva: Complex, result: _Supply) -> None:
        """Take in an island whose infeeds give as much as is wanted at their own nodes."""
        self.power_flows += result.power_flows
        self.share[island.nodes] = result.share
        self.reason[island.nodes] = result.reason
        # a load at the infeed itself hangs on no branch
        self.share[island.infeed_nodes] = 1.0
        self.reason[island.infeed_nodes] = NOTHING
        at_infeed_mw = float(demand_mva[island.infeed_nodes].real.sum())
        self.supply_mw += result.supply_mw + at_infeed_mw
        self.served_mw += result.served_mw + at_infeed_mw
        self.losses_mw += result.losses_mw

    def operation(self) -> Operation:
        return Operation(
            self.share,
            self.part,
            self.reason,
            self.supply_mw,
            self.losses_mw,
            self.served_mw,
            self.power_flows,
        )


class _Ties:
    """What the tie lines of a grid do while it is run."""

    def __init__(
        self, room: ControlRoom, exchange: Exchange, part: Index, infeed_on: Mask, limits: Limits
    ) -> None:
        self.room, self.exchange, self.limits = room, exchange, limits
        self.agreed_mw = np.clip(exchange.agreed_mw, -exchange.rating_mw, exchange.rating_mw)
        self.part, self.tie_part = part, part[exchange.node]
        self.infeed_on = infeed_on
        self.flow_mw = np.zeros(exchange.node.size)
        self.spare_mw = np.zeros(exchange.node.size)
        self.fed: set[int] = set()

    def run(self, day: _Day, key: bytes, island: Island, demand_mva: Complex) -> None:
        """Run a part of the grid that has infeeds."""
        label = int(self.part[island.infeed_nodes[0]])
        self.fed.add(label)
        here = self.tie_part == label
        if not here.any():
            served = self.room._served(key, island, demand_mva, self.limits)
            day.add(island, demand_mva, served)
            return
        coming = np.where(here, np.maximum(self.agreed_mw, 0.0), 0.0)
        wanted_mw = self._wanted_mw(island, demand_mva)
        if coming.sum() > wanted_mw:
            coming *= wanted_mw / coming.sum()
        flow = coming
        served = self._served(key, island, demand_mva, flow)
        at_infeed_mw = float(demand_mva[island.infeed_nodes].real.sum())
        given_there = self._at(flow, island.infeed_nodes)
        drawn_mw = served.supply_mw + at_infeed_mw - given_there
        spare_mw = max(0.0, self._capability_mw(label) - drawn_mw)
        self.spare_mw[here] = np.minimum(spare_mw, self.exchange.rating_mw[here])
        going = np.where(here, np.minimum(self.agreed_mw, 0.0), 0.0)
        if -going.sum() > spare_mw:
            going *= spare_mw / -going.sum()
        if going.any():
            own_mw = served.served_mw
            low, high = 0.0, 1.0
            for attempt in range(HALVINGS + 1):
                factor = high if attempt == 0 else 0.5 * (low + high)
                trial = self._served(key, island, demand_mva, coming + factor * going)
                if trial.served_mw >= own_mw - TOLERATED_PU * max(own_mw, 1.0):
                    low, flow, served = factor, coming + factor * going, trial
                    if factor == 1.0:
                        break
                else:
                    high = factor
        self.flow_mw[here] = flow[here]
        day.add(island, demand_mva, served)
        # what is given inside counts as supply; at an infeed's own node it spares the infeed
        day.supply_mw += float(flow.sum()) - self._at(flow, island.infeed_nodes)

    def run_alone(self, day: _Day, branch_on: Mask, demand_mva: Complex) -> None:
        """Let parts of the grid without an infeed live on what comes over their tie lines."""
        grid = self.room.grid
        for label in dict.fromkeys(self.tie_part.tolist()):
            coming = np.where(self.tie_part == label, np.maximum(self.agreed_mw, 0.0), 0.0)
            if label in self.fed or not coming.any():
                continue
            nodes = np.flatnonzero(self.part == label)
            branches = np.flatnonzero(branch_on & (self.part[grid.from_node] == label))
            wanted_mw = float(demand_mva[nodes].real.sum())
            if wanted_mw <= 0.0:
                continue
            # the strongest line holds the voltage, the others give what is agreed
            slack = int(np.argmax(coming))
            others = coming.copy()
            others[slack] = 0.0
            if others.sum() > 0.5 * wanted_mw:
                others *= 0.5 * wanted_mw / others.sum()
            at = int(self.exchange.node[slack])
            key = b"tie|" + branches.tobytes() + b"|" + np.int64(at).tobytes()
            island = self.room._island(key, nodes, branches, np.array([at], dtype=np.int64))
            own_mw = float(demand_mva[at].real)
            own_share = min(1.0, coming[slack] / own_mw) if own_mw > 0.0 else 1.0
            most_mw = float(coming[slack]) - own_mw * own_share
            served = self._served(key, island, demand_mva, others, most_mw)
            scaled = demand_mva.copy()
            scaled[at] *= own_share
            day.add(island, scaled, served)
            day.share[at] = own_share
            day.reason[at] = NOTHING if own_share == 1.0 else SCARCE
            inside_mw = float(others.sum()) - self._at(others, island.infeed_nodes)
            day.supply_mw += inside_mw
            self.flow_mw += others
            self.flow_mw[slack] = (
                served.supply_mw + own_mw * own_share - self._at(others, island.infeed_nodes)
            )

    def told(self, day: _Day, demand_mva: Complex) -> Operation:
        """The operation with what its tie lines did, need and could do."""
        unserved_mw = demand_mva.real * (1.0 - day.share)
        need = [
            float(unserved_mw[self.part == label].sum()) + max(float(flow_mw), 0.0)
            for label, flow_mw in zip(self.tie_part, self.flow_mw, strict=True)
        ]
        need_mw = np.minimum(np.array(need), self.exchange.rating_mw)
        return replace(
            day.operation(),
            tie_mw=self.flow_mw,
            tie_need_mw=need_mw,
            tie_spare_mw=self.spare_mw,
        )

    def _served(
        self,
        key: bytes,
        island: Island,
        demand_mva: Complex,
        flow_mw: Vector,
        most_mw: float = UNLIMITED,
    ) -> _Supply:
        given = np.zeros(self.room.grid.nodes)
        np.add.at(given, self.exchange.node, flow_mw)
        return self.room._served(key, island, demand_mva, self.limits, given, most_mw)

    def _at(self, flow_mw: Vector, nodes: Index) -> float:
        """What comes at some nodes."""
        return float(flow_mw[np.isin(self.exchange.node, nodes)].sum())

    def _wanted_mw(self, island: Island, demand_mva: Complex) -> float:
        nodes = np.concatenate([island.infeed_nodes, island.nodes])
        return float(demand_mva[nodes].real.sum())

    def _capability_mw(self, label: int) -> float:
        """What the infeeds of a part give together within their ratings without the largest."""
        grid = self.room.grid
        on = self.infeed_on & (self.part[grid.infeed_node] == label)
        each = self.room.infeed_mw[on] * self.limits.emergency_rating
        return float(each.sum() - each.max())


def _serve(
    island: Island,
    demand_mva: Complex,
    limits: Limits,
    newton: Newton,
    given_mw: Vector | None = None,
    most_mw: float = UNLIMITED,
) -> _Supply:
    r"""Serve an island within its limits with the least shedding, spread over equals.

    `given_mw` comes at its nodes from outside (negative: goes there), whatever is served; the
    infeed gives `most_mw` at most, which is a limit like the others: a cut of a megawatt spares
    it a megawatt.

    Rounds of: AC power flow with the shares x; currents and voltages linearised around it
    (loads as constant currents); the cuts u = 1 - x that the linear limits ask for at least

    .. math:: \min \sum_n p_n \sum_k (1 + STEP \cdot k) \, b_{nk} / BLOCKS, \quad
              u_n = \sum_k b_{nk} / BLOCKS, \quad 0 \le b_{nk} \le 1.

    So loads that relieve the same limit equally well, as all behind a radial branch do,
    are cut alike to within a block. A load cut to nothing stays so. The first shares whose
    power flow keeps every limit are taken. Where a power flow has no solution, or no cut is
    enough by the linear account, no load of the island gets more than (1 - BLOCK) of that
    trial from then on.
    """
    grid, branches, size = island.grid, island.branches, island.nodes.size
    rating = grid.rating_pu[branches] * limits.emergency_rating
    y_ff, y_ft, y_tf, y_tt = (y[branches] for y in (grid.y_ff, grid.y_ft, grid.y_tf, grid.y_tt))
    loads = np.flatnonzero(demand_mva.real > 0.0)
    share = np.ones(size)
    ceiling = np.ones(size)
    reason = np.full(size, NOTHING, dtype=np.int64)
    rounds = 0
    while True:
        rounds += 1
        injection = -demand_mva * share
        v = island.solve(injection if given_mw is None else injection + given_mw, newton)
        if v is None:
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
            share = ceiling.copy()
            reason[loads[reason[loads] == NOTHING]] = COLLAPSE
            continue
        at_from = y_ff * v[island.f] + y_ft * v[island.t]
        at_to = y_tf * v[island.f] + y_tt * v[island.t]
        current = np.maximum(np.abs(at_from), np.abs(at_to))
        volts = np.abs(v[1:])
        infeed_mw = 0.0 if most_mw == UNLIMITED else _from_infeed_mw(island, v, at_from, at_to)
        broken = bool((current > rating * (1.0 + TOLERATED_PU)).any()) or bool(
            (volts[loads][share[loads] > 0.0] < limits.min_voltage_pu - TOLERATED_PU).any()
        )
        broken = broken or infeed_mw > most_mw * (1.0 + TOLERATED_PU)
        if not broken or not (share[loads] > 0.0).any():
            break
        if rounds > PATIENCE:
            # from here on loads only go, so that it ends; an island without load breaks no limit
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
        near = np.flatnonzero(current > WATCHED * rating)
        # an empty node has no voltage to keep, if it stays empty
        ceiling[share <= LEAST] = 0.0
        live = loads[share[loads] > LEAST]
        weak = live[volts[live] < limits.min_voltage_pu + 0.05]
        drawn = np.conj(demand_mva[loads] / v[1:][loads]) / grid.base_mva
        per_volt, per_current = island.sensitivity(loads)
        by_cut = np.concatenate(
            [
                -_along(at_from[near], per_current[near] * drawn),
                _along(v[1:][weak], per_volt[weak] * drawn),
            ]
        )
        room = np.concatenate(
            [
                rating[near] * (1.0 - AIM) - current[near],
                volts[weak] - limits.min_voltage_pu * (1.0 + AIM),
            ]
        )
        if most_mw != UNLIMITED:
            by_cut = np.concatenate([by_cut, demand_mva[loads].real[None, :]])
            room = np.append(room, most_mw * (1.0 - AIM) - infeed_mw)
        needed = by_cut @ (1.0 - share[loads]) - room
        least = 1.0 - ceiling[loads]
        plan = _least_shedding(by_cut, needed, demand_mva[loads].real, least)
        if plan is None:
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
            share = ceiling.copy()
            continue
        cut, price = plan
        share[loads] = np.where(1.0 - cut > LEAST, 1.0 - cut, 0.0)
        names = np.concatenate([branches[near], np.full(weak.size, LOW_VOLTAGE)])
        if most_mw != UNLIMITED:
            names = np.append(names, SCARCE)
        if price.any():
            blame = by_cut * price[:, None]
            shed = cut > LEAST
            reason[loads[shed]] = names[np.argmax(blame, axis=0)][shed]
    flow_f = v[island.f] * np.conj(at_from)
    flow_t = v[island.t] * np.conj(at_to)
    own = np.concatenate([island.infeed_nodes, island.nodes])
    level = np.abs(np.concatenate([np.full(island.infeed_nodes.size, v[0]), v[1:]])) ** 2
    shunt_pu = float(level @ grid.y_shunt[own].real)
    return _Supply(
        share=share,
        reason=np.where(share < 1.0, reason, NOTHING),
        supply_mw=_from_infeed_mw(island, v, at_from, at_to),
        losses_mw=(float((flow_f + flow_t).real.sum()) + shunt_pu) * grid.base_mva,
        served_mw=float((demand_mva.real * share).sum()),
        power_flows=rounds,
    )


def _from_infeed_mw(island: Island, v: Complex, at_from: Complex, at_to: Complex) -> float:
    """What the infeeds give, from the voltages and the currents at both ends of branches."""
    flow_f = v[island.f] * np.conj(at_from)
    flow_t = v[island.t] * np.conj(at_to)
    given = float((flow_f[island.f == 0].sum() + flow_t[island.t == 0].sum()).real)
    given += float(abs(v[0]) ** 2 * island.grid.y_shunt[island.infeed_nodes].real.sum())
    return given * island.grid.base_mva


def _along(phasors: Complex, changes: Complex) -> Vector:
    """What small changes (one row per phasor) add to the size of each phasor."""
    direction = np.conj(phasors) / np.maximum(np.abs(phasors), 1e-12)
    return np.asarray((changes * direction[:, None]).real, dtype=np.float64)


def _least_shedding(
    by_cut: Vector, needed: Vector, power_mw: Vector, least: Vector
) -> tuple[Vector, Vector] | None:
    """Cuts u >= least with `by_cut` u >= `needed` that shed least, and the price per limit.

    Every load is cut in BLOCKS equal blocks, each dearer per megawatt than the one before
    by STEP, so that loads that help equally well share. None if no cut satisfies all.
    """
    limits, loads = by_cut.shape
    columns = BLOCKS * loads
    cost = np.concatenate([power_mw * (1.0 + STEP * k) / BLOCKS for k in range(BLOCKS)])
    low = np.clip(np.concatenate([least * BLOCKS - k for k in range(BLOCKS)]), 0.0, 1.0)
    scale = np.maximum(np.abs(by_cut).max(axis=1, initial=0.0), 1e-9)
    rows = np.tile(by_cut / scale[:, None] / BLOCKS, (1, BLOCKS))
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, limits
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, low, np.ones(columns)
    model.row_lower_, model.row_upper_ = needed / scale, np.full(limits, np.inf)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.arange(limits + 1) * columns
    model.a_matrix_.index_ = np.tile(np.arange(columns), limits)
    model.a_matrix_.value_ = rows.ravel()
    solver = _solver()
    # a basis left from another problem would make bits depend on history
    solver.clearModel()
    solver.passModel(model)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = solver.getSolution()
    blocks = np.clip(np.array(solution.col_value), 0.0, 1.0).reshape(BLOCKS, loads)
    return blocks.sum(axis=0) / BLOCKS, np.maximum(np.array(solution.row_dual), 0.0) / scale
