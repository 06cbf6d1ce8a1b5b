"""What of a run goes into the tables of a study: little enough to keep of many thousands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from federation.errors import FederationError, Reason
from federation.scenario.explain import Causes
from federation.scenario.run import Case, Outcome
from federation.twin import HOUR_NS

PASSING = frozenset(
    {Reason.MEMBER_LOST, Reason.MEMBER_LATE, Reason.UNREACHABLE, Reason.TOO_MANY_SESSIONS}
)
"""Why a run may fail that would succeed at another time; a resumed study tries it again."""

MOST_PATHS = 200
"""Of a run's paths so many are counted, the most frequent ones."""

Path = tuple[str, ...]
"""Kinds of events from cause to consequence, each as `domain/kind`."""


@dataclass(frozen=True)
class Finding:
    """A run as the tables have it, and the whole of it where that is kept."""

    case: Case
    row: Mapping[str, float | int | str]
    """The columns of `runs`."""
    series: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Every scalar at the full hours."""
    links: Mapping[Path, int] = field(default_factory=dict)
    """How often an event of one kind caused one of another."""
    paths: Mapping[Path, int] = field(default_factory=dict)
    """How many last consequences each path led to."""
    failure: FederationError | None = None
    whole: Outcome | None = None


def finding(outcome: Outcome, horizon_ns: int, *, keep: bool = False) -> Finding:
    case = outcome.case
    row: dict[str, float | int | str] = {
        "run": case.run,
        "measure": case.measure,
        "seed": case.seed,
        "digest": outcome.digest,
        "error": outcome.error,
        "reason": outcome.failure.reason.value if outcome.failure else "",
        "wall_s": outcome.wall_s,
        "cpu_s": outcome.cpu_s,
    }
    for member, values in case.parameters.items():
        row |= {f"parameter.{member}.{name}": value for name, value in values.items()}
    row |= {f"kpi.{name}": value for name, value in outcome.kpis.items()}
    for member, cost in outcome.costs.items():
        row[f"cost.{member}.wall_s"] = cost.wall_s
        row[f"cost.{member}.cpu_s"] = cost.cpu_s
    hours_ns = np.arange(horizon_ns // HOUR_NS + 1) * HOUR_NS
    series = {} if outcome.error else outcome.series
    causes = Causes(outcome.events, outcome.domains)
    return Finding(
        case,
        row,
        {name: sampled(points, hours_ns) for name, points in series.items()},
        causes.links(),
        dict(Counter(causes.paths()).most_common(MOST_PATHS)),
        outcome.failure,
        outcome if keep else None,
    )


def sampled(points: list[tuple[int, float]], times_ns: np.ndarray) -> np.ndarray:
    """The last value at or before each time; the first one before it begins."""
    at, values = (np.array(column) for column in zip(*points, strict=True))
    return values[np.clip(np.searchsorted(at, times_ns, side="right") - 1, 0, None)]
