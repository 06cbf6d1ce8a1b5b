"""The ring in multitwin: members in one process, in processes of their own, or in a few hosts."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from benchmarks import WARM_STEPS, check, print_seconds
from federation.broker.fleet import fleet, run_cases
from federation.broker.live import run_live
from federation.loop import run
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import Scenario
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
from federation.wire.link import Link

HOSTS = 4
"""How many processes all twins share in the mode `hosts`."""


class RingTwin(Twin):
    """One place in the ring; a step is a minute."""

    def __init__(self, size: int) -> None:
        self.size = size

    def describe(self) -> Description:
        return Description(
            model="ring",
            version="1",
            domain="benchmark",
            entities=tuple(Entity(f"e{i}", "cell") for i in range(self.size)),
            variables=(
                Variable("before", "cell", "1", Causality.INPUT),
                Variable("after", "cell", "1", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=MINUTE_NS),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        return None

    def advance(self, step: Step) -> None:
        value = step["before"]
        check(value[0], step.time_ns // MINUTE_NS)
        step.publish("after", value + 1.0)


def ring(n: int, m: int, t: int, hosts: Sequence[str] = ()) -> Scenario:
    """The ring as a scenario of `t` > 1 steps, the first at time 0.

    With the addresses of `hosts` the twins are theirs, in turn.
    """
    own = {"class": "benchmarks.ring:RingTwin", "config": {"size": m}}
    return Scenario.model_validate(
        {
            "name": "ring",
            "region": "nowhere",
            "horizon_h": (t - 1) / 60,
            "members": {
                f"m{i}": {"address": hosts[i % len(hosts)]} if hosts else own for i in range(n)
            },
            "couplings": [
                {"from": f"m{i}.after", "to": f"m{(i + 1) % n}.before", "delay_min": 1}
                for i in range(n)
            ],
        }
    )


CASE = Case(0, 1, "none")


def local(n: int, m: int, t: int) -> float:
    run_local(ring(n, m, WARM_STEPS), CASE, None)
    return _seconds(run_local(ring(n, m, t), CASE, None), n * t)


def sockets(n: int, m: int, t: int) -> float:
    return run(_sockets(n, m, t))


async def _sockets(n: int, m: int, t: int, hosts: Sequence[str] = ()) -> float:
    """As the command does it: a broker here with its store in a file, members beside it."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = ring(n, m, t, hosts)
        async with fleet(scenario, Path(folder) / "broker.sqlite", Path(folder)) as crew:
            await run_cases(crew, ring(n, m, WARM_STEPS, hosts), [CASE], None)
            return _seconds((await run_cases(crew, scenario, [CASE], None))[0], n * t)


def links(n: int, m: int, t: int) -> float:
    return run(_links(n, m, t))


async def _links(n: int, m: int, t: int) -> float:
    """The same without a store: the run alone, at members in processes of their own."""
    async with _served(n, m) as addresses, AsyncExitStack() as stack:
        connected = {
            f"m{i}": await stack.enter_async_context(await Link.connect(address, f"m{i}"))
            for i, address in enumerate(addresses)
        }
        await run_live(ring(n, m, WARM_STEPS), CASE, None, connected, epoch=1)
        return _seconds(await run_live(ring(n, m, t), CASE, None, connected, epoch=1), n * t)


def hosts(n: int, m: int, t: int) -> float:
    return run(_hosts(n, m, t))


async def _hosts(n: int, m: int, t: int) -> float:
    """As the command does it, with all members in a few processes."""
    async with _served(HOSTS, m) as addresses:
        return await _sockets(n, m, t, addresses)


@asynccontextmanager
async def _served(count: int, m: int) -> AsyncIterator[list[str]]:
    """The addresses of `count` processes that serve the twin, each any number of times."""
    me = (sys.executable, "-m", "federation", "serve", "benchmarks.ring:RingTwin")
    processes = [
        await asyncio.create_subprocess_exec(
            *me, f"--config=size={m}", stderr=asyncio.subprocess.PIPE
        )
        for _ in range(count)
    ]
    try:
        addresses = []
        for process in processes:
            assert process.stderr is not None
            line = (await process.stderr.readline()).decode()
            if not line.startswith("serving "):
                raise RuntimeError(line + (await process.stderr.read()).decode())
            addresses.append(line.split()[3])
        yield addresses
    finally:
        for process in processes:
            process.kill()
            await process.wait()


def _seconds(outcome: Outcome, steps: int) -> float:
    """The wall time of the whole run, from the opening of sessions to the digest."""
    if outcome.error:
        raise RuntimeError(outcome.error)
    done = sum(cost.steps for cost in outcome.costs.values())
    if done != steps:
        raise RuntimeError(f"{done} steps instead of {steps}")
    return outcome.wall_s


if __name__ == "__main__":
    print_seconds({"local": local, "grpc": sockets, "links": links, "hosts": hosts})
