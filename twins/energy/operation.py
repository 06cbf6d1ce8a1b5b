"""Decides what a damaged grid can still serve, by the rules that a control room would follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from federation.twin import Vector
from twins.energy.network import Complex, Grid, Index
from twins.energy.powerflow import Island, Mask, Newton, live_parts

NOTHING, LOW_VOLTAGE, COLLAPSE, DARK = -1, -2, -3, -4
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
class Operation:
    """How a grid is run: the served share of the demand at every node, and the power balance.

    `part` numbers the connected part that a node belongs to; `reason` is the branch at its
    rating that caused the shedding there, or one of the constants above. Supply, losses and
    served load are megawatts: supply = served + losses up to the solver's tolerance.
    """

    share: Vector
    part: Index
    reason: Index
    supply_mw: float
    losses_mw: float
    served_mw: float
    power_flows: int


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
        self._islands: dict[bytes, Island] = {}
        self._parts: dict[bytes, tuple[Index, Sequence[tuple[bytes, Island]]]] = {}
        self._supplies: dict[tuple[bytes, bytes, Limits], _Supply] = {}

    def operate(
        self, branch_on: Mask, infeed_on: Mask, demand_mva: Complex, limits: Limits
    ) -> Operation:
        """Serve `demand_mva` (per node, constant power) as far as the limits allow."""
        grid = self.grid
        part, islands = self._topology(branch_on, infeed_on)
        share = np.zeros(grid.nodes)
        reason = np.full(grid.nodes, DARK, dtype=np.int64)
        supply_mw = losses_mw = served_mw = 0.0
        power_flows = 0
        for key, island in islands:
            demand = demand_mva[island.nodes]
            case = (key, demand.tobytes(), limits)
            result = self._supplies.get(case)
            if result is None:
                if len(self._supplies) >= CACHED_ANSWERS:
                    self._supplies.clear()
                result = self._supplies[case] = _serve(island, demand, limits, self.newton)
            power_flows += result.power_flows
            share[island.nodes] = result.share
            reason[island.nodes] = result.reason
            # a load at the infeed itself hangs on no branch
            share[island.infeed_nodes] = 1.0
            reason[island.infeed_nodes] = NOTHING
            at_infeed_mw = float(demand_mva[island.infeed_nodes].real.sum())
            supply_mw += result.supply_mw + at_infeed_mw
            served_mw += result.served_mw + at_infeed_mw
            losses_mw += result.losses_mw
        return Operation(share, part, reason, supply_mw, losses_mw, served_mw, power_flows)

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
                if name not in self._islands:
                    self._islands[name] = Island(self.grid, nodes, branches, infeed_nodes)
                islands.append((name, self._islands[name]))
            known = self._parts[key] = (part, islands)
        return known


def _serve(island: Island, demand_mva: Complex, limits: Limits, newton: Newton) -> _Supply:
    r"""Serve an island within its limits with the least shedding, spread over equals.

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
        v = island.solve(-demand_mva * share, newton)
        if v is None:
            ceiling = np.where(share > LEAST, share * (1.0 - BLOCK), 0.0)
            share = ceiling.copy()
            reason[loads[reason[loads] == NOTHING]] = COLLAPSE
            continue
        at_from = y_ff * v[island.f] + y_ft * v[island.t]
        at_to = y_tf * v[island.f] + y_tt * v[island.t]
        current = np.maximum(np.abs(at_from), np.abs(at_to))
        volts = np.abs(v[1:])
        broken = bool((current > rating * (1.0 + TOLERATED_PU)).any()) or bool(
            (volts[loads][share[loads] > 0.0] < limits.min_voltage_pu - TOLERATED_PU).any()
        )
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
        if price.any():
            blame = by_cut * price[:, None]
            shed = cut > LEAST
            reason[loads[shed]] = names[np.argmax(blame, axis=0)][shed]
    flow_f = v[island.f] * np.conj(at_from)
    flow_t = v[island.t] * np.conj(at_to)
    own = np.concatenate([island.infeed_nodes, island.nodes])
    level = np.abs(np.concatenate([np.full(island.infeed_nodes.size, v[0]), v[1:]])) ** 2
    shunt_pu = float(level @ grid.y_shunt[own].real)
    from_infeed = float((flow_f[island.f == 0].sum() + flow_t[island.t == 0].sum()).real)
    from_infeed += float(abs(v[0]) ** 2 * grid.y_shunt[island.infeed_nodes].real.sum())
    return _Supply(
        share=share,
        reason=np.where(share < 1.0, reason, NOTHING),
        supply_mw=from_infeed * grid.base_mva,
        losses_mw=(float((flow_f + flow_t).real.sum()) + shunt_pu) * grid.base_mva,
        served_mw=float((demand_mva.real * share).sum()),
        power_flows=rounds,
    )


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
