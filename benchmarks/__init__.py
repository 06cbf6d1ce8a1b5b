"""What the federation costs, beside its peers on the same work in the same run.

The work is a ring of N twins. Twin i reads the vector of M numbers that its neighbour published
one step before, adds one, and publishes that. So what is read at step k is k, and every
contender checks it: a value that is lost or late ends the run. A contender is a module that
answers `python -m MODULE MODE N M T` with the wall seconds of T steps as the last word that it
prints, after a warm-up, and before that, when it knows them, with the processor seconds of all
its processes during these steps and the memory that they hold (`cpu_s=1.5 rss_mib=80 1.3`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

WARM_STEPS = 20
"""Steps before those that are timed, in which caches fill."""


def check(value: float, step: int) -> None:
    """What was read at a step is the number of steps before it."""
    if value != step:
        raise RuntimeError(f"read {value:g} at step {step}")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a stretch of work took; processor time and memory are those of all its processes."""

    seconds: float
    cpu_s: float
    rss_mib: float

    def less(self, other: Cost) -> Cost:
        """What of this is not the other's; memory stays."""
        return Cost(self.seconds - other.seconds, self.cpu_s - other.cpu_s, self.rss_mib)


class Meter:
    """Begins to measure when it is made: this process and all that come from it.

    Memory is the sum of their resident sets at the end, so pages that they share count once for
    each. A process that starts or ends in between spoils the processor time: start them before.
    """

    def __init__(self) -> None:
        self._began_cpu_s, _ = _used()
        self._began_s = time.perf_counter()

    def cost(self, seconds: float | None = None) -> Cost:
        """The cost since the start; `seconds` when the work has measured its own time."""
        if seconds is None:
            seconds = time.perf_counter() - self._began_s
        cpu_s, rss_mib = _used()
        return Cost(seconds, cpu_s - self._began_cpu_s, rss_mib)


def _used() -> tuple[float, float]:
    me = psutil.Process()
    cpu_s = rss_mib = 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            rss_mib += process.memory_info().rss / (1 << 20)
    return cpu_s, rss_mib


def print_seconds(modes: Mapping[str, Callable[..., float | Cost]]) -> None:
    """Do what the command line asks for (a mode and whole numbers) and print what it took."""
    mode, *size = sys.argv[1:]
    if mode not in modes:
        raise SystemExit(f"there is no mode {mode!r}; there are {', '.join(modes)}")
    took = modes[mode](*map(int, size))
    if isinstance(took, Cost):
        print(f"cpu_s={took.cpu_s:.6g} rss_mib={took.rss_mib:.6g}", took.seconds)
    else:
        print(took)
