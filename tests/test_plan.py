"""The joint plan on problems whose answer fits in the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyomo.contrib.solver.solvers.highs import Highs

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason
from federation.plan.algebra import pyomo_model
from federation.plan.crews import CrewPlanner, Family
from federation.plan.engine import engine_of, make_whole, optimum_usd
from federation.plan.joint import Schedule, joint_model, with_visits
from federation.plan.visits import Task, crews_engaged, possible_visits, share_available
from federation.planners import planner as build_planner
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import parse
from federation.twin import (
    HOUR_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    LinearBlock,
    Parameter,
    Port,
    Session,
    Step,
    StepInput,
    TimePolicy,
    Twin,
    Variable,
)
from twins.repair import Repairs

PERIODS_NS = (24 * HOUR_NS, 48 * HOUR_NS)
STARTS_NS = tuple(h * HOUR_NS for h in (0, 12, 24, 36, 54))
HOURS = np.array([24.0, 48.0])


def feeders(worth: Sequence[float], path: Sequence[Sequence[int]], name: str = "f") -> LinearBlock:
    """Feeders that cost `worth` dollars per hour while dark; each lives by its components."""
    components = sorted({c for parts in path for c in parts})
    periods = HOURS.size
    served = np.arange(len(worth) * periods).reshape(len(worth), periods)
    available = served.size + np.arange(len(components) * periods).reshape(-1, periods)
    rows, columns, values, row = [], [], [], 0
    for feeder, parts in enumerate(path):
        for part in parts:
            for p in range(periods):
                rows += [row, row]
                columns += [served[feeder, p], available[components.index(part), p]]
                values += [1.0, -1.0]
                row += 1
    cost = np.zeros(served.size + available.size)
    for feeder, dollars in enumerate(worth):
        cost[served[feeder]] = -dollars * HOURS
    ids = tuple(f"{name}{c}" for c in components)
    loads = tuple(f"load{i}" for i in range(len(worth)))
    return LinearBlock(
        columns=tuple(f"x{i}" for i in range(cost.size)),
        low=np.zeros(cost.size),
        high=np.ones(cost.size),
        cost=cost,
        integer=np.zeros(cost.size, dtype=bool),
        rows=tuple(f"r{i}" for i in range(row)),
        row_low=np.full(row, -np.inf),
        row_high=np.zeros(row),
        row_index=np.array(rows),
        column_index=np.array(columns),
        coefficient=np.array(values),
        ports=(
            Port("available", "available", "part", "1", ids, available),
            Port("supplied", "supply", "load", "1", loads, served),
        ),
    )


def ward(worth: float) -> LinearBlock:
    """A hospital that is worth `worth` dollars per hour of power that it receives."""
    need = np.arange(HOURS.size).reshape(1, -1)
    nothing = np.zeros(0, dtype=np.int64)
    return LinearBlock(
        columns=("p0", "p1"),
        low=np.zeros(2),
        high=np.ones(2),
        cost=-worth * HOURS,
        integer=np.zeros(2, dtype=bool),
        rows=(),
        row_low=np.zeros(0),
        row_high=np.zeros(0),
        row_index=nothing,
        column_index=nothing,
        coefficient=np.zeros(0),
        ports=(Port("power", "need", "ward", "1", ("w",), need),),
    )


def solve(block: LinearBlock, tasks: list[Task], crews: float, **more: LinearBlock) -> Schedule:
    couplings = [Coupling("grid", "supplied", "care", "power", 0, (("load1", "w", 1.0),))]
    model = joint_model({"grid": block, **more}, couplings, PERIODS_NS, STARTS_NS, crews)
    return model.solve(tasks)


def sent(schedule: Schedule, tasks: list[Task]) -> list[str]:
    return [tasks[v.task].component for v in schedule.visits if v.sent]


def test_one_crew_goes_to_the_feeder_that_is_worth_more_first() -> None:
    tasks = [Task("grid", "f0", 12.0, 0.0), Task("grid", "f1", 12.0, 0.0)]
    schedule = solve(feeders([1.0, 5.0], [[0], [1]]), tasks, 1)
    assert sent(schedule, tasks) == ["f1", "f0"]
    assert schedule.idle_cost_usd == pytest.approx(0.0, abs=1e-6)
    # f1 works for 60 of 72 hours at 5 dollars, f0 for 48 at 1
    assert schedule.cost_usd == pytest.approx(-(60 * 5 + 48), rel=1e-6)
    assert schedule.saving_usd == pytest.approx(348, rel=1e-6)
    assert schedule.bound_usd <= schedule.cost_usd + 1e-6
    assert 0.0 <= schedule.gap < 0.2


def test_half_a_path_is_worth_nothing() -> None:
    """The feeder of 9 needs two repairs of 40 hours, which one crew can't end in 72 hours."""
    tasks = [Task("grid", c, w, 0.0) for c, w in (("f0", 40.0), ("f1", 40.0), ("f2", 12.0))]
    schedule = solve(feeders([9.0, 1.0], [[0, 1], [2]]), tasks, 1)
    assert "f2" in sent(schedule, tasks)
    assert schedule.cost_usd == pytest.approx(-60.0, rel=1e-6)


