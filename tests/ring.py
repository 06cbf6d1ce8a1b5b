"""Three cities in a ring, each looking at the next over a bad line: `python -m tests.ring`.

Every line has faults of its own, one after the other and independent of the others: silence both
ways, silence one way, resets, a flapping line, two seconds of latency with a fifth of the packets
lost. Which, when and for how long follows from the seed. At the end all lines are healed, and what
each city has of what it looks at is held against that one's own record, by event time and value.
One JSON line: `writes` are the events that had to arrive, `held` the instants at which a city went
by marked values, `late` those of them whose values came afterwards, `reconverge_s` how long after
the end of a fault there was a good value again. The exit code is 1 when anything was lost, doubled
or wrong, or memory grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import psutil

from federation import loop
from tests.links import PARTITION, BadLink, Fault, one_way
from tests.links_cities import (
    City,
    Neighbours,
    all_good,
    comparisons,
    neighbours,
    one_story,
    pace_of,
    quantile,
    until,
)

CITIES = ("ash", "birch", "cedar")
STEP_S = 1.0
"""Of wall time, for five minutes of the run."""

MOST_GROWTH = 0.05
WARM_UP = 0.3
"""The share of the time in which caches fill and the allocator finds its size."""

BAD = (Fault(delay_s=0.9, jitter_s=0.2), Fault(loss=0.2))
"""Two seconds there and back, and a fifth of the packets lost."""


@dataclass
class Log:
    """What happened in a soak."""

    faults: dict[str, int] = field(default_factory=dict)
    reconverge_s: list[float] = field(default_factory=list)
    memory_mib: list[tuple[float, float]] = field(default_factory=list)
    """When, in seconds since the beginning, and how much."""

    @property
    def partitions(self) -> int:
        return sum(self.faults.values())

    def growth(self, within_s: float) -> float:
        """Of memory, from the end of the warm-up to the end, as a share; by medians of quarters."""
        warm = [mib for at_s, mib in self.memory_mib if at_s >= WARM_UP * within_s]
        quarter = max(1, len(warm) // 4)
        return median(warm[-quarter:]) / median(warm[:quarter]) - 1.0


async def trouble(
    link: BadLink, reader: City, owner: str, draw: random.Random, log: Log, until_s: float
) -> None:
    """Let faults come and go on one line until a time on the monotonic clock."""

    async def partition(seconds: float) -> None:
        with link.having(PARTITION):
            await asyncio.sleep(seconds)

    async def cut(seconds: float) -> None:
        link.reset()
        await partition(seconds)
        link.reset()

    async def one_sided(seconds: float) -> None:
        with link.having(one_way("there" if draw.random() < 0.5 else "back")):
            await asyncio.sleep(seconds)

    async def flap(seconds: float) -> None:
        await link.flap(max(1, round(seconds / 1.0)), 0.5, 0.5)

    async def storm(seconds: float) -> None:
        await link.storm(max(1, round(seconds / 0.25)), 0.25)

    async def bad(seconds: float) -> None:
        with link.having(*BAD):
            await asyncio.sleep(seconds)

    kinds = (partition, cut, one_sided, flap, storm, bad)
    await asyncio.sleep(draw.uniform(0.0, 3.0))
    while time.monotonic() < until_s:
        kind = draw.choice(kinds)
        seconds = min(1.0 + draw.expovariate(1 / 6.0), 40.0)
        if draw.random() < 0.04:  # longer than a stream is taken up again for
            seconds = draw.uniform(58.0, 70.0)
        await kind(min(seconds, max(until_s - time.monotonic(), 1.0)))
        log.faults[kind.__name__] = log.faults.get(kind.__name__, 0) + 1
        healed_s, after_ns = time.monotonic(), reader.settled_ns
        await until(partial(reader.is_good, owner, after_ns), 300.0)
        log.reconverge_s.append(time.monotonic() - healed_s)
        await asyncio.sleep(draw.uniform(1.0, 6.0))


async def weigh(log: Log, every_s: float) -> None:
    """Note the memory of this process, in which all is, again and again."""
    began_s, me = time.monotonic(), psutil.Process()
    while True:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        log.memory_mib.append((time.monotonic() - began_s, me.memory_info().rss / 2**20))
        await asyncio.sleep(every_s)


async def soak(minutes: float, seed: int, step_s: float = STEP_S) -> dict[str, object]:
    """The figures of a soak."""
    pairs = list(zip(CITIES, (*CITIES[1:], CITIES[0]), strict=True))
    log = Log()
    with tempfile.TemporaryDirectory(prefix="ring-") as name:
        folder = Path(name)
        async with neighbours(folder, pairs, pace_of(step_s), seed, folder) as found:
            await all_good(found)
            weighing = asyncio.create_task(weigh(log, max(minutes, 0.5)))
            began_s = time.monotonic()
            until_s = began_s + 60 * minutes
            async with asyncio.TaskGroup() as group:
                for (one, other), link in found.links.items():
                    draw = random.Random(f"{seed}/{one}")
                    reader = found.cities[one]
                    group.create_task(trouble(link, reader, other, draw, log, until_s))
            weighing.cancel()
            for link in found.links.values():
                link.heal()
            await all_good(found, 120.0)
            return figures(found, log, time.monotonic() - began_s)


def figures(found: Neighbours, log: Log, took_s: float) -> dict[str, object]:
    compared = [comparison for _, comparison in comparisons(found)]
    stories = "one"
    try:
        one_story(found)
    except AssertionError as error:
        stories = str(error)
    for comparison in compared:
        for what in ("lost", "doubled", "wrong", "unknown"):
            if told := getattr(comparison, what):
                print(f"{what}: {told[:8]}", file=sys.stderr)
    return {
        "minutes": round(took_s / 60, 2),
        "partitions": log.partitions,
        "of_kind": dict(sorted(log.faults.items())),
        "writes": sum(c.writes for c in compared),
        "lost": sum(len(c.lost) for c in compared),
        "doubled": sum(len(c.doubled) for c in compared),
        "wrong": sum(len(c.wrong) for c in compared),
        "values": sum(c.compared for c in compared),
        "unknown": sum(len(c.unknown) for c in compared),
        "held": sum(c.held for c in compared),
        "outages": sum(len(city.outages()) for city in found.cities.values()),
        "stories": stories,
        "reconverge_s": {
            "median": round(median(log.reconverge_s), 2),
            "p99": round(quantile(log.reconverge_s, 0.99), 2),
        },
        "memory_mib": round(log.memory_mib[-1][1], 1),
        "memory_growth": round(log.growth(took_s), 4),
    }


def is_good(told: dict[str, object]) -> bool:
    return (
        told["lost"] == told["doubled"] == told["wrong"] == told["unknown"] == 0
        and told["stories"] == "one"
        and bool(told["writes"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="(10)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (1)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    told = loop.run(soak(options.minutes, options.seed))
    print(json.dumps(told), flush=True)
    growth = told["memory_growth"]
    assert isinstance(growth, float)
    return int(not is_good(told) or (options.minutes >= 5 and growth > MOST_GROWTH))


if __name__ == "__main__":
    sys.exit(main())
