"""Tie lines and plants of the energy twin: their physics against pandapower, and their story."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandapower as pp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.twin import HOUR_NS, MINUTE_NS, Action, Session, StepInput, StepResult, Vector
from twins.energy import EnergyTwin
from twins.energy.demand import Day, feeder_demand
from twins.energy.network import Complex, PowerNet, power_net
from twins.energy.operation import SCARCE, ControlRoom, Limits, Operation
from twins.energy.powerflow import newton_klu
from twins.energy.ties import LEASE_NS, Exchange, operate

STEP_NS = 5 * MINUTE_NS
USUAL = Limits(1.2, 0.88)


@lru_cache(maxsize=2)
def room(region: str) -> ControlRoom:
    return ControlRoom(power_net(region).grid, newton_klu)


def demand(net: PowerNet, share: float) -> Complex:
    untold = (np.full(len(net.hospitals), -1.0), np.full(len(net.pumps), -1.0))
    return feeder_demand(net, share, *untold).node_mva(net)


def run(
    region: str, share: float, agreed_mw: Sequence[float], out: Sequence[str] = ()
) -> Operation:
    """A grid with some components out and something agreed over each of its tie lines."""
    net = power_net(region)
    branch_on = np.ones(net.grid.branches, dtype=bool)
    infeed_on = np.ones(net.grid.infeed_node.size, dtype=bool)
    for name in out:
        index = net.components.index(name)
        if net.component_branch[index] >= 0:
            branch_on[net.component_branch[index]] = False
        else:
            infeed_on[net.component_infeed[index]] = False
    exchange = Exchange(net.tie_node, np.array(agreed_mw), net.tie_rating_mw)
    on = (branch_on, infeed_on)
    return operate(room(region), *on, demand(net, share), USUAL, exchange)


def balance_mw(found: Operation) -> float:
    return found.supply_mw - found.served_mw - found.losses_mw


def loaded(net: PowerNet, share: float, served: Operation) -> pp.pandapowerNet:
    """The region's net in pandapower with what is served of its demand."""
    case = pp.from_json(pp.to_json(net.net))
    day = feeder_demand(
        net, share, np.full(len(net.hospitals), -1.0), np.full(len(net.pumps), -1.0)
    )
    part = served.share[net.load_node]
    points = day.load_point_mw(net)
    case.load["p_mw"] = points * part
    case.load["q_mvar"] = points * part * net.load_q_per_p
    case.motor["in_service"] = False
    for pump, node in enumerate(net.pump_node):
        p_mw = day.pump_mw[pump] * served.share[node]
        bus = case.motor.bus[case.motor.name == _motor(net, pump)].iloc[0]
        pp.create_load(case, bus, p_mw, p_mw * net.pump_q_per_p[pump])
    return case


def _motor(net: PowerNet, pump: int) -> str:
    return str(net.net.motor.name.iloc[pump])


INFEEDS = tuple(f"P_EG{k}" for k in range(1, 9))
ALL_PLANTS = tuple(c for c in power_net("mojave").components if c.startswith("G_"))


# -- import ------------------------------------------------------------------------------------


def test_without_an_agreement_tie_lines_change_nothing() -> None:
    net = power_net("shelby")
    on = (np.ones(net.grid.branches, bool), np.ones(net.grid.infeed_node.size, bool))
    without = room("shelby").operate(*on, demand(net, 0.75), USUAL)
    with_them = run("shelby", 0.75, [0.0])
    assert (without.share == with_them.share).all()
    assert without.supply_mw == with_them.supply_mw
    assert with_them.tie_mw.tolist() == [0.0]
    assert with_them.tie_spare_mw.tolist() == [500.0]


@pytest.mark.parametrize("out", [(), ("P_EG2",), ("P_EG2", "P_EG3", "P_EG6")])
def test_what_comes_over_a_tie_line_spares_the_infeeds_as_pandapower_has_it(
    out: tuple[str, ...],
) -> None:
    net = power_net("shelby")
    helped = run("shelby", 0.5, [300.0], out)
    assert helped.tie_mw.tolist() == [300.0]
    assert abs(balance_mw(helped)) < 1e-6
    assert (helped.share[net.load_node] == 1.0).all()
    case = loaded(net, 0.5, helped)
    case.ext_grid.loc[case.ext_grid.name.isin(out), "in_service"] = False
    gate = case.bus.index[case.bus.name == "P_B3"][0]
    pp.create_sgen(case, gate, 300.0)
    pp.runpp(case, tolerance_mva=1e-8, init="dc", numba=False)
    drawn_mw = float(case.res_ext_grid.p_mw.sum())
    assert helped.drawn_mw == pytest.approx(drawn_mw, abs=1e-3)


