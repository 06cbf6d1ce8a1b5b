r"""Finds how drivers spread over the roads that stand, so that journeys get their times.

User equilibrium after Wardrop: on every pair of nodes no driver can gain by another path.
Travel time of a link at flow x (Bureau of Public Roads):

.. math:: t(x) = t_0 (1 + b (x / (f c))^p) + w

with capacity c, the share f of it that is left, and the wait w at a signal that is dark.
Solved with an origin-based Newton method on acyclic subnetworks, after R. B. Dial, "A
path-based user-equilibrium traffic assignment algorithm that obviates path storage and
enumeration", Transportation Research B 40 (2006). Here the subnetwork of an origin is not
stored: it is every open link that agrees with an order of the nodes, and the order is
renewed from the longest used path to each node.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from federation.twin import Vector

Index = NDArray[np.uint32]
Matrix = NDArray[np.float64]

CUT_MIN = 1440.0
"""The time published for a journey that no open road allows: a day."""

MOST_PASSES = 20
"""Passes after which a solution during a run is taken as it is; its gap is published."""

NO_LINK = np.uint32(0xFFFFFFFF)

KEPT_EQUILIBRIA = 32
"""Solutions that a process remembers, about 1.6 MB each for 191 nodes and 588 links."""


@dataclass(frozen=True, slots=True)
class RoadNetwork:
    """Directed links between numbered nodes; times in minutes, capacities in vehicles/h.

    Links are kept sorted by the node that they enter: those into node n are `first[n]` to
    `first[n + 1]`, and `given[k]` is the number that link k had when it was handed in.
    """

    tail: Index
    head: Index
    first: Index
    given: NDArray[np.int64]
    capacity: Vector
    free_flow_min: Vector
    b: Vector
    power: Vector

    @staticmethod
    def of(
        nodes: int,
        tail: NDArray[np.int64],
        head: NDArray[np.int64],
        capacity: Vector,
        free_flow_min: Vector,
        b: Vector,
        power: Vector,
    ) -> RoadNetwork:
        given = np.argsort(head, kind="stable")
        first = np.searchsorted(head[given], np.arange(nodes + 1))
        return RoadNetwork(
            tail[given].astype(np.uint32),
            head[given].astype(np.uint32),
            first.astype(np.uint32),
            given,
            np.asarray(capacity[given], np.float64),
            np.asarray(free_flow_min[given], np.float64),
            np.asarray(b[given], np.float64),
            np.asarray(power[given], np.float64),
        )

    @property
    def nodes(self) -> int:
        return self.first.size - 1

    def sorted(self, values: Vector) -> Vector:
        """Values per link, from the order that they were handed in to the order kept."""
        return np.asarray(values[self.given])

    def unsorted(self, values: Vector) -> Vector:
        """The inverse of `sorted`."""
        back = np.empty_like(values)
        back[self.given] = values
        return back

    def law(self, capacity_share: Vector, wait_min: Vector) -> Matrix:
        """Rows (t0 + w, t0 b / (f c)^p, p) of t(x) = row0 + row1 x^row2; closed where f = 0."""
        law = np.empty((self.tail.size, 3))
        open_ = capacity_share > 0.0
        usable = np.where(open_, self.capacity * capacity_share, 1.0)
        law[:, 0] = np.where(open_, self.free_flow_min + wait_min, np.inf)
        law[:, 1] = np.where(open_, self.free_flow_min * self.b / usable**self.power, 0.0)
        law[:, 2] = self.power
        return law


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """Flows and times of one demand on one state of the network, links in the order kept.

    `origin_flow[origin, link]` and `order[origin, rank]` are what a later solution starts
    from. `gap` is the relative gap 1 - (demand x shortest times) / (flow x times).
    `pair_min[from, to]` is infinite where no open road leads, and `assigned[from, to]` 0.
    """

    flow: Vector
    time_min: Vector
    pair_min: Matrix
    assigned: Matrix
    stranded_per_h: float
    gap: float
    passes: int
    origin_flow: Matrix
    order: Index

    @property
    def total_min(self) -> float:
        """Vehicle-minutes spent per hour."""
        return float(_spent(self.flow, self.time_min))


@njit(cache=True)
def _spent(flow: Vector, time_min: Vector) -> float:  # pragma: no cover - compiled
    """Flow times time, summed in one order: a BLAS product depends on its threads."""
    total = 0.0
    for link in range(flow.size):
        if flow[link] > 0.0:
            total += flow[link] * time_min[link]
    return total


@njit(cache=True)
def pair_total(assigned: Matrix, pair_min: Matrix) -> float:  # pragma: no cover - compiled
    """Vehicle-minutes if all who travel had these times between nodes."""
    total = 0.0
    for origin in range(assigned.shape[0]):
        for node in range(assigned.shape[1]):
            if assigned[origin, node] > 0.0:
                total += assigned[origin, node] * pair_min[origin, node]
    return total


@njit(cache=True)
def _time_link(
    link: int, flow: Vector, law: Matrix, time: Vector, slope: Vector
) -> None:  # pragma: no cover - compiled
    x = flow[link]
    power = law[link, 2]
    if power == 4.0:
        below = law[link, 1] * x * x * x
    elif power == 1.0:
        below = law[link, 1]
    else:
        below = law[link, 1] * x ** (power - 1.0)
    time[link] = law[link, 0] + below * x
    slope[link] = below * power


@njit(cache=True)
def _total(
    origin_flow: Matrix, flow: Vector, law: Matrix, time: Vector, slope: Vector
) -> None:  # pragma: no cover - compiled
    flow[:] = 0.0
    for origin in range(origin_flow.shape[0]):
        for link in range(flow.size):
            flow[link] += origin_flow[origin, link]
    for link in range(flow.size):
        _time_link(link, flow, law, time, slope)


@njit(cache=True)
def _sort_by(order: Index, key: Vector) -> None:  # pragma: no cover - compiled
    """Insertion sort, stable: the order is nearly right already."""
    for place in range(1, order.size):
        node = order[place]
        value = key[node]
        before = place - 1
        while before >= 0 and key[order[before]] > value:
            order[before + 1] = order[before]
            before -= 1
        order[before + 1] = node


@njit(cache=True)
def _shortest(
    origin: int, order: Index, time: Vector, tail: Index, first: Index, distance: Vector
) -> None:  # pragma: no cover - compiled
    """Label correcting in a given order of the nodes; two sweeps when the order is right."""
    distance[:] = np.inf
    distance[origin] = 0.0
    changed = True
    while changed:
        changed = False
        for place in range(order.size):
            node = order[place]
            best = distance[node]
            was = best
            for link in range(first[node], first[node + 1]):
                best = min(best, distance[tail[link]] + time[link])
            if best < was:
                distance[node] = best
                changed = True


@njit(cache=True)
def _skim(
    order: Index, time: Vector, tail: Index, first: Index, pair: Matrix
) -> None:  # pragma: no cover - compiled
    for origin in range(order.shape[0]):
        _shortest(origin, order[origin], time, tail, first, pair[origin])


@njit(cache=True)
def _project(
    origin_flow: Matrix,
    order: Index,
    demand: Matrix,
    assigned: Matrix,
    time: Vector,
    tail: Index,
    first: Index,
) -> None:  # pragma: no cover - compiled
    """Carry flows over to another demand or network, keeping the shares at each node.

    Origins that a change does not touch keep their flows. `assigned` becomes the demand
    that an open path serves.
    """
    nodes = order.shape[1]
    distance = np.empty(nodes)
    through = np.empty(nodes)
    rank = np.empty(nodes, np.uint32)
    for origin in range(order.shape[0]):
        flow = origin_flow[origin]
        touched = False
        for link in range(flow.size):
            if flow[link] > 0.0 and time[link] == np.inf:
                touched = True
                break
        if not touched:
            for node in range(nodes):
                if assigned[origin, node] != demand[origin, node]:
                    touched = True
                    break
        if not touched:
            continue
        sequence = order[origin]
        _shortest(origin, sequence, time, tail, first, distance)
        _sort_by(sequence, distance)
        for place in range(nodes):
            node = sequence[place]
            rank[node] = place
            kept = demand[origin, node] if distance[node] < np.inf else 0.0
            assigned[origin, node] = kept
            through[node] = kept
        for place in range(nodes - 1, -1, -1):
            node = sequence[place]
            before = 0.0
            best = np.inf
            nearest = np.int64(-1)
            for link in range(first[node], first[node + 1]):
                if time[link] < np.inf and rank[tail[link]] < place:
                    before += flow[link]
                    if distance[tail[link]] + time[link] < best:
                        best = distance[tail[link]] + time[link]
                        nearest = np.int64(link)
                else:
                    flow[link] = 0.0
            if through[node] <= 0.0 or nearest < 0:
                for link in range(first[node], first[node + 1]):
                    flow[link] = 0.0
            elif before <= 0.0:
                flow[nearest] = through[node]
                through[tail[nearest]] += through[node]
            else:
                share = through[node] / before
                for link in range(first[node], first[node + 1]):
                    if flow[link] > 0.0:
                        flow[link] *= share
                        through[tail[link]] += flow[link]


@njit(cache=True)
def _move(
    node: int,
    common: int,
    change: float,
    into: Index,
    own: Vector,
    flow: Vector,
    law: Matrix,
    time: Vector,
    slope: Vector,
    tail: Index,
) -> tuple[float, float]:  # pragma: no cover - compiled
    """Add `change` to one path back from a node; the path's time and slope afterwards."""
    minutes = 0.0
    steepness = 0.0
    at = node
    while at != common:
        link = into[at]
        own[link] += change
        if own[link] <= 1e-12 * flow[link]:
            own[link] = 0.0
        flow[link] = max(flow[link] + change, 0.0)
        _time_link(link, flow, law, time, slope)
        minutes += time[link]
        steepness += slope[link]
        at = tail[link]
    return minutes, steepness


