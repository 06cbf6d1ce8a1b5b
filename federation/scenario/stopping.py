"""When a study has seen enough: a rule that does not depend on which run ends first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from federation.errors import Reason, ScenarioError
from federation.scenario.spec import Stop


@dataclass
class Spread:
    """Mean and variance of values that come one by one (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)

    def half_width(self) -> float:
        """Of the 95 % interval of the mean by Student's t; infinite below two values."""
        if self.count < 2:
            return math.inf
        deviation = math.sqrt(self._squares / (self.count - 1))
        return float(stdtrit(self.count - 1, 0.975)) * deviation / math.sqrt(self.count)


class Stopping:
    """Hears the runs in any order and judges them in theirs."""

    def __init__(self, stop: Stop | None, measures: Sequence[str], most: int) -> None:
        self.runs = most
        """How many runs of each measure belong to the study, as far as is known by now."""
        self.is_over = False
        self._stop = stop
        self._measures = tuple(measures)
        self._waiting: dict[int, dict[str, float | None]] = {}
        self._next = 0
        self._spreads = {measure: Spread() for measure in measures}

    def hear(self, run: int, measure: str, kpis: Mapping[str, float] | None) -> None:
        """One run has ended with these figures, or failed (None)."""
        self._waiting.setdefault(run, {})[measure] = None if kpis is None else self._value(kpis)
        while not self.is_over and len(self._waiting.get(self._next, ())) == len(self._measures):
            for name, value in self._waiting.pop(self._next).items():
                if value is not None:
                    self._spreads[name].add(value)
            self._next += 1
            if self._next == self.runs or self._is_narrow():
                self.runs, self.is_over = self._next, True

    def _value(self, kpis: Mapping[str, float]) -> float | None:
        if self._stop is None or self._stop.kpi is None:
            return None
        name = self._stop.kpi.rpartition(".")[2]
        if name not in kpis:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"stop: {self._stop.kpi} is no KPI of this study; it has {', '.join(kpis)}",
                {"variable": self._stop.kpi},
            )
        return kpis[name]

    def _is_narrow(self) -> bool:
        stop = self._stop
        if stop is None or stop.kpi is None:
            return False
        return all(
            spread.count >= stop.least_runs
            and spread.half_width()
            <= (stop.half_width or 0.0) + (stop.relative or 0.0) * abs(spread.mean)
            for spread in self._spreads.values()
        )
