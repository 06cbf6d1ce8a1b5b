"""The member that sends repair crews: none, to the nearest, by the joint model, or in an order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from federation import telemetry
from federation.core.coupling import Coupling
from federation.errors import Reason, ScenarioError
from federation.plan.belief import Assessment, Belief
from federation.plan.joining import Crossing, Joined
from federation.plan.joint import JointModel, Schedule, joint_model
from federation.plan.keeping import States
from federation.plan.visits import Task
from federation.twin import (
    HOUR_NS,
    SYSTEM,
    Causality,
    Description,
    Entity,
    LinearBlock,
    Parameter,
    Planner,
    Step,
    TimePolicy,
    Variable,
    Vector,
)

Policy = Literal["none", "nearest", "plan", "once", "level5"]
Flags = NDArray[np.bool_]

Key = tuple[int, int]
"""A component: its family and its place there."""

Order = tuple[tuple[Key, int], ...]
"""Whom crews are sent to, the first first, and how many together."""

PERIODS_H = (36, 36)
"""The periods of a plan. Repairs count from the hour when they are done, so that few periods
are enough: 24 + 48 h saved less in six coupled runs, 12 + 24 + 36 h took a third more time."""

STARTS_H = (0, 6, 18, 36)
"""When crews may set out in a plan. What they do then follows its order, not these hours."""

REPLAN_H = 36.0
"""A plan is made anew this long after the last one: when its first period has passed. After 24 h
took a third more time, and saved no more in twelve coupled runs."""

REPLAN_SHARE = 0.05
"""A plan is also made anew when this share of what it costs to repair nothing comes from damage
that it did not know. Hours of work would not do: the infeed that an aftershock took in one run
was a hundredth of the work and most of the cost."""


STATES = States(JointModel, Joined, Crossing, Belief, Assessment)


@dataclass(frozen=True)
class Family:
    """Components of one member that crews repair through one actuator.

    At most `most_crews` work on one component at a time.
    """

    member: str
    actuator: str
    components: tuple[str, ...]
    most_crews: float = 1.0


class CrewPlanner(Planner):
    """Decides at a fixed period which free crews set out to which damaged components.

    It sees, per family, the work left, the crews engaged and the travel time. Crews return to
    the pool when the work at their component is done. `nearest` sends one crew to each
    component, the nearest first. `plan` sends crews in the order of the joint model's visits,
    as many together as it wants there; crews that its visits leave free go to the nearest. `once`
    does the same with the first plan for good. With an `assessment` plans rest on what is
    believed of the work (see `federation.plan.belief`).
    """

    def __init__(
        self,
        policy: Policy,
        families: Sequence[Family],
        crews: float,
        period_ns: int,
        horizon_ns: int,
        couplings: Sequence[Coupling] = (),
        assessment: Assessment | None = None,
        offset_ns: int = 0,
    ) -> None:
        self.policy = policy
        self.families = tuple(families)
        self.crews = crews
        self._period_ns, self._offset_ns = period_ns, offset_ns
        self._couplings = couplings
        self._assessment = assessment
        self._belief = Belief(None, [len(f.components) for f in self.families], 0)
        self._periods_ns = _fit(horizon_ns)
        self._starts_ns = tuple(h * HOUR_NS for h in STARTS_H if h * HOUR_NS < horizon_ns)
        self._model: JointModel | None = None
        self._order: Order = ()
        self._plans = 0
        self._planned_ns: int | None = None
        self._known: list[Flags] = []
        self._weighed: list[Flags] = []

    def describe(self) -> Description:
        entities: list[Entity] = []
        variables: list[Variable] = []
        for index, family in enumerate(self.families):
            kind = f"{family.member}_{family.actuator}"
            entities += [Entity(component, kind) for component in family.components]
            for role, unit, doc in (
                ("remaining", "h", "crew-hours of work left"),
                ("busy", "1", "crews on the way or at work"),
                ("travel", "min", "travel time from the depot"),
            ):
                name = f"{role}_{index}"
                variables.append(Variable(name, kind, unit, Causality.INPUT, doc=doc))
        for name, unit, doc in (
            ("tasks_open", "1", "components with work left"),
            ("crews_engaged", "1", "crews on the way or at work"),
            ("plans_made", "1", "how often the joint model was solved"),
            ("plan_cost", "USD", "cost of the last plan over its horizon by the model"),
            ("plan_bound", "USD", "what no plan could go below at that time"),
            ("plan_saving", "USD", "what the last plan saves against doing nothing"),
            ("plan_gap", "1", "what a better plan could save in addition, as a share"),
        ):
            variables.append(Variable(name, SYSTEM, unit, Causality.OUTPUT, doc=doc))
        return Description(
            model="crew-planner",
            version="1",
            domain="planner",
            entities=tuple(entities),
            variables=tuple(variables),
            time=TimePolicy(period_ns=self._period_ns, offset_ns=self._offset_ns),
            parameters=(
                Parameter("crews", "1", self.crews, 0.0, 1000.0, "crews that all families share"),
            ),
            doc=self.__doc__ or "",
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.crews = parameters["crews"]
        self._known = [np.zeros(len(f.components), dtype=bool) for f in self.families]
        self._weighed = self._known
        self._belief = Belief(self._assessment, [len(f.components) for f in self.families], seed)

    def snapshot(self) -> bytes:
        return STATES.pack(self._state())

    def restore(self, state: bytes) -> None:
        mine = self._state().keys()
        known = STATES.unpack(state, lambda f: isinstance(f, dict) and f.keys() == mine)
        vars(self).update(known)

    def _state(self) -> dict[str, object]:
        """Everything that changes in a session, and the model that it was shown."""
        outside = ("families", "policy", "_couplings", "_periods_ns", "_starts_ns")
        return {name: value for name, value in vars(self).items() if name not in outside}

    def follower(self, order: Order) -> CrewPlanner:
        """One that stands where this one does and sends crews in an order, whatever comes."""
        other = CrewPlanner(
            "nearest",
            self.families,
            self.crews,
            self._period_ns,
            sum(self._periods_ns),
            offset_ns=self._offset_ns,
        )
        other._order = order
        return other

    def periods_ns(self) -> tuple[int, ...]:
        return self._periods_ns if self.policy in ("plan", "once", "level5") else ()

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        self._model = joint_model(
            blocks, self._couplings, self._periods_ns, self._starts_ns, self.crews
        )

    def advance(self, step: Step) -> None:
        remaining = [step[f"remaining_{i}"] for i in range(len(self.families))]
        busy = [step[f"busy_{i}"] for i in range(len(self.families))]
        travel = [step[f"travel_{i}"] for i in range(len(self.families))]
        engaged = float(sum(b.sum() for b in busy))
        self._belief.look(step.time_ns, remaining)
        waiting = [
            (i, int(c))
            for i in range(len(self.families))
            for c in np.flatnonzero((remaining[i] > 0) & (busy[i] == 0))
        ]
        step.publish("tasks_open", sum(int((r > 0).sum()) for r in remaining))
        step.publish("crews_engaged", engaged)
        free = round(self.crews - engaged)
        if self.policy == "none" or free <= 0 or not any((r > 0).any() for r in remaining):
            return
        nearest = sorted(waiting, key=lambda t: (travel[t[0]][t[1]], t))
        if self.policy in ("plan", "once"):
            keys, tasks = self._tasks(self._belief.hours, busy, travel)
            if self._is_stale(step.time_ns, remaining, keys, tasks):
                self._plan(step, remaining, keys, tasks)
        planned = {(i, c): n for (i, c), n in self._order if remaining[i][c] > 0}
        wanted = planned | {task: 1 for task in nearest if task not in planned}
        for (i, c), goal in wanted.items():
            there = round(busy[i][c])
            crews = min(goal - there, free)
            if crews <= 0:
                continue
            free -= crews
            family = self.families[i]
            component = family.components[c]
            event = step.emit(
                "crew_sent",
                component,
                f"{crews} {'crew is' if crews == 1 else 'crews are'} sent to {component}",
                step.cause(f"remaining_{i}", c),
            )
            step.act(family.member, family.actuator, component, float(there + crews), event)

    def tasks_at(self, step: Step, future: int | None = None) -> list[Task]:
        """What is left to repair at a step that it has just done, as it is believed to be or, in a
        future, as it may be."""
        hours = self._belief.hours
        if future is not None:
            hours = self._belief.imagined(step.time_ns + future)
        places = range(len(self.families))
        busy = [step[f"busy_{i}"] for i in places]
        travel = [step[f"travel_{i}"] for i in places]
        return self._tasks(hours, busy, travel)[1]

    def _tasks(
        self, remaining: list[Vector], busy: list[Vector], travel: list[Vector]
    ) -> tuple[list[tuple[int, int]], list[Task]]:
        """What is left to repair: family and component of each, and the task it is.

        `remaining` is what is believed of it.
        """
        keys = [(i, int(c)) for i, r in enumerate(remaining) for c in np.flatnonzero(r > 0)]
        return keys, [
            Task(
                self.families[i].member,
                self.families[i].components[c],
                float(remaining[i][c]),
                float(travel[i][c]) / 60.0,
                float(busy[i][c]),
                self.families[i].most_crews,
            )
            for i, c in keys
        ]

    def _is_stale(
        self,
        time_ns: int,
        remaining: list[Vector],
        keys: list[tuple[int, int]],
        tasks: list[Task],
    ) -> bool:
        """Whether there is no plan, it is old, or damage has come that makes another worthwhile.

        New damage is weighed once, together with all that has come since the plan.
        """
        if self._planned_ns is None:
            return True
        if self.policy == "once":
            return False
        if time_ns - self._planned_ns >= REPLAN_H * HOUR_NS:
            return True
        damaged = [r > 0 for r in remaining]
        self._known = [k & d for k, d in zip(self._known, damaged, strict=True)]
        self._weighed = [w & d for w, d in zip(self._weighed, damaged, strict=True)]
        if not any((d & ~w).any() for d, w in zip(damaged, self._weighed, strict=True)):
            return False
        self._weighed = damaged
        assert self._model is not None
        foreseen = [task for (i, c), task in zip(keys, tasks, strict=True) if self._known[i][c]]
        cost_usd = self._model.idle_cost_usd(tasks)
        return cost_usd - self._model.idle_cost_usd(foreseen) > REPLAN_SHARE * abs(cost_usd)

    def _plan(
        self,
        step: Step,
        remaining: list[Vector],
        keys: list[tuple[int, int]],
        tasks: list[Task],
    ) -> None:
        schedule = self._solved(tasks)
        self._order = tuple((keys[v.task], round(v.crews)) for v in schedule.visits if v.sent)
        self._planned_ns = step.time_ns
        self._known = self._weighed = [r > 0 for r in remaining]
        step.publish("plans_made", self._plans)
        step.publish("plan_cost", schedule.cost_usd)
        step.publish("plan_bound", schedule.bound_usd)
        step.publish("plan_saving", schedule.saving_usd)
        step.publish("plan_gap", schedule.gap)
        step.emit(
            "plan_made",
            SYSTEM,
            f"a plan for {len(tasks)} repairs saves {schedule.saving_usd:,.0f} of "
            f"{schedule.idle_cost_usd:,.0f} USD (gap {schedule.gap:.1%}; {schedule.termination})",
            dict.fromkeys(e for i, c in keys for e in step.cause(f"remaining_{i}", c)),
        )

    def _solved(self, tasks: Sequence[Task], model: JointModel | None = None) -> Schedule:
        """A plan by the joint model, or by a variant of it."""
        model = model or self._model
        if model is None:
            raise ScenarioError(Reason.NO_PLAN, "the planner was not shown any flexibility")
        with telemetry.tracer.start_as_current_span("plan.solve", attributes={"tasks": len(tasks)}):
            began_s = time.perf_counter()
            schedule = model.solve(tasks)
            telemetry.solve_duration.record(time.perf_counter() - began_s)
        self._plans += 1
        return schedule


def _fit(horizon_ns: int) -> tuple[int, ...]:
    """The periods of a plan, cut to the horizon."""
    periods: list[int] = []
    for hours in PERIODS_H:
        left_ns = horizon_ns - sum(periods)
        if left_ns <= 0:
            break
        periods.append(min(hours * HOUR_NS, left_ns))
    return tuple(periods)
