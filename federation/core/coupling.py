"""How outputs of members feed inputs of others: units, sparse maps, delays, order of steps."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import TypeVar

import networkx as nx
import numpy as np
import pint
from numpy.typing import NDArray

from federation.errors import Reason, ScenarioError, TwinError
from federation.twin import SYSTEM, Causality, Description, Variable, Vector, plain_zeros

MAX_CAUSES = 8
"""How many causes one input entry carries; enough to explain, few enough to read."""


class Combine(StrEnum):
    """What becomes of several sources of one input entry."""

    ERROR = "error"
    SUM = "sum"
    MAX = "max"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Coupling:
    """An output variable of one member that feeds an input of another.

    `links` maps source entity to target entity with a weight; None joins entities of the
    same id, and spreads a `system` scalar over all targets. `delay_ns` 0 makes a value
    visible in its own instant. A coupling that is there from `since_ns` on brings, at that
    instant, what its source says then, whatever the delay.
    """

    source: str
    output: str
    target: str
    input: str
    delay_ns: int = 0
    links: tuple[tuple[str, str, float], ...] | None = None
    combine: Combine = Combine.ERROR
    since_ns: int = 0

    @property
    def name(self) -> str:
        return f"{self.source}.{self.output} -> {self.target}.{self.input}"

    def visible_ns(self, time_ns: int) -> int:
        """From when on a value that was published at `time_ns` is visible."""
        return self.since_ns if time_ns < self.since_ns else time_ns + self.delay_ns


@dataclass(frozen=True, slots=True)
class Actuation:
    """The right of one member to set another's actuators, `delay_ns` > 0 after it decided."""

    source: str
    target: str
    delay_ns: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """Members that join a run together, at an instant of it.

    For them the run begins then: their offsets and couplings count from `time_ns`.
    """

    members: tuple[str, ...]
    time_ns: int


@lru_cache(maxsize=1)
def unit_registry() -> pint.UnitRegistry[float]:
    """The field's units, with people, vehicles and US dollars as dimensions of their own."""
    registry: pint.UnitRegistry[float] = pint.UnitRegistry()
    for base in ("person = [person] = _ = persons = people", "vehicle = [vehicle] = veh"):
        registry.define(base)
    registry.define("USD = [currency]")
    return registry


@lru_cache(maxsize=4096)
def conversion(source: str, target: str) -> tuple[float, float]:
    """The `(factor, offset)` that turns a number in `source` into one in `target`."""
    if source == target:
        parse_unit(source)
        return 1.0, 0.0
    registry = unit_registry()
    a, b = parse_unit(source), parse_unit(target)
    try:
        offset = float(registry.Quantity(0.0, a).to(b).magnitude)
        one = float(registry.Quantity(1.0, a).to(b).magnitude)
    except pint.DimensionalityError as error:
        raise ScenarioError(
            Reason.INCOMPATIBLE_UNITS,
            f"{source!r} can't be converted to {target!r}: {error}",
            {"source_unit": source, "target_unit": target},
        ) from None
    return one - offset, offset


def parse_unit(text: str) -> pint.Unit:
    """Read a unit, or say that it is unknown."""
    try:
        return unit_registry().Unit("" if text == "1" else text)
    except (pint.UndefinedUnitError, pint.errors.DefinitionSyntaxError, ValueError, TypeError):
        raise ScenarioError(
            Reason.UNKNOWN_UNIT,
            f"{text!r} is not a unit that pint knows",
            {"unit": text},
        ) from None
    except Exception as error:  # pint's parser lets tokenizer errors through
        raise ScenarioError(
            Reason.UNKNOWN_UNIT, f"{text!r} can't be read as a unit: {error}", {"unit": text}
        ) from None


@dataclass(frozen=True, slots=True)
class Wire:
    """A coupling resolved to indices: `target[rows] = factor * weight * source[columns] + offset`.

    `targets_of[column]` lists the rows that a source entry feeds.
    """

    coupling: Coupling
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    gain: Vector
    offset: float
    targets_of: Mapping[int, tuple[int, ...]]
    is_identity: bool
    """Whether the whole source vector arrives as it is."""

    def carry(self, source: Vector) -> Vector:
        """The contribution of each link, in the order of `rows`."""
        return source[self.columns] * self.gain + self.offset


