"""The guard lets pass what the owners' rules allow, and nothing else reaches a twin."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.control import rules as documents
from federation.control.guard import Guard
from federation.control.limits import Limits, Memory
from federation.control.monitor import Monitor
from federation.control.rules import Rules
from federation.control.situation import Mode, Reading, Situation, Submission, Verdict
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.errors import Reason, ScenarioError
from federation.twin import MINUTE_NS
from tests.hostile.plans import Author, keys
from tests.hostile.referee import Referee
from tests.hostile.suite import RULES, TOWN, Suite
from tests.hostile.town import DESCRIPTIONS, FEEDERS, PUMPS, RUN, TIES, Place, Town

TEXT = TOWN.read_text(encoding="utf-8")
F1: Place = ("grid", "feed", "f1")
F5: Place = ("grid", "feed", "f5")


class Desk:
    """A town with a guard whose every bundle takes effect at once, and somebody who sends plans."""

    def __init__(self) -> None:
        self.town = Town()
        self.guard = Guard(RULES, DESCRIPTIONS, lambda *_: True)
        self.author = Author(self.town, random.Random(1), keys(1))
        self.town.settle = self.guard.settle
        self.town.tell()

    def plan(self, *wanted: tuple[Place, float], **changes: Any) -> Submission:
        setpoints = tuple(Setpoint(*place, value, 20 * MINUTE_NS) for place, value in wanted)
        return self.author.plan(*setpoints, age_min=0, **changes).submission

    def judge(self, plan: Submission) -> Verdict:
        forecast = self.town.forecast(plan.bundle)
        return self.obey(plan, self.guard.judge(plan, self.town.situation(), forecast))

    def obey(self, plan: Submission | None, verdict: Verdict) -> Verdict:
        if plan is not None and verdict.passed:
            self.town.let_go(plan.bundle, 0)
        if verdict.fallback is not None:
            self.town.let_go(verdict.fallback, 0)
        return verdict

    def ask(self, *wanted: tuple[Place, float], **changes: Any) -> Verdict:
        return self.judge(self.plan(*wanted, **changes))

    def wait(self, minutes: float) -> None:
        self.town.advance(self.town.now_ns + round(minutes * MINUTE_NS))


def rule_of(verdict: Verdict) -> list[str]:
    return sorted({refusal.rule for refusal in verdict.refusals})


# -- the suite, and whether it would notice ----------------------------------------------


def test_level45_14_no_hostile_plan_reaches_the_town_and_no_safe_one_is_refused() -> None:
    suite = Suite(seed=11)
    suite.play(hostile=1000, safe=1000)
    figures = suite.figures()
    assert figures["breaches"] == 0, suite.breaches[:5]
    assert figures["safe_refused"] == 0, suite.safe_refused[:5]
    assert figures["hostile"] >= 1000
    for rule in Limits.checks:
        assert suite.kinds[f"{rule} alone"] >= 5, f"hardly any plan broke {rule} and nothing else"
    assert len(suite.switch_ms) > 100


@pytest.mark.parametrize("rule", Limits.checks)
def test_level45_14_the_suite_notices_when_the_guard_lacks_a_rule(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(Limits.checks, rule)
    suite = Suite(seed=12)
    suite.play(hostile=3000, until_breach=True)
    assert suite.breaches
    assert rule in suite.breaches[0], "and the referee names what was missed"


def test_level45_14_the_suite_notices_when_the_monitor_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Monitor, "observe", lambda self, situation: ())
    suite = Suite(seed=13)
    suite.play(hostile=1500, until_breach=True)
    assert suite.breaches


def test_level45_14_the_suite_notices_when_what_passed_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Memory, "reserved", lambda self: [])
    suite = Suite(seed=14)
    suite.play(hostile=1500, until_breach=True)
    assert suite.breaches


values = st.one_of(
    st.floats(),
    st.floats(-5, 105, width=32),
    st.sampled_from([0.0, 0.5, 1.0, 5.0, 40.0, 70.0, 90.0, float("nan")]),
)
places = st.one_of(
    st.tuples(st.just("grid"), st.just("feed"), st.sampled_from(FEEDERS)),
    st.tuples(st.just("grid"), st.just("tie"), st.sampled_from(TIES)),
    st.tuples(st.just("water"), st.just("pump"), st.sampled_from(PUMPS)),
)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(places, values), min_size=1, max_size=4),
            st.sampled_from([0.0, 0.5, 3.0, 7.0]),
            st.sampled_from([0.0, 1.0]),
            st.booleans(),
        ),
        min_size=1,
        max_size=10,
    )
)
def test_level45_14_after_whatever_passes_the_envelope_holds(
    story: list[tuple[list[tuple[Place, float]], float, float, bool]],
) -> None:
    suite = Suite(seed=15)
    for wanted, quiet_min, delay_min, works in story:
        setpoints = [Setpoint(*place, value, 14 * MINUTE_NS) for place, value in wanted]
        plan = suite.author.plan(*setpoints, delay_min=delay_min)
        suite.send(replace(plan, works=works))
        suite.author.quiet(quiet_min)
    suite.author.quiet(20)
    assert suite.breaches + suite.referee.breaches == []
    assert suite.safe_refused == []


# -- what is refused, one by one ---------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 90.5, 1e300])
def test_level45_14_a_number_that_is_none_or_too_large_is_refused(value: float) -> None:
    desk = Desk()
    verdict = desk.ask((F1, value))
    assert not verdict.passed
    assert "range:grid.feed" in rule_of(verdict)


def test_level45_14_what_cannot_even_be_judged_is_refused() -> None:
    desk = Desk()
    plan = desk.plan((F1, 42.0))
    odd: Any = ("forty", None, 10**400, [])
    for value in odd:
        setpoint = Setpoint(*F1, value, 20 * MINUTE_NS)
        bundle = replace(plan.bundle, id=f"odd-{odd.index(value)}", setpoints=(setpoint,))
        verdict = desk.guard.judge(replace(plan, bundle=bundle), desk.town.situation())
        assert not verdict.passed
        assert verdict.mode is Mode.RECOVERY


def test_level45_14_an_actuator_without_a_rule_is_not_autonomous() -> None:
    verdict = Desk().ask((("grid", "reserve", "system"), 0.0))
    assert rule_of(verdict) == ["granted:grid.reserve"]


def test_level45_14_two_bundles_that_are_only_together_too_much_cannot_both_pass() -> None:
    desk = Desk()
    north: Place = ("grid", "tie", "north")
    south: Place = ("grid", "tie", "south")
    first, second = desk.plan((north, 1.0)), desk.plan((south, 1.0), author="second-planner")
    situation = desk.town.situation()
    assert desk.guard.judge(first, situation, desk.town.forecast(first.bundle)).passed
    verdict = desk.guard.judge(second, situation, desk.town.forecast(second.bundle))
    assert rule_of(verdict) == ["exclusion:ring"], "though the first has not taken effect yet"
    assert verdict.revoked == (first.bundle.id,)


def test_level45_20_rate_blast_radius_and_repetition_are_limited() -> None:
    desk = Desk()
    assert desk.ask((F1, 60.0)).passed
    desk.wait(1)
    assert rule_of(desk.ask((F1, 71.0))) == ["change:grid.feed"], "31 MW in a minute"

    desk = Desk()
    for few in (FEEDERS[:3], FEEDERS[3:5]):
        assert desk.ask(*(((("grid", "feed", e)), 41.0) for e in few)).passed
    assert rule_of(desk.ask((("grid", "feed", "f6"), 41.0))) == ["blast:grid.feed"]

    desk = Desk()
    for value in (44.0, 40.0, 44.0):
        assert desk.ask((F1, value)).passed
        desk.wait(4)
    assert rule_of(desk.ask((F1, 40.0))) == ["reversals:grid.feed"], "for the third time"

    desk = Desk()
    for _ in range(10):
        assert desk.ask((F1, 40.0)).passed, "to repeat what is in force is no change"
    assert rule_of(desk.ask((F1, 40.0))) == ["size"], "but ten bundles are enough"


def test_level45_20_a_lease_that_ends_is_a_movement_that_a_plan_may_turn_against() -> None:
    desk = Desk()
    for _ in range(3):
        plan = desk.plan((F1, 46.0), life_min=2)
        short = replace(plan.bundle.setpoints[0], lease_ns=3 * MINUTE_NS)
        assert desk.judge(replace(plan, bundle=replace(plan.bundle, setpoints=(short,)))).passed
        desk.wait(4)
    assert "reversals:grid.feed" in rule_of(desk.ask((F1, 46.0)))


@pytest.mark.parametrize(
    ("reading", "why"),
    [
        ({"time_ns": -4 * MINUTE_NS}, "4 min old"),
        ({"quality": 3}, "stale"),
        ({"quality": 1}, "held"),
        ({"clock_error_s": 1.5}, "clock"),
        ({"clock_error_s": float("nan")}, "clock"),
        ({"values": np.array([1.0, float("nan"), 1.0])}, "no vector"),
        ({"time_ns": MINUTE_NS}, "old"),
    ],
)
def test_level45_04_a_value_that_is_old_degraded_or_badly_timed_is_no_ground_to_act(
    reading: dict[str, Any], why: str
) -> None:
    desk = Desk()
    if "quality" in reading:
        reading["quality"] = type(Reading(np.ones(1), 0).quality)(reading["quality"])
    situation = desk.town.situation()
    good = situation.readings["clinic", "supply"]
    readings = {**situation.readings, ("clinic", "supply"): good._replace(**reading)}
    plan = desk.plan((F1, 41.0))
    verdict = desk.guard.judge(
        plan, replace(situation, readings=readings), desk.town.forecast(plan.bundle)
    )
    assert "usable:clinic.supply" in rule_of(verdict)
    assert why in " ".join(r.sentence for r in verdict.refusals)


def test_level45_11_a_decision_is_refused_when_the_state_has_moved() -> None:
    desk = Desk()
    dry = Condition("water", "flood", "p2", 0.0, 0.5)
    plan = desk.plan((F1, 41.0), conditions=(dry,))
    desk.town.flood_m[2] = 0.7
    desk.wait(1)
    verdict = desk.judge(plan)
    assert rule_of(verdict) == ["conditions:water.flood"]
    assert "p2 is at 0.7" in verdict.refusals[0].sentence


def moved(desk: Desk) -> tuple[Submission, Verdict]:
    """A decision, and what becomes of it when a street is flooded while it is being made."""
    dry = Condition("water", "flood", "p2", 0.0, 0.5)
    plan, at_cut = desk.plan((F1, 41.0), conditions=(dry,)), desk.town.situation()
    desk.town.flood_m[2] = 0.7
    desk.wait(1)
    forecast = desk.town.forecast(plan.bundle)
    verdict = desk.guard.judge(plan, desk.town.situation(), forecast, at_cut)
    desk.town.flood_m[2] = 0.0
    desk.wait(1)
    return plan, desk.obey(plan, verdict)


def test_level45_11_who_was_overtaken_by_the_world_is_refused_and_tries_again() -> None:
    desk = Desk()
    assert desk.ask((F5, 50.0)).passed
    _, verdict = moved(desk)
    assert (verdict.good, verdict.passed, verdict.is_overtaken) == (False, False, True)
    assert rule_of(verdict) == ["conditions:water.flood"]
    assert (verdict.mode, verdict.fallback, verdict.faults) == (Mode.LOOP, None, ())
    assert desk.town.in_force(F5) == 50.0, "what passed stands"
    assert desk.ask((F1, 41.0)).passed


def test_who_is_wrong_at_the_cut_as_well_is_at_fault() -> None:
    for wrong in (
        ((F1, 91.0), {}),
        ((F1, 41.0), {"conditions": (Condition("water", "flood", "p2", 5.0, 9.0),)}),
        # and who rests on another cut than the one that was seen
        ((F1, 41.0), {"conditions": (Condition("water", "flood", "p2", 0, 0.5),), "cut_ns": -1}),
    ):
        desk = Desk()
        place, changes = wrong
        plan, at_cut = desk.plan(place, **changes), desk.town.situation()
        desk.town.flood_m[2] = 0.7
        desk.wait(1)
        forecast = desk.town.forecast(plan.bundle)
        verdict = desk.guard.judge(plan, desk.town.situation(), forecast, at_cut)
        assert verdict.mode is Mode.RECOVERY
        assert verdict.faults
        assert not verdict.is_overtaken


def test_of_two_who_are_only_together_too_much_the_second_is_overtaken_by_the_first() -> None:
    desk = Desk()
    one, two = (desk.plan((("grid", "tie", tie), 1.0)) for tie in TIES)
    at_cut = desk.town.situation()
    assert desk.judge(one).passed
    desk.wait(1)
    forecast = desk.town.forecast(two.bundle)
    verdict = desk.guard.judge(two, desk.town.situation(), forecast, at_cut)
    assert rule_of(verdict) == ["exclusion:ring"]
    assert (verdict.passed, verdict.is_overtaken, verdict.mode) == (False, True, Mode.LOOP)


def test_level45_24_a_good_decision_that_comes_too_late_is_like_none() -> None:
    for after_min, mode in ((2, Mode.LOOP), (4.5, Mode.RECOVERY)):
        desk = Desk()
        assert desk.ask((F5, 50.0)).passed
        desk.wait(1)
        plan, at_cut = desk.plan((F1, 41.0), life_min=1.5), desk.town.situation()
        desk.wait(after_min)
        forecast = desk.town.forecast(plan.bundle)
        verdict = desk.guard.judge(plan, desk.town.situation(), forecast, at_cut)
        assert rule_of(verdict) == ["freshness"]
        assert verdict.mode is mode
        assert bool(verdict.faults) is (mode is Mode.RECOVERY)


def test_the_recovery_plan_is_renewed_by_who_is_overtaken_and_by_who_must_wait() -> None:
    desk = Desk()
    desk.ask((F1, 1e9))
    _, verdict = moved(desk)
    assert verdict.mode is Mode.RECOVERY
    assert verdict.fallback is not None
    assert verdict.faults == ()
    waits = desk.ask((F1, 41.0))
    assert (waits.good, waits.passed, waits.faults) == (True, False, ())


def test_level45_12_nothing_begins_after_its_expiry() -> None:
    desk = Desk()
    plan = desk.plan((F1, 41.0), life_min=3)
    desk.wait(3)
    assert rule_of(desk.judge(plan)) == ["freshness"]


def test_level45_13_only_who_may_propose_is_heard_and_never_as_a_person() -> None:
    suite = Suite(seed=1)
    for signer in ("desk-officer", "grid", "stranger", "second-planner", "nobody"):
        plan = suite.author.plan(*suite.author.modest(), signer=signer)
        verdict = suite.guard.judge(plan.submission, suite.town.situation(), plan.forecast)
        assert "authority" in rule_of(verdict)
    desk = Desk()
    verdict = desk.ask((F1, 41.0), priority=Priority.LIFE_SAFETY)
    assert rule_of(verdict) == ["authority"]


def test_level45_16_nothing_is_set_without_a_lease_that_ends() -> None:
    desk = Desk()
    for lease_ns in (0, -1, 31 * MINUTE_NS):
        plan = desk.plan((F1, 41.0))
        setpoint = replace(plan.bundle.setpoints[0], lease_ns=lease_ns)
        bundle = replace(plan.bundle, setpoints=(setpoint,))
        assert "lease:grid.feed" in rule_of(desk.judge(replace(plan, bundle=bundle)))


def test_level45_17_what_a_person_holds_is_not_for_the_loop() -> None:
    desk = Desk()
    desk.town.hold(F5, 55.0, minutes=10)
    assert rule_of(desk.ask((F5, 41.0))) == ["settled:grid.feed"]


def test_while_nobody_knows_what_a_twin_holds_nothing_is_set_anywhere() -> None:
    desk = Desk()
    plan, known = desk.plan((F5, 41.0)), desk.town.situation()
    forecast = desk.town.forecast(plan.bundle)
    silent = replace(known, silent=("clinic", "water"))
    verdict = desk.guard.judge(plan, silent, forecast, known)
    assert rule_of(verdict) == ["settled:water"], "the clinic has no actuator with a rule"
    assert (verdict.passed, verdict.is_overtaken) == (False, True)
    assert desk.judge(plan).passed


def test_a_plan_that_would_leave_a_hospital_in_the_dark_is_refused() -> None:
    desk = Desk()
    assert desk.ask((("grid", "feed", "f0"), 16.0)).passed
    desk.wait(6)
    verdict = desk.ask((("grid", "feed", "f0"), 14.0))
    assert rule_of(verdict) == ["never:dark-hospital"]
    assert "h0 would be without for over 10 min" in verdict.refusals[0].sentence


# -- the recovery plan -------------------------------------------------------------------


def test_level45_14_after_a_refusal_the_recovery_plan_acts_until_good_decisions_return() -> None:
    desk = Desk()
    assert desk.ask((F5, 50.0)).passed
    verdict = desk.ask((F1, 1e9))
    assert verdict.mode is Mode.RECOVERY
    fallback = verdict.fallback
    assert fallback is not None
    assert fallback.author == "guard"
    assert {(s.entity, s.value) for s in fallback.setpoints} == {
        ("f0", 60.0),
        ("f1", 60.0),
        ("f2", 55.0),
        ("f5", 40.0),  # the loop had set it: it goes to its safe default
    }
    desk.wait(3)
    first = desk.ask((F5, 41.0))
    assert (first.good, first.passed) == (True, False)
    assert first.refusals[0].sentence == "1 of 2 good decisions since the switch"
    desk.wait(1)
    assert desk.ask((F5, 41.0)).passed
    assert desk.guard.mode is Mode.LOOP


def test_a_bad_decision_starts_the_count_of_good_ones_anew() -> None:
    desk = Desk()
    desk.ask((F1, 1e9))
    for value in (41.0, 1e9, 41.0):
        desk.wait(1)
        assert not desk.ask((F5, value)).passed
    desk.wait(1)
    assert desk.ask((F5, 41.0)).passed


def test_level45_14_a_breach_that_is_seen_switches_before_its_time_is_up() -> None:
    desk = Desk()
    desk.town.efficiency[1] = 0.3
    told = None
    while told is None:
        desk.wait(0.5)
        told = desk.guard.watch(desk.town.situation())
    assert desk.town.now_ns == 6 * MINUTE_NS, "4 minutes before the 10 are over"
    assert "h1: clinic.supply is 0.4, for 6 min" in told.refusals[0].sentence
    assert told.fallback is not None


def test_level45_24_the_solver_out_of_time_means_the_last_safe_plan_and_then_recovery() -> None:
    desk = Desk()
    none_yet = desk.guard.silence(desk.town.situation(), "the solver found nothing in 10 s")
    assert none_yet.mode is Mode.RECOVERY, "there is no last safe plan"

    desk = Desk()
    assert desk.ask((F5, 50.0)).passed
    desk.wait(4)
    verdict = desk.guard.silence(desk.town.situation(), "the solver found nothing in 10 s")
    assert (verdict.mode, verdict.fallback) == (Mode.LOOP, None), "what passed stands"
    desk.wait(2)
    verdict = desk.guard.silence(desk.town.situation(), "the solver found nothing in 10 s")
    assert verdict.mode is Mode.RECOVERY
    assert verdict.fallback is not None


def test_level45_25_a_decision_under_other_rules_is_refused() -> None:
    desk = Desk()
    assert desk.ask((F5, 41.0)).passed
    old = desk.plan((F5, 42.0))
    desk.guard.change_rules(documents.parse(TEXT.replace("version: 7", "version: 8")))
    assert rule_of(desk.judge(old)) == ["version"]
    desk.wait(1)
    assert desk.ask((F5, 42.0), version=8).good
    with pytest.raises(ScenarioError, match="version 8 is already in force"):
        desk.guard.change_rules(documents.parse(TEXT))
    assert desk.guard.rules.version == 8


def test_a_guard_goes_on_from_its_snapshot() -> None:
    desk = Desk()
    assert desk.ask((F1, 60.0)).passed
    pending = desk.plan((F5, 45.0))
    situation = desk.town.situation()
    assert desk.guard.judge(pending, situation, desk.town.forecast(pending.bundle)).passed
    plain = json.loads(json.dumps(desk.guard.snapshot()))

    heir = Desk()
    heir.guard.restore(plain)
    assert heir.guard.snapshot() == plain
    heir.town = desk.town
    assert "replay" in rule_of(heir.guard.judge(pending, situation, None))
    again = desk.plan((F1, 71.0))
    verdict = heir.guard.judge(again, situation, desk.town.forecast(again.bundle))
    assert "change:grid.feed" in rule_of(verdict)


def test_what_never_took_effect_counts_for_nothing() -> None:
    desk = Desk()
    for _ in range(12):
        plan = desk.plan((F1, 65.0))
        verdict = desk.guard.judge(plan, desk.town.situation(), desk.town.forecast(plan.bundle))
        assert verdict.passed
        desk.guard.settle(plan.bundle.id, None)


# -- the rules ---------------------------------------------------------------------------


BROKEN = [
    ("at_most: 30, ", "atmost: 30, ", "did you mean 'at_most'?"),
    ("    high: 90", "    high: 190", "5..190 is not within the actuator's own 0..100"),
    ("    low: 5\n", "    low: 45\n", "its safe default 40 is outside of its range"),
    ("at_most: 30,", "at_most: .nan,", "finite number"),
    ("at_most: 430", "at_most: .nan", "finite number"),
    ("version: 7", "version: 0", "greater than 0"),
    ("{of: grid.tie, entity: south", "{of: grid.tie, entity: east", "no entity 'east'"),
    ("{of: grid.tie, entity: south", "{of: grid.tie, entity: north", "two terms of ring"),
    ("  grid.tie:", "  grid.tides:", "no twin has an actuator grid.tides"),
    ("  clinic.supply: {age", "  clinic.supper: {age", "no twin has an output clinic.supper"),
    ("entity: f1, value: 60", "entity: f1, value: 95", "95 is outside 5..90"),
    ("entity: f1, value: 60", "entity: f21, value: 60", "no entity 'f21'"),
]


@pytest.mark.parametrize(("old", "new", "words"), BROKEN)
def test_rules_that_are_wrong_are_refused_with_their_line(old: str, new: str, words: str) -> None:
    with pytest.raises(ScenarioError, match=re.escape(words)) as caught:
        Guard(documents.parse(TEXT.replace(old, new, 1)), DESCRIPTIONS, lambda *_: True)
    assert caught.value.reason in (Reason.RULES_INVALID, Reason.UNKNOWN_KEY)
    line = TEXT[: TEXT.index(old)].count("\n") + 1
    assert int(caught.value.metadata["line"]) in (line, line - 1), "of the key or of its rule"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("at_most: 430", "at_most: 370", "the recovery plan breaks sum:supply: may come to 375"),
        ("grid: the utility, ", "", "grid has no owner"),
        ("name: draw", "name: ring", "ring is the name of two rules"),
        ("margin_min: 4", "margin_min: 14", "longer than what it is a margin of"),
        ("lease_min: 30\n  returns", "lease_min: 7\n  returns", "ends before it may have begun"),
        ("values:\n  clinic.supply: {age_min: 3}", "values:", "does not say when clinic.supply"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(old: str, new: str, words: str) -> None:
    assert old in TEXT
    with pytest.raises(ScenarioError, match=re.escape(words)):
        Guard(documents.parse(TEXT.replace(old, new, 1)), DESCRIPTIONS, lambda *_: True)


@pytest.mark.parametrize("limit", ["change", "changes", "entities", "reversals", "lease_min"])
def test_a_limit_that_somebody_forgot_is_not_wide_open(limit: str) -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(f"    {limit}:")]
    with pytest.raises(ScenarioError, match="Field required"):
        documents.parse("\n".join(lines))


def test_rules_know_how_far_back_they_look() -> None:
    rules: Rules = documents.load(TOWN)
    assert rules.longest_ns == 30 * MINUTE_NS
    with pytest.raises(ScenarioError, match="there are no rules at"):
        documents.load("nowhere.yaml")


def test_a_referee_sees_what_no_guard_holds_back() -> None:
    suite = Suite(seed=1)
    referee = Referee(suite.town, suite.known)
    suite.town.changed = referee.look
    ties = tuple(Setpoint("grid", "tie", e, 1.0, MINUTE_NS) for e in TIES)
    suite.town.let_go(Bundle("b", RUN, ties, Priority.AUTONOMOUS, 0, 1, "x"), 0)
    assert referee.breaches == ["both ties at 0"]
    assert Situation(RUN, 0).readings == {}
