"""A city's broker in a process of its own, that is killed at a point of its writing:
`python -m tests.aidserver FOLDER CITY before|after N`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from federation.broker.server import BrokerOptions, BrokerServer
from federation.core.aid import Record
from federation.peer import aid
from tests.aidcities import options_of, write_city


class Doomed(aid.AidDesk):
    """Dies, without a word, right before or right after its n-th record is on disk."""

    when = ""
    count = 0

    def _write(self, record: Record) -> None:
        Doomed.count -= 1
        if Doomed.count == 0 and Doomed.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        super()._write(record)
        if Doomed.count == 0 and Doomed.when == "after":
            os.kill(os.getpid(), signal.SIGKILL)


async def serve(folder: Path, city: str) -> None:
    files = write_city(folder, city)
    options = BrokerOptions(
        city=city,
        export=files.policy,
        city_scenario=files.scenario,
        aid=options_of(folder, city),
    )
    async with BrokerServer(options) as broker:
        print(broker.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    _, folder, city, Doomed.when, number = sys.argv
    Doomed.count = int(number)
    aid.AidDesk = Doomed  # type: ignore[misc]
    asyncio.run(serve(Path(folder), city))
