"""Proposes orders for repair crews, of which level 5 follows the one that fares best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from federation.control.foresight import Proposer
from federation.control.loop import Comparison
from federation.core.bundle import Bundle, Setpoint
from federation.core.coupling import Coupling
from federation.errors import PlanError
from federation.plan.belief import Assessment
from federation.plan.crews import CrewPlanner, Family, Key, Order
from federation.plan.joint import JointModel, joint_model
from federation.plan.visits import Task
from federation.twin import HOUR_NS, NOTHING, Cut, Glimpse, LinearBlock, Renewing, Step, Vector


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


PLAIN = "joint plan"

NEAREST: Order = ()
"""The order of no plan: all crews go to the nearest."""

VARIANTS: Mapping[str, Mapping[str, float]] = {"hospitals first": {"medical": 30.0}}
"""Other weights of the members' costs in the joint model, tried at the first decision. Hospital
beds count there with what they cost, which says little of the lives that hang on them."""

RENEWED = "as things stand"
"""The plan of a model that was built anew: hospitals that have no power count there as such."""

LAST_H = 12.0
"""No thinking when so little of the run is left: nothing begun then ends in time."""

TAIL_SHARE, TAIL_RATE = 1.0 / 3.0, 0.5
"""Beyond the time that futures are followed, what they cost is taken to grow at half the rate of
the last third of that time. Without it a plan that begins with hospitals looked better than it
was: what it leaves without power and water for longer came after the end."""

LATER_FUTURES = 1
"""Later decisions try a new plan in one future: it rests on more than the old one knew."""

CORRECTED_SHARE = 0.3
"""Estimates that inspections have corrected since the last decision, over all work that was
believed in then, from which on it is worthwhile to think again."""

OFF_SHARE = 0.25
"""How far off a prediction must have been, in parts of itself, to be a reason to think again."""

QUIET_H = 12.0
"""Corrections alone are no reason to think again before this time has passed."""


class CrewProposer(CrewPlanner, Proposer[Situation, Order]):
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
        renew: bool = False,
    ) -> None:
        """`renew`: whether to plan also with what the members could do at the decision."""
        super().__init__(
            "level5", families, crews, period_ns, horizon_ns, couplings, assessment, offset_ns
        )
        self._renew = renew
        self._sources = tuple(sources)
        self._models: dict[str, JointModel] = {}
        self._style = PLAIN
        """The model whose plan won when it was tried first."""
        self._corrected_h = self._believed_h = 0.0

    def _state(self) -> dict[str, object]:
        outside = ("_sources", "_renew")
        return {n: value for n, value in super()._state().items() if n not in outside}

    @property
    def plans_made(self) -> int:
        return self._plans

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        super().prepare(blocks)
        assert self._model is not None
        self._models[PLAIN] = self._model
        for name, factors in VARIANTS.items():
            self._models[name] = self._weighed_model(blocks, factors)

    def reasons(self, step: Step) -> Sequence[str]:
        found = [
            event
            for i in range(len(self.families))
            for c in np.flatnonzero(step[f"remaining_{i}"] > 0)
            for event in step.cause(f"remaining_{i}", int(c))
        ]
        return list(dict.fromkeys(found))

    def observe(self, cut: Cut) -> Situation:
        def of(name: str) -> Vector:
            member, _, output = name.partition(".")
            return cut.seen(member, output)

        remaining = [of(source.remaining) for source in self._sources]
        busy = [of(source.busy) for source in self._sources]
        travel = [of(source.travel) for source in self._sources]
        self._belief.look(cut.time_ns, remaining)
        keys, tasks = self._tasks(self._belief.hours, busy, travel)
        return Situation(cut, remaining, busy, travel, keys, tasks)

    def occasion(self, situation: Situation, drift: Comparison | None) -> str:
        if not situation.tasks:
            return ""
        now_ns = situation.cut.time_ns
        if self._planned_ns is None:
            return "first damage"
        if situation.cut.horizon_ns - now_ns < LAST_H * HOUR_NS:
            return ""
        if drift is not None and abs(drift.observed - drift.predicted) > max(
            2.0 * drift.deviation, OFF_SHARE * abs(drift.predicted)
        ):
            return f"the last prediction was off by {drift.drift:+.0%}"
        if self._is_stale(now_ns, situation.remaining, situation.keys, situation.tasks):
            return "the plan is old or damage has come that it does not know"
        corrected_h = self._belief.corrected_h - self._corrected_h
        if (
            now_ns - self._planned_ns >= QUIET_H * HOUR_NS
            and corrected_h > CORRECTED_SHARE * self._believed_h
        ):
            return f"inspections have corrected {corrected_h:,.0f} crew-hours"
        return ""

    def first(self, situation: Situation) -> Sequence[Order]:
        """The plan of the joint model, or, where there is none, that crews go to the nearest."""
        return self._planned(situation, self._style) or NEAREST, NEAREST

    @property
    def followed(self) -> Order:
        return self._order

    def proposals(self, situation: Situation, is_first: bool) -> Mapping[str, Order]:
        """At first one for each of the other weights, later a new one with those that won."""
        found: dict[str, Order | None] = {}
        if self._renew and isinstance(situation.cut, Renewing):
            found |= self._renewed(situation, situation.cut)
        if not is_first:
            found[f"new {self._style}"] = self._planned(situation, self._style)
        else:
            for style in self._models:
                if style != self._style:
                    found[style] = self._planned(situation, style)
        return {n: order for n, order in found.items() if order and order != self._order}

    def _renewed(self, situation: Situation, cut: Renewing) -> dict[str, Order | None]:
        """A plan of each weighing, of what the members could do now."""
        blocks = cut.blocks(0, self._periods_ns)
        return {
            RENEWED if style == PLAIN else f"{style}, {RENEWED}": self._planned(
                situation, style, self._weighed_model(blocks, factors)
            )
            for style, factors in {PLAIN: NOTHING, **VARIANTS}.items()
        }

    def _weighed_model(
        self, blocks: Mapping[str, LinearBlock], factors: Mapping[str, float]
    ) -> JointModel:
        scaled = {
            member: replace(block, cost=block.cost * factors.get(member, 1.0))
            for member, block in blocks.items()
        }
        return joint_model(scaled, self._couplings, self._periods_ns, self._starts_ns, self.crews)

    def _planned(
        self, situation: Situation, style: str, model: JointModel | None = None
    ) -> Order | None:
        """The order of a plan with some weights; None when the solver finds none."""
        try:
            schedule = self._solved(situation.tasks, model or self._models[style])
        except PlanError:
            return None
        keys = situation.keys
        return tuple((keys[v.task], round(v.crews)) for v in schedule.visits if v.sent)

    def tail(self, cut: Cut, glimpse: Glimpse, until_ns: int) -> float:
        weighted = sum(weight * glimpse.growth(n, until_ns) for n, weight in cut.weights.items())
        last_ns = round(TAIL_SHARE * (until_ns - cut.time_ns))
        before = sum(w * glimpse.growth(n, until_ns - last_ns) for n, w in cut.weights.items())
        tail_ns = cut.horizon_ns - until_ns
        return TAIL_RATE * (weighted - before) * tail_ns / max(last_ns, 1)

    def believed(self, cut: Cut, number: int) -> dict[str, dict[str, Vector]]:
        """Work that may be the true one in a future, by member and output."""
        if self._assessment is None:
            return {}
        hours = self._belief.imagined(cut.time_ns + number)
        found: dict[str, dict[str, Vector]] = {}
        for source, values in zip(self._sources, hours, strict=True):
            member, _, output = source.remaining.partition(".")
            found.setdefault(member, {})[output] = values
        return found

    def setpoints(self, situation: Situation, plan: Order) -> Sequence[Setpoint]:
        """The crews that are free, sent in the order of a plan."""
        free = self._free(situation)
        setpoints = []
        for (i, c), crews in self._next(situation, plan):
            there = round(situation.busy[i][c])
            more = min(crews - there, free)
            if more > 0:
                free -= more
                family = self.families[i]
                component = family.components[c]
                setpoints.append(
                    Setpoint(family.member, family.actuator, component, float(there + more))
                )
        return setpoints

    def _free(self, situation: Situation) -> int:
        return round(self.crews - float(sum(b.sum() for b in situation.busy)))

    def _next(self, situation: Situation, plan: Order) -> list[tuple[Key, int]]:
        """The components that crews go to, in turn: the plan's, then the nearest."""
        planned = [(key, n) for key, n in plan if situation.remaining[key[0]][key[1]] > 0]
        named = {key for key, _ in planned}
        others = [
            (situation.travel[i][c], (i, c))
            for i, c in situation.keys
            if (i, c) not in named and situation.busy[i][c] == 0
        ]
        return planned + [(key, 1) for _, key in sorted(others)]

    def limits(self, situation: Situation, bundle: Bundle) -> Sequence[str]:
        """Whether setpoints are in the ranges of their actuators, and crews in their pool."""
        found = []
        used = float(sum(b.sum() for b in situation.busy))
        for setpoint in bundle.setpoints:
            i = next(
                i
                for i, f in enumerate(self.families)
                if (f.member, f.actuator) == (setpoint.member, setpoint.actuator)
            )
            family = self.families[i]
            there = situation.busy[i][family.components.index(setpoint.entity)]
            used += setpoint.value - float(there)
            if not 0.0 <= setpoint.value <= family.most_crews:
                found.append(
                    f"{setpoint.value:g} crews at {setpoint.entity}, where at most "
                    f"{family.most_crews:g} can work"
                )
        if used > self.crews:
            found.append(f"{used:g} crews, of which there are {self.crews:g}")
        return found

    def follow(self, plan: Order, name: str) -> None:
        self._order = plan
        self._style = name if name in self._models else self._style

    def decided(self, situation: Situation) -> None:
        self._planned_ns = situation.cut.time_ns
        self._corrected_h = self._belief.corrected_h
        self._believed_h = sum(task.work_h for task in situation.tasks)
        self._known = self._weighed = [r > 0 for r in situation.remaining]

    def binding(self, situation: Situation) -> Sequence[str]:
        sent = sum(s.value for s in self.setpoints(situation, self._order))
        if sent < self._free(situation):
            return ()
        return (f"all {self.crews:g} crews are engaged",)
