r"""States what the city could do over a horizon as a linear block, for the joint plan.

Water is a transport problem: for junction j and period t of length h_t

.. math::
    \sum_{m \to j} f_{mt} - \sum_{m from j} f_{mt} + \sum_{k \to j} q_{kt}
      + \sum_{i \to j} o_{it} = s_{jt}, \quad s_{jt} + u_{jt} = d_j

with flows f of mains, |f| <= F a (a the availability of the main), pumps q <= Q a and
q <= Q e (e the power they get), tanks o, |o| <= F a, whose stores
v_t = v_{t-1} - h_t o_t stay between 0 and full. Pressure is left out.

F is no more than what the pumps, tanks and junctions on the two sides of a main give and take
(see `beyond`), and no more than a full tank in one period for a tank. A junction that nothing
unbreakable leads to is served by the ways w to it, mains, pumps and tanks:

.. math::
    s_{jt} \le \sum_{w \to j} \min(F_w, d_j) a_{wt}

Neither takes anything away where every a is 0 or 1, but without them a hundredth of a main
would carry all that hangs on it, and the relaxed plan would promise what no crew can do. A
road that is not
available costs its usual flow times the detour round it: an estimate, blind to the
congestion that the detours cause and to roads that close together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation.twin import LinearBlock, Port, Vector
from twins.city.layout import PERIOD_STARTS_H, period_of, read_layout
from twins.city.roads import detour_min

Columns = NDArray[np.int64]
Term = tuple[Columns, float | Vector]


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars; `stranded_h` bounds what a detour, or none being there, costs a vehicle."""

    water_usd_per_m3: float
    vehicle_usd_per_h: float
    stranded_h: float


@lru_cache(maxsize=4)
def usual_closures(region: str) -> tuple[Vector, Vector]:
    """For [period, road] the usual flow in vehicles/h, and the hours of the detour round it."""
    layout = read_layout(region)
    traffic, links = layout.traffic, layout.road_links
    usual = [traffic.normal(period) for period in range(len(PERIOD_STARTS_H))]
    flow = [np.bincount(layout.link_road, one.flow, len(layout.roads)) for one in usual]
    detour = [detour_min(traffic.network, one.time_min, links) / 60.0 for one in usual]
    return np.array(flow), np.maximum(np.array(detour), 0.0)


def closure_usd_per_h(region: str, prices: Prices, trips_factor: float) -> Vector:
    """What it costs per hour, on the mean of a day, that a road is closed: the estimate."""
    flow, detour_h = usual_closures(region)
    hours = np.bincount([period_of(hour) for hour in range(24)], minlength=len(flow))
    lost_h = flow * trips_factor * np.minimum(detour_h, prices.stranded_h)
    return np.asarray((hours[:, None] / 24.0 * lost_h).sum(axis=0) * prices.vehicle_usd_per_h)


@lru_cache(maxsize=4)
def beyond(region: str) -> tuple[Vector, Vector]:
    """For [main, junction] 1 where the junction is reached through the main, there and back.

    Water that has come along a main from its tail does not return to the tail: it goes where
    the head is still joined to when the tail is taken away.
    """
    water = read_layout(region).water
    at = {name: index for index, name in enumerate(water.junctions)}
    mains = [(at[a], at[b]) for a, b in water.pipe_ends if a in at and b in at]
    near: list[set[int]] = [set() for _ in at]
    for tail, head in mains:
        near[tail].add(head)
        near[head].add(tail)

    def reached(start: int, without: int) -> Vector:
        seen, ahead = {start}, [start]
        while ahead:
            new = near[ahead.pop()] - seen - {without}
            seen |= new
            ahead += new
        return np.isin(np.arange(len(at)), list(seen)).astype(np.float64)

    return (
        np.array([reached(head, tail) for tail, head in mains]),
        np.array([reached(tail, head) for tail, head in mains]),
    )


