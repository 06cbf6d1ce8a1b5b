"""What a reader would see of a city, why, and by which rule: a dry run of an export policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from federation.peer.export import Interior, entities_of
from federation.peer.policy import (
    Decision,
    Policy,
    Question,
    Sort,
    Thing,
    concerning,
    decide,
    matches_any,
)
from federation.peer.reader import matches
from federation.twin import SYSTEM, Description, Entity


@dataclass(frozen=True, slots=True)
class Line:
    """What a reader gets of one thing, or of those entities of it for which it is the same."""

    sort: Sort
    name: str
    entities: tuple[str, ...]
    """Those that it is about; empty where there is one only, or nothing is known of them."""
    of: int
    """How many there are."""
    decision: Decision

    @property
    def whose(self) -> str:
        if not self.entities or len(self.entities) == self.of:
            return "all" if self.entities else ""
        shown = ", ".join(self.entities[:3])
        return f"{shown}, ..." if len(self.entities) > 3 else shown

    @property
    def gets(self) -> str:
        if not self.decision.allowed:
            return "nothing"
        if self.sort in (Sort.VARIABLE, Sort.EVENT):
            return str(self.decision.resolution)
        return "yes"

    @property
    def why(self) -> str:
        if self.decision.declaration is not None:
            d = self.decision.declaration
            return f"emergency {d.emergency}, declared by {d.by}"
        return self.decision.reason


def explain(
    policy: Policy,
    asked: Question,
    interior: Interior | None = None,
    pattern: str = "*",
) -> list[Line]:
    """What the reader gets of everything whose name is as the pattern says.

    Of a city whose interior is not known, what the rules name is all there is to go by; rules
    about some entities only are then taken to be about all.
    """
    lines = [
        Line(Sort.SESSION, mode, (), 0, decide(policy, asked, Thing(Sort.SESSION, mode)))
        for mode in ("what-if", "live")
        if matches(pattern, mode)
    ]
    if interior is None:
        named = {
            (sort, name): None
            for rule in policy.rules
            for sort in Sort
            if sort is not Sort.SESSION
            for name in rule.what.named(sort)
            if matches(pattern, name)
        }
        if "*" not in pattern and not any(name == pattern for _, name in named):
            named |= {(sort, pattern): None for sort in Sort if sort is not Sort.SESSION}
        lines += [
            Line(sort, name, (), 0, decide(policy, asked, Thing(sort, name)))
            for sort, name in named
        ]
        return lines
    acts_live = any("live" in rule.what.acts for rule in policy.rules)
    for member, description in interior.descriptions.items():
        is_relayed = member in interior.cities
        for thing, kind in _things(member, description):
            if thing.is_live and (is_relayed or not acts_live):
                continue
            if matches(pattern, thing.name):
                thing = replace(thing, is_relayed=is_relayed)
                lines += _lines(policy, asked, thing, entities_of(description, kind))
    lines += [
        Line(sort, name, (), 0, decide(policy, asked, Thing(sort, name)))
        for sort in (Sort.EVENT, Sort.FLEXIBILITY)
        for rule in policy.rules
        for name in rule.what.named(sort)
        if matches(pattern, name)
    ]
    return list({(ln.sort, ln.name, ln.entities): ln for ln in lines}.values())


def _things(member: str, description: Description) -> Iterable[tuple[Thing, str]]:
    for variable in description.outputs():
        yield Thing(Sort.VARIABLE, f"{member}.{variable.name}"), variable.kind
    for variable in description.inputs():
        yield Thing(Sort.INPUT, f"{member}.{variable.name}"), variable.kind
    for actuator in description.actuators:
        name = f"{member}.{actuator.name}"
        for is_live in (False, True):
            yield Thing(Sort.ACTION, name, risk=actuator.risk, is_live=is_live), actuator.kind


def _lines(policy: Policy, asked: Question, thing: Thing, entities: Sequence[Entity]) -> list[Line]:
    """One line for all entities for which the answer is the same."""
    shown = f"{thing.name} (live)" if thing.is_live else thing.name
    if not any(
        rule.what.is_selective for rule in concerning(policy, asked.reader, thing.sort, thing.name)
    ):
        ids = () if entities and entities[0].kind == SYSTEM else tuple(e.id for e in entities)
        return [Line(thing.sort, shown, ids, len(ids), decide(policy, asked, thing))]
    found: dict[tuple[bool, str, str], tuple[Decision, list[str]]] = {}
    for entity in entities:
        decision = decide(policy, asked, replace(thing, entity=entity))
        key = (decision.allowed, decision.rule, decision.reason)
        found.setdefault(key, (decision, []))[1].append(entity.id)
    return [
        Line(thing.sort, shown, tuple(ids), len(entities), decision)
        for decision, ids in found.values()
    ]


def table(lines: Sequence[Line]) -> str:
    """The lines with their columns one below the other."""
    rows = [("what", "name", "of", "sees", "rule", "why")]
    rows += [(ln.sort.value, ln.name, ln.whose, ln.gets, ln.decision.rule, ln.why) for ln in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    )


def advice(policy: Policy, lines: Sequence[Line], asked: Question) -> list[str]:
    """What somebody may want to know who is surprised by the table."""
    said = []
    if not policy.rules:
        said.append("the policy has no rules, and what no rule allows is refused")
    sessions = {ln.name: ln.decision for ln in lines if ln.sort is Sort.SESSION}
    if sessions and not any(decision.allowed for decision in sessions.values()):
        said.append(
            f"{asked.reader} may begin no session, so it gets nothing over the wire, whatever else "
            "is allowed: a rule with `what: {sessions: [what-if]}` lets it"
        )
    if not any(asked.reader.is_meant_by(pattern) for rule in policy.rules for pattern in rule.who):
        said.append(
            f"no rule is for {asked.reader}: a rule's `who` has spiffe://CITY/ROLE/NAME, or the "
            "name of a city, in which * stands for any text"
        )
    return said


def unused(policy: Policy, interior: Interior) -> list[str]:
    """Patterns of rules that name nothing that the city has, each with its rule."""
    names: Mapping[Sort, set[str]] = {sort: set() for sort in Sort}
    for member, description in interior.descriptions.items():
        for thing, _ in _things(member, description):
            names[thing.sort].add(thing.name)
    return [
        f"rule {rule.name}: the city has no {sort.value} {pattern}"
        for rule in policy.rules
        for sort in (Sort.VARIABLE, Sort.INPUT, Sort.ACTION)
        for pattern in rule.what.named(sort)
        if not any(matches_any((pattern,), name) for name in names[sort])
    ]
