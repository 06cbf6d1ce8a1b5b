"""How probable a rare, grave outcome is, by subset simulation (Au and Beck 2001).

P(KPI > x) is the product of larger probabilities: that the KPI passes a first threshold, that it
then passes a second, and so on up to x. Each threshold is the KPI that a tenth of the samples
reach. Samples beyond one come from Markov chains that begin at those that are there already, by
conditional sampling with an adaptive scale (Papaioannou, Betz, Zwirglmaier and Straub 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from federation.errors import Reason, ScenarioError
from federation.scenario.engine import Engine, Progress
from federation.scenario.run import Case, parameters_of
from federation.scenario.sampling import Inputs
from federation.scenario.sensitivity import kpis_in_order

RARE_STREAM = 7_002
"""The random stream of the samples, apart from those of studies and members."""

SHARE = 0.1
"""Of the samples of a level that begin the chains of the next."""

MOST_LEVELS = 12

SCALE = 0.6
"""How far a chain steps at first: the deviation of a step, given where it begins."""

ACCEPTED = 0.44
"""The share of steps that should be accepted; the scale follows."""

REDRAWN = 0.2
"""The share of steps that also draw the members' own chances anew."""

RUN_NUMBERS = 1 << 31

Evaluate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The outcome for rows of standard normal variables and the runs' numbers."""


@dataclass(frozen=True)
class Level:
    """One factor of the probability."""

    threshold: float
    share: float
    cov: float
    """The coefficient of variation of the share's estimate."""


@dataclass(frozen=True)
class Rarity:
    """The estimate. `is_reached` is False when no sample got beyond the threshold: then
    `probability` is what it is surely below, as far as the chains have seen."""

    probability: float
    cov: float
    levels: tuple[Level, ...]
    runs: int
    is_reached: bool

    @property
    def ci95(self) -> tuple[float, float]:
        """As if the estimate were lognormal with its coefficient of variation."""
        half = 1.96 * math.sqrt(math.log1p(self.cov**2))
        high = self.probability * math.exp(half)
        return (self.probability * math.exp(-half) if self.is_reached else 0.0, min(1.0, high))


def subset_simulation(
    evaluate: Evaluate, size: int, above: float, samples: int, seed: int
) -> Rarity:
    """P(outcome > above) over `size` independent standard normal variables and a run's number.

    `samples` at each level. Same seed, same estimate. The coefficient of variation is that of Au
    and Beck, equations 24 to 29, levels taken as independent of each other.
    """
    rng = np.random.default_rng([seed, RARE_STREAM])
    z = rng.standard_normal((samples, size))
    number = rng.integers(RUN_NUMBERS, size=samples)
    told = evaluate(z, number)
    runs = samples
    chain = np.arange(samples)  # each a chain of its own
    levels: list[Level] = []
    while True:
        ordered = np.sort(told)[::-1]
        threshold = float(ordered[max(1, round(SHARE * samples)) - 1])
        if threshold > above:
            levels.append(_level(told > above, chain, above))
            return _rarity(levels, runs, is_reached=True)
        inside = told >= threshold
        if inside.all() or len(levels) + 1 == MOST_LEVELS:
            # it does not grow any more; some may be beyond all the same
            beyond = told > above
            if beyond.any():
                levels.append(_level(beyond, chain, above))
                return _rarity(levels, runs, is_reached=True)
            return _rarity([*levels, Level(above, 1.0 / samples, 1.0)], runs, is_reached=False)
        levels.append(_level(inside, chain, threshold))
        seeds = np.flatnonzero(inside)
        z, number, told, chain, done = _chains(
            evaluate, rng, (z[seeds], number[seeds], told[seeds]), samples, threshold
        )
        runs += done


_State = tuple[np.ndarray, np.ndarray, np.ndarray]


