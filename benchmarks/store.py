"""What the broker's store does in a second: `python -m benchmarks.store append|watch|history N`.

Prints JSON lines, in which N is the number of repetitions.

append    ledger entries a second through `Store.append` into a file, each a vector of 10 numbers,
          as many in one transaction as `batch` says; and the size of the file
watch     a run of two twins that step 20 times a second, followed over sockets by subscribers in
          one process of their own, a connection each: from the moment that a value is in the
          store until a subscriber has read it
history   `Store.history` of one variable out of 16, each with 62,500 revisions of 10 numbers:
          10,000,000 in all
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import grpc
import numpy as np

from benchmarks.ring import CASE, ring
from benchmarks.ring_twin import PACE_S
from federation.broker.fleet import Fleet, fleet
from federation.broker.store import Run, Store
from federation.core.ledger import Entry, Record
from federation.scenario.spec import Scenario
from federation.twin import MINUTE_NS
from federation.v1 import broker_pb2, broker_pb2_grpc

SIZE = 10
"""Numbers in a vector."""

STEPS = 120
FEWEST = 40
"""Instants of a run that all subscribers must have followed."""

PATIENCE_S = 60.0

MEMBERS = 16
INSTANTS = 62_500


def entries(instants: range) -> list[Entry]:
    """A value of each of 16 members at each instant, a minute apart."""
    value = np.arange(float(SIZE))
    return [
        Record(instant * MINUTE_NS, 0, rank, f"m{rank}", "after", instant + 1, value + instant)
        for instant in instants
        for rank in range(MEMBERS)
    ]


def new_store(folder: str) -> tuple[Store, str]:
    """An empty store in a file, and the name of a run in it."""
    store = Store(Path(folder) / "store.sqlite")
    store.next_epoch()
    run = Run("ring", "ring", "none", "", 1, INSTANTS * MINUTE_NS, time.time_ns())
    return store, store.create(run).name


# -- append --------------------------------------------------------------------------------


def append(repeat: int) -> Iterator[dict[str, Any]]:
    for batch, count in ((MEMBERS, 16_000), (1_024, 65_536)):
        todo = entries(range(count // MEMBERS))
        spent, sizes = [], []
        for _ in range(repeat):
            with tempfile.TemporaryDirectory() as folder:
                store, run = new_store(folder)
                began_s = time.perf_counter()
                keep(store, run, todo, batch)
                spent.append(time.perf_counter() - began_s)
                store.close()
                sizes.append(sum(file.stat().st_size for file in Path(folder).iterdir()))
        speed = count / median(spent)
        yield {
            "what": "append",
            "batch": batch,
            "m": SIZE,
            "writes_per_s": round(speed),
            "values_per_s": round(speed * SIZE),
            "mib_per_million_values": round(median(sizes) / (1 << 20) / count / SIZE * 1e6, 1),
        }


def keep(store: Store, run: str, todo: Sequence[Entry], batch: int) -> None:
    now_ns = time.time_ns()
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        store.append(run, part, [now_ns] * len(part), part[-1].time_ns)


# -- watch ---------------------------------------------------------------------------------


def watch(repeat: int) -> Iterator[dict[str, Any]]:
    yield from asyncio.run(_watch(repeat))


async def _watch(repeat: int) -> list[dict[str, Any]]:
    plain = ring(2, SIZE, STEPS)
    paced = {
        name: member.model_copy(update={"twin": "benchmarks.ring_twin:PacedTwin"})
        for name, member in plain.members.items()
    }
    scenario = plain.model_copy(update={"members": paced})
    stored_ns: dict[int, int] = {}
    append_to = Store.append

    def noting(
        store: Store, run: str, new: Sequence[Entry], receive_ns: Sequence[int], settled_ns: int
    ) -> int:
        number = append_to(store, run, new, receive_ns, settled_ns)
        now_ns = time.time_ns()
        stored_ns.update((entry.time_ns, now_ns) for entry in new)
        return number

    rows = []
    with tempfile.TemporaryDirectory() as folder, patch.object(Store, "append", noting):
        async with fleet(scenario, Path(folder) / "broker.sqlite", Path(folder)) as crew:
            for subscribers in (1, 10, 100):
                rounds = []
                for _ in range(repeat):
                    stored_ns.clear()
                    rounds.append(await _follow(crew, scenario, subscribers, stored_ns))
                rows.append(
                    {
                        "what": "watch",
                        "subscribers": subscribers,
                        "values_per_s": round(2 * SIZE / PACE_S),
                        "deliveries": sum(len(one) for one in rounds),
                        "p50_ms": _ms(rounds, 50),
                        "p99_ms": _ms(rounds, 99),
                    }
                )
    return rows


def _ms(rounds: Sequence[Sequence[int]], share: int) -> float:
    """A percentile of latencies in nanoseconds: the median over rounds."""
    return round(median(float(np.percentile(one, share)) for one in rounds) / 1e6, 3)


async def _follow(
    crew: Fleet, scenario: Scenario, subscribers: int, stored_ns: dict[int, int]
) -> list[int]:
    """One run and its subscribers; the latency in ns of every value's way to each of them."""
    live, task = await crew.broker.begin(scenario, CASE, None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.store", "subscribe", crew.broker.address),
        *(live.name, str(subscribers)),
        stdout=PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            said = await _said(process)
            await task
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    followed = {instant for instant, at_ns in stored_ns.items() if at_ns > said["ready_ns"]}
    got = [(instant, at_ns) for instant, at_ns in said["got"] if instant in followed]
    if len(followed) < FEWEST or len(got) != len(followed) * subscribers:
        raise RuntimeError(
            f"{len(got)} deliveries of {len(followed)} instants to {subscribers} subscribers"
        )
    return [at_ns - stored_ns[instant] for instant, at_ns in got]


async def _said(process: Process) -> Any:
    out, _ = await process.communicate()
    return json.loads(out)


async def subscribe(address: str, run: str, count: int) -> None:
    """Follow a run to its end `count` times; prints when all were there, and what came when."""
    there = asyncio.Barrier(count)
    got: list[tuple[int, int]] = []
    ready_ns = 0

    async def one() -> None:
        nonlocal ready_ns
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options) as channel:
            stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
            call = stub.Watch(broker_pb2.WatchRequest(run=run))
            await anext(aiter(call))
            await there.wait()
            ready_ns = ready_ns or time.time_ns()
            async for response in call:
                now_ns = time.time_ns()
                instants = {entry.time_ns for entry in response.entries}
                got.extend((instant, now_ns) for instant in instants)

    await asyncio.gather(*(one() for _ in range(count)))
    print(json.dumps({"ready_ns": ready_ns, "got": got}))