def test_what_a_hospital_receives_counts_through_the_coupling() -> None:
    """Both feeders are alike, but a ward that is worth 100 hangs on the second."""
    tasks = [Task("grid", "f0", 12.0, 0.0), Task("grid", "f1", 12.0, 0.0)]
    schedule = solve(feeders([1.0, 1.0], [[0], [1]]), tasks, 1, care=ward(100.0))
    assert sent(schedule, tasks)[0] == "f1"
    assert schedule.cost_usd == pytest.approx(-(60 * 101 + 48), rel=1e-6)


def test_several_crews_share_a_task_as_far_as_they_may() -> None:
    alone = [Task("grid", "f0", 36.0, 0.0, most_crews=1)]
    together = [Task("grid", "f0", 36.0, 0.0, most_crews=3)]
    block = feeders([1.0], [[0]])
    assert solve(block, alone, 3).cost_usd == pytest.approx(-36.0, rel=1e-6)
    assert solve(block, together, 3).cost_usd == pytest.approx(-60.0, rel=1e-6)


def test_a_crew_that_is_there_stays_until_it_is_done() -> None:
    tasks = [Task("grid", "f0", 24.0, 0.0, crews=1.0), Task("grid", "f1", 12.0, 0.0)]
    schedule = solve(feeders([1.0, 50.0], [[0], [1]]), tasks, 1)
    assert any(v.task == 0 and not v.sent for v in schedule.visits)
    # f1 has to wait for the start at 24 h and works from 36 h on
    assert schedule.cost_usd == pytest.approx(-(48 + 50 * 36), rel=1e-6)


def test_a_component_that_no_block_knows_has_no_plan() -> None:
    with pytest.raises(PlanError) as caught:
        solve(feeders([1.0], [[0]]), [Task("grid", "f9", 1.0, 0.0)], 1)
    assert caught.value.reason is Reason.NO_PLAN


def test_blocks_that_contradict_themselves_are_infeasible() -> None:
    block = feeders([1.0], [[0]])
    block.row_high[:] = -5.0  # served <= available - 5
    with pytest.raises(PlanError) as caught:
        solve(block, [Task("grid", "f0", 12.0, 0.0)], 1)
    assert caught.value.reason is Reason.PLAN_INFEASIBLE
    assert caught.value.exit_code == 4


def test_a_plan_does_not_depend_on_what_was_solved_before() -> None:
    block, tasks = (
        feeders([3.0, 2.0, 1.0], [[0], [1], [2]]),
        [Task("grid", f"f{i}", 10.0 + i, 1.0) for i in range(3)],
    )
    first = solve(block, tasks, 2)
    solve(feeders([1.0, 9.0, 5.0], [[0], [1], [2]]), tasks[1:], 2)
    assert solve(block, tasks, 2) == first


def planner(policy: str, crews: int = 3) -> Session:
    family = Family("grid", "assign_crew", tuple(f"f{i}" for i in range(5)), 3.0)
    made = CrewPlanner(policy, [family], crews, HOUR_NS, 72 * HOUR_NS)  # type: ignore[arg-type]
    session = Session(made, "planner")
    session.open(1, {})
    if policy == "plan":
        made.prepare({"grid": feeders([5.0, 4.0, 3.0, 2.0, 1.0], [[i] for i in range(5)])})
    return session


def decide(session: Session, work: list[float], busy: list[int], travel: list[float]) -> StepInput:
    return StepInput(
        0,
        inputs={
            "remaining_0": np.array(work),
            "busy_0": np.array(busy, dtype=float),
            "travel_0": np.array(travel),
        },
    )


def test_the_nearest_policy_sends_one_crew_to_each_of_the_nearest() -> None:
    session = planner("nearest", crews=2)
    result = session.advance(decide(session, [5, 5, 0, 5, 5], [0] * 5, [40, 10, 5, 30, 20]))
    assert [(a.entity, a.value) for a in result.actions] == [("f1", 1.0), ("f4", 1.0)]


def test_the_policy_none_sends_nobody() -> None:
    session = planner("none")
    result = session.advance(decide(session, [5] * 5, [0] * 5, [10] * 5))
    assert result.actions == ()


