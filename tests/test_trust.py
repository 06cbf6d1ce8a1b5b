"""Nobody gets in who does not belong: good certificates and bad ones, over real sockets."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from federation.__main__ import main
from federation.broker.client import asking
from federation.broker.fleet import fleet, run_cases
from federation.broker.server import BrokerOptions, BrokerServer
from federation.core.ledger import Entry
from federation.errors import FederationError, Reason, ScenarioError
from federation.scenario.run import Case, run_local
from federation.scenario.spec import parse
from federation.v1 import scenario_pb2
from federation.wire import footing, secure
from federation.wire.authority import Authority
from federation.wire.credentials import Identity
from federation.wire.footing import Footing, is_local, standing
from federation.wire.link import Link, LinkOptions
from federation.wire.orders import Hand
from federation.wire.party import Part, Party
from tests.guises import (
    DAY,
    MEMBERS,
    asked_as,
    believing,
    broker_of,
    city,
    guarded_valley,
    guise,
    members_of,
    plain_grpc,
    pretender,
    self_signed,
    served_as,
)
from tests.test_broker import ROOT, Services, collect, eventually, places, valley
from tests.test_scenario import TOWN
from tests.test_wire import bounded
from tests.valley import Dams


@pytest.fixture(scope="module")
def shelby(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return city(tmp_path_factory.mktemp("shelby"))


# -- what belongs together works ---------------------------------------------------------


def test_a_federation_whose_members_all_show_certificates_goes_as_one_in_the_clear(
    shelby: Authority,
) -> None:
    async def run(services: Services) -> tuple[str, list[object]]:
        made = await services.create()
        entries: list[Entry] = await collect(services.watch(made.name))
        ended = await services.ended(made.name)
        assert ended.state == scenario_pb2.Run.STATE_SUCCEEDED
        return ended.digest, places(entries)

    async def story() -> None:
        async with (
            guarded_valley(shelby.folder) as (broker, _),
            asked_as(shelby.folder / "operator" / "ann", broker.address) as ann,
        ):
            guarded = await run(ann)
        async with valley() as (_, services):
            assert await run(services) == guarded
        assert guarded[0]

    bounded(story)


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `multitwin`; gives it and where it listens."""
    with subprocess.Popen(
        [sys.executable, "-m", "federation", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    ) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            while line and " at " not in line:
                line = child.stderr.readline()
            assert line, f"{arguments} ended with {child.wait(5)}"
            yield child, line.partition(" at ")[2].split()[0]
        finally:
            child.kill()


def test_the_processes_of_the_command_line_work_under_certificates_from_files_and_environment(
    shelby: Authority,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    homes = shelby.folder
    store = str(tmp_path / "b.sqlite")
    served = ["serve", "tests.valley:Dams", "--name", "dams", "--host", "0.0.0.0"]
    with (
        process("broker", "--port=0", f"--store={store}", f"--tls={homes}/broker/main") as (_, at),
        process(
            *served, "--advertise=127.0.0.1:0", f"--broker={at}", f"--tls={homes}/twin/dams"
        ) as (_, _),
    ):
        ask = ["why", "runs/none", "--broker", at]
        assert main([*ask, "--tls", str(homes / "observer" / "eve")]) == 2
        assert "RUN_NOT_FOUND" in capsys.readouterr().err
        monkeypatch.setenv("MULTITWIN_TLS", str(homes / "observer" / "eve"))
        assert main(ask) == 2
        assert "RUN_NOT_FOUND" in capsys.readouterr().err
        monkeypatch.setenv("MULTITWIN_TLS", str(homes / "twin" / "town"))
        assert main(ask) == 2
        told = capsys.readouterr().err
        assert "NOT_AUTHORISED: spiffe://shelby/twin/town may not call" in told
        assert "guard or observer or operator or planner" in told
        monkeypatch.delenv("MULTITWIN_TLS")
        assert main(ask) == 2
        assert "PLAIN_TEXT_REFUSED" in capsys.readouterr().err

        async def registered() -> None:
            async with asked_as(homes / "operator" / "ann", at) as ann:

                async def once() -> None:
                    (member,) = (await ann.broker.ListMembers(MEMBERS)).members
                    assert member.name == "dams"

                await eventually(once)

        bounded(registered)


# -- who does not belong is refused ------------------------------------------------------


def bad_homes(shelby: Authority, folder: Path) -> dict[str, tuple[Path, set[str]]]:
    """Operators who don't belong, by why, and the causes that a refusal may name."""
    other = pretender(shelby, folder)
    shelby.issue("operator", "old", now=datetime.now(UTC) - 31 * DAY)
    early = shelby.issue("operator", "early", now=datetime.now(UTC) + DAY)
    gone = shelby.issue("operator", "gone")
    shelby.revoke("operator", "gone")
    # one who knows not to look whether they were revoked
    (gone / "ca.crl").unlink()
    myself = self_signed(folder / "myself", Party("shelby", Part.OPERATOR, "ann"))
    return {
        "expired": (shelby.folder / "operator" / "old", {"EXPIRED"}),
        "not yet valid": (early, {"REFUSED"}),
        "revoked": (gone, {"REVOKED"}),
        "foreign": (believing(other.folder / "operator" / "ann", shelby), {"REFUSED"}),
        "self-signed": (believing(myself, shelby), {"REFUSED"}),
    }


def test_who_has_no_good_certificate_is_told_so_at_once(shelby: Authority, tmp_path: Path) -> None:
    homes = bad_homes(shelby, tmp_path)

    async def story() -> None:
        async with broker_of(shelby.folder) as broker:
            for why, (home, causes) in homes.items():
                began_s = time.monotonic()
                error = await members_of(home, broker.address)
                assert error is not None, why
                assert error.reason is Reason.NOT_AUTHENTICATED, why
                assert error.metadata["cause"] in causes, (why, error)
                assert time.monotonic() - began_s < 5.0, why
            assert await members_of(shelby.folder / "operator" / "ann", broker.address) is None

    bounded(story)


def test_the_server_itself_refuses_an_expired_certificate(shelby: Authority) -> None:
    """A client of another make does not look at its own certificate first."""
    home = shelby.issue("operator", "older", now=datetime.now(UTC) - 31 * DAY)

    async def story() -> None:
        async with (
            broker_of(shelby.folder) as broker,
            plain_grpc(home, broker.address, "broker.shelby") as services,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await services.broker.ListMembers(MEMBERS, timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    bounded(story)


@pytest.mark.parametrize(
    ("why", "cause"),
    [
        ("expired", "EXPIRED"),
        ("foreign", "FOREIGN"),
        ("self-signed", "SELF_SIGNED"),
        ("revoked", "REVOKED"),
        ("another part", "OTHER_NAME"),
    ],
)
def test_a_server_that_is_not_who_it_should_be_is_not_spoken_to(
    shelby: Authority, tmp_path: Path, why: str, cause: str
) -> None:
    """A twin asks for its broker, and somebody else answers there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    party = Party("shelby", Part.BROKER, "main")
    home = {
        "expired": lambda: shelby.issue("broker", "old", now=datetime.now(UTC) - 31 * DAY),
        "foreign": lambda: pretender(shelby, tmp_path).folder / "broker" / "main",
        "self-signed": lambda: self_signed(tmp_path / "myself", party),
        "revoked": lambda: shelby.issue("broker", "gone"),
        "another part": lambda: shelby.folder / "twin" / "town",
    }[why]()
    if why == "revoked":
        shelby.revoke("broker", "gone")
    context.load_cert_chain(home / "tls.crt", home / "tls.key")
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read(1000))
        writer.close()

    async def story() -> None:
        server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
        async with server:
            at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            began_s = time.monotonic()
            error = await members_of(shelby.folder / "operator" / "ann", at)
            assert time.monotonic() - began_s < 5.0
        assert error is not None
        assert (error.reason, error.metadata["cause"]) == (Reason.NOT_AUTHENTICATED, cause), error
        assert not heard, "nothing may be said to it"

    bounded(story)


def test_a_twin_has_to_be_the_one_that_the_broker_expects(shelby: Authority) -> None:
    async def story() -> None:
        home = shelby.folder / "twin" / "town"
        async with served_as(home, "town", Dams) as at:
            with guise(shelby.folder / "broker" / "main"):
                async with await Link.connect(at, "town") as link:
                    await link.session("town", 1, {}, epoch=1)
                with pytest.raises(ScenarioError) as caught:
                    await Link.connect(at, "dams")
        assert caught.value.reason is Reason.NOT_AUTHENTICATED
        assert caught.value.metadata == {
            "cause": "OTHER_NAME",
            "identity": "spiffe://shelby/twin/town",
        }
        assert "spiffe://shelby/twin/dams is expected" in caught.value.message

    bounded(story)


def test_nobody_but_the_twin_itself_serves_under_its_name(shelby: Authority) -> None:
    async def story() -> None:
        for home, name in (("twin/town", "dams"), ("operator/ann", "ann"), ("broker/main", "dams")):
            with pytest.raises(ScenarioError) as caught:
                async with served_as(shelby.folder / home, name, Dams):
                    pass
            assert caught.value.reason is Reason.CERTIFICATE_INVALID
        with guise(shelby.folder / "twin" / "dams"), pytest.raises(ScenarioError) as caught:
            async with BrokerServer():
                pass
        assert caught.value.reason is Reason.CERTIFICATE_INVALID

    bounded(story)


def test_only_a_broker_opens_sessions_whatever_order_others_hold(shelby: Authority) -> None:
    async def story() -> None:
        async with served_as(shelby.folder / "twin" / "dams", "dams", Dams) as at:
            with guise(shelby.folder / "guard" / "loop"):
                async with await Link.connect(at, "dams") as link:  # a guard may look at it
                    with pytest.raises(FederationError) as caught:
                        await link.session("dams", 1, {}, epoch=1)
            assert caught.value.reason is Reason.NOT_AUTHORISED
            assert "it is for broker" in caught.value.message
            with guise(shelby.folder / "operator" / "ann"):
                async with Hand(at, Identity.generate("ann"), twin="dams") as hand:
                    with pytest.raises(FederationError) as caught:
                        await hand.halt("smoke")  # the gate lets it by; no keyring knows the key
                    assert "ann may not act here" in caught.value.message

    bounded(story)


# -- in between --------------------------------------------------------------------------


@asynccontextmanager
async def man_in_the_middle(
    server: str, home: Path, lets_pass: int = 0
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that ends TLS under its own certificate, after it let the first connections pass.

    Gives where it listens, and what it got to read.
    """
    host, port = server.split(":")
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.set_alpn_protocols(["h2"])
    own.load_cert_chain(home / "tls.crt", home / "tls.key")
    read: list[bytes] = []
    passed = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal passed
        passed += 1
        try:
            if passed > lets_pass:
                await writer.start_tls(own)
                read.append(await reader.read(1000))
                return
            there = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))
        except OSError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", read


@pytest.mark.parametrize("lets_pass", [0, 1], ids=["always", "after the greeting"])
@pytest.mark.parametrize("has", ["its own authority", "the certificate of a twin"])
def test_a_man_in_the_middle_learns_nothing(
    shelby: Authority, tmp_path: Path, has: str, lets_pass: int
) -> None:
    home = {
        "its own authority": lambda: pretender(shelby, tmp_path).folder / "broker" / "main",
        "the certificate of a twin": lambda: shelby.folder / "twin" / "town",
    }[has]()

    async def story() -> None:
        async with (
            broker_of(shelby.folder) as broker,
            man_in_the_middle(broker.address, home, lets_pass) as (at, read),
        ):
            began_s = time.monotonic()
            error = await members_of(shelby.folder / "operator" / "ann", at)
            assert time.monotonic() - began_s < 5.0
            assert error is not None
            assert error.reason is Reason.NOT_AUTHENTICATED
            assert error.metadata["cause"] in ("FOREIGN", "OTHER_NAME")
            assert not any(read)

    bounded(story)


def test_plain_text_and_tls_do_not_mix_and_each_side_is_told(shelby: Authority) -> None:
    async def story() -> None:
        async with broker_of(shelby.folder) as broker:
            with pytest.raises(ScenarioError) as caught:
                async with asking(broker.address) as channel:
                    await Services(channel).broker.ListMembers(MEMBERS, timeout=10)
            assert caught.value.reason is Reason.PLAIN_TEXT_REFUSED
        twin = shelby.folder / "twin" / "dams"
        async with served_as(twin, "dams", Dams) as at:
            with pytest.raises(ScenarioError) as caught:
                await Link.connect(at, "dams", LinkOptions(connect_timeout_s=0.5))
            assert caught.value.reason is Reason.PLAIN_TEXT_REFUSED
        async with BrokerServer() as broker:
            began_s = time.monotonic()
            error = await members_of(shelby.folder / "operator" / "ann", broker.address)
            assert time.monotonic() - began_s < 5.0
            assert error is not None
            assert (error.reason, error.metadata["cause"]) == (
                Reason.NOT_AUTHENTICATED,
                "PLAIN_TEXT",
            )

    bounded(story)


def test_nothing_older_than_tls_1_2_is_spoken(shelby: Authority) -> None:
    home = shelby.folder / "operator" / "ann"

    def shake(version: ssl.TLSVersion, address: tuple[str, int]) -> str | None:
        import socket

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.check_hostname = False
        context.load_verify_locations(home / "ca.crt")
        context.load_cert_chain(home / "tls.crt", home / "tls.key")
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(address, timeout=5) as raw,
            context.wrap_socket(raw, server_hostname="broker.shelby") as secured,
        ):
            return secured.version()

    async def story() -> None:
        async with broker_of(shelby.folder) as broker:
            host, port = broker.address.split(":")
            at = (host, int(port))
            assert await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_3, at) == "TLSv1.3"
            assert await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_2, at) == "TLSv1.2"
            with pytest.raises(OSError, match=r"(?i)version|protocol|eof|reset"):
                await asyncio.to_thread(shake, ssl.TLSVersion.TLSv1_1, at)

    bounded(story)