@njit(cache=True)
def _sweep(
    origin_flow: Matrix,
    order: Index,
    flow: Vector,
    law: Matrix,
    time: Vector,
    slope: Vector,
    tail: Index,
    first: Index,
    tolerance: float,
) -> None:  # pragma: no cover - compiled
    """Move flow from the longest used to the shortest paths, origin by origin."""
    nodes = order.shape[1]
    distance = np.empty(nodes)
    longest = np.empty(nodes)
    rank = np.empty(nodes, np.uint32)
    fast = np.empty(nodes, np.uint32)
    slow = np.empty(nodes, np.uint32)
    chain = np.empty(nodes, np.int64)
    for origin in range(order.shape[0]):
        own = origin_flow[origin]
        sequence = order[origin]
        _shortest(origin, sequence, time, tail, first, distance)
        uneven = False
        for place in range(nodes):
            node = sequence[place]
            high = 0.0 if node == origin else -1.0
            for link in range(first[node], first[node + 1]):
                if own[link] > 0.0:
                    high = max(high, longest[tail[link]] + time[link])
            longest[node] = high
            if high - distance[node] > tolerance * high:
                uneven = True
        if not uneven:
            continue
        # a node that the origin does not use comes after its neighbour on the shortest path,
        # whatever the label of that neighbour, or no path could ever be moved through it
        for node in range(nodes):
            if distance[node] == np.inf:
                longest[node] = np.inf
        for node in range(nodes):
            depth = 0
            at = node
            while longest[at] < 0.0 and depth < nodes:
                chain[depth] = at
                depth += 1
                best = np.inf
                for link in range(first[at], first[at + 1]):
                    if distance[tail[link]] + time[link] < best:
                        best = distance[tail[link]] + time[link]
                        fast[chain[depth - 1]] = link
                at = tail[fast[chain[depth - 1]]]
            while depth > 0:
                depth -= 1
                link = fast[chain[depth]]
                longest[chain[depth]] = longest[tail[link]] + time[link]
        _sort_by(sequence, longest)
        for place in range(nodes):
            rank[sequence[place]] = place
        for _ in range(2):
            for place in range(nodes):
                node = sequence[place]
                low = np.inf
                high = -1.0
                fast[node] = NO_LINK
                slow[node] = NO_LINK
                for link in range(first[node], first[node + 1]):
                    before = tail[link]
                    if rank[before] >= place:
                        continue
                    if distance[before] + time[link] < low:
                        low = distance[before] + time[link]
                        fast[node] = link
                    if own[link] > 0.0 and longest[before] + time[link] > high:
                        high = longest[before] + time[link]
                        slow[node] = link
                if place == 0:
                    low = 0.0
                distance[node] = low
                longest[node] = high if high >= 0.0 else low
            for place in range(nodes - 1, 0, -1):
                node = sequence[place]
                if slow[node] == NO_LINK or slow[node] == fast[node]:
                    continue
                if longest[node] - distance[node] <= tolerance * longest[node]:
                    continue
                link = slow[node]
                slow_min = time[link]
                steepness = slope[link]
                movable = own[link]
                slow_end = tail[link]
                link = fast[node]
                fast_min = time[link]
                steepness += slope[link]
                fast_end = tail[link]
                while slow_end != fast_end:
                    if rank[slow_end] > rank[fast_end]:
                        link = slow[slow_end]
                        slow_min += time[link]
                        steepness += slope[link]
                        movable = min(movable, own[link])
                        slow_end = tail[link]
                    else:
                        link = fast[fast_end]
                        fast_min += time[link]
                        steepness += slope[link]
                        fast_end = tail[link]
                moved = 0.0
                for _newton in range(3):
                    gain = slow_min - fast_min
                    if abs(gain) <= 0.1 * tolerance * slow_min:
                        break
                    if steepness > 0.0:
                        change = min(max(gain / steepness, -moved), movable - moved)
                    else:
                        change = movable - moved if gain > 0.0 else -moved
                    if change == 0.0:
                        break
                    moved += change
                    slow_min, one = _move(
                        node, slow_end, -change, slow, own, flow, law, time, slope, tail
                    )
                    fast_min, other = _move(
                        node, slow_end, change, fast, own, flow, law, time, slope, tail
                    )
                    steepness = one + other


