"""How long it takes from the start of the processes until every twin has its first grant.

`python -m benchmarks.startup local N` starts with this process; `grpc N` with the broker and
its N member processes, once this process has imported what it needs.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import print_seconds
from benchmarks.ring import CASE, RingTwin, ring
from federation.broker.fleet import fleet, run_cases
from federation.scenario.run import run_local
from federation.scenario.spec import Scenario
from federation.twin import Step

MARK = "granted at "


class FirstGrant(RingTwin):
    """Tells on standard output when its first step began, in Unix time."""

    def advance(self, step: Step) -> None:
        if step.time_ns == 0:
            print(f"{MARK}{time.time():.6f}", flush=True)
        super().advance(step)


class Remembered(RingTwin):
    """Keeps when the first step of the latest twin began, in Unix time."""

    began_s = 0.0

    def advance(self, step: Step) -> None:
        if step.time_ns == 0:
            type(self).began_s = time.time()
        super().advance(step)


def local(n: int) -> float:
    run_local(_ring_of(Remembered, n), CASE, None)
    return Remembered.began_s - psutil.Process().create_time()


def sockets(n: int) -> float:
    return asyncio.run(_sockets(n))


async def _sockets(n: int) -> float:
    scenario = _ring_of(FirstGrant, n)
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.time()
        async with fleet(scenario, Path(folder) / "broker.sqlite", Path(folder)) as crew:
            (outcome,) = await run_cases(crew, scenario, [CASE], None)
            if outcome.error:
                raise RuntimeError(outcome.error)
            said = "\n".join(log.read_text(encoding="utf-8") for log in crew.logs.values())
    grants = [float(line[len(MARK) :]) for line in said.splitlines() if line.startswith(MARK)]
    if len(grants) != n:
        raise RuntimeError(f"{len(grants)} twins of {n} told of their first grant")
    return max(grants) - started_s


def _ring_of(twin: type[RingTwin], n: int) -> Scenario:
    """Two steps of the ring with another class of twins."""
    plain = ring(n, 10, 2)
    path = f"benchmarks.startup:{twin.__name__}"
    members = {
        name: member.model_copy(update={"twin": path}) for name, member in plain.members.items()
    }
    return plain.model_copy(update={"members": members})


if __name__ == "__main__":
    print_seconds({"local": local, "grpc": sockets})
