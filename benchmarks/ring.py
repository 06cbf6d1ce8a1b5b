"""The ring in multitwin: members in one process, in processes of their own, or in a few hosts."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from benchmarks import WARM_STEPS, Cost, Meter, print_seconds
from federation.broker.fleet import fleet, run_cases
from federation.broker.shell import run_live
from federation.loop import run
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import Scenario
from federation.wire.link import Link

TWIN = "benchmarks.ring_twin:RingTwin"

CASE = Case(0, 1, "none")

FEWEST_STEPS = 2
"""Steps of the run whose cost, which is that of opening, is taken from that of the long one."""

START_S = 120.0
"""How long the processes of a ring may take to come up."""


def ring(n: int, m: int, t: int) -> Scenario:
    """The ring as a scenario of `t` > 1 steps, the first at time 0."""
    return Scenario.model_validate(
        {
            "name": "ring",
            "region": "nowhere",
            "horizon_h": (t - 0.5) / 60,  # hours are floats: not at the edge of a step
            "members": {f"m{i}": {"class": TWIN, "config": {"size": m}} for i in range(n)},
            "couplings": [
                {"from": f"m{i}.after", "to": f"m{(i + 1) % n}.before", "delay_min": 1}
                for i in range(n)
            ],
        }
    )


def local(n: int, m: int, t: int) -> Cost:
    async def once(scenario: Scenario) -> Outcome:
        return run_local(scenario, CASE, None)

    return run(_timed(once, n, m, t))


def sockets(n: int, m: int, t: int) -> Cost:
    """A process for each member, and the run in this one; nothing is stored."""
    return run(_linked(n, m, t, n))


def hosts(n: int, m: int, t: int, count: int) -> Cost:
    """The same with all members in `count` processes."""
    return run(_linked(n, m, t, count))


async def _linked(n: int, m: int, t: int, processes: int) -> Cost:
    async with served(processes, m) as addresses, AsyncExitStack() as stack:
        links = {
            f"m{i}": await stack.enter_async_context(
                await Link.connect(addresses[i % processes], f"m{i}")
            )
            for i in range(n)
        }

        async def once(scenario: Scenario) -> Outcome:
            return await run_live(scenario, CASE, None, links, epoch=1)

        return await _timed(once, n, m, t)


def logged(n: int, m: int, t: int) -> Cost:
    return run(_logged(n, m, t))


async def _logged(n: int, m: int, t: int) -> Cost:
    """As the command does it: a broker here with its store in a file, members beside it."""
    with tempfile.TemporaryDirectory() as folder:
        async with fleet(ring(n, m, t), Path(folder) / "broker.sqlite", Path(folder)) as crew:

            async def once(scenario: Scenario) -> Outcome:
                (outcome,) = await run_cases(crew, scenario, [CASE], None)
                return outcome

            return await _timed(once, n, m, t)


async def _timed(once: Callable[[Scenario], Awaitable[Outcome]], n: int, m: int, t: int) -> Cost:
    """The cost of `t` steps, after a warm-up, and without that of opening the sessions."""
    await once(ring(n, m, WARM_STEPS))
    costs = []
    for steps in (FEWEST_STEPS, FEWEST_STEPS + t):
        scenario = ring(n, m, steps)
        meter = Meter()
        outcome = await once(scenario)
        costs.append(meter.cost(_seconds(outcome, n * steps)))
    return costs[1].less(costs[0])


@asynccontextmanager
async def served(count: int, m: int) -> AsyncIterator[Sequence[str]]:
    """The addresses of `count` processes that serve the twin, each any number of times."""
    me = (sys.executable, "-m", "federation", "serve", TWIN, f"--config=size={m}")
    processes = [
        await asyncio.create_subprocess_exec(*me, stderr=asyncio.subprocess.PIPE)
        for _ in range(count)
    ]

    async def address(process: asyncio.subprocess.Process) -> str:
        assert process.stderr is not None
        line = (await process.stderr.readline()).decode()
        if not line.startswith("serving "):
            raise RuntimeError(line + (await process.stderr.read()).decode())
        return line.split()[3]

    try:
        async with asyncio.timeout(START_S):
            addresses = await asyncio.gather(*map(address, processes))
        yield addresses
    finally:
        for process in processes:
            process.kill()
        await asyncio.gather(*(process.wait() for process in processes))


def _seconds(outcome: Outcome, steps: int) -> float:
    """The wall time of the whole run, from the opening of sessions to the digest."""
    if outcome.error:
        raise RuntimeError(outcome.error)
    done = sum(cost.steps for cost in outcome.costs.values())
    if done != steps:
        raise RuntimeError(f"{done} steps instead of {steps}")
    return outcome.wall_s


if __name__ == "__main__":
    print_seconds({"local": local, "grpc": sockets, "hosts": hosts, "logged": logged})
