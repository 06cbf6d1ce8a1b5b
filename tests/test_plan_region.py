"""The tools of planning on Shelby County itself, two hours into an earthquake."""

from __future__ import annotations

import time

import pytest

from benchmarks.plans import FOURS, TWO, Region, shelby
from federation.plan.answer import Extra, answer
from federation.plan.bargain import Bargain
from federation.plan.engine import engine_of, optimum_usd
from federation.plan.joining import join
from federation.plan.owner import agree, owners_of
from federation.plan.rolling import Rolling, breaches


@pytest.fixture(scope="module")
def region() -> Region:
    return shelby()


def test_owners_agree_within_half_a_percent_in_sixty_rounds(region: Region) -> None:
    for periods in (TWO, FOURS):
        blocks = region.convex(periods)
        joint_usd = optimum_usd(engine_of(join(blocks, region.couplings)))
        owners, limit = owners_of(blocks, region.couplings)
        assert [owner.name for owner in owners] == ["city", "energy", "medical"]
        stakes = tuple(owner.stake for owner in owners)
        found = agree(owners, Bargain(stakes, limit, tolerance=0.005))
        assert found.rounds <= 60
        # a bound by numbers may lie in the last digits of the solver's
        assert found.bound_usd <= joint_usd * (1 + 1e-6)
        assert joint_usd * (1 - 1e-6) <= found.cost_usd <= 1.005 * joint_usd


def test_a_plan_of_the_region_explains_itself(region: Region) -> None:
    model = region.model(TWO)
    node = next(r for r in model.joined.rows if r.startswith("energy: balance[")).split(",")[0]
    generator = Extra("a generator of 5 MW", -5.0, rows=(f"{node},0]", f"{node},1]"))
    found = answer(model, region.tasks, [generator])
    assert found.schedule is not None
    assert {b.limit.split(":")[0] for b in found.bindings} <= {"crews", "energy", "city", "medical"}
    assert len(found.bindings) == 20
    assert any(p.usd_per_unit_h > 0 for p in found.prices if p.member == "medical")
    assert found.alternatives
    crew, more = found.worth
    assert crew.relaxed_usd > 0.0
    assert more.relaxed_usd >= 0.0


def test_a_re_solve_mostly_solves(region: Region) -> None:
    """At the size of the crew planner; `python -m benchmarks.plans` has the day by hours."""
    rolling, model = Rolling(time.process_time), region.model(TWO)
    rolled = [rolling.plan(model, region.tasks, hour) for hour in (0.0, 1.0)]
    assert all(r.schedule is not None for r in rolled)
    problem, _, _ = model.stated(region.tasks)
    assert rolling.update(problem) == 0
    again = rolled[1]
    assert again.update_s <= 0.1 * again.solve_s + 0.05
    assert again.update_s + again.solve_s <= 2.0
    posed = model.pose(region.tasks)
    _, x = model.settle(posed)
    assert breaches(posed.problem, x) == ()
