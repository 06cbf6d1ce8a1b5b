"""Offers the planner what the grid could serve, as a linear transport problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federation.twin import HOUR_NS, LinearBlock, Port, Vector
from twins.energy.demand import Day, feeder_demand
from twins.energy.network import Index, PowerNet
from twins.energy.weather import Prospect

Columns = NDArray[np.int64]


@dataclass
class _Block:
    """Columns and rows as they grow, family by family; every family is entities x periods."""

    periods: int
    columns: list[str] = field(default_factory=list)
    low: list[Vector] = field(default_factory=list)
    high: list[Vector] = field(default_factory=list)
    cost: list[Vector] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    row_low: list[Vector] = field(default_factory=list)
    row_high: list[Vector] = field(default_factory=list)
    entries: list[tuple[Columns, Columns, Vector]] = field(default_factory=list)

    def add_columns(
        self,
        name: str,
        entities: Sequence[str],
        low: Vector | float,
        high: Vector | float,
        cost: Vector | float = 0.0,
    ) -> Columns:
        shape = (len(entities), self.periods)
        first = len(self.columns)
        self.columns += [f"{name}[{e},{t}]" for e in entities for t in range(self.periods)]
        for values, bound in ((self.low, low), (self.high, high), (self.cost, cost)):
            values.append(np.broadcast_to(bound, shape).astype(np.float64).ravel())
        return np.arange(first, first + shape[0] * shape[1]).reshape(shape)

    def add_rows(
        self, name: str, entities: Sequence[str], low: Vector | float, high: Vector | float
    ) -> Columns:
        shape = (len(entities), self.periods)
        first = len(self.rows)
        self.rows += [f"{name}[{e},{t}]" for e in entities for t in range(self.periods)]
        for values, bound in ((self.row_low, low), (self.row_high, high)):
            values.append(np.broadcast_to(bound, shape).astype(np.float64).ravel())
        return np.arange(first, first + shape[0] * shape[1]).reshape(shape)

    def add_number(self, name: str, value: float) -> Columns:
        """One column for all periods, with a value that is given."""
        self.columns.append(name)
        for values, number in ((self.low, value), (self.high, value), (self.cost, 0.0)):
            values.append(np.array([number]))
        return np.array([[len(self.columns) - 1]])

    def add_single(self, name: str, low: float, high: float) -> int:
        """One row over all periods."""
        self.rows.append(name)
        self.row_low.append(np.array([low]))
        self.row_high.append(np.array([high]))
        return len(self.rows) - 1

    def put(self, rows: Columns, columns: Columns, coefficient: Vector | float) -> None:
        """Add `coefficient` (one, one per entity as a column vector, or one per cell)."""
        values = np.broadcast_to(coefficient, rows.shape).astype(np.float64)
        self.entries.append((rows.ravel(), columns.ravel(), values.ravel()))

    def block(self, ports: tuple[Port, ...], doc: str) -> LinearBlock:
        rows, columns, coefficients = (
            np.concatenate([entry[k] for entry in self.entries]) for k in range(3)
        )
        return LinearBlock(
            columns=tuple(self.columns),
            low=np.concatenate(self.low),
            high=np.concatenate(self.high),
            cost=np.concatenate(self.cost),
            integer=np.zeros(len(self.columns), dtype=bool),
            rows=tuple(self.rows),
            row_low=np.concatenate(self.row_low),
            row_high=np.concatenate(self.row_high),
            row_index=rows.astype(np.int64),
            column_index=columns.astype(np.int64),
            coefficient=coefficients.astype(np.float64),
            ports=ports,
            doc=doc,
        )


def transport_block(
    net: PowerNet,
    periods_ns: tuple[int, ...],
    now_ns: int,
    *,
    day: Day,
    emergency_rating: float,
    critical_feeders_last: bool,
    value_of_lost_load_usd_per_mwh: float,
    prospect: Prospect | None = None,
) -> LinearBlock:
    r"""The grid as a transport problem: power flows anywhere within ratings, without losses.

    Per period t of h_t hours, with a in [0, 1] a component that works, cap = rating times
    `emergency_rating` times the best power factor of any load, u what a node n is not
    served of its demand D_n, f, s, y the served parts of load points, pumps, hospitals:

    .. math::
        \min \sum_{n,t} VOLL \, h_t u_{nt} \\
        \sum_{b \to n} F_{bt} - \sum_{n \to b} F_{bt} + G_{nt} + u_{nt} = D_{nt} \\
        -cap_b a_{bt} \le F_{bt} \le cap_b a_{bt}, \quad 0 \le G_{kt} \le cap_k a_{kt} \\
        D_n - u_{nt} \le \min(cap_b, D_n) a_{bt} \quad \text{(n hangs on branch b alone)} \\
        D^{point}_n f_{nt} + \sum_p P_p s_{pt} + u_{nt} = D_{nt} \\
        0 \le D^{point}_n f_{nt} - \sum_h L_h y_{ht} \le D^{ordinary}_n

    This is a relaxation of what the twin simulates: at voltages of at most 1 pu no branch
    carries more than its rating in MVA; reactive power is only lost on the way, so over
    every cut the active power is at most the power factor of the loads times the ratings;
    and what keeps all cuts can be transported. Kirchhoff's second law, losses and voltage
    limits are what the simulation adds. Nodes that hang on one branch, and infeeds behind
    one transformer, are merged with their neighbour. Without `critical_feeders_last` the
    last row becomes y = s = f. Demand is the mean of the profile over the period, hospitals
    and pumps at their usual load.

    A `prospect` multiplies demand by its warmth and adds, with x the share of its ordinary
    feeders that a load point serves, r what customers under contract use less (spread over
    load points by their ordinary demand O, counted as served), and loss those of the undamaged net
    over its load, which grow in proportion to the load that L allows:

    .. math::
        (1 + loss_t) \sum_k G_{kt} \le L_t - spare_t \qquad
        used + \sum_t h_t r_t \le R \\
        O_{nt} x_{nt} = D^{point}_n f_{nt} - \sum_h L_h y_{ht}

    where r lowers what flows to a load point. The columns of x and r are controls XX    """
    grid, count = net.grid, len(periods_ns)
    hours = np.array(periods_ns) / HOUR_NS
    starts = now_ns + np.concatenate([[0], np.cumsum(periods_ns)[:-1]])
    shares = [
        day.mean_share(int(start), int(span))
        for start, span in zip(starts, periods_ns, strict=True)
    ]
    if prospect is not None:
        shares = [share * warm for share, warm in zip(shares, prospect.warm, strict=True)]
    untold = (np.full(len(net.hospitals), -1.0), np.full(len(net.pumps), -1.0))
    demands = [feeder_demand(net, share, *untold) for share in shares]
    point_mw = np.stack([d.load_point_mw(net) for d in demands], axis=1)
    ordinary_mw = np.stack([d.ordinary_mw for d in demands], axis=1)
    hospital_mw = np.stack([d.hospital_mw for d in demands], axis=1)
    pump_mw = np.stack([d.pump_mw for d in demands], axis=1)
    node_mw = np.zeros((grid.nodes, count))
    np.add.at(node_mw, net.load_node, point_mw)
    np.add.at(node_mw, net.pump_node, pump_mw)

    power_factor = float((1.0 / np.hypot(1.0, net.load_q_per_p)).max())
    cap = grid.rating_pu * grid.base_mva * emergency_rating * power_factor
    cap = np.minimum(cap, 1.01 * node_mw.sum(axis=0).max())
    core, leaf_branch, infeed_branch = _reduce(net)

    block = _Block(count)
    available = block.add_columns("available", net.components, 0.0, 1.0)
    component_of_branch = {int(b): c for c, b in enumerate(net.component_branch) if b >= 0}
    component_of_infeed = {int(k): c for c, k in enumerate(net.component_infeed) if k >= 0}
    branch_name = net.branch_names

    # what flows between the nodes that are left
    serial = set(leaf_branch.values()) | set(infeed_branch.values())
    inner = np.array([b for b in range(grid.branches) if b not in serial], dtype=np.int64)
    inner_cap = cap[inner][:, None]
    flow = block.add_columns("flow", [branch_name[b] for b in inner], -inner_cap, inner_cap)
    infeed_names = [str(name) for name in net.net.ext_grid.name]
    infeed_cap = np.array(
        [
            cap[infeed_branch[k]] if k in infeed_branch else cap.max()
            for k in range(len(infeed_names))
        ]
    )[:, None]
    infeed = block.add_columns("infeed", infeed_names, 0.0, infeed_cap)
    nodes = np.flatnonzero(node_mw.max(axis=1) > 0.0)
    names = _node_names(net, nodes)
    unserved = block.add_columns(
        "unserved", names, 0.0, node_mw[nodes], value_of_lost_load_usd_per_mwh * hours
    )
    fraction = block.add_columns("supplied_fraction", net.load_points, 0.0, 1.0)
    inside = net.hospital_load_point >= 0
    # a hospital of another grid always has its supply
    hospital = block.add_columns(
        "hospital_supplied", net.hospitals, np.where(inside, 0.0, 1.0)[:, None], 1.0
    )
    pump = block.add_columns("pump_supplied", net.pumps, 0.0, 1.0)

    kept = np.unique(core)
    place = np.full(grid.nodes, -1, dtype=np.int64)
    place[kept] = np.arange(kept.size)
    at_core = np.zeros((kept.size, count))
    np.add.at(at_core, place[core[nodes]], node_mw[nodes])
    balance = block.add_rows("balance", [f"node{n}" for n in kept], at_core, at_core)
    block.put(balance[place[core[grid.to_node[inner]]]], flow, 1.0)
    block.put(balance[place[core[grid.from_node[inner]]]], flow, -1.0)
    block.put(balance[place[core[grid.infeed_node]]], infeed, 1.0)
    block.put(balance[place[core[nodes]]], unserved, 1.0)

    breakable = np.array([b in component_of_branch for b in inner], dtype=bool)
    limited = inner[breakable]
    switch = available[[component_of_branch[int(b)] for b in limited]]
    labels = [branch_name[b] for b in limited]
    for sign, name in ((1.0, "rating_forward"), (-1.0, "rating_backward")):
        rows = block.add_rows(name, labels, -np.inf, 0.0)
        block.put(rows, flow[breakable], sign)
        block.put(rows, switch, -cap[limited][:, None])

    gates = [
        (k, component_of_infeed[k]) for k in range(len(infeed_names)) if k in component_of_infeed
    ]
    gates += [
        (k, component_of_branch[b]) for k, b in infeed_branch.items() if b in component_of_branch
    ]
    chosen = np.array([k for k, _ in gates], dtype=np.int64)
    rows = block.add_rows("infeed_limit", [net.components[c] for _, c in gates], -np.inf, 0.0)
    block.put(rows, infeed[chosen], 1.0)
    block.put(rows, available[[c for _, c in gates]], -infeed_cap[chosen])

    hanging = [
        (position, component_of_branch[leaf_branch[int(n)]])
        for position, n in enumerate(nodes)
        if int(n) in leaf_branch and leaf_branch[int(n)] in component_of_branch
    ]
    position = np.array([p for p, _ in hanging], dtype=np.int64)
    through = np.array([leaf_branch[int(n)] for n in nodes[position]], dtype=np.int64)
    wanted = node_mw[nodes[position]]
    rows = block.add_rows("feeder", [net.components[c] for _, c in hanging], wanted, np.inf)
    block.put(rows, unserved[position], 1.0)
    block.put(rows, available[[c for _, c in hanging]], np.minimum(cap[through][:, None], wanted))

    row_of_node = {int(n): k for k, n in enumerate(nodes)}
    split = block.add_rows("split", names, node_mw[nodes], node_mw[nodes])
    block.put(split, unserved, 1.0)
    block.put(split[[row_of_node[int(n)] for n in net.load_node]], fraction, point_mw)
    block.put(split[[row_of_node[int(n)] for n in net.pump_node]], pump, pump_mw)
    own = np.flatnonzero(inside)
    point = net.hospital_load_point[own]
    if critical_feeders_last:
        fed = np.unique(point)
        where = np.searchsorted(fed, point)
        labels = [net.load_points[p] for p in fed]
        rows = block.add_rows("hospitals_within", labels, 0.0, ordinary_mw[fed])
        block.put(rows, fraction[fed], point_mw[fed])
        block.put(rows[where], hospital[own], -hospital_mw[own])
    else:
        alike = block.add_rows("hospital_alike", [net.hospitals[h] for h in own], 0.0, 0.0)
        block.put(alike, hospital[own], 1.0)
        block.put(alike, fraction[point], -1.0)
        point_of_node = {int(n): p for p, n in enumerate(net.load_node)}
        beside = [p for p, n in enumerate(net.pump_node) if int(n) in point_of_node]
        alike = block.add_rows("pump_alike", [net.pumps[p] for p in beside], 0.0, 0.0)
        block.put(alike, pump[beside], 1.0)
        block.put(alike, fraction[[point_of_node[int(net.pump_node[p])] for p in beside]], -1.0)

    ports: tuple[Port, ...] = (
        Port("available", "available", "power_component", "1", net.components, available),
        Port("supplied_fraction", "supply", "load_point", "1", net.load_points, fraction),
        Port("hospital_supplied", "supply", "hospital", "1", net.hospitals, hospital),
        Port("pump_supplied", "supply", "pump", "1", net.pumps, pump),
    )
    if prospect is not None:
        served = fraction, hospital if critical_feeders_last else None
        ports += _rationing(
            block, net, prospect, hours, infeed, balance, place[core[net.load_node]], served,
            (ordinary_mw, point_mw, hospital_mw),
        )  # fmt: skip
    return block.block(ports, "power transport within ratings; cost: value of lost load")


def _rationing(
    block: _Block,
    net: PowerNet,
    prospect: Prospect,
    hours: Vector,
    infeed: Columns,
    balance: Columns,
    balance_of_point: Index,
    served: tuple[Columns, Columns | None],
    demand: tuple[Vector, Vector, Vector],
) -> tuple[Port, ...]:
    """Add what a limited supply and the means against it ask for (see `transport_block`)."""
    fraction, hospital = served
    ordinary_mw, point_mw, hospital_mw = demand
    total_mw = ordinary_mw.sum(axis=0)
    serve = block.add_columns("serve_limit", net.load_points, 0.0, 1.0)
    response = block.add_columns(
        "demand_response",
        ["system"],
        0.0,
        np.minimum(prospect.response_mw, total_mw),
        prospect.response_usd_mwh * hours,
    )
    limit = block.add_columns("supply_limit", ["system"], prospect.limit_mw, prospect.limit_mw)
    part = ordinary_mw / np.maximum(total_mw, 1e-9)
    spread = np.broadcast_to(response, balance_of_point.shape + response.shape[1:])
    block.put(balance[balance_of_point], spread, part)
    rows = block.add_rows("supply", ["system"], -np.inf, -prospect.spare_mw)
    loss = usual_loss(net) * prospect.limit_mw / net.load_base_mw.sum()
    block.put(np.broadcast_to(rows, infeed.shape), infeed, 1.0 + loss)
    block.put(rows, limit, -1.0)
    used = block.add_number("response_used", prospect.response_used_mwh)
    most_mwh = prospect.response_used_mwh + prospect.response_mwh
    store = block.add_single("response_store", -np.inf, most_mwh)
    block.put(np.full(response.shape, store), response, hours)
    block.put(np.full(used.shape, store), used, 1.0)
    rows = block.add_rows("in_turns", net.load_points, 0.0, 0.0)
    if hospital is None:
        block.put(rows, fraction, 1.0)
        block.put(rows, serve, -1.0)
    else:
        # a load point without ordinary feeders has nothing to take turns
        weight = np.where(ordinary_mw > 0.0, ordinary_mw, 1.0)
        block.put(rows, fraction, np.where(ordinary_mw > 0.0, point_mw, 0.0))
        own = np.flatnonzero(net.hospital_load_point >= 0)
        point = net.hospital_load_point[own]
        cells = np.where(ordinary_mw[point] > 0.0, hospital_mw[own], 0.0)
        block.put(rows[point], hospital[own], -cells)
        block.put(rows, serve, np.where(ordinary_mw > 0.0, -weight, 0.0))
    return (
        Port("serve_limit", "control", "load_point", "1", net.load_points, serve),
        Port("demand_response", "control", "system", "MW", ("system",), response),
        Port("supply_limit", "given", "system", "MW", ("system",), limit),
        Port("response_used_mwh", "given", "system", "MW*h", ("system",), used),
    )


def usual_loss(net: PowerNet) -> float:
    """Losses of the undamaged net with its stored loads, over those loads."""
    at_from, at_to = net.grid.branch_flow_mva(net.grid.voltage)
    return float((at_from + at_to).real.sum() / net.load_base_mw.sum())


def _reduce(net: PowerNet) -> tuple[Index, dict[int, int], dict[int, int]]:
    """The node that stands for every node, the branch of every leaf and of every infeed."""
    grid = net.grid
    core = np.arange(grid.nodes)
    degree = np.bincount(np.concatenate([grid.from_node, grid.to_node]), minlength=grid.nodes)
    infeed_at = {int(n): k for k, n in enumerate(grid.infeed_node)}
    leaf_branch: dict[int, int] = {}
    infeed_branch: dict[int, int] = {}
    for branch in range(grid.branches):
        ends = (int(grid.from_node[branch]), int(grid.to_node[branch]))
        for end, other in (ends, ends[::-1]):
            if degree[end] == 1 and core[other] == other and core[end] == end:
                if end in infeed_at:
                    infeed_branch[infeed_at[end]] = branch
                else:
                    leaf_branch[end] = branch
                core[end] = other
                break
    return core, leaf_branch, infeed_branch


def _node_names(net: PowerNet, nodes: Index) -> list[str]:
    names = {int(n): name for name, n in zip(net.pumps, net.pump_node, strict=True)}
    names |= {int(n): name for name, n in zip(net.load_points, net.load_node, strict=True)}
    return [names[int(n)] for n in nodes]
