"""An ensemble of a scenario: what is drawn, how the runs are spread, what they say together."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats
from scipy.stats import qmc

from federation.core.ledger import EventRecord
from federation.errors import PlanError, Reason, ScenarioError, TwinError
from federation.scenario.explain import Causes
from federation.scenario.run import (
    Case,
    MemberCost,
    Outcome,
    PlannerFactory,
    parameters_of,
    run_local,
)
from federation.scenario.spec import Distribution, Scenario
from federation.twin import Vector

DRAW_STREAM = 7_001
"""The random stream of the draws, apart from those of the members."""

RAY_TIMEOUT_S = 5.0
"""How long a cluster's address may take to answer."""

BASELINE = "none"
"""The measure that the others are compared with, when the scenario has it."""

Progress = Callable[[int, int, str], None]
"""Hears how many runs are done, of how many, and a line about the last."""


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


def draws(scenario: Scenario, runs: int, seed: int) -> list[dict[str, float]]:
    """Per run a value for every uncertain parameter, by Latin hypercube.

    A single run is the central one: every parameter at its median.
    """
    names = sorted(scenario.uncertainty)
    if not names:
        return [{} for _ in range(runs)]
    if runs == 1:
        unit = np.full((1, len(names)), 0.5)
    else:
        unit = qmc.LatinHypercube(
            len(names), rng=np.random.default_rng([seed, DRAW_STREAM])
        ).random(runs)
    columns = [quantile(scenario.uncertainty[n], unit[:, i]) for i, n in enumerate(names)]
    return [{n: float(columns[i][run]) for i, n in enumerate(names)} for run in range(runs)]


