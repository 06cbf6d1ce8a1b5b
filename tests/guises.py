"""A city whose processes have certificates, and ways to stand in a test as one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from federation.broker.server import BrokerOptions, BrokerServer
from federation.errors import FederationError
from federation.planners import planner
from federation.twin import Twin
from federation.v1 import broker_pb2
from federation.wire import footing, secure, status
from federation.wire.authority import Authority
from federation.wire.enrol import keep_name
from federation.wire.footing import Footing, standing
from federation.wire.party import Part, Party
from federation.wire.serve import ServeOptions, serving
from federation.wire.trust import Trust
from tests.test_broker import VALLEY, Services

DAY = timedelta(days=1)
MEMBERS = broker_pb2.ListMembersRequest()


PEOPLE = {
    Part.BROKER: "main",
    Part.TWIN: "dams",
    Part.GUARD: "loop",
    Part.OPERATOR: "ann",
    Part.PLANNER: "pat",
    Part.OBSERVER: "eve",
}
"""One of each part that a certificate gives."""


def city(folder: Path, name: str = "shelby") -> Authority:
    """An authority that has issued a certificate to each of `PEOPLE`, and to the valley's twins."""
    authority = Authority.create(folder, name)
    for part, person in PEOPLE.items():
        authority.issue(part, person)
    for twin in VALLEY:
        authority.issue(Part.TWIN, twin)
    return authority


@contextmanager
def guise(folder: Path) -> Iterator[Trust]:
    """Be who has the certificate in a folder."""
    trust = Trust.of(folder)
    with standing(Footing(trust)):
        yield trust


@asynccontextmanager
async def asked_as(folder: Path, broker: str, city: str = "") -> AsyncIterator[Services]:
    """A client of a broker under an identity."""
    with guise(folder):
        channel = secure.channel(broker, footing.expected(Part.BROKER, city=city))
    async with channel:
        yield Services(channel)


@asynccontextmanager
async def broker_of(
    folder: Path, options: BrokerOptions | None = None
) -> AsyncIterator[BrokerServer]:
    """The broker of a city."""
    async with AsyncExitStack() as stack:
        with guise(folder / "broker" / "main"):
            broker = await stack.enter_async_context(BrokerServer(options))
        yield broker


@asynccontextmanager
async def served_as(
    folder: Path, name: str, twin: type[Twin], broker: str | None = None, enrolled_as: str = ""
) -> AsyncIterator[str]:
    """A twin that is served, and registered, under an identity; gives its address."""
    async with AsyncExitStack() as stack:
        with guise(folder):
            at, description = await stack.enter_async_context(
                serving(twin, name, ServeOptions(grace_s=0.1))
            )
            if broker is not None:
                stay = asyncio.create_task(
                    keep_name(broker, enrolled_as or name, at, description, lambda _: None)
                )
                stack.push_async_callback(_gone, stay)
        yield at


async def _gone(stay: asyncio.Task[None]) -> None:
    stay.cancel()
    with suppress(asyncio.CancelledError):
        await stay


@asynccontextmanager
async def guarded_valley(
    folder: Path, **twins: type[Twin]
) -> AsyncIterator[tuple[BrokerServer, dict[str, str]]]:
    """A broker and the valley's twins, each under its own certificate; and where the twins are."""
    async with AsyncExitStack() as stack:
        options = BrokerOptions(planner=planner, grace_s=0.2)
        broker = await stack.enter_async_context(broker_of(folder, options))
        found = {}
        for name, twin in {**VALLEY, **twins}.items():
            home = folder / "twin" / name
            found[name] = await stack.enter_async_context(
                served_as(home, name, twin, broker.address)
            )
        await broker.members_ready(found, 10)
        yield broker, found


async def members_of(home: Path, broker: str) -> FederationError | None:
    """Ask a broker for its members under an identity; why that did not do, if it did not."""
    async with asked_as(home, broker) as services:
        try:
            await services.broker.ListMembers(MEMBERS, timeout=10)
        except grpc.aio.AioRpcError as error:
            return status.from_rpc(error, "the broker")
    return None


def pretender(shelby: Authority, folder: Path) -> Authority:
    """Somebody else's authority, which says that it is Shelby's."""
    return city(folder / "pretender", shelby.city)


def believing(home: Path, authority: Authority) -> Path:
    """A folder whose owner takes this authority for its own, whoever issued the certificate."""
    (home / "ca.crt").write_bytes((authority.folder / "ca.crt").read_bytes())
    (home / "ca.crl").write_bytes((authority.folder / "ca.crl").read_bytes())
    return home


def self_signed(home: Path, party: Party) -> Path:
    """A folder with a certificate that only its owner vouches for."""
    home.mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "myself")])
    names = [x509.UniformResourceIdentifier(party.uri), *map(x509.DNSName, party.hosts)]
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (home / "tls.key").write_bytes(pem)
    (home / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    return home


@asynccontextmanager
async def plain_grpc(home: Path, address: str, host: str) -> AsyncIterator[Services]:
    """gRPC's own channel with the certificates of a folder, and nothing of ours around it."""
    credentials = grpc.ssl_channel_credentials(
        *((home / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
    )
    options = [("grpc.ssl_target_name_override", host)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        yield Services(channel)


def serial(home: Path) -> int:
    """The serial number of the certificate in a folder."""
    return x509.load_pem_x509_certificate((home / "tls.crt").read_bytes()).serial_number
