"""Twins whose figures are known functions of their parameters, to hold studies to."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from federation.errors import Reason, TwinError
from federation.twin import (
    HOUR_NS,
    SYSTEM,
    Causality,
    Description,
    Parameter,
    Step,
    TimePolicy,
    Twin,
    Variable,
)


class Figure(Twin):
    """Says one number at the start, and then nothing more."""

    names: tuple[str, ...] = ("x",)

    def describe(self) -> Description:
        return Description(
            model="figure",
            version="1",
            domain="test",
            entities=(),
            variables=(Variable("y", SYSTEM, "1", Causality.OUTPUT),),
            time=TimePolicy(period_ns=HOUR_NS),
            parameters=tuple(Parameter(name, "1", 0.0, -1e9, 1e9) for name in self.names),
            kpis=("y",),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.seed = seed
        self.parameters = parameters

    def advance(self, step: Step) -> None:
        step.publish("y", self.value(*(self.parameters[name] for name in self.names)))

    def value(self, *x: float) -> float:
        return sum(x)


class Ishigami(Figure):
    """sin a + 7 sin^2 b + 0.1 c^4 sin a (Ishigami and Homma 1990)."""

    names = ("a", "b", "c")

    def value(self, *x: float) -> float:
        a, b, c = x
        return math.sin(a) + 7 * math.sin(b) ** 2 + 0.1 * c**4 * math.sin(a)


class Plane(Figure):
    """The distance along the diagonal of two standard normal inputs: itself standard normal."""

    names = ("a", "b")

    def value(self, *x: float) -> float:
        return sum(x) / math.sqrt(2)


class Noisy(Figure):
    """x plus a standard normal draw of its own."""

    def value(self, *x: float) -> float:
        return x[0] + float(np.random.default_rng(self.seed).standard_normal())


class Fragile(Figure):
    """Fails where x is above 0.9."""

    def value(self, *x: float) -> float:
        if x[0] > 0.9:
            raise TwinError(Reason.TWIN_FAILED, "x is too much")
        return x[0]


class Slow(Figure):
    """Takes its time, so that somebody may interrupt it."""

    def __init__(self, pause_s: float = 0.02) -> None:
        self.pause_s = pause_s

    def value(self, *x: float) -> float:
        time.sleep(self.pause_s)
        return x[0]


class Deadly(Figure):
    """Kills its process the first time that x is above 0.5; `mark` remembers that it has."""

    def __init__(self, mark: str) -> None:
        self.mark = Path(mark)

    def value(self, *x: float) -> float:
        if x[0] > 0.5 and not self.mark.exists():
            self.mark.write_text("done", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        return x[0]
