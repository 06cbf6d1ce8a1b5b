"""How long it takes from the start of the processes until every twin has its first grant.

`python -m benchmarks.startup local N` starts with this process; `grpc N` with the broker and
its N member processes, once this process has imported what it needs.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import psutil

from benchmarks import print_seconds
from benchmarks.ring import CASE, ring
from benchmarks.ring_twin import MARK
from federation.broker.fleet import fleet, run_cases
from federation.scenario.run import Outcome, run_local
from federation.scenario.spec import Scenario


def local(n: int) -> float:
    with redirect_stdout(StringIO()) as said:
        outcome = run_local(_ring(n), CASE, None)
    return _last_grant_s(outcome, said.getvalue(), n) - psutil.Process().create_time()


def sockets(n: int) -> float:
    return asyncio.run(_sockets(n))


async def _sockets(n: int) -> float:
    scenario = _ring(n)
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.time()
        async with fleet(scenario, Path(folder) / "broker.sqlite", Path(folder)) as crew:
            (outcome,) = await run_cases(crew, scenario, [CASE], None)
            said = "".join(log.read_text(encoding="utf-8") for log in crew.logs.values())
    return _last_grant_s(outcome, said, n) - started_s


def _ring(n: int) -> Scenario:
    """Two steps of the ring whose twins tell of their first grant."""
    plain = ring(n, 10, 2)
    told = {
        name: member.model_copy(update={"twin": "benchmarks.ring_twin:FirstGrant"})
        for name, member in plain.members.items()
    }
    return plain.model_copy(update={"members": told})


def _last_grant_s(outcome: Outcome, said: str, n: int) -> float:
    """When the last of the twins had its first grant, in Unix time."""
    if outcome.error:
        raise RuntimeError(outcome.error)
    grants = [float(line[len(MARK) :]) for line in said.splitlines() if line.startswith(MARK)]
    if len(grants) != n:
        raise RuntimeError(f"{len(grants)} twins of {n} told of their first grant")
    return max(grants)


if __name__ == "__main__":
    print_seconds({"local": local, "grpc": sockets})
