"""Joins the linear blocks of several members into one, along the couplings of a scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federation.core.coupling import Coupling, conversion
from federation.twin import LinearBlock, Port, Vector

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where a port of one member receives what ports of others deliver: one entity.

    `rows` are the rows of the joined problem, period by period, and `received` the columns of
    the need port. `delivered[k]` are the columns of the k-th source, from `sources[k]`
    (member, port, entity, unit), which counts `weights[k]` units of the need for each of its own.
    """

    target: str
    port: str
    entity: str
    unit: str
    rows: Indices
    received: Indices
    sources: tuple[tuple[str, str, str, str], ...]
    delivered: Indices
    weights: Vector
    offset: float


@dataclass(frozen=True)
class Joined:
    r"""min c'x subject to row_low <= A x <= row_high, low <= x <= high, of all members.

    A coupling from a supply port s of one block to a need port n of another adds, for every
    entity h and period p,

    .. math::
        n_{hp} \le \sum_{e \to h} weight_{eh} \, s_{ep} + offset

    so that nothing is received that is not delivered. `available[member, component]` are
    the columns of one component, period by period. Rows and columns are named by who stated
    them, a colon, and the name that the member gave.
    """

    low: Vector
    high: Vector
    cost: Vector
    integer: NDArray[np.bool_]
    row_low: Vector
    row_high: Vector
    row_index: Indices
    column_index: Indices
    coefficient: Vector
    available: Mapping[tuple[str, str], Indices]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    crossings: tuple[Crossing, ...] = ()
    owners: Mapping[str, tuple[slice, slice]] = field(default_factory=dict)
    """Per member its columns and its own rows."""


def join(blocks: Mapping[str, LinearBlock], couplings: Sequence[Coupling]) -> Joined:
    """One problem from the blocks, in the order of their members' names."""
    names = sorted(blocks)
    sizes = [(len(blocks[n].columns), len(blocks[n].rows)) for n in names]
    ends = np.cumsum([(0, 0), *sizes], axis=0)
    first = {name: int(ends[i, 0]) for i, name in enumerate(names)}
    rows = [blocks[n].row_index + ends[i, 1] for i, n in enumerate(names)]
    columns = [blocks[n].column_index + first[n] for n in names]
    coefficients = [blocks[n].coefficient for n in names]
    row_names = [f"{n}: {row}" for n in names for row in blocks[n].rows]
    crossings: list[Crossing] = []
    offsets: list[float] = []
    for coupling in couplings:
        supply = _port(blocks, coupling.source, coupling.output, "supply")
        need = _port(blocks, coupling.target, coupling.input, "need")
        if supply is None or need is None:
            continue
        factor, offset = conversion(supply.unit, need.unit)
        row_of = {entity: i for i, entity in enumerate(supply.entities)}
        feeding: dict[str, list[tuple[int, float]]] = {}
        for source, target, weight in coupling.links or [(e, e, 1.0) for e in need.entities]:
            if source in row_of:
                feeding.setdefault(target, []).append((row_of[source], -weight * factor))
        for h, entity in enumerate(need.entities):
            if entity not in feeding:
                continue
            delivered = supply.columns[[i for i, _ in feeding[entity]]] + first[coupling.source]
            terms = np.vstack([need.columns[h] + first[coupling.target], delivered])
            place = ends[-1, 1] + len(offsets) + np.arange(terms.shape[1])
            weights = np.array([1.0, *(w for _, w in feeding[entity])])
            rows.append(np.broadcast_to(place, terms.shape).ravel())
            columns.append(terms.ravel())
            coefficients.append(np.repeat(weights, terms.shape[1]))
            offsets += [offset] * terms.shape[1]
            row_names += [
                f"{coupling.name}: {need.name}[{entity},{p}]" for p in range(terms.shape[1])
            ]
            crossings.append(
                Crossing(
                    coupling.target,
                    need.name,
                    entity,
                    need.unit,
                    place,
                    terms[0],
                    tuple(
                        (coupling.source, supply.name, supply.entities[i], supply.unit)
                        for i, _ in feeding[entity]
                    ),
                    delivered,
                    -weights[1:],
                    offset,
                )
            )
    return Joined(
        low=np.concatenate([blocks[n].low for n in names]),
        high=np.concatenate([blocks[n].high for n in names]),
        cost=np.concatenate([blocks[n].cost for n in names]),
        integer=np.concatenate([blocks[n].integer for n in names]),
        row_low=np.concatenate(
            [*(blocks[n].row_low for n in names), np.full(len(offsets), -np.inf)]
        ),
        row_high=np.concatenate([*(blocks[n].row_high for n in names), np.array(offsets)]),
        row_index=np.concatenate(rows),
        column_index=np.concatenate(columns),
        coefficient=np.concatenate(coefficients),
        available={
            (name, entity): port.columns[row] + first[name]
            for name in names
            for port in blocks[name].ports
            if port.role == "available"
            for row, entity in enumerate(port.entities)
        },
        columns=tuple(f"{n}: {column}" for n in names for column in blocks[n].columns),
        rows=tuple(row_names),
        crossings=tuple(crossings),
        owners={
            n: (
                slice(int(ends[i, 0]), int(ends[i + 1, 0])),
                slice(int(ends[i, 1]), int(ends[i + 1, 1])),
            )
            for i, n in enumerate(names)
        },
    )


def _port(blocks: Mapping[str, LinearBlock], member: str, name: str, role: str) -> Port | None:
    ports = blocks[member].ports if member in blocks else ()
    return next((p for p in ports if p.name == name and p.role == role), None)
