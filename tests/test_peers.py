"""Cities as peers: each broker is a twin to the other, for what its policy allows and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from federation.broker.server import BrokerOptions, BrokerServer
from federation.errors import FederationError, Reason
from federation.scenario.run import Case, run_local
from federation.scenario.spec import Scenario, parse
from federation.scenario.study import cases
from federation.wire.link import Errand, Link, LinkOptions
from tests.cities import BIRCH_POLICY, Helper, ash, write_birch
from tests.test_broker import present
from tests.test_wire import bounded


def case_of(scenario: Scenario, seed: int = 5) -> Case:
    (case,) = cases(scenario, ["none"], 1, seed)
    return case


@asynccontextmanager
async def city(name: str, scenario: Path, policy: Path) -> AsyncIterator[BrokerServer]:
    """A broker that serves a city to its peers."""
    options = BrokerOptions(city=name, export=policy, city_scenario=scenario, grace_s=0.1)
    async with BrokerServer(options) as broker:
        yield broker


def inside(scenario: Path, policy: Path) -> str:
    """Birch as a member of a run in one process."""
    config = f'city: birch, scenario: "{scenario}", policy: "{policy}", reader: ash'
    return f'{{class: "federation.peer.city:CityTwin", peer: {{}}, config: {{{config}}}}}'


def test_a_city_is_a_twin_with_the_same_ledger_in_process_and_between_two_brokers(
    tmp_path: Path,
) -> None:
    files = write_birch(tmp_path)
    local_scenario = parse(ash(inside(*files)))
    case = case_of(local_scenario)
    local = run_local(local_scenario, case, None)
    assert local.kpis["sent"] == 3.0
    chain = {(e.owner, e.event.kind) for e in local.events}
    assert chain == {("birch", "grid_short_of_power"), ("helper", "help_sent")}

    async def story() -> None:
        async with city("birch", *files) as birch:
            async with BrokerServer(BrokerOptions(city="ash", grace_s=0.1)) as broker:
                async with present(broker.address, helper=Helper):
                    await broker.members_ready(["helper"], 10)
                    there = f"{{address: {birch.address}, peer: {{}}}}"
                    outcome = await broker.run(parse(ash(there)), case)
                    assert outcome.kpis == local.kpis
                    assert outcome.digest == local.digest

    bounded(story)
