"""What a policy makes of a city for one reader: a description, and where its values come from.

The names that a reader sees are made of the members' own: `energy_load` is the load of the member
`energy`, `energy_load_sum` what is told of it in total or by area. Neither a name nor anything
else in the description depends on what the reader may not have. Where two rules tell of the same
variable in the same way but not as finely, the second's has the name of the rule behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from federation.errors import Reason, ScenarioError
from federation.peer.policy import (
    Area,
    Code,
    Decision,
    Declaration,
    Policy,
    Question,
    Resolution,
    Rule,
    Sort,
    Thing,
    concerning,
    decide,
    decide_among,
)
from federation.twin import (
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    TimePolicy,
    Variable,
    Vector,
)

Mode = Literal["what-if", "live"]
"""A session of a city: a time line of its own, or the run that goes on."""

AREA = "area"
"""The kind of entities that stand for areas."""


@dataclass(frozen=True)
class Interior:
    """What there is in a city: its members, which of them are other cities and whose, and which
    entries of their inputs nothing in the city feeds."""

    city: str
    descriptions: Mapping[str, Description]
    cities: Mapping[str, str] = field(default_factory=dict)
    unfed: Mapping[tuple[str, str], Sequence[int]] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """One variable as a reader sees it: which entries of which inner variable, and how finely.

    Each of `groups` are the entries that make one entry of it.
    """

    name: str
    member: str
    variable: str
    groups: tuple[tuple[int, ...], ...]
    resolution: Resolution
    rule: str

    def told(self, value: Vector) -> Vector:
        """The value as it is told, but for how late: gathered in space, and in steps of a size."""
        match self.resolution.space:
            case "each":
                columns = [column for (column,) in self.groups]
                return self.rounded(value[columns])
            case "sum":
                found = [value[list(group)].sum() for group in self.groups]
            case "mean":
                found = [value[list(group)].mean() for group in self.groups]
            case "max":
                found = [value[list(group)].max() for group in self.groups]
            case "min":
                found = [value[list(group)].min() for group in self.groups]
        return self.rounded(np.array(found))

    def rounded(self, value: Vector) -> Vector:
        """To the nearest multiple of the step that it is told in."""
        step = self.resolution.round_to
        return value if step is None else np.rint(value / step) * step + 0.0


@dataclass(frozen=True, slots=True)
class Entry:
    """An input or an actuator that a reader may set: its own name, whose it is, which entries."""

    name: str
    member: str
    variable: str
    columns: tuple[int, ...]
    rule: str


@dataclass(frozen=True)
class Export:
    """What one reader gets of a city. Two that are equal give the same."""

    description: Description
    views: tuple[View, ...] = ()
    inputs: tuple[Entry, ...] = ()
    actuators: tuple[Entry, ...] = ()
    mode: Mode = "what-if"
    declared: tuple[Declaration, ...] = ()
    """The emergencies without which it would be less, or other."""


def may_begin(policy: Policy, asked: Question, mode: Mode) -> Decision:
    """Whether a reader may have sessions of this kind."""
    return decide(policy, asked, Thing(Sort.SESSION, mode))


def refusal(policy: Policy, asked: Question, sort: Sort, name: str) -> ScenarioError:
    """The error of something that a reader may not have: the reason and the rule's name.

    It is the same whether there is such a thing or not.
    """
    decision = decide(policy, asked, Thing(sort, name))
    reason = "it is not told any more as it was" if decision.allowed else decision.reason
    code = decision.code or Code.DENIED
    what = f"a {name} session" if sort is Sort.SESSION else f"{name}"
    return ScenarioError(
        Reason.NOT_EXPORTED,
        f"{asked.reader} may not have {what}: {reason} (rule {decision.rule})",
        {"rule": decision.rule, "code": code.value, "what": name},
    )


def export_of(interior: Interior, policy: Policy, asked: Question, mode: Mode) -> Export:
    """What a reader gets of a city now; nothing at all where it may begin no session."""
    makes = _Makes(interior, policy, asked)
    if may_begin(policy, asked, mode).allowed:
        for member, description in interior.descriptions.items():
            makes.take_outputs(member, description)
            if mode == "what-if":
                makes.take_inputs(member, description)
                makes.take_actuators(member, description)
    kpis = [f"{m}_{kpi}" for m, d in interior.descriptions.items() for kpi in d.kpis]
    scalars = {v.name for v in makes.variables if v.kind == SYSTEM}
    description = Description(
        model=f"city-{interior.city}",
        version=interior.version,
        domain="city",
        entities=tuple(makes.entities),
        variables=tuple(makes.variables),
        time=TimePolicy(period_ns=policy.step_ns),
        actuators=tuple(makes.actuators),
        kpis=tuple(name for name in kpis if name in scalars),
        doc=f"what {interior.city} lets {asked.reader} have",
    )
    told = (tuple(makes.views), tuple(makes.inputs), tuple(makes.entries))
    return Export(description, *told, mode, tuple(makes.declared))


class _Makes:
    """An export in the making."""

    def __init__(self, interior: Interior, policy: Policy, asked: Question) -> None:
        self.entities: list[Entity] = []
        self.variables: list[Variable] = []
        self.actuators: list[Actuator] = []
        self.views: list[View] = []
        self.inputs: list[Entry] = []
        self.entries: list[Entry] = []
        self.declared: dict[Declaration, None] = {}
        self._interior, self._policy, self._asked = interior, policy, asked
        self._of_kind: dict[tuple[str, str], tuple[Entity, ...]] = {}
        self._kinds: dict[str, tuple[str, ...]] = {}
        """The ids of each kind that is told of."""

    def _entities(self, member: str, kind: str) -> tuple[Entity, ...]:
        key = (member, kind)
        if key not in self._of_kind:
            self._of_kind[key] = entities_of(self._interior.descriptions[member], kind)
        return self._of_kind[key]

    def take_outputs(self, member: str, description: Description) -> None:
        city = self._interior.cities.get(member)
        for variable in description.outputs():
            if city is not None:
                variable = replace(variable, via=(city, *variable.via))
                if self._asked.reader.city in variable.via:
                    continue  # it has come from there
            found = self._granted(Sort.VARIABLE, member, variable.name, variable.kind)
            for rule, resolution, columns in found:
                view = self._view(member, variable, rule, resolution, columns)
                if view is not None:
                    self.views.append(view)

    def take_inputs(self, member: str, description: Description) -> None:
        """Inputs that nothing in the city feeds; each is told of as one variable by each rule."""
        for variable in description.inputs():
            found = self._granted(Sort.INPUT, member, variable.name, variable.kind)
            unfed = set(self._interior.unfed.get((member, variable.name), ()))
            for rule, _, columns in found:
                free = tuple(column for column in columns if column in unfed)
                if not free:
                    continue
                kind = self._kind(member, variable.kind, free, rule, variable.name)
                name = self._name(f"{member}_{variable.name}", rule)
                self.variables.append(replace(variable, name=name, kind=kind))
                self.inputs.append(Entry(name, member, variable.name, free, rule))

    def take_actuators(self, member: str, description: Description) -> None:
        for actuator in description.actuators:
            found = self._granted(Sort.ACTION, member, actuator.name, actuator.kind, actuator)
            for rule, _, columns in found:
                kind = self._kind(member, actuator.kind, columns, rule, actuator.name)
                name = self._name(f"{member}_{actuator.name}", rule)
                self.actuators.append(replace(actuator, name=name, kind=kind))
                self.entries.append(Entry(name, member, actuator.name, columns, rule))

    def _granted(
        self,
        sort: Sort,
        member: str,
        name: str,
        kind: str,
        actuator: Actuator | None = None,
    ) -> Iterable[tuple[str, Resolution, tuple[int, ...]]]:
        """The entries that may be had, by the rule that lets the reader have them."""
        policy, asked = self._policy, self._asked
        rules = concerning(policy, asked.reader, sort, f"{member}.{name}")
        if not any(not rule.denies for rule in rules):
            return
        granted: dict[str, tuple[Resolution, list[int]]] = {}
        is_relayed = member in self._interior.cities
        common = Thing(sort, f"{member}.{name}", None, is_relayed=is_relayed)
        if actuator is not None:
            common = replace(common, risk=actuator.risk)
        entities = self._entities(member, kind)
        one = None if _select(rules) else decide_among(rules, policy, asked, common)
        for column, entity in enumerate(entities):
            decision = one or decide_among(rules, policy, asked, replace(common, entity=entity))
            if decision.declaration is not None:
                self.declared[decision.declaration] = None
            if decision.allowed:
                granted.setdefault(decision.rule, (decision.resolution, []))[1].append(column)
        for rule, (resolution, columns) in granted.items():
            yield rule, resolution, tuple(columns)

    def _view(
        self,
        member: str,
        variable: Variable,
        rule: str,
        resolution: Resolution,
        columns: tuple[int, ...],
    ) -> View | None:
        if resolution.space == "each":
            kind = self._kind(member, variable.kind, columns, rule, variable.name)
            name = self._name(f"{member}_{variable.name}", rule)
            groups: tuple[tuple[int, ...], ...] = tuple((column,) for column in columns)
            told = replace(variable, name=name, kind=kind)
        else:
            grouped = self._groups(member, variable.kind, columns, resolution)
            grouped = {k: g for k, g in grouped.items() if len(g) >= resolution.at_least}
            if not grouped:
                return None
            groups = tuple(grouped.values())
            kind = SYSTEM
            if resolution.by == "area":
                told_areas = [_of_area(area, self._policy.areas[area]) for area in grouped]
                whose = f"{member}_{variable.name}"
                kind = self._told_kind(AREA, rule, whose, told_areas)
            name = self._name(f"{member}_{variable.name}_{resolution.space}", rule)
            # a range of each is none of their sum
            told = Variable(
                name, kind, variable.unit, Causality.OUTPUT, doc=variable.doc, via=variable.via
            )
        view = View(name, member, variable.name, groups, resolution, rule)
        size = len(self._entities(member, variable.kind))
        initial = view.told(np.full(size, variable.initial))
        # one number for all entries; of sums over groups of several sizes there is none
        first = float(initial[0]) if (initial == initial[0]).all() else 0.0
        self.variables.append(replace(told, initial=first))
        return view

    def _groups(
        self,
        member: str,
        kind: str,
        columns: tuple[int, ...],
        resolution: Resolution,
    ) -> dict[str, tuple[int, ...]]:
        """The entries of each group; one that lies in two areas counts for the first."""
        if resolution.by == "total":
            return {SYSTEM: columns}
        entities = self._entities(member, kind)
        found: dict[str, list[int]] = {}
        for column in columns:
            for name, area in self._policy.areas.items():
                if area.holds(entities[column]):
                    found.setdefault(name, []).append(column)
                    break
        return {name: tuple(found[name]) for name in self._policy.areas if name in found}

    def _kind(
        self,
        member: str,
        kind: str,
        columns: tuple[int, ...],
        rule: str,
        variable: str,
    ) -> str:
        """The kind of these entities, of which a reader knows no others."""
        if kind == SYSTEM:
            return SYSTEM
        entities = self._entities(member, kind)
        told = [entities[column] for column in columns]
        return self._told_kind(f"{member}_{kind}", rule, variable, told)

    def _told_kind(self, plain: str, rule: str, variable: str, told: Sequence[Entity]) -> str:
        """The name of the kind that has just these entities; a new one when there is none."""
        ids = tuple(entity.id for entity in told)
        name = plain
        more = itertools.chain((_plain(rule), variable), map(str, itertools.count(2)))
        while self._kinds.get(name, ids) != ids:
            name = f"{name}_{next(more)}"
        if name not in self._kinds:
            self.entities += [replace(entity, kind=name) for entity in told]
            self._kinds[name] = ids
        return name

    def _name(self, name: str, rule: str) -> str:
        taken = {variable.name for variable in self.variables}
        taken |= {actuator.name for actuator in self.actuators}
        while name in taken:
            name = f"{name}_{_plain(rule)}"
        return name


def _select(rules: Iterable[Rule]) -> bool:
    return any(rule.what.is_selective for rule in rules)


def _plain(rule: str) -> str:
    return rule.replace("-", "_")


def _of_area(name: str, area: Area) -> Entity:
    if area.box is None:
        return Entity(name, AREA)
    west, south, east, north = area.box
    return Entity(name, AREA, "", (west + east) / 2, (south + north) / 2)


def entities_of(description: Description, kind: str) -> tuple[Entity, ...]:
    """The entities of a kind in the order of vectors over it; of `system` the one that it has."""
    found = tuple(entity for entity in description.entities if entity.kind == kind)
    if kind == SYSTEM and not found:
        return (Entity(SYSTEM, SYSTEM),)
    return found


class Lens:
    """Tells of values as an export says, also over time: one object for one session."""

    def __init__(self, views: Iterable[View]) -> None:
        self._sights = [_Sight(view) for view in views]

    def see(self, time_ns: int, values: Mapping[tuple[str, str], Vector]) -> dict[str, Vector]:
        """What is told at an instant, counted from the start, at which these are the values."""
        told = {}
        for sight in self._sights:
            value = values.get((sight.view.member, sight.view.variable))
            found = sight.see(time_ns, value)
            if found is not None:
                told[sight.view.name] = found
        return told

    def state(self) -> list[list[Any]]:
        """What is gathered and what is told later, for another one of the same views."""
        return [[sight.window, sight.later] for sight in self._sights]

    def resume(self, state: Sequence[Sequence[Any]]) -> None:
        for sight, (window, later) in zip(self._sights, state, strict=True):
            sight.window, sight.later = list(window), [tuple(each) for each in later]


class _Sight:
    """One view over time."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.window: list[Vector] = []
        self.later: list[tuple[int, Vector]] = []
        """What is told later, and when."""

    def see(self, time_ns: int, value: Vector | None) -> Vector | None:
        resolution = self.view.resolution
        told = None if value is None else self.view.told(value)
        if resolution.window_ns:
            told = self._of_window(time_ns, value)
        if not resolution.delay_ns:
            return told
        if told is not None:
            self.later.append((time_ns + resolution.delay_ns, told))
        due = None
        while self.later and self.later[0][0] <= time_ns:
            due = self.later.pop(0)[1]
        return due

    def _of_window(self, time_ns: int, value: Vector | None) -> Vector | None:
        """What is told of a window at its end; it has all but its first instant."""
        if value is not None:
            finest = replace(self.view, resolution=_unrounded(self.view.resolution))
            self.window.append(finest.told(value))
        if not time_ns or time_ns % self.view.resolution.window_ns or not self.window:
            if not time_ns:
                self.window.clear()
            return None
        seen, self.window = np.array(self.window), []
        match self.view.resolution.take:
            case "mean":
                found = seen.mean(axis=0)
            case "max":
                found = seen.max(axis=0)
            case "min":
                found = seen.min(axis=0)
            case "sum":
                found = seen.sum(axis=0)
            case "last":
                found = seen[-1]
        return self.view.rounded(found)


def _unrounded(resolution: Resolution) -> Resolution:
    return resolution.model_copy(update={"round_to": None})
