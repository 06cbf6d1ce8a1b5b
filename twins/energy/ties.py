"""Decides what flows over the tie lines to neighbours, and what a grid is run like with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from federation.twin import HOUR_NS, Vector
from twins.energy.network import Complex, Index
from twins.energy.operation import (
    NOTHING,
    SCARCE,
    TOLERATED_PU,
    UNLIMITED,
    ControlRoom,
    Limits,
    Operation,
    Supply,
    Tally,
)
from twins.energy.powerflow import Island, Mask

LEASE_NS = HOUR_NS
"""How long an exchange that was ordered lasts when nobody renews it."""
HALVINGS = 8
"""How finely the export is found that no own load is shed for."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is agreed with neighbours, per tie line: MW that come (positive) or go at a node.

    A converter ends each line, so the agreed power flows whatever the voltages are, and no
    reactive power does.
    """

    node: Index
    agreed_mw: Vector
    rating_mw: Vector


def operate(
    room: ControlRoom,
    branch_on: Mask,
    infeed_on: Mask,
    demand_mva: Complex,
    limits: Limits,
    exchange: Exchange,
) -> Operation:
    """Run a grid with its neighbours (without them: `ControlRoom.operate`).

    What is agreed to come over a tie line is given at its node, but no more than the part of
    the grid there wants; a part without an infeed lives on the tie line alone, as far as that
    goes. What is agreed to go is taken after all own loads. It may take the reserve, the largest
    infeed, which what is told as spare leaves alone: what was promised is kept.
    """
    part, islands = room.topology(branch_on, infeed_on)
    tally = Tally(room.grid, part)
    ties = _Ties(room, exchange, part, infeed_on, limits)
    for key, island in islands:
        ties.run(tally, key, island, demand_mva)
    ties.run_alone(tally, branch_on, demand_mva)
    return ties.told(tally, demand_mva)


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

    def run(self, tally: Tally, key: bytes, island: Island, demand_mva: Complex) -> None:
        """Run a part of the grid that has infeeds."""
        label = int(self.part[island.infeed_nodes[0]])
        self.fed.add(label)
        here = self.tie_part == label
        if not here.any():
            served = self.room.served(key, island, demand_mva, self.limits)
            tally.add(island, demand_mva, served)
            return
        coming = np.where(here, np.maximum(self.agreed_mw, 0.0), 0.0)
        wanted_mw = self._wanted_mw(island, demand_mva)
        if coming.sum() > wanted_mw:
            coming *= wanted_mw / coming.sum()
        flow = coming
        served = self._served(key, island, demand_mva, flow)
        at_infeed_mw = float(demand_mva[island.infeed_nodes].real.sum())
        given_there = self._at(self._taken(flow, island, served), island.infeed_nodes)
        drawn_mw = served.supply_mw + at_infeed_mw - given_there
        spare_mw = max(0.0, self._capability_mw(label) - drawn_mw)
        self.spare_mw[here] = np.minimum(spare_mw, self.exchange.rating_mw[here])
        going = np.where(here, np.minimum(self.agreed_mw, 0.0), 0.0)
        if going.any():
            own_mw = served.served_mw
            low, high = 0.0, 1.0
            for attempt in range(HALVINGS + 1):
                factor = high if attempt == 0 else 0.5 * (low + high)
                trial = self._served(key, island, demand_mva, coming + factor * going)
                spares_own = trial.served_mw >= own_mw - TOLERATED_PU * max(own_mw, 1.0)
                if trial.is_solved and spares_own:
                    low, flow, served = factor, coming + factor * going, trial
                    if factor == 1.0:
                        break
                else:
                    high = factor
        flow = self._taken(flow, island, served)
        self.flow_mw[here] = flow[here]
        tally.add(island, demand_mva, served)
        # what is given inside counts as supply; at an infeed's own node it spares the infeed
        tally.supply_mw += float(flow.sum()) - self._at(flow, island.infeed_nodes)

    def run_alone(self, tally: Tally, branch_on: Mask, demand_mva: Complex) -> None:
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
            island = self.room.island(key, nodes, branches, np.array([at], dtype=np.int64))
            own_mw = float(demand_mva[at].real)
            own_share = min(1.0, coming[slack] / own_mw) if own_mw > 0.0 else 1.0
            most_mw = float(coming[slack]) - own_mw * own_share
            served = self._served(key, island, demand_mva, others, most_mw)
            if served.served_mw + own_mw * own_share <= 0.0:
                continue  # what comes is not enough to hold the lines themselves at voltage
            scaled = demand_mva.copy()
            scaled[at] *= own_share
            tally.add(island, scaled, served)
            tally.share[at] = own_share
            tally.reason[at] = NOTHING if own_share == 1.0 else SCARCE
            others = self._taken(others, island, served)
            inside_mw = float(others.sum()) - self._at(others, island.infeed_nodes)
            tally.supply_mw += inside_mw
            self.flow_mw += others
            self.flow_mw[slack] = (
                served.supply_mw + own_mw * own_share - self._at(others, island.infeed_nodes)
            )

    def told(self, tally: Tally, demand_mva: Complex) -> Operation:
        """The operation with what its tie lines did, need and could do."""
        unserved_mw = demand_mva.real * (1.0 - tally.share)
        need = [
            float(unserved_mw[self.part == label].sum()) + max(float(flow_mw), 0.0)
            for label, flow_mw in zip(self.tie_part, self.flow_mw, strict=True)
        ]
        need_mw = np.minimum(np.array(need), self.exchange.rating_mw)
        return replace(
            tally.operation(),
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
    ) -> Supply:
        given = np.zeros(self.room.grid.nodes)
        np.add.at(given, self.exchange.node, flow_mw)
        return self.room.served(key, island, demand_mva, self.limits, given, most_mw)

    def _taken(self, flow_mw: Vector, island: Island, served: Supply) -> Vector:
        """What flows, when of what comes only a part was taken."""
        part = np.ones(self.room.grid.nodes)
        part[island.nodes] = served.taken
        return np.where(flow_mw > 0.0, flow_mw * part[self.exchange.node], flow_mw)

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
        return self.room.reserved_mw(on, self.limits)
