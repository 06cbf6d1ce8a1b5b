"""Lets contenders take turns: each run in processes of its own, for about as long."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import Cost

OWN = "multitwin"

Row = dict[str, Any]
"""A JSON line."""

FEWEST_STEPS = 20
"""So that a bad guess from the run before does not leave a run of nothing but its opening."""

SPAN_S = 1.0
"""About how long the steps of one run should take."""

TIMEOUT_S = 240.0
"""How long one run may take, the start of its processes included."""

MOST_STEPS = 200_000


@dataclass(frozen=True, slots=True)
class Contender:
    """Who runs the ring: a module and its mode.

    `step_s` and `value_s` are about what a twin's step and a number in it take. They only choose
    the first number of steps; from then on it follows from the runs. No run with more than
    `most_values` numbers is tried.
    """

    module: str
    mode: str
    step_s: float
    value_s: float
    package: str = ""
    most_values: int = 1 << 62

    @property
    def is_here(self) -> bool:
        return all(map(importlib.util.find_spec, filter(None, (self.package, self.module))))


SINGLES = 10_000
"""The most publications of a HELICS federate: already with 10,000 they take 10 s to register, and
that grows faster than their number."""

_HELICS = "benchmarks.ring_helics"
_MOSAIK = "benchmarks.ring_mosaik"

CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "local": {
        OWN: Contender("benchmarks.ring", "local", 40e-6, 0.1e-6),
        "helics-inproc": Contender(_HELICS, "inproc", 25e-6, 7e-6, "helics", SINGLES),
        "helics-inproc-vector": Contender(_HELICS, "inproc-vector", 25e-6, 0.03e-6, "helics"),
        "mosaik": Contender(_MOSAIK, "local", 70e-6, 0.02e-6, "mosaik"),
    },
    "grpc": {
        OWN: Contender("benchmarks.ring", "grpc", 300e-6, 0.2e-6),
        "bare-grpc": Contender("benchmarks.ring_bare", "grpc", 120e-6, 0.1e-6),
        "helics-zmq": Contender(_HELICS, "zmq", 130e-6, 6e-6, "helics", SINGLES),
        "helics-zmq-vector": Contender(_HELICS, "zmq-vector", 90e-6, 0.1e-6, "helics"),
        "helics-ipc": Contender(_HELICS, "ipc", 90e-6, 6e-6, "helics", SINGLES),
        "helics-ipc-vector": Contender(_HELICS, "ipc-vector", 70e-6, 0.1e-6, "helics"),
        "mosaik-remote": Contender(_MOSAIK, "remote", 300e-6, 0.6e-6, "mosaik"),
    },
}


class ContenderError(Exception):
    """A contender did not finish; says how."""


def run(module: str, *arguments: object, timeout_s: float = TIMEOUT_S) -> str:
    """What `python -m MODULE ARGUMENTS` prints. All processes that it started are ended."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ContenderError(f"no end within {timeout_s:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = errors.strip().splitlines()
        raise ContenderError(lines[-1] if lines else f"code {process.returncode}")
    return out


def measure(module: str, *arguments: object) -> Cost:
    """One run of a contender; what it does not know of its cost is not a number."""
    *known, seconds = run(module, *arguments).splitlines()[-1].split()
    facts = dict(word.partition("=")[::2] for word in known)
    return Cost(
        float(seconds), float(facts.get("cpu_s", "nan")), float(facts.get("rss_mib", "nan"))
    )


class Runner:
    """Runs one contender on one ring, and learns how many steps last long enough."""

    def __init__(self, contender: Contender, n: int, m: int, *more: object) -> None:
        self._contender = contender
        self._n = n
        self._m = m
        self._more = more
        self._round_s = n * (contender.step_s + m * contender.value_s)
        self.t = 0
        self.costs: list[Cost] = []

    @property
    def rounds_per_s(self) -> list[float]:
        return [1 / cost.seconds for cost in self.costs]

    def turn(self) -> None:
        """One run more that is long enough; its cost is kept as that of a single round."""
        for is_last in (False, True):
            self.t = min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(SPAN_S / self._round_s)))
            contender = self._contender
            size = (self._n, self._m, self.t, *self._more)
            cost = measure(contender.module, contender.mode, *size)
            self._round_s = cost.seconds / self.t
            if cost.seconds > 0.6 * SPAN_S or self.t == MOST_STEPS or is_last:
                break
        self.costs.append(Cost(self._round_s, cost.cpu_s / self.t, cost.rss_mib))


def take_turns(
    runners: dict[str, Runner], repeat: int, where: str, required: Container[str] = (OWN,)
) -> None:
    """Let all run, each time another one first. A peer that fails leaves; ours ends it all."""
    for turn in range(repeat):
        names = list(runners)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                runners[name].turn()
            except ContenderError as failure:
                if name in required:
                    raise ContenderError(f"{where}: {failure}") from None
                say(f"{where}: {name} is left out: {failure}")
                del runners[name]
        speeds = (f"{name} {r.rounds_per_s[-1]:,.0f}" for name, r in runners.items())
        say(f"{where}, turn {turn + 1} of {repeat}, rounds/s: {', '.join(speeds)}")


def ratios(runners: Mapping[str, Runner]) -> dict[str, float]:
    """Our speed over each other's, the median of single turns."""
    own = runners[OWN].costs
    return {
        name: rounded(median(p.seconds / o.seconds for p, o in zip(runner.costs, own, strict=True)))
        for name, runner in runners.items()
        if name != OWN
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
