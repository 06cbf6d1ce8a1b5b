"""What it costs that cities look at each other's runs: `python -m benchmarks.peers`.

Each city is a broker with a twin of its own whose run goes on, and looks at its neighbours over
gRPC on the loopback; all of them are in one process, so that the processor time of a link is that
of both its ends. Topologies: a `ring` (each looks at the next), a `chain` (both neighbours look at
each other), and `stars` (each looks at its four nearest, as on a map). Every configuration is
measured in a process of its own, once with its cities alone and then with the links, and what a
link costs is the difference. Prints a JSON line for each, a fit over all, and as markdown what a
thousand cities would cost by it.

`steps` are those of all links: a step is one instant at which one city has been told of another.
Messages are frames of sessions, there and back; bytes are counted beneath HTTP/2, in a second and
shorter run whose connections go through a counting proxy. State is what the process has more of
resident memory per link, and what the store of the city that looks has more per value: a variable,
of however many entities, at an instant.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from federation import loop
from federation.broker.live import LiveRun
from federation.broker.server import BrokerOptions, BrokerServer
from federation.core.ledger import Quality, Record
from federation.scenario.spec import parse
from federation.scenario.study import cases
from federation.twin import (
    MINUTE_NS,
    Causality,
    Description,
    Entity,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from federation.wire import link as wire_link
from federation.wire.serve import ServeOptions, serving

STEP_MIN = 5
STEP_NS = STEP_MIN * MINUTE_NS
SIZES = (2, 10, 50)
TOPOLOGIES = ("ring", "chain", "stars")
VARIABLES, ENTITIES = 4, 10
MORE_VARIABLES = 24
"""In one further configuration, which tells what a variable costs."""


def station(variables: int, entities: int) -> type[Twin]:
    """A twin whose values all change at every step."""

    class Station(Twin):
        def describe(self) -> Description:
            return Description(
                model="station",
                version="1",
                domain="test",
                entities=tuple(Entity(f"e{i}", "place") for i in range(entities)),
                variables=tuple(
                    Variable(f"v{i}", "place", "MW", Causality.OUTPUT) for i in range(variables)
                ),
                time=TimePolicy(period_ns=STEP_NS),
            )

        def open(self, seed: int, parameters: Mapping[str, float]) -> None:
            self.draw = np.random.default_rng(seed)

        def advance(self, step: Step) -> None:
            for i in range(variables):
                step.publish(f"v{i}", self.draw.random(entities))

    return Station


POLICY = """
version: 1
rules:
  - {name: all, who: ['*'], what: {sessions: [live], variables: ['station.*']}}
limits:
  - {steps: 100000000, cpu_s: 100000, wall_s: 100000, sessions: 4}
"""

DAY = """
name: {city}-day
region: {city}
horizon_h: 100000
members:
  station: {{address: "{station}"}}
pace: {{factor: {factor}, when_late: degrade, late_after_s: {late_after_s}}}
"""

LOOK = """
members:
  {city}: {{address: "{address}", peer: {{session: live}}, on_failure: recover}}
