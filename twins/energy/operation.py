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
SPILT, FAR, VITAL = 0.01, 0.02, 10.0
UNLIMITED = float("inf")
USUAL_LOSS, UNBALANCED, DISPATCHES = 0.02, 0.02, 3
"""Losses over load where a dispatch begins; by how much of what plants can give the balancing one
may be off its share; how often the dispatch is found again for that."""
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
    """What an operator keeps: currents up to `emergency_rating` times the rating, and voltage.

    Where infeeds can't give what is wanted, nodes with vital loads keep their last block as long
    as others have one, if `vital_last`.
    """

    emergency_rating: float = 1.0
    min_voltage_pu: float = 0.9
    vital_last: bool = False


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
class Supply:
    """The same for the nodes of one island (slack left out).

    `taken` is the part that was taken of what came from outside at each node.
    """

    share: Vector
    reason: Index
    supply_mw: float
    losses_mw: float
    served_mw: float
    power_flows: int
    taken: Vector
    is_solved: bool = True


class ControlRoom:
    """Runs one grid. What it answers depends on its arguments only, so it remembers answers."""

    def __init__(self, grid: Grid, newton: Newton, vital: Sequence[int] = ()) -> None:
        """`vital` are the nodes of hospitals and pumps."""
        self.grid = grid
        self.newton = newton
        self.vital = np.isin(np.arange(grid.nodes), vital)
        self.infeed_mw = _infeed_ratings_mw(grid)
        self._islands: dict[bytes, Island] = {}
        self._plants: dict[bytes, tuple[int, Index]] = {}
        """Per island that plants feed: the one that balances it, and the others."""
        self._parts: dict[bytes, tuple[Index, Sequence[tuple[bytes, Island]]]] = {}
        self._supplies: dict[tuple[bytes, bytes, Limits, bytes, float], Supply] = {}

    def operate(
        self, branch_on: Mask, infeed_on: Mask, demand_mva: Complex, limits: Limits
    ) -> Operation:
        """Serve `demand_mva` (per node, constant power) as far as the limits allow."""
        part, islands = self.topology(branch_on, infeed_on)
        tally = Tally(self.grid, part)
        for key, island in islands:
            tally.add(island, demand_mva, self.served(key, island, demand_mva, limits))
        return tally.operation()

    def served(
        self,
        key: bytes,
        island: Island,
        demand_mva: Complex,
        limits: Limits,
        given_mw: Vector | None = None,
        most_mw: float = UNLIMITED,
    ) -> Supply:
        """How an island is served; `given_mw` (per node of the grid) comes from outside."""
        demand = demand_mva[island.nodes]
        given = None if given_mw is None else given_mw[island.nodes]
        if given is not None and not given.any():
            given = None
        case = (key, demand.tobytes(), limits, b"" if given is None else given.tobytes(), most_mw)
        result = self._supplies.get(case)
        if result is None:
            if len(self._supplies) >= CACHED_ANSWERS:
                self._supplies.clear()
            if key in self._plants:
                result = self._dispatched(island, *self._plants[key], demand, limits, given)
            else:
                more = (given, most_mw, self.vital[island.nodes])
                result = _serve(island, demand, limits, self.newton, *more)
            self._supplies[case] = result
        return result

    def _dispatched(
        self,
        island: Island,
        balancing: int,
        others: Index,
        demand: Complex,
        limits: Limits,
        given: Vector | None,
    ) -> Supply:
        """An island whose plants share what it takes in proportion to what each can give.

        The largest holds the balance, within what it can give; the shares of the others follow
        from what is served and lost, which is found again until the balance fits.
        """
        most = self.grid.infeed_most_mw
        capability_mw = float(most[others].sum() + most[balancing])
        outside_mw = 0.0 if given is None else float(given.sum())
        wanted_mw = (1.0 + USUAL_LOSS) * float(demand.real.sum()) - outside_mw
        place = np.searchsorted(island.nodes, self.grid.infeed_node[others])
        for _ in range(DISPATCHES):
            factor = min(max(wanted_mw / capability_mw, 0.0), 1.0)
            injected = np.zeros(island.nodes.size) if given is None else given.copy()
            np.add.at(injected, place, factor * most[others])
            more = (injected, float(most[balancing]), self.vital[island.nodes])
            result = _serve(island, demand, limits, self.newton, *more)
            others_mw = float((factor * most[others] * result.taken[place]).sum())
            off_mw = result.supply_mw - factor * float(most[balancing])
            if abs(off_mw) <= UNBALANCED * capability_mw:
                break
            is_scarce = bool((result.reason == SCARCE).any())
            load_mw = float(demand.real.sum()) if is_scarce else result.served_mw
            before_mw, wanted_mw = wanted_mw, load_mw + result.losses_mw - outside_mw
            if abs(wanted_mw - before_mw) <= UNBALANCED * capability_mw:
                break
        return replace(result, supply_mw=result.supply_mw + others_mw)

    def topology(
        self, branch_on: Mask, infeed_on: Mask
    ) -> tuple[Index, Sequence[tuple[bytes, Island]]]:
        """The part of every node, and the parts that are fed under a name for each."""
        key = np.packbits(branch_on).tobytes() + np.packbits(infeed_on).tobytes()
        known = self._parts.get(key)
        if known is None:
            if len(self._parts) >= CACHED_GRIDS:
                self._parts.clear()
                self._islands.clear()
                self._plants.clear()
            part, fed = live_parts(self.grid, branch_on, infeed_on)
            islands = []
            for nodes, branches, infeed_nodes in fed:
                name = branches.tobytes() + b"|" + infeed_nodes.tobytes()
                inside = np.isin(self.grid.infeed_node, infeed_nodes) & infeed_on
                plants = np.flatnonzero(inside & np.isfinite(self.grid.infeed_most_mw))
                holding = plants[:0]
                if plants.size:
                    largest = int(plants[np.argmax(self.grid.infeed_most_mw[plants])])
                    others = plants[plants != largest]
                    self._plants[name] = (largest, others)
                    holding = self.grid.infeed_node[others]
                    infeed_nodes = self.grid.infeed_node[[largest]]
                islands.append((name, self.island(name, nodes, branches, infeed_nodes, holding)))
            known = self._parts[key] = (part, islands)
        return known

    def island(
        self,
        name: bytes,
        nodes: Index,
        branches: Index,
        infeed_nodes: Index,
        holding: Index | None = None,
    ) -> Island:
        if name not in self._islands:
            self._islands[name] = Island(self.grid, nodes, branches, infeed_nodes, holding)
        return self._islands[name]

    def reserved_mw(self, infeed_on: Mask, limits: Limits) -> float:
        """What some infeeds give together within their ratings, without the largest of them."""
        most = self.grid.infeed_most_mw
        rated = self.infeed_mw * limits.emergency_rating
        each = np.where(np.isfinite(most), most, rated)[infeed_on]
        return float(each.sum() - each.max())


