"""The crew planner of level 5: it tries its plans in futures of the run before it follows one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from federation.control.loop import IN_FORCE, Comparison, Decision, Loop, Rating
from federation.core.bundle import Bundle, Priority
from federation.core.coupling import Coupling
from federation.errors import Reason, ScenarioError
from federation.plan.belief import Assessment
from federation.plan.crews import CrewPlanner, Family, Key, Order
from federation.plan.joint import JointModel, joint_model
from federation.plan.visits import Task
from federation.twin import SYSTEM, Cut, LinearBlock, Step, Vector

Screen = Callable[[Bundle], Sequence[str]]
"""Says why a bundle may not take effect; nothing when it may."""


@dataclass(frozen=True)
class Sources:
    """The outputs that tell of one family: work left, crews engaged, travel from the depot."""

    remaining: str
    busy: str
    travel: str


@dataclass
class Situation:
    """What is known at a cut."""

    cut: Cut
    remaining: list[Vector]
    busy: list[Vector]
    travel: list[Vector]
    keys: list[Key]
    tasks: list[Task]
    weighted: float


@dataclass(frozen=True)
class Foreseeing:
    """How far and how often `level5` looks ahead."""

    rehearse_ns: int
    futures: int


VARIANTS: Mapping[str, Mapping[str, float]] = {
    "hospitals first": {"medical": 30.0},
}


class ForesightPlanner(CrewPlanner):
    """Sends crews as `plan` does, but by a plan that has been tried in futures of the run."""

    def __init__(
        self,
        families: Sequence[Family],
        sources: Sequence[Sources],
        crews: float,
        period_ns: int,
        horizon_ns: int,
        couplings: Sequence[Coupling],
        assessment: Assessment | None,
        offset_ns: int,
        ahead: Foreseeing,
        screen: Screen | None = None,
    ) -> None:
        super().__init__(
            "level5", families, crews, period_ns, horizon_ns, couplings, assessment, offset_ns
        )
        self._sources = tuple(sources)
        self._ahead = ahead
        self._screen = screen
        self._variants: dict[str, JointModel] = {}
        self._has_deliberated = False
        self._told = 0

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        super().open(seed, parameters)
        self.loop: Loop[Situation, Order] = Loop(self, seed, time.perf_counter)

    def foresees(self) -> bool:
        return True

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        super().prepare(blocks)
        for name, factors in VARIANTS.items():
            scaled = {
                member: replace(block, cost=block.cost * factors.get(member, 1.0))
                for member, block in blocks.items()
            }
            self._variants[name] = joint_model(
                scaled, self._couplings, self._periods_ns, self._starts_ns, self.crews
            )

    def deliberate(self, cut: Cut) -> None:
        self._has_deliberated = True
        self.loop.turn(cut)

    def advance(self, step: Step) -> None:
        if not self._has_deliberated:
            raise ScenarioError(
                Reason.UNSUPPORTED,
                "level5 rehearses in forks of the run, which only a run in one process has: "
                "use --members local",
            )
        for decision in self.loop.decisions[self._told :]:
            self._told += 1
            step.publish("plans_made", self._plans)
            step.emit("decision_made", SYSTEM, decision.sentence(), self._reasons(step))
        super().advance(step)

    def _reasons(self, step: Step) -> list[str]:
        found = [
            event
            for i in range(len(self.families))
            for c in np.flatnonzero(step[f"remaining_{i}"] > 0)
            for event in step.cause(f"remaining_{i}", int(c))
        ]
        return list(dict.fromkeys(found))

    # -- the stages --------------------------------------------------------------------------

    def observe(self, cut: Cut) -> Situation:
        def of(name: str) -> Vector:
            member, _, output = name.partition(".")
            return cut.seen(member, output)

        remaining = [of(source.remaining) for source in self._sources]
        busy = [of(source.busy) for source in self._sources]
        travel = [of(source.travel) for source in self._sources]
        self._belief.look(cut.time_ns, remaining)
        keys, tasks = self._tasks(self._belief.hours, busy, travel)
        weighted = sum(weight * float(of(name)[0]) for name, weight in cut.weights.items())
        return Situation(cut, remaining, busy, travel, keys, tasks, weighted)

    def observed(self, situation: Situation) -> float:
        return situation.weighted

    def occasion(self, situation: Situation, drift: Comparison | None) -> str:
        if not situation.tasks:
            return ""
        now_ns = situation.cut.time_ns
        if self._planned_ns is None:
            return "first damage"
        if self._is_stale(now_ns, situation.remaining, situation.keys, situation.tasks):
            return "new damage or an old plan"
        return ""

    def until_ns(self, situation: Situation) -> int:
        return min(situation.cut.time_ns + self._ahead.rehearse_ns, situation.cut.horizon_ns)

    def forecast(self, situation: Situation) -> Rating:
        if self._planned_ns is None:
            self._order = self._planned(situation, self._model)
        return self._rated(situation, IN_FORCE, self._order)

    def plan(self, situation: Situation) -> Mapping[str, Order]:
        found: dict[str, Order] = {}
        if self._planned_ns is not None:
            found["joint plan"] = self._planned(situation, self._model)
        found["nearest first"] = ()
        for name, model in self._variants.items():
            found[name] = self._planned(situation, model)
        return {n: order for n, order in found.items() if order != self._order}

    def _planned(self, situation: Situation, model: JointModel | None) -> Order:
        schedule = self._solved(situation.tasks, model)
        keys = situation.keys
        return tuple((keys[v.task], round(v.crews)) for v in schedule.visits if v.sent)

    def verify(self, situation: Situation, name: str, plan: Order, best: Rating) -> Rating:
        return self._rated(situation, name, plan)

    def _rated(self, situation: Situation, name: str, order: Order) -> Rating:
        cut, until_ns = situation.cut, self.until_ns(situation)
        weighted: list[float] = []
        figures: dict[str, float] = dict.fromkeys(cut.weights, 0.0)
        for number in range(self._ahead.futures):
            glimpse = cut.future(
                number, self.follower(order), until_ns, self._believed(cut, number)
            )
            growth = {n: glimpse.growth(n, until_ns) for n in cut.weights}
            weighted.append(sum(weight * growth[n] for n, weight in cut.weights.items()))
            for figure, value in growth.items():
                figures[figure] += value / self._ahead.futures
        return Rating(name, tuple(weighted), figures)

    def _believed(self, cut: Cut, number: int) -> dict[str, dict[str, Vector]]:
        """Work that may be the true one in a future, by member and output."""
        if self._assessment is None:
            return {}
        hours = self._belief.imagined(cut.time_ns + number)
        found: dict[str, dict[str, Vector]] = {}
        for source, values in zip(self._sources, hours, strict=True):
            member, _, output = source.remaining.partition(".")
            found.setdefault(member, {})[output] = values
        return found

    def guard(self, situation: Situation, plan: Order) -> Sequence[str]:
        return () if self._screen is None else self._screen(self.bundle(situation, plan))

    def bundle(self, situation: Situation, plan: Order) -> Bundle:
        """What would be set at once: the crews that are free, in the order of the plan."""
        return Bundle("", "", (), Priority.AUTONOMOUS, situation.cut.time_ns, 0, "")

    def act(self, situation: Situation, name: str, plan: Order | None) -> str:
        if plan is not None:
            self._order = plan
        self._planned_ns = situation.cut.time_ns
        self._known = self._weighed = [r > 0 for r in situation.remaining]
        return hashlib.sha256(repr(self._order).encode()).hexdigest()

    def binding(self, situation: Situation, name: str) -> Sequence[str]:
        return ()

    def record(self, decision: Decision) -> None:
        return None
