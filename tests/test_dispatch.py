"""Setpoints from the joint model, and by rule, on problems whose answer fits in the head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from federation.core.bundle import Setpoint
from federation.errors import PlanError, Reason, ScenarioError
from federation.plan.dispatch import (
    NOTHING_SET,
    Control,
    Course,
    DispatchModel,
    DispatchPlan,
    DispatchPlanner,
    Rule,
)
from federation.scenario.spec import parse
from federation.twin import HOUR_NS, MINUTE_NS, SYSTEM, LinearBlock, Port, Session, StepInput
from federation.wire.codec import decode_block, encode_block

SERVE = Control("grid", "serve", "feeder", "1", ("a", "b"), 0.0, 1.0, 1.0)
HELP = Control("grid", "help", SYSTEM, "MW", (SYSTEM,), 0.0, 20.0, 0.0)
HOURS = (HOUR_NS, HOUR_NS)
WANTED_MW = np.array([[60.0, 60.0], [40.0, 40.0]])


def grid(limit_mw: Sequence[float], price: Sequence[float] = (1000.0, 3000.0)) -> LinearBlock:
    """Two feeders of 60 and 40 MW, whose darkness costs `price` per MWh, under a limit.

    Columns: serve[a], serve[b], limit; each for two hours.
    """
    rows, columns, values = [], [], []
    for t in range(2):
        for feeder in range(2):
            rows.append(t)
            columns.append(2 * feeder + t)
            values.append(WANTED_MW[feeder, t])
        rows.append(t)
        columns.append(4 + t)
        values.append(-1.0)
    cost = np.concatenate([-WANTED_MW[0] * price[0], -WANTED_MW[1] * price[1], [0.0, 0.0]])
    return LinearBlock(
        columns=("a0", "a1", "b0", "b1", "limit0", "limit1"),
        low=np.array([0.0] * 4 + [*limit_mw]),
        high=np.array([1.0] * 4 + [*limit_mw]),
        cost=cost,
        integer=np.zeros(6, dtype=bool),
        rows=("supply0", "supply1"),
        row_low=np.full(2, -np.inf),
        row_high=np.zeros(2),
        row_index=np.array(rows),
        column_index=np.array(columns),
        coefficient=np.array(values),
        ports=(
            Port("serve", "control", "feeder", "1", ("a", "b"), np.arange(4).reshape(2, 2)),
            Port("limit", "given", SYSTEM, "MW", (SYSTEM,), np.array([[4, 5]])),
        ),
    )


def model(*limit_mw: float) -> DispatchModel:
    return DispatchModel({"grid": grid(limit_mw)}, (), HOURS, (SERVE,))


# -- plans -----------------------------------------------------------------------------


def test_what_is_cheaper_goes_without_and_only_while_it_must() -> None:
    plan = model(70.0, 100.0).solve(0)
    assert plan.values[0] == pytest.approx(np.array([[0.5, 1.0], [1.0, 1.0]]))
    assert plan.idle_cost_usd == float("inf")  # all feeders at once are more than the limit


def test_one_more_megawatt_is_worth_what_the_cheapest_feeder_lacks() -> None:
    plan = model(70.0, 100.0).solve(0)
    assert plan.prices["grid", "limit"][0, 0] == pytest.approx(1000.0)
    more = model(71.0, 100.0).solve(0)
    assert plan.cost_usd - more.cost_usd == pytest.approx(1000.0)


def test_a_plan_says_what_to_ask_for_at_each_instant_and_nothing_that_is_safe() -> None:
    plan = model(70.0, 30.0).solve(5 * HOUR_NS)
    (first,) = plan.setpoints(5 * HOUR_NS)
    assert first == Setpoint("grid", "serve", "a", first.value)
    assert first.value == pytest.approx(0.5)
    second = {s.entity: s.value for s in plan.setpoints(6 * HOUR_NS)}
    assert second == pytest.approx({"a": 0.0, "b": 0.75})
    for outside in (5 * HOUR_NS - 1, 7 * HOUR_NS):
        assert plan.setpoints(outside) == ()


def test_an_actuator_that_no_block_knows_has_no_plan() -> None:
    unknown = DispatchModel({"grid": grid((70.0, 70.0))}, (), HOURS, (SERVE, HELP))
    with pytest.raises(PlanError) as error:
        unknown.solve(0)
    assert error.value.reason is Reason.NO_PLAN


def test_a_control_port_travels_over_the_wire_as_it_is() -> None:
    block = grid((70.0, 80.0))
    again = decode_block(encode_block(block))
    assert [(p.name, p.role) for p in again.ports] == [("serve", "control"), ("limit", "given")]
    assert (again.ports[0].columns == block.ports[0].columns).all()


# -- what operators do without a plan ----------------------------------------------------

SOURCES = {
    ("grid", "lacking"): (SYSTEM, "MW"),
    ("grid", "wanted"): ("feeder", "MW"),
    ("grid", "left"): (SYSTEM, "MW*h"),
}
RULES = (
    Rule(1, ("grid", "lacking"), 20.0, store=("grid", "left")),
    Rule(0, ("grid", "lacking"), 0.0, size=("grid", "wanted")),
)


def by_rule(*lacking_mw: float, left: float = 100.0) -> list[dict[tuple[str, str], float]]:
    """What a planner asks for at one decision after the other."""
    planner = DispatchPlanner(
        "rule", (SERVE, HELP), RULES, HOUR_NS, 5 * MINUTE_NS, 2 * HOUR_NS,
        sources=SOURCES, entities={"feeder": ("a", "b"), SYSTEM: (SYSTEM,)},
    )  # fmt: skip
    session = Session(planner, "planner")
    session.open(0, {})
    asked = []
    for k, lacking in enumerate(lacking_mw):
        inputs = {
            "grid_lacking": np.array([lacking]),
            "grid_wanted": np.array([60.0, 40.0]),
            "grid_left": np.array([left]),
        }
        result = session.advance(StepInput(k * HOUR_NS + 55 * MINUTE_NS, inputs=inputs))
        asked.append({(a.actuator, a.entity): a.value for a in result.actions})
    return asked


def test_customers_help_first_and_then_feeders_take_turns() -> None:
    first, second = by_rule(50.0, 50.0)
    assert first == pytest.approx({("help", SYSTEM): 20.0, ("serve", "a"): 0.5})
    # the turn goes on with the next feeder, and the one before is set free
    assert second == pytest.approx(
        {("help", SYSTEM): 20.0, ("serve", "b"): 0.25, ("serve", "a"): 1.0}
    )


def test_when_the_store_is_empty_feeders_alone_cover_what_lacks() -> None:
    (only,) = by_rule(30.0, left=0.0)
    assert only == pytest.approx({("serve", "a"): 0.5})


def test_when_nothing_lacks_any_more_all_is_set_free_once() -> None:
    _, second, third = by_rule(50.0, 0.0, 0.0)
    assert second == {("help", SYSTEM): 0.0, ("serve", "a"): 1.0}
    assert third == {}


def test_a_planner_follows_a_plan_that_it_was_given_ahead_of_its_periods() -> None:
    plan = DispatchPlan(0, HOURS, (SERVE,), (np.array([[1.0, 0.3], [1.0, 1.0]]),), 0.0, 0.0)
    base = DispatchPlanner("none", (SERVE,), (), HOUR_NS, 5 * MINUTE_NS, 2 * HOUR_NS)
    base.open(0, {})
    planner = base.follower(Course("plan", plan))
    assert planner.describe().time.offset_ns == 55 * MINUTE_NS
    session = Session(planner, "planner")
    # asked for at 55 minutes, so that it is in force when the second hour begins
    (action,) = session.advance(StepInput(55 * MINUTE_NS)).actions
    assert (action.entity, action.value) == ("a", 0.3)
    again = base.follower(NOTHING_SET)
    again.restore(planner.snapshot())
    (freed,) = session.advance(StepInput(115 * MINUTE_NS)).actions
    assert (freed.entity, freed.value) == ("a", 1.0)


# -- scenarios -------------------------------------------------------------------------

DOCUMENT = """
name: short
region: nowhere
horizon_h: 4
members:
  grid: {{class: "tests.town:Grid"}}
measures:
  plan: {{dispatch: once}}
{more}
"""


def test_a_measure_that_sets_actuators_needs_to_know_which() -> None:
    with pytest.raises(ScenarioError) as error:
        parse(DOCUMENT.format(more=""))
    assert error.value.reason is Reason.SCENARIO_INVALID
    with pytest.raises(ScenarioError) as error:
        parse(DOCUMENT.format(more="dispatch: {actuators: [gird.serve]}"))
    assert error.value.reason is Reason.UNKNOWN_MEMBER
    assert "did you mean 'grid'" in str(error.value)
