"""Decisions that must suit several futures: the newsvendor, and a plant that is built or not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import PlanError, Reason
from federation.plan.engine import engine_of, optimum_usd
from federation.plan.joining import join
from federation.plan.recourse import Future, RayPool, extensive, hedge, with_recourse
from federation.scenario.engine import ray_up
from tests.blocks import block

INF = np.inf
DEMANDS = ((10.0, 0.5), (20.0, 0.3), (40.0, 0.2))
BUY = ["shop: buy"]
USD = 1e5
"""What counts as one here; the solver's tolerances are for a region's costs, not for a shop's."""


def shop(demand: float, cost: float = 4.0, price: float = 9.0, most: float = 60.0) -> Future:
    made = block(
        {"buy": (0, most, cost * USD), "sell": (0, demand, -price * USD)},
        {"no more than there is": (-INF, {"sell": 1, "buy": -1}, 0)},
    )
    return Future(f"demand {demand:g}", 1.0, join({"shop": made}, []))


def newsvendor(demands: tuple[tuple[float, float], ...] = DEMANDS) -> list[Future]:
    return [Future(f.name, p, f.problem) for (d, p) in demands for f in [shop(d)]]


def test_the_newsvendor_buys_what_the_critical_fractile_says() -> None:
    """(9 - 4) / 9 = 0.56 lies between P(demand <= 10) = 0.5 and P(demand <= 20) = 0.8."""
    found = with_recourse(newsvendor(), BUY)
    assert found.first == {"shop: buy": pytest.approx(20.0)}
    assert found.cost_usd == pytest.approx((80.0 - 9 * (0.5 * 10 + 0.5 * 20)) * USD)
    assert found.costs_usd["demand 10"] == pytest.approx((80.0 - 90.0) * USD)
    # who knew would buy 10, 20 or 40, and earn 5 each
    assert found.foresight_usd == pytest.approx(-5 * (0.5 * 10 + 0.3 * 20 + 0.2 * 40) * USD)
    assert found.bound_usd == pytest.approx(found.cost_usd)


def test_that_futures_may_not_be_foreseen_is_said_row_by_row() -> None:
    problem = extensive(newsvendor(), BUY)
    assert problem.rows[-2:] == (
        "demand 20: shop: buy as in demand 10",
        "demand 40: shop: buy as in demand 10",
    )
    assert optimum_usd(engine_of(problem)) == pytest.approx(-55.0 * USD)


def test_hedging_finds_the_same_decision() -> None:
    exact, hedged = with_recourse(newsvendor(), BUY), hedge(newsvendor(), BUY, tolerance=1e-4)
    assert hedged.cost_usd == pytest.approx(exact.cost_usd, rel=1e-3)
    assert hedged.first["shop: buy"] == pytest.approx(20.0, abs=0.1)
    assert hedged.bound_usd <= exact.cost_usd + 1e-6 * USD
    assert hedged.foresight_usd == pytest.approx(exact.foresight_usd)
    assert 1 < hedged.rounds <= 100


def test_hedging_on_workers_is_hedging_here_bit_for_bit() -> None:
    futures = [*newsvendor(), Future("none", 0.0, shop(0.0).problem)]
    with ray_up(2, "local"):
        spread = hedge(futures, BUY, RayPool(futures, BUY), tolerance=1e-4)
    assert spread == hedge(futures, BUY, tolerance=1e-4)
    assert spread.rounds > 1


def plant(demand: float, probability: float) -> Future:
    """Build for 30 dollars, run at 1 a unit; or buy at 5 a unit. Whole or not at all."""
    made = block(
        {"build": (0, 1, 30 * USD), "run": (0, 20, USD), "buy": (0, 99, 5 * USD)},
        {
            "demand": (demand, {"run": 1, "buy": 1}, INF),
            "only what is built runs": (-INF, {"run": 1, "build": -20}, 0),
        },
        whole=["build"],
    )
    return Future(f"{demand:g}", probability, join({"plant": made}, []))


@pytest.mark.parametrize(("high", "built"), [(0.2, 0.0), (0.6, 1.0)])
def test_to_build_or_not_to_build(high: float, built: float) -> None:
    """A plant saves 4 a unit: 8 of a demand of 2, 80 of one of 20; it costs 30."""
    futures = [plant(2.0, 1.0 - high), plant(20.0, high)]
    exact = with_recourse(futures, ["plant: build"])
    hedged = hedge(futures, ["plant: build"])
    wanted = min(10 * (1 - high) + 100 * high, 30 + 2 * (1 - high) + 20 * high)
    assert exact.cost_usd == pytest.approx(wanted * USD)
    assert exact.first == {"plant: build": pytest.approx(built)}
    assert hedged.first == exact.first
    assert hedged.cost_usd == pytest.approx(exact.cost_usd)
    assert hedged.bound_usd <= exact.cost_usd + 1e-6 * USD


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 8),
)
@settings(max_examples=20, deadline=None)
def test_the_bound_holds_and_the_plan_is_real(weighed: list[tuple[int, int]], cost: int) -> None:
    total = sum(w for _, w in weighed)
    futures = [
        Future(f"f{k}", w / total, shop(float(d), float(cost)).problem)
        for k, (d, w) in enumerate(weighed)
    ]
    exact = with_recourse(futures, BUY)
    hedged = hedge(futures, BUY, rounds=15)
    # by hand: the best of buying for one of the demands, or nothing
    choices = [0.0, *(float(d) for d, _ in weighed)]
    best = min(cost * q - 9 * sum(w * min(q, d) for d, w in weighed) / total for q in choices)
    assert exact.cost_usd == pytest.approx(best * USD, abs=1.0)
    assert hedged.bound_usd - 1.0 <= exact.cost_usd <= hedged.cost_usd + 1.0
    assert exact.foresight_usd <= exact.cost_usd + 1e-6 * USD


def test_what_makes_no_sense_is_refused() -> None:
    for futures, first in (
        ([shop(1.0), shop(2.0)], BUY),  # probabilities add up to two
        ([shop(1.0)], ["shop: steal"]),
    ):
        with pytest.raises(PlanError) as caught:
            with_recourse(futures, first)
        assert caught.value.reason is Reason.NO_PLAN
