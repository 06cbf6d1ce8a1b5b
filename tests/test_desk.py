"""Who holds an actuator, from when, until when: the desk alone, without a clock or a wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.core.desk import DESK, NEVER, Desk, Phase, Read, Stop
from federation.errors import Reason, ScenarioError
from federation.twin import (
    Action,
    Actuator,
    Causality,
    Description,
    Entity,
    Operated,
    TimePolicy,
    Variable,
)

WORKS = Description(
    model="works",
    version="1",
    domain="water",
    entities=(Entity("p1", "pump"), Entity("p2", "pump")),
    variables=(Variable("level", "pump", "m", Causality.OUTPUT),),
    time=TimePolicy(period_ns=1),
    actuators=(
        Actuator("speed", "pump", "1", 0.0, 10.0, safe_default=1.0, lease_ns=50),
        Actuator("valve", "pump", "1", 0.0, 1.0, safe_default=0.5),
    ),
)


def desk() -> Desk:
    return Desk("runs/a", "works", WORKS)


def bundle(
    id: str = "b1",
    value: float = 7.0,
    *,
    priority: Priority = Priority.AUTONOMOUS,
    author: str = "loop",
    entity: str = "p1",
    lease_ns: int = 0,
    expires_ns: int = 1_000,
    conditions: tuple[Condition, ...] = (),
    others: tuple[Setpoint, ...] = (),
) -> Bundle:
    own = Setpoint("works", "speed", entity, value, lease_ns)
    return Bundle(
        id, "runs/a", (own, *others), priority, 0, expires_ns, author, conditions=conditions
    )


def level(metres: float | None) -> Read:
    return lambda variable, entity: metres


ANY = level(0.0)


def put(on: Desk, what: Bundle, signer: str = "guard", window_ns: int = 20) -> None:
    """Select, operate and confirm."""
    on.select(what, signer, window_ns, ANY)
    on.operate(what.id, what.digest(), signer, ANY)
    on.confirm(what.id, what.digest(), signer)


def given(on: Desk, time_ns: int, *actions: Action) -> list[tuple[str, float, str]]:
    """What the model is given at a step: place, value, by whom."""
    step = on.step(time_ns, actions)
    found: tuple[Operated, ...] = () if step is None else step.operated
    return [(f"{o.action.actuator}[{o.action.entity}]", o.action.value, o.by) for o in found]


def refused(do: Callable[[], object]) -> Reason:
    with pytest.raises(ScenarioError) as caught:
        do()
    return caught.value.reason


def test_a_setpoint_is_in_force_from_the_next_step_until_its_lease_ends() -> None:
    on = desk()
    put(on, bundle(lease_ns=30))
    assert given(on, 10) == [("speed[p1]", 7.0, "guard")]
    assert [given(on, t) for t in (11, 25, 39)] == [[], [], []]
    assert given(on, 40) == [("speed[p1]", 1.0, DESK)]
    assert given(on, 41) == []
    assert on.in_force() == ()


def test_a_lease_that_is_renewed_is_told_once_more_to_a_model_that_may_count_it_itself() -> None:
    """`speed` declares a lease; `valve` has only that of its setpoint, which the desk counts."""
    on = desk()
    valve = Setpoint("works", "valve", "p1", 0.75, 30)
    put(on, bundle(lease_ns=30, others=(valve,)))
    assert given(on, 10) == [("speed[p1]", 7.0, "guard"), ("valve[p1]", 0.75, "guard")]
    put(on, bundle("b2", lease_ns=30, others=(valve,)))
    assert [given(on, t) for t in (20, 21)] == [[("speed[p1]", 7.0, "guard")], []]
    assert given(on, 50) == [("speed[p1]", 1.0, DESK), ("valve[p1]", 0.5, DESK)]


def test_what_is_not_confirmed_within_its_window_is_undone_and_what_was_before_is_back() -> None:
    on = desk()
    put(on, bundle("old", 3.0))
    assert given(on, 1) == [("speed[p1]", 3.0, "guard")]
    new = bundle("new", 8.0)
    on.select(new, "guard", 20, ANY)
    on.operate("new", new.digest(), "guard", ANY)
    assert given(on, 5) == [("speed[p1]", 8.0, "guard")]
    assert given(on, 20) == []
    assert given(on, 21) == [("speed[p1]", 3.0, "guard")]
    assert refused(lambda: on.confirm("new", new.digest(), "guard")) is Reason.BUNDLE_OVER
    assert given(on, 51) == [("speed[p1]", 1.0, DESK)]  # the old lease went on meanwhile


def test_what_was_in_force_and_is_not_confirmed_is_made_up_for_during_one_step() -> None:
    speed, valve = WORKS.actuators
    works = replace(WORKS, actuators=(replace(speed, amends=0.0, compensation="it stops"), valve))

    def begun(on: Desk, what: Bundle) -> None:
        on.select(what, "guard", 20, ANY)
        on.operate(what.id, what.digest(), "guard", ANY)

    on = Desk("runs/a", "works", works)
    put(on, bundle("b0", 3.0))
    assert given(on, 1) == [("speed[p1]", 3.0, "guard")]
    begun(on, bundle("b1"))
    assert given(on, 2) == [("speed[p1]", 7.0, "guard")]
    on.release("b1")
    begun(on, bundle("b2", 5.0))  # who comes at once waits for a step
    again = Desk("runs/a", "works", works)
    again.load(on.save())
    for one in (on, again):
        step = one.step(3)
        assert step is not None
        (operated,) = step.operated
        assert operated.action.value == 0.0
        assert operated.text == "works.speed[p1] is compensated, it stops: released"
        assert [each.since_ns for each in one.in_force()] == [None]
        assert given(one, 4) == [("speed[p1]", 5.0, "guard")]
    on.release("b2")
    assert given(on, 5) == [("speed[p1]", 0.0, DESK)]
    assert given(on, 6) == [("speed[p1]", 3.0, "guard")]  # what was confirmed before
    begun(on, bundle("b3", 6.0, entity="p2"))
    on.release("b3")  # it never came into force
    assert given(on, 7) == []
    begun(on, bundle("b4", 6.0))
    assert given(on, 8) == [("speed[p1]", 6.0, "guard")]
    put(on, bundle("b5", 9.0, priority=Priority.OPERATOR, author="kim"), "kim")
    on.release("b4")  # a person has the say
    assert given(on, 9) == [("speed[p1]", 9.0, "kim")]


def test_a_reservation_lapses_after_its_window() -> None:
    on = desk()
    first, second = bundle("b1"), bundle("b2", author="other loop")
    on.select(first, "guard", 20, ANY)
    assert refused(lambda: on.select(second, "guard", 20, ANY)) is Reason.SELECTED_BY_OTHER
    given(on, 20)
    on.select(second, "guard", 20, ANY)
    assert refused(lambda: on.operate("b1", first.digest(), "guard", ANY)) is Reason.BUNDLE_OVER


def test_two_loops_on_one_actuator_are_arbitrated_the_same_way_every_time() -> None:
    def story() -> bytes:
        on = desk()
        put(on, bundle("b1", 3.0, author="north"))
        given(on, 1)
        south = bundle("b2", 9.0, author="south")
        assert refused(lambda: on.select(south, "guard", 20, ANY)) is Reason.ACTUATOR_OWNED
        put(on, bundle("b3", 4.0, author="north"))
        assert given(on, 2) == [("speed[p1]", 4.0, "guard")]
        return on.save()

    assert story() == story()


def test_life_safety_is_over_the_operator_is_over_autonomy_and_releasing_restores_the_next() -> (
    None
):
    on = desk()
    put(on, bundle("auto", 3.0))
    put(on, bundle("person", 5.0, priority=Priority.OPERATOR, author="kim"), "kim")
    put(on, bundle("life", 9.0, priority=Priority.LIFE_SAFETY, author="lee"), "lee")
    assert given(on, 1) == [("speed[p1]", 9.0, "lee")]
    on.release("life")
    assert given(on, 2) == [("speed[p1]", 5.0, "kim")]
    late = bundle("late", 2.0)
    assert refused(lambda: on.select(late, "guard", 20, ANY)) is Reason.ACTUATOR_OWNED
    on.release("person")
    assert given(on, 3) == [("speed[p1]", 3.0, "guard")]
    on.release("auto")
    assert given(on, 4) == [("speed[p1]", 1.0, DESK)]


def test_the_run_itself_does_not_take_a_held_actuator() -> None:
    on = desk()
    put(on, bundle(value=3.0))
    given(on, 1)
    assert given(on, 2, Action("works", "speed", "p1", 9.0)) == [("speed[p1]", 3.0, "guard")]
    assert given(on, 3, Action("works", "speed", "p2", 9.0)) == []


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (bundle(value=11.0), Reason.OUTSIDE_ENVELOPE),
        (bundle(value=float("nan")), Reason.OUTSIDE_ENVELOPE),
        (bundle(value=float("inf")), Reason.OUTSIDE_ENVELOPE),
        (bundle(entity="p9"), Reason.UNKNOWN_ENTITY),
        (bundle(lease_ns=51), Reason.OUTSIDE_ENVELOPE),
        (bundle(lease_ns=-1), Reason.NO_LEASE),
        (bundle(others=(Setpoint("works", "valve", "p1", 0.1),)), Reason.NO_LEASE),
        (bundle(others=(Setpoint("works", "speed", "p1", 2.0),)), Reason.SCENARIO_INVALID),
        (bundle(others=(Setpoint("works", "horn", "p1", 2.0),)), Reason.UNKNOWN_VARIABLE),
        (bundle(expires_ns=0), Reason.EXPIRED),
        (
            bundle(conditions=(Condition("works", "level", "p1", 1.0, 2.0),)),
            Reason.STATE_MOVED,
        ),
        (
            Bundle("b", "runs/a", (Setpoint("x", "y", "z", 0.0),), Priority.OPERATOR, 0, 9, "l"),
            Reason.UNKNOWN_MEMBER,
        ),
        (
            Bundle("b", "runs/b", (Setpoint("works", "speed", "p1", 0.0),), Priority(3), 0, 9, "l"),
            Reason.NOT_LIVE,
        ),
    ],
)
def test_a_bundle_that_is_wrong_is_refused_and_leaves_nothing(what: Bundle, reason: Reason) -> None:
    on = desk()
    before = on.save()
    assert refused(lambda: on.select(what, "guard", 20, ANY)) is reason
    assert on.save() == before
    assert given(on, 1) == []


def test_the_state_may_have_moved_between_selection_and_operation() -> None:
    on = desk()
    what = bundle(conditions=(Condition("works", "level", "p1", 1.0, 2.0),))
    on.select(what, "guard", 20, level(1.5))
    assert (
        refused(lambda: on.operate(what.id, what.digest(), "guard", level(2.5)))
        is Reason.STATE_MOVED
    )
    assert (
        refused(lambda: on.operate(what.id, what.digest(), "guard", level(None)))
        is Reason.STATE_MOVED
    )
    on.operate(what.id, what.digest(), "guard", level(2.0))


def test_nothing_that_waits_begins_after_its_expiry() -> None:
    on = desk()
    what = bundle(expires_ns=10)
    on.select(what, "guard", 500, ANY)
    on.operate(what.id, what.digest(), "guard", ANY)
    assert given(on, 10) == []
    assert on.in_force() == ()


def test_only_who_selected_a_bundle_goes_on_with_it_and_only_with_the_same() -> None:
    on = desk()
    what = bundle()
    digest = what.digest()
    assert refused(lambda: on.operate(what.id, digest, "guard", ANY)) is Reason.UNKNOWN_BUNDLE
    on.select(what, "guard", 20, ANY)
    assert refused(lambda: on.operate(what.id, digest, "other", ANY)) is Reason.SELECTED_BY_OTHER
    assert refused(lambda: on.operate(what.id, "0", "guard", ANY)) is Reason.REQUEST_DIFFERS


def test_a_repeated_request_gets_its_answer_and_one_with_other_content_is_refused() -> None:
    on = desk()
    what = bundle()
    first = on.once("r1", "x", lambda: on.select(what, "guard", 20, ANY))
    on.step(5)
    assert on.once("r1", "x", lambda: on.release(what.id)) == first
    assert refused(lambda: on.once("r1", "y", lambda: first)) is Reason.REQUEST_DIFFERS
    again = desk()
    again.load(on.save())
    assert again.once("r1", "x", lambda: again.release(what.id)) == first


def test_a_stop_lands_in_the_safe_defaults_and_holds_until_it_is_lifted() -> None:
    on = desk()
    put(on, bundle("auto", 3.0))
    put(on, bundle("person", 5.0, priority=Priority.OPERATOR, author="kim", entity="p2"), "kim")
    waiting = bundle("next", 4.0)
    on.select(waiting, "guard", 20, ANY)
    given(on, 1)
    on.halt(Stop("s1", "kim", "smoke"))
    assert given(on, 2) == [("speed[p1]", 1.0, DESK)]
    assert [each.owner for each in on.in_force()] == ["kim"]
    assert refused(lambda: on.select(bundle("b9"), "guard", 20, ANY)) is Reason.HALTED
    assert refused(lambda: on.operate("next", waiting.digest(), "guard", ANY)) in (
        Reason.HALTED,
        Reason.BUNDLE_OVER,
    )
    put(on, bundle("more", 6.0, priority=Priority.OPERATOR, author="kim", entity="p2"), "kim")
    on.lift(["s1"])
    put(on, bundle("b10", 3.0))
    assert ("speed[p1]", 3.0, "guard") in given(on, 3)


def test_the_arbiter_that_is_asked_too_early_has_decided_against_it() -> None:
    arbiter = desk()
    what = bundle()
    arbiter.select(what, "guard", 20, ANY)
    arbiter.operate(what.id, what.digest(), "guard", ANY)
    assert arbiter.decide(what.id) is False
    assert refused(lambda: arbiter.confirm(what.id, what.digest(), "guard")) is Reason.BUNDLE_OVER
    assert arbiter.decide("never heard of") is False
    late = bundle("never heard of")
    assert refused(lambda: arbiter.select(late, "guard", 20, ANY)) is Reason.BUNDLE_OVER
    good = bundle("good")
    put(arbiter, good)
    assert arbiter.decide("good") is True


def test_a_member_in_doubt_holds_on_until_it_is_told() -> None:
    on = Desk("runs/a", "works", WORKS)
    what = bundle(others=(Setpoint("aqueduct", "gate", "g", 1.0),))
    on.select(what, "guard", 20, ANY)
    on.operate(what.id, what.digest(), "guard", ANY)
    assert given(on, 1) == [("speed[p1]", 7.0, "guard")]
    assert on.doubts() == ()
    assert given(on, 25) == []
    assert on.doubts() == (what.id,)
    on.learn(what.id, is_confirmed=True)
    assert on.doubts() == ()
    assert given(on, 30) == []
    held = on.held(what.id)
    assert held is not None
    assert held.phase is Phase.CONFIRMED


def test_what_waits_for_its_first_step_is_not_forgotten_by_another_process() -> None:
    on, again = desk(), desk()
    put(on, bundle())
    again.load(on.save())
    assert given(again, 1) == [("speed[p1]", 7.0, "guard")]


def test_a_desk_at_rest_costs_a_step_nothing() -> None:
    on = desk()
    assert on.step(1) is None
    put(on, bundle(lease_ns=5))
    on.step(2)
    on.step(7)
    on.step(8)
    assert on.is_idle
    assert on.step(9) is None


class AnyDesk(RuleBasedStateMachine):
    """Whatever is asked in whatever order: what is in force is the strongest entry that lives."""

    @initialize()
    def begin(self) -> None:
        self.desk = desk()
        self.now_ns = 0
        self.model = {"p1": 1.0, "p2": 1.0}
        """What the model has, from all that it was given."""
        self.asked: dict[str, Bundle] = {}
        self.count = 0

    @rule(
        value=st.floats(-1.0, 11.0),
        entity=st.sampled_from(["p1", "p2"]),
        priority=st.sampled_from(list(Priority)),
        author=st.sampled_from(["north", "south"]),
        lease_ns=st.integers(0, 60),
        window_ns=st.integers(1, 30),
    )
    def select(
        self,
        value: float,
        entity: str,
        priority: Priority,
        author: str,
        lease_ns: int,
        window_ns: int,
    ) -> None:
        self.count += 1
        what = bundle(
            f"b{self.count}",
            value,
            priority=priority,
            author=author,
            entity=entity,
            lease_ns=lease_ns,
            expires_ns=self.now_ns + 40,
        )
        before = self.desk.save()
        try:
            self.desk.select(what, "guard", window_ns, ANY)
            self.asked[what.id] = what
        except ScenarioError:
            assert self.desk.save() == before

    def _one(self, data: st.DataObject) -> Bundle | None:
        return self.asked[data.draw(st.sampled_from(list(self.asked)))] if self.asked else None

    @rule(data=st.data())
    def operate(self, data: st.DataObject) -> None:
        if (what := self._one(data)) is not None:
            before = self.desk.save()
            try:
                self.desk.operate(what.id, what.digest(), "guard", ANY)
            except ScenarioError:
                assert self.desk.save() == before

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        if (what := self._one(data)) is not None:
            before = self.desk.save()
            try:
                self.desk.confirm(what.id, what.digest(), "guard")
            except ScenarioError:
                assert self.desk.save() == before

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if (what := self._one(data)) is not None:
            self.desk.release(what.id)

    @rule()
    def halt(self) -> None:
        self.desk.halt(Stop("s", "kim", "smoke"))

    @rule()
    def lift(self) -> None:
        self.desk.lift(["s"])

    @rule(span_ns=st.integers(1, 25))
    def step(self, span_ns: int) -> None:
        self.now_ns += span_ns
        done = self.desk.step(self.now_ns)
        for each in () if done is None else done.operated:
            self.model[each.action.entity] = each.action.value
        held = {each.entity: each for each in self.desk.in_force()}
        for entity, value in self.model.items():
            assert value == (held[entity].value if entity in held else 1.0)

    @rule()
    def another_process(self) -> None:
        """A desk that was saved and loaded goes on as the one that was."""
        again = desk()
        again.load(self.desk.save())
        assert again.save() == self.desk.save()
        was, is_ = self.desk.step(self.now_ns), again.step(self.now_ns)
        assert ((was and was.operated) or ()) == ((is_ and is_.operated) or ())
        for each in () if is_ is None else is_.operated:
            self.model[each.action.entity] = each.action.value
        self.desk = again

    @invariant()
    def nothing_outlives_its_lease_its_window_or_a_stop(self) -> None:
        known = {held.bundle.id: held for held in self.desk.bundles()}
        for each in self.desk.in_force():
            held = known[each.bundle]
            assert held.phase in (Phase.OPERATED, Phase.CONFIRMED)
            assert each.until_ns > self.now_ns
            assert held.phase is Phase.CONFIRMED or held.until_ns > self.now_ns
            if each.priority is Priority.AUTONOMOUS:
                assert not self.desk.stops
                assert each.since_ns is None or each.until_ns < NEVER

    @invariant()
    def the_strongest_is_in_force(self) -> None:
        live: dict[str, list[tuple[Priority, float]]] = {}
        for held in self.desk.bundles():
            if held.phase in (Phase.OPERATED, Phase.CONFIRMED):
                (setpoint,) = held.bundle.setpoints
                live.setdefault(setpoint.entity, []).append((held.bundle.priority, setpoint.value))
        held_now = {each.entity: each for each in self.desk.in_force()}
        assert held_now.keys() == live.keys()
        for entity, each in held_now.items():
            strongest = min(priority for priority, _ in live[entity])
            assert each.priority is strongest
            assert each.value in [v for priority, v in live[entity] if priority is strongest]


@pytest.mark.property
def test_whatever_is_asked_the_strongest_that_lives_is_in_force() -> None:
    # a story is some fifty steps long, so there are fewer than of other examples
    examples = settings().max_examples // 3
    run_state_machine_as_test(
        AnyDesk, settings=settings(max_examples=examples, stateful_step_count=50)
    )
