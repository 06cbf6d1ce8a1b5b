"""What a city has at its border: quantities, and what they cost beyond exchanging nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.core.coupling import Coupling
from federation.errors import FederationError, Reason
from federation.plan.bargain import Bargain, Consent, Prices, Quotas
from federation.plan.border import Discreet, Holding, Line, Outlet, ends_of, wholes
from federation.plan.engine import engine_of, optimum_usd
from federation.plan.joining import join
from federation.plan.owner import agree
from federation.twin import HOUR_NS
from tests.aidcities import Power, Ward
from tests.blocks import block, port

PERIODS = (HOUR_NS,) * 4
EXPORT, IMPORT = Outlet("power", "export"), Outlet("power", "import")
INSIDE = Coupling("power", "share", "ward", "power")


def holding(power: Power, patients: float = 10) -> Holding:
    blocks = {"power": power.flexibility(PERIODS), "ward": Ward(patients).flexibility(PERIODS)}
    return Holding(blocks, [INSIDE])


def line(gives: bool, held: float = 0.0, unit: str = "MW", **more: object) -> Line:
    made = Line("power", unit, gives, EXPORT if gives else IMPORT, np.full(4, held))
    return replace(made, **more)  # type: ignore[arg-type]


HELPER = Power("30 14 9", 30, 18, 6)


def consent(found: Discreet, *quantity: float) -> Consent:
    name = found.owner.name
    answer = found.answer(Quotas(1, {name: np.array(quantity)}))
    assert isinstance(answer, Consent)
    return answer


def test_to_exchange_nothing_costs_nothing_and_to_give_costs_what_is_not_had() -> None:
    found = Discreet(ends_of("birch", holding(HELPER), [line(True)], [0]).owner)
    nothing = consent(found, 0, 0, 0, 0)
    assert nothing.cost_usd is not None
    assert nothing.cost_usd.tolist() == [0.0] * nothing.cost_usd.size
    some = consent(found, 5, 5, 5, 5)
    assert some.cost_usd is not None
    assert some.cost_usd.sum() > 0.0
    assert consent(found, 18.5, 0, 0, 0).cost_usd is None


def test_what_is_kept_for_others_is_neither_given_again_nor_told() -> None:
    free = ends_of("birch", holding(HELPER), [line(True)], [0])
    kept = ends_of("birch", holding(HELPER), [line(True, held=10.0)], [0])
    assert free.most.tolist() == kept.most.tolist() == [[18.0] * 4]
    assert kept.stake.high.tolist() == [8.0] * 4
    assert consent(Discreet(kept.owner), 8.5, 0, 0, 0).cost_usd is None
    # eight more cost what eight more cost, after ten that are not told of
    first, both = (consent(Discreet(free.owner), q, q, q, q).cost_usd for q in (10.0, 18.0))
    more = consent(Discreet(kept.owner), 8, 8, 8, 8).cost_usd
    assert first is not None
    assert both is not None
    assert more is not None
    assert more.sum() == pytest.approx(both.sum() - first.sum(), abs=0.01)


def test_what_is_sure_to_come_is_reckoned_with() -> None:
    weak = Power("10", 30, 25, 0)
    alone = Discreet(ends_of("ash", holding(weak), [line(False)], [0]).owner)
    helped = Discreet(ends_of("ash", holding(weak), [line(False, held=9.0)], [0]).owner)
    saved = consent(alone, 9, 9, 9, 9).cost_usd
    assert saved is not None
    assert alone.alone_usd + saved.sum() == pytest.approx(helped.alone_usd, abs=0.01)


@given(st.lists(st.floats(0.0, 9e3), min_size=8, max_size=8), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_what_does_not_touch_the_border_does_not_show_in_an_answer(
    usd: list[float], seed: int
) -> None:
    """One city has a hundred times the patients of the other, all of them with power."""
    # at a price that is just what a step costs, either of two answers is right
    apart = np.random.default_rng(seed).uniform(0.001, 0.002, 8)
    lines, rows = [line(True), line(False)], [0, 4]
    few, many = (
        Discreet(ends_of("birch", holding(HELPER, patients), lines, rows).owner)
        for patients in (10, 1_000)
    )
    prices = Prices(1, np.array(usd) + apart)
    quotas = Quotas(2, {"birch": np.array([*np.array(usd[:4]) / 5e2, 0.0, 0.0, 0.0, 0.0])})
    for question in (prices, quotas):
        one, other = few.answer(question), many.answer(question)
        assert one.cost_usd is not None
        assert other.cost_usd is not None
        assert one.cost_usd.tolist() == other.cost_usd.tolist()
        assert one.quantity.tolist() == other.quantity.tolist()


def test_lines_to_two_cities_share_what_goes_by_one_outlet() -> None:
    found = ends_of("birch", holding(HELPER), [line(True), line(True)], [0, 4])
    both = Discreet(found.owner)
    assert consent(both, *[9.0] * 8).cost_usd is not None
    assert consent(both, *[9.5] * 8).cost_usd is None


def test_a_unit_of_the_border_may_be_another_than_that_of_a_port() -> None:
    found = ends_of("birch", holding(HELPER), [line(True, unit="kW")], [0])
    assert found.stake.high.tolist() == [18_000.0] * 4
    usd = [
        consent(Discreet(ends_of("birch", holding(HELPER), [at], [0]).owner), *[q] * 4).cost_usd
        for at, q in ((line(True), 5.0), (line(True, unit="kW"), 5_000.0))
    ]
    assert usd[0] is not None
    assert usd[1] is not None
    assert usd[0].sum() == pytest.approx(usd[1].sum())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (line(True, outlet=Outlet("power", "water")), Reason.UNKNOWN_VARIABLE),
        (line(True, outlet=Outlet("nobody", "export")), Reason.UNKNOWN_VARIABLE),
        (line(False, outlet=EXPORT), Reason.UNKNOWN_VARIABLE),
        (line(True, unit="m^3"), Reason.INCOMPATIBLE_UNITS),
        (line(True, unit="degC"), Reason.INCOMPATIBLE_UNITS),
        (line(True, outlet=Outlet("power", "share"), unit="1"), Reason.SCENARIO_INVALID),
        (line(True, outlet=Outlet("power", "export", "X")), Reason.SCENARIO_INVALID),
        (line(True, held=30.0), Reason.PLAN_INFEASIBLE),
    ],
)
def test_what_is_no_end_of_a_border_is_refused(wrong: Line, reason: Reason) -> None:
    with pytest.raises(FederationError) as caught:
        Discreet(ends_of("birch", holding(HELPER), [wrong], [0]).owner)
    assert caught.value.reason is reason


def test_whole_things_are_rounded_to_the_nearest_or_below() -> None:
    quantity, is_whole = np.array([1.7, 2.0 - 1e-9, 0.3, 1e-7]), np.array([1, 1, 0, 0], np.bool_)
    nearest, below = wholes(quantity, is_whole)
    assert nearest.tolist() == [2.0, 2.0, 0.3, 0.0]
    assert below.tolist() == [1.0, 2.0, 0.3, 0.0]
    assert len(wholes(np.array([2.0]), np.array([True]))) == 1


def test_prices_bring_out_what_is_worth_giving() -> None:
    pump = block(
        {"out": (0, 4, 0), "cost": (0, 4, 10.0)},
        {"pumped": (-np.inf, {"out": 1, "cost": -1}, 0)},
        ports=[port("out", "supply", ["gate"], [[0]])],
    )
    at = Line("water", "1", True, Outlet("pump", "out"), np.zeros(1))
    found = Discreet(ends_of("lake", Holding({"pump": pump}, []), [at], [0]).owner)
    told = [found.answer(Prices(1, np.array([usd]))).quantity.tolist() for usd in (9.0, 11.0)]
    assert told == [[0.0], [4.0]]


@given(
    st.tuples(*[st.integers(4, 40)] * 3),
    st.tuples(*[st.integers(4, 40)] * 3),
    st.integers(5, 60),
    st.integers(5, 60),
    st.integers(1, 30),
    st.integers(0, 20),
)
@settings(max_examples=25)
def test_two_cities_come_within_half_a_percent_of_one_model_of_both(
    one: tuple[int, ...],
    other: tuple[int, ...],
    load: int,
    far_load: int,
    tie: int,
    stored: int,
) -> None:
    cities = {
        "ash": holding(Power(" ".join(map(str, one)), load, tie, stored), 25),
        "birch": holding(Power(" ".join(map(str, other)), far_load, tie, stored / 2)),
    }
    blocks = {f"{c}-{m}": b for c, held in cities.items() for m, b in held.blocks.items()}
    couplings = [replace(INSIDE, source=f"{name}-power", target=f"{name}-ward") for name in cities]
    couplings.append(Coupling("birch-power", "export", "ash-power", "import"))
    couplings.append(Coupling("ash-power", "export", "birch-power", "import"))
    together = optimum_usd(engine_of(join(blocks, couplings)))
    rows = [0, 4]
    ends = [
        ends_of("ash", cities["ash"], [line(False), line(True)], rows).owner,
        ends_of("birch", cities["birch"], [line(True), line(False)], rows).owner,
    ]
    found = agree(ends, Bargain(tuple(e.stake for e in ends), np.zeros(8)))
    assert found.bound_usd - 1.0 <= together <= found.cost_usd + 1.0
    assert found.cost_usd <= together + 0.005 * abs(together) + 1.0