"""


def edges(topology: str, cities: int) -> list[tuple[int, int]]:
    """Who looks at whom."""
    match topology:
        case "ring":
            found = [(i, (i + 1) % cities) for i in range(cities)]
        case "chain":
            found = [pair for i in range(cities - 1) for pair in ((i, i + 1), (i + 1, i))]
        case "stars":
            near = [d for d in (-2, -1, 1, 2) if abs(d) < cities]
            found = [(i, (i + d) % cities) for i in range(cities) for d in near]
        case _:
            raise SystemExit(f"no topology is called {topology}")
    return list(dict.fromkeys(pair for pair in found if pair[0] != pair[1]))


@dataclass
class Count:
    """What has gone over the links."""

    messages: int = 0
    bytes: int = 0


class Tap:
    """A plain TCP proxy that counts."""

    def __init__(self, target: int, count: Count) -> None:
        self._target, self._count = target, count
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        for ends in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._carry(*ends))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                self._count.bytes += len(chunk)
                sink.write(chunk)
                await sink.drain()
        sink.close()


@asynccontextmanager
async def cities(
    count: int, folder: Path, step_s: float, variables: int
) -> AsyncIterator[list[tuple[BrokerServer, LiveRun]]]:
    """Cities whose runs go on, each alone."""
    policy = folder / "policy.yaml"
    policy.write_text(POLICY, encoding="utf-8")
    async with AsyncExitStack() as stack:
        found = []
        for number in range(count):
            name = f"c{number}"
            twin = station(variables, ENTITIES)
            served = serving(twin, "station", ServeOptions(grace_s=0.1))
            at, _ = await stack.enter_async_context(served)
            pace = {"factor": STEP_NS / 1e9 / step_s, "late_after_s": 0.9 * step_s}
            document = DAY.format(city=name, station=at, **pace)
            file = folder / f"{name}.yaml"
            file.write_text(document, encoding="utf-8")
            options = BrokerOptions(
                city=name,
                export=policy,
                city_scenario=file,
                store=folder / f"{name}.sqlite",
                grace_s=0.1,
            )
            broker = await stack.enter_async_context(BrokerServer(options))
            scenario = parse(document)
            (case,) = cases(scenario, ["none"], 1, number)
            run, task = await broker.begin(scenario, case, None)
            stack.push_async_callback(_ended, run, task)
            found.append((broker, run))
            await asyncio.sleep(step_s / count)  # so that not all step at one moment
        yield found


async def _ended(run: LiveRun, task: asyncio.Task[Any]) -> None:
    await run.cancel()
    await asyncio.wait([task])


def _store_bytes(folder: Path) -> int:
    """Of all stores, when what is in their logs is in the files."""
    files = list(folder.glob("*.sqlite"))
    for file in files:
        with sqlite3.connect(file, timeout=10) as db:
            db.execute("PRAGMA wal_checkpoint(FULL)")
        db.close()
    return sum(file.stat().st_size for file in files)


def _resident() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


async def _window(seconds: float) -> tuple[float, float]:
    """CPU time and wall time of a while."""
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return time.process_time() - began_cpu_s, time.monotonic() - began_s


async def measure(
    topology: str, count: int, variables: int, step_s: float, seconds: float, *, taps: bool
) -> dict[str, object]:
    """One configuration."""
    told = Count()
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(cities(count, folder, step_s, variables))
            addresses = {broker.address for broker, _ in found}
            _count_messages(addresses, told)
            await asyncio.sleep(step_s)
            alone_mib = _resident() / 2**20
            alone_cpu_s, alone_s = await _window(seconds)
            links = edges(topology, count)
            joined: dict[tuple[int, int], int] = {}
            for one, other in links:
                address = found[other][0].address
                if taps:
                    tap = Tap(int(address.rpartition(":")[2]), told)
                    address = await tap.start()
                    addresses.add(address)
                    stack.push_async_callback(tap.stop)
                broker, run = found[one]
                text = LOOK.format(city=f"c{other}", address=address)
                at_ns = (broker.store.run(run.name).settled_ns // STEP_NS + 2) * STEP_NS
                joined[one, other] = (await broker.join(run.name, text, at_ns, "duty")).time_ns
            await asyncio.sleep(
                4 * step_s
            )  # until they have all joined and their threads are there
            told.messages = told.bytes = 0
            size = _store_bytes(folder)
            cpu_s, wall_s = await _window(seconds)
            stored = _store_bytes(folder) - size
            messages, sent = told.messages, told.bytes
            linked_mib = _resident() / 2**20
            good = sum(_good(*found[one], f"c{other}") for one, other in links)
    steps = len(links) * wall_s / step_s
    linked_cpu = cpu_s / wall_s - alone_cpu_s / alone_s
    result: dict[str, object] = {
        "topology": topology,
        "cities": count,
        "links": len(links),
        "variables": variables,
        "step_s": step_s,
        "link_steps": round(steps),
        "good": round(good / len(links), 3),
        "messages_per_step": round(messages / steps, 2),
        "cpu_ms_per_step": round(1e3 * linked_cpu * wall_s / steps, 3),
        "cpu_ms_alone": round(1e3 * alone_cpu_s / alone_s * step_s / count, 3),
        "mib_per_link": round((linked_mib - alone_mib) / len(links), 3),
        "mib_per_city": round(alone_mib / count, 2),
        "store_bytes_per_step": round(stored / (count + len(links)) / (wall_s / step_s)),
    }
    if taps:
        result["bytes_per_step"] = round(sent / steps)
    return result


def _good(broker: BrokerServer, run: LiveRun, city: str) -> float:
    """The share of a city's last values here that were good."""
    found = broker.store.history(run.name, city, "station_v0", 0, 1 << 62)[-5:]
    good = [isinstance(s.entry, Record) and s.entry.quality is Quality.GOOD for s in found]
    return good.count(True) / max(len(good), 1)


