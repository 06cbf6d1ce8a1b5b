"""The limits of the rules, a class of them each: what a bundle breaks, after what was let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from federation.control.monitor import Monitor
from federation.control.reach import SLACK, Reach, name_of
from federation.control.rules import ActuatorRule, RecoverySetpoint, Rules
from federation.control.situation import NEVER, Forecast, Place, Refusal, Situation, Submission
from federation.core.bundle import Bundle, Priority, Setpoint, bundle_of, plain_of
from federation.twin import MINUTE_NS, Actuator, Description

Verify = Callable[[str, bytes, bytes], bool]
"""Whether this author, who may propose (role optimiser), signed this message with this signature.
"""


class Change(NamedTuple):
    """A change that passed: to `value`, by `by`; it `turns` when against the movement before.

    That is the one from the last value that the loop set to the one in force, such as the fall at
    the end of a lease, or if they are the same, the loop's last change.
    """

    time_ns: int
    place: Place
    value: float
    by: float
    turns: bool
    bundle: str


@dataclass(slots=True)
class Memory:
    """What was let go so far, as far back as any limit looks.

    A change counts from when it took effect. One that may yet take effect has the time `NEVER`: it
    is within every span that ends now.
    """

    now_ns: int = -1
    seen: dict[str, int] = field(default_factory=dict)
    """The bundles that passed, and when each expires: from then on it is refused as such."""
    open: dict[str, Bundle] = field(default_factory=dict)
    """Those that were let go and may yet take effect."""
    changes: list[Change] = field(default_factory=list)
    passed: dict[str, int] = field(default_factory=dict)
    """When each bundle that passed took effect."""

    def reserved(self) -> list[Setpoint]:
        return [s for bundle in self.open.values() for s in bundle.setpoints]

    def note(self, bundle: Bundle, changes: tuple[Change, ...]) -> None:
        """Remember a bundle that passed."""
        self.seen[bundle.id] = bundle.expires_ns
        self.open[bundle.id] = bundle
        self.passed[bundle.id] = NEVER
        self.changes += changes

    def settle(self, bundle: str, effect_ns: int | None) -> None:
        """A bundle took effect at `effect_ns`, or never will; then it has changed nothing."""
        self.open.pop(bundle, None)
        if effect_ns is None:
            self.passed.pop(bundle, None)
            self.changes = [c for c in self.changes if c.bundle != bundle]
            return
        if bundle in self.passed:
            self.passed[bundle] = effect_ns
        self.changes = [
            c._replace(time_ns=effect_ns) if c.bundle == bundle else c for c in self.changes
        ]

    def move_to(self, time_ns: int, back_ns: int, longest_lease_ns: int) -> None:
        """Forget what no rule can ask for any more.

        Of each place the last change that took effect stays, which the next may turn against.
        """
        now_ns = self.now_ns = max(self.now_ns, time_ns)
        self.seen = {id_: end_ns for id_, end_ns in self.seen.items() if end_ns > now_ns}
        for bundle in tuple(self.open.values()):  # what nobody settled, and is over in any case
            if bundle.expires_ns + longest_lease_ns <= now_ns:
                self.settle(bundle.id, bundle.expires_ns)
        self.passed = {id_: at_ns for id_, at_ns in self.passed.items() if at_ns > now_ns - back_ns}
        last = {c.place: c for c in self.changes if c.time_ns != NEVER}
        self.changes = [
            c for c in self.changes if c.time_ns > now_ns - back_ns or c is last[c.place]
        ]

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain data, as JSON has them."""
        return {
            "now_ns": self.now_ns,
            "seen": dict(self.seen),
            "open": [plain_of(bundle) for bundle in self.open.values()],
            "changes": [[*c[:1], list(c.place), *c[2:]] for c in self.changes],
            "passed": dict(self.passed),
        }

    @classmethod
    def restored(cls, plain: Mapping[str, Any]) -> Memory:
        """The memory of which `plain` is a snapshot."""
        bundles = [bundle_of(fields) for fields in plain["open"]]
        changes = [Change(c[0], (c[1][0], c[1][1], c[1][2]), *c[2:]) for c in plain["changes"]]
        return cls(
            plain["now_ns"],
            dict(plain["seen"]),
            {bundle.id: bundle for bundle in bundles},
            changes,
            dict(plain["passed"]),
        )


class Case(NamedTuple):
    """All that one judgement looks at; `changes` are those that the bundle would make."""

    submission: Submission
    situation: Situation
    forecast: Forecast | None
    memory: Memory
    ruled: tuple[tuple[Setpoint, str, ActuatorRule], ...]
    changes: tuple[Change, ...]

    @property
    def bundle(self) -> Bundle:
        return self.submission.bundle


