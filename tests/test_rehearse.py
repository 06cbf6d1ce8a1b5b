"""Forks of a run in one process: exact ones, other futures, and what neither knows or disturbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.core.coupling import Wiring
from federation.core.schedule import Schedule
from federation.errors import FederationError, Reason
from federation.planners import planner as build_planner
from federation.scenario.rehearse import RunCut
from federation.scenario.run import Case, run_local
from federation.scenario.spec import Policy, Scenario, load
from federation.twin import (
    HOUR_NS,
    Cut,
    Description,
    Planner,
    Session,
    TimePolicy,
    Twin,
)
from tests.test_core import HORIZON_NS, walk, worlds
from tests.worlds import Habit, Toy, open_sessions

SHELBY = Path(__file__).parent.parent / "twins" / "regions" / "shelby" / "level5.yaml"


@pytest.mark.property
@given(worlds(is_steady=True), st.integers(0, 4))
def test_a_fork_at_any_instant_ends_with_the_digest_of_the_run_that_does_not_feel_it(
    world: tuple[dict[str, Habit], Wiring], at: int
) -> None:
    habits, wiring = world
    expected, _ = walk(wiring, open_sessions(habits), HORIZON_NS)
    watched = next((n for n, habit in habits.items() if habit.policy.period_ns), None)
    if watched is None:
        return
    sessions = open_sessions(habits)
    schedule = Schedule(wiring, sessions, HORIZON_NS, wall=lambda: 0.0, cpu=lambda: 0.0)
    ends: list[str] = []

    def fork(time_ns: int) -> None:
        twins = {name: Toy(habits[name]) for name in sessions}
        for name, twin in twins.items():
            twin.restore(sessions[name].twin.snapshot())
        copies = {name: sessions[name].fork(twin) for name, twin in twins.items()}
        other = schedule.fork(copies, HORIZON_NS, lambda member, output: False, hashes=True)
        ends.append(other.run(lambda entries, settled_ns: None))

    schedule.watch(watched, lambda time_ns: fork(time_ns) if time_ns % 5 == at else None)
    assert schedule.run(lambda entries, settled_ns: None) == expected
    assert set(ends) <= {expected}


def cut_at(
    scenario: Scenario, case: Case, look: Callable[[RunCut, Planner], None]
) -> tuple[str, str]:
    """The digests of a run without forks, and of one in which `look` is called before each step
    of the planner."""

    def watching(
        scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy
    ) -> Planner:
        made = build_planner(scenario, descriptions, policy)
        kind = type(made)

        def deliberate(self: Planner, cut: Cut) -> None:
            assert isinstance(cut, RunCut)
            look(cut, self)
            kind.deliberate(self, cut)

        watched = {"deliberate": deliberate, "foresees": lambda self: True}
        made.__class__ = type("Watched", (kind,), watched)
        return made

    plain = run_local(scenario, case, build_planner).digest
    return plain, run_local(scenario, case, watching).digest


def again(planner: Planner, scenario: Scenario, cut: RunCut) -> Planner:
    """Another planner that stands where this one does."""
    descriptions = {n: s.description for n, s in cut.foresight.sessions.items()}
    policy = scenario.measures[cut.foresight.case.measure].crews
    other = build_planner(scenario, descriptions, policy)
    other.open(0, {"crews": 12.0})
    other.restore(planner.snapshot())
    return other


def test_a_fork_of_shelby_goes_on_bit_for_bit_and_the_run_does_not_feel_it() -> None:
    scenario = load(SHELBY).model_copy(update={"horizon_h": 14.0})
    case = Case(3, 31, "plan", {"disaster": {"field": 1.0}})
    ends: list[str] = []

    def look(cut: RunCut, planner: Planner) -> None:
        if cut.time_ns // HOUR_NS in (0, 1, 9):
            ends.append(cut.exact(again(planner, scenario, cut))[0])

    plain, watched = cut_at(scenario, case, look)
    assert watched == plain
    assert ends == [plain] * 3


def test_a_fork_of_a_run_that_rehearses_comes_to_the_same_decisions() -> None:
    whole = load(SHELBY)
    assert whole.repairs is not None
    repairs = whole.repairs.model_copy(update={"rehearse_h": 0.5, "futures": 1})
    scenario = whole.model_copy(update={"horizon_h": 3.5, "repairs": repairs})
    case = Case(3, 31, "level5", {"disaster": {"field": 1.0}})
    ends: list[tuple[str, int]] = []

    def look(cut: RunCut, planner: Planner) -> None:
        if cut.time_ns // HOUR_NS in (0, 2):
            other = again(planner, scenario, cut)
            ends.append((cut.exact(other)[0], len(other.loop.decisions)))  # type: ignore[attr-defined]

    plain, watched = cut_at(scenario, case, look)
    assert watched == plain
    assert [digest for digest, _ in ends] == [plain] * 2
    assert ends[0][1] == ends[1][1] >= 1


def test_a_future_knows_nothing_of_the_seed_and_parameters_of_the_run_it_comes_from() -> None:
    """Two runs that have told the same so far have the same futures: here neither has had its
    shock yet, and they differ in all that is still to be drawn."""
    scenario = load(SHELBY).model_copy(update={"horizon_h": 3.0})
    seen: list[dict[str, tuple[tuple[int, float], ...]]] = []

    def look(cut: RunCut, planner: Planner) -> None:
        if cut.time_ns < HOUR_NS:
            twin = cut.foresight.sessions["disaster"].twin
            other = cut.foresight.fresh("disaster")
            given = {p.name: p.default for p in twin.describe().parameters}
            other.open(7, given)
            other.restore(twin.snapshot())
            other.diverge(cut.time_ns, 7, given)
            seen.append({"shocks": tuple(other.run.shocks)})  # type: ignore[attr-defined]

    for seed in (31, 32):
        cut_at(scenario, Case(0, seed, "nearest-first"), look)
    assert seen[0] == seen[1]
    assert seen[0]["shocks"]


def open_twin(twin: Twin, seed: int, **parameters: float) -> Session:
    session = Session(twin, "x")
    session.open(seed, parameters)
    return session


def struck(seed: int, field: float) -> Session:
    """An earthquake whose mainshock has struck."""
    from twins.disaster.twin import DisasterTwin

    session = open_twin(DisasterTwin(), seed, field=field)
    session.run(0)
    session.run(HOUR_NS)
    return session


def future_of(session: Session, seed: int, time_ns: int) -> tuple[Twin, int | None]:
    twin = type(session.twin)()
    given = {p.name: p.default for p in session.description.parameters} | {"field": 1.0}
    twin.open(seed, given)
    twin.restore(session.twin.snapshot())
    return twin, twin.diverge(time_ns, seed, given)


def test_aftershocks_of_a_future_are_drawn_anew_and_what_stood_may_not_have_been_weak() -> None:
    session = struck(5, 1.0)
    run = session.twin.run  # type: ignore[attr-defined]
    now_ns = 2 * HOUR_NS
    twin, wish = future_of(session, 99, now_ns)
    other = twin.run  # type: ignore[attr-defined]
    assert other.shocks[0] == run.shocks[0]
    assert other.shocks[1:] != run.shocks[1:]
    assert all(at_ns >= now_ns for at_ns, _ in other.shocks[1:])
    assert wish == (other.shocks[1][0] if len(other.shocks) > 1 else None)
    for name, damage in other.networks.items():
        was = run.networks[name]
        assert (damage.state == was.state).all()
        assert (damage.strength != was.strength).any()
        assert (damage.bounds[:, 0] <= damage.strength).all()
        assert (damage.strength <= damage.bounds[:, 1]).all()
        assert (damage.bounds[:, 0] <= was.strength).all()
        assert (was.strength <= damage.bounds[:, 1]).all()


def test_a_future_of_its_own_seed_and_parameters_is_the_run_itself() -> None:
    session = struck(5, 1.0)
    given = {p.name: p.default for p in session.description.parameters} | {"field": 1.0}
    twin = type(session.twin)()
    twin.open(5, given)
    twin.restore(session.twin.snapshot())
    before = twin.snapshot()
    wish = twin.diverge(2 * HOUR_NS, 5, given)
    assert twin.snapshot() == before
    shocks = session.twin.run.shocks  # type: ignore[attr-defined]
    assert wish == (shocks[1][0] if len(shocks) > 1 else None)


def hurt(seed: int) -> Session:
    """Hospitals an hour after three hundred people were hurt."""
    from twins.medical.twin import MedicalTwin

    session = open_twin(MedicalTwin(), seed)
    session.run(0)
    for severity, size in ((2, 4.0), (3, 2.0)):
        people = session.values[f"injured_severity{severity}"] + size
        session.values[f"injured_severity{severity}"] = people
    session.run(60_000_000_000, ["injured_severity2", "injured_severity3"])
    session.run(HOUR_NS)
    return session


def dead_after(twin: Twin, session: Session, hours: int) -> float:
    copy = session.fork(twin)
    outputs: dict[str, bytes] = {}
    for minute in range(61, 60 * hours):
        outputs |= copy.run(minute * 60_000_000_000)
    return float(np.frombuffer(outputs["deaths"])[0])


def test_who_will_die_is_not_known_but_how_many_is_about_as_likely() -> None:
    """Fates differ from future to future; in the mean of many they agree with the law."""
    session = hurt(3)
    given = {p.name: p.default for p in session.description.parameters}
    dead = []
    for seed in range(8):
        twin = type(session.twin)()
        twin.open(seed, given)
        twin.restore(session.twin.snapshot())
        twin.diverge(HOUR_NS, 1000 + seed, given)
        dead.append(dead_after(twin, session, 7))
    assert len(set(dead)) > 2
    true = []
    for seed in range(8):
        other = hurt(100 + seed)
        twin = type(other.twin)()
        twin.open(seed, given)
        twin.restore(other.twin.snapshot())
        true.append(dead_after(twin, other, 7))
    spread = np.std(true, ddof=1) + np.std(dead, ddof=1)
    assert abs(np.mean(dead) - np.mean(true)) < 1.5 * spread


def test_a_member_that_has_no_other_futures_is_named() -> None:
    toy = Toy(Habit(TimePolicy(period_ns=1), (), 1, False, 0.5))
    with pytest.raises(FederationError) as caught:
        toy.diverge(0, 1, {})
    assert caught.value.reason is Reason.UNSUPPORTED
