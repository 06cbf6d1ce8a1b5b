"""What a city lets its peers have: one YAML document, versioned and checked to the line.

What no rule lets a reader have, it does not get: an empty document shares nothing. Of the rules
that concern a question, a denial counts before any permission, and of several permissions the
first one in the document; so each entity of a variable leaves the city by one rule at most, and
nothing can be found by subtracting what two rules give. Rules of an emergency come before all
others while somebody named has declared it, but for denials that hold `always`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Annotated, Literal, Self, get_args
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from federation.errors import Reason
from federation.peer.reader import Reader, matches
from federation.scenario.spec import Document, Part
from federation.twin import MINUTE_NS, Entity, Risk

DEFAULT = "default"
"""The name of the rule that no document has: whatever nobody allowed is refused."""

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
DAY_MIN = 24 * 60


class Sort(StrEnum):
    """What may be asked for."""

    VARIABLE = "variable"
    INPUT = "input"
    EVENT = "event"
    ACTION = "action"
    FLEXIBILITY = "flexibility"
    SESSION = "session"


class Code(StrEnum):
    """Why something is refused, for programs."""

    NOT_LISTED = "NOT_LISTED"
    """No rule lets this reader have it, and none of those that concern it is told of."""
    DENIED = "DENIED"
    WRONG_PURPOSE = "WRONG_PURPOSE"
    OUTSIDE_HOURS = "OUTSIDE_HOURS"
    NO_EMERGENCY = "NO_EMERGENCY"


def _word(text: object) -> object:
    if isinstance(text, str) and re.fullmatch(r"[a-z][a-z0-9-]*", text):
        return text
    raise ValueError(f"{text!r} is no name: small letters, digits and hyphens")


def _dotted(text: object) -> object:
    if isinstance(text, str) and re.fullmatch(r"[\w*-]+\.[\w*-]+|\*", text):
        return text
    raise ValueError(f"{text!r} is not of the form member.variable, in which * stands for any text")


def _pattern(text: object) -> object:
    if isinstance(text, str) and text and text.isprintable():
        return text
    raise ValueError(f"{text!r} is no pattern: some text, in which * stands for any")


def _minutes(value: object) -> object:
    """A time of day in minutes; YAML reads 22:00 without quotes as a number to the base of 60."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d\d?):(\d\d)", value)):
        value = 60 * int(found[1]) + int(found[2])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= DAY_MIN:
        return value
    raise ValueError(f"{value!r} is no time of day, such as '06:30'")


def _zone(name: str) -> str:
    try:
        _zone_of(name)
    except (KeyError, OSError, ValueError):
        raise ValueError(f"there is no time zone {name!r}, such as America/Chicago") from None
    return name


def _zone_of(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)


