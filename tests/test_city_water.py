"""The water engine: hydraulics that fit in the head, and balances under any damage."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twins.city.water import (
    ORIFICE,
    Flows,
    Hydraulics,
    WaterNetwork,
    WaterState,
    pass_time,
    read_network,
)
from twins.regions import region_file

LINE = """[JUNCTIONS]
J 0 100
[RESERVOIRS]
R {head}
[PIPES]
P R J 1000 300 100 0 Open
[OPTIONS]
Units CMH
Headloss H-W
Accuracy 0.000001
[END]
"""


def shelby() -> WaterNetwork:
    return read_network(region_file("shelby", "water.inp"))


def whole(network: WaterNetwork) -> WaterState:
    return WaterState(
        network.demand(8.0),
        network.tank_start,
        np.ones(len(network.pumps), np.bool_),
        np.ones(len(network.pipes), np.bool_),
        np.zeros(len(network.junctions)),
    )


def same_bits(one: Flows, other: Flows) -> bool:
    return all(
        getattr(one, f.name).tobytes() == getattr(other, f.name).tobytes() for f in fields(Flows)
    )


def test_one_pipe_loses_the_head_that_hazen_and_williams_give(tmp_path: Path) -> None:
    file = tmp_path / "line.inp"
    file.write_text(LINE.format(head=50))
    network = read_network(file)
    flows = Hydraulics(network, 0.0, 14.0).solve(whole(network))
    loss = 10.67 * 1000 * (100 / 3600) ** 1.852 / (100**1.852 * 0.3**4.871)
    assert flows.delivered[0] == pytest.approx(100.0)
    assert flows.pressure[0] == pytest.approx(50 - loss, rel=1e-3)


def test_low_pressure_delivers_by_its_square_root(tmp_path: Path) -> None:
    file = tmp_path / "low.inp"
    file.write_text(LINE.format(head=5))
    network = read_network(file)
    flows = Hydraulics(network, 0.0, 20.0).solve(whole(network))
    assert 0.0 < flows.pressure[0] < 5.0
    assert flows.delivered[0] == pytest.approx(100 * np.sqrt(flows.pressure[0] / 20), rel=1e-3)


def test_a_leak_runs_like_an_orifice(tmp_path: Path) -> None:
    file = tmp_path / "leak.inp"
    file.write_text(LINE.format(head=30))
    network = read_network(file)
    hole_m2 = 0.001
    state = replace(whole(network), demand=np.zeros(1), leak=np.array([ORIFICE * hole_m2]))
    flows = Hydraulics(network, 0.0, 14.0).solve(state)
    orifice = 0.6 * hole_m2 * np.sqrt(2 * 9.81 * flows.pressure[0]) * 3600
    assert flows.leaked[0] == pytest.approx(orifice, rel=1e-3)
    assert flows.delivered[0] == 0.0


def test_the_undamaged_network_serves_everyone() -> None:
    network = shelby()
    state = whole(network)
    flows = Hydraulics(network, 0.0, 14.0).solve(state)
    assert flows.delivered == pytest.approx(state.demand, rel=1e-4)
    assert abs(flows.balance()) < 0.1


@st.composite
def damages(draw: st.DrawFn) -> WaterState:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    network, fails = shelby(), draw(st.floats(0.0, 0.9))
    span = network.tank_high - network.tank_low
    hole = ORIFICE * draw(st.floats(1e-4, 0.03))
    return WaterState(
        network.demand(random.uniform(0, 24)),
        network.tank_low + span * random.choice([0.0, 0.4, 1.0], len(network.tanks)),
        random.random(len(network.pumps)) >= fails,
        random.random(len(network.pipes)) >= fails * random.random(),
        np.where(random.random(len(network.junctions)) < 0.2, hole, 0.0),
    )


@given(damages())
@settings(max_examples=80, deadline=None)
def test_water_is_neither_made_nor_lost(state: WaterState) -> None:
    network = shelby()
    flows = Hydraulics(network, 0.0, 14.0).solve(state)
    assert abs(flows.balance()) < 0.5
    assert (flows.delivered >= 0.0).all()
    assert (flows.delivered <= state.demand).all()
    assert (flows.leaked >= 0.0).all()
    assert (flows.pump_flow[~state.pump_open] == 0.0).all()


@given(st.lists(damages(), min_size=2, max_size=4))
@settings(max_examples=20, deadline=None)
def test_equal_states_give_equal_bits_whatever_ran_before(states: list[WaterState]) -> None:
    network = shelby()
    used, fresh = Hydraulics(network, 0.0, 14.0), Hydraulics(network, 0.0, 14.0)
    first = used.solve(states[0])
    for state in states[1:]:
        used.solve(state)
    assert same_bits(first, used.solve(states[0]))
    assert same_bits(first, fresh.solve(states[0]))


@given(damages(), st.floats(0.05, 12.0))
@settings(max_examples=40, deadline=None)
def test_tanks_keep_the_books_and_their_bounds(state: WaterState, span_h: float) -> None:
    network = shelby()
    span = pass_time(Hydraulics(network, 0.0, 14.0), state, span_h)
    assert (span.level >= network.tank_low).all()
    assert (span.level <= network.tank_high).all()
    stored = float(((span.level - state.level) * network.tank_area_m2).sum())
    lost = span.pumped - span.delivered - span.leaked - stored
    assert abs(lost) < 0.5 * span_h + 1e-3 * span.pumped
    assert 0.0 <= span.delivered <= span.required * (1 + 1e-12)


def test_an_engine_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = shelby()
    engine = Hydraulics(network, 0.0, 14.0)
    engine.solve(whole(network))
    assert list(tmp_path.iterdir()) == []
    engine.close()
    assert list(tmp_path.iterdir()) == []
