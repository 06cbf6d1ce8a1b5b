"""Plans that are made again and again in one engine, and never go out unlooked at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import PlanError
from federation.plan.engine import optimum_usd
from federation.plan.joining import join
from federation.plan.joint import JointModel, Posed, joint_model
from federation.plan.rolling import Rolling, breaches
from federation.plan.visits import Task
from tests.blocks import block
from tests.test_plan import PERIODS_NS, STARTS_NS, feeders

TWO = [Task("grid", "f0", 12.0, 0.0), Task("grid", "f1", 12.0, 0.0)]


def region(*worth: float, crews: float = 1.0) -> JointModel:
    grid = feeders(worth, [[i] for i in range(len(worth))])
    return joint_model({"grid": grid}, [], PERIODS_NS, STARTS_NS, crews)


def test_the_first_plan_is_that_of_a_fresh_engine() -> None:
    model = region(1.0, 5.0)
    rolled = Rolling().plan(model, TWO)
    assert rolled.source == "solved"
    assert rolled.schedule is not None
    assert rolled.schedule.cost_usd == pytest.approx(model.solve(TWO).cost_usd)
    assert [TWO[v.task].component for v in rolled.visits] == ["f1", "f0"]


def test_new_data_change_the_model_in_place() -> None:
    rolling = Rolling()
    first = rolling.plan(region(1.0, 5.0), TWO)
    again = rolling.plan(region(1.0, 5.0), TWO)
    # what f0 and f1 are worth changes: two costs of two periods each
    turned = rolling.plan(region(5.0, 1.0), TWO)
    assert (again.changed, turned.changed) == (0, 4)
    assert first.changed > 50
    assert [TWO[v.task].component for v in turned.visits] == ["f0", "f1"]
    assert turned.schedule is not None
    assert turned.schedule.cost_usd == pytest.approx(-348.0)


@given(st.lists(st.tuples(st.floats(0.5, 9.0), st.floats(1.0, 40.0)), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_changed_model_is_the_model_that_would_be_made_anew(
    changes: list[tuple[float, float]],
) -> None:
    rolling = Rolling()
    for hour, (worth, work_h) in enumerate(changes):
        model = region(worth, 3.0, crews=1.0 + hour)
        tasks = [Task("grid", "f0", work_h, 0.0), Task("grid", "f1", 12.0, 0.0)][: 1 + hour % 2]
        problem, _, _ = model.stated(tasks)
        rolling.update(problem)
        fresh = model.pose(tasks)
        assert optimum_usd(rolling.engine) == pytest.approx(fresh.relaxed.bound_usd, abs=1e-3)
        kept = rolling.plan(model, tasks, float(hour))
        assert kept.schedule is not None
        assert kept.schedule.bound_usd == pytest.approx(fresh.relaxed.bound_usd, abs=1e-3)


class Stopwatch:
    """A clock that stands still until a test moves it on, or moves on with every look."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_out_of_time_before_anything_is_known_it_is_the_declared_recovery() -> None:
    """LEVEL45 point 24: the last safe plan or the recovery plan, never an unvalidated incumbent."""
    rolled = Rolling(Stopwatch(step_s=10.0)).plan(region(1.0, 5.0), TWO, deadline_s=1.0)
    assert (rolled.source, rolled.visits, rolled.schedule) == ("recovery", (), None)
    assert "deadline" in rolled.why


def test_crews_at_work_go_on_in_a_recovery() -> None:
    tasks = [replace(TWO[0], crews=1.0), TWO[1]]
    rolled = Rolling(Stopwatch(step_s=10.0)).plan(region(1.0, 5.0), tasks, deadline_s=1.0)
    assert [(v.task, v.sent) for v in rolled.visits] == [(0, False)]


def test_out_of_time_the_plan_before_is_kept_if_it_still_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rolling, model = Rolling(), region(1.0, 5.0)
    before = rolling.plan(model, TWO)

    def fail(*_: object) -> None:
        raise PlanError("NO_PLAN", "the solver stopped with kTimeLimit")  # type: ignore[arg-type]

    monkeypatch.setattr("federation.plan.rolling.relax", fail)
    kept = rolling.plan(model, TWO)
    assert kept.source == "kept"
    assert kept.visits == before.visits
    assert kept.schedule is not None
    assert kept.schedule.cost_usd == pytest.approx(-348.0)
    # with no crew left it does not hold; nobody is sent, and that was checked
    alone = rolling.plan(replace(model, crews=0.0), TWO)
    assert (alone.source, alone.visits) == ("recovery", ())
    assert alone.schedule is not None
    assert alone.schedule.cost_usd == pytest.approx(0.0, abs=1e-6)


def test_a_plan_that_breaks_a_limit_never_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that claims to have found something better, which does not satisfy the model."""
    rolling, model = Rolling(), region(1.0, 5.0)
    honest = rolling.plan(model, TWO)
    settle = JointModel.settle

    def lie(self: JointModel, posed: Posed) -> object:
        schedule, x = settle(self, posed)
        return replace(schedule, cost_usd=-1e9), x + 0.5

    monkeypatch.setattr(JointModel, "settle", lie)
    rolled = rolling.plan(model, TWO)
    assert rolled.source == "kept"
    assert "breaks" in rolled.why
    assert rolled.visits == honest.visits


@pytest.mark.parametrize(
    ("x", "broken"),
    [
        ((1.0, 2.0), ()),
        ((1.0, 2.5), ("m: sum", "m: b")),
        ((0.4, 0.6), ("m: b",)),
        ((4.0, 0.0), ("m: sum", "m: a")),
        ((float("nan"), 0.0), ("m: sum", "m: a")),
        ((1.0, 2.0 + 1e-9), ()),
    ],
)
def test_a_plan_is_checked_by_row_bound_and_whole_number(
    x: tuple[float, float], broken: tuple[str, ...]
) -> None:
    made = block({"a": (0, 3, 1), "b": (0, 9, 1)}, {"sum": (0, {"a": 1, "b": 1}, 3)}, whole=["b"])
    assert breaches(join({"m": made}, []), np.array(x)) == broken


def test_a_plan_of_another_size_is_none() -> None:
    problem = join({"m": block({"a": (0, 3, 1)}, {})}, [])
    assert breaches(problem, np.zeros(2)) == ("2 numbers for 1 columns",)
