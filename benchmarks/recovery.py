"""How long a run waits for a member that was killed: `python -m benchmarks.recovery N`.

A ring of 4 members in processes of their own, one of which is killed (SIGKILL) half-way between
two snapshots. Prints a JSON line with medians of N such runs: `seconds` from the kill until the run
goes on after its longest rest, and `own_start_s`, what a process of such a member takes by itself
from its start until it serves.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.ring import CASE, ring, served
from benchmarks.turns import rounded
from federation import loop
from federation.broker.fleet import fleet
from federation.scenario.spec import OnFailure, Scenario
from federation.twin import MINUTE_NS

N = 4
SIZE = 10
STEPS = 6_000
SAVED = 100
"""Steps from one snapshot to the next."""

KILLED_AT = 3_050


async def recovery() -> tuple[float, float]:
    """Seconds from the kill until the run went on, and of those the member's own start-up."""
    scenario = _recovering()
    killed_s = 0.0
    looks_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with fleet(scenario, Path(folder) / "broker.sqlite", Path(folder)) as crew:

            def look(settled_ns: int) -> None:
                nonlocal killed_s
                looks_s.append(time.perf_counter())
                if settled_ns >= KILLED_AT * MINUTE_NS and not killed_s:
                    killed_s = looks_s[-1]
                    crew.processes["m0"].kill()

            outcome = await crew.broker.run(scenario, CASE, None, on_commit=look)
    if outcome.error or [member for member, _, _ in outcome.recoveries] != ["m0"]:
        raise RuntimeError(outcome.error or f"it was not m0 that recovered: {outcome.recoveries}")
    began_s = time.perf_counter()
    async with served(1, SIZE):
        own_start_s = time.perf_counter() - began_s
    since_s = [at_s for at_s in looks_s if at_s >= killed_s]
    _, back_s = max(pairwise(since_s), key=lambda gap: gap[1] - gap[0])
    return back_s - killed_s, own_start_s


def _recovering() -> Scenario:
    plain = ring(N, SIZE, STEPS)
    policy = OnFailure(do="recover", save_every_min=SAVED)
    members = {
        name: member.model_copy(update={"on_failure": policy, "twin": "benchmarks.ring_twin:Kept"})
        for name, member in plain.members.items()
    }
    return plain.model_copy(update={"members": members})


def main(repeat: int) -> None:
    spent = [loop.run(recovery()) for _ in range(repeat)]
    seconds, own_start_s = (median(each) for each in zip(*spent, strict=True))
    size = {"mode": "grpc", "n": N, "m": SIZE, "saved_every": SAVED}
    print(json.dumps({**size, "seconds": rounded(seconds), "own_start_s": rounded(own_start_s)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
