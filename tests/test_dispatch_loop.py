"""The closed loop over setpoints: what it tries, what it can't know, what the guard lets pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from federation.control.foresight import ForesightPlanner
from federation.control.foresight_dispatch import Situation
from federation.control.loop import IN_FORCE, Decision
from federation.core.bundle import Bundle
from federation.plan.dispatch import Course
from federation.planners import planner as build_planner
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import DispatchPolicy, Scenario, load
from federation.twin import HOUR_NS, MINUTE_NS, Description, Planner
from twins.disaster.heat import HeatWave

HEAT = Path(__file__).parent.parent / "twins" / "regions" / "shelby" / "heat.yaml"
CALM = {"peak_error_sd_c": 0.0, "day_error_sd_c": 0.0, "unit_mw": 0.0}

Loop5 = ForesightPlanner[Situation, Course]


def of_power_and_people(horizon_h: float) -> Scenario:
    """The heat wave without roads and hospitals, looked ahead by two hours."""
    scenario = load(HEAT)
    assert scenario.dispatch is not None
    kept = ("heat", "energy")
    return scenario.model_copy(
        update={
            "horizon_h": horizon_h,
            "members": {n: m for n, m in scenario.members.items() if n in kept},
            "couplings": tuple(
                c
                for c in scenario.couplings
                if c.source.partition(".")[0] in kept and c.target.partition(".")[0] in kept
            ),
            "kpis": tuple(k for k in scenario.kpis if k.partition(".")[0] in kept),
            "weighted": {
                "energy.unserved_energy_mwh": 9000.0,
                "energy.response_used_mwh": 1849.0,
                "heat.excess_deaths_expected": 11.6e6,
            },
            "dispatch": scenario.dispatch.model_copy(update={"rehearse_h": 2.0}),
        }
    )


def ran(
    measure: str,
    horizon_h: float,
    parameters: Mapping[str, Mapping[str, float]],
    **more: object,
) -> tuple[Outcome, Planner]:
    made: list[Planner] = []

    def factory(
        scenario: Scenario, descriptions: Mapping[str, Description], policy: DispatchPolicy
    ) -> Planner:
        made.append(build_planner(scenario, descriptions, policy))
        vars(made[-1]).update(more)
        return made[-1]

    scenario = of_power_and_people(horizon_h)
    given: dict[str, dict[str, float]] = {"energy": {}, "heat": {}}
    given |= {member: dict(values) for member, values in parameters.items()}
    for name, value in scenario.parameters.items():
        member, _, parameter = name.partition(".")
        given[member] = {parameter: value, **given[member]}
    return run_local(scenario, Case(0, 31, measure, given), factory), made[0]


def decisions_of(planner: Planner) -> list[Decision]:
    assert isinstance(planner, ForesightPlanner)
    return planner.loop.decisions


def relays_acted(outcome: Outcome) -> bool:
    return any("relays keep out" in r.event.text for r in outcome.events)


def in_vain_mwh(outcome: Outcome, horizon_h: float) -> float:
    """What was taken off, by whatever means, beyond what lacked."""
    lacking = outcome.series["energy.lacking"]
    ends = [*(at_ns for at_ns, _ in lacking[1:]), round(horizon_h * HOUR_NS)]
    lacked = sum(mw * (end - at) for (at, mw), end in zip(lacking, ends, strict=True)) / HOUR_NS
    kpis = outcome.kpis
    return kpis["unserved_energy_mwh"] + kpis["response_used_mwh"] - lacked


@pytest.fixture(scope="module")
def run() -> tuple[Outcome, Planner]:
    return ran("level5", 8.0, {})


def test_a_run_records_each_decision_and_tells_it_as_an_event(run: tuple[Outcome, Planner]) -> None:
    outcome, planner = run
    decisions = decisions_of(planner)
    first = decisions[0]
    # at the first look nothing that comes within two hours is to be set
    assert first.cut_ns >= 55 * MINUTE_NS + HOUR_NS
    tried = {rating.name for rating in first.ratings}
    assert tried == {IN_FORCE, "the rules", "nothing"}
    assert set(first.ratings[0].figures) == set(of_power_and_people(8.0).weighted)
    # the afternoon's shortage, seen with the forecast of 14 h
    later = next(d for d in decisions if "heat.forecast_temperature" in d.occasion)
    assert later.cut_ns == 6 * HOUR_NS + 55 * MINUTE_NS
    assert later.rating(later.chosen).mean <= later.rating("nothing").mean
    assert later.binding[0].startswith("energy.supply_limit: one more would save ")
    told = [r.event.text for r in outcome.events if r.event.kind == "decision_made"]
    assert told == [decision.sentence() for decision in decisions]


def test_the_same_run_comes_to_the_same_decisions_bit_for_bit(
    run: tuple[Outcome, Planner],
) -> None:
    outcome, planner = run
    again, other = ran("level5", 8.0, {})
    assert again.digest == outcome.digest
    assert decisions_of(other) == decisions_of(planner)


def test_the_loop_does_not_know_how_the_forecast_errs_nor_when_a_unit_trips(
    run: tuple[Outcome, Planner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another afternoon than in the run: until it comes, all decisions are the same."""
    begin = HeatWave.open

    def otherwise(self: HeatWave, seed: int, parameters: Mapping[str, float]) -> None:
        begin(self, seed, parameters)
        assert self.wave is not None
        self.wave.error_c[5:] += 3.0
        self.wave.outage_h = 5.5

    monkeypatch.setattr(HeatWave, "open", otherwise)
    outcome, planner = ran("level5", 8.0, {})
    before = [d for d in decisions_of(planner) if d.cut_ns < 5 * HOUR_NS]
    assert before
    assert before == [d for d in decisions_of(run[1]) if d.cut_ns < 5 * HOUR_NS]
    after = next(d for d in decisions_of(planner) if "heat.import_limit" in d.occasion)
    assert after.cut_ns == 5 * HOUR_NS + 55 * MINUTE_NS
    assert outcome.digest != run[0].digest