@given(
    st.lists(st.floats(0, 60), min_size=5, max_size=5),
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
    st.integers(0, 6),
    st.sampled_from(["nearest", "plan"]),
)
@settings(max_examples=40, deadline=None)
def test_no_more_crews_are_sent_than_are_free(
    work: list[float], there: list[int], spare: int, policy: str
) -> None:
    busy = [b if w > 0 else 0 for w, b in zip(work, there, strict=True)]
    session = planner(policy, crews=max(sum(busy) + spare, 1))
    result = session.advance(decide(session, work, busy, [30.0] * 5))
    now = dict(zip((f"f{i}" for i in range(5)), busy, strict=True))
    more = [a.value - now[a.entity] for a in result.actions]
    assert all(m > 0 for m in more)
    assert sum(busy) + sum(more) <= max(sum(busy) + spare, 1)


def test_the_gap_is_a_share_of_what_could_be_saved() -> None:
    schedule = Schedule("stopped", "feasible", 100.0, 60.0, 50.0, ())
    assert schedule.saving_usd == 40.0
    assert schedule.gap == pytest.approx(0.2)
    assert Schedule("stopped", "feasible", 100.0, 100.0, 100.0, ()).gap == 0.0


def test_an_infeed_and_its_line_are_mended_one_after_the_other() -> None:
    tasks = [Task("grid", f"f{i}", 12.0, 0.0) for i in range(3)]
    schedule = solve(feeders([9.0, 1.0], [[0, 1], [2]]), tasks, 1)
    # the pair works from hour 24 on, the other from hour 36; the other first gives 84 less
    assert sorted(sent(schedule, tasks)[:2]) == ["f0", "f1"]
    assert schedule.cost_usd == pytest.approx(-(9 * 48 + 36), rel=1e-6)


def test_others_join_a_crew_that_is_busy() -> None:
    task = Task("grid", "f0", 36.0, 6.0, crews=1.0, most_crews=3.0)
    schedule = solve(feeders([1.0], [[0]]), [task], 3)
    # one crew alone ends at hour 36; two more after 6 h on the road: the other 30 in 10 h
    assert schedule.idle_cost_usd == pytest.approx(-36.0)
    assert schedule.cost_usd == pytest.approx(-56.0, rel=1e-6)
    assert schedule.visits[0].end_h == pytest.approx(16.0)


def test_what_cannot_be_done_in_time_is_not_begun() -> None:
    schedule = solve(feeders([1.0], [[0]]), [Task("grid", "f0", 73.0, 0.0)], 1)
    assert schedule.visits == ()
    assert schedule.saving_usd == schedule.gap == 0.0


def test_whole_numbers_of_a_block_stay_whole() -> None:
    """Generators at 10 dollars cover a need of 1.5 until the component is back."""
    block = LinearBlock(
        columns=("n0", "n1", "a0", "a1"),
        low=np.zeros(4),
        high=np.array([5.0, 5.0, 1.0, 1.0]),
        cost=np.array([10.0, 10.0, 0.0, 0.0]),
        integer=np.array([True, True, False, False]),
        rows=("r0", "r1"),
        row_low=np.array([1.5, 1.5]),
        row_high=np.full(2, np.inf),
        row_index=np.array([0, 0, 1, 1]),
        column_index=np.array([0, 2, 1, 3]),
        coefficient=np.array([1.0, 1.5, 1.0, 1.5]),
        ports=(Port("available", "available", "part", "1", ("f0",), np.array([[2, 3]])),),
    )
    schedule = solve(block, [Task("grid", "f0", 12.0, 0.0)], 1)
    assert schedule.idle_cost_usd == pytest.approx(40.0)
    # half of the first period is left, so that one generator is enough; then none is
    assert schedule.cost_usd == pytest.approx(10.0)