def test_a_city_without_any_infeed_lives_on_its_tie_line_as_far_as_that_goes() -> None:
    """pandapower agrees on what the line then carries, and that voltages are kept."""
    net = power_net("shelby")
    dark = run("shelby", 0.75, [0.0], INFEEDS)
    assert dark.served_mw == 0.0
    assert dark.tie_need_mw.tolist() == [500.0]
    assert dark.tie_spare_mw.tolist() == [0.0]
    helped = run("shelby", 0.75, [500.0], INFEEDS)
    assert 495.0 < helped.tie_mw[0] <= 500.0 * (1 + 1e-6)
    assert helped.served_mw > 480.0
    assert abs(balance_mw(helped)) < 1e-6
    assert SCARCE in helped.reason
    # everybody gets about the same, in whole blocks of a quarter and what is left
    shares = helped.share[net.load_node]
    assert shares.max() - shares.min() <= 0.25 + 0.01
    case = loaded(net, 0.75, helped)
    case.ext_grid["in_service"] = False
    gate = case.bus.index[case.bus.name == "P_B3"][0]
    held = net.grid.voltage[net.tie_node[0]]
    slack = pp.create_ext_grid(case, gate, abs(held), float(np.angle(held, deg=True)))
    pp.runpp(case, tolerance_mva=1e-8, init="dc", numba=False)
    assert case.res_ext_grid.p_mw[slack] == pytest.approx(helped.tie_mw[0], abs=1e-3)
    assert case.res_bus.vm_pu.min() >= 0.88 - 1e-6


def test_no_more_comes_than_the_rating_and_no_more_than_is_wanted() -> None:
    most = run("shelby", 0.75, [5000.0], INFEEDS)
    assert most.tie_mw[0] <= 500.0 * (1 + 1e-6)
    night = run("mojave", 0.05, [500.0, 0.0, 0.0])
    assert night.tie_mw[0] < 500.0
    assert abs(balance_mw(night)) < 1e-6


# -- export ------------------------------------------------------------------------------------


def test_what_goes_to_a_neighbour_is_taken_after_own_loads_and_may_take_the_reserve() -> None:
    for share in (0.45, 0.75, 0.86):
        alone = run("mojave", share, [0.0, 0.0, 0.0])
        asked = run("mojave", share, [-500.0, 0.0, 0.0])
        assert asked.served_mw >= alone.served_mw - 1e-3
        assert -asked.tie_mw[0] >= min(alone.tie_spare_mw[0], 500.0) - 1.0
        assert abs(balance_mw(asked)) < 1e-6
        # 2 875 MW of firm plants, less the largest (355 MW), less load and losses
        spare_mw = min(500.0, max(0.0, 2875.0 - 355.0 - alone.supply_mw))
        assert alone.tie_spare_mw[0] == pytest.approx(spare_mw, abs=1e-6)
    assert run("mojave", 0.45, [-500.0, 0.0, 0.0]).tie_mw[0] == -500.0
    # at the record peak plants give no more than they can, and own loads no less than alone
    peak, alone = (run("mojave", 1.0, [mw, 0.0, 0.0]) for mw in (-500.0, 0.0))
    assert peak.drawn_mw <= 2875.0 * (1 + 1e-6)
    assert peak.served_mw >= alone.served_mw - 1e-2


def test_an_export_that_a_line_can_not_carry_beside_own_loads_is_cut_and_not_they() -> None:
    """Curtiss hangs on one line when two of its three are out."""
    out = ("C35",)
    alone = run("mojave", 0.45, [0.0, 0.0, 0.0], out)
    asked = run("mojave", 0.45, [-500.0, 0.0, 0.0], out)
    assert alone.tie_spare_mw[0] in (0.0, 500.0)
    assert asked.served_mw == pytest.approx(alone.served_mw, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    chance=st.floats(0.0, 0.5),
    seed=st.integers(0, 1000),
    share=st.floats(0.3, 1.0),
    agreed=st.lists(st.floats(-600.0, 600.0), min_size=3, max_size=3),
)
def test_power_is_balanced_with_any_exchange_in_any_damage(
    chance: float, seed: int, share: float, agreed: list[float]
) -> None:
    net = power_net("mojave")
    random = np.random.default_rng(seed)
    hit = random.random(len(net.components)) < chance
    out = [net.components[i] for i in np.flatnonzero(hit)]
    found = run("mojave", share, agreed, out)
    assert abs(balance_mw(found)) < 1e-4
    assert (np.abs(found.tie_mw) <= net.tie_rating_mw * (1 + 1e-6)).all()
    # nobody sends where it was agreed to take, or takes more than was agreed
    bound = np.array(agreed)
    assert (found.tie_mw <= np.maximum(bound, 0.0) + 1e-3).all()
    assert (found.tie_mw >= np.minimum(bound, 0.0) - 1e-6).all()
    alone = run("mojave", share, np.maximum(agreed, 0.0).tolist(), out)
    assert found.served_mw >= alone.served_mw - 1e-3 * max(alone.served_mw, 1.0)


