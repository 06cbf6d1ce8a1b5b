"""The parts of the benchmarks besides the plain ring; each answers JSON lines with its `case`.

startup   `seconds` from the start of the processes until every twin has its first grant, which
          includes Python's imports: in one process, and over gRPC with a process for each twin
scaling   `us_per_twin_step` as N grows, in one process (`growth` is that of N over that of 16),
          and over gRPC with the twins in `hosts` processes; 64 in 4 hosts beside HELICS
runlog    the ring over gRPC under a broker that stores everything: `ratios` of its speed to that
          with the log `off`
recovery  `seconds` that a run over gRPC stands when a member is killed between two snapshots, of
          which the member's `own_start_s`
store     `what` is `append` (ledger entries a second) or `watch` (p50 and p99 from a value being
          in the store until 1, 10, 100 subscribers have read it)
history   time of a query of one variable's history in a run of 10,000,000 values
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from statistics import median

from benchmarks.turns import (
    CONTENDERS,
    OWN,
    Contender,
    Row,
    Runner,
    measure,
    ratios,
    rounded,
    run,
    take_turns,
)

SIZE = 10
"""Numbers in a vector of all rings here."""

HOSTS = 4

FEWER = 3
"""The most turns where whole processes are started for every one."""


def startup(repeat: int) -> Iterator[Row]:
    for mode, sizes in (("local", (4, 64)), ("grpc", (4, 16))):
        for n in sizes:
            turns = range(min(repeat, FEWER))
            spent = [measure("benchmarks.startup", mode, n).seconds for _ in turns]
            yield {"mode": mode, "n": n, "seconds": rounded(median(spent))}


def scaling(repeat: int) -> Iterator[Row]:
    yield from _one_process(min(repeat, FEWER))
    yield from _few_processes(min(repeat, FEWER))


def _one_process(repeat: int) -> Iterator[Row]:
    sizes = (4, 16, 64, 256, 1_000)
    own = CONTENDERS["local"][OWN]
    runners = {str(n): Runner(own, n, SIZE) for n in sizes}
    take_turns(runners, repeat, "scaling local", required=runners)
    costs_us = {n: _us_per_step(runners[str(n)], n) for n in sizes}
    for n in sizes:
        yield {
            "mode": "local",
            "n": n,
            "m": SIZE,
            "t": runners[str(n)].t,
            "us_per_twin_step": rounded(costs_us[n]),
            "growth": rounded(costs_us[n] / costs_us[16]),
        }


def _few_processes(repeat: int) -> Iterator[Row]:
    own = Contender("benchmarks.ring", "hosts", 40e-6, 0.1e-6)
    for n in (4, 16, 64, 256, 1_000):
        runners = {OWN: Runner(own, n, SIZE, HOSTS)}
        if n == 64:
            peers = ("helics-zmq", "helics-zmq-vector")
            here = {name: CONTENDERS["grpc"][name] for name in peers}
            runners |= {name: Runner(c, n, SIZE) for name, c in here.items() if c.is_here}
        take_turns(runners, repeat, f"scaling {n} in {HOSTS} hosts")
        yield {
            "mode": "grpc",
            "hosts": HOSTS,
            "n": n,
            "m": SIZE,
            "t": runners[OWN].t,
            "us_per_twin_step": rounded(_us_per_step(runners[OWN], n)),
            "steps_per_s": rounded(median(runners[OWN].rounds_per_s)),
            "ratios": ratios(runners),
        }


def _us_per_step(runner: Runner, n: int) -> float:
    return median(cost.seconds for cost in runner.costs) / n * 1e6


def runlog(repeat: int) -> Iterator[Row]:
    for n in (4, 16):
        runners = {
            name: Runner(Contender("benchmarks.ring", mode, 300e-6, 0.0), n, SIZE)
            for name, mode in ((OWN, "logged"), ("off", "grpc"))
        }
        take_turns(runners, min(repeat, FEWER), f"run log {n}x{SIZE}", required=runners)
        speed = rounded(median(runners[OWN].rounds_per_s))
        size = {"mode": "grpc", "n": n, "m": SIZE, "t": runners[OWN].t}
        yield {**size, "steps_per_s": speed, "ratios": ratios(runners)}


def recovery(repeat: int) -> Iterator[Row]:
    yield from map(json.loads, run("benchmarks.recovery", min(repeat, FEWER)).splitlines())


def store(repeat: int) -> Iterator[Row]:
    yield from _lines("append", repeat)
    yield from _lines("watch", 1)


def history(repeat: int) -> Iterator[Row]:
    yield from _lines("history", repeat)


def _lines(what: str, repeat: int) -> Iterator[Row]:
    return map(json.loads, run("benchmarks.store", what, repeat).splitlines())


PARTS: Mapping[str, Callable[[int], Iterator[Row]]] = {
    "startup": startup,
    "scaling": scaling,
    "runlog": runlog,
    "recovery": recovery,
    "store": store,
    "history": history,
}
