"""The ring over gRPC with its run log in a file, in memory alone, or without one.

`file` is what the command does. `memory` differs from it only in what makes the log durable, and
in `off` nothing of the ledger is stored at all.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

from benchmarks import WARM_STEPS, Cost, Meter, print_seconds
from benchmarks.ring import CASE, ring
from federation.broker.fleet import fleet, run_cases
from federation.broker.store import Store


def sockets(log: str, n: int, m: int, t: int) -> Cost:
    with patch.object(Store, "append", return_value=0) if log == "off" else nullcontext():
        return asyncio.run(_sockets(log, n, m, t))


async def _sockets(log: str, n: int, m: int, t: int) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "broker.sqlite" if log == "file" else ":memory:"
        async with fleet(ring(n, m, t), store, Path(folder)) as crew:
            await run_cases(crew, ring(n, m, WARM_STEPS), [CASE], None)
            meter = Meter()
            (outcome,) = await run_cases(crew, ring(n, m, t), [CASE], None)
            if outcome.error:
                raise RuntimeError(outcome.error)
            return meter.cost(outcome.wall_s)


if __name__ == "__main__":
    print_seconds({log: partial(sockets, log) for log in ("file", "memory", "off")})
