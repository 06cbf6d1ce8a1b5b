"""The rules that the twins' owners set for a loop that acts by itself: one YAML document, versioned
and checked to the line.

What a document does not name is denied: an actuator without a rule is not autonomous, a value
without a rule is no ground to act on, a twin and action without a grant are advice. Every limit of
an actuator must be given, so that none is wide because somebody forgot it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from federation.errors import Reason, ScenarioError
from federation.scenario.spec import Document, Part, Variable
from federation.twin import MINUTE_NS, Actuator, Causality, Description

Level = Literal[3, 4, 5]
"""3: the loop advises. 4: it acts when persons have confirmed. 5: it acts."""


def _number(value: float) -> float:
    if math.isnan(value):
        raise ValueError("not a number")
    return value


Bound = Annotated[float, AfterValidator(_number)]
"""A number or an infinity: a comparison with NaN would let everything pass."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Span = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Count(Part):
    """At most so many within any span of so long."""

    at_most: int = Field(ge=0)
    within_min: Positive

    @property
    def within_ns(self) -> int:
        return round(self.within_min * MINUTE_NS)


class Amount(Part):
    """At most so much, in the actuator's unit, added up within any span of so long."""

    at_most: Positive
    within_min: Positive

    @property
    def within_ns(self) -> int:
        return round(self.within_min * MINUTE_NS)


class Blast(Count):
    """How many entities, and which share of all of the kind, may be changed within a span."""

    share: float = Field(default=1.0, gt=0, le=1)


class ActuatorRule(Part):
    """What the loop may do with one actuator, each entity of it for itself unless it says so.

    A setpoint that repeats what is in force changes nothing and counts for nothing.
    """

    low: Bound = Field(default=-math.inf, description="as the actuator declares")
    high: Bound = Field(default=math.inf, description="as the actuator declares")
    change: Amount = Field(description="the sum of all changes of an entity, up or down")
    changes: Count = Field(description="changes of all entities together")
    entities: Blast
    reversals: Count = Field(description="changes of an entity against the one before")
    lease_min: Positive = Field(description="the longest that a setpoint may hold")
    needs: tuple[Variable, ...] = Field(default=(), description="must be usable when it acts")


class Usable(Part):
    """When a value is good enough to act on."""

    age_min: Positive = Field(description="of the run, since it was last told")
    quality: tuple[Literal["good", "held", "substituted", "stale"], ...] = ("good",)
    clock_s: Positive = Field(default=1.0, description="how far its source's clock may be off")

    @property
    def age_ns(self) -> int:
        return round(self.age_min * MINUTE_NS)


class Term(Part):
    """An actuator or output within `low` and `high`: of one entity, or of any."""

    of: Variable
    entity: str = ""
    low: Bound = -math.inf
    high: Bound = math.inf


class Exclusion(Part):
    """Not all of its terms at once; a term over an output is judged when the loop acts."""

    name: str
    terms: tuple[Term, ...] = Field(min_length=2)


class Sum(Part):
    """A weighted sum over all entities of some actuators stays within limits."""

    name: str
    over: dict[Variable, Finite] = Field(min_length=1)
    at_most: Bound = math.inf
    at_least: Bound = -math.inf


class Never(Part):
    """No entity's output may be below `low` or above `high` for over `for_over_min`.

    The switch to the recovery plan comes `margin_min` before that. With `forecast_min` a plan must
    come with a forecast that reaches so far.
    """

    name: str
    variable: Variable
    low: Bound = -math.inf
    high: Bound = math.inf
    for_over_min: Span
    margin_min: Span = 0.0
    forecast_min: Span = 0.0

    @model_validator(mode="after")
    def _margin(self) -> Self:
        if self.margin_min > self.for_over_min:
            raise ValueError(f"the margin of {self.name} is longer than what it is a margin of")
        return self


class RecoverySetpoint(Part):
    """What the recovery plan sets instead of the safe default."""

    of: Variable
    entity: str
    value: Finite


