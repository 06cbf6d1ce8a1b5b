"""Proposes setpoints by plans and rules, of which level 5 follows those that fare best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from federation.control.foresight import Proposer
from federation.control.loop import Comparison
from federation.core.bundle import Bundle, Setpoint
from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason, ScenarioError
from federation.plan.dispatch import (
    BY_RULE,
    KEPT,
    NOTHING_SET,
    SAME,
    Control,
    Course,
    DispatchModel,
    DispatchPlanner,
    Rule,
)
from federation.plan.keeping import States, are
from federation.twin import Cut, Glimpse, OpenCut, Step

FINE, COARSE = 24, 3
"""A plan has the periods of the decisions for so many of them, then some that are so many long."""

OVER_SHARE = 0.02
"""What is taken off in vain, over all that can be, from which on it is worthwhile to think."""

LEAST_USD = 1.0
"""A limit that costs less than this per unit and period does not bind."""

LEAST_DECISIONS = 1
"""No thinking when no more decisions than this are left: the run ends when it takes effect."""


@dataclass
class Situation:
    """What is known at a cut: the news, what lacks, and what is taken off out of how much."""

    cut: OpenCut
    news: tuple[bytes, ...]
    lacking: float
    taken: float
    most: float
    new: Course | None = None
    """The new plan, as soon as it has been made."""


@dataclass
class _Notes:
    """What is remembered between decisions, besides what every planner remembers."""

    news: tuple[bytes, ...] | None = None
    pending: Course | None = None
    """A plan made of news that did not matter yet."""
    worth: dict[str, float] = field(default_factory=dict)
    """What it costs later when a unit of a figure, by `member.output`, is used now."""


STATES = States(*KEPT, _Notes)


class DispatchProposer(DispatchPlanner, Proposer[Situation, Course]):
    """Sets actuators by a plan, or by the rules, that has been tried in futures of the run.

    It thinks again when there is `news` (outputs, as `member.output`) and when far more is taken
    off than lacks; but not while nothing would be set within `ahead_ns` anyway.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        rules: Sequence[Rule],
        period_ns: int,
        delay_ns: int,
        horizon_ns: int,
        couplings: Sequence[Coupling],
        members: Sequence[str] | None,
        sources: Mapping[tuple[str, str], tuple[str, str]],
        entities: Mapping[str, tuple[str, ...]],
        news: Sequence[str],
        ahead_ns: int,
    ) -> None:
        super().__init__(
            "level5",
            controls,
            rules,
            period_ns,
            delay_ns,
            horizon_ns,
            couplings,
            members,
            sources,
            entities,
        )
        self._news = tuple(news)
        self._ahead_ns = ahead_ns
        self._notes = _Notes()

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        super().open(seed, parameters)
        self._notes = _Notes()

    def snapshot(self) -> bytes:
        return STATES.pack((self._memory, self._notes))

    def restore(self, state: bytes) -> None:
        self._memory, self._notes = STATES.unpack(state, are(KEPT[0], _Notes))

    @property
    def plans_made(self) -> int:
        return self._memory.plans

    @property
    def followed(self) -> Course:
        return self._memory.course

    def observe(self, cut: Cut) -> Situation:
        if not hasattr(cut, "believed_blocks"):
            raise ScenarioError(Reason.UNSUPPORTED, "this run can't be asked for new plans")
        news = tuple(cut.seen(*_pair(name)).tobytes() for name in self._news)
        lacking = max((float(cut.seen(*rule.lacking)[0]) for rule in self.rules), default=0.0)
        taken = most = 0.0
        for rule in self.rules:
            control, values = self.controls[rule.control], self._memory.set_to[rule.control]
            size = cut.seen(*rule.size) if rule.size else np.full(len(values), rule.value)
            if not rule.store or cut.seen(*rule.store)[0] > 0.0:
                taken += float(((values - control.safe) / (rule.value - control.safe)) @ size)
                most += float(size.sum())
        return Situation(cast(OpenCut, cut), news, lacking, taken, most)

    def occasion(self, situation: Situation, drift: Comparison | None) -> str:
        cut, before = situation.cut, self._notes.news
        if cut.horizon_ns - cut.time_ns <= LEAST_DECISIONS * self._period_ns:
            return ""
        is_first, before = before is None, before or (b"",) * len(self._news)
        fresh = [
            name
            for name, was, now in zip(self._news, before, situation.news, strict=True)
            if was != now
        ]
        if fresh or is_first:
            self._propose(situation)
            self._notes.news, self._notes.pending = situation.news, situation.new
            if situation.new is None:
                return "there is no new plan"
        pending = self._notes.pending
        if pending is not None:
            if not self._sets_anything((self.followed, pending), cut):
                return ""
            return f"news of {' and '.join(fresh)}" if fresh else "what is forecast has come near"
        if self.followed.name == "rule" or max(situation.taken, situation.lacking) <= 0.0:
            return ""
        if situation.taken - situation.lacking > OVER_SHARE * situation.most:
            return f"{situation.taken:,.0f} are taken off where {situation.lacking:,.0f} lack"
        return ""

    def first(self, situation: Situation) -> Sequence[Course]:
        """A new plan, or, where there is none, the rules."""
        self._propose(situation)
        return situation.new or BY_RULE, BY_RULE, NOTHING_SET

    def proposals(self, situation: Situation, is_first: bool) -> Mapping[str, Course]:
        """A new plan, what operators do without one, and nothing."""
        self._propose(situation)
        found = {"the rules": BY_RULE, "nothing": NOTHING_SET}
        if situation.new is not None:
            found = {"a new plan": situation.new, **found}
        mine = self.followed
        return {n: c for n, c in found.items() if (c.name, c.plan) != (mine.name, mine.plan)}

    def _propose(self, situation: Situation) -> None:
        """Make a new plan, once for each cut; none where the solver finds none."""
        if situation.new is not None:
            return
        cut = situation.cut
        from_ns = cut.time_ns + self._delay_ns
        left_ns = min(cut.horizon_ns - from_ns, self._horizon_ns)
        periods_ns = _periods(left_ns, self._period_ns)
        blocks = cut.believed_blocks(from_ns, periods_ns, self._members or ())
        model = DispatchModel(blocks, self._couplings, periods_ns, self.controls)
        try:
            plan = model.solve(from_ns, self._members, weighs_idle=False)
        except PlanError:
            return
        self._memory.plans += 1
        situation.new = Course("plan", plan)
        self._notes.worth = {
            f"{member}.{port}": -float(price[0, 0])
            for (member, port), price in plan.prices.items()
            if f"{member}.{port}" in cut.weights
        }

    def _sets_anything(self, courses: Sequence[Course], cut: Cut) -> bool:
        """Whether one of them sets what is not safe within the time that is looked ahead."""
        decisions = range(cut.time_ns, cut.time_ns + self._ahead_ns, self._period_ns)
        return any(
            course.name == "rule"
            or (
                course.plan is not None
                and any(course.plan.setpoints(at_ns + self._delay_ns) for at_ns in decisions)
            )
            for course in courses
        )

    def tail(self, cut: Cut, glimpse: Glimpse, until_ns: int) -> float:
        """What has been used of stores that would have been of worth later."""
        if until_ns >= cut.horizon_ns:
            return 0.0
        worth = self._notes.worth
        return sum(usd * glimpse.growth(name, until_ns) for name, usd in worth.items())

    def setpoints(self, situation: Situation, plan: Course) -> Sequence[Setpoint]:
        wanted, _ = self._wanted(plan, situation.cut.time_ns, lambda s: situation.cut.seen(*s))
        return [
            Setpoint(control.member, control.actuator, entity, float(value))
            for control, values in zip(self.controls, wanted, strict=True)
            for entity, value in zip(control.entities, values, strict=True)
            if abs(value - control.safe) > SAME
        ]

    def limits(self, situation: Situation, bundle: Bundle) -> Sequence[str]:
        """Whether setpoints are in the ranges of their actuators."""
        ranges = {(c.member, c.actuator): (c.low, c.high) for c in self.controls}
        found = []
        for setpoint in bundle.setpoints:
            low, high = ranges[setpoint.member, setpoint.actuator]
            if not low <= setpoint.value <= high:
                found.append(
                    f"{setpoint.actuator} of {setpoint.value:g} at {setpoint.entity}, which may be "
                    f"{low:g} to {high:g}"
                )
        return found

    def follow(self, plan: Course, name: str) -> None:
        self._memory.course = plan

    def decided(self, situation: Situation) -> None:
        self._notes.news, self._notes.pending = situation.news, None

    def binding(self, situation: Situation) -> Sequence[str]:
        plan = self.followed.plan
        period = plan.period(situation.cut.time_ns + self._delay_ns) if plan else None
        if plan is None or period is None:
            return ()
        return tuple(
            f"{member}.{port}: one more would save {float(price[:, period].max()):,.0f} USD"
            for (member, port), price in plan.prices.items()
            if price.shape[1] == len(plan.periods_ns) and price[:, period].max() > LEAST_USD
        )

    def reasons(self, step: Step) -> Sequence[str]:
        names = self.inputs()
        found = [cause for rule in self.rules for cause in step.cause(names[rule.lacking], 0)]
        return list(dict.fromkeys(found))


def _periods(left_ns: int, period_ns: int) -> tuple[int, ...]:
    """As many periods as decisions at first, then longer ones, up to what is left."""
    fine = min(FINE, -(-left_ns // period_ns))
    found = [period_ns] * fine
    left_ns -= fine * period_ns
    while left_ns > 0:
        found.append(min(COARSE * period_ns, left_ns))
        left_ns -= found[-1]
    return tuple(found)


def _pair(name: str) -> tuple[str, str]:
    member, _, output = name.partition(".")
    return member, output
