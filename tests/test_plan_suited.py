"""Whom to send at once when work is only estimated: a great repair that may take too long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation.__main__ import main
from federation.plan.joint import JointModel, joint_model
from federation.plan.recourse import LocalPool
from federation.plan.suited import Pools, suited
from federation.plan.visits import Task
from tests.test_plan import PERIODS_NS, STARTS_NS, feeders
from tests.valley import SCENARIO

USD = 1e5
"""What counts as one here; the solver's tolerances are for a region's costs."""


def two_feeders() -> JointModel:
    """Three days with one crew, which may set out every 12 h; f0 is worth 20 an hour, f1 7."""
    grid = feeders((20 * USD, 7 * USD), [[0], [1]])
    return joint_model({"grid": grid}, [], PERIODS_NS, STARTS_NS, 1.0)


def work(f0_h: float) -> list[Task]:
    return [Task("grid", "f0", f0_h, 0.0), Task("grid", "f1", 12.0, 0.0)]


@pytest.mark.parametrize("pools", [None, LocalPool], ids=["one problem", "hedging"])
def test_what_may_take_for_ever_waits_although_the_estimate_puts_it_first(
    pools: Pools | None,
) -> None:
    """With 14 h for f0 as estimated, f0 first saves 20 * 58 + 7 * 36 = 1,412, f1 first 1,340. If it
    is 4 h, they save 1,696 and 1,540; if it is 100 h, nothing and 7 * 60 = 420."""
    model = two_feeders()
    (first,) = (v for v in model.solve(work(14.0)).visits if v.start_h == 0.0)
    found = suited(model, work(14.0), [work(4.0), work(100.0)], pools)
    assert first.task == 0
    assert found.at_once == ("crews: 1 to grid f1 at hour 0",)
    assert found.costs_usd == pytest.approx((-1540 * USD, -420 * USD))
    assert found.cost_usd == pytest.approx(-980 * USD)
    assert found.estimates_usd == pytest.approx(-848 * USD)
    assert found.forecast_usd == pytest.approx(((1696 + 420) / 2 - 980) * USD)
    assert found.bound_usd <= -(1696 + 420) / 2 * USD + 1.0


def test_when_all_futures_are_as_estimated_nothing_is_lost_by_not_knowing() -> None:
    found = suited(two_feeders(), work(14.0), [work(14.0)] * 3)
    assert found.at_once == ("crews: 1 to grid f0 at hour 0",)
    assert found.cost_usd == pytest.approx(-1412 * USD)
    assert found.estimates_usd == pytest.approx(-1412 * USD)
    assert found.forecast_usd == pytest.approx(0.0, abs=1.0)


def test_a_planner_is_told_whom_to_send_in_view_of_what_the_work_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "valley.yaml"
    unsure = "  crews: 2\n  assessment: {sigma: 0.5, inspected_after_h: [6, 12]}"
    file.write_text(SCENARIO.replace("  crews: 2", unsure))
    ask = ["plan", str(file), "--at", "8", "--futures", "3"]
    assert main(ask) == 0
    words = capsys.readouterr().out
    assert main([*ask, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["futures"]
    assert "who sets out at once, to suit 3 futures of the work" in words
    assert len(told["costs_usd"]) == 3 == len(set(told["costs_usd"]))
    assert told["cost_usd"] == pytest.approx(sum(told["costs_usd"]) / 3)
    assert told["at_once"]
    assert all(action in words for action in told["at_once"])


def test_futures_that_would_all_be_alike_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "valley.yaml"
    file.write_text(SCENARIO)
    assert main(["plan", str(file), "--at", "8", "--futures", "3"]) == 2
    assert "all futures are alike" in capsys.readouterr().err
