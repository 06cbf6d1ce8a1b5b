"""Decides who goes without when the transmission grid gives less than is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from federation.twin import HOUR_NS, Vector
from twins.energy.demand import FeederDemand, Supplied, supplied
from twins.energy.network import PowerNet
from twins.energy.operation import Operation

LEASE_NS = 2 * HOUR_NS
"""How long a setpoint of an operator holds when nobody renews it."""


@dataclass
class Orders:
    """What operators have asked for: limits per load point, and help from customers.

    `limit` is the share of its ordinary feeders that a load point may serve at once, the others
    taking turns; `response_mw` is what customers under contract use less, out of a store of
    `left_mwh`. Both end with their lease.
    """

    limit: Vector
    limit_until_ns: NDArray[np.int64]
    limit_event: list[str]
    left_mwh: float
    response_mw: float = 0.0
    response_until_ns: int = 0
    response_event: str = ""
    used_mwh: float = 0.0

    @classmethod
    def none(cls, points: int, store_mwh: float) -> Orders:
        return cls(np.ones(points), np.zeros(points, np.int64), [""] * points, store_mwh)

    def pass_time(self, from_ns: int, to_ns: int) -> None:
        """Use up the store, and let leases end."""
        hours = max(0, min(to_ns, self.response_until_ns) - from_ns) / HOUR_NS
        used_mwh = min(self.response_mw * hours, self.left_mwh)
        self.used_mwh += used_mwh
        self.left_mwh -= used_mwh
        if to_ns >= self.response_until_ns or self.left_mwh <= 1e-9:
            self.response_mw = 0.0
        over = self.limit_until_ns <= to_ns
        self.limit[over] = 1.0


@dataclass(frozen=True, slots=True)
class Rationed:
    """How what there is was shared: `kept_out` is the share that relays took off.

    `lacking_mw` is what has to be taken off, by whatever means, for the supply to be enough
    for what was wanted before any order.
    """

    operation: Operation
    served: Supplied
    kept_out: Vector
    blocks: int
    lacking_mw: float


Operate = Callable[[FeederDemand], Operation]


def ration(
    net: PowerNet,
    demand: FeederDemand,
    orders: Orders,
    limit_mw: float,
    block: float,
    critical_last: bool,
    operate: Operate,
) -> Rationed:
    r"""Share a supply of at most `limit_mw` (negative: as much as wanted).

    Each load point serves the share x that operators allow. Customers under contract whose
    feeders are on use less, in proportion to the ordinary demand that is left, and nobody counts
    that as unserved. If that is still too much, relays take `block` of what every load point
    still has off, and another until what is left fits: the least whole number n with

    .. math:: P_{infeed}\left((x - r) \, (1 - n \, block)\right) \le limit

    With `critical_last` hospitals and pumps are spared, by orders and relays alike.
    """
    plain = operate(demand)
    lacking_mw = max(0.0, plain.drawn_mw - limit_mw) if limit_mw >= 0.0 else 0.0
    allowed = _scaled(net, demand, orders.limit, critical_last)
    left_mw = float(allowed.ordinary_mw.sum())
    helped_mw = allowed.ordinary_mw * (min(orders.response_mw, left_mw) / max(left_mw, 1e-9))
    wanted = replace(demand, ordinary_mw=demand.ordinary_mw - helped_mw)
    limited = replace(allowed, ordinary_mw=allowed.ordinary_mw - helped_mw)
    blocks, most = 0, math.ceil(1.0 / block)
    operation = plain if limited == demand else operate(limited)
    if limit_mw >= 0.0 and operation.drawn_mw > limit_mw:
        # losses fall faster than load: what a straight line asks for is never too little by much
        part = (operation.drawn_mw - limit_mw) / max(operation.drawn_mw, 1e-9)
        blocks = max(0, min(most, math.floor(part / block)) - 1)
        while blocks < most:
            blocks += 1
            operation = operate(
                _scaled(net, limited, max(0.0, 1.0 - blocks * block), critical_last)
            )
            if operation.drawn_mw <= limit_mw:
                break
    share = max(0.0, 1.0 - blocks * block)
    left = _scaled(net, limited, share, critical_last)
    served = _against(net, wanted, left, supplied(net, left, operation.share, critical_last))
    points_mw = wanted.load_point_mw(net)
    taken_mw = limited.load_point_mw(net) - left.load_point_mw(net)
    kept_out = np.divide(taken_mw, points_mw, out=np.zeros_like(points_mw), where=points_mw > 0)
    return Rationed(operation, served, kept_out, blocks, lacking_mw)


def _scaled(
    net: PowerNet, demand: FeederDemand, share: Vector | float, spare_critical: bool
) -> FeederDemand:
    """The demand when every load point gets a share of it, critical feeders perhaps all."""
    points = np.broadcast_to(np.asarray(share, dtype=np.float64), len(net.load_points))
    hospital, pump = np.ones(len(net.hospitals)), np.ones(len(net.pumps))
    if not spare_critical:
        inside = net.hospital_load_point >= 0
        hospital[inside] = points[net.hospital_load_point[inside]]
        of_node = {int(node): float(points[i]) for i, node in enumerate(net.load_node)}
        pump = np.array([of_node.get(int(node), 1.0) for node in net.pump_node])
    return FeederDemand(
        demand.ordinary_mw * points, demand.hospital_mw * hospital, demand.pump_mw * pump
    )


def _against(net: PowerNet, wanted: FeederDemand, left: FeederDemand, got: Supplied) -> Supplied:
    """The served shares of what was wanted, from those of what was left after cuts."""

    def share(part: Vector, whole: Vector, of: Vector) -> Vector:
        ratio = np.divide(part, whole, out=np.ones_like(whole), where=whole > 0.0)
        return np.asarray(np.minimum(of * ratio, 1.0))

    demand_mw = wanted.load_point_mw(net).sum() + wanted.pump_mw.sum()
    return Supplied(
        load_point=share(left.load_point_mw(net), wanted.load_point_mw(net), got.load_point),
        hospital=share(left.hospital_mw, wanted.hospital_mw, got.hospital),
        pump=share(left.pump_mw, wanted.pump_mw, got.pump),
        demand_mw=float(demand_mw),
        served_mw=got.served_mw,
        shed_mw=float(demand_mw) - got.served_mw,
    )
