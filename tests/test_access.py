"""Who may call what is what the README says: everybody tries everything over real connections."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import federation.v1
from federation.broker.server import BrokerOptions, BrokerServer
from federation.errors import FederationError, Reason
from federation.v1 import (
    autonomy_pb2_grpc,
    broker_pb2,
    control_pb2,
)
from federation.wire import access, footing, secure, status
from federation.wire.authority import Authority
from federation.wire.credentials import Role
from federation.wire.party import Part
from federation.wire.serve import new_server, start_server
from tests.cities import write_birch
from tests.guises import PEOPLE, asked_as, broker_of, city, guarded_valley, guise, served_as
from tests.test_broker import refused
from tests.test_wire import bounded
from tests.valley import Dams

README = Path(__file__).parents[1] / "README.md"


def services() -> Iterator[ServiceDescriptor]:
    """All services of all protos, and the two that every server has besides."""
    files = [health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR]
    files += [
        importlib.import_module(f"federation.v1.{module.name}").DESCRIPTOR
        for module in pkgutil.iter_modules(federation.v1.__path__)
        if module.name.endswith("_pb2")
    ]
    for file in files:
        yield from file.services_by_name.values()


RPCS = {
    f"/{service.full_name}/{method.name}": (method.client_streaming, method.server_streaming)
    for service in services()
    for method in service.methods
}


def test_the_table_has_every_rpc_of_every_service_and_nothing_else() -> None:
    assert set(access.TABLE) == set(RPCS)
    assert len(RPCS) >= 40
    ours = {rpc.split("/")[1] for rpc in RPCS if rpc.startswith("/federation.")}
    assert set(access.SERVED_BY) == ours


def told_in_readme() -> dict[str, set[str]]:
    """By the last two names of an RPC, who may call it as a person reads it."""
    lines = README.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| RPC |"))
    parts = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    told = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        service, _, rpcs = first.partition(": ")
        for rpc in rpcs.split(", "):
            told[f"{service.strip('`')}/{rpc}"] = {
                p for p, c in zip(parts, cells, strict=True) if c
            }
    return told


def test_the_readme_has_the_table_as_it_is() -> None:
    assert access.markdown() in README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shelby(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return city(tmp_path_factory.mktemp("shelby"))


@pytest.fixture(scope="module")
def millington(tmp_path_factory: pytest.TempPathFactory, shelby: Authority) -> Authority:
    """Another city, each broker of the two believing the authority of the other."""
    other = city(tmp_path_factory.mktemp("millington"), "millington")
    for here, there in ((shelby, other), (other, shelby)):
        peers = here.folder / "broker" / "main" / "peers"
        peers.mkdir()
        (peers / f"{there.city}.crt").write_bytes((there.folder / "ca.crt").read_bytes())
    return other


@asynccontextmanager
async def whole_city(folder: Path) -> AsyncIterator[dict[str, str]]:
    """By service where it is served: a broker, a twin, and what a loop serves to people."""
    async with AsyncExitStack() as stack:
        room = Path(stack.enter_context(TemporaryDirectory()))
        scenario, policy = write_birch(room)
        exporting = BrokerOptions(city="shelby", export=policy, city_scenario=scenario)
        with guise(folder / "broker" / "main"):
            broker = await stack.enter_async_context(BrokerServer(exporting))
        twin = await stack.enter_async_context(served_as(folder / "twin" / "dams", "dams", Dams))
        with guise(folder / "guard" / "loop"):
            server = new_server(1 << 20)
            servicer: Any = autonomy_pb2_grpc.AutonomyServicer  # that knows no answer to anything
            autonomy_pb2_grpc.add_AutonomyServicer_to_server(servicer(), server)
            loop, _ = await start_server(server, ("federation.v1.Autonomy",), "127.0.0.1", 0)
            stack.push_async_callback(server.stop, None)
        yield {"Broker": broker.address, "Twin": twin, "Autonomy": loop}


SERVER_OF = {
    "Twin": ("Twin", Part.TWIN),
    "Autonomy": ("Autonomy", Part.GUARD),
}
"""Where a service is asked for, unless it is at the broker."""


async def try_out(channel: Any, rpc: str) -> FederationError | None:
    """Call an RPC with an empty request; why the gate did not let it through, or None."""
    asks_often, answers_often = RPCS[rpc]
    try:
        async with asyncio.timeout(10):
            if asks_often:
                await channel.stream_stream(rpc)(iter(())).read()
            elif answers_often:
                await channel.unary_stream(rpc)(b"").read()
            else:
                await channel.unary_unary(rpc)(b"")
    except grpc.aio.AioRpcError as error:
        found = status.from_rpc(error, rpc)
        if found.reason in (Reason.NOT_AUTHENTICATED, Reason.NOT_AUTHORISED):
            # a refusal by the gate names the RPC; one by what is behind it does not
            return found if found.metadata.get("rpc") == rpc else None
    return None


def test_every_part_can_call_what_the_readme_grants_it_and_nothing_else(
    shelby: Authority, millington: Authority
) -> None:
    told = told_in_readme()
    homes = {part: shelby.folder / part / name for part, name in PEOPLE.items()}
    homes[Part.PEER] = millington.folder / "broker" / "main"
    tried = 0

    async def story() -> None:
        nonlocal tried
        async with whole_city(shelby.folder) as at:
            for part, home in homes.items():
                for rpc in RPCS:
                    service, name = rpc.rsplit(".", 1)[1].split("/")
                    # what peers may ask of a twin, they ask of our broker, who serves it for them
                    where, plays = SERVER_OF.get(service, ("Broker", Part.BROKER))
                    if part is Part.PEER:
                        where, plays = "Broker", Part.BROKER
                    with guise(home):
                        channel = secure.channel(at[where], footing.expected(plays, city="shelby"))
                    async with channel:
                        refusal = await try_out(channel, rpc)
                    is_told = str(part) in told[f"{service}/{name}"]
                    is_here = part is not Part.PEER or service not in SERVER_OF
                    if is_here:
                        assert (refusal is None) == is_told, (part, rpc, refusal)
                        tried += 1
                    if refusal is not None:
                        assert refusal.reason is Reason.NOT_AUTHORISED
                        assert str(part) not in refusal.metadata["allowed"].split(" or ")
                        assert rpc in refusal.message

    bounded(story)
    assert tried == 7 * len(RPCS) - sum(
        rpc.split("/")[1].endswith(("Twin", "Autonomy")) for rpc in RPCS
    )


def test_only_a_broker_opens_sessions_and_only_a_guard_actuates() -> None:
    """The points of the table on which everything hangs, in words of their own."""
    twin = "/federation.v1.Twin/"
    for part in Part:
        assert access.may(part, twin + "Session") == (part in (Part.BROKER, Part.PEER))
        for rpc in ("Select", "Operate", "Confirm"):
            assert access.may(part, twin + rpc) == (part is Part.GUARD)
        for rpc in ("Register", "Renew", "Leave"):
            assert access.may(part, f"/federation.v1.Broker/{rpc}") == (part is Part.TWIN)
        assert access.may(part, "/federation.v1.Control/SubmitAction") == (
            part in (Part.GUARD, Part.OPERATOR)
        )


def test_what_stands_nowhere_in_the_table_is_denied_to_everybody(shelby: Authority) -> None:
    async def answer(request: bytes, context: object) -> bytes:
        return b"done"

    async def story() -> None:
        with guise(shelby.folder / "twin" / "dams"):
            server = new_server(1 << 20)
            handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
                "Wipe": grpc.unary_unary_rpc_method_handler(answer)
            }
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler("federation.v1.Odd", handlers),)
            )
            at, _ = await start_server(server, ("federation.v1.Twin",), "127.0.0.1", 0)
        for part, name in PEOPLE.items():
            with guise(shelby.folder / part / name):
                channel: Any = secure.channel(at, footing.expected(Part.TWIN, "dams"))
            async with channel:
                error = await refused(channel.unary_unary("/federation.v1.Odd/Wipe")(b""))
            assert error.reason is Reason.NOT_AUTHORISED
            assert error.metadata["allowed"] == "nobody"
        await server.stop(None)

    bounded(story)


def test_a_twin_registers_renews_and_leaves_under_its_own_name_alone(shelby: Authority) -> None:
    async def story() -> None:
        async with (
            broker_of(shelby.folder) as broker,
            asked_as(shelby.folder / "twin" / "dams", broker.address) as dams,
            asked_as(shelby.folder / "twin" / "town", broker.address) as town,
        ):
            request = broker_pb2.RegisterRequest(
                name="dams", address="127.0.0.1:1", incarnation="one"
            )
            error = await refused(town.broker.Register(request))
            assert error.reason is Reason.NOT_AUTHORISED
            assert error.metadata == {"identity": "spiffe://shelby/twin/town", "name": "dams"}
            lease = (await dams.broker.Register(request)).lease.id
            for call in (
                town.broker.Renew(broker_pb2.RenewRequest(lease=lease)),
                town.broker.Leave(broker_pb2.LeaveRequest(lease=lease)),
            ):
                assert (await refused(call)).reason is Reason.NOT_AUTHORISED
            await dams.broker.Renew(broker_pb2.RenewRequest(lease=lease))
            await dams.broker.Leave(broker_pb2.LeaveRequest(lease=lease))
            gone = await refused(dams.broker.Renew(broker_pb2.RenewRequest(lease=lease)))
            assert gone.reason is Reason.LEASE_UNKNOWN

    bounded(story)


def test_a_person_acts_under_their_own_name_alone(shelby: Authority) -> None:
    async def story() -> None:
        async with (
            guarded_valley(shelby.folder) as (broker, _),
            asked_as(shelby.folder / "operator" / "ann", broker.address) as ann,
        ):
            run = await ann.create()
            stop = control_pb2.StopRunRequest(run=run.name, operator="bob")
            error = await refused(ann.control.StopRun(stop))
            assert error.reason is Reason.NOT_AUTHORISED
            assert error.metadata == {"identity": "spiffe://shelby/operator/ann", "name": "bob"}
            stop.operator = "ann"
            await ann.control.StopRun(stop)

    bounded(story)


def test_of_another_city_nobody_is_heard_but_its_broker(
    shelby: Authority, millington: Authority
) -> None:
    # an operator there may know our authority, but ours does not know theirs for an operator
    person = millington.folder / "operator" / "ann"
    (person / "peers").mkdir()
    (person / "peers" / "shelby.crt").write_bytes((shelby.folder / "ca.crt").read_bytes())

    async def story() -> None:
        async with (
            broker_of(shelby.folder) as broker,
            asked_as(person, broker.address, "shelby") as ann,
        ):
            error = await refused(ann.broker.ListMembers(broker_pb2.ListMembersRequest()))
            assert error.reason is Reason.NOT_AUTHORISED
            assert error.metadata["identity"] == "spiffe://millington/operator/ann"
        # a twin hears no other city at all: it does not know its authority
        twin_home = shelby.folder / "twin" / "dams"
        async with served_as(twin_home, "dams", Dams) as at:
            with guise(millington.folder / "broker" / "main"):
                channel: Any = secure.channel(at, footing.expected(Part.TWIN, city="shelby"))
            async with channel:
                error = await refused(channel.unary_unary("/federation.v1.Twin/Describe")(b""))
            assert error.reason is Reason.NOT_AUTHENTICATED
            assert error.metadata["cause"] == "REFUSED"

    bounded(story)


def test_the_authority_of_one_city_can_not_speak_for_another(
    shelby: Authority, millington: Authority, tmp_path: Path
) -> None:
    """Millington's authority is believed here, of Millington."""
    rogue = Authority(tmp_path, "shelby", millington._key, millington.certificate)
    (tmp_path / "ca.crl").write_bytes((millington.folder / "ca.crl").read_bytes())
    home = rogue.issue("operator", "ann")
    # it wants to speak to Shelby's broker, and has Shelby's authority to know it by
    (home / "ca.crt").write_bytes((shelby.folder / "ca.crt").read_bytes())
    (home / "ca.crl").unlink()

    async def story() -> None:
        async with broker_of(shelby.folder) as broker, asked_as(home, broker.address) as ann:
            error = await refused(ann.broker.ListMembers(broker_pb2.ListMembersRequest()))
            assert error.reason is Reason.NOT_AUTHENTICATED
            assert error.metadata["cause"] == "FOREIGN"

    bounded(story)


def test_keyrings_and_certificates_speak_of_the_same_parts() -> None:
    assert Role("planner") is Role.OPTIMISER
    assert {Part(role) for role in Role if role is not Role.OPTIMISER} | {Part.PLANNER} == {
        Part.GUARD,
        Part.OPERATOR,
        Part.PLANNER,
        Part.OBSERVER,
        Part.PEER,
    }
    with pytest.raises(ValueError, match="no_such"):
        Role("no_such")