def test_what_the_guard_refuses_is_not_followed() -> None:
    seen: list[Bundle] = []

    def screen(bundle: Bundle) -> Sequence[str]:
        seen.append(bundle)
        return ["not today"]

    outcome, planner = ran("level5", 8.0, {}, _screen=screen)
    assert all(d.chosen == IN_FORCE for d in decisions_of(planner))
    assert not outcome.actions
    assert any(bundle.setpoints for bundle in seen)
    for bundle in seen:
        assert bundle.cut_ns < bundle.expires_ns
        for point in bundle.setpoints:
            high = 1.0 if point.actuator == "serve_limit" else 170.0
            assert 0.0 <= point.value <= high


@pytest.mark.parametrize("measure", ["plan", "level5"])
def test_with_a_right_forecast_relays_never_act_and_little_is_taken_off_in_vain(
    measure: str,
) -> None:
    """The model knows orders, contracts and losses: what it keeps free is enough."""
    calm = {"heat": CALM, "energy": {**CALM, "cooling_error_per_c": 0.0}}
    del calm["energy"]["unit_mw"]
    outcome, _ = ran(measure, 15.0, calm)
    assert not relays_acted(outcome)
    short_h = 10
    assert 0.0 < in_vain_mwh(outcome, 15.0) < 30.0 * short_h
    by_rule, _ = ran("operators-rule", 15.0, calm)
    assert relays_acted(by_rule)
    assert in_vain_mwh(by_rule, 15.0) > 2.0 * in_vain_mwh(outcome, 15.0)


def test_plans_made_beforehand_believe_that_what_is_uncertain_is_at_its_median() -> None:
    plans = []
    for cooling in (0.027, 0.033):
        _, planner = ran("plan", 2.0, {"energy": {"cooling_per_c": cooling}})
        plan = planner._memory.course.plan  # type: ignore[attr-defined]
        plans.append(plan.values)
    assert all(np.array_equal(a, b) for a, b in zip(*plans, strict=True))
    assert (plans[0][0] < 1.0).any()
