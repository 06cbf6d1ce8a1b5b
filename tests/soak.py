"""Runs a federation for a long time and looks for what grows: `python -m tests.soak`.

200 twins in four processes form a ring with events and causes, under a broker that stores
everything and keeps its newest runs. One run follows the other, each watched and steered by
clients over sockets. Between runs, when nothing is owed to anybody, the resident memory of the
broker and of the hosts is measured, and tasks, threads and sockets are counted. One JSON line
says how far these grew between the end of the warm-up and the end; code 1 when memory grew by
2 % or more, or anything was left over. `blocks_growth` is that of the blocks which Python's
allocator has handed out in the broker: a leak of objects shows there first.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import grpc
import numpy as np
import psutil

from federation import loop
from federation.broker.server import BrokerOptions, BrokerServer
from federation.twin import (
    MINUTE_NS,
    Actuator,
    Causality,
    Description,
    Entity,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from federation.v1 import (
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
    twin_pb2,
)

HOSTS = 4
SIZE = 10
MOST_GROWTH = 0.02

MOST_IDLE_S = 300.0
"""Rest within which all that is left over must have gone. gRPC's `event_engine` adds a thread when
it is behind and lets it go when it has had nothing to do for 20 s, which it never has between two
runs; with five processes some thread may be woken by a keepalive for a while."""

LOOK_EVERY_S = 5.0

WARM_UP = 0.5
"""The share of the time in which caches fill and the allocators find their size. What is in use
(`broker_blocks`) is the same from the third run on. What is resident grows by some MiB whenever a
busy machine lets more wait in the broker than ever before, since an arena of Python's allocator is
given back only when nothing in it is in use: in 16 minutes five times, the last in the fourteenth,
by 10 MiB in all."""


class Cell(Twin):
    """One place of the ring: a leaky store that spills now and then, and says why."""

    def describe(self) -> Description:
        return Description(
            model="cell",
            version="1",
            domain="soak",
            entities=tuple(Entity(f"e{i}", "cell") for i in range(SIZE)),
            variables=(
                Variable("inflow", "cell", "1", Causality.INPUT),
                Variable("outflow", "cell", "1", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=MINUTE_NS),
            actuators=(Actuator("valve", "cell", "1", 0.0, 1.0, safe_default=0.0),),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.rng = np.random.default_rng(seed)
        self.level = np.zeros(SIZE)

    def advance(self, step: Step) -> None:
        self.level = 0.5 * self.level + 0.4 * step["inflow"] + self.rng.random(SIZE)
        causes: dict[int, str] = {}
        spilling = int(np.argmax(self.level))
        if self.rng.random() < 0.02:
            told = (*step.cause("inflow", spilling), *(a.cause for a in step.actions))
            causes[spilling] = step.emit("spilled", f"e{spilling}", "the cell spills", told)
            self.level[spilling] = 0.0
        step.publish("outflow", self.level, causes)


def document(addresses: list[str], twins: int, steps: int) -> str:
    """The ring, each twin at one of the hosts in turn."""
    return json.dumps(
        {
            "name": "soak",
            "region": "nowhere",
            "horizon_h": steps / 60,
            "members": {f"m{i}": {"address": addresses[i % HOSTS]} for i in range(twins)},
            "couplings": [
                {"from": f"m{i}.outflow", "to": f"m{(i + 1) % twins}.inflow", "delay_min": 1}
                for i in range(twins)
            ],
        }
    )


@asynccontextmanager
async def hosts() -> AsyncIterator[tuple[list[str], list[int]]]:
    """The addresses and process ids of the hosts."""
    command = (sys.executable, "-m", "federation", "serve", "tests.soak:Cell")
    processes = [
        await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        for _ in range(HOSTS)
    ]
    try:
        addresses = []
        for process in processes:
            assert process.stderr is not None
            line = (await asyncio.wait_for(process.stderr.readline(), 60)).decode()
            if not line.startswith("serving "):
                raise SystemExit(f"a host did not start: {line}")
            addresses.append(line.split()[3])
        yield addresses, [process.pid for process in processes]
    finally:
        for process in processes:
            process.terminate()
        await asyncio.gather(*(process.wait() for process in processes))


@dataclass(frozen=True, slots=True)
class Look:
    """What there is between two runs."""

    at_s: float
    broker_mib: float
    broker_blocks: int
    hosts_mib: float
    tasks: int
    threads: Counter[str]
    """Of the broker and the hosts together, by the name that each thread has in the kernel."""
    sockets: int

    @classmethod
    def now(cls, at_s: float, host_pids: list[int]) -> Look:
        gc.collect()
        _give_back()
        me = psutil.Process()
        hosting = [psutil.Process(pid) for pid in host_pids]
        return cls(
            at_s,
            me.memory_info().rss / 2**20,
            sys.getallocatedblocks(),
            sum(process.memory_info().rss for process in hosting) / 2**20,
            len(asyncio.all_tasks()),
            Counter(name for process in (me, *hosting) for name in _threads(process.pid)),
            sum(len(process.net_connections("all")) for process in (me, *hosting)),
        )

    @staticmethod
    def fewest(looks: Sequence[Look]) -> Look:
        """The fewest of everything in some looks."""
        return replace(
            looks[0],
            tasks=min(look.tasks for look in looks),
            threads=min((look.threads for look in looks), key=Counter.total),
            sockets=min(look.sockets for look in looks),
        )

    def is_more_than(self, looks: Sequence[Look]) -> bool:
        """Whether there is something that was not there at the emptiest of the looks."""
        fewest = self.fewest(looks)
        return (
            self.tasks > fewest.tasks
            or self.threads.total() > fewest.threads.total()
            or self.sockets > fewest.sockets
        )


async def _fill_pool() -> None:
    """Have the loop start all the threads that it works with: else it adds one, up to its fixed
    number, whenever two things first happen to coincide, which may take half an hour."""
    at_most = 4 + (os.cpu_count() or 1)  # of `ThreadPoolExecutor`; the standard's is never more
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.5) for _ in range(at_most)))


def _threads(pid: int) -> Iterator[str]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # it has ended since
            yield (task / "comm").read_text().strip()


def _give_back() -> None:
    """Have the allocator return what is free, so that what is left is held by somebody.

    Between two runs it keeps 10 MiB more or less, as it comes; only glibc has the call.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