class Limits:
    """Says what a bundle breaks of one version of the rules.

    Fails with RULES_INVALID when the rules do not fit the twins, or their recovery plan does not
    fit the rules.
    """

    def __init__(
        self, rules: Rules, descriptions: Mapping[str, Description], verify: Verify
    ) -> None:
        rules.check(descriptions)
        self.rules = rules
        self.actuators: dict[str, Actuator] = {
            f"{member}.{a.name}": a for member, d in descriptions.items() for a in d.actuators
        }
        self.monitor = Monitor(rules, descriptions)
        self._descriptions = descriptions
        self._verify = verify
        self._reach = Reach(rules, descriptions)
        self._check_recovery()

    def judge(self, case: Case, but: Collection[str] = ()) -> list[Refusal]:
        """All that it breaks, `but` for classes of rules; nothing when it is good."""
        checks = [check for name, check in self.checks.items() if name not in but]
        return [refusal for check in checks for refusal in check(self, case)]

    def case(
        self,
        submission: Submission,
        situation: Situation,
        forecast: Forecast | None,
        memory: Memory,
    ) -> Case:
        """What there is to judge about a bundle."""
        bundle = submission.bundle
        ruled, changes = [], []
        for setpoint in bundle.setpoints:
            place = _place(setpoint)
            name = name_of(place)
            if name not in self.actuators or not isinstance(setpoint.value, float | int):
                continue
            if name in self.rules.actuators:
                ruled.append((setpoint, name, self.rules.actuators[name]))
            standing = situation.standing.get(place, ())
            now = min(standing, key=lambda s: s.priority).value if standing else None
            now = self.actuators[name].safe_default if now is None else now
            if setpoint.value != now:
                by = setpoint.value - now
                past = [c for c in memory.changes if c.place == place]
                drift = (now - past[-1].value) or past[-1].by if past else 0.0
                at = (NEVER, place, setpoint.value)
                changes.append(Change(*at, by, drift * by < 0, bundle.id))
        return Case(submission, situation, forecast, memory, tuple(ruled), tuple(changes))

    def _changing(self, case: Case) -> Iterator[tuple[Change, str, ActuatorRule]]:
        for change in case.changes:
            name = name_of(change.place)
            if name in self.rules.actuators:
                yield change, name, self.rules.actuators[name]

    def _past(self, case: Case, within_ns: int, name: str) -> list[Change]:
        since_ns = case.situation.time_ns - within_ns
        return [c for c in case.memory.changes if c.time_ns > since_ns and name_of(c.place) == name]

    def _authority(self, case: Case) -> Iterator[Refusal]:
        bundle = case.bundle
        if not self._verify(bundle.author, case.submission.message(), case.submission.signature):
            yield Refusal("authority", f"{bundle.author!r} may not propose, or did not sign this")
        if bundle.priority != Priority.AUTONOMOUS:
            yield Refusal("authority", f"an optimiser has no priority {bundle.priority!r}")

    def _replay(self, case: Case) -> Iterator[Refusal]:
        if case.bundle.id in case.memory.seen or case.bundle.id in case.memory.open:
            yield Refusal("replay", f"{case.bundle.id} has passed before")

    def _freshness(self, case: Case) -> Iterator[Refusal]:
        bundle, now_ns = case.bundle, case.situation.time_ns
        if bundle.run != case.situation.run:
            yield Refusal("freshness", f"it was decided for {bundle.run}")
        if not 0 <= now_ns - bundle.cut_ns <= round(self.rules.cut_min * MINUTE_NS):
            yield Refusal("freshness", f"its cut at {bundle.cut_ns} ns is too old, or ahead")
        if bundle.expires_ns <= now_ns:
            yield Refusal("freshness", f"it expired at {bundle.expires_ns} ns")
        if bundle.expires_ns - bundle.cut_ns > round(self.rules.life_min * MINUTE_NS):
            yield Refusal("freshness", f"it lives longer than {self.rules.life_min:g} min")
        if now_ns < case.memory.now_ns:
            yield Refusal("freshness", f"the run was at {case.memory.now_ns} ns before")

    def _version(self, case: Case) -> Iterator[Refusal]:
        if case.submission.rules_version != self.rules.version:
            text = f"under version {case.submission.rules_version}; in force: {self.rules.version}"
            yield Refusal("version", f"it was decided {text}")

    def _granted(self, case: Case) -> Iterator[Refusal]:
        """Default deny: an actuator without a rule, and what no twin has."""
        if not case.bundle.setpoints:
            yield Refusal("granted", "it sets nothing")
        for setpoint in case.bundle.setpoints:
            name = name_of(_place(setpoint))
            if name not in self.rules.actuators:
                yield Refusal(f"granted:{name}", f"{name} has no rule and is not autonomous")
            elif setpoint.entity not in self._entities(name):
                yield Refusal(f"granted:{name}", f"{name} has no entity {setpoint.entity!r}")

    def _range(self, case: Case) -> Iterator[Refusal]:
        for setpoint, name, _ in case.ruled:
            actuator = self.actuators[name]
            low, high = self.rules.low(name, actuator), self.rules.high(name, actuator)
            if not (math.isfinite(setpoint.value) and low <= setpoint.value <= high):
                yield Refusal(f"range:{name}", f"{setpoint.value} is outside {low:g}..{high:g}")

    def _lease(self, case: Case) -> Iterator[Refusal]:
        for setpoint, name, rule in case.ruled:
            if not 0 < self._lease_ns(setpoint) <= round(rule.lease_min * MINUTE_NS):
                yield Refusal(f"lease:{name}", f"{self._lease_ns(setpoint)} ns is no lease for it")

    def _size(self, case: Case) -> Iterator[Refusal]:
        bundle = case.bundle
        if len({_place(s) for s in bundle.setpoints}) < len(bundle.setpoints):
            yield Refusal("size", "it sets something twice")
        if len(bundle.setpoints) > self.rules.setpoints_at_most:
            yield Refusal("size", f"{len(bundle.setpoints)} setpoints")
        if len(bundle.members()) > self.rules.members_at_most:
            yield Refusal("size", f"{len(bundle.members())} members")
        count = self.rules.bundles
        since_ns = case.situation.time_ns - count.within_ns
        if sum(at_ns > since_ns for at_ns in case.memory.passed.values()) >= count.at_most:
            yield Refusal("size", f"{count.at_most} bundles in {count.within_min:g} min")

    def _settled(self, case: Case) -> Iterator[Refusal]:
        """What is in force must be known, and stay so, while the bundle may begin: also where the
        bundle sets nothing, since the limits on sums are about all that the rules are about."""
        for member in sorted({name.partition(".")[0] for name in self.rules.actuators}):
            if member in case.situation.silent:
                yield Refusal(f"settled:{member}", f"nobody knows what is in force at {member}")
        reserved = {_place(s) for s in (*case.memory.reserved(), *case.situation.reserved)}
        for place in map(_place, case.bundle.setpoints):
            name = name_of(place)
            if place in reserved:
                yield Refusal(f"settled:{name}", f"{place[2]} is reserved")
            for standing in case.situation.standing.get(place, ()):
                if standing.priority < Priority.AUTONOMOUS:
                    yield Refusal(f"settled:{name}", f"{place[2]} is held by a person or for life")
                elif standing.ends_ns <= case.bundle.expires_ns:
                    yield Refusal(f"settled:{name}", f"the lease of {place[2]} may end first")

    def _change(self, case: Case) -> Iterator[Refusal]:
        for change, name, rule in self._changing(case):
            limit = rule.change
            past = self._past(case, limit.within_ns, name)
            total = abs(change.by) + sum(abs(c.by) for c in past if c.place == change.place)
            if not total <= limit.at_most * (1 + SLACK):
                text = f"{change.place[2]} changes by {total:g} in {limit.within_min:g} min"
                yield Refusal(f"change:{name}", f"{text}; at most {limit.at_most:g}")

    def _count(self, case: Case) -> Iterator[Refusal]:
        for name, rule in {name: rule for _, name, rule in self._changing(case)}.items():
            limit = rule.changes
            new = [c for c in case.changes if name_of(c.place) == name]
            count = len(new) + len(self._past(case, limit.within_ns, name))
            if count > limit.at_most:
                text = f"{count} changes in {limit.within_min:g} min; at most {limit.at_most}"
                yield Refusal(f"count:{name}", text)

    def _blast(self, case: Case) -> Iterator[Refusal]:
        for name, rule in {name: rule for _, name, rule in self._changing(case)}.items():
            limit = rule.entities
            new = [c for c in case.changes if name_of(c.place) == name]
            touched = {c.place for c in (*new, *self._past(case, limit.within_ns, name))}
            size = len(self._entities(name))
            if len(touched) > min(float(limit.at_most), limit.share * size * (1 + SLACK)):
                text = f"{len(touched)} of {size} entities in {limit.within_min:g} min"
                yield Refusal(f"blast:{name}", text)

    def _reversals(self, case: Case) -> Iterator[Refusal]:
        for change, name, rule in self._changing(case):
            limit = rule.reversals
            past = self._past(case, limit.within_ns, name)
            count = 1 + sum(c.turns for c in past if c.place == change.place)
            if change.turns and count > limit.at_most:
                text = f"{change.place[2]} turns {count} times in {limit.within_min:g} min"
                yield Refusal(f"reversals:{name}", text)

    def _sums(self, case: Case) -> Iterator[Refusal]:
        yield from self._reach.sums(self._possible(case), map(_place, case.bundle.setpoints))

    def _exclusions(self, case: Case) -> Iterator[Refusal]:
        yield from self._reach.exclusions(
            self._possible(case),
            map(_place, case.bundle.setpoints),
            lambda term: self.monitor.holds(case.situation, term),
        )

    def _usable(self, case: Case) -> Iterator[Refusal]:
        for name in sorted({needed for _, _, rule in case.ruled for needed in rule.needs}):
            if fault := self.monitor.value(case.situation, name)[1]:
                yield Refusal(f"usable:{name}", fault)

    def _conditions(self, case: Case) -> Iterator[Refusal]:
        for condition in case.bundle.conditions:
            name = f"{condition.member}.{condition.variable}"
            value, fault = self.monitor.entity(case.situation, name, condition.entity)
            if value is None:
                yield Refusal(f"conditions:{name}", fault)
            elif not condition.low <= value <= condition.high:
                text = f"{condition.entity} is at {value:g} by now"
                yield Refusal(f"conditions:{name}", text)

    def _never(self, case: Case) -> Iterator[Refusal]:
        forecast = case.forecast
        for never in self.rules.never:
            member, _, variable = never.variable.partition(".")
            series = forecast.series.get((member, variable)) if forecast else None
            fault = ""
            if forecast is not None and forecast.bundle != case.bundle.digest():
                fault = "the forecast is about another bundle"
            elif series is not None:
                fault = self.monitor.foreseen(never, series, case.situation)
            elif never.forecast_min:
                fault = f"there is no forecast of {never.variable}"
            if fault:
                yield Refusal(f"never:{never.name}", fault)

    checks: ClassVar[dict[str, Callable[[Limits, Case], Iterator[Refusal]]]] = {
        "authority": _authority,
        "replay": _replay,
        "freshness": _freshness,
        "version": _version,
        "granted": _granted,
        "range": _range,
        "lease": _lease,
        "size": _size,
        "settled": _settled,
        "change": _change,
        "count": _count,
        "blast": _blast,
        "reversals": _reversals,
        "sums": _sums,
        "exclusions": _exclusions,
        "usable": _usable,
        "conditions": _conditions,
        "never": _never,
    }
    """Every class of rules; a bundle is good when none has anything to say."""

    def _possible(self, case: Case) -> dict[Place, tuple[float, ...]]:
        """Of each place that is not simply at its safe default, all that may come to be."""
        situation = case.situation
        found = {
            place: {standing.value for standing in some}
            for place, some in situation.standing.items()
        }
        for setpoint in (*case.memory.reserved(), *situation.reserved):
            found.setdefault(_place(setpoint), set()).add(setpoint.value)
        found |= {_place(setpoint): {setpoint.value} for setpoint in case.bundle.setpoints}
        return self._with_defaults(found)

    def _with_defaults(self, values: Mapping[Place, set[float]]) -> dict[Place, tuple[float, ...]]:
        return {
            place: (*some, self.actuators[name_of(place)].safe_default)
            for place, some in values.items()
            if name_of(place) in self.actuators
        }

    def _entities(self, name: str) -> tuple[str, ...]:
        actuator = self.actuators[name]
        return self._descriptions[name.partition(".")[0]].ids(actuator.kind)

    def _lease_ns(self, setpoint: Setpoint) -> int:
        return setpoint.lease_ns or self.actuators[name_of(_place(setpoint))].lease_ns

    def _check_recovery(self) -> None:
        """Fails with RULES_INVALID when the recovery plan may break a limit on what is in force.

        All else that has a rule is then at its safe default. Limits on changes and their number
        do not bind it.
        """
        plan = {_planned(s): {s.value} for s in self.rules.recovery.setpoints}
        values = self._with_defaults(plan)
        members = [name.split(".", 1) for name in self.rules.actuators]
        places = [(m, a, entity) for m, a in members for entity in self._entities(f"{m}.{a}")]
        broken = self._reach.sums(values, places)
        broken += self._reach.exclusions(values, places, lambda term: True)
        if broken:
            text = f"the recovery plan breaks {broken[0].rule}: {broken[0].sentence}"
            raise self.rules.error(("recovery",), text)

    def recovery(self, situation: Situation, memory: Memory) -> dict[Place, float]:
        """The recovery plan: its setpoints, and the safe default where the loop has set another."""
        held = [
            place
            for place, some in situation.standing.items()
            if any(s.priority == Priority.AUTONOMOUS for s in some)
        ]
        held += map(_place, memory.reserved())
        found = {
            place: self.actuators[name_of(place)].safe_default
            for place in held
            if name_of(place) in self.rules.actuators
        }
        return found | {_planned(s): s.value for s in self.rules.recovery.setpoints}


def _place(setpoint: Setpoint) -> Place:
    return (setpoint.member, setpoint.actuator, setpoint.entity)


def _planned(setpoint: RecoverySetpoint) -> Place:
    member, _, actuator = setpoint.of.partition(".")
    return (member, actuator, setpoint.entity)
