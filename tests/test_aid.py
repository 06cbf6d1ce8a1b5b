"""Cities that help each other: what they agree on, what they are bound by, and what crosses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path

from federation.broker.server import BrokerOptions, BrokerServer
from federation.core.coupling import Coupling
from federation.peer.aid import AidDesk, AidOptions
from federation.peer.bargaining import Agreement, Wanted, seek
from federation.peer.city import City, LocalQuarters
from federation.peer.estate import FileEstate
from federation.plan.border import Holding
from federation.plan.engine import engine_of, optimum_usd
from federation.plan.joining import join
from federation.scenario.spec import load
from federation.wire.link import LinkOptions
from tests.aidcities import PERIODS, PURPOSE, options_of, write_city
from tests.test_wire import LOOP

LINK = LinkOptions(connect_timeout_s=3.0, answer_timeout_s=20.0)
POWER = Wanted("birch", "power", gives=True)
BACK = Wanted("birch", "power", gives=False)
CREWS = Wanted("birch", "crews", gives=True)
BEDS = Wanted("birch", "beds", gives=True)


def told(story: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """A story of some seconds as a test."""

    @wraps(story)
    def test(**given: object) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await story(**given)

        LOOP.run(limited())

    return test


@asynccontextmanager
async def city(
    folder: Path, name: str, port: int = 0, aid: AidOptions | None = None
) -> AsyncIterator[BrokerServer]:
    """The broker of a city that gives aid."""
    files = write_city(folder, name)
    options = BrokerOptions(
        city=name,
        export=files.policy,
        city_scenario=files.scenario,
        grace_s=0.1,
        port=port,
        link=LINK,
        aid=aid or options_of(folder, name),
    )
    async with BrokerServer(options) as broker:
        yield broker


def desk_of(broker: BrokerServer) -> AidDesk:
    assert broker.aid is not None
    return broker.aid


async def ask(
    broker: BrokerServer, there: Mapping[str, BrokerServer], *wanted: Wanted, **more: object
) -> Agreement:
    """Let a city seek aid for six hours."""
    settings: dict[str, object] = {"purpose": PURPOSE, "start_ns": 0, "periods_ns": PERIODS, **more}
    return await seek(
        desk_of(broker),
        wanted,
        {name: one.address for name, one in there.items()},
        link=broker._link_options(),
        **settings,  # type: ignore[arg-type]
    )


def whole(folder: Path, name: str) -> tuple[Holding, FileEstate]:
    """All that a city bargains from, as nobody outside sees it."""
    files = write_city(folder, name)
    scenario = load(files.scenario)
    estate = FileEstate(files.goods, City(name, scenario, LocalQuarters(scenario)))
    asked = [("power", "MW", True), ("power", "MW", False), ("crews", "1", name == "birch")]
    return estate.holding(asked, 0, PERIODS), estate


def joint_usd(folder: Path, *, apart: bool = False) -> float:
    """The optimum of both cities in one model; or, `apart`, of each by itself."""
    blocks, couplings = {}, []
    for name in ("ash", "birch"):
        holding, _ = whole(folder, name)
        blocks |= {f"{name}-{member}": block for member, block in holding.blocks.items()}
        for c in holding.couplings:
            couplings.append(
                Coupling(f"{name}-{c.source}", c.output, f"{name}-{c.target}", c.input)
            )
    if not apart:
        couplings += [
            Coupling("birch-power", "export", "ash-power", "import"),
            Coupling("ash-power", "export", "birch-power", "import"),
            Coupling("birch-stock", "crews-given", "ash-stock", "crews-taken"),
        ]
    else:
        for name in ("ash", "birch"):
            for member, part, column in (
                ("power", "import", "import"),
                ("stock", "crews-taken", "takes crews"),
            ):
                block = blocks[f"{name}-{member}"]
                for j, called in enumerate(block.columns):
                    if called.startswith(f"{column}["):
                        block.high[j] = 0.0
    return optimum_usd(engine_of(join(blocks, couplings)))


@told
async def test_two_cities_agree_within_half_a_percent_of_the_joint_optimum(tmp_path: Path) -> None:
    together, apart = joint_usd(tmp_path), joint_usd(tmp_path, apart=True)
    async with city(tmp_path, "ash") as ash, city(tmp_path, "birch") as birch:
        found = await ask(ash, {"birch": birch}, POWER, BACK, CREWS)
    # what birch does by itself it tells nobody; the test may know
    alone_birch = apart - found.alone_usd
    cost = found.cost_usd + alone_birch
    print(
        "gap",
        (cost - together) / abs(together),
        "told",
        found.gap,
        "saved",
        apart - cost,
        "rounds",
        found.rounds,
        together,
        apart,
    )
    assert together - 1.0 <= cost <= together + 0.005 * abs(together)
