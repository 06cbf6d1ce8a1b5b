"""The coordinator against the plain reference, over random graphs, steps and message orders."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from federation.core.coordinator import Coordinator, LoopPolicy
from federation.core.coupling import (
    Actuation,
    Arrival,
    Combine,
    Coupling,
    Wiring,
    conversion,
    wire,
)
from federation.core.ledger import ActionRecord, Entry, EventRecord, Record
from federation.core.messages import (
    Accepted,
    Effect,
    Finished,
    Grant,
    Joined,
    Left,
    Ordered,
    Refused,
    Request,
    Stepped,
)
from federation.core.schedule import COMMIT_EVERY, Schedule
from federation.errors import Reason, ScenarioError, TwinError
from federation.twin import (
    Action,
    Causality,
    Description,
    Entity,
    Session,
    Step,
    StepInput,
    StepResult,
    TimePolicy,
    Twin,
    Variable,
    failed,
)
from federation.wire import codec
from tests.reference import Reference
from tests.worlds import Habit, Toy, drive, open_late, open_sessions, shuffled

HORIZON_NS = 40

IN_FLIGHT = st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=4)
"""How many grants may be out at a time, which changes with every answer, in turn."""


def limited(
    coordinator: Coordinator, limits: Sequence[int | None], choose: Callable[[int], int]
) -> Callable[[int], int]:
    """Choose as `choose` does, under a limit that changes."""
    turn = itertools.cycle(limits)

    def chosen(count: int) -> int:
        coordinator.in_flight = next(turn)
        return choose(count)

    return chosen


def _links(draw: st.DrawFn, size: int) -> tuple[tuple[str, str, float], ...] | None:
    """No map, or a random one: some rows unfed, some columns unread, some turned around."""
    if draw(st.booleans()):
        return None
    pairs = draw(st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))))
    return tuple((f"e{a}", f"e{b}", draw(st.sampled_from([1.0, 0.5, -1.0]))) for a, b in pairs)


@dataclass(frozen=True)
class World:
    """Toys with all that couples them; some are there from the start, others join in groups."""

    habits: Mapping[str, Habit]
    groups: tuple[tuple[str, ...], ...]
    couplings: tuple[Coupling, ...]
    actuations: tuple[Actuation, ...]

    def only(self, group: int) -> dict[str, Habit]:
        return {name: self.habits[name] for name in self.groups[group]}

    def ties(self, group: int) -> tuple[tuple[Coupling, ...], tuple[Actuation, ...]]:
        """What couples a group to itself and to those before it."""
        turn = {name: index for index, names in enumerate(self.groups) for name in names}
        return (
            tuple(c for c in self.couplings if max(turn[c.source], turn[c.target]) == group),
            tuple(a for a in self.actuations if max(turn[a.source], turn[a.target]) == group),
        )


@st.composite
def toys(draw: st.DrawFn, is_steady: bool = False, most_late: int = 0) -> World:
    """Up to six toys and some late ones, wired at random; loops without delay only among toys
    that can redo.

    In a steady world none wakes on input.
    """
    count: int = draw(st.integers(1, 6))
    groups = [tuple(f"t{i}" for i in range(count))]
    while most_late and draw(st.booleans()):
        some = draw(st.integers(1, min(2, most_late)))
        groups.append(tuple(f"s{9 - most_late + i}" for i in range(some)))
        most_late -= some
    names = [name for group in groups for name in group]
    turn = {name: index for index, group in enumerate(groups) for name in group}
    size: int = draw(st.integers(1, 3))
    has_loops: bool = not is_steady and draw(st.booleans())
    combines = [Combine.MEAN] if has_loops else [Combine.MEAN, Combine.SUM, Combine.MAX]
    rule: dict[str, Combine] = {}
    is_in_step: bool = draw(st.booleans())
    couplings: list[Coupling] = []
    inputs: dict[str, list[str]] = {name: [] for name in names}
    for index in range(draw(st.integers(0, 10 + 2 * (len(names) - count)))):
        source, target = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        is_forward = names.index(source) < names.index(target)
        may_loop = has_loops and source != target and turn[source] == turn[target]
        delay_ns = draw(st.integers(0 if is_forward or may_loop else 1, 6))
        shared = bool(inputs[target]) and draw(st.booleans())
        name = inputs[target][0] if shared else f"u{index}"
        if not shared:
            inputs[target].append(name)
        combine = rule.setdefault(name, draw(st.sampled_from(combines)))
        links = None if has_loops else _links(draw, size)
        couplings.append(Coupling(source, "x", target, name, delay_ns, links, combine))
    actuations = []
    acts: dict[str, tuple[str, ...]] = {}
    for source in names[:0:-1][: draw(st.integers(0, 2))]:
        actuations.append(Actuation(source, names[0], draw(st.integers(1, 5))))
        acts[source] = (names[0],)
    habits: dict[str, Habit] = {}
    for name in names:
        is_periodic = draw(st.booleans())
        is_as_first = is_in_step and habits
        policy = TimePolicy(
            period_ns=draw(st.integers(1, 7)) if is_periodic else 0,
            offset_ns=draw(st.integers(0, 3)),
            wakes_on_input=not is_steady and draw(st.booleans()),
            can_redo=has_loops,
        )
        if is_steady and is_as_first:
            policy = habits[names[0]].policy
        habits[name] = Habit(
            policy,
            tuple(inputs[name]),
            size,
            is_coarse=not has_loops and draw(st.booleans()),
            gain=0.4,
            acts_on=acts.get(name, ()),
            jumps=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))),
            event_every=draw(st.sampled_from([1, 3, 1000])),
        )
    return World(habits, tuple(groups), tuple(couplings), tuple(actuations))


def described(habits: Mapping[str, Habit]) -> dict[str, Description]:
    return {name: Session(Toy(habit), name).description for name, habit in habits.items()}


@st.composite
def worlds(draw: st.DrawFn, is_steady: bool = False) -> tuple[dict[str, Habit], Wiring]:
    """A world in which all are there from the start."""
    world = draw(toys(is_steady))
    habits = world.only(0)
    return habits, wire(described(habits), world.couplings, world.actuations)


@st.composite
def changing_worlds(draw: st.DrawFn) -> tuple[World, dict[int, Request]]:
    """A world with what is asked for after so many answers: joins, leaves, orders."""
    world = draw(toys(most_late=3))
    at = st.none() | st.integers(0, HORIZON_NS)
    asked: list[Request] = []
    for group in range(1, len(world.groups)):
        couplings, actuations = world.ties(group)
        joining = described(world.only(group))
        asked.append(Joined(joining, couplings, actuations, draw(at)))
    for _ in range(draw(st.integers(0, 4))):
        member = draw(st.sampled_from(list(world.habits)))
        if draw(st.booleans()):
            asked.append(Left(member, draw(at)))
        else:
            action = Action(member, "kick", "e0", draw(st.sampled_from([0.25, -0.5])))
            asked.append(Ordered("Ann", action, draw(at)))
    moments = draw(
        st.lists(st.integers(1, 60), min_size=len(asked), max_size=len(asked), unique=True)
    )
    return world, dict(zip(moments, asked, strict=True))


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


@pytest.mark.property
@given(worlds(), st.integers(0, 2**16), st.integers(1, 9), IN_FLIGHT)
def test_any_message_order_gives_the_ledger_of_the_sequential_reference(
    world: tuple[dict[str, Habit], Wiring],
    order: int,
    frame_steps: int,
    in_flight: list[int | None],
) -> None:
    habits, wiring = world
    expected = Reference(wiring, open_sessions(habits), HORIZON_NS)
    digest = expected.run()
    coordinator = Coordinator(wiring, HORIZON_NS, frame_steps=frame_steps)
    choose = limited(coordinator, in_flight, shuffled(order))
    found, entries = drive(coordinator, open_sessions(habits), choose)
    assert [_line(e) for e in entries] == [_line(e) for e in expected.entries]
    assert found == digest


def test_a_member_that_a_loop_wakes_joins_its_first_pass() -> None:
    """The third is not due; in the first pass the first wakes it, before the first is redone."""
    asks_no_more = TimePolicy(can_redo=True)
    woken = TimePolicy(offset_ns=1, wakes_on_input=True, can_redo=True)
    habits = {
        "t0": Habit(asks_no_more, ("u0", "u1"), 1, False, 0.4, jumps=(0,), event_every=1),
        "t1": Habit(asks_no_more, ("u0",), 1, False, 0.4, jumps=(0,), event_every=1),
        "t2": Habit(woken, ("u0",), 1, False, 0.4, jumps=(0,), event_every=1),
    }
    ties = (("t0", "t1", "u0"), ("t1", "t0", "u0"), ("t0", "t2", "u0"), ("t2", "t0", "u1"))
    couplings = [Coupling(source, "x", target, input_) for source, target, input_ in ties]
    wiring = wire(described(habits), couplings)
    expected = Reference(wiring, open_sessions(habits), HORIZON_NS)
    expected.run()
    coordinator = Coordinator(wiring, HORIZON_NS)
    _, entries = drive(coordinator, open_sessions(habits), shuffled(1))
    assert [_line(e) for e in entries] == [_line(e) for e in expected.entries]
    assert [e.owner for e in entries[:3]] == ["t0", "t1", "t2"]


@dataclass
class Story:
    """What became of a world in which some come and go: who joined, left and ordered what, when,
    as the coordinator granted it."""

    world: World
    sessions: dict[str, Session] = field(default_factory=dict)
    joined: list[tuple[Joined, int]] = field(default_factory=list)
    leaves: dict[str, int] = field(default_factory=dict)
    orders: list[tuple[str, Action, int, str]] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)

    def hear(self, request: Request, verdict: Accepted | Refused) -> None:
        if isinstance(verdict, Refused):
            self.refusals.append(verdict)
            return
        match request:
            case Joined():
                self.joined.append((request, verdict.time_ns))
                self.sessions.update(self.arrived(request, verdict.time_ns))
            case Left():
                self.leaves[request.member] = verdict.time_ns
            case Ordered():
                told = (request.operator, request.action, verdict.time_ns, verdict.event)
                self.orders.append(told)

    def arrived(self, request: Joined, time_ns: int) -> dict[str, Session]:
        late = {name: self.world.habits[name] for name in request.descriptions}
        return open_late(late, time_ns)

    def run(
        self,
        said: Mapping[int, Request],
        choose: Callable[[int], int],
        frame_steps: int,
        in_flight: Sequence[int | None],
    ) -> tuple[str, list[Entry]]:
        wiring = wire(described(self.world.only(0)), *self.world.ties(0))
        self.sessions = open_sessions(self.world.only(0))
        coordinator = Coordinator(wiring, HORIZON_NS, frame_steps=frame_steps)
        choose = limited(coordinator, in_flight, choose)
        return drive(coordinator, self.sessions, choose, said, self.hear)

    def cut(self, until_ns: int) -> Story:
        """The same without what takes effect later."""
        return Story(
            self.world,
            joined=[(request, t) for request, t in self.joined if t <= until_ns],
            leaves={member: t for member, t in self.leaves.items() if t <= until_ns},
            orders=[order for order in self.orders if order[2] <= until_ns],
        )

    def reference(self) -> Reference:
        """The same, known from the start."""
        couplings, actuations = self.world.ties(0)
        described_ = described(self.world.only(0))
        sessions = open_sessions(self.world.only(0))
        arrivals = []
        for request, time_ns in self.joined:
            described_ |= request.descriptions
            couplings += request.couplings
            actuations += request.actuations
            arrivals.append(Arrival(tuple(request.descriptions), time_ns))
            sessions |= self.arrived(request, time_ns)
        wiring = wire(described_, couplings, actuations, arrivals)
        return Reference(wiring, sessions, HORIZON_NS, leaves=self.leaves, orders=self.orders)


@pytest.mark.property
@given(changing_worlds(), st.integers(0, 2**16), st.integers(1, 9), IN_FLIGHT)
def test_members_that_come_and_go_leave_the_ledger_of_a_run_that_knew_it_from_the_start(
    changing: tuple[World, dict[int, Request]],
    order: int,
    frame_steps: int,
    in_flight: list[int | None],
) -> None:
    world, said = changing
    story = Story(world)
    digest, entries = story.run(said, shuffled(order), frame_steps, in_flight)
    expected = story.reference()
    expected_digest = expected.run()
    assert [_line(e) for e in entries] == [_line(e) for e in expected.entries]
    assert digest == expected_digest
    for kind, count in (("join", len(story.joined)), ("leave", len(story.leaves))):
        event(f"{kind}s: {count}")


class Recording(Session):
    """A session that keeps what it answered, and first answers what is on record of it."""

    def __init__(self, session: Session, past: Iterable[StepResult] = ()) -> None:
        self.session = session
        self.past = deque(past)
        self.answers: list[StepResult] = []

    def advance(self, given: StepInput) -> StepResult:
        result = self.session.advance(given)
        if self.past:
            known = self.past.popleft()
            assert (known.time_ns, known.micro) == (given.time_ns, given.micro)
            assert codec.encode_results([known]) == codec.encode_results([result])
        self.answers.append(result)
        return result


@pytest.mark.property
@given(changing_worlds(), st.integers(0, 2**16), st.integers(1, 9), st.integers(-1, HORIZON_NS + 1))
def test_a_cut_holds_nothing_from_later_and_a_run_goes_on_from_it(
    changing: tuple[World, dict[int, Request]], order: int, frame_steps: int, cut_ns: int
) -> None:
    """What members answered up to the cut is what they answer in a run that never hears of what
    came later, whenever it was asked for; and from there that run goes on to its own end.

    LEVEL45 5.
    """
    world, said = changing

    class Recorded(Story):
        def arrived(self, request: Joined, time_ns: int) -> dict[str, Session]:
            return recorded(super().arrived(request, time_ns))

    pasts: dict[str, list[StepResult]] = {}

    def recorded(sessions: Mapping[str, Session]) -> dict[str, Session]:
        return {name: Recording(s, pasts.get(name, ())) for name, s in sessions.items()}

    story = Recorded(world)
    story.sessions = recorded(open_sessions(world.only(0)))
    wiring = wire(described(world.only(0)), *world.ties(0))
    coordinator = Coordinator(wiring, HORIZON_NS, frame_steps=frame_steps)
    _, entries = drive(coordinator, story.sessions, shuffled(order), said, story.hear)

    for name, session in story.sessions.items():
        assert isinstance(session, Recording)
        pasts[name] = [result for result in session.answers if result.time_ns <= cut_ns]
    left = story.cut(cut_ns)
    sessions = recorded(open_sessions(world.only(0)))
    known: list[Request] = []
    for request, time_ns in left.joined:
        sessions |= story.arrived(request, time_ns)
        known.append(replace(request, time_ns=time_ns))
    for operator, action, time_ns, event_id in left.orders:
        known.append(Ordered(operator, action, time_ns, int(event_id.rpartition("/")[2])))
    known += [Left(member, time_ns) for member, time_ns in left.leaves.items()]
    again = Coordinator(wiring, HORIZON_NS)
    digest, resumed = drive(again, sessions, shuffled(order + 1), known=known)

    expected = left.reference()
    assert digest == expected.run()
    past = [_line(e) for e in entries if e.time_ns <= cut_ns]
    assert [_line(e) for e in resumed if e.time_ns <= cut_ns] == past
    assert all(not s.past for s in sessions.values() if isinstance(s, Recording))


def walk(
    wiring: Wiring, sessions: Mapping[str, Session], horizon_ns: int
) -> tuple[str, list[Entry]]:
    """Run a schedule on clocks of its own; the digest and all entries."""
    ticks = itertools.count()
    entries: list[Entry] = []
    settled: list[int] = []

    def commit(some: list[Entry], before_ns: int) -> None:
        assert all(entry.time_ns < before_ns for entry in some)
        assert all(entry.time_ns >= settled[-1] for entry in some if settled)
        entries.extend(some)
        settled.append(before_ns)

    schedule = Schedule(
        wiring,
        sessions,
        horizon_ns,
        wall=lambda: next(ticks) * 1e-6,
        cpu=lambda: next(ticks) * 1e-6,
    )
    digest = schedule.run(commit)
    assert settled[-1] == horizon_ns + 1
    assert schedule.ledger.size == len(entries)
    return digest, entries


@pytest.mark.property
@given(worlds(is_steady=True), st.integers(0, 2**16), st.integers(1, 9))
def test_the_schedule_the_coordinator_and_the_reference_keep_one_ledger(
    world: tuple[dict[str, Habit], Wiring], order: int, frame_steps: int
) -> None:
    habits, wiring = world
    assert Schedule.suits(wiring)
    expected = Reference(wiring, open_sessions(habits), HORIZON_NS)
    digest = expected.run()
    walked, entries = walk(wiring, open_sessions(habits), HORIZON_NS)
    assert [_line(e) for e in entries] == [_line(e) for e in expected.entries]
    assert walked == digest
    coordinator = Coordinator(wiring, HORIZON_NS, frame_steps=frame_steps)
    found, granted = drive(coordinator, open_sessions(habits), shuffled(order))
    assert found == digest
    # how an event reached its member is no part of the digest
    assert [e for e in granted if isinstance(e, EventRecord)] == [
        e for e in entries if isinstance(e, EventRecord)
    ]


@pytest.mark.property
@given(worlds())
def test_a_schedule_is_made_only_where_nobody_is_woken(
    world: tuple[dict[str, Habit], Wiring],
) -> None:
    habits, wiring = world
    policies = [habit.policy for habit in habits.values()]
    has_loop = any(unit.is_loop for unit in wiring.units)
    is_woken = has_loop or any(policy.wakes_on_input for policy in policies)
    assert Schedule.suits(wiring) != is_woken


@pytest.mark.property
@given(worlds(), st.integers(0, 2**16))
def test_every_entry_is_committed_once_and_in_order(
    world: tuple[dict[str, Habit], Wiring], order: int
) -> None:
    habits, wiring = world
    _, entries = drive(Coordinator(wiring, HORIZON_NS), open_sessions(habits), shuffled(order))
    leads = wiring.leads()
    keys = [(e.time_ns, leads.get(e.rank, e.rank), *e.sort_key()) for e in entries]
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
    # in a loop, what happened stands at its last iteration, and may have been heard before
    places: dict[str, tuple[int, int]] = {}
    stories = [entry for entry in entries if isinstance(entry, EventRecord)]
    for entry in stories:
        places[entry.event.id] = (entry.time_ns, entry.rank)
    for entry in stories:
        for cause, _ in entry.via:
            assert places[cause] < (entry.time_ns, entry.rank)


def chain(period_a: int, period_b: int, delay_ns: int) -> tuple[dict[str, Habit], Wiring]:
    habits = {
        "a": Habit(TimePolicy(period_ns=period_a), (), 1, False, 0.4),
        "b": Habit(TimePolicy(period_ns=period_b), ("u",), 1, False, 0.4),
    }
    return habits, wire(described(habits), [Coupling("a", "x", "b", "u", delay_ns)])


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


def answer(
    coordinator: Coordinator, sessions: Mapping[str, Session], grant: Effect
) -> list[Effect]:
    """What follows when a member does what it was granted."""
    assert isinstance(grant, Grant), grant
    results = tuple(sessions[grant.member].advance(step) for step in grant.steps)
    return list(coordinator.handle(Stepped(grant.member, results)))


def test_who_joins_waits_for_what_its_sources_have_in_hand() -> None:
    """What a does at 0 is visible to b at 1, when it joins, and not at 5 as the delay says."""
    habits = {"a": Habit(TimePolicy(), (), 1, False, 0.4, jumps=(0,))}
    late = {"b": Habit(TimePolicy(period_ns=4), ("u",), 1, False, 0.4)}
    sessions = open_sessions(habits)
    coordinator = Coordinator(wire(described(habits), []), 9)
    (grant,) = coordinator.start()
    (verdict,) = coordinator.handle(Joined(described(late), (Coupling("a", "x", "b", "u", 5),)))
    assert isinstance(verdict, Accepted)
    assert verdict.time_ns == 1
    (first, *_) = answer(coordinator, sessions, grant)
    assert isinstance(first, Grant)
    assert [(s.time_ns, sorted(s.inputs)) for s in first.steps] == [(1, ["u"]), (5, []), (9, [])]


def test_who_is_asked_to_join_later_does_not_join_before() -> None:
    """A cut between the two would else lack the one and change the rank of the other."""
    habits = {"a": Habit(TimePolicy(period_ns=5), (), 1, False, 0.4)}
    one, other, third = (described({name: habits["a"]}) for name in ("b", "c", "d"))
    coordinator = Coordinator(wire(described(habits), []), 40)
    coordinator.start()
    (first, *_) = coordinator.handle(Joined(one, time_ns=20))
    (early,) = coordinator.handle(Joined(other, time_ns=10))
    (soon, *_) = coordinator.handle(Joined(third))
    assert isinstance(first, Accepted)
    assert isinstance(early, Refused)
    assert isinstance(soon, Accepted)
    assert (early.reason, early.metadata) == (Reason.INSTANT_PASSED, {"earliest_ns": "20"})
    assert (first.time_ns, soon.time_ns) == (20, 20)


def test_an_operator_is_heard_before_members_whose_word_comes_at_the_same_instant() -> None:
    """b acts at 0, and Ann orders at 2 for the same instant, after that was known."""
    habits = {
        "a": Habit(TimePolicy(period_ns=2), (), 1, False, 0.4),
        "b": Habit(TimePolicy(), (), 1, False, 0.4, acts_on=("a",), jumps=(0,), event_every=1),
    }
    sessions = open_sessions(habits)
    wiring = wire(described(habits), [], [Actuation("b", "a", 2)])
    coordinator = Coordinator(wiring, 2, frame_steps=1)
    grants = {g.member: g for g in coordinator.start() if isinstance(g, Grant)}
    assert answer(coordinator, sessions, grants["b"]) == []
    order = Ordered("Ann", Action("a", "kick", "e0", 0.25), 2)
    assert isinstance(coordinator.handle(order)[0], Accepted)
    (second, *_) = answer(coordinator, sessions, grants["a"])
    assert isinstance(second, Grant)
    assert [a.cause for a in second.steps[0].actions] == ["operator/1", "b/1"]


def test_an_order_that_wakes_a_member_comes_after_what_that_would_reach() -> None:
    """w sleeps, and x, which hears it at once, was granted its steps up to 4: an order to w for
    0, though w and the run are there, would change what x has done."""
    habits = {
        "w": Habit(TimePolicy(wakes_on_input=True), (), 1, False, 0.4, jumps=(0,)),
        "x": Habit(TimePolicy(period_ns=1), ("u",), 1, False, 0.4),
        "z": Habit(TimePolicy(period_ns=9), (), 1, False, 0.4),
    }
    sessions = open_sessions(habits)
    wiring = wire(described(habits), [Coupling("w", "x", "x", "u")])
    coordinator = Coordinator(wiring, 40, frame_steps=5)
    grants = {g.member: g for g in coordinator.start() if isinstance(g, Grant)}
    (ahead, *_) = answer(coordinator, sessions, grants["w"])
    assert isinstance(ahead, Grant)
    assert (ahead.member, ahead.steps[-1].time_ns, coordinator.now_ns) == ("x", 4, 0)
    (verdict, *_) = coordinator.handle(Ordered("Ann", Action("w", "kick", "e0", 0.25)))
    assert isinstance(verdict, Accepted)
    assert verdict.time_ns == 5


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


def test_what_a_loop_causes_stands_after_the_loop() -> None:
    """Its last micro-step comes before the only step of whoever it feeds in the same instant."""
    redo = TimePolicy(can_redo=True)
    habits = {
        "a": Habit(redo, ("u",), 1, False, 0.4, jumps=(0,), event_every=1),
        "b": Habit(redo, ("u",), 1, False, 0.4, jumps=(0,), event_every=1),
        "c": Habit(redo, ("u",), 1, False, 0.4, jumps=(0,), event_every=1),
    }
    described = {name: session.description for name, session in open_sessions(habits).items()}
    couplings = [("a", "b"), ("b", "a"), ("a", "c")]
    wiring = wire(described, [Coupling(a, "x", b, "u") for a, b in couplings])
    _, entries = drive(Coordinator(wiring, 0), open_sessions(habits))
    *loop, last = [entry for entry in entries if isinstance(entry, EventRecord)]
    assert {event.owner for event in loop} == {"a", "b"}
    assert last.owner == "c"
    assert all(event.micro > last.micro for event in loop)
    (cause,) = last.event.causes
    assert cause in {event.event.id for event in loop}


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
    assert sessions["b"].values["u"][0] == pytest.approx(0.26)


class Says(Twin):
    """A twin that publishes a given list, a value a step, and then its last value for ever."""

    def __init__(self, values: list[object], has_input: bool = False) -> None:
        self.values = list(values)
        self.has_input = has_input
        self.seen: list[float] = []
        self.changed: list[bool] = []

    def describe(self) -> Description:
        inputs = (Variable("u", "cell", "m", Causality.INPUT),) if self.has_input else ()
        return Description(
            "says",
            "1",
            "test",
            (Entity("e0", "cell"),),
            (*inputs, Variable("x", "cell", "m", Causality.OUTPUT)),
            TimePolicy(period_ns=1),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        return None

    def advance(self, step: Step) -> None:
        if self.has_input:
            self.seen.append(float(step["u"][0]))
            self.changed.append("u" in step.changed)
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        if isinstance(value, Exception):
            raise value
        assert isinstance(value, float)
        step.publish("x", [value])


def said(
    values: list[object], delay_ns: int, horizon_ns: int, how: str
) -> tuple[Says, list[Entry], str]:
    """What `b` heard of `a`, in the schedule or under the coordinator."""
    hears = Says([0.0], has_input=True)
    sessions = {"a": Session(Says(values), "a"), "b": Session(hears, "b")}
    described = {name: session.description for name, session in sessions.items()}
    wiring = wire(described, [Coupling("a", "x", "b", "u", delay_ns)])
    digest, entries = RUNS[how](wiring, sessions, horizon_ns)
    return hears, entries, digest


@pytest.mark.parametrize("how", ["schedule", "coordinator"])
@pytest.mark.parametrize("delay_ns", [0, 1, 3])
def test_a_change_of_sign_at_zero_is_no_change(how: str, delay_ns: int) -> None:
    hears, entries, digest = said([1.0, -0.0, 0.0, -0.0, 2.0, 0.0], delay_ns, 9, how)
    values = [e.value[0] for e in entries if isinstance(e, Record) and e.owner == "a"]
    assert values == [1.0, 0.0, 2.0, 0.0]
    assert [math.copysign(1.0, v) for v in values] == [1.0] * 4
    assert all(math.copysign(1.0, v) == 1.0 for v in hears.seen)
    heard = [0.0] * delay_ns + [1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert hears.seen == heard[:10]
    assert hears.changed == [a != b for a, b in itertools.pairwise([0.0, *hears.seen])]
    assert digest == said([1.0, 0.0, 0.0, 0.0, 2.0, -0.0], delay_ns, 9, how)[2]


@pytest.mark.parametrize("how", ["schedule", "coordinator"])
def test_numbers_whose_squares_overflow_are_numbers(how: str) -> None:
    hears, _, _ = said([1e200, -1.7e308], 1, 3, how)
    assert hears.seen == [0.0, 1e200, -1.7e308, -1.7e308]


@pytest.mark.parametrize("how", ["schedule", "coordinator"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_before_anybody_sees_it(how: str, bad: float) -> None:
    with pytest.raises(TwinError) as caught:
        said([1.0, bad], 0, 5, how)
    assert caught.value.reason is Reason.NOT_FINITE
    assert "a.x[0]" in caught.value.message
    assert "at 1 ns" in caught.value.message


def test_of_two_errors_in_one_stage_the_first_in_rank_counts() -> None:
    sessions = {
        "a": Session(Says([1.0, math.nan]), "a"),
        "b": Session(Says([1.0, RuntimeError("no water")]), "b"),
    }
    wiring = wire({name: s.description for name, s in sessions.items()}, [])
    with pytest.raises(TwinError) as caught:
        walk(wiring, sessions, 5)
    assert caught.value.reason is Reason.NOT_FINITE
    sessions = {"b": Session(Says([1.0, RuntimeError("no water")]), "b")}
    wiring = wire({name: s.description for name, s in sessions.items()}, [])
    with pytest.raises(TwinError, match="b failed: RuntimeError: no water"):
        walk(wiring, sessions, 5)


@pytest.mark.parametrize("how", ["schedule", "coordinator"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [([1.0, 2.0], Reason.WRONG_SHAPE), ([[1.0]], Reason.WRONG_SHAPE), ("wet", Reason.TWIN_FAILED)],
)
def test_an_output_of_another_form_is_refused(how: str, value: object, reason: Reason) -> None:
    class Wrong(Says):
        def advance(self, step: Step) -> None:
            step.publish("x", value)  # type: ignore[arg-type]

    sessions: dict[str, Session] = {"a": Session(Wrong([0.0]), "a")}
    wiring = wire({"a": sessions["a"].description}, [])
    with pytest.raises(TwinError) as caught:
        RUNS[how](wiring, sessions, 1)
    assert caught.value.reason is reason


def _drive_blaming(
    wiring: Wiring, sessions: Mapping[str, Session], horizon_ns: int
) -> tuple[str, list[Entry]]:
    try:
        return drive(Coordinator(wiring, horizon_ns), sessions)
    except ValueError as error:  # the shell of a run turns it into an error of the twin
        raise failed("a", error) from error


RUNS = {"schedule": walk, "coordinator": _drive_blaming}


def test_what_a_twin_keeps_of_its_array_is_its_own() -> None:
    """A twin may go on writing into what it has published; nobody else notices."""

    class Reuses(Says):
        def advance(self, step: Step) -> None:
            self.buffer += 1.0
            step.publish("x", self.buffer)
            self.buffer *= 2.0

        buffer = np.zeros(1)

    hears = Says([0.0], has_input=True)
    sessions = {"a": Session(Reuses([0.0]), "a"), "b": Session(hears, "b")}
    described = {name: session.description for name, session in sessions.items()}
    walk(wire(described, [Coupling("a", "x", "b", "u", 1)]), sessions, 3)
    assert hears.seen == [0.0, 1.0, 3.0, 7.0]
    given = sessions["b"].values["u"]
    with pytest.raises(ValueError, match="read-only"):
        given[0] = 5.0


def test_a_schedule_hands_out_the_ledger_as_it_goes() -> None:
    sessions = {"a": Session(Says([float(i) for i in range(5000)]), "a")}
    wiring = wire({"a": sessions["a"].description}, [])
    heard: list[tuple[int, int]] = []
    schedule = Schedule(wiring, sessions, 4999, wall=lambda: 0.0, cpu=lambda: 0.0)
    schedule.run(lambda entries, before_ns: heard.append((len(entries), before_ns)))
    assert sum(count for count, _ in heard) == 5000
    assert max(count for count, _ in heard) <= COMMIT_EVERY
    assert [before_ns for _, before_ns in heard] == sorted(before_ns for _, before_ns in heard)


def test_the_time_of_slow_and_quick_members_is_told_apart() -> None:
    """On a clock that only twins move: one takes 1 ms a step, half of it waiting, one 1 us."""
    now = {"wall": 0.0, "cpu": 0.0}

    class Works(Says):
        wall_s = cpu_s = 0.0

        def advance(self, step: Step) -> None:
            now["wall"] += self.wall_s
            now["cpu"] += self.cpu_s
            super().advance(step)

    slow, quick = Works([0.0]), Works([0.0])
    slow.wall_s, slow.cpu_s = 1e-3, 5e-4
    quick.wall_s = quick.cpu_s = 1e-6
    sessions = {"slow": Session(slow, "slow"), "quick": Session(quick, "quick")}
    wiring = wire({name: s.description for name, s in sessions.items()}, [])
    schedule = Schedule(wiring, sessions, 99, wall=lambda: now["wall"], cpu=lambda: now["cpu"])
    schedule.run(lambda entries, before_ns: None)
    costs = schedule.costs()
    assert [steps for steps, _, _ in costs.values()] == [100, 100]
    assert costs["slow"][1:] == pytest.approx((0.1, 0.05))
    assert costs["quick"][1:] == pytest.approx((1e-4, 1e-4))


def test_an_answer_costs_the_neighbours_of_who_gave_it_not_all_members() -> None:
    """Sixty members in step, each with one that it may wake."""
    seen: list[int] = []

    class Counts(Coordinator):
        def _try(self, unit, effects):  # type: ignore[no-untyped-def]
            seen[-1] += 1
            return super()._try(unit, effects)

    count = 60
    habits = {f"p{i}": Habit(TimePolicy(period_ns=5), (), 1, True, 0.4) for i in range(count)}
    habits |= {
        f"w{i}": Habit(TimePolicy(wakes_on_input=True), ("u",), 1, True, 0.4, jumps=(0,))
        for i in range(count)
    }
    sessions = open_sessions(habits)
    described = {name: session.description for name, session in sessions.items()}
    couplings = [Coupling(f"p{i}", "x", f"w{i}", "u", 1) for i in range(count)]
    seen.append(0)
    coordinator = Counts(wire(described, couplings), 50)
    effects = list(coordinator.start())
    while not any(isinstance(effect, Finished) for effect in effects):
        effect = effects.pop(0)
        if isinstance(effect, Grant):
            seen.append(0)
            results = tuple(sessions[effect.member].advance(step) for step in effect.steps)
            effects.extend(coordinator.handle(Stepped(effect.member, results)))
    assert max(seen[1:]) <= 4


def test_minus_zero_from_a_member_that_is_a_service_is_zero() -> None:
    _, wiring = chain(5, 5, 0)
    coordinator = Coordinator(wiring, 0)
    (grant,) = coordinator.start()
    assert isinstance(grant, Grant)
    (given, *_) = coordinator.handle(
        Stepped("a", (StepResult(0, outputs={"x": np.array([-0.0])}),))
    )
    assert isinstance(given, Grant)
    assert math.copysign(1.0, given.steps[0].inputs["u"][0]) == 1.0
