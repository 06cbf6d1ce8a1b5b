"""The city twin as the federation drives it: damage in, causes and service out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    Action,
    Event,
    LinearBlock,
    Session,
    StepInput,
    Vector,
)
from federation.twin import StepResult as Result
from twins.city.roads import CUT_MIN
from twins.city.twin import CityTwin
from twins.regions import hospital_routes, scene_routes

STEP = 15 * MINUTE_NS
Causes = Mapping[int, tuple[str, ...]]


@dataclass
class City:
    """A session with everything that it has shown so far."""

    session: Session
    now_ns: int = -STEP
    stored_at_start_m3: float = 0.0
    shown: dict[str, Vector] = field(default_factory=dict)
    causes: dict[str, dict[int, str]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def ids(self, kind: str) -> tuple[str, ...]:
        return self.session.description.ids(kind)

    def step(
        self,
        inputs: Mapping[str, Vector] | None = None,
        causes: Mapping[str, Causes] | None = None,
        actions: Iterable[Action] = (),
    ) -> Result:
        self.now_ns += STEP
        result = self.session.advance(
            StepInput(self.now_ns, 0, inputs or {}, causes or {}, tuple(actions))
        )
        if not self.shown:
            self.stored_at_start_m3 = float(result.outputs["water_stored_m3"][0])
        self.shown.update(result.outputs)
        for variable, because in result.causes.items():
            self.causes.setdefault(variable, {}).update(because)
        self.events += result.events
        return result

    def until(self, hours: float) -> None:
        while self.now_ns < round(hours * HOUR_NS):
            self.step()

    def total(self, name: str) -> float:
        return float(self.shown[name][0])

    def named(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def roots(self, event_id: str) -> set[str]:
        """The events of others at the far end of a chain of causes."""
        causes = {event.id: event.causes for event in self.events}.get(event_id)
        if causes is None:
            return {event_id}
        return set().union(*(self.roots(cause) for cause in causes))

    def vector(self, kind: str, values: Mapping[str, float], usual: float = 0.0) -> Vector:
        vector = np.full(len(self.ids(kind)), usual)
        for name, value in values.items():
            vector[self.ids(kind).index(name)] = value
        return vector

    def damage_roads(self, states: Mapping[str, float], work_h: float = 10.0) -> Result:
        state = self.vector("road", states)
        hit = {int(i): ("quake/1",) for i in np.flatnonzero(state)}
        return self.step(
            {"road_damage_state": state, "road_repair_work": state * work_h},
            {"road_damage_state": hit, "road_repair_work": hit},
        )

    def damage_water(self, states: Mapping[str, float], work_h: float = 10.0) -> Result:
        state = self.vector("water_component", states)
        hit = {int(i): ("quake/1",) for i in np.flatnonzero(state)}
        return self.step(
            {"water_damage_state": state, "water_repair_work": state * work_h},
            {"water_damage_state": hit, "water_repair_work": hit},
        )


@contextmanager
def city(**parameters: float) -> Iterator[City]:
    twin = CityTwin()
    session = Session(twin, "city")
    session.open(1, parameters)
    yield City(session)
    twin.close()


def busiest(one: City, count: int) -> list[str]:
    order = np.argsort(-one.shown["link_flow"], kind="stable")
    return [one.ids("road")[i] for i in order[:count]]


def check_books(one: City) -> None:
    assigned, stranded = one.total("vehicles_assigned"), one.total("vehicles_stranded")
    assert one.total("vehicles_demanded") == pytest.approx(assigned + stranded, rel=1e-9, abs=1e-6)
    gone = one.total("water_delivered_m3") + one.total("water_leaked_m3")
    stored = one.total("water_stored_m3") - one.stored_at_start_m3
    assert one.total("water_pumped_m3") == pytest.approx(gone + stored, rel=1e-5, abs=1.0)


def test_an_undisturbed_day_has_no_delay_no_thirst_and_no_news() -> None:
    with city(start_hour=0) as one:
        one.until(24)
        assert one.events == []
        assert one.total("vehicle_hours_delay") == 0.0
        assert one.total("vehicles_demanded") == pytest.approx(652_945, rel=1e-6)
        assert one.total("vehicles_stranded") == 0.0
        assert one.total("unserved_water_m3") == pytest.approx(0.0, abs=1.0)
        assert (one.shown["junction_service"] == 1.0).all()
        assert one.shown["scene_time"].max() < 90
        check_books(one)


def test_routes_are_those_of_the_region_in_its_order() -> None:
    with city() as one:
        assert one.ids("scene_route") == tuple(f"{a}>{b}" for a, b in scene_routes("shelby"))
        assert one.ids("hospital_route") == tuple(f"{a}>{b}" for a, b in hospital_routes("shelby"))


def test_a_closed_road_slows_journeys_that_name_it() -> None:
    with city() as one:
        one.until(1)
        before = one.shown["scene_time"].copy()
        road = busiest(one, 1)[0]
        one.damage_roads({road: 3})
        (closed,) = one.named("road_closed")
        assert (closed.entity, closed.causes) == (road, ("quake/1",))
        assert one.shown["road_open"].sum() == len(one.ids("road")) - 1
        assert one.shown["link_flow"][one.ids("road").index(road)] == 0.0
        slower = np.flatnonzero(one.shown["scene_time"] > 1.3 * before)
        assert slower.size
        explained = [one.causes["scene_time"][int(route)] for route in slower]
        assert closed.id in explained
        assert all(one.roots(event) == {"quake/1"} for event in explained)
        one.until(3)
        assert one.total("vehicle_hours_delay") > 0.0
        check_books(one)


def test_a_crew_reopens_a_road_and_journeys_are_as_before() -> None:
    with city(traffic_after_shock=1.0) as one:
        one.until(1)
        road = busiest(one, 1)[0]
        index = one.ids("road").index(road)
        usual = one.shown["scene_time"].copy()
        one.damage_roads({road: 2}, work_h=1.0)
        slowed = np.flatnonzero(one.shown["scene_time"] > 1.3 * usual)
        one.step(actions=[Action("city", "assign_crew_road", road, 2, "plan/7")])
        sent_ns, travel_min = one.now_ns, one.shown["crew_travel_road"][index]
        (sent,) = one.named("crew_assigned")
        assert sent.causes == ("plan/7", one.named("road_closed")[0].id)
        assert one.shown["road_crew_busy"][index] == 2.0
        # two crew-hours of work for two crews
        due_ns = sent_ns + round(travel_min * MINUTE_NS) + HOUR_NS
        while one.now_ns + STEP < due_ns:
            one.step()
            assert one.shown["road_intact"][index] == 0.0
        one.step()
        assert one.shown["road_intact"][index] == 1.0
        assert one.shown["road_crew_busy"][index] == 0.0
        (repaired,), (reopened,) = one.named("component_repaired"), one.named("road_reopened")
        assert sent.id in repaired.causes
        assert reopened.causes == (repaired.id,)
        assert one.causes["road_intact"][index] == reopened.id
        assert one.shown["scene_time"] == pytest.approx(usual, rel=1e-3)
        assert {one.causes["scene_time"][int(route)] for route in slowed} == {reopened.id}


def test_a_place_that_is_cut_off_is_a_declared_day_away_and_its_trips_are_stranded() -> None:
    with city() as one:
        one.until(0)
        layout = one.session.twin.layout  # type: ignore[attr-defined]
        network = layout.traffic.network
        node = int(layout.scene_to[0])
        around = np.flatnonzero((network.head == node) | (network.tail == node))
        roads = {layout.roads[layout.link_road[link]]: 4.0 for link in around}
        one.damage_roads(roads)
        open_ = ~np.isin(np.arange(network.tail.size), around)
        nodes = len(layout.nodes)
        ends = (network.tail[open_], network.head[open_])
        left = coo_array((np.ones(open_.sum()), ends), (nodes, nodes))
        _, piece = connected_components(left, connection="strong")
        away = piece[layout.scene_from] != piece[layout.scene_to]
        assert away.any()
        assert np.array_equal(one.shown["scene_time"] == CUT_MIN, away)
        one.until(2)
        assert one.total("vehicles_stranded") > 0.0
        closings = {event.id for event in one.named("road_closed")}
        assert {one.causes["scene_time"][int(r)] for r in np.flatnonzero(away)} <= closings
        check_books(one)


def test_slight_damage_narrows_roads_with_one_event() -> None:
    with city() as one:
        one.until(1)
        flow = one.shown["link_flow"].copy()
        one.damage_roads(dict.fromkeys(busiest(one, 12), 1.0))
        (narrowed,) = one.named("roads_narrowed")
        assert narrowed.causes == ("quake/1",)
        assert one.shown["road_open"].min() == 1.0
        assert not np.array_equal(one.shown["link_flow"], flow)


def test_dark_signals_make_one_event_per_cause_and_slow_the_traffic() -> None:
    with city() as one:
        one.until(1)
        usual = one.shown["hospital_time"].copy()
        nodes = len(one.ids("road_node"))
        power = np.zeros(nodes)
        because = {i: (f"energy/{1 + i % 2}",) for i in range(nodes)}
        one.step({"signal_power": power}, {"signal_power": because})
        dark = one.named("signals_dark")
        assert sorted(event.causes for event in dark) == [("energy/1",), ("energy/2",)]
        assert one.total("signals_out") == 162
        assert one.shown["hospital_time"].mean() > usual.mean()
        slower = np.flatnonzero(one.shown["hospital_time"] > 1.25 * usual)
        assert {one.causes["hospital_time"][int(r)] for r in slower} == {e.id for e in dark}
        one.step({"signal_power": np.ones(nodes)}, {"signal_power": dict.fromkeys(because, ())})
        assert len(one.named("signals_restored")) == 2
        assert one.total("signals_out") == 0


def test_batteries_keep_signals_lit_for_as_long_as_they_last() -> None:
    with city(signal_backup_h=0.5) as one:
        one.step({"signal_power": np.zeros(len(one.ids("road_node")))})
        assert one.total("signals_out") == 0
        one.step()
        assert one.total("signals_out") == 0
        one.step()
        assert one.total("signals_out") == 162


def test_pumps_without_power_empty_the_tanks_until_junctions_are_dry() -> None:
    with city() as one:
        one.until(1)
        pumps = len(one.ids("pump"))
        load = one.shown["pump_load"].copy()
        because = dict.fromkeys(range(pumps), ("energy/9",))
        one.step({"pump_power": np.zeros(pumps)}, {"pump_power": because})
        assert len(one.named("pump_stopped")) == pumps
        # a pump that wants to run goes on asking for its power
        assert one.shown["pump_load"] == pytest.approx(load)
        store = one.total("water_stored_m3")
        one.until(72)
        assert one.total("water_stored_m3") < store
        dry = one.named("junction_dry")
        assert dry
        assert all(one.roots(event.id) == {"energy/9"} for event in dry)
        assert one.total("unserved_water_m3") > 0
        assert one.total("people_without_water") > 0
        short = np.flatnonzero(one.shown["junction_service"] < 0.99)
        assert all(one.roots(one.causes["junction_service"][int(j)]) == {"energy/9"} for j in short)
        check_books(one)
        back = dict.fromkeys(range(pumps), ("energy/10",))
        one.step({"pump_power": np.ones(pumps)}, {"pump_power": back})
        one.until(80)
        restored = one.named("water_restored")
        assert {event.entity for event in restored} == {event.entity for event in dry}
        assert all("energy/10" in one.roots(event.id) for event in restored)
        check_books(one)


def test_half_of_its_power_is_enough_for_a_pump_but_no_less() -> None:
    with city() as one:
        pumps = len(one.ids("pump"))
        one.step({"pump_power": np.full(pumps, 0.5)})
        assert one.named("pump_stopped") == []
        one.step({"pump_power": np.full(pumps, 0.49)})
        assert len(one.named("pump_stopped")) == pumps


def test_mains_leak_when_slightly_damaged_and_are_shut_when_broken() -> None:
    with city() as one:
        one.until(1)
        one.damage_water({"W_PMA1": 1, "W_PMA35": 2, "W_WP81": 2, "W_T60": 3})
        assert [e.entity for e in one.named("main_leaking")] == ["W_PMA1"]
        assert [e.entity for e in one.named("main_broken")] == ["W_PMA35"]
        assert [e.entity for e in one.named("pump_stopped")] == ["W_WP81"]
        assert [e.entity for e in one.named("tank_out")] == ["W_T60"]
        assert one.shown["pump_load"][one.ids("pump").index("W_WP81")] == 0.0
        one.until(5)
        assert one.total("water_leaked_m3") > 0
        check_books(one)
        crews = ("W_PMA1", "W_PMA35", "W_WP81", "W_T60")
        one.step(actions=[Action("city", "assign_crew_water", name, 3) for name in crews])
        leaked = one.total("water_leaked_m3")
        one.until(30)
        assert (one.shown["water_intact"] == 1.0).all()
        assert [e.entity for e in one.named("pump_restarted")] == ["W_WP81"]
        at_whole = one.total("water_leaked_m3")
        assert at_whole > leaked
        one.until(32)
        assert one.total("water_leaked_m3") == at_whole
        check_books(one)


def test_a_hospital_that_needs_more_water_draws_it_at_its_junction() -> None:
    with city() as one:
        one.until(1)
        before = one.total("water_delivered_m3")
        one.step()
        usual = one.total("water_delivered_m3") - before
        need = np.full(len(one.ids("hospital")), -1.0)
        need[0] = 39.7 + 400.0
        one.step({"hospital_water_need": need})
        before = one.total("water_delivered_m3")
        one.step()
        assert one.total("water_delivered_m3") - before == pytest.approx(usual + 100.0, rel=1e-3)


def wreck(one: City, seed: int) -> None:
    """Damage, outages and crews at random, over some hours."""
    random = np.random.default_rng(seed)
    road = np.where(random.random(len(one.ids("road"))) < 0.2, random.integers(1, 5), 0)
    parts = np.where(random.random(len(one.ids("water_component"))) < 0.2, random.integers(1, 4), 0)
    one.step(
        {
            "road_damage_state": road.astype(float),
            "road_repair_work": road * 2.0,
            "water_damage_state": parts.astype(float),
            "water_repair_work": parts * 2.0,
        },
        {"road_damage_state": dict.fromkeys(range(road.size), ("quake/1",))},
    )
    for _ in range(int(random.integers(1, 4))):
        signals = (random.random(len(one.ids("road_node"))) < 0.5).astype(float)
        pumps = (random.random(len(one.ids("pump"))) < 0.5).astype(float)
        one.step({"signal_power": signals, "pump_power": pumps})
        check_books(one)
    work = np.flatnonzero(road)[:6]
    actions = [Action("city", "assign_crew_road", one.ids("road")[i], 1) for i in work]
    one.step(actions=actions)


def transcript(one: City, steps: int) -> list[object]:
    lines: list[object] = []
    for _ in range(steps):
        result = one.step()
        lines.append({name: value.tobytes() for name, value in result.outputs.items()})
        lines.append((result.events, result.causes))
    return lines


@given(st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_a_restored_session_goes_on_bit_for_bit(seed: int) -> None:
    with city() as one, city() as other:
        one.until(1)
        wreck(one, seed)
        other.now_ns = one.now_ns
        other.session.twin.restore(one.session.twin.snapshot())
        other.session.last_ns, other.session.serial = one.session.last_ns, one.session.serial
        other.session.values = dict(one.session.values)
        other.session.input_causes = {k: dict(v) for k, v in one.session.input_causes.items()}
        assert transcript(one, 20) == transcript(other, 20)


@given(st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_sessions_of_one_process_do_not_disturb_one_another(seed: int) -> None:
    with city() as alone:
        alone.until(0.5)
        wreck(alone, seed)
        expected = transcript(alone, 6)
    with city() as one, city(pressure_required_m=20, start_hour=17) as noise:
        for hours in (0, 0.25, 0.5):
            one.until(hours)
            noise.until(4 * hours)
        wreck(noise, seed + 1)
        wreck(one, seed)
        lines = []
        for _ in range(6):
            noise.step()
            lines += transcript(one, 1)
        assert lines == expected


@given(st.integers(0, 10_000))
@settings(max_examples=6, deadline=None)
def test_the_books_balance_under_any_damage(seed: int) -> None:
    with city(start_hour=float(seed % 24)) as one:
        one.step()
        wreck(one, seed)
        for _ in range(10):
            one.step()
            check_books(one)
            for name in ("scene_time", "hospital_time"):
                assert one.shown[name].max() <= CUT_MIN
            assert one.total("traffic_gap") <= 0.1


# the linear block


def solve(block: LinearBlock, fixed: Mapping[str, float | Vector]) -> dict[str, Vector]:
    """Minimise the block with some ports fixed; the values of its families of columns."""
    low, high = block.low.copy(), block.high.copy()
    for port in block.ports:
        if port.name in fixed:
            value = np.broadcast_to(np.reshape(fixed[port.name], (-1, 1)), port.columns.shape)
            low[port.columns] = high[port.columns] = value
    size = (len(block.rows), len(block.columns))
    matrix = coo_array((block.coefficient, (block.row_index, block.column_index)), size).tocsr()
    found = milp(
        block.cost,
        integrality=block.integer.astype(np.int64),
        bounds=Bounds(low, high),
        constraints=LinearConstraint(matrix, block.row_low, block.row_high),
    )
    assert found.status == 0, found.message
    values: dict[str, list[float]] = {}
    for name, one in zip(block.columns, found.x.tolist(), strict=True):
        values.setdefault(name.split("[")[0], []).append(one)
    result: dict[str, Vector] = {name: np.array(family) for name, family in values.items()}
    result["cost"] = np.array([found.fun])
    return result


HORIZON = (HOUR_NS, 3 * HOUR_NS, 8 * HOUR_NS)


def blocked(**parameters: float) -> LinearBlock:
    with city(**parameters) as one:
        block = one.session.twin.flexibility(HORIZON)
        assert block is not None
        return block


def test_the_block_of_a_whole_city_serves_all_at_no_cost() -> None:
    block = blocked()
    found = solve(block, {"water_intact": 1.0, "road_intact": 1.0, "pump_power": 1.0})
    assert found["cost"][0] == pytest.approx(0.0, abs=1e-6)
    assert found["unserved"].max() == pytest.approx(0.0, abs=1e-6)


def test_the_block_lives_on_its_tanks_when_pumps_are_without_power() -> None:
    block = blocked()
    found = solve(block, {"water_intact": 1.0, "road_intact": 1.0, "pump_power": 0.0})
    assert found["pump_flow"].max() == pytest.approx(0.0, abs=1e-9)
    stored = found["tank_store"].reshape(-1, len(HORIZON))
    assert (np.diff(stored.sum(axis=0)) <= 1e-6).all()
    with city() as one:
        one.step()
        network = one.session.twin.layout.water  # type: ignore[attr-defined]
        served = found["served"].reshape(-1, len(HORIZON)) @ (np.array(HORIZON) / HOUR_NS)
        drained = one.stored_at_start_m3 - stored[:, -1].sum()
        assert served.sum() == pytest.approx(drained, rel=1e-6)
        assert served.sum() <= one.stored_at_start_m3 * (1 + 1e-9)
        assert network.base_demand.sum() > 0


def test_the_block_prices_what_is_missing() -> None:
    block = blocked(value_unserved_water_m3=200.0)
    hours = sum(HORIZON) / HOUR_NS
    found = solve(block, {"water_intact": 0.0, "road_intact": 1.0, "pump_power": 1.0})
    demand = block.high[[name.startswith("served") for name in block.columns]].reshape(-1, 3)[:, 0]
    # with no main, pump or tank only what a pump stands at would be served, and no pump runs
    assert found["cost"][0] == pytest.approx(200.0 * demand.sum() * hours, rel=1e-6)
    assert found["hospital_water"].min() == 0.0
    shut = solve(block, {"water_intact": 1.0, "road_intact": 0.0, "pump_power": 1.0})
    prices = block.cost[[name.startswith("road_shut") for name in block.columns]]
    assert shut["cost"][0] == pytest.approx(prices.sum(), rel=1e-6)
    assert prices.min() >= 0.0
    assert prices.max() > 0.0


def test_the_block_is_well_formed() -> None:
    block = blocked()
    count = len(block.columns)
    assert len(set(block.columns)) == count
    assert len(set(block.rows)) == len(block.rows)
    assert block.low.size == block.high.size == block.cost.size == block.integer.size == count
    assert block.row_low.size == block.row_high.size == len(block.rows)
    assert block.row_index.max() < len(block.rows)
    assert block.column_index.max() < count
    assert (block.low <= block.high).all()
    for port in block.ports:
        assert port.columns.shape == (len(port.entities), len(HORIZON))
        first = block.columns[port.columns[0, 0]]
        assert first == f"{port.name}[{port.entities[0]},0]"
    assert {(port.name, port.role) for port in block.ports} == {
        ("water_intact", "available"),
        ("road_intact", "available"),
        ("pump_power", "need"),
        ("hospital_water", "supply"),
    }