# -- plain text stays at home ------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("unix:/tmp/x", True),
        ("unix:///tmp/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("broker:7700", False),
        ("dns:///10.0.0.1:1", False),
        ("127.0.0.1", False),
        ("", False),
    ],
)
def test_it_is_known_which_addresses_stay_on_this_machine(address: str, stays: bool) -> None:
    assert is_local(address) == stays


def test_plain_text_leaves_the_machine_only_when_somebody_says_so_and_then_it_is_said_aloud(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def story() -> None:
        with pytest.raises(ScenarioError, match="--insecure-no-tls") as caught:
            async with BrokerServer(BrokerOptions(host="0.0.0.0")):
                pass
        assert caught.value.reason is Reason.PLAIN_TEXT_REFUSED
        for address in ("10.0.0.1:1", "broker.example:7700"):
            with pytest.raises(ScenarioError) as caught:
                secure.channel(address, footing.expected(Part.BROKER))
            assert caught.value.reason is Reason.PLAIN_TEXT_REFUSED
        assert capsys.readouterr().err == ""
        with standing(Footing(is_exposed=True)):
            async with BrokerServer(BrokerOptions(host="0.0.0.0")) as broker:
                port = broker.address.rpartition(":")[2]
                async with asking(f"127.0.0.1:{port}") as channel:
                    await Services(channel).broker.ListMembers(MEMBERS)
            await secure.channel("broker.example:7700", None).close()
        assert "WARNING: 0.0.0.0:0 IS OPEN TO EVERYBODY" in capsys.readouterr().err

    bounded(story)


def test_a_study_on_this_machine_needs_no_certificates_whoever_starts_it(
    shelby: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker and the members that it starts are all its own, and stay here."""
    monkeypatch.setenv("MULTITWIN_TLS", str(shelby.folder / "operator" / "ann"))
    scenario = parse(TOWN)

    async def story() -> None:
        async with fleet(scenario, ":memory:", tmp_path) as crew:
            (outcome,) = await run_cases(crew, scenario, [Case(0, 1, "none")], None)
        assert not outcome.error
        assert outcome.digest == run_local(scenario, Case(0, 1, "none"), None).digest

    bounded(story)


def test_health_alone_is_told_in_the_clear_to_who_shows_no_certificate(
    shelby: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def story() -> None:
        async with (
            broker_of(shelby.folder, BrokerOptions(health_port=port)),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Services(channel).broker.ListMembers(MEMBERS)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    bounded(story)
    assert f"health alone is told in the clear at 127.0.0.1:{port}" in capsys.readouterr().err


def test_the_command_line_knows_the_flag_for_every_command_that_talks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["why", "runs/x", "--broker", "broker.example:7700"]) == 2
    assert "PLAIN_TEXT_REFUSED" in capsys.readouterr().err
    for command in ("broker", "serve", "control", "why", "stop", "approve", "fork", "history"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert "--tls DIR" in told, command
        assert "--insecure-no-tls" in told, command
