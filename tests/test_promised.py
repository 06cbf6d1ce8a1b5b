"""What cities have promised each other is brought into force by their guards, and ends itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.control import audit
from federation.control.deeds import Deeds
from federation.control.mandate import Keys, Mandate
from federation.control.mandate import Terms as Mandated
from federation.control.promised import BrokerBook, Due, Promised, begins_within_ns, due
from federation.control.rules import AidRule
from federation.control.situation import NEVER
from federation.control.view import Holding
from federation.core.aid import Terms
from federation.core.bundle import Priority
from federation.core.ledger import ActionRecord
from federation.peer.aid import AidOptions
from federation.twin import HOUR_NS, MINUTE_NS
from federation.wire.credentials import Identity, Keyring, Role
from tests.aidcities import PURPOSE, Permissive, identities
from tests.test_aid import POWER, ask, city
from tests.test_city_acts import BIRCH_GUARD, POLICY, RULES, birch
from tests.test_live import GUARD, KEYRING, at_work, terms_of
from tests.test_live import RULES as LOWLAND
from tests.test_wire import bounded

LINE = AidRule(
    cities=("ash",),
    gives_at_most=9.0,
    takes_at_most=9.0,
    for_at_most_h=12.0,
    usd_at_most=1e9,
    sets="grid.tie",
    gives_sign=-1,
    takes_set="grid.tie",
)
PLACE = ("grid", "tie", "system")


def promise(giver: str, taker: str, start_h: float, *quantity: float, good: str = "power") -> Terms:
    start_ns, hours = round(start_h * HOUR_NS), (HOUR_NS,) * len(quantity)
    zero = (0.0,) * len(quantity)
    return Terms(giver, taker, good, "MW", start_ns, hours, quantity, zero, 1, f"n{start_h}{giver}")


# -- what is due -----------------------------------------------------------------------------


def test_what_is_promised_either_way_adds_up_until_something_changes() -> None:
    given = promise("birch", "ash", 1, 5.0, 5.0, 2.0)
    taken = promise("ash", "birch", 2, 1.0)
    rules = {"power": LINE}
    found = {
        h: due((given, taken), "birch", rules, round(h * HOUR_NS)).get(PLACE)
        for h in (0.5, 1.5, 2.5, 3.5, 4.0)
    }
    assert found == {
        0.5: None,
        1.5: Due(-5.0, HOUR_NS, 2 * HOUR_NS),
        2.5: Due(-4.0, 2 * HOUR_NS, 3 * HOUR_NS),
        3.5: Due(-2.0, 3 * HOUR_NS, 4 * HOUR_NS),
        4.0: None,
    }


def test_a_value_that_stays_is_due_in_one_piece_and_nothing_is_due_for_what_sets_nothing() -> None:
    bound = (promise("birch", "ash", 1, 5.0, 5.0), promise("birch", "ash", 3, 5.0, 0.0, 5.0))
    whole = {PLACE: Due(-5.0, HOUR_NS, 4 * HOUR_NS)}
    for hour in (1, 2, 3):
        assert due(bound, "birch", {"power": LINE}, hour * HOUR_NS) == whole
    assert due(bound, "birch", {"power": LINE}, round(4.5 * HOUR_NS)) == {}
    silent = LINE.model_copy(update={"sets": ""})
    assert due(bound, "birch", {"power": silent}, HOUR_NS) == {}
    assert due(bound, "birch", {}, HOUR_NS) == {}


@given(st.integers(0, 2**32), st.integers(1, 600), st.integers(1, 60), st.integers(1, 300))
@settings(deadline=None)
def test_a_lease_never_outlasts_what_is_due_and_is_renewed_in_time_and_not_for_ever(
    seed: int, for_min: int, life_min: int, lease_min: int
) -> None:
    """It begins at some instant before its bundle expires."""
    luck, held, begun, last_ns = Random(seed), None, 0, 0
    what, life_ns = Due(1.0, 0, for_min * MINUTE_NS), life_min * MINUTE_NS
    for minute in range(for_min + 120):
        now_ns = minute * MINUTE_NS
        if held is not None and held.until_ns <= now_ns:
            held = None
        if now_ns >= what.until_ns:
            assert held is None
            continue
        within_ns = begins_within_ns(what, held, now_ns, life_ns, lease_min * MINUTE_NS)
        if within_ns is None or within_ns <= 0:
            continue
        lease_ns = min(what.until_ns - now_ns - within_ns, lease_min * MINUTE_NS)
        begins_ns = now_ns + luck.randrange(within_ns)
        assert held is None or begins_ns < held.until_ns
        begun += 1
        last_ns = begins_ns + lease_ns
        held = Holding(1.0, Priority.AUTONOMOUS, "aid", "b", last_ns)
        assert last_ns <= what.until_ns
    longest_ns = min(what.until_ns, lease_min * MINUTE_NS)
    assert begun <= 6 + 4 * what.until_ns / longest_ns
    if lease_min >= 4 * life_min:
        assert what.until_ns - last_ns <= max(what.tail_ns, 4 * MINUTE_NS)


# -- over sockets ----------------------------------------------------------------------------


def notes(terms: Mandated, guard: Identity, keyring: Keyring, what: str) -> list[dict[str, object]]:
    records = audit.read(
        terms.state / "trail", lambda message, s: keyring.proves(guard.name, Role.GUARD, message, s)
    )
    noted = [r["body"] for r in records if r["kind"] == "noted"]
    return [body["detail"] for body in noted if body["what"] == what]


GOODS = """
version: 1
goods:
  power:
    unit: MW
    gives: [{most: 2.5, usd_per_h: 60}]