@dataclass(frozen=True, slots=True)
class Slot:
    """One input of one member with all wires that feed it."""

    member: str
    variable: Variable
    size: int
    combine: Combine
    wires: tuple[Wire, ...]
    sources_of: Mapping[int, tuple[tuple[int, int], ...]]
    """Per target row the `(wire, column)` pairs behind it, in order of declaration."""

    @property
    def is_plain(self) -> bool:
        """Whether the input is, after the first value, just what its only source publishes."""
        return len(self.wires) == 1 and self.wires[0].is_identity

    def initial(self) -> Vector:
        return plain_zeros(np.full(self.size, self.variable.initial, dtype=np.float64))

    def combined(self, visible: Sequence[Vector | None]) -> Vector:
        """The input's value from the visible value of each wire (None before its first).

        It has no -0.0, so that equal values have equal bits.
        """
        return plain_zeros(self._combined(visible))

    def _combined(self, visible: Sequence[Vector | None]) -> Vector:
        result = self.initial()
        if self.combine is Combine.ERROR:
            for wire, value in zip(self.wires, visible, strict=True):
                if value is not None:
                    result[wire.rows] = wire.carry(value)
            return result
        total = np.full(self.size, -np.inf if self.combine is Combine.MAX else 0.0)
        count = np.zeros(self.size)
        for wire, value in zip(self.wires, visible, strict=True):
            if value is None:
                continue
            np.add.at(count, wire.rows, 1.0)
            if self.combine is Combine.MAX:
                np.maximum.at(total, wire.rows, wire.carry(value))
            else:
                np.add.at(total, wire.rows, wire.carry(value))
        fed = count > 0
        if self.combine is Combine.MEAN:
            total[fed] /= count[fed]
        result[fed] = total[fed]
        return result


_T = TypeVar("_T")


class _Each(Mapping[int, _T]):
    """Something for every entity, made when it is asked for: of 100,000, few ever are."""

    def __init__(self, size: int, make: Callable[[int], _T]) -> None:
        self._entities = range(size)
        self._make = make

    def __getitem__(self, index: int) -> _T:
        if index not in self._entities:
            raise KeyError(index)
        return self._make(index)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entities)

    def __len__(self) -> int:
        return len(self._entities)


def _alike(column: int) -> tuple[int, ...]:
    """`targets_of` of a wire that is an identity."""
    return (column,)


def _alone(row: int) -> tuple[tuple[int, int], ...]:
    """`sources_of` of an input that such a wire alone feeds."""
    return ((0, row),)


@dataclass(frozen=True, slots=True)
class Unit:
    """Members that step together at an instant: one, or a loop of instant couplings."""

    index: int
    members: tuple[str, ...]
    is_loop: bool


@dataclass(frozen=True)
class Wiring:
    """All members and couplings, checked and ordered; made by `wire`."""

    descriptions: Mapping[str, Description]
    couplings: tuple[Coupling, ...]
    actuations: tuple[Actuation, ...]
    slots: Mapping[str, tuple[Slot, ...]]
    units: tuple[Unit, ...]
    rank: Mapping[str, int]
    unit_of: Mapping[str, int]
    inward: tuple[tuple[tuple[int, int], ...], ...]
    """Per unit its `(source unit, shortest delay_ns)` from other units."""
    outward: tuple[tuple[int, ...], ...]
    echo_ns: tuple[int, ...]
    """Per unit the shortest delay after which it hears itself; beyond all time if never."""
    arrivals: tuple[Arrival, ...] = ()

    def since_ns(self, member: str) -> int:
        """From when on a member is there."""
        for arrival in self.arrivals:
            if member in arrival.members:
                return arrival.time_ns
        return 0

    def leads(self) -> dict[int, int]:
        """Per rank of a member of a loop the lowest rank in its loop."""
        return {
            self.rank[member]: self.rank[unit.members[0]]
            for unit in self.units
            if unit.is_loop
            for member in unit.members
        }


