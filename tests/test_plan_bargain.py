"""Owners that agree by prices and quantities on what a joint plan would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.core.coupling import Coupling
from federation.errors import PlanError, Reason, TwinError
from federation.plan.bargain import Bargain, Consent, Offer, Prices, Quotas
from federation.plan.engine import engine_of, optimum_usd
from federation.plan.joining import join
from federation.plan.owner import agree, independent, owners_of
from federation.twin import LinearBlock
from tests.blocks import block, port

INF = np.inf
WATER = Coupling("lake", "flow", "farm", "water")


def lake(cost: float = 2e5, most: float = 10.0) -> LinearBlock:
    """Pumps water at a cost, more dearly beyond the first 4 units; has a leak of its own."""
    return block(
        {
            "flow": (0, most, 0),
            "cheap": (0, 4, cost),
            "dear": (0, 9, 3 * cost),
            "leak": (1, 2, 5e5),
        },
        {"pumped": (-INF, {"flow": 1, "cheap": -1, "dear": -1}, 0)},
        ports=[port("flow", "supply", ["gate"], [[0]])],
    )


def farm(worth: float = 5e5) -> LinearBlock:
    """Every unit of water up to 7 brings a crop; then the fields are full."""
    return block(
        {"water": (0, 10, 0), "crop": (0, 7, -worth)},
        {"grows": (-INF, {"crop": 1, "water": -1}, 0)},
        ports=[port("water", "need", ["gate"], [[0]])],
    )


def test_prices_settle_where_the_last_unit_is_worth_what_it_costs() -> None:
    """Four cheap units are pumped; a fifth costs 6 and is worth 5."""
    owners, limit = owners_of({"lake": lake(), "farm": farm()}, [WATER])
    found = agree(owners, Bargain(tuple(o.stake for o in owners), limit))
    assert found.cost_usd == pytest.approx(5e5 + 4 * 2e5 - 4 * 5e5)
    assert found.is_close
    assert found.bound_usd <= found.cost_usd + 1e-3
    assert found.quantity["farm"].tolist() == pytest.approx([4.0])
    assert found.prices_usd.tolist() == [pytest.approx(5e5, rel=1e-3)]


def test_only_prices_and_boundary_quantities_travel() -> None:
    """Numbers per row, part and boundary column, however large a block is within."""
    owners, limit = owners_of({"lake": lake(), "farm": farm()}, [WATER])
    bargain = Bargain(tuple(o.stake for o in owners), limit)
    assert [o.stake.part.size for o in owners] == [1, 1]
    (question,) = bargain.start()
    while isinstance(question, Prices | Quotas):
        asked = question
        for owner in owners:
            answer = owner.answer(asked)
            assert answer.quantity.shape == (1,)
            assert answer.cost_usd is not None
            assert answer.cost_usd.size == 2  # its one part, and all else together
            for following in bargain.handle(answer):
                question = following


def test_what_shares_no_row_is_a_part_of_its_own() -> None:
    assert independent(join({"lake": lake()}, [])).tolist() == [0, 0, 0, 1]


def two() -> tuple[Bargain, list[Offer | Consent]]:
    owners, limit = owners_of({"lake": lake(), "farm": farm()}, [WATER])
    bargain = Bargain(tuple(o.stake for o in owners), limit)
    (question,) = bargain.start()
    assert isinstance(question, Quotas)
    return bargain, [owner.answer(question) for owner in owners]


def test_answers_may_come_twice_and_late_and_in_any_order() -> None:
    bargain, (farms, lakes) = two()
    assert bargain.handle(lakes) == ()
    assert bargain.handle(lakes) == ()  # again: still waits for the farm
    (question,) = bargain.handle(farms)
    assert isinstance(question, Prices)
    assert question.round == 2
    assert bargain.handle(farms) == ()  # of a round that is over
    assert bargain.handle(replace(lakes, round=2)) == ()  # no offer, though prices were asked


def test_an_answer_that_cannot_be_read_changes_nothing() -> None:
    bargain, (farms, lakes) = two()
    for broken, reason in (
        (replace(farms, quantity=np.array([np.nan])), Reason.NOT_FINITE),
        (replace(farms, cost_usd=np.array([0.0, np.inf])), Reason.NOT_FINITE),
        (replace(farms, quantity=np.zeros(2)), Reason.WRONG_SHAPE),
        (replace(farms, owner="stranger"), Reason.WRONG_SHAPE),
    ):
        with pytest.raises(TwinError) as caught:
            bargain.handle(broken)
        assert caught.value.reason is reason
    bargain.handle(lakes)
    assert len(bargain.handle(farms)) == 1


def test_owners_that_never_agree_have_no_plan() -> None:
    """The farm must have 3 units; the lake gives 2 at the most."""
    thirsty = farm()
    thirsty.low[0] = 3.0
    owners, limit = owners_of({"lake": lake(most=2.0), "farm": thirsty}, [WATER])
    with pytest.raises(PlanError) as caught:
        agree(owners, Bargain(tuple(o.stake for o in owners), limit, rounds=8))
    assert caught.value.reason is Reason.NO_PLAN


def chain(draw: st.DataObject) -> Iterator[tuple[str, LinearBlock]]:
    """A lake that feeds a mill and a farm, each over two periods, with a store in the lake."""
    number = st.integers(1, 9)
    cost, worth, grain = (draw.draw(number) * 1e5 for _ in range(3))
    stored, most = float(draw.draw(number)), float(draw.draw(number))
    yield (
        "lake",
        block(
            {f"flow{t}": (0, most, 0) for t in range(2)}
            | {f"pump{t}": (0, 5, cost * (1 + 2 * t)) for t in range(2)}
            | {"kept": (0, stored, 0)},
            {
                "first": (-INF, {"flow0": 1, "kept": 1, "pump0": -1}, 1),
                "then": (-INF, {"flow1": 1, "kept": -1, "pump1": -1}, 0),
            },
            ports=[port("flow", "supply", ["gate"], [[0, 1]])],
        ),
    )
    for name, usd in (("mill", grain), ("farm", worth)):
        yield (
            name,
            block(
                {f"water{t}": (0, 10, 0) for t in range(2)}
                | {f"crop{t}": (0, float(draw.draw(number)), -usd) for t in range(2)}
                | {"lack": (0, 9, usd)},
                {f"grows{t}": (-INF, {f"crop{t}": 1, f"water{t}": -1}, 0) for t in range(2)}
                | {"enough": (2, {"water0": 1, "water1": 1, "lack": 1}, INF)},
                ports=[port("water", "need", ["gate"], [[0, 1]])],
            ),
        )


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_bargain_ends_within_its_tolerance_of_the_joint_optimum(data: st.DataObject) -> None:
    blocks = dict(chain(data))
    couplings = [Coupling("lake", "flow", name, "water") for name in ("mill", "farm")]
    joint_usd = optimum_usd(engine_of(join(blocks, couplings)))
    owners, limit = owners_of(blocks, couplings)
    found = agree(owners, Bargain(tuple(o.stake for o in owners), limit, tolerance=1e-3))
    slack = 1e-3 * abs(found.cost_usd) + 1.0
    assert found.bound_usd - 1.0 <= joint_usd <= found.cost_usd + 1.0
    assert found.cost_usd - found.bound_usd <= slack
    assert found.rounds <= 60
