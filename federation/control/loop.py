"""Turns the closed loop of level 5 once per look: from a cut to a decision that can be told.

The stages come from outside, so that the same loop runs in a rehearsed run and over a live
federation. It neither waits nor draws lots: the same cut, stages and seed give the same record.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Generic, Protocol, TypeVar

from federation import telemetry
from federation.twin import HOUR_NS, Cut

Situation = TypeVar("Situation")
Plan = TypeVar("Plan")

STAGES = ("observe", "compare", "forecast", "plan", "verify", "guard", "act", "record")

IN_FORCE = "in force"
"""The name of the plan that is followed already."""


@dataclass(frozen=True)
class Rating:
    """What a plan came to in the futures that it was tried in, from the cut on.

    `weighted` holds one sum per future, smaller is better; `figures` the mean growth of each.
    `tails` are what is reckoned with in each future after it was no longer followed: they count
    when plans are compared, and not in what is predicted.
    """

    name: str
    weighted: tuple[float, ...]
    figures: Mapping[str, float]
    tails: tuple[float, ...] = ()

    @property
    def whole(self) -> tuple[float, ...]:
        """Per future what was followed, and its tail."""
        if not self.tails:
            return self.weighted
        return tuple(w + t for w, t in zip(self.weighted, self.tails, strict=True))

    @property
    def mean(self) -> float:
        return sum(self.weighted) / len(self.weighted)

    @property
    def deviation(self) -> float:
        """Between futures; 0 for one."""
        return _deviation(self.weighted)

    def less(self, other: Rating) -> tuple[float, float]:
        """By how much it is below another in the futures that both were tried in: the mean, and
        its standard error, which is 0 for one future."""
        apart = [b - a for a, b in zip(self.whole, other.whole, strict=False)]
        error = _deviation(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
        return sum(apart) / len(apart), error


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


@dataclass(frozen=True)
class Comparison:
    """What a decision had predicted of the weighted figure, and what it was at `at_ns`."""

    decision: int
    at_ns: int
    predicted: float
    deviation: float
    observed: float

    @property
    def drift(self) -> float:
        """How far off, in parts of what was predicted."""
        return (self.observed - self.predicted) / max(abs(self.predicted), 1e-9)


@dataclass(frozen=True)
class Decision:
    """The record of one turn: what was known, what was tried, what was chosen and why."""

    number: int
    cut_ns: int
    cut_digest: str
    versions: Mapping[str, str]
    seed: int
    occasion: str
    until_ns: int
    ratings: tuple[Rating, ...]
    """Of all candidates, the best first: those behind the chosen one are its near misses."""
    chosen: str
    why: str
    setpoints: str
    """The digest of the plan that is followed from now on."""
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By candidate why the guard let it not pass."""
    binding: tuple[str, ...] = ()
    """The limits that the chosen plan runs into."""

    def rating(self, name: str) -> Rating:
        return next(r for r in self.ratings if r.name == name)

    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def sentence(self) -> str:
        hours = (self.until_ns - self.cut_ns) / HOUR_NS
        mine = self.rating(self.chosen)
        apart = [(r.name, -r.less(mine)[0]) for r in self.ratings if r is not mine]
        others = ", ".join(f"{name} {more:+,.0f}" for name, more in apart)
        return (
            f"{self.occasion}: {self.chosen} is followed, {self.why}; {mine.mean:,.0f} expected "
            f"within {hours:.0f} h in {len(mine.weighted)} futures"
            + (f", against which {others}" if others else "")
        )


Memory = tuple[int, tuple[Decision, ...], tuple[Comparison, ...], float]
"""Seed, decisions, comparisons, and the weighted figure at the last decision."""


class Stages(Protocol[Situation, Plan]):
    """What the loop does in each of its stages."""

    def observe(self, cut: Cut) -> Situation: ...

    def observed(self, situation: Situation) -> float:
        """The weighted figure of the run as it stands at the cut."""
        ...

    def occasion(self, situation: Situation, drift: Comparison | None) -> str:
        """Why it is worthwhile to think now, in a few words; "" when it is not."""
        ...

    def until_ns(self, situation: Situation) -> int:
        """How far futures are followed."""
        ...

    def forecast(self, situation: Situation) -> Rating:
        """The plan in force, named IN_FORCE, in a first future."""
        ...

    def plan(self, situation: Situation) -> Mapping[str, Plan]:
        """Other plans, by name."""
        ...

    def verify(
        self, situation: Situation, plans: Mapping[str, Plan], in_force: Rating
    ) -> Sequence[Rating]:
        """All plans in the same futures, and the one in force in as many as any of them."""
        ...

    def guard(self, situation: Situation, plan: Plan) -> Sequence[str]:
        """Why it may not be done; empty when it may."""
        ...

    def act(self, situation: Situation, name: str, plan: Plan | None) -> str:
        """Follow a plan, or with None the one in force; a digest of what is now followed."""
        ...

    def binding(self, situation: Situation, name: str) -> Sequence[str]:
        """The limits that a plan runs into, in words, as far as they are known."""
        ...

    def record(self, decision: Decision) -> None: ...