def wire(
    descriptions: Mapping[str, Description],
    couplings: Iterable[Coupling],
    actuations: Iterable[Actuation] = (),
    arrivals: Iterable[Arrival] = (),
) -> Wiring:
    """Check every coupling against the descriptions and fix the order of steps.

    Members that arrive late rank after all that were there before, in the order of
    `arrivals`, so that the order of those does not change; a coupling without delay from one of
    them to one that ranks before it is refused. Raises `ScenarioError`: UNKNOWN_MEMBER,
    UNKNOWN_VARIABLE, UNKNOWN_ENTITY, UNKNOWN_UNIT, INCOMPATIBLE_UNITS, AMBIGUOUS_INPUT,
    LATE_WITHOUT_DELAY or LOOP_WITHOUT_DELAY; and `TwinError` INVALID_DESCRIPTION on a place that
    is not on Earth. Nothing has started by then.
    """
    couplings, actuations = tuple(couplings), tuple(actuations)
    arrivals = tuple(arrivals)
    since_ns = {member: a.time_ns for a in arrivals for member in a.members}
    if since_ns:
        couplings = tuple(_since(coupling, since_ns) for coupling in couplings)
    by_input: dict[tuple[str, str], list[Wire]] = {}
    combine: dict[tuple[str, str], Combine] = {}
    for coupling in couplings:
        resolved = _resolve(descriptions, coupling)
        key = (coupling.target, coupling.input)
        by_input.setdefault(key, []).append(resolved)
        if combine.setdefault(key, coupling.combine) is not coupling.combine:
            raise ScenarioError(
                Reason.AMBIGUOUS_INPUT,
                f"couplings into {coupling.target}.{coupling.input} combine in different ways",
                {"coupling": coupling.name},
            )
    for actuation in actuations:
        for member in (actuation.source, actuation.target):
            _description(descriptions, member, "an actuation")
        if actuation.delay_ns <= 0:
            raise ScenarioError(
                Reason.LOOP_WITHOUT_DELAY,
                f"{actuation.source} acts on {actuation.target} without delay; "
                "an action needs a delay of at least 1 ns",
            )
    slots: dict[str, tuple[Slot, ...]] = {}
    for name, description in descriptions.items():
        for variable in description.variables:
            parse_unit(variable.unit)
        _check_places(name, description)
        slots[name] = tuple(
            _slot(name, description, variable, by_input, combine)
            for variable in description.inputs()
        )
    units, rank = _order(descriptions, couplings, arrivals)
    unit_of = {member: unit.index for unit in units for member in unit.members}
    shortest: dict[tuple[int, int], int] = {}
    edges = [(c.source, c.target, c.delay_ns) for c in couplings]
    edges += [(a.source, a.target, a.delay_ns) for a in actuations]
    for source, target, delay_ns in edges:
        pair = (unit_of[source], unit_of[target])
        shortest[pair] = min(delay_ns, shortest.get(pair, delay_ns))
    inward: list[list[tuple[int, int]]] = [[] for _ in units]
    outward: list[list[int]] = [[] for _ in units]
    for (origin, destination), delay_ns in sorted(shortest.items()):
        if origin == destination:
            continue
        inward[destination].append((origin, delay_ns))
        outward[origin].append(destination)
    return Wiring(
        dict(descriptions),
        couplings,
        actuations,
        slots,
        units,
        rank,
        unit_of,
        tuple(tuple(edge) for edge in inward),
        tuple(tuple(edge) for edge in outward),
        tuple(shortest.get((unit.index, unit.index), 1 << 62) for unit in units),
        arrivals,
    )


def _since(coupling: Coupling, since_ns: Mapping[str, int]) -> Coupling:
    """The coupling as it is once both its members are there."""
    there_ns = max(since_ns.get(coupling.source, 0), since_ns.get(coupling.target, 0))
    return replace(coupling, since_ns=max(coupling.since_ns, there_ns))