def assign(
    network: RoadNetwork,
    trips_per_h: Matrix,
    capacity_share: Vector | None = None,
    wait_min: Vector | None = None,
    start: Equilibrium | None = None,
    target_gap: float = 1e-4,
    most_passes: int = 200,
) -> Equilibrium:
    """Spread `trips_per_h[from, to]` over the network until `gap` <= `target_gap`.

    Vectors over links are in the order that the network keeps. A link with
    `capacity_share` 0 is closed. `start` is any solution on the same links: a beginning.
    """
    links, nodes = network.tail.size, network.nodes
    law = network.law(
        np.ones(links) if capacity_share is None else capacity_share,
        np.zeros(links) if wait_min is None else wait_min,
    )
    if start is None:
        origin_flow = np.zeros((nodes, links))
        order = np.tile(np.arange(nodes, dtype=np.uint32), (nodes, 1))
        assigned = np.full((nodes, nodes), -1.0)
    else:
        origin_flow = start.origin_flow.copy()
        order = start.order.copy()
        assigned = start.assigned.copy()
    flow, time, slope = np.zeros(links), np.zeros(links), np.zeros(links)
    shape = (network.tail, network.first)
    _total(origin_flow, flow, law, time, slope)
    _project(origin_flow, order, trips_per_h, assigned, time, *shape)
    pair = np.empty((nodes, nodes))
    passes = 0
    while True:
        _total(origin_flow, flow, law, time, slope)
        _skim(order, time, *shape, pair)
        spent = _spent(flow, time)
        least = pair_total(assigned, pair)
        gap = max(1.0 - least / spent, 0.0) if spent > 0.0 else 0.0
        if gap <= target_gap or passes >= most_passes:
            break
        _sweep(origin_flow, order, flow, law, time, slope, *shape, target_gap / 10)
        passes += 1
    stranded = float((trips_per_h - assigned).sum())
    return Equilibrium(flow, time, pair, assigned, stranded, gap, passes, origin_flow, order)


