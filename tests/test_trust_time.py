"""Certificates are replaced while a run goes on, and who is revoked is out within seconds."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from federation.errors import FederationError, Reason
from federation.twin import MINUTE_NS, StepInput
from federation.v1 import broker_pb2, broker_pb2_grpc, scenario_pb2
from federation.wire import footing, gate, secure, status, trust
from federation.wire.link import Link
from federation.wire.party import Part
from tests.guises import (
    MEMBERS,
    asked_as,
    city,
    guarded_valley,
    guise,
    serial,
    served_as,
)
from tests.test_broker import Gated, refused, valley
from tests.test_wire import bounded
from tests.valley import Dams


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at ten times as often as usual, which spares the tests seconds."""
    monkeypatch.setattr(trust, "LOOK_S", 0.1)
    monkeypatch.setattr(gate, "LOOK_S", 0.1)


def test_a_run_goes_on_while_all_its_certificates_are_replaced(quick: None, tmp_path: Path) -> None:
    """Those of broker and twins expire half-way; new ones are there in time; nothing is felt."""
    own = city(tmp_path / "shelby")
    short = 4.0 / 86_400
    homes = [("broker", "main"), ("twin", "weather"), ("twin", "dams"), ("twin", "town")]
    gate_ = Gated.gate_to_pass = threading.Event()

    async def story() -> None:
        for part, name in homes:
            own.issue(part, name, short)
        expire_s = time.time() + 4.0
        operator = own.folder / "operator" / "ann"
        async with (
            guarded_valley(own.folder, dams=Gated) as (broker, at),
            asked_as(operator, broker.address) as ann,
        ):
            run = await ann.create()
            watched = asyncio.create_task(ann.ended(run.name))
            await asyncio.sleep(0.3)
            before = {part + name: serial(own.folder / part / name) for part, name in homes}
            for part, name in homes:
                own.issue(part, name)
            await asyncio.sleep(max(0.0, expire_s - time.time()) + 1.0)
            # what was opened under the old ones was ended, and new streams are there
            gate_.set()
            ended = await watched
            assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED, ended.error
            assert (await ann.broker.ListMembers(MEMBERS)).members
            for part, name in homes:
                address = broker.address if part == "broker" else at[name]
                shown = await asyncio.to_thread(shown_serial, operator, address)
                assert shown == serial(own.folder / part / name) != before[part + name]
        async with valley() as (_, services):
            run = await services.create()
            assert (await services.ended(run.name)).digest == ended.digest

    try:
        bounded(story)
    finally:
        gate_.set()
        Gated.gate_to_pass = None


def shown_serial(home: Path, address: str) -> int:
    """The serial number of the certificate that a server shows now."""
    import socket

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(home / "ca.crt")
    context.load_cert_chain(home / "tls.crt", home / "tls.key")
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="x") as secured,
    ):
        der = secured.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number


def test_who_is_revoked_is_refused_and_their_open_streams_end(tmp_path: Path) -> None:
    own = city(tmp_path / "shelby")
    gate_ = Gated.gate_to_pass = threading.Event()

    async def story() -> None:
        async with (
            guarded_valley(own.folder, dams=Gated) as (broker, _),
            asked_as(own.folder / "operator" / "ann", broker.address) as ann,
            asked_as(own.folder / "observer" / "eve", broker.address) as eve,
        ):
            run = await ann.create()
            answers = eve.watch(run.name)
            await anext(answers)
            own.revoke("observer", "eve")
            began_s = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in answers:
                    pass
            assert time.monotonic() - began_s < 5.0
            error = status.from_rpc(caught.value, "the broker")
            assert (error.reason, error.metadata["cause"]) == (
                Reason.NOT_AUTHENTICATED,
                "REVOKED",
            )
            again = await refused(eve.broker.ListMembers(MEMBERS))
            assert again.reason is Reason.NOT_AUTHENTICATED
            # the broker's own streams, and everybody else's, go on
            gate_.set()
            ended = await ann.ended(run.name)
            assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED

    try:
        bounded(story)
    finally:
        gate_.set()
        Gated.gate_to_pass = None


def test_a_broker_that_is_revoked_loses_its_sessions_and_is_told_why(
    quick: None, tmp_path: Path
) -> None:
    own = city(tmp_path / "shelby")

    async def story() -> None:
        async with served_as(own.folder / "twin" / "dams", "dams", Dams) as at:
            # a thief has the key, and does not read what was revoked
            stolen = own.folder / "broker" / "main"
            (stolen / "ca.crl").unlink()
            with guise(stolen):
                async with await Link.connect(at, "dams") as link:
                    session = await link.session("dams", 1, {}, epoch=1)
                    own.revoke("broker", "main")
                    (stolen / "ca.crl").unlink()
                    began_s = time.monotonic()

                    async def go_on() -> None:
                        for minute in range(1000):
                            await session.advance([StepInput(minute * MINUTE_NS)])
                            await asyncio.sleep(0.02)

                    with pytest.raises(FederationError) as caught:
                        await go_on()
                    assert caught.value.reason is Reason.NOT_AUTHENTICATED
                    assert caught.value.metadata["cause"] == "REVOKED"
                    assert time.monotonic() - began_s < 5.0

    bounded(story)


def test_a_member_that_is_revoked_is_put_out(quick: None, tmp_path: Path) -> None:
    """Its stream ends and its lease goes within seconds, though it would go on for ever; what it
    says later is refused, and it does not get in again."""
    own = city(tmp_path / "shelby")
    gate_ = Gated.gate_to_pass = threading.Event()
    stolen = own.folder / "twin" / "dams"

    async def story() -> None:
        # a thief has the key, and does not read what was revoked
        (stolen / "ca.crl").unlink()
        async with (
            guarded_valley(own.folder, dams=Gated) as (broker, at),
            asked_as(own.folder / "operator" / "ann", broker.address) as ann,
        ):
            run = await ann.create()
            await asyncio.sleep(0.5)  # the dams owe an answer by now

            async def members() -> set[str]:
                return {m.name for m in (await ann.broker.ListMembers(MEMBERS)).members}

            assert "dams" in await members()
            own.revoke("twin", "dams")
            (stolen / "ca.crl").unlink(missing_ok=True)
            began_s = time.monotonic()
            ended = await ann.ended(run.name)
            assert time.monotonic() - began_s < 5.0
            assert ended.state == scenario_pb2.Run.STATE_FAILED
            assert (ended.error.reason, ended.error.metadata["member"]) == ("MEMBER_LOST", "dams")
            assert "revoked" in ended.error.message
            gate_.set()
            assert await members() == {"weather", "town"}
            # what the twin does now is no part of anything: nobody asks it, and it can't ask
            with guise(stolen):
                channel = secure.channel(broker.address, footing.expected(Part.BROKER))
            async with channel:
                stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
                request = broker_pb2.RegisterRequest(name="dams", address=at["dams"])
                error = await refused(stub.Register(request, timeout=10))
                assert (error.reason, error.metadata["cause"]) == (
                    Reason.NOT_AUTHENTICATED,
                    "REVOKED",
                )
            with (
                guise(own.folder / "broker" / "main"),
                pytest.raises(FederationError) as caught,
            ):
                await Link.connect(at["dams"], "dams")
            assert caught.value.metadata["cause"] == "REVOKED"
            assert await members() == {"weather", "town"}

    try:
        bounded(story)
    finally:
        gate_.set()
        Gated.gate_to_pass = None