def _slot(
    name: str,
    description: Description,
    variable: Variable,
    by_input: Mapping[tuple[str, str], list[Wire]],
    combine: Mapping[tuple[str, str], Combine],
) -> Slot:
    wires = tuple(by_input.get((name, variable.name), ()))
    rule = combine.get((name, variable.name), Combine.ERROR)
    ids = description.ids(variable.kind)
    if len(wires) == 1 and wires[0].is_identity:
        return Slot(name, variable, len(ids), rule, wires, _Each(len(ids), _alone))
    sources: dict[int, list[tuple[int, int]]] = {}
    for index, wire_ in enumerate(wires):
        for row, column in zip(wire_.rows.tolist(), wire_.columns.tolist(), strict=True):
            sources.setdefault(row, []).append((index, column))
    if rule is Combine.ERROR:
        for row, pairs in sources.items():
            if len(pairs) > 1:
                raise ScenarioError(
                    Reason.AMBIGUOUS_INPUT,
                    f"{name}.{variable.name}[{ids[row]}] has {len(pairs)} sources; say how "
                    "they combine: sum, max or mean",
                    {"member": name, "variable": variable.name, "entity": ids[row]},
                )
    return Slot(
        name, variable, len(ids), rule, wires, {row: tuple(pairs) for row, pairs in sources.items()}
    )


def _description(descriptions: Mapping[str, Description], member: str, what: str) -> Description:
    found = descriptions.get(member)
    if found is None:
        raise ScenarioError(
            Reason.UNKNOWN_MEMBER,
            f"{what} names {member!r}, which is no member{_suggest(member, descriptions)}",
            {"member": member},
        )
    return found


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _variable(
    description: Description, member: str, name: str, causality: Causality, coupling: Coupling
) -> Variable:
    candidates = {v.name: v for v in description.variables if v.causality is causality}
    found = candidates.get(name)
    if found is None:
        raise ScenarioError(
            Reason.UNKNOWN_VARIABLE,
            f"{member} has no {causality.value} {name!r} (coupling {coupling.name})"
            f"{_suggest(name, candidates)}",
            {"member": member, "variable": name},
        )
    return found


def _check_places(member: str, description: Description) -> None:
    for entity in description.entities:
        if abs(entity.lon_deg) > 180 or abs(entity.lat_deg) > 90:
            raise TwinError(
                Reason.INVALID_DESCRIPTION,
                f"{member}: {entity.kind} {entity.id} lies at {entity.lon_deg:g}, "
                f"{entity.lat_deg:g}, which are no WGS84 degrees; convert them in the twin",
                {"member": member, "entity": entity.id},
            )


def _resolve(descriptions: Mapping[str, Description], coupling: Coupling) -> Wire:
    what = f"coupling {coupling.name}"
    source = _description(descriptions, coupling.source, what)
    target = _description(descriptions, coupling.target, what)
    output = _variable(source, coupling.source, coupling.output, Causality.OUTPUT, coupling)
    input_ = _variable(target, coupling.target, coupling.input, Causality.INPUT, coupling)
    if coupling.delay_ns < 0:
        raise ScenarioError(Reason.SCENARIO_INVALID, f"{what} has a negative delay")
    try:
        factor, offset = conversion(output.unit, input_.unit)
    except ScenarioError as error:
        raise ScenarioError(
            error.reason, f"{what}: {error.message}", {**error.metadata, "coupling": coupling.name}
        ) from None
    links = coupling.links
    ids = target.ids(input_.kind)
    if links is None and source.ids(output.kind) == ids and (factor, offset) == (1.0, 0.0):
        every = np.arange(len(ids), dtype=np.int64)
        return Wire(coupling, every, every, np.ones(len(ids)), 0.0, _Each(len(ids), _alike), True)
    source_ids = {id_: i for i, id_ in enumerate(source.ids(output.kind))}
    target_ids = {id_: i for i, id_ in enumerate(ids)}
    if links is None:
        if output.kind == SYSTEM:
            links = tuple((SYSTEM, id_, 1.0) for id_ in target_ids)
        else:
            links = tuple((id_, id_, 1.0) for id_ in target_ids)
    rows: list[int] = []
    columns: list[int] = []
    gain: list[float] = []
    targets_of: dict[int, list[int]] = {}
    for source_id, target_id, weight in links:
        for id_, known, side in (
            (source_id, source_ids, "source"),
            (target_id, target_ids, "target"),
        ):
            if id_ not in known:
                raise ScenarioError(
                    Reason.UNKNOWN_ENTITY,
                    f"{what}: the {side} has no entity {id_!r}{_suggest(id_, known)}",
                    {"coupling": coupling.name, "entity": id_},
                )
        row, column = target_ids[target_id], source_ids[source_id]
        rows.append(row)
        columns.append(column)
        gain.append(factor * weight)
        targets_of.setdefault(column, []).append(row)
    return Wire(
        coupling,
        np.array(rows, dtype=np.int64),
        np.array(columns, dtype=np.int64),
        np.array(gain, dtype=np.float64),
        offset,
        {column: tuple(targets) for column, targets in targets_of.items()},
        _is_identity(rows, columns, gain, offset, len(source_ids), len(target_ids)),
    )


