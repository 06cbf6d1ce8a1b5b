"""What a federation has to know of its twins and values before a person may act on it (LEVEL45)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.broker.client import print_members
from federation.broker.registry import Member, Registry
from federation.core.coupling import Coupling, conversion, wire
from federation.errors import FederationError, Reason
from federation.twin import (
    MINUTE_NS,
    SYSTEM,
    Causality,
    Description,
    Entity,
    Fidelity,
    TimePolicy,
    Variable,
)
from federation.v1 import broker_pb2, twin_pb2
from federation.wire.enrol import keep_name
from federation.wire.profile import Search
from tests.test_broker import Services, client, refused, valley
from tests.test_registry import TTL_NS, broker
from tests.test_wire import bounded

POWER = Variable("load", "station", "MW", Causality.OUTPUT, 0.0)


def grid(*entities: Entity, fidelity: Fidelity = Fidelity.DETAILED) -> Description:
    return Description(
        "grid", "2", "energy", entities, (POWER,), TimePolicy(MINUTE_NS), fidelity=fidelity
    )


NORTH = grid(Entity("n", "station", "North", 10.0, 50.0), Entity("o", "station", "", 11.0, 51.0))
SOUTH = replace(grid(Entity("s", "station", "South", 10.5, 40.0)), domain="city")
NOWHERE = replace(
    SOUTH, entities=(), variables=(replace(POWER, kind=SYSTEM),), time=TimePolicy(60 * MINUTE_NS)
)


@asynccontextmanager
async def enrolled(address: str, **twins: Description) -> AsyncIterator[Services]:
    stays = [
        asyncio.create_task(keep_name(address, name, "here:1", twin, lambda _: None))
        for name, twin in twins.items()
    ]
    try:
        async with client(address) as services:
            while len(await names(services)) < len(twins):
                await asyncio.sleep(0.02)
            yield services
    finally:
        for stay in stays:
            stay.cancel()
        await asyncio.wait(stays)


async def names(services: Services, **wanted: object) -> list[str]:
    request = broker_pb2.ListMembersRequest(**wanted)  # type: ignore[arg-type]
    return [member.name for member in (await services.broker.ListMembers(request)).members]


def test_level45_1_a_twin_registers_what_it_is_and_what_it_offers() -> None:
    async def story() -> None:
        async with broker(Registry("life")) as address, enrolled(address, north=NORTH) as services:
            (north,) = (await services.broker.ListMembers(broker_pb2.ListMembersRequest())).members
        assert (north.model, north.version, north.domain) == ("grid", "2", "energy")
        assert north.profile.fidelity == twin_pb2.FIDELITY_DETAILED
        assert north.profile.time.period_ns == MINUTE_NS
        assert list(north.profile.features) == ["variable:load", "kind:station"]
        area = north.profile.area
        assert (area.west_deg, area.east_deg) == (10.0, 11.0)
        assert (area.south_deg, area.north_deg) == (50.0, 51.0)

    bounded(story)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("schema", {"schema": 2}),
        ("profile.time", {"profile": {"time": {"period_ns": -1}}}),
        ("profile.area", {"profile": {"area": {"west_deg": 350.0, "east_deg": 355.0}}}),
        ("profile.area", {"profile": {"area": {"west_deg": math.nan}}}),
        ("profile.features", {"profile": {"features": ["kpi:a", "kpi:a"]}}),
    ],
)
def test_level45_1_another_schema_is_refused_by_the_field(
    field: str, told: dict[str, object]
) -> None:
    request = broker_pb2.RegisterRequest(
        name="north",
        address="here:1",
        incarnation="a",
        **told,  # type: ignore[arg-type]
    )

    async def story() -> None:
        async with broker(Registry("life")) as address, client(address) as services:
            error = await refused(services.broker.Register(request))
            assert error.reason is Reason.SCHEMA_INCOMPATIBLE
            assert error.metadata == {"field": field}
            assert not await names(services)

    bounded(story)


def test_level45_2_twins_are_found_by_domain_area_feature_and_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def story() -> None:
        twins = {"north": NORTH, "south": SOUTH, "nowhere": NOWHERE}
        async with broker(Registry("life")) as address, enrolled(address, **twins) as services:
            assert await names(services, domain="city") == ["nowhere", "south"]
            around = broker_pb2.Area(west_deg=9, south_deg=50.5, east_deg=12, north_deg=60)
            assert await names(services, area=around) == ["north"]
            assert await names(services, features=["kind:station"]) == ["north", "south"]
            assert await names(services, features=["variable:load"]) == sorted(twins)
            assert await names(services, max_period_ns=MINUTE_NS) == ["north", "south"]
            assert await names(services, domain="city", max_period_ns=MINUTE_NS) == ["south"]
            assert not await names(services, domain="sea")
            await print_members(address, "city", (9, 30, 12, 45), ["kind:station"], 1.0)
            assert capsys.readouterr().out.split() == (
                ["south", "here:1", "city", "grid", "2", "detailed", "every", "1", "min"]
            )
            turned = broker_pb2.Area(west_deg=12, east_deg=9)
            error = await refused(
                services.broker.ListMembers(broker_pb2.ListMembersRequest(area=turned))
            )
            assert (error.reason, error.metadata) == (Reason.SCENARIO_INVALID, {"field": "area"})

    bounded(story)


@given(st.integers(0, 2 * TTL_NS))
def test_level45_2_who_missed_two_beats_is_not_found_and_a_late_beat_revives_nobody(
    now_ns: int,
) -> None:
    registry = Registry("life", TTL_NS)
    lease = registry.register(Member("north", "here:1", "a"), 0)
    beat_ns = TTL_NS // 3
    found = registry.found(Search(), now_ns)
    assert bool(found) == (now_ns < TTL_NS - beat_ns)
    if now_ns >= 2 * beat_ns + 2:  # a third that is not whole
        assert not found
    if now_ns >= TTL_NS:
        with pytest.raises(FederationError, match="LEASE_UNKNOWN"):
            registry.renew(lease.id, now_ns)
        assert not registry.found(Search(), now_ns)


UNITS = (("MW", "kW"), ("m^3/h", "l/s"), ("degC", "K"), ("degF", "degC"), ("mile", "km"))


@given(st.sampled_from(UNITS), st.floats(-1e6, 1e6))
def test_level45_3_units_adapt_and_nothing_is_lost_on_the_way(
    units: tuple[str, str], value: float
) -> None:
    there, back = conversion(*units), conversion(*reversed(units))
    again = back[0] * (there[0] * value + there[1]) + back[1]
    assert again == pytest.approx(value, rel=1e-12, abs=1e-9)


def test_level45_3_names_adapt_by_a_map_and_what_can_not_is_refused_by_name() -> None:
    reader = Description(
        "plant",
        "1",
        "city",
        (Entity("N", "plant"), Entity("O", "plant")),
        (Variable("power", "plant", "kW", Causality.INPUT),),
        TimePolicy(MINUTE_NS),
    )
    members = {"grid": NORTH, "plant": reader}
    plain = Coupling("grid", "load", "plant", "power")
    named = replace(plain, links=(("n", "N", 1.0), ("o", "O", 1.0)))
    (slot,) = wire(members, [named]).slots["plant"]
    assert slot.combined([np.array([1.5, 2.5])]).tolist() == [1500.0, 2500.0]
    for coupling, reason, metadata in (
        (plain, Reason.UNKNOWN_ENTITY, "entity"),
        (replace(named, links=(("m", "N", 1.0),)), Reason.UNKNOWN_ENTITY, "entity"),
    ):
        with pytest.raises(FederationError) as caught:
            wire(members, [coupling])
        assert caught.value.reason is reason
        assert metadata in caught.value.metadata


@pytest.mark.parametrize(("lon_deg", "lat_deg"), [(3.6e6, 50.0), (10.0, 91.0), (math.inf, 0.0)])
def test_level45_3_places_in_other_coordinates_are_refused_by_name(
    lon_deg: float, lat_deg: float
) -> None:
    with pytest.raises(FederationError) as caught:
        wire({"grid": grid(Entity("n", "station", "", lon_deg, lat_deg))}, [])
    assert caught.value.reason is Reason.INVALID_DESCRIPTION
    assert caught.value.metadata == {"member": "grid", "entity": "n"}


def test_level45_4_every_shared_value_says_when_whence_how_good_and_how_close() -> None:
    def told(entry: broker_pb2.LedgerEntry) -> bool:
        return (
            entry.HasField("receive_time")
            and entry.member != ""
            and entry.value.quality == broker_pb2.LedgerEntry.QUALITY_GOOD
        )

    async def story() -> None:
        async with valley() as (_, services):
            run = await services.create()
            await services.ended(run.name)
            seen: list[broker_pb2.LedgerEntry] = []
            async for answer in services.watch(run.name):
                seen += [entry for entry in answer.entries if entry.HasField("value")]
            request = broker_pb2.QueryHistoryRequest(run=run.name, member="dams", variable="level")
            seen += (await services.broker.QueryHistory(request)).entries
        assert seen
        assert all(map(told, seen))
        assert {e.fidelity for e in seen if e.member == "dams"} == {twin_pb2.FIDELITY_REDUCED}
        assert {e.fidelity for e in seen if e.member == "town"} == {twin_pb2.FIDELITY_UNSPECIFIED}

    bounded(story)
