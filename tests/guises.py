"""A city whose processes have certificates, and ways to stand in a test as one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from federation.broker.server import BrokerOptions, BrokerServer
from federation.planners import planner
from federation.twin import Twin
from federation.wire import footing, secure
from federation.wire.authority import Authority
from federation.wire.enrol import keep_name
from federation.wire.footing import Footing, standing
from federation.wire.party import Part
from federation.wire.serve import ServeOptions, serving
from federation.wire.trust import Trust
from tests.test_broker import VALLEY, Services

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