@given(
    jobs=st.lists(
        st.tuples(st.floats(0.5, 60.0), st.floats(0.5, 20.0), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    ),
    crews=st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_a_plan_keeps_to_its_crews_and_promises_what_they_can_do(
    jobs: list[tuple[float, float, int]], crews: int
) -> None:
    tasks, left = [], crews
    for i, (work_h, _, busy) in enumerate(jobs):
        busy = min(busy, left)
        left -= busy
        tasks.append(Task("grid", f"f{i}", work_h, 0.0, float(busy), 2.0))
    block = feeders([worth for _, worth, _ in jobs], [[i] for i in range(len(jobs))])
    schedule = solve(block, tasks, crews)
    engaged = crews_engaged(schedule.visits, tasks, [s / HOUR_NS for s in STARTS_NS], 72.0)
    assert engaged.sum(axis=0).max(initial=0.0) <= crews + 1e-6
    visited = [v.task for v in schedule.visits]
    assert len(set(visited)) == len(visited)
    assert {i for i, task in enumerate(tasks) if task.crews} <= set(visited)
    assert schedule.bound_usd <= schedule.cost_usd <= schedule.idle_cost_usd + 1e-3
    lit_h = {v.task: max(72.0 - v.end_h, 0.0) for v in schedule.visits}
    bill = -sum(worth * lit_h.get(i, 0.0) for i, (_, worth, _) in enumerate(jobs))
    # the solver may stop before it has made the most of its visits, but promises nothing more
    assert bill - 1e-3 <= schedule.cost_usd <= bill + 0.1 * (schedule.idle_cost_usd - bill) + 1e-3


def test_pyomo_and_the_arrays_state_one_problem() -> None:
    """Four repairs on paths that share parts, and one crew that is at work already."""
    block = feeders([9.0, 4.0, 1.0], [[0, 1], [1, 2], [3]])
    tasks = [Task("grid", f"f{i}", 9.0 + i, 1.0, crews=float(i == 2)) for i in range(4)]
    model = joint_model({"grid": block}, [], PERIODS_NS, STARTS_NS, 2.0)
    visits = possible_visits(tasks, model.crews, model.starts_h, 72.0)
    share = share_available(visits, model.lengths_h)
    engaged = crews_engaged(visits, tasks, model.starts_h, 72.0)
    problem = with_visits(model.joined, tasks, visits, share, engaged, model.crews)
    engine = engine_of(problem)
    make_whole(engine, np.flatnonzero(problem.integer))
    stated = pyomo_model(problem)
    answer = Highs().solve(stated, rel_gap=0.0)
    assert answer.incumbent_objective < -100.0
    assert optimum_usd(engine) == pytest.approx(answer.incumbent_objective, rel=1e-4)


class Street(Twin):
    """Five feeders that all fail at once; the last is the biggest and the farthest."""

    components = tuple(f"f{i}" for i in range(5))
    worth = np.arange(1.0, 6.0)

    def describe(self) -> Description:
        kind, output = "part", Causality.OUTPUT
        return Description(
            model="street",
            version="1",
            domain="power",
            entities=tuple(Entity(c, kind) for c in self.components),
            variables=(
                Variable("remaining", kind, "h", output),
                Variable("busy", kind, "1", output),
                Variable("travel", kind, "min", output),
                Variable("unserved", SYSTEM, "MWh", output),
            ),
            time=TimePolicy(period_ns=HOUR_NS // 4),
            parameters=(Parameter("work_h", "h", 6.0, 1.0, 20.0, "work at each feeder"),),
            actuators=(Actuator("assign", kind, "1", 0.0, 3.0, 0.0),),
            kpis=("unserved",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.repairs = Repairs(5)
        self.repairs.damage(np.full(5, parameters["work_h"]))
        self.unserved_mwh = 0.0

    def advance(self, step: Step) -> None:
        self.unserved_mwh += float(self.worth @ (1.0 - self.repairs.intact)) * step.span_h
        self.repairs.progress(step.last_ns, step.time_ns)
        for action in step.actions:
            index = self.components.index(action.entity)
            self.repairs.assign(index, round(action.value), step.time_ns, 0.5)
        step.publish("remaining", self.repairs.remaining_h)
        step.publish("busy", self.repairs.crews)
        step.publish("travel", [10.0, 20.0, 30.0, 40.0, 50.0])
        step.publish("unserved", self.unserved_mwh)

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        assert len(periods_ns) == HOURS.size
        return feeders(self.worth.tolist(), [[i] for i in range(5)])


STREET = parse("""
name: street
region: nowhere
horizon_h: 72
members:
  grid: {class: "tests.test_plan:Street"}
couplings: []
repairs:
  crews: 3
  horizon_h: 72
  work:
    - {actuator: grid.assign, remaining: grid.remaining, busy: grid.busy, travel: grid.travel}
measures:
  none: {crews: none}
  nearest: {crews: nearest}
  plan: {crews: plan}
kpis: [grid.unserved]
""")


def run(measure: str, crews: float = 3.0, work_h: float = 6.0) -> Outcome:
    parameters = {"grid": {"work_h": work_h}, "planner": {"crews": crews}}
    return run_local(STREET, Case(0, 1, measure, parameters), build_planner)


def test_planning_beats_the_nearest_and_the_nearest_beats_nothing() -> None:
    unserved = {m: run(m).kpis["unserved"] for m in ("none", "nearest", "plan")}
    assert unserved["none"] == pytest.approx(15 * 72)
    assert unserved["plan"] < unserved["nearest"] < unserved["none"]


def test_the_number_of_crews_counts() -> None:
    few, usual, many = (run("plan", crews).kpis["unserved"] for crews in (1.0, 3.0, 15.0))
    assert many < usual < few
    assert all(a.refusal == "" for a in run("plan", 15.0).actions)


def test_a_run_does_not_depend_on_the_runs_before_it() -> None:
    alone = run("plan").digest
    run("plan", 5.0, 11.0)
    run("plan", 1.0, 2.5)
    assert run("plan").digest == alone
    assert run("plan", work_h=7.0).digest != alone