def _count_messages(addresses: set[str], told: Count) -> None:
    """Count frames of sessions at other cities, and their answers, as the lines have them."""
    post, hear = wire_link._Line.post, wire_link._Line._hear

    def posting(self: Any, *what: Any) -> None:
        told.messages += self.address in addresses
        post(self, *what)

    def hearing(self: Any, *what: Any) -> None:
        told.messages += self.address in addresses
        hear(self, *what)

    line: Any = wire_link._Line
    line.post, line._hear = posting, hearing


# -- all of them, and a thousand on paper --------------------------------------------------------


def apart(*arguments: object) -> dict[str, Any]:
    """Measure one configuration in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers", "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found


def paper(
    rows: Sequence[Mapping[str, Any]],
    bytes_of: Sequence[Mapping[str, Any]],
    stored: Sequence[Mapping[str, Any]],
) -> str:
    """What a thousand cities would cost, by what a step of a link was measured to cost."""
    usual = [row for row in rows if row["variables"] == VARIABLES]
    more = [row for row in rows if row["variables"] == MORE_VARIABLES]
    cpu_ms = float(np.median([row["cpu_ms_per_step"] for row in usual if row["links"] >= 10]))
    messages = float(np.median([row["messages_per_step"] for row in usual]))
    mib = float(np.median([row["mib_per_link"] for row in usual if row["links"] >= 10]))
    few, many = sorted(bytes_of, key=lambda row: row["variables"])
    per_variable = (many["bytes_per_step"] - few["bytes_per_step"]) / (MORE_VARIABLES - VARIABLES)
    base = few["bytes_per_step"] - VARIABLES * per_variable
    extra_ms = max((more[0]["cpu_ms_per_step"] - cpu_ms) / (MORE_VARIABLES - VARIABLES), 0.0)
    sizes = [row["store_bytes_per_step"] for row in stored]
    value_bytes = (sizes[1] - sizes[0]) / (MORE_VARIABLES - VARIABLES)
    lines = [
        "| cities | neighbours | variables | a step every | messages/s | MB/s | CPU of a broker "
        "| memory of its links | its store, a day |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for degree, variables, pace_s in ((4, 20, 300.0), (8, 100, 300.0), (4, 20, 5.0), (8, 100, 5.0)):
        step_bytes = base + per_variable * variables
        step_ms = cpu_ms + extra_ms * (variables - VARIABLES)
        links = 1000 * degree
        daily = degree * variables * value_bytes * 86_400 / pace_s
        lines.append(
            f"| 1,000 | {degree} | {variables} | {pace_s:g} s | {links * messages / pace_s:,.0f} "
            f"| {links * step_bytes / pace_s / 1e6:.2f} "
            f"| {100 * degree * step_ms / 1e3 / pace_s:.3f} % | {degree * mib:.1f} MiB "
            f"| {daily / 1e6:,.1f} MB |"
        )
    lines.append("")
    lines.append(
        f"Measured: a step of a link takes {messages:.1f} messages, {base:.0f} bytes and "
        f"{per_variable:.0f} more per variable of {ENTITIES} numbers, {cpu_ms:.2f} ms of CPU time "
        f"of both ends together and {extra_ms:.3f} ms more per variable; a link takes {mib:.2f} "
        f"MiB of both; a value takes {value_bytes:.0f} bytes of the store. Assumed: every city "
        "looks at as many as look at it, so that a broker bears one end of each; nothing of what "
        "it costs grows with the number of cities, for nobody is told of more than its neighbours."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement (12)")
    parser.add_argument("--one", nargs=6, metavar="X", help="one configuration, in this process")
    options = parser.parse_args()
    if options.one:
        topology, count, variables, step_s, seconds, taps = options.one
        made = measure(
            topology, int(count), int(variables), float(step_s), float(seconds), taps=taps == "taps"
        )
        print(json.dumps(loop.run(made)))
        return 0
    seconds = options.seconds
    rows = [
        # the machine must not be what is measured: a step takes the longer the more there are
        apart(topology, count, VARIABLES, max(0.5, count / 25), seconds, "no")
        for count in SIZES
        for topology in TOPOLOGIES
    ]
    rows.append(apart("ring", 10, MORE_VARIABLES, 0.5, seconds, "no"))
    bytes_of = [apart("ring", 10, v, 0.5, seconds / 2, "taps") for v in (VARIABLES, MORE_VARIABLES)]
    # many steps, so that what a value takes in the store is more than a part of a page
    stored = [apart("ring", 2, v, 0.02, seconds, "no") for v in (VARIABLES, MORE_VARIABLES)]
    print(paper(rows, bytes_of, stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())