def _infeed_ratings_mw(grid: Grid) -> Vector:
    """Per infeed the rating of all branches at its node, as if all of it were active power."""
    at = [(grid.from_node == node) | (grid.to_node == node) for node in grid.infeed_node.tolist()]
    return np.array([float(grid.rating_pu[branches].sum()) * grid.base_mva for branches in at])


class Tally:
    """An operation in the making, island by island."""

    def __init__(self, grid: Grid, part: Index) -> None:
        self.part = part
        self.share = np.zeros(grid.nodes)
        self.reason = np.full(grid.nodes, DARK, dtype=np.int64)
        self.supply_mw = self.losses_mw = self.served_mw = 0.0
        self.power_flows = 0

    def add(self, island: Island, demand_mva: Complex, result: Supply) -> None:
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


def _serve(
    island: Island,
    demand_mva: Complex,
    limits: Limits,
    newton: Newton,
    given_mw: Vector | None = None,
    most_mw: float = UNLIMITED,
    vital: Mask | None = None,
) -> Supply:
    r"""Serve an island within its limits with the least shedding, spread over equals.

    `given_mw` comes at its nodes from outside, whatever is served (negative: goes there). The
    infeed gives `most_mw` at most, which is a limit like the others: a cut of a megawatt spares
    it a megawatt. Less of what comes may be taken, where that keeps a limit, before a load is cut.
    Where so limited an infeed is far from carrying all, the first cuts are those that the grid
    without load asks for, with all limits in view: losses of a load that can't be had say nothing.

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
    given = np.zeros(size) if given_mw is None else given_mw
    sources = np.flatnonzero(given > 0.0)
    taken = np.ones(size)
    reason = np.full(size, NOTHING, dtype=np.int64)
    rounds = 0
    is_empty, was_empty = False, most_mw == UNLIMITED
    while True:
        rounds += 1
        injection = -demand_mva * share
        v = island.solve(injection if given_mw is None else injection + given * taken, newton)
        if v is None and not was_empty:
            is_empty = was_empty = True
            share[:] = 0.0
            taken[sources] = 0.0
            continue
        if v is None and is_empty:
            # what goes can't be brought there even so: on from the whole load, block by block
            is_empty = False
            share[:] = taken[:] = 1.0
            ceiling[:] = 1.0
        if v is None and given_mw is not None and not (share > LEAST).any():
            return _nothing(size, rounds)
        if v is None:
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
            share = ceiling.copy()
            taken[sources] *= 1.0 - BLOCK
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
        if not was_empty and infeed_mw > most_mw * (1.0 + FAR):
            is_empty = was_empty = True
            share[:] = 0.0
            taken[sources] = 0.0
            continue
        if not is_empty and (not broken or not (share[loads] > 0.0).any()):
            break
        if rounds > PATIENCE:
            # from here on loads only go, so that it ends; an island without load breaks no limit
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
            taken[sources] *= 1.0 - BLOCK
        near = np.flatnonzero(current > WATCHED * rating)
        # an empty node has no voltage to keep, if it stays empty
        ceiling[(share <= LEAST) & (not is_empty)] = 0.0
        live = loads[share[loads] > LEAST]
        weak = live[volts[live] < limits.min_voltage_pu + 0.05]
        if is_empty:
            near, weak = np.arange(branches.size), loads
            is_empty = False
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
        spill = None
        if sources.size:
            by_spill = _by_spill(island, v, (at_from, near), weak, given, sources, most_mw)
            needed += by_spill @ (1.0 - taken[sources])
            spill = by_spill, given[sources]
        least = 1.0 - ceiling[loads]
        last = None
        if vital is not None and limits.vital_last and most_mw != UNLIMITED:
            last = np.where(vital[loads], VITAL, 1.0)
        plan = _least_shedding(by_cut, needed, demand_mva[loads].real, least, spill, last)
        if plan is None:
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
            share = ceiling.copy()
            taken[sources] *= 1.0 - BLOCK
            continue
        cut, spilled, price = plan
        taken[sources] = 1.0 - spilled
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
    return Supply(
        share=share,
        reason=np.where(share < 1.0, reason, NOTHING),
        supply_mw=_from_infeed_mw(island, v, at_from, at_to),
        losses_mw=(float((flow_f + flow_t).real.sum()) + shunt_pu) * grid.base_mva,
        served_mw=float((demand_mva.real * share).sum()),
        power_flows=rounds,
        taken=taken,
    )


def _nothing(size: int, rounds: int) -> Supply:
    """An island that can't be run with what is to go from it, even without a load."""
    dead = np.zeros(size)
    reason = np.full(size, COLLAPSE, dtype=np.int64)
    return Supply(dead, reason, 0.0, 0.0, 0.0, rounds, dead.copy(), is_solved=False)