Word = Annotated[str, BeforeValidator(_word)]
Dotted = Annotated[str, BeforeValidator(_dotted)]
Pattern = Annotated[str, BeforeValidator(_pattern)]
Clock = Annotated[int, BeforeValidator(_minutes)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Span = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Degrees = Annotated[float, Field(ge=-180, le=180, allow_inf_nan=False)]


class Area(Part):
    """A part of the city: a box of WGS84 degrees (west, south, east, north), or entities by
    patterns of their ids. An entity without a place is in no box."""

    box: tuple[Degrees, Degrees, Degrees, Degrees] | None = None
    entities: tuple[Pattern, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Self:
        if (self.box is None) == (not self.entities):
            raise ValueError("an area has either a box or entities")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError("a box is west, south, east, north, in this order")
        return self

    def holds(self, entity: Entity) -> bool:
        if self.box is None:
            return matches_any(self.entities, entity.id)
        west, south, east, north = self.box
        return west <= entity.lon_deg <= east and south <= entity.lat_deg <= north


class Emergency(Part):
    """Something that may be declared, by whom, and for how long at most."""

    by: tuple[Pattern, ...] = Field(min_length=1, description="who may declare it, by name")
    most_h: Positive = Field(description="the longest that a declaration holds")
    doc: str = ""


class Hours(Part):
    """A time of day, on some days: from `from` up to `to`, which may be on the next day."""

    start: Clock = Field(default=0, alias="from")
    end: Clock = Field(default=DAY_MIN, alias="to")
    days: tuple[Day, ...] = DAYS
    zone: Annotated[str, AfterValidator(_zone)] = "UTC"

    @model_validator(mode="after")
    def _is_a_time(self) -> Self:
        if self.start == self.end:
            raise ValueError("`from` and `to` are the same time of day")
        return self

    def hold(self, instant: datetime) -> bool:
        """Whether an instant is in them. Past midnight they count for the day they began on."""
        local = instant.astimezone(_zone_of(self.zone))
        minute = 60 * local.hour + local.minute
        day = local.weekday()
        if self.start < self.end:
            return self.start <= minute < self.end and DAYS[day] in self.days
        if minute >= self.start:
            return DAYS[day] in self.days
        return minute < self.end and DAYS[day - 1] in self.days

    def __str__(self) -> str:
        text = f"{_time_of_day(self.start)} to {_time_of_day(self.end)}"
        if self.days != DAYS:
            text += f" on {', '.join(self.days)}"
        return f"{text} ({self.zone})"


def _time_of_day(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


class Resolution(Part):
    """How finely something is told: over space, over time, in steps of a size, and how late.

    Sums and means are over the entities that the rule lets the reader have, in total or area by
    area; a group of fewer than `at_least` is not told at all. Of a window its `take` is told at
    its end. Flexibility is told of each entity or in sums, in multiples of `round_to`, and what may
    be asked for is the same throughout a window.
    """

    space: Literal["each", "sum", "mean", "max", "min"] = "each"
    by: Literal["total", "area"] = "total"
    at_least: PositiveInt = 1
    window_min: Span = 0.0
    take: Literal["mean", "max", "min", "sum", "last"] = "mean"
    delay_min: Span = 0.0
    round_to: Positive | None = Field(default=None, description="in the variable's unit")
    text: bool = Field(default=False, description="of events, also the sentence for people")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.space == "each" and (self.by != "total" or self.at_least > 1):
            raise ValueError("`by` and `at_least` are for sums and means: say which with `space`")
        if not self.window_min and "take" in self.model_fields_set:
            raise ValueError("`take` is what is told of a window: say how long with `window_min`")
        return self

    @property
    def window_ns(self) -> int:
        return round(self.window_min * MINUTE_NS)

    @property
    def delay_ns(self) -> int:
        return round(self.delay_min * MINUTE_NS)

    @property
    def is_of_each_at_once(self) -> bool:
        """Whether an entry that is told is an entry of now."""
        return self.space == "each" and not self.window_ns and not self.delay_ns

    @property
    def is_exact(self) -> bool:
        return self == Resolution()

    def __str__(self) -> str:
        parts = []
        if self.space != "each":
            least = f" of at least {self.at_least}" if self.at_least > 1 else ""
            parts.append(f"{self.space} {'by area' if self.by == 'area' else 'in total'}{least}")
        if self.window_min:
            parts.append(f"{self.take} of {self.window_min:g} min")
        if self.round_to is not None:
            parts.append(f"in steps of {self.round_to:g}")
        if self.delay_min:
            parts.append(f"{self.delay_min:g} min late")
        if self.text:
            parts.append("in words")
        return ", ".join(parts) or "as it is"


AS_IT_IS = Resolution()


class What(Part):
    """What a rule is about: patterns of `member.name`, and which entities of them.

    Without `kinds`, `entities` and `areas` all entities are meant, else those that fit every one
    that is given.
    """

    variables: tuple[Dotted, ...] = Field(default=(), description="that the reader may see")
    inputs: tuple[Dotted, ...] = Field(default=(), description="that it may set in its what-ifs")
    events: tuple[Dotted, ...] = Field(default=(), description="member.kind")
    actions: tuple[Dotted, ...] = Field(default=(), description="member.actuator")
    risk: tuple[Risk, ...] = Field(default=tuple(Risk), description="classes of actions")
    acts: tuple[Literal["what-if", "live"], ...] = Field(
        default=("what-if",), description="where the reader may act; live is on the city itself"
    )
    flexibility: tuple[Dotted, ...] = Field(default=(), description="member.port")
    sessions: tuple[Literal["what-if", "live"], ...] = ()
    kinds: tuple[Pattern, ...] = ()
    entities: tuple[Pattern, ...] = ()
    areas: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(self.named(sort) for sort in Sort):
            raise ValueError(
                "say what: variables, inputs, events, actions, flexibility or sessions"
            )
        if "acts" in self.model_fields_set and not self.actions:
            raise ValueError("`acts` is where actions may be taken: say which with `actions`")
        return self

    def named(self, sort: Sort) -> tuple[str, ...]:
        """The patterns of what may be asked for in this way."""
        match sort:
            case Sort.VARIABLE:
                return self.variables
            case Sort.INPUT:
                return self.inputs
            case Sort.EVENT:
                return self.events
            case Sort.ACTION:
                return self.actions
            case Sort.FLEXIBILITY:
                return self.flexibility
            case Sort.SESSION:
                return self.sessions

    @property
    def is_selective(self) -> bool:
        """Whether it is about some entities only."""
        return bool(self.kinds or self.entities or self.areas)

    def selects(self, entity: Entity, areas: Mapping[str, Area]) -> bool:
        return (
            (not self.kinds or matches_any(self.kinds, entity.kind))
            and (not self.entities or matches_any(self.entities, entity.id))
            and (not self.areas or any(areas[name].holds(entity) for name in self.areas))
        )


class Rule(Part):
    """Who may, or may not, have what: for what, when, and how finely."""

    name: Word
    who: tuple[Pattern, ...] = Field(min_length=1, description="spiffe://CITY/ROLE/NAME or CITY")
    what: What
    effect: Literal["allow", "deny"] = "allow"
    resolution: Resolution = Resolution()
    purpose: tuple[Word, ...] = Field(
        default=(), description="what the reader must say; none: anything"
    )
    hours: Hours | None = None
    emergency: str | None = Field(default=None, description="the rule holds while this is declared")
    always: bool = Field(default=False, description="a denial that no emergency lifts")
    relay: bool = Field(default=False, description="also of what the city has from another city")
    why: str = Field(default="", description="what a reader is told who is refused by it")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name == DEFAULT:
            raise ValueError(f"{DEFAULT!r} is what refuses all that no rule allows: another name")
        if self.effect == "deny" and not self.resolution.is_exact:
            raise ValueError("what is denied has no resolution")
        if self.always and (self.effect != "deny" or self.emergency is not None):
            raise ValueError("`always` is for denials that no emergency lifts")
        if self.effect == "deny" and self.relay:
            raise ValueError("a denial is of everything, from wherever the city has it")
        return self

    @property
    def denies(self) -> bool:
        return self.effect == "deny"


class Limits(Part):
    """How much of this city's machine a peer may use; for the first pattern that means it.

    Processor and wall time are spent per window of `per_min` minutes. `horizon_h` counts from
    where a session begins.
    """

    who: tuple[Pattern, ...] = ("*",)
    sessions: PositiveInt = Field(default=2, description="at a time")
    steps: PositiveInt = Field(default=20_000, description="of one session")
    cpu_s: Positive = Field(default=60.0, description="in steps and openings, of this process")
    wall_s: Positive = Field(default=300.0, description="the same by the wall clock")
    per_min: Positive = 60.0
    horizon_h: Positive | None = Field(default=None, description="as the city's scenario")
    periods: PositiveInt = Field(default=96, description="of the flexibility that it asks for")


class Policy(Part):
    """The export policy of a city."""

    version: PositiveInt
    doc: str = ""
    step_min: Positive = Field(default=5.0, description="of the run, between two steps of the city")
    patience_s: Span = Field(
        default=1.0, description="a session waits for the live run to come along"
    )
    areas: dict[Word, Area] = Field(default={})
    emergencies: dict[Word, Emergency] = Field(default={})
    limits: tuple[Limits, ...] = ()
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        names = [rule.name for rule in self.rules]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"rules: two are called {twice[0]!r}")
        for rule in self.rules:
            for area in rule.what.areas:
                if area not in self.areas:
                    raise ValueError(
                        f"rules: {rule.name} names the area {area!r}: {_known(self.areas)}"
                    )
            if rule.emergency is not None and rule.emergency not in self.emergencies:
                known = _known(self.emergencies)
                raise ValueError(f"rules: {rule.name} is for {rule.emergency!r}: {known}")
            if rule.resolution.by == "area" and not self.areas:
                raise ValueError(f"rules: {rule.name} tells by area, and there are no areas")
            for what in ("window", "delay"):
                if getattr(rule.resolution, f"{what}_ns") % self.step_ns:
                    raise ValueError(
                        f"rules: {rule.name} has a {what} that is no multiple of step_min "
                        f"({self.step_min:g})"
                    )
        return self

    @property
    def step_ns(self) -> int:
        return round(self.step_min * MINUTE_NS)

    def limits_of(self, reader: Reader) -> Limits:
        for limits in self.limits:
            if any(reader.is_meant_by(pattern) for pattern in limits.who):
                return limits
        return Limits()


def matches_any(patterns: Iterable[str], text: str) -> bool:
    return any(matches(pattern, text) for pattern in patterns)


def _known(named: Mapping[str, object]) -> str:
    return f"there are {', '.join(named)}" if named else "there are none"


NOTHING_SHARED = Policy(version=1)
"""The policy of a city that has none."""


def read_policy(text: str, path: str = "policy") -> Policy:
    """Read a policy from text; fails with POLICY_INVALID or UNKNOWN_KEY, naming the line."""
    document = Document(text, path, Policy, "an export policy", Reason.POLICY_INVALID)
    return document.read(Policy)


@dataclass(frozen=True, slots=True)
class Declaration:
    """An emergency as somebody named has declared it."""

    emergency: str
    by: str
    why: str
    start: datetime
    end: datetime

    def holds(self, policy: Policy, instant: datetime) -> bool:
        """Whether it is in force: declared by one who may, and not for longer than may be."""
        emergency = policy.emergencies.get(self.emergency)
        if emergency is None or not matches_any(emergency.by, self.by):
            return False
        end = min(self.end, self.start + timedelta(hours=emergency.most_h))
        return self.start <= instant < end


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that may be asked for: `name` is member.name, or the kind of a session.

    Without an entity it is the thing as such, whatever its entities: what lets the reader have some
    of them is then taken to be about it, and of what denies some of them it is told that it does.
    So the answer follows from the names alone, and tells nothing of what there is.
    """

    sort: Sort
    name: str
    entity: Entity | None = None
    risk: Risk = Risk.HIGH
    is_relayed: bool = False
    """The city has it from another one."""
    is_live: bool = False
    """Of an action: it is to be taken on the city itself and not in a what-if."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a reader may have a thing, by which rule, and how finely or why not.

    What it may have as such it may still not have of every entity; `reason` then says so.
    """

    allowed: bool
    rule: str
    reason: str = ""
    code: Code | None = None
    resolution: Resolution = AS_IT_IS
    declaration: Declaration | None = None
    """The emergency without which it would not be so."""


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks, for what purpose, and when (an instant of the wall clock, with its zone)."""

    reader: Reader
    purpose: str
    instant: datetime
    declared: tuple[Declaration, ...] = ()

    def declaration_of(self, policy: Policy, emergency: str) -> Declaration | None:
        for declaration in self.declared:
            if declaration.emergency == emergency and declaration.holds(policy, self.instant):
                return declaration
        return None


def decide(policy: Policy, asked: Question, thing: Thing) -> Decision:
    """Whether a reader may have a thing. A pure function of its arguments."""
    concerned = concerning(policy, asked.reader, thing.sort, thing.name)
    return decide_among(concerned, policy, asked, thing)


def concerning(policy: Policy, reader: Reader, sort: Sort, name: str) -> tuple[Rule, ...]:
    """The rules that are for this reader and about things of this name, whatever else they say."""
    return tuple(
        rule
        for rule in policy.rules
        if matches_any(rule.what.named(sort), name)
        and any(reader.is_meant_by(pattern) for pattern in rule.who)
    )


def decide_among(rules: Iterable[Rule], policy: Policy, asked: Question, thing: Thing) -> Decision:
    """The same, of rules that are known to concern the reader and the name."""
    rules = [rule for rule in rules if _is_about(rule, thing, policy)]
    if thing.entity is None:
        partial = [rule for rule in rules if rule.denies and rule.what.is_selective]
        whole = _decide([rule for rule in rules if rule not in partial], policy, asked, thing)
        kept = [rule for rule in partial if _fault(rule, policy, asked) is None]
        if not whole.allowed or not kept:
            return whole
        told = "; ".join(f"{rule.name}: {rule.why or 'not shared'}" for rule in kept)
        return replace(whole, reason=f"but for what rules keep back ({told})")
    return _decide(rules, policy, asked, thing)


def _decide(rules: Sequence[Rule], policy: Policy, asked: Question, thing: Thing) -> Decision:
    faults = {rule.name: _fault(rule, policy, asked) for rule in rules}
    in_force = [rule for rule in rules if faults[rule.name] is None]
    always = [rule for rule in in_force if rule.always]
    urgent = [rule for rule in in_force if rule.emergency is not None]
    usual = [rule for rule in in_force if rule.emergency is None and not rule.always]
    for found in (always, urgent, usual):
        for rule in (*(r for r in found if r.denies), *(r for r in found if not r.denies)):
            declared = None
            if rule.emergency is not None:
                declared = asked.declaration_of(policy, rule.emergency)
            if rule.denies:
                why = rule.why or "this is not shared"
                return Decision(False, rule.name, why, Code.DENIED, declaration=declared)
            return Decision(True, rule.name, resolution=rule.resolution, declaration=declared)
    for rule in rules:
        fault = faults[rule.name]
        if fault is not None and not rule.denies:
            return Decision(False, rule.name, fault[1], fault[0])
    what = f"{thing.sort.value} {thing.name}"
    return Decision(False, DEFAULT, f"no rule lets {asked.reader} have the {what}", Code.NOT_LISTED)


def _is_about(rule: Rule, thing: Thing, policy: Policy) -> bool:
    if thing.sort is Sort.ACTION:
        if thing.risk not in rule.what.risk:
            return False
        # what is denied is denied everywhere
        if not rule.denies and ("live" if thing.is_live else "what-if") not in rule.what.acts:
            return False
    if thing.is_relayed and not (rule.relay or rule.denies):
        return False
    if thing.entity is None or not rule.what.is_selective:
        return True
    return rule.what.selects(thing.entity, policy.areas)


def _fault(rule: Rule, policy: Policy, asked: Question) -> tuple[Code, str] | None:
    """Why a rule is not in force for a question, or None when it is.

    A reader that does not say what for is refused by denials for any purpose.
    """
    if (
        rule.purpose
        and asked.purpose not in rule.purpose
        and not (rule.denies and not asked.purpose)
    ):
        wanted = ", ".join(rule.purpose)
        said = repr(asked.purpose) if asked.purpose else "no purpose"
        return Code.WRONG_PURPOSE, f"it is for {wanted}, and {said} was given"
    if rule.hours is not None and not rule.hours.hold(asked.instant):
        return Code.OUTSIDE_HOURS, f"it is from {rule.hours}"
    if rule.emergency is not None and asked.declaration_of(policy, rule.emergency) is None:
        return Code.NO_EMERGENCY, f"it is for the emergency {rule.emergency}, which is not declared"
    return None


def now() -> datetime:
    """The instant that the wall clock shows."""
    return datetime.now(UTC)