class _Draft:
    """Collects families of columns and rows, each over entities and periods."""

    def __init__(self, periods: int) -> None:
        self.periods = periods
        self.columns: list[str] = []
        self.low: list[Vector] = []
        self.high: list[Vector] = []
        self.cost: list[Vector] = []
        self.rows: list[str] = []
        self.row_low: list[Vector] = []
        self.row_high: list[Vector] = []
        self.triples: list[tuple[Columns, Columns, Vector]] = []

    def add(
        self,
        name: str,
        entities: tuple[str, ...],
        low: float | Vector,
        high: float | Vector,
        cost: float | Vector = 0.0,
    ) -> Columns:
        """One column per entity and period; bounds and costs broadcast to [entity, period]."""
        shape = (len(entities), self.periods)
        start = len(self.columns)
        self.columns += [f"{name}[{e},{t}]" for e in entities for t in range(self.periods)]
        for store, value in ((self.low, low), (self.high, high), (self.cost, cost)):
            store.append(np.broadcast_to(np.asarray(value, np.float64), shape).ravel())
        return np.arange(start, start + shape[0] * shape[1]).reshape(shape)

    def require(
        self,
        name: str,
        entities: tuple[str, ...],
        terms: list[Term],
        low: float | Vector,
        high: float | Vector,
    ) -> Columns:
        """Rows low <= sum of coefficient x column <= high, one per entity and period."""
        shape = (len(entities), self.periods)
        start = len(self.rows)
        self.rows += [f"{name}[{e},{t}]" for e in entities for t in range(self.periods)]
        rows = np.arange(start, start + shape[0] * shape[1]).reshape(shape)
        for store, value in ((self.row_low, low), (self.row_high, high)):
            store.append(np.broadcast_to(np.asarray(value, np.float64), shape).ravel())
        for columns, coefficient in terms:
            self.extend(rows, columns, coefficient)
        return rows

    def extend(self, rows: Columns, columns: Columns, coefficient: float | Vector) -> None:
        """More terms in rows that exist; several may fall into one row."""
        values = np.broadcast_to(np.asarray(coefficient, np.float64), columns.shape)
        self.triples.append((rows.ravel(), columns.ravel(), values.ravel()))

    def block(self, ports: tuple[Port, ...], doc: str) -> LinearBlock:
        row, column, value = (np.concatenate(part) for part in zip(*self.triples, strict=True))
        return LinearBlock(
            columns=tuple(self.columns),
            low=np.concatenate(self.low),
            high=np.concatenate(self.high),
            cost=np.concatenate(self.cost),
            integer=np.zeros(len(self.columns), np.bool_),
            rows=tuple(self.rows),
            row_low=np.concatenate(self.row_low),
            row_high=np.concatenate(self.row_high),
            row_index=row,
            column_index=column,
            coefficient=value,
            ports=ports,
            doc=doc,
        )


