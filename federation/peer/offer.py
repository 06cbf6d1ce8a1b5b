"""What a reader may have of what a city could do: the ports that rules name, and nothing behind
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from federation.core.coupling import Coupling
from federation.peer.export import AREA, Interior, entities_of
from federation.peer.policy import (
    Policy,
    Question,
    Resolution,
    Sort,
    Thing,
    concerning,
    decide_among,
)
from federation.plan.projection import Edge, project
from federation.twin import SYSTEM, Entity, LinearBlock, Port

TOLD = ("supply", "need")
"""The roles of ports that others can be joined to; what else a block has is the city's own."""


def offer(
    interior: Interior,
    policy: Policy,
    asked: Question,
    blocks: Mapping[str, LinearBlock],
    couplings: Sequence[Coupling],
    periods_ns: Sequence[int],
) -> LinearBlock | None:
    """What the members could do together, as far as the reader may have it (see
    `federation.plan.projection`); None when that is nothing.

    A port has the name that the variable would have of which it is: `energy_tie`, or
    `energy_tie_sum` where entities are told of together. Means and extremes of quantities that
    may be asked for are none, so a rule that tells these gives no port.
    """
    edges = tuple(edges_of(interior, policy, asked, blocks, periods_ns))
    return project(blocks, couplings, edges, f"what {interior.city} offers {asked.reader}")


def edges_of(
    interior: Interior,
    policy: Policy,
    asked: Question,
    blocks: Mapping[str, LinearBlock],
    periods_ns: Sequence[int],
) -> Iterable[Edge]:
    """The ports that the reader may have, and how finely."""
    starts_ns = [
        end_ns - own_ns for own_ns, end_ns in zip(periods_ns, accumulate(periods_ns), strict=True)
    ]
    taken: set[str] = set()
    for member, block in blocks.items():
        for port in block.ports:
            if port.role not in TOLD:
                continue
            for rule, resolution, rows in _granted(interior, policy, asked, member, port):
                groups = _groups(interior, policy, member, port, rows, resolution)
                if not groups:
                    continue
                name = f"{member}_{port.name}"
                kind = f"{member}_{port.kind}"
                if resolution.space == "sum":
                    name, kind = f"{name}_sum", AREA if resolution.by == "area" else SYSTEM
                while name in taken:
                    name = f"{name}_{rule.replace('-', '_')}"
                taken.add(name)
                window_ns = resolution.window_ns
                windows = (
                    tuple(start_ns // window_ns for start_ns in starts_ns)
                    if window_ns
                    else tuple(range(len(periods_ns)))
                )
                yield Edge(
                    member,
                    port.name,
                    name,
                    SYSTEM if port.kind == SYSTEM else kind,
                    tuple(groups),
                    tuple(groups.values()),
                    windows,
                    resolution.round_to,
                )


def _granted(
    interior: Interior, policy: Policy, asked: Question, member: str, port: Port
) -> Iterable[tuple[str, Resolution, tuple[int, ...]]]:
    """The entities of a port that may be had, by the rule that lets the reader have them."""
    name = f"{member}.{port.name}"
    rules = concerning(policy, asked.reader, Sort.FLEXIBILITY, name)
    if all(rule.denies for rule in rules):
        return
    is_relayed = member in interior.cities
    known = _entities(interior, member, port)
    granted: dict[str, tuple[Resolution, list[int]]] = {}
    for row, id_ in enumerate(port.entities):
        entity = known.get(id_, Entity(id_, port.kind))
        thing = Thing(Sort.FLEXIBILITY, name, entity, is_relayed=is_relayed)
        decision = decide_among(rules, policy, asked, thing)
        if decision.allowed:
            granted.setdefault(decision.rule, (decision.resolution, []))[1].append(row)
    for rule, (resolution, rows) in granted.items():
        yield rule, resolution, tuple(rows)


def _groups(
    interior: Interior,
    policy: Policy,
    member: str,
    port: Port,
    rows: tuple[int, ...],
    resolution: Resolution,
) -> dict[str, tuple[int, ...]]:
    """By what they are told as, the rows of the port that are added up."""
    if resolution.space == "each":
        return {port.entities[row]: (row,) for row in rows}
    if resolution.space != "sum":
        return {}
    found: dict[str, list[int]] = {}
    if resolution.by == "total":
        found[SYSTEM] = list(rows)
    else:
        known = _entities(interior, member, port)
        for row in rows:
            entity = known.get(port.entities[row], Entity(port.entities[row], port.kind))
            areas = (name for name, area in policy.areas.items() if area.holds(entity))
            if (area := next(areas, None)) is not None:
                found.setdefault(area, []).append(row)
    return {
        name: tuple(group) for name, group in found.items() if len(group) >= resolution.at_least
    }


def _entities(interior: Interior, member: str, port: Port) -> Mapping[str, Entity]:
    return {e.id: e for e in entities_of(interior.descriptions[member], port.kind)}
