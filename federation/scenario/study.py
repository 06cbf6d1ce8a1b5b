"""An ensemble of a scenario: which runs it has, and what their figures say together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from federation.errors import Reason, ScenarioError
from federation.scenario.run import Case, Outcome, parameters_of
from federation.scenario.sampling import draws
from federation.scenario.spec import Scenario
from federation.twin import Vector

BASELINE = "none"
"""The measure that the others are compared with, when the scenario has it."""


def cases(scenario: Scenario, measures: Sequence[str], runs: int, seed: int) -> list[Case]:
    """All runs of a study: run by run, each under every measure."""
    return cases_of(scenario, measures, draws(scenario, runs, seed), seed)


def cases_of(
    scenario: Scenario, measures: Sequence[str], samples: Sequence[Mapping[str, float]], seed: int
) -> list[Case]:
    """The runs with these values of the uncertain parameters, each under every measure."""
    for measure in measures:
        if measure not in scenario.measures:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"there is no measure {measure!r}; the scenario has {', '.join(scenario.measures)}",
                {"measure": measure},
            )
    return [
        Case(run, seed, measure, parameters_of(scenario, measure, drawn))
        for run, drawn in enumerate(samples)
        for measure in measures
    ]


Shifted = tuple[str, str, list[Case]]
"""An assumption, the end that it is moved to (`low` or `high`), and the runs done there."""


def shifted(
    scenario: Scenario, measures: Sequence[str], first: int, runs: int, seed: int
) -> Iterator[Shifted]:
    """For every assumption the scenario lists: the `first` of `runs` runs at each of its ends."""
    base = [c for c in cases(scenario, measures, runs, seed) if c.run < first]
    for name, ends in scenario.sensitivity.items():
        member, _, parameter = name.partition(".")
        for end, value in zip(("low", "high"), ends, strict=True):
            moved = []
            for case in base:
                values = {m: dict(p) for m, p in case.parameters.items()}
                values.setdefault(member, {})[parameter] = value
                moved.append(replace(case, parameters=values))
            yield name, end, moved


def effects(
    scenario: Scenario,
    moved: Sequence[Shifted],
    outcomes: Sequence[Outcome],
    kpis: Mapping[tuple[int, str], Mapping[str, float]],
    measure: str,
) -> dict[str, Any]:
    """How the effect of `measure` on each KPI moves with each assumption.

    An effect is the mean difference from the baseline over the runs that were shifted; `base`
    is that of the same runs as they are, taken from `kpis` by run and measure.
    """
    runs = sorted({case.run for _, _, cases_ in moved for case in cases_})
    usual = _effect({key: kpis[key] for key in kpis if key[0] in runs}, measure)
    ahead = iter(outcomes)
    assumptions: dict[str, Any] = {}
    for name, end, cases_ in moved:
        done = [next(ahead) for _ in cases_]
        found = _effect(
            {(o.case.run, o.case.measure): o.kpis for o in done if not o.error}, measure
        )
        entry = assumptions.setdefault(
            name,
            {
                **dict(zip(("low", "high"), scenario.sensitivity[name], strict=True)),
                "kpis": {kpi: {"base": value} for kpi, value in usual.items()},
            },
        )
        for kpi, value in found.items():
            entry["kpis"][kpi][end] = value
    return {"measure": measure, "runs": len(runs), "assumptions": assumptions}


def _effect(kpis: Mapping[tuple[int, str], Mapping[str, float]], measure: str) -> dict[str, float]:
    pairs = [
        (mine, kpis[run, BASELINE])
        for (run, m), mine in kpis.items()
        if m == measure and (run, BASELINE) in kpis
    ]
    if not pairs:
        return {}
    return {k: float(np.mean([mine[k] - base[k] for mine, base in pairs])) for k in pairs[0][0]}


def interval(values: Vector) -> dict[str, Any]:
    """Mean and 95 % confidence interval by Student's t; a single value has no interval."""
    mean = float(np.mean(values))
    if values.size < 2:
        return {"mean": mean, "ci95": [mean, mean]}
    spread = float(np.std(values, ddof=1)) / math.sqrt(values.size)
    half = float(stats.t.ppf(0.975, values.size - 1)) * spread
    return {"mean": mean, "ci95": [mean - half, mean + half]}


Rows = Sequence[Mapping[str, Any]]
"""Rows of the table `runs`, in its order."""


def combined_digest(rows: Rows) -> str:
    """A hash over the digests of all runs, in order."""
    text = "\n".join(f"{row['run']} {row['measure']} {row['digest']}" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def kpis_of(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("kpi."): value
        for name, value in row.items()
        if name.startswith("kpi.") and value is not None
    }


def figures(rows: Rows, measures: Sequence[str]) -> dict[str, Any]:
    """KPIs per measure, and paired differences from the baseline over common runs."""
    good = {(row["run"], row["measure"]): kpis_of(row) for row in rows if not row["error"]}
    found: dict[str, Any] = {"measures": {}, "paired": {}}
    for measure in measures:
        mine = [kpis for (_, m), kpis in good.items() if m == measure]
        if not mine:
            continue
        found["measures"][measure] = {
            kpi: interval(np.array([kpis[kpi] for kpis in mine])) for kpi in mine[0]
        }
        base = [
            (kpis, good[run, BASELINE])
            for (run, m), kpis in good.items()
            if m == measure and (run, BASELINE) in good
        ]
        if measure != BASELINE and base:
            found["paired"][measure] = {
                kpi: interval(np.array([kpis[kpi] - b[kpi] for kpis, b in base])) for kpi in mine[0]
            }
    return found
