"""Which uncertain input a KPI depends on: PAWN from any study, Sobol indices from a design."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from federation.errors import Reason, ScenarioError
from federation.scenario.archive import Study
from federation.scenario.engine import Engine, Progress, remark
from federation.scenario.run import Case, parameters_of
from federation.scenario.sampling import DRAW_STREAM, Inputs
from federation.scenario.study import kpis_of

FEWEST_RUNS = 30
"""Below, PAWN tells nothing."""

RUNS_PER_SLICE = 15
MOST_SLICES = 10
"""As SALib has it; fewer where a slice would have less than `RUNS_PER_SLICE` runs."""

DUMMY = "(chance)"
"""An input without influence: what an index must exceed to mean anything."""


def pawn(study: Study, measure: str) -> dict[str, Any]:
    """PAWN indices (Pianosi and Wagener 2018) of each KPI to each uncertain input.

    The median and maximum over slices of an input's range of the Kolmogorov-Smirnov distance
    between the KPI in the slice and the KPI at all, in 0..1. The same for an input that is the
    runs' order shuffled is told as `(chance)`: with so few runs, an index below it means nothing.
    Fails with TOO_FEW_RUNS.
    """
    from SALib.analyze import pawn as method  # type: ignore[import-untyped]

    runs = study.good(measure)
    names = [n for n in _inputs(study, measure) if f"parameter.{n}" in runs]
    _check(names, len(runs))
    values = runs[[f"parameter.{name}" for name in names]].to_numpy(dtype=float)
    shuffled = np.random.default_rng([len(runs), DRAW_STREAM]).permutation(len(runs))
    values = np.column_stack([values, shuffled])
    told_of = [*names, DUMMY]
    problem = {
        "num_vars": len(told_of),
        "names": told_of,
        "bounds": [[0.0, 1.0]] * len(told_of),
    }
    slices = max(2, min(MOST_SLICES, len(runs) // RUNS_PER_SLICE))
    found = {}
    for kpi in study.kpis:
        told = runs[f"kpi.{kpi}"].to_numpy(dtype=float)
        if np.ptp(told) == 0.0:
            continue  # it depends on nothing
        with warnings.catch_warnings():  # of slices without runs, for inputs of few values
            warnings.simplefilter("ignore", RuntimeWarning)
            indices = method.analyze(problem, values, told, S=slices)
        found[kpi] = {
            name: {"median": float(indices["median"][i]), "maximum": float(indices["maximum"][i])}
            for i, name in enumerate(told_of)
        }
    return {
        "method": "pawn",
        "measure": measure,
        "runs": len(runs),
        "slices": slices,
        "kpis": found,
    }


def sobol(
    engine: Engine,
    measure: str,
    base: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """First-order and total Sobol indices of each KPI, from `base` * (inputs + 2) runs of their
    own in Saltelli's design (Saltelli 2010), with 95 % intervals by bootstrap.

    Runs that differ in inputs alone share the members' seeds, so what the members draw is no
    input of its own. `base` is a power of two. Fails with SCENARIO_INVALID when inputs are
    correlated, and as the runs do: indices want all of them.
    """
    from SALib.analyze import sobol as method
    from SALib.sample import sobol as design  # type: ignore[import-untyped]

    scenario = engine.scenario
    inputs = Inputs(scenario)
    names = [n for n in inputs.names if n not in scenario.measures[measure].parameters]
    _check(names, FEWEST_RUNS)
    if not inputs.are_independent:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            "Sobol indices are defined for independent inputs; PAWN takes correlated ones",
        )
    if base < 2 or base & (base - 1):
        raise ScenarioError(Reason.SCENARIO_INVALID, f"--sobol {base}: give a power of two")
    size = len(inputs.names)
    problem = {"num_vars": size, "names": list(inputs.names), "bounds": [[0.0, 1.0]] * size}
    unit = design.sample(problem, base, calc_second_order=False, seed=seed)
    todo = [
        Case(index // (size + 2), seed, measure, parameters_of(scenario, measure, drawn))
        for index, drawn in enumerate(inputs.of_probabilities(unit))
    ]
    kpis = kpis_in_order(engine, todo, progress)
    found = {}
    for kpi in kpis[0]:
        told = np.array([one[kpi] for one in kpis])
        if np.ptp(told) == 0.0:
            continue
        indices = method.analyze(problem, told, calc_second_order=False, seed=seed)
        found[kpi] = {
            name: {key: float(indices[key][i]) for key in ("S1", "S1_conf", "ST", "ST_conf")}
            for i, name in enumerate(inputs.names)
        }
    return {
        "method": "sobol",
        "measure": measure,
        "runs": len(todo),
        "base": base,
        "kpis": found,
    }


def kpis_in_order(
    engine: Engine, todo: Sequence[Case], progress: Progress | None = None
) -> list[Mapping[str, float]]:
    """The KPIs of the cases in the order asked for; raises what ends one of them early."""
    found: list[Mapping[str, float]] = [{}] * len(todo)
    for done, (index, finding) in enumerate(engine.numbered(todo), 1):
        if finding.failure is not None:
            raise finding.failure
        found[index] = kpis_of(finding.row)
        if progress:
            row = finding.row
            progress(done, len(todo), remark(finding.case, "", float(row["wall_s"])))
    return found


def _inputs(study: Study, measure: str) -> list[str]:
    """The uncertain inputs that the measure leaves as they were drawn."""
    scenario = study.scenario
    drawn = dict.fromkeys([*sorted(scenario.uncertainty), *study.sampled])
    return [name for name in drawn if name not in scenario.measures[measure].parameters]


def _check(names: Sequence[str], runs: int) -> None:
    if not names:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, "nothing is uncertain here, so no KPI depends on anything"
        )
    if runs < FEWEST_RUNS:
        raise ScenarioError(
            Reason.TOO_FEW_RUNS,
            f"{runs} good runs tell nothing about dependence; do {FEWEST_RUNS} or more, such as "
            "with --runs 100",
            {"runs": str(runs)},
        )