# -- plants ------------------------------------------------------------------------------------


def test_plants_share_the_load_and_pandapower_agrees_on_the_one_that_balances() -> None:
    net = power_net("mojave")
    found = run("mojave", 0.75, [0.0, 0.0, 0.0])
    assert abs(balance_mw(found)) < 1e-6
    assert (found.share[net.load_node] == 1.0).all()
    case = loaded(net, 0.75, found)
    most = net.grid.infeed_most_mw
    balancing = int(np.argmax(most))
    wanted_mw = 1.02 * demand(net, 0.75).real.sum()
    factor = wanted_mw / most.sum()
    case.ext_grid["in_service"] = False
    case.ext_grid.loc[case.ext_grid.index[balancing], "in_service"] = True
    for plant, bus in enumerate(case.ext_grid.bus):
        if plant != balancing:
            pp.create_gen(case, bus, factor * most[plant], vm_pu=1.05)
    pp.runpp(case, tolerance_mva=1e-8, init="dc", numba=False)
    others_mw = factor * (most.sum() - most[balancing])
    total_mw = float(case.res_ext_grid.p_mw.sum()) + others_mw
    assert found.supply_mw == pytest.approx(total_mw, abs=1e-2)


def test_where_plants_are_out_as_much_is_served_as_the_others_can_give() -> None:
    net = power_net("mojave")
    left = ("G_301_CT", "G_302_CT", "G_307_CT", "G_313_CC_1")
    found = run("mojave", 0.75, [0.0, 0.0, 0.0], [p for p in ALL_PLANTS if p not in left])
    can_mw = 110.0 + 150.0 + 150.0 + 355.0
    assert found.served_mw < 0.5 * demand(net, 0.75).real.sum()
    assert can_mw * 0.9 < found.supply_mw <= can_mw * (1 + 1e-6)
    assert SCARCE in found.reason
    assert run("mojave", 0.75, [0.0, 0.0, 0.0], ALL_PLANTS).served_mw == 0.0


def test_a_plant_that_its_lines_can_not_carry_gives_less_before_a_load_is_cut() -> None:
    """Two combined cycles of 710 MW at Comte behind the phase shifter and one of two lines."""
    found = run("mojave", 0.3, [0.0, 0.0, 0.0], ["C22", "C33-1", "C33-2", "C35"])
    net = power_net("mojave")
    assert (found.share[net.load_node] == 1.0).all()
    assert abs(balance_mw(found)) < 1e-6


# -- the twin ----------------------------------------------------------------------------------


def session(region: str, parameters: Mapping[str, float] | None = None) -> Session:
    made = Session(EnergyTwin(region), "energy")
    made.open(1, {"tie_lines_on": 1.0, **(parameters or {})})
    return made


def dark(net: PowerNet, names: Sequence[str]) -> dict[str, Vector]:
    """The inputs of a shock that puts components out for good."""
    hit = np.isin(net.components, names).astype(np.float64)
    return {"damage_state": 4.0 * hit, "repair_work": 1e4 * hit}


def values(results: Sequence[StepResult], variable: str) -> list[float]:
    return [float(r.outputs[variable][0]) for r in results if variable in r.outputs]


def order(value_mw: float, line: str = "TIE1") -> tuple[Action, ...]:
    return (Action("energy", "tie_exchange", line, value_mw, "desk/1"),)