def hold_routes(
    network: RoadNetwork, before: Equilibrium, capacity_share: Vector, wait_min: Vector
) -> Equilibrium:
    """The same drivers on the same paths when the roads have changed: only times are new.

    No link that carries flow may have closed.
    """
    law = network.law(capacity_share, wait_min)
    flow, time, slope = before.flow.copy(), np.empty_like(before.flow), np.empty_like(before.flow)
    _total(before.origin_flow, flow, law, time, slope)
    pair = np.empty_like(before.pair_min)
    _skim(before.order, time, network.tail, network.first, pair)
    least = pair_total(before.assigned, pair)
    spent = _spent(flow, time)
    gap = max(1.0 - least / spent, 0.0) if spent > 0.0 else 0.0
    return replace(before, flow=flow, time_min=time, pair_min=pair, gap=gap, passes=0)


@njit(cache=True)
def _last_links(
    pair: Matrix, time: Vector, tail: Index, first: Index, last: Index
) -> None:  # pragma: no cover - compiled
    for origin in range(pair.shape[0]):
        for node in range(pair.shape[1]):
            best = np.inf
            last[origin, node] = NO_LINK
            if node == origin:
                continue
            for link in range(first[node], first[node + 1]):
                label = pair[origin, tail[link]] + time[link]
                if label < best:
                    best = label
                    last[origin, node] = link