"""
AID = """
aid:
  power:
    cities: [ash]
    gives_at_most: MOST
    takes_at_most: 0
    for_at_most_h: 12
    usd_at_most: 0
    sets: grid.shed
    entity: S1
"""
MAY = """  - name: aid
    who: [ash]
    what: {flexibility: [aid.power]}
    purpose: [mutual-aid]
"""


@pytest.mark.parametrize(("high", "is_kept"), [(3, True), (1, False)])
def test_a_city_sheds_what_it_has_promised_for_as_long_as_its_guard_lets_it(
    tmp_path: Path, high: int, is_kept: bool
) -> None:
    """Ash bargains for power; birch gives it by shedding load of its own."""
    goods, rules = tmp_path / "goods.yaml", tmp_path / "rules.yaml"
    goods.write_text(GOODS)
    rules.write_text(RULES.replace("high: 3", f"high: {high}") + AID.replace("MOST", "3"))
    keys = identities(tmp_path)
    known = Keyring.of(*((keys[name], Role.PEER, ()) for name in keys if name != "birch"))
    aid = AidOptions(goods, keys["birch"], known, tmp_path / "aid", lambda _: Permissive())
    loop = Identity.generate("loop")
    believed = Keyring.of((BIRCH_GUARD, Role.GUARD, ["*"]), (loop, Role.OPTIMISER, ["*"]))
    terms = Mandated(3, rules, tmp_path / "state", "duty", city="birch")

    (tmp_path / "b").mkdir()

    async def story() -> None:
        async with (
            city(tmp_path, "ash") as ash,
            birch(tmp_path / "b", POLICY + MAY, aid=aid) as here,
        ):
            view = here.view
            start_ns = (view.settled_ns // (10 * MINUTE_NS) + 2) * 10 * MINUTE_NS
            end_ns = start_ns + HOUR_NS // 2
            await ask(
                ash,
                {"birch": here.broker},
                POWER,
                start_ns=start_ns,
                periods_ns=(end_ns - start_ns,),
                purpose=PURPOSE,
            )
            mandate = Mandate(view, terms, Keys(BIRCH_GUARD, loop, believed), lambda: 1e9)
            with mandate.on_record():
                deeds = Deeds(mandate)
                async with deeds.at_work():
                    promised = Promised(mandate, deeds, "birch", BrokerBook(view))
                    async with asyncio.timeout(40):
                        while view.settled_ns < end_ns + 5 * MINUTE_NS:
                            await view.changed()
                            await promised.keep()
            told = here.told()
            if not is_kept:
                assert told == []
                return
            assert told[0] == ("S1", 2.5)
            assert told[-1] == ("S1", 0.0)
            found, _, _ = here.broker.store.entries(view.run, 0)
            times = [
                s.entry.time_ns
                for s in found
                if isinstance(s.entry, ActionRecord) and s.entry.action.actuator == "shed"
            ]
            assert times[0] >= start_ns
            assert end_ns - 10 * MINUTE_NS <= times[-1] <= end_ns

    bounded(story)
    kept = notes(terms, BIRCH_GUARD, believed, "a promise is due")
    why = notes(terms, BIRCH_GUARD, believed, "a promise is not kept")
    if is_kept:
        assert {tuple(k["place"]) for k in kept} == {("grid", "shed", "S1")}  # type: ignore[arg-type]
    else:
        assert not kept
        assert len(why) == 1
        assert "range:grid.shed: 2.5 is outside 0..1" in str(why[0]["why"])


def test_a_loop_keeps_promises_at_any_level_and_gives_the_same_place_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At level 3 it only advises, and what its city has promised is no advice."""
    aid = (
        AID.replace("power:", "water:").replace("MOST", "3").replace("grid.shed", "reservoir.gate")
    )
    rules = LOWLAND + aid.replace("S1", "main")
    water = promise("lowland", "ash", 2, *[0.5] * 6, good="water")

    async def bound(book: BrokerBook) -> tuple[Terms, ...]:
        return (water,)

    monkeypatch.setattr(BrokerBook, "bound", bound)
    terms = replace(terms_of(tmp_path, 3, rules), city="lowland")

    async def story() -> None:
        async with at_work(terms) as stage:
            going = asyncio.create_task(stage.loop.go())
            held = None
            for minute in range(60, 8 * 60, 10):  # as time goes by, whoever waits for what
                stage.let(minute * MINUTE_NS)
                await asyncio.sleep(0.2)
                if held := await stage.holding("reservoir", "main"):
                    break
            assert held is not None
            assert (held.value, held.owner) == (0.5, "aid-of-lowland")
            assert 2 * HOUR_NS < held.until_ns <= 8 * HOUR_NS
            stage.let(NEVER)
            await asyncio.wait_for(going, 30)
            assert await stage.holding("reservoir", "main") is None

    bounded(story)
    assert notes(terms, GUARD, KEYRING, "a promise is due")
