"""Says what every feeder wants at an instant, and how a node's supply is split over its feeders."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from federation.twin import HOUR_NS, Vector
from twins.energy.network import Complex, PowerNet


@dataclass(frozen=True, slots=True)
class Day:
    """How demand swings over a day, as a share of the stored (record peak) demand.

    A cosine from `factor` at the hour of the peak to `factor` times `night_ratio` twelve
    hours later, constant within each hour of the clock: a declared coarseness, so that a
    power flow is solved again only when something happens.
    """

    start_hour: float
    peak_hour: float
    night_ratio: float
    factor: float

    def share(self, time_ns: int) -> float:
        hour = (round(self.start_hour * HOUR_NS) + time_ns) // HOUR_NS % 24
        swing = math.cos(2.0 * math.pi * (hour - self.peak_hour) / 24.0)
        return self.factor * (
            0.5 * (1.0 + self.night_ratio) + 0.5 * (1.0 - self.night_ratio) * swing
        )

    def mean_share(self, from_ns: int, span_ns: int) -> float:
        """The mean of `share` over a span."""
        total, time_ns, end_ns = 0.0, from_ns, from_ns + span_ns
        start_ns = round(self.start_hour * HOUR_NS)
        while time_ns < end_ns:
            next_ns = min(end_ns, time_ns + HOUR_NS - (start_ns + time_ns) % HOUR_NS)
            total += self.share(time_ns) * (next_ns - time_ns)
            time_ns = next_ns
        return total / span_ns


@dataclass(frozen=True, slots=True, eq=False)
class FeederDemand:
    """Demand in MW of the ordinary feeders of each load point, and of each critical feeder.

    Each hospital and each pump is one critical feeder. A hospital's usual load is part of
    its load point's stored load, a pump's is not.
    """

    ordinary_mw: Vector
    hospital_mw: Vector
    pump_mw: Vector

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeederDemand) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]

    def load_point_mw(self, net: PowerNet) -> Vector:
        """Demand of every load point: its ordinary feeders and its hospitals."""
        inside = net.hospital_load_point >= 0
        points = net.hospital_load_point[inside]
        hospital = np.bincount(points, self.hospital_mw[inside], len(net.load_points))
        return self.ordinary_mw + np.asarray(hospital)

    def node_mva(self, net: PowerNet) -> Complex:
        demand = np.zeros(net.grid.nodes, dtype=np.complex128)
        np.add.at(demand, net.load_node, self.load_point_mw(net) * (1.0 + 1j * net.load_q_per_p))
        np.add.at(demand, net.pump_node, self.pump_mw * (1.0 + 1j * net.pump_q_per_p))
        return demand


def feeder_demand(
    net: PowerNet, share: float, hospital_load_mw: Vector, pump_load_mw: Vector
) -> FeederDemand:
    """Demand when the profile stands at `share`; a negative load was not told: the usual one.

    Per load point: stored load times share, less the usual loads of its hospitals, plus
    what they want now.
    """
    hospital = np.where(hospital_load_mw < 0.0, net.hospital_base_mw, hospital_load_mw)
    inside = net.hospital_load_point >= 0
    usual = np.bincount(
        net.hospital_load_point[inside], net.hospital_base_mw[inside], len(net.load_points)
    )
    return FeederDemand(
        ordinary_mw=np.maximum(net.load_base_mw * share - usual, 0.0),
        hospital_mw=np.where(inside, hospital, 0.0),
        pump_mw=np.where(pump_load_mw < 0.0, net.pump_rated_mw, pump_load_mw),
    )


@dataclass(frozen=True, slots=True)
class Supplied:
    """The served share of load points, hospitals and pumps, and the totals in MW."""

    load_point: Vector
    hospital: Vector
    pump: Vector
    demand_mw: float
    served_mw: float
    shed_mw: float


def supplied(
    net: PowerNet, demand: FeederDemand, node_share: Vector, critical_last: bool
) -> Supplied:
    """Split what each node is served over its feeders.

    With `critical_last` the hospitals and pumps of a node are served before its ordinary
    feeders, all to the same share; otherwise every feeder gets the share of the node. A
    hospital of another grid is always served; a feeder that wants nothing is served if its
    node is.
    """
    inside = net.hospital_load_point >= 0
    hospital_node = net.load_node[net.hospital_load_point]
    nodes = net.grid.nodes
    critical = np.bincount(hospital_node[inside], demand.hospital_mw[inside], nodes)
    critical = critical + np.bincount(net.pump_node, demand.pump_mw, nodes)
    total = critical + np.bincount(net.load_node, demand.ordinary_mw, nodes)
    served = total * node_share
    critical_share = node_share
    if critical_last:
        ratio = np.divide(served, critical, out=np.ones(nodes), where=critical > 0.0)
        critical_share = np.where(node_share > 0.0, np.minimum(ratio, 1.0), 0.0)
    pump_part = np.bincount(net.pump_node, demand.pump_mw, nodes) * critical_share
    at_point = demand.load_point_mw(net)
    # two load points at one node would share what its pumps leave
    point_total = np.bincount(net.load_node, at_point, nodes)
    left = np.divide(served - pump_part, point_total, out=node_share.copy(), where=point_total > 0)
    demand_mw, served_mw = float(total.sum()), float(served.sum())
    return Supplied(
        load_point=np.clip(left, 0.0, 1.0)[net.load_node],
        hospital=np.where(inside, critical_share[hospital_node], 1.0),
        pump=critical_share[net.pump_node],
        demand_mw=demand_mw,
        served_mw=served_mw,
        shed_mw=demand_mw - served_mw,
    )
