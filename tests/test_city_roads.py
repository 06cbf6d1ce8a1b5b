"""Traffic assignment: published equilibria, and what any equilibrium must satisfy."""

import importlib.metadata
import sqlite3
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from twins.city.layout import PERIOD_STARTS_H, period_of, read_layout
from twins.city.roads import (
    NO_LINK,
    Equilibrium,
    RoadNetwork,
    Traffic,
    assign,
    blame,
    detour_min,
    hold_routes,
    last_links,
)

Matrix = NDArray[np.float64]


def network(nodes: int, rows: Sequence[tuple[float, ...]]) -> RoadNetwork:
    """Links as (tail, head, capacity, free-flow minutes, b, power)."""
    table = np.array(rows)
    return RoadNetwork.of(
        nodes, table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), *table[:, 2:].T
    )


def beckmann(
    roads: RoadNetwork, flow: Matrix, wait: Matrix | float = 0.0, share: Matrix | float = 1.0
) -> float:
    """The integral that equilibrium flows make smallest, in vehicle-minutes per hour."""
    capacity = np.where(np.asarray(share) > 0.0, roads.capacity * share, 1.0)
    bend = roads.b * capacity / (roads.power + 1.0) * (flow / capacity) ** (roads.power + 1.0)
    return float((roads.free_flow_min * (flow + bend) + wait * flow).sum())


def braess(with_bridge: bool) -> Equilibrium:
    """Braess 1968: costs 10 x, 50 + x, 50 + x, 10 x, and 10 + x over the bridge; 6 trips."""
    rows = [
        (0, 1, 1, 1e-8, 1e9, 1),
        (0, 2, 1, 50, 0.02, 1),
        (1, 3, 1, 50, 0.02, 1),
        (2, 3, 1, 1e-8, 1e9, 1),
    ]
    if with_bridge:
        rows.append((1, 2, 1, 10, 0.1, 1))
    trips = np.zeros((4, 4))
    trips[0, 3] = 6.0
    return assign(network(4, rows), trips, target_gap=1e-10)


@pytest.mark.parametrize(("with_bridge", "published"), [(True, 92.0), (False, 83.0)])
def test_a_new_bridge_makes_every_journey_longer(with_bridge: bool, published: float) -> None:
    assert braess(with_bridge).pair_min[0, 3] == pytest.approx(published, abs=1e-6)


def sioux_falls() -> tuple[RoadNetwork, Matrix]:
    """The network and trips that the wheel of AequilibraE carries; may not be copied here."""
    try:
        wheel = importlib.metadata.distribution("aequilibrae")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the data in the aequilibrae wheel (pip install --no-deps aequilibrae)")
    archive = zipfile.ZipFile(
        Path(str(wheel.locate_file("aequilibrae/reference_files/sioux_falls.zip")))
    )
    database = sqlite3.connect(":memory:")
    database.deserialize(archive.read("project_database.sqlite"))
    rows = database.execute(
        "select a_node - 1, b_node - 1, capacity_ab, free_flow_time, b, power from links"
    ).fetchall()
    cells = archive.read("matrices/demand.aem")[-24 * 24 * 8 :]
    return network(24, rows), np.frombuffer(cells, "<f8").reshape(24, 24).copy()


@pytest.mark.published
def test_sioux_falls_agrees_with_the_best_known_solution() -> None:
    roads, trips = sioux_falls()
    assert (roads.tail.size, trips.sum()) == (76, 360_600)
    found = assign(roads, trips, target_gap=1e-9)
    assert beckmann(roads, found.flow) == pytest.approx(4_231_335.28710744, rel=1e-9)
    assert found.total_min == pytest.approx(7_480_225.3449, rel=1e-6)


