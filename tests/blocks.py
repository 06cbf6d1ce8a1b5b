"""Linear blocks written down as a person would, for tests of plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from federation.twin import LinearBlock, Port

Column = tuple[float, float, float]
"""Lower bound, upper bound, cost."""

Row = tuple[float, Mapping[str, float], float]


def block(
    columns: Mapping[str, Column],
    rows: Mapping[str, Row],
    whole: Sequence[str] = (),
    ports: Sequence[Port] = (),
) -> LinearBlock:
    names = list(columns)
    entries = [
        (i, names.index(c), v)
        for i, (_, body, _) in enumerate(rows.values())
        for c, v in body.items()
    ]
    return LinearBlock(
        columns=tuple(names),
        low=np.array([c[0] for c in columns.values()], dtype=np.float64),
        high=np.array([c[1] for c in columns.values()], dtype=np.float64),
        cost=np.array([c[2] for c in columns.values()], dtype=np.float64),
        integer=np.array([n in whole for n in names], dtype=np.bool_),
        rows=tuple(rows),
        row_low=np.array([r[0] for r in rows.values()], dtype=np.float64),
        row_high=np.array([r[2] for r in rows.values()], dtype=np.float64),
        row_index=np.array([e[0] for e in entries], dtype=np.int64),
        column_index=np.array([e[1] for e in entries], dtype=np.int64),
        coefficient=np.array([e[2] for e in entries], dtype=np.float64),
        ports=tuple(ports),
    )


def port(name: str, role: str, entities: Sequence[str], columns: Sequence[Sequence[int]]) -> Port:
    return Port(name, role, "thing", "1", tuple(entities), np.array(columns, dtype=np.int64))
