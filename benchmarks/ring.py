"""The ring in multitwin: members in one process, or in processes of their own."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from benchmarks import WARM_STEPS, Cost, Meter, print_seconds
from federation.broker.fleet import fleet, run_cases
from federation.scenario.run import Case, Outcome, run_local
from federation.scenario.spec import Scenario


def ring(n: int, m: int, t: int) -> Scenario:
    """The ring as a scenario of `t` > 1 steps, the first at time 0."""
    return Scenario.model_validate(
        {
            "name": "ring",
            "region": "nowhere",
            "horizon_h": (t - 1) / 60,
            "members": {
                f"m{i}": {"class": "benchmarks.ring_twin:RingTwin", "config": {"size": m}}
                for i in range(n)
            },
            "couplings": [
                {"from": f"m{i}.after", "to": f"m{(i + 1) % n}.before", "delay_min": 1}
                for i in range(n)
            ],
        }
    )


CASE = Case(0, 1, "none")

FEWEST_STEPS = 2
"""Steps of the run whose cost, which is that of opening, is taken from that of the long one."""


def local(n: int, m: int, t: int) -> Cost:
    run_local(ring(n, m, WARM_STEPS), CASE, None)
    costs = []
    for steps in (FEWEST_STEPS, FEWEST_STEPS + t):
        meter = Meter()
        outcome = run_local(ring(n, m, steps), CASE, None)
        costs.append(meter.cost(_seconds(outcome, n * steps)))
    return costs[1].less(costs[0])


def sockets(n: int, m: int, t: int) -> Cost:
    return asyncio.run(_sockets(n, m, t))


async def _sockets(n: int, m: int, t: int) -> Cost:
    """As the command does it: a broker here with its store in a file, members beside it."""
    with tempfile.TemporaryDirectory() as folder:
        async with fleet(ring(n, m, t), Path(folder) / "broker.sqlite", Path(folder)) as crew:
            await run_cases(crew, ring(n, m, WARM_STEPS), [CASE], None)
            costs = []
            for steps in (FEWEST_STEPS, FEWEST_STEPS + t):
                meter = Meter()
                (outcome,) = await run_cases(crew, ring(n, m, steps), [CASE], None)
                costs.append(meter.cost(_seconds(outcome, n * steps)))
            return costs[1].less(costs[0])


def _seconds(outcome: Outcome, steps: int) -> float:
    """The wall time of the whole run, from the opening of sessions to the digest."""
    if outcome.error:
        raise RuntimeError(outcome.error)
    done = sum(cost.steps for cost in outcome.costs.values())
    if done != steps:
        raise RuntimeError(f"{done} steps instead of {steps}")
    return outcome.wall_s


if __name__ == "__main__":
    print_seconds({"local": local, "grpc": sockets})