class Recovery(Part):
    """What takes the place of the loop: its setpoints, and every other one at its safe default.

    The loop gets its place back after `returns_after` good decisions in a row. When no decision
    comes, the last one that passed may stand for `grace_min`.
    """

    name: str
    setpoints: tuple[RecoverySetpoint, ...] = ()
    lease_min: Positive
    returns_after: PositiveInt
    grace_min: Span = 0.0


class Evidence(Part):
    """What shadow decisions must show: with `confidence`, a mean regret of at most `regret`.

    Regret is what the decision would have cost beyond the better one of what the operator did and
    the simulated alternative, in the unit of the weighted KPI. A block of `decisions` is judged
    once, when it is full. A single regret beyond `worst` fails the block, and so does a decision
    that the guard would have refused.
    """

    decisions: int = Field(ge=2)
    regret: Finite
    worst: Positive
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.regret < self.worst:
            raise ValueError("the mean regret that is allowed must be below the worst")
        if self.slack(1, 0.0) > self.regret:
            text = f"{self.decisions} decisions can't show it: without any regret and any spread "
            raise ValueError(f"{text}the bound is {self.slack(1, 0.0):.3g}")
        return self

    def slack(self, block: int, variance: float) -> float:
        """What the bound of `control.autonomy` adds to the mean of a block, counting from 1."""
        n = self.decisions
        log = math.log(2 * block * (block + 1) / (1 - self.confidence))
        return math.sqrt(2 * variance * log / n) + 2 * self.worst * 7 * log / (3 * (n - 1))


class Drift(Part):
    """When what is observed has left what was predicted, in standard deviations of the forecast.

    Two cumulative sums (Page 1954), S+ = max(0, S+ + z - slack) and S- with -z, call at `limit`; a
    single |z| calls beyond `band`.
    """

    slack: Span = 0.5
    limit: Positive = 5.0
    band: Positive = 6.0


class Grant(Part):
    """How far one twin's action class may go under one operator."""

    twin: str
    action: str = Field(description="an actuator, or a class of `classes`")
    operator: str
    start: Literal[3, 4] = Field(default=3, description="5 can only be earned")
    at_most: Level = 5

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.start > self.at_most:
            raise ValueError(f"it starts at {self.start}, above its {self.at_most}")
        return self


class Autonomy(Part):
    """How autonomy is earned and lost."""

    classes: dict[Variable, str] = Field(default={}, description="the action class per actuator")
    grants: tuple[Grant, ...] = ()
    to_4: Evidence
    to_5: Evidence
    a_person_promotes: bool = True
    drift: Drift = Drift()
    solver_failures: PositiveInt = Field(default=2, description="in a row, until 5 falls to 4")
    proposal_min: Positive = Field(default=10.0, description="until silence refuses")

    @model_validator(mode="after")
    def _once(self) -> Self:
        seen = set()
        for grant in self.grants:
            key = (grant.twin, grant.action, grant.operator)
            if key in seen:
                raise ValueError(f"{grant.twin} {grant.action} {grant.operator} is granted twice")
            seen.add(key)
        return self


class AidRule(Part):
    """What may be promised of one good, and to which cities; amounts are in the good's unit."""

    cities: tuple[str, ...] = Field(min_length=1, description="by their names")
    gives_at_most: Span = Field(description="to all cities at any one time")
    takes_at_most: Span = Field(description="from all cities at any one time")
    for_at_most_h: Positive = Field(description="how long one promise may be")
    usd_at_most: Span = Field(description="what one promise may cost this city")
    sets: Variable | Literal[""] = Field(
        default="", description="the actuator that giving it sets, under that one's rules"
    )
    gives_sign: Literal[1, -1] = Field(
        default=1, description="-1 where that actuator counts what comes, not what goes"
    )
    takes_set: Variable | Literal[""] = Field(
        default="", description="the actuator that taking it sets, under that one's rules"
    )
    entity: str = Field(default="system", description="of which entity of the actuators")