def last_links(network: RoadNetwork, at: Equilibrium) -> Index:
    """The last link of the shortest path for each [from, to]; `NO_LINK` where none is."""
    last = np.empty(at.pair_min.shape, np.uint32)
    _last_links(at.pair_min, at.time_min, network.tail, network.first, last)
    return last


@njit(cache=True)
def _blame(
    origins: NDArray[np.int64],
    targets: NDArray[np.int64],
    last: Index,
    tail: Index,
    rise: Vector,
    blamed: NDArray[np.int64],
) -> None:  # pragma: no cover - compiled
    for route in range(origins.size):
        origin = origins[route]
        at = targets[route]
        worst = 0.0
        blamed[route] = -1
        while at != origin:
            link = last[origin, at]
            if link == NO_LINK:
                break
            if rise[link] > worst:
                worst = rise[link]
                blamed[route] = link
            at = tail[link]


def blame(
    network: RoadNetwork,
    last: Index,
    origins: NDArray[np.int64],
    targets: NDArray[np.int64],
    rise: Vector,
) -> NDArray[np.int64]:
    """For each route the link of its usual path that rose most, -1 if none did."""
    blamed = np.empty(origins.size, np.int64)
    _blame(origins, targets, last, network.tail, rise, blamed)
    return blamed


def detour_min(network: RoadNetwork, time_min: Vector, out: list[NDArray[np.int64]]) -> Vector:
    """Extra minutes between the ends of each group of links when the group is closed.

    Infinite where no way round exists; the worst link of a group counts.
    """
    extra = np.zeros(len(out))
    order = np.arange(network.nodes, dtype=np.uint32)
    distance = np.empty(network.nodes)
    for group, links in enumerate(out):
        time = time_min.copy()
        time[links] = np.inf
        for link in links:
            start = int(network.tail[link])
            _shortest(start, order, time, network.tail, network.first, distance)
            extra[group] = max(extra[group], distance[network.head[link]] - time_min[link])
    return extra