async def one_run(channel: grpc.aio.Channel, text: str) -> tuple[int, str]:
    """A run that is watched and steered by clients; how many entries they saw, and its digest."""
    runs: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(channel)
    shown: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
    hands: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
    run = (await runs.CreateRun(scenario_pb2.CreateRunRequest(document=text))).run
    entries, steered = 0, False
    async for answer in shown.Watch(broker_pb2.WatchRequest(run=run.name, members=["m0", "m1"])):
        entries += len(answer.entries)
        if entries and not steered:
            steered = True
            action = twin_pb2.Action(member="m1", actuator="valve", entity="e3", value=0.5)
            await hands.SubmitAction(
                control_pb2.SubmitActionRequest(run=run.name, action=action, operator="Ann")
            )
    ended = (await runs.GetRun(scenario_pb2.GetRunRequest(name=run.name))).run
    if ended.state != scenario_pb2.Run.STATE_SUCCEEDED:
        raise SystemExit(f"{run.name} ended with {ended.error.reason}: {ended.error.message}")
    return entries, ended.digest


async def soak(minutes: float, twins: int, steps: int) -> int:
    started_s = time.monotonic()
    looks: list[Look] = []
    runs = entries = 0
    with tempfile.TemporaryDirectory() as folder:
        options = BrokerOptions(store=Path(folder) / "broker.sqlite", keep_runs=2)
        async with hosts() as (addresses, pids), BrokerServer(options) as broker:
            text = document(addresses, twins, steps)
            await _fill_pool()
            while (now_s := time.monotonic() - started_s) < 60 * minutes or runs < 8:
                async with grpc.aio.insecure_channel(broker.address) as channel:
                    seen, _ = await one_run(channel, text)
                runs, entries = runs + 1, entries + seen
                await asyncio.sleep(1.0)  # what ends with the run has ended
                looks.append(Look.now(now_s, pids))
                print(f"{now_s / 60:5.1f} min, {looks[-1]}", file=sys.stderr, flush=True)
            warm = [look for look in looks if look.at_s >= WARM_UP * looks[-1].at_s]
            quarter = max(1, len(warm) // 4)
            first, last = warm[:quarter], warm[-quarter:]
            rested_s = time.monotonic()
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                idle = Look.now(time.monotonic() - started_s, pids)
                idle_s = time.monotonic() - rested_s
                if not idle.is_more_than(first) or idle_s > MOST_IDLE_S:
                    break

    def growth(name: str) -> float:
        before, after = (median(getattr(look, name) for look in some) for some in (first, last))
        return float(after / before - 1.0)

    fewest = Look.fewest(first)

    result = {
        "minutes": round((time.monotonic() - started_s) / 60, 1),
        "twins": twins,
        "runs": runs,
        "steps": runs * (steps + 1) * twins,
        "watched_entries": entries,
        "broker_mib": round(last[-1].broker_mib, 1),
        "hosts_mib": round(last[-1].hosts_mib, 1),
        "broker_growth": round(growth("broker_mib"), 4),
        "blocks_growth": round(growth("broker_blocks"), 4),
        "hosts_growth": round(growth("hosts_mib"), 4),
        "tasks_left": idle.tasks - fewest.tasks,
        "threads_left": idle.threads.total() - fewest.threads.total(),
        "threads_more": dict(idle.threads - fewest.threads),
        "sockets_left": idle.sockets - fewest.sockets,
        "idle_s": round(idle_s),
    }
    print(json.dumps(result), flush=True)
    measured = ("broker_mib", "broker_blocks", "hosts_mib")
    return int(max(map(growth, measured)) >= MOST_GROWTH or idle.is_more_than(first))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="(30)")
    parser.add_argument("--twins", type=int, default=200, metavar="N", help="(200)")
    parser.add_argument("--steps", type=int, default=500, metavar="T", help="of a run (500)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return loop.run(soak(options.minutes, options.twins, options.steps))


if __name__ == "__main__":
    sys.exit(main())