def cases(scenario: Scenario, measures: Sequence[str], runs: int, seed: int) -> list[Case]:
    """All runs of a study: run by run, each under every measure."""
    for measure in measures:
        if measure not in scenario.measures:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"there is no measure {measure!r}; the scenario has {', '.join(scenario.measures)}",
                {"measure": measure},
            )
    return [
        Case(run, seed, measure, parameters_of(scenario, measure, drawn))
        for run, drawn in enumerate(draws(scenario, runs, seed))
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


@dataclass(frozen=True)
class Engine:
    """How runs are done: in this process, or on Ray with some workers.

    `planner` is the `module:function` of a `PlannerFactory`, by name so that a worker in
    another process can find it.
    """

    scenario: Scenario
    planner: str
    workers: int = 1
    address: str | None = None

    def run(
        self,
        todo: Sequence[Case],
        *,
        keep: Callable[[Case], bool] = lambda case: False,
        progress: Progress | None = None,
    ) -> list[Outcome]:
        """Do every case and give the outcomes in the order asked for; failures are collected."""
        if self.workers == 1 and self.address is None:
            outcomes = self._one_after_another(todo, keep, progress)
        else:
            outcomes = self._on_ray(todo, keep, progress)
        return outcomes

    def _one_after_another(
        self, todo: Sequence[Case], keep: Callable[[Case], bool], progress: Progress | None
    ) -> list[Outcome]:
        outcomes = []
        for case in todo:
            outcomes.append(attempt(self.scenario, case, self.planner, keep(case)))
            if progress:
                progress(len(outcomes), len(todo), _remark(outcomes[-1]))
        return outcomes

    def _on_ray(
        self, todo: Sequence[Case], keep: Callable[[Case], bool], progress: Progress | None
    ) -> list[Outcome]:
        try:
            import ray
        except ImportError:
            raise ScenarioError(
                Reason.MISSING_EXTRA, "several workers need Ray: install multitwin[study]"
            ) from None
        waiting: dict[Any, int] = {}
        mine = not ray.is_initialized()
        if mine:
            start_ray(self.workers, self.address)
        try:
            remote = ray.remote(num_cpus=1, max_retries=2)(attempt)
            scenario = ray.put(self.scenario)
            found: dict[int, Outcome] = {}
            ahead = iter(enumerate(todo))
            while len(found) < len(todo):
                while len(waiting) < 2 * self.workers and (item := next(ahead, None)):
                    index, case = item
                    waiting[remote.remote(scenario, case, self.planner, keep(case))] = index
                done, _ = ray.wait(list(waiting), num_returns=1)
                for reference in done:
                    index = waiting.pop(reference)
                    try:
                        found[index] = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        cause = getattr(error, "cause", None)
                        if isinstance(cause, ScenarioError):
                            raise cause from None
                        lost = f"the worker was lost: {error}".splitlines()[0]
                        failure = TwinError(Reason.MEMBER_LOST, lost)
                        found[index] = Outcome(todo[index], failure=failure)
                    if progress:
                        progress(len(found), len(todo), _remark(found[index]))
            return [found[index] for index in range(len(todo))]
        finally:
            for reference in waiting:  # only after an interruption
                ray.cancel(reference, force=True)
            if mine:
                ray.shutdown()


def start_ray(workers: int, address: str | None) -> None:
    """Start a local Ray for this process only, or join the cluster at `address`.

    Fails with UNREACHABLE when no cluster is there; Ray itself would go on asking for minutes.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None:
        where = {"address": address}
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit() and "/" not in host:
                socket.create_connection((host, int(port)), RAY_TIMEOUT_S).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            text = f"there is no Ray cluster at {address}: {error}".splitlines()[0]
            raise ScenarioError(Reason.UNREACHABLE, text, where) from None
    else:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )


def attempt(scenario: Scenario, case: Case, planner: str, keep_ledger: bool) -> Outcome:
    """Do one run; a failure becomes part of the outcome, so that the study goes on.

    A wrong request is no failure of a run: every other would meet it too, so it is raised.
    """
    factory = planner_factory(planner)
    try:
        return run_local(scenario, case, factory, keep_ledger=keep_ledger)
    except (TwinError, PlanError) as failure:
        return Outcome(case, failure=failure)


def planner_factory(path: str) -> PlannerFactory:
    module, _, name = path.partition(":")
    found: PlannerFactory = getattr(__import__(module, fromlist=[name]), name)
    return found


def _remark(outcome: Outcome) -> str:
    case = outcome.case
    what = outcome.error or f"{outcome.wall_s:.1f} s"
    return f"run {case.run} {case.measure}: {what}"


def interval(values: Vector) -> dict[str, Any]:
    """Mean and 95 % confidence interval by Student's t; a single value has no interval."""
    mean = float(np.mean(values))
    if values.size < 2:
        return {"mean": mean, "ci95": [mean, mean]}
    spread = float(np.std(values, ddof=1)) / math.sqrt(values.size)
    half = float(stats.t.ppf(0.975, values.size - 1)) * spread
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def combined_digest(outcomes: Sequence[Outcome]) -> str:
    """A hash over the digests of all runs, in order."""
    text = "\n".join(f"{o.case.run} {o.case.measure} {o.digest}" for o in outcomes)
    return hashlib.sha256(text.encode()).hexdigest()


def figures(outcomes: Sequence[Outcome], measures: Sequence[str]) -> dict[str, Any]:
    """KPIs per measure, and paired differences from the baseline over common runs."""
    good = {(o.case.run, o.case.measure): o for o in outcomes if not o.error}
    found: dict[str, Any] = {"measures": {}, "paired": {}}
    for measure in measures:
        mine = [o for (_, m), o in good.items() if m == measure]
        if not mine:
            continue
        found["measures"][measure] = {
            kpi: interval(np.array([o.kpis[kpi] for o in mine])) for kpi in mine[0].kpis
        }
        base = [(o, good[o.case.run, BASELINE]) for o in mine if (o.case.run, BASELINE) in good]
        if measure != BASELINE and base:
            found["paired"][measure] = {
                kpi: interval(np.array([o.kpis[kpi] - b.kpis[kpi] for o, b in base]))
                for kpi in mine[0].kpis
            }
    return found


def summarise(
    scenario: Scenario, seed: int, measures: Sequence[str], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """What `summary.json` says of the runs; who did them and how long it took comes from them
    who know."""
    first = next((o for o in outcomes if not o.error), None)
    return {
        "region": scenario.region,
        "scenario": scenario.name,
        "seed": seed,
        "digest": combined_digest(outcomes),
        "runs": len({o.case.run for o in outcomes}),
        "failed_runs": [
            {"run": o.case.run, "measure": o.case.measure, "seed": seed, "error": o.error}
            for o in outcomes
            if o.error
        ],
        **figures(outcomes, measures),
        "cascade": cascade_of(first.events, first.domains) if first else {},
        "critical_path": _waits_of(first) if first else {},
    }


def _waits_of(outcome: Outcome) -> dict[str, Any]:
    """What the wall time of a run went to; if it was paced, how late it was; what was too old."""
    path = outcome.critical_path
    found: dict[str, Any] = {"run": outcome.case.run, "measure": outcome.case.measure}
    if path is not None:
        found |= {"wall_s": path.wall_s, **asdict(path)}
    if outcome.pace is not None:
        found["pace"] = dict(outcome.pace)
    if outcome.stale:
        found["stale"] = [asdict(stale) for stale in outcome.stale]
    return found


def cascade_of(events: Sequence[EventRecord], domains: Mapping[str, str]) -> dict[str, Any]:
    """The `cascade` of a summary from the events of one run."""
    causes = Causes(events, domains)
    cascade = causes.cascade()
    return {
        "events": cascade.events,
        "domains": list(cascade.domains),
        "depth": cascade.depth,
        "longest_chain": [causes.line(i) for i in cascade.longest_chain],
    }


def timing(outcomes: Sequence[Outcome], started: float) -> dict[str, Any]:
    """Seconds: of the whole, the median of a run, and what members and engine took of it."""
    good = [o for o in outcomes if not o.error]
    if not good:
        return {"wall_s": time.perf_counter() - started}
    names = dict.fromkeys(name for o in good for name in o.costs)
    none = MemberCost()
    per_member = {
        name: float(np.median([o.costs.get(name, none).cpu_s for o in good])) for name in names
    }
    cpu = float(np.median([o.cpu_s for o in good]))
    return {
        "wall_s": time.perf_counter() - started,
        "run_wall_s": float(np.median([o.wall_s for o in good])),
        "run_cpu_s": cpu,
        "run_cpu_s_by_member": per_member,
        "run_cpu_s_engine": float(
            np.median([o.cpu_s - sum(c.cpu_s for c in o.costs.values()) for o in good])
        ),
    }


def local_members(scenario: Scenario, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The `members` of a summary for runs in this process or on workers."""
    rows = []
    described = next((o.descriptions for o in outcomes if o.descriptions), {})
    for name, member in scenario.members.items():
        costs = [o.costs[name] for o in outcomes if name in o.costs]
        rows.append(
            {
                "name": name,
                "address": f"local:{member.twin}",
                "pid": os.getpid(),
                "version": described[name].version if name in described else "",
                "wall_s": sum(c.wall_s for c in costs),
                "cpu_s": sum(c.cpu_s for c in costs),
            }
        )
    return rows
