"""The coordinator against the plain reference, over random graphs, steps and message orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federation.core.coordinator import Coordinator, LoopPolicy
from federation.core.coupling import Actuation, Combine, Coupling, Wiring, conversion, wire
from federation.core.ledger import ActionRecord, Entry, EventRecord, Record
from federation.core.messages import Grant, Stepped
from federation.errors import Reason, ScenarioError, TwinError
from federation.twin import Causality, Description, Entity, TimePolicy, Variable
from tests.reference import Reference
from tests.worlds import Habit, drive, open_sessions, shuffled

HORIZON_NS = 40


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, Habit], Wiring]:
    """Up to six toys, wired at random; loops without delay only among toys that can redo."""
    count: int = draw(st.integers(1, 6))
    names = [f"t{i}" for i in range(count)]
    size: int = draw(st.integers(1, 3))
    has_loops: bool = draw(st.booleans())
    couplings: list[Coupling] = []
    inputs: dict[str, list[str]] = {name: [] for name in names}
    for index in range(draw(st.integers(0, 10))):
        source, target = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        is_forward = names.index(source) < names.index(target)
        may_be_instant = is_forward or (has_loops and source != target)
        delay_ns = draw(st.integers(0 if may_be_instant else 1, 6))
        shared = bool(inputs[target]) and draw(st.booleans())
        name = inputs[target][0] if shared else f"u{index}"
        if not shared:
            inputs[target].append(name)
        couplings.append(Coupling(source, "x", target, name, delay_ns, None, Combine.MEAN))
    actuations = []
    acts: dict[str, tuple[str, ...]] = {}
    if len(names) > 1 and draw(st.booleans()):
        source, target = names[-1], names[0]
        actuations.append(Actuation(source, target, draw(st.integers(1, 5))))
        acts[source] = (target,)
    habits = {}
    for name in names:
        is_periodic = draw(st.booleans())
        policy = TimePolicy(
            period_ns=draw(st.integers(1, 7)) if is_periodic else 0,
            offset_ns=draw(st.integers(0, 3)),
            wakes_on_input=draw(st.booleans()),
            can_redo=has_loops,
        )
        habits[name] = Habit(
            policy,
            tuple(inputs[name]),
            size,
            is_coarse=not has_loops and draw(st.booleans()),
            gain=0.4,
            acts_on=acts.get(name, ()),
            jumps=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))),
        )
    descriptions = {n: s.description for n, s in open_sessions(habits).items()}
    return habits, wire(descriptions, couplings, actuations)


def _line(entry: Entry) -> str:
    """An entry as a reader of a failed comparison wants to see it."""
    at = f"{entry.time_ns}.{entry.micro} {entry.owner}"
    match entry:
        case Record():
            return f"{at}.{entry.variable}#{entry.revision} = {entry.value.tolist()}"
        case EventRecord():
            return f"{at} {entry.event.id} <- {entry.event.causes}"
        case ActionRecord():
            return f"{at} acts {entry.action} {entry.refusal}"


@given(worlds(), st.integers(0, 2**16), st.integers(1, 9))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_message_order_gives_the_ledger_of_the_sequential_reference(
    world: tuple[dict[str, Habit], Wiring], order: int, frame_steps: int
) -> None:
    habits, wiring = world
    expected = Reference(wiring, open_sessions(habits), HORIZON_NS)
    digest = expected.run()
    coordinator = Coordinator(wiring, HORIZON_NS, frame_steps=frame_steps)
    found, entries = drive(coordinator, open_sessions(habits), shuffled(order))
    assert [_line(e) for e in entries] == [_line(e) for e in expected.entries]
    assert found == digest


@given(worlds(), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_every_entry_is_committed_once_and_in_order(
    world: tuple[dict[str, Habit], Wiring], order: int
) -> None:
    habits, wiring = world
    _, entries = drive(Coordinator(wiring, HORIZON_NS), open_sessions(habits), shuffled(order))
    keys = [entry.sort_key() for entry in entries]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    owners = {(e.variable, e.owner) for e in entries if isinstance(e, Record)}
    for variable, owner in owners:
        revisions = [
            e.revision
            for e in entries
            if isinstance(e, Record) and (e.variable, e.owner) == (variable, owner)
        ]
        assert revisions == list(range(1, len(revisions) + 1))
    seen: set[str] = set()
    for entry in entries:
        if isinstance(entry, EventRecord):
            assert {cause for cause, _ in entry.via} <= seen
            seen.add(entry.event.id)


def chain(period_a: int, period_b: int, delay_ns: int) -> tuple[dict[str, Habit], Wiring]:
    habits = {
        "a": Habit(TimePolicy(period_ns=period_a), (), 1, False, 0.4),
        "b": Habit(TimePolicy(period_ns=period_b), ("u",), 1, False, 0.4),
    }
    descriptions = {n: s.description for n, s in open_sessions(habits).items()}
    return habits, wire(descriptions, [Coupling("a", "x", "b", "u", delay_ns)])


def test_a_fast_member_gets_all_steps_up_to_its_source_in_one_frame() -> None:
    """a steps every 5, b every 1 and reads a at once: b may do 0, then 1..5 never past a."""
    habits, wiring = chain(5, 1, 0)
    sessions = open_sessions(habits)
    coordinator = Coordinator(wiring, 5)
    (first,) = coordinator.start()
    assert isinstance(first, Grant)
    assert first.member == "a"
    assert [s.time_ns for s in first.steps] == [0, 5]
    results = tuple(sessions["a"].advance(s) for s in first.steps)
    (second,) = coordinator.handle(Stepped("a", results))
    assert isinstance(second, Grant)
    assert second.member == "b"
    assert [s.time_ns for s in second.steps] == [0, 1, 2, 3, 4, 5]
    assert [sorted(s.inputs) for s in second.steps] == [["u"], [], [], [], [], ["u"]]


def two_in_a_loop(gain_a: float, gain_b: float) -> tuple[dict[str, Habit], Wiring]:
    policy = TimePolicy(period_ns=5, can_redo=True)
    gains = {"a": gain_a, "b": gain_b}
    habits = {name: Habit(policy, ("u",), 1, False, gain) for name, gain in gains.items()}
    descriptions = {n: s.description for n, s in open_sessions(habits).items()}
    return habits, wire(descriptions, [Coupling("a", "x", "b", "u"), Coupling("b", "x", "a", "u")])


def test_a_loop_without_delay_is_iterated_to_its_fixed_point() -> None:
    """x_a = g x_b + m_a and x_b = g x_a + m_b has the solution (m_a + g m_b) / (1 - g^2)."""
    habits, wiring = two_in_a_loop(0.5, 0.5)
    sessions = open_sessions(habits)
    _, entries = drive(Coordinator(wiring, 0), sessions)
    last = {e.owner: e.value[0] for e in entries if isinstance(e, Record)}
    memory = {n: 0.5 * seed + 0.1 for n, seed in (("a", 0.0), ("b", 1.0))}
    expected = (memory["a"] + 0.5 * memory["b"]) / (1 - 0.25)
    assert last["a"] == pytest.approx(expected, abs=1e-8)


def test_a_loop_that_does_not_settle_is_an_error_that_names_it() -> None:
    habits, wiring = two_in_a_loop(1.5, 1.5)
    with pytest.raises(TwinError) as caught:
        drive(Coordinator(wiring, 0, loop=LoopPolicy(limit=20)), open_sessions(habits))
    assert caught.value.reason is Reason.LOOP_NOT_CONVERGED
    assert "a -> b -> a" in caught.value.message


def test_relaxation_settles_what_plain_iteration_does_not() -> None:
    habits, wiring = two_in_a_loop(1.5, -1.5)
    with pytest.raises(TwinError):
        drive(Coordinator(wiring, 0), open_sessions(habits))
    drive(Coordinator(wiring, 0, loop=LoopPolicy(relaxation=0.3, limit=200)), open_sessions(habits))


def simple(
    unit_out: str = "m", unit_in: str = "m", redo: bool = False, ids: str = "ab"
) -> dict[str, Description]:
    def one(causality: Causality, unit: str, name: str, kind_ids: str) -> Description:
        return Description(
            "simple",
            "1",
            "test",
            tuple(Entity(i, "cell") for i in kind_ids),
            (
                Variable(name, "cell", unit, causality),
                Variable("y", "cell", "m", Causality.OUTPUT),
                Variable("w", "cell", "m", Causality.INPUT),
            ),
            TimePolicy(period_ns=5, can_redo=redo),
        )

    return {
        "a": one(Causality.OUTPUT, unit_out, "x", "ab"),
        "b": one(Causality.INPUT, unit_in, "u", ids),
    }


@pytest.mark.parametrize(
    ("descriptions", "couplings", "reason", "said"),
    [
        (simple(unit_out="furlongz"), [("a", "x", "b", "u")], Reason.UNKNOWN_UNIT, "furlongz"),
        (simple(unit_out="kW"), [("a", "x", "b", "u")], Reason.INCOMPATIBLE_UNITS, "kW"),
        (simple(), [("a", "xx", "b", "u")], Reason.UNKNOWN_VARIABLE, "did you mean 'x'"),
        (simple(), [("a", "x", "c", "u")], Reason.UNKNOWN_MEMBER, "'c'"),
        (simple(ids="abz"), [("a", "x", "b", "u")], Reason.UNKNOWN_ENTITY, "'z'"),
        (simple(), [("a", "x", "b", "u")] * 2, Reason.AMBIGUOUS_INPUT, "2 sources"),
        (
            simple(),
            [("a", "x", "b", "u"), ("b", "y", "a", "w")],
            Reason.LOOP_WITHOUT_DELAY,
            "a -> b -> a",
        ),
    ],
)
def test_a_wrong_coupling_is_refused_before_anything_starts(
    descriptions: dict[str, Description],
    couplings: list[tuple[str, str, str, str]],
    reason: Reason,
    said: str,
) -> None:
    with pytest.raises(ScenarioError) as caught:
        wire(descriptions, [Coupling(*c) for c in couplings])
    assert caught.value.reason is reason
    assert said in caught.value.message


def test_units_are_converted_on_the_way() -> None:
    assert conversion("km", "m") == (1000.0, 0.0)
    factor, offset = conversion("degC", "kelvin")
    assert 20.0 * factor + offset == pytest.approx(293.15)


def test_an_action_outside_the_envelope_is_recorded_and_goes_nowhere() -> None:
    """The toy asks for 0, 0.5, 1.0 and 1.5 in turn; its actuator ends at 1."""
    policy = TimePolicy(period_ns=1)
    habits = {
        "a": Habit(policy, (), 1, False, 0.4),
        "b": Habit(policy, (), 1, False, 0.4, acts_on=("a",)),
    }
    descriptions = {n: s.description for n, s in open_sessions(habits).items()}
    wiring = wire(descriptions, [], [Actuation("b", "a", 1)])
    _, entries = drive(Coordinator(wiring, 30), open_sessions(habits))
    actions = [e for e in entries if isinstance(e, ActionRecord)]
    refused = [e for e in actions if e.refusal]
    assert refused
    assert all(e.action.value > 1.0 for e in refused)
    assert any(not e.refusal for e in actions)


def test_a_whole_initial_value_does_not_cut_the_values_that_follow() -> None:
    """An initial value written as 1 is a float like all values: 0.5 must arrive as 0.5."""
    habits = {
        "a": Habit(TimePolicy(period_ns=5), (), 1, False, 0.4),
        "b": Habit(TimePolicy(period_ns=5), ("u",), 1, False, 0.4),
    }
    sessions = open_sessions(habits)
    described = {n: s.description for n, s in sessions.items()}
    whole = replace(described["b"].variables[0], initial=1)
    described["b"] = replace(described["b"], variables=(whole, described["b"].variables[1]))
    coordinator = Coordinator(wire(described, [Coupling("a", "x", "b", "u")]), 5)
    drive(coordinator, sessions)
    assert sessions["b"].values["u"][0] == pytest.approx(0.25)