@st.composite
def towns(draw: st.DrawFn) -> tuple[RoadNetwork, Matrix, Matrix, Matrix]:
    """A random network with trips, some links closed or narrowed, and waits at junctions."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    nodes = draw(st.integers(3, 14))
    pairs = [(a, b) for a in range(nodes) for b in range(nodes) if a != b]
    picked = random.permutation(len(pairs))[: draw(st.integers(nodes, 4 * nodes))]
    rows = [
        (*pairs[p], random.uniform(200, 2000), random.uniform(0.1, 10), 0.15,
         random.choice([1, 4, 4, 5.5]))
        for p in picked
    ]  # fmt: skip
    trips = random.uniform(0, 300, (nodes, nodes)) * (random.random((nodes, nodes)) < 0.5)
    share = random.choice([0.0, 0.5, 1.0, 1.0], len(rows))
    wait = random.choice([0.0, 0.25], len(rows))
    return network(nodes, rows), trips, share, wait


def check_equilibrium(
    roads: RoadNetwork, trips: Matrix, share: Matrix, found: Equilibrium, gap: float
) -> None:
    nodes = roads.nodes
    reached = np.isfinite(found.pair_min)
    assert np.array_equal(found.assigned, np.where(reached, trips, 0.0))
    assert found.stranded_per_h == pytest.approx(trips.sum() - found.assigned.sum(), abs=1e-6)
    assert (found.flow >= 0.0).all()
    assert (found.flow[share == 0.0] == 0.0).all()
    for origin in range(nodes):
        own = found.origin_flow[origin]
        arrives = np.bincount(roads.head, own, nodes) - np.bincount(roads.tail, own, nodes)
        expected = found.assigned[origin].copy()
        expected[origin] = -(expected.sum() - expected[origin])
        assert arrives == pytest.approx(expected, abs=1e-6 * max(trips.sum(), 1.0))
    # Wardrop: what is spent is what the shortest paths take
    spent = float(found.flow[found.flow > 0] @ found.time_min[found.flow > 0])
    least = float((found.assigned * np.where(reached, found.pair_min, 0.0)).sum())
    assert least <= spent * (1 + 1e-9)
    assert spent - least <= gap * spent + 1e-9


@given(towns())
@settings(max_examples=60, deadline=None)
def test_no_driver_can_gain_and_every_trip_is_assigned_or_stranded(
    town: tuple[RoadNetwork, Matrix, Matrix, Matrix],
) -> None:
    roads, trips, share, wait = town
    found = assign(roads, trips, share, wait, target_gap=1e-4, most_passes=5000)
    assert found.gap <= 1e-4
    check_equilibrium(roads, trips, share, found, 1e-4)


@given(towns())
@settings(max_examples=40, deadline=None)
def test_closing_roads_under_traffic_ends_where_starting_afresh_does(
    town: tuple[RoadNetwork, Matrix, Matrix, Matrix],
) -> None:
    roads, trips, share, wait = town
    before = assign(roads, trips, target_gap=1e-4, most_passes=5000)
    warm = assign(roads, 0.8 * trips, share, wait, before, 1e-4, 5000)
    cold = assign(roads, 0.8 * trips, share, wait, None, 1e-4, 5000)
    check_equilibrium(roads, 0.8 * trips, share, warm, 1e-4)
    # the integral that both make smallest is convex: they may differ by the gap, not more
    low, high = sorted(beckmann(roads, f.flow, wait, share) for f in (warm, cold))
    assert high - low <= 1e-4 * max(warm.total_min, cold.total_min) + 1e-6
    again = assign(roads, 0.8 * trips, share, wait, before, 1e-4, 5000)
    assert np.array_equal(warm.origin_flow, again.origin_flow)


@given(towns())
@settings(max_examples=30, deadline=None)
def test_drivers_who_keep_their_paths_only_lose_time(
    town: tuple[RoadNetwork, Matrix, Matrix, Matrix],
) -> None:
    roads, trips, share, wait = town
    before = assign(roads, trips, share, target_gap=1e-5, most_passes=5000)
    after = hold_routes(roads, before, 0.7 * share, wait)
    used = before.flow > 0
    assert after.flow == pytest.approx(before.flow)
    assert (after.time_min[used] >= before.time_min[used] * (1 - 1e-12)).all()
    assert after.stranded_per_h == before.stranded_per_h


def test_a_slow_journey_is_blamed_on_the_link_that_rose_most() -> None:
    roads = network(4, [(0, 1, 1, 5, 0, 1), (1, 2, 1, 5, 0, 1), (2, 3, 1, 5, 0, 1)])
    usual = assign(roads, np.zeros((4, 4)))
    last = last_links(roads, usual)
    rise = np.zeros(3)
    rise[roads.head == 2] = 3.0
    rise[roads.head == 3] = 1.0
    start, end = np.array([0, 2, 0, 3]), np.array([3, 3, 1, 0])
    blamed = blame(roads, last, start, end, rise)
    assert [int(roads.head[link]) if link >= 0 else None for link in blamed] == [2, 3, None, None]
    assert last[3, 0] == NO_LINK


def test_the_detour_of_a_road_is_the_way_round_less_the_way_through() -> None:
    ring = [(a, b, 1, 4, 0, 1) for a, b in ((0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2))]
    roads = network(4, [*ring, (2, 3, 1, 7, 0, 1), (3, 2, 1, 7, 0, 1)])
    of = [
        np.flatnonzero(
            (np.minimum(roads.tail, roads.head) == a) & (np.maximum(roads.tail, roads.head) == b)
        )
        for a, b in ((0, 1), (2, 3))
    ]
    assert list(detour_min(roads, roads.free_flow_min, of)) == [4.0, np.inf]


def test_what_was_asked_before_does_not_change_an_equilibrium() -> None:
    layout = read_layout("shelby")
    roads = layout.traffic.network
    trips = np.add.outer(np.arange(roads.nodes), np.arange(roads.nodes)) % 7 * 3.0
    share = np.where(np.arange(roads.tail.size) % 9 == 0, 0.0, 1.0)
    dark = np.where(np.arange(roads.tail.size) % 4 == 0, 0.5, 1.0)
    wait = np.zeros(roads.tail.size)
    fresh, used = (Traffic(roads, trips, np.array([0.05, 0.02])) for _ in range(2))
    used.dark(1, 0.7, 1e-3, share, dark, wait)
    used.damaged(0, 0.6, 1e-3, dark)
    used.dark(0, 0.6, 1e-3, dark, share * 0.5 + 0.5, wait)
    ours = fresh.dark(0, 0.6, 1e-3, share, dark, wait)
    theirs = used.dark(0, 0.6, 1e-3, share, dark, wait)
    assert np.array_equal(ours.origin_flow, theirs.origin_flow)
    assert np.array_equal(ours.pair_min, theirs.pair_min)


def test_the_day_is_covered_by_its_periods() -> None:
    periods = [period_of(hour) for hour in range(24)]
    assert set(periods) == set(range(len(PERIOD_STARTS_H)))
    assert periods[0] == periods[5] == periods[22] == periods[23]


def test_a_whole_day_of_the_region_carries_every_trip() -> None:
    layout = read_layout("shelby")
    hours = np.bincount([period_of(hour) for hour in range(24)])
    found = [layout.traffic.normal(period) for period in range(hours.size)]
    assert max(one.gap for one in found) <= 1e-6
    assert sum(h * one.assigned.sum() for h, one in zip(hours, found, strict=True)) == (
        pytest.approx(652_945, rel=1e-6)
    )
    assert all(one.stranded_per_h == 0.0 for one in found)