def _chains(
    evaluate: Evaluate, rng: np.random.Generator, seeds: _State, samples: int, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """So many samples with an outcome of at least `threshold`, chain by chain, and what they
    cost in runs. All chains take a step together."""
    z, number, told = seeds
    count = len(told)
    lengths = np.full(count, samples // count)
    lengths[: samples % count] += 1
    states: list[tuple[np.ndarray, _State]] = [(np.arange(count), (z, number, told))]
    runs, scale = 0, SCALE
    for step in range(1, int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        at_z, at_number, at_told = (part[active] for part in (z, number, told))
        # what a standard normal variable is, given one that it is correlated with
        next_z = math.sqrt(1 - scale**2) * at_z + scale * rng.standard_normal(at_z.shape)
        fresh = rng.integers(RUN_NUMBERS, size=active.size)
        next_number = np.where(rng.random(active.size) < REDRAWN, fresh, at_number)
        next_told = evaluate(next_z, next_number)
        runs += active.size
        stays = next_told < threshold
        scale = min(1.0, scale * math.exp((1 - stays.mean() - ACCEPTED) / math.sqrt(step)))
        next_z[stays], next_number[stays], next_told[stays] = (
            at_z[stays],
            at_number[stays],
            at_told[stays],
        )
        z, number, told = z.copy(), number.copy(), told.copy()
        z[active], number[active], told[active] = next_z, next_number, next_told
        states.append((active, (next_z, next_number, next_told)))
    chain = np.concatenate([active for active, _ in states])
    order = np.argsort(chain, kind="stable")
    whole = [np.concatenate([state[i] for _, state in states])[order] for i in range(3)]
    return whole[0], whole[1], whole[2], chain[order], runs


def _level(inside: np.ndarray, chain: np.ndarray, threshold: float) -> Level:
    """A share and its coefficient of variation, from how samples of a chain go together."""
    count = inside.size
    share = float(inside.mean())
    if share in (0.0, 1.0):
        return Level(threshold, share, 0.0)
    ends = np.flatnonzero(np.diff(chain)) + 1
    parts = np.split(inside.astype(float), ends)
    longest = max(len(part) for part in parts)
    gamma = 0.0
    for lag in range(1, longest):
        pairs = sum(len(part) - lag for part in parts if len(part) > lag)
        products = sum(float(part[:-lag] @ part[lag:]) for part in parts if len(part) > lag)
        correlation = (products / pairs - share**2) / (share * (1 - share))
        gamma += 2.0 * pairs / count * correlation
    variance = (1 - share) / (share * count) * max(0.0, 1.0 + gamma)
    return Level(threshold, share, math.sqrt(variance))


def _rarity(levels: Sequence[Level], runs: int, *, is_reached: bool) -> Rarity:
    probability = math.prod(level.share for level in levels)
    cov = math.sqrt(sum(level.cov**2 for level in levels))
    return Rarity(probability, cov, tuple(levels), runs, is_reached)


def rarity(
    engine: Engine,
    kpi: str,
    above: float,
    *,
    measure: str,
    samples: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """P(KPI > above) at the end of a run under a measure, over the uncertain inputs and what the
    members draw themselves.

    Fails with UNKNOWN_VARIABLE when there is no such KPI, with SCENARIO_INVALID when nothing is
    uncertain or the samples are too few, and as a run does: an estimate wants all of them.
    """
    scenario = engine.scenario
    inputs = Inputs(scenario)
    if samples < round(1 / SHARE) * 10:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"{samples} samples a level are too few; 100 are the least"
        )
    if measure not in scenario.measures:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"there is no measure {measure!r}; the scenario has {', '.join(scenario.measures)}",
            {"measure": measure},
        )
    if not inputs.names:
        raise ScenarioError(Reason.SCENARIO_INVALID, "nothing is uncertain in this scenario")
    name = kpi.rpartition(".")[2]
    done = 0

    def value(kpis: Mapping[str, float]) -> float:
        if name not in kpis:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"there is no KPI {kpi!r}; there are {', '.join(kpis)}",
                {"variable": kpi},
            )
        return kpis[name]

    def evaluate(z: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        nonlocal done
        todo = [
            Case(int(number), seed, measure, parameters_of(scenario, measure, drawn))
            for number, drawn in zip(numbers, inputs.of_normals(z), strict=True)
        ]
        found = np.array([value(kpis) for kpis in kpis_in_order(engine, todo)])
        done += len(todo)
        if progress:
            progress(done, max(done, samples), f"the most so far is {found.max():.6g}")
        return found

    with engine.up():
        found = subset_simulation(evaluate, len(inputs.names), above, samples, seed)
    return {
        "kpi": name,
        "above": above,
        "measure": measure,
        "seed": seed,
        "probability": found.probability,
        "is_reached": found.is_reached,
        "cov": found.cov,
        "ci95": list(found.ci95),
        "runs": found.runs,
        "levels": [
            {"threshold": level.threshold, "share": level.share, "cov": level.cov}
            for level in found.levels
        ],
    }
