"""The closed loop: what makes it think, how it chooses, what it records, what it can't know."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.control.foresight import ForesightPlanner
from federation.control.foresight_crews import NEAREST, Situation
from federation.control.loop import IN_FORCE, STAGES, Comparison, Decision, Loop, Rating
from federation.core.bundle import Bundle
from federation.errors import FederationError, Reason
from federation.plan.belief import Assessment, Belief
from federation.plan.crews import Order
from federation.planners import planner as build_planner
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import Policy, Scenario, load
from federation.twin import (
    HOUR_NS,
    NOTHING,
    Cut,
    Description,
    Glimpse,
    Planner,
    Session,
    StepInput,
    Vector,
)

SHELBY = Path(__file__).parent.parent / "twins" / "regions" / "shelby" / "level5.yaml"


# -- the stages --------------------------------------------------------------------------------


@dataclass
class Moment:
    """A cut of nothing in particular."""

    time_ns: int
    horizon_ns: int = 100 * HOUR_NS
    digest: str = "d1"
    weights: Mapping[str, float] = field(default_factory=lambda: {"a.cost": 1.0})
    versions: Mapping[str, str] = field(default_factory=lambda: {"a": "toy 1"})

    def seen(self, member: str, output: str) -> Vector:
        return np.zeros(1)

    def future(
        self,
        number: int,
        planner: Planner,
        until_ns: int,
        believed: Mapping[str, Mapping[str, Vector]] = NOTHING,
    ) -> Glimpse:
        raise NotImplementedError


class Script:
    """Stages that follow a script: costs by plan and future, refusals by plan."""

    def __init__(
        self, costs: Mapping[str, Sequence[float]], refused: Mapping[str, str] = NOTHING
    ) -> None:
        self.costs, self.refused = costs, refused
        self.said: list[str] = []
        self.cost_now = 0.0
        self.followed = IN_FORCE

    def observe(self, cut: Cut) -> Cut:
        self.said.append("observe")
        return cut

    def observed(self, situation: Cut) -> float:
        return self.cost_now

    def occasion(self, situation: Cut, drift: Comparison | None) -> str:
        if drift is not None:
            self.said.append(f"drift {drift.drift:+.1f}")
        return "damage"

    def until_ns(self, situation: Cut) -> int:
        return situation.time_ns + 10 * HOUR_NS

    def forecast(self, situation: Cut) -> Rating:
        self.said.append("forecast")
        return Rating(IN_FORCE, tuple(self.costs[IN_FORCE]), {"a.cost": 1.0})

    def plan(self, situation: Cut) -> Mapping[str, str]:
        self.said.append("plan")
        return {name: name for name in self.costs if name != IN_FORCE}

    def verify(
        self, situation: Cut, plans: Mapping[str, str], in_force: Rating
    ) -> Sequence[Rating]:
        self.said.append("verify")
        return [in_force, *(Rating(n, tuple(self.costs[n]), {"a.cost": 1.0}) for n in plans)]

    def guard(self, situation: Cut, plan: str) -> Sequence[str]:
        self.said.append(f"guard {plan}")
        return [self.refused[plan]] if plan in self.refused else []

    def act(self, situation: Cut, name: str, plan: str | None) -> str:
        self.followed = name
        self.said.append(f"act {name}")
        return name

    def binding(self, situation: Cut, name: str) -> Sequence[str]:
        return ["all crews are engaged"]

    def record(self, decision: Decision) -> None:
        self.said.append("record")


def loop_of(script: Script, **more: float) -> Loop[Cut, str]:
    ticks = itertools.count()
    return Loop(script, 7, lambda: float(next(ticks)), **more)


def test_the_stages_come_in_their_order_and_each_is_timed() -> None:
    script = Script({IN_FORCE: (10.0, 12.0), "better": (5.0, 6.0)})
    loop = loop_of(script)
    decision = loop.turn(Moment(0))
    assert decision is not None
    stages = ["observe", "forecast", "plan", "verify", "guard better", "act better", "record"]
    assert script.said == stages
    assert set(loop.spent_s) == set(STAGES)
    assert all(loop.spent_s[stage] >= 1.0 for stage in STAGES)


def test_a_plan_is_taken_only_when_it_is_better_by_more_than_noise() -> None:
    """It saves 5 in the mean, with a standard error of 5; then of 1."""
    noisy = Script({IN_FORCE: (10.0, 10.0), "new": (0.0, 10.0)})
    decision = loop_of(noisy).turn(Moment(0))
    assert decision is not None
    assert (decision.chosen, noisy.followed) == (IN_FORCE, IN_FORCE)
    clear = Script({IN_FORCE: (10.0, 10.0), "new": (4.0, 6.0)})
    decision = loop_of(clear).turn(Moment(0))
    assert decision is not None
    assert decision.chosen == "new"
    assert "5 ± 1 less" in decision.why


def test_what_the_guard_refuses_is_not_done_and_the_next_best_is() -> None:
    costs = {IN_FORCE: (10.0,), "best": (1.0,), "good": (2.0,), "bad": (20.0,)}
    script = Script(costs, {"best": "a hospital would be without supply"})
    decision = loop_of(script).turn(Moment(0))
    assert decision is not None
    assert decision.chosen == "good"
    assert decision.refused == {"best": ("a hospital would be without supply",)}
    assert [r.name for r in decision.ratings] == ["best", "good", IN_FORCE, "bad"]
    assert "act best" not in script.said


def test_a_plan_that_was_dropped_before_all_futures_is_never_taken() -> None:
    script = Script({IN_FORCE: (10.0, 10.0), "dropped": (1.0,)})
    decision = loop_of(script).turn(Moment(0))
    assert decision is not None
    assert decision.chosen == IN_FORCE


def test_what_came_of_a_decision_is_compared_with_what_it_predicted() -> None:
    script = Script({IN_FORCE: (10.0, 10.0), "new": (4.0, 6.0)})
    loop = loop_of(script)
    loop.turn(Moment(0))
    script.cost_now = 3.0
    loop.turn(Moment(9 * HOUR_NS))
    assert loop.comparisons == []  # the second decision has taken the place of the first
    script.cost_now = 13.0
    loop.turn(Moment(20 * HOUR_NS))
    (compared,) = loop.comparisons
    assert (compared.decision, compared.predicted, compared.observed) == (2, 5.0, 10.0)
    assert compared.drift == 1.0
    assert "drift +1.0" in script.said


@given(
    st.dictionaries(
        st.sampled_from(["p", "q", "r"]),
        st.lists(st.floats(0.0, 1e9), min_size=2, max_size=2),
        min_size=1,
    ),
    st.lists(st.floats(0.0, 1e9), min_size=2, max_size=2),
    st.sets(st.sampled_from(["p", "q", "r"])),
)
def test_the_same_cut_and_seed_give_the_same_record_and_never_a_worse_or_refused_plan(
    costs: dict[str, list[float]], in_force: list[float], refused: set[str]
) -> None:
    given_costs = {IN_FORCE: in_force, **costs}
    refusals = dict.fromkeys(refused, "no")
    one = loop_of(Script(given_costs, refusals)).turn(Moment(5))
    two = loop_of(Script(given_costs, refusals)).turn(Moment(5))
    assert one is not None
    assert two is not None
    assert one == two
    assert one.digest() == two.digest()
    assert one.chosen not in refused
    assert one.rating(one.chosen).mean <= one.rating(IN_FORCE).mean


# -- belief ------------------------------------------------------------------------------------


def test_damage_is_reported_at_once_and_its_hours_only_estimated_until_it_is_inspected() -> None:
    belief = Belief(Assessment(0.5, 6.0, 6.0), [3], seed=4)
    true = np.array([24.0, 0.0, 100.0])
    belief.look(HOUR_NS, [true])
    assert ((belief.hours[0] > 0) == (true > 0)).all()
    assert (belief.hours[0] != true).any()
    early = belief.hours[0].copy()
    belief.look(6 * HOUR_NS, [true])
    assert (belief.hours[0] == early).all()
    belief.look(7 * HOUR_NS, [true])
    assert (belief.hours[0] == true).all()
    assert belief.corrected_h == pytest.approx(np.abs(early - true).sum())


def test_work_that_has_begun_shows_what_it_takes() -> None:
    belief = Belief(Assessment(0.5, 48.0, 48.0), [2], seed=4)
    belief.look(0, [np.array([24.0, 24.0])])
    belief.look(HOUR_NS, [np.array([23.0, 24.0])])
    assert belief.hours[0][0] == 23.0
    assert belief.hours[0][1] != 24.0


def test_all_measures_believe_the_same_however_often_they_look() -> None:
    true = np.full(50, 24.0)
    often, seldom = (Belief(Assessment(0.5, 48.0, 48.0), [50], seed=9) for _ in range(2))
    for hour in range(5):
        often.look(hour * HOUR_NS, [true])
    seldom.look(0, [true])
    assert (often.hours[0] == seldom.hours[0]).all()
    other = Belief(Assessment(0.5, 48.0, 48.0), [50], seed=10)
    other.look(0, [true])
    assert (other.hours[0] != seldom.hours[0]).all()


def test_estimates_are_off_by_the_stated_deviation_and_imagined_truths_by_no_more() -> None:
    belief = Belief(Assessment(0.5, 48.0, 48.0), [4000], seed=1)
    belief.look(0, [np.full(4000, 24.0)])
    off = np.log(belief.hours[0] / 24.0)
    assert abs(off.mean()) < 0.03
    assert off.std() == pytest.approx(0.5, rel=0.05)
    (imagined,) = belief.imagined(3)
    assert np.log(imagined / belief.hours[0]).std() == pytest.approx(0.5, rel=0.05)
    belief.look(48 * HOUR_NS, [np.full(4000, 24.0)])
    assert (belief.imagined(3)[0] == 24.0).all()


def test_without_an_assessment_belief_is_the_truth() -> None:
    belief = Belief(None, [2], seed=1)
    belief.look(0, [np.array([24.0, 0.0])])
    assert (belief.hours[0] == [24.0, 0.0]).all()


# -- on the region -----------------------------------------------------------------------------


def short() -> Scenario:
    """Five hours of the region, looked ahead by two."""
    scenario = load(SHELBY)
    assert scenario.repairs is not None
    repairs = scenario.repairs.model_copy(update={"rehearse_h": 2.0})
    return scenario.model_copy(update={"horizon_h": 5.0, "repairs": repairs})


def looped(seed: int, **more: object) -> tuple[Outcome, ForesightPlanner[Situation, Order]]:
    made: list[Planner] = []

    def factory(
        scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy
    ) -> Planner:
        made.append(build_planner(scenario, descriptions, policy))
        vars(made[-1]).update(more)
        return made[-1]

    case = Case(2, seed, "level5", {"disaster": {"field": 1.0}})
    outcome = run_local(short(), case, factory)
    assert isinstance(made[0], ForesightPlanner)
    return outcome, made[0]


@pytest.fixture(scope="module")
def run() -> tuple[Outcome, ForesightPlanner[Situation, Order]]:
    return looped(31)


def test_a_run_of_level_5_records_each_decision_and_tells_it_as_an_event(
    run: tuple[Outcome, ForesightPlanner[Situation, Order]],
) -> None:
    outcome, planner = run
    decisions = planner.loop.decisions
    assert decisions
    told = [r.event for r in outcome.events if r.event.kind == "decision_made"]
    assert [event.text for event in told] == [decision.sentence() for decision in decisions]
    first = decisions[0]
    assert first.cut_ns == HOUR_NS + 5 * 60_000_000_000
    assert told[0].time_ns == first.cut_ns
    assert told[0].causes
    assert first.occasion == "first damage"
    assert len(first.cut_digest) == 64
    assert set(first.versions) == {"disaster", "energy", "city", "medical", "planner"}
    assert {r.name for r in first.ratings} == {IN_FORCE, "hospitals first"}
    assert set(first.ratings[0].figures) == set(short().weighted)
    assert first.binding == ("all 12 crews are engaged",)


def test_the_same_run_comes_to_the_same_decisions_bit_for_bit(
    run: tuple[Outcome, ForesightPlanner[Situation, Order]],
) -> None:
    outcome, planner = run
    again, other = looped(31)
    assert again.digest == outcome.digest
    assert other.loop.decisions == planner.loop.decisions


def test_what_the_guard_refuses_is_not_followed() -> None:
    seen: list[Bundle] = []

    def screen(bundle: Bundle) -> Sequence[str]:
        seen.append(bundle)
        return ["not today"]

    _, planner = looped(31, _screen=screen)
    assert all(d.chosen == IN_FORCE for d in planner.loop.decisions)
    assert planner.own.followed == NEAREST
    assert seen
    for bundle in seen:
        assert 0 < len(bundle.setpoints) <= 12
        assert sum(s.value for s in bundle.setpoints) <= 12
        assert bundle.cut_ns < bundle.expires_ns


def test_level_5_says_that_it_needs_forks_where_there_are_none(
    run: tuple[Outcome, ForesightPlanner[Situation, Order]],
) -> None:
    _, planner = run
    fresh = Session(planner, "planner")
    planner._has_deliberated = False
    with pytest.raises(FederationError) as caught:
        fresh.advance(StepInput(0))
    assert caught.value.reason is Reason.UNSUPPORTED
    assert "--members local" in caught.value.message
    planner._has_deliberated = True


def test_the_blocks_of_an_assessed_run_know_only_medians() -> None:
    """Two runs that differ in the true demand plan alike at the first decision."""
    scenario = short()
    orders = []
    for demand in (0.46, 0.99):
        made: list[Planner] = []

        def factory(
            scenario: Scenario,
            descriptions: Mapping[str, Description],
            policy: Policy,
            made: list[Planner] = made,
        ) -> Planner:
            made.append(build_planner(scenario, descriptions, policy))
            return made[-1]

        parameters = {"disaster": {"field": 1.0}, "energy": {"demand_factor": demand}}
        case = Case(2, 31, "plan", parameters)
        run_local(scenario.model_copy(update={"horizon_h": 1.2}), case, factory)
        orders.append(made[0]._order)  # type: ignore[attr-defined]
    assert orders[0] == orders[1]
    assert orders[0]
