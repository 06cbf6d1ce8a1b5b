"""The ring in mosaik 3: simulators in its process or in processes of their own.

`lazy_stepping=False` lets a simulator step as soon as its inputs are there, which mosaik's
documentation names as the way to be faster, and a vector is one attribute. Remote simulators
wait for mosaik to connect (its `connect` starter, which is quicker to start than `cmd` and the
same afterwards); their vectors travel as JSON lists.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from contextlib import ExitStack
from typing import Any

import mosaik
import mosaik_api_v3
import numpy as np
from mosaik_api_v3.connection import Channel
from mosaik_api_v3.types import InputData, Meta, OutputData, OutputRequest

from benchmarks import WARM_STEPS, Cost, Meter, check, print_seconds

META: Meta = {
    "api_version": "3.0",
    "type": "time-based",
    "models": {"Ring": {"public": True, "params": [], "attrs": ["before", "after"]}},
}


class RingSimulator(mosaik_api_v3.Simulator):
    """One place in the ring; it steps at every instant."""

    def __init__(self) -> None:
        super().__init__(META)  # type: ignore[no-untyped-call]
        self.value: Any = None

    def create(self, num: int, model: str, **params: Any) -> list[Any]:
        return [{"eid": "e", "type": model}]

    def step(self, time: int, inputs: InputData, max_advance: int) -> int:
        (value,) = inputs["e"]["before"].values()
        check(value[0], time)
        self.value = value + 1.0
        return time + 1

    def get_data(self, outputs: OutputRequest) -> OutputData:
        return {"e": {"after": self.value}}


class RemoteSimulator(RingSimulator):
    """The same behind a socket, where a vector must be a list."""

    def step(self, time: int, inputs: InputData, max_advance: int) -> int:
        (value,) = inputs["e"]["before"].values()
        check(value[0], time)
        self.value = (np.asarray(value) + 1.0).tolist()
        return time + 1


def local(n: int, m: int, t: int) -> Cost:
    config: mosaik.SimConfig = {"Ring": {"python": "benchmarks.ring_mosaik:RingSimulator"}}
    _run(config, ["Ring"] * n, np.zeros(m), WARM_STEPS)
    return _run(config, ["Ring"] * n, np.zeros(m), t)


def remote(n: int, m: int, t: int) -> Cost:
    context = multiprocessing.get_context("fork")
    config: mosaik.SimConfig = {}
    with ExitStack() as stack:
        for index in range(n):
            with socket.create_server(("127.0.0.1", 0)) as server:
                process = context.Process(target=_serve, args=(server,), daemon=True)
                process.start()
                stack.callback(process.kill)
                config[f"Ring{index}"] = {"connect": f"127.0.0.1:{server.getsockname()[1]}"}
        return _run(config, list(config), [0.0] * m, t)


def _serve(server: socket.socket) -> None:
    asyncio.run(_serve_mosaik(server))


async def _serve_mosaik(server: socket.socket) -> None:
    """As `mosaik_api_v3.run_as_server` does it, but on a socket that listens already."""
    server.setblocking(False)
    connected, _ = await asyncio.get_running_loop().sock_accept(server)
    channel = Channel(*await asyncio.open_connection(sock=connected))
    try:
        await mosaik_api_v3.run_simulator(channel, RemoteSimulator(), api_compliant=True)
    finally:
        await channel.close()  # type: ignore[no-untyped-call]


def _run(config: mosaik.SimConfig, names: list[str], start: Any, t: int) -> Cost:
    """The cost of `World.run` alone; starting and connecting are left out."""
    with mosaik.World(config, skip_greetings=True, configure_logging=False, cache=False) as world:
        places = [world.start(name).Ring() for name in names]
        for place, after in zip(places, [*places[1:], places[0]], strict=True):
            world.connect(
                place,
                after,
                ("after", "before"),
                time_shifted=True,
                initial_data={"after": start},
            )
        meter = Meter()
        world.run(until=t, print_progress=False, lazy_stepping=False)
        return meter.cost()


if __name__ == "__main__":
    print_seconds({"local": local, "remote": remote})
