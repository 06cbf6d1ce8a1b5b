r"""Grants autonomy per twin, action class and operator, on evidence, and takes it away at once.

Level 3 advises, 4 acts when persons have confirmed, 5 acts. What the rules do not grant is at 3.
A level is earned in shadow mode: every decision is scored by its regret x against the better one of
what the operator did and the simulated alternative. A block of n scores in [-w, w] (w = `worst`)
is judged once, when it is full, by the empirical Bernstein bound (Maurer and Pontil 2009, theorem
4, scaled to the width 2w), with V the sample variance:

    mean(x) + sqrt(2 V ln(2/d) / n) + 2 w 7 ln(2/d) / (3 (n - 1)) <= regret

The k-th block gets d = (1 - confidence) / (k (k + 1)): these sum to 1 - confidence, so that trying
again and again does not make a promotion likelier than the rules allow. No distribution is assumed.

A level is lost by drift (two cumulative sums, Page 1954, or one residual beyond the band), by a
value that is not usable, and by a solver in trouble, from 5 to 4; by a breach to 3 from any level.
What was lost must be earned again from nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from federation.control.rules import Autonomy, Evidence, Grant, Rules
from federation.core.bundle import Bundle


class Key(NamedTuple):
    """What autonomy is granted for."""

    twin: str
    action: str
    operator: str


# -- events --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scored:
    """A shadow decision was scored, in the unit of the weighted figure, smaller is better.

    `is_good` is the guard's verdict on it. `alternative` is what the simulation gives for the best
    other plan; None when there is none.
    """

    key: Key
    decision: str
    cost: float
    operator_cost: float
    alternative_cost: float | None = None
    is_good: bool = True


@dataclass(frozen=True, slots=True)
class Compared:
    """What was observed after an action, beside its forecast with this standard deviation."""

    key: Key
    predicted: float
    observed: float
    sd: float


@dataclass(frozen=True, slots=True)
class Unusable:
    """A value that its decisions need is stale, of poor quality, or badly timed."""

    key: Key
    variable: str


@dataclass(frozen=True, slots=True)
class Breached:
    """The guard saw a breach, or refused what was meant to act."""

    key: Key
    rule: str


@dataclass(frozen=True, slots=True)
class Solved:
    """The solver came back: in time with a verified plan, or not."""

    key: Key
    in_time: bool


@dataclass(frozen=True, slots=True)
class Set:
    """A person sets a level: down at once, up only as far as the evidence goes."""

    key: Key
    level: int
    person: str


Event = Scored | Compared | Unusable | Breached | Solved | Set


@dataclass(frozen=True, slots=True)
class Moved:
    """A record: what an event did to a level, and why. `before` and `after` may be the same."""

    key: Key
    before: int
    after: int
    why: str
    rules_version: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one key stands."""

    level: int
    earned: int
    """The highest level that the evidence allows; a person may be needed to grant it."""
    regrets: tuple[float, ...] = ()
    is_spoilt: bool = False
    """The block holds a decision that fails it, whatever else it holds."""
    blocks: int = 0
    """How many blocks were judged for the next level."""
    up: float = 0.0
    down: float = 0.0
    """The cumulative sums of residuals."""
    solver_failures: int = 0


