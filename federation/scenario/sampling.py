"""The uncertain parameters of a study: what values they take in which run."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.stats import qmc

from federation.errors import Reason, ScenarioError
from federation.scenario.spec import LATIN_HYPERCUBE, SOBOL, Distribution, Scenario
from federation.twin import Vector

DRAW_STREAM = 7_001
"""The random stream of the draws, apart from those of the members."""

EDGE = 2.0**-53
"""How near to 0 and 1 a probability may come, where a normal variable would be infinite."""


def quantile(distribution: Distribution, probability: Vector) -> Vector:
    """The inverse of a distribution's cumulative function at `probability`, in (0, 1)."""
    d = distribution
    if d.uniform is not None:
        low, high = d.uniform
        found = stats.uniform.ppf(probability, low, high - low)
    elif d.normal is not None:
        found = stats.norm.ppf(probability, *d.normal)
    elif d.lognormal is not None:
        found = stats.lognorm.ppf(probability, d.lognormal[1], scale=d.lognormal[0])
    elif d.triangular is not None:
        low, mode, high = d.triangular
        found = stats.triang.ppf(probability, (mode - low) / (high - low), low, high - low)
    else:
        values = np.array(d.choice)
        found = values[np.minimum((probability * values.size).astype(int), values.size - 1)]
    return np.asarray(found, dtype=np.float64)


class Inputs:
    """The uncertain parameters of a scenario by name, and what they are made from.

    Behind each is a standard normal variable z and its probability Phi(z), through which the
    distribution's quantile is taken. Correlated ones get z = L y with independent y, where L L' is
    the scenario's correlation matrix: a Gaussian copula.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.names = tuple(sorted(scenario.uncertainty))
        self._distributions = [scenario.uncertainty[name] for name in self.names]
        matrix = scenario.copula()
        self._factor = None if matrix is None else np.linalg.cholesky(matrix)

    @property
    def are_independent(self) -> bool:
        return self._factor is None

    def of_normals(self, independent: np.ndarray) -> list[dict[str, float]]:
        """Values for rows of independent standard normal variables, one column per name."""
        z = independent if self._factor is None else independent @ self._factor.T
        return self._of_marginals(np.clip(stats.norm.cdf(z), EDGE, 1 - EDGE))

    def of_probabilities(self, independent: np.ndarray) -> list[dict[str, float]]:
        """Values for rows of independent probabilities, one column per name."""
        if self._factor is not None:
            return self.of_normals(stats.norm.ppf(np.clip(independent, EDGE, 1 - EDGE)))
        return self._of_marginals(independent)

    def _of_marginals(self, probability: np.ndarray) -> list[dict[str, float]]:
        columns = [quantile(d, probability[:, i]) for i, d in enumerate(self._distributions)]
        return [
            {name: float(column[row]) for name, column in zip(self.names, columns, strict=True)}
            for row in range(len(probability))
        ]


def draws(scenario: Scenario, runs: int, seed: int) -> list[dict[str, float]]:
    """Per run a value for every uncertain parameter, as the scenario's `sampling` says.

    A run's values depend on its number, the seed and `runs`. A single run, unless its values are
    given, is the central one: every parameter at its median. Fails with MISSING_FILE or
    SCENARIO_INVALID when given samples are not there or not enough.
    """
    if scenario.sampling not in (LATIN_HYPERCUBE, SOBOL):
        return _given(scenario, scenario.folder / scenario.sampling, runs)
    inputs = Inputs(scenario)
    size = len(inputs.names)
    if not size:
        return [{} for _ in range(runs)]
    rng = np.random.default_rng([seed, DRAW_STREAM])
    if runs == 1:
        unit = np.full((1, size), 0.5)
    elif scenario.sampling == SOBOL:
        with warnings.catch_warnings():  # of numbers of runs that are no power of two
            warnings.simplefilter("ignore", UserWarning)
            unit = np.clip(qmc.Sobol(size, scramble=True, rng=rng).random(runs), EDGE, 1 - EDGE)
    else:
        unit = qmc.LatinHypercube(size, rng=rng).random(runs)
    return inputs.of_probabilities(unit)


def _given(scenario: Scenario, path: Path, runs: int) -> list[dict[str, float]]:
    """The first `runs` rows of a CSV file whose columns are named as parameters are."""
    where = {"file": str(path)}
    if not path.is_file():
        text = f"the samples {path} are not there; paths are relative to the scenario"
        raise ScenarioError(Reason.MISSING_FILE, text, where)
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        names: Sequence[str] = rows.fieldnames or ()
        if missing := sorted(set(scenario.uncertainty) - set(names)):
            text = f"{path} has no column for the uncertain parameter {missing[0]}"
            raise ScenarioError(Reason.SCENARIO_INVALID, text, where)
        for name in names:
            if name.partition(".")[0] not in scenario.members:
                text = f"{path}: the column {name!r} names no parameter of a member"
                raise ScenarioError(Reason.UNKNOWN_MEMBER, text, where)
        found: list[dict[str, float]] = []
        for row in rows:
            if len(found) == runs:
                break
            found.append({name: _number(row[name], path, rows.line_num) for name in names})
    if len(found) < runs:
        text = f"{path} has samples for {len(found)} runs, and {runs} are asked for"
        raise ScenarioError(Reason.SCENARIO_INVALID, text, where)
    return found


def _number(text: str | None, path: Path, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"{path}, line {line}: {text!r} is no finite number",
            {"file": str(path), "line": str(line)},
        )
    return value
