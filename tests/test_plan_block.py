"""Pyomo models of twins' authors as linear blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyomo.environ as pyo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyomo.contrib.solver.solvers.highs import Highs

from federation.block import CONSTANT, PortOf, compile_block
from federation.errors import Reason, TwinError
from federation.plan.engine import engine_of, make_whole, optimum_usd
from federation.plan.joining import join
from federation.twin import LinearBlock
from federation.wire.codec import decode_block, encode_block


def ferry(fare_usd: float = 2.0) -> Any:
    """A ferry of at most 3 whole boats at 10 dollars carries up to 4 people each."""
    model = pyo.ConcreteModel(doc="a ferry")
    model.piers = pyo.Set(initialize=["north", "south"], ordered=True)
    model.hours = pyo.RangeSet(0, 1)
    model.boats = pyo.Var(model.hours, domain=pyo.NonNegativeIntegers, bounds=(0, 3))
    model.carried = pyo.Var(model.piers, model.hours, bounds=(0, 9))
    model.idle = pyo.Var(bounds=(-1, None))

    @model.Constraint(model.hours)  # type: ignore[untyped-decorator]
    def seats(m: Any, t: int) -> Any:
        return sum(m.carried[p, t] for p in m.piers) <= 4 * m.boats[t]

    @model.Constraint(model.hours)  # type: ignore[untyped-decorator]
    def fair(m: Any, t: int) -> Any:
        return pyo.inequality(-1, m.carried["north", t] - m.carried["south", t] + 1, 2)

    model.gain = pyo.Objective(
        expr=fare_usd * pyo.summation(model.carried) - 10 * pyo.summation(model.boats) - 5,
        sense=pyo.maximize,
    )
    return model


PORT = PortOf("carried", "people", "supply", "pier", "person")


def optimum(block: LinearBlock) -> float:
    problem = join({"ferry": block}, [])
    engine = engine_of(problem)
    make_whole(engine, np.flatnonzero(problem.integer))
    return optimum_usd(engine)


def test_a_model_becomes_a_block_with_its_own_names() -> None:
    block = compile_block(ferry(), [PORT])
    assert block.columns[:2] == ("boats[0]", "boats[1]")
    assert block.columns[-2:] == ("idle", CONSTANT)
    assert block.rows == ("seats[0]", "seats[1]", "fair[0]", "fair[1]")
    # the constant of a row goes to its bounds, and a row with two bounds stays one row
    assert block.row_low.tolist() == [-np.inf, -np.inf, -2.0, -2.0]
    assert block.row_high.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert block.integer.tolist() == [True, True] + [False] * 6
    assert block.low[block.columns.index("idle")] == -1.0  # used nowhere, and yet there
    (port,) = block.ports
    assert port.entities == ("north", "south")
    assert [[block.columns[j] for j in row] for row in port.columns] == [
        ["carried[north,0]", "carried[north,1]"],
        ["carried[south,0]", "carried[south,1]"],
    ]
    assert block.doc == "a ferry"


def test_what_is_gained_is_a_negative_cost_and_the_constant_counts() -> None:
    # at 2 dollars a boat of four earns 8 and costs 10; at 3 dollars three boats earn 6 an hour
    assert optimum(compile_block(ferry(2.0))) == pytest.approx(5.0)
    assert optimum(compile_block(ferry(3.0))) == pytest.approx(5.0 - 2 * 3 * 2)


def test_a_compiled_block_survives_the_wire() -> None:
    block = compile_block(ferry(), [PORT])
    again = decode_block(encode_block(block))
    assert again.rows == block.rows
    assert again.row_low.tolist() == block.row_low.tolist()


def test_a_block_within_a_model_is_compiled_alone() -> None:
    model = pyo.ConcreteModel()
    model.x = pyo.Var(bounds=(0, 1))
    model.yard = pyo.Block()
    model.yard.y = pyo.Var(bounds=(0, 2))
    model.yard.cost = pyo.Objective(expr=-model.yard.y)
    assert compile_block(model.yard).columns == ("yard.y",)
    model.yard.both = pyo.Constraint(expr=model.x + model.yard.y <= 1)
    assert refused(model.yard) == Reason.INVALID_BLOCK


def refused(model: Any, *ports: PortOf, saying: str = "") -> Reason:
    with pytest.raises(TwinError) as caught:
        compile_block(model, ports)
    assert saying in caught.value.message
    return caught.value.reason


def test_what_is_not_linear_is_refused_by_the_name_of_its_row() -> None:
    model = ferry()
    model.crowd = pyo.Constraint(expr=model.carried["north", 0] * model.carried["south", 0] <= 1)
    assert refused(model, saying="crowd") is Reason.INVALID_BLOCK
    model = ferry()
    model.del_component("gain")
    model.gain = pyo.Objective(expr=model.idle**2)
    assert refused(model, saying="gain") is Reason.INVALID_BLOCK


def test_what_no_solver_could_read_is_refused() -> None:
    model = ferry()
    model.more = pyo.Objective(expr=model.idle)
    assert refused(model, saying="2 active objectives") is Reason.INVALID_BLOCK
    model = ferry()
    model.never = pyo.Constraint(expr=0 * model.idle >= 1)
    assert refused(model, saying="never") is Reason.INVALID_BLOCK
    assert refused(ferry(float("nan"))) in (Reason.NOT_FINITE, Reason.INVALID_BLOCK)
    assert refused(ferry(float("inf"))) in (Reason.NOT_FINITE, Reason.INVALID_BLOCK)
    model = ferry()
    model.idle.setlb(7)
    model.idle.setub(6)
    assert refused(model, saying="idle lies between 7 and 6") is Reason.INVALID_BLOCK


def test_a_port_must_be_a_bounded_variable_over_entities_and_periods() -> None:
    assert refused(ferry(), PortOf("ghost", "g", "supply", "pier"), saying="'ghost'")
    assert refused(ferry(), PortOf("boats", "b", "supply", "pier"), saying="entity and period")
    assert refused(ferry(), PortOf("carried", "p", "gift", "pier"), saying="'gift'")
    model = ferry()
    model.carried["north", 1].setub(None)
    assert refused(model, PORT, saying="carried[north,1]") is Reason.INVALID_BLOCK
    model = ferry()
    model.carried["north", 1].fix(3)
    assert refused(model, PORT, saying="fixed") is Reason.INVALID_BLOCK


def test_a_fixed_variable_costs_what_it_costs() -> None:
    model = ferry(3.0)
    model.boats[0].fix(1)
    # one boat with four people earns 2 in the first hour; three earn 6 in the second
    assert optimum(compile_block(model)) == pytest.approx(5.0 - 2 - 6)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_pyomo_and_its_block_have_one_optimum(data: st.DataObject) -> None:
    """Random bounded problems of up to four columns and rows, in millions as the engine counts."""
    number = st.integers(-5, 5)
    size, count = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    model = pyo.ConcreteModel()
    model.x = pyo.Var(range(size), bounds=(-2, 3))
    for j in range(size):
        if data.draw(st.booleans()):
            model.x[j].domain = pyo.Integers
    model.rows = pyo.ConstraintList()
    for _ in range(count):
        body = sum(data.draw(number) * model.x[j] for j in range(size)) + data.draw(number)
        if isinstance(body, int | float) or not body.is_potentially_variable():
            continue
        low = data.draw(st.none() | st.integers(-9, 0))
        high = data.draw(st.none() | st.integers(0, 9))
        if low is not None or high is not None:
            model.rows.add((low, body, high))
    sense = data.draw(st.sampled_from([pyo.minimize, pyo.maximize]))
    model.aim = pyo.Objective(
        expr=1e6 * (sum(data.draw(number) * model.x[j] for j in range(size)) + 1), sense=sense
    )
    answer = Highs().solve(
        model, rel_gap=0.0, load_solutions=False, raise_exception_on_nonoptimal_result=False
    )
    try:
        block = compile_block(model)
    except TwinError:  # rows of nothing but numbers, which contradict each other
        block = None
    if block is None:
        assert answer.incumbent_objective is None
        return
    problem = join({"m": block}, [])
    engine = engine_of(problem)
    make_whole(engine, np.flatnonzero(problem.integer))
    engine.run()
    if answer.incumbent_objective is None:
        assert not np.isclose(engine.getInfo().primal_solution_status, 2)
    else:
        worth = 1.0 if sense == pyo.minimize else -1.0
        assert optimum_usd(engine) == pytest.approx(worth * answer.incumbent_objective, abs=1e2)
