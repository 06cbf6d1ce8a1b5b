"""What the federation costs, beside its peers on the same work in the same run.

The work is a ring of N twins. Twin i reads the vector of M numbers that its neighbour published
one step before, adds one, and publishes that. So what is read at step k is k, and every
contender checks it: a value that is lost or late ends the run. A contender is a module that
answers `python -m MODULE MODE N M T` with the seconds of wall time for T steps, in one process
(`local`) or with a process for each twin (`grpc`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

WARM_STEPS = 20
"""Steps of the run before the one that is timed, in which caches fill."""


def check(value: float, step: int) -> None:
    """What was read at a step is the number of steps before it."""
    if value != step:
        raise RuntimeError(f"read {value:g} at step {step}")


def print_seconds(modes: Mapping[str, Callable[[int, int, int], float]]) -> None:
    """Do what the command line asks for; the last line on standard output is the answer."""
    mode, *size = sys.argv[1:]
    n, m, t = map(int, size)
    print(modes[mode](n, m, t))
