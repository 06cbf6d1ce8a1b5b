r"""Turns a Pyomo model that a twin wrote into the linear block that a planner reads.

Pyomo itself says what is linear in what (`LinearStandardFormCompiler`); here its rows get back
their two bounds and everything its name:

.. math::
    \min c^T x \quad row\_low \le A x \le row\_high, \quad low \le x \le high

A twin needs the extra `multitwin[plan]` to import this; a block of plain arrays needs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyomo.environ as pyo
from pyomo.common.errors import InfeasibleConstraintException, PyomoException
from pyomo.repn.plugins.standard_form import LinearStandardFormCompiler

from federation.errors import Reason, TwinError
from federation.twin import LinearBlock, Port, Vector

CONSTANT = "constant"
"""The column, always 1, whose cost is what the objective has besides its variables."""


@dataclass(frozen=True, slots=True)
class PortOf:
    """Says which `Var` of a model stands for a port, and what it means (see `Port`).

    The variable is indexed by entity and period, in the order of its index sets. It must be
    bounded on both sides: prices on it would else have no answer.
    """

    var: str
    name: str
    role: str
    kind: str
    unit: str = "1"


def compile_block(model: Any, ports: Sequence[PortOf] = (), doc: str = "") -> LinearBlock:
    """The block of a `ConcreteModel` or a constructed `Block`, by the names that they have there.

    An objective that is maximised counts as gain, in US dollars of 2020. Raises `TwinError`:
    INVALID_BLOCK for what is not linear, can't be true, has no objective or several, or is no
    proper port; NOT_FINITE for NaN, and for infinite costs and coefficients.
    """
    objectives = list(model.component_data_objects(pyo.Objective, active=True))
    if len(objectives) > 1:
        raise _bad(f"it has {len(objectives)} active objectives; deactivate all but one")
    variables = list(model.component_data_objects(pyo.Var, active=True, descend_into=True))
    place = {id(v): j for j, v in enumerate(variables)}
    try:
        form = LinearStandardFormCompiler().write(model, mixed_form=True, set_sense=pyo.minimize)
    except InfeasibleConstraintException as error:
        raise _bad(f"nothing could satisfy it: {error}") from None
    except (PyomoException, ValueError, TypeError) as error:
        raise _bad(f"Pyomo can't read it as linear: {error}") from None
    foreign = [v.name for v in form.columns if id(v) not in place]
    if foreign:
        raise _bad(f"it uses {foreign[0]!r}, a variable that is not its own")

    low, high = _bounds(variables)
    places = np.array([place[id(v)] for v in form.columns], dtype=np.int64)
    cost = np.zeros(len(variables))
    offset = 0.0
    if objectives:
        cost[places] = form.c.toarray()[0]
        offset = float(form.c_offset[0])
    names = [v.name for v in variables]
    if offset:
        if CONSTANT in names:
            raise _bad(f"{CONSTANT!r} is the name of the constant of the objective")
        names.append(CONSTANT)
        low, high, cost = np.append(low, 1.0), np.append(high, 1.0), np.append(cost, offset)

    # a row with two bounds comes twice: the second time it only brings its lower bound
    row_of: dict[int, int] = {}
    first: list[int] = []
    for k, (constraint, _) in enumerate(form.rows):
        if row_of.setdefault(id(constraint), len(row_of)) == len(first):
            first.append(k)
    row_low, row_high = np.full(len(first), -np.inf), np.full(len(first), np.inf)
    for (constraint, side), bound in zip(form.rows, form.rhs, strict=True):
        row = row_of[id(constraint)]
        if side <= 0:
            row_low[row] = bound
        if side >= 0:
            row_high[row] = bound
    matrix = form.A.tocsr()[first].tocoo()
    block = LinearBlock(
        columns=tuple(names),
        low=low,
        high=high,
        cost=cost,
        integer=np.array([v.is_integer() for v in variables] + [False] * bool(offset), np.bool_),
        rows=tuple(form.rows[k][0].name for k in first),
        row_low=row_low,
        row_high=row_high,
        row_index=matrix.row.astype(np.int64),
        column_index=places[matrix.col] if matrix.nnz else np.zeros(0, np.int64),
        coefficient=np.asarray(matrix.data, np.float64),
        ports=tuple(_port(model, port, place) for port in ports),
        doc=doc or (model.doc or ""),
    )
    _check(block)
    return block


def _bounds(variables: Iterable[Any]) -> tuple[Vector, Vector]:
    low, high = [], []
    for v in variables:
        if not (v.is_continuous() or v.is_integer()):
            raise _bad(f"{v.name} is neither continuous nor whole")
        if v.fixed:
            # what is fixed has left the rows already, and keeps its column for its name
            value = pyo.value(v)
            low.append(value)
            high.append(value)
            continue
        low.append(-math.inf if v.lb is None else v.lb)
        high.append(math.inf if v.ub is None else v.ub)
    return np.array(low, np.float64), np.array(high, np.float64)


def _port(model: Any, port: PortOf, place: dict[int, int]) -> Port:
    var = model.find_component(port.var)
    if var is None or getattr(var, "ctype", None) is not pyo.Var:
        raise _bad(f"the port {port.name} is to be the variable {port.var!r}, which it lacks")
    if port.role not in ("available", "supply", "need"):
        raise _bad(f"the port {port.name} has the role {port.role!r}")
    keys = list(var)
    if not keys or not all(isinstance(key, tuple) and len(key) == 2 for key in keys):
        raise _bad(f"{port.var}, the port {port.name}, is not indexed by entity and period")
    entities = list(dict.fromkeys(entity for entity, _ in keys))
    periods = list(dict.fromkeys(period for _, period in keys))
    if len(keys) != len(entities) * len(periods):
        raise _bad(f"{port.var}, the port {port.name}, lacks some periods of some entity")
    for data in var.values():
        if data.fixed:
            raise _bad(f"{data.name} is fixed, so that the port {port.name} could not move it")
        if data.lb is None or data.ub is None or not math.isfinite(data.ub - data.lb):
            raise _bad(f"{data.name} of the port {port.name} needs a lower and an upper bound")
    columns = [[place[id(var[entity, period])] for period in periods] for entity in entities]
    return Port(
        port.name,
        port.role,
        port.kind,
        port.unit,
        tuple(str(entity) for entity in entities),
        np.array(columns, dtype=np.int64),
    )


def _check(block: LinearBlock) -> None:
    """Refuse what no solver could read, by the names of its author."""
    for what, names, values in (
        ("the cost of", block.columns, block.cost),
        ("a coefficient in", [block.rows[i] for i in block.row_index], block.coefficient),
    ):
        for index in np.flatnonzero(~np.isfinite(values))[:1]:
            raise TwinError(Reason.NOT_FINITE, f"{what} {names[index]} is {values[index]}")
    for names, low, high in (
        (block.columns, block.low, block.high),
        (block.rows, block.row_low, block.row_high),
    ):
        for index in np.flatnonzero(np.isnan(low) | np.isnan(high))[:1]:
            raise TwinError(Reason.NOT_FINITE, f"a bound of {names[index]} is NaN")
        for index in np.flatnonzero((low > high) | (low == np.inf) | (high == -np.inf))[:1]:
            raise _bad(f"{names[index]} lies between {low[index]:g} and {high[index]:g}")


def _bad(message: str) -> TwinError:
    return TwinError(Reason.INVALID_BLOCK, f"a model makes no linear block: {message}")