class Rules(Part):
    """One version of the rules; a higher version replaces a lower one as a whole."""

    version: PositiveInt
    owners: dict[str, str] = Field(min_length=1, description="who answers for each twin")
    cut_min: Positive = Field(description="how old the cut of a decision may be")
    life_min: Positive = Field(description="how long after its cut a decision may begin")
    bundles: Count
    setpoints_at_most: PositiveInt = Field(description="in one bundle")
    members_at_most: PositiveInt = Field(description="in one bundle")
    actuators: dict[Variable, ActuatorRule] = Field(default={})
    values: dict[Variable, Usable] = Field(default={})
    not_together: tuple[Exclusion, ...] = ()
    sums: tuple[Sum, ...] = ()
    never: tuple[Never, ...] = ()
    recovery: Recovery
    autonomy: Autonomy | None = None
    aid: dict[str, AidRule] = Field(
        default={}, description="goods that may be promised to other cities, or taken from them"
    )
    persons: dict[str, tuple[str, ...]] = Field(
        default={}, description="the domains in which each person has authority"
    )
    text: str = Field("", exclude=True)
    path: str = Field("rules", exclude=True)

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [part.name for part in self.not_together]
        names += [part.name for part in self.sums] + [part.name for part in self.never]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{min(twice)} is the name of two rules")
        if self.recovery.lease_min <= self.life_min:
            raise ValueError("a lease of the recovery plan ends before it may have begun")
        for variable in self.actuators:
            member = variable.partition(".")[0]
            if member not in self.owners:
                raise ValueError(f"{variable} has a rule and {member} has no owner")
        return self

    @cached_property
    def longest_ns(self) -> int:
        """The longest span that any limit on the number or size of changes looks back."""
        spans = [self.bundles.within_ns]
        for rule in self.actuators.values():
            limits = (rule.change, rule.changes, rule.entities, rule.reversals)
            spans += [limit.within_ns for limit in limits]
        return max(spans)

    @cached_property
    def grants(self) -> dict[tuple[str, str, str], Grant]:
        """What is granted, by twin, action class and operator."""
        grants = self.autonomy.grants if self.autonomy else ()
        return {(g.twin, g.action, g.operator): g for g in grants}

    @cached_property
    def longest_lease_ns(self) -> int:
        """The longest that anything that was let go may hold."""
        leases = [rule.lease_min for rule in self.actuators.values()]
        return round(max([*leases, self.recovery.lease_min]) * MINUTE_NS)

    def error(self, where: tuple[int | str, ...], message: str) -> ScenarioError:
        """The error of these rules at the line of the deepest key on the path `where`."""
        document = _document(self.text or "{}", self.path)
        return document.error_at(Reason.RULES_INVALID, document.line(where), message)

    def check(self, descriptions: Mapping[str, Description]) -> None:
        """Refuse rules that do not fit the twins; fails with RULES_INVALID and the line.

        A range may only narrow the actuator's own, and must hold its safe default. What a rule
        reads needs a rule that says when it is usable.
        """
        for name in self.values:
            self._kind(name, descriptions, ("values", name))
        for name, rule in self.actuators.items():
            where = ("actuators", name)
            actuator = self.actuator(name, descriptions, where)
            low, high = self.low(name, actuator), self.high(name, actuator)
            if not actuator.low <= low <= high <= actuator.high:
                text = f"{name}: {low:g}..{high:g} is not within the actuator's own "
                side = "high" if high > actuator.high else "low"
                raise self.error((*where, side), f"{text}{actuator.low:g}..{actuator.high:g}")
            if not low <= actuator.safe_default <= high:
                text = f"{name}: its safe default {actuator.safe_default:g} is outside of its range"
                raise self.error(where, text)
            for needed in rule.needs:
                self._readable(needed, descriptions, (*where, "needs"))
        for i, exclusion in enumerate(self.not_together):
            self._check_terms(exclusion, ("not_together", i), descriptions)
        for good, aid in self.aid.items():
            for key, name in (("sets", aid.sets), ("takes_set", aid.takes_set)):
                if not name:
                    continue
                actuator = self.actuator(name, descriptions, ("aid", good, key))
                if aid.entity not in descriptions[name.partition(".")[0]].ids(actuator.kind):
                    text = f"{name} has no entity {aid.entity!r}"
                    raise self.error(("aid", good, "entity"), text)
        for i, sum_ in enumerate(self.sums):
            for name in sum_.over:
                self.actuator(name, descriptions, ("sums", i, "over", name))
        for i, never in enumerate(self.never):
            self._readable(never.variable, descriptions, ("never", i, "variable"))
        for i, setpoint in enumerate(self.recovery.setpoints):
            where_ = ("recovery", "setpoints", i)
            actuator = self.actuator(setpoint.of, descriptions, where_)
            if setpoint.of not in self.actuators:
                raise self.error(where_, f"{setpoint.of} has no rule")
            member = setpoint.of.partition(".")[0]
            if setpoint.entity not in descriptions[member].ids(actuator.kind):
                raise self.error(where_, f"{setpoint.of} has no entity {setpoint.entity!r}")
            low, high = self.low(setpoint.of, actuator), self.high(setpoint.of, actuator)
            if not low <= setpoint.value <= high:
                raise self.error(where_, f"{setpoint.value:g} is outside {low:g}..{high:g}")

    def low(self, name: str, actuator: Actuator) -> float:
        """The least setpoint, in the actuator's unit."""
        given = self.actuators[name].low
        return actuator.low if given == -math.inf else given

    def high(self, name: str, actuator: Actuator) -> float:
        """The greatest setpoint, in the actuator's unit."""
        given = self.actuators[name].high
        return actuator.high if given == math.inf else given

    def actuator(
        self, name: str, descriptions: Mapping[str, Description], where: tuple[int | str, ...]
    ) -> Actuator:
        """The actuator of that name; fails with RULES_INVALID."""
        member, _, short = name.partition(".")
        if member in descriptions:
            for actuator in descriptions[member].actuators:
                if actuator.name == short:
                    return actuator
        raise self.error(where, f"no twin has an actuator {name}")

    def _kind(
        self, name: str, descriptions: Mapping[str, Description], where: tuple[int | str, ...]
    ) -> str:
        member, _, short = name.partition(".")
        if member in descriptions:
            for variable in descriptions[member].variables:
                if variable.name == short and variable.causality is Causality.OUTPUT:
                    return variable.kind
        raise self.error(where, f"no twin has an output {name}")

    def _readable(
        self, name: str, descriptions: Mapping[str, Description], where: tuple[int | str, ...]
    ) -> str:
        kind = self._kind(name, descriptions, where)
        if name not in self.values:
            raise self.error(where, f"`values` does not say when {name} is usable")
        return kind

    def _check_terms(
        self,
        exclusion: Exclusion,
        where: tuple[int | str, ...],
        descriptions: Mapping[str, Description],
    ) -> None:
        seen: set[tuple[str, str]] = set()
        for i, term in enumerate(exclusion.terms):
            there = (*where, "terms", i)
            member, _, short = term.of.partition(".")
            actuators = descriptions[member].actuators if member in descriptions else ()
            kinds = [a.kind for a in actuators if a.name == short]
            kind = kinds[0] if kinds else self._readable(term.of, descriptions, there)
            if term.entity and term.entity not in descriptions[member].ids(kind):
                raise self.error(there, f"{term.of} has no entity {term.entity!r}")
            if {(term.of, ""), (term.of, term.entity)} & seen or (
                not term.entity and any(of == term.of for of, _ in seen)
            ):
                raise self.error(there, f"two terms of {exclusion.name} are about {term.of}")
            seen.add((term.of, term.entity))


def _document(text: str, path: str) -> Document:
    return Document(text, path, Rules, "a set of rules", Reason.RULES_INVALID)


def parse(text: str, path: str = "rules") -> Rules:
    """Read rules from text; fails with RULES_INVALID or UNKNOWN_KEY, naming the line."""
    rules = _document(text, path).read(Rules)
    return rules.model_copy(update={"text": text, "path": path})


def load(path: str | Path) -> Rules:
    """Read a file of rules; fails with MISSING_FILE, RULES_INVALID or UNKNOWN_KEY."""
    file = Path(path)
    if not file.is_file():
        raise ScenarioError(
            Reason.MISSING_FILE, f"there are no rules at {file}", {"file": str(file)}
        )
    return parse(file.read_text(encoding="utf-8"), str(path))