class Loop(Generic[Situation, Plan]):
    """Observe, forecast, plan, verify, guard, act, compare, record.

    A plan takes the place of the one in force when it is better in the mean of the same futures
    by more than `noise` standard errors of their difference; one that was dropped before it was
    tried in all of them does not. `clock` gives seconds and only
    measures (`spent_s`).
    """

    def __init__(
        self,
        stages: Stages[Situation, Plan],
        seed: int,
        clock: Callable[[], float],
        noise: float = 1.0,
    ) -> None:
        self.stages = stages
        self.seed = seed
        self.noise = noise
        self.decisions: list[Decision] = []
        self.comparisons: list[Comparison] = []
        self.spent_s = dict.fromkeys(STAGES, 0.0)
        self._clock = clock
        self._base = 0.0
        """The weighted figure at the cut of the last decision."""

    def memory(self) -> Memory:
        """All that a loop carries from turn to turn."""
        return self.seed, tuple(self.decisions), tuple(self.comparisons), self._base

    def recall(self, memory: Memory) -> None:
        """Go on from there."""
        self.seed, decisions, comparisons, self._base = memory
        self.decisions, self.comparisons = list(decisions), list(comparisons)

    def turn(self, cut: Cut) -> Decision | None:
        """Look once; the decision when there was occasion for one."""
        stages = self.stages
        with self._stage("observe"):
            situation = stages.observe(cut)
        with self._stage("compare"):
            drift = self._compare(cut, situation)
            occasion = stages.occasion(situation, drift)
        if not occasion:
            return None
        with self._stage("forecast"):
            in_force = stages.forecast(situation)
        with self._stage("plan"):
            plans = dict(stages.plan(situation))
        with self._stage("verify"):
            ratings = [*stages.verify(situation, plans, in_force)]
        in_force = next(rating for rating in ratings if rating.name == IN_FORCE)
        ratings.sort(key=lambda rating: -rating.less(in_force)[0])
        with self._stage("guard"):
            chosen, why, refused = self._choose(situation, in_force, ratings, plans)
        until_ns = stages.until_ns(situation)
        with self._stage("act"):
            setpoints = stages.act(situation, chosen, plans.get(chosen))
        with self._stage("record"):
            decision = Decision(
                len(self.decisions) + 1,
                cut.time_ns,
                cut.digest,
                dict(cut.versions),
                self.seed,
                occasion,
                until_ns,
                tuple(ratings),
                chosen,
                why,
                setpoints,
                refused,
                tuple(stages.binding(situation, chosen)),
            )
            self.decisions.append(decision)
            self._base = stages.observed(situation)
            stages.record(decision)
        return decision

    def _choose(
        self,
        situation: Situation,
        in_force: Rating,
        ratings: Sequence[Rating],
        plans: Mapping[str, Plan],
    ) -> tuple[str, str, dict[str, tuple[str, ...]]]:
        """The best that is clearly better than the plan in force and that the guard lets pass."""
        refused: dict[str, tuple[str, ...]] = {}
        for rating in ratings:
            if rating is in_force:
                break
            gain, error = rating.less(in_force)
            if gain <= self.noise * error or len(rating.weighted) < len(in_force.weighted):
                continue
            found = tuple(self.stages.guard(situation, plans[rating.name]))
            if not found:
                why = f"{gain:,.0f} ± {error:,.0f} less than what is in force"
                return rating.name, why, refused
            refused[rating.name] = found
        return in_force.name, "nothing that may be done is clearly better", refused

    def _compare(self, cut: Cut, situation: Situation) -> Comparison | None:
        """What the last decision predicted, when its time has passed."""
        if not self.decisions:
            return None
        last = self.decisions[-1]
        if cut.time_ns < last.until_ns or any(c.decision == last.number for c in self.comparisons):
            return None
        rating = last.rating(last.chosen)
        observed = self.stages.observed(situation) - self._base
        found = Comparison(last.number, cut.time_ns, rating.mean, rating.deviation, observed)
        self.comparisons.append(found)
        return found

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began_s = self._clock()
        with telemetry.tracer.start_as_current_span(f"loop.{name}"):
            try:
                yield
            finally:
                self.spent_s[name] += self._clock() - began_s
