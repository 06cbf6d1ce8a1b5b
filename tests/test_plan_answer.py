"""What a plan answers besides itself: limits, prices, other plans, worth, and why there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason
from federation.plan.answer import Answer, Extra, answer
from federation.plan.conflict import conflict_of, relax_rows
from federation.plan.joining import Joined, join
from federation.plan.joint import joint_model
from federation.plan.message import encode_answer
from federation.plan.visits import Task
from federation.twin import HOUR_NS, LinearBlock
from federation.v1 import plan_pb2
from tests.blocks import block
from tests.test_plan import PERIODS_NS, STARTS_NS, feeders, ward

INF = np.inf


def ask(
    grid: LinearBlock,
    tasks: list[Task],
    crews: float = 1,
    *extras: Extra,
    care: LinearBlock | None = None,
) -> Answer:
    couplings = [Coupling("grid", "supplied", "care", "power", 0, (("load1", "w", 1.0),))]
    blocks = {"grid": grid, "care": ward(100.0) if care is None else care}
    return answer(joint_model(blocks, couplings, PERIODS_NS, STARTS_NS, crews), tasks, extras)


TWO = [Task("grid", "f0", 12.0, 0.0), Task("grid", "f1", 12.0, 0.0)]
SOLE = ward(0.0)


def test_a_port_in_the_dark_has_the_price_of_what_hangs_on_it() -> None:
    """The ward is worth 100 dollars an hour; f1 takes longer than the horizon to mend."""
    found = ask(feeders([1.0, 1.0], [[0], [1]]), [Task("grid", "f1", 73.0, 0.0)])
    prices = {(p.member, p.port, p.period): p for p in found.prices}
    assert prices["care", "power", 0].usd_per_unit == pytest.approx(2400.0)
    assert prices["care", "power", 1].usd_per_unit_h == pytest.approx(100.0)
    assert prices["grid", "supplied", 1].usd_per_unit == pytest.approx(4800.0)
    assert prices["grid", "supplied", 1].entity == "load1"


def test_a_port_that_has_all_it_wants_has_no_price() -> None:
    found = ask(feeders([1.0, 1.0], [[0], [1]]), [Task("grid", "f1", 12.0, 0.0)])
    prices = {(p.member, p.period): p.usd_per_unit_h for p in found.prices}
    # half the first period is dark, and of what comes then more would be taken
    assert prices["care", 0] == pytest.approx(100.0)
    assert prices["care", 1] == prices["grid", 1] == 0.0


def test_what_binds_is_named_with_what_it_costs() -> None:
    """LEVEL45 23."""
    found = ask(feeders([1.0, 9.0], [[0], [1]]), [Task("grid", "f1", 73.0, 0.0)], care=SOLE)
    by_name = {b.limit: b for b in found.bindings}
    limit = "crews: grid f1 works only once it is mended, period 1"
    assert by_name[limit].usd_per_unit == pytest.approx(9.0 * 48)
    assert by_name["grid: r3"].usd_per_unit == pytest.approx(9.0 * 48)
    assert by_name["grid: r3"].side == "high"
    assert found.bindings[0].limit in (limit, "grid: r3")


def test_the_next_best_plan_lacks_one_action() -> None:
    """LEVEL45 23."""
    found = ask(feeders([1.0, 5.0], [[0], [1]]), TWO, care=SOLE)
    assert found.actions == ("crews: 1 to grid f1 at hour 0", "crews: 1 to grid f0 at hour 12")
    first, second = found.alternatives
    # f0 at hour 24 instead of 12 gives 12 hours less
    assert (first.without, first.instead) == (found.actions[1], ("crews: 1 to grid f0 at hour 24",))
    assert first.more_usd == pytest.approx(12.0)
    # the other way round: f0 works for 60 hours and f1 for 48
    assert second.without == found.actions[0]
    assert second.more_usd == pytest.approx(348.0 - 300.0)
    assert second.cost_usd == pytest.approx(-300.0)


def test_one_more_crew_is_worth_what_it_saves() -> None:
    found = ask(feeders([1.0, 5.0], [[0], [1]]), TWO, care=SOLE)
    (crew,) = found.worth
    assert crew.of == "one more crew"
    assert crew.plan_usd == pytest.approx(12.0)  # f0 works 12 hours sooner
    assert crew.relaxed_usd == pytest.approx(12.0)


def test_a_generator_is_worth_what_it_lights() -> None:
    generator = Extra("a generator at f0", 0.5, rows=("grid: r0", "grid: r1"))
    found = ask(feeders([4.0], [[0]]), [Task("grid", "f0", 73.0, 0.0)], 1, generator, care=SOLE)
    assert found.worth[1].plan_usd == pytest.approx(0.5 * 4.0 * 72)
    with pytest.raises(PlanError):
        ask(feeders([4.0], [[0]]), TWO[:1], 1, Extra("a ghost", 1.0, rows=("grid: r9",)))


def test_why_there_is_no_plan_is_an_answer() -> None:
    grid = feeders([1.0], [[0]])
    grid.row_high[:] = -5.0  # served <= available - 5
    found = ask(grid, TWO[:1], care=SOLE)
    assert (found.termination, found.status, found.schedule) == ("infeasible", "none", None)
    assert found.conflict is not None
    assert found.conflict.is_minimal
    # two limits of one period are enough: served is not below 0, and available not above 1
    assert len(found.conflict.limits) == 3
    assert any(limit.startswith("grid: r") for limit in found.conflict.limits)
    assert found.relaxation is not None
    # the component is there from hour 12 on, for half of the first period
    amounts = {s.row: s.amount for s in found.relaxation.slacks}
    assert sum(amounts.values()) == pytest.approx(4.0 + 4.5)


def boxes(*, need: float) -> LinearBlock:
    return block(
        {"left": (0, 10, 1), "right": (0, 10, 1), "other": (0, 1, 0)},
        {
            "need": (need, {"left": 1, "right": 1}, INF),
            "narrow left": (-INF, {"left": 1}, 2),
            "narrow right": (-INF, {"right": 1}, 2),
            "harmless": (-INF, {"left": 1, "other": 1}, 50),
        },
    )


def test_a_conflict_is_told_in_the_words_of_the_twins() -> None:
    found = conflict_of(join({"store": boxes(need=5)}, []))
    assert sorted(found.limits) == [
        "store: narrow left is at most 2",
        "store: narrow right is at most 2",
        "store: need is at least 5",
    ]
    assert found.is_minimal


def test_a_feasible_problem_has_no_conflict() -> None:
    with pytest.raises(PlanError) as caught:
        conflict_of(join({"store": boxes(need=4)}, []))
    assert caught.value.reason is Reason.NO_PLAN


def test_whole_numbers_alone_may_conflict() -> None:
    odd = block(
        {"x": (0, 9, 0), "y": (0, 9, 0)},
        {"odd": (3, {"x": 2, "y": 2}, 3), "few": (-INF, {"x": 1}, 8)},
        whole=("x", "y"),
    )
    assert conflict_of(join({"m": odd}, [])).limits == ("m: odd is 3",)


def test_the_cheapest_relaxation_says_what_gives_way_and_by_how_much() -> None:
    problem = join({"store": boxes(need=5)}, [])
    found = relax_rows(problem)
    (slack,) = found.slacks
    assert abs(slack.amount) == pytest.approx(1.0)
    assert found.penalty_usd == pytest.approx(1.0)
    # what may give way is the twin's to say: here its need may not, and the left costs least
    dear = np.array([INF, 3.0, 7.0, 1.0])
    found = relax_rows(problem, dear)
    assert [s.row for s in found.slacks] == ["store: narrow left"]
    assert found.slacks[0].penalty_usd == pytest.approx(3.0)
    assert found.slacks[0].amount == pytest.approx(1.0)
    assert found.cost_usd == pytest.approx(5.0, rel=1e-5)


def test_bounds_do_not_give_way() -> None:
    with pytest.raises(PlanError):
        relax_rows(join({"m": block({"x": (2, 1, 0)}, {"any": (0, {"x": 1}, 9)})}, []))


def feasible(problem: Joined, without: int | None = None) -> bool:
    """What SciPy says, with one limit lifted: rows first, then columns."""
    rows = len(problem.rows)
    matrix = np.zeros((rows, len(problem.columns)))
    np.add.at(matrix, (problem.row_index, problem.column_index), problem.coefficient)
    low, high = problem.row_low.copy(), problem.row_high.copy()
    bounds = list(zip(problem.low, problem.high, strict=True))
    if without is not None and without < rows:
        low[without], high[without] = -INF, INF
    elif without is not None:
        bounds[without - rows] = (-INF, INF)
    top, bottom = np.isfinite(high), np.isfinite(low)
    upper = np.vstack([matrix[top], -matrix[bottom]])
    limits = np.append(high[top], -low[bottom])
    found = linprog(np.zeros(len(bounds)), upper, limits, bounds=bounds, method="highs-ds")
    return bool(found.status == 0)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_limit_of_a_conflict_is_needed_and_all_are_enough(data: st.DataObject) -> None:
    """LEVEL45 23."""
    number = st.integers(-3, 3)
    size, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    columns = {f"x{j}": (0.0, 4.0, 0.0) for j in range(size)}
    rows = {}
    for i in range(count):
        low = data.draw(st.integers(-9, 9))
        body = {f"x{j}": float(data.draw(number)) for j in range(size)}
        rows[f"r{i}"] = (float(low), body, low + float(data.draw(st.integers(0, 5))))
    problem = join({"m": block(columns, rows)}, [])
    assume(not feasible(problem))
    found = conflict_of(problem)
    assert found.is_minimal
    named = {limit.rsplit(" is ", 1)[0] for limit in found.limits}
    kept_rows = [i for i, name in enumerate(problem.rows) if name in named]
    lifted = {
        "low": np.where(np.isin(problem.columns, list(named)), problem.low, -INF),
        "high": np.where(np.isin(problem.columns, list(named)), problem.high, INF),
        "row_low": np.where(np.isin(np.arange(count), kept_rows), problem.row_low, -INF),
        "row_high": np.where(np.isin(np.arange(count), kept_rows), problem.row_high, INF),
    }
    alone = Joined(**{**{f: getattr(problem, f) for f in problem.__dataclass_fields__}, **lifted})
    assert not feasible(alone)
    for k, name in enumerate(problem.rows + problem.columns):
        if name in named:
            assert feasible(alone, without=k), name


def test_an_answer_goes_over_the_wire_with_all_that_it_says() -> None:
    found = ask(feeders([1.0, 5.0], [[0], [1]]), TWO)
    sent = plan_pb2.Plan.FromString(
        encode_answer(found, TWO, "runs/r/plans/1", HOUR_NS).SerializeToString()
    )
    assert sent.termination == plan_pb2.Plan.TERMINATION_OPTIMAL
    assert found.schedule is not None
    assert sent.objective == found.schedule.cost_usd
    assert [(a.component, a.crews, a.start_ns // HOUR_NS) for a in sent.assignments] == [
        ("f1", 1, 1),
        ("f0", 1, 13),
    ]
    assert [b.limit for b in sent.bindings] == [b.limit for b in found.bindings]
    assert len(sent.prices) == len(found.prices) == 4
    assert [list(a.instead) for a in sent.alternatives] == [
        list(a.instead) for a in found.alternatives
    ]
    assert sent.worths[0].relaxed_usd == found.worth[0].relaxed_usd


def test_that_there_is_no_plan_goes_over_the_wire_with_the_reason() -> None:
    grid = feeders([1.0], [[0]])
    grid.row_high[:] = -5.0
    sent = encode_answer(ask(grid, TWO[:1], care=SOLE), TWO[:1])
    assert sent.termination == plan_pb2.Plan.TERMINATION_INFEASIBLE
    assert not sent.HasField("objective")
    assert sent.conflicts_minimal
    assert len(sent.conflicts) == 3
    assert sum(s.amount for s in sent.relaxation) == pytest.approx(8.5)