def test_an_exchange_that_nobody_renews_ends_with_its_lease_and_says_why_it_began() -> None:
    made = session("shelby")
    net = power_net("shelby")
    first = made.advance(StepInput(0, 0, dark(net, INFEEDS)))
    assert values([first], "tie_need") == [500.0]
    began = made.advance(StepInput(STEP_NS, 0, {}, {}, order(400.0)))
    (event,) = [e for e in began.events if e.kind == "tie_imports"]
    assert event.causes == ("desk/1",)
    assert event.entity == "TIE1"
    back = [e for e in began.events if e.kind == "load_shed"]
    assert back
    assert event.id in back[0].causes
    results = [made.advance(StepInput(n * STEP_NS)) for n in range(2, 16)]
    flow = {r.time_ns: float(r.outputs["tie_flow"][0]) for r in results if "tie_flow" in r.outputs}
    assert flow[STEP_NS + LEASE_NS] == 0.0
    assert all(mw > 390.0 for time_ns, mw in flow.items() if time_ns < STEP_NS + LEASE_NS)
    assert [e.kind for r in results for e in r.events if e.entity == "TIE1"] == ["tie_idle"]


def test_what_was_agreed_ends_when_it_was_agreed_to_however_late_the_order_came() -> None:
    made = session("shelby")
    made.advance(StepInput(0, 0, dark(power_net("shelby"), INFEEDS)))
    until = Action("energy", "tie_agreed_until", "TIE1", 0.5, "desk/1")
    began = made.advance(StepInput(STEP_NS, 0, {}, {}, (until, *order(400.0))))
    assert values([began], "tie_flow")[0] > 390.0
    results = [made.advance(StepInput(n * STEP_NS)) for n in range(2, 6)]
    late = made.advance(StepInput(6 * STEP_NS, 0, {}, {}, order(400.0)))
    assert all(mw > 390.0 for mw in values(results, "tie_flow"))
    assert values([late], "tie_flow") == [0.0]


def test_a_line_serves_what_the_neighbour_sends_and_hospitals_come_first() -> None:
    made = session("shelby")
    net = power_net("shelby")
    shock = dark(net, INFEEDS)
    helped = made.advance(StepInput(0, 0, {**shock, "tie_offered": np.array([500.0])}))
    assert float(helped.outputs["tie_flow"][0]) > 490.0
    supplied = helped.outputs["supplied_fraction"]
    assert 0.15 < supplied.mean() < 0.5
    assert (helped.outputs["hospital_supplied"] > 0.95).all()
    alone = session("shelby").advance(StepInput(0, 0, shock))
    assert (alone.outputs["hospital_supplied"][net.hospital_load_point >= 0] == 0.0).all()


def test_what_one_city_sends_is_what_the_other_asked_for_as_far_as_it_can() -> None:
    made = session("mojave", {"start_hour": 4.0})
    asked = np.array([300.0, 0.0, 0.0])
    told = made.advance(StepInput(0, 0, {"tie_asked": asked}))
    assert told.outputs["tie_sent"].tolist() == [300.0, 0.0, 0.0]
    assert told.outputs["tie_flow"].tolist() == [-300.0, 0.0, 0.0]
    (event,) = [e for e in told.events if e.kind == "tie_exports"]
    assert event.entity == "CA-1"


def test_without_tie_lines_on_nothing_is_told_of_them_and_nothing_comes() -> None:
    made = Session(EnergyTwin("shelby"), "energy")
    made.open(1, {})
    shock = dark(power_net("shelby"), INFEEDS)
    told = made.advance(StepInput(0, 0, {**shock, "tie_offered": np.array([500.0])}, {}, order(9)))
    assert not [name for name in told.outputs if name.startswith("tie_")]
    assert float(told.outputs["served"][0]) == 0.0


def test_a_session_with_an_exchange_goes_on_from_a_snapshot_bit_for_bit() -> None:
    net = power_net("shelby")

    def begin() -> Session:
        made = session("shelby")
        made.advance(StepInput(0, 0, dark(net, INFEEDS)))
        made.advance(StepInput(STEP_NS, 0, {}, {}, order(250.0)))
        return made

    whole = begin()
    first, made = begin(), session("shelby")
    made.twin.restore(first.twin.snapshot())
    again = first.fork(made.twin)
    for number in range(2, 20):
        one, other = (s.advance(StepInput(number * STEP_NS)) for s in (whole, again))
        assert one.events == other.events
        assert {n: v.tobytes() for n, v in one.outputs.items()} == {
            n: v.tobytes() for n, v in other.outputs.items()
        }


def test_demand_of_the_night_leaves_more_to_spare() -> None:
    share = Day(0.0, 17.0, 0.62, 0.75).share
    spare = [
        float(run("mojave", share(h * HOUR_NS), [0.0] * 3).tie_spare_mw[0]) for h in (5, 12, 17)
    ]
    assert spare[0] == 500.0
    assert spare[0] >= spare[1] >= spare[2] > 200.0
