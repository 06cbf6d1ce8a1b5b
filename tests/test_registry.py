"""A name has one holder at a time, and a lease that has ended never revives."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from federation.broker.registering import BrokerService
from federation.broker.registry import Lease, Member, Registry
from federation.errors import FederationError, Reason, ScenarioError
from federation.v1 import broker_pb2, broker_pb2_grpc
from federation.wire.enrol import keep_name
from tests.test_wire import SERVE, Reservoirs, bounded, process

TTL_NS = 10_000

SHORT_NS = 1_200_000_000
"""A lease that a test can outlive, and a busy machine still renew in time."""


def twin(name: str = "energy", incarnation: str = "a") -> Member:
    return Member(name, f"{name}-{incarnation}:4100", incarnation)


def registry(life: str = "life", last_epoch: int = 0) -> Registry:
    return Registry(life, TTL_NS, last_epoch)


def refused(call: object, *arguments: object) -> FederationError:
    assert callable(call)
    with pytest.raises(ScenarioError) as caught:
        call(*arguments)
    return caught.value


def test_a_held_name_is_refused_and_the_holder_named() -> None:
    names = registry()
    names.register(twin(incarnation="a"), 0)
    error = refused(names.register, twin(incarnation="b"), 4_000)
    assert error.reason is Reason.NAME_LEASED
    assert error.metadata == {"name": "energy", "address": "energy-a:4100", "expires_in_ns": "6000"}


def test_a_renewed_lease_holds_on_and_one_that_is_not_ends() -> None:
    names = registry()
    energy, city = names.register(twin("energy"), 0), names.register(twin("city"), 0)
    assert names.renew(energy.id, 9_999).expires_ns == 19_999
    assert [lease.member.name for lease in names.members(9_999)] == ["city", "energy"]
    assert names.expire(10_000) == (city,)
    assert [lease.member.name for lease in names.members(10_000)] == ["energy"]


def test_a_lease_that_ran_out_never_revives() -> None:
    names = registry()
    old = names.register(twin(incarnation="a"), 0)
    assert refused(names.renew, old.id, TTL_NS).reason is Reason.LEASE_UNKNOWN
    new = names.register(twin(incarnation="b"), TTL_NS)
    assert refused(names.renew, old.id, TTL_NS).reason is Reason.LEASE_UNKNOWN
    assert new.epoch > old.epoch


def test_a_lease_that_was_given_up_never_revives_and_leaving_twice_is_no_error() -> None:
    names = registry()
    old = names.register(twin(incarnation="a"), 0)
    assert names.leave(old.id) == old
    assert names.leave(old.id) is None
    assert refused(names.renew, old.id, 1).reason is Reason.LEASE_UNKNOWN
    new = names.register(twin(incarnation="b"), 1)
    assert names.leave(old.id) is None
    assert names.members(1) == (new,)


def test_the_same_process_may_register_again_and_its_lease_before_is_void() -> None:
    names = registry()
    first, second = names.register(twin(), 0), names.register(twin(), 1)
    assert second.epoch > first.epoch
    assert refused(names.renew, first.id, 2).reason is Reason.LEASE_UNKNOWN
    assert names.renew(second.id, 2)


def test_a_lease_of_the_brokers_earlier_life_is_unknown_in_the_next() -> None:
    before = registry("first")
    old = before.register(twin(), 0)
    after = registry("second", last_epoch=0)
    new = after.register(twin("city"), 0)
    assert new.epoch == old.epoch
    assert refused(after.renew, old.id, 1).reason is Reason.LEASE_UNKNOWN
    assert registry("third", before.last_epoch).register(twin(), 0).epoch > old.epoch


@pytest.mark.parametrize("name", ["", "Energy", "9lives", "a b", "a/b", "a" * 64])
def test_a_bad_name_is_refused(name: str) -> None:
    error = refused(registry().register, Member(name, "host:1", "a"), 0)
    assert error.reason is Reason.SCENARIO_INVALID


@given(st.text().filter(lambda text: ":" not in text))
def test_an_address_has_a_port(address: str) -> None:
    error = refused(registry().register, Member("energy", address, "a"), 0)
    assert error.reason is Reason.SCENARIO_INVALID


class Names(RuleBasedStateMachine):
    """Any order of calls, against the plain meaning of a lease: holder and end."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.names = registry()
        self.now_ns = 0
        self.held: dict[str, Lease] = {}
        self.epochs = [0]

    def holder(self, name: str) -> Lease | None:
        lease = self.held.get(name)
        return lease if lease is not None and lease.expires_ns > self.now_ns else None

    @rule(span_ns=st.integers(0, TTL_NS))
    def wait(self, span_ns: int) -> None:
        self.now_ns += span_ns

    @rule(target=leases, name=st.sampled_from("xyz"), incarnation=st.sampled_from("ab"))
    def register(self, name: str, incarnation: str) -> Lease | None:
        holder = self.holder(name)
        member = twin(name, incarnation)
        if holder is not None and holder.member.incarnation != incarnation:
            error = refused(self.names.register, member, self.now_ns)
            assert error.reason is Reason.NAME_LEASED
            return None
        lease = self.names.register(member, self.now_ns)
        assert lease.epoch > max(self.epochs)
        self.epochs.append(lease.epoch)
        self.held[name] = lease
        return lease

    @rule(lease=leases)
    def renew(self, lease: Lease | None) -> None:
        if lease is None:
            return
        holder = self.holder(lease.member.name)
        if holder is not None and holder.id == lease.id:
            self.held[lease.member.name] = self.names.renew(lease.id, self.now_ns)
            assert self.held[lease.member.name].expires_ns == self.now_ns + TTL_NS
        else:
            error = refused(self.names.renew, lease.id, self.now_ns)
            assert error.reason is Reason.LEASE_UNKNOWN

    @rule(lease=consumes(leases))
    def leave(self, lease: Lease | None) -> None:
        if lease is not None:
            self.names.leave(lease.id)
            if self.held.get(lease.member.name, lease).id == lease.id:
                self.held.pop(lease.member.name, None)

    @invariant()
    def everyone_who_holds_a_name_is_listed(self) -> None:
        expected = sorted(name for name in self.held if self.holder(name))
        assert [lease.member.name for lease in self.names.members(self.now_ns)] == expected


