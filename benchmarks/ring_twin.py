"""The twins of the ring, apart from what runs them: their processes import what a twin needs."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from functools import lru_cache

from benchmarks import check
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


@lru_cache(maxsize=8)
def _cells(size: int) -> tuple[Entity, ...]:
    return tuple(Entity(f"e{i}", "cell") for i in range(size))


class RingTwin(Twin):
    """One place in the ring; a step is a minute."""

    def __init__(self, size: int) -> None:
        self.size = size

    def describe(self) -> Description:
        return Description(
            model="ring",
            version="1",
            domain="benchmark",
            entities=_cells(self.size),
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


MARK = "granted at "


class FirstGrant(RingTwin):
    """Tells on standard output when its first step began, in Unix time."""

    def advance(self, step: Step) -> None:
        if step.time_ns == 0:
            print(f"{MARK}{time.time():.6f}", flush=True)
        super().advance(step)


class Kept(RingTwin):
    """Remembers the sum of what it has read, and fails when it has forgotten any of it."""

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.read, self.steps = 0.0, 0

    def advance(self, step: Step) -> None:
        super().advance(step)
        self.read, self.steps = self.read + step["before"][0], self.steps + 1
        if self.read != self.steps * (self.steps - 1) / 2:
            raise RuntimeError(f"forgot some of {self.steps} steps")

    def snapshot(self) -> bytes:
        return struct.pack("<dq", self.read, self.steps)

    def restore(self, snapshot: bytes) -> None:
        self.read, self.steps = struct.unpack("<dq", snapshot)


PACE_S = 0.05


class PacedTwin(RingTwin):
    """Takes `PACE_S` for a step."""

    def advance(self, step: Step) -> None:
        time.sleep(PACE_S)
        super().advance(step)