def _is_identity(
    rows: list[int],
    columns: list[int],
    gain: list[float],
    offset: float,
    source_size: int,
    target_size: int,
) -> bool:
    every = list(range(target_size))
    return (
        source_size == target_size
        and rows == every
        and columns == every
        and offset == 0.0
        and all(g == 1.0 for g in gain)
    )


def _order(
    descriptions: Mapping[str, Description],
    couplings: Iterable[Coupling],
    arrivals: tuple[Arrival, ...],
) -> tuple[tuple[Unit, ...], dict[str, int]]:
    """Units and ranks: first of the members from the start, then of each arrival in turn."""
    late = [arrival.members for arrival in arrivals]
    latecomers = {member for members in late for member in members}
    groups = [tuple(name for name in descriptions if name not in latecomers), *late]
    turn = {member: index for index, members in enumerate(groups) for member in members}
    units: list[Unit] = []
    rank: dict[str, int] = {}
    instant: list[list[Coupling]] = [[] for _ in groups]
    for coupling in couplings:
        if coupling.delay_ns > 0:
            continue
        source, target = turn[coupling.source], turn[coupling.target]
        if source > target:
            raise ScenarioError(
                Reason.LATE_WITHOUT_DELAY,
                f"coupling {coupling.name} has no delay, and {coupling.source} joined after "
                f"{coupling.target}, which steps before it: give the coupling a delay",
                {"coupling": coupling.name},
            )
        if source == target:
            instant[source].append(coupling)
    for members, group in zip(groups, instant, strict=True):
        _order_group({name: descriptions[name] for name in members}, group, units, rank)
    return tuple(units), rank


def _order_group(
    descriptions: Mapping[str, Description],
    instant: Iterable[Coupling],
    units: list[Unit],
    rank: dict[str, int],
) -> None:
    """Condense instant couplings into units and rank members by topological order, then name."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sorted(descriptions))
    graph.add_edges_from((coupling.source, coupling.target) for coupling in instant)
    condensed = nx.condensation(graph)
    first = {node: min(condensed.nodes[node]["members"]) for node in condensed}
    for node in nx.lexicographical_topological_sort(condensed, key=lambda n: first[n]):
        members = tuple(sorted(condensed.nodes[node]["members"]))
        is_loop = len(members) > 1 or graph.has_edge(members[0], members[0])
        if is_loop:
            stuck = [m for m in members if not descriptions[m].time.can_redo]
            if stuck:
                raise ScenarioError(
                    Reason.LOOP_WITHOUT_DELAY,
                    f"{' -> '.join((*members, members[0]))} is a loop of couplings without delay, "
                    f"and {', '.join(stuck)} can't redo a step; give one of its couplings a delay "
                    "of a step",
                    {"loop": ",".join(members)},
                )
        for member in members:
            rank[member] = len(rank)
        units.append(Unit(len(units), members, is_loop))