test_names_in_any_order = Names.TestCase


# over the wire


@asynccontextmanager
async def broker(
    names: Registry, gone: list[Lease] | None = None, port: int = 0
) -> AsyncIterator[str]:
    service = BrokerService(  # type: ignore[abstract, unused-ignore]
        names, on_gone=(gone if gone is not None else []).extend
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    broker_pb2_grpc.add_BrokerServicer_to_server(service, server)
    chosen = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{chosen}"
    finally:
        await server.stop(0)


async def listed(address: str) -> list[tuple[str, str]]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        answer = await stub.ListMembers(broker_pb2.ListMembersRequest(), timeout=10)
        return [(member.name, member.address) for member in answer.members]


async def until_listed(address: str, expected: list[tuple[str, str]]) -> None:
    while await listed(address) != expected:
        await asyncio.sleep(0.02)


def enrol(address: str, said: list[str], where: str = "here:1") -> asyncio.Task[None]:
    return asyncio.create_task(
        keep_name(address, "water", where, Reservoirs().describe(), said.append)
    )


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def test_a_twin_keeps_its_name_past_the_end_of_its_lease_and_gives_it_up() -> None:
    async def story() -> None:
        names = Registry("life", SHORT_NS)
        async with broker(names) as address:
            said: list[str] = []
            task = enrol(address, said)
            await until_listed(address, [("water", "here:1")])
            await asyncio.sleep(1.5 * SHORT_NS / 1e9)
            assert await listed(address) == [("water", "here:1")]
            assert said == [f"registered water with {address} (epoch 1)"]
            await cancelled(task)
            assert names.members(0) == ()

    bounded(story)


def test_a_twin_waits_for_its_broker_and_registers_again_when_it_restarts() -> None:
    async def story() -> None:
        said: list[str] = []
        async with broker(Registry("first", SHORT_NS)) as address:
            task = enrol(address, said)
            await until_listed(address, [("water", "here:1")])
        await asyncio.sleep(0.5)
        port = int(address.rpartition(":")[2])
        async with broker(Registry("second", SHORT_NS), port=port):
            await until_listed(address, [("water", "here:1")])
            await cancelled(task)
        assert [line.split()[-1] for line in said] == ["1)", "again", "1)"]

    bounded(story)


def test_a_name_that_another_twin_keeps_is_refused() -> None:
    async def story() -> None:
        async with broker(Registry("life", SHORT_NS)) as address:
            said: list[str] = []
            holder = enrol(address, [])
            await until_listed(address, [("water", "here:1")])
            with pytest.raises(ScenarioError, match=r"NAME_LEASED: .* the twin at here:1"):
                await enrol(address, said, "there:1")
            assert said == [
                "the name water is held by the twin at here:1; waiting for its lease to end"
            ]
            assert await listed(address) == [("water", "here:1")]
            await cancelled(holder)

    bounded(story)


def test_a_twin_that_crashed_gets_its_name_back_when_the_old_lease_ends() -> None:
    async def story() -> None:
        names = Registry("life", SHORT_NS)
        names.register(Member("water", "crashed:1", "earlier"), time.monotonic_ns())
        async with broker(names) as address:
            task = enrol(address, [])
            await until_listed(address, [("water", "here:1")])
            await cancelled(task)

    bounded(story)


def test_who_ends_while_it_registers_leaves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a name before it knows of it."""
    register = BrokerService.Register

    async def slowly(*call: Any) -> broker_pb2.RegisterResponse:
        answer = await register(*call)
        await asyncio.sleep(0.3)
        return answer

    monkeypatch.setattr(BrokerService, "Register", slowly)

    async def story() -> None:
        gone: list[Lease] = []
        async with broker(Registry("life"), gone) as address:
            task = enrol(address, [])
            await until_listed(address, [("water", "here:1")])
            await cancelled(task)
            assert [lease.member.name for lease in gone] == ["water"]
            assert await listed(address) == []

    bounded(story)


def test_a_served_twin_leaves_when_it_is_told_to_end() -> None:
    async def story() -> None:
        gone: list[Lease] = []
        async with broker(Registry("life"), gone) as address:
            with process("-c", SERVE, address) as (child, twin_address):
                await until_listed(address, [("water", twin_address)])
                child.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(child.wait, 20) == 0
            assert [lease.member.name for lease in gone] == ["water"]
            assert await listed(address) == []

    bounded(story)