class Traffic:
    """The equilibria of one network under one table of trips, remembered within a process.

    Every solution is a pure function of its arguments, whatever was asked before: it
    starts from the undamaged network, then the damaged one, then dark signals, in this
    order, each step with `target_gap`. So a memory of solutions only saves time.
    """

    def __init__(self, network: RoadNetwork, trips_per_day: Matrix, hourly_share: Vector) -> None:
        self.network = network
        self._trips_per_h = tuple(trips_per_day * share for share in hourly_share)
        self._normal: dict[int, Equilibrium] = {}
        self._kept: OrderedDict[tuple[object, ...], Equilibrium] = OrderedDict()
        self._last: OrderedDict[tuple[object, ...], Index] = OrderedDict()

    def trips_per_h(self, period: int, factor: float) -> Matrix:
        return np.asarray(self._trips_per_h[period] * factor)

    def normal(self, period: int) -> Equilibrium:
        """The undamaged network under the trips as given, to a gap of 1e-6; kept for good."""
        if period not in self._normal:
            self._normal[period] = assign(self.network, self._trips_per_h[period], target_gap=1e-6)
        return self._normal[period]

    def undamaged(self, period: int, factor: float, target_gap: float) -> Equilibrium:
        if factor == 1.0:
            return self.normal(period)
        key = (period, factor, target_gap)
        found = self._recall(key)
        if found is None:
            normal = self.normal(period)
            start = replace(
                normal, origin_flow=normal.origin_flow * factor, assigned=normal.assigned * factor
            )
            trips = self.trips_per_h(period, factor)
            found = assign(self.network, trips, start=start, target_gap=target_gap)
            self._keep(key, found)
        return found

    def usual_paths(self, period: int, factor: float, target_gap: float) -> Index:
        """`last_links` of the undamaged network."""
        key = (period, factor, target_gap)
        if key not in self._last:
            self._last[key] = last_links(self.network, self.undamaged(period, factor, target_gap))
            if len(self._last) > KEPT_EQUILIBRIA:
                self._last.popitem(last=False)
        return self._last[key]

    def damaged(
        self, period: int, factor: float, target_gap: float, capacity_share: Vector
    ) -> Equilibrium:
        undamaged = self.undamaged(period, factor, target_gap)
        if (capacity_share == 1.0).all():
            return undamaged
        key = (period, factor, target_gap, capacity_share.tobytes())
        found = self._recall(key)
        if found is None:
            trips = self.trips_per_h(period, factor)
            found = assign(
                self.network, trips, capacity_share, None, undamaged, target_gap, MOST_PASSES
            )
            self._keep(key, found)
        return found

    def dark(
        self,
        period: int,
        factor: float,
        target_gap: float,
        capacity_share: Vector,
        signal_share: Vector,
        wait_min: Vector,
    ) -> Equilibrium:
        """With damage and with signals out: `signal_share` is a further factor on capacity."""
        damaged = self.damaged(period, factor, target_gap, capacity_share)
        if (signal_share == 1.0).all() and (wait_min == 0.0).all():
            return damaged
        share = capacity_share * signal_share
        key = (period, factor, target_gap, capacity_share.tobytes(), share.tobytes(),
               wait_min.tobytes())  # fmt: skip
        found = self._recall(key)
        if found is None:
            trips = self.trips_per_h(period, factor)
            found = assign(self.network, trips, share, wait_min, damaged, target_gap, MOST_PASSES)
            self._keep(key, found)
        return found

    def _recall(self, key: tuple[object, ...]) -> Equilibrium | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def _keep(self, key: tuple[object, ...], found: Equilibrium) -> None:
        self._kept[key] = found
        if len(self._kept) > KEPT_EQUILIBRIA:
            self._kept.popitem(last=False)