# -- history -------------------------------------------------------------------------------


def history(repeat: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        store, run = new_store(folder)
        for start in range(0, INSTANTS, 2_500):
            keep(store, run, entries(range(start, start + 2_500)), 4_096)
        middle = INSTANTS // 2
        for first, last in (
            (INSTANTS - 100, INSTANTS - 1),
            (middle, middle + 999),
            (0, INSTANTS - 1),
        ):
            spent = []
            for turn in range(repeat):
                owner = f"m{turn % MEMBERS}"
                began_s = time.perf_counter()
                found = store.history(run, owner, "after", first * MINUTE_NS, last * MINUTE_NS)
                spent.append(time.perf_counter() - began_s)
                if len(found) != last - first + 1:
                    raise RuntimeError(f"{len(found)} revisions of {last - first + 1}")
            yield {
                "what": "history",
                "stored_values": INSTANTS * MEMBERS * SIZE,
                "revisions": last - first + 1,
                "m": SIZE,
                "ms": round(median(spent) * 1e3, 3),
                "us_per_revision": round(median(spent) * 1e6 / (last - first + 1), 3),
            }
        store.close()


if __name__ == "__main__":
    if sys.argv[1] == "subscribe":
        asyncio.run(subscribe(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        work = {"append": append, "watch": watch, "history": history}[sys.argv[1]]
        for row in work(int(sys.argv[2])):
            print(json.dumps(row), flush=True)
