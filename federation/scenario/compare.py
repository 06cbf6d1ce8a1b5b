"""Whether two measures, or two studies, differ: run by run where their chances are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from federation.errors import Reason, ScenarioError
from federation.scenario.archive import Study
from federation.scenario.study import interval


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a study under one of its measures."""

    study: Study
    measure: str

    @property
    def name(self) -> str:
        return f"{self.study.folder}:{self.measure}"


def sides(a: str, b: str | None) -> list[tuple[Side, Side]]:
    """Who is compared, from `DIR` or `DIR:MEASURE`.

    Two folders are compared under each measure that both have; a folder alone has each of its
    measures compared with its first.
    """
    (first, one), (second, other) = _side(a), _side(b or a)
    if b is None:
        base = first.measures[0]
        return [(Side(first, base), Side(first, m)) for m in first.measures[1:]]
    if one is not None or other is not None:
        return [(Side(first, one or str(other)), Side(second, other or str(one)))]
    shared = [m for m in first.measures if m in second.measures]
    return [(Side(first, m), Side(second, m)) for m in shared]


def _side(text: str) -> tuple[Study, str | None]:
    if Path(text).is_dir():
        return Study(text), None
    folder, colon, measure = text.rpartition(":")
    study = Study(folder if colon else text)
    return study, study.measure(measure)


def compare(a: Side, b: Side) -> dict[str, Any]:
    """The difference b - a of every KPI that both have, with its 95 % interval.

    `paired` where runs of one number have one seed and the same draws: then the interval is
    Student's over the differences of common runs. `welch` otherwise: Welch (1947), for two
    samples that have nothing to do with each other. Fails with TOO_FEW_RUNS below two runs.
    """
    left, right = a.study.good(a.measure), b.study.good(b.measure)
    common = _common(a, b, left, right)
    is_paired = len(common) >= 2
    pairs = [side.loc[common] for side in (left, right)]
    if not is_paired and min(len(left), len(right)) < 2:
        raise ScenarioError(
            Reason.TOO_FEW_RUNS,
            f"{a.name} has {len(left)} good runs and {b.name} has {len(right)}; two or more of "
            "each can be compared",
        )
    kpis = [k for k in a.study.kpis if k in b.study.kpis]
    return {
        "a": a.name,
        "b": b.name,
        "method": "paired" if is_paired else "welch",
        "runs": len(common) if is_paired else [len(left), len(right)],
        "kpis": {
            kpi: _paired(*(side[f"kpi.{kpi}"] for side in pairs))
            if is_paired
            else _welch(left[f"kpi.{kpi}"], right[f"kpi.{kpi}"])
            for kpi in kpis
        },
    }


def _common(a: Side, b: Side, left: pd.DataFrame, right: pd.DataFrame) -> list[int]:
    """The runs that have the same chances on both sides."""
    runs = left.index.intersection(right.index)
    set_by_measure = {
        name
        for side in (a, b)
        if side.measure in side.study.scenario.measures
        for name in side.study.scenario.measures[side.measure].parameters
    }
    drawn = {*a.study.scenario.uncertainty, *b.study.scenario.uncertainty} - set_by_measure
    same = left.loc[runs, "seed"] == right.loc[runs, "seed"]
    for name in sorted(drawn):
        column = f"parameter.{name}"
        if (column in left) != (column in right):
            return []
        if column in left:
            same &= left.loc[runs, column] == right.loc[runs, column]
    return [int(run) for run in runs[same.to_numpy()]]


def _paired(left: pd.Series[float], right: pd.Series[float]) -> dict[str, Any]:
    difference = np.asarray(right - left, dtype=np.float64)
    found = interval(difference)
    return _told(left, right, found["mean"], found["ci95"])


def _welch(left: pd.Series[float], right: pd.Series[float]) -> dict[str, Any]:
    difference = float(right.mean() - left.mean())
    parts = [float(side.var(ddof=1)) / len(side) for side in (left, right)]
    total = sum(parts)
    half = 0.0
    if total > 0:
        freedom = total**2 / sum(
            p**2 / (len(side) - 1) for p, side in zip(parts, (left, right), strict=True)
        )
        half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
    return _told(left, right, difference, [difference - half, difference + half])


def _told(
    left: pd.Series[float], right: pd.Series[float], mean: float, ci95: list[float]
) -> dict[str, Any]:
    low, high = ci95
    return {
        "a": float(np.mean(left)),
        "b": float(np.mean(right)),
        "difference": mean,
        "ci95": ci95,
        "excludes_0": low > 0 or high < 0,
    }
