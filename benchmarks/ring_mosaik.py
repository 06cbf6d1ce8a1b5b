"""The ring in mosaik 3: simulators in one process, the way its documentation calls fastest."""

from __future__ import annotations

import time
from typing import Any

import mosaik
import mosaik_api_v3
import numpy as np
from mosaik_api_v3.types import InputData, Meta, OutputData, OutputRequest

from benchmarks import WARM_STEPS, check, print_seconds
from federation.twin import Vector

META: Meta = {
    "api_version": "3.0",
    "type": "time-based",
    "models": {"Ring": {"public": True, "params": [], "attrs": ["before", "after"]}},
}


class RingSimulator(mosaik_api_v3.Simulator):
    """One place in the ring; it steps at every instant."""

    def __init__(self) -> None:
        super().__init__(META)  # type: ignore[no-untyped-call]
        self.value: Vector = np.zeros(0)

    def create(self, num: int, model: str, **params: Any) -> list[Any]:
        return [{"eid": "e", "type": model}]

    def step(self, time: int, inputs: InputData, max_advance: int) -> int:
        (value,) = inputs["e"]["before"].values()
        check(value[0], time)
        self.value = value + 1.0
        return time + 1

    def get_data(self, outputs: OutputRequest) -> OutputData:
        return {"e": {"after": self.value}}


def local(n: int, m: int, t: int) -> float:
    _run(n, m, WARM_STEPS)
    return _run(n, m, t)


def _run(n: int, m: int, t: int) -> float:
    """The wall time of `World.run` alone; starting and connecting are left out."""
    simulators: mosaik.SimConfig = {"Ring": {"python": "benchmarks.ring_mosaik:RingSimulator"}}
    with mosaik.World(simulators, skip_greetings=True, configure_logging=False) as world:
        places = [world.start("Ring").Ring() for _ in range(n)]
        for i, place in enumerate(places):
            world.connect(
                place,
                places[(i + 1) % n],
                ("after", "before"),
                time_shifted=True,
                initial_data={"after": np.zeros(m)},
            )
        started_s = time.perf_counter()
        world.run(until=t, print_progress=False, lazy_stepping=False)
        return time.perf_counter() - started_s


if __name__ == "__main__":
    print_seconds({"local": local})
