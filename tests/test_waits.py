"""Who waits for whom, at every moment of a run and in the end: stories of small federations."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.core.coordinator import Coordinator
from federation.core.coupling import Actuation, Coupling, Wiring, wire
from federation.core.critical import CriticalPath, Frame, Hold, Longest, Share, critical_path, fold
from federation.core.messages import Finished, Grant, Stepped
from federation.core.waits import Doing, Wait, chain, instant
from federation.twin import HOUR_NS, MINUTE_NS, Session, TimePolicy
from tests.test_core import worlds
from tests.worlds import Habit, open_sessions, shuffled


class Federation:
    """A coordinator with its members, whose answers come when a test says so."""

    def __init__(
        self,
        habits: dict[str, Habit],
        wiring: Wiring,
        horizon_ns: int,
        in_flight: int | None = None,
    ) -> None:
        self.coordinator = Coordinator(wiring, horizon_ns, frame_steps=1)
        self.coordinator.in_flight = in_flight
        self.granted: dict[str, Grant] = {}
        self.is_over = False
        self._sessions: dict[str, Session] = open_sessions(habits)
        self._take(self.coordinator.start())

    def answers(self, member: str) -> None:
        grant = self.granted.pop(member)
        results = tuple(self._sessions[member].advance(step) for step in grant.steps)
        self._take(self.coordinator.handle(Stepped(member, results)))

    def says(self) -> str:
        return "\n".join(str(wait) for wait in self.coordinator.waits())

    def waits(self) -> dict[str, Wait]:
        return {wait.member: wait for wait in self.coordinator.waits()}

    def _take(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                self.granted[effect.member] = effect
            self.is_over |= isinstance(effect, Finished)


def federation(
    couplings: list[Coupling],
    actuations: tuple[Actuation, ...] = (),
    *,
    horizon_ns: int = 100,
    **policies: TimePolicy,
) -> Federation:
    inputs = {n: tuple(c.input for c in couplings if c.target == n) for n in policies}
    habits = {
        n: Habit(policy, inputs[n], 1, False, 0.4, jumps=(0,)) for n, policy in policies.items()
    }
    descriptions = {n: s.description for n, s in open_sessions(habits).items()}
    return Federation(habits, wire(descriptions, couplings, actuations), horizon_ns)


def lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_who_waits_says_for_whom_and_through_what_and_the_chain_ends_at_who_works() -> None:
    run = federation(
        [
            Coupling("rain", "x", "river", "u"),
            Coupling("river", "x", "town", "u", delay_ns=5),
            Coupling("town", "x", "rain", "u", delay_ns=30),
        ],
        rain=TimePolicy(period_ns=10),
        river=TimePolicy(period_ns=10),
        town=TimePolicy(period_ns=20),
    )
    assert run.says() == lines(
        """
        rain works on its step at 0 s
        river waits to step at 0 s for rain, at 0 s, through rain.x -> river.u
        town works on its step at 0 s
        """
    )
    run.answers("town")
    assert run.says() == lines(
        """
        rain works on its step at 0 s
        river waits to step at 0 s for rain, at 0 s, through rain.x -> river.u
        town waits to step at 20 ns for river, at 0 s, through river.x -> town.u
        """
    )
    assert [w.member for w in chain(run.waits(), "town")] == ["town", "river", "rain"]
    run.answers("rain")
    assert run.says() == lines(
        """
        rain works on its step at 10 ns
        river works on its step at 0 s
        town waits to step at 20 ns for river, at 0 s, through river.x -> town.u
        """
    )


def test_a_member_that_sleeps_says_who_may_wake_it() -> None:
    run = federation(
        [Coupling("clock", "x", "bell", "u", 3), Coupling("bell", "x", "ear", "u", 4)],
        clock=TimePolicy(period_ns=50),
        bell=TimePolicy(wakes_on_input=True),
        ear=TimePolicy(wakes_on_input=True, offset_ns=90),
    )
    run.answers("bell")
    run.answers("ear")
    assert run.says() == lines(
        """
        bell sleeps; clock may wake it from 3 ns on through clock.x -> bell.u
        clock works on its step at 0 s
        ear waits to step at 90 ns for bell, at 3 ns, through bell.x -> ear.u
        """
    )
    assert [w.member for w in chain(run.waits(), "ear")] == ["ear", "bell", "clock"]


def test_in_a_loop_without_delay_the_others_wait_for_the_one_that_iterates() -> None:
    again = TimePolicy(period_ns=10, can_redo=True)
    run = federation(
        [
            Coupling("supply", "x", "demand", "u"),
            Coupling("demand", "x", "supply", "u"),
            Coupling("demand", "x", "meter", "u"),
        ],
        supply=again,
        demand=TimePolicy(period_ns=20, can_redo=True),
        meter=TimePolicy(period_ns=10),
    )
    assert run.says() == lines(
        """
        demand works on its step at 0 s
        supply waits to step at 0 s for demand, at 0 s, through demand.x -> supply.u
        meter waits to step at 0 s for demand, at 0 s, through demand.x -> meter.u
        """
    )
    while "meter" not in run.granted:
        run.answers(next(iter(run.granted)))
    assert run.says() == lines(
        """
        demand waits to step at 20 ns for supply, at 10 ns, through supply.x -> demand.u
        supply works on its step at 10 ns
        meter works on its step at 0 s
        """
    )


def test_who_acts_on_another_holds_it_back_by_its_orders() -> None:
    run = federation(
        [],
        (Actuation("planner", "crews", 15),),
        planner=TimePolicy(period_ns=60),
        crews=TimePolicy(period_ns=10),
    )
    run.answers("crews")
    run.answers("crews")
    assert run.says() == lines(
        """
        crews waits to step at 20 ns for planner, at 0 s, through planner => crews
        planner works on its step at 0 s
        """
    )


def test_who_has_no_step_left_is_not_waited_for() -> None:
    run = federation(
        [Coupling("once", "x", "often", "u")],
        once=TimePolicy(),
        often=TimePolicy(period_ns=50),
    )
    run.answers("once")
    assert run.says() == "often works on its step at 0 s"


def test_of_a_loop_one_that_has_no_step_left_is_not_waited_for() -> None:
    run = federation(
        [
            Coupling("often", "x", "once", "u"),
            Coupling("once", "x", "often", "u"),
            Coupling("once", "x", "ear", "u"),
        ],
        often=TimePolicy(period_ns=10, can_redo=True),
        once=TimePolicy(can_redo=True),
        ear=TimePolicy(wakes_on_input=True),
    )
    while "ear" not in run.granted:
        run.answers(next(iter(run.granted)))
    run.answers("ear")
    assert run.says() == lines(
        """
        often works on its step at 10 ns
        ear sleeps; often may wake it from 10 ns on through once.x -> ear.u
        """
    )


@settings(max_examples=150, deadline=None)
@given(worlds(), st.integers(0, 1 << 20), st.sampled_from([None, 1, 2]))
def test_every_chain_ends_at_a_member_that_works_and_nobody_is_left_out(
    world: tuple[dict[str, Habit], Wiring], seed: int, in_flight: int | None
) -> None:
    run = Federation(*world, 40, in_flight)
    pick = shuffled(seed)
    while not run.is_over:
        waits = run.waits()
        assert {n for n, w in waits.items() if w.doing is Doing.WORKING} == set(run.granted)
        for member in waits:
            found = chain(waits, member)
            assert found[-1].doing is Doing.WORKING, [str(wait) for wait in found]
            assert all(w.by_ns <= w.time_ns for w in found)
        before = set(run.granted)
        run.answers(sorted(before)[pick(len(before))])
        missed = set(run.granted) - before - set(waits)
        assert not missed, "who was over got a grant"
    assert not run.waits()


@pytest.mark.parametrize(
    ("time_ns", "words"),
    [
        (0, "0 s"),
        (7, "7 ns"),
        (40_000_000_000, "40 s"),
        (3 * HOUR_NS, "3 h"),
        (51 * HOUR_NS + 4 * MINUTE_NS, "2 d 3 h 4 min"),
    ],
)
def test_an_instant_is_told_in_the_words_of_people(time_ns: int, words: str) -> None:
    assert instant(time_ns) == words


# -- the critical path ---------------------------------------------------------------------


class Tape:
    """The frames of a run on a clock of the test's own, and what is known of each."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def frame(
        self,
        after: Frame | None,
        member: str,
        began_s: float,
        ended_s: float,
        store_s: float = 0.0,
        pace_s: float = 0.0,
    ) -> Frame:
        made = Frame(after, member, len(self.frames), began_s, ended_s, store_s, pace_s)
        self.frames.append(made)
        return made