@dataclass
class Ladder:
    """The levels of all keys: events in, records out. Fails with nothing; default deny."""

    rules: Rules
    standings: dict[Key, Standing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, grant in self.rules.grants.items():
            self.standings.setdefault(Key(*key), Standing(grant.start, grant.start))

    def key(self, member: str, actuator: str, operator: str) -> Key:
        """What an actuator's autonomy is granted by."""
        autonomy = self.rules.autonomy
        classes = autonomy.classes if autonomy else {}
        return Key(member, classes.get(f"{member}.{actuator}", actuator), operator)

    def keys(self, bundle: Bundle, operator: str) -> tuple[Key, ...]:
        """All that a bundle needs autonomy for."""
        found = {self.key(s.member, s.actuator, operator) for s in bundle.setpoints}
        return tuple(sorted(found))

    def level(self, key: Key) -> int:
        found = self.standings.get(key)
        return found.level if found else 3

    def level_of(self, bundle: Bundle, operator: str) -> int:
        """The lowest level of all that a bundle touches; 3 for one that touches nothing."""
        return min((self.level(key) for key in self.keys(bundle, operator)), default=3)

    def handle(self, event: Event) -> tuple[Moved, ...]:
        """Take in one event; what it changed. What is not granted stays at 3."""
        grant = self.rules.grants.get(event.key)
        standing = self.standings.get(event.key)
        autonomy = self.rules.autonomy
        if grant is None or standing is None or autonomy is None:
            if isinstance(event, Set):
                return (self._told(event.key, 3, 3, "the rules grant nothing here"),)
            return ()
        match event:
            case Scored():
                return self._scored(event, standing, grant, autonomy)
            case Compared():
                return self._compared(event, standing, autonomy)
            case Unusable():
                return self._drop(event.key, 4, f"{event.variable} is not usable")
            case Breached():
                return self._drop(event.key, 3, f"breach of {event.rule}")
            case Solved():
                failures = 0 if event.in_time else standing.solver_failures + 1
                self.standings[event.key] = replace(standing, solver_failures=failures)
                if failures < autonomy.solver_failures:
                    return ()
                return self._drop(event.key, 4, f"no plan in time, {failures} times in a row")
            case Set():
                return self._set(event, standing, grant)

    def change_rules(self, rules: Rules) -> tuple[Moved, ...]:
        """Go by other rules at once. Fails with RULES_INVALID when they are not newer.

        Nothing rises: a level falls to what the new rules grant at most, and evidence of other
        conditions than they have counts for nothing.
        """
        if rules.version <= self.rules.version:
            raise rules.error(("version",), f"version {self.rules.version} is already in force")
        old, self.rules = self.rules, rules
        before = self.standings
        grants = {Key(*key): grant for key, grant in rules.grants.items()}
        is_same = _conditions(old) == _conditions(rules)
        self.standings = {}
        moved = []
        for key in sorted({*grants, *before}):
            standing = before.get(key)
            if standing is None:
                self.standings[key] = Standing(grants[key].start, grants[key].start)
                continue
            most = grants[key].at_most if key in grants else 3
            level = min(standing.level, most)
            if key in grants:
                kept = standing if is_same else Standing(level, level)
                earned = min(kept.earned, most)
                self.standings[key] = replace(kept, level=level, earned=max(level, earned))
            if level != standing.level:
                moved.append(self._told(key, standing.level, level, "the rules have changed"))
        return tuple(moved)

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain data, but for the rules."""
        return {
            "rules_version": self.rules.version,
            "standings": [[list(k), asdict(s)] for k, s in sorted(self.standings.items())],
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from a snapshot that was taken under these rules; fails with RULES_INVALID."""
        if plain["rules_version"] != self.rules.version:
            text = f"the snapshot is of version {plain['rules_version']}"
            raise self.rules.error(("version",), text)
        self.standings = {
            Key(*key): Standing(**{**fields, "regrets": tuple(fields["regrets"])})
            for key, fields in plain["standings"]
        }

    def _scored(
        self, event: Scored, standing: Standing, grant: Grant, autonomy: Autonomy
    ) -> tuple[Moved, ...]:
        if standing.earned >= grant.at_most:
            return ()
        evidence = autonomy.to_4 if standing.earned == 3 else autonomy.to_5
        costs = [event.operator_cost]
        costs += [] if event.alternative_cost is None else [event.alternative_cost]
        regret = event.cost - min(costs)
        fails = not event.is_good or not regret <= evidence.worst  # NaN fails
        kept = max(-evidence.worst, regret) if regret <= evidence.worst else evidence.worst
        standing = replace(
            standing,
            regrets=(*standing.regrets, kept),
            is_spoilt=standing.is_spoilt or fails,
        )
        if len(standing.regrets) < evidence.decisions:
            self.standings[event.key] = standing
            return ()
        blocks = standing.blocks + 1
        bound = regret_bound(standing.regrets, evidence, blocks)
        fresh = replace(standing, regrets=(), is_spoilt=False, blocks=blocks)
        if standing.is_spoilt or bound > evidence.regret:
            self.standings[event.key] = fresh
            why = "a decision failed it" if standing.is_spoilt else f"mean regret up to {bound:.4g}"
            return (self._told(event.key, fresh.level, fresh.level, f"block {blocks}: {why}"),)
        earned = standing.earned + 1
        level = fresh.level if autonomy.a_person_promotes else max(fresh.level, earned)
        self.standings[event.key] = replace(fresh, earned=earned, level=level, blocks=0)
        why = f"{evidence.decisions} decisions, mean regret up to {bound:.4g}: {earned} is earned"
        return (self._told(event.key, fresh.level, level, why),)

    def _compared(
        self, event: Compared, standing: Standing, autonomy: Autonomy
    ) -> tuple[Moved, ...]:
        drift = autonomy.drift
        z = (event.observed - event.predicted) / event.sd if event.sd > 0 else math.nan
        up = max(0.0, standing.up + z - drift.slack)
        down = max(0.0, standing.down - z - drift.slack)
        self.standings[event.key] = replace(standing, up=up, down=down)
        if not abs(z) <= drift.band:  # NaN is beyond every band
            return self._drop(event.key, 4, f"{z:.3g} standard deviations from the forecast")
        if max(up, down) > drift.limit:
            return self._drop(event.key, 4, f"drift: cumulative sum at {max(up, down):.3g}")
        return ()

    def _set(self, event: Set, standing: Standing, grant: Grant) -> tuple[Moved, ...]:
        before = standing.level
        most = min(standing.earned, grant.at_most)
        autonomy = self.rules.autonomy
        if not event.person:
            return (self._told(event.key, before, before, "nobody asks for it"),)
        if event.level not in (3, 4, 5) or event.level > most or autonomy is None:
            text = f"{event.person} asks for {event.level}; up to {most} is earned"
            return (self._told(event.key, before, before, text),)
        self.standings[event.key] = replace(standing, level=event.level)
        return (self._told(event.key, before, event.level, f"set by {event.person}"),)

    def _drop(self, key: Key, to: int, why: str) -> tuple[Moved, ...]:
        """Fall to `to` at once, and lose all evidence for more."""
        standing = self.standings[key]
        level = min(standing.level, to)
        self.standings[key] = Standing(level, min(standing.earned, to))
        if level == standing.level and standing.earned <= to:
            return ()
        return (self._told(key, standing.level, level, why),)

    def _told(self, key: Key, before: int, after: int, why: str) -> Moved:
        return Moved(key, before, after, why, self.rules.version)


def regret_bound(regrets: Iterable[float], evidence: Evidence, block: int) -> float:
    """What the mean regret is at most, with the confidence that block number `block` has."""
    scores = list(regrets)
    return statistics.fmean(scores) + evidence.slack(block, statistics.variance(scores))


def _conditions(rules: Rules) -> object:
    """What evidence was collected for: with other conditions it must be collected anew."""
    if rules.autonomy is None:
        return None
    return (rules.autonomy.to_4, rules.autonomy.to_5, rules.autonomy.classes)


@dataclass
class Rollout:
    """A change of rules on its way to all twins: until each has it, decisions wait."""

    version: int
    members: tuple[str, ...]
    known: dict[str, int] = field(default_factory=dict)

    def announce(self, version: int, members: Iterable[str]) -> None:
        """Another version is to reach these members; an older one changes nothing."""
        if version > self.version:
            self.version = version
        self.members = tuple(members)

    def acknowledge(self, member: str, version: int) -> None:
        """A member goes by a version; word of an older one that comes late changes nothing."""
        self.known[member] = max(version, self.known.get(member, 0))

    def waits_for(self) -> tuple[str, ...]:
        """The members that do not go by the version in force; a decision waits for them."""
        return tuple(m for m in self.members if self.known.get(m, 0) != self.version)

    def admits(self, decided_version: int) -> bool:
        """Whether a decision under that version may act now."""
        return decided_version == self.version and not self.waits_for()
