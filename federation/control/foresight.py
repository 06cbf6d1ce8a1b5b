"""The planner of level 5: it tries plans in futures of the run before it follows one."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from federation.control.loop import IN_FORCE, Comparison, Decision, Loop, Rating
from federation.core.bundle import Bundle, Priority, Setpoint
from federation.errors import Reason, ScenarioError
from federation.plan.keeping import States, are
from federation.twin import (
    NOTHING,
    SYSTEM,
    Cut,
    Description,
    Glimpse,
    LinearBlock,
    Planner,
    Step,
    Vector,
)

STATES = States(Decision, Rating, Comparison)

Screen = Callable[[Bundle], Sequence[str]]
"""Says why a bundle may not take effect; nothing when it may."""


class Known(Protocol):
    """What is known at a cut, for whoever makes plans of it."""

    @property
    def cut(self) -> Cut: ...


Situation = TypeVar("Situation", bound=Known)
Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Foreseeing:
    """How far plans are followed into futures; how many at the first decision, and later."""

    rehearse_ns: int
    futures: int
    later_futures: int


class Proposer(Planner, ABC, Generic[Situation, Plan]):
    """A planner that follows a plan of its own and can propose others.

    It has no say in what is followed: that is what the futures of the run decide.
    """

    @property
    @abstractmethod
    def plans_made(self) -> int:
        """How often a model was solved so far."""

    @abstractmethod
    def observe(self, cut: Cut) -> Situation:
        """What is known at a cut."""

    @abstractmethod
    def occasion(self, situation: Situation, drift: Comparison | None) -> str:
        """Why it is worthwhile to think now, in a few words; "" when it is not."""

    @abstractmethod
    def first(self, situation: Situation) -> Sequence[Plan]:
        """What to follow at first, the best first; the last may always be done."""

    @property
    @abstractmethod
    def followed(self) -> Plan:
        """The plan in force."""

    @abstractmethod
    def proposals(self, situation: Situation, is_first: bool) -> Mapping[str, Plan]:
        """Plans other than the one in force, by name."""

    @abstractmethod
    def follower(self, plan: Plan) -> Planner:
        """One that stands where this one does and follows a plan, whatever comes."""

    @abstractmethod
    def tail(self, cut: Cut, glimpse: Glimpse, until_ns: int) -> float:
        """What is to be reckoned with after a future was no longer followed."""

    @abstractmethod
    def setpoints(self, situation: Situation, plan: Plan) -> Sequence[Setpoint]:
        """What a plan sets at the next step."""

    @abstractmethod
    def limits(self, situation: Situation, bundle: Bundle) -> Sequence[str]:
        """The limits of actuators and pools that a bundle would break."""

    @abstractmethod
    def follow(self, plan: Plan, name: str) -> None:
        """Follow a plan from now on."""

    @abstractmethod
    def decided(self, situation: Situation) -> None:
        """Note what a decision was made of, so that the next one knows what is new."""

    def believed(self, cut: Cut, number: int) -> Mapping[str, Mapping[str, Vector]]:
        """Estimates that may be the truth in a future, by member and output."""
        return NOTHING

    def binding(self, situation: Situation) -> Sequence[str]:
        """The limits that the plan in force runs into, as far as they are known."""
        return ()

    def reasons(self, step: Step) -> Sequence[str]:
        """The events that a decision at this step goes back to."""
        return ()


class ForesightPlanner(Planner, Generic[Situation, Plan]):
    """Turns the loop of level 5 over a proposer: its plans are tried in futures of the run."""

    def __init__(
        self,
        own: Proposer[Situation, Plan],
        period_ns: int,
        ahead: Foreseeing,
        screen: Screen | None = None,
    ) -> None:
        self.own = own
        self._period_ns = period_ns
        self._ahead = ahead
        self._screen = screen
        self._has_deliberated = False
        self._told = 0

    def describe(self) -> Description:
        return self.own.describe()

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.own.open(seed, parameters)
        self.loop: Loop[Situation, Plan] = Loop(self, seed, time.perf_counter)

    def snapshot(self) -> bytes:
        state = (self.own.snapshot(), self.loop.memory(), self._has_deliberated, self._told)
        return STATES.pack(state)

    def restore(self, state: bytes) -> None:
        own, memory, self._has_deliberated, self._told = STATES.unpack(
            state, are(bytes, tuple, bool, int)
        )
        self.own.restore(own)
        self.loop = Loop(self, 0, time.perf_counter)
        self.loop.recall(memory)

    def periods_ns(self) -> tuple[int, ...]:
        return self.own.periods_ns()

    def prepare(self, blocks: Mapping[str, LinearBlock]) -> None:
        self.own.prepare(blocks)

    def foresees(self) -> bool:
        return True

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
            step.publish("plans_made", self.own.plans_made)
            step.emit("decision_made", SYSTEM, decision.sentence(), self.own.reasons(step))
        self.own.advance(step)

    # -- the stages --------------------------------------------------------------------------

    def observe(self, cut: Cut) -> Situation:
        return self.own.observe(cut)

    def observed(self, situation: Situation) -> float:
        cut = situation.cut
        total = 0.0
        for name, weight in cut.weights.items():
            member, _, output = name.partition(".")
            total += weight * float(cut.seen(member, output)[0])
        return total

    def occasion(self, situation: Situation, drift: Comparison | None) -> str:
        return self.own.occasion(situation, drift)

    def until_ns(self, situation: Situation) -> int:
        return min(situation.cut.time_ns + self._ahead.rehearse_ns, situation.cut.horizon_ns)

    def forecast(self, situation: Situation) -> Rating:
        """At first the first plan that the guard lets pass is put in force."""
        if self._is_first():
            *plans, safe = self.own.first(situation)
            allowed = (plan for plan in plans if not self.guard(situation, plan))
            self.own.follow(next(allowed, safe), IN_FORCE)
        return self._tried(situation, Rating(IN_FORCE, (), {}), self.own.followed)

    def plan(self, situation: Situation) -> Mapping[str, Plan]:
        return self.own.proposals(situation, self._is_first())

    def verify(
        self, situation: Situation, plans: Mapping[str, Plan], in_force: Rating
    ) -> Sequence[Rating]:
        """Future by future: who is worse than the plan in force so far is tried in no other."""
        ratings = {name: Rating(name, (), {}) for name in plans}
        alive = list(plans)
        futures = self._ahead.futures if self._is_first() else self._ahead.later_futures
        for number in range(futures):
            if alive and number:
                in_force = self._tried(situation, in_force, self.own.followed)
            for name in tuple(alive):
                ratings[name] = self._tried(situation, ratings[name], plans[name])
                if ratings[name].less(in_force)[0] <= 0.0:
                    alive.remove(name)
        return [in_force, *ratings.values()]

    def guard(self, situation: Situation, plan: Plan) -> Sequence[str]:
        bundle = self.bundle(situation, plan)
        if self._screen is None:
            return self.own.limits(situation, bundle)
        return self._screen(bundle)

    def act(self, situation: Situation, name: str, plan: Plan | None) -> str:
        if plan is not None:
            self.own.follow(plan, name)
        self.own.decided(situation)
        return hashlib.sha256(repr(self.own.followed).encode()).hexdigest()

    def binding(self, situation: Situation, name: str) -> Sequence[str]:
        return self.own.binding(situation)

    def record(self, decision: Decision) -> None:
        return None

    # ----------------------------------------------------------------------------------------

    def _is_first(self) -> bool:
        return not self.loop.decisions

    def _tried(self, situation: Situation, rating: Rating, plan: Plan) -> Rating:
        """A rating with one more future."""
        cut, until_ns, number = situation.cut, self.until_ns(situation), len(rating.weighted)
        believed = self.own.believed(cut, number)
        glimpse = cut.future(number, self.own.follower(plan), until_ns, believed)
        growth = {n: glimpse.growth(n, until_ns) for n in cut.weights}
        weighted = sum(weight * growth[n] for n, weight in cut.weights.items())
        means = {
            figure: (rating.figures.get(figure, 0.0) * number + value) / (number + 1)
            for figure, value in growth.items()
        }
        tail = self.own.tail(cut, glimpse, until_ns)
        return Rating(rating.name, (*rating.weighted, weighted), means, (*rating.tails, tail))

    def bundle(self, situation: Situation, plan: Plan) -> Bundle:
        """What a plan sets at the next step, as a guard wants to see it."""
        cut = situation.cut
        digest = hashlib.sha256(f"{cut.digest}/{plan}".encode()).hexdigest()
        return Bundle(
            f"level5-{cut.time_ns}-{digest[:12]}",
            "",
            tuple(self.own.setpoints(situation, plan)),
            Priority.AUTONOMOUS,
            cut.time_ns,
            cut.time_ns + self._period_ns,
            "planner",
            digest,
        )