def test_the_path_leads_back_along_who_was_waited_for_and_leaves_out_who_was_quick() -> None:
    tape = Tape()
    rain = tape.frame(None, "rain", 1.0, 3.0)
    tape.frame(None, "quick", 1.0, 1.5)
    river = tape.frame(rain, "river", 3.25, 4.0, store_s=0.5)
    town = tape.frame(river, "town", 7.0, 9.0, pace_s=2.0)
    through = {("rain", "river"): "rain.x -> river.u"}
    path = critical_path(town, through, started_s=0.0, drive_s=0.5, ended_s=10.0)
    assert path.members == (Share("rain", 1, 2.0), Share("town", 1, 2.0), Share("river", 1, 0.75))
    assert path.holds == (
        Hold("rain", "river", "rain.x -> river.u", 1, 2.0),
        Hold("river", "town", "", 1, 0.75),
    )
    assert path.longest == (
        Longest("town", "", 3, 2.0),
        Longest("rain", "river", 0, 2.0),
        Longest("river", "town", 2, 0.75),
    )
    assert (path.opening_s, path.store_s, path.pace_s, path.closing_s) == (0.5, 0.5, 2.0, 1.0)
    assert path.coordinator_s == 0.5 + 0.25 + 0.5
    assert path.wall_s == 10.0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 120), st.integers(0, 1 << 20), st.integers(1, 9))
def test_what_is_summed_up_on_the_way_leaves_the_path_as_it_is_and_little_in_memory(
    width: int, length: int, seed: int, fold_every: int
) -> None:
    def told(folds: bool) -> tuple[CriticalPath, int]:
        pick = shuffled(seed)
        heads = [Frame(None, f"m{i}", 0, 1.0, 2.0 + i) for i in range(width)]
        most = 0
        for number in range(length):
            after = heads[pick(width)]
            began_s = after.ended_s + after.store_s + pick(3)
            heads[pick(width)] = Frame(
                after,
                f"m{pick(width)}",
                number,
                began_s,
                began_s + pick(5),
                store_s=pick(2),
                pace_s=0.0,
            )
            if folds and number % fold_every == 0:
                fold(heads)
                most = max(most, len(reached(heads)))
        last = heads[0]
        return critical_path(last, {}, started_s=0, drive_s=1, ended_s=last.ended_s), most

    (whole, _), (folded, most) = told(False), told(True)
    assert folded == whole
    assert whole.wall_s == pytest.approx(
        sum(m.seconds for m in whole.members) + whole.coordinator_s + whole.store_s + 1
    )
    assert most <= 2 * width


def reached(heads: Iterable[Frame]) -> set[Frame]:
    found: set[Frame] = set()
    for head in heads:
        frame: Frame | None = head
        while frame is not None and frame not in found:
            found.add(frame)
            frame = frame.unlocked_by
    return found