def _by_spill(
    island: Island,
    v: Complex,
    near: tuple[Complex, Index],
    weak: Index,
    given_mw: Vector,
    sources: Index,
    most_mw: float,
) -> Vector:
    """What each limit gains when nothing of what comes at a source is taken: rows as the cuts'.

    `near` are the currents into all branches, and the branches that are looked at.
    """
    at_from, branches = near
    base_mva = island.grid.base_mva
    brought = np.conj(given_mw[sources] / v[1:][sources]) / base_mva
    per_volt, per_current = island.sensitivity(sources)
    rows = [
        _along(at_from[branches], per_current[branches] * brought),
        -_along(v[1:][weak], per_volt[weak] * brought),
    ]
    if most_mw != UNLIMITED:
        rows.append(-given_mw[sources][None, :])
    return np.concatenate(rows)


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
    by_cut: Vector,
    needed: Vector,
    power_mw: Vector,
    least: Vector,
    spill: tuple[Vector, Vector] | None = None,
    last: Vector | None = None,
) -> tuple[Vector, Vector, Vector] | None:
    """Cuts u >= least with `by_cut` u >= `needed` that shed least, what of sources is spilt for
    it, and the price per limit.

    `spill` says how much each limit gains of a source that is not taken, and the MW of each;
    a megawatt that is spilt counts as a hundredth of one that is shed. `last` is by how much the
    last block of each load is dearer.

    Every load is cut in BLOCKS equal blocks, each dearer per megawatt than the one before
    by STEP, so that loads that help equally well share. None if no cut satisfies all.
    """
    limits, loads = by_cut.shape
    columns = BLOCKS * loads
    cost = np.concatenate([power_mw * (1.0 + STEP * k) / BLOCKS for k in range(BLOCKS)])
    if last is not None:
        cost[-loads:] *= last
    low = np.clip(np.concatenate([least * BLOCKS - k for k in range(BLOCKS)]), 0.0, 1.0)
    scale = np.maximum(np.abs(by_cut).max(axis=1, initial=0.0), 1e-9)
    rows = np.tile(by_cut / scale[:, None] / BLOCKS, (1, BLOCKS))
    if spill is not None:
        by_spill, source_mw = spill
        columns += source_mw.size
        cost = np.concatenate([cost, SPILT * source_mw])
        low = np.concatenate([low, np.zeros(source_mw.size)])
        scale = np.maximum(scale, np.abs(by_spill).max(axis=1, initial=0.0))
        cuts = np.tile(by_cut / scale[:, None] / BLOCKS, (1, BLOCKS))
        rows = np.concatenate([cuts, by_spill / scale[:, None]], axis=1)
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
    chosen = np.clip(np.array(solution.col_value), 0.0, 1.0)
    blocks, spilt = chosen[: BLOCKS * loads].reshape(BLOCKS, loads), chosen[BLOCKS * loads :]
    price = np.maximum(np.array(solution.row_dual), 0.0) / scale
    return blocks.sum(axis=0) / BLOCKS, spilt, price