def build_block(
    region: str,
    period_h: Vector,
    prices: Prices,
    demand_factor: float,
    trips_factor: float,
    main_speed_m_s: float,
    level_m: Vector,
) -> LinearBlock:
    """The block over periods of these lengths, with the tanks at `level_m` at the start."""
    layout, draft = read_layout(region), _Draft(period_h.size)
    water = layout.water
    at = {name: index for index, name in enumerate(water.junctions)}
    demand = (water.base_demand * water.pattern.mean() * demand_factor)[:, None]
    most = water.pipe_area_m2 * main_speed_m_s * 3600.0
    pipe_at = {name: index for index, name in enumerate(water.pipes)}
    mains = np.array([p for p, ends in enumerate(water.pipe_ends) if set(ends) <= set(at)])
    main_names = tuple(water.pipes[p] for p in mains)
    tank_most = np.array([most[pipe_at[pipe]] for pipe in water.tank_pipe])[:, None]
    volume = ((water.tank_high - water.tank_low) * water.tank_area_m2)[:, None]
    tank_most = np.minimum(tank_most, volume / period_h)
    first = (level_m - water.tank_low) * water.tank_area_m2
    closure = closure_usd_per_h(region, prices, trips_factor)[:, None]
    pump_to, tank_to = ([at[name] for name in names] for names in (water.pump_to, water.tank_to))
    takes = np.repeat(demand, period_h.size, axis=1)
    gives = np.zeros_like(takes)
    np.add.at(takes, tank_to, tank_most)
    np.add.at(gives, tank_to, tank_most)
    np.add.at(gives, pump_to, water.pump_design[:, None])
    ahead, behind = beyond(region)
    forth, back = (
        np.minimum(most[mains][:, None], np.minimum(to @ takes, since @ gives))
        for to, since in ((ahead, behind), (behind, ahead))
    )

    part = draft.add("water_intact", layout.components, 0.0, 1.0)
    road = draft.add("road_intact", layout.roads, 0.0, 1.0)
    power = draft.add("pump_power", layout.pumps, 0.0, 1.0)
    flow = draft.add("main_flow", main_names, -back, forth)
    pumped = draft.add("pump_flow", layout.pumps, 0.0, water.pump_design[:, None])
    out = draft.add("tank_out", water.tanks, -tank_most, tank_most)
    store = draft.add("tank_store", water.tanks, 0.0, volume)
    served = draft.add("served", water.junctions, 0.0, demand)
    unserved = draft.add(
        "unserved", water.junctions, 0.0, demand, prices.water_usd_per_m3 * period_h[None]
    )
    hospital = draft.add("hospital_water", layout.hospitals, 0.0, 1.0)
    shut = draft.add("road_shut", layout.roads, 0.0, 1.0, closure * period_h[None])

    balance = draft.require("water_balance", water.junctions, [(served, -1.0)], 0.0, 0.0)
    tail = np.array([at[water.pipe_ends[p][0]] for p in mains])
    head = np.array([at[water.pipe_ends[p][1]] for p in mains])
    draft.extend(balance[head], flow, 1.0)
    draft.extend(balance[tail], flow, -1.0)
    draft.extend(balance[pump_to], pumped, 1.0)
    draft.extend(balance[tank_to], out, 1.0)
    draft.require("demand", water.junctions, [(served, 1.0), (unserved, 1.0)], demand, demand)

    column_of = {int(p): column for column, p in enumerate(mains)}
    damageable = np.flatnonzero(layout.component_main >= 0)
    of_main = np.array([column_of[int(layout.component_main[c])] for c in damageable])
    names = tuple(layout.components[c] for c in damageable)
    up: list[Term] = [(flow[of_main], 1.0), (part[damageable], -forth[of_main])]
    down: list[Term] = [(flow[of_main], 1.0), (part[damageable], back[of_main])]
    draft.require("main_forth", names, up, -np.inf, 0.0)
    draft.require("main_back", names, down, 0.0, np.inf)

    pumps = np.flatnonzero(layout.component_pump >= 0)
    of_pump = layout.component_pump[pumps]
    names = tuple(layout.components[c] for c in pumps)
    limit = water.pump_design[of_pump][:, None]
    whole: list[Term] = [(pumped[of_pump], 1.0), (part[pumps], -limit)]
    draft.require("pump_whole", names, whole, -np.inf, 0.0)
    driven: list[Term] = [(pumped, 1.0), (power, -water.pump_design[:, None])]
    draft.require("pump_driven", layout.pumps, driven, -np.inf, 0.0)

    tanks = np.flatnonzero(layout.component_tank >= 0)
    of_tank = layout.component_tank[tanks]
    names = tuple(layout.components[c] for c in tanks)
    limit = tank_most[of_tank]
    draft.require("tank_gives", names, [(out[of_tank], 1.0), (part[tanks], -limit)], -np.inf, 0.0)
    draft.require("tank_takes", names, [(out[of_tank], 1.0), (part[tanks], limit)], 0.0, np.inf)
    # a junction lives by the ways that lead to it: what of its demand each can carry
    ways_to = np.concatenate([head, tail, pump_to, tank_to])
    of_way = np.full(ways_to.size, -1)
    of_way[of_main] = of_way[len(mains) + of_main] = damageable
    of_way[2 * len(mains) + of_pump] = pumps
    of_way[2 * len(mains) + len(pump_to) + of_tank] = tanks
    design = np.repeat(water.pump_design[:, None], period_h.size, axis=1)
    carried = np.minimum(np.concatenate([forth, back, design, tank_most]), demand[ways_to])
    useful = carried.max(axis=1) > 0.0
    sure = ways_to[useful & (of_way < 0)]
    junctions = np.setdiff1d(np.flatnonzero(demand[:, 0] > 0.0), sure)
    ways = np.flatnonzero(useful & np.isin(ways_to, junctions))
    names = tuple(water.junctions[j] for j in junctions)
    reached = draft.require("reached", names, [(served[junctions], 1.0)], -np.inf, 0.0)
    row = reached[np.searchsorted(junctions, ways_to[ways])]
    draft.extend(row, part[of_way[ways]], -carried[ways])

    start = np.zeros((len(water.tanks), period_h.size))
    start[:, 0] = first
    stored = draft.require(
        "tank_level", water.tanks, [(store, 1.0), (out, period_h[None])], start, start
    )
    draft.extend(stored[:, 1:], store[:, :-1], -1.0)

    supplied = [h for h, j in enumerate(layout.hospital_junction) if j >= 0 and demand[j, 0] > 0.0]
    joined = layout.hospital_junction[supplied]
    draft.require(
        "hospital_share",
        tuple(layout.hospitals[h] for h in supplied),
        [(hospital[supplied], demand[joined]), (served[joined], -1.0)],
        -np.inf,
        0.0,
    )
    draft.require("road_open_or_shut", layout.roads, [(shut, 1.0), (road, 1.0)], 1.0, np.inf)

    ports = (
        Port("water_intact", "available", "water_component", "1", layout.components, part),
        Port("road_intact", "available", "road", "1", layout.roads, road),
        Port("pump_power", "need", "pump", "1", layout.pumps, power),
        Port("hospital_water", "supply", "hospital", "1", layout.hospitals, hospital),
    )
    return draft.block(ports, __doc__ or "")
