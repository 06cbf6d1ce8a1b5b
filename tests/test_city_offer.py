"""What a city could do, as its neighbours may know it: prices and quantities at its border."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.core.coupling import Coupling
from federation.errors import FederationError, PlanError, Reason
from federation.plan.engine import engine_of, make_whole, optimum_usd
from federation.plan.joining import Joined, join
from federation.plan.projection import TOLERANCE, Edge, project
from federation.twin import HOUR_NS, SYSTEM, LinearBlock, Port, StepInput, Vector
from federation.v1 import peer_pb2, peer_pb2_grpc
from federation.wire.caller import claim
from federation.wire.link import Link
from tests.blocks import block
from tests.test_peers import ASH, city
from tests.test_wire import bounded
from tests.works import homes_block, plants_block, write_elm

INF = np.inf
POWER = Coupling("plants", "power", "homes", "come")


def edge(periods: int, *, step: float | None = None, hours: int = 1) -> Edge:
    """Both lines together."""
    windows = tuple(t // hours for t in range(periods))
    return Edge("plants", "tie", "plants_tie_sum", SYSTEM, (SYSTEM,), ((0, 1),), windows, step)


def elm(periods: int, **how: float) -> dict[str, LinearBlock]:
    return {"plants": plants_block(periods, **how), "homes": homes_block(periods)}


def offered(blocks: Mapping[str, LinearBlock], *edges: Edge) -> LinearBlock:
    found = project(blocks, [POWER], edges)
    assert found is not None
    return found


def solved(problem: Joined) -> tuple[float, Vector]:
    engine = engine_of(problem)
    make_whole(engine, np.flatnonzero(problem.integer))
    usd = optimum_usd(engine)
    return usd, np.array(engine.getSolution().col_value)


def held(block_: LinearBlock, port: str, quantity: Vector) -> LinearBlock:
    """A block whose port has just these quantities, period by period, over all entities."""
    columns = next(p for p in block_.ports if p.name == port).columns
    rows, width = len(block_.rows), columns.shape[1]
    return replace(
        block_,
        rows=(*block_.rows, *(f"held {t}" for t in range(width))),
        row_low=np.append(block_.row_low, quantity),
        row_high=np.append(block_.row_high, quantity),
        row_index=np.append(block_.row_index, np.tile(rows + np.arange(width), len(columns))),
        column_index=np.append(block_.column_index, columns.ravel()),
        coefficient=np.append(block_.coefficient, np.ones(columns.size)),
    )


def true_usd(blocks: Mapping[str, LinearBlock], quantity: Vector) -> float:
    """What these quantities over both lines cost the city, by its own model, in whole numbers."""
    inside = {**blocks, "plants": held(blocks["plants"], "tie", quantity)}
    return solved(join(inside, [POWER]))[0]


def needy(worth: tuple[float, ...], most: float = 8.0) -> LinearBlock:
    """A neighbour to whom a megawatt-hour is worth so much, hour by hour."""
    columns = {f"import{t}": (0.0, most, -usd) for t, usd in enumerate(worth)}
    at = np.array([list(range(len(worth)))])
    return block(columns, {}, ports=[Port("import", "need", SYSTEM, "MW", (SYSTEM,), at)])


# -- the offer itself ------------------------------------------------------------------------------


def test_an_hour_is_a_curve_of_costs_that_shows_where_the_next_plant_begins() -> None:
    told = offered(elm(2), edge(2))
    assert [p.name for p in told.ports] == ["plants_tie_sum"]
    curve = {}
    for k, name in enumerate(told.columns):
        if name.startswith("offer 0"):
            at = told.row_index[(told.column_index == k) & (told.row_index > 0)]
            assert len(at) <= 1
            quantity = -told.coefficient[(told.column_index == k) & (told.row_index > 0)].sum()
            curve[round(quantity, 6)] = round(told.cost[k], 3)
    # one cheap megawatt is left over by the homes; 10 MW is all that the lines carry
    assert curve == {0.0: 0.0, 1.0: 20.0, 10.0: 20.0 + 9 * 80.0}


def test_what_is_within_is_in_no_name_and_no_number_of_it() -> None:
    told = offered(elm(3, store_mwh=4.0), edge(3))
    words = " ".join((*told.columns, *told.rows, told.doc))
    assert not any(word in words for word in ("cheap", "dear", "kept", "dark", "homes", "north"))
    assert len(told.ports) == 1
    # nothing is as many as what is within
    assert len(told.rows) == 1 + 3


def test_a_neighbours_best_plan_is_the_joint_one_when_hours_do_not_depend_on_each_other() -> None:
    worth = (50.0, 100.0, 10.0)
    blocks = elm(3)
    assert gap(blocks, worth) < TOLERANCE


def gap(blocks: dict[str, LinearBlock], worth: tuple[float, ...]) -> float:
    """By what share of what help is worth a plan with the offer falls short of the joint one; what
    it agrees on is what the city can do, and costs the city no more than was told."""
    hours = len(worth)
    told = offered(blocks, edge(hours))
    tie = Coupling("elm", "plants_tie_sum", "ash", "import")
    asked = join({"elm": told, "ash": needy(worth)}, [tie])
    usd, x = solved(asked)
    span = asked.owners["elm"][0]
    quantity = x[span][told.ports[0].columns[0]]
    alone = true_usd(blocks, np.zeros(hours))
    really = true_usd(blocks, quantity) - alone
    assert really <= told.cost @ x[span] + 1e-3
    both = Coupling(
        "plants", "tie", "ash", "import", links=(("north", SYSTEM, 1.0), ("south", SYSTEM, 1.0))
    )
    joint = solved(join({**blocks, "ash": needy(worth)}, [POWER, both]))[0] - alone
    assert usd >= joint - 1e-3
    return (usd - joint) / max(-joint, 1e-9)


def test_with_a_store_the_offer_still_brings_nearly_all_that_a_joint_plan_would() -> None:
    short = [
        gap(elm(4, store_mwh=6.0), worth)
        for worth in (
            (50.0, 100.0, 10.0, 90.0),
            (70.0, 70.0, 70.0, 70.0),
            (10.0, 30.0, 120.0, 60.0),
        )
    ]
    assert max(short) < 0.02


def test_quantities_are_told_in_steps_and_held_throughout_windows() -> None:
    told = offered(elm(4), edge(4, step=3.0, hours=2))
    tie = -told.coefficient[np.isin(told.row_index, [2, 3, 4, 5]) & (told.coefficient < 0)]
    assert set(np.round(tie, 9)) == {3.0, 9.0}  # 6 lies between
    asked = join(
        {"elm": told, "ash": needy((100.0, 50.0, 0.0, 0.0))},
        [Coupling("elm", "plants_tie_sum", "ash", "import")],
    )
    x = solved(asked)[1]
    quantity = x[asked.owners["elm"][0]][told.ports[0].columns[0]]
    assert quantity[0] == pytest.approx(quantity[1])
    assert quantity[2] == pytest.approx(quantity[3])


def test_what_is_on_or_off_stays_as_the_city_would_have_it_alone() -> None:
    """The dear plant is off, as nobody in the city needs it: what is beyond the one cheap megawatt
    would come from the homes, and costs what darkness costs."""
    blocks = elm(1, start_usd=300.0)
    told = offered(blocks, edge(1))
    assert np.round(told.cost, 6).tolist() == [0.0, 20.0, 20.0 + 9 * 1000.0, 0.0]
    with_start_usd = true_usd(blocks, np.array([5.0])) - true_usd(blocks, np.zeros(1))
    assert with_start_usd == pytest.approx(20.0 + 300.0 + 4 * 80.0)


def test_a_city_whose_own_model_has_no_answer_offers_nothing() -> None:
    blocks = elm(1)
    blocks["homes"].low[0] = 15.0  # more than the plants can bring
    blocks["homes"].high[0] = 15.0
    with pytest.raises(PlanError) as caught:
        project(blocks, [POWER], [edge(1)])
    assert caught.value.reason is Reason.PLAN_INFEASIBLE


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_mix_of_what_is_offered_can_be_done_and_costs_no_more_than_told(
    data: st.DataObject,
) -> None:
    number = st.integers(1, 9)
    hours = data.draw(st.integers(1, 3))
    how = {
        "cheap_usd": 10.0 * data.draw(number),
        "dear_usd": 20.0 * data.draw(number),
        "store_mwh": float(data.draw(st.sampled_from([0, 0, 3, 7]))),
        "start_usd": data.draw(st.sampled_from([0.0, 30.0])),
    }
    blocks = elm(hours, **how)
    told = offered(blocks, edge(hours, step=data.draw(st.sampled_from([None, 0.5]))))
    shares = np.array([name.startswith("offer") for name in told.columns])
    drawn = np.where(
        shares,
        np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(shares), max_size=len(shares)))),
        0.0,
    )
    drawn[np.flatnonzero(shares)[0]] += 1e-3
    mix = np.zeros(len(shares))
    for row in range(len(told.rows) - hours):  # the shares of each offer sum to 1
        at = told.column_index[told.row_index == row]
        total = drawn[at].sum()
        mix[at] = drawn[at] / total if total else 1.0 / at.size
    quantity = np.zeros(hours)
    first = len(told.rows) - hours
    for r, c, v in zip(told.row_index, told.column_index, told.coefficient, strict=True):
        if r >= first and shares[c]:
            quantity[r - first] -= v * mix[c]
    spent = true_usd(blocks, quantity) - true_usd(blocks, np.zeros(hours))
    assert spent <= told.cost @ mix + 1e-3


# -- over the wire ---------------------------------------------------------------------------------

LINES = "  - {name: lines, who: [ash], what: {flexibility: [plants.tie]}"
TOGETHER = LINES + ", resolution: {space: sum, round_to: 0.5}}\n"


async def asked_of(link: Link, hours: int = 2) -> LinearBlock | None:
    session = await link.session("elm", 1, {}, 1)
    try:
        return await session.flexibility([HOUR_NS] * hours)
    finally:
        await session.close()


def test_a_peer_gets_the_ports_that_a_rule_names_and_none_else(tmp_path: Path) -> None:
    files = write_elm(tmp_path, LINES + "}\n", store_mwh=5.0)

    async def story() -> None:
        async with (
            city("elm", *files) as broker,
            await Link.connect(broker.address, "elm", ASH) as link,
        ):
            told = await asked_of(link)
            assert told is not None
            (port,) = told.ports
            assert (port.name, port.role, port.kind) == ("plants_tie", "supply", "plants_line")
            assert port.entities == ("north", "south")
            assert "power" not in " ".join((*told.columns, *told.rows))
            assert told.high[port.columns].tolist() == [[5.0, 5.0], [5.0, 5.0]]
            again = await asked_of(link)
            assert again is not None
            assert again.cost.tobytes() == told.cost.tobytes()

    bounded(story)


def test_an_offer_in_total_and_in_steps_is_what_the_rule_says(tmp_path: Path) -> None:
    files = write_elm(tmp_path, TOGETHER)

    async def story() -> None:
        async with (
            city("elm", *files) as broker,
            await Link.connect(broker.address, "elm", ASH) as link,
        ):
            told = await asked_of(link)
            assert told is not None
            (port,) = told.ports
            assert (port.name, port.entities) == ("plants_tie_sum", (SYSTEM,))
            amounts = told.coefficient[told.coefficient < 0]
            assert (np.rint(2 * amounts) == 2 * amounts).all()

    bounded(story)


@pytest.mark.parametrize(
    ("rules", "rule"),
    [
        ("", "default"),
        (
            "  - {name: none-of-it, effect: deny, who: [ash], what: {flexibility: ['*']}}\n"
            + TOGETHER,
            "none-of-it",
        ),
        (TOGETHER.replace("what:", "purpose: [mutual-aid], what:"), "lines"),
        (TOGETHER.replace("plants.tie", "homes.come").replace("sum", "mean"), "default"),
    ],
)
def test_who_may_have_no_port_is_offered_nothing_and_learns_by_which_rule(
    tmp_path: Path, rules: str, rule: str
) -> None:
    files = write_elm(tmp_path, rules)

    async def story() -> None:
        async with (
            city("elm", *files) as broker,
            await Link.connect(broker.address, "elm", ASH) as link,
        ):
            assert await asked_of(link) is None
            peers: peer_pb2_grpc.PeersAsyncStub = peer_pb2_grpc.PeersStub(link.line.channel)
            question = peer_pb2.AskRequest(
                sort=peer_pb2.AskRequest.SORT_FLEXIBILITY, name="plants.tie"
            )
            answer = await peers.Ask(question, metadata=claim("spiffe://ash/peer/broker"))
            assert (answer.is_allowed, answer.rule) == (False, rule)

    bounded(story)


def test_a_session_is_asked_before_its_first_step_and_for_so_many_periods(tmp_path: Path) -> None:
    """What breaks later is in no block, so nothing is offered that may not be there."""
    files = write_elm(tmp_path, TOGETHER + "limits: [{who: [ash], periods: 3}]\n")

    async def story() -> None:
        async with (
            city("elm", *files) as broker,
            await Link.connect(broker.address, "elm", ASH) as link,
        ):
            assert await asked_of(link, 3) is not None
            with pytest.raises(FederationError) as caught:
                await asked_of(link, 4)
            assert (caught.value.reason, caught.value.metadata["limit"]) == (
                Reason.PEER_LIMIT,
                "periods",
            )
            session = await link.session("elm", 1, {}, 1)
            await session.advance([StepInput(0)])
            assert await session.flexibility([HOUR_NS]) is None

    bounded(story)
